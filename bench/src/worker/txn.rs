//! Requests that are transactions: how they begin, and how they go on when a reply is not the end of them.

use super::{Batch, Connection, Flight, Parsed, Source, Tag, Verdict, Worker, entries};
use crate::protocol::{Item, Op, Protocol, TxnReply, TxnRequest, TxnState};
use crate::stats::ErrorKind;
use crate::workload::{Command, TxnSpec};

impl<P: Protocol> Worker<'_, P> {
    /// Queues a transaction on keys that are drawn now.
    pub(super) fn push_txn(&mut self, connection: &mut Connection<P>, txn: TxnSpec, start_ns: u64) {
        let at = connection.push(Flight::new(Command::Txn, 0, start_ns));
        let batch = &mut connection.batches[at];
        batch.operations.clear();
        (batch.retries, batch.failed) = (0, false);
        self.taken.clear();
        for _ in 0..txn.operations {
            // An optimistic transaction writes all that it reads.
            let command = if txn.checked { Command::Set } else { self.draw_command() };
            let key = self.choosers[connection.chooser].pick_another(&mut self.rng, &mut self.taken);
            batch.operations.push(Tag::new(command, key));
        }
        batch.stand_at(match txn.checked {
            true => TxnRequest::Checked,
            false => TxnRequest::Plain,
        });
        self.ask(batch, &mut connection.out);
    }

    /// Queues what comes next of the transaction whose reply came from the place `from` of the ring. Its latency began at
    /// `start_ns`, and goes on.
    pub(super) fn go_on(&mut self, connection: &mut Connection<P>, from: usize, start_ns: u64) {
        if self.source == Source::Nothing {
            // The run is over; what has not been committed has done nothing.
            return;
        }
        let at = connection.push(Flight::new(Command::Txn, 0, start_ns));
        connection.batches.swap(from, at);
        self.ask(&connection.batches[at], &mut connection.out);
    }

    /// Appends the request that the batch stands at. What it read is in `items`, if it read before.
    fn ask(&mut self, batch: &Batch, out: &mut Vec<u8>) {
        self.keys.clear();
        for tag in &batch.operations {
            self.keys.push(self.population.key(tag.key(), &mut self.scratch));
        }
        let entries = entries(self.population, batch, &self.keys);
        let ops = entries
            .clone()
            .zip(&batch.operations)
            .map(|(entry, tag)| match tag.command() {
                Command::Get => Op::Get(entry.key),
                Command::Delete => Op::Delete(entry.key),
                _ => Op::Set(entry),
            });
        match batch.state.request {
            TxnRequest::Plain => P::txn(out, ops),
            TxnRequest::Checked => P::checked_txn(out, entries),
            TxnRequest::Writes => P::checked_writes(out, entries, &self.items),
        }
    }

    /// Reads the reply to a transaction's request, or a part of it. If the transaction goes on, the batch stands at the next
    /// request.
    pub(super) fn txn_reply(&mut self, batch: &mut Batch, rest: &[u8]) -> Parsed<Verdict> {
        let mut items = std::mem::take(&mut self.items);
        let command = |i: usize| batch.operations[i].command();
        let parsed = match P::txn_reply(batch.state, batch.operations.len(), command, rest, &mut items) {
            Parsed::Done(reply, len) => {
                batch.failed |= !self.check_reads(batch, &items, rest);
                Parsed::Done(self.judge_txn(batch, reply), len)
            }
            Parsed::Incomplete => Parsed::Incomplete,
            Parsed::Malformed => Parsed::Malformed,
        };
        self.items = items;
        parsed
    }

    fn judge_txn(&mut self, batch: &mut Batch, reply: TxnReply<'_>) -> Verdict {
        if let TxnReply::Failing(text) | TxnReply::Refused(text) = reply
            && !batch.failed
        {
            // The first reason is why all that follows is refused, too.
            self.tally.error(ErrorKind::Refused, 1, text);
            batch.failed = true;
        }
        match reply {
            TxnReply::Part | TxnReply::Failing(_) => {
                batch.state.parts += 1;
                Verdict::Part
            }
            _ if batch.failed => Verdict::Bad,
            TxnReply::Committed => Verdict::Good,
            TxnReply::Read => {
                batch.stand_at(TxnRequest::Writes);
                Verdict::GoesOn
            }
            TxnReply::Changed => {
                batch.stand_at(TxnRequest::Checked);
                batch.retries += 1;
                if self.recording {
                    self.tally.retry(batch.retries);
                }
                Verdict::GoesOn
            }
            TxnReply::Refused(_) => Verdict::Bad,
        }
    }

    /// Whether the next values that a transaction read are those of their keys; counts what was found, and what is wrong.
    fn check_reads(&mut self, batch: &mut Batch, items: &[Item], rest: &[u8]) -> bool {
        let all = batch.state.request == TxnRequest::Checked;
        let mut good = true;
        for item in items {
            let unread = &batch.operations[batch.unread..];
            let Some(next) = unread.iter().position(|tag| all || tag.command() == Command::Get) else {
                break;
            };
            batch.unread += next + 1;
            match &item.value {
                Some(value) => good &= self.check_value(unread[next].key(), &rest[value.clone()]),
                None => self.tally.misses(self.recording as u64),
            }
        }
        good
    }
}

impl Batch {
    /// The next request of the transaction is this one, of which nothing has been answered.
    fn stand_at(&mut self, request: TxnRequest) {
        self.state = TxnState { request, parts: 0 };
        self.unread = 0;
    }
}
