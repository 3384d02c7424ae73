//! Replacement policies of a cache, by the book: what a real cache is measured against.
//!
//! Keys are small numbers, each with a weight, and a cache holds keys whose weights add up to no more than its capacity. With
//! all weights 1 the capacity is a number of items, else one of bytes. None of them stores anything.

use crate::workload::Rng;
use std::collections::{BTreeSet, VecDeque};

/// A cache that decides what to keep.
pub trait Policy {
    /// The name for tables.
    fn name(&self) -> &'static str;

    /// Asks for a key; whether it is there.
    fn get(&mut self, key: u32) -> bool;

    /// Brings a key in, and out what has to make room for it. Nothing happens if it is there, or is heavier than the whole
    /// cache.
    fn set(&mut self, key: u32);
}

/// All policies, for keys with these weights. `requests` are the keys that will be asked for, in order.
pub fn all<'a>(weights: &'a [u32], capacity: u64, requests: &[u32], seed: u64) -> Vec<Box<dyn Policy + 'a>> {
    vec![
        Box::new(Belady::new(weights, capacity, requests)),
        Box::new(Lru::new(weights, capacity)),
        Box::new(Clock::new(weights, capacity)),
        Box::new(S3Fifo::new(weights, capacity)),
        Box::new(Random::new(weights, capacity, seed)),
        Box::new(Fifo::new(weights, capacity)),
    ]
}

/// What there is room for, and what is used of it.
#[derive(Debug)]
struct Room<'a> {
    weights: &'a [u32],
    capacity: u64,
    used: u64,
}

impl<'a> Room<'a> {
    fn new(weights: &'a [u32], capacity: u64) -> Self {
        Room {
            weights,
            capacity,
            used: 0,
        }
    }

    fn weight(&self, key: u32) -> u64 {
        u64::from(self.weights[key as usize])
    }

    fn never_fits(&self, key: u32) -> bool {
        self.weight(key) > self.capacity
    }

    fn lacks(&self, key: u32) -> bool {
        self.used + self.weight(key) > self.capacity
    }

    fn enter(&mut self, key: u32) {
        self.used += self.weight(key);
    }

    fn leave(&mut self, key: u32) {
        self.used -= self.weight(key);
    }
}

/// First in, first out, whatever was asked for meanwhile.
#[derive(Debug)]
pub struct Fifo<'a> {
    room: Room<'a>,
    queue: VecDeque<u32>,
    present: Vec<bool>,
}

impl<'a> Fifo<'a> {
    /// An empty one.
    pub fn new(weights: &'a [u32], capacity: u64) -> Self {
        Fifo {
            room: Room::new(weights, capacity),
            queue: VecDeque::new(),
            present: vec![false; weights.len()],
        }
    }
}

impl Policy for Fifo<'_> {
    fn name(&self) -> &'static str {
        "FIFO"
    }

    fn get(&mut self, key: u32) -> bool {
        self.present[key as usize]
    }

    fn set(&mut self, key: u32) {
        if self.present[key as usize] || self.room.never_fits(key) {
            return;
        }
        while self.room.lacks(key)
            && let Some(oldest) = self.queue.pop_front()
        {
            self.present[oldest as usize] = false;
            self.room.leave(oldest);
        }
        self.queue.push_back(key);
        self.present[key as usize] = true;
        self.room.enter(key);
    }
}

/// First in, first out, but what was asked for since it came, or since it was last looked at, gets another round.
#[derive(Debug)]
pub struct Clock<'a> {
    room: Room<'a>,
    queue: VecDeque<u32>,
    present: Vec<bool>,
    asked: Vec<bool>,
}

impl<'a> Clock<'a> {
    /// An empty one.
    pub fn new(weights: &'a [u32], capacity: u64) -> Self {
        Clock {
            room: Room::new(weights, capacity),
            queue: VecDeque::new(),
            present: vec![false; weights.len()],
            asked: vec![false; weights.len()],
        }
    }
}

impl Policy for Clock<'_> {
    fn name(&self) -> &'static str {
        "CLOCK"
    }

    fn get(&mut self, key: u32) -> bool {
        self.asked[key as usize] |= self.present[key as usize];
        self.present[key as usize]
    }

    fn set(&mut self, key: u32) {
        if self.present[key as usize] || self.room.never_fits(key) {
            return;
        }
        while self.room.lacks(key)
            && let Some(oldest) = self.queue.pop_front()
        {
            if std::mem::take(&mut self.asked[oldest as usize]) {
                self.queue.push_back(oldest);
            } else {
                self.present[oldest as usize] = false;
                self.room.leave(oldest);
            }
        }
        self.queue.push_back(key);
        self.present[key as usize] = true;
        self.room.enter(key);
    }
}

