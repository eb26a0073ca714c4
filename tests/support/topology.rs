//! Several Redis together, real processes on loopback: sentinels and what they watch, a cluster, and one behind TLS.
//!
//! What a test asks of them is waited for: a fault is over when these say so.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use super::{
    directory::Directory,
    redis::{Options, Redis, Reply, free_port},
};

/// For whatever a topology has to come to.
const LIMIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);

/// After so long without an answer a master counts as gone.
const DOWN_AFTER: Duration = Duration::from_millis(1_000);

pub const SLOTS: u16 = 16_384;

fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed() < LIMIT, "{what}: not within {LIMIT:?}");
        thread::park_timeout(POLL);
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn text(reply: &Reply) -> Option<String> {
    match reply {
        Reply::Text(text) => Some(text.clone()),
        Reply::Bytes(bytes) => String::from_utf8(bytes.clone()).ok(),
        _ => None,
    }
}

/// Where others are told to find a node: its own ports, or those of doors in front of it.
#[derive(Clone, Copy, Debug)]
pub struct Announced {
    pub port: u16,
    /// Of a node of a cluster.
    pub bus: u16,
}

/// Hears of each node once it runs, with its number and the port of its bus, if it has one.
pub type Up<'a> = &'a mut dyn FnMut(usize, &Redis, u16);

/// A master, two replicas, and three sentinels that agree by two.
pub struct Sentinels {
    servers: Vec<Arc<Redis>>,
    announced: Vec<u16>,
    sentinels: Vec<Redis>,
}

impl Sentinels {
    pub const MASTER: &str = "the-master";
    /// Of Redis, and another one of the sentinels.
    pub const PASSWORD: &str = "of-redis";
    pub const SENTINEL_PASSWORD: &str = "of-sentinels";

    pub fn start() -> Self {
        Self::behind(&[], &mut |_, _, _| {})
    }

    /// Each Redis, three in all, is known to all others by one of these ports, if there are any.
    pub fn behind(doors: &[Announced], up: Up) -> Self {
        let server = |number: usize, extra: &[&str]| {
            let mut extra = words(extra);
            if let Some(door) = doors.get(number) {
                let port = door.port.to_string();
                extra.extend(words(&["--replica-announce-ip", "127.0.0.1", "--replica-announce-port", &port]));
            }
            extra.extend(words(&["--masterauth", Self::PASSWORD, "--repl-diskless-sync-delay", "0"]));
            Arc::new(Redis::with(Options { requirepass: Some(Self::PASSWORD.to_owned()), extra, ..Options::default() }))
        };
        let announced_by = |number: usize, server: &Redis| doors.get(number).map_or(server.port(), |door| door.port);
        let master = server(0, &[]);
        up(0, &master, 0);
        let port = announced_by(0, &master).to_string();
        let mut servers = vec![master];
        for number in 1..3 {
            servers.push(server(number, &["--replicaof", "127.0.0.1", &port]));
            up(number, &servers[number], 0);
        }
        let announced = servers.iter().enumerate().map(|(number, server)| announced_by(number, server)).collect();
        wait_for("the replicas", || (servers[0].info("connected_slaves")? == "2").then_some(()));
        let name = Self::MASTER;
        let settings = format!(
            "sentinel monitor {name} 127.0.0.1 {port} 2\nsentinel auth-pass {name} {}\nsentinel sentinel-pass {}\n\
             sentinel down-after-milliseconds {name} {}\nsentinel failover-timeout {name} 5000\n",
            Self::PASSWORD,
            Self::SENTINEL_PASSWORD,
            DOWN_AFTER.as_millis(),
        );
        let sentinel = || {
            let requirepass = Some(Self::SENTINEL_PASSWORD.to_owned());
            Redis::with(Options { sentinel: Some(settings.clone()), requirepass, ..Options::default() })
        };
        let sentinels: Vec<_> = (0..3).map(|_| sentinel()).collect();
        let all = Self { servers, announced, sentinels };
        for sentinel in &all.sentinels {
            // Each knows the two others and both replicas.
            wait_for("the sentinels", || {
                let line = sentinel.info("master0")?;
                (line.contains("slaves=2") && line.contains("sentinels=3") && line.contains("status=ok")).then_some(())
            });
        }
        all
    }

    /// The `--store` of a server, with the password of Redis in it.
    pub fn url(&self) -> String {
        self.url_with(&self.sentinels.iter().map(Redis::port).collect::<Vec<_>>())
    }

    /// The same with other ports to find the sentinels at.
    pub fn url_with(&self, ports: &[u16]) -> String {
        let sentinels: Vec<_> = ports.iter().map(|port| format!("127.0.0.1:{port}")).collect();
        format!("redis+sentinel://:{}@{}/{}", Self::PASSWORD, sentinels.join(","), Self::MASTER)
    }

