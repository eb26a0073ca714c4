//! What a queue remembers: acked tokens and answered requests.

use std::collections::HashMap;

use crate::store::{Millis, Remember};

/// What is remembered, in two generations. A generation takes entries for the window, or until it has half of all; then
/// the older one is dropped and a new one begins. It is seen until twice the window after its beginning: so an entry is
/// remembered for at least the window and at most twice as long.
pub(super) struct Memory<K, V> {
    remember: Remember,
    current: (Millis, HashMap<K, V>),
    older: (Millis, HashMap<K, V>),
}

impl<K: std::hash::Hash + Eq, V> Memory<K, V> {
    pub(super) fn new(remember: Remember) -> Self {
        Self { remember, current: (0, HashMap::new()), older: (0, HashMap::new()) }
    }

    pub(super) fn get(&self, key: &K, now: Millis) -> Option<&V> {
        let seen = |generation: &&(Millis, HashMap<K, V>)| now < generation.0 + 2 * self.remember.window;
        [&self.current, &self.older].into_iter().filter(seen).find_map(|generation| generation.1.get(key))
    }

    /// Drops what is not seen any more.
    pub(super) fn forget(&mut self, now: Millis) {
        for (began, entries) in [&mut self.current, &mut self.older] {
            if now >= *began + 2 * self.remember.window && !entries.is_empty() {
                *entries = HashMap::new();
            }
        }
    }

    pub(super) fn put(&mut self, key: K, value: V, now: Millis) {
        let (began, entries) = &self.current;
        if now >= began + self.remember.window || entries.len() as u64 >= self.remember.entries / 2 {
            self.older = std::mem::replace(&mut self.current, (now, HashMap::new()));
        }
        self.current.1.insert(key, value);
    }
}
