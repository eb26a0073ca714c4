//! Lease tokens that are malformed, old, of another queue, or used twice.

use std::time::{Duration, SystemTime};

use data_queue_proto::reason;
use data_queue_proto::v1::{Outcome, PopRequest};
use prost_types::Duration as ProtoDuration;

use crate::support::{
    PATIENCE,
    call::{
        Call, Witness, ack, ack_request, heartbeat, insert_json, outcomes, pop, pop_for, pop_request, pop_waiting,
        putback, putback_answer, unknown_token,
    },
    on_every_store, poll_until,
    server::Client,
    status::Refusal,
    unique_queue,
};

/// Acks by the way, in a pop of a queue whose tasks are all leased.
async fn ack_in_pop(client: &mut Client, queue: &str, tokens: &[String]) -> Vec<Outcome> {
    let request = PopRequest { ack_lease_tokens: tokens.to_vec(), ..pop_request(queue) };
    let answer = client.pop(request).await.expect("a pop").into_inner();
    assert_eq!(answer.task, None);
    outcomes(&answer.ack_outcomes)
}

/// Every method that takes a token answers that this one is lost.
async fn lost(client: &mut Client, queue: &str, token: &str, case: &str) {
    assert_eq!(heartbeat(client, queue, token).await, Outcome::LeaseLost, "{case}: Heartbeat");
    assert_eq!(putback(client, queue, token).await, Outcome::LeaseLost, "{case}: Putback");
    assert_eq!(ack(client, queue, token).await, Outcome::LeaseLost, "{case}: Ack");
}

