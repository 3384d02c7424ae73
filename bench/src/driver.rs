//! A run from beginning to end: connect, preload, warm up, measure, drain.

use crate::io::{self, Engine};
use crate::process::{CpuSample, CpuShares, ProcessSample, ServerUse, pin, precise_timers, raise_file_limit};
use crate::protocol::{BATCH_BYTES_MAX, Protocol, ProtocolName};
use crate::route::Routes;
use crate::server_counts::{Counter, TxnCounts};
use crate::stats::{ErrorKind, Errors, WorkerSummary};
use crate::with_protocol;
use crate::worker::{Connection, Phase, Shared, VerifyValues, Worker, WorkerConfig};
use crate::workload::{DistributionSpec, KeyChooser, Population, Ratio, SizeSpec, TxnSpec};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

/// Everything that defines a run.
#[derive(Debug, Clone)]
pub struct RunConfig {
    /// The wire protocol.
    pub protocol: ProtocolName,
    /// The server.
    pub target: SocketAddr,
    /// Whether each request goes to the core that owns its key.
    pub route: bool,
    /// Connections, over all threads.
    pub connections: usize,
    /// Requests in flight per connection.
    pub pipeline: usize,
    /// Generator threads.
    pub threads: usize,
    /// How bytes are moved.
    pub engine: Engine,
    /// CPUs of the generator, one thread each in turn; empty for no pinning.
    pub cpus: Vec<usize>,
    /// The mix of commands.
    pub ratio: Ratio,
    /// Keys per get.
    pub multi_get: usize,
    /// Entries per set.
    pub multi_set: usize,
    /// What the transactions are, if every request is one.
    pub txn: Option<TxnSpec>,
    /// Number of keys.
    pub keys: u64,
    /// Sizes of keys in bytes.
    pub key_size: SizeSpec,
    /// Sizes of values in bytes.
    pub value_size: SizeSpec,
    /// Popularity of keys.
    pub distribution: DistributionSpec,
    /// Whether every key is written first.
    pub preload: bool,
    /// When all that is written expires, in Unix seconds; 0: never.
    pub expires_s: u32,
    /// How strictly values are compared.
    pub verify: VerifyValues,
    /// Time before the measured window.
    pub warmup: Duration,
    /// Length of the measured window.
    pub duration: Duration,
    /// Requests after which the measured window ends early.
    pub count: Option<u64>,
    /// Open loop: requests per second, over all threads.
    pub rate: Option<f64>,
    /// Seed of everything random.
    pub seed: u64,
    /// Which of many sequences of requests for the same keys and values.
    pub sequence: u64,
    /// The server's process, if its CPU time and memory are wanted.
    pub server_pid: Option<u32>,
    /// Length of the intervals of the time series.
    pub interval: Duration,
    /// Give up when nothing arrives for this long.
    pub timeout: Duration,
    /// Whether the generator's threads spin instead of sleeping while they wait.
    pub spin: bool,
}

/// Why a run ended before its time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cut {
    /// All connections were lost.
    ServerGone,
    /// Nothing arrived for too long.
    Stalled,
}

/// What a run measured.
#[derive(Debug)]
pub struct Outcome {
    /// Per generator thread.
    pub workers: Vec<WorkerSummary>,
    /// Requests answered well in the measured window.
    pub operations: u64,
    /// Length of the measured window.
    pub elapsed: Duration,
    /// When the measured window began, by the wall clock.
    pub started: SystemTime,
    /// Errors of the whole run.
    pub errors: Errors,
    /// What the server used, if its process is known.
    pub server: Option<ServerUse>,
    /// What the server counted of requests for several keys from the beginning of the window to the last reply, if there
    /// are such and it can be asked.
    pub txns: Option<TxnCounts>,
    /// What all CPUs of the machine did, whoever ran on them.
    pub machine: CpuShares,
    /// Why the run ended early, if it did.
    pub cut: Option<Cut>,
}

/// A view of a run under way.
#[derive(Debug, Clone, Copy)]
pub struct View {
    /// The phase.
    pub phase: Phase,
    /// Time since the phase began.
    pub elapsed: Duration,
    /// Replies since the run began.
    pub replies: u64,
}

