//! `data-queue insert --lines`: a file of tasks, inserted in the order of its lines.
//!
//! A thread reads the file and makes batches of it, one ahead of that which is under way. Where a batch begins follows from the file
//! and the first line alone, and each has a request id of the run's name and its first line: whoever goes on with both inserts
//! nothing twice.

use std::{
    fs::File,
    io::{BufRead, BufReader, IsTerminal, stderr, stdin},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use data_queue_client::{Backoff, Error, ErrorKind, Inserted, NewTask};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};

use super::{Insert, MAX_VALUE, line, read_line};
use crate::{Stop, args::random_hex, out::Row, session::Session, signals::Signals};

/// The most tasks of a batch: what the server takes at the most.
const MAX_TASKS: usize = 1_000;
/// The most bytes of a batch, unless a single line has more: so many are made durable fast, and are far from too large a message.
const MAX_BYTES: u64 = 1 << 20;
/// The name of stdin.
const STDIN: &str = "-";

/// Where lines come from.
pub(super) struct Source {
    input: Box<dyn BufRead + Send>,
    /// As it was given.
    name: String,
    /// In bytes, if it is known.
    length: Option<u64>,
}

impl Source {
    pub(super) fn open(path: &PathBuf) -> Result<Self, Stop> {
        if path.as_os_str() == STDIN {
            return Ok(Self { input: Box::new(BufReader::new(stdin())), name: "stdin".to_owned(), length: None });
        }
        let name = path.display().to_string();
        let unreadable = |error| Stop::failed(format!("cannot read {name}: {error}"));
        let file = File::open(path).map_err(unreadable)?;
        let about = file.metadata().map_err(unreadable)?;
        if about.is_dir() {
            return Err(Stop::failed(format!("cannot read {name}: it is a directory")));
        }
        let length = about.is_file().then_some(about.len());
        Ok(Self { input: Box::new(BufReader::new(file)), name, length })
    }
}

/// Tasks that are inserted together, in order.
#[derive(Default)]
struct Batch {
    tasks: Vec<NewTask>,
    /// The line of each task: between them there are empty ones.
    lines: Vec<u64>,
    /// The line after the last one.
    next: u64,
    bytes: u64,
    /// How much of the file was read until then.
    read: u64,
}

impl Batch {
    fn first(&self) -> u64 {
        self.lines.first().copied().unwrap_or(self.next)
    }

    /// Takes all from this task on away.
    fn split_off(&mut self, at: usize) -> Self {
        let (tasks, lines) = (self.tasks.split_off(at), self.lines.split_off(at));
        let rest = Self { tasks, lines, ..*self };
        self.next = rest.first();
        rest
    }
}

/// Why the file is not read further: the line, and what is wrong with it, or with reading.
struct End {
    line: u64,
    wrong: Option<line::Wrong>,
    /// What happened to the file itself.
    failed: Option<std::io::Error>,
}

/// Reads the file and makes batches of it.
struct Reader {
    input: Box<dyn BufRead + Send>,
    is_data: bool,
    is_tasks: bool,
    next: u64,
    read: u64,
}

impl Reader {
    /// Ends when the file does, when a line is wrong, or when nobody takes batches any more.
    fn run(mut self, from_line: u64, batches: &mpsc::Sender<Result<Batch, End>>) {
        let ended = self.skip_to(from_line).and_then(|()| self.batches(batches));
        if let Err(end) = ended {
            // Nobody may be there who wants to know.
            let _ = batches.blocking_send(Err(end));
        }
    }

    fn skip_to(&mut self, line: u64) -> Result<(), End> {
        while self.next < line {
            match self.input.skip_until(b'\n').map_err(|error| self.failed(error))? {
                0 => return Ok(()),
                bytes => self.read += bytes as u64,
            }
            self.next += 1;
        }
        Ok(())
    }

    fn batches(&mut self, batches: &mpsc::Sender<Result<Batch, End>>) -> Result<(), End> {
        let (mut batch, mut line) = (Batch::default(), Vec::new());
        // False if nobody takes it.
        let send = |batch: &mut Batch| batches.blocking_send(Ok(std::mem::take(batch))).is_ok();
        loop {
            let task = match self.task(&mut line) {
                Ok(Some(task)) => task,
                // What came before goes before.
                ended => {
                    batch.next = self.next;
                    batch.read = self.read;
                    let _ = send(&mut batch);
                    return ended.map(drop);
                }
            };
            let bytes = line.len() as u64;
            if batch.bytes + bytes > MAX_BYTES && !send(&mut batch) {
                return Ok(());
            }
            batch.lines.push(self.next);
            batch.tasks.push(task);
            batch.bytes += bytes;
            self.next += 1;
            (batch.next, batch.read) = (self.next, self.read);
            if batch.tasks.len() == MAX_TASKS && !send(&mut batch) {
                return Ok(());
            }
        }
    }

