//! The short way to the service that nearly all calls are for.
//!
//! Tonic's router looks a path up in a tree, notes the parts that it matched, copies the service and puts request and response
//! into further boxes: more than a microsecond a call. Which service a call is for can be seen from the beginning of its path.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
};

use http::{Request, Response};
use tonic::{body::Body, server::NamedService};
use tower::{Layer, Service};

type Answer = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

/// Makes the way.
#[derive(Clone)]
pub struct ShortcutLayer<T> {
    to: T,
}

impl<T> ShortcutLayer<T> {
    /// To a service that the router has, too.
    pub fn new(to: T) -> Self {
        Self { to }
    }
}

impl<S, T: Clone> Layer<S> for ShortcutLayer<T> {
    type Service = Shortcut<S, T>;

    fn layer(&self, router: S) -> Shortcut<S, T> {
        Shortcut { router, to: self.to.clone() }
    }
}

#[derive(Clone)]
pub struct Shortcut<S, T> {
    router: S,
    to: T,
}

impl<S, T> Service<Request<Body>> for Shortcut<S, T>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
    T: Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future = Answer> + NamedService,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answer;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        match self.to.poll_ready(context) {
            Poll::Ready(Ok(())) => self.router.poll_ready(context),
            other => other,
        }
    }

    fn call(&mut self, request: Request<Body>) -> Answer {
        let method = request.uri().path().strip_prefix('/').and_then(|path| path.strip_prefix(T::NAME));
        match method {
            Some(method) if method.starts_with('/') => self.to.call(request),
            _ => Box::pin(self.router.call(request)),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use futures_util::FutureExt;
    use tower::ServiceExt;

    use super::*;

    #[derive(Clone)]
    struct Answers(&'static str);

    impl NamedService for Answers {
        const NAME: &'static str = "package.Service";
    }

    impl Service<Request<Body>> for Answers {
        type Response = Response<Body>;
        type Error = Infallible;
        type Future = Answer;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: Request<Body>) -> Answer {
            let response = Response::builder().header("by", self.0).body(Body::empty()).unwrap();
            async { Ok(response) }.boxed()
        }
    }

    #[tokio::test]
    async fn only_paths_of_the_service_go_past_the_router() {
        let service = ShortcutLayer::new(Answers("the service")).layer(Answers("the router"));
        let by = async |path: &str| {
            let request = Request::post(path).body(Body::empty()).unwrap();
            service.clone().oneshot(request).await.unwrap().headers()["by"].to_str().unwrap().to_owned()
        };
        for path in ["/package.Service/Method", "/package.Service/", "/package.Service/Method/more"] {
            assert_eq!(by(path).await, "the service");
        }
        for path in [
            "/package.Service",
            "/package.ServiceAdmin/Method",
            "/other.Service/Method",
            "/",
            "//package.Service/Method",
        ] {
            assert_eq!(by(path).await, "the router");
        }
    }
}
