//! memkv
pub mod budget;
pub mod config;
pub mod encoding;
pub mod engine;
pub mod link;
pub mod metrics;
pub mod model;
pub mod partition;
pub mod protocol;
pub mod runtime;
pub(crate) mod session;
pub(crate) mod shard;
pub(crate) mod store;
