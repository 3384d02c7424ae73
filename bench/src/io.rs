//! The loops that move bytes between a worker and its sockets: one over io_uring, one over epoll.
//!
//! Both do the same: wait, receive, let the worker check the replies and queue the next requests, send. There is one
//! clock read per batch of received bytes, taken before the replies are looked at.

use crate::protocol::Protocol;
use crate::stats::ErrorKind;
use crate::worker::{Connection, Step, Worker, now_ns};
use io_uring::types::{BufRingEntry, Fixed, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU16, Ordering};

/// How bytes are moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// io_uring where the kernel has it and allows it, epoll elsewhere.
    Auto,
    /// Readiness, then one system call per transfer.
    Epoll,
    /// One system call for many transfers.
    Uring,
}

/// Runs `worker` until it is done.
///
/// # Errors
///
/// When the kernel refuses the means to wait for sockets. What happens to connections is counted, not returned.
pub fn run<P: Protocol>(
    engine: Engine,
    worker: &mut Worker<'_, P>,
    connections: &mut [Connection<P>],
) -> io::Result<()> {
    match engine.resolve() {
        Engine::Uring => run_uring(worker, connections),
        _ => run_epoll(worker, connections),
    }
}

impl Engine {
    /// What is really used: [`Auto`](Self::Auto) becomes one of the others. io_uring costs a little less with shallow
    /// pipelines and the same with deep ones.
    pub fn resolve(self) -> Engine {
        match self {
            Engine::Auto
                if build_uring(1, false)
                    .and_then(|uring| Buffers::new(&uring, 1, URING_BUFFER))
                    .is_ok() =>
            {
                Engine::Uring
            }
            Engine::Auto => Engine::Epoll,
            chosen => chosen,
        }
    }

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Engine::Auto => "auto",
            Engine::Epoll => "epoll",
            Engine::Uring => "uring",
        }
    }
}

fn lost_by_error<P: Protocol>(worker: &mut Worker<'_, P>, connection: &mut Connection<P>, error: &io::Error) {
    let kind = match error.kind() {
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => ErrorKind::Closed,
        _ => ErrorKind::Broken,
    };
    worker.lost(connection, kind, &error.to_string());
}

/// Tells the time that a spinning loop merely waits from the time it works.
#[derive(Default)]
struct Idle {
    /// Whether nothing was done since the last turn.
    before: bool,
}

impl Idle {
    /// Notes a turn of the loop, which was `empty` if nothing had arrived. The new time, which is only read if so.
    #[inline(always)]
    fn turn<P: Protocol>(&mut self, worker: &mut Worker<'_, P>, last: u64, empty: bool) -> u64 {
        let now = if empty { now_ns() } else { last };
        // An empty turn includes the work that came before it, so it only counts if that was none.
        if empty && self.before && worker.spins() {
            worker.waited(now - last);
        }
        self.before = empty;
        now
    }
}

/// Size of the buffer that all connections of an epoll loop receive into, in bytes. Small enough to stay in the
/// second-level cache, large enough for the replies to a deep pipeline.
const EPOLL_BUFFER: usize = 128 << 10;

fn run_epoll<P: Protocol>(worker: &mut Worker<'_, P>, connections: &mut [Connection<P>]) -> io::Result<()> {
    // SAFETY: the call takes no pointers; a negative result is handled before the descriptor is owned.
    let epoll = match unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) } {
        fd if fd < 0 => return Err(io::Error::last_os_error()),
        // SAFETY: the descriptor is new and nobody else's.
        fd => unsafe { OwnedFd::from_raw_fd(fd) },
    };
    for (i, connection) in connections.iter().enumerate() {
        let Some(socket) = &connection.socket else { continue };
        let events = (libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLRDHUP | libc::EPOLLET) as u32;
        let mut event = libc::epoll_event { events, u64: i as u64 };
        // SAFETY: both descriptors are open and the pointer is to a valid event.
        if unsafe { libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, socket.as_raw_fd(), &mut event) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    let mut idle = Idle::default();
    let mut buffer = vec![0u8; EPOLL_BUFFER].into_boxed_slice();
    let mut events = vec![libc::epoll_event { events: 0, u64: 0 }; connections.len().clamp(1, 256)];
    let mut due = Vec::new();
    let mut now = now_ns();
    for connection in connections.iter_mut() {
        worker.refill(connection, now);
        flush_epoll(worker, connection);
    }
    loop {
        match worker.step(now, connections) {
            Step::Continue => {}
            Step::Stop => return Ok(()),
            Step::Kick => {
                for connection in connections.iter_mut() {
                    worker.refill(connection, now);
                    flush_epoll(worker, connection);
                }
            }
        }
        if worker.is_open() {
            due.clear();
            worker.queue_due(connections, now, |i| due.push(i));
            for &i in &due {
                idle.before = false;
                flush_epoll(worker, &mut connections[i]);
            }
        }
        let wait_ns = if worker.spins() {
            0
        } else {
            worker.wake_at(now).saturating_sub(now)
        };
        let timeout = libc::timespec {
            tv_sec: (wait_ns / 1_000_000_000) as i64,
            tv_nsec: (wait_ns % 1_000_000_000) as i64,
        };
        // SAFETY: the pointers are to valid memory of the given size; the mask may be null.
        let ready = unsafe {
            libc::epoll_pwait2(
                epoll.as_raw_fd(),
                events.as_mut_ptr(),
                events.len() as i32,
                &timeout,
                std::ptr::null(),
            )
        };
        if ready < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        now = idle.turn(worker, now, ready <= 0);
        for event in &events[..ready.max(0) as usize] {
            let (i, flags) = (event.u64 as usize, event.events as i32);
            let connection = &mut connections[i];
            if flags & !libc::EPOLLOUT != 0 {
                now = receive_epoll(worker, connection, &mut buffer, flags & libc::EPOLLRDHUP != 0);
                worker.refill(connection, now);
            }
            flush_epoll(worker, connection);
        }
    }
}

