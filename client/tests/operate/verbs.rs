//! Each verb of `data-queue`: what it writes in both forms, and what it exits with.

use std::{
    io::{BufRead, BufReader, Read},
    process::Stdio,
    time::Duration,
};

use data_queue_client::{Client, NewTask, Pop, Putback, Watch};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::server::{PATIENCE, Ran, Server, columns, command};

/// Makes dead letters of the tasks at the head, with this reason.
async fn reject(client: &Client, queue: &str, count: usize, reason: &str) {
    for _ in 0..count {
        let task = client.pop(queue, Pop::new()).await.unwrap().task.expect("a task");
        client.putback_with(&task, Putback::new().dead_letter(true).reason(reason)).await.unwrap();
    }
}

#[tokio::test]
async fn insert_takes_an_argument_with_everything_that_a_task_can_have() {
    let server = Server::start(&[]);
    let line = ["insert", "q", "{\"a\": 1}", "--priority", "7", "--ttl", "1h", "--header", "k=v=w", "--header", "l="];
    let id = server.good(&line);
    let task = &server.objects(&["task", "q", id.trim_end()])[0];
    assert_eq!((&task["id"], &task["value"]), (&json!(id.trim_end()), &json!({"a": 1})));
    assert_eq!((&task["priority"], &task["headers"]), (&json!(7), &json!({"k": "v=w", "l": ""})));
    assert!(task["expires"].as_str() > task["inserted"].as_str(), "{task}");

    let later = server.good(&["insert", "q", "-5", "--delay", "1h"]);
    let far = server.good(&["insert", "q", "5", "--deliver-at", "2000-01-01T00:00:00Z"]);
    let states = [later, far].map(|id| server.objects(&["task", "q", id.trim_end()])[0]["state"].clone());
    assert_eq!(states, ["scheduled", "ready"]);

    let first = server.good(&["insert", "q", "1", "--unique-key", "k"]);
    let again = server.good(&["insert", "q", "2", "--unique-key", "k"]);
    assert_eq!(again, format!("{}\tduplicate\n", first.trim_end()));
    let again = server.objects(&["insert", "q", "2", "--unique-key", "k"]);
    assert_eq!(again, [json!({"id": first.trim_end(), "duplicate": true})]);

    let first = server.good(&["insert", "q", "1", "--request-id", "r"]);
    assert_eq!(server.good(&["insert", "q", "1", "--request-id", "r"]), first);
    server.run(&["insert", "q", "2", "--request-id", "r"]).refused(1, &["REQUEST_ID_REUSED"]);
    server.run(&["insert", "q", "nonsense"]).refused(1, &["JSON_INVALID", "--data"]);
    server.good(&["insert", "q", "nonsense", "--data"]);
}

#[tokio::test]
async fn insert_takes_lines_and_goes_on_after_one_that_is_refused() {
    let server = Server::start(&[]);
    let ran = server.run_with(&["insert", "q"], b"1\r\n\n{\n\"\xc3\xa9\"\n\xff\n[]");
    assert_eq!((ran.code, ran.stdout.lines().count()), (Some(1), 3), "{ran:?}");
    let said: Vec<_> = ran.stderr.lines().collect();
    assert!(said[0].contains("line 3 was not inserted") && said[0].contains("JSON_INVALID"), "{ran:?}");
    assert!(said[1].contains("line 5 was not inserted") && said[2].contains("2 of 5 lines"), "{ran:?}");
    let values = server.good(&["tasks", "q"]);
    let values: Vec<_> = columns(&values).iter().map(|line| (line[0].to_owned(), line[8].to_owned())).collect();
    let ids: Vec<_> = ran.stdout.lines().collect();
    assert_eq!(values, [(ids[0].into(), "1".into()), (ids[1].into(), "\"é\"".into()), (ids[2].into(), "[]".into())]);

    let many: String = (0..5_000).map(|number| format!("{number}\n")).collect();
    assert_eq!(server.run_with(&["insert", "many"], many.as_bytes()).good().lines().count(), 5_000);
    let listed = server.good(&["tasks", "many", "--all"]);
    assert!(columns(&listed).iter().map(|line| line[8]).eq((0..5_000).map(|number| number.to_string())));

    assert_eq!(server.run_with(&["insert", "b", "--whole", "--data"], b"a\tb\n\\\xff").good().lines().count(), 1);
    assert_eq!(columns(&server.good(&["tasks", "b"]))[0][7..], ["data", "a\\tb\\n\\\\\\xff"]);
    assert_eq!(server.objects(&["tasks", "b"])[0]["data"], "YQliClz/");
    server.run_with(&["insert", "q", "--unique-key", "k"], b"1\n").refused(64, &["--whole"]);
}

