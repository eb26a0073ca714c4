//! The file: made, locked, opened, brought up to date, copied, checked. A file that is not as it should be is refused and
//! left as it is.

use std::{
    ffi::OsString,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use rusqlite::{Connection, OpenFlags, config::DbConfig, ffi::ErrorCode};
use rustix::{
    fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with, statvfs},
    io::Errno,
};

use super::{Durability, load};
use crate::store::Rules;

/// "DaQu" in the header of the file, by which `file` and we know it.
const APPLICATION_ID: i32 = i32::from_be_bytes(*b"DaQu");

/// Each brings the tables from one version to the next; the first makes them.
const MIGRATIONS: [&str; 3] = [
    include_str!("../../../migrations/001_tables.sql"),
    include_str!("../../../migrations/002_streams.sql"),
    include_str!("../../../migrations/003_life.sql"),
];

/// The first version of the tables that knows producers. A file that is only read may be older.
pub(super) const WITH_STREAMS: i64 = 2;
/// The first version that knows all that a task's life can be.
pub(super) const WITH_LIFE: i64 = 3;

/// How long to wait for a backup that reads at the wrong moment.
const BUSY_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a file was not opened.
#[derive(Debug, thiserror::Error)]
pub(super) enum OpenError {
    /// It is not what it should be.
    #[error("{0}")]
    Refused(String),
    /// It could not be read or written.
    #[error("failed: {0}{hint}", hint = what_to_do(.0))]
    Sql(#[from] rusqlite::Error),
    /// It could not be reached.
    #[error("{0}")]
    Io(#[from] io::Error),
}

fn what_to_do(error: &rusqlite::Error) -> &'static str {
    match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseCorrupt) => "; move it away and restore a backup",
        _ => "",
    }
}

/// Whether the disk has no room.
pub(super) fn is_full(error: &rusqlite::Error) -> bool {
    error.sqlite_error_code() == Some(ErrorCode::DiskFull)
}

/// `name` with something behind it.
fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(ending);
    name.into()
}

/// Which file it is, whatever its name.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
}

impl Identity {
    pub(super) fn of(path: &Path) -> io::Result<Self> {
        fs::metadata(path).map(|found| Self { device: found.dev(), inode: found.ino() })
    }
}

/// Held as long as a server has the file.
pub(super) struct Lock {
    _file: File,
    name: PathBuf,
    identity: Identity,
}

impl Lock {
    /// Makes the directory if it is not there.
    pub(super) fn take(path: &Path) -> Result<Self, String> {
        if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
            make_directory(directory)
                .map_err(|error| format!("cannot make the folder {}: {error}", directory.display()))?;
        }
        // By the file's own name, whatever link leads to it.
        let name = beside(&fs::canonicalize(path).unwrap_or_else(|_| path.to_owned()), ".lock");
        let cannot_write = |error| format!("cannot write {}: {error}", name.display());
        let mut options = OpenOptions::new();
        let mut file = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&name)
            .map_err(cannot_write)?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            let mut owner = String::new();
            let _ = file.read_to_string(&mut owner);
            let owner = owner.trim();
            let by = if owner.is_empty() { String::new() } else { format!(" (process {owner})") };
            return Err(format!("{} is in use by another server{by}", path.display()));
        }
        // For the message above; the lock itself is not in the text.
        let _ = file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()));
        let identity = Identity::of(&name).map_err(cannot_write)?;
        Ok(Self { _file: file, name, identity })
    }

    /// False if somebody removed it: then another server may have one, too.
    pub(super) fn is_in_place(&self) -> bool {
        Identity::of(&self.name).is_ok_and(|found| found == self.identity)
    }
}

/// For this user alone, and so that a power cut does not take it away.
fn make_directory(directory: &Path) -> io::Result<()> {
    if directory.is_dir() {
        return Ok(());
    }
    let missing: Vec<&Path> = directory.ancestors().take_while(|ancestor| !ancestor.is_dir()).collect();
    DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    missing.into_iter().try_for_each(sync_parent)
}

fn sync_parent(path: &Path) -> io::Result<()> {
    let directory = path.parent().filter(|directory| !directory.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory)?.sync_all()
}

/// Opens a file, or makes one where there is none. The caller has the lock.
pub(super) fn open_or_make(path: &Path, durability: Durability) -> Result<Connection, OpenError> {
    if !fs::exists(path)? {
        make(path)?;
    }
    open(path, durability)
}

