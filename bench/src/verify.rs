//! A check of correctness rather than speed: many clients at once write random values under random keys, read them back
//! and compare.

use crate::driver::connect;
use crate::protocol::{Event, Parsed, Protocol, ProtocolName, Reply, Session, http};
use crate::route::Routes;
use crate::stats::{ErrorKind, Errors};
use crate::with_protocol;
use crate::workload::{Command, Rng, Value};
use serde::Serialize;
use std::collections::HashSet;
use std::io::{ErrorKind as Io, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

/// What to verify.
#[derive(Debug, Clone)]
pub struct VerifyConfig {
    /// The wire protocol.
    pub protocol: ProtocolName,
    /// The server.
    pub target: SocketAddr,
    /// Whether each client has keys of one core, and its connection there.
    pub route: bool,
    /// Clients at once, one connection each.
    pub clients: usize,
    /// Pairs of set and get per client.
    pub rounds: usize,
    /// Longest key, in bytes.
    pub max_key: usize,
    /// Longest value, in bytes.
    pub max_value: usize,
    /// Whether values are letters and digits only, instead of all that the protocol allows: any bytes, or any text.
    pub printable: bool,
    /// Seed of keys and values.
    pub seed: u64,
    /// Give up when nothing arrives for this long.
    pub timeout: Duration,
}

/// What was found.
#[derive(Debug, Serialize)]
pub struct VerifyReport {
    /// Clients at once.
    pub clients: usize,
    /// Values written.
    pub sets: u64,
    /// Values read back and compared.
    pub gets: u64,
    /// Values read back that were missing or not what was written.
    pub mismatches: u64,
    /// Everything else that went wrong: how often, and what.
    pub errors: Vec<(u64, String)>,
    /// Duration in seconds.
    pub elapsed_s: f64,
}

impl VerifyReport {
    /// Whether every client got what it wrote.
    pub fn is_clean(&self) -> bool {
        self.mismatches == 0 && self.errors.is_empty()
    }

    /// The report as text for people.
    pub fn text(&self) -> String {
        let mut text = format!(
            "{} clients wrote {} values and compared {} in {:.2} s\nmismatches  {}\n",
            self.clients, self.sets, self.gets, self.elapsed_s, self.mismatches
        );
        if self.errors.is_empty() {
            text += "errors      none\n";
        }
        for (count, what) in &self.errors {
            text += &format!("errors      {count} x {what}\n");
        }
        text
    }
}

struct Client<P: Protocol> {
    socket: Option<TcpStream>,
    /// The core that owns its keys, if that matters.
    core: Option<usize>,
    command: Command,
    key: Vec<u8>,
    value: Vec<u8>,
    out: Vec<u8>,
    sent: usize,
    input: Vec<u8>,
    /// The only request in flight has place 0.
    session: P::Session,
    rounds_left: usize,
}

/// What random keys are made of.
const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.:";

/// Characters of random text beside letters, most of which need an escape somewhere.
const ODD: [&str; 12] = [
    " ", "\"", "\\", "\t", "\r", "\0", "\u{1f}", "\u{7f}", "é", "说", "🐘", "\u{2028}",
];

struct Check<'a> {
    config: &'a VerifyConfig,
    routes: Option<Routes>,
    rng: Rng,
    /// Keys that some client works on. Two clients with the same key would find each other's values.
    taken: HashSet<Vec<u8>>,
    sets: u64,
    gets: u64,
    mismatches: u64,
    errors: Errors,
}

/// Runs the check.
///
/// # Errors
///
/// A sentence naming cause and remedy when it could not begin.
pub fn verify(config: &VerifyConfig) -> Result<VerifyReport, String> {
    with_protocol!(config.protocol, P => verify_protocol::<P>(config))
}

fn verify_protocol<P: Protocol>(config: &VerifyConfig) -> Result<VerifyReport, String> {
    if config.clients == 0 || config.rounds == 0 || config.max_key == 0 || config.max_value == 0 {
        return Err("--clients, --rounds, --max-key and --max-value must be at least 1".into());
    }
    if config.max_key > P::MAX_KEY {
        return Err(format!(
            "the protocol {} allows keys of at most {} bytes; lower --max-key",
            P::NAME,
            P::MAX_KEY
        ));
    }
    if config.max_key < 4 && config.clients > 100 {
        return Err("keys of less than 4 bytes cannot be told apart among so many clients; raise --max-key".into());
    }
    let start = Instant::now();
    let routes = match config.route {
        true => Some(Routes::ask(config.protocol, config.target)?),
        false => None,
    };
    let mut check = Check {
        config,
        routes,
        rng: Rng::new(config.seed),
        taken: HashSet::new(),
        sets: 0,
        gets: 0,
        mismatches: 0,
        errors: Errors::default(),
    };
    let cores = check.cores();
    let (targets, cores): (Vec<_>, Vec<_>) = cores.into_iter().unzip();
    let mut clients = Vec::new();
    for (socket, &core) in connect(&targets, config.clients)?.into_iter().zip(cores.iter().cycle()) {
        let mut out = Vec::new();
        let mut client = Client::<P> {
            session: P::Session::open(1, &mut out),
            socket: Some(socket),
            core,
            command: Command::Get,
            key: Vec::new(),
            value: Vec::new(),
            out,
            sent: 0,
            input: Vec::new(),
            rounds_left: config.rounds,
        };
        check.begin(&mut client);
        clients.push(client);
    }
    check.turn(&mut clients)?;
    let errors = check.errors.seen().map(|(kind, count, example)| {
        let what = if example.is_empty() {
            kind.name().to_string()
        } else {
            format!("{}: {example}", kind.name())
        };
        (count, what)
    });
    Ok(VerifyReport {
        clients: config.clients,
        sets: check.sets,
        gets: check.gets,
        mismatches: check.mismatches,
        errors: errors.collect(),
        elapsed_s: start.elapsed().as_secs_f64(),
    })
}

