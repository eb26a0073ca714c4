//! The server as a program: its flags, its log, what it offers beside the queue.

use std::{collections::BTreeMap, fs, net::TcpListener, os::unix::fs::PermissionsExt, time::Duration};

use data_queue_proto::v1::{NewTask, Outcome, new_task::Value};
use tokio::time::Instant;
use tokio_stream::once;
use tonic::Code;
use tonic_reflection::pb::{v1, v1alpha};

use crate::support::{
    PATIENCE,
    call::{ack, five, heartbeat, insert_json, insert_request, json, pop, pop_request, pop_waiting, proto, putback},
    directory::Directory,
    on_every_store, poll_until,
    server::{Server, run_to_end, run_to_end_behind, run_to_end_in},
    unique_queue, wire_tests,
};

on_every_store! {
    /// The log is JSON if asked for, and even at its most talkative has no value, no header and no token.
    async fn nothing_secret_is_logged(backend) {
        let server = backend.start(&["--log-level", "trace", "--log-format", "json", "--threads", "2"]).await;
        let mut client = server.client().await;
        let queue = unique_queue("log");
        const VALUE: &str = "\"correct horse battery staple\"";
        const HEADER: &str = "hunter2";
        let headers = BTreeMap::from([(HEADER.to_owned(), HEADER.to_owned())]);
        let task = NewTask { value: Some(Value::Json(VALUE.to_owned())), headers, ..NewTask::default() };
        let bad = NewTask { value: Some(Value::Json(format!("{VALUE} x"))), ..NewTask::default() };
        client.insert(insert_request(&queue, vec![task])).await.unwrap();
        client.insert(insert_request(&queue, vec![bad])).await.unwrap_err();
        let first = pop(&mut client, &queue).await.unwrap();
        assert_eq!(putback(&mut client, &queue, &first.lease_token).await, Outcome::Applied);
        let second = pop(&mut client, &queue).await.unwrap();
        assert_eq!(heartbeat(&mut client, &queue, &second.lease_token).await, Outcome::Applied);
        assert_eq!(ack(&mut client, &queue, &second.lease_token).await, Outcome::Applied);
        let mut not_a_token = second.lease_token.to_uppercase();
        not_a_token.push('x');
        client.pop(data_queue_proto::v1::PopRequest { ack_lease_tokens: vec![not_a_token.clone()], ..pop_request(&queue) }).await.unwrap_err();
        server.terminate();
        assert_eq!(server.wait_exit(PATIENCE).code(), Some(0));
        let log = poll_until("the last line of the log", PATIENCE, async || {
            server.log().contains("stopped").then(|| server.log())
        })
        .await;
        for line in log.lines() {
            serde_json::from_str::<serde_json::Value>(line).unwrap_or_else(|error| panic!("{line:?}: {error}"));
        }
        for secret in ["battery staple", HEADER, &first.lease_token, &second.lease_token, &not_a_token] {
            assert!(!log.contains(secret), "{secret:?} in the log:\n{log}");
        }
    }
}