    pub fn sentinels(&self) -> &[Redis] {
        &self.sentinels
    }

    /// Who is the master, by the sentinels.
    pub fn master(&self) -> &Arc<Redis> {
        wait_for("a master", || self.master_now())
    }

    fn master_now(&self) -> Option<&Arc<Redis>> {
        let ask = ["SENTINEL", "GET-MASTER-ADDR-BY-NAME", Self::MASTER];
        let Reply::Array(address) = self.sentinels[0].try_command(&ask).ok()? else { return None };
        let port: u16 = text(address.get(1)?)?.parse().ok()?;
        let number = self.announced.iter().position(|announced| *announced == port)?;
        self.servers.get(number)
    }

    pub fn replicas(&self) -> Vec<&Redis> {
        let master = self.master().port();
        self.servers.iter().map(Arc::as_ref).filter(|server| server.port() != master).collect()
    }

    /// Waits until another one than this is the master.
    pub fn await_successor_of(&self, port: u16) {
        wait_for("another master", || {
            let master = self.master_now().filter(|master| master.port() != port)?;
            let Reply::Bytes(info) = master.try_command(&["INFO", "replication"]).ok()? else { return None };
            String::from_utf8_lossy(&info).contains("role:master").then_some(())
        });
    }

    /// Waits until both replicas have what the master has.
    pub fn await_whole(&self) {
        let master = self.master();
        wait_for("the replicas", || {
            let Ok(Reply::Bytes(info)) = master.try_command(&["INFO", "replication"]) else { return None };
            let info = String::from_utf8_lossy(&info);
            (info.contains("role:master") && info.matches("state=online").count() == 2).then_some(())
        });
    }

    /// By hand, while all are well.
    pub fn fail_over(&self) {
        let before = self.master().port();
        // Right after another failover it is refused for a while.
        wait_for("a failover", || match self.sentinels[0].try_command(&["SENTINEL", "FAILOVER", Self::MASTER]) {
            Ok(Reply::Text(_)) => Some(()),
            _ => None,
        });
        self.await_successor_of(before);
    }
}

/// Three masters with a replica each.
pub struct Cluster {
    nodes: Vec<Redis>,
    announced: Vec<Announced>,
}

impl Cluster {
    pub fn start() -> Self {
        Self::behind(&[], &mut |_, _, _| {})
    }

    /// Each node, six in all, is known to all others by one of these ports, if there are any.
    pub fn behind(doors: &[Announced], up: Up) -> Self {
        let mut cluster = Self { nodes: Vec::new(), announced: Vec::new() };
        for number in 0..6 {
            let (node, bus) = Self::node(doors.get(number));
            up(number, &node, bus);
            cluster.announced.push(doors.get(number).copied().unwrap_or(Announced { port: node.port(), bus }));
            cluster.nodes.push(node);
        }
        for number in 1..6 {
            cluster.meet(number);
        }
        let share = SLOTS.div_ceil(3);
        for (number, master) in (0_u16..).zip(&cluster.nodes[..3]) {
            let slots: Vec<String> =
                (number * share..((number + 1) * share).min(SLOTS)).map(|slot| slot.to_string()).collect();
            for some in slots.chunks(1_000) {
                let add: Vec<&str> =
                    ["CLUSTER", "ADDSLOTS"].into_iter().chain(some.iter().map(String::as_str)).collect();
                master.command(&add);
            }
        }
        for (master, replica) in cluster.nodes[..3].iter().zip(&cluster.nodes[3..]) {
            let id = Self::id(master);
            // Until it has heard of that one.
            wait_for("a replica", || match replica.try_command(&["CLUSTER", "REPLICATE", &id]) {
                Ok(Reply::Text(_)) => Some(()),
                _ => None,
            });
        }
        cluster.await_whole();
        cluster
    }

    fn node(door: Option<&Announced>) -> (Redis, u16) {
        let bus_port = free_port();
        let bus = bus_port.to_string();
        let timeout = DOWN_AFTER.as_millis().to_string();
        let own = ["--cluster-enabled", "yes", "--cluster-node-timeout", &timeout, "--cluster-port", &bus];
        let more = ["--cluster-require-full-coverage", "no", "--repl-diskless-sync-delay", "0"];
        let mut extra = words(&[&own[..], &more[..]].concat());
        if let Some(Announced { port, bus }) = door {
            extra.extend(words(&["--cluster-announce-ip", "127.0.0.1", "--cluster-announce-port", &port.to_string()]));
            extra.extend(words(&["--cluster-announce-bus-port", &bus.to_string()]));
        }
        (Redis::with(Options { extra, ..Options::default() }), bus_port)
    }

    /// The first node hears of this one.
    fn meet(&self, number: usize) {
        let Announced { port, bus } = self.announced[number];
        self.nodes[0].command(&["CLUSTER", "MEET", "127.0.0.1", &port.to_string(), &bus.to_string()]);
    }

