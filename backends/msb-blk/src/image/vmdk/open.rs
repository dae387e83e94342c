//! Opens the files of a VMDK and checks that they fit its descriptor.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;

use super::{
    Descriptor, DescriptorPlace, ExtentKind, ExtentLine, MAX_DESCRIPTOR, Source, SparseHeader,
    Vmdk, VmdkError, is_at_end, is_sparse,
};
use crate::file::{BlockingFile, HostFile};
use crate::image::Image;
use crate::image::open::{Format, OpenError, Opener, host_error, reference_error};

/// Whether an extent bears the name of its descriptor, as every tool names them: then it is part
/// of the image and no reference to something else.
pub(in crate::image) fn is_own_extent(descriptor: &Path, name: &str) -> bool {
    let stem = descriptor.file_stem().and_then(OsStr::to_str);
    let rest = stem.and_then(|stem| name.strip_prefix(stem));
    let Some(kind) = rest.and_then(|rest| rest.strip_suffix(".vmdk")) else {
        return false;
    };
    let number = kind.strip_prefix("-s").or_else(|| kind.strip_prefix("-f"));
    kind == "-flat"
        || number
            .is_some_and(|n| n.len() >= 3 && n.len() <= 6 && n.bytes().all(|b| b.is_ascii_digit()))
}

impl Opener<'_> {
    pub(in crate::image) fn vmdk(
        &mut self,
        file: Arc<BlockingFile>,
        path: &Path,
        read_only: bool,
        depth: usize,
    ) -> Result<Image, OpenError> {
        let size = file.size().map_err(|source| host_error(path, source))?;
        let mut start = [0; 512];
        file.read_at(&mut start, 0)
            .map_err(|source| host_error(path, source))?;
        let (text_at, text, own) = if is_sparse(&start) {
            let header = sparse_header(&file, path, size)?;
            let len = usize::try_from(header.descriptor_len * 512).unwrap_or(0);
            let len = if header.descriptor == 0 { 0 } else { len };
            (
                header.descriptor * 512,
                read_text(&file, path, header.descriptor * 512, len)?,
                Some(header),
            )
        } else {
            let len = usize::try_from(size).unwrap_or(usize::MAX);
            if len > MAX_DESCRIPTOR {
                return Err(refused(path, VmdkError::Magic));
            }
            (0, read_text(&file, path, 0, len)?, None)
        };
        let descriptor = match (&own, text.is_empty()) {
            // A lone extent of a split disk has no descriptor of its own.
            (Some(_), true) => None,
            _ => Some(Descriptor::parse(&text).map_err(|source| refused(path, source))?),
        };
        let extents = match (own, &descriptor) {
            (Some(header), _) => {
                let kind = ExtentKind::Sparse {
                    name: String::new(),
                };
                let line = ExtentLine {
                    writable: true,
                    sectors: header.capacity,
                    kind,
                };
                vec![(line, Source::Sparse(Arc::clone(&file) as _, header))]
            }
            (None, Some(descriptor)) => self.extents(path, &descriptor.extents, read_only)?,
            (None, None) => return Err(refused(path, VmdkError::Magic)),
        };
        let parent = match &descriptor {
            Some(descriptor) => self.parent(path, descriptor, depth)?,
            None => None,
        };
        let place = find_cid(&text).map(|at| DescriptorPlace {
            file,
            cid: text_at + at,
        });
        let cid = descriptor.map(|descriptor| descriptor.cid);
        let image = Vmdk::open(extents, parent, place, cid, read_only).map_err(|source| {
            OpenError::Metadata {
                path: path.to_owned(),
                source,
            }
        })?;
        if image.is_packed() && !read_only {
            let reason = "a streamOptimized VMDK cannot be written (open it with --read-only, or convert it with `qemu-img convert`)";
            return Err(OpenError::Refused {
                path: path.to_owned(),
                reason,
            });
        }
        Ok(Image::Vmdk(Box::new(image)))
    }

    fn extents(
        &mut self,
        path: &Path,
        lines: &[ExtentLine],
        read_only: bool,
    ) -> Result<Vec<(ExtentLine, Source)>, OpenError> {
        let mut extents = Vec::with_capacity(lines.len());
        // Stretches of files in use, so that no byte belongs to two places of the disk.
        let mut taken: Vec<(*const BlockingFile, u64, u64)> = Vec::new();
        for line in lines {
            let read_only = read_only || !line.writable;
            let (name, range) = match &line.kind {
                ExtentKind::Zero => {
                    extents.push((line.clone(), Source::Zero));
                    continue;
                }
                ExtentKind::Flat { name, offset } => {
                    (name, (offset * 512, (offset + line.sectors) * 512))
                }
                ExtentKind::Sparse { name } => (name, (0, u64::MAX)),
            };
            let file = self.extent(path, name, read_only)?;
            let fail =
                |reason: &str| reference_error(path, "extent", name.as_bytes(), reason.to_owned());
            let id = Arc::as_ptr(&file);
            if taken
                .iter()
                .any(|&(other, from, to)| other == id && range.0 < to && from < range.1)
            {
                return Err(fail("two extents use the same bytes"));
            }
            taken.push((id, range.0, range.1));
            let size = file.size().map_err(|source| host_error(path, source))?;
            let source = match &line.kind {
                ExtentKind::Flat { offset, .. } => {
                    if size < range.1 {
                        return Err(fail("it is shorter than the descriptor says"));
                    }
                    Source::Flat(file, offset * 512)
                }
                _ => {
                    let header = sparse_header(&file, path, size)?;
                    if header.capacity < line.sectors {
                        return Err(fail("it is shorter than the descriptor says"));
                    }
                    Source::Sparse(file, header)
                }
            };
            extents.push((line.clone(), source));
        }
        Ok(extents)
    }

    fn parent(
        &mut self,
        path: &Path,
        descriptor: &Descriptor,
        depth: usize,
    ) -> Result<Option<Arc<Image>>, OpenError> {
        let (name, cid) = match (&descriptor.parent, descriptor.parent_cid) {
            (Some(name), Some(cid)) => (name, cid),
            (None, None) => return Ok(None),
            (name, _) => {
                let name = name.as_deref().unwrap_or_default().as_bytes();
                let reason = "parentCID and parentFileNameHint contradict each other".to_owned();
                return Err(reference_error(path, "parent", name, reason));
            }
        };
        let parent = self.below(path, "parent", name.as_bytes(), Format::Vmdk, depth)?;
        match parent.as_ref() {
            Image::Vmdk(vmdk) if vmdk.cid == Some(cid) => Ok(Some(parent)),
            _ => {
                let reason = "it was changed since this image was made from it (parentCID differs)";
                Err(reference_error(
                    path,
                    "parent",
                    name.as_bytes(),
                    reason.to_owned(),
                ))
            }
        }
    }
}

