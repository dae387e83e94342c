//! What the other verbs print where no sandbox runs.

use std::fs;
use std::process::Command;

use serde_json::Value;

use crate::scratch::Scratch;

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
    let plan: Value = serde_json::from_str(&plan).unwrap();
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
    let plan: Value = serde_json::from_str(&scratch.must(&args)).unwrap();
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
    let used: Value = serde_json::from_str(&scratch.must(&["df", "--format", "json"])).unwrap();
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

#[test]
fn images_are_loaded_listed_and_removed() {
    let scratch = Scratch::new();
    let packed = Command::new("tar")
        .args(["-cf", "image.tar", "-C", "rootfs", "."])
        .current_dir(scratch.path("work"))
        .status()
        .unwrap();
    assert!(packed.success());
    assert_eq!(
        scratch.must(&["image", "load", "image.tar", "-n", "a"]),
        "a:latest\n"
    );
    let again = scratch.must(&["image", "load", "image.tar", "--name", "b:1", "-q"]);
    assert_eq!(again, "");
    assert_eq!(scratch.must(&["image", "ls", "-q"]), "a:latest\nb:1\n");
    let listed: Value =
        serde_json::from_str(&scratch.must(&["image", "ls", "--format", "json"])).unwrap();
    assert_eq!(listed[0]["names"], serde_json::json!(["a:latest", "b:1"]));
    assert!(listed[0]["loaded_at_ms"].is_u64() && listed[0]["size_bytes"].is_u64());
    let table = scratch.must(&["images", "list"]);
    assert!(table.starts_with("NAME            ID"), "{table}");
    let partly = scratch.msb(&["image", "rm", "a", "none", "b:1"]);
    assert_eq!(partly.status.code(), Some(1));
    assert_eq!(scratch.must(&["image", "ls", "--format", "json"]), "[]\n");
}

#[test]
fn the_doctor_names_what_is_missing_and_how_to_get_it() {
    let scratch = Scratch::new();
    // The file systems of a scratch folder may lack extended attributes, which is its last word.
    let seen = |output: &std::process::Output| {
        let findings: Value = serde_json::from_slice(&output.stdout).unwrap();
        let of = |subject: &str| {
            let all = findings.as_array().unwrap();
            let found = all.iter().find(|finding| finding["subject"] == subject);
            found
                .unwrap_or_else(|| panic!("{subject}: {findings}"))
                .clone()
        };
        ["VMM", "guest kernel", "msb-blk", "mkfs.ext4"].map(of)
    };
    let whole = scratch.msb(&["doctor", "--format", "json"]);
    for finding in seen(&whole) {
        assert_eq!(
            (&finding["verdict"], &finding["remedy"]),
            (&"fine".into(), &Value::Null)
        );
    }
    fs::remove_dir_all(scratch.path("kernel")).unwrap();
    let lacking = scratch.msb(&["doctor", "--format", "json"]);
    assert_eq!(lacking.status.code(), Some(1));
    let verdicts = seen(&lacking).map(|finding| finding["verdict"].as_str().unwrap().to_owned());
    assert_eq!(verdicts, ["fine", "broken", "fine", "fine"]);
    let told = scratch.msb(&["doctor"]);
    let told = String::from_utf8_lossy(&told.stdout);
    assert!(told.contains("✗ guest kernel"), "{told}");
    assert!(told.contains("\n  → tests/setup.sh FOLDER"), "{told}");
}

#[test]
fn what_is_logged_is_what_was_asked_for() {
    let scratch = Scratch::new();
    for (flag, told) in [
        ("--error", false),
        ("--warn", false),
        ("--info", true),
        ("--debug", true),
        ("--trace", true),
    ] {
        let output = scratch.msb(&[flag, "volume", "create", &flag[2..]]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{flag}: {said}");
        assert_eq!(said.contains(" is made"), told, "{flag}: {said}");
    }
    let both = scratch.msb(&["--info", "--debug", "ls"]);
    assert_eq!(both.status.code(), Some(2));
}
