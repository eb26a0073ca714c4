//! Bytes that no generated client sends where a message should be.

use data_queue_proto::reason;
use prost::Message;
use tonic::{Code, codec::CompressionEncoding};

use crate::support::{
    call::{Witness, data, five, insert_request, json, pop, pop_request, text},
    memory, on_every_store,
    raw::{Connection, frame},
    server::Server,
    status::Refusal,
    unique_queue,
};

type Headers<'a> = &'a [(&'a str, &'a str)];

const LIMIT: usize = 4 << 20;
const GZIP: (&str, &str) = ("grpc-encoding", "gzip");

/// 1 GiB of zeros in 1 MiB of gzip, whose end does not matter. In the one block of it, the codes for "258 bytes like the
/// last one" and for "one byte back" are a 0 bit each, so nearly all of it is zeros.
fn gzip_bomb() -> Vec<u8> {
    const COPIES: usize = (1 << 30) / 258;
    let mut bits = Vec::new();
    // The lowest bit first.
    let mut number = |value: u32, width: u32| bits.extend((0..width).map(|at| value >> at & 1 == 1));
    // The last block, with codes of its own: for 286 symbols, one distance and 18 code lengths.
    for (value, width) in [(1, 1), (2, 2), (29, 5), (0, 5), (14, 4)] {
        number(value, width);
    }
    // Of the code lengths, in the format's order, "many zeros" has one bit, and 1 and 2 have two.
    for length in [0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 2] {
        number(length, 3);
    }
    let many_zeros = |count: u32| [(0, 1), (count - 11, 7)];
    let (one, two) = ([(0b01, 2)], [(0b11, 2)]);
    // A zero byte and the end take two bits, "258 bytes" and "one byte back" one.
    for (value, width) in [&two[..], &many_zeros(138), &many_zeros(117), &two, &many_zeros(28), &one, &one].concat() {
        number(value, width);
    }
    number(0b01, 2);
    bits.resize(bits.len() + 2 * COPIES, false);
    let head = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
    let byte = |bits: &[bool]| bits.iter().rev().fold(0, |byte, bit| byte << 1 | u8::from(*bit));
    head.into_iter().chain(bits.chunks(8).map(byte)).collect()
}

/// A message of nearly the limit, so that the server has the memory for one at hand.
async fn warm_up(server: &Server) {
    let mut client = server.client().await;
    let queue = unique_queue("warm");
    for _ in 0..2 {
        client.insert(insert_request(&queue, (0..3).map(|_| data(vec![7; 1 << 20])).collect())).await.unwrap();
        while pop(&mut client, &queue).await.is_some() {}
    }
}

