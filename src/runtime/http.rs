//! HTTP: keys as resources, several keys at one instant, health, metrics, and the page about the server.
//!
//! ```text
//! GET, HEAD, PUT, DELETE /keys/{key}   the value as raw bytes; as JSON where Accept says so. /key/{key} is the same
//! POST /keys:batch                     several operations at one instant: see `batch`
//! POST /snapshot                       begins a snapshot of the data directory
//! GET /healthz /readyz /version        for supervisors
//! GET /metrics                         for Prometheus
//! GET / /events                        the page, and what it shows each second
//! GET /openapi.json                    all of this, for programs
//! ```
//! An item's ETag is its version. hyper reads requests and writes responses; what they mean is decided here, and executed by
//! calls ([`super::calls`]). What is refused is explained by a problem document (RFC 9457).

mod batch;
mod conditions;

use super::calls::Calls;
use super::gateway::sleep;
use crate::config::{Config, parse_duration};
use crate::model::{
    Command, Condition, Deadline, Delete, LARGE_VALUE_BYTES, NewVersion, Op, Put, UnixMillis, Value, Version,
};
use crate::protocol::call::{Answer, Outcome, Text};
use crate::protocol::{NO_LOG, NOT_DURABLE};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use conditions::{Conditions, etag};
use futures_util::Stream;
use futures_util::future::{Either, select};
use http_body_util::BodyExt;
use hyper::body::{Body as _, Frame, Incoming};
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::{Method, Request, Response, StatusCode, Version as HttpVersion};
use percent_encoding::percent_decode_str;
use serde::Serialize;
use std::borrow::Cow;
use std::cell::Cell;
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::net::IpAddr;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

/// Longer than anybody waits.
const FOR_EVER: Duration = Duration::from_secs(365 * 24 * 60 * 60);
/// How often the page is told.
const EVENT_PERIOD: Duration = Duration::from_secs(1);
/// Pages that one core tells.
const EVENT_STREAMS_MAX: usize = 32;
/// Bytes of headers of one request. Far more, and hyper refuses them before they come here.
const HEADERS_BYTES_MAX: usize = 16 * 1024;

/// Digits of a ttl. More milliseconds than that are longer than anything lasts.
const TTL_DIGITS_MAX: usize = 12;

// Constants, so that they are not checked in each response.
const OCTETS: HeaderValue = HeaderValue::from_static("application/octet-stream");
const NO_SNIFF: HeaderValue = HeaderValue::from_static("nosniff");
const ACCEPT: HeaderValue = HeaderValue::from_static("accept");

const JSON: &str = "application/json";
const PROBLEM: &str = "application/problem+json";

/// What the server itself has to say, with its content type.
const ASSETS: [(&str, &str, &str); 4] = [
    ("/", "text/html; charset=utf-8", include_str!("http/page.html")),
    ("/page.css", "text/css; charset=utf-8", include_str!("http/page.css")),
    (
        "/page.js",
        "text/javascript; charset=utf-8",
        include_str!("http/page.js"),
    ),
    ("/openapi.json", JSON, include_str!("http/openapi.json")),
];
/// What the page may do: nothing but what came with it.
const PAGE_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
     base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// A refusal.
#[derive(Debug)]
struct Problem {
    status: StatusCode,
    detail: Cow<'static, str>,
    /// The methods that there are, when the one asked for is not.
    allow: &'static str,
    /// What is left of the request is not worth reading.
    close: bool,
}

impl Problem {
    fn new(status: StatusCode, detail: impl Into<Cow<'static, str>>) -> Self {
        Self {
            status,
            detail: detail.into(),
            allow: "",
            close: false,
        }
    }

