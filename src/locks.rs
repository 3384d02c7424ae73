//! Who may touch a key while transactions are under way on one core, and who waits for whom.
//!
//! Requests come in two kinds. A *transaction* takes part on several cores: once granted here it keeps its locks until its
//! coordinator decides. Everything else is *instant*: once granted it is executed and gone. Each request has an age, and
//! enters the queues of all its keys at once: behind those that are granted and behind those that are older. A queue grants
//! its front: one exclusive request, or shared ones up to the first exclusive one. An instant request is as old as its
//! arrival, so requests of one core that nothing disturbs are served in the order in which they came.
//!
//! Whoever waits, waits for older ones, so nobody waits in a circle, however many cores are concerned: with one exception.
//! Who comes late may find that a younger one is granted what he wants. If that one waits for other locks of this core, it
//! gives back the one that it cannot use yet. If it is a transaction that has all it wants here, it may wait on another core
//! for him: it is *wounded*. Its coordinator hears of it and, unless it has decided already, has it give back what it has and
//! enter its queues anew, where it stands behind him now. It keeps its age, so it is the oldest one day, and nobody starves.

use ahash::AHashMap;
use smallvec::SmallVec;
use std::collections::VecDeque;
use std::collections::hash_map::Entry as Place;

/// Orders requests by age: when they began, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct TxnId {
    /// Unique on its core, and near to the other cores' time.
    pub(crate) clock: u64,
    /// The coordinator's core.
    pub(crate) core: u16,
}

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

/// Who enters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    /// A transaction, which keeps what it is granted.
    Transaction(TxnId),
    /// A request that is executed as soon as it is granted.
    Instant(TxnId),
}

impl Who {
    fn age(self) -> TxnId {
        match self {
            Who::Transaction(age) | Who::Instant(age) => age,
        }
    }
}

/// What came of entering. The number is to be given back to [`Locks::leave`].
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Entered {
    /// It has its locks.
    Granted(u32),
    /// [`Locks::next_granted`] will tell of it.
    Waiting(u32),
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    ticket: u32,
    mode: Mode,
    granted: bool,
}

impl Entry {
    fn excludes(&self, mode: Mode) -> bool {
        self.mode == Mode::Exclusive || mode == Mode::Exclusive
    }
}

#[derive(Debug, Default)]
struct Queue {
    /// Those that are granted, then those that wait, the oldest first. Nearly always one.
    entries: SmallVec<[Entry; 2]>,
    /// How many of them are exclusive.
    exclusive: u32,
}

impl Queue {
    /// Where a request of this age belongs: behind those that are granted and those that are older.
    fn place(&self, tickets: &[Option<Ticket>], age: TxnId) -> usize {
        let is_younger = |entry: &Entry| {
            let ticket = tickets[entry.ticket as usize].as_ref();
            ticket.is_some_and(|ticket| ticket.who.age() > age)
        };
        let younger = self
            .entries
            .iter()
            .position(|entry| !entry.granted && is_younger(entry));
        younger.unwrap_or(self.entries.len())
    }
}

#[derive(Debug)]
struct Ticket {
    who: Who,
    /// Queues that have not granted it.
    waiting: u32,
    /// An older request waits for it.
    wounded: bool,
    wants: Vec<(Target, Mode)>,
}

/// The lock table of one core.
#[derive(Debug, Default)]
pub(crate) struct Locks {
    queues: AHashMap<Target, Queue>,
    tickets: Vec<Option<Ticket>>,
    free: Vec<u32>,
    granted: VecDeque<u32>,
    wounded: Vec<TxnId>,
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

    /// Enters a request. `wants` may name a target more than once.
    pub(crate) fn enter(&mut self, who: Who, mut wants: Vec<(Target, Mode)>) -> Entered {
        if !wants.contains(&(Target::Store, Mode::Exclusive)) {
            wants.push((Target::Store, Mode::Shared));
        }
        // The strongest mode of each target comes first and stays.
        wants.sort_unstable_by(|a, b| (a.0, b.1).cmp(&(b.0, a.1)));
        wants.dedup_by_key(|(target, _)| *target);

        let ticket = self.free.pop().unwrap_or_else(|| {
            self.tickets.push(None);
            (self.tickets.len() - 1) as u32
        });
        let mut waiting = 0;
        for (target, mode) in &wants {
            waiting += u32::from(!self.enter_queue(*target, ticket, who.age(), *mode));
        }
        self.tickets[ticket as usize] = Some(Ticket {
            who,
            waiting,
            wounded: false,
            wants,
        });
        if waiting == 0 {
            Entered::Granted(ticket)
        } else {
            Entered::Waiting(ticket)
        }
    }

