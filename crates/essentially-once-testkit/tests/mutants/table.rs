//! Which case must find which defect, and the words that identify its finding.

use crate::defect::Defect;

/// A backend with one defect, and a case that must find it.
pub(crate) struct Mutant {
    pub(crate) defect: Defect,
    pub(crate) case: &'static str,
    /// A part of the violation. A case that fails for another reason has not found this defect.
    pub(crate) finding: &'static str,
}

/// A backend that differs within the contract, and a case that must accept it.
pub(crate) struct Sound {
    pub(crate) variant: Defect,
    pub(crate) case: &'static str,
}

/// The finding of a case that reached its time limit.
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
    l1_a_log_reports_its_durability {
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
        EmptyKeyReadAsNone => "its key is None",
        HeadersSorted => "its header 0 is \"a\"",
        RepeatedHeadersLost => "its header 1 is",
        HeaderNamesReadAsAscii => "its header 3 is \"na?ve ?\"",
        PayloadReadAsText => "its payload is",
        OriginLost => "its origin is None",
        EpochLost => "its origin is",
        SequenceReadAsSigned => "its origin is",
        EmptyPayloadCalledMalformed => "is called malformed",
        AppendTimeLost => "has no append time",
        AppendTellsTheFirst => "as the last offset",
        EmptyAppendTellsTheEnd => "an empty append returned",
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
    l4_a_record_keeps_hundreds_of_headers {
        HeadersOver255Lost => "its number of headers is 255, not 300",
        HeaderValuesCut => "65535 bytes, not",
    }
    l4_headers_count_towards_the_megabyte {
        FetchIgnoresHeaders => "records with",
        NextIgnoresBytes => "records with",
    }
    l4_records_that_grow_do_not_overfill_a_call {
        FetchSizedByTheFirst => "records with",
        FetchSizedByTheCallBefore => "records with",
    }
    l4_next_takes_the_largest_max {
        MaxOverflows => STUCK,
        LargeMaxRefused => "out of range",
    }
    l4_append_times_are_of_the_append {
        AppendTimeInSeconds => "apart, their times are",
        AppendTimeOfTheRead => "its time of append is",
        AppendTimeOfTheHandle => "apart, their times are 0ns apart",
    }
    l4_logs_of_other_names_are_independent {
        LogsShareRecords => "holds",
    }
    l4_logs_with_similar_names_are_independent {
        LogNamesIgnoreCase => "log Orders holds something",
        LogNamesCut => "nnn2 (200 bytes) holds something",
        LogSeparatorsFallTogether => "log a-b holds something",
        LogNamesMatchPrefixes => "holds something",
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
    l5_no_wake_up_is_missed {
        WakeUpLostBeforeWaiting => "has not seen the appended record",
        WakeUpsDebounced => "has not seen the appended record",
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
        RetentionLosesAppendTimes => "its time of append is",
    }
    l5_retention_that_overtakes_a_reader_is_reported {
        NextIgnoresMax => "the first record is",
        OvertakenReaderMovesOn => "went on at",
        OvertakenReaderWaits => STUCK,
        OvertakenReaderFailsVaguely => "unexpected error",
    }
    l5_retention_of_everything_keeps_the_end {
        OffsetsStartOverWhenEmptied => "an append to the emptied log returned offset",
        EndForgottenWhenEmptied => "now its bounds are",
        EmptiedLogRefusesItsEnd => "did not wait",
    }
    l5_offsets_are_not_reused_after_a_restart {
        OffsetsRecountedAtRestart => "is past the end",
        EndForgottenAtRestart => "now its bounds are",
    }
    l5_the_readable_end_leaves_out_deleted_records {
        ReadableEndIgnoresDeletes => "the readable end is",
        ReadableEndIsTheLastRecord => "the readable end is",
    }
    l5_past_the_end_is_out_of_range {
        PastEndWaits => STUCK,
        EndCheckedLoosely => STUCK,
        OffsetsComparedByLowPart => STUCK,
        PastEndReadsTheLast => "reading at 7-11 found",
        PastEndToldAsFailure => "failed with",
    }
    l5_a_recreated_log_is_never_silent {
        OldOffsetWaitsInNewLog => STUCK,
        OldOffsetTruncatedInNewLog => "reading at the old end failed with",
        ReaderMissesRecreation => STUCK,
        OldReaderEndsQuietly => "a reader of the old log got",
    }
    l6_a_cancelled_next_loses_and_repeats_nothing {
        CancelledNextLoses => STUCK,
        CancelledNextRepeats => "after cancelled calls",
    }
    l7_a_failed_append_reports_its_outcome {
        AppendAcknowledgedBeforeDurable => "which means all three records",
        LostAppendReplyToldAsFailure => "which means none",
        ReconnectTearsBatch => "which means a prefix",
    }
    l7_a_lost_reply_never_doubles_an_append {
        LostAppendReplyToldAsFailure => "which means none",
        AppendRetriedAfterLostReply => "which means all three records",
        LostAppendRequestToldAsSuccess => "which means all three records",
    }
    l7_a_refusal_within_a_batch_reports_its_outcome {
        RefusedMiddleLeavesAPrefix => "which means none",
        RefusedMiddleSkipped => "which means a prefix",
        RefusedTailComesLater => "which means none",
    }
    l7_concurrent_appends_have_their_own_outcomes {
        NeighbourToldTheRefusal => "because a concurrent one was refused",
        RefusalDropsTheNeighbour => "which means all of its records",
    }
    l10_an_old_handle_never_appends_to_a_new_log {
        OldHandleAppendsToNewLog => "the log created later holds [\"new\", \"stray\"]",
        OldHandleCreatesTheLog => "the log created later holds [\"stray\"]",
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
    l11_the_records_before_an_offset_are_removed {
        RemovalTakesOneTooMany => "the bounds are",
        RemovalLeavesTheLast => "the bounds are",
        RemovalCountsOffsets => "were removed, not 7",
        RemovalBelowTheEarliestRefused => "unexpected error",
        TruncationSilent => "reading at 7-3 found",
        TruncatedToldAsFailure => "reading the removed record",
        RetentionLosesAppendTimes => "the removal changed",
        OvertakenReaderMovesOn => "went on at",
        OvertakenReaderWaits => STUCK,
    }
    l11_nothing_is_removed_past_the_end {
        RemovalPastTheEndAccepted => "returned Ok(5)",
        RemovalPastTheEndEmptiesTheLog => "the bounds are",
        RemovalPastTheEndToldAsFailure => "returned Err(Failed",
    }
    l11_offsets_of_removed_records_are_not_reused {
        OffsetsStartOverWhenEmptied => "is past the end",
        EndForgottenWhenEmptied => "now its bounds are",
        EmptiedLogRefusesItsEnd => "did not wait",
    }
    l11_offsets_are_not_reused_after_a_restart {
        OffsetsRecountedAtRestart => "is past the end",
        EndForgottenAtRestart => "now its bounds are",
    }
    l11_records_appended_meanwhile_stay {
        RemovalDropsAppendsMeanwhile => STUCK,
        RemovalKeepsACount => "unexpected error",
    }
    l12_the_tail_holds_the_last_records {
        TailIsOneShort => "those records begin at",
        TailIsOneLong => "the tail of 0 is",
        TailIsAll => "the tail of 1 is",
        TailIsUnknown => "does not tell its tail",
    }
    l12_the_tail_is_what_retention_left {
        TailIgnoresRetention => "which is outside of",
        TailEmptyAfterRetention => "but the last record is at",
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
        WindowTooSmall => "windows changed in the store: its window of a is",
        WindowLosesItsLastOffset => "windows changed in the store: its window of a is",
        WindowReadAsSigned => "windows changed in the store: its window of c is",
        WindowsReplacedAsAWhole => "after one window changed: its window of a is missing",
        WindowsWrittenOnce => "after one window changed: its window of a#7 is",
        WindowsByProducerOnly => "windows changed in the store: its window of a is",
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
        NoteNotKept => "committed the note",
        NoteStays => "committed the note",
        NoteOfFixedLength => "committed the note",
    }
    s1_windows_of_similar_producers_are_independent {
        ProducerNamesIgnoreCase => "its window of",
        ProducerNamesCut => "its window of",
        ProducerSeparatorsFallTogether => "its window of",
    }
    s1_hundreds_of_commits_keep_everything {
        CommitsCountedInAByte => "has no position after a commit",
        ValuesLostAfter256Commits => "what the first one wrote reads None",
    }
    s1_tens_of_thousands_of_commits_keep_everything {
        CommitsCountedIn16Bits => "commit 65537 of one consumer failed",
        ValuesLostAfter65536Commits => "what the first one wrote reads None",
    }
    s1_native_writes_are_applied_with_the_commit {
        NativeNotCommitted => "was natively written 2 times and counts 0",
        NativeAppliedTwice => "was natively written 2 times and counts 4",
        NativeAppliedAtOnce => "is not made yet",
    }
    s1_a_restart_never_parts_state_from_position {
        OffsetCommittedApart => "the state",
    }
    s2_a_stale_revision_is_fenced {
        NoRevisionCheck => "a commit based on revision 4294967296.2",
        LaterRevisionAccepted => "a commit based on revision 4294967296.4",
        FencedTellsWrongRevision => "a commit based on revision 4294967296.2",
    }
    s2_a_fenced_commit_applies_nothing {
        NoRevisionCheck => "a late commit",
        FencedCommitMovesOffset => "moved the position: its next offset is",
        FencedCommitLeavesWindows => "moved the position: its window of a is one too many",
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
    s2_a_fenced_commit_applies_no_native_writes {
        NativeNotFenced => "(late, next) are natively (1, 1)",
        NativeAppliedAtOnce => "(late, next) are natively (2, 1)",
    }
    s3_commits_survive_a_restart {
        CommitAcknowledgedBeforeDurable => "the state counts 0",
        StateNotDurable => "the state counts 0",
        WindowsNotDurable => "restart 1 changed the position: its window of web-1 is missing",
    }
    s3_a_commit_that_stages_nothing_survives_a_restart {
        EmptyCommitNotDurable => "commit 2 was acknowledged, but the position is 1",
        EmptyCommitKeptInTheHandle => "commit 2 was acknowledged, but the position is 1",
    }
    s3_a_store_reports_its_durability {
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
    s4_a_transaction_that_ends_leaves_no_native_writes {
        NativeAppliedAtOnce => "was dropped left 1 native writes",
        NativeAppliedByDrop => "was dropped left 1 native writes",
    }
    s5_a_cancelled_commit_is_all_or_nothing_and_for_good {
        OffsetCommittedApart => "a cancelled commit left",
        CancelledCommitTakenBackLater => "was stored, now it is",
        CancelledCommitComesLateUnchecked => "was stored, now",
    }
    s5_position_resolves_an_unknown_outcome {
        CommitAppliedAfterReply => "returned Ok",
        LostCommitReplyToldAsFailure => "returned Err(Unavailable",
        CommitRetriedAfterLostReply => "returned Err(Fenced",
    }
    s5_a_lost_reply_leaves_the_truth_to_position {
        LostCommitReplyToldAsFailure => "which means not made",
        CommitRetriedAfterLostReply => "returned Err(Fenced",
        LostCommitRequestToldAsSuccess => "which means made",
    }
    s6_a_transaction_whose_read_failed_does_not_commit {
        FailedReadForgotten => "a read failed and was ignored",
    }
    s6_a_failed_read_commits_no_native_writes {
        FailedReadForgotten => "a read failed and was ignored",
        NativeAppliedAtOnce => "1 native writes are there",
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
    s6_every_key_and_value_of_the_guaranteed_sizes_is_taken {
        EmptyKeyRefused => "a key of 0 bytes",
        KeysOver255Refused => "a key of 256 bytes",
        LongKeysCut => "a key of 1024 bytes",
        ValuesOf64KibRefused => "a value of 65536 bytes",
        EmptyValueReadAsNone => "holds None bytes",
    }
    s6_a_key_over_the_limit_is_refused_and_stages_nothing {
        NoKeyLimit => "bytes: Ok",
        KeyLimitIsExclusive => "unexpected error",
        RefusedKeyStaged => "after a refused put",
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
    s7_consumers_with_similar_names_are_independent {
        ConsumerNamesIgnoreCase => "consumer Orders has a position or state",
        ConsumerNamesCut => "nnn2 (200 bytes) has a position or state",
        ConsumerSeparatorsFallTogether => "consumer a-b has a position or state",
    }
    s7_consumers_do_not_see_each_others_windows {
        WindowsSharedBetweenConsumers => "which committed no windows",
        ForgottenForAllConsumers => "after billing forgot its windows",
    }
    s7_many_consumers_keep_their_positions {
        OldConsumersForgotten => "has no position",
        RevisionsCountedForAll => "but its position is",
    }
    s8_a_position_remembers_its_log {
        IncarnationNotKept => "committed for",
    }
    s8_a_known_incarnation_is_kept {
        IncarnationNotKept => "after a commit for orders#a1",
        IncarnationWiped => "after a commit for orders the position is of orders, not",
    }
    s8_a_log_without_incarnation_is_the_same_log {
        UnknownIncarnationRefused => "a commit for orders, where the position is of orders#a1",
        KnownIncarnationRefused => "a commit for orders#a1, where the position is of orders:",
        UnknownIncarnationMatchesAnyName => "a commit for invoices, without an incarnation",
    }
    s8_a_stale_commit_for_another_log_is_fenced {
        WrongLogBeforeFenced => "a stale commit for another log",
    }
    s8_a_commit_for_another_log_is_refused {
        OtherLogAccepted => "a commit for another log returned",
        WrongLogNamesTheGiven => "a commit for another log returned",
        OtherLogMovesOffset => "moved the position: its log is",
        OtherLogLeavesState => "left state",
    }
    s9_a_position_is_of_one_commit {
        PositionReadInSteps => "its owner is",
        WindowsReadApart => "its window of a is",
        JournalReadApart => "its entry 0 of the journal is",
        WindowsWrittenApart => "its window of a is",
        PositionServedStale => "was acknowledged, and then",
    }
    s9_a_position_waits_for_no_transaction {
        PositionWaitsForTransactions => STUCK,
        PositionHoldsUpCommits => "unexpected error",
    }
    s10_a_commit_changes_the_pulse {
        PulseOnlyOfBeats => "after commit 2: the pulse is",
        PulseKeptInTheHandle => "after commit 1: the pulse is",
    }
    s10_watch_returns_after_a_commit_elsewhere {
        WatchHearsOnlyItsHandle => STUCK,
        WatchForgetsWhatItSaw => STUCK,
    }
    s10_a_beat_of_the_owner_changes_the_pulse {
        BeatsNotKept => "after beat 1 of the owner",
        BeatsKeptInTheHandle => "after beat 1 of the owner",
    }
    s10_a_beat_of_another_changes_nothing {
        BeatOfAnotherCounts => "changed the pulse from",
        BeatCreatesAPosition => "a beat without a position created one",
    }
    s10_a_beat_fences_nobody {
        BeatRaisesTheRevision => "its revision is",
        BeatEndsTransactions => "a commit with a concurrent beat",
    }
    s10_a_release_clears_its_own_owner_only {
        ReleaseIgnored => "after a release by the owner",
        ReleaseOfAnotherCounts => "its owner is None",
        ReleaseRaisesTheRevision => "after a release by the owner",
    }
    s11_a_snapshot_is_of_one_commit {
        SnapshotReadInSteps => "a snapshot has the position of",
        SnapshotServedStale => "was acknowledged, and then",
        SnapshotSeesHalfACommit => "a snapshot has the position of",
    }
    s11_a_snapshot_keeps_the_order_of_keys {
        SnapshotSorted => "has the values",
        SnapshotLeavesOutMissing => "has the snapshot",
        SnapshotMixesConsumers => "has the values",
    }
    s11_a_snapshot_waits_for_no_transaction {
        SnapshotWaitsForTransactions => STUCK,
        SnapshotSeesWhatIsStaged => "during an open transaction has",
        SnapshotHoldsUpCommits => "unexpected error",
    }
    s12_a_journal_is_part_of_the_commit {
        JournalDropped => "after commit 1 of shipping: its number of entries",
        JournalWrittenOnce => "after commit 2 of shipping: its number of entries",
        JournalNotFenced => "after transactions that were fenced",
        JournalsOver4KibLost => "after commit 4 of shipping: its number of entries",
    }
    s13_every_consumer_with_a_position_is_listed {
        ConsumersUnknown => "does not list its consumers",
        LastConsumerNotListed => "after a store with four consumers",
        ConsumersListedPerCommit => "after a store with four consumers",
        ConsumersListedBackwards => "after a store with four consumers",
        ConsumersListedOnce => "after a store with four consumers",
    }
    s13_a_consumer_that_never_committed_is_not_listed {
        ConsumersListedFromBegin => "after an open transaction",
        ConsumersWaitForTransactions => STUCK,
        RolledBackConsumersListed => "after a transaction that was rolled back",
        FencedConsumersListed => "after a fenced first commit",
        BeatCreatesAPosition => "after a beat and a release",
    }
    s13_consumers_with_similar_names_are_listed {
        ConsumerNamesIgnoreCase => "after a store with similar names",
        ConsumerNamesCut => "after a store with similar names",
        ConsumerSeparatorsFallTogether => "after a store with similar names",
    }
    s13_consumers_are_listed_while_others_commit {
        ConsumersListedOnce => "the list leaves out",
        LastConsumerNotListed => "the list left out",
        CommitAppliedAfterReply => "the list left out",
    }
    d1_letters_are_applied_with_the_commit {
        LettersNotCommitted => "after commit 1",
        LetterRemovalsNotCommitted => "after commit 2",
    }
    d1_what_is_not_committed_leaves_no_trace {
        LettersAppliedAtOnce => "changed the letters",
        LettersNotFenced => "that was stale changed",
    }
    d1_every_read_agrees_with_the_reference {
        LettersReadWithoutTheStaged => "step",
        ListRepeatsTheLast => "a page",
        FirstDueIsTheLowestOffset => "the first due",
        RemoveFromIsExclusive => "remove_from",
    }
    d2_a_letter_comes_back_as_it_was_parked {
        LetterHeadersSorted => "its header 0",
        LetterTimesInSeconds => "parked",
        LetterMarkLost => "mark as malformed",
        LetterEditLost => "its edit is missing",
        LetterOriginalHeadersLost => "of the original, its number of headers",
        LettersSortedAsSigned => "found",
        MalformedLetterEndsTheList => "found",
    }
    d2_the_largest_record_can_be_parked {
        LetterLimitIsTheRecordLimit => "over the limit",
        LetterReasonsCut => "came back, or changed",
    }
    d2_letters_survive_a_restart {
        LettersLostAtRestart => "after a restart",
        RemovedLettersComeBackAtRestart => "after a restart",
    }
    d3_keys_are_compared_to_the_byte {
        EmptyLetterKeyIsNone => "the head of []",
        MalformedLettersHaveKeys => "the head of",
        LetterKeysIgnoreCase => "the head of",
    }
    d4_consumers_do_not_see_each_others_letters {
        LettersSharedBetweenConsumers => "",
        RemoveFromReachesOtherConsumers => "has []",
    }
    d5_a_letter_that_cannot_be_read_hides_no_other {
        DamagedLetterEndsTheList => "the list next to it",
        DamagedLetterFailsTheList => "cannot be read",
        DamagedLetterNotListed => "the list next to it",
        DamagedLetterIsNoHead => "the head next to it",
        DamagedLetterIsDue => "the first due next to it",
        DamagedLetterNotCounted => "counts next to it",
    }
    o1_records_are_sent_with_the_commit {
        SentNotCommitted => "after commit",
        OnlyTheLastIsSent => "after commit",
        SentTwice => "after commit",
        SentWithTheNextCommit => "after commit",
        SentAfterTheReply => "after commit",
    }
    o1_what_is_not_committed_sends_nothing {
        SentAtOnce => "that was stale sent something",
        SentAlthoughFenced => "that was stale sent something",
        SentAlthoughWrongLog => "that was for another log sent something",
        SentAlthoughRolledBack => "that was rolled back sent something",
        SentAlthoughDropped => "that was dropped sent something",
        UncommittedStaysBuffered => "what was not committed before",
    }
    o1_a_restart_never_parts_records_from_the_position {
        SentNotDurable => "but the outbox has",
        SentApartFromTheCommit => "but the outbox has",
        RestartReplaysTheTail => "but the outbox has",
    }
    o1_a_lost_reply_neither_loses_nor_doubles_records {
        SentAgainAfterLostReply => "(BeforeReply)",
        LostReplyTakesNumbersBack => "which is no higher",
        SentInAnEarlierRequest => "(BeforeRequest)",
    }
    o2_records_keep_their_order {
        SentInReverse => "to outbox",
        SentGroupedByKey => "to outbox",
        SentToTheLastLog => "to outbox",
        LaterCommitOvertakesSent => "to outbox",
    }
    o2_a_record_comes_back_as_it_was_sent {
        SentHeadersLost => "its number of headers",
        SentKeysLost => "its key",
        EmptyKeyReadAsNone => "its key",
        HeadersSorted => "its header 0",
        RepeatedHeadersLost => "its header 1",
        PayloadReadAsText => "its payload",
    }
    o2_a_record_over_the_limit_is_refused_and_stages_nothing {
        NoSentLimit => "where the limit is",
        SentSizedByThePayload => "where the limit is",
        SentLimitIsExclusive => "where the limit is",
        RefusedSendStaged => "sent payloads of",
        RefusedSendDropsTheStaged => "sent payloads of",
        RefusedSendEndsTheTransaction => "unexpected error",
    }
    o3_each_outbox_numbers_its_records {
        SentWithoutOrigin => "has no origin",
        NumberedByTheConsumer => "which is no higher",
        NumberedByTheHandle => "which is no higher",
        NumberedByTheCommit => "which is no higher",
        OneNumberPerCommit => "which is no higher",
        ProducerPerConsumer => "of another producer",
        ProducerSharedByOutboxes => "have the same producer",
        FreshEpochPerCommit => "is not the stable one",
        OutboxEpochNotStable => "is not the stable one",
    }
    o3_numbers_rise_after_truncation {
        NumberedByTheRetained => "after truncation",
        NumberedAfterTheLastRecord => "after every record was removed",
        NumbersStartOverWhenEmptied => "after every record was removed",
        ProducerRedrawnWhenEmptied => "of another producer",
    }
    o3_numbers_rise_after_records_were_removed {
        NumberedByTheRetained => "after everything was removed 1 times",
        NumberedAfterTheLastRecord => "after everything was removed 1 times",
        NumbersStartOverWhenEmptied => "after everything was removed 1 times",
        ProducerRedrawnWhenEmptied => "of another producer",
        RemovalLeavesTheLast => "the earliest is at",
    }
    o3_numbers_rise_after_a_restart {
        NumbersStartOverAtRestart => "after 1 restarts",
        NumbersRecountedAtRestart => "after 2 restarts",
        ProducerRedrawnAtRestart => "of another producer",
        FreshEpochAtRestart => "is not the stable one",
    }
    o3_concurrent_senders_share_no_number {
        NumberedAtSend => "which is no higher",
        NumberedFromASequence => "which is no higher",
        LaterCommitOvertakesSent => "come before those of an earlier one",
    }
    o3_a_record_with_an_origin_is_refused {
        OriginOfTheRecordKept => "sending a record with an origin",
        OriginOfTheRecordReplaced => "sending a record with an origin",
        RefusedSendStaged => "a transaction with a refused record sent",
        RefusedSendEndsTheTransaction => "unexpected error",
        BadLogNameIsAFailure => "sending to \"\"",
    }
    o3_a_consumer_behind_a_relay_handles_each_record_once {
        SentWithoutOrigin => "unexpected error",
        NumberedByTheHandle => "handled [\"a0\"]",
        ProducerSharedByOutboxes => "handled []",
        OriginDrawnByTheReader => "is not the one that consumer relay-a handled",
    }
    o4_no_reader_sees_a_record_before_its_commit {
        SentAtOnce => "before its commit, a waiting reader sees",
        SentApartFromTheCommit => "the position was",
        SentWakesNoReader => STUCK,
    }
    o5_consumers_share_an_outbox {
        OutboxPerConsumer => "found",
        OutboxOfItsFirstConsumer => "found",
        UnknownOutboxRefused => "unexpected error",
        LaterCommitOvertakesSent => "found",
    }
};

macro_rules! sound {
    ($($case:ident { $($variant:ident),+ })+) => {
        &[$($(Sound { variant: Defect::$variant, case: stringify!($case) },)+)+]
    };
}

/// The sound variants, in the order of `DEFECTS.md`.
pub(crate) const SOUND: &[Sound] = sound! {
    l4_a_record_keeps_hundreds_of_headers { FetchesOneByOne }
    l4_headers_count_towards_the_megabyte { FetchesOneByOne }
    l4_records_that_grow_do_not_overfill_a_call { FetchesOneByOne }
    l4_next_takes_the_largest_max { FetchesOneByOne }
    l4_append_times_are_of_the_append { ClockOfTheServer }
    l4_logs_with_similar_names_are_independent { NamesKeptAsDigests }
    l5_no_wake_up_is_missed { PollsForRecords }
    l5_retention_of_everything_keeps_the_end { OffsetsLeapAfterRetention }
    l5_offsets_are_not_reused_after_a_restart { OffsetsLeapAfterRetention }
    l5_the_readable_end_leaves_out_deleted_records { EmptiedReadableEndIsTheEarliest }
    l7_a_lost_reply_never_doubles_an_append { LostRepliesLookedUp }
    l7_a_refusal_within_a_batch_reports_its_outcome { RefusedMiddleInDoubt }
    l7_concurrent_appends_have_their_own_outcomes { AppendsTakeTurns }
    l10_an_old_handle_never_appends_to_a_new_log { OldHandleAppendsVanish }
    l11_the_records_before_an_offset_are_removed { OffsetsLeapAfterRetention, FetchesOneByOne }
    l11_nothing_is_removed_past_the_end { OffsetsLeapAfterRetention }
    l11_offsets_of_removed_records_are_not_reused { OffsetsLeapAfterRetention, PollsForRecords }
    l11_offsets_are_not_reused_after_a_restart { OffsetsLeapAfterRetention }
    l11_records_appended_meanwhile_stay { OffsetsLeapAfterRetention, PollsForRecords }
    l12_the_tail_holds_the_last_records { TailBetweenRecords }
    l12_the_tail_is_what_retention_left { TailBetweenRecords }
    s1_hundreds_of_commits_keep_everything { CompactsEvery100Commits }
    s1_tens_of_thousands_of_commits_keep_everything { CompactsEvery100Commits }
    s1_windows_of_similar_producers_are_independent { WindowsInAnyOrder }
    s1_native_writes_are_applied_with_the_commit { NativeAppliedFirst }
    s2_a_fenced_commit_applies_no_native_writes { NativeAppliedFirst }
    s3_a_commit_that_stages_nothing_survives_a_restart { CompactsEvery100Commits }
    s4_a_transaction_that_ends_leaves_no_native_writes { NativeAppliedFirst }
    s5_a_lost_reply_leaves_the_truth_to_position { LostRepliesLookedUp }
    s6_a_failed_read_commits_no_native_writes { NativeAppliedFirst }
    s6_every_key_and_value_of_the_guaranteed_sizes_is_taken { KeysKeptAsDigests }
    s6_a_key_over_the_limit_is_refused_and_stages_nothing { KeysKeptAsDigests }
    s7_consumers_with_similar_names_are_independent { NamesKeptAsDigests }
    s7_consumers_do_not_see_each_others_windows { WindowsInAnyOrder }
    s8_a_log_without_incarnation_is_the_same_log { WindowsInAnyOrder }
    s9_a_position_is_of_one_commit { PositionReadFromACopy }
    s9_a_position_waits_for_no_transaction { PositionReadFromACopy }
    s10_a_commit_changes_the_pulse { PulseLags }
    s10_a_beat_of_the_owner_changes_the_pulse { BeatsStartOverAtCommits, PulseLags }
    s10_a_beat_of_another_changes_nothing { BeatsStartOverAtCommits }
    s10_a_beat_fences_nobody { BeatsStartOverAtCommits }
    s10_a_release_clears_its_own_owner_only { PulseLags }
    s10_watch_returns_after_a_commit_elsewhere { WatchReturnsEarly }
    s11_a_snapshot_is_of_one_commit { SnapshotFromACopy }
    s11_a_snapshot_keeps_the_order_of_keys { SnapshotFromACopy }
    s11_a_snapshot_waits_for_no_transaction { SnapshotFromACopy }
    s12_a_journal_is_part_of_the_commit { PositionReadFromACopy }
    s13_every_consumer_with_a_position_is_listed { NamesKeptAsDigests, PositionReadFromACopy }
    s13_a_consumer_that_never_committed_is_not_listed { PositionReadFromACopy }
    s13_consumers_with_similar_names_are_listed { NamesKeptAsDigests }
    s13_consumers_are_listed_while_others_commit { NamesKeptAsDigests, PositionReadFromACopy }
    d1_letters_are_applied_with_the_commit { LetterKeysKeptAsDigests }
    d1_what_is_not_committed_leaves_no_trace { LetterKeysKeptAsDigests }
    d1_every_read_agrees_with_the_reference { LetterKeysKeptAsDigests }
    d2_a_letter_comes_back_as_it_was_parked { LetterKeysKeptAsDigests }
    d2_the_largest_record_can_be_parked { LetterKeysKeptAsDigests }
    d2_letters_survive_a_restart { LetterKeysKeptAsDigests }
    d3_keys_are_compared_to_the_byte { LetterKeysKeptAsDigests }
    d4_consumers_do_not_see_each_others_letters { LetterKeysKeptAsDigests }
    d5_a_letter_that_cannot_be_read_hides_no_other { LetterKeysKeptAsDigests }
    o1_records_are_sent_with_the_commit { SentNumbersHaveGaps }
    o1_what_is_not_committed_sends_nothing { SentNumbersHaveGaps }
    o1_a_restart_never_parts_records_from_the_position { SentNumbersHaveGaps }
    o1_a_lost_reply_neither_loses_nor_doubles_records { LostRepliesLookedUp, SentNumbersHaveGaps }
    o2_records_keep_their_order { SentNumbersHaveGaps }
    o2_a_record_comes_back_as_it_was_sent { SentNumbersHaveGaps }
    o2_a_record_over_the_limit_is_refused_and_stages_nothing { SentNumbersHaveGaps }
    o3_each_outbox_numbers_its_records { SentNumbersHaveGaps, OutboxesShareACounter }
    o3_numbers_rise_after_truncation { SentNumbersHaveGaps }
    o3_numbers_rise_after_records_were_removed { SentNumbersHaveGaps, OffsetsLeapAfterRetention }
    o3_numbers_rise_after_a_restart { SentNumbersHaveGaps }
    o3_concurrent_senders_share_no_number { SentNumbersHaveGaps, OutboxesShareACounter }
    o3_a_record_with_an_origin_is_refused { SentNumbersHaveGaps }
    o3_a_consumer_behind_a_relay_handles_each_record_once { SentNumbersHaveGaps, OutboxesShareACounter }
    o4_no_reader_sees_a_record_before_its_commit { SentNumbersHaveGaps, PollsForRecords }
    o5_consumers_share_an_outbox { SentNumbersHaveGaps, OutboxesShareACounter }
};
