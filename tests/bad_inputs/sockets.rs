//! Clients that do not speak gRPC, and such as do not speak at all.

use std::{net::SocketAddr, time::Duration};

use http::{Method, StatusCode};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::timeout,
};

use crate::support::{
    PATIENCE,
    call::{Witness, insert_request, json, pop},
    http2::{PREFACE, SETTINGS, frame},
    on_every_store,
    raw::{self, Connection},
    server::Backend,
    unique_queue, wire_tests,
};
use prost::Message;

const INSERT: &str = "/dataqueue.v1.DataQueue/Insert";
const GRPC: (&str, &str) = ("content-type", "application/grpc");
/// So rarely that it is not by pings that the server finds out about a connection.
const NO_PINGS: &[&str] = &["--keepalive-interval", "1h"];
const SILENT: usize = 1_000;

/// Waits until the server has closed the connection, in whichever way.
async fn closed(mut socket: TcpStream, case: &str) {
    let read = timeout(PATIENCE, async {
        let mut buffer = [0; 4_096];
        while socket.read(&mut buffer).await.is_ok_and(|bytes| bytes > 0) {}
    });
    assert!(read.await.is_ok(), "{case}: not closed for {PATIENCE:?}");
}

async fn say(address: SocketAddr, bytes: &[u8]) -> TcpStream {
    let mut socket = TcpStream::connect(address).await.expect("a connection");
    // Closed meanwhile is what it shall be.
    let _ = socket.write_all(bytes).await;
    socket
}

/// Bytes that look like nothing, the same each time.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u8
    };
    (0..length).map(|_| next()).collect()
}

/// What a client of TLS 1.2 begins with.
fn tls_hello() -> Vec<u8> {
    let random = noise(7, 32);
    let hello = [&[3, 3][..], &random, &[0, 0, 2, 0xc0, 0x2f, 1, 0]].concat();
    let length = |bytes: &[u8]| u16::try_from(bytes.len()).unwrap().to_be_bytes();
    let message = [&[1, 0][..], &length(&hello), &hello].concat();
    [&[22, 3, 1][..], &length(&message), &message].concat()
}

on_every_store! {
    /// Row 42: requests of HTTP/2 that are no calls get an answer of HTTP, and do nothing.
    async fn row_42_requests_that_are_no_calls(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        let lines = server.log().lines().count();
        let connection = Connection::open(server.address()).await;
        let insert = insert_request(&witness.queue, vec![json("1")]);
        let body = raw::frame(0, &insert.encode_to_vec());
        for content_type in ["application/json", "text/plain", "application/grpc-web", "application/grpcx", "application", ""] {
            let headers = [("content-type", content_type)];
            let code = connection.http_status(Method::POST, INSERT, &headers, body.clone()).await;
            assert_eq!(code, StatusCode::UNSUPPORTED_MEDIA_TYPE, "{content_type:?}");
        }
        let code = connection.http_status(Method::POST, INSERT, &[], body.clone()).await;
        assert_eq!(code, StatusCode::UNSUPPORTED_MEDIA_TYPE, "no content type");
        for method in [Method::GET, Method::PUT, Method::DELETE, Method::HEAD, Method::OPTIONS, Method::PATCH] {
            for headers in [&[][..], &[GRPC]] {
                let code = connection.http_status(method.clone(), INSERT, headers, body.clone()).await;
                assert_eq!(code, StatusCode::METHOD_NOT_ALLOWED, "{method}, {headers:?}");
            }
        }
        witness.unchanged(&mut client, "requests that are no calls").await;
        for content_type in ["application/grpc+proto", "application/grpc;charset=utf-8"] {
            let queue = unique_queue("good");
            let body = raw::frame(0, &insert_request(&queue, vec![json("1")]).encode_to_vec());
            let headers = [("content-type", content_type), ("te", "trailers")];
            let code = connection.http_status(Method::POST, INSERT, &headers, body).await;
            assert_eq!(code, StatusCode::OK, "{content_type:?}");
            assert!(pop(&mut client, &queue).await.is_some(), "{content_type:?}");
        }
        assert_eq!(server.log().lines().count(), lines, "{}", server.log());
    }
}

