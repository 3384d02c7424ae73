//! Where waiting is allowed beside the pump: connections whose protocol a library speaks (HTTP, gRPC, through hyper), each a
//! future on its core.
//!
//! The futures share the core's thread with the pump, which polls those that were woken once in each turn ([`Gateway::run`]).
//! Their sockets are in the network ring like all others, and their bytes lie in the engine's session, so that limits,
//! timeouts and the memory limit hold for them, too; [`Socket`] is hyper's view of that. The engine is borrowed for moments
//! only, never across an await.

use super::calls::Calls;
use super::{Shared, grpc, http};
use crate::config::Config;
use crate::engine::{Engine, Notice, Read, Written};
use crate::protocol::Protocol;
use futures_executor::{LocalPool, LocalSpawner};
use futures_util::task::LocalSpawnExt;
use hyper::rt::ReadBufCursor;
use hyper::server::conn::{http1, http2};
use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// The most bytes of a request's line and headers.
pub(super) const HEAD_BYTES_MAX: usize = 64 * 1024;
/// What a client still sends to a connection on which all is said is read and dropped for so long, and so many bytes. To close
/// at once would take from it the answer that it has not read yet: a socket that is closed with unread bytes resets the
/// connection.
const LINGER_TIME_MAX: Duration = Duration::from_secs(10);
const LINGER_BYTES_MAX: usize = 256 << 20;
/// hyper's own refusals are shorter.
const REFUSAL_BYTES_MAX: usize = 256;

/// A gRPC client that says nothing for so long is asked whether it is there, and let go if it does not say so in time.
const KEEP_ALIVE_PERIOD: Duration = Duration::from_secs(60);
const KEEP_ALIVE_TIME_MAX: Duration = Duration::from_secs(20);
/// Requests that a gRPC client may have under way on one connection. A client waits with more.
const STREAMS_MAX: u32 = 128;
/// Bytes of one gRPC request's headers.
const HEADER_LIST_BYTES_MAX: u32 = 16 * 1024;
/// Bytes of one gRPC request, and of all of a connection, that may come before they are understood.
const STREAM_WINDOW_BYTES: u32 = 256 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 1024 * 1024;
/// Bytes of one gRPC response that wait for the client's window.
const SEND_BYTES_MAX: usize = 64 * 1024;

/// What the handlers of one core have in common.
pub(super) struct Handlers {
    pub(super) engine: Rc<RefCell<Engine>>,
    pub(super) shared: Arc<Shared>,
    /// The options that the server was started with. Here, so that requests need not count references to what all cores share.
    pub(super) config: Arc<Config>,
    /// By number of the session: who is to be woken when something happens to it.
    wakers: RefCell<Vec<Option<Waker>>>,
    /// By number of the session: connections that are open.
    connections: RefCell<Vec<Option<Rc<Cell<bool>>>>>,
    /// Calls that can be used again.
    pub(super) idle_calls: RefCell<Vec<u32>>,
    /// The server stops: connections end when what they do is done.
    stopping: Cell<bool>,
}

impl Handlers {
    /// Has the future woken that is polled now, when something happens to a session.
    pub(super) fn wake_on(&self, id: u32, context: &Context<'_>) {
        let mut wakers = self.wakers.borrow_mut();
        let id = id as usize;
        if wakers.len() <= id {
            wakers.resize(id + 1, None);
        }
        match &mut wakers[id] {
            Some(waker) => waker.clone_from(context.waker()),
            none => *none = Some(context.waker().clone()),
        }
    }

    /// The server stops.
    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.get()
    }
}

/// One core's futures.
pub(super) struct Gateway {
    handlers: Rc<Handlers>,
    pool: LocalPool,
    spawner: LocalSpawner,
    /// A future was woken, or begun, since they were polled.
    is_woken: bool,
}

impl Gateway {
    pub(super) fn new(engine: Engine, shared: Arc<Shared>) -> Self {
        let pool = LocalPool::new();
        let handlers = Handlers {
            config: engine.shared_config(),
            engine: Rc::new(RefCell::new(engine)),
            shared,
            wakers: RefCell::default(),
            connections: RefCell::default(),
            idle_calls: RefCell::default(),
            stopping: Cell::new(false),
        };
        Self {
            handlers: Rc::new(handlers),
            spawner: pool.spawner(),
            pool,
            is_woken: false,
        }
    }

