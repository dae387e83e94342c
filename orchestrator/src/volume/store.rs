//! The store: volumes are made, found and removed whole, whoever is killed at whatever moment.
//!
//! Whatever changes a volume holds its name's lock. A record says what is going on before it goes
//! on: a record that is not `Ready` while nobody holds the lock speaks of a volume whose maker or
//! remover was killed, and whoever meets it next clears it away.

use std::ffi::CString;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::time::SystemTime;

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::disk::make_ext4;
use super::fit::{VolumeProblem, fit};
use super::owned;
use super::record::{
    self, DISK_IMAGE, Phase, QUOTA_ACCOUNTS, Record, folder, record_path, records,
};
use super::users::{VolumeUse, sandboxes_using};
use crate::error::{Error, ErrorKind, MicrosandboxResult};
use crate::plan::{OwnedPlan, VolumePlan};
use crate::rundir::{Home, drafting, make_dir, millis, remove_drafts, sync_dir, tree, write_json};
use crate::spec::{
    Mebibytes, MountSource, NamedVolumeMode, SandboxName, SandboxSpec, VolumeKind, VolumeName,
    VolumeRequest,
};

/// The volumes that were made for a sandbox, so that they can be taken back when it does not start.
#[derive(Debug, Default)]
#[must_use = "roll it back when the sandbox is not made"]
pub struct Prepared {
    made: Vec<Record>,
    owned: Vec<OwnedPlan>,
}

/// The lock of one name, held until it is dropped.
struct NameLock(#[expect(dead_code, reason = "closing it frees the lock")] File);

/// Finds or makes the volumes of a plan, in the order of their names, then those of the sandbox's
/// own.
///
/// # Errors
///
/// Why one of them can neither be used nor made; those made before it are removed again.
pub fn prepare(
    home: &Home,
    sandbox: &SandboxName,
    volumes: &[VolumePlan],
    owned: &[OwnedPlan],
) -> MicrosandboxResult<Prepared> {
    let mut prepared = Prepared::default();
    for volume in volumes {
        let owner = Some(sandbox);
        match ensure(home, &volume.name, volume.mode, &volume.request, owner) {
            Ok((record, true)) => prepared.made.push(record),
            Ok((_, false)) => {}
            Err(error) => {
                prepared.roll_back(home);
                return Err(error);
            }
        }
    }
    for volume in owned {
        match owned::ensure(volume) {
            Ok(true) => prepared.owned.push(volume.clone()),
            Ok(false) => {}
            Err(error) => {
                prepared.take_back(home);
                return Err(error);
            }
        }
    }
    Ok(prepared)
}

impl Prepared {
    /// Names of the volumes that were made.
    pub fn made(&self) -> impl Iterator<Item = &VolumeName> {
        self.made.iter().map(|record| &record.name)
    }

    /// The sandbox runs: what was made for it stays.
    pub fn keep(self, home: &Home) {
        for made in self.made {
            if let Ok(_lock) = lock(home, &made.name) {
                // Should this fail, the next one to meet the volume sees that the sandbox has run.
                let _ = settled(home, &made.name);
            }
        }
    }

    /// Removes what was made for a mount that a running sandbox did not get after all.
    pub(crate) fn take_back(self, home: &Home) {
        self.owned.iter().for_each(owned::take_back);
        for made in self.made {
            let Ok(_lock) = lock(home, &made.name) else {
                continue;
            };
            // What somebody else has found in the meantime is theirs.
            if let Ok(Some(record)) = record::read(home, &made.name)
                && record.made_for.is_some()
                && !holds_files(home, &record)
            {
                // What cannot be removed is found when the sandbox has ended.
                let _ = remove_locked(home, record);
            }
        }
    }

    /// Removes what was made, unless somebody uses it by now. Call it after the sandbox that it
    /// was made for has ended. What is the sandbox's own goes with it.
    pub fn roll_back(self, home: &Home) {
        for made in self.made {
            if let Ok(_lock) = lock(home, &made.name) {
                // What cannot be removed is found by the next one to meet it.
                let _ = settled(home, &made.name);
            }
        }
    }
}

/// Finds a volume or makes it; tells whether it was made.
pub(super) fn ensure(
    home: &Home,
    name: &VolumeName,
    mode: NamedVolumeMode,
    request: &VolumeRequest,
    owner: Option<&SandboxName>,
) -> MicrosandboxResult<(Record, bool)> {
    let _lock = lock(home, name)?;
    let existing = settled(home, name)?;
    let facts = existing.as_ref().map(Record::facts);
    let kind = fit(mode, request, facts.as_ref()).map_err(|problem| problem.into_error(name))?;
    match existing {
        // From now on it belongs to somebody else as well.
        Some(record) if record.made_for.is_some() => Ok((adopt(home, record)?, false)),
        Some(record) => Ok((record, false)),
        None => Ok((make(home, name, kind, request, owner)?, true)),
    }
}

/// The record of a volume that exists.
pub(super) fn find(home: &Home, name: &VolumeName) -> MicrosandboxResult<Record> {
    let record = record::read(home, name)?.filter(|record| record.phase == Phase::Ready);
    record.ok_or_else(|| VolumeProblem::Missing.into_error(name))
}

/// Every volume, newest first. What a killed maker or remover left behind is cleared away.
pub(super) fn list(home: &Home) -> MicrosandboxResult<Vec<Record>> {
    let place = records(home);
    let entries = match fs::read_dir(&place) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => {
            return Err(Error::io(
                format!("cannot read `{}`", place.display()),
                error,
            ));
        }
    };
    let mut found = Vec::new();
    for entry in entries.flatten() {
        let file = entry.file_name();
        let name = file.to_str().and_then(|file| file.strip_suffix(".json"));
        let Some(Ok(name)) = name.map(|name| VolumeName::try_from(name.to_owned())) else {
            continue;
        };
        // One that is removed at this moment is simply not there.
        match record::read(home, &name) {
            Ok(Some(record)) if record.phase == Phase::Ready && record.made_for.is_none() => {
                found.push(record);
            }
            Ok(Some(_)) => {
                if let Ok(Some(_lock)) = try_lock(home, &name) {
                    found.extend(settled(home, &name)?);
                }
            }
            Ok(None) => {}
            Err(error) => return Err(error),
        }
    }
    found.sort_by(|a, b| (b.created_at_ms, &a.name).cmp(&(a.created_at_ms, &b.name)));
    Ok(found)
}

