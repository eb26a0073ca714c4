//! The server on SQLite is killed at any moment under a load that is written down, while it opens its file, too.

use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::{
    load::{Habits, NO_DEAD_LETTERS, Plan, Supply, run},
    random::Random,
};
use crate::support::{embedded::Embedded, rounds, wire_tests};

/// About as long as the server takes until it serves.
const OPENING: Duration = Duration::from_millis(60);
const TASKS_A_KILL: u64 = 300;

pub fn plan(tasks: u64) -> Plan {
    Plan {
        supply: Supply::Tasks(usize::try_from(tasks).unwrap()),
        producers: 4,
        workers: 8,
        lease: Duration::from_secs(1),
        habits: Habits { abandon: 8, put_back: 20, reclaim: 5, heartbeat: 50, long: 2, late: 2, impatient: 30 },
        may_be_full: false,
    }
}

async fn survives(kills: u64, flags: &[&str]) {
    let server = Embedded::start(&[&NO_DEAD_LETTERS, flags].concat()).await;
    let random = Random::new(&format!("kills {flags:?}"));
    let began = Instant::now();
    let mut more = 0;
    run(plan(kills * TASKS_A_KILL), &[&server], random, async |load, random| {
        for kill in 0..kills {
            load.moment(random, kill, kills).await;
            server.kill();
            sleep(random.up_to(Duration::from_millis(50))).await;
            while random.chance(300) {
                server.start_and_kill(random.up_to(OPENING)).await;
                more += 1;
            }
            server.restart().await;
            load.conserved(&server).await;
        }
    })
    .await;
    server.kill_and_check();
    println!("{kills} kills under load and {more} while the file was opened, {:?}", began.elapsed());
}

wire_tests! {
    /// G1–G9, G14: whenever the server is killed, nothing is lost, doubled or held twice, and its file is sound.
    async fn an_embedded_server_killed_at_any_moment_loses_nothing() {
        survives(rounds(20, 300), &[]).await;
    }

    /// G1–G9, G14: nor with less durability, which is about the loss of power alone.
    async fn a_kill_loses_nothing_whatever_the_durability() {
        for durability in ["normal", "memory"] {
            survives(rounds(4, 20), &["--durability", durability]).await;
        }
    }
}
