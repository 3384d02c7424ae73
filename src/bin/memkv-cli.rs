//! The client for people and scripts: one command from the arguments, or many from a prompt or a pipe, over memcached's
//! text protocol.
//!
//! Arguments and lines end in the same [`Command`], so both understand the same things. A [`Client`] asks the server, and
//! [`Screen`] shows what came of it. Exit codes: 0 when all went well, 1 when the server could not be asked, refused, or
//! did not have a key that the arguments named, 2 for arguments that make no sense.

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand};
use rustyline::error::ReadlineError;
use rustyline::history::DefaultHistory;
use std::borrow::Cow;
use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, ErrorKind, IsTerminal, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The longest key of the protocol.
const KEY_BYTES_MAX: usize = 250;
/// Longer lines come from something else than a memcached.
const LINE_BYTES_MAX: u64 = 8192;
/// Larger values come from something else than a memcached.
const VALUE_BYTES_MAX: u64 = 1 << 30;
/// Longer times must be sent as Unix times.
const RELATIVE_SECONDS_MAX: u64 = 60 * 60 * 24 * 30;
/// Older lines are forgotten.
const HISTORY_LINES_MAX: usize = 1000;

/// How lines are written.
const LINE_HELP: &str = "\
A value is the rest of the line behind the key, blanks inside included, or a
text in quotes with the escapes \\n \\r \\t \\\" \\' \\\\ \\xNN. Options stand before the
key, or behind a value in quotes.";
/// What the options do not say.
const OUTPUT_HELP: &str = "\
Without a command there is a prompt; when standard input is not a terminal, its
lines are the commands. `help` there says how lines are written. The prompt
keeps its lines, values included, in $XDG_STATE_HOME/memkv-cli/history, or below
~/.local/state, where it can write there.

On a terminal a value is shown with a line end behind it, and in quotes with
escapes when it is not plain text. Elsewhere its bytes are written as they are,
with a line end only where more could follow: for several keys and for lines.

Exit code: 0; 1 when the server cannot be reached or refuses, when a key of a
command in the arguments does not exist, or when one of the lines failed; 2 for
wrong arguments.";

/// Asks a memkv-tpc server, or another server of memcached's text protocol.
#[derive(Debug, Parser)]
#[command(name = "memkv-cli", version, after_help = OUTPUT_HELP)]
struct Arguments {
    /// The server's address for memcached clients.
    #[arg(long, global = true, value_name = "HOST:PORT", default_value = "127.0.0.1:11211", value_parser = parse_server)]
    server: String,

    /// How long to wait for a connection and for each part of an answer: 500ms, 5s or 1m.
    #[arg(long, global = true, value_name = "TIME", default_value = "5s", value_parser = parse_timeout)]
    timeout: Duration,

    #[command(subcommand)]
    command: Option<Command>,
}

/// Commands of the prompt and of lines from a pipe.
#[derive(Debug, Parser)]
#[command(name = "", no_binary_name = true, after_help = LINE_HELP)]
enum Line {
    #[command(flatten)]
    Command(Command),

    /// Leave, as Ctrl-D does.
    #[command(alias = "quit")]
    Exit,
}

/// What can be asked of the server.
#[derive(Clone, Debug, Subcommand)]
enum Command {
    /// Show the values of keys, one below the other.
    Get {
        #[arg(required = true, value_name = "KEY", value_parser = word())]
        keys: Vec<Word>,
    },
    /// Store a value.
    Set {
        #[arg(value_parser = word())]
        key: Word,
        #[arg(allow_hyphen_values = true)]
        value: OsString,
        /// How long the value is kept. 0: until it is deleted.
        #[arg(long, value_name = "SECONDS", default_value = "0", value_parser = parse_expiry)]
        ttl: Expiry,
        /// A number kept with the value, for programs that use one.
        #[arg(long, value_name = "N", default_value_t = 0)]
        flags: u32,
    },
    /// Delete keys.
    #[command(alias = "del")]
    Delete {
        #[arg(required = true, value_name = "KEY", value_parser = word())]
        keys: Vec<Word>,
    },
    /// Delete everything.
    #[command(alias = "flush_all")]
    Flush,
    /// Show statistics: general (or nothing), settings, items, conns, latency, cores and what else the server knows.
    Stats {
        #[arg(value_parser = word())]
        what: Vec<Word>,
    },
    /// Add to a number.
    Incr(Step),
    /// Subtract from a number, down to 0.
    Decr(Step),
    /// Say anew how long a value is kept. 0: until it is deleted.
    Touch {
        #[arg(value_parser = word())]
        key: Word,
        #[arg(value_name = "SECONDS", value_parser = parse_expiry)]
        ttl: Expiry,
    },
    /// Show the server's version.
    Version,
}