    fn bad(detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, detail)
    }

    fn method(allow: &'static str) -> Self {
        Self {
            allow,
            ..Self::new(
                StatusCode::METHOD_NOT_ALLOWED,
                format!("this resource knows the methods {allow}"),
            )
        }
    }

    fn and_close(self) -> Self {
        Self { close: true, ..self }
    }

    /// The problem document.
    fn document(&self) -> Vec<u8> {
        #[derive(Serialize)]
        struct Document<'a> {
            r#type: &'static str,
            title: &'a str,
            status: u16,
            detail: &'a str,
        }
        let document = Document {
            r#type: "about:blank",
            title: self.status.canonical_reason().unwrap_or("Refused"),
            status: self.status.as_u16(),
            detail: &self.detail,
        };
        // Its keys are strings, so this cannot fail.
        serde_json::to_vec(&document).unwrap_or_default()
    }

    fn into_response(self) -> Response<Body> {
        let mut response = respond(self.status, HeaderValue::from_static(PROBLEM), self.document().into());
        let headers = response.headers_mut();
        if !self.allow.is_empty() {
            headers.insert(header::ALLOW, HeaderValue::from_static(self.allow));
        }
        if self.close {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

type Result<T> = std::result::Result<T, Problem>;

/// Completes a refusal that hyper wrote by itself: a head without a body, of a request that it could not read.
pub(super) fn explain(head: &[u8]) -> Option<Vec<u8>> {
    let head = std::str::from_utf8(head).ok()?;
    let status: StatusCode = head.split(' ').nth(1)?.parse().ok()?;
    let detail = match status {
        StatusCode::URI_TOO_LONG => "the target of the request is too long",
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE => "the request has too many headers, or too many bytes of them",
        _ => "this is no HTTP request, or its headers are malformed",
    };
    let document = Problem::new(status, detail).document();
    let length = format!("content-type: {PROBLEM}\r\ncontent-length: {}\r\n", document.len());
    Some([head.replacen(NO_BODY, &length, 1).as_bytes(), &document].concat())
}

/// How such a head says that there is no body.
pub(super) const NO_BODY: &str = "content-length: 0\r\n";

/// A response's body.
pub(super) enum Body {
    /// All of it, or nothing any more.
    Whole(Bytes),
    /// Events, until the client goes or the server stops.
    Events(Pin<Box<dyn Stream<Item = Bytes>>>),
}

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<std::result::Result<Frame<Bytes>, Infallible>>> {
        match &mut *self {
            Body::Whole(bytes) if bytes.is_empty() => Poll::Ready(None),
            Body::Whole(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Body::Events(events) => events
                .as_mut()
                .poll_next(context)
                .map(|event| event.map(|event| Ok(Frame::data(event)))),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Body::Whole(bytes) if bytes.is_empty())
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        match self {
            Body::Whole(bytes) => hyper::body::SizeHint::with_exact(bytes.len() as u64),
            Body::Events(_) => hyper::body::SizeHint::default(),
        }
    }
}

fn respond_without_type(status: StatusCode, body: Bytes) -> Response<Body> {
    let mut response = Response::new(Body::Whole(body));
    *response.status_mut() = status;
    response
}

fn respond(status: StatusCode, content_type: HeaderValue, body: Bytes) -> Response<Body> {
    let mut response = respond_without_type(status, body);
    response.headers_mut().insert(header::CONTENT_TYPE, content_type);
    response
}

fn json(status: StatusCode, document: &impl Serialize) -> Response<Body> {
    // Documents of ours have string keys only, so this cannot fail.
    let body = serde_json::to_vec(document).unwrap_or_default();
    respond(status, HeaderValue::from_static(JSON), body.into())
}

/// The handlers of one connection.
pub(super) struct Service(Rc<Handler>);

struct Handler {
    calls: Calls,
    config: Arc<Config>,
}

impl Service {
    pub(super) fn new(calls: Calls) -> Self {
        let config = calls.config().clone();
        Self(Rc::new(Handler { calls, config }))
    }
}

impl hyper::service::Service<Request<Incoming>> for Service {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = std::result::Result<Response<Body>, Infallible>>>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let handler = self.0.clone();
        Box::pin(async move { Ok(handler.answer(request).await.unwrap_or_else(Problem::into_response)) })
    }
}

impl Handler {
    async fn answer(&self, request: Request<Incoming>) -> Result<Response<Body>> {
        let headers = request.headers();
        if headers_bytes(headers) > HEADERS_BYTES_MAX {
            let status = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
            let detail = format!("the headers have more than {HEADERS_BYTES_MAX} bytes");
            return Err(Problem::new(status, detail).and_close());
        }
        if request.version() == HttpVersion::HTTP_11 && !headers.contains_key(header::HOST) {
            return Err(Problem::bad("the Host header is missing"));
        }
        let path = request.uri().path();
        if path.starts_with("/key") && !self.calls.is_ready() {
            return Err(loading().and_close());
        }
        let durable = is_durable(request.uri().query())?.then(|| self.durable());
        let this = durable.as_ref().unwrap_or(self);
        if let Some(key) = path.strip_prefix("/keys/").or_else(|| path.strip_prefix("/key/")) {
            let key = self.key(key)?;
            return match *request.method() {
                Method::GET | Method::HEAD => this.get(&key, headers).await,
                Method::PUT => {
                    // The request that the key is a part of goes on.
                    let key = key.into_owned();
                    this.put(&key, request).await
                }
                Method::DELETE => this.delete(&key, &request).await,
                _ => Err(Problem::method("GET, HEAD, PUT, DELETE")),
            };
        }
        if path == "/keys:batch" {
            return match *request.method() {
                Method::POST => this.batch(request).await,
                _ => Err(Problem::method("POST")),
            };
        }
        if path == "/snapshot" {
            return match *request.method() {
                Method::POST => self.snapshot(headers).await,
                _ => Err(Problem::method("POST")),
            };
        }
        self.about(&request).await
    }

    /// The same handler, whose answers come when what they tell is safe.
    fn durable(&self) -> Self {
        Self {
            calls: self.calls.durable(),
            config: self.config.clone(),
        }
    }

    async fn snapshot(&self, headers: &HeaderMap) -> Result<Response<Body>> {
        self.check_source(headers).map_err(Problem::and_close)?;
        if !self.calls.is_ready() {
            return Err(loading().and_close());
        }
        let conflict = |why: Cow<'static, str>| Err(Problem::new(StatusCode::CONFLICT, why));
        match self.calls.snapshot().await {
            Outcome::Done => Ok(json(StatusCode::ACCEPTED, &serde_json::json!({"snapshot": "begun"}))),
            Outcome::OutOfMemory => Err(no_memory()),
            _ => conflict(match self.calls.log_failure() {
                Some(why) => format!("no snapshot is made: {why}").into(),
                None => "there is nothing to make a snapshot of: the server has no --data-dir".into(),
            }),
        }
    }

    /// What is not about keys.
    async fn about(&self, request: &Request<Incoming>) -> Result<Response<Body>> {
        let path = request.uri().path();
        let asset = ASSETS.iter().find(|(of, ..)| *of == path);
        let known = asset.is_some() || ["/healthz", "/readyz", "/version", "/metrics", "/events"].contains(&path);
        if !known {
            return Err(Problem::new(StatusCode::NOT_FOUND, "there is no such resource"));
        }
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return Err(Problem::method("GET, HEAD"));
        }
        if let Some((_, content_type, text)) = asset {
            let content_type = HeaderValue::from_static(content_type);
            let mut response = respond(StatusCode::OK, content_type, Bytes::from_static(text.as_bytes()));
            let headers = response.headers_mut();
            headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(PAGE_POLICY));
            headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
            headers.insert(header::X_CONTENT_TYPE_OPTIONS, NO_SNIFF);
            return Ok(response);
        }
        match path {
            "/metrics" => {
                let open_metrics = accepts(request.headers(), "application/openmetrics-text");
                let (text, content_type) = match open_metrics {
                    true => (
                        Text::OpenMetrics,
                        "application/openmetrics-text; version=1.0.0; charset=utf-8",
                    ),
                    false => (Text::Prometheus, "text/plain; version=0.0.4; charset=utf-8"),
                };
                let text = self.calls.text(text).await;
                Ok(respond(
                    StatusCode::OK,
                    HeaderValue::from_static(content_type),
                    text.into(),
                ))
            }
            "/events" if request.method() == Method::GET => self.events(),
            "/version" => Ok(json(
                StatusCode::OK,
                &serde_json::json!({"name": env!("CARGO_PKG_NAME"), "version": env!("CARGO_PKG_VERSION")}),
            )),
            "/readyz" if !self.calls.is_ready() => Err(loading()),
            "/readyz" if self.calls.log_failure().is_some() => Err(log_failed(self.calls.log_failure())),
            _ => Ok(respond(
                StatusCode::OK,
                HeaderValue::from_static("text/plain; charset=utf-8"),
                Bytes::from_static(b"ok\n"),
            )),
        }
    }

    fn events(&self) -> Result<Response<Body>> {
        let Some(place) = Place::take() else {
            let detail = format!("{EVENT_STREAMS_MAX} pages are open on this core already");
            return Err(Problem::new(StatusCode::SERVICE_UNAVAILABLE, detail));
        };
        let begin = (self.calls.clone(), place, true);
        let events = futures_util::stream::unfold(begin, |(calls, place, is_first)| async move {
            if !is_first {
                let mut pause = pin!(sleep(EVENT_PERIOD));
                poll_fn(|context| match calls.is_stopping() {
                    true => Poll::Ready(()),
                    false => pause.as_mut().poll(context),
                })
                .await;
            }
            if calls.is_stopping() {
                return None;
            }
            let head: &[u8] = if is_first { b"retry: 1000\ndata: " } else { b"data: " };
            let event = [head, &calls.text(Text::Live).await, b"\n\n"].concat();
            Some((Bytes::from(event), (calls, place, false)))
        });
        let mut response = Response::new(Body::Events(Box::pin(events)));
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        Ok(response)
    }

    /// The key that a path names.
    fn key<'a>(&self, encoded: &'a str) -> Result<Cow<'a, [u8]>> {
        let bytes = encoded.as_bytes();
        if memchr::memchr(b'%', bytes).is_none() {
            self.check_key(bytes)?;
            return Ok(Cow::Borrowed(bytes));
        }
        let is_hex = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_hexdigit);
        if memchr::memchr_iter(b'%', bytes).any(|at| !is_hex(at + 1) || !is_hex(at + 2)) {
            return Err(Problem::bad("a % in the key is not followed by two hexadecimal digits"));
        }
        let key: Cow<'_, [u8]> = percent_decode_str(encoded).into();
        self.check_key(&key)?;
        Ok(key)
    }

    fn check_key(&self, key: &[u8]) -> Result<()> {
        let most = usize::from(self.config.limits.key_size_max);
        match key.len() {
            0 => Err(Problem::bad("the key is missing")),
            length if length > most => Err(Problem::bad(format!(
                "the key has {length} bytes, and the most is {most}"
            ))),
            _ => Ok(()),
        }
    }

    fn value_bytes_max(&self) -> usize {
        usize::try_from(self.config.limits.item_size_max.0).unwrap_or(usize::MAX)
    }

    async fn look(&self, key: &[u8]) -> Answer {
        let op = Op::Get {
            version: true,
            effects: None,
        };
        self.calls.execute(&Command { key, op }).await
    }

    async fn get(&self, key: &[u8], headers: &HeaderMap) -> Result<Response<Body>> {
        let conditions = Conditions::of(headers)?;
        let answer = self.look(key).await;
        let mut item = match answer.outcome {
            Outcome::Done => answer,
            Outcome::NotFound => {
                conditions.check_if_match(None)?;
                return Err(no_such_key());
            }
            _ => return Err(self.refused(&answer)),
        };
        conditions.check_if_match(Some(item.version))?;
        let mut response = if !conditions.is_none_match(item.version) {
            respond_without_type(StatusCode::NOT_MODIFIED, Bytes::new())
        } else if accepts(headers, JSON) {
            json(StatusCode::OK, &Item::new(key, &item))
        } else {
            let value = std::mem::take(&mut item.value);
            let is_empty = value.is_empty();
            let mut response = respond(StatusCode::OK, OCTETS, value);
            let headers = response.headers_mut();
            headers.insert(header::X_CONTENT_TYPE_OPTIONS, NO_SNIFF);
            if is_empty {
                // hyper would say nothing of it to HEAD.
                headers.insert(header::CONTENT_LENGTH, HeaderValue::from(0));
            }
            if item.flags != 0 {
                headers.insert("memkv-flags", HeaderValue::from(item.flags));
            }
            if let Deadline::At(moment) = item.deadline {
                headers.insert("memkv-expires-at-ms", HeaderValue::from(moment.0));
            }
            response
        };
        let headers = response.headers_mut();
        headers.insert(header::ETAG, etag(item.version));
        headers.insert(header::VARY, ACCEPT);
        Ok(response)
    }

    async fn put(&self, key: &[u8], request: Request<Incoming>) -> Result<Response<Body>> {
        let headers = request.headers();
        self.check_source(headers).map_err(Problem::and_close)?;
        if headers.contains_key(header::CONTENT_ENCODING) {
            let detail = "values are stored as they come: a Content-Encoding would be lost";
            return Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, detail).and_close());
        }
        if headers.contains_key(header::CONTENT_RANGE) {
            return Err(Problem::bad("a part of a value cannot be written").and_close());
        }
        let conditions = Conditions::of(headers)?;
        let wish = Wish::of(request.uri().query(), self.calls.now())?;
        let most = self.value_bytes_max();
        let mut body = request.into_body();
        let announced = body.size_hint().exact().map(|bytes| bytes as usize);
        if let Some(bytes) = announced.filter(|bytes| *bytes > most) {
            return Err(too_large(bytes, most));
        }
        let mut collected = None;
        for _ in 0..conditions::ATTEMPTS_MAX {
            let (condition, is_final) = self.condition(key, &conditions).await?;
            let put = Put {
                flags: wish.flags,
                deadline: wish.deadline,
                condition,
                // Others get a version when somebody asks for it: it takes memory.
                version: match condition {
                    Condition::Always => NewVersion::OnDemand,
                    _ => NewVersion::Now,
                },
                ..Put::new(Value::Small(&[]))
            };
            let answer = match announced {
                Some(bytes) if bytes >= LARGE_VALUE_BYTES && is_final => {
                    let upload = self.calls.announce(key, put, bytes);
                    if let Some(answer) = upload.refused() {
                        return Err(self.refused(&answer).and_close());
                    }
                    while let Some(piece) = self.next_piece(&mut body).await? {
                        upload.send(&piece);
                    }
                    upload.finish().await
                }
                _ => {
                    if collected.is_none() {
                        collected = Some(self.collect(&mut body, most).await?);
                    }
                    let value = collected.as_deref().unwrap_or_default();
                    self.write(key, put, value).await
                }
            };
            return match answer.outcome {
                Outcome::Done => Ok(written(&answer)),
                Outcome::NotFound | Outcome::ConditionFailed if is_final => Err(conditions::failed()),
                // It changed since it was looked at.
                Outcome::NotFound | Outcome::ConditionFailed => continue,
                _ => Err(self.refused(&answer)),
            };
        }
        Err(conditions::failed())
    }

    async fn write(&self, key: &[u8], put: Put<'_>, value: &[u8]) -> Answer {
        if value.len() < LARGE_VALUE_BYTES {
            let op = Op::Put(Put {
                value: Value::Small(value),
                ..put
            });
            return self.calls.execute(&Command { key, op }).await;
        }
        let upload = self.calls.announce(key, put, value.len());
        if let Some(answer) = upload.refused() {
            return answer;
        }
        upload.send(value);
        upload.finish().await
    }

    async fn delete(&self, key: &[u8], request: &Request<Incoming>) -> Result<Response<Body>> {
        self.check_source(request.headers())?;
        let conditions = Conditions::of(request.headers())?;
        for _ in 0..conditions::ATTEMPTS_MAX {
            let (condition, is_final) = self.condition(key, &conditions).await?;
            if condition == Condition::Absent {
                // What is not there cannot be deleted.
                return match self.look(key).await.outcome {
                    Outcome::NotFound => Err(no_such_key()),
                    _ => Err(conditions::failed()),
                };
            }
            let op = Op::Delete(Delete {
                condition,
                ..Delete::default()
            });
            let answer = self.calls.execute(&Command { key, op }).await;
            return match answer.outcome {
                Outcome::Done => Ok(respond_without_type(StatusCode::NO_CONTENT, Bytes::new())),
                Outcome::NotFound if condition == Condition::Always => Err(no_such_key()),
                Outcome::NotFound | Outcome::ConditionFailed if is_final => Err(conditions::failed()),
                Outcome::NotFound | Outcome::ConditionFailed => continue,
                _ => Err(self.refused(&answer)),
            };
        }
        Err(conditions::failed())
    }

    /// What must hold of the key's item for a write, and whether that says all: conditions that name several versions, or
    /// exclude some, are checked here, and the write then demands that nothing has changed since.
    async fn condition(&self, key: &[u8], conditions: &Conditions) -> Result<(Condition, bool)> {
        if let Some(condition) = conditions.as_one() {
            return Ok((condition, true));
        }
        let answer = self.look(key).await;
        let version = match answer.outcome {
            Outcome::Done => Some(answer.version),
            Outcome::NotFound => None,
            _ => return Err(self.refused(&answer)),
        };
        conditions.check_if_match(version)?;
        match version {
            Some(version) if conditions.is_none_match(version) => Ok((Condition::VersionIs(version), false)),
            Some(_) => Err(conditions::failed()),
            None => Ok((Condition::Absent, false)),
        }
    }

    /// Why a command was not executed.
    fn refused(&self, answer: &Answer) -> Problem {
        match answer.outcome {
            Outcome::TooLarge => Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "the value is too large"),
            Outcome::ReadOnly => read_only(),
            Outcome::NotDurable => self.not_durable(),
            _ => no_memory(),
        }
    }

    fn not_durable(&self) -> Problem {
        match self.calls.has_log() {
            true => Problem::new(StatusCode::INTERNAL_SERVER_ERROR, NOT_DURABLE),
            // Only who has asked for it is told so.
            false => Problem::new(StatusCode::CONFLICT, NO_LOG),
        }
    }

    /// Refuses a write that a web page of somebody else may have made its reader's browser send.
    fn check_source(&self, headers: &HeaderMap) -> Result<()> {
        let refuse = |detail: &'static str| Err(Problem::new(StatusCode::FORBIDDEN, detail));
        let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        let host = text(header::HOST).unwrap_or_default();
        if !host.is_empty() && !self.knows_host(host) {
            return refuse("writes must be addressed to localhost, an address, or a name of --http-hosts");
        }
        if headers.contains_key(header::ORIGIN) {
            let origin = text(header::ORIGIN).unwrap_or_default();
            let authority = origin
                .strip_prefix("http://")
                .or_else(|| origin.strip_prefix("https://"));
            if !authority.is_some_and(|authority| authority.eq_ignore_ascii_case(host)) {
                return refuse("a page of another origin may not write");
            }
        }
        match text(header::HeaderName::from_static("sec-fetch-site")) {
            Some("cross-site" | "same-site") => refuse("a page of another site may not write"),
            _ => Ok(()),
        }
    }

    fn knows_host(&self, host: &str) -> bool {
        let name = match host.strip_prefix('[') {
            Some(rest) => rest.split(']').next().unwrap_or_default(),
            None => host.split(':').next().unwrap_or_default(),
        };
        let name = name.trim_end_matches('.');
        name.parse::<IpAddr>().is_ok()
            || name.eq_ignore_ascii_case("localhost")
            || self
                .config
                .http_hosts
                .iter()
                .any(|known| known.eq_ignore_ascii_case(name))
    }
}

