//! Wrong command lines against the real program: message, exit code, and nothing made.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A machine on which everything that sandboxes need seems to be there.
struct Scratch {
    dir: tempfile::TempDir,
}

impl Scratch {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // The temporary folder of the machine may itself be reached through a symbolic link.
        let root = fs::canonicalize(dir.path()).unwrap();
        for folder in ["bin", "kernel/modules", "work/dir/sub", "work/rootfs"] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        for program in ["msb-fs", "msb-blk", "msb-agent", "qemu-system-x86_64"] {
            let path = root.join("bin").join(program);
            fs::write(&path, "#!/bin/sh\nexit 1\n").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        for file in ["kernel/vmlinuz", "kernel/modules/modules.dep"] {
            fs::write(root.join(file), "").unwrap();
        }
        let work = root.join("work");
        for file in ["file", "disk.raw", "disk.qcow2", "disk.vmdk"] {
            fs::write(work.join(file), "content").unwrap();
        }
        let conf = "image: ../rootfs\nname: described\nmemory: 1G\nmounts: [dir:/x:ro]\n";
        fs::write(work.join("dir/conf.yaml"), conf.replace("dir:", "../dir:")).unwrap();
        fs::write(work.join("bad.yaml"), "volumes: []\n").unwrap();
        fs::write(work.join("empty.yaml"), "{}\n").unwrap();
        symlink("dir", work.join("link")).unwrap();
        symlink("disk.raw", work.join("disk-link")).unwrap();
        let made = Command::new("mkfifo")
            .arg(work.join("fifo"))
            .status()
            .unwrap();
        assert!(made.success());
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        fs::canonicalize(self.dir.path()).unwrap().join(name)
    }

    fn msb(&self, args: &[&str]) -> Output {
        let path = std::env::var("PATH").unwrap_or_default();
        Command::new(env!("CARGO_BIN_EXE_msb"))
            .args(args)
            .current_dir(self.path("work"))
            .env("MSB_HOME", self.path("home"))
            .env("MSB_BIN_DIR", self.path("bin"))
            .env("MSB_KERNEL", self.path("kernel"))
            .env("MSB_LIBKRUN", self.path("none"))
            .env("PATH", format!("{}:{path}", self.path("bin").display()))
            .output()
            .unwrap()
    }

    fn must(&self, args: &[&str]) -> String {
        let output = self.msb(args);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "msb {args:?}: {said}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Everything in a folder, with the content of files.
    fn contents(&self, name: &str) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut found = BTreeMap::new();
        let mut waiting = vec![self.path(name)];
        while let Some(folder) = waiting.pop() {
            for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
                let kind = entry.file_type().unwrap();
                if kind.is_dir() {
                    waiting.push(entry.path());
                }
                if !is_housekeeping(&entry.path()) {
                    let content = if kind.is_file() {
                        fs::read(entry.path()).unwrap()
                    } else {
                        Vec::new()
                    };
                    found.insert(entry.path(), content);
                }
            }
        }
        found
    }
}

/// Folders that only say where things would be, and lock files.
fn is_housekeeping(path: &Path) -> bool {
    let folders = [
        "volumes",
        ".locks",
        "state",
        "sandboxes",
        "images",
        "run",
        "cache",
    ]
    .map(std::ffi::OsStr::new);
    path.extension().is_some_and(|end| end == "lock")
        || path.file_name().is_some_and(|name| folders.contains(&name))
}

