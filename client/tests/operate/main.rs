//! What operators do, with the library and with `data-queue`, against the real server, which is found beside this test's own
//! executable: `cargo build --workspace --bins`.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod admin;
mod copy;
mod files;
mod live;
mod manual;
mod repeats;
mod server;
mod terminal;
mod verbs;
mod work;
