//! Whatever is killed at whatever moment: the next command finds a state that it knows and mends it.
//!
//! `msb` and its processes are killed at random points of create, start, stop and rm. A stand-in
//! for QEMU makes that quick; `MSB_KILLS=200 MSB_KILLS_VMM=qemu` boots real guests instead.
//! `MSB_KILLS_SEED` repeats a run.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use msb_testkit::msb::{Msb, Said, binary, said};
use rustix::fs::FlockOperation;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// How long a supervisor may take to finish what a killed command began.
const SETTLE: Duration = Duration::from_secs(20);

const CREATE: &[&str] = &[
    "create",
    "demo",
    "--name",
    "box",
    "-v",
    "./share:/x",
    "-v",
    "cache:/cache",
    "--mount-named",
    "data:/data:kind=disk,size=8M",
    "--mount-owned",
    "/own",
    "--mount-owned",
    "/own/disk:kind=disk,size=4M",
];

/// What is killed at once.
#[derive(Debug, Clone, Copy)]
enum Victim {
    /// The command that the user typed.
    Command,
    Supervisor,
    /// Both.
    Both,
    /// Any other process of the sandbox: a backend or the VMM.
    Part,
}

/// What is interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verb {
    Create,
    Start,
    Stop,
    Remove,
}

#[test]
fn whatever_is_killed_the_next_command_mends_it() -> Result<()> {
    let number = |name: &str| {
        std::env::var(name)
            .ok()
            .and_then(|text| text.parse::<u64>().ok())
    };
    let count = number("MSB_KILLS").unwrap_or(24);
    let seed = number("MSB_KILLS_SEED").unwrap_or_else(|| u64::from(std::process::id()) << 20 | 1);
    println!("MSB_KILLS={count} MSB_KILLS_SEED={seed}");
    let kills = Kills::new()?;
    let mut random = Random(seed);
    for point in 0..count {
        let verb =
            [Verb::Create, Verb::Start, Verb::Stop, Verb::Remove][usize::try_from(point % 4)?];
        let victim = match random.below(8) {
            0..3 => Victim::Command,
            3..5 => Victim::Supervisor,
            5..7 => Victim::Both,
            _ => Victim::Part,
        };
        let case = kills.interrupt(verb, victim, &mut random);
        let case =
            case.with_context(|| format!("point {point}, seed {seed}: {verb:?} {victim:?}"))?;
        println!("{point}: {verb:?} {victim:?} {case}");
    }
    Ok(())
}

/// A home whose VMM is a stand-in, and how long the verbs take in it.
struct Kills {
    msb: Msb,
    path: String,
    vmm: String,
    /// In the order of [`Verb`].
    took: [Duration; 4],
}

impl Kills {
    fn new() -> Result<Self> {
        let msb = Msb::new()?;
        msb.dir("share")?;
        let bin = msb.dir("bin")?;
        let real = std::env::var("MSB_KILLS_VMM").ok();
        if real.is_none() {
            let vmm = format!("qemu-system-{}", std::env::consts::ARCH);
            symlink(env!("CARGO_BIN_EXE_msb-stand-in"), bin.join(vmm))?;
        }
        let path = format!(
            "{}:{}",
            bin.display(),
            std::env::var("PATH").unwrap_or_default()
        );
        let mut this = Self {
            msb,
            path,
            vmm: real.unwrap_or_else(|| "qemu".to_owned()),
            took: [Duration::ZERO; 4],
        };
        let mut took = [Duration::ZERO; 4];
        // The second round finds its caches filled.
        for _ in 0..2 {
            let lines: [&[&str]; 4] = [
                CREATE,
                &["stop", "box"],
                &["start", "box"],
                &["rm", "-f", "box"],
            ];
            for (line, slot) in lines.into_iter().zip([0, 2, 1, 3]) {
                let since = Instant::now();
                this.must(line)?;
                took[slot] = since.elapsed();
            }
            this.must(&["volume", "rm", "cache", "data"])?;
        }
        this.took = took;
        println!("create, start, stop, rm take {took:?}");
        Ok(this)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = self.msb.command(args);
        command.env("PATH", &self.path).env("MSB_VMM", &self.vmm);
        command
    }

    fn run(&self, args: &[&str]) -> Result<Said> {
        said(&self.command(args).output()?)
    }

    fn must(&self, args: &[&str]) -> Result<String> {
        let said = self.run(args)?;
        ensure!(said.code == 0, "msb {args:?}: {said:?}");
        Ok(said.out)
    }