/// Reading what a client sends.
impl Handler {
    /// The next piece of a request's body. An error: it broke off, or stands still.
    async fn next_piece(&self, body: &mut Incoming) -> Result<Option<Bytes>> {
        loop {
            let patience = match self.config.limits.http_timeout {
                Duration::ZERO => FOR_EVER,
                limit => limit,
            };
            let frame = match select(body.frame(), sleep(patience)).await {
                Either::Left((frame, _)) => frame,
                Either::Right(_) => {
                    let detail = "the body did not come in time";
                    return Err(Problem::new(StatusCode::REQUEST_TIMEOUT, detail).and_close());
                }
            };
            match frame {
                None => return Ok(None),
                Some(Err(_)) => return Err(Problem::bad("the body broke off, or is malformed").and_close()),
                // Trailers say nothing that is of use here.
                Some(Ok(frame)) => {
                    if let Ok(piece) = frame.into_data() {
                        return Ok(Some(piece));
                    }
                }
            }
        }
    }

    /// All of a body.
    async fn collect(&self, body: &mut Incoming, most: usize) -> Result<Vec<u8>> {
        let mut whole = vec![];
        while let Some(piece) = self.next_piece(body).await? {
            if whole.len() + piece.len() > most {
                return Err(too_large(whole.len() + piece.len(), most));
            }
            if whole.try_reserve(piece.len()).is_err() {
                return Err(no_memory().and_close());
            }
            whole.extend_from_slice(&piece);
        }
        Ok(whole)
    }
}

