//! Sizes in mebibytes: the unit of every size that a user writes.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A size in MiB.
///
/// ```
/// use microsandbox::{Mebibytes, SizeExt};
///
/// assert_eq!("1.5G".parse(), Ok(Mebibytes(1536)));
/// assert_eq!(Mebibytes::from(512), 512.mib());
/// assert_eq!(20.gib().to_string(), "20 GiB");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Mebibytes(pub u32);

/// A text that is no size.
///
/// ```
/// use microsandbox::{Mebibytes, SizeError};
///
/// assert_eq!("9Q".parse::<Mebibytes>(), Err(SizeError("9Q".to_owned())));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a size: write whole MiB (`512` or `512M`) or GiB (`20G`, `1.5G`)")]
pub struct SizeError(pub String);

impl Mebibytes {
    /// The size in bytes.
    ///
    /// ```
    /// use microsandbox::SizeExt;
    ///
    /// assert_eq!(2.mib().bytes(), 2 * 1024 * 1024);
    /// ```
    pub fn bytes(self) -> u64 {
        u64::from(self.0) << 20
    }
}

impl From<u32> for Mebibytes {
    fn from(mib: u32) -> Self {
        Self(mib)
    }
}

/// Sizes written as `20.gib()`, `512.mib()` and `2048.kib()`.
///
/// ```
/// use microsandbox::{Mebibytes, SizeExt};
///
/// assert_eq!(20.gib(), Mebibytes(20 * 1024));
/// ```
pub trait SizeExt {
    /// This many KiB, rounded down to whole MiB.
    ///
    /// ```
    /// # use microsandbox::{Mebibytes, SizeExt};
    /// assert_eq!(2048.kib(), Mebibytes(2));
    /// assert_eq!(1000.kib(), Mebibytes(0));
    /// ```
    fn kib(self) -> Mebibytes;
    /// This many MiB.
    ///
    /// ```
    /// # use microsandbox::{Mebibytes, SizeExt};
    /// assert_eq!(512.mib(), Mebibytes(512));
    /// ```
    fn mib(self) -> Mebibytes;
    /// This many GiB; the largest size there is when it would be more.
    ///
    /// ```
    /// # use microsandbox::{Mebibytes, SizeExt};
    /// assert_eq!(2.gib(), Mebibytes(2048));
    /// assert_eq!(u32::MAX.gib(), Mebibytes(u32::MAX));
    /// ```
    fn gib(self) -> Mebibytes;
}

impl SizeExt for u32 {
    fn kib(self) -> Mebibytes {
        Mebibytes(self / 1024)
    }

    fn mib(self) -> Mebibytes {
        Mebibytes(self)
    }

    fn gib(self) -> Mebibytes {
        Mebibytes(self.saturating_mul(1024))
    }
}

impl std::str::FromStr for Mebibytes {
    type Err = SizeError;

    /// Reads `N`, `NM` or `Nm` (MiB), `NG` or `Ng` (GiB, a fraction allowed when it makes whole
    /// MiB) (spec mounts 1.6).
    fn from_str(text: &str) -> Result<Self, SizeError> {
        let bad = || SizeError(text.to_owned());
        let digits = |part: &str| -> Result<u32, SizeError> {
            if part.is_empty() || !part.bytes().all(|b| b.is_ascii_digit()) {
                return Err(bad());
            }
            part.parse().map_err(|_| bad())
        };
        if let Some(gib) = text.strip_suffix(['G', 'g']) {
            let (whole, fraction) = gib.split_once('.').unwrap_or((gib, ""));
            let mib = digits(whole)?.checked_mul(1024).ok_or_else(bad)?;
            if !gib.contains('.') {
                return Ok(Self(mib));
            }
            let scale = 10_u64.checked_pow(u32::try_from(fraction.len()).map_err(|_| bad())?);
            let part = u64::from(digits(fraction)?) * 1024;
            let scale = scale.ok_or_else(bad)?;
            let part = u32::try_from(part / scale).map_err(|_| bad())?;
            return mib.checked_add(part).map(Self).ok_or_else(bad);
        }
        digits(text.strip_suffix(['M', 'm']).unwrap_or(text)).map(Self)
    }
}

impl fmt::Display for Mebibytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 >= 1024 && self.0.is_multiple_of(1024) {
            write!(f, "{} GiB", self.0 / 1024)
        } else {
            write!(f, "{} MiB", self.0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_users_write_them() {
        for (text, mib) in [
            ("100", 100),
            ("512M", 512),
            ("512m", 512),
            ("20G", 20480),
            ("1.5G", 1536),
            ("0.5g", 512),
            ("0", 0),
        ] {
            assert_eq!(text.parse(), Ok(Mebibytes(mib)), "{text}");
        }
    }

    #[test]
    fn other_units_and_signs_are_refused() {
        for text in [
            "", "G", "M", "1K", "1T", "1B", "1Mi", "1MB", "-1", "+1", "1.5M", "1.G", ".5G",
            "1..5G", "9999999G", "1 G",
        ] {
            assert!(text.parse::<Mebibytes>().is_err(), "{text}");
        }
    }
}
