//! Queues with shards: all calls see one queue, whatever a store makes of the number.

use std::collections::BTreeSet;

use super::*;

const SHARDS: u64 = 4;

fn sorted<T: Ord>(all: impl IntoIterator<Item = T>) -> Vec<T> {
    let mut all: Vec<T> = all.into_iter().collect();
    all.sort();
    all
}

/// A queue with shards and some tasks, one insert each.
async fn filled(open: Open, count: usize) -> (Rig, QueueName) {
    let (rig, q) = (open(RULES), queue("q::spread"));
    assert_eq!(rig.set(&q, Setting::Shards, SHARDS).await.shards(), SHARDS);
    for number in 0..count {
        rig.insert_numbers(&q, number..number + 1).await;
    }
    (rig, q)
}

/// Of all steps.
async fn purged(rig: &Rig, q: &QueueName, state: State) -> u64 {
    let mut all = 0;
    loop {
        match rig.purge(q, state).await.unwrap() {
            0 => return all,
            some => all += some,
        }
    }
}

/// Whatever the state of its last task; and what is refused changes nothing else either.
pub(super) async fn they_change_only_while_the_queue_is_empty(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    for (before, after) in
        [(None, Some(4)), (Some(4), Some(16)), (Some(16), Some(2)), (Some(2), None), (None, Some(64))]
    {
        assert_eq!(rig.settings(&q).await.unwrap().unwrap_or_default().get(Setting::Shards), before);
        let refused = async |state| {
            let changes = [(Setting::Lease, Some(77)), (Setting::Shards, after)];
            let done = rig.change(&q, &changes).await;
            assert!(matches!(done, Err(StoreError::NotEmpty)), "{state}: {done:?}");
            let settings = rig.settings(&q).await.unwrap().unwrap();
            assert_eq!((settings.get(Setting::Shards), settings.get(Setting::Lease)), (before, None), "{state}");
        };
        rig.insert_numbers(&q, 0..1).await;
        refused("ready").await;
        let held = rig.take_one(&q).await;
        refused("leased").await;
        rig.give_back(&q, PutBack { delay: Some(10), ..back(&[held.token]) }).await;
        refused("scheduled").await;
        rig.pass(10);
        let held = rig.take_one(&q).await;
        rig.give_back(&q, rejected(&[held.token], "no")).await;
        refused("dead").await;
        // The same number, with something else, is no change of it.
        rig.change(&q, &[(Setting::Lease, Some(5)), (Setting::Shards, before)]).await.unwrap();
        rig.set(&q, Setting::Lease, None).await;
        assert_eq!(purged(&rig, &q, State::Dead).await, 1);
        rig.insert(&q, insert(vec![with_ttl(1, 50)])).await.unwrap();
        refused("with an end").await;
        rig.pass(50);
        assert_eq!(rig.set(&q, Setting::Shards, after).await.get(Setting::Shards), after);
        rig.insert_numbers(&q, 2..9).await;
        assert_eq!(sorted(rig.drain(&q).await), (2..9).collect::<Vec<_>>());
        purged(&rig, &q, State::Leased).await;
    }
}

/// G1, G2, G5, G7, G14: what one call leased comes from several shards, and each token does what it should.
pub(super) async fn each_task_is_delivered_once_and_ends_once(open: Open) {
    let (rig, q) = filled(open, 100).await;
    assert_eq!(rig.counted(&q).await, Counts { ready: 100, inserted: 100, ..Counts::default() });
    let mut held = rig.take(&q, 60).await;
    assert_eq!(held.len(), 60, "one call finds all that it may have");
    held.extend(rig.take(&q, 60).await);
    assert_eq!(sorted(numbers(&held)), (0..100).collect::<Vec<_>>());
    assert_eq!(sorted(tokens(&held)).windows(2).filter(|two| two[0] == two[1]).count(), 0);
    assert!(rig.take(&q, 1).await.is_empty());
    let all = tokens(&held);
    let beaten = rig.heartbeat(&q, &all, Some(2 * LEASE)).await.unwrap();
    assert_eq!(
        (beaten.outcomes, beaten.earliest),
        (vec![Outcome::Applied; 100], Some((2 * LEASE, rig.now() + 2 * LEASE)))
    );
    assert_eq!(rig.ack(&q, &all[..50]).await.unwrap(), [Outcome::Applied; 50]);
    assert_eq!(
        rig.ack(&q, &all[40..60]).await.unwrap(),
        [[Outcome::AlreadyAcked; 10], [Outcome::Applied; 10]].concat()
    );
    assert_eq!(
        rig.put_back(&q, &all[50..100]).await,
        [vec![Outcome::AlreadyAcked; 10], vec![Outcome::Applied; 40]].concat()
    );
    assert_eq!(rig.counted(&q).await, Counts { ready: 40, inserted: 100, acked: 60, ..Counts::default() });
    let again = rig.take(&q, 100).await;
    assert_eq!(sorted(numbers(&again)), sorted(numbers(&held[60..])));
    assert!(again.iter().all(|task| task.deliveries == 2));
    // Acks ride with a pop, whichever shard it pops from.
    let rest = tokens(&again);
    let popped = rig.pop(&q, Pop { acks: [&rest[..], &all[..1]].concat(), ..pop(5) }).await.unwrap();
    assert_eq!(popped.acks, [vec![Outcome::Applied; 40], vec![Outcome::AlreadyAcked]].concat());
    assert!(popped.tasks.is_empty());
    assert_eq!(rig.counted(&q).await, Counts { inserted: 100, acked: 100, ..Counts::default() });
}