    /// Kills `victim` somewhere within `verb`, then checks what one command finds and leaves.
    fn interrupt(&self, verb: Verb, victim: Victim, random: &mut Random) -> Result<String> {
        let line: &[&str] = match verb {
            Verb::Create => CREATE,
            Verb::Start => &["start", "box"],
            Verb::Stop => &["stop", "box"],
            Verb::Remove => &["rm", "-f", "box"],
        };
        if verb != Verb::Create {
            self.must(CREATE)?;
        }
        if verb == Verb::Start {
            self.must(&["stop", "box"])?;
        }
        let span = self.took[verb as usize].as_micros() * 11 / 10;
        let delay = Duration::from_micros(random.below(u64::try_from(span)?.max(1)));
        // Without `timeout` in front, so that the process is the command itself.
        let template = self.command(line);
        let mut child = Command::new(binary("msb"));
        child
            .args(line)
            .current_dir(self.msb.path(""))
            .stdin(Stdio::null());
        child.envs(
            template
                .get_envs()
                .filter_map(|(name, value)| Some((name, value?))),
        );
        let mut child = child.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        sleep(delay);
        let own = i32::try_from(child.id())?;
        let killed = self.kill(own, victim, random)?;
        child.wait()?;
        self.settle()?;

        // The one command.
        let status = self.status()?;
        let found = format!("after {delay:?}, {killed} killed: {status:?}");
        self.nothing_is_left_soon(status.as_deref(), verb)
            .context(found.clone())?;
        // What is left can be used.
        match status.as_deref() {
            Some("running") => {
                let said = self.run(&["exec", "box", "--", "true"])?;
                // The supervisor may be about to notice that a part is missing: then it says so,
                // and what is typed next finds it stopped.
                if matches!(victim, Victim::Part) && said.err.contains("killed by signal 9") {
                    self.must(&["exec", "box", "--", "true"])?;
                } else {
                    ensure!(said.code == 0, "exec: {said:?}");
                }
            }
            Some(_) => {
                self.must(&["start", "box"])?;
                self.must(&["exec", "box", "--", "true"])?;
            }
            None => {}
        }
        if status.is_some() {
            self.must(&["rm", "-f", "box"])?;
        }
        let volumes = self.must(&["volume", "ls", "-q"])?;
        let volumes: Vec<&str> = volumes.lines().collect();
        if verb != Verb::Create || status.is_some() {
            assert_eq!(volumes, ["data", "cache"], "{found}");
        }
        if !volumes.is_empty() {
            self.must(&[&["volume", "rm"], volumes.as_slice()].concat())?;
        }
        self.nothing_is_left(None, Verb::Create)
            .context(found.clone())?;
        Ok(found)
    }

    /// Kills, and says how many processes.
    fn kill(&self, own: i32, victim: Victim, random: &mut Random) -> Result<usize> {
        let processes = self.msb.processes()?;
        let supervisors = processes
            .iter()
            .filter(|(_, line)| line.contains(" supervise "));
        let parts = || {
            let parts = processes
                .iter()
                .filter(|(pid, line)| *pid != own && !line.contains(" supervise "));
            parts.map(|(pid, _)| *pid).collect::<Vec<_>>()
        };
        let supervisors = supervisors.map(|(pid, _)| *pid);
        let pids: Vec<i32> = match victim {
            Victim::Command => vec![own],
            Victim::Supervisor => supervisors.collect(),
            Victim::Both => std::iter::once(own).chain(supervisors).collect(),
            Victim::Part => {
                let parts = parts();
                let chosen = random.below(u64::try_from(parts.len())?.max(1));
                parts
                    .get(usize::try_from(chosen)?)
                    .copied()
                    .into_iter()
                    .collect()
            }
        };
        for pid in &pids {
            // It may have ended by now.
            let _ = kill_process(Pid::from_raw(*pid).context("pid")?, Signal::KILL);
        }
        // On a busy machine a process that was killed can be met for a while.
        let is_there = |pid: &i32| {
            let line = fs::read(format!("/proc/{pid}/cmdline"));
            line.is_ok_and(|line| !line.is_empty())
        };
        let deadline = Instant::now() + SETTLE;
        while pids.iter().any(is_there) {
            ensure!(Instant::now() < deadline, "{pids:?} survive SIGKILL");
            sleep(Duration::from_millis(1));
        }
        Ok(pids.len())
    }

