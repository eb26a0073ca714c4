//! `data-queue top`: what goes on in queues, while it does.
//!
//! `feed` hears what the server tells, also after it was away; `screen` is the terminal.

mod feed;
mod screen;

use std::{
    cmp::Reverse,
    process::ExitCode,
    time::{Duration, SystemTime},
};

use clap::{Args as ClapArgs, ValueEnum};
use data_queue_client::{QueueActivity, Watch};
use tokio::{sync::mpsc, time::Instant};

use self::{
    feed::{Feed, Heard},
    screen::Screen,
};
use crate::{
    Stop,
    args::{Common, span},
    out::{Out, Row},
    queues::active,
    session::Session,
    signals::Signals,
};

/// The columns that a narrow terminal does without, in this order.
const LESS: [&str; 8] = ["scheduled", "oldest", "dead", "paused", "acked_s", "inserted_s", "leased", "ready"];
/// On a screen a name is cut here, in characters, or at half of its width if that is less.
const WIDEST_NAME: usize = 48;
/// When so many intervals, and a second, brought nothing, it is told for how long that is so.
const QUIET_INTERVALS: u32 = 3;

/// Shows what goes on in queues, live
///
/// On a terminal it fills the screen, as many queues and columns as fit, until q or Ctrl-C; elsewhere, and with -o json or plain, it
/// writes lines for all queues at each interval, and ends with Ctrl-C or --count. When the server goes away it says so, and goes on
/// when it is back. At most the first 1000 queues by name.
#[derive(Debug, ClapArgs)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Top {
    /// Only these, at most 100; they need not exist
    #[arg(value_name = "QUEUE")]
    queues: Vec<String>,

    /// How often, 100ms to 1m
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = span)]
    interval: Duration,

    /// End after so many times, 1 or more [default: go on]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,

    /// What comes first: the most of it, or names by their letters
    #[arg(long, value_enum, default_value_t = By::Ready)]
    sort: By,
}

const AFTER_HELP: &str = "\
Columns: at, queue, ready, scheduled, leased, dead, inserted_s, acked_s (tasks a second since the time before, 0 the first time), \
oldest (how long the task at the head has been there), paused. JSON: these; oldest_seconds.";

/// What queues are sorted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum By {
    Name,
    Ready,
    Scheduled,
    Leased,
    Dead,
    Inserted,
    Acked,
    Oldest,
}

impl By {
    /// Those that are alike stay in the order of their names.
    fn sort(self, queues: &mut [QueueActivity]) {
        let millitasks = |rate: f64| (rate * 1_000.0) as u64;
        queues.sort_by_key(|QueueActivity { counts, inserted_per_second, acked_per_second, .. }| {
            Reverse(match self {
                Self::Name => 0,
                Self::Ready => counts.ready,
                Self::Scheduled => counts.scheduled,
                Self::Leased => counts.leased,
                Self::Dead => counts.dead,
                Self::Inserted => millitasks(*inserted_per_second),
                Self::Acked => millitasks(*acked_per_second),
                Self::Oldest => counts.oldest_ready_age.map_or(0, |age| age.as_millis() as u64 + 1),
            })
        });
    }
}

impl Top {
    pub(crate) async fn run(self, common: &Common) -> Result<ExitCode, Stop> {
        let session = Session::open(common)?;
        let watch = Watch::queues(&self.queues).interval(self.interval);
        // A server that is away now is an error; later it is waited for.
        let first = session.admin().watch_queues(watch.clone()).await;
        let first = session.take(first)?;
        // Before anything is shown: Ctrl-C never leaves a screen behind.
        let signals = Signals::listen()?;
        let is_live = session.out.is_watched();
        let out = Out::new(common.output);
        let address = session.address().to_owned();
        let feed = Feed::start(session, watch, first);
        if is_live {
            self.live(&address, &out, feed, signals).await?
        } else {
            self.lines(out, feed, signals).await?
        }
        Ok(ExitCode::SUCCESS)
    }

    async fn lines(&self, mut out: Out, mut feed: Feed, mut signals: Signals) -> Result<(), Stop> {
        let mut left = self.count.unwrap_or(u64::MAX);
        while left > 0 {
            let heard = tokio::select! {
                () = signals.next() => return Ok(()),
                heard = feed.next() => heard?,
            };
            match heard {
                Heard::Queues(mut queues) => {
                    self.sort.sort(&mut queues);
                    let now = SystemTime::now();
                    let rows: Vec<_> = queues.into_iter().map(|queue| active(now, queue)).collect();
                    // A reader that hangs does not keep it from ending.
                    let writing = tokio::task::spawn_blocking(move || out.again(&rows).map(|()| out));
                    out = tokio::select! {
                        () = signals.next() => return Ok(()),
                        written = writing => written.map_err(|error| Stop::failed(error.to_string()))??,
                    };
                    left -= 1;
                }
                Heard::Away(why) => {
                    use std::io::Write;
                    let _ = writeln!(std::io::stderr(), "data-queue: {why}; trying again");
                }
            }
        }
        Ok(())
    }

