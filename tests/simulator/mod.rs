//! The parts of the simulator.

pub mod checker;
pub mod client;
pub mod cluster;
pub mod crashes;
pub mod disk;
pub mod files;
pub mod json_line;
pub mod keepers;
pub mod lives;
pub mod model;
pub mod mutation;
pub mod random;
pub mod run;

use super::support;