/// Clears away what killed makers and removers left behind.
pub(crate) fn mend(home: &Home) {
    // Every volume is looked at on the way; what cannot be mended now is met again.
    let _ = list(home);
    remove_drafts(&records(home));
}

/// Removes a volume and what it holds.
pub(super) fn remove(home: &Home, name: &VolumeName) -> MicrosandboxResult<()> {
    // No lock file for a name that nobody uses.
    record::read(home, name)?.ok_or_else(|| VolumeProblem::Missing.into_error(name))?;
    let _lock = lock(home, name)?;
    let record = settled(home, name)?.ok_or_else(|| VolumeProblem::Missing.into_error(name))?;
    let users = sandboxes_using(home, name)?;
    let running: Vec<SandboxName> = users
        .into_iter()
        .filter(|user| user.running)
        .map(|user: VolumeUse| user.sandbox)
        .collect();
    if !running.is_empty() {
        let names: Vec<&str> = running.iter().map(SandboxName::as_str).collect();
        let names = names.join(" ");
        let message = format!("volume `{name}` is mounted by running sandboxes: {names}");
        return Err(Error::new(ErrorKind::InUse, message)
            .with_value(name.as_str())
            .with_hint(format!("stop them first: msb stop {names}")));
    }
    if record.kind == VolumeKind::Disk && is_attached(home, name) {
        let message = format!("the disk of volume `{name}` is attached somewhere");
        return Err(Error::new(ErrorKind::InUse, message)
            .with_value(name.as_str())
            .with_hint("some other program holds a lock on its disk.raw; `lsof` can tell which"));
    }
    remove_locked(home, record)
}

/// Whether a backend, or anybody else, holds the lock of a disk volume's image.
fn is_attached(home: &Home, name: &VolumeName) -> bool {
    let Ok(image) = File::open(folder(home, name).join(DISK_IMAGE)) else {
        return false;
    };
    rustix::fs::flock(&image, FlockOperation::NonBlockingLockExclusive) == Err(Errno::WOULDBLOCK)
}

/// The record of a volume that is whole, after clearing away one that is not. Needs the lock.
fn settled(home: &Home, name: &VolumeName) -> MicrosandboxResult<Option<Record>> {
    let Some(record) = record::read(home, name)? else {
        return Ok(None);
    };
    if record.phase != Phase::Ready {
        clear(home, name)?;
        return Ok(None);
    }
    let Some(owner) = &record.made_for else {
        return Ok(Some(record));
    };
    let owner = home.sandbox(owner);
    // Made for a mount that was being added to a running sandbox, it is not among its mounts yet.
    let mounts = owner.spec().is_ok_and(|spec| mounts_volume(&spec, name));
    let has_run = mounts && !owner.is_provisional();
    if has_run || holds_files(home, &record) {
        return adopt(home, record).map(Some);
    }
    if owner.is_running() || owner.is_being_made() {
        return Ok(Some(record));
    }
    remove_locked(home, record)?;
    Ok(None)
}

