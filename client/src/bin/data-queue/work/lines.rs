//! What commands say: passed on by lines, so that those of one are not mixed with another's, by a thread of its own, so that nothing
//! waits for whoever reads but the commands. Of stderr the end is kept, since it tells best why a command failed.

use std::{
    collections::VecDeque,
    io::{Write, stderr, stdout},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader},
    sync::{mpsc, oneshot, watch},
    time::{sleep, timeout},
};

use crate::{Stop, out::written};

/// How many lines wait to be written.
const AHEAD: usize = 256;
/// A longer line is passed on in pieces of so many bytes.
const MAX_LINE: usize = 64 << 10;
/// How many bytes of stderr are kept: some more than are told, since what is no UTF-8 becomes longer.
const KEPT: usize = 2_048;
/// How many bytes of it are told.
const MAX_TOLD: usize = 900;
/// How long the last lines may take.
const FAREWELL: Duration = Duration::from_secs(5);
/// A process that goes on behind a command that has ended is not listened to, if it says nothing for so long.
const QUIET: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Stdout,
    Stderr,
}

/// Where lines go.
#[derive(Clone)]
pub(super) struct Output {
    lines: mpsc::Sender<(Place, Vec<u8>)>,
    unwritten: watch::Receiver<Option<Stop>>,
    hurried: watch::Receiver<bool>,
}

/// The thread that writes.
pub(super) struct Written(oneshot::Receiver<()>);

/// In a hurry, lines that find no room are lost.
pub(super) fn start(hurried: watch::Receiver<bool>) -> (Output, Written) {
    let (lines, mut waiting) = mpsc::channel::<(Place, Vec<u8>)>(AHEAD);
    let (failure, unwritten) = watch::channel(None);
    let (ended, all_written) = oneshot::channel();
    std::thread::spawn(move || {
        while let Some((place, line)) = waiting.blocking_recv() {
            match place {
                Place::Stdout if failure.borrow().is_some() => {}
                Place::Stdout => {
                    let mut stdout = stdout().lock();
                    if let Err(stop) = written(stdout.write_all(&line).and_then(|()| stdout.flush())) {
                        failure.send_replace(Some(stop));
                    }
                }
                Place::Stderr => drop(stderr().write_all(&line)),
            }
        }
        // Nobody waits for ever.
        let _ = ended.send(());
    });
    (Output { lines, unwritten, hurried }, Written(all_written))
}

impl Output {
    /// A line of this program's own.
    pub(super) async fn say(&self, line: String) {
        let line = format!("data-queue: {}\n", line.replace('\n', " "));
        self.write(Place::Stderr, line.into_bytes()).await;
    }

    async fn write(&self, place: Place, line: Vec<u8>) {
        let mut hurried = self.hurried.clone();
        tokio::select! {
            biased;
            // The thread ends last.
            _ = self.lines.send((place, line)) => {}
            _ = hurried.wait_for(|hurried| *hurried) => {}
        }
    }

    /// Waits until stdout takes no more: answers why, as what to end with.
    pub(super) async fn unwritten(&self) -> Stop {
        let mut unwritten = self.unwritten.clone();
        match unwritten.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(stop)) => stop.clone(),
            Ok(None) | Err(_) => std::future::pending().await,
        }
    }
}

impl Written {
    /// Says the last line, and waits until all is written, if somebody reads it.
    pub(super) async fn end(self, output: Output, line: String) {
        let end = async {
            output.say(line).await;
            drop(output);
            let _ = self.0.await;
        };
        let _ = timeout(FAREWELL, end).await;
    }
}

/// Passes on what comes, until it ends.
pub(super) async fn pass(
    from: impl AsyncRead + Unpin,
    place: Place,
    output: Output,
    tail: Tail,
    mut has_ended: watch::Receiver<bool>,
) {
    let mut from = BufReader::new(from);
    loop {
        let mut line = Vec::new();
        let quiet = async {
            let _ = has_ended.wait_for(|has| *has).await;
            sleep(QUIET).await;
        };
        let is_over = {
            let mut limited = (&mut from).take(MAX_LINE as u64);
            tokio::select! {
                read = limited.read_until(b'\n', &mut line) => !matches!(read, Ok(1..)),
                () = quiet => true,
            }
        };
        if !line.is_empty() {
            // A last line that has no end gets one: another's line may follow.
            if line.len() < MAX_LINE && !line.ends_with(b"\n") {
                line.push(b'\n');
            }
            if place == Place::Stderr {
                tail.push(&line);
            }
            output.write(place, line).await;
        }
        if is_over {
            return;
        }
    }
}

/// The end of what was said.
#[derive(Clone, Default)]
pub(super) struct Tail(Arc<Mutex<VecDeque<u8>>>);

impl Tail {
    fn push(&self, line: &[u8]) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend(&line[line.len().saturating_sub(KEPT)..]);
        let over = kept.len().saturating_sub(KEPT);
        kept.drain(..over);
    }

    /// The last lines, whole ones if it is more than one.
    pub(super) fn text(&self) -> String {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect::<Vec<_>>();
        let text = String::from_utf8_lossy(&kept);
        let text = text.trim();
        if text.len() <= MAX_TOLD {
            return text.to_owned();
        }
        let from = (text.len() - MAX_TOLD..text.len()).find(|at| text.is_char_boundary(*at));
        let end = &text[from.unwrap_or(text.len())..];
        end.split_once('\n').map_or(end, |(_, lines)| lines).to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(said: &str) -> String {
        let tail = Tail::default();
        said.split_inclusive('\n').for_each(|line| tail.push(line.as_bytes()));
        tail.text()
    }

    #[test]
    fn of_what_was_said_the_last_lines_are_told() {
        assert_eq!(told(""), "");
        assert_eq!(told("one\ntwo\n\n"), "one\ntwo");
        let many: String = (0..1_000).map(|n| format!("line {n}\n")).collect();
        let end = told(&many);
        assert!(end.len() <= MAX_TOLD && end.len() > MAX_TOLD - 20, "{}", end.len());
        assert!(end.starts_with("line 9") && end.ends_with("\nline 999"), "{end}");
    }

    #[test]
    fn one_long_line_is_cut_at_a_character() {
        let end = told(&"é".repeat(10_000));
        assert!(end.len() <= MAX_TOLD && end.chars().all(|one| one == 'é'), "{end}");
        let end = told(&format!("x{}\n", "é".repeat(800)));
        assert!(end.chars().all(|one| one == 'é') && end.len() == MAX_TOLD, "{}", end.len());
    }
}
