//! Detects records that a producer sent twice, with one anti-replay window per producer.

use std::{
    collections::HashMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use crate::{Epoch, Error, Numbering, Offset, Origin, Record};

const BLOCK_BITS: u64 = u64::BITS as u64;
/// One block more than the window needs, so that the newest block can be partly filled (RFC 6479,
/// section 2).
const BLOCKS: usize = (Window::SIZE / BLOCK_BITS) as usize + 1;

/// The sequences seen of one producer: the highest one, and which of the 1,024 below it.
///
/// This is the anti-replay window of IPsec (RFC 4303, section 3.4.3), laid out as a ring of blocks
/// that is never shifted (RFC 6479). A high-water mark is not enough: a broker may refuse message 5
/// and accept 6, and the resent 5 must not be lost. Sequences below the window count as seen, so a
/// producer must never have more than [`Window::SIZE`] records in flight.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Window {
    highest: u64,
    /// Bit `s % 64` of block `s / 64 % BLOCKS` stands for sequence `s`.
    blocks: [u64; BLOCKS],
    last_offset: Offset,
    /// When the last record was appended, by the appender's clock, in milliseconds since 1970.
    appended_at: u64,
    /// When the last record was read, by the reader's clock, in milliseconds since 1970.
    read_at: u64,
}

impl Window {
    /// How many sequences below the highest one are tracked individually.
    pub const SIZE: u64 = 1_024;

    /// The length of [`encode`](Self::encode) in bytes.
    pub const ENCODED_LEN: usize = 1 + 8 * (5 + BLOCKS);

    const ENCODING_VERSION: u8 = 2;

    /// Version 1, written before 0.2, has no `read_at`.
    const ENCODED_LEN_1: usize = 1 + 8 * (4 + BLOCKS);

    /// A window that has seen only this sequence.
    pub fn new(sequence: u64) -> Self {
        let mut window = Self {
            highest: sequence,
            blocks: [0; BLOCKS],
            last_offset: Offset::ZERO,
            appended_at: 0,
            read_at: 0,
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

    /// Whether `sequence` is too old to be tracked. It counts as seen, but may come from a producer
    /// that started numbering again.
    fn is_below(&self, sequence: u64) -> bool {
        self.highest.checked_sub(sequence).is_some_and(|age| age > Self::SIZE)
    }

    /// Marks `sequence` as seen. Marking it again changes nothing.
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
            self.appended_at,
            self.read_at,
        ];
        for (slot, number) in bytes[1..].chunks_exact_mut(8).zip(numbers.iter().chain(&self.blocks)) {
            slot.copy_from_slice(&number.to_be_bytes());
        }
        bytes
    }

    /// Decodes the bytes of [`encode`](Self::encode), of this version or the one before.
    ///
    /// # Errors
    /// [`Error::Failed`] if the bytes have another length or version.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let has_read_at = match (bytes.first(), bytes.len()) {
            (Some(1), Self::ENCODED_LEN_1) => false,
            (Some(&Self::ENCODING_VERSION), Self::ENCODED_LEN) => true,
            (version, length) => {
                return Err(Error::failed(
                    "decode a producer's window",
                    format!(
                        "it has {length} bytes of version {version:?}, and this program reads only version {} and the one \
                         before; upgrade the program",
                        Self::ENCODING_VERSION
                    ),
                ));
            }
        };
        let mut numbers = bytes[1..]
            .chunks_exact(8)
            .map(|chunk| chunk.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)));
        let mut number = || numbers.next().unwrap_or_default();
        Ok(Self {
            highest: number(),
            last_offset: Offset::new(number(), number()),
            appended_at: number(),
            read_at: if has_read_at { number() } else { 0 },
            blocks: std::array::from_fn(|_| number()),
        })
    }
}

/// All windows of one consumer, and which of them changed since the last commit.
#[derive(Debug, Default)]
pub(crate) struct Windows {
    by_numbering: HashMap<Numbering, Tracked>,
    changed: Vec<Numbering>,
    forgotten: Vec<Numbering>,
}

#[derive(Debug)]
struct Tracked {
    window: Window,
    changed: bool,
}

