//! A server under test: its process, where it runs, and what it takes of the machine.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// The CPU of the front end and that of the server, when they are pinned.
const FRONT_CPU: usize = 0;
const SERVER_CPU: usize = 1;

/// What a contender is in the comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Our backend as users get it: its ratio counts.
    Judged,
    /// Our backend in another configuration or build.
    Ours,
    /// The peer as it comes.
    Peer,
    /// The peer with flags that make it faster.
    TunedPeer,
    /// Our backend on a subject that is easier.
    Itself,
    /// No server: what the host gives without one.
    Native,
    /// What no server can do without, alone.
    Floor,
}

/// One of the programs that are compared, with its flags.
#[derive(Debug, Clone)]
pub struct Contender {
    /// How the table calls it.
    pub label: String,
    /// What it is in the comparison.
    pub role: Role,
    /// The program.
    pub program: PathBuf,
    /// Its flags; `{socket}` and `{subject}` are filled in.
    pub flags: Vec<String>,
}

/// A running server. Ended when dropped.
pub struct Server {
    child: Child,
    socket: PathBuf,
}

impl Contender {
    /// Starts it in `folder`, serving `subject`, and waits for its socket.
    ///
    /// # Errors
    ///
    /// When it does not start or does not listen within ten seconds.
    pub fn start(&self, folder: &Path, subject: &Path, pinned: bool) -> Result<Server> {
        let socket = folder.join("bench.sock");
        fs::remove_file(&socket).ok();
        fs::remove_file(folder.join("bench.sock.pid")).ok();
        let fill = |flag: &String| -> OsString {
            let text = flag
                .replace("{socket}", &socket.display().to_string())
                .replace("{subject}", &subject.display().to_string());
            text.into()
        };
        let log = fs::File::create(folder.join("server.log"))?;
        let mut command = Command::new(&self.program);
        command
            .args(self.flags.iter().map(fill))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let everywhere = sched_getaffinity(None)?;
        if pinned {
            // A child inherits it, with all that the child starts.
            on_cpu(SERVER_CPU)?;
        }
        let child = command.spawn();
        if pinned {
            on_cpu(FRONT_CPU)?;
        } else {
            sched_setaffinity(None, &everywhere)?;
        }
        let child = child.with_context(|| format!("starting {}", self.program.display()))?;
        let mut server = Server { child, socket };
        server.wait_for_socket(folder)?;
        Ok(server)
    }
}

/// Lets this thread run anywhere again.
///
/// # Errors
///
/// When the kernel refuses.
pub fn unpin() -> Result<()> {
    let mut all = CpuSet::new();
    for cpu in 0..CpuSet::MAX_CPU {
        all.set(cpu);
    }
    Ok(sched_setaffinity(None, &all)?)
}

fn on_cpu(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set).context("pinning to a CPU; --unpinned does without")
}

impl Server {
    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Process number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// CPU time of all its threads and those of its children.
    ///
    /// # Errors
    ///
    /// When it has ended.
    pub fn cpu(&self) -> Result<Duration> {
        let mut nanos = 0;
        for process in self.processes() {
            for task in fs::read_dir(format!("/proc/{process}/task"))?.flatten() {
                let Ok(text) = fs::read_to_string(task.path().join("schedstat")) else {
                    continue;
                };
                let first = text.split_whitespace().next().unwrap_or("0");
                nanos += first.parse::<u64>()?;
            }
        }
        Ok(Duration::from_nanos(nanos))
    }

    /// Resident memory in bytes.
    ///
    /// # Errors
    ///
    /// When it has ended.
    pub fn resident(&self) -> Result<u64> {
        let mut pages = 0;
        for process in self.processes() {
            let text = fs::read_to_string(format!("/proc/{process}/statm"))?;
            let field = text.split_whitespace().nth(1).unwrap_or("0");
            pages += field.parse::<u64>()?;
        }
        Ok(pages * rustix::param::page_size() as u64)
    }

    /// Number of open descriptors.
    ///
    /// # Errors
    ///
    /// When it has ended.
    pub fn descriptors(&self) -> Result<usize> {
        let mut count = 0;
        for process in self.processes() {
            count += fs::read_dir(format!("/proc/{process}/fd"))?.count();
        }
        Ok(count)
    }

    /// How often its threads have given their CPU away: each is a wake-up before.
    ///
    /// # Errors
    ///
    /// When it has ended.
    pub fn switches(&self) -> Result<u64> {
        let mut count = 0;
        for process in self.processes() {
            for task in fs::read_dir(format!("/proc/{process}/task"))?.flatten() {
                let text = fs::read_to_string(task.path().join("status")).unwrap_or_default();
                let line = text.lines().find(|line| line.starts_with("voluntary_ctxt"));
                let number = line.and_then(|line| line.split_whitespace().nth(1));
                count += number.unwrap_or("0").parse::<u64>()?;
            }
        }
        Ok(count)
    }

    /// The process and its children, oldest first.
    fn processes(&self) -> Vec<u32> {
        let mut found = vec![self.child.id()];
        let mut place = 0;
        while let Some(process) = found.get(place) {
            let path = format!("/proc/{process}/task/{process}/children");
            let text = fs::read_to_string(path).unwrap_or_default();
            found.extend(
                text.split_whitespace()
                    .filter_map(|pid| pid.parse::<u32>().ok()),
            );
            place += 1;
        }
        found
    }

    fn wait_for_socket(&mut self, folder: &Path) -> Result<()> {
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(10) {
            let there =
                fs::metadata(&self.socket).is_ok_and(|metadata| metadata.file_type().is_socket());
            if there {
                return Ok(());
            }
            if let Some(status) = self.child.try_wait()? {
                let log = fs::read_to_string(folder.join("server.log")).unwrap_or_default();
                bail!("the server ended with {status}: {}", log.trim());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        bail!("no socket at {} after ten seconds", self.socket.display())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Most end with their front end; qemu-storage-daemon wants to be told.
        let processes = self.processes();
        let stages = [
            (None, 10),
            (Some(Signal::TERM), 400),
            (Some(Signal::KILL), 400),
        ];
        for (signal, patience) in stages {
            for pid in processes.iter().filter_map(|pid| i32::try_from(*pid).ok()) {
                if let (Some(signal), Some(pid)) = (signal, Pid::from_raw(pid)) {
                    kill_process(pid, signal).ok();
                }
            }
            for _ in 0..patience {
                if matches!(self.child.try_wait(), Ok(Some(_))) {
                    return;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}
