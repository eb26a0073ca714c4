//! A server on SQLite, with a directory of its own that is kept while it is killed and started again.

use std::{fs, ops::Deref};

use super::{
    directory::Directory,
    disk::Disk,
    server::{Ended, Server, run_to_end_behind},
    strace::Strace,
};

/// Its files: the tasks, and the log of changes that are not among them yet.
pub const FILES: [&str; 2] = ["data-queue.db", "data-queue.db-wal"];

/// The server, and what it keeps its tasks in.
#[derive(Debug)]
pub struct Embedded {
    server: Server,
    disk: Option<Disk>,
    directory: Directory,
}

impl Embedded {
    /// Ready to serve, with these flags besides.
    pub async fn start(flags: &[&str]) -> Self {
        Self::start_in(Directory::default(), None, flags).await
    }

    /// On a file system of its own, of so many bytes.
    pub async fn start_on_disk(bytes: u64, flags: &[&str]) -> Self {
        let directory = Directory::default();
        let disk = Disk::mount(directory.path(), bytes);
        Self::start_in(directory, Some(disk), flags).await
    }

    /// On files that are there already, given by their names.
    pub async fn start_on(files: &[(&str, &[u8])], flags: &[&str]) -> Self {
        let directory = Directory::default();
        for (name, bytes) in files {
            fs::write(directory.path().join(name), bytes).expect("a file");
        }
        Self::start_in(directory, None, flags).await
    }

    /// What a file of the directory has in it now; nothing if it is not there.
    pub fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.directory.path().join(name)).unwrap_or_default()
    }

    async fn start_in(directory: Directory, disk: Option<Disk>, flags: &[&str]) -> Self {
        let prefix = disk.as_ref().map(Disk::prefix).unwrap_or_default();
        let mut arguments = vec!["--data-dir", directory.text()];
        arguments.extend(flags);
        let server = Server::launch_behind(&prefix, &arguments);
        server.ready().await;
        Self { server, disk, directory }
    }

    /// The file system of its own.
    pub fn disk(&self) -> &Disk {
        self.disk.as_ref().expect("a file system of its own")
    }

    /// Traces what the server does to its file and to the log of changes beside it. At most one at a time.
    pub fn strace(&self, options: &[&str]) -> Strace {
        self.strace_on(&FILES, options)
    }

    /// The same for some of the files.
    pub fn strace_on(&self, files: &[&str], options: &[&str]) -> Strace {
        let paths = files.iter().map(|name| self.directory.path().join(name)).collect::<Vec<_>>();
        let paths = paths.iter().flat_map(|path| ["-P", path.to_str().expect("a path in UTF-8")]);
        let options = options.iter().copied().chain(paths).collect::<Vec<_>>();
        Strace::attach(self.pid(), &options, self.directory.path().with_extension("strace"))
    }

    /// What `data-queue-server check` says of the directory. The server must not run.
    pub fn check(&self) -> Ended {
        let prefix = self.disk.as_ref().map(Disk::prefix).unwrap_or_default();
        run_to_end_behind(&prefix, &["check", "--data-dir", self.directory.text()])
    }

    /// Kills the server and checks that it left a sound file behind, without having panicked.
    pub fn kill_and_check(&self) {
        self.kill();
        let found = self.check();
        assert_eq!(found.code, Some(0), "{found:?}");
        assert!(!self.log().contains("panicked"), "the server panicked:\n{}", self.log());
    }
}

impl Deref for Embedded {
    type Target = Server;

    fn deref(&self) -> &Server {
        &self.server
    }
}
