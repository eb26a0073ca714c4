//! How one queue goes from one server to another: a page is listed at the source, imported at the target, and deleted at the source.
//! While one page is imported the next one is listed, and the one before deleted; imports follow one another, so the order stays.
//!
//! Between its import and its delete a task is at both servers. If this program dies then, the next run lists the task again, and the
//! target knows it.

use std::{
    collections::{HashSet, VecDeque},
    time::Duration,
};

use data_queue_client::{Error, ErrorKind, Page, QueueSettings, TaskInfo, TaskState, TaskValue};
use indicatif::ProgressBar;
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};

use super::ends::{Ends, PAGE, Trouble};
use crate::Stop;

/// The most bytes of values that are imported together, unless it is one; a server reads 4 MiB unless it says otherwise.
const MAX_BYTES: usize = 2 << 20;
/// How often held tasks are looked for.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// So many refusals are told one by one.
const MAX_TOLD: usize = 20;

/// What went, and what stays.
#[derive(Clone, Copy, Default)]
pub(super) struct Moved {
    pub(super) ready: u64,
    pub(super) scheduled: u64,
    pub(super) dead: u64,
    pub(super) duplicates: u64,
    pub(super) refused: u64,
    pub(super) held: u64,
}

/// One queue on its way.
pub(super) struct Moving<'a> {
    ends: &'a Ends,
    queue: &'a str,
    force: bool,
    wait: Duration,
    stopped: watch::Receiver<bool>,
    bar: ProgressBar,
    moved: Moved,
    told: HashSet<String>,
    is_checked: bool,
}

/// What became of a page.
#[derive(Default)]
struct Imports {
    /// The target has them.
    there: Vec<String>,
    duplicates: u64,
    /// By their ids, and why.
    refused: Vec<(String, String)>,
}

impl<'a> Moving<'a> {
    pub(super) fn new(
        ends: &'a Ends,
        queue: &'a str,
        force: bool,
        wait: Duration,
        stopped: watch::Receiver<bool>,
        bar: ProgressBar,
    ) -> Self {
        let (moved, told) = (Moved::default(), HashSet::new());
        Self { ends, queue, force, wait, stopped, bar, moved, told, is_checked: false }
    }

    pub(super) fn moved(&self) -> Moved {
        self.moved
    }

    pub(super) async fn run(&mut self) -> Result<(), Stop> {
        let (ends, queue) = (self.ends, self.queue);
        let before = ends.known(queue).await.map_err(Trouble::stop)?;
        self.set(&before.settings.unwrap_or_default()).await.map_err(Trouble::stop)?;
        ends.pause(queue).await.map_err(Trouble::stop)?;
        let ended = self.empty().await;
        self.bar.finish_and_clear();
        let source = ends.source();
        match ended {
            Err(Trouble { why, is_in_doubt: true }) => Err(Stop::failed(format!(
                "{why}; {queue} stays paused at {source}, since the tasks under way may be at both servers: run it again, \
                 within 5 minutes if the target has workers"
            ))),
            ended if before.counts.paused => {
                eprint(&format!("{queue} is still paused at {source}, as it was before"));
                ended.map_err(Trouble::stop)
            }
            ended => {
                let resumed = ends.resume(queue).await;
                ended.map_err(Trouble::stop)?;
                resumed.map_err(|Trouble { why, .. }| {
                    Stop::failed(format!("{why}; {queue} is still paused at {source}: data-queue resume {queue}"))
                })
            }
        }
    }

    /// Gives the target the settings of the source, if it has nothing that was inserted under others.
    async fn set(&self, settings: &QueueSettings) -> Result<(), Trouble> {
        let mut wanted = settings.clone();
        if let Some(taken) = self.ends.taken(self.queue).await? {
            let has = taken.settings.unwrap_or_default();
            wanted.paused = has.paused;
            if has == wanted {
                return Ok(());
            }
            let counts = taken.counts;
            if counts.ready + counts.scheduled + counts.leased + counts.dead > 0 && !self.force {
                let (queue, target) = (self.queue, self.ends.target());
                return Err(Trouble::clear(format!(
                    "{queue} has tasks and other settings at {target}: make them the same, or say --force to give it those of the source; \
                     nothing was moved"
                )));
            }
        }
        self.ends.set(self.queue, &wanted).await
    }

