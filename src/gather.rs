//! A reply that several cores give together, while some of them have not answered.

use crate::encoding::{Reader, Rope};
use crate::metrics::Report;
use crate::protocol::Shape;

/// What was gathered so far.
#[derive(Debug)]
pub(crate) struct Gather {
    shape_code: u32,
    shape_text: Box<[u8]>,
    /// By core: what the request costs of the credit of its link.
    costs: Vec<u32>,
    /// How many cores have not answered.
    missing: u16,
    parts: Parts,
}

/// The cores' parts.
#[derive(Debug)]
pub(crate) enum Parts {
    /// Of a broadcast: merged as they come.
    Report(Report),
    /// Of a group of commands.
    Results {
        /// For each command, in order, the core that answers it.
        order: Box<[u16]>,
        /// By core: its results, each from [`begin_result`] to [`finish_result`].
        cores: Vec<Rope>,
    },
}

impl Gather {
    /// The cores with `costs` are to answer beside what `parts` holds already.
    pub(crate) fn new(shape: &Shape<'_>, costs: Vec<u32>, parts: Parts) -> Self {
        Self {
            shape_code: shape.code,
            shape_text: shape.text.into(),
            missing: costs.iter().filter(|cost| **cost > 0).count() as u16,
            costs,
            parts,
        }
    }

    /// It gathers a report, not results.
    pub(crate) fn is_report(&self) -> bool {
        matches!(self.parts, Parts::Report(_))
    }

    /// What the request costs of the credit of a core's link, in bytes.
    pub(crate) fn cost_bytes(&self, core: u16) -> u32 {
        self.costs[usize::from(core)]
    }

    /// Nobody is missing.
    pub(crate) fn is_complete(&self) -> bool {
        self.missing == 0
    }

    /// Takes what a core said: `length` flat bytes of `source` at `start`, with `splices` large values.
    pub(crate) fn take(&mut self, core: u16, source: &mut Rope, start: usize, length: usize, splices: usize) {
        self.missing -= 1;
        match &mut self.parts {
            Parts::Report(report) => {
                let mut reader = Reader(&source.flat[start..start + length]);
                report.merge(Report::read(&mut reader));
            }
            Parts::Results { cores, .. } => {
                cores[usize::from(core)].append_from(source, start, length, splices);
            }
        }
    }

    /// What came of it, with the code and the text of the shape to write it in.
    pub(crate) fn finish(self) -> (Parts, u32, Box<[u8]>) {
        (self.parts, self.shape_code, self.shape_text)
    }
}

const RESULT_HEADER_BYTES: usize = 6;

/// Where a result began.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ResultStart {
    flat: usize,
    splices: usize,
}

/// Begins one result for the gathering core. What is written behind it is its content, until [`finish_result`].
#[inline]
pub(crate) fn begin_result(out: &mut Rope) -> ResultStart {
    let start = ResultStart {
        flat: out.flat.len(),
        splices: out.splices.len(),
    };
    out.push(&[0; RESULT_HEADER_BYTES]);
    start
}

/// Ends the result that began at `start`: writes its length and the number of its large values before it.
#[inline]
pub(crate) fn finish_result(out: &mut Rope, start: ResultStart) {
    let length = (out.flat.len() - start.flat - RESULT_HEADER_BYTES) as u32;
    let splices = (out.splices.len() - start.splices) as u16;
    let header = &mut out.flat[start.flat..start.flat + RESULT_HEADER_BYTES];
    header[..4].copy_from_slice(&length.to_le_bytes());
    header[4..].copy_from_slice(&splices.to_le_bytes());
}

/// The results of all cores, in the order of the commands.
pub(crate) fn in_order(order: &[u16], mut cores: Vec<Rope>) -> Rope {
    let mut results = Rope::default();
    let mut read = vec![0; cores.len()];
    for core in order {
        let (at, source) = (&mut read[usize::from(*core)], &mut cores[usize::from(*core)]);
        let mut header = Reader(&source.flat[*at..*at + RESULT_HEADER_BYTES]);
        let (length, splices) = (header.u32() as usize, usize::from(header.u16()));
        *at += RESULT_HEADER_BYTES;
        results.append_from(source, *at, length, splices);
        *at += length;
    }
    results
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    /// Whoever answers first, the results stand in the order of the commands, large values among them.
    #[test]
    fn results_stand_in_order() {
        let order = [1u16, 0, 1, 1, 0];
        let mut said = [Rope::default(), Rope::default()];
        for (number, core) in order.iter().enumerate() {
            let out = &mut said[usize::from(*core)];
            let start = begin_result(out);
            out.push(format!("<{number}:").as_bytes());
            if number % 2 == 0 {
                out.splice(Bytes::from(format!("LARGE{number}")));
            }
            out.push(b">");
            finish_result(out, start);
        }
        let parts = Parts::Results {
            order: order.into(),
            cores: vec![Rope::default(); 2],
        };
        let mut gather = Gather::new(&Shape::code(7), vec![1, 1], parts);
        for core in [1, 0] {
            let source = &mut said[core];
            let (length, splices) = (source.flat.len(), source.splices.len());
            assert!(!gather.is_complete());
            gather.take(core as u16, source, 0, length, splices);
        }
        assert!(gather.is_complete() && !gather.is_report());
        let (Parts::Results { order, cores }, 7, _) = gather.finish() else {
            panic!("it gathers results")
        };
        let expected = b"<0:LARGE0><1:><2:LARGE2><3:><4:LARGE4>";
        assert_eq!(in_order(&order, cores).to_vec(), expected);
    }
}