    /// The engine, which nobody else may hold while futures are polled.
    pub(super) fn engine(&self) -> Rc<RefCell<Engine>> {
        self.handlers.engine.clone()
    }

    /// Tells the future that waits for a session, or begins the one that serves a new connection.
    #[cold]
    pub(super) fn notice(&mut self, id: u32, notice: Notice) {
        match notice {
            Notice::Nothing => return,
            Notice::Progress => {
                if let Some(Some(waker)) = self.handlers.wakers.borrow().get(id as usize) {
                    waker.wake_by_ref();
                }
            }
            Notice::Opened(protocol) => self.begin(id, protocol),
        }
        self.is_woken = true;
    }

    /// A connection is about to be closed: its number may soon name another one.
    #[cold]
    pub(super) fn closed(&mut self, id: u32) {
        let open = self
            .handlers
            .connections
            .borrow_mut()
            .get_mut(id as usize)
            .and_then(Option::take);
        if let Some(open) = open {
            open.set(false);
            self.notice(id, Notice::Progress);
            if let Some(waker) = self.handlers.wakers.borrow_mut().get_mut(id as usize) {
                *waker = None;
            }
        }
    }

    fn begin(&mut self, id: u32, protocol: Protocol) {
        let open = Rc::new(Cell::new(true));
        {
            let mut connections = self.handlers.connections.borrow_mut();
            if connections.len() <= id as usize {
                connections.resize(id as usize + 1, None);
            }
            connections[id as usize] = Some(open.clone());
        }
        let socket = Socket(Rc::new(Line {
            handlers: self.handlers.clone(),
            id,
            open,
            lingers: protocol == Protocol::Http,
            said_all: Cell::new(false),
            last: RefCell::default(),
        }));
        let handlers = self.handlers.clone();
        let begun = match protocol {
            Protocol::Grpc => self
                .spawner
                .spawn_local(serve_grpc(handlers, socket, self.spawner.clone())),
            _ => self.spawner.spawn_local(serve_http(handlers, socket)),
        };
        if begun.is_err() {
            log::error!("a connection has no future: the pool is gone");
        }
    }

    /// Polls the futures that were woken. False when there were none. The engine must not be borrowed. `now`: the turn's time.
    pub(super) fn run(&mut self, now: Instant) -> bool {
        let fired = TIMERS.with_borrow_mut(|timers| timers.fire(now));
        if !std::mem::take(&mut self.is_woken) && !fired {
            return false;
        }
        self.pool.run_until_stalled();
        true
    }

    /// How long the core may sleep without missing a timer.
    pub(super) fn sleep_max(&self) -> Option<Duration> {
        TIMERS.with_borrow_mut(Timers::next)
    }

    /// Has connections end when what they do is done.
    pub(super) fn stop(&mut self) {
        if !self.handlers.stopping.replace(true) {
            let wakers = self.handlers.wakers.borrow();
            wakers.iter().flatten().for_each(Waker::wake_by_ref);
            self.is_woken = true;
        }
    }
}

/// Serves one HTTP connection.
async fn serve_http(handlers: Rc<Handlers>, socket: Socket) {
    let line = socket.0.clone();
    let calls = Calls::new(handlers.clone(), Protocol::Http);
    let patience = calls.config().limits.http_timeout;
    let connection = http1::Builder::new()
        .timer(CoarseTimer)
        .header_read_timeout((!patience.is_zero()).then_some(patience))
        .max_buf_size(HEAD_BYTES_MAX)
        // Not pipeline_flush: with it, hyper holds all answers to the requests that it has read, which are many large values for a
        // few bytes each. Without it flushing costs nothing here.
        .half_close(true)
        .serve_connection(socket, http::Service::new(calls));
    // Not pinned to the stack: hyper's buffers are not needed while the connection lingers.
    let mut connection = Box::pin(connection);
    let mut told = false;
    let end = poll_fn(|context| {
        if handlers.is_stopping() && !std::mem::replace(&mut told, true) {
            connection.as_mut().graceful_shutdown();
        }
        let end = connection.as_mut().poll(context);
        if end.is_pending() {
            // It was no refusal, or hyper would have ended.
            let _ = line.write_last(context);
        }
        end
    })
    .await;
    drop(connection);
    // What a client did wrong it was told, where it could be; a broken connection is not news.
    if end.is_err_and(|error| error.is_parse()) {
        line.explain();
    }
    poll_fn(|context| line.write_last(context)).await;
    if line.said_all.get() {
        line.linger().await;
    }
}

