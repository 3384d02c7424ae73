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
use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::{self, BufRead, BufReader, IsTerminal, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The longest key of the protocol.
const KEY_BYTES_MAX: usize = 250;
/// Longer lines come from something else than a memcached.
const LINE_BYTES_MAX: u64 = 8192;
/// Larger values come from something else than a memcached.
const VALUE_BYTES_MAX: u64 = 1 << 30;
/// Keys per request: reading and writing take turns, so neither side may have to hold an endless request or answer.
const KEYS_PER_REQUEST: usize = 64;
/// Longer times must be sent as Unix times.
const RELATIVE_SECONDS_MAX: u64 = 60 * 60 * 24 * 30;
const HISTORY_LINES_MAX: usize = 1000;

const LINE_HELP: &str = "A value is the rest of the line behind the key, blanks inside included, or a text in quotes \
    with the escapes \\n \\r \\t \\\" \\\\ \\xNN. Options stand before the key, or behind a value in quotes.";
const OUTPUT_HELP: &str = "Without a command there is a prompt; when standard input is not a terminal, its lines are the \
    commands. `help` there says how lines are written.\n\n\
    On a terminal a value is shown with a line end behind it, and in quotes with escapes when it is not plain text. \
    Elsewhere its bytes are written as they are: without a line end when the arguments ask for one key, with one \
    otherwise.\n\n\
    Exit code: 0, or 1 when the server cannot be reached or refuses, when a key of a command in the arguments does not \
    exist, or when any piped line failed, or 2 for wrong arguments.";

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

/// What a line can say.
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
    /// Show the values of keys.
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

fn parse_server(text: &str) -> Result<String, String> {
    match text.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0) => Ok(text.to_owned()),
        _ => Err("write HOST:PORT, such as 127.0.0.1:11211 or [::1]:11211".to_owned()),
    }
}

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
    /// The server closed the connection before its answer was complete.
    Closed,
    /// The server said nothing for too long.
    Silent,
    /// The connection broke.
    Broken(io::Error),
    /// The server answered what no memcached answers.
    Foreign(Vec<u8>),
    /// The server refused, in these words.
    Refused(Vec<u8>),
    /// The result could not be shown.
    Output(io::Error),
}

impl Failure {
    fn from_read(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Failure::Silent,
            _ => Failure::Broken(error),
        }
    }

    /// What to tell the user, with what can be done about it where something can.
    fn describe(&self, server: &str, timeout: Duration) -> String {
        match self {
            Failure::Unclear(text) => text.clone(),
            Failure::Unreachable(error) => format!(
                "cannot connect to {server}: {error}; start memkv-tpc there, or say where it listens with --server HOST:PORT"
            ),
            Failure::Closed => format!("{server} closed the connection before it had answered"),
            Failure::Silent => {
                format!("{server} did not answer within {timeout:?}; --timeout TIME waits longer")
            }
            Failure::Broken(error) => format!("the connection to {server} broke before the answer: {error}"),
            Failure::Foreign(line) => {
                let line = &line[..line.len().min(80)];
                format!(
                    "what {server} answered is not the memcached protocol: {}; is it the right port?",
                    quote(line)
                )
            }
            Failure::Refused(words) if words == b"ERROR" => {
                "the server answered ERROR: it does not know this command".to_owned()
            }
            Failure::Refused(words) => format!("the server answered {}", plain_or_quoted(words)),
            Failure::Output(error) => format!("cannot write the result: {error}"),
        }
    }
}

/// An open connection.
struct Connection(BufReader<TcpStream>);

