//! A private `$MSB_HOME` with a small image in it, and `msb` run as a user would.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

/// Longest time one `msb` command may take, in seconds, unless `MSB_COMMAND_LIMIT` says otherwise.
const LIMIT: u32 = 150;

/// A state folder of its own, a scratch folder on the host, and the image `demo` (busybox).
pub struct Msb {
    scratch: TempDir,
}

/// How a command ended, as text.
#[derive(Debug)]
pub struct Said {
    /// Exit code; 128 plus the number of a signal that ended it.
    pub code: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Msb {
    /// Makes the folders and loads the image.
    ///
    /// # Errors
    ///
    /// When a program, the kernel or busybox is missing, with the way to get it.
    pub fn new() -> Result<Self> {
        let scratch = tempfile::Builder::new().prefix("msb-test.").tempdir()?;
        let this = Self { scratch };
        let kernel = kernel();
        ensure!(
            kernel.exists(),
            "no guest kernel at {}: run `make setup`",
            kernel.display()
        );
        let archive = this.path("demo.tar");
        rootfs_archive(&this.path("rootfs"), &archive)?;
        let loaded = this.msb([
            "image",
            "load",
            &archive.display().to_string(),
            "--name",
            "demo",
        ])?;
        ensure!(loaded.code == 0, "cannot load the image: {}", loaded.err);
        Ok(this)
    }

    /// Gives the image a further name.
    ///
    /// # Errors
    ///
    /// When it cannot be loaded.
    pub fn image(&self, name: &str) -> Result<()> {
        let archive = self.path("demo.tar").display().to_string();
        let loaded = self.msb(["image", "load", &archive, "--name", name])?;
        ensure!(loaded.code == 0, "cannot load the image: {}", loaded.err);
        Ok(())
    }

    /// A path in the scratch folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// The state folder.
    pub fn home(&self) -> PathBuf {
        self.path("home")
    }

    /// Writes a file of the scratch folder, with the folders above it.
    ///
    /// # Errors
    ///
    /// What the host reports.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> Result<PathBuf> {
        let path = self.path(name);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::write(&path, content).with_context(|| format!("writing {}", path.display()))?;
        Ok(path)
    }

    /// Makes a folder of the scratch folder.
    ///
    /// # Errors
    ///
    /// What the host reports.
    pub fn dir(&self, name: &str) -> Result<PathBuf> {
        let path = self.path(name);
        fs::create_dir_all(&path)?;
        Ok(path)
    }

    /// Reads a file of the scratch folder.
    ///
    /// # Errors
    ///
    /// What the host reports.
    pub fn read(&self, name: &str) -> Result<String> {
        let path = self.path(name);
        fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    }

    /// A command line of `msb` in the scratch folder, ended by force after a while.
    pub fn command<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        self.command_within(LIMIT, args)
    }

    /// The same, ended after so many seconds, or those of `MSB_COMMAND_LIMIT`.
    pub fn command_within<S: AsRef<OsStr>>(
        &self,
        seconds: u32,
        args: impl IntoIterator<Item = S>,
    ) -> Command {
        let limit = std::env::var_os("MSB_COMMAND_LIMIT");
        let mut command = self.inside("timeout");
        command
            .arg("--kill-after=20")
            .arg(limit.unwrap_or_else(|| seconds.to_string().into()))
            .arg(binary("msb"))
            .args(args);
        command
    }

    /// The same without an end.
    pub fn unlimited<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = self.inside(binary("msb"));
        command.args(args);
        command
    }

    /// A program in the scratch folder, told where everything is.
    fn inside(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command
            .current_dir(self.scratch.path())
            .env("MSB_HOME", self.home())
            .env("MSB_KERNEL", kernel())
            .env("MSB_BIN_DIR", bin_dir())
            .env("MSB_VMM", vmm())
            .stdin(Stdio::null());
        command
    }

    /// Runs `msb ARGS`.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn msb<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Result<Said> {
        said(&self.command(args).output().context("running msb")?)
    }

    /// Runs `msb run demo FLAGS -- sh -c SCRIPT`.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn run(&self, flags: &[&str], script: &str) -> Result<Said> {
        self.msb(
            ["run", "demo"]
                .iter()
                .chain(flags)
                .chain(&["--", "sh", "-c", script]),
        )
    }

    /// Runs `msb exec NAME -- sh -c SCRIPT`.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn exec(&self, name: &str, script: &str) -> Result<Said> {
        self.msb(["exec", name, "--", "sh", "-c", script])
    }

    /// Starts `msb run demo FLAGS -- sh -c SCRIPT` without `timeout` in front and returns while it
    /// runs; its output can be read.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn start(&self, flags: &[&str], script: &str) -> Result<Child> {
        self.unlimited(["run", "demo"])
            .args(flags)
            .args(["--", "sh", "-c", script])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting msb")
    }

    /// Processes whose command line names the state folder or the scratch folder: pid and command.
    ///
    /// # Errors
    ///
    /// When /proc cannot be read.
    pub fn processes(&self) -> Result<Vec<(i32, String)>> {
        let own = self.scratch.path().display().to_string();
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let Some(pid) = entry?
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok())
            else {
                continue;
            };
            let folder = PathBuf::from(format!("/proc/{pid}"));
            // A process may end at any time, and a kernel thread has no command line.
            let command = fs::read(folder.join("cmdline")).unwrap_or_default();
            let environment = fs::read(folder.join("environ")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            let environment = String::from_utf8_lossy(&environment);
            if command.contains(&own) || environment.contains(&own) {
                found.push((pid, command));
            }
        }
        Ok(found)
    }
}