impl Windows {
    pub(crate) fn new(stored: Vec<(Numbering, Window)>) -> Self {
        Self {
            by_numbering: stored
                .into_iter()
                .map(|(numbering, window)| {
                    let changed = false;
                    (numbering, Tracked { window, changed })
                })
                .collect(),
            ..Self::default()
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.by_numbering.is_empty()
    }

    /// Whether a record with this origin was handled before.
    pub(crate) fn is_seen(&self, origin: &Origin) -> bool {
        self.window(origin)
            .is_some_and(|window| window.is_seen(origin.sequence))
    }

    /// Whether a record with this origin counts as seen only because it is older than its
    /// producer's window.
    pub(crate) fn is_below(&self, origin: &Origin) -> bool {
        self.window(origin)
            .is_some_and(|window| window.is_below(origin.sequence))
    }

    fn window(&self, origin: &Origin) -> Option<&Window> {
        self.by_numbering.get(&origin.numbering).map(|tracked| &tracked.window)
    }

    /// Marks a record that was read at `now`, for the next commit. Duplicates are marked too,
    /// because they show that their producer is not silent.
    #[inline]
    pub(crate) fn mark(&mut self, record: &Record, now: SystemTime) {
        if let Some(origin) = &record.origin {
            self.mark_origin(origin, record, now);
        }
    }

    fn mark_origin(&mut self, origin: &Origin, record: &Record, now: SystemTime) {
        let tracked = match self.by_numbering.get_mut(&origin.numbering) {
            Some(tracked) => {
                tracked.window.mark(origin.sequence);
                tracked
            }
            None => self.by_numbering.entry(origin.numbering.clone()).or_insert(Tracked {
                window: Window::new(origin.sequence),
                changed: false,
            }),
        };
        // A dead letter that is decoded late is older than the producer's last record.
        if record.offset >= tracked.window.last_offset {
            tracked.window.last_offset = record.offset;
            tracked.window.appended_at = millis(record.appended_at);
        }
        tracked.window.read_at = millis(now);
        if !tracked.changed {
            tracked.changed = true;
            self.changed.push(origin.numbering.clone());
        }
    }

    /// Forgets the producers that are silent (see [`Silence`]), except those in a stable epoch.
    pub(crate) fn forget_silent(&mut self, silence: &Silence) {
        let forgotten = &mut self.forgotten;
        self.by_numbering.retain(|numbering, tracked| {
            let keep = numbering.epoch() == Epoch::STABLE || tracked.changed || !silence.covers(&tracked.window);
            if !keep {
                forgotten.push(numbering.clone());
            }
            keep
        });
    }

    /// The changed windows and forgotten producers for the next commit to write.
    pub(crate) fn take_changes(&mut self) -> (Vec<(Numbering, Window)>, Vec<Numbering>) {
        let mut changed = Vec::with_capacity(self.changed.len());
        for numbering in self.changed.drain(..) {
            if let Some(tracked) = self.by_numbering.get_mut(&numbering) {
                tracked.changed = false;
                changed.push((numbering, tracked.window.clone()));
            }
        }
        let mut forgotten = std::mem::take(&mut self.forgotten);
        forgotten.retain(|numbering| !self.by_numbering.contains_key(numbering));
        (changed, forgotten)
    }
}

/// When a producer counts as silent. No single clock can decide this, so all of these must hold:
///
/// - Its last record was *read* longer ago than the limit, by the reader's own clock. An appender
///   with a wrong clock cannot forge that.
/// - Its last record was *appended* longer before the newest record than the limit, by the
///   appenders' clocks. A reader with a wrong clock, or one that was down for a month, cannot forge
///   that.
/// - The log holds none of its records any more.
///
/// The session checks only after it has read everything that the log held a moment before. A record
/// that was sent again and is still unread therefore keeps its producer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Silence {
    /// The earliest times that do not count as silent, in milliseconds since 1970.
    read_since: u64,
    appended_since: u64,
    earliest: Offset,
}

impl Silence {
    /// As of `now` by the reader's clock. `newest` is when the last record read was appended.
    pub(crate) fn new(limit: Duration, now: SystemTime, newest: SystemTime, earliest: Offset) -> Self {
        let before = |time: SystemTime| millis(time.checked_sub(limit).unwrap_or(UNIX_EPOCH));
        Self {
            read_since: before(now),
            appended_since: before(newest),
            earliest,
        }
    }