/// No key.
const NONE: u32 = u32::MAX;

/// What was asked for longest ago goes first. A doubly linked list in two tables by key: the head was used last.
#[derive(Debug)]
pub struct Lru<'a> {
    room: Room<'a>,
    /// Towards the head, and towards the tail; both the key itself where it is not in the list.
    newer: Vec<u32>,
    older: Vec<u32>,
    head: u32,
    tail: u32,
}

impl<'a> Lru<'a> {
    /// An empty one.
    pub fn new(weights: &'a [u32], capacity: u64) -> Self {
        let alone: Vec<u32> = (0..weights.len() as u32).collect();
        Lru {
            room: Room::new(weights, capacity),
            newer: alone.clone(),
            older: alone,
            head: NONE,
            tail: NONE,
        }
    }

    fn has(&self, key: u32) -> bool {
        self.newer[key as usize] != key
    }

    fn unlink(&mut self, key: u32) {
        let (newer, older) = (self.newer[key as usize], self.older[key as usize]);
        match newer {
            NONE => self.head = older,
            newer => self.older[newer as usize] = older,
        }
        match older {
            NONE => self.tail = newer,
            older => self.newer[older as usize] = newer,
        }
        self.newer[key as usize] = key;
        self.older[key as usize] = key;
    }

    fn push(&mut self, key: u32) {
        self.newer[key as usize] = NONE;
        self.older[key as usize] = self.head;
        match self.head {
            NONE => self.tail = key,
            head => self.newer[head as usize] = key,
        }
        self.head = key;
    }
}

impl Policy for Lru<'_> {
    fn name(&self) -> &'static str {
        "LRU"
    }

    fn get(&mut self, key: u32) -> bool {
        let has = self.has(key);
        if has {
            self.unlink(key);
            self.push(key);
        }
        has
    }

    fn set(&mut self, key: u32) {
        if self.has(key) || self.room.never_fits(key) {
            return;
        }
        while self.room.lacks(key) {
            let oldest = self.tail;
            self.unlink(oldest);
            self.room.leave(oldest);
        }
        self.push(key);
        self.room.enter(key);
    }
}

/// Any of them goes.
#[derive(Debug)]
pub struct Random<'a> {
    room: Room<'a>,
    keys: Vec<u32>,
    /// By key: its place among the keys.
    places: Vec<u32>,
    rng: Rng,
}

impl<'a> Random<'a> {
    /// An empty one.
    pub fn new(weights: &'a [u32], capacity: u64, seed: u64) -> Self {
        Random {
            room: Room::new(weights, capacity),
            keys: Vec::new(),
            places: vec![NONE; weights.len()],
            rng: Rng::new(seed),
        }
    }
}

impl Policy for Random<'_> {
    fn name(&self) -> &'static str {
        "random"
    }

    fn get(&mut self, key: u32) -> bool {
        self.places[key as usize] != NONE
    }

    fn set(&mut self, key: u32) {
        if self.get(key) || self.room.never_fits(key) {
            return;
        }
        while self.room.lacks(key) {
            let place = self.rng.below(self.keys.len() as u64) as usize;
            let victim = self.keys.swap_remove(place);
            self.places[victim as usize] = NONE;
            self.room.leave(victim);
            if let Some(&moved) = self.keys.get(place) {
                self.places[moved as usize] = place as u32;
            }
        }
        self.places[key as usize] = self.keys.len() as u32;
        self.keys.push(key);
        self.room.enter(key);
    }
}

/// Where S3-FIFO has a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Queue {
    Nowhere,
    Small,
    Main,
    /// Only its name is known.
    Ghost,
}

/// Three queues, first in, first out: new keys come into a small one of a tenth of the room; what was asked for more than
/// once there goes on to the main one, the rest leaves, and is remembered for a while; what comes back while it is remembered
/// goes to the main one at once. In the main queue a key gets a round more for each time it was asked for, up to three.
#[derive(Debug)]
pub struct S3Fifo<'a> {
    room: Room<'a>,
    small: VecDeque<u32>,
    small_used: u64,
    main: VecDeque<u32>,
    /// Keys that have left, with the number of their leaving: an entry whose number is not the key's last one is void.
    ghosts: VecDeque<(u32, u32)>,
    ghosts_used: u64,
    left: u32,
    left_as: Vec<u32>,
    at: Vec<Queue>,
    /// Times asked for, up to [`FREQUENCY_MAX`].
    frequency: Vec<u8>,
}

const FREQUENCY_MAX: u8 = 3;

