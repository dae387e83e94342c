//! Each kind of volume and each of its options, seen from the guest and from the host.

use std::fs;
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, ensure};
use msb_testkit::bridge::{obstacle, private_mounts};
use msb_testkit::msb::{Msb, Said, disk_image, host};

/// Prints the mount options of `$1`.
const OPTIONS: &str = "options() { awk -v p=$1 '$2 == p {o = $4} END {print o}' /proc/mounts; }\n";

#[test]
fn a_directory_is_shared_both_ways() -> Result<()> {
    let msb = Msb::new()?;
    msb.write("share/from-host", "hello")?;
    let said = msb.run(
        &["-v", "./share:/x"],
        "cat /x/from-host; mkdir -p /x/a/b; echo guest >/x/a/b/from-guest; mv /x/a/b/from-guest /x/moved;
         ln /x/moved /x/hard; ln -s moved /x/soft; cat /x/soft; chmod 640 /x/moved; chown 12:34 /x/moved;
         stat -c '%a %u %g %h' /x/moved; rm /x/from-host; ls -a /x",
    )?;
    ok(&said)?;
    assert_eq!(
        said.out,
        "helloguest\n640 12 34 2\n.\n..\na\nhard\nmoved\nsoft\n"
    );
    assert_eq!(msb.read("share/moved")?, "guest\n");
    ensure!(
        !msb.path("share/from-host").exists(),
        "the guest's rm did not reach the host"
    );
    // strict: the host's file stays private to the host's user, and is not the guest's 12:34.
    let host = fs::metadata(msb.path("share/moved"))?;
    assert_eq!(
        (host.mode() & 0o7777, host.uid(), host.ino()),
        (0o600, uid(), fs::metadata(msb.path("share/hard"))?.ino())
    );
    Ok(())
}

#[test]
fn a_read_only_directory_stays_so_whatever_the_guest_does() -> Result<()> {
    let msb = Msb::new()?;
    msb.write("share/file", "as it was")?;
    let said = msb.run(
        &["--mount-dir", "share:/x:ro,noexec,nosuid,nodev"],
        &format!(
            "{OPTIONS} options /x; cp /bin/busybox /x/; mount -o remount,rw /x; echo no >/x/file; echo no >/x/new;
             rm /x/file; mkdir /x/dir; chmod 777 /x/file; touch /x/file; mv /x/file /x/other; ln -s a /x/link; cat /x/file"
        ),
    )?;
    assert!(said.out.ends_with("as it was"), "{said:?}");
    for option in ["ro,", "nosuid", "nodev", "noexec"] {
        assert!(
            said.out.starts_with("ro,") && said.out.contains(option),
            "{option}: {said:?}"
        );
    }
    assert_eq!(
        fs::read_dir(msb.path("share"))?.count(),
        1,
        "the host's directory has changed"
    );
    assert_eq!(msb.read("share/file")?, "as it was");
    Ok(())
}

#[test]
fn noexec_stops_programs_and_not_interpreters() -> Result<()> {
    let msb = Msb::new()?;
    msb.write("share/script", "#!/bin/sh\necho ran\n")?;
    let said = msb.run(
        &["-v", "./share:/x:noexec", "-v", "./share:/y"],
        "chmod 755 /x/script; sh /x/script; /x/script; echo $?; /y/script",
    )?;
    assert_eq!(said.out, "ran\n126\nran\n", "{said:?}");
    Ok(())
}

#[test]
fn a_single_file_is_written_in_place_and_not_replaced() -> Result<()> {
    let msb = Msb::new()?;
    msb.write("config.toml", "level = 1\n")?;
    msb.write("fixed", "fixed\n")?;
    let said = msb.run(
        &[
            "--mount-file",
            "config.toml:/etc/app/config.toml",
            "-v",
            "./fixed:/etc/fixed:ro",
        ],
        "cat /etc/app/config.toml /etc/fixed; echo 'level = 2' >>/etc/app/config.toml; ls /etc/app;
         echo no >>/etc/fixed; echo x >/etc/app/new; mv /etc/app/new /etc/app/config.toml",
    )?;
    assert_eq!(said.out, "level = 1\nfixed\nconfig.toml\n", "{said:?}");
    assert!(
        said.err.contains("Read-only file system") && said.err.contains("busy"),
        "{said:?}"
    );
    assert_eq!(msb.read("config.toml")?, "level = 1\nlevel = 2\n");
    assert_eq!(msb.read("fixed")?, "fixed\n");
    Ok(())
}

