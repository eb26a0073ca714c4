//! `data-queue insert`: one value, or lines as they come; `file` inserts a file, whose lines `line` reads.

mod file;
mod line;

use std::{
    io::{BufRead, IsTerminal, Read, Write, stderr, stdin},
    path::PathBuf,
    process::ExitCode,
    time::{Duration, SystemTime},
};

use clap::Args as ClapArgs;
use data_queue_client::{Durability, ErrorKind, InsertedTask, NewTask, Receipt};
use tokio::sync::mpsc;

use crate::{
    EXIT_FAILED, Stop,
    args::{Common, span},
    out::{Cell, Row},
    session::Session,
};

/// The longest value that is read from stdin, in bytes; the server's own limit is 1 MiB unless set.
const MAX_VALUE: u64 = 64 << 20;
/// How many lines are read ahead, and how many inserts are under way.
const AHEAD: usize = 256;

/// Inserts a value, each line of stdin, or a file
///
/// Without VALUE each line of stdin is a task of its own, inserted as it comes; with --whole all of stdin is one. Writes for each
/// task its id, and "duplicate" if another task has its unique key: then it was not inserted, and the id is that task's. A line
/// that the server refuses is told on stderr, and those behind it go on. Empty lines are skipped, unless with --data.
///
/// With --lines a file is inserted, in its order and up to 1000 lines a call. It stops at the first line that is wrong, and tells
/// the line from which to go on; when the server goes away it waits. Writes only how many were inserted, how many were duplicates,
/// and which line would be the next.
#[derive(Debug, ClapArgs)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Insert {
    /// The queue
    queue: String,

    /// The value: JSON, or with --data any text
    #[arg(allow_negative_numbers = true, conflicts_with = "whole")]
    value: Option<String>,

    /// All of stdin is one value
    #[arg(long)]
    whole: bool,

    /// Insert this file, of which each line is a value; - is stdin
    #[arg(long, value_name = "FILE", conflicts_with_all = ["value", "whole", "unique_key"])]
    lines: Option<PathBuf>,

    /// With --lines: each line is a task, as an object (below)
    #[arg(
        long,
        requires = "lines",
        conflicts_with_all = ["data", "priority", "delay", "deliver_at", "ttl", "headers"]
    )]
    tasks: bool,

    /// With --lines: begin with this line, 1 or more
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..), requires = "lines")]
    from_line: u64,

    /// With --lines: how long to wait for a server that is away or full, 0s to 4m
    #[arg(long, value_name = "DURATION", default_value = "1m", value_parser = retry, requires = "lines")]
    retry_for: Duration,

    /// The value is bytes, not JSON
    #[arg(long)]
    data: bool,

    /// 0 to 9: higher ones are delivered first
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=9))]
    priority: u32,

    /// Deliver it so much later, such as 90s or 2h, at most 366 days
    #[arg(long, value_name = "DURATION", value_parser = span, conflicts_with = "deliver_at")]
    delay: Option<Duration>,

    /// Deliver it from this time on, such as 2030-01-31T08:00:00Z, at most 366 days from now
    #[arg(long, value_name = "TIME", value_parser = time)]
    deliver_at: Option<SystemTime>,

    /// It is gone if it was not delivered for so long, at most 366 days [default: never]
    #[arg(long, value_name = "DURATION", value_parser = span)]
    ttl: Option<Duration>,

    /// Insert it only if no task with this key is in the queue; for one value
    #[arg(long, value_name = "KEY")]
    unique_key: Option<String>,

    /// Text that travels with it; may be given again
    #[arg(long = "header", value_name = "KEY=VALUE", value_parser = header)]
    headers: Vec<(String, String)>,

    /// Names the insert, so that repeating it inserts nothing: for one value, or with --lines for the file with the same flags
    #[arg(long, value_name = "ID")]
    request_id: Option<String>,

    /// Answer when this is reached: "accepted" by the store, "fsynced" on its disk, or "replicated" on all replicas of Redis, one at
    /// least; within the server's --store-timeout, else a line on stderr says that it was not
    #[arg(long, value_name = "WHAT", default_value = "accepted", value_parser = durability)]
    durability: Durability,
}

fn durability(text: &str) -> Result<Durability, String> {
    match text {
        "accepted" => Ok(Durability::Accepted),
        "fsynced" => Ok(Durability::Fsynced),
        "replicated" => Ok(Durability::Replicated),
        _ => Err("it is accepted, fsynced or replicated".to_owned()),
    }
}

const AFTER_HELP: &str = "\
Examples:
  data-queue insert mail '{\"to\": \"ada@example.org\"}' --delay 10m
  data-queue insert mail < mails.jsonl
  data-queue insert pictures --whole --data < ada.png
  data-queue insert mail --lines mails.jsonl
  data-queue insert mail --lines tasks.jsonl --tasks --from-line 4711

A line with --tasks is an object of one of
  json        any JSON, kept as it is written
  text        a text, whose UTF-8 is the value
  data        bytes, in base64

