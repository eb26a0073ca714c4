//! A light load that knows what it was promised: producers and workers that retry, and a ledger that is audited.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use data_queue_proto::v1::{InsertRequest, Outcome, PopRequest};
use tokio::{task::JoinSet, time::sleep};
use tonic::{Code, Status};

use crate::support::{
    PATIENCE,
    call::{ack_request, insert_request, json, outcomes, pop_request, proto, text},
    poll_until,
    server::{Client, Server},
    unique_queue,
};

const PRODUCERS: usize = 4;
const WORKERS: usize = 4;
/// Short, so that a delivery that a fault swallowed comes again while the test is patient.
const LEASE: Duration = Duration::from_secs(2);
const WAIT: Duration = Duration::from_millis(500);
const RETRY: Duration = Duration::from_millis(20);

/// What was promised so far.
#[derive(Debug)]
pub struct Ledger {
    queue: String,
    total: usize,
    /// Value to id, of every insert that was answered OK.
    inserted: Mutex<BTreeMap<String, String>>,
    /// Id to the moment at which its ack was known.
    acked: Mutex<BTreeMap<String, Instant>>,
    failures: AtomicUsize,
}

impl Ledger {
    pub fn queue(&self) -> &str {
        &self.queue
    }

    /// Waits until this share of the load is done, in hundredths.
    pub async fn reached(&self, percent: usize) {
        let wanted = self.total * percent / 100;
        poll_until("the load to go on", PATIENCE, async || (self.acked.lock().unwrap().len() >= wanted).then_some(()))
            .await;
    }

    fn done(&self) -> bool {
        self.acked.lock().unwrap().len() >= self.total
    }

    /// A fault may end a call, but only in a way that says that a retry is safe.
    fn excuse(&self, status: &Status) {
        let excused = [Code::Unavailable, Code::Unknown, Code::Cancelled, Code::DeadlineExceeded];
        assert!(excused.contains(&status.code()), "no fault explains {status:?}");
        self.failures.fetch_add(1, Ordering::Relaxed);
    }
}

/// Inserts `total` tasks and works them off through these servers while `faults` happen; then audits the ledger.
pub async fn survive(servers: &[&Server], total: usize, faults: impl AsyncFnOnce(&Ledger)) {
    survive_in(unique_queue("load"), servers, total, faults).await;
}

/// The same in a queue that is there.
pub async fn survive_in(queue: String, servers: &[&Server], total: usize, faults: impl AsyncFnOnce(&Ledger)) {
    let ledger = Arc::new(Ledger {
        queue,
        total,
        inserted: Mutex::default(),
        acked: Mutex::default(),
        failures: AtomicUsize::new(0),
    });
    let mut hands = JoinSet::new();
    for number in 0..PRODUCERS {
        let client = servers[number % servers.len()].client().await;
        let values = (number..total).step_by(PRODUCERS).map(|value| format!("{{\"task\": {value}}}")).collect();
        hands.spawn(produce(Arc::clone(&ledger), client, values));
    }
    for number in 0..WORKERS {
        let client = servers[number % servers.len()].client().await;
        hands.spawn(work(Arc::clone(&ledger), client));
    }
    faults(&ledger).await;
    while let Some(hand) = hands.join_next().await {
        hand.expect("a producer or worker");
    }
    audit(&ledger, &mut servers[0].client().await).await;
}

async fn produce(ledger: Arc<Ledger>, mut client: Client, values: Vec<String>) {
    for value in values {
        let request = InsertRequest { request_id: value.clone(), ..insert_request(&ledger.queue, vec![json(&value)]) };
        let id = loop {
            match client.insert(request.clone()).await {
                Ok(answer) => break answer.into_inner().results[0].id.clone(),
                Err(status) => ledger.excuse(&status),
            }
            sleep(RETRY).await;
        };
        ledger.inserted.lock().unwrap().insert(value, id);
    }
}

async fn work(ledger: Arc<Ledger>, mut client: Client) {
    while !ledger.done() {
        let started = Instant::now();
        let request = PopRequest { lease: Some(proto(LEASE)), wait: Some(proto(WAIT)), ..pop_request(&ledger.queue) };
        let task = match client.pop(request).await {
            Ok(answer) => answer.into_inner().task,
            Err(status) => {
                ledger.excuse(&status);
                sleep(RETRY).await;
                None
            }
        };
        let Some(task) = task else { continue };
        if let Some(acked) = ledger.acked.lock().unwrap().get(&task.id) {
            assert!(*acked > started, "delivered after its ack: {task:?}");
        }
        assert!(text(&task).starts_with("{\"task\": "), "never inserted: {task:?}");
        loop {
            match client.ack(ack_request(&ledger.queue, std::slice::from_ref(&task.lease_token))).await {
                Ok(answer) => {
                    if outcomes(&answer.into_inner().outcomes) != [Outcome::LeaseLost] {
                        ledger.acked.lock().unwrap().entry(task.id).or_insert_with(Instant::now);
                    }
                    break;
                }
                Err(status) => ledger.excuse(&status),
            }
            sleep(RETRY).await;
        }
    }
}

/// Every insert that was answered OK made one task, every such task was acked, and nothing else was there.
async fn audit(ledger: &Ledger, client: &mut Client) {
    let inserted = ledger.inserted.lock().unwrap().clone();
    assert_eq!(inserted.len(), ledger.total);
    let ids = inserted.values().collect::<BTreeSet<_>>();
    assert_eq!(ids.len(), ledger.total, "two inserts have one id");
    {
        let acked = ledger.acked.lock().unwrap();
        assert_eq!(acked.keys().collect::<BTreeSet<_>>(), ids, "not what was inserted is what was acked");
    }
    // The last fault may not be over.
    let popped = poll_until("a pop", PATIENCE, async || client.pop(pop_request(&ledger.queue)).await.ok()).await;
    assert_eq!(popped.into_inner().task, None, "inserted twice, or acked and back");
    println!("{} tasks, {} calls failed and were retried", ledger.total, ledger.failures.load(Ordering::Relaxed));
}
