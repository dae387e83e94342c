//! A list of operations, carried out by a session and by the model, compared after each.

use std::collections::HashMap;

use super::guest::{Guest, Kind};
use super::model::{Content, EEXIST, EISDIR, ENODATA, ENOENT, Ino, Model, Outcome};

const ENOSYS: i32 = 38;
const ESTALE: i32 = 116;
const XATTRS: [&str; 3] = ["user.a", "security.b", "trusted.c"];
/// Longest file.
const LARGEST: usize = 1 << 15;

/// Numbers out of the input; zeroes when it has ended.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn next(&mut self) -> usize {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        usize::from(*first)
    }
}

struct Open {
    ino: Ino,
    fh: u64,
    reads: bool,
    writes: bool,
    append: bool,
}

struct Run<'a> {
    bytes: Bytes<'a>,
    guest: Guest,
    model: Model,
    /// Node and number of lookups of the inodes that the guest knows.
    known: HashMap<Ino, (u64, u64)>,
    opened: Vec<Open>,
}

/// What every directory permits: one that permits nothing is where an overlay works, and is not
/// like the others.
const SOME: u32 = 1;

/// `data` as operations on a handful of names.
pub fn sequence(data: &[u8]) {
    let Some((how, rest)) = data.split_first() else {
        return;
    };
    let relaxed = how & 1 != 0;
    let kind = if relaxed { Kind::Relaxed } else { Kind::Strict };
    let mut run = Run {
        bytes: Bytes(rest),
        guest: Guest::empty(kind),
        model: Model::new(relaxed),
        known: HashMap::from([(0, (1, 0))]),
        opened: Vec::new(),
    };
    let unopened = u32::from(how & 2 != 0) << 24;
    run.guest
        .begin(!((1 << 6) | (1 << 20) | (1 << 24) | (1 << 29)) | unopened);
    // The root is what the host says until the guest has set it.
    run.settle_root();
    for _ in 0..400 {
        if run.bytes.0.is_empty() {
            break;
        }
        run.step();
    }
    run.end();
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_le_bytes()).collect()
}

