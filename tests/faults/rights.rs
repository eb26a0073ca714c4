//! Users of Redis that may not do everything.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use data_queue_proto::v1::{
    Durability, InsertRequest, Outcome, PopBatchRequest, PopRequest, QueueSettings, UpdateQueueRequest,
};

use crate::support::{
    PATIENCE,
    call::{
        ack, heartbeat, held_for_request, insert_json, insert_request, json, pop, pop_batch, pop_batch_request,
        pop_for, pop_request, pop_waiting, proto, putback, text,
    },
    poll_until,
    redis::{Options, Persistence, Redis, Reply},
    server::{Client, Server},
    unique_queue, wire_tests,
};

const USER: &str = "dataqueue";
const PASSWORD: &str = "another-secret-4711";
/// So long that no lease runs out.
const LEASE: Duration = Duration::from_secs(3_600);

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The rules that README gives a user of Redis, with the password of this test.
fn rules_of_readme() -> Vec<String> {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let line = readme.lines().find(|line| line.starts_with("ACL SETUSER dataqueue "));
    let line = line.expect("a line in README.md that starts with: ACL SETUSER dataqueue");
    let word = |word: &str| if word.starts_with('>') { format!(">{PASSWORD}") } else { word.to_owned() };
    let words = line.split_whitespace().map(word).collect::<Vec<_>>();
    assert!(words.contains(&format!(">{PASSWORD}")), "no password in {line:?}");
    words
}

fn set_user(redis: &Redis, rules: &[impl AsRef<str>]) {
    let words = rules.iter().map(AsRef::as_ref).collect::<Vec<_>>();
    assert_eq!(redis.command(&words), Reply::Text("OK".to_owned()));
}

/// A server that logs in to Redis as this user.
fn server_as(redis: &Arc<Redis>, user: &str, flags: &[&str]) -> Server {
    server_on_database(redis, user, "", flags)
}

/// The same on a database, given as it is behind the address: `/1`.
fn server_on_database(redis: &Arc<Redis>, user: &str, database: &str, flags: &[&str]) -> Server {
    let url = format!("redis://{user}:{PASSWORD}@127.0.0.1:{}{database}", redis.port());
    Server::launch(&url, flags, Some(Arc::clone(redis)))
}

fn reply_text(reply: &Reply) -> String {
    match reply {
        Reply::Text(text) | Reply::Error(text) => text.clone(),
        Reply::Bytes(bytes) => String::from_utf8_lossy(bytes).into_owned(),
        other => format!("{other:?}"),
    }
}

/// What users were refused so far: the commands, keys and channels.
fn refusals(redis: &Redis) -> BTreeSet<String> {
    let Reply::Array(entries) = redis.command(&["ACL", "LOG"]) else { panic!("no array") };
    let object = |entry: &Reply| {
        let Reply::Array(fields) = entry else { panic!("no entry: {entry:?}") };
        let fields = fields.chunks_exact(2).map(|pair| (reply_text(&pair[0]), reply_text(&pair[1])));
        fields.collect::<BTreeMap<_, _>>().remove("object").expect("an object")
    };
    entries.iter().map(object).collect()
}

/// Inserts, pops, acks.
async fn works(client: &mut Client) {
    let queue = unique_queue("works");
    insert_json(client, &queue, &["1"]).await;
    let task = pop(client, &queue).await.expect("a task");
    assert_eq!(ack(client, &queue, &task.lease_token).await, Outcome::Applied);
}

/// What the server says of what is left of an OK after which fault.
async fn promise(server: &Server) -> String {
    let line = async || server.log().lines().find(|line| line.contains("survives")).map(str::to_owned);
    poll_until("a word about what survives", PATIENCE, line).await
}

