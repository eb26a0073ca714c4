//! Calls that wait while Redis is busy, and run together.

use super::*;

/// G1, G3: Redis runs a script whole, so that whoever is killed, or leaves, at whatever moment leaves a call done or not begun.
#[tokio::test]
async fn a_call_is_one_script() {
    let redis = Arc::new(Redis::start());
    let rig = connected(&redis);
    // In the first round, Redis does not know the scripts yet.
    for round in 1..=2 {
        let q = queue(&format!("q{round}"));
        let mut run = vec![scripts_run(&redis)];
        let mut note = || run.push(scripts_run(&redis));
        rig.insert_repeatably(&q, 0..6, "r").await;
        note();
        let numbered = NumberedInsert { number: round, fingerprint: Fingerprint([1; 16]), tasks: tasks(6..7) };
        let produce =
            Produce { producer: "p".to_owned(), inserts: vec![numbered], waiting_here: 0, ..Default::default() };
        assert!(rig.produce(&q, produce).await.unwrap().refused.is_none());
        note();
        let held = tokens(&rig.pop(&q, attempt(5, "r", 1)).await.unwrap().tasks);
        note();
        rig.pop(&q, Pop { acks: held[..1].to_vec(), ..pop(1) }).await.unwrap();
        note();
        assert_eq!(rig.beat_one(&q, held[1], 2 * LEASE).await, Outcome::Applied);
        note();
        assert_eq!(rig.ack_one(&q, held[1]).await, Outcome::Applied);
        note();
        rig.put_back(&q, &held[2..3]).await;
        note();
        rig.give_back(&q, failed(&held[3..4], "e")).await;
        note();
        rig.give_back(&q, rejected(&held[4..5], "e")).await;
        note();
        rig.pass(2 * LEASE);
        rig.look_one(&q).await;
        note();
        rig.insert_new(&q, vec![with_key(7, "k")]).await;
        note();
        assert_eq!(rig.take(&q, 10).await.len(), 5);
        note();
        let each: Vec<u64> = run.windows(2).map(|run| run[1] - run[0]).collect();
        assert!(round == 1 || each == [1; 12], "{each:?}");
    }
}

/// Calls that wait for Redis share scripts, and each is answered as if it were alone.
#[tokio::test]
async fn calls_that_wait_share_scripts_and_nothing_else() {
    let redis = Arc::new(Redis::start());
    let (rig, q) = (connected(&redis), queue("q"));
    rig.insert_numbers(&q, 0..1).await;
    let before = scripts_run(&redis);
    let inserts = (1..100).map(|number| rig.insert_numbers(&q, number..number + 1)).collect();
    let inserted = together(inserts).await;
    assert!(inserted.iter().all(|one| one.ids.len() == 1 && !one.replayed));
    assert!(scripts_run(&redis) - before <= 3, "{} scripts", scripts_run(&redis) - before);
    rig.take_one(&q).await;

    let before = scripts_run(&redis);
    let popped = together((0..110).map(|_| rig.pop(&q, pop(1))).collect()).await;
    assert!(scripts_run(&redis) - before <= 4, "{} scripts", scripts_run(&redis) - before);
    let popped: Vec<_> = popped.into_iter().map(Result::unwrap).collect();
    let mut all: Vec<usize> = popped.iter().flat_map(|popped| numbers(&popped.tasks)).collect();
    all.sort_unstable();
    assert_eq!(all, (1..100).collect::<Vec<_>>());
    assert!(popped.iter().all(|popped| popped.tasks.is_empty() == popped.due_in.is_some()));

    let held: Vec<Token> = popped.iter().flat_map(|popped| tokens(&popped.tasks)).collect();
    let before = scripts_run(&redis);
    // Each is given twice: of two calls with one token, one acks.
    let acked = together(held.iter().chain(&held).map(|token| rig.ack_one(&q, *token)).collect()).await;
    assert!(scripts_run(&redis) - before <= 4, "{} scripts", scripts_run(&redis) - before);
    for (first, second) in acked[..99].iter().zip(&acked[99..]) {
        assert_eq!((*first, *second), (Outcome::Applied, Outcome::AlreadyAcked));
    }
    assert_eq!(rig.counted(&q).await, Counts { leased: 1, inserted: 100, acked: 99, ..Counts::default() });
}

/// Of inserts with request ids in one script, each is answered for itself.
#[tokio::test]
async fn repeated_inserts_that_are_gathered_are_told_apart() {
    let redis = Arc::new(Redis::start());
    let (rig, q) = (connected(&redis), queue("q"));
    // The queue is registered then, on one of two connections, and the others' order is that of their calls.
    rig.insert_numbers(&q, 0..1).await;
    let with = |numbers: Range<usize>, id: &str, fingerprint| {
        rig.insert(&q, Insert { request: Some(key(id, fingerprint)), ..insert(tasks(numbers)) })
    };
    let calls =
        vec![with(1..2, "x", 1), with(2..4, "y", 1), with(5..6, "x", 2), with(2..4, "y", 1), with(4..5, "z", 1)];
    let answers = together(calls).await;
    let ids = |at: usize| answers[at].as_ref().unwrap().ids.clone();
    assert!(matches!(answers[2], Err(StoreError::RequestIdReused)));
    assert_eq!((ids(1), ids(1).len()), (ids(3), 2));
    let replayed = [0, 1, 3, 4].map(|at| answers[at].as_ref().unwrap().replayed);
    assert_eq!(replayed, [false, false, true, false]);
    assert_eq!(rig.drain(&q).await, [0, 1, 2, 3, 4]);
    // Those that were done in one script are remembered one by one.
    assert!(with(4..5, "z", 1).await.unwrap().replayed);
}

