//! The command lines of the documents, typed as they stand there, and what they do on both sides.

use std::fs;
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, ensure};
use msb_testkit::documents::{EVERYTHING, OPTIONS, documents, everything, relaxed_link};
use msb_testkit::msb::{Msb, Said};

/// A command line of the documents.
fn typed(msb: &Msb, line: &str) -> Result<Said> {
    let said = msb.msb(
        line.split_whitespace()
            .filter(|word| !matches!(*word, "msb" | "\\")),
    )?;
    ensure!(said.code == 0, "{line}: {said:?}");
    Ok(said)
}

#[test]
fn bind_mounts() -> Result<()> {
    let msb = documents()?;
    let said = typed(
        &msb,
        "msb create python --name dev \
           --mount-dir ./src:/app/src:ro,noexec \
           --mount-dir ./data:/app/data",
    )?;
    assert_eq!(said.out, "dev\n");
    let said = msb.exec(
        "dev",
        "cat /app/src/main.py /app/data/in; sh /app/src/tool; /app/src/tool; echo $?;
         echo no >/app/src/new; echo guest >/app/data/out",
    )?;
    assert_eq!(
        said.out, "print('from the host')\nfrom the host\nran\n126\n",
        "{said:?}"
    );
    assert!(said.err.contains("Read-only file system"), "{said:?}");
    assert_eq!(msb.read("data/out")?, "guest\n");
    assert!(!msb.path("src/new").exists());
    // Both ways, while it runs.
    msb.write("data/later", "seen\n")?;
    assert_eq!(msb.exec("dev", "cat /app/data/later")?.out, "seen\n");
    typed(&msb, "msb rm -f dev")?;

    typed(
        &msb,
        "msb create alpine --name config-reader \
           --mount-file ./config.toml:/etc/app/config.toml:ro,nodev",
    )?;
    let said = msb.exec(
        "config-reader",
        &format!("{OPTIONS} cat /etc/app/config.toml; echo no >>/etc/app/config.toml; options /etc/app/config.toml"),
    )?;
    ensure!(
        said.out.starts_with("level = 1\nvirtiofs ro,") && said.out.contains("nodev"),
        "{said:?}"
    );
    assert_eq!(msb.read("config.toml")?, "level = 1\n");
    typed(&msb, "msb rm -f config-reader")?;
    assert_eq!(msb.msb(["ls", "-q"])?.out, "");
    Ok(())
}

#[test]
fn named_volumes() -> Result<()> {
    let msb = documents()?;
    let volume = |name: &str| msb.home().join("volumes").join(name);
    assert_eq!(
        typed(&msb, "msb volume create pip-cache")?.out,
        "pip-cache\n"
    );
    ensure!(volume("pip-cache").is_dir(), "no folder was made");
    typed(&msb, "msb volume create docker-data --kind disk --size 20G")?;
    let disk = fs::metadata(volume("docker-data/disk.raw"))?;
    assert_eq!(disk.len(), 20 << 30);
    assert!(disk.blocks() * 512 < 64 << 20, "{} blocks", disk.blocks());

    // The documents say that the mount makes the volume when it is missing.
    typed(&msb, "msb volume rm pip-cache")?;
    typed(
        &msb,
        "msb create python --name worker \
           --mount-named pip-cache:/root/.cache/pip",
    )?;
    let said = msb.exec(
        "worker",
        "echo wheel >/root/.cache/pip/wheel; cat /root/.cache/pip/wheel",
    )?;
    assert_eq!(said.out, "wheel\n", "{said:?}");
    assert_eq!(fs::read_to_string(volume("pip-cache/wheel"))?, "wheel\n");
    let refused = msb.msb(["volume", "rm", "pip-cache"])?;
    ensure!(
        refused.code == 1 && refused.err.contains("worker"),
        "a mounted volume was removed, or it was not said who mounts it: {refused:?}"
    );
    let listed = msb.msb(["volume", "ls"])?.out;
    let row = |name: &str| {
        let row = listed.lines().find(|line| line.starts_with(name));
        row.map(str::to_owned).with_context(|| listed.clone())
    };
    ensure!(row("pip-cache")?.ends_with("worker"), "{listed}");
    ensure!(row("docker-data")?.ends_with('-'), "{listed}");
    typed(&msb, "msb rm -f worker")?;

    let create = "msb create docker:dind --name docker-demo \
           --mount-named docker-data:/var/lib/docker:kind=disk,size=20G";
    typed(&msb, create)?;
    let said = msb.exec(
        "docker-demo",
        &format!("{OPTIONS} options /var/lib/docker; df -m /var/lib/docker | awk 'NR == 2 {{print ($2 > 19000)}}'; echo layer >/var/lib/docker/layer"),
    )?;
    ensure!(
        said.out.starts_with("ext4 rw") && said.out.ends_with("\n1\n"),
        "{said:?}"
    );
    // One writer at a time.
    let second = msb.msb([
        "create",
        "alpine",
        "--name",
        "other",
        "-v",
        "docker-data:/x",
    ])?;
    ensure!(second.code == 1 && second.err.contains("/x"), "{second:?}");
    // `rm -f` keeps what a stop would have kept, although nothing was synced.
    typed(&msb, "msb rm -f docker-demo")?;
    assert_eq!(msb.msb(["ls", "-q"])?.out, "", "a refused sandbox was left");
    typed(&msb, create)?;
    let said = msb.exec("docker-demo", "cat /var/lib/docker/layer")?;
    assert_eq!(said.out, "layer\n", "{said:?}");
    typed(&msb, "msb rm -f docker-demo")?;

    typed(&msb, "msb volume create old-cache")?;
    let listed = typed(&msb, "msb volume ls")?.out;
    ensure!(
        ["old-cache", "pip-cache", "docker-data"]
            .iter()
            .all(|name| listed.contains(name)),
        "{listed}"
    );
    typed(&msb, "msb volume rm old-cache")?;
    ensure!(!volume("old-cache").exists(), "its folder was left");
    // The newest first: the mount has made pip-cache anew.
    assert_eq!(
        typed(&msb, "msb volume ls -q")?.out,
        "pip-cache\ndocker-data\n"
    );
    Ok(())
}