/// Opens `n` connections, to each of `targets` in turn.
///
/// # Errors
///
/// A sentence naming cause and remedy.
pub fn connect(targets: &[SocketAddr], n: usize) -> Result<Vec<TcpStream>, String> {
    let limit = raise_file_limit();
    if limit < n as u64 + 32 {
        return Err(format!(
            "{n} connections need more open files than this process may have ({limit}); raise the limit with ulimit -n \
             or use fewer connections"
        ));
    }
    let mut sockets = Vec::with_capacity(n);
    if n < targets.len() {
        let cores = targets.len();
        return Err(format!(
            "{n} connections do not reach the {cores} cores that own keys; use at least one for each"
        ));
    }
    for (i, target) in (0..n).zip(targets.iter().cycle()) {
        let socket = TcpStream::connect_timeout(target, Duration::from_secs(5)).map_err(|error| {
            format!(
                "cannot open connection {} of {n} to {target}: {error}; check that the server is running, that the \
                 address is right and that it allows this many connections",
                i + 1
            )
        })?;
        let prepared = socket.set_nodelay(true).and_then(|()| socket.set_nonblocking(true));
        prepared.map_err(|error| format!("cannot configure a connection to {target}: {error}"))?;
        sockets.push(socket);
    }
    Ok(sockets)
}

/// Checks what no single argument can know, without asking the server.
///
/// # Errors
///
/// A sentence naming cause and remedy.
pub fn check(config: &RunConfig) -> Result<(), String> {
    with_protocol!(config.protocol, P => check_protocol::<P>(config).map(drop))
}

/// The same; the keys and values of the run.
fn check_protocol<P: Protocol>(config: &RunConfig) -> Result<Population, String> {
    let fail = |text: String| Err(text);
    let least = [
        config.connections,
        config.pipeline,
        config.threads,
        config.multi_get,
        config.multi_set,
    ];
    if least.contains(&0) {
        return fail("--connections, --pipeline, --threads, --multi-get and --multi-set must be at least 1".into());
    }
    if config.threads > config.connections {
        let (threads, connections) = (config.threads, config.connections);
        return fail(format!(
            "{threads} threads cannot share {connections} connections; use no more threads than those"
        ));
    }
    if config.ratio.delete > 0 && !P::DELETES {
        return fail(format!("the protocol {} has no delete; end --ratio with :0", P::NAME));
    }
    if config.multi_get > 1 && !P::MULTI_GETS {
        return fail(format!(
            "the protocol {} has no multi-get; leave --multi-get out",
            P::NAME
        ));
    }
    let (width, most) = (config.multi_set, P::MULTI_SET_MAX);
    if width > most {
        return fail(match most {
            1 => format!("the protocol {} has no multi-set; leave --multi-set out", P::NAME),
            _ => format!("--multi-set {width}: a server takes at most {most} entries in one request"),
        });
    }
    if config.rate.is_some_and(|rate| !(rate > 0.0 && rate <= 1e9)) {
        return fail("--rate must be above 0 and at most 1000000000 requests per second".into());
    }
    if let Some(txn) = config.txn {
        check_txn::<P>(config, txn)?;
    }
    if config.expires_s > 0 && !P::EXPIRY {
        let name = P::NAME;
        return fail(format!(
            "--expire-in: for the protocol {name} this tool cannot ask for it; use memcached or redis"
        ));
    }
    let population = Population::new(config.keys, config.key_size, config.value_size, config.seed)?;
    let population = population.expiring(config.expires_s);
    let (key, (value_min, value)) = (population.max_key_size(), population.value_size_range());
    if key > P::MAX_KEY {
        let (size, name, max) = (config.key_size, P::NAME, P::MAX_KEY);
        return fail(format!(
            "--key-size {size}: the protocol {name} allows keys of at most {max} bytes"
        ));
    }
    if P::TEXT_VALUES && value_min == 0 {
        let (size, name) = (config.value_size, P::NAME);
        return fail(format!(
            "--value-size {size}: the protocol {name} has no empty values; use at least 1 byte"
        ));
    }
    // What the server counts beside a key and its value, about.
    const BESIDE: usize = 64;
    let (option, operations, reads) = match config.txn {
        Some(txn) => ("--txn", txn.operations, usize::from(txn.checked)),
        None => ("--multi-set", config.multi_set, 0),
    };
    let bytes = operations as u64 * ((key + BESIDE) * (1 + reads) + value) as u64;
    if operations > 1 && bytes > BATCH_BYTES_MAX {
        return fail(format!(
            "{option} {operations}: with keys of {} and values of {} bytes a request has up to {bytes} bytes, and a server \
             takes at most {BATCH_BYTES_MAX}; use fewer or smaller ones",
            config.key_size, config.value_size
        ));
    }
    Ok(population)
}

