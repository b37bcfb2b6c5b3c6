//! Letters that the store cannot read, because they are damaged, gone, or of a newer version.

use essentially_once::{
    Error,
    backend::{DeadLetters, Transaction},
    consumer::{Operator, dead_letters},
};

use crate::{
    letters::{BY_KEY, BY_OFFSET, DUE, SMALLEST, VALUES, field, letter, park, store_by_hand, time},
    support::{Outcome, Stage, advance, assert_error, text_of},
};

pub(crate) async fn a_letter_that_cannot_be_read_says_why_and_can_be_removed() -> Outcome {
    let stage = Stage::start().await?;
    let mut newer = SMALLEST;
    newer[1] = "2";
    store_by_hand(&stage, 7, &newer)?;
    stage.ask(&format!("HSET {VALUES} {} x", field(8)))?;
    stage.ask(&format!("ZADD {DUE} 5 {}", field(9)))?;
    stage.ask(&format!("ZADD {BY_OFFSET} 0 {}", field(9)))?;
    for (offset, why) in [(7, "version is \"2\", not 1"), (8, "not a packed array")] {
        let letter = stage.begin().await?.letter(offset.into()).await?.expect("a letter");
        assert!(letter.unreadable);
        assert!(letter.last_reason.contains(why), "{}", letter.last_reason);
    }
    let mut tx = stage.begin().await?;
    assert!(tx.first_due().await?.is_none());
    let listed = tx.list(None, 10).await?;
    let last = listed.last().expect("a letter");
    assert!(last.unreadable && last.record.offset == 9.into());
    assert!(
        last.last_reason.contains("its value is missing"),
        "{}",
        last.last_reason
    );
    for offset in [7_u64, 8, 9] {
        tx.letter(offset.into()).await?;
        assert!(tx.remove(offset.into()).await?, "{offset}");
    }
    tx.commit(advance(0, 1)).await?;
    for key in [VALUES, BY_OFFSET, BY_KEY, DUE] {
        assert_eq!(stage.ask(&format!("EXISTS {key}"))?, "0", "{key}");
    }
    // A newer program changes a letter after an operator has seen it.
    store_by_hand(&stage, 7, &newer)?;
    let seen = dead_letters::get(&stage.consumer, &stage.store, 7.into())
        .await?
        .ok_or("no letter")?;
    newer[3] = "edited";
    store_by_hand(&stage, 7, &newer)?;
    let refused = dead_letters::discard(&stage.consumer, &stage.store, &seen, &Operator::new("test")).await;
    assert_error!(refused, Error::Failed { .. }, "changed since");
    Ok(())
}

pub(crate) async fn the_values_of_letters_may_be_gone() -> Outcome {
    let stage = Stage::start().await?;
    park(&stage, 0, &[letter(1, Some("a"))]).await?;
    stage.ask(&format!("DEL {VALUES}"))?;
    let mut tx = stage.begin().await?;
    assert_eq!(tx.total().await?, 1);
    assert_eq!(tx.counts(None, 10).await?, [("a".into(), 1)]);
    drop(tx);
    let mut tx = stage.begin().await?;
    let letter = tx.letter(1.into()).await?.ok_or("no letter")?;
    assert!(letter.unreadable && letter.key().is_some_and(|key| key == "a"));
    assert!(tx.remove(1.into()).await?);
    tx.commit(advance(1, 2)).await?;
    for key in [VALUES, BY_OFFSET, BY_KEY, DUE] {
        assert_eq!(stage.ask(&format!("EXISTS {key}"))?, "0", "{key}");
    }
    Ok(())
}

pub(crate) async fn many_due_letters_that_cannot_be_read_are_passed_over_quickly() -> Outcome {
    let stage = Stage::start().await?;
    let mut due: Vec<_> = (0..2_001).map(|offset| letter(offset, None)).collect();
    for letter in &mut due {
        letter.due = Some(time(letter.record.offset.lo()));
    }
    park(&stage, 0, &due).await?;
    let damage = "for n = 0, 1999 do
        redis.call('HSET', KEYS[1], string.format('%020d-%020d', 0, n), 'damaged') end";
    stage.server.command(&["EVAL", damage, "1", VALUES])?;
    let commands = |stage: &Stage| stage.server.command(&["INFO", "commandstats"]);
    stage.ask("CONFIG RESETSTAT")?;
    let found = stage
        .begin()
        .await?
        .first_due()
        .await?
        .map(|letter| letter.record.offset);
    assert_eq!(found, Some(2_000.into()));
    let stats = commands(&stage)?;
    let evals = stats
        .text()
        .lines()
        .find_map(|line| line.strip_prefix("cmdstat_eval:calls="));
    let evals: u64 = evals
        .and_then(|line| line.split(',').next())
        .ok_or("no calls")?
        .parse()?;
    assert!(evals <= 5, "{evals} requests");
    Ok(())
}
