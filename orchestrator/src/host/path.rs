//! What lies at a host path, and whether symbolic links lead there.

use std::fs::{self, FileType};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// What lies at a host path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathFacts {
    /// What it is, at the end of all symbolic links.
    pub kind: PathKind,
    /// The path without symbolic links; the path itself when nothing is there.
    pub resolved: PathBuf,
    /// The first symbolic link on the way.
    pub link: Option<Link>,
    /// Device and inode number, which tell whether two paths are one file.
    pub identity: Option<(u64, u64)>,
}

/// What kind of thing lies at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathKind {
    /// Nothing that could be looked at, and why.
    Missing(String),
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// Something else, in words.
    Other(&'static str),
}

/// A symbolic link on the way to a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Where it lies.
    pub at: PathBuf,
    /// Whether it is the last component of the path.
    pub last: bool,
}

impl PathFacts {
    /// Looks at an absolute path.
    pub fn read(path: &Path) -> Self {
        let link = first_link(path);
        match fs::metadata(path) {
            Ok(found) => Self {
                kind: kind(found.file_type()),
                resolved: fs::canonicalize(path).unwrap_or_else(|_| path.to_owned()),
                link,
                identity: Some((found.dev(), found.ino())),
            },
            Err(error) => Self {
                kind: PathKind::Missing(error.to_string()),
                resolved: path.to_owned(),
                link,
                identity: None,
            },
        }
    }
}

fn kind(found: FileType) -> PathKind {
    match found {
        found if found.is_dir() => PathKind::Directory,
        found if found.is_file() => PathKind::File,
        found if found.is_fifo() => PathKind::Other("a FIFO"),
        found if found.is_socket() => PathKind::Other("a socket"),
        _ => PathKind::Other("a device"),
    }
}

fn first_link(path: &Path) -> Option<Link> {
    let mut way: Vec<&Path> = path.ancestors().collect();
    way.reverse();
    let at = way.into_iter().find(|step| {
        fs::symlink_metadata(step).is_ok_and(|found| found.file_type().is_symlink())
    })?;
    Some(Link {
        at: at.to_owned(),
        last: at == path,
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn kinds_and_links_are_seen() {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(dir.path()).unwrap();
        fs::create_dir(root.join("real")).unwrap();
        fs::write(root.join("real/file"), "").unwrap();
        symlink("real", root.join("link")).unwrap();
        symlink("nowhere", root.join("dangling")).unwrap();

        let plain = PathFacts::read(&root.join("real/file"));
        assert_eq!((plain.kind, plain.link), (PathKind::File, None));
        let last = PathFacts::read(&root.join("link"));
        assert_eq!(last.kind, PathKind::Directory);
        assert_eq!(last.resolved, root.join("real"));
        assert_eq!(
            last.link,
            Some(Link {
                at: root.join("link"),
                last: true
            })
        );
        let through = PathFacts::read(&root.join("link/file"));
        assert_eq!(through.resolved, root.join("real/file"));
        assert_eq!(
            through.link,
            Some(Link {
                at: root.join("link"),
                last: false
            })
        );
        assert_eq!(
            through.identity,
            PathFacts::read(&root.join("real/file")).identity
        );
        assert!(matches!(
            PathFacts::read(&root.join("dangling")).kind,
            PathKind::Missing(_)
        ));
        assert_eq!(
            PathFacts::read(Path::new("/dev/null")).kind,
            PathKind::Other("a device")
        );
        assert!(PathFacts::read(Path::new("/proc/self/fd")).link.is_some());
    }
}
