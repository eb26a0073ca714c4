//! What only some queues have, as it is kept there.

use super::*;

/// The keys of what only some queues use.
const RARE: [&str; 13] = [
    "rare",
    "ready:4",
    "high",
    "scheduled",
    "places",
    "plans",
    "ends",
    "unique",
    "settings",
    "cancelled",
    "sizes",
    "gone",
    "numbers",
];

/// How many of those there are.
fn rare_keys(redis: &Redis, keys: &[String]) -> Reply {
    let mut exists = vec!["EXISTS"];
    exists.extend(keys.iter().map(String::as_str));
    redis.command(&exists)
}

fn number_of(reply: Reply) -> usize {
    let Reply::Integer(number) = reply else { panic!("{reply:?}") };
    usize::try_from(number).unwrap()
}

/// What a queue has used leaves nothing behind that would cost it time.
#[tokio::test]
async fn a_queue_is_plain_again_when_nothing_rare_is_left() {
    let redis = Arc::new(Redis::start());
    let engine = OnRedis::connect(&redis, RULES);
    let q = queue("q");
    let keys = RARE.map(|part| engine.shared.key_of(&q, part));
    let rig = Rig::new(engine);
    rig.insert_numbers(&q, 0..3).await;
    assert_eq!(rare_keys(&redis, &keys), Reply::Integer(0));
    let held = tokens(&rig.take(&q, 3).await);
    rig.put_back(&q, &held[..1]).await;
    rig.ack(&q, &held[1..]).await.unwrap();
    assert_eq!(rare_keys(&redis, &keys), Reply::Integer(0), "a plain queue has none");

    rig.set(&q, Setting::MaxBytes, 1 << 20).await;
    let all = Plan { priority: 4, ttl: Some(1_000), unique_key: Some("k".to_owned()) };
    let ids =
        rig.insert_new(&q, vec![planned(3, all), after(10, with_key(4, "l")), of_priority(5, 4), task("6")]).await;
    rig.delete(&q, &ids[3..]).await.unwrap();
    let held = tokens(&rig.take(&q, 3).await);
    rig.delete(&q, &ids[..1]).await.unwrap();
    assert_eq!(rare_keys(&redis, &keys), Reply::Integer(8), "but for those of what is ready");
    rig.pass(10);
    rig.ack(&q, &held).await.unwrap();
    let held = tokens(&rig.take(&q, 3).await);
    rig.ack(&q, &held).await.unwrap();
    rig.set(&q, Setting::MaxBytes, None).await;
    // The index of leases goes by itself.
    redis.command(&["DEL", &keys[0].replace(":rare", ":where")]);
    rig.look_one(&q).await;
    assert_eq!(rare_keys(&redis, &keys), Reply::Integer(0));
    rig.insert_numbers(&q, 7..9).await;
    assert_eq!(rig.drain(&q).await, [7, 8]);
}

/// Lists have the ids of tasks that were deleted until somebody comes by, however many.
#[tokio::test]
async fn what_was_deleted_is_skipped_however_much() {
    let redis = Arc::new(Redis::start());
    let engine = OnRedis::connect(&redis, RULES);
    let q = queue("q");
    let [list, gone] = ["ready:0", "gone"].map(|part| engine.shared.key_of(&q, part));
    let rig = Rig::new(engine);
    let mut ids = rig.insert_new(&q, tasks(0..1_300)).await;
    ids.extend(rig.insert_new(&q, tasks(1_300..2_600)).await);
    for step in ids[1..2_590].chunks(RECLAIM_STEP) {
        assert!(rig.delete(&q, step).await.unwrap().iter().all(|deleted| *deleted == Deleted::Gone));
    }
    let listed = number_of(redis.command(&["LLEN", &list]));
    assert!((13..1_300).contains(&listed), "{listed}");
    assert_eq!(numbers(&rig.take(&q, 1).await), [0]);
    assert_eq!(numbers(&rig.take(&q, 3).await), [2_590, 2_591, 2_592]);
    rig.insert_new(&q, vec![of_priority(2_600, 4)]).await;
    rig.delete(&q, &ids[2_594..2_596]).await.unwrap();
    assert_eq!(numbers(&rig.take(&q, 3).await), [2_600, 2_593, 2_596]);
    assert_eq!(rig.list_numbers(&q, State::Ready).await, [2_597, 2_598, 2_599]);
    let counts = Counts { ready: 3, leased: 7, inserted: 2_601, deleted: 2_591, ..Counts::default() };
    assert_eq!(rig.counted(&q).await, counts);
    assert_eq!(rig.drain(&q).await, [2_597, 2_598, 2_599]);
    assert_eq!(redis.command(&["EXISTS", &list, &gone]), Reply::Integer(0));
}

