//! Client for DataQueue, a work queue with leases that speaks gRPC.
//!
//! A producer inserts tasks. A worker pops a task and holds it under a lease, heartbeats while it works and acks when
//! it is done. What is not acked before its lease runs out goes back to its queue.
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use data_queue_client::{Client, ErrorKind, NewTask, Pop};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let client = Client::connect("127.0.0.1:50051")?;
//!
//! let id = client.insert("mail", NewTask::json(&("to", "ada@example.org"))?.header("lang", "en")).await?;
//! println!("inserted {id}");
//!
//! let next = Pop::new().lease(Duration::from_secs(30)).wait(Duration::from_secs(20));
//! while let Some(task) = client.pop("mail", next.clone()).await?.task {
//!     let (_, address): (String, String) = task.json()?;
//!     println!("mail to {address}");
//!     match client.ack(&task).await {
//!         Err(error) if error.kind() == ErrorKind::LeaseLost => println!("{}: another worker has it", task.id()),
//!         answer => answer?,
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # A worker
//!
//! A program that does nothing but work on tasks leaves pops, heartbeats and acks to a [`Worker`]: it calls a handler with each task, many
//! at a time, and settles the task by what the handler answers. What failed comes again later, what panicked too.
//!
//! ```no_run
//! use data_queue_client::{Client, Failure, Worker};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let client = Client::connect("127.0.0.1:50051")?;
//! let worker = Worker::new(&client, "mail").concurrency(50);
//! let stop = async { tokio::signal::ctrl_c().await.unwrap_or_default() };
//! let handler = |task: data_queue_client::Assigned| async move {
//!     let (_, address): (String, String) = task.json()?;
//!     println!("mail to {address}");
//!     Ok::<_, Failure>(())
//! };
//! println!("{:?}", worker.run_until(stop, handler).await?);
//! # Ok(())
//! # }
//! ```
//!
//! A [`Consumer`] gives the same tasks one by one, to be settled by hand, and a [`Producer`] is the other end: inserts over a stream, many
//! under way, each done once.
//!
//! # Calls
//!
//! Every call has a deadline, which covers all its tries. A call that failed on the way is repeated by itself where
//! that is safe, and only there; [`Client`] says for each call what is repeated.
//!
//! Operators have [`Client::admin`]: queues with their counts and settings, tasks that nobody delivers, dead letters.
//!
//! Where things are: `client` is the calls, `admin` those of operators, `producer` a stream of inserts, `consumer` a stream of
//! tasks, `worker` handlers for them, `task` what goes in and comes out, `pop` how tasks are asked for, `putback` how they are given back, `retry` when a
//! call is repeated, `address` where to, and `error` what can go wrong.

mod address;
mod admin;
mod client;
mod consumer;
mod error;
mod pop;
mod producer;
mod putback;
mod retry;
mod task;
mod worker;

pub use admin::{
    ActivityStream, Admin, DeadLetterCause, DeleteOutcome, Imported, Page, Paged, QueueActivity, QueueCounts,
    QueueInfo, QueueSettings, RedriveOutcome, Redriven, SettingsUpdate, TaskInfo, TaskState, TaskValue, Watch,
};
pub use client::{Builder, Client, Durability, Heartbeat, Inserted, InsertedTask, Outcome, PutbackDone};
pub use consumer::{Consumer, ConsumerBuilder, Delivered};
pub use error::{Error, ErrorKind, Result};
pub use pop::{Pop, PopBatch, Popped, TaskStream};
pub use producer::{Producer, ProducerBuilder, Receipt};
pub use putback::Putback;
pub use retry::Backoff;
pub use task::{NewTask, Task};
pub use worker::{Assigned, Event, Failure, Reject, Summary, Worker, json};

/// Compiles the example of the README.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
