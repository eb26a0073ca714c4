//! The stores under test, and what each adds to be tested.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use tempfile::TempDir;

use super::{Disturbance, Engine, Rig, START, insert, queue, support::redis::Redis, task, topologies::address_of};
use crate::store::{
    Admin, Clock, Millis, Rules, Store, StoreError,
    memory::MemoryStore,
    redis::{RedisConfig, RedisShared, RedisStore},
    sqlite::{Durability, SqliteConfig, SqliteStore},
};

#[derive(Default)]
struct TestClock(AtomicU64);

impl Clock for TestClock {
    fn now(&self) -> Millis {
        self.0.load(Ordering::Relaxed)
    }
}

pub(super) struct Memory {
    store: MemoryStore,
    clock: Arc<TestClock>,
}

const MEMORY_CAPACITY: u64 = 16 << 20;

pub(super) fn memory(rules: Rules) -> Rig {
    Rig::new(Memory::new(rules))
}

impl Memory {
    fn new(rules: Rules) -> Self {
        let clock = Arc::new(TestClock::default());
        Self { store: MemoryStore::new(Arc::clone(&clock) as _, rules, MEMORY_CAPACITY), clock }
    }
}

#[async_trait]
impl Engine for Memory {
    fn store(&self) -> &dyn Admin {
        &self.store
    }

    fn set_clock(&self, now: Millis) {
        self.clock.0.store(now, Ordering::Relaxed);
    }

    async fn fill(&self) {
        let mut size = MEMORY_CAPACITY as usize;
        while size > 0 {
            match self.store.insert(&queue("filler"), insert(vec![task(vec![0; size])])).await {
                Ok(_) => {}
                Err(StoreError::Full(_)) => size /= 2,
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn start_over(&mut self, rules: Rules) {
        *self = Self::new(rules);
    }

    /// It takes part in those of others, but has none of its own.
    fn disturbances(&self) -> &'static [Disturbance] {
        &[]
    }

    async fn disturb(&mut self, disturbance: Disturbance) {
        if disturbance.reopens() {
            self.store.open_again();
        }
    }
}

/// One server's store on a Redis of the test's own, which ends with it.
pub(super) struct OnRedis {
    store: RedisStore,
    pub(super) shared: Arc<RedisShared>,
    redis: Arc<Redis>,
    rules: Rules,
}

/// Of a call; the tests should not meet it.
pub(super) const TIMEOUT: Duration = Duration::from_secs(20);

pub(super) fn redis(rules: Rules) -> Rig {
    Rig::new(OnRedis::connect(&Arc::new(Redis::start()), rules))
}

/// Of every store that a test opens there.
pub(super) fn config_of(redis: &Redis, rules: Rules) -> RedisConfig {
    let (url, access) = address_of(redis);
    RedisConfig { url, access, key_prefix: "test".to_owned(), accept_reset: true, timeout: TIMEOUT, rules }
}

impl OnRedis {
    pub(super) fn connect(redis: &Arc<Redis>, rules: Rules) -> Self {
        let shared = Arc::new(RedisShared::new(&config_of(redis, rules)).unwrap());
        let (store, redis) = (RedisStore::new(Arc::clone(&shared)), Arc::clone(redis));
        Self { store, shared, redis, rules }
    }
}

#[async_trait]
impl Engine for OnRedis {
    fn store(&self) -> &dyn Admin {
        &self.store
    }

    fn set_clock(&self, now: Millis) {
        self.shared.set_test_clock(now);
    }

    async fn fill(&self) {
        self.redis.config_set("maxmemory", "1");
    }

    fn start_over(&mut self, rules: Rules) {
        self.redis.flush();
        *self = Self::connect(&self.redis, rules);
    }

    fn disturbances(&self) -> &'static [Disturbance] {
        &[Disturbance::Reconnect, Disturbance::Forget]
    }

    async fn disturb(&mut self, disturbance: Disturbance) {
        match disturbance {
            Disturbance::Reconnect => *self = Self::connect(&self.redis, self.rules),
            Disturbance::Forget => self.redis.script_flush(),
            other => panic!("Redis is not part of the server: {other:?}"),
        }
    }
}

/// The embedded store, on a file in a directory of the test's own.
pub(super) struct OnSqlite {
    /// Set but for a moment within a reopening.
    store: Option<SqliteStore>,
    clock: Arc<TestClock>,
    rules: Rules,
    directory: TempDir,
    /// The files had so many names.
    renamed: u32,
}

pub(super) fn sqlite(rules: Rules) -> Rig {
    Rig::new(OnSqlite::new(rules))
}

impl OnSqlite {
    fn new(rules: Rules) -> Self {
        let clock = Arc::new(TestClock(AtomicU64::new(START)));
        let mut new = Self { store: None, clock, rules, directory: TempDir::new().unwrap(), renamed: 0 };
        new.open();
        new
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join(format!("{}.db", self.renamed))
    }

    fn open(&mut self) {
        let (path, rules) = (self.path(), self.rules);
        let config = SqliteConfig { path, durability: Durability::Memory, reserve: 0, rules, timeout: TIMEOUT };
        self.store = Some(SqliteStore::open(config, Some(Arc::clone(&self.clock) as _)).unwrap());
    }

    /// What a kill leaves behind is what is in the file and its log at that moment, and nothing writes to them between two
    /// calls.
    fn crash(&mut self) {
        let before = self.path();
        self.renamed += 1;
        for ending in ["", "-wal"] {
            let name = |path: &Path| PathBuf::from(format!("{}{ending}", path.display()));
            if name(&before).exists() {
                fs::copy(name(&before), name(&self.path())).unwrap();
            }
        }
        self.store = None;
        for ending in ["", ".lock"] {
            fs::remove_file(format!("{}{ending}", before.display())).unwrap();
        }
    }
}

#[async_trait]
impl Engine for OnSqlite {
    fn store(&self) -> &dyn Admin {
        self.store.as_ref().unwrap()
    }

    fn set_clock(&self, now: Millis) {
        self.clock.0.store(now, Ordering::Relaxed);
    }

    async fn fill(&self) {
        self.store.as_ref().unwrap().reserve(u64::MAX);
    }

    fn start_over(&mut self, rules: Rules) {
        *self = Self::new(rules);
    }

    fn disturbances(&self) -> &'static [Disturbance] {
        &[Disturbance::CloseAndReopen, Disturbance::CrashAndReopen]
    }

    async fn disturb(&mut self, disturbance: Disturbance) {
        match disturbance {
            Disturbance::CloseAndReopen => self.store = None,
            Disturbance::CrashAndReopen => self.crash(),
            other => panic!("one object has the file at a time: {other:?}"),
        }
        self.open();
    }
}
