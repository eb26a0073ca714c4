//! Tasks that come from another queue, with what they have behind them.

use super::*;

/// A task whose envelope is a number, which was inserted elsewhere a minute ago.
fn past() -> Past {
    Past { inserted_at: START - 60_000, ..Past::default() }
}

fn with_past(past: Past, task: NewTask) -> NewTask {
    NewTask { past: Some(Box::new(past)), ..task }
}

fn dead(cause: Cause) -> Past {
    Past { death: Some((START - 10_000, cause)), last_error: "no".to_owned(), deliveries: 3, ..past() }
}

/// Under its own id as the request's.
fn request(task: NewTask) -> Insert {
    Insert { request: Some(key(&format!("import {}", task.id), 1)), ..insert(vec![task]) }
}

impl Rig {
    async fn import_all(&self, q: &QueueName, tasks: Vec<NewTask>) -> Vec<Inserted> {
        let inserts = tasks.into_iter().map(request).collect();
        self.import(q, inserts).await.unwrap().into_iter().map(Result::unwrap).collect()
    }

    /// None of them was there before.
    async fn import_new(&self, q: &QueueName, tasks: Vec<NewTask>) -> Vec<TaskId> {
        let ids: Vec<TaskId> = tasks.iter().map(|task| task.id).collect();
        let new = |id| Inserted { ids: vec![id], ..Inserted::default() };
        assert_eq!(self.import_all(q, tasks).await, ids.iter().copied().map(new).collect::<Vec<_>>());
        ids
    }
}

/// G8, G14: nothing of what a task has behind it is lost, whatever else it has; and it counts as inserted here.
pub(super) async fn a_task_goes_on_where_it_was(open: Open) {
    let (mut rig, q) = (open(RULES), queue("q"));
    let behind = Past { deliveries: 5, failures: 2, expiries: 1, last_error: "at line\n3 7".to_owned(), ..past() };
    let plan = Plan { priority: 4, ttl: Some(90_000), unique_key: Some("k".to_owned()) };
    let waits = |task| NewTask { due: Some(Due::At(START + 500)), ..task };
    let all = vec![
        with_past(behind.clone(), planned(0, plan.clone())),
        waits(with_past(behind, planned(1, Plan { unique_key: None, ..plan.clone() }))),
        with_past(Past { deliveries: 1, ..past() }, task("2")),
        with_past(past(), task("3")),
    ];
    let ids = rig.import_new(&q, all).await;
    let expected = |at: usize, state, plan: Plan| Seen {
        id: ids[at],
        state,
        at: (state == State::Scheduled).then_some(START + 500),
        envelope: at.to_string().into(),
        inserted_at: START - 60_000,
        ends_at: plan.ttl.map(|ttl| START - 60_000 + ttl),
        plan,
        deliveries: 5,
        failures: 2,
        expiries: 1,
        last_error: "at line\n3 7".to_owned(),
        cause: None,
        cancelled: false,
    };
    let plain = |at, deliveries| {
        let seen = expected(at, State::Ready, Plan::default());
        Seen { deliveries, failures: 0, expiries: 0, last_error: String::new(), ..seen }
    };
    let whole = [
        expected(0, State::Ready, plan.clone()),
        expected(1, State::Scheduled, Plan { unique_key: None, ..plan }),
        plain(2, 1),
        plain(3, 0),
    ];
    for again in 0..2 {
        assert_eq!(rig.tasks(&q, &ids).await.unwrap(), whole.clone().map(Some), "{again}");
        for disturbance in rig.engine.disturbances() {
            rig.engine.disturb(*disturbance).await;
        }
    }
    let counts = rig.count(&q).await.unwrap();
    assert_eq!(counts.oldest_ready, Some(60_000));
    assert_eq!(rig.counted(&q).await, Counts { ready: 3, scheduled: 1, inserted: 4, ..Counts::default() });
    let first = rig.take_one(&q).await;
    assert_eq!((first.id, first.inserted_at), (ids[0], START - 60_000));
    assert_eq!((first.deliveries, first.failures, first.expiries), (6, 2, 1));
    // It is over when it would have been there.
    rig.pass(30_000);
    assert_eq!(rig.drain(&q).await, [2, 3]);
    assert_eq!(rig.counted(&q).await, Counts { leased: 2, inserted: 4, expired: 2, ..Counts::default() });
}

