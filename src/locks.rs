//! Who may touch a key while transactions are under way on one core, and who waits for whom.
//!
//! Requests come in two kinds. A *transaction* takes part on several cores: once granted here it keeps its locks until its
//! coordinator decides. Everything else is *instant*: once granted it is executed and gone. Each request enters the queues
//! of all its keys at once, and a queue grants its front: one exclusive request, or shared ones up to the first exclusive one.
//! So requests of one core wait in the order in which they came.
//!
//! Two transactions that met in different orders on two cores would wait for each other for ever. So a transaction is
//! refused where it would wait, directly or through others, for an older one: whoever waits, waits for younger ones, and
//! a circle would have to lead back to somebody older than himself. A refused transaction gives back what it has and tries
//! again under its old id, which makes it the oldest one day, so nobody starves. Instant requests hold nothing while they
//! wait, so they wait for anybody; what stands behind them inherits whom they wait for.

use ahash::AHashMap;
use smallvec::SmallVec;
use std::collections::VecDeque;
use std::collections::hash_map::Entry as Place;

/// Orders transactions by age: when it began, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct TxnId {
    /// Unique on its core, and near to the other cores' time.
    pub(crate) clock: u64,
    /// The coordinator's core.
    pub(crate) core: u16,
}

const YOUNGEST: TxnId = TxnId {
    clock: u64::MAX,
    core: u16::MAX,
};

/// What is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Target {
    /// Everything there is on this core. Whoever wants a key wants a share of this, too.
    Store,
    /// The keys with this hash.
    Key(u64),
}

/// Whether others may have it at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Mode {
    /// With others that only read.
    Shared,
    /// Alone.
    Exclusive,
}

/// What came of entering.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Entered {
    /// It has its locks: the number is to be given back to [`Locks::leave`].
    Granted(u32),
    /// [`Locks::next_granted`] will tell of it.
    Waiting(u32),
    /// It would wait for an older transaction.
    Refused,
}

#[derive(Debug)]
struct Entry {
    ticket: u32,
    mode: Mode,
    granted: bool,
}

#[derive(Debug, Default)]
struct Queue {
    /// Nearly always one.
    entries: SmallVec<[Entry; 2]>,
    /// How many of them are exclusive.
    exclusive: u32,
}

#[derive(Debug)]
struct Ticket {
    id: TxnId,
    /// The oldest transaction that this request waited for, directly or through others, when it came.
    oldest_ahead: TxnId,
    /// Queues that have not granted it.
    waiting: u32,
    wants: Vec<(Target, Mode)>,
}

/// The lock table of one core.
#[derive(Debug, Default)]
pub(crate) struct Locks {
    queues: AHashMap<Target, Queue>,
    tickets: Vec<Option<Ticket>>,
    free: Vec<u32>,
    granted: VecDeque<u32>,
}

