//! What `data-queue` tells of itself, and what becomes of it where nobody reads and nothing can be written.

use std::{
    fs::{self, OpenOptions},
    io::Write,
    process::{Command, Stdio},
};

use crate::server::{Ran, Server, command};

/// All of them, as --help has them.
fn verbs() -> Vec<String> {
    let help = run(&["--help"]).good();
    let list = help.split_once("Commands:\n").unwrap().1.split_once("\n\n").unwrap().0;
    let verbs = list.lines().filter(|line| !line.starts_with("   ")).filter_map(|line| line.split_whitespace().next());
    verbs.filter(|verb| *verb != "help").map(str::to_owned).collect()
}

fn run(line: &[&str]) -> Ran {
    Ran::of(command("127.0.0.1:1", line).stdin(Stdio::null()).output().unwrap())
}

/// The options of a help text, each with what is said of it.
fn options(help: &str) -> Vec<(String, String)> {
    let mut options: Vec<(String, String)> = Vec::new();
    for line in help.split_once("\nOptions:\n").unwrap().1.lines() {
        match line.trim_start() {
            text if line.starts_with("  ") && !line.starts_with("       ") && text.starts_with('-') => {
                options.push((text.to_owned(), String::new()));
            }
            text if line.starts_with("       ") => {
                let told = &mut options.last_mut().unwrap().1;
                *told = format!("{told} {text}");
            }
            "" => {}
            // What follows the options.
            _ => break,
        }
    }
    options
}

#[test]
fn help_of_every_verb_fits_and_says_something_of_every_flag() {
    let verbs = verbs();
    assert!(verbs.len() >= 19 && verbs.contains(&"delete-queue".to_owned()), "{verbs:?}");
    for verb in &verbs {
        for flag in ["-h", "--help"] {
            let help = run(&[verb, flag]).good();
            let wide: Vec<_> = help.lines().filter(|line| line.chars().count() > 100).collect();
            assert!(wide.is_empty(), "{verb} {flag}: {wide:?}");
        }
        let help = run(&[verb, "--help"]).good();
        let options = options(&help);
        assert!(options.len() >= 3, "{verb}: {help}");
        for (option, told) in options {
            assert!(told.len() > 10, "{verb} {option}: {told:?}");
            // Of a number or a length of time: what it may be, and what it is if it is not given.
            let is_number = ["<N>", "<BYTES>", "<TASKS>", "<DURATION>"].iter().any(|name| option.ends_with(name));
            let range = told.split(" [default: ").next().unwrap();
            assert!(!is_number || range.bytes().any(|byte| byte.is_ascii_digit()), "{verb} {option}: {told:?}");
        }
    }
}

#[test]
fn help_names_ranges_and_defaults() {
    for (verb, flag, words) in [
        ("insert", "--lines", &["each line", "- is stdin"][..]),
        ("insert", "--tasks", &["object"]),
        ("insert", "--from-line", &["1 or more", "[default: 1]"]),
        ("insert", "--retry-for", &["0s to 4m", "[default: 1m]"]),
        ("insert", "--priority", &["0 to 9", "[default: 0]"]),
        ("insert", "--delay", &["366 days"]),
        ("insert", "--ttl", &["366 days", "[default: never]"]),
        ("queues", "--interval", &["100ms to 1m", "[default: 1s]"]),
        ("top", "--interval", &["100ms to 1m", "[default: 1s]"]),
        ("top", "--count", &["1 or more", "[default: go on]"]),
        ("top", "--sort", &["name", "oldest", "[default: ready]"]),
        ("health", "--timeout", &["100ms to 1m", "[default: 5s]"]),
        ("man", "--dir", &["each verb"]),
        ("copy", "--wait", &["0s to 12h", "[default: 1m]"]),
        ("bench", "--callers", &["[default: 16]"]),
        ("bench", "--lease", &["100ms to 12h", "[default: 10m]"]),
    ] {
        let help = run(&[verb, "--help"]).good();
        let options = options(&help);
        let (_, told) = options.iter().find(|(option, _)| option.contains(flag)).expect(flag);
        for words in words {
            assert!(told.contains(words), "{verb} {flag}: {words}: {told}");
        }
    }
    let all = run(&["insert", "--help"]).good();
    for words in ["unique_key", "deliver_at", "base64", "next_line"] {
        assert!(all.contains(words), "{words}: {all}");
    }
}

