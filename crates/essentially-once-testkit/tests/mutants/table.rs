//! Which case must find which defect, and by which words its finding is known.

use crate::defect::Defect;

/// A backend that is wrong in one way, and a case that must say so.
pub(crate) struct Mutant {
    pub(crate) defect: Defect,
    pub(crate) case: &'static str,
    /// A part of the violation: a case that fails for another reason has not found this defect.
    pub(crate) finding: &'static str,
}

/// The finding of a case that ran into its time limit.
pub(crate) const STUCK: &str = "still waiting";

macro_rules! mutants {
    ($($case:ident { $($defect:ident => $finding:expr,)+ })+) => {
        &[$($(Mutant { defect: Defect::$defect, case: stringify!($case), finding: $finding },)+)+]
    };
}

/// The mutants, in the order of the cases. A case with several assertions has a mutant for each.
pub(crate) const MUTANTS: &[Mutant] = mutants! {
    l1_appended_records_survive_a_restart {
        AppendAcknowledgedBeforeDurable => "the log is empty",
        RestartReplaysTheTail => "found [\"0\", \"1\", \"1\"",
    }
    l1_a_log_tells_its_durability {
        LogDurabilityFails => "unexpected error",
        LogDurabilityWavers => "asked again",
        LogVolatileWithoutReason => "gives no reason",
    }
    l2_many_appenders_and_readers_agree_on_one_order {
        FirstReaderSwapsTwo => "one reader found",
        OffsetsEqualInPairs => "do not rise strictly",
    }
    l2_one_appenders_records_keep_their_order {
        BatchWrittenBackwards => "of appender",
        LaterBatchOvertakes => "of appender",
    }
    l3_a_reader_under_concurrent_appends_skips_nothing {
        HoleFillsInLater => STUCK,
        FirstReaderSwapsTwo => "came next",
    }
    l4_read_yields_exactly_what_is_at_or_after_the_offset {
        ReaderStartsOneLate => STUCK,
        ReaderStartsOneEarly => "reading at offset",
        ReaderStartsBeforeABetween => "reading behind offset",
        ReadersShareACursor => "disturb each other",
    }
    l4_a_record_is_read_as_it_was_appended {
        EmptyKeyReadAsNone => "appended NewRecord",
        HeadersSorted => "appended NewRecord",
        RepeatedHeadersLost => "appended NewRecord",
        HeaderNamesReadAsAscii => "appended NewRecord",
        PayloadReadAsText => "appended NewRecord",
        OriginLost => "appended NewRecord",
        EpochLost => "appended NewRecord",
        SequenceReadAsSigned => "appended NewRecord",
        EmptyPayloadCalledMalformed => "is called malformed",
        AppendTimeLost => "has no append time",
        AppendTellsTheFirst => "as the last offset",
        EmptyAppendTellsTheEnd => "an empty append told",
        EmptyAppendAddsARecord => "an empty append changed",
    }
    l4_next_returns_at_least_one_record_and_at_most_max {
        NextReturnsNothing => "next returned nothing",
        NextIgnoresMax => "next(1) returned 2",
        NextRepeatsTheBoundary => "next(1) yielded",
    }
    l4_one_call_of_next_returns_a_megabyte_at_most {
        NextIgnoresBytes => "one call of next returned",
        NextSkipsWhatItCutsOff => "there is another record",
    }
    l4_logs_of_other_names_are_independent {
        LogsShareRecords => "holds",
    }
    l4_foreign_records_are_read {
        ForeignSkipped => STUCK,
        ForeignPayloadLost => "found [\"ours\", \"\", \"ours again\"]",
        ForeignCalledMalformed => "is called malformed",
        ForeignGetsOrigin => "has an origin",
    }
    l5_a_reader_at_the_end_waits_for_the_next_record {
        ReaderStartsBeforeABetween => "did not wait",
        WaitingReaderIsNotWoken => STUCK,
        WokenReaderStartsOver => "round 1: got [\"0\", \"1\"]",
    }
    l5_bounds_tell_the_earliest_record_and_the_end {
        EmptyLogHasAnEnd => "an empty log has bounds",
        EarliestIsBehindTheFirst => "the bounds are",
        EndIsTheLastRecord => "the end is",
    }
    l5_below_the_earliest_record_is_truncated {
        BoundsIgnoreRetention => "the bounds are",
        RetentionRemovesTooMuch => "the bounds are",
        TruncationSilent => "reading at 7-3 found",
        TruncationWaits => STUCK,
        TruncatedToldAsFailure => "reading a removed record failed with",
        TruncatedTellsNoEarliest => "reading a removed record failed with",
        RetentionLosesAppendTimes => "what is left",
    }
    l5_retention_that_overtakes_a_reader_is_told {
        NextIgnoresMax => "the first record is",
        OvertakenReaderMovesOn => "went on at",
        OvertakenReaderWaits => STUCK,
        OvertakenReaderFailsVaguely => "unexpected error",
    }
    l5_past_the_end_is_out_of_range {
        PastEndWaits => STUCK,
        EndCheckedLoosely => STUCK,
        OffsetsComparedByLowPart => STUCK,
        PastEndReadsTheLast => "reading at 7-11 found",
        PastEndToldAsFailure => "failed with",
    }
    l5_a_log_created_anew_is_never_silent {
        OldOffsetWaitsInNewLog => STUCK,
        OldOffsetTruncatedInNewLog => "reading at the old end failed with",
        ReaderMissesRecreation => STUCK,
        OldReaderEndsQuietly => "a reader of the old log got",
    }
    l6_a_cancelled_next_loses_and_repeats_nothing {
        CancelledNextLoses => STUCK,
        CancelledNextRepeats => "after cancelled calls",
    }
    l7_a_failed_append_tells_the_truth {
        AppendAcknowledgedBeforeDurable => "which means all three records",
        LostAppendReplyToldAsFailure => "which means none",
        ReconnectTearsBatch => "which means a prefix",
    }
    l8_sizes_up_to_the_limit_are_taken {
        LimitIsExclusive => "over the limit",
        PayloadPadded => "came back with",
    }
    l8_a_record_over_the_limit_is_refused_before_any_is_appended {
        NoRecordLimit => "a record over the limit",
        KeyNotMeasured => "a record over the limit",
        HeadersNotMeasured => "a record over the limit",
        RefusalNamesNoLimit => "a record over the limit",
        PrefixAppendedBeforeRefusal => "a refused batch left records",
        RefusedBatchStaysBuffered => "a refused batch left [",
    }
    l9_a_malformed_entry_is_yielded_in_its_place {
        MalformedSkipped => STUCK,
        MalformedBlocks => "unexpected error",
        MalformedNotMarked => "record by record",
        MalformedGarblesNeighbour => "the neighbours are",
        MalformedWithoutReason => "gives no reason",
        MalformedBytesLost => "the payload holds b\"\"",
        PayloadReadAsText => "the payload holds",
        ReaderStartsOneEarly => "reading at a malformed entry",
    }
    s1_a_commit_applies_state_and_position {
        FreshStoreHasAPosition => "a fresh store has a position",
        PositionNotCommitted => "after two commits",
        RevisionNotCounted => "after two commits",
        StateKeptInTheHandle => "a is None",
        DeletesNotCommitted => "b is Some",
        HighPartOfOffsetNotKept => "found Position",
        PositionNeverGoesBack => "committed 0, found",
    }
    s1_windows_are_kept_whole_with_the_position {
        WindowsNotPersisted => "no window was kept",
        WindowTooSmall => "windows changed",
        WindowLosesItsLastOffset => "windows changed",
        WindowReadAsSigned => "windows changed",
        WindowsReplacedAsAWhole => "after one window changed",
        WindowsWrittenOnce => "after one window changed",
        WindowsByProducerOnly => "windows changed",
    }
    s1_forgotten_windows_are_removed {
        ForgottenWindowsStay => "after forgetting a",
        ForgettingTakesAllWindows => "after forgetting a",
    }
    s1_the_whole_position_is_kept {
        RevisionCountedByTheStore => "committed revision 1.70000",
        EpochOfRevisionNotKept => "committed revision 2.1",
        OwnerNotKept => "committed owner Some",
        OwnerKeptForever => "committed owner Some",
        PassedNotKept => "committed the passed record Some",
        PassedStays => "committed the passed record None",
    }
    s1_a_restart_never_parts_state_from_position {
        OffsetCommittedApart => "the state",
    }
    s2_a_stale_revision_is_fenced {
        NoRevisionCheck => "a commit based on revision 1.2",
        LaterRevisionAccepted => "a commit based on revision 1.4",
        FencedTellsWrongRevision => "a commit based on revision 1.2",
    }
    s2_a_fenced_commit_applies_nothing {
        NoRevisionCheck => "a late commit",
        FencedCommitMovesOffset => "moved the position",
        FencedCommitLeavesWindows => "moved the position",
        FencedCommitLeavesState => "a fenced commit left",
        HandleDeadAfterFenced => "unexpected error",
    }
    s2_a_first_commit_is_fenced_if_there_is_a_position {
        FirstCommitNotChecked => "a second first commit",
        FencedCommitMovesOffset => "the position is",
    }
    s2_of_racing_commits_one_wins {
        RevisionCheckedOutside => "racing commits won",
        FencedToldAsFailure => "a loser got",
        GetServedFromAStaleCache => "the state counts",
    }
    s3_commits_survive_a_restart {
        CommitAcknowledgedBeforeDurable => "the state counts 0",
        StateNotDurable => "the state counts 0",
        WindowsNotDurable => "restart 1 changed",
    }
    s3_a_store_tells_its_durability {
        StoreDurabilityFails => "unexpected error",
        StoreDurabilityWavers => "asked again",
        StoreVolatileWithoutReason => "gives no reason",
    }
    s4_a_dropped_transaction_leaves_no_trace {
        DroppedTransactionApplied => "a dropped transaction left",
        DroppedTransactionKeepsLock => STUCK,
        BeginCountsARevision => "a dropped transaction moved",
    }
    s4_a_rolled_back_transaction_leaves_no_trace {
        RollbackApplied => "a rolled back transaction left",
        BeginCountsARevision => "a rolled back transaction moved",
    }
    s5_a_cancelled_commit_is_all_or_nothing_and_for_good {
        OffsetCommittedApart => "a cancelled commit left",
        CancelledCommitTakenBackLater => "was stored, now it is",
        CancelledCommitComesLateUnchecked => "was stored, now",
    }
    s5_position_resolves_an_unknown_outcome {
        CommitAppliedAfterReply => "ended with Ok",
        LostCommitReplyToldAsFailure => "ended with Err(Unavailable",
        CommitRetriedAfterLostReply => "ended with Err(Fenced",
    }
    s6_a_transaction_whose_read_failed_does_not_commit {
        FailedReadForgotten => "a read failed and was ignored",
    }
    s6_a_transaction_reads_its_own_writes {
        GetSeesOnlyOwnWrites => "a stored key reads as",
        GetDoesNotSeePut => "after a put of a new key",
        SecondPutIgnored => "after an overwrite of its own put",
        GetDoesNotSeeDelete => "after a delete of a stored key",
        PutAfterDeleteIgnored => "after a put after its own delete",
        DeleteOfOwnPutIgnored => "after a delete of",
    }
    s6_keys_and_values_are_kept_to_the_byte {
        KeysKeptAsText => "key",
        KeysIgnoreCase => "key",
        KeysEndAtZero => "key",
        EmptyValueReadAsNone => "key",
        LargeValuesCut => "key",
        ValuesKeptAsText => "key",
    }
    s6_a_value_over_the_limit_is_refused_and_stages_nothing {
        NoValueLimit => "bytes: Ok",
        ValueLimitIsExclusive => "unexpected error",
        ValueRefusalNamesNoLimit => "bytes: Err(Failed",
        RefusedValueStaged => "a refused put left",
        RefusedValueDropsTheStaged => "after refused puts, staged has",
    }
    s7_consumers_do_not_see_each_others_state {
        StateSharedBetweenConsumers => "before it wrote",
        PositionSharedBetweenConsumers => "before it committed",
        KeysJoinedToNames => "under \"k:k\"",
        KeysAppendedToNames => "under \"-2k\"",
        CommitWipesStateOfOthers => "it wrote 1",
    }
    s7_a_thousand_consumers_keep_their_positions {
        OldConsumersForgotten => "has no position",
        RevisionsCountedForAll => "it stands at",
    }
    s8_a_position_remembers_its_log {
        IncarnationNotKept => "committed for",
    }
    s8_a_known_incarnation_is_kept {
        IncarnationNotKept => "after a commit for orders#a1",
        IncarnationWiped => "after a commit for orders the position is of orders, not",
    }
    s8_a_stale_commit_for_another_log_is_fenced {
        WrongLogBeforeFenced => "a stale commit for another log",
    }
    s8_a_commit_for_another_log_is_refused {
        OtherLogAccepted => "a commit for another log:",
        WrongLogNamesTheGiven => "a commit for another log:",
        OtherLogMovesOffset => "moved the position",
        OtherLogLeavesState => "left state",
    }
};
