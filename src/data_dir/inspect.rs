//! Tells people what is in a data directory, and what of it is damaged. Nothing is changed.

use super::recovery::{CoreLog, ImageReader, LogReader, Old, Past, Search, malformed};
use super::{Names, Problem, manifest};
use crate::disk::Disk;
use crate::effect::{self, Effect};
use crate::frame::{self, Frame, Pieces};
use crate::model::Deadline;
use std::sync::Arc;

/// Of a value, so many bytes are shown.
const VALUE_BYTES_SHOWN: usize = 80;

/// Hands what there is to `line`, line by line, with every record where that is wanted; returns how often something was damaged.
///
/// # Errors
/// When there is no data directory, or it cannot be read.
pub fn describe(disk: &Arc<dyn Disk>, name: &str, records: bool, line: &mut dyn FnMut(&str)) -> Result<usize, Problem> {
    let names = Names(name.into());
    let Some(manifest) = manifest::read(&**disk, &names)? else {
        return Err(names.problem("MANIFEST", None, "there is none", "name a data directory"));
    };
    let layout = &manifest.layout;
    line(&format!(
        "data directory {name}: format version {}, number {}, partitioner {}, token seed {}, {} shards, generation {}",
        manifest.format, manifest.directory.0, layout.partitioner, layout.token_seed.0, layout.shards, manifest.present
    ));
    let mut search = Search::new(disk, &names, &manifest, true);
    let past = Past::find(&mut search, &manifest)?;
    let mut inspection = Inspection {
        disk,
        names: &names,
        past: &past,
        search: &search,
        records,
        line,
        damages: 0,
    };
    inspection.images();
    for old in &past.generations {
        inspection.generation(old);
    }
    let damages = inspection.damages + search.damages;
    for warning in &search.warnings {
        line(&format!("warning: {warning}"));
    }
    line(&match damages {
        0 => "nothing is damaged".to_owned(),
        1 => "1 thing is damaged".to_owned(),
        count => format!("{count} things are damaged"),
    });
    Ok(damages)
}

struct Inspection<'a> {
    disk: &'a Arc<dyn Disk>,
    names: &'a Names,
    past: &'a Past,
    search: &'a Search<'a>,
    records: bool,
    line: &'a mut dyn FnMut(&str),
    damages: usize,
}

/// What was read of a segment.
#[derive(Default)]
struct Sum {
    frames: u64,
    bytes: u64,
    first: Option<Frame>,
    last: Frame,
}

impl Sum {
    fn add(&mut self, frame: Frame, body: &[u8]) {
        self.frames += 1;
        self.bytes += body.len() as u64;
        self.first.get_or_insert(frame);
        self.last = frame;
    }

    fn text(&self) -> String {
        let (frames, bytes) = (self.frames, self.bytes);
        let Some(first) = self.first else {
            return "no frames that count".to_owned();
        };
        let (to, end) = (
            self.last.sequence,
            if self.last.flags & frame::END == 0 {
                ""
            } else {
                ", ended in order"
            },
        );
        format!(
            "frames {} to {to} ({frames}), {bytes} bytes of effects from position {}, epochs {} to {}, times {} to {}{end}",
            first.sequence, first.position, first.epoch, self.last.epoch, first.time, self.last.time
        )
    }
}

