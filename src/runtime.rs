//! The outside world: threads, executors, sockets, files, clocks. The only place that waits.
//!
//! [`Server::start`] probes the machine, binds the listeners, starts one thread with one glommio executor per core, which loads
//! what there is to load, and only then serves; HTTP, which tells when that is, answers before. On each executor one task runs:
//! the [`pump`], which moves bytes between the network ring ([`net`]), the channels to other cores ([`mesh`]) and the core's
//! [`Engine`].

mod allocator;
mod calls;
mod disk;
mod filer;
mod gateway;
mod grpc;
mod host;
mod http;
mod load;
mod memory;
mod mesh;
mod net;
mod pump;
mod recover;

use crate::budget::Pool;
use crate::config::{Bytes, Config, Eviction, Listen, PartitionerChoice};
use crate::engine::Engine;
use crate::model::CoreId;
use crate::partition::RangeTable;
use crate::protocol::Protocol;
pub use disk::{Folder, inspect};
use mesh::{Mesh, Peer};
use socket2::{Domain, Socket, Type};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

/// Why a server did not start: one message that names the cause and the remedy.
#[derive(Debug)]
pub struct StartError(String);

impl std::fmt::Display for StartError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for StartError {}

/// What all cores see.
#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    /// What there was to load is loaded, and all listeners listen.
    ready: AtomicBool,
    /// Cores that owe nobody anything any more while the server stops.
    quiet_cores: AtomicU16,
    /// Open connections on all cores, for the limit.
    connections: AtomicU32,
    /// The epoch of all cores' logs.
    epoch: AtomicU64,
    /// How many snapshots were asked for.
    snapshots: AtomicU32,
    peers: Arc<Vec<Peer>>,
    /// The memory limit.
    memory: memory::Watch,
}

impl Shared {
    /// Asks all cores for a snapshot.
    fn snapshot(&self) {
        self.snapshots.fetch_add(1, Ordering::SeqCst);
        self.peers.iter().for_each(Peer::ring);
    }

    fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.peers.iter().for_each(Peer::ring);
    }

    /// A core cannot begin: it says so, and the others do not wait for it when they end.
    fn give_up(&self, boot: &mpsc::Sender<Started>, error: StartError) {
        self.quiet_cores.fetch_add(1, Ordering::SeqCst);
        // Another core may have said so before.
        let _ = boot.send(Err(error));
    }

    /// All is loaded, and all sockets listen.
    fn serve(&self) {
        self.ready.store(true, Ordering::Release);
        self.peers.iter().for_each(Peer::ring);
    }
}

/// A running server. Dropping it stops it.
#[derive(Debug)]
pub struct Server {
    addresses: Vec<(Protocol, SocketAddr)>,
    core_ports: Arc<[u16]>,
    loaded: Option<LoadReport>,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Gives freed memory back to the system.
    giver: Option<JoinHandle<()>>,
}

/// What loading a file came to.
#[derive(Clone, Copy, Debug)]
pub struct LoadReport {
    /// Rows stored; a key that came twice counts twice.
    pub rows: u64,
    /// Rows that could not be understood and were left out.
    pub malformed: u64,
    /// How long it took.
    pub duration: Duration,
}

/// A handle that stops a server from anywhere.
#[derive(Clone, Debug)]
pub struct Stopper(Arc<Shared>);

impl Stopper {
    /// Has the server stop accepting, answer what it has received, and end. Returns at once.
    pub fn stop(&self) {
        self.0.stop();
    }

    /// Has the server make a snapshot of its data directory, if it has one. Returns at once.
    pub fn snapshot(&self) {
        self.0.snapshot();
    }
}