/// What `incr` and `decr` take.
#[derive(Clone, Debug, Args)]
struct Step {
    #[arg(value_parser = word())]
    key: Word,
    #[arg(value_name = "N", default_value_t = 1)]
    by: u64,
}

/// A key or another word that the protocol sends as it is: a blank or a line end in it would make it several.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Word(Vec<u8>);

/// Checks a [`Word`] before anything is sent.
fn word() -> impl TypedValueParser<Value = Word> {
    OsStringValueParser::new().try_map(|text| {
        let bytes = text.into_vec();
        let length = bytes.len();
        if !(1..=KEY_BYTES_MAX).contains(&length) {
            return Err(format!("it has {length} bytes, and must have 1 to {KEY_BYTES_MAX}"));
        }
        if bytes.iter().any(|byte| *byte == b' ' || byte.is_ascii_control()) {
            return Err("it must not contain blanks or control characters".to_owned());
        }
        Ok(Word(bytes))
    })
}

/// When a value goes, as the protocol says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Expiry(u64);

/// Seconds from now, 0 for never.
fn parse_expiry(text: &str) -> Result<Expiry, String> {
    let seconds: u64 = text
        .parse()
        .map_err(|_| "it must be a number of seconds, 0 or more".to_owned())?;
    if seconds <= RELATIVE_SECONDS_MAX {
        return Ok(Expiry(seconds));
    }
    // The protocol takes a large number for a Unix time, so a value kept for 31 days would be gone at once.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    match now.as_secs().checked_add(seconds) {
        Some(moment) if moment <= i32::MAX as u64 => Ok(Expiry(moment)),
        _ => Err("it ends after January 2038, which the protocol cannot say; 0 keeps a value for good".to_owned()),
    }
}

/// An address as it is typed; its name is looked up for each connection anew.
fn parse_server(text: &str) -> Result<String, String> {
    match text.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0) => Ok(text.to_owned()),
        _ => Err("write HOST:PORT, such as 127.0.0.1:11211 or [::1]:11211".to_owned()),
    }
}

/// A time of at least a millisecond: the system takes 0 for none.
fn parse_timeout(text: &str) -> Result<Duration, String> {
    let units = [("ms", 0.001), ("s", 1.0), ("m", 60.0), ("", 1.0)];
    units
        .iter()
        .find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, factor)))
        .and_then(|(digits, factor)| Duration::try_from_secs_f64(digits.parse::<f64>().ok()? * factor).ok())
        .filter(|timeout| *timeout >= Duration::from_millis(1))
        .ok_or_else(|| "write a time of at least 1ms: 500ms, 5s or 1m".to_owned())
}

/// Why a command came to nothing.
#[derive(Debug)]
enum Failure {
    /// It was not understood; nothing was sent.
    Unclear(String),
    /// There is no connection.
    Unreachable(io::Error),
    /// The connection ended, or nothing came for too long, before the answer was complete.
    Lost(io::Error),
    /// The server answered what no memcached answers.
    Foreign(Vec<u8>),
    /// The server refused, in these words.
    Refused(Vec<u8>),
    /// The result could not be shown.
    Output(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Failure::Lost(error)
    }
}

