//! What the machine has and allows, asked before anything depends on it, and told in one message when it is too little.

use super::{StartError, net};
use crate::protocol::ProcessFacts;
use std::io;

/// glommio refuses to start below this.
const LOCKED_BYTES_MIN: u64 = 512 << 10;
/// What is asked for, as far as the hard limit allows.
const LOCKED_BYTES_WANTED: u64 = 64 << 20;
/// Descriptors a server has besides its connections, per core.
const OPEN_FILES_PER_CORE: u64 = 16;

/// The CPUs that this process may run on: its affinity, which a container's cpuset narrows.
pub(super) fn allowed_cpus() -> Result<Vec<usize>, StartError> {
    // SAFETY: an all-zero set is valid; the kernel fills it within the size given.
    let (result, set) = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        (libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set), set)
    };
    if result != 0 {
        return Err(StartError(format!(
            "cannot ask which CPUs to use: {}",
            io::Error::last_os_error()
        )));
    }
    // SAFETY: the numbers are below the size of the set.
    Ok((0..libc::CPU_SETSIZE as usize)
        .filter(|cpu| unsafe { libc::CPU_ISSET(*cpu, &set) })
        .collect())
}

/// Has this thread run on these CPUs, wherever the one that began it runs.
pub(super) fn run_on(cpus: &[usize]) -> io::Result<()> {
    // SAFETY: an all-zero set is valid, the numbers are below its size, and the kernel reads it within the size given.
    let result = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        let fits = cpus.iter().filter(|cpu| **cpu < libc::CPU_SETSIZE as usize);
        fits.for_each(|cpu| libc::CPU_SET(*cpu, &mut set));
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set)
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn limit(resource: libc::__rlimit_resource_t) -> libc::rlimit {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: writes to a local.
    unsafe { libc::getrlimit(resource, &mut limit) };
    limit
}

fn set_limit(resource: libc::__rlimit_resource_t, limit: &libc::rlimit) -> bool {
    // SAFETY: reads a local.
    unsafe { libc::setrlimit(resource, limit) == 0 }
}

/// Raises the limits on locked memory and open files as far as this process may.
pub(super) fn raise_limits() -> Result<(), StartError> {
    let files = limit(libc::RLIMIT_NOFILE);
    set_limit(
        libc::RLIMIT_NOFILE,
        &libc::rlimit {
            rlim_cur: files.rlim_max,
            ..files
        },
    );
    let locked = limit(libc::RLIMIT_MEMLOCK);
    if locked.rlim_cur < LOCKED_BYTES_WANTED {
        let wanted = libc::rlimit {
            rlim_cur: LOCKED_BYTES_WANTED,
            rlim_max: locked.rlim_max.max(LOCKED_BYTES_WANTED),
        };
        // Only a privileged process may raise the hard limit.
        if !set_limit(libc::RLIMIT_MEMLOCK, &wanted) {
            set_limit(
                libc::RLIMIT_MEMLOCK,
                &libc::rlimit {
                    rlim_cur: locked.rlim_max,
                    ..locked
                },
            );
        }
    }
    let locked = limit(libc::RLIMIT_MEMLOCK);
    if locked.rlim_cur < LOCKED_BYTES_MIN {
        return Err(StartError(format!(
            "this process may lock only {} bytes of memory and needs {LOCKED_BYTES_MIN}: raise RLIMIT_MEMLOCK (`ulimit -l \
             unlimited`, systemd: LimitMEMLOCK=infinity, Docker: --ulimit memlock=-1)",
            locked.rlim_cur
        )));
    }
    Ok(())
}

/// Warns when there are fewer descriptors than connections that are allowed.
pub(super) fn check_open_files(connections_max: u32, cores: u16) {
    let needed = u64::from(connections_max) + OPEN_FILES_PER_CORE * u64::from(cores) + 16;
    let files = limit(libc::RLIMIT_NOFILE).rlim_cur;
    if files < needed {
        log::warn!(
            "this process may open only {files} files, {needed} are needed for --connections-max {connections_max}: raise \
             RLIMIT_NOFILE (`ulimit -n`, systemd: LimitNOFILE=); until then accepting rests when they are used up"
        );
    }
}

/// Tries the features of io_uring that the server is built on.
pub(super) fn probe() -> Result<(), StartError> {
    net::probe().map_err(|error| {
        let reason = match error.raw_os_error() {
            Some(libc::ENOSYS) => {
                "this kernel has no io_uring, or a sandbox hides it: use Linux 6.1 or later (in a container, a seccomp \
                 profile that allows io_uring)"
            }
            Some(libc::EPERM | libc::EACCES) => {
                "io_uring is forbidden here: set the sysctl kernel.io_uring_disabled to 0, and in a container (Docker 25 \
                 and later forbid it) allow io_uring_setup, io_uring_enter and io_uring_register, for instance with \
                 --security-opt seccomp=unconfined"
            }
            Some(libc::EINVAL) => "this kernel's io_uring lacks DEFER_TASKRUN or buffer rings: use Linux 6.1 or later",
            Some(libc::ENOMEM) => {
                "not enough memory that may be locked: raise RLIMIT_MEMLOCK (`ulimit -l unlimited`, Docker: --ulimit \
                 memlock=-1)"
            }
            _ => "io_uring does not work here",
        };
        StartError(format!("{reason} ({error})"))
    })
}

/// A number that nobody can guess.
pub(super) fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    // The standard library seeds this from the system's randomness.
    std::hash::RandomState::new().build_hasher().finish()
}

/// CPU time of this process, and its memory.
pub(super) fn process_facts(resident_bytes: u64) -> ProcessFacts {
    // SAFETY: an all-zero `rusage` is valid; the kernel fills it.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    let microseconds = |time: libc::timeval| time.tv_sec as u64 * 1_000_000 + time.tv_usec as u64;
    ProcessFacts {
        pid: std::process::id(),
        user_us: microseconds(usage.ru_utime),
        system_us: microseconds(usage.ru_stime),
        resident_bytes,
    }
}
