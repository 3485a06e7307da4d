//! The directory of a run: the processes' logs and the list of workers.
//!
//! A temporary one goes when the run ends. What an `up` that was killed left behind goes when the next one starts: each run
//! holds a lock on a file in its directory, which the system takes back however a process dies.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use anyhow::Context;
use tempfile::TempDir;

const PREFIX: &str = "hadal-up-";
const LOCK: &str = "lock";

/// A directory that exists.
#[derive(Debug)]
pub(super) enum Folder {
    /// Chosen by a person, who keeps it.
    Chosen(PathBuf),
    /// Removed when it is closed or dropped, unless it is to be kept.
    Temporary {
        folder: TempDir,
        kept: bool,
        /// Held for as long as the run.
        _lock: File,
    },
}

impl Folder {
    /// Makes the directory that was asked for, or a temporary one.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(super) fn open(chosen: Option<&Path>) -> anyhow::Result<Self> {
        if let Some(path) = chosen {
            fs::create_dir_all(path).with_context(|| format!("making {}", path.display()))?;
            return Ok(Self::Chosen(path.to_owned()));
        }
        let base = std::env::temp_dir();
        Self::temporary(&base).with_context(|| format!("making a directory in {}", base.display()))
    }

    fn temporary(base: &Path) -> io::Result<Self> {
        let folder = tempfile::Builder::new().prefix(PREFIX).tempdir_in(base)?;
        remove_left_behind(base, fs::metadata(folder.path())?.uid());
        // Under its name only once it is locked: nobody can find it in between.
        let new = folder.path().join("lock.new");
        let lock = File::create(&new)?;
        lock.lock()?;
        fs::rename(new, folder.path().join(LOCK))?;
        Ok(Self::Temporary {
            folder,
            kept: false,
            _lock: lock,
        })
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        match self {
            Self::Chosen(path) => path,
            Self::Temporary { folder, .. } => folder.path(),
        }
    }

    /// Leaves it to be read after this run, until another one starts.
    pub(super) fn keep(&mut self) {
        if let Self::Temporary { folder, kept, .. } = self {
            folder.disable_cleanup(true);
            *kept = true;
        }
    }

    /// Removes it, if it is temporary.
    ///
    /// # Errors
    /// When that fails.
    pub(super) fn close(self) -> anyhow::Result<()> {
        let Self::Temporary {
            folder,
            kept: false,
            ..
        } = self
        else {
            return Ok(());
        };
        let path = folder.path().to_owned();
        folder
            .close()
            .with_context(|| format!("removing {}", path.display()))
    }
}

/// Removes the directories of this user's runs that nobody holds any more. One that cannot be removed is left for another
/// time.
fn remove_left_behind(base: &Path, user: u32) {
    let entries = fs::read_dir(base).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(PREFIX)) {
        let path = entry.path();
        let is_ours = fs::symlink_metadata(&path).is_ok_and(|it| it.is_dir() && it.uid() == user);
        // Without a lock in it, it is not of our making, or just being made.
        if is_ours && File::open(path.join(LOCK)).is_ok_and(|lock| lock.try_lock().is_ok()) {
            let _ = fs::remove_dir_all(&path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(base: &Path) -> usize {
        fs::read_dir(base).unwrap().count()
    }

    #[test]
    fn a_temporary_directory_goes_at_the_end_of_its_run() {
        let base = tempfile::tempdir().unwrap();
        drop(Folder::temporary(base.path()).unwrap());
        Folder::temporary(base.path()).unwrap().close().unwrap();
        assert_eq!(names(base.path()), 0);
    }

    #[test]
    fn what_a_killed_run_left_goes_when_the_next_one_starts_and_what_still_runs_stays() {
        let base = tempfile::tempdir().unwrap();
        let running = Folder::temporary(base.path()).unwrap();
        let mut killed = Folder::temporary(base.path()).unwrap();
        let left = killed.path().to_owned();
        fs::write(left.join("router.log"), "its last words").unwrap();
        killed.keep();
        killed.close().unwrap();
        assert!(left.exists(), "kept until another run starts");

        let next = Folder::temporary(base.path()).unwrap();
        assert!(!left.exists());
        assert!(running.path().exists() && next.path().exists());
    }

    #[test]
    fn directories_of_others_are_not_touched() {
        let base = tempfile::tempdir().unwrap();
        let (target, link) = (base.path().join("target"), base.path().join("hadal-up-l"));
        for folder in [base.path().join("hadal-up-1"), target.clone()] {
            fs::create_dir(&folder).unwrap();
            fs::write(folder.join("something"), "of somebody's").unwrap();
        }
        fs::write(target.join(LOCK), "").unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        remove_left_behind(base.path(), fs::metadata(base.path()).unwrap().uid());
        assert_eq!(names(base.path()), 3);
        assert_eq!(names(&target), 2);
        fs::remove_file(&link).unwrap();
        fs::rename(&target, base.path().join("hadal-up-2")).unwrap();
        let another = fs::metadata(base.path()).unwrap().uid() + 1;
        remove_left_behind(base.path(), another);
        assert_eq!(names(base.path()), 2, "another user's");
    }
}
