//! Every type, trait and function that users are offered is shown in an example.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Where what users are offered is defined, below `src`.
const SOURCES: [&str; 7] = [
    "builder", "error.rs", "mend.rs", "sandbox", "spec", "usage.rs", "volume",
];

/// What begins an item, behind its `pub`.
const ITEMS: [&str; 7] = [
    "async fn ",
    "const fn ",
    "fn ",
    "struct ",
    "enum ",
    "trait ",
    "type ",
];

#[test]
fn what_users_are_offered_is_shown_in_an_example() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let offered = offered(&src);
    let (mut all, mut missing) = (0, Vec::new());
    for file in SOURCES.iter().flat_map(|place| files(&src.join(place))) {
        for item in items(&fs::read_to_string(&file).unwrap(), &offered) {
            all += 1;
            if !item.shown {
                let file = file.strip_prefix(&src).unwrap().display();
                missing.push(format!("{file}:{}: {}", item.line, item.name));
            }
        }
    }
    assert!(all > 200, "only {all} items were found");
    assert!(
        missing.is_empty(),
        "{} of {all} are not shown in an example:\n{}",
        missing.len(),
        missing.join("\n")
    );
}

/// The types whose methods the table of the tests names.
const TABLED: [&str; 12] = [
    "ExecControl",
    "ExecHandle",
    "ExecOptions",
    "ExecStdin",
    "MountBuilder",
    "NamedVolumeBuilder",
    "Sandbox",
    "SandboxBuilder",
    "SandboxHandle",
    "Volume",
    "VolumeBuilder",
    "VolumeHandle",
];

#[test]
fn the_table_of_the_tests_names_every_method() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let table = fs::read_to_string(root.join("../tests/README.md")).unwrap();
    // Each type, and the words of the first cells of its rows.
    let row = |owner: &str| -> BTreeSet<String> {
        let cells = table.lines().filter_map(|line| line.split('|').nth(1));
        let cells = cells.filter(|cell| cell.contains(&format!("`{owner}::")));
        cells.flat_map(words).collect()
    };
    let offered = TABLED.map(str::to_owned).into();
    let mut missing = Vec::new();
    for file in SOURCES
        .iter()
        .flat_map(|place| files(&root.join("src").join(place)))
    {
        for item in items(&fs::read_to_string(&file).unwrap(), &offered) {
            if let Some((owner, method)) = item.name.split_once("::")
                && !row(owner).contains(method)
            {
                missing.push(item.name.clone());
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
}

#[test]
fn an_item_without_an_example_is_found() {
    let text = "\
/// Described.
#[must_use = \"x\"]
pub struct Bare;

impl<'a> Bare {
    /// Shown.
    ///
    /// ```
    /// ```
    #[expect(
        dead_code,
        reason = \"x\"
    )]
    pub async fn shown(self) {}
    /// Described.
    pub fn bare(&self) {}
    /// Not for users.
    pub(crate) fn inner(&self) {}
}

/// Not offered.
pub struct Other;

impl Other {
    pub fn bare(&self) {}
}

/// ```
/// ```
pub trait Shown {
    fn method(self);
}

#[cfg(test)]
mod tests {
    pub struct Bare;
}
";
    let offered = ["Bare", "Shown"].map(str::to_owned).into();
    let found: Vec<_> = items(text, &offered)
        .into_iter()
        .map(|item| (item.line, item.name, item.shown))
        .collect();
    let wanted = [
        (3, "Bare", false),
        (14, "Bare::shown", true),
        (16, "Bare::bare", false),
        (30, "Shown", true),
        (31, "Shown::method", false),
    ];
    assert_eq!(
        found,
        wanted.map(|(line, name, shown)| (line, name.to_owned(), shown))
    );
}

/// An item of a source file.
struct Item {
    line: usize,
    name: String,
    shown: bool,
}

/// The names that the crate offers: those in `lib.rs`, and all of the module `spec`.
fn offered(src: &Path) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for file in ["lib.rs", "spec/mod.rs"] {
        let text = fs::read_to_string(src.join(file)).unwrap();
        for used in text.split("\npub use ").skip(1) {
            let used = used.split(';').next().unwrap_or_default();
            let used = used.split_once("::").map_or(used, |(_, names)| names);
            names.extend(words(used));
        }
        let defined = text.lines().filter_map(|line| line.strip_prefix("pub "));
        names.extend(defined.filter_map(item_name));
    }
    names
}

/// The items of a source file that are offered, and the methods of those types and traits.
fn items(text: &str, offered: &BTreeSet<String>) -> Vec<Item> {
    let mut found = Vec::new();
    // What the line stands in, whether that is a trait, and what was said about the next item.
    let (mut owner, mut in_trait) = (None, false);
    let (mut shown, mut in_attribute) = (false, false);
    for (number, line) in text.lines().enumerate() {
        let trimmed = line.trim_start();
        if in_attribute || trimmed.starts_with("#[") {
            in_attribute = !line.ends_with(']');
            if line == "#[cfg(test)]" {
                break;
            }
            continue;
        }
        if trimmed.starts_with("///") {
            shown |= trimmed.starts_with("/// ```");
            continue;
        }
        let top = trimmed.len() == line.len();
        if line == "}" {
            (owner, in_trait) = (None, false);
        } else if top && line.starts_with("impl") {
            owner = implemented(line);
        }
        let item = match trimmed.strip_prefix("pub ") {
            None if in_trait => trimmed,
            item => item.unwrap_or_default(),
        };
        if let Some(name) = item_name(item) {
            if offered.contains(owner.as_ref().unwrap_or(&name)) {
                let line = number + 1;
                let name = owner.iter().chain([&name]).cloned().collect::<Vec<_>>();
                let name = name.join("::");
                found.push(Item { line, name, shown });
            }
            if top && item.starts_with("trait ") {
                (owner, in_trait) = (Some(name), true);
            }
        }
        shown = false;
    }
    found
}

/// The name in `fn name(…`, `struct Name {` and their like.
fn item_name(item: &str) -> Option<String> {
    let rest = ITEMS.iter().find_map(|kind| item.strip_prefix(kind))?;
    words(rest.strip_prefix("fn ").unwrap_or(rest)).next()
}

/// The type in `impl<…> Type<…> {`; nothing for a trait's, whose methods the trait describes.
fn implemented(line: &str) -> Option<String> {
    let rest = line.strip_prefix("impl")?;
    let rest = rest
        .split_once("> ")
        .filter(|_| rest.starts_with('<'))
        .map_or(rest, |(_, rest)| rest);
    if rest.contains(" for ") {
        return None;
    }
    words(rest).next()
}

fn words(text: &str) -> impl Iterator<Item = String> {
    text.split(|c: char| !c.is_alphanumeric() && c != '_')
        .filter(|word| !word.is_empty())
        .map(str::to_owned)
}

/// The source files at and below a path, in order.
fn files(path: &Path) -> Vec<PathBuf> {
    if path.is_file() {
        return vec![path.to_owned()];
    }
    let mut below: Vec<_> = fs::read_dir(path)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    below.sort();
    below.retain(|path| !path.ends_with("tests.rs"));
    below.iter().flat_map(|path| files(path)).collect()
}
