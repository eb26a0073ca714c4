//! What Redis holds of the only queue of a test.

use crate::support::redis::{Redis, Reply};

/// The name of the only key of this part, if there is one.
fn key(redis: &Redis, part: &str) -> Option<String> {
    let Reply::Array(keys) = redis.command(&["KEYS", &format!("dq:{{*}}:*:{part}")]) else { panic!("no array") };
    match &keys[..] {
        [] => None,
        [Reply::Bytes(key)] => Some(String::from_utf8(key.clone()).unwrap()),
        more => panic!("one queue, {more:?}"),
    }
}

/// How many fields a hash has: `tasks`, `leases`.
pub fn fields(redis: &Redis, part: &str) -> i64 {
    let Some(key) = key(redis, part) else { return 0 };
    match redis.command(&["HLEN", &key]) {
        Reply::Integer(fields) => fields,
        other => panic!("HLEN: {other:?}"),
    }
}

/// How many keys the only queue has of parts that match this pattern: `acked:*`, `requests:*`.
pub fn parts(redis: &Redis, pattern: &str) -> usize {
    match redis.command(&["KEYS", &format!("dq:{{*}}:*:{pattern}")]) {
        Reply::Array(keys) => keys.len(),
        other => panic!("KEYS: {other:?}"),
    }
}

/// A counter of the queue: `inserted`, `acked`, `ready`.
pub fn counter(redis: &Redis, name: &str) -> i64 {
    let Some(key) = key(redis, "meta") else { return 0 };
    match redis.command(&["HGET", &key, name]) {
        Reply::Bytes(count) => String::from_utf8(count).unwrap().parse().unwrap(),
        Reply::Nil => 0,
        other => panic!("HGET: {other:?}"),
    }
}

/// The tokens under which tasks are leased now, each of which was popped alone: its record is under what its token
/// begins with.
pub fn tokens(redis: &Redis) -> Vec<String> {
    let Some(key) = key(redis, "leases") else { return Vec::new() };
    let Reply::Array(stems) = redis.command(&["HKEYS", &key]) else { panic!("no array") };
    let token = |stem: &Reply| match stem {
        Reply::Bytes(stem) if stem.len() == 14 => {
            stem.iter().chain(&[0, 0]).map(|byte| format!("{byte:02x}")).collect()
        }
        other => panic!("a stem: {other:?}"),
    };
    stems.iter().map(token).collect()
}
