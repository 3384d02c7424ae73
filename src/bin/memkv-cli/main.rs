//! The client for people and scripts: one command from the arguments, or many from a prompt or a pipe, over memcached's
//! text protocol or the protobuf protocol.
//!
//! Arguments and lines end in the same [`Command`], so both understand the same things. A [`Client`] of either protocol asks
//! the server, and [`Screen`] shows what came of it. Exit codes: 0 when all went well, 1 when the server could not be asked,
//! refused, or did not have a key that the arguments named, 2 for arguments that make no sense.

mod failure;
mod line;
mod memcached;
mod observed;
mod protobuf;
mod screen;

use clap::{Args, CommandFactory, Parser, Subcommand};
use failure::Failure;
use rustyline::error::ReadlineError;
use rustyline::history::DefaultHistory;
use screen::{Screen, complain};
use std::ffi::OsString;
use std::io::{self, BufRead, ErrorKind, IsTerminal};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

/// Older lines are forgotten.
const HISTORY_LINES_MAX: usize = 1000;

/// How lines are written.
const LINE_HELP: &str = "\
A value is the rest of the line behind the key, blanks inside included, or a
text in quotes with the escapes \\n \\r \\t \\\" \\' \\\\ \\xNN. Quotes also hold a key
with blanks, which only the protobuf protocol knows. Options stand before the
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
    /// The server's address for memcached clients; or, behind protobuf://, the one for the protobuf protocol.
    #[arg(
        long,
        global = true,
        value_name = "[PROTOCOL://]HOST:PORT",
        default_value = "127.0.0.1:11211"
    )]
    server: Server,

    /// How long to wait for a connection, and for an answer (memcached: for each part of it): 500ms, 5s or 1m.
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
        #[arg(required = true, value_name = "KEY")]
        keys: Vec<OsString>,
    },
    /// Store a value.
    Set {
        key: OsString,
        #[arg(allow_hyphen_values = true)]
        value: OsString,
        /// How long the value is kept. 0: until it is deleted.
        #[arg(long, value_name = "SECONDS", default_value_t = 0, value_parser = parse_seconds)]
        ttl: u64,
        /// A number kept with the value, for programs that use one.
        #[arg(long, value_name = "N", default_value_t = 0)]
        flags: u32,
    },
    /// Delete keys.
    #[command(alias = "del")]
    Delete {
        #[arg(required = true, value_name = "KEY")]
        keys: Vec<OsString>,
    },
    /// Delete everything.
    #[command(alias = "flush_all")]
    Flush,
    /// Show statistics: general (or nothing), settings, items, conns, latency, cores and what else the server knows.
    Stats { what: Vec<OsString> },
    /// Show the keys that are asked for most now, hottest first.
    Hotkeys,
    /// Show the last requests that took too long, newest first, and where their time went.
    Slowlog,
    /// Add to a number.
    Incr(Step),
    /// Subtract from a number, down to 0.
    Decr(Step),
    /// Say anew how long a value is kept. 0: until it is deleted.
    Touch {
        key: OsString,
        #[arg(value_name = "SECONDS", value_parser = parse_seconds)]
        ttl: u64,
    },
    /// Have the server begin a snapshot of its data directory.
    Snapshot,
    /// Show the server's version.
    Version,
    /// Show counters, and how long requests took. Over the protobuf protocol.
    Metrics,
    /// Show which core owns which keys, and the cores' ports. Over the protobuf protocol.
    Topology,
}

impl Command {
    /// As it is typed.
    fn name(&self) -> &'static str {
        match self {
            Command::Get { .. } => "get",
            Command::Set { .. } => "set",
            Command::Delete { .. } => "delete",
            Command::Flush => "flush",
            Command::Stats { .. } => "stats",
            Command::Hotkeys => "hotkeys",
            Command::Slowlog => "slowlog",
            Command::Incr(_) => "incr",
            Command::Decr(_) => "decr",
            Command::Touch { .. } => "touch",
            Command::Snapshot => "snapshot",
            Command::Version => "version",
            Command::Metrics => "metrics",
            Command::Topology => "topology",
        }
    }
}

/// What `incr` and `decr` take.
#[derive(Clone, Debug, Args)]
struct Step {
    key: OsString,
    #[arg(value_name = "N", default_value_t = 1)]
    by: u64,
}

/// What servers are asked in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    Memcached,
    Protobuf,
}

/// A server as it is typed; its name is looked up when it is needed.
#[derive(Clone, Debug)]
struct Server {
    protocol: Protocol,
    /// Host and port.
    address: String,
}