/// What the query of a write says of its item.
struct Wish {
    deadline: Deadline,
    flags: u32,
}

impl Wish {
    fn of(query: Option<&str>, now: UnixMillis) -> Result<Self> {
        let mut wish = Self {
            deadline: Deadline::Never,
            flags: 0,
        };
        for pair in query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            match name {
                "ttl" => {
                    let digits = value.trim_end_matches(|unit: char| unit.is_ascii_lowercase());
                    let is_whole = digits.len() <= TTL_DIGITS_MAX && digits.bytes().all(|byte| byte.is_ascii_digit());
                    let ttl = parse_duration(value).ok().filter(|ttl| is_whole && !ttl.is_zero());
                    let ttl = ttl.ok_or_else(|| {
                        Problem::bad("ttl is a whole number of more than nothing, in seconds or with a unit: 60, 500ms, 30s, 5m, 1h")
                    })?;
                    let ttl_ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX).max(1);
                    wish.deadline = Deadline::At(UnixMillis(now.0.saturating_add(ttl_ms)));
                }
                "flags" => {
                    let flags = value.parse();
                    wish.flags = flags.map_err(|_| Problem::bad("flags is a number of 32 bits"))?;
                }
                "durable" => {}
                _ => return Err(Problem::bad("the query knows ttl, flags and durable only")),
            }
        }
        Ok(wish)
    }
}