impl Server {
    /// Starts a server and returns when it serves.
    ///
    /// # Errors
    /// When the machine lacks something, an option does not fit, a port is taken, or a file cannot be loaded.
    pub fn start(config: Config) -> Result<Self, StartError> {
        allocator::leave_huge_pages_out();
        let cpus = host::allowed_cpus()?;
        host::raise_limits()?;
        host::probe()?;
        let cores = match config.cores {
            Some(cores) => cores,
            None => cpus.len().min(1024) as u16,
        };
        let pinned = usize::from(cores) <= cpus.len();
        if !pinned {
            log::warn!(
                "--cores {cores} on {} CPUs: the cores share CPUs, unpinned and without spinning; --cores {} would be faster",
                cpus.len(),
                cpus.len()
            );
        }
        check_limits(&config)?;
        let (pool, memory) = memory_limit(&config, cores)?;
        let mut data = recover::Data::open(&config)?;
        let table = Arc::new(match &data {
            Some(data) => data.table(cores)?,
            None => range_table(&config, cores)?,
        });
        let Bound {
            listeners,
            sockets,
            early_sockets,
            addresses,
            core_ports,
        } = bind(&config, cores)?;

        let mut config = config;
        if let Some(data) = &mut data {
            data.begin(&table, &mut config)?;
        }
        for (protocol, address) in &addresses {
            // What statistics show is what was bound, also where the system chose the port.
            match protocol {
                Protocol::Memcached => config.memcached = Listen::At(*address),
                Protocol::Text => config.text = Some(Listen::At(*address)),
                Protocol::Protobuf => config.protobuf = Listen::At(*address),
                Protocol::JsonLine => config.json_line = Listen::At(*address),
                Protocol::Http => config.http = Listen::At(*address),
                Protocol::Grpc => config.grpc = Listen::At(*address),
            }
        }
        host::check_open_files(config.limits.connections_max, cores);
        let config = Arc::new(config);
        let peers: Result<Vec<Peer>, _> = (0..cores).map(|_| Peer::new()).collect();
        let peers = Arc::new(peers.map_err(|error| StartError(format!("no eventfd: {error}")))?);
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            ready: AtomicBool::new(false),
            quiet_cores: AtomicU16::new(0),
            connections: AtomicU32::new(0),
            epoch: AtomicU64::new(0),
            snapshots: AtomicU32::new(0),
            peers: peers.clone(),
            memory,
        });
        let meshes = mesh::build(&peers);
        let clock = pump::Clock::start();
        let backlog = config.limits.backlog.min(i32::MAX as u32) as i32;
        let listen = |sockets: &[Socket]| {
            let mut sockets = sockets.iter();
            let listening = sockets.try_for_each(|socket| {
                socket.listen(backlog)?;
                // The connections inherit it, so that the next server may have the port at once.
                socket.set_reuse_address(true)
            });
            listening.map_err(|error| StartError(format!("cannot listen: {error}")))
        };
        listen(&early_sockets)?;
        if let (Some(path), Listen::At(address)) = (config.load.as_ref().or(config.data_dir.as_ref()), config.http) {
            let path = path.display();
            log::info!("loading {path}: http://{address}/readyz tells when that is done");
        }
        let data = data.map(Arc::new);
        let (boot, started) = Boot::new(usize::from(cores));
        // Dropping it stops the cores that were begun, when something is wrong.
        let mut server = Self {
            addresses,
            core_ports: core_ports.clone(),
            loaded: None,
            shared: shared.clone(),
            threads: vec![],
            giver: None,
        };
        for ((number, mesh), listeners) in meshes.into_iter().enumerate().zip(listeners) {
            let core = Core {
                id: CoreId(number as u16),
                cpu: pinned.then(|| cpus[number]),
                config: config.clone(),
                table: table.clone(),
                pool: pool.clone(),
                shared: shared.clone(),
                mesh,
                listeners,
                core_ports: core_ports.clone(),
                clock,
                data: data.clone(),
            };
            let started = started.clone();
            let thread = std::thread::Builder::new().name(format!("core {number}"));
            let thread = thread.spawn(move || core.run(started));
            let thread = thread.map_err(|error| StartError(format!("no thread for core {number}: {error}")))?;
            server.threads.push(thread);
        }
        // The cores have theirs.
        drop(started);
        let giver = std::thread::Builder::new().name("memory".to_owned());
        let giver = giver.spawn(move || shared.memory.give_back_until_end());
        let giver = giver.map_err(|error| StartError(format!("no thread that gives memory back: {error}")))?;
        server.giver = Some(giver);
        server.loaded = boot.finish()?;
        listen(&sockets)?;
        server.shared.serve();
        Ok(server)
    }

    /// Where it listens, with the ports that the system chose.
    pub fn addresses(&self) -> &[(Protocol, SocketAddr)] {
        &self.addresses
    }

    /// Where it listens for one protocol.
    pub fn address(&self, protocol: Protocol) -> Option<SocketAddr> {
        self.addresses
            .iter()
            .find(|(of, _)| *of == protocol)
            .map(|(_, address)| *address)
    }

    /// By core: the port at which it alone serves the protobuf protocol. Empty without `--core-ports`.
    pub fn core_ports(&self) -> &[u16] {
        &self.core_ports
    }

    /// What was loaded at start, when something was.
    pub fn loaded(&self) -> Option<LoadReport> {
        self.loaded
    }

    /// A handle that stops it from anywhere.
    pub fn stopper(&self) -> Stopper {
        Stopper(self.shared.clone())
    }

    /// Stops: no new connections, what was received is answered, then all ends.
    pub fn stop(mut self) {
        self.shared.stop();
        self.join();
    }

    /// Waits until somebody stops it.
    pub fn wait(mut self) {
        self.join();
    }

    fn join(&mut self) {
        for thread in self.threads.drain(..) {
            // A panic in a core was already told on standard error.
            let _ = thread.join();
        }
        if let Some(giver) = self.giver.take() {
            self.shared.memory.end();
            let _ = giver.join();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stop();
        self.join();
    }
}

