//! The servers of a comparison: where they are described, and the processes that this program starts and ends.

use crate::process::pin;
use crate::protocol::ProtocolName;
use crate::worker::VerifyValues;
use serde::Deserialize;
use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A server to compare, as a file of targets describes it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerSpec {
    /// What to call it.
    pub name: String,
    /// The wire protocol.
    pub protocol: ProtocolName,
    /// Protocols that the same process speaks, too, each at a port of its own. With these, each protocol is a row of the
    /// comparison, called `NAME/PROTOCOL`.
    #[serde(default)]
    pub also: Vec<ProtocolName>,
    /// The program and its arguments. `{port}` and `{cpu}` stand for the port and the CPUs that are given to it, and
    /// `{port-http}` for the port of the further protocol `http`; `{dir}` for an empty directory of its own, below the one for
    /// temporary files (`TMPDIR`), which is removed with the server. No shell is involved; words with spaces go in quotes.
    pub command: Option<String>,
    /// Instead of a command: the address of a server that runs already.
    pub address: Option<String>,
    /// The process id of a server that runs already, for its CPU time and memory.
    pub pid: Option<u32>,
    /// Whether each request goes to the core that owns its key.
    #[serde(default)]
    pub route: bool,
    /// How much of its values is compared, if not as much as of the others'.
    pub verify_values: Option<VerifyValues>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TargetsFile {
    server: Vec<ServerSpec>,
}

/// Reads a file of targets.
///
/// # Errors
///
/// A sentence naming cause and remedy.
pub fn read_targets(path: &Path) -> Result<Vec<ServerSpec>, String> {
    let shown = path.display();
    let text = std::fs::read_to_string(path).map_err(|e| format!("cannot read the file of targets {shown}: {e}"))?;
    parse_targets(&text).map_err(|e| format!("{shown}: {e}"))
}

fn parse_targets(text: &str) -> Result<Vec<ServerSpec>, String> {
    let file: TargetsFile = toml::from_str(text).map_err(|e| {
        format!("{e}write a [[server]] table per server, with name, protocol, and either command or address (and pid)")
    })?;
    let mut names = HashSet::new();
    for spec in &file.server {
        if !names.insert(&spec.name) {
            return Err(format!(
                "two servers are called '{}'; give each a name of its own",
                spec.name
            ));
        }
        let name = &spec.name;
        match (&spec.command, &spec.address) {
            (Some(_), Some(_)) => return Err(format!("server '{name}' has a command and an address; leave one out")),
            (None, None) => return Err(format!("server '{name}' has neither a command nor an address; add one")),
            (Some(command), None) if !command.contains("{port}") => {
                return Err(format!(
                    "the command of server '{name}' does not contain {{port}}, so it cannot be reached"
                ));
            }
            (Some(_), None) if spec.pid.is_some() => {
                return Err(format!(
                    "server '{name}' has a command and a pid; the pid goes with an address"
                ));
            }
            (None, Some(_)) if !spec.also.is_empty() => {
                return Err(format!(
                    "server '{name}' has an address, which is that of one protocol; leave 'also' out, and write a [[server]] \
                     table for each address"
                ));
            }
            _ => {}
        }
        for (i, also) in spec.also.iter().enumerate() {
            if *also == spec.protocol || spec.also[..i].contains(also) {
                return Err(format!(
                    "server '{name}' has the protocol {} twice; leave one out",
                    also.name()
                ));
            }
            let place = port_of(*also);
            if spec.command.as_ref().is_some_and(|command| !command.contains(&place)) {
                return Err(format!(
                    "the command of server '{name}' does not contain {place}, so that protocol cannot be reached"
                ));
            }
        }
        if let Some(command) = &spec.command {
            words(command).map_err(|e| format!("the command of server '{name}' {e}"))?;
        }
    }
    Ok(file.server)
}

/// What stands for an empty directory in a command.
const DIRECTORY: &str = "{dir}";

/// What stands for the port of a further protocol in a command.
fn port_of(protocol: ProtocolName) -> String {
    format!("{{port-{}}}", protocol.name())
}

/// Servers this program knows how to start.
pub const KNOWN: [&str; 4] = ["memcached", "redis", "redis-always", "redis-everysec"];

/// What memcached may use for items unless a load needs more, in MiB.
pub const MEMORY_MIB: u64 = 4096;

/// The description of a known server, which may use so many MiB for items if it is one that has to be told.
///
/// # Errors
///
/// A sentence naming cause and remedy when it is unknown or not installed.
pub fn known(name: &str, memory_mib: u64) -> Result<ServerSpec, String> {
    // SAFETY: the call takes nothing and cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    let (program, protocol, command) = match name {
        "memcached" => {
            let user = if root { " -u nobody" } else { "" };
            let command = format!("memcached -t 1 -U 0 -l 127.0.0.1 -p {{port}} -m {memory_mib} -c 4096{user}");
            ("memcached", ProtocolName::Memcached, command)
        }
        "redis" | "redis-always" | "redis-everysec" => {
            let persistence = match name.strip_prefix("redis-") {
                Some(sync) => format!("yes --appendfsync {sync} --dir {{dir}}"),
                None => "no".to_owned(),
            };
            let command = format!("redis-server --bind 127.0.0.1 --port {{port}} --save '' --appendonly {persistence}");
            ("redis-server", ProtocolName::Resp, command)
        }
        _ => {
            return Err(format!(
                "'{name}' is not a server known here; known are {}",
                KNOWN.join(", ")
            ));
        }
    };
    let path = std::env::var_os("PATH").unwrap_or_default();
    if !std::env::split_paths(&path).any(|directory| directory.join(program).is_file()) {
        return Err(format!(
            "{program} is not installed; install it, or leave {name} out of --with"
        ));
    }
    Ok(ServerSpec {
        name: name.to_string(),
        protocol,
        also: Vec::new(),
        command: Some(command),
        address: None,
        pid: None,
        route: false,
        verify_values: None,
    })
}