/// The query asks for an answer that comes when what it tells is safe.
fn is_durable(query: Option<&str>) -> Result<bool> {
    let mut is_durable = false;
    for pair in query.unwrap_or_default().split('&') {
        is_durable = match pair.split_once('=').unwrap_or((pair, "")) {
            ("durable", "true") => true,
            ("durable", "false") => false,
            ("durable", _) => return Err(Problem::bad("durable is true or false")),
            _ => is_durable,
        };
    }
    Ok(is_durable)
}

/// An item as JSON shows it.
#[derive(Serialize)]
struct Item<'a> {
    #[serde(flatten)]
    key: Textual<'a>,
    #[serde(flatten)]
    value: TextualValue<'a>,
    flags: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at_ms: Option<u64>,
    etag: String,
}

impl<'a> Item<'a> {
    fn new(key: &'a [u8], answer: &'a Answer) -> Self {
        Self {
            key: match std::str::from_utf8(key) {
                Ok(key) => Textual::Text { key },
                Err(_) => Textual::Bytes {
                    key_base64: BASE64_STANDARD.encode(key),
                },
            },
            value: TextualValue::new(&answer.value),
            flags: answer.flags,
            expires_at_ms: match answer.deadline {
                Deadline::Never => None,
                Deadline::At(moment) => Some(moment.0),
            },
            etag: conditions::tag(answer.version),
        }
    }
}

