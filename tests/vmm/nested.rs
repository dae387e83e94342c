//! The end-to-end suite on a real libkrun and a real cloud-hypervisor, nested where it must be.
//!
//! Both need hardware virtualisation. Where the machine has none, QEMU emulates one that has, with
//! AMD's SVM: it boots the guest kernel on this machine's files, read-only, loads kvm-amd and runs
//! the suite in there. That takes long, so it is done only when a variable names the program.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use msb_testkit::msb::{Msb, bin_dir, binary, kernel};
use msb_testkit::suites::tool;

/// Memory of the emulated machine, in MiB: it holds the suite's files and the guests'.
const MEMORY: u32 = 4096;

/// What the last line of the emulated machine's console begins with.
const VERDICT: &str = "NESTED-EXIT ";

#[test]
fn the_suite_passes_on_libkrun() -> Result<()> {
    suite("libkrun", "MSB_LIBKRUN")
}

#[test]
fn the_suite_passes_on_cloud_hypervisor() -> Result<()> {
    suite("cloud-hypervisor", "MSB_CLOUD_HYPERVISOR")
}

fn suite(vmm: &str, variable: &str) -> Result<()> {
    let Some(named) = std::env::var_os(variable) else {
        println!("SKIPPED: {vmm} is not tested, because {variable} names none");
        return Ok(());
    };
    let msb = Msb::new()?;
    let named = fs::canonicalize(&named).with_context(|| variable.to_owned())?;
    let filter = std::env::var("MSB_NESTED_FILTER").unwrap_or_default();
    let suites = [suite_program("vm-")?, suite_program("sdk_vm-")?];
    let tools = fs::canonicalize(tool("fsx")?)?;
    let script = format!(
        "export {variable}={named} MSB_VMM={vmm} MSB_BOOT_LIMIT=600 MSB_COMMAND_LIMIT=1200 \
         MSB_KILLS_VMM={vmm} MSB_KILLS=4 \
         MSB_BIN_DIR={bin} MSB_KERNEL={kernel} MSB_BUSYBOX={busybox} MSB_TOOLS={tools}\n{msb} doctor\n\
         failed=0\nfor suite in {suites}; do\n\
         $suite --test-threads=1 --nocapture {filter} || failed=$?\ndone\nexit $failed\n",
        named = named.display(),
        bin = bin_dir().display(),
        kernel = fs::canonicalize(kernel())?.display(),
        busybox = fs::canonicalize(kernel())?
            .with_file_name("busybox")
            .display(),
        msb = binary("msb").display(),
        suites = suites.map(|suite| suite.display().to_string()).join(" "),
        tools = tools.ancestors().nth(2).context("no folder")?.display(),
    );
    let cpu = fs::read_to_string("/proc/cpuinfo")?;
    let usable = fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok()
        && cpu
            .split_whitespace()
            .any(|word| word == "vmx" || word == "svm");
    if usable {
        let status = Command::new("sh").args(["-ec", &script]).status()?;
        ensure!(status.success(), "the suite on {vmm}: {status}");
        return Ok(());
    }
    let console = emulate(&msb, &script)?;
    println!("{console}");
    let verdict = console
        .lines()
        .rev()
        .find_map(|line| line.trim().strip_prefix(VERDICT));
    assert_eq!(verdict, Some("0"), "the suite on {vmm}");
    Ok(())
}

/// The newest build of a suite, which lies beside this program.
fn suite_program(prefix: &str) -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let mut found = Vec::new();
    for entry in fs::read_dir(own.parent().context("no folder")?)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_str().unwrap_or_default();
        if name.starts_with(prefix) && !name.contains('.') {
            found.push((entry.metadata()?.modified()?, entry.path()));
        }
    }
    let newest = found
        .into_iter()
        .max()
        .with_context(|| format!("no suite `{prefix}` is built"))?;
    Ok(newest.1)
}

