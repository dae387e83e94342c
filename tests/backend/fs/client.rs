//! A FUSE client that speaks to one msb-fs over its socket.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};
use msb_testkit::frontend::{DATA, EVENT_IDX, FrontEnd, Part};
use msb_testkit::msb::binary;

macro_rules! opcodes {
    ($($name:ident = $number:literal)*) => { $(pub(super) const $name: u32 = $number;)* };
}

opcodes! {
    LOOKUP = 1 FORGET = 2 GETATTR = 3 SETATTR = 4 SYMLINK = 6 MKNOD = 8 MKDIR = 9 UNLINK = 10
    RMDIR = 11 RENAME = 12 LINK = 13 OPEN = 14 READ = 15 WRITE = 16 STATFS = 17 RELEASE = 18 SETXATTR = 21
    GETXATTR = 22 LISTXATTR = 23 REMOVEXATTR = 24 INIT = 26 CREATE = 35 IOCTL = 39 FALLOCATE = 43
    READDIRPLUS = 44 RENAME2 = 45 COPY_FILE_RANGE = 47 TMPFILE = 51 STATX = 52
}

/// Where answers lie in guest memory.
const BACK: u64 = DATA + (2 << 20);
const SPACE: u32 = 1 << 20;

/// A server and the client that is connected to it.
pub(super) struct Server {
    pub(super) child: Reaped,
    front: FrontEnd,
    /// Who asks: user and group.
    pub(super) caller: (u32, u32),
    /// SETXATTR is the long one.
    setxattr_ext: bool,
}

/// A process that does not outlive the test.
pub(super) struct Reaped(Option<Child>);

impl Drop for Reaped {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            // It may have ended with its front end already.
            child.kill().ok();
            child.wait().ok();
        }
    }
}

impl Reaped {
    /// A line of /proc/PID/status of the process that serves.
    pub(super) fn status(&self, name: &str) -> Result<String> {
        let status = std::fs::read_to_string(self.proc()?.join("status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        Ok(line
            .context("no such line")?
            .trim_start_matches(':')
            .trim()
            .to_owned())
    }

    /// Where the descriptors of the process that serves are listed.
    pub(super) fn descriptors(&self) -> Result<PathBuf> {
        Ok(self.proc()?.join("fd"))
    }

    /// The folder of the process that serves, which in a jail is the child of the one that was
    /// started.
    fn proc(&self) -> Result<PathBuf> {
        let started = self.0.as_ref().context("no process")?.id();
        let children = std::fs::read_to_string(format!("/proc/{started}/task/{started}/children"))?;
        let serving = children.split_whitespace().next().context("no child")?;
        Ok(Path::new("/proc").join(serving))
    }
}

/// What the tests look at of a file's attributes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Attr {
    pub(super) ino: u64,
    pub(super) size: u64,
    pub(super) blocks: u64,
    pub(super) mode: u32,
    pub(super) nlink: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) rdev: u32,
}

impl Attr {
    fn read(bytes: &[u8]) -> Result<Self> {
        let long = |at: usize| -> Result<u64> {
            let bytes = bytes.get(at..at + 8).context("short attributes")?;
            Ok(u64::from_le_bytes(bytes.try_into()?))
        };
        let word = |at: usize| -> Result<u32> {
            let bytes = bytes.get(at..at + 4).context("short attributes")?;
            Ok(u32::from_le_bytes(bytes.try_into()?))
        };
        Ok(Self {
            ino: long(0)?,
            size: long(8)?,
            blocks: long(16)?,
            mode: word(60)?,
            nlink: word(64)?,
            uid: word(68)?,
            gid: word(72)?,
            rdev: word(76)?,
        })
    }
}

/// Arguments of a request in front of its names.
pub(super) fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// The same with words of eight bytes.
pub(super) fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_le_bytes()).collect()
}

/// Arguments followed by names, each ended by a zero byte.
pub(super) fn named(arguments: &[u32], names: &[&str]) -> Vec<u8> {
    let mut body = words(arguments);
    for name in names {
        body.extend_from_slice(name.as_bytes());
        body.push(0);
    }
    body
}

impl Server {
    /// Serves `share` below `folder`, with a guest that knows every feature.
    pub(super) fn start(folder: &Path, flags: &[&str]) -> Result<Self> {
        // The process of a server that was killed may live on for a moment.
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        Self::start_at(folder, &format!("fs{number}.sock"), flags)
    }

    /// The same on a socket of that name.
    pub(super) fn start_at(folder: &Path, socket: &str, flags: &[&str]) -> Result<Self> {
        let socket = folder.join(socket);
        let child = Command::new(binary("msb-fs"))
            .arg("--socket-path")
            .arg(&socket)
            .arg("--shared-dir")
            .arg(folder.join("share"))
            .args([
                "--tag",
                "share",
                "--sandbox",
                "strict",
                "--log-level",
                "warn",
            ])
            .args(flags)
            .stdin(Stdio::null())
            .spawn()
            .context("starting msb-fs")?;
        Self::connect(child, &socket)
    }

