//! A guest that calls a session without a queue between them.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::rc::Rc;
use std::sync::mpsc::sync_channel;

use msb_fs::session::Session;
use msb_fs::tree::{Caching, Ownership, Rules, Source, StatVirt, Tree};
use msb_vhost::{Request, Segments};
use tempfile::TempDir;

/// What kind of share is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Strict,
    Relaxed,
    Off,
    ReadOnly,
    File,
}

impl Kind {
    pub fn of(byte: u8) -> Self {
        match byte % 8 {
            0..=2 => Self::Strict,
            3 | 4 => Self::Relaxed,
            5 => Self::Off,
            6 => Self::ReadOnly,
            _ => Self::File,
        }
    }
}

/// A session over a small tree, and what lies beside the tree.
pub struct Guest {
    session: Session,
    folder: TempDir,
    asked: Rc<Cell<u64>>,
}

impl Guest {
    pub fn new(kind: Kind) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        fs::create_dir_all(path.join("share/dir")).unwrap();
        fs::write(path.join("canary"), "untouched").unwrap();
        fs::write(path.join("share/file"), "content").unwrap();
        fs::write(path.join("share/dir/inner"), "inner").unwrap();
        symlink("../canary", path.join("share/link")).unwrap();
        let source = match kind {
            Kind::File => Source::File(path.join("share/file")),
            _ => Source::Directory(path.join("share")),
        };
        let mode = match kind {
            Kind::Relaxed => StatVirt::Relaxed,
            Kind::Off => StatVirt::Off,
            _ => StatVirt::Strict,
        };
        let rules = Rules {
            readonly: kind == Kind::ReadOnly,
            ownership: Ownership {
                mode,
                mirror: kind == Kind::Relaxed,
                default_owner: (0, 0),
                owner: None,
            },
            caching: Caching::Auto,
            exclusive: false,
            writeback: false,
            submounts: false,
            lists: kind == Kind::Relaxed,
            locks: false,
        };
        Self {
            session: Session::new(Tree::new(&source, rules).unwrap()),
            folder,
            asked: Rc::default(),
        }
    }

    /// A guest whose share is empty.
    pub fn empty(kind: Kind) -> Self {
        let guest = Self::new(kind);
        let share = guest.folder.path().join("share");
        for entry in fs::read_dir(&share).unwrap() {
            let path = entry.unwrap().path();
            fs::remove_file(&path)
                .or_else(|_| fs::remove_dir_all(&path))
                .unwrap();
        }
        guest
    }

    /// Sends INIT with these features.
    pub fn begin(&mut self, features: u32) {
        let mut body = Vec::new();
        for word in [7, 38, 1 << 17, features, u32::MAX] {
            body.extend_from_slice(&u32::to_le_bytes(word));
        }
        body.resize(64, 0);
        let (error, _) = self.ask(26, 0, &body, 80).unwrap();
        assert_eq!(error, 0, "INIT");
    }

    /// Sends a request with so much room for its answer; returns errno and payload.
    pub fn ask(&self, opcode: u32, node: u64, body: &[u8], room: usize) -> Option<(i32, Vec<u8>)> {
        self.asked.set(self.asked.get() + 1);
        let unique = self.asked.get();
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&u32::try_from(40 + body.len()).unwrap().to_le_bytes());
        bytes.extend_from_slice(&opcode.to_le_bytes());
        bytes.extend_from_slice(&unique.to_le_bytes());
        bytes.extend_from_slice(&node.to_le_bytes());
        bytes.resize(40, 0);
        bytes.extend_from_slice(body);
        let writable = Segments::from_vec(vec![0; room]);
        let back = writable.clone();
        // Whatever is done by another thread is waited for; a second completion finds nobody.
        let (done, written) = sync_channel(1);
        let end = move |count| done.send(count).unwrap();
        self.session
            .handle(Request::new(Segments::from_vec(bytes), writable, end));
        let written = written.recv().expect("never completed") as usize;
        if written == 0 {
            return None;
        }
        let reply = back.to_vec();
        assert!((16..=room).contains(&written), "{written} of {room} bytes");
        let word = |at: usize| i32::from_le_bytes(reply[at..at + 4].try_into().unwrap());
        assert_eq!(word(0) as usize, written, "the length of the header");
        assert!((-4095..=0).contains(&word(4)), "errno {}", word(4));
        assert_eq!(reply[8..16], unique.to_le_bytes(), "whose answer it is");
        Some((-word(4), reply[16..written].to_vec()))
    }

    /// Nothing but the share has changed.
    pub fn check_surroundings(&self) {
        let path = self.folder.path();
        assert_eq!(fs::read(path.join("canary")).unwrap(), b"untouched");
        assert_eq!(fs::read_dir(path).unwrap().count(), 2, "beside the share");
    }

    /// The names in the share and the content of the files.
    pub fn contents(&self) -> BTreeMap<String, Vec<u8>> {
        let share = self.folder.path().join("share");
        let all = fs::read_dir(share).unwrap().map(|entry| {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            let plain = entry.file_type().unwrap().is_file();
            (
                name,
                if plain {
                    fs::read(entry.path()).unwrap()
                } else {
                    Vec::new()
                },
            )
        });
        all.collect()
    }
}
