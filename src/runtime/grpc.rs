//! gRPC: the service of `proto/kv.proto`, and the standard ones of health and reflection.
//!
//! hyper speaks HTTP/2, and tonic finds the messages in it. tonic's own servers and services want to be shared among threads;
//! these stay on the core of their connection. Deadlines are kept here, and so are limits that tonic does not know: of the
//! memory that requests and responses on their way take ([`held`]), and of what messages become when they are decoded
//! ([`codec`]). Large values stay where they are while they are sent ([`reply`]).

mod codec;
mod health;
mod held;
mod kv;
mod reflection;
mod reply;

use super::calls::Calls;
use super::gateway::sleep;
use bytes::Bytes;
use codec::Codec;
use futures_util::future::{Either, Ready, ready, select};
use futures_util::stream::Stream;
use held::{Counted, Held};
use http::header::{ALLOW, CONTENT_TYPE};
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode};
use http_body::{Body as _, Frame};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use prost::Message;
pub(super) use reply::Body;
use reply::PREFIX_BYTES;
use std::future::Future;
use std::pin::pin;
use std::time::Duration;
use tonic::codec::CompressionEncoding;
use tonic::metadata::MetadataValue;
use tonic::server::{Grpc, ServerStreamingService, StreamingService};
use tonic::{Code, Status, Streaming};

/// A request whose body has not been read.
type Received<'a> = (&'a Parts, Incoming);

/// The name of the service, as health and reflection know it.
const SERVICE: &str = "memkv.KV";

static GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");
/// "true": the answer comes when what it tells is safe.
static DURABLE: HeaderName = HeaderName::from_static("memkv-durable");
static GRPC_ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");

/// Answers one request of an HTTP/2 connection.
pub(super) async fn serve(calls: Calls, request: Request<Incoming>) -> Response<Body> {
    let (head, body) = request.into_parts();
    if let Some(refusal) = refused_as_http(&head) {
        return refusal;
    }
    let timeout = match timeout(&head.headers) {
        Ok(Some(Duration::ZERO)) => return late(),
        Ok(timeout) => timeout,
        Err(status) => return status.into_http(),
    };
    let calls = match is_durable(&head.headers) {
        Ok(true) => calls.durable(),
        Ok(false) => calls,
        Err(status) => return status.into_http(),
    };
    let answer = pin!(answer(&calls, &head, body));
    let Some(timeout) = timeout else {
        return answer.await;
    };
    match select(answer, pin!(sleep(timeout))).await {
        Either::Left((response, _)) => response,
        Either::Right(_) => late(),
    }
}

async fn answer(calls: &Calls, head: &Parts, body: Incoming) -> Response<Body> {
    let request = (head, body);
    match head.uri.path() {
        "/memkv.KV/Get" => unary(calls, request, |message| kv::get(calls, message)).await,
        "/memkv.KV/Put" => unary(calls, request, |message| kv::put(calls, message)).await,
        "/memkv.KV/Delete" => unary(calls, request, |message| kv::delete(calls, message)).await,
        "/memkv.KV/BatchGet" => unary(calls, request, |message| kv::batch_get(calls, message)).await,
        "/memkv.KV/BatchPut" => unary(calls, request, |message| kv::batch_put(calls, message)).await,
        "/memkv.KV/Txn" => unary(calls, request, |message| kv::txn(calls, message)).await,
        "/memkv.KV/Metrics" => unary(calls, request, |message| kv::metrics(calls, message)).await,
        "/grpc.health.v1.Health/Check" => unary(calls, request, health::check).await,
        // In boxes: the future of every request has room for the largest of all.
        "/grpc.health.v1.Health/Watch" => Box::pin(server_stream(calls, request, health::watch)).await,
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
        | "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo" => {
            Box::pin(both_stream(calls, request, reflection::answers)).await
        }
        path => Status::unimplemented(format!("there is no method {path}")).into_http(),
    }
}

