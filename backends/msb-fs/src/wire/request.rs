//! The requests of the guest, checked for length and form but not for meaning.

use std::ffi::CStr;

use zerocopy::{FromBytes, Immutable, KnownLayout};

use super::abi::{
    AccessIn, BatchForgetIn, CopyFileRangeIn, CreateIn, EXT_GROUPS, ExtHeader, FallocateIn,
    FlushIn, ForgetIn, ForgetOne, FsyncIn, GetattrIn, GetxattrIn, InitIn, InterruptIn, LinkIn,
    LkIn, LseekIn, MkdirIn, MknodIn, OpenIn, ReadIn, ReleaseIn, Rename2In, RenameIn,
    SETXATTR_ACL_KILL_SGID, SetattrIn, SetxattrIn, SetxattrMore, StatxIn, oflag, opcode,
};

/// The bytes are no request of this protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The body ends before its structure does.
    #[error("request is too short")]
    Short,
    /// A name lacks its end, or something follows the last one.
    #[error("request holds a malformed name")]
    Name,
    /// No such request, or one that is not served.
    #[error("opcode {0} is not served")]
    Opcode(u32),
}

/// A request without its header. WRITE is not among them: its data stays in guest memory, and the
/// session takes its fixed part itself.
#[derive(Debug)]
#[allow(missing_docs, reason = "the fields are the protocol's")]
pub enum Operation<'a> {
    Lookup {
        name: &'a CStr,
    },
    Forget {
        count: u64,
    },
    BatchForget {
        list: Vec<ForgetOne>,
    },
    Getattr(GetattrIn),
    Statx(StatxIn),
    Setattr(SetattrIn),
    Readlink,
    Symlink {
        name: &'a CStr,
        target: &'a CStr,
    },
    Mknod {
        args: MknodIn,
        name: &'a CStr,
    },
    Mkdir {
        args: MkdirIn,
        name: &'a CStr,
    },
    Unlink {
        name: &'a CStr,
    },
    Rmdir {
        name: &'a CStr,
    },
    Rename {
        newdir: u64,
        flags: u32,
        old: &'a CStr,
        new: &'a CStr,
    },
    Link {
        node: u64,
        name: &'a CStr,
    },
    Open(OpenIn),
    Read(ReadIn),
    Statfs,
    Release(ReleaseIn),
    Flush(FlushIn),
    Getlk(LkIn),
    Setlk {
        args: LkIn,
        wait: bool,
    },
    Fsync {
        fh: u64,
        data_only: bool,
    },
    Setxattr {
        flags: u32,
        name: &'a CStr,
        value: &'a [u8],
        /// Whether a list takes setgid away, where the guest says so.
        kill_sgid: Option<bool>,
    },
    Getxattr {
        size: u32,
        name: &'a CStr,
    },
    Listxattr {
        size: u32,
    },
    Removexattr {
        name: &'a CStr,
    },
    Init {
        args: InitIn,
        flags2: u32,
    },
    Opendir,
    Readdir {
        args: ReadIn,
        plus: bool,
    },
    Releasedir {
        fh: u64,
    },
    Fsyncdir {
        fh: u64,
        data_only: bool,
    },
    Access {
        mask: u32,
    },
    Create {
        args: CreateIn,
        name: &'a CStr,
    },
    Interrupt(InterruptIn),
    Destroy,
    Fallocate(FallocateIn),
    Lseek(LseekIn),
    CopyFileRange(CopyFileRangeIn),
    Syncfs,
    Tmpfile(CreateIn),
}

impl Operation<'_> {
    /// Whether the request would change the served tree. WRITE always would.
    pub fn mutates(&self) -> bool {
        match self {
            Self::Open(args) => {
                args.flags & oflag::ACCMODE != 0 || args.flags & (oflag::TRUNC | oflag::CREAT) != 0
            }
            Self::Setattr(_)
            | Self::Symlink { .. }
            | Self::Mknod { .. }
            | Self::Mkdir { .. }
            | Self::Unlink { .. }
            | Self::Rmdir { .. }
            | Self::Rename { .. }
            | Self::Link { .. }
            | Self::Setxattr { .. }
            | Self::Removexattr { .. }
            | Self::Create { .. }
            | Self::Fallocate(_)
            | Self::CopyFileRange(_)
            | Self::Tmpfile(_) => true,
            Self::Lookup { .. }
            | Self::Forget { .. }
            | Self::BatchForget { .. }
            | Self::Getattr(_)
            | Self::Statx(_)
            | Self::Readlink
            | Self::Read(_)
            | Self::Statfs
            | Self::Release(_)
            | Self::Flush(_)
            | Self::Getlk(_)
            | Self::Setlk { .. }
            | Self::Fsync { .. }
            | Self::Getxattr { .. }
            | Self::Listxattr { .. }
            | Self::Init { .. }
            | Self::Opendir
            | Self::Readdir { .. }
            | Self::Releasedir { .. }
            | Self::Fsyncdir { .. }
            | Self::Access { .. }
            | Self::Interrupt(_)
            | Self::Destroy
            | Self::Lseek(_)
            | Self::Syncfs => false,
        }
    }
}