    /// Enters one queue; true when it grants.
    fn enter_queue(&mut self, target: Target, ticket: u32, age: TxnId, mode: Mode) -> bool {
        let queue = self.queues.entry(target).or_default();
        queue.exclusive += u32::from(mode == Mode::Exclusive);
        let mut granted = true;
        if !queue.entries.is_empty() {
            // Those who are younger, and have locks that they cannot use yet, give them back.
            let mut back = SmallVec::<[Entry; 2]>::new();
            let tickets = &mut self.tickets;
            queue.entries.retain(|entry| {
                let Some(holder) = &mut tickets[entry.ticket as usize] else {
                    return true;
                };
                let in_the_way = entry.granted && entry.excludes(mode) && holder.who.age() > age;
                if !in_the_way {
                    return true;
                }
                if holder.waiting > 0 {
                    holder.waiting += 1;
                    back.push(*entry);
                    return false;
                }
                if let Who::Transaction(id) = holder.who
                    && !holder.wounded
                {
                    holder.wounded = true;
                    self.wounded.push(id);
                }
                true
            });
            let place = queue.place(&self.tickets, age);
            granted = !queue.entries[..place].iter().any(|entry| entry.excludes(mode));
            queue.entries.insert(place, Entry { ticket, mode, granted });
            for entry in back {
                let age = self.tickets[entry.ticket as usize]
                    .as_ref()
                    .map_or(age, |of| of.who.age());
                let place = queue.place(&self.tickets, age);
                queue.entries.insert(
                    place,
                    Entry {
                        granted: false,
                        ..entry
                    },
                );
            }
        } else {
            queue.entries.push(Entry { ticket, mode, granted });
        }
        granted
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

    /// A transaction that is in the way of an older request. Told once for each time it entered.
    pub(crate) fn next_wounded(&mut self) -> Option<TxnId> {
        self.wounded.pop()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn id(clock: u64) -> TxnId {
        TxnId { clock, core: 0 }
    }
    const fn txn(clock: u64) -> Who {
        Who::Transaction(id(clock))
    }
    const fn instant(clock: u64) -> Who {
        Who::Instant(id(clock))
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

    fn is_unused(locks: &mut Locks) -> bool {
        locks.is_empty() && locks.next_granted().is_none() && locks.next_wounded().is_none()
    }

    #[test]
    fn readers_share_and_writers_wait_in_turn() {
        let mut locks = Locks::default();
        assert!(!locks.blocks(A, W));
        let first = granted(locks.enter(txn(1), vec![(A, R)]));
        let second = granted(locks.enter(txn(2), vec![(A, R), (B, R)]));
        assert!(locks.blocks(A, W) && !locks.blocks(A, R));
        let writer = waiting(locks.enter(instant(3), vec![(A, W)]));
        // Who comes later does not overtake the writer.
        assert!(locks.blocks(A, R));
        let reader = waiting(locks.enter(instant(4), vec![(A, R)]));
        locks.leave(first);
        assert_eq!(locks.next_granted(), None);
        locks.leave(second);
        assert_eq!(locks.next_granted(), Some(writer));
        assert_eq!(locks.next_granted(), None);
        locks.leave(writer);
        assert_eq!(locks.next_granted(), Some(reader));
        locks.leave(reader);
        assert!(is_unused(&mut locks));
    }

    #[test]
    fn those_who_wait_stand_by_age() {
        let mut locks = Locks::default();
        let holder = granted(locks.enter(txn(1), vec![(A, W)]));
        let youngest = waiting(locks.enter(instant(9), vec![(A, W)]));
        let writer = waiting(locks.enter(txn(5), vec![(A, W), (B, W)]));
        let oldest = waiting(locks.enter(txn(2), vec![(A, R)]));
        let reader = waiting(locks.enter(instant(3), vec![(A, R)]));
        assert_eq!(locks.next_wounded(), None, "nobody waits for a younger one");
        locks.leave(holder);
        assert_eq!(locks.next_granted(), Some(oldest));
        assert_eq!(locks.next_granted(), Some(reader));
        assert_eq!(locks.next_granted(), None);
        // A late reader that is older than the writer reads with the others.
        let late = granted(locks.enter(txn(4), vec![(A, R)]));
        for ticket in [oldest, late, reader] {
            assert_eq!(locks.next_granted(), None);
            locks.leave(ticket);
        }
        assert_eq!(locks.next_granted(), Some(writer));
        locks.leave(writer);
        assert_eq!(locks.next_granted(), Some(youngest));
        locks.leave(youngest);
        assert!(is_unused(&mut locks));
    }

    #[test]
    fn a_younger_holder_is_wounded_once() {
        let mut locks = Locks::default();
        let holder = granted(locks.enter(txn(5), vec![(A, W), (B, R)]));
        let younger = waiting(locks.enter(txn(6), vec![(A, R)]));
        assert_eq!(locks.next_wounded(), None);
        let older = waiting(locks.enter(txn(4), vec![(A, W)]));
        assert_eq!(locks.next_wounded(), Some(id(5)));
        let reader = waiting(locks.enter(instant(3), vec![(A, R)]));
        let other = granted(locks.enter(txn(2), vec![(B, R)]));
        assert_eq!(
            locks.next_wounded(),
            None,
            "once, and not by those it does not keep waiting"
        );
        // It enters anew, behind those that it was in the way of.
        locks.leave(holder);
        let holder = waiting(locks.enter(txn(5), vec![(A, W), (B, R)]));
        for ticket in [reader, older, holder, younger] {
            assert_eq!(locks.next_granted(), Some(ticket));
            assert_eq!(locks.next_granted(), None);
            locks.leave(ticket);
        }
        locks.leave(other);
        assert!(is_unused(&mut locks));
    }

    #[test]
    fn the_whole_store() {
        let mut locks = Locks::default();
        let one = granted(locks.enter(txn(3), vec![(A, W), (A, R)]));
        let all = waiting(locks.enter(txn(4), vec![(Target::Store, W)]));
        assert!(locks.blocks(B, R));
        let later = waiting(locks.enter(instant(5), vec![(B, R)]));
        locks.leave(one);
        assert_eq!(locks.next_granted(), Some(all));
        assert_eq!(locks.next_granted(), None);
        locks.leave(all);
        assert_eq!(locks.next_granted(), Some(later));
        locks.leave(later);
        assert!(is_unused(&mut locks));
    }

    /// What a younger one cannot use yet, an older one takes.
    #[test]
    fn locks_of_those_who_wait_are_given_back() {
        let mut locks = Locks::default();
        let holder = granted(locks.enter(txn(1), vec![(A, W)]));
        let instant = waiting(locks.enter(instant(5), vec![(A, W), (B, W)]));
        let transaction = waiting(locks.enter(txn(6), vec![(A, R), (B, R)]));
        let reader = granted(locks.enter(txn(4), vec![(B, R)]));
        let older = waiting(locks.enter(txn(3), vec![(B, W)]));
        assert_eq!(locks.next_wounded(), Some(id(4)));
        locks.leave(holder);
        assert_eq!(locks.next_granted(), None, "it has given back what it had of B");
        locks.leave(reader);
        for ticket in [older, instant, transaction] {
            assert_eq!(locks.next_granted(), Some(ticket));
            assert_eq!(locks.next_granted(), None);
            locks.leave(ticket);
        }
        assert!(is_unused(&mut locks));
    }

    /// A waiting request may give up.
    #[test]
    fn leaving_the_queue() {
        let mut locks = Locks::default();
        let holder = granted(locks.enter(txn(1), vec![(A, R)]));
        let writer = waiting(locks.enter(txn(2), vec![(A, W)]));
        let reader = waiting(locks.enter(instant(3), vec![(A, R)]));
        locks.leave(writer);
        assert_eq!(locks.next_granted(), Some(reader));
        locks.leave(holder);
        locks.leave(reader);
        assert!(is_unused(&mut locks));
    }
}
