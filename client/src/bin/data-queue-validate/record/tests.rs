#![allow(clippy::unwrap_used, clippy::expect_used)]
use super::*;

const LEASE: Duration = Duration::from_secs(10);

/// A history, told in milliseconds from its start.
struct History {
    start: Instant,
    record: Record,
}

impl History {
    /// One task, `a` with value `1`, and all inserts answered.
    fn of_one() -> Self {
        let mut history = Self::empty();
        history.record.inserted("a", "1".into());
        history.record.complete();
        history
    }

    fn empty() -> Self {
        Self { start: Instant::now(), record: Record::default() }
    }

    fn at(&self, millis: u64) -> Instant {
        self.start + Duration::from_millis(millis)
    }

    fn pop(&mut self, id: &str, token: &str, text: Option<&str>, asked: u64, answered: u64) -> Known {
        let (asked, answered) = (self.at(asked), self.at(answered));
        let value = text.map_or(Value::Other, Value::Json);
        self.record.delivered(&Delivery { id, lease_token: token, value, asked, answered, lease: LEASE })
    }

    /// A line of a worker of another program that tells of a delivery: it was made at any time since the start.
    fn told(&mut self, id: &str, token: &str, md5: &str, read: u64) {
        let (asked, answered) = (self.at(0), self.at(read));
        let value = Value::Md5(md5);
        let lease = Duration::ZERO;
        self.record.delivered(&Delivery { id, lease_token: token, value, asked, answered, lease });
    }

    /// A line that tells of an ack.
    fn told_acked(&mut self, token: &str, read: u64) {
        self.record.acked("a", token, self.at(0), self.at(read), true);
    }

    fn heartbeat(&mut self, token: &str, asked: u64) {
        let asked = self.at(asked);
        self.record.extended("a", token, asked, LEASE);
    }

    fn ack(&mut self, token: &str, asked: u64, answered: u64) {
        self.record.acked("a", token, self.at(asked), self.at(answered), false);
    }

    fn judge(&self) -> (u64, u64, u64) {
        let verdict = self.record.verdict();
        let faulty = verdict.missing + verdict.doubled + verdict.unexpected > 0;
        assert_eq!(verdict.is_good(), !faulty);
        (verdict.missing, verdict.doubled, verdict.unexpected)
    }
}

const GOOD: (u64, u64, u64) = (0, 0, 0);
const MISSING: (u64, u64, u64) = (1, 0, 0);
const DOUBLED: (u64, u64, u64) = (0, 1, 0);
const UNEXPECTED: (u64, u64, u64) = (0, 0, 1);

#[test]
fn a_task_that_failed_and_was_acked_at_its_second_delivery_is_good() {
    let mut history = History::of_one();
    assert_eq!(history.pop("a", "t1", Some("1"), 0, 5), Known::Inserted);
    assert!(!history.record.is_settled());
    history.pop("a", "t2", Some("1"), 10_000, 10_010);
    history.heartbeat("t2", 10_020);
    history.ack("t2", 10_030, 10_040);
    assert!(history.record.is_settled());
    assert_eq!(history.judge(), GOOD);
    let verdict = history.record.verdict();
    assert_eq!((verdict.inserted, verdict.deliveries, verdict.redeliveries, verdict.acked), (1, 2, 1, 1));
}

#[test]
fn equal_values_are_tasks_of_their_own() {
    let mut history = History::of_one();
    history.record.inserted("b", "1".into());
    history.pop("a", "t1", Some("1"), 0, 5);
    history.ack("t1", 6, 7);
    assert_eq!(history.judge(), MISSING);
    assert!(!history.record.is_settled());
}

#[test]
fn what_was_never_acked_is_missing() {
    let mut history = History::of_one();
    assert_eq!(history.judge(), MISSING);
    history.pop("a", "t1", Some("1"), 0, 5);
    history.record.lease_lost();
    assert_eq!(history.judge(), MISSING);
    assert_eq!(history.record.verdict().lease_lost, 1);
}

#[test]
fn two_acks_are_doubled() {
    let mut history = History::of_one();
    history.pop("a", "t1", Some("1"), 0, 5);
    history.pop("a", "t2", Some("1"), 0, 10_001);
    history.ack("t1", 10_010, 10_020);
    assert_eq!(history.judge(), GOOD);
    history.ack("t2", 10_010, 10_020);
    assert_eq!(history.judge(), DOUBLED);

    let mut history = History::of_one();
    history.pop("a", "t1", Some("1"), 0, 5);
    history.ack("t1", 6, 7);
    history.ack("t1", 8, 9);
    assert_eq!(history.judge(), DOUBLED);
}