/// A task that is held is found by its id, while others come and go and the index is being made.
#[tokio::test]
async fn leases_are_found_by_their_tasks_while_others_come_and_go() {
    const TASKS: usize = 1_200;
    let redis = Arc::new(Redis::start());
    let engine = OnRedis::connect(&redis, RULES);
    let q = queue("q");
    let index = engine.shared.key_of(&q, "where");
    let rig = Rig::new(engine);
    let ids = rig.insert_new(&q, tasks(0..TASKS)).await;
    let mut held = Vec::new();
    while held.len() < TASKS / 2 {
        held.extend(rig.take(&q, 2).await);
    }
    // Half of what was popped together is split off.
    let split: Vec<Token> = tokens(&held).into_iter().step_by(2).collect();
    for step in split[..100].chunks(50) {
        rig.heartbeat(&q, step, Some(2 * LEASE)).await.unwrap();
    }
    let come_and_go = async {
        for step in tokens(&held[..200]).chunks(5) {
            rig.ack(&q, step).await.unwrap();
            rig.take(&q, 1).await;
        }
    };
    let look = async {
        for step in ids[400..].chunks(100) {
            rig.tasks(&q, step).await.unwrap();
        }
    };
    tokio::join!(come_and_go, look);
    let mut states = Vec::new();
    for step in ids.chunks(RECLAIM_STEP) {
        states
            .extend(rig.tasks(&q, step).await.unwrap().into_iter().map(|seen| seen.map(|seen| (seen.state, seen.at))));
    }
    assert!(states[..200].iter().all(Option::is_none));
    let leased = |at: usize| match at {
        200.. => Some((State::Leased, Some(START + LEASE))),
        _ => None,
    };
    assert!((200..640).all(|at| states[at] == leased(at)), "{states:?}");
    assert!(states[640..].iter().all(|state| *state == Some((State::Ready, None))));
    assert_eq!(redis.command(&["HLEN", &index]), Reply::Integer(441), "those that are held, and where it is");
    assert_eq!(rig.held_released(&q, 0).await, 440);
    assert_eq!(redis.command(&["HLEN", &index]), Reply::Integer(1));
}

/// G13: what is rare drains from a full Redis as well, and so does what administers.
#[tokio::test]
async fn what_is_rare_drains_when_redis_is_full() {
    let redis = Arc::new(Redis::start());
    let (rig, q) = (connected(&redis), queue("q"));
    rig.set(&q, Setting::MaxBytes, 1 << 20).await;
    let all = |number| Plan { priority: 4, ttl: Some(60_000), unique_key: Some(format!("k{number}")) };
    let new = (0..9).map(|number| planned(number, all(number))).chain([after(10, with_ttl(9, 20))]).collect();
    let ids = rig.insert_new(&q, new).await;
    rig.engine.fill().await;
    let refused = rig.insert(&q, insert(vec![with_key(10, "k10")])).await;
    assert!(matches!(refused, Err(StoreError::Full(_))), "{refused:?}");
    rig.set(&q, Setting::Paused, 1).await;
    assert_eq!(rig.take(&q, 1).await, []);
    rig.set(&q, Setting::Paused, None).await;
    let held = rig.take(&q, 6).await;
    assert_eq!(numbers(&held), [0, 1, 2, 3, 4, 5]);
    let held = tokens(&held);
    rig.give_back(&q, failed(&held[..1], "no")).await;
    rig.give_back(&q, rejected(&held[1..3], "never")).await;
    assert_eq!(rig.delete(&q, &[ids[3], ids[8]]).await.unwrap(), [Deleted::Cancelled, Deleted::Gone]);
    assert_eq!(rig.heartbeat(&q, &held[3..], None).await.unwrap().cancelled, held[3..4]);
    assert_eq!(rig.redrive(&q, &ids[1..2]).await.unwrap(), [Redriven::Ready]);
    assert_eq!(rig.purge(&q, State::Dead).await.unwrap(), 1);
    assert_eq!(rig.ack_one(&q, held[4]).await, Outcome::Applied);
    rig.pass(LEASE);
    let counts = Counts { ready: 5, inserted: 10, acked: 1, expired: 1, deleted: 2, purged: 1, ..Counts::default() };
    assert_eq!(rig.counted(&q).await, counts);
    assert_eq!(rig.list_numbers(&q, State::Ready).await, [5, 6, 7, 1, 0]);
    assert!(rig.drop_queue(&q, true).await.unwrap());
    assert_eq!(rig.count(&q).await, None);
}

