//! Load generator for key-value servers: the command line.

// Results go to standard output and complaints to standard error; that is what a command line program is for.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use clap::{Args, Parser, Subcommand};
use memkv_bench::compare::{Pace, Plan, compare};
use memkv_bench::driver::{self, RunConfig, View};
use memkv_bench::inside::{growth, hit_ratio, lookup};
use memkv_bench::io::Engine;
use memkv_bench::memory::{MemoryPlan, compare_memory, memory_mib};
use memkv_bench::process::{end_request, leave_huge_pages_out, parse_cpus, pin, raise_file_limit};
use memkv_bench::protocol::ProtocolName;
use memkv_bench::report::{Report, grouped};
use memkv_bench::servers::{MEMORY_MIB, Server, known, read_targets};
use memkv_bench::verify::{VerifyConfig, verify};
use memkv_bench::worker::{Phase, VerifyValues};
use memkv_bench::workload::{DistributionSpec, Ratio, SizeSpec, TxnSpec};
use memkv_bench::{echo, hdr, plot};
use serde::Serialize;
use std::fs::File;
use std::io::{BufWriter, IsTerminal, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

/// Exit code of a run that had errors, found mismatches or ended early.
const UNCLEAN: u8 = 2;

/// How long a server's memory must not have changed before it is noted.
const STEADY: Duration = Duration::from_secs(3);

/// Load generator for memkv-tpc, memcached and Redis
///
/// Exit codes: 0 all went well; 1 it could not begin, and a message says why; 2 errors were counted or the run ended
/// early, and the report says which.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Put load on one server and measure it
    Run(Box<RunArgs>),
    /// Let many clients at once write random values, read them back and compare
    Verify(VerifyArgs),
    /// Put the same load on several servers in turn and set the results side by side
    Compare(Box<CompareArgs>),
    /// Measure the engine of one core of memkv-tpc inside this process, without network and kernel
    Engine(Box<EngineArgs>),
    /// Be the server, and answer without storing anything: what the network path costs by itself
    ///
    /// Speaks as much of memcached's text protocol as this program needs, from one thread, until SIGTERM or SIGINT. Its
    /// values are not those that were written: add --verify-values off to a run.
    Echo(EchoArgs),
}

#[derive(Debug, Args)]
struct RunArgs {
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    load: LoadArgs,
    #[command(flatten)]
    work: WorkArgs,
    /// Requests in flight per connection; in an open loop, the most that may be
    #[arg(long, value_name = "N", default_value_t = 1)]
    pipeline: usize,
    /// Open loop: send this many requests per second, and count latency from the moment each should have been sent
    #[arg(long, value_name = "PER_SECOND")]
    rate: Option<f64>,
    /// End the measured window after this many requests; without --duration it may take as long as it takes
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    /// CPUs for the generator's threads, one each in turn, such as 0,2-3
    #[arg(long, value_name = "LIST", value_parser = parse_cpus)]
    cpus: Option<std::vec::Vec<usize>>,
    /// Process id of the server, to report its CPU time and memory
    #[arg(long, value_name = "PID")]
    server_pid: Option<u32>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    /// Write latencies per interval as an HdrHistogram log
    #[arg(long, value_name = "FILE")]
    hdr: Option<PathBuf>,
    /// Draw latency by percentile, and throughput and tail latency over time, as SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct ServerArgs {
    /// The wire protocol
    #[arg(long, value_enum, default_value = "memcached")]
    protocol: ProtocolName,
    /// Address of the server
    #[arg(long, value_name = "HOST:PORT", value_parser = parse_target)]
    target: SocketAddr,
    /// Send each request to the core that owns its key, over a connection to that core's port (protobuf only; the server
    /// needs --core-ports). The cores get equal numbers of connections, each of which asks for keys of its core
    #[arg(long)]
    route: bool,
}

