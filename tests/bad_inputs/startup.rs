//! Settings that cannot work, and Redis servers that must not be used.

use std::{net::TcpListener, sync::Arc};

use data_queue_proto::reason;
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::support::{
    PATIENCE,
    call::{Call, insert_json, insert_request, json, pop, pop_request},
    poll_until,
    redis::{Options, Redis, Reply},
    server::{Server, run_to_end},
    status::{Details, Refusal},
    unique_queue, wire_tests,
};

const SERVICES: [&str; 3] = ["", "dataqueue.v1.DataQueue", "dataqueue.v1.QueueAdmin"];
const PASSWORD: &str = "correct-horse-battery";
const WRONG: &str = "wrong-staple-9271";

/// Up, healthy to nobody, and every call hears why.
async fn up_and_not_ready(server: &Server, why: &[&str]) {
    let mut client = server.client().await;
    for service in SERVICES {
        assert_eq!(server.health(service).await, ServingStatus::NotServing, "{service:?}");
    }
    for call in Call::every_at_all(&unique_queue("unready")) {
        let case = format!("{call:?}");
        let answer = call.send(&mut client).await;
        let status = Refusal::of(Code::Unavailable, reason::STORE_UNAVAILABLE).check(&case, answer);
        assert!(status.retry_delay().is_some(), "{case}: no RetryInfo in {status:?}");
    }
    // The first calls may be answered before the server knows more than that it has no connection.
    poll_until(&format!("a refusal that says {why:?}"), PATIENCE, async || {
        let status = client.pop(pop_request("any")).await.expect_err("an unfit store");
        why.iter().all(|word| status.message().contains(word)).then_some(())
    })
    .await;
}

async fn becomes_ready(server: &Server) {
    server.ready().await;
    for service in SERVICES {
        assert_eq!(server.health(service).await, ServingStatus::Serving, "{service:?}");
    }
    let mut client = server.client().await;
    let queue = unique_queue("ready");
    insert_json(&mut client, &queue, &["1"]).await;
    assert!(pop(&mut client, &queue).await.is_some());
}

