//! What administration does on Redis.

use std::collections::BTreeSet;

use bb8_redis::redis::Value;

use super::{
    NAMES_PER_STEP, RECLAIM_ROUNDS, Unspread,
    answer::{self, Changed, bytes, changed, page, seen, seen_by_id, unreadable},
    call_id, fitness,
    gather::Job,
    script::{self, Call, Sources},
};
use crate::store::{
    Counts, Deleted, Description, Insert, Inserted, MAX_PRIORITY, PAGE_BYTES, Place, QueueName, RECLAIM_STEP,
    ReapCursor, Redriven, Seen, State, StoreError, Survives, TaskId, TaskPage,
    lanes::{Lane, Load},
};

/// How many tasks are read by id in one step: their envelopes may be large.
const SEEN_AT_ONCE: usize = 16;

impl Unspread {
    /// And the generation of the settings.
    pub(super) async fn counts_of(&self, queue: &QueueName) -> Result<(Option<Counts>, u64), StoreError> {
        for round in 0..=RECLAIM_ROUNDS {
            let counts: Vec<i64> = self.run(self.call(&script::COUNTS, queue)).await?;
            let [more, exists, numbers @ .., age, paused, generation] = counts.as_slice() else {
                return Err(unreadable());
            };
            if *more == 0 || round == RECLAIM_ROUNDS {
                let numbers = numbers.iter().map(|number| u64::try_from(*number).unwrap_or(0)).collect::<Vec<_>>();
                let [ready, scheduled, leased, dead, inserted, acked, expired, deleted, purged] = numbers[..] else {
                    return Err(unreadable());
                };
                let (oldest_ready, paused) = (u64::try_from(*age).ok(), *paused == 1);
                let generation = u64::try_from(*generation).unwrap_or(0);
                let counts = Counts {
                    ready,
                    scheduled,
                    leased,
                    dead,
                    inserted,
                    acked,
                    expired,
                    deleted,
                    purged,
                    oldest_ready,
                    paused,
                };
                return Ok(((*exists == 1).then_some(counts), generation));
            }
        }
        Ok((None, 0))
    }

    /// A queue that has to be left out of a list is told to the log the first time.
    pub(super) fn note_left_out(&self, queue: &QueueName, counts: &Result<Option<Counts>, StoreError>) {
        let news = self.shared.known(|known| match counts {
            Err(StoreError::Broken(_)) => known.left_out.insert(queue.clone()),
            Ok(_) => {
                known.left_out.remove(queue);
                false
            }
            Err(_) => false,
        });
        if let (true, Err(StoreError::Broken(cause))) = (news, counts) {
            tracing::warn!(?queue, cause, "lists of queues leave out one whose data cannot be read");
        }
    }

    /// Does all that its time has come for, in steps.
    pub(super) async fn reclaim(&self, queue: &QueueName) -> Result<(), StoreError> {
        while self.look_once(queue, 0).await?.more {}
        Ok(())
    }

    /// Runs a script that has to be called again as long as it answers that it is not ready.
    async fn until_ready<T>(
        &self,
        call: Call,
        read: impl Fn(Value) -> Result<Option<T>, StoreError>,
    ) -> Result<T, StoreError> {
        loop {
            if let Some(answer) = read(self.run(call.clone()).await?)? {
                return Ok(answer);
            }
        }
    }

    /// Does something to tasks by id, of which a second run has to answer as the first; a digit tells of each what became of it.
    async fn of_each<T>(
        &self,
        script: &'static Sources,
        queue: &QueueName,
        ids: &[TaskId],
        read: fn(u8) -> Option<T>,
    ) -> Result<Vec<T>, StoreError> {
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let call = self.call(script, queue).ids(ids).arg(call_id()?);
        let digits = |value: Value| match bytes(&value)? {
            [] => Ok(None),
            digits => digits.iter().copied().map(read).collect::<Option<Vec<T>>>().ok_or_else(unreadable).map(Some),
        };
        self.until_ready(call, digits).await
    }
}

/// A step on settings.
pub(super) struct Step<'a> {
    /// As `change.lua` has it.
    pub(super) what: &'static str,
    /// The generation that the settings have.
    pub(super) before: u64,
    /// The one that they get.
    pub(super) after: u64,
    pub(super) only_empty: bool,
    pub(super) values: &'a [(&'static str, Option<u64>)],
}