/// How much is asked, and for how long.
#[derive(Debug, Args)]
struct LoadArgs {
    /// Connections, over all threads
    #[arg(long, value_name = "N", default_value_t = 50)]
    connections: usize,
    /// Generator threads
    #[arg(long, value_name = "N", default_value_t = 1)]
    threads: usize,
    /// How bytes are moved
    #[arg(long, value_enum, default_value = "auto")]
    io: Engine,
    /// Do not sleep while waiting for replies: takes whole CPUs, but latency is free of the generator's waking up
    #[arg(long)]
    spin: bool,
    /// Time before the measured window, such as 2s or 500ms
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = parse_time)]
    warmup: Duration,
    /// Length of the measured window [default: 10s, or until --count is reached]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    duration: Option<Duration>,
    /// Length of an interval of the time series [default: a twentieth of --duration, 100ms to 1s]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    interval: Option<Duration>,
    /// Give up when nothing arrives for this long
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_time)]
    timeout: Duration,
}

/// What is asked.
#[derive(Debug, Args)]
struct WorkArgs {
    /// Weights of gets, sets and deletes
    #[arg(long, value_name = "GET:SET:DELETE", default_value = "10:1:0")]
    ratio: Ratio,
    /// Keys per get; above 1, gets become multi-gets
    #[arg(long, value_name = "WIDTH", default_value_t = 1)]
    multi_get: usize,
    /// Entries per set; above 1, sets become multi-sets, but not those of --preload (protobuf only)
    #[arg(long, value_name = "WIDTH", default_value_t = 1)]
    multi_set: usize,
    /// Make every request a transaction of this many operations on different keys, each a get, set or delete by --ratio
    /// (protobuf and json-line)
    #[arg(long, value_name = "N")]
    txn: Option<usize>,
    /// Make the transactions optimistic: read --txn keys, then write them all if none has changed; if one has, try again at
    /// once
    #[arg(long, requires = "txn", conflicts_with = "ratio")]
    checked: bool,
    /// Number of keys
    #[arg(long, value_name = "N", default_value_t = 1_000_000)]
    keys: u64,
    /// Bytes of a key: 16, 10-30, zipf:LOW-HIGH or lognormal:MEDIAN,SIGMA
    #[arg(long, value_name = "SIZE", default_value = "16")]
    key_size: SizeSpec,
    /// Bytes of a value: 100, 50-2000, zipf:LOW-HIGH or lognormal:MEDIAN,SIGMA
    #[arg(long, value_name = "SIZE", default_value = "100")]
    value_size: SizeSpec,
    /// Popularity of keys: uniform or zipf:THETA
    #[arg(long, value_name = "NAME", default_value = "uniform")]
    distribution: DistributionSpec,
    /// Write every key before the workload
    #[arg(long)]
    preload: bool,
    /// Have everything that is written expire in the same second, this long after the beginning (memcached and redis)
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    expire_in: Option<Duration>,
    /// How much of a value is compared with what was written
    #[arg(long, value_enum, default_value = "prefix")]
    verify_values: VerifyValues,
    /// Seed of everything random
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

#[derive(Debug, Args)]
struct VerifyArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// Clients at once, one connection each
    #[arg(long, value_name = "N", default_value_t = 1000)]
    clients: usize,
    /// Pairs of set and get per client
    #[arg(long, value_name = "N", default_value_t = 10)]
    rounds: usize,
    /// Longest key in bytes
    #[arg(long, value_name = "BYTES", default_value_t = 30)]
    max_key: usize,
    /// Longest value in bytes
    #[arg(long, value_name = "BYTES", default_value_t = 1000)]
    max_value: usize,
    /// Make values of letters and digits only, instead of any bytes (json-line: any characters)
    #[arg(long)]
    printable: bool,
    /// Seed of keys and values
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Give up when nothing arrives for this long
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_time)]
    timeout: Duration,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct CompareArgs {
    #[command(flatten)]
    load: LoadArgs,
    #[command(flatten)]
    work: WorkArgs,
    /// Servers to start, if installed: memcached, redis
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    with: Vec<String>,
    /// A TOML file of [[server]] tables: name, protocol, and command (with {port} and {cpu}) or address and pid; perhaps
    /// route = true, verify_values, and also = ["http"], further protocols of the same process (with {port-http}), which are
    /// compared with one another
    #[arg(long, value_name = "FILE")]
    targets: Option<PathBuf>,
    /// Of the servers in the file, take these only
    #[arg(long, value_name = "NAMES", value_delimiter = ',', requires = "targets")]
    only: Vec<String>,
    /// Give ratios to this server instead of the best of the others
    #[arg(long, value_name = "NAME")]
    against: Option<String>,
    /// Open loop: send this many requests per second to each server
    #[arg(long, value_name = "PER_SECOND")]
    rate: Option<f64>,
    /// Open loop at a share of the peak of one of the servers, such as memcached:0.6, which is measured first
    #[arg(long, value_name = "NAME:SHARE", conflicts_with = "rate")]
    rate_of: Option<Pace>,
    /// Pipeline depths to compare at; in an open loop, the most requests that may be in flight per connection
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1,16,64")]
    pipelines: Vec<usize>,
    /// Rounds; the table shows medians
    #[arg(long, value_name = "N", default_value_t = 3)]
    rounds: usize,
    /// Compare resident memory instead: start each server in turn, write all keys, and see what it takes for them. Of what is
    /// asked, only --keys, --key-size, --value-size and --seed count
    #[arg(long, conflicts_with_all = ["against", "rate", "rate_of", "pipelines", "rounds", "txn", "ratio"])]
    memory: bool,
    /// CPUs for the servers, such as 0 or 0-1
    #[arg(long, value_name = "LIST", value_parser = parse_cpus)]
    server_cpu: Option<std::vec::Vec<usize>>,
    /// CPUs for the generator, such as 1
    #[arg(long, value_name = "LIST", value_parser = parse_cpus)]
    generator_cpu: Option<std::vec::Vec<usize>>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct EngineArgs {
    #[command(subcommand)]
    what: EngineTask,
    /// CPU to run on
    #[arg(long, value_name = "N", global = true)]
    cpu: Option<usize>,
    /// Print the result as JSON
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum EngineTask {
    /// Insert keys and measure each insertion: the longest of them, by wall time and by CPU time, and the memory
    Growth(growth::Growth),
    /// Look keys up: the cost by the number of keys, with looking ahead across a pipeline and without
    Lookup(lookup::Lookup),
    /// Serve as a cache with room for a part of the keys, beside policies by the book: hit ratios, and what eviction costs
    HitRatio(hit_ratio::HitRatio),
}

#[derive(Debug, Args)]
struct EchoArgs {
    /// Where to listen; port 0 lets the system choose
    #[arg(long, value_name = "HOST:PORT", value_parser = parse_target)]
    listen: SocketAddr,
    /// Bytes of every value
    #[arg(long, value_name = "BYTES", default_value_t = 100, value_parser = clap::value_parser!(u32).range(..=echo::VALUE_MAX as i64))]
    value_size: u32,
    /// CPU to run on
    #[arg(long, value_name = "N")]
    cpu: Option<usize>,
}

fn parse_target(text: &str) -> Result<SocketAddr, String> {
    let remedy = "write HOST:PORT such as 127.0.0.1:11211";
    let mut addresses = text.to_socket_addrs().map_err(|e| format!("{e}; {remedy}"))?;
    addresses
        .next()
        .ok_or_else(|| format!("the name has no address; {remedy}"))
}

fn parse_time(text: &str) -> Result<Duration, String> {
    let wrong = || format!("'{text}' is not a time; write a number and a unit: 500ms, 2s or 1m");
    let split = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let number: f64 = text[..split].parse().map_err(|_| wrong())?;
    let unit = match &text[split..] {
        "ms" => 1e-3,
        "s" | "" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(wrong()),
    };
    Duration::try_from_secs_f64(number * unit)
        .ok()
        .filter(|d| d.as_secs() < 1_000_000)
        .ok_or_else(wrong)
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are asked for; anything else is a mistake. The usual code for it means something else here.
            let mistake = error.use_stderr();
            return match error.print() {
                Ok(()) if !mistake => ExitCode::SUCCESS,
                _ => ExitCode::FAILURE,
            };
        }
    };
    let result = match cli.task {
        Task::Run(args) => run(*args),
        Task::Verify(args) => run_verify(&args),
        Task::Compare(args) => run_compare(*args),
        Task::Engine(args) => run_engine(&args),
        Task::Echo(args) => run_echo(&args),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(UNCLEAN),
        Err(message) => {
            eprintln!("memkv-bench: {message}");
            ExitCode::FAILURE
        }
    }
}