/// The header of a sparse extent, or the footer it defers to.
fn sparse_header(file: &BlockingFile, path: &Path, size: u64) -> Result<SparseHeader, OpenError> {
    let mut bytes = [0; 512];
    file.read_at(&mut bytes, 0)
        .map_err(|source| host_error(path, source))?;
    if is_sparse(&bytes) && is_at_end(&bytes) {
        let at = size
            .checked_sub(1024)
            .ok_or(refused(path, VmdkError::Field("footer")))?;
        file.read_at(&mut bytes, at)
            .map_err(|source| host_error(path, source))?;
    }
    SparseHeader::parse(&bytes).map_err(|source| refused(path, source))
}

fn read_text(file: &BlockingFile, path: &Path, at: u64, len: usize) -> Result<Vec<u8>, OpenError> {
    let mut text = vec![0; len];
    file.read_at(&mut text, at)
        .map_err(|source| host_error(path, source))?;
    Ok(text)
}

/// Where the eight digits of the content id begin.
fn find_cid(text: &[u8]) -> Option<u64> {
    let at = text.windows(5).position(|window| window == b"\nCID=")? + 5;
    let digits = text.get(at..at + 8)?;
    let ends = !text.get(at + 8).is_some_and(u8::is_ascii_hexdigit);
    (ends && digits.iter().all(u8::is_ascii_hexdigit)).then_some(at as u64)
}

fn refused(path: &Path, source: VmdkError) -> OpenError {
    OpenError::Vmdk {
        path: path.to_owned(),
        source,
    }
}