/// Splits a command line at spaces outside of quotes.
fn words(text: &str) -> Result<Vec<String>, &'static str> {
    let mut words = Vec::new();
    let (mut word, mut quote) = (None::<String>, None);
    for c in text.chars() {
        match quote {
            Some(q) if c == q => quote = None,
            None if c == '\'' || c == '"' => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            None if c.is_whitespace() => words.extend(word.take()),
            _ => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    match quote {
        Some(_) => Err("has a quote without an end; close it"),
        None if words.is_empty() => Err("is empty; name a program"),
        None => Ok(words),
    }
}

/// A server that answers, by one of its protocols. A process that this program started is ended with the last of its
/// servers; others are left alone.
#[derive(Debug)]
pub struct Server {
    /// What to call it.
    pub name: String,
    /// The wire protocol.
    pub protocol: ProtocolName,
    /// Where it listens.
    pub address: SocketAddr,
    /// Its process, if known.
    pub pid: Option<u32>,
    /// Whether each request goes to the core that owns its key.
    pub route: bool,
    /// How much of its values is compared, if not as much as of the others'.
    pub verify_values: Option<VerifyValues>,
    process: Option<Arc<Process>>,
}

impl Server {
    /// Starts the server if it has a command, on `cpus` unless they are empty, and waits until it accepts connections.
    ///
    /// # Errors
    ///
    /// A sentence naming cause and remedy.
    pub fn launch(spec: &ServerSpec, cpus: &[usize]) -> Result<Server, String> {
        Ok(Server::launch_all(spec, cpus)?.swap_remove(0))
    }

    /// The same; one for each of its protocols, the first one first.
    ///
    /// # Errors
    ///
    /// A sentence naming cause and remedy.
    pub fn launch_all(spec: &ServerSpec, cpus: &[usize]) -> Result<Vec<Server>, String> {
        let name = &spec.name;
        let Some(command) = &spec.command else {
            let text = spec.address.as_deref().unwrap_or_default();
            let address = text.to_socket_addrs().ok().and_then(|mut a| a.next());
            let address = address.ok_or(format!("'{text}' is no address of server '{name}'; write HOST:PORT"))?;
            TcpStream::connect_timeout(&address, Duration::from_secs(2))
                .map_err(|e| format!("server '{name}' at {address} does not answer: {e}; start it first"))?;
            return Ok(vec![Server {
                name: name.clone(),
                protocol: spec.protocol,
                address,
                pid: spec.pid,
                route: spec.route,
                verify_values: spec.verify_values,
                process: None,
            }]);
        };
        let protocols: Vec<_> = std::iter::once(spec.protocol)
            .chain(spec.also.iter().copied())
            .collect();
        let ports = free_ports(protocols.len()).map_err(|e| format!("no free port on loopback: {e}"))?;
        let places = std::iter::once("{port}".to_string()).chain(spec.also.iter().copied().map(port_of));
        let directory = match command.contains(DIRECTORY) {
            true => Some(tempfile::Builder::new().prefix("memkv-bench-").tempdir()),
            false => None,
        };
        let directory = directory.transpose();
        let directory = directory.map_err(|e| format!("no directory for server '{name}': {e}; set TMPDIR"))?;
        let path = directory
            .as_ref()
            .map(|directory| directory.path().display().to_string());
        let list = cpus.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
        let filled_in: Vec<_> = std::iter::once(("{cpu}".to_string(), list))
            .chain(places.zip(ports.iter().map(u16::to_string)))
            .chain(path.map(|path| (DIRECTORY.to_string(), path)))
            .collect();
        // Split first: what is put in must not be split again.
        let words: Vec<String> = words(command)
            .map_err(|e| format!("the command of server '{name}' {e}"))?
            .into_iter()
            .map(|word| {
                filled_in
                    .iter()
                    .fold(word, |word, (place, with)| word.replace(place, with))
            })
            .collect();
        let mut process = Process::start(name, &words, cpus, ports[0])?;
        process.directory = directory;
        let addresses: Vec<_> = ports
            .into_iter()
            .map(|p| SocketAddr::from((Ipv4Addr::LOCALHOST, p)))
            .collect();
        for address in &addresses {
            process
                .wait_until_ready(*address)
                .map_err(|e| format!("server '{name}' ({}) {e}", words.join(" ")))?;
        }
        let process = Arc::new(process);
        let servers = protocols.iter().zip(addresses).map(|(&protocol, address)| Server {
            name: match spec.also[..] {
                [] => name.clone(),
                _ => format!("{name}/{}", protocol.name()),
            },
            protocol,
            address,
            pid: Some(process.child.id()),
            route: spec.route,
            verify_values: spec.verify_values,
            process: Some(process.clone()),
        });
        Ok(servers.collect())
    }

    /// Whether both are one process that this program started, so that what is written to one is found in the other.
    pub fn is_one_with(&self, other: &Server) -> bool {
        match (&self.process, &other.process) {
            (Some(mine), Some(theirs)) => Arc::ptr_eq(mine, theirs),
            _ => false,
        }
    }

    /// Stops the process until [`resume`](Self::resume), so that its idle work does not disturb the measurement of
    /// another server on the same CPU. Does nothing to a server that this program did not start.
    pub fn pause(&self) {
        if let Some(process) = &self.process {
            process.signal(libc::SIGSTOP);
        }
    }

    /// Lets the process go on.
    pub fn resume(&self) {
        if let Some(process) = &self.process {
            process.signal(libc::SIGCONT);
        }
    }
}

/// A process that this program started, and that ends with this.
#[derive(Debug)]
struct Process {
    child: Child,
    log: File,
    /// Its own, removed when it has ended.
    directory: Option<tempfile::TempDir>,
}

impl Process {
    /// Starts the program `words[0]` for the server `name`.
    fn start(name: &str, words: &[String], cpus: &[usize], port: u16) -> Result<Process, String> {
        let (log, out, err) = open_log(port).map_err(|e| {
            let directory = std::env::temp_dir();
            format!(
                "cannot write to {}: {e}; set TMPDIR to another directory",
                directory.display()
            )
        })?;
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).stdin(Stdio::null()).stdout(out).stderr(err);
        let cpus = cpus.to_vec();
        let parent = std::process::id();
        // SAFETY: between fork and exec only system calls are made, and no memory is allocated.
        unsafe {
            command.pre_exec(move || {
                // A server must not outlive this program, however it ends; a stopped one heeds no other signal.
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                if libc::getppid() as u32 != parent {
                    return Err(io::Error::from_raw_os_error(libc::ESRCH));
                }
                if cpus.is_empty() { Ok(()) } else { pin(&cpus) }
            });
        }
        let child = command.spawn().map_err(|e| {
            format!(
                "cannot start server '{name}' ({}): {e}; check its command",
                words.join(" ")
            )
        })?;
        Ok(Process {
            child,
            log,
            directory: None,
        })
    }

    fn wait_until_ready(&mut self, address: SocketAddr) -> Result<(), String> {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(status) = self.child.try_wait().ok().flatten() {
                return Err(format!("ended at once ({status}); it said: {}", self.last_words()));
            }
            if TcpStream::connect_timeout(&address, Duration::from_millis(200)).is_ok() {
                return Ok(());
            }
            if Instant::now() > end {
                return Err(format!("does not listen on {address}; it said: {}", self.last_words()));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The end of what the server printed.
    fn last_words(&self) -> String {
        let end = self.log.metadata().map_or(0, |m| m.len());
        let start = end.saturating_sub(500);
        let mut bytes = vec![0; (end - start) as usize];
        if self.log.read_exact_at(&mut bytes, start).is_err() {
            return "nothing that could be read".into();
        }
        let text = String::from_utf8_lossy(&bytes).trim().to_string();
        if text.is_empty() { "nothing".into() } else { text }
    }

    fn signal(&self, signal: i32) {
        // SAFETY: the child has not been waited for, so the id is still its own.
        unsafe { libc::kill(self.child.id() as i32, signal) };
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        self.signal(libc::SIGCONT);
        self.signal(libc::SIGTERM);
        let child = &mut self.child;
        let ended = crate::process::wait(Duration::from_secs(3), || !matches!(child.try_wait(), Ok(None)));
        if !ended {
            // It ignores the request; nothing more can be done about errors here either.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A file without a name for what a server prints, three times: to read, and for both of its outputs.
fn open_log(port: u16) -> io::Result<(File, File, File)> {
    let path = std::env::temp_dir().join(format!("memkv-bench-{}-{port}.log", std::process::id()));
    let file = File::options().read(true).append(true).create_new(true).open(&path)?;
    // Gone at once, so that nothing is left behind even if this program is killed.
    std::fs::remove_file(&path)?;
    Ok((file.try_clone()?, file.try_clone()?, file))
}

/// So many ports nobody listens on right now.
fn free_ports(count: usize) -> io::Result<Vec<u16>> {
    // All are held until the last one has been found, so that they differ.
    let listeners: io::Result<Vec<_>> = (0..count)
        .map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))
        .collect();
    listeners?
        .iter()
        .map(|listener| listener.local_addr().map(|address| address.port()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_lines_split() {
        assert_eq!(words("a  b 'c d' \"\" e'f'").unwrap(), ["a", "b", "c d", "", "ef"]);
        assert!(words("a 'b").is_err());
        assert!(words("  ").is_err());
    }

    #[test]
    fn targets_read() {
        let text = r#"
            [[server]]
            name = "mine"
            protocol = "memcached"
            command = "server --port {port} --cpus {cpu}"
            [[server]]
            name = "other"
            protocol = "redis"
            address = "127.0.0.1:6379"
            pid = 7
            verify_values = "off"
            [[server]]
            name = "many"
            protocol = "memcached"
            also = ["http", "grpc"]
            command = "server --port {port} --http {port-http} --grpc {port-grpc}"
        "#;
        let targets = parse_targets(text).unwrap();
        assert_eq!(targets.len(), 3);
        assert_eq!(targets[2].also, [ProtocolName::Http, ProtocolName::Grpc]);
        assert_eq!(targets[1].protocol, ProtocolName::Resp);
        assert_eq!(targets[1].pid, Some(7));
        assert_eq!(targets[1].verify_values, Some(VerifyValues::Off));
        for (wrong, why) in [
            ("[[server]]\nname='a'\nprotocol='text'", "neither"),
            (
                "[[server]]\nname='a'\nprotocol='text'\ncommand='x {port}'\naddress='y:1'",
                "leave one out",
            ),
            ("[[server]]\nname='a'\nprotocol='text'\ncommand='x'", "{port}"),
            (
                "[[server]]\nname='a'\nprotocol='text'\ncommand='x {port}'\npid=1",
                "pid",
            ),
            (
                "[[server]]\nname='a'\nprotocol='text'\nalso=['http']\ncommand='x {port}'",
                "{port-http}",
            ),
            (
                "[[server]]\nname='a'\nprotocol='http'\nalso=['http']\ncommand='x {port} {port-http}'",
                "twice",
            ),
            (
                "[[server]]\nname='a'\nprotocol='text'\nalso=['http']\naddress='y:1'",
                "for each address",
            ),
            ("[[server]]\nname='a'\nprotocol='nonsense'\naddress='y:1'", "nonsense"),
            ("[[server]]\nname='a'\nprotocol='text'\naddres='y:1'", "addres"),
            (
                "[[server]]\nname='a'\nprotocol='text'\naddress='y:1'\n[[server]]\nname='a'\nprotocol='text'\naddress='y:2'",
                "two servers",
            ),
        ] {
            let message = parse_targets(wrong).unwrap_err();
            assert!(message.contains(why), "{message}");
        }
    }

    #[test]
    fn a_command_that_fails_is_explained() {
        let spec = |command: &str| ServerSpec {
            name: "broken".into(),
            protocol: ProtocolName::Text,
            command: Some(command.into()),
            address: None,
            pid: None,
            route: false,
            verify_values: None,
            also: vec![],
        };
        let message = Server::launch(&spec("/nonexistent/server {port}"), &[]).unwrap_err();
        assert!(message.contains("cannot start server 'broken'"), "{message}");
        let message = Server::launch(&spec("/bin/sh -c 'echo no luck >&2; exit 3' {port}"), &[]).unwrap_err();
        assert!(message.contains("no luck"), "{message}");
    }
}
