//! The house rules that review would have to remember: what may lie at the root, and who may name what.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

const ROOT_ENTRIES: [&str; 8] =
    ["Cargo.lock", "Cargo.toml", "README.md", "build.rs", "client", "proto", "server", "tests"];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Every file under a directory with this extension; none if it does not exist.
fn files(directory: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut left = vec![directory.to_owned()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                left.push(path);
            } else if path.extension().is_some_and(|found| found == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// The source files under `server/src` that name a word outside comments, but for those under the given paths.
fn who_names(words: &[&str], allowed: &[&str]) -> Vec<String> {
    let source = root().join("server/src");
    let mut who = Vec::new();
    for path in files(&source, "rs") {
        let name = path.strip_prefix(&source).unwrap().to_str().unwrap().to_owned();
        if allowed.iter().any(|allowed| name.starts_with(allowed)) {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        let code = text.lines().map(|line| line.split_once("//").map_or(line, |(code, _)| code));
        let hits = code.enumerate().filter(|(_, line)| words.iter().any(|word| line.contains(word)));
        who.extend(hits.map(|(number, line)| format!("{name}:{}: {}", number + 1, line.trim())));
    }
    who
}

/// The `[section]` headings and keys of a manifest, as `section key`.
fn manifest_entries(path: &Path) -> BTreeSet<String> {
    let text = fs::read_to_string(path).unwrap();
    let mut section = String::new();
    let mut entries = BTreeSet::new();
    for line in text.lines().map(str::trim) {
        if let Some(heading) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            section = heading.to_owned();
            entries.insert(heading.replace('.', " "));
        } else if let Some((key, _)) = line.split_once('=') {
            entries.insert(format!("{section} {}", key.trim().trim_end_matches(".workspace")));
        }
    }
    entries
}

/// Nothing grows at the root.
#[test]
fn root_entries() {
    let listed = Command::new("git").args(["ls-files"]).current_dir(root()).output();
    // An archive of the sources has no index to list.
    let Ok(listed) = listed.map_err(|_| ()).and_then(|listed| listed.status.success().then_some(listed).ok_or(()))
    else {
        println!("not a git repository: nothing was checked");
        return;
    };
    let listed = String::from_utf8(listed.stdout).unwrap();
    let entries = listed.lines().map(|path| path.split('/').next().unwrap()).collect::<BTreeSet<_>>();
    let strange = entries
        .into_iter()
        .filter(|entry| !ROOT_ENTRIES.contains(entry) && !entry.starts_with("LICENSE") && !entry.starts_with('.'))
        .collect::<Vec<_>>();
    assert_eq!(strange, [""; 0], "entries at the root that do not belong there");
}

/// Server and client never import each other.
#[test]
fn server_and_client_are_apart() {
    for (package, other) in [("server", "data-queue-client"), ("client", "data-queue-server")] {
        let entries = manifest_entries(&root().join(package).join("Cargo.toml"));
        let found = entries.iter().find(|entry| entry.split(' ').any(|word| word == other));
        assert_eq!(found, None, "{package} depends on {other}");
    }
}

/// Nothing below the gRPC edge names tonic.
#[test]
fn only_the_edge_names_tonic() {
    assert_eq!(who_names(&["tonic"], &["grpc/", "grpc.rs", "main.rs", "lib.rs"]), [""; 0]);
}

/// Nothing but its store names Redis' client. Elsewhere `redis::` is that store's module, brought in by name.
#[test]
fn only_its_store_names_redis() {
    let own = ["store/redis/", "store/conformance", "store/backend.rs"];
    assert_eq!(who_names(&["bb8", "use redis", "::redis::cmd", "RedisError"], &own), [""; 0]);
    let source = root().join("server/src");
    for hit in who_names(&["redis::"], &own) {
        let file = hit.split(':').next().unwrap();
        let text = fs::read_to_string(source.join(file)).unwrap();
        let module = text.split(';').any(|item| {
            let item = item.trim();
            item.ends_with("mod redis") || (item.contains("store::") && item.contains("redis"))
        });
        assert!(module, "{hit}");
    }
}

/// Nothing but its store names SQLite's library.
#[test]
fn only_its_store_names_sqlite() {
    assert_eq!(who_names(&["rusqlite"], &["store/sqlite/"]), [""; 0]);
}

/// Each script says what it is given and what it answers; what scripts are put together from, what it is for.
#[test]
fn scripts_have_headers() {
    const PARTS: [&str; 15] = [
        "calls.lua",
        "common.lua",
        "gate.lua",
        "guard.lua",
        "heads.lua",
        "leases.lua",
        "lines.lua",
        "parts.lua",
        "prelude.lua",
        "prelude_test.lua",
        "rare.lua",
        "seen.lua",
        "sessions.lua",
        "sizes.lua",
        "where.lua",
    ];
    for path in files(&root().join("server/lua"), "lua") {
        let text = fs::read_to_string(&path).unwrap();
        let header = text.lines().take_while(|line| line.starts_with("--")).collect::<Vec<_>>().join("\n");
        assert!(!header.is_empty(), "{} has no header", path.display());
        if PARTS.iter().any(|part| path.ends_with(part)) {
            continue;
        }
        for word in ["KEYS", "ARGV", "Returns"] {
            assert!(header.contains(word), "the header of {} does not name {word}:\n{header}", path.display());
        }
    }
}

/// What the clients' builds download is said by name, version and digest, never by place: whoever builds them has a mirror perhaps.
#[test]
fn lock_files_name_no_hosts() {
    const LOCKS: [&str; 5] = ["go.sum", "go.mod", "package-lock.json", "pom.xml", ".npmrc"];
    let is_lock = |name: &str| LOCKS.contains(&name) || (name.starts_with("requirements") && name.ends_with(".txt"));
    // Addresses of what is no download: schemas, and who takes donations.
    let is_other = |line: &str| ["xmlns", "schemaLocation", "xsi:", "\"url\":"].iter().any(|word| line.contains(word));
    let listed = Command::new("git").args(["ls-files", "client"]).current_dir(root()).output().unwrap();
    for path in String::from_utf8(listed.stdout).unwrap().lines() {
        if !is_lock(path.rsplit('/').next().unwrap()) {
            continue;
        }
        let text = fs::read_to_string(root().join(path)).unwrap();
        let named =
            text.lines().find(|line| (line.contains("://") && !is_other(line)) || line.contains("\"resolved\""));
        assert_eq!(named, None, "{path}");
    }
}

/// No test sleeps to wait for something. What may: what asks again and again, callers at a pace or that pause before they repeat a call
/// or take a time to work, faults at moments that chance chooses, and README's own lines.
#[test]
fn tests_do_not_sleep() {
    const MAY: [&str; 25] = [
        "client/tests/operate/copy.rs",
        "client/tests/operate/server.rs",
        "client/tests/operate/work.rs",
        "server/src/store/conformance/topologies.rs",
        "tests/support/mod.rs",
        "tests/support/redis.rs",
        "tests/support/server.rs",
        "tests/support/topology.rs",
        "tests/bench/load.rs",
        "tests/bench/shards.rs",
        "tests/clients/readme.rs",
        "tests/faults/load.rs",
        "tests/faults/store_faults.rs",
        "tests/histories/disk.rs",
        "tests/histories/embedded.rs",
        "tests/histories/injected.rs",
        "tests/histories/kill.rs",
        "tests/histories/lives.rs",
        "tests/histories/load.rs",
        "tests/histories/retry.rs",
        "tests/histories/stream.rs",
        "tests/histories/validate.rs",
        "tests/histories/vanish.rs",
        "tests/histories/worker.rs",
        "tests/topologies/load.rs",
    ];
    let sleeps = |text: &str| {
        let mut code = text.lines().map(|line| line.split_once("//").map_or(line, |(code, _)| code));
        code.any(|line| ["sleep", "park_timeout", "pending::<"].iter().any(|word| line.contains(word)))
    };
    let mut found = BTreeSet::new();
    for directory in ["tests", "client/tests", "server/src/store/conformance"] {
        for path in files(&root().join(directory), "rs") {
            let name = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
            if name != "tests/house.rs" && sleeps(&fs::read_to_string(&path).unwrap()) {
                found.insert(name);
            }
        }
    }
    let may = MAY.into_iter().map(str::to_owned).collect::<BTreeSet<_>>();
    assert_eq!(found, may, "left: what sleeps, right: what may");
    // A thread that sleeps helps nobody, wherever it is.
    let word = ["thread::", "sleep"].concat();
    for directory in ["tests", "server", "client"] {
        for path in files(&root().join(directory), "rs") {
            assert!(!fs::read_to_string(&path).unwrap().contains(&word), "{} has {word}", path.display());
        }
    }
}