/// G14: with its cause, its last error and the time of its death; it is kept from then, and can be redriven.
pub(super) async fn a_dead_letter_is_one_here_too(open: Open) {
    let (mut rig, q) = (open(RULES), queue("q"));
    let causes = [Cause::Failures, Cause::Expiries, Cause::Rejected];
    let all = causes.iter().enumerate().map(|(at, cause)| {
        let plan = Plan { priority: at as u8, ..Plan::default() };
        with_past(Past { failures: 2, ..dead(*cause) }, planned(at, plan))
    });
    let ids = rig.import_new(&q, all.collect()).await;
    for _ in 0..2 {
        for (at, cause) in causes.iter().enumerate() {
            let seen = rig.seen(&q, ids[at]).await.unwrap();
            assert_eq!((seen.state, seen.at, seen.cause), (State::Dead, Some(START - 10_000), Some(*cause)));
            assert_eq!((seen.deliveries, seen.failures, seen.last_error.as_str()), (3, 2, "no"));
        }
        for disturbance in rig.engine.disturbances() {
            rig.engine.disturb(*disturbance).await;
        }
    }
    assert_eq!(rig.counted(&q).await, Counts { dead: 3, inserted: 3, ..Counts::default() });
    assert_eq!(rig.listed(&q, State::Dead, 2).await.len(), 3);
    assert!(rig.take(&q, 9).await.is_empty());
    assert_eq!(rig.redrive(&q, &ids[..2]).await.unwrap(), [Redriven::Ready; 2]);
    let held = rig.take(&q, 9).await;
    assert_eq!(numbers(&held), [1, 0]);
    assert!(held.iter().all(|task| (task.deliveries, task.failures, task.expiries) == (4, 0, 0)), "{held:?}");
    rig.set(&q, Setting::DeadLetterRetention, 10_001).await;
    assert_eq!(rig.counted(&q).await.dead, 1);
    rig.pass(1);
    assert_eq!(rig.counted(&q).await, Counts { leased: 2, inserted: 3, expired: 1, ..Counts::default() });
}

/// G11: behind those that are there, in the order of the call, each at the tail of its priority; however long ago they were
/// inserted elsewhere.
pub(super) async fn ready_ones_join_the_tail_in_order(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_numbers(&q, 0..2).await;
    let aged =
        |age, task| with_past(Past { inserted_at: START - age, deliveries: age as u32 % 3, ..Past::default() }, task);
    let due = |task| NewTask { due: Some(Due::At(START - 1)), ..task };
    let all =
        vec![aged(1, task("2")), aged(9, of_priority(3, 5)), due(aged(500, task("4"))), aged(5, of_priority(5, 5))];
    rig.import_new(&q, all).await;
    rig.insert_numbers(&q, 6..7).await;
    rig.import_new(&q, vec![aged(1_000, task("7"))]).await;
    assert_eq!(rig.list_numbers(&q, State::Ready).await, [3, 5, 0, 1, 2, 4, 6, 7]);
    assert_eq!(rig.drain(&q).await, [3, 5, 0, 1, 2, 4, 6, 7]);
}

/// G8: one more failure or expiry than it had, and it is judged by all of them.
pub(super) async fn counters_count_on(open: Open) {
    let (rig, q) = (open(Rules { max_failures: 3, max_expiries: 2, ..RULES }), queue("q"));
    let all = vec![
        with_past(Past { deliveries: 2, failures: 2, ..past() }, task("0")),
        with_past(Past { deliveries: 1, expiries: 1, ..past() }, task("1")),
        with_past(Past { deliveries: 9, failures: 9, expiries: 9, ..past() }, task("2")),
    ];
    let ids = rig.import_new(&q, all).await;
    let held = rig.take(&q, 3).await;
    assert_eq!(numbers(&held), [0, 1, 2], "who has too many is no dead letter before it fails again");
    rig.give_back(&q, failed(&[held[0].token], "the last")).await;
    rig.pass(LEASE);
    assert_eq!(rig.counted(&q).await, Counts { dead: 3, inserted: 3, ..Counts::default() });
    let causes = rig.tasks(&q, &ids).await.unwrap().into_iter().map(|seen| seen.unwrap().cause.unwrap());
    assert_eq!(causes.collect::<Vec<_>>(), [Cause::Failures, Cause::Expiries, Cause::Expiries]);
}

