//! The workloads: what is prepared, and what is then counted and timed.

use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::source::Source;

/// One workload.
pub struct Step {
    /// What it is called on the command line.
    pub name: &'static str,
    /// Number in the list of targets.
    pub id: &'static str,
    /// What is done, in words.
    pub what: &'static str,
    /// Mounted anew before, so that the guest has nothing in memory.
    pub cold: bool,
    /// Other steps whose result it needs.
    pub needs: &'static [&'static str],
    /// What is counted.
    pub run: fn(&Source, &Path) -> Result<()>,
}

/// All, in the order in which they follow each other.
pub const STEPS: &[Step] = &[
    Step {
        name: "untar",
        id: "F7",
        what: "untar",
        cold: true,
        needs: &[],
        run: untar,
    },
    Step {
        name: "find",
        id: "F8",
        what: "find, cold",
        cold: true,
        needs: &["untar"],
        run: find,
    },
    Step {
        name: "du",
        id: "F8",
        what: "du, cold",
        cold: true,
        needs: &["untar"],
        run: du,
    },
    Step {
        name: "cat",
        id: "F9",
        what: "cat of all, cold",
        cold: true,
        needs: &["untar"],
        run: cat,
    },
    Step {
        name: "find-cat",
        id: "F10",
        what: "find and cat, three times",
        cold: true,
        needs: &["untar"],
        run: find_cat,
    },
    Step {
        name: "missing",
        id: "F11",
        what: "10 000 stats of 100 missing names",
        cold: true,
        needs: &[],
        run: missing,
    },
    Step {
        name: "small-files",
        id: "F12",
        what: "2 000 new files of 1 KiB",
        cold: true,
        needs: &[],
        run: small_files,
    },
    Step {
        name: "copy",
        id: "F13",
        what: "cp -r",
        cold: true,
        needs: &["untar"],
        run: copy,
    },
    Step {
        name: "clone",
        id: "F14",
        what: "git clone",
        cold: true,
        needs: &[],
        run: clone,
    },
    Step {
        name: "status",
        id: "F15",
        what: "git status, three times",
        cold: true,
        needs: &["clone"],
        run: status,
    },
    Step {
        name: "sqlite",
        id: "F16",
        what: "sqlite, 300 inserts each committed",
        cold: true,
        needs: &[],
        run: sqlite,
    },
    Step {
        name: "small-writes",
        id: "F20",
        what: "4 MiB by writes of 512 bytes",
        cold: true,
        needs: &[],
        run: small_writes,
    },
    Step {
        name: "remove",
        id: "F17",
        what: "rm -rf",
        cold: true,
        needs: &["untar"],
        run: remove,
    },
];

fn untar(source: &Source, root: &Path) -> Result<()> {
    source.run(root, "tar", &["-xf", &source.archive.display().to_string()])
}

fn find(source: &Source, root: &Path) -> Result<()> {
    source.run(root, "find", &["tree"])
}

fn du(source: &Source, root: &Path) -> Result<()> {
    source.run(root, "du", &["-s", "tree"])
}

fn cat(source: &Source, root: &Path) -> Result<()> {
    let all = "find tree -type f -exec cat {} + >/dev/null";
    source.run(root, "sh", &["-c", all])
}

fn find_cat(source: &Source, root: &Path) -> Result<()> {
    for _ in 0..3 {
        cat(source, root)?;
    }
    Ok(())
}

fn missing(_: &Source, root: &Path) -> Result<()> {
    let names: Vec<_> = (0..100)
        .map(|number| root.join(format!("missing-{number}")))
        .collect();
    for _ in 0..100 {
        for name in &names {
            ensure!(fs::metadata(name).is_err(), "{} is there", name.display());
        }
    }
    Ok(())
}

fn small_files(_: &Source, root: &Path) -> Result<()> {
    let folder = root.join("small");
    fs::create_dir(&folder)?;
    for number in 0..2000 {
        fs::write(folder.join(format!("file-{number}")), [b'x'; 1024])?;
    }
    Ok(())
}

fn copy(source: &Source, root: &Path) -> Result<()> {
    source.run(root, "cp", &["-r", "tree", "copy"])
}

fn clone(source: &Source, root: &Path) -> Result<()> {
    let from = source.repository.display().to_string();
    source.run(
        root,
        "git",
        &["clone", "-q", "--no-hardlinks", &from, "clone"],
    )
}

fn status(source: &Source, root: &Path) -> Result<()> {
    for _ in 0..3 {
        source.run(&root.join("clone"), "git", &["status", "-s"])?;
    }
    Ok(())
}

fn sqlite(source: &Source, root: &Path) -> Result<()> {
    let program = "import sqlite3\n\
        base = sqlite3.connect('base.db', isolation_level=None)\n\
        base.execute('create table t (a integer primary key, b text)')\n\
        for n in range(300): base.execute('insert into t (b) values (?)', ('row %d' % n,))\n\
        assert base.execute('select count(*) from t').fetchone() == (300,)\n";
    source.run(root, "python3", &["-c", program])
}

fn small_writes(_: &Source, root: &Path) -> Result<()> {
    let mut file = fs::File::create(root.join("pieces")).context("creating a file")?;
    for _ in 0..8192 {
        file.write_all(&[b'x'; 512])?;
    }
    // The file counts as written when it is closed, as dd has it.
    Ok(())
}

fn remove(source: &Source, root: &Path) -> Result<()> {
    source.run(root, "rm", &["-rf", "tree"])
}