#[test]
fn an_ack_that_an_earlier_try_did_counts_once() {
    let mut history = History::of_one();
    history.pop("a", "t1", Some("1"), 0, 5);
    let (asked, answered) = (history.at(6), history.at(7));
    history.record.acked("a", "t1", asked, answered, true);
    history.record.acked("a", "t1", asked, answered, true);
    assert_eq!(history.judge(), GOOD);
    history.record.acked("a", "t2", asked, answered, true);
    assert_eq!(history.judge(), DOUBLED);
}

#[test]
fn a_delivery_asked_for_after_the_ack_was_confirmed_is_doubled() {
    let mut history = History::of_one();
    history.pop("a", "t1", Some("1"), 0, 5);
    history.ack("t1", 6, 7);
    assert_eq!(history.pop("a", "t2", Some("1"), 8, 20_000), Known::Acked);
    assert_eq!(history.judge(), DOUBLED);
}

#[test]
fn a_late_answer_of_a_pop_from_before_the_ack_is_doubled_only_if_its_lease_is_good() {
    let mut history = History::of_one();
    history.pop("a", "t2", Some("1"), 11_000, 11_005);
    history.ack("t2", 11_006, 11_007);
    // Leased at 100, run out at 10,100, and overtaken by the second delivery.
    assert_eq!(history.pop("a", "t1", Some("1"), 0, 11_050), Known::Acked);
    assert_eq!(history.judge(), GOOD);
    history.heartbeat("t1", 11_060);
    assert_eq!(history.judge(), DOUBLED);
}

#[test]
fn a_delivery_while_another_one_must_be_held_is_doubled() {
    let mut history = History::of_one();
    history.pop("a", "t1", Some("1"), 0, 5);
    history.pop("a", "t2", Some("1"), 0, 8_000);
    history.ack("t2", 8_001, 8_002);
    assert_eq!(history.judge(), DOUBLED);
}

#[test]
fn a_heartbeat_makes_a_task_held_for_longer() {
    for (extended, verdict) in [(false, GOOD), (true, DOUBLED)] {
        let mut history = History::of_one();
        history.pop("a", "t1", Some("1"), 0, 5);
        if extended {
            history.heartbeat("t1", 5_000);
        }
        history.pop("a", "t2", Some("1"), 10_100, 10_200);
        history.ack("t2", 10_201, 10_202);
        assert_eq!(history.judge(), verdict);
    }
}

#[test]
fn answers_that_overtake_each_other_are_no_fault() {
    let mut history = History::of_one();
    // t1 was leased at 100 and ran out; its answer comes after that of t2, within the lease of t2.
    history.pop("a", "t2", Some("1"), 10_200, 10_300);
    history.pop("a", "t1", Some("1"), 0, 10_400);
    history.ack("t2", 10_500, 10_600);
    assert_eq!(history.judge(), GOOD);
}

#[test]
fn an_older_delivery_that_heartbeats_or_acks_is_doubled() {
    for ack in [false, true] {
        let mut history = History::of_one();
        history.pop("a", "t1", Some("1"), 0, 5);
        history.pop("a", "t2", Some("1"), 20_000, 20_005);
        if ack {
            history.ack("t1", 20_010, 20_011);
        } else {
            history.heartbeat("t1", 20_010);
            history.ack("t2", 20_020, 20_021);
        }
        assert_eq!(history.judge(), DOUBLED);
    }
}

#[test]
fn a_call_of_an_older_delivery_begun_before_the_later_one_came_is_no_fault() {
    let mut history = History::of_one();
    history.pop("a", "t1", Some("1"), 0, 5);
    // Begun at 9,999, and it took long: the lease was extended, ran out again, and the task was delivered.
    history.pop("a", "t2", Some("1"), 30_000, 30_005);
    history.heartbeat("t1", 9_999);
    history.ack("t2", 30_010, 30_011);
    assert_eq!(history.judge(), GOOD);
}

#[test]
fn a_token_that_comes_twice_is_doubled() {
    let mut history = History::of_one();
    history.pop("a", "t1", Some("1"), 0, 5);
    history.pop("a", "t1", Some("1"), 30_000, 30_005);
    history.ack("t1", 30_006, 30_007);
    assert_eq!(history.judge(), DOUBLED);
}

#[test]
fn an_id_that_two_inserts_answered_with_is_doubled_and_one_is_missing() {
    let mut history = History::of_one();
    history.record.inserted("a", "1".into());
    history.pop("a", "t1", Some("1"), 0, 5);
    history.ack("t1", 6, 7);
    assert_eq!(history.judge(), (1, 1, 0));
}

