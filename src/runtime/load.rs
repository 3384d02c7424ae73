//! Loading a file of rows `<key> <value>` before serving.
//!
//! Every core reads the whole file and stores the rows whose keys are its own. That reads the file once per core, from the
//! page cache, and needs no queue between cores; rows of one key stay in their order, so the last one wins. It does so piece by
//! piece, between which the core's other work goes on: who asks by HTTP how the server is gets an answer.

use super::{LoadReport, StartError};
use crate::config::Config;
use crate::engine::{Engine, Loaded};
use crate::model::CoreId;
use indicatif::{ProgressBar, ProgressStyle};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How much is read at once.
const READ_BYTES: usize = 256 << 10;
/// One piece of loading: so many rows, or so many bytes and the rest of a row. A millisecond or two, unless rows are larger.
const PIECE_ROWS: usize = 2048;
const PIECE_BYTES: u64 = 256 << 10;
/// Malformed rows that are named; the rest is counted.
const NAMED_ROWS_MAX: u64 = 10;

/// A row of the file.
#[derive(Debug, PartialEq, Eq)]
enum Row<'a> {
    Empty,
    Pair(&'a [u8], &'a [u8]),
    /// Not to be understood, and why.
    Malformed(&'static str),
}

/// Understands a row: the key ends at the first run of blanks (spaces and tabs), the value is the rest without its line end.
fn parse(line: &[u8], key_bytes_max: usize, value_bytes_max: u64) -> Row<'_> {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    if line.is_empty() {
        return Row::Empty;
    }
    let is_blank = |byte: &u8| *byte == b' ' || *byte == b'\t';
    let key_end = line.iter().position(is_blank).unwrap_or(line.len());
    let value_start = line[key_end..]
        .iter()
        .position(|byte| !is_blank(byte))
        .map(|blanks| key_end + blanks);
    match value_start {
        _ if key_end == 0 => Row::Malformed("it begins with a blank"),
        _ if key_end > key_bytes_max => Row::Malformed("its key is longer than --key-size-max"),
        None => Row::Malformed("it has no value"),
        Some(start) if (line.len() - start) as u64 > value_bytes_max => {
            Row::Malformed("its value is larger than --item-size-max")
        }
        Some(start) => Row::Pair(&line[..key_end], &line[start..]),
    }
}

/// Reads the file and stores this core's rows, a piece at a time. Core 0 reports for all: progress, malformed rows.
pub(super) struct Loader {
    path: PathBuf,
    strict: bool,
    reports: bool,
    reader: BufReader<File>,
    bar: ProgressBar,
    key_bytes_max: usize,
    value_bytes_max: u64,
    /// The row that is read. It may be a key, blanks and a value; a longer one is not kept in memory whole.
    line: Vec<u8>,
    line_bytes_max: u64,
    /// What is read next is the rest of a row that is too long.
    is_inside_row: bool,
    /// Rows read.
    number: u64,
    /// Bytes read, and of those, how many the bar shows.
    read: u64,
    shown: u64,
    began: Instant,
    report: LoadReport,
}