/// The words that scripts quote and those that the server gives to `cmd`, as far as they could be commands.
fn named_in_sources() -> BTreeSet<String> {
    let mut named = BTreeSet::new();
    let redis = "server/src/store/redis";
    for (directory, begin, end) in [("server/lua", "'", '\''), (redis, "cmd(\"", '"'), (redis, "arg(\"", '"')] {
        let entries = fs::read_dir(root().join(directory)).unwrap().map(|entry| entry.unwrap().path());
        for path in entries.filter(|path| path.is_file()) {
            let text = fs::read_to_string(path).unwrap();
            let words = text.split(begin).skip(1).filter_map(|rest| rest.split(end).next());
            let words = words.filter(|word| word.len() > 1 && word.bytes().all(|byte| byte.is_ascii_uppercase()));
            named.extend(words.map(str::to_owned));
        }
    }
    named
}

/// Those of these words that are commands of Redis, and how many words each has at least.
fn commands_of(redis: &Redis, named: &BTreeSet<String>) -> BTreeMap<String, usize> {
    let mut found = BTreeMap::new();
    for name in named {
        let Reply::Array(about) = redis.command(&["COMMAND", "INFO", name]) else { panic!("no array") };
        let [Reply::Array(about)] = &about[..] else { continue };
        let Reply::Integer(words) = about[1] else { panic!("no arity in {about:?}") };
        found.insert(name.to_owned(), usize::try_from(words.abs()).unwrap());
    }
    found
}