#[test]
fn a_value_that_differs_by_a_byte_is_unexpected() {
    for text in [Some("1 "), Some("2"), Some(""), None] {
        let mut history = History::of_one();
        history.pop("a", "t1", text, 0, 5);
        history.ack("t1", 6, 7);
        assert_eq!(history.judge(), UNEXPECTED, "{text:?}");
    }
}

#[test]
fn a_damaged_task_is_unexpected_and_not_waited_for() {
    let mut history = History::of_one();
    history.record.damaged("a");
    assert!(history.record.is_settled());
    assert_eq!(history.judge(), (1, 0, 1));
}

#[test]
fn a_task_of_nobody_is_unexpected_once_all_inserts_are_answered() {
    let mut history = History::empty();
    assert_eq!(history.pop("x", "t1", Some("1"), 0, 5), Known::No);
    assert_eq!(history.judge(), GOOD);
    history.record.complete();
    assert_eq!(history.judge(), UNEXPECTED);
}

#[test]
fn a_task_may_be_delivered_before_its_insert_is_answered() {
    for (value, unexpected) in [("1", 0), ("2", 1)] {
        let mut history = History::empty();
        assert_eq!(history.pop("a", "t1", Some("1"), 0, 5), Known::No);
        history.record.inserted("a", value.into());
        history.record.complete();
        assert_eq!(history.record.is_settled(), unexpected == 1);
        assert_eq!(history.pop("a", "t2", Some(value), 10_000, 10_005), Known::Inserted);
        history.ack("t2", 10_006, 10_007);
        assert_eq!(history.judge(), (0, 0, unexpected));
    }
}

#[test]
fn bytes_are_open_until_their_task_is_settled() {
    let mut history = History::of_one();
    history.record.inserted("b", "12345".into());
    assert_eq!(history.record.open_bytes(), 6);
    history.pop("a", "t1", Some("1"), 0, 5);
    history.ack("t1", 6, 7);
    assert_eq!(history.record.open_bytes(), 5);
    history.record.damaged("b");
    assert_eq!(history.record.open_bytes(), 0);
}

#[test]
fn the_table_tells_all_counts_and_the_first_faults() {
    let mut history = History::of_one();
    for n in 0..100 {
        history.record.damaged(&format!("x{n}"));
    }
    let table = history.record.verdict().to_string();
    for name in ["inserted", "deliveries", "redeliveries", "acked", "missing", "doubled", "unexpected", "lease lost"] {
        assert!(table.lines().any(|line| line.starts_with(name)), "{table}");
    }
    assert_eq!(table.lines().count(), 8 + FAULTS_TOLD);
}

/// The md5 of `1`.
const MD5_OF_1: &str = "c4ca4238a0b923820dcc509a6f75849b";

#[test]
fn lines_of_other_programs_may_come_late_and_in_any_order() {
    let mut history = History::empty();
    history.told("a", "t2", MD5_OF_1, 30_000);
    history.told_acked("t2", 30_000);
    history.told_acked("t2", 30_001);
    history.told("a", "t1", MD5_OF_1, 40_000);
    history.record.inserted("a", "1".into());
    history.record.complete();
    assert!(history.record.is_settled());
    assert_eq!(history.judge(), GOOD);
}

#[test]
fn what_other_programs_tell_is_judged_too() {
    let of = |tell: fn(&mut History)| {
        let mut history = History::of_one();
        history.told("a", "t1", MD5_OF_1, 5);
        tell(&mut history);
        history.judge()
    };
    assert_eq!(of(|history| history.told_acked("t1", 6)), GOOD);
    assert_eq!(of(|_| ()), MISSING);
    assert_eq!(
        of(|history| {
            history.told("a", "t2", MD5_OF_1, 6);
            history.told_acked("t1", 7);
            history.told_acked("t2", 8);
        }),
        DOUBLED
    );
    assert_eq!(
        of(|history| {
            history.told("a", "t1", MD5_OF_1, 6);
            history.told_acked("t1", 7);
        }),
        DOUBLED
    );
    assert_eq!(
        of(|history| {
            history.told("a", "t2", "c4ca4238a0b923820dcc509a6f75849c", 6);
            history.told_acked("t2", 7);
        }),
        UNEXPECTED
    );
    assert_eq!(
        of(|history| {
            history.told("b", "t2", MD5_OF_1, 6);
            history.told_acked("t1", 7);
        }),
        UNEXPECTED
    );
    let mut early = History::empty();
    early.told("a", "t1", "c4ca4238a0b923820dcc509a6f75849c", 5);
    early.told_acked("t1", 6);
    early.record.inserted("a", "1".into());
    early.record.complete();
    assert_eq!(early.judge(), UNEXPECTED);
}
