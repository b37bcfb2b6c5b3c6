//! `doctor`: whether the backends can be used.

use essentially_once::{Log as _, backend::Durability};
use serde::Serialize;

use crate::{
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
    let mut findings = vec![store(session).await];
    if session.log.log.is_some() {
        findings.push(log(session).await);
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
    match findings.iter().filter(|finding| finding.problem.is_some()).count() {
        0 => shown,
        1 => Err(Failure::refused("one backend has a problem")),
        _ => Err(Failure::refused("both backends have a problem")),
    }
}

async fn store(session: &Session<'_>) -> Finding {
    let mut finding = Finding::new("store", session.store.shown());
    let found = async {
        let backend = session.open(&session.store).await?;
        finding.version = backend.version();
        Ok(backend.store().durability().await?)
    };
    let found = found.await;
    finding.conclude(found);
    finding
}

async fn log(session: &Session<'_>) -> Finding {
    let mut finding = Finding::new("log", session.log.shown());
    finding.log.clone_from(&session.log.log);
    let found = async {
        let backend = session.open(&session.log).await?;
        finding.version = backend.version();
        let log = backend.log(session.log.log.as_deref().unwrap_or_default()).await?;
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