#[tokio::test]
async fn pop_gives_a_token_that_ack_takes() {
    let server = Server::start(&[]);
    server.run(&["pop", "q"]).refused_quietly(3);
    server.run_with(&["insert", "q", "--header", "k=v"], b"1\n{\"a\":\t2}\n3\n4\n5\n");
    let popped = server.good(&["pop", "q", "--count", "2", "--lease", "1h"]);
    let lines = columns(&popped);
    assert_eq!(
        lines.iter().map(|line| &line[2..]).collect::<Vec<_>>(),
        [["1", "json", "1"], ["1", "json", "{\"a\": 2}"]]
    );
    let (one, two) = (lines[0][1], lines[1][1]);
    let object = &server.objects(&["pop", "q", "--wait", "1s"])[0];
    assert_eq!((&object["value"], &object["headers"]), (&json!(3), &json!({"k": "v"})));
    assert_eq!((&object["queue"], object["lease_token"].as_str().map(str::len)), (&json!("q"), Some(32)));
    assert!(object["lease_seconds"].as_f64() > Some(29.0), "{object}");

    assert_eq!(server.good(&["ack", "q", one]), "applied\n");
    assert_eq!(server.objects(&["ack", "q", one]), [json!({"outcome": "already_acked"})]);
    let mixed = server.run(&["ack", "q", two, &"0".repeat(32)]);
    assert_eq!((mixed.code, mixed.stdout.as_str()), (Some(1), "applied\nlease_lost\n"));
    assert!(mixed.stderr.contains("1 of 2") && !mixed.stderr.contains("000"), "{mixed:?}");

    let done = server.good(&["pop", "q", "--count", "10", "--ack"]);
    assert_eq!(columns(&done).iter().map(|line| (line[1], line[4])).collect::<Vec<_>>(), [("-", "4"), ("-", "5")]);
    let counts = &server.objects(&["queues", "q"])[0];
    assert_eq!((&counts["acked"], &counts["leased"]), (&json!(4), &json!(1)));
    server.run(&["pop", "q", "--ack"]).refused_quietly(3);
}

