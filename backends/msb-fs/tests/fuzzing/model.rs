//! What a file system is: a few rules about names, inodes and their attributes.

use std::collections::BTreeMap;

pub const ENOENT: i32 = 2;
pub const EPERM: i32 = 1;
pub const EEXIST: i32 = 17;
pub const ENOTDIR: i32 = 20;
pub const EISDIR: i32 = 21;
pub const EINVAL: i32 = 22;
pub const ENOTEMPTY: i32 = 39;
pub const ENODATA: i32 = 61;
pub const EOPNOTSUPP: i32 = 95;

pub type Outcome<T> = Result<T, i32>;

/// Number of an inode of the model.
pub type Ino = usize;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    File(Vec<u8>),
    Dir(BTreeMap<u8, Ino>),
    Link(Vec<u8>),
    Special { kind: u32, rdev: u32 },
}

#[derive(Debug, Clone)]
pub struct Inode {
    pub content: Content,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub nlink: u32,
    /// It may get a name although it has none.
    pub nameable: bool,
    pub xattrs: BTreeMap<u8, Vec<u8>>,
}

impl Inode {
    pub fn new(content: Content, mode: u32, gid: u32) -> Self {
        Self {
            content,
            mode,
            uid: 0,
            gid,
            nlink: 1,
            nameable: false,
            xattrs: BTreeMap::new(),
        }
    }

    pub fn is_dir(&self) -> bool {
        matches!(self.content, Content::Dir(_))
    }

    pub fn kind(&self) -> u32 {
        match self.content {
            Content::File(_) => 0o100_000,
            Content::Dir(_) => 0o040_000,
            Content::Link(_) => 0o120_000,
            Content::Special { kind, .. } => kind,
        }
    }

    pub fn size(&self) -> Option<u64> {
        match &self.content {
            Content::File(bytes) | Content::Link(bytes) => Some(bytes.len() as u64),
            Content::Dir(_) | Content::Special { .. } => None,
        }
    }
}

/// The tree; inode 0 is its root.
pub struct Model {
    pub inodes: Vec<Inode>,
    /// Links hold no owner and no attribute.
    pub real_links: bool,
}

impl Model {
    pub fn new(real_links: bool) -> Self {
        let root = Inode::new(Content::Dir(BTreeMap::new()), 0o755, 0);
        Self {
            inodes: vec![root],
            real_links,
        }
    }

    fn entries(&self, dir: Ino) -> &BTreeMap<u8, Ino> {
        match &self.inodes[dir].content {
            Content::Dir(entries) => entries,
            other => panic!("{other:?} is no directory"),
        }
    }

    fn entries_mut(&mut self, dir: Ino) -> &mut BTreeMap<u8, Ino> {
        match &mut self.inodes[dir].content {
            Content::Dir(entries) => entries,
            other => panic!("{other:?} is no directory"),
        }
    }

    pub fn list(&self, dir: Ino) -> Vec<(u8, Ino)> {
        self.entries(dir)
            .iter()
            .map(|(name, ino)| (*name, *ino))
            .collect()
    }

    pub fn lookup(&self, dir: Ino, name: u8) -> Outcome<Ino> {
        self.entries(dir).get(&name).copied().ok_or(ENOENT)
    }

    /// Adds an inode under a name; permissions and group follow the directory.
    pub fn make(&mut self, dir: Ino, name: u8, content: Content, mode: u32) -> Outcome<Ino> {
        if self.entries(dir).contains_key(&name) {
            return Err(EEXIST);
        }
        if self.inodes[dir].nlink == 0 {
            return Err(ENOENT);
        }
        let ino = self.add(dir, content, mode);
        self.entries_mut(dir).insert(name, ino);
        Ok(ino)
    }

    /// Adds an inode without a name.
    pub fn add(&mut self, dir: Ino, content: Content, mode: u32) -> Ino {
        let above = &self.inodes[dir];
        let inherits = above.mode & 0o2000 != 0;
        let real_link = self.real_links && matches!(content, Content::Link(_));
        let gid = if inherits && !real_link { above.gid } else { 0 };
        let mut inode = Inode::new(content, mode, gid);
        if inherits && inode.is_dir() {
            inode.mode |= 0o2000;
        }
        self.inodes.push(inode);
        self.inodes.len() - 1
    }

    pub fn link(&mut self, ino: Ino, dir: Ino, name: u8) -> Outcome<()> {
        if self.inodes[ino].is_dir() {
            return Err(EPERM);
        }
        if self.entries(dir).contains_key(&name) {
            return Err(EEXIST);
        }
        if self.inodes[dir].nlink == 0 {
            return Err(ENOENT);
        }
        let inode = &mut self.inodes[ino];
        if inode.nlink == 0 && !inode.nameable {
            return Err(ENOENT);
        }
        inode.nlink += 1;
        self.entries_mut(dir).insert(name, ino);
        Ok(())
    }

