//! HTTP/2 below the generated client, for requests that it will not send and answers that it will not refuse.

use std::{net::SocketAddr, time::Duration};

use bytes::{BufMut, Bytes, BytesMut};
use h2::{
    Reason, RecvStream, SendStream,
    client::{Builder, ResponseFuture, SendRequest},
};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use prost::Message;
use tokio::{net::TcpStream, sync::oneshot, task::JoinHandle, time::timeout};
use tonic::{Code, Status};

use super::PATIENCE;

const SERVICE: &str = "dataqueue.v1.DataQueue";
/// What every call has.
const GRPC: &[(&str, &str)] = &[("content-type", "application/grpc"), ("te", "trailers")];

/// One HTTP/2 connection.
pub struct Connection {
    address: SocketAddr,
    requests: SendRequest<Bytes>,
    driver: JoinHandle<Result<(), h2::Error>>,
    window: oneshot::Sender<u32>,
}

/// A call that was sent.
pub struct Sent {
    response: ResponseFuture,
    body: SendStream<Bytes>,
}

/// A call of which the answer's headers came.
pub struct Answering {
    response: Response<RecvStream>,
    body: SendStream<Bytes>,
}

impl Connection {
    pub async fn open(address: SocketAddr) -> Self {
        Self::with(address, &Builder::new()).await
    }

    /// A connection on which the server may send headers, and not a byte of a body.
    pub async fn without_window(address: SocketAddr) -> Self {
        Self::with_window(address, 0).await
    }

    /// A connection on which the server may send so many bytes of each body, and no more.
    pub async fn with_window(address: SocketAddr, window: u32) -> Self {
        const AMPLE: u32 = 1 << 24;
        let mut builder = Builder::new();
        Self::with(address, builder.initial_window_size(window).initial_connection_window_size(AMPLE)).await
    }

    async fn with(address: SocketAddr, builder: &Builder) -> Self {
        let socket = TcpStream::connect(address).await.expect("a connection");
        let (requests, mut connection) = builder.handshake(socket).await.expect("an HTTP/2 handshake");
        let (window, other_window) = oneshot::channel();
        let driver = tokio::spawn(async move {
            tokio::select! {
                ended = &mut connection => return ended,
                Ok(window) = other_window => connection.set_initial_window_size(window)?,
            }
            connection.await
        });
        Self { address, requests, driver, window }
    }

    /// From here on the server may send so many bytes of each body, the calls under way included.
    pub fn set_window(self, window: u32) {
        self.window.send(window).expect("the connection is there");
    }

    /// Sends one message to a path, before whatever is sent on this connection later.
    pub async fn send(&self, path: &str, headers: &[(&str, &str)], message: &impl Message) -> Sent {
        self.request(Method::POST, path, &[GRPC, headers].concat(), frame(0, &message.encode_to_vec()), true).await
    }

    /// Sends one message to a path and waits for the answer's headers.
    pub async fn call(&self, path: &str, headers: &[(&str, &str)], message: &impl Message) -> Answering {
        self.send(path, headers, message).await.answer().await
    }

    /// Sends a first message to a path, of a stream that stays open, and waits for the answer's headers.
    pub async fn open_stream(&self, path: &str, message: &impl Message) -> Answering {
        self.request(Method::POST, path, GRPC, frame(0, &message.encode_to_vec()), false).await.answer().await
    }

    /// The status of a call of this method with this body, whatever is in it.
    pub async fn status_of_bytes(&self, method: &str, headers: &[(&str, &str)], body: Bytes) -> Status {
        let path = format!("/{SERVICE}/{method}");
        self.request(Method::POST, &path, &[GRPC, headers].concat(), body, true).await.answer().await.status().await
    }

    /// What HTTP answers to a request that is no call.
    pub async fn http_status(&self, method: Method, path: &str, headers: &[(&str, &str)], body: Bytes) -> StatusCode {
        self.request(method, path, headers, body, true).await.answer().await.response.status()
    }

    /// With all of the body, or its beginning.
    async fn request(&self, method: Method, path: &str, headers: &[(&str, &str)], bytes: Bytes, all: bool) -> Sent {
        let mut request = Request::builder().method(method).uri(format!("http://{}{path}", self.address));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(()).expect("a request");
        let mut requests = self.requests.clone().ready().await.expect("room for a request");
        let (response, mut body) = requests.send_request(request, false).expect("a request");
        // A server that refuses by the headers alone may have ended the stream already.
        let _ = body.send_data(bytes, all);
        Sent { response, body }
    }