    /// Waits until the supervisor, if it was not killed, has finished what it was told.
    fn settle(&self) -> Result<()> {
        let deadline = Instant::now() + SETTLE;
        let state = self.msb.home().join("sandboxes/box/state.json");
        loop {
            let processes = self.msb.processes()?;
            let supervised = processes
                .iter()
                .any(|(_, line)| line.contains(" supervise "));
            let state: Option<Value> = fs::read(&state)
                .ok()
                .and_then(|text| serde_json::from_slice(&text).ok());
            let running = state.is_some_and(|state| state["status"] == "running");
            if processes.is_empty() || (supervised && running) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "these do not end: {processes:?}");
            sleep(Duration::from_millis(20));
        }
    }

    /// What is listed, once a supervisor that lives has begun or ended what it was told.
    fn status(&self) -> Result<Option<String>> {
        let deadline = Instant::now() + SETTLE;
        loop {
            let listed: Value = serde_json::from_str(&self.must(&["ls", "--format", "json"])?)?;
            let status = listed[0]["status"].as_str().map(str::to_owned);
            let passing = matches!(status.as_deref(), Some("starting" | "stopping"));
            if !passing || Instant::now() > deadline {
                return Ok(status);
            }
            sleep(Duration::from_millis(20));
        }
    }

    /// A supervisor that lives may be writing its state at this moment.
    fn nothing_is_left_soon(&self, status: Option<&str>, verb: Verb) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(3);
        loop {
            match self.nothing_is_left(status, verb) {
                Err(_) if Instant::now() < deadline => sleep(Duration::from_millis(100)),
                done => return done,
            }
        }
    }

    fn nothing_is_left(&self, status: Option<&str>, verb: Verb) -> Result<()> {
        ensure!(
            matches!(status, None | Some("running" | "stopped" | "failed")),
            "a sandbox in the state {status:?}"
        );
        let home = self.msb.home();
        for path in tree(&home)? {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let is_draft = [".draft-", ".new-", ".rm-", ".tmp"]
                .iter()
                .any(|prefix| name.starts_with(prefix));
            ensure!(
                !is_draft && name != "making",
                "left over: {}",
                path.display()
            );
        }
        let volumes: Vec<_> = names(&home.join("volumes"))?;
        let mut records = names(&home.join("state/volumes"))?;
        for record in &records {
            let text = fs::read(home.join("state/volumes").join(record))?;
            let record: Value = serde_json::from_slice(&text)?;
            ensure!(
                record["phase"] == "ready" && record.get("made_for").is_none(),
                "{record}"
            );
            if let Some(size) = record["capacity_bytes"].as_u64() {
                let disk = home.join("volumes/data/disk.raw");
                ensure!(fs::metadata(disk)?.len() == size, "half a disk");
            }
        }
        for record in &mut records {
            record.truncate(record.len() - ".json".len());
        }
        ensure!(volumes == records, "{volumes:?} are not {records:?}");
        if verb == Verb::Create && status.is_none() {
            ensure!(
                volumes.is_empty(),
                "no sandbox, but its volumes {volumes:?}"
            );
        }
        if status == Some("running") {
            return Ok(());
        }
        let processes = self.msb.processes()?;
        ensure!(processes.is_empty(), "left running: {processes:?}");
        let sockets = names(&home.join("run"))?;
        ensure!(sockets.is_empty(), "left sockets: {sockets:?}");
        for path in tree(&home)? {
            let name = path.file_name().unwrap_or_default();
            let is_lock = name == "lock"
                || name == ".lock"
                || path.extension().is_some_and(|end| end == "lock");
            if is_lock && path.is_file() {
                let free =
                    rustix::fs::flock(File::open(&path)?, FlockOperation::NonBlockingLockExclusive);
                free.with_context(|| format!("still locked: {}", path.display()))?;
            }
        }
        Ok(())
    }
}

/// What lies in a folder, by name, without what begins with a dot.
fn names(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    if folder.exists() {
        for entry in fs::read_dir(folder)? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
    }
    names.retain(|name| !name.starts_with('.'));
    names.sort();
    Ok(names)
}

/// Everything in the state folder but the content of images.
fn tree(home: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut waiting = vec![home.to_owned()];
    while let Some(folder) = waiting.pop() {
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            entries => entries?,
        };
        for entry in entries {
            let path = entry?.path();
            if path.is_dir() && !path.is_symlink() && !path.ends_with("rootfs") {
                waiting.push(path.clone());
            }
            found.push(path);
        }
    }
    if found.is_empty() {
        bail!("{} is empty", home.display());
    }
    Ok(found)
}

/// A generator that can be repeated (xorshift64*).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % limit
    }
}
