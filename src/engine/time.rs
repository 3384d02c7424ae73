//! Work that time brings: expiry, a flush that was asked for ahead, connections that are silent for too long.

use super::Engine;
use crate::protocol::Protocol;
use crate::session::{Blocked, End, Session};

impl Engine {
    /// Work that time brings, a bounded piece of it.
    pub(super) fn tick(&mut self) {
        let passed_ms = self.now.0.saturating_sub(self.ticked_ms);
        self.ticked_ms = self.now.0;
        self.hot_keys.age(self.now_ns);
        self.shards.tick(passed_ms, self.now, &mut self.metrics.counters);
        self.publish();
        self.snapshot_when_due();
        if self.core.0 == 0 && self.flush_at.is_some_and(|at| at <= self.now) {
            self.flush_at = None;
            self.flush_by_time();
        }
        if self.now.0.saturating_sub(self.timeouts_checked_ms) >= 500 {
            self.timeouts_checked_ms = self.now.0;
            self.check_timeouts();
        }
    }

    /// Empties the store on all cores, because somebody asked for it some time ago.
    fn flush_by_time(&mut self) {
        let id = match self.internal {
            Some(id) => id,
            None => {
                let mut session = Session::new(Protocol::Text, "internal".to_owned(), self.now.0);
                session.end = End::Core;
                // There is nothing for the runtime to do about it.
                session.listed = true;
                self.sessions.add(session)
            }
        };
        self.internal = Some(id);
        // Asked for like any client's, it waits like one where it must: for an earlier one, or for credit.
        if let Some(mut session) = self.sessions.take(id) {
            // Nobody reads what it was answered.
            session.output.filling.clear(0);
            session.input.extend_from_slice(b"delete\n");
            session.arrived_ns = self.now_ns;
            if session.blocked == Blocked::No {
                self.advance_input(&mut session, id, None);
            }
            self.put_back(id, session);
        }
        self.settle();
    }

    /// There is work to do even if nothing happens: the runtime should come again in a millisecond instead of sleeping.
    pub fn has_background_work(&self) -> bool {
        self.shards.is_busy() || self.images.as_ref().is_some_and(|images| images.is_walking())
    }

    fn check_timeouts(&mut self) {
        let idle_ms = self.config.limits.idle_timeout.as_millis() as u64;
        let write_ms = self.config.limits.write_timeout.as_millis() as u64;
        for id in self.sessions.ids() {
            let Some(session) = self.sessions.get_mut(id).filter(|session| session.end.is_connection()) else {
                continue;
            };
            let idle = idle_ms > 0
                && session.output_bytes() == 0
                && session.in_flight() == 0
                && self.now.0.saturating_sub(session.last_active_ms()) >= idle_ms;
            let stuck = write_ms > 0
                && !session.output.is_empty()
                && self.now.0.saturating_sub(session.last_sent_ms) >= write_ms;
            if (idle || stuck) && !session.close_told {
                self.metrics.counters.connections_timed_out += 1;
                self.failed(id);
            } else if let Some(mut session) = self.sessions.take(id) {
                self.doom_if_silent(&mut session);
                self.check_half_sent(&mut session);
                self.recharge_exactly(&mut session);
                if session.closing {
                    self.put_back(id, session);
                } else {
                    self.sessions.restore(id, session);
                }
            }
        }
    }
}