/// G5: a token that is of no shard is not held, and no shard is asked in vain.
pub(super) async fn tokens_of_no_shard_are_not_held(open: Open) {
    let (rig, q) = filled(open, 8).await;
    let held = rig.take(&q, 8).await;
    let forged: Vec<Token> = [0, 3, 4, 63, 64, 200, 255]
        .map(|shard| {
            let mut token = held[0].token;
            (token.0[0], token.0[5]) = (shard, token.0[5] ^ 1);
            token
        })
        .to_vec();
    let mixed = [&forged[..], &tokens(&held)[..2]].concat();
    let expected = [vec![Outcome::LeaseLost; 7], vec![Outcome::Applied; 2]].concat();
    assert_eq!(rig.heartbeat(&q, &mixed, None).await.unwrap().outcomes, expected);
    assert_eq!(rig.put_back(&q, &mixed).await, expected);
    assert_eq!(rig.ack(&q, &forged).await.unwrap(), [Outcome::LeaseLost; 7]);
    assert_eq!(rig.counted(&q).await, Counts { ready: 2, leased: 6, inserted: 8, ..Counts::default() });
}

/// G3: the same request goes where it went.
pub(super) async fn a_repeated_insert_gets_the_first_answer(open: Open) {
    let (rig, q) = filled(open, 0).await;
    for request in 0..20 {
        let id = format!("r{request}");
        let first = rig.insert_repeatably(&q, request..request + 3, &id).await;
        let second = rig.insert_repeatably(&q, request..request + 3, &id).await;
        assert_eq!(second, Inserted { replayed: true, ..first });
        let other = Insert { request: Some(key(&id, 2)), ..insert(tasks(0..1)) };
        assert!(matches!(rig.insert(&q, other).await, Err(StoreError::RequestIdReused)));
    }
    assert_eq!(rig.counted(&q).await.ready, 60);
}

/// G3: as many runs as there may be shards, and all of them again.
pub(super) async fn a_producers_numbers_are_known_in_every_shard(open: Open) {
    let (rig, q) = filled(open, 0).await;
    let produce = |numbers: Range<u64>| Produce {
        producer: "p".to_owned(),
        inserts: numbers
            .map(|number| NumberedInsert {
                number,
                fingerprint: Fingerprint([1; 16]),
                tasks: tasks(number as usize..number as usize + 1),
            })
            .collect(),
        waiting_here: 0,
        ..Default::default()
    };
    let first = rig.produce(&q, produce(1..201)).await.unwrap();
    assert!(first.refused.is_none() && first.inserted.len() == 200 && first.inserted.iter().all(|one| !one.replayed));
    let second = rig.produce(&q, produce(101..301)).await.unwrap();
    assert!(second.refused.is_none() && second.inserted.len() == 200);
    for (at, inserted) in second.inserted.iter().enumerate() {
        assert_eq!(inserted.replayed, at < 100, "{at}");
        assert!(at >= 100 || inserted.ids == first.inserted[100 + at].ids);
    }
    assert_eq!(sorted(rig.drain(&q).await), (1..301).collect::<Vec<_>>());
}