/// A key: as text where it is.
#[derive(Serialize)]
#[serde(untagged)]
enum Textual<'a> {
    Text { key: &'a str },
    Bytes { key_base64: String },
}

/// A value: the same.
#[derive(Serialize)]
#[serde(untagged)]
enum TextualValue<'a> {
    Text { value: &'a str },
    Bytes { value_base64: String },
}

impl<'a> TextualValue<'a> {
    fn new(value: &'a [u8]) -> Self {
        match std::str::from_utf8(value) {
            Ok(value) => TextualValue::Text { value },
            Err(_) => TextualValue::Bytes {
                value_base64: BASE64_STANDARD.encode(value),
            },
        }
    }
}

/// Not everything is there yet; and what is written now, a row that is loaded later could overwrite.
fn loading() -> Problem {
    Problem::new(StatusCode::SERVICE_UNAVAILABLE, "the server is still loading its data")
}

fn no_such_key() -> Problem {
    Problem::new(StatusCode::NOT_FOUND, "there is no item with this key")
}

fn too_large(bytes: usize, most: usize) -> Problem {
    let detail = format!("the body has {bytes} bytes or more, and the most is {most}");
    Problem::new(StatusCode::PAYLOAD_TOO_LARGE, detail).and_close()
}

/// Writes are refused from now on, so others are to have them.
fn log_failed(why: Option<String>) -> Problem {
    let why = why.unwrap_or_default();
    let detail = format!("what is written cannot be made durable any more, and is refused: {why}");
    Problem::new(StatusCode::SERVICE_UNAVAILABLE, detail)
}

