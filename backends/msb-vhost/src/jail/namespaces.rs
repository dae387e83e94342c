//! Leaves the namespaces of the host, with and without privileges.

use std::fs;
use std::io::{self, Read, Write};

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, WaitOptions, getegid, geteuid, getpid};
use rustix::thread::UnshareFlags;

use super::{Identity, JailError, Layer, sys};

/// Closes the descriptors that came through exec, and makes standard input `/dev/null`.
///
/// What this program opened is closed on exec; what it took over it has duplicated that way. So a
/// descriptor without that flag belongs to nobody.
pub(super) fn close_inherited() -> io::Result<()> {
    let null = rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    let mut inherited = Vec::new();
    for entry in fs::read_dir("/proc/self/fd")? {
        let name = entry?.file_name();
        let Some(fd) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        if fd > 2 && !sys::closes_on_exec(fd) {
            inherited.push(fd);
        }
    }
    inherited.into_iter().for_each(sys::close_unowned);
    Ok(())
}

/// Enters a user namespace that knows as few ids as the identity needs.
pub(super) fn enter_user(identity: Identity) -> Result<(), JailError> {
    let fail = |step, source: io::Error| JailError::Layer {
        layer: Layer::UserNamespace,
        step,
        hint: user_namespace_hint(),
        source,
    };
    let root = geteuid().is_root();
    let writer = if root {
        Some(MapWriter::start(identity).map_err(|error| fail("prepare its id maps", error))?)
    } else {
        None
    };
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    sys::unshare(UnshareFlags::NEWUSER).map_err(|error| fail("create it", error))?;
    match writer {
        Some(writer) => writer.finish(),
        None => write_single_maps(uid, gid),
    }
    .map_err(|error| fail("write its id maps", error))
}

/// Enters all the other namespaces; the next child is the first process of the pid namespace.
pub(super) fn enter_others() -> Result<(), JailError> {
    let flags = UnshareFlags::NEWNS
        | UnshareFlags::NEWPID
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP;
    sys::unshare(flags).map_err(|source| JailError::Layer {
        layer: Layer::Namespaces,
        step: "create them",
        hint: user_namespace_hint(),
        source,
    })
}

/// The sysctl that most probably forbids unprivileged namespaces, as the end of a message.
fn user_namespace_hint() -> String {
    let settings = [
        (
            "user/max_user_namespaces",
            "0",
            "user.max_user_namespaces is 0",
        ),
        (
            "kernel/unprivileged_userns_clone",
            "0",
            "kernel.unprivileged_userns_clone is 0",
        ),
        (
            "kernel/apparmor_restrict_unprivileged_userns",
            "1",
            "kernel.apparmor_restrict_unprivileged_userns is 1 and no AppArmor profile allows it",
        ),
    ];
    for (file, forbidding, message) in settings {
        let value = fs::read_to_string(format!("/proc/sys/{file}")).unwrap_or_default();
        if value.trim() == forbidding {
            return format!(" (the sysctl {message})");
        }
    }
    " (in a container, its seccomp profile or missing CAP_SYS_ADMIN may forbid it)".to_owned()
}

fn write_single_maps(uid: u32, gid: u32) -> io::Result<()> {
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/gid_map", format!("{gid} {gid} 1"))?;
    fs::write("/proc/self/uid_map", format!("{uid} {uid} 1"))
}

/// A short-lived child that stays outside and writes the maps of root's namespace: mapping more
/// than one's own id takes privileges over the parent namespace.
struct MapWriter {
    child: Pid,
    go: io::PipeWriter,
}

impl MapWriter {
    fn start(identity: Identity) -> io::Result<Self> {
        let (uids, gids) = match identity {
            Identity::Keep(_) | Identity::Owner { .. } => {
                (same_ids("uid_map")?, same_ids("gid_map")?)
            }
            Identity::Become { uid, gid } => (two_ids(uid), two_ids(gid)),
        };
        let target = getpid().as_raw_pid();
        let (mut gate, go) = io::pipe()?;
        if let Some(child) = sys::fork()? {
            return Ok(Self { child, go });
        }
        drop(go);
        let mut byte = [0];
        let written = gate.read_exact(&mut byte).and_then(|()| {
            fs::write(format!("/proc/{target}/gid_map"), gids)?;
            fs::write(format!("/proc/{target}/uid_map"), uids)
        });
        sys::end(written.map_or_else(|error| error.raw_os_error().unwrap_or(libc::EIO), |()| 0))
    }

    fn finish(mut self) -> io::Result<()> {
        self.go.write_all(&[1])?;
        let child = self.child;
        drop(self.go);
        let status = loop {
            match rustix::process::waitpid(Some(child), WaitOptions::empty()) {
                Err(rustix::io::Errno::INTR) => {}
                other => break other?,
            }
        };
        match status.and_then(|(_, status)| status.exit_status()) {
            Some(0) => Ok(()),
            Some(errno) => Err(io::Error::from_raw_os_error(errno)),
            None => Err(io::Error::other("the process that writes them was killed")),
        }
    }
}

/// A map of all ids that exist here to themselves.
fn same_ids(map: &str) -> io::Result<String> {
    let here = fs::read_to_string(format!("/proc/self/{map}"))?;
    Ok(identity_of(&here))
}

fn identity_of(map: &str) -> String {
    let mut same = String::new();
    for line in map.lines() {
        let mut fields = line.split_ascii_whitespace();
        if let (Some(first), Some(count)) = (fields.next(), fields.nth(1)) {
            same.push_str(&format!("{first} {first} {count}\n"));
        }
    }
    same
}

fn two_ids(id: u32) -> String {
    if id == 0 {
        "0 0 1\n".to_owned()
    } else {
        format!("0 0 1\n{id} {id} 1\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps() {
        assert_eq!(
            identity_of("         0          0 4294967295\n"),
            "0 0 4294967295\n"
        );
        assert_eq!(
            identity_of("         0     100000      65536\n     70000       1000          1\n"),
            "0 0 65536\n70000 70000 1\n"
        );
        assert_eq!(two_ids(65534), "0 0 1\n65534 65534 1\n");
        assert_eq!(two_ids(0), "0 0 1\n");
    }
}
