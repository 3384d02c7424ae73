//! How much memory the process may use, how much it does, and what nobody has charged of that.

use super::{StartError, allocator};
use crate::budget::Pool;
use crate::config::{Bytes, Config};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::Thread;
use std::time::Duration;

/// How often resident memory is compared with what is charged. What grows in between unnoticed must fit the reserve.
const MEASURE_PERIOD_NS: u64 = 10_000_000;
/// And how soon again when much was freed.
const MEASURE_AGAIN_NS: u64 = 200_000;
/// How often it is asked how much the process may use.
const LIMIT_PERIOD_NS: u64 = 1_000_000_000;
/// How often the cores are asked to let go of memory, at the most, and when that has brought nothing.
const GIVE_BACK_PERIOD_NS: u64 = 100_000_000;
const GIVE_BACK_AGAIN_NS: u64 = 5_000_000_000;

/// How long freed memory is kept for use again when nobody asks for it.
const KEPT_MAX: Duration = Duration::from_secs(1);

/// What is kept for connections is this part of the limit, and no more than so much.
const RESERVE_SHARE: u64 = 8;
const RESERVE_BYTES_MAX: u64 = 64 << 20;

/// What a core has besides its receive buffers: stacks, rings, histograms, an empty table.
const CORE_BYTES: u64 = 3 << 20;
/// Buffers of the queues from one core to another one.
const LINK_BYTES: u64 = 128 << 10;

/// What is kept for connections when the limit is `limit` bytes.
pub(super) fn reserve_of(limit: u64) -> u64 {
    (limit / RESERVE_SHARE).min(RESERVE_BYTES_MAX)
}

/// Three quarters of what the process may use, in whole megabytes, for people to read: the system and its page cache need
/// some, and so do sockets.
pub(super) fn default_limit(allowed: u64) -> u64 {
    (allowed / 4 * 3) >> 20 << 20
}

/// The memory that this process may use, and what says so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Allowed {
    pub(super) bytes: u64,
    pub(super) by: String,
}

/// Asks the system, whose files lie under `root`: the lowest limit of the process's control groups, in both versions with all
/// groups above them, or the memory of the machine.
pub(super) fn allowed(root: &Path) -> Allowed {
    let machine = std::fs::read_to_string(root.join("proc/meminfo"))
        .ok()
        .and_then(|text| {
            let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
            let kib = line.split_whitespace().nth(1)?.parse::<u64>().ok()?;
            Some(Allowed {
                bytes: kib * 1024,
                by: "the machine".to_owned(),
            })
        });
    let groups = std::fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mut limits: Vec<Allowed> = machine.into_iter().collect();
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        // Above `memory.high` the kernel slows the process down until it is hardly there: that is a limit, too.
        let (mounts, files): (&[&str], &[&str]) = if controllers.is_empty() {
            (
                &["sys/fs/cgroup", "sys/fs/cgroup/unified"],
                &["memory.max", "memory.high"],
            )
        } else if controllers.split(',').any(|controller| controller == "memory") {
            (&["sys/fs/cgroup/memory"], &["memory.limit_in_bytes"])
        } else {
            continue;
        };
        for mount in mounts {
            for folder in groups_above(&root.join(mount), path) {
                limits.extend(files.iter().filter_map(|file| read_limit(&folder.join(file))));
            }
        }
    }
    // A machine that does not say how much it has gets a limit that fits nearly all.
    limits
        .into_iter()
        .min_by_key(|limit| limit.bytes)
        .unwrap_or_else(|| Allowed {
            bytes: 1 << 30,
            by: "nobody".to_owned(),
        })
}

/// The folders of a group and of those above it. In a container the mounted folder may be the group itself, so that the path
/// to it does not exist; and a group outside of the container's view begins with `..`, and only the mounted folder tells.
fn groups_above(mount: &Path, path: &str) -> Vec<PathBuf> {
    let path = path.trim_start_matches('/');
    if path.split('/').any(|part| part == "..") {
        return vec![mount.to_owned()];
    }
    Path::new(path).ancestors().map(|above| mount.join(above)).collect()
}

