//! How results and complaints are shown.

use crate::failure::Failure;
use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;

/// How results are shown.
pub(crate) struct Screen {
    pub(crate) terminal: bool,
    /// One value is asked for and nothing else: its bytes are the output.
    pub(crate) raw: bool,
}

impl Screen {
    /// Asks for one key after the other and shows the answers; `None` is a key that does not exist. False: there was one.
    pub(crate) fn each<'a>(
        &self,
        keys: impl IntoIterator<Item = &'a OsString>,
        mut ask: impl FnMut(&[u8]) -> Result<Option<Vec<u8>>, Failure>,
    ) -> Result<bool, Failure> {
        let mut all = true;
        for key in keys {
            let answer = ask(key.as_bytes())?;
            all &= self.answer(key, answer.as_deref())?;
        }
        Ok(all)
    }

    /// Shows what a key was answered by. False: it does not exist.
    pub(crate) fn answer(&self, key: &OsStr, answer: Option<&[u8]>) -> Result<bool, Failure> {
        match answer {
            Some(answer) => return self.show(answer),
            // On a terminal the note stands where the value would; elsewhere it must not be taken for one.
            None if self.terminal => _ = self.show(b"(not found)")?,
            None => complain(&format!(
                "{} (not found)",
                String::from_utf8_lossy(&plain(key.as_bytes()))
            )),
        }
        Ok(false)
    }

    /// Shows rows with their cells below each other. The first two columns are words and begin together; the others are
    /// numbers and end together.
    pub(crate) fn table(&self, rows: &[Vec<String>]) -> Result<bool, Failure> {
        let mut widths: Vec<usize> = vec![];
        for row in rows {
            widths.resize(widths.len().max(row.len()), 0);
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        for row in rows {
            let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, width))| {
                if column >= 2 {
                    format!("{cell:>width$}")
                } else {
                    format!("{cell:width$}")
                }
            });
            self.show(cells.collect::<Vec<_>>().join("  ").trim_end().as_bytes())?;
        }
        Ok(true)
    }

    /// Shows a value or a line. A terminal obeys what it is shown, so it gets nothing but plain text.
    pub(crate) fn show(&self, bytes: &[u8]) -> Result<bool, Failure> {
        let shown = if self.terminal { plain(bytes) } else { bytes.into() };
        let end: &[u8] = if self.raw { b"" } else { b"\n" };
        let mut out = io::stdout().lock();
        let written = out.write_all(&shown).and_then(|()| out.write_all(end));
        written.and_then(|()| out.flush()).map_err(Failure::Output)?;
        Ok(true)
    }
}

/// Says something on standard error; when that is gone, there is nobody to tell.
pub(crate) fn complain(text: &str) {
    let _ = writeln!(io::stderr(), "memkv-cli: {}", text.trim_end());
}

/// A text as it is; anything else in quotes and with escapes, as a line can say it.
pub(crate) fn plain(bytes: &[u8]) -> Cow<'_, [u8]> {
    let is_strange = |c: char| c.is_control() && c != '\n' && c != '\t';
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains(is_strange) => bytes.into(),
        _ => format!("\"{}\"", bytes.escape_ascii()).into_bytes().into(),
    }
}
