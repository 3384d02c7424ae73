//! The seam for handlers of the runtime that wait: HTTP and gRPC.
//!
//! Such a handler has the bytes of its connection through [`Engine::read`] and [`Engine::write`], and asks for what its requests
//! need by calls. A call is a session without a socket: its request goes in as a client's does, waits for credit and for
//! locks as a client's does, and its answer is fetched when [`Wants::notice`](super::Wants) says that it is there, often at once.

use super::Engine;
use crate::encoding::Rope;
use crate::model::LARGE_VALUE_BYTES;
use crate::protocol::Protocol;
use crate::session::{Blocked, End, Session};

/// What reading from a connection came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Read {
    /// There were bytes.
    Taken,
    /// Nothing has come. A notice will tell when something has.
    Nothing,
    /// The client sends no more.
    End,
    /// The connection broke.
    Failed,
}

/// What writing to a connection came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// So many bytes were taken, at least one unless there were none.
    Taken(usize),
    /// The client has not taken what was written before. A notice will tell when it has.
    Full,
    /// The connection broke.
    Failed,
}

/// Bytes that a handler may have waiting to be sent, however short memory is: less is not worth a send.
const OUTPUT_BYTES_MIN: usize = 16 * 1024;

impl Engine {
    /// Bytes came on a connection that a handler reads.
    #[cold]
    #[inline(never)]
    pub(super) fn received_for_handler(&mut self, id: u32, mut session: Box<Session>, bytes: &[u8]) {
        if session.input.capacity() == 0 {
            session.input = self.buffers.pop().unwrap_or_default();
        }
        self.keep_input(&mut session, bytes);
        session.tell();
        self.put_back(id, session);
    }

    /// Reads up to `most` bytes of what came on a handled connection; `take` sees them.
    pub fn read(&mut self, id: u32, most: usize, take: impl FnOnce(&[u8])) -> Read {
        let Some(mut session) = self.sessions.take(id) else {
            return Read::Failed;
        };
        let length = session.input.len().min(most);
        let read = match length {
            _ if session.gone => Read::Failed,
            0 if session.ended || session.closing => Read::End,
            0 => Read::Nothing,
            _ => {
                take(&session.input[..length]);
                if length == session.input.len() {
                    let buffer = std::mem::take(&mut session.input);
                    self.keep_buffer(buffer);
                } else {
                    session.input.drain(..length);
                }
                Read::Taken
            }
        };
        if session.paused {
            self.put_back(id, session);
        } else {
            self.sessions.restore(id, session);
        }
        read
    }

    /// Writes pieces to a handled connection, one behind the other.
    pub fn write<'a>(&mut self, id: u32, pieces: impl Iterator<Item = &'a [u8]>) -> Written {
        let Some(mut session) = self.sessions.take(id) else {
            return Written::Failed;
        };
        if session.gone || session.closing {
            self.sessions.restore(id, session);
            return Written::Failed;
        }
        let most = self.own_limits.output_bytes.max(OUTPUT_BYTES_MIN);
        let room = most.saturating_sub(session.output_bytes());
        let (mut taken, mut is_full) = (0, false);
        for piece in pieces.filter(|piece| !piece.is_empty()) {
            if taken == room {
                is_full = taken == 0;
                break;
            }
            if taken == 0 {
                self.ready_output(&mut session);
            }
            let bytes = piece.len().min(room - taken);
            session.output.filling.push(&piece[..bytes]);
            taken += bytes;
        }
        if is_full {
            session.wants_room = true;
            self.sessions.restore(id, session);
            return Written::Full;
        }
        self.put_back(id, session);
        Written::Taken(taken)
    }

    /// Nothing more will be written to a handled connection, which stays open: its client is told so when what was written is
    /// sent.
    pub fn shut(&mut self, id: u32) {
        if let Some(mut session) = self.sessions.take(id) {
            session.shuts = true;
            self.put_back(id, session);
        }
    }

    /// Closes a handled connection when what was written is sent.
    pub fn finish(&mut self, id: u32) {
        if let Some(mut session) = self.sessions.take(id) {
            session.closing = true;
            self.put_back(id, session);
        }
    }

    /// Makes room for a call of a protocol's handlers. `idle` is the number of an earlier one that [`Engine::close_call`] kept.
    pub fn open_call(&mut self, protocol: Protocol, idle: Option<u32>) -> u32 {
        if let Some(id) = idle
            && let Some(session) = self.sessions.get_mut(id)
        {
            session.protocol = protocol;
            return id;
        }
        let mut session = Session::new(protocol, String::new(), self.now.0);
        session.end = End::Caller;
        self.sessions.add(session)
    }

    /// Passes a request on that [`crate::protocol::call`] wrote, or a piece of an announced value.
    pub fn call(&mut self, id: u32, request: &[u8]) {
        let Some(mut session) = self.sessions.take(id) else {
            return;
        };
        if session.blocked == Blocked::No {
            session.arrived_ns = self.now_ns;
        }
        self.take_in(id, session, request);
    }

    /// The answer to the call, if it has come.
    pub fn take_answer(&mut self, id: u32) -> Option<Rope> {
        let session = self.sessions.get_mut(id)?;
        if !session.is_answered() {
            return None;
        }
        let answer = session.output.take_filling();
        self.slow.follow(session, self.now.0);
        Some(answer)
    }

    /// Takes a buffer back in which an answer came.
    pub fn recycle_answer(&mut self, flat: Vec<u8>) {
        self.keep_buffer(flat);
    }

    /// Nobody waits for the call's answer any more. True: it is kept for another call; false: it is gone, and what was under way
    /// is dropped when it comes.
    pub fn close_call(&mut self, id: u32, keep: bool) -> bool {
        let Some(mut session) = self.sessions.take(id) else {
            return false;
        };
        let is_at_rest = keep
            && session.in_flight() == 0
            && session.blocked == Blocked::No
            && session.incoming.is_none()
            && session.input.is_empty()
            && session.output.filling.len() <= LARGE_VALUE_BYTES;
        if is_at_rest {
            let mut unread = session.output.take_filling();
            unread.clear(LARGE_VALUE_BYTES);
            session.output.filling = unread;
            self.slow.follow(&mut session, self.now.0);
            session.swallow = 0;
            session.closing = false;
            self.sessions.restore(id, session);
            return true;
        }
        self.end_session(id, session);
        false
    }
}
