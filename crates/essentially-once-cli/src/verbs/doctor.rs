//! `doctor`: whether the backends can be used.

use essentially_once::backend::{Durability, Position};
use serde::Serialize;

use crate::{
    backend::NO_STORE,
    failure::Failure,
    output::{json, table},
    session::Session,
};

#[derive(Serialize)]
struct Finding {
    /// `log` or `store`.
    part: &'static str,
    backend: String,
    /// `None` if the backend does not tell.
    version: Option<String>,
    /// The log's name; `None` for a store.
    log: Option<String>,
    is_durable: bool,
    /// What is wrong, and what to change.
    problem: Option<String>,
}

pub(crate) async fn doctor(session: &Session<'_>) -> Result<(), Failure> {
    let mut findings = Vec::new();
    let position = match session.store.is_store() {
        true => {
            let (found, position) = store(session).await;
            findings.push(found);
            position
        }
        // A log may be looked at alone, but has no positions.
        false => session.cli.consumer.as_ref().map(|_| Err(Failure::usage(NO_STORE))),
    };
    let mut unknown = None;
    let position = match position {
        Some(Ok(position)) => Some(position),
        Some(Err(failure)) => {
            unknown = Some(failure);
            None
        }
        None => None,
    };
    if session.log.log.is_some() || position.is_some() || findings.is_empty() {
        findings.push(log(session, position.as_ref()).await);
    }
    let shown = if session.cli.json {
        findings.iter().try_for_each(json)
    } else {
        let rows = findings.iter().map(|finding| {
            let version = finding.version.clone().unwrap_or_else(|| "not told".into());
            let durable = if finding.is_durable { "yes" } else { "no" };
            let problem = finding.problem.clone().unwrap_or_else(|| "none".into());
            vec![
                finding.part.into(),
                finding.backend.clone(),
                version,
                durable.into(),
                problem,
            ]
        });
        table(&["part", "backend", "version", "durable", "problem"], rows)
    };
    // Also if nobody reads what is wrong.
    let problems = match findings.iter().filter(|finding| finding.problem.is_some()).count() {
        0 => None,
        1 => Some("one backend has a problem"),
        _ => Some("both backends have a problem"),
    };
    match (problems, unknown) {
        (None, None) => shown,
        (Some(problems), None) => Err(Failure::refused(problems)),
        (None, Some(unknown)) => Err(unknown),
        (Some(problems), Some(unknown)) => Err(Failure::refused(format!("{problems}, and {unknown}"))),
    }
}

/// Also returns the position of the consumer, if one is named and the store answers.
async fn store(session: &Session<'_>) -> (Finding, Option<Result<Position, Failure>>) {
    let mut finding = Finding::new("store", session.store.shown());
    let mut position = None;
    let found = async {
        let backend = session.open(&session.store).await?;
        finding.version = backend.version();
        let store = backend.store()?;
        let durability = store.durability().await?;
        if session.cli.consumer.is_some() {
            position = Some(session.position(&*store).await);
        }
        Ok(durability)
    };
    let found = found.await;
    finding.conclude(found);
    (finding, position)
}

/// The log that is named, or else the one that the consumer reads.
async fn log(session: &Session<'_>, position: Option<&Position>) -> Finding {
    let mut finding = Finding::new("log", session.log.shown());
    let read = position.map(|position| position.log.name().to_owned());
    finding.log = session.log.log.clone().or(read);
    let found = async {
        finding.version = session.open(&session.log).await?.version();
        let log = session.open_log(position).await?;
        log.bounds().await?;
        Ok(log.durability().await?)
    };
    let found = found.await;
    finding.conclude(found);
    finding
}

impl Finding {
    fn new(part: &'static str, backend: String) -> Self {
        Self {
            part,
            backend,
            version: None,
            log: None,
            is_durable: false,
            problem: None,
        }
    }

    fn conclude(&mut self, found: Result<Durability, Failure>) {
        match found {
            Ok(Durability::Durable) => self.is_durable = true,
            Ok(Durability::Volatile(why)) => self.problem = Some(format!("it may lose what it acknowledged: {why}")),
            Ok(Durability::Unknown(why)) => self.problem = Some(format!("nobody knows whether it is durable: {why}")),
            Ok(_) => self.problem = Some("it reports a durability that this program does not know".into()),
            Err(failure) => self.problem = Some(failure.to_string()),
        }
    }
}
