//! Random operations on a sound image, compared with a model that knows what each sector holds.

#![allow(
    clippy::indexing_slicing,
    reason = "an oracle that panics has found something"
)]

use std::sync::Arc;

use msb_vhost::Segments;

use super::MemoryFile;
use super::sample::{Qcow2Shape, VmdkShape, judge_qcow2, judge_vmdk};
use crate::file::{Emptying, HostFile};
use crate::image::qcow2::{Header, Qcow2};
use crate::image::vmdk::{ExtentKind, ExtentLine, Source, SparseHeader, Vmdk};
use crate::image::{Image, ImageError, Raw};

/// What the disk holds, and which sectors nobody can know: discarded, or under a write that failed.
struct Model {
    bytes: Vec<u8>,
    open: Vec<bool>,
    /// Whether an operation has failed.
    failed: bool,
}

impl Model {
    fn new(mut bytes: Vec<u8>, size: u64) -> Self {
        let size = super::index(size);
        bytes.resize(size, 0);
        Self {
            bytes,
            open: vec![false; size / 512],
            failed: false,
        }
    }

    fn put(&mut self, first: usize, count: usize, byte: Option<u8>, done: &Result<(), ImageError>) {
        match done {
            Ok(()) => {}
            Err(ImageError::Host(_)) => self.failed = true,
            Err(error) => panic!("a sound image gave: {error}"),
        }
        let known = byte.filter(|_| done.is_ok());
        self.open[first..first + count].fill(known.is_none());
        self.bytes[first * 512..(first + count) * 512].fill(known.unwrap_or(0));
    }

    /// Compares, and keeps what was found where anything was allowed.
    fn compare(&mut self, image: &Image) {
        let mut found = vec![0; self.bytes.len()];
        if let Err(error) = image.read_at(&mut found, 0) {
            panic!("a sound image cannot be read: {error}");
        }
        let sectors = self.bytes.chunks_mut(512).zip(found.chunks(512));
        for (number, (known, found)) in sectors.enumerate() {
            if self.open[number] {
                known.copy_from_slice(found);
                self.open[number] = false;
            }
            assert!(
                known == found,
                "sector {number} holds {:#x}, not {:#x}",
                found[0],
                known[0]
            );
        }
    }

    /// Carries six bytes of input out on the image.
    fn step(&mut self, image: &Image, file: &MemoryFile, step: [u8; 6]) {
        let [kind, low, high, len, byte, mode] = step;
        let sectors = self.open.len();
        let grain = super::index(image.granularity() / 512).max(1);
        let mut first = usize::from(u16::from_le_bytes([low, high])) % sectors;
        let mut count = 1 + usize::from(len) % 40;
        if mode & 1 != 0 {
            first = first / grain * grain;
            count *= grain;
        }
        let count = count.min(sectors - first);
        let (at, bytes) = ((first * 512) as u64, (count * 512) as u64);
        match kind & 15 {
            0 => {
                if image.flush().is_err() {
                    self.failed = true;
                }
            }
            1 => file.fail_at(u32::from(len) % 24),
            2 | 3 => {
                let done = image.empty(at, bytes, Emptying::Discard);
                self.put(first, count, None, &done);
            }
            4 => {
                let done = image.empty(at, bytes, Emptying::Zero);
                self.put(first, count, Some(0), &done);
            }
            5 => {
                let done = image.empty(at, bytes, Emptying::Unmap);
                self.put(first, count, Some(0), &done);
            }
            6 => self.compare(image),
            _ => {
                let mut from = Segments::from_vec(vec![byte; count * 512]);
                let done = image.write(&mut from, at, bytes);
                self.put(first, count, Some(byte), &done);
            }
        }
    }
}

fn split(data: &[u8]) -> Option<([u8; 4], u8, &[u8])> {
    let (shape, rest) = data.split_first_chunk::<4>()?;
    let (&[below], rest) = rest.split_first_chunk::<1>()?;
    Some((*shape, below, rest))
}