impl Loader {
    /// Opens the file that the options name; `None` when they name none.
    pub(super) fn open(config: &Config, core: CoreId) -> Result<Option<Self>, StartError> {
        let Some(path) = &config.load else { return Ok(None) };
        let began = Instant::now();
        let reports = core == CoreId(0);
        let failed = |error| cannot_load(path, &error);
        let file = File::open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            let path = path.display();
            return Err(StartError(format!(
                "cannot load {path}: it is not a regular file, and every core reads it for itself"
            )));
        }
        let bar = if reports {
            ProgressBar::new(metadata.len())
        } else {
            ProgressBar::hidden()
        };
        let style = "loading {bar:40} {percent}% of {total_bytes}, {bytes_per_sec}, {eta} left";
        bar.set_style(ProgressStyle::with_template(style).map_err(|error| StartError(error.to_string()))?);
        let (key_bytes_max, value_bytes_max) = (usize::from(config.limits.key_size_max), config.limits.item_size_max.0);
        Ok(Some(Self {
            path: path.clone(),
            strict: config.load_strict,
            reports,
            reader: BufReader::with_capacity(READ_BYTES, file),
            bar,
            key_bytes_max,
            value_bytes_max,
            line: vec![],
            line_bytes_max: value_bytes_max + key_bytes_max as u64 + 4096,
            is_inside_row: false,
            number: 0,
            read: 0,
            shown: 0,
            began,
            report: LoadReport {
                rows: 0,
                malformed: 0,
                duration: Duration::ZERO,
            },
        }))
    }

    /// Loads a piece, of one row at the least. What it came to, when that was the last one.
    pub(super) fn step(&mut self, engine: &mut Engine) -> Result<Option<LoadReport>, StartError> {
        let read_max = self.read + PIECE_BYTES;
        for _ in 0..PIECE_ROWS {
            if !self.row(engine)? {
                self.bar.finish_and_clear();
                self.report.duration = self.began.elapsed();
                return Ok(Some(self.report));
            }
            if self.read >= read_max {
                break;
            }
        }
        if self.read - self.shown >= READ_BYTES as u64 {
            self.shown = self.read;
            self.bar.set_position(self.read);
        }
        Ok(None)
    }

    /// Loads a row, or skips a piece of one that is too long. False at the end of the file.
    fn row(&mut self, engine: &mut Engine) -> Result<bool, StartError> {
        let failed = |error| cannot_load(&self.path, &error);
        if self.is_inside_row {
            let (skipped, ended) = skip(&mut self.reader).map_err(failed)?;
            self.read += skipped as u64;
            self.is_inside_row = !ended;
            return Ok(true);
        }
        self.line.clear();
        let length = read_line(&mut self.reader, &mut self.line, self.line_bytes_max).map_err(failed)?;
        if length == 0 {
            return Ok(false);
        }
        self.number += 1;
        self.read += length as u64;
        let row = if length as u64 > self.line_bytes_max {
            self.is_inside_row = !self.line.ends_with(b"\n");
            Row::Malformed("it is longer than any key and value")
        } else {
            parse(&self.line, self.key_bytes_max, self.value_bytes_max)
        };
        let (path, number) = (self.path.display(), self.number);
        match row {
            Row::Empty => {}
            Row::Pair(key, value) => match engine.load(key, value) {
                Loaded::Stored => self.report.rows += 1,
                Loaded::NotMine => {}
                Loaded::OutOfMemory => {
                    return Err(StartError(format!(
                        "{path} does not fit: out of memory at row {number}; raise --max-memory"
                    )));
                }
            },
            Row::Malformed(why) => {
                self.report.malformed += 1;
                let place = format!("{path} row {number} is malformed: {why}");
                if self.strict {
                    return Err(StartError(format!("{place} (--load-strict)")));
                }
                if self.reports && self.report.malformed <= NAMED_ROWS_MAX {
                    self.bar.suspend(|| log::warn!("{place}; it is left out"));
                }
            }
        }
        Ok(true)
    }
}

fn cannot_load(path: &Path, error: &std::io::Error) -> StartError {
    StartError(format!("cannot load {}: {error}", path.display()))
}

/// Reads a line, of which at most `bytes_max` and one byte are kept; returns how many bytes that were.
fn read_line(reader: &mut impl BufRead, line: &mut Vec<u8>, bytes_max: u64) -> std::io::Result<usize> {
    std::io::Read::take(reader, bytes_max + 1).read_until(b'\n', line)
}

