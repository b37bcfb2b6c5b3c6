//! Opening a file: which files are refused, with which advice, and that they stay unchanged.

use std::{fs, path::Path, sync::Barrier, thread, time::Duration};

use essentially_once::{Consumer, ConsumerId, Error, Handler, HandlerError, Log, NewRecord, Offset, Record};
use essentially_once_sqlite::{Sqlite, SqliteOptions, SqliteTx, rusqlite::Connection};

async fn refusal(path: impl AsRef<Path>) -> String {
    let path = path.as_ref();
    let error = Sqlite::open(path).await.expect_err("refused");
    assert!(matches!(error, Error::Failed { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains(&path.display().to_string()), "names the path: {text}");
    text
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .expect("list")
        .map(|entry| entry.expect("entry").file_name().into_string().expect("text"))
        .collect();
    names.sort();
    names
}

#[tokio::test]
async fn memory_is_refused_with_the_backend_to_use_instead() {
    assert!(refusal(":memory:").await.contains("essentially_once::memory"));
    assert!(refusal("").await.contains("the path is empty"));
    assert!(refusal("file::memory:?cache=shared").await.contains("URI"));
}

#[tokio::test]
async fn an_impossible_path_is_refused_and_nothing_is_created() {
    let folder = tempfile::tempdir().expect("folder");
    assert!(refusal(folder.path()).await.contains("folder"));
    let text = refusal(folder.path().join("missing/a.db")).await;
    assert!(text.contains("create the folder"), "{text}");
    assert!(names(folder.path()).is_empty());
}

#[tokio::test]
async fn a_file_that_is_not_a_database_is_refused_and_unchanged() {
    let folder = tempfile::tempdir().expect("folder");
    for content in ["hello".to_owned(), "x".repeat(100_000)] {
        let path = folder.path().join("notes.txt");
        fs::write(&path, &content).expect("write");
        let text = refusal(&path).await;
        assert!(text.contains("not a SQLite database"), "{text}");
        assert_eq!(fs::read_to_string(&path).expect("read"), content);
        assert_eq!(names(folder.path()), ["notes.txt"]);
    }
}

#[tokio::test]
async fn a_damaged_file_is_refused() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.db");
    drop(Sqlite::open(&path).await.expect("open"));
    let mut bytes = fs::read(&path).expect("read");
    bytes[100..4096].fill(0xa5);
    fs::write(&path, &bytes).expect("write");
    let text = refusal(&path).await;
    assert!(text.contains("restore it from a backup"), "{text}");
}

#[tokio::test]
async fn a_newer_schema_is_refused_and_unchanged() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.db");
    drop(Sqlite::open(&path).await.expect("open"));
    let shell = Connection::open(&path).expect("open");
    shell
        .execute_batch("UPDATE essentially_once_meta SET value = 99; PRAGMA journal_mode = DELETE")
        .expect("newer");
    drop(shell);
    let before = fs::read(&path).expect("read");
    let text = refusal(&path).await;
    assert!(
        text.contains("99") && text.contains("newer essentially-once-sqlite"),
        "{text}"
    );
    assert_eq!(fs::read(&path).expect("read"), before);
}

#[cfg(unix)]
#[tokio::test]
async fn a_file_that_must_exist_is_neither_created_nor_migrated() {
    let folder = tempfile::tempdir().expect("folder");
    let refusal = async |path: &Path| {
        let opened = SqliteOptions::new().existing().open(path).await;
        opened.expect_err("refused").to_string()
    };
    let path = folder.path().join("a.db");
    let text = refusal(&path).await;
    assert!(text.contains("a.db") && text.contains("No such file"), "{text}");
    assert!(names(folder.path()).is_empty());

    Connection::open(&path)
        .and_then(|connection| connection.execute_batch("CREATE TABLE orders (id)"))
        .expect("the user's file");
    let before = fs::read(&path).expect("read");
    let text = refusal(&path).await;
    assert!(text.contains("no essentially_once tables"), "{text}");
    assert_eq!(fs::read(&path).expect("read"), before);

    let old = folder.path().join("old.db");
    fs::copy("tests/fixtures/schema-4.db", &old).expect("copy");
    let before = fs::read(&old).expect("read");
    let text = refusal(&old).await;
    assert!(text.contains("schema version 4"), "{text}");
    assert_eq!(fs::read(&old).expect("read"), before);

    let made = folder.path().join("made.db");
    drop(Sqlite::open(&made).await.expect("create"));
    SqliteOptions::new().existing().open(&made).await.expect("open");
}

#[tokio::test]
async fn a_read_only_file_is_refused() {
    use std::os::unix::fs::PermissionsExt;

    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.db");
    drop(Sqlite::open(&path).await.expect("open"));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).expect("chmod");
    if fs::OpenOptions::new().append(true).open(&path).is_ok() {
        eprintln!("this user may write to any file, so this test cannot check anything");
        return;
    }
    let text = refusal(&path).await;
    assert!(text.contains("writable"), "{text}");
}