/// Checks whether such transactions can be made.
fn check_txn<P: Protocol>(config: &RunConfig, txn: TxnSpec) -> Result<(), String> {
    let (n, most) = match txn.checked {
        true => (txn.operations, P::CHECKED_TXN_MAX),
        false => (txn.operations, P::TXN_MAX),
    };
    let wrong = if most == 0 {
        format!(
            "the protocol {} has no transactions; use protobuf or json-line",
            P::NAME
        )
    } else if n == 0 {
        "a transaction needs at least 1 operation".into()
    } else if n > most {
        let kind = if txn.checked { "an optimistic" } else { "a" };
        format!(
            "on {} a server takes {kind} transaction of at most {most} operations",
            P::NAME
        )
    } else if n as u64 > config.keys {
        let keys = config.keys;
        format!("its operations are on different keys, and there are only {keys}; use more --keys")
    } else if config.route {
        "the keys of a transaction may belong to several cores; leave --route out".into()
    } else if config.multi_get > 1 || config.multi_set > 1 {
        "every request is a transaction; leave --multi-get and --multi-set out".into()
    } else {
        return Ok(());
    };
    Err(format!("--txn {n}: {wrong}"))
}

/// Runs the workload. `watch` is called several times a second.
///
/// # Errors
///
/// A sentence naming cause and remedy when the run could not begin. A run that began ends with an outcome.
pub fn run(config: &RunConfig, watch: &mut dyn FnMut(View)) -> Result<Outcome, String> {
    with_protocol!(config.protocol, P => run_protocol::<P>(config, watch))
}

fn run_protocol<P: Protocol>(config: &RunConfig, watch: &mut dyn FnMut(View)) -> Result<Outcome, String> {
    let population = check_protocol::<P>(config)?;
    if let Some(pid) = config.server_pid {
        ProcessSample::take(pid).map_err(|e| format!("--server-pid {pid}: {e}; give the id of a running process"))?;
    }
    let chooser = KeyChooser::new(config.keys, config.distribution);
    let (targets, choosers): (Vec<_>, Vec<_>) = if config.route {
        let shares = Routes::ask(config.protocol, config.target)?.shares(&population, &chooser);
        shares.into_iter().map(|share| (share.address, share.chooser)).unzip()
    } else {
        (vec![config.target], vec![chooser])
    };
    let mut counter = Counter::new(config);
    let mut sockets = connect(&targets, config.connections)?;
    // By chooser: how many connections it has, and how many of them have got their part of the preload.
    let connections_of = |chooser: usize| (config.connections - chooser).div_ceil(choosers.len()) as u64;
    let mut given = vec![0; choosers.len()];
    let shared = Shared::new(config.threads);

    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..config.threads)
            .map(|index| {
                let share = |n: u64, i: usize| n * i as u64 / config.threads as u64;
                let count = |total: u64| share(total, index + 1) - share(total, index);
                let worker_config = WorkerConfig {
                    pipeline: config.pipeline,
                    ratio: config.ratio,
                    multi_get: config.multi_get,
                    multi_set: config.multi_set,
                    txn: config.txn,
                    verify: config.verify,
                    preload: config.preload,
                    seed: config.seed ^ crate::workload::mix(config.sequence),
                    // The threads take turns, so that together they keep an even pace.
                    rate: config
                        .rate
                        .map(|r| (r / config.threads as f64, index as f64 / config.threads as f64)),
                    count: config.count.map(count),
                    spin: config.spin,
                    interval_ns: config.interval.as_nanos() as u64,
                };
                let first = sockets.len() - sockets.len() / (config.threads - index);
                let numbered = sockets.split_off(first).into_iter().zip(first..);
                let mine: Vec<_> = numbered.map(|(socket, i)| (socket, i % choosers.len())).collect();
                let mut part = |chooser: usize| {
                    let place = |given: u64| choosers[chooser].keys() * given / connections_of(chooser);
                    let start = place(given[chooser]);
                    given[chooser] += mine.iter().filter(|(_, c)| *c == chooser).count() as u64;
                    start..place(given[chooser])
                };
                let preload = (0..choosers.len()).map(&mut part).collect();
                let (population, choosers, shared) = (&population, &choosers, &shared);
                scope.spawn(move || -> Result<WorkerSummary, String> {
                    // Whatever happens, the watching thread must learn of the end.
                    let _ended = OnDrop(|| shared.progress[index].ended.store(true, Ordering::Release));
                    if !config.cpus.is_empty() {
                        let cpu = config.cpus[index % config.cpus.len()];
                        pin(&[cpu]).map_err(|e| format!("cannot run on CPU {cpu}: {e}; name another with --cpus"))?;
                    }
                    if config.rate.is_some() {
                        precise_timers();
                    }
                    let mut connections: Vec<_> = mine
                        .into_iter()
                        .map(|(socket, chooser)| Connection::new(socket, chooser, &worker_config))
                        .collect();
                    let mut worker = Worker::<P>::new(worker_config, population, choosers, shared, index, preload);
                    io::run(config.engine, &mut worker, &mut connections)
                        .map_err(|e| format!("cannot wait for sockets: {e}; try another --io"))?;
                    let answered = connections.iter().map(|connection| connection.answered).collect();
                    Ok(worker.tally.into_summary(answered))
                })
            })
            .collect();

        let watched = watch_over(config, &shared, &mut counter, watch);
        let mut workers = Vec::new();
        for thread in threads {
            workers.push(
                thread
                    .join()
                    .map_err(|_| "a generator thread panicked; this is a bug".to_string())??,
            );
        }
        let mut errors = Errors::default();
        for worker in &workers {
            errors.merge(&worker.errors);
        }
        if watched.cut == Some(Cut::ServerGone) && errors.total() == 0 {
            errors.add(ErrorKind::Closed, 1, b"");
        }
        let operations = workers.iter().map(|w| w.recorded).sum();
        let start = workers.iter().map(|w| w.start_ns).filter(|&t| t > 0).min().unwrap_or(0);
        let end = workers.iter().map(|w| w.end_ns).max().unwrap_or(0);
        Ok(Outcome {
            workers,
            operations,
            elapsed: Duration::from_nanos(end.saturating_sub(start)),
            started: watched.started,
            errors,
            server: watched.server,
            txns: counter.end(),
            machine: watched.machine,
            cut: watched.cut,
        })
    })
}