#[test]
fn disk_images_and_tmpfs() -> Result<()> {
    let msb = documents()?;
    let before = fs::read(msb.path("seed.raw"))?;
    typed(
        &msb,
        "msb create alpine --name seeded \
           --mount-disk ./seed.raw:/seed:ro,noexec,fstype=ext4",
    )?;
    let said = msb.exec(
        "seeded",
        &format!(
            "{OPTIONS} cat /seed/greeting; /seed/tool; echo $?; echo no >/seed/new; options /seed"
        ),
    )?;
    ensure!(
        said.out.starts_with("from the image\n126\next4 ro,") && said.out.contains("noexec"),
        "{said:?}"
    );
    typed(&msb, "msb rm -f seeded")?;
    ensure!(
        fs::read(msb.path("seed.raw"))? == before,
        "the read-only image has changed"
    );

    typed(
        &msb,
        "msb create alpine --name worker \
           --tmpfs /tmp/scratch:100:noexec",
    )?;
    let said = msb.exec(
        "worker",
        &format!("{OPTIONS} options /tmp/scratch; echo gone >/tmp/scratch/x; df -m /tmp/scratch | awk 'NR == 2 {{print $2}}'"),
    )?;
    ensure!(
        said.out.starts_with("tmpfs rw,")
            && said.out.contains("noexec")
            && said.out.ends_with("\n100\n"),
        "{said:?}"
    );
    typed(&msb, "msb restart worker")?;
    assert_eq!(msb.exec("worker", "ls /tmp/scratch")?.out, "");
    typed(&msb, "msb rm -f worker")?;
    Ok(())
}

#[test]
fn everything_combined() -> Result<()> {
    let msb = documents()?;
    typed(
        &msb,
        "msb create python --name full \
           --mount-dir ./src:/app/src:ro,noexec \
           --mount-file ./pyproject.toml:/app/pyproject.toml:ro \
           --mount-named pip-cache:/root/.cache/pip:stat-virt=relaxed \
           --mount-disk ./dataset.qcow2:/dataset:ro,format=qcow2,fstype=ext4 \
           --tmpfs /tmp:1G:noexec,nosuid,nodev",
    )?;
    let said = msb.exec("full", &everything())?;
    assert_eq!(said.out, EVERYTHING, "{said:?}");
    relaxed_link(&msb)?;
    let shown = msb.msb(["inspect", "full"])?.out;
    for line in [
        "/app/pyproject.toml → ",
        "/app/src → ",
        "/dataset → disk:",
        "/root/.cache/pip → volume:pip-cache (rw) [stat-virt=relaxed]",
        "/tmp → tmpfs (1 GiB) (rw,noexec,nosuid,nodev)",
    ] {
        assert!(shown.contains(line), "{line}: {shown}");
    }
    typed(&msb, "msb rm -f full")?;
    Ok(())
}

