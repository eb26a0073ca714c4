//! What every store promises, as one suite on the traits. A behaviour that is not here is not a promise.
//!
//! The cases are grouped by noun, and each names the guarantee (G1 to G16) of the contract that it proves. Every store runs
//! every case: a further store is one line in [`conformance!`] and, in [`engines`], one function that opens it. Time stands
//! still unless a case steps it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod ack;
mod admin;
mod dead;
mod delete;
mod drop_queue;
mod engines;
mod failure;
mod full;
mod heartbeat;
mod import;
mod insert;
mod isolation;
mod life;
mod limits;
mod list;
mod model;
mod pop;
mod priority;
mod produce;
mod purge;
mod reap;
mod reclaim;
mod redis_only;
mod redrive;
mod release;
mod retry;
mod rig;
mod schedule;
mod session;
mod settings;
mod shards;
mod support;
mod topologies;
mod ttl;
mod unique;

use std::ops::Range;

use async_trait::async_trait;
use bytes::Bytes;

use self::{
    engines::{memory, redis, sqlite},
    rig::{Disturbance, Engine, Rig},
    topologies::{cluster, sentinels, tls},
};
use super::{
    Admin, Attempt, Backoff, Cause, Consumer, Counts, Deleted, Due, Fingerprint, Insert, Inserted, Kept, Leased,
    MAX_PRIORITY, Millis, NewTask, NumberedInsert, Outcome, Past, Plan, Pop, PopRequest, Popped, Produce, Produced,
    PutBack, QueueName, RECLAIM_STEP, Redriven, Release, Released, Remember, RequestKey, Rules, SESSION_KEPT, Seen,
    SessionId, Setting, Settings, Sight, State, Stem, Store, StoreError, TaskId, Token, Withdrawal,
};

