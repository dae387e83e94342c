//! The material of the workloads: a tree of known shape, its archive, and a repository of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

const DIRECTORIES: u64 = 400;
const FILES: u64 = 4200;
/// Mean size of a file in bytes: 84 MB in all.
const MEAN: u64 = 20_000;

/// Where the material lies.
pub struct Source {
    /// A tar archive of the tree, whose folder is called `tree`.
    pub archive: PathBuf,
    /// A repository with the tree as its only commit.
    pub repository: PathBuf,
    /// Home of the programs, without anybody's settings.
    pub home: PathBuf,
}

impl Source {
    /// Makes everything below `folder`; the same every time.
    ///
    /// # Errors
    ///
    /// When the host, tar or git reports an error.
    pub fn make(folder: &Path) -> Result<Self> {
        let repository = folder.join("tree");
        tree(&repository)?;
        let source = Self {
            archive: folder.join("tree.tar"),
            repository,
            home: folder.to_owned(),
        };
        let archive = source.archive.display().to_string();
        source.run(folder, "tar", &["-cf", &archive, "tree"])?;
        fs::write(
            folder.join(".gitconfig"),
            "[user]\nname = bench\nemail = bench@localhost\n",
        )?;
        let within = &source.repository;
        source.run(within, "git", &["init", "-q", "-b", "main"])?;
        source.run(within, "git", &["add", "-A"])?;
        source.run(within, "git", &["commit", "-q", "-m", "All of it"])?;
        // Loose objects, as a repository in use has them: git packs only later.
        Ok(source)
    }

    /// Runs a program in a folder, with the settings of nobody.
    ///
    /// # Errors
    ///
    /// When it cannot be started or fails.
    pub fn run(&self, within: &Path, program: &str, arguments: &[&str]) -> Result<()> {
        let output = Command::new(program)
            .args(arguments)
            .current_dir(within)
            .env("HOME", &self.home)
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .output()
            .with_context(|| format!("starting {program}"))?;
        ensure!(
            output.status.success(),
            "{program} {}: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(())
    }
}

/// Folders nested up to five deep, and files of all sizes: most small, few large.
fn tree(root: &Path) -> Result<()> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    let mut folders = vec![root.to_owned()];
    for number in 1..DIRECTORIES {
        let parent = loop {
            let place = usize::try_from(random(folders.len() as u64))?;
            let parent = &folders[place];
            let depth = parent.strip_prefix(root)?.components().count();
            if depth < 5 {
                break parent;
            }
        };
        folders.push(parent.join(format!("folder-{number:03}")));
    }
    for folder in &folders {
        fs::create_dir_all(folder)?;
    }
    for number in 0..FILES {
        let folder = &folders[usize::try_from(random(DIRECTORIES))?];
        // Three quarters of the files hold a sixteenth of the bytes.
        let len = if random(4) > 0 {
            200 + random(MEAN / 6)
        } else {
            random(MEAN * 15 / 2)
        };
        let bytes: Vec<u8> = (0..len.div_ceil(8))
            .flat_map(|_| {
                (random(u64::MAX) & 0x0f0f_0f0f_0f0f_0f0f | 0x6060_6060_6060_6060).to_le_bytes()
            })
            .collect();
        fs::write(folder.join(format!("file-{number:04}.txt")), bytes)?;
    }
    Ok(())
}
