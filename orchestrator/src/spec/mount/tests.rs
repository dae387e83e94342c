//! What mount flags mean, and which class of message each mistake gets.

use super::*;
use crate::spec::{DiskImageFormat, HostPermissions, ShareOptions, StatVirtualization, VolumeKind};

use MountFlag::{Dir, Disk, File, Named, Owned, Tmpfs, Volume};

fn parse(flag: MountFlag, text: &str) -> Result<MountSpec, MountError> {
    parse_mount(flag, text, Path::new("/w"))
}

fn problem(flag: MountFlag, text: &str) -> MountProblem {
    match parse(flag, text) {
        Ok(mount) => panic!("{flag} {text} was accepted: {mount:?}"),
        Err(error) => error.problem,
    }
}

#[test]
fn sources_and_targets_are_split_at_the_first_colon_before_a_slash() {
    for (flag, text, source, target) in [
        (Volume, "./a:/b", "/w/a", "/b"),
        (Volume, "/x:y:/b", "/x:y", "/b"),
        (Volume, "..:/b/", "/b", "/b"),
        (Dir, "src://b//c", "/w/src", "/b/c"),
        (Dir, "dir with space:/b c", "/w/dir with space", "/b c"),
        (File, "./a,b;c:/b", "/w/a,b;c", "/b"),
    ] {
        let mount = parse(flag, text).unwrap();
        assert_eq!(mount.target.as_str(), target, "{text}");
        let MountSource::Bind { path, .. } = &mount.source else {
            panic!("{text}: {mount:?}");
        };
        let wanted = if text == "..:/b/" { "/" } else { source };
        assert_eq!(path, Path::new(wanted), "{text}");
    }
}

#[test]
fn names_and_paths_are_told_apart_by_how_they_begin() {
    let named = parse(Volume, "cache:/c").unwrap();
    assert!(matches!(
        named.source,
        MountSource::Named {
            mode: NamedVolumeMode::EnsureExists,
            ..
        }
    ));
    for path in ["./cache:/c", "../cache:/c", "/cache:/c", ".:/c", "..:/c"] {
        let mount = parse(Volume, path).unwrap();
        assert!(
            matches!(mount.source, MountSource::Bind { expect: None, .. }),
            "{path}"
        );
    }
    for name in [".hidden:/c", "vol/x:/c", "a b:/c", "~/src:/c", "ä:/c"] {
        assert!(
            matches!(problem(Volume, name), MountProblem::Name(_)),
            "{name}"
        );
    }
    for path in ["./x:/y", "/x:/y", "~/x:/y", "a/b:/y"] {
        assert!(
            matches!(problem(Named, path), MountProblem::PathAsName(_)),
            "{path}"
        );
    }
}

#[test]
fn options_are_trimmed_and_empty_ones_skipped() {
    for block in ["ro,noexec", " ro , noexec ", "ro,,noexec", ",ro,noexec,"] {
        let mount = parse(Dir, &format!("./a:/b:{block}")).unwrap();
        assert_eq!(
            (mount.access, mount.noexec),
            (Access::ReadOnly, true),
            "{block}"
        );
        assert!(!mount.nosuid && !mount.nodev);
    }
    assert_eq!(
        parse(Dir, "./a:/b:").unwrap(),
        parse(Dir, "./a:/b:rw").unwrap()
    );
}

#[test]
fn share_options_are_read() {
    let text =
        "./a:/b:stat-virt=relaxed,host-perms=mirror,uid=1,gid=2,quota=1G,follow-root-symlinks";
    let mount = parse(Dir, text).unwrap();
    let share = ShareOptions {
        stat_virtualization: Some(StatVirtualization::Relaxed),
        host_permissions: Some(HostPermissions::Mirror),
        owner: Some((1, 2)),
        quota: Some(Mebibytes(1024)),
        cache: None,
    };
    assert_eq!(
        mount.source,
        MountSource::Bind {
            path: PathBuf::from("/w/a"),
            expect: Some(BindKind::Directory),
            follow_root_symlinks: true,
            share,
        }
    );
}

#[test]
fn volumes_carry_what_is_asked_of_them() {
    let request = |text: &str| match parse(Named, text).unwrap().source {
        MountSource::Named { request, .. } => request,
        other => panic!("{other:?}"),
    };
    assert_eq!(request("n:/x"), VolumeRequest::default());
    let disk = request("n:/x:kind=disk,size=20G");
    assert_eq!(
        (disk.kind, disk.size),
        (Some(VolumeKind::Disk), Some(Mebibytes(20480)))
    );
    let dir = request("n:/x:kind=directory,quota=5");
    assert_eq!(
        (dir.kind, dir.quota),
        (Some(VolumeKind::Directory), Some(Mebibytes(5)))
    );
}