/// Flags of `run` and `plan`, the exit code, and what is said.
const BAD: &[(&str, i32, &str)] = &[
    // Form.
    (
        "--mount-dir ./dir",
        1,
        "not in the form SOURCE:DEST[:OPTIONS]",
    ),
    (
        "--mount-dir ./dir:rel",
        1,
        "not in the form SOURCE:DEST[:OPTIONS]",
    ),
    ("-v cache", 1, "not in the form SOURCE:DEST[:OPTIONS]"),
    ("--mount-dir :/x", 1, "the source before `:/` is empty"),
    ("--mount-named :/x", 1, "the source before `:/` is empty"),
    (
        "--mount-dir ./dir:/x,ro",
        1,
        "options follow a `:`, not a `,`",
    ),
    (
        "--mount-dir ./dir:/x:ro:noexec",
        1,
        "more than one block of options",
    ),
    ("--tmpfs /x:", 1, "not in the form DEST[:SIZE][:OPTIONS]"),
    ("--tmpfs /x::ro", 1, "not in the form DEST[:SIZE][:OPTIONS]"),
    ("--tmpfs x", 1, "guest path `x` is not absolute"),
    // Guest paths.
    (
        "--mount-dir ./dir:/",
        1,
        "guest path `/` is the root directory",
    ),
    (
        "--mount-dir ./dir:/a/../b",
        1,
        "guest path `/a/../b` holds `..`",
    ),
    ("--mount-dir ./dir:/a;b", 1, "guest path `/a;b` holds `;`"),
    (
        "--mount-dir ./dir:/proc",
        1,
        "guest path `/proc` lies in /proc",
    ),
    ("--mount-dir ./dir:/dev/shm/x", 1, "lies in /dev"),
    ("--tmpfs /sys/fs", 1, "lies in /sys"),
    ("--tmpfs /.msb", 1, "lies in /.msb"),
    (
        "-v ./dir:/x --tmpfs //x/",
        1,
        "two volumes cannot be mounted at the same guest path `/x`",
    ),
    (
        "-v ./file:/x --tmpfs /x/y",
        1,
        "`/x/y` lies below `/x`, where a file is mounted",
    ),
    // Options.
    (
        "--mount-dir ./dir:/x:ro,rw",
        1,
        "mount option `ro`/`rw` is given more than once",
    ),
    (
        "--mount-dir ./dir:/x:noexec,noexec",
        1,
        "mount option `noexec` is given more than once",
    ),
    (
        "--mount-dir ./dir:/x:exec",
        1,
        "there is no mount option `exec`",
    ),
    (
        "--mount-dir ./dir:/x:RO",
        1,
        "`RO` is neither a mount flag nor `key=value`",
    ),
    (
        "--mount-dir ./dir:/x:foo=1",
        1,
        "unknown mount option `foo`",
    ),
    (
        "--mount-dir ./dir:/x:size=5",
        1,
        "mount option `size` is not valid here",
    ),
    (
        "--mount-named n:/x:fstype=ext4",
        1,
        "mount option `fstype` is not valid here",
    ),
    (
        "--mount-disk disk.raw:/x:stat-virt=off",
        1,
        "mount option `stat-virt` is not valid here",
    ),
    (
        "-v n:/x:kind=disk",
        1,
        "mount option `kind` is not valid here",
    ),
    (
        "--tmpfs /x:quota=5",
        1,
        "mount option `quota` is not valid here",
    ),
    (
        "--mount-dir ./dir:/x:stat-virt=x",
        1,
        "expected strict|relaxed|off",
    ),
    (
        "--mount-dir ./dir:/x:host-perms=x",
        1,
        "expected private|mirror",
    ),
    ("--mount-named n:/x:kind=x", 1, "expected dir|disk"),
    (
        "--mount-disk disk.raw:/x:format=iso",
        1,
        "expected raw|qcow2|vmdk",
    ),
    (
        "--mount-disk disk.raw:/x:fstype=",
        1,
        "is not a file system type",
    ),
    (
        "--mount-dir ./dir:/x:uid=5",
        1,
        "`uid` and `gid` are given together",
    ),
    (
        "--mount-dir ./dir:/x:stat-virt=off,uid=5,gid=5",
        1,
        "`uid` and `gid` need virtual owners",
    ),
    (
        "--mount-dir ./dir:/x:stat-virt=off,host-perms=mirror",
        1,
        "exclude each other",
    ),
    ("--mount-dir ./dir:/x:quota=5K", 1, "`5K` is not a size"),
    (
        "--mount-file file:/x:quota=5",
        1,
        "a quota limits what is in a directory",
    ),
    ("--tmpfs /x:5MB", 1, "`5MB` is not a size"),
    (
        "--tmpfs /x:5:size=6",
        1,
        "mount option `size` is given more than once",
    ),
    // Host paths.
    ("-v ./none:/x", 1, "/none`: No such file or directory"),
    (
        "--mount-dir ~/src:/x",
        1,
        "~/src`: No such file or directory",
    ),
    ("--mount-dir file:/x", 1, "/file`: is not a directory"),
    ("--mount-file dir:/x", 1, "/dir`: is not a regular file"),
    (
        "--mount-file /dev/null:/x",
        1,
        "`/dev/null`: is not a regular file",
    ),
    ("--mount-file fifo:/x", 1, "/fifo`: is not a regular file"),
    (
        "-v ./fifo:/x",
        1,
        "is a FIFO: only directories and regular files can be mounted",
    ),
    (
        "-v ./link:/x",
        1,
        "/link`: is a symbolic link; the directory is `",
    ),
    ("-v ./link/sub:/x", 1, "leads through the symbolic link `"),
    (
        "--mount-disk none.raw:/x",
        1,
        "/none.raw`: No such file or directory",
    ),
    ("--mount-disk dir:/x", 1, "/dir`: is not a regular file"),
    (
        "--mount-disk disk.raw:/x:ro --mount-disk disk-link:/y:ro",
        1,
        "are the same disk",
    ),
    // Volumes.
    ("-v .hidden:/x", 1, "`.hidden` is not a volume name"),
    ("-v a/b:/x", 1, "`a/b` is not a volume name"),
    ("--mount-named ./dir:/x", 1, "`./dir` looks like a path"),
    ("--mount-named n:/x:size=5", 1, "a size needs `kind=disk`"),
    (
        "--mount-named n:/x:kind=disk",
        1,
        "a disk volume cannot be made without a size",
    ),
    (
        "--mount-named n:/x:kind=disk,size=0",
        1,
        "a disk volume cannot have size 0",
    ),
    (
        "--mount-named n:/x:kind=disk,size=5,quota=5",
        1,
        "`quota` is for directory volumes",
    ),
    (
        "--mount-named n:/x:kind=disk,size=5,stat-virt=strict",
        1,
        "`stat-virt` is for directory",
    ),
    (
        "--mount-named disk:/x:kind=dir",
        1,
        "volume `disk` exists already as disk, but dir is asked",
    ),
    (
        "--mount-named dir:/x:kind=disk,size=5",
        1,
        "volume `dir` exists already as dir, but disk",
    ),
    (
        "--mount-named disk:/x:kind=disk,size=6",
        1,
        "a capacity of 5242880 bytes, but 6291456 bytes",
    ),
    (
        "--mount-named dir:/x:quota=5",
        1,
        "volume `dir` exists already with no quota, but a quota",
    ),
    ("-v disk:/x --mount-named disk:/y", 1, "are the same disk"),
    (
        "-v disk:/x:stat-virt=off",
        1,
        "volume `disk` is a disk volume, which takes no `stat-virt`",
    ),
    (
        "-v n:/x:quota=5 -v n:/y:quota=6",
        1,
        "volume `n` is asked for twice, in different ways",
    ),
    // The rest of a sandbox.
    ("--name -x", 2, ""),
    ("--name a/b", 1, "`a/b` is not a sandbox name"),
    ("--memory 5K", 2, "`5K` is not a size"),
    ("--memory 5", 1, "memory of 5 MiB is too small"),
    ("--root-disk 0", 1, "root disk of 0 MiB is too small"),
    ("--cpus 0", 2, "0 is not in 1..=255"),
    ("--env =x", 1, "`--env =x` has no name before `=`"),
    ("--label x", 2, "write it as NAME=VALUE"),
    ("--security none", 2, "invalid value 'none'"),
    ("--vmm libkrun", 1, "libkrun"),
    ("--mount-named -n:/x", 2, ""),
    ("--mount-dir", 2, "a value is required"),
    ("--no-such-flag", 2, "unexpected argument '--no-such-flag'"),
];

