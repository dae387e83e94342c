//! A scratch home in which the real program runs, with stand-ins for all that it starts.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A machine on which everything that sandboxes need seems to be there.
pub(crate) struct Scratch {
    dir: tempfile::TempDir,
}

impl Scratch {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // The temporary folder of the machine may itself be reached through a symbolic link.
        let root = fs::canonicalize(dir.path()).unwrap();
        for folder in ["bin", "kernel/modules", "work/dir/sub", "work/rootfs"] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        for program in ["msb-fs", "msb-blk", "msb-agent", "qemu-system-x86_64"] {
            let path = root.join("bin").join(program);
            fs::write(&path, "#!/bin/sh\nexit 1\n").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        for file in ["kernel/vmlinuz", "kernel/modules/modules.dep"] {
            fs::write(root.join(file), "").unwrap();
        }
        let work = root.join("work");
        for file in ["file", "disk.raw", "disk.qcow2", "disk.vmdk"] {
            fs::write(work.join(file), "content").unwrap();
        }
        let conf = "image: ../rootfs\nname: described\nmemory: 1G\nmounts: [dir:/x:ro]\n";
        fs::write(work.join("dir/conf.yaml"), conf.replace("dir:", "../dir:")).unwrap();
        fs::write(work.join("bad.yaml"), "volumes: []\n").unwrap();
        fs::write(work.join("empty.yaml"), "{}\n").unwrap();
        symlink("dir", work.join("link")).unwrap();
        symlink("disk.raw", work.join("disk-link")).unwrap();
        let made = Command::new("mkfifo")
            .arg(work.join("fifo"))
            .status()
            .unwrap();
        assert!(made.success());
        Self { dir }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        fs::canonicalize(self.dir.path()).unwrap().join(name)
    }

    pub(crate) fn msb(&self, args: &[&str]) -> Output {
        let path = std::env::var("PATH").unwrap_or_default();
        Command::new(env!("CARGO_BIN_EXE_msb"))
            .args(args)
            .current_dir(self.path("work"))
            .env("MSB_HOME", self.path("home"))
            .env("MSB_BIN_DIR", self.path("bin"))
            .env("MSB_KERNEL", self.path("kernel"))
            .env("MSB_LIBKRUN", self.path("none"))
            .env("PATH", format!("{}:{path}", self.path("bin").display()))
            .output()
            .unwrap()
    }

    pub(crate) fn must(&self, args: &[&str]) -> String {
        let output = self.msb(args);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "msb {args:?}: {said}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Everything in a folder, with the content of files.
    pub(crate) fn contents(&self, name: &str) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut found = BTreeMap::new();
        let mut waiting = vec![self.path(name)];
        while let Some(folder) = waiting.pop() {
            for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
                let kind = entry.file_type().unwrap();
                if kind.is_dir() {
                    waiting.push(entry.path());
                }
                if !is_housekeeping(&entry.path()) {
                    let content = if kind.is_file() {
                        fs::read(entry.path()).unwrap()
                    } else {
                        Vec::new()
                    };
                    found.insert(entry.path(), content);
                }
            }
        }
        found
    }
}

/// Folders that only say where things would be, and lock files.
fn is_housekeeping(path: &Path) -> bool {
    let folders = [
        "volumes",
        ".locks",
        "state",
        "sandboxes",
        "images",
        "run",
        "cache",
    ]
    .map(std::ffi::OsStr::new);
    path.extension().is_some_and(|end| end == "lock")
        || path.file_name().is_some_and(|name| folders.contains(&name))
}