/// G3: for the window, whatever became of it; whatever the second call says of its past.
pub(super) async fn what_was_imported_before_is_answered_again(open: Open) {
    let (mut rig, q) = (open(RULES), queue("q"));
    let all =
        vec![with_past(past(), with_key(0, "k")), with_past(past(), with_key(1, "k")), with_past(past(), task("2"))];
    let first = rig.import_all(&q, all.clone()).await;
    assert_eq!(
        first[1],
        Inserted { ids: first[0].ids.clone(), duplicates: vec![0], replayed: false, ..Default::default() }
    );
    let again = |first: &[Inserted]| -> Vec<Inserted> {
        first.iter().map(|one| Inserted { replayed: true, ..one.clone() }).collect()
    };
    let changed = all.into_iter().map(|task| with_past(Past { deliveries: 7, ..past() }, task)).collect::<Vec<_>>();
    assert_eq!(rig.import_all(&q, changed.clone()).await, again(&first));
    // All is gone, and the queue is opened anew.
    let held = tokens(&rig.take(&q, 9).await);
    rig.ack(&q, &held).await.unwrap();
    for disturbance in rig.engine.disturbances() {
        rig.engine.disturb(*disturbance).await;
    }
    rig.pass(299_999);
    assert_eq!(rig.import_all(&q, changed).await, again(&first));
    assert_eq!(rig.counted(&q).await, Counts { inserted: 2, acked: 2, ..Counts::default() });
    // The same task twice in a call.
    let twice = with_past(past(), task("3"));
    let answers = rig.import_all(&q, vec![twice.clone(), twice]).await;
    assert_eq!(answers.iter().map(|one| one.replayed).collect::<Vec<_>>(), [false, true]);
    assert_eq!(answers[0].ids, answers[1].ids);
    assert_eq!(rig.drain(&q).await, [3]);
}

/// G3: however long ago it was imported, and whatever it is by now.
pub(super) async fn a_task_is_known_again_as_long_as_it_is_there(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let all = vec![
        with_past(dead(Cause::Failures), with_key(0, "k")),
        with_past(past(), task("1")),
        NewTask { due: Some(Due::At(START + 10_000_000)), ..with_past(past(), task("2")) },
        with_past(past(), task("3")),
    ];
    let ids = rig.import_new(&q, all.clone()).await;
    rig.insert_new(&q, vec![with_key(9, "k")]).await;
    rig.pass(1_000_000);
    let held = rig.take(&q, 2).await;
    assert_eq!(numbers(&held), [1, 3]);
    let told: Vec<Inserted> = rig.import_all(&q, all.clone()).await;
    let known = |id: &TaskId| Inserted { ids: vec![*id], duplicates: Vec::new(), replayed: true, ..Default::default() };
    assert_eq!(told, ids.iter().map(known).collect::<Vec<_>>());
    assert_eq!(
        rig.counted(&q).await,
        Counts { ready: 1, scheduled: 1, leased: 2, dead: 1, inserted: 5, ..Counts::default() }
    );
    // One that is gone by then is a new one.
    rig.delete(&q, &ids[..1]).await.unwrap();
    rig.ack_one(&q, held[0].token).await;
    let told: Vec<bool> = rig.import_all(&q, all).await.iter().map(|one| one.replayed).collect();
    assert_eq!(told, [false, false, true, true]);
    assert_eq!(rig.drain(&q).await, [9, 1]);
    assert_eq!(rig.list_numbers(&q, State::Dead).await, [0]);
}

/// The same request with other content is refused, and the others of the call are imported all the same.
pub(super) async fn an_imported_task_is_a_request_of_its_own(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let first = request(with_past(past(), task("0")));
    let other = Insert { request: first.request.clone(), ..request(with_past(past(), task("1"))) };
    let reused = RequestKey { fingerprint: Fingerprint([2; 16]), ..first.request.clone().unwrap() };
    let other = Insert { request: Some(reused), ..other };
    let answers = rig.import(&q, vec![first, other, request(with_past(past(), task("2")))]).await.unwrap();
    assert!(answers[0].is_ok() && answers[2].is_ok(), "{answers:?}");
    assert!(matches!(answers[1], Err(StoreError::RequestIdReused)), "{answers:?}");
    assert_eq!(rig.drain(&q).await, [0, 2]);
}

