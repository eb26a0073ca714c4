//! The server, Redis and the connections between them are killed under a load that is written down.

use std::time::Duration;

use tokio::time::sleep;

use super::{
    load::{Habits, NO_DEAD_LETTERS, Plan, Supply, run},
    random::Random,
};
use crate::support::{
    redis::{Options, Persistence},
    rounds,
    server::Server,
    wire_tests,
};

const FLAGS: &[&str] = &["--store-timeout", "5s", NO_DEAD_LETTERS[0], NO_DEAD_LETTERS[1]];

fn plan(tasks: usize) -> Plan {
    Plan {
        supply: Supply::Tasks(tasks),
        producers: 4,
        workers: 8,
        lease: Duration::from_secs(1),
        habits: Habits { abandon: 8, put_back: 20, reclaim: 5, heartbeat: 50, long: 2, late: 2, impatient: 30 },
        may_be_full: false,
    }
}

async fn server() -> Server {
    let server = Server::on_redis_with(Options { persistence: Persistence::Always, ..Options::default() }, FLAGS);
    server.ready().await;
    server
}

wire_tests! {
    /// G1–G9, G14: whenever the server is killed, nothing is lost, doubled or held twice.
    async fn a_server_killed_at_any_moment_loses_nothing() {
        let server = server().await;
        let random = Random::new("kills of the server");
        let kills = rounds(7, 50);
        run(plan(10_000), &[&server], random, async |load, random| {
            for kill in 0..kills {
                load.moment(random, kill, kills).await;
                server.kill();
                sleep(random.up_to(Duration::from_millis(100))).await;
                server.restart().await;
                load.conserved(&server).await;
            }
        })
        .await;
    }

    /// G1–G9, G14: the same when Redis, which writes every change to its disk, is killed.
    async fn a_redis_killed_at_any_moment_loses_nothing() {
        let server = server().await;
        let random = Random::new("kills of Redis");
        let kills = rounds(2, 20);
        run(plan(rounds(4_000, 10_000)), &[&server], random, async |load, random| {
            for kill in 0..kills {
                load.moment(random, kill, kills).await;
                server.redis().kill();
                sleep(random.up_to(Duration::from_millis(100))).await;
                server.redis().restart();
                load.conserved(&server).await;
            }
        })
        .await;
    }

    /// G1–G9, G14: the same when Redis forgets its scripts and cuts its connections.
    async fn a_redis_that_forgets_and_hangs_up_loses_nothing() {
        let server = server().await;
        let random = Random::new("flushes and cuts");
        let times = rounds(25, 200);
        run(plan(rounds(4_000, 10_000)), &[&server], random, async |load, random| {
            for time in 0..times {
                load.moment(random, time, times).await;
                if random.chance(500) {
                    server.redis().script_flush();
                }
                if random.chance(700) {
                    server.redis().client_kill();
                }
            }
        })
        .await;
    }
}
