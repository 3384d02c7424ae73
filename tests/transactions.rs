//! Transactions of the protobuf protocol, asked by one client at a time. What happens among many is for the simulator.

#![allow(clippy::unwrap_used, reason = "in a test, the assertion")]

mod support;

use memkv::proto::condition::Is;
use memkv::proto::message::Command;
use memkv::proto::operation::Operation as Of;
use memkv::proto::{Code, Compare, Entry, Operation, Response, Txn};
use memkv::protocol::Protocol;
use support::World;
use support::protobuf::{ask, entry, everywhere, found, get, only, only_if, request, results, set};

fn compare(key: &[u8], is: Is) -> Compare {
    Compare {
        key: key.to_vec(),
        condition: only_if(is),
    }
}

fn op(operation: Of) -> Operation {
    Operation {
        operation: Some(operation),
        with_version: false,
    }
}

fn txn(compare: &[Compare], success: &[Of], failure: &[Of]) -> Vec<u8> {
    let all = |ops: &[Of]| ops.iter().cloned().map(op).collect();
    let txn = Txn {
        compare: compare.to_vec(),
        success: all(success),
        failure: all(failure),
    };
    request(9, Command::Txn(txn))
}

fn succeeded(answer: &Response) -> bool {
    assert_eq!((answer.id, answer.code()), (9, Code::Ok), "{}", answer.message);
    answer.txn.unwrap().succeeded
}

#[test]
fn one_branch_is_executed() {
    everywhere(&[], |ask| {
        let keys: Vec<Vec<u8>> = (0..10).map(|number| format!("account{number}").into_bytes()).collect();
        let puts: Vec<Of> = keys.iter().map(|key| Of::Set(entry(key, b"1"))).collect();
        let gets: Vec<Of> = keys.iter().map(|key| Of::Get(key.clone())).collect();
        let absent: Vec<Compare> = keys.iter().map(|key| compare(key, Is::Absent(true))).collect();
        for (expected, each) in [(true, only(Code::Ok)), (false, found(b"1"))] {
            let answer = &ask(&txn(&absent, &puts, &gets))[0];
            assert_eq!(succeeded(answer), expected);
            assert_eq!(results(answer), vec![each; 10]);
        }
        // Nothing to do when it fails.
        let answer = &ask(&txn(&absent, &puts, &[]))[0];
        assert!(!succeeded(answer) && answer.results.is_empty());
        // Nothing to compare, and nothing to do when that succeeds.
        let answer = &ask(&txn(&[], &[], &gets))[0];
        assert!(succeeded(answer) && answer.results.is_empty());
        // Without a comparison: success. Operations see those before them.
        let mixed = [
            (Of::Get(keys[0].clone()), found(b"1")),
            (Of::Set(entry(&keys[0], b"2")), only(Code::Ok)),
            (Of::Get(keys[0].clone()), found(b"2")),
            (Of::Delete(keys[1].clone()), only(Code::Ok)),
            (Of::Get(keys[1].clone()), only(Code::NotFound)),
            (Of::Delete(keys[1].clone()), only(Code::NotFound)),
            (Of::Set(entry(&keys[2], &[3; 6000])), only(Code::Ok)),
            (Of::Get(keys[2].clone()), found(&[3; 6000])),
        ];
        let (operations, expected): (Vec<_>, Vec<_>) = mixed.into_iter().unzip();
        let answer = &ask(&txn(&[], &operations, &[]))[0];
        assert!(succeeded(answer));
        assert!(results(answer) == expected);
    });
}

#[test]
fn versions() {
    everywhere(&[], |ask| {
        let versioned = Entry {
            with_version: true,
            ..entry(b"a", b"1")
        };
        let version = results(&ask(&request(1, set(&[versioned])))[0])[0].version;
        let write = Entry {
            with_version: true,
            ..entry(b"b", b"2")
        };
        let read = Operation {
            operation: Some(Of::Get(b"a".to_vec())),
            with_version: true,
        };
        let asked = Txn {
            compare: vec![compare(b"a", Is::Version(version)), compare(b"b", Is::Absent(true))],
            success: vec![read, op(Of::Set(write))],
            failure: vec![],
        };
        let answer = &ask(&request(9, Command::Txn(asked.clone())))[0];
        assert!(succeeded(answer));
        assert_eq!(answer.results[0].version, version);
        assert!(answer.results[1].version > 0);
        assert!(!succeeded(&ask(&request(9, Command::Txn(asked)))[0]));
    });
}