struct OnDrop<F: FnMut()>(F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

struct Watched {
    started: SystemTime,
    server: Option<ServerUse>,
    machine: CpuShares,
    cut: Option<Cut>,
}

/// Takes the workers through the phases. The server's CPU time is read at both ends of the measured window.
fn watch_over(config: &RunConfig, shared: &Shared, counter: &mut Counter, watch: &mut dyn FnMut(View)) -> Watched {
    let replies = || {
        shared
            .progress
            .iter()
            .map(|p| p.replies.load(Ordering::Relaxed))
            .sum::<u64>()
    };
    let measured = || {
        shared
            .progress
            .iter()
            .map(|p| p.measured.load(Ordering::Relaxed))
            .sum::<u64>()
    };
    let all_ended = || shared.progress.iter().all(|p| p.ended.load(Ordering::Acquire));
    let mut last_reply = (replies(), Instant::now());
    let mut last_view = Instant::now();
    // Waits for the end of a phase; the reason when it is the end of the run as well.
    let mut pass = |phase: Phase, limit: Option<Duration>, done: &dyn Fn() -> bool| -> Option<Cut> {
        let began = Instant::now();
        last_reply.1 = began;
        loop {
            let now = Instant::now();
            let so_far = replies();
            if so_far != last_reply.0 {
                last_reply = (so_far, now);
            }
            if done() || limit.is_some_and(|limit| now - began >= limit) {
                return None;
            } else if all_ended() {
                return Some(Cut::ServerGone);
            } else if now - last_reply.1 > config.timeout {
                return Some(Cut::Stalled);
            }
            if now - last_view > Duration::from_millis(200) {
                last_view = now;
                watch(View {
                    phase,
                    elapsed: now - began,
                    replies: so_far,
                });
            }
            let left = limit.map_or(Duration::MAX, |limit| limit - (now - began));
            std::thread::sleep(left.min(Duration::from_millis(2)));
        }
    };
    let preloaded = || shared.progress.iter().all(|p| p.preloaded.load(Ordering::Acquire));
    let mut cut = pass(Phase::Preload, None, &preloaded);
    if cut.is_none() {
        shared.enter(Phase::WarmUp);
        cut = pass(Phase::WarmUp, Some(config.warmup), &|| false);
    }
    if cut.is_none() {
        counter.begin();
    }
    let sample = || config.server_pid.and_then(|pid| ProcessSample::take(pid).ok());
    let (before, cpus_before, started) = (sample(), CpuSample::take(), SystemTime::now());
    let operations_before = measured();
    let mut server = None;
    if cut.is_none() {
        shared.enter(Phase::Measure);
        let enough = || config.count.is_some_and(|count| measured() >= count);
        // With a count, the time is only a limit if one was asked for; both are in the configuration.
        cut = pass(Phase::Measure, Some(config.duration), &enough);
        if let (Some(before), Some(after)) = (before, sample()) {
            server = Some(before.until(&after, measured() - operations_before));
        }
    }
    let machine = cpus_before.until(&CpuSample::take());
    shared.enter(Phase::Drain);
    Watched {
        started,
        server,
        machine,
        cut,
    }
}