#[test]
fn named_volumes_are_made_on_first_use_and_persist() -> Result<()> {
    let msb = Msb::new()?;
    let flags = [
        "-v",
        "cache:/cache",
        "--mount-named",
        "data:/data:kind=disk,size=64M",
    ];
    let first = msb.run(&flags, "echo one >/cache/file; echo two >/data/file; awk '$2 == \"/data\" {print $3}' /proc/mounts; df -m /data | awk 'NR == 2 {print ($2 > 40 && $2 < 65)}'")?;
    ok(&first)?;
    assert_eq!(first.out, "ext4\n1\n");
    assert_eq!(
        fs::read_to_string(msb.home().join("volumes/cache/file"))?,
        "one\n"
    );
    let disk = fs::metadata(msb.home().join("volumes/data/disk.raw"))?;
    assert_eq!(disk.len(), 64 << 20);
    assert!(
        disk.blocks() * 512 < disk.len() / 2,
        "the disk is not sparse"
    );
    // Without options the volume keeps its kind; with other ones the request is refused.
    let second = msb.run(
        &["-v", "cache:/cache:ro", "-v", "data:/data:ro"],
        "cat /cache/file /data/file; echo no >/data/file; echo no >/cache/file",
    )?;
    assert_eq!(second.out, "one\ntwo\n", "{second:?}");
    let third = msb.run(&["--mount-named", "data:/data:kind=disk,size=65M"], "true")?;
    assert!(third.code == 1 && third.err.contains("data"), "{third:?}");
    host(
        "e2fsck",
        [
            "-fn",
            &msb.home()
                .join("volumes/data/disk.raw")
                .display()
                .to_string(),
        ],
    )?;
    Ok(())
}

#[test]
fn a_volume_of_its_own_lives_and_goes_with_its_sandbox() -> Result<()> {
    let msb = Msb::new()?;
    let owned = [
        "/own:quota=8M,host-perms=mirror",
        "/own/disk:kind=disk,size=16M,noexec",
    ];
    let create = ["create", "demo", "--name", "box", "--mount-owned", owned[0]];
    ok(&msb.msb(create.into_iter().chain(["--mount-owned", owned[1]]))?)?;
    let begun = msb.exec(
        "box",
        "set -e; echo one >/own/file; mkdir -p /own/shut/below; echo x >/own/shut/below/file
         chmod 0 /own/shut/below /own/shut; echo two >/own/disk/file; df -m /own | awk 'NR == 2 {print $2}'
         dd if=/dev/zero of=/own/large bs=1M count=16 2>&1 | grep -o 'No space.*'; rm /own/large
         awk '$2 == \"/own/disk\" {print $3, $4 ~ /noexec/}' /proc/mounts",
    )?;
    assert_eq!(
        begun.out, "8\nNo space left on device\next4 1\n",
        "{begun:?}"
    );
    let shown = msb.msb(["inspect", "box"])?.out;
    assert!(
        shown.contains("/own → owned (rw)")
            && shown.contains("/own/disk → owned disk (16 MiB) (rw,noexec)"),
        "{shown}"
    );
    ok(&msb.msb(["restart", "box"])?)?;
    let kept = msb.exec("box", "cat /own/file /own/disk/file; stat -c %a /own/shut")?;
    assert_eq!(kept.out, "one\ntwo\n0\n", "{kept:?}");
    // Another sandbox has another one at the same place.
    let other = msb.run(
        &["--mount-owned", "/own"],
        "ls -A /own; echo x >/own/x; ls /own",
    )?;
    assert_eq!(other.out, "x\n", "{other:?}");
    let folder = msb.home().join("sandboxes/box");
    let ours = |name: &str| {
        fs::read_dir(&folder).is_ok_and(|mut all| {
            all.any(|entry| {
                entry.is_ok_and(|entry| entry.file_name().to_string_lossy().starts_with(name))
            })
        })
    };
    assert!(ours("volume-own"), "it lies elsewhere");
    ok(&msb.msb(["rm", "-f", "box"])?)?;
    assert!(!folder.exists() && msb.msb(["volume", "ls", "-q"])?.out.is_empty());
    Ok(())
}

