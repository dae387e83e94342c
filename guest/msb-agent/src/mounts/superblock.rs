//! Tells what lies on a disk by the marks that file systems leave there; pure.

/// How many bytes from the start of a disk [`identify`] wants to see.
pub(crate) const PROBE_LEN: usize = 68 << 10;

/// What a disk holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    /// A file system, by the name the kernel knows it under.
    FileSystem(&'static str),
    /// Something that cannot be mounted as it is, in words.
    Other(&'static str),
    /// Zeros only.
    Blank,
    /// Nothing that is known here.
    Unknown,
}

/// Bytes at an offset, and what they mean. Formats that wrap others come first.
const MARKS: &[(usize, &[u8], Content)] = &[
    (
        0,
        b"QFI\xfb",
        Content::Other("a qcow2 image inside the disk: was it opened as raw?"),
    ),
    (
        0,
        b"KDMV",
        Content::Other("a vmdk image inside the disk: was it opened as raw?"),
    ),
    (
        0,
        b"# Disk DescriptorFile",
        Content::Other("a vmdk descriptor: was it opened as raw?"),
    ),
    (
        0,
        b"LUKS\xba\xbe",
        Content::Other("a LUKS encrypted volume"),
    ),
    (536, b"LVM2 001", Content::Other("an LVM physical volume")),
    (4086, b"SWAPSPACE2", Content::Other("swap space")),
    (
        4096,
        b"\xfc\x4e\x2b\xa9",
        Content::Other("a member of a RAID"),
    ),
    (0, b"XFSB", Content::FileSystem("xfs")),
    (0x1_0040, b"_BHRfS_M", Content::FileSystem("btrfs")),
    (0, b"hsqs", Content::FileSystem("squashfs")),
    (1024, b"\xe2\xe1\xf5\xe0", Content::FileSystem("erofs")),
    (1024, b"\x10\x20\xf5\xf2", Content::FileSystem("f2fs")),
    (3, b"EXFAT   ", Content::FileSystem("exfat")),
    (3, b"NTFS    ", Content::FileSystem("ntfs3")),
    (32_769, b"CD001", Content::FileSystem("iso9660")),
];

const PARTITIONS: Content =
    Content::Other("a partition table; only a file system on the whole disk can be mounted");

/// Says what the disk that starts with `bytes` holds.
pub(crate) fn identify(bytes: &[u8]) -> Content {
    let marked = MARKS
        .iter()
        .find(|(offset, mark, _)| has(bytes, *offset, mark));
    if let Some((_, _, content)) = marked {
        return *content;
    }
    if let Some(name) = ext(bytes) {
        return Content::FileSystem(name);
    }
    if has(bytes, 512, b"EFI PART") || has(bytes, 4096, b"EFI PART") {
        return PARTITIONS;
    }
    if has(bytes, 510, &[0x55, 0xaa]) {
        return boot_sector(bytes);
    }
    if bytes.iter().all(|&byte| byte == 0) {
        Content::Blank
    } else {
        Content::Unknown
    }
}

fn has(bytes: &[u8], offset: usize, mark: &[u8]) -> bool {
    bytes
        .get(offset..)
        .is_some_and(|rest| rest.starts_with(mark))
}

fn word(bytes: &[u8], offset: usize) -> u32 {
    let word = bytes.get(offset..).and_then(|rest| rest.first_chunk());
    word.map_or(0, |word| u32::from_le_bytes(*word))
}

/// The three generations of ext share a magic number and differ in their feature bits.
fn ext(bytes: &[u8]) -> Option<&'static str> {
    const HAS_JOURNAL: u32 = 0x4;
    const JOURNAL_DEVICE: u32 = 0x8;
    // filetype, recovery and meta_bg, which ext3 knows.
    const EXT3_INCOMPATIBLE: u32 = 0x2 | 0x4 | 0x10;
    // sparse_super, large_file and btree_dir.
    const EXT3_READ_ONLY_COMPATIBLE: u32 = 0x1 | 0x2 | 0x4;
    if !has(bytes, 1080, &[0x53, 0xef]) {
        return None;
    }
    let compatible = word(bytes, 1024 + 0x5c);
    let incompatible = word(bytes, 1024 + 0x60);
    let read_only_compatible = word(bytes, 1024 + 0x64);
    if incompatible & JOURNAL_DEVICE != 0 {
        return None;
    }
    let newer = incompatible & !EXT3_INCOMPATIBLE != 0
        || read_only_compatible & !EXT3_READ_ONLY_COMPATIBLE != 0;
    Some(match (newer, compatible & HAS_JOURNAL != 0) {
        (true, _) => "ext4",
        (false, true) => "ext3",
        (false, false) => "ext2",
    })
}

