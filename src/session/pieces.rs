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

    /// Makes it a new one. The class and the key that it had are there until its first request is begun.
    #[inline]
    fn begin(&mut self, arrived_ns: u64) {
        self.arrived_ns = arrived_ns;
        self.execute_ns = 0;
        self.handled_ns = arrived_ns;
        self.worked_for = false;
        self.answered_ns = 0;
        self.requests = 0;
        self.state = State::Open;
    }

    /// All replies before the number `first` have left; false when that says nothing of it, nor of later ones.
    #[inline]
    fn left(&mut self, first: u32, end: u64, now_ns: u64) -> bool {
        match self.state {
            State::Answered(_) => true,
            State::Begun(next) if first.wrapping_sub(next) as i32 >= 0 => {
                self.answered_ns = now_ns;
                self.state = State::Answered(end);
                true
            }
            _ => false,
        }
    }

    #[inline]
    fn worked(&mut self, passed_ns: u64, now_ns: u64) {
        if std::mem::take(&mut self.worked_for) {
            self.execute_ns += passed_ns;
            self.handled_ns = now_ns.max(self.handled_ns);
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
///
/// Every request of every connection comes by here: what is usual, one piece that is over within two turns, must cost next to
/// nothing.
#[derive(Debug)]
pub(crate) struct Pieces {
    /// There is one at least.
    any: bool,
    first: Piece,
    /// Seldom are there more, and memory for them.
    behind: VecDeque<Piece>,
}

impl Default for Pieces {
    fn default() -> Self {
        Self {
            any: false,
            first: Piece::new(0),
            behind: VecDeque::new(),
        }
    }
}

impl Pieces {
    /// None is under way.
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        !self.any
    }

    #[inline]
    fn last(&mut self) -> Option<&mut Piece> {
        if self.behind.is_empty() {
            self.any.then_some(&mut self.first)
        } else {
            self.behind.back_mut()
        }
    }

    /// The last one, when some of its requests may not be begun.
    #[inline]
    fn open(&mut self) -> Option<&mut Piece> {
        self.last().filter(|piece| piece.state == State::Open)
    }

    /// Work for what may not be begun begins. False when there is nothing, or it has begun already.
    #[inline]
    pub(crate) fn work(&mut self) -> bool {
        let open = self.open();
        open.is_some_and(|piece| !std::mem::replace(&mut piece.worked_for, true))
    }

    /// Bytes came. `waits`: they wait behind others that do.
    #[inline]
    pub(crate) fn arrived(&mut self, now_ns: u64, waits: bool) {
        if self.any {
            self.arrived_behind(now_ns, waits);
        } else {
            self.any = true;
            self.first.begin(now_ns);
        }
    }

    #[cold]
    fn arrived_behind(&mut self, now_ns: u64, waits: bool) {
        let is_full = self.behind.len() + 1 >= PIECES_MAX;
        match self.last() {
            // A request counts from the arrival of its last byte.
            Some(last) if last.state == State::Open => {
                if last.requests == 0 && !waits {
                    *last = Piece::new(now_ns);
                }
            }
            // What comes at one moment, as calls that are answered at once do, is one piece.
            Some(last) if is_full || last.arrived_ns == now_ns => last.state = State::Open,
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
        // When there is none, nobody asks it.
        self.first.worked(passed_ns, now_ns);
        if !self.behind.is_empty() {
            self.behind.iter_mut().for_each(|piece| piece.worked(passed_ns, now_ns));
        }
    }

    /// All requests that have come are begun. `next`: the number of the reply behind theirs.
    #[inline]
    pub(crate) fn all_begun(&mut self, next: u32) {
        let Some(piece) = self.open() else { return };
        if piece.requests > 0 {
            piece.state = State::Begun(next);
        } else if self.behind.pop_back().is_none() {
            self.any = false;
        }
    }

    /// All replies before the number `first` have left, into the output, which ends at the byte `end` now.
    #[inline]
    pub(crate) fn left(&mut self, first: u32, end: u64, now_ns: u64) {
        if self.first.left(first, end, now_ns) && !self.behind.is_empty() {
            let _ = self.behind.iter_mut().all(|piece| piece.left(first, end, now_ns));
        }
    }

    /// The oldest one, if the client has all of it, and the time that it took is known: the output has been taken up to the
    /// byte `taken`.
    #[inline]
    pub(crate) fn oldest_over(&self, taken: u64) -> Option<&Piece> {
        match self.first.state {
            State::Answered(end) if self.any && taken >= end && !self.first.worked_for => Some(&self.first),
            _ => None,
        }
    }

    /// Forgets the oldest one.
    #[inline]
    pub(crate) fn drop_oldest(&mut self) {
        if self.behind.is_empty() {
            self.any = false;
        } else if let Some(next) = self.behind.pop_front() {
            self.first = next;
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

    fn next_over(pieces: &mut Pieces, taken: u64) -> Option<Piece> {
        let over = pieces.oldest_over(taken)?.clone();
        pieces.drop_oldest();
        Some(over)
    }

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
        assert!(next_over(&mut pieces, 1000).is_none());
        pieces.left(5, 50, 400);
        assert!(next_over(&mut pieces, 49).is_none());
        let over = next_over(&mut pieces, 50).unwrap();
        assert_eq!((over.requests, over.class, over.key()), (5, Class::Get, &b"first"[..]));
        let times = Times {
            queue_ns: 10,
            execute_ns: 20,
            hop_ns: 270,
            flush_ns: 100,
        };
        assert_eq!(over.times(500), times);
        assert!(next_over(&mut pieces, 50).is_none());
        pieces.left(7, 70, 600);
        let over = next_over(&mut pieces, 70).unwrap();
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
        let over: Vec<u32> = std::iter::from_fn(|| next_over(&mut pieces, 100))
            .map(|piece| piece.requests)
            .collect();
        assert_eq!(over.len(), PIECES_MAX);
        assert_eq!(over.iter().sum::<u32>(), 100);
        assert!(pieces.is_empty());
    }
}
