//! Who does what a core wants of its files.
//!
//! A part of the log that fits into one write, and is to be safe, goes to the disk by the core's own ring: nobody waits for it in a
//! thread, and while the disk is at it the core goes on. All else is done by a thread that may wait: making and naming files, images, what
//! is written without being made safe. The [`Writer`] of the log goes to and fro between the two, so there is never a doubt about
//! whose turn it is.

use super::disk::is_refusal;
use super::host;
use super::net::Net;
use crate::keeper::{Keeper, Write, Writer};
use crate::wal::{Done, Job};
use std::collections::VecDeque;
use std::io::{Error, ErrorKind, Result};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread::JoinHandle;

/// Tasks that may wait for a thread. The engine has two jobs of the log and one of an image under way, and an image has a few steps:
/// a place that is always free costs nothing.
const TASKS_MAX: usize = 16;

/// What a thread is to do.
enum Task {
    /// A job that has nothing to do with the log.
    Image(Job),
    /// A job of the log, and what is needed for it.
    Log(Job, Box<Writer>),
    /// To make a segment ready.
    NeedNext,
}

/// What came of one, and the writer when it was needed.
type Answer = (Done, Option<Box<Writer>>);

/// A write that the ring is at.
struct Writing {
    write: Write,
    /// So many bytes of it are written.
    written: usize,
    /// That it is safe, or why that is not known.
    answer: Option<Result<()>>,
    /// To be used again.
    buffers: Vec<Vec<u8>>,
}

/// See the module's text. Dropping it has the thread do what waits, and then end.
pub(super) struct Filer {
    tasks: Option<SyncSender<Task>>,
    answers: Receiver<Answer>,
    thread: Option<JoinHandle<()>>,
    /// Tasks that were taken and not answered.
    tasked: usize,
    /// Nothing while the thread has it.
    writer: Option<Box<Writer>>,
    /// In order.
    writes: VecDeque<Writing>,
    /// The number of the first of them.
    first_write: u32,
    /// The ring may be used for it.
    by_ring: bool,
    /// Jobs of the log that are not begun.
    waiting: VecDeque<Job>,
    /// What is to be told.
    done: VecDeque<Done>,
    /// Why the log takes nothing more.
    log_failed: Option<String>,
}

impl std::fmt::Debug for Filer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Filer with {} jobs", self.pending())
    }
}

impl Filer {
    /// Starts the thread. The bell is rung when it has done something.
    /// It may use all these CPUs: its core's own is busy.
    pub(super) fn start(core: u16, mut keeper: Keeper, cpus: Vec<usize>, bell: Box<dyn Fn() + Send>) -> Result<Self> {
        let writer = keeper.lend();
        let (tasks, to_do) = sync_channel(TASKS_MAX);
        // What was done needs no more room than what was to be done, and what `poll` did not take yet.
        let (tell, answers) = sync_channel(2 * TASKS_MAX);
        let thread = std::thread::Builder::new().name(format!("files {core}"));
        let thread = thread.spawn(move || {
            if let Err(error) = host::run_on(&cpus) {
                log::warn!("the thread for the files of core {core} stays where the core is: {error}");
            }
            work(keeper, &to_do, &tell, &*bell);
        })?;
        Ok(Self {
            tasks: Some(tasks),
            answers,
            thread: Some(thread),
            tasked: 0,
            by_ring: writer
                .as_ref()
                .is_some_and(|writer| writer.file().descriptor().is_some()),
            writer,
            writes: VecDeque::new(),
            first_write: 0,
            waiting: VecDeque::new(),
            done: VecDeque::new(),
            log_failed: None,
        })
    }

    /// Takes a job. What comes of it is told by [`Filer::poll`].
    pub(super) fn submit(&mut self, job: Job, net: &mut Net) {
        if matches!(job, Job::Log { .. }) {
            self.waiting.push_back(job);
            self.begin_waiting(net);
        } else if !self.hand_over(Task::Image(job)) {
            let why = NO_THREAD.to_owned();
            self.done.push_back(Done::Failed { log: false, why });
        }
    }

    /// The next that was done, if any was.
    pub(super) fn poll(&mut self, net: &mut Net) -> Option<Done> {
        while let Some((number, result)) = net.next_written() {
            self.wrote(number, result, net);
        }
        while self.writes.front().is_some_and(|writing| writing.answer.is_some())
            && let Some(Writing {
                write,
                buffers,
                answer: Some(result),
                ..
            }) = self.writes.pop_front()
        {
            self.first_write = self.first_write.wrapping_add(1);
            let ended = match &mut self.writer {
                Some(writer) => writer.end(write, result),
                None => Err(NO_THREAD.to_owned()),
            };
            match ended {
                Ok(()) => self.done.push_back(Done::Logged { buffers, synced: true }),
                Err(why) => self.fail(&why),
            }
        }
        while let Ok((done, writer)) = self.answers.try_recv() {
            self.tasked -= 1;
            if writer.is_some() {
                self.writer = writer;
            }
            match done {
                Done::Failed { log: true, why } => self.fail(&why),
                other => self.done.push_back(other),
            }
        }
        self.begin_waiting(net);
        self.done.pop_front()
    }

