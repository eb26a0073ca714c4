//! Doors in front of the Redis of a topology: each is an address that its node announces, so that everybody goes through it. Who
//! comes is known by the process that has the other end, so that some of all can be cut off together, from all others.

use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::JoinHandle,
};

/// All doors; they close when dropped.
#[derive(Clone, Debug)]
pub struct Doors {
    /// Processes that are cut off together.
    inside: watch::Sender<BTreeSet<u32>>,
    /// Of nodes and of their callers.
    known: Arc<Mutex<BTreeSet<u32>>>,
    /// Bytes came, and were not let through.
    held: Arc<Mutex<BTreeSet<(u32, u32)>>>,
}

/// One address, in front of one node.
#[derive(Debug)]
pub struct Door {
    port: u16,
    behind: watch::Sender<Option<Behind>>,
    accepting: JoinHandle<()>,
}

/// What is behind a door.
#[derive(Clone, Copy, Debug)]
struct Behind {
    port: u16,
    process: u32,
}

/// Who came through a door.
struct Caller {
    port: u16,
    /// The port that it came to.
    door: u16,
    /// 0 as long as it is a stranger: it may have come before it was made known.
    process: AtomicU32,
}

impl Caller {
    fn found(&self, known: &Mutex<BTreeSet<u32>>) -> u32 {
        let process = self.process.load(Ordering::Relaxed);
        if process != 0 {
            return process;
        }
        let known = known.lock().unwrap().clone();
        let process = process_of(self.port, self.door, &known).unwrap_or(0);
        self.process.store(process, Ordering::Relaxed);
        process
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Door {
    /// The address that is announced, on loopback.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// What is behind it, from now on.
    pub fn open(&self, port: u16, process: u32) {
        self.behind.send_replace(Some(Behind { port, process }));
    }
}

impl Doors {
    pub fn new() -> Self {
        // The tests themselves may call, too.
        let known = Arc::new(Mutex::new([std::process::id()].into()));
        Self { inside: watch::Sender::default(), known, held: Arc::default() }
    }

    /// A process that may come through doors, or is behind one. Any other one is outside whatever is cut off.
    pub fn know(&self, process: u32) {
        self.known.lock().unwrap().insert(process);
    }

    /// From now on nothing goes between these and all others; what is on its way waits.
    pub fn cut_off(&self, processes: &[u32]) {
        self.inside.send_replace(processes.iter().copied().collect());
    }

    /// All go where they like again, what waited first.
    pub fn heal(&self) {
        self.inside.send_replace(BTreeSet::new());
    }

    /// How many pairs of processes had something to say to each other while they were apart.
    pub fn held(&self) -> usize {
        self.held.lock().unwrap().len()
    }

    /// Another door; who comes waits until there is something behind it.
    pub async fn door(&self, port: u16) -> Door {
        let listener = TcpListener::bind(("127.0.0.1", port)).await.expect("a free port");
        let port = listener.local_addr().expect("an address").port();
        let behind = watch::Sender::<Option<Behind>>::new(None);
        let (doors, mut target) = (self.clone(), behind.subscribe());
        let accepting = tokio::spawn(async move {
            let Ok(Some(behind)) = target.wait_for(Option::is_some).await.map(|behind| *behind) else { return };
            doors.know(behind.process);
            while let Ok((caller, from)) = listener.accept().await {
                tokio::spawn(doors.clone().let_in(caller, from, port, behind));
            }
        });
        Door { port, behind, accepting }
    }

    async fn let_in(self, caller: TcpStream, from: SocketAddr, door: u16, behind: Behind) {
        let pair = (Caller { port: from.port(), door, process: AtomicU32::new(0) }, behind.process);
        let pair = &pair;
        if !self.may_pass(pair, true).await {
            return;
        }
        let Ok(node) = TcpStream::connect(("127.0.0.1", behind.port)).await else { return };
        let _ = (caller.set_nodelay(true), node.set_nodelay(true));
        let (from_caller, to_caller) = caller.into_split();
        let (from_node, to_node) = node.into_split();
        // If one way ends, so does the other: a process that died hears and says nothing.
        tokio::select! {
            () = self.pass(from_caller, to_node, pair) => {}
            () = self.pass(from_node, to_caller, pair) => {}
        }
    }

    async fn pass(&self, mut from: OwnedReadHalf, mut to: OwnedWriteHalf, pair: &(Caller, u32)) {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(bytes @ 1..) = from.read(&mut buffer).await {
            if !self.may_pass(pair, false).await || to.write_all(&buffer[..bytes]).await.is_err() {
                return;
            }
        }
        // The end of a connection is not heard of either.
        self.may_pass(pair, false).await;
    }

    /// Waits until the two are on the same side. False if that cannot be any more.
    async fn may_pass(&self, (caller, other): &(Caller, u32), is_new: bool) -> bool {
        let one = caller.found(&self.known);
        let are_apart = |inside: &BTreeSet<u32>| inside.contains(&one) != inside.contains(other);
        let mut inside = self.inside.subscribe();
        if are_apart(&inside.borrow()) && !is_new {
            self.held.lock().unwrap().insert((one, *other));
        }
        inside.wait_for(|inside| !are_apart(inside)).await.is_ok()
    }
}

/// Which of these has the socket that is connected from this port of 127.0.0.1 to that one. Ports are used several times, for
/// connections to different places.
fn process_of(port: u16, door: u16, known: &BTreeSet<u32>) -> Option<u32> {
    let table = fs::read_to_string("/proc/net/tcp").ok()?;
    let [local, remote] = [port, door].map(|port| format!("0100007F:{port:04X}"));
    let own = |line: &&str| {
        let mut fields = line.split_whitespace().skip(1);
        fields.next() == Some(&local) && fields.next() == Some(&remote)
    };
    let inode = table.lines().find(own)?.split_whitespace().nth(9)?;
    let socket = format!("socket:[{inode}]");
    let has = |process: &&u32| {
        let handles = fs::read_dir(format!("/proc/{process}/fd")).into_iter().flatten().flatten();
        handles.into_iter().any(|handle| fs::read_link(handle.path()).is_ok_and(|link| link == Path::new(&socket)))
    };
    known.iter().find(has).copied()
}
