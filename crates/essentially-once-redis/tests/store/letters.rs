//! Dead letters: the format, the indices, and what a server refuses.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use essentially_once::{
    Consumer, Error, Handler, HandlerError, KeyValue, Log, NewRecord, Offset, OffsetStore, Record, async_trait,
    backend::{DeadLetter, DeadLetters, Source, Transaction},
    consumer::{
        DeadLetterOptions, Operator,
        dead_letters::{self, LetterFilter},
    },
};
use essentially_once_redis::{Redis, RedisOptions, RedisTx};
use test_servers::{Cut, Proxy, Reply};

use crate::support::{Outcome, Stage, advance, assert_error, command, numbering, text_of};

pub(crate) const VALUES: &str = "essentially-once:{c}:letters";
pub(crate) const BY_OFFSET: &str = "essentially-once:{c}:letters-by-offset";
pub(crate) const BY_KEY: &str = "essentially-once:{c}:letters-by-key";
pub(crate) const DUE: &str = "essentially-once:{c}:letters-due";

pub(crate) fn time(millis: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(1_700_000_000_000 + millis)
}

pub(crate) fn letter(offset: impl Into<Offset>, key: Option<&str>) -> DeadLetter {
    let offset = offset.into();
    let mut record = Record::new(offset, time(1), format!("payload of {offset}"));
    record.key = key.map(|key| key.to_owned().into());
    DeadLetter::new(record, 1, "a reason", time(2))
}

pub(crate) fn field(offset: u64) -> String {
    format!("{:020}-{offset:020}", 0)
}

fn offsets(letters: &[DeadLetter]) -> Vec<u64> {
    letters.iter().map(|letter| letter.record.offset.lo()).collect()
}

/// Parks letters in the commit after this many.
pub(crate) async fn park(stage: &Stage, commits: u64, letters: &[DeadLetter]) -> Outcome {
    let mut tx = stage.begin().await?;
    for letter in letters {
        tx.park(letter).await?;
    }
    Ok(tx.commit(advance(commits, commits + 1)).await?)
}

/// The members and scores of a sorted set.
fn members(stage: &Stage, key: &str) -> Result<Vec<String>, Source> {
    let reply = stage.server.command(&["ZRANGE", key, "0", "-1", "WITHSCORES"])?;
    let (pairs, []) = reply.list().as_chunks::<2>() else {
        return Err("an odd reply".into());
    };
    let shown = pairs
        .iter()
        .map(|[member, score]| format!("{} {}", member.text(), score.text()));
    Ok(shown.collect())
}

pub(crate) async fn letters_are_readable_with_the_servers_own_tools() -> Outcome {
    let stage = Stage::start().await?;
    let mut letter = letter(Offset::new(1_700_000_000_000, 3), Some("Chi\0le"));
    letter.record.headers = vec![
        ("b".into(), "2".into()),
        ("a".into(), "1".into()),
        ("b".into(), "3".into()),
    ];
    letter.record.origin = Some(essentially_once::Origin::of(numbering("web#17"), 5));
    letter.last_reason = "another reason".into();
    letter.due = Some(time(500));
    park(&stage, 0, &[letter]).await?;
    let field = "00000001700000000000-00000000000000000003";
    assert_eq!(stage.ask(&format!("HKEYS {VALUES}"))?, field);
    assert_eq!(members(&stage, BY_OFFSET)?, [format!("{field} Chi\0le 0")]);
    // The byte 255 is not UTF-8.
    assert_eq!(members(&stage, BY_KEY)?, [format!("Chi\0\u{fffd}le\0{field} 0")]);
    assert_eq!(members(&stage, DUE)?, [format!("{field} 1700000000500")]);
    let unpack = "return cmsgpack.unpack(redis.call('HGET', KEYS[1], ARGV[1]))";
    let fields = stage.server.command(&["EVAL", unpack, "1", VALUES, field])?;
    let fields: Vec<&str> = fields.list().iter().map(Reply::text).collect();
    let expected = [
        ["essentially-once", "1"],
        ["tries", "1"],
        ["first_reason", "a reason"],
        ["last_reason", "another reason"],
        ["parked_at", "1700000000002"],
        ["last_failed_at", "1700000000002"],
        ["due", "1700000000500"],
        ["version", "1"],
        ["appended_at", "1700000000001"],
        ["key", "Chi\0le"],
        ["producer", "web#17"],
        ["sequence", "5"],
        ["h:b", "2"],
        ["h:a", "1"],
        ["h:b", "3"],
        ["payload", "payload of 1700000000000-3"],
    ];
    assert_eq!(fields, expected.concat());
    Ok(())
}

