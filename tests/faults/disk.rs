//! A disk under SQLite that fails where nobody waits for it.

use tonic::Code;

use crate::support::{
    PATIENCE,
    call::{insert_request, json},
    embedded::{Embedded, FILES},
    poll_until,
    status::Details,
    wire_tests,
};

/// The log is brought into the file when it has 4 MB; what is inserted meanwhile comes on top.
const MOST_LOG: usize = 16 << 20;

wire_tests! {
    /// G1: the file takes nothing, though the log beside it does. That is not hidden until the disk is full of the log:
    /// calls are refused, and go on when the file takes something again.
    async fn a_file_that_takes_nothing_is_noticed() {
        let server = Embedded::start(&[]).await;
        let mut client = server.client().await;
        let value = format!("\"{}\"", "x".repeat(100_000));
        let request = || insert_request("q", vec![json(&value); 5]);
        for fault in ["pwrite64:error=EIO", "fsync,fdatasync:error=EIO"] {
            let (calls, _) = fault.split_once(':').unwrap();
            let options = [format!("trace={calls}"), format!("inject={fault}:when=1+")];
            let strace = server.strace_on(&FILES[..1], &["-e", &options[0], "-e", &options[1]]);
            let refused = poll_until("a refusal", PATIENCE, async || {
                assert!(server.read(FILES[1]).len() < MOST_LOG, "{fault}: the log grows and nobody hears of it");
                client.insert(request()).await.err()
            })
            .await;
            assert_eq!((refused.code(), refused.reason().as_deref()), (Code::Unavailable, Some("STORE_UNAVAILABLE")), "{refused:?}");
            assert!(strace.injected() > 0);
            drop(strace);
            poll_until("an insert", PATIENCE, async || client.insert(request()).await.ok()).await;
        }
        assert!(server.log().contains("the store failed"), "{}", server.log());
        server.kill_and_check();
    }
}
