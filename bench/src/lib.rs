//! A load generator for key-value servers on loopback, and for the engine of one of them without a server, made of parts that
//! can be tested.

pub mod compare;
pub mod driver;
pub mod echo;
pub mod hdr;
pub mod inside;
pub mod io;
pub mod memory;
pub mod plot;
pub mod process;
pub mod protocol;
pub mod report;
pub mod route;
pub mod server_counts;
pub mod servers;
pub mod stats;
pub mod verify;
pub mod worker;
pub mod workload;
