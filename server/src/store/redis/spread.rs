//! Queues wider than a node: a queue that has shards is that many queues to the scripts, each with keys of its own tag, and here
//! it is one.
//!
//! Shard 0 says how many there are; `change.lua` tells how that changes. Each process keeps what it read there, and every answer of
//! a script has the generation that it is true of, so that who knows an older one reads again. A task stays in its shard, whose
//! number is the first byte of its id and of its tokens: calls on tasks go where they are without asking, and every step on a task
//! is still one script.

mod admin;
mod store;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use md5::{Digest, Md5};
use tokio::time::Instant;

use super::{
    RedisShared, Unspread,
    admin::Step,
    answer::{Changed, Done},
    look::Look,
};
use crate::store::{
    Attempt, Insert, MAX_SHARDS, MintedMap, NewTask, NumberedInsert, QueueName, SessionId, Setting, Settings, Shard,
    Stem, StoreError, Token,
};

/// How often a call looks again at a queue whose shards change under it, before it takes the change for one that was left half done.
const WAITS_FOR_CHANGE: u32 = 3;

/// Between these looks.
const CHANGE_TAKES: Duration = Duration::from_millis(10);

/// How often settings are changed anew because others changed them meanwhile.
const CHANGES: usize = 8;

/// So many inserts of a producer that follow each other go to one shard.
const RUN_OF_INSERTS: u64 = 64;

/// How many stems of streams are kept until their shard is popped from again.
const SPENT_KEPT: usize = 10_000;

/// How many queues with shards are remembered.
const LAYOUTS_MAX: usize = 100_000;

/// A queue with shards, as it was when shard 0 was read.
pub(super) struct Layout {
    generation: u64,
    shards: u8,
    /// Of those that it ever had.
    spread: u8,
    settings: Settings,
    /// About how many tasks are ready in each.
    ready: Vec<AtomicU64>,
}

impl Layout {
    fn new(read: &Changed) -> Self {
        let shards = u8::try_from(read.settings.shards()).unwrap_or(MAX_SHARDS).clamp(1, MAX_SHARDS);
        let spread = read.spread.clamp(shards, MAX_SHARDS);
        let ready = (0..spread).map(|_| AtomicU64::new(0)).collect();
        Self { generation: read.generation, shards, spread, settings: read.settings.clone(), ready }
    }

    fn part(&self, queue: &QueueName, number: u8) -> QueueName {
        queue.part(Shard { number, generation: self.generation })
    }

    fn parts(&self, queue: &QueueName) -> Vec<QueueName> {
        (0..self.shards).map(|number| self.part(queue, number)).collect()
    }

    /// Also those that it had once.
    fn all_parts(&self, queue: &QueueName) -> Vec<QueueName> {
        (0..self.spread).map(|number| self.part(queue, number)).collect()
    }

    fn ready(&self, number: u8) -> u64 {
        self.ready.get(usize::from(number)).map_or(0, |ready| ready.load(Ordering::Relaxed))
    }

    fn note_ready(&self, number: u8, count: u64) {
        if let Some(ready) = self.ready.get(usize::from(number)) {
            ready.store(count, Ordering::Relaxed);
        }
    }

    fn note_more(&self, number: u8, count: u64) {
        if let Some(ready) = self.ready.get(usize::from(number)) {
            ready.fetch_add(count, Ordering::Relaxed);
        }
    }

    fn all_ready(&self) -> u64 {
        (0..self.shards).map(|number| self.ready(number)).sum()
    }

    /// Any of them, all the same.
    fn any(&self) -> u8 {
        Attempt::mint().map_or(0, |random| random.0[0]) % self.shards
    }

    /// All of them, from this one on.
    fn from(&self, first: u8) -> impl Iterator<Item = u8> {
        let shards = self.shards;
        (0..shards).map(move |step| (first + step) % shards)
    }

