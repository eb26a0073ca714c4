//! A work queue with leases behind gRPC.
//!
//! # The way of a request
//!
//! A socket is accepted once and handed to one of the serving threads, each a runtime of its own. There a call passes the
//! edge ([`grpc::EdgeLayer`]: deadline, panics, stopping), is decoded by [`grpc::DataQueueService`] or [`grpc::QueueAdminService`], decided by
//! [`queue::Queues`] (limits, waiting) and done by a [`store::Store`] in one step. What a pop leased hangs on a guard
//! until HTTP/2 has taken the answer; if it never does, the guard puts the task back.
//!
//! ```text
//! main → serve → { grpc, reaper } → queue → store ← { sqlite, redis, memory }
//! ```
//!
//! # The modules
//!
//! - [`config`]: the settings.
//! - [`grpc`]: translates between messages and calls; the one table from errors to statuses.
//! - [`queue`]: the core.
//! - [`store`]: the traits, and what implements them.
//! - [`reaper`]: takes back what nobody pops.

pub mod config;
pub mod grpc;
pub mod queue;
pub mod reaper;
pub mod store;

use std::{io, sync::Arc, thread, time::Duration};

use data_queue_proto::{
    FILE_DESCRIPTOR_SET,
    v1::{data_queue_server::DataQueueServer, queue_admin_server::QueueAdminServer},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, sleep, timeout_at},
};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tokio_util::{
    sync::CancellationToken,
    task::{AbortOnDropHandle, TaskTracker},
};
use tonic::{codec::CompressionEncoding, transport::Server};
use tonic_health::{
    ServingStatus,
    pb::health_server::HealthServer,
    server::{HealthReporter, HealthService},
};

use crate::{
    config::Config,
    grpc::{Calls, DataQueueService, EdgeLayer, QueueAdminService, ShortcutLayer, Socket},
    queue::{Queues, Waits},
    reaper::Reaper,
    store::{Backend, Store},
};

/// The names under which health is told: the server as a whole, and the services.
const HEALTH_NAMES: [&str; 3] = ["", "dataqueue.v1.DataQueue", "dataqueue.v1.QueueAdmin"];
/// Between two checks whether the store is there.
const CHECK_STORE_EVERY: Duration = Duration::from_millis(500);
/// Before listening again for other servers' hints, after the store was lost.
const LISTEN_AGAIN_AFTER: Duration = Duration::from_millis(500);
/// After accepting failed: usually there are no file descriptors left.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(100);
/// Sockets that wait for their thread.
const SOCKETS_WAITING: usize = 64;
/// A thread of the server wakes so often for nothing: tokio tells a sleeping thread with a system call of every new timer that is
/// due before all it knows, and calls bring timers all the time. This one is due before nearly all of them.
const FIRST_TIMER: Duration = Duration::from_millis(250);
/// Of the grace, what is kept for putting tasks back after calls were cut off: this, or a quarter if that is less.
const KEPT_FOR_PUTTING_BACK: Duration = Duration::from_secs(2);

/// Limits of HTTP/2 that are no settings.
const MAX_HEADER_LIST: u32 = 16 * 1024;
const MAX_RESETS_BEFORE_ACCEPT: usize = 64;
const MAX_LOCAL_ERROR_RESETS: usize = 256;
const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = 1024 * 1024;

/// What all threads have in common.
#[derive(Clone)]
struct Process {
    config: Arc<Config>,
    backend: Backend,
    waits: Arc<Waits>,
    calls: Calls,
    /// Work that must end before the process does: steps of the store, tasks to be put back.
    background: TaskTracker,
    health: HealthReporter,
    /// No more connections are accepted, and those without calls are closed.
    closing: CancellationToken,
    /// All connections are cut off.
    cut_off: CancellationToken,
}

type Accepted = (std::net::TcpStream, OwnedSemaphorePermit);