impl Check<'_> {
    /// Serves all clients until none is left.
    fn turn<P: Protocol>(&mut self, clients: &mut [Client<P>]) -> Result<(), String> {
        let mut polled: Vec<libc::pollfd> = Vec::with_capacity(clients.len());
        let mut last = Instant::now();
        loop {
            polled.clear();
            for client in clients.iter() {
                let events = if client.sent < client.out.len() {
                    libc::POLLIN | libc::POLLOUT
                } else {
                    libc::POLLIN
                };
                // A negative descriptor is passed over.
                let fd = client.socket.as_ref().map_or(-1, |s| s.as_raw_fd());
                polled.push(libc::pollfd { fd, events, revents: 0 });
            }
            if polled.iter().all(|p| p.fd < 0) {
                return Ok(());
            }
            // SAFETY: the pointer is to as many entries as are named.
            let ready = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, 100) };
            if ready < 0 {
                let error = std::io::Error::last_os_error();
                if error.kind() != Io::Interrupted {
                    return Err(format!("cannot wait for sockets: {error}; use fewer --clients"));
                }
            }
            if ready > 0 {
                last = Instant::now();
            } else if last.elapsed() > self.config.timeout {
                for client in clients.iter_mut().filter(|c| c.socket.is_some()) {
                    self.errors.add(ErrorKind::Unanswered, 1, b"");
                    client.socket = None;
                }
                return Ok(());
            }
            for (client, _) in clients.iter_mut().zip(&polled).filter(|(_, p)| p.revents != 0) {
                if let Err((kind, detail)) = self.serve(client) {
                    self.errors.add(kind, 1, detail.as_bytes());
                    client.socket = None;
                }
            }
        }
    }

    /// Where clients connect, with the core whose keys they are to use there. A core that owns next to no keys of the kind
    /// that is drawn here is left out.
    fn cores(&mut self) -> Vec<(SocketAddr, Option<usize>)> {
        let draws = if self.routes.is_some() { 10_000 } else { 0 };
        let drawn: Vec<_> = (0..draws).map(|_| self.key()).collect();
        let Some(routes) = &self.routes else {
            return vec![(self.config.target, None)];
        };
        let owners: HashSet<usize> = drawn.iter().map(|key| routes.owner(key)).collect();
        let all = routes.addresses().iter().zip(0..);
        all.filter(|(_, core)| owners.contains(core))
            .map(|(&address, core)| (address, Some(core)))
            .collect()
    }

    /// A random key.
    fn key(&mut self) -> Vec<u8> {
        let len = 1 + self.rng.below(self.config.max_key as u64) as usize;
        (0..len)
            .map(|_| LETTERS[self.rng.below(LETTERS.len() as u64) as usize])
            .collect()
    }

    /// A random letter or digit.
    fn letter(&mut self) -> u8 {
        LETTERS[self.rng.below(62) as usize]
    }

    /// Random text of `len` bytes, as [`Protocol::TEXT_VALUES`] defines it.
    fn text(&mut self, len: usize) -> Vec<u8> {
        let mut text = vec![self.letter()];
        while text.len() < len {
            let odd = ODD[self.rng.below(ODD.len() as u64) as usize];
            // The last byte is a letter again.
            if self.rng.below(2) == 0 && text.len() + odd.len() < len {
                text.extend_from_slice(odd.as_bytes());
            } else {
                text.push(self.letter());
            }
        }
        text
    }

    /// Queues a set with a new key and value.
    fn begin<P: Protocol>(&mut self, client: &mut Client<P>) {
        client.key = loop {
            let key = self.key();
            let elsewhere =
                matches!((&self.routes, client.core), (Some(routes), Some(core)) if routes.owner(&key) != core);
            if !elsewhere && self.taken.insert(key.clone()) {
                break key;
            }
        };
        let len = 1 + self.rng.below(self.config.max_value as u64) as usize;
        client.value = match self.config.printable {
            true => (0..len).map(|_| self.letter()).collect(),
            false if P::TEXT_VALUES => self.text(len),
            false => (0..len).map(|_| self.rng.next_u64() as u8).collect(),
        };
        client.ask(Command::Set);
    }

    /// Sends and receives what is possible without waiting.
    fn serve<P: Protocol>(&mut self, client: &mut Client<P>) -> Result<(), (ErrorKind, String)> {
        let broken = |e: std::io::Error| match e.kind() {
            Io::ConnectionReset | Io::BrokenPipe => (ErrorKind::Closed, e.to_string()),
            _ => (ErrorKind::Broken, e.to_string()),
        };
        let mut buffer = [0; 8192];
        loop {
            let Some(mut socket) = client.socket.as_ref() else {
                return Ok(());
            };
            while client.sent < client.out.len() {
                match socket.write(&client.out[client.sent..]) {
                    Ok(n) => client.sent += n,
                    Err(e) if e.kind() == Io::WouldBlock => break,
                    Err(e) if e.kind() == Io::Interrupted => {}
                    Err(e) => return Err(broken(e)),
                }
            }
            match socket.read(&mut buffer) {
                Ok(0) => return Err((ErrorKind::Closed, String::new())),
                Ok(n) => client.input.extend_from_slice(&buffer[..n]),
                Err(e) if e.kind() == Io::WouldBlock => return Ok(()),
                Err(e) if e.kind() == Io::Interrupted => {}
                Err(e) => return Err(broken(e)),
            }
            if P::Session::MULTIPLEXED {
                self.read_frames(client)?;
                continue;
            }
            match P::reply(client.command, client.key.len(), &client.input) {
                Parsed::Incomplete => {}
                Parsed::Malformed => return Err(malformed(&client.input)),
                Parsed::Done(reply, len) => {
                    if len < client.input.len() {
                        let rest = client.input[len..].escape_ascii().to_string();
                        return Err((ErrorKind::Malformed, format!("more than one reply: {rest}")));
                    }
                    self.judge::<P>(client.command, &client.key, &client.value, reply);
                    client.input.clear();
                    self.next(client);
                }
            }
        }
    }

    /// Reads what was received where the session tells what was answered.
    fn read_frames<P: Protocol>(&mut self, client: &mut Client<P>) -> Result<(), (ErrorKind, String)> {
        loop {
            let (event, len) = match client.session.read(&client.input, &mut client.out) {
                Parsed::Done(event, len) => (event, len),
                Parsed::Incomplete => return Ok(()),
                Parsed::Malformed => return Err(malformed(&client.input)),
            };
            client.input.drain(..len);
            match event {
                Event::Nothing => {}
                Event::Closing => return Err((ErrorKind::Closed, client.session.closing().to_string())),
                Event::Answered(place) => {
                    match client.session.answer(place) {
                        Err(words) => {
                            self.judge::<P>(client.command, &client.key, &client.value, Reply::Refused(words))
                        }
                        Ok(message) => match P::reply(client.command, client.key.len(), message) {
                            Parsed::Done(reply, len) if len == message.len() => {
                                self.judge::<P>(client.command, &client.key, &client.value, reply);
                            }
                            _ => return Err(malformed(message)),
                        },
                    }
                    self.next(client);
                }
            }
        }
    }

    fn judge<P: Protocol>(&mut self, command: Command, asked: &[u8], written: &[u8], reply: Reply<'_>) {
        match (command, reply) {
            (Command::Set, Reply::Stored) => self.sets += 1,
            (Command::Set, Reply::NotStored) => self.errors.add(ErrorKind::NotStored, 1, b""),
            (_, Reply::Refused(text)) => self.errors.add(ErrorKind::Refused, 1, text),
            (_, Reply::Hit { key, value }) => {
                self.gets += 1;
                if *P::plain(value) != *written || key.is_some_and(|k| k != asked) {
                    self.mismatches += 1;
                }
            }
            (_, Reply::Chunked(chunks)) => {
                self.gets += 1;
                self.mismatches += u64::from(http::joined(chunks) != written);
            }
            _ => {
                self.gets += 1;
                self.mismatches += 1;
            }
        }
    }

    /// Queues what follows an answered request: the get after the set, or another round.
    fn next<P: Protocol>(&mut self, client: &mut Client<P>) {
        if client.command == Command::Set {
            return client.ask(Command::Get);
        }
        self.taken.remove(&client.key);
        client.rounds_left -= 1;
        if client.rounds_left == 0 {
            client.socket = None;
        } else {
            self.begin(client);
        }
    }
}

impl<P: Protocol> Client<P> {
    /// Queues a request for the key.
    fn ask(&mut self, command: Command) {
        // Not all of it: beside the request before, there may be something that the session has to say.
        self.out.drain(..self.sent);
        self.sent = 0;
        self.command = command;
        let start = self.out.len();
        match command {
            Command::Set => P::set(&mut self.out, &self.key, &Value::plain(&self.value)),
            _ => P::get(&mut self.out, &self.key),
        }
        self.session.requested(0, command, &mut self.out, start);
    }
}

fn malformed(input: &[u8]) -> (ErrorKind, String) {
    let start = input[..input.len().min(40)].escape_ascii().to_string();
    (ErrorKind::Malformed, start)
}