and, where wanted, of headers (an object of texts), priority (0 to 9), delay or deliver_at, ttl, unique_key; times as with the flags:
  {\"json\": {\"to\": \"ada@example.org\"}, \"priority\": 5, \"delay\": \"10m\", \"unique_key\": \"ada\"}

Columns: id, and duplicate where it is one. JSON: id, duplicate. With --lines both are: inserted, duplicates, next_line.";

impl Insert {
    pub(crate) async fn run(self, common: &Common) -> Result<ExitCode, Stop> {
        let mut session = Session::open(common)?;
        session.client = session.client.durability(self.durability);
        if let Some(path) = &self.lines {
            return self.insert_file(session, path).await;
        }
        match &self.value {
            Some(value) => self.insert_one(session, value.clone().into_bytes()).await,
            None if self.whole => self.insert_one(session, read_whole()?).await,
            None if self.unique_key.is_some() || self.request_id.is_some() => Err(Stop::usage(
                "--unique-key and --request-id are for one value: give it, or say --whole (a file: --lines)",
            )),
            None => self.insert_lines(session).await,
        }
    }

    async fn insert_one(&self, mut session: Session, value: Vec<u8>) -> Result<ExitCode, Stop> {
        let tasks = [self.task(value)?];
        let inserted = match &self.request_id {
            Some(id) => session.client.insert_as(&self.queue, tasks, id).await,
            None => session.client.insert_many(&self.queue, tasks).await,
        };
        let inserted = session.take(inserted)?;
        self.tell_short(&inserted.tasks);
        session.out.rows(&inserted.tasks.iter().map(row).collect::<Vec<_>>())?;
        Ok(ExitCode::SUCCESS)
    }

    async fn insert_lines(&self, mut session: Session) -> Result<ExitCode, Stop> {
        if stdin().is_terminal() {
            let _ = writeln!(stderr(), "one value a line; Ctrl-D ends");
        }
        self.reach(&session).await?;
        let (lines, mut read) = mpsc::channel(AHEAD);
        std::thread::spawn(move || read_lines(&lines));
        let producer = session.client.producer(&self.queue).max_inserts(AHEAD as u32).build();
        let producer = session.take(producer)?;
        let (sent, mut receipts) = mpsc::channel(AHEAD);
        let send = async move {
            let mut number = 0_u64;
            while let Some(line) = read.recv().await {
                number += 1;
                let line = line?;
                if !self.data && line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                let receipt = match self.task(line) {
                    Ok(task) => Ok(producer.send(task).await),
                    Err(stop) => Err(stop),
                };
                // Nobody takes them any more: something failed that is not about this line.
                if sent.send((number, receipt)).await.is_err() {
                    break;
                }
            }
            Ok(())
        };
        let told = async {
            let mut tally = Tally::default();
            while let Some((number, receipt)) = receipts.recv().await {
                tally.note(&mut session, number, receipt, self).await?;
            }
            Ok(tally)
        };
        // Whatever fails first is told; the other one has nothing to add then.
        let ((), tally) = tokio::try_join!(send, told)?;
        tally.end()
    }

    async fn insert_file(&self, session: Session, path: &PathBuf) -> Result<ExitCode, Stop> {
        let source = file::Source::open(path)?;
        self.reach(&session).await?;
        let import = file::Import { options: self, session, from_line: self.from_line, retry_for: self.retry_for };
        import.run(source).await
    }

    /// A server that is away, or takes no such queue, is told now, and not after the first line's deadline.
    async fn reach(&self, session: &Session) -> Result<(), Stop> {
        match session.admin().get_queue(&self.queue).await {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(session.explain(&error)),
            Ok(_) | Err(_) => Ok(()),
        }
    }

    /// Says that these are in, and did not reach what they should have.
    fn tell_short(&self, tasks: &[InsertedTask]) {
        let short = tasks.iter().filter(|task| task.durability < self.durability).count();
        if short > 0 {
            let asked = if self.durability == Durability::Replicated { "replicated" } else { "fsynced" };
            let _ =
                writeln!(stderr(), "data-queue: inserted, but not {asked} in time: {short} of {} tasks", tasks.len());
        }
    }

    fn task(&self, value: Vec<u8>) -> Result<NewTask, Stop> {
        let task = if self.data {
            NewTask::bytes(value)
        } else {
            let text = String::from_utf8(value);
            NewTask::json_text(text.map_err(|_| Stop::failed("the value is not UTF-8, so it is no JSON: say --data"))?)
        };
        Ok(self.dressed(task))
    }

    /// The task with all that the flags say.
    fn dressed(&self, task: NewTask) -> NewTask {
        let mut task = task.priority(self.priority);
        if let Some(delay) = self.delay {
            task = task.delay(delay);
        }
        if let Some(time) = self.deliver_at {
            task = task.deliver_at(time);
        }
        if let Some(ttl) = self.ttl {
            task = task.ttl(ttl);
        }
        if let Some(key) = &self.unique_key {
            task = task.unique_key(key);
        }
        self.headers.iter().fold(task, |task, (key, value)| task.header(key, value))
    }
}

/// What became of the lines.
#[derive(Default)]
struct Tally {
    lines: u64,
    refused: u64,
    /// What to exit with since ids could not be written; nothing as long as they can.
    unwritten: Option<u8>,
}

impl Tally {
    /// Waits for what becomes of a line. An error is one that the other lines will meet too.
    async fn note(
        &mut self,
        session: &mut Session,
        number: u64,
        receipt: Result<data_queue_client::Result<Receipt>, Stop>,
        options: &Insert,
    ) -> Result<(), Stop> {
        self.lines += 1;
        let Ok(receipt) = receipt.map_err(|Stop(_, why)| self.refuse(number, &why)) else { return Ok(()) };
        let inserted = match session.take(receipt)?.await {
            Ok(inserted) => inserted,
            Err(error) if matches!(error.kind(), ErrorKind::InvalidArgument | ErrorKind::MessageTooLarge) => {
                self.refuse(number, &error.to_string());
                return Ok(());
            }
            Err(error) => {
                let Stop(code, why) = session.explain(&error);
                return Err(Stop(code, format!("line {number}: {why}; those before it were inserted")));
            }
        };
        options.tell_short(&inserted);
        if self.unwritten.is_none()
            && let Err(Stop(code, why)) = session.out.rows(&inserted.iter().map(row).collect::<Vec<_>>())
        {
            // What is sent is inserted, whether anybody reads its id or not.
            self.unwritten = Some(code);
            if !why.is_empty() {
                let _ = writeln!(
                    stderr(),
                    "data-queue: {why}; lines are inserted nevertheless, from line {number} on without their ids"
                );
            }
        }
        Ok(())
    }

    fn refuse(&mut self, number: u64, why: &str) {
        self.refused += 1;
        let _ = writeln!(stderr(), "data-queue: line {number} was not inserted: {why}");
    }

    fn end(self) -> Result<ExitCode, Stop> {
        match self.refused {
            0 => Ok(ExitCode::from(self.unwritten.unwrap_or_default())),
            refused => {
                let _ = writeln!(stderr(), "data-queue: {refused} of {} lines were not inserted", self.lines);
                Ok(ExitCode::from(EXIT_FAILED))
            }
        }
    }
}

fn row(task: &InsertedTask) -> Row {
    Row::new().with("id", task.id.as_str()).with("duplicate", Cell::Mark("duplicate", task.duplicate))
}

fn read_whole() -> Result<Vec<u8>, Stop> {
    let mut value = Vec::new();
    stdin().lock().take(MAX_VALUE + 1).read_to_end(&mut value).map_err(|error| unreadable(&error))?;
    if value.len() as u64 > MAX_VALUE { Err(too_long()) } else { Ok(value) }
}

/// Ends when stdin does, or nobody takes the lines any more.
fn read_lines(lines: &mpsc::Sender<Result<Vec<u8>, Stop>>) {
    let mut stdin = stdin().lock();
    loop {
        let mut line = Vec::new();
        let read = match read_line(&mut stdin, &mut line) {
            Ok(0) => return,
            Ok(_) if line.len() as u64 > MAX_VALUE => Err(too_long()),
            Ok(_) => Ok(line),
            Err(error) => Err(unreadable(&error)),
        };
        let is_last = read.is_err();
        if lines.blocking_send(read).is_err() || is_last {
            return;
        }
    }
}

/// Reads a line without its end; answers how many bytes were taken. One that is too long is cut, but longer than [`MAX_VALUE`] still.
fn read_line(input: &mut impl BufRead, line: &mut Vec<u8>) -> std::io::Result<u64> {
    line.clear();
    let taken = input.by_ref().take(MAX_VALUE + 3).read_until(b'\n', line)?;
    let end = line.strip_suffix(b"\n").map(|line| line.strip_suffix(b"\r").unwrap_or(line).len());
    line.truncate(end.unwrap_or(line.len()));
    Ok(taken as u64)
}

fn unreadable(error: &std::io::Error) -> Stop {
    Stop::failed(format!("cannot read stdin: {error}"))
}

fn too_long() -> Stop {
    Stop::failed("a value on stdin is longer than 64 MiB: no server takes that")
}

fn header(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("a header is KEY=VALUE".to_owned()),
    }
}

fn time(text: &str) -> Result<SystemTime, String> {
    let time = humantime::parse_rfc3339_weak(text);
    time.map_err(|_| "it is a time in UTC such as 2030-01-31T08:00:00Z".to_owned())
}

fn retry(text: &str) -> Result<Duration, String> {
    match span(text)? {
        // Repeats inserted nothing twice as long as the server remembers request ids: 5 minutes, less a last call of 30 s.
        wait if wait <= Duration::from_secs(240) => Ok(wait),
        _ => Err("it is 0s to 4m".to_owned()),
    }
}
