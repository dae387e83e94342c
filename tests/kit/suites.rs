//! Test suites of others: where their programs are, what they are told, what they must print.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

/// What pjdfstest is told of a share.
pub const CONFIGURATION: &str = r#"
[features]
posix_fallocate = {}
rename_ctime = {}
stat_st_birthtime = {}
utime_now = {}
utimensat = {}
[settings]
naptime = 0.01
allow_remount = true
[dummy_auth]
entries = [["nobody", "nogroup"], ["daemon", "daemon"]]
"#;

/// What fsx does, and how often.
const FSX_WEIGHTS: &str = "
[weights]
close_open = 1
invalidate = 1
mapread = 3
mapwrite = 3
read = 5
write = 5
truncate = 1
fsync = 0.3
fdatasync = 0.3
posix_fallocate = 1
punch_hole = 1
sendfile = 1
posix_fadvise = 1
copy_file_range = 1
";

/// What fsx is told of a file of up to `length` bytes and operations of up to `largest` bytes.
///
/// None is of no bytes: fsx takes the `EINVAL` of such a `posix_fallocate(3)`, which any file
/// system answers, for the want of the call.
pub fn fsx_configuration(length: u64, largest: u64) -> String {
    format!("flen = {length}\n[opsize]\nmin = 1\nmax = {largest}\n{FSX_WEIGHTS}")
}

/// Tests that must fail, each with its reason: an exact name, or `*` and what all names end with.
pub type Exceptions<'a> = &'a [(&'a str, &'a str)];

/// What an ordinary user who serves in the mode off cannot do: no file has attributes but those
/// of the host, and all of them belong to this user.
const OFF_BY_AN_ORDINARY_USER: Exceptions<'_> = &[
    ("*::block", NO_SPECIAL_FILES),
    ("*::char", NO_SPECIAL_FILES),
    ("*::fifo", NO_SPECIAL_FILES),
    ("*::socket", NO_SPECIAL_FILES),
    ("mkfifo::changed_time_fields_success", NO_SPECIAL_FILES),
    ("mkfifo::permission_bits_from_mode", NO_SPECIAL_FILES),
    ("mkfifo::uid_gid_eq_euid_egid", NO_SPECIAL_FILES),
    ("mknod::changed_time_fields_success", NO_SPECIAL_FILES),
    ("mknod::permission_bits_from_mode", NO_SPECIAL_FILES),
    ("mknod::uid_gid_eq_euid_egid", NO_SPECIAL_FILES),
    ("open::fifo_nonblock_wronly", NO_SPECIAL_FILES),
    ("open::socket_error", NO_SPECIAL_FILES),
    ("chmod::change_perm::dir", NOT_LOCKED_OUT),
    ("chmod::change_perm::regular", NOT_LOCKED_OUT),
    ("mkdir::permission_bits_from_mode", NOT_LOCKED_OUT),
    ("open::permission_bits_from_mode", NOT_LOCKED_OUT),
    ("chmod::clear_isgid_bit", ONE_OWNER),
    ("link::share_metadata::regular", ONE_OWNER),
    ("mkdir::uid_gid_eq_euid_egid", ONE_OWNER),
    ("open::uid_gid_eq_euid_egid", ONE_OWNER),
];
const NO_SPECIAL_FILES: &str = "off makes special files for root alone";
const NOT_LOCKED_OUT: &str = "the server keeps its own access: 0600 and 0700 are the least";
const ONE_OWNER: &str = "an ordinary user cannot give files away";
const NO_DEVICES: &str = "the jail makes no devices on the host";

/// Tests that do not run, by how their names begin, and why.
const SKIPPED: [(&str, &str); 1] = [(
    "link::link_count_max",
    "FUSE does not tell how many links a file may have",
)];

/// Tests that pass or fail by chance, and why.
const UNSTEADY: [(&str, &str); 1] = [(
    "open::etxtbsy",
    "the kernel refuses O_RDONLY|O_TRUNC of a running program after FUSE has cut it short, and by \
     then the program may have ended",
)];

/// Who serves and who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Users {
    /// The server belongs to root, and so does the program in the guest.
    Root,
    /// The server belongs to root, and the program in the guest to an ordinary user, for whom the
    /// suite has fewer tests.
    RootServer,
    /// An ordinary user of the host serves root of the guest.
    OrdinaryServer,
    /// An ordinary user of the host serves an ordinary user of the guest.
    Ordinary,
}

