//! A protobuf client of the generated types, for worlds.

use super::{Client, World};
use memkv::proto::condition::Is;
use memkv::proto::message::Command;
use memkv::proto::{Code, Condition, Delete, Entry, Get, KeyResult, Message as Request, Response, Set};
use memkv::protocol::Protocol;
use prost::Message;

/// Sizes of the pieces that requests arrive in; 0 stands for all at once.
pub const PIECES: [usize; 7] = [0, 4096, 1000, 100, 10, 3, 1];

pub fn request(id: u64, command: impl Into<Option<Command>>) -> Vec<u8> {
    let command = command.into();
    Request {
        id,
        command,
        ..Request::default()
    }
    .encode_length_delimited_to_vec()
}

pub fn get(keys: &[&[u8]], with_version: bool) -> Command {
    let keys = keys.iter().map(|key| key.to_vec()).collect();
    Command::Get(Get { keys, with_version })
}

pub fn entry(key: &[u8], value: &[u8]) -> Entry {
    Entry {
        key: key.to_vec(),
        value: value.to_vec().into(),
        ..Entry::default()
    }
}

pub fn set(entries: &[Entry]) -> Command {
    let entries = entries.to_vec();
    Command::Set(Set { entries })
}

pub fn delete(keys: &[&[u8]]) -> Command {
    let keys = keys.iter().map(|key| key.to_vec()).collect();
    let conditions = vec![];
    Command::Delete(Delete { keys, conditions })
}

pub fn only_if(is: Is) -> Option<Condition> {
    Some(Condition { is: Some(is) })
}

pub fn found(value: &[u8]) -> KeyResult {
    KeyResult {
        value: value.to_vec().into(),
        ..KeyResult::default()
    }
}

pub fn only(code: Code) -> KeyResult {
    KeyResult {
        code: code.into(),
        ..KeyResult::default()
    }
}

/// Every response in `bytes`, which must end with one.
pub fn responses(bytes: &[u8]) -> Vec<Response> {
    let mut rest = bytes;
    let mut all = vec![];
    while !rest.is_empty() {
        all.push(Response::decode_length_delimited(&mut rest).unwrap());
    }
    all
}

/// Sends in pieces and returns the responses.
pub fn ask(world: &mut World, client: Client, bytes: &[u8], piece: usize) -> Vec<Response> {
    for piece in bytes.chunks(if piece == 0 { bytes.len() } else { piece }) {
        world.send(client, piece);
        if bytes.len() < 10_000 {
            world.settle();
        }
    }
    world.settle();
    responses(&world.take(client))
}

/// Plays a conversation over worlds of 1 and 3 cores and all sizes of pieces, each time from the start.
pub fn everywhere(options: &[&str], conversation: impl Fn(&mut dyn FnMut(&[u8]) -> Vec<Response>)) {
    for cores in [1, 3] {
        for piece in PIECES {
            let mut world = World::new(cores, options);
            let client = world.connect(0, Protocol::Protobuf);
            conversation(&mut |bytes| ask(&mut world, client, bytes, piece));
            for engine in &world.engines {
                assert!(engine.is_quiet(), "{cores} cores, pieces of {piece}");
            }
        }
    }
}

pub fn results(response: &Response) -> &[KeyResult] {
    assert_eq!((response.code(), response.message.as_str()), (Code::Ok, ""));
    &response.results
}
