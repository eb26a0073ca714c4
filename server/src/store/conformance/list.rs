//! Lists of tasks, and tasks by id.

use super::*;

/// In each state, in its order, whole, as `tasks` tells them too.
pub(super) async fn every_state_is_listed_in_its_order(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_new(&q, (0..9).map(|number| of_priority(number, (number % 2) as u8 * 7)).collect()).await;
    rig.insert_new(&q, [(9, 300), (10, 100), (11, 200)].map(|(at, due)| after(due, task(at.to_string()))).into()).await;
    for lease in [500, 400] {
        rig.pop(&q, Pop { lease: Some(lease), ..pop(1) }).await.unwrap();
    }
    for _ in 0..2 {
        let held = rig.take_one(&q).await.token;
        rig.pass(1);
        rig.give_back(&q, rejected(&[held], "no")).await;
    }
    assert_eq!(rig.list_numbers(&q, State::Ready).await, [0, 2, 4, 6, 8]);
    assert_eq!(rig.list_numbers(&q, State::Scheduled).await, [10, 11, 9]);
    assert_eq!(rig.list_numbers(&q, State::Leased).await, [3, 1]);
    assert_eq!(rig.list_numbers(&q, State::Dead).await, [5, 7]);
    for state in [State::Ready, State::Scheduled, State::Leased, State::Dead] {
        for seen in rig.listed(&q, state, 1).await {
            assert_eq!(seen.state, state);
            assert_eq!(rig.seen(&q, seen.id).await, Some(seen));
        }
    }
}

/// All there is to know of a task, wherever it is.
pub(super) async fn a_task_is_seen_whole(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let plan = Plan { priority: 4, ttl: Some(10 * LEASE), unique_key: Some("k".to_owned()) };
    rig.pass(3);
    let id = rig.insert_new(&q, vec![after(10, planned(0, plan.clone()))]).await[0];
    let inserted_at = START + 3;
    let waits = Seen {
        id,
        state: State::Scheduled,
        at: Some(inserted_at + 10),
        envelope: "0".into(),
        inserted_at,
        ends_at: Some(inserted_at + 10 * LEASE),
        plan,
        deliveries: 0,
        failures: 0,
        expiries: 0,
        last_error: String::new(),
        cause: None,
        cancelled: false,
    };
    assert_eq!(rig.seen(&q, id).await.unwrap(), waits);
    rig.pass(10);
    let ready = Seen { state: State::Ready, at: None, ..waits };
    assert_eq!(rig.seen(&q, id).await.unwrap(), ready);
    let held = rig.take_one(&q).await;
    let leased = Seen { state: State::Leased, at: Some(held.expires_at), deliveries: 1, ..ready.clone() };
    assert_eq!(rig.seen(&q, id).await.unwrap(), leased);
    rig.pass(LEASE);
    let ran_out = Seen { deliveries: 1, expiries: 1, ..ready };
    assert_eq!(rig.seen(&q, id).await.unwrap(), ran_out, "looking took it back");
    let held = rig.take_one(&q).await.token;
    rig.give_back(&q, PutBack { delay: Some(9), ..failed(&[held], "e") }).await;
    let at = Some(rig.now() + 9);
    let failed =
        Seen { state: State::Scheduled, at, deliveries: 2, failures: 1, last_error: "e".to_owned(), ..ran_out };
    assert_eq!(rig.seen(&q, id).await.unwrap(), failed);
    rig.pass(9);
    let held = rig.take_one(&q).await.token;
    rig.give_back(&q, rejected(&[held], "f")).await;
    let (state, at, cause) = (State::Dead, Some(rig.now()), Some(Cause::Rejected));
    let dead = Seen { state, at, deliveries: 3, last_error: "f".to_owned(), cause, ..failed };
    assert_eq!(rig.seen(&q, id).await.unwrap(), dead);
    // A plain task has neither plan nor end.
    let plain = rig.insert_numbers(&q, 1..2).await.ids[0];
    let seen = rig.seen(&q, plain).await.unwrap();
    assert_eq!((seen.plan, seen.ends_at, seen.state), (Plan::default(), None, State::Ready));
}