/// What must fail for these users in this mode.
pub fn exceptions(mode: &str, users: Users) -> Exceptions<'static> {
    match (mode, users) {
        ("relaxed", Users::Ordinary | Users::RootServer) => &[(
            "utimensat::follow_symlink",
            "a real link cannot hold an override, so that it belongs to the default owner",
        )],
        ("off", Users::Root) => &[
            ("*::block", NO_DEVICES),
            ("mknod::changed_times_success::char", NO_DEVICES),
            ("mknod::device_files::char", NO_DEVICES),
        ],
        ("off", Users::OrdinaryServer | Users::Ordinary) => OFF_BY_AN_ORDINARY_USER,
        _ => &[],
    }
}

/// The tests that pjdfstest has run, each with what came of it.
///
/// # Errors
///
/// When it ended early.
pub fn outcomes(text: &str) -> Result<BTreeMap<String, String>> {
    ensure!(text.contains("Summary"), "pjdfstest ended early:\n{text}");
    let mut seen: BTreeMap<String, String> = BTreeMap::new();
    let mut last = String::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            [name, outcome @ ("ok" | "FAILED" | "skipped")] if !line.starts_with('\t') => {
                last = (*name).to_owned();
                seen.insert(last.clone(), (*outcome).to_owned());
            }
            // What the suite says about the test before, without the backtrace.
            [first, ..] if line.starts_with('\t') && !first.contains("::") => {
                if let Some(outcome) = seen.get_mut(&last) {
                    outcome.push_str(line);
                }
            }
            _ => {}
        }
    }
    Ok(seen)
}

/// Compares what the whole suite made of a share with what must come of it.
///
/// # Errors
///
/// When a test did not end as it must, or too few have run.
pub fn judge(mode: &str, users: Users, seen: &BTreeMap<String, String>) -> Result<()> {
    let exceptions = exceptions(mode, users);
    let mut wrong = Vec::new();
    let mut count = BTreeMap::new();
    for (name, outcome) in seen {
        let excepted = exceptions.iter().any(|(pattern, _)| fits(pattern, name));
        let asked_by_user = matches!(users, Users::Ordinary | Users::RootServer);
        let rootless = asked_by_user
            && ["requires root privileges", "CAP_SYS_ADMIN"]
                .iter()
                .any(|reason| outcome.contains(reason));
        let kind = match outcome.as_str() {
            "ok" if excepted => "passed, and is listed as an exception",
            "ok" => "ok",
            text if text.starts_with("skipped") => {
                let known = SKIPPED.iter().any(|(begin, _)| name.starts_with(begin));
                if known || rootless {
                    "skipped"
                } else {
                    "skipped without a reason of ours"
                }
            }
            _ if excepted || UNSTEADY.iter().any(|(test, _)| test == name) => "excepted",
            _ => "failed",
        };
        *count.entry(kind).or_insert(0_u32) += 1;
        if !["ok", "skipped", "excepted"].contains(&kind) {
            wrong.push(format!("{name} {kind}: {outcome}"));
        }
    }
    for (pattern, _) in exceptions {
        if !seen.keys().any(|name| fits(pattern, name)) {
            wrong.push(format!("{pattern} is an exception for no test"));
        }
    }
    println!("{mode}, {users:?}: {count:?}");
    ensure!(wrong.is_empty(), "{mode}, {users:?}:\n{}", wrong.join("\n"));
    let expected = if matches!(users, Users::Ordinary | Users::RootServer) {
        150
    } else {
        390
    };
    let ran = ["ok", "excepted"].map(|kind| count.get(kind).copied().unwrap_or(0));
    ensure!(ran.iter().sum::<u32>() >= expected, "{count:?}");
    Ok(())
}

fn fits(pattern: &str, name: &str) -> bool {
    match pattern.strip_prefix('*') {
        Some(end) => name.ends_with(end),
        None => name == pattern,
    }
}

/// Where a program of crates.io is.
///
/// # Errors
///
/// When it is not installed, with the way to get it.
pub fn tool(name: &str) -> Result<PathBuf> {
    let folder = std::env::var_os("MSB_TOOLS").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools"),
        PathBuf::from,
    );
    let path = folder.join("bin").join(name);
    ensure!(
        path.exists(),
        "no {name} at {}: run `make tools`",
        path.display()
    );
    Ok(path)
}

/// The number in an environment variable, or `default`.
pub fn number(variable: &str, default: u64) -> u64 {
    let text = std::env::var(variable).ok();
    text.and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// What random tests begin with: `MSB_SEED`, or something new each time.
pub fn seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now = now.map_or(0, |now| u64::from(now.subsec_nanos()));
    number("MSB_SEED", now)
}
