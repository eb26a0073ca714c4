//! The program that each language's client has, for tests that run them side by side: `scenario` runs the steps of
//! `client/scenario.json`, with bare stubs for the single calls; `work` is a worker until SIGTERM.
//!
//! ```sh
//! cargo run -p data-queue-client --example program -- scenario --addr 127.0.0.1:50051 --file client/scenario.json --prefix rust
//! cargo run -p data-queue-client --example program -- work --addr 127.0.0.1:50051 --queue mail --concurrency 16
//! ```

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    env,
    error::Error,
    fmt::Debug,
    fs,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use data_queue_client::{Assigned, Client, Event, Failure, NewTask, Reject, Summary, Worker, json};
use data_queue_proto::v1::{
    self, data_queue_client::DataQueueClient, new_task, queue_admin_client::QueueAdminClient, task,
};
use md5::{Digest, Md5};
use serde_json::{Value, json as value};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::{sleep, timeout},
};
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt;

/// How long a step of many tasks may take.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long counts may take to become what they should be.
const SETTLING: Duration = Duration::from_secs(10);

type Done<T = ()> = Result<T, Box<dyn Error + Send + Sync>>;

#[tokio::main]
async fn main() -> Done {
    let mut arguments = env::args().skip(1);
    let command = arguments.next().unwrap_or_default();
    let mut flags = HashMap::new();
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{name} has no value"))?;
        flags.insert(name, value);
    }
    let address = flags.get("--addr").cloned().or_else(|| env::var("DATA_QUEUE_ADDR").ok());
    let client = Client::connect(address.as_deref().unwrap_or("127.0.0.1:50051"))?;
    match command.as_str() {
        "work" => work(&client, &flags).await,
        "scenario" => {
            let address = address.unwrap_or_else(|| "127.0.0.1:50051".to_owned());
            let steps: Value = serde_json::from_str(&fs::read_to_string(flag(&flags, "--file")?)?)?;
            Scenario::new(client, &address, flag(&flags, "--prefix")?)?.run(list(&steps["steps"])).await
        }
        _ => Err("usage: program scenario --file FILE --prefix PREFIX | work --queue QUEUE [--addr HOST:PORT]".into()),
    }
}

fn flag<'a>(flags: &'a HashMap<String, String>, name: &str) -> Done<&'a str> {
    Ok(flags.get(name).ok_or_else(|| format!("{name} is missing"))?)
}

fn number(flags: &HashMap<String, String>, name: &str, default: u64) -> Done<u64> {
    Ok(flags.get(name).map_or(Ok(default), |text| text.parse())?)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Prints what is delivered, acked and lost, until SIGTERM.
async fn work(client: &Client, flags: &HashMap<String, String>) -> Done {
    let (fail_every, hold) = (number(flags, "--fail-every", 0)?, Duration::from_millis(number(flags, "--hold", 0)?));
    let worker = Worker::new(client, flag(flags, "--queue")?)
        .concurrency(u32::try_from(number(flags, "--concurrency", 16)?)?)
        .grace(Duration::from_millis(number(flags, "--grace", 30_000)?))
        .on_event(|event| match event {
            Event::Done(task) => println!("acked {} {}", task.id(), task.lease_token()),
            Event::Lost(task) => println!("lost {} {}", task.id(), task.lease_token()),
            Event::Damaged(error) | Event::Disconnected(error) => eprintln!("{error}"),
            _ => {}
        });
    let delivered = Arc::new(AtomicU64::new(0));
    let handler = move |task: Assigned| {
        let delivery = delivered.fetch_add(1, Ordering::Relaxed) + 1;
        async move {
            println!("delivered {} {} {}", task.id(), task.lease_token(), hex(&Md5::digest(task.bytes())));
            sleep(hold).await;
            if delivery.is_multiple_of(fail_every) { Err("as asked") } else { Ok(()) }
        }
    };
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stop = async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    };
    let summary = worker.run_until(stop, handler).await?;
    eprintln!("{summary:?}");
    println!("stopped");
    Ok(())
}