/// The number in a file; `None` for `max`, and when there is no such file.
fn read_limit(file: &Path) -> Option<Allowed> {
    let bytes = std::fs::read_to_string(file).ok()?.trim().parse().ok()?;
    Some(Allowed {
        bytes,
        by: file.display().to_string(),
    })
}

/// Refuses a limit that leaves nothing for items. `resident`: what the process has already.
pub(super) fn check_limit(config: &Config, limit: u64, cores: u16, resident: u64) -> Result<(), StartError> {
    let cores = u64::from(cores);
    let receive_bytes = cores * u64::from(config.limits.receive_buffers) * super::net::BUFFER_BYTES as u64;
    let cores_bytes = cores * CORE_BYTES + cores * (cores - 1) * LINK_BYTES;
    let item_bytes = config.limits.item_size_max.0;
    let fixed_bytes = resident + receive_bytes + cores_bytes + item_bytes;
    if limit >= fixed_bytes + reserve_of(limit) {
        return Ok(());
    }
    // What is kept for connections grows with the limit.
    let reserve_bytes = fixed_bytes.div_ceil(RESERVE_SHARE - 1).min(RESERVE_BYTES_MAX);
    let least = fixed_bytes + reserve_bytes;
    let mebibytes = |bytes: u64| bytes.div_ceil(1 << 20);
    Err(StartError(format!(
        "--max-memory {} is too little for {cores} cores: {} MiB are needed before the first item ({} for what receives with \
         --receive-buffers {}, {} for one value of --item-size-max {}, {} kept for connections, {} for the rest): raise it, \
         or lower --cores, --receive-buffers or --item-size-max",
        Bytes(limit),
        mebibytes(least),
        mebibytes(receive_bytes),
        config.limits.receive_buffers,
        mebibytes(item_bytes),
        config.limits.item_size_max,
        mebibytes(reserve_bytes),
        mebibytes(resident + cores_bytes),
    )))
}

/// Resident memory of this process, asked again and again.
#[derive(Debug)]
pub(super) struct Resident {
    statm: File,
    page_bytes: u64,
}

impl Resident {
    pub(super) fn new() -> io::Result<Self> {
        // SAFETY: no pointers.
        let page_bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as u64;
        Ok(Self {
            statm: File::open("/proc/self/statm")?,
            page_bytes,
        })
    }

    /// In bytes; `None` when the system does not say.
    pub(super) fn bytes(&self) -> Option<u64> {
        let mut text = [0; 128];
        let length = self.statm.read_at(&mut text, 0).ok()?;
        let text = std::str::from_utf8(&text[..length]).ok()?;
        let pages: u64 = text.split(' ').nth(1)?.parse().ok()?;
        Some(pages * self.page_bytes)
    }
}

/// The thread that gives back counts as one of those who are asked.
const GIVER: u32 = 1;

/// Keeps the limit true: takes off it what nobody has charged, has freed memory given back when that becomes too much, and
/// follows what the process may use. All cores share it; the first that finds it due does it for all.
#[derive(Debug)]
pub(super) struct Watch {
    pool: Arc<Pool>,
    resident: Resident,
    /// `--max-memory` was given.
    given: bool,
    measure_at_ns: AtomicU64,
    limit_at_ns: AtomicU64,
    allowed: AtomicU64,
    /// How often the cores were asked to let go of memory, when, and how many have not done what is theirs: the cores, and then
    /// the thread that gives it back.
    asked: AtomicU32,
    asked_ns: AtomicU64,
    asking: AtomicU32,
    cores: u32,
    /// That thread.
    giver: OnceLock<Thread>,
    ended: AtomicBool,
    /// What is freed goes back at once.
    at_once: AtomicBool,
    /// What nobody had charged after that: what is left in use.
    settled: AtomicU64,
}