    /// Goes through the queue again and again, until nothing goes any more.
    async fn empty(&mut self) -> Result<(), Trouble> {
        let mut limit = None;
        loop {
            (self.moved.duplicates, self.moved.refused) = (0, 0);
            let mut went = 0;
            for state in [TaskState::Dead, TaskState::Scheduled, TaskState::Ready] {
                went += self.pass(state).await?;
                if *self.stopped.borrow() {
                    return Err(Trouble::clear(format!("ended before all of {} was moved: run it again", self.queue)));
                }
            }
            if went == 0 && !self.wait_for_more(&mut limit).await? {
                return Ok(());
            }
        }
    }

    /// Waits until some of what workers hold may have come back. False if nothing is left that could go.
    async fn wait_for_more(&mut self, limit: &mut Option<Instant>) -> Result<bool, Trouble> {
        let limit = *limit.get_or_insert_with(|| Instant::now() + self.wait);
        loop {
            let counts = self.ends.known(self.queue).await?.counts;
            self.moved.held = counts.leased;
            // It was held, or not there, when its state was looked through.
            let is_more = counts.ready + counts.scheduled + counts.dead > self.moved.duplicates + self.moved.refused;
            if !is_more && (counts.leased == 0 || Instant::now() >= limit) {
                return Ok(false);
            }
            tokio::select! {
                () = sleep(LOOK_AGAIN) => {}
                _ = self.stopped.wait_for(|stopped| *stopped) => return Ok(true),
            }
            if is_more {
                return Ok(true);
            }
        }
    }

    /// Goes through the tasks of a state once; answers how many went.
    async fn pass(&mut self, state: TaskState) -> Result<u64, Trouble> {
        let (ends, queue) = (self.ends, self.queue);
        let mut went = 0;
        let mut next = Some(Page::first().size(PAGE));
        let (mut listed, mut there) = (Vec::new(), Vec::new());
        let mut failed = Ok(());
        loop {
            let page = next.take().filter(|_| !*self.stopped.borrow());
            let list = async {
                match &page {
                    Some(page) => ends.list(queue, state, page).await,
                    None => Ok((Vec::new(), None)),
                }
            };
            let (deleted, imported, found) =
                tokio::join!(ends.delete(queue, &there), import(ends, queue, listed), list);
            self.note_held(deleted?);
            let imports = imported?;
            let some = imports.there.len() as u64;
            went += some;
            self.note(state, some, &imports);
            there = imports.there;
            // What is there already is deleted in any case.
            (listed, next) = match found {
                Ok(found) => found,
                Err(trouble) => {
                    failed = Err(trouble);
                    (Vec::new(), None)
                }
            };
            if let Err(trouble) = self.check(&listed).await {
                failed = Err(trouble);
                (listed, next) = (Vec::new(), None);
            }
            if listed.is_empty() && there.is_empty() && next.is_none() {
                return failed.map(|()| went);
            }
        }
    }

    /// Makes sure, once, that tasks are not moved in a circle.
    async fn check(&mut self, listed: &[TaskInfo]) -> Result<(), Trouble> {
        let Some(first) = listed.first().filter(|_| !self.is_checked) else { return Ok(()) };
        if self.ends.is_shared(self.queue, &first.id).await? {
            return Err(Trouble::clear(format!(
                "{} and {} have the same store, or one is a copy of the other's: {} has task {} at both; nothing was moved",
                self.ends.source(),
                self.ends.target(),
                self.queue,
                first.id
            )));
        }
        self.is_checked = true;
        Ok(())
    }

