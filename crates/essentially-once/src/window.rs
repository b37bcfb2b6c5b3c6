//! Dropping what a producer sent twice: one anti-replay window per producer.

use std::{
    collections::HashMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use crate::{Bounds, Error, Offset, ProducerId, Record};

const BLOCK_BITS: u64 = u64::BITS as u64;
/// One block more than the window needs, so that the newest block can be partly filled (RFC 6479, section 2).
const BLOCKS: usize = (Window::SIZE / BLOCK_BITS) as usize + 1;

/// What was seen of one producer: the highest sequence, and which of the 1,024 below it.
///
/// It is the anti-replay window of IPsec (RFC 4303, section 3.4.3), laid out as a ring of blocks that is never shifted
/// (RFC 6479). A mere high-water mark would not do: a broker may refuse message 5 and accept 6, and the 5 that is sent again must not be
/// lost. What is below the window counts as seen, so a producer must never have more than [`Window::SIZE`] records in flight.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Window {
    highest: u64,
    /// Bit `s % 64` of block `s / 64 % BLOCKS` stands for sequence `s`.
    blocks: [u64; BLOCKS],
    last_offset: Offset,
    /// Milliseconds since 1970.
    last_seen: u64,
}

impl Window {
    /// How many sequences below the highest one are remembered one by one.
    pub const SIZE: u64 = 1_024;

    /// Bytes of [`encode`](Self::encode).
    pub const ENCODED_LEN: usize = 1 + 8 * (4 + BLOCKS);

    const ENCODING_VERSION: u8 = 1;

    /// A window that has seen this one sequence.
    pub fn new(sequence: u64) -> Self {
        let mut window = Self {
            highest: sequence,
            blocks: [0; BLOCKS],
            last_offset: Offset::ZERO,
            last_seen: 0,
        };
        window.mark(sequence);
        window
    }

    /// Whether `sequence` was marked before, or is below the window.
    pub fn is_seen(&self, sequence: u64) -> bool {
        if sequence > self.highest {
            return false;
        }
        let (block, bit) = Self::place(sequence);
        self.is_below(sequence) || self.blocks[block] & bit != 0
    }

    /// Whether `sequence` is so old that nothing is known of it: it counts as seen, but may be from a producer that numbers anew.
    fn is_below(&self, sequence: u64) -> bool {
        self.highest.checked_sub(sequence).is_some_and(|age| age > Self::SIZE)
    }

    /// Takes note of a `sequence`; no change if it was seen before.
    pub fn mark(&mut self, sequence: u64) {
        if sequence > self.highest {
            let (old, new) = (self.highest / BLOCK_BITS, sequence / BLOCK_BITS);
            for block in (old + 1..=new).rev().take(BLOCKS) {
                self.blocks[(block % BLOCKS as u64) as usize] = 0;
            }
            self.highest = sequence;
        } else if self.is_below(sequence) {
            return;
        }
        let (block, bit) = Self::place(sequence);
        self.blocks[block] |= bit;
    }

    fn place(sequence: u64) -> (usize, u64) {
        (
            (sequence / BLOCK_BITS % BLOCKS as u64) as usize,
            1 << (sequence % BLOCK_BITS),
        )
    }

    /// The window as bytes for a store to keep: a version, then big-endian numbers.
    pub fn encode(&self) -> [u8; Self::ENCODED_LEN] {
        let mut bytes = [0; Self::ENCODED_LEN];
        bytes[0] = Self::ENCODING_VERSION;
        let numbers = [
            self.highest,
            self.last_offset.hi(),
            self.last_offset.lo(),
            self.last_seen,
        ];
        for (slot, number) in bytes[1..].chunks_exact_mut(8).zip(numbers.iter().chain(&self.blocks)) {
            slot.copy_from_slice(&number.to_be_bytes());
        }
        bytes
    }

    /// Reads what [`encode`](Self::encode) wrote.
    ///
    /// # Errors
    /// [`Error::Failed`] if the bytes have another length or version.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        if bytes.len() != Self::ENCODED_LEN || bytes[0] != Self::ENCODING_VERSION {
            return Err(Error::failed(
                "decode a producer's window",
                format!(
                    "{} bytes of version {:?}, this version reads {} bytes of version {}",
                    bytes.len(),
                    bytes.first(),
                    Self::ENCODED_LEN,
                    Self::ENCODING_VERSION
                ),
            ));
        }
        let mut numbers = bytes[1..]
            .chunks_exact(8)
            .map(|chunk| chunk.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)));
        let mut number = || numbers.next().unwrap_or_default();
        Ok(Self {
            highest: number(),
            last_offset: Offset::new(number(), number()),
            last_seen: number(),
            blocks: std::array::from_fn(|_| number()),
        })
    }
}