#[test]
fn disk_images_of_every_format_are_mounted() -> Result<()> {
    let msb = Msb::new()?;
    msb.write("content/greeting", "from the image\n")?;
    for format in ["raw", "qcow2", "vmdk"] {
        disk_image(
            &msb.path(&format!("disk.{format}")),
            format,
            &msb.path("content"),
            32,
        )?;
    }
    let said = msb.run(
        &["--mount-disk", "disk.raw:/raw", "--mount-disk", "disk.qcow2:/qcow2:fstype=ext4", "--mount-disk", "disk.vmdk:/vmdk"],
        "for i in raw qcow2 vmdk; do cat /$i/greeting; dd if=/dev/urandom of=/$i/big bs=1M count=8 2>/dev/null; cp /$i/big /$i/copy;
         rm /$i/big; sync; done; md5sum /*/copy | cut -d ' ' -f 1",
    )?;
    ok(&said)?;
    let sums: Vec<_> = said.out.lines().skip(3).collect();
    for (format, sum) in ["qcow2", "raw", "vmdk"].iter().zip(sums) {
        // What the guest wrote is judged by qemu-img and by the file system's own checker.
        let image = msb.path(&format!("disk.{format}")).display().to_string();
        let raw = msb.path("judged.raw").display().to_string();
        host(
            "qemu-img",
            ["convert", "-f", format, "-O", "raw", &image, &raw],
        )?;
        host("e2fsck", ["-fn", &raw])?;
        let copy = msb.path("copy").display().to_string();
        host("debugfs", ["-R", &format!("dump /copy {copy}"), &raw])?;
        assert!(host("md5sum", [&copy])?.starts_with(sum), "{format}");
        if *format == "qcow2" {
            host("qemu-img", ["check", "-f", "qcow2", &image])?;
        }
    }
    Ok(())
}

#[test]
fn a_read_only_image_does_not_change_by_a_byte() -> Result<()> {
    let msb = Msb::new()?;
    msb.write("content/greeting", "from the image\n")?;
    for format in ["raw", "qcow2", "vmdk"] {
        disk_image(
            &msb.path(&format!("disk.{format}")),
            format,
            &msb.path("content"),
            32,
        )?;
    }
    let sum = || {
        host(
            "sha256sum",
            ["disk.raw", "disk.qcow2", "disk.vmdk"]
                .map(|name| msb.path(name).display().to_string()),
        )
    };
    let before = sum()?;
    let said = msb.run(
        &["--mount-disk", "disk.raw:/raw:ro,noexec", "--mount-disk", "disk.qcow2:/qcow2:ro", "--mount-disk", "disk.vmdk:/vmdk:ro"],
        "for i in raw qcow2 vmdk; do cat /$i/greeting; echo no >/$i/new; mount -o remount,rw /$i; done;
         for d in /dev/vd?; do dd if=/dev/zero of=$d bs=4096 count=1 conv=notrunc 2>/dev/null && echo $d; done; true",
    )?;
    // The one disk that can be written is the sandbox's own.
    assert!(
        said.out
            .starts_with("from the image\nfrom the image\nfrom the image\n"),
        "{said:?}"
    );
    assert!(said.out.lines().count() <= 4, "{said:?}");
    assert_eq!(sum()?, before);
    Ok(())
}

#[test]
fn tmpfs_has_its_size_and_flags_and_is_gone_afterwards() -> Result<()> {
    let msb = Msb::new()?;
    let said = msb.run(
        &["--tmpfs", "/scratch:8M:noexec,nosuid,nodev", "--tmpfs", "/tmp"],
        &format!("{OPTIONS} options /scratch; df -k /scratch | awk 'NR == 2 {{print $2}}'; stat -c %a /tmp /scratch;
         dd if=/dev/zero of=/scratch/big bs=1M count=20 2>&1 | grep -c 'No space'"),
    )?;
    let lines: Vec<_> = said.out.lines().collect();
    assert!(
        ["rw", "nosuid", "nodev", "noexec", "size=8192k"]
            .iter()
            .all(|o| lines[0].contains(o)),
        "{said:?}"
    );
    assert_eq!(lines[1..], ["8192", "1777", "755", "1"], "{said:?}");
    Ok(())
}

#[test]
fn nested_mounts_are_made_from_the_outside_in() -> Result<()> {
    let msb = Msb::new()?;
    msb.write("outer/file", "outer")?;
    msb.write("inner/file", "inner")?;
    msb.write("one", "one file")?;
    // Given in the wrong order on purpose, and of different kinds.
    let said = msb.run(
        &[
            "--mount-file",
            "one:/a/b/c/one",
            "--tmpfs",
            "/a/b/c:4M",
            "-v",
            "./inner:/a/b",
            "-v",
            "./outer:/a",
        ],
        "cat /a/file /a/b/file /a/b/c/one; awk '$2 ~ \"^/a\" {print $2}' /proc/mounts",
    )?;
    ok(&said)?;
    assert_eq!(said.out, "outerinnerone file/a\n/a/b\n/a/b/c\n/a/b/c/one\n");
    Ok(())
}

#[test]
fn the_root_file_system_is_the_sandboxs_own() -> Result<()> {
    let msb = Msb::new()?;
    let first = msb.run(&[], "echo changed >/etc/passwd; rm /bin/vi; echo new >/new; cat /new; stat -c '%a %u' /bin/busybox /root")?;
    ok(&first)?;
    assert!(
        first.out.starts_with("new\n") && first.out.ends_with(" 0\n"),
        "{first:?}"
    );
    let second = msb.run(&[], "head -n 1 /etc/passwd; ls /bin/vi; ls /new")?;
    assert_eq!(
        second.out, "root:x:0:0:root:/root:/bin/sh\n/bin/vi\n",
        "{second:?}"
    );
    // A directory serves as an image as well, and is not changed either.
    let third = msb.msb([
        "run",
        "./rootfs",
        "--",
        "sh",
        "-c",
        "echo x >/made; readlink /bin/sh; stat -c %a /tmp",
    ])?;
    ok(&third)?;
    assert!(third.out.starts_with("busybox\n"), "{third:?}");
    ensure!(
        !msb.path("rootfs/made").exists(),
        "the image directory was written to"
    );
    Ok(())
}

#[test]
fn a_tree_of_thousands_of_files_arrives_whole() -> Result<()> {
    let msb = Msb::new()?;
    let mut sources = 0;
    for folder in 0..40 {
        for file in 0..80 {
            msb.write(
                &format!("tree/d{folder}/f{file}.c"),
                format!(
                    "int f{folder}_{file}(void) {{ return {}; }}\n",
                    folder * file
                ),
            )?;
            sources += 1;
        }
    }
    let share = msb.dir("share")?;
    host(
        "tar",
        [
            "-C",
            &msb.path("tree").display().to_string(),
            "-cf",
            &share.join("tree.tar").display().to_string(),
            ".",
        ],
    )?;
    let said = msb.run(
        &["-v", "./share:/x", "--cpus", "2"],
        "cd /x && mkdir out && tar -C out -xf tree.tar && find out -type f | wc -l && cd out && find . -type f | sort | xargs cat | md5sum",
    )?;
    ok(&said)?;
    let ours = host(
        "sh",
        [
            "-c",
            &format!(
                "cd {} && find . -type f | LC_ALL=C sort | xargs cat | md5sum",
                msb.path("tree").display()
            ),
        ],
    )?;
    assert_eq!(said.out, format!("{sources}\n{ours}"));
    // The host sees what the guest unpacked, byte for byte.
    host(
        "diff",
        [
            "-r",
            &msb.path("tree").display().to_string(),
            &share.join("out").display().to_string(),
        ],
    )?;
    Ok(())
}

#[test]
fn a_mount_that_fails_says_which_and_why() -> Result<()> {
    let msb = Msb::new()?;
    fs::File::create(msb.path("empty.raw"))?.set_len(8 << 20)?;
    let said = msb.run(&["--mount-disk", "empty.raw:/data"], "true")?;
    assert!(
        said.code == 1 && said.err.contains("/data") && said.err.contains("file system"),
        "{said:?}"
    );
    msb.write("broken.qcow2", [0_u8; 4096])?;
    let said = msb.run(&["--mount-disk", "broken.qcow2:/data"], "true")?;
    assert!(
        said.code == 1 && said.err.contains("/data") && said.err.contains("qcow2"),
        "{said:?}"
    );
    Ok(())
}

fn ok(said: &Said) -> Result<()> {
    ensure!(said.code == 0, "the command failed: {said:?}");
    Ok(())
}

fn uid() -> u32 {
    fs::metadata("/proc/self").map_or(0, |own| own.uid())
}

#[test]
fn a_quota_is_one_account_for_all_sandboxes() -> Result<()> {
    let msb = Msb::new()?;
    for name in ["one", "two"] {
        let volume = "data:/data:kind=dir,quota=16M";
        let said = msb.msb(["create", "demo", "--name", name, "--mount-named", volume])?;
        ok(&said)?;
    }
    // Size, used and free in KiB, as df(1) shows them.
    let sizes = "df -k /data | awk 'END {print $(NF-4), $(NF-3), $(NF-2)}'";
    let write = |name: &str, file: &str| {
        msb.exec(
            name,
            &format!("dd if=/dev/zero of=/data/{file} bs=64k count=160 conv=fsync 2>&1"),
        )
    };
    // The folder itself takes a block.
    let taken = || -> Result<u64> {
        let said = host(
            "du",
            ["-sk".as_ref(), msb.home().join("volumes/data").as_os_str()],
        )?;
        let taken = said.split_whitespace().next().context("what du says")?;
        Ok(taken.parse()?)
    };
    for used in [0, 10_240] {
        if used > 0 {
            ok(&write("one", "a")?)?;
        }
        let taken = taken()?;
        ensure!((used..used + 8).contains(&taken), "{taken} KiB on the host");
        for name in ["one", "two"] {
            let said = msb.exec(name, sizes)?.out;
            // On tmpfs it takes none.
            let shown = (taken..=taken + 4)
                .map(|used| format!("16384 {used} {}\n", 16_384 - used))
                .any(|shown| shown == said);
            ensure!(shown, "{name}: {said} and {taken} on the host");
        }
    }
    let refused = write("two", "b")?;
    ensure!(
        refused.code != 0 && refused.out.contains("No space left on device"),
        "{refused:?}"
    );
    ensure!(taken()? <= 16_384, "more than the quota lies on the host");
    ok(&msb.exec("one", "rm /data/a /data/b")?)?;
    ok(&write("two", "c")?)?;
    for name in ["one", "two"] {
        ok(&msb.msb(["rm", "-f", name])?)?;
    }
    Ok(())
}

/// What the guest sees of a mount of the host below its share.
const BELOW: &str = r#"
device() { stat -c %d $1; }
cat /x/below/inner
# From now on it is mounted.
[ $(device /x) != $(device /x/below) ] && [ $(device /x/below) = $(device /x/below/inner) ] || echo one device
echo "x$(find /x -xdev -name inner)"
grep ' /x/below ' /proc/mounts | cut -d' ' -f3,4
df /x/below | awk 'NR > 1 {print $2}'
ln /x/top /x/below/linked 2>/dev/null || echo no link
mv /x/top /x/below/top && cat /x/below/top
umount /x && grep -c ' /x' /proc/mounts
cat /r/below/inner; (echo x >/r/below/new) 2>/dev/null || echo read only
"#;

#[test]
fn a_mount_below_a_share_is_a_mount_in_the_guest() -> Result<()> {
    if let Some(reason) = obstacle() {
        eprintln!("SKIPPED: a file system cannot be mounted on this machine: {reason}");
        return Ok(());
    }
    let msb = Msb::new()?;
    msb.write("share/top", "top\n")?;
    let below = msb.dir("share/below")?.display().to_string();
    private_mounts()?;
    host("mount", ["-t", "tmpfs", "-o", "size=1m", "none", &below])?;
    msb.write("share/below/inner", "inner\n")?;
    // Not every host's tmpfs has attributes for strict.
    let flags = [
        "-v",
        "./share:/x:nosuid,stat-virt=relaxed",
        "-v",
        "./share:/r:ro,stat-virt=relaxed",
    ];
    let said = msb.run(&flags, BELOW);
    host("umount", [&below])?;
    let said = said?;
    ensure!(
        said.out
            == "inner\nx\nvirtiofs rw,nosuid,relatime\n1024\nno link\ntop\n0\ninner\nread only\n",
        "{said:?}"
    );
    Ok(())
}