/// Also while it waits for more.
#[tokio::test]
async fn pop_acks_each_as_soon_as_it_is_written() {
    let server = Server::start(&[]);
    server.run_with(&["insert", "q"], b"1\n2\n").good();
    let mut pop = server.command(&["pop", "q", "--count", "9", "--wait", "60s", "--ack"]);
    let mut child = pop.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(lines.by_ref().take(2).count(), 2);
    let watch = Watch::queues(["q"]).interval(Duration::from_millis(100));
    let mut told = server.client().admin().watch_queues(watch).await.unwrap();
    let acked = timeout(PATIENCE, async { while told.next().await.unwrap().unwrap()[0].counts.acked < 2 {} });
    acked.await.expect("both are done in time");
    assert!(child.try_wait().unwrap().is_none(), "it waits for more");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[tokio::test]
async fn queues_are_listed_and_one_is_shown_with_what_is_set() {
    let server = Server::start(&[]);
    assert_eq!(server.good(&["queues"]), "");
    server.good(&["insert", "a", "1"]);
    let set = server.good(&[
        "set",
        "b",
        "lease=90s",
        "max-tasks=7",
        "backoff-min=0s",
        "dead-letter-retention=7days",
        "shards=4",
    ]);
    assert!(
        set.contains("lease\t1m 30s\n") && set.contains("max_tasks\t7\n") && set.contains("max_bytes\t-\n"),
        "{set}"
    );
    let listed = server.good(&["queues"]);
    let lines = columns(&listed);
    assert_eq!(lines[0][..7], ["a", "1", "0", "0", "0", "1", "0"]);
    assert_eq!(lines[1], ["b", "0", "0", "0", "0", "0", "0", "-", "no"]);
    assert_eq!(server.objects(&["queues"])[1]["purged"], 0);

    let shown = &server.objects(&["queues", "b"])[0];
    let settings =
        ["lease_seconds", "max_tasks", "backoff_min_seconds", "dead_letter_retention_seconds", "max_failures"];
    assert_eq!(
        settings.map(|name| shown[name].clone()),
        [json!(90.0), json!(7), json!(0.0), json!(604_800.0), Value::Null]
    );
    let unset = &server.objects(&["set", "b", "lease=", "max-tasks="])[0];
    // The names of the fields are the same whatever is in them.
    for object in [unset, shown] {
        let names: Vec<_> =
            object.as_object().unwrap().keys().filter(|name| name.contains("lease") && *name != "leased").collect();
        assert_eq!(names, ["lease_seconds"], "{object}");
    }
    assert_eq!((unset.get("lease_seconds"), unset.get("max_tasks")), (Some(&Value::Null), Some(&Value::Null)));
    assert_eq!(server.objects(&["queues", "b"])[0].get("oldest_seconds"), Some(&Value::Null));

    assert_eq!(server.good(&["pause", "b"]), "b\tpaused\n");
    assert!(server.good(&["queues", "b"]).contains("paused\tyes\n"));
    assert_eq!(server.objects(&["queues"])[1]["paused"], true);
    assert_eq!(server.objects(&["resume", "b"]), [json!({"queue": "b", "outcome": "resumed"})]);
    assert_eq!(server.good(&["pause", "b", "-o", "table"]), "b is paused: nothing is delivered until it is resumed\n");
    let table = server.good(&["queues", "-o", "table"]);
    assert!(table.starts_with("QUEUE  READY  SCHEDULED") && table.lines().count() == 3, "{table}");

    server.run(&["queues", "none"]).refused(1, &["QUEUE_NOT_FOUND"]);
    server.run(&["set", "b", "lease=1ms"]).refused(1, &["SETTING_OUT_OF_RANGE"]);
    for wrong in ["lease", "lease=soon", "colour=red", "paused=yes"] {
        server.run(&["set", "b", wrong]).refused(64, &[wrong]);
    }
}

#[tokio::test]
async fn a_watch_goes_on_until_nobody_reads() {
    let server = Server::start(&[]);
    server.good(&["insert", "a", "1"]);
    for (form, is_line) in [("json", "\"queue\":\"a\",\"ready\":1"), ("plain", "\ta\t1\t0")] {
        let mut watch = server.command(&["queues", "--watch", "--interval", "100ms", "-o", form]);
        let mut child = watch.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        for _ in 0..2 {
            let line = lines.next().unwrap().unwrap();
            assert!(line.contains(is_line), "{line}");
        }
        drop(lines);
        let mut said = String::new();
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert_eq!((child.wait().unwrap().code(), said.as_str()), (Some(0), ""));
    }
    server.run(&["queues", "--interval", "1s"]).refused(64, &["--watch"]);
}

#[tokio::test]
async fn tasks_are_listed_by_state_and_never_with_a_token() {
    let server = Server::start(&[]);
    let client = server.client();
    for number in 1..=5 {
        client.insert("q", NewTask::json_text(number.to_string())).await.unwrap();
    }
    client.insert("q", NewTask::json_text("6").delay(Duration::from_secs(3600))).await.unwrap();
    let held = client.pop("q", Pop::new()).await.unwrap().task.unwrap();
    reject(&client, "q", 1, "bad\taddress").await;
    let values =
        |line: &[&str]| -> Vec<Value> { server.objects(line).iter().map(|task| task["value"].clone()).collect() };
    assert_eq!(values(&["tasks", "q"]), [3, 4, 5]);
    assert_eq!(values(&["tasks", "q", "--limit", "2"]), [3, 4]);
    assert_eq!(values(&["tasks", "q", "--state", "scheduled"]), [6]);
    assert_eq!(values(&["tasks", "q", "--state", "leased", "--all"]), [1]);
    assert_eq!(values(&["dead", "q"]), [2]);

    let dead = server.good(&["dead", "q"]);
    let line = &columns(&dead)[0];
    assert_eq!(
        (line[1..4].to_vec(), line[5..].to_vec()),
        (vec!["rejected", "0", "0"], vec!["bad\\taddress", "json", "2"])
    );
    assert_eq!(server.objects(&["task", "q", line[0]])[0]["error"], "bad\taddress");
    let shown = server.good(&["task", "q", held.id()]);
    assert!(shown.contains("state\tleased\n") && shown.contains("deliveries\t1\n"), "{shown}");
    for line in [&["tasks", "q", "--state", "leased"][..], &["task", "q", held.id()], &["queues", "q"]] {
        let all = server.good(line) + &server.good(&[line, &["-o", "json"]].concat());
        assert!(!all.contains(held.lease_token()) && !all.contains("token"), "{all}");
    }
    server.run(&["task", "q", "00000000-0000-4000-8000-000000000000"]).refused(1, &["TASK_NOT_FOUND"]);
    server.run(&["task", "q", "x"]).refused(1, &["TASK_ID_INVALID"]);
    server.run(&["tasks", "q", "--state", "lost"]).refused(64, &["lost"]);
}

#[tokio::test]
async fn dead_letters_are_redriven_by_id_by_number_or_all() {
    let server = Server::start(&[]);
    let client = server.client();
    for number in 1..=6 {
        client.insert("q", NewTask::json_text(number.to_string())).await.unwrap();
    }
    reject(&client, "q", 6, "no").await;
    let dead = server.good(&["dead", "q"]);
    let ids: Vec<_> = columns(&dead).iter().map(|line| line[0]).collect();
    let strange = "00000000-0000-4000-8000-000000000000";
    let some = server.run(&["redrive", "q", ids[0], strange]);
    assert_eq!((some.code, &some.stdout), (Some(1), &format!("{}\tredriven\n{strange}\tnot_found\n", ids[0])));
    assert!(some.stderr.contains("1 of 2"), "{some:?}");
    assert_eq!(server.good(&["redrive", "q", "--max", "2"]), "q\t2\t0\n");
    server.run(&["redrive", "q", "--all"]).refused(64, &["--yes"]);
    let all = server.objects(&["redrive", "q", "--all", "--yes"]);
    assert_eq!(all, [json!({"queue": "q", "redriven": 3, "duplicates": 0})]);
    assert_eq!(server.good(&["dead", "q"]), "");
    server.run(&["redrive", "q"]).refused(64, &["--all"]);
    server.run(&["redrive", "q", "--all", "--max", "1"]).refused(64, &["--all"]);
    server.run(&["redrive", "q", "--max", "0"]).refused(64, &["--max"]);

    // One whose key another task has by now stays dead.
    client.insert("k", NewTask::json_text("1").unique_key("k")).await.unwrap();
    reject(&client, "k", 1, "no").await;
    client.insert("k", NewTask::json_text("2").unique_key("k")).await.unwrap();
    let kept = server.run(&["redrive", "k", "--all", "--yes"]);
    assert_eq!((kept.code, kept.stdout.as_str()), (Some(1), "k\t0\t1\n"));
    assert!(kept.stderr.contains("unique key"), "{kept:?}");
}

#[tokio::test]
async fn what_cannot_be_undone_needs_a_yes() {
    let server = Server::start(&[]);
    let client = server.client();
    let mut ids = Vec::new();
    for number in 1..=4 {
        ids.push(client.insert("q", NewTask::json_text(number.to_string())).await.unwrap());
    }
    for line in [&["delete", "q", &ids[0]][..], &["purge", "q", "--state", "ready"], &["delete-queue", "q", "--force"]]
    {
        server.run(line).refused(64, &["--yes"]);
    }
    assert_eq!(server.objects(&["queues", "q"])[0]["ready"], 4);

    client.pop("q", Pop::new()).await.unwrap().task.expect("a task");
    let deleted = server.good(&["delete", "q", &ids[0], &ids[1], "--yes"]);
    assert_eq!(deleted, format!("{}\tcancelled\n{}\tdeleted\n", ids[0], ids[1]));
    let gone = server.run(&["delete", "q", &ids[1], "--yes", "-o", "json"]);
    assert_eq!((gone.code, gone.stderr.contains("1 of 1")), (Some(1), true), "{gone:?}");
    assert_eq!(serde_json::from_str::<Value>(&gone.stdout).unwrap(), json!({"id": ids[1], "outcome": "not_found"}));

    assert_eq!(server.good(&["purge", "q", "--state", "ready,scheduled", "--yes"]), "q\t2\n");
    assert_eq!(server.objects(&["purge", "q", "--state", "dead", "--yes"]), [json!({"queue": "q", "purged": 0})]);
    server.run(&["purge", "q", "--yes"]).refused(64, &["--state"]);
    server.run(&["delete-queue", "q", "--yes"]).refused(1, &["QUEUE_NOT_EMPTY"]);
    assert_eq!(server.good(&["delete-queue", "q", "--force", "--yes"]), "q\tdeleted\n");
    server.run(&["delete-queue", "q", "--yes"]).refused(1, &["QUEUE_NOT_FOUND"]);
}

#[tokio::test]
async fn a_reader_that_leaves_is_no_failure() {
    let server = Server::start(&[]);
    let many: String = (0..2_000).map(|number| format!("\"{number:0>100}\"\n")).collect();
    server.run_with(&["insert", "q"], many.as_bytes()).good();
    for line in [
        &["tasks", "q", "--all"][..],
        &["pop", "q", "--count", "1000", "--ack"],
        &["queues"],
        &["top"],
        &["health"],
        &["insert", "r", "--lines", "-"],
        &["man"],
        &["completions", "bash"],
        &["--help"],
        &["help", "insert"],
        &["--version"],
    ] {
        let mut child =
            server.command(line).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let ran = Ran::of(child.wait_with_output().unwrap());
        assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{line:?}");
    }
    // What nobody saw was not acked.
    let counts = &server.objects(&["queues", "q"])[0];
    assert_eq!(counts["acked"], 0);

    let mut child = server.command(&["insert", "r"]);
    let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"1\n2\n3\n").unwrap();
    let ran = Ran::of(child.wait_with_output().unwrap());
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "what is sent is inserted, whoever reads");
    assert_eq!(server.objects(&["queues", "r"])[0]["ready"], 3);
}