impl Failure {
    /// What to tell the user, with what can be done about it where something can.
    fn describe(&self, server: &str) -> String {
        match self {
            Failure::Unclear(text) => text.clone(),
            Failure::Unreachable(error) => format!(
                "cannot connect to {server}: {error}; start memkv-tpc there, or name another address with --server HOST:PORT"
            ),
            Failure::Lost(error) => match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                    format!("{server} did not answer in time; --timeout TIME waits longer")
                }
                ErrorKind::UnexpectedEof => format!("{server} closed the connection before it had answered"),
                _ => format!("the connection to {server} broke before the answer: {error}"),
            },
            Failure::Foreign(answer) => format!(
                "{server} does not speak the memcached protocol: it answered \"{}\"; is it the right port?",
                answer[..answer.len().min(80)].escape_ascii()
            ),
            Failure::Refused(words) if words == b"ERROR" => {
                "the server answered ERROR: it does not know this command".to_owned()
            }
            Failure::Refused(words) => format!("the server answered {}", String::from_utf8_lossy(&plain(words))),
            Failure::Output(error) => format!("cannot write the result: {error}"),
        }
    }
}

/// What a key was answered by; None when it is not there.
type Answer = Result<Option<Vec<u8>>, Failure>;

/// An open connection.
struct Connection(BufReader<TcpStream>);

impl Connection {
    /// Connects to the first address that works.
    fn open(server: &str, timeout: Duration) -> Result<Self, Failure> {
        let connect = |address| {
            let stream = TcpStream::connect_timeout(&address, timeout)?;
            stream.set_read_timeout(Some(timeout))?;
            stream.set_write_timeout(Some(timeout))?;
            stream.set_nodelay(true)?;
            Ok(Self(BufReader::new(stream)))
        };
        let mut cause = io::Error::other("the name has no address");
        for address in server.to_socket_addrs().map_err(Failure::Unreachable)? {
            match connect(address) {
                Ok(connection) => return Ok(connection),
                Err(error) => cause = error,
            }
        }
        Err(Failure::Unreachable(cause))
    }

    /// Whether it is still there, with nothing to read. Asked before a command is sent, because afterwards nobody knows
    /// whether the server had carried it out, and it must not be sent twice.
    fn is_fresh(&self) -> bool {
        let peek = |stream: &TcpStream| {
            stream.set_nonblocking(true)?;
            let peeked = stream.peek(&mut [0]);
            stream.set_nonblocking(false)?;
            peeked
        };
        self.0.buffer().is_empty() && peek(self.0.get_ref()).is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    }

    /// The next line of the answer, unless the server refuses with it.
    fn line(&mut self) -> Result<Vec<u8>, Failure> {
        let mut line = vec![];
        (&mut self.0).take(LINE_BYTES_MAX).read_until(b'\n', &mut line)?;
        if line.pop_if(|last| *last == b'\n').is_none() {
            return Err(match line.len() as u64 {
                LINE_BYTES_MAX => Failure::Foreign(line),
                _ => Failure::Lost(ErrorKind::UnexpectedEof.into()),
            });
        }
        line.pop_if(|last| *last == b'\r');
        match line.split(|byte| matches!(byte, b' ' | b':')).next() {
            Some(b"ERROR" | b"CLIENT_ERROR" | b"SERVER_ERROR") => Err(Failure::Refused(line)),
            _ => Ok(line),
        }
    }

    /// The answer to `get` with one key.
    fn value(&mut self, key: &[u8]) -> Answer {
        let line = self.line()?;
        if line == b"END" {
            return Ok(None);
        }
        let Some(bytes) = parse_value_line(&line, key) else {
            return Err(Failure::Foreign(line));
        };
        // Grows with what arrives: the number alone must not cost memory.
        let mut value = vec![];
        (&mut self.0).take(bytes + 2).read_to_end(&mut value)?;
        if value.len() as u64 != bytes + 2 {
            return Err(Failure::Lost(ErrorKind::UnexpectedEof.into()));
        }
        match (value.split_off(bytes as usize).as_slice(), self.line()?) {
            (b"\r\n", end) if end == b"END" => Ok(Some(value)),
            (_, line) => Err(Failure::Foreign(line)),
        }
    }
}

