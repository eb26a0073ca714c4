//! A client's program: where it is, how it is run, and what it says.

use std::{
    env,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
};

use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStdout, Command},
    time::timeout,
};

use crate::support::PATIENCE;

/// Names the languages, and `tools`, that this machine has nothing for: they are not tested, as `tests/run` says.
const WITHOUT: &str = "DATA_QUEUE_TEST_WITHOUT";

/// Who has a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Language {
    Go,
    Java,
    Python,
    Rust,
    TypeScript,
}

impl Language {
    pub const ALL: [Self; 5] = [Self::Go, Self::Java, Self::Python, Self::Rust, Self::TypeScript];

    /// As its directory is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::Go => "go",
            Self::Java => "java",
            Self::Python => "python",
            Self::Rust => "rust",
            Self::TypeScript => "typescript",
        }
    }

    /// Whether it is tested on this machine.
    pub fn is_here(self) -> bool {
        is_here(self.name())
    }

    /// Its program.
    pub fn program(self) -> PathBuf {
        let profile = profile();
        let (program, build) = match self {
            Self::Rust => (profile.join("examples/program"), "cargo build -p data-queue-client --examples".to_owned()),
            other => {
                let target = profile.parent().expect("the target directory");
                (target.join("clients").join(other.name()).join("program"), format!("client/{}/build", other.name()))
            }
        };
        assert!(program.is_file(), "{} is missing: {build}", program.display());
        program
    }
}

/// Whether tests of this are run on this machine.
pub fn is_here(what: &str) -> bool {
    let without = env::var(WITHOUT).unwrap_or_default();
    let is_here = !without.split(' ').any(|word| word == what);
    if !is_here {
        println!("not run: {what} is in {WITHOUT}");
    }
    is_here
}

/// The test runs from `target/<profile>/deps`, binaries are in `target/<profile>`.
pub fn profile() -> PathBuf {
    let test = env::current_exe().expect("the test's own path");
    test.parent().and_then(Path::parent).expect("the target directory").to_owned()
}

/// A program at work, which does not outlive the test.
pub struct Running {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    /// What it said, for whoever looks into a failure.
    said: Vec<String>,
}

impl Running {
    pub fn start(language: Language, arguments: &[&str]) -> Self {
        let mut child = Command::new(language.program())
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("the program");
        let stdout = child.stdout.take().expect("a pipe");
        Self { child, lines: BufReader::new(stdout).lines(), said: Vec::new() }
    }

    /// The next line; nothing at the end.
    pub async fn line(&mut self) -> Option<String> {
        let line = timeout(PATIENCE, self.lines.next_line()).await;
        let line = line.unwrap_or_else(|_| panic!("said nothing for {PATIENCE:?} after {:#?}", self.said)).unwrap();
        self.said.extend(line.clone());
        line
    }

    /// Its last lines.
    pub fn said(&self) -> &[String] {
        &self.said[self.said.len().saturating_sub(20)..]
    }

    /// SIGTERM.
    pub fn terminate(&self) {
        let pid = self.child.id().expect("it runs").to_string();
        let status = std::process::Command::new("kill").args(["-s", "TERM", &pid]).status().expect("the kill command");
        assert!(status.success(), "kill -s TERM {pid}: {status}");
    }

    /// How it ended by itself.
    pub async fn ended(&mut self) -> ExitStatus {
        timeout(PATIENCE, self.child.wait()).await.expect("it ends").unwrap()
    }
}

/// Runs each test for every language on each durable store, as tests of their own: `name::python::sqlite`.
macro_rules! for_every_client {
    ($($(#[$about:meta])* async fn $name:ident($language:ident, $backend:ident) $body:block)*) => { $(
        $(#[$about])*
        mod $name {
            use super::*;
            async fn run(
                $language: $crate::clients::program::Language,
                $backend: $crate::support::server::Backend,
            ) $body
            $crate::clients::program::for_every_client!(@language go Go);
            $crate::clients::program::for_every_client!(@language java Java);
            $crate::clients::program::for_every_client!(@language python Python);
            $crate::clients::program::for_every_client!(@language rust Rust);
            $crate::clients::program::for_every_client!(@language typescript TypeScript);
        }
    )* };
    (@language $name:ident $language:ident) => {
        mod $name {
            use $crate::{clients::program::Language, support::server::Backend};
            #[test]
            fn sqlite() {
                on(Backend::Sqlite);
            }
            #[test]
            fn redis() {
                on(Backend::Redis);
            }
            fn on(backend: Backend) {
                if Language::$language.is_here() {
                    $crate::support::run(super::run(Language::$language, backend));
                }
            }
        }
    };
}

pub(crate) use for_every_client;