wire_tests! {
    /// `--help` is the reference: each flag with its variable and its default; and it shows no setting's current value.
    async fn help_and_version() {
        let help = run_to_end_in(&[("DATA_QUEUE_STORE", "redis://:swordfish@127.0.0.1:1")], &["--help"]);
        assert_eq!(help.code, Some(0), "{help:?}");
        let flags = [
            ("listen", "127.0.0.1:50051"), ("store", ""), ("data-dir", ""), ("durability", "full"),
            ("disk-reserve", "67108864"), ("key-prefix", "dq"), ("store-timeout", "5s"),
            ("memory-capacity", "1073741824"), ("default-lease", "30s"), ("max-expiries", "20"), ("max-value", "1048576"),
            ("max-message", "4194304"), ("memory-window", "5m"), ("memory-entries", "1000000"), ("threads", ""),
            ("grace", "10s"), ("max-connections", "10000"), ("max-streams", "1024"), ("keepalive-interval", "20s"),
            ("keepalive-timeout", "10s"), ("stall-timeout", "60s"), ("max-stream-age", "30m"), ("no-reflection", ""), ("log-format", "human"), ("log-level", "info"),
        ];
        for (flag, default) in flags {
            let variable = format!("DATA_QUEUE_{}", flag.replace('-', "_").to_uppercase());
            assert!(help.stdout.contains(&format!("--{flag}")), "--{flag}");
            assert!(help.stdout.contains(&variable), "{variable}");
            assert!(default.is_empty() || help.stdout.contains(&format!("[default: {default}]")), "--{flag} {default}");
        }
        assert!(!help.stdout.contains("swordfish"), "{}", help.stdout);
        let version = run_to_end(&["--version"]);
        assert_eq!((version.code, version.stdout.as_str()), (Some(0), "data-queue-server 0.1.0\n"));
    }

    /// The first run: without a flag the tasks are kept in a folder of the user's own, which it tells; the next run has them.
    async fn without_flags_there_is_a_data_folder() {
        let home = Directory::default();
        let state = home.join("state");
        let cases = [
            (vec![("HOME", home.text())], home.join(".local/state/data-queue")),
            (vec![("HOME", home.text()), ("XDG_STATE_HOME", "")], home.join(".local/state/data-queue")),
            (vec![("HOME", home.text()), ("XDG_STATE_HOME", &state)], home.join("state/data-queue")),
            (vec![("HOME", home.text()), ("DATA_QUEUE_DATA_DIR", &state)], state.clone()),
        ];
        for (number, (environment, folder)) in cases.into_iter().enumerate() {
            let server = Server::in_environment(&environment);
            let said = server.said().lines().collect::<Vec<_>>();
            let listening = format!("listening on {}", server.address());
            assert_eq!(said, [format!("data in {folder}"), listening], "{environment:?}");
            let mut client = server.client().await;
            if number != 1 {
                insert_json(&mut client, "q", &["1"]).await;
            }
            assert_eq!(five(&mut client, "q").await, [1, 0, 0, 1, 0], "{environment:?}");
            let mode = |path: &str| fs::metadata(path).expect("it is there").permissions().mode() & 0o777;
            assert_eq!((mode(&folder), mode(&format!("{folder}/data-queue.db"))), (0o700, 0o600));
            server.terminate();
            assert_eq!(server.wait_exit(PATIENCE).code(), Some(0));
        }
        run_to_end(&[]).one_line(64, &["--data-dir", "HOME"]);
        run_to_end_in(&[("HOME", "not/absolute")], &[]).one_line(64, &["--data-dir"]);
    }

    /// A relative path is one of a file wherever SQLite would see something else in its name, and the folder is told in full.
    async fn relative_paths() {
        let directory = Directory::default();
        let inside = ["env", "-C", directory.text()].map(str::to_owned);
        for (place, folder, file) in [
            (["--store", "sqlite:rel.db"], "", "rel.db"),
            (["--store", "sqlite:below/rel.db"], "/below", "below/rel.db"),
            (["--store", "sqlite:file:x"], "", "file:x"),
            (["--store", "sqlite:file::memory:?cache=shared"], "", "file::memory:?cache=shared"),
            (["--data-dir", "data"], "/data", "data/data-queue.db"),
            (["--data-dir", "file:d"], "/file:d", "file:d/data-queue.db"),
        ] {
            for tasks in [1, 2] {
                let server = Server::launch_behind(&inside, &place);
                let said = server.said().lines().next().map(str::to_owned);
                assert_eq!(said, Some(format!("data in {}{folder}", directory.text())));
                let mut client = server.client().await;
                insert_json(&mut client, "q", &["1"]).await;
                assert_eq!(five(&mut client, "q").await, [tasks, 0, 0, tasks, 0], "{place:?}");
                server.terminate();
                assert_eq!(server.wait_exit(PATIENCE).code(), Some(0));
            }
            assert!(fs::metadata(directory.join(file)).unwrap().is_file(), "{file}");
        }
        let copy = run_to_end_behind(&inside, &["--store", "sqlite:rel.db", "backup", "file:copy"]);
        assert!(copy.ok().contains(&directory.join("file:copy")), "{copy:?}");
        let back = run_to_end_behind(&inside, &["--store", "sqlite:file:back", "restore", "file:copy"]);
        assert!(back.ok().contains(&directory.join("file:back")), "{back:?}");
        run_to_end_behind(&inside, &["--store", "sqlite:file:back", "check"]).ok();
    }

    /// Of --store and --data-dir, the flag counts if the other is in the environment. Where they are in the same place,
    /// neither does.
    async fn store_and_data_dir() {
        let directory = Directory::default();
        let (dir, other) = (directory.join("dir"), directory.join("other"));
        let (in_dir, in_other) = (format!("sqlite:{dir}/x.db"), format!("sqlite:{other}/x.db"));
        for (environment, flags, place) in [
            (&[("DATA_QUEUE_STORE", in_other.as_str())][..], &["--data-dir", &dir][..], &dir),
            (&[("DATA_QUEUE_STORE", "memory")], &["--data-dir", &dir], &dir),
            (&[("DATA_QUEUE_DATA_DIR", &other)], &["--store", &in_dir], &dir),
            (&[("DATA_QUEUE_DATA_DIR", &other), ("DATA_QUEUE_STORE", "memory")], &["--store", &in_dir], &dir),
            (&[("DATA_QUEUE_DATA_DIR", &other), ("DATA_QUEUE_STORE", "")], &[], &other),
            (&[("DATA_QUEUE_DATA_DIR", ""), ("DATA_QUEUE_STORE", &in_other)], &[], &other),
        ] {
            // Nothing is there; the refusal tells where it was looked for.
            for words in [[flags, &["check"]].concat(), [&["check"], flags].concat()] {
                run_to_end_in(environment, &words).one_line(1, &[place]);
            }
        }
        let both = [("DATA_QUEUE_STORE", "memory"), ("DATA_QUEUE_DATA_DIR", dir.as_str())];
        run_to_end_in(&both, &[]).one_line(64, &["--store", "--data-dir"]);
        run_to_end(&["--store", "memory", "--data-dir", &dir]).one_line(64, &["--store", "--data-dir"]);
        run_to_end(&["--store", &in_dir, "check", "--data-dir", &dir]).one_line(64, &["--store", "--data-dir"]);
    }

    /// Settings come from the environment too, and the command line wins.
    async fn settings_come_from_the_environment() {
        let taken = || TcpListener::bind("127.0.0.1:0").unwrap();
        let (one, other) = (taken(), taken());
        let [one, other] = [&one, &other].map(|socket| socket.local_addr().unwrap().to_string());
        let environment = [("DATA_QUEUE_STORE", "memory"), ("DATA_QUEUE_LISTEN", one.as_str())];
        let ended = run_to_end_in(&environment, &[]);
        assert!(ended.code == Some(1) && ended.stderr.contains(&one), "{ended:?}");
        let ended = run_to_end_in(&environment, &["--listen", &other]);
        assert!(ended.code == Some(1) && ended.stderr.contains(&other), "{ended:?}");
        let empty = [("DATA_QUEUE_STORE", "memory"), ("DATA_QUEUE_LISTEN", one.as_str()), ("DATA_QUEUE_GRACE", "")];
        let ended = run_to_end_in(&empty, &[]);
        assert!(ended.code == Some(1) && ended.stderr.contains(&one), "an empty variable is none: {ended:?}");
        let ended = run_to_end_in(&[("DATA_QUEUE_GRACE", "soon"), ("DATA_QUEUE_STORE", "memory")], &[]);
        assert!(ended.code == Some(64) && ended.stderr.contains("--grace"), "{ended:?}");
    }

    /// Beyond loopback there is a warning, and on loopback there is none.
    async fn a_warning_beyond_loopback() {
        let open = Server::launch("memory", &["--listen", "0.0.0.0:0"], None);
        assert!(open.log().contains("WARN") && open.log().contains("beyond this machine"), "{}", open.log());
        let local = Server::launch("memory", &[], None);
        local.ready().await;
        assert!(!local.log().contains("beyond this machine"), "{}", local.log());
        assert!(local.log().contains("in memory only"), "{}", local.log());
    }

    /// SIGINT stops the server as SIGTERM does.
    async fn an_interrupt_stops_it() {
        let server = Server::launch("memory", &[], None);
        server.ready().await;
        server.signal("INT");
        assert_eq!(server.wait_exit(PATIENCE).code(), Some(0));
    }

    /// G15: connections are spread over threads, and a pop that waits on one is woken by an insert on any other.
    async fn a_pop_is_woken_by_an_insert_on_another_thread() {
        let server = Server::launch("memory", &["--threads", "3"], None);
        let queue = unique_queue("threads");
        let mut took = Vec::new();
        for _ in 0..30 {
            let (mut waiting, mut inserting) = (server.client().await, server.client().await);
            let waits = tokio::spawn({
                let queue = queue.clone();
                async move { pop_waiting(&mut waiting, &queue).await }
            });
            tokio::task::yield_now().await;
            let began = Instant::now();
            insert_json(&mut inserting, &queue, &["1"]).await;
            let task = waits.await.unwrap();
            took.push(began.elapsed());
            assert_eq!(ack(&mut inserting, &queue, &task.lease_token).await, Outcome::Applied);
        }
        // The safety look comes half a second after the pop at the earliest.
        took.sort();
        assert!(took[took.len() / 2] < Duration::from_millis(400), "{took:?}");
    }

    /// Reflection, by which grpcurl learns the calls and the details of errors, in both of its versions; or not at all.
    async fn reflection() {
        let server = Server::launch("memory", &[], None);
        let own = ["dataqueue.v1.DataQueue", "dataqueue.v1.QueueAdmin", "grpc.health.v1.Health"];
        for services in [services_v1(&server).await, services_v1alpha(&server).await] {
            assert!(own.iter().all(|service| services.iter().any(|listed| listed == service)), "{services:?}");
        }
        for symbol in own.into_iter().chain(["google.rpc.ErrorInfo"]) {
            assert!(knows_v1(&server, symbol).await.unwrap(), "{symbol}");
            assert!(knows_v1alpha(&server, symbol).await.unwrap(), "{symbol}");
        }
        assert!(!knows_v1(&server, "dataqueue.v1.Nothing").await.unwrap());
        let silent = Server::launch("memory", &["--no-reflection"], None);
        assert_eq!(knows_v1(&silent, "dataqueue.v1.DataQueue").await, Err(Code::Unimplemented));
        assert_eq!(knows_v1alpha(&silent, "dataqueue.v1.DataQueue").await, Err(Code::Unimplemented));
        let answer = silent.client().await.insert(insert_request("any", vec![json("1")])).await;
        assert_eq!(answer.unwrap().into_inner().results.len(), 1);
    }

    /// A lease that a pop does not name is the server's default, and a heartbeat's too.
    async fn the_default_lease_is_a_setting() {
        let server = Server::launch("memory", &["--default-lease", "77s"], None);
        let mut client = server.client().await;
        insert_json(&mut client, "q", &["1"]).await;
        let task = pop(&mut client, "q").await.unwrap();
        assert_eq!(task.lease, Some(proto(Duration::from_secs(77))));
    }
}