/// Opens a file, and changes nothing in it unless its tables are of an older version. What its log has stays there until
/// the file is accepted. The caller has the lock.
pub(super) fn open(path: &Path, durability: Durability) -> Result<Connection, OpenError> {
    if fs::metadata(path)?.len() == 0 {
        let message = "is empty: it is no store of DataQueue, or what is left of one; move it away to begin anew";
        return Err(OpenError::Refused(message.to_owned()));
    }
    let connection =
        Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
    // SQLite opens for reading what it may not write, and says so only when it is written.
    if connection.is_readonly("main")? {
        return Err(OpenError::Refused("cannot be opened for writing".to_owned()));
    }
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    refuse_strange(&connection)?;
    settle(&connection, durability)?;
    migrate(&connection)?;
    Ok(connection)
}

/// What was read of the file is sound: it may be written, once everything that the log has is in the file. Nothing depends
/// then on what a failed sync may have left of the log: a system that failed to write a page may say at the next sync
/// that all is well.
pub(super) fn accept(connection: &Connection) -> Result<(), OpenError> {
    if !checkpoint(connection)? {
        return Err(OpenError::Refused(
            "is being read by another program; it can be used when that has ended".to_owned(),
        ));
    }
    Ok(connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, false).map(drop)?)
}

/// The same where no sync is known to have failed: somebody who reads the file for a copy is no hindrance. What the log
/// has is synced with it.
pub(super) fn accept_at_start(connection: &Connection, path: &Path) -> Result<(), OpenError> {
    if !checkpoint(connection)? {
        File::open(beside(path, "-wal"))?.sync_all()?;
    }
    Ok(connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, false).map(drop)?)
}

/// Makes the file whole before it gets its name: whatever has that name is complete.
fn make(path: &Path) -> Result<(), OpenError> {
    let log = beside(path, "-wal");
    if is_used(&log) {
        return Err(OpenError::Refused(format!(
            "is missing, but {} belongs to it; put it back, or move that away too to begin anew",
            log.display()
        )));
    }
    let new = beside(path, ".new");
    if let Err(error) = fs::remove_file(&new)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(error.into());
    }
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
    let connection = Connection::open_with_flags(&new, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    connection.pragma_update(None, "application_id", APPLICATION_ID)?;
    migrate(&connection)?;
    connection.close().map_err(|(_, error)| error)?;
    name_file(&new, path)?;
    Ok(())
}

/// A log that is empty is what a look at the file may leave behind.
fn is_used(log: &Path) -> bool {
    fs::metadata(log).is_ok_and(|found| found.len() > 0)
}

/// So that after a power cut either no file has the name or the whole one.
fn name_file(from: &Path, to: &Path) -> io::Result<()> {
    File::open(from)?.sync_all()?;
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // Not every file system knows that.
        Err(Errno::INVAL | Errno::NOSYS) => fs::rename(from, to)?,
        renamed => renamed?,
    }
    sync_parent(to)
}

fn refuse_strange(connection: &Connection) -> Result<(), OpenError> {
    let strange = || OpenError::Refused("is no store of DataQueue".to_owned());
    let id: i32 =
        connection.pragma_query_value(None, "application_id", |row| row.get(0)).map_err(|error| {
            match error.sqlite_error_code() {
                Some(ErrorCode::NotADatabase) => strange(),
                _ => error.into(),
            }
        })?;
    if id != APPLICATION_ID {
        return Err(strange());
    }
    let version = version(connection)?;
    let known = MIGRATIONS.len();
    match usize::try_from(version) {
        Ok(version) if (1..=known).contains(&version) => Ok(()),
        _ => Err(OpenError::Refused(format!(
            "has version {version} of the tables, and this server knows {known}; use a newer server"
        ))),
    }
}

pub(super) fn version(connection: &Connection) -> rusqlite::Result<i64> {
    connection.pragma_query_value(None, "user_version", |row| row.get(0))
}

fn migrate(connection: &Connection) -> Result<(), OpenError> {
    let done = usize::try_from(version(connection)?).unwrap_or(0);
    for (number, migration) in MIGRATIONS.iter().enumerate().skip(done) {
        connection.execute_batch(&format!("BEGIN; {migration} PRAGMA user_version = {}; COMMIT;", number + 1))?;
    }
    Ok(())
}

fn settle(connection: &Connection, durability: Durability) -> Result<(), OpenError> {
    connection.busy_timeout(BUSY_TIMEOUT)?;
    let mode: String = connection.query_row("PRAGMA journal_mode = WAL", (), |row| row.get(0))?;
    if mode != "wal" {
        return Err(OpenError::Refused(format!("cannot be written ahead of: its journal mode stays {mode}")));
    }
    connection.pragma_update(None, "synchronous", durability.synchronous())?;
    connection.pragma_update(None, "cell_size_check", true)?;
    connection.pragma_update(None, "temp_store", "MEMORY")?;
    connection.pragma_update(None, "cache_size", -CACHE_KIB)?;
    connection.pragma_update(None, "journal_size_limit", LOG_LIMIT)?;
    connection.set_prepared_statement_cache_capacity(STATEMENTS);
    Ok(())
}