    /// Connects to a server that was just started.
    pub(super) fn connect(child: Child, socket: &Path) -> Result<Self> {
        let child = Reaped(Some(child));
        let mut server = Self {
            child,
            front: FrontEnd::connect(socket, 8 << 20)?,
            caller: (0, 0),
            setxattr_ext: false,
        };
        server.front.start(2, 128, EVENT_IDX)?;
        server.init()?;
        Ok(server)
    }

    /// A client over a front end that has begun already.
    pub(super) fn over(child: Child, front: FrontEnd) -> Self {
        Self {
            child: Reaped(Some(child)),
            front,
            caller: (0, 0),
            setxattr_ext: false,
        }
    }

    pub(super) fn front(&mut self) -> &mut FrontEnd {
        &mut self.front
    }

    /// Disconnects; the process is left to itself.
    pub(super) fn hang_up(mut self) -> Child {
        self.child
            .0
            .take()
            .expect("a server is started with a process")
    }

    /// Ends the process at once.
    pub(super) fn kill(&mut self) {
        drop(std::mem::replace(&mut self.child, Reaped(None)));
    }

    /// Begins a session as Linux does.
    pub(super) fn init(&mut self) -> Result<Vec<u8>> {
        let mut init = words(&[7, 38, 1 << 17, u32::MAX, u32::MAX]);
        init.resize(64, 0);
        let agreed = self.well(INIT, 0, &init)?;
        self.setxattr_ext = agreed.get(15).is_some_and(|flags| flags & 0x20 != 0);
        Ok(agreed)
    }

    /// Configuration space of the device.
    pub(super) fn config(&mut self, len: u32) -> Result<Vec<u8>> {
        self.front.config(0, len)
    }

    /// Sends a request; returns its errno and payload.
    pub(super) fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<(i32, Vec<u8>)> {
        self.send(opcode, node, 77, body)?;
        let (unique, error, payload) = self.answer()?;
        ensure!(unique == 77, "answer to {unique}");
        Ok((error, payload))
    }

