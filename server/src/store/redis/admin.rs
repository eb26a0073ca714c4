//! What administration does on Redis.

use std::collections::BTreeSet;

use async_trait::async_trait;
use bb8_redis::redis::Value;
use futures_util::future;

use super::{
    NAMES_PER_STEP, RECLAIM_ROUNDS, RedisStore,
    answer::{self, bytes, changed, page, seen, seen_by_id, unreadable},
    call_id, fitness,
    gather::Job,
    script::{self, Call, Sources},
    unless_broken,
};
use crate::store::{
    Admin, Counts, Deleted, Description, Insert, Inserted, MAX_PRIORITY, PAGE_BYTES, Place, QueueName, RECLAIM_STEP,
    ReapCursor, Redriven, Seen, Setting, Settings, State, StoreError, Survives, TaskId, TaskPage,
    lanes::{Lane, Load},
};

/// How many tasks are read by id in one step: their envelopes may be large.
const SEEN_AT_ONCE: usize = 16;

impl RedisStore {
    async fn counts_of(&self, queue: &QueueName) -> Result<Option<Counts>, StoreError> {
        for round in 0..=RECLAIM_ROUNDS {
            let counts: Vec<i64> = self.run(self.call(&script::COUNTS, queue)).await?;
            let [more, exists, numbers @ .., age, paused] = counts.as_slice() else { return Err(unreadable()) };
            if *more == 0 || round == RECLAIM_ROUNDS {
                let numbers = numbers.iter().map(|number| u64::try_from(*number).unwrap_or(0)).collect::<Vec<_>>();
                let [ready, scheduled, leased, dead, inserted, acked, expired, deleted, purged] = numbers[..] else {
                    return Err(unreadable());
                };
                let (oldest_ready, paused) = (u64::try_from(*age).ok(), *paused == 1);
                return Ok((*exists == 1).then_some(Counts {
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
                }));
            }
        }
        Ok(None)
    }

    /// A queue that has to be left out of a list is told to the log the first time.
    fn note_left_out(&self, queue: &QueueName, counts: &Result<Option<Counts>, StoreError>) {
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
    async fn reclaim(&self, queue: &QueueName) -> Result<(), StoreError> {
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

#[async_trait]
impl Admin for RedisStore {
    async fn counts(&self, queues: &[QueueName]) -> Result<Vec<Option<Counts>>, StoreError> {
        future::join_all(queues.iter().map(|queue| self.counts_of(queue))).await.into_iter().collect()
    }

    async fn counts_in_list(&self, queues: &[QueueName]) -> Result<Vec<Option<Counts>>, StoreError> {
        let all = future::join_all(queues.iter().map(|queue| self.counts_of(queue))).await;
        let readable = |(queue, counts)| {
            self.note_left_out(queue, &counts);
            Ok(unless_broken(queue, counts)?.flatten())
        };
        queues.iter().zip(all).map(readable).collect()
    }

    async fn queues(&self, after: Option<&QueueName>, max: usize) -> Result<Vec<QueueName>, StoreError> {
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

    async fn settings(&self, queue: &QueueName) -> Result<Option<Settings>, StoreError> {
        let (exists, _, _, settings) = changed(self.run(self.call(&script::CHANGE, queue).arg(0)).await?)?;
        Ok(exists.then_some(settings))
    }

    async fn change(&self, queue: &QueueName, changes: &[(Setting, Option<u64>)]) -> Result<Settings, StoreError> {
        let changing = self.within_timeout(async {
            self.register_before_insert(queue).await?;
            let mut call = self.call(&script::CHANGE, queue).arg(1);
            for (setting, value) in changes {
                call = call.arg(setting.name()).arg(value.map_or_else(String::new, |value| value.to_string()));
            }
            changed(self.run(call).await?)
        });
        let (_, mut more, made, settings) = self.doubt(queue, changing.await)?;
        if made {
            self.register_made(queue).await;
        }
        self.within_timeout(async {
            while more {
                (_, more, _, _) = changed(self.run(self.call(&script::CHANGE, queue).arg(0)).await?)?;
            }
            Ok(settings)
        })
        .await
    }

    async fn list(
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

    async fn tasks(&self, queue: &QueueName, ids: &[TaskId]) -> Result<Vec<Option<Seen>>, StoreError> {
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

    async fn delete(&self, queue: &QueueName, ids: &[TaskId]) -> Result<Vec<Deleted>, StoreError> {
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

    async fn redrive(&self, queue: &QueueName, ids: &[TaskId]) -> Result<Vec<Redriven>, StoreError> {
        let redriven = |digit| match digit {
            b'1' => Some(Redriven::Ready),
            b'2' => Some(Redriven::Duplicate),
            b'3' => Some(Redriven::Expired),
            b'4' => Some(Redriven::Unknown),
            _ => None,
        };
        self.within_timeout(self.of_each(&script::REDRIVE, queue, ids, redriven)).await
    }

    async fn import(
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
            let call = script::insert(self.call(&script::INSERT, queue), inserts.iter());
            let lane = Lane::Ordinary(Some(queue.clone()));
            let answer = self.gatherer.run(lane, queue, call, |asks| Job::Script(asks, load)).await?;
            answer::inserts(answer, &inserts)
        });
        let answers = self.doubt(queue, importing.await)?;
        if answers.iter().flatten().any(|answer| answer.made) {
            self.register_made(queue).await;
        }
        Ok(answers.into_iter().map(|answer| answer.map(|done| done.inserted)).collect())
    }

    async fn purge(&self, queue: &QueueName, state: State) -> Result<u64, StoreError> {
        self.within_timeout(async {
            self.reclaim(queue).await?;
            let call = self.call(&script::PURGE, queue).arg(name_of(state)).arg(RECLAIM_STEP);
            self.run(call.arg(call_id()?)).await
        })
        .await
    }

    async fn drop_queue(&self, queue: &QueueName, force: bool) -> Result<bool, StoreError> {
        let dropping = self.within_timeout(async {
            self.reclaim(queue).await?;
            self.run::<u64>(self.call(&script::DROP, queue).arg(u8::from(force)).arg(call_id()?)).await
        });
        match dropping.await? {
            0 => return Ok(false),
            1 => {}
            _ => return Err(StoreError::NotEmpty),
        }
        // The queue is gone whatever becomes of its name, and half of this must not be left out because the time is over.
        if let Err(error) = self.unregister(queue).await {
            tracing::warn!(%error, ?queue, "could not take the name of a deleted queue out of the registry; it goes later");
        }
        Ok(true)
    }

    fn describe(&self) -> Description {
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
