//! Where the programs and libraries lie that a sandbox may need.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Programs and libraries that were found.
#[derive(Debug, Clone, Default)]
pub struct Programs {
    /// `msb-fs`, the backend of shares.
    pub fs: Option<PathBuf>,
    /// `msb-blk`, the backend of disks.
    pub blk: Option<PathBuf>,
    /// `msb-agent`, which runs in the guest.
    pub agent: Option<PathBuf>,
    /// QEMU for this processor.
    pub qemu: Option<PathBuf>,
    /// cloud-hypervisor (`MSB_CLOUD_HYPERVISOR`, else in `PATH`).
    pub cloud_hypervisor: Option<PathBuf>,
    /// A libkrun that can attach vhost-user devices (`MSB_LIBKRUN`, else where libraries lie).
    pub libkrun: Option<PathBuf>,
    /// Why none of those that were found can be used: what the first one lacks.
    pub unfit_libkrun: Option<String>,
    /// `mkfs.ext4`, which makes disks.
    pub mkfs: Option<PathBuf>,
}

/// Where a program of ours lies when it is neither beside this one nor in `PATH`.
const LIBEXEC: [&str; 3] = [
    "/usr/local/libexec/microsandbox",
    "/usr/libexec/microsandbox",
    "/usr/lib/microsandbox",
];

impl Programs {
    /// Looks for all of them.
    pub fn find() -> Self {
        let (libkrun, unfit_libkrun) = fit(libkruns());
        Self {
            fs: ours("msb-fs"),
            blk: ours("msb-blk"),
            agent: ours("msb-agent"),
            qemu: in_path(&format!("qemu-system-{}", env::consts::ARCH)),
            cloud_hypervisor: named("MSB_CLOUD_HYPERVISOR").or_else(|| in_path("cloud-hypervisor")),
            libkrun,
            unfit_libkrun,
            mkfs: in_path("mkfs.ext4"),
        }
    }
}

/// One of our own programs: in `MSB_BIN_DIR`, beside this program, in libexec, or in `PATH`.
fn ours(name: &str) -> Option<PathBuf> {
    let named = env::var_os("MSB_BIN_DIR").map(PathBuf::from);
    let beside = env::current_exe()
        .ok()
        .and_then(|exe| exe.parent().map(Path::to_owned));
    let libexec = beside
        .as_ref()
        .map(|bin| bin.join("../libexec/microsandbox"));
    named
        .into_iter()
        .chain(beside)
        .chain(libexec)
        .chain(LIBEXEC.map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|path| is_program(path))
        .or_else(|| in_path(name))
}

fn named(variable: &str) -> Option<PathBuf> {
    env::var_os(variable)
        .map(PathBuf::from)
        .filter(|path| is_program(path))
}

/// A program in `PATH`, or where administrators' programs lie, which is often not in a user's.
pub(crate) fn in_path(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .filter(|folder| folder.is_absolute())
        .map(|folder| folder.join(name))
        .find(|path| is_program(path))
}

fn is_program(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

/// The first library that can be used, or else what the first one lacks.
fn fit(libraries: Vec<PathBuf>) -> (Option<PathBuf>, Option<String>) {
    let mut unfit = None;
    for library in libraries {
        match probe(&library) {
            Ok(()) => return (Some(library), None),
            Err(why) => unfit = unfit.or(Some(why)),
        }
    }
    (None, unfit)
}

/// Tries a library in a process of its own, for loading it runs its code.
fn probe(library: &Path) -> Result<(), String> {
    let cannot = |why: String| format!("`{}` cannot be tried: {why}", library.display());
    let msb = crate::supervisor::msb_program().map_err(|error| cannot(error.to_string()))?;
    let tried = Command::new(msb)
        .args(["krun", "--probe"])
        .arg(library)
        .env_clear()
        .stdin(Stdio::null())
        .output()
        .map_err(|error| cannot(error.to_string()))?;
    if tried.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&tried.stderr);
    let line = said.lines().find_map(|line| line.strip_prefix("error: "));
    Err(line.map_or_else(|| cannot(tried.status.to_string()), str::to_owned))
}

fn libkruns() -> Vec<PathBuf> {
    if let Some(library) = env::var_os("MSB_LIBKRUN") {
        return vec![PathBuf::from(library)];
    }
    let multiarch = format!("/usr/lib/{}-linux-gnu", env::consts::ARCH);
    [
        "/usr/local/lib64",
        "/usr/local/lib",
        &multiarch,
        "/usr/lib64",
        "/usr/lib",
    ]
    .iter()
    .filter_map(|folder| fs::read_dir(folder).ok())
    .flatten()
    .flatten()
    .filter(|entry| is_libkrun(&entry.file_name()))
    .map(|entry| entry.path())
    .collect()
}

fn is_libkrun(name: &OsStr) -> bool {
    name.to_str()
        .is_some_and(|name| name == "libkrun.so" || name.starts_with("libkrun.so."))
}