/// Stores a letter as another program would.
pub(crate) fn store_by_hand(stage: &Stage, offset: u64, fields: &[&str]) -> Outcome {
    let field = field(offset);
    let pack = "redis.call('HSET', KEYS[1], ARGV[1], cmsgpack.pack({unpack(ARGV, 2)}))
        redis.call('ZADD', KEYS[2], 0, ARGV[1])";
    let mut words = vec!["EVAL", pack, "2", VALUES, BY_OFFSET, &field];
    words.extend(fields);
    stage.server.command(&words)?;
    Ok(())
}

pub(crate) const SMALLEST: [&str; 18] = [
    "essentially-once",
    "1",
    "payload",
    "",
    "version",
    "18446744073709551615",
    "appended_at",
    "-1",
    "first_reason",
    "",
    "last_reason",
    "",
    "parked_at",
    "0",
    "last_failed_at",
    "0",
    "tries",
    "0",
];

pub(crate) async fn letters_of_another_writer_are_read() -> Outcome {
    let stage = Stage::start().await?;
    store_by_hand(&stage, 7, &SMALLEST)?;
    let found = stage.begin().await?.list(None, 10).await?;
    let record = Record::new(7.into(), UNIX_EPOCH - Duration::from_millis(1), "");
    let mut expected = DeadLetter::new(record, 0, "", UNIX_EPOCH);
    expected.version = u64::MAX;
    assert_eq!(found, [expected]);
    Ok(())
}

/// Keeps the payloads of each key, and rejects some.
#[derive(Clone, Default)]
struct Lists {
    poison: Arc<Mutex<Vec<&'static str>>>,
}

#[async_trait]
impl Handler<RedisTx> for Lists {
    async fn handle(&mut self, record: &Record, tx: &mut RedisTx) -> Result<(), HandlerError> {
        let payload = std::str::from_utf8(&record.payload)?;
        let is_poison = |poison: &&str| *poison == payload;
        if self
            .poison
            .lock()
            .unwrap_or_else(|error| error.into_inner())
            .iter()
            .any(is_poison)
        {
            return Err(HandlerError::reject(format!("{payload} is poison")));
        }
        let key = record.key.clone().unwrap_or_default();
        let before = tx.get(&key).await?.unwrap_or_default();
        tx.put(&key, &[&before[..], payload.as_bytes()].concat()).await?;
        Ok(())
    }
}