#[test]
fn bad_transactions() {
    everywhere(&["--request-keys-max", "3"], |ask| {
        let conditional = Entry {
            condition: only_if(Is::Absent(true)),
            ..entry(b"k", b"v")
        };
        let read = |key: &[u8]| Of::Get(key.to_vec());
        let present = compare(b"k", Is::Present(true));
        let unknown = Txn {
            success: vec![Operation::default()],
            ..Txn::default()
        };
        for (wrong, reason) in [
            (txn(&[], &[], &[]), "neither"),
            (txn(&[], &[read(b"")], &[]), "key 1 is empty"),
            (txn(&[compare(b"", Is::Absent(true))], &[], &[]), "key 1 is empty"),
            (txn(&[], &[Of::Set(conditional)], &[]), "operation 1 has a condition"),
            (
                txn(&[present], &[read(b"k"), read(b"l")], &[read(b"m")]),
                "more than 3 keys",
            ),
            (request(9, Command::Txn(unknown)), "operation 1 is none"),
        ] {
            let answers = ask(&[wrong, request(2, get(&[b"k"], false))].concat());
            assert_eq!(
                (answers[0].id, answers[0].code()),
                (9, Code::InvalidArgument),
                "{reason}"
            );
            assert!(answers[0].message.contains(reason), "{}", answers[0].message);
            assert_eq!(results(&answers[1]), [only(Code::NotFound)]);
        }
    });
}

/// Without memory for all of it, nothing of a transaction is done.
#[test]
fn no_memory_for_half_of_it() {
    for cores in [1, 2, 3] {
        let mut world = World::new(cores, &["--max-memory", "4m"]);
        let client = world.connect(0, Protocol::Protobuf);
        let keys: Vec<Vec<u8>> = (0..8).map(|number| format!("key{number}").into_bytes()).collect();
        let large: Vec<Of> = keys.iter().map(|key| Of::Set(entry(key, &[1; 900_000]))).collect();
        let small: Vec<Of> = keys.iter().map(|key| Of::Set(entry(key, b"2"))).collect();
        let refused = &ask(&mut world, client, &txn(&[], &large, &[]), 0)[0];
        assert_eq!(refused.code(), Code::OutOfMemory);
        let keys: Vec<&[u8]> = keys.iter().map(Vec::as_slice).collect();
        let answers = ask(&mut world, client, &request(1, get(&keys, false)), 0);
        assert_eq!(results(&answers[0]), vec![only(Code::NotFound); 8]);
        assert!(succeeded(&ask(&mut world, client, &txn(&[], &small, &[]), 0)[0]));
        assert!(world.engines.iter().all(|engine| engine.is_quiet()));
    }
}

/// What a connection asks for one key is done in its order, also where a part of it meets a lock.
#[test]
fn requests_do_not_overtake_each_other() {
    for cores in [1, 2, 3] {
        for core in 0..cores {
            for number in 0..20u8 {
                let mut world = World::new(cores, &[]);
                let client = world.connect(core, Protocol::Protobuf);
                let key = [b'k', number];
                let keys: Vec<[u8; 2]> = (0..4).map(|other| [b'l', other]).collect();
                let mut all: Vec<&[u8]> = keys.iter().map(<[u8; 2]>::as_slice).collect();
                all.push(&key);
                let pipeline = [
                    request(1, get(&all, false)),
                    request(2, set(&[entry(&key, b"1")])),
                    request(3, get(&[&key], false)),
                    request(4, get(&all, false)),
                    request(5, set(&[entry(&key, b"2")])),
                    request(6, get(&[&key], false)),
                ];
                let answers = ask(&mut world, client, &pipeline.concat(), 0);
                assert_eq!(results(&answers[2]), [found(b"1")]);
                assert_eq!(results(&answers[3])[4], found(b"1"));
                assert_eq!(
                    results(&answers[5]),
                    [found(b"2")],
                    "core {core} of {cores}, key {number}"
                );
            }
        }
    }
}
