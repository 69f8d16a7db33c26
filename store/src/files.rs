//! Files beside the database: written durably, replaced in one move.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Operations on files, with the guarantees that the store builds on. [`Disk`] is the real one; tests put a simulated
/// one in its place, which loses what was not synced.
pub trait Files: Send + Sync {
    /// The whole content of a file.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;
    /// Creates or replaces a file and syncs its content. Its name is durable after [`Files::sync_directory`].
    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()>;
    /// Creates or replaces a file that need not survive a power loss.
    fn write_lazily(&self, path: &Path, bytes: &[u8]) -> io::Result<()>;
    /// Opens a file to append to, which is created unless it exists.
    fn append(&self, path: &Path) -> io::Result<Box<dyn Append>>;
    /// Creates or empties a file to append to.
    fn create(&self, path: &Path) -> io::Result<Box<dyn Append>>;
    /// Opens a small file that is written again and again, which is created unless it exists.
    fn slot(&self, path: &Path) -> io::Result<Box<dyn Slot>>;
    /// Gives a file another name in the same directory, replacing a file of that name.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Deletes a file.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Makes the names of a directory's files durable.
    fn sync_directory(&self, path: &Path) -> io::Result<()>;
    /// Names of the files in a directory, sorted.
    fn list(&self, path: &Path) -> io::Result<Vec<String>>;
    /// Creates a directory and those above it, unless they exist. The names of new ones are durable.
    fn create_directory(&self, path: &Path) -> io::Result<()>;
}

/// A file that is appended to.
pub trait Append: Send {
    /// Appends bytes. After an error some of them may be there.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Makes durable what was appended.
    fn sync(&mut self) -> io::Result<()>;
    /// Cuts the file off after `len` bytes, durably.
    fn truncate(&mut self, len: u64) -> io::Result<()>;
}

/// A small file that is written again and again, in place and not synced.
pub trait Slot: Send {
    /// Writes the whole content, which always has the same length.
    fn write(&self, bytes: &[u8]) -> io::Result<()>;
}

impl Slot for File {
    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        self.write_all_at(bytes, 0)
    }
}

impl Append for File {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_all(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_data()
    }

    fn truncate(&mut self, len: u64) -> io::Result<()> {
        self.set_len(len)?;
        self.sync_data()
    }
}

/// The file system.
#[derive(Debug, Clone, Copy, Default)]
pub struct Disk;

impl Files for Disk {
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        fs::read(path)
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    }

    fn write_lazily(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        fs::write(path, bytes)
    }

    fn append(&self, path: &Path) -> io::Result<Box<dyn Append>> {
        Ok(Box::new(File::options().create(true).append(true).open(path)?))
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn Append>> {
        Ok(Box::new(File::create(path)?))
    }

    fn slot(&self, path: &Path) -> io::Result<Box<dyn Slot>> {
        Ok(Box::new(File::options().create(true).truncate(false).write(true).open(path)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn sync_directory(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(path)? {
            // The store makes no other names.
            names.extend(entry?.file_name().into_string().ok());
        }
        names.sort();
        Ok(names)
    }

    fn create_directory(&self, path: &Path) -> io::Result<()> {
        if path.is_dir() {
            return Ok(());
        }
        let above = directory_of(path);
        self.create_directory(above)?;
        match fs::create_dir(path) {
            // Somebody else was faster.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
            created => created.and_then(|()| self.sync_directory(above)),
        }
    }
}

/// The directory that a path is in.
fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|above| !above.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Ending of the name under which a file is written before it is moved into place.
pub(crate) const TEMPORARY: &str = ".tmp";

/// The name under which what replaces `path` is written.
pub fn beside(path: &Path) -> PathBuf {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(TEMPORARY);
    temporary.into()
}

/// Writes a file beside `path`, syncs it and moves it there: a reader, and a crash, find the old content or the new one.
/// The move is durable after [`Files::sync_directory`].
///
/// # Errors
///
/// Those of the system; the old content is there still.
pub fn replace(files: &dyn Files, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = beside(path);
    let written = files.write(&temporary, bytes).and_then(|()| files.rename(&temporary, path));
    if written.is_err() {
        let _ = files.remove(&temporary); // frees the space; the error of the write is returned
    }
    written
}

/// As [`replace`]; when it returns, the new content survives a power loss.
///
/// # Errors
///
/// As [`replace`].
pub fn replace_durably(files: &dyn Files, path: &Path, bytes: &[u8]) -> io::Result<()> {
    replace(files, path, bytes)?;
    files.sync_directory(directory_of(path))
}

/// Puts a directory that was written beside `path` in its place, durably, with all that is in it. A reader, and a crash, find
/// the old directory, none, or the new one whole.
///
/// # Errors
///
/// Those of the system.
pub fn replace_directory(written: &Path, path: &Path) -> io::Result<()> {
    sync_all(written)?;
    if path.exists() {
        fs::remove_dir_all(path)?;
    }
    fs::rename(written, path)?;
    Disk.sync_directory(directory_of(path))
}

/// Makes a directory and what is in it durable.
fn sync_all(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() { sync_all(&path) } else { File::open(&path)?.sync_all() }?;
    }
    Disk.sync_directory(directory)
}
