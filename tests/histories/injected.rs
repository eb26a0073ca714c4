//! System calls of the server on SQLite fail under a load that is written down: what goes wrong with its file is told to
//! callers as something that they may try again, and passes.

use std::{collections::BTreeMap, time::Duration};

use tokio::time::sleep;

use super::{
    embedded::plan,
    load::{Load, NO_DEAD_LETTERS, Plan, run},
    random::Random,
};
use crate::support::{
    PATIENCE,
    call::{insert_request, json},
    embedded::Embedded,
    poll_until, rounds,
    strace::Strace,
    wire_tests,
};

/// How long a round goes on without a fault.
const BITE_LIMIT: Duration = Duration::from_secs(5);
const TASKS_A_ROUND: u64 = 250;

/// Calls that fail, and how; in some cases those too by which the file is opened again.
const FAULTS: [&[(&str, &str)]; 5] = [
    &[("fsync,fdatasync", "EIO")],
    &[("write,pwrite64", "EIO")],
    &[("write,pwrite64", "ENOSPC")],
    &[("fsync,fdatasync", "ENOSPC"), ("openat", "EMFILE")],
    &[("write,pwrite64", "EIO"), ("read,pread64,ftruncate", "EIO")],
];

/// Makes some of these calls fail from now on: in each thread the first after a few, and then each, or every few.
fn inject(server: &Embedded, faults: &[(&str, &str)], random: &mut Random) -> Strace {
    let mut rules = Vec::new();
    for (number, (calls, error)) in faults.iter().enumerate() {
        // Those of the first kind begin with some of the calls that are answered.
        let first = if number == 0 { 1 + random.below(12) } else { 1 };
        let step = 1 + random.below(6);
        rules.push(format!("inject={calls}:error={error}:when={first}+{step}"));
    }
    let calls = faults.iter().map(|(calls, _)| *calls).collect::<Vec<_>>().join(",");
    let trace = format!("trace={calls}");
    let rules = rules.iter().flat_map(|rule| ["-e", rule.as_str()]);
    server.strace(&["-e", &trace].into_iter().chain(rules).collect::<Vec<_>>())
}

/// The process that answers is the one that answered before the faults, and it stores tasks again.
async fn recovered(server: &Embedded, load: &Load) {
    let mut client = server.client().await;
    let request = insert_request(&format!("after-{}", load.queue), vec![json("1")]);
    let ask = async || match client.insert(request.clone()).await {
        Ok(_) => Some(()),
        Err(status) => {
            load.excuse(&status);
            None
        }
    };
    poll_until("the server to store tasks again", PATIENCE, ask).await;
    load.conserved(server).await;
}

async fn survives(all: u64, kill: u64) {
    let server = Embedded::start(&NO_DEAD_LETTERS).await;
    let random = Random::new("faults of system calls");
    let mut bites = BTreeMap::new();
    let mut felt = 0;
    let plan = Plan { may_be_full: true, ..plan(all * TASKS_A_ROUND) };
    run(plan, &[&server], random, async |load, random| {
        for round in 0..all {
            load.moment(random, round, all).await;
            let fault = FAULTS[usize::try_from(round).unwrap() % FAULTS.len()];
            let before = load.unanswered();
            let strace = inject(&server, fault, random);
            let pid = server.pid();
            let wanted = 1 + usize::try_from(random.below(4)).unwrap();
            strace.bites(wanted, BITE_LIMIT).await;
            felt += usize::from(load.unanswered() > before);
            if random.chance(kill) {
                server.kill();
                *bites.entry(fault).or_insert(0) += strace.injected();
                drop(strace);
                sleep(random.up_to(Duration::from_millis(50))).await;
                server.restart().await;
                load.conserved(&server).await;
            } else {
                sleep(random.up_to(Duration::from_millis(200))).await;
                *bites.entry(fault).or_insert(0) += strace.injected();
                drop(strace);
                recovered(&server, load).await;
                assert_eq!(server.pid(), pid);
            }
        }
        println!("{all} rounds, {felt} of them felt by callers; calls that were made to fail: {bites:?}");
        for fault in FAULTS {
            assert!(bites.get(fault).is_some_and(|bites| *bites > 0), "{fault:?} never bit: {bites:?}");
        }
        assert!(felt > 0, "no fault was felt");
    })
    .await;
    server.kill_and_check();
}

wire_tests! {
    /// G1–G9, G14: faults come and go, and the process that met them goes on.
    async fn an_embedded_server_outlives_faults_of_its_file() {
        survives(rounds(10, 100), 0).await;
    }

    /// G1–G9, G14: the server is killed right behind a fault; what it answered OK before and after it is there.
    async fn an_embedded_server_killed_behind_faults_of_its_file_loses_nothing() {
        survives(rounds(10, 100), 1_000).await;
    }
}