    /// Of this one and another, that with more to pop; should neither have anything, one that has. Those that are away come last.
    fn fuller(&self, one: u8, is_away: impl Fn(u8) -> bool) -> u8 {
        let other = self.any();
        let fuller = if self.ready(other) > self.ready(one) { other } else { one };
        let has_some = |number: &u8| self.ready(*number) > 0 && !is_away(*number);
        let is_there = |number: &u8| !is_away(*number);
        self.from(fuller).find(has_some).or_else(|| self.from(fuller).find(is_there)).unwrap_or(fuller)
    }

    /// Of two, that with less, and then the others. Those that are away come last.
    fn emptier(&self, is_away: impl Fn(u8) -> bool) -> Vec<u8> {
        let (one, other) = (self.any(), self.any());
        let (there, away): (Vec<u8>, Vec<u8>) = self
            .from(if self.ready(other) < self.ready(one) { other } else { one })
            .partition(|number| !is_away(*number));
        [there, away].concat()
    }

    /// Where these have to go; nothing if anywhere.
    fn home(&self, tasks: &[NewTask], otherwise: Option<u64>) -> Result<Option<u8>, StoreError> {
        let of_hash = |hash: u64| (hash % u64::from(self.shards)) as u8;
        let keys = tasks.iter().filter_map(|task| task.plan.as_deref()?.unique_key.as_deref());
        let mut homes = keys.map(|key| of_hash(hash(key)));
        match homes.next() {
            Some(home) if homes.all(|other| other == home) => Ok(Some(home)),
            Some(_) => Err(StoreError::KeysApart(self.shards)),
            None => Ok(otherwise.map(of_hash)),
        }
    }

    fn home_of_insert(&self, insert: &Insert) -> Result<Option<u8>, StoreError> {
        self.home(&insert.tasks, insert.request.as_ref().map(|request| hash(&request.id)))
    }

    /// Inserts that follow each other share a shard, so that they share a script.
    fn home_of_numbered(&self, producer: &str, insert: &NumberedInsert) -> Result<u8, StoreError> {
        let run = hash(producer).wrapping_add(insert.number / RUN_OF_INSERTS);
        Ok(self.home(&insert.tasks, Some(run))?.unwrap_or_default())
    }
}

/// The same on every server, and in every version of it.
fn hash(text: &str) -> u64 {
    let [a, b, c, d, e, f, g, h, ..]: [u8; 16] = Md5::digest(text).into();
    u64::from_be_bytes([a, b, c, d, e, f, g, h])
}

/// What this process knows of queues with shards.
#[derive(Default)]
pub(super) struct Spread(RwLock<HashMap<QueueName, Arc<Layout>>>);

impl Spread {
    fn get(&self, queue: &QueueName) -> Option<Arc<Layout>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(queue).cloned()
    }

    fn set(&self, queue: &QueueName, read: &Changed) -> Option<Arc<Layout>> {
        let mut layouts = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if read.generation == 0 {
            layouts.remove(queue);
            return None;
        }
        if let Some(known) = layouts.get(queue)
            && known.generation == read.generation
        {
            return Some(Arc::clone(known));
        }
        if layouts.len() >= LAYOUTS_MAX {
            layouts.clear();
        }
        let layout = Arc::new(Layout::new(read));
        layouts.insert(queue.clone(), Arc::clone(&layout));
        Some(layout)
    }

    fn forget(&self, queue: &QueueName) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(queue);
    }

    /// Another server inserted so many there.
    pub(super) fn note_more(&self, queue: &QueueName, shard: u8, count: usize) {
        if let Some(layout) = self.get(queue) {
            layout.note_more(shard, count as u64);
        }
    }
}

/// One thread's store.
pub struct RedisStore {
    one: Unspread,
    /// Of streams, pops that are over in shards that were not popped from since.
    spent: Mutex<MintedMap<[u8; 16], Vec<Stem>>>,
}

impl RedisStore {
    /// Opens the connections of the thread whose runtime this is called in.
    pub fn new(shared: Arc<RedisShared>) -> Self {
        Self { one: Unspread::new(shared), spent: Mutex::default() }
    }

