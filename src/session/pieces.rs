//! What came on one connection in one piece, from its arrival to when the client's socket has taken its replies: the times of
//! the slow log.
//!
//! Requests of one piece share their times. A piece is open while some of its requests are not begun; then it is known behind
//! which reply it ends, and, when that has left, at which byte of the output.

use crate::metrics::slow_log::KEY_BYTES_SHOWN;
use crate::model::Class;
use std::collections::VecDeque;

/// Pieces of one connection that are followed at a time. What comes when so many are under way counts to the last of them.
const PIECES_MAX: usize = 16;

/// One piece.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    /// When it came, in the engine's nanoseconds.
    pub(crate) arrived_ns: u64,
    /// How long this core worked for it, and until when.
    execute_ns: u64,
    handled_ns: u64,
    /// It is being worked for, or was since the time was last told.
    worked_for: bool,
    /// When its last reply was there.
    answered_ns: u64,
    /// How many requests it has.
    pub(crate) requests: u32,
    /// What the first of them does.
    pub(crate) class: Class,
    /// The length of its key, and the start of that.
    pub(crate) key_bytes: u32,
    key: [u8; KEY_BYTES_SHOWN],
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Some of its requests may not be begun.
    Open,
    /// All are; it is answered when the replies before this number have left.
    Begun(u32),
    /// It is; the client has all when it has taken the output up to this byte.
    Answered(u64),
}

/// Where the time of a piece went, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Times {
    pub(crate) queue_ns: u64,
    pub(crate) execute_ns: u64,
    pub(crate) hop_ns: u64,
    pub(crate) flush_ns: u64,
}

impl Piece {
    fn new(arrived_ns: u64) -> Self {
        Self {
            arrived_ns,
            execute_ns: 0,
            handled_ns: arrived_ns,
            worked_for: false,
            answered_ns: 0,
            requests: 0,
            class: Class::Other,
            key_bytes: 0,
            key: [0; KEY_BYTES_SHOWN],
            state: State::Open,
        }
    }

    /// The start of the first request's key.
    pub(crate) fn key(&self) -> &[u8] {
        &self.key[..KEY_BYTES_SHOWN.min(self.key_bytes as usize)]
    }

    /// Where its time went; it was over at `now_ns`.
    pub(crate) fn times(&self, now_ns: u64) -> Times {
        let answered_ns = self.answered_ns.max(self.handled_ns);
        Times {
            queue_ns: (self.handled_ns - self.arrived_ns).saturating_sub(self.execute_ns),
            execute_ns: self.execute_ns,
            hop_ns: answered_ns - self.handled_ns,
            flush_ns: now_ns.saturating_sub(answered_ns),
        }
    }
}

/// The pieces of a connection that are under way, the oldest first.
#[derive(Debug, Default)]
pub(crate) struct Pieces {
    /// The usual case: one, and no memory for more.
    first: Option<Piece>,
    behind: VecDeque<Piece>,
}