pub(crate) async fn a_consumer_parks_and_retries_in_order() -> Outcome {
    let stage = Stage::start().await?;
    let log = Redis::connect(&stage.server.url()).await?.log("orders").await?;
    for text in ["a1", "b1", "a2", "b2", "a3", "c1"] {
        log.append(&[NewRecord::new(text[1..].to_owned()).key(text[..1].to_owned())])
            .await?;
    }
    let handler = Lists::default();
    let poison = |poison: &[&'static str]| {
        *handler.poison.lock().unwrap_or_else(|error| error.into_inner()) = poison.to_vec();
    };
    let run = async || {
        let consumer = Consumer::essentially_once(
            stage.consumer.clone(),
            log.clone(),
            stage.store.clone(),
            handler.clone(),
        );
        consumer
            .max_batch(2)
            .dead_letters(DeadLetterOptions::new())
            .run_until_caught_up()
            .await
    };
    poison(&["1"]);
    let report = run().await?;
    assert_eq!((report.handled, report.parked), (0, 6), "{report}");
    let letters = dead_letters::list(&stage.consumer, &stage.store, None, 10).await?;
    let tried: Vec<_> = letters.iter().map(|letter| letter.tries > 0).collect();
    assert_eq!(tried, [true, true, false, false, false, true]);
    stage.server.restart()?;
    poison(&[]);
    dead_letters::discard(&stage.consumer, &stage.store, &letters[1], &Operator::new("test")).await?;
    // The discard has made b2 due.
    assert_eq!(
        dead_letters::retry_all(
            &stage.consumer,
            &stage.store,
            &LetterFilter::all(),
            &Operator::new("test")
        )
        .await?,
        2
    );
    let report = run().await?;
    assert_eq!(report.handled, 5, "{report}");
    for (key, expected) in [("a", "123"), ("b", "2"), ("c", "1")] {
        assert_eq!(stage.value(key).await?.as_deref(), Some(expected), "{key}");
    }
    assert_eq!(stage.begin().await?.total().await?, 0);
    // The position, the state and the stream are left.
    assert_eq!(stage.ask("DBSIZE")?, "3");
    Ok(())
}

pub(crate) async fn indices_follow_every_change() -> Outcome {
    let stage = Stage::start().await?;
    let mut due = letter(1, Some("a"));
    due.due = Some(time(1));
    park(&stage, 0, &[due.clone(), letter(2, None)]).await?;
    // Within one transaction, the last change counts.
    let mut tx = stage.begin().await?;
    assert!(tx.remove(1.into()).await?);
    assert!(!tx.remove(1.into()).await?);
    tx.park(&letter(1, Some("b"))).await?;
    tx.park(&letter(3, Some("c"))).await?;
    assert!(tx.remove(3.into()).await?);
    tx.commit(advance(1, 2)).await?;
    assert_eq!(
        members(&stage, BY_OFFSET)?,
        [format!("{} b 0", field(1)), format!("{} 0", field(2))]
    );
    assert_eq!(members(&stage, BY_KEY)?, [format!("b\0{} 0", field(1))]);
    assert_eq!(stage.ask(&format!("EXISTS {DUE}"))?, "0");
    let mut malformed = due;
    malformed.record.malformed = Some("it is".into());
    park(&stage, 2, &[malformed]).await?;
    assert_eq!(members(&stage, DUE)?, [format!("{} 1700000000001", field(1))]);
    assert_eq!(stage.ask(&format!("EXISTS {BY_KEY}"))?, "0");
    let mut tx = stage.begin().await?;
    assert_eq!(tx.remove_from(Offset::ZERO).await?, 2);
    tx.commit(advance(3, 4)).await?;
    assert_eq!(stage.ask("DBSIZE")?, "1");
    Ok(())
}

