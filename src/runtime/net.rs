//! The network ring: one io_uring per core for all its sockets, and for what its log must have safe soon.
//!
//! Accepting and receiving are armed once and go on by themselves (multishot); received bytes land in a ring of buffers that
//! the kernel picks from; sends are queued and submitted together with the wait for what comes next. All system calls of a
//! busy core are one `io_uring_enter` per turn.

use super::gateway::Gateway;
use super::listens_while_loading;
use crate::engine::{Engine, Notice};
use crate::protocol::Protocol;
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

/// A receive buffer.
pub(super) const BUFFER_BYTES: usize = 8192;
const BUFFER_GROUP: u16 = 1;
const SUBMISSIONS: u32 = 1024;
const COMPLETIONS: u32 = 8192;
/// Pieces of output sent with one operation; more follow with the next.
const PIECES_MAX: usize = 64;
/// How often a sleeping core looks at the clock.
const TICK: Duration = Duration::from_millis(100);
/// How long accepting rests after the process ran out of descriptors or memory for one.
const ACCEPT_REST_NS: u64 = 100_000_000;
/// How often that is logged.
const WARNING_PERIOD_NS: u64 = 10_000_000_000;

/// What an operation was for: the low byte of its user data. The next three bytes are a connection's generation, the upper
/// half is its number, or a listener's, or a write's.
mod tag {
    pub(super) const ACCEPT: u64 = 1;
    pub(super) const RECEIVE: u64 = 2;
    pub(super) const SEND: u64 = 3;
    pub(super) const CANCEL: u64 = 4;
    pub(super) const TICK: u64 = 5;
    pub(super) const DOORBELL: u64 = 6;
    pub(super) const WRITE: u64 = 7;
}

const GENERATION_MASK: u32 = 0xff_ffff;

fn user_data(tag: u64, generation: u32, number: u32) -> u64 {
    tag | u64::from(generation) << 8 | u64::from(number) << 32
}

/// A new eventfd that does not block.
pub(super) fn new_eventfd() -> io::Result<OwnedFd> {
    // SAFETY: no pointers; the result is checked and owned by nobody else.
    unsafe {
        let fd = libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        if fd < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(OwnedFd::from_raw_fd(fd))
        }
    }
}

/// Adds one to an eventfd.
pub(super) fn signal_eventfd(eventfd: &OwnedFd) {
    let one = 1u64;
    // SAFETY: writes eight bytes from a local. A full counter (EAGAIN) means that a signal is pending, which is enough.
    unsafe { libc::write(eventfd.as_raw_fd(), (&raw const one).cast(), 8) };
}

/// Receive buffers that the kernel picks from (`IORING_REGISTER_PBUF_RING`).
struct BufferRing {
    /// `count` entries shared with the kernel; mapped for the life of the ring.
    entries: *mut types::BufRingEntry,
    /// A power of two.
    count: u16,
    memory: Box<[u8]>,
    tail: u16,
}

impl BufferRing {
    fn new(ring: &IoUring, count: u16) -> io::Result<Self> {
        // SAFETY: an anonymous private mapping at an address of the kernel's choice.
        let entries = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                entries_bytes(count),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_POPULATE,
                -1,
                0,
            )
        };
        if entries == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let mut buffers = Self {
            entries: entries.cast(),
            count,
            memory: vec![0; usize::from(count) * BUFFER_BYTES].into_boxed_slice(),
            tail: 0,
        };
        // SAFETY: the mapping has room for `count` entries and outlives the ring: `Net` drops the ring first.
        unsafe {
            ring.submitter()
                .register_buf_ring_with_flags(entries as u64, count, BUFFER_GROUP, 0)?;
        }
        for id in 0..count {
            buffers.give(id);
        }
        buffers.publish();
        Ok(buffers)
    }

    /// What was received into a buffer.
    fn bytes(&self, id: u16, length: usize) -> &[u8] {
        &self.memory[usize::from(id) * BUFFER_BYTES..][..length]
    }

    /// Gives a buffer back; the kernel sees it after [`BufferRing::publish`].
    fn give(&mut self, id: u16) {
        let address = self.memory[usize::from(id) * BUFFER_BYTES..].as_ptr() as u64;
        // SAFETY: the index is below `count`, so the entry is inside the mapping, and the kernel does not read entries at or
        // behind the published tail. The kernel writes to the buffer only until it completes the receive that picked it.
        let entry = unsafe { &mut *self.entries.add(usize::from(self.tail & (self.count - 1))) };
        entry.set_addr(address);
        entry.set_len(BUFFER_BYTES as u32);
        entry.set_bid(id);
        self.tail = self.tail.wrapping_add(1);
    }

    fn publish(&self) {
        // SAFETY: `tail` returns the address of the ring's tail, a u16 that lies in the first entry and is only written here;
        // as an atomic, because the kernel reads it.
        let tail = unsafe { &*types::BufRingEntry::tail(self.entries).cast::<AtomicU16>() };
        tail.store(self.tail, Ordering::Release);
    }
}