/// The group of a caller, beside its first one, to which the directory belongs in which it makes
/// something: Linux sends one at most. `bytes` are the extensions of a request.
pub fn supplementary_group(mut bytes: &[u8]) -> Option<u32> {
    loop {
        let (header, _) = ExtHeader::read_from_prefix(bytes).ok()?;
        let extension = bytes.get(..header.size as usize)?;
        let body = extension.get(size_of::<ExtHeader>()..)?;
        if header.kind == EXT_GROUPS {
            let ([1, group], _) = <[u32; 2]>::read_from_prefix(body).ok()? else {
                return None;
            };
            return Some(group);
        }
        bytes = bytes.get(extension.len()..)?;
    }
}

/// Reads the body of a request without its extensions; `setxattr_ext` is what was agreed on.
///
/// # Errors
///
/// [`WireError`].
pub fn parse(code: u32, bytes: &[u8], setxattr_ext: bool) -> Result<Operation<'_>, WireError> {
    let mut body = Body(bytes);
    let operation = match code {
        opcode::SETATTR => Operation::Setattr(body.take()?),
        opcode::STATX => Operation::Statx(body.take()?),
        opcode::OPEN => Operation::Open(body.take()?),
        opcode::READ => Operation::Read(body.take()?),
        opcode::FALLOCATE => Operation::Fallocate(body.take()?),
        opcode::LSEEK => Operation::Lseek(body.take()?),
        opcode::COPY_FILE_RANGE => Operation::CopyFileRange(body.take()?),
        opcode::TMPFILE => Operation::Tmpfile(body.take()?),
        opcode::READLINK => Operation::Readlink,
        opcode::STATFS => Operation::Statfs,
        opcode::OPENDIR => Operation::Opendir,
        opcode::INTERRUPT => Operation::Interrupt(body.take()?),
        opcode::DESTROY => Operation::Destroy,
        opcode::SYNCFS => Operation::Syncfs,
        opcode::FORGET => Operation::Forget {
            count: body.take::<ForgetIn>()?.nlookup,
        },
        opcode::BATCH_FORGET => {
            let head: BatchForgetIn = body.take()?;
            let list = (0..head.count)
                .map(|_| body.take())
                .collect::<Result<_, _>>()?;
            Operation::BatchForget { list }
        }
        // Kernels from before 7.9 send no body.
        opcode::GETATTR => Operation::Getattr(body.take().unwrap_or_default()),
        opcode::RELEASE => Operation::Release(body.take()?),
        opcode::FLUSH => Operation::Flush(body.take()?),
        opcode::GETLK => Operation::Getlk(body.take()?),
        opcode::SETLK | opcode::SETLKW => Operation::Setlk {
            args: body.take()?,
            wait: code == opcode::SETLKW,
        },
        opcode::RELEASEDIR => Operation::Releasedir {
            fh: body.take::<ReleaseIn>()?.fh,
        },
        opcode::FSYNC | opcode::FSYNCDIR => {
            let args: FsyncIn = body.take()?;
            let (fh, data_only) = (args.fh, args.fsync_flags & super::abi::FSYNC_DATASYNC != 0);
            if code == opcode::FSYNC {
                Operation::Fsync { fh, data_only }
            } else {
                Operation::Fsyncdir { fh, data_only }
            }
        }
        opcode::LISTXATTR => Operation::Listxattr {
            size: body.take::<GetxattrIn>()?.size,
        },
        opcode::INIT => {
            let args = body.take()?;
            let flags2 = body.take().unwrap_or(0);
            Operation::Init { args, flags2 }
        }
        opcode::READDIR | opcode::READDIRPLUS => Operation::Readdir {
            args: body.take()?,
            plus: code == opcode::READDIRPLUS,
        },
        opcode::ACCESS => Operation::Access {
            mask: body.take::<AccessIn>()?.mask,
        },
        opcode::SETXATTR => return parse_setxattr(body, setxattr_ext),
        _ => return parse_named(code, body),
    };
    Ok(operation)
}

