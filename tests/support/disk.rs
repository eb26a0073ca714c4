//! A small file system of its own: in memory, seen only by the processes that are put into it, gone with them.

use std::{
    fs,
    io::{BufRead, BufReader, ErrorKind, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use super::strace::is_root;

/// A file system of a given size, mounted for one process that does nothing but to keep it.
#[derive(Debug)]
pub struct Disk {
    /// Ends when the test's own process does, whatever ends that: then its input is closed.
    keeper: Child,
    directory: PathBuf,
}

impl Disk {
    /// Mounts one over this directory, which must exist.
    pub fn mount(directory: &Path, bytes: u64) -> Self {
        let script = "mount -t tmpfs -o size=\"$1\",mode=0700 tmpfs \"$2\" && echo mounted && exec cat";
        let flags: &[&str] = if is_root() { &["-m"] } else { &["-U", "-r", "-m"] };
        let mut command = Command::new("unshare");
        command.args(flags).args(["sh", "-c", script, "sh", &bytes.to_string()]).arg(directory);
        let mut keeper = match command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn() {
            Ok(keeper) => keeper,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                panic!("unshare is not on this machine. Debian and Ubuntu: apt-get install util-linux")
            }
            Err(error) => panic!("unshare: {error}"),
        };
        let mut said = String::new();
        let read = BufReader::new(keeper.stdout.take().expect("a pipe")).read_line(&mut said);
        let disk = Self { keeper, directory: directory.to_owned() };
        assert!(
            read.is_ok() && said.trim() == "mounted",
            "no file system could be mounted: that needs root, or a system that lets everyone make namespaces"
        );
        disk
    }

    /// What has to stand in front of a command that is to see it.
    pub fn prefix(&self) -> Vec<String> {
        let pid = self.keeper.id().to_string();
        let mut words = vec!["nsenter".to_owned(), "-t".to_owned(), pid, "-m".to_owned()];
        if !is_root() {
            words.extend(["-U".to_owned(), "--preserve-credentials".to_owned()]);
        }
        words
    }

    /// The path by which the test itself reaches a file on it.
    pub fn path(&self, name: &str) -> PathBuf {
        let directory = self.directory.strip_prefix("/").expect("an absolute path");
        PathBuf::from(format!("/proc/{}/root", self.keeper.id())).join(directory).join(name)
    }

    /// Takes all the room that is left, in a file of this name.
    pub fn fill(&self, name: &str) -> u64 {
        let mut file = fs::OpenOptions::new().create(true).append(true).open(self.path(name)).expect("a file");
        let mut taken = 0;
        for piece in [1 << 20, 4 << 10, 1] {
            let piece = vec![0; piece];
            loop {
                match file.write(&piece) {
                    Ok(bytes) if bytes > 0 => taken += u64::try_from(bytes).unwrap(),
                    Ok(_) => break,
                    Err(error) if error.kind() == ErrorKind::StorageFull => break,
                    Err(error) => panic!("{name}: {error}"),
                }
            }
        }
        taken
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
    }
}