    /// The task of the next line that is not empty; nothing at the end.
    fn task(&mut self, line: &mut Vec<u8>) -> Result<Option<NewTask>, End> {
        loop {
            match read_line(&mut self.input, line).map_err(|error| self.failed(error))? {
                0 => return Ok(None),
                bytes => self.read += bytes,
            }
            if self.next == 1 && !self.is_data && line.starts_with("\u{feff}".as_bytes()) {
                line.drain(.."\u{feff}".len());
            }
            if self.is_data || !line.iter().all(u8::is_ascii_whitespace) {
                let task = self.made(line);
                return task.map(Some).map_err(|wrong| End { line: self.next, wrong: Some(wrong), failed: None });
            }
            self.next += 1;
        }
    }

    fn made(&self, line: &[u8]) -> Result<NewTask, line::Wrong> {
        if line.len() as u64 > MAX_VALUE {
            let why = "it is longer than 64 MiB: no server takes that".to_owned();
            return Err(line::Wrong { column: MAX_VALUE as usize + 1, why });
        }
        match () {
            () if self.is_tasks => line::task(line),
            () if self.is_data => Ok(NewTask::bytes(line.to_vec())),
            () => line::value(line).map(NewTask::json_text),
        }
    }

    fn failed(&self, error: std::io::Error) -> End {
        End { line: self.next, wrong: None, failed: Some(error) }
    }
}

/// Inserts a file.
pub(super) struct Import<'a> {
    pub(super) options: &'a Insert,
    pub(super) session: Session,
    pub(super) from_line: u64,
    pub(super) retry_for: Duration,
}

/// How far it came.
struct Progress {
    /// Names the run in request ids.
    run: String,
    source: String,
    inserted: u64,
    duplicates: u64,
    /// All lines before this one are in.
    next: u64,
    bar: ProgressBar,
}

impl Import<'_> {
    pub(super) async fn run(mut self, source: Source) -> Result<ExitCode, Stop> {
        let Source { input, name, length } = source;
        let run = self.options.request_id.clone().map_or_else(random_hex, Ok)?;
        let bar = bar(length);
        let mut progress = Progress { run, source: name, inserted: 0, duplicates: 0, next: self.from_line, bar };
        let (sender, mut batches) = mpsc::channel(1);
        let Insert { data, tasks, .. } = *self.options;
        let reader = Reader { input, is_data: data, is_tasks: tasks, next: 1, read: 0 };
        let from_line = self.from_line;
        std::thread::spawn(move || reader.run(from_line, &sender));

        let mut signals = Signals::listen()?;
        let ended = loop {
            let batch = tokio::select! {
                () = signals.next() => break Err(progress.stopped("it was interrupted")),
                batch = batches.recv() => batch,
            };
            match batch {
                None => break Ok(()),
                Some(Err(end)) => break Err(progress.ended(end)),
                Some(Ok(mut batch)) => {
                    if !tasks {
                        batch.tasks = batch.tasks.into_iter().map(|task| self.options.dressed(task)).collect();
                    }
                    let last = batch.lines.last().copied();
                    let inserted = tokio::select! {
                        inserted = self.insert(batch, &mut progress) => inserted,
                        () = signals.next() => Err(progress.in_doubt("it was interrupted", last)),
                    };
                    if let Err(stop) = inserted {
                        break Err(stop);
                    }
                }
            }
        };
        progress.bar.finish_and_clear();
        ended?;
        progress.tell(&mut self.session, &self.options.queue)
    }

    /// Inserts a batch, in parts if the server does not take it whole: what is before a task that is refused is in.
    async fn insert(&self, batch: Batch, progress: &mut Progress) -> Result<(), Stop> {
        let mut parts = vec![batch];
        while let Some(mut part) = parts.pop() {
            if part.tasks.is_empty() {
                progress.next = progress.next.max(part.next);
                continue;
            }
            let id = format!("{}-{}", progress.run, part.first());
            let error = match self.send(&part, &id, &progress.bar).await {
                Ok(inserted) => {
                    progress.note(&part, &inserted);
                    continue;
                }
                Err(error) => error,
            };
            let split = match refused_index(&error) {
                Some(index) if (1..part.tasks.len()).contains(&index) => index,
                None if error.kind() == ErrorKind::MessageTooLarge && part.tasks.len() > 1 => part.tasks.len() / 2,
                _ => {
                    // Between it and what is in there are empty lines only.
                    progress.next = part.first();
                    return Err(self.stop(&error, &part, progress));
                }
            };
            parts.push(part.split_off(split));
            parts.push(part);
        }
        Ok(())
    }

    /// Tries again, under the same request id, what may go better in a while.
    async fn send(&self, part: &Batch, id: &str, bar: &ProgressBar) -> Result<Inserted, Error> {
        let until = Instant::now() + self.retry_for;
        let mut backoff = Backoff::new();
        loop {
            let error = match self.session.client.insert_as(&self.options.queue, part.tasks.clone(), id).await {
                Ok(inserted) => {
                    bar.suspend(|| self.options.tell_short(&inserted.tasks));
                    return Ok(inserted);
                }
                Err(error) => error,
            };
            let passes = error.is_retriable()
                || matches!(
                    error.kind(),
                    ErrorKind::DeadlineExceeded | ErrorKind::Overloaded | ErrorKind::StoreFull | ErrorKind::QueueFull
                );
            let pause = backoff.pause() + error.retry_after().unwrap_or_default();
            if !passes || Instant::now() + pause > until {
                return Err(error);
            }
            bar.set_message(format!("waiting: {error}"));
            sleep(pause).await;
        }
    }

    fn stop(&self, error: &Error, part: &Batch, progress: &Progress) -> Stop {
        let is_about_line = refused_index(error) == Some(0) || error.kind() == ErrorKind::MessageTooLarge;
        if is_about_line {
            return progress.stopped(&format!("{}:{}: {error}", progress.source, part.first()));
        }
        let Stop(_, why) = self.session.explain(error);
        match error.kind() {
            ErrorKind::Unavailable | ErrorKind::DeadlineExceeded | ErrorKind::Internal => {
                progress.in_doubt(&why, part.lines.last().copied())
            }
            _ => progress.stopped(&why),
        }
    }
}