/// Reads on towards the end of the line, a buffer at the most; returns how many bytes that were, and whether it was reached.
fn skip(reader: &mut impl BufRead) -> std::io::Result<(usize, bool)> {
    let buffer = reader.fill_buf()?;
    let (used, ended) = match memchr::memchr(b'\n', buffer) {
        Some(end) => (end + 1, true),
        None => (buffer.len(), buffer.is_empty()),
    };
    reader.consume(used);
    Ok((used, ended))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::Pool;
    use crate::model::UnixMillis;
    use crate::partition::RangeTable;
    use clap::Parser;
    use std::sync::Arc;

    #[test]
    fn rows() {
        let parse = |line: &'static str| parse(line.as_bytes(), 5, 20);
        assert_eq!(parse("key value\n"), Row::Pair(b"key", b"value"));
        assert_eq!(
            parse("key \t value with blanks \r\n"),
            Row::Pair(b"key", b"value with blanks ")
        );
        assert_eq!(parse("key value"), Row::Pair(b"key", b"value"));
        assert_eq!(parse("\r\n"), Row::Empty);
        for malformed in [
            "key\n",
            "key   \n",
            " key value\n",
            "toolong value\n",
            "k 123456789012345678901\n",
        ] {
            assert!(matches!(parse(malformed), Row::Malformed(_)), "{malformed:?}");
        }
    }

    #[test]
    fn long_lines_are_skipped_to_their_end() {
        let mut reader = BufReader::with_capacity(4, &b"0123456789abc\nnext 1\n"[..]);
        let mut line = vec![];
        assert_eq!(read_line(&mut reader, &mut line, 6).unwrap(), 7);
        assert_eq!(skip(&mut reader).unwrap(), (1, false));
        assert_eq!(skip(&mut reader).unwrap(), (4, false));
        assert_eq!(skip(&mut reader).unwrap(), (2, true));
        line.clear();
        read_line(&mut reader, &mut line, 6).unwrap();
        assert_eq!(line, b"next 1\n");
        assert_eq!(
            skip(&mut reader).unwrap(),
            (0, true),
            "the end of the file ends a line, too"
        );
    }

    /// Every piece is small, also of a row that is endless; together they are the file.
    #[test]
    fn piece_by_piece() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows");
        let mut config = Config::parse_from(["memkv-tpc"]);
        config.limits.item_size_max.0 = 100;
        config.limits.key_size_max = 20;
        let line_bytes_max = 100 + 20 + 4096;
        let mut rows: String = (0..3 * PIECE_ROWS).map(|number| format!("k{number} v\n")).collect();
        // The first of these two is too long by its line end only.
        rows += &format!("{}\nbehind 1\n", "x".repeat(line_bytes_max));
        rows += &format!("{}\nlast 1", "x".repeat(5 * PIECE_BYTES as usize));
        std::fs::write(&path, &rows).unwrap();
        config.load = Some(path);
        let table = Arc::new(RangeTable::even(7, 1, 1));
        let pool = Pool::new(1 << 30);
        let mut engine = Engine::new(CoreId(0), table, pool, Arc::new(config.clone()), UnixMillis(1));
        let mut loader = Loader::open(&config, CoreId(0)).unwrap().unwrap();
        let mut pieces = 1;
        let report = loop {
            let before = (loader.number, loader.read);
            if let Some(report) = loader.step(&mut engine).unwrap() {
                break report;
            }
            assert!(loader.number - before.0 <= PIECE_ROWS as u64);
            assert!(loader.read - before.1 <= PIECE_BYTES + READ_BYTES as u64);
            pieces += 1;
        };
        assert!(pieces >= 3 + 3, "{pieces}");
        assert_eq!((report.rows, report.malformed), (3 * PIECE_ROWS as u64 + 2, 2));
        assert_eq!(loader.read, rows.len() as u64);
        config.load_strict = true;
        let mut loader = Loader::open(&config, CoreId(0)).unwrap().unwrap();
        let error = loop {
            match loader.step(&mut engine) {
                Ok(report) => assert!(report.is_none()),
                Err(error) => break error.to_string(),
            }
        };
        assert!(
            error.contains(&format!("row {} is malformed", 3 * PIECE_ROWS + 1)),
            "{error}"
        );
    }
}