on_every_store! {
    /// Row 26: a malformed token, by every method that takes tokens.
    async fn row_26_token_malformed(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        let good = witness.token.clone();
        let upper = "ABCDEF0123456789ABCDEF0123456789".to_owned();
        let bad = [
            String::new(), "a".repeat(31), "a".repeat(33), "g".repeat(32), upper, "é".repeat(16), format!(" {good}"),
            format!("{}\0", &good[..31]), "a".repeat(100_000),
        ];
        for bad in bad {
            for call in Call::every_with_tokens(&witness.queue, &[good.clone(), bad.clone()]) {
                let answer = call.send(&mut client).await;
                Refusal::invalid(reason::LEASE_TOKEN_INVALID, "lease_tokens").check("a malformed token", answer);
                witness.unchanged(&mut client, "a malformed token").await;
            }
        }
    }

    /// Row 27: a Pop that is refused for any field applies none of its acks.
    async fn row_27_refused_pop_acks_nothing(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        let good = PopRequest { ack_lease_tokens: vec![witness.token.clone()], ..pop_request(&witness.queue) };
        let negative = Some(ProtoDuration { seconds: -1, nanos: 0 });
        let bad_token = vec![witness.token.clone(), "no token".to_owned()];
        let cases = [
            (PopRequest { lease: negative, ..good.clone() }, reason::LEASE_OUT_OF_RANGE, "lease"),
            (PopRequest { wait: negative, ..good.clone() }, reason::WAIT_OUT_OF_RANGE, "wait"),
            (PopRequest { request_id: "r".repeat(129), ..good.clone() }, reason::REQUEST_ID_INVALID, "request_id"),
            (PopRequest { queue: "no queue".to_owned(), ..good.clone() }, reason::QUEUE_NAME_INVALID, "queue"),
            (PopRequest { ack_lease_tokens: bad_token, ..good.clone() }, reason::LEASE_TOKEN_INVALID, "lease_tokens"),
        ];
        for (request, reason, field) in cases {
            Refusal::invalid(reason, field).check(reason, client.pop(request).await);
            witness.unchanged(&mut client, reason).await;
        }
        assert_eq!(ack(&mut client, &witness.queue, &witness.token).await, Outcome::Applied);
    }

    /// Row 28, G5: tokens that nobody holds answer LEASE_LOST and change nothing.
    async fn row_28_token_not_held(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        let queue = witness.queue.clone();
        let last = if witness.token.ends_with('0') { "1" } else { "0" };
        let near = format!("{}{last}", &witness.token[..31]);
        let all_zeros = "0".repeat(32);
        for token in [&unknown_token(), &all_zeros, &"f".repeat(32), &near] {
            lost(&mut client, &queue, token, token).await;
            witness.unchanged(&mut client, token).await;
        }
        // Good, with another queue: one that is there and one that is not.
        let other = Witness::new(&mut client).await;
        for queue in [other.queue.clone(), unique_queue("unknown")] {
            lost(&mut client, &queue, &witness.token, "another queue's token").await;
            witness.unchanged(&mut client, "another queue's token").await;
        }
        let refused = ack_in_pop(&mut client, &unique_queue("unknown"), &[all_zeros]).await;
        assert_eq!(refused, [Outcome::LeaseLost]);
    }

    /// Row 28, G4 and G5: the token of an earlier delivery, while another holds the task.
    async fn row_28_token_of_an_earlier_delivery(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("earlier");
        insert_json(&mut client, &queue, &["1"]).await;
        let first = pop(&mut client, &queue).await.unwrap();
        assert_eq!(putback(&mut client, &queue, &first.lease_token).await, Outcome::Applied);
        let second = pop_for(&mut client, &queue, Duration::from_secs(600)).await;
        assert_eq!((&second.id, second.deliveries, second.expiries), (&first.id, 2, 0));
        assert_ne!(second.lease_token, first.lease_token);
        lost(&mut client, &queue, &first.lease_token, "the earlier token").await;
        assert_eq!(ack_in_pop(&mut client, &queue, &[first.lease_token]).await, [Outcome::LeaseLost]);
        assert_eq!(ack(&mut client, &queue, &second.lease_token).await, Outcome::Applied);
    }

    /// Row 29, G7: ack is final, and may be repeated in a call and over calls.
    async fn row_29_ack_twice(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("twice");
        insert_json(&mut client, &queue, &["1", "2", "3"]).await;
        let one = pop(&mut client, &queue).await.unwrap().lease_token;
        let two = pop(&mut client, &queue).await.unwrap().lease_token;
        let three = pop(&mut client, &queue).await.unwrap().lease_token;

        let request = ack_request(&queue, &[one.clone(), two.clone(), one.clone(), unknown_token()]);
        let answer = client.ack(request.clone()).await.unwrap().into_inner();
        let expected = [Outcome::Applied, Outcome::Applied, Outcome::AlreadyAcked, Outcome::LeaseLost];
        assert_eq!(outcomes(&answer.outcomes), expected);
        let answer = client.ack(request).await.unwrap().into_inner();
        let expected = [Outcome::AlreadyAcked, Outcome::AlreadyAcked, Outcome::AlreadyAcked, Outcome::LeaseLost];
        assert_eq!(outcomes(&answer.outcomes), expected);

        let answered = ack_in_pop(&mut client, &queue, &[three.clone(), three.clone(), one.clone()]).await;
        assert_eq!(answered, [Outcome::Applied, Outcome::AlreadyAcked, Outcome::AlreadyAcked]);
        assert_eq!(ack(&mut client, &queue, &three).await, Outcome::AlreadyAcked);

        // What was acked stays gone, whatever is asked for it.
        for token in [&one, &two, &three] {
            assert_eq!(heartbeat(&mut client, &queue, token).await, Outcome::AlreadyAcked);
            assert_eq!(putback(&mut client, &queue, token).await, Outcome::AlreadyAcked);
        }
        assert_eq!(pop(&mut client, &queue).await, None);
    }

    /// Row 30: after the deadline the answer and the next pop agree.
    async fn row_30_after_the_deadline(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        for operation in ["Ack", "Heartbeat", "Putback"] {
            let queue = unique_queue("late");
            insert_json(&mut client, &queue, &["1"]).await;
            let first = pop_for(&mut client, &queue, Duration::from_millis(100)).await;
            // The store runs on this machine, by its clock.
            let deadline = SystemTime::try_from(first.lease_expires_at.expect("a deadline")).unwrap();
            poll_until("the deadline", PATIENCE, async || (SystemTime::now() > deadline).then_some(())).await;
            let outcome = match operation {
                "Ack" => ack(&mut client, &queue, &first.lease_token).await,
                "Heartbeat" => heartbeat(&mut client, &queue, &first.lease_token).await,
                _ => putback(&mut client, &queue, &first.lease_token).await,
            };
            let next = pop(&mut client, &queue).await;
            match (outcome, operation) {
                (Outcome::Applied, "Ack" | "Heartbeat") => assert_eq!(next, None, "{operation}"),
                (Outcome::Applied, _) => assert_eq!(next.map(|task| (task.deliveries, task.expiries)), Some((2, 0))),
                (Outcome::LeaseLost, _) => {
                    assert_eq!(next.map(|task| (task.deliveries, task.expiries)), Some((2, 1)), "{operation}");
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// Rows 30 and 31, G5 and G15: reclaimed by the next pop, a late holder has lost its lease.
    async fn row_30_reclaimed(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("reclaimed");
        insert_json(&mut client, &queue, &["1"]).await;
        let first = pop_for(&mut client, &queue, Duration::from_millis(100)).await;
        let second = pop_waiting(&mut client, &queue).await;
        assert_eq!((&second.id, second.deliveries, second.expiries), (&first.id, 2, 1));
        lost(&mut client, &queue, &first.lease_token, "a reclaimed token").await;
        assert_eq!(ack(&mut client, &queue, &second.lease_token).await, Outcome::Applied);
        lost(&mut client, &queue, &first.lease_token, "a reclaimed token, after the ack").await;
    }

    /// Row 31: a heartbeat after the putback.
    async fn row_31_heartbeat_after_putback(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        let queue = unique_queue("back");
        insert_json(&mut client, &queue, &["1"]).await;
        let task = pop(&mut client, &queue).await.unwrap();
        assert_eq!(putback(&mut client, &queue, &task.lease_token).await, Outcome::Applied);
        assert_eq!(heartbeat(&mut client, &queue, &task.lease_token).await, Outcome::LeaseLost);
        assert_eq!(pop(&mut client, &queue).await.map(|task| task.deliveries), Some(2));
        witness.unchanged(&mut client, "a heartbeat in another queue").await;
    }

    /// Row 32: a second putback, in a call and over calls.
    async fn row_32_putback_twice(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("back");
        insert_json(&mut client, &queue, &["1"]).await;
        let token = pop(&mut client, &queue).await.unwrap().lease_token;
        let answer = putback_answer(&mut client, &queue, &[token.clone(), token.clone()]).await;
        assert_eq!(outcomes(&answer.outcomes), [Outcome::Applied, Outcome::LeaseLost]);
        assert_eq!(answer.put_back, 1);
        assert_eq!(putback(&mut client, &queue, &token).await, Outcome::LeaseLost);
        assert_eq!(pop(&mut client, &queue).await.map(|task| task.deliveries), Some(2));
        assert_eq!(pop(&mut client, &queue).await, None);
    }
}