/// One holder of a key, wherever its task is; keys of one insert may belong together or not, and then nothing is done.
pub(super) async fn a_unique_key_is_unique_in_the_whole_queue(open: Open) {
    let (rig, q) = filled(open, 0).await;
    for number in 0..20 {
        let key = format!("k{number}");
        let both = vec![with_key(number, &key), task((100 + number).to_string())];
        let first = rig.insert(&q, insert(both)).await.unwrap().ids;
        let second = rig.insert(&q, insert(vec![with_key(number, &key)])).await.unwrap();
        assert_eq!((second.ids, second.duplicates), (first[..1].to_vec(), vec![0]));
    }
    let before = rig.counted(&q).await;
    assert_eq!(before.ready, 40);
    let apart = rig.insert(&q, insert((0..16).map(|number| with_key(number, &format!("n{number}"))).collect())).await;
    let after = rig.counted(&q).await.ready - before.ready;
    assert!(matches!((&apart, after), (Err(StoreError::KeysApart(4)), 0) | (Ok(_), 16)), "{apart:?} {after}");
}

/// A repeated pop answers what the first one still holds, in whichever shards, and pops anew when nothing is left.
pub(super) async fn a_repeated_pop_gets_the_same_delivery(open: Open) {
    let (rig, q) = filled(open, 40).await;
    for round in 0..4 {
        let request = format!("r{round}");
        let first = rig.pop(&q, attempt(10, &request, 1)).await.unwrap();
        assert_eq!(first.tasks.len(), 10);
        let again = rig.pop(&q, attempt(10, &request, 2)).await.unwrap();
        assert!(again.known);
        assert_eq!(sorted(tokens(&again.tasks)), sorted(tokens(&first.tasks)));
        assert!(again.tasks.iter().all(|task| task.deliveries == 1));
        rig.ack(&q, &tokens(&first.tasks)[..7]).await.unwrap();
        let rest = rig.pop(&q, attempt(10, &request, 3)).await.unwrap();
        assert_eq!(sorted(tokens(&rest.tasks)), sorted(tokens(&first.tasks)[7..].to_vec()));
        rig.ack(&q, &tokens(&rest.tasks)).await.unwrap();
        let reused = Pop { request: Some(PopRequest { key: key(&request, 2), attempt: name_of_attempt(4) }), ..pop(1) };
        assert!(matches!(rig.pop(&q, reused).await, Err(StoreError::RequestIdReused)));
    }
    assert_eq!(rig.counted(&q).await, Counts { inserted: 40, acked: 40, ..Counts::default() });
}

/// G8: what a pop leased in any shard goes back uncounted.
pub(super) async fn a_withdrawn_pop_gives_all_back(open: Open) {
    let (rig, q) = filled(open, 40).await;
    let call = pop(30);
    let stem = call.stem;
    assert_eq!(rig.pop(&q, call).await.unwrap().tasks.len(), 30);
    assert_eq!(rig.withdraw(&q, Withdrawal { stem, max_tasks: 30, request: None }).await.unwrap(), 30);
    let held = rig.take(&q, 40).await;
    assert!(held.len() == 40 && held.iter().all(|task| task.deliveries == 1));
    assert_eq!(rig.unsent(&q, &tokens(&held), None).await, [Outcome::Applied; 40]);
    assert!(rig.take(&q, 40).await.iter().all(|task| task.deliveries == 1));
}

/// G6, G15: leases run out, and tasks fall due, in every shard.
pub(super) async fn what_runs_out_comes_back_from_every_shard(open: Open) {
    let (rig, q) = filled(open, 40).await;
    rig.take(&q, 40).await;
    assert_eq!(rig.look_one(&q).await, Sight { ready: 0, due_in: Some(LEASE), reclaimed: 0 });
    rig.pass(LEASE);
    assert_eq!(rig.look_one(&q).await, Sight { ready: 40, due_in: None, reclaimed: 40 });
    let held = rig.take(&q, 40).await;
    assert!(held.iter().all(|task| (task.deliveries, task.expiries) == (2, 1)));
    rig.give_back(&q, PutBack { delay: Some(500), ..back(&tokens(&held)) }).await;
    assert_eq!(rig.counted(&q).await, Counts { scheduled: 40, inserted: 40, ..Counts::default() });
    rig.pass(500);
    let mut cursor = Default::default();
    let mut reclaimed = 0;
    loop {
        let reaped = rig.reap(cursor, 100).await.unwrap();
        reclaimed += reaped.reclaimed.iter().map(|(_, count)| count).sum::<u64>();
        cursor = reaped.next;
        if cursor == Default::default() {
            break;
        }
    }
    assert_eq!(reclaimed, 40);
    let held = rig.take(&q, 40).await;
    assert_eq!(held.len(), 40);
    rig.pass(10);
    assert_eq!(rig.held_released(&q, 11).await, 0);
    assert_eq!(rig.held_released(&q, 10).await, 40);
    assert_eq!(rig.counted(&q).await.ready, 40);
}

