//! What tonic's defaults leave open, in one layer around all services: the caller's deadline, panics, stopping, the status
//! of a message that is too long, and the tie between a leased task and the body that carries it.

use std::{
    any::Any,
    convert::Infallible,
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use futures_util::FutureExt;
use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode,
    header::{ALLOW, CONTENT_TYPE},
};
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::time::{Instant, timeout_at};
use tokio_util::{
    sync::{CancellationToken, WaitForCancellationFutureOwned},
    task::{AbortOnDropHandle, TaskTracker, task_tracker::TaskTrackerToken},
};
use tonic::{Code, Status, body::Body};
use tower::{Layer, Service};

use super::{
    handover::{Handover, Stalled},
    status,
};

/// How long before the caller's deadline it is told that it passed, at most; at least a tenth of what it has. It must
/// hear it from us: at the deadline itself it stops listening, and tonic would answer CANCELLED.
const BEFORE_DEADLINE: Duration = Duration::from_millis(10);

/// A deadline as close as this has passed: the call is not begun.
const PASSED: Duration = Duration::from_micros(100);

/// Paths of the service whose calls are refused when the server stops. Health and reflection go on until the end.
const OWN_PATHS: &str = "/dataqueue.v1.";

/// When the caller of a request stops listening.
#[derive(Clone, Copy)]
pub(super) struct Deadline(Instant);

impl Deadline {
    pub(super) fn of<T>(request: &tonic::Request<T>) -> Option<Instant> {
        request.extensions().get::<Self>().map(|deadline| deadline.0)
    }
}

/// The calls that are under way in the process, and whether it stops.
#[derive(Clone, Default)]
pub struct Calls {
    /// Set: new calls are refused.
    pub stopping: CancellationToken,
    /// Set when no more calls are under way: streams that never end by themselves are ended.
    pub drained: CancellationToken,
    /// Holds a token for each call until its answer was taken or given up.
    pub under_way: TaskTracker,
}

/// Makes the layer.
#[derive(Clone)]
pub struct EdgeLayer {
    edge: Arc<Edge>,
}

struct Edge {
    calls: Calls,
    max_message: usize,
    stall_timeout: Duration,
}

impl EdgeLayer {
    /// `max_message` is the decode limit, in bytes, that tonic was given; `stall_timeout` is how long the reader of a
    /// stream may let what was leased for it lie.
    pub fn new(calls: Calls, max_message: usize, stall_timeout: Duration) -> Self {
        Self { edge: Arc::new(Edge { calls, max_message, stall_timeout }) }
    }
}

impl<S> Layer<S> for EdgeLayer {
    type Service = EdgeService<S>;

    fn layer(&self, inner: S) -> EdgeService<S> {
        EdgeService { inner, edge: Arc::clone(&self.edge) }
    }
}

#[derive(Clone)]
pub struct EdgeService<S> {
    inner: S,
    edge: Arc<Edge>,
}

impl<S> Service<Request<Body>> for EdgeService<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Send,
    S::Future: Send + 'static,
{
    type Response = Response<EdgeBody>;
    type Error = Infallible;
    type Future = Answer;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let calls = &self.edge.calls;
        let own = request.uri().path().starts_with(OWN_PATHS);
        if own && calls.stopping.is_cancelled() {
            return refuse(status::shutting_down());
        }
        if let Some((code, message)) = no_call(&request) {
            let mut response = Response::new(Body::new(message.to_owned()));
            *response.status_mut() = code;
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("POST"));
            return at_once(response);
        }
        let deadline = match timeout(request.headers()) {
            Ok(timeout) => timeout.and_then(|timeout| Instant::now().checked_add(timeout)),
            Err(status) => return refuse(*status),
        };
        if let Some(deadline) = deadline {
            if deadline.saturating_duration_since(Instant::now()) < PASSED {
                return refuse(status::deadline_exceeded());
            }
            request.extensions_mut().insert(Deadline(deadline));
        }
        let edge = Arc::clone(&self.edge);
        // Health watches and reflection streams are not waited for; they are ended once all other calls are done.
        let under_way = own.then(|| calls.under_way.token());
        let until = (!own).then(|| Box::pin(calls.drained.clone().cancelled_owned()));
        let work = AssertUnwindSafe(self.inner.call(request)).catch_unwind();
        Box::pin(async move {
            let answered = match deadline.map(answer_by) {
                Some(by) => timeout_at(by, work).await,
                None => Ok(work.await),
            };
            let mut response = match answered {
                Ok(Ok(Ok(response))) => response,
                Ok(Err(panic)) => status::bug(&panic_message(&*panic)).into_http(),
                Err(_) => status::deadline_exceeded().into_http(),
            };
            match refused_by_tonic(response.headers()) {
                Some(Code::OutOfRange | Code::ResourceExhausted) => {
                    response = status::message_too_large(edge.max_message).into_http();
                }
                Some(Code::Internal) => {
                    let message = response.headers().get("grpc-message");
                    tracing::debug!(?message, "a request that could not be read was refused");
                }
                _ => {}
            }
            let handover = response.extensions_mut().remove::<Handover>();
            let carried = handover.map(|handover| Carried::new(handover, edge.stall_timeout));
            let max_message = edge.max_message;
            Ok(response.map(|inner| EdgeBody { inner, carried, until, max_message, _under_way: under_way }))
        })
    }
}