    fn layout(&self, queue: &QueueName) -> Option<Arc<Layout>> {
        self.one.shared.spread.get(queue)
    }

    /// Tells of a shard whether its node does not answer, as far as is known now.
    fn away<'a>(&'a self, queue: &'a QueueName, layout: &'a Layout) -> impl Fn(u8) -> bool + 'a {
        let away = self.one.shared.nodes.away();
        // Which node has a shard is asked only if it matters.
        move |number| !away.is_empty() && away.contains(&self.one.shared.owner(&layout.part(queue, number)))
    }

    /// Reads it anew.
    async fn refreshed(&self, queue: &QueueName) -> Result<Option<Arc<Layout>>, StoreError> {
        let read = self.one.settings(queue).await?;
        Ok(self.one.shared.spread.set(queue, &read))
    }

    /// What holds if this is the generation that shard 0 has.
    async fn confirmed(&self, queue: &QueueName, generation: u64) -> Result<Option<Arc<Layout>>, StoreError> {
        match self.layout(queue) {
            None if generation == 0 => Ok(None),
            Some(layout) if layout.generation == generation => Ok(Some(layout)),
            _ => self.refreshed(queue).await,
        }
    }

    /// Gives a shard the settings of its queue.
    async fn open(&self, queue: &QueueName, layout: &Layout, number: u8) -> Result<Changed, StoreError> {
        let mut values: Vec<(&'static str, Option<u64>)> =
            Setting::ALL.iter().map(|setting| (setting.name(), layout.settings.get(*setting))).collect();
        values.push(("spread", Some(layout.spread.into())));
        let step = Step { what: "open", before: 0, after: layout.generation, only_empty: false, values: &values };
        self.one.change(&layout.part(queue, number), &step).await
    }

    /// Raises the generation of a queue and changes nothing: a change that fenced shards for it has not come about.
    async fn raise(&self, queue: &QueueName, before: u64, after: u64) -> Result<(), StoreError> {
        let step = Step { what: "change", before, after, only_empty: false, values: &[] };
        let raised = self.one.change(queue, &step).await?;
        if raised.done == Done::Changed {
            self.one.shared.spread.set(queue, &raised);
        }
        Ok(())
    }

    /// A shard has another generation than it was thought to have: finds out what holds, and makes it hold there.
    async fn settle(&self, queue: &QueueName, number: u8, attempt: u32) -> Result<(), StoreError> {
        let Some(layout) = self.refreshed(queue).await? else { return Ok(()) };
        if number == 0 || number >= layout.shards {
            return Ok(());
        }
        let opened = self.open(queue, &layout, number).await?;
        if opened.generation > layout.generation {
            if attempt < WAITS_FOR_CHANGE {
                tokio::time::sleep(CHANGE_TAKES * (attempt + 1)).await;
            } else {
                self.raise(queue, layout.generation, opened.generation).await?;
            }
        }
        Ok(())
    }

    /// The same where it is only a hint.
    async fn settle_if_other(&self, queue: &QueueName, layout: &Layout, number: u8, generation: u64) {
        if generation != layout.generation
            && let Err(error) = self.settle(queue, number, 0).await
        {
            tracing::debug!(%error, ?queue, number, "cannot tell how a queue is spread");
        }
    }

    /// Looks at all shards of these.
    async fn look_at_parts(&self, queues: &[QueueName], announce: u64) -> Result<Vec<Vec<Option<Look>>>, StoreError> {
        let layouts: Vec<Option<Arc<Layout>>> = queues.iter().map(|queue| self.layout(queue)).collect();
        let of_queue = |(queue, layout): (&QueueName, &Option<Arc<Layout>>)| match layout {
            Some(layout) => layout.parts(queue),
            None => vec![queue.clone()],
        };
        let parts: Vec<Vec<QueueName>> = queues.iter().zip(&layouts).map(of_queue).collect();
        let mut looks = self.one.look_at_all(&parts.concat(), announce).await?.into_iter();
        let mut all = Vec::with_capacity(queues.len());
        for ((queue, layout), parts) in queues.iter().zip(&layouts).zip(&parts) {
            let mut of_queue: Vec<Option<Look>> = looks.by_ref().take(parts.len()).collect();
            match layout {
                Some(layout) => {
                    for (number, look) in (0..).zip(&of_queue) {
                        if let Some(look) = look {
                            layout.note_ready(number, look.sight.ready);
                            self.settle_if_other(queue, layout, number, look.generation).await;
                        }
                    }
                }
                // It is new that it is spread.
                None => {
                    if let Some(Some(look)) = of_queue.first()
                        && let Some(layout) = self.confirmed(queue, look.generation).await?
                    {
                        let others: Vec<QueueName> = layout.parts(queue).split_off(1);
                        of_queue.extend(self.one.look_at_all(&others, announce).await?);
                    }
                }
            }
            all.push(of_queue);
        }
        Ok(all)
    }

    /// Those of a stream that are over in this shard; the others are kept for it.
    fn spent_in(&self, session: SessionId, number: u8, more: &[Stem]) -> Vec<Stem> {
        let mut spent = self.spent.lock().unwrap_or_else(PoisonError::into_inner);
        if spent.values().map(Vec::len).sum::<usize>() > SPENT_KEPT {
            spent.clear();
        }
        let mut all = spent.remove(&session.0).unwrap_or_default();
        all.extend(more);
        let (here, elsewhere) = all.into_iter().partition(|stem| stem.shard() == number);
        let elsewhere: Vec<Stem> = elsewhere;
        if !elsewhere.is_empty() {
            spent.insert(session.0, elsewhere);
        }
        here
    }
}

