//! Which store it is.

use std::sync::Arc;

use super::{
    Admin,
    memory::MemoryStore,
    redis::{RedisShared, RedisStore},
    sqlite::SqliteStore,
};

/// A store that was chosen, and how each thread gets at it.
#[derive(Clone)]
pub struct Backend(Kind);

#[derive(Clone)]
enum Kind {
    Memory(Arc<MemoryStore>),
    Sqlite(Arc<SqliteStore>),
    Redis(Arc<RedisShared>),
}

impl Backend {
    /// One store for all threads.
    pub fn memory(store: MemoryStore) -> Self {
        Self(Kind::Memory(Arc::new(store)))
    }

    /// One file, and one thread that writes it, for all threads.
    pub fn sqlite(store: SqliteStore) -> Self {
        Self(Kind::Sqlite(Arc::new(store)))
    }

    /// Connections of its own for each thread.
    pub fn redis(shared: RedisShared) -> Self {
        Self(Kind::Redis(Arc::new(shared)))
    }

    /// The store as the thread reaches it whose runtime this is called in.
    pub fn for_this_thread(&self) -> Arc<dyn Admin> {
        match &self.0 {
            Kind::Memory(store) => Arc::clone(store) as Arc<dyn Admin>,
            Kind::Sqlite(store) => Arc::new(store.for_this_thread()),
            Kind::Redis(shared) => Arc::new(RedisStore::new(Arc::clone(shared))),
        }
    }
}