#[test]
fn a_volume_of_its_own_has_no_name() {
    let mount = parse(Owned, "/x:kind=disk,size=1G,ro").unwrap();
    let MountSource::Owned { request, share } = &mount.source else {
        panic!("{mount:?}");
    };
    assert_eq!(
        (request.kind, request.size, mount.access),
        (
            Some(VolumeKind::Disk),
            Some(Mebibytes(1024)),
            Access::ReadOnly
        )
    );
    assert_eq!(*share, ShareOptions::default());
    let mount = parse(Owned, "/x").unwrap();
    assert!(matches!(mount.source, MountSource::Owned { request, .. }
        if request == VolumeRequest::default()));
    assert!(parse(Owned, "/x:quota=5,stat-virt=relaxed,uid=1,gid=1").is_ok());
    let named = problem(Owned, "cache:/x");
    assert!(matches!(named, MountProblem::Form(_)), "{named:?}");
    assert_eq!(problem(Owned, "/x:ro:noexec"), MountProblem::SecondBlock);
}

#[test]
fn disk_images_may_say_format_and_file_system() {
    let mount = parse(Disk, "d.img:/x:format=qcow2,fstype=ext4").unwrap();
    assert_eq!(
        mount.source,
        MountSource::Disk {
            path: PathBuf::from("/w/d.img"),
            format: Some(DiskImageFormat::Qcow2),
            fstype: Some("ext4".to_owned()),
        }
    );
    assert!(parse(Disk, "d.vmdk:/x").is_ok());
}

#[test]
fn tmpfs_takes_a_size_and_options_in_either_place() {
    for (text, size, access) in [
        ("/t", None, Access::ReadWrite),
        ("/t:100", Some(100), Access::ReadWrite),
        ("/t:1G:ro,noexec", Some(1024), Access::ReadOnly),
        ("/t:ro", None, Access::ReadOnly),
        ("/t:size=5,ro", Some(5), Access::ReadOnly),
        ("/t:0", Some(0), Access::ReadWrite),
        ("/t:100:", Some(100), Access::ReadWrite),
    ] {
        let mount = parse(Tmpfs, text).unwrap();
        assert_eq!(
            mount.source,
            MountSource::Tmpfs {
                size: size.map(Mebibytes)
            },
            "{text}"
        );
        assert_eq!(mount.access, access, "{text}");
    }
}

#[test]
fn mistakes_of_form_are_told_apart() {
    for (flag, text) in [
        (Volume, "x"),
        (Dir, "./a:b"),
        (Named, ""),
        (Tmpfs, "/t:"),
        (Tmpfs, "/t::ro"),
    ] {
        assert!(
            matches!(problem(flag, text), MountProblem::Form(_)),
            "{flag} {text}"
        );
    }
    assert_eq!(problem(Dir, ":/x"), MountProblem::EmptySource);
    assert_eq!(
        problem(Dir, "./a:/b,ro,noexec"),
        MountProblem::CommaBeforeOptions("./a:/b:ro,noexec".to_owned())
    );
    assert_eq!(problem(Dir, "./a:/b:ro:noexec"), MountProblem::SecondBlock);
    assert_eq!(problem(Tmpfs, "/t:1:ro:nodev"), MountProblem::SecondBlock);
    assert_eq!(problem(Tmpfs, "/t:ro:nodev"), MountProblem::SecondBlock);
    for target in ["/", "/a/../b", "/a,b", "/a;b", "/proc", "/.msb/x"] {
        let text = format!("./a:{target}");
        assert!(
            matches!(problem(Dir, &text), MountProblem::Target(_)),
            "{text}"
        );
    }
    assert!(matches!(
        problem(Tmpfs, "t"),
        MountProblem::Target(NameError::Relative(_))
    ));
    assert!(matches!(problem(Tmpfs, "/t:12K"), MountProblem::Size(_)));
}

