//! When items come up for expiry: a hierarchical timing wheel, so that time finds what is over without walking the table.
//!
//! A level has 64 queues, each for a stretch of time: a second on the lowest level, 64 times as much on each next one. An
//! entry waits on the lowest level that reaches to its second; when its stretch begins it comes up, and whoever takes it puts it
//! where it belongs now: on a lower level, or nowhere, if the item is gone.
//!
//! An item with a deadline has an entry that comes up no later than the deadline; it may have several, left by what it
//! was before. So a deadline that moves further away costs nothing, and one that was given up is found out in time. Where
//! items are deleted and written anew faster than that, [`Expiry::has_too_many`] says so, and [`Expiry::take_some`] has all
//! entries looked at, a piece at a time.

use super::queue::{PIECE_BYTES, Queue};
use crate::model::UnixMillis;

const LEVEL_BITS: u32 = 6;
const QUEUES: usize = 1 << LEVEL_BITS;
/// Enough for 34 years; what is later comes up then, and waits again.
const LEVELS: usize = 5;
/// So many entries more than there may be items with a deadline do no harm.
const SUPERFLUOUS_MAX: usize = 4096;
/// Queues without any entry that are passed over at a time.
const EMPTY_QUEUES_MAX: usize = 4096;

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct Expiry {
    /// By level and second; empty until an item has a deadline.
    queues: Vec<Queue>,
    /// The second that is being looked at; all before it are done.
    second: u64,
    entries: usize,
    by_level: [usize; LEVELS],
    pieces: usize,
    /// Where [`Expiry::take_some`] is: a queue, and how many of its entries it has not seen.
    at: usize,
    unseen: usize,
}

impl Expiry {
    /// Bytes of memory of the entries.
    pub(super) fn bytes(&self) -> usize {
        self.pieces * PIECE_BYTES
    }

    fn queue_of(second: u64, level: usize) -> usize {
        level * QUEUES + (second >> (LEVEL_BITS as usize * level)) as usize % QUEUES
    }

    /// Has an item come up when its deadline is over. False when the system has no memory for that: it is found out when
    /// somebody asks for the item.
    pub(super) fn add(&mut self, hash: u64, deadline: UnixMillis, now: UnixMillis) -> bool {
        if self.queues.is_empty() {
            if self.queues.try_reserve_exact(LEVELS * QUEUES).is_err() {
                return false;
            }
            self.queues.resize_with(LEVELS * QUEUES, Queue::default);
            self.second = now.0 / 1000;
        }
        let top = LEVEL_BITS as usize * (LEVELS - 1);
        let latest = ((self.second >> top) + QUEUES as u64 - 1) << top;
        let second = (deadline.0 / 1000).clamp(self.second, latest);
        let level = (0..LEVELS)
            .find(|level| {
                let shift = LEVEL_BITS as usize * level;
                (second >> shift) - (self.second >> shift) < QUEUES as u64
            })
            .unwrap_or(LEVELS - 1);
        let queue = &mut self.queues[Self::queue_of(second, level)];
        let pieces = queue.pieces();
        let added = queue.push(hash);
        self.pieces += queue.pieces() - pieces;
        self.entries += usize::from(added);
        self.by_level[level] += usize::from(added);
        added
    }

    fn pop(&mut self, number: usize) -> Option<u64> {
        let queue = &mut self.queues[number];
        let pieces = queue.pieces();
        let hash = queue.pop()?;
        self.by_level[number / QUEUES] -= 1;
        self.pieces -= pieces - queue.pieces();
        self.entries -= 1;
        Some(hash)
    }

    /// The next entry that comes up by `now`. `None`: there is none, or [`Expiry::is_due`] says that it has not looked far
    /// enough.
    pub(super) fn next_due(&mut self, now: UnixMillis) -> Option<u64> {
        if self.entries == 0 {
            self.second = self.second.max(now.0 / 1000);
            return None;
        }
        for _ in 0..EMPTY_QUEUES_MAX {
            // What waited for a longer stretch that begins with this second.
            let begins = self.second.trailing_zeros() / LEVEL_BITS;
            for level in (1..=(begins as usize).min(LEVELS - 1)).rev() {
                if let Some(hash) = self.pop(Self::queue_of(self.second, level)) {
                    return Some(hash);
                }
            }
            if !self.is_due(now) {
                return None;
            }
            if let Some(hash) = self.pop(Self::queue_of(self.second, 0)) {
                return Some(hash);
            }
            // Where whole levels are empty, nothing comes up before the next stretch of the first one that is not.
            let empty = self
                .by_level
                .iter()
                .take(LEVELS - 1)
                .take_while(|entries| **entries == 0);
            let stretch = 1 << (LEVEL_BITS as usize * empty.count());
            self.second = ((self.second / stretch + 1) * stretch).min(now.0 / 1000);
        }
        None
    }

