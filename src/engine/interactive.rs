//! Transactions that a connection builds up command by command.

use super::{Engine, Outcome};
use crate::encoding::{Reader, Rope};
use crate::interactive::OpenTxn;
use crate::model::{Command, Op, Transaction, Version};
use crate::protocol::{self, Buffered, Shape, TxnResults};
use crate::session::{Blocked, Session};

const TOO_MANY: &str = "the transaction has too many commands: roll it back";
const TOO_LARGE: &str = "the transaction is too large: roll it back";
const NO_MEMORY: &str = "the server's memory limit is reached: roll the transaction back";
const TIMED_OUT: &str = "the transaction was silent for too long: roll it back";

impl Engine {
    /// Does a command of a connection's transaction.
    pub(super) fn buffered(
        &mut self,
        session: &mut Session,
        id: u32,
        command: Buffered<'_>,
        shape: &Shape<'_>,
        resumed: Option<u16>,
    ) -> Outcome {
        let done = match command {
            Buffered::Begin { .. } => {
                session.open_txn = Some(Box::default());
                Ok(())
            }
            Buffered::Rollback => {
                self.drop_txn(session);
                Ok(())
            }
            Buffered::Commit => return self.commit(session, id, shape, resumed),
            Buffered::Put { key, value } => self.buffer(session, key, Some(value)),
            Buffered::Delete { key } => self.buffer(session, key, None),
            Buffered::Get { key, checked } => return self.read_in_txn(session, id, key, checked, shape, resumed),
        };
        self.answer_done(session, done);
        Outcome::Done
    }

    fn answer_done(&mut self, session: &mut Session, done: Result<(), &'static str>) {
        let mut line = Rope::default();
        protocol::encode_done(session.protocol, done, &mut line);
        self.answer(session, &line.flat);
    }

    /// Keeps a write for the commit.
    fn buffer(&mut self, session: &mut Session, key: &[u8], value: Option<&[u8]>) -> Result<(), &'static str> {
        let bytes = OpenTxn::bytes_of(key, value);
        let limits = &self.config.limits;
        let (commands_max, bytes_max) = (limits.txn_ops_max as usize, limits.txn_bytes_max.0);
        let Some(open) = &mut session.open_txn else {
            return Ok(());
        };
        if let Some(why) = open.doomed() {
            return Err(why);
        }
        let why = if !open.count(commands_max) {
            TOO_MANY
        } else if (open.bytes + bytes) as u64 > bytes_max {
            TOO_LARGE
        } else if !self.shards.budget.charge(bytes) {
            NO_MEMORY
        } else {
            // Taken back with the others if it cannot be kept.
            open.bytes += bytes;
            if open.write(key, value) {
                return Ok(());
            }
            NO_MEMORY
        };
        self.doom(session, why);
        Err(why)
    }

    /// A transaction cannot be committed any more. It stays open, so that what follows is not taken for commands outside.
    fn doom(&mut self, session: &mut Session, why: &'static str) {
        if let Some(open) = &mut session.open_txn {
            open.doom(why);
            self.shards
                .budget
                .release_when_measured(std::mem::take(&mut open.bytes));
        }
    }

    /// Dooms a transaction whose connection was silent for too long.
    pub(super) fn doom_if_silent(&mut self, session: &mut Session) {
        let limit_ms = self.config.limits.txn_idle_timeout.as_millis() as u64;
        let silent_ms = self.now.0.saturating_sub(session.last_received_ms);
        // Who waits for credit was not silent; and what its COMMIT has got of it already must be used.
        let waits = matches!(session.blocked, Blocked::Credit(_));
        if limit_ms > 0 && silent_ms >= limit_ms && session.in_flight() == 0 && !waits {
            self.doom(session, TIMED_OUT);
        }
    }

    /// Forgets a connection's transaction.
    pub(super) fn drop_txn(&mut self, session: &mut Session) {
        if let Some(open) = session.open_txn.take() {
            self.shards.budget.release_when_measured(open.bytes);
        }
    }

    /// Reads a key: what the transaction wrote itself, or what is committed.
    fn read_in_txn(
        &mut self,
        session: &mut Session,
        id: u32,
        key: &[u8],
        checked: bool,
        shape: &Shape<'_>,
        resumed: Option<u16>,
    ) -> Outcome {
        let Some(open) = &mut session.open_txn else {
            return Outcome::Done;
        };
        if let Some(why) = open.doomed() {
            self.answer_done(session, Err(why));
            return Outcome::Done;
        }
        if let Some(written) = open.written(key) {
            let mut line = Rope::default();
            protocol::encode_own(session.protocol, written, &mut line);
            self.answer(session, &line.flat);
            return Outcome::Done;
        }
        if checked {
            // What it remembers of its reads counts, too.
            let bytes = OpenTxn::bytes_of(key, None);
            if open.bytes as u64 + bytes as u64 > self.config.limits.txn_bytes_max.0 {
                self.doom(session, TOO_LARGE);
                self.answer_done(session, Err(TOO_LARGE));
                return Outcome::Done;
            }
        }
        let version = checked;
        let read = Command {
            key,
            op: Op::Get { version, effects: None },
        };
        let txn = Transaction {
            checks: &[],
            success: &[read],
            failure: &[],
        };
        if self.transact(session, id, &txn, shape, resumed) {
            Outcome::Done
        } else {
            Outcome::NotYet
        }
    }

    /// Notes the version that a checked read has brought, and takes it out of the reply.
    pub(super) fn note_read(&mut self, session: &mut Session, shape: &Shape<'_>, results: &mut TxnResults) {
        let (key, line) = (shape.text, &mut results.replies.flat);
        let mut head = Reader(&line[..VERSION_BYTES]);
        let version = Version(head.u64());
        let found = match head.u8() {
            0 => Some(None),
            1 => Some(Some(version)),
            // It could not be read.
            _ => None,
        };
        if let Some(found) = found
            && let Some(open) = &mut session.open_txn
            && open.doomed().is_none()
        {
            let bytes = OpenTxn::bytes_of(key, None);
            self.shards.budget.charge_always(bytes);
            open.bytes += bytes;
            open.note_read(key, found);
        }
        line.drain(..VERSION_BYTES);
    }

    fn commit(&mut self, session: &mut Session, id: u32, shape: &Shape<'_>, resumed: Option<u16>) -> Outcome {
        let Some(open) = session.open_txn.take() else {
            return Outcome::Done;
        };
        let (checks, success) = open.commands();
        if open.doomed().is_some() || checks.is_empty() && success.is_empty() {
            let done = open.doomed().map_or(Ok(()), Err);
            self.shards.budget.release(open.bytes);
            self.answer_done(session, done);
            return Outcome::Done;
        }
        let txn = Transaction {
            checks: &checks,
            success: &success,
            failure: &[],
        };
        if !self.transact(session, id, &txn, shape, resumed) {
            session.open_txn = Some(open);
            return Outcome::NotYet;
        }
        self.shards.budget.release(open.bytes);
        Outcome::Done
    }
}

/// What stands before the line of a checked read: the version, and whether there was an item.
const VERSION_BYTES: usize = 9;