fn name(byte: u8) -> Vec<u8> {
    // The last one is as long as a name may be.
    match byte {
        7 => [vec![b'n'; 255], vec![0]].concat(),
        byte => vec![b'a' + byte, 0],
    }
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

impl Run<'_> {
    fn ask(&self, opcode: u32, node: u64, body: &[u8]) -> Outcome<Vec<u8>> {
        match self.guest.ask(opcode, node, body, 1 << 17) {
            Some((0, payload)) => Ok(payload),
            Some((error, payload)) => {
                assert!(payload.is_empty(), "an error with {} bytes", payload.len());
                Err(error)
            }
            None => panic!("no answer to {opcode}"),
        }
    }

    fn settle_root(&mut self) {
        let mut body = words(&[1, 0]);
        body.resize(68, 0);
        body.extend_from_slice(&words(&[0o755, 0, 0, 0, 0]));
        self.ask(4, 1, &body).unwrap();
    }

    fn pick_name(&mut self) -> u8 {
        u8::try_from(self.bytes.next() % 8).unwrap()
    }

    /// One of the inodes that the guest knows and that fit.
    fn pick(&mut self, fits: impl Fn(&Model, Ino) -> bool) -> Option<(Ino, u64)> {
        let mut all: Vec<Ino> = self.known.keys().copied().collect();
        all.retain(|ino| fits(&self.model, *ino));
        all.sort_unstable();
        let place = self.bytes.next().checked_rem(all.len())?;
        Some((all[place], self.known[&all[place]].0))
    }

    fn pick_dir(&mut self) -> (Ino, u64) {
        self.pick(|model, ino| model.inodes[ino].is_dir()).unwrap()
    }

    fn pick_any(&mut self) -> (Ino, u64) {
        self.pick(|_, _| true).unwrap()
    }

    fn pick_open(&mut self, fits: impl Fn(&Open) -> bool) -> Option<usize> {
        let all: Vec<usize> = (0..self.opened.len())
            .filter(|place| fits(&self.opened[*place]))
            .collect();
        Some(all[self.bytes.next().checked_rem(all.len())?])
    }

    /// Takes note of an entry reply about `ino`.
    fn entered(&mut self, ino: Ino, entry: &[u8]) {
        let node = long(entry, 0);
        let (known, lookups) = self.known.entry(ino).or_insert((node, 0));
        assert_eq!(*known, node, "one inode, two nodes");
        *lookups += 1;
        let owners = self.known.iter().filter(|(_, (other, _))| *other == node);
        assert_eq!(owners.count(), 1, "one node, two inodes");
        self.compare(ino, &entry[40..]);
    }

    fn compare(&self, ino: Ino, attr: &[u8]) {
        let inode = &self.model.inodes[ino];
        let mode = match inode.content {
            Content::Link(_) if self.model.real_links => 0o120_777,
            _ => inode.kind() | inode.mode,
        };
        assert_eq!(
            word(attr, 60),
            mode,
            "mode of {inode:?}: {:o}",
            word(attr, 60)
        );
        assert_eq!(
            (word(attr, 68), word(attr, 72)),
            (inode.uid, inode.gid),
            "{inode:?}"
        );
        if let Some(size) = inode.size() {
            assert_eq!(long(attr, 8), size, "size of {inode:?}");
        }
        if !inode.is_dir() {
            assert_eq!(word(attr, 64), inode.nlink, "links of {inode:?}");
        }
        let rdev = match inode.content {
            Content::Special {
                kind: 0o020_000,
                rdev,
            } => rdev,
            _ => 0,
        };
        assert_eq!(word(attr, 76), rdev, "device of {inode:?}");
    }

    /// Both must agree about an operation that makes an entry.
    fn made(&mut self, found: Outcome<Vec<u8>>, wanted: Outcome<Ino>) -> Option<(Ino, Vec<u8>)> {
        match (found, wanted) {
            (Ok(entry), Ok(ino)) => {
                self.entered(ino, &entry);
                Some((ino, entry))
            }
            (found, wanted) => {
                assert_eq!(found.map(drop), wanted.map(drop));
                None
            }
        }
    }

    fn step(&mut self) {
        match self.bytes.next() % 26 {
            0 => self.lookup(),
            1 | 2 => self.create(),
            3 | 4 => self.make(),
            5 => self.link(),
            6 | 7 => self.unlink(),
            8 | 9 => self.rename(),
            10 | 11 => self.write(),
            12 => self.read(),
            13 => self.truncate(),
            14 | 15 => self.change(),
            16 => self.setxattr(),
            17 => self.readxattr(),
            18 => self.open(),
            19 => self.release(),
            20 => self.readdir(),
            21 => self.forget(),
            22 => self.readlink(),
            23 => self.fallocate(),
            24 => self.copy(),
            _ => self.tmpfile(),
        }
    }

    fn lookup(&mut self) {
        let ((dir, node), entry) = (self.pick_dir(), self.pick_name());
        let found = self.ask(1, node, &name(entry));
        // An entry with node zero says for how long there is nothing.
        let found = found.and_then(|entry| match long(&entry, 0) {
            0 => Err(ENOENT),
            _ => Ok(entry),
        });
        let wanted = self.model.lookup(dir, entry);
        self.made(found, wanted);
    }

    fn create(&mut self) {
        let ((dir, node), entry) = (self.pick_dir(), self.pick_name());
        let flags = [0o102, 0o302, 0o101, 0o2102][self.bytes.next() % 4];
        let mode = u32::try_from(self.bytes.next()).unwrap() << 4 & 0o7777;
        let there = self.model.lookup(dir, entry).ok();
        let wanted = match there.map(|ino| &self.model.inodes[ino].content) {
            None => self.model.make(dir, entry, Content::File(vec![]), mode),
            Some(_) if flags & 0o200 != 0 => Err(EEXIST),
            Some(Content::Dir(_)) => Err(EISDIR),
            Some(Content::File(_)) => Ok(there.unwrap()),
            // The guest's kernel follows links and opens special files itself.
            Some(_) => return,
        };
        let body = [words(&[flags, mode, 0, 0]), name(entry)].concat();
        let found = self.ask(35, node, &body);
        if let Some((ino, reply)) = self.made(found, wanted) {
            let fh = long(&reply, 128);
            self.remember(ino, fh, flags);
        }
    }

    fn remember(&mut self, ino: Ino, fh: u64, flags: u32) {
        self.opened.push(Open {
            ino,
            fh,
            reads: flags & 3 != 1,
            writes: flags & 3 != 0,
            append: flags & 0o2000 != 0,
        });
    }

    fn make(&mut self) {
        let ((dir, node), entry) = (self.pick_dir(), self.pick_name());
        let mode = u32::try_from(self.bytes.next()).unwrap() << 4 & 0o7777;
        match self.bytes.next() % 4 {
            0 | 1 => {
                let content = Content::Dir(Default::default());
                let mode = mode | SOME;
                let wanted = self.model.make(dir, entry, content, mode);
                let found = self.ask(9, node, &[words(&[mode, 0]), name(entry)].concat());
                self.made(found, wanted);
            }
            2 => {
                let kind = [0o010_000, 0o020_000, 0o140_000][self.bytes.next() % 3];
                let rdev = if kind == 0o020_000 { 0x0105 } else { 0 };
                let content = Content::Special { kind, rdev };
                let wanted = self.model.make(dir, entry, content, mode);
                let body = words(&[kind | mode, rdev, 0, 0]);
                let found = self.ask(8, node, &[body, name(entry)].concat());
                self.made(found, wanted);
            }
            _ => {
                let target = vec![b'/'; 1 + self.bytes.next() * 16];
                let wanted = self
                    .model
                    .make(dir, entry, Content::Link(target.clone()), 0o777);
                let body = [name(entry), target, vec![0]].concat();
                let found = self.ask(6, node, &body);
                self.made(found, wanted);
            }
        }
    }

    fn link(&mut self) {
        let ((ino, old), (dir, node)) = (self.pick_any(), self.pick_dir());
        let entry = self.pick_name();
        let wanted = self.model.link(ino, dir, entry).map(|()| ino);
        let found = self.ask(13, node, &[longs(&[old]), name(entry)].concat());
        self.made(found, wanted);
    }

    fn unlink(&mut self) {
        let ((dir, node), entry) = (self.pick_dir(), self.pick_name());
        let rmdir = self.bytes.next() % 2 == 1;
        let wanted = self.model.unlink(dir, entry, rmdir);
        let found = self.ask(if rmdir { 11 } else { 10 }, node, &name(entry));
        assert_eq!(found.map(drop), wanted);
    }

    fn rename(&mut self) {
        let ((from, old_node), (to, new_node)) = (self.pick_dir(), self.pick_dir());
        let (old, new) = (self.pick_name(), self.pick_name());
        let flags = [0, 0, 1, 2, 4, 5, 3, 6][self.bytes.next() % 8];
        let wanted = self.model.rename((from, old), (to, new), flags);
        let body = [longs(&[new_node]), words(&[flags, 0]), name(old), name(new)].concat();
        let found = self.ask(45, old_node, &body);
        assert_eq!(found.map(drop), wanted, "flags {flags}");
    }

    fn write(&mut self) {
        let Some(place) = self.pick_open(|open| open.writes) else {
            return;
        };
        let at = self.bytes.next() * 97;
        let data = vec![u8::try_from(self.bytes.next()).unwrap(); self.bytes.next() * 13];
        let Open {
            ino, fh, append, ..
        } = self.opened[place];
        let Content::File(content) = &mut self.model.inodes[ino].content else {
            panic!("only files are open");
        };
        let at = if append { content.len() } else { at };
        if at + data.len() > LARGEST {
            return;
        }
        if !data.is_empty() {
            content.resize(content.len().max(at + data.len()), 0);
            content[at..at + data.len()].copy_from_slice(&data);
        }
        let len = u32::try_from(data.len()).unwrap();
        let body = [longs(&[fh, at as u64]), words(&[len, 0, 0, 0, 0, 0]), data].concat();
        let node = self.node_of(ino);
        let found = self.ask(16, node, &body);
        assert_eq!(found.map(|reply| word(&reply, 0)), Ok(len));
    }

    /// The node of an open file; the guest holds it as long as the file is open.
    fn node_of(&self, ino: Ino) -> u64 {
        self.known[&ino].0
    }

    fn read(&mut self) {
        let Some(place) = self.pick_open(|open| open.reads) else {
            return;
        };
        let (at, len) = (self.bytes.next() * 97, self.bytes.next() * 331);
        let Open { ino, fh, .. } = self.opened[place];
        let len_word = u32::try_from(len).unwrap();
        let body = [longs(&[fh, at as u64]), words(&[len_word, 0, 0, 0, 0, 0])].concat();
        let found = self.ask(15, self.node_of(ino), &body);
        let Content::File(content) = &self.model.inodes[ino].content else {
            panic!("only files are open");
        };
        let from = at.min(content.len());
        let to = (at + len).min(content.len());
        assert_eq!(found, Ok(content[from..to].to_vec()));
    }

    /// SETATTR of size, mode and owner, whichever `valid` names.
    fn setattr(
        &self,
        node: u64,
        valid: u32,
        size: u64,
        mode: u32,
        owner: (u32, u32),
    ) -> Outcome<Vec<u8>> {
        let body = [
            words(&[valid, 0]),
            longs(&[0, size, 0, 0, 0, 0]),
            words(&[0, 0, 0, mode, 0, owner.0, owner.1, 0]),
        ];
        self.ask(4, node, &body.concat())
    }

    fn truncate(&mut self) {
        let files = |model: &Model, ino: Ino| matches!(model.inodes[ino].content, Content::File(_));
        let Some((ino, node)) = self.pick(files) else {
            return;
        };
        let size = self.bytes.next() * 101;
        let Content::File(content) = &mut self.model.inodes[ino].content else {
            panic!("it was picked as a file");
        };
        content.resize(size, 0);
        let found = self.setattr(node, 8, size as u64, 0, (0, 0));
        self.compare(ino, &found.unwrap()[16..]);
    }

    fn change(&mut self) {
        let (ino, node) = self.pick_any();
        let value = u32::try_from(self.bytes.next()).unwrap();
        let (found, wanted) = if self.bytes.next().is_multiple_of(2) {
            let some = if self.model.inodes[ino].is_dir() {
                SOME
            } else {
                0
            };
            let mode = (value << 4 & 0o7777) | some;
            (
                self.setattr(node, 1, 0, mode, (0, 0)),
                self.model.chmod(ino, mode),
            )
        } else {
            self.model.chown(ino, value, value / 2);
            (self.setattr(node, 6, 0, 0, (value, value / 2)), Ok(()))
        };
        match found {
            Ok(reply) => self.compare(ino, &reply[16..]),
            Err(error) => assert_eq!(Err(error), wanted),
        }
    }

    fn setxattr(&mut self) {
        let (ino, node) = self.pick_any();
        let attribute = u8::try_from(self.bytes.next() % 3).unwrap();
        let key = XATTRS[usize::from(attribute)];
        let value = vec![b'v'; self.bytes.next() % 64];
        let (found, wanted) = match self.bytes.next() % 4 {
            3 => {
                let found = self.ask(24, node, &[key.as_bytes(), b"\0"].concat());
                (found, self.model.removexattr(ino, attribute))
            }
            flags => {
                let flags = u32::try_from(flags).unwrap();
                let len = u32::try_from(value.len()).unwrap();
                let body = [&words(&[len, flags]), key.as_bytes(), b"\0", &value].concat();
                let found = self.ask(21, node, &body);
                (found, self.model.setxattr(ino, attribute, &value, flags))
            }
        };
        assert_eq!(
            found.map(drop),
            wanted,
            "{key} of {:?}",
            self.model.inodes[ino]
        );
    }

    fn readxattr(&mut self) {
        let (ino, node) = self.pick_any();
        let attribute = u8::try_from(self.bytes.next() % 3).unwrap();
        let key = XATTRS[usize::from(attribute)];
        let body = [&words(&[4096, 0]), key.as_bytes(), b"\0"].concat();
        let wanted = self.model.inodes[ino].xattrs.get(&attribute).cloned();
        assert_eq!(self.ask(22, node, &body), wanted.ok_or(ENODATA));
        let listed = self.ask(23, node, &words(&[4096, 0])).unwrap();
        let text = String::from_utf8(listed).unwrap();
        let mut listed: Vec<&str> = text.split_terminator('\0').collect();
        listed.sort_unstable_by_key(|name| XATTRS.iter().position(|known| known == name));
        let wanted = self.model.inodes[ino].xattrs.keys();
        let wanted: Vec<&str> = wanted.map(|place| XATTRS[usize::from(*place)]).collect();
        assert_eq!(listed, wanted);
    }

    fn open(&mut self) {
        let files = |model: &Model, ino: Ino| matches!(model.inodes[ino].content, Content::File(_));
        let Some((ino, node)) = self.pick(files) else {
            return;
        };
        let flags = [0, 1, 2, 0o2002, 0o1002, 0o1001][self.bytes.next() % 6];
        if flags & 0o1000 != 0 {
            self.model.inodes[ino].content = Content::File(vec![]);
        }
        let fh = long(&self.ask(14, node, &words(&[flags, 0])).unwrap(), 0);
        self.remember(ino, fh, flags);
    }

    fn release(&mut self) {
        let Some(place) = self.pick_open(|_| true) else {
            return;
        };
        let Open { ino, fh, .. } = self.opened.swap_remove(place);
        let node = self.node_of(ino);
        self.ask(18, node, &longs(&[fh, 0, 0])).unwrap();
        let body = [longs(&[fh, 0]), words(&[9, 0, 0, 0, 0, 0])].concat();
        assert!(
            self.ask(15, node, &body).is_err(),
            "a closed handle was read"
        );
    }

    fn readdir(&mut self) {
        let (dir, node) = self.pick_dir();
        if self.model.inodes[dir].nlink == 0 {
            // The guest's kernel lists no directory that is gone.
            return;
        }
        let plus = self.bytes.next().is_multiple_of(2);
        // Where both agreed on it, directories are listed without opening.
        let opened = self.ask(27, node, &words(&[0, 0]));
        let unopened = opened == Err(ENOSYS);
        let fh = if unopened {
            0
        } else {
            long(&opened.unwrap(), 0)
        };
        let (mut offset, mut found) = (0, Vec::new());
        loop {
            let size = [300, 700, 4096][self.bytes.next() % 3] + if plus { 200 } else { 0 };
            let body = [longs(&[fh, offset]), words(&[size, 0, 0, 0, 0, 0])].concat();
            let list = self.ask(if plus { 44 } else { 28 }, node, &body).unwrap();
            if list.is_empty() {
                break;
            }
            let mut rest = &list[..];
            while !rest.is_empty() {
                let (entry, dirent) = rest.split_at(if plus { 128 } else { 0 });
                let len = word(dirent, 16) as usize;
                let text = &dirent[24..24 + len];
                offset = long(dirent, 8);
                rest = &dirent[(24 + len).next_multiple_of(8)..];
                if text == b"." || text == b".." {
                    continue;
                }
                let byte = if len == 255 { 7 } else { text[0] - b'a' };
                let ino = self.model.lookup(dir, byte).expect("an entry too many");
                assert_eq!(
                    word(dirent, 20) << 12,
                    self.model.inodes[ino].kind(),
                    "its type"
                );
                if plus {
                    self.entered(ino, entry);
                }
                found.push((byte, ino));
            }
        }
        found.sort_unstable();
        assert_eq!(found, self.model.list(dir));
        if !unopened {
            self.ask(29, node, &longs(&[fh, 0, 0])).unwrap();
        }
    }

    fn forget(&mut self) {
        let (ino, node) = self.pick_any();
        let in_use = self.opened.iter().any(|open| open.ino == ino);
        if ino == 0 || in_use {
            return;
        }
        let (_, lookups) = self.known[&ino];
        let part = u64::try_from(self.bytes.next()).unwrap() % lookups;
        let tell = |count: u64| {
            let answer = self.guest.ask(2, node, &longs(&[count]), 0);
            assert_eq!(answer, None, "an answer to FORGET");
        };
        tell(part);
        assert!(self.ask(3, node, &[0; 16]).is_ok(), "forgotten too early");
        tell(lookups - part);
        assert_eq!(self.ask(3, node, &[0; 16]), Err(ESTALE), "not forgotten");
        self.known.remove(&ino);
    }

    fn readlink(&mut self) {
        let (ino, node) = self.pick_any();
        let found = self.ask(5, node, &[]);
        match &self.model.inodes[ino].content {
            Content::Link(target) => assert_eq!(found, Ok(target.clone())),
            _ => assert!(found.is_err(), "what is no link was read as one"),
        }
    }

    fn fallocate(&mut self) {
        let Some(place) = self.pick_open(|open| open.writes) else {
            return;
        };
        let mode = [0, 1, 3][self.bytes.next() % 3];
        let (at, len) = (self.bytes.next() * 50, 1 + self.bytes.next() * 50);
        let Open { ino, fh, .. } = self.opened[place];
        let body = [longs(&[fh, at as u64, len as u64]), words(&[mode, 0])].concat();
        self.ask(43, self.node_of(ino), &body).unwrap();
        let Content::File(content) = &mut self.model.inodes[ino].content else {
            panic!("only files are open");
        };
        match mode {
            0 => content.resize(content.len().max(at + len), 0),
            3 => {
                let (from, to) = (at.min(content.len()), (at + len).min(content.len()));
                content[from..to].fill(0);
            }
            _ => {}
        }
    }

    fn copy(&mut self) {
        let (Some(from), Some(to)) = (
            self.pick_open(|open| open.reads),
            self.pick_open(|open| open.writes && !open.append),
        ) else {
            return;
        };
        let (at_from, at_to) = (self.bytes.next() * 20, self.bytes.next() * 20);
        let len = self.bytes.next() * 30;
        let (from, to) = (&self.opened[from], &self.opened[to]);
        if from.ino == to.ino {
            return;
        }
        let Content::File(source) = &self.model.inodes[from.ino].content else {
            panic!("only files are open");
        };
        let part = source.get(at_from..(at_from + len).min(source.len()));
        let part = part.unwrap_or_default().to_vec();
        let nodes = (self.node_of(from.ino), self.node_of(to.ino));
        let body = longs(&[
            from.fh,
            at_from as u64,
            nodes.1,
            to.fh,
            at_to as u64,
            len as u64,
            0,
        ]);
        let found = self.ask(47, nodes.0, &body);
        assert_eq!(found.map(|reply| word(&reply, 0) as usize), Ok(part.len()));
        let ino = to.ino;
        let Content::File(content) = &mut self.model.inodes[ino].content else {
            panic!("only files are open");
        };
        if !part.is_empty() {
            content.resize(content.len().max(at_to + part.len()), 0);
            content[at_to..at_to + part.len()].copy_from_slice(&part);
        }
    }

    fn tmpfile(&mut self) {
        let (dir, node) = self.pick_dir();
        let found = self.ask(51, node, &words(&[0o102, 0o640, 0, 0]));
        if self.model.inodes[dir].nlink == 0 {
            // File systems differ about directories that are gone.
            if let Ok(reply) = found {
                let ino = self.model.add(dir, Content::File(vec![]), 0o640);
                self.unnamed(ino, &reply);
            }
            return;
        }
        let ino = self.model.add(dir, Content::File(vec![]), 0o640);
        self.unnamed(ino, &found.unwrap());
    }

    fn unnamed(&mut self, ino: Ino, reply: &[u8]) {
        self.model.inodes[ino].nlink = 0;
        self.model.inodes[ino].nameable = true;
        self.entered(ino, reply);
        self.remember(ino, long(reply, 128), 2);
    }

    /// Looks at everything once more, and lets go of it.
    fn end(&mut self) {
        for (ino, (node, _)) in &self.known {
            match self.ask(3, *node, &[0; 16]) {
                Ok(reply) => self.compare(*ino, &reply[16..]),
                Err(error) => panic!("errno {error} of {:?}", self.model.inodes[*ino]),
            }
        }
        for Open { ino, fh, .. } in std::mem::take(&mut self.opened) {
            self.ask(18, self.node_of(ino), &longs(&[fh, 0, 0]))
                .unwrap();
        }
        for (_, (node, lookups)) in std::mem::take(&mut self.known) {
            if node == 1 {
                continue;
            }
            self.guest.ask(2, node, &longs(&[lookups]), 0);
            assert_eq!(self.ask(3, node, &[0; 16]), Err(ESTALE), "not forgotten");
        }
        self.guest.check_surroundings();
    }
}
