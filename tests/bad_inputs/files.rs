//! Data folders and files that cannot be used, or that somebody uses already.

use std::{
    fs,
    os::unix::{fs::symlink, net::UnixListener},
    path::Path,
    sync::Arc,
};

use crate::support::{
    PATIENCE,
    call::{Witness, five, insert_json, pop},
    directory::{Directory, FILE},
    server::{Ended, Server, run_to_end},
    wire_tests,
};

/// Where SQLite's header has the version of the tables, and whose file it is.
const USER_VERSION: std::ops::Range<usize> = 60..64;
const APPLICATION_ID: std::ops::Range<usize> = 68..72;

/// Tries to start a server on a folder.
fn start_on(folder: &str) -> Ended {
    run_to_end(&["--listen", "127.0.0.1:0", "--data-dir", folder])
}

/// A folder with a store that was left in order, with a task in it.
async fn left_in_order() -> Directory {
    let directory = Arc::<Directory>::default();
    let server = Server::on_directory(Arc::clone(&directory), &[]);
    insert_json(&mut server.client().await, "q", &["1", "2"]).await;
    pop(&mut server.client().await, "q").await.expect("a task");
    server.terminate();
    assert_eq!(server.wait_exit(PATIENCE).code(), Some(0));
    drop(server);
    Arc::into_inner(directory).expect("the only one")
}

/// Whatever is wrong with the file: exit code 1, one line that names it, and not a byte of it changed.
fn refused(directory: &Directory, file: &[u8], case: &str, words: &[&str]) {
    let path = directory.file();
    fs::write(&path, file).unwrap();
    let name = path.to_str().unwrap();
    for round in 0..2 {
        eprintln!("{case}, round {round}");
        let ended = start_on(directory.text());
        ended.one_line(1, &[&[name], words].concat());
        assert!(fs::read(&path).unwrap() == file, "{case}: the file was changed");
    }
}

wire_tests! {
    /// Row 46: a second server on the same store, by whatever name, is refused in one line; the first is unharmed. The place
    /// is free when the first is killed.
    async fn row_46_second_server_on_a_store() {
        let server = Server::on_sqlite_with(&[]);
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        let directory = Arc::clone(server.directory());
        let elsewhere = Directory::default();
        let (folder, name) = (directory.text(), directory.join(FILE));
        let linked = elsewhere.join("linked");
        symlink(directory.path(), &linked).unwrap();
        let link = elsewhere.join(FILE);
        symlink(&name, &link).unwrap();
        for place in [
            ["--data-dir", folder],
            ["--data-dir", &format!("{folder}/../{}/", Path::new(folder).file_name().unwrap().to_str().unwrap())],
            ["--data-dir", &linked],
            ["--data-dir", elsewhere.text()],
            ["--store", &format!("sqlite:{name}")],
            ["--store", &format!("sqlite:{link}")],
        ] {
            eprintln!("{place:?}");
            let ended = run_to_end(&[&["--listen", "127.0.0.1:0"][..], &place].concat());
            ended.one_line(1, &["in use", FILE]);
            witness.unchanged(&mut client, "a second server").await;
        }
        server.restart().await;
        assert_eq!(five(&mut server.client().await, &witness.queue).await, [1, 1, 0, 2, 0]);
    }

    /// Row 47: a data folder that cannot be made, or is none.
    async fn row_47_data_folder_not_writable() {
        let directory = Directory::default();
        fs::write(directory.path().join("file"), "a file").unwrap();
        fs::create_dir_all(directory.path().join("folder").join(FILE)).unwrap();
        for (folder, word) in [
            (directory.join("file"), "file"),
            (directory.join("file/below"), "file"),
            (directory.join("file/far/below"), "file"),
            (directory.join("folder"), FILE),
            ("/proc/data-queue".to_owned(), "/proc/data-queue"),
        ] {
            start_on(&folder).one_line(1, &[word]);
        }
        let below = format!("sqlite:{}", directory.join("file/below.db"));
        run_to_end(&["--listen", "127.0.0.1:0", "--store", &below]).one_line(1, &["file"]);
        assert_eq!(fs::read(directory.path().join("file")).unwrap(), b"a file");
    }

    /// Row 47: a place where something is that is no file is refused before anything is made beside it.
    async fn row_47_place_that_is_no_file() {
        let directory = Directory::default();
        let (folder, socket, source) = (directory.join("folder"), directory.join("socket"), directory.join("backup"));
        fs::create_dir(&folder).unwrap();
        let _listener = UnixListener::bind(&socket).unwrap();
        symlink(&socket, directory.join("link")).unwrap();
        fs::write(&source, "no backup").unwrap();
        let list = |folder: &Path| {
            let mut names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>();
            names.sort();
            names
        };
        let (before, devices) = (list(directory.path()), list(Path::new("/dev")));
        for (place, word) in [
            (folder.as_str(), "folder"),
            (socket.as_str(), "no regular file"),
            (&directory.join("link"), "no regular file"),
            ("/dev/null", "no regular file"),
        ] {
            let store = format!("sqlite:{place}");
            for command in [&["--listen", "127.0.0.1:0"][..], &["check"], &["backup", &source], &["restore", &source]] {
                run_to_end(&[command, &["--store", &store]].concat()).one_line(1, &[place, word]);
                assert_eq!((list(directory.path()), list(Path::new("/dev"))), (before.clone(), devices.clone()));
            }
            assert_eq!(list(Path::new(&folder)), [""; 0]);
        }
    }

    /// Row 47: a file of a newer server is left alone.
    async fn row_47_file_of_a_newer_server() {
        let directory = left_in_order().await;
        let good = fs::read(directory.file()).unwrap();
        let known = i32::from_be_bytes(good[USER_VERSION].try_into().unwrap());
        for version in [known + 1, 1_000, i32::MAX, 0, -1] {
            let mut file = good.clone();
            file[USER_VERSION].copy_from_slice(&version.to_be_bytes());
            refused(&directory, &file, &format!("version {version}"), &["version", &version.to_string()]);
        }
        fs::write(directory.file(), good).unwrap();
        let server = Server::on_directory(Arc::new(directory), &[]);
        assert_eq!(five(&mut server.client().await, "q").await, [1, 1, 0, 2, 0]);
    }

    /// Row 47: a file that is empty, no store, or damaged is refused, and left as it is for whoever can mend it.
    async fn row_47_file_that_is_damaged() {
        let directory = left_in_order().await;
        let good = fs::read(directory.file()).unwrap();
        refused(&directory, b"", "an empty file", &["empty"]);
        refused(&directory, b"not a database", "a short text", &[]);
        refused(&directory, &b"not a database\n".repeat(1_000), "a long text", &["no store"]);
        refused(&directory, &[0; 8_192], "zeros", &[]);
        refused(&directory, &good[..100], "only the header", &[]);
        refused(&directory, &good[..good.len() / 2], "half of it", &[]);
        refused(&directory, &good[..good.len() - 4_096], "all but the last page", &[]);
        let mut foreign = good.clone();
        foreign[APPLICATION_ID].fill(0);
        refused(&directory, &foreign, "somebody else's database", &["no store"]);
        let mut header = good.clone();
        header[..16].fill(b'x');
        refused(&directory, &header, "another header", &["no store"]);
        for page in 1..good.len() / 4_096 {
            let mut damaged = good.clone();
            damaged[page * 4_096..(page + 1) * 4_096].fill(0xa5);
            refused(&directory, &damaged, &format!("page {page} overwritten"), &[]);
        }
    }
}
