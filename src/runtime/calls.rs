//! What handlers ask of the engine: calls that they await.

use super::gateway::Handlers;
use crate::config::Config;
use crate::encoding::Rope;
use crate::model::{Command, Put, Transaction, UnixMillis};
use crate::protocol::Protocol;
use crate::protocol::call::{self, Answer, Outcome, Text, TxnAnswer};
use std::borrow::Cow;
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;

/// Calls that are kept for reuse, on one core.
const IDLE_CALLS_MAX: usize = 256;

/// A protocol's way to the engine of its core.
#[derive(Clone)]
pub(super) struct Calls {
    handlers: Rc<Handlers>,
    protocol: Protocol,
    is_durable: bool,
}

impl Calls {
    pub(super) fn new(handlers: Rc<Handlers>, protocol: Protocol) -> Self {
        Self {
            handlers,
            protocol,
            is_durable: false,
        }
    }

    /// The same, where commands and transactions are answered when what the answer tells is safe.
    pub(super) fn durable(&self) -> Self {
        Self {
            is_durable: true,
            ..self.clone()
        }
    }

    fn begin(&self, request: &mut [u8]) -> Call {
        if self.is_durable {
            call::make_durable(request);
        }
        let idle = self.handlers.idle_calls.borrow_mut().pop();
        let mut engine = self.handlers.engine.borrow_mut();
        let id = engine.open_call(self.protocol, idle);
        engine.call(id, request);
        Call {
            handlers: self.handlers.clone(),
            id,
        }
    }

    /// Executes a command.
    pub(super) async fn execute(&self, command: &Command<'_>) -> Answer {
        let mut request = Vec::with_capacity(64 + command.key.len());
        call::push_request(&mut request, command);
        let call = self.begin(&mut request);
        let answer = call.answer().await;
        call.read(answer)
    }

    /// Begins to write a large value, of which `bytes` are to follow. `put` says everything else of it.
    pub(super) fn announce(&self, key: &[u8], put: Put<'_>, bytes: usize) -> Upload {
        let mut request = Vec::with_capacity(64 + key.len());
        call::push_announced(&mut request, key, put, bytes);
        Upload(self.begin(&mut request))
    }

    /// Executes a transaction.
    pub(super) async fn transact(&self, txn: &Transaction<'_>) -> TxnAnswer {
        let mut request = vec![];
        call::push_transaction(&mut request, txn);
        let call = self.begin(&mut request);
        call::read_txn_answer(call.answer().await)
    }

    /// What the server says about itself.
    pub(super) async fn text(&self, text: Text) -> Vec<u8> {
        let mut request = vec![];
        call::push_text_request(&mut request, text);
        let call = self.begin(&mut request);
        call.answer().await.flat
    }

    /// Begins a snapshot of the data directory.
    pub(super) async fn snapshot(&self) -> Outcome {
        let mut request = vec![];
        call::push_snapshot_request(&mut request);
        let call = self.begin(&mut request);
        let answer = call.answer().await;
        call.read(answer).outcome
    }

    /// Why the log cannot be written any more.
    pub(super) fn log_failure(&self) -> Option<String> {
        let engine = self.handlers.engine.borrow();
        engine.log_failure().map(Cow::into_owned)
    }

    /// There is a log at all.
    pub(super) fn has_log(&self) -> bool {
        self.handlers.config.data_dir.is_some()
    }

    /// The options that the server was started with.
    pub(super) fn config(&self) -> &Arc<Config> {
        &self.handlers.config
    }

    /// The turn's time.
    pub(super) fn now(&self) -> UnixMillis {
        self.handlers.engine.borrow().now()
    }

    /// Everything is loaded, and all listeners listen.
    pub(super) fn is_ready(&self) -> bool {
        self.handlers.shared.ready.load(Ordering::Acquire)
    }

    /// The server stops.
    pub(super) fn is_stopping(&self) -> bool {
        self.handlers.is_stopping()
    }
}

/// A write whose value comes in pieces.
pub(super) struct Upload(Call);

impl Upload {
    /// There is no memory for it: nothing more is to be sent.
    pub(super) fn refused(&self) -> Option<Answer> {
        let answer = self.0.handlers.engine.borrow_mut().take_answer(self.0.id)?;
        Some(self.0.read(answer))
    }

    /// The next piece.
    pub(super) fn send(&self, piece: &[u8]) {
        self.0.handlers.engine.borrow_mut().call(self.0.id, piece);
    }

    /// What came of it, when all has been sent.
    pub(super) async fn finish(self) -> Answer {
        let answer = self.0.answer().await;
        self.0.read(answer)
    }
}

/// One call that is under way. Dropping it gives up on its answer.
struct Call {
    handlers: Rc<Handlers>,
    id: u32,
}

impl Call {
    async fn answer(&self) -> Rope {
        poll_fn(|context| match self.handlers.engine.borrow_mut().take_answer(self.id) {
            Some(answer) => Poll::Ready(answer),
            None => {
                self.handlers.wake_on(self.id, context);
                Poll::Pending
            }
        })
        .await
    }

    fn read(&self, answer: Rope) -> Answer {
        let (answer, buffer) = call::read_answer(answer);
        self.handlers.engine.borrow_mut().recycle_answer(buffer);
        answer
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let mut idle = self.handlers.idle_calls.borrow_mut();
        let keep = idle.len() < IDLE_CALLS_MAX;
        if self.handlers.engine.borrow_mut().close_call(self.id, keep) {
            idle.push(self.id);
        }
    }
}