/// Serves until `shutdown` completes and what is under way has ended, or the grace is over. The listener may already
/// have connections waiting; `ready` is called when the first of them is about to be accepted.
pub async fn serve(
    listener: TcpListener,
    backend: Backend,
    config: Config,
    ready: impl FnOnce(),
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let process = Process {
        config: Arc::new(config),
        backend,
        waits: Arc::default(),
        calls: Calls::default(),
        background: TaskTracker::new(),
        health: HealthReporter::new(),
        closing: CancellationToken::new(),
        cut_off: CancellationToken::new(),
    };
    let store: Arc<dyn Store> = process.backend.for_this_thread();
    // The first answer, whichever it is, comes before the first call, so that an early caller is not refused for nothing.
    let first = store.check().await.map_err(|error| error.to_string());
    process.tell_health(&first).await;

    let mut threads = Vec::new();
    let mut sockets = Vec::new();
    for number in 0..process.config.serving_threads() {
        let (sender, receiver) = mpsc::channel(SOCKETS_WAITING);
        let thread_process = process.clone();
        let name = format!("grpc-{number}");
        threads.push(thread::Builder::new().name(name).spawn(move || thread_process.serve_thread(receiver))?);
        sockets.push(sender);
    }

    let mut loops = JoinSet::new();
    loops.spawn(process.clone().watch_store(Arc::clone(&store), first));
    loops.spawn(process.clone().listen_to_others(Arc::clone(&store)));
    loops.spawn(Reaper::new(Arc::clone(&store), Arc::clone(&process.waits)).run());
    let (waits, looking) = (Arc::clone(&process.waits), Arc::clone(&store));
    loops.spawn(async move { waits.run_looks(&*looking).await });
    loops.spawn(process.clone().accept(listener, sockets));
    ready();

    let ended = tokio::select! {
        () = shutdown => Ok(()),
        // None of them ends by itself: what is left would look alive, and serve no new connection.
        _ = loops.join_next() => Err(io::Error::other("a part of the server ended; the log has the cause")),
    };
    process.stop(threads).await;
    ended
}

impl Process {
    /// Hands each socket in turn to the next thread.
    async fn accept(self, listener: TcpListener, threads: Vec<mpsc::Sender<Accepted>>) {
        let permits = Arc::new(Semaphore::new(self.config.max_connections as usize));
        let accepting = async {
            for thread in threads.iter().cycle() {
                let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
                let socket = accept_one(&listener).await;
                if thread.send((socket, permit)).await.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            () = accepting => {}
            () = self.closing.cancelled() => {}
        }
    }

    /// One thread: its own runtime, its own connections to the store.
    fn serve_thread(self, sockets: mpsc::Receiver<Accepted>) -> Result<(), String> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.map_err(|error| error.to_string())?.block_on(self.serve_sockets(sockets))
    }