#[test]
fn a_server_that_is_away_is_one_line_with_its_address() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = listener.local_addr().unwrap().to_string();
    drop(listener);
    let id = "00000000-0000-4000-8000-000000000000";
    for line in [
        &["insert", "q", "1"][..],
        &["insert", "q"],
        &["pop", "q"],
        &["pop", "q", "--count", "2"],
        &["ack", "q", id],
        &["queues"],
        &["queues", "q"],
        &["queues", "--watch"],
        &["top"],
        &["insert", "q", "--lines", "-"],
        &["set", "q", "lease=1s"],
        &["pause", "q"],
        &["resume", "q"],
        &["tasks", "q"],
        &["task", "q", id],
        &["dead", "q"],
        &["redrive", "q", id],
        &["delete", "q", id, "--yes"],
        &["purge", "q", "--state", "ready", "--yes"],
        &["delete-queue", "q", "--yes"],
    ] {
        let ran = Ran::of(command(&nobody, line).stdin(Stdio::null()).output().unwrap());
        ran.refused(1, &["cannot reach a server at", &nobody, "--addr", "data-queue-server"]);
    }
    let ran = Ran::of(command(&nobody, &["--addr", "no address", "queues"]).output().unwrap());
    ran.refused(64, &["--addr"]);
}

#[test]
fn help_tells_forms_and_exit_codes() {
    let help = Ran::of(command("127.0.0.1:1", &["--help"]).output().unwrap()).good();
    for words in ["Exit codes:", "  3   pop found nothing", "  64  bad usage", "DATA_QUEUE_ADDR", "--yes", "NO_COLOR"] {
        assert!(help.contains(words), "{words}: {help}");
    }
    for verb in ["insert", "pop", "queues", "top", "tasks", "dead", "redrive", "purge", "delete", "health"] {
        let help = Ran::of(command("127.0.0.1:1", &[verb, "--help"]).output().unwrap()).good();
        assert!(help.contains("Columns"), "{verb}: {help}");
    }
}