/// What is known of a task that has a name.
#[derive(Default)]
struct Known {
    id: String,
    sent: v1::NewTask,
    token: String,
    stale: String,
}

/// The steps, and what they know of each other.
struct Scenario {
    client: Client,
    queues: DataQueueClient<Channel>,
    admin: QueueAdminClient<Channel>,
    prefix: String,
    /// By the queue and the name.
    known: HashMap<(String, String), Known>,
}

impl Scenario {
    fn new(client: Client, address: &str, prefix: &str) -> Done<Self> {
        let channel = Channel::from_shared(format!("http://{address}"))?.connect_lazy();
        let (queues, admin) = (DataQueueClient::new(channel.clone()), QueueAdminClient::new(channel));
        Ok(Self { client, queues, admin, prefix: prefix.to_owned(), known: HashMap::new() })
    }

    async fn run(mut self, steps: &[Value]) -> Done {
        for (number, step) in (1..).zip(steps) {
            let (what, queue) = (word(&step["do"]), word(&step["queue"]));
            match self.step(what, step).await {
                Ok(()) => println!("ok {number} {what} {queue}"),
                Err(error) => {
                    println!("failed {number} {what} {queue}: {error}");
                    std::process::exit(1);
                }
            }
        }
        Ok(())
    }

    async fn step(&mut self, what: &str, step: &Value) -> Done {
        let queue = format!("{}-{}", self.prefix, word(&step["queue"]));
        let expect = &step["expect"];
        let seen = match what {
            "insert" => self.insert(&queue, step).await,
            "pop" => self.pop(&queue, step).await,
            "pop_batch" => self.pop_batch(&queue, step).await,
            "ack" => self.ack(&queue, step).await,
            "heartbeat" => self.heartbeat(&queue, step).await,
            "putback" => self.put_back(&queue, step).await,
            "counts" => return self.counts(&queue, expect).await,
            "dead" => self.dead(&queue).await,
            "consume" => self.consume(&queue, step).await,
            "reconnect" => self.reconnect(&queue, step).await,
            _ => Err(format!("nobody knows how to {what}").into()),
        };
        let seen = match seen {
            Ok(seen) => seen,
            Err(error) => value!({ "error": refusal(error.downcast::<Status>()?.as_ref()) }),
        };
        compare("the answer", &seen, expect)
    }

    async fn insert(&mut self, queue: &str, step: &Value) -> Done<Value> {
        let tasks: Vec<v1::NewTask> = list(&step["tasks"]).iter().map(new_task).collect::<Done<_>>()?;
        let request = v1::InsertRequest {
            queue: queue.into(),
            tasks: tasks.clone(),
            request_id: word(&step["request_id"]).into(),
            ..v1::InsertRequest::default()
        };
        let answer = self.queues.insert(request).await?.into_inner();
        same("results", &answer.results.len(), &tasks.len())?;
        for ((name, sent), result) in list(&step["names"]).iter().zip(tasks).zip(answer.results) {
            let known = self.known.entry((queue.to_owned(), word(name).to_owned())).or_default();
            if known.id.is_empty() {
                (known.id, known.sent) = (result.id, sent);
            } else {
                same("the id of an insert that is known", &result.id, &known.id)?;
            }
        }
        Ok(value!({ "replayed": answer.replayed }))
    }

    /// Notes the tokens of what was delivered, which must be what was inserted; answers the names.
    fn deliver(&mut self, queue: &str, tasks: Vec<v1::Task>) -> Done<Value> {
        let (mut names, mut deliveries) = (Vec::new(), Vec::new());
        for task in tasks {
            let found = self.known.iter_mut().find(|((of, _), known)| of == queue && known.id == task.id);
            let ((_, name), known) = found.ok_or_else(|| format!("task {} was not inserted", task.id))?;
            let sent = known.sent.value.clone().map(|value| match value {
                new_task::Value::Json(text) => task::Value::Json(text),
                new_task::Value::Data(data) => task::Value::Data(data),
            });
            if task.value != sent || task.headers != known.sent.headers {
                return Err(format!("{name} is not what was inserted").into());
            }
            known.stale = std::mem::replace(&mut known.token, task.lease_token);
            names.push(name.clone());
            deliveries.push(task.deliveries);
        }
        Ok(value!({ "tasks": names, "deliveries": deliveries }))
    }