/// Serves one gRPC connection.
async fn serve_grpc(handlers: Rc<Handlers>, socket: Socket, spawner: LocalSpawner) {
    let calls = Calls::new(handlers.clone(), Protocol::Grpc);
    let service = hyper::service::service_fn(move |request| {
        let calls = calls.clone();
        async move { Ok::<_, Infallible>(grpc::serve(calls, request).await) }
    });
    let connection = http2::Builder::new(Tasks(spawner))
        .timer(CoarseTimer)
        .keep_alive_interval(KEEP_ALIVE_PERIOD)
        .keep_alive_timeout(KEEP_ALIVE_TIME_MAX)
        .max_concurrent_streams(STREAMS_MAX)
        // A client may give up on all at once. One that begins and resets more is sent away.
        .max_pending_accept_reset_streams(STREAMS_MAX as usize)
        .max_header_list_size(HEADER_LIST_BYTES_MAX)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_send_buf_size(SEND_BYTES_MAX)
        // No client of gRPC asks when a response was made.
        .auto_date_header(false)
        .serve_connection(socket, service);
    let mut connection = pin!(connection);
    let mut told = false;
    let _ = poll_fn(|context| {
        if handlers.is_stopping() && !std::mem::replace(&mut told, true) {
            connection.as_mut().graceful_shutdown();
        }
        connection.as_mut().poll(context)
    })
    .await;
}

/// A connection. Dropping it closes the connection when all that was written is sent.
struct Line {
    handlers: Rc<Handlers>,
    id: u32,
    /// The number still names this connection.
    open: Rc<Cell<bool>>,
    /// When all is said, the client is heard for a while: see [`LINGER_TIME_MAX`].
    lingers: bool,
    /// hyper writes nothing more.
    said_all: Cell<bool>,
    /// The end of what hyper wrote, while it may be a refusal of its own. Those have no body; see [`Line::explain`].
    last: RefCell<Vec<u8>>,
}

/// A connection's bytes, as hyper reads and writes them.
struct Socket(Rc<Line>);

fn broken() -> io::Error {
    io::ErrorKind::ConnectionReset.into()
}

/// Where a refusal of hyper's own may begin, of which `written` is the end: only how hyper ends tells whether it is one.
fn refusal_at(written: &[u8]) -> Option<usize> {
    if !written.ends_with(b"\r\n\r\n") {
        return None;
    }
    let end = written.len().saturating_sub(REFUSAL_BYTES_MAX);
    let at = end + memchr::memmem::rfind(&written[end..], b"HTTP/1.")?;
    memchr::memmem::find(&written[at..], http::NO_BODY.as_bytes()).map(|_| at)
}

impl Line {
    fn with_engine<R>(&self, act: impl FnOnce(&mut Engine) -> R) -> Option<R> {
        self.open.get().then(|| act(&mut self.handlers.engine.borrow_mut()))
    }

    fn read(&self, context: &Context<'_>, most: usize, take: impl FnOnce(&[u8])) -> Poll<Read> {
        let read = self.with_engine(|engine| engine.read(self.id, most, take));
        let read = read.unwrap_or(Read::Failed);
        if read == Read::Nothing {
            self.handlers.wake_on(self.id, context);
            return Poll::Pending;
        }
        Poll::Ready(read)
    }