    /// Jobs that were taken and not told of.
    pub(super) fn pending(&self) -> usize {
        self.tasked + self.writes.len() + self.waiting.len() + self.done.len()
    }

    /// Gives the thread a task, unless too many wait, or it has ended.
    fn hand_over(&mut self, task: Task) -> bool {
        let answers = !matches!(task, Task::NeedNext);
        let tasks = self.tasks.as_ref().filter(|_| self.tasked < TASKS_MAX);
        let taken = tasks.is_some_and(|tasks| tasks.try_send(task).is_ok());
        self.tasked += usize::from(taken && answers);
        taken
    }

    /// Begins jobs of the log, as far as that is possible now.
    fn begin_waiting(&mut self, net: &mut Net) {
        while let Some(job) = self.waiting.pop_front() {
            if let Err(job) = self.begin(job, net) {
                return self.waiting.push_front(job);
            }
        }
    }

    /// Begins a job of the log; gives it back when the thread has the writer, or is to have it when the ring has done what it is at.
    fn begin(&mut self, job: Job, net: &mut Net) -> std::result::Result<(), Job> {
        if let Some(why) = self.log_failed.clone() {
            self.fail(&why);
            return Ok(());
        }
        let Some(mut writer) = self.writer.take() else {
            return Err(job);
        };
        let write = match &job {
            Job::Log {
                chunks,
                sync: true,
                ends,
            } if self.by_ring => writer.begin(chunks, *ends),
            _ => None,
        };
        match (write, job) {
            (Some(write), Job::Log { chunks, .. }) => {
                if writer.needs_next() {
                    // What cannot be prepared is made when it is needed.
                    self.hand_over(Task::NeedNext);
                }
                self.writer = Some(writer);
                self.writes.push_back(Writing {
                    write,
                    written: 0,
                    answer: None,
                    buffers: chunks.into_iter().map(|chunk| chunk.effects).collect(),
                });
                self.write(self.writes.len() - 1, net);
            }
            (_, job) if self.writes.is_empty() => {
                if !self.hand_over(Task::Log(job, writer)) {
                    self.fail(NO_THREAD);
                }
            }
            (_, job) => {
                self.writer = Some(writer);
                return Err(job);
            }
        }
        Ok(())
    }

    /// A job of the log has failed: it takes nothing more.
    fn fail(&mut self, why: &str) {
        let why = self.log_failed.get_or_insert_with(|| why.to_owned()).clone();
        self.done.push_back(Done::Failed { log: true, why });
    }

    /// Has the ring write what is left of a write.
    fn write(&mut self, at: usize, net: &mut Net) {
        let file = self.writer.as_ref().and_then(|writer| writer.file().descriptor());
        let Writing {
            write, written, answer, ..
        } = &mut self.writes[at];
        let Some(file) = file else {
            *answer = Some(Err(ErrorKind::Unsupported.into()));
            return;
        };
        let (bytes, offset) = (&write.bytes()[*written..], write.offset() + *written as u64);
        // SAFETY: the bytes are in a buffer that `writes` has until the ring has answered, and nobody changes; the file is open, because
        // the writer takes another one only in the thread, which gets it when no write is under way.
        unsafe { net.write(file, bytes, offset, self.first_write.wrapping_add(at as u32)) };
    }

    /// The ring has answered.
    fn wrote(&mut self, number: u32, result: i32, net: &mut Net) {
        let at = number.wrapping_sub(self.first_write) as usize;
        let (Some(writing), Some(writer)) = (self.writes.get_mut(at), &self.writer) else {
            return;
        };
        let left = &writing.write.bytes()[writing.written..];
        let error = match result {
            1.. if result as usize >= left.len() => {
                writing.answer = Some(Ok(()));
                return;
            }
            1.. => {
                writing.written += result as usize;
                return self.write(at, net);
            }
            0 => Error::from(ErrorKind::WriteZero),
            _ if matches!(-result, libc::EINTR | libc::EAGAIN) => return self.write(at, net),
            _ => Error::from_raw_os_error(-result),
        };
        if is_refusal(&error) {
            // This once the core waits itself; the thread finds out what the file system will do.
            self.by_ring = false;
            let offset = writing.write.offset() + writing.written as u64;
            let file = writer.file();
            writing.answer = Some(file.write_at(offset, left).and_then(|()| file.sync()));
        } else {
            writing.answer = Some(Err(error));
        }
    }
}

