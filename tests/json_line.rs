//! Transactions of the JSON-line protocol among several clients, and at their limits. Conversations of one client are golden
//! transcripts.

mod support;

use memkv::partition::RangeTable;
use memkv::protocol::Protocol;
use support::protobuf::{ask as ask_protobuf, entry, request, set};
use support::{TOKEN_SEED, World};

const OK: &str = "{\"status\": \"Ok\"}\n";

fn say(world: &mut World, client: support::Client, lines: &str) -> String {
    String::from_utf8(world.ask(client, lines.as_bytes())).expect("answers are ASCII")
}

fn no(mesg: &str) -> String {
    format!("{{\"status\": \"Error\", \"mesg\": \"{mesg}\"}}\n")
}

#[test]
fn a_checked_commit_fails_when_a_key_has_changed() {
    for cores in [1, 3] {
        for (change, applied) in [
            ("PUT read 2", false),
            ("DEL read", false),
            ("PUT missing 1", false),
            ("PUT other 1", true),
        ] {
            let mut world = World::new(cores, &[]);
            let (one, two) = (
                world.connect(0, Protocol::JsonLine),
                world.connect(cores - 1, Protocol::JsonLine),
            );
            say(&mut world, two, "PUT read 1\n");
            let begun = say(
                &mut world,
                one,
                "START CHECKED\nGET read\nGET missing\nPUT a 1\nPUT b 1\nPUT c 1\n",
            );
            assert!(begun.contains("\"result\": \"1\""), "{begun}");
            assert_eq!(say(&mut world, two, &format!("{change}\n")), OK);
            let expected = if applied {
                OK.to_owned()
            } else {
                no("a key that was read has changed: nothing was applied")
            };
            assert_eq!(say(&mut world, one, "COMMIT\n"), expected, "{change}, {cores} cores");
            let seen = say(&mut world, two, "GET a\nGET b\nGET c\n");
            assert_eq!(seen.matches("Ok").count(), if applied { 3 } else { 0 });
            // An unchecked one does not mind.
            say(&mut world, one, "START\nGET read\nPUT a 2\n");
            say(&mut world, two, "PUT read 3\n");
            assert_eq!(say(&mut world, one, "COMMIT\n"), OK);
            assert!(world.engines.iter().all(|engine| engine.is_quiet()));
        }
    }
}

/// Nobody sees a transaction before its commit; what others commit meanwhile is read.
#[test]
fn reads_are_of_what_is_committed() {
    let mut world = World::new(2, &[]);
    let (one, two) = (
        world.connect(0, Protocol::JsonLine),
        world.connect(1, Protocol::JsonLine),
    );
    say(&mut world, one, "START\nPUT a 1\nPUT b 1\n");
    assert_eq!(say(&mut world, two, "GET a\n"), no("there is no such key"));
    say(&mut world, two, "PUT c 2\n");
    assert_eq!(
        say(&mut world, one, "GET c\n"),
        "{\"status\": \"Ok\", \"result\": \"2\"}\n"
    );
    say(&mut world, two, "PUT c 3\n");
    assert_eq!(
        say(&mut world, one, "GET c\n"),
        "{\"status\": \"Ok\", \"result\": \"3\"}\n"
    );
    assert_eq!(say(&mut world, one, "COMMIT\n"), OK);
    assert_eq!(
        say(&mut world, two, "GET a\n"),
        "{\"status\": \"Ok\", \"result\": \"1\"}\n"
    );
}