/// A dead letter has none: it neither is a duplicate nor keeps the key from others.
pub(super) async fn a_unique_key_is_of_one_living_task(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let holder = rig.insert_new(&q, vec![with_key(0, "k")]).await[0];
    let buried = rig.import_new(&q, vec![with_past(dead(Cause::Rejected), with_key(1, "k"))]).await[0];
    let free = rig.import_new(&q, vec![with_past(dead(Cause::Rejected), with_key(2, "free"))]).await[0];
    let told =
        rig.import_all(&q, vec![with_past(past(), with_key(3, "k")), with_past(past(), with_key(4, "free"))]).await;
    assert_eq!((&*told[0].ids, &*told[0].duplicates), (&[holder][..], &[0][..]));
    assert!(told[1].duplicates.is_empty());
    assert_eq!(rig.insert(&q, insert(vec![with_key(5, "free")])).await.unwrap().ids, told[1].ids);
    assert_eq!(rig.redrive(&q, &[buried, free]).await.unwrap(), [Redriven::Duplicate; 2]);
    let held = tokens(&rig.take(&q, 9).await);
    rig.ack(&q, &held).await.unwrap();
    assert_eq!(rig.redrive(&q, &[buried, free]).await.unwrap(), [Redriven::Ready; 2]);
    assert_eq!(rig.insert(&q, insert(vec![with_key(6, "k")])).await.unwrap().ids, [buried]);
    assert_eq!(rig.drain(&q).await, [1, 2]);
}

/// G14: what was over before it came is counted as inserted and expired, and never delivered; a dead letter is, when it is redriven.
pub(super) async fn what_is_over_is_gone(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let waits = |task| NewTask { due: Some(Due::At(START + 10)), ..task };
    let keyed =
        |number| planned(number, Plan { ttl: Some(60_000), unique_key: Some("k".to_owned()), ..Plan::default() });
    let all = vec![
        with_past(past(), keyed(0)),
        waits(with_past(past(), with_ttl(1, 59_999))),
        with_past(dead(Cause::Expiries), with_ttl(2, 1)),
        with_past(past(), with_ttl(3, 60_001)),
        with_past(past(), with_key(4, "k")),
    ];
    let ids = rig.import_new(&q, all).await;
    assert_eq!(numbers(&rig.take(&q, 9).await), [3, 4]);
    assert_eq!(rig.counted(&q).await, Counts { leased: 2, dead: 1, inserted: 5, expired: 2, ..Counts::default() });
    assert_eq!(rig.redrive(&q, &ids[2..3]).await.unwrap(), [Redriven::Expired]);
    assert_eq!(rig.counted(&q).await, Counts { leased: 2, inserted: 5, expired: 3, ..Counts::default() });
}

/// To the next one of the same call, too.
pub(super) async fn what_is_over_gives_its_key_and_its_room_up(open: Open) {
    for (limit, max) in [(Setting::MaxTasks, 2), (Setting::MaxBytes, 2)] {
        let (rig, q) = (open(RULES), queue("q"));
        rig.set(&q, limit, max).await;
        let over = Plan { ttl: Some(60_000), unique_key: Some("k".to_owned()), ..Plan::default() };
        rig.import_new(&q, vec![with_past(past(), planned(0, over)), with_past(past(), with_key(1, "k"))]).await;
        rig.import_new(&q, vec![with_past(past(), task("2"))]).await;
        let told = rig.import(&q, vec![request(with_past(past(), task("3")))]).await.unwrap();
        assert!(matches!(told[..], [Err(StoreError::QueueFull(..))]), "{told:?}");
        assert_eq!(rig.drain(&q).await, [1, 2]);
        assert_eq!(rig.counted(&q).await, Counts { leased: 2, inserted: 3, expired: 1, ..Counts::default() });
    }
}

