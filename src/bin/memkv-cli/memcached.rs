//! The commands over memcached's text protocol.

use crate::failure::Failure;
use crate::screen::{Screen, complain};
use crate::{Command, Step, observed};
use std::ffi::{OsStr, OsString};
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The longest key of the protocol.
const KEY_BYTES_MAX: usize = 250;
/// Longer lines come from something else than a memcached.
const LINE_BYTES_MAX: u64 = 8192;
/// Larger values come from something else than a memcached.
const VALUE_BYTES_MAX: u64 = 1 << 30;
/// Longer times must be sent as Unix times.
const RELATIVE_SECONDS_MAX: u64 = 60 * 60 * 24 * 30;

/// What the protocol cannot say, before anything is sent.
pub(crate) fn check(command: &Command) -> Result<(), String> {
    match command {
        Command::Get { keys } | Command::Delete { keys } | Command::Stats { what: keys } => {
            keys.iter().try_for_each(|key| check_word(key))
        }
        Command::Set { key, ttl, .. } | Command::Touch { key, ttl } => {
            check_word(key)?;
            expiry(*ttl).map(drop)
        }
        Command::Incr(Step { key, .. }) | Command::Decr(Step { key, .. }) => check_word(key),
        Command::Flush | Command::Snapshot | Command::Version | Command::Hotkeys | Command::Slowlog => Ok(()),
        Command::Metrics | Command::Topology => Err(format!(
            "{} needs the protobuf protocol: --server protobuf://HOST:PORT, by default port 7001; stats is what the \
             memcached protocol has",
            command.name()
        )),
    }
}

/// The protocol sends a key or another word as it is: a blank or a line end in it would make it several.
fn check_word(word: &OsStr) -> Result<(), String> {
    let bytes = word.as_bytes();
    let invalid = |why| Err(format!("invalid word '{}': {why}", bytes.escape_ascii()));
    let length = bytes.len();
    if !(1..=KEY_BYTES_MAX).contains(&length) {
        return invalid(format!("it has {length} bytes, and must have 1 to {KEY_BYTES_MAX}"));
    }
    if bytes.iter().any(|byte| *byte == b' ' || byte.is_ascii_control()) {
        return invalid(
            "the memcached protocol has no blanks or control characters in it; --server protobuf://HOST:PORT takes any bytes"
                .to_owned(),
        );
    }
    Ok(())
}

