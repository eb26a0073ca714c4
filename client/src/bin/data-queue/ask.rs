//! Whether somebody really means it.

use std::io::{BufRead, IsTerminal, Read, Write, stderr, stdin};

use clap::Args as ClapArgs;

use crate::Stop;

/// The longest answer that is read, in bytes.
const MAX_ANSWER: u64 = 1_000;

/// Says beforehand that it is meant.
#[derive(Debug, ClapArgs)]
pub(crate) struct Sure {
    /// Do it without asking; needed where nobody can be asked, since stdin or stderr is no terminal
    #[arg(long)]
    yes: bool,
}

impl Sure {
    /// Goes on only if it is meant.
    pub(crate) fn ask(&self, question: &str) -> Result<(), Stop> {
        if self.yes {
            return Ok(());
        }
        if !stdin().is_terminal() || !stderr().is_terminal() {
            return Err(Stop::usage("this takes --yes where nobody can be asked: nothing was done"));
        }
        // Nobody sees it if this fails, and nobody answers then.
        let _ = write!(stderr(), "{question} [y/N] ");
        let mut answer = String::new();
        let read = stdin().lock().take(MAX_ANSWER).read_line(&mut answer);
        if read.is_ok() && is_yes(&answer) { Ok(()) } else { Err(Stop::failed("nothing was done")) }
    }
}

fn is_yes(answer: &str) -> bool {
    matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes")
}

#[cfg(test)]
mod tests {
    use super::is_yes;

    #[test]
    fn only_a_clear_yes_is_one() {
        assert!(["y\n", "Yes", " yes\r\n"].into_iter().all(is_yes));
        assert!(!["", "\n", "n", "no", "yess", "y n", "ja"].into_iter().any(is_yes));
    }
}