pub(crate) async fn many_letters_are_read_in_pages() -> Outcome {
    const COUNT: u64 = 3_000;
    let stage = Stage::start().await?;
    let all: Vec<_> = (0..COUNT)
        .map(|n| {
            // Every other letter has the same key, and some are large.
            let key = if n % 2 == 0 {
                "all".to_owned()
            } else {
                format!("k{n:05}")
            };
            let mut letter = letter(n, Some(&key));
            if n % 100 == 0 {
                letter.record.payload = vec![b'x'; 200_000].into();
            }
            letter.due = (n % 3 == 0).then(|| time(COUNT - n));
            letter
        })
        .collect();
    park(&stage, 0, &all).await?;
    let mut tx = stage.begin().await?;
    assert!(tx.list(None, usize::MAX).await? == all);
    assert!(tx.list(Some(10.into()), 2_500).await? == all[11..2_511]);
    let counts = tx.counts(None, usize::MAX).await?;
    assert_eq!((counts[0].1, counts.len() as u64), (COUNT / 2, 1 + COUNT / 2));
    assert!(counts[1..].iter().all(|(_, count)| *count == 1) && counts.is_sorted());
    let first = tx.first_due().await?.ok_or("none is due")?;
    assert_eq!(first.record.offset, Offset::from(COUNT - 3));
    // The heads of a key are handled one by one.
    for n in (0..2_500).step_by(2) {
        let head = tx.head(b"all").await?.ok_or("the key has no letter")?;
        assert_eq!(head.record.offset, Offset::from(n));
        tx.remove(n.into()).await?;
    }
    assert_eq!(tx.counts(None, 1).await?[0].1, 250);
    assert_eq!(tx.remove_from(100.into()).await?, COUNT - 100 - 1_200);
    assert_eq!(
        offsets(&tx.list(None, 1_000).await?),
        (1..100).step_by(2).collect::<Vec<_>>()
    );
    assert_eq!(tx.head(b"all").await?, None);
    assert_eq!(tx.first_due().await?.map(|due| due.record.offset), Some(99.into()));
    assert_eq!((tx.counts(None, usize::MAX).await?.len(), tx.total().await?), (50, 50));
    tx.commit(advance(1, 2)).await?;
    let mut tx = stage.begin().await?;
    assert_eq!(tx.list(None, 1_000).await?.len(), 50);
    for (key, count) in [(BY_OFFSET, 50), (BY_KEY, 50), (DUE, 17)] {
        assert_eq!(stage.ask(&format!("ZCARD {key}"))?, count.to_string(), "{key}");
    }
    Ok(())
}

pub(crate) async fn a_letter_reads_the_same_before_and_after_the_commit() -> Outcome {
    let stage = Stage::start().await?;
    let odd = UNIX_EPOCH + Duration::from_nanos(1_700_000_000_123_456_789);
    let mut letter = letter(1, None);
    letter.record.appended_at = odd;
    (letter.parked_at, letter.last_failed_at, letter.due) = (odd, odd, Some(odd));
    letter.edit(NewRecord::new("edited"), &Operator::new("ann"));
    let mut tx = stage.begin().await?;
    tx.park(&letter).await?;
    let before = tx.letter(1.into()).await?;
    tx.commit(advance(0, 1)).await?;
    assert_eq!(before, stage.begin().await?.letter(1.into()).await?);
    Ok(())
}

#[derive(Clone, Copy, Debug)]
enum Method {
    Park,
    Remove,
    RemoveFrom,
    Letter,
    Head,
    FirstDue,
    List,
    Counts,
    Total,
}

impl Method {
    const ALL: [Self; 9] = [
        Self::Park,
        Self::Remove,
        Self::RemoveFrom,
        Self::Letter,
        Self::Head,
        Self::FirstDue,
        Self::List,
        Self::Counts,
        Self::Total,
    ];

    async fn call(self, tx: &mut RedisTx) -> Result<(), Error> {
        match self {
            Self::Park => tx.park(&letter(1, None)).await,
            Self::Remove => tx.remove(1.into()).await.map(drop),
            Self::RemoveFrom => tx.remove_from(1.into()).await.map(drop),
            Self::Letter => tx.letter(1.into()).await.map(drop),
            Self::Head => tx.head(b"a").await.map(drop),
            Self::FirstDue => tx.first_due().await.map(drop),
            Self::List => tx.list(None, 1).await.map(drop),
            Self::Counts => tx.counts(None, 1).await.map(drop),
            Self::Total => tx.total().await.map(drop),
        }
    }

    /// The key whose type it needs.
    fn key(self) -> &'static str {
        match self {
            Self::Park | Self::Remove | Self::RemoveFrom | Self::List => BY_OFFSET,
            Self::Letter | Self::Total => VALUES,
            Self::Head | Self::Counts => BY_KEY,
            Self::FirstDue => DUE,
        }
    }
}