/// Receives until there is nothing more; the time of the last batch.
#[inline(always)]
fn receive_epoll<P: Protocol>(
    worker: &mut Worker<'_, P>,
    connection: &mut Connection<P>,
    buffer: &mut [u8],
    to_the_end: bool,
) -> u64 {
    loop {
        let Some(socket) = &connection.socket else {
            return now_ns();
        };
        // SAFETY: the buffer is valid for writes of its length.
        let n = unsafe {
            libc::recv(
                socket.as_raw_fd(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                libc::MSG_DONTWAIT,
            )
        };
        let now = now_ns();
        match n {
            0 => worker.lost(connection, ErrorKind::Closed, ""),
            n if n > 0 => {
                let n = n as usize;
                if worker.received(connection, &buffer[..n], now).is_err() {
                    worker.lost(connection, ErrorKind::Broken, "gave up after a malformed reply");
                } else if n < buffer.len() && !to_the_end {
                    // A short read has emptied the socket; the next arrival is a new edge.
                    return now;
                }
            }
            _ => {
                let error = io::Error::last_os_error();
                match error.kind() {
                    io::ErrorKind::WouldBlock => return now,
                    io::ErrorKind::Interrupted => {}
                    _ => lost_by_error(worker, connection, &error),
                }
            }
        }
    }
}

#[inline(always)]
fn flush_epoll<P: Protocol>(worker: &mut Worker<'_, P>, connection: &mut Connection<P>) {
    let mut sent = 0;
    while sent < connection.out.len() {
        let Some(socket) = &connection.socket else { return };
        let rest = &connection.out[sent..];
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the slice is valid for reads of its length.
        let n = unsafe { libc::send(socket.as_raw_fd(), rest.as_ptr().cast(), rest.len(), flags) };
        if n >= 0 {
            sent += n as usize;
            continue;
        }
        let error = io::Error::last_os_error();
        match error.kind() {
            io::ErrorKind::WouldBlock => break,
            io::ErrorKind::Interrupted => {}
            _ => return lost_by_error(worker, connection, &error),
        }
    }
    if sent == connection.out.len() {
        connection.out.clear();
    } else {
        connection.out.drain(..sent);
    }
}

/// Size of one receive buffer of an io_uring loop, in bytes.
const URING_BUFFER: usize = 16 << 10;
/// Receive buffers of an io_uring loop: about one per connection, but no fewer and no more than these powers of two.
/// More would leave the cache, as the kernel takes them in turn.
const URING_BUFFERS: (usize, usize) = (64, 1024);
/// Connections served before what they queued is submitted. Fewer would cost system calls; more would let the server
/// run dry and requests wait here, which would count as the server's latency.
const URING_BATCH: usize = 16;

const RECEIVE: u64 = 0;
const SEND: u64 = 1;

/// Buffers that the kernel picks from when bytes arrive.
pub(crate) struct Buffers {
    ring: *mut BufRingEntry,
    ring_bytes: usize,
    memory: Box<[u8]>,
    buffer_bytes: usize,
    count: u16,
    tail: u16,
}

impl Buffers {
    /// `count` buffers, which is a power of two, of `buffer_bytes` each, as group 0 of `uring`. They must outlive it.
    pub(crate) fn new(uring: &IoUring, count: u16, buffer_bytes: usize) -> io::Result<Self> {
        let ring_bytes = usize::from(count) * size_of::<BufRingEntry>();
        // SAFETY: an anonymous mapping, which is page-aligned and zeroed; failure is handled.
        let ring = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                ring_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if ring == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let memory = vec![0u8; usize::from(count) * buffer_bytes].into_boxed_slice();
        let mut buffers = Buffers {
            ring: ring.cast(),
            ring_bytes,
            memory,
            buffer_bytes,
            count,
            tail: 0,
        };
        // SAFETY: the ring lives as long as `buffers`, which outlives the io_uring instance's use of it.
        unsafe { uring.submitter().register_buf_ring_with_flags(ring as u64, count, 0, 0) }?;
        for id in 0..count {
            buffers.give_back(id);
        }
        Ok(buffers)
    }

    /// The first `len` bytes of buffer `id`.
    #[inline(always)]
    pub(crate) fn bytes(&self, id: u16, len: usize) -> &[u8] {
        let start = usize::from(id) * self.buffer_bytes;
        &self.memory[start..start + len]
    }

    /// Lets the kernel use buffer `id` again.
    #[inline(always)]
    pub(crate) fn give_back(&mut self, id: u16) {
        let at = usize::from(self.tail & (self.count - 1));
        let address = self.memory.as_mut_ptr() as u64 + (usize::from(id) * self.buffer_bytes) as u64;
        // SAFETY: `at` is below the number of entries in the mapping; the kernel reads an entry only below the tail,
        // which is stored afterwards.
        unsafe {
            let entry = &mut *self.ring.add(at);
            entry.set_addr(address);
            entry.set_len(self.buffer_bytes as u32);
            entry.set_bid(id);
        }
        self.tail = self.tail.wrapping_add(1);
        // SAFETY: the tail is an aligned field inside the mapping that the kernel only reads.
        unsafe { (*BufRingEntry::tail(self.ring).cast::<AtomicU16>()).store(self.tail, Ordering::Release) };
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new` with this length, and the io_uring instance is gone by now.
        unsafe { libc::munmap(self.ring.cast(), self.ring_bytes) };
    }
}

/// What is on its way to the kernel for one connection. The bytes must not move until the kernel is done with them, so
/// the connection fills another buffer in the meantime.
#[derive(Default)]
struct Sending {
    bytes: Vec<u8>,
    sent: usize,
    busy: bool,
}

fn build_uring(connections: usize, spins: bool) -> io::Result<IoUring> {
    let completions = (connections * 4).next_power_of_two().clamp(512, 32 << 10);
    let mut builder = IoUring::builder();
    builder
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_cqsize(completions as u32);
    if spins {
        // The kernel says in shared memory when there is something to fetch.
        builder.setup_taskrun_flag();
    }
    builder.build(256)
}

struct UringLoop {
    // Dropped in this order: the instance first, then the memory it used.
    uring: IoUring,
    buffers: Buffers,
    sending: Vec<Sending>,
    batched: usize,
}

fn run_uring<P: Protocol>(worker: &mut Worker<'_, P>, connections: &mut [Connection<P>]) -> io::Result<()> {
    let uring = build_uring(connections.len(), worker.spins())?;
    let sockets: Vec<RawFd> = connections
        .iter()
        .map(|c| c.socket.as_ref().map_or(-1, |socket| socket.as_raw_fd()))
        .collect();
    uring.submitter().register_files(&sockets)?;
    let count = connections
        .len()
        .next_power_of_two()
        .clamp(URING_BUFFERS.0, URING_BUFFERS.1);
    let buffers = Buffers::new(&uring, count as u16, URING_BUFFER)?;
    let sending = connections.iter().map(|_| Sending::default()).collect();
    let mut this = UringLoop {
        uring,
        buffers,
        sending,
        batched: 0,
    };
    let mut due = Vec::new();
    let mut completions = Vec::with_capacity(512);
    let mut idle = Idle::default();
    let mut now = now_ns();
    for (i, connection) in connections.iter_mut().enumerate().filter(|(_, c)| c.socket.is_some()) {
        this.receive(i)?;
        worker.refill(connection, now);
        this.send(i, connection)?;
    }
    loop {
        match worker.step(now, connections) {
            Step::Continue => {}
            Step::Stop => return Ok(()),
            Step::Kick => {
                for (i, connection) in connections.iter_mut().enumerate() {
                    worker.refill(connection, now);
                    this.send(i, connection)?;
                }
            }
        }
        if worker.is_open() {
            due.clear();
            worker.queue_due(connections, now, |i| due.push(i));
            for &i in &due {
                idle.before = false;
                this.send(i, &mut connections[i])?;
            }
        }
        this.batched = 0;
        let entered = if worker.spins() {
            this.enter_if_needed()
        } else {
            let wait_ns = worker.wake_at(now).saturating_sub(now);
            let timeout = Timespec::new()
                .sec(wait_ns / 1_000_000_000)
                .nsec((wait_ns % 1_000_000_000) as u32);
            this.uring
                .submitter()
                .submit_with_args(1, &SubmitArgs::new().timespec(&timeout))
        };
        match entered {
            Err(error) if !matches!(error.raw_os_error(), Some(libc::ETIME | libc::EINTR | libc::EBUSY)) => {
                return Err(error);
            }
            _ => {}
        }
        completions.clear();
        completions.extend(this.uring.completion());
        now = idle.turn(worker, now, completions.is_empty());
        for completion in &completions {
            let at = (completion.user_data() >> 1) as usize;
            if completion.user_data() & 1 == SEND {
                this.sent(worker, at, &mut connections[at], completion.result())?;
            } else {
                now = this.received(worker, at, &mut connections[at], completion)?;
            }
            if this.batched >= URING_BATCH {
                this.batched = 0;
                this.uring.submit()?;
            }
        }
    }
}

impl UringLoop {
    /// Enters the kernel only if there is something to submit or to fetch, so that spinning costs no system calls.
    fn enter_if_needed(&mut self) -> io::Result<usize> {
        let queue = self.uring.submission();
        let needless = queue.is_empty() && !queue.taskrun() && !queue.cq_overflow();
        drop(queue);
        if needless { Ok(0) } else { self.uring.submit() }
    }

    fn push(&mut self, entry: &io_uring::squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: receives write to `buffers` and sends read from `sending`, both of which outlive the instance;
            // the bytes of a send are left alone while it is busy.
            if unsafe { self.uring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            self.uring.submit()?;
        }
    }

    fn receive(&mut self, at: usize) -> io::Result<()> {
        let entry = opcode::RecvMulti::new(Fixed(at as u32), 0)
            .build()
            .user_data((at as u64) << 1 | RECEIVE);
        self.push(&entry)
    }

    #[inline(always)]
    fn send<P: Protocol>(&mut self, at: usize, connection: &mut Connection<P>) -> io::Result<()> {
        let sending = &mut self.sending[at];
        if sending.busy || connection.out.is_empty() || connection.socket.is_none() {
            return Ok(());
        }
        sending.bytes.clear();
        std::mem::swap(&mut sending.bytes, &mut connection.out);
        sending.sent = 0;
        sending.busy = true;
        self.batched += 1;
        self.send_rest(at)
    }

    #[inline(always)]
    fn send_rest(&mut self, at: usize) -> io::Result<()> {
        let sending = &self.sending[at];
        let rest = &sending.bytes[sending.sent..];
        // Waiting for all of it spares this loop the handling of most partial sends.
        let entry = opcode::Send::new(Fixed(at as u32), rest.as_ptr(), rest.len() as u32)
            .flags(libc::MSG_NOSIGNAL | libc::MSG_WAITALL)
            .build()
            .user_data((at as u64) << 1 | SEND);
        self.push(&entry)
    }

    #[inline(always)]
    fn sent<P: Protocol>(
        &mut self,
        worker: &mut Worker<'_, P>,
        at: usize,
        connection: &mut Connection<P>,
        result: i32,
    ) -> io::Result<()> {
        let sending = &mut self.sending[at];
        if result < 0 {
            sending.busy = false;
            if connection.socket.is_some() {
                lost_by_error(worker, connection, &io::Error::from_raw_os_error(-result));
            }
            return Ok(());
        }
        sending.sent += result as usize;
        if sending.sent < sending.bytes.len() {
            return self.send_rest(at);
        }
        sending.busy = false;
        self.send(at, connection)
    }

    #[inline(always)]
    fn received<P: Protocol>(
        &mut self,
        worker: &mut Worker<'_, P>,
        at: usize,
        connection: &mut Connection<P>,
        completion: &cqueue::Entry,
    ) -> io::Result<u64> {
        let now = now_ns();
        let (result, flags) = (completion.result(), completion.flags());
        let buffer = cqueue::buffer_select(flags);
        if connection.socket.is_some() {
            match (result, buffer) {
                (n, Some(id)) if n > 0 => {
                    if worker
                        .received(connection, self.buffers.bytes(id, n as usize), now)
                        .is_err()
                    {
                        worker.lost(connection, ErrorKind::Broken, "gave up after a malformed reply");
                    }
                }
                (0, _) => worker.lost(connection, ErrorKind::Closed, ""),
                (n, _) if n == -libc::ENOBUFS || n == -libc::EINTR => {}
                (n, _) => lost_by_error(worker, connection, &io::Error::from_raw_os_error(-n)),
            }
        }
        if let Some(id) = buffer {
            self.buffers.give_back(id);
        }
        if connection.socket.is_some() {
            if !cqueue::more(flags) {
                self.receive(at)?;
            }
            worker.refill(connection, now);
            self.send(at, connection)?;
        }
        Ok(now)
    }
}
