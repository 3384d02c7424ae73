//! The limit of the network path: a server without a store.
//!
//! It answers the text protocol of memcached as far as the generator speaks it, from one thread and over one io_uring: each
//! key of a get with the same fixed value, a set with `STORED` once its value was skipped, anything else with `ERROR`. What
//! a real server needs beyond this, under the same load, is its own work.
//!
//! The ring is set up as the one of memkv-tpc: accepting and receiving are armed once, the kernel picks receive buffers of
//! the same number and size, and what is to be sent is submitted by the system call that waits for completions.

use crate::io::Buffers;
use io_uring::types::Fd;
use io_uring::{IoUring, cqueue, opcode, squeue};
use std::io;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd};

const SUBMISSIONS: u32 = 1024;
const COMPLETIONS: u32 = 8192;
const BUFFERS: u16 = 256;
const BUFFER_BYTES: usize = 8192;
const BUFFER_GROUP: u16 = 0;

/// Longest line of a request in bytes. A connection that sends a longer one is closed.
const LINE_MAX: usize = 64 << 10;
/// A connection that has this many bytes to read and does not read them is closed.
const UNSENT_MAX: usize = 64 << 20;
/// Largest value in bytes.
pub const VALUE_MAX: usize = 1 << 20;

/// What an operation was for; the number of a connection stands above these bits.
const TAG_BITS: u32 = 3;
const ACCEPT: u64 = 0;
const RECEIVE: u64 = 1;
const SEND: u64 = 2;
const STOP: u64 = 3;
const CANCEL: u64 = 4;

/// The part of a connection that knows the protocol.
#[derive(Debug, Default)]
struct Session {
    /// The front of a line whose end has not arrived.
    line: Vec<u8>,
    /// Bytes of a set's value that have not arrived, with the two behind it; the set is answered when there are none left.
    skip: u64,
    /// Replies to send.
    out: Vec<u8>,
}

/// What is behind the key in every block of a get's reply.
#[derive(Debug)]
struct Answers {
    block: Vec<u8>,
    /// The same, and the end of the reply.
    last_block: Vec<u8>,
}

impl Answers {
    fn new(value_size: usize) -> Self {
        let mut block = format!(" 0 {value_size}\r\n").into_bytes();
        block.resize(block.len() + value_size, b'v');
        block.extend_from_slice(b"\r\n");
        let last_block = [&block[..], b"END\r\n"].concat();
        Answers { block, last_block }
    }
}

impl Session {
    /// Answers the requests in `data`, which may begin and end anywhere. False when the client asks for too much.
    #[inline]
    fn received(&mut self, mut data: &[u8], answers: &Answers) -> bool {
        while !data.is_empty() {
            if self.skip > 0 {
                let here = self.skip.min(data.len() as u64);
                data = &data[here as usize..];
                self.skip -= here;
                if self.skip == 0 {
                    self.out.extend_from_slice(b"STORED\r\n");
                }
                continue;
            }
            let Some(end) = memchr::memchr(b'\n', data) else {
                self.line.extend_from_slice(data);
                return self.line.len() <= LINE_MAX;
            };
            if self.line.is_empty() {
                self.request(&data[..end], answers);
            } else {
                let mut line = std::mem::take(&mut self.line);
                line.extend_from_slice(&data[..end]);
                self.request(&line, answers);
                line.clear();
                self.line = line;
            }
            data = &data[end + 1..];
            if self.out.len() > UNSENT_MAX {
                return false;
            }
        }
        true
    }

    #[inline]
    fn request(&mut self, line: &[u8], answers: &Answers) {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        match line.split_at_checked(4) {
            Some((b"get ", keys)) => {
                let (mut keys, mut more) = (keys, true);
                while more && self.out.len() <= UNSENT_MAX {
                    let end = memchr::memchr(b' ', keys);
                    more = end.is_some();
                    let end = end.unwrap_or(keys.len());
                    self.out.extend_from_slice(b"VALUE ");
                    self.out.extend_from_slice(&keys[..end]);
                    self.out
                        .extend_from_slice(if more { &answers.block } else { &answers.last_block });
                    keys = keys.get(end + 1..).unwrap_or_default();
                }
            }
            Some((b"set ", words)) => match value_len(words) {
                Some(len) => self.skip = len + 2,
                None => self.out.extend_from_slice(b"ERROR\r\n"),
            },
            _ => self.out.extend_from_slice(b"ERROR\r\n"),
        }
    }
}

/// The last of the words `<key> <flags> <exptime> <bytes>`.
#[inline]
fn value_len(words: &[u8]) -> Option<u64> {
    let mut words = words.split(|&b| b == b' ').skip(3);
    let digits = words.next().filter(|digits| (1..=10).contains(&digits.len()))?;
    let digit = |b: &u8| b.is_ascii_digit().then(|| u64::from(b - b'0'));
    let len = digits.iter().try_fold(0, |n, b| Some(n * 10 + digit(b)?))?;
    words.next().is_none().then_some(len)
}