    fn write(&self, context: &Context<'_>, pieces: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        if self.write_last(context).is_pending() {
            return Poll::Pending;
        }
        let last = pieces.iter().rfind(|piece| !piece.is_empty());
        let Some((last, at)) = last
            .filter(|_| self.lingers)
            .and_then(|last| Some((last, refusal_at(last)?)))
        else {
            return self.write_now(context, pieces.iter().map(|piece| &**piece));
        };
        // All but that, and then it is kept.
        let held = &last[at..];
        let before = pieces.iter().map(|piece| match std::ptr::eq(piece, last) {
            true => &last[..at],
            false => &**piece,
        });
        let bytes = before.clone().map(<[u8]>::len).sum::<usize>();
        if bytes > 0 {
            let written = self.write_now(context, before);
            if !matches!(written, Poll::Ready(Ok(taken)) if taken == bytes) {
                return written;
            }
        }
        self.last.borrow_mut().extend_from_slice(held);
        Poll::Ready(Ok(bytes + held.len()))
    }

    fn write_now<'a>(&self, context: &Context<'_>, pieces: impl Iterator<Item = &'a [u8]>) -> Poll<io::Result<usize>> {
        let written = self.with_engine(|engine| engine.write(self.id, pieces));
        match written.unwrap_or(Written::Failed) {
            Written::Taken(bytes) => Poll::Ready(Ok(bytes)),
            Written::Full => {
                self.handlers.wake_on(self.id, context);
                Poll::Pending
            }
            Written::Failed => Poll::Ready(Err(broken())),
        }
    }

    /// Writes what was kept.
    fn write_last(&self, context: &Context<'_>) -> Poll<()> {
        let mut last = self.last.borrow_mut();
        while !last.is_empty() {
            match self.write_now(context, std::iter::once(last.as_slice())) {
                Poll::Ready(Ok(taken)) => drop(last.drain(..taken)),
                // Whoever reads or writes next sees that it broke.
                Poll::Ready(Err(_)) => last.clear(),
                Poll::Pending => return Poll::Pending,
            }
        }
        Poll::Ready(())
    }

    /// hyper has refused what was no request: what it wrote last gets a body that says so.
    fn explain(&self) {
        let mut last = self.last.borrow_mut();
        if let Some(explained) = http::explain(&last) {
            *last = explained;
        }
    }

    /// Tells the client that all is said, and drops what it still sends.
    async fn linger(&self) {
        self.with_engine(|engine| engine.shut(self.id));
        let mut time = pin!(sleep(LINGER_TIME_MAX));
        let mut dropped = 0;
        poll_fn(|context| {
            if self.handlers.is_stopping() || time.as_mut().poll(context).is_ready() {
                return Poll::Ready(());
            }
            while dropped < LINGER_BYTES_MAX {
                match self.read(context, usize::MAX, |bytes| dropped += bytes.len()) {
                    Poll::Ready(Read::Taken) => {}
                    Poll::Ready(_) => break,
                    Poll::Pending => return Poll::Pending,
                }
            }
            Poll::Ready(())
        })
        .await;
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.with_engine(|engine| engine.finish(self.id));
    }
}

impl hyper::rt::Read for Socket {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, mut into: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        let room = into.remaining();
        self.0
            .read(context, room, |bytes| into.put_slice(bytes))
            .map(|read| match read {
                Read::Failed => Err(broken()),
                _ => Ok(()),
            })
    }
}

impl hyper::rt::Write for Socket {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.0.write(context, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.0.write(context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// What was written is sent by the end of the turn.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.said_all.set(true);
        if !self.0.lingers {
            self.0.with_engine(|engine| engine.finish(self.0.id));
        }
        Poll::Ready(Ok(()))
    }
}

/// Starts the futures that HTTP/2 streams are, on the core of their connection.
#[derive(Clone)]
struct Tasks(LocalSpawner);

impl<F: Future<Output = ()> + 'static> hyper::rt::Executor<F> for Tasks {
    fn execute(&self, future: F) {
        let mut future = Box::pin(future);
        // Most are over when they are polled once, and then the connection sends what they said before it returns. Whoever wakes one
        // that is not finds it in the pool, which polls it first.
        if future.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready() {
            return;
        }
        // It fails only when the pool is gone, and with it all that could wait for the future.
        let _ = self.0.spawn_local(future);
    }
}

thread_local! {
    /// This core's timers. They have no place in [`Handlers`], because hyper demands of a timer that it can move between threads;
    /// these do not.
    static TIMERS: RefCell<Timers> = RefCell::new(Timers::new());
}

/// Who is to be woken when.
///
/// Every request has a timer, and next to none of them is ever waited for. So one that is given up only loses its place in `sleepers`;
/// what stands in `queue` for it is passed over when its moment comes, or swept out when there is too much of that.
struct Timers {
    /// The turn's time: as exact as a timer is.
    now: Instant,
    /// By place: who waits there, and for when.
    sleepers: Vec<Option<(Instant, Waker)>>,
    free: Vec<u32>,
    /// Moments and places, the next one first.
    queue: BinaryHeap<Reverse<(Instant, u32)>>,
}

