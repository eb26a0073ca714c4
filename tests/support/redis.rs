//! A real `redis-server` for one test: its own port, its own directory, killed and cleaned up when dropped.
//!
//! Standard library only: the server crate's own tests include this file with `#[path]`.
#![allow(clippy::unwrap_used, clippy::expect_used, dead_code, missing_docs, unreachable_pub)]

use std::{
    env, fs,
    io::{self, BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{self, Child, Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// Names the `redis-server` to use; without it, the one on PATH.
pub const BINARY_VARIABLE: &str = "DATA_QUEUE_TEST_REDIS";

/// The file of what it printed: of settings that it does not know it says so before it opens its log.
const OUTPUT: &str = "redis.out";

const START_LIMIT: Duration = Duration::from_secs(30);
const COMMAND_LIMIT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(5);
const PORT_TRIES: u32 = 50;

/// What survives a kill of Redis.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Persistence {
    #[default]
    None,
    EverySecond,
    Always,
}

/// How Redis is started.
#[derive(Clone, Debug, Default)]
pub struct Options {
    pub persistence: Persistence,
    /// As in redis.conf: `32mb`.
    pub maxmemory: Option<String>,
    /// As in redis.conf: `allkeys-lru`.
    pub maxmemory_policy: Option<String>,
    pub requirepass: Option<String>,
    /// A sentinel's own settings: then it is one, and of those above only the password counts.
    pub sentinel: Option<String>,
    /// More settings, each a name and its arguments as on the command line: `["--replicaof", "127.0.0.1", "1"]`.
    pub extra: Vec<String>,
}

/// One running (or killed, to be restarted) Redis.
#[derive(Debug)]
pub struct Redis {
    port: u16,
    directory: PathBuf,
    options: Options,
    child: Mutex<Option<Child>>,
    is_stopped: AtomicBool,
}

/// A reply of Redis.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    Text(String),
    Error(String),
    Integer(i64),
    Bytes(Vec<u8>),
    Nil,
    Array(Vec<Reply>),
}

impl Redis {
    /// Starts Redis without persistence.
    pub fn start() -> Self {
        Self::with(Options::default())
    }

    /// Starts Redis on a free port; takes another one if somebody was faster.
    pub fn with(options: Options) -> Self {
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let number = STARTED.fetch_add(1, Ordering::Relaxed);
        let directory = env::temp_dir().join(format!("data-queue-redis-{}-{number}", process::id()));
        fs::create_dir_all(&directory).expect("a directory for Redis");
        let mut redis =
            Self { port: 0, directory, options, child: Mutex::new(None), is_stopped: AtomicBool::new(false) };
        for _ in 0..PORT_TRIES {
            redis.port = free_port();
            if redis.launch().is_ok() {
                return redis;
            }
            // It has the port in it.
            let _ = fs::remove_file(redis.directory.join("sentinel.conf"));
        }
        panic!("redis-server did not start:\n{}{}", redis.read(OUTPUT), redis.log());
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// The URL for `--store`, with the password if there is one.
    pub fn url(&self) -> String {
        match &self.options.requirepass {
            Some(password) => format!("redis://:{password}@127.0.0.1:{}", self.port),
            None => format!("redis://127.0.0.1:{}", self.port),
        }
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// What Redis itself logged.
    pub fn log(&self) -> String {
        self.read("redis.log")
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.directory.join(name)).unwrap_or_default()
    }

    /// SIGKILL: what is not on disk is gone.
    pub fn kill(&self) {
        self.is_stopped.store(false, Ordering::Relaxed);
        if let Some(mut child) = self.child.lock().unwrap().take() {
            // Also ends a stopped process, which no other signal does.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Starts it again on the same port, with the data that the last one left behind.
    pub fn restart(&self) {
        self.kill();
        let deadline = Instant::now() + START_LIMIT;
        while let Err(error) = self.launch() {
            assert!(Instant::now() < deadline, "redis-server does not come back: {error}\n{}", self.log());
            thread::park_timeout(POLL);
        }
    }

    /// SIGSTOP: the port stays open and nobody answers.
    pub fn stop(&self) {
        self.is_stopped.store(true, Ordering::Relaxed);
        self.signal("-STOP");
    }

    /// It stands still, and a command would wait for its end.
    pub fn is_stopped(&self) -> bool {
        self.is_stopped.load(Ordering::Relaxed)
    }

    /// SIGCONT.
    pub fn cont(&self) {
        self.signal("-CONT");
        self.is_stopped.store(false, Ordering::Relaxed);
    }

    /// Runs one command on a connection of its own.
    pub fn try_command(&self, words: &[&str]) -> io::Result<Reply> {
        let mut connection = Connection::open(self.port)?;
        if let Some(password) = &self.options.requirepass {
            connection.call(&["AUTH", password])?;
        }
        connection.call(words)
    }

    /// Runs one command as this user, on a connection of its own.
    pub fn try_command_as(&self, user: &str, password: &str, words: &[&str]) -> io::Result<Reply> {
        let mut connection = Connection::open(self.port)?;
        match connection.call(&["AUTH", user, password])? {
            Reply::Error(error) => Err(io::Error::other(error)),
            _ => connection.call(words),
        }
    }

    /// Runs one command again and again, on one connection and as fast as it goes, until `enough`. Gives how often.
    pub fn command_until(&self, words: &[&str], enough: &AtomicBool) -> u64 {
        let mut connection = Connection::open(self.port).expect("a connection to Redis");
        let mut times = 0;
        while !enough.load(Ordering::Relaxed) {
            match connection.call(words) {
                Ok(Reply::Error(error)) => panic!("{words:?}: {error}"),
                Ok(_) => times += 1,
                Err(error) => panic!("{words:?}: {error}"),
            }
        }
        times
    }

    /// Runs one command, which must succeed.
    pub fn command(&self, words: &[&str]) -> Reply {
        match self.try_command(words) {
            Ok(Reply::Error(error)) => panic!("{words:?}: {error}"),
            Ok(reply) => reply,
            Err(error) => panic!("{words:?}: {error}"),
        }
    }

    pub fn flush(&self) {
        self.command(&["FLUSHALL"]);
    }

    pub fn config_set(&self, name: &str, value: &str) {
        self.command(&["CONFIG", "SET", name, value]);
    }

    /// One field of INFO.
    pub fn info(&self, field: &str) -> Option<String> {
        let Reply::Bytes(text) = self.command(&["INFO"]) else { return None };
        let text = String::from_utf8(text).ok()?;
        text.lines().find_map(|line| Some(line.strip_prefix(field)?.strip_prefix(':')?.trim().to_owned()))
    }

    pub fn dbsize(&self) -> i64 {
        match self.command(&["DBSIZE"]) {
            Reply::Integer(keys) => keys,
            other => panic!("DBSIZE: {other:?}"),
        }
    }

    /// Makes Redis forget every script that was loaded.
    pub fn script_flush(&self) {
        self.command(&["SCRIPT", "FLUSH"]);
    }

    /// Cuts the connections of every client, those that subscribe included.
    pub fn client_kill(&self) {
        self.command(&["CLIENT", "KILL", "TYPE", "normal"]);
        self.command(&["CLIENT", "KILL", "TYPE", "pubsub"]);
    }

    fn launch(&self) -> io::Result<()> {
        let binary = env::var(BINARY_VARIABLE).unwrap_or_else(|_| "redis-server".to_owned());
        let mut command = Command::new(&binary);
        let output = fs::File::create(self.directory.join(OUTPUT))?;
        command.current_dir(&self.directory).stdin(Stdio::null()).stderr(output.try_clone()?).stdout(output);
        command.args(self.arguments());
        let child = match command.spawn() {
            Ok(child) => child,
            Err(error) if error.kind() == io::ErrorKind::NotFound => panic!(
                "{binary} is not on this machine. Debian and Ubuntu: apt-get install redis-server; \
                 or set {BINARY_VARIABLE} to the path of one"
            ),
            Err(error) => return Err(error),
        };
        *self.child.lock().unwrap() = Some(child);
        self.wait_ready()
    }

    fn arguments(&self) -> Vec<String> {
        let mut arguments = Vec::new();
        if let Some(settings) = &self.options.sentinel {
            // It writes into its settings, and goes on with what it wrote when it is started again.
            let path = self.directory.join("sentinel.conf");
            if !path.exists() {
                let login = self.options.requirepass.as_ref();
                let login = login.map_or_else(String::new, |password| format!("requirepass {password}\n"));
                let own = format!("port {}\nbind 127.0.0.1\nlogfile redis.log\n{login}{settings}", self.port);
                fs::write(&path, own).expect("settings for a sentinel");
            }
            return vec![path.display().to_string(), "--sentinel".to_owned()];
        }
        let mut set = |name: &str, value: &str| arguments.extend([format!("--{name}"), value.to_owned()]);
        set("port", &self.port.to_string());
        set("bind", "127.0.0.1");
        set("dir", &self.directory.display().to_string());
        set("logfile", "redis.log");
        set("save", "");
        match self.options.persistence {
            Persistence::None => set("appendonly", "no"),
            Persistence::EverySecond | Persistence::Always => {
                let always = self.options.persistence == Persistence::Always;
                set("appendonly", "yes");
                set("appendfsync", if always { "always" } else { "everysec" });
            }
        }
        for (name, value) in [
            ("maxmemory", &self.options.maxmemory),
            ("maxmemory-policy", &self.options.maxmemory_policy),
            ("requirepass", &self.options.requirepass),
        ] {
            if let Some(value) = value {
                set(name, value);
            }
        }
        arguments.extend(self.options.extra.iter().cloned());
        arguments
    }

    /// Polls PING until it is answered by the process that was just started, which must still live then: on a port that
    /// somebody else took, the answer would be somebody else's.
    fn wait_ready(&self) -> io::Result<()> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            let pong = matches!(self.try_command(&["PING"]), Ok(Reply::Text(text)) if text == "PONG");
            if let Some(child) = self.child.lock().unwrap().as_mut() {
                if let Some(status) = child.try_wait()? {
                    return Err(io::Error::other(format!("redis-server ended: {status}")));
                }
                if pong && self.is_own(child.id()) {
                    return Ok(());
                }
            }
            if Instant::now() > deadline {
                self.kill();
                return Err(io::Error::new(io::ErrorKind::TimedOut, "redis-server does not answer PING"));
            }
            thread::park_timeout(POLL);
        }
    }

    fn is_own(&self, pid: u32) -> bool {
        matches!(self.try_command(&["INFO", "server"]), Ok(Reply::Bytes(text))
            if String::from_utf8_lossy(&text).lines().any(|line| line.trim() == format!("process_id:{pid}")))
    }

    fn signal(&self, signal: &str) {
        let child = self.child.lock().unwrap();
        let pid = child.as_ref().expect("Redis runs").id().to_string();
        let status = Command::new("kill").args([signal, &pid]).status().expect("the kill command");
        assert!(status.success(), "kill {signal} {pid}: {status}");
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.kill();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// A port of 127.0.0.1 that nobody listens on now, below the range from which the system gives ports to outgoing
/// connections: one of those could take it while Redis is being restarted.
pub fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    const FIRST: u32 = 11_000;
    const COUNT: u32 = 21_000;
    // Test processes that run at the same time start at different places.
    let start = process::id().wrapping_mul(7_919);
    (0..COUNT)
        .map(|_| FIRST + start.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % COUNT)
        .filter_map(|port| u16::try_from(port).ok())
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .expect("a free port")
}

struct Connection(BufReader<TcpStream>);

impl Connection {
    fn open(port: u16) -> io::Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(COMMAND_LIMIT))?;
        stream.set_write_timeout(Some(COMMAND_LIMIT))?;
        Ok(Self(BufReader::new(stream)))
    }

    fn call(&mut self, words: &[&str]) -> io::Result<Reply> {
        let mut request = format!("*{}\r\n", words.len());
        for word in words {
            request.push_str(&format!("${}\r\n{word}\r\n", word.len()));
        }
        self.0.get_mut().write_all(request.as_bytes())?;
        self.reply()
    }

    fn reply(&mut self) -> io::Result<Reply> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        let line = line.trim_end();
        let (kind, rest) = line.split_at_checked(1).ok_or(io::ErrorKind::UnexpectedEof)?;
        let number = || rest.parse::<i64>().map_err(|_| io::Error::other(format!("not a number: {line}")));
        Ok(match kind {
            "+" => Reply::Text(rest.to_owned()),
            "-" => Reply::Error(rest.to_owned()),
            ":" => Reply::Integer(number()?),
            "$" | "*" if number()? < 0 => Reply::Nil,
            "$" => {
                let mut bytes = vec![0; usize::try_from(number()?).unwrap() + 2];
                self.0.read_exact(&mut bytes)?;
                bytes.truncate(bytes.len() - 2);
                Reply::Bytes(bytes)
            }
            "*" => Reply::Array((0..number()?).map(|_| self.reply()).collect::<io::Result<_>>()?),
            _ => return Err(io::Error::other(format!("not RESP: {line}"))),
        })
    }
}