    fn id(node: &Redis) -> String {
        text(&node.command(&["CLUSTER", "MYID"])).unwrap()
    }

    /// The `--store` of a server, with some of the nodes.
    pub fn url(&self) -> String {
        let seeds: Vec<_> = self.announced.iter().take(4).map(|node| format!("127.0.0.1:{}", node.port)).collect();
        format!("redis+cluster://{}", seeds.join(","))
    }

    /// Lines of CLUSTER NODES, by a node that answers.
    fn lines(&self) -> Vec<Vec<String>> {
        let told = self.nodes.iter().filter(|node| !node.is_stopped()).find_map(|node| {
            match node.try_command(&["CLUSTER", "NODES"]) {
                Ok(Reply::Bytes(told)) => String::from_utf8(told).ok(),
                _ => None,
            }
        });
        told.unwrap_or_default().lines().map(|line| line.split(' ').map(str::to_owned).collect()).collect()
    }

    fn at(&self, address: &str) -> Option<&Redis> {
        let port: u16 = address.split(['@', ',']).next()?.rsplit(':').next()?.parse().ok()?;
        let number = self.announced.iter().position(|announced| announced.port == port)?;
        self.nodes.get(number)
    }

    /// It is the one that is asked about all, as long as it answers.
    pub fn is_first(&self, node: &Redis) -> bool {
        node.port() == self.nodes[0].port()
    }

    /// The masters that have slots, and are well.
    pub fn masters(&self) -> Vec<&Redis> {
        let is_master = |line: &&Vec<String>| line.len() > 8 && line[2].contains("master") && !line[2].contains("fail");
        self.lines().iter().filter(is_master).filter_map(|line| self.at(&line[1])).collect()
    }

    pub fn slot_of(&self, key: &str) -> u16 {
        let Reply::Integer(slot) = self.nodes[0].command(&["CLUSTER", "KEYSLOT", key]) else { unreachable!() };
        u16::try_from(slot).unwrap()
    }

    /// The master of a slot.
    pub fn owner(&self, slot: u16) -> &Redis {
        wait_for("an owner", || self.owner_now(slot))
    }

    fn owner_now(&self, slot: u16) -> Option<&Redis> {
        let has = |range: &String| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            first.parse().is_ok_and(|first: u16| first <= slot) && last.parse().is_ok_and(|last: u16| slot <= last)
        };
        let lines = self.lines();
        let owner = lines.iter().find(|line| {
            line.len() > 8 && line[2].contains("master") && !line[2].contains("fail") && line[8..].iter().any(has)
        })?;
        self.at(&owner[1])
    }

    /// Whether this node has the slot, by what nodes say now.
    pub fn is_owner(&self, node: &Redis, slot: u16) -> bool {
        self.owner_now(slot).is_some_and(|owner| owner.port() == node.port())
    }

    /// A replica of this master.
    pub fn replica_of(&self, master: &Redis) -> &Redis {
        let id = Self::id(master);
        wait_for("a replica", || {
            let lines = self.lines();
            let replica = lines.iter().find(|line| line[3] == id && !line[2].contains("fail"))?;
            self.at(&replica[1])
        })
    }

    /// Waits until all slots have a master, and each of these a replica that is up to date.
    pub fn await_whole(&self) {
        wait_for("the cluster", || {
            let is_whole = self.nodes.iter().all(|node| {
                let Ok(Reply::Bytes(info)) = node.try_command(&["CLUSTER", "INFO"]) else { return false };
                let info = String::from_utf8_lossy(&info);
                info.contains("cluster_state:ok") && info.contains("cluster_slots_ok:16384")
            });
            let masters = self.masters();
            let has_replica = |master: &&Redis| master.info("connected_slaves").is_some_and(|count| count != "0");
            (is_whole && masters.len() >= 3 && masters.iter().all(has_replica)).then_some(())
        });
    }

    /// Waits until another node than this has the slot.
    pub fn await_successor_of(&self, port: u16, slot: u16) {
        wait_for("another master", || (self.owner(slot).port() != port).then_some(()));
    }

    /// By hand, while all are well: the replica of this master takes over.
    pub fn fail_over(&self, master: &Redis, slot: u16) {
        let replica = self.replica_of(master);
        replica.command(&["CLUSTER", "FAILOVER"]);
        self.await_successor_of(master.port(), slot);
    }

    /// Another master, that has no slots yet.
    pub fn add_node(&mut self) -> u16 {
        let (node, bus) = Self::node(None);
        let port = node.port();
        self.announced.push(Announced { port, bus });
        self.meet(self.announced.len() - 1);
        let id = Self::id(&node);
        let known = |node: &Redis| matches!(node.try_command(&["CLUSTER", "NODES"]), Ok(Reply::Bytes(told)) if String::from_utf8_lossy(&told).contains(&id));
        wait_for("all to know the new node", || self.nodes.iter().all(known).then_some(()));
        let is_well = || matches!(node.try_command(&["CLUSTER", "INFO"]), Ok(Reply::Bytes(info)) if info.starts_with(b"cluster_state:ok"));
        wait_for("the new node", || is_well().then_some(()));
        self.nodes.push(node);
        port
    }

    /// Moves a slot to the node of this port, key by key; in the middle, and before its first key, it calls this.
    pub fn migrate(&self, slot: u16, to: u16, mut meanwhile: impl FnMut()) {
        let from = self.owner(slot);
        let to = self.nodes.iter().find(|node| node.port() == to).expect("a node");
        let slot_number = slot;
        let (slot, from_id, to_id) = (slot.to_string(), Self::id(from), Self::id(to));
        to.command(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &from_id]);
        from.command(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &to_id]);
        meanwhile();
        loop {
            let Reply::Array(keys) = from.command(&["CLUSTER", "GETKEYSINSLOT", &slot, "1"]) else { unreachable!() };
            let Some(key) = keys.first().and_then(text) else { break };
            from.command(&["MIGRATE", "127.0.0.1", &to.port().to_string(), &key, "0", "10000"]);
            meanwhile();
        }
        // The one that loses its last slot may have become a replica by then.
        to.command(&["CLUSTER", "SETSLOT", &slot, "NODE", &to_id]);
        let _ = from.try_command(&["CLUSTER", "SETSLOT", &slot, "NODE", &to_id]);
        wait_for("the slot to be there", || self.owner_now(slot_number).filter(|owner| owner.port() == to.port()));
    }
}

