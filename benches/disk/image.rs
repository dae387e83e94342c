//! The images that are served: filled in the same way for every server.

use std::cell::OnceCell;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::slow::SlowDisk;

/// What an image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Image {
    /// A raw file filled by writes of 1 MiB: its page cache has large folios where the host gives them.
    Raw,
    /// A raw file filled by writes of 4 KiB.
    RawSmall,
    /// The raw file on tmpfs.
    RawMemory,
    /// The same, made anew for each run.
    RawAnew,
    /// A filled qcow2 image.
    Qcow2,
    /// A filled qcow2 image on tmpfs.
    Qcow2Memory,
    /// An empty qcow2 image, made anew for each run.
    Fresh,
    /// An empty qcow2 image on tmpfs, made anew for each run.
    FreshMemory,
    /// A qcow2 image of 1 TiB with data at 64 Ki places that lie far apart.
    Huge,
    /// A disk of its own whose reads take a millisecond.
    Slow,
    /// A filled monolithicFlat VMDK.
    VmdkFlat,
    /// A filled monolithicSparse VMDK.
    VmdkSparse,
}

/// Bytes of an ordinary image.
pub const BYTES: u64 = 512 << 20;
/// Bytes of the huge image.
pub const HUGE: u64 = 1 << 40;
/// Pieces of data in the huge image.
pub const HUGE_PIECES: u64 = 2048;

impl Image {
    /// Name of the format, as both servers call it.
    pub fn format(self) -> &'static str {
        match self {
            Self::Raw | Self::RawSmall | Self::RawMemory | Self::RawAnew | Self::Slow => "raw",
            Self::VmdkFlat | Self::VmdkSparse => "vmdk",
            _ => "qcow2",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Raw => "large.raw",
            Self::RawSmall => "small.raw",
            Self::RawMemory => "memory.raw",
            Self::RawAnew => "anew.raw",
            Self::Qcow2 => "full.qcow2",
            Self::Qcow2Memory => "full-memory.qcow2",
            Self::Fresh => "fresh.qcow2",
            Self::FreshMemory => "fresh-memory.qcow2",
            Self::Huge => "huge.qcow2",
            Self::Slow => "slow.raw",
            Self::VmdkFlat => "flat.vmdk",
            Self::VmdkSparse => "sparse.vmdk",
        }
    }

    fn in_memory(self) -> bool {
        matches!(
            self,
            Self::RawMemory | Self::Qcow2Memory | Self::FreshMemory
        )
    }

    fn made_anew(self) -> bool {
        matches!(self, Self::Fresh | Self::FreshMemory | Self::RawAnew)
    }

    /// The file whose bare cost belongs beside a result: what holds the data.
    pub fn data_file(self, path: &Path) -> PathBuf {
        match self {
            Self::VmdkFlat => path.with_file_name("flat-flat.vmdk"),
            _ => path.to_owned(),
        }
    }
}

/// Two folders for images: one on the disk, one on tmpfs.
pub struct Folders {
    /// On the disk.
    pub disk: PathBuf,
    /// On tmpfs.
    pub memory: PathBuf,
    slow: OnceCell<SlowDisk>,
}

impl Folders {
    /// A folder on the disk and one on tmpfs.
    pub fn new(disk: &Path, memory: &Path) -> Self {
        Self {
            disk: disk.to_owned(),
            memory: memory.to_owned(),
            slow: OnceCell::new(),
        }
    }

    /// Path of an image, which is made if it is not there or has to be new for each run.
    ///
    /// # Errors
    ///
    /// When the host or qemu-img reports an error.
    pub fn image(&self, image: Image) -> Result<PathBuf> {
        if image == Image::Slow {
            if self.slow.get().is_none() {
                self.slow.set(SlowDisk::mount(&self.disk)?).ok();
            }
            let slow = self.slow.get().context("no slow disk")?;
            return Ok(slow.path().to_owned());
        }
        let folder = if image.in_memory() {
            &self.memory
        } else {
            &self.disk
        };
        let path = folder.join(image.name());
        if image.made_anew() {
            fs::remove_file(&path).ok();
        }
        if !path.exists() {
            make(image, folder, &path).with_context(|| format!("making {}", path.display()))?;
        }
        Ok(path)
    }
}

fn make(image: Image, folder: &Path, path: &Path) -> Result<()> {
    let to = path.display().to_string();
    let size = BYTES.to_string();
    match image {
        Image::Raw | Image::RawAnew | Image::RawMemory => fill(path, 1 << 20),
        Image::RawSmall => fill(path, 4096),
        Image::Slow => Ok(()),
        Image::Fresh | Image::FreshMemory => {
            tool("qemu-img", &["create", "-q", "-f", "qcow2", &to, &size])
        }
        Image::Huge => huge(path),
        Image::Qcow2 | Image::Qcow2Memory | Image::VmdkFlat | Image::VmdkSparse => {
            let source = folder.join("source.raw");
            if !source.exists() {
                fill(&source, 1 << 20)?;
            }
            let option = match image {
                Image::VmdkFlat => "subformat=monolithicFlat",
                Image::VmdkSparse => "subformat=monolithicSparse",
                _ => "cluster_size=64k",
            };
            let from = source.display().to_string();
            let format = image.format();
            tool(
                "qemu-img",
                &[
                    "convert", "-f", "raw", "-O", format, "-o", option, &from, &to,
                ],
            )?;
            fs::remove_file(source)?;
            // The page cache holds it either way; what is dirty would be written back in a row.
            File::open(path)?.sync_all()?;
            Ok(())
        }
    }
}

/// Fills a file with bytes that are no zeroes, by writes of one size.
fn fill(path: &Path, write: usize) -> Result<()> {
    use std::io::Write;
    let mut file = File::create(path)?;
    let block: Vec<u8> = (0..write).map(|at| (at % 251) as u8 | 1).collect();
    for _ in 0..BYTES / write as u64 {
        file.write_all(&block)?;
    }
    file.sync_all()?;
    Ok(())
}

fn huge(path: &Path) -> Result<()> {
    let to = path.display().to_string();
    tool(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", &to, &HUGE.to_string()],
    )?;
    let mut commands = vec!["-f".to_owned(), "qcow2".to_owned()];
    for piece in 0..HUGE_PIECES {
        let at = piece * (HUGE / HUGE_PIECES);
        commands.extend(["-c".to_owned(), format!("write -q -P 7 {at} 4096")]);
    }
    commands.push(to);
    let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
    tool("qemu-io", &commands)
}

fn tool(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("starting {program}, of the package qemu-utils"))?;
    ensure!(
        output.status.success(),
        "{program}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}