type Answer = Pin<Box<dyn Future<Output = Result<Response<EdgeBody>, Infallible>> + Send>>;

fn refuse(status: Status) -> Answer {
    at_once(status.into_http())
}

fn at_once(response: Response<Body>) -> Answer {
    Box::pin(std::future::ready(Ok(response.map(|inner| EdgeBody {
        inner,
        carried: None,
        until: None,
        max_message: 0,
        _under_way: None,
    }))))
}

fn answer_by(deadline: Instant) -> Instant {
    let left = deadline.saturating_duration_since(Instant::now());
    deadline - BEFORE_DEADLINE.min(left / 10)
}

/// The code of a refusal without the details that nearly all of ours have. Tonic's are OUT_OF_RANGE when a message is longer
/// than its decode limit, RESOURCE_EXHAUSTED when it decompresses to more than that, and INTERNAL when it is no message.
fn refused_by_tonic(headers: &HeaderMap) -> Option<Code> {
    let code = headers.get("grpc-status").filter(|_| !headers.contains_key("grpc-status-details-bin"));
    code.map(|code| Code::from_bytes(code.as_bytes()))
}

/// What cannot be a call of gRPC, which is POST with a content type of its own, gets an answer of plain HTTP.
fn no_call(request: &Request<Body>) -> Option<(StatusCode, &'static str)> {
    let content_type = request.headers().get(CONTENT_TYPE).map(HeaderValue::as_bytes);
    let is_grpc = content_type.and_then(|text| text.strip_prefix(b"application/grpc"));
    if request.method() != Method::POST {
        return Some((StatusCode::METHOD_NOT_ALLOWED, "calls of gRPC are made with POST\n"));
    }
    // Not application/grpc-web, which is something else.
    match is_grpc.map(<[u8]>::first) {
        Some(None | Some(b'+' | b';')) => None,
        _ => Some((StatusCode::UNSUPPORTED_MEDIA_TYPE, "the content type of gRPC is application/grpc\n")),
    }
}

/// What a panic says, without the value that it may have been about: only a text that was written in the source.
fn panic_message(panic: &(dyn Any + Send)) -> String {
    match panic.downcast_ref::<&'static str>() {
        Some(text) => format!("a panic: {text}"),
        None => "a panic; standard error has the place".to_owned(),
    }
}

/// Reads `grpc-timeout`: 1 to 8 digits and a unit.
fn timeout(headers: &HeaderMap) -> Result<Option<Duration>, Box<Status>> {
    let Some(value) = headers.get("grpc-timeout") else { return Ok(None) };
    parse_timeout(value.as_bytes()).map(Some).ok_or_else(|| Box::new(status::timeout_invalid()))
}

