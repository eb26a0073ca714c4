//! What asks a program to end.

use std::{future::pending, io};

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::Stop;

/// Ctrl-C, SIGTERM, and the end of the terminal.
pub(crate) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    /// None if nohup asks not to heed it.
    hang_up: Option<Signal>,
}

impl Signals {
    /// From now on none of them ends the program by itself.
    pub(crate) fn listen() -> Result<Self, Stop> {
        Self::all().map_err(|error| Stop::failed(format!("cannot watch for signals: {error}")))
    }

    fn all() -> io::Result<Self> {
        let hang_up = if is_hang_up_ignored() { None } else { Some(signal(SignalKind::hangup())?) };
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())?, hang_up })
    }

    pub(crate) async fn next(&mut self) {
        let Self { interrupt, terminate, hang_up } = self;
        let hung_up = async {
            match hang_up {
                Some(signal) => signal.recv().await,
                None => pending().await,
            }
        };
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hung_up => {}
        }
    }
}

/// The lowest bit of the mask of ignored signals is SIGHUP. Where nobody tells, it is heeded.
fn is_hang_up_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & 1 == 1)
}
