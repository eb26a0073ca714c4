//! The whole terminal for a while. It is as it was before when this is dropped, and when the program panics.

use std::{
    io::{Write, stdout},
    panic,
    sync::atomic::{AtomicBool, Ordering},
};

#[cfg(unix)]
use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::sync::mpsc;

use crate::{Stop, out};

/// To the other screen, without a cursor; and back.
const ENTER: &str = "\u{1b}[?1049h\u{1b}[?25l";
const LEAVE: &str = "\u{1b}[?25h\u{1b}[?1049l";
/// What is behind the last character of a line, and below the last line.
const CLEAR_LINE: &str = "\u{1b}[K";
const CLEAR_BELOW: &str = "\u{1b}[J";
const HOME: &str = "\u{1b}[H";
/// Of a terminal that does not say.
const SIZE: (usize, usize) = (80, 24);
/// Keys that were pressed and not looked at.
const KEYS: usize = 16;

/// There is one terminal: it is left once, by whoever comes first.
static IS_OPEN: AtomicBool = AtomicBool::new(false);

/// The terminal, as long as it is there.
pub(super) struct Screen {
    #[cfg(unix)]
    before: Option<Termios>,
}

impl Screen {
    pub(super) fn open() -> Result<Self, Stop> {
        let screen = Self {
            #[cfg(unix)]
            before: quiet_keys(),
        };
        IS_OPEN.store(true, Ordering::SeqCst);
        // What a panic says is to be read.
        let told = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            leave();
            told(info);
        }));
        out::write(ENTER)?;
        Ok(screen)
    }

    /// Columns and lines, as they are now.
    pub(super) fn size() -> (usize, usize) {
        #[cfg(unix)]
        if let Ok(size) = tcgetwinsize(stdout())
            && size.ws_col > 0
            && size.ws_row > 0
        {
            return (size.ws_col.into(), size.ws_row.into());
        }
        SIZE
    }

    /// Shows these lines and nothing else. They must fit.
    pub(super) fn show(&self, lines: &[String]) -> Result<(), Stop> {
        let text: Vec<_> = lines.iter().map(|line| format!("{line}{CLEAR_LINE}")).collect();
        out::write(&format!("{HOME}{}{CLEAR_BELOW}", text.join("\r\n")))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        leave();
        #[cfg(unix)]
        if let Some(before) = &self.before {
            // What was typed and not read is not for the shell.
            let _ = tcsetattr(std::io::stdin(), OptionalActions::Flush, before);
        }
    }
}

fn leave() {
    if IS_OPEN.swap(false, Ordering::SeqCst) {
        let mut stdout = stdout().lock();
        // It may be gone.
        let _ = stdout.write_all(LEAVE.as_bytes()).and_then(|()| stdout.flush());
    }
}

/// Keys come at once and are not shown, and none stops the program where it could not tidy up; Ctrl-C is a signal still. Answers how it
/// was before, if there is a keyboard.
#[cfg(unix)]
fn quiet_keys() -> Option<Termios> {
    /// No key is it.
    const NO_KEY: u8 = 0;
    let before = tcgetattr(std::io::stdin()).ok()?;
    let mut quiet = before.clone();
    quiet.local_modes -= LocalModes::ICANON | LocalModes::ECHO;
    for (code, value) in [
        (SpecialCodeIndex::VMIN, 1),
        (SpecialCodeIndex::VTIME, 0),
        (SpecialCodeIndex::VSUSP, NO_KEY),
        (SpecialCodeIndex::VQUIT, NO_KEY),
    ] {
        quiet.special_codes[code] = value;
    }
    tcsetattr(std::io::stdin(), OptionalActions::Now, &quiet).ok()?;
    Some(before)
}

/// What is typed, key by key. There is nothing more to be heard at its end.
pub(super) fn keys() -> mpsc::Receiver<u8> {
    let (sender, keys) = mpsc::channel(KEYS);
    // It waits for a key until the program ends.
    std::thread::spawn(move || {
        let mut key = [0];
        while let Ok(1) = std::io::Read::read(&mut std::io::stdin(), &mut key) {
            if sender.blocking_send(key[0]).is_err() {
                return;
            }
        }
    });
    keys
}
