//! The node table under every short sequence of what guest and host do, and under threads.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use clap::Parser;
use rustix::io::Errno;

use super::*;
use crate::args::{Args, Config};
use crate::tree::{Source, Tree};

fn serve(folder: &Path, budget: usize) -> Tree {
    let args = ["msb-fs", "--fd=3", "--stat-virt=relaxed", "--shared-dir=/"];
    let config = Config::try_from(Args::try_parse_from(args).unwrap()).unwrap();
    let mut tree = Tree::new(&Source::Directory(folder.to_owned()), config.rules).unwrap();
    let file = tree.place().unwrap();
    let stat = crate::sys::stat(&file).unwrap();
    tree.nodes = NodeTable::new(&stat, file, Access::Read, budget);
    tree
}

/// Only inodes that are a moment old are told apart by their birth.
fn grow_up() {
    std::thread::sleep(std::time::Duration::from_millis(40));
}

/// Takes the descriptor of every node that can do without.
fn spill_all(tree: &Tree) {
    for _ in 0..4 {
        tree.give_back(100);
    }
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Lookup(&'static CStr),
    Forget,
    Spill,
    Rename,
    Exchange,
    Unlink(&'static CStr),
    Create(&'static CStr),
    HostRename,
    HostReplace(&'static str),
    /// The directory `d`, and what is done in it.
    LookupDir,
    ForgetDir,
    RenameDir,
    LookupIn,
    UnlinkIn,
    MoveOut,
}

const STEPS: [Step; 11] = [
    Step::Lookup(c"a"),
    Step::Lookup(c"b"),
    Step::Forget,
    Step::Spill,
    Step::Rename,
    Step::Exchange,
    Step::Unlink(c"a"),
    Step::Unlink(c"b"),
    Step::Create(c"a"),
    Step::HostRename,
    Step::HostReplace("a"),
];

/// Steps on `d/c`, which is also `a`.
const STEPS_BELOW: [Step; 11] = [
    Step::LookupDir,
    Step::LookupIn,
    Step::Lookup(c"a"),
    Step::ForgetDir,
    Step::Forget,
    Step::Spill,
    Step::RenameDir,
    Step::UnlinkIn,
    Step::Unlink(c"a"),
    Step::MoveOut,
    Step::Create(c"b"),
];

/// What the guest believes: numbers with the inode and the lookups that they stand for.
struct Model<'a> {
    tree: Tree,
    folder: &'a Path,
    known: HashMap<u64, (u64, u64)>,
    /// The number of the directory.
    dir: Option<u64>,
    /// The host changed something by itself: a name may have gone.
    behind: bool,
}

impl Model<'_> {
    fn count(&mut self, id: u64, ino: u64) {
        let (known, lookups) = self.known.entry(id).or_insert((ino, 0));
        assert_eq!(*known, ino, "number {id} stands for another inode");
        *lookups += 1;
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Lookup(name) => {
                if let Some(entry) = self.tree.lookup(ROOT_ID, name).unwrap() {
                    self.count(entry.nodeid, entry.attr.ino);
                }
            }
            Step::Forget => self.forget(self.known.keys().min().copied()),
            Step::Spill => spill_all(&self.tree),
            Step::Rename => {
                let _ = self.tree.rename((ROOT_ID, c"a"), (ROOT_ID, c"b"), 0);
            }
            Step::Exchange => {
                let _ = self.tree.rename((ROOT_ID, c"a"), (ROOT_ID, c"b"), 2);
            }
            Step::Unlink(name) => {
                let _ = self.tree.unlink(ROOT_ID, name, false);
            }
            Step::Create(name) => {
                let args = crate::wire::abi::CreateIn {
                    flags: 2,
                    mode: 0o644,
                    ..Default::default()
                };
                let caller = crate::tree::Caller::default();
                if let Ok((entry, opened)) = self.tree.create(ROOT_ID, name, &args, caller) {
                    drop(self.tree.release(opened.fh));
                    self.count(entry.nodeid, entry.attr.ino);
                }
            }
            Step::HostRename => {
                let (from, to) = (self.folder.join("a"), self.folder.join("b"));
                self.behind |= fs::rename(from, to).is_ok();
            }
            Step::HostReplace(name) => {
                let path = self.folder.join(name);
                fs::remove_file(&path).ok();
                fs::write(&path, "other").unwrap();
                self.behind = true;
            }
            Step::LookupDir => {
                for name in [c"d", c"e"] {
                    if let Some(entry) = self.tree.lookup(ROOT_ID, name).unwrap() {
                        self.count(entry.nodeid, entry.attr.ino);
                        self.dir = Some(entry.nodeid);
                    }
                }
            }
            Step::ForgetDir => self.forget(self.dir),
            Step::RenameDir => {
                let _ = self.tree.rename((ROOT_ID, c"d"), (ROOT_ID, c"e"), 0);
            }
            Step::LookupIn | Step::UnlinkIn | Step::MoveOut => {
                if let Some(dir) = self.dir {
                    self.step_in(dir, step);
                }
            }
        }
    }

    fn step_in(&mut self, dir: u64, step: Step) {
        match step {
            Step::LookupIn => {
                if let Some(entry) = self.tree.lookup(dir, c"c").unwrap() {
                    self.count(entry.nodeid, entry.attr.ino);
                }
            }
            Step::UnlinkIn => drop(self.tree.unlink(dir, c"c", false)),
            _ => drop(self.tree.rename((dir, c"c"), (ROOT_ID, c"b"), 0)),
        }
    }

    fn forget(&mut self, id: Option<u64>) {
        let Some(id) = id else {
            return;
        };
        let (_, lookups) = self.known.remove(&id).unwrap();
        self.dir = self.dir.filter(|dir| *dir != id);
        self.tree.forget(id, lookups);
        assert_eq!(self.tree.getattr(id, None).err(), Some(Errno::STALE));
        // Once too often harms nobody.
        self.tree.forget(id, 1);
    }

    /// Every number that the guest holds stands for its inode, whatever has happened to its name;
    /// only what the host did may have lost it.
    fn check(&self, history: &[Step]) {
        for (id, (ino, _)) in &self.known {
            match self.tree.getattr(*id, None) {
                Ok(found) => assert_eq!(found.attr.ino, *ino, "{id} after {history:?}"),
                Err(Errno::STALE) if self.behind => {}
                Err(error) => panic!("{id}: {error} after {history:?}"),
            }
        }
    }
}

fn run(folder: &Path, history: &[Step]) {
    let mut model = Model {
        tree: serve(folder, 0),
        folder,
        known: HashMap::new(),
        dir: None,
        behind: false,
    };
    for (count, step) in history.iter().enumerate() {
        model.step(*step);
        if count == 2 {
            assert_eq!(model.tree.nodes.counts(), (1, 2), "nothing was spilled");
        }
        model.check(history);
    }
    let known: Vec<_> = model.known.drain().collect();
    for (id, (_, lookups)) in known {
        model.tree.forget(id, lookups);
    }
    assert_eq!(
        model.tree.nodes.counts(),
        (1, 0),
        "left over after {history:?}"
    );
}

#[test]
fn every_short_history_keeps_numbers_and_inodes_together() {
    // Both files known and without descriptor, then every three steps.
    let begin = [Step::Lookup(c"a"), Step::Lookup(c"b"), Step::Spill];
    let count = STEPS.len();
    let folder = tempfile::tempdir().unwrap();
    let place = |number: usize| folder.path().join(number.to_string());
    for number in 0..count.pow(3) {
        fs::create_dir(place(number)).unwrap();
        fs::write(place(number).join("a"), "a").unwrap();
        fs::write(place(number).join("b"), "b").unwrap();
    }
    grow_up();
    for number in 0..count.pow(3) {
        let free = (0..3).map(|at| STEPS[number / count.pow(at) % count]);
        let history: Vec<_> = begin.into_iter().chain(free).collect();
        run(&place(number), &history);
    }
}

#[test]
fn every_short_history_below_a_directory_loses_nothing() {
    // A directory and a file in it known and without descriptor, then every three steps.
    let begin = [Step::LookupDir, Step::LookupIn, Step::Spill];
    let count = STEPS_BELOW.len();
    let folder = tempfile::tempdir().unwrap();
    let place = |number: usize| folder.path().join(number.to_string());
    for number in 0..count.pow(3) {
        fs::create_dir_all(place(number).join("d")).unwrap();
        fs::write(place(number).join("a"), "a").unwrap();
        fs::hard_link(place(number).join("a"), place(number).join("d/c")).unwrap();
    }
    grow_up();
    for number in 0..count.pow(3) {
        let free = (0..3).map(|at| STEPS_BELOW[number / count.pow(at) % count]);
        let history: Vec<_> = begin.into_iter().chain(free).collect();
        run(&place(number), &history);
    }
}

#[test]
fn a_forgotten_directory_stays_for_the_cold_nodes_below_it() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir_all(folder.path().join("d/e")).unwrap();
    fs::write(folder.path().join("d/e/f"), "f").unwrap();
    fs::hard_link(folder.path().join("d/e/f"), folder.path().join("other")).unwrap();
    grow_up();
    let tree = serve(folder.path(), 0);
    let find = |parent, name| tree.lookup(parent, name).unwrap().unwrap().nodeid;
    let outer = find(ROOT_ID, c"d");
    let inner = find(outer, c"e");
    let file = find(inner, c"f");
    let stale = |id| tree.getattr(id, None).err() == Some(Errno::STALE);
    let forget_both_of = |outer, inner| {
        spill_all(&tree);
        tree.forget(outer, 1);
        tree.forget(inner, 1);
        assert!(stale(outer) && stale(inner));
        assert_eq!(tree.lookup(inner, c"f").err(), Some(Errno::STALE));
        assert_eq!(tree.nodes.counts(), (1, 3));
    };
    forget_both_of(outer, inner);
    // They are found again by the numbers that they had.
    assert_eq!((find(ROOT_ID, c"d"), find(outer, c"e")), (outer, inner));
    forget_both_of(outer, inner);
    // A rename above is noticed although the guest has no number for what it moves.
    tree.rename((ROOT_ID, c"d"), (ROOT_ID, c"moved"), 0)
        .unwrap();
    assert!(!stale(file));
    assert_eq!(tree.nodes.counts(), (2, 0));
    // Found elsewhere, it needs them no more.
    let outer = find(ROOT_ID, c"moved");
    let inner = find(outer, c"e");
    assert_eq!(find(inner, c"f"), file);
    forget_both_of(outer, inner);
    assert_eq!(find(ROOT_ID, c"other"), file);
    assert_eq!(tree.nodes.counts(), (1, 1));
    let outer = find(ROOT_ID, c"moved");
    find(find(outer, c"e"), c"f");
    spill_all(&tree);
    tree.reset();
    assert_eq!(tree.nodes.counts(), (1, 0));
}