fn read_only() -> Problem {
    Problem::new(StatusCode::FORBIDDEN, "the server is read-only: nothing was changed")
}

fn no_memory() -> Problem {
    let detail = "the server's memory limit is reached: nothing was changed";
    Problem::new(StatusCode::INSUFFICIENT_STORAGE, detail)
}

fn written(answer: &Answer) -> Response<Body> {
    let status = match answer.created {
        true => StatusCode::CREATED,
        false => StatusCode::NO_CONTENT,
    };
    let mut response = respond_without_type(status, Bytes::new());
    if answer.version != Version(0) {
        response.headers_mut().insert(header::ETAG, etag(answer.version));
    }
    response
}

fn headers_bytes(headers: &HeaderMap) -> usize {
    let sizes = headers
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len() + 4);
    sizes.sum()
}

/// The client asks for this media type by name, and not for less than for others.
fn accepts(headers: &HeaderMap, media_type: &str) -> bool {
    let mut best = (0.0, false);
    for value in headers.get_all(header::ACCEPT) {
        for range in value.to_str().unwrap_or_default().split(',') {
            let mut parts = range.split(';').map(str::trim);
            let name = parts.next().unwrap_or_default();
            let quality = parts
                .find_map(|part| part.strip_prefix("q="))
                .map_or(1.0, |quality| quality.parse().unwrap_or(0.0));
            let is_it = name.eq_ignore_ascii_case(media_type);
            if quality > best.0 || is_it && quality > 0.0 && quality >= best.0 {
                best = (quality, is_it);
            }
        }
    }
    best.1
}

thread_local! {
    /// Pages that this core tells.
    static EVENT_STREAMS: Cell<usize> = const { Cell::new(0) };
}

/// A place among the pages that this core tells.
struct Place(());

impl Place {
    fn take() -> Option<Self> {
        let taken = EVENT_STREAMS.get();
        (taken < EVENT_STREAMS_MAX).then(|| {
            EVENT_STREAMS.set(taken + 1);
            Self(())
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        EVENT_STREAMS.set(EVENT_STREAMS.get() - 1);
    }
}