/// The attempts of a call that is refused where the shards are other ones by now.
struct Attempts {
    until: Instant,
    made: u32,
}

impl Attempts {
    fn new(store: &RedisStore) -> Self {
        Self { until: Instant::now() + store.one.shared.timeout, made: 0 }
    }

    /// Before the next one.
    async fn settle(&mut self, store: &RedisStore, queue: &QueueName, number: u8) -> Result<(), StoreError> {
        if Instant::now() >= self.until {
            let message = "the shards of the queue are being changed; try again".to_owned();
            return Err(StoreError::Unavailable { message, did_not_run: true });
        }
        store.settle(queue, number, self.made).await?;
        self.made += 1;
        Ok(())
    }
}

/// Tokens of one shard, and where they stood among all.
struct OfShard {
    queue: QueueName,
    tokens: Vec<Token>,
    at: Vec<usize>,
}

/// By shard; those whose shard is none belong nowhere. Nothing if all are of one, which is that of most calls.
fn by_shard(queue: &QueueName, tokens: &[Token]) -> Vec<OfShard> {
    let mut groups: BTreeMap<u8, OfShard> = BTreeMap::new();
    for (at, token) in tokens.iter().enumerate().filter(|(_, token)| token.shard() < MAX_SHARDS) {
        let number = token.shard();
        let group = groups.entry(number).or_insert_with(|| OfShard {
            queue: queue.part(Shard { number, generation: 0 }),
            tokens: Vec::new(),
            at: Vec::new(),
        });
        group.tokens.push(*token);
        group.at.push(at);
    }
    groups.into_values().collect()
}

/// Whether these are all of shard 0.
fn is_first_shard(tokens: &[Token]) -> bool {
    tokens.iter().all(|token| token.shard() == 0)
}

/// An error of one of several steps.
fn of_several(error: StoreError, is_first: bool) -> StoreError {
    if is_first { error } else { error.after_others() }
}

/// What the steps answered that were all taken, side by side, since one that is away is no reason to leave the others.
fn all_of<T>(done: Vec<Result<T, StoreError>>) -> Result<Vec<T>, StoreError> {
    let is_only_one = done.len() == 1;
    done.into_iter().map(|step| step.map_err(|error| of_several(error, is_only_one))).collect()
}