/// G4: also when it is imported a second time, beside one that would like to have the key.
pub(super) async fn what_is_held_keeps_its_key_though_it_is_over(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let ends = Plan { ttl: Some(60_010), unique_key: Some("k".to_owned()), ..Plan::default() };
    let known = with_past(past(), planned(0, ends));
    let id = rig.import_new(&q, vec![known.clone()]).await[0];
    let held = rig.take_one(&q).await.token;
    rig.beat_one(&q, held, 1_000_000).await;
    rig.pass(700_000);
    let told = rig.import_all(&q, vec![known, with_past(past(), with_key(1, "k"))]).await;
    assert!(told[0].replayed && told[0].duplicates.is_empty(), "{told:?}");
    assert_eq!((&*told[1].ids, &*told[1].duplicates), (&[id][..], &[0][..]));
    assert_eq!(rig.counted(&q).await, Counts { leased: 1, inserted: 1, ..Counts::default() });
    assert_eq!(rig.ack_one(&q, held).await, Outcome::Applied);
}

/// G13: no limit counts dead letters; what has no room is refused alone, and is imported later.
pub(super) async fn a_full_queue_takes_dead_letters_only(open: Open) {
    for (limit, max) in [(Setting::MaxTasks, 2), (Setting::MaxBytes, 2)] {
        let (rig, q) = (open(RULES), queue("q"));
        rig.set(&q, limit, max).await;
        let all = [
            with_past(past(), task("0")),
            with_past(dead(Cause::Failures), task("1")),
            with_past(past(), of_priority(2, 1)),
            with_past(past(), task("3")),
            with_past(dead(Cause::Failures), with_key(4, "k")),
        ];
        let inserts = all.map(request).to_vec();
        let told = rig.import(&q, inserts.clone()).await.unwrap();
        let is_full = |told: &Result<Inserted, StoreError>| matches!(told, Err(StoreError::QueueFull(setting, of)) if (*setting, *of) == (limit, max));
        assert_eq!(told.iter().map(is_full).collect::<Vec<_>>(), [false, false, false, true, false]);
        assert_eq!(rig.counted(&q).await, Counts { ready: 2, dead: 2, inserted: 4, ..Counts::default() });
        let held = rig.take_one(&q).await.token;
        rig.ack_one(&q, held).await;
        let told = rig.import(&q, inserts).await.unwrap();
        let replayed: Vec<bool> = told.into_iter().map(|told| told.unwrap().replayed).collect();
        assert_eq!(replayed, [true, true, true, false, true]);
        assert_eq!(rig.drain(&q).await, [0, 3]);
        assert_eq!(rig.counted(&q).await, Counts { leased: 2, dead: 2, inserted: 5, acked: 1, ..Counts::default() });
    }
}

/// G13: and knows those again that it has.
pub(super) async fn a_full_store_refuses_imports(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let known = with_past(past(), task("0"));
    rig.import_new(&q, vec![known.clone()]).await;
    rig.engine.fill().await;
    let new = with_past(dead(Cause::Failures), task(vec![b'1'; 1 << 16]));
    // Redis refuses the whole call.
    match rig.import(&q, vec![request(new)]).await {
        Err(StoreError::Full(_)) => {}
        Ok(told) => assert!(matches!(told[..], [Err(StoreError::Full(_))]), "{told:?}"),
        Err(error) => panic!("{error}"),
    }
    assert_eq!(rig.counted(&q).await, Counts { ready: 1, inserted: 1, ..Counts::default() });
    assert!(rig.import_all(&q, vec![known]).await[0].replayed);
    assert_eq!(rig.drain(&q).await, [0]);
}

/// G11, G14: as many as one call takes.
pub(super) async fn hundreds_are_imported_in_order(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    for from in [0, RECLAIM_STEP, 2 * RECLAIM_STEP] {
        let one = |number: usize| match number % 4 {
            0 => with_past(dead(Cause::Failures), task(number.to_string())),
            1 => with_past(Past { deliveries: 1, expiries: 1, ..past() }, of_priority(number, 3)),
            _ => with_past(past(), task(number.to_string())),
        };
        rig.import_new(&q, (from..from + RECLAIM_STEP).map(one).collect()).await;
    }
    let all = 3 * RECLAIM_STEP;
    let counts = Counts { ready: all as u64 * 3 / 4, dead: all as u64 / 4, inserted: all as u64, ..Counts::default() };
    assert_eq!(rig.counted(&q).await, counts);
    let of = |kinds: &'static [usize]| (0..all).filter(|number| kinds.contains(&(number % 4)));
    assert_eq!(rig.drain(&q).await, of(&[1]).chain(of(&[2, 3])).collect::<Vec<_>>());
}