    /// Sends a request that must succeed.
    pub(super) fn well(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>> {
        let (error, payload) = self.ask(opcode, node, body)?;
        ensure!(error == 0, "request {opcode} on {node} gave errno {error}");
        Ok(payload)
    }

    /// Sends a request and does not wait. At most two are under way at one time, and those that
    /// may wait have an even number.
    pub(super) fn send(&mut self, opcode: u32, node: u64, unique: u64, body: &[u8]) -> Result<()> {
        let mut bytes = words(&[u32::try_from(40 + body.len())?, opcode]);
        bytes.extend_from_slice(&unique.to_le_bytes());
        bytes.extend_from_slice(&node.to_le_bytes());
        bytes.extend_from_slice(&words(&[self.caller.0, self.caller.1, 1, 0]));
        bytes.extend_from_slice(body);
        let waits = u64::from(unique.is_multiple_of(2));
        let at = DATA + waits * (1 << 16);
        let back = BACK + waits * 4 * u64::from(SPACE);
        let room = if waits == 1 { 4096 } else { SPACE };
        // Large requests reach beyond the place of those that wait, and are alone.
        self.front.memory.write(at, &bytes);
        let len = u32::try_from(bytes.len())?;
        self.front
            .put(1, &[Part::Out(at, len), Part::In(back, room)]);
        self.front.kick(1)
    }

    /// Sends a request that has no answer, and waits until it was looked at.
    pub(super) fn tell(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<()> {
        self.send(opcode, node, 77, body)?;
        let (_, written) = self.front.wait(1)?;
        ensure!(written == 0, "an answer of {written} bytes to {opcode}");
        Ok(())
    }

    /// Forgets nodes as the driver of Linux does it: in the queue of high priority, with a kick
    /// when one is wanted, and without waiting. At most a hundred at a time.
    pub(super) fn forget(&mut self, nodes: &[u64]) -> Result<()> {
        while self.front.finished(0).is_some() {}
        for (place, node) in (0_u64..).zip(nodes) {
            let mut bytes = words(&[48, FORGET]);
            bytes.extend_from_slice(&longs(&[0, *node, 0, 0, 1]));
            let at = BACK - (1 << 16) + 64 * place;
            self.front.memory.write(at, &bytes);
            self.front.offer(0, &[Part::Out(at, 48)])?;
        }
        Ok(())
    }

    /// The next answer: whose it is, errno, payload.
    pub(super) fn answer(&mut self) -> Result<(u64, i32, Vec<u8>)> {
        let (_, written) = self.front.wait(1)?;
        let len = usize::try_from(written)?;
        for back in [BACK, BACK + 4 * u64::from(SPACE)] {
            let reply = self.front.memory.read(back, len.max(16));
            let declared = u32::from_le_bytes(reply[..4].try_into()?);
            let unique = u64::from_le_bytes(reply[8..16].try_into()?);
            if declared == 0 || unique.is_multiple_of(2) == (back == BACK) {
                continue;
            }
            ensure!(declared == written, "header says {declared}, not {written}");
            // Nobody takes it for the answer to the next request.
            self.front.memory.write(back, &[0; 16]);
            let error = -i32::from_le_bytes(reply[4..8].try_into()?);
            return Ok((unique, error, reply[16..].to_vec()));
        }
        anyhow::bail!("{written} bytes that are no answer")
    }

    /// Node number of a name in the root.
    pub(super) fn find(&mut self, name: &str) -> Result<u64> {
        Ok(self.find_in(1, name)?.0)
    }

    /// Node number and attributes of a name.
    pub(super) fn find_in(&mut self, parent: u64, name: &str) -> Result<(u64, Attr)> {
        let entry = self
            .well(LOOKUP, parent, &named(&[], &[name]))
            .with_context(|| format!("looking up {name}"))?;
        Ok((
            u64::from_le_bytes(entry[..8].try_into()?),
            Attr::read(&entry[40..])?,
        ))
    }

    /// Attributes of a node.
    pub(super) fn attr(&mut self, node: u64) -> Result<Attr> {
        Attr::read(&self.well(GETATTR, node, &[0; 16])?[16..])
    }

    /// Creates a file in `parent` for reading and writing; returns node and handle.
    pub(super) fn create(&mut self, parent: u64, name: &str, mode: u32) -> Result<(u64, u64)> {
        let body = named(&[0o102, mode, 0, 0], &[name]);
        let made = self
            .well(CREATE, parent, &body)
            .with_context(|| format!("creating {name}"))?;
        Ok((
            u64::from_le_bytes(made[..8].try_into()?),
            u64::from_le_bytes(made[128..136].try_into()?),
        ))
    }

    /// Makes a directory; returns its node.
    pub(super) fn mkdir(&mut self, parent: u64, name: &str, mode: u32) -> Result<u64> {
        let made = self.well(MKDIR, parent, &named(&[mode, 0], &[name]))?;
        Ok(u64::from_le_bytes(made[..8].try_into()?))
    }

    /// Opens a file; returns its handle.
    pub(super) fn open(&mut self, node: u64, flags: u32) -> Result<u64> {
        let opened = self.well(OPEN, node, &words(&[flags, 0]))?;
        Ok(u64::from_le_bytes(opened[..8].try_into()?))
    }

    /// Writes; returns the errno and how many bytes.
    pub(super) fn write(
        &mut self,
        (node, fh): (u64, u64),
        offset: u64,
        data: &[u8],
        flags: u32,
    ) -> Result<(i32, u32)> {
        let mut body = longs(&[fh, offset]);
        body.extend_from_slice(&words(&[u32::try_from(data.len())?, flags]));
        body.extend_from_slice(&[0; 16]);
        body.extend_from_slice(data);
        let (error, reply) = self.ask(WRITE, node, &body)?;
        let count = reply.get(..4).map_or(0, |bytes| {
            u32::from_le_bytes(bytes.try_into().expect("four bytes"))
        });
        Ok((error, count))
    }

    /// Changes attributes: which, and their values in the order size, mode, uid, gid.
    pub(super) fn setattr(
        &mut self,
        node: u64,
        valid: u32,
        (size, mode, uid, gid): (u64, u32, u32, u32),
    ) -> Result<i32> {
        let mut body = words(&[valid, 0]);
        body.extend_from_slice(&longs(&[0, size, 0, 1, 2, 3]));
        body.extend_from_slice(&words(&[4, 5, 6, mode, 0, uid, gid, 0]));
        Ok(self.ask(SETATTR, node, &body)?.0)
    }

    /// Closes a handle.
    pub(super) fn release(&mut self, node: u64, fh: u64) -> Result<()> {
        self.well(RELEASE, node, &longs(&[fh, 0, 0])).map(drop)
    }

    /// Sets an extended attribute; returns the errno.
    pub(super) fn setxattr(&mut self, node: u64, name: &str, value: &[u8]) -> Result<i32> {
        let mut body = words(&[u32::try_from(value.len())?, 0]);
        if self.setxattr_ext {
            body.resize(16, 0);
        }
        body.extend_from_slice(name.as_bytes());
        body.push(0);
        body.extend_from_slice(value);
        Ok(self.ask(SETXATTR, node, &body)?.0)
    }

    /// An extended attribute, or the errno.
    pub(super) fn getxattr(&mut self, node: u64, name: &str) -> Result<Result<Vec<u8>, i32>> {
        let (error, value) = self.ask(GETXATTR, node, &named(&[65536, 0], &[name]))?;
        Ok(if error == 0 { Ok(value) } else { Err(error) })
    }

    /// The names of all extended attributes, with spaces between them.
    pub(super) fn listxattr(&mut self, node: u64) -> Result<String> {
        let list = self.well(LISTXATTR, node, &words(&[65536, 0]))?;
        let size = self.well(LISTXATTR, node, &words(&[0, 0]))?;
        ensure!(
            size[..4] == u32::try_from(list.len())?.to_le_bytes(),
            "two sizes"
        );
        let text = String::from_utf8(list)?;
        Ok(text.trim_end_matches('\0').replace('\0', " "))
    }
}