#[test]
fn more_files_than_descriptors_are_served() {
    let folder = tempfile::tempdir().unwrap();
    for dir in 0..20 {
        let dir = folder.path().join(format!("d{dir}"));
        fs::create_dir(&dir).unwrap();
        for file in 0..50 {
            fs::write(dir.join(format!("f{file}")), format!("{dir:?} {file}")).unwrap();
        }
    }
    grow_up();
    let tree = serve(folder.path(), 16);
    let mut known = Vec::new();
    for dir in 0..20 {
        let name = std::ffi::CString::new(format!("d{dir}")).unwrap();
        let parent = tree.lookup(ROOT_ID, &name).unwrap().unwrap().nodeid;
        for file in 0..50 {
            let name = std::ffi::CString::new(format!("f{file}")).unwrap();
            let entry = tree.lookup(parent, &name).unwrap().unwrap();
            known.push((entry.nodeid, entry.attr.ino));
        }
    }
    let (live, cold) = tree.nodes.counts();
    assert!(live <= 64, "{live} descriptors for {cold} others");
    for (id, ino) in &known {
        assert_eq!(tree.getattr(*id, None).unwrap().attr.ino, *ino);
        let opened = tree.open(*id, 0, 0).unwrap();
        drop(tree.release(opened.fh));
    }
    assert!(tree.nodes.counts().0 <= 64);
    // Directories move as a whole, and what is in them stays known.
    tree.rename((ROOT_ID, c"d3"), (ROOT_ID, c"moved"), 0)
        .unwrap();
    for (id, ino) in &known {
        assert_eq!(tree.getattr(*id, None).unwrap().attr.ino, *ino);
    }
}

