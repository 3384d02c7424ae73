//! What connections and channels take of the memory limit, and how connections get by with less when that runs out.
//!
//! Their bytes are there before anybody can refuse them, so they are charged after the fact, each time something happened to
//! a connection, out of a reserve that data leaves alone ([`crate::budget`]). What keeps them from using up more than that
//! is what they may begin: less and less, the less there is left.

use super::Engine;
use crate::budget::{Pool, Shortage};
use crate::config::Limits;
use crate::encoding::{REUSED_BYTES_MAX, Rope};
use crate::link::{Batch, Direction};
use crate::model::{LARGE_VALUE_BYTES, Reply};
use crate::protocol::{self, Protocol};
use crate::session::{Blocked, End, Session};

/// A session stays charged for buffers that it has given back, up to this: it will have them again in a moment.
const CHARGE_SLACK_BYTES: usize = 32 * 1024;

/// What a connection may have waiting when memory is short: of its replies, of its requests at other cores, and, when
/// memory is very short, of a request that is not all there.
const SHORT_OUTPUT_BYTES: usize = 16 * 1024;
const SHORT_IN_FLIGHT: usize = 16;
const SEVERE_INPUT_BYTES: usize = 16 * 1024;

/// How many requests are begun at once whose replies may be megabytes each.
const COPYING_WINDOW: usize = 4;

/// What a large reply to several keys copies is there up to four times for a moment: as the cores wrote it, where that grew from, side
/// by side, and in its protocol.
const REPLY_COPIES: usize = 4;
/// So is a large request, three times: as it came, on its way to the cores, and with those that execute it.
const REQUEST_COPIES: usize = 3;

/// What one session may have waiting before it begins another request.
#[derive(Clone, Copy, Debug)]
pub(super) struct OwnLimits {
    /// Requests in flight.
    pub(super) in_flight: usize,
    /// Bytes of replies.
    pub(super) output_bytes: usize,
    /// From so many on, it begins one request at a time.
    pub(super) careful_bytes: usize,
}

impl OwnLimits {
    pub(super) fn new(limits: &Limits, shortage: Shortage) -> Self {
        let in_flight = limits.requests_in_flight_max as usize;
        let output_bytes = usize::try_from(limits.output_bytes_max.0).unwrap_or(usize::MAX);
        let (in_flight, output_bytes, careful_bytes) = match shortage {
            // Replies are large, so that the limit is overstepped by one at the most.
            Shortage::No => (in_flight, output_bytes, output_bytes / 4),
            Shortage::Some => (in_flight.min(SHORT_IN_FLIGHT), output_bytes.min(SHORT_OUTPUT_BYTES), 0),
            // When the reply before it has left.
            Shortage::Severe => (1, 1, 0),
        };
        Self {
            in_flight,
            output_bytes,
            careful_bytes,
        }
    }
}

/// There is room in memory, and now also in `out`, for a reply that copies a large value.
#[cold]
pub(super) fn has_room_to_copy(pool: &Pool, protocol: Protocol, reply: &Reply<'_>, out: &mut Rope) -> bool {
    let Reply::Found(item) = reply else { return true };
    let value = item.value.bytes();
    if value.len() < LARGE_VALUE_BYTES {
        return true;
    }
    // When it grows, what is there already is there twice for a moment.
    let has_room = |bytes: usize| pool.has_room(bytes + out.flat.len());
    if !has_room(value.len()) {
        return false;
    }
    let bytes = protocol::copied_bytes(protocol, value);
    has_room(bytes) && out.try_reserve_exact(bytes)
}

impl Engine {
    /// Connections have used up what is there for them: new ones are to be refused.
    pub fn refuses_connections(&self) -> bool {
        self.pool.is_full_of_connections()
    }

    /// Puts a session back that something happened to: charges what it holds now, and has the runtime look after it.
    #[inline(always)]
    pub(super) fn put_back(&mut self, id: u32, mut session: Box<Session>) {
        self.slow.follow(&mut session, self.now.0);
        self.recharge(&mut session);
        self.sessions.put_back(id, session);
    }

    /// Charges what the session holds now, unless that is a little less than what is charged for it.
    #[inline(always)]
    pub(super) fn recharge(&mut self, session: &mut Session) {
        // Also when it is more: the difference is beyond all numbers then.
        let differs = session.charged.wrapping_sub(session.front_bytes()) > CHARGE_SLACK_BYTES;
        if differs || session.waits_for_much() {
            self.recharge_exactly(session);
        }
    }

    /// The same to the byte: for a session that may be silent from now on.
    #[cold]
    #[inline(never)]
    pub(super) fn recharge_exactly(&mut self, session: &mut Session) {
        let bytes = session.buffer_bytes();
        self.charge_session(session, bytes);
    }