/// A raw image to lie below, or none.
fn below(seed: u8, sectors: u64) -> Option<Vec<u8>> {
    let len = super::index(sectors) * 512 * usize::from(seed % 64) / 32;
    (seed & 64 != 0).then(|| {
        (0..len / 512 * 512)
            .map(|at| (at / 700) as u8 | 1)
            .collect()
    })
}

fn raw(bytes: &[u8]) -> Arc<Image> {
    let file = Arc::new(MemoryFile::new(bytes.to_vec()));
    Arc::new(Image::Raw(Raw::new(file, bytes.len() as u64, true)))
}

fn run(
    steps: &[u8],
    file: &Arc<MemoryFile>,
    mut model: Model,
    open: impl Fn(Arc<dyn HostFile>, bool) -> Image,
    judge: impl Fn(&[u8], bool),
) {
    let image = open(Arc::clone(file) as _, false);
    for step in steps.chunks_exact(6).take(200) {
        let step = step.first_chunk().copied().unwrap_or_default();
        model.step(&image, file, step);
    }
    file.fail_at(0);
    model.compare(&image);
    judge(&file.content(), false);
    // A process that was killed is as good as one that has closed the image.
    if steps.len().is_multiple_of(2) {
        let closed = image.close();
        assert!(closed.is_ok(), "{closed:?}");
        judge(&file.content(), !model.failed);
    }
    drop(image);
    let again = Arc::new(MemoryFile::new(file.content()));
    model.compare(&open(again, true));
}

/// Makes an empty qcow2 image of the shape the first bytes say and works on it as the rest says.
pub fn qcow2_model(data: &[u8]) {
    let Some((seed, under, steps)) = split(data) else {
        return;
    };
    let shape = Qcow2Shape::new(seed);
    let below = below(under, shape.sectors);
    let file = Arc::new(MemoryFile::new(shape.build()));
    let open = |file: Arc<dyn HostFile>, read_only: bool| {
        let mut bytes = vec![0; 1 << shape.cluster_bits];
        let backing = below.as_deref().map(raw);
        let image = file
            .read_at(&mut bytes, 0)
            .map_err(|error| error.to_string())
            .and_then(|()| Header::parse(&bytes).map_err(|error| error.to_string()))
            .and_then(|header| {
                Qcow2::open(header, file, None, backing, read_only)
                    .map_err(|error| error.to_string())
            });
        match image {
            Ok(image) => Image::Qcow2(Box::new(image)),
            Err(error) => panic!("a sound image was refused: {error}"),
        }
    };
    let model = Model::new(below.clone().unwrap_or_default(), shape.sectors * 512);
    run(steps, &file, model, open, judge_qcow2);
}

/// As [`qcow2_model`], with a sparse VMDK extent.
pub fn vmdk_model(data: &[u8]) {
    let Some((seed, under, steps)) = split(data) else {
        return;
    };
    let shape = VmdkShape::new(seed);
    let below = below(under, u64::from(shape.sectors));
    let file = Arc::new(MemoryFile::new(shape.build()));
    let open = |file: Arc<dyn HostFile>, read_only: bool| {
        let mut bytes = [0; 512];
        let kind = ExtentKind::Sparse {
            name: String::new(),
        };
        let image = file
            .read_at(&mut bytes, 0)
            .map_err(|error| error.to_string())
            .and_then(|()| SparseHeader::parse(&bytes).map_err(|error| error.to_string()))
            .and_then(|header| {
                let line = ExtentLine {
                    writable: true,
                    sectors: header.capacity,
                    kind,
                };
                let extents = vec![(line, Source::Sparse(file, header))];
                let parent = below.as_deref().map(raw);
                Vmdk::open(extents, parent, None, None, read_only)
                    .map_err(|error| error.to_string())
            });
        match image {
            Ok(image) => Image::Vmdk(Box::new(image)),
            Err(error) => panic!("a sound image was refused: {error}"),
        }
    };
    let size = u64::from(shape.sectors) * 512;
    let model = Model::new(below.clone().unwrap_or_default(), size);
    run(steps, &file, model, open, |bytes, _| judge_vmdk(bytes));
}