wire_tests! {
    /// Row 42: whoever does not begin as a client of HTTP/2 does is cut off, at once or when the time for that is over.
    async fn row_42_bytes_that_are_no_http2() {
        let server = Backend::Memory.start(NO_PINGS).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        let lines = server.log().lines().count();
        let settings = frame(SETTINGS, 0, 0, &[]);
        let mut cases = vec![
            ("nothing", Vec::new()),
            ("HTTP/1.1", b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n".to_vec()),
            ("a POST of HTTP/1.1", format!("POST {INSERT} HTTP/1.1\r\ncontent-type: application/grpc\r\n\r\n").into()),
            ("an upgrade", b"GET / HTTP/1.1\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\n\r\n".to_vec()),
            ("a hello of TLS", tls_hello()),
            ("the first byte", PREFACE[..1].to_vec()),
            ("half a preface", PREFACE[..12].to_vec()),
            ("a preface", PREFACE.to_vec()),
            ("a preface and half a frame", [PREFACE, &settings[..8]].concat()),
            ("a frame too long", [PREFACE, &[255, 255, 255, 0, 0, 0, 0, 0, 1]].concat()),
            ("a frame too long after a good one", [PREFACE, &settings, &[255, 255, 255, 0, 0, 0, 0, 0, 1]].concat()),
            ("data for no stream", [PREFACE, &settings, &frame(0, 0, 1, b"x")].concat()),
            ("noise after a preface", [PREFACE, &settings, &noise(0, 100_000)].concat()),
        ];
        cases.extend((1..20).map(|seed| ("noise", noise(seed, 1 << seed))));
        let mut waiting = JoinSet::new();
        for (case, bytes) in cases {
            let socket = say(server.address(), &bytes).await;
            waiting.spawn(closed(socket, case));
        }
        // One who begins slowly, byte by byte, has no more time for it than the others.
        let mut slow = say(server.address(), &[]).await;
        waiting.spawn(async move {
            let mut tick = tokio::time::interval(Duration::from_secs(1));
            for byte in PREFACE {
                tick.tick().await;
                if slow.write_all(&[*byte]).await.is_err() {
                    return;
                }
            }
            panic!("a preface of 24 s was read to its end");
        });
        waiting.join_all().await;
        witness.unchanged(&mut client, "bytes that are no HTTP/2").await;
        assert_eq!(server.log().lines().count(), lines, "{}", server.log());
    }

    /// Row 43: a thousand sockets that say nothing hinder nobody, and are closed.
    async fn row_43_silent_sockets() {
        let server = Backend::Memory.start(NO_PINGS).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        let lines = server.log().lines().count();
        let mut waiting = JoinSet::new();
        for _ in 0..SILENT {
            let socket = say(server.address(), &[]).await;
            waiting.spawn(closed(socket, "a silent socket"));
        }
        while !waiting.is_empty() {
            pop(&mut server.client().await, &unique_queue("other")).await;
            while waiting.try_join_next().is_some() {}
        }
        witness.unchanged(&mut client, "silent sockets").await;
        assert_eq!(server.log().lines().count(), lines, "{}", server.log());
    }

    /// Row 43: silent sockets that take all the connections there may be take them for a time only.
    async fn row_43_silent_sockets_take_all_connections() {
        let flags = [NO_PINGS, &["--max-connections", "8"]].concat();
        let server = Backend::Memory.start(&flags).await;
        let mut silent = Vec::new();
        for _ in 0..16 {
            silent.push(say(server.address(), &[]).await);
        }
        let mut client = server.client().await;
        assert!(timeout(PATIENCE, pop(&mut client, "any")).await.expect("an answer in time").is_none());
    }
}