/// SQLite's page cache, in KiB.
const CACHE_KIB: i64 = 8 * 1024;
/// What the write-ahead log keeps of the room that a large transaction made it take, in bytes.
const LOG_LIMIT: i64 = 64 << 20;
/// More than there are.
const STATEMENTS: usize = 96;

/// Brings the log into the file. True if all of it is there.
fn checkpoint(connection: &Connection) -> Result<bool, OpenError> {
    let (busy, logged, done): (bool, i64, i64) =
        connection
            .query_row("PRAGMA wal_checkpoint(TRUNCATE)", (), |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
    Ok(!busy || logged == done)
}

/// How many bytes the file system has for us.
pub(super) fn free_bytes(path: &Path) -> io::Result<u64> {
    let found = statvfs(path)?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

fn open_to_read(path: &Path) -> Result<Connection, OpenError> {
    if !path.exists() {
        return Err(OpenError::Refused("does not exist".to_owned()));
    }
    let connection =
        Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    refuse_strange(&connection)?;
    Ok(connection)
}

/// Copies a store as it is at one moment, while a server may be using it. The copy is read before it gets its name.
pub(super) fn backup(path: &Path, to: &Path, rules: Rules) -> Result<String, OpenError> {
    refuse_existing(to)?;
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(|error| OpenError::Refused(format!("cannot be copied: {error}")))?;
    let part = beside(to, &format!(".{}.part", crate::store::hex(&random)));
    let Some(name) = part.to_str() else {
        return Err(OpenError::Refused(format!("cannot be copied: {} is not UTF-8", to.display())));
    };
    let connection = open_to_read(path)?;
    let cannot_write =
        |error| OpenError::Refused(format!("cannot be copied: cannot write {}: {error}", part.display()));
    // SQLite writes only into a file that is new or empty.
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(&part).map_err(cannot_write)?;
    let copied = connection
        .execute("VACUUM INTO ?1", [name])
        .map_err(|error| OpenError::Refused(format!("cannot be copied to {}: {error}", part.display())))
        .and_then(|_| check(&part, rules))
        .and_then(|found| name_file(&part, to).map(|()| found).map_err(cannot_write));
    if copied.is_err() {
        // What is left of it is of no use.
        let _ = fs::remove_file(&part);
    }
    copied
}

/// Puts a backup where there is no store. The caller has the lock.
pub(super) fn restore(from: &Path, path: &Path, rules: Rules) -> Result<String, OpenError> {
    let log = beside(path, "-wal");
    if is_used(&log) {
        refuse_existing(&log)?;
    }
    refuse_existing(path)?;
    backup(from, path, rules)
}

fn refuse_existing(path: &Path) -> Result<(), OpenError> {
    match path.exists() {
        true => {
            let message = format!("cannot be copied: {} exists already, and is not overwritten", path.display());
            Err(OpenError::Refused(message))
        }
        false => Ok(()),
    }
}

/// Reads all of a store, as it is at one moment. Says what is in it.
pub(super) fn check(path: &Path, rules: Rules) -> Result<String, OpenError> {
    let connection = open_to_read(path)?;
    // One moment for all that is read.
    connection.execute_batch("BEGIN")?;
    let mut faults = Vec::new();
    connection.prepare("PRAGMA integrity_check(10)")?.query_map((), |row| row.get::<_, String>(0))?.try_for_each(
        |fault| {
            faults.push(fault?);
            Ok::<_, rusqlite::Error>(())
        },
    )?;
    if faults != ["ok"] {
        let faults = faults.join("\n").replace('\n', "; ");
        return Err(OpenError::Refused(format!("is damaged: {faults}")));
    }
    let index = load::index(&connection, rules, None)?;
    let sum = |of: fn(&super::queue::Queue) -> u64| index.queues.values().map(of).sum::<u64>();
    Ok(format!(
        "{} queues; tasks: {} ready, {} scheduled, {} leased, {} dead; {} inserted and {} acked since the beginning",
        index.queues.len(),
        sum(|queue| queue.ready.len() as u64),
        sum(|queue| queue.scheduled.len() as u64),
        sum(|queue| queue.leases.len() as u64),
        sum(|queue| queue.dead.len() as u64),
        sum(|queue| queue.ever.inserted),
        sum(|queue| queue.ever.acked),
    ))
}
