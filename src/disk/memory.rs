//! A disk in memory, for tests: no crash loses anything here, but it can be full, and its syncs can fail.

use super::{Disk, File};
use std::collections::BTreeMap;
use std::io::{Error, ErrorKind, Result};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

type Content = Arc<Mutex<Vec<u8>>>;

/// See the module's text. Clones are the same disk.
#[derive(Clone, Debug, Default)]
pub(crate) struct MemoryDisk {
    files: Arc<Mutex<BTreeMap<String, Content>>>,
    faults: Arc<Faults>,
}

#[derive(Debug)]
struct Faults {
    /// Files may be so long together.
    bytes_max: AtomicU64,
    /// So many syncs of files succeed.
    syncs_left: AtomicU64,
    /// So many were asked for.
    syncs: AtomicU64,
    /// So many writes were.
    writes: AtomicU64,
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            bytes_max: AtomicU64::new(u64::MAX),
            syncs_left: AtomicU64::new(u64::MAX),
            syncs: AtomicU64::new(0),
            writes: AtomicU64::new(0),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg_attr(not(test), allow(dead_code, reason = "the faults are for tests"))]
impl MemoryDisk {
    /// From now on files have room for so many bytes, all together.
    pub(crate) fn limit_bytes(&self, bytes: u64) {
        self.faults.bytes_max.store(bytes, Ordering::Relaxed);
    }

    /// After so many more, a sync of a file fails, and so does every later one.
    pub(crate) fn fail_syncs_after(&self, syncs: u64) {
        self.faults.syncs_left.store(syncs, Ordering::Relaxed);
    }

    /// Writes and syncs of files so far.
    pub(crate) fn writes_and_syncs(&self) -> (u64, u64) {
        let Faults { writes, syncs, .. } = &*self.faults;
        (writes.load(Ordering::Relaxed), syncs.load(Ordering::Relaxed))
    }

    /// A copy that has nothing to do with this one any more.
    pub(crate) fn copy(&self) -> Self {
        let copy = Self::default();
        for (path, content) in &*lock(&self.files) {
            copy.put(path, &lock(content));
        }
        copy
    }

    /// All paths.
    pub(crate) fn paths(&self) -> Vec<String> {
        lock(&self.files).keys().cloned().collect()
    }

    /// What a file holds.
    pub(crate) fn get(&self, path: &str) -> Option<Vec<u8>> {
        lock(&self.files).get(path).map(|content| lock(content).clone())
    }

    /// Puts a file there.
    pub(crate) fn put(&self, path: &str, bytes: &[u8]) {
        lock(&self.files).insert(path.to_owned(), Arc::new(Mutex::new(bytes.to_vec())));
    }

    fn find(&self, path: &str) -> Result<Content> {
        let found = lock(&self.files).get(path).cloned();
        found.ok_or_else(|| Error::new(ErrorKind::NotFound, "no such file"))
    }

    fn file(&self, content: Content) -> Box<dyn File> {
        Box::new(MemoryFile {
            content,
            disk: self.clone(),
        })
    }

    /// There is room for so many bytes more.
    fn reserve(&self, more: usize) -> Result<()> {
        let files: Vec<Content> = lock(&self.files).values().cloned().collect();
        let used: usize = files.iter().map(|content| lock(content).len()).sum();
        match (used + more) as u64 > self.faults.bytes_max.load(Ordering::Relaxed) {
            true => Err(Error::new(ErrorKind::StorageFull, "no space left on device")),
            false => Ok(()),
        }
    }
}

impl Disk for MemoryDisk {
    fn list(&self, folder: &str) -> Result<Vec<String>> {
        let paths = self.paths();
        let inside = |path: &String| match path.rsplit_once('/') {
            Some((of, name)) if of == folder => Some(name.to_owned()),
            None if folder.is_empty() => Some(path.clone()),
            _ => None,
        };
        Ok(paths.iter().filter_map(inside).collect())
    }

    fn make_folder(&self, _folder: &str) -> Result<()> {
        Ok(())
    }

    fn open(&self, path: &str) -> Result<Box<dyn File>> {
        Ok(self.file(self.find(path)?))
    }

    fn create(&self, path: &str) -> Result<Box<dyn File>> {
        self.put(path, &[]);
        self.open(path)
    }

    fn open_blocks(&self, path: &str) -> Result<Box<dyn File>> {
        self.open(path)
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        let content = self.find(from)?;
        let mut files = lock(&self.files);
        files.remove(from);
        files.insert(to.to_owned(), content);
        Ok(())
    }

    fn remove(&self, path: &str) -> Result<()> {
        self.find(path)?;
        lock(&self.files).remove(path);
        Ok(())
    }

    fn sync_dir(&self, _folder: &str) -> Result<()> {
        Ok(())
    }
}

struct MemoryFile {
    content: Content,
    disk: MemoryDisk,
}

impl File for MemoryFile {
    fn len(&self) -> Result<u64> {
        Ok(lock(&self.content).len() as u64)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let content = lock(&self.content);
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(content.len());
        let count = buffer.len().min(content.len() - from);
        buffer[..count].copy_from_slice(&content[from..from + count]);
        Ok(count)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.disk.faults.writes.fetch_add(1, Ordering::Relaxed);
        let end = offset as usize + bytes.len();
        self.allocate(end as u64)?;
        lock(&self.content)[offset as usize..end].copy_from_slice(bytes);
        Ok(())
    }

    fn allocate(&self, bytes: u64) -> Result<()> {
        let length = lock(&self.content).len();
        let more = (bytes as usize).saturating_sub(length);
        self.disk.reserve(more)?;
        lock(&self.content).resize(length + more, 0);
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        let Faults { syncs, syncs_left, .. } = &*self.disk.faults;
        syncs.fetch_add(1, Ordering::Relaxed);
        let left = syncs_left.load(Ordering::Relaxed);
        if left == 0 {
            return Err(Error::other("input/output error"));
        }
        if left != u64::MAX {
            syncs_left.store(left - 1, Ordering::Relaxed);
        }
        Ok(())
    }
}
