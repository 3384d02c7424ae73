//! Requests that several cores answer together: broadcasts, and groups of commands.

use super::{Engine, Target, WINDOW, count_answered};
use crate::encoding::Rope;
use crate::gather::{Gather, Parts, begin_result, finish_result, in_order};
use crate::link::{BROADCAST_COST_BYTES, Member, Request, Return, cost_bytes};
use crate::metrics::{ConnectionFacts, Prefixes, Report};
use crate::model::{Broadcast, Class, Command};
use crate::protocol::{self, ServerFacts, Shape};
use crate::session::Session;

/// Where a command of a group belongs.
#[derive(Clone, Copy)]
struct Placed {
    hash: u64,
    shard: u16,
    core: u16,
}

impl Engine {
    /// Takes credit of every link that has a cost in `costs`. False, and none taken, when one has too little: the session
    /// waits for that one.
    fn take_credits(&mut self, session: &mut Session, id: u32, costs: &[u32], resumed: Option<u16>) -> bool {
        let costs = costs.iter().enumerate().filter(|(_, cost)| **cost > 0);
        for (link, cost) in costs.clone() {
            if !self.take_credit(link as u16, *cost, resumed) {
                for (link, cost) in costs.take_while(|(taken, _)| *taken < link) {
                    self.links[link].release_credit(*cost);
                }
                self.block_on(session, id, link as u16, resumed);
                return false;
            }
        }
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
        let mut costs = vec![BROADCAST_COST_BYTES; self.links.len()];
        costs[usize::from(self.core.0)] = 0;
        if !self.take_credits(session, id, &costs, resumed) {
            return false;
        }
        let mut report = self.answer_broadcast(broadcast);
        if let Report::Connections(connections) = &mut report {
            // It is taken out of the list while it is served.
            connections.push(self.connection_facts(id, session));
        }
        let gather = Gather::new(shape, costs, Parts::Report(report));
        let number = session.expect_gathered(Class::Other, gather);
        let to = self.return_to(session, id, number);
        for link in (0..self.links.len()).filter(|link| *link != usize::from(self.core.0)) {
            self.metrics.counters.forwarded += 1;
            self.links[link].push_broadcast(to, broadcast);
        }
        self.finish_gathering(session, number);
        true
    }