impl<'a> S3Fifo<'a> {
    /// An empty one.
    pub fn new(weights: &'a [u32], capacity: u64) -> Self {
        S3Fifo {
            room: Room::new(weights, capacity),
            small: VecDeque::new(),
            small_used: 0,
            main: VecDeque::new(),
            ghosts: VecDeque::new(),
            ghosts_used: 0,
            left: 0,
            left_as: vec![0; weights.len()],
            at: vec![Queue::Nowhere; weights.len()],
            frequency: vec![0; weights.len()],
        }
    }

    fn small_capacity(&self) -> u64 {
        (self.room.capacity / 10).max(1)
    }

    fn main_capacity(&self) -> u64 {
        self.room.capacity.saturating_sub(self.small_capacity())
    }

    /// Makes room: one key leaves, or goes on from the small queue to the main one.
    fn evict(&mut self) {
        // The small queue is larger than its part while the main one is smaller than its own.
        if self.small_used >= self.small_capacity() || self.main.is_empty() {
            self.evict_small();
        } else {
            self.evict_main();
        }
    }

    fn evict_small(&mut self) {
        let Some(key) = self.small.pop_front() else { return };
        self.small_used -= self.room.weight(key);
        if self.frequency[key as usize] > 1 {
            self.frequency[key as usize] = 0;
            self.at[key as usize] = Queue::Main;
            self.main.push_back(key);
            if self.room.used - self.small_used > self.main_capacity() {
                self.evict_main();
            }
        } else {
            self.room.leave(key);
            self.remember(key);
        }
    }

    fn evict_main(&mut self) {
        while let Some(key) = self.main.pop_front() {
            let frequency = &mut self.frequency[key as usize];
            if *frequency == 0 {
                self.at[key as usize] = Queue::Nowhere;
                return self.room.leave(key);
            }
            *frequency -= 1;
            self.main.push_back(key);
        }
    }

    /// Notes that a key has left, for as long as as much as the main queue holds has left after it.
    fn remember(&mut self, key: u32) {
        self.left += 1;
        self.left_as[key as usize] = self.left;
        self.at[key as usize] = Queue::Ghost;
        self.ghosts.push_back((key, self.left));
        self.ghosts_used += self.room.weight(key);
        while self.ghosts_used > self.main_capacity()
            && let Some((oldest, number)) = self.ghosts.pop_front()
        {
            if self.at[oldest as usize] == Queue::Ghost && self.left_as[oldest as usize] == number {
                self.at[oldest as usize] = Queue::Nowhere;
                self.ghosts_used -= self.room.weight(oldest);
            }
        }
    }
}

impl Policy for S3Fifo<'_> {
    fn name(&self) -> &'static str {
        "S3-FIFO"
    }

    fn get(&mut self, key: u32) -> bool {
        let has = matches!(self.at[key as usize], Queue::Small | Queue::Main);
        if has {
            let frequency = &mut self.frequency[key as usize];
            *frequency = (*frequency + 1).min(FREQUENCY_MAX);
        }
        has
    }

    fn set(&mut self, key: u32) {
        let came_from = self.at[key as usize];
        if matches!(came_from, Queue::Small | Queue::Main) || self.room.never_fits(key) {
            return;
        }
        // Looked up before room is made, which may forget it.
        if came_from == Queue::Ghost {
            self.ghosts_used -= self.room.weight(key);
            self.at[key as usize] = Queue::Nowhere;
        }
        while self.room.lacks(key) {
            self.evict();
        }
        self.room.enter(key);
        self.frequency[key as usize] = 0;
        if came_from == Queue::Ghost {
            self.at[key as usize] = Queue::Main;
            self.main.push_back(key);
        } else {
            self.at[key as usize] = Queue::Small;
            self.small.push_back(key);
            self.small_used += self.room.weight(key);
        }
    }
}

/// Knows the future: what will be asked for last goes first, or does not come in. No policy finds more where all weights are
/// the same.
#[derive(Debug)]
pub struct Belady<'a> {
    room: Room<'a>,
    /// By request: the place of the next one for the same key.
    next: Vec<u32>,
    /// Requests so far.
    now: usize,
    /// By key: the place of the next request for it, as of the last one.
    upcoming: Vec<u32>,
    /// What is there, by the place of the next request for it.
    present: BTreeSet<(u32, u32)>,
    has: Vec<bool>,
}

/// The place of a request that does not come.
const NEVER: u32 = u32::MAX;