    async fn live(&self, address: &str, out: &Out, mut feed: Feed, mut signals: Signals) -> Result<(), Stop> {
        let screen = Screen::open()?;
        let (mut keys, mut sizes) = (screen::keys(), sizes());
        let mut view = View { address, out, queues: Vec::new(), heard: Instant::now(), away: None };
        let mut left = self.count.unwrap_or(u64::MAX);
        // The server says what is too long.
        let quiet = self.interval.min(Duration::from_secs(60)) * QUIET_INTERVALS + Duration::from_secs(1);
        while left > 0 {
            tokio::select! {
                () = signals.next() => return Ok(()),
                Some(key) = keys.recv() => if matches!(key, b'q' | b'Q') { return Ok(()) },
                Some(()) = sizes.recv() => {}
                // Only the time that is shown changes.
                () = tokio::time::sleep(Duration::from_secs(1)), if view.heard.elapsed() > quiet => {}
                () = tokio::time::sleep_until(view.heard + quiet), if view.heard.elapsed() <= quiet => {}
                heard = feed.next() => match heard? {
                    Heard::Queues(queues) => {
                        view.queues = queues;
                        self.sort.sort(&mut view.queues);
                        (view.heard, view.away) = (Instant::now(), None);
                        left -= 1;
                    }
                    Heard::Away(why) => view.away = Some(why),
                },
            }
            let (width, height) = Screen::size();
            screen.show(&view.lines(width, height, quiet))?;
        }
        Ok(())
    }
}

/// What is on the screen.
struct View<'a> {
    address: &'a str,
    out: &'a Out,
    queues: Vec<QueueActivity>,
    heard: Instant,
    /// Why nothing is heard.
    away: Option<String>,
}

impl View<'_> {
    /// Lines that fit.
    fn lines(&self, width: usize, height: usize, quiet: Duration) -> Vec<String> {
        let mut lines = vec![self.state(quiet), self.sums(), String::new()];
        let room = height.saturating_sub(lines.len() + 1);
        let is_all = self.queues.len() <= room;
        let shown = if is_all { self.queues.len() } else { room.saturating_sub(1) };
        let widest = WIDEST_NAME.min(width / 2).max(1);
        let rows: Vec<Row> = self.queues[..shown].iter().map(|queue| row(queue, widest)).collect();
        let table = self.out.fitted(&rows, &LESS, width);
        lines.iter_mut().for_each(|line| *line = line.chars().take(width).collect());
        lines.extend(table);
        if !is_all {
            let more = format!("and {} more", self.queues.len() - shown);
            lines.push(more.chars().take(width).collect());
        }
        lines.truncate(height);
        lines
    }

    /// The first line: where, and whether it is so still.
    fn state(&self, quiet: Duration) -> String {
        let silence = self.heard.elapsed();
        let since = humantime::format_duration(Duration::from_secs(silence.as_secs()));
        match &self.away {
            Some(why) => format!("{why}; trying again, this was {since} ago"),
            None if silence > quiet => format!("nothing was heard from {} for {since}", self.address),
            None => {
                let now = humantime::format_rfc3339_seconds(SystemTime::now());
                format!("data-queue at {}   {now}   q ends", self.address)
            }
        }
    }

    fn sums(&self) -> String {
        let sum = |count: fn(&QueueActivity) -> u64| self.queues.iter().map(count).fold(0, u64::saturating_add);
        let rate = |rate: fn(&QueueActivity) -> f64| self.queues.iter().map(rate).fold(0.0, |sum, rate| sum + rate);
        let count = self.queues.len();
        format!(
            "{count} {}: {} ready, {} scheduled, {} leased, {} dead; {:.1} inserted/s, {:.1} acked/s",
            if count == 1 { "queue" } else { "queues" },
            sum(|queue| queue.counts.ready),
            sum(|queue| queue.counts.scheduled),
            sum(|queue| queue.counts.leased),
            sum(|queue| queue.counts.dead),
            rate(|queue| queue.inserted_per_second),
            rate(|queue| queue.acked_per_second),
        )
    }
}

fn row(queue: &QueueActivity, widest: usize) -> Row {
    let mut queue = queue.clone();
    if let Some((end, _)) = queue.queue.char_indices().nth(widest) {
        queue.queue.truncate(end.saturating_sub(1));
        queue.queue.push('…');
    }
    let columns = ["queue", "ready", "scheduled", "leased", "dead", "inserted_s", "acked_s", "oldest", "paused"];
    active(SystemTime::now(), queue).only(&columns)
}

/// The terminal has another size now.
fn sizes() -> mpsc::Receiver<()> {
    let (sender, sizes) = mpsc::channel(1);
    #[cfg(unix)]
    if let Ok(mut changes) = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::window_change()) {
        tokio::spawn(async move { while changes.recv().await.is_some() && sender.send(()).await.is_ok() {} });
    }
    #[cfg(not(unix))]
    drop(sender);
    sizes
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn it_is_a_screen_for_any_terminal() {
        let out = Out::new(Some(crate::args::Output::Table));
        let queue = |name: &str| {
            let mut queue = QueueActivity::default();
            queue.queue = name.repeat(30);
            queue.counts.ready = u64::MAX;
            queue
        };
        let queues = vec![queue("a"), queue("bcde"), queue("f")];
        let view = View { address: "127.0.0.1:50051", out: &out, queues, heard: Instant::now(), away: None };
        for width in [0, 1, 5, 20, 33, 60, 80, 100, 300] {
            for height in [0, 1, 2, 3, 4, 5, 6, 7, 50] {
                let lines = view.lines(width, height, Duration::from_secs(60));
                assert!(lines.len() <= height, "{width} × {height}: {lines:?}");
                assert!(lines.iter().all(|line| line.chars().count() <= width), "{width} × {height}: {lines:?}");
            }
        }
        let lines = view.lines(300, 50, Duration::from_secs(60));
        assert!(lines.len() == 7 && lines[3].ends_with("OLDEST  PAUSED"), "{lines:?}");
        let lines = view.lines(60, 6, Duration::from_secs(60));
        assert!(lines[4].starts_with("aaa") && lines[5] == "and 2 more", "{lines:?}");
        assert!(lines[3].starts_with("QUEUE") && !lines[3].contains("SCHEDULED"), "{lines:?}");
    }
}