/// Whole command lines.
const BAD_LINES: &[(&str, i32, &str)] = &[
    ("", 2, "Usage: msb"),
    ("nonsense", 2, "unrecognized subcommand 'nonsense'"),
    ("plan", 2, "<IMAGE>"),
    (
        "run none -- true",
        1,
        "there is no image `none` in the local store",
    ),
    ("run .hidden", 1, "`.hidden` is not an image"),
    ("run ./none", 1, "/none`: No such file or directory"),
    ("run ./file", 1, "/file`: is not a directory"),
    (
        "run ./none.qcow2",
        1,
        "/none.qcow2`: No such file or directory",
    ),
    ("plan --conf none.yaml", 1, "cannot read `none.yaml`"),
    ("plan --conf bad.yaml", 1, "unknown field `volumes`"),
    ("plan --conf empty.yaml", 1, "there is no image"),
    (
        "run ./rootfs --fs-conf bad.yaml",
        1,
        "unknown field `volumes`",
    ),
    ("volume", 2, "Usage: msb volume"),
    ("volume create", 2, "<NAME"),
    ("volume create .x", 1, "`.x` is not a volume name"),
    ("volume create dir", 1, "volume `dir` exists already"),
    (
        "volume create n --kind disk",
        1,
        "a disk volume needs a size",
    ),
    ("volume create n --size 5", 1, "--size is for disk volumes"),
    (
        "volume create n --kind disk --size 0",
        1,
        "a disk volume cannot have size 0",
    ),
    (
        "volume create n --kind disk --size 5 --quota 5",
        1,
        "`quota` is for directory volumes",
    ),
    ("volume create n --kind floppy", 2, "invalid value 'floppy'"),
    (
        "volume create n --kind disk --size 5T",
        2,
        "`5T` is not a size",
    ),
    ("volume inspect none", 1, "volume `none` does not exist"),
    ("volume rm none", 1, "volume `none` does not exist"),
    ("volume rm", 2, "<NAME>"),
    ("cp ./file ./dir", 1, "neither side is in a sandbox"),
    ("cp a:/x b:/y", 1, "both sides are in a sandbox"),
    ("cp ./file none:/x", 1, "there is no sandbox `none`"),
    ("df --format yaml", 2, "invalid value 'yaml'"),
    ("volume ls --format yaml", 2, "invalid value 'yaml'"),
    ("completion none", 2, "invalid value 'none'"),
];

