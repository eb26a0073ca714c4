//! The real `data-queue-server` binary, one process a test.

use std::{
    env,
    ffi::OsString,
    io::{BufRead, BufReader, Read},
    net::SocketAddr,
    ops::{Deref, DerefMut},
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, MutexGuard, mpsc},
    thread,
    time::{Duration, Instant},
};

use data_queue_proto::v1::{data_queue_client::DataQueueClient, queue_admin_client::QueueAdminClient};
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient as RawHealthClient,
};

use super::{
    PATIENCE,
    directory::Directory,
    poll_until,
    redis::{Options, Redis},
};

/// The generated clients of both services, over one connection. It is that of `DataQueue` unless told otherwise.
#[derive(Clone, Debug)]
pub struct Client {
    queue: DataQueueClient<Channel>,
    pub admin: QueueAdminClient<Channel>,
}

impl Deref for Client {
    type Target = DataQueueClient<Channel>;

    fn deref(&self) -> &Self::Target {
        &self.queue
    }
}

impl DerefMut for Client {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.queue
    }
}

/// The health service's client over one connection.
pub type HealthClient = RawHealthClient<Channel>;

const BINARY: &str = "data-queue-server";
const POLL: Duration = Duration::from_millis(5);

/// Where a test's server keeps its tasks. A new store is a variant, its line in `start` and its line in `on_every_store`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    Memory,
    Redis,
    Sqlite,
}

impl Backend {
    /// A server on a fresh store that is ready to serve.
    pub async fn start(self, flags: &[&str]) -> Server {
        let server = match self {
            Self::Memory => Server::launch("memory", flags, None),
            Self::Redis => Server::on(Arc::new(Redis::start()), flags),
            Self::Sqlite => Server::on_sqlite_with(flags),
        };
        server.ready().await;
        server
    }
}

/// One running server, and the Redis or the directory it uses, if any.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    launch: Launch,
    said: String,
    process: Mutex<Option<Child>>,
    log: Log,
}

/// How the server is started, and started again.
#[derive(Debug, Default)]
struct Launch {
    /// Words in front of the command.
    prefix: Vec<String>,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    redis: Option<Arc<Redis>>,
    directory: Option<Arc<Directory>>,
}

impl Launch {
    fn with(arguments: &[&str]) -> Self {
        Self { arguments: arguments.iter().map(|word| (*word).to_owned()).collect(), ..Self::default() }
    }
}

impl Server {
    /// A server on this Redis, listening, perhaps not ready.
    pub fn on(redis: Arc<Redis>, flags: &[&str]) -> Self {
        let url = redis.url();
        Self::launch(&url, flags, Some(redis))
    }

    /// A server on a Redis started with these options, listening, perhaps not ready.
    pub fn on_redis_with(options: Options, flags: &[&str]) -> Self {
        Self::on(Arc::new(Redis::with(options)), flags)
    }

    /// A server with its file in a new directory, listening, perhaps not ready.
    pub fn on_sqlite_with(flags: &[&str]) -> Self {
        Self::on_directory(Arc::default(), flags)
    }

    /// A server with its file in this directory, listening, perhaps not ready.
    pub fn on_directory(directory: Arc<Directory>, flags: &[&str]) -> Self {
        let path = directory.text().to_owned();
        Self::begin(Launch { directory: Some(directory), ..Launch::with(&[&["--data-dir", &path], flags].concat()) })
    }

    /// A server with this `--store`, listening, perhaps not ready.
    pub fn launch(store: &str, flags: &[&str], redis: Option<Arc<Redis>>) -> Self {
        Self::begin(Launch { redis, ..Launch::with(&[&["--store", store], flags].concat()) })
    }

    /// A server with exactly these flags, behind a command that becomes what it is given, listening, perhaps not ready.
    pub fn launch_behind(prefix: &[String], flags: &[&str]) -> Self {
        Self::begin(Launch { prefix: prefix.to_vec(), ..Launch::with(flags) })
    }

    /// A server without a flag, that has only these variables to go by, listening on a free port, perhaps not ready.
    pub fn in_environment(environment: &[(&str, &str)]) -> Self {
        let own = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        Self::begin(Launch { environment: environment.iter().map(own).collect(), ..Launch::default() })
    }

