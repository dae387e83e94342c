//! A backend plan → the command line of its process, which is handed a bound socket.
//!
//! The socket is bound before the process starts and given to it as standard input, so that the VMM
//! may connect at once: there is nothing to wait for and nothing to poll. The process ends itself
//! when its parent dies (`--exit-with-parent`) and when the VMM closes the connection.

use std::ffi::OsString;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::host::Programs;
use crate::plan::{BackendPlan, DevicePlan};
use crate::{Error, ErrorKind, MicrosandboxResult};

mod blk;
mod fs;

/// Size of every virtqueue, in descriptors; the VMM is told the same.
pub const QUEUE_SIZE: u16 = 1024;

/// Size of the virtqueues of a disk; QEMU offers no more than 1024, guests gain nothing beyond 256.
pub const DISK_QUEUE_SIZE: u16 = 256;

/// How strictly a backend jails itself, as its flag `--sandbox` takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Jail {
    /// Every layer, or it does not start.
    Strict,
    /// The layers that the host allows; it says which it does without.
    BestEffort,
    /// None, for finding faults.
    None,
}

impl Jail {
    /// What `MSB_SANDBOX` asks for: `strict` (the default), `best-effort` or `none`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidConfig`] when it is another word.
    pub fn from_env() -> MicrosandboxResult<Self> {
        match std::env::var("MSB_SANDBOX").unwrap_or_default().as_str() {
            "" | "strict" => Ok(Self::Strict),
            "best-effort" => Ok(Self::BestEffort),
            "none" => Ok(Self::None),
            other => Err(Error::new(
                ErrorKind::InvalidConfig,
                format!("MSB_SANDBOX is `{other}`"),
            )
            .with_value(other)
            .with_hint("set it to `strict`, `best-effort` or `none`")),
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Strict => "strict",
            Self::BestEffort => "best-effort",
            Self::None => "none",
        }
    }
}

/// The arguments of a backend's process, without the program. `parent` is the process it ends with.
pub fn argv(plan: &BackendPlan, jail: Jail, parent: u32) -> Vec<OsString> {
    let mut argv = Arguments::default();
    argv.pair("--fd", "0");
    match &plan.device {
        DevicePlan::Fs(share) => fs::describe(&mut argv, &plan.id, share),
        DevicePlan::Blk(disk) => blk::describe(&mut argv, &plan.id, disk),
    }
    argv.flag(&format!("--exit-with-parent={parent}"));
    argv.pair("--sandbox", jail.word());
    argv.0
}

/// The command that serves the device of `plan` on `listener`.
///
/// # Errors
///
/// [`ErrorKind::Unsupported`] when the backend's program is not installed.
pub(crate) fn command(
    plan: &BackendPlan,
    programs: &Programs,
    jail: Jail,
    listener: UnixListener,
) -> MicrosandboxResult<Command> {
    let (name, program): (_, &Option<PathBuf>) = match plan.device {
        DevicePlan::Fs(_) => ("msb-fs", &programs.fs),
        DevicePlan::Blk(_) => ("msb-blk", &programs.blk),
    };
    let program = program.as_ref().ok_or_else(|| {
        Error::new(
            ErrorKind::Unsupported,
            format!("the program `{name}` was not found"),
        )
        .with_value(name)
        .with_hint("install it beside msb, or set MSB_BIN_DIR to its folder")
    })?;
    let mut command = Command::new(program);
    command
        .args(argv(plan, jail, std::process::id()))
        .env_clear()
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(listener)))
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    Ok(command)
}

/// A command line that is being put together.
#[derive(Default)]
struct Arguments(Vec<OsString>);

impl Arguments {
    fn flag(&mut self, name: &str) {
        self.0.push(name.into());
    }

    fn pair(&mut self, name: &str, value: impl Into<OsString>) {
        self.0.push(name.into());
        self.0.push(value.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{BlkPlan, FsPlan, QuotaPlan, ShareSource};
    use crate::spec::{CachePolicy, DiskImageFormat, HostPermissions, StatVirtualization};

    fn line(device: DevicePlan) -> String {
        let plan = BackendPlan {
            id: "data_0a1b2c3d".into(),
            purpose: "/data".into(),
            device,
        };
        let argv = argv(&plan, Jail::Strict, 7);
        let words: Vec<String> = argv
            .iter()
            .map(|word| word.to_string_lossy().into())
            .collect();
        words.join(" ")
    }

    #[test]
    fn a_share_is_spelled_out() {
        let mut share = FsPlan {
            source: ShareSource::Directory("/srv/data".into()),
            read_only: false,
            stat_virtualization: StatVirtualization::Strict,
            host_permissions: HostPermissions::Private,
            default_owner: (0, 0),
            owner: None,
            cache: None,
            exclusive: false,
            quota: None,
            queues: 1,
        };
        expect_test::expect!["--fd 0 --shared-dir /srv/data --tag data_0a1b2c3d --stat-virt strict --host-perms private --default-owner 0:0 --num-request-queues 1 --queue-size 1024 --exit-with-parent=7 --sandbox strict"]
            .assert_eq(&line(DevicePlan::Fs(share.clone())));
        share.source = ShareSource::File("/etc/hosts".into());
        share.read_only = true;
        share.stat_virtualization = StatVirtualization::Relaxed;
        share.host_permissions = HostPermissions::Mirror;
        share.default_owner = (1000, 100);
        share.owner = Some((5, 6));
        share.cache = Some(CachePolicy::Metadata);
        share.exclusive = true;
        share.quota = Some(QuotaPlan {
            bytes: 1 << 30,
            account: "/h/state/quota/data".into(),
        });
        share.queues = 4;
        expect_test::expect!["--fd 0 --shared-file /etc/hosts --tag data_0a1b2c3d --readonly --stat-virt relaxed --host-perms mirror --default-owner 1000:100 --owner 5:6 --cache metadata --exclusive --quota 1073741824 --quota-file /h/state/quota/data --num-request-queues 4 --queue-size 1024 --exit-with-parent=7 --sandbox strict"]
            .assert_eq(&line(DevicePlan::Fs(share)));
    }

    #[test]
    fn a_disk_is_spelled_out() {
        let mut disk = BlkPlan {
            image: "/srv/data.qcow2".into(),
            format: DiskImageFormat::Qcow2,
            read_only: true,
            queues: 2,
        };
        expect_test::expect!["--fd 0 --blk-file /srv/data.qcow2 --format qcow2 --read-only --serial data_0a1b2c3d --num-queues 2 --queue-size 256 --exit-with-parent=7 --sandbox strict"]
            .assert_eq(&line(DevicePlan::Blk(disk.clone())));
        disk.read_only = false;
        disk.format = DiskImageFormat::Raw;
        expect_test::expect!["--fd 0 --blk-file /srv/data.qcow2 --format raw --serial data_0a1b2c3d --num-queues 2 --queue-size 256 --exit-with-parent=7 --sandbox strict"]
            .assert_eq(&line(DevicePlan::Blk(disk)));
    }
}
