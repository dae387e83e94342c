//! Names of volumes and sandboxes, and paths in the guest: checked once, when they are made.

use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};

use serde::{Deserialize, Serialize};

/// A name or path that breaks its rule.
///
/// ```
/// use microsandbox::{NameError, spec::GuestPath};
///
/// let error = GuestPath::try_from("data".to_owned()).unwrap_err();
/// assert_eq!(error, NameError::Relative("data".to_owned()));
/// assert_eq!(error.to_string(), "guest path `data` is not absolute: write it from `/`");
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// A volume name is empty, too long, or holds another character than its rule allows.
    #[error(
        "`{0}` is not a volume name: use up to 128 letters, digits, `.`, `_` and `-`, beginning with a letter or digit"
    )]
    Volume(String),
    /// Likewise for a sandbox.
    #[error(
        "`{0}` is not a sandbox name: use up to 128 letters, digits, `.`, `_` and `-`, beginning with a letter or digit"
    )]
    Sandbox(String),
    /// A guest path does not begin with `/`.
    #[error("guest path `{0}` is not absolute: write it from `/`")]
    Relative(String),
    /// A guest path holds a `..` component.
    #[error("guest path `{0}` holds `..`: write the path it should lead to")]
    Parent(String),
    /// A guest path is the root.
    #[error("guest path `{0}` is the root directory: mount below it, or choose another image")]
    Root(String),
    /// A guest path holds a character it cannot.
    #[error("guest path `{0}` holds `{1}`, which a guest path cannot")]
    Character(String, char),
    /// A guest path lies where the guest's own file systems or the agent are.
    #[error(
        "guest path `{0}` lies in {1}, which belongs to the guest system: choose another place"
    )]
    Reserved(String, &'static str),
}

impl NameError {
    /// The name or path that breaks its rule.
    ///
    /// ```
    /// use microsandbox::spec::VolumeName;
    ///
    /// let error = VolumeName::try_from("my cache".to_owned()).unwrap_err();
    /// assert_eq!(error.value(), "my cache");
    /// ```
    pub fn value(&self) -> &str {
        match self {
            Self::Volume(value)
            | Self::Sandbox(value)
            | Self::Relative(value)
            | Self::Parent(value)
            | Self::Root(value)
            | Self::Character(value, _)
            | Self::Reserved(value, _) => value,
        }
    }
}

/// Name of a volume: letters, digits, `.`, `_`, `-`, beginning with a letter or digit, at most 128
/// bytes (spec mounts 1.9).
///
/// ```
/// use microsandbox::spec::VolumeName;
///
/// assert!(VolumeName::try_from("pip-cache".to_owned()).is_ok());
/// assert!(VolumeName::try_from("../pip-cache".to_owned()).is_err());
/// ```
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VolumeName(String);

/// Name of a sandbox: the same rule as a volume's.
///
/// ```
/// use microsandbox::spec::SandboxName;
///
/// assert!(SandboxName::try_from("worker-1".to_owned()).is_ok());
/// assert!(SandboxName::try_from("-worker".to_owned()).is_err());
/// ```
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SandboxName(String);

/// An absolute, normalised path in the guest: no `..`, no double or trailing slashes, not the root,
/// not in a place of the guest system (spec mounts 1.4).
///
/// ```
/// use microsandbox::spec::GuestPath;
///
/// assert_eq!(GuestPath::try_from("//srv/./data/".to_owned())?.as_str(), "/srv/data");
/// assert!(GuestPath::try_from("/proc/self".to_owned()).is_err());
/// # Ok::<(), microsandbox::spec::NameError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct GuestPath(String);

/// Directories of the guest system in which nothing can be mounted.
const RESERVED: [&str; 4] = ["/proc", "/sys", "/dev", "/.msb"];

