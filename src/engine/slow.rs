//! Which requests were slow, and where their time went.
//!
//! The time within a turn is known as exactly as the runtime tells it: [`Engine::time_is`] before a piece of work ends the one
//! before it.

use super::Engine;
use crate::config::Config;
use crate::metrics::slow_log::{SlowLog, SlowRequest};
use crate::model::Class;
use crate::protocol::{Buffered, Decoded};
use crate::session::pieces::Piece;
use crate::session::{Blocked, Session};

/// What a core needs to find slow requests among its connections'.
#[derive(Debug)]
pub(super) struct Slow {
    pub(super) log: SlowLog,
    /// From here on they are slow; `None`: none is.
    threshold_ns: Option<u64>,
    /// The time, as far as it was told.
    moment_ns: u64,
    /// Sessions that were worked for since then.
    worked_for: Vec<u32>,
}

impl Slow {
    pub(super) fn new(config: &Config) -> Self {
        let threshold_ns = u64::try_from(config.slow_log_threshold.as_nanos()).unwrap_or(u64::MAX);
        Self {
            log: SlowLog::new(usize::from(config.slow_log_len)),
            threshold_ns: (threshold_ns > 0).then_some(threshold_ns),
            moment_ns: 0,
            worked_for: vec![],
        }
    }

    /// Bytes came on a connection.
    #[inline]
    pub(super) fn arrived(&self, session: &mut Session, now_ns: u64) {
        if self.threshold_ns.is_some() {
            session.pieces.arrived(now_ns, session.blocked != Blocked::No);
        }
    }

    /// Work for what a connection has sent begins.
    #[inline]
    pub(super) fn works_for(&mut self, session: &mut Session, id: u32) {
        if session.pieces.work() {
            self.worked_for.push(id);
        }
    }

    /// Looks at how far the pieces of a connection are.
    #[inline]
    pub(super) fn follow(&mut self, session: &mut Session, now_ms: u64) {
        if !session.pieces.is_empty() {
            self.follow_pieces(session, now_ms);
        }
    }

    #[inline(never)]
    fn follow_pieces(&mut self, session: &mut Session, now_ms: u64) {
        if session.gone {
            return session.pieces.clear();
        }
        let waits = !session.input.is_empty() || session.has_collected();
        if session.blocked == Blocked::No || session.closing || !waits {
            let next = session.next_reply();
            session.pieces.all_begun(next);
        }
        let (first, end) = (session.first_reply(), session.output.end());
        session.pieces.left(first, end, self.moment_ns);
        self.look_for_slow(session, now_ms);
    }

    /// Looks which pieces are over, and which of those were slow.
    #[inline]
    fn look_for_slow(&mut self, session: &mut Session, now_ms: u64) {
        let taken = session.output.taken();
        while let Some(piece) = session.pieces.oldest_over(taken) {
            let took_ns = self.moment_ns.saturating_sub(piece.arrived_ns);
            if self.threshold_ns.is_some_and(|threshold_ns| took_ns >= threshold_ns) {
                self.add(session, piece, now_ms);
            }
            session.pieces.drop_oldest();
        }
    }

    #[cold]
    fn add(&mut self, session: &Session, piece: &Piece, now_ms: u64) {
        let times = piece.times(self.moment_ns);
        let took_ms = self.moment_ns.saturating_sub(piece.arrived_ns) / 1_000_000;
        self.log.add(SlowRequest {
            at_ms: now_ms.saturating_sub(took_ms),
            protocol: session.protocol.name().to_owned(),
            client: session.peer.clone(),
            class: piece.class,
            key: piece.key().to_vec(),
            key_bytes: piece.key_bytes,
            requests: piece.requests,
            queue_us: times.queue_ns / 1000,
            execute_us: times.execute_ns / 1000,
            hop_us: times.hop_ns / 1000,
            flush_us: times.flush_ns / 1000,
        });
    }
}

/// Counts a step that is no command to its piece, if it is a request.
#[cold]
pub(super) fn begin_special(session: &mut Session, decoded: &Decoded<'_>) {
    let (class, key): (Class, &[u8]) = match decoded {
        Decoded::Incomplete | Decoded::Nothing | Decoded::Value(_) | Decoded::Command(..) => return,
        Decoded::Transaction(txn, _) => {
            let check = txn.checks.first().map(|check| check.key);
            let command = txn.success.first();
            let class = command.map_or(Class::Other, |command| command.op.class());
            (class, command.map(|command| command.key).or(check).unwrap_or_default())
        }
        Decoded::Buffered(Buffered::Put { key, .. }, _) => (Class::Set, key),
        Decoded::Buffered(Buffered::Delete { key }, _) => (Class::Delete, key),
        Decoded::Buffered(Buffered::Get { key, .. }, _) => (Class::Get, key),
        _ => (Class::Other, &[]),
    };
    session.pieces.begun(1, class, key);
}

impl Engine {
    /// Tells the time within a turn, so that what was done until now is known to have ended. To be called before
    /// [`Engine::received`], if [`Engine::follows_requests`]; without it all of a turn counts as one.
    #[inline]
    pub fn time_is(&mut self, now_ns: u64) {
        let passed_ns = now_ns.saturating_sub(self.slow.moment_ns);
        self.slow.moment_ns = self.slow.moment_ns.max(now_ns);
        self.end_work(passed_ns);
    }

    /// A turn begins. What was done since the last one ended took no time.
    #[inline]
    pub(super) fn begin_time(&mut self, now_ns: u64) {
        self.end_work(0);
        self.slow.moment_ns = now_ns;
    }

    #[inline]
    fn end_work(&mut self, passed_ns: u64) {
        let slow = &mut self.slow;
        while let Some(id) = slow.worked_for.pop() {
            if let Some(session) = self.sessions.get_mut(id) {
                session.pieces.worked(passed_ns, slow.moment_ns);
                slow.look_for_slow(session, self.now.0);
            }
        }
    }

    /// Slow requests are looked for.
    pub fn follows_requests(&self) -> bool {
        self.slow.threshold_ns.is_some()
    }

    /// [`Engine::sent`] may find work to do for this connection.
    pub fn goes_on_when_sent(&mut self, id: u32) -> bool {
        let session = self.sessions.get_mut(id);
        session.is_some_and(|session| session.blocked == Blocked::Own)
    }
}