/// Pops in one script have each their own acks, tokens and size; the acks come first.
#[tokio::test]
async fn pops_that_are_gathered_keep_to_themselves() {
    let redis = Arc::new(Redis::start());
    let (rig, q) = (connected(&redis), queue("q"));
    rig.insert_numbers(&q, 0..16).await;
    let held = tokens(&rig.take(&q, 3).await);
    let lost = Token([0; 16]);
    let calls = vec![
        Pop { acks: vec![held[0], lost], ..pop(2) },
        Pop { acks: vec![held[0]], ..pop(1) },
        pop(4),
        Pop { acks: vec![held[2], held[1]], ..pop(1) },
        Pop { max_bytes: 1, ..pop(5) },
        pop(3),
    ];
    let stems: Vec<Stem> = calls.iter().map(|pop| pop.stem).collect();
    let popped = together(calls.into_iter().map(|pop| rig.pop(&q, pop)).collect()).await;
    let popped: Vec<_> = popped.into_iter().map(Result::unwrap).collect();
    assert_eq!(popped[0].acks, [Outcome::Applied, Outcome::LeaseLost]);
    assert_eq!(popped[1].acks, [Outcome::AlreadyAcked]);
    assert_eq!(popped[3].acks, [Outcome::Applied; 2]);
    let counts: Vec<usize> = popped.iter().map(|popped| popped.tasks.len()).collect();
    assert_eq!(counts, [2, 1, 4, 1, 1, 3]);
    for (popped, stem) in popped.iter().zip(stems) {
        assert!(popped.tasks.iter().enumerate().all(|(at, task)| task.token == stem.token(at as u16)));
    }
    let again: Vec<Token> = popped.iter().flat_map(|popped| tokens(&popped.tasks)).collect();
    assert_eq!(rig.ack(&q, &again).await.unwrap(), [Outcome::Applied; 12]);
    assert_eq!(rig.counted(&q).await, Counts { ready: 1, inserted: 16, acked: 15, ..Counts::default() });
}

/// G5: two tries of a pop that wait together get one delivery.
#[tokio::test]
async fn tries_of_a_pop_that_wait_together_get_one_delivery() {
    let redis = Arc::new(Redis::start());
    let (rig, q) = (connected(&redis), queue("q"));
    rig.insert_numbers(&q, 0..9).await;
    let tries = (1..5).map(|number| rig.pop(&q, attempt(2, "r", number))).collect();
    let popped: Vec<_> = together(tries).await.into_iter().map(|popped| popped.unwrap().tasks).collect();
    assert!(popped.iter().all(|tasks| *tasks == popped[0] && tasks.len() == 2));
}

/// G13: an insert that a full Redis refuses takes nothing with it that waited beside it, and a queue that cannot be read
/// fails only its own calls.
#[tokio::test]
async fn what_fails_fails_alone() {
    let redis = Arc::new(Redis::start());
    let engine = OnRedis::connect(&redis, RULES);
    let (q, broken) = (queue("q"), queue("broken"));
    let meta = engine.shared.key_of(&broken, "meta");
    let rig = Rig::new(engine);
    rig.insert_numbers(&q, 0..9).await;
    rig.insert_numbers(&broken, 0..1).await;
    redis.command(&["SET", &meta, "of another program"]);
    let held = tokens(&rig.take(&q, 3).await);
    rig.engine.fill().await;
    let inserts = together((0..9).map(|number| rig.insert(&q, insert(tasks(number..number + 1)))).collect());
    let pops = together((0..3).map(|_| rig.pop(&q, pop(1))).collect());
    let acks = together(held.iter().map(|token| rig.ack_one(&q, *token)).collect());
    let others = together((0..3).map(|_| rig.pop(&broken, pop(1))).collect());
    let (inserts, pops, acks, others) = tokio::join!(inserts, pops, acks, others);
    assert!(inserts.iter().all(|insert| matches!(insert, Err(StoreError::Full(_)))), "{inserts:?}");
    assert_eq!(acks, [Outcome::Applied; 3]);
    assert!(pops.into_iter().all(|pop| pop.unwrap().tasks.len() == 1));
    assert!(others.iter().all(|pop| matches!(pop, Err(StoreError::Broken(_)))), "{others:?}");
    assert_eq!(rig.counted(&q).await, Counts { ready: 3, leased: 3, inserted: 9, acked: 3, ..Counts::default() });
}

/// A caller that is gone before its turn, or while its script runs, takes nobody with it.
#[tokio::test]
async fn callers_that_leave_take_nobody_with_them() {
    let redis = Arc::new(Redis::start());
    let (rig, q) = (connected(&redis), queue("q"));
    rig.insert_numbers(&q, 0..1).await;
    for leave_after in [0, 1, 2, 5] {
        let gone = rig.insert(&q, insert(tasks(7..8)));
        tokio::select! {
            biased;
            _ = gone => {}
            () = async { for _ in 0..leave_after { tokio::task::yield_now().await; } } => {}
        }
        let stay = together((0..5).map(|number| rig.insert_numbers(&q, number..number + 1)).collect());
        assert_eq!(stay.await.len(), 5);
    }
    let drained = rig.drain(&q).await;
    assert_eq!(drained.iter().filter(|number| **number != 7).count(), 21);
    assert!(drained.len() <= 25);
}
