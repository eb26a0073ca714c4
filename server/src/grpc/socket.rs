//! An accepted connection: it counts against the limit while it is open, has little time to begin, and can be cut off.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::OwnedSemaphorePermit,
    time::{Sleep, sleep},
};
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::transport::server::{Connected, TcpConnectInfo};

/// How long a client may take to begin. From then on HTTP/2's pings find out whether it is there.
const BEGIN_WITHIN: Duration = Duration::from_secs(10);
/// What a client of HTTP/2 begins with: a fixed text, and the head of a SETTINGS frame.
const BEGINNING: usize = 24 + 9;

/// A connection.
pub struct Socket {
    stream: TcpStream,
    /// Until the client has begun.
    beginning: Option<Beginning>,
    /// How long the client may leave unread what was sent, and until when it may leave what waits to be sent now.
    patience: Duration,
    unread: Option<Pin<Box<Sleep>>>,
    cut_off: Pin<Box<WaitForCancellationFutureOwned>>,
    _permit: OwnedSemaphorePermit,
}

struct Beginning {
    bytes_left: usize,
    time_left: Pin<Box<Sleep>>,
}

impl Socket {
    /// A client that takes nothing of what is sent for as long as `patience` is given up; pings cannot be sent to it, so they
    /// do not find out. `cut_off` ends the connection from this side, and with it all calls on it.
    pub fn new(
        stream: TcpStream,
        patience: Duration,
        cut_off: WaitForCancellationFutureOwned,
        permit: OwnedSemaphorePermit,
    ) -> Self {
        let beginning = Beginning { bytes_left: BEGINNING, time_left: Box::pin(sleep(BEGIN_WITHIN)) };
        let beginning = Some(beginning);
        Self { stream, beginning, patience, unread: None, cut_off: Box::pin(cut_off), _permit: permit }
    }

    /// So many bytes came.
    fn came(&mut self, bytes: usize) {
        if let Some(beginning) = &mut self.beginning {
            beginning.bytes_left = beginning.bytes_left.saturating_sub(bytes);
            if beginning.bytes_left == 0 {
                self.beginning = None;
            }
        }
    }

    /// Ready when nothing more is to be read although nobody has closed the connection.
    fn poll_given_up(&mut self, context: &mut Context<'_>) -> Poll<io::ErrorKind> {
        if self.cut_off.as_mut().poll(context).is_ready() {
            return Poll::Ready(io::ErrorKind::ConnectionAborted);
        }
        match &mut self.beginning {
            Some(beginning) => beginning.time_left.as_mut().poll(context).map(|()| io::ErrorKind::TimedOut),
            None => Poll::Pending,
        }
    }

    /// What writing came to, unless it has waited for too long.
    fn written(&mut self, written: Poll<io::Result<usize>>, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if written.is_ready() {
            self.unread = None;
            return written;
        }
        if self.cut_off.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        let unread = self.unread.get_or_insert_with(|| Box::pin(sleep(self.patience)));
        unread.as_mut().poll(context).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl Connected for Socket {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        match Pin::new(&mut self.stream).poll_read(context, buffer) {
            Poll::Pending => Poll::Ready(Err(ready!(self.poll_given_up(context)).into())),
            read => {
                self.came(buffer.filled().len() - before);
                read
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.written(written, context)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.written(written, context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