/// All windows of one consumer, and which of them changed since the last commit.
#[derive(Debug, Default)]
pub(crate) struct Windows {
    by_producer: HashMap<ProducerId, Tracked>,
    changed: Vec<ProducerId>,
    forgotten: Vec<ProducerId>,
}

#[derive(Debug)]
struct Tracked {
    window: Window,
    changed: bool,
}

impl Windows {
    pub(crate) fn new(stored: Vec<(ProducerId, Window)>) -> Self {
        Self {
            by_producer: stored
                .into_iter()
                .map(|(producer, window)| {
                    let changed = false;
                    (producer, Tracked { window, changed })
                })
                .collect(),
            ..Self::default()
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.by_producer.is_empty()
    }

    /// Whether the record was handled before; never, if it has no origin.
    pub(crate) fn is_seen(&self, record: &Record) -> bool {
        record.origin.as_ref().is_some_and(|origin| {
            self.by_producer
                .get(&origin.producer)
                .is_some_and(|tracked| tracked.window.is_seen(origin.sequence))
        })
    }

    /// Whether the record is dropped only because it is older than its producer's window.
    pub(crate) fn is_below(&self, record: &Record) -> bool {
        record.origin.as_ref().is_some_and(|origin| {
            self.by_producer
                .get(&origin.producer)
                .is_some_and(|tracked| tracked.window.is_below(origin.sequence))
        })
    }

    /// Takes note of a record, for the next commit. Of a duplicate too: its producer is not silent.
    pub(crate) fn mark(&mut self, record: &Record) {
        let Some(origin) = &record.origin else {
            return;
        };
        let tracked = match self.by_producer.get_mut(&origin.producer) {
            Some(tracked) => {
                tracked.window.mark(origin.sequence);
                tracked
            }
            None => self.by_producer.entry(origin.producer.clone()).or_insert(Tracked {
                window: Window::new(origin.sequence),
                changed: false,
            }),
        };
        tracked.window.last_offset = record.offset;
        tracked.window.last_seen = millis(record.appended_at);
        if !tracked.changed {
            tracked.changed = true;
            self.changed.push(origin.producer.clone());
        }
    }

    /// Forgets producers that sent nothing for the time `after` before `latest`, and nothing that the log still holds.
    ///
    /// `latest` is the append time of the last record read, so that what is still unread does not count as silence: to a
    /// consumer that was down for a month, a month has not passed.
    pub(crate) fn forget_unseen(&mut self, after: Duration, latest: SystemTime, bounds: Bounds) {
        let limit = millis(latest.checked_sub(after).unwrap_or(UNIX_EPOCH));
        let forgotten = &mut self.forgotten;
        self.by_producer.retain(|producer, tracked| {
            let window = &tracked.window;
            let keep = tracked.changed || window.last_seen >= limit || window.last_offset >= bounds.earliest;
            if !keep {
                forgotten.push(producer.clone());
            }
            keep
        });
    }

    /// What the next commit has to write: changed windows and forgotten producers.
    pub(crate) fn take_changes(&mut self) -> (Vec<(ProducerId, Window)>, Vec<ProducerId>) {
        let mut changed = Vec::with_capacity(self.changed.len());
        for producer in self.changed.drain(..) {
            if let Some(tracked) = self.by_producer.get_mut(&producer) {
                tracked.changed = false;
                changed.push((producer, tracked.window.clone()));
            }
        }
        let mut forgotten = std::mem::take(&mut self.forgotten);
        forgotten.retain(|producer| !self.by_producer.contains_key(producer));
        (changed, forgotten)
    }
}

fn millis(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// What the window must agree with: every sequence ever seen, and the rule for those that are too old.
    #[derive(Default)]
    struct Naive {
        seen: BTreeSet<u64>,
    }

    impl Naive {
        fn accept(&mut self, sequence: u64) -> bool {
            let too_old = self
                .seen
                .last()
                .is_some_and(|highest| sequence < *highest && highest - sequence > Window::SIZE);
            !too_old && self.seen.insert(sequence)
        }
    }

    fn accept(window: &mut Window, sequence: u64) -> bool {
        let new = !window.is_seen(sequence);
        if new {
            window.mark(sequence);
        }
        new
    }

    /// Sequences that walk upwards with resends, gaps, and jumps around the window's edge and the number range's ends.
    fn sequences() -> impl Strategy<Value = Vec<u64>> {
        let step = prop_oneof![
            6 => -3i64..=4,
            2 => -1_100i64..=1_100,
            1 => prop_oneof![Just(-1_025i64), Just(-1_024), Just(-1_023), Just(1_024), Just(1_088), Just(100_000)],
        ];
        let start = prop_oneof![Just(0), Just(1_000), Just(u64::MAX - 2_000), any::<u64>()];
        (start, prop::collection::vec(step, 1..400)).prop_map(|(start, steps)| {
            let mut at = start;
            steps
                .into_iter()
                .map(|step| {
                    at = at.saturating_add_signed(step);
                    at
                })
                .collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn window_agrees_with_the_naive_model(sequences in sequences()) {
            let mut naive = Naive::default();
            let mut window: Option<Window> = None;
            for sequence in sequences {
                let accepted = match &mut window {
                    Some(window) => accept(window, sequence),
                    none => {
                        *none = Some(Window::new(sequence));
                        true
                    }
                };
                prop_assert_eq!(accepted, naive.accept(sequence), "sequence {}", sequence);
            }
        }

        #[test]
        fn encoding_round_trips_at_any_moment(sequences in sequences(), cut in 0usize..400) {
            let mut window = Window::new(sequences[0]);
            for sequence in &sequences[..cut.min(sequences.len())] {
                accept(&mut window, *sequence);
            }
            window.last_offset = Offset::new(7, cut as u64);
            window.last_seen = u64::MAX - 1;
            prop_assert_eq!(Window::decode(&window.encode()).expect("decodes"), window);
        }
    }

    fn record(producer: &str, sequence: u64, offset: u64, at: u64) -> Record {
        let mut record = Record::new(offset.into(), UNIX_EPOCH + Duration::from_secs(at), "");
        let producer = ProducerId::new(producer).expect("name");
        record.origin = Some(crate::Origin { producer, sequence });
        record
    }

    #[test]
    fn only_changed_windows_are_committed_and_once() {
        let mut windows = Windows::default();
        windows.mark(&record("a", 1, 0, 0));
        windows.mark(&record("b", 1, 1, 0));
        assert_eq!(windows.take_changes().0.len(), 2);
        assert!(windows.is_seen(&record("a", 1, 2, 0)));
        assert!(!windows.is_seen(&record("b", 2, 3, 0)));
        windows.mark(&record("b", 2, 3, 0));
        let (changed, forgotten) = windows.take_changes();
        assert_eq!(changed.len(), 1);
        assert_eq!(changed[0].0.as_str(), "b");
        assert!(forgotten.is_empty());
    }

    #[test]
    fn a_producer_is_forgotten_only_when_clock_and_log_agree() {
        let day = Duration::from_secs(86_400);
        let bounds = |earliest: u64| Bounds {
            earliest: earliest.into(),
            end: 1_000.into(),
        };
        let now = UNIX_EPOCH + day * 10;
        for (last_day, earliest, forgotten) in [(1, 6, true), (1, 5, false), (9, 6, false)] {
            let mut windows = Windows::default();
            windows.mark(&record("a", 1, 5, last_day * 86_400));
            windows.take_changes();
            windows.forget_unseen(day * 7, now, bounds(earliest));
            assert_eq!(
                windows.take_changes().1.len(),
                usize::from(forgotten),
                "{last_day} {earliest}"
            );
        }
    }

    #[test]
    fn a_forgotten_producer_that_comes_back_is_written_not_deleted() {
        let mut windows = Windows::default();
        windows.mark(&record("a", 1, 5, 0));
        windows.take_changes();
        let bounds = Bounds {
            earliest: 9.into(),
            end: 9.into(),
        };
        windows.forget_unseen(Duration::ZERO, SystemTime::now(), bounds);
        windows.mark(&record("a", 2, 9, 0));
        let (changed, forgotten) = windows.take_changes();
        assert_eq!((changed.len(), forgotten.len()), (1, 0));
    }

    #[test]
    fn foreign_bytes_are_no_window() {
        assert!(Window::decode(&[]).is_err());
        let mut bytes = Window::new(3).encode();
        bytes[0] = 2;
        assert!(Window::decode(&bytes).is_err());
    }
}