    fn note(&mut self, state: TaskState, went: u64, imports: &Imports) {
        match state {
            TaskState::Dead => self.moved.dead += went,
            TaskState::Scheduled => self.moved.scheduled += went,
            TaskState::Ready | TaskState::Leased => self.moved.ready += went,
        }
        self.bar.inc(went);
        self.moved.duplicates += imports.duplicates;
        self.moved.refused += imports.refused.len() as u64;
        for (id, why) in &imports.refused {
            if self.told.len() < MAX_TOLD && self.told.insert(id.clone()) {
                eprint(&format!("{} {id}: {why}", self.queue));
            }
        }
    }

    fn note_held(&self, held: usize) {
        if held > 0 {
            eprint(&format!(
                "{held} tasks of {} were delivered at {} while they were moved: their workers are told, and may do what the target's do \
                 again; was it resumed?",
                self.queue,
                self.ends.source()
            ));
        }
    }
}

fn eprint(line: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "data-queue: {}", line.replace('\n', " "));
}

/// Imports a page, in parts that a server reads. What it refuses stays.
async fn import(ends: &Ends, queue: &str, tasks: Vec<TaskInfo>) -> Result<Imports, Trouble> {
    let mut imports = Imports::default();
    let (damaged, whole): (Vec<_>, Vec<_>) = tasks.into_iter().partition(|task| task.is_damaged);
    imports.refused = damaged.into_iter().map(|task| (task.id, "its value is damaged".to_owned())).collect();
    let mut parts = parts(whole);
    while let Some(mut part) = parts.pop_front() {
        let error = match ends.import(queue, &part).await {
            Ok(results) => {
                for (task, result) in part.into_iter().zip(results) {
                    imports.duplicates += u64::from(result.duplicate);
                    imports.there.extend((!result.duplicate).then_some(task.id));
                }
                continue;
            }
            Err(error) => error,
        };
        match refused(&error, &part) {
            Some(at) => {
                let task = part.remove(at);
                imports.refused.push((task.id, error.to_string()));
            }
            None if error.kind() == ErrorKind::MessageTooLarge => {
                let rest = part.split_off(part.len() / 2);
                parts.push_front(rest);
            }
            None => {
                return Err(Trouble {
                    is_in_doubt: !imports.there.is_empty() || ends.doubt(&error).is_in_doubt,
                    ..ends.doubt(&error)
                });
            }
        }
        if !part.is_empty() {
            parts.push_front(part);
        }
    }
    Ok(imports)
}

/// Which task of the part it is that is refused, if it is one.
fn refused(error: &Error, part: &[TaskInfo]) -> Option<usize> {
    let at = match error.kind() {
        ErrorKind::MessageTooLarge if part.len() == 1 => 0,
        ErrorKind::InvalidArgument | ErrorKind::RequestIdReused => {
            error.field()?.strip_prefix("tasks[")?.split_once(']')?.0.parse().ok()?
        }
        _ => return None,
    };
    (at < part.len()).then_some(at)
}

/// In their order.
fn parts(tasks: Vec<TaskInfo>) -> VecDeque<Vec<TaskInfo>> {
    let mut parts = VecDeque::new();
    let (mut part, mut bytes) = (Vec::new(), 0);
    for task in tasks {
        let size = size(&task);
        if bytes + size > MAX_BYTES && !part.is_empty() {
            parts.push_back(std::mem::take(&mut part));
            bytes = 0;
        }
        bytes += size;
        part.push(task);
    }
    if !part.is_empty() {
        parts.push_back(part);
    }
    parts
}

fn size(task: &TaskInfo) -> usize {
    let value = match &task.value {
        TaskValue::Json(text) => text.len(),
        TaskValue::Bytes(data) => data.len(),
    };
    let headers: usize = task.headers.iter().map(|(key, value)| key.len() + value.len()).sum();
    value + headers + task.last_error.len() + task.unique_key.len()
}