    async fn pop(&mut self, queue: &str, step: &Value) -> Done<Value> {
        let (lease, wait) = (time(&step["lease"]), time(&step["wait"]));
        let request = v1::PopRequest { queue: queue.into(), lease, wait, ..v1::PopRequest::default() };
        let task = self.queues.pop(request).await?.into_inner().task;
        self.deliver(queue, task.into_iter().collect())
    }

    async fn pop_batch(&mut self, queue: &str, step: &Value) -> Done<Value> {
        let max_tasks = u32::try_from(count(&step["max_tasks"]))?;
        let (lease, wait) = (time(&step["lease"]), time(&step["wait"]));
        let request = v1::PopBatchRequest { queue: queue.into(), max_tasks, lease, wait, request_id: String::new() };
        let mut stream = self.queues.pop_batch(request).await?.into_inner();
        let mut tasks = Vec::new();
        while let Some(message) = stream.message().await? {
            tasks.extend(message.tasks);
        }
        self.deliver(queue, tasks)
    }

    /// The last tokens of the tasks that a step names, or those before.
    fn tokens(&self, queue: &str, step: &Value) -> Done<Vec<String>> {
        let last = list(&step["tasks"]).iter().map(|name| (name, false));
        let names = last.chain(list(&step["stale"]).iter().map(|name| (name, true)));
        let token = |(name, is_stale): (&Value, bool)| {
            let known = self.known.get(&(queue.to_owned(), word(name).to_owned()));
            let known = known.ok_or_else(|| format!("nobody knows {name}"))?;
            Ok(if is_stale { known.stale.clone() } else { known.token.clone() })
        };
        names.map(token).collect()
    }

    async fn ack(&mut self, queue: &str, step: &Value) -> Done<Value> {
        let request = v1::AckRequest { queue: queue.into(), lease_tokens: self.tokens(queue, step)? };
        outcomes(&self.queues.ack(request).await?.into_inner().outcomes)
    }

    async fn heartbeat(&mut self, queue: &str, step: &Value) -> Done<Value> {
        let (lease_tokens, lease) = (self.tokens(queue, step)?, time(&step["lease"]));
        let request = v1::HeartbeatRequest { queue: queue.into(), lease_tokens, lease };
        outcomes(&self.queues.heartbeat(request).await?.into_inner().outcomes)
    }

    async fn put_back(&mut self, queue: &str, step: &Value) -> Done<Value> {
        let is = |field: &str| step[field].as_bool().unwrap_or_default();
        let tokens = v1::PutbackTokens {
            lease_tokens: self.tokens(queue, step)?,
            delay: time(&step["delay"]),
            reason: word(&step["reason"]).into(),
            failed: is("failed"),
            dead_letter: is("dead_letter"),
        };
        let selection = Some(v1::putback_request::Selection::Tokens(tokens));
        let request = v1::PutbackRequest { queue: queue.into(), selection };
        outcomes(&self.queues.putback(request).await?.into_inner().outcomes)
    }

    /// An ack may be under way, so they are asked for until they are as expected.
    async fn counts(&mut self, queue: &str, expect: &Value) -> Done {
        let deadline = Instant::now() + SETTLING;
        loop {
            let answer = self.admin.get_queue(v1::GetQueueRequest { queue: queue.into() }).await?.into_inner();
            let v1::QueueCounts { ready, scheduled, leased, dead, inserted, acked, .. } =
                answer.queue.and_then(|queue| queue.counts).ok_or("no counts")?;
            let seen = value!({ "ready": ready, "scheduled": scheduled, "leased": leased, "dead": dead,
                "inserted": inserted, "acked": acked });
            match compare("counts", &seen, expect) {
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => sleep(Duration::from_millis(50)).await,
                Ok(()) => return Ok(()),
            }
        }
    }