/// One Redis behind TLS, which wants a certificate of its clients; and certificates for it, made here.
pub struct Tls {
    redis: Arc<Redis>,
    port: u16,
    folder: Directory,
}

impl Tls {
    pub fn start() -> Self {
        let folder = Directory::default();
        let at = |name: &str| PathBuf::from(folder.text()).join(name);
        for authority in ["ca", "other"] {
            let subject = format!("/CN={authority}");
            let paths = [at(&format!("{authority}.key")), at(&format!("{authority}.crt"))];
            openssl(&[
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-nodes",
                "-days",
                "2",
                "-subj",
                &subject,
                "-keyout",
                path(&paths[0]),
                "-out",
                path(&paths[1]),
            ]);
        }
        fs::write(at("names"), "subjectAltName=IP:127.0.0.1,DNS:localhost\nextendedKeyUsage=serverAuth,clientAuth\n")
            .unwrap();
        for (name, authority) in [("redis", "ca"), ("client", "ca"), ("stranger", "other")] {
            let [key, request, certificate] = ["key", "csr", "crt"].map(|end| at(&format!("{name}.{end}")));
            let [ca_key, ca] = ["key", "crt"].map(|end| at(&format!("{authority}.{end}")));
            openssl(&[
                "req",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-nodes",
                "-subj",
                "/CN=localhost",
                "-keyout",
                path(&key),
                "-out",
                path(&request),
            ]);
            openssl(&[
                "x509",
                "-req",
                "-in",
                path(&request),
                "-CA",
                path(&ca),
                "-CAkey",
                path(&ca_key),
                "-CAcreateserial",
                "-days",
                "2",
                "-extfile",
                path(&at("names")),
                "-out",
                path(&certificate),
            ]);
        }
        let port = free_port();
        let (tls_port, key, certificate, ca) = (port.to_string(), at("redis.key"), at("redis.crt"), at("ca.crt"));
        let extra = words(&[
            "--tls-port",
            &tls_port,
            "--tls-key-file",
            path(&key),
            "--tls-cert-file",
            path(&certificate),
            "--tls-ca-cert-file",
            path(&ca),
            "--tls-auth-clients",
            "yes",
        ]);
        let redis = Arc::new(Redis::with(Options { extra, ..Options::default() }));
        Self { redis, port, folder }
    }

    pub fn redis(&self) -> &Arc<Redis> {
        &self.redis
    }

    pub fn url(&self) -> String {
        format!("rediss://127.0.0.1:{}", self.port)
    }

    /// `ca.crt`, `other.crt`; and of `client` and `stranger`, whom only the other one knows, the .crt and the .key.
    pub fn file(&self, name: &str) -> String {
        format!("{}/{name}", self.folder.text())
    }
}

fn path(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

fn openssl(arguments: &[&str]) {
    let ran = Command::new("openssl").args(arguments).stdin(Stdio::null()).output();
    let ran = ran.expect("openssl is needed. Debian and Ubuntu: apt-get install openssl");
    assert!(ran.status.success(), "openssl {arguments:?}: {}", String::from_utf8_lossy(&ran.stderr));
}