impl<'a> Belady<'a> {
    /// An empty one, before the first of `requests`, of which there may be less than 2^32.
    pub fn new(weights: &'a [u32], capacity: u64, requests: &[u32]) -> Self {
        let mut upcoming = vec![NEVER; weights.len()];
        let mut next = vec![NEVER; requests.len()];
        for (place, &key) in requests.iter().enumerate().rev() {
            next[place] = std::mem::replace(&mut upcoming[key as usize], place as u32);
        }
        Belady {
            room: Room::new(weights, capacity),
            next,
            now: 0,
            upcoming,
            present: BTreeSet::new(),
            has: vec![false; weights.len()],
        }
    }
}

impl Policy for Belady<'_> {
    fn name(&self) -> &'static str {
        "Belady"
    }

    fn get(&mut self, key: u32) -> bool {
        let next = self.next.get(self.now).copied().unwrap_or(NEVER);
        self.now += 1;
        let before = std::mem::replace(&mut self.upcoming[key as usize], next);
        let has = self.has[key as usize];
        if has {
            self.present.remove(&(before, key));
            self.present.insert((next, key));
        }
        has
    }

    fn set(&mut self, key: u32) {
        if self.has[key as usize] || self.room.never_fits(key) {
            return;
        }
        let next = self.upcoming[key as usize];
        while self.room.lacks(key) {
            let Some(&last) = self.present.last() else { return };
            if last <= (next, key) {
                return;
            }
            self.present.remove(&last);
            self.has[last.1 as usize] = false;
            self.room.leave(last.1);
        }
        self.present.insert((next, key));
        self.has[key as usize] = true;
        self.room.enter(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONES: [u32; 64] = [1; 64];

    /// Asks for each key and sets what is missing; the keys that were there.
    fn hits(policy: &mut dyn Policy, keys: &[u32]) -> Vec<u32> {
        let mut hits = Vec::new();
        for &key in keys {
            if policy.get(key) {
                hits.push(key);
            } else {
                policy.set(key);
            }
        }
        hits
    }

    #[test]
    fn fifo_by_hand() {
        let mut fifo = Fifo::new(&ONES, 3);
        // 4 drives 1 out although it was asked for last; 1 then drives 2 out.
        assert_eq!(hits(&mut fifo, &[1, 2, 3, 1, 4, 1, 3, 2]), [1, 3]);
        assert_eq!(fifo.queue, [4, 1, 2]);
    }

    #[test]
    fn lru_by_hand() {
        let mut lru = Lru::new(&ONES, 3);
        // 4 drives 2 out, 2 drives 3 out.
        assert_eq!(hits(&mut lru, &[1, 2, 3, 1, 4, 1, 2, 4, 3]), [1, 1, 4]);
        let order = std::iter::successors(Some(lru.tail), |key| {
            Some(lru.newer[*key as usize]).filter(|key| *key != NONE)
        });
        assert_eq!(order.collect::<Vec<_>>(), [2, 4, 3]);
        // A key may be the only one.
        let mut lru = Lru::new(&ONES, 1);
        assert_eq!(hits(&mut lru, &[1, 1, 2, 1, 1, 2]), [1, 1]);
    }

    #[test]
    fn clock_by_hand() {
        let mut clock = Clock::new(&ONES, 3);
        // At 4 the hand passes 1, which was asked for, and takes 2; at 5 it takes 3, at 6 it takes 1.
        assert_eq!(hits(&mut clock, &[1, 2, 3, 1, 4, 5, 6]), [1]);
        assert_eq!(clock.queue, [4, 5, 6]);
        // All were asked for: the first one goes after a round.
        assert_eq!(hits(&mut clock, &[4, 5, 6, 7]), [4, 5, 6]);
        assert_eq!(clock.queue, [5, 6, 7]);
    }

    #[test]
    fn random_keeps_its_room() {
        let mut random = Random::new(&ONES, 3, 1);
        let mut rng = Rng::new(2);
        for _ in 0..1000 {
            let key = rng.below(10) as u32;
            hits(&mut random, &[key]);
            assert!(random.get(key) && random.keys.len() <= 3);
            let there = random.places.iter().filter(|place| **place != NONE).count();
            assert_eq!(there, random.keys.len());
            assert!(
                (0..)
                    .zip(&random.keys)
                    .all(|(place, key)| random.places[*key as usize] == place)
            );
        }
    }

    /// Ten places: one for new keys, nine for the main queue and as many ghosts.
    #[test]
    fn s3_fifo_by_hand() {
        let mut s3 = S3Fifo::new(&ONES, 10);
        // While there is room nothing moves.
        hits(&mut s3, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
        assert_eq!((s3.small.len(), s3.main.len()), (10, 0));
        // 0 is asked for once and 1 twice; then 10 comes: 0 leaves.
        assert_eq!(hits(&mut s3, &[0, 1, 1, 10]), [0, 1, 1]);
        assert_eq!(s3.at[0], Queue::Ghost);
        assert_eq!((s3.small.front(), s3.main.len()), (Some(&1), 0));
        // 11 comes: 1 goes on to the main queue, and 2 leaves.
        hits(&mut s3, &[11]);
        assert_eq!((s3.at[1], s3.at[2]), (Queue::Main, Queue::Ghost));
        assert_eq!(s3.frequency[1], 0, "it starts anew there");
        // 0 comes back while it is remembered: into the main queue at once. 3 leaves.
        hits(&mut s3, &[0]);
        assert_eq!((s3.at[0], s3.at[3]), (Queue::Main, Queue::Ghost));
        assert_eq!(s3.main, [1, 0]);
        assert_eq!(s3.small, [4, 5, 6, 7, 8, 9, 10, 11]);
        assert_eq!(s3.ghosts_used, 2);
    }

    #[test]
    fn s3_fifo_main_queue_by_hand() {
        let mut s3 = S3Fifo::new(&ONES, 10);
        for key in 0..9 {
            hits(&mut s3, &[key, key, key]);
        }
        // Nine keys that were asked for twice, and one that was not.
        hits(&mut s3, &[9]);
        // All nine go on, and 9 leaves for 10.
        hits(&mut s3, &[10]);
        assert_eq!((s3.main.len(), s3.at[9]), (9, Queue::Ghost));
        assert_eq!(s3.small, [10]);
        // A main queue with all there is: 9 comes back to it, and 10 leaves; then there is no new key, and the main queue
        // gives one up: not 0, which was asked for, but 1.
        hits(&mut s3, &[9]);
        assert_eq!((s3.main.len(), s3.small.len()), (10, 0));
        assert_eq!(hits(&mut s3, &[0, 11]), [0]);
        assert_eq!((s3.at[0], s3.at[1]), (Queue::Main, Queue::Nowhere));
        assert_eq!(s3.main, [2, 3, 4, 5, 6, 7, 8, 9, 0]);
    }

    /// Nine ghosts at most: the tenth forgets the first.
    #[test]
    fn s3_fifo_forgets() {
        let mut s3 = S3Fifo::new(&ONES, 10);
        let keys: Vec<u32> = (0..20).collect();
        hits(&mut s3, &keys);
        assert_eq!((s3.at[0], s3.at[1], s3.ghosts_used), (Queue::Nowhere, Queue::Ghost, 9));
        hits(&mut s3, &[0]);
        assert_eq!(s3.at[0], Queue::Small);
        // A scan leaves nothing behind in the main queue.
        assert!(s3.main.is_empty());
    }

    #[test]
    fn belady_by_hand() {
        // 3 would come back last, and is not let in; then 1 will not come back, and 2 neither.
        let requests = [1, 2, 3, 1, 2, 3, 3, 4, 3, 4];
        let mut belady = Belady::new(&ONES, 2, &requests);
        assert_eq!(hits(&mut belady, &requests), [1, 2, 3, 3, 4]);
        let mut lru = Lru::new(&ONES, 2);
        assert_eq!(hits(&mut lru, &requests), [3, 3, 4]);
    }

    #[test]
    fn belady_finds_most() {
        let mut rng = Rng::new(4);
        // Small numbers more often.
        let requests: Vec<u32> = (0..5000).map(|_| (rng.below(64) * rng.below(64) / 64) as u32).collect();
        let mut found = Vec::new();
        for mut policy in all(&ONES, 20, &requests, 1) {
            found.push(hits(policy.as_mut(), &requests).len());
        }
        assert!(
            found[1..].iter().all(|hits| *hits < found[0] && *hits > 1000),
            "{found:?}"
        );
    }

    /// Weights are counted, and what is too heavy changes nothing.
    #[test]
    fn weights_are_kept() {
        let weights: Vec<u32> = (0..64).map(|key| 1 + key % 7).chain([1000]).collect();
        let mut rng = Rng::new(9);
        let requests: Vec<u32> = (0..5000).map(|_| rng.below(64) as u32).collect();
        for mut policy in all(&weights, 40, &requests, 1) {
            hits(policy.as_mut(), &requests);
            hits(policy.as_mut(), &[64]);
            assert!(!policy.get(64), "{}", policy.name());
            let used: u32 = (0..64)
                .filter(|key| policy.get(*key))
                .map(|key| weights[key as usize])
                .sum();
            // Who knows that nothing comes any more lets nothing in.
            let least = if policy.name() == "Belady" { 0 } else { 34 };
            assert!((least..=40).contains(&used), "{}: {used}", policy.name());
        }
    }
}