pub(crate) async fn after_a_failed_read_of_letters_nothing_is_committed() -> Outcome {
    let stage = Stage::start().await?;
    let proxy = Proxy::start(stage.server.port())?;
    let store = stage.through(&proxy).await?;
    for method in Method::ALL {
        // No answer.
        let mut tx = store.begin(&stage.consumer).await?;
        tx.put(b"a", b"1").await?;
        proxy.cut_at(b"HLEN", Cut::BeforeRequest);
        assert_error!(method.call(&mut tx).await, Error::Unavailable { .. }, VALUES);
        method.call(&mut tx).await?;
        let result = tx.commit(advance(0, 1)).await;
        assert_error!(result, Error::Unavailable { .. }, "earlier read failed", VALUES);
        // A refusal.
        stage.ask("FLUSHALL")?;
        stage.ask(&format!("SET {} x", method.key()))?;
        if method.key() != VALUES {
            stage.ask(&format!("HSET {VALUES} {} x", field(9)))?;
        }
        let mut tx = stage.begin().await?;
        assert_error!(method.call(&mut tx).await, Error::Failed { .. }, "WRONGTYPE");
        let result = tx.commit(advance(0, 1)).await;
        assert_error!(result, Error::Failed { .. }, "earlier read failed", "WRONGTYPE");
        assert_eq!(stage.revision().await?, 0, "{method:?}");
        stage.ask("FLUSHALL")?;
    }
    Ok(())
}

pub(crate) async fn a_key_of_another_type_is_refused_before_the_first_write() -> Outcome {
    for key in [VALUES, BY_OFFSET, BY_KEY, DUE] {
        let stage = Stage::start().await?;
        let mut tx = stage.begin().await?;
        tx.put(b"a", b"1").await?;
        tx.command(command("INCR count")).await?;
        let mut letter = letter(1, Some("a"));
        letter.due = Some(time(1));
        tx.park(&letter).await?;
        stage.ask(&format!("SET {key} x"))?;
        let result = tx.commit(advance(0, 1)).await;
        assert_error!(result, Error::Failed { .. }, "WRONGTYPE", &format!("({key})"));
        assert_eq!(
            (stage.ask("DBSIZE")?.as_str(), stage.revision().await?),
            ("1", 0),
            "{key}"
        );
    }
    Ok(())
}

pub(crate) async fn a_missing_permission_is_refused_before_the_first_write() -> Outcome {
    let stage = Stage::start().await?;
    park(&stage, 0, &[letter(1, Some("a"))]).await?;
    let before = stage.ask("DBSIZE")?;
    for (rights, named) in [
        ("-zadd", "ZADD"),
        ("-zrem", "ZREM"),
        ("-hdel", "HDEL"),
        ("-hset", "HSET"),
    ] {
        let store = crate::setup::signed_in(&stage, &format!("+@all {rights}")).await?;
        let mut tx = store.begin(&stage.consumer).await?;
        tx.command(command("INCR count")).await?;
        tx.remove(1.into()).await?;
        tx.park(&letter(2, Some("a"))).await?;
        let result = tx.commit(advance(1, 2)).await;
        assert_error!(result, Error::Failed { .. }, "ACL SETUSER", named);
        assert_eq!(
            (stage.ask("DBSIZE")?, stage.revision().await?),
            (before.clone(), 1),
            "{rights}"
        );
        assert_eq!(stage.begin().await?.total().await?, 1, "{rights}");
    }
    Ok(())
}