/// G3: who has the unique keys may have changed between two runs of an insert; the second one answers as the first.
#[tokio::test]
async fn a_second_run_is_answered_as_the_first_whoever_has_the_keys_by_then() {
    let (rig, q) = (connected(&Arc::new(Redis::start())), queue("q"));
    let insert_one = async |number, key: &str| rig.insert_new(&q, vec![with_key(number, key)]).await[0];
    let holder = insert_one(0, "k").await;
    let both = insert(vec![with_key(1, "k"), task("2"), with_key(3, "l")]);
    let only = insert(vec![with_key(4, "k")]);
    let minted: Vec<TaskId> = both.tasks.iter().map(|task| task.id).collect();
    let of_both = rig.insert(&q, both.clone()).await.unwrap();
    assert_eq!(of_both.ids, [holder, minted[1], minted[2]]);
    let of_only = rig.insert(&q, only.clone()).await.unwrap();
    assert_eq!((of_only.ids[0], &*of_only.duplicates), (holder, &[0][..]));
    let run_again = async || {
        let again = together(vec![rig.insert(&q, only.clone()), rig.insert(&q, both.clone())]).await;
        let again: Vec<Inserted> = again.into_iter().map(Result::unwrap).collect();
        assert_eq!(again, [of_only.clone(), of_both.clone()]);
    };
    // The first one's key is free, and then the third one's as well, and then others have both.
    let finish = async |expected: &[usize]| {
        let all = rig.take(&q, expected.len()).await;
        assert_eq!(numbers(&all), expected);
        rig.ack(&q, &tokens(&all)).await.unwrap();
    };
    finish(&[0]).await;
    run_again().await;
    assert_eq!(rig.counted(&q).await, Counts { ready: 2, inserted: 3, acked: 1, ..Counts::default() });
    finish(&[2, 3]).await;
    run_again().await;
    for (number, key) in [(5, "k"), (6, "l")] {
        insert_one(number, key).await;
    }
    run_again().await;
    assert_eq!(rig.counted(&q).await, Counts { ready: 2, inserted: 5, acked: 3, ..Counts::default() });
    assert_eq!(rig.drain(&q).await, [5, 6]);
}

/// G13: a duplicate needs no room, and is answered by a full Redis, too.
#[tokio::test]
async fn duplicates_are_told_when_redis_is_full() {
    let (rig, q) = (connected(&Arc::new(Redis::start())), queue("q"));
    let first = rig.insert_new(&q, vec![with_key(0, "k")]).await[0];
    rig.engine.fill().await;
    for request in [None, Some(key("r", 1))] {
        let again = rig.insert(&q, Insert { request, ..insert(vec![with_key(1, "k")]) }).await.unwrap();
        assert_eq!((again.ids[0], &*again.duplicates), (first, &[0][..]));
    }
    let numbered = NumberedInsert { number: 1, fingerprint: Fingerprint([1; 16]), tasks: vec![with_key(2, "k")] };
    let produce = Produce { producer: "p".to_owned(), inserts: vec![numbered], waiting_here: 0, ..Default::default() };
    let produced = rig.produce(&q, produce).await.unwrap();
    assert!(produced.refused.is_none());
    assert_eq!((produced.inserted[0].ids[0], &*produced.inserted[0].duplicates), (first, &[0][..]));
}

