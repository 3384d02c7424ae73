//! Many cores, a slow and narrow mesh, and clients with pipelines, all in one thread and repeated by a seed. Each seed's
//! history is checked for strict serializability. `docs/testing.md` tells what is simulated and how to replay a seed.

#![allow(
    unreachable_pub,
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test, which says what it found"
)]

#[path = "simulator/mod.rs"]
mod simulator;
mod support;

use memkv::engine::Engine;
use memkv::partition::RangeTable;
use memkv::protocol::Protocol;
use simulator::crashes::{self, Bug};
use simulator::files::Fault;
use simulator::mutation::Mutation;
use simulator::run::{Counted, Ran, Verdict, run};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use support::{TOKEN_SEED, World};

/// Seeds that every `cargo test` runs.
const SEEDS: u64 = 200;

fn number_from(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{variable} is '{text}': it must be a number")),
    )
}

fn replay(seed: u64, test: &str) -> String {
    format!("replay it: MEMKV_SIM_SEED={seed} cargo test --test simulator {test} -- --nocapture")
}

/// What is wrong with a seed.
fn complaint(ran: &Ran) -> Option<String> {
    complain(&ran.story, &ran.verdict)
}

fn complain(story: &str, verdict: &Verdict) -> Option<String> {
    match verdict {
        Verdict::Good => None,
        Verdict::Stuck(what) => Some(format!("{story}  stuck: {what}")),
        Verdict::NotSerializable(why) => Some(format!("{story}  {why}")),
        Verdict::Left(what) => Some(format!("{story}  left over: {what}")),
        Verdict::NotRecovered(problem) => Some(format!("{story}  does not start again: {problem}")),
        Verdict::Undecided => Some(format!("{story}  the history is too tangled to be checked")),
    }
}

/// Runs seeds on all CPUs, each by itself in one thread; what they met, and the first complaints, in the order of their seeds.
fn run_all<C: Default + Send>(
    seeds: std::ops::Range<u64>,
    run: impl Fn(u64, &mut dyn FnMut(&dyn Fn(&mut C))) -> Option<String> + Sync,
) -> (C, Vec<(u64, String)>) {
    let next = AtomicU64::new(seeds.start);
    let found = Mutex::new((C::default(), vec![]));
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                return;
            }
            let mut count = |add: &dyn Fn(&mut C)| add(&mut found.lock().unwrap().0);
            let complaint = catch_unwind(AssertUnwindSafe(|| run(seed, &mut count)));
            let complaint = complaint.unwrap_or_else(|_| Some(format!("seed {seed}: it panicked, see above")));
            let mut found = found.lock().unwrap();
            found.1.extend(complaint.map(|text| (seed, text)));
            if found.1.len() >= 5 {
                return;
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(work);
        }
    });
    let (counted, mut complaints) = found.into_inner().unwrap();
    complaints.sort_unstable();
    (counted, complaints)
}

/// The seeds that `MEMKV_SIM_FIRST` and `MEMKV_SIM_SEEDS` name.
fn seeds() -> std::ops::Range<u64> {
    let first = number_from("MEMKV_SIM_FIRST").unwrap_or(1);
    first..first + number_from("MEMKV_SIM_SEEDS").unwrap_or(SEEDS)
}

/// Shows what seeds met, and what they complained of.
fn judge(met: &[(&str, u64)], complaints: &[(u64, String)], is_all_met: bool, one: &str) {
    for (name, number) in met {
        println!("{number:>12} {name}");
    }
    for (seed, text) in complaints {
        println!("\n{text}  {}", replay(*seed, one));
    }
    assert!(complaints.is_empty(), "{} seeds or more went wrong", complaints.len());
    // A simulation that no longer meets what it is there for would be good for ever.
    if is_all_met {
        for (name, number) in met {
            assert!(*number > 0, "no seed had any {name}");
        }
    }
}

/// As many seeds as `MEMKV_SIM_SEEDS` says, from `MEMKV_SIM_FIRST` on.
#[test]
fn many_seeds() {
    let seeds = seeds();
    let many = seeds.end - seeds.start >= SEEDS;
    let (counted, complaints) = run_all(seeds, |seed, count| {
        let ran = run(seed, None);
        count(&|sum: &mut Counted| sum.add(&ran.counted));
        complaint(&ran)
    });
    judge(&counted.fields(), &complaints, many, "one_seed");
}

/// What seeds with crashes must meet.
type Met = BTreeMap<&'static str, u64>;