    fn begin(launch: Launch) -> Self {
        let log = Log::default();
        let Started { child, address, said } = match spawn(&launch, "127.0.0.1:0", &log) {
            Ok(started) => started,
            Err(status) => panic!("{BINARY} {:?} did not start: {status}\n{log}", launch.arguments),
        };
        Self { address, launch, said, process: Mutex::new(Some(child)), log }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The Redis under this server; panics on another store.
    pub fn redis(&self) -> &Redis {
        self.launch.redis.as_ref().expect("a server on Redis")
    }

    /// The same, for what outlives this.
    pub fn shared_redis(&self) -> Arc<Redis> {
        Arc::clone(self.launch.redis.as_ref().expect("a server on Redis"))
    }

    /// The directory of this server's file; panics on another store.
    pub fn directory(&self) -> &Arc<Directory> {
        self.launch.directory.as_ref().expect("a server on SQLite")
    }

    /// What it wrote to stdout when it was first started, up to the line that tells its address.
    pub fn said(&self) -> &str {
        &self.said
    }

    /// The id of the process.
    pub fn pid(&self) -> u32 {
        self.process().as_ref().expect("the server runs").id()
    }

    /// Everything the server wrote to stderr so far.
    pub fn log(&self) -> String {
        self.log.to_string()
    }

    /// The generated clients on a connection of their own.
    pub async fn client(&self) -> Client {
        Self::client_at(self.address).await
    }

    /// The same through whatever listens there.
    pub async fn client_at(address: SocketAddr) -> Client {
        let channel = connect(address).await;
        Client { queue: DataQueueClient::new(channel.clone()), admin: QueueAdminClient::new(channel) }
    }

    /// Health checks on a connection of their own.
    pub async fn health_client(&self) -> HealthClient {
        RawHealthClient::new(self.channel().await)
    }

    /// The health of a service; `""` is the whole server.
    pub async fn health(&self, service: &str) -> ServingStatus {
        let request = HealthCheckRequest { service: service.to_owned() };
        let answer = self.health_client().await.check(request).await.expect("a health check");
        answer.into_inner().status()
    }

    /// Waits until the server says that it can serve.
    pub async fn ready(&self) {
        poll_until("the server to be ready", PATIENCE, async || {
            (self.health("").await == ServingStatus::Serving).then_some(())
        })
        .await;
    }

    /// SIGKILL.
    pub fn kill(&self) {
        if let Some(mut child) = self.process().take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGTERM.
    pub fn terminate(&self) {
        self.signal("TERM");
    }

    /// Sends a signal, given by its name.
    pub fn signal(&self, name: &str) {
        let process = self.process();
        let pid = process.as_ref().expect("the server runs").id().to_string();
        let status = Command::new("kill").args(["-s", name, &pid]).status().expect("the kill command");
        assert!(status.success(), "kill -s {name} {pid}: {status}");
    }

    /// Waits for the process to end by itself.
    pub fn wait_exit(&self, limit: Duration) -> ExitStatus {
        let mut process = self.process();
        let child = process.as_mut().expect("the server ran");
        let status = wait_exit(child, limit).unwrap_or_else(|| panic!("the server still runs after {limit:?}"));
        *process = None;
        status
    }

    /// Starts the server again on the same port and store.
    pub async fn restart(&self) {
        self.kill();
        let deadline = Instant::now() + PATIENCE;
        // The system may have lent the port to an outgoing connection for a moment.
        let child = loop {
            match spawn(&self.launch, &self.address.to_string(), &self.log) {
                Ok(Started { child, .. }) => break child,
                Err(status) => assert!(Instant::now() < deadline, "no restart: {status}\n{}", self.log),
            }
        };
        *self.process() = Some(child);
        self.ready().await;
    }

    /// Starts another process on the same store, which is killed again after this time, whatever it is at then.
    pub async fn start_and_kill(&self, after: Duration) {
        self.kill();
        let command =
            command(&self.launch.prefix).args(["--listen", "127.0.0.1:0"]).args(&self.launch.arguments).spawn();
        let mut child = command.expect("the server's binary");
        self.log.drain(child.stderr.take().expect("a pipe"));
        tokio::time::sleep(after).await;
        let _ = child.kill();
        let _ = child.wait();
    }

    /// A connection.
    pub async fn channel(&self) -> Channel {
        connect(self.address).await
    }

    fn process(&self) -> MutexGuard<'_, Option<Child>> {
        self.process.lock().unwrap()
    }
}

async fn connect(address: SocketAddr) -> Channel {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("an endpoint");
    endpoint.connect().await.unwrap_or_else(|error| panic!("cannot connect to {address}: {error}"))
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
        if thread::panicking() {
            eprintln!("the server's stderr:\n{}", self.log);
        }
    }
}

/// How a server that must not start ended.
#[derive(Debug)]
pub struct Ended {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    /// It ended with this code and one line on stderr that says these words.
    #[track_caller]
    pub fn one_line(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:?}");
        assert_eq!(self.stderr.trim_end().lines().count(), 1, "not one line: {self:?}");
        for word in words {
            assert!(self.stderr.contains(word), "{word:?} is not in {:?}", self.stderr);
        }
        assert!(!self.stdout.contains("listening on"), "{self:?}");
        assert!(!self.stderr.contains("panicked"), "{self:?}");
    }

    /// It ended well. Gives what it said.
    #[track_caller]
    pub fn ok(&self) -> &str {
        assert_eq!((self.code, self.stderr.as_str()), (Some(0), ""), "{self:?}");
        &self.stdout
    }
}

