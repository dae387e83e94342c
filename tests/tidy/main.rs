//! The house rules as tests: sizes, opening sentences, dependency edges, purity, confinement.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

const MAX_CODE_LINES: usize = 500;
const MAX_LINES: usize = 800;
const MAX_FILES_PER_FOLDER: usize = 10;
const MAX_DEPTH_BELOW_SRC: usize = 3;
const MAX_OPENING: usize = 100;

/// Files that may hold `unsafe`: each crate's `sys.rs`, or the one module the design names.
const UNSAFE_HOMES: [&str; 5] = ["/sys.rs", "/sys/", "vmm/libkrun.rs", "/fuzz/", "benches/"];

/// Modules that decide or translate and must not touch the world.
const PURE: [&str; 6] = [
    "orchestrator/src/plan/",
    "orchestrator/src/spec/",
    "backends/msb-fs/src/wire/",
    "backends/msb-blk/src/request.rs",
    "guest/msb-protocol/src/",
    "backends/msb-vhost/src/device.rs",
];

const WORLD: [&str; 5] = ["std::fs", "std::net", "std::process", "libc::", "rustix::"];

#[test]
fn every_module_opens_with_one_sentence() {
    let mut bad = Vec::new();
    for file in sources() {
        let text = read(&file);
        let first = text.lines().next().unwrap_or_default();
        let sentence = first.strip_prefix("//! ").unwrap_or_default();
        if sentence.is_empty() || !sentence.ends_with('.') || sentence.len() > MAX_OPENING {
            bad.push(format!("{}: {first}", shown(&file)));
        }
    }
    assert!(
        bad.is_empty(),
        "a module opens with `//! One sentence.`:\n{}",
        bad.join("\n")
    );
}

#[test]
fn files_and_folders_stay_readable() {
    let mut bad = Vec::new();
    let mut folders: BTreeMap<PathBuf, usize> = BTreeMap::new();
    for file in sources() {
        let text = read(&file);
        let lines = text.lines().count();
        let tests = file.ends_with("tests.rs") || shown(&file).contains("tests/");
        let code = if tests {
            0
        } else {
            // Examples for users are no code of ours.
            text.lines()
                .take_while(|line| *line != "#[cfg(test)]")
                .filter(|line| !line.trim_start().starts_with("//"))
                .count()
        };
        if code > MAX_CODE_LINES || lines > MAX_LINES {
            bad.push(format!(
                "{}: {code} lines of code, {lines} in all",
                shown(&file)
            ));
        }
        if let Some((_, below)) = shown(&file).split_once("/src/") {
            let depth = below.matches('/').count();
            if depth > MAX_DEPTH_BELOW_SRC {
                bad.push(format!("{}: {depth} folders below src", shown(&file)));
            }
        }
        *folders
            .entry(file.parent().unwrap_or(Path::new("")).to_owned())
            .or_default() += 1;
    }
    for (folder, count) in folders {
        if count > MAX_FILES_PER_FOLDER {
            bad.push(format!("{}: {count} source files", shown(&folder)));
        }
    }
    assert!(bad.is_empty(), "too large:\n{}", bad.join("\n"));
}

#[test]
fn production_crates_have_only_their_four_edges() {
    let allowed: BTreeSet<(&str, &str)> = [
        ("microsandbox", "msb-protocol"),
        ("msb-agent", "msb-protocol"),
        ("msb-fs", "msb-vhost"),
        ("msb-blk", "msb-vhost"),
    ]
    .into();
    let metadata = metadata();
    let names: BTreeSet<&str> = packages(&metadata).map(name).collect();
    let mut edges = BTreeSet::new();
    for package in packages(&metadata) {
        if matches!(name(package), "msb-testkit" | "msb-benches") {
            continue;
        }
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let to = dependency["name"].as_str().unwrap_or_default();
            // `kind` is null for an ordinary dependency.
            if names.contains(to) && dependency["kind"].is_null() {
                edges.insert((name(package), to));
            }
        }
    }
    assert_eq!(edges, allowed);
}

#[test]
fn pure_modules_do_not_touch_the_world() {
    let mut bad = Vec::new();
    for file in sources() {
        let path = shown(&file);
        if !PURE.iter().any(|pure| path.starts_with(pure)) {
            continue;
        }
        let text = read(&file);
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        for (number, line) in code.lines().enumerate() {
            let uses = line.trim_start();
            if !uses.starts_with("//") && WORLD.iter().any(|world| uses.contains(world)) {
                bad.push(format!("{path}:{}: {uses}", number + 1));
            }
        }
    }
    assert!(
        bad.is_empty(),
        "pure modules reach out:\n{}",
        bad.join("\n")
    );
}