/// Whether a sandbox mounts the volume.
fn mounts_volume(spec: &SandboxSpec, volume: &VolumeName) -> bool {
    let mut mounts = spec.mounts.iter();
    mounts.any(|mount| matches!(&mount.source, MountSource::Named { name, .. } if name == volume))
}

/// Makes a volume stay that was made for the first start of a sandbox. Needs the lock.
fn adopt(home: &Home, mut record: Record) -> MicrosandboxResult<Record> {
    record.made_for = None;
    save(home, &record)?;
    Ok(record)
}

/// Whether somebody has put something into a directory volume. A disk is attached only once, and
/// nothing runs on it before its sandbox does.
fn holds_files(home: &Home, record: &Record) -> bool {
    record.kind == VolumeKind::Directory
        && fs::read_dir(folder(home, &record.name)).is_ok_and(|mut files| files.next().is_some())
}

fn save(home: &Home, record: &Record) -> MicrosandboxResult<()> {
    let cannot = |error| Error::io(format!("cannot record volume `{}`", record.name), error);
    let _drafting = drafting(&records(home)).map_err(cannot)?;
    write_json(&record_path(home, &record.name), record)
}

fn make(
    home: &Home,
    name: &VolumeName,
    kind: VolumeKind,
    request: &VolumeRequest,
    owner: Option<&SandboxName>,
) -> MicrosandboxResult<Record> {
    let place = folder(home, name);
    let cannot = |error| Error::io(format!("cannot make volume `{name}`"), error);
    if place.symlink_metadata().is_ok() {
        let message = format!("`{}` exists, but is no volume", place.display());
        return Err(Error::new(ErrorKind::VolumeAlreadyExists, message)
            .with_value(name.as_str())
            .with_hint("move it away, or mount it as a host directory"));
    }
    let disk = kind == VolumeKind::Disk;
    let mut record = Record {
        name: name.clone(),
        kind,
        phase: Phase::Making,
        capacity_bytes: request.size.filter(|_| disk).map(Mebibytes::bytes),
        quota_mib: request.quota.filter(|_| !disk),
        labels: request.labels.clone(),
        created_at_ms: millis(SystemTime::now()),
        made_for: owner.cloned(),
    };
    make_dir(&records(home)).map_err(cannot)?;
    save(home, &record)?;
    let made = fs::DirBuilder::new()
        .mode(0o700)
        .create(&place)
        .map_err(cannot)
        .and_then(|()| match record.capacity_bytes {
            Some(bytes) => make_ext4(&place.join(DISK_IMAGE), bytes, name.as_str()),
            // In the guest it is open to every user; on the host the folder above is not.
            None => fs::set_permissions(&place, Permissions::from_mode(0o755)).map_err(cannot),
        });
    let recorded = made.and_then(|()| {
        sync_dir(&home.volumes()).map_err(cannot)?;
        record.phase = Phase::Ready;
        save(home, &record)
    });
    match recorded {
        Ok(()) => {
            tracing::info!("volume {name} is made, in {}", place.display());
            Ok(record)
        }
        Err(error) => {
            // Should this fail too, the record still says that the volume is not whole.
            let _ = clear(home, name);
            Err(error)
        }
    }
}

fn remove_locked(home: &Home, mut record: Record) -> MicrosandboxResult<()> {
    tracing::info!("volume {} is removed", record.name);
    record.phase = Phase::Removing;
    save(home, &record)?;
    clear(home, &record.name)
}

/// Removes the files of a volume, then its record. Needs the lock.
fn clear(home: &Home, name: &VolumeName) -> MicrosandboxResult<()> {
    let cannot = |error: io::Error| Error::io(format!("cannot remove volume `{name}`"), error);
    let gone = |done: rustix::io::Result<()>| match done {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(cannot(errno.into())),
    };
    let volumes = File::open(home.volumes()).map_err(cannot)?;
    let entry = CString::new(name.as_str()).map_err(|error| cannot(error.into()))?;
    gone(tree::remove(volumes.as_fd(), &entry))?;
    volumes.sync_all().map_err(cannot)?;
    let account = home.path().join(QUOTA_ACCOUNTS).join(name.as_str());
    gone(rustix::fs::unlink(account))?;
    gone(rustix::fs::unlink(record_path(home, name)))?;
    sync_dir(&records(home)).map_err(cannot)
}

