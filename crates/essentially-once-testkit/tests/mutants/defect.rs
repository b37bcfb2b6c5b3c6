//! The ways in which the model can be wrong: exactly one at a time, each a mistake that a real backend can make. And ways in
//! which it can differ that are sound.

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

    // The log, once more.
    /// More headers than a byte counts are lost.
    HeadersOver255Lost,
    /// A header's value is cut where 16 bits end.
    HeaderValuesCut,
    /// Headers do not count towards the bytes of a call.
    FetchIgnoresHeaders,
    /// A call takes as many records as would fit if all were as large as the first.
    FetchSizedByTheFirst,
    /// A call takes as many records as would fit if all were as large as those of the call before.
    FetchSizedByTheCallBefore,
    /// One more than `max` is asked for, and the sum overflows.
    MaxOverflows,
    /// A `max` that is not a 32-bit number is an error.
    LargeMaxRefused,
    /// The time of an append is kept in whole seconds.
    AppendTimeInSeconds,
    /// The time of an append is made up when the record is read.
    AppendTimeOfTheRead,
    /// The time of an append is that at which the handle was opened.
    AppendTimeOfTheHandle,
    /// Names of logs that differ in case only are one name.
    LogNamesIgnoreCase,
    /// Names of logs are cut.
    LogNamesCut,
    /// Names of logs that differ in a separator only are one name.
    LogSeparatorsFallTogether,
    /// A log is found by the beginning of its name.
    LogNamesMatchPrefixes,
    /// A reader begins to listen after it has looked, and sleeps through what came between.
    WakeUpLostBeforeWaiting,
    /// Of two wake-ups in short succession the second is left out.
    WakeUpsDebounced,
    /// The first offset is given out again when retention has removed everything.
    OffsetsStartOverWhenEmptied,
    /// The end of a log that retention emptied is told as 0.
    EndForgottenWhenEmptied,
    /// The end of a log that retention emptied cannot be read at: it counts as removed.
    EmptiedLogRefusesItsEnd,
    /// A restart counts the records that are left, to know the next offset.
    OffsetsRecountedAtRestart,
    /// A restart finds no record, and tells the end as 0.
    EndForgottenAtRestart,
    /// The readable end is the end, whatever was deleted.
    ReadableEndIgnoresDeletes,
    /// The readable end is the offset of the last record.
    ReadableEndIsTheLastRecord,
    /// An append whose reply was lost is sent again.
    AppendRetriedAfterLostReply,
    /// An append whose request was lost is called a success.
    LostAppendRequestToldAsSuccess,
    /// Of a batch that the backend refused in the middle a part stays, and the failure is called certain.
    RefusedMiddleLeavesAPrefix,
    /// Of a batch that the backend refused in the middle the rest is written.
    RefusedMiddleSkipped,
    /// What the backend refused, and the rest of its batch, goes out with the next append.
    RefusedTailComesLater,
    /// An append fails if another one of the same handle is refused meanwhile.
    NeighbourToldTheRefusal,
    /// An append that is refused takes along what its handle has under way.
    RefusalDropsTheNeighbour,
    /// The handle of a deleted log appends to the one that was created later.
    OldHandleAppendsToNewLog,
    /// The handle of a deleted log creates it again.
    OldHandleCreatesTheLog,

    // The store, once more.
    /// After 256 commits a consumer has made none.
    CommitsCountedInAByte,
    /// A value that was not written within 256 commits is gone.
    ValuesLostAfter256Commits,
    /// After 65,536 commits a consumer has made none.
    CommitsCountedIn16Bits,
    /// A value that was not written within 65,536 commits is gone.
    ValuesLostAfter65536Commits,
    /// Names of consumers that differ in case only are one name.
    ConsumerNamesIgnoreCase,
    /// Names of consumers are cut.
    ConsumerNamesCut,
    /// Names of consumers that differ in a separator only are one name.
    ConsumerSeparatorsFallTogether,
    /// Names of producers that differ in case only are one name.
    ProducerNamesIgnoreCase,
    /// Names of producers are cut.
    ProducerNamesCut,
    /// Names of producers that differ in a separator only are one name.
    ProducerSeparatorsFallTogether,
    /// All consumers have the same windows.
    WindowsSharedBetweenConsumers,
    /// What one consumer forgets, all forget.
    ForgottenForAllConsumers,
    /// A commit without an incarnation is refused where one is known.
    UnknownIncarnationRefused,
    /// A commit with an incarnation is refused where none is known.
    KnownIncarnationRefused,
    /// A commit without an incarnation is for any log.
    UnknownIncarnationMatchesAnyName,
    /// A commit that stages nothing is flushed with the next one.
    EmptyCommitNotDurable,
    /// A commit that stages nothing is kept in the handle.
    EmptyCommitKeptInTheHandle,
    /// Native writes are not committed.
    NativeNotCommitted,
    /// Native writes are sent twice.
    NativeAppliedTwice,
    /// Native writes take effect at once.
    NativeAppliedAtOnce,
    /// Native writes of a fenced commit take effect.
    NativeNotFenced,
    /// Dropping a transaction applies its native writes.
    NativeAppliedByDrop,
    /// A commit whose request was lost is called a success.
    LostCommitRequestToldAsSuccess,
    /// An empty key is refused.
    EmptyKeyRefused,
    /// A key whose length is no byte is refused.
    KeysOver255Refused,
    /// Long keys are cut.
    LongKeysCut,
    /// A value of 64 KiB is refused: 16 bits hold one byte less.
    ValuesOf64KibRefused,
    /// There is no limit for keys.
    NoKeyLimit,
    /// A key of exactly the limit is refused.
    KeyLimitIsExclusive,
    /// A refused key is staged as far as it fits.
    RefusedKeyStaged,
    /// The position is read field by field while commits go on.
    PositionReadInSteps,
    /// Windows are read after the position.
    WindowsReadApart,
    /// Windows are written after the position.
    WindowsWrittenApart,
    /// The position is read from a copy that is behind.
    PositionServedStale,
    /// A pulse is that of the first commit, with the beats since.
    PulseOnlyOfBeats,
    /// A handle keeps the pulse that it saw first.
    PulseKeptInTheHandle,
    /// Beats are taken and not kept.
    BeatsNotKept,
    /// Beats are kept in the handle, for no other to see.
    BeatsKeptInTheHandle,
    /// Whoever beats counts.
    BeatOfAnotherCounts,
    /// A beat makes a position where there is none.
    BeatCreatesAPosition,
    /// A beat counts as a commit.
    BeatRaisesTheRevision,
    /// A beat ends the transaction that is open.
    BeatEndsTransactions,
    /// A release does nothing.
    ReleaseIgnored,
    /// Whoever releases clears the owner.
    ReleaseOfAnotherCounts,
    /// A release counts as a commit.
    ReleaseRaisesTheRevision,
    /// A watch hears only of its own handle's commits.
    WatchHearsOnlyItsHandle,
    /// A watch compares with what there is when it begins.
    WatchForgetsWhatItSaw,
    /// A snapshot reads one value after the other.
    SnapshotReadInSteps,
    /// A snapshot is of a copy that is behind.
    SnapshotServedStale,
    /// Commits write values first and the position later, and snapshots see that.
    SnapshotSeesHalfACommit,
    /// A snapshot returns values in the order of the sorted keys.
    SnapshotSorted,
    /// A snapshot leaves out keys without a value.
    SnapshotLeavesOutMissing,
    /// A snapshot finds values of other consumers.
    SnapshotMixesConsumers,
    /// A snapshot waits for open transactions.
    SnapshotWaitsForTransactions,
    /// A snapshot shows what open transactions staged.
    SnapshotSeesWhatIsStaged,
    /// A commit fails if a snapshot was taken since its transaction began.
    SnapshotHoldsUpCommits,
}
sound {
    /// Each call of `next` returns one record.
    FetchesOneByOne,
    /// Append times are those of another machine, which is a little ahead.
    ClockOfTheServer,
    /// What names are kept under tells nothing of them.
    NamesKeptAsDigests,
    /// Readers look every now and then, and nobody wakes them.
    PollsForRecords,
    /// After retention and restarts offsets go on further up.
    OffsetsLeapAfterRetention,
    /// Where no record is left the readable end is the earliest offset.
    EmptiedReadableEndIsTheEarliest,
    /// After a lost reply the handle looks what became of its request, and says so.
    LostRepliesLookedUp,
    /// A batch that the backend refused in the middle is in doubt, and a part of it stays.
    RefusedMiddleInDoubt,
    /// One append of a handle waits for the other.
    AppendsTakeTurns,
    /// An append to a deleted log succeeds, and is deleted with it.
    OldHandleAppendsVanish,
    /// Every so often a commit takes longer, and rewrites all that is kept.
    CompactsEvery100Commits,
    /// A commit applies native writes before state.
    NativeAppliedFirst,
    /// What keys are kept under tells nothing of them.
    KeysKeptAsDigests,
    /// A position has its windows in another order each time.
    WindowsInAnyOrder,
    /// A position is copied in one moment and handed out later.
    PositionReadFromACopy,
    /// A pulse is that of a moment ago.
    PulseLags,
    /// Beats are counted anew after each commit.
    BeatsStartOverAtCommits,
    /// A watch returns now and then although nothing changed.
    WatchReturnsEarly,
    /// A snapshot is copied in one moment and handed out later.
    SnapshotFromACopy,
}
}