fn check(scratch: &Scratch, args: &[&str], code: i32, wanted: &str) {
    let before = (scratch.contents("home"), scratch.contents("work"));
    let output = scratch.msb(args);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "msb {args:?}: {said}");
    assert!(
        said.contains(wanted),
        "msb {args:?} said: {said}\nand not: {wanted}"
    );
    if code == 1 {
        assert!(said.starts_with("error: "), "msb {args:?}: {said}");
    }
    assert!(
        output.stdout.is_empty(),
        "msb {args:?}: {:?}",
        output.stdout
    );
    let after = (scratch.contents("home"), scratch.contents("work"));
    assert_eq!(before, after, "msb {args:?} changed something");
}

#[test]
fn wrong_flags_are_refused_before_anything_is_made() {
    let scratch = Scratch::new();
    scratch.must(&["volume", "create", "dir"]);
    scratch.must(&["volume", "create", "disk", "--kind", "disk", "--size", "5"]);
    for (flags, code, wanted) in BAD {
        for verb in ["plan", "run", "create"] {
            let mut args = vec![verb, "./rootfs"];
            args.extend(flags.split(' '));
            check(&scratch, &args, *code, wanted);
        }
    }
    for (line, code, wanted) in BAD_LINES {
        let args: Vec<&str> = line.split(' ').filter(|arg| !arg.is_empty()).collect();
        check(&scratch, &args, *code, wanted);
    }
    assert!(BAD.len() + BAD_LINES.len() >= 40);
}

