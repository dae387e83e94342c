//! Where things come from, as users write it: host paths, image references, image formats.

use std::path::{Component, Path, PathBuf};

use super::{DiskImageFormat, ImageSource};
use crate::error::{Error, ErrorKind};

impl DiskImageFormat {
    /// The format that a file name stands for: `.qcow2`, `.vmdk`, and raw for everything else.
    ///
    /// The content of the file never decides: a guest may write any header into a raw image.
    ///
    /// ```
    /// use microsandbox::DiskImageFormat;
    /// use std::path::Path;
    ///
    /// assert_eq!(DiskImageFormat::from_path(Path::new("a.qcow2")), DiskImageFormat::Qcow2);
    /// assert_eq!(DiskImageFormat::from_path(Path::new("a.img")), DiskImageFormat::Raw);
    /// ```
    pub fn from_path(path: &Path) -> Self {
        match path.extension().and_then(|end| end.to_str()) {
            Some("qcow2") => Self::Qcow2,
            Some("vmdk") => Self::Vmdk,
            _ => Self::Raw,
        }
    }
}

impl ImageSource {
    /// Reads an image as users write it: a host path when it begins with `/`, `./` or `../` (a disk
    /// image when it ends in `.raw`, `.img`, `.qcow2` or `.vmdk`), otherwise a name in the store.
    ///
    /// ```
    /// use microsandbox::spec::ImageSource;
    /// use std::path::{Path, PathBuf};
    ///
    /// let image = ImageSource::parse("./rootfs", Path::new("/home/me"))?;
    /// assert_eq!(image, ImageSource::Directory { path: PathBuf::from("/home/me/rootfs") });
    /// assert!(ImageSource::parse("-rf", Path::new("/")).is_err());
    /// # Ok::<(), microsandbox::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidConfig`] when it is empty or no possible reference.
    pub fn parse(text: &str, cwd: &Path) -> Result<Self, Error> {
        if is_host_path(text) {
            let path = absolute(Path::new(text), cwd);
            let end = path.extension().and_then(|end| end.to_str());
            return Ok(match end {
                Some("raw" | "img" | "qcow2" | "vmdk") => Self::Disk {
                    format: DiskImageFormat::from_path(&path),
                    path,
                },
                _ => Self::Directory { path },
            });
        }
        let fits =
            |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '/' | ':' | '@');
        let begins = text.starts_with(|c: char| c.is_ascii_alphanumeric());
        if !begins || !text.chars().all(fits) {
            let message = format!("`{text}` is not an image");
            return Err(Error::new(ErrorKind::InvalidConfig, message)
                .with_value(text)
                .with_hint("name one of `msb image ls`, or write a host path from `./` or `/`"));
        }
        Ok(Self::Stored {
            reference: text.to_owned(),
        })
    }
}

/// Whether the text is meant as a path on the host rather than as a name.
pub(crate) fn is_host_path(text: &str) -> bool {
    matches!(text, "." | "..")
        || text.starts_with('/')
        || text.starts_with("./")
        || text.starts_with("../")
}

/// The path from the root, without `.` and `..`, as the text says it (symbolic links are not
/// looked at).
pub(crate) fn absolute(path: &Path, cwd: &Path) -> PathBuf {
    let mut clean = PathBuf::from("/");
    for component in cwd.join(path).components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_become_absolute() {
        for (given, wanted) in [
            ("src", "/home/me/src"),
            ("./src/", "/home/me/src"),
            ("../x/./y", "/home/x/y"),
            ("/a//b/..", "/a"),
            ("../../../..", "/"),
        ] {
            assert_eq!(
                absolute(Path::new(given), Path::new("/home/me")),
                Path::new(wanted)
            );
        }
    }

    #[test]
    fn images_are_references_or_paths() {
        let parse = |text: &str| ImageSource::parse(text, Path::new("/w"));
        let stored = |reference: &str| ImageSource::Stored {
            reference: reference.to_owned(),
        };
        assert_eq!(parse("alpine:3.20").unwrap(), stored("alpine:3.20"));
        assert_eq!(
            parse("ghcr.io/a/b@sha256:0").unwrap(),
            stored("ghcr.io/a/b@sha256:0")
        );
        assert_eq!(
            parse("./rootfs").unwrap(),
            ImageSource::Directory {
                path: PathBuf::from("/w/rootfs")
            }
        );
        let disk = parse("/d/x.qcow2").unwrap();
        assert!(matches!(
            disk,
            ImageSource::Disk {
                format: DiskImageFormat::Qcow2,
                ..
            }
        ));
        for bad in ["", "-x", "a b", "~/x", ".hidden"] {
            assert_eq!(
                parse(bad).unwrap_err().kind(),
                ErrorKind::InvalidConfig,
                "{bad}"
            );
        }
    }
}