    pub fn unlink(&mut self, dir: Ino, name: u8, rmdir: bool) -> Outcome<()> {
        let ino = self.lookup(dir, name)?;
        match &self.inodes[ino].content {
            Content::Dir(_) if !rmdir => return Err(EISDIR),
            Content::Dir(entries) if !entries.is_empty() => return Err(ENOTEMPTY),
            Content::Dir(_) => {}
            _ if rmdir => return Err(ENOTDIR),
            _ => {}
        }
        self.entries_mut(dir).remove(&name);
        self.drop_name(ino);
        Ok(())
    }

    fn drop_name(&mut self, ino: Ino) {
        let inode = &mut self.inodes[ino];
        inode.nlink -= 1;
        inode.nameable = false;
    }

    /// Whether `above` is `ino` or lies above it.
    fn holds(&self, above: Ino, ino: Ino) -> bool {
        above == ino
            || match &self.inodes[above].content {
                Content::Dir(entries) => entries.values().any(|below| self.holds(*below, ino)),
                _ => false,
            }
    }

    /// Moves a name with the flags of renameat2(2).
    pub fn rename(&mut self, from: (Ino, u8), to: (Ino, u8), flags: u32) -> Outcome<()> {
        let (noreplace, exchange, whiteout) = (flags & 1 != 0, flags & 2 != 0, flags & 4 != 0);
        if exchange && (noreplace || whiteout) {
            return Err(EINVAL);
        }
        let moved = self.lookup(from.0, from.1)?;
        let target = self.lookup(to.0, to.1).ok();
        if noreplace && target.is_some() {
            return Err(EEXIST);
        }
        if exchange && target.is_none() {
            return Err(ENOENT);
        }
        if self.inodes[moved].is_dir() && self.holds(moved, to.0) {
            return Err(EINVAL);
        }
        if let Some(target) = target
            && self.inodes[target].is_dir()
            && self.holds(target, from.0)
        {
            return Err(if exchange { EINVAL } else { ENOTEMPTY });
        }
        if target == Some(moved) {
            return Ok(());
        }
        if self.inodes[to.0].nlink == 0 {
            return Err(ENOENT);
        }
        if let (Some(target), false) = (target, exchange) {
            match (self.inodes[moved].is_dir(), &self.inodes[target].content) {
                (true, Content::Dir(entries)) if !entries.is_empty() => return Err(ENOTEMPTY),
                (true, Content::Dir(_)) => {}
                (true, _) => return Err(ENOTDIR),
                (false, Content::Dir(_)) => return Err(EISDIR),
                (false, _) => {}
            }
            self.drop_name(target);
        }
        self.entries_mut(to.0).insert(to.1, moved);
        match target {
            Some(target) if exchange => drop(self.entries_mut(from.0).insert(from.1, target)),
            _ => drop(self.entries_mut(from.0).remove(&from.1)),
        }
        if whiteout {
            let device = Content::Special {
                kind: 0o020_000,
                rdev: 0,
            };
            let mut inode = Inode::new(device, 0, 0);
            inode.gid = 0;
            self.inodes.push(inode);
            let ino = self.inodes.len() - 1;
            self.entries_mut(from.0).insert(from.1, ino);
        }
        Ok(())
    }

    pub fn chmod(&mut self, ino: Ino, mode: u32) -> Outcome<()> {
        if self.is_real_link(ino) {
            return Err(EOPNOTSUPP);
        }
        self.inodes[ino].mode = mode & 0o7777;
        Ok(())
    }

    pub fn chown(&mut self, ino: Ino, uid: u32, gid: u32) {
        if self.is_real_link(ino) {
            return;
        }
        let inode = &mut self.inodes[ino];
        (inode.uid, inode.gid) = (uid, gid);
        if !inode.is_dir() {
            let group = if inode.mode & 0o010 != 0 { 0o2000 } else { 0 };
            inode.mode &= !(0o4000 | group);
        }
    }

    fn is_real_link(&self, ino: Ino) -> bool {
        self.real_links && matches!(self.inodes[ino].content, Content::Link(_))
    }

    pub fn setxattr(&mut self, ino: Ino, name: u8, value: &[u8], flags: u32) -> Outcome<()> {
        if self.is_real_link(ino) {
            return Err(if name == 0 { EPERM } else { EOPNOTSUPP });
        }
        let attributes = &mut self.inodes[ino].xattrs;
        match (flags, attributes.contains_key(&name)) {
            (1, true) => return Err(EEXIST),
            (2, false) => return Err(ENODATA),
            _ => {}
        }
        attributes.insert(name, value.to_vec());
        Ok(())
    }

    pub fn removexattr(&mut self, ino: Ino, name: u8) -> Outcome<()> {
        if self.is_real_link(ino) {
            // It can have none of the others, so there is none to be removed.
            return Err(if name == 0 { EPERM } else { ENODATA });
        }
        let gone = self.inodes[ino].xattrs.remove(&name);
        gone.map(drop).ok_or(ENODATA)
    }
}