fn parse_setxattr(mut body: Body<'_>, extended: bool) -> Result<Operation<'_>, WireError> {
    let args: SetxattrIn = body.take()?;
    let mut kill_sgid = None;
    if extended {
        let more: SetxattrMore = body.take()?;
        kill_sgid = Some(more.setxattr_flags & SETXATTR_ACL_KILL_SGID != 0);
    }
    let name = body.name()?;
    let value = body.0.get(..args.size as usize).ok_or(WireError::Short)?;
    Ok(Operation::Setxattr {
        flags: args.flags,
        name,
        value,
        kill_sgid,
    })
}

/// Reads the body of a request that names something.
fn parse_named(code: u32, mut body: Body<'_>) -> Result<Operation<'_>, WireError> {
    let operation = match code {
        opcode::LOOKUP => Operation::Lookup { name: body.last()? },
        opcode::SYMLINK => Operation::Symlink {
            name: body.name()?,
            target: body.last()?,
        },
        opcode::MKNOD => Operation::Mknod {
            args: body.take()?,
            name: body.last()?,
        },
        opcode::MKDIR => Operation::Mkdir {
            args: body.take()?,
            name: body.last()?,
        },
        opcode::UNLINK => Operation::Unlink { name: body.last()? },
        opcode::RMDIR => Operation::Rmdir { name: body.last()? },
        opcode::RENAME => Operation::Rename {
            newdir: body.take::<RenameIn>()?.newdir,
            flags: 0,
            old: body.name()?,
            new: body.last()?,
        },
        opcode::RENAME2 => {
            let args: Rename2In = body.take()?;
            Operation::Rename {
                newdir: args.newdir,
                flags: args.flags,
                old: body.name()?,
                new: body.last()?,
            }
        }
        opcode::LINK => Operation::Link {
            node: body.take::<LinkIn>()?.oldnodeid,
            name: body.last()?,
        },
        opcode::GETXATTR => Operation::Getxattr {
            size: body.take::<GetxattrIn>()?.size,
            name: body.last()?,
        },
        opcode::REMOVEXATTR => Operation::Removexattr { name: body.last()? },
        opcode::CREATE => Operation::Create {
            args: body.take()?,
            name: body.last()?,
        },
        _ => return Err(WireError::Opcode(code)),
    };
    Ok(operation)
}

struct Body<'a>(&'a [u8]);

impl<'a> Body<'a> {
    fn take<T: FromBytes + Immutable + KnownLayout>(&mut self) -> Result<T, WireError> {
        let (value, rest) = T::read_from_prefix(self.0).map_err(|_| WireError::Short)?;
        self.0 = rest;
        Ok(value)
    }

    fn name(&mut self) -> Result<&'a CStr, WireError> {
        let name = CStr::from_bytes_until_nul(self.0).map_err(|_| WireError::Name)?;
        let len = name.to_bytes_with_nul().len();
        self.0 = self.0.get(len..).unwrap_or_default();
        Ok(name)
    }

    /// The name that the request ends with.
    fn last(&mut self) -> Result<&'a CStr, WireError> {
        let name = self.name()?;
        if self.0.is_empty() {
            Ok(name)
        } else {
            Err(WireError::Name)
        }
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::IntoBytes;

    use super::*;

    #[test]
    fn names_must_end_where_the_request_ends() {
        let name = |bytes| match parse(opcode::LOOKUP, bytes, false) {
            Ok(Operation::Lookup { name }) => Ok(name.to_bytes().to_vec()),
            Ok(_) => unreachable!(),
            Err(error) => Err(error),
        };
        assert_eq!(name(b"x\0"), Ok(b"x".to_vec()));
        assert_eq!(name(b"\0"), Ok(Vec::new()));
        assert_eq!(name(b"x"), Err(WireError::Name));
        assert_eq!(name(b""), Err(WireError::Name));
        assert_eq!(name(b"x\0y\0"), Err(WireError::Name));
    }

    #[test]
    fn declared_sizes_are_checked_against_the_bytes() {
        let mut bytes = SetxattrIn { size: 9, flags: 0 }.as_bytes().to_vec();
        bytes.extend_from_slice(b"user.a\0value");
        assert!(matches!(
            parse(opcode::SETXATTR, &bytes, false),
            Err(WireError::Short)
        ));
        let bytes = BatchForgetIn {
            count: u32::MAX,
            dummy: 0,
        };
        assert!(matches!(
            parse(opcode::BATCH_FORGET, bytes.as_bytes(), false),
            Err(WireError::Short)
        ));
    }

    #[test]
    fn groups_are_found_among_extensions_and_nowhere_beyond() {
        let extension = |kind: u32, words: &[u32]| {
            let size = 8 + 4 * u32::try_from(words.len()).unwrap();
            [&[size, kind], words].concat()
        };
        let found = |words: &[u32]| supplementary_group(words.as_bytes());
        assert_eq!(found(&extension(EXT_GROUPS, &[1, 300])), Some(300));
        let label = extension(1, &[4, 5, 6, 7]);
        let both = [label.clone(), extension(EXT_GROUPS, &[1, 300])].concat();
        assert_eq!(found(&both), Some(300));
        for bad in [
            vec![],
            label,
            vec![0, 7],
            vec![7, EXT_GROUPS, 1, 300],
            vec![12, EXT_GROUPS, 1, 300],
            vec![u32::MAX, EXT_GROUPS, 1, 300],
            extension(EXT_GROUPS, &[0, 300]),
            extension(EXT_GROUPS, &[2, 300]),
        ] {
            assert_eq!(found(&bad), None, "{bad:?}");
        }
    }

    #[test]
    fn every_opcode_survives_every_short_body() {
        for code in 0..=255 {
            for len in 0..200 {
                for byte in [0, 0xff] {
                    let _ = parse(code, &vec![byte; len], len % 2 == 0);
                }
            }
        }
    }
}
