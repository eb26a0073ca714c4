//! The books of queues with plans, failures and an operator: what callers sent and were told, and what was there in the end.
//! Pure, and without false alarms, as the other checker: of two events it takes an order as given only if one call was sent after
//! the other was answered. Times of tasks are compared with each other as the store's clock told them, so that it does not matter
//! how fast the machine is.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use data_queue_proto::v1::{DeadLetterCause, DeleteOutcome, QueueCounts, TaskInfo, TaskState};

/// When a call was first sent, and when it was answered in the end.
#[derive(Clone, Copy, Debug, Default)]
pub struct Span {
    pub sent: Duration,
    pub answered: Duration,
    /// Answered the first time: what it was told is all that it did.
    pub at_once: bool,
}

/// A task that was sent to be inserted, and what that was answered.
#[derive(Clone, Debug, Default)]
pub struct Inserted {
    pub id: String,
    pub duplicate: bool,
    pub delay: Duration,
    pub ttl: Option<Duration>,
    pub unique_key: String,
    pub span: Span,
}

/// A task that a worker received.
#[derive(Clone, Debug, Default)]
pub struct Given {
    pub id: String,
    pub deliveries: u32,
    pub failures: u32,
    pub expiries: u32,
    /// By the store's clock, both.
    pub inserted_at: Duration,
    pub at: Duration,
    pub span: Span,
}

/// What a worker did with a task.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Way {
    #[default]
    Ack,
    PutBack,
    Fail,
    Reject,
}

/// How a worker ended a delivery.
#[derive(Clone, Debug, Default)]
pub struct Ended {
    pub id: String,
    /// The number of the delivery.
    pub deliveries: u32,
    pub way: Way,
    /// Before this, by the store's clock, it must not come again, if this was done.
    pub not_before: Duration,
    pub applied: bool,
    pub span: Span,
}

/// All that happened in one queue.
#[derive(Clone, Debug, Default)]
pub struct Books {
    pub lease: Duration,
    pub max_failures: u32,
    pub max_expiries: u32,
    pub inserts: Vec<Inserted>,
    pub given: Vec<Given>,
    pub ended: Vec<Ended>,
    pub deletes: Vec<(String, DeleteOutcome, Span)>,
    /// With how many tasks each removed.
    pub purges: Vec<(u64, Span)>,
    pub redrives: Vec<Span>,
    /// From the answer to the pause until it was to end.
    pub pauses: Vec<(Duration, Duration)>,
    /// In the end, when nothing moved any more.
    pub left: Vec<TaskInfo>,
    pub counts: QueueCounts,
}

/// The store counts in milliseconds, and by another clock than the callers.
const MARGIN: Duration = Duration::from_millis(10);

/// A rule that was broken, and the task or key that shows it.
pub type Fault = (&'static str, String);

/// All that one task went through.
#[derive(Default)]
struct Life<'a> {
    given: Vec<&'a Given>,
    ended: Vec<&'a Ended>,
    deletes: Vec<(DeleteOutcome, Span)>,
    left: Vec<&'a TaskInfo>,
}

impl Life<'_> {
    fn any(&self, way: Way) -> impl Iterator<Item = &Ended> {
        self.ended.iter().copied().filter(move |ended| ended.way == way)
    }

    /// When it was known to be over for good.
    fn over(&self) -> Option<Duration> {
        let acked = self.any(Way::Ack).filter(|ended| ended.applied).map(|ended| ended.span.answered);
        let deleted = self.deletes.iter().filter(|(outcome, _)| *outcome == DeleteOutcome::Deleted);
        acked.chain(deleted.map(|(_, span)| span.answered)).min()
    }
}

