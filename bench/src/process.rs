//! What Linux tells about processes and CPUs, and the pinning of threads.

use serde::Serialize;
use std::fs;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// Nanoseconds of one tick of the clock that /proc counts CPU time in.
fn tick_ns() -> u64 {
    // SAFETY: sysconf takes no pointers.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    1_000_000_000 / u64::try_from(per_second).unwrap_or(100).max(1)
}

/// User and system time from the text of a `stat` file, in nanoseconds.
fn cpu_ns(stat: &str) -> Option<u64> {
    // The name in parentheses may contain anything; what follows it is numbers. User time is field 14 of all.
    let fields = &stat[stat.rfind(')')? + 1..];
    let mut fields = fields.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some((user + system) * tick_ns())
}

/// How long a task was ready to run while something else had the CPU, from the text of its `schedstat` file.
pub fn queued_ns(schedstat: &str) -> Option<u64> {
    schedstat.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// One thread of a process, at one moment.
#[derive(Debug, Clone, Copy)]
struct ThreadSample {
    id: u32,
    cpu_ns: u64,
    queued_ns: u64,
}

/// The CPU time a process has used, at one moment.
#[derive(Debug, Clone)]
pub struct ProcessSample {
    pid: u32,
    at: Instant,
    cpu_ns: u64,
    threads: Vec<ThreadSample>,
}

impl ProcessSample {
    /// Reads `/proc/PID`.
    ///
    /// # Errors
    ///
    /// When there is no such process.
    pub fn take(pid: u32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let at = Instant::now();
        let cpu_ns = cpu_ns(&stat).ok_or_else(|| io::Error::other("unreadable stat file"))?;
        let mut threads = Vec::new();
        for entry in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
            let Some(id) = entry.file_name().to_str().and_then(|t| t.parse().ok()) else {
                continue;
            };
            // A thread may end between the listing and the reading.
            let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else {
                continue;
            };
            // Not every kernel counts this.
            let schedstat = fs::read_to_string(entry.path().join("schedstat")).unwrap_or_default();
            if let Some(cpu_ns) = self::cpu_ns(&stat) {
                threads.push(ThreadSample {
                    id,
                    cpu_ns,
                    queued_ns: queued_ns(&schedstat).unwrap_or(0),
                });
            }
        }
        Ok(ProcessSample {
            pid,
            at,
            cpu_ns,
            threads,
        })
    }

    /// What the process used from this sample to `later`, per operation if there were any.
    pub fn until(&self, later: &ProcessSample, operations: u64) -> ServerUse {
        let wall_ns = later.at.duration_since(self.at).as_nanos().max(1) as f64;
        let used_ns = later.cpu_ns.saturating_sub(self.cpu_ns) as f64;
        let shares_of = |ns: fn(&ThreadSample) -> u64| {
            let share = |after: &ThreadSample| {
                let before = self.threads.iter().find(|t| t.id == after.id).map_or(0, ns);
                ns(after).saturating_sub(before) as f64 / wall_ns
            };
            later.threads.iter().map(share).collect::<Vec<f64>>()
        };
        let shares = shares_of(|thread| thread.cpu_ns);
        let queued = shares_of(|thread| thread.queued_ns);
        let working = shares.iter().filter(|&&s| s >= 0.01).count().max(1);
        let cores = working.min(allowed_cpus(self.pid).max(1)) as f64;
        ServerUse {
            pid: self.pid,
            cpu_us_per_operation: (operations > 0).then(|| used_ns / 1000.0 / operations as f64),
            cores_used: used_ns / wall_ns,
            busiest_thread_share: shares.iter().copied().fold(0.0, f64::max),
            queued_share: queued.into_iter().fold(0.0, f64::max),
            idle_share: (1.0 - used_ns / wall_ns / cores).clamp(0.0, 1.0),
            resident_bytes: resident_bytes(self.pid).unwrap_or(0),
        }
    }
}