/// The length in `VALUE <key> <flags> <bytes>`.
fn parse_value_line(line: &[u8], key: &[u8]) -> Option<u64> {
    let numbers = line.strip_prefix(b"VALUE ")?.strip_prefix(key)?.strip_prefix(b" ")?;
    let bytes = std::str::from_utf8(numbers).ok()?.split(' ').nth(1)?.parse().ok()?;
    (bytes <= VALUE_BYTES_MAX).then_some(bytes)
}

/// Asks one server, over a connection that is opened when it is needed.
struct Client {
    server: String,
    timeout: Duration,
    connection: Option<Connection>,
    was_connected: bool,
}

impl Client {
    /// The connection, a new one if need be. Whoever takes it puts it back when the answer was complete: what comes later
    /// on it would be taken for the answer to the next command.
    fn take_connection(&mut self) -> Result<Connection, Failure> {
        if let Some(connection) = self.connection.take().filter(Connection::is_fresh) {
            return Ok(connection);
        }
        let connection = Connection::open(&self.server, self.timeout)?;
        if std::mem::replace(&mut self.was_connected, true) {
            complain(&format!("the connection was lost; connected to {} again", self.server));
        }
        Ok(connection)
    }

    /// Sends a request, given in pieces without the line end, and reads its answer.
    fn ask<T>(
        &mut self,
        request: &[&[u8]],
        read: impl FnOnce(&mut Connection) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut connection = self.take_connection()?;
        let sent = connection
            .0
            .get_mut()
            .write_all(&[&request.concat(), "\r\n".as_bytes()].concat());
        let answer = read(&mut connection);
        match (&sent, &answer) {
            (Ok(()), Ok(_) | Err(Failure::Refused(_))) => self.connection = Some(connection),
            // A server that has no room for a client says so and closes; its words explain more than a broken pipe.
            (Err(_), Err(Failure::Refused(_))) => {}
            _ => sent?,
        }
        answer
    }

    /// Asks what is answered by one line.
    fn ask_line(&mut self, request: &[&[u8]], valid: fn(&[u8]) -> bool) -> Answer {
        match self.ask(request, Connection::line)? {
            line if valid(&line) => Ok(Some(line)),
            line if line == b"NOT_FOUND" => Ok(None),
            line if line == b"NOT_STORED" => Err(Failure::Refused(line)),
            line => Err(Failure::Foreign(line)),
        }
    }

    /// A key's value.
    fn get(&mut self, Word(key): &Word) -> Answer {
        self.ask(&[b"get ", key], |connection| connection.value(key))
    }

    /// Stores a value.
    fn set(&mut self, Word(key): &Word, value: &[u8], Expiry(ttl): Expiry, flags: u32) -> Answer {
        let numbers = format!(" {flags} {ttl} {}\r\n", value.len());
        let stored = self.ask_line(&[b"set ", key, numbers.as_bytes(), value], |line| line == b"STORED");
        if matches!(&stored, Err(Failure::Refused(words)) if !words.starts_with(b"SERVER_ERROR")) {
            // A server that refuses the line may take the value for further commands, and answer those too. Nothing was
            // lost, so the next connection needs no note.
            self.connection = None;
            self.was_connected = false;
        }
        stored
    }

    /// Deletes a key.
    fn delete(&mut self, Word(key): &Word) -> Answer {
        self.ask_line(&[b"delete ", key], |line| line == b"DELETED")
    }

    /// Gives a key a new end.
    fn touch(&mut self, Word(key): &Word, Expiry(ttl): Expiry) -> Answer {
        let ttl = format!(" {ttl}");
        self.ask_line(&[b"touch ", key, ttl.as_bytes()], |line| line == b"TOUCHED")
    }

    /// `incr` or `decr`: the new number.
    fn count(&mut self, verb: &str, Word(key): &Word, by: u64) -> Answer {
        let by = format!(" {by}");
        let is_number = |line: &[u8]| !line.is_empty() && line.iter().all(u8::is_ascii_digit);
        self.ask_line(&[verb.as_bytes(), b" ", key, by.as_bytes()], is_number)
    }