#[test]
fn a_transaction_over_its_limit_cannot_be_committed() {
    let options = ["--txn-ops-max", "3", "--txn-bytes-max", "10k", "--max-memory", "8m"];
    let many = "the transaction has too many commands: roll it back";
    let large = "the transaction is too large: roll it back";
    for cores in [1, 2] {
        for (line, why) in [
            ("PUT d 4".to_owned(), many),
            (format!("PUT c {}", "v".repeat(11_000)), large),
        ] {
            let mut world = World::new(cores, &options);
            let before = world.charged();
            let client = world.connect(0, Protocol::JsonLine);
            say(&mut world, client, "START\nPUT a 1\nDEL b\n");
            if why == many {
                assert_eq!(say(&mut world, client, "PUT c 3\n"), OK);
            }
            assert_eq!(say(&mut world, client, &format!("{line}\n")), no(why));
            assert_eq!(say(&mut world, client, "GET a\nPUT e 5\n"), no(why).repeat(2));
            assert_eq!(say(&mut world, client, "COMMIT\n"), no(why));
            assert_eq!(say(&mut world, client, "GET a\n"), no("there is no such key"));
            // A new one begins afresh.
            assert_eq!(say(&mut world, client, "START\nPUT a 1\nROLLBACK\n"), OK.repeat(3));
            assert_eq!(before, world.charged());
        }
    }
}

/// The server is slow, not the client: its COMMIT has credit of one core already and waits for that of another one.
#[test]
fn a_commit_that_waits_for_credit_is_not_silence() {
    let mut world = World::new(3, &["--mesh-requests-max", "1", "--txn-idle-timeout", "1s"]);
    let (client, other) = (
        world.connect(0, Protocol::JsonLine),
        world.connect(0, Protocol::JsonLine),
    );
    let table = RangeTable::even(TOKEN_SEED, 3, 3);
    let key_of = |core: u16| {
        let mut keys = (0..).map(|number| format!("key{number}"));
        keys.find(|key| table.core_of(table.shard_of(table.place(key.as_bytes()).token)).0 == core)
            .unwrap_or_default()
    };
    let (near, far) = (key_of(1), key_of(2));
    let begun = say(&mut world, client, &format!("START\nPUT {near} 1\nPUT {far} 1\n"));
    assert_eq!(begun, OK.repeat(3));
    world.send(other, format!("GET {far}\n").as_bytes());
    world.send(client, b"COMMIT\n");
    world.pass(1500);
    world.settle();
    assert_eq!(world.take(client), OK.as_bytes());
    // No credit is lost.
    world.take(other);
    for key in [near, far] {
        let found = "{\"status\": \"Ok\", \"result\": \"1\"}\n";
        assert_eq!(say(&mut world, other, &format!("GET {key}\n")), found);
    }
    assert!(world.engines.iter().all(|engine| engine.is_quiet()));
}

/// What is kept for the commit is charged, and given back whatever becomes of it.
#[test]
fn open_transactions_are_charged() {
    let mut world = World::new(2, &[]);
    let before = world.charged();
    let value = "v".repeat(100_000);
    for end in ["ROLLBACK\n", "COMMIT\nDEL a\n", "gone"] {
        let client = world.connect(0, Protocol::JsonLine);
        say(&mut world, client, &format!("START CHECKED\nGET a\nPUT a {value}\n"));
        assert!(world.charged() >= before + 100_000);
        if end == "gone" {
            world.drop_connection(client);
            world.settle();
        } else {
            say(&mut world, client, end);
        }
        // Pages that nothing lies in go back in their time.
        world.pass(100);
        world.settle();
        assert_eq!(world.charged(), before, "{end}");
    }
}

#[test]
fn values_of_other_protocols() {
    let mut world = World::new(2, &[]);
    let (lines, other) = (
        world.connect(0, Protocol::JsonLine),
        world.connect(1, Protocol::Protobuf),
    );
    ask_protobuf(&mut world, other, &request(1, set(&[entry(b"k", b"\xff\x00")])), 0);
    let mesg = no("the value is not UTF-8: another protocol wrote it, and can read it");
    assert_eq!(say(&mut world, lines, "GET k\n"), mesg);
    assert_eq!(say(&mut world, lines, "START CHECKED\nGET k\n"), format!("{OK}{mesg}"));
    assert_eq!(say(&mut world, lines, "PUT l 1\nCOMMIT\n"), OK.repeat(2));
}