/// The same for servers that crash and come back.
#[test]
fn many_crashes() {
    let seeds = seeds();
    let many = seeds.end - seeds.start >= SEEDS;
    let (met, complaints) = run_all(seeds, |seed, count| {
        let ran = crashes::run(seed, None);
        count(&|sum: &mut Met| {
            for (name, number) in &ran.met {
                *sum.entry(name).or_default() += number;
            }
        });
        complain(&ran.story, &ran.verdict)
    });
    let met: Vec<(&str, u64)> = met.into_iter().collect();
    judge(&met, &complaints, many, "one_crash");
}

/// The seed that `MEMKV_SIM_SEED` names, of those with crashes, with its history; and it runs the same way each time.
#[test]
fn one_crash() {
    let seed = number_from("MEMKV_SIM_SEED").unwrap_or(1);
    let ran = crashes::run(seed, None);
    print!("{}", ran.story);
    for (number, life) in (1..).zip(&ran.lives) {
        println!("life {number}:");
        let mut history = life.calls.clone();
        history.sort_by_key(|call| call.invoked);
        history.iter().for_each(|call| println!("  {call}"));
        life.end.iter().for_each(|end| println!("  found: {}", end.found));
    }
    let complaint = complain(&ran.story, &ran.verdict);
    assert!(complaint.is_none(), "{}", complaint.unwrap_or_default());
    let again = crashes::run(seed, None);
    assert_eq!(
        format!("{:?}", ran.lives),
        format!("{:?}", again.lives),
        "it ran differently"
    );
}

/// The seed that `MEMKV_SIM_SEED` names, with its history; and it runs the same way each time.
#[test]
fn one_seed() {
    let seed = number_from("MEMKV_SIM_SEED").unwrap_or(1);
    let ran = run(seed, None);
    print!("{}", ran.story);
    let mut history = ran.history.clone();
    history.sort_by_key(|call| call.invoked);
    history.iter().for_each(|call| println!("  {call}"));
    let complaint = complaint(&ran);
    assert!(complaint.is_none(), "{}", complaint.unwrap_or_default());
    let again = run(seed, None);
    assert_eq!(
        format!("{:?}", ran.history),
        format!("{:?}", again.history),
        "it ran differently"
    );
}

/// Seeds that found bugs, which are no more.
#[test]
fn seeds_that_found_bugs() {
    for (seed, bug) in [
        (8, "a transaction's read told a version that nobody asked for"),
        (
            368,
            "a read overtook a write of the same connection and key that waited for a lock",
        ),
        (576, "the same"),
        (
            138,
            "a delayed flush that another one replaced kept the credit that it had",
        ),
        (1799, "the same"),
        (2440, "the same"),
        (
            5068,
            "a COMMIT that waited for credit was taken for silence, and lost the credit that it had",
        ),
        (9618, "the same"),
        (8446, "a block that was begun for a write without memory kept its page"),
    ] {
        let complaint = complaint(&run(seed, None));
        assert!(complaint.is_none(), "{bug}: {}", complaint.unwrap_or_default());
    }
}

/// The same, of those with crashes.
#[test]
fn crashes_that_found_bugs() {
    for (seed, bug) in [
        (
            41,
            "what was written and not synced was found, built upon, and then lost",
        ),
        (181, "a read waited for a write of nothing"),
        (422, "a durable request told of a failed check that was not safe"),
        (594, "what an unsafe flush had emptied was shown"),
        (
            847,
            "a core that refuses writes left out its part of a decided transaction",
        ),
    ] {
        let ran = crashes::run(seed, None);
        let complaint = complain(&ran.story, &ran.verdict);
        assert!(complaint.is_none(), "{bug}: {}", complaint.unwrap_or_default());
    }
}

/// A delayed flush that lacks credit when its time comes waits as a client does: it takes place, and keeps no credit.
#[test]
fn a_delayed_flush_waits_for_credit() {
    let mut world = World::new(3, &["--mesh-requests-max", "1"]);
    let [near, other, far] = [0, 0, 1].map(|core| world.connect(core, Protocol::Memcached));
    assert_eq!(world.ask(near, b"flush_all 1\r\n"), b"OK\r\n");
    let table = RangeTable::even(TOKEN_SEED, 3, 3);
    let key_of = |core: u16| {
        let keys = (0..).map(|number| format!("key{number}"));
        let mut keys = keys.filter(|key| table.core_of(table.shard_of(table.place(key.as_bytes()).token)).0 == core);
        keys.next().unwrap()
    };
    // The only credit to the last core is in use when the time comes.
    world.send(near, format!("get {}\r\n", key_of(2)).as_bytes());
    world.pass(1500);
    world.send(other, b"mn\r\n");
    // Another flush takes its place.
    assert_eq!(world.ask(far, b"flush_all\r\n"), b"OK\r\n");
    world.advance(1);
    for core in [1, 2, 1] {
        let asked = format!("get {}\r\n", key_of(core));
        world.take(near);
        assert_eq!(world.ask(near, asked.as_bytes()), b"END\r\n", "core {core}");
    }
    assert!(world.engines.iter().all(Engine::is_quiet));
}

