//! Money is neither made nor lost: transfers between random accounts from many connections to a real server, while others read
//! all accounts at once.

#![allow(clippy::unwrap_used, reason = "in a test, the assertion")]

use memkv::config::{Config, Listen};
use memkv::proto::condition::Is;
use memkv::proto::message::Command;
use memkv::proto::operation::Operation as Of;
use memkv::proto::{Code, Compare, Condition, Entry, Get, Message as Request, Operation, Response, Set, Txn};
use memkv::protocol::Protocol;
use memkv::runtime::Server;
use prost::Message;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

const ACCOUNTS: usize = 20;
const EACH: i64 = 1000;
const TELLERS: u64 = 50;
const TRANSFERS: usize = 60;
const AUDITORS: usize = 4;
const AUDITS: usize = 300;

struct Connection {
    stream: TcpStream,
    received: Vec<u8>,
}

impl Connection {
    fn open(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        Self {
            stream,
            received: vec![],
        }
    }

    fn ask(&mut self, command: Command) -> Response {
        let request = Request {
            id: 1,
            command: Some(command),
            durable: false,
        };
        self.stream
            .write_all(&request.encode_length_delimited_to_vec())
            .unwrap();
        loop {
            let mut rest = self.received.as_slice();
            if let Ok(response) = Response::decode_length_delimited(&mut rest) {
                self.received = rest.to_vec();
                assert_eq!(response.code(), Code::Ok, "{}", response.message);
                return response;
            }
            let mut piece = [0; 4096];
            let count = match self.stream.read(&mut piece) {
                // A signal to this process, in which the server is as well, is no failure.
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                read => read.unwrap(),
            };
            assert!(count > 0, "the server has closed the connection");
            self.received.extend_from_slice(&piece[..count]);
        }
    }
}

fn account(number: usize) -> Vec<u8> {
    format!("account{number}").into_bytes()
}

fn amount(value: &[u8]) -> i64 {
    std::str::from_utf8(value).unwrap().parse().unwrap()
}

fn balance(number: usize, amount: i64) -> Entry {
    Entry {
        key: account(number),
        value: amount.to_string().into(),
        ..Entry::default()
    }
}

fn random(seed: &mut u64) -> usize {
    *seed = seed
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407);
    (*seed >> 33) as usize
}

/// Moves money between two accounts until `TRANSFERS` have succeeded; returns how often somebody was quicker.
fn teller(address: SocketAddr, mut seed: u64) -> usize {
    let mut connection = Connection::open(address);
    let (mut done, mut lost) = (0, 0);
    while done < TRANSFERS {
        let from = random(&mut seed) % ACCOUNTS;
        let to = (from + 1 + random(&mut seed) % (ACCOUNTS - 1)) % ACCOUNTS;
        let keys = vec![account(from), account(to)];
        let with_version = true;
        let read = connection.ask(Command::Get(Get { keys, with_version })).results;
        let sum = (random(&mut seed) % 50) as i64;
        let unchanged = |number, version| Compare {
            key: account(number),
            condition: Some(Condition {
                is: Some(Is::Version(version)),
            }),
        };
        let write = |number, amount| Operation {
            operation: Some(Of::Set(balance(number, amount))),
            with_version: false,
        };
        let transfer = Txn {
            compare: vec![unchanged(from, read[0].version), unchanged(to, read[1].version)],
            success: vec![
                write(from, amount(&read[0].value) - sum),
                write(to, amount(&read[1].value) + sum),
            ],
            failure: vec![],
        };
        if connection.ask(Command::Txn(transfer)).txn.unwrap().succeeded {
            done += 1;
        } else {
            lost += 1;
        }
    }
    lost
}

fn audit(address: SocketAddr) {
    let mut connection = Connection::open(address);
    for _ in 0..AUDITS {
        let keys = (0..ACCOUNTS).map(account).collect();
        let with_version = false;
        let read = connection.ask(Command::Get(Get { keys, with_version })).results;
        let sum: i64 = read.iter().map(|result| amount(&result.value)).sum();
        assert_eq!(sum, EACH * ACCOUNTS as i64);
    }
}

#[test]
fn the_sum_never_changes() {
    let config = Config {
        cores: Some(4),
        memcached: Listen::Off,
        text: Some(Listen::Off),
        json_line: Listen::Off,
        http: Listen::Off,
        grpc: Listen::Off,
        protobuf: "127.0.0.1:0".parse().unwrap(),
        ..Config::default()
    };
    let server = Server::start(config).unwrap();
    let address = server.address(Protocol::Protobuf).unwrap();
    let entries = (0..ACCOUNTS).map(|number| balance(number, EACH)).collect();
    Connection::open(address).ask(Command::Set(Set { entries }));
    let tellers: Vec<_> = (0..TELLERS)
        .map(|seed| std::thread::spawn(move || teller(address, seed)))
        .collect();
    let auditors: Vec<_> = (0..AUDITORS)
        .map(|_| std::thread::spawn(move || audit(address)))
        .collect();
    let lost: usize = tellers.into_iter().map(|teller| teller.join().unwrap()).sum();
    auditors.into_iter().for_each(|auditor| auditor.join().unwrap());
    audit(address);
    // Otherwise nobody was in anybody's way, and the test has shown little.
    assert!(lost > 0);
    server.stop();
}