impl Watch {
    pub(super) fn new(pool: Arc<Pool>, resident: Resident, given: bool, allowed: u64, cores: u16) -> Self {
        Self {
            pool,
            resident,
            given,
            measure_at_ns: AtomicU64::new(0),
            limit_at_ns: AtomicU64::new(LIMIT_PERIOD_NS),
            allowed: AtomicU64::new(allowed),
            asked: AtomicU32::new(0),
            asked_ns: AtomicU64::new(0),
            asking: AtomicU32::new(0),
            cores: u32::from(cores),
            giver: OnceLock::new(),
            ended: AtomicBool::new(false),
            at_once: AtomicBool::new(false),
            settled: AtomicU64::new(u64::MAX),
        }
    }

    /// How often the cores were asked to let go of memory.
    #[inline]
    pub(super) fn asked(&self) -> u32 {
        self.asked.load(Ordering::Relaxed)
    }

    /// A core has let go of memory, as it was asked to.
    pub(super) fn let_go(&self) {
        if self.asking.fetch_sub(1, Ordering::AcqRel) == GIVER + 1
            && let Some(giver) = self.giver.get()
        {
            giver.unpark();
        }
    }

    /// Gives freed memory back to the system until [`Watch::end`]: what a thread is for that has nothing else to do.
    pub(super) fn give_back_until_end(&self) {
        let _ = self.giver.set(std::thread::current());
        while !self.ended.load(Ordering::Acquire) {
            std::thread::park_timeout(KEPT_MAX);
            self.give_back();
        }
    }

    fn give_back(&self) {
        let was_asked = self.asking.load(Ordering::Acquire) == GIVER;
        allocator::give_back();
        if was_asked {
            self.asking.store(0, Ordering::Release);
        }
    }

    /// No core is there any more.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::Release);
        if let Some(giver) = self.giver.get() {
            giver.unpark();
        }
    }

    /// Resident memory of the process, in bytes.
    pub(super) fn resident_bytes(&self) -> u64 {
        self.resident.bytes().unwrap_or_default()
    }

    /// Does what is due.
    #[inline]
    pub(super) fn look(&self, now_ns: u64) {
        let early_ns = if self.pool.is_to_measure() {
            MEASURE_PERIOD_NS - MEASURE_AGAIN_NS
        } else {
            0
        };
        if is_due(&self.measure_at_ns, now_ns + early_ns, MEASURE_PERIOD_NS - early_ns) {
            self.measure(now_ns);
        }
    }

    #[cold]
    fn measure(&self, now_ns: u64) {
        let limit = self.pool.limit();
        self.pool.keep_for_connections(reserve_of(limit));
        if let Some(other) = self.pool.measure(|| self.resident.bytes()) {
            self.ask_if_it_helps(other, now_ns);
            let short = self.pool.is_short() || self.at_once.load(Ordering::Relaxed) && self.pool.missing() > 0;
            if self.at_once.swap(short, Ordering::Relaxed) != short {
                allocator::give_back_at_once(short);
            }
        }
        if is_due(&self.limit_at_ns, now_ns, LIMIT_PERIOD_NS) {
            self.follow(allowed(Path::new("/")));
        }
    }

    /// What was freed is kept for a while, and by the cores. Where writes are refused for it, it is asked for.
    fn ask_if_it_helps(&self, other: u64, now_ns: u64) {
        let since_ns = now_ns.saturating_sub(self.asked_ns.load(Ordering::Relaxed));
        if since_ns < GIVE_BACK_PERIOD_NS || self.asking.load(Ordering::Relaxed) > 0 {
            return;
        }
        let settled = self.settled.load(Ordering::Relaxed);
        if settled == u64::MAX {
            // All have done it: this is what stays.
            self.settled.store(other, Ordering::Relaxed);
            return;
        }
        let grown = other > settled.saturating_add(self.pool.reserve() / 4);
        if self.pool.is_nearly_full() && (grown || since_ns >= GIVE_BACK_AGAIN_NS) {
            self.settled.store(u64::MAX, Ordering::Relaxed);
            self.asked_ns.store(now_ns, Ordering::Relaxed);
            self.asking.store(self.cores + GIVER, Ordering::Relaxed);
            self.asked.fetch_add(1, Ordering::Relaxed);
        } else {
            self.settled.fetch_min(other, Ordering::Relaxed);
        }
    }

    /// Follows a limit of the process that has changed.
    fn follow(&self, now: Allowed) {
        let before = self.allowed.swap(now.bytes, Ordering::Relaxed);
        if before == now.bytes {
            return;
        }
        let (allowed, by) = (Bytes(now.bytes), &now.by);
        if self.given {
            warn_if_over(self.pool.limit(), &now);
            return;
        }
        let limit = default_limit(now.bytes);
        self.pool.set_limit(limit);
        self.pool.keep_for_connections(reserve_of(limit));
        log::info!(
            "this process may use {allowed} now ({by}), before {}: the memory limit is {}",
            Bytes(before),
            Bytes(limit)
        );
    }
}

