//! Programs of others in a guest: the host's own, served to it read-only, so that they judge us.

mod disk;
mod files;
mod posix;

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Stdio};

use anyhow::{Context, Result, ensure};
use msb_testkit::msb::{Msb, Said, host, kernel, said};
use msb_testkit::share::ORDINARY;
use msb_testkit::suites::tool;

/// How what belongs to this machine is shared.
const READ_ONLY: &str = "ro,stat-virt=relaxed";

/// Longest time a guest may take, in seconds: half a minute here, on a machine of its own.
const LIMIT: u32 = 500;

/// Where the guest finds the host's libraries, and whom the suites call on.
const PRELUDE: &str = r#"
set -e
# The programs of the host before busybox, a copy of which under another name is no program; but
# its mount, for that of the host is set-id, and not root's when an ordinary user serves it.
export PATH=/m:/usr/bin:/usr/sbin:/bin NO_COLOR=1
for name in lib lib64 sbin; do ln -s usr/$name /$name; done
printf 'daemon:x:1:1::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n' >>/etc/passwd
printf 'daemon:x:1:\nnogroup:x:65534:\n' >>/etc/group
mkdir -p /m/lib/modules
ln -s /kernel /m/lib/modules/$(uname -r)
ln -s /usr/bin/kmod /m/modprobe
for name in mount umount; do ln -s /bin/busybox /m/$name; done
# busybox would take its own modprobe, which knows no other folder. libkrun's kernel has all in it.
module() {
    for name; do grep -qw $name /proc/filesystems || /m/modprobe -d /m $name; done
}
"#;

/// Runs guests that have the programs of this machine.
struct Guest {
    msb: Msb,
    /// Who runs `msb`.
    user: u32,
}

impl Guest {
    /// Guests that root runs, or an ordinary user of the host.
    fn new(ordinary: bool) -> Result<Self> {
        let guest = Self {
            msb: Msb::new()?,
            user: if ordinary { ORDINARY } else { 0 },
        };
        guest.give(".")?;
        Ok(guest)
    }

    /// Makes everything below a path of the scratch folder belong to who runs `msb`.
    fn give(&self, name: &str) -> Result<PathBuf> {
        let path = self.msb.path(name);
        let owner = format!("{0}:{0}", self.user);
        host("chown", ["-hR", &owner, &path.display().to_string()])?;
        Ok(path)
    }

    /// A new folder of the scratch folder that can be shared.
    fn dir(&self, name: &str) -> Result<PathBuf> {
        self.msb.dir(name)?;
        self.give(name)
    }

    /// Starts `msb run demo FLAGS -- sh -c SCRIPT` with the host's programs in the guest.
    fn start(&self, flags: &[&str], script: &str) -> Result<Child> {
        let script = format!("{PRELUDE}{script}");
        let tools = tool("pjdfstest")?;
        let tools = tools.parent().context("no folder")?;
        // Where this machine is a guest of ours itself, its files take no metadata of ours.
        let tools = format!("{}:/tools:{READ_ONLY}", tools.canonicalize()?.display());
        let modules = kernel().join("modules").canonicalize()?;
        let modules = format!("{}:/kernel:{READ_ONLY}", modules.display());
        let programs = format!("/usr:/usr:{READ_ONLY}");
        let own = [
            "run", "demo", "-c", "2", "-v", &programs, "-v", &tools, "-v", &modules,
        ];
        let words = own.iter().chain(flags).copied();
        let mut command = self
            .msb
            .command_within(LIMIT, words.chain(["--", "sh", "-c", &script]));
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        if self.user != 0 {
            command.uid(self.user).gid(self.user);
        }
        command.spawn().context("starting msb")
    }

    /// Runs it to its end.
    fn run(&self, flags: &[&str], script: &str) -> Result<Said> {
        said(&self.start(flags, script)?.wait_with_output()?)
    }

    /// Runs it and returns what it printed.
    fn must(&self, flags: &[&str], script: &str) -> Result<String> {
        let said = self.run(flags, script)?;
        ensure!(
            said.code == 0,
            "{flags:?} ended with {}. The end of its output:\n{}\nand of its errors:\n{}\n{script}",
            said.code,
            end(&said.out),
            end(&said.err)
        );
        Ok(said.out)
    }
}

/// The last lines of what a suite printed: a log that is cut in its middle still has the reason.
fn end(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}