impl Inspection<'_> {
    fn damaged(&mut self, problem: &Problem) {
        self.damages += 1;
        let told = Problem {
            remedy: String::new(),
            ..problem.clone()
        };
        (self.line)(&format!("damaged: {told}"));
    }

    /// Those that would be used.
    fn images(&mut self) {
        for name in self.past.images.iter().flatten() {
            let mut reader = ImageReader::new(*name, vec![]);
            let mut pieces = Pieces::default();
            let (mut items, mut sum) = (0, Sum::default());
            let whole = loop {
                match reader.next(&**self.disk, self.names, self.search.seal, self.past.directory) {
                    Ok(Some(found)) => {
                        sum.add(found.frame, found.body);
                        let frame = found.frame;
                        let read = pieces.add(&frame, found.body).map(|(at, effects)| {
                            items += count(effects);
                            show(self.records, &frame, at, effects, self.line)
                        });
                        if read == Some(false) {
                            break Err(malformed(self.names, &name.path(), found.offset));
                        }
                    }
                    Ok(None) => break Ok(()),
                    Err(problem) => break Err(problem),
                }
            };
            reader.count(items);
            let text = format!(
                "{}: shard {}, generation {}, position {}, {items} items, {} bytes of effects",
                name.path(),
                name.shard,
                name.generation,
                name.position,
                sum.bytes
            );
            (self.line)(&text);
            if let Err(problem) = whole.and_then(|()| reader.check_count(self.names)) {
                self.damaged(&problem);
            }
        }
    }

    fn generation(&mut self, old: &Old) {
        let described = &old.described;
        let number = described.number;
        let cores = described.runs.len();
        let counts = match (old.closed, described.is_always()) {
            (None, _) => "everything counts".to_owned(),
            (Some(closed), true) => format!(
                "everything counts but {} transactions after epoch {closed}",
                old.dropped.len()
            ),
            (Some(closed), false) => format!("what was done up to epoch {closed} counts"),
        };
        (self.line)(&format!(
            "generation {number}: durability {}, {cores} cores, {counts}",
            described.durability
        ));
        let mut dropped: Vec<_> = old.dropped.iter().collect();
        dropped.sort_unstable();
        for (core, clock) in dropped {
            (self.line)(&format!(
                "  the transaction of core {core} with clock {clock} does not count"
            ));
        }
        for log in &old.logs {
            self.log(log);
        }
    }

    fn log(&mut self, log: &CoreLog) {
        let mut sums: Vec<Sum> = log.segments.iter().map(|_| Sum::default()).collect();
        let mut reader = LogReader::new(0, vec![]);
        let mut pieces = Pieces::default();
        let read = loop {
            match reader.next(&**self.disk, self.names, self.search.seal, log) {
                Ok(Some(found)) => {
                    let frame = found.frame;
                    let has = |segment: &super::recovery::Segment| segment.head.sequence <= frame.sequence;
                    if let Some(sum) = log.segments.iter().rposition(has).and_then(|at| sums.get_mut(at)) {
                        sum.add(frame, found.body);
                    }
                    let shown = pieces
                        .add(&frame, found.body)
                        .is_none_or(|(at, effects)| show(self.records, &frame, at, effects, self.line));
                    if !shown {
                        break Err(malformed(self.names, log.path(frame.sequence), found.offset));
                    }
                }
                Ok(None) => break Ok(()),
                Err(problem) => break Err(problem),
            }
        };
        for (segment, sum) in log.segments.iter().zip(&sums) {
            let head = &segment.head;
            let (first, last) = (head.first_shard, head.first_shard.saturating_add(head.shards));
            (self.line)(&format!(
                "{}: core {} of {}, shards {first} to {} (exclusive), {}",
                segment.path,
                head.core,
                head.cores,
                last,
                sum.text()
            ));
        }
        if let Err(problem) = read {
            self.damaged(&problem);
        }
    }
}

fn count(mut effects: &[u8]) -> u64 {
    let mut items = 0;
    while !effects.is_empty() && effect::read(&mut effects).is_ok() {
        items += 1;
    }
    items
}

/// Shows effects, or only looks whether they are any; false when they are not.
fn show(records: bool, frame: &Frame, position: u64, effects: &[u8], line: &mut dyn FnMut(&str)) -> bool {
    let mut rest = effects;
    while !rest.is_empty() {
        let at = position + (effects.len() - rest.len()) as u64;
        let Ok(effect) = effect::read(&mut rest) else {
            return false;
        };
        if records {
            line(&format!("  {at} epoch {} {}", frame.epoch, text(&effect)));
        }
        if let Effect::Part(part) = effect
            && !show(records, frame, at, part.effects, line)
        {
            return false;
        }
    }
    true
}

fn text(effect: &Effect<'_>) -> String {
    let rest = |deadline: Deadline, state: u8| match deadline {
        Deadline::Never => format!("state {state}"),
        Deadline::At(moment) => format!("until {}, state {state}", moment.0),
    };
    match effect {
        Effect::Put(image) => {
            let shown = &image.value[..image.value.len().min(VALUE_BYTES_SHOWN)];
            let cut = if shown.len() < image.value.len() { "..." } else { "" };
            format!(
                "put '{}' '{}'{cut} ({} bytes, flags {}, {})",
                image.key.escape_ascii(),
                shown.escape_ascii(),
                image.value.len(),
                image.flags,
                rest(image.deadline, image.state)
            )
        }
        Effect::Delete(key) => format!("delete '{}'", key.escape_ascii()),
        Effect::Amend { key, deadline, state } => {
            format!("amend '{}' ({})", key.escape_ascii(), rest(*deadline, *state))
        }
        Effect::Empty => "empty".to_owned(),
        Effect::Part(part) => format!(
            "part of the transaction of core {} with clock {}, epoch {}, written by cores {:?}:",
            part.core,
            part.clock,
            part.epoch,
            part.writers().collect::<Vec<_>>()
        ),
    }
}