pub(crate) async fn the_documented_permissions_are_enough() -> Outcome {
    let stage = Stage::start().await?;
    let rights = "+evalsha +eval +hget +hgetall +hmget +hset +hdel +hlen +zcard +info +config|get";
    let store = crate::setup::signed_in(&stage, rights).await?;
    // A session of a consumer without letters begins like this.
    let mut tx = store.begin(&stage.consumer).await?;
    assert_eq!((tx.total().await?, tx.first_due().await?), (0, None));
    let store = crate::setup::signed_in(&stage, &format!("{rights} +zadd +zrem +zrange +zlexcount")).await?;
    for commits in 0..2 {
        let mut tx = store.begin(&stage.consumer).await?;
        let mut due = letter(commits, Some("a"));
        due.due = Some(time(1));
        tx.park(&due).await?;
        tx.commit(advance(commits, commits + 1)).await?;
    }
    let mut tx = store.begin(&stage.consumer).await?;
    assert_eq!(offsets(&tx.list(None, 10).await?), [0, 1]);
    assert_eq!(tx.counts(None, 10).await?, [("a".into(), 2)]);
    assert!(tx.head(b"a").await?.is_some() && tx.first_due().await?.is_some() && tx.letter(1.into()).await?.is_some());
    assert_eq!(tx.remove_from(0.into()).await?, 2);
    tx.commit(advance(2, 3)).await?;
    assert_eq!(stage.ask("DBSIZE")?, "1");
    // No check failed for want of a permission.
    let denied = stage.server.command(&["ACL", "LOG"])?;
    let denied: Vec<_> = denied.list().iter().filter_map(|entry| entry.field("object")).collect();
    let of_letters = |object: &&&Reply| ["h", "z", "eval"].iter().any(|start| object.text().starts_with(start));
    assert_eq!(denied.iter().find(of_letters), None, "{denied:?}");
    Ok(())
}

pub(crate) async fn letters_over_the_limit_are_refused_and_harm_nothing() -> Outcome {
    const LIMIT: usize = 1_000;
    let stage = Stage::with(RedisOptions::new().record_limit(LIMIT)).await?;
    let sized = |offset: u64, size: usize| {
        let record = Record::new(offset.into(), time(1), vec![b'x'; size]);
        let mut letter = DeadLetter::new(record, 1, &"r".repeat(DeadLetter::REASON_LIMIT), time(2));
        letter.record.key = Some("".into());
        letter
    };
    let mut tx = stage.begin().await?;
    tx.park(&sized(1, LIMIT)).await?;
    assert_error!(
        tx.park(&sized(2, LIMIT + 1)).await,
        Error::TooLarge {
            what: "dead letter",
            ..
        },
    );
    assert_eq!(offsets(&tx.list(None, 10).await?), [1]);
    tx.commit(advance(0, 1)).await?;
    assert_eq!(stage.begin().await?.letter(1.into()).await?, Some(sized(1, LIMIT)));
    // The limit was lowered since, and the letter is tried again.
    let lower = RedisOptions::new()
        .record_limit(LIMIT / 2)
        .connect(&stage.server.url())
        .await?;
    let mut tx = lower.store().begin(&stage.consumer).await?;
    let mut due = sized(1, LIMIT);
    due.due = Some(time(1));
    tx.park(&due).await?;
    due.record.payload = vec![b'y'; LIMIT].into();
    assert_error!(tx.park(&due).await, Error::TooLarge { .. },);
    Ok(())
}

pub(crate) async fn a_full_server_still_takes_removals() -> Outcome {
    let stage = Stage::start().await?;
    park(&stage, 0, &[letter(1, Some("a")), letter(2, Some("a"))]).await?;
    stage.ask("CONFIG SET maxmemory 100kb")?;
    let mut tx = stage.begin().await?;
    tx.park(&letter(3, Some("a"))).await?;
    assert_error!(tx.commit(advance(1, 2)).await, Error::Unavailable { .. }, "OOM");
    assert_eq!((stage.revision().await?, stage.begin().await?.total().await?), (1, 2));
    // The head is handled, and the next letter becomes due.
    let mut tx = stage.begin().await?;
    tx.remove(1.into()).await?;
    let mut next = tx.head(b"a").await?.ok_or("no letter")?;
    next.due = Some(time(1));
    tx.park(&next).await?;
    tx.commit(advance(1, 2)).await?;
    assert_eq!(stage.begin().await?.first_due().await?, Some(next));
    Ok(())
}