impl Drop for Filer {
    fn drop(&mut self) {
        self.tasks = None;
        if let Some(thread) = self.thread.take() {
            // It panicked: then the process has ended.
            let _ = thread.join();
        }
        // The system may still read them.
        std::mem::forget(std::mem::take(&mut self.writes));
    }
}

const NO_THREAD: &str = "the thread for files does not take a job";

/// Does tasks until nobody can send any more and none waits.
fn work(mut keeper: Keeper, to_do: &Receiver<Task>, tell: &SyncSender<Answer>, bell: &dyn Fn()) {
    let mut prepares = true;
    loop {
        let task = match to_do.try_recv() {
            Ok(task) => task,
            Err(TryRecvError::Disconnected) => return,
            Err(TryRecvError::Empty) if prepares => {
                prepares = keeper.idle();
                continue;
            }
            Err(TryRecvError::Empty) => match to_do.recv() {
                Ok(task) => task,
                Err(_) => return,
            },
        };
        prepares = true;
        let answer = match task {
            Task::NeedNext => {
                keeper.need_next();
                continue;
            }
            Task::Image(job) => (keeper.run(job), None),
            Task::Log(job, writer) => {
                keeper.give_back(writer);
                let done = keeper.run(job);
                (done, keeper.lend())
            }
        };
        // Nobody is left to be told when the server ends; the job was done all the same.
        let _ = tell.try_send(answer);
        bell();
    }
}

#[cfg(test)]
mod tests {
    use super::super::disk::Folder;
    use super::super::net::new_eventfd;
    use super::*;
    use crate::data_dir::{DataDir, SEGMENT_BYTES, Wanted};
    use crate::wal::{Durability, Log};
    use std::sync::Arc;

    fn net() -> Net {
        Net::new(vec![], new_eventfd().unwrap(), 1).unwrap()
    }

    fn open(folder: &tempfile::TempDir) -> DataDir {
        let wanted = Wanted {
            name: folder.path().display().to_string(),
            partitioner: None,
            boundaries: vec![],
            shards: None,
            seed: None,
            random: [1, 2],
            segment_bytes: SEGMENT_BYTES,
            salvage: false,
        };
        DataDir::open(Arc::new(Folder::take(folder.path()).unwrap()), wanted).unwrap()
    }

    fn begin(folder: &tempfile::TempDir) -> Filer {
        let mut dir = open(folder);
        dir.begin_generation(&dir.table(1).unwrap(), Durability::Always)
            .unwrap();
        Filer::start(
            0,
            dir.keeper(0).unwrap(),
            host::allowed_cpus().unwrap(),
            Box::new(|| {}),
        )
        .unwrap()
    }

    fn job(log: &mut Log, key: &[u8], sync: bool, ends: bool) -> Job {
        log.delete(key);
        Job::Log {
            chunks: log.take(Default::default()),
            sync,
            ends,
        }
    }

    fn next(filer: &mut Filer, net: &mut Net) -> Done {
        loop {
            net.collect_written();
            if let Some(done) = filer.poll(net) {
                return done;
            }
        }
    }

    /// Waits for what the system says of so many writes, and keeps it back.
    fn hush(net: &mut Net, writes: usize) {
        let mut answers = 0;
        while answers < writes {
            net.collect_written();
            answers += std::iter::from_fn(|| net.next_written()).count();
        }
    }

    fn keys(folder: &tempfile::TempDir) -> Vec<Vec<u8>> {
        let dir = open(folder);
        assert_eq!(dir.warnings(), &[] as &[String]);
        let mut keys = vec![];
        let mut restorer = dir.restorer(0..64, dir.table(1).unwrap());
        while restorer
            .step(&mut |restored| {
                if let crate::effect::Effect::Delete(key) = restored.effect {
                    keys.push(key.to_vec());
                }
                Ok(())
            })
            .unwrap()
        {}
        keys
    }

    /// By the ring and by the thread in turn, and too much for one segment: it is all there, in order.
    #[test]
    fn what_is_written_in_either_way_is_one_log() {
        let folder = tempfile::tempdir().unwrap();
        let (mut filer, mut net) = (begin(&folder), net());
        let mut log = Log::new(1);
        let mut wanted = vec![];
        let count = 900;
        for number in 0..count {
            // Half of them are safe at once, and some do not fit into a frame of the log.
            let mut key = number.to_string().into_bytes();
            key.resize(if number % 100 == 99 { 60_000 } else { 3000 }, b'-');
            for _ in 0..if number % 100 == 99 { 40 } else { 1 } {
                wanted.push(key.clone());
                log.delete(&key);
            }
            key.push(b'.');
            wanted.push(key.clone());
            filer.submit(job(&mut log, &key, number % 7 < 4, number == count - 1), &mut net);
            if number % 3 == 0 {
                let done = next(&mut filer, &mut net);
                assert!(matches!(done, Done::Logged { .. }), "{done:?}");
            }
        }
        while filer.pending() > 0 {
            let done = next(&mut filer, &mut net);
            assert!(matches!(done, Done::Logged { .. }), "{done:?}");
        }
        assert!(filer.by_ring, "this file system takes writes of the ring");
        assert!(filer.first_write > 100 && filer.first_write < 900, "both were used");
        drop(filer);
        assert!(keys(&folder) == wanted);
        assert!(std::fs::read_dir(folder.path().join("log")).unwrap().count() > 1);
    }