    async fn serve_sockets(self, sockets: mpsc::Receiver<Accepted>) -> Result<(), String> {
        let config = &self.config;
        let queues = Queues::new(
            self.backend.for_this_thread(),
            Arc::clone(&self.waits),
            config.limits(),
            self.calls.stopping.clone(),
            self.background.clone(),
        );
        // Tonic bounds what a compressed request decompresses to by the same size, while it does it.
        let admin = QueueAdminServer::new(QueueAdminService::new(queues.clone(), config))
            .max_decoding_message_size(config.max_message)
            .accept_compressed(CompressionEncoding::Gzip);
        let service = DataQueueServer::new(DataQueueService::new(queues))
            .max_decoding_message_size(config.max_message)
            .accept_compressed(CompressionEncoding::Gzip);
        let mut server = Server::builder()
            .max_concurrent_streams(config.max_streams)
            .http2_keepalive_interval(Some(config.keepalive_interval))
            .http2_keepalive_timeout(Some(config.keepalive_timeout))
            .http2_max_header_list_size(MAX_HEADER_LIST)
            .http2_max_pending_accept_reset_streams(Some(MAX_RESETS_BEFORE_ACCEPT))
            .http2_max_local_error_reset_streams(Some(MAX_LOCAL_ERROR_RESETS))
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .layer(EdgeLayer::new(self.calls.clone(), config.max_message, config.stall_timeout))
            .layer(ShortcutLayer::new(service.clone()));
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
        };
        let mut router = server
            .add_service(service)
            .add_service(admin)
            .add_service(HealthServer::new(HealthService::from_health_reporter(self.health.clone())));
        if !config.no_reflection {
            router = router
                .add_service(reflection().build_v1().map_err(|error| error.to_string())?)
                .add_service(reflection().build_v1alpha().map_err(|error| error.to_string())?);
        }
        let (patience, cut_off) = (config.keepalive_interval + config.keepalive_timeout, self.cut_off.clone());
        let incoming = ReceiverStream::new(sockets).map(|(socket, permit)| {
            let stream = TcpStream::from_std(socket)?;
            Ok::<_, io::Error>(Socket::new(stream, patience, cut_off.clone().cancelled_owned(), permit))
        });
        let mut first_timer = interval(FIRST_TIMER);
        first_timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let ticking = AbortOnDropHandle::new(tokio::spawn(async move {
            loop {
                first_timer.tick().await;
            }
        }));
        let served = router.serve_with_incoming_shutdown(incoming, self.closing.cancelled()).await;
        drop(ticking);
        // This runtime carries tasks that put back what was not handed over; it must not end before them.
        self.background.wait().await;
        served.map_err(|error| error.to_string())
    }

    /// Keeps health true to the store.
    async fn watch_store(self, store: Arc<dyn Store>, mut last: Result<(), String>) {
        if let Err(reason) = &last {
            tracing::warn!(reason, "the store is not available; calls are refused until it is");
        }
        loop {
            sleep(CHECK_STORE_EVERY).await;
            let found = store.check().await.map_err(|error| error.to_string());
            if self.calls.stopping.is_cancelled() {
                return;
            }
            if found != last {
                match &found {
                    Ok(()) => tracing::info!("the store is available"),
                    Err(reason) => tracing::warn!(reason, "the store is not available; calls are refused until it is"),
                }
                self.tell_health(&found).await;
                last = found;
            }
        }
    }

    async fn tell_health<E>(&self, found: &Result<(), E>) {
        let status = if found.is_ok() { ServingStatus::Serving } else { ServingStatus::NotServing };
        for name in HEALTH_NAMES {
            self.health.set_service_status(name, status).await;
        }
    }

    /// Passes hints from other servers on to the pops that wait here.
    async fn listen_to_others(self, store: Arc<dyn Store>) {
        loop {
            let waits = Arc::clone(&self.waits);
            let listened = store.listen(Arc::new(move |queue, tasks| waits.wake(queue, tasks))).await;
            if let Err(error) = listened {
                tracing::debug!(%error, "cannot listen to other servers; waiting pops look for themselves");
            }
            sleep(LISTEN_AGAIN_AFTER).await;
        }
    }

    /// Stops in order: no more calls; those under way end, waiting ones at once; connections close; tasks that were not
    /// handed over are back in their queues; the threads end.
    async fn stop(&self, threads: Vec<thread::JoinHandle<Result<(), String>>>) {
        let grace = self.config.grace;
        let end = Instant::now() + grace;
        let cut_off_at = end - KEPT_FOR_PUTTING_BACK.min(grace / 4);
        tracing::info!("stopping");
        self.calls.stopping.cancel();
        self.tell_health(&Err(())).await;

        self.calls.under_way.close();
        let calls_ended = timeout_at(cut_off_at, self.calls.under_way.wait()).await.is_ok();
        self.background.close();
        self.calls.drained.cancel();
        self.closing.cancel();
        let mut ended = std::pin::pin!(threads_end(threads));
        if !calls_ended || timeout_at(cut_off_at, &mut ended).await.is_err() {
            tracing::warn!("calls or connections did not end within the grace; they are cut off");
            self.cut_off.cancel();
            if timeout_at(end, ended).await.is_err() {
                let tasks = self.background.len();
                tracing::warn!(
                    tasks,
                    "not all tasks that were not handed over could be put back; their leases will run out"
                );
            }
        }
        tracing::info!("stopped");
    }
}

async fn threads_end(threads: Vec<thread::JoinHandle<Result<(), String>>>) {
    let joined = tokio::task::spawn_blocking(move || {
        for thread in threads {
            match thread.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::error!(error, "a serving thread failed"),
                Err(_) => tracing::error!("a serving thread panicked"),
            }
        }
    });
    if joined.await.is_err() {
        tracing::error!("could not wait for the serving threads");
    }
}

async fn accept_one(listener: &TcpListener) -> std::net::TcpStream {
    loop {
        let accepted = async {
            let (socket, _) = listener.accept().await?;
            socket.set_nodelay(true)?;
            socket.into_std()
        };
        match accepted.await {
            Ok(socket) => return socket,
            Err(error) => {
                tracing::warn!(%error, "could not accept a connection");
                sleep(ACCEPT_AGAIN_AFTER).await;
            }
        }
    }
}
