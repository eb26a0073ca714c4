//! Tasks of a state that are all dropped.

use super::*;

/// G14: those of the state, all of them, and no others, though they are more than one call drops.
pub(super) async fn all_tasks_of_a_state_are_purged(open: Open) {
    const MANY: u64 = 450;
    let rig = open(RULES);
    for (at, state) in [State::Ready, State::Scheduled, State::Leased, State::Dead].into_iter().enumerate() {
        let q = queue(&format!("q{at}"));
        let number = |part: u64, at: u64| (part * MANY + at) as usize;
        let dead: Vec<NewTask> = (0..MANY).map(|at| of_priority(number(0, at), 9)).collect();
        let held: Vec<NewTask> = (0..MANY).map(|at| of_priority(number(1, at), 5)).collect();
        let ready: Vec<NewTask> = (0..MANY).map(|at| of_priority(number(2, at), (at % 3) as u8)).collect();
        let waits: Vec<NewTask> = (0..MANY).map(|at| after(9_000 + at, with_ttl(number(3, at), 90_000))).collect();
        for tasks in [dead, held, ready, waits] {
            rig.insert_new(&q, tasks).await;
        }
        let mut held = Vec::new();
        for _ in 0..6 {
            held.extend(tokens(&rig.take(&q, 150).await));
        }
        for some in held[..MANY as usize].chunks(150) {
            rig.give_back(&q, rejected(some, "no")).await;
        }
        let all =
            Counts { ready: MANY, scheduled: MANY, leased: MANY, dead: MANY, inserted: 4 * MANY, ..Counts::default() };
        assert_eq!(rig.counted(&q).await, all);
        let mut purged = 0;
        loop {
            match rig.purge(&q, state).await.unwrap() {
                0 => break,
                count => purged += count,
            }
            assert_eq!(rig.counted(&q).await.purged, purged);
        }
        assert_eq!(purged, MANY);
        let left = match state {
            State::Ready => Counts { ready: 0, ..all },
            State::Scheduled => Counts { scheduled: 0, ..all },
            State::Leased => Counts { leased: 0, ..all },
            State::Dead => Counts { dead: 0, ..all },
        };
        assert_eq!(rig.counted(&q).await, Counts { purged, ..left }, "{state:?}");
        assert!(rig.list_numbers(&q, state).await.is_empty());
        let outcome = if state == State::Leased { Outcome::LeaseLost } else { Outcome::Applied };
        assert_eq!(rig.ack_one(&q, held[held.len() - 1]).await, outcome);
    }
}

/// What its time had come for is done first; and a queue that nobody knows has nothing.
pub(super) async fn a_purge_is_of_what_is_there_now(open: Open) {
    let (rig, q) = (open(RULES), queue("q"));
    assert_eq!(rig.purge(&q, State::Ready).await.unwrap(), 0);
    assert_eq!(rig.count(&q).await, None);
    rig.insert_new(&q, vec![task("0"), after(LEASE, task("1")), with_ttl(2, LEASE), task("3")]).await;
    rig.take_one(&q).await;
    rig.pass(LEASE);
    assert_eq!(rig.purge(&q, State::Leased).await.unwrap(), 0);
    assert_eq!(rig.purge(&q, State::Scheduled).await.unwrap(), 0);
    assert_eq!(rig.purge(&q, State::Ready).await.unwrap(), 3);
    assert_eq!(rig.purge(&q, State::Ready).await.unwrap(), 0);
    assert_eq!(rig.counted(&q).await, Counts { inserted: 4, expired: 1, purged: 3, ..Counts::default() });
    rig.insert_numbers(&q, 4..5).await;
    assert_eq!(rig.drain(&q).await, [4]);
}