/// A configuration from what `run` and `compare` have in common.
fn config(load: &LoadArgs, work: &WorkArgs, count: Option<u64>) -> Result<RunConfig, String> {
    let endless = Duration::from_secs(24 * 3600);
    let duration = load.duration.unwrap_or(if count.is_some() {
        endless
    } else {
        Duration::from_secs(10)
    });
    let least = Duration::from_millis(100);
    let interval = load
        .interval
        .unwrap_or((duration / 20).clamp(least, Duration::from_secs(1)));
    if duration.is_zero() || interval < Duration::from_millis(10) {
        return Err("--duration must be above 0 and --interval at least 10ms".into());
    }
    Ok(RunConfig {
        protocol: ProtocolName::Memcached,
        target: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        route: false,
        connections: load.connections,
        pipeline: 1,
        threads: load.threads,
        engine: load.io.resolve(),
        cpus: Vec::new(),
        ratio: work.ratio,
        multi_get: work.multi_get,
        multi_set: work.multi_set,
        txn: work.txn.map(|operations| TxnSpec {
            operations,
            checked: work.checked,
        }),
        keys: work.keys,
        key_size: work.key_size,
        value_size: work.value_size,
        distribution: work.distribution,
        preload: work.preload,
        expires_s: work
            .expire_in
            .map_or(0, |after| unix_seconds(SystemTime::now() + after)),
        verify: work.verify_values,
        warmup: load.warmup,
        duration,
        count,
        rate: None,
        seed: work.seed,
        sequence: 0,
        server_pid: None,
        interval,
        timeout: load.timeout,
        spin: load.spin,
    })
}