    async fn dead(&mut self, queue: &str) -> Done<Value> {
        let state = v1::TaskState::Dead.into();
        let request = v1::ListTasksRequest { queue: queue.into(), state, ..v1::ListTasksRequest::default() };
        let (mut names, mut reasons) = (Vec::new(), Vec::new());
        for dead in self.admin.list_tasks(request).await?.into_inner().tasks {
            let id = dead.task.ok_or("no task")?.id;
            let found = self.known.iter().find(|((of, _), known)| of == queue && known.id == id);
            names.push(found.map_or(id.clone(), |((_, name), _)| name.clone()));
            reasons.push(dead.last_error);
        }
        Ok(value!({ "tasks": names, "reasons": reasons }))
    }

    async fn consume(&mut self, queue: &str, step: &Value) -> Done<Value> {
        let producer = self.client.producer(queue).build()?;
        let total = count(&step["count"]);
        let mut receipts = Vec::new();
        for n in 0..total {
            receipts.push(producer.send(NewTask::json(&value!({ "n": n }))?).await?);
        }
        for receipt in receipts {
            receipt.one().await?;
        }
        producer.close().await?;

        let [fails, rejects] = [&step["fail"], &step["reject"]].map(|list_of| list(list_of).to_vec());
        let gauge = Arc::new(Mutex::new((0, 0)));
        let at_work = Arc::clone(&gauge);
        let handler = json(move |task_value: Value, task| {
            let (fails, rejects) = (fails.contains(&task_value["n"]), rejects.contains(&task_value["n"]));
            let at_work = Arc::clone(&at_work);
            async move {
                note(&at_work, 1);
                sleep(Duration::from_millis(5)).await;
                note(&at_work, -1);
                match task.failures() {
                    _ if rejects => Err(Reject::new("never").into()),
                    0 if fails => Err("not at first".into()),
                    failures if failures != u32::from(fails) => Err(format!("it failed {failures} times").into()),
                    _ => Ok::<_, Failure>(()),
                }
            }
        });
        let (ended, mut ends) = mpsc::unbounded_channel();
        let concurrency = u32::try_from(count(&step["concurrency"]))?;
        let worker = Worker::new(&self.client, queue).concurrency(concurrency).on_event(move |event| {
            if let Event::Done(_) | Event::Rejected(..) = event {
                let _ = ended.send(());
            }
        });
        let all = async {
            for _ in 0..total {
                ends.recv().await;
            }
        };
        let Summary { done, failed, rejected, .. } = timeout(PATIENCE, worker.run_until(all, handler)).await??;
        let (_, most) = *gauge.lock().map_err(|_| "a handler has panicked")?;
        if most < 2 || most > i64::from(concurrency) {
            return Err(format!("{most} handlers ran at once").into());
        }
        Ok(value!({ "handled": done, "failed": failed, "rejected": rejected }))
    }

    async fn reconnect(&mut self, queue: &str, step: &Value) -> Done<Value> {
        let (total, restart_after) = (count(&step["count"]), count(&step["restart_after"]));
        let (acked, mut acks) = mpsc::unbounded_channel();
        let concurrency = u32::try_from(count(&step["concurrency"]))?;
        let worker = Worker::new(&self.client, queue).concurrency(concurrency).on_event(move |event| match event {
            Event::Done(task) => drop(acked.send(task.json::<BTreeMap<String, u64>>().ok())),
            Event::Disconnected(error) => eprintln!("{error}"),
            _ => {}
        });
        let producer = self.client.producer(queue).deadline(PATIENCE).build()?;
        let inserting = tokio::spawn(async move {
            for n in 0..total {
                producer.send(NewTask::json(&value!({ "n": n }))?).await?.one().await?;
            }
            producer.close().await
        });
        let mut handled = BTreeSet::new();
        let all = async {
            while (handled.len() as u64) < total {
                let Some(acked) = acks.recv().await else { return };
                let before = handled.len() as u64;
                handled.extend(acked.and_then(|fields| fields.get("n").copied()));
                if before < restart_after && handled.len() as u64 >= restart_after {
                    println!("restart");
                }
            }
        };
        let handler = |_: Assigned| async {
            sleep(Duration::from_millis(1)).await;
            Ok::<_, Failure>(())
        };
        timeout(PATIENCE, worker.run_until(all, handler)).await??;
        inserting.await??;
        Ok(value!({ "handled": handled.len() }))
    }
}

