//! Which core owns which keys, so that every request can go straight to the owner of its key.

use crate::protocol::ProtocolName;
use crate::workload::{KeyChooser, Population};
use memkv::client::{Client, Topology};
use std::net::SocketAddr;

/// The cores of a server that own any keys, and where each is reached.
#[derive(Debug)]
pub struct Routes {
    topology: Topology,
    /// By core: its own address.
    addresses: Vec<SocketAddr>,
}

/// A core, and which of the keys of a run are its own.
#[derive(Debug)]
pub struct Share {
    /// Where the core is reached.
    pub address: SocketAddr,
    /// Draws among its keys.
    pub chooser: KeyChooser,
}

impl Routes {
    /// Asks the server at `target` for its topology.
    ///
    /// # Errors
    ///
    /// A sentence naming cause and remedy.
    pub fn ask(protocol: ProtocolName, target: SocketAddr) -> Result<Self, String> {
        if protocol != ProtocolName::Protobuf {
            return Err(format!(
                "--route needs to know which core owns which keys, which the protocol {} does not tell; \
                 use --protocol protobuf",
                protocol.name()
            ));
        }
        let topology = Client::connect(target).and_then(|mut client| client.topology());
        let topology = topology.map_err(|e| format!("cannot ask {target} which core owns which keys: {e}"))?;
        if topology.core_ports.is_empty() {
            return Err(format!(
                "the server at {target} has no ports for single cores, which --route connects to; \
                 start it with --core-ports BASE"
            ));
        }
        if topology.partitioner.is_none() {
            return Err(format!(
                "the server at {target} spreads keys over its cores in a way that is unknown here; leave --route out"
            ));
        }
        let address = |&port: &u16| SocketAddr::new(target.ip(), port);
        Ok(Routes {
            addresses: topology.core_ports.iter().map(address).collect(),
            topology,
        })
    }

    /// The core that owns `key`.
    pub fn owner(&self, key: &[u8]) -> usize {
        // There is an owner, as the token function is known and the ranges cover all tokens.
        self.topology.owner(key).map_or(0, |core| usize::from(core.0))
    }

    /// By core: its own address.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// The cores that own any of the keys of `population`, each with its part of them. A core's keys are drawn as often, by
    /// comparison with one another, as `chooser` draws them.
    pub fn shares(&self, population: &Population, chooser: &KeyChooser) -> Vec<Share> {
        let mut scratch = Vec::new();
        let parts = chooser.split(self.addresses.len(), |key| {
            self.owner(population.key(key, &mut scratch))
        });
        let shares = self.addresses.iter().zip(parts).filter_map(|(&address, part)| {
            Some(Share {
                address,
                chooser: part?,
            })
        });
        shares.collect()
    }
}
