//! Looks at every backend from outside before the VM gets its socket, and refuses one unjailed.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::{getegid, geteuid};

use super::child::Child;
use crate::backend::{self, Jail};
use crate::evidence::{
    self, Evidence, Expected, FileId, Files, Role, Row, Verdict, WantedRoot, judge,
};
use crate::plan::{BackendPlan, BlkPlan, DevicePlan, FsPlan, ShareSource};
use crate::spec::{DiskImageFormat, StatVirtualization};
use crate::{Error, ErrorKind, MicrosandboxResult};

/// How long a backend may take to lock itself in; much longer than any takes on a machine that has
/// anything else to do.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long it may sleep with a layer missing: it waits for its front end then, and adds no more.
const SETTLED: Duration = Duration::from_millis(1500);

/// How often a look is taken.
const INTERVAL: Duration = Duration::from_millis(3);

/// User and group as which disks are served when root starts their backends.
const NOBODY: u32 = 65534;

/// `CAP_DAC_READ_SEARCH`, with which a server reads the files of others.
const READ: u64 = 1 << 2;

/// What a server keeps that gives files to others as well: `CAP_CHOWN`, `CAP_DAC_OVERRIDE`,
/// `CAP_FOWNER` and `CAP_FSETID`.
const GIVE: u64 = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4;

/// Waits until the backend is locked in as `jail` asks.
///
/// # Errors
///
/// [`ErrorKind::BootStart`] with the first layer that is missing in the end, unless the jail is
/// best-effort: then what is missing is logged.
pub(super) async fn verify(
    plan: &BackendPlan,
    child: &Child,
    jail: Jail,
) -> MicrosandboxResult<()> {
    if jail == Jail::None {
        return Ok(());
    }
    let refused = |detail: String| {
        Error::new(
            ErrorKind::BootStart,
            format!(
                "the backend of {} is not in its jail: {detail}",
                child.purpose
            ),
        )
        .with_hint(
            "MSB_SANDBOX=best-effort goes on without what this host does not allow; \
             `msb-fs --sandbox strict` says what that is",
        )
    };
    let Some(pid) = child.pid() else {
        return Ok(());
    };
    let own = evidence::read(std::process::id())
        .map_err(|error| Error::io("cannot look at this process in /proc", error))?;
    let begun = Instant::now();
    let mut asleep = None;
    loop {
        if child.status().is_some() {
            // The cause is what it said last; whoever waits for children reports that.
            return Ok(());
        }
        // Anew each time: the backend may make files that its command line names.
        let (missing, sleeps) = look(pid, &expected(plan, jail)?, &own);
        if missing.is_empty() {
            tracing::info!("{}: its jail holds", child.purpose);
            return Ok(());
        }
        let since = *asleep.get_or_insert_with(Instant::now);
        if !sleeps {
            asleep = None;
        }
        let settled = sleeps && since.elapsed() >= SETTLED;
        if settled || begun.elapsed() >= PATIENCE {
            let rows: Vec<String> = missing.iter().map(ToString::to_string).collect();
            if jail == Jail::BestEffort {
                tracing::warn!("{}: jail without {}", child.purpose, rows.join("; "));
                return Ok(());
            }
            return Err(refused(rows.into_iter().next().unwrap_or_default()));
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

/// What is missing now, and whether the process that serves is asleep.
fn look(pid: u32, expected: &Expected, own: &Evidence) -> (Vec<Row>, bool) {
    let gone = || Row {
        name: "process",
        verdict: Verdict::Broken,
        found: "it cannot be seen in /proc".to_owned(),
    };
    let broken = |rows: Vec<Row>| {
        rows.into_iter()
            .filter(|row| row.verdict == Verdict::Broken)
    };
    let inner = evidence::children(pid).last().copied();
    let Ok(serving) = evidence::read(inner.unwrap_or(pid)) else {
        return (vec![gone()], false);
    };
    let mut missing: Vec<Row> = broken(judge(expected, &serving, own)).collect();
    if inner.is_some() {
        let waits = Expected {
            role: Role::Waits,
            ..expected.clone()
        };
        match evidence::read(pid) {
            Ok(waiting) => missing.extend(broken(judge(&waits, &waiting, own))),
            Err(_) => missing.push(gone()),
        }
    }
    (missing, serving.state == 'S')
}

fn expected(plan: &BackendPlan, jail: Jail) -> MicrosandboxResult<Expected> {
    let user = geteuid();
    match &plan.device {
        DevicePlan::Fs(share) => {
            // It may hold what its command line names: the share, and the account of its quota.
            let words = backend::argv(plan, jail, std::process::id());
            let paths = words
                .iter()
                .map(Path::new)
                .filter(|word| word.is_absolute());
            let named = paths.filter_map(|path| std::fs::metadata(path).ok());
            of_share(share, user.as_raw(), named.map(|stat| id(&stat)).collect())
        }
        DevicePlan::Blk(disk) => of_disk(disk, user.as_raw()),
    }
}

fn of_share(share: &FsPlan, user: u32, mut named: Vec<FileId>) -> MicrosandboxResult<Expected> {
    let (path, folder) = match &share.source {
        ShareSource::Directory(path) => (path.as_path(), path.as_path()),
        ShareSource::File(path) => (path.as_path(), path.parent().unwrap_or(Path::new("/"))),
    };
    let root = stat(folder)?;
    let file = stat(path)?;
    named.push(id(&root));
    let gives_away = share.stat_virtualization == StatVirtualization::Off;
    // As root a server becomes the owner of what it serves; see `Tree::owner` of msb-fs.
    let owner = if root.mode() & 0o001 != 0 {
        &file
    } else {
        &root
    };
    let own = (user, getegid().as_raw());
    let (becomes, group) = if user != 0 || gives_away || owner.uid() == 0 {
        own
    } else {
        (owner.uid(), owner.gid())
    };
    let capabilities = match (gives_away && user == 0, share.read_only) {
        (false, _) => 0,
        (true, true) => READ,
        (true, false) => READ | GIVE,
    };
    Ok(Expected {
        role: Role::Serves,
        user: becomes,
        group,
        seen_by_root: user == 0,
        capabilities,
        root: WantedRoot::Is(id(&root)),
        read_only: share.read_only,
        files: Files::Only(named),
    })
}

fn of_disk(disk: &BlkPlan, user: u32) -> MicrosandboxResult<Expected> {
    let files = match disk.format {
        DiskImageFormat::Raw => Files::Only(vec![id(&stat(&disk.image)?)]),
        // Which other files they are made of, only the backend knows.
        DiskImageFormat::Qcow2 | DiskImageFormat::Vmdk => Files::Images,
    };
    Ok(Expected {
        role: Role::Serves,
        user: if user == 0 { NOBODY } else { user },
        group: if user == 0 {
            NOBODY
        } else {
            getegid().as_raw()
        },
        seen_by_root: user == 0,
        capabilities: 0,
        root: WantedRoot::Empty,
        read_only: true,
        files,
    })
}

fn stat(path: &Path) -> MicrosandboxResult<std::fs::Metadata> {
    std::fs::metadata(path)
        .map_err(|error| Error::io(format!("cannot look at `{}`", path.display()), error))
}

fn id(stat: &std::fs::Metadata) -> FileId {
    FileId {
        device: stat.dev(),
        inode: stat.ino(),
    }
}
