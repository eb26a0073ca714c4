//! `data-queue-validate` with workers of every language at once.

use std::process::Stdio;

use tokio::process::Command;

use super::program::{Language, profile};
use crate::support::{rounds, server::Backend, wire_tests};

async fn validate(backend: Backend) {
    let server = backend.start(&[]).await;
    let languages: Vec<_> = Language::ALL.into_iter().filter(|language| language.is_here()).collect();
    let binary = profile().join("data-queue-validate");
    assert!(binary.is_file(), "{} is missing: cargo build --workspace --bins", binary.display());
    let mut command = Command::new(binary);
    command.args(["--addr", &server.address().to_string(), "--timeout", "20m"]);
    command.args(["--count", rounds("20000", "100000")]);
    for language in &languages {
        command.args(["--worker", &format!("{}={}", language.name(), language.program().display())]);
    }
    let output = command.stdin(Stdio::null()).kill_on_drop(true).output().await.unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    println!("{said}");
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    for language in languages {
        let line = said.lines().find(|line| line.starts_with(language.name())).unwrap_or_default();
        let acked: u64 = line.split_whitespace().nth(2).and_then(|acked| acked.parse().ok()).unwrap_or_default();
        assert!(acked > 0, "{} did nothing: {said}", language.name());
    }
}

wire_tests! {
    async fn workers_of_all_languages_together_ack_each_task_once_on_sqlite() {
        validate(Backend::Sqlite).await;
    }

    async fn workers_of_all_languages_together_ack_each_task_once_on_redis() {
        validate(Backend::Redis).await;
    }
}