/// Unix seconds, as far as 32 bits reach.
fn unix_seconds(moment: SystemTime) -> u32 {
    let since = moment.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u32::try_from(since.as_secs()).unwrap_or(u32::MAX)
}

/// Ties this thread to the generator's CPUs too, so that it does not run where the server does.
fn pin_generator(cpus: &[usize]) -> Result<(), String> {
    if cpus.is_empty() {
        return Ok(());
    }
    pin(cpus).map_err(|e| format!("cannot run on CPUs {cpus:?}: {e}; name CPUs that this machine has"))
}

fn print_json(value: &impl Serialize) -> Result<(), String> {
    let text = serde_json::to_string_pretty(value).map_err(|e| format!("cannot write JSON: {e}"))?;
    println!("{text}");
    Ok(())
}

fn run(args: RunArgs) -> Result<bool, String> {
    let config = RunConfig {
        protocol: args.server.protocol,
        target: args.server.target,
        route: args.server.route,
        pipeline: args.pipeline,
        cpus: args.cpus.unwrap_or_default(),
        rate: args.rate,
        server_pid: args.server_pid,
        ..config(&args.load, &args.work, args.count)?
    };
    // Opened before the run, which would otherwise be lost to a mistyped name.
    let open = |path: &Option<PathBuf>| match path {
        None => Ok(None),
        Some(path) => {
            let file = File::create(path).map_err(|e| format!("cannot write {}: {e}; name another", path.display()))?;
            Ok::<_, String>(Some(BufWriter::new(file)))
        }
    };
    let (hdr, plot) = (open(&args.hdr)?, open(&args.plot)?);
    pin_generator(&config.cpus)?;
    let mut progress = Progress::new(&config);
    let outcome = driver::run(&config, &mut |view| progress.show(view))?;
    progress.clear();
    let report = Report::new(&config, &outcome);
    if let Some(mut file) = hdr {
        let written = hdr::write_log(&outcome, &mut file).and_then(|()| file.flush());
        written.map_err(|e| format!("cannot write the HdrHistogram log: {e}"))?;
    }
    if let Some(mut file) = plot {
        let written = file
            .write_all(plot::svg(&report, &outcome).as_bytes())
            .and_then(|()| file.flush());
        written.map_err(|e| format!("cannot write the picture: {e}"))?;
    }
    if args.json {
        print_json(&report)?;
    } else {
        print!("{}", report.text());
    }
    Ok(report.is_clean())
}

