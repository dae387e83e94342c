//! The verbs of named volumes, without a sandbox that runs.

use std::fs;

use crate::scratch::Scratch;

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