/// Every flag of the documents' table with every option that it takes, and what `/proc/mounts` must
/// show for it.
const FLAGS: &[(&str, &str, &str, &str)] = &[
    ("--mount-dir", "./rw:/o/dir-rw:rw", "/o/dir-rw", "rw"),
    (
        "--mount-dir",
        "./ro:/o/dir:ro,noexec,nosuid,nodev",
        "/o/dir",
        "ro,noexec,nosuid,nodev",
    ),
    (
        "--mount-dir",
        "./mirror:/o/mirror:stat-virt=strict,host-perms=mirror",
        "/o/mirror",
        "rw",
    ),
    (
        "--mount-dir",
        "./private:/o/private:host-perms=private",
        "/o/private",
        "rw",
    ),
    (
        "-v",
        "./off:/o/off:stat-virt=off,nosuid",
        "/o/off",
        "rw,nosuid",
    ),
    (
        "--mount-file",
        "./config.toml:/o/file:rw,noexec,nosuid,nodev,stat-virt=relaxed,host-perms=private",
        "/o/file",
        "rw,noexec,nosuid,nodev",
    ),
    (
        "--mount-named",
        "limited:/o/limited:rw,kind=dir,quota=16M,noexec,nosuid,nodev,stat-virt=strict,host-perms=mirror",
        "/o/limited",
        "rw,noexec,nosuid,nodev",
    ),
    (
        "--mount-named",
        "block:/o/block:kind=disk,size=8M,ro,noexec,nosuid,nodev",
        "/o/block",
        "ro,noexec,nosuid,nodev",
    ),
    (
        "--mount-disk",
        "./seed.raw:/o/image:rw,noexec,nosuid,nodev,format=raw,fstype=ext4",
        "/o/image",
        "rw,noexec,nosuid,nodev",
    ),
    (
        "--tmpfs",
        "/o/tmp:8M:rw,noexec,nosuid,nodev",
        "/o/tmp",
        "rw,noexec,nosuid,nodev",
    ),
    (
        "--tmpfs",
        "/o/small:size=4M,ro",
        "/o/small",
        "ro,size=4096k",
    ),
];

#[test]
fn every_option_of_every_flag() -> Result<()> {
    let msb = documents()?;
    for folder in ["rw", "ro", "mirror", "private", "off"] {
        msb.dir(folder)?;
    }
    // In two sandboxes: libkrun has room for five volumes beside the root.
    for (name, flags) in [("one", &FLAGS[..5]), ("two", &FLAGS[5..])] {
        every_option(&msb, name, flags)?;
    }
    // What the guest says of a file, and what the host then sees of it.
    let touched = |name: &str, folders: &str| {
        let script =
            "touch /o/$d/f && chown 7:8 /o/$d/f && chmod 751 /o/$d/f && stat -c '%u:%g %a' /o/$d/f";
        msb.exec(name, &format!("for d in {folders}; do {script}; done"))
    };
    // In `off` the host's own rights decide: a share's owner gives nothing away.
    let of_guest = "7:8 751\n";
    let said = touched("one", "mirror private off")?;
    ensure!(said.out.starts_with(&of_guest.repeat(2)), "{said:?}");
    let said = touched("two", "limited")?;
    ensure!(said.out == of_guest, "{said:?}");
    let sizes = "df -m /o/limited /o/block | awk 'NR > 1 {print ($2 <= 16)}'";
    let said = msb.exec("two", sizes)?;
    ensure!(said.out == "1\n1\n", "{said:?}");
    let mode = |path: &str| -> Result<u32> {
        Ok(fs::metadata(msb.path(path))
            .context(path.to_owned())?
            .mode()
            & 0o777)
    };
    assert_eq!(mode("mirror/f")? & 0o700, 0o700, "mirror");
    assert_eq!(mode("mirror/f")?, 0o751, "mirror");
    assert_eq!(mode("private/f")?, 0o600, "private");
    ensure!(
        fs::metadata(msb.path("private/f"))?.uid() != 7,
        "the owner is only recorded"
    );
    let removed = msb.msb(["rm", "-f", "one", "two"])?;
    ensure!(removed.code == 0, "{removed:?}");
    Ok(())
}

/// Creates a sandbox with these mounts and compares their options.
fn every_option(msb: &Msb, name: &str, flags: &[(&str, &str, &str, &str)]) -> Result<()> {
    let mut args = vec!["create", "alpine", "--name", name];
    args.extend(flags.iter().flat_map(|(flag, mount, ..)| [*flag, *mount]));
    let said = msb.msb(args)?;
    ensure!(said.code == 0, "{said:?}");
    for (flag, mount, target, wanted) in flags {
        let shown = msb.exec(name, &format!("{OPTIONS} options {target}"))?.out;
        let options: Vec<&str> = shown.trim().split([' ', ',']).collect();
        for option in wanted.split(',') {
            ensure!(options.contains(&option), "{flag} {mount}: {shown}");
        }
        for option in ["noexec", "nosuid", "nodev"] {
            ensure!(
                wanted.contains(option) || !options.contains(&option),
                "{flag} {mount}: {shown}"
            );
        }
    }
    Ok(())
}