    /// What the system says of a write that failed is told of it and of all that follow.
    #[test]
    fn a_write_that_fails_is_the_last() {
        let folder = tempfile::tempdir().unwrap();
        let (mut filer, mut net) = (begin(&folder), net());
        let mut log = Log::new(1);
        filer.submit(job(&mut log, b"one", true, false), &mut net);
        assert!(matches!(next(&mut filer, &mut net), Done::Logged { synced: true, .. }));
        filer.submit(job(&mut log, b"two", true, false), &mut net);
        hush(&mut net, 1);
        let number = filer.first_write;
        filer.wrote(number, -libc::EIO, &mut net);
        filer.submit(job(&mut log, b"three", true, false), &mut net);
        for _ in 0..2 {
            let Done::Failed { log: true, why } = next(&mut filer, &mut net) else {
                panic!("it failed");
            };
            assert!(why.contains("00000001-0000-00000000.log: Input/output error"), "{why}");
        }
        assert_eq!(filer.pending(), 0);
    }

    /// Of two writes that are under way the first is told first, whichever is done first; and nothing counts behind one that failed.
    #[test]
    fn two_writes_are_told_in_order() {
        let eio = -libc::EIO;
        for (answers, told) in [
            ([(1, 4096), (0, 4096)], [true, true]),
            ([(1, 4096), (0, eio)], [false, false]),
            ([(0, eio), (1, 4096)], [false, false]),
            ([(1, eio), (0, 4096)], [true, false]),
            ([(1, -libc::EINVAL), (0, -libc::EINVAL)], [true, true]),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let (mut filer, mut net) = (begin(&folder), net());
            let mut log = Log::new(1);
            for key in [b"one", b"two"] {
                filer.submit(job(&mut log, key, true, false), &mut net);
            }
            hush(&mut net, 2);
            for (number, (write, answer)) in answers.into_iter().enumerate() {
                filer.wrote(write, answer, &mut net);
                assert!(number == 1 || write == 0 || filer.poll(&mut net).is_none());
            }
            for is_safe in told {
                let done = next(&mut filer, &mut net);
                assert_eq!(matches!(done, Done::Logged { synced: true, .. }), is_safe, "{done:?}");
                assert_eq!(matches!(done, Done::Failed { log: true, .. }), !is_safe, "{done:?}");
            }
            filer.submit(job(&mut log, b"end", true, true), &mut net);
            let goes_on = told == [true; 2];
            assert_eq!(
                matches!(next(&mut filer, &mut net), Done::Logged { synced: true, .. }),
                goes_on
            );
            drop(filer);
            if goes_on {
                assert_eq!(keys(&folder), [b"one", b"two", b"end"]);
            }
        }
    }

    /// A write of which a part was done goes on where that ended, and one that a signal came upon is tried again.
    #[test]
    fn a_write_is_finished() {
        let folder = tempfile::tempdir().unwrap();
        let (mut filer, mut net) = (begin(&folder), net());
        let mut log = Log::new(1);
        filer.submit(job(&mut log, &[b'-'; 10_000], true, true), &mut net);
        for answer in [-libc::EINTR, 4096, 4096, -libc::EAGAIN] {
            hush(&mut net, 1);
            filer.wrote(0, answer, &mut net);
            assert!(filer.poll(&mut net).is_none());
        }
        hush(&mut net, 1);
        filer.wrote(0, 4096, &mut net);
        assert!(matches!(next(&mut filer, &mut net), Done::Logged { synced: true, .. }));
        drop(filer);
        assert_eq!(keys(&folder), [[b'-'; 10_000]]);
    }

    /// Where the file system refuses what the ring does, the log goes on without it.
    #[test]
    fn a_refusal_is_not_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let (mut filer, mut net) = (begin(&folder), net());
        let mut log = Log::new(1);
        filer.submit(job(&mut log, b"one", true, false), &mut net);
        hush(&mut net, 1);
        filer.wrote(0, -libc::EINVAL, &mut net);
        filer.submit(job(&mut log, b"two", true, true), &mut net);
        for _ in 0..2 {
            assert!(matches!(next(&mut filer, &mut net), Done::Logged { synced: true, .. }));
        }
        drop(filer);
        assert_eq!(keys(&folder), [b"one", b"two"]);
    }
}