impl FromStr for Server {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (protocol, address) = match text.split_once("://") {
            None => (Protocol::Memcached, text),
            Some(("memcached", address)) => (Protocol::Memcached, address),
            Some(("protobuf", address)) => (Protocol::Protobuf, address),
            Some((other, _)) => return Err(format!("{other} is no protocol; write memcached:// or protobuf://")),
        };
        match address.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0) => Ok(Self {
                protocol,
                address: address.to_owned(),
            }),
            _ => Err("write HOST:PORT, such as 127.0.0.1:11211, [::1]:11211 or protobuf://127.0.0.1:7001".to_owned()),
        }
    }
}

impl std::fmt::Display for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.protocol {
            Protocol::Memcached => write!(f, "{}", self.address),
            Protocol::Protobuf => write!(f, "protobuf://{}", self.address),
        }
    }
}

fn parse_seconds(text: &str) -> Result<u64, String> {
    text.parse()
        .map_err(|_| "it must be a number of seconds, 0 or more".to_owned())
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

/// Asks one server, over connections that are opened when they are needed.
enum Client {
    Memcached(memcached::Client),
    Protobuf(Box<protobuf::Client>),
}

impl Client {
    fn new(server: &Server, timeout: Duration) -> Self {
        let address = server.address.clone();
        match server.protocol {
            Protocol::Memcached => Client::Memcached(memcached::Client::new(address, timeout)),
            Protocol::Protobuf => Client::Protobuf(Box::new(protobuf::Client::new(address, timeout))),
        }
    }

    /// What the protocol cannot say.
    fn check(&self, command: &Command) -> Result<(), String> {
        match self {
            Client::Memcached(_) => memcached::check(command),
            Client::Protobuf(_) => protobuf::check(command),
        }
    }

    /// Connects, if it is not yet done.
    fn connect(&mut self) -> Result<(), Failure> {
        match self {
            Client::Memcached(client) => client.connect(),
            Client::Protobuf(client) => client.connect().map(drop),
        }
    }

    /// Carries a command out and shows its result. False: a key was not found.
    fn run(&mut self, command: &Command, screen: &Screen) -> Result<bool, Failure> {
        match self {
            Client::Memcached(client) => client.run(command, screen),
            Client::Protobuf(client) => client.run(command, screen),
        }
    }
}

/// Runs a line. False: it asks to leave.
fn run_line(line: &[u8], client: &mut Client, screen: &Screen) -> Result<bool, Failure> {
    let words = line::split_line(line).map_err(Failure::Unclear)?;
    if words.is_empty() {
        return Ok(true);
    }
    match Line::try_parse_from(words.into_iter().map(OsString::from_vec)) {
        Ok(Line::Exit) => return Ok(false),
        Ok(Line::Command(command)) => client.run(&command, screen)?,
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
fn run_pipe(client: &mut Client, server: &Server, screen: &Screen) -> Result<bool, Failure> {
    let unreadable = |error| Failure::Unclear(format!("cannot read standard input: {error}"));
    let mut all = true;
    for (number, line) in (1..).zip(io::stdin().lock().split(b'\n')) {
        match run_line(&line.map_err(unreadable)?, client, screen) {
            Ok(true) => {}
            Ok(false) => break,
            // The lines that follow would fare no better.
            Err(failure) if failure.is_final() => return Err(failure),
            Err(failure) => {
                complain(&format!("line {number}: {}", failure.describe(server)));
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
fn run_prompt(client: &mut Client, server: &Server, screen: &Screen) -> Result<bool, Failure> {
    // Who types should learn at once that nobody is there.
    client.connect()?;
    let unusable = |error: ReadlineError| Failure::Unclear(format!("the terminal cannot be used: {error}"));
    let config = rustyline::Config::builder()
        .max_history_size(HISTORY_LINES_MAX)
        .map_err(unusable)?;
    let config = config.auto_add_history(true).build();
    let mut editor = rustyline::Editor::<(), DefaultHistory>::with_config(config).map_err(unusable)?;
    // The prompt works as well without a history, so it does not matter why there is none.
    let history = history_path();
    let _ = history.as_ref().map(|path| editor.load_history(path));
    let prompt = format!("{server}> ");
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
            Err(failure) => complain(&failure.describe(server)),
        }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let server = &arguments.server;
    let mut client = Client::new(server, arguments.timeout);
    let terminal = io::stdout().is_terminal();
    let one_value = matches!(&arguments.command, Some(Command::Get { keys }) if keys.len() == 1);
    let screen = Screen {
        terminal,
        raw: one_value && !terminal,
    };
    let result = match arguments.command {
        Some(command) => {
            if let Err(text) = client.check(&command) {
                Arguments::command()
                    .error(clap::error::ErrorKind::ValueValidation, text)
                    .exit();
            }
            client.run(&command, &screen)
        }
        None if io::stdin().is_terminal() => run_prompt(&mut client, server, &screen),
        None => run_pipe(&mut client, server, &screen),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        // Whoever read the output has seen enough.
        Err(Failure::Output(error)) if error.kind() == ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(failure) => {
            complain(&failure.describe(server));
            ExitCode::FAILURE
        }
    }
}
