//! What the tests of the whole have too; not all of it is needed here.
#![allow(dead_code, missing_docs, unreachable_pub)]

#[path = "../../../../tests/support/directory.rs"]
pub mod directory;
#[path = "../../../../tests/support/redis.rs"]
pub mod redis;
#[path = "../../../../tests/support/topology.rs"]
pub mod topology;
