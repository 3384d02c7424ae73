//! The files of a data directory, as far as this program uses files: the seam at which a test puts another disk.
//!
//! All calls wait. They are made while the server starts, and by the thread that each core has for its files. The core's own ring may
//! write past this seam, to the file that [`File::descriptor`] names. What they promise is what a file system promises, and no more:
//! bytes are safe when [`File::sync`] has returned, a name is safe when [`Disk::sync_dir`] has returned after it was given, and what is
//! not safe may be there after a crash, or not, or in part.

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod memory;

use std::io::Result;

/// Where alignment is asked for, offsets, lengths and addresses are multiples of this.
pub const BLOCK_BYTES: usize = 4096;

/// A block of memory that direct I/O can write from.
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(4096))]
pub struct Block(pub [u8; BLOCK_BYTES]);

/// A folder of files. Paths are relative to it, with `/` between a folder and a name.
pub trait Disk: Send + Sync {
    /// The names of the files in a folder, in no order; none when there is no such folder.
    fn list(&self, folder: &str) -> Result<Vec<String>>;

    /// Makes a folder unless it is there, with a safe name.
    fn make_folder(&self, folder: &str) -> Result<()>;

    /// Opens a file for reading.
    fn open(&self, path: &str) -> Result<Box<dyn File>>;

    /// Makes a new file, empty; one that is there is emptied.
    fn create(&self, path: &str) -> Result<Box<dyn File>>;

    /// Opens a file that is to be overwritten block by block, without a cache between where that is possible: every write is of whole
    /// [`Block`]s, at a multiple of their length.
    fn open_blocks(&self, path: &str) -> Result<Box<dyn File>>;

    /// Gives a file another name. One that has that name is replaced.
    fn rename(&self, from: &str, to: &str) -> Result<()>;

    /// Removes a file.
    fn remove(&self, path: &str) -> Result<()>;

    /// Makes the names in a folder safe.
    fn sync_dir(&self, folder: &str) -> Result<()>;
}

/// An open file.
pub trait File: Send {
    /// Its length in bytes.
    fn len(&self) -> Result<u64>;

    /// It has no bytes.
    fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Reads from an offset on; returns how many bytes there were, 0 at the end.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize>;

    /// The first bytes, so many at the most.
    fn read_front(&self, bytes_max: usize) -> Result<Vec<u8>> {
        let length = self.len()?.min(bytes_max as u64);
        let mut front = vec![0; length as usize];
        let mut filled = 0;
        while filled < front.len() {
            match self.read_at(filled as u64, &mut front[filled..])? {
                0 => break,
                count => filled += count,
            }
        }
        front.truncate(filled);
        Ok(front)
    }

    /// Writes all of the bytes at an offset.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()>;

    /// Has the file system set bytes aside, from the start on; the file is at least so long then, and what was not written reads
    /// as zeros.
    fn allocate(&self, bytes: u64) -> Result<()>;

    /// Returns when everything that was written, and the length, is safe.
    fn sync(&self) -> Result<()>;

    /// The number by which the system knows the file, for who has another way to write to it.
    fn descriptor(&self) -> Option<i32> {
        None
    }
}