/// The live line on a terminal.
struct Progress {
    shown: bool,
    measure: Option<Duration>,
    warmup: Duration,
    last: (u64, Instant),
}

impl Progress {
    fn new(config: &RunConfig) -> Self {
        Progress {
            shown: std::io::stderr().is_terminal(),
            measure: config.count.is_none().then_some(config.duration),
            warmup: config.warmup,
            last: (0, Instant::now()),
        }
    }

    fn show(&mut self, view: View) {
        if !self.shown {
            return;
        }
        let now = Instant::now();
        let rate = (view.replies - self.last.0) as f64 / (now - self.last.1).as_secs_f64().max(1e-9);
        self.last = (view.replies, now);
        let (name, end) = match view.phase {
            Phase::Preload => ("preload", None),
            Phase::WarmUp => ("warm-up", Some(self.warmup)),
            Phase::Measure => ("measure", self.measure),
            Phase::Drain => ("drain", None),
        };
        let end = end.map_or(String::new(), |end| format!(" of {:.1}", end.as_secs_f64()));
        eprint!(
            "\r\x1b[K{name} {:.1}{end} s  {} replies/s",
            view.elapsed.as_secs_f64(),
            grouped(rate)
        );
    }

    fn clear(&self) {
        if self.shown {
            eprint!("\r\x1b[K");
        }
    }
}

fn run_verify(args: &VerifyArgs) -> Result<bool, String> {
    let report = verify(&VerifyConfig {
        protocol: args.server.protocol,
        target: args.server.target,
        route: args.server.route,
        clients: args.clients,
        rounds: args.rounds,
        max_key: args.max_key,
        max_value: args.max_value,
        printable: args.printable,
        seed: args.seed,
        timeout: args.timeout,
    })?;
    if args.json {
        print_json(&report)?;
    } else {
        print!("{}", report.text());
    }
    Ok(report.is_clean())
}

fn run_engine(args: &EngineArgs) -> Result<bool, String> {
    if let Some(cpu) = args.cpu {
        pin(&[cpu]).map_err(|e| format!("cannot run on CPU {cpu}: {e}; name another with --cpu"))?;
    }
    leave_huge_pages_out();
    let mut live = Live::new();
    match &args.what {
        EngineTask::Growth(config) => {
            let report = growth::run(config, &mut |what| live.show(what))?;
            live.finish(args.json, &report, || report.text())
        }
        EngineTask::Lookup(config) => {
            let report = lookup::run(config, &mut |what| live.show(what))?;
            live.finish(args.json, &report, || report.text())
        }
        EngineTask::HitRatio(config) => {
            let report = hit_ratio::run(config, &mut |what| live.show(what))?;
            live.finish(args.json, &report, || report.text())
        }
    }?;
    Ok(true)
}

/// A line on a terminal that tells what is going on, until the result stands there.
struct Live(bool);

impl Live {
    fn new() -> Self {
        Live(std::io::stderr().is_terminal())
    }

