//! Two servers on one Redis, and callers that go back and forth between them.

use std::{sync::Arc, time::Duration};

use super::{
    load::{Habits, NO_DEAD_LETTERS, Plan, Supply, run},
    random::Random,
};
use crate::support::{
    redis::{Options, Persistence, Redis},
    server::Server,
    wire_tests,
};

wire_tests! {
    /// G1, G2, G4, G5, G6, G7, G8, G14: 20 workers on two servers for 30 s, many of whom let leases run out: no task is
    /// lost, and none is held by two.
    async fn two_servers_share_a_redis() {
        let redis = Arc::new(Redis::with(Options { persistence: Persistence::Always, ..Options::default() }));
        let servers = [Server::on(Arc::clone(&redis), &NO_DEAD_LETTERS), Server::on(redis, &NO_DEAD_LETTERS)];
        for server in &servers {
            server.ready().await;
        }
        let plan = Plan {
            supply: Supply::For(Duration::from_secs(30)),
            producers: 4,
            workers: 20,
            lease: Duration::from_millis(700),
            habits: Habits { abandon: 60, put_back: 30, reclaim: 5, heartbeat: 100, long: 20, late: 20, impatient: 100 },
            may_be_full: false,
        };
        let random = Random::new("two servers");
        run(plan, &[&servers[0], &servers[1]], random, async |_, _| {}).await;
    }
}