impl VolumeName {
    /// The name as text.
    ///
    /// ```
    /// # use microsandbox::spec::VolumeName;
    /// let name = VolumeName::try_from("pip-cache".to_owned())?;
    /// assert_eq!(name.as_str(), "pip-cache");
    /// # Ok::<(), microsandbox::spec::NameError>(())
    /// ```
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl SandboxName {
    /// The name as text.
    ///
    /// ```
    /// # use microsandbox::spec::SandboxName;
    /// let name = SandboxName::try_from("worker".to_owned())?;
    /// assert_eq!(name.as_str(), "worker");
    /// # Ok::<(), microsandbox::spec::NameError>(())
    /// ```
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl SandboxName {
    /// A name for a sandbox that was given none: `msb-` and 8 hexadecimal digits.
    ///
    /// ```
    /// use microsandbox::{Sandbox, spec::SandboxName};
    ///
    /// let name = SandboxName::random();
    /// assert!(name.as_str().starts_with("msb-"));
    /// let sb = Sandbox::builder(name).image("alpine");
    /// # assert!(sb.build().is_ok());
    /// ```
    pub fn random() -> Self {
        let drawn = RandomState::new().build_hasher().finish();
        Self(format!("msb-{:08x}", drawn & 0xffff_ffff))
    }
}

impl GuestPath {
    /// The path as text.
    ///
    /// ```
    /// # use microsandbox::spec::GuestPath;
    /// let path = GuestPath::try_from("/app/src".to_owned())?;
    /// assert_eq!(path.as_str(), "/app/src");
    /// # Ok::<(), microsandbox::spec::NameError>(())
    /// ```
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Number of components: 1 for `/data`.
    ///
    /// ```
    /// # use microsandbox::spec::GuestPath;
    /// let path = GuestPath::try_from("/app/src".to_owned())?;
    /// assert_eq!(path.depth(), 2);
    /// # Ok::<(), microsandbox::spec::NameError>(())
    /// ```
    pub fn depth(&self) -> usize {
        self.0.matches('/').count()
    }

    /// Whether `other` lies below this path.
    ///
    /// ```
    /// # use microsandbox::spec::GuestPath;
    /// let app = GuestPath::try_from("/app".to_owned())?;
    /// assert!(app.contains(&GuestPath::try_from("/app/src".to_owned())?));
    /// assert!(!app.contains(&GuestPath::try_from("/apple".to_owned())?));
    /// # Ok::<(), microsandbox::spec::NameError>(())
    /// ```
    pub fn contains(&self, other: &Self) -> bool {
        other
            .0
            .strip_prefix(&self.0)
            .is_some_and(|rest| rest.starts_with('/'))
    }
}

impl TryFrom<String> for VolumeName {
    type Error = NameError;

    fn try_from(name: String) -> Result<Self, NameError> {
        if is_name(&name) {
            Ok(Self(name))
        } else {
            Err(NameError::Volume(name))
        }
    }
}

impl TryFrom<String> for SandboxName {
    type Error = NameError;

    fn try_from(name: String) -> Result<Self, NameError> {
        if is_name(&name) {
            Ok(Self(name))
        } else {
            Err(NameError::Sandbox(name))
        }
    }
}

impl TryFrom<String> for GuestPath {
    type Error = NameError;

    fn try_from(path: String) -> Result<Self, NameError> {
        if !path.starts_with('/') {
            return Err(NameError::Relative(path));
        }
        if let Some(bad) = path
            .chars()
            .find(|c| matches!(c, ':' | ';' | ',') || c.is_control())
        {
            return Err(NameError::Character(path, bad));
        }
        let parts: Vec<&str> = path
            .split('/')
            .filter(|part| !part.is_empty() && *part != ".")
            .collect();
        if parts.contains(&"..") {
            return Err(NameError::Parent(path));
        }
        if parts.is_empty() {
            return Err(NameError::Root(path));
        }
        let clean = format!("/{}", parts.join("/"));
        let reserved = RESERVED.iter().find(|place| {
            clean
                .strip_prefix(*place)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        });
        match reserved {
            Some(place) => Err(NameError::Reserved(path, place)),
            None => Ok(Self(clean)),
        }
    }
}

macro_rules! text {
    ($type:ty) => {
        impl From<$type> for String {
            fn from(value: $type) -> Self {
                value.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

text!(VolumeName);
text!(SandboxName);
text!(GuestPath);

fn is_name(name: &str) -> bool {
    name.len() <= 128
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> Result<String, NameError> {
        GuestPath::try_from(text.to_owned()).map(String::from)
    }

    #[test]
    fn guest_paths_are_normalised() {
        for (given, clean) in [
            ("/x", "/x"),
            ("//x//y/", "/x/y"),
            ("/./a/./b", "/a/b"),
            ("/devices", "/devices"),
        ] {
            assert_eq!(path(given).as_deref(), Ok(clean), "{given}");
        }
    }

    #[test]
    fn bad_guest_paths_are_told_apart() {
        assert!(matches!(path("x"), Err(NameError::Relative(_))));
        assert!(matches!(path("/a/../b"), Err(NameError::Parent(_))));
        assert!(matches!(path("/"), Err(NameError::Root(_))));
        assert!(matches!(path("/."), Err(NameError::Root(_))));
        assert!(matches!(path("/a,b"), Err(NameError::Character(_, ','))));
        assert!(matches!(
            path("/proc"),
            Err(NameError::Reserved(_, "/proc"))
        ));
        assert!(matches!(
            path("/dev/x"),
            Err(NameError::Reserved(_, "/dev"))
        ));
    }

    #[test]
    fn names_follow_their_rule() {
        for good in ["a", "pip-cache", "A1._-x"] {
            assert!(VolumeName::try_from(good.to_owned()).is_ok(), "{good}");
        }
        for bad in ["", ".x", "-n", "a/b", "a b", "ä", &"x".repeat(129)] {
            assert!(VolumeName::try_from(bad.to_owned()).is_err(), "{bad}");
        }
    }

    #[test]
    fn ancestors_contain_only_what_lies_below_them() {
        let at = |text: &str| GuestPath::try_from(text.to_owned()).unwrap();
        assert!(at("/a").contains(&at("/a/b")));
        assert!(!at("/a").contains(&at("/ab")));
        assert!(!at("/a").contains(&at("/a")));
    }
}