impl Books {
    /// What is wrong with them.
    pub fn faults(&self) -> BTreeSet<Fault> {
        let mut faults = BTreeSet::new();
        let mut lives: BTreeMap<&str, Life> = BTreeMap::new();
        let mut tasks: BTreeMap<&str, &Inserted> = BTreeMap::new();
        for task in self.inserts.iter().filter(|task| !task.duplicate) {
            lives.entry(&task.id).or_default();
            if tasks.insert(&task.id, task).is_some() {
                faults.insert(("one id for two tasks", task.id.clone()));
            }
        }
        self.given.iter().for_each(|given| lives.entry(&given.id).or_default().given.push(given));
        self.ended.iter().for_each(|ended| lives.entry(&ended.id).or_default().ended.push(ended));
        for (id, outcome, span) in &self.deletes {
            if let Some(life) = lives.get_mut(id.as_str()) {
                life.deletes.push((*outcome, *span));
            }
        }
        for info in &self.left {
            lives.entry(&info.task.as_ref().expect("a task").id).or_default().left.push(info);
        }
        for (id, life) in &lives {
            let Some(task) = tasks.get(id) else {
                faults.insert(("there, and never inserted", (*id).to_owned()));
                continue;
            };
            self.life(task, life, &mut |rule| {
                faults.insert((rule, (*id).to_owned()));
            });
        }
        self.balance(&tasks, &lives, &mut faults);
        self.keys(&lives, &mut faults);
        faults
    }