#[test]
fn completions_know_every_verb_and_flag() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = run(&["completions", shell]).good();
        for word in verbs().iter().map(String::as_str).chain(["from-line", "retry-for", "addr"]) {
            assert!(script.contains(word), "{shell}: {word}");
        }
    }
    let mut bash = Command::new("bash").arg("-n").stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    bash.stdin.take().unwrap().write_all(run(&["completions", "bash"]).good().as_bytes()).unwrap();
    assert!(bash.wait().unwrap().success());
    run(&["completions", "cmd"]).refused(64, &["cmd", "bash"]);
}

#[test]
fn there_is_a_page_of_the_manual_for_every_verb() {
    let dir = tempfile::tempdir().unwrap();
    let man1 = dir.path().join("share/man1");
    assert_eq!(run(&["man", "--dir", man1.to_str().unwrap()]).good(), "");
    let mut names: Vec<_> =
        fs::read_dir(&man1).unwrap().map(|page| page.unwrap().file_name().into_string().unwrap()).collect();
    let mut expected: Vec<_> = verbs().iter().map(|verb| format!("data-queue-{verb}.1")).collect();
    expected.push("data-queue.1".to_owned());
    names.sort();
    expected.sort();
    assert_eq!(names, expected);
    for verb in verbs() {
        let page = run(&["man", &verb]).good();
        assert_eq!(fs::read_to_string(man1.join(format!("data-queue-{verb}.1"))).unwrap(), page);
        assert!(page.contains(".SH SYNOPSIS") && page.contains("\\-\\-addr"), "{verb}: {page}");
    }
    assert!(run(&["man"]).good().contains("Exit codes"));
    run(&["man", "none"]).refused(64, &["none"]);
    run(&["man", "--dir", "/dev/null/x"]).refused(1, &["cannot write to /dev/null/x"]);
}

/// One line says it, and nothing that was not told is acked.
#[test]
fn a_disk_that_is_full_is_one_line() {
    let server = Server::start(&[]);
    for number in 1..=3 {
        server.good(&["insert", "q", &number.to_string()]);
    }
    let id = server.good(&["tasks", "q", "--limit", "1", "-o", "plain"]);
    let id = id.split('\t').next().unwrap();
    for line in [
        &["insert", "r", "1"][..],
        &["insert", "r", "--lines", "/dev/null"],
        &["pop", "q", "--ack"],
        &["queues"],
        &["queues", "q"],
        &["queues", "--watch"],
        &["top"],
        &["tasks", "q"],
        &["task", "q", id],
        &["set", "q", "lease=1m"],
        &["health"],
        &["man"],
        &["completions", "fish"],
        &["--help"],
        &["help", "top"],
        &["--version"],
    ] {
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let output = server.command(line).stdin(Stdio::null()).stdout(full).stderr(Stdio::piped()).output().unwrap();
        Ran::of(output).refused(1, &["cannot write to stdout: No space left on device"]);
    }
    assert_eq!(server.objects(&["queues", "q"])[0]["acked"], 0);

    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut child = server.command(&["insert", "r"]);
    let mut child = child.stdin(Stdio::piped()).stdout(full).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"2\n3\n4\n").unwrap();
    let ran = Ran::of(child.wait_with_output().unwrap());
    ran.refused(1, &["cannot write to stdout: No space left on device", "from line 1 on"]);
    assert_eq!(server.objects(&["queues", "r"])[0]["ready"], 4, "what is sent is inserted");
}