fn entries_bytes(count: u16) -> usize {
    usize::from(count) * size_of::<types::BufRingEntry>()
}

impl Drop for BufferRing {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this size; the ring that used it is gone.
        unsafe { libc::munmap(self.entries.cast(), entries_bytes(self.count)) };
    }
}

/// The pieces of one send: what the kernel reads them through must stay where it is until the send is done.
struct Pieces {
    vectors: [libc::iovec; PIECES_MAX],
    message: libc::msghdr,
}

#[derive(Default)]
struct Connection {
    socket: Option<OwnedFd>,
    generation: u32,
    /// A receive is armed.
    receiving: bool,
    /// It was asked to stop.
    cancelling: bool,
    /// A send is under way.
    sending: bool,
    /// It closes when neither is.
    closing: bool,
    pieces: Option<Box<Pieces>>,
}

impl Connection {
    fn fd(&self) -> types::Fd {
        types::Fd(self.socket.as_ref().map_or(-1, AsRawFd::as_raw_fd))
    }
}

/// A socket that connections come in by.
pub(super) struct Listener {
    pub(super) socket: Option<OwnedFd>,
    pub(super) protocol: Protocol,
    /// Its connections stay on this core, whatever the others have to do.
    stays: bool,
    armed: bool,
    /// When accepting may be tried again after an error.
    rest_until_ns: u64,
    warned_ns: Option<u64>,
}

impl Listener {
    pub(super) fn new(socket: OwnedFd, protocol: Protocol, stays: bool) -> Self {
        Self {
            socket: Some(socket),
            protocol,
            stays,
            armed: false,
            rest_until_ns: 0,
            warned_ns: None,
        }
    }
}

/// The ring and all that hangs on it. Fields are dropped in this order.
pub(super) struct Net {
    ring: IoUring,
    buffers: BufferRing,
    connections: Vec<Connection>,
    listeners: Vec<Listener>,
    completed: Vec<cqueue::Entry>,
    /// Writes to files that the ring has answered: the number, and the system's answer.
    written: VecDeque<(u32, i32)>,
    tick: Box<types::Timespec>,
    tick_armed: bool,
    /// An eventfd that others write to when this core must wake. It is never read: each write completes the poll.
    doorbell: OwnedFd,
    doorbell_armed: bool,
    accepting: bool,
    /// All listeners listen, not only those that do so while the server loads.
    serves_all: bool,
    open: usize,
    closed: u32,
}

/// An accepted socket.
pub(super) struct Accepted {
    pub(super) socket: OwnedFd,
    pub(super) protocol: Protocol,
    /// It must stay on this core.
    pub(super) stays: bool,
}