/// A stream takes over what the one before holds, in every shard.
pub(super) async fn a_session_is_one_in_all_shards(open: Open) {
    let (rig, q) = filled(open, 60).await;
    assert_eq!(rig.resume(&q, consumer(1, 1), LEASE, LEASE * 9).await.unwrap(), []);
    let mut held = Vec::new();
    let mut spent = Vec::new();
    for round in 0..6 {
        let step = Pop { consumer: Some(consumer(1, 1)), spent: std::mem::take(&mut spent), ..pop(5) };
        let leased = rig.pop(&q, step).await.unwrap().tasks;
        assert_eq!(leased.len(), 5);
        if round % 2 == 0 {
            rig.ack(&q, &tokens(&leased)).await.unwrap();
            spent.extend(tokens(&leased).iter().map(Token::stem));
        } else {
            held.extend(tokens(&leased));
        }
    }
    let kept = rig.keep(&q, consumer(1, 1), &held, LEASE).await.unwrap().expect("it has the session");
    assert_eq!(kept.outcomes, [Outcome::Applied; 15]);
    rig.pass(5);
    let resumed = rig.resume(&q, consumer(1, 2), LEASE, LEASE * 9).await.unwrap();
    assert!(resumed.iter().all(|(_, age)| *age == 5));
    assert_eq!(sorted(resumed.into_iter().map(|(token, _)| token)), sorted(held.clone()));
    assert!(rig.keep(&q, consumer(1, 1), &held, LEASE).await.unwrap().is_none());
    assert!(rig.pop(&q, Pop { consumer: Some(consumer(1, 1)), ..pop(5) }).await.unwrap().taken_over);
    rig.abandon(&q, consumer(1, 2), &held, 100).await.unwrap();
    rig.pass(100);
    assert_eq!(rig.look_one(&q).await.ready, 45);
}

/// Administration pages through all of it, finds each task by its id, and does what it is told wherever that is.
pub(super) async fn administration_sees_one_queue(open: Open) {
    let (rig, q) = filled(open, 50).await;
    for page in [1, 7, 50, 200] {
        let seen = rig.listed(&q, State::Ready, page).await;
        assert_eq!(sorted(seen.iter().map(|seen| number(&seen.envelope))), (0..50).collect::<Vec<_>>(), "{page}");
    }
    let ids: Vec<TaskId> = rig.listed(&q, State::Ready, 50).await.iter().map(|seen| seen.id).collect();
    assert_eq!(ids.iter().collect::<BTreeSet<_>>().len(), 50);
    for id in &ids {
        assert_eq!(rig.seen(&q, *id).await.map(|seen| seen.id), Some(*id));
    }
    let unknown = TaskId::mint(1).unwrap()[0];
    let mixed = [&ids[..10], &[unknown], &ids[10..20]].concat();
    let seen: Vec<_> = rig.tasks(&q, &mixed).await.unwrap().into_iter().map(|seen| seen.map(|seen| seen.id)).collect();
    assert_eq!(
        seen,
        [
            ids[..10].iter().map(|id| Some(*id)).collect(),
            vec![None],
            ids[10..20].iter().map(|id| Some(*id)).collect::<Vec<_>>()
        ]
        .concat()
    );
    let deleted = rig.delete(&q, &mixed).await.unwrap();
    assert_eq!(deleted, [vec![Deleted::Gone; 10], vec![Deleted::Unknown], vec![Deleted::Gone; 10]].concat());
    let held = rig.take(&q, 20).await;
    rig.give_back(&q, rejected(&tokens(&held), "no")).await;
    let dead: Vec<TaskId> = rig.listed(&q, State::Dead, 3).await.iter().map(|seen| seen.id).collect();
    assert_eq!(sorted(dead.clone()), sorted(super::ids(&held)));
    assert_eq!(rig.redrive(&q, &dead[..15]).await.unwrap(), [Redriven::Ready; 15]);
    assert_eq!(purged(&rig, &q, State::Dead).await, 5);
    let counts = Counts { ready: 25, inserted: 50, deleted: 20, purged: 5, ..Counts::default() };
    assert_eq!(rig.counted(&q).await, counts);
    rig.set(&q, Setting::Paused, 1).await;
    assert!(rig.take(&q, 50).await.is_empty());
    assert_eq!(rig.look_one(&q).await.ready, 0);
    assert_eq!(rig.counted(&q).await, Counts { paused: true, ..counts });
    rig.set(&q, Setting::Paused, None).await;
    assert_eq!(rig.take(&q, 50).await.len(), 25);
}