    fn covers(&self, window: &Window) -> bool {
        window.read_at < self.read_since
            && window.appended_at < self.appended_since
            && window.last_offset < self.earliest
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

    /// The model for the window: every sequence ever seen, and the rule for sequences that are too
    /// old.
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

    /// Sequences that walk upwards with resends, gaps, and jumps around the edge of the window and
    /// the ends of the number range.
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
            window.appended_at = u64::MAX - 1;
            window.read_at = cut as u64;
            prop_assert_eq!(Window::decode(&window.encode()).expect("decodes"), window);
        }
    }

    const DAY: Duration = Duration::from_secs(86_400);

    /// This many days after 1970-01-01.
    fn day(day: u32) -> SystemTime {
        UNIX_EPOCH + DAY * day
    }

    fn record(numbering: &str, sequence: u64, offset: u64, appended: SystemTime) -> Record {
        let mut record = Record::new(offset.into(), appended, "");
        let numbering: Numbering = numbering.parse().expect("numbering");
        record.origin = Some(Origin::new(numbering.producer().clone(), numbering.epoch(), sequence));
        record
    }

    fn is_seen(windows: &Windows, numbering: &str, sequence: u64) -> bool {
        let record = record(numbering, sequence, 0, day(0));
        windows.is_seen(record.origin.as_ref().expect("origin"))
    }

    #[test]
    fn only_changed_windows_are_committed_and_once() {
        let mut windows = Windows::default();
        windows.mark(&record("a", 1, 0, day(0)), day(0));
        windows.mark(&record("b", 1, 1, day(0)), day(0));
        assert_eq!(windows.take_changes().0.len(), 2);
        assert!(is_seen(&windows, "a", 1));
        assert!(!is_seen(&windows, "b", 2));
        windows.mark(&record("b", 2, 3, day(0)), day(0));
        let (changed, forgotten) = windows.take_changes();
        assert_eq!(changed.len(), 1);
        assert_eq!(changed[0].0.to_string(), "b");
        assert!(forgotten.is_empty());
    }

    #[test]
    fn a_new_numbering_in_another_epoch_is_not_mistaken_for_the_old_one() {
        let mut windows = Windows::default();
        windows.mark(&record("a#7", 1, 0, day(0)), day(0));
        assert!(is_seen(&windows, "a#7", 1));
        assert!(!is_seen(&windows, "a#8", 1) && !is_seen(&windows, "a", 1));
    }

    #[test]
    fn a_producer_is_forgotten_only_when_both_clocks_and_the_log_agree() {
        // The numbering, the days on which its record was appended and read, the day on which the
        // newest record was appended, and the earliest offset of the log. All as of day 10.
        for (numbering, appended, read, newest, earliest, forgotten) in [
            ("a#1", 1, 1, 10, 6u64, true),
            ("a#1", 1, 1, 10, 5, false),  // the log holds its record
            ("a#1", 9, 1, 10, 6, false),  // the reader was down
            ("a#1", 1, 9, 10, 6, false),  // the appender's clock is behind: the record was read yesterday
            ("a#1", 1, 9, 999, 6, false), // the clock of the newest record's appender is years ahead
            ("a#1", 1, 1, 2, 6, false),   // that clock is behind, or the reader's clock is ahead
            ("a", 1, 1, 10, 6, false),    // a stable numbering
        ] {
            let mut windows = Windows::default();
            windows.mark(&record(numbering, 1, 5, day(appended)), day(read));
            windows.take_changes();
            windows.forget_silent(&Silence::new(DAY * 7, day(10), day(newest), earliest.into()));
            assert_eq!(
                windows.take_changes().1.len(),
                usize::from(forgotten),
                "{numbering} appended {appended} read {read} newest {newest} earliest {earliest}"
            );
        }
    }

    #[test]
    fn a_forgotten_producer_that_comes_back_is_written_not_deleted() {
        let mut windows = Windows::default();
        windows.mark(&record("a#1", 1, 5, day(0)), day(0));
        windows.take_changes();
        windows.forget_silent(&Silence::new(DAY, day(9), day(9), 9.into()));
        assert!(windows.is_empty());
        windows.mark(&record("a#1", 2, 9, day(9)), day(9));
        let (changed, forgotten) = windows.take_changes();
        assert_eq!((changed.len(), forgotten.len()), (1, 0));
    }

    #[test]
    fn windows_of_the_version_before_are_read() {
        let window = accept_all([3, 4, 9]);
        let mut old = window.encode().to_vec();
        old[0] = 1;
        // `read_at` follows the two numbers of the offset and the append time.
        old.drain(1 + 8 * 4..1 + 8 * 5);
        assert_eq!(Window::decode(&old).expect("decodes"), window);
    }

    fn accept_all(sequences: impl IntoIterator<Item = u64>) -> Window {
        let mut window = Window::new(0);
        for sequence in sequences {
            window.mark(sequence);
        }
        window
    }

    #[test]
    fn foreign_bytes_are_refused_with_their_version() {
        assert!(Window::decode(&[]).is_err());
        let mut bytes = Window::new(3).encode();
        for version in [0, 1, 3] {
            bytes[0] = version;
            let error = Window::decode(&bytes).expect_err("another version").to_string();
            assert!(error.contains(&format!("version Some({version})")), "{error}");
        }
    }
}