    /// Deletes everything.
    fn flush(&mut self) -> Answer {
        self.ask_line(&[b"flush_all"], |line| line == b"OK")
    }

    /// The server's version.
    fn version(&mut self) -> Answer {
        let line = self.ask_line(&[b"version"], |line| line.starts_with(b"VERSION "))?;
        Ok(line.map(|line| line[b"VERSION ".len()..].to_vec()))
    }

    /// Names and values, with a blank between them.
    fn stats(&mut self, what: &[Word]) -> Result<Vec<String>, Failure> {
        let mut request: Vec<&[u8]> = vec![b"stats"];
        for Word(word) in what.iter().filter(|Word(word)| word != b"general") {
            request.extend([b" ", word.as_slice()]);
        }
        self.ask(&request, |connection| {
            let mut rows = vec![];
            loop {
                let line = connection.line()?;
                let text = String::from_utf8_lossy(&line);
                match text.split_once(' ') {
                    None if text == "END" => return Ok(rows),
                    // What `stats` carries out instead of telling.
                    None if rows.is_empty() && (text == "OK" || text == "RESET") => return Ok(vec![text.into()]),
                    Some(("STAT" | "PREFIX", row)) => rows.push(row.to_owned()),
                    _ => return Err(Failure::Foreign(line)),
                }
            }
        })
    }
}

/// How results are shown.
struct Screen {
    terminal: bool,
    /// One value is asked for and nothing else: its bytes are the output.
    raw: bool,
}

impl Screen {
    /// Carries a command out and shows its result. False: a key was not found.
    fn run(&self, command: &Command, client: &mut Client) -> Result<bool, Failure> {
        match command {
            Command::Get { keys } => self.each(keys, |key| client.get(key)),
            Command::Set { key, value, ttl, flags } => {
                self.each([key], |key| client.set(key, value.as_bytes(), *ttl, *flags))
            }
            Command::Delete { keys } => self.each(keys, |key| client.delete(key)),
            Command::Incr(step) => self.each([&step.key], |key| client.count("incr", key, step.by)),
            Command::Decr(step) => self.each([&step.key], |key| client.count("decr", key, step.by)),
            Command::Touch { key, ttl } => self.each([key], |key| client.touch(key, *ttl)),
            Command::Flush => self.show(&client.flush()?.unwrap_or_default()),
            Command::Version => self.show(&client.version()?.unwrap_or_default()),
            Command::Stats { what } => self.table(&client.stats(what)?),
        }
    }

    /// Asks for one key after the other and shows the answers.
    fn each<'a>(
        &self,
        keys: impl IntoIterator<Item = &'a Word>,
        mut ask: impl FnMut(&Word) -> Answer,
    ) -> Result<bool, Failure> {
        let mut all = true;
        for key in keys {
            all &= match ask(key)? {
                Some(answer) => self.show(&answer)?,
                None => self.not_found(key)?,
            };
        }
        Ok(all)
    }

    /// On a terminal the note stands where the value would; elsewhere it must not be taken for one.
    fn not_found(&self, Word(key): &Word) -> Result<bool, Failure> {
        if self.terminal {
            self.show(b"(not found)")?;
        } else {
            complain(&format!("{} (not found)", String::from_utf8_lossy(&plain(key))));
        }
        Ok(false)
    }

    /// Shows statistics with their values below each other.
    fn table(&self, rows: &[String]) -> Result<bool, Failure> {
        let cells = rows.iter().map(|row| row.split_once(' ').unwrap_or((row, "")));
        let width = cells.clone().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        for (name, value) in cells {
            self.show(format!("{name:width$}  {value}").trim_end().as_bytes())?;
        }
        Ok(true)
    }

    /// Shows a value or a line. A terminal obeys what it is shown, so it gets nothing but plain text.
    fn show(&self, bytes: &[u8]) -> Result<bool, Failure> {
        let shown = if self.terminal { plain(bytes) } else { bytes.into() };
        let end: &[u8] = if self.raw { b"" } else { b"\n" };
        let mut out = io::stdout().lock();
        let written = out.write_all(&shown).and_then(|()| out.write_all(end));
        written.and_then(|()| out.flush()).map_err(Failure::Output)?;
        Ok(true)
    }
}

