//! The ways in which the model can be wrong, one at a time. Each is a mistake that a real backend
//! can make. Also the sound ways in which it can differ.

macro_rules! defects {
    (wrong { $($(#[$doc:meta])+ $defect:ident,)+ } sound { $($(#[$sound_doc:meta])+ $sound:ident,)+ }) => {
        /// What is peculiar about a model.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub(crate) enum Defect {
            /// Nothing: the model that must pass every case.
            None,
            $($(#[$doc])+ $defect,)+
            $($(#[$sound_doc])+ $sound,)+
        }

        impl Defect {
            /// What is wrong.
            pub(crate) const ALL: &[Self] = &[$(Self::$defect),+];
            /// What is different, and within the contract.
            pub(crate) const SOUND: &[Self] = &[$(Self::$sound),+];
        }
    };
}

defects! {
wrong {
    // The log, from append to read.
    /// An append is acknowledged when it is in memory, and written later.
    AppendAcknowledgedBeforeDurable,
    /// Recovery applies the last entry of the journal a second time.
    RestartReplaysTheTail,
    /// An append whose reply was lost is reported as certainly failed.
    LostAppendReplyToldAsFailure,
    /// After losing its connection within a batch, an append continues behind the lost record.
    ReconnectTearsBatch,
    /// The records of a batch are written in reverse order.
    BatchWrittenBackwards,
    /// A batch stays in the handle and is written after the next one.
    LaterBatchOvertakes,
    /// An offset is assigned before its record is visible, and readers move past it.
    HoleFillsInLater,
    /// The first reader sees the first two records in the wrong order.
    FirstReaderSwapsTwo,
    /// Two consecutive records are reported with the same offset.
    OffsetsEqualInPairs,
    /// A reader opened at a record's offset begins after the record.
    ReaderStartsOneLate,
    /// A reader opened at a record's offset begins with the record before it.
    ReaderStartsOneEarly,
    /// A reader opened between two records begins with the earlier one.
    ReaderStartsBeforeABetween,
    /// All readers of a handle share one place in the log.
    ReadersShareACursor,
    /// An empty key comes back as no key.
    EmptyKeyReadAsNone,
    /// Headers come back in another order.
    HeadersSorted,
    /// Of several headers with the same name, only one comes back.
    RepeatedHeadersLost,
    /// Header names come back with their special characters lost.
    HeaderNamesReadAsAscii,
    /// A payload that is not text comes back changed.
    PayloadReadAsText,
    /// A payload comes back one byte longer.
    PayloadPadded,
    /// The origin does not come back.
    OriginLost,
    /// The epoch of an origin does not come back.
    EpochLost,
    /// A sequence above half of the range comes back smaller.
    SequenceReadAsSigned,
    /// A record without a payload is taken for a damaged one.
    EmptyPayloadCalledMalformed,
    /// The time of the append is not kept.
    AppendTimeLost,
    /// An append of a batch returns the offset of its first record.
    AppendTellsTheFirst,
    /// An empty append returns an offset.
    EmptyAppendTellsTheEnd,
    /// An empty append adds a blank record.
    EmptyAppendAddsARecord,
    /// A reader's first call returns no record.
    NextReturnsNothing,
    /// A call returns one record more than requested.
    NextIgnoresMax,
    /// Each call begins with the last record of the previous call.
    NextRepeatsTheBoundary,
    /// The bytes of a call are not bounded.
    NextIgnoresBytes,
    /// Records that do not fit into a call are dropped, and the next call begins after them.
    NextSkipsWhatItCutsOff,
    /// All logs of a backend share their records.
    LogsShareRecords,
    /// A foreign record is skipped.
    ForeignSkipped,
    /// A foreign record comes back empty.
    ForeignPayloadLost,
    /// A foreign record is taken for a damaged one.
    ForeignCalledMalformed,
    /// A foreign record gets an origin.
    ForeignGetsOrigin,
    /// An append does not wake a waiting reader.
    WaitingReaderIsNotWoken,
    /// A reader that had to wait starts over at the first record.
    WokenReaderStartsOver,
    /// The bounds of an empty log show a record.
    EmptyLogHasAnEnd,
    /// The earliest offset is reported as one past the first record.
    EarliestIsBehindTheFirst,
    /// The end is reported as the offset of the last record.
    EndIsTheLastRecord,
    /// The bounds still include records that retention removed.
    BoundsIgnoreRetention,
    /// Retention removes one record more than it should.
    RetentionRemovesTooMuch,
    /// Retention rewrites the remaining records without their append times.
    RetentionLosesAppendTimes,
    /// Reading a removed record silently begins at the earliest remaining one.
    TruncationSilent,
    /// Reading a removed record waits for a new record.
    TruncationWaits,
    /// Reading a removed record is reported as a general failure.
    TruncatedToldAsFailure,
    /// Reading a removed record does not report the earliest remaining one.
    TruncatedTellsNoEarliest,
    /// A reader that retention overtook moves on to the remaining records.
    OvertakenReaderMovesOn,
    /// A reader that retention overtook waits forever.
    OvertakenReaderWaits,
    /// A reader that retention overtook reports a general failure.
    OvertakenReaderFailsVaguely,
    /// A position past the end waits for the log to grow that far.
    PastEndWaits,
    /// A reader just past the end waits. One further on does not.
    EndCheckedLoosely,
    /// Only the lower part of an offset is compared with the end.
    OffsetsComparedByLowPart,
    /// A position past the end reads the last record.
    PastEndReadsTheLast,
    /// A position past the end is reported as a general failure.
    PastEndToldAsFailure,
    /// A log that was deleted and created again keeps its id, and an old position waits in it.
    OldOffsetWaitsInNewLog,
    /// A log that was deleted and created again keeps its id, and reports an old position as
    /// removed by retention.
    OldOffsetTruncatedInNewLog,
    /// A waiting reader does not notice that its log is gone.
    ReaderMissesRecreation,
    /// A waiting reader whose log is gone returns no records and no error.
    OldReaderEndsQuietly,
    /// A call of `next` moves the reader before it returns.
    CancelledNextLoses,
    /// The next call returns a cancelled call's records, and does not move the reader.
    CancelledNextRepeats,
    /// A record of exactly the maximum size is refused.
    LimitIsExclusive,
    /// The size of records is not limited.
    NoRecordLimit,
    /// The key does not count towards the limit.
    KeyNotMeasured,
    /// Headers do not count towards the limit.
    HeadersNotMeasured,
    /// A refusal does not report the limit.
    RefusalNamesNoLimit,
    /// Sizes are checked record by record, while the records are written.
    PrefixAppendedBeforeRefusal,
    /// Refused records are sent with the next append.
    RefusedBatchStaysBuffered,
    /// A damaged entry is skipped.
    MalformedSkipped,
    /// A damaged entry is an error that blocks every reader.
    MalformedBlocks,
    /// A damaged entry is taken for a record.
    MalformedNotMarked,
    /// A damaged entry damages the record before it.
    MalformedGarblesNeighbour,
    /// A damaged entry has no reason.
    MalformedWithoutReason,
    /// A damaged entry comes back empty.
    MalformedBytesLost,
    /// The tail has one record too few.
    TailIsOneShort,
    /// The tail has one record too many.
    TailIsOneLong,
    /// The tail is the whole log.
    TailIsAll,
    /// The tail begins at a record that retention removed.
    TailIgnoresRetention,
    /// The log does not tell its tail.
    TailIsUnknown,
    /// After retention, the tail is the end.
    TailEmptyAfterRetention,
    /// A log fails to report its durability.
    LogDurabilityFails,
    /// A log reports another durability the second time.
    LogDurabilityWavers,
    /// A log that is not durable gives no reason.
    LogVolatileWithoutReason,

    // The store.
    /// A consumer that never committed has a position.
    FreshStoreHasAPosition,
    /// The offset does not move with a commit.
    PositionNotCommitted,
    /// Only the first commit is counted.
    RevisionNotCounted,
    /// The store counts revisions on its own.
    RevisionCountedByTheStore,
    /// Only the count of a revision is kept.
    EpochOfRevisionNotKept,
    /// The owner is not kept.
    OwnerNotKept,
    /// The first owner is kept forever.
    OwnerKeptForever,
    /// The note is not kept.
    NoteNotKept,
    /// An advance with an empty note keeps the old one.
    NoteStays,
    /// The note has a column of the length of a note without tries.
    NoteOfFixedLength,
    /// A commit without a journal drops the stored one.
    JournalDropped,
    /// A stored journal is never replaced.
    JournalWrittenOnce,
    /// A fenced commit replaces the journal.
    JournalNotFenced,
    /// A journal of more than 4 KiB is lost.
    JournalsOver4KibLost,
    /// The store does not list its consumers.
    ConsumersUnknown,
    /// The consumer that comes last is not listed.
    LastConsumerNotListed,
    /// A consumer is listed once for each of its commits.
    ConsumersListedPerCommit,
    /// Consumers are not listed in the order of their names.
    ConsumersListedBackwards,
    /// A handle lists the consumers that its first list had.
    ConsumersListedOnce,
    /// A consumer is listed from its first transaction on.
    ConsumersListedFromBegin,
    /// A rollback lists its consumer.
    RolledBackConsumersListed,
    /// A fenced first commit lists its consumer.
    FencedConsumersListed,
    /// A list waits until no transaction is open.
    ConsumersWaitForTransactions,
    /// State is kept in the handle, and other handles do not see it.
    StateKeptInTheHandle,
    /// Deletes are not committed.
    DeletesNotCommitted,
    /// The upper part of an offset is not kept.
    HighPartOfOffsetNotKept,
    /// A position never goes back.
    PositionNeverGoesBack,
    /// Windows are not kept.
    WindowsNotPersisted,
    /// Only the newest sequences of a window are kept.
    WindowTooSmall,
    /// A window's sequences are kept, but not its last offset and time.
    WindowLosesItsLastOffset,
    /// A window whose sequences are above half of the range comes back smaller.
    WindowReadAsSigned,
    /// A commit of one window removes the others.
    WindowsReplacedAsAWhole,
    /// A stored window is never written again.
    WindowsWrittenOnce,
    /// A producer has one window for all its epochs.
    WindowsByProducerOnly,
    /// Forgotten windows stay.
    ForgottenWindowsStay,
    /// Forgetting one window removes all.
    ForgettingTakesAllWindows,
    /// The state is committed first, and the offset after it.
    OffsetCommittedApart,
    /// No commit is fenced.
    NoRevisionCheck,
    /// A commit is fenced only if its revision is too low.
    LaterRevisionAccepted,
    /// A first commit is never fenced.
    FirstCommitNotChecked,
    /// The revision is checked in one step, and written in another.
    RevisionCheckedOutside,
    /// A fenced commit reports the stored revision in place of the expected one.
    FencedTellsWrongRevision,
    /// A fenced commit is reported as a permanent failure.
    FencedToldAsFailure,
    /// A fenced commit moves the offset.
    FencedCommitMovesOffset,
    /// A fenced commit leaves its windows.
    FencedCommitLeavesWindows,
    /// A fenced commit leaves its state.
    FencedCommitLeavesState,
    /// A handle is unusable after a fenced commit.
    HandleDeadAfterFenced,
    /// A handle reads each key once and never again.
    GetServedFromAStaleCache,
    /// A commit is acknowledged before it is flushed.
    CommitAcknowledgedBeforeDurable,
    /// State is kept in memory only.
    StateNotDurable,
    /// Windows are kept in memory only.
    WindowsNotDurable,
    /// A store fails to report its durability.
    StoreDurabilityFails,
    /// A store reports another durability the second time.
    StoreDurabilityWavers,
    /// A store that is not durable gives no reason.
    StoreVolatileWithoutReason,
    /// Dropping a transaction applies what it staged.
    DroppedTransactionApplied,
    /// Dropping a transaction leaves its lock behind.
    DroppedTransactionKeepsLock,
    /// Beginning a transaction counts as a commit.
    BeginCountsARevision,
    /// A rollback applies what was staged.
    RollbackApplied,
    /// A cancelled commit is visible, and the next one undoes it.
    CancelledCommitTakenBackLater,
    /// A cancelled commit still arrives, and is then not checked.
    CancelledCommitComesLateUnchecked,
    /// A commit is applied together with the next one.
    CommitAppliedAfterReply,
    /// A commit that succeeded, but whose reply was lost, is reported as certainly failed.
    LostCommitReplyToldAsFailure,
    /// A commit whose reply was lost is retried without the fence.
    CommitRetriedAfterLostReply,
    /// A transaction does not see its own puts.
    GetDoesNotSeePut,
    /// A transaction does not see its own deletes.
    GetDoesNotSeeDelete,
    /// A transaction sees only its own writes.
    GetSeesOnlyOwnWrites,
    /// A second put of a key in one transaction is ignored.
    SecondPutIgnored,
    /// A put of a key that the transaction deleted is ignored.
    PutAfterDeleteIgnored,
    /// A delete of a key that the transaction put is ignored.
    DeleteOfOwnPutIgnored,
    /// The size of values is not limited.
    NoValueLimit,
    /// A value of exactly the maximum size is refused.
    ValueLimitIsExclusive,
    /// A refused value is reported as a general failure, without the limit.
    ValueRefusalNamesNoLimit,
    /// The part of a refused value that fits is staged.
    RefusedValueStaged,
    /// A refused value drops everything staged before it.
    RefusedValueDropsTheStaged,
    /// Keys that are not text are confused with each other.
    KeysKeptAsText,
    /// Keys that differ only in case are confused with each other.
    KeysIgnoreCase,
    /// Keys end at their first zero byte.
    KeysEndAtZero,
    /// An empty value comes back as `None`.
    EmptyValueReadAsNone,
    /// Large values are cut.
    LargeValuesCut,
    /// Values that are not text come back changed.
    ValuesKeptAsText,
    /// All consumers share one state.
    StateSharedBetweenConsumers,
    /// All consumers share one position.
    PositionSharedBetweenConsumers,
    /// A key and its consumer's name are joined by a character that both may contain.
    KeysJoinedToNames,
    /// A key is appended to its consumer's name.
    KeysAppendedToNames,
    /// A commit removes the state of all other consumers.
    CommitWipesStateOfOthers,
    /// Only the positions of some hundred consumers are kept.
    OldConsumersForgotten,
    /// The commits of all consumers are counted together.
    RevisionsCountedForAll,
    /// A position keeps only the name of its log.
    IncarnationNotKept,
    /// After a failed read, the transaction reconnects and commits.
    FailedReadForgotten,
    /// A commit without an incarnation erases the known one.
    IncarnationWiped,
    /// The log is compared before the revision.
    WrongLogBeforeFenced,
    /// A commit may change to another log.
    OtherLogAccepted,
    /// A commit for another log is refused, but moves the offset.
    OtherLogMovesOffset,
    /// A commit for another log is refused, but leaves its state.
    OtherLogLeavesState,
    /// A refused commit reports the given log as the stored one.
    WrongLogNamesTheGiven,

    // More of the log.
    /// Headers beyond the number that a byte can count are lost.
    HeadersOver255Lost,
    /// A header's value is cut to the length that 16 bits can count.
    HeaderValuesCut,
    /// Headers do not count towards the bytes of a call.
    FetchIgnoresHeaders,
    /// A call fetches as many records as would fit if all had the size of the first.
    FetchSizedByTheFirst,
    /// A call fetches as many records as would fit if all had the size of those in the previous
    /// call.
    FetchSizedByTheCallBefore,
    /// The reader requests one more than `max`, and the sum overflows.
    MaxOverflows,
    /// A `max` beyond 32 bits is an error.
    LargeMaxRefused,
    /// The time of an append is kept in whole seconds.
    AppendTimeInSeconds,
    /// The time of an append is set when the record is read.
    AppendTimeOfTheRead,
    /// The time of an append is the time at which the handle was opened.
    AppendTimeOfTheHandle,
    /// Log names that differ only in case are one name.
    LogNamesIgnoreCase,
    /// Log names are cut.
    LogNamesCut,
    /// Log names that differ only in a separator are one name.
    LogSeparatorsFallTogether,
    /// A log is found by a prefix of its name.
    LogNamesMatchPrefixes,
    /// A reader checks for records before it starts to listen, and misses an append in between.
    WakeUpLostBeforeWaiting,
    /// The second of two wake-ups in quick succession is dropped.
    WakeUpsDebounced,
    /// The first offset is assigned again after retention removed everything.
    OffsetsStartOverWhenEmptied,
    /// The end of a log that retention emptied is reported as 0.
    EndForgottenWhenEmptied,
    /// Reading at the end of a log that retention emptied fails, because the end counts as removed.
    EmptiedLogRefusesItsEnd,
    /// A restart counts the remaining records to find the next offset.
    OffsetsRecountedAtRestart,
    /// A restart finds no record, and reports the end as 0.
    EndForgottenAtRestart,
    /// The readable end is the end, even if records were deleted.
    ReadableEndIgnoresDeletes,
    /// The readable end is the offset of the last record.
    ReadableEndIsTheLastRecord,
    /// An append whose reply was lost is sent again.
    AppendRetriedAfterLostReply,
    /// An append whose request was lost is reported as successful.
    LostAppendRequestToldAsSuccess,
    /// A part of a batch stays although the backend refused a record in its middle, and the failure
    /// is reported as certain.
    RefusedMiddleLeavesAPrefix,
    /// After the backend refused a record in the middle of a batch, the rest is written.
    RefusedMiddleSkipped,
    /// The refused record and the rest of its batch are sent with the next append.
    RefusedTailComesLater,
    /// An append fails because a concurrent one on the same handle is refused.
    NeighbourToldTheRefusal,
    /// A refused append also drops the other records that its handle is sending.
    RefusalDropsTheNeighbour,
    /// The handle of a deleted log appends to the log that was created later.
    OldHandleAppendsToNewLog,
    /// The handle of a deleted log creates it again.
    OldHandleCreatesTheLog,
    /// A removal takes the record at its offset too.
    RemovalTakesOneTooMany,
    /// A removal leaves the last of its records in place, and reports it as removed.
    RemovalLeavesTheLast,
    /// A removal reports the difference of offsets as the number of removed records.
    RemovalCountsOffsets,
    /// A removal below the earliest record fails.
    RemovalBelowTheEarliestRefused,
    /// A removal past the end removes everything and succeeds.
    RemovalPastTheEndAccepted,
    /// A removal past the end removes everything and then fails.
    RemovalPastTheEndEmptiesTheLog,
    /// A removal past the end is reported as a general failure.
    RemovalPastTheEndToldAsFailure,
    /// A removal rewrites the log without what was appended meanwhile.
    RemovalDropsAppendsMeanwhile,
    /// A removal keeps as many records as there were to be kept when it began.
    RemovalKeepsACount,

    // More of the store.
    /// After 256 commits, a consumer appears to have made none.
    CommitsCountedInAByte,
    /// A value that was not written within 256 commits is lost.
    ValuesLostAfter256Commits,
    /// After 65,536 commits, a consumer appears to have made none.
    CommitsCountedIn16Bits,
    /// A value that was not written within 65,536 commits is lost.
    ValuesLostAfter65536Commits,
    /// Consumer names that differ only in case are one name.
    ConsumerNamesIgnoreCase,
    /// Consumer names are cut.
    ConsumerNamesCut,
    /// Consumer names that differ only in a separator are one name.
    ConsumerSeparatorsFallTogether,
    /// Producer names that differ only in case are one name.
    ProducerNamesIgnoreCase,
    /// Producer names are cut.
    ProducerNamesCut,
    /// Producer names that differ only in a separator are one name.
    ProducerSeparatorsFallTogether,
    /// All consumers share their windows.
    WindowsSharedBetweenConsumers,
    /// When one consumer forgets a producer, all consumers do.
    ForgottenForAllConsumers,
    /// A commit without an incarnation is refused where one is known.
    UnknownIncarnationRefused,
    /// A commit with an incarnation is refused where none is known.
    KnownIncarnationRefused,
    /// A commit without an incarnation is accepted for any log.
    UnknownIncarnationMatchesAnyName,
    /// A commit that stages nothing is flushed with the next one.
    EmptyCommitNotDurable,
    /// A commit that stages nothing is kept in the handle.
    EmptyCommitKeptInTheHandle,
    /// Native writes are not committed.
    NativeNotCommitted,
    /// Native writes are sent twice.
    NativeAppliedTwice,
    /// Native writes take effect immediately.
    NativeAppliedAtOnce,
    /// Native writes of a fenced commit take effect.
    NativeNotFenced,
    /// Dropping a transaction applies its native writes.
    NativeAppliedByDrop,
    /// A commit whose request was lost is reported as successful.
    LostCommitRequestToldAsSuccess,
    /// An empty key is refused.
    EmptyKeyRefused,
    /// A key whose length does not fit into a byte is refused.
    KeysOver255Refused,
    /// Long keys are cut.
    LongKeysCut,
    /// A value of 64 KiB is refused, because 16 bits hold one byte less.
    ValuesOf64KibRefused,
    /// The size of keys is not limited.
    NoKeyLimit,
    /// A key of exactly the maximum size is refused.
    KeyLimitIsExclusive,
    /// The part of a refused key that fits is staged.
    RefusedKeyStaged,
    /// The position is read field by field while commits continue.
    PositionReadInSteps,
    /// Windows are read after the position.
    WindowsReadApart,
    /// The journal is read after the position.
    JournalReadApart,
    /// Windows are written after the position.
    WindowsWrittenApart,
    /// The position is read from a stale copy.
    PositionServedStale,
    /// A pulse holds the first commit, and the beats since.
    PulseOnlyOfBeats,
    /// A handle keeps the pulse that it saw first.
    PulseKeptInTheHandle,
    /// Beats are accepted but not kept.
    BeatsNotKept,
    /// Beats are kept in the handle, and other handles do not see them.
    BeatsKeptInTheHandle,
    /// A beat by any owner counts.
    BeatOfAnotherCounts,
    /// A beat without a position creates one.
    BeatCreatesAPosition,
    /// A beat counts as a commit.
    BeatRaisesTheRevision,
    /// A beat ends the open transaction.
    BeatEndsTransactions,
    /// A release does nothing.
    ReleaseIgnored,
    /// A release by any owner clears the owner.
    ReleaseOfAnotherCounts,
    /// A release counts as a commit.
    ReleaseRaisesTheRevision,
    /// A watch only notices its own handle's commits.
    WatchHearsOnlyItsHandle,
    /// A watch compares with the pulse at its own start.
    WatchForgetsWhatItSaw,
    /// `position` waits for open transactions.
    PositionWaitsForTransactions,
    /// A commit fails if the position was read after its transaction began.
    PositionHoldsUpCommits,
    /// A snapshot reads its values one at a time.
    SnapshotReadInSteps,
    /// A snapshot is read from a stale copy.
    SnapshotServedStale,
    /// Commits write values first and the position later, and snapshots see the state in between.
    SnapshotSeesHalfACommit,
    /// A snapshot returns values in the order of the sorted keys.
    SnapshotSorted,
    /// A snapshot leaves out keys without a value.
    SnapshotLeavesOutMissing,
    /// A snapshot returns values of other consumers.
    SnapshotMixesConsumers,
    /// A snapshot waits for open transactions.
    SnapshotWaitsForTransactions,
    /// A snapshot shows writes staged by open transactions.
    SnapshotSeesWhatIsStaged,
    /// A commit fails if a snapshot was taken after its transaction began.
    SnapshotHoldsUpCommits,
    /// Letters are not committed.
    LettersNotCommitted,
    /// Removals of letters are not committed.
    LetterRemovalsNotCommitted,
    /// Changes of letters take effect immediately.
    LettersAppliedAtOnce,
    /// The letters of a fenced commit are kept.
    LettersNotFenced,
    /// A transaction does not see its own changes of letters.
    LettersReadWithoutTheStaged,
    /// A page of letters begins with the last one of the page before.
    ListRepeatsTheLast,
    /// The first due letter is the one with the lowest offset.
    FirstDueIsTheLowestOffset,
    /// Removing letters from an offset on leaves the letter at the offset.
    RemoveFromIsExclusive,
    /// The headers of a letter come back sorted.
    LetterHeadersSorted,
    /// The times of a letter are cut to seconds.
    LetterTimesInSeconds,
    /// A malformed letter comes back as well-formed.
    LetterMarkLost,
    /// Letters lose their edits.
    LetterEditLost,
    /// The original of an edited letter loses its headers.
    LetterOriginalHeadersLost,
    /// Offsets of letters sort as signed numbers.
    LettersSortedAsSigned,
    /// A letter may not be larger than a record, reasons included.
    LetterLimitIsTheRecordLimit,
    /// Reasons are cut.
    LetterReasonsCut,
    /// A restart loses the letters.
    LettersLostAtRestart,
    /// A restart brings removed letters back.
    RemovedLettersComeBackAtRestart,
    /// A letter with the empty key counts as one without a key.
    EmptyLetterKeyIsNone,
    /// The keys of malformed letters count.
    MalformedLettersHaveKeys,
    /// A list of letters ends at a malformed one.
    MalformedLetterEndsTheList,
    /// A list of letters ends at one that cannot be read.
    DamagedLetterEndsTheList,
    /// A list of letters fails at one that cannot be read.
    DamagedLetterFailsTheList,
    /// A list of letters leaves out those that cannot be read.
    DamagedLetterNotListed,
    /// A letter that cannot be read is no head of its key.
    DamagedLetterIsNoHead,
    /// A letter that cannot be read is due as it was.
    DamagedLetterIsDue,
    /// A letter that cannot be read does not count.
    DamagedLetterNotCounted,
    /// Keys of letters differ only in more than case.
    LetterKeysIgnoreCase,
    /// All consumers see all letters.
    LettersSharedBetweenConsumers,
    /// Removing letters from an offset on removes those of all consumers.
    RemoveFromReachesOtherConsumers,

    // The outboxes.
    /// A commit sends nothing.
    SentNotCommitted,
    /// Of the records of a transaction, a commit sends only the last.
    OnlyTheLastIsSent,
    /// A commit sends each record twice.
    SentTwice,
    /// A commit sends the records of the one before it on the same handle.
    SentWithTheNextCommit,
    /// A commit is acknowledged before its records are sent.
    SentAfterTheReply,
    /// A record is sent when it is staged.
    SentAtOnce,
    /// A fenced commit sends its records.
    SentAlthoughFenced,
    /// A commit for another log sends its records.
    SentAlthoughWrongLog,
    /// A rollback sends the records.
    SentAlthoughRolledBack,
    /// A dropped transaction sends its records.
    SentAlthoughDropped,
    /// What was not committed stays in the handle, and its next commit sends it.
    UncommittedStaysBuffered,
    /// A restart loses the sent records, and not the position.
    SentNotDurable,
    /// The records are sent in one step, and the position moves in another.
    SentApartFromTheCommit,
    /// After a lost reply, the records of the commit are sent again.
    SentAgainAfterLostReply,
    /// After a lost reply, the numbers of the commit are used again.
    LostReplyTakesNumbersBack,
    /// The records go to the backend ahead of the commit that they belong to.
    SentInAnEarlierRequest,
    /// The records of a commit are sent in reverse order.
    SentInReverse,
    /// The records of a commit are sorted by their keys.
    SentGroupedByKey,
    /// All records of a commit go to the outbox of the last one.
    SentToTheLastLog,
    /// The records of a commit are held back, and follow those of the next one.
    LaterCommitOvertakesSent,
    /// Records are sent without their headers.
    SentHeadersLost,
    /// Records are sent without their keys.
    SentKeysLost,
    /// The size of sent records is not limited.
    NoSentLimit,
    /// Only the payload of a sent record counts towards the limit.
    SentSizedByThePayload,
    /// A sent record of exactly the maximum size is refused.
    SentLimitIsExclusive,
    /// A refused record is sent, without what was wrong with it.
    RefusedSendStaged,
    /// A refused record drops those staged before it.
    RefusedSendDropsTheStaged,
    /// A transaction that refused a record does not commit.
    RefusedSendEndsTheTransaction,
    /// Sent records have no origin.
    SentWithoutOrigin,
    /// Each consumer has its own numbers in an outbox.
    NumberedByTheConsumer,
    /// Numbers start over at each handle.
    NumberedByTheHandle,
    /// Numbers start over at each commit.
    NumberedByTheCommit,
    /// All records of a commit have the same number.
    OneNumberPerCommit,
    /// Each consumer is a producer of its own.
    ProducerPerConsumer,
    /// All outboxes have the same producer, and numbers of their own.
    ProducerSharedByOutboxes,
    /// Each commit begins an epoch.
    FreshEpochPerCommit,
    /// The epoch of an outbox is not the stable one.
    OutboxEpochNotStable,
    /// A number counts the records that the outbox has.
    NumberedByTheRetained,
    /// A number follows that of the last record, if there is one.
    NumberedAfterTheLastRecord,
    /// Numbers start over when retention has removed all records.
    NumbersStartOverWhenEmptied,
    /// When retention has removed all records, an outbox becomes another producer.
    ProducerRedrawnWhenEmptied,
    /// Numbers start over at a restart.
    NumbersStartOverAtRestart,
    /// A restart counts the records to continue the numbers.
    NumbersRecountedAtRestart,
    /// At a restart, an outbox becomes another producer.
    ProducerRedrawnAtRestart,
    /// A restart begins an epoch.
    FreshEpochAtRestart,
    /// A record gets the next number when it is staged, and others may get the same.
    NumberedAtSend,
    /// A record takes a number when it is staged, and others may commit first.
    NumberedFromASequence,
    /// A record with an origin is sent with it.
    OriginOfTheRecordKept,
    /// A record with an origin is sent with another.
    OriginOfTheRecordReplaced,
    /// A name that no log can have is reported as a general failure.
    BadLogNameIsAFailure,
    /// Each reader gives the records other origins.
    OriginDrawnByTheReader,
    /// A commit does not wake the readers of the outbox.
    SentWakesNoReader,
    /// Each consumer has its own outboxes.
    OutboxPerConsumer,
    /// Only the first consumer that sends to an outbox does.
    OutboxOfItsFirstConsumer,
    /// Sending to an outbox that does not exist fails.
    UnknownOutboxRefused,
}
sound {
    /// Each call of `next` returns one record.
    FetchesOneByOne,
    /// Append times come from another machine, whose clock is slightly ahead.
    ClockOfTheServer,
    /// Names are stored as digests.
    NamesKeptAsDigests,
    /// The tail begins between two records.
    TailBetweenRecords,
    /// Readers poll, and appends do not wake them.
    PollsForRecords,
    /// Offsets jump ahead after retention and restarts.
    OffsetsLeapAfterRetention,
    /// If no record is left, the readable end is the earliest offset.
    EmptiedReadableEndIsTheEarliest,
    /// After a lost reply, the handle looks up what happened to its request, and reports it.
    LostRepliesLookedUp,
    /// A batch that the backend refused in the middle is in doubt, and a part of it stays.
    RefusedMiddleInDoubt,
    /// Appends of one handle wait for each other.
    AppendsTakeTurns,
    /// An append to a deleted log succeeds, and its records are deleted with the log.
    OldHandleAppendsVanish,
    /// Every 100 commits, a commit takes longer and rewrites everything.
    CompactsEvery100Commits,
    /// A commit applies native writes before state.
    NativeAppliedFirst,
    /// Keys are stored as digests.
    KeysKeptAsDigests,
    /// A position lists its windows in another order each time.
    WindowsInAnyOrder,
    /// A position is copied at one moment and returned later.
    PositionReadFromACopy,
    /// A pulse shows the state of a moment ago.
    PulseLags,
    /// Each commit resets the count of beats.
    BeatsStartOverAtCommits,
    /// A watch sometimes returns although nothing changed.
    WatchReturnsEarly,
    /// A snapshot is copied at one moment and returned later.
    SnapshotFromACopy,
    /// Keys of letters are compared by their digests.
    LetterKeysKeptAsDigests,
    /// The numbers of an outbox have gaps.
    SentNumbersHaveGaps,
    /// All outboxes take their numbers from one counter, as different producers.
    OutboxesShareACounter,
}
}