on_every_store! {
    /// Row 12: a message that says it has 4 GiB and has 5 bytes is refused before there is room made for it, and so is
    /// one that says it has just over the limit.
    async fn row_12_message_that_says_it_is_huge(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        let lines = server.log().lines().count();
        let connection = Connection::open(server.address()).await;
        warm_up(&server).await;
        memory::forget_peak(server.pid());
        let before = memory::peak(server.pid());
        for length in [u32::MAX, 1 << 31, u32::try_from(LIMIT).unwrap() + 1] {
            for method in ["Insert", "Pop", "PopBatch", "Ack"] {
                let body = [&[0][..], &length.to_be_bytes(), b"hello"].concat();
                let status = connection.status_of_bytes(method, &[], body.into()).await;
                let case = format!("{method} of {length} bytes");
                Refusal::of(Code::ResourceExhausted, reason::MESSAGE_TOO_LARGE).check::<()>(&case, Err(status));
            }
        }
        let grown = memory::peak(server.pid()).saturating_sub(before);
        assert!(grown < 8 << 20, "took {grown} bytes more");
        witness.unchanged(&mut client, "messages that say they are huge").await;
        assert_eq!(server.log().lines().count(), lines, "{}", server.log());
    }

    /// Row 13: what is no message fails its own call and no other on the connection, and is nothing that the server's log
    /// complains of.
    async fn row_13_bytes_that_are_no_message(backend) {
        let server = backend.start(&["--log-level", "debug"]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        let lines = server.log().lines().count();
        let connection = Connection::open(server.address()).await;
        let good = insert_request(&witness.queue, vec![json("1")]).encode_to_vec();
        let deep = [0x7b; 10_000];
        let cases: &[(&str, u8, &[u8], Headers<'_>)] = &[
            ("a truncated varint", 0, &[0x0a, 0x80], &[]),
            ("a varint of eleven bytes", 0, &[0x0a, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1], &[]),
            ("a field longer than the message", 0, &[0x0a, 5, b'a'], &[]),
            ("a length of 2^63", 0, &[0x0a, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 1], &[]),
            ("a group where a field is", 0, &[0x0b, 0x0c], &[]),
            ("a group that does not end", 0, &[0x7b], &[]),
            ("the end of no group", 0, &[0x0c], &[]),
            ("groups in groups", 0, &deep, &[]),
            ("field 0", 0, &[0x02, 0], &[]),
            ("wire type 6", 0, &[0x0e], &[]),
            ("wire type 7", 0, &[0x0f], &[]),
            ("text that is not UTF-8", 0, &[0x0a, 2, 0xff, 0xfe], &[]),
            ("compressed flag 7", 7, &good, &[]),
            ("compressed, and not said how", 1, &good, &[]),
            ("compressed as identity", 1, &good, &[("grpc-encoding", "identity")]),
            ("no gzip that says it is", 1, &good, &[GZIP]),
            ("gzip that ends early", 1, &[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255, 1], &[GZIP]),
        ];
        for method in ["Insert", "Pop", "PopBatch", "Ack", "Heartbeat", "Putback"] {
            for (case, flag, bytes, headers) in cases {
                let status = connection.status_of_bytes(method, headers, frame(*flag, bytes)).await;
                assert_eq!(status.code(), Code::Internal, "{method}, {case}: {status:?}");
            }
            for (case, body) in [("no message", &[][..]), ("half a head", &[0, 0]), ("half a message", &[0, 0, 0, 0, 9, 8])] {
                let status = connection.status_of_bytes(method, &[], body.to_vec().into()).await;
                assert_eq!(status.code(), Code::Internal, "{method}, {case}: {status:?}");
            }
            for encoding in ["br", "zstd", "deflate", "GZIP", "gzip,gzip", ""] {
                let body = frame(1, &good);
                let status = connection.status_of_bytes(method, &[("grpc-encoding", encoding)], body).await;
                assert_eq!(status.code(), Code::Unimplemented, "{method}, encoding {encoding:?}: {status:?}");
            }
            let status = connection.status("Pop", &[], &pop_request("any")).await;
            assert_eq!(status.code(), Code::Ok, "a good call on the same connection: {status:?}");
        }
        witness.unchanged(&mut client, "bytes that are no message").await;
        let log = server.log();
        assert!(log.contains("could not be read"), "{log}");
        assert!(log.lines().skip(lines).all(|line| line.contains("DEBUG")), "{log}");
    }

    /// Row 14: gzip that would be 1 GiB is refused when it is longer than a message may be, and takes no more memory than
    /// a few such messages do.
    async fn row_14_gzip_bomb(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let mut witness = Witness::new(&mut client).await;
        let lines = server.log().lines().count();
        let connection = Connection::open(server.address()).await;
        let bomb = frame(1, &gzip_bomb());
        assert!((1_000_000..1 << 21).contains(&bomb.len()), "{} bytes", bomb.len());
        warm_up(&server).await;
        memory::forget_peak(server.pid());
        let before = memory::peak(server.pid());
        for method in ["Insert", "Pop", "PopBatch", "Ack"] {
            let status = connection.status_of_bytes(method, &[GZIP], bomb.clone()).await;
            Refusal::of(Code::ResourceExhausted, reason::MESSAGE_TOO_LARGE).check::<()>(method, Err(status));
        }
        let grown = memory::peak(server.pid()).saturating_sub(before);
        println!("a bomb took {} KiB more", grown >> 10);
        // The message as far as it was decompressed, what it came in, and a copy when the buffer grows.
        // A buffer that grows is there twice for a moment, and the allocator keeps what was freed for a while.
        assert!(grown < 8 * LIMIT as u64, "took {grown} bytes more");
        witness.unchanged(&mut client, "a bomb").await;
        assert_eq!(server.log().lines().count(), lines, "{}", server.log());
    }

    /// Row 14: gzip that is none of a bomb is read, from the generated client and made by hand; answers are not compressed.
    async fn row_14_gzip_is_read(backend) {
        let server = backend.start(&[]).await;
        let mut client = server.client().await;
        let queue = unique_queue("gzip");
        let long = format!("\"{}\"", "long ".repeat(100_000));
        let mut compressing = (*client).clone().send_compressed(CompressionEncoding::Gzip).accept_compressed(CompressionEncoding::Gzip);
        compressing.insert(insert_request(&queue, vec![json("1"), json(&long)])).await.unwrap();

        // The same message in a block that is stored as it is.
        let stored = insert_request(&queue, vec![json("3")]).encode_to_vec();
        let length = u16::try_from(stored.len()).unwrap();
        let mut gzip = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255, 1];
        gzip.extend([length.to_le_bytes(), (!length).to_le_bytes()].concat());
        gzip.extend(&stored);
        gzip.extend([crc32(&stored).to_le_bytes(), u32::from(length).to_le_bytes()].concat());
        let connection = Connection::open(server.address()).await;
        let accept = ("grpc-accept-encoding", "gzip");
        let status = connection.status_of_bytes("Insert", &[GZIP, accept], frame(1, &gzip)).await;
        assert_eq!(status.code(), Code::Ok, "{status:?}");
        // A call may name an encoding and send a message without it.
        let status = connection.status_of_bytes("Insert", &[GZIP], frame(0, &stored)).await;
        assert_eq!(status.code(), Code::Ok, "{status:?}");

        for expected in ["1", &long, "3", "3"] {
            let answer = compressing.pop(pop_request(&queue)).await.unwrap();
            assert_eq!(answer.metadata().get("grpc-encoding"), None);
            assert_eq!(text(&answer.into_inner().task.unwrap()), expected);
        }
        assert_eq!(five(&mut client, &queue).await, [0, 4, 0, 4, 0]);
    }
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| crc >> 1 ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 })
    })
}