macro_rules! reflection {
    ($knows:ident, $services:ident, $ask:ident, $version:ident) => {
        /// The answer of reflection.
        async fn $ask(
            server: &Server,
            ask: $version::server_reflection_request::MessageRequest,
        ) -> Result<Option<$version::server_reflection_response::MessageResponse>, Code> {
            use $version::{ServerReflectionRequest, server_reflection_client::ServerReflectionClient};
            let ask = ServerReflectionRequest { host: String::new(), message_request: Some(ask) };
            let mut client = ServerReflectionClient::new(server.channel().await);
            let answers = client.server_reflection_info(once(ask)).await.map_err(|status| status.code());
            let answer = answers?.into_inner().message().await.map_err(|status| status.code())?;
            Ok(answer.and_then(|answer| answer.message_response))
        }

        /// Whether reflection has a file for a symbol.
        async fn $knows(server: &Server, symbol: &str) -> Result<bool, Code> {
            use $version::{server_reflection_request::MessageRequest, server_reflection_response::MessageResponse};
            match $ask(server, MessageRequest::FileContainingSymbol(symbol.to_owned())).await {
                Ok(answer) => Ok(matches!(answer, Some(MessageResponse::FileDescriptorResponse(_)))),
                Err(Code::NotFound) => Ok(false),
                Err(code) => Err(code),
            }
        }

        /// The services that reflection lists.
        async fn $services(server: &Server) -> Vec<String> {
            use $version::{server_reflection_request::MessageRequest, server_reflection_response::MessageResponse};
            match $ask(server, MessageRequest::ListServices(String::new())).await {
                Ok(Some(MessageResponse::ListServicesResponse(list))) => {
                    list.service.into_iter().map(|service| service.name).collect()
                }
                other => panic!("no list of services: {other:?}"),
            }
        }
    };
}

reflection!(knows_v1, services_v1, ask_v1, v1);
reflection!(knows_v1alpha, services_v1alpha, ask_v1alpha, v1alpha);