    fn show(&mut self, what: &str) {
        if self.0 {
            eprint!("\r\x1b[K{what}");
        }
    }

    /// Prints the result.
    fn finish(&mut self, json: bool, result: &impl Serialize, text: impl Fn() -> String) -> Result<(), String> {
        self.show("");
        if json {
            return print_json(result);
        }
        print!("{}", text());
        Ok(())
    }
}

fn run_echo(args: &EchoArgs) -> Result<bool, String> {
    if let Some(cpu) = args.cpu {
        pin(&[cpu]).map_err(|e| format!("cannot run on CPU {cpu}: {e}; name another with --cpu"))?;
    }
    raise_file_limit();
    let stop = end_request().map_err(|e| format!("cannot wait for signals: {e}"))?;
    let listener = TcpListener::bind(args.listen).map_err(|e| {
        format!(
            "cannot listen on {}: {e}; name another address with --listen",
            args.listen
        )
    })?;
    let address = listener.local_addr().map_err(|e| format!("cannot listen: {e}"))?;
    println!("listening on {address}");
    echo::run(listener, args.value_size as usize, stop.as_fd()).map_err(|e| format!("cannot go on: {e}"))?;
    Ok(true)
}

fn run_compare(args: CompareArgs) -> Result<bool, String> {
    let mut specs = match &args.targets {
        Some(path) => read_targets(path)?,
        None => Vec::new(),
    };
    if let Some(name) = args
        .only
        .iter()
        .find(|name| specs.iter().all(|spec| spec.name != **name))
    {
        let names: Vec<_> = specs.iter().map(|spec| spec.name.as_str()).collect();
        return Err(format!(
            "--only {name}: there is no such server in the file; it has {}",
            names.join(", ")
        ));
    }
    specs.retain(|spec| args.only.is_empty() || args.only.contains(&spec.name));
    let generator_cpu = args.generator_cpu.unwrap_or_default();
    let base = RunConfig {
        cpus: generator_cpu.clone(),
        ..config(&args.load, &args.work, None)?
    };
    let memory_mib = if args.memory {
        memory_mib(&base, MEMORY_MIB)?
    } else {
        MEMORY_MIB
    };
    for name in &args.with {
        specs.push(known(name, memory_mib)?);
    }
    if specs.is_empty() {
        return Err("there is nothing to compare; name servers with --with memcached,redis or --targets FILE".into());
    }
    if args.rounds == 0 || args.pipelines.is_empty() || args.pipelines.contains(&0) {
        return Err("--rounds and --pipelines must be at least 1".into());
    }
    let server_cpu = args.server_cpu.unwrap_or_default();
    if let Some(cpu) = server_cpu.iter().find(|cpu| generator_cpu.contains(cpu)) {
        return Err(format!(
            "CPU {cpu} is given to the servers and to the generator; each needs CPUs of its own"
        ));
    }
    let mut live = Live::new();
    if args.memory {
        let plan = MemoryPlan {
            base: RunConfig {
                // Deep, as nothing but the result counts.
                pipeline: 64,
                ..base
            },
            server_cpus: server_cpu,
            steady: STEADY,
        };
        let comparison = compare_memory(&specs, &plan, &mut |what| live.show(what))?;
        live.finish(args.json, &comparison, || comparison.text())?;
        return Ok(true);
    }
    let servers: Result<Vec<_>, String> = specs.iter().map(|spec| Server::launch_all(spec, &server_cpu)).collect();
    let servers: Vec<Server> = servers?.into_iter().flatten().collect();
    pin_generator(&base.cpus)?;
    let plan = Plan {
        pipelines: args.pipelines,
        rounds: args.rounds,
        pace: args.rate_of.or(args.rate.map(Pace::Rate)).unwrap_or(Pace::Closed),
        against: args.against,
    };
    let comparison = compare(&servers, &base, &plan, &mut |what| live.show(what))?;
    live.finish(args.json, &comparison, || comparison.text())?;
    Ok(comparison.is_clean())
}