/// How many handlers are at work, and how many were at the most.
fn note(gauge: &Mutex<(i64, i64)>, more: i64) {
    if let Ok(mut gauge) = gauge.lock() {
        gauge.0 += more;
        gauge.1 = gauge.1.max(gauge.0);
    }
}

fn same<T: PartialEq + Debug>(what: &str, seen: &T, expected: &T) -> Done {
    if seen == expected { Ok(()) } else { Err(format!("{what} is {seen:?}, not {expected:?}").into()) }
}

/// Only the fields that are expected count.
fn compare(what: &str, seen: &Value, expected: &Value) -> Done {
    match expected {
        Value::Object(fields) => fields.iter().try_for_each(|(field, expected)| compare(field, &seen[field], expected)),
        _ => same(what, seen, expected),
    }
}

fn word(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn count(value: &Value) -> u64 {
    value.as_u64().unwrap_or_default()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// Milliseconds, if there are any.
fn time(value: &Value) -> Option<prost_types::Duration> {
    let time = Duration::from_millis(value.as_u64()?);
    prost_types::Duration::try_from(time).ok()
}

fn new_task(step: &Value) -> Done<v1::NewTask> {
    let value = match &step["data"] {
        Value::String(text) => new_task::Value::Data(from_base64(text)?.into()),
        _ => new_task::Value::Json(word(&step["json"]).to_owned()),
    };
    let headers = step["headers"].as_object().into_iter().flatten();
    let headers = headers.map(|(key, value)| (key.clone(), word(value).to_owned())).collect();
    Ok(v1::NewTask { value: Some(value), headers, ..v1::NewTask::default() })
}

fn from_base64(text: &str) -> Done<Vec<u8>> {
    const DIGITS: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut bytes, mut bits, mut held) = (Vec::new(), 0, 0_u32);
    for digit in text.trim_end_matches('=').chars() {
        let digit = DIGITS.find(digit).ok_or("this is not base64")?;
        (held, bits) = (held << 6 | u32::try_from(digit)?, bits + 6);
        if bits >= 8 {
            bits -= 8;
            bytes.push((held >> bits & 255) as u8);
        }
    }
    Ok(bytes)
}

fn outcomes(codes: &[i32]) -> Done<Value> {
    let name = |code: &i32| Ok(v1::Outcome::try_from(*code)?.as_str_name().trim_start_matches("OUTCOME_"));
    Ok(value!({ "outcomes": codes.iter().map(name).collect::<Done<Vec<_>>>()? }))
}

/// What a refusal says, as the scenario has it.
fn refusal(status: &Status) -> Value {
    let code = match status.code() {
        Code::AlreadyExists => "ALREADY_EXISTS".to_owned(),
        Code::InvalidArgument => "INVALID_ARGUMENT".to_owned(),
        other => format!("{other:?}: {}", status.message()),
    };
    let mut refusal = value!({ "code": code });
    if let Some(info) = status.get_details_error_info() {
        refusal["reason"] = info.reason.into();
    }
    let violations = status.get_details_bad_request().into_iter().flat_map(|bad| bad.field_violations);
    if let Some(violation) = violations.into_iter().next() {
        refusal["field"] = violation.field.into();
    }
    refusal
}