/// Runs a script in an emulated machine with SVM, and returns what its console printed.
fn emulate(msb: &Msb, script: &str) -> Result<String> {
    let folder = msb.dir("machine")?;
    let path = |name: &str| folder.join(name).display().to_string();
    let init = folder.join("init");
    fs::write(folder.join("script"), script)?;
    fs::write(&init, init_script(&path("script"))?)?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
    let mut share = Command::new(binary("msb-fs"))
        .args([
            "--socket-path",
            &path("fs"),
            "--shared-dir",
            "/",
            "--tag",
            "host",
            "--readonly",
        ])
        .args([
            "--stat-virt",
            "off",
            "--cache",
            "always",
            "--sandbox",
            "none",
        ])
        .stdin(Stdio::null())
        .spawn()?;
    let image = kernel().join("vmlinuz");
    let line = format!(
        "console=ttyS0 quiet panic=-1 root=host rootfstype=virtiofs ro init={} \
         no_timer_check cryptomgr.notests random.trust_cpu=on initcall_blacklist=jent_mod_init \
         transparent_hugepage=never kvm.halt_poll_ns=0",
        init.display()
    );
    let waited = wait_for(&folder.join("fs"));
    let ended = waited.and_then(|()| {
        let status = Command::new("qemu-system-x86_64")
            .args([
                "-nodefaults",
                "-no-user-config",
                "-no-reboot",
                "-display",
                "none",
            ])
            .args([
                "-accel",
                "tcg,thread=multi",
                "-cpu",
                "max,+svm,+npt",
                // With two, the stack of a thread that runs a virtual CPU is overwritten after some
                // minutes of load, whichever VMM it belongs to: the emulator is not up to it.
                "-smp",
                "1",
            ])
            .args([
                "-machine",
                "q35,memory-backend=memory",
                "-m",
                &format!("{MEMORY}M"),
            ])
            .args([
                "-object",
                &format!("memory-backend-memfd,id=memory,size={MEMORY}M,share=on"),
            ])
            .arg("-kernel")
            .arg(&image)
            .args(["-append", &line])
            .args(["-chardev", &format!("socket,id=fs,path={}", path("fs"))])
            .args([
                "-device",
                "vhost-user-fs-pci,chardev=fs,tag=host,queue-size=1024",
            ])
            .args(["-device", "virtio-rng-pci"])
            .args(["-serial", &format!("file:{}", path("console"))])
            .status()?;
        ensure!(status.success(), "the emulated machine: {status}");
        Ok(())
    });
    share.kill()?;
    share.wait()?;
    ended?;
    Ok(String::from_utf8_lossy(&fs::read(folder.join("console"))?).into_owned())
}

fn wait_for(socket: &Path) -> Result<()> {
    for _ in 0..500 {
        if socket.exists() {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    anyhow::bail!("msb-fs does not listen");
}

/// The first process of the emulated machine: what is written goes to memory.
fn init_script(script: &str) -> Result<String> {
    let modules = fs::canonicalize(kernel().join("modules"))?;
    Ok(format!(
        "#!/bin/sh\n\
         export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n\
         mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev 2>/dev/null\n\
         mkdir -p /dev/pts /dev/shm; mount -t devpts pts /dev/pts; mount -t tmpfs shm /dev/shm\n\
         mount -t cgroup2 cgroup /sys/fs/cgroup; mount -t tmpfs run /run; ip link set lo up\n\
         mkdir -p /run/files /run/m/lib/modules\n\
         ln -s {modules} /run/m/lib/modules/$(uname -r)\n\
         for module in kvm_amd vhost_vsock; do modprobe -d /run/m $module; done; chmod 666 /dev/kvm\n\
         export HOME=/run/files TMPDIR=/run/files; cd /run/files\n\
         sh -e {script}\n\
         echo \"{VERDICT}$?\"; sync; echo o >/proc/sysrq-trigger; sleep 60\n",
        modules = modules.display(),
    ))
}
