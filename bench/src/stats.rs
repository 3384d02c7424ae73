//! Counters and histograms of one generator thread, kept per interval.

use crate::process::queued_ns;
use crate::workload::Command;
use hdrhistogram::Histogram;

/// Latencies are counted up to this, in nanoseconds; anything slower counts as this.
pub const MAX_LATENCY_NS: u64 = 600_000_000_000;

/// What can go wrong with a request or a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ErrorKind {
    /// The server answered with an error.
    Refused,
    /// The server declined to store a value.
    NotStored,
    /// The reply was for another key.
    WrongKey,
    /// The value had another length than the one that was written.
    WrongLength,
    /// The value was not the one that was written.
    WrongValue,
    /// The bytes received were no reply to the request.
    Malformed,
    /// A connection could not be opened.
    ConnectFailed,
    /// The server closed a connection.
    Closed,
    /// A connection broke.
    Broken,
    /// A request got no reply before its connection or the run ended.
    Unanswered,
}

impl ErrorKind {
    /// All kinds.
    pub const ALL: [ErrorKind; 10] = [
        ErrorKind::Refused,
        ErrorKind::NotStored,
        ErrorKind::WrongKey,
        ErrorKind::WrongLength,
        ErrorKind::WrongValue,
        ErrorKind::Malformed,
        ErrorKind::ConnectFailed,
        ErrorKind::Closed,
        ErrorKind::Broken,
        ErrorKind::Unanswered,
    ];

    /// A name for tables.
    pub fn name(self) -> &'static str {
        match self {
            ErrorKind::Refused => "refused by the server",
            ErrorKind::NotStored => "not stored",
            ErrorKind::WrongKey => "wrong key in the reply",
            ErrorKind::WrongLength => "wrong length of a value",
            ErrorKind::WrongValue => "wrong value",
            ErrorKind::Malformed => "malformed reply",
            ErrorKind::ConnectFailed => "connection failed",
            ErrorKind::Closed => "connection closed by the server",
            ErrorKind::Broken => "connection broken",
            ErrorKind::Unanswered => "request without a reply",
        }
    }
}

/// Counts of errors, with the first words seen of each kind.
#[derive(Debug, Clone, Default)]
pub struct Errors {
    counts: [u64; ErrorKind::ALL.len()],
    samples: [Option<String>; ErrorKind::ALL.len()],
}

impl Errors {
    /// Counts `n` errors; `detail` is kept if it is the first.
    #[cold]
    pub fn add(&mut self, kind: ErrorKind, n: u64, detail: &[u8]) {
        self.counts[kind as usize] += n;
        let sample = &mut self.samples[kind as usize];
        if sample.is_none() && !detail.is_empty() {
            *sample = Some(detail[..detail.len().min(200)].escape_ascii().to_string());
        }
    }

    /// Adds the counts of `other`.
    pub fn merge(&mut self, other: &Errors) {
        for kind in ErrorKind::ALL {
            let detail = other.samples[kind as usize].as_deref().unwrap_or_default();
            let at = kind as usize;
            self.counts[at] += other.counts[at];
            if self.samples[at].is_none() && !detail.is_empty() {
                self.samples[at] = Some(detail.to_string());
            }
        }
    }

    /// The count of one kind.
    pub fn count(&self, kind: ErrorKind) -> u64 {
        self.counts[kind as usize]
    }

    /// All errors together.
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The kinds that occurred, with counts and the first words seen.
    pub fn seen(&self) -> impl Iterator<Item = (ErrorKind, u64, &str)> {
        ErrorKind::ALL
            .into_iter()
            .map(|kind| {
                (
                    kind,
                    self.counts[kind as usize],
                    self.samples[kind as usize].as_deref().unwrap_or_default(),
                )
            })
            .filter(|&(_, n, _)| n > 0)
    }
}

/// Latency histograms per command, in nanoseconds.
pub type Histograms = [Histogram<u64>; Command::ALL.len()];

/// Empty histograms.
pub fn histograms() -> Histograms {
    std::array::from_fn(|_| {
        // Three significant digits: a percentile is off by a thousandth at most.
        Histogram::new_with_bounds(1, MAX_LATENCY_NS, 3).expect("the bounds are valid")
    })
}

/// The statistics of one interval.
#[derive(Debug, Clone)]
pub struct Interval {
    /// Beginning, in nanoseconds of the monotonic clock.
    pub start_ns: u64,
    /// End, in nanoseconds of the monotonic clock.
    pub end_ns: u64,
    /// Latencies of good replies.
    pub latencies: Histograms,
}

/// The statistics of one generator thread.
#[derive(Debug)]
pub struct Tally {
    interval_ns: u64,
    current: Interval,
    /// Good replies in the current interval and before.
    recorded: u64,
    hits: u64,
    misses: u64,
    received: u64,
    retries: u64,
    retries_max: u64,
    waited_ns: u64,
    errors: Errors,
    begin: Option<(u64, CpuTime)>,
    end: Option<(u64, CpuTime)>,
    /// Intervals that are over.
    pub done: Vec<Interval>,
}

impl Tally {
    /// Empty statistics with intervals of this many nanoseconds.
    pub fn new(interval_ns: u64) -> Self {
        Tally {
            interval_ns,
            current: Interval {
                start_ns: 0,
                end_ns: 0,
                latencies: histograms(),
            },
            recorded: 0,
            hits: 0,
            misses: 0,
            received: 0,
            retries: 0,
            retries_max: 0,
            waited_ns: 0,
            errors: Errors::default(),
            begin: None,
            end: None,
            done: Vec::new(),
        }
    }

