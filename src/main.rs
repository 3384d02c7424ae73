//! The server's command line: options, start, signals, exit codes.
//!
//! Exit codes: 0 after a stop that was asked for, 1 when the server cannot start, 2 for options that make no sense.

use clap::Parser;
use memkv::config::Config;
use memkv::protocol::Protocol;
use memkv::runtime::{Server, Stopper};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use std::io::Write;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn,memkv=info"))
        .format_target(false)
        .init();
    let config = Config::parse();
    match run(config) {
        Ok(()) => ExitCode::SUCCESS,
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
