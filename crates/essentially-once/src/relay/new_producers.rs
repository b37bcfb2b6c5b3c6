//! New producers for the records of a restored outbox.

use std::collections::{BTreeSet, HashMap, hash_map::Entry};

use xxhash_rust::xxh3::xxh3_128;

use crate::{Epoch, Error, Offset, Origin, ProducerId, backend::Numbering, outbox::named};

/// From which offsets on the numberings of an outbox are others.
#[derive(Default)]
pub(super) struct NewProducers {
    from: BTreeSet<Offset>,
    /// Computed before, since a name costs an allocation.
    computed: HashMap<(Offset, Numbering), Numbering>,
}

impl NewProducers {
    pub(super) fn add(&mut self, offset: Offset) {
        self.from.insert(offset);
    }

    /// Replaces the numbering of a record at `offset` if it must be.
    pub(super) fn apply(&mut self, offset: Offset, origin: &mut Origin) -> Result<(), Error> {
        let Some(from) = self.from.range(..=offset).next_back() else {
            return Ok(());
        };
        if origin.numbering.epoch() != Epoch::STABLE {
            return Ok(());
        }
        let new = match self.computed.entry((*from, origin.numbering.clone())) {
            Entry::Occupied(computed) => computed.into_mut(),
            Entry::Vacant(entry) => {
                let new = new_producer(origin.numbering.producer(), *from)?;
                entry.insert(Numbering::new(new, Epoch::STABLE))
            }
        };
        origin.numbering.clone_from(new);
        Ok(())
    }
}

/// The same for the same producer and offset, and another one for others.
fn new_producer(old: &ProducerId, from: Offset) -> Result<ProducerId, Error> {
    let name = old.as_str().rsplit_once('@').map_or(old.as_str(), |(name, _)| name);
    let mut bytes = old.as_str().as_bytes().to_vec();
    bytes.extend(from.hi().to_be_bytes());
    bytes.extend(from.lo().to_be_bytes());
    named(name, xxh3_128(&bytes))
}