impl Net {
    /// A ring for this thread, which alone may use it.
    pub(super) fn new(listeners: Vec<Listener>, doorbell: OwnedFd, receive_buffers: u16) -> io::Result<Self> {
        let ring = new_ring()?;
        // Saves looking the descriptor up in each enter; not essential.
        let _ = ring.submitter().register_ring_fd();
        let buffers = BufferRing::new(&ring, receive_buffers)?;
        Ok(Self {
            ring,
            buffers,
            connections: vec![],
            listeners,
            completed: Vec::with_capacity(COMPLETIONS as usize),
            written: VecDeque::new(),
            tick: Box::new(types::Timespec::from(TICK)),
            tick_armed: false,
            doorbell,
            doorbell_armed: false,
            accepting: true,
            serves_all: false,
            open: 0,
            closed: 0,
        })
    }

    fn submit(&mut self, entry: &squeue::Entry) {
        // SAFETY: every entry refers to memory that outlives its operation: the buffer ring, `tick` and `pieces` are owned by
        // this `Net`, output is kept in place by the engine until `Engine::sent`, sockets are closed after their last
        // operation, and who has a file written promises the same for it.
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            // The queue is full: hand it to the kernel. EBUSY (completions overflow) is mended by the caller's next turn.
            if self.ring.submit().is_err() {
                self.harvest();
            }
        }
    }

    /// Submits what is queued and collects what completed, without waiting: one system call.
    pub(super) fn turn(&mut self) {
        self.enter(0);
    }

    /// The same, and waits until something has completed: a byte, a connection, the doorbell, or the next tick; no longer
    /// than `most`.
    pub(super) fn wait(&mut self, most: Option<Duration>) {
        let Some(most) = most else { return self.enter(1) };
        self.arm();
        let most = types::Timespec::from(most);
        // As in `enter`; that the time is over is an error, too.
        let _ = self
            .ring
            .submitter()
            .submit_with_args(1, &types::SubmitArgs::new().timespec(&most));
        self.harvest();
    }

    fn enter(&mut self, completions_min: u32) {
        self.arm();
        let queued = self.ring.submission().len() as u32;
        const GETEVENTS: u32 = 1;
        // SAFETY: no pointers are passed. Errors leave the entries queued for the next turn: EINTR and EBUSY are passing,
        // and anything else would show in the completions.
        let _ = unsafe {
            self.ring
                .submitter()
                .enter::<libc::sigset_t>(queued, completions_min, GETEVENTS, None)
        };
        self.harvest();
    }

    fn harvest(&mut self) {
        let Self { ring, completed, .. } = self;
        completed.extend(ring.completion());
    }

    fn arm(&mut self) {
        if !self.tick_armed {
            self.tick_armed = true;
            let entry = opcode::Timeout::new(&raw const *self.tick)
                .flags(types::TimeoutFlags::MULTISHOT)
                .build()
                .user_data(tag::TICK);
            self.submit(&entry);
        }
        if !self.doorbell_armed {
            self.doorbell_armed = true;
            let entry = opcode::PollAdd::new(types::Fd(self.doorbell.as_raw_fd()), libc::POLLIN as u32)
                .multi(true)
                .build()
                .user_data(tag::DOORBELL);
            self.submit(&entry);
        }
    }

    /// All listeners listen from now on.
    pub(super) fn serve_all(&mut self) {
        self.serves_all = true;
    }

    /// Arms the listeners that are not, unless they rest or do not listen yet.
    pub(super) fn arm_listeners(&mut self, now_ns: u64) {
        for number in 0..self.listeners.len() {
            let listener = &mut self.listeners[number];
            let Some(socket) = &listener.socket else { continue };
            let listens = self.serves_all || listens_while_loading(listener.protocol);
            if self.accepting && listens && !listener.armed && now_ns >= listener.rest_until_ns {
                listener.armed = true;
                let entry = opcode::AcceptMulti::new(types::Fd(socket.as_raw_fd()))
                    .flags(libc::SOCK_CLOEXEC)
                    .build()
                    .user_data(user_data(tag::ACCEPT, 0, number as u32));
                self.submit(&entry);
            }
        }
    }

    /// Something has completed and was not dispatched.
    pub(super) fn has_completed(&self) -> bool {
        !self.completed.is_empty()
    }

    /// Nothing has completed, and nothing is waiting to be collected or submitted.
    pub(super) fn is_quiet(&mut self) -> bool {
        self.completed.is_empty()
            && self.ring.completion().is_empty()
            && self.ring.submission().is_empty()
            && !self.ring.submission().taskrun()
    }

    /// Tells the engine what completed, with the time of `clock` where that matters, and `accepted` of new sockets.
    pub(super) fn dispatch(
        &mut self,
        engine: &mut Engine,
        now_ns: u64,
        clock: impl Fn() -> u64,
        mut accepted: impl FnMut(&mut Engine, &mut Self, Accepted),
    ) {
        let mut completed = std::mem::take(&mut self.completed);
        let mut gave_back = false;
        let timed = engine.follows_requests();
        for entry in completed.drain(..) {
            let (data, result, flags) = (entry.user_data(), entry.result(), entry.flags());
            let number = (data >> 32) as u32;
            let generation = (data >> 8) as u32 & GENERATION_MASK;
            match data & 0xff {
                tag::ACCEPT => {
                    let listener = &mut self.listeners[number as usize];
                    listener.armed &= cqueue::more(flags);
                    let (protocol, stays) = (listener.protocol, listener.stays);
                    if result >= 0 {
                        // SAFETY: a fresh descriptor from the kernel, owned by nobody else.
                        let socket = unsafe { OwnedFd::from_raw_fd(result) };
                        let socket = Accepted {
                            socket,
                            protocol,
                            stays,
                        };
                        accepted(engine, self, socket);
                    } else if self.accepting {
                        let listener = &mut self.listeners[number as usize];
                        let error = io::Error::from_raw_os_error(-result);
                        if matches!(-result, libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) {
                            if listener
                                .warned_ns
                                .is_none_or(|warned| now_ns - warned > WARNING_PERIOD_NS)
                            {
                                listener.warned_ns = Some(now_ns);
                                log::warn!(
                                    "accepting {} connections rests: {error}; raise the limit of open files or lower --connections-max",
                                    protocol.name()
                                );
                            }
                            listener.rest_until_ns = now_ns + ACCEPT_REST_NS;
                        }
                    }
                }
                tag::RECEIVE => {
                    if let Some(id) = cqueue::buffer_select(flags) {
                        if result > 0 && self.is_current(number, generation) {
                            if timed {
                                engine.time_is(clock());
                            }
                            engine.received(number, self.buffers.bytes(id, result as usize));
                        }
                        self.buffers.give(id);
                        gave_back = true;
                    }
                    if self.is_current(number, generation) {
                        self.received(engine, number, result, cqueue::more(flags));
                    }
                }
                tag::SEND if self.is_current(number, generation) => {
                    self.connections[number as usize].sending = false;
                    if timed && engine.goes_on_when_sent(number) {
                        engine.time_is(clock());
                    }
                    match result {
                        1.. => engine.sent(number, result as usize),
                        _ => engine.failed(number),
                    }
                    self.close_if_done(engine, number);
                }
                tag::TICK => self.tick_armed &= cqueue::more(flags),
                tag::DOORBELL => self.doorbell_armed &= cqueue::more(flags),
                tag::WRITE => self.written.push_back((number, result)),
                _ => {}
            }
        }
        if gave_back {
            self.buffers.publish();
        }
        // What a handler's submissions collected meanwhile, if anything, is for the next turn.
        if self.completed.is_empty() {
            self.completed = completed;
        }
    }

    fn is_current(&self, number: u32, generation: u32) -> bool {
        self.connections[number as usize].generation == generation
    }

    fn received(&mut self, engine: &mut Engine, number: u32, result: i32, more: bool) {
        if !more {
            let connection = &mut self.connections[number as usize];
            connection.receiving = false;
            connection.cancelling = false;
        }
        match result {
            1.. => {}
            0 => engine.ended(number),
            _ if -result == libc::ENOBUFS => engine.metrics.counters.receive_buffers_exhausted += 1,
            _ if -result == libc::ECANCELED => {}
            _ => engine.failed(number),
        }
        if !more {
            engine.needs_attention(number);
            self.close_if_done(engine, number);
        }
    }

    /// Takes a connection in.
    pub(super) fn adopt(&mut self, engine: &mut Engine, socket: OwnedFd, protocol: Protocol) {
        let number = engine.opened(protocol, peer_name(&socket));
        if self.connections.len() <= number as usize {
            self.connections.resize_with(number as usize + 1, Connection::default);
        }
        let connection = &mut self.connections[number as usize];
        connection.socket = Some(socket);
        connection.closing = false;
        self.open += 1;
        engine.needs_attention(number);
    }

    /// Does what connections need: sends, arms, pauses, closes. Tells the gateway what is its own.
    pub(super) fn look_after(&mut self, engine: &mut Engine, gateway: &mut Gateway) {
        while let Some(number) = engine.attention() {
            let wants = engine.wants(number);
            if wants.notice != Notice::Nothing {
                gateway.notice(number, wants.notice);
            }
            // Calls have no sockets.
            let Some(connection) = self.connections.get(number as usize) else {
                continue;
            };
            let (generation, fd) = (connection.generation, connection.fd());
            if connection.closing {
                continue;
            }
            if wants.close {
                gateway.closed(number);
                self.close(engine, number);
                continue;
            }
            if wants.shut
                && let Some(socket) = &connection.socket
            {
                // SAFETY: an open socket; no pointers.
                unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_WR) };
            }
            if wants.send && !connection.sending {
                self.send(engine, number);
            }
            let connection = &mut self.connections[number as usize];
            if wants.read && !connection.receiving {
                connection.receiving = true;
                let entry = opcode::RecvMulti::new(fd, BUFFER_GROUP).build().user_data(user_data(
                    tag::RECEIVE,
                    generation,
                    number,
                ));
                self.submit(&entry);
            } else if !wants.read && connection.receiving && !connection.cancelling {
                connection.cancelling = true;
                self.cancel(user_data(tag::RECEIVE, generation, number));
            }
        }
    }

    fn cancel(&mut self, operation: u64) {
        let entry = opcode::AsyncCancel::new(operation).build().user_data(tag::CANCEL);
        self.submit(&entry);
    }

    fn send(&mut self, engine: &mut Engine, number: u32) {
        let connection = &mut self.connections[number as usize];
        // A short send completes, so that a slow client is seen to take something.
        let flags = libc::MSG_NOSIGNAL;
        let data = user_data(tag::SEND, connection.generation, number);
        let fd = connection.fd();
        let mut pieces = engine.unsent(number);
        let Some(first) = pieces.next() else { return };
        connection.sending = true;
        let entry = match pieces.next() {
            None => opcode::Send::new(fd, first.as_ptr(), first.len() as u32)
                .flags(flags)
                .build(),
            Some(second) => {
                let room = connection.pieces.get_or_insert_with(new_pieces);
                let mut count = 0;
                for (vector, piece) in room.vectors.iter_mut().zip([first, second].into_iter().chain(pieces)) {
                    vector.iov_base = piece.as_ptr().cast_mut().cast();
                    vector.iov_len = piece.len();
                    count += 1;
                }
                room.message.msg_iov = room.vectors.as_mut_ptr();
                room.message.msg_iovlen = count;
                opcode::SendMsg::new(fd, &raw const room.message)
                    .flags(flags as u32)
                    .build()
            }
        };
        self.submit(&entry.user_data(data));
    }

    /// Begins to close a connection; it is done when no operation is under way on it.
    fn close(&mut self, engine: &mut Engine, number: u32) {
        let connection = &mut self.connections[number as usize];
        connection.closing = true;
        let receive = user_data(tag::RECEIVE, connection.generation, number);
        let cancel = connection.receiving && !connection.cancelling;
        if connection.sending
            && let Some(socket) = &connection.socket
        {
            // Ends a send that the client does not take.
            // SAFETY: an open socket; no pointers.
            unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_RDWR) };
        }
        if cancel {
            self.cancel(receive);
        }
        self.close_if_done(engine, number);
    }

    fn close_if_done(&mut self, engine: &mut Engine, number: u32) {
        let connection = &mut self.connections[number as usize];
        if connection.closing && !connection.receiving && !connection.sending && connection.socket.take().is_some() {
            connection.generation = connection.generation.wrapping_add(1) & GENERATION_MASK;
            connection.pieces = None;
            self.open -= 1;
            self.closed += 1;
            engine.closed(number);
        }
    }

    /// Has bytes written to a file, and made safe. The answer comes with the number: [`Net::next_written`].
    ///
    /// # Safety
    /// Until then the bytes stay where they are, and unchanged, and the file is open.
    pub(super) unsafe fn write(&mut self, file: i32, bytes: &[u8], offset: u64, number: u32) {
        let entry = opcode::Write::new(types::Fd(file), bytes.as_ptr(), bytes.len() as u32)
            .offset(offset)
            .rw_flags(libc::RWF_DSYNC)
            .build();
        self.submit(&entry.user_data(user_data(tag::WRITE, 0, number)));
    }

    /// The number of a write that was answered and was not asked for yet, and the system's answer: bytes, or an error's negative number.
    pub(super) fn next_written(&mut self) -> Option<(u32, i32)> {
        self.written.pop_front()
    }

    /// Collects what was written; what else has completed stays. Waits a moment for something.
    pub(super) fn collect_written(&mut self) {
        self.wait(Some(Duration::from_millis(1)));
        let Self { completed, written, .. } = self;
        completed.retain(|entry| {
            let is_write = entry.user_data() & 0xff == tag::WRITE;
            if is_write {
                written.push_back(((entry.user_data() >> 32) as u32, entry.result()));
            }
            !is_write
        });
    }

    /// Stops accepting and closes the listeners' sockets on this core.
    pub(super) fn stop_accepting(&mut self) {
        if !std::mem::replace(&mut self.accepting, false) {
            return;
        }
        for number in 0..self.listeners.len() {
            if self.listeners[number].armed {
                self.cancel(user_data(tag::ACCEPT, 0, number as u32));
            }
        }
    }

    /// Closes the listeners once no accept is armed on them. True when that is done.
    pub(super) fn close_listeners(&mut self) -> bool {
        for listener in &mut self.listeners {
            if !listener.armed {
                listener.socket = None;
            }
        }
        self.listeners.iter().all(|listener| listener.socket.is_none())
    }

    /// How many connections were closed since this was last asked.
    pub(super) fn take_closed(&mut self) -> u32 {
        std::mem::take(&mut self.closed)
    }

    /// Sockets that are not closed yet.
    pub(super) fn open(&self) -> usize {
        self.open
    }
}