    fn charge_session(&mut self, session: &mut Session, bytes: usize) {
        if session.end == End::Core || session.socket_closed {
            // Nobody makes it grow.
            return;
        }
        let before = std::mem::replace(&mut session.charged, bytes);
        self.connection_bytes = self.connection_bytes + bytes - before;
        if bytes > before {
            self.shards.budget.charge_always(bytes - before);
            self.publish_if_much();
            self.see_shortage();
        } else {
            self.shards.budget.release_when_measured(before - bytes);
        }
    }

    /// Charges an announced value and makes room for it; `None` when there is no memory for it.
    pub(super) fn announced(&mut self, bytes: usize) -> Option<Vec<u8>> {
        // A small value counts and is not refused: it may be about to replace a larger one.
        if bytes < LARGE_VALUE_BYTES {
            self.shards.budget.charge_always(bytes);
        } else if !self.shards.reserve(bytes, self.now, &mut self.metrics.counters) {
            return None;
        }
        let mut value = vec![];
        if value.try_reserve_exact(bytes).is_err() {
            self.shards.budget.release(bytes);
            return None;
        }
        self.shards.budget.mark_absent(bytes);
        Some(value)
    }

    /// Takes back what was charged for a session that ends.
    pub(super) fn release_session(&mut self, session: &mut Session) {
        if let Some(incoming) = session.incoming.take() {
            let missing_bytes = incoming.missing_bytes();
            self.shards.budget.mark_present(missing_bytes);
            self.shards.budget.release(missing_bytes);
            self.shards.budget.release_when_measured(incoming.value.len());
        }
        self.drop_txn(session);
        self.charge_session(session, 0);
    }

    /// Sets what sessions may have waiting by what is left now.
    pub(super) fn see_shortage(&mut self) {
        self.own_limits = OwnLimits::new(&self.config.limits, self.pool.shortage());
        if self.is_log_full() {
            // Nothing is begun.
            self.own_limits.in_flight = 0;
        }
    }

    /// How many requests a session may begin now, at once. What is answered here oversteps its limit by so many replies.
    #[inline]
    pub(super) fn room_for_requests(&self, session: &Session) -> usize {
        let limits = &self.own_limits;
        let room = limits.in_flight.saturating_sub(session.in_flight());
        let waiting = session.output_bytes();
        if waiting >= limits.careful_bytes {
            room.min(usize::from(waiting < limits.output_bytes))
        } else if protocol::copies_large(session.protocol) {
            room.min(COPYING_WINDOW)
        } else {
            room
        }
    }

    /// Keeps bytes that are not decoded yet. Without memory for them the connection ends.
    pub(super) fn keep_input(&mut self, session: &mut Session, bytes: &[u8]) {
        let room = session.input.capacity() - session.input.len();
        if room < bytes.len() {
            // A long line comes in many pieces.
            let more = bytes.len().max(session.input.len() / 2);
            if session.input.try_reserve_exact(more).is_err() {
                return self.give_up(session);
            }
        }
        session.input.extend_from_slice(bytes);
    }

    /// Ends a connection that holds more of a request which is not all there than it may while memory is short.
    pub(super) fn check_half_sent(&mut self, session: &mut Session) {
        let half_sent = session.blocked == Blocked::No && !session.closing && session.input.len() > SEVERE_INPUT_BYTES;
        let is_too_much = |input: usize, bytes_max: u64| match self.pool.shortage() {
            Shortage::No => false,
            Shortage::Some => input as u64 > bytes_max,
            Shortage::Severe => true,
        };
        if half_sent && is_too_much(session.input.len(), self.config.limits.input_bytes_max.0) {
            self.give_up(session);
        }
    }

    /// Says that there is no memory for the session's request, and ends it.
    #[cold]
    fn give_up(&mut self, session: &mut Session) {
        self.metrics.counters.out_of_memory += 1;
        if session.end == End::Handled {
            session.tell();
        } else {
            self.answer(session, &protocol::out_of_memory(session.protocol));
        }
        session.closing = true;
        session.input = vec![];
    }

    /// Charges what a large request for several keys copies on its way to the cores that own them, and makes room for their parts of
    /// it; false, and nothing charged, when there is no memory for that. `costs`: of each core's part, with values that are not copied.
    pub(super) fn charge_request(&mut self, copied_bytes: usize, costs: &[(u16, u32)]) -> bool {
        let copies_bytes = copied_bytes.saturating_mul(REQUEST_COPIES);
        if !self.pool.has_room(copies_bytes) {
            return false;
        }
        let mut room = costs.iter().map(|(core, cost)| {
            let batch = self.links[usize::from(*core)].batch(Direction::Requests);
            batch.rope.try_reserve_exact(*cost as usize)
        });
        if !room.all(|there_is| there_is) {
            return false;
        }
        let parts = costs.len().max(1);
        for (core, _) in costs {
            self.charge_with_batch(usize::from(*core), Direction::Requests, copies_bytes / parts);
        }
        true
    }