wire_tests! {
    /// Row 47: flags that mean nothing end the server with code 64 and one line: what, where, what would be right.
    async fn row_47_bad_flag() {
        for (flags, words) in [
            (&["--nope"][..], &["--nope"][..]),
            (&["--listen", "nowhere"], &["--listen", "nowhere"]),
            (&["--listen", "127.0.0.1:99999"], &["--listen", "99999"]),
            (&["--threads", "many"], &["--threads", "many"]),
            (&["--threads", "0"], &["--threads"]),
            (&["--grace", "soon"], &["--grace", "soon"]),
            (&["--store", "memory", "--listen", "127.0.0.1:0", "--grace", "500000000000years"], &["--grace"]),
            (&["--store-timeout", "500000000000years"], &["--store-timeout"]),
            (&["--keepalive-interval", "500000000000years"], &["--keepalive-interval"]),
            (&["--store-timeout=-1s"], &["--store-timeout"]),
            (&["--store-timeout", "-1s"], &["-1"]),
            (&["--stall-timeout", "999ms"], &["--stall-timeout"]),
            (&["--default-lease", "13h"], &["--default-lease"]),
            (&["--default-lease", "1ms"], &["--default-lease"]),
            (&["--max-expiries", "0"], &["--max-expiries"]),
            (&["--max-expiries", "often"], &["--max-expiries", "often"]),
            (&["--max-value", "lots"], &["--max-value", "lots"]),
            (&["--durability", "eternal"], &["--durability", "eternal"]),
            (&["--disk-reserve", "lots"], &["--disk-reserve", "lots"]),
            (&["--disk-reserve", "0"], &["--disk-reserve"]),
            (&["--disk-reserve", "8388607"], &["--disk-reserve", "8388608"]),
            (&["--store", "memory", "--data-dir", "/proc/data-queue"], &["--store", "--data-dir"]),
            (&["--data-dir", "/proc/data-queue", "check", "--store", "sqlite:/proc/data-queue.db"], &["--store"]),
            (&["--data-dir", ""], &["--data-dir"]),
            (&["--data-dir"], &["--data-dir"]),
            (&["backup"], &["FILE"]),
            (&["restore"], &["FILE"]),
            (&["--log-format", "xml"], &["--log-format", "xml"]),
            (&["--listen"], &["--listen"]),
            (&["stray"], &["stray"]),
        ] {
            run_to_end(flags).one_line(64, words);
        }
    }

    /// Row 47: a store that is no store.
    async fn row_47_bad_store_url() {
        for url in [
            "redis://", "redis://host:port", "redis://127.0.0.1:99999", "http://127.0.0.1:6379", "redis", "nowhere", "",
            "memory://", "redis://127.0.0.1:6379/x", "sqlite", "sqlite:", "sqlite:/", "sqlite:folder/",
        ] {
            run_to_end(&["--listen", "127.0.0.1:0", "--store", url]).one_line(64, &["--store"]);
        }
    }

    /// Row 47: whatever is wrong with a command line that has a password in it, the answer does not repeat it.
    async fn row_47_bad_usage_repeats_no_password() {
        let address = |rest: &str| format!("redis://ada:{PASSWORD}@{rest}");
        let (good, bad) = (address("127.0.0.1"), address("127.0.0.1:port"));
        for flags in [
            &[good.as_str()][..],
            &["--store", "memory", &good],
            &["--store", &bad],
            &["--store", &format!("redis://:{PASSWORD}@127.0.0.1:port")],
            &["--store", &format!("redisx://:{PASSWORD}@127.0.0.1")],
            &["--listen", &good],
            &["--key-prefix", &good, "--store", "memory"],
            &[&format!("--stroe={good}")],
            &["--stroe", &good],
        ] {
            let ended = run_to_end(flags);
            ended.one_line(64, &[]);
            assert!(!format!("{ended:?}").contains(PASSWORD), "{flags:?}: {ended:?}");
        }
    }

    /// Row 47: the port is taken: code 1 and one line that names it.
    async fn row_47_port_taken() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap().to_string();
        run_to_end(&["--listen", &address, "--store", "memory"]).one_line(1, &[&address]);
    }

    /// Row 47: a wrong Redis password: up, not ready, one log line, which does not tell the password.
    async fn row_47_wrong_redis_password() {
        let options = Options { requirepass: Some(PASSWORD.to_owned()), ..Options::default() };
        let redis = Redis::with(options);
        let url = format!("redis://:{WRONG}@127.0.0.1:{}", redis.port());
        let server = Server::launch(&url, &[], None);
        up_and_not_ready(&server, &[]).await;
        for _ in 0..30 {
            let answer = server.client().await.insert(insert_request("any", vec![json("1")])).await;
            Refusal::of(Code::Unavailable, reason::STORE_UNAVAILABLE).check("an insert", answer);
        }
        let about = poll_until("a log line about the password", PATIENCE, async || {
            let log = server.log().to_lowercase();
            let about = ["wrongpass", "password", "authentic"];
            let lines = log.lines().filter(|line| about.iter().any(|word| line.contains(word))).count();
            (lines > 0).then_some(lines)
        })
        .await;
        assert_eq!(about, 1, "not one line:\n{}", server.log());
        assert!(server.log().lines().count() < 15, "a flood:\n{}", server.log());
        assert!(!server.log().contains(WRONG), "the password is in the log:\n{}", server.log());

        redis.config_set("requirepass", WRONG);
        becomes_ready(&server).await;
        assert!(!server.log().contains(WRONG), "the password is in the log:\n{}", server.log());
    }

    /// Row 48: Redis that may evict tasks is not used until it may not.
    async fn row_48_redis_that_evicts() {
        let options = Options { maxmemory_policy: Some("allkeys-lru".to_owned()), ..Options::default() };
        let server = Server::on_redis_with(options, &[]);
        up_and_not_ready(&server, &["maxmemory-policy", "noeviction"]).await;
        assert!(server.log().contains("maxmemory-policy"), "{}", server.log());
        server.redis().config_set("maxmemory-policy", "noeviction");
        becomes_ready(&server).await;
    }

    /// Row 48: a read-only replica is not used until it is a primary.
    async fn row_48_read_only_replica() {
        let extra = ["--replicaof", "127.0.0.1", "1"].map(str::to_owned).to_vec();
        let server = Server::on_redis_with(Options { extra, ..Options::default() }, &[]);
        up_and_not_ready(&server, &["replica"]).await;
        assert!(server.log().contains("replica"), "{}", server.log());
        server.redis().command(&["REPLICAOF", "NO", "ONE"]);
        becomes_ready(&server).await;
    }

    /// Row 48: data of a newer layout is left alone.
    async fn row_48_newer_layout() {
        let redis = Arc::new(Redis::start());
        redis.command(&["SET", "dq:format", "999"]);
        let server = Server::on(Arc::clone(&redis), &[]);
        up_and_not_ready(&server, &["layout", "999"]).await;
        assert_eq!(redis.dbsize(), 1);
        redis.flush();
        becomes_ready(&server).await;
    }

    /// Data of an earlier layout are used, and are of the present one from then on, so that earlier servers stay away.
    async fn an_earlier_layout_is_brought_up_to_date() {
        let redis = Arc::new(Redis::start());
        for earlier in ["2", "3"] {
            redis.command(&["SET", "dq:format", earlier]);
            let server = Server::on(Arc::clone(&redis), &[]);
            becomes_ready(&server).await;
            assert_eq!(redis.command(&["GET", "dq:format"]), Reply::Bytes(b"4".to_vec()));
        }
        // A full one can be drained.
        redis.command(&["SET", "dq:format", "2"]);
        redis.config_set("maxmemory", "1");
        let server = Server::on(Arc::clone(&redis), &[]);
        server.ready().await;
        drop(server);
        redis.config_set("maxmemory", "0");
        redis.command(&["SET", "dq:format", "1"]);
        up_and_not_ready(&Server::on(redis, &[]), &["layout", "1"]).await;
    }

    /// Row 48: a Redis that begins to evict while it is used is noticed.
    async fn row_48_redis_begins_to_evict() {
        let redis = Arc::new(Redis::start());
        let server = Server::on(Arc::clone(&redis), &[]);
        server.ready().await;
        redis.config_set("maxmemory-policy", "allkeys-random");
        // A new connection is when the server looks again.
        redis.client_kill();
        poll_until("the server to be unready", PATIENCE, async || {
            (server.health("").await == ServingStatus::NotServing).then_some(())
        })
        .await;
        redis.config_set("maxmemory-policy", "noeviction");
        becomes_ready(&server).await;
    }
}
