//! The server's command line: options, start, signals, exit codes.
//!
//! Exit codes: 0 after a stop that was asked for, 1 when the server cannot start, 2 for options that make no sense. `memkv-tpc
//! inspect DIR` starts nothing: it describes a data directory, and ends with 1 when something in it is damaged.

use clap::Parser;
use memkv::config::Config;
use memkv::protocol::Protocol;
use memkv::runtime::{Server, Stopper};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn,memkv=info"))
        .format_target(false)
        .init();
    if std::env::args_os().nth(1).is_some_and(|first| first == "inspect") {
        return inspect(&Inspect::parse_from(std::env::args_os().skip(1)));
    }
    let config = Config::parse();
    match run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "memkv-tpc: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Describes a data directory: what it holds, and what of that is damaged. It may be in use.
#[derive(Debug, Parser)]
#[command(name = "memkv-tpc inspect", version)]
struct Inspect {
    /// The data directory.
    directory: PathBuf,

    /// Show every record.
    #[arg(long)]
    records: bool,
}

fn inspect(options: &Inspect) -> ExitCode {
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    let mut written = Ok(());
    let found = memkv::runtime::inspect(&options.directory, options.records, &mut |line| {
        if written.is_ok() {
            written = writeln!(out, "{line}");
        }
    });
    // Whoever reads it may have seen enough.
    let _ = written.and_then(|()| out.flush());
    match found {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "memkv-tpc: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(config: Config) -> Result<(), Box<dyn std::error::Error>> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGUSR1])?;
    let stopper: Arc<OnceLock<Stopper>> = Arc::default();
    let served = stopper.clone();
    std::thread::spawn(move || {
        let mut asked = false;
        for signal in signals.forever() {
            if signal == SIGUSR1 {
                served.get().inspect(|server| server.snapshot());
                continue;
            }
            match served.get() {
                Some(stopper) if !asked => {
                    log::info!("stopping: answering what was received");
                    stopper.stop();
                }
                // While it starts there is nothing to answer.
                None => std::process::exit(0),
                // Asked twice: at once.
                Some(_) => std::process::exit(1),
            }
            asked = true;
        }
    });
    let server = Server::start(config)?;
    // Nobody else sets it.
    let _ = stopper.set(server.stopper());
    announce(&server)?;
    server.wait();
    Ok(())
}

/// Says on standard output where the server listens and that it is ready, one line each.
fn announce(server: &Server) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    if let Some(loaded) = server.loaded() {
        let seconds = loaded.duration.as_secs_f64();
        let rate = loaded.rows as f64 / seconds.max(1e-9);
        let (rows, malformed) = (loaded.rows, loaded.malformed);
        writeln!(
            out,
            "loaded {rows} rows in {seconds:.3} s ({rate:.0} rows/s), {malformed} malformed"
        )?;
    }
    for (protocol, address) in server.addresses() {
        writeln!(out, "listening {} {address}", protocol.name())?;
    }
    let host = server.address(Protocol::Protobuf).map(|address| address.ip());
    for (core, (port, host)) in server.core_ports().iter().zip(host.iter().cycle()).enumerate() {
        writeln!(out, "listening protobuf {} core {core}", SocketAddr::new(*host, *port))?;
    }
    writeln!(out, "ready")?;
    out.flush()
}