/// Says something on standard error; when that is gone, there is nobody to tell.
fn complain(text: &str) {
    let _ = writeln!(io::stderr(), "memkv-cli: {}", text.trim_end());
}

/// A text as it is; anything else in quotes and with escapes, as a line can say it.
fn plain(bytes: &[u8]) -> Cow<'_, [u8]> {
    let is_strange = |c: char| c.is_control() && c != '\n' && c != '\t';
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains(is_strange) => bytes.into(),
        _ => format!("\"{}\"", bytes.escape_ascii()).into_bytes().into(),
    }
}

/// Takes the next word off a line: up to a blank, or in quotes.
fn take_word(line: &mut &[u8]) -> Result<Option<Vec<u8>>, String> {
    *line = line.trim_ascii_start();
    let Some(quoted) = line.strip_prefix(b"\"") else {
        let end = line.iter().position(u8::is_ascii_whitespace).unwrap_or(line.len());
        let (word, rest) = line.split_at(end);
        *line = rest;
        return Ok((end > 0).then(|| word.to_vec()));
    };
    let mut word = vec![];
    let mut bytes = quoted.iter().copied();
    loop {
        let byte = bytes.next().ok_or("a quote is opened and not closed")?;
        word.push(match byte {
            b'"' => break,
            b'\\' => match bytes.next() {
                Some(b'n') => b'\n',
                Some(b'r') => b'\r',
                Some(b't') => b'\t',
                Some(escaped @ (b'"' | b'\'' | b'\\')) => escaped,
                Some(b'x') => {
                    let mut digit = || (bytes.next()? as char).to_digit(16);
                    let (high, low) = digit().zip(digit()).ok_or("two hexadecimal digits follow \\x")?;
                    (high << 4 | low) as u8
                }
                _ => return Err("an escape is one of \\n \\r \\t \\\" \\' \\\\ \\xNN".to_owned()),
            },
            byte => byte,
        });
    }
    *line = &quoted[quoted.len() - bytes.len()..];
    if line.first().is_some_and(|next| !next.is_ascii_whitespace()) {
        return Err("a blank must follow the closing quote; inside quotes write \\\"".to_owned());
    }
    Ok(Some(word))
}

/// Takes options off a line; the word behind them, if there is one.
fn take_options(line: &mut &[u8], options: &mut Vec<Vec<u8>>) -> Result<Option<Vec<u8>>, String> {
    while let Some(word) = take_word(line)? {
        match word.as_slice() {
            b"--" => return take_word(line),
            b"--ttl" | b"--flags" => {
                options.push(word);
                options.extend(take_word(line)?);
            }
            [b'-', ..] => options.push(word),
            _ => return Ok(Some(word)),
        }
    }
    Ok(None)
}

/// The arguments that a line stands for.
fn split_line(line: &[u8]) -> Result<Vec<Vec<u8>>, String> {
    let mut line = line.trim_ascii();
    let mut words = vec![];
    words.extend(take_word(&mut line)?);
    if words != [b"set"] {
        while let Some(word) = take_word(&mut line)? {
            words.push(word);
        }
        return Ok(words);
    }
    let key = take_options(&mut line, &mut words)?;
    line = line.trim_ascii_start();
    let mut value = (!line.is_empty()).then(|| line.to_vec());
    if line.starts_with(b"\"") {
        value = take_word(&mut line)?;
        if take_options(&mut line, &mut words)?.is_some() {
            return Err("only options may follow a value in quotes; inside quotes write \\\"".to_owned());
        }
    }
    // Whatever the value looks like, it is no option.
    words.push(b"--".to_vec());
    words.extend(key.into_iter().chain(value));
    Ok(words)
}

