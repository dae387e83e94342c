//! Removes what killed processes left in the state folder: drafts, sockets, sandboxes half-made.
//!
//! Whether somebody is still at work is asked of the kernel, by locks, and never guessed from
//! ages or process ids.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::Path;

use rustix::fs::FlockOperation;

use super::{Home, SandboxDir, short_hash, tree};

/// What names of drafts begin with, each in the folder where it is put together.
pub(super) const DRAFT: &str = ".draft-";

/// Lock file of a folder in which drafts are put together.
const GUARD: &str = ".drafts.lock";

/// Announces that a draft is being put together in `folder`, until the file is closed.
pub(crate) fn drafting(folder: &Path) -> io::Result<File> {
    let guard = guard(folder)?;
    rustix::fs::flock(&guard, FlockOperation::LockShared)?;
    Ok(guard)
}

/// Removes the drafts in `folder`, unless somebody is working there now.
pub(crate) fn remove_drafts(folder: &Path) {
    if names(folder).any(|name| name.starts_with(DRAFT))
        && let Some(_quiet) = quiet(folder)
    {
        remove_all(folder, DRAFT);
    }
}

/// Keeps drafts from being begun in `folder`, if nobody is putting one together now.
fn quiet(folder: &Path) -> Option<File> {
    let guard = guard(folder).ok()?;
    rustix::fs::flock(&guard, FlockOperation::NonBlockingLockExclusive).ok()?;
    Some(guard)
}

fn guard(folder: &Path) -> io::Result<File> {
    File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(folder.join(GUARD))
}

fn names(folder: &Path) -> impl Iterator<Item = String> + use<> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok())
}

/// Removes what lies in `folder` under a name with this prefix. What cannot be removed now is
/// found by the next sweep.
fn remove_all(folder: &Path, prefix: &str) {
    for name in names(folder).filter(|name| name.starts_with(prefix)) {
        let path = folder.join(name);
        let _ = tree::remove_path(&path);
    }
}

impl Home {
    /// Removes what sandboxes left behind whose maker or supervisor was killed.
    pub(crate) fn sweep(&self) {
        let sandboxes = self.list_sandboxes().unwrap_or_default();
        for dir in &sandboxes {
            self.sweep_sandbox(dir);
        }
        // These have no other name any more, so that nobody waits for them.
        remove_all(&self.sandboxes(), ".rm-");
        let folder = self.sandboxes();
        let run = self.run();
        let drafts = names(&folder).any(|name| name.starts_with(".new-"));
        let known = |home: &Self| -> BTreeSet<String> {
            let sandboxes = home.list_sandboxes().unwrap_or_default();
            sandboxes
                .iter()
                .map(|dir| short_hash(dir.name().as_str().as_bytes()))
                .collect()
        };
        let seen = known(self);
        if !drafts && names(&run).all(|name| seen.contains(&name)) {
            return;
        }
        if let Some(_quiet) = quiet(&folder) {
            remove_all(&folder, ".new-");
            // Looked up again, now that no sandbox can be made.
            let known = known(self);
            for name in names(&run).filter(|name| !known.contains(name)) {
                let _ = fs::remove_dir_all(run.join(name));
            }
        }
    }

    fn sweep_sandbox(&self, dir: &SandboxDir) {
        // Whoever makes it is about to start it.
        if dir.is_being_made() {
            return;
        }
        let doomed = dir.is_provisional() || dir.spec().is_ok_and(|spec| spec.ephemeral);
        let sockets = self.socket_dir(dir.name());
        let drafts = || names(dir.path()).any(|name| name.starts_with(DRAFT));
        if !doomed && !sockets.exists() && !drafts() {
            return;
        }
        let Ok(Some(lock)) = dir.try_lock() else {
            return;
        };
        sockets.remove();
        remove_all(dir.path(), DRAFT);
        if doomed {
            let _ = dir.remove_locked(&lock);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Sandbox;

    fn home() -> (tempfile::TempDir, Home) {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path().join("home")).unwrap();
        (dir, home)
    }

    fn spec() -> crate::spec::SandboxSpec {
        Sandbox::builder("box").image("./x").build().unwrap()
    }

    #[test]
    fn a_sandbox_is_kept_while_it_is_made_and_once_it_has_run() {
        let (_dir, home) = home();
        let (dir, making) = home.create_sandbox(&spec()).unwrap();
        home.sweep();
        assert!(dir.path().exists(), "its maker still holds it");
        dir.commit().unwrap();
        drop(making);
        home.sweep();
        assert!(dir.path().exists(), "it has run");
    }

    #[test]
    fn what_was_half_made_goes() {
        let (_dir, home) = home();
        let (dir, making) = home.create_sandbox(&spec()).unwrap();
        drop(making);
        let sockets = home.socket_dir(dir.name());
        sockets.create().unwrap();
        fs::create_dir(home.sandboxes().join(".new-x")).unwrap();
        fs::create_dir(home.sandboxes().join(".rm-1-x")).unwrap();
        fs::create_dir(home.run().join("00000000")).unwrap();
        home.sweep();
        assert_eq!(names(&home.sandboxes()).collect::<Vec<_>>(), [GUARD]);
        assert_eq!(names(&home.run()).count(), 0);
    }

    #[test]
    fn drafts_stay_while_somebody_works_on_them() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(".draft-x"), "").unwrap();
        let working = drafting(dir.path()).unwrap();
        remove_drafts(dir.path());
        assert!(dir.path().join(".draft-x").exists());
        drop(working);
        remove_drafts(dir.path());
        assert!(!dir.path().join(".draft-x").exists());
    }

    #[test]
    fn a_sandbox_that_is_locked_is_left_alone() {
        let (_dir, home) = home();
        let (dir, making) = home.create_sandbox(&spec()).unwrap();
        let lock = dir.try_lock().unwrap().unwrap();
        drop(making);
        home.socket_dir(dir.name()).create().unwrap();
        home.sweep();
        assert!(dir.path().exists() && home.socket_dir(dir.name()).exists());
        drop(lock);
        home.sweep();
        assert!(!dir.path().exists() && !home.socket_dir(dir.name()).exists());
    }
}
