//! Dead letters under at-least-once: handled first, and then removed.

use std::sync::Mutex;

use essentially_once::consumer::{DeadLetterOptions, dead_letters};

use super::{
    letters::{keyed, letters, parked, retry_all},
    *,
};

/// Appends payloads to a list, except those that are poison.
#[derive(Clone, Default)]
struct Listed {
    handled: Arc<Mutex<Vec<String>>>,
    poison: Arc<Mutex<Vec<&'static str>>>,
    retried: Arc<Mutex<Vec<&'static str>>>,
}

#[essentially_once::async_trait]
impl Handler<()> for Listed {
    async fn handle(&mut self, record: &Record, (): &mut ()) -> Result<(), HandlerError> {
        let payload = std::str::from_utf8(&record.payload)?;
        if self.poison.lock().unwrap().contains(&payload) {
            return Err(HandlerError::reject(format!("{payload} is poison")));
        }
        if self.retried.lock().unwrap().contains(&payload) {
            return Err(HandlerError::retry(format!("{payload} is not ready")));
        }
        self.handled.lock().unwrap().push(payload.to_owned());
        Ok(())
    }
}

impl Listed {
    fn poisoned(poison: &[&'static str]) -> Self {
        let listed = Self::default();
        *listed.poison.lock().unwrap() = poison.to_vec();
        listed
    }

    /// What was handled of these payloads, in order.
    fn of(&self, payloads: &[&str]) -> Vec<String> {
        let handled = self.handled.lock().unwrap();
        handled
            .iter()
            .filter(|payload| payloads.contains(&&***payload))
            .cloned()
            .collect()
    }
}

const OF_A: [&str; 4] = ["0", "2", "4", "8"];

fn consumer(
    backend: &Backend,
    handler: &Listed,
) -> Consumer<support::ScriptedStore, Listed, essentially_once::consumer::AtLeastOnce> {
    Consumer::at_least_once(shipping(), backend.log(), backend.store(), handler.clone())
        .retries(1)
        .min_backoff(Duration::ZERO)
        .max_backoff(Duration::ZERO)
        .dead_letters(DeadLetterOptions::new())
}

#[tokio::test]
async fn a_key_keeps_its_order_through_parking_and_retrying() {
    let backend = keyed(Script::default()).await;
    let handler = Listed::poisoned(&["2"]);
    let report = consumer(&backend, &handler).run_until_caught_up().await.unwrap();
    assert_eq!((report.handled, report.parked), (9, 3));
    assert_eq!(parked(&backend).await, [2, 4, 8]);
    handler.poison.lock().unwrap().clear();
    assert_eq!(retry_all(&backend).await, 1);
    let report = consumer(&backend, &handler).run_until_caught_up().await.unwrap();
    assert_eq!(report.handled, 3);
    assert!(parked(&backend).await.is_empty());
    assert_eq!(handler.of(&OF_A), OF_A);
}

#[tokio::test]
async fn a_letter_whose_removal_fails_is_handled_again() {
    let backend = keyed(Script::default()).await;
    let handler = Listed::poisoned(&["2"]);
    consumer(&backend, &handler).run_until_caught_up().await.unwrap();
    handler.poison.lock().unwrap().clear();
    retry_all(&backend).await;
    // The first commit claims the position.
    let script = Script::default().fail(Step::Commit, 1, Fault::Before);
    let faulty = Backend::of(backend.memory.clone(), script);
    consumer(&faulty, &handler).run_until_caught_up().await.unwrap();
    faulty.script.assert_all_struck();
    assert_eq!(handler.of(&OF_A), ["0", "2", "2", "4", "8"]);
    assert!(parked(&backend).await.is_empty());
}

#[tokio::test]
async fn a_letter_that_fails_again_does_not_stop_the_log() {
    let backend = keyed(Script::default()).await;
    let handler = Listed::default();
    handler.retried.lock().unwrap().push("2");
    let options = DeadLetterOptions::new().retry_after(Duration::from_secs(3_000));
    let run = consumer(&backend, &handler).dead_letters(options);
    run.run_until_caught_up().await.unwrap();
    retry_all(&backend).await;
    backend.memory_log().append(&[NewRecord::new("12")]).await.unwrap();
    consumer(&backend, &handler).run_until_caught_up().await.unwrap();
    assert_eq!(handler.of(&["12"]), ["12"]);
    let letter = &letters(&backend).await[0];
    assert_eq!((letter.tries, &*letter.last_reason), (3, "2 is not ready"));
}

#[tokio::test]
async fn a_limit_of_letters_ends_the_run_before_the_next_one() {
    let backend = keyed(Script::default()).await;
    let handler = Listed::poisoned(&["2"]);
    let options = DeadLetterOptions::new().limit(2);
    let run = consumer(&backend, &handler).dead_letters(options);
    let error = run.run_until_caught_up().await.unwrap_err();
    assert!(error.to_string().contains("2 is its limit"), "{error}");
    assert_eq!(parked(&backend).await, [2, 4]);
    // Everything before it is handled once.
    let before = ["0", "1", "3", "5", "6", "7"];
    assert_eq!(handler.of(&before), before);
    assert_eq!(backend.position(&shipping()).await.unwrap().next, 8.into());
}

#[tokio::test]
async fn an_operator_discards_and_edits() {
    let backend = keyed(Script::default()).await;
    let handler = Listed::poisoned(&["2", "3"]);
    consumer(&backend, &handler).run_until_caught_up().await.unwrap();
    let store = backend.memory.store();
    let all = letters(&backend).await;
    dead_letters::discard(&shipping(), &store, &all[0], &ann())
        .await
        .unwrap();
    let mut mended = NewRecord::from(&all[1].record);
    mended.payload = "3!".into();
    dead_letters::edit(&shipping(), &store, &all[1], &mended, &ann())
        .await
        .unwrap();
    consumer(&backend, &handler).run_until_caught_up().await.unwrap();
    assert!(parked(&backend).await.is_empty());
    assert_eq!(handler.of(&["1", "3!", "6", "9"]), ["1", "3!", "6", "9"]);
    assert_eq!(handler.of(&OF_A), ["0", "4", "8"]);
}