#[derive(Debug, Default)]
struct Connection {
    socket: Option<TcpStream>,
    session: Session,
    /// What the kernel reads from, and how much of it is sent. It must not move while a send is under way.
    sending: Vec<u8>,
    sent: usize,
    send_is_under_way: bool,
    receive_is_armed: bool,
    /// The client will send nothing more.
    ended: bool,
    /// The socket is shut down, and is closed once no operation is under way on it.
    closing: bool,
}

struct Echo {
    // Dropped in this order: the instance first, then the memory it used.
    ring: IoUring,
    buffers: Buffers,
    connections: Vec<Connection>,
    free: Vec<usize>,
    answers: Answers,
    listener: TcpListener,
    accept_is_armed: bool,
    stopping: bool,
}

/// Serves connections to `listener` with values of `value_size` bytes until `stop` can be read from.
///
/// # Errors
///
/// When the kernel refuses the ring, or the process has no descriptors or memory left for a connection.
pub fn run(listener: TcpListener, value_size: usize, stop: BorrowedFd<'_>) -> io::Result<()> {
    let ring = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_cqsize(COMPLETIONS)
        .build(SUBMISSIONS)?;
    // Saves looking the descriptor up in each system call; not essential.
    let _ = ring.submitter().register_ring_fd();
    let buffers = Buffers::new(&ring, BUFFERS, BUFFER_BYTES)?;
    let mut echo = Echo {
        ring,
        buffers,
        connections: Vec::new(),
        free: Vec::new(),
        answers: Answers::new(value_size),
        listener,
        accept_is_armed: false,
        stopping: false,
    };
    echo.accept()?;
    let entry = opcode::PollAdd::new(Fd(stop.as_raw_fd()), libc::POLLIN as u32).build();
    echo.push(entry.user_data(STOP))?;
    let mut completed = Vec::with_capacity(COMPLETIONS as usize);
    while !echo.stopping || echo.accept_is_armed || echo.free.len() < echo.connections.len() {
        match echo.ring.submit_and_wait(1) {
            Err(error) if !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY)) => return Err(error),
            _ => completed.extend(echo.ring.completion()),
        }
        for completion in completed.drain(..) {
            echo.completed(&completion)?;
        }
    }
    Ok(())
}