/// A test that fails leaves no sandbox running.
impl Drop for Msb {
    fn drop(&mut self) {
        for (pid, line) in self.processes().unwrap_or_default() {
            if line.contains(" supervise ")
                && let Some(pid) = rustix::process::Pid::from_raw(pid)
            {
                // Its children end with it.
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }
}

/// The VMM that sandboxes of tests run on: `MSB_VMM`, or QEMU, which every machine can have.
fn vmm() -> String {
    std::env::var("MSB_VMM").unwrap_or_else(|_| "qemu".to_owned())
}

/// Whether the suite runs on none of these VMMs: the test then says so, with the reason.
pub fn unfit(fitting: &[&str], why: &str) -> bool {
    let vmm = vmm();
    let unfit = !fitting.contains(&vmm.as_str());
    if unfit {
        println!("SKIPPED on {vmm}: {why}");
    }
    unfit
}

/// Turns what a process printed into text.
///
/// # Errors
///
/// Never at present; kept so that callers can use `?` throughout.
pub fn said(output: &Output) -> Result<Said> {
    use std::os::unix::process::ExitStatusExt;
    let code = output
        .status
        .code()
        .or(output.status.signal().map(|signal| 128 + signal));
    Ok(Said {
        code: code.context("no exit status")?,
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// Runs a program of the host and returns what it printed.
///
/// # Errors
///
/// When it fails, with what it said.
pub fn host<S: AsRef<OsStr>>(program: &str, args: impl IntoIterator<Item = S>) -> Result<String> {
    let path = format!(
        "{}:/usr/sbin:/sbin",
        std::env::var("PATH").unwrap_or_default()
    );
    let output = Command::new(program)
        .args(args)
        .env("PATH", path)
        .output()
        .with_context(|| format!("running {program}"))?;
    ensure!(
        output.status.success(),
        "{program}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A disk image of `format` with an ext4 file system that holds the files of `content`.
///
/// # Errors
///
/// When mkfs.ext4 or qemu-img fails.
pub fn disk_image(path: &Path, format: &str, content: &Path, mib: u32) -> Result<()> {
    let raw = path.with_extension("making");
    fs::File::create(&raw)?.set_len(u64::from(mib) << 20)?;
    let (raw_text, path_text) = (raw.display().to_string(), path.display().to_string());
    host(
        "mkfs.ext4",
        ["-q", "-F", "-d", &content.display().to_string(), &raw_text],
    )?;
    host(
        "qemu-img",
        ["convert", "-f", "raw", "-O", format, &raw_text, &path_text],
    )?;
    Ok(fs::remove_file(raw)?)
}

/// The program `name` of this build.
pub fn binary(name: &str) -> PathBuf {
    bin_dir().join(name)
}

/// Folder of the programs under test: `MSB_BIN_DIR`, or where cargo put them.
pub fn bin_dir() -> PathBuf {
    std::env::var_os("MSB_BIN_DIR").map_or_else(
        || {
            // target/debug/deps/<test>: the programs lie one folder up.
            let test = std::env::current_exe().unwrap_or_default();
            test.ancestors().nth(2).unwrap_or(Path::new(".")).to_owned()
        },
        PathBuf::from,
    )
}

/// The guest kernel: `MSB_KERNEL`, or where set-up puts it.
pub fn kernel() -> PathBuf {
    from_setup("MSB_KERNEL", "kernel")
}

/// The static busybox that guests and images are made of.
pub fn busybox() -> PathBuf {
    from_setup("MSB_BUSYBOX", "busybox")
}

fn from_setup(variable: &str, name: &str) -> PathBuf {
    std::env::var_os(variable).map_or_else(
        || {
            Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("../target/guest")
                .join(name)
        },
        PathBuf::from,
    )
}

/// Makes a root file system of static busybox, as a folder and as a tar archive.
fn rootfs_archive(folder: &Path, archive: &Path) -> Result<()> {
    let busybox = busybox();
    ensure!(
        busybox.exists(),
        "no static busybox at {}: run `make setup`",
        busybox.display()
    );
    for name in ["bin", "etc", "root", "tmp", "var", "usr/bin"] {
        fs::create_dir_all(folder.join(name))?;
    }
    fs::copy(&busybox, folder.join("bin/busybox"))?;
    let busybox = busybox.display().to_string();
    for applet in host(&busybox, ["--list"])?
        .lines()
        .filter(|applet| *applet != "busybox")
    {
        symlink("busybox", folder.join("bin").join(applet))?;
    }
    fs::write(
        folder.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\n",
    )?;
    fs::write(folder.join("etc/group"), "root:x:0:\nuser:x:1000:\n")?;
    let (folder, archive) = (folder.display().to_string(), archive.display().to_string());
    host(
        "tar",
        [
            "-C",
            &folder,
            "--owner=0",
            "--group=0",
            "-cf",
            &archive,
            ".",
        ],
    )?;
    Ok(())
}
