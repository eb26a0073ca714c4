//! `data-queue completions` and `data-queue man`: what shells and `man` know of the command line.

use std::{fs, io, path::PathBuf, process::ExitCode};

use clap::{Args as ClapArgs, Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man as Page;

use crate::{Stop, args::Args, out};

const NAME: &str = "data-queue";

/// Writes completions for a shell
#[derive(Debug, ClapArgs)]
#[command(after_help = COMPLETIONS_HELP)]
pub(crate) struct Completions {
    /// The shell
    shell: Shell,
}

const COMPLETIONS_HELP: &str = "\
Examples:
  data-queue completions bash > ~/.local/share/bash-completion/completions/data-queue
  data-queue completions zsh > ~/.zfunc/_data-queue      # a folder of $fpath
  data-queue completions fish > ~/.config/fish/completions/data-queue.fish";

impl Completions {
    pub(crate) fn run(&self) -> Result<ExitCode, Stop> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Args::command(), NAME, &mut script);
        write(&script)
    }
}

/// Writes the manual page of this program, or of a verb
#[derive(Debug, ClapArgs)]
#[command(after_help = MAN_HELP)]
pub(crate) struct Man {
    /// Of this verb [default: of the program]
    verb: Option<String>,

    /// Write the pages of the program and of each verb into this folder, which is made if it is not there
    #[arg(long, value_name = "DIR", conflicts_with = "verb")]
    dir: Option<PathBuf>,
}

const MAN_HELP: &str = "\
Examples:
  data-queue man insert | man -l -
  data-queue man --dir ~/.local/share/man/man1";

impl Man {
    pub(crate) fn run(&self) -> Result<ExitCode, Stop> {
        if let Some(dir) = &self.dir {
            let made = fs::create_dir_all(dir).and_then(|()| clap_mangen::generate_to(Args::command(), dir));
            made.map_err(|error| Stop::failed(format!("cannot write to {}: {error}", dir.display())))?;
            return Ok(ExitCode::SUCCESS);
        }
        let mut page = Vec::new();
        let rendered = Page::new(self.command()?).render(&mut page);
        rendered.map_err(|error: io::Error| Stop::failed(format!("cannot make the page: {error}")))?;
        write(&page)
    }

    fn command(&self) -> Result<Command, Stop> {
        let mut program = Args::command().disable_help_subcommand(true);
        let Some(verb) = &self.verb else { return Ok(program) };
        // Then a verb has the flags that all have, and the program's name before its own.
        program.build();
        let found = program.find_subcommand(verb).cloned();
        found.ok_or_else(|| Stop::usage(format!("there is no verb {verb:?} (see --help)")))
    }
}

fn write(text: &[u8]) -> Result<ExitCode, Stop> {
    out::write(&String::from_utf8_lossy(text))?;
    Ok(ExitCode::SUCCESS)
}