/// Warns of a limit that the system does not allow the process to reach.
pub(super) fn warn_if_over(limit: u64, allowed: &Allowed) {
    if limit > allowed.bytes {
        log::warn!(
            "the memory limit is {} and this process may use only {} ({}): the system may end it before the limit is reached; \
             lower --max-memory",
            Bytes(limit),
            Bytes(allowed.bytes),
            allowed.by
        );
    }
}

/// True for one of those who ask when `at_ns` has come, which moves on by `period_ns`.
#[inline]
fn is_due(at_ns: &AtomicU64, now_ns: u64, period_ns: u64) -> bool {
    let due_ns = at_ns.load(Ordering::Relaxed);
    now_ns >= due_ns
        && at_ns
            .compare_exchange(due_ns, now_ns + period_ns, Ordering::Relaxed, Ordering::Relaxed)
            .is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    /// A made-up system.
    fn system(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (file, text) in [("proc/meminfo", "MemTotal:       1000 kB\nMemFree: 5 kB\n")]
            .iter()
            .chain(files)
        {
            let path = root.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn limits_of_control_groups() {
        let bytes = |files: &[(&str, &str)]| allowed(system(files).path()).bytes;
        let none = "max\n";
        assert_eq!(bytes(&[]), 1_024_000, "the machine");
        let second = ("proc/self/cgroup", "0::/a/b\n");
        assert_eq!(bytes(&[second, ("sys/fs/cgroup/a/b/memory.max", none)]), 1_024_000);
        assert_eq!(bytes(&[second, ("sys/fs/cgroup/a/b/memory.max", "5000\n")]), 5000);
        let above = ("sys/fs/cgroup/a/memory.max", "4000\n");
        assert_eq!(bytes(&[second, ("sys/fs/cgroup/a/b/memory.max", none), above]), 4000);
        let high = ("sys/fs/cgroup/a/b/memory.high", "3000\n");
        assert_eq!(bytes(&[second, above, high]), 3000);
        assert_eq!(
            bytes(&[second, ("sys/fs/cgroup/memory.max", "2000\n"), above]),
            2000,
            "seen from inside"
        );
        assert_eq!(
            bytes(&[second, ("sys/fs/cgroup/unified/a/memory.max", "6000\n")]),
            6000,
            "beside version 1"
        );
        let outside = ("proc/self/cgroup", "0::/../b\n");
        assert_eq!(
            bytes(&[
                outside,
                ("sys/fs/cgroup/memory.max", "7000\n"),
                ("sys/fs/b/memory.max", "1")
            ]),
            7000
        );

        let first = ("proc/self/cgroup", "5:cpu:/x\n4:hugetlb,memory:/a/b\n0::/\n");
        let unlimited = (
            "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes",
            "9223372036854771712\n",
        );
        assert_eq!(bytes(&[first, unlimited]), 1_024_000);
        let above = ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "5000\n");
        assert_eq!(bytes(&[first, unlimited, above]), 5000);
        let mounted = ("sys/fs/cgroup/memory/memory.limit_in_bytes", "8000\n");
        assert_eq!(bytes(&[first, mounted]), 8000, "seen from inside");
        let other = ("sys/fs/cgroup/memory/x/memory.limit_in_bytes", "1\n");
        assert_eq!(bytes(&[first, other]), 1_024_000, "somebody else's");
    }

    /// The limit that an error asks for is enough, and not a mebibyte too much.
    #[test]
    fn what_is_needed_suffices() {
        let config = Config::parse_from(["memkv-tpc", "--item-size-max", "5m"]);
        for (cores, resident) in [(1, 3 << 20), (2, 12_345_678), (700, 1 << 20)] {
            let error = check_limit(&config, 1 << 20, cores, resident).unwrap_err().to_string();
            let (_, rest) = error.split_once("cores: ").unwrap();
            let needed: u64 = rest.split_once(" MiB").unwrap().0.parse().unwrap();
            check_limit(&config, needed << 20, cores, resident).unwrap();
            check_limit(&config, (needed - 1) << 20, cores, resident).unwrap_err();
        }
    }

    fn watch(limit: u64, given: bool) -> Watch {
        Watch::new(Pool::new(limit), Resident::new().unwrap(), given, 1 << 30, 2)
    }

    #[test]
    fn the_limit_follows_unless_it_was_given() {
        let now = |bytes| Allowed {
            bytes,
            by: "a test".to_owned(),
        };
        let own = watch(500, false);
        own.follow(now(1 << 30));
        assert_eq!(
            own.pool.limit(),
            500,
            "nothing has changed: somebody has set it meanwhile"
        );
        own.follow(now(400 << 20));
        assert_eq!((own.pool.limit(), own.pool.reserve()), (300 << 20, (300 << 20) / 8));
        let given = watch(500, true);
        given.follow(now(1 << 20));
        assert_eq!(given.pool.limit(), 500);
    }

    /// What this process has is found; and the cores are asked to give back what they can, but not without end.
    #[test]
    fn giving_back_is_asked_for_when_it_may_help() {
        let watch = watch(64 << 20, true);
        watch.look(1);
        let other = watch.pool.other();
        assert!((1 << 20..1 << 40).contains(&other), "{other}");
        let mut now_ns = GIVE_BACK_PERIOD_NS;
        let mut see = |other: u64, passed_ns: u64| {
            now_ns += passed_ns;
            watch.pool.set_other(other);
            watch.ask_if_it_helps(other, now_ns);
            watch.asked()
        };
        let full = 70 << 20;
        assert_eq!(see(20 << 20, GIVE_BACK_PERIOD_NS), 0);
        assert_eq!(see(30 << 20, GIVE_BACK_PERIOD_NS), 0, "there is room enough");
        assert_eq!(see(full, GIVE_BACK_PERIOD_NS), 1);
        watch.let_go();
        watch.give_back();
        assert_eq!(see(full, GIVE_BACK_PERIOD_NS), 1, "wait for the other core");
        watch.let_go();
        assert_eq!(see(full, GIVE_BACK_PERIOD_NS), 1, "and until it is given back");
        watch.give_back();
        assert_eq!(see(full, GIVE_BACK_PERIOD_NS), 1, "that much stays");
        assert_eq!(see(full, GIVE_BACK_PERIOD_NS), 1);
        assert_eq!(see(full + (3 << 20), GIVE_BACK_PERIOD_NS), 2, "it grows");
        (0..2).for_each(|_| watch.let_go());
        watch.give_back();
        assert_eq!(see(full, GIVE_BACK_AGAIN_NS), 2);
        assert_eq!(see(full, GIVE_BACK_AGAIN_NS), 3);
    }
}
