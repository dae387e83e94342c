//! Tries what must not work from inside the jail of each backend, every attempt in its own process.
//!
//! The jails and the lists of system calls are those that `msb-fs` and `msb-blk` ask for.
//! The jail must be entered by a process with one thread, so this is no ordinary test program: it
//! starts itself anew for every attempt, as root and as an ordinary user, with the system call
//! filter and, to see that the other layers hold as well, without.

use std::ffi::CString;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail, ensure};
use msb_fs::tree::{Caching, Ownership, Rules, StatVirt};
use msb_testkit::attack::{ATTACKS, Scene};
use msb_vhost::jail::{Call, Jail, SandboxMode};

const NOBODY: u32 = 65534;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["--attempt", device, mode, attack, stage] => attempt(device, mode, attack, stage),
        _ if words.contains(&"--list") => {
            // A name that is listed among the ignored ones as well would not be run.
            if !words.contains(&"--ignored") {
                println!("everything_forbidden_is_denied: test");
            }
            Ok(())
        }
        _ => everything_forbidden_is_denied(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The files the attacks aim at.
struct Stage {
    folder: tempfile::TempDir,
    _named: UnixListener,
    _hidden: UnixListener,
}

fn stage() -> Result<Stage> {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::Builder::new().prefix("msb-jail.").tempdir()?;
    let path = folder.path();
    std::fs::create_dir(path.join("share"))?;
    std::fs::write(path.join("canary"), "secret")?;
    std::os::unix::fs::symlink(path.join("canary"), path.join("share/link"))?;
    std::fs::copy("/bin/true", path.join("share/program"))?;
    let named = UnixListener::bind(path.join("socket"))?;
    let address = std::os::unix::net::SocketAddr::from_abstract_name(hidden_name(path))?;
    let hidden = UnixListener::bind_addr(&address)?;
    let null = path.join("share/null");
    let device = rustix::fs::makedev(1, 3);
    let mode = rustix::fs::Mode::from_raw_mode(0o666);
    let kind = rustix::fs::FileType::CharacterDevice;
    if let Err(error) = rustix::fs::mknodat(rustix::fs::CWD, &null, kind, mode, device) {
        println!("skipped: no device in the share ({error})");
    }
    for (name, mode) in [
        ("", 0o755),
        ("share", 0o777),
        ("canary", 0o666),
        ("socket", 0o777),
    ] {
        std::fs::set_permissions(path.join(name), std::fs::Permissions::from_mode(mode))?;
    }
    Ok(Stage {
        folder,
        _named: named,
        _hidden: hidden,
    })
}

fn hidden_name(stage: &Path) -> Vec<u8> {
    format!("{}-hidden", stage.display()).into_bytes()
}

fn everything_forbidden_is_denied() -> Result<()> {
    let stage = stage()?;
    let users: &[u32] = if rustix::process::geteuid().is_root() {
        &[0, NOBODY]
    } else {
        println!("skipped as root: not root");
        &[rustix::process::geteuid().as_raw()]
    };
    let mut failures = Vec::new();
    let mut count = 0;
    for device in ["fs", "fs-ro", "fs-off", "blk"] {
        for user in users {
            for mode in ["strict", "audit"] {
                for attack in ATTACKS {
                    if mode == "audit" && (!attack.deep || device == "fs-ro") {
                        continue;
                    }
                    let outcome = run(device, *user, mode, attack.name, stage.folder.path())?;
                    count += 1;
                    if !outcome.starts_with("denied") {
                        let who = format!("{device}, uid {user}, {mode}");
                        failures.push(format!("{who}: {}: {outcome}", attack.name));
                    }
                }
            }
        }
    }
    println!(
        "{} attacks, {count} attempts, {} not denied",
        ATTACKS.len(),
        failures.len()
    );
    ensure!(failures.is_empty(), "not denied:\n{}", failures.join("\n"));
    Ok(())
}

/// Starts one attempt and says how it ended.
fn run(device: &str, user: u32, mode: &str, attack: &str, stage: &Path) -> Result<String> {
    let mut command = Command::new("/proc/self/exe");
    command.args(["--attempt", device, mode, attack]).arg(stage);
    if rustix::process::geteuid().is_root() && user != 0 {
        command.uid(user).gid(user);
    }
    let output = command.stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let complaint = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    match (output.status.signal(), said.as_str()) {
        // It got as far as the attack and was ended there.
        (Some(libc::SIGSYS), "inside") => Ok("denied: killed".to_owned()),
        (None, said) if said.starts_with("inside") && output.status.success() => {
            Ok(said.trim_start_matches("inside").trim().to_owned())
        }
        _ => bail!(
            "{device}, uid {user}, {mode}, {attack}: {}: {said} {complaint}",
            output.status
        ),
    }
}

/// Enters the jail and tries one attack.
fn attempt(device: &str, mode: &str, attack: &str, stage: &str) -> Result<()> {
    let stage = PathBuf::from(stage);
    let attack = ATTACKS
        .iter()
        .find(|a| a.name == attack)
        .context("no such attack")?;
    let c_path = |path: PathBuf| CString::new(path.as_os_str().as_bytes());
    let canary = c_path(stage.join("canary"))?;
    let (named, hidden) = (
        c_path(stage.join("socket"))?,
        CString::new(hidden_name(&stage))?,
    );
    let outsider = rustix::process::getppid()
        .context("no parent")?
        .as_raw_pid();

    let mode: SandboxMode = mode.parse()?;
    let (jail, calls) = backend(device, mode, &stage)?;
    let mut report = msb_vhost::jail::enter(jail)?;
    let threads = rustix::process::getrlimit(rustix::process::Resource::Nproc);
    ensure!(threads.maximum.is_some(), "threads without end");
    report.seal(&calls)?;
    print!("inside ");
    std::io::stdout().flush()?;
    let number = |fd: &Option<OwnedFd>| fd.as_ref().map_or(-1, AsRawFd::as_raw_fd);
    let scene = Scene {
        dir: number(&report.share),
        descriptors: number(&report.descriptors),
        canary: &canary,
        sockets: [&named, &hidden],
        outsider,
    };
    match (attack.run)(&scene) {
        Ok(()) => println!("ALLOWED"),
        Err(error) => println!("denied: {error}"),
    }
    Ok(())
}

fn open(path: &Path) -> Result<OwnedFd> {
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, rustix::fs::Mode::empty())?)
}

/// The jail of a backend and the calls that it is left, as the backend itself asks for them.
fn backend(device: &str, mode: SandboxMode, stage: &Path) -> Result<(Jail, Vec<Call>)> {
    if device == "blk" {
        let jail = msb_blk::sandbox::jail(mode);
        return Ok((jail, msb_blk::sandbox::calls(false)));
    }
    let ownership = if device == "fs-off" {
        StatVirt::Off
    } else {
        StatVirt::Strict
    };
    // Everything on that lengthens the list.
    let rules = Rules {
        readonly: device == "fs-ro",
        ownership: Ownership {
            mode: ownership,
            mirror: false,
            default_owner: (0, 0),
            owner: None,
        },
        caching: Caching::Auto,
        exclusive: false,
        writeback: true,
        submounts: true,
        lists: true,
        locks: true,
    };
    let share = open(&stage.join("share"))?;
    let jail = msb_fs::sandbox::jail(mode, share, rules.readonly, ownership, (0, 0), 512);
    Ok((jail, msb_fs::sandbox::calls(&rules, true)))
}