/// Settings hold in every shard at once, those of limits in parts.
pub(super) async fn settings_hold_in_every_shard(open: Open) {
    let (rig, q) = filled(open, 0).await;
    rig.change(&q, &[(Setting::Lease, Some(70)), (Setting::MaxTasks, Some(40))]).await.unwrap();
    let mut let_in = 0;
    for number in 0..60 {
        match rig.insert(&q, insert(tasks(number..number + 1))).await {
            Ok(_) => let_in += 1,
            Err(StoreError::QueueFull(Setting::MaxTasks, 40)) => {}
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(let_in, 40, "what may go anywhere finds the room that there is");
    let held = rig.pop(&q, Pop { lease: None, ..pop(40) }).await.unwrap().tasks;
    assert!(held.len() == 40 && held.iter().all(|task| task.left == 70));
    rig.ack(&q, &tokens(&held)).await.unwrap();
    rig.set(&q, Setting::MaxTasks, None).await;
    for number in 0..60 {
        rig.insert_numbers(&q, number..number + 1).await;
    }
}

/// A queue that was dropped is a new one, without shards, and nothing of the old one is left.
pub(super) async fn a_dropped_queue_is_gone_from_every_shard(open: Open) {
    let (rig, q) = filled(open, 40).await;
    assert!(matches!(rig.drop_queue(&q, false).await, Err(StoreError::NotEmpty)));
    rig.insert_numbers(&q, 40..50).await;
    assert_eq!(rig.counted(&q).await.ready, 50);
    assert!(rig.drop_queue(&q, true).await.unwrap());
    assert_eq!((rig.count(&q).await, rig.settings(&q).await.unwrap()), (None, None));
    assert!(!rig.drop_queue(&q, true).await.unwrap());
    assert!(rig.take(&q, 10).await.is_empty());
    rig.insert_numbers(&q, 0..3).await;
    assert_eq!(rig.drain(&q).await, [0, 1, 2]);
    purged(&rig, &q, State::Leased).await;
    rig.set(&q, Setting::Shards, SHARDS).await;
    for number in 0..40 {
        rig.insert_numbers(&q, number..number + 1).await;
    }
    assert_eq!(sorted(rig.drain(&q).await), (0..40).collect::<Vec<_>>());
    purged(&rig, &q, State::Leased).await;
    assert!(rig.drop_queue(&q, false).await.unwrap());
    assert!(rig.queues(None, 10).await.unwrap().is_empty());
}

/// Tasks that come from elsewhere are put where their keys belong, each once.
pub(super) async fn imports_go_where_they_belong(open: Open) {
    let (rig, q) = filled(open, 0).await;
    let past = || Some(Past { inserted_at: START - 5, deliveries: 2, ..Past::default() });
    let made: Vec<Insert> = (0..30)
        .map(|number| {
            let plain =
                if number % 3 == 0 { with_key(number, &format!("k{number}")) } else { task(number.to_string()) };
            Insert {
                request: Some(key(&format!("r{number}"), 1)),
                ..insert(vec![NewTask { past: past().map(Box::new), ..plain }])
            }
        })
        .collect();
    let first: Vec<Inserted> = rig.import(&q, made.clone()).await.unwrap().into_iter().map(Result::unwrap).collect();
    let second: Vec<Inserted> = rig.import(&q, made).await.unwrap().into_iter().map(Result::unwrap).collect();
    for (one, other) in first.iter().zip(&second) {
        assert_eq!((&one.ids, one.replayed, other.replayed), (&other.ids, false, true));
    }
    let held = rig.take(&q, 50).await;
    assert_eq!(sorted(numbers(&held)), (0..30).collect::<Vec<_>>());
    assert!(held.iter().all(|task| task.deliveries == 3));
}