/// Whatever the size of a page, each task is on one, in hundreds of every state.
pub(super) async fn hundreds_are_listed_page_by_page(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    const MANY: usize = 450;
    let priority = |number: usize| (number % 3) as u8;
    rig.insert_new(&q, (0..MANY).map(|number| of_priority(number, priority(number))).collect()).await;
    let mut ready: Vec<usize> = (0..MANY).collect();
    ready.sort_by_key(|number| (2 - priority(*number), *number));
    let scheduled = (0..MANY).map(|number| after(10 + number as u64 / 100, task(number.to_string()))).collect();
    rig.insert_new(&q, scheduled).await;
    for (state, expected) in [(State::Ready, ready.clone()), (State::Scheduled, (0..MANY).collect())] {
        pages_are_whole(&rig, &q, state, &expected).await;
    }
    let mut held = Vec::new();
    for _ in 0..3 {
        held.extend(tokens(&rig.take(&q, MANY / 3).await));
    }
    pages_are_whole(&rig, &q, State::Leased, &ready).await;
    for held in held.chunks(200) {
        rig.give_back(&q, rejected(held, "no")).await;
    }
    let mut dead: Vec<(TaskId, usize)> =
        rig.listed(&q, State::Dead, MANY).await.iter().map(|seen| (seen.id, number(&seen.envelope))).collect();
    assert_eq!(dead.len(), MANY);
    dead.sort_unstable();
    let dead: Vec<usize> = dead.into_iter().map(|(_, number)| number).collect();
    pages_are_whole(&rig, &q, State::Dead, &dead).await;
}

async fn pages_are_whole(rig: &Rig, q: &QueueName, state: State, expected: &[usize]) {
    for page in [37, 200, 1_000] {
        let listed: Vec<usize> = rig.listed(q, state, page).await.iter().map(|seen| number(&seen.envelope)).collect();
        assert_eq!(listed, expected, "{state:?}, {page} a page");
    }
}

/// A task that stays is on exactly one page, whatever goes and comes between the pages.
pub(super) async fn pages_are_stable_while_others_come_and_go(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    rig.insert_new(&q, (0..12).map(|number| of_priority(number, 1)).collect()).await;
    let list = async |after: Option<&Vec<u8>>| {
        let page = rig.list(&q, State::Ready, after, 4).await.unwrap().unwrap();
        (page.tasks.iter().map(|seen| number(&seen.envelope)).collect::<Vec<_>>(), page.next)
    };
    let (first, mut next) = list(None).await;
    assert_eq!(first, [0, 1, 2, 3]);
    // The end of the page goes, others go to the head, to the tail, and to other priorities.
    let held = tokens(&rig.take(&q, 6).await);
    rig.put_back(&q, &held[..2]).await;
    rig.ack_one(&q, held[3]).await;
    rig.insert_new(&q, vec![of_priority(12, 1), of_priority(13, 2), of_priority(14, 0)]).await;
    let mut others = Vec::new();
    while let Some(place) = next {
        let page = list(Some(&place)).await;
        let again = list(Some(&place)).await;
        assert_eq!(again, page, "a place is good for more than one look");
        others.extend(page.0);
        next = page.1;
        let head = tokens(&rig.take(&q, 1).await);
        rig.put_back(&q, &head).await;
    }
    others.retain(|number| (6..12).contains(number));
    assert_eq!(others, [6, 7, 8, 9, 10, 11]);
}

/// Some names and places are of nobody.
pub(super) async fn what_is_unknown_is_not_listed(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    let nobody = TaskId::mint(2).unwrap();
    assert_eq!(rig.list(&q, State::Ready, None, 10).await.unwrap(), None);
    assert_eq!(rig.tasks(&q, &nobody).await.unwrap(), [None, None]);
    let id = rig.insert_numbers(&q, 0..1).await.ids[0];
    let asked = [nobody[0], id, nobody[0].with_plan(true), id];
    let seen: Vec<_> = rig.tasks(&q, &asked).await.unwrap().into_iter().map(|seen| seen.map(|seen| seen.id)).collect();
    assert_eq!(seen, [None, Some(id), None, Some(id)]);
    assert_eq!(rig.tasks(&q, &[]).await.unwrap(), []);
    assert_eq!(rig.tasks(&queue("other"), &[id]).await.unwrap(), [None]);
    for state in [State::Ready, State::Scheduled, State::Leased, State::Dead] {
        for place in [vec![], b"nobody".to_vec(), vec![0xff; 200]] {
            let refused = rig.list(&q, state, Some(&place), 10).await;
            assert!(matches!(refused, Err(StoreError::PlaceUnknown)), "{state:?} {place:?}: {refused:?}");
        }
    }
    assert_eq!(rig.queues(None, 10).await.unwrap(), [q], "looking makes no queue");
}
