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

/// The tokens under which tasks are leased now.
pub fn tokens(redis: &Redis) -> Vec<String> {
    let Some(key) = key(redis, "leases") else { return Vec::new() };
    let Reply::Array(tokens) = redis.command(&["HKEYS", &key]) else { panic!("no array") };
    let hex = |token: &Reply| match token {
        Reply::Bytes(token) => token.iter().map(|byte| format!("{byte:02x}")).collect(),
        other => panic!("a token: {other:?}"),
    };
    tokens.iter().map(hex).collect()
}