fn parse_timeout(text: &[u8]) -> Option<Duration> {
    let (unit, digits) = text.split_last()?;
    if !(1..=8).contains(&digits.len()) || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number: u64 = std::str::from_utf8(digits).ok()?.parse().ok()?;
    match unit {
        b'H' => Some(Duration::from_secs(number * 3_600)),
        b'M' => Some(Duration::from_secs(number * 60)),
        b'S' => Some(Duration::from_secs(number)),
        b'm' => Some(Duration::from_millis(number)),
        b'u' => Some(Duration::from_micros(number)),
        b'n' => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

/// A body that knows which leased tasks it carries.
pub struct EdgeBody {
    inner: Body,
    carried: Option<Carried>,
    /// Set for streams that are ended when the server has drained.
    until: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
    /// For the status of a message that is too long, where the stream had begun.
    max_message: usize,
    /// Held until the body is done.
    _under_way: Option<TaskTrackerToken>,
}

/// The leased tasks of a body, and who watches that its client reads.
struct Carried {
    handover: Handover,
    stall_timeout: Duration,
    _watch: Option<AbortOnDropHandle<()>>,
}

impl Carried {
    fn new(handover: Handover, stall_timeout: Duration) -> Self {
        let watch = handover.is_of_stream().then(|| tokio::spawn(handover.clone().watch(stall_timeout)));
        Self { handover, stall_timeout, _watch: watch.map(AbortOnDropHandle::new) }
    }
}

impl HttpBody for EdgeBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        // hyper takes a frame before HTTP/2 has room for it, and asks for the next one when it was passed on.
        if let Some(carried) = &self.carried
            && let Err(Stalled) = carried.handover.taken()
        {
            let status = status::not_read(carried.stall_timeout);
            self.carried = None;
            self.inner = Body::empty();
            return Poll::Ready(Some(trailers(&status)));
        }
        let polled = Pin::new(&mut self.inner).poll_frame(context);
        if polled.is_pending()
            && let Some(until) = &mut self.until
        {
            ready!(until.as_mut().poll(context));
            self.until = None;
            return Poll::Ready(Some(trailers(&status::shutting_down())));
        }
        let mut frame = ready!(polled);
        let refused =
            |last: &HeaderMap| matches!(refused_by_tonic(last), Some(Code::OutOfRange | Code::ResourceExhausted));
        if let Some(Ok(last)) = &frame
            && last.trailers_ref().is_some_and(refused)
        {
            frame = Some(trailers(&status::message_too_large(self.max_message)));
        }
        if let (Some(carried), Some(_)) = (&self.carried, &frame) {
            carried.handover.given();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// The end of a stream.
fn trailers(status: &Status) -> Result<Frame<Bytes>, Status> {
    let mut trailers = HeaderMap::new();
    status.add_header(&mut trailers)?;
    Ok(Frame::trailers(trailers))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tower::{ServiceExt, service_fn};

    use super::*;

    #[tokio::test]
    async fn a_panic_fails_its_own_call_and_no_other() {
        let service = service_fn(|request: Request<Body>| async move {
            assert!(request.uri().path() != "/panic", "as asked");
            Ok::<_, Infallible>(Response::new(Body::empty()))
        });
        let mut service = EdgeLayer::new(Calls::default(), 1, Duration::from_secs(1)).layer(service);
        let mut ask = async |path: &str| {
            let request = Request::post(path).header(CONTENT_TYPE, "application/grpc").body(Body::empty()).unwrap();
            let response = service.ready().await.unwrap().call(request).await.unwrap();
            Status::from_header_map(response.headers()).map(|status| status.code())
        };
        assert_eq!(ask("/fine").await, None);
        assert_eq!(ask("/panic").await, Some(Code::Internal));
        assert_eq!(ask("/fine").await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn the_deadline_is_told_before_it_passes() {
        let service = service_fn(|_: Request<Body>| std::future::pending::<Result<Response<Body>, Infallible>>());
        let mut service = EdgeLayer::new(Calls::default(), 1, Duration::from_secs(1)).layer(service);
        let mut ask = async |timeout: &str| {
            let request = Request::post("/x")
                .header(CONTENT_TYPE, "application/grpc")
                .header("grpc-timeout", timeout)
                .body(Body::empty())
                .unwrap();
            let response = service.ready().await.unwrap().call(request).await.unwrap();
            Status::from_header_map(response.headers()).unwrap().code()
        };
        let began = Instant::now();
        assert_eq!(ask("1n").await, Code::DeadlineExceeded);
        assert_eq!(ask("abc").await, Code::InvalidArgument);
        assert_eq!(began.elapsed(), Duration::ZERO);
        assert_eq!(ask("1S").await, Code::DeadlineExceeded);
        assert!(began.elapsed() < Duration::from_secs(1));
    }

    #[test]
    fn timeouts_are_read_as_grpc_defines_them() {
        assert_eq!(parse_timeout(b"99999999H"), Some(Duration::from_secs(99_999_999 * 3_600)));
        assert_eq!(parse_timeout(b"10m"), Some(Duration::from_millis(10)));
        for bad in ["", "m", "abc", "1", "-1S", "123456789S", "1.5S", "1s"] {
            assert_eq!(parse_timeout(bad.as_bytes()), None, "{bad}");
        }
    }
}