/// Runs the binary with exactly these flags until it ends by itself.
pub fn run_to_end(flags: &[&str]) -> Ended {
    run_to_end_in(&[], flags)
}

/// The same with these settings in the environment.
pub fn run_to_end_in(environment: &[(&str, &str)], flags: &[&str]) -> Ended {
    end_of(command(&[]).envs(environment.iter().copied()).args(flags))
}

/// The same behind a command that becomes what it is given.
pub fn run_to_end_behind(prefix: &[String], flags: &[&str]) -> Ended {
    end_of(command(prefix).args(flags))
}

fn end_of(command: &mut Command) -> Ended {
    let mut child = command.spawn().expect("the server's binary");
    let read = |stream: Option<Box<dyn Read + Send>>| {
        let mut stream = stream.expect("a pipe");
        thread::spawn(move || {
            let mut text = Vec::new();
            let _ = stream.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        })
    };
    let stdout = read(child.stdout.take().map(|stream| Box::new(stream) as _));
    let stderr = read(child.stderr.take().map(|stream| Box::new(stream) as _));
    let status = wait_exit(&mut child, PATIENCE);
    if status.is_none() {
        let _ = child.kill();
        let _ = child.wait();
    }
    let ended = Ended {
        code: status.and_then(|status| status.code()),
        stdout: stdout.join().unwrap(),
        stderr: stderr.join().unwrap(),
    };
    assert!(status.is_some(), "{command:?} did not end: {ended:?}");
    ended
}

/// A server that listens.
struct Started {
    child: Child,
    address: SocketAddr,
    said: String,
}

fn spawn(launch: &Launch, listen: &str, log: &Log) -> Result<Started, String> {
    let mut command = command(&launch.prefix);
    // In the variable, so that a flag of the test's goes before it.
    command.envs(launch.environment.iter().cloned()).env("DATA_QUEUE_LISTEN", listen).args(&launch.arguments);
    let mut child = command.spawn().expect("the server's binary");
    log.drain(child.stderr.take().expect("a pipe"));
    let stdout = BufReader::new(child.stdout.take().expect("a pipe"));
    let (send, lines) = mpsc::channel();
    // Read to the end even when nobody listens any more: a full pipe would stop the server.
    thread::spawn(move || stdout.lines().map_while(Result::ok).for_each(|line| drop(send.send(line))));
    let deadline = Instant::now() + PATIENCE;
    let mut said = String::new();
    while let Ok(line) = lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        said.push_str(&line);
        said.push('\n');
        if let Some((_, address)) = line.split_once("listening on ") {
            let address = address.trim().parse().unwrap_or_else(|error| panic!("{line:?}: {error}"));
            return Ok(Started { child, address, said });
        }
    }
    let _ = child.kill();
    Err(child.wait().map_or_else(|error| error.to_string(), |status| status.to_string()))
}

fn command(prefix: &[String]) -> Command {
    let mut words = prefix.iter().map(OsString::from).chain([binary().into_os_string()]);
    let mut command = Command::new(words.next().expect("the binary at least"));
    command.args(words);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // Every flag has a variable; those of whoever runs the tests must not count.
    for (name, _) in env::vars_os() {
        if name.to_string_lossy().starts_with("DATA_QUEUE_") {
            command.env_remove(name);
        }
    }
    // Nor may a test that does not say where write into their home.
    command.env_remove("HOME").env_remove("XDG_STATE_HOME");
    command
}

/// The test runs from `target/<profile>/deps`, the server's binary is in `target/<profile>`.
fn binary() -> PathBuf {
    let test = env::current_exe().expect("the test's own path");
    let profile = test.parent().and_then(|deps| deps.parent()).expect("the target directory");
    let binary = profile.join(format!("{BINARY}{}", env::consts::EXE_SUFFIX));
    assert!(binary.is_file(), "{} is missing: cargo build --workspace --bins", binary.display());
    binary
}

fn wait_exit(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait().expect("the server's exit status") {
            return Some(status);
        }
        if Instant::now() > deadline {
            return None;
        }
        thread::park_timeout(POLL);
    }
}

/// What the server says on stderr, read as it comes.
#[derive(Clone, Debug, Default)]
struct Log(Arc<Mutex<String>>);

impl Log {
    fn drain(&self, stream: impl Read + Send + 'static) {
        let log = self.clone();
        thread::spawn(move || {
            let mut stream = BufReader::new(stream);
            let mut line = Vec::new();
            while stream.read_until(b'\n', &mut line).is_ok_and(|bytes| bytes > 0) {
                log.0.lock().unwrap().push_str(&String::from_utf8_lossy(&line));
                line.clear();
            }
        });
    }
}

impl std::fmt::Display for Log {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0.lock().unwrap())
    }
}