/// Takes the lock of a name, waiting for whoever has it.
fn lock(home: &Home, name: &VolumeName) -> MicrosandboxResult<NameLock> {
    let file = lock_file(home, name)?;
    loop {
        match rustix::fs::flock(&file, FlockOperation::LockExclusive) {
            Ok(()) => return Ok(NameLock(file)),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(Error::io(format!("cannot lock volume `{name}`"), errno)),
        }
    }
}

fn try_lock(home: &Home, name: &VolumeName) -> MicrosandboxResult<Option<NameLock>> {
    let file = lock_file(home, name)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(NameLock(file))),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(errno) => Err(Error::io(format!("cannot lock volume `{name}`"), errno)),
    }
}

/// The lock file, which is kept when the volume goes: removing it would let two lock one name.
fn lock_file(home: &Home, name: &VolumeName) -> MicrosandboxResult<File> {
    let cannot = |error: io::Error| Error::io(format!("cannot lock volume `{name}`"), error);
    // A name cannot begin with a dot, so this is never a volume.
    let place = home.volumes().join(".locks");
    make_dir(&place).map_err(cannot)?;
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let path = place.join(format!("{name}.lock"));
    let file = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR);
    file.map(File::from).map_err(|errno| cannot(errno.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Scratch {
        home: Home,
        _dir: tempfile::TempDir,
    }

    fn scratch() -> Scratch {
        let dir = tempfile::tempdir().unwrap();
        Scratch {
            home: Home::at(dir.path().join("home")).unwrap(),
            _dir: dir,
        }
    }

    fn name(text: &str) -> VolumeName {
        VolumeName::try_from(text.to_owned()).unwrap()
    }

    fn create(home: &Home, text: &str) -> MicrosandboxResult<Record> {
        let request = VolumeRequest::default();
        ensure(home, &name(text), NamedVolumeMode::Create, &request, None).map(|(record, _)| record)
    }

    fn names(home: &Home) -> Vec<String> {
        list(home)
            .unwrap()
            .iter()
            .map(|record| record.name.to_string())
            .collect()
    }

    #[test]
    fn a_volume_is_made_found_and_removed() {
        let Scratch { home, .. } = &scratch();
        assert_eq!(
            find(home, &name("a")).unwrap_err().kind(),
            ErrorKind::VolumeNotFound
        );
        let made = create(home, "a").unwrap();
        assert_eq!(find(home, &name("a")).unwrap(), made);
        assert_eq!(
            create(home, "a").unwrap_err().kind(),
            ErrorKind::VolumeAlreadyExists
        );
        fs::write(folder(home, &name("a")).join("file"), "x").unwrap();
        remove(home, &name("a")).unwrap();
        assert!(!folder(home, &name("a")).exists());
        assert_eq!(
            remove(home, &name("a")).unwrap_err().kind(),
            ErrorKind::VolumeNotFound
        );
    }

    #[test]
    fn volumes_are_listed_newest_first() {
        let Scratch { home, .. } = &scratch();
        assert!(names(home).is_empty());
        for text in ["c", "a", "b"] {
            create(home, text).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        assert_eq!(names(home), ["b", "a", "c"]);
    }

    #[test]
    fn a_folder_that_is_no_volume_is_left_alone() {
        let Scratch { home, .. } = &scratch();
        fs::create_dir_all(folder(home, &name("a"))).unwrap();
        assert_eq!(
            create(home, "a").unwrap_err().kind(),
            ErrorKind::VolumeAlreadyExists
        );
        assert_eq!(
            remove(home, &name("a")).unwrap_err().kind(),
            ErrorKind::VolumeNotFound
        );
        assert!(folder(home, &name("a")).exists());
    }

    #[test]
    fn what_a_killed_process_left_is_cleared_away() {
        let Scratch { home, .. } = &scratch();
        for phase in [Phase::Making, Phase::Removing] {
            let interrupt = || {
                let record = create(home, "a").unwrap();
                fs::write(folder(home, &name("a")).join("half"), "").unwrap();
                write_json(&record_path(home, &name("a")), &Record { phase, ..record }).unwrap();
            };
            interrupt();
            assert_eq!(
                find(home, &name("a")).unwrap_err().kind(),
                ErrorKind::VolumeNotFound
            );
            create(home, "a").unwrap();
            assert_eq!(fs::read_dir(folder(home, &name("a"))).unwrap().count(), 0);
            remove(home, &name("a")).unwrap();
            interrupt();
            assert!(names(home).is_empty());
            assert!(!folder(home, &name("a")).exists());
        }
    }

    #[test]
    fn a_volume_that_is_being_made_is_not_touched_by_others() {
        let Scratch { home, .. } = &scratch();
        let record = create(home, "a").unwrap();
        let record = Record {
            phase: Phase::Making,
            ..record
        };
        write_json(&record_path(home, &name("a")), &record).unwrap();
        let held = lock(home, &name("a")).unwrap();
        assert!(names(home).is_empty());
        assert!(folder(home, &name("a")).exists());
        drop(held);
    }

    #[test]
    fn an_attached_disk_cannot_be_removed() {
        let Scratch { home, .. } = &scratch();
        let request = VolumeRequest {
            kind: Some(VolumeKind::Disk),
            size: Some(Mebibytes(1)),
            ..VolumeRequest::default()
        };
        ensure(
            home,
            &name("d"),
            NamedVolumeMode::EnsureExists,
            &request,
            None,
        )
        .unwrap();
        let image = File::open(folder(home, &name("d")).join(DISK_IMAGE)).unwrap();
        assert_eq!(image.metadata().unwrap().len(), 1 << 20);
        rustix::fs::flock(&image, FlockOperation::NonBlockingLockShared).unwrap();
        assert_eq!(
            remove(home, &name("d")).unwrap_err().kind(),
            ErrorKind::InUse
        );
        drop(image);
        remove(home, &name("d")).unwrap();
    }

    #[test]
    fn what_was_made_for_a_sandbox_is_taken_back_and_nothing_else() {
        let Scratch { home, .. } = &scratch();
        create(home, "old").unwrap();
        let plan = |text: &str, mode| VolumePlan {
            name: name(text),
            mode,
            request: VolumeRequest::default(),
            exists: false,
        };
        let ensured = [
            plan("new", NamedVolumeMode::EnsureExists),
            plan("old", NamedVolumeMode::EnsureExists),
        ];
        let sandbox = SandboxName::try_from("box".to_owned()).unwrap();
        let prepared = prepare(home, &sandbox, &ensured, &[]).unwrap();
        assert_eq!(prepared.made().collect::<Vec<_>>(), [&name("new")]);
        prepared.roll_back(home);
        assert_eq!(names(home), ["old"]);

        // A failure half-way takes back what came before it.
        let failing = [
            plan("new", NamedVolumeMode::Create),
            plan("none", NamedVolumeMode::Existing),
        ];
        assert_eq!(
            prepare(home, &sandbox, &failing, &[]).unwrap_err().kind(),
            ErrorKind::VolumeNotFound
        );
        assert_eq!(names(home), ["old"]);
    }

    #[test]
    fn what_was_made_for_a_sandbox_stays_once_that_has_run_or_somebody_uses_it() {
        let Scratch { home, .. } = &scratch();
        let spec = crate::Sandbox::builder("box").image("./x");
        let spec = spec.volume("/new", |v| v.named("new")).build().unwrap();
        let plan = [VolumePlan {
            name: name("new"),
            mode: NamedVolumeMode::EnsureExists,
            request: VolumeRequest::default(),
            exists: false,
        }];
        // Its maker is killed: nobody calls `roll_back`.
        let (dir, making) = home.create_sandbox(&spec).unwrap();
        let made = || prepare(home, &spec.name, &plan, &[]).unwrap();
        drop(made().made);
        assert_eq!(names(home), ["new"], "it is still being made");
        drop(making);
        assert!(names(home).is_empty());

        // Somebody has put something into it meanwhile.
        drop(made().made);
        fs::write(folder(home, &name("new")).join("file"), "x").unwrap();
        assert_eq!(names(home), ["new"]);
        remove(home, &name("new")).unwrap();

        // The sandbox has run, although nobody calls `keep`.
        drop(made().made);
        dir.commit().unwrap();
        assert_eq!(names(home), ["new"]);
        dir.remove().unwrap();
        assert_eq!(names(home), ["new"]);
    }

    #[test]
    fn only_one_of_many_makers_makes_a_volume() {
        let Scratch { home, .. } = &scratch();
        let made: usize = std::thread::scope(|scope| {
            let makers: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| create(home, "a").is_ok()))
                .collect();
            makers
                .into_iter()
                .map(|maker| usize::from(maker.join().unwrap()))
                .sum()
        });
        assert_eq!(made, 1);
    }
}
