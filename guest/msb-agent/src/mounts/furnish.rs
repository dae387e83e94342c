//! Puts a few files into the root that programs expect and that an image may lack.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{self, AtFlags, Mode, OFlags};
use rustix::io::Errno;

use super::target;

/// Makes what is missing. What cannot be made, such as in a root that is only read, is left out:
/// an image without these files is a legal one.
pub(super) fn furnish(root: &OwnedFd, hostname: &str) {
    if fs::mkdirat(root, "tmp", Mode::from_raw_mode(0o755)).is_ok() {
        report(
            "/tmp",
            fs::chmodat(root, "tmp", Mode::from_raw_mode(0o1777), AtFlags::empty()),
        );
    }
    let etc = match fs::mkdirat(root, "etc", Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => target::resolve(root.as_fd(), "/etc"),
        Err(_) => return,
    };
    let Ok(etc) = etc else { return };
    let hosts = format!(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{hostname}\n"
    );
    let files = [
        ("hostname", format!("{hostname}\n")),
        ("hosts", hosts),
        ("resolv.conf", "# This sandbox has no name server.\n".into()),
    ];
    for (name, content) in files {
        report(name, write_missing(&etc, name, &content));
    }
}

/// Writes a file that does not exist, or is the empty one that image builders leave in its place.
fn write_missing(folder: &OwnedFd, name: &str, content: &str) -> Result<(), Errno> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = match fs::openat(
        folder,
        name,
        flags | OFlags::CLOEXEC,
        Mode::from_raw_mode(0o644),
    ) {
        Err(Errno::LOOP | Errno::ROFS | Errno::NXIO | Errno::ISDIR) => return Ok(()),
        file => file?,
    };
    if fs::fstat(&file)?.st_size != 0 {
        return Ok(());
    }
    let written = File::from(file).write_all(content.as_bytes());
    written.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

fn report(what: &str, result: Result<(), Errno>) {
    if let Err(error) = result {
        eprintln!("msb-agent: cannot make {what}: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_missing_or_empty_is_written() {
        let root = tempfile::tempdir().unwrap();
        let etc = root.path().join("etc");
        std::fs::create_dir(&etc).unwrap();
        std::fs::write(etc.join("hosts"), "mine\n").unwrap();
        std::fs::write(etc.join("hostname"), "").unwrap();
        std::os::unix::fs::symlink("/run/resolv.conf", etc.join("resolv.conf")).unwrap();
        furnish(&File::open(root.path()).unwrap().into(), "box");
        assert_eq!(
            std::fs::read_to_string(etc.join("hosts")).unwrap(),
            "mine\n"
        );
        assert_eq!(
            std::fs::read_to_string(etc.join("hostname")).unwrap(),
            "box\n"
        );
        assert!(etc.join("resolv.conf").is_symlink());
        assert!(root.path().join("tmp").is_dir());
    }
}
