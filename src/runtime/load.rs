//! Loading a file of rows `<key> <value>` before serving.
//!
//! Every core reads the whole file and stores the rows whose keys are its own. That reads the file once per core, from the
//! page cache, and needs no queue between cores; rows of one key stay in their order, so the last one wins.

use super::{LoadReport, StartError};
use crate::engine::{Engine, Loaded};
use crate::model::CoreId;
use indicatif::{ProgressBar, ProgressStyle};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::time::Instant;

/// How much is read at once.
const READ_BYTES: usize = 1 << 20;
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

/// Loads this core's rows of the file at `path`. Core 0 reports for all: progress, malformed rows.
pub(super) fn load(path: &Path, core: CoreId, strict: bool, engine: &mut Engine) -> Result<LoadReport, StartError> {
    let began = Instant::now();
    let reports = core == CoreId(0);
    let failed = |error: std::io::Error| StartError(format!("cannot load {}: {error}", path.display()));
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

    let limits = &engine.config().limits;
    let (key_bytes_max, value_bytes_max) = (usize::from(limits.key_size_max), limits.item_size_max.0);
    // A line may hold a key, blanks and a value; a longer one is not kept in memory whole.
    let line_bytes_max = value_bytes_max + key_bytes_max as u64 + 4096;
    let mut reader = BufReader::with_capacity(READ_BYTES, file);
    let mut line = vec![];
    let mut report = LoadReport {
        rows: 0,
        malformed: 0,
        duration: began.elapsed(),
    };
    let (mut number, mut read, mut shown) = (0u64, 0u64, 0u64);
    loop {
        line.clear();
        number += 1;
        let mut length = read_line(&mut reader, &mut line, line_bytes_max).map_err(failed)?;
        if length == 0 {
            break;
        }
        let mut row = parse(&line, key_bytes_max, value_bytes_max);
        if length as u64 > line_bytes_max {
            length += skip_line(&mut reader).map_err(failed)?;
            row = Row::Malformed("it is longer than any key and value");
        }
        read += length as u64;
        match row {
            Row::Empty => {}
            Row::Pair(key, value) => match engine.load(key, value) {
                Loaded::Stored => report.rows += 1,
                Loaded::NotMine => {}
                Loaded::OutOfMemory => {
                    let path = path.display();
                    return Err(StartError(format!(
                        "{path} does not fit: out of memory at row {number}; raise --max-memory"
                    )));
                }
            },
            Row::Malformed(why) => {
                report.malformed += 1;
                let place = format!("{} row {number} is malformed: {why}", path.display());
                if strict {
                    return Err(StartError(format!("{place} (--load-strict)")));
                }
                if reports && report.malformed <= NAMED_ROWS_MAX {
                    bar.suspend(|| log::warn!("{place}; it is left out"));
                }
            }
        }
        if read - shown >= READ_BYTES as u64 {
            shown = read;
            bar.set_position(read);
        }
    }
    bar.finish_and_clear();
    report.duration = began.elapsed();
    Ok(report)
}

/// Reads a line, of which at most `bytes_max` and one byte are kept; returns how many bytes that were.
fn read_line(reader: &mut impl BufRead, line: &mut Vec<u8>, bytes_max: u64) -> std::io::Result<usize> {
    std::io::Read::take(reader, bytes_max + 1).read_until(b'\n', line)
}

/// Reads to the end of the line; returns how many bytes that were.
fn skip_line(reader: &mut impl BufRead) -> std::io::Result<usize> {
    let mut skipped = 0;
    loop {
        let buffer = reader.fill_buf()?;
        let (used, ended) = match memchr::memchr(b'\n', buffer) {
            Some(end) => (end + 1, true),
            None => (buffer.len(), buffer.is_empty()),
        };
        reader.consume(used);
        skipped += used;
        if ended {
            return Ok(skipped);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!(skip_line(&mut reader).unwrap(), 7);
        line.clear();
        read_line(&mut reader, &mut line, 6).unwrap();
        assert_eq!(line, b"next 1\n");
    }
}