impl Echo {
    fn push(&mut self, entry: squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: receives write to `buffers`, which outlives the instance; a send reads from `sending`, which is left
            // alone while it is under way, and whose bytes stay where they are when `connections` grows.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return Ok(());
            }
            self.ring.submit()?;
        }
    }

    fn accept(&mut self) -> io::Result<()> {
        self.accept_is_armed = true;
        let entry = opcode::AcceptMulti::new(Fd(self.listener.as_raw_fd())).flags(libc::SOCK_CLOEXEC);
        self.push(entry.build().user_data(ACCEPT))
    }

    fn completed(&mut self, completion: &cqueue::Entry) -> io::Result<()> {
        let (result, flags) = (completion.result(), completion.flags());
        let number = (completion.user_data() >> TAG_BITS) as usize;
        match completion.user_data() & ((1 << TAG_BITS) - 1) {
            ACCEPT => {
                self.accept_is_armed = cqueue::more(flags);
                if result >= 0 {
                    // SAFETY: a fresh descriptor from the kernel, owned by nobody else.
                    let socket = unsafe { TcpStream::from_raw_fd(result) };
                    if !self.stopping {
                        self.open(socket)?;
                    }
                } else if matches!(-result, libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) {
                    return Err(io::Error::from_raw_os_error(-result));
                }
                if !self.accept_is_armed && !self.stopping {
                    self.accept()?;
                }
            }
            RECEIVE => self.received(number, result, flags)?,
            SEND => self.sent(number, result)?,
            STOP => {
                self.stopping = true;
                self.push(opcode::AsyncCancel::new(ACCEPT).build().user_data(CANCEL))?;
                for number in 0..self.connections.len() {
                    self.close(number);
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn open(&mut self, socket: TcpStream) -> io::Result<()> {
        // Fails if the client is gone already, which the first operation will tell.
        let _ = socket.set_nodelay(true);
        let number = self.free.pop().unwrap_or_else(|| {
            self.connections.push(Connection::default());
            self.connections.len() - 1
        });
        self.connections[number].socket = Some(socket);
        self.receive(number)
    }

    fn receive(&mut self, number: usize) -> io::Result<()> {
        let connection = &mut self.connections[number];
        let Some(socket) = &connection.socket else {
            return Ok(());
        };
        connection.receive_is_armed = true;
        let entry = opcode::RecvMulti::new(Fd(socket.as_raw_fd()), BUFFER_GROUP);
        self.push(entry.build().user_data((number as u64) << TAG_BITS | RECEIVE))
    }

    #[inline]
    fn received(&mut self, number: usize, result: i32, flags: u32) -> io::Result<()> {
        let connection = &mut self.connections[number];
        connection.receive_is_armed = cqueue::more(flags);
        let mut keep = match result {
            0 => {
                connection.ended = true;
                connection.send_is_under_way
            }
            n => n > 0 || n == -libc::ENOBUFS || n == -libc::EINTR,
        };
        if let Some(id) = cqueue::buffer_select(flags) {
            if result > 0 && !connection.closing {
                let data = self.buffers.bytes(id, result as usize);
                keep = connection.session.received(data, &self.answers);
                keep &= connection.session.out.len() + connection.sending.len() - connection.sent <= UNSENT_MAX;
            }
            self.buffers.give_back(id);
        }
        if connection.closing {
            self.release(number);
        } else if !keep {
            self.close(number);
        } else {
            if !connection.receive_is_armed && !connection.ended {
                self.receive(number)?;
            }
            self.send(number)?;
        }
        Ok(())
    }

    /// Sends what there is to send, unless a send is under way.
    #[inline]
    fn send(&mut self, number: usize) -> io::Result<()> {
        let connection = &mut self.connections[number];
        if connection.send_is_under_way || connection.session.out.is_empty() {
            return Ok(());
        }
        connection.sending.clear();
        std::mem::swap(&mut connection.sending, &mut connection.session.out);
        connection.sent = 0;
        self.send_rest(number)
    }

    #[inline]
    fn send_rest(&mut self, number: usize) -> io::Result<()> {
        let connection = &mut self.connections[number];
        let Some(socket) = &connection.socket else {
            return Ok(());
        };
        connection.send_is_under_way = true;
        let rest = &connection.sending[connection.sent..];
        let entry = opcode::Send::new(Fd(socket.as_raw_fd()), rest.as_ptr(), rest.len() as u32)
            .flags(libc::MSG_NOSIGNAL)
            .build();
        self.push(entry.user_data((number as u64) << TAG_BITS | SEND))
    }

    #[inline]
    fn sent(&mut self, number: usize, result: i32) -> io::Result<()> {
        let connection = &mut self.connections[number];
        connection.send_is_under_way = false;
        if connection.closing {
            self.release(number);
            return Ok(());
        }
        if result <= 0 {
            self.close(number);
            return Ok(());
        }
        connection.sent += result as usize;
        if connection.sent < connection.sending.len() {
            return self.send_rest(number);
        }
        if connection.ended && connection.session.out.is_empty() {
            self.close(number);
            return Ok(());
        }
        self.send(number)
    }

    /// Ends what is under way on a connection, and then it.
    fn close(&mut self, number: usize) {
        let connection = &mut self.connections[number];
        if let Some(socket) = &connection.socket {
            connection.closing = true;
            // Fails if the other side was quicker.
            let _ = socket.shutdown(Shutdown::Both);
            self.release(number);
        }
    }

    fn release(&mut self, number: usize) {
        let connection = &mut self.connections[number];
        if connection.closing && !connection.receive_is_armed && !connection.send_is_under_way {
            *connection = Connection::default();
            self.free.push(number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Requests give the same replies wherever they are cut.
    #[test]
    fn requests_may_be_cut_anywhere() {
        let input =
            b"get a\r\nset b 0 0 5\r\n1\r\n45\r\nget c dd\r\nset e 0 0 0\r\n\r\ndelete a\r\nset f 0 0 x\r\nget g\n";
        let expected = b"VALUE a 0 3\r\nvvv\r\nEND\r\nSTORED\r\nVALUE c 0 3\r\nvvv\r\nVALUE dd 0 3\r\nvvv\r\nEND\r\n\
            STORED\r\nERROR\r\nERROR\r\nVALUE g 0 3\r\nvvv\r\nEND\r\n";
        let answers = Answers::new(3);
        for first in 0..input.len() {
            for second in first..input.len() {
                let mut session = Session::default();
                for part in [&input[..first], &input[first..second], &input[second..]] {
                    assert!(session.received(part, &answers));
                }
                assert_eq!(session.out, expected, "cut at {first} and {second}");
            }
        }
    }

    #[test]
    fn too_much_is_refused() {
        let answers = Answers::new(VALUE_MAX);
        let mut session = Session::default();
        assert!(!session.received(&[b'g'; LINE_MAX + 1], &answers));
        let mut session = Session::default();
        let many = [b"get".to_vec(), b" k".repeat(1000), b"\r\n".to_vec()].concat();
        assert!(!session.received(&many, &answers));
        assert!(session.out.len() < UNSENT_MAX + 2 * VALUE_MAX);
        for words in [
            "",
            "a 0 0",
            "a 0 0 ",
            "a 0 0 5 noreply",
            "a 0 0 -1",
            "a 0 0 12345678901",
        ] {
            assert_eq!(value_len(words.as_bytes()), None, "{words}");
        }
    }
}
