//! README's lines for common tools do what it says: grpcurl, buf curl and ghz against a real server.

use std::{env, process::Stdio};

use data_queue_proto::v1::{
    InsertRequest, NewTask, PopRequest, PutbackRequest, PutbackTokens, Task, new_task, putback_request,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    process::Command,
    time::timeout,
};

use super::program::{is_here, profile};
use crate::support::{
    PATIENCE,
    server::{Backend, Client, Server},
    wire_tests,
};

const README: &str = include_str!("../../README.md");
const TOOLS: [&str; 3] = ["grpcurl ", "buf curl ", "ghz "];
const QUEUE: &str = "mail";

/// The commands of README's shell blocks that call one of the tools, each as it stands.
fn commands() -> Vec<String> {
    let mut commands = Vec::new();
    for block in README.split("\n```sh\n").skip(1).map(|rest| rest.split("\n```").next().unwrap_or_default()) {
        let mut command = String::new();
        for line in block.lines().filter(|line| !line.starts_with('#')) {
            command.push_str(line);
            command.push('\n');
            let goes_on = line.ends_with(['\\', '|']) || command.matches('\'').count() % 2 == 1;
            if !goes_on {
                commands.push(std::mem::take(&mut command));
            }
        }
    }
    commands.retain(|command| TOOLS.iter().any(|tool| command.contains(tool)));
    commands
}

/// A task that is held.
async fn held(client: &mut Client) -> Task {
    let value = Some(new_task::Value::Json("1".into()));
    let tasks = vec![NewTask { value, priority: 9, ..NewTask::default() }];
    client.insert(InsertRequest { queue: QUEUE.into(), tasks, ..InsertRequest::default() }).await.unwrap();
    let pop = PopRequest { queue: QUEUE.into(), ..PopRequest::default() };
    client.pop(pop).await.unwrap().into_inner().task.expect("a task")
}

/// A dead letter's id.
async fn dead(client: &mut Client) -> String {
    let task = held(client).await;
    let tokens = PutbackTokens { lease_tokens: vec![task.lease_token], dead_letter: true, ..PutbackTokens::default() };
    let selection = Some(putback_request::Selection::Tokens(tokens));
    client.putback(PutbackRequest { queue: QUEUE.into(), selection }).await.unwrap();
    task.id
}

/// Runs a command to its end, or, if it goes on for ever, to the end of its first message. Answers what it said.
async fn run(command: &str) -> String {
    let tools = profile().parent().expect("the target directory").join("tools");
    let path = format!("{}:{}", tools.display(), env::var("PATH").unwrap_or_default());
    let mut child = Command::new("bash")
        .args(["-c", &format!("set -o pipefail; {command}")])
        .env("PATH", path)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("bash");
    let mut stdout = BufReader::new(child.stdout.take().expect("a pipe"));
    if command.contains("WatchQueues") {
        let mut lines = stdout.lines();
        let mut said = String::new();
        while !said.ends_with("\n}\n") {
            let line = timeout(PATIENCE, lines.next_line()).await.expect("a message").unwrap();
            said.push_str(&line.unwrap_or_else(|| panic!("{command} ended")));
            said.push('\n');
        }
        return said;
    }
    let mut stderr = child.stderr.take().expect("a pipe");
    let (mut said, mut wrong) = (String::new(), String::new());
    let ended = async { tokio::try_join!(stdout.read_to_string(&mut said), stderr.read_to_string(&mut wrong)) };
    timeout(PATIENCE, ended).await.unwrap_or_else(|_| panic!("goes on: {command}")).unwrap();
    let status = child.wait().await.unwrap();
    assert!(status.success(), "{command}{status}\n{said}\n{wrong}");
    said
}

async fn try_all(server: Server) {
    let mut client = server.client().await;
    let commands = commands();
    for tool in TOOLS {
        assert!(commands.iter().any(|command| command.contains(tool)), "README shows no {tool}");
    }
    for command in commands {
        let mut line = command.replace("127.0.0.1:50051", &server.address().to_string()).replace("sleep 10", "sleep 1");
        let needs_token = line.contains("<leaseToken>");
        if needs_token {
            line = line.replace("<leaseToken>", &held(&mut client).await.lease_token);
        }
        if line.contains("<id>") {
            line = line.replace("<id>", &dead(&mut client).await);
        }
        let said = run(&line).await;
        if line.contains("ghz ") {
            assert!(said.contains("[OK]") && !said.contains("Error distribution"), "{line}{said}");
        }
        assert!(!needs_token || said.contains("OUTCOME_APPLIED"), "{line}{said}");
    }
}

wire_tests! {
    async fn the_lines_for_tools_do_what_they_say_on_sqlite() {
        if is_here("tools") {
            try_all(Backend::Sqlite.start(&[]).await).await;
        }
    }

    async fn the_lines_for_tools_do_what_they_say_on_redis() {
        if is_here("tools") {
            try_all(Backend::Redis.start(&[]).await).await;
        }
    }
}
