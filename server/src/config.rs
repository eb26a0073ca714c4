//! The settings: every flag, its default and its range. `--help` prints this as the reference.

use std::{
    env, fs,
    net::SocketAddr,
    path::{self, Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use clap::{ArgMatches, Parser, Subcommand, ValueEnum, parser::ValueSource};

use crate::{
    queue::{Limits, MAX_DELAY, MAX_LEASE, MIN_LEASE},
    store::{
        Backend, Backoff, Remember, Rules, SystemClock, memory, redis,
        sqlite::{self, Durability, SqliteConfig, SqliteStore},
    },
};

/// What an envelope and a message add to a value at the most, in bytes: headers, the queue's name, framing.
const MESSAGE_OVERHEAD: usize = 160 * 1024;

/// The store's file in the data directory.
const FILE: &str = "data-queue.db";

const EXPECTED: &str = "expected sqlite:PATH, memory, redis://..., redis+sentinel://... or redis+cluster://...";

/// The least room that can be kept from inserts, in bytes: less would not do for the acks of a full store.
const MIN_DISK_RESERVE: u64 = 8 << 20;

/// The longest of some times.
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// A work queue with leases behind gRPC.
///
/// Each option can also be set in the environment by the name in brackets; the command line wins, and of an option that is
/// given twice the last one. Durations are written like 500ms, 10s, 5m, 12h.
#[derive(Clone, Parser)]
#[command(name = "data-queue-server", version, about, max_term_width = 120, args_override_self = true)]
pub struct Config {
    /// The address to listen on. Port 0 takes a free one; the line `listening on ADDR` on standard output tells which.
    /// There is no encryption and no authentication: keep it on loopback or a network of your own.
    #[arg(long, env = "DATA_QUEUE_LISTEN", value_name = "ADDR", default_value = "127.0.0.1:50051", value_parser = listen)]
    pub listen: SocketAddr,

    /// What to do instead of serving.
    #[command(subcommand)]
    pub command: Option<Command>,

    /// Where the tasks are kept. `sqlite:PATH`: in a file of this server's own. `redis://[user:password@]host[:port][/db]`: in
    /// Redis 6.2 or later, which must be set to maxmemory-policy noeviction; any number of servers may share it.
    /// `redis+sentinel://[user:password@]host[:port],.../MASTER[/db]`: in the Redis that these sentinels say is the master of
    /// that name. `redis+cluster://[user:password@]host[:port],...`: in Redis Cluster; some of its nodes are enough. With
    /// `rediss` in place of `redis`, over TLS. `memory`: in this process, gone when it ends. Default: the file data-queue.db in --data-dir. Not together with --data-dir,
    /// unless one is given as a flag and the other in the environment: then the flag says where.
    #[arg(long, env = "DATA_QUEUE_STORE", value_name = "URL", hide_env_values = true, global = true)]
    pub store: Option<String>,

    /// The folder of the store's file, which is data-queue.db there. Made if it is not there, for this user alone. Not
    /// together with --store, as said there. Default: $XDG_STATE_HOME/data-queue, or ~/.local/state/data-queue.
    #[arg(long, env = "DATA_QUEUE_DATA_DIR", value_name = "DIR", global = true)]
    pub data_dir: Option<PathBuf>,

    /// What OK survives, with the store in a file.
    #[arg(long, env = "DATA_QUEUE_DURABILITY", value_enum, default_value_t = Durability::Full)]
    pub durability: Durability,

    /// With the store in a file, inserts are refused with STORE_FULL when its file system has less room than this, in bytes,
    /// so that pops, acks, heartbeats and putbacks can go on. 8388608 or more.
    #[arg(long, env = "DATA_QUEUE_DISK_RESERVE", value_name = "BYTES", default_value_t = 64 << 20, value_parser = clap::value_parser!(u64).range(MIN_DISK_RESERVE..))]
    pub disk_reserve: u64,

    /// The first part of every key in Redis: 1 to 32 letters, digits, '_' and '-'. Servers that are to share queues have
    /// the same.
    #[arg(long, env = "DATA_QUEUE_KEY_PREFIX", value_name = "NAME", default_value = "dq", value_parser = key_prefix)]
    pub key_prefix: String,

    /// The user of Redis, if --store does not say.
    #[arg(long, env = "DATA_QUEUE_REDIS_USER", value_name = "NAME")]
    pub redis_user: Option<String>,

    /// A file that holds the password of Redis, with or without a newline at its end. It is read at each connect, so that it can
    /// be changed while the server runs.
    #[arg(long, env = "DATA_QUEUE_REDIS_PASSWORD_FILE", value_name = "FILE")]
    pub redis_password_file: Option<PathBuf>,

    /// The user of the sentinels, whose logins are not those of Redis.
    #[arg(long, env = "DATA_QUEUE_SENTINEL_USER", value_name = "NAME")]
    pub sentinel_user: Option<String>,

    /// A file that holds the password of the sentinels, as --redis-password-file does.
    #[arg(long, env = "DATA_QUEUE_SENTINEL_PASSWORD_FILE", value_name = "FILE")]
    pub sentinel_password_file: Option<PathBuf>,

    /// A file of certificates, in PEM, that sign those of Redis and of the sentinels. Default: what this machine trusts.
    #[arg(long, env = "DATA_QUEUE_REDIS_CA", value_name = "FILE")]
    pub redis_ca: Option<PathBuf>,

    /// The certificate that this server shows to Redis, in PEM, with those that sign it. Together with --redis-key.
    #[arg(long, env = "DATA_QUEUE_REDIS_CERT", value_name = "FILE", requires = "redis_key")]
    pub redis_cert: Option<PathBuf>,

    /// The key of --redis-cert, in PEM.
    #[arg(long, env = "DATA_QUEUE_REDIS_KEY", value_name = "FILE", requires = "redis_cert")]
    pub redis_key: Option<PathBuf>,

    /// Go on when Redis has lost its data, with a warning. Without it a server that finds its Redis emptied is not ready, and
    /// refuses calls with DATASET_RESET, until it is started anew: so that nobody takes an accident for an empty queue.
    #[arg(long, env = "DATA_QUEUE_ACCEPT_RESET", value_parser = clap::builder::BoolishValueParser::new())]
    pub accept_reset: bool,

    /// How long a call waits for the store, connecting included, before it answers UNAVAILABLE. 100ms to 60s. Redis can
    /// stand still for a second or two while it syncs its file; a call that was given up may still have been done.
    #[arg(long, env = "DATA_QUEUE_STORE_TIMEOUT", value_name = "TIME", default_value = "5s", value_parser = store_timeout)]
    pub store_timeout: Duration,

    /// The most bytes that tasks may take with --store memory; beyond it inserts are refused with STORE_FULL. A task counts
    /// with its value, its headers and 128 bytes.
    #[arg(long, env = "DATA_QUEUE_MEMORY_CAPACITY", value_name = "BYTES", default_value_t = 1 << 30)]
    pub memory_capacity: u64,

    /// The lease of pops and heartbeats that do not say. 100ms to 12h.
    #[arg(long, env = "DATA_QUEUE_DEFAULT_LEASE", value_name = "TIME", default_value = "30s", value_parser = lease)]
    pub default_lease: Duration,

    /// A task that its holders said so often failed becomes a dead letter: it is kept and counted, and not delivered any more. 1
    /// or more, where the queue's settings say nothing else; servers that share queues should have the same.
    #[arg(long, env = "DATA_QUEUE_MAX_FAILURES", value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_failures: u32,

    /// After how long a task that failed once can be popped again; twice as long after each further failure. 0s to 366days, where
    /// the queue's settings say nothing else.
    #[arg(long, env = "DATA_QUEUE_BACKOFF_MIN", value_name = "TIME", default_value = "1s", value_parser = backoff)]
    pub backoff_min: Duration,

    /// The longest of these times. Up to a quarter of it is added at random. 0s to 366days.
    #[arg(long, env = "DATA_QUEUE_BACKOFF_MAX", value_name = "TIME", default_value = "1h", value_parser = backoff)]
    pub backoff_max: Duration,

    /// A task whose leases ran out so often becomes a dead letter: it is kept and counted, and not delivered any more.
    /// Leases that Putback ended with held_for count too. 1 or more; servers that share queues should have the same.
    #[arg(long, env = "DATA_QUEUE_MAX_EXPIRIES", value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_expiries: u32,

    /// The largest value of a task, in bytes. At most --max-message less 160 KiB. A worker's gRPC library must accept
    /// messages of twice this; most accept 4 MiB unless told otherwise.
    #[arg(long, env = "DATA_QUEUE_MAX_VALUE", value_name = "BYTES", default_value_t = 1 << 20, value_parser = bytes)]
    pub max_value: usize,

    /// The largest request, in bytes; beyond it the answer is MESSAGE_TOO_LARGE.
    #[arg(long, env = "DATA_QUEUE_MAX_MESSAGE", value_name = "BYTES", default_value_t = 4 << 20, value_parser = bytes)]
    pub max_message: usize,

    /// How long request ids and acked tokens are remembered at least, unless --memory-entries is reached before; at most
    /// twice as long. 1s to 24h.
    #[arg(long, env = "DATA_QUEUE_MEMORY_WINDOW", value_name = "TIME", default_value = "5m", value_parser = memory_window)]
    pub memory_window: Duration,

    /// The most request ids, and the most acked tokens, that a queue remembers; the newest half at least. 2 or more. In
    /// Redis an acked token takes about 80 bytes, a request id about 100 and 16 for each of its tasks. With the store in a
    /// file, an acked token takes about 17 bytes of the file; reckoned from the sizes of what is kept, it takes 20 to 40 in
    /// memory, and a request id about 60 and 16 for each of its tasks in the file, and 40 to 60 in memory.
    #[arg(long, env = "DATA_QUEUE_MEMORY_ENTRIES", value_name = "N", default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(2..))]
    pub memory_entries: u64,

    /// Threads that serve calls, each with connections of its own to Redis. 1 to 256. Default: one for each core.
    #[arg(long, env = "DATA_QUEUE_THREADS", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub threads: Option<u16>,

    /// How long the server may take to stop after SIGTERM or SIGINT: running calls are answered, tasks that were not
    /// handed over are put back. 0s to 24h.
    #[arg(long, env = "DATA_QUEUE_GRACE", value_name = "TIME", default_value = "10s", value_parser = up_to_a_day)]
    pub grace: Duration,

    /// The most connections; more wait to be accepted. 1 or more.
    #[arg(long, env = "DATA_QUEUE_MAX_CONNECTIONS", value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_connections: u32,

    /// The most calls at once on one connection, waiting pops included; more wait in the client. 1 or more.
    #[arg(long, env = "DATA_QUEUE_MAX_STREAMS", value_name = "N", default_value_t = 1_024, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_streams: u32,

    /// A connection on which nothing came for this long is pinged. 1s to 24h.
    #[arg(long, env = "DATA_QUEUE_KEEPALIVE_INTERVAL", value_name = "TIME", default_value = "20s", value_parser = at_least_a_second)]
    pub keepalive_interval: Duration,

    /// A connection that does not answer a ping for this long is closed. 1s to 24h.
    #[arg(long, env = "DATA_QUEUE_KEEPALIVE_TIMEOUT", value_name = "TIME", default_value = "10s", value_parser = at_least_a_second)]
    pub keepalive_timeout: Duration,

    /// When the client of a stream of tasks has not read for this long, the tasks that wait for it go back to their queue,
    /// and the stream ends with DEADLINE_EXCEEDED. 1s to 24h.
    #[arg(long, env = "DATA_QUEUE_STALL_TIMEOUT", value_name = "TIME", default_value = "60s", value_parser = at_least_a_second)]
    pub stall_timeout: Duration,

    /// A Consume stream that is this old, more or less a tenth, is told to drain, and ends 30 s later at the latest: so that
    /// the streams of many servers spread anew. 1s to 24h.
    #[arg(long, env = "DATA_QUEUE_MAX_STREAM_AGE", value_name = "TIME", default_value = "30m", value_parser = at_least_a_second)]
    pub max_stream_age: Duration,

    /// Do not offer gRPC reflection, by which tools like grpcurl learn the calls.
    #[arg(long, env = "DATA_QUEUE_NO_REFLECTION", value_parser = clap::builder::BoolishValueParser::new())]
    pub no_reflection: bool,

    /// How the log on standard error is written.
    #[arg(long, env = "DATA_QUEUE_LOG_FORMAT", value_enum, default_value_t = LogFormat::Human)]
    pub log_format: LogFormat,

    /// What is logged. Values, tokens and credentials never are.
    #[arg(long, env = "DATA_QUEUE_LOG_LEVEL", value_enum, default_value_t = LogLevel::Info)]
    pub log_level: LogLevel,
}

/// What to do instead of serving. Each works on the store's file, found by --data-dir or --store sqlite:PATH.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Copies the store as it is at one moment into a new file, while a server may be using it.
    Backup {
        /// The file to write. It must not exist.
        file: PathBuf,
    },
    /// Puts a backup where there is no store yet. No server may be running on it.
    Restore {
        /// The backup.
        file: PathBuf,
    },
    /// Reads all of the store and checks that it is whole, while a server may be using it. Exit code 0 if it is, 1 if not.
    Check {
        /// A copy to check in place of the store.
        file: Option<PathBuf>,
    },
}

/// Why there is no store.
#[derive(Debug)]
pub enum StoreProblem {
    /// A setting is wrong.
    Usage(String),
    /// The settings are right, but it cannot be opened.
    Failed(String),
}

/// The kinds of store, with what they need.
enum Place<'c> {
    File(PathBuf),
    Redis(&'c str),
    Memory,
}

/// How the log is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people, coloured on a terminal.
    Human,
    /// An object a line.
    Json,
}