#[test]
fn what_is_open_keeps_its_descriptor() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a"), "content").unwrap();
    let ino = fs::metadata(folder.path().join("a")).unwrap().ino();
    grow_up();
    let tree = serve(folder.path(), 0);
    let id = tree.lookup(ROOT_ID, c"a").unwrap().unwrap().nodeid;
    let opened = tree.open(id, 0, 0).unwrap();
    spill_all(&tree);
    fs::remove_file(folder.path().join("a")).unwrap();
    assert_eq!(tree.getattr(id, None).unwrap().attr.ino, ino);
    drop(tree.release(opened.fh));
    // Nothing leads to it any more, so it keeps the descriptor.
    spill_all(&tree);
    assert_eq!(tree.getattr(id, None).unwrap().attr.ino, ino);
}

#[test]
fn threads_agree_about_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let names: Vec<_> = (0..40)
        .map(|number| std::ffi::CString::new(format!("n{number}")).unwrap())
        .collect();
    for name in &names {
        fs::write(folder.path().join(name.to_str().unwrap()), "x").unwrap();
    }
    grow_up();
    let tree = serve(folder.path(), 8);
    std::thread::scope(|scope| {
        for thread in 0..4_usize {
            let (tree, names) = (&tree, &names);
            scope.spawn(move || {
                for round in 0..2000_usize {
                    let name = &names[(round * (thread + 3)) % names.len()];
                    let entry = tree.lookup(ROOT_ID, name).unwrap().unwrap();
                    let again = tree.getattr(entry.nodeid, None).unwrap();
                    assert_eq!(again.attr.ino, entry.attr.ino);
                    if round % 7 == 0 {
                        tree.give_back(8);
                    }
                    let node = tree.node(entry.nodeid).unwrap();
                    assert_eq!(crate::sys::stat(&node.file).unwrap().st_ino, entry.attr.ino);
                    drop(node);
                    tree.forget(entry.nodeid, 1);
                }
            });
        }
    });
    assert_eq!(tree.nodes.counts(), (1, 0));
}
