//! What only the store on Redis can promise or break.

mod gathered;
mod rare;
mod spread;

use std::{
    env,
    process::Command,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use super::{
    engines::{OnRedis, TIMEOUT, config_of},
    support::redis::{BINARY_VARIABLE, Options, Redis, Reply},
    *,
};
use crate::store::redis::{RedisConfig, RedisShared, RedisStore};

fn connected(redis: &Arc<Redis>) -> Rig {
    Rig::new(OnRedis::connect(redis, RULES))
}

/// Every script is loaded again when Redis forgot it, at any time.
#[tokio::test]
async fn scripts_survive_a_flush_of_the_scripts() {
    let redis = Arc::new(Redis::start());
    let (rig, q) = (connected(&redis), queue("q"));
    let forget = || redis.script_flush();
    for _ in 0..2 {
        forget();
        rig.insert_numbers(&q, 0..4).await;
        forget();
        let held = tokens(&rig.take(&q, 3).await);
        forget();
        assert_eq!(rig.beat_one(&q, held[0], LEASE).await, Outcome::Applied);
        forget();
        assert_eq!(rig.ack_one(&q, held[0]).await, Outcome::Applied);
        forget();
        assert_eq!(rig.put_back(&q, &held[1..2]).await, [Outcome::Applied]);
        forget();
        assert_eq!(rig.held_released(&q, 0).await, 1);
        forget();
        assert_eq!(rig.look(std::slice::from_ref(&q)).await.unwrap()[0].ready, 3);
        forget();
        assert_eq!(rig.counted(&q).await.ready, 3);
        let rest = tokens(&rig.take(&q, 3).await);
        assert_eq!(rig.ack(&q, &rest).await.unwrap(), [Outcome::Applied; 3]);
    }
}

/// G13: also when the scripts of the steps that drain have to be loaded first, and for every check of the connection.
#[tokio::test]
async fn full_and_without_scripts_it_drains() {
    let redis = Arc::new(Redis::start());
    let rig = connected(&redis);
    rig.check().await.unwrap();
    let q = queue("q");
    rig.insert_numbers(&q, 0..3).await;
    rig.engine.fill().await;
    rig.check().await.unwrap();
    redis.script_flush();
    let leased = rig.take(&q, 3).await;
    assert_eq!(numbers(&leased), [0, 1, 2]);
    redis.script_flush();
    assert_eq!(rig.put_back(&q, &tokens(&leased[..1])).await, [Outcome::Applied]);
    redis.script_flush();
    assert_eq!(rig.ack(&q, &tokens(&leased[1..])).await.unwrap(), [Outcome::Applied; 2]);
    // With room, it inserts again.
    redis.config_set("maxmemory", "0");
    rig.insert_numbers(&q, 3..4).await;
    assert_eq!(rig.drain(&q).await, [0, 3]);
}

/// G13 once more on an older Redis, which treats a script's first write in another way. The server that the tests start
/// is named by the environment, so this takes a process of its own.
#[test]
fn full_is_not_stuck_on_redis_6_2() {
    const OLD: &str = "DATA_QUEUE_TEST_REDIS_62";
    let Ok(binary) = env::var(OLD) else {
        println!("{OLD} names no redis-server 6.2: not run");
        return;
    };
    let mut again = Command::new(env::current_exe().unwrap());
    again.env_remove(OLD).env(BINARY_VARIABLE, binary);
    again.args(["store::conformance::redis::full", "store::conformance::redis_only::full"]);
    let output = again.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

/// G7: leases are listed in parts, and heartbeats for some of what was popped together may split them off in between.
#[tokio::test]
async fn what_is_split_while_it_is_listed_is_listed() {
    const BATCHES: usize = 1_000;
    let redis = Arc::new(Redis::start());
    let (rig, q) = (connected(&redis), queue("q"));
    let mut held = Vec::new();
    for batch in 0..BATCHES {
        rig.insert_numbers(&q, 2 * batch..2 * batch + 2).await;
        held.push(tokens(&rig.take(&q, 2).await));
    }
    rig.pass(10_000);
    let first: Vec<Token> = held.iter().map(|batch| batch[0]).collect();
    let beat = async {
        for step in first.chunks(50) {
            rig.heartbeat(&q, step, Some(LEASE)).await.unwrap();
        }
    };
    tokio::join!(rig.held_released(&q, 10_000), beat);
    let others: Vec<Token> = held.iter().map(|batch| batch[1]).collect();
    for step in others.chunks(100) {
        assert_eq!(rig.ack(&q, step).await.unwrap(), vec![Outcome::LeaseLost; step.len()]);
    }
}

/// Appends to every field of a hash.
fn append(redis: &Redis, key: &str, suffix: &str) {
    let append = "local all = redis.call('HGETALL', KEYS[1]) \
                  for at = 1, #all, 2 do redis.call('HSET', KEYS[1], all[at], all[at + 1] .. ARGV[1]) end \
                  return #all / 2";
    assert!(matches!(redis.command(&["EVAL", append, "1", key, suffix]), Reply::Integer(1..)), "{key} is empty");
}

/// How many fields of a hash there are, and how many of them end so.
fn ending(redis: &Redis, key: &str, suffix: &str) -> (usize, usize) {
    let count = "local values, count = redis.call('HVALS', KEYS[1]), 0 \
                 for _, value in ipairs(values) do \
                   if string.sub(value, -#ARGV[1]) == ARGV[1] then count = count + 1 end \
                 end \
                 return {#values, count}";
    let Reply::Array(counts) = redis.command(&["EVAL", count, "1", key, suffix]) else { panic!("not a pair") };
    let [Reply::Integer(all), Reply::Integer(so)] = counts[..] else { panic!("not a pair of numbers") };
    (all as usize, so as usize)
}

/// Two versions of the server can share a Redis: what a later one writes behind a record, this one keeps.
#[tokio::test]
async fn fields_of_a_later_version_are_kept() {
    const OF_LEASE: &str = " later lease\n=ü\0 1";
    const OF_TRIES: &str = " later tries\n 12 3\0-";
    let redis = Arc::new(Redis::start());
    let engine = OnRedis::connect(&redis, RULES);
    let q = queue("q");
    let [leases, tries] = ["leases", "tries"].map(|part| engine.shared.key_of(&q, part));
    let rig = Rig::new(engine);
    rig.insert_numbers(&q, 0..3).await;
    let held = tokens(&rig.take(&q, 3).await);
    rig.put_back(&q, &held).await;
    append(&redis, &tries, OF_TRIES);

    let held = tokens(&rig.pop(&q, attempt(3, "r", 1)).await.unwrap().tasks);
    append(&redis, &leases, OF_LEASE);
    assert_eq!(rig.heartbeat(&q, &held, Some(2 * LEASE)).await.unwrap().outcomes, [Outcome::Applied; 3]);
    assert_eq!(ending(&redis, &leases, OF_LEASE), (1, 1));
    let again = rig.pop(&q, attempt(3, "r", 2)).await.unwrap().tasks;
    assert_eq!((numbers(&again), again[0].left), (vec![0, 1, 2], 2 * LEASE));
    assert_eq!(ending(&redis, &leases, OF_LEASE), (1, 1));
    // Each of them has its own when they part.
    assert_eq!(rig.beat_one(&q, held[1], 2 * LEASE).await, Outcome::Applied);
    assert_eq!(ending(&redis, &leases, OF_LEASE), (4, 4));
    assert_eq!(rig.unsent(&q, &held[..1], Some(name_of_attempt(1))).await, [Outcome::LeaseLost]);

    assert_eq!(rig.unsent(&q, &held[..1], Some(name_of_attempt(2))).await, [Outcome::Applied]);
    assert_eq!(rig.put_back(&q, &held[1..2]).await, [Outcome::Applied]);
    rig.pass(2 * LEASE);
    assert_eq!(rig.counted(&q).await.ready, 3);
    assert_eq!(ending(&redis, &tries, OF_TRIES), (3, 3));
    let again = rig.take(&q, 3).await;
    let counters: Vec<_> = again.iter().map(|task| (task.deliveries, task.expiries)).collect();
    assert_eq!((numbers(&again), counters), (vec![2, 1, 0], vec![(3, 1), (3, 0), (2, 0)]));
    assert_eq!(rig.held_released(&q, 0).await, 3);
    assert_eq!(ending(&redis, &tries, OF_TRIES), (3, 3));
    let held = tokens(&rig.take(&q, 3).await);
    append(&redis, &leases, OF_LEASE);
    assert_eq!(rig.ack(&q, &held).await.unwrap(), [Outcome::Applied; 3]);
    assert_eq!((ending(&redis, &tries, OF_TRIES), ending(&redis, &leases, OF_LEASE)), ((0, 0), (0, 0)));
}

fn refusal(result: Result<(), StoreError>) -> String {
    match result {
        Err(StoreError::Unavailable { message, did_not_run: true }) => message,
        other => panic!("{other:?}"),
    }
}

/// G1: a Redis that may evict tasks is refused, by every call, until it is set right.
#[tokio::test]
async fn a_redis_that_evicts_is_refused() {
    let options = Options { maxmemory_policy: Some("allkeys-lru".to_owned()), ..Options::default() };
    let redis = Arc::new(Redis::with(options));
    let (rig, q) = (connected(&redis), queue("q"));
    assert!(refusal(rig.check().await).contains("allkeys-lru"));
    assert!(refusal(rig.insert(&q, insert(tasks(0..1))).await.map(|_| ())).contains("allkeys-lru"));
    assert!(refusal(rig.pop(&q, pop(1)).await.map(|_| ())).contains("allkeys-lru"));
    redis.config_set("maxmemory-policy", "noeviction");
    rig.check().await.unwrap();
    rig.insert_numbers(&q, 0..1).await;
    redis.config_set("maxmemory-policy", "volatile-ttl");
    assert!(refusal(rig.check().await).contains("volatile-ttl"));
}

/// Another layout is refused, but for the one before, which becomes the one of this server, as on first use.
#[tokio::test]
async fn another_layout_is_refused() {
    let redis = Arc::new(Redis::start());
    let rig = connected(&redis);
    rig.check().await.unwrap();
    assert_eq!(redis.command(&["GET", "test:format"]), Reply::Bytes(b"4".to_vec()));
    for other in ["1", "5", "1000000000000000000000", "new"] {
        redis.command(&["SET", "test:format", other]);
        let message = refusal(connected(&redis).check().await);
        assert!(message.contains(other) && message.contains("test:format"), "{message}");
        refusal(rig.check().await);
        refusal(rig.counts(&[queue("q")]).await.map(|_| ()));
    }
    redis.command(&["SET", "test:format", "2"]);
    rig.check().await.unwrap();
    assert_eq!(redis.command(&["GET", "test:format"]), Reply::Bytes(b"4".to_vec()));
    assert_eq!(rig.count(&queue("q")).await, None);
}

/// What was known about a Redis is not believed of another run of it: its queues are registered again, and so reaped.
#[tokio::test]
async fn a_redis_that_came_back_empty_is_served_from_scratch() {
    let redis = Arc::new(Redis::start());
    let (rig, q) = (connected(&redis), queue("q"));
    rig.check().await.unwrap();
    rig.insert_numbers(&q, 0..1).await;
    redis.restart();
    while rig.check().await.is_err() {}
    rig.set_now(START);
    // The first calls may meet a connection that broke.
    while rig.look(std::slice::from_ref(&q)).await.is_err() {}
    assert_eq!(rig.count(&q).await, None);
    rig.insert_numbers(&q, 0..2).await;
    assert_eq!(numbers(&rig.take(&q, 1).await), [0]);
    rig.pass(LEASE);
    assert_eq!(reap::round(&rig, 10).await.1, [(q.clone(), 1)].into());
}

type Hints = Arc<Mutex<Vec<(QueueName, usize)>>>;

/// Hints of other servers, in the order in which they came.
async fn listening(server: &Rig, redis: &Redis, listeners: usize) -> (Hints, impl Future<Output = ()>) {
    let hints = Hints::default();
    let into = Arc::clone(&hints);
    let on_wake = Arc::new(move |queue: &QueueName, count: usize| into.lock().unwrap().push((queue.clone(), count)));
    let mut listen = Box::pin(async { server.listen(on_wake).await.unwrap() });
    loop {
        tokio::select! {
            biased;
            () = &mut listen => panic!("it stopped listening"),
            () = tokio::task::yield_now() => {}
        }
        match redis.command(&["PUBSUB", "CHANNELS", "test:wake:*"]) {
            Reply::Array(channels) if channels.len() == listeners => return (hints, listen),
            _ => {}
        }
    }
}

/// G15: a server that waits on a queue is told about tasks that others bring, and only about those.
#[tokio::test]
async fn servers_that_wait_are_told() {
    let redis = Arc::new(Redis::start());
    let (here, there) = (connected(&redis), connected(&redis));
    let (hints, listen) = listening(&there, &redis, 1).await;
    let (q, silent, last) = (queue("q"), queue("silent"), queue("last"));
    let bring = async {
        for each in [&q, &silent, &last] {
            here.insert_numbers(each, 0..1).await;
            assert_eq!(there.drain(each).await, [0]);
        }
        there.pop(&q, Pop { will_wait: true, ..pop(1) }).await.unwrap();
        there.look(std::slice::from_ref(&last)).await.unwrap();
        // Two for those who wait here, one for the others.
        let three = Insert { waiting_here: 2, ..insert(tasks(0..3)) };
        here.insert(&q, three).await.unwrap();
        let two = Insert { waiting_here: 2, ..insert(tasks(3..5)) };
        here.insert(&q, two).await.unwrap();
        // Its own inserts are no news to a server, and what nobody waits for is none to anybody.
        there.insert_numbers(&q, 5..6).await;
        here.insert_numbers(&silent, 0..1).await;
        let held = tokens(&here.take(&q, 4).await);
        here.put_back(&q, &held[..2]).await;
        here.release_held(&q, 0).await.unwrap();
        // The word that a server waits holds for 10 s, and who looks when half of that is over gives it anew.
        here.pass(4_999);
        there.set_now(here.now());
        there.look(&[q.clone(), last.clone()]).await.unwrap();
        here.pass(2);
        there.set_now(here.now());
        there.look(std::slice::from_ref(&last)).await.unwrap();
        here.pass(4_998);
        here.insert_numbers(&q, 6..7).await;
        here.pass(2);
        here.insert_numbers(&q, 7..8).await;
        here.insert_numbers(&last, 0..1).await;
        while hints.lock().unwrap().last().is_none_or(|(queue, _)| *queue != last) {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        () = listen => panic!("it stopped listening"),
        () = bring => {}
    }
    let expected = [(&q, 1), (&q, 2), (&q, 3), (&q, 1), (&last, 1)].map(|(queue, count)| (queue.clone(), count));
    assert_eq!(*hints.lock().unwrap(), expected);
}

/// A list of queues takes many steps, and all of them together no longer than one call may.
#[tokio::test]
async fn a_list_of_queues_ends_in_time() {
    let redis = Arc::new(Redis::start());
    let config = |timeout| RedisConfig { timeout, ..config_of(&redis, RULES) };
    let [patient, hasty] = [TIMEOUT, Duration::from_millis(50)]
        .map(|timeout| RedisStore::new(Arc::new(RedisShared::new(&config(timeout)).unwrap())));
    let many = "for n = 1, 300000 do redis.call('SADD', KEYS[1], 'q' .. n) end";
    redis.command(&["EVAL", many, "1", "test:queues.0"]);
    hasty.check().await.unwrap();
    let began = Instant::now();
    assert_eq!(patient.queues(None, 1).await.unwrap(), [queue("q1")]);
    let all = began.elapsed();
    let error = hasty.queues(None, 1).await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable { .. }), "{error:?}, and a whole list takes {all:?}");
}

/// A queue whose data cannot be read keeps no list from being seen; asked for on its own, it is an error.
#[tokio::test]
async fn a_broken_queue_is_left_out_of_lists() {
    let redis = Arc::new(Redis::start());
    let engine = OnRedis::connect(&redis, RULES);
    let queues = ["a", "broken", "z"].map(queue);
    let meta = engine.shared.key_of(&queues[1], "meta");
    let rig = Rig::new(engine);
    for queue in &queues {
        rig.insert_numbers(queue, 0..1).await;
    }
    redis.command(&["SET", &meta, "of another program"]);
    let listed = rig.counts_in_list(&queues).await.unwrap();
    assert_eq!(listed.iter().map(Option::is_some).collect::<Vec<_>>(), [true, false, true]);
    let error = rig.counts(&queues[1..2]).await.unwrap_err();
    assert!(matches!(error, StoreError::Broken(_)), "{error:?}");
}

/// Polls the calls in turn, so that the first goes to Redis by itself and the others wait until it is answered: they are
/// gathered.
async fn together<T>(calls: Vec<impl Future<Output = T>>) -> Vec<T> {
    futures_util::future::join_all(calls).await
}

/// How many scripts Redis has run.
fn scripts_run(redis: &Redis) -> u64 {
    let Reply::Bytes(info) = redis.command(&["INFO", "commandstats"]) else { panic!("no INFO") };
    let info = String::from_utf8(info).unwrap();
    let calls = |line: &str| line.split_once("calls=")?.1.split(',').next()?.parse::<u64>().ok();
    info.lines().filter(|line| line.starts_with("cmdstat_evalsha:")).find_map(calls).unwrap_or(0)
}

/// Leases of tasks that were popped one by one are where Redis finds each at once, and nothing else is there.
#[tokio::test]
async fn many_leases_are_in_tables() {
    let redis = Arc::new(Redis::start());
    let engine = OnRedis::connect(&redis, RULES);
    let q = queue("q");
    let [leases, leased] = ["leases", "leased"].map(|part| engine.shared.key_of(&q, part));
    let rig = Rig::new(engine);
    rig.insert_numbers(&q, 0..40).await;
    let popped = together((0..40).map(|_| rig.pop(&q, pop(1))).collect()).await;
    let encoding = |key: &str| redis.command(&["OBJECT", "ENCODING", key]);
    assert_eq!(encoding(&leases), Reply::Bytes(b"hashtable".to_vec()));
    assert_eq!(encoding(&leased), Reply::Bytes(b"skiplist".to_vec()));
    assert_eq!(redis.command(&["HLEN", &leases]), Reply::Integer(40));
    assert_eq!(redis.command(&["ZCARD", &leased]), Reply::Integer(40));
    let held: Vec<Token> = popped.iter().flat_map(|popped| tokens(&popped.as_ref().unwrap().tasks)).collect();
    assert_eq!(rig.ack(&q, &held).await.unwrap(), [Outcome::Applied; 40]);
    assert_eq!(redis.command(&["EXISTS", &leases, &leased]), Reply::Integer(0));
}

/// G1: a script reads all that it counts before it writes, so that one that fails there changed nothing.
#[tokio::test]
async fn calls_that_cannot_count_change_nothing() {
    let redis = Arc::new(Redis::start());
    let engine = OnRedis::connect(&redis, RULES);
    let q = queue("q");
    let meta = engine.shared.key_of(&q, "meta");
    let rig = Rig::new(engine);
    rig.insert_numbers(&q, 0..3).await;
    let held = tokens(&rig.take(&q, 1).await);
    let before = rig.counted(&q).await;
    redis.command(&["RENAME", &meta, "aside"]);
    redis.command(&["SET", &meta, "of another program"]);
    assert!(matches!(rig.insert(&q, insert(tasks(3..4))).await, Err(StoreError::Broken(_))));
    assert!(matches!(rig.pop(&q, pop(1)).await, Err(StoreError::Broken(_))));
    assert!(matches!(rig.ack(&q, &held).await, Err(StoreError::Broken(_))));
    redis.command(&["RENAME", "aside", &meta]);
    assert_eq!(rig.counted(&q).await, before);
    assert_eq!(rig.ack_one(&q, held[0]).await, Outcome::Applied);
    assert_eq!(rig.take(&q, 9).await.len(), 2);
}
