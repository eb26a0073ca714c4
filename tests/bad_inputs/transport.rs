//! Calls of methods and services that are not there.

use tonic::Code;

use crate::support::{
    call::{Witness, insert_request, json, pop_request},
    on_every_store,
    raw::Connection,
};

on_every_store! {
    /// Row 41: an unknown method, an unknown service; the connection goes on.
    async fn row_41_unknown_method_or_service(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        let connection = Connection::open(server.address()).await;
        let insert = insert_request(&witness.queue, vec![json("1")]);
        for path in [
            "/dataqueue.v1.DataQueue/Nope", "/dataqueue.v1.DataQueue/insert", "/dataqueue.v1.DataQueue/",
            "/dataqueue.v1.DataQueue", "/dataqueue.v9.DataQueue/Insert", "/Insert", "/",
            "/dataqueue.v1.DataQueue/Insert/", "//dataqueue.v1.DataQueue/Insert", "/dataqueue.v1.QueueAdmin/Insert",
            "/dataqueue.v1.QueueAdmin/Nope", "/dataqueue.v1.DataQueue/GetQueue",
        ] {
            let status = connection.call(path, &[], &insert).await.status().await;
            assert_eq!(status.code(), Code::Unimplemented, "{path}: {status:?}");
        }
        let status = connection.status("Pop", &[], &pop_request("any")).await;
        assert_eq!(status.code(), Code::Ok, "a good call on the same connection: {status:?}");
        witness.unchanged(&mut client, "unknown methods").await;
    }
}
