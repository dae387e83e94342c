//! The text descriptor of a VMDK: which extents make the disk, and its parent. Pure.

/// Largest descriptor that is read.
pub const MAX_DESCRIPTOR: usize = 1 << 20;
const MAX_EXTENTS: usize = 4096;
/// 256 TiB: no sum of extents may overflow anything.
const MAX_SECTORS: u64 = 1 << 39;

/// Why a VMDK is refused. The message names the offending part.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VmdkError {
    /// Not this format at all.
    #[error("not a VMDK image (give its real format with --format)")]
    Magic,
    /// The descriptor is not text or too long.
    #[error("the VMDK descriptor is not readable text of at most 1 MiB")]
    NotText,
    /// A line of the descriptor cannot be understood.
    #[error("line {line} of the VMDK descriptor is not understood: {text}")]
    Line {
        /// Its number, from 1.
        line: usize,
        /// The line itself, shortened.
        text: String,
    },
    /// Nothing to read from.
    #[error("the VMDK descriptor has no extents or too many")]
    Extents,
    /// A field of a sparse extent's header has a value that no sound image has.
    #[error("{0} in the header of a VMDK extent is out of range")]
    Field(&'static str),
}

/// What an extent consists of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExtentKind {
    /// Plain bytes of a file.
    Flat {
        /// File name as written.
        name: String,
        /// Where in the file it begins, in sectors.
        offset: u64,
    },
    /// A file with grain tables.
    Sparse {
        /// File name as written.
        name: String,
    },
    /// Zeroes.
    Zero,
}

/// One extent line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtentLine {
    /// Whether it may be written.
    pub writable: bool,
    /// Length in sectors.
    pub sectors: u64,
    /// Where its bytes are.
    pub kind: ExtentKind,
}

/// A parsed descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// Content id; a child remembers its parent's.
    pub cid: u32,
    /// Content id of the parent at the time the child was made; `None` without a parent.
    pub parent_cid: Option<u32>,
    /// Name of the parent as written.
    pub parent: Option<String>,
    /// The disk, in order.
    pub extents: Vec<ExtentLine>,
}

impl Descriptor {
    /// Parses a descriptor; trailing NUL bytes are padding.
    ///
    /// # Errors
    ///
    /// [`VmdkError`] naming the first line that cannot be understood.
    pub fn parse(bytes: &[u8]) -> Result<Self, VmdkError> {
        let text = bytes.split(|&b| b == 0).next().unwrap_or_default();
        let text = std::str::from_utf8(text).map_err(|_| VmdkError::NotText)?;
        if text.len() > MAX_DESCRIPTOR {
            return Err(VmdkError::NotText);
        }
        if !text.trim_start().starts_with("# Disk DescriptorFile") {
            return Err(VmdkError::Magic);
        }
        let mut found = Self {
            cid: 0,
            parent_cid: None,
            parent: None,
            extents: Vec::new(),
        };
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            found.take_line(line).ok_or_else(|| VmdkError::Line {
                line: number + 1,
                text: line.chars().filter(|c| !c.is_control()).take(80).collect(),
            })?;
        }
        let total = found
            .extents
            .iter()
            .try_fold(0u64, |sum, e| sum.checked_add(e.sectors));
        let fits = total.is_some_and(|total| total <= MAX_SECTORS);
        if found.extents.is_empty() || found.extents.len() > MAX_EXTENTS || !fits {
            return Err(VmdkError::Extents);
        }
        Ok(found)
    }

    fn take_line(&mut self, line: &str) -> Option<()> {
        let word = line.split_whitespace().next()?;
        if matches!(word, "RW" | "RDONLY" | "NOACCESS") {
            self.extents.push(extent_line(line)?);
            return Some(());
        }
        let (key, value) = line.split_once('=')?;
        let value = value.trim().trim_matches('"');
        match key.trim() {
            "CID" => self.cid = u32::from_str_radix(value, 16).ok()?,
            "parentCID" => {
                let cid = u32::from_str_radix(value, 16).ok()?;
                self.parent_cid = (cid != u32::MAX).then_some(cid);
            }
            "parentFileNameHint" => self.parent = Some(value.to_owned()),
            _ => {}
        }
        Some(())
    }
}

/// `ACCESS SECTORS TYPE ["NAME" [OFFSET]]`
fn extent_line(line: &str) -> Option<ExtentLine> {
    let (head, name, tail) = match line.split_once('"') {
        Some((head, rest)) => {
            let (name, tail) = rest.split_once('"')?;
            (head, Some(name), tail)
        }
        None => (line, None, ""),
    };
    let mut words = head.split_whitespace();
    let access = words.next()?;
    let sectors = words
        .next()?
        .parse::<u64>()
        .ok()
        .filter(|&n| n > 0 && n <= MAX_SECTORS)?;
    let kind = words.next()?;
    let extra = words.next();
    let offset = tail.split_whitespace().next();
    let kind = match (kind, name) {
        ("FLAT", Some(name)) => {
            let offset = offset?.parse::<u64>().ok().filter(|&n| n <= MAX_SECTORS)?;
            ExtentKind::Flat {
                name: name.to_owned(),
                offset,
            }
        }
        ("VMFS", Some(name)) => ExtentKind::Flat {
            name: name.to_owned(),
            offset: 0,
        },
        ("SPARSE", Some(name)) => ExtentKind::Sparse {
            name: name.to_owned(),
        },
        ("ZERO", None) => ExtentKind::Zero,
        _ => return None,
    };
    let kind = if access == "NOACCESS" {
        ExtentKind::Zero
    } else {
        kind
    };
    extra.is_none().then_some(ExtentLine {
        writable: access == "RW",
        sectors,
        kind,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(line: &str, expected: impl Into<Option<ExtentKind>>) {
        let text = format!("# Disk DescriptorFile\nCID=00000001\nparentCID=ffffffff\n{line}\n");
        let kinds = Descriptor::parse(text.as_bytes());
        let kind = kinds
            .ok()
            .and_then(|d| d.extents.into_iter().next())
            .map(|e| e.kind);
        assert_eq!(kind, expected.into(), "{line}");
    }

    #[test]
    fn extent_lines() {
        let flat = |offset| {
            Some(ExtentKind::Flat {
                name: "a b.vmdk".into(),
                offset,
            })
        };
        check("RW 8 FLAT \"a b.vmdk\" 0", flat(0));
        check("RW 8 FLAT \"a b.vmdk\" 7", flat(7));
        check("RW 8 VMFS \"a b.vmdk\"", flat(0));
        check(
            "RW 8 SPARSE \"x.vmdk\"",
            Some(ExtentKind::Sparse {
                name: "x.vmdk".into(),
            }),
        );
        check("RW 8 ZERO", Some(ExtentKind::Zero));
        check("RW 8 FLAT \"a b.vmdk\"", None);
        check("RW 0 ZERO", None);
        check("RW -1 ZERO", None);
        check("RW 99999999999999999999 ZERO", None);
        check("RW 8 VMFSSPARSE \"x.vmdk\"", None);
        check("RW 8 SESPARSE \"x.vmdk\"", None);
        check("RW 8 FLAT \"x.vmdk 0", None);
        check("whatever", None);
    }

    #[test]
    fn sum_of_extents_is_bounded() {
        let line = format!("RW {} ZERO\n", 1u64 << 39).repeat(2);
        let text = format!("# Disk DescriptorFile\n{line}");
        assert_eq!(Descriptor::parse(text.as_bytes()), Err(VmdkError::Extents));
    }
}