/// When a value goes, as the protocol says it: seconds from now, 0 for never.
fn expiry(seconds: u64) -> Result<u64, String> {
    if seconds <= RELATIVE_SECONDS_MAX {
        return Ok(seconds);
    }
    // The protocol takes a large number for a Unix time, so a value kept for 31 days would be gone at once.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    match now.as_secs().checked_add(seconds) {
        Some(moment) if moment <= i32::MAX as u64 => Ok(moment),
        _ => Err("it ends after January 2038, which the protocol cannot say; 0 keeps a value for good".to_owned()),
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
pub(crate) struct Client {
    server: String,
    timeout: Duration,
    connection: Option<Connection>,
    was_connected: bool,
}

impl Client {
    pub(crate) fn new(server: String, timeout: Duration) -> Self {
        Self {
            server,
            timeout,
            connection: None,
            was_connected: false,
        }
    }

    /// Connects, if it is not yet done.
    pub(crate) fn connect(&mut self) -> Result<(), Failure> {
        self.connection = Some(self.take_connection()?);
        Ok(())
    }

    /// Carries a command out and shows its result. False: a key was not found.
    pub(crate) fn run(&mut self, command: &Command, screen: &Screen) -> Result<bool, Failure> {
        check(command).map_err(Failure::Unclear)?;
        match command {
            Command::Get { keys } => screen.each(keys, |key| self.get(key)),
            Command::Set { key, value, ttl, flags } => {
                screen.each([key], |key| self.set(key, value.as_bytes(), *ttl, *flags))
            }
            Command::Delete { keys } => screen.each(keys, |key| self.delete(key)),
            Command::Incr(step) => screen.each([&step.key], |key| self.count("incr", key, step.by)),
            Command::Decr(step) => screen.each([&step.key], |key| self.count("decr", key, step.by)),
            Command::Touch { key, ttl } => screen.each([key], |key| self.touch(key, *ttl)),
            Command::Flush => screen.show(&self.flush()?.unwrap_or_default()),
            Command::Snapshot => screen.show(&self.snapshot()?.unwrap_or_default()),
            Command::Version => screen.show(&self.version()?.unwrap_or_default()),
            Command::Stats { what } => screen.table(&self.stats(what)?),
            Command::Hotkeys => screen.table(&observed::hot_keys(&self.stats(&["hotkeys".into()])?)),
            Command::Slowlog => {
                let now_ms = SystemTime::now()
                    .duration_since(UNIX_EPOCH)
                    .unwrap_or_default()
                    .as_millis();
                let rows = self.stats(&["slowlog".into()])?;
                screen.table(&observed::slow_log(&rows, u64::try_from(now_ms).unwrap_or(u64::MAX)))
            }
            // Refused above.
            Command::Metrics | Command::Topology => Ok(false),
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
    fn get(&mut self, key: &[u8]) -> Answer {
        self.ask(&[b"get ", key], |connection| connection.value(key))
    }

    /// Stores a value.
    fn set(&mut self, key: &[u8], value: &[u8], ttl: u64, flags: u32) -> Answer {
        let ttl = expiry(ttl).map_err(Failure::Unclear)?;
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
    fn delete(&mut self, key: &[u8]) -> Answer {
        self.ask_line(&[b"delete ", key], |line| line == b"DELETED")
    }

    /// Gives a key a new end.
    fn touch(&mut self, key: &[u8], ttl: u64) -> Answer {
        let ttl = format!(" {}", expiry(ttl).map_err(Failure::Unclear)?);
        self.ask_line(&[b"touch ", key, ttl.as_bytes()], |line| line == b"TOUCHED")
    }

    /// `incr` or `decr`: the new number.
    fn count(&mut self, verb: &str, key: &[u8], by: u64) -> Answer {
        let by = format!(" {by}");
        let is_number = |line: &[u8]| !line.is_empty() && line.iter().all(u8::is_ascii_digit);
        self.ask_line(&[verb.as_bytes(), b" ", key, by.as_bytes()], is_number)
    }

    /// Deletes everything.
    fn flush(&mut self) -> Answer {
        self.ask_line(&[b"flush_all"], |line| line == b"OK")
    }

    /// Begins a snapshot.
    fn snapshot(&mut self) -> Answer {
        self.ask_line(&[b"snapshot"], |line| line == b"OK")
    }

    /// The server's version.
    fn version(&mut self) -> Answer {
        let line = self.ask_line(&[b"version"], |line| line.starts_with(b"VERSION "))?;
        Ok(line.map(|line| line[b"VERSION ".len()..].to_vec()))
    }

    /// Names and their values.
    fn stats(&mut self, what: &[OsString]) -> Result<Vec<Vec<String>>, Failure> {
        let mut request: Vec<&[u8]> = vec![b"stats"];
        for word in what.iter().filter(|word| *word != "general") {
            request.extend([b" ", word.as_bytes()]);
        }
        self.ask(&request, |connection| {
            let mut rows = vec![];
            loop {
                let line = connection.line()?;
                let text = String::from_utf8_lossy(&line);
                match text.split_once(' ') {
                    None if text == "END" => return Ok(rows),
                    // What `stats` carries out instead of telling.
                    None if rows.is_empty() && (text == "OK" || text == "RESET") => return Ok(vec![vec![text.into()]]),
                    Some(("STAT" | "PREFIX", row)) => rows.push(row.splitn(2, ' ').map(str::to_owned).collect()),
                    _ => return Err(Failure::Foreign(line)),
                }
            }
        })
    }
}