/// A protocol that listens before all is loaded: it tells that.
fn listens_while_loading(protocol: Protocol) -> bool {
    protocol == Protocol::Http
}

/// What a core has loaded, or why it cannot serve.
type Started = Result<Option<LoadReport>, StartError>;

/// How the starting thread hears of the cores: each says once that it could serve, with what it loaded. What they are told then
/// is in [`Shared`]: to serve, or to end because one could not.
struct Boot {
    started: mpsc::Receiver<Started>,
    cores: usize,
}

impl Boot {
    /// For so many cores, each of which gets a copy of the sender.
    fn new(cores: usize) -> (Self, mpsc::Sender<Started>) {
        let (sender, started) = mpsc::channel();
        (Self { started, cores }, sender)
    }

    /// Waits for all cores.
    fn finish(self) -> Started {
        let mut report: Option<LoadReport> = None;
        for _ in 0..self.cores {
            let loaded = self
                .started
                .recv()
                .unwrap_or_else(|_| Err(StartError("a core ended while starting".to_owned())))?;
            if let Some(loaded) = loaded {
                let sum = report.get_or_insert(LoadReport { rows: 0, ..loaded });
                sum.rows += loaded.rows;
                sum.duration = sum.duration.max(loaded.duration);
            }
        }
        Ok(report)
    }
}

/// A core that does not serve all its listeners yet.
struct Starting {
    /// What is brought back first.
    restoring: Option<recover::Restoring>,
    loader: Option<load::Loader>,
    /// Until it has said what came of it.
    boot: Option<mpsc::Sender<Started>>,
}

impl Starting {
    /// Does a piece of what there is to do first.
    fn step(&mut self, engine: &mut Engine) {
        let loaded = match (&mut self.restoring, &mut self.loader) {
            (Some(restoring), _) => match restoring.step(engine) {
                Ok(false) => return,
                Ok(true) => {
                    self.restoring = None;
                    return;
                }
                Err(error) => Err(error),
            },
            // What it loads is logged, too.
            (None, Some(_)) if engine.is_log_full() => return,
            (None, Some(loader)) => match loader.step(engine) {
                Ok(None) => return,
                loaded => loaded,
            },
            (None, None) => Ok(None),
        };
        self.restoring = None;
        self.loader = None;
        if let Some(boot) = self.boot.take() {
            // Nobody listens when another core could not: this one will be told to stop.
            let _ = boot.send(loaded);
        }
    }