/// A FAT file system and a master boot record end their first sector alike.
fn boot_sector(bytes: &[u8]) -> Content {
    if has(bytes, 82, b"FAT32") || has(bytes, 54, b"FAT1") || has(bytes, 54, b"FAT ") {
        return Content::FileSystem("vfat");
    }
    let entries = bytes.get(446..510).unwrap_or_default().chunks_exact(16);
    let partition = |entry: &[u8]| {
        entry.first().is_some_and(|status| status & 0x7f == 0)
            && entry.get(4).is_some_and(|&kind| kind != 0)
            && word(entry, 12) != 0
    };
    if entries.into_iter().any(partition) {
        PARTITIONS
    } else {
        Content::Unknown
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn check(maker: &str, args: &[&str], size: u64, expected: Content) {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(size).unwrap();
        let made = Command::new(maker)
            .args(args)
            .arg(image.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        match made {
            Ok(status) if status.success() => {
                let mut bytes = std::fs::read(image.path()).unwrap();
                bytes.truncate(PROBE_LEN);
                assert_eq!(identify(&bytes), expected, "{maker} {args:?}");
            }
            result => println!("skipped {maker} {args:?}: {result:?}"),
        }
    }

    #[test]
    fn images_of_the_real_makers_are_recognised() {
        let fs = Content::FileSystem;
        let mib = 1 << 20;
        check("mkfs.ext4", &["-q", "-F"], 8 * mib, fs("ext4"));
        check(
            "mkfs.ext4",
            &["-q", "-F", "-O", "^has_journal"],
            8 * mib,
            fs("ext4"),
        );
        check(
            "mkfs.ext4",
            &["-q", "-F", "-b", "1024"],
            8 * mib,
            fs("ext4"),
        );
        check("mkfs.ext3", &["-q", "-F"], 8 * mib, fs("ext3"));
        check("mkfs.ext2", &["-q", "-F"], 8 * mib, fs("ext2"));
        check("mkfs.xfs", &["-q", "-f"], 320 * mib, fs("xfs"));
        check("mkfs.btrfs", &["-q", "-f"], 128 * mib, fs("btrfs"));
        check("mkfs.vfat", &["-F", "32"], 64 * mib, fs("vfat"));
        check("mkfs.vfat", &["-F", "12"], 2 * mib, fs("vfat"));
        check("mkfs.exfat", &[], 8 * mib, fs("exfat"));
        check("mkswap", &[], 8 * mib, Content::Other("swap space"));
    }

    #[test]
    fn what_cannot_be_mounted_is_named() {
        let mut disk = vec![0; PROBE_LEN];
        assert_eq!(identify(&disk), Content::Blank);
        assert_eq!(identify(&[]), Content::Blank);
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        assert_eq!(identify(&disk), Content::Unknown);
        disk[446 + 4] = 0x83;
        disk[446 + 12] = 1;
        assert_eq!(identify(&disk), PARTITIONS);
        let mut disk = vec![0; 700];
        disk[512..520].copy_from_slice(b"EFI PART");
        assert_eq!(identify(&disk), PARTITIONS);
        assert!(matches!(identify(b"QFI\xfb\0\0\0\x03"), Content::Other(_)));
        assert_eq!(identify(b"something"), Content::Unknown);
    }
}
