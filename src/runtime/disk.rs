//! The folder of a data directory.

use super::StartError;
use crate::disk::{Disk, File};
use std::fs::{File as StdFile, OpenOptions, TryLockError};
use std::io::{Error, ErrorKind, Read, Result, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A folder of the file system.
#[derive(Debug)]
pub struct Folder {
    root: PathBuf,
    /// Nobody else has the folder as long as this is open; nothing when it is only read.
    _lock: Option<StdFile>,
}

impl Folder {
    /// Takes a folder for this process alone, and makes it unless it is there.
    ///
    /// # Errors
    /// When it is no folder, may not be written, or another process has it.
    pub fn take(root: &Path) -> std::result::Result<Self, StartError> {
        let named =
            |what: &str, error: &Error| StartError(format!("cannot {what} {}: {}", root.display(), told(error)));
        let is_new = !root.exists();
        if !is_new && !root.is_dir() {
            let root = root.display();
            return Err(StartError(format!(
                "{root} is not a directory: name one for --data-dir, or a place for a new one"
            )));
        }
        std::fs::create_dir_all(root).map_err(|error| named("make the data directory", &error))?;
        if is_new && let Some(parent) = root.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            let synced = StdFile::open(parent).and_then(|parent| parent.sync_all());
            synced.map_err(|error| named("make safe the data directory", &error))?;
        }
        std::fs::read_dir(root).map_err(|error| named("read the data directory", &error))?;
        let path = root.join("LOCK");
        let options = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path);
        let mut lock = options.map_err(|error| named("write to the data directory", &error))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                // Whoever has it may not have written it yet.
                let _ = lock.read_to_string(&mut holder);
                let holder = holder.trim();
                let who = if holder.is_empty() { "another process" } else { holder };
                let root = root.display();
                return Err(StartError(format!(
                    "the data directory {root} is in use by {who}: stop that server, or use another directory"
                )));
            }
            Err(TryLockError::Error(error)) => return Err(named("lock the data directory", &error)),
        }
        let written = lock
            .set_len(0)
            .and_then(|()| writeln!(lock, "process {}", std::process::id()));
        written.map_err(|error| named("write to the data directory", &error))?;
        Ok(Self {
            root: root.to_owned(),
            _lock: Some(lock),
        })
    }

    /// A folder that is only read, also while a server has it.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn look_at(root: &Path) -> std::result::Result<Self, StartError> {
        let read = std::fs::read_dir(root);
        read.map_err(|error| StartError(format!("cannot read {}: {}", root.display(), told(&error))))?;
        Ok(Self {
            root: root.to_owned(),
            _lock: None,
        })
    }
}

/// Describes a data directory, line by line, with every record where that is wanted; returns how often something is damaged.
///
/// # Errors
/// When it is none, or cannot be read.
pub fn inspect(root: &Path, records: bool, line: &mut dyn FnMut(&str)) -> std::result::Result<usize, StartError> {
    let disk: Arc<dyn Disk> = Arc::new(Folder::look_at(root)?);
    let found = crate::data_dir::describe(&disk, &root.display().to_string(), records, line);
    found.map_err(|problem| StartError(problem.to_string()))
}

/// The system's words, and what is behind them.
fn told(error: &Error) -> String {
    match error.kind() {
        ErrorKind::PermissionDenied => {
            // SAFETY: `geteuid` only returns a number.
            let user = unsafe { libc::geteuid() };
            format!(
                "{error}: this process runs as user {user}; have that user own the directory and everything in it, or start as \
                 the user that owns it"
            )
        }
        ErrorKind::NotADirectory => format!("{error}: name a directory"),
        ErrorKind::ReadOnlyFilesystem => format!("{error}: mount it for writing"),
        _ => error.to_string(),
    }
}

impl Disk for Folder {
    fn list(&self, folder: &str) -> Result<Vec<String>> {
        let entries = match std::fs::read_dir(self.root.join(folder)) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(vec![]),
            Err(error) => return Err(with_words(error)),
        };
        let mut names = vec![];
        for entry in entries {
            let entry = entry?;
            // Names that are no text are nobody's here.
            if entry.file_type()?.is_file()
                && let Ok(name) = entry.file_name().into_string()
            {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn make_folder(&self, folder: &str) -> Result<()> {
        match std::fs::create_dir(self.root.join(folder)) {
            Ok(()) => self.sync_dir(""),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(with_words(error)),
        }
    }

    fn open(&self, path: &str) -> Result<Box<dyn File>> {
        let file = StdFile::open(self.root.join(path)).map_err(with_words)?;
        Ok(Box::new(RealFile(file)))
    }

    fn create(&self, path: &str) -> Result<Box<dyn File>> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true);
        let file = options.open(self.root.join(path)).map_err(with_words)?;
        Ok(Box::new(RealFile(file)))
    }

    fn open_blocks(&self, path: &str) -> Result<Box<dyn File>> {
        let path = self.root.join(path);
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let direct = options.clone().custom_flags(libc::O_DIRECT).open(&path);
        let file = match direct {
            Err(error) if is_refusal(&error) => options.open(&path),
            other => other,
        };
        Ok(Box::new(RealFile(file.map_err(with_words)?)))
    }