impl Pieces {
    /// None is under way.
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.first.is_none()
    }

    #[inline]
    fn last(&mut self) -> Option<&mut Piece> {
        match self.behind.back_mut() {
            None => self.first.as_mut(),
            last => last,
        }
    }

    /// The last one, when some of its requests may not be begun.
    #[inline]
    fn open(&mut self) -> Option<&mut Piece> {
        self.last().filter(|piece| piece.state == State::Open)
    }

    /// Work for what may not be begun begins. False when there is nothing.
    #[inline]
    pub(crate) fn work(&mut self) -> bool {
        let open = self.open();
        open.is_some_and(|piece| {
            piece.worked_for = true;
            true
        })
    }

    /// Bytes came. `waits`: they wait behind others that do.
    #[inline]
    pub(crate) fn arrived(&mut self, now_ns: u64, waits: bool) {
        if self.first.is_none() {
            self.first = Some(Piece::new(now_ns));
        } else {
            self.arrived_behind(now_ns, waits);
        }
    }

    fn arrived_behind(&mut self, now_ns: u64, waits: bool) {
        let is_full = self.behind.len() + 1 >= PIECES_MAX;
        match self.last() {
            // A request counts from the arrival of its last byte.
            Some(last) if last.state == State::Open => {
                if last.requests == 0 && !waits {
                    *last = Piece::new(now_ns);
                }
            }
            Some(last) if is_full => last.state = State::Open,
            _ => self.behind.push_back(Piece::new(now_ns)),
        }
    }

    /// So many requests of the last one are begun. Those are the class and the key of the first of them.
    #[inline]
    pub(crate) fn begun(&mut self, requests: usize, class: Class, key: &[u8]) {
        let Some(piece) = self.open() else { return };
        if piece.requests == 0 {
            piece.class = class;
            piece.key_bytes = key.len() as u32;
            let shown = key.len().min(KEY_BYTES_SHOWN);
            piece.key[..shown].copy_from_slice(&key[..shown]);
        }
        piece.requests = piece.requests.saturating_add(requests as u32);
    }

    /// What was worked for was so for so long, until now.
    #[inline]
    pub(crate) fn worked(&mut self, passed_ns: u64, now_ns: u64) {
        for piece in self.first.iter_mut().chain(&mut self.behind) {
            if std::mem::take(&mut piece.worked_for) {
                piece.execute_ns += passed_ns;
                piece.handled_ns = now_ns.max(piece.handled_ns);
            }
        }
    }

    /// All requests that have come are begun. `next`: the number of the reply behind theirs.
    #[inline]
    pub(crate) fn all_begun(&mut self, next: u32) {
        let Some(piece) = self.open() else { return };
        if piece.requests > 0 {
            piece.state = State::Begun(next);
        } else if self.behind.pop_back().is_none() {
            self.first = None;
        }
    }

    /// All replies before the number `first` have left, into the output, which ends at the byte `end` now.
    #[inline]
    pub(crate) fn left(&mut self, first: u32, end: u64, now_ns: u64) {
        for piece in self.first.iter_mut().chain(&mut self.behind) {
            match piece.state {
                State::Answered(_) => {}
                State::Begun(next) if first.wrapping_sub(next) as i32 >= 0 => {
                    piece.answered_ns = now_ns;
                    piece.state = State::Answered(end);
                }
                _ => break,
            }
        }
    }

    /// The oldest one, if the client has all of it, and the time that it took is known: the output has been taken up to the
    /// byte `taken`.
    #[inline]
    pub(crate) fn next_over(&mut self, taken: u64) -> Option<Piece> {
        let first = self.first.as_ref()?;
        match first.state {
            State::Answered(end) if taken >= end && !first.worked_for => {
                let over = self.first.take();
                self.first = self.behind.pop_front();
                over
            }
            _ => None,
        }
    }

    /// Nobody waits for any of them.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Bytes of memory that they take beyond the session itself.
    pub(crate) fn heap_bytes(&self) -> usize {
        self.behind.capacity() * size_of::<Piece>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each piece has its own times, also when several are under way, and one that is half a request has none.
    #[test]
    fn pieces_end_in_their_order() {
        let mut pieces = Pieces::default();
        pieces.arrived(100, false);
        assert!(pieces.work());
        pieces.begun(3, Class::Get, b"first");
        pieces.begun(2, Class::Set, b"later");
        pieces.all_begun(5);
        pieces.worked(20, 130);
        // Half a request, and then the rest of it with another.
        pieces.arrived(200, false);
        pieces.all_begun(5);
        pieces.arrived(300, false);
        assert!(pieces.work());
        pieces.begun(2, Class::Delete, &[b'k'; 100]);
        pieces.all_begun(7);
        pieces.worked(5, 305);
        pieces.left(4, 10, 320);
        assert!(pieces.next_over(1000).is_none());
        pieces.left(5, 50, 400);
        assert!(pieces.next_over(49).is_none());
        let over = pieces.next_over(50).unwrap();
        assert_eq!((over.requests, over.class, over.key()), (5, Class::Get, &b"first"[..]));
        let times = Times {
            queue_ns: 10,
            execute_ns: 20,
            hop_ns: 270,
            flush_ns: 100,
        };
        assert_eq!(over.times(500), times);
        assert!(pieces.next_over(50).is_none());
        pieces.left(7, 70, 600);
        let over = pieces.next_over(70).unwrap();
        assert_eq!((over.arrived_ns, over.requests, over.class), (300, 2, Class::Delete));
        assert_eq!((over.key(), over.key_bytes), (&[b'k'; KEY_BYTES_SHOWN][..], 100));
        assert!(pieces.is_empty());
    }

    /// However much a client sends ahead, so many pieces are followed and no more; what is not joins the last.
    #[test]
    fn pieces_are_bounded() {
        let mut pieces = Pieces::default();
        for at in 1..=100 {
            pieces.arrived(at, false);
            pieces.begun(1, Class::Get, b"k");
            pieces.all_begun(at as u32);
        }
        assert_eq!(pieces.behind.len() + 1, PIECES_MAX);
        pieces.left(100, 100, 200);
        let over: Vec<u32> = std::iter::from_fn(|| pieces.next_over(100))
            .map(|piece| piece.requests)
            .collect();
        assert_eq!(over.len(), PIECES_MAX);
        assert_eq!(over.iter().sum::<u32>(), 100);
        assert!(pieces.is_empty());
    }
}