/// What a server process used while it was measured.
#[derive(Debug, Clone, Serialize)]
pub struct ServerUse {
    /// Its process id.
    pub pid: u32,
    /// CPU time per operation, user and system, in microseconds.
    pub cpu_us_per_operation: Option<f64>,
    /// CPU time by wall time: 1 is one core used up.
    pub cores_used: f64,
    /// The same for the thread that used most.
    pub busiest_thread_share: f64,
    /// Time that a thread was ready to run while something else had its CPU by wall time, of the thread that waited most.
    pub queued_share: f64,
    /// Unused part of the cores it worked on: as many as it has threads that did anything, and no more than it may use.
    pub idle_share: f64,
    /// Resident memory at the end, in bytes.
    pub resident_bytes: u64,
}

impl ServerUse {
    /// Whether some thread of the server had next to nothing left.
    pub fn saturated(&self) -> bool {
        self.busiest_thread_share >= 0.9 || self.idle_share <= 0.1
    }
}

/// Resident memory of a process, in bytes.
pub fn resident_bytes(pid: u32) -> Option<u64> {
    let statm = fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    let pages: u64 = statm.split_ascii_whitespace().nth(1)?.parse().ok()?;
    // SAFETY: sysconf takes no pointers.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    Some(pages * u64::try_from(page).unwrap_or(4096))
}

/// CPU time that the calling thread has used, in nanoseconds, in user mode and in the kernel. A system call: it costs some
/// hundred nanoseconds.
///
/// Interrupts that are served on the thread's CPU count, and so may time that a hypervisor gives to others.
pub fn thread_cpu_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a valid timespec on the stack. The clock exists on every Linux, so the call cannot fail.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Memory that processes may still take without others being pressed, in bytes; `None` if unknown.
pub fn available_bytes() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.split_ascii_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}

/// Has the system leave huge pages out in this process, as memkv-tpc does in its own: what is measured of its engine here
/// would otherwise take other memory, and other times, than in the server.
pub fn leave_huge_pages_out() {
    // SAFETY: a flag of the process, no pointers. A system that does not know it has no such pages either.
    unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0) };
}

/// The number of CPUs a process may run on; 0 if unknown.
fn allowed_cpus(pid: u32) -> usize {
    // SAFETY: cpu_set_t is plain integers, for which zeroes are valid; the pointer is to one on the stack.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(pid as i32, size_of::<libc::cpu_set_t>(), &mut set) != 0 {
            return 0;
        }
        libc::CPU_COUNT(&set) as usize
    }
}

/// Ties the calling thread, and those it starts later, to `cpus`.
///
/// # Errors
///
/// When there is no such CPU, or the process may not use it.
pub fn pin(cpus: &[usize]) -> io::Result<()> {
    // SAFETY: as above; CPU_SET is only called for numbers that fit.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        for &cpu in cpus {
            if cpu >= libc::CPU_SETSIZE as usize {
                return Err(io::Error::from_raw_os_error(libc::EINVAL));
            }
            libc::CPU_SET(cpu, &mut set);
        }
        if libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Lets the calling thread's timers fire on time. By default the kernel may delay them by 50 microseconds, which an open
/// loop would count as latency.
pub fn precise_timers() {
    // SAFETY: the call takes no pointers; without it timers are merely late.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1, 0, 0, 0) };
}

/// A descriptor that can be read from once the process was asked to end, by SIGTERM or SIGINT, which do nothing else from
/// now on. For a process with one thread: others still end by these signals.
///
/// # Errors
///
/// When there are no descriptors left.
pub fn end_request() -> io::Result<OwnedFd> {
    // SAFETY: the set is plain integers, for which zeroes are valid, and the pointers are to it; the descriptor is checked,
    // new, and nobody else's.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGTERM);
        libc::sigaddset(&mut set, libc::SIGINT);
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        match libc::signalfd(-1, &set, libc::SFD_CLOEXEC) {
            fd if fd < 0 => Err(io::Error::last_os_error()),
            fd => Ok(OwnedFd::from_raw_fd(fd)),
        }
    }
}

/// Reads a list of CPUs such as `0,2-3`.
///
/// # Errors
///
/// A sentence that says what is wrong and what to write.
pub fn parse_cpus(text: &str) -> Result<Vec<usize>, String> {
    let wrong = || format!("'{text}' is not a list of CPUs; write numbers and ranges such as 0,2-3");
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (low, high) = part.split_once('-').unwrap_or((part, part));
        let low: usize = low.trim().parse().map_err(|_| wrong())?;
        let high: usize = high.trim().parse().map_err(|_| wrong())?;
        if low > high || high >= libc::CPU_SETSIZE as usize {
            return Err(wrong());
        }
        cpus.extend(low..=high);
    }
    Ok(cpus)
}

