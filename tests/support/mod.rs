//! What every wire test needs: a real server on a real store, calls, and patience.

pub mod call;
pub mod consume;
pub mod directory;
pub mod disk;
pub mod doors;
pub mod embedded;
pub mod http2;
pub mod keys;
pub mod memory;
pub mod proxy;
pub mod raw;
pub mod redis;
pub mod server;
pub mod status;
pub mod strace;
pub mod topology;

use std::{
    env,
    future::Future,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use tokio::time::{Instant, sleep, timeout};

/// How long a test waits for what must happen. Generous: it is only ever waited out by a test that fails.
pub const PATIENCE: Duration = Duration::from_secs(60);

const TEST_LIMIT: Duration = Duration::from_secs(300);
const LONG_TEST_LIMIT: Duration = Duration::from_secs(1_800);
const POLL: Duration = Duration::from_millis(10);

/// Runs each test on every store, as tests of their own: `rows::name::memory`, `rows::name::redis`, `rows::name::sqlite`.
macro_rules! on_every_store {
    ($($(#[$about:meta])* async fn $name:ident($backend:ident) $body:block)*) => { $(
        $(#[$about])*
        mod $name {
            #[allow(unused_imports)]
            use super::*;
            async fn run($backend: $crate::support::server::Backend) $body
            $crate::support::on_every_store!(@store memory Memory);
            $crate::support::on_every_store!(@store redis Redis);
            $crate::support::on_every_store!(@store sqlite Sqlite);
        }
    )* };
    (@store $store:ident $backend:ident) => {
        #[test]
        fn $store() {
            $crate::support::run(run($crate::support::server::Backend::$backend));
        }
    };
}

/// Runs tests that are about one store, or about none.
macro_rules! wire_tests {
    ($($(#[$about:meta])* async fn $name:ident() $body:block)*) => { $(
        $(#[$about])*
        #[test]
        fn $name() {
            $crate::support::run(async $body);
        }
    )* };
}

pub(crate) use {on_every_store, wire_tests};

/// Runs one test to its end; a test that hangs fails.
pub fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let limit = rounds(TEST_LIMIT, LONG_TEST_LIMIT);
    runtime.block_on(async { timeout(limit, test).await.expect("the test hangs") });
    // A blocking call that is left behind must not hold the test up.
    runtime.shutdown_background();
}

/// `short`, or `long` when `DATA_QUEUE_TEST_LONG` asks for the long run.
pub fn rounds<T>(short: T, long: T) -> T {
    if env::var("DATA_QUEUE_TEST_LONG").is_ok_and(|value| value == "1") { long } else { short }
}

/// Whether `DATA_QUEUE_TEST_LONG` asks for the long run. Says so if not.
pub fn is_long() -> bool {
    let is_long = rounds(false, true);
    if !is_long {
        println!("in the long run only: tests/run --long");
    }
    is_long
}

/// Asks again and again until there is something, and fails if there is nothing for `limit`.
pub async fn poll_until<T>(what: &str, limit: Duration, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(Instant::now() < deadline, "waited {limit:?} for {what}");
        sleep(POLL).await;
    }
}

/// A queue that no other test uses.
pub fn unique_queue(noun: &str) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("{noun}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}
