//! Somebody else takes all the room on the file system of the server on SQLite, under a load that is written down.

use std::{fs, time::Duration};

use tokio::time::{Instant, sleep};

use super::{
    embedded::plan,
    load::{NO_DEAD_LETTERS, Plan, run},
    random::Random,
};
use crate::support::{PATIENCE, embedded::Embedded, poll_until, rounds, wire_tests};

const DISK: u64 = 48 << 20;
const FLAGS: &[&str] = &["--disk-reserve", "8388608", NO_DEAD_LETTERS[0], NO_DEAD_LETTERS[1]];
const FOREIGN: &str = "foreign";
/// What the server says in its log.
const FAILED: &str = "the store failed";
const TASKS_A_ROUND: u64 = 600;
/// How long a round waits for the load to feel it.
const BITE_LIMIT: Duration = Duration::from_secs(10);

wire_tests! {
    /// G1–G9, G13, G14: not a byte is left, the reserve included, again and again. Callers are told to try again, nothing
    /// that was answered OK is lost, and the server recovers by itself as soon as there is room, or when it was killed.
    async fn an_embedded_server_outlives_a_full_file_system() {
        let server = Embedded::start_on_disk(DISK, FLAGS).await;
        let random = Random::new("full file systems");
        let all = rounds(4, 40);
        let plan = Plan { may_be_full: true, ..plan(all * TASKS_A_ROUND) };
        run(plan, &[&server], random, async |load, random| {
            let mut felt = 0;
            for round in 0..all {
                load.moment(random, round, all).await;
                // The log of changes is empty at the start: it will want room.
                server.restart().await;
                let before = load.unanswered();
                let mut taken = server.disk().fill(FOREIGN);
                let deadline = Instant::now() + BITE_LIMIT;
                let bitten = async || (load.unanswered() > before || Instant::now() > deadline).then_some(());
                poll_until("the load to feel it", BITE_LIMIT + PATIENCE, bitten).await;
                for _ in 0..random.below(4) {
                    sleep(random.up_to(Duration::from_millis(200))).await;
                    // What the server made free to begin anew.
                    taken += server.disk().fill(FOREIGN);
                }
                let killed = random.chance(500);
                if killed {
                    server.kill();
                }
                let failed = load.unanswered() - before;
                felt += usize::from(failed > 0);
                println!("{taken} bytes taken, {failed} calls failed, killed: {killed}");
                fs::remove_file(server.disk().path(FOREIGN)).expect("the foreign file");
                if killed {
                    server.restart().await;
                }
                load.conserved(&server).await;
            }
            assert!(felt > 0, "a full file system was never felt");
            let failures = server.log().matches(FAILED).count();
            println!("the server noticed {failures} failures of its file");
            assert!(failures > 0, "nothing but inserts was refused");
        })
        .await;
        server.kill_and_check();
    }
}