/// What is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl Config {
    /// Checks what one flag alone cannot tell, and opens the store. Says what is wrong, without repeating credentials.
    pub fn backend(&self) -> Result<Backend, StoreProblem> {
        if self.max_value == 0 || self.max_value.saturating_add(MESSAGE_OVERHEAD) > self.max_message {
            return Err(StoreProblem::Usage(format!(
                "--max-value {} must be from 1 to --max-message less {MESSAGE_OVERHEAD}, which is {}; for larger values raise --max-message too",
                self.max_value,
                self.max_message.saturating_sub(MESSAGE_OVERHEAD)
            )));
        }
        match self.place().map_err(StoreProblem::Usage)? {
            Place::Memory => {
                let clock = Arc::new(SystemClock::default());
                Ok(Backend::memory(memory::MemoryStore::new(clock, self.rules(), self.memory_capacity)))
            }
            Place::File(path) => {
                refuse_no_file(&path)?;
                let config = SqliteConfig {
                    path,
                    durability: self.durability,
                    reserve: self.disk_reserve,
                    rules: self.rules(),
                    timeout: self.store_timeout,
                };
                SqliteStore::open(config, None).map(Backend::sqlite).map_err(StoreProblem::Failed)
            }
            Place::Redis(url) => {
                let config = redis::RedisConfig {
                    url: url.to_owned(),
                    access: self.access(),
                    accept_reset: self.accept_reset,
                    key_prefix: self.key_prefix.clone(),
                    timeout: self.store_timeout,
                    rules: self.rules(),
                };
                redis::RedisShared::new(&config).map(Backend::redis).map_err(StoreProblem::Usage)
            }
        }
    }

    /// Runs a command. Answers what to print.
    pub fn run(&self, command: &Command) -> Result<String, StoreProblem> {
        if let Command::Check { file: Some(copy) } = command {
            return self.check(&absolute(copy).map_err(StoreProblem::Usage)?);
        }
        let Place::File(path) = self.place().map_err(StoreProblem::Usage)? else {
            let message = "backup, restore and check work on a store in a file; give --data-dir or --store sqlite:PATH";
            return Err(StoreProblem::Usage(message.to_owned()));
        };
        refuse_no_file(&path)?;
        match command {
            Command::Backup { file } => {
                let file = absolute(file).map_err(StoreProblem::Usage)?;
                sqlite::backup(&path, &file, self.rules())
                    .map(|found| format!("copied {} to {}: {found}", path.display(), file.display()))
                    .map_err(StoreProblem::Failed)
            }
            Command::Restore { file } => {
                let file = absolute(file).map_err(StoreProblem::Usage)?;
                sqlite::restore(&file, &path, self.rules())
                    .map(|found| format!("restored {} from {}: {found}", path.display(), file.display()))
                    .map_err(StoreProblem::Failed)
            }
            Command::Check { .. } => self.check(&path),
        }
    }

    fn check(&self, path: &Path) -> Result<String, StoreProblem> {
        refuse_no_file(path)?;
        sqlite::check(path, self.rules())
            .map(|found| format!("{} is whole: {found}", path.display()))
            .map_err(StoreProblem::Failed)
    }

    /// The folder that the store's file is in, if it is in one.
    pub fn data_folder(&self) -> Option<PathBuf> {
        match self.place() {
            Ok(Place::File(path)) => path.parent().map(Path::to_owned),
            _ => None,
        }
    }

    /// Of --store and --data-dir, both of which say where the tasks are, leaves what counts: the flag, if the other is only in
    /// the environment. The matches are those that these settings were read from.
    pub fn settle_place(mut self, matches: &ArgMatches) -> Result<Self, String> {
        match (matches.value_source("store"), matches.value_source("data_dir")) {
            (Some(ValueSource::CommandLine), Some(ValueSource::EnvVariable)) => self.data_dir = None,
            (Some(ValueSource::EnvVariable), Some(ValueSource::CommandLine)) => self.store = None,
            (Some(_), Some(_)) => {
                return Err("--store and --data-dir both say where the tasks are; give one".to_owned());
            }
            _ => {}
        }
        Ok(self)
    }

    fn place(&self) -> Result<Place<'_>, String> {
        let Some(store) = &self.store else { return absolute(&self.data_dir()?.join(FILE)).map(Place::File) };
        if store == "memory" {
            return Ok(Place::Memory);
        }
        if store.starts_with("redis") && store.contains("://") {
            return Ok(Place::Redis(store));
        }
        match store.strip_prefix("sqlite:") {
            // Written like a URL, or what SQLite calls a store in memory: nobody wants a file of that name.
            Some(path) if path.starts_with("//") || path == ":memory:" => {
                Err(format!("--store: a path follows sqlite:, as in sqlite:/var/lib/data-queue.db; {EXPECTED}"))
            }
            Some(path) if !path.is_empty() && !path.ends_with('/') => absolute(Path::new(path)).map(Place::File),
            _ => Err(format!("--store: no store of this kind; {EXPECTED}")),
        }
    }

    /// Who asks Redis.
    fn access(&self) -> redis::Access {
        redis::Access {
            user: self.redis_user.clone(),
            password_file: self.redis_password_file.clone(),
            sentinel_user: self.sentinel_user.clone(),
            sentinel_password_file: self.sentinel_password_file.clone(),
            ca: self.redis_ca.clone(),
            certificate: self.redis_cert.clone().zip(self.redis_key.clone()),
        }
    }

    /// Where programs keep what they have to keep for their user.
    fn data_dir(&self) -> Result<PathBuf, String> {
        if let Some(given) = &self.data_dir {
            return Ok(given.clone());
        }
        let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        absolute("XDG_STATE_HOME")
            .or_else(|| absolute("HOME").map(|home| home.join(".local/state")))
            .map(|state| state.join("data-queue"))
            .ok_or_else(|| "--data-dir is needed: neither HOME nor XDG_STATE_HOME is set".to_owned())
    }

    /// The rules of all queues.
    pub fn rules(&self) -> Rules {
        let remember = Remember { window: millis(self.memory_window), entries: self.memory_entries };
        Rules {
            remember,
            lease: millis(self.default_lease),
            max_failures: self.max_failures,
            max_expiries: self.max_expiries,
            backoff: Backoff { min: millis(self.backoff_min), max: millis(self.backoff_max) },
        }
    }

    /// The limits that are settings.
    pub fn limits(&self) -> Limits {
        Limits {
            max_value: self.max_value,
            default_lease: self.default_lease,
            max_stream_age: self.max_stream_age,
            grace: self.grace,
        }
    }

    /// How many threads serve calls.
    pub fn serving_threads(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        self.threads.map_or_else(cores, usize::from)
    }
}

