//! A list of hashes, first in, first out: the order in which items come up for something. An entry names no item but leads to
//! one, if it is still there: whoever takes an entry looks.

use std::collections::VecDeque;

/// Entries in one piece of memory.
const PIECE: usize = 128;
/// What a piece takes: its entries, and its place among the pieces.
pub(super) const PIECE_BYTES: usize = (PIECE + 3) * size_of::<u64>();

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct Queue {
    /// Each but the last is full, and none is empty.
    pieces: VecDeque<Vec<u64>>,
    /// How many entries of the first one are taken.
    taken: usize,
}

impl Queue {
    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        match self.pieces.back() {
            None => 0,
            Some(last) => (self.pieces.len() - 1) * PIECE + last.len() - self.taken,
        }
    }

    /// How many pieces of [`PIECE_BYTES`] it has.
    pub(super) fn pieces(&self) -> usize {
        self.pieces.len()
    }

    /// Adds an entry; false when the system has no memory for it.
    #[inline]
    pub(super) fn push(&mut self, hash: u64) -> bool {
        match self.pieces.back_mut() {
            Some(last) if last.len() < PIECE => {
                last.push(hash);
                true
            }
            _ => self.push_piece(hash),
        }
    }

    #[cold]
    fn push_piece(&mut self, hash: u64) -> bool {
        let mut piece = Vec::new();
        if piece.try_reserve_exact(PIECE).is_err() || self.pieces.try_reserve(1).is_err() {
            return false;
        }
        piece.push(hash);
        self.pieces.push_back(piece);
        true
    }

    /// Takes the oldest entry.
    #[inline]
    pub(super) fn pop(&mut self) -> Option<u64> {
        let first = self.pieces.front()?;
        let hash = first[self.taken];
        self.taken += 1;
        if self.taken == first.len() {
            self.taken = 0;
            self.pieces.pop_front();
            if self.pieces.is_empty() {
                self.pieces = VecDeque::new();
            }
        }
        Some(hash)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_in_first_out() {
        let mut queue = Queue::default();
        let (mut pushed, mut popped) = (0u64, 0);
        for round in 1..60u64 {
            for _ in 0..round * 7 % 400 {
                assert!(queue.push(pushed));
                pushed += 1;
            }
            for _ in 0..round * 11 % 390 {
                let expected = (popped < pushed).then_some(popped);
                assert_eq!(queue.pop(), expected);
                popped += u64::from(expected.is_some());
            }
            assert_eq!(queue.len() as u64, pushed - popped);
            assert_eq!(queue.is_empty(), pushed == popped);
            assert!(queue.pieces() <= queue.len() / PIECE + 2);
        }
    }
}
