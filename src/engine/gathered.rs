//! Requests that several cores answer together, as the core sees it that has the connection: broadcasts and transactions.

use super::{Engine, count_answered};
use crate::encoding::Rope;
use crate::gather::{Gather, Gathered};
use crate::link::{BROADCAST_COST_BYTES, Decided, Direction, Request, Return, Wish, read_wound};
use crate::locks::TxnId;
use crate::metrics::{ConnectionFacts, Prefixes, Report};
use crate::model::{Broadcast, Class, Transaction, TxnEnd};
use crate::protocol::{self, ServerFacts, Shape, TxnResults};
use crate::session::{Blocked, Session};
use crate::txn::{Coordinator, Decision, Next, Ordered, Role, Scope};

/// Requests of less than this are few enough in a turn not to need a look at what is left of memory.
const FREE_REQUEST_BYTES: u64 = 64 * 1024;

/// What a transaction asks of one key, and where that belongs.
struct Placed<'a> {
    wish: Wish<'a>,
    hash: u64,
    shard: u16,
    core: u16,
}

impl Engine {
    /// Takes credit of all these links, one after the other. False when one has too little: the session waits for that one
    /// and keeps what it has got. All do so in the order of the links, so that nobody waits in a circle.
    fn take_credits(&mut self, session: &mut Session, id: u32, costs: &[(u16, u32)], resumed: Option<u16>) -> bool {
        for (link, cost) in costs {
            if *link == self.core.0 || session.credits.iter().any(|(taken, _)| taken == link) {
                continue;
            }
            if !self.take_credit(*link, *cost, resumed) {
                self.block_on(session, id, *link, resumed);
                return false;
            }
            session.credits.push((*link, *cost));
        }
        session.credits.clear();
        true
    }

    fn return_to(&self, session: &Session, id: u32, number: u32) -> Return {
        Return {
            session: id,
            number,
            protocol: session.protocol,
        }
    }

    /// Asks all cores. False, and nothing done, when credit is missing somewhere.
    pub(super) fn broadcast(
        &mut self,
        session: &mut Session,
        id: u32,
        broadcast: Broadcast,
        shape: &Shape<'_>,
        resumed: Option<u16>,
    ) -> bool {
        let cost_bytes = BROADCAST_COST_BYTES;
        let costs: Vec<(u16, u32)> = (0..self.table.cores()).map(|core| (core, cost_bytes)).collect();
        if !self.take_credits(session, id, &costs, resumed) {
            return false;
        }
        let mut report = self.answer_broadcast(broadcast);
        if let Report::Connections(connections) = &mut report {
            // It is taken out of the list while it is served.
            connections.push(self.connection_facts(id, session));
        }
        let of = Gathered::Report {
            report,
            missing: self.table.cores() - 1,
            cost_bytes,
        };
        let number = session.expect_gathered(Class::Other, true, Gather::new(shape, of));
        let to = self.return_to(session, id, number);
        for link in (0..self.links.len()).filter(|link| *link != usize::from(self.core.0)) {
            self.metrics.counters.forwarded += 1;
            self.links[link].push_broadcast(to, broadcast);
        }
        self.gathered(session, id, number);
        true
    }

    /// Executes a transaction. False, and nothing done, when it must wait: for credit, or, because it is one instant for
    /// several cores, for the replies to what the connection asked before.
    pub(super) fn transact(
        &mut self,
        session: &mut Session,
        id: u32,
        txn: &Transaction<'_>,
        shape: &Shape<'_>,
        resumed: Option<u16>,
    ) -> bool {
        let mut placed = Vec::with_capacity(txn.checks.len() + txn.success.len() + txn.failure.len());
        let mut costs = vec![0u32; self.links.len()];
        let mut scope = if txn.checks.is_empty() {
            Scope::Reads
        } else {
            Scope::Keys
        };
        let mut place = |key, wish| {
            let place = self.table.place(key);
            let shard = self.table.shard_of(place.token);
            let core = self.table.core_of(shard).0;
            placed.push(Placed {
                wish,
                hash: place.hash,
                shard: shard.0,
                core,
            });
            costs[usize::from(core)] += wish.cost_bytes();
        };
        txn.checks.iter().for_each(|check| place(check.key, Wish::Check(check)));
        for (role, commands) in [(Role::Success, txn.success), (Role::Failure, txn.failure)] {
            for command in commands {
                place(command.key, Wish::Execute(role, command));
                if !command.only_reads() {
                    scope = Scope::Keys;
                }
            }
        }
        let costs: Vec<(u16, u32)> = (0..).zip(costs).filter(|(_, cost)| *cost > 0).collect();
        let class = match txn.success.first() {
            Some(command) => command.op.class(),
            None => Class::Other,
        };
        self.begin_txn(session, id, &placed, &costs, scope, class, shape, resumed)
    }