/// Runs every case on every store that is named here.
macro_rules! conformance {
    ($($store:ident => $run:ident $open:ident),+ $(,)?) => { $(
        mod $store {
            $run! {
                $open,
                insert {
                    what_was_inserted_is_delivered_byte_for_byte,
                    tasks_come_out_in_the_order_they_went_in,
                    a_thousand_tasks_go_in_at_once,
                    equal_envelopes_are_separate_tasks,
                    a_repeated_request_gets_the_first_answer,
                    a_reused_request_id_is_refused,
                    request_ids_are_per_queue_and_per_operation,
                    without_a_request_nothing_is_remembered,
                    a_second_run_changes_nothing,
                    a_second_run_that_comes_late_changes_nothing,
                    a_request_is_remembered_for_the_window_and_forgotten_after_two,
                    the_newest_half_of_the_requests_is_remembered,
                }
                produce {
                    inserts_of_a_producer_come_out_in_the_order_of_their_numbers,
                    a_thousand_tasks_go_in_with_one_number,
                    a_number_that_was_used_is_answered_again,
                    known_numbers_and_new_ones_may_come_together,
                    a_second_run_changes_nothing,
                    a_second_run_that_comes_when_the_producer_is_forgotten_changes_nothing,
                    a_number_with_other_content_is_refused_with_all_behind_it,
                    the_last_1024_answers_are_remembered,
                    numbers_have_64_bits,
                    producers_and_queues_are_apart,
                    a_producer_is_forgotten_when_it_was_quiet_for_two_windows,
                    of_too_many_producers_the_oldest_is_forgotten,
                    a_full_store_refuses_new_numbers_and_answers_known_ones,
                }
                pop {
                    an_unknown_queue_is_empty_and_is_not_made,
                    a_batch_has_at_most_max_tasks,
                    a_batch_ends_at_max_bytes_but_has_one_task,
                    tokens_are_the_stem_and_the_position,
                    a_delivery_tells_its_lease,
                    counters_tell_what_happened_to_a_task,
                    counters_survive_many_put_backs,
                    acks_are_applied_even_if_nothing_is_found,
                    acks_come_before_everything_else,
                }
                retry {
                    a_repeated_pop_gets_the_same_delivery,
                    a_repeated_pop_leaves_out_what_ended,
                    a_repeated_pop_pops_anew_when_nothing_is_left,
                    a_pop_that_found_nothing_pops_anew,
                    a_reused_request_id_is_refused_and_acks_nothing,
                    a_pop_request_is_remembered_for_the_window_and_forgotten_after_two,
                    a_second_run_changes_nothing,
                    a_second_run_that_comes_late_takes_nothing_away,
                    an_earlier_attempt_takes_nothing_back,
                    a_later_attempt_takes_nothing_back_either,
                    too_many_attempts_take_nothing_back,
                    when_every_attempt_gave_up_it_goes_back,
                    without_a_request_the_unsent_goes_back,
                    a_withdrawn_pop_gives_back,
                    a_pop_that_comes_after_its_withdrawal_leases_nothing,
                    all_tries_of_a_pop_are_withdrawn,
                    a_pop_of_nothing_answers_what_is_held,
                }
                ack {
                    an_ack_is_final_and_can_be_repeated,
                    a_token_twice_in_one_call_is_acked_once,
                    parts_of_a_batch_are_acked_one_after_the_other,
                    a_token_that_is_not_held_changes_nothing,
                    after_the_deadline_a_token_is_good_until_its_task_is_taken_back,
                    acks_are_remembered_for_the_window_and_forgotten_after_two,
                    the_newest_half_of_the_acks_is_remembered,
                    hundreds_are_acked_in_one_call,
                }
                heartbeat {
                    a_heartbeat_extends_and_never_shortens,
                    an_expired_lease_can_be_extended_until_it_is_taken_back,
                    a_heartbeat_needs_the_current_token,
                    the_answer_tells_the_lease_that_ends_first,
                    a_token_twice_in_one_call_is_extended_once,
                    hundreds_are_extended_in_one_call,
                }
                release {
                    what_is_put_back_is_at_the_head_in_the_order_of_delivery,
                    a_thousand_are_put_back_in_order,
                    a_task_is_put_back_once,
                    only_the_holder_puts_back,
                    a_put_back_counts_a_delivery_and_no_expiry,
                    held_for_zero_takes_all,
                    held_for_looks_at_the_delivery_or_the_last_heartbeat,
                    what_was_held_comes_back_in_the_order_of_delivery,
                    nothing_is_held_in_an_unknown_queue,
                }
                reclaim {
                    nothing_is_taken_back_before_its_deadline,
                    a_heartbeat_puts_the_taking_back_off,
                    what_ran_out_is_at_the_head_in_the_order_of_delivery,
                    hundreds_that_ran_out_come_back_in_order,
                    hundreds_that_run_out_in_the_same_instant_come_back_in_order,
                    of_many_that_ran_out_the_latest_deadlines_go_back_first,
                    a_look_takes_back_and_tells,
                    counting_takes_back,
                }
                session {
                    a_stream_resumes_what_its_session_holds,
                    the_stream_that_came_last_has_the_session,
                    what_a_stream_keeps_does_not_run_out,
                    keeping_is_no_heartbeat_of_the_holder,
                    what_is_abandoned_comes_back_after_the_grace,
                    what_was_taken_over_is_not_abandoned,
                    a_session_is_forgotten_some_time_after_its_last_step,
                    sessions_do_not_touch_each_other,
                    hundreds_of_pops_are_resumed_in_order,
                    what_is_resumed_tells_its_age,
                }
                dead {
                    the_last_expiry_makes_a_dead_letter,
                    whatever_takes_back_makes_dead_letters,
                    what_was_held_too_often_is_dead,
                    what_is_given_back_never_dies,
                    the_token_of_a_dead_task_is_lost,
                    one_expiry_may_be_enough,
                    hundreds_die_and_the_others_keep_their_order,
                }
                schedule {
                    a_delayed_task_is_delivered_when_it_is_due_and_not_before,
                    a_task_is_delivered_at_its_time,
                    a_time_that_has_passed_is_now,
                    what_falls_due_joins_the_tail_in_due_order,
                    hundreds_fall_due_in_order,
                    whoever_looks_makes_ready_what_is_due,
                    an_empty_pop_tells_what_comes_first,
                    what_is_put_back_with_a_delay_waits,
                    what_waits_is_not_held,
                }
                ttl {
                    a_ready_task_is_gone_when_its_time_is_over,
                    a_scheduled_task_is_gone_when_its_time_is_over,
                    what_fell_due_and_ended_meanwhile_is_never_delivered,
                    a_leased_task_may_be_finished,
                    what_would_go_back_when_its_time_is_over_is_gone,
                    what_was_put_back_ends_when_it_would_have_ended,
                    hundreds_that_end_at_once_are_never_delivered,
                    thousands_that_end_at_once_are_never_delivered,
                    the_reaper_drops_what_ended,
                    dead_letters_are_gone_when_they_were_kept_long_enough,
                }
                priority {
                    the_highest_priority_comes_first_and_in_order_within,
                    a_batch_goes_on_to_lower_priorities,
                    what_comes_back_is_at_the_head_of_its_own_priority,
                    what_falls_due_joins_the_tail_of_its_own_priority,
                    hundreds_of_each_priority_come_out_in_order,
                    the_oldest_is_the_head_of_the_highest_priority,
                }
                failure {
                    a_failure_is_counted_and_waits,
                    the_backoff_doubles_up_to_its_maximum,
                    the_backoff_has_a_random_part,
                    a_delay_is_taken_instead_of_the_backoff,
                    the_last_failure_makes_a_dead_letter,
                    failures_and_expiries_are_counted_apart,
                    a_put_back_is_no_failure,
                    a_rejected_task_is_a_dead_letter_at_once,
                    the_last_error_is_kept,
                    a_failure_is_counted_once,
                    hundreds_fail_in_one_call,
                }
                shards {
                    they_change_only_while_the_queue_is_empty,
                    each_task_is_delivered_once_and_ends_once,
                    tokens_of_no_shard_are_not_held,
                    a_repeated_insert_gets_the_first_answer,
                    a_producers_numbers_are_known_in_every_shard,
                    a_unique_key_is_unique_in_the_whole_queue,
                    a_repeated_pop_gets_the_same_delivery,
                    a_withdrawn_pop_gives_all_back,
                    what_runs_out_comes_back_from_every_shard,
                    a_session_is_one_in_all_shards,
                    administration_sees_one_queue,
                    settings_hold_in_every_shard,
                    a_dropped_queue_is_gone_from_every_shard,
                    imports_go_where_they_belong,
                }
                unique {
                    a_duplicate_is_answered_with_the_first_id,
                    duplicates_within_one_insert_are_told,
                    a_repeated_request_tells_duplicates_again,
                    a_producer_is_told_of_duplicates,
                    the_key_is_free_when_its_task_is_gone,
                    the_key_of_a_task_is_free_when_its_time_is_over,
                    a_dead_letter_does_not_free_the_key_of_another,
                    a_second_run_changes_nothing,
                    keys_are_apart,
                    a_thousand_keys_go_in_at_once,
                }
                settings {
                    settings_are_changed_and_read,
                    a_setting_makes_a_queue,
                    the_lease_is_that_of_the_queue,
                    limits_of_counters_hold_at_once,
                    the_backoff_is_that_of_the_queue,
                    a_paused_queue_delivers_nothing,
                    what_is_held_may_be_finished_while_a_queue_is_paused,
                }
                list {
                    every_state_is_listed_in_its_order,
                    a_task_is_seen_whole,
                    hundreds_are_listed_page_by_page,
                    pages_are_stable_while_others_come_and_go,
                    what_is_unknown_is_not_listed,
                }
                delete {
                    a_task_is_deleted_wherever_it_is,
                    the_holder_of_a_cancelled_task_is_told,
                    a_cancelled_task_may_be_finished,
                    a_cancelled_task_is_deleted_when_it_would_go_back,
                    what_ran_out_is_not_held,
                    hundreds_are_deleted_in_one_call,
                }
                redrive {
                    what_is_redriven_joins_the_tail,
                    its_failures_and_expiries_are_counted_anew,
                    a_duplicate_stays_dead,
                    what_is_over_is_not_redriven,
                    what_is_not_dead_is_not_redriven,
                    hundreds_are_redriven_in_order,
                }
                import {
                    a_task_goes_on_where_it_was,
                    a_dead_letter_is_one_here_too,
                    ready_ones_join_the_tail_in_order,
                    counters_count_on,
                    what_was_imported_before_is_answered_again,
                    a_task_is_known_again_as_long_as_it_is_there,
                    an_imported_task_is_a_request_of_its_own,
                    a_unique_key_is_of_one_living_task,
                    what_is_over_is_gone,
                    what_is_over_gives_its_key_and_its_room_up,
                    what_is_held_keeps_its_key_though_it_is_over,
                    a_full_queue_takes_dead_letters_only,
                    a_full_store_refuses_imports,
                    hundreds_are_imported_in_order,
                }
                purge {
                    all_tasks_of_a_state_are_purged,
                    a_purge_is_of_what_is_there_now,
                }
                drop_queue {
                    a_queue_with_tasks_is_kept_without_force,
                    nothing_is_remembered_of_a_dropped_queue,
                    a_queue_with_thousands_is_dropped,
                }
                limits {
                    a_queue_has_at_most_its_number_of_tasks,
                    full_is_not_stuck,
                    a_queue_has_at_most_its_number_of_bytes,
                    bytes_that_are_there_already_are_counted,
                    duplicates_need_no_room,
                    a_limit_may_be_lower_than_what_is_there,
                }
                life {
                    a_task_lives_through_everything,
                }
                admin {
                    the_oldest_is_the_head,
                    several_queues_are_counted_at_once,
                    queues_are_listed_by_name,
                    hundreds_of_queues_are_listed_page_by_page,
                    what_was_never_inserted_is_not_listed,
                }
                reap {
                    the_reaper_finds_queues_that_nobody_pops,
                    a_round_visits_all_queues_and_ends,
                }
                isolation {
                    queues_do_not_touch_each_other,
                    plans_settings_and_administration_are_of_one_queue,
                }
                full {
                    a_full_store_refuses_inserts_and_drains,
                }
                model {
                    it_answers_as_the_store_in_memory_does,
                    every_task_is_in_exactly_one_place,
                }
            }
        }
    )+ };
}

