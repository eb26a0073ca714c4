//! Servers of several versions on one Redis: what a later one adds to a record stays, and what an earlier one did not write is not
//! missed.

use std::{sync::Arc, time::Duration};

use data_queue_proto::v1::{
    DeadLetterCause, GetTaskRequest, ListTasksRequest, NewTask, Outcome, PauseQueueRequest, PopBatchRequest,
    PutbackRequest, PutbackTokens, QueueSettings, RedriveTasksRequest, ResumeQueueRequest, TaskInfo, TaskState,
    UpdateQueueRequest, putback_request::Selection, redrive_tasks_request,
};
use prost_types::FieldMask;

use crate::support::{
    call::{
        ack, counts, heartbeat, held_for_request, insert_json, insert_request, json, pop_batch, pop_batch_request,
        pop_for, proto, putback, text,
    },
    redis::{Redis, Reply},
    server::{Client, Server},
    unique_queue, wire_tests,
};

const HOUR: Duration = Duration::from_secs(3_600);

/// What scripts below share: the only queue's parts, and what a later version adds to the records of each. An envelope is a
/// protobuf message that ends with the time of the insert, so that others stand before that.
const PARTS: &str = r"
    local base = string.sub(redis.call('KEYS', 'dq:*:meta')[1], 1, -5)
    local later = '\154\6\5later'
    local function has(part, record)
        return part == 'tasks' and string.sub(record, 1, #later) == later or string.sub(record, -#later) == later
    end
";

/// Adds to every record. Answers how many had nothing of it yet; maps of leases that ended are no records.
const ADD: &str = r"
    local added = 0
    for _, part in ipairs({ 'tasks', 'tries', 'plans', 'leases' }) do
        local all = redis.call('HGETALL', base .. part)
        for at = 1, #all, 2 do
            if part ~= 'leases' or #all[at] % 2 == 0 then
                if not has(part, all[at + 1]) then
                    local behind = all[at + 1] .. (part == 'tries' and ' ' or '') .. later
                    redis.call('HSET', base .. part, all[at], part == 'tasks' and later .. all[at + 1] or behind)
                    added = added + 1
                end
                redis.call('SADD', 'test:' .. part, all[at])
            end
        end
    end
    redis.call('HSET', base .. 'meta', 'later', 7)
    redis.call('HSET', base .. 'settings', 'later', 7)
    redis.call('SET', base .. 'rare', 1)
    return { added }
";

/// Of each part how many records still have it, and how many have lost it.
const KEPT: &str = r"
    local kept = {}
    for _, part in ipairs({ 'tasks', 'tries', 'plans', 'leases' }) do
        local has_it, lost_it = 0, 0
        for _, field in ipairs(redis.call('SMEMBERS', 'test:' .. part)) do
            local record = redis.call('HGET', base .. part, field)
            has_it = has_it + (record and has(part, record) and 1 or 0)
            lost_it = lost_it + (record and not has(part, record) and 1 or 0)
        end
        kept[#kept + 1], kept[#kept + 2] = has_it, lost_it
    end
    for _, part in ipairs({ 'meta', 'settings' }) do
        local is_kept = redis.call('HGET', base .. part, 'later') == '7'
        kept[#kept + 1], kept[#kept + 2] = is_kept and 1 or 0, is_kept and 0 or 1
    end
    return kept
";

/// Leaves of each record of tries what the first version wrote, and of the queue's own what it had.
const CUT: &str = r"
    local all = redis.call('HGETALL', base .. 'tries')
    for at = 1, #all, 2 do
        redis.call('HSET', base .. 'tries', all[at], string.match(all[at + 1], '^%d+ %d+ %d+'))
    end
    redis.call('HDEL', base .. 'meta', 'life', 'schedules', 'tail:0')
    redis.call('DEL', base .. 'rare')
    return {}
";

fn run(redis: &Redis, script: &str) -> Vec<i64> {
    let Reply::Array(all) = redis.command(&["EVAL", &format!("{PARTS}{script}"), "0"]) else { panic!("no array") };
    all.iter().map(|one| if let Reply::Integer(number) = one { *number } else { panic!("{one:?}") }).collect()
}

/// Nothing has lost what was added. Gives how many tasks, tries, plans and leases have it.
#[track_caller]
fn kept(redis: &Redis, after: &str) -> [i64; 4] {
    let kept = run(redis, KEPT);
    let lost = kept.iter().skip(1).step_by(2).copied().collect::<Vec<_>>();
    assert_eq!(lost, [0; 6], "lost after {after}: of tasks, tries, plans, leases, the queue, its settings");
    [kept[0], kept[2], kept[4], kept[6]]
}

async fn give_back(client: &mut Client, queue: &str, token: &str, tokens: PutbackTokens) -> u64 {
    let tokens = PutbackTokens { lease_tokens: vec![token.to_owned()], reason: "said".to_owned(), ..tokens };
    let request = PutbackRequest { queue: queue.to_owned(), selection: Some(Selection::Tokens(tokens)) };
    let answer = client.putback(request).await.expect("a putback").into_inner();
    answer.put_back + answer.dead_lettered
}

async fn listed(client: &mut Client, queue: &str, state: TaskState) -> Vec<TaskInfo> {
    let request = ListTasksRequest { queue: queue.to_owned(), state: state as i32, ..ListTasksRequest::default() };
    client.admin.list_tasks(request).await.expect("a page").into_inner().tasks
}

async fn redrive_all(client: &mut Client, queue: &str) -> u64 {
    let selection = Some(redrive_tasks_request::Selection::MaxTasks(0));
    let request = RedriveTasksRequest { queue: queue.to_owned(), selection };
    client.admin.redrive_tasks(request).await.expect("a redrive").into_inner().redriven
}

async fn start() -> (Arc<Redis>, Server, Client) {
    let redis = Arc::new(Redis::start());
    let server = Server::on(Arc::clone(&redis), &[]);
    server.ready().await;
    let client = server.client().await;
    (redis, server, client)
}

wire_tests! {
    /// Whatever is done with a task or a queue, what a later version wrote into its records is still there.
    async fn what_a_later_version_writes_is_kept() {
        let (redis, _server, mut client) = start().await;
        let queue = unique_queue("later");
        let planned = |number: usize| NewTask {
            priority: 3,
            ttl: Some(proto(HOUR)),
            unique_key: format!("key {number}"),
            ..json(&number.to_string())
        };
        let tasks = (0..8).map(planned).chain((8..12).map(|number| json(&number.to_string()))).collect();
        client.insert(insert_request(&queue, tasks)).await.expect("an insert");
        let first = pop_for(&mut client, &queue, HOUR).await;
        putback(&mut client, &queue, &first.lease_token).await;
        let all = PopBatchRequest { max_tasks: 7, lease: Some(proto(HOUR)), ..pop_batch_request(&queue) };
        let held = pop_batch(&mut client, all.clone()).await.expect("tasks");
        run(&redis, ADD);
        assert_eq!(kept(&redis, "nothing"), [12, 1, 8, 1]);

        let token = |at: usize| held[at].lease_token.as_str();
        assert_eq!(heartbeat(&mut client, &queue, token(6)).await, Outcome::Applied);
        assert_eq!(kept(&redis, "a heartbeat, which splits the batch")[3], 1);
        assert_eq!(run(&redis, ADD), [0], "what is split off has it, too");
        assert_eq!(kept(&redis, "nothing")[3], 8);
        assert_eq!(heartbeat(&mut client, &queue, token(5)).await, Outcome::Applied);
        assert_eq!(kept(&redis, "a heartbeat")[3], 8);
        assert_eq!(ack(&mut client, &queue, token(6)).await, Outcome::Applied);
        assert_eq!(kept(&redis, "an ack"), [11, 1, 7, 7]);
        putback(&mut client, &queue, token(0)).await;
        kept(&redis, "a putback");
        run(&redis, ADD);
        let failed = PutbackTokens { failed: true, delay: Some(proto(HOUR)), ..PutbackTokens::default() };
        assert_eq!(give_back(&mut client, &queue, token(1), failed).await, 1);
        kept(&redis, "a failure");
        let rejected = PutbackTokens { dead_letter: true, ..PutbackTokens::default() };
        assert_eq!(give_back(&mut client, &queue, token(2), rejected).await, 1);
        kept(&redis, "a rejection");
        run(&redis, ADD);
        let held_for = client.putback(held_for_request(&queue, proto(Duration::ZERO))).await.expect("a putback");
        assert_eq!(held_for.into_inner().put_back, 3);
        kept(&redis, "a putback of all");
        run(&redis, ADD);

        let dead = listed(&mut client, &queue, TaskState::Dead).await;
        assert_eq!((dead.len(), dead[0].cause(), dead[0].last_error.as_str()), (1, DeadLetterCause::Rejected, "said"));
        assert_eq!(redrive_all(&mut client, &queue).await, 1);
        kept(&redis, "a redrive");
        let lease = QueueSettings { lease: Some(proto(HOUR)), max_bytes: Some(1 << 30), ..QueueSettings::default() };
        for paths in [vec!["lease".to_owned(), "max_bytes".to_owned()], vec!["*".to_owned()]] {
            let update_mask = Some(FieldMask { paths });
            let request = UpdateQueueRequest { queue: queue.clone(), settings: Some(lease), update_mask };
            client.admin.update_queue(request).await.expect("an update");
            kept(&redis, "an update");
        }
        client.admin.pause_queue(PauseQueueRequest { queue: queue.clone() }).await.expect("a pause");
        client.admin.resume_queue(ResumeQueueRequest { queue: queue.clone() }).await.expect("a resumption");
        kept(&redis, "a pause");
        let scheduled = listed(&mut client, &queue, TaskState::Scheduled).await;
        let id = scheduled[0].task.as_ref().expect("a task").id.clone();
        let seen = client.admin.get_task(GetTaskRequest { queue: queue.clone(), id }).await.expect("the task");
        let seen = seen.into_inner().task.expect("a task");
        assert_eq!((seen.last_error.as_str(), seen.unique_key.as_str()), ("said", "key 1"));
        assert!(seen.expires_at.is_some());

        // And all of them are delivered as they were inserted.
        let mut numbers = Vec::new();
        for task in pop_batch(&mut client, PopBatchRequest { max_tasks: 100, ..all }).await.expect("tasks") {
            numbers.push(text(&task).parse::<usize>().expect("a number"));
        }
        numbers.sort_unstable();
        assert_eq!(numbers, [0, 2, 3, 4, 5, 7, 8, 9, 10, 11]);
        let [tasks, tries, plans, _] = kept(&redis, "more deliveries");
        assert_eq!((tasks, plans), (11, 7));
        assert!(tries >= 5, "{tries}");
        let counted = counts(&mut client, &queue).await;
        assert_eq!((counted.leased, counted.scheduled, counted.acked), (10, 1, 1));
    }

    /// Records without what this version adds: counters alone of dead letters, and a queue that never heard of schedules.
    async fn what_an_earlier_version_did_not_write_is_not_missed() {
        let (redis, _server, mut client) = start().await;
        let queue = unique_queue("earlier");
        let ids = insert_json(&mut client, &queue, &["0", "1", "2"]).await;
        for _ in 0..2 {
            let task = pop_for(&mut client, &queue, HOUR).await;
            let rejected = PutbackTokens { dead_letter: true, ..PutbackTokens::default() };
            give_back(&mut client, &queue, &task.lease_token, rejected).await;
        }
        let held = pop_for(&mut client, &queue, HOUR).await;
        run(&redis, CUT);

        let dead = listed(&mut client, &queue, TaskState::Dead).await;
        assert_eq!(dead.len(), 2);
        for info in &dead {
            // Only leases that ran out made dead letters then.
            assert_eq!((info.cause(), info.last_error.as_str()), (DeadLetterCause::MaxExpiries, ""));
        }
        assert_eq!(redrive_all(&mut client, &queue).await, 2);
        assert_eq!(heartbeat(&mut client, &queue, &held.lease_token).await, Outcome::Applied);
        let failed = PutbackTokens { failed: true, delay: Some(proto(Duration::ZERO)), ..PutbackTokens::default() };
        assert_eq!(give_back(&mut client, &queue, &held.lease_token, failed).await, 1);
        let planned = NewTask { priority: 9, delay: None, ..json("3") };
        client.insert(insert_request(&queue, vec![planned])).await.expect("an insert");
        let all = PopBatchRequest { lease: Some(proto(HOUR)), ..pop_batch_request(&queue) };
        let popped = pop_batch(&mut client, all).await.expect("tasks");
        let mut tasks = popped.iter().map(text).collect::<Vec<_>>();
        assert_eq!(tasks[..2], ["3", "2"]);
        tasks.sort_unstable();
        assert_eq!(tasks, ["0", "1", "2", "3"]);
        assert!(popped.iter().all(|task| task.deliveries == if ids.contains(&task.id) { 2 } else { 1 }));
        for task in popped {
            assert_eq!(ack(&mut client, &queue, &task.lease_token).await, Outcome::Applied);
        }
        let counted = counts(&mut client, &queue).await;
        assert_eq!((counted.inserted, counted.acked), (4, 4));
    }
}
