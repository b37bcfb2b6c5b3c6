//! Native commands run in the same step as the commit, and are checked before it.

use essentially_once::{Error, backend::Source};

use crate::support::{Outcome, Stage, assert_error, command, text_of};

pub(crate) async fn commands_run_in_the_same_step() -> Outcome {
    let stage = Stage::start().await?;
    let all = [
        "HINCRBY freight Brazil 32",
        "HINCRBY freight Brazil 10",
        "RPUSH list a b c d e f g h i",
        "RPUSH list j",
        "DEL list2",
        "SADD set a",
        "SADD set b",
        "INCR count",
        "XADD stream * field value",
        "ZUNIONSTORE zset 1 set",
        "PUBLISH channel message",
        "EXPIRE set 100",
    ];
    stage.commit(0, all.map(command)).await?;
    assert_eq!(stage.ask("HGET freight Brazil")?, "42");
    assert_eq!(stage.ask("LRANGE list 0 -1")?, "a b c d e f g h i j");
    assert_eq!(stage.ask("SCARD set")?, "2");
    assert_eq!(stage.ask("GET count")?, "1");
    assert_eq!(stage.ask("XLEN stream")?, "1");
    assert_eq!(stage.ask("ZCARD zset")?, "2");
    assert_eq!(stage.revision().await?, 1);
    Ok(())
}

pub(crate) async fn a_fenced_commit_runs_no_command() -> Outcome {
    let stage = Stage::start().await?;
    stage.commit(0, []).await?;
    assert_error!(stage.commit(0, [command("SET a 1")]).await, Error::Fenced { .. },);
    assert_eq!(stage.ask("EXISTS a")?, "0");
    Ok(())
}

pub(crate) async fn the_wrong_type_is_found_before_the_first_write() -> Outcome {
    let stage = Stage::start().await?;
    stage.ask("SET text 1")?;
    stage.ask("RPUSH list 1")?;
    let wrong = [
        "HSET text a 1",
        "HINCRBY list a 1",
        "RPUSH text a",
        "LMOVE empty text LEFT RIGHT",
        "SADD text a",
        "SMOVE empty text a",
        "ZADD text 1 a",
        "INCR list",
        "APPEND list a",
        "PFADD list a",
        "XADD text * a b",
        "XGROUP CREATE text group $ MKSTREAM",
    ];
    for wrong in wrong {
        let result = stage.commit(0, ["SET before 1", wrong].map(command)).await;
        let key = if wrong.contains("text") { "(text)" } else { "(list)" };
        assert_error!(result, Error::Failed { .. }, key, "WRONGTYPE");
        assert_eq!(stage.ask("EXISTS before")?, "0", "{wrong}");
    }
    assert_eq!(stage.revision().await?, 0);
    Ok(())
}

pub(crate) async fn an_invalid_number_is_found_before_the_first_write() -> Outcome {
    let stage = Stage::start().await?;
    stage.ask("HSET hash text abc zero 0 number -12 padded 012 float 1.5 empty1 1")?;
    stage.ask("SET text 0x10")?;
    for wrong in [
        "HINCRBY hash text 1",
        "HINCRBY hash padded 1",
        "HINCRBY hash float 1",
        "INCR text",
        "DECRBY text 2",
    ] {
        let result = stage.commit(0, ["SET before 1", wrong].map(command)).await;
        assert_error!(result, Error::Failed { .. }, "not an integer");
        assert_eq!(stage.ask("EXISTS before")?, "0", "{wrong}");
    }
    for wrong in [
        "HINCRBY hash zero one",
        "INCRBY new 1.5",
        "DECRBY new 99999999999999999999",
    ] {
        assert_error!(
            stage.commit(0, [command(wrong)]).await,
            Error::Failed { .. },
            "not an integer"
        );
    }
    let fine = [
        "HINCRBY hash zero 1",
        "HINCRBY hash number 1",
        "HINCRBY hash new 1",
        "INCR new",
        "HINCRBY hash zero 1",
    ];
    stage.commit(0, fine.map(command)).await?;
    assert_eq!(stage.ask("HMGET hash zero number new")?, "2 -11 1");
    // The script reads many fields in pieces.
    stage.ask("HSET hash 2500 abc")?;
    let many = (0..3_000).map(|field| command(&format!("HINCRBY hash {field} 1")));
    assert_error!(
        stage.commit(1, many).await,
        Error::Failed { .. },
        "\"2500\" in \"hash\""
    );
    assert_eq!(stage.ask("HEXISTS hash 0")?, "0");
    Ok(())
}

pub(crate) async fn what_the_transaction_itself_writes_is_not_checked() -> Outcome {
    let stage = Stage::start().await?;
    for key in ["a", "b", "c", "d"] {
        stage.ask(&format!("SET {key} text"))?;
    }
    let commands = [
        "DEL a",
        "HSET a f 1",
        "SET b 1",
        "INCR b",
        "RENAME c e",
        "SADD c x",
        "GETDEL d",
        "LPUSH d x",
        "HSET h f 1",
        "HINCRBY h f 1",
    ];
    stage.commit(0, commands.map(command)).await?;
    assert_eq!(stage.ask("GET b")?, "2");
    Ok(())
}

pub(crate) async fn counting_together_is_counting_one_by_one() -> Outcome {
    let stage = Stage::start().await?;
    let kinds = [
        "HINCRBY h f 1",
        "HINCRBY h f -20",
        "HINCRBY h g 300",
        "hincrby h f 7",
        "HSET h f 5",
        "DEL h",
        "INCRBY n 2",
        "INCRBY n -30",
        "INCR n",
        "DECRBY n 4",
        "SET n 6",
        "HINCRBY i f 8",
        "RENAME h i",
        "HDEL h f",
        "HINCRBY h f 0",
        "COPY h i REPLACE",
        "SET h:f 1",
    ];
    let state = || Ok::<_, Source>((stage.ask("HGETALL h")?, stage.ask("HGETALL i")?, stage.ask("GET n")?));
    let mut random = fastrand::Rng::with_seed(7);
    let mut revision = 0;
    for _ in 0..300 {
        let commands: Vec<&str> = (0..random.usize(1..25))
            .map(|_| kinds[random.usize(..kinds.len())])
            .collect();
        stage.ask("DEL h i n")?;
        stage.ask("HSET h f 100 g 0")?;
        if commands.iter().any(|command| stage.ask(command).is_err()) {
            continue;
        }
        let expected = state()?;
        stage.ask("DEL h i n")?;
        stage.ask("HSET h f 100 g 0")?;
        stage
            .commit(revision, commands.iter().map(|text| command(text)))
            .await?;
        revision += 1;
        assert_eq!(state()?, expected, "{commands:?}");
    }
    assert!(revision > 100, "{revision}");
    stage.ask("CONFIG RESETSTAT")?;
    let counting = (0..100).map(|number| command(&format!("HINCRBY h field{} 1", number % 10)));
    stage.commit(revision, counting).await?;
    let stats = stage.ask("INFO commandstats")?;
    assert!(stats.contains("cmdstat_hincrby:calls=10,"), "{stats}");
    Ok(())
}

pub(crate) async fn sums_that_overflow_are_counted_one_by_one() -> Outcome {
    let stage = Stage::start().await?;
    stage.ask("HSET h f -9000000000000000000")?;
    let large = ["HINCRBY h f 9000000000000000000", "HINCRBY h f 9000000000000000000"];
    stage.commit(0, large.map(command)).await?;
    assert_eq!(stage.ask("HGET h f")?, "9000000000000000000");
    Ok(())
}