#[test]
fn unsafe_code_stays_where_it_is_expected() {
    let mut bad = Vec::new();
    let mut sites: BTreeMap<String, usize> = BTreeMap::new();
    for file in sources() {
        let path = shown(&file);
        if path.starts_with("tests/tidy/") {
            continue;
        }
        let text = read(&file);
        let count = text
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"))
            .filter(|line| {
                line.contains("unsafe {")
                    || line.contains("unsafe impl")
                    || line.contains("unsafe fn")
            })
            .count();
        if count == 0 {
            continue;
        }
        let home = path.split("/src/").next().unwrap_or(&path).to_owned();
        *sites.entry(home).or_default() += count;
        let allowed = UNSAFE_HOMES.iter().any(|home| path.contains(home))
            || path == "backends/msb-vhost/src/request.rs"
            || path.starts_with("tests/kit/");
        if !allowed {
            bad.push(format!("{path}: {count} sites"));
        }
    }
    println!("unsafe sites by crate: {sites:?}");
    assert!(
        bad.is_empty(),
        "unsafe outside its modules:\n{}",
        bad.join("\n")
    );
}

#[test]
fn the_maps_name_every_crate() {
    let metadata = metadata();
    for page in ["README.md", "ARCHITECTURE.md"] {
        let text = read(&root().join(page));
        for package in packages(&metadata) {
            let manifest = package["manifest_path"].as_str().unwrap_or_default();
            let folder = Path::new(manifest).parent().unwrap_or(Path::new(""));
            let folder = shown(folder);
            assert!(text.contains(&folder), "{page} does not mention {folder}");
        }
    }
}

#[test]
fn no_file_names_a_registry_host_or_this_machine() {
    // The words are put together so that this file does not hold them.
    let hosts = [
        ["deb.", "debian.org"],
        ["static.", "crates.io"],
        ["pypi.", "org"],
        ["/work", "/main"],
    ];
    let mut bad = Vec::new();
    for file in tracked() {
        let Ok(text) = fs::read_to_string(&file) else {
            continue;
        };
        for host in hosts {
            if text.contains(&host.concat()) {
                bad.push(format!("{}: {}", shown(&file), host.concat()));
            }
        }
    }
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}

#[test]
fn the_root_holds_what_the_plan_names() {
    let allowed: BTreeSet<&str> = [
        "Cargo.toml",
        "Cargo.lock",
        "orchestrator",
        "backends",
        "guest",
        "tests",
        "benches",
        "README.md",
        "ARCHITECTURE.md",
        "LICENSE",
        "Makefile",
    ]
    .into();
    let seen: BTreeSet<String> = tracked()
        .iter()
        .filter_map(|file| shown(file).split('/').next().map(str::to_owned))
        .filter(|entry| !entry.starts_with('.'))
        .collect();
    let strangers: Vec<_> = seen
        .iter()
        .filter(|entry| !allowed.contains(entry.as_str()))
        .collect();
    assert!(
        strangers.is_empty(),
        "unexpected entries at the root: {strangers:?}"
    );
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("."))
        .to_owned()
}

fn shown(path: &Path) -> String {
    path.strip_prefix(root())
        .unwrap_or(path)
        .display()
        .to_string()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path)
        .unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()))
}

/// The files of the repository that still exist in the work tree.
fn tracked() -> Vec<PathBuf> {
    let output = Command::new("git")
        .args(["-C"])
        .arg(root())
        .args(["ls-files", "-z"])
        .output()
        .unwrap_or_else(|error| panic!("cannot run git: {error}"));
    assert!(output.status.success(), "git ls-files failed");
    let listing = String::from_utf8_lossy(&output.stdout).into_owned();
    let files: Vec<_> = listing
        .split('\0')
        .filter(|name| !name.is_empty())
        .map(|name| root().join(name))
        .collect();
    assert!(!files.is_empty(), "git lists no files");
    files.into_iter().filter(|file| file.exists()).collect()
}

/// The Rust files of the repository.
fn sources() -> Vec<PathBuf> {
    tracked()
        .into_iter()
        .filter(|file| file.extension().is_some_and(|end| end == "rs"))
        .collect()
}

fn metadata() -> Value {
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--no-deps",
            "--offline",
            "--format-version",
            "1",
            "--manifest-path",
        ])
        .arg(root().join("Cargo.toml"))
        .output()
        .unwrap_or_else(|error| panic!("cannot run cargo: {error}"));
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("cargo metadata: {error}"))
}

fn packages(metadata: &Value) -> impl Iterator<Item = &Value> {
    metadata["packages"].as_array().into_iter().flatten()
}

fn name(package: &Value) -> &str {
    package["name"].as_str().unwrap_or_default()
}
