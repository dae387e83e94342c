//! All that can be seen of a tree, and how two of them differ.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use anyhow::{Context, Result};

use super::operation::{Limits, attributes, list, sum};

/// Times before this were set by the test itself, and must be equal to the nanosecond.
const SET: i64 = 100_000_000;

type Time = (i64, i64);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    inode: u64,
    mode: u32,
    owner: (u32, u32),
    links: u64,
    size: u64,
    device: u64,
    content: String,
    attributes: BTreeMap<String, Vec<u8>>,
    changed: Time,
    modified: Time,
}

/// The entries of a tree by path.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct View(BTreeMap<String, Entry>);

impl View {
    pub(super) fn of(root: &Path) -> Result<Self> {
        let mut view = Self::default();
        view.add(root, "")?;
        Ok(view)
    }

    fn add(&mut self, root: &Path, path: &str) -> Result<()> {
        let full = if path.is_empty() {
            root.to_owned()
        } else {
            root.join(path)
        };
        let found = fs::symlink_metadata(&full).with_context(|| format!("stat {path:?}"))?;
        let kind = found.file_type();
        let content = if kind.is_dir() {
            list(&full)
                .with_context(|| format!("list {path:?}"))?
                .join(" ")
        } else if kind.is_symlink() {
            fs::read_link(&full)?.to_string_lossy().into_owned()
        } else if kind.is_file() {
            let bytes = fs::read(&full).with_context(|| format!("read {path:?}"))?;
            format!("{} bytes, {:x}", bytes.len(), sum(&bytes))
        } else {
            String::new()
        };
        let mut all = BTreeMap::new();
        for name in attributes(&full).with_context(|| format!("attributes of {path:?}"))? {
            let mut value = vec![0; 400];
            let count = rustix::fs::lgetxattr(&full, name.as_str(), &mut value)
                .with_context(|| format!("{name} of {path:?}"))?;
            value.truncate(count);
            all.insert(name, value);
        }
        let special = kind.is_char_device() || kind.is_block_device();
        let entry = Entry {
            inode: found.ino(),
            mode: found.mode(),
            owner: (found.uid(), found.gid()),
            links: found.nlink(),
            size: if kind.is_dir() { 0 } else { found.size() },
            device: if special { found.rdev() } else { 0 },
            content,
            attributes: all,
            changed: (found.ctime(), found.ctime_nsec()),
            modified: (found.mtime(), found.mtime_nsec()),
        };
        self.0.insert(path.to_owned(), entry);
        if kind.is_dir() {
            let mut names: Vec<_> = fs::read_dir(&full)?
                .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
                .collect::<Result<_>>()?;
            names.sort();
            for name in names {
                let below = if path.is_empty() {
                    name
                } else {
                    format!("{path}/{name}")
                };
                self.add(root, &below)?;
            }
        }
        Ok(())
    }

    /// How the served tree differs from the host's, or nothing. `before` are both as they were
    /// before the last step: their clocks are not the same, but whether they moved is.
    pub(super) fn differs(
        &self,
        served: &Self,
        before: Option<(&Self, &Self)>,
        limits: Limits,
    ) -> Option<String> {
        let paths: Vec<_> = self.0.keys().collect();
        let others: Vec<_> = served.0.keys().collect();
        if paths != others {
            return Some(format!("names: {paths:?}\nserved: {others:?}"));
        }
        for (path, host) in &self.0 {
            let mut one = served.0.get(path)?.clone();
            let link = host.mode & 0o170_000 == 0o120_000;
            if link && !limits.owned_links {
                one.owner = host.owner;
            }
            // A link without an owner has no time of getting it either, and the guest's kernel does
            // not note when a pipe of FUSE is written to.
            let pipe = host.mode & 0o170_000 == 0o010_000;
            let silent = pipe || link && !limits.owned_links;
            let old = before.and_then(|(first, second)| {
                let pair = (first.0.get(path)?, second.0.get(path)?);
                let same = pair.0.inode == host.inode && pair.1.inode == one.inode;
                same.then_some(pair)
            });
            for name in ["ctime", "mtime"] {
                let time = |entry: &Entry| match name {
                    "ctime" => entry.changed,
                    _ => entry.modified,
                };
                let now = (time(host), time(&one));
                if silent {
                    continue;
                }
                if now.0.0 < SET || now.1.0 < SET {
                    if now.0 != now.1 {
                        return Some(format!("{name} of {path:?}: {host:?}\nserved: {one:?}"));
                    }
                } else if let Some((first, second)) = old {
                    let old = (time(first), time(second));
                    if (now.0 == old.0) != (now.1 == old.1) {
                        return Some(format!(
                            "{name} of {path:?} was {old:?} and is {now:?}\n{host:?}"
                        ));
                    }
                }
            }
            one.inode = host.inode;
            one.changed = host.changed;
            one.modified = host.modified;
            if one != *host {
                return Some(format!("{path:?}: {host:?}\nserved: {one:?}"));
            }
        }
        None
    }
}