fn new_pieces() -> Box<Pieces> {
    // SAFETY: `iovec` and `msghdr` are plain C structs for which all bytes zero is a valid, empty value.
    Box::new(unsafe { std::mem::zeroed() })
}

/// A ring with what the server needs, or the reason why there is none.
pub(super) fn new_ring() -> io::Result<IoUring> {
    IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_cqsize(COMPLETIONS)
        .build(SUBMISSIONS)
}

/// Tries all that [`Net`] needs of the kernel.
pub(super) fn probe() -> io::Result<()> {
    let ring = new_ring()?;
    let buffers = BufferRing::new(&ring, 1)?;
    drop(ring);
    drop(buffers);
    Ok(())
}

/// The address of the other side, for people.
fn peer_name(socket: &OwnedFd) -> String {
    // SAFETY: the descriptor is open, and `into_raw_fd` below keeps this from closing it.
    let stream = unsafe { std::net::TcpStream::from_raw_fd(socket.as_raw_fd()) };
    let name = stream
        .peer_addr()
        .map_or_else(|_| "unknown".to_owned(), |address| address.to_string());
    let _ = stream.into_raw_fd();
    name
}

/// Says a last word to a socket that is not served, as far as it goes without waiting.
pub(super) fn refuse(socket: &OwnedFd, word: &[u8]) {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: reads `word` only.
    unsafe { libc::send(socket.as_raw_fd(), word.as_ptr().cast(), word.len(), flags) };
}