impl Locks {
    /// Nobody holds or wants anything: the branch that single-key commands pay.
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.queues.is_empty()
    }

    /// True when an instant request for one key must wait. What came earlier goes first, so it waits also for those that wait.
    pub(crate) fn blocks(&self, target: Target, mode: Mode) -> bool {
        let blocked = |target, mode| match (self.queues.get(&target), mode) {
            (None, _) => false,
            (Some(queue), Mode::Shared) => queue.exclusive > 0,
            (Some(queue), Mode::Exclusive) => !queue.entries.is_empty(),
        };
        blocked(target, mode) || target != Target::Store && blocked(Target::Store, Mode::Shared)
    }

    /// Enters a request: a transaction, or an instant one without an id. `wants` may name a target more than once.
    pub(crate) fn enter(&mut self, id: Option<TxnId>, mut wants: Vec<(Target, Mode)>) -> Entered {
        if !wants.contains(&(Target::Store, Mode::Exclusive)) {
            wants.push((Target::Store, Mode::Shared));
        }
        // The strongest mode of each target comes first and stays.
        wants.sort_unstable_by(|a, b| (a.0, b.1).cmp(&(b.0, a.1)));
        wants.dedup_by_key(|(target, _)| *target);

        let (mut waiting, mut oldest_ahead) = (0, YOUNGEST);
        for (target, mode) in &wants {
            let Some(queue) = self.queues.get(target) else { continue };
            if *mode == Mode::Shared && queue.exclusive == 0 {
                continue;
            }
            let ahead = queue
                .entries
                .iter()
                .filter(|entry| *mode == Mode::Exclusive || entry.mode == Mode::Exclusive);
            let mut any = false;
            for entry in ahead {
                any = true;
                if let Some(ticket) = &self.tickets[entry.ticket as usize] {
                    oldest_ahead = oldest_ahead.min(ticket.id).min(ticket.oldest_ahead);
                }
            }
            waiting += u32::from(any);
        }
        if id.is_some_and(|id| oldest_ahead < id) {
            return Entered::Refused;
        }
        let ticket = self.free.pop().unwrap_or_else(|| {
            self.tickets.push(None);
            (self.tickets.len() - 1) as u32
        });
        for (target, mode) in &wants {
            let queue = self.queues.entry(*target).or_default();
            let granted = match mode {
                Mode::Shared => queue.exclusive == 0,
                Mode::Exclusive => queue.entries.is_empty(),
            };
            queue.exclusive += u32::from(*mode == Mode::Exclusive);
            queue.entries.push(Entry {
                ticket,
                mode: *mode,
                granted,
            });
        }
        self.tickets[ticket as usize] = Some(Ticket {
            id: id.unwrap_or(YOUNGEST),
            oldest_ahead,
            waiting,
            wants,
        });
        if waiting == 0 {
            Entered::Granted(ticket)
        } else {
            Entered::Waiting(ticket)
        }
    }

    /// A request gives back what it has and wants nothing more. Others may be granted by that.
    pub(crate) fn leave(&mut self, ticket: u32) {
        let Some(left) = self.tickets[ticket as usize].take() else {
            return;
        };
        self.free.push(ticket);
        self.granted.retain(|granted| *granted != ticket);
        for (target, mode) in left.wants {
            let Place::Occupied(mut place) = self.queues.entry(target) else {
                continue;
            };
            let queue = place.get_mut();
            if queue.entries.len() == 1 {
                place.remove();
                continue;
            }
            queue.entries.retain(|entry| entry.ticket != ticket);
            queue.exclusive -= u32::from(mode == Mode::Exclusive);
            for at in 0..queue.entries.len() {
                let entry = &mut queue.entries[at];
                if entry.mode == Mode::Exclusive && at > 0 {
                    break;
                }
                if !entry.granted {
                    entry.granted = true;
                    if let Some(waiter) = &mut self.tickets[entry.ticket as usize] {
                        waiter.waiting -= 1;
                        if waiter.waiting == 0 {
                            self.granted.push_back(entry.ticket);
                        }
                    }
                }
                if entry.mode == Mode::Exclusive {
                    break;
                }
            }
        }
    }

    /// A request that waited and now has its locks; the one that has them longest first.
    pub(crate) fn next_granted(&mut self) -> Option<u32> {
        self.granted.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn id(clock: u64) -> Option<TxnId> {
        Some(TxnId { clock, core: 0 })
    }
    const A: Target = Target::Key(1);
    const B: Target = Target::Key(2);
    const R: Mode = Mode::Shared;
    const W: Mode = Mode::Exclusive;

    fn granted(entered: Entered) -> u32 {
        match entered {
            Entered::Granted(ticket) => ticket,
            other => panic!("{other:?}"),
        }
    }

    fn waiting(entered: Entered) -> u32 {
        match entered {
            Entered::Waiting(ticket) => ticket,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn readers_share_and_writers_wait_in_turn() {
        let mut locks = Locks::default();
        assert!(!locks.blocks(A, W));
        let first = granted(locks.enter(id(9), vec![(A, R)]));
        let second = granted(locks.enter(id(8), vec![(A, R), (B, R)]));
        assert!(locks.blocks(A, W) && !locks.blocks(A, R));
        let writer = waiting(locks.enter(None, vec![(A, W)]));
        // Who comes later does not overtake the writer.
        assert!(locks.blocks(A, R));
        let reader = waiting(locks.enter(None, vec![(A, R)]));
        locks.leave(first);
        assert_eq!(locks.next_granted(), None);
        locks.leave(second);
        assert_eq!(locks.next_granted(), Some(writer));
        assert_eq!(locks.next_granted(), None);
        locks.leave(writer);
        assert_eq!(locks.next_granted(), Some(reader));
        locks.leave(reader);
        assert!(locks.is_empty());
    }

    #[test]
    fn only_older_transactions_wait() {
        let mut locks = Locks::default();
        let holder = granted(locks.enter(id(5), vec![(A, W)]));
        assert_eq!(locks.enter(id(6), vec![(A, R), (B, W)]), Entered::Refused);
        assert!(!locks.blocks(B, W), "a refused one leaves nothing behind");
        let older = waiting(locks.enter(id(4), vec![(A, W)]));
        // An instant request waits for anybody, and hands on whom it waits for.
        let instant = waiting(locks.enter(None, vec![(A, W), (B, W)]));
        assert_eq!(locks.enter(id(7), vec![(B, R)]), Entered::Refused);
        let oldest = waiting(locks.enter(id(3), vec![(B, R)]));
        locks.leave(holder);
        assert_eq!(locks.next_granted(), Some(older));
        locks.leave(older);
        assert_eq!(locks.next_granted(), Some(instant));
        locks.leave(instant);
        assert_eq!(locks.next_granted(), Some(oldest));
        locks.leave(oldest);
        assert!(locks.is_empty());
    }

    #[test]
    fn the_whole_store() {
        let mut locks = Locks::default();
        let one = granted(locks.enter(id(5), vec![(A, W), (A, R)]));
        let all = waiting(locks.enter(id(4), vec![(Target::Store, W)]));
        assert!(locks.blocks(B, R));
        let later = waiting(locks.enter(None, vec![(B, R)]));
        locks.leave(one);
        assert_eq!(locks.next_granted(), Some(all));
        assert_eq!(locks.next_granted(), None);
        locks.leave(all);
        assert_eq!(locks.next_granted(), Some(later));
        locks.leave(later);
        assert!(locks.is_empty());
    }

    /// A waiting request may give up.
    #[test]
    fn leaving_the_queue() {
        let mut locks = Locks::default();
        let holder = granted(locks.enter(id(5), vec![(A, R)]));
        let writer = waiting(locks.enter(id(4), vec![(A, W)]));
        let reader = waiting(locks.enter(None, vec![(A, R)]));
        locks.leave(writer);
        assert_eq!(locks.next_granted(), Some(reader));
        locks.leave(holder);
        locks.leave(reader);
        assert!(locks.is_empty() && locks.next_granted().is_none());
    }
}
