//! A connection of a hand-written client.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::fault::Result;

/// So much that was taken may lie before what was not.
const TAKEN: usize = 256 * 1024;

/// A connection, and what was read from it and not yet taken.
pub(crate) struct Wire {
    peer: &'static str,
    stream: TcpStream,
    buffer: Vec<u8>,
    taken: usize,
}

impl Wire {
    pub(crate) async fn open(peer: &'static str, address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self { peer, stream, buffer: Vec::new(), taken: 0 })
    }

    pub(crate) async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.stream.write_all(bytes).await?)
    }

    /// Whether something was read that nobody has taken yet.
    pub(crate) fn has_more(&self) -> bool {
        self.taken < self.buffer.len()
    }

    /// The next line, without its end.
    pub(crate) async fn line(&mut self) -> Result<String> {
        let mut searched = self.taken;
        loop {
            if let Some(end) = self.buffer[searched..].iter().position(|byte| *byte == b'\n') {
                let end = searched + end;
                let line = String::from_utf8(self.buffer[self.taken..end].trim_ascii_end().to_vec())?;
                self.taken = end + 1;
                return Ok(line);
            }
            let before = self.buffer.len() - self.taken;
            self.read().await?;
            searched = self.taken + before;
        }
    }

    /// So many bytes.
    pub(crate) async fn bytes(&mut self, count: usize) -> Result<&[u8]> {
        while self.buffer.len() - self.taken < count {
            self.read().await?;
        }
        self.taken += count;
        Ok(&self.buffer[self.taken - count..self.taken])
    }

    async fn read(&mut self) -> Result<()> {
        if self.taken == self.buffer.len() {
            self.buffer.clear();
            self.taken = 0;
        } else if self.taken > TAKEN {
            self.buffer.drain(..self.taken);
            self.taken = 0;
        }
        self.buffer.reserve(64 * 1024);
        if self.stream.read_buf(&mut self.buffer).await? == 0 {
            Err(format!("{} closed the connection", self.peer).into())
        } else {
            Ok(())
        }
    }
}