macro_rules! cases {
    ($open:ident, $($noun:ident { $($case:ident),+ $(,)? })+) => { $(
        mod $noun { $(
            #[tokio::test]
            async fn $case() {
                crate::store::conformance::$noun::$case(crate::store::conformance::$open).await;
            }
        )+ }
    )+ };
}

/// The same in one test, so that all of them share what takes long to start.
macro_rules! in_turn {
    ($open:ident, $($noun:ident { $($case:ident),+ $(,)? })+) => {
        #[tokio::test]
        async fn every_case() {
            let _started = crate::store::conformance::topologies::start(stringify!($open));
            $( $(
                // The model's histories take longer than all others together.
                if stringify!($noun) != "model" || std::env::var("DATA_QUEUE_TEST_LONG").is_ok_and(|long| long == "1") {
                    println!("{} {}", stringify!($noun), stringify!($case));
                    crate::store::conformance::$noun::$case(crate::store::conformance::$open).await;
                }
            )+ )+
        }
    };
}

conformance! {
    memory => cases memory,
    redis => cases redis,
    sqlite => cases sqlite,
    redis_cluster => in_turn cluster,
    redis_sentinels => in_turn sentinels,
    redis_tls => in_turn tls,
}

/// Opens an empty store.
type Open = fn(Rules) -> Rig;