    /// Begins the measured window.
    pub fn begin(&mut self, now: u64) {
        self.current.start_ns = now;
        self.begin = Some((now, CpuTime::of_this_thread()));
    }

    /// Ends the measured window.
    pub fn end(&mut self, now: u64) {
        self.close_interval(now);
        self.end = Some((now, CpuTime::of_this_thread()));
    }

    /// Begins another interval if the current one is over.
    #[inline(always)]
    pub fn rotate(&mut self, now: u64) {
        if now >= self.current.start_ns + self.interval_ns {
            self.close_interval(now);
        }
    }

    fn close_interval(&mut self, now: u64) {
        let next = Interval {
            start_ns: now,
            end_ns: now,
            latencies: histograms(),
        };
        let mut over = std::mem::replace(&mut self.current, next);
        over.end_ns = now;
        self.done.push(over);
    }

    /// Counts `count` good replies that took `latency_ns`.
    #[inline(always)]
    pub fn record(&mut self, command: Command, latency_ns: u64, count: u64) {
        if count > 0 {
            self.recorded += count;
            self.current.latencies[command as usize].saturating_record_n(latency_ns.min(MAX_LATENCY_NS), count);
        }
    }

    /// Good replies in the measured window.
    #[inline(always)]
    pub fn measured(&self) -> u64 {
        self.recorded
    }

    /// Counts keys that were found.
    #[inline(always)]
    pub fn hits(&mut self, n: u64) {
        self.hits += n;
    }

    /// Counts keys that were not found.
    #[inline(always)]
    pub fn misses(&mut self, n: u64) {
        self.misses += n;
    }

    /// Counts bytes of replies.
    #[inline(always)]
    pub fn bytes_received(&mut self, n: u64) {
        self.received += n;
    }

    /// Counts an attempt of a transaction that failed because a key had changed, the `nth` of that transaction.
    #[inline(always)]
    pub fn retry(&mut self, nth: u64) {
        self.retries += 1;
        self.retries_max = self.retries_max.max(nth);
    }

    /// Counts time spent spinning.
    #[inline(always)]
    pub fn waited(&mut self, ns: u64) {
        self.waited_ns += ns;
    }

    /// Counts errors, in whatever phase.
    #[cold]
    pub fn error(&mut self, kind: ErrorKind, n: u64, detail: &[u8]) {
        if n > 0 {
            self.errors.add(kind, n, detail);
        }
    }

    /// Ends the statistics. `answered` are the good replies by connection.
    pub fn into_summary(self, answered: Vec<u64>) -> WorkerSummary {
        let (begin, end) = (self.begin.unwrap_or_default(), self.end.unwrap_or_default());
        WorkerSummary {
            start_ns: begin.0,
            end_ns: end.0.max(begin.0),
            cpu: CpuTime {
                user_ns: end.1.user_ns - begin.1.user_ns,
                system_ns: end.1.system_ns - begin.1.system_ns,
                queued_ns: end.1.queued_ns.saturating_sub(begin.1.queued_ns),
            },
            recorded: self.recorded,
            hits: self.hits,
            misses: self.misses,
            received: self.received,
            retries: self.retries,
            retries_max: self.retries_max,
            answered,
            waited_ns: self.waited_ns,
            errors: self.errors,
            intervals: self.done,
        }
    }
}

/// What one generator thread measured.
#[derive(Debug)]
pub struct WorkerSummary {
    /// Beginning of its measured window, in nanoseconds of the monotonic clock.
    pub start_ns: u64,
    /// End of its measured window.
    pub end_ns: u64,
    /// CPU time it used in that window.
    pub cpu: CpuTime,
    /// Good replies.
    pub recorded: u64,
    /// Keys found.
    pub hits: u64,
    /// Keys not found.
    pub misses: u64,
    /// Bytes of replies.
    pub received: u64,
    /// Attempts of transactions that failed because a key had changed.
    pub retries: u64,
    /// The most of these that one transaction made.
    pub retries_max: u64,
    /// By connection: good replies.
    pub answered: Vec<u64>,
    /// The part of the CPU time in which it spun and waited.
    pub waited_ns: u64,
    /// Errors of the whole run, preload included.
    pub errors: Errors,
    /// Statistics by interval.
    pub intervals: Vec<Interval>,
}

/// CPU time in nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuTime {
    /// In user mode.
    pub user_ns: u64,
    /// In the kernel.
    pub system_ns: u64,
    /// Not used: ready to run, while something else had the CPU.
    pub queued_ns: u64,
}

impl CpuTime {
    /// What the calling thread has used so far.
    pub fn of_this_thread() -> Self {
        // SAFETY: rusage is plain integers, for which zeroes are valid.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: the pointer is to a valid rusage on the stack.
        unsafe { libc::getrusage(libc::RUSAGE_THREAD, &mut usage) };
        let ns = |t: libc::timeval| t.tv_sec as u64 * 1_000_000_000 + t.tv_usec as u64 * 1000;
        CpuTime {
            user_ns: ns(usage.ru_utime),
            system_ns: ns(usage.ru_stime),
            queued_ns: Self::queued_ns().unwrap_or(0),
        }
    }

    /// Unknown where the kernel does not count it.
    fn queued_ns() -> Option<u64> {
        queued_ns(&std::fs::read_to_string("/proc/thread-self/schedstat").ok()?)
    }

    /// What was used, in user mode and in the kernel.
    pub fn total_ns(&self) -> u64 {
        self.user_ns + self.system_ns
    }
}
