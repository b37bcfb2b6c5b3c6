//! The ways in which the model can be wrong: exactly one at a time, each a mistake that a real backend can make.

macro_rules! defects {
    ($($(#[$doc:meta])+ $defect:ident,)+) => {
        /// What is wrong with a model.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub(crate) enum Defect {
            /// Nothing: the model that must pass every case.
            None,
            $($(#[$doc])+ $defect,)+
        }

        impl Defect {
            /// All but [`Defect::None`].
            pub(crate) const ALL: &[Self] = &[$(Self::$defect),+];
        }
    };
}

defects! {
    // The log, from append to read.
    /// An append is acknowledged when it is in memory, and written later.
    AppendAcknowledgedBeforeDurable,
    /// Recovery applies the last entry of the journal a second time.
    RestartReplaysTheTail,
    /// An append whose reply was lost is called a certain failure.
    LostAppendReplyToldAsFailure,
    /// A connection lost within a batch goes on behind the record that was lost with it.
    ReconnectTearsBatch,
    /// The records of a batch are written last first.
    BatchWrittenBackwards,
    /// A batch waits in the handle and is written after the next one.
    LaterBatchOvertakes,
    /// An offset is given out before its record is visible, and readers go past it.
    HoleFillsInLater,
    /// A reader that was there first sees the first two records the other way round.
    FirstReaderSwapsTwo,
    /// Two records in a row are told to have one offset.
    OffsetsEqualInPairs,
    /// Opened at a record's offset, a reader begins behind the record.
    ReaderStartsOneLate,
    /// Opened at a record's offset, a reader begins with the record before.
    ReaderStartsOneEarly,
    /// Opened between two records, a reader begins with the earlier one.
    ReaderStartsBeforeABetween,
    /// All readers of a handle have one place in the log.
    ReadersShareACursor,
    /// An empty key comes back as no key.
    EmptyKeyReadAsNone,
    /// Headers come back in another order.
    HeadersSorted,
    /// Of headers that look alike, one comes back.
    RepeatedHeadersLost,
    /// Header names come back with their special characters lost.
    HeaderNamesReadAsAscii,
    /// A payload that is no text comes back changed.
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
    /// An append of a batch tells the offset of its first record.
    AppendTellsTheFirst,
    /// An append of nothing tells an offset.
    EmptyAppendTellsTheEnd,
    /// An append of nothing adds a blank record.
    EmptyAppendAddsARecord,
    /// A reader's first call returns no record.
    NextReturnsNothing,
    /// A call returns one record more than it was asked for.
    NextIgnoresMax,
    /// Each call begins with the last record of the call before.
    NextRepeatsTheBoundary,
    /// The bytes of a call are not bounded.
    NextIgnoresBytes,
    /// What is too much for a call is cut off, and the next call begins behind it.
    NextSkipsWhatItCutsOff,
    /// All logs of a backend are one.
    LogsShareRecords,
    /// A record that someone else wrote is skipped.
    ForeignSkipped,
    /// A record that someone else wrote comes back empty.
    ForeignPayloadLost,
    /// A record that someone else wrote is taken for a damaged one.
    ForeignCalledMalformed,
    /// A record that someone else wrote is given an origin.
    ForeignGetsOrigin,
    /// A waiting reader hears nothing of an append.
    WaitingReaderIsNotWoken,
    /// A reader that had to wait begins again at the first record.
    WokenReaderStartsOver,
    /// The bounds of an empty log show a record.
    EmptyLogHasAnEnd,
    /// The earliest offset is told as one behind the first record.
    EarliestIsBehindTheFirst,
    /// The end is told as the offset of the last record.
    EndIsTheLastRecord,
    /// The bounds still tell what retention removed.
    BoundsIgnoreRetention,
    /// Retention removes one record more than it should.
    RetentionRemovesTooMuch,
    /// Retention rewrites what is left without its append times.
    RetentionLosesAppendTimes,
    /// Reading what was removed begins at what is left.
    TruncationSilent,
    /// Reading what was removed waits for a new record.
    TruncationWaits,
    /// Reading what was removed is a failure without a reason.
    TruncatedToldAsFailure,
    /// Reading what was removed does not tell what is left.
    TruncatedTellsNoEarliest,
    /// A reader that retention overtook goes on at what is left.
    OvertakenReaderMovesOn,
    /// A reader that retention overtook waits for ever.
    OvertakenReaderWaits,
    /// A reader that retention overtook fails without a reason.
    OvertakenReaderFailsVaguely,
    /// A position past the end waits for the log to grow that far.
    PastEndWaits,
    /// A position right past the end waits, one further on does not.
    EndCheckedLoosely,
    /// Only the lower part of an offset is compared with the end.
    OffsetsComparedByLowPart,
    /// A position past the end reads the last record.
    PastEndReadsTheLast,
    /// A position past the end is a failure without a reason.
    PastEndToldAsFailure,
    /// A log that was created anew has its old id, and an old position waits in it.
    OldOffsetWaitsInNewLog,
    /// A log that was created anew has its old id, and calls an old position removed by retention.
    OldOffsetTruncatedInNewLog,
    /// A waiting reader does not notice that its log is gone.
    ReaderMissesRecreation,
    /// A waiting reader whose log is gone returns no records, and no error.
    OldReaderEndsQuietly,
    /// A call of next moves the reader before it has returned.
    CancelledNextLoses,
    /// A cancelled call's records are returned by the next call, which does not move the reader.
    CancelledNextRepeats,
    /// A record of exactly the limit is refused.
    LimitIsExclusive,
    /// There is no limit.
    NoRecordLimit,
    /// The key does not count towards the limit.
    KeyNotMeasured,
    /// Headers do not count towards the limit.
    HeadersNotMeasured,
    /// A refusal does not say what the limit is.
    RefusalNamesNoLimit,
    /// Sizes are checked record by record, while the records are written.
    PrefixAppendedBeforeRefusal,
    /// What was refused goes out with the next append.
    RefusedBatchStaysBuffered,
    /// A damaged entry is skipped.
    MalformedSkipped,
    /// A damaged entry is an error that no reader gets past.
    MalformedBlocks,
    /// A damaged entry is taken for a record.
    MalformedNotMarked,
    /// A damaged entry damages the record before it.
    MalformedGarblesNeighbour,
    /// A damaged entry gives no reason.
    MalformedWithoutReason,
    /// A damaged entry comes back empty.
    MalformedBytesLost,
    /// A log cannot be asked for its durability.
    LogDurabilityFails,
    /// A log answers otherwise when it is asked for its durability again.
    LogDurabilityWavers,
    /// A log that is not durable does not say why.
    LogVolatileWithoutReason,

    // The store.
    /// A consumer that never committed has a position.
    FreshStoreHasAPosition,
    /// The offset does not move with a commit.
    PositionNotCommitted,
    /// Only the first commit is counted.
    RevisionNotCounted,
    /// The store counts revisions by itself.
    RevisionCountedByTheStore,
    /// Of a revision only the count is kept.
    EpochOfRevisionNotKept,
    /// The owner is not kept.
    OwnerNotKept,
    /// The first owner stays.
    OwnerKeptForever,
    /// The passed record is not kept.
    PassedNotKept,
    /// An advance without a passed record leaves the old one.
    PassedStays,
    /// State is kept in the handle, for no other to see.
    StateKeptInTheHandle,
    /// Deletes are not committed.
    DeletesNotCommitted,
    /// The upper part of an offset is not kept.
    HighPartOfOffsetNotKept,
    /// A commit cannot go back.
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
    /// A window that is there is not written again.
    WindowsWrittenOnce,
    /// A producer has one window, whatever the epoch.
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
    /// The revision is checked, and then written in another step.
    RevisionCheckedOutside,
    /// A fenced commit is told with the stored revision in place of the expected one.
    FencedTellsWrongRevision,
    /// A fenced commit is told as a failure that will not pass.
    FencedToldAsFailure,
    /// A fenced commit moves the offset.
    FencedCommitMovesOffset,
    /// A fenced commit leaves its windows.
    FencedCommitLeavesWindows,
    /// A fenced commit leaves its state.
    FencedCommitLeavesState,
    /// After a fenced commit the handle is of no use.
    HandleDeadAfterFenced,
    /// A handle reads each key once and never again.
    GetServedFromAStaleCache,
    /// A commit is acknowledged before it is flushed.
    CommitAcknowledgedBeforeDurable,
    /// State is kept in memory only.
    StateNotDurable,
    /// Windows are kept in memory only.
    WindowsNotDurable,
    /// A store cannot be asked for its durability.
    StoreDurabilityFails,
    /// A store answers otherwise when it is asked for its durability again.
    StoreDurabilityWavers,
    /// A store that is not durable does not say why.
    StoreVolatileWithoutReason,
    /// Dropping a transaction applies what it staged.
    DroppedTransactionApplied,
    /// Dropping a transaction leaves its lock.
    DroppedTransactionKeepsLock,
    /// Beginning a transaction counts as a commit.
    BeginCountsARevision,
    /// A rollback applies what was staged.
    RollbackApplied,
    /// A cancelled commit is shown, and taken back with the next one.
    CancelledCommitTakenBackLater,
    /// A cancelled commit still arrives, and is not checked then.
    CancelledCommitComesLateUnchecked,
    /// A commit is applied together with the next one.
    CommitAppliedAfterReply,
    /// A commit that succeeded, but whose reply was lost, is called a certain failure.
    LostCommitReplyToldAsFailure,
    /// A commit whose reply was lost is tried again, past the fence.
    CommitRetriedAfterLostReply,
    /// A transaction does not see its puts.
    GetDoesNotSeePut,
    /// A transaction does not see its deletes.
    GetDoesNotSeeDelete,
    /// A transaction sees nothing but its own writes.
    GetSeesOnlyOwnWrites,
    /// A second put of a key in one transaction is ignored.
    SecondPutIgnored,
    /// A put of a key that the transaction deleted is ignored.
    PutAfterDeleteIgnored,
    /// A delete of a key that the transaction put is ignored.
    DeleteOfOwnPutIgnored,
    /// There is no limit for values.
    NoValueLimit,
    /// A value of exactly the limit is refused.
    ValueLimitIsExclusive,
    /// A refused value is told as a failure without its limit.
    ValueRefusalNamesNoLimit,
    /// A refused value is staged as far as it fits.
    RefusedValueStaged,
    /// A refused value drops what was staged before it.
    RefusedValueDropsTheStaged,
    /// Keys that are no text fall together.
    KeysKeptAsText,
    /// Keys that differ in case only fall together.
    KeysIgnoreCase,
    /// Keys end at their first zero byte.
    KeysEndAtZero,
    /// An empty value comes back as none.
    EmptyValueReadAsNone,
    /// Large values are cut.
    LargeValuesCut,
    /// Values that are no text come back changed.
    ValuesKeptAsText,
    /// All consumers have one state.
    StateSharedBetweenConsumers,
    /// All consumers have one position.
    PositionSharedBetweenConsumers,
    /// A key is joined to its consumer's name by a character that both may hold.
    KeysJoinedToNames,
    /// A key is appended to its consumer's name.
    KeysAppendedToNames,
    /// A commit removes the state of all other consumers.
    CommitWipesStateOfOthers,
    /// The positions of some hundred consumers are kept, and no more.
    OldConsumersForgotten,
    /// The commits of all consumers are counted together.
    RevisionsCountedForAll,
    /// A position remembers its log's name only.
    IncarnationNotKept,
    /// After a read that failed the transaction connects again, and commits.
    FailedReadForgotten,
    /// A commit without an incarnation wipes out the known one.
    IncarnationWiped,
    /// The log is compared before the revision.
    WrongLogBeforeFenced,
    /// A commit may change to another log.
    OtherLogAccepted,
    /// A commit for another log is refused, but moves the offset.
    OtherLogMovesOffset,
    /// A commit for another log is refused, but leaves its state.
    OtherLogLeavesState,
    /// A refused commit names the log it was given as the stored one.
    WrongLogNamesTheGiven,
}