/// Requests that are not gRPC are answered in the words of HTTP.
fn refused_as_http(head: &Parts) -> Option<Response<Body>> {
    let refuse = |status, reason: &'static str| {
        let mut response = Response::new(match head.method {
            Method::HEAD => Body::default(),
            _ => Body::Other(tonic::body::Body::new(Full::from(reason))),
        });
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        response
    };
    if head.method != Method::POST {
        let reason = "this port is for gRPC, whose requests are POST\n";
        let mut response = refuse(StatusCode::METHOD_NOT_ALLOWED, reason);
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("POST"));
        return Some(response);
    }
    let content_type = head.headers.get(CONTENT_TYPE);
    if !content_type.is_some_and(|content_type| is_grpc(content_type.as_bytes())) {
        let reason = "this port is for gRPC, of content-type application/grpc or application/grpc+proto\n";
        return Some(refuse(StatusCode::UNSUPPORTED_MEDIA_TYPE, reason));
    }
    None
}

/// gRPC with messages of protobuf. Not gRPC-Web, and not with messages of another kind.
fn is_grpc(content_type: &[u8]) -> bool {
    const GRPC: &[u8] = b"application/grpc";
    const PROTO: &[u8] = b"+proto";
    let after = |text: &'_ [u8], front: &[u8]| {
        let (start, _) = text.split_at_checked(front.len())?;
        start.eq_ignore_ascii_case(front).then_some(front.len())
    };
    let Some(used) = after(content_type, GRPC) else {
        return false;
    };
    let rest = &content_type[used..];
    let rest = &rest[after(rest, PROTO).unwrap_or(0)..];
    matches!(rest.trim_ascii_start().first(), None | Some(b';'))
}

/// How long the client waits: `grpc-timeout`, up to eight digits and a unit.
fn timeout(headers: &HeaderMap) -> Result<Option<Duration>, Status> {
    let Some(text) = headers.get(&GRPC_TIMEOUT).map(HeaderValue::as_bytes) else {
        return Ok(None);
    };
    let parsed = text.split_last().and_then(|(unit, digits)| {
        if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
            return None;
        }
        let count = digits
            .iter()
            .fold(0, |count, digit| count * 10 + u64::from(digit - b'0'));
        Some(match unit {
            b'H' => Duration::from_secs(count * 3600),
            b'M' => Duration::from_secs(count * 60),
            b'S' => Duration::from_secs(count),
            b'm' => Duration::from_millis(count),
            b'u' => Duration::from_micros(count),
            b'n' => Duration::from_nanos(count),
            _ => return None,
        })
    });
    let wrong = || Status::invalid_argument("grpc-timeout is not up to eight digits and one of H, M, S, m, u, n");
    parsed.map(Some).ok_or_else(wrong)
}

/// The client waits until what it is told is safe: the metadata `memkv-durable`.
fn is_durable(headers: &HeaderMap) -> Result<bool, Status> {
    match headers.get(&DURABLE).map(HeaderValue::as_bytes) {
        None | Some(b"false") => Ok(false),
        Some(b"true") => Ok(true),
        Some(_) => Err(Status::invalid_argument("memkv-durable is true or false")),
    }
}

fn late() -> Response<Body> {
    Status::deadline_exceeded("the deadline came before the answer").into_http()
}