wire_tests! {
    /// Row 48: where Redis refuses INFO or CONFIG the server serves, and claims no more than it knows.
    async fn without_info_and_config() {
        let redis = Arc::new(Redis::with(Options { persistence: Persistence::Always, ..Options::default() }));
        for (refused, claim) in [("-info", "nothing that ends Redis"), ("-config", "unknown")] {
            let user = format!("without{refused}");
            let password = format!(">{PASSWORD}");
            set_user(&redis, &["ACL", "SETUSER", &user, "on", &password, "~*", "&*", "+@all", refused]);
            let server = server_as(&redis, &user, &[]);
            server.ready().await;
            works(&mut server.client().await).await;
            let promise = promise(&server).await;
            assert!(promise.contains(claim), "{refused}: {promise}");
            assert!(!promise.contains("power cut"), "{refused}: {promise}");
            assert!(!server.log().contains(PASSWORD), "{}", server.log());
        }
    }

    /// The rules in README are enough: a server whose user has no other rights does all that it can do.
    async fn the_rules_in_readme_are_enough() {
        let redis = Arc::new(Redis::with(Options { persistence: Persistence::Always, ..Options::default() }));
        set_user(&redis, &rules_of_readme());
        // Memories that are thrown away at each entry.
        let flags = ["--memory-entries", "2", "--threads", "2"];
        let servers = [server_as(&redis, USER, &flags), server_as(&redis, USER, &flags)];
        for server in &servers {
            server.ready().await;
        }
        assert!(promise(&servers[0]).await.contains("power cut"), "{}", servers[0].log());
        let (mut one, mut two) = (servers[0].client().await, servers[1].client().await);
        let queue = unique_queue("rights");

        // A pop that waits on the other server.
        let waiting = tokio::spawn({
            let (mut two, queue) = (two.clone(), queue.clone());
            async move { pop_waiting(&mut two, &queue).await }
        });
        pop(&mut two, &unique_queue("sync")).await;
        insert_json(&mut one, &queue, &["0"]).await;
        let task = waiting.await.unwrap();
        assert_eq!(heartbeat(&mut one, &queue, &task.lease_token).await, Outcome::Applied);
        assert_eq!(putback(&mut one, &queue, &task.lease_token).await, Outcome::Applied);

        // Request ids.
        let insert = InsertRequest { request_id: "i".to_owned(), ..insert_request(&queue, vec![json("1"), json("2")]) };
        assert!(!one.insert(insert.clone()).await.unwrap().into_inner().replayed);
        assert!(two.insert(insert).await.unwrap().into_inner().replayed);
        let named = PopRequest { request_id: "p".to_owned(), lease: Some(proto(LEASE)), ..pop_request(&queue) };
        let first = one.pop(named.clone()).await.unwrap().into_inner().task.expect("a task");
        let again = two.pop(named).await.unwrap().into_inner().task.expect("the same task");
        assert_eq!((text(&first), first.deliveries, &first.lease_token), ("0", 2, &again.lease_token));

        // PopBatch, and back by held_for.
        let batch = PopBatchRequest { lease: Some(proto(LEASE)), ..pop_batch_request(&queue) };
        let tasks = pop_batch(&mut one, batch.clone()).await.unwrap();
        assert_eq!(tasks.iter().map(text).collect::<Vec<_>>(), ["1", "2"]);
        let held = two.putback(held_for_request(&queue, proto(Duration::ZERO))).await.unwrap().into_inner();
        assert_eq!(held.put_back, 3);
        let tasks = pop_batch(&mut two, batch).await.unwrap();
        assert_eq!(tasks.iter().map(text).collect::<Vec<_>>(), ["0", "1", "2"]);

        // Acks: on their own, and in a pop.
        let [zero, rest @ ..] = &tasks[..] else { panic!("three tasks") };
        assert_eq!(ack(&mut one, &queue, &zero.lease_token).await, Outcome::Applied);
        let tokens = rest.iter().map(|task| task.lease_token.clone()).collect();
        one.pop(PopRequest { ack_lease_tokens: tokens, ..pop_request(&queue) }).await.unwrap();
        assert_eq!(ack(&mut two, &queue, &rest[1].lease_token).await, Outcome::AlreadyAcked);

        // A lease that runs out.
        insert_json(&mut one, &queue, &["3"]).await;
        let short = pop_for(&mut one, &queue, Duration::from_millis(100)).await;
        let back = pop_waiting(&mut two, &queue).await;
        assert_eq!((&back.id, back.expiries), (&short.id, 1));
        assert_eq!(ack(&mut two, &queue, &back.lease_token).await, Outcome::Applied);

        // A queue with shards, and an insert that asks for more than there is.
        let spread = unique_queue("spread");
        let settings = Some(QueueSettings { shards: Some(4), ..QueueSettings::default() });
        let update_mask = Some(prost_types::FieldMask { paths: vec!["shards".to_owned()] });
        one.admin.update_queue(UpdateQueueRequest { queue: spread.clone(), settings, update_mask }).await.unwrap();
        for value in 0..8 {
            insert_json(&mut two, &spread, &[&value.to_string()]).await;
            pop(&mut one, &spread).await.expect("a task");
        }
        let more = InsertRequest { durability: Durability::Replicated.into(), ..insert_request(&spread, vec![json("1")]) };
        one.insert(more).await.expect_err("there are no replicas");

        // Another database.
        let other = server_on_database(&redis, USER, "/1", &flags);
        other.ready().await;
        works(&mut other.client().await).await;

        // Redis-rs tells its name where Redis knows the command, and does not mind a refusal.
        let refused = refusals(&redis).into_iter().filter(|object| !object.starts_with("client")).collect::<Vec<_>>();
        assert_eq!(refused, [""; 0], "the server tried what it may not do");
    }

    /// The rules in README have every command that a script names, and those that the server sends by itself.
    async fn the_rules_in_readme_have_every_command() {
        let redis = Redis::start();
        set_user(&redis, &rules_of_readme());
        let commands = commands_of(&redis, &named_in_sources());
        println!("{commands:?}");
        for name in ["EVALSHA", "HSET", "ZADD", "SADD", "SSCAN"] {
            assert!(commands.contains_key(name), "{name} was not found in the sources: {commands:?}");
        }
        for (name, words) in commands {
            let mut command = vec![name.as_str()];
            command.resize(words, "dq:{x}:x");
            if name == "CONFIG" {
                // The only part of it that is used, and allowed.
                command = vec!["CONFIG", "GET", "appendfsync"];
            }
            let reply = redis.try_command_as(USER, PASSWORD, &command).unwrap();
            let refused = matches!(&reply, Reply::Error(error) if error.contains("NOPERM"));
            assert!(!refused, "{name}: {reply:?}");
        }
    }
}