#[test]
fn everything_wrong_is_said_at_once_each_with_a_way_out() {
    let scratch = Scratch::new();
    let output = scratch.msb(&[
        "run",
        "./rootfs",
        "-v",
        "./none:/a",
        "-v",
        "./link:/b",
        "--tmpfs",
        "/a",
        "--",
        "true",
    ]);
    let said = String::from_utf8_lossy(&output.stderr)
        .replace(&scratch.path("").display().to_string(), "/");
    expect_test::expect![[r#"
        error: two volumes cannot be mounted at the same guest path `/a`
          → give one of them another place
        error: `/work/none`: No such file or directory (os error 2)
        error: `/work/link`: is a symbolic link; the directory is `/work/dir`
          → use `/work/dir`, or add follow-root-symlinks if you trust whoever can change the link
    "#]]
    .assert_eq(&said);
}

#[test]
fn a_plan_is_printed_and_nothing_is_touched() {
    let scratch = Scratch::new();
    let plan = scratch.must(&[
        "plan",
        "./rootfs",
        "--name",
        "box",
        "-v",
        "./dir:/a:ro",
        "-v",
        "cache:/b",
        "--",
        "true",
    ]);
    let plan: serde_json::Value = serde_json::from_str(&plan).unwrap();
    assert_eq!(plan["name"], "box");
    assert_eq!(plan["guest"]["mounts"][0]["target"], "/a");
    assert_eq!(plan["volumes"][0]["name"], "cache");
    assert!(!scratch.path("home").exists());
}

#[test]
fn a_file_describes_a_sandbox_and_flags_go_before_it() {
    let scratch = Scratch::new();
    let args = [
        "plan",
        "--conf",
        "dir/conf.yaml",
        "--name",
        "mine",
        "-v",
        "./dir:/y",
    ];
    let plan: serde_json::Value = serde_json::from_str(&scratch.must(&args)).unwrap();
    assert_eq!(
        (plan["name"].as_str(), plan["vm"]["memory_bytes"].as_u64()),
        (Some("mine"), Some(1 << 30))
    );
    let root = scratch.path("work/rootfs").display().to_string();
    assert_eq!(plan["backends"][0]["device"]["source"]["path"], root);
    let shared = scratch.path("work/dir").display().to_string();
    for (backend, read_only) in [(2, true), (3, false)] {
        let device = &plan["backends"][backend]["device"];
        assert_eq!(
            (&device["source"]["path"], &device["read_only"]),
            (&shared.clone().into(), &read_only.into())
        );
    }
}

#[test]
fn volumes_are_managed_from_the_shell() {
    let scratch = Scratch::new();
    let empty = scratch.msb(&["volume", "ls"]);
    assert_eq!((empty.status.code(), empty.stdout.len()), (Some(0), 0));
    assert_eq!(
        String::from_utf8_lossy(&empty.stderr),
        "No volumes found.\n"
    );
    assert_eq!(scratch.must(&["volume", "ls", "--format", "json"]), "[]\n");

    assert_eq!(
        scratch.must(&["volume", "create", "a", "--label", "team=x"]),
        "a\n"
    );
    assert_eq!(
        scratch.must(&["volume", "create", "-q", "-n", "b", "--quota", "1G"]),
        ""
    );
    scratch.must(&["volume", "create", "c", "--kind", "disk", "--size", "1.5G"]);
    let mut names: Vec<_> = scratch
        .must(&["volume", "ls", "-q"])
        .lines()
        .map(str::to_owned)
        .collect();
    names.sort();
    assert_eq!(names, ["a", "b", "c"]);

    let volumes: serde_json::Value =
        serde_json::from_str(&scratch.must(&["volume", "ls", "--format", "json"])).unwrap();
    let disk = volumes
        .as_array()
        .unwrap()
        .iter()
        .find(|volume| volume["name"] == "c")
        .unwrap();
    assert_eq!(disk["kind"], "disk");
    assert_eq!(disk["capacity_bytes"], 3_u64 << 29);
    assert_eq!(
        (disk["disk_format"].as_str(), disk["disk_fstype"].as_str()),
        (Some("raw"), Some("ext4"))
    );
    assert!(disk["used_bytes"].as_u64().unwrap() < 64 << 20);
    assert!(disk["created_at"].as_str().unwrap().ends_with('Z'));

    let shown = scratch.must(&["volume", "inspect", "a"]);
    assert!(shown.contains("Labels:     team=x"), "{shown}");
    let table = scratch.must(&["volume", "ls"]);
    assert!(table.starts_with("NAME   KIND   SIZE"), "{table}");

    for (filters, names) in [
        (&["kind=disk"][..], "c\n"),
        (&["label=team"], "a\n"),
        (&["label=team=y"], ""),
        (&["name=b", "name=c", "kind=dir"], "b\n"),
        (&["dangling=false"], ""),
    ] {
        let filters = filters.iter().flat_map(|filter| ["--filter", *filter]);
        let args: Vec<_> = ["volume", "ls", "-q"].into_iter().chain(filters).collect();
        assert_eq!(scratch.must(&args), names, "{args:?}");
    }
    let wrong = scratch.msb(&["volume", "ls", "--filter", "size=1"]);
    assert_eq!(wrong.status.code(), Some(2));

    let partly = scratch.msb(&["volume", "rm", "a", "none", "c"]);
    assert_eq!(partly.status.code(), Some(1));
    assert_eq!(scratch.must(&["volume", "ls", "-q"]), "b\n");
}

#[test]
fn what_nobody_mounts_is_pruned_when_that_is_agreed() {
    let scratch = Scratch::new();
    for name in ["a", "b", "kept"] {
        let label = format!("for={name}");
        scratch.must(&["volume", "create", name, "--label", &label]);
    }
    let asked = scratch.msb(&["volume", "prune"]);
    let said = String::from_utf8_lossy(&asked.stderr);
    assert_eq!(asked.status.code(), Some(1));
    assert!(said.contains("--force"), "{said}");
    assert_eq!(scratch.must(&["volume", "ls", "-q"]).lines().count(), 3);
    scratch.must(&["volume", "prune", "-f", "--filter", "label=for=a"]);
    assert_eq!(scratch.must(&["volume", "ls", "-q"]).lines().count(), 2);
    // A sandbox that does not run still counts.
    let spec = microsandbox::Sandbox::builder("box")
        .image("/rootfs")
        .volume("/x", |v| v.named("kept"))
        .build()
        .unwrap();
    let sandbox = scratch.path("home/sandboxes/box");
    fs::create_dir_all(&sandbox).unwrap();
    fs::write(sandbox.join("lock"), "").unwrap();
    let spec = serde_json::to_vec(&spec).unwrap();
    fs::write(sandbox.join("spec.json"), spec).unwrap();
    scratch.must(&["volume", "prune", "-f", "-q"]);
    assert_eq!(scratch.must(&["volume", "ls", "-q"]), "kept\n");
    for (filter, names) in [
        ("volume=kept", "box\n"),
        ("volume=other", ""),
        ("status=created", "box\n"),
        ("status=running", ""),
        ("image=/rootfs", "box\n"),
    ] {
        let listed = scratch.must(&["ls", "-q", "--filter", filter]);
        assert_eq!(listed, names, "{filter}");
    }
    let nothing = scratch.msb(&["volume", "prune"]);
    assert_eq!(nothing.status.code(), Some(0));
}

#[test]
fn every_shell_is_completed() {
    let scratch = Scratch::new();
    for shell in ["bash", "zsh", "fish"] {
        assert!(
            scratch.must(&["completion", shell]).contains("mount-named"),
            "{shell}"
        );
    }
}

#[test]
fn every_verb_has_a_manual_page() {
    let scratch = Scratch::new();
    assert!(scratch.must(&["man"]).contains(".TH msb 1"));
    scratch.must(&["man", "pages"]);
    for page in ["msb.1", "msb-run.1", "msb-cp.1", "msb-volume-create.1"] {
        let text = fs::read_to_string(scratch.path("work/pages").join(page)).unwrap();
        assert!(text.contains(".SH OPTIONS"), "{page}: {text}");
    }
    assert!(!scratch.path("work/pages/msb-supervise.1").exists());
}

#[test]
fn sizes_are_true_and_say_what_can_be_freed() {
    let scratch = Scratch::new();
    scratch.must(&["volume", "create", "dir"]);
    scratch.must(&["volume", "create", "disk", "--kind", "disk", "--size", "1G"]);
    fs::write(scratch.path("home/volumes/dir/file"), vec![1; 1 << 20]).unwrap();
    let used: serde_json::Value =
        serde_json::from_str(&scratch.must(&["df", "--format", "json"])).unwrap();
    let sum = |class: &str| {
        let sums = used["summary"].as_array().unwrap();
        sums.iter().find(|sum| sum["type"] == class).unwrap()
    };
    let (dirs, disks) = (sum("dir-volume"), sum("disk-volume"));
    assert_eq!((&dirs["count"], &dirs["in_use"]), (&1.into(), &0.into()));
    assert_eq!(dirs["logical_bytes"], 1 << 20);
    assert_eq!(dirs["reclaimable_bytes"], dirs["allocated_bytes"]);
    assert_eq!(disks["logical_bytes"], 1 << 30);
    assert!(
        disks["allocated_bytes"].as_u64().unwrap() < 64 << 20,
        "{disks}"
    );
    let table = scratch.must(&["df", "--verbose"]);
    assert!(
        table.contains("disk volumes") && table.contains("1 GiB"),
        "{table}"
    );
}