/// Serves a method with one request and one response. What both take is counted.
async fn unary<Q, R, F, Fut>(calls: &Calls, request: Received<'_>, method: F) -> Response<Body>
where
    Q: Message + Default + 'static,
    R: Message + 'static,
    F: Fn(Q) -> Fut,
    Fut: Future<Output = Result<R, Status>>,
{
    let served = async {
        let message: Q = only_message(calls, request).await?;
        let mut held = Held::new(calls);
        held.grow(message.encoded_len())?;
        let answer = method(message).await?;
        drop(held);
        reply::of(&answer, Held::new(calls))
    };
    served.await.unwrap_or_else(Status::into_http)
}

/// The message of a request that has one.
async fn only_message<Q: Message + Default + 'static>(calls: &Calls, request: Received<'_>) -> Result<Q, Status> {
    let limits = &calls.config().limits;
    let (keys_max, bytes_max) = (limits.request_keys_max as usize, limits.request_bytes_max() as usize);
    let (head, body) = request;
    let encoding = encoding(&head.headers)?;
    let mut body = Counted::new(body, Held::new(calls));
    // What is usual, all of it in one frame, needs no buffers.
    if let Some(frame) = body.frame().await.transpose()? {
        if let Some(message) = frame.data_ref().and_then(|data| plain_message(data, bytes_max)) {
            while let Some(frame) = next_frame(&mut body).await? {
                if frame.data_ref().is_some_and(|data| !data.is_empty()) {
                    return Err(several_messages());
                }
            }
            return codec::read(message, keys_max);
        }
        body.unread(frame);
    }
    Box::pin(collected_message(Streaming::new_request(
        Codec::<Q, ()>::new(keys_max),
        body,
        encoding,
        Some(bytes_max),
    )))
    .await
}

/// The same, from a body that tonic collects.
async fn collected_message<Q>(mut messages: Streaming<Q>) -> Result<Q, Status> {
    // A message over the limit is RESOURCE_EXHAUSTED in the other implementations of gRPC. tonic calls it OUT_OF_RANGE.
    let usual = |status: Status| match status.code() {
        Code::OutOfRange => Status::resource_exhausted(status.message()),
        _ => status,
    };
    let message = messages.message().await.map_err(usual)?;
    let message = message.ok_or_else(|| Status::internal("the request has no message"))?;
    match messages.message().await.map_err(usual)? {
        None => Ok(message),
        Some(_) => Err(several_messages()),
    }
}

fn several_messages() -> Status {
    Status::internal("the request has more than one message")
}

/// The message that `data` is, if it is one, no longer than it may be, and not compressed.
fn plain_message(data: &Bytes, bytes_max: usize) -> Option<Bytes> {
    let (prefix, message) = data.split_first_chunk::<PREFIX_BYTES>()?;
    let [0, length @ ..] = *prefix else { return None };
    let is_whole = u32::from_be_bytes(length) as usize == message.len() && message.len() <= bytes_max;
    is_whole.then(|| data.slice(PREFIX_BYTES..))
}

/// The next frame, unless it is known already that there is none.
async fn next_frame(body: &mut Counted) -> Result<Option<Frame<Bytes>>, Status> {
    match body.is_end_stream() {
        true => Ok(None),
        false => body.frame().await.transpose(),
    }
}

/// How the messages of a request are compressed that say they are.
fn encoding(headers: &HeaderMap) -> Result<Option<CompressionEncoding>, Status> {
    match headers.get(&GRPC_ENCODING).map(HeaderValue::as_bytes) {
        None | Some(b"identity") => Ok(None),
        Some(b"gzip") => Ok(Some(CompressionEncoding::Gzip)),
        Some(_) => {
            let mut status = Status::unimplemented("messages may be compressed with gzip, or not at all");
            let accepted = MetadataValue::from_static("gzip,identity");
            status.metadata_mut().insert("grpc-accept-encoding", accepted);
            Err(status)
        }
    }
}