    /// A second is over that was not looked at.
    pub(super) fn is_due(&self, now: UnixMillis) -> bool {
        self.entries > 0 && (self.second + 1) * 1000 <= now.0
    }

    /// Most entries lead to nothing.
    pub(super) fn has_too_many(&self, with_deadline: usize) -> bool {
        self.entries > 2 * with_deadline + SUPERFLUOUS_MAX
    }

    /// Takes up to `count` entries from wherever it is on its way through all, and adds them to `hashes`, each hash once.
    pub(super) fn take_some(&mut self, count: usize, hashes: &mut Vec<u64>) {
        for _ in 0..count {
            for _ in 0..self.queues.len() {
                if self.unseen > 0 && !self.queues[self.at].is_empty() {
                    break;
                }
                self.at = (self.at + 1) % self.queues.len();
                self.unseen = self.queues[self.at].len();
            }
            if self.queues.is_empty() || self.unseen == 0 {
                break;
            }
            self.unseen -= 1;
            hashes.extend(self.pop(self.at));
        }
        hashes.sort_unstable();
        hashes.dedup();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: u64) -> UnixMillis {
        UnixMillis(second * 1000)
    }

    /// Each entry comes up in its second, as long as it is put back when it comes up early; none is lost.
    #[test]
    fn entries_come_up_when_they_are_due() {
        let start = 1_800_000_000u64;
        let mut expiry = Expiry::default();
        let deadlines: Vec<u64> = (0..2000u64)
            .map(|number| start + number * number * number % 1_000_003)
            .chain([
                start,
                start + 63,
                start + 64,
                start + 4095,
                start + 4096,
                start + (1 << 19),
            ])
            .collect();
        for (number, deadline) in deadlines.iter().enumerate() {
            assert!(expiry.add(number as u64, at(*deadline), at(start)));
        }
        let mut seen = vec![false; deadlines.len()];
        let mut early = 0;
        let mut now = start;
        while seen.contains(&false) {
            now += 1 + now % 50;
            while expiry.is_due(at(now)) {
                let Some(number) = expiry.next_due(at(now)) else {
                    continue;
                };
                let deadline = deadlines[number as usize];
                if deadline >= now {
                    early += 1;
                    expiry.add(number, at(deadline), at(now));
                } else {
                    assert!(!std::mem::replace(&mut seen[number as usize], true), "once");
                }
            }
            for (number, deadline) in deadlines.iter().enumerate() {
                assert_eq!(seen[number], *deadline < now, "{deadline} at {now}");
            }
        }
        assert!(early <= LEVELS * deadlines.len(), "{early}");
        assert_eq!((expiry.entries, expiry.pieces), (0, 0));
        assert_eq!(expiry.next_due(at(now)), None);
    }

    /// Far beyond the last level, an entry waits again and again.
    #[test]
    fn for_ever_is_not_lost() {
        let mut expiry = Expiry::default();
        assert!(expiry.add(7, UnixMillis(u64::MAX), at(1000)));
        assert!(expiry.add(8, at(2000), at(1000)));
        // It comes up early once, when the stretch begins that it waited for.
        assert_eq!((expiry.next_due(at(1999)), expiry.next_due(at(1999))), (Some(8), None));
        assert!(expiry.add(8, at(2000), at(1999)));
        while expiry.is_due(at(2001)) {
            match expiry.next_due(at(2001)) {
                Some(7) => assert!(expiry.add(7, UnixMillis(u64::MAX), at(2001))),
                found => assert!(found.is_none_or(|number| number == 8)),
            }
        }
        assert_eq!(expiry.entries, 1);
    }

    /// All entries are looked at in a round, and equal ones are found.
    #[test]
    fn a_round_sees_every_entry() {
        let mut expiry = Expiry::default();
        for number in 0..10_000u64 {
            assert!(expiry.add(number % 100, at(1000 + number % 7 * 1000), at(1000)));
        }
        assert!(expiry.has_too_many(100) && !expiry.has_too_many(5000));
        let mut kept = 0;
        for _ in 0..10 {
            let mut taken = vec![];
            expiry.take_some(1000, &mut taken);
            assert!(taken.len() <= 100);
            kept += taken.len();
        }
        assert_eq!(expiry.entries, 0);
        assert!(kept >= 100);
        let mut taken = vec![];
        expiry.take_some(5, &mut taken);
        assert!(taken.is_empty());
    }
}
