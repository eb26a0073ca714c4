//! Facts about the server: its store, what OK survives, its limits.

use std::{sync::Arc, time::Duration};

use data_queue_proto::reason;
use data_queue_proto::v1::{GetServerInfoRequest, GetServerInfoResponse, ListQueuesRequest, ServerLimits, Survival};
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;

use super::{HOUR, SERVICE};
use crate::support::{
    call::{duration, proto},
    on_every_store,
    redis::{Options, Persistence, Redis},
    server::{Backend, Client, Server},
    status::Refusal,
    wire_tests,
};

async fn info(client: &mut Client) -> GetServerInfoResponse {
    client.admin.get_server_info(GetServerInfoRequest {}).await.expect("facts about the server").into_inner()
}
on_every_store! {
    /// What the server is and what it is set to; what OK survives is the least that the store keeps.
    async fn facts_about_the_server(backend) {
        let flags = [
            "--max-value", "54321", "--max-message", "765432", "--default-lease", "41s", "--max-expiries", "7",
            "--memory-window", "90s", "--memory-entries", "1234", "--max-failures", "9", "--backoff-min", "3s",
            "--backoff-max", "5m",
        ];
        let server = backend.start(&flags).await;
        let facts = info(&mut server.client().await).await;
        let limits = ServerLimits {
            max_value_bytes: 54_321,
            max_message_bytes: 765_432,
            max_batch: 1_000,
            max_pop_batch: 10_000,
            default_lease: Some(proto(Duration::from_secs(41))),
            min_lease: Some(proto(Duration::from_millis(100))),
            max_lease: Some(proto(12 * HOUR)),
            max_wait: Some(proto(Duration::from_secs(60))),
            max_expiries: 7,
            memory_window: Some(proto(Duration::from_secs(90))),
            memory_entries: 1_234,
            max_failures: 9,
            backoff_min: Some(proto(Duration::from_secs(3))),
            backoff_max: Some(proto(Duration::from_secs(300))),
            max_delay: Some(proto(366 * 24 * HOUR)),
        };
        assert_eq!(facts.limits, Some(limits));
        assert_eq!(facts.version, "0.1.0");
        let (store, survives) = match backend {
            Backend::Memory => ("memory".to_owned(), Survival::Nothing),
            Backend::Redis => {
                (format!("Redis {}", server.redis().info("redis_version").unwrap()), Survival::ServerKill)
            }
            Backend::Sqlite => ("SQLite 3.".to_owned(), Survival::PowerCut),
        };
        assert_eq!(facts.survives, survives as i32);
        assert!(facts.store.starts_with(&store), "{}", facts.store);
        assert!(!facts.survives_note.is_empty());
    }

    /// The defaults, as README and the proto tell them.
    async fn default_limits(backend) {
        let server = backend.start(&[]).await;
        let limits = info(&mut server.client().await).await.limits.unwrap();
        assert_eq!((limits.max_value_bytes, limits.max_message_bytes), (1 << 20, 4 << 20));
        assert_eq!((limits.max_expiries, limits.memory_entries), (20, 1_000_000));
        let times = [limits.default_lease, limits.memory_window].map(duration);
        assert_eq!(times, [Duration::from_secs(30), Duration::from_secs(300)]);
    }
}

wire_tests! {
    /// What OK survives in a file is what was asked for.
    async fn what_survives_in_a_file() {
        for (durability, survives) in [
            ("full", Survival::PowerCut), ("normal", Survival::ServerKill), ("memory", Survival::ServerKill),
        ] {
            let server = Server::on_sqlite_with(&["--durability", durability]);
            let facts = info(&mut server.client().await).await;
            assert_eq!(facts.survives, survives as i32, "{durability}");
            assert!(facts.survives_note.contains(&format!("--durability {durability}")), "{}", facts.survives_note);
        }
    }

    /// What OK survives on Redis is what its settings say.
    async fn what_survives_on_redis() {
        const NOT_ON_REWRITE: [&str; 2] = ["--no-appendfsync-on-rewrite", "yes"];
        for (persistence, extra, survives, words) in [
            (Persistence::None, &[][..], Survival::ServerKill, "no append-only file"),
            (Persistence::EverySecond, &[], Survival::ServerKill, "every second"),
            (Persistence::Always, &[], Survival::PowerCut, "always"),
            (Persistence::Always, &NOT_ON_REWRITE, Survival::ServerKill, "rewritten"),
        ] {
            let extra = extra.iter().map(|word| (*word).to_owned()).collect();
            let server = Server::on_redis_with(Options { persistence, extra, ..Options::default() }, &[]);
            server.ready().await;
            let facts = info(&mut server.client().await).await;
            let version = server.redis().info("redis_version").unwrap();
            assert_eq!((facts.store, facts.survives), (format!("Redis {version}"), survives as i32), "{persistence:?}");
            assert!(facts.survives_note.contains(words), "{persistence:?}: {}", facts.survives_note);
        }
    }

    /// While Redis is away the server still says what it is; of Redis it claims the least as long as it has not seen it.
    async fn facts_while_redis_is_down() {
        let redis = Arc::new(Redis::with(Options { persistence: Persistence::Always, ..Options::default() }));
        redis.kill();
        let server = Server::on(Arc::clone(&redis), &["--max-expiries", "3"]);
        assert_eq!(server.health(SERVICE).await, ServingStatus::NotServing);
        let mut client = server.client().await;
        let facts = info(&mut client).await;
        assert_eq!((facts.store.as_str(), facts.survives), ("Redis", Survival::ServerKill as i32));
        assert!(facts.survives_note.contains("as far as is known"), "{}", facts.survives_note);
        assert_eq!(facts.limits.unwrap().max_expiries, 3);

        redis.restart();
        server.ready().await;
        let known = info(&mut client).await;
        assert_eq!((known.store.starts_with("Redis "), known.survives), (true, Survival::PowerCut as i32));
        redis.kill();
        let answer = client.admin.list_queues(ListQueuesRequest::default()).await;
        Refusal::of(Code::Unavailable, reason::STORE_UNAVAILABLE).check("ListQueues", answer);
        assert_eq!(info(&mut client).await, known);
    }
}