    fn rename(&self, from: &str, to: &str) -> Result<()> {
        std::fs::rename(self.root.join(from), self.root.join(to)).map_err(with_words)
    }

    fn remove(&self, path: &str) -> Result<()> {
        std::fs::remove_file(self.root.join(path)).map_err(with_words)
    }

    fn sync_dir(&self, folder: &str) -> Result<()> {
        StdFile::open(self.root.join(folder))?.sync_all()
    }
}

/// The same error, with words that help where there are any.
fn with_words(error: Error) -> Error {
    match error.kind() {
        ErrorKind::PermissionDenied | ErrorKind::NotADirectory | ErrorKind::ReadOnlyFilesystem => {
            Error::new(error.kind(), told(&error))
        }
        _ => error,
    }
}

/// The file system does not do direct I/O, or not like this.
pub(super) fn is_refusal(error: &Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP))
}

struct RealFile(StdFile);

impl RealFile {
    /// Has the file go through the cache from now on; false when it does already.
    fn leave_direct(&self) -> Result<bool> {
        let fd = self.0.as_raw_fd();
        // SAFETY: reading the flags of a descriptor that is open as long as `self.0` is.
        let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
        if flags < 0 {
            return Err(Error::last_os_error());
        }
        if flags & libc::O_DIRECT == 0 {
            return Ok(false);
        }
        // SAFETY: setting flags of the same descriptor; nobody else relies on how it writes.
        match unsafe { libc::fcntl(fd, libc::F_SETFL, flags & !libc::O_DIRECT) } {
            0 => Ok(true),
            _ => Err(Error::last_os_error()),
        }
    }
}

impl File for RealFile {
    fn len(&self) -> Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        loop {
            match self.0.read_at(buffer, offset) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if is_refusal(&error) && self.leave_direct()? => {}
                other => return other,
            }
        }
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        match self.0.write_all_at(bytes, offset) {
            Err(error) if is_refusal(&error) && self.leave_direct()? => self.0.write_all_at(bytes, offset),
            other => other,
        }
    }

    fn allocate(&self, bytes: u64) -> Result<()> {
        let length = libc::off_t::try_from(bytes).map_err(|_| Error::from(ErrorKind::FileTooLarge))?;
        // SAFETY: the descriptor is open as long as `self.0` is, and the call touches no memory of ours.
        match unsafe { libc::fallocate(self.0.as_raw_fd(), 0, 0, length) } {
            0 => Ok(()),
            _ => match Error::last_os_error() {
                // The file is as long then, without room set aside.
                error if is_refusal(&error) || error.raw_os_error() == Some(libc::ENOSYS) => {
                    self.0.set_len(self.len()?.max(bytes))
                }
                error => Err(error),
            },
        }
    }

    fn sync(&self) -> Result<()> {
        self.0.sync_data()
    }

    fn descriptor(&self) -> Option<i32> {
        Some(self.0.as_raw_fd())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{BLOCK_BYTES, Block};

    #[test]
    fn files_are_written_read_and_named() {
        let folder = tempfile::tempdir().unwrap();
        let disk = Folder::take(&folder.path().join("new")).unwrap();
        disk.make_folder("log").unwrap();
        disk.make_folder("log").unwrap();
        assert_eq!(disk.list("nothing").unwrap(), Vec::<String>::new());
        let file = disk.create("log/a").unwrap();
        file.allocate(10_000).unwrap();
        assert_eq!(file.len().unwrap(), 10_000);
        drop(file);
        let blocks = disk.open_blocks("log/a").unwrap();
        let block = [Block([7; BLOCK_BYTES])];
        blocks.write_at(4096, bytemuck::cast_slice(&block)).unwrap();
        blocks.sync().unwrap();
        // Not aligned, so not for direct I/O.
        let mut bytes = [1; 100];
        assert_eq!(blocks.read_at(4090, &mut bytes).unwrap(), 100);
        assert_eq!((bytes[5], bytes[6]), (0, 7));
        disk.rename("log/a", "log/b").unwrap();
        disk.sync_dir("log").unwrap();
        assert_eq!(disk.list("log").unwrap(), ["b"]);
        disk.remove("log/b").unwrap();
        assert_eq!(
            disk.open("log/b").err().map(|error| error.kind()),
            Some(ErrorKind::NotFound)
        );
    }

    #[test]
    fn a_folder_has_one_server() {
        let folder = tempfile::tempdir().unwrap();
        let first = Folder::take(folder.path()).unwrap();
        let second = Folder::take(folder.path()).unwrap_err().to_string();
        assert!(
            second.contains(&format!("in use by process {}", std::process::id())),
            "{second}"
        );
        assert!(Folder::look_at(folder.path()).is_ok());
        drop(first);
        assert!(Folder::take(folder.path()).is_ok());
        let file = folder.path().join("file");
        std::fs::write(&file, b"").unwrap();
        let error = Folder::take(&file).unwrap_err().to_string();
        assert!(error.contains(&file.display().to_string()), "{error}");
    }
}
