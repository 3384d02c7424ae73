//! A reply that several cores give together, while some of them have not answered.

use crate::encoding::{Reader, Rope};
use crate::metrics::Report;
use crate::protocol::Shape;
use crate::txn::Coordinator;

/// What was gathered so far, and how the reply is to be written.
#[derive(Debug)]
pub(crate) struct Gather {
    shape_code: u32,
    shape_text: Box<[u8]>,
    pub(crate) of: Gathered,
}

/// What is gathered.
#[derive(Debug)]
pub(crate) enum Gathered {
    /// The answers to a broadcast: merged as they come.
    Report {
        /// Those that have come.
        report: Report,
        /// How many cores have not answered.
        missing: u16,
        /// What the request costs of each link's credit.
        cost_bytes: u32,
    },
    /// The parts of a transaction.
    Txn(Coordinator),
}

impl Gather {
    /// Nothing but what `of` holds already.
    pub(crate) fn new(shape: &Shape<'_>, of: Gathered) -> Self {
        Self {
            shape_code: shape.code,
            shape_text: shape.text.into(),
            of,
        }
    }

    /// How the reply is to be written.
    pub(crate) fn shape(&self) -> Shape<'_> {
        Shape {
            code: self.shape_code,
            text: &self.shape_text,
        }
    }

    /// Takes what a core said: `length` flat bytes of `source` at `start`, with `splices` large values.
    pub(crate) fn take(&mut self, core: u16, source: &mut Rope, start: usize, length: usize, splices: usize) {
        match &mut self.of {
            Gathered::Report { report, missing, .. } => {
                *missing -= 1;
                let mut reader = Reader(&source.flat[start..start + length]);
                report.merge(Report::read(&mut reader));
            }
            Gathered::Txn(coordinator) => coordinator.take(core, source, start, length, splices),
        }
    }
}