impl Connection {
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
        let stream = self.0.get_ref();
        let waits = || {
            stream.set_nonblocking(true)?;
            let peeked = stream.peek(&mut [0]);
            stream.set_nonblocking(false)?;
            peeked
        };
        self.0.buffer().is_empty() && waits().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    }

    /// The next line of the answer, unless the server refuses with it.
    fn line(&mut self) -> Result<Vec<u8>, Failure> {
        let mut line = vec![];
        let mut limited = (&mut self.0).take(LINE_BYTES_MAX);
        limited.read_until(b'\n', &mut line).map_err(Failure::from_read)?;
        match line.pop() {
            Some(b'\n') => {}
            _ if line.len() as u64 + 1 >= LINE_BYTES_MAX => return Err(Failure::Foreign(line)),
            _ => return Err(Failure::Closed),
        }
        line.pop_if(|last| *last == b'\r');
        let verb = line.split(|byte| matches!(byte, b' ' | b':')).next();
        match verb {
            Some(b"ERROR" | b"CLIENT_ERROR" | b"SERVER_ERROR") => Err(Failure::Refused(line)),
            _ => Ok(line),
        }
    }

    /// A value of the answer, with the line end behind it.
    fn value(&mut self, bytes: u64) -> Result<Vec<u8>, Failure> {
        let mut value = vec![];
        let mut limited = (&mut self.0).take(bytes + 2);
        limited.read_to_end(&mut value).map_err(Failure::from_read)?;
        if (value.len() as u64) < bytes + 2 {
            return Err(Failure::Closed);
        }
        match value.split_off(bytes as usize).as_slice() {
            b"\r\n" => Ok(value),
            _ => Err(Failure::Foreign(value)),
        }
    }

    /// What is found of `keys`, in their order.
    fn values(&mut self, keys: &[Word]) -> Result<Vec<Option<Vec<u8>>>, Failure> {
        let mut found = vec![];
        loop {
            let line = self.line()?;
            if line == b"END" {
                found.resize(keys.len(), None);
                return Ok(found);
            }
            let Some((key, bytes)) = parse_value_line(&line) else {
                return Err(Failure::Foreign(line));
            };
            // Keys that are not there are left out, so this may be any of the rest.
            let Some(skipped) = keys[found.len()..].iter().position(|Word(asked)| *asked == key) else {
                return Err(Failure::Foreign(line));
            };
            found.resize(found.len() + skipped, None);
            found.push(Some(self.value(bytes)?));
        }
    }
}

/// `VALUE <key> <flags> <bytes> [<cas>]`.
fn parse_value_line(line: &[u8]) -> Option<(&[u8], u64)> {
    let mut words = line.strip_prefix(b"VALUE ")?.split(|byte| *byte == b' ');
    let (key, _flags, bytes) = (words.next()?, words.next()?, words.next()?);
    let bytes = std::str::from_utf8(bytes).ok()?.parse().ok()?;
    (bytes <= VALUE_BYTES_MAX).then_some((key, bytes))
}

/// Asks one server, over a connection that is opened when it is needed.
struct Client {
    server: String,
    timeout: Duration,
    connection: Option<Connection>,
    was_connected: bool,
}

impl Client {
    fn new(server: String, timeout: Duration) -> Self {
        Self {
            server,
            timeout,
            connection: None,
            was_connected: false,
        }
    }

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

    fn connect(&mut self) -> Result<(), Failure> {
        self.connection = Some(self.take_connection()?);
        Ok(())
    }

    /// Sends a request and reads its answer.
    fn ask<T>(
        &mut self,
        request: &[u8],
        answer: impl FnOnce(&mut Connection) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut connection = self.take_connection()?;
        let sent = connection.0.get_mut().write_all(request);
        let answer = answer(&mut connection);
        match (&sent, &answer) {
            (Ok(()), Ok(_) | Err(Failure::Refused(_))) => self.connection = Some(connection),
            // A server that has no room for a client says so and closes; its words explain more than a broken pipe.
            (Err(_), Err(Failure::Refused(_))) => {}
            _ => sent.map_err(Failure::from_read)?,
        }
        answer
    }

    /// Sends a request that is answered by one line. None: the key is not there.
    fn line(&mut self, request: &[&[u8]], valid: fn(&[u8]) -> bool) -> Result<Option<Vec<u8>>, Failure> {
        match self.ask(&[&request.concat(), "\r\n".as_bytes()].concat(), Connection::line)? {
            line if valid(&line) => Ok(Some(line)),
            line if line == b"NOT_FOUND" => Ok(None),
            line if line == b"NOT_STORED" => Err(Failure::Refused(line)),
            line => Err(Failure::Foreign(line)),
        }
    }

    fn get(&mut self, keys: &[Word]) -> Result<Vec<Option<Vec<u8>>>, Failure> {
        let mut found = vec![];
        for keys in keys.chunks(KEYS_PER_REQUEST) {
            let mut request = b"get".to_vec();
            for Word(key) in keys {
                request.push(b' ');
                request.extend_from_slice(key);
            }
            request.extend_from_slice(b"\r\n");
            found.extend(self.ask(&request, |connection| connection.values(keys))?);
        }
        Ok(found)
    }