/// When the clock of a store begins to stand still.
const START: Millis = 1_700_000_000_000;

/// For how long [`pop`] leases.
const LEASE: Millis = 30_000;

/// The rules of most cases.
const RULES: Rules = Rules {
    remember: Remember { window: 300_000, entries: 1_000_000 },
    lease: LEASE,
    max_failures: 20,
    max_expiries: 20,
    backoff: Backoff { min: 1_000, max: 60_000 },
};

fn remembering(remember: Remember) -> Rules {
    Rules { remember, ..RULES }
}

fn queue(name: &str) -> QueueName {
    QueueName::parse(name).unwrap()
}

fn task(envelope: impl Into<Bytes>) -> NewTask {
    NewTask::new(TaskId::mint(1).unwrap()[0], envelope.into(), None)
}

/// A task whose envelope is a number, with a plan.
fn planned(number: usize, plan: Plan) -> NewTask {
    NewTask::new(TaskId::mint(1).unwrap()[0], number.to_string().into(), Some(plan))
}

fn of_priority(number: usize, priority: u8) -> NewTask {
    planned(number, Plan { priority, ..Plan::default() })
}

fn with_ttl(number: usize, ttl: Millis) -> NewTask {
    planned(number, Plan { ttl: Some(ttl), ..Plan::default() })
}