/// So many places in the queue that nobody waits at are not worth sweeping.
const GIVEN_UP_MAX: usize = 64;

impl Timers {
    fn new() -> Self {
        Self {
            now: Instant::now(),
            sleepers: vec![],
            free: vec![],
            queue: BinaryHeap::new(),
        }
    }

    /// Wakes those whose moment has come; true if there were any.
    fn fire(&mut self, now: Instant) -> bool {
        self.now = now;
        let mut fired = false;
        while let Some(&Reverse((moment, place))) = self.queue.peek()
            && moment <= now
        {
            self.queue.pop();
            if let Some((_, waker)) = self.waits(moment, place) {
                waker.wake_by_ref();
                fired = true;
            }
        }
        fired
    }

    /// Whether somebody waits for what stands in the queue.
    fn waits(&self, moment: Instant, place: u32) -> Option<&(Instant, Waker)> {
        let sleeper = self.sleepers.get(place as usize)?.as_ref();
        sleeper.filter(|(until, _)| *until == moment)
    }

    fn next(&mut self) -> Option<Duration> {
        loop {
            let &Reverse((moment, place)) = self.queue.peek()?;
            if self.waits(moment, place).is_some() {
                return Some(moment.saturating_duration_since(Instant::now()));
            }
            self.queue.pop();
        }
    }

    /// Has somebody wait; the place is to be given to [`Timers::forget`].
    fn add(&mut self, moment: Instant, waker: Waker) -> u32 {
        let waiting = self.sleepers.len() - self.free.len();
        if self.queue.len() > 2 * waiting + GIVEN_UP_MAX {
            let mut queue = std::mem::take(&mut self.queue);
            queue.retain(|&Reverse((moment, place))| self.waits(moment, place).is_some());
            self.queue = queue;
        }
        let sleeper = Some((moment, waker));
        let place = match self.free.pop() {
            Some(place) => {
                self.sleepers[place as usize] = sleeper;
                place
            }
            None => {
                self.sleepers.push(sleeper);
                (self.sleepers.len() - 1) as u32
            }
        };
        self.queue.push(Reverse((moment, place)));
        place
    }

    fn forget(&mut self, place: u32) {
        self.sleepers[place as usize] = None;
        self.free.push(place);
    }
}

/// The turn's time.
fn now() -> Instant {
    TIMERS.with_borrow(|timers| timers.now)
}

/// A future that is ready from a moment on.
pub(super) struct Sleep {
    moment: Instant,
    /// Its place among the timers of its core, while it waits.
    place: Option<u32>,
}

/// Waits.
pub(super) fn sleep(duration: Duration) -> Sleep {
    Sleep::until(now() + duration)
}

impl Sleep {
    fn until(moment: Instant) -> Self {
        Self { moment, place: None }
    }

    fn forget(&mut self) {
        if let Some(place) = self.place.take() {
            TIMERS.with_borrow_mut(|timers| timers.forget(place));
        }
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let is_over = TIMERS.with_borrow_mut(|timers| {
            let is_over = self.moment <= timers.now;
            let sleeper = self.place.and_then(|place| timers.sleepers[place as usize].as_mut());
            match sleeper {
                _ if is_over => {}
                Some((_, waker)) => waker.clone_from(context.waker()),
                None => self.place = Some(timers.add(self.moment, context.waker().clone())),
            }
            is_over
        });
        match is_over {
            true => {
                self.forget();
                Poll::Ready(())
            }
            false => Poll::Pending,
        }
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        self.forget();
    }
}

impl hyper::rt::Sleep for Sleep {}

/// hyper's timer: as exact as a sleeping core is.
#[derive(Clone, Copy)]
pub(super) struct CoarseTimer;

impl hyper::rt::Timer for CoarseTimer {
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn hyper::rt::Sleep>> {
        Box::pin(sleep(duration))
    }

    fn sleep_until(&self, moment: Instant) -> Pin<Box<dyn hyper::rt::Sleep>> {
        Box::pin(Sleep::until(moment))
    }

    fn now(&self) -> Instant {
        now()
    }

    fn reset(&self, sleep: &mut Pin<Box<dyn hyper::rt::Sleep>>, moment: Instant) {
        if let Some(mut sleep) = sleep.as_mut().downcast_mut_pin::<Sleep>() {
            sleep.forget();
            sleep.moment = moment;
        }
    }
}