    fn set(&mut self, Word(key): &Word, value: &[u8], ttl: Expiry, flags: u32) -> Result<Option<Vec<u8>>, Failure> {
        let numbers = format!(" {flags} {} {}\r\n", ttl.0, value.len());
        let stored = self.line(&[b"set ", key, numbers.as_bytes(), value], |line| line == b"STORED");
        if matches!(&stored, Err(Failure::Refused(words)) if !words.starts_with(b"SERVER_ERROR")) {
            // A server that refuses the line may take the value for further commands, and answer those too.
            self.connection = None;
        }
        stored
    }

    fn delete(&mut self, Word(key): &Word) -> Result<Option<Vec<u8>>, Failure> {
        self.line(&[b"delete ", key], |line| line == b"DELETED")
    }

    fn touch(&mut self, Word(key): &Word, Expiry(ttl): Expiry) -> Result<Option<Vec<u8>>, Failure> {
        self.line(&[b"touch ", key, format!(" {ttl}").as_bytes()], |line| {
            line == b"TOUCHED"
        })
    }

    /// `incr` or `decr`: the new number.
    fn count(&mut self, verb: &str, step: &Step) -> Result<Option<Vec<u8>>, Failure> {
        let by = format!(" {}", step.by);
        let request = [verb.as_bytes(), b" ", &step.key.0, by.as_bytes()];
        self.line(&request, |line| !line.is_empty() && line.iter().all(u8::is_ascii_digit))
    }

    fn flush(&mut self) -> Result<Option<Vec<u8>>, Failure> {
        self.line(&[b"flush_all"], |line| line == b"OK")
    }

    fn version(&mut self) -> Result<Option<Vec<u8>>, Failure> {
        let line = self.line(&[b"version"], |line| line.starts_with(b"VERSION "))?;
        Ok(line.map(|line| line[b"VERSION ".len()..].to_vec()))
    }