/// Ids of tasks that are gone do not pile up behind a head that lives; and a task is on exactly one page though they are cut out
/// between the pages.
#[tokio::test]
async fn what_is_gone_is_cut_out_between_what_lives() {
    const MANY: usize = 5_200;
    let redis = Arc::new(Redis::start());
    let engine = OnRedis::connect(&redis, RULES);
    let q = queue("q");
    let [list, gone, kept] = ["ready:0", "gone", "numbers"].map(|part| engine.shared.key_of(&q, part));
    let rig = Rig::new(engine);
    let lives = |number: &usize| *number == 0 || number % 100 == 7 && *number < MANY;
    let insert_some = async |from: usize| {
        for from in (from..from + MANY).step_by(650) {
            let some = from..from + 650;
            let task = |number| if lives(&number) { task(number.to_string()) } else { with_ttl(number, 20) };
            rig.insert_new(&q, some.map(task).collect()).await;
        }
    };
    let page = async |after: Option<&Vec<u8>>, max| {
        let page = rig.list(&q, State::Ready, after, max).await.unwrap().unwrap();
        (page.tasks.iter().map(|seen| number(&seen.envelope)).collect::<Vec<_>>(), page.next)
    };
    let is_short = |live: usize| {
        let [listed, gone] = [["LLEN", &list], ["SCARD", &gone]].map(|command| number_of(redis.command(&command)));
        assert!(listed <= 2 * live + 1_000 && gone <= live + 1_000, "{listed} in the list, {gone} of them gone");
    };
    let live: Vec<usize> = (0..MANY).filter(lives).collect();
    rig.set(&q, Setting::Paused, 1).await;
    insert_some(0).await;

    let (mut listed, mut next) = page(None, 400).await;
    rig.pass(20);
    while let Some(place) = next {
        let (some, behind) = page(Some(&place), 10).await;
        listed.extend(some);
        next = behind;
    }
    listed.retain(lives);
    assert_eq!(listed, live);
    is_short(live.len());

    // Once more, behind tasks that were put back before those places.
    rig.set(&q, Setting::Paused, None).await;
    let held = tokens(&rig.take(&q, 12).await);
    rig.put_back(&q, &held[1..]).await;
    let (mut listed, mut next) = page(None, 10).await;
    rig.put_back(&q, &held[..1]).await;
    insert_some(MANY).await;
    rig.pass(20);
    while let Some(place) = next {
        let (some, behind) = page(Some(&place), 10).await;
        listed.extend(some);
        next = behind;
        rig.ack_one(&q, rig.take_one(&q).await.token).await;
    }
    assert_eq!(listed, live[1..]);
    is_short(live.len());
    let left = rig.drain(&q).await;
    assert_eq!(left, live[live.len() - left.len()..]);
    rig.look_one(&q).await;
    assert_eq!(redis.command(&["EXISTS", &list, &gone, &kept]), Reply::Integer(0));
}

/// Tasks that were there before their bytes were limited are measured in few steps, and each goes on where the one before ended,
/// whoever takes it.
#[tokio::test]
async fn measuring_takes_few_steps_and_goes_on_where_it_ended() {
    const MANY: usize = 20_000;
    let redis = Arc::new(Redis::start());
    let engine = OnRedis::connect(&redis, RULES);
    let q = queue("q");
    let [meta, sizes] = ["meta", "sizes"].map(|part| engine.shared.key_of(&q, part));
    let rig = Rig::new(engine);
    for from in (0..MANY).step_by(1_000) {
        rig.insert_numbers(&q, from..from + 1_000).await;
    }
    let measured = || number_of(redis.command(&["HLEN", &sizes]));
    let measured_until = async |enough: usize| {
        while measured() < enough {
            tokio::task::yield_now().await;
        }
    };
    let change = [(Setting::MaxBytes, Some(1 << 30))];
    tokio::select! {
        biased;
        _ = rig.change(&q, &change) => panic!("it was done before anybody looked"),
        () = measured_until(1) => {}
    }
    // What the caller asked for before he left may still be under way.
    rig.settings(&q).await.unwrap();
    let before = measured();
    rig.look_one(&q).await;
    assert!(measured() >= before + 900, "{before}, and {} after a look", measured());
    while measured() < MANY / 2 {
        rig.look_one(&q).await;
    }
    let before = scripts_run(&redis);
    rig.change(&q, &change).await.unwrap();
    assert!(scripts_run(&redis) - before <= 13, "{} scripts", scripts_run(&redis) - before);
    assert_eq!((measured(), redis.command(&["HGET", &meta, "measuring"])), (MANY, Reply::Nil));
}

/// A queue that was dropped is, whatever becomes of its name in the registry; a name too many does no harm.
#[tokio::test]
async fn a_queue_is_dropped_though_its_name_cannot_be() {
    let redis = Arc::new(Redis::start());
    let (rig, q) = (connected(&redis), queue("q"));
    rig.insert_numbers(&q, 0..3).await;
    redis.command(&["ACL", "SETUSER", "default", "-srem"]);
    assert!(rig.drop_queue(&q, true).await.unwrap());
    assert_eq!(rig.count(&q).await, None);
    assert_eq!(rig.queues(None, 2).await.unwrap(), std::slice::from_ref(&q));
    redis.command(&["ACL", "SETUSER", "default", "+srem"]);
    rig.insert_numbers(&q, 0..1).await;
    assert!(rig.drop_queue(&q, true).await.unwrap());
    assert_eq!(rig.queues(None, 2).await.unwrap(), []);
}