/// Runs a line. False: it asks to leave.
fn run_line(line: &[u8], client: &mut Client, screen: &Screen) -> Result<bool, Failure> {
    let words = split_line(line).map_err(Failure::Unclear)?;
    if words.is_empty() {
        return Ok(true);
    }
    match Line::try_parse_from(words.into_iter().map(OsString::from_vec)) {
        Ok(Line::Exit) => return Ok(false),
        Ok(Line::Command(command)) => screen.run(&command, client)?,
        Err(error) if error.use_stderr() => {
            let text = error.to_string();
            let text = text.strip_prefix("error: ").unwrap_or(&text);
            return Err(Failure::Unclear(text.replace("'--help'", "'help'")));
        }
        Err(help) => screen.show(help.to_string().trim_end().as_bytes())?,
    };
    Ok(true)
}

/// Runs the lines of standard input. False: one of them failed.
fn run_pipe(client: &mut Client, screen: &Screen) -> Result<bool, Failure> {
    let unreadable = |error| Failure::Unclear(format!("cannot read standard input: {error}"));
    let mut all = true;
    for (number, line) in (1..).zip(io::stdin().lock().split(b'\n')) {
        match run_line(&line.map_err(unreadable)?, client, screen) {
            Ok(true) => {}
            Ok(false) => break,
            // The lines that follow would fare no better.
            Err(failure @ (Failure::Unreachable(_) | Failure::Output(_))) => return Err(failure),
            Err(failure) => {
                complain(&format!("line {number}: {}", failure.describe(&client.server)));
                all = false;
            }
        }
    }
    Ok(all)
}

/// Where the lines of earlier prompts are kept.
fn history_path() -> Option<PathBuf> {
    let state = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from);
    // The standard says that a relative path there does not count.
    let state = state.filter(|path| path.is_absolute());
    let folder = state
        .or_else(|| Some(std::env::home_dir()?.join(".local/state")))?
        .join("memkv-cli");
    std::fs::create_dir_all(&folder).ok()?;
    Some(folder.join("history"))
}

/// Asks for lines until the user leaves.
fn run_prompt(client: &mut Client, screen: &Screen) -> Result<bool, Failure> {
    // Who types should learn at once that nobody is there.
    client.connection = Some(client.take_connection()?);
    let unusable = |error: ReadlineError| Failure::Unclear(format!("the terminal cannot be used: {error}"));
    let config = rustyline::Config::builder()
        .max_history_size(HISTORY_LINES_MAX)
        .map_err(unusable)?;
    let config = config.auto_add_history(true).build();
    let mut editor = rustyline::Editor::<(), DefaultHistory>::with_config(config).map_err(unusable)?;
    // The prompt works as well without a history, so it does not matter why there is none.
    let history = history_path();
    let _ = history.as_ref().map(|path| editor.load_history(path));
    let prompt = format!("{}> ", client.server);
    loop {
        let line = match editor.readline(&prompt) {
            Ok(line) => line,
            // Ctrl-C drops the line, Ctrl-D leaves.
            Err(ReadlineError::Interrupted) => continue,
            Err(ReadlineError::Eof) => return Ok(true),
            Err(error) => return Err(unusable(error)),
        };
        // At once, so that a terminal that is closed takes nothing along.
        let _ = history.as_ref().map(|path| editor.append_history(path));
        match run_line(line.as_bytes(), client, screen) {
            Ok(true) => {}
            Ok(false) => return Ok(true),
            Err(failure @ Failure::Output(_)) => return Err(failure),
            Err(failure) => complain(&failure.describe(&client.server)),
        }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let mut client = Client {
        server: arguments.server,
        timeout: arguments.timeout,
        connection: None,
        was_connected: false,
    };
    let terminal = io::stdout().is_terminal();
    let one_value = matches!(&arguments.command, Some(Command::Get { keys }) if keys.len() == 1);
    let screen = Screen {
        terminal,
        raw: one_value && !terminal,
    };
    let result = match arguments.command {
        Some(command) => screen.run(&command, &mut client),
        None if io::stdin().is_terminal() => run_prompt(&mut client, &screen),
        None => run_pipe(&mut client, &screen),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        // Whoever read the output has seen enough.
        Err(Failure::Output(error)) if error.kind() == ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(failure) => {
            complain(&failure.describe(&client.server));
            ExitCode::FAILURE
        }
    }
}
