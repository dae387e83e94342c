//! Makes sparse raw disks with an ext4 file system on them.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::error::{Error, ErrorKind, MicrosandboxResult};
use crate::host::in_path;
use crate::rundir::sync_dir;

/// What the file system can, whatever the host's own defaults are: the set that guest kernels of
/// the last ten years know.
const FEATURES: &str = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,\
flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum";

/// Makes a disk of exactly `size_bytes` at `path`, whole or not at all. Nothing must be there yet.
///
/// The file is sparse and its tables are left as holes, so that this takes no longer for a large
/// disk; there is no `lost+found`, which surprises programs that want an empty directory.
///
/// # Errors
///
/// [`ErrorKind::Unsupported`] without e2fsprogs, [`ErrorKind::InvalidConfig`] when the size is too
/// small for ext4, [`ErrorKind::Io`] when the host refuses.
pub(crate) fn make_ext4(path: &Path, size_bytes: u64, label: &str) -> MicrosandboxResult<()> {
    let cannot = |error: std::io::Error| {
        Error::io(format!("cannot make the disk `{}`", path.display()), error)
    };
    let folder = path
        .parent()
        .ok_or_else(|| cannot(std::io::ErrorKind::InvalidInput.into()))?;
    let draft = tempfile::Builder::new()
        .prefix(".draft-")
        .tempfile_in(folder)
        .map_err(cannot)?;
    draft.as_file().set_len(size_bytes).map_err(cannot)?;

    let mut mkfs = tool("mkfs.ext4")?;
    // No set-up of the host's changes what the disk is.
    mkfs.env("MKE2FS_CONFIG", "/dev/null")
        .args([
            "-q", "-F", "-b", "4096", "-I", "256", "-m", "0", "-O", FEATURES,
        ])
        .args([
            "-E",
            "lazy_itable_init=0,lazy_journal_init=1,root_owner=0:0",
        ])
        .args(["-L", label.get(..16).unwrap_or(label)])
        .arg(draft.path());
    run(&mut mkfs, path)?;
    run(
        tool("debugfs")?
            .args(["-w", "-R", "rmdir lost+found"])
            .arg(draft.path()),
        path,
    )?;

    draft.as_file().sync_all().map_err(cannot)?;
    draft
        .persist_noclobber(path)
        .map_err(|error| cannot(error.error))?;
    sync_dir(folder).map_err(cannot)
}

fn tool(name: &str) -> MicrosandboxResult<Command> {
    let program = in_path(name).ok_or_else(|| {
        let message = format!("the program `{name}` was not found");
        Error::new(ErrorKind::Unsupported, message).with_hint("install e2fsprogs")
    })?;
    let mut command = Command::new(program);
    command.env("LC_ALL", "C").stdin(Stdio::null());
    Ok(command)
}

fn run(command: &mut Command, disk: &Path) -> MicrosandboxResult<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let done = command
        .output()
        .map_err(|error| Error::io(format!("cannot run `{program}`"), error))?;
    if done.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&done.stderr);
    let said = said.lines().last().unwrap_or("nothing was said").trim();
    let message = format!("cannot make ext4 on `{}`: {said}", disk.display());
    Err(Error::new(ErrorKind::InvalidConfig, message).with_hint("a larger size may help"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn said(program: &str, args: &[&str], disk: &Path) -> String {
        let output = Command::new(in_path(program).unwrap())
            .args(args)
            .arg(disk)
            .output()
            .unwrap();
        assert!(output.status.success(), "{program}: {output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    #[test]
    fn disks_have_exactly_their_size_and_are_sound_empty_and_sparse() {
        if in_path("mkfs.ext4").is_none() {
            println!("skipped: there is no mkfs.ext4 on this machine");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        for mib in [1, 3, 64, 20 << 10] {
            let disk = dir.path().join(format!("{mib}.raw"));
            make_ext4(&disk, mib << 20, "label").unwrap();
            let found = std::fs::metadata(&disk).unwrap();
            assert_eq!(found.len(), mib << 20);
            assert!(
                found.blocks() * 512 < 8 << 20,
                "{mib} MiB take {} blocks",
                found.blocks()
            );
            // e2fsck and debugfs are the judges.
            said("e2fsck", &["-f", "-n"], &disk);
            let listing = said("debugfs", &["-R", "ls -p /"], &disk);
            assert!(!listing.contains("lost+found"), "{listing}");
            let header = said("dumpe2fs", &["-h"], &disk);
            assert!(
                header.contains(&format!("Block count:              {}\n", mib << 8)),
                "{header}"
            );
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 4);
    }

    #[test]
    fn a_disk_that_is_there_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk.raw");
        std::fs::write(&disk, "precious").unwrap();
        assert!(make_ext4(&disk, 1 << 20, "").is_err());
        assert_eq!(std::fs::read(&disk).unwrap(), b"precious");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
