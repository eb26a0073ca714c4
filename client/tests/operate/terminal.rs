//! `data-queue` on a terminal, which the `script` of util-linux makes.

use std::{
    io::Write,
    process::{Command, Stdio},
};

use data_queue_client::NewTask;

use crate::server::{Ran, Server, binary};

/// A run on a terminal on which this is typed. All that it writes comes on one way.
fn typed(server: &Server, line: &str, input: &str, no_color: Option<&str>) -> Ran {
    let mut command = Command::new("script");
    command.args(["-qec", &format!("{} {line}", binary().display()), "/dev/null"]);
    command.env("DATA_QUEUE_ADDR", &server.address).env("SHELL", "/bin/sh").env_remove("NO_COLOR");
    if let Some(value) = no_color {
        command.env("NO_COLOR", value);
    }
    let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = child.expect("the command script, of util-linux");
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    Ran::of(child.wait_with_output().unwrap())
}

#[tokio::test]
async fn a_terminal_gets_tables_in_bold_unless_it_wants_no_colour() {
    let server = Server::start(&[]);
    server.client().insert("q", NewTask::json_text("\"\u{9b}2J\"").header("k", "\u{1b}[2J\u{9b}2J")).await.unwrap();
    let bold = typed(&server, "queues", "", None);
    assert!(bold.stdout.starts_with("\u{1b}[1mQUEUE  READY") && bold.code == Some(0), "{bold:?}");
    let plain = typed(&server, "queues", "", Some("1"));
    assert!(plain.stdout.starts_with("QUEUE  READY") && !plain.stdout.contains('\u{1b}'), "{plain:?}");
    for line in ["tasks q", "pop q", "tasks q --state leased -o json"] {
        // What is in a task is no command to the terminal.
        let ran = typed(&server, line, "", Some("1"));
        let commands = ran.stdout.chars().filter(|one| one.is_control() && !matches!(one, '\r' | '\n')).count();
        assert!(ran.stdout.contains("u009b2J") && commands == 0, "{line}: {ran:?}");
    }
}

#[tokio::test]
async fn a_terminal_is_asked_and_only_a_yes_goes_on() {
    let server = Server::start(&[]);
    let client = server.client();
    client.insert("q", NewTask::json_text("1")).await.unwrap();
    for answer in ["n\n", "\n", "maybe\n"] {
        let ran = typed(&server, "purge q --state ready", answer, None);
        assert!(ran.code == Some(1) && ran.stdout.contains("Remove the ready tasks of q? [y/N]"), "{ran:?}");
        assert!(ran.stdout.contains("nothing was done"), "{ran:?}");
    }
    assert_eq!(client.admin().get_queue("q").await.unwrap().counts.ready, 1);
    let ran = typed(&server, "purge q --state ready", "y\n", None);
    assert!(ran.code == Some(0) && ran.stdout.contains("1 task removed from q"), "{ran:?}");
    let ran = typed(&server, "delete-queue q", "yes\n", None);
    assert!(ran.code == Some(0) && ran.stdout.contains("q is gone"), "{ran:?}");
    let ran = typed(&server, "redrive q --all", "", None);
    assert_eq!(ran.code, Some(1), "no answer is no yes: {ran:?}");
}