impl Progress {
    fn note(&mut self, part: &Batch, inserted: &Inserted) {
        let duplicates = inserted.tasks.iter().filter(|task| task.duplicate).count() as u64;
        self.duplicates += duplicates;
        self.inserted += inserted.tasks.len() as u64 - duplicates;
        self.next = part.next;
        self.bar.set_position(part.read);
        self.bar.set_message(format!("{} tasks", self.inserted));
    }

    fn ended(&self, End { line, wrong, failed }: End) -> Stop {
        let source = &self.source;
        match (wrong, failed) {
            (Some(wrong), _) => self.stopped(&format!("{source}:{line}:{}: {}", wrong.column, wrong.why)),
            (None, Some(error)) => self.stopped(&format!("cannot read {source} from line {line} on: {error}")),
            (None, None) => self.stopped(&format!("cannot read {source} from line {line} on")),
        }
    }

    fn so_far(&self) -> String {
        format!("inserted: {}, duplicates: {}", self.inserted, self.duplicates)
    }

    /// It ended where nothing is in doubt.
    fn stopped(&self, why: &str) -> Stop {
        Stop::failed(format!("{why}; {}; go on with --from-line {}", self.so_far(), self.next))
    }

    /// It ended with a batch of which nobody knows whether it is in.
    fn in_doubt(&self, why: &str, last: Option<u64>) -> Stop {
        let Self { next, run, .. } = self;
        let last = last.unwrap_or(*next);
        Stop::failed(format!(
            "{why}; {}, and maybe those up to line {last}; go on with --from-line {next} --request-id {run} and the same flags: \
             within 5 minutes that inserts nothing twice",
            self.so_far()
        ))
    }

    fn tell(&self, session: &mut Session, queue: &str) -> Result<ExitCode, Stop> {
        let row =
            Row::new().with("inserted", self.inserted).with("duplicates", self.duplicates).with("next_line", self.next);
        let words = format!("{queue}: {}", self.so_far());
        session.out.done(&words, &row)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Which task of the request is refused.
fn refused_index(error: &Error) -> Option<usize> {
    error.field()?.strip_prefix("tasks[")?.split_once(']')?.0.parse().ok()
}

fn bar(length: Option<u64>) -> ProgressBar {
    if !stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::with_draw_target(length, ProgressDrawTarget::stderr());
    let template = match length {
        Some(_) => "[{wide_bar}] {percent}%, {msg}, {eta} left",
        None => "{spinner} {bytes}, {msg}, {elapsed}",
    };
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style.progress_chars("#> ")),
        Err(_) => bar,
    }
}