    /// There is more to do than to wait.
    fn is_loading(&self) -> bool {
        self.boot.is_some()
    }
}

/// What a core's thread begins with.
struct Core {
    id: CoreId,
    cpu: Option<usize>,
    config: Arc<Config>,
    table: Arc<RangeTable>,
    pool: Arc<Pool>,
    shared: Arc<Shared>,
    mesh: Mesh,
    listeners: Vec<net::Listener>,
    core_ports: Arc<[u16]>,
    clock: pump::Clock,
    data: Option<Arc<recover::Data>>,
}

impl Core {
    fn run(self, boot: mpsc::Sender<Started>) {
        let placement = match self.cpu {
            Some(cpu) => glommio::Placement::Fixed(cpu),
            None => glommio::Placement::Unbound,
        };
        let executor = glommio::LocalExecutorBuilder::new(placement)
            .name(&format!("core {}", self.id.0))
            // The network has a ring of its own, and the default would exceed a usual limit on locked memory.
            .io_memory(64 << 10)
            .ring_depth(128)
            .make();
        match executor {
            Ok(executor) => executor.run(self.serve(boot)),
            Err(error) => {
                let reason = format!("core {} has no executor: {error}", self.id.0);
                self.shared.give_up(&boot, StartError(reason));
            }
        }
    }

    async fn serve(self, boot: mpsc::Sender<Started>) {
        let clock = self.clock;
        let (config, table) = (self.config.clone(), self.table);
        let spinning = self.cpu.is_some();
        let mut engine = Engine::new(self.id, table, self.pool, config.clone(), clock.wall());
        engine.set_core_ports(self.core_ports);
        let loader = load::Loader::open(&config, self.id);
        let files = match &self.data {
            Some(data) => data.core(&mut engine, self.id, &self.shared.peers).map(Some),
            None => Ok(None),
        };
        let doorbell = self.shared.peers[usize::from(self.id.0)].doorbell();
        let net = doorbell.and_then(|doorbell| net::Net::new(self.listeners, doorbell, config.limits.receive_buffers));
        let net = net.map_err(|error| StartError(format!("no network ring for core {}: {error}", self.id.0)));
        // The first sleep of an executor takes tens of milliseconds: get it over with before anybody waits.
        glommio::timer::sleep(Duration::from_millis(1)).await;
        match (loader, files, net) {
            (Ok(loader), Ok(files), Ok(net)) => {
                let (filer, restoring) = files.unzip();
                let starting = Starting {
                    restoring,
                    loader,
                    boot: Some(boot),
                };
                pump::run(engine, net, self.mesh, self.shared, clock, spinning, starting, filer).await;
            }
            (Err(error), ..) | (_, Err(error), _) | (.., Err(error)) => self.shared.give_up(&boot, error),
        }
    }
}

/// The limit of the whole process, and who keeps it.
fn memory_limit(config: &Config, cores: u16) -> Result<(Arc<Pool>, memory::Watch), StartError> {
    let allowed = memory::allowed(Path::new("/"));
    let given = config.limits.max_memory.map(|limit| limit.0);
    let limit = given.unwrap_or_else(|| memory::default_limit(allowed.bytes));
    let resident = memory::Resident::new();
    let resident = resident.map_err(|error| StartError(format!("cannot read /proc/self/statm: {error}")))?;
    let bytes = resident.bytes().unwrap_or_default();
    memory::check_limit(config, limit, cores, bytes)?;
    memory::warn_if_over(limit, &allowed);
    let at_the_limit = match config.limits.eviction {
        Eviction::None => "writes that need more are refused",
        Eviction::S3Fifo => "items make place for others",
    };
    log::info!(
        "the memory limit is {}, of {} that this process may use ({}); at it, {at_the_limit} (--eviction {})",
        Bytes(limit),
        Bytes(allowed.bytes),
        allowed.by,
        config.limits.eviction,
    );
    let pool = Pool::new(limit);
    pool.keep_for_connections(memory::reserve_of(limit));
    // Until it is measured.
    pool.set_other(bytes);
    let watch = memory::Watch::new(pool.clone(), resident, given.is_some(), allowed.bytes, cores);
    Ok((pool, watch))
}