#[tokio::test]
async fn a_relative_path_survives_as_an_absolute_one() {
    let folder = tempfile::tempdir_in(".").expect("folder");
    let relative = folder
        .path()
        .strip_prefix(fs::canonicalize(".").expect("here"))
        .unwrap_or(folder.path());
    let sqlite = Sqlite::open(relative.join("a.db")).await.expect("open");
    assert!(sqlite.path().is_absolute());
    assert!(format!("{sqlite:?}").contains("a.db"));
}

#[tokio::test]
async fn the_users_own_database_is_left_as_it_is() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("shop.db");
    let shop = Connection::open(&path).expect("open");
    shop.execute_batch("PRAGMA user_version = 42; CREATE TABLE orders (id); INSERT INTO orders VALUES (1)")
        .expect("schema");
    let sqlite = Sqlite::open(&path).await.expect("open");
    sqlite
        .log("orders")
        .await
        .expect("log")
        .append(&[NewRecord::new("x")])
        .await
        .expect("append");
    let found: (i64, i64) = shop
        .query_row(
            "SELECT count(*), (SELECT user_version FROM pragma_user_version) FROM orders",
            [],
            |row| Ok((row.get(0)?, row.get(1)?)),
        )
        .expect("query");
    assert_eq!(found, (1, 42));
}

#[tokio::test]
async fn opening_waits_for_a_locked_file_and_then_is_unavailable() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("a.db");
    let shell = Connection::open(&path).expect("open");
    shell
        .execute_batch("BEGIN EXCLUSIVE; CREATE TABLE t (x)")
        .expect("lock");
    let open = || SqliteOptions::new().busy_timeout(Duration::from_millis(60)).open(&path);
    let error = open().await.expect_err("locked");
    assert!(matches!(error, Error::Unavailable { .. }), "{error:?}");
    shell.execute_batch("COMMIT").expect("unlock");
    open().await.expect("open");
}

#[test]
fn many_may_open_a_fresh_file_at_once() {
    let folder = tempfile::tempdir().expect("folder");
    for round in 0..10 {
        let path = folder.path().join(format!("{round}.db"));
        let barrier = Barrier::new(6);
        thread::scope(|scope| {
            for _ in 0..6 {
                scope.spawn(|| {
                    let runtime = tokio::runtime::Builder::new_current_thread()
                        .enable_time()
                        .build()
                        .expect("runtime");
                    barrier.wait();
                    runtime.block_on(async {
                        let sqlite = Sqlite::open(&path).await.expect("open");
                        let log = sqlite.log("orders").await.expect("log");
                        log.append(&[NewRecord::new("x")]).await.expect("append");
                    });
                });
            }
        });
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .expect("runtime");
        runtime.block_on(async {
            let log = Sqlite::open(&path)
                .await
                .expect("open")
                .log("orders")
                .await
                .expect("log");
            let mut reader = log.read(Offset::ZERO).await.expect("read");
            assert_eq!(reader.next(100).await.expect("next").len(), 6);
        });
    }
}

struct Nothing;

#[essentially_once::async_trait]
impl Handler<SqliteTx> for Nothing {
    async fn handle(&mut self, _: &Record, _: &mut SqliteTx) -> Result<(), HandlerError> {
        Ok(())
    }
}

/// Restores only the log's file, which then grows past the consumer's position before it reads
/// again.
#[tokio::test]
async fn a_log_restored_from_an_older_copy_is_noticed_by_a_store_in_another_file() {
    let folder = tempfile::tempdir().expect("folder");
    let at = |name: &str| folder.path().join(name);
    let records = |range: std::ops::Range<u64>| range.map(|n| NewRecord::new(n.to_string())).collect::<Vec<_>>();
    let append = async |range| {
        let log = Sqlite::open(at("log.db"))
            .await
            .expect("open")
            .log("orders")
            .await
            .expect("log");
        log.append(&records(range)).await.expect("append");
    };
    let consume = async || {
        let log = Sqlite::open(at("log.db"))
            .await
            .expect("open")
            .log("orders")
            .await
            .expect("log");
        let store = Sqlite::open(at("state.db")).await.expect("open").store();
        let consumer = ConsumerId::new("shipping").expect("name");
        Consumer::essentially_once(consumer, log, store, Nothing)
            .run_until_caught_up()
            .await
    };
    append(0..50).await;
    // SQLite copies a consistent state, whatever the WAL still holds.
    let source = Connection::open(at("log.db")).expect("open");
    let copy = format!("VACUUM INTO '{}'", at("copy.db").display());
    source.execute_batch(&copy).expect("copy");
    drop(source);
    append(50..100).await;
    assert_eq!(consume().await.expect("run").handled, 100);
    for ending in ["", "-wal", "-shm"] {
        let _ = std::fs::remove_file(at(&format!("log.db{ending}")));
    }
    std::fs::copy(at("copy.db"), at("log.db")).expect("restore");
    append(1_000..1_080).await;
    let error = consume().await.expect_err("otherwise 30 records would be skipped");
    assert!(
        matches!(error, Error::LogChanged { offset, .. } if offset == 99.into()),
        "{error}"
    );
}