/// Allows as many open files as the system lets this process have.
pub fn raise_file_limit() -> u64 {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the pointers are to a valid rlimit on the stack.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) != 0 {
            return u64::MAX;
        }
        limit.rlim_cur = limit.rlim_max;
        if libc::setrlimit(libc::RLIMIT_NOFILE, &limit) != 0 {
            libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit);
        }
    }
    limit.rlim_cur
}

/// Time of the CPUs since the machine started, at one moment.
#[derive(Debug, Clone)]
pub struct CpuSample(Vec<(usize, [u64; 8])>);

impl CpuSample {
    /// Reads `/proc/stat`; empty where that cannot be read.
    pub fn take() -> Self {
        let text = fs::read_to_string("/proc/stat").unwrap_or_default();
        let cpus = text.lines().filter_map(|line| {
            let mut fields = line.strip_prefix("cpu")?.split_ascii_whitespace();
            let cpu = fields.next().filter(|_| !line.starts_with("cpu "))?.parse().ok()?;
            let mut times = [0; 8];
            for (place, field) in times.iter_mut().zip(fields) {
                *place = field.parse().ok()?;
            }
            Some((cpu, times))
        });
        CpuSample(cpus.collect())
    }

    /// Shares of busy and stolen time of all CPUs from this sample to `later`.
    pub fn until(&self, later: &CpuSample) -> CpuShares {
        let (mut seen, mut total, mut idle, mut stolen) = (0, 0, 0, 0);
        for (cpu, after) in &later.0 {
            let Some((_, before)) = self.0.iter().find(|(c, _)| c == cpu) else {
                continue;
            };
            let delta = |i: usize| after[i].saturating_sub(before[i]);
            seen += 1;
            total += (0..8).map(delta).sum::<u64>();
            idle += delta(3) + delta(4);
            stolen += delta(7);
        }
        let share = |n: u64| if total == 0 { 0.0 } else { n as f64 / total as f64 };
        CpuShares {
            cpus: seen,
            busy: share(total - idle - stolen),
            stolen: share(stolen),
        }
    }
}

/// What the CPUs did.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct CpuShares {
    /// How many they are.
    pub cpus: usize,
    /// Share of time they ran anything.
    pub busy: f64,
    /// Share of time the hypervisor gave to others.
    pub stolen: f64,
}

/// A pause that ends early once `over` says so; whether it did.
pub fn wait(limit: Duration, mut over: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + limit;
    loop {
        if over() {
            return true;
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        std::thread::sleep(left.min(Duration::from_millis(5)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists() {
        assert_eq!(parse_cpus("0").unwrap(), [0]);
        assert_eq!(parse_cpus("0,2-4").unwrap(), [0, 2, 3, 4]);
        for text in ["", "a", "3-1", "1,,2", "99999"] {
            assert!(parse_cpus(text).is_err(), "{text}");
        }
    }

    #[test]
    fn stat_lines_with_odd_names() {
        let line = "42 (a) b) (c) S 1 2 3 4 5 6 7 8 9 10 150 50 0 0 20 0 1 0";
        assert_eq!(cpu_ns(line), Some(200 * tick_ns()));
        assert_eq!(cpu_ns("nothing"), None);
    }

    #[test]
    fn cpu_time_of_a_thread_passes() {
        let before = thread_cpu_ns();
        let mut x = 1u64;
        while thread_cpu_ns() < before + 1_000_000 {
            x = std::hint::black_box(crate::workload::mix(x));
        }
        assert!(available_bytes().is_none_or(|bytes| bytes > 0));
    }

    #[test]
    fn own_use_is_seen() {
        let before = ProcessSample::take(std::process::id()).unwrap();
        let until = Instant::now() + Duration::from_millis(120);
        let mut x = 1u64;
        while Instant::now() < until {
            x = std::hint::black_box(crate::workload::mix(x));
        }
        let used = before.until(&ProcessSample::take(std::process::id()).unwrap(), 10);
        assert!(used.cores_used > 0.1, "{used:?}");
        assert!(used.resident_bytes > 100_000);
        assert!(ProcessSample::take(u32::MAX / 2).is_err());
    }
}