/// Runs seeds with a bug in them until one is caught in the way that `caught` says. What else the bug does is no matter.
fn catches(mutation: Mutation, caught: fn(&Verdict) -> bool) {
    let mut otherwise = 0;
    for seed in 1..=SEEDS {
        let ran = run(seed, Some(mutation));
        if caught(&ran.verdict) {
            println!("{mutation:?}: caught with seed {seed}, {otherwise} seeds before it went wrong otherwise");
            println!("{}", complaint(&ran).unwrap_or_default());
            return;
        }
        otherwise += u64::from(!matches!(ran.verdict, Verdict::Good));
    }
    panic!("{mutation:?} was not caught with {SEEDS} seeds");
}

fn by_its_history(verdict: &Verdict) -> bool {
    matches!(verdict, Verdict::NotSerializable(_))
}

fn by_silence(verdict: &Verdict) -> bool {
    matches!(verdict, Verdict::Stuck(_))
}

/// What catches bugs finds none where none was made.
#[test]
fn catches_nothing_without_a_bug() {
    for seed in 1..=SEEDS {
        let complaint = complaint(&run(seed, Some(Mutation::Nothing)));
        assert!(complaint.is_none(), "{}", complaint.unwrap_or_default());
    }
}

#[test]
fn catches_a_read_without_locks() {
    catches(Mutation::ReadWithoutLocks, by_its_history);
}

#[test]
fn catches_a_lock_released_early() {
    catches(Mutation::UnlockEarly, by_its_history);
}

#[test]
fn catches_a_lost_decision() {
    catches(Mutation::DropDecision, by_silence);
}

#[test]
fn catches_a_decision_that_is_only_said_to_be_carried_out() {
    catches(Mutation::FeignDecision, by_its_history);
}

#[test]
fn catches_a_commit_without_its_checks() {
    catches(Mutation::CommitUnchecked, by_its_history);
}

#[test]
fn catches_requests_out_of_order() {
    catches(Mutation::SwapRequests, by_its_history);
}

/// Runs seeds with crashes and a bug in them until one is caught: its clients see what cannot be, or the server does not start
/// again. What else the bug does is no matter.
fn crashes_catch(bug: Bug) {
    for seed in 1..=number_from("MEMKV_SIM_SEEDS").unwrap_or(SEEDS) {
        let ran = catch_unwind(AssertUnwindSafe(|| crashes::run(seed, Some(bug))));
        let Ok(ran) = ran else { continue };
        if matches!(ran.verdict, Verdict::NotSerializable(_) | Verdict::NotRecovered(_)) {
            println!("{bug:?}: caught with seed {seed}");
            println!("{}", complain(&ran.story, &ran.verdict).unwrap_or_default());
            return;
        }
    }
    panic!("{bug:?} was not caught with {SEEDS} seeds");
}

#[test]
fn crashes_catch_nothing_without_a_bug() {
    for seed in 1..=SEEDS {
        let ran = crashes::run(seed, Some(Bug::Nothing));
        let complaint = complain(&ran.story, &ran.verdict);
        assert!(complaint.is_none(), "{}", complaint.unwrap_or_default());
    }
}

#[test]
fn crashes_catch_a_sync_that_is_only_claimed() {
    crashes_catch(Bug::OfFiles(Fault::ClaimSync));
}

#[test]
fn crashes_catch_a_reply_before_its_write() {
    crashes_catch(Bug::OfFiles(Fault::ReplyEarly));
}

#[test]
fn crashes_catch_a_lost_part() {
    crashes_catch(Bug::OfFiles(Fault::LosePart));
}

#[test]
fn crashes_catch_logs_that_are_not_cut_together() {
    crashes_catch(Bug::OfFiles(Fault::IgnoreClosed));
}

#[test]
fn crashes_catch_an_image_adopted_early() {
    crashes_catch(Bug::OfFiles(Fault::AdoptEarly));
}

#[test]
fn crashes_catch_a_lock_released_before_all_is_safe() {
    crashes_catch(Bug::OfMesh(Mutation::SettleEarly));
}