    /// Executes several commands, each on the core that owns its key. False, and nothing done, when credit is missing
    /// somewhere.
    pub(super) fn group(
        &mut self,
        session: &mut Session,
        id: u32,
        commands: &[Command<'_>],
        shape: &Shape<'_>,
        resumed: Option<u16>,
    ) -> bool {
        let (mut costs, mut placed) = (vec![0; self.links.len()], Vec::with_capacity(commands.len()));
        for command in commands {
            let place = self.table.place(command.key);
            let shard = self.table.shard_of(place.token);
            let core = self.table.core_of(shard).0;
            if core != self.core.0 {
                costs[usize::from(core)] += cost_bytes(command, shape);
            }
            let (hash, shard) = (place.hash, shard.0);
            placed.push(Placed { hash, shard, core });
        }
        if !self.take_credits(session, id, &costs, resumed) {
            return false;
        }
        let class = commands[0].op.class();
        let is_local = costs.iter().all(|cost| *cost == 0);
        let mut own = Rope::default();
        self.execute_own(session, commands, &placed, shape, is_local, &mut own);
        if is_local {
            let (protocol, arrived_ns) = (session.protocol, session.arrived_ns);
            let mut write = |out: &mut Rope| {
                protocol::encode_group(protocol, shape, own.len(), out);
                out.append(&mut own);
            };
            match session.direct() {
                Some(out) => {
                    write(out);
                    self.count_direct(class, arrived_ns);
                }
                None => session.hold(class, write),
            }
            return true;
        }
        let mut cores: Vec<Rope> = (0..self.links.len()).map(|_| Rope::default()).collect();
        cores[usize::from(self.core.0)] = own;
        let order = placed.iter().map(|placed| placed.core).collect();
        let asked: Vec<bool> = costs.iter().map(|cost| *cost > 0).collect();
        let number = session.expect_gathered(class, Gather::new(shape, costs, Parts::Results { order, cores }));
        let to = self.return_to(session, id, number);
        let mut starts = vec![0; self.links.len()];
        for link in (0..self.links.len()).filter(|link| asked[*link]) {
            self.metrics.counters.forwarded += 1;
            starts[link] = self.links[link].begin_group(to, shape.code);
        }
        for (command, placed) in commands.iter().zip(&placed) {
            if placed.core != self.core.0 {
                self.links[usize::from(placed.core)].push_member(placed.hash, placed.shard, command);
            }
        }
        for link in (0..self.links.len()).filter(|link| asked[*link]) {
            self.links[link].finish_group(starts[link]);
        }
        true
    }

    /// Executes those commands of a group whose keys this core owns: `bare` replies one behind the other, or results for
    /// [`in_order`].
    fn execute_own(
        &mut self,
        session: &Session,
        commands: &[Command<'_>],
        placed: &[Placed],
        shape: &Shape<'_>,
        bare: bool,
        out: &mut Rope,
    ) {
        let core = self.core.0;
        for (commands, placed) in commands.chunks(WINDOW).zip(placed.chunks(WINDOW)) {
            let own = placed.iter().filter(|placed| placed.core == core);
            own.clone()
                .for_each(|placed| self.shards.prefetch_bucket(placed.shard, placed.hash));
            own.for_each(|placed| self.shards.prefetch_item(placed.shard, placed.hash));
            for (command, placed) in commands.iter().zip(placed).filter(|(_, placed)| placed.core == core) {
                let start = (!bare).then(|| begin_result(out));
                let target = Target::Output(&mut *out);
                self.execute(placed.shard, placed.hash, command, session.protocol, shape, target);
                if let Some(start) = start {
                    finish_result(out, start);
                }
            }
        }
    }

    /// Executes the commands of another core's group.
    pub(super) fn serve_group(&mut self, link: usize, request: &Request<'_>, large: &mut Rope) {
        let mut members = request.body;
        while !members.0.is_empty() {
            let mut window = arrayvec::ArrayVec::<Member<'_>, WINDOW>::new();
            while !window.is_full() && !members.0.is_empty() {
                let member = Member::read(&mut members);
                self.shards.prefetch_bucket(member.shard, member.hash);
                window.push(member);
            }
            for member in &window {
                self.shards.prefetch_item(member.shard, member.hash);
            }
            for Member { hash, shard, command } in window {
                let start = begin_result(self.links[link].replies());
                self.serve_command(link, request.protocol, &request.shape, hash, shard, command, large);
                finish_result(self.links[link].replies(), start);
            }
        }
    }

    /// Writes the reply of a gathering that misses nobody any more.
    pub(super) fn finish_gathering(&mut self, session: &mut Session, number: u32) {
        let Some(gather) = session.take_gathered(number) else {
            return;
        };
        let mut reply = Rope::default();
        let (parts, code, text) = gather.finish();
        let shape = Shape { code, text: &text };
        match parts {
            Parts::Report(report) => {
                protocol::encode_report(session.protocol, &shape, &report, &self.server_facts(), &mut reply);
            }
            Parts::Results { order, cores } => {
                let mut results = in_order(&order, cores);
                protocol::encode_group(session.protocol, &shape, results.len(), &mut reply);
                reply.append(&mut results);
            }
        }
        let metrics = &mut self.metrics;
        session.fill_gathered(number, reply, |slot| count_answered(metrics, slot));
    }

    pub(super) fn server_facts(&self) -> ServerFacts<'_> {
        ServerFacts {
            config: &self.config,
            process: self.process,
            now: self.now,
            memory_bytes_max: self.shards.budget.pool().limit(),
            table: &self.table,
            core_ports: &self.core_ports,
        }
    }

    /// Does this core's part of a broadcast.
    pub(super) fn answer_broadcast(&mut self, broadcast: Broadcast) -> Report {
        match broadcast {
            Broadcast::Flush(at) => {
                self.shards.flush(at, self.now, &mut self.metrics.counters);
                Report::Done
            }
            Broadcast::Metrics { latencies } => {
                let mut metrics = self.metrics.snapshot(latencies);
                let counters = &mut metrics.counters;
                self.shards.count(counters);
                counters.connections = self.connections;
                counters.uptime_ns = self.now_ns - self.started_ns;
                Report::Metrics(vec![(self.core, metrics)])
            }
            Broadcast::ResetMetrics => {
                self.metrics.reset();
                Report::Done
            }
            Broadcast::Connections => {
                let facts = self.sessions.iter().enumerate().filter_map(|(id, session)| {
                    let session = session.as_ref().filter(|session| !session.gone)?;
                    Some(self.connection_facts(id as u32, session))
                });
                Report::Connections(facts.collect())
            }
            Broadcast::PrefixStats(on) => {
                self.prefixes = on.then(Prefixes::default);
                Report::Done
            }
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