pub(crate) async fn a_commit_without_letters_names_none_of_their_keys() -> Outcome {
    let stage = Stage::start().await?;
    park(&stage, 0, &[letter(1, Some("a"))]).await?;
    // A user without access to these keys can commit as long as no letter changes.
    stage.ask("ACL SETUSER app reset on >hunter2 +@all %R~essentially-once:{c}:letters* ~essentially-once:{c}:position ~essentially-once:{c}:windows ~essentially-once:{c}:state")?;
    let url = format!("redis://app:hunter2@127.0.0.1:{}", stage.server.port());
    let store = Redis::connect(&url).await?.store();
    let mut tx = store.begin(&stage.consumer).await?;
    assert_eq!(tx.total().await?, 1);
    tx.put(b"a", b"1").await?;
    tx.commit(advance(1, 2)).await?;
    let mut tx = store.begin(&stage.consumer).await?;
    tx.remove(1.into()).await?;
    assert_error!(tx.commit(advance(2, 3)).await, Error::Failed { .. }, "ACL SETUSER");
    Ok(())
}

pub(crate) async fn commands_on_letters_are_refused() -> Outcome {
    let stage = Stage::start().await?;
    let mut tx = stage.begin().await?;
    for key in [VALUES, BY_OFFSET, BY_KEY, DUE] {
        assert_error!(
            tx.command(command(&format!("DEL {key}"))).await,
            Error::Failed { .. },
            "belongs to a store"
        );
    }
    Ok(())
}

/// A busy consumer commits between the round trips of a change.
pub(crate) async fn an_operator_changes_letters_of_a_busy_consumer() -> Outcome {
    const POISON: u64 = 200;
    let stage = Stage::start().await?;
    let log = Redis::connect(&stage.server.url()).await?.log("orders").await?;
    let poison: Vec<_> = (0..POISON)
        .map(|n| NewRecord::new("1").key(format!("poison {n}")))
        .collect();
    log.append(&poison).await?;
    for _ in 0..200 {
        let others: Vec<_> = (0..1_000)
            .map(|n| NewRecord::new("2").key((n % 50).to_string()))
            .collect();
        log.append(&others).await?;
    }
    let handler = essentially_once::handler_fn(|record: &Record, tx: &mut RedisTx| {
        let is_poison = record.payload == "1";
        Box::pin(async move {
            tx.put(b"k", b"v").await?;
            match is_poison {
                true => Err(HandlerError::reject("poison")),
                false => Ok(()),
            }
        })
    });
    let stop = essentially_once::CancellationToken::new();
    let consumer = Consumer::essentially_once(stage.consumer.clone(), log.clone(), stage.store.clone(), handler)
        .dead_letters(DeadLetterOptions::new());
    let run = tokio::spawn(consumer.run_until(stop.clone()));
    let operator = RedisOptions::new().connect(&stage.server.url()).await?.store();
    while dead_letters::list(&stage.consumer, &operator, None, 1_000).await?.len() < POISON as usize {
        assert!(!run.is_finished(), "the run ended");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let by = Operator::new("test");
    for letter in dead_letters::list(&stage.consumer, &operator, None, 3).await? {
        dead_letters::retry(&stage.consumer, &operator, letter.record.offset, &by).await?;
    }
    let retried = dead_letters::retry_all(&stage.consumer, &operator, &LetterFilter::all(), &by).await?;
    assert!(retried >= POISON - 3, "{retried} letters are due");
    let discarded = dead_letters::discard_all(&stage.consumer, &operator, &LetterFilter::all(), &by).await?;
    // A letter that failed again after it was read has stayed.
    let left = dead_letters::list(&stage.consumer, &operator, None, 1_000).await?.len() as u64;
    assert!(
        discarded > 0 && discarded + left == POISON,
        "{discarded} discarded, {left} left"
    );
    stop.cancel();
    run.await??;
    Ok(())
}