/// What became of a queue that was to be dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dropped {
    Unknown,
    Gone,
    NotEmpty,
    OtherGeneration,
}

/// As the scripts name it.
fn name_of(state: State) -> &'static str {
    match state {
        State::Ready => "ready",
        State::Scheduled => "scheduled",
        State::Leased => "leased",
        State::Dead => "dead",
    }
}

/// In front of what a script knows a place by there is the state.
fn place(state: State, place: &[u8]) -> Place {
    [&[letter(state)], place].concat()
}

fn letter(state: State) -> u8 {
    name_of(state).as_bytes()[0]
}

fn within(state: State, place: &Place) -> Result<&[u8], StoreError> {
    let (first, place) = place.split_first().ok_or(StoreError::PlaceUnknown)?;
    let is_one = match state {
        // A number below 2^53, which is what a script can count to.
        State::Ready => place.len() == 9 && place[0] <= MAX_PRIORITY && place[1] == 0 && place[2] < 32,
        State::Scheduled => place.len() == 32,
        State::Leased => place.len() == 16,
        State::Dead => place.len() == 24,
    };
    if is_one && *first == letter(state) { Ok(place) } else { Err(StoreError::PlaceUnknown) }
}

/// What [`Admin`](crate::store::Admin) has, for a shard.
impl Unspread {
    pub(super) async fn queues(&self, after: Option<&QueueName>, max: usize) -> Result<Vec<QueueName>, StoreError> {
        self.within_timeout(async {
            let mut first = BTreeSet::new();
            let mut cursor = ReapCursor::default();
            loop {
                let (next, names) = self.registered_in(cursor, NAMES_PER_STEP).await?;
                first.extend(names.into_iter().filter(|name| after.is_none_or(|after| name > after)));
                while first.len() > max {
                    first.pop_last();
                }
                cursor = next;
                if cursor == ReapCursor::default() {
                    return Ok(first.into_iter().collect());
                }
            }
        })
        .await
    }

    /// What is set.
    pub(super) async fn settings(&self, queue: &QueueName) -> Result<Changed, StoreError> {
        changed(self.run(self.call(&script::CHANGE, queue).arg("read")).await?)
    }

    /// A step on settings, of a queue or of a shard, as `change.lua` has it.
    pub(super) async fn change(&self, queue: &QueueName, step: &Step<'_>) -> Result<Changed, StoreError> {
        let changing = self.within_timeout(async {
            if step.what == "change" {
                self.register_before_insert(queue).await?;
            }
            let call = self.call(&script::CHANGE, queue).arg(step.what).arg(step.before).arg(step.after);
            let call = call.arg(u8::from(step.only_empty));
            let call = step.values.iter().fold(call, |call, (name, value)| {
                call.arg(name).arg(value.map_or_else(String::new, |value| value.to_string()))
            });
            changed(self.run(call).await?)
        });
        let answer = self.doubt(queue, changing.await)?;
        if answer.made {
            self.register_made(queue).await;
        }
        Ok(answer)
    }

    /// Measures what has come under a limit of bytes.
    pub(super) async fn measure(&self, queue: &QueueName) -> Result<(), StoreError> {
        self.within_timeout(async {
            while self.settings(queue).await?.more {}
            Ok(())
        })
        .await
    }

    pub(super) async fn list(
        &self,
        queue: &QueueName,
        state: State,
        after: Option<&Place>,
        max: usize,
    ) -> Result<Option<TaskPage>, StoreError> {
        let after = after.map(|place| within(state, place)).transpose()?.unwrap_or_default();
        self.within_timeout(async {
            self.reclaim(queue).await?;
            let call = self.call(&script::LIST, queue).arg(name_of(state)).arg(after).arg(max).arg(PAGE_BYTES);
            let (exists, next, tasks): (bool, Vec<u8>, Vec<Value>) = page(self.run(call).await?)?;
            let tasks = tasks.into_iter().filter(|task| matches!(task, Value::Array(_)));
            let tasks = tasks.map(|task| seen(task, state)).collect::<Result<_, _>>()?;
            let next = (!next.is_empty()).then(|| place(state, &next));
            Ok(exists.then_some(TaskPage { tasks, next }))
        })
        .await
    }