/// tonic's side of a method that answers with a stream.
fn streaming<Q, R>(calls: &Calls, (head, body): Received<'_>) -> (Grpc<Codec<Q, R>>, Request<Counted>)
where
    Q: Message + Default + 'static,
    R: Message + 'static,
{
    let limits = &calls.config().limits;
    let grpc = Grpc::new(Codec::new(limits.request_keys_max as usize)).accept_compressed(CompressionEncoding::Gzip);
    let body = Counted::new(body, Held::new(calls));
    (grpc, Request::from_parts(head.clone(), body))
}

/// Serves a method with one request and a stream of responses.
async fn server_stream<Q, R, F, S>(calls: &Calls, request: Received<'_>, method: F) -> Response<Body>
where
    Q: Message + Default + 'static,
    R: Message + 'static,
    F: Fn(Q) -> S,
    S: Stream<Item = Result<R, Status>> + Send + 'static,
{
    let (mut grpc, request) = streaming(calls, request);
    let response = grpc.server_streaming(Streams(method), request).await;
    response.map(Body::Other)
}

/// Serves a method with a stream of requests and a stream of responses.
async fn both_stream<Q, R, F, S>(calls: &Calls, request: Received<'_>, method: F) -> Response<Body>
where
    Q: Message + Default + 'static,
    R: Message + 'static,
    F: Fn(Streaming<Q>) -> S + Send,
    S: Stream<Item = Result<R, Status>> + Send + 'static,
{
    let (mut grpc, request) = streaming(calls, request);
    let response = grpc.streaming(Streams(method), request).await;
    response.map(Body::Other)
}

/// A function as tonic's idea of a method that answers with a stream.
struct Streams<F>(F);

impl<F, S, Q, R> ServerStreamingService<Q> for Streams<F>
where
    F: Fn(Q) -> S,
    S: Stream<Item = Result<R, Status>>,
{
    type Response = R;
    type ResponseStream = S;
    type Future = Ready<Result<tonic::Response<S>, Status>>;

    fn call(&mut self, request: tonic::Request<Q>) -> Self::Future {
        ready(Ok(tonic::Response::new((self.0)(request.into_inner()))))
    }
}

impl<F, S, Q, R> StreamingService<Q> for Streams<F>
where
    F: Fn(Streaming<Q>) -> S,
    S: Stream<Item = Result<R, Status>>,
{
    type Response = R;
    type ResponseStream = S;
    type Future = Ready<Result<tonic::Response<S>, Status>>;

    fn call(&mut self, request: tonic::Request<Streaming<Q>>) -> Self::Future {
        ready(Ok(tonic::Response::new((self.0)(request.into_inner()))))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "in a test, the assertion")]

    use super::*;

    fn timeout_of(text: &'static str) -> Result<Option<Duration>, Code> {
        let headers = HeaderMap::from_iter([("grpc-timeout".parse().unwrap(), HeaderValue::from_static(text))]);
        timeout(&headers).map_err(|status| status.code())
    }

    #[test]
    fn timeouts() {
        assert_eq!(timeout(&HeaderMap::new()).unwrap(), None);
        for (text, wanted) in [
            ("1H", Duration::from_secs(3600)),
            ("2M", Duration::from_secs(120)),
            ("3S", Duration::from_secs(3)),
            ("99999999m", Duration::from_millis(99_999_999)),
            ("0u", Duration::ZERO),
            ("00000007n", Duration::from_nanos(7)),
            ("99999999H", Duration::from_secs(99_999_999 * 3600)),
        ] {
            assert_eq!(timeout_of(text), Ok(Some(wanted)), "{text}");
        }
        for text in [
            "",
            "H",
            "5",
            "5s",
            "-1S",
            "+1S",
            " 1S",
            "1 S",
            "1.5S",
            "123456789n",
            "1SS",
            "S1",
        ] {
            assert_eq!(timeout_of(text), Err(Code::InvalidArgument), "{text:?}");
        }
    }

    #[test]
    fn content_types() {
        for good in [
            "application/grpc",
            "application/grpc+proto",
            "Application/GRPC",
            "application/grpc; charset=utf-8",
            "application/grpc+proto;x=y",
            "application/grpc ;x=y",
        ] {
            assert!(is_grpc(good.as_bytes()), "{good}");
        }
        for bad in [
            "",
            "application/grp",
            "application/grpc-web",
            "application/grpc-web+proto",
            "application/grpc+json",
            "application/grpc+protobuf",
            "application/json",
            "text/plain; application/grpc",
        ] {
            assert!(!is_grpc(bad.as_bytes()), "{bad}");
        }
    }
}