    /// Charges what more a reply to several keys copies, in all the places where it is at some time; false when there was no room for
    /// it. `charged_bytes` is what was charged for it so far.
    pub(super) fn charge_reply(&mut self, link: usize, copied_bytes: usize, charged_bytes: &mut usize) -> bool {
        if copied_bytes <= REUSED_BYTES_MAX {
            // A few values are no reply to refuse.
            return copied_bytes <= LARGE_VALUE_BYTES || self.pool.has_room(copied_bytes);
        }
        let more = (copied_bytes * REPLY_COPIES).saturating_sub(*charged_bytes);
        *charged_bytes += more;
        self.charge_with_batch(link, Direction::Replies, more);
        self.pool.has_room(0)
    }

    /// Takes back what was charged for a reply that is not sent.
    pub(super) fn release_unsent(&mut self, link: usize, charged_bytes: usize) {
        self.links[link].batch(Direction::Replies).charged_bytes -= charged_bytes;
        self.shards.budget.release_when_measured(charged_bytes);
    }

    fn charge_with_batch(&mut self, link: usize, direction: Direction, bytes: usize) {
        self.links[link].batch(direction).charged_bytes += bytes;
        self.shards.budget.charge_always(bytes);
        self.see_shortage();
    }

    /// Charges what it takes to put together what has been gathered: it is there twice more for a moment. Returns whether there was
    /// room, and what was charged.
    pub(super) fn charge_gathered(&mut self, gathered_bytes: usize) -> (bool, usize) {
        if gathered_bytes <= REUSED_BYTES_MAX {
            return (true, 0);
        }
        let bytes = 2 * gathered_bytes;
        let has_room = self.pool.has_room(bytes);
        self.shards.budget.charge_always(bytes);
        (has_room, bytes)
    }

    /// What had been gathered is put together.
    pub(super) fn release_gathered(&mut self, charged_bytes: usize) {
        if charged_bytes > 0 {
            self.shards.budget.release_when_measured(charged_bytes);
        }
    }

    /// There is room for what a reply copies that is yet to be made.
    pub(super) fn has_room_for_reply(&self, copied_bytes: usize) -> bool {
        copied_bytes <= LARGE_VALUE_BYTES || self.pool.has_room(copied_bytes.saturating_mul(REPLY_COPIES))
    }

    /// Charges what waits to go to another core, when it is much.
    #[inline]
    pub(super) fn charge_batch(&mut self, link: usize, direction: Direction) {
        if self.links[link].batch(direction).weight(direction) > REUSED_BYTES_MAX {
            self.charge_heavy_batch(link, direction);
        }
    }

    #[cold]
    fn charge_heavy_batch(&mut self, link: usize, direction: Direction) {
        let batch = self.links[link].batch(direction);
        let more = batch.weight(direction).saturating_sub(batch.charged_bytes);
        self.charge_with_batch(link, direction, more);
    }

    /// The same for a reply that may be one of megabytes.
    #[cold]
    #[inline(never)]
    pub(super) fn charge_copies(&mut self, link: usize) {
        self.charge_batch(link, Direction::Replies);
    }

    /// Replies of so many bytes went from the batch to their connection, which is charged for them instead.
    #[inline]
    pub(super) fn release_replies(&mut self, batch: &mut Batch, bytes: usize) {
        if batch.charged_bytes > 0 {
            let bytes = bytes.min(batch.charged_bytes);
            batch.charged_bytes -= bytes;
            self.shards.budget.release(bytes);
        }
    }

    /// The charge of a batch goes with it to another core.
    #[inline]
    pub(super) fn hand_over(&mut self, batch: &Batch) {
        if batch.charged_bytes > 0 {
            self.shards.budget.hand_over(batch.charged_bytes);
        }
    }

    /// A batch has come, and its charge with it.
    #[inline]
    pub(super) fn take_over(&mut self, batch: &Batch) {
        if batch.charged_bytes > 0 {
            self.shards.budget.take_over(batch.charged_bytes);
        }
    }

    /// What was charged for a batch and did not go to connections is over.
    #[inline]
    pub(super) fn release_batch(&mut self, batch: &mut Batch) {
        if batch.charged_bytes > 0 {
            let bytes = std::mem::take(&mut batch.charged_bytes);
            self.shards.budget.release_when_measured(bytes);
        }
    }

    /// Tells the other cores what this one has charged, when that has changed much.
    #[inline]
    pub(super) fn publish_if_much(&mut self) {
        if self.shards.budget.is_to_publish() {
            self.publish();
        }
    }

    /// Tells the other cores what this one has charged.
    pub(super) fn publish(&mut self) {
        self.shards.budget.publish(self.connection_bytes);
        self.see_shortage();
        if self.pool.is_short() {
            self.buffers.clear();
        }
    }
}