#[test]
fn mistakes_in_options_are_told_apart() {
    use OptionProblem::{HalfAnOwner, NotAFlag, NotHere, Positive, Repeated, Size, Unknown, Value};
    let option = |flag, text: &str| match problem(flag, text) {
        MountProblem::Option(problem) => problem,
        other => panic!("{text}: {other:?}"),
    };
    for (block, wanted) in [
        ("ro,rw", Repeated("ro`/`rw".to_owned())),
        ("ro,ro", Repeated("ro".to_owned())),
        ("quota=1,quota=1", Repeated("quota".to_owned())),
        ("exec", Positive("exec".to_owned())),
        ("suid", Positive("suid".to_owned())),
        ("dev", Positive("dev".to_owned())),
        ("foo", NotAFlag("foo".to_owned())),
        ("RO", NotAFlag("RO".to_owned())),
        ("size", NotAFlag("size".to_owned())),
        ("x=1", Unknown("x".to_owned())),
        ("ro=1", Unknown("ro".to_owned())),
        ("STAT-VIRT=off", Unknown("STAT-VIRT".to_owned())),
        ("size=5", NotHere("size")),
        ("fstype=ext4", NotHere("fstype")),
        ("uid=1", HalfAnOwner),
    ] {
        assert_eq!(option(Dir, &format!("./a:/b:{block}")), wanted, "{block}");
    }
    for (flag, text, key) in [
        (Named, "n:/x:fstype=ext4", "fstype"),
        (Disk, "d:/x:stat-virt=off", "stat-virt"),
        (Disk, "d:/x:size=5", "size"),
        (Volume, "n:/x:kind=disk", "kind"),
        (Volume, "n:/x:follow-root-symlinks", "follow-root-symlinks"),
        (Tmpfs, "/t:quota=1", "quota"),
    ] {
        assert_eq!(option(flag, text), NotHere(key), "{text}");
    }
    for (flag, text, key) in [
        (Dir, "./a:/b:stat-virt=x", "stat-virt"),
        (Dir, "./a:/b:host-perms=x", "host-perms"),
        (Dir, "./a:/b:uid=-1,gid=1", "uid"),
        (Dir, "./a:/b:uid=1,gid=4294967295", "gid"),
        (Named, "n:/x:kind=x", "kind"),
        (Disk, "d:/x:format=iso", "format"),
        (Disk, "d:/x:format=QCOW2", "format"),
    ] {
        assert!(
            matches!(option(flag, text), Value { key: k, .. } if k == key),
            "{text}"
        );
    }
    assert!(matches!(option(Dir, "./a:/b:quota=1K"), Size("quota", _)));
    assert_eq!(option(Tmpfs, "/t:5:size=5"), Repeated("size".to_owned()));
}

#[test]
fn options_that_exclude_each_other_are_refused() {
    for (flag, text, wanted) in [
        (Named, "n:/x:size=5", RuleError::SizeNeedsDisk),
        (Owned, "/x:size=5", RuleError::SizeNeedsDisk),
        (Owned, "/x:kind=disk", RuleError::DiskNeedsSize),
        (Owned, "/x:kind=disk,size=0", RuleError::EmptyDisk),
        (
            Owned,
            "/x:kind=disk,size=5,quota=5",
            RuleError::NotForDisk("quota"),
        ),
        (
            Owned,
            "/x:kind=disk,size=5,stat-virt=strict",
            RuleError::NotForDisk("stat-virt"),
        ),
        (Named, "n:/x:kind=dir,size=5", RuleError::SizeNeedsDisk),
        (Named, "n:/x:kind=disk,size=0", RuleError::EmptyDisk),
        (
            Named,
            "n:/x:kind=disk,size=5,quota=5",
            RuleError::NotForDisk("quota"),
        ),
        (
            Named,
            "n:/x:kind=disk,size=5,stat-virt=strict",
            RuleError::NotForDisk("stat-virt"),
        ),
        (
            Named,
            "n:/x:kind=disk,size=5,host-perms=private",
            RuleError::NotForDisk("host-perms"),
        ),
        (
            Named,
            "n:/x:kind=disk,size=5,uid=0,gid=0",
            RuleError::NotForDisk("uid"),
        ),
        (
            Dir,
            "./a:/b:stat-virt=off,host-perms=mirror",
            RuleError::OffWithMirror,
        ),
        (
            Dir,
            "./a:/b:stat-virt=off,uid=1,gid=1",
            RuleError::OffWithOwner,
        ),
        (
            Disk,
            "d:/x:fstype=",
            RuleError::FileSystemType(String::new()),
        ),
        (
            Disk,
            "d:/x:fstype=a;b",
            RuleError::FileSystemType("a;b".to_owned()),
        ),
        (
            Disk,
            "d:/x:fstype=a=b",
            RuleError::FileSystemType("a=b".to_owned()),
        ),
    ] {
        assert_eq!(problem(flag, text), MountProblem::Rule(wanted), "{text}");
    }
}

#[test]
fn every_message_names_the_flag_and_the_value() {
    let error = parse(Dir, "./a:/b:RO").unwrap_err();
    assert_eq!(
        error.to_string(),
        "`--mount-dir ./a:/b:RO`: `RO` is neither a mount flag nor `key=value`"
    );
    assert_eq!(
        error.hint().as_deref(),
        Some("options are lower-case: write ro")
    );
}