fn with_key(number: usize, key: &str) -> NewTask {
    planned(number, Plan { unique_key: Some(key.to_owned()), ..Plan::default() })
}

fn after(delay: Millis, task: NewTask) -> NewTask {
    NewTask { due: Some(Due::In(delay)), ..task }
}

fn tasks(numbers: Range<usize>) -> Vec<NewTask> {
    numbers.map(|number| task(number.to_string())).collect()
}

fn insert(tasks: Vec<NewTask>) -> Insert {
    Insert { tasks, request: None, waiting_here: 0, ..Default::default() }
}

/// A pop with fresh tokens.
fn pop(max_tasks: usize) -> Pop {
    Pop {
        acks: Vec::new(),
        max_tasks,
        max_bytes: usize::MAX >> 12,
        lease: Some(LEASE),
        stem: Stem::mint().unwrap(),
        request: None,
        will_wait: false,
        consumer: None,
        spent: Vec::new(),
    }
}

/// These go back as they are.
fn back(tokens: &[Token]) -> PutBack {
    PutBack { tokens: tokens.to_vec(), ..PutBack::default() }
}

/// These failed; the random part of their backoff is nothing for the first of them.
fn failed(tokens: &[Token], reason: &str) -> PutBack {
    PutBack { failed: true, reason: reason.to_owned(), ..back(tokens) }
}

fn rejected(tokens: &[Token], reason: &str) -> PutBack {
    PutBack { dead_letter: true, reason: reason.to_owned(), ..back(tokens) }
}

fn key(id: &str, fingerprint: u8) -> RequestKey {
    RequestKey { id: id.to_owned(), fingerprint: Fingerprint([fingerprint; 16]) }
}

/// A try of a repeatable pop, with fresh tokens.
fn attempt(max_tasks: usize, request: &str, number: u8) -> Pop {
    Pop { request: Some(PopRequest { key: key(request, 1), attempt: name_of_attempt(number) }), ..pop(max_tasks) }
}

/// A stream of a session.
fn consumer(session: u8, stream: u8) -> Consumer {
    Consumer { session: SessionId([session; 16]), stream: Attempt([stream; 8]) }
}

fn name_of_attempt(number: u8) -> Attempt {
    Attempt([number; 8])
}

fn numbers(tasks: &[Leased]) -> Vec<usize> {
    tasks.iter().map(|task| number(&task.envelope)).collect()
}

fn number(envelope: &[u8]) -> usize {
    std::str::from_utf8(envelope).unwrap().parse().unwrap()
}

fn tokens(tasks: &[Leased]) -> Vec<Token> {
    tasks.iter().map(|task| task.token).collect()
}

fn ids(tasks: &[Leased]) -> Vec<TaskId> {
    tasks.iter().map(|task| task.id).collect()
}