fn check_limits(config: &Config) -> Result<(), StartError> {
    let limits = &config.limits;
    // Lengths of values travel in 32 bits.
    if limits.item_size_max.0 > 1 << 30 {
        return Err(StartError(format!(
            "--item-size-max {} is over the most there can be, 1g",
            limits.item_size_max
        )));
    }
    let request_bytes_max = limits.request_bytes_max();
    if !(4096..2 << 30).contains(&request_bytes_max) {
        return Err(StartError(
            "--request-bytes-max must be 4k or more, and less than 2g".to_owned(),
        ));
    }
    if limits.txn_bytes_max.0 >= 2 << 30 {
        return Err(StartError("--txn-bytes-max must be less than 2g".to_owned()));
    }
    if !(4096..2 << 30).contains(&limits.response_bytes_max()) {
        return Err(StartError(
            "--response-bytes-max must be 4k or more, and less than 2g".to_owned(),
        ));
    }
    if limits.input_bytes_max.0 < 4096 || limits.output_bytes_max.0 < 4096 {
        return Err(StartError(
            "--input-bytes-max and --output-bytes-max must be 4096 or more".to_owned(),
        ));
    }
    Ok(())
}

fn range_table(config: &Config, cores: u16) -> Result<RangeTable, StartError> {
    let seed = config.token_seed.unwrap_or_else(host::random);
    match config.partitioner.unwrap_or(PartitionerChoice::Hashed) {
        PartitionerChoice::Hashed if !config.boundaries.is_empty() => {
            Err(StartError("--boundaries needs --partitioner ordered".to_owned()))
        }
        PartitionerChoice::Hashed => Ok(RangeTable::even(seed, config.shards.unwrap_or(cores), cores)),
        PartitionerChoice::Ordered => {
            let boundaries: Vec<Vec<u8>> = config.boundaries.iter().map(|key| key.clone().into_bytes()).collect();
            let shards = config.shards.unwrap_or(boundaries.len() as u16 + 1);
            RangeTable::ordered(seed, &boundaries, shards, cores)
                .map_err(|error| StartError(format!("--boundaries: {error}")))
        }
    }
}

/// What was bound and does not listen yet.
struct Bound {
    /// For each core, one of each protocol.
    listeners: Vec<Vec<net::Listener>>,
    /// The same sockets once more, to begin listening on all of them at one place, when all is loaded.
    sockets: Vec<Socket>,
    /// And those that listen before that.
    early_sockets: Vec<Socket>,
    addresses: Vec<(Protocol, SocketAddr)>,
    core_ports: Arc<[u16]>,
}

