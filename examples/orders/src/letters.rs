//! The lines that essentially-once has set aside: its dead letters.

use essentially_once::{
    ConsumerId, Error, OffsetStore,
    backend::{DeadLetter, DeadLetters},
    consumer::{
        Operator,
        dead_letters::{self, LetterFilter},
    },
};
use serde::Serialize;

use crate::{
    backend::{Backend, Place},
    shipping,
};

impl Backend {
    /// All dead letters of the consumer, in the order of the log.
    pub(crate) async fn letters(&self) -> Result<Vec<DeadLetter>, Error> {
        let consumer = &self.consumer;
        match &self.store {
            Place::Sqlite => list_all(consumer, &self.sqlite().await?.store()).await,
            #[cfg(feature = "redis")]
            Place::Redis(url) => {
                let redis = essentially_once_redis::Redis::connect(url).await?;
                list_all(consumer, &redis.store()).await
            }
            #[cfg(feature = "rabbitmq")]
            Place::Rabbitmq(url) => {
                let rabbit = essentially_once_rabbitmq::Rabbit::connect(url).await?;
                list_all(consumer, &rabbit.store()).await
            }
        }
    }

    /// Lets the next worker try every dead letter again. Returns how many it tries first. Letters
    /// that wait behind one of these follow it.
    pub(crate) async fn retry_letters(&self) -> Result<u64, Error> {
        let consumer = &self.consumer;
        match &self.store {
            Place::Sqlite => retry_all(consumer, &self.sqlite().await?.store()).await,
            #[cfg(feature = "redis")]
            Place::Redis(url) => {
                let redis = essentially_once_redis::Redis::connect(url).await?;
                retry_all(consumer, &redis.store()).await
            }
            #[cfg(feature = "rabbitmq")]
            Place::Rabbitmq(url) => {
                let rabbit = essentially_once_rabbitmq::Rabbit::connect(url).await?;
                retry_all(consumer, &rabbit.store()).await
            }
        }
    }
}

async fn retry_all<S>(consumer: &ConsumerId, store: &S) -> Result<u64, Error>
where
    S: OffsetStore<Tx: DeadLetters>,
{
    let by = Operator::new("orders --mend").because("the parser is mended");
    dead_letters::retry_all(consumer, store, &LetterFilter::all(), &by).await
}

async fn list_all<S>(consumer: &ConsumerId, store: &S) -> Result<Vec<DeadLetter>, Error>
where
    S: OffsetStore<Tx: DeadLetters>,
{
    const AT_A_TIME: usize = 1_000;
    let mut letters = Vec::<DeadLetter>::new();
    loop {
        let after = letters.last().map(|last| last.record.offset);
        let page = dead_letters::list(consumer, store, after, AT_A_TIME).await?;
        let is_last = page.len() < AT_A_TIME;
        letters.extend(page);
        if is_last {
            return Ok(letters);
        }
    }
}

/// A dead letter as the program shows it.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub(crate) struct Letter {
    offset: String,
    line: Option<u32>,
    text: String,
    reason: String,
}

impl From<DeadLetter> for Letter {
    fn from(letter: DeadLetter) -> Self {
        Self {
            offset: letter.record.offset.to_string(),
            line: shipping::line_number(&letter.record),
            text: shipping::text(&letter.record).into_owned(),
            reason: letter.last_reason,
        }
    }
}

/// A few of the letters, two lines for each.
pub(crate) fn few(letters: &[Letter]) -> String {
    const FEW: usize = 3;
    const LONGEST: usize = 100;
    let mut list = String::new();
    for letter in letters.iter().take(FEW) {
        let line = letter.line.map_or_else(|| "?".into(), |line| line.to_string());
        // A terminal must not obey a control character of the file.
        let shown = letter.text.chars().take(LONGEST);
        let shown: String = shown.map(|char| if char.is_control() { ' ' } else { char }).collect();
        list += &format!(
            "  offset {}, line {line}: {}\n    {shown}\n",
            letter.offset, letter.reason
        );
    }
    match letters.len().saturating_sub(FEW) {
        0 => {}
        more => list += &format!("  and {more} more\n"),
    }
    list
}