    pub(super) async fn tasks(&self, queue: &QueueName, ids: &[TaskId]) -> Result<Vec<Option<Seen>>, StoreError> {
        self.within_timeout(async {
            self.reclaim(queue).await?;
            let mut all = Vec::with_capacity(ids.len());
            for step in ids.chunks(SEEN_AT_ONCE) {
                all.extend(self.until_ready(self.call(&script::TASKS, queue).ids(step), seen_by_id).await?);
            }
            Ok(all)
        })
        .await
    }

    pub(super) async fn delete(&self, queue: &QueueName, ids: &[TaskId]) -> Result<Vec<Deleted>, StoreError> {
        self.within_timeout(async {
            self.reclaim(queue).await?;
            let deleted = |digit| match digit {
                b'1' => Some(Deleted::Gone),
                b'2' => Some(Deleted::Cancelled),
                b'3' => Some(Deleted::Unknown),
                _ => None,
            };
            self.of_each(&script::DELETE, queue, ids, deleted).await
        })
        .await
    }

    pub(super) async fn redrive(&self, queue: &QueueName, ids: &[TaskId]) -> Result<Vec<Redriven>, StoreError> {
        let redriven = |digit| match digit {
            b'1' => Some(Redriven::Ready),
            b'2' => Some(Redriven::Duplicate),
            b'3' => Some(Redriven::Expired),
            b'4' => Some(Redriven::Unknown),
            _ => None,
        };
        self.within_timeout(self.of_each(&script::REDRIVE, queue, ids, redriven)).await
    }

    pub(super) async fn import(
        &self,
        queue: &QueueName,
        inserts: Vec<Insert>,
    ) -> Result<Vec<Result<Inserted, StoreError>>, StoreError> {
        let tasks = || inserts.iter().flat_map(|insert| &insert.tasks);
        let load = Load::new(tasks().count(), tasks().map(|task| task.envelope.len()).sum());
        let importing = self.within_timeout(async {
            // What has ended is not there any more.
            self.reclaim(queue).await?;
            self.register_before_insert(queue).await?;
            let call = script::insert(self.call(&script::INSERT, queue), queue.shard(), inserts.iter());
            let lane = Lane::Ordinary(Some(queue.clone()));
            let (answer, _) = self.gatherer.run(lane, queue, call, |asks| Job::Script(asks, load)).await?;
            answer::inserts(answer, &inserts)
        });
        let answers = self.doubt(queue, importing.await)?;
        if answers.iter().flatten().any(|answer| answer.made) {
            self.register_made(queue).await;
        }
        Ok(answers.into_iter().map(|answer| answer.map(|done| done.inserted)).collect())
    }

    pub(super) async fn purge(&self, queue: &QueueName, state: State) -> Result<u64, StoreError> {
        self.within_timeout(async {
            self.reclaim(queue).await?;
            let call = self.call(&script::PURGE, queue).arg(name_of(state)).arg(RECLAIM_STEP);
            self.run(call.arg(call_id()?)).await
        })
        .await
    }

    /// Drops a queue, or a shard, into which nothing is inserted then before it is opened by a later generation.
    pub(super) async fn drop_queue(
        &self,
        queue: &QueueName,
        force: bool,
        generation: Option<u64>,
        fence: Option<u64>,
    ) -> Result<Dropped, StoreError> {
        let text = |number: Option<u64>| number.map_or_else(String::new, |number| number.to_string());
        let dropping = self.within_timeout(async {
            self.reclaim(queue).await?;
            let call = self.call(&script::DROP, queue).arg(u8::from(force)).arg(call_id()?);
            self.run::<u64>(call.arg(text(generation)).arg(text(fence))).await
        });
        Ok(match dropping.await? {
            0 => Dropped::Unknown,
            1 => Dropped::Gone,
            2 => Dropped::NotEmpty,
            _ => Dropped::OtherGeneration,
        })
    }

    pub(super) fn describe(&self) -> Description {
        match self.shared.known(|known| known.report.clone()) {
            Some(report) => Description {
                engine: format!("Redis {}", report.version),
                survives: report.survives,
                note: report.note.to_owned(),
            },
            None => Description {
                engine: "Redis".to_owned(),
                survives: Survives::ServerKill,
                note: fitness::UNKNOWN.to_owned(),
            },
        }
    }
}
