//! The child's side of a command: from fork to exec.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::fd::OwnedFd;

use msb_protocol::{Exec, Resource, ResourceLimit};
use rustix::fs::{Mode, fchown};
use rustix::io::Errno;
use rustix::process::{self, Gid, Rlimit, Uid, chdir, ioctl_tiocsctty, setrlimit, setsid, umask};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use super::users::{self, Identity};
use super::{confine, transfer};
use crate::sys;

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a command's standard streams are connected to.
pub(super) enum Streams {
    /// Pipes for input, output and error.
    Pipes([OwnedFd; 3]),
    /// A terminal.
    Terminal(OwnedFd),
}

/// Why a command does not start.
struct Failure {
    errno: Errno,
    message: String,
}

/// Becomes the command, or says on `report` why it cannot: errno, then words.
pub(super) fn run(exec: &Exec, streams: &Streams, restricted: bool, report: OwnedFd) -> ! {
    let Failure { errno, message } = match prepare(exec, streams, restricted) {
        Err(failure) => failure,
        Ok(environment) => match &exec.builtin {
            None => execute(exec, &environment),
            Some(work) => {
                // Closes the report as well, by which the agent learns that the work has begun.
                sys::close_all_but_standard();
                sys::exit_now(transfer::carry_out(work))
            }
        },
    };
    let mut text = errno.raw_os_error().to_le_bytes().to_vec();
    text.extend_from_slice(message.as_bytes());
    // If the agent is gone there is nobody to tell.
    let _ = File::from(report).write_all(&text);
    sys::exit_now(127)
}

/// Decodes what [`run`] reported.
pub(super) fn parse_report(report: &[u8]) -> Option<(i32, String)> {
    let (errno, message) = report.split_first_chunk()?;
    Some((
        i32::from_le_bytes(*errno),
        String::from_utf8_lossy(message).into_owned(),
    ))
}

fn prepare(
    exec: &Exec,
    streams: &Streams,
    restricted: bool,
) -> Result<Vec<(String, String)>, Failure> {
    let failed = |what: &'static str| {
        move |errno: Errno| Failure {
            errno,
            message: format!("{what}: {errno}"),
        }
    };
    // The agent's own is empty; the working directory may be made below.
    umask(Mode::from_raw_mode(0o022));
    setsid().map_err(failed("cannot make a session"))?;
    connect(streams).map_err(failed("cannot connect the standard streams"))?;
    let identity = identify(exec.user.as_deref().unwrap_or("0"))?;
    if let Streams::Terminal(terminal) = streams {
        let owner = Some(Uid::from_raw(identity.uid));
        fchown(terminal, owner, None).map_err(failed("cannot hand the terminal over"))?;
    }
    let cwd = exec.cwd.as_deref().unwrap_or("/");
    enter(cwd).map_err(|errno| Failure {
        errno: if errno == Errno::NOENT {
            Errno::NOTDIR
        } else {
            errno
        },
        message: format!("cannot use the working directory {cwd}: {errno}"),
    })?;
    // As root, who may raise them.
    for limit in &exec.limits {
        set_limit(limit).map_err(failed("cannot set a limit"))?;
    }
    if restricted {
        confine::bound().map_err(failed("cannot drop capabilities"))?;
    }
    become_user(&identity).map_err(failed("cannot change the user"))?;
    if restricted {
        confine::drop_rest(identity.uid == 0).map_err(failed("cannot drop capabilities"))?;
    }
    sys::default_signals().map_err(failed("cannot reset the signals"))?;
    Ok(environment(
        exec,
        &identity,
        matches!(streams, Streams::Terminal(_)),
    ))
}

fn connect(streams: &Streams) -> Result<(), Errno> {
    let (input, output, error) = match streams {
        Streams::Pipes([input, output, error]) => (input, output, error),
        Streams::Terminal(terminal) => {
            ioctl_tiocsctty(terminal)?;
            (terminal, terminal, terminal)
        }
    };
    dup2_stdin(input)?;
    dup2_stdout(output)?;
    dup2_stderr(error)
}

fn identify(spec: &str) -> Result<Identity, Failure> {
    let passwd = read("/etc/passwd")?;
    let group = read("/etc/group")?;
    users::resolve(spec, &passwd, &group).map_err(|error| Failure {
        errno: Errno::INVAL,
        message: error.to_string(),
    })
}

/// A file of the image that may not exist; its text may be in any encoding.
fn read(path: &str) -> Result<String, Failure> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(Failure {
            errno: Errno::from_io_error(&error).unwrap_or(Errno::IO),
            message: format!("cannot read {path}: {error}"),
        }),
    }
}

fn enter(cwd: &str) -> Result<(), Errno> {
    // The agent's own working directory is outside of the sandbox, so a relative path would be.
    chdir("/")?;
    match chdir(cwd) {
        Err(Errno::NOENT) => {}
        result => return result,
    }
    std::fs::create_dir_all(cwd).map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
    chdir(cwd)
}