/// As it reaches SQLite, to which `:memory:` and `file:x` are no names of files unless something stands before them.
fn absolute(path: &Path) -> Result<PathBuf, String> {
    path::absolute(path).map_err(|error| format!("cannot tell which file {} is: {error}", path.display()))
}

/// A folder, or a device, is refused before a lock is made beside it. What is not there, or cannot be looked at, is for the
/// store to judge.
fn refuse_no_file(path: &Path) -> Result<(), StoreProblem> {
    let what = match fs::metadata(path) {
        Ok(found) if found.is_dir() => "a folder; --data-dir takes one",
        Ok(found) if !found.is_file() => "no regular file",
        _ => return Ok(()),
    };
    Err(StoreProblem::Failed(format!("cannot keep tasks in {}: it is {what}", path.display())))
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn listen(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "expected IP:PORT, such as 127.0.0.1:50051; names are not looked up".to_owned())
}

fn bytes(text: &str) -> Result<usize, String> {
    text.parse().map_err(|_| "expected a number of bytes, such as 1048576".to_owned())
}

fn key_prefix(text: &str) -> Result<String, String> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
    match (1..=32).contains(&text.len()) && text.bytes().all(allowed) {
        true => Ok(text.to_owned()),
        false => Err("must have 1 to 32 letters, digits, '_' and '-'".to_owned()),
    }
}

fn within(text: &str, min: Duration, max: Duration) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    if time < min || time > max {
        let (min, max) = (humantime::format_duration(min), humantime::format_duration(max));
        return Err(format!("must be from {min} to {max}"));
    }
    Ok(time)
}

fn store_timeout(text: &str) -> Result<Duration, String> {
    within(text, Duration::from_millis(100), Duration::from_secs(60))
}

fn lease(text: &str) -> Result<Duration, String> {
    within(text, MIN_LEASE, MAX_LEASE)
}

fn backoff(text: &str) -> Result<Duration, String> {
    within(text, Duration::ZERO, MAX_DELAY)
}

fn memory_window(text: &str) -> Result<Duration, String> {
    within(text, Duration::from_secs(1), DAY)
}

fn up_to_a_day(text: &str) -> Result<Duration, String> {
    within(text, Duration::ZERO, DAY)
}

fn at_least_a_second(text: &str) -> Result<Duration, String> {
    within(text, Duration::from_secs(1), DAY)
}