    fn life(&self, task: &Inserted, life: &Life, fault: &mut impl FnMut(&'static str)) {
        let acks = life.any(Way::Ack).filter(|ended| ended.applied).count();
        if acks > 1 || acks == 1 && !life.left.is_empty() {
            fault("acked, and there again");
        }
        if life.left.len() > 1 {
            fault("in two states at once");
        }
        let deleted = life.deletes.iter().any(|(outcome, _)| *outcome == DeleteOutcome::Deleted);
        if deleted && (acks > 0 || !life.left.is_empty()) {
            fault("deleted, and there again");
        }
        let by_call = life.deletes.iter().map(|(_, span)| span).chain(self.purges.iter().map(|(_, span)| span));
        let may_be_removed = by_call.filter(|span| span.answered > task.span.sent).count() > 0;
        if acks == 0 && life.left.is_empty() && task.ttl.is_none() && !may_be_removed {
            fault("lost");
        }
        for given in &life.given {
            self.delivery(task, life, given, fault);
        }
        for info in &life.left {
            self.dead_letter(life, info, fault);
        }
    }

    fn delivery(&self, task: &Inserted, life: &Life, given: &Given, fault: &mut impl FnMut(&'static str)) {
        if given.at < given.inserted_at + task.delay {
            fault("delivered before it was due");
        }
        if task.ttl.is_some_and(|ttl| given.at >= given.inserted_at + ttl) {
            fault("delivered after its time was over");
        }
        if life.over().is_some_and(|over| given.span.sent > over) {
            fault("delivered after it was over");
        }
        if self.pauses.iter().any(|(from, to)| given.span.sent > *from && given.span.answered < *to) {
            fault("delivered while the queue was paused");
        }
        let before = || life.ended.iter().filter(|ended| ended.deliveries < given.deliveries);
        if before().any(|ended| ended.applied && given.at < ended.not_before) {
            fault("delivered before it was to come again");
        }
        let redriven =
            |since: Duration| self.redrives.iter().any(|it| it.answered > since && it.sent < given.span.answered);
        if before().any(|ended| ended.way == Way::Reject && ended.applied && !redriven(ended.span.sent)) {
            fault("delivered though it was dead");
        }
        let count = |ways: &[Way], sure: bool| {
            let counted = before().filter(|ended| ways.contains(&ended.way) && (ended.applied || !sure));
            u32::try_from(counted.count()).expect("few")
        };
        let (failed, rejected) = (count(&[Way::Fail], false), count(&[Way::Reject], false));
        // What came back otherwise did neither fail nor run out.
        let ended_otherwise = count(&[Way::PutBack, Way::Reject], true);
        let counted = given.failures + given.expiries;
        if given.failures > failed || counted + ended_otherwise + 1 > given.deliveries {
            fault("more was counted than happened");
        }
        let failed_for_sure = count(&[Way::Fail], true);
        let never_died = rejected == 0 && failed < self.max_failures && given.deliveries <= self.max_expiries;
        if never_died && given.failures < failed_for_sure {
            fault("a failure was not counted");
        }
        let numbered = life.given.iter().filter(|other| other.deliveries == given.deliveries);
        if numbered.count() > 1 {
            fault("two deliveries of one number");
        }
        let later = life.given.iter().filter(|other| other.deliveries > given.deliveries);
        if later.into_iter().any(|other| other.at < given.at) {
            fault("deliveries out of order");
        }
    }

    fn dead_letter(&self, life: &Life, info: &TaskInfo, fault: &mut impl FnMut(&'static str)) {
        let task = info.task.as_ref().expect("a task");
        let is_right = match info.cause() {
            DeadLetterCause::Unspecified => info.state() != TaskState::Dead,
            DeadLetterCause::MaxFailures => task.failures >= self.max_failures,
            DeadLetterCause::MaxExpiries => task.expiries >= self.max_expiries,
            DeadLetterCause::Rejected => life.any(Way::Reject).count() > 0,
        };
        if !is_right || info.cause() != DeadLetterCause::Unspecified && info.state() != TaskState::Dead {
            fault("dead for no reason");
        }
    }

    /// Every task is in one place or gone in one way, and the counts say the same.
    fn balance(&self, tasks: &BTreeMap<&str, &Inserted>, lives: &BTreeMap<&str, Life>, faults: &mut BTreeSet<Fault>) {
        let counts = &self.counts;
        let number = |count: usize| u64::try_from(count).expect("a count");
        let in_state = |state: TaskState| number(self.left.iter().filter(|info| info.state() == state).count());
        let is_acked = |life: &Life| life.any(Way::Ack).any(|ended| ended.applied);
        let acked = number(lives.values().filter(|life| is_acked(life)).count());
        let gone = lives.iter().filter(|(_, life)| !is_acked(life) && life.left.is_empty()).collect::<Vec<_>>();
        let deleted = |life: &Life| life.deletes.iter().any(|(outcome, _)| *outcome == DeleteOutcome::Deleted);
        let surely_deleted = number(gone.iter().filter(|(_, life)| deleted(life)).count());
        let perhaps_deleted = number(gone.iter().filter(|(_, life)| !life.deletes.is_empty()).count());
        let had_end = |id: &str| tasks.get(id).is_some_and(|task| task.ttl.is_some());
        let perhaps_expired = number(gone.iter().filter(|(id, _)| had_end(id)).count());
        let purged = self.purges.iter().map(|(count, _)| *count).sum::<u64>();
        let all_told = self.purges.iter().all(|(_, span)| span.at_once);
        let rules = [
            ("inserted", counts.inserted == number(tasks.len())),
            ("acked", counts.acked == acked),
            ("ready", counts.ready == in_state(TaskState::Ready)),
            ("scheduled", counts.scheduled == in_state(TaskState::Scheduled)),
            ("leased", counts.leased == in_state(TaskState::Leased)),
            ("dead", counts.dead == in_state(TaskState::Dead)),
            ("gone", counts.expired + counts.deleted + counts.purged == number(gone.len())),
            ("deleted", (surely_deleted..=perhaps_deleted).contains(&counts.deleted)),
            ("expired", counts.expired <= perhaps_expired),
            ("purged", counts.purged >= purged && (counts.purged == purged || !all_told)),
        ];
        for (name, _) in rules.iter().filter(|(_, is_right)| !is_right) {
            let told = format!(
                "{counts:?}; {} tasks, {acked} acked, {} gone, {surely_deleted} to {perhaps_deleted} deleted, \
                 at most {perhaps_expired} expired, {purged} purged",
                tasks.len(),
                gone.len()
            );
            faults.insert((*name, told));
        }
    }

    /// No key is held by two tasks that live, and a duplicate names a task that has its key.
    fn keys(&self, lives: &BTreeMap<&str, Life>, faults: &mut BTreeSet<Fault>) {
        let mut by_key: BTreeMap<&str, Vec<&Inserted>> = BTreeMap::new();
        for task in self.inserts.iter().filter(|task| !task.unique_key.is_empty()) {
            by_key.entry(&task.unique_key).or_default().push(task);
        }
        for tasks in by_key.values() {
            for one in tasks.iter().filter(|task| !task.duplicate) {
                let life = &lives[one.id.as_str()];
                let surely_until = self.lives_until(one, life);
                for other in tasks.iter().filter(|other| other.span.sent > one.span.answered) {
                    if !other.duplicate && other.span.answered < surely_until {
                        faults.insert(("a key of two tasks at once", one.id.clone()));
                    }
                    if other.duplicate && other.id == one.id && life.over().is_some_and(|over| over < other.span.sent) {
                        faults.insert(("a duplicate of what was over", one.id.clone()));
                    }
                }
            }
            let holders = tasks.iter().filter(|task| !task.duplicate).map(|task| &task.id).collect::<BTreeSet<_>>();
            for task in tasks.iter().filter(|task| task.duplicate && !holders.contains(&task.id)) {
                faults.insert(("a duplicate of another key", task.id.clone()));
            }
        }
        let mut held = BTreeSet::new();
        let alive = self.left.iter().filter(|info| info.state() != TaskState::Dead && !info.unique_key.is_empty());
        for info in alive {
            if !held.insert(&info.unique_key) {
                faults.insert(("a key of two tasks that are left", info.unique_key.clone()));
            }
        }
    }

    /// Before this the task cannot have ended, nor died, for the first time.
    fn lives_until(&self, task: &Inserted, life: &Life) -> Duration {
        let over_at_once = life.any(Way::Ack).chain(life.any(Way::Reject)).map(|ended| ended.span.sent);
        let mut failed = life.any(Way::Fail).map(|ended| ended.span.sent).collect::<Vec<_>>();
        failed.sort_unstable();
        let failed_too_often = failed.into_iter().skip(self.max_failures.saturating_sub(1) as usize);
        let ended = over_at_once.chain(failed_too_often);
        let deleted = life.deletes.iter().map(|(_, span)| span.sent);
        let purged = self.purges.iter().filter(|(_, it)| it.answered > task.span.sent).map(|(_, it)| it.sent);
        let over = task.ttl.map(|ttl| task.span.sent + ttl);
        // A call that was not answered may lease a task, too, again and again.
        let run_out = task.span.sent + self.lease * self.max_expiries;
        let by_time = over.into_iter().chain([run_out]).map(|at| at.saturating_sub(MARGIN));
        ended.chain(deleted).chain(purged).chain(by_time).min().expect("one at least")
    }

    /// All that is known of a task, for people.
    pub fn about(&self, id: &str) -> String {
        let mut lines = Vec::new();
        lines.extend(self.inserts.iter().filter(|it| it.id == id).map(|it| (it.span.sent, format!("{it:?}"))));
        lines.extend(self.given.iter().filter(|it| it.id == id).map(|it| (it.span.sent, format!("{it:?}"))));
        lines.extend(self.ended.iter().filter(|it| it.id == id).map(|it| (it.span.sent, format!("{it:?}"))));
        lines.extend(self.deletes.iter().filter(|it| it.0 == id).map(|it| (it.2.sent, format!("{it:?}"))));
        lines.sort();
        let named = |info: &&TaskInfo| info.task.as_ref().is_some_and(|task| task.id == id);
        let left = self.left.iter().filter(named).map(|info| format!("    left: {info:?}\n"));
        lines.into_iter().map(|(_, line)| format!("    {line}\n")).chain(left).collect()
    }
}