fn set_limit(limit: &ResourceLimit) -> Result<(), Errno> {
    let resource = match limit.resource {
        Resource::As => process::Resource::As,
        Resource::Core => process::Resource::Core,
        Resource::Cpu => process::Resource::Cpu,
        Resource::Data => process::Resource::Data,
        Resource::Fsize => process::Resource::Fsize,
        Resource::Locks => process::Resource::Locks,
        Resource::Memlock => process::Resource::Memlock,
        Resource::Msgqueue => process::Resource::Msgqueue,
        Resource::Nice => process::Resource::Nice,
        Resource::Nofile => process::Resource::Nofile,
        Resource::Nproc => process::Resource::Nproc,
        Resource::Rss => process::Resource::Rss,
        Resource::Rtprio => process::Resource::Rtprio,
        Resource::Rttime => process::Resource::Rttime,
        Resource::Sigpending => process::Resource::Sigpending,
        Resource::Stack => process::Resource::Stack,
    };
    let limited = |value: u64| (value != u64::MAX).then_some(value);
    let new = Rlimit {
        current: limited(limit.soft),
        maximum: limited(limit.hard),
    };
    setrlimit(resource, new)
}

fn become_user(identity: &Identity) -> Result<(), Errno> {
    let groups: Vec<_> = identity
        .groups
        .iter()
        .map(|&gid| Gid::from_raw(gid))
        .collect();
    set_thread_groups(&groups)?;
    let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)
}

/// The command's environment: what the host asked for, over what every program expects.
fn environment(exec: &Exec, identity: &Identity, terminal: bool) -> Vec<(String, String)> {
    let mut environment = vec![
        ("PATH".to_owned(), PATH.to_owned()),
        ("HOME".to_owned(), identity.home.clone()),
    ];
    if let Some(name) = &identity.name {
        environment.push(("USER".to_owned(), name.clone()));
    }
    if terminal {
        environment.push(("TERM".to_owned(), "xterm-256color".to_owned()));
    }
    environment.retain(|(name, _)| !exec.env.iter().any(|(given, _)| given == name));
    environment.extend(exec.env.iter().cloned());
    environment
}

fn execute(exec: &Exec, environment: &[(String, String)]) -> Failure {
    let Some(program) = exec.argv.first().filter(|program| !program.is_empty()) else {
        return Failure {
            errno: Errno::INVAL,
            message: "there is no command".into(),
        };
    };
    let path = environment
        .iter()
        .find(|(name, _)| name == "PATH")
        .map(|(_, path)| path.as_str());
    let candidates = candidates(program, path.unwrap_or(PATH));
    let variables = environment
        .iter()
        .map(|(name, value)| format!("{name}={value}"));
    let words = (
        c_strings(exec.argv.iter().cloned()),
        c_strings(variables),
        c_strings(candidates),
    );
    let (Some(argv), Some(env), Some(candidates)) = words else {
        return Failure {
            errno: Errno::INVAL,
            message: "a word holds a zero byte".into(),
        };
    };
    let (argv, env) = (borrow(&argv), borrow(&env));
    let mut errno = Errno::NOENT;
    for candidate in &candidates {
        match sys::execve(candidate, &argv, &env) {
            Errno::NOENT | Errno::NOTDIR => {}
            // Another folder may hold one that can be executed.
            Errno::ACCESS => errno = Errno::ACCESS,
            other => {
                return Failure {
                    errno: other,
                    message: format!("{program}: {other}"),
                };
            }
        }
    }
    let message = match errno {
        Errno::NOENT => format!("{program}: not found"),
        errno => format!("{program}: {errno}"),
    };
    Failure { errno, message }
}

/// Where the program may be, in the order of PATH.
fn candidates(program: &str, path: &str) -> Vec<String> {
    if program.contains('/') {
        return vec![program.to_owned()];
    }
    let folder = |folder: &str| match folder {
        "" => format!("./{program}"),
        folder => format!("{folder}/{program}"),
    };
    path.split(':').map(folder).collect()
}

fn c_strings(strings: impl IntoIterator<Item = String>) -> Option<Vec<CString>> {
    strings
        .into_iter()
        .map(|string| CString::new(string).ok())
        .collect()
}

fn borrow(strings: &[CString]) -> Vec<&CStr> {
    strings.iter().map(CString::as_c_str).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_looked_up_in_the_order_of_path() {
        assert_eq!(candidates("sh", "/a:/b"), ["/a/sh", "/b/sh"]);
        assert_eq!(candidates("sh", ":/b:"), ["./sh", "/b/sh", "./sh"]);
        assert_eq!(candidates("./sh", "/a"), ["./sh"]);
        assert_eq!(candidates("/x/sh", "/a"), ["/x/sh"]);
    }

    #[test]
    fn the_given_environment_goes_over_the_expected_one() {
        let exec = Exec {
            argv: vec![],
            env: vec![("HOME".into(), "/h".into()), ("X".into(), String::new())],
            cwd: None,
            user: None,
            terminal: None,
            limits: vec![],
            builtin: None,
        };
        let identity = Identity {
            uid: 0,
            gid: 0,
            groups: vec![],
            home: "/root".into(),
            name: None,
        };
        let variable = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(
            environment(&exec, &identity, false),
            [
                variable("PATH", PATH),
                variable("HOME", "/h"),
                variable("X", "")
            ]
        );
        assert!(
            environment(&exec, &identity, true)
                .iter()
                .any(|(name, _)| name == "TERM")
        );
    }

    #[test]
    fn reports_come_back() {
        assert_eq!(parse_report(&[2, 0, 0, 0, b'x']), Some((2, "x".into())));
        assert_eq!(parse_report(&[2, 0]), None);
    }
}