/// Binds every listener once per core, so that every core can accept, and each core's own.
fn bind(config: &Config, cores: u16) -> Result<Bound, StartError> {
    let text = config.text_listen().map_err(StartError)?;
    let mut listeners: Vec<Vec<net::Listener>> = (0..cores).map(|_| vec![]).collect();
    let (mut addresses, mut sockets): (Vec<(Protocol, SocketAddr)>, _) = (vec![], vec![]);
    let mut early_sockets = vec![];
    let shared_by_all = [
        (Protocol::Memcached, config.memcached),
        (Protocol::Text, text),
        (Protocol::Protobuf, config.protobuf),
        (Protocol::JsonLine, config.json_line),
        (Protocol::Http, config.http),
        (Protocol::Grpc, config.grpc),
    ];
    for (protocol, listen) in shared_by_all {
        let Listen::At(mut address) = listen else { continue };
        let failed = |address, error| cannot_listen(protocol.name(), address, &error);
        let taken = addresses
            .iter()
            .find(|(_, other)| *other == address && address.port() != 0);
        if let Some((other, _)) = taken {
            let (name, other) = (protocol.name(), other.name());
            return Err(StartError(format!(
                "--{name} and --{other} are both {address}: choose another port for one"
            )));
        }
        if address.port() != 0 {
            // With SO_REUSEPORT a second server of the same user would silently share the port: look without it first.
            listener(address, false).map_err(|error| failed(address, error))?;
        }
        for per_core in &mut listeners {
            let socket = listener(address, true).map_err(|error| failed(address, error))?;
            if let Some(bound) = socket.local_addr().ok().and_then(|bound| bound.as_socket()) {
                address = bound;
            }
            let copy = socket.try_clone().map_err(|error| failed(address, error))?;
            if listens_while_loading(protocol) {
                early_sockets.push(copy);
            } else {
                sockets.push(copy);
            }
            per_core.push(net::Listener::new(socket.into(), protocol, false));
        }
        addresses.push((protocol, address));
    }
    if addresses.is_empty() {
        return Err(StartError(
            "every listener is off: there would be nothing to serve".to_owned(),
        ));
    }
    let mut core_ports = vec![];
    if let Some(base) = config.core_ports {
        let Listen::At(address) = config.protobuf else {
            return Err(StartError("--core-ports needs --protobuf, which is off".to_owned()));
        };
        for (core, per_core) in listeners.iter_mut().enumerate() {
            let port = match base {
                0 => Some(0),
                base => u16::try_from(usize::from(base) + core).ok(),
            };
            let Some(port) = port else {
                let last = usize::from(base) + usize::from(cores) - 1;
                return Err(StartError(format!(
                    "--core-ports {base}: the last of {cores} ports would be {last}"
                )));
            };
            let address = SocketAddr::new(address.ip(), port);
            if let Some((other, _)) = addresses.iter().find(|(_, other)| *other == address) {
                let other = other.name();
                return Err(StartError(format!(
                    "--core-ports {base} reaches {address}, which is --{other}: choose another base"
                )));
            }
            let failed = |error| cannot_listen("core-ports", address, &error);
            let socket = listener(address, false).map_err(failed)?;
            let bound = socket.local_addr().map_err(failed)?.as_socket();
            core_ports.push(bound.map_or(port, |bound| bound.port()));
            sockets.push(socket.try_clone().map_err(failed)?);
            per_core.push(net::Listener::new(socket.into(), Protocol::Protobuf, true));
        }
    }
    Ok(Bound {
        listeners,
        sockets,
        early_sockets,
        addresses,
        core_ports: core_ports.into(),
    })
}

fn cannot_listen(option: &str, address: SocketAddr, error: &std::io::Error) -> StartError {
    let remedy = match error.kind() {
        std::io::ErrorKind::AddrInUse => "another process listens there; stop it, or choose another port",
        std::io::ErrorKind::PermissionDenied => "ports below 1024 need a privilege; choose another port",
        std::io::ErrorKind::AddrNotAvailable => "no interface of this machine has that address",
        _ => "choose another address",
    };
    StartError(format!("cannot listen on {address} (--{option}): {error}: {remedy}"))
}

fn listener(address: SocketAddr, shared: bool) -> std::io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    // For a port that was used a moment ago. One that the system chooses must not be chosen for somebody else as well, which
    // this would allow until one of the two listens.
    socket.set_reuse_address(address.port() != 0)?;
    if shared {
        socket.set_reuse_port(true)?;
    }
    // Accepted sockets inherit both. A peer that vanished without a word is found out by the kernel.
    socket.set_tcp_nodelay(true)?;
    socket.set_keepalive(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}
