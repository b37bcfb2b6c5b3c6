//! Reads from a store how often each record was counted.

use std::time::Duration;

use postgres::NoTls;
use redis::Commands;
use worker::EFFECTS;

use crate::{
    Result,
    places::{Backend, Place},
};

const TABLE: &str = "CREATE TABLE effects (number bigint PRIMARY KEY, times bigint NOT NULL)";

/// How many records were counted, and how many of them more than once.
pub(crate) struct Tally {
    pub(crate) counted: u64,
    pub(crate) doubled: u64,
}

pub(crate) trait Judge {
    /// How many records were counted.
    fn counted(&mut self) -> Result<u64>;

    /// Which of the records `from..to` were counted.
    fn counted_of(&mut self, from: u64, to: u64) -> Result<Vec<u64>>;

    fn tally(&mut self) -> Result<Tally>;
}

/// Opens the place where effects are recorded, and creates their table.
pub(crate) fn open(place: &Place) -> Result<Box<dyn Judge>> {
    Ok(match place.backend {
        Backend::Redis => Box::new(redis::Client::open(&*place.url)?.get_connection()?),
        Backend::Postgres => {
            let mut client = postgres::Client::connect(&place.url, NoTls)?;
            client.batch_execute(TABLE)?;
            Box::new(client)
        }
        Backend::Sqlite => {
            let connection = rusqlite::Connection::open(&place.url)?;
            connection.busy_timeout(Duration::from_secs(30))?;
            connection.pragma_update(None, "journal_mode", "wal")?;
            connection.execute_batch(TABLE)?;
            Box::new(connection)
        }
        other => return Err(format!("effects cannot be read from {}", other.name()).into()),
    })
}

impl Judge for redis::Connection {
    fn counted(&mut self) -> Result<u64> {
        Ok(self.hlen(EFFECTS)?)
    }

    fn counted_of(&mut self, from: u64, to: u64) -> Result<Vec<u64>> {
        let numbers: Vec<u64> = (from..to).collect();
        if numbers.is_empty() {
            return Ok(numbers);
        }
        let times: Vec<Option<u64>> = redis::cmd("HMGET").arg(EFFECTS).arg(&numbers).query(self)?;
        let counted = numbers.into_iter().zip(times);
        Ok(counted
            .filter_map(|(number, times)| times.is_some().then_some(number))
            .collect())
    }

    fn tally(&mut self) -> Result<Tally> {
        let times: Vec<u64> = self.hvals(EFFECTS)?;
        Ok(Tally {
            counted: times.len() as u64,
            doubled: times.iter().filter(|times| **times > 1).count() as u64,
        })
    }
}

const COUNTED: &str = "SELECT count(*) FROM effects";
const COUNTED_OF: &str = "SELECT number FROM effects WHERE number >= $1 AND number < $2";
const DOUBLED: &str = "SELECT count(*) FROM effects WHERE times > 1";

impl Judge for postgres::Client {
    fn counted(&mut self) -> Result<u64> {
        Ok(self.query_one(COUNTED, &[])?.get::<_, i64>(0) as u64)
    }

    fn counted_of(&mut self, from: u64, to: u64) -> Result<Vec<u64>> {
        let rows = self.query(COUNTED_OF, &[&(from as i64), &(to as i64)])?;
        Ok(rows.iter().map(|row| row.get::<_, i64>(0) as u64).collect())
    }

    fn tally(&mut self) -> Result<Tally> {
        Ok(Tally {
            counted: self.counted()?,
            doubled: self.query_one(DOUBLED, &[])?.get::<_, i64>(0) as u64,
        })
    }
}

impl Judge for rusqlite::Connection {
    fn counted(&mut self) -> Result<u64> {
        Ok(self.query_row(COUNTED, [], |row| row.get::<_, i64>(0))? as u64)
    }

    fn counted_of(&mut self, from: u64, to: u64) -> Result<Vec<u64>> {
        let mut read = self.prepare_cached(COUNTED_OF)?;
        let rows = read.query_map([from as i64, to as i64], |row| row.get::<_, i64>(0))?;
        rows.map(|number| Ok(number? as u64)).collect()
    }

    fn tally(&mut self) -> Result<Tally> {
        Ok(Tally {
            counted: self.counted()?,
            doubled: self.query_row(DOUBLED, [], |row| row.get::<_, i64>(0))? as u64,
        })
    }
}