    /// Closes the socket without a word, and with it every call on it.
    pub async fn vanish(self) {
        self.driver.abort();
        let _ = self.driver.await;
    }

    /// The status of a call of this method.
    pub async fn status(&self, method: &str, headers: &[(&str, &str)], message: &impl Message) -> Status {
        self.call(&format!("/{SERVICE}/{method}"), headers, message).await.status().await
    }
}

impl Sent {
    async fn answer(self) -> Answering {
        let response = timeout(PATIENCE, self.response).await.expect("an answer in time").expect("an answer");
        Answering { response, body: self.body }
    }

    /// Resets the stream, before whatever is sent on this connection later.
    pub fn cancel(mut self) {
        self.body.send_reset(Reason::CANCEL);
    }
}

impl Answering {
    /// Reads the answer to its end.
    pub async fn status(self) -> Status {
        self.body_and_status().await.1
    }

    /// Reads the answer to its end, and gives its messages too.
    pub async fn messages<M: Message + Default>(self) -> (Vec<M>, Status) {
        let (body, status) = self.body_and_status().await;
        let mut messages = Vec::new();
        let mut left = &body[..];
        while let Some((head, rest)) = left.split_first_chunk::<5>() {
            let (message, rest) = rest.split_at(message_length(head));
            messages.push(M::decode(message).expect("a message"));
            left = rest;
        }
        assert!(left.is_empty(), "a part of a message at the end");
        (messages, status)
    }

    async fn body_and_status(self) -> (Vec<u8>, Status) {
        let (head, mut body) = self.response.into_parts();
        assert_eq!(head.status, 200, "{head:?}");
        if let Some(status) = Status::from_header_map(&head.headers) {
            return (Vec::new(), status);
        }
        let mut read = Vec::new();
        let trailers = timeout(PATIENCE, async {
            while let Some(data) = body.data().await {
                let data = data.expect("a body");
                body.flow_control().release_capacity(data.len()).expect("a window");
                read.extend_from_slice(&data);
            }
            body.trailers().await.expect("trailers")
        });
        let trailers: HeaderMap = trailers.await.expect("trailers in time").unwrap_or_default();
        let status = Status::from_header_map(&trailers).unwrap_or_else(|| Status::new(Code::Unknown, "no grpc-status"));
        (read, status)
    }

    /// Reads the first message and at least a byte of what comes behind it, and gives the server no more room for that.
    pub async fn first_message<M: Message + Default>(&mut self) -> M {
        let mut read = Vec::new();
        loop {
            if let Some((head, rest)) = read.split_first_chunk::<5>() {
                let length = message_length(head);
                if rest.len() > length {
                    return M::decode(&rest[..length]).expect("a message");
                }
            }
            let data = timeout(PATIENCE, self.response.body_mut().data()).await.expect("a body in time");
            read.extend_from_slice(&data.expect("more of the body").expect("a body"));
        }
    }

    /// Sends further messages, together.
    pub fn say(&mut self, messages: &[impl Message]) {
        let frames = messages.iter().map(|message| frame(0, &message.encode_to_vec())).collect::<Vec<_>>();
        self.body.send_data(frames.concat().into(), false).expect("an open stream");
    }

    /// Resets the stream.
    pub fn cancel(mut self) {
        self.body.send_reset(Reason::CANCEL);
    }
}

/// `grpc-timeout` in nanoseconds or milliseconds.
pub fn grpc_timeout(timeout: Duration) -> String {
    if timeout < Duration::from_millis(1) {
        format!("{}n", timeout.as_nanos())
    } else {
        format!("{}m", timeout.as_millis())
    }
}

fn message_length(head: &[u8; 5]) -> usize {
    usize::try_from(u32::from_be_bytes([head[1], head[2], head[3], head[4]])).unwrap()
}

/// A message as gRPC sends it, behind a flag that says whether it is compressed.
pub fn frame(flag: u8, message: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(5 + message.len());
    frame.put_u8(flag);
    frame.put_u32(u32::try_from(message.len()).unwrap());
    frame.put_slice(message);
    frame.freeze()
}
