use crate::Numbering;

/// Parses the numberings of records, and caches the last one. A producer's records mostly come in
/// runs, and the records of a run then share one name in memory.
#[derive(Clone, Debug, Default)]
pub struct NumberingCache {
    last: Option<(Box<[u8]>, Numbering)>,
}

impl NumberingCache {
    /// An empty cache.
    pub const fn new() -> Self {
        Self { last: None }
    }

    /// The numbering whose [`Display`](std::fmt::Display) form was stored as `text`.
    ///
    /// # Errors
    /// The reason why `text` is not a numbering. A reader yields a record with such a numbering as
    /// [malformed](crate::Record::malformed).
    pub fn parse(&mut self, text: &[u8]) -> Result<Numbering, String> {
        if let Some((last, numbering)) = &self.last
            && **last == *text
        {
            return Ok(numbering.clone());
        }
        let name = str::from_utf8(text).map_err(|error| format!("the producer is not UTF-8: {error}"))?;
        let numbering: Numbering = name
            .parse()
            .map_err(|error| format!("the producer is not valid: {error}"))?;
        self.last = Some((text.into(), numbering.clone()));
        Ok(numbering)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Epoch, ProducerId};

    #[test]
    fn names_are_parsed_whatever_came_before() {
        let mut cache = NumberingCache::new();
        let web = Numbering::new(ProducerId::new("web").expect("a name"), Epoch::new(7));
        let shop = Numbering::new(ProducerId::new("shop").expect("a name"), Epoch::STABLE);
        for numbering in [&web, &web, &shop, &web] {
            assert_eq!(cache.parse(numbering.to_string().as_bytes()).as_ref(), Ok(numbering));
        }
        assert!(cache.parse(b"\xff").expect_err("no name").contains("UTF-8"));
        assert!(cache.parse(b"two words").is_err());
        assert_eq!(cache.parse(web.to_string().as_bytes()), Ok(web));
    }
}