    /// Empties the store on all cores at one instant. False as for [`Engine::transact`].
    pub(super) fn flush(&mut self, session: &mut Session, id: u32, shape: &Shape<'_>, resumed: Option<u16>) -> bool {
        let costs: Vec<(u16, u32)> = (0..self.table.cores())
            .map(|core| (core, BROADCAST_COST_BYTES))
            .collect();
        self.begin_txn(session, id, &[], &costs, Scope::Store, Class::Other, shape, resumed)
    }

    #[expect(clippy::too_many_arguments, reason = "the two ways in have all of it in common")]
    fn begin_txn(
        &mut self,
        session: &mut Session,
        id: u32,
        placed: &[Placed<'_>],
        costs: &[(u16, u32)],
        scope: Scope,
        class: Class,
        shape: &Shape<'_>,
        resumed: Option<u16>,
    ) -> bool {
        let distributed = costs.len() > 1;
        if distributed && session.in_flight() > 0 {
            session.blocked = Blocked::Own;
            return false;
        }
        if !self.take_credits(session, id, costs, resumed) {
            return false;
        }
        let bytes: u64 = costs.iter().map(|(_, cost_bytes)| u64::from(*cost_bytes)).sum();
        let copied_bytes = || placed.iter().map(|placed| placed.wish.copied_bytes()).sum();
        if bytes > FREE_REQUEST_BYTES && !self.charge_request(copied_bytes(), costs) {
            session
                .credits
                .extend(costs.iter().filter(|(core, _)| *core != self.core.0));
            self.give_credits_back(session);
            self.refuse_txn(session, placed, shape);
            return true;
        }
        let txn = self.next_age();
        let order = placed.iter().map(|placed| Ordered {
            role: placed.wish.role(),
            core: placed.core,
            writes: placed.wish.writes(),
        });
        let read_bytes_max = self.config.limits.response_bytes_max();
        let coordinator = Coordinator::new(txn, order.collect(), costs, scope, read_bytes_max, self.gates())
            .waiting(shape.is_durable() && !self.gates());
        let forwarded = costs.iter().any(|(core, _)| *core != self.core.0);
        let gather = Gather::new(shape, Gathered::Txn(coordinator));
        let number = session.expect_gathered(class, forwarded, gather);
        // Nothing behind it is begun before it is done.
        session.blocked = Blocked::Own;
        if distributed {
            self.coordinated.insert(txn, (id, number));
        }
        let to = self.return_to(session, id, number);
        let mut starts = vec![0; self.links.len()];
        for (core, _) in costs {
            self.metrics.counters.forwarded += u64::from(*core != self.core.0);
            let link = &mut self.links[usize::from(*core)];
            starts[usize::from(*core)] = link.begin_part(to, shape.code, distributed, txn, scope);
        }
        for of in placed {
            self.links[usize::from(of.core)].push_member(of.hash, of.shard, &of.wish);
        }
        for (core, _) in costs {
            self.links[usize::from(*core)].finish_part(starts[usize::from(*core)]);
            self.charge_batch(usize::from(*core), Direction::Requests);
        }
        self.unsettled = true;
        true
    }

    /// Answers that there is no memory for a transaction, of which nothing was done.
    #[cold]
    fn refuse_txn(&mut self, session: &mut Session, placed: &[Placed<'_>], shape: &Shape<'_>) {
        self.metrics.counters.out_of_memory += 1;
        let commands = placed.iter().filter(|placed| placed.wish.role() == Role::Success);
        let mut reply = Rope::default();
        let results = TxnResults::refused(TxnEnd::OutOfMemory, commands.count());
        protocol::encode_txn(session.protocol, shape, results, &mut reply);
        self.answer(session, &reply.flat);
    }

    /// Goes on with what is gathered at slot `number`, as far as what has come allows.
    pub(super) fn gathered(&mut self, session: &mut Session, id: u32, number: u32) {
        let to = self.return_to(session, id, number);
        let epoch = self.log_epoch();
        let Ok(gather) = session.gather(number) else { return };
        let shape_code = gather.shape().code;
        match &mut gather.of {
            Gathered::Report { missing: 0, .. } => {}
            Gathered::Report { .. } => return,
            Gathered::Txn(coordinator) => {
                self.unsettled = true;
                let next = coordinator.next();
                let decision = match next {
                    Next::Wait => return,
                    Next::Ask(decision) | Next::FinishAnd(decision) => Some(decision),
                    Next::Finish => None,
                };
                if let Some(decision) = decision {
                    let decided = Decided {
                        decision,
                        epoch,
                        writers: &coordinator.writers(),
                    };
                    for core in coordinator.cores() {
                        self.links[usize::from(core)].push_decision(to, shape_code, coordinator.id, &decided);
                    }
                }
                if let Next::Ask(_) = next {
                    return;
                }
                if coordinator.is_distributed() {
                    self.coordinated.remove(&coordinator.id);
                }
                for core in coordinator.cores().filter(|core| *core != self.core.0) {
                    self.links[usize::from(core)].release_credit(coordinator.cost_bytes(core));
                    self.freed_links.push(core);
                }
            }
        }
        let gathered_bytes = session.gathered_bytes;
        let Some(gather) = session.take_gathered(number) else {
            return;
        };
        let (has_room, charged_bytes) = self.charge_gathered(gathered_bytes);
        let mut reply = Rope::default();
        let (code, text) = (gather.shape().code, gather.shape().text.to_vec());
        let shape = Shape { code, text: &text };
        match gather.of {
            Gathered::Report { report, .. } => {
                let is_read_only = matches!(report, Report::ReadOnly);
                self.metrics.counters.read_only_refusals += u64::from(is_read_only);
                protocol::encode_report(session.protocol, &shape, &report, &self.server_facts(), &mut reply);
            }
            Gathered::Txn(coordinator) => {
                self.metrics.counters.txns += 1;
                let is_read_only = coordinator.is_read_only();
                self.metrics.counters.read_only_refusals += u64::from(is_read_only);
                if coordinator.empties_the_store() {
                    let report = match coordinator.finish().end {
                        TxnEnd::ReadOnly => Report::ReadOnly,
                        TxnEnd::NotDurable => Report::NotDurable,
                        _ => Report::Done,
                    };
                    protocol::encode_report(session.protocol, &shape, &report, &self.server_facts(), &mut reply);
                } else {
                    let mut results = if has_room || !coordinator.only_reads() {
                        coordinator.finish()
                    } else {
                        self.metrics.counters.out_of_memory += 1;
                        coordinator.refuse()
                    };
                    let reads = session.open_txn.is_some() && results.end == TxnEnd::Success;
                    if reads && protocol::carries_version(session.protocol, &shape) {
                        self.note_read(session, &shape, &mut results);
                    }
                    protocol::encode_txn(session.protocol, &shape, results, &mut reply);
                }
            }
        }
        let metrics = &mut self.metrics;
        session.fill_gathered(number, reply, |slot| count_answered(metrics, slot));
        self.release_gathered(charged_bytes);
    }

    /// The age of what begins now: no two are the same.
    pub(super) fn next_age(&mut self) -> TxnId {
        self.last_age = self.last_age.max(self.now_ns) + 1;
        TxnId {
            clock: self.last_age,
            core: self.core.0,
        }
    }

    /// A core says that one of this core's transactions is in the way of an older request there.
    pub(super) fn wounded(&mut self, link: usize, request: &Request<'_>) {
        let (txn, attempt) = read_wound(request);
        // It may have ended meanwhile.
        let Some((id, number)) = self.coordinated.get(&txn).copied() else {
            return;
        };
        let Some(mut session) = self.sessions.take(id) else {
            return;
        };
        if let Ok(gather) = session.gather(number)
            && let Gathered::Txn(coordinator) = &mut gather.of
        {
            let again = coordinator.wound(link as u16, attempt);
            self.metrics.counters.txn_retries += u64::from(!again.is_empty());
            let to = self.return_to(&session, id, number);
            let decided = Decided {
                decision: Decision::Again,
                epoch: 0,
                writers: &[],
            };
            for core in again {
                self.links[usize::from(core)].push_decision(to, 0, txn, &decided);
            }
            self.unsettled = true;
        }
        self.sessions.restore(id, session);
    }

    pub(super) fn server_facts(&self) -> ServerFacts<'_> {
        ServerFacts {
            config: &self.config,
            process: self.process,
            now: self.now,
            memory_bytes_max: self.pool.limit(),
            table: &self.table,
            core_ports: &self.core_ports,
        }
    }

    /// Does this core's part of a broadcast.
    pub(super) fn answer_broadcast(&mut self, broadcast: Broadcast) -> Report {
        match broadcast {
            // Whoever has noted it is refused when the time comes.
            Broadcast::Flush(_) if self.shards.refuses_writes() => Report::ReadOnly,
            Broadcast::Flush(at) => {
                self.flush_at = at;
                Report::Done
            }
            Broadcast::Metrics(wanted) => {
                let mut metrics = self.metrics.snapshot(wanted.latencies);
                if wanted.hot_keys {
                    metrics.hot_keys = self.hot_keys.hottest(self.now_ns);
                }
                if wanted.slow_log {
                    metrics.slow_log = self.slow.log.entries();
                }
                let counters = &mut metrics.counters;
                self.shards.count(counters);
                self.count_durability(counters);
                counters.connections = self.sessions.connections();
                counters.connection_bytes = self.connection_bytes as u64;
                if self.core.0 == 0 {
                    // It is the process's, not a core's.
                    counters.other_bytes = self.pool.other();
                    counters.process_cpu_us = self.process.user_us + self.process.system_us;
                }
                for link in &self.links {
                    let (requests, bytes) = link.used_credit();
                    counters.mesh_requests += u64::from(requests);
                    counters.mesh_bytes += bytes;
                    counters.mesh_waiting += link.waiting() as u64;
                }
                counters.uptime_ns = self.now_ns - self.started_ns;
                Report::Metrics(vec![(self.core, metrics)])
            }
            Broadcast::ResetMetrics => {
                self.metrics.reset();
                self.hot_keys.clear(self.now_ns);
                self.slow.log.clear();
                Report::Done
            }
            Broadcast::Connections => {
                let shown = self
                    .sessions
                    .iter()
                    .filter(|(_, session)| !session.gone && session.end.is_connection());
                let facts = shown.map(|(id, session)| self.connection_facts(id, session));
                Report::Connections(facts.collect())
            }
            Broadcast::PrefixStats(on) => {
                self.prefixes = on.then(Prefixes::default);
                Report::Done
            }
            Broadcast::Snapshot if self.snapshot() => Report::Done,
            Broadcast::Snapshot => Report::NotDurable,
            Broadcast::PrefixDump => Report::Prefixes(self.prefixes.as_ref().map(Prefixes::counts).unwrap_or_default()),
        }
    }

    fn connection_facts(&self, id: u32, session: &Session) -> ConnectionFacts {
        ConnectionFacts {
            core: self.core,
            number: id,
            protocol: session.protocol.name().to_owned(),
            peer: session.peer.clone(),
            idle_s: self.now.0.saturating_sub(session.last_received_ms) / 1000,
        }
    }
}
