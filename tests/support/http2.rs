//! HTTP/2 frames made by hand, for what no library sends: a frame is a head of nine bytes and what follows.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    task::JoinHandle,
};

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const CONTINUATION: u8 = 9;

pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;
const ACK: u8 = 1;

/// The reasons that streams are reset and connections are ended for.
pub const REFUSED_STREAM: u32 = 7;
pub const CANCEL: u32 = 8;
pub const ENHANCE_YOUR_CALM: u32 = 11;

pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// The header block of a call: every field literal, but for the two that each has.
pub fn call_headers(path: &str) -> Vec<u8> {
    let mut block = vec![0x83, 0x86];
    for (name, value) in
        [(":path", path), (":authority", "localhost"), ("content-type", "application/grpc"), ("te", "trailers")]
    {
        block.extend(literal(name, value));
    }
    block
}

/// A field of less than 127 bytes, not to be put into any table.
pub fn literal(name: &str, value: &str) -> Vec<u8> {
    let text = |text: &str| [&[u8::try_from(text.len()).unwrap()], text.as_bytes()].concat();
    assert!(name.len() < 127 && value.len() < 127);
    [vec![0], text(name), text(value)].concat()
}

/// A connection on which anything can be sent.
pub struct Wire {
    write: OwnedWriteHalf,
    read: JoinHandle<Seen>,
}

/// What the server sent until it closed the connection.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Why it ended the connection, if it said so.
    pub goaway: Option<u32>,
    /// Why it reset streams.
    pub resets: Vec<u32>,
    /// Answers to pings and settings.
    pub acks: usize,
}

impl Wire {
    /// Says what every client begins with.
    pub async fn open(address: SocketAddr) -> Self {
        let socket = TcpStream::connect(address).await.expect("a connection");
        let (read, write) = socket.into_split();
        let mut wire = Self { write, read: tokio::spawn(read_all(read)) };
        wire.send(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat()).await;
        wire
    }

    /// Sends bytes. False if the connection is closed.
    pub async fn send(&mut self, bytes: &[u8]) -> bool {
        !self.read.is_finished() && self.write.write_all(bytes).await.is_ok()
    }

    /// Sends no more, and waits for the server to close.
    pub async fn end(mut self) -> Seen {
        let _ = self.write.shutdown().await;
        self.read.await.expect("what the server sent")
    }
}

async fn read_all(read: OwnedReadHalf) -> Seen {
    let mut read = tokio::io::BufReader::new(read);
    let mut seen = Seen::default();
    let mut head = [0; 9];
    while read.read_exact(&mut head).await.is_ok() {
        let mut payload = vec![0; usize::try_from(u32::from_be_bytes([0, head[0], head[1], head[2]])).unwrap()];
        if read.read_exact(&mut payload).await.is_err() {
            break;
        }
        let word = |at: usize| payload[at..at + 4].try_into().map(u32::from_be_bytes).unwrap();
        match (head[3], head[4]) {
            (RST_STREAM, _) => seen.resets.push(word(0)),
            // Said twice when a connection ends in good order; what it ends for comes last.
            (GOAWAY, _) => seen.goaway = Some(word(4)),
            (SETTINGS | PING, ACK) => seen.acks += 1,
            _ => {}
        }
    }
    seen
}