    /// The lines that `stats` is answered by, each as the words STAT, a name and a value, where it has that form.
    fn stats(&mut self, what: &[Word]) -> Result<Vec<Vec<u8>>, Failure> {
        let mut request = b"stats".to_vec();
        for Word(word) in what.iter().filter(|Word(word)| word != b"general") {
            request.push(b' ');
            request.extend_from_slice(word);
        }
        request.extend_from_slice(b"\r\n");
        self.ask(&request, |connection| {
            let mut lines = vec![];
            loop {
                let line = connection.line()?;
                match line.as_slice() {
                    b"END" => return Ok(lines),
                    b"OK" | b"RESET" if lines.is_empty() => return Ok(vec![line]),
                    line if line.starts_with(b"STAT ") || line.starts_with(b"PREFIX ") => lines.push(line.to_vec()),
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
    fn run(&self, command: Command, client: &mut Client) -> Result<bool, Failure> {
        match command {
            Command::Get { keys } => {
                let found = client.get(&keys)?;
                let raw = self.raw && keys.len() == 1;
                for (key, value) in keys.iter().zip(&found) {
                    match value {
                        None => self.not_found(key, keys.len() > 1)?,
                        Some(value) if raw => self.write(&[value])?,
                        Some(value) => self.show(value)?,
                    }
                }
                Ok(found.iter().all(Option::is_some))
            }
            Command::Set { key, value, ttl, flags } => {
                self.answer(client.set(&key, value.as_bytes(), ttl, flags)?, &key, false)
            }
            Command::Delete { keys } => {
                let mut all = true;
                for key in &keys {
                    all &= self.answer(client.delete(key)?, key, keys.len() > 1)?;
                }
                Ok(all)
            }
            Command::Stats { what } => self.table(&client.stats(&what)?),
            Command::Incr(step) => self.answer(client.count("incr", &step)?, &step.key, false),
            Command::Decr(step) => self.answer(client.count("decr", &step)?, &step.key, false),
            Command::Touch { key, ttl } => self.answer(client.touch(&key, ttl)?, &key, false),
            Command::Flush => self.show(&client.flush()?.unwrap_or_default()),
            Command::Version => self.show(&client.version()?.unwrap_or_default()),
        }
    }

    fn answer(&self, answer: Option<Vec<u8>>, key: &Word, one_of_several: bool) -> Result<bool, Failure> {
        match answer {
            Some(line) => self.show(&line),
            None => self.not_found(key, one_of_several),
        }
    }

    /// Shows statistics with their values below each other.
    fn table(&self, lines: &[Vec<u8>]) -> Result<bool, Failure> {
        let split = |line: &'_ [u8]| {
            let row = line.strip_prefix(b"STAT ")?;
            let end = row.iter().position(|byte| *byte == b' ')?;
            Some((row[..end].to_vec(), row[end + 1..].to_vec()))
        };
        let width = lines
            .iter()
            .filter_map(|line| Some(split(line)?.0.len()))
            .max()
            .unwrap_or(0);
        for line in lines {
            match split(line) {
                Some((name, value)) => {
                    self.show(&[&name[..], &b" ".repeat(width + 2 - name.len()), &value].concat())?
                }
                None => self.show(line)?,
            };
        }
        Ok(true)
    }

    /// On a terminal the note stands where the value would; elsewhere it must not be taken for one.
    fn not_found(&self, Word(key): &Word, name_it: bool) -> Result<(), Failure> {
        let mut note = "(not found)".to_owned();
        if name_it {
            let _ = write!(note, " {}", plain_or_quoted(key));
        }
        if self.terminal {
            return self.write(&[note.as_bytes(), b"\n"]);
        }
        complain(&note);
        Ok(())
    }

    /// Shows a value or a line. A terminal obeys what it is shown, so it gets nothing but plain text.
    fn show(&self, bytes: &[u8]) -> Result<(), Failure> {
        if self.terminal {
            return self.write(&[plain_or_quoted(bytes).as_bytes(), b"\n"]);
        }
        self.write(&[bytes, b"\n"])
    }

    fn write(&self, parts: &[&[u8]]) -> Result<(), Failure> {
        let mut out = io::stdout().lock();
        let written = parts.iter().try_for_each(|part| out.write_all(part));
        written.and_then(|()| out.flush()).map_err(Failure::Output)
    }
}

/// Says something on standard error; when that is gone, there is nobody to tell.
fn complain(text: &str) {
    let _ = writeln!(io::stderr(), "memkv-cli: {}", text.trim_end());
}

/// A text as it is, anything else in quotes.
fn plain_or_quoted(bytes: &[u8]) -> String {
    let plain = |text: &&str| !text.contains(|c: char| c.is_control() && c != '\n' && c != '\t');
    match std::str::from_utf8(bytes).ok().filter(plain) {
        Some(text) => text.to_owned(),
        None => quote(bytes),
    }
}

/// In quotes and with escapes, as a line can say it.
fn quote(bytes: &[u8]) -> String {
    let mut quoted = "\"".to_owned();
    for byte in bytes {
        match byte {
            b'\n' => quoted.push_str("\\n"),
            b'\r' => quoted.push_str("\\r"),
            b'\t' => quoted.push_str("\\t"),
            b'"' | b'\\' => quoted.extend(['\\', *byte as char]),
            b' '..=b'~' => quoted.push(*byte as char),
            _ => {
                // Writing to a string does not fail.
                let _ = write!(quoted, "\\x{byte:02x}");
            }
        }
    }
    quoted.push('"');
    quoted
}

/// Takes the next word off a line: up to a blank, or in quotes.
fn take_word(line: &mut &[u8]) -> Result<Option<Vec<u8>>, String> {
    *line = line.trim_ascii_start();
    let Some(mut rest) = line.strip_prefix(b"\"") else {
        let end = line.iter().position(u8::is_ascii_whitespace).unwrap_or(line.len());
        let (word, rest) = line.split_at(end);
        *line = rest;
        return Ok((end > 0).then(|| word.to_vec()));
    };
    let mut word = vec![];
    loop {
        let (byte, used) = match rest {
            [] => return Err("a quote is opened and not closed".to_owned()),
            [b'"', behind @ ..] if behind.first().is_none_or(u8::is_ascii_whitespace) => {
                *line = behind;
                return Ok(Some(word));
            }
            [b'"', ..] => return Err("a blank must follow the closing quote; inside quotes write \\\"".to_owned()),
            [b'\\', b'n', ..] => (b'\n', 2),
            [b'\\', b'r', ..] => (b'\r', 2),
            [b'\\', b't', ..] => (b'\t', 2),
            [b'\\', escaped @ (b'"' | b'\\'), ..] => (*escaped, 2),
            [b'\\', b'x', high, low, ..] if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => {
                let digit = |byte: u8| (byte as char).to_digit(16).unwrap_or(0) as u8;
                (digit(*high) << 4 | digit(*low), 4)
            }
            [b'\\', ..] => return Err("an escape is one of \\n \\r \\t \\\" \\\\ \\xNN".to_owned()),
            [byte, ..] => (*byte, 1),
        };
        word.push(byte);
        rest = &rest[used..];
    }
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
    let value = if line.starts_with(b"\"") {
        let value = take_word(&mut line)?;
        if take_options(&mut line, &mut words)?.is_some() {
            return Err("behind a value in quotes stand only options; inside quotes write \\\"".to_owned());
        }
        value
    } else {
        (!line.is_empty()).then(|| line.to_vec())
    };
    // Whatever the value looks like, it is no option.
    words.push(b"--".to_vec());
    words.extend(key.into_iter().chain(value));
    Ok(words)
}

/// What became of a line.
enum Next {
    Continue,
    Exit,
}

fn run_line(line: &[u8], client: &mut Client, screen: &Screen) -> Result<Next, Failure> {
    let words = split_line(line).map_err(Failure::Unclear)?;
    if words.is_empty() {
        return Ok(Next::Continue);
    }
    match Line::try_parse_from(words.into_iter().map(OsString::from_vec)) {
        Ok(Line::Exit) => Ok(Next::Exit),
        Ok(Line::Command(command)) => screen.run(command, client).map(|_| Next::Continue),
        Err(error) if error.use_stderr() => {
            let text = error.to_string();
            let text = text.strip_prefix("error: ").unwrap_or(&text);
            Err(Failure::Unclear(text.replace("'--help'", "'help'")))
        }
        Err(help) => screen.write(&[help.to_string().as_bytes()]).map(|()| Next::Continue),
    }
}

/// Runs the lines of standard input. False: one of them failed.
fn run_pipe(client: &mut Client, screen: &Screen) -> Result<bool, Failure> {
    let mut all = true;
    let mut input = io::stdin().lock();
    let mut line = vec![];
    for number in 1.. {
        line.clear();
        let read = input.read_until(b'\n', &mut line);
        if read.map_err(|error| Failure::Unclear(format!("cannot read standard input: {error}")))? == 0 {
            break;
        }
        match run_line(&line, client, screen) {
            Ok(Next::Continue) => {}
            Ok(Next::Exit) => break,
            // The lines that follow would fare no better.
            Err(failure @ (Failure::Unreachable(_) | Failure::Output(_))) => return Err(failure),
            Err(failure) => {
                complain(&format!(
                    "line {number}: {}",
                    failure.describe(&client.server, client.timeout)
                ));
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
    let state = state.or_else(|| Some(std::env::home_dir()?.join(".local/state")))?;
    let folder = state.join("memkv-cli");
    std::fs::create_dir_all(&folder).ok()?;
    Some(folder.join("history"))
}

/// Asks for lines until the user leaves.
fn run_prompt(client: &mut Client, screen: &Screen) -> Result<bool, Failure> {
    client.connect()?;
    let unusable = |error: ReadlineError| Failure::Unclear(format!("the terminal cannot be used: {error}"));
    let config = rustyline::Config::builder().max_history_size(HISTORY_LINES_MAX);
    let config = config.map_err(unusable)?.auto_add_history(true).build();
    let mut editor = rustyline::Editor::<(), DefaultHistory>::with_config(config).map_err(unusable)?;
    // The prompt works as well without a history, so it does not matter why there is none.
    let history = history_path();
    if let Some(path) = &history {
        let _ = editor.load_history(path);
    }
    let prompt = format!("{}> ", client.server);
    loop {
        match editor.readline(&prompt) {
            Ok(line) => {
                if let Some(path) = &history {
                    // At once, so that a terminal that is closed takes nothing along.
                    let _ = editor.append_history(path);
                }
                match run_line(line.as_bytes(), client, screen) {
                    Ok(Next::Continue) => {}
                    Ok(Next::Exit) => return Ok(true),
                    Err(failure @ Failure::Output(_)) => return Err(failure),
                    Err(failure) => complain(&failure.describe(&client.server, client.timeout)),
                }
            }
            // Ctrl-C: the line is dropped.
            Err(ReadlineError::Interrupted) => {}
            Err(ReadlineError::Eof) => return Ok(true),
            Err(error) => return Err(unusable(error)),
        }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let mut client = Client::new(arguments.server, arguments.timeout);
    let terminal = io::stdout().is_terminal();
    let screen = Screen {
        terminal,
        raw: !terminal && arguments.command.is_some(),
    };
    let result = match arguments.command {
        Some(command) => screen.run(command, &mut client),
        None if io::stdin().is_terminal() => run_prompt(&mut client, &screen),
        None => run_pipe(&mut client, &screen),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        // Whoever read the output has seen enough.
        Err(Failure::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(failure) => {
            complain(&failure.describe(&client.server, client.timeout));
            ExitCode::FAILURE
        }
    }
}
