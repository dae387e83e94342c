//! Entry points for fuzzing: hostile bytes as a request, an image or a list of operations.

mod memory;
mod model;
mod sample;

pub use memory::MemoryFile;
pub use model::{qcow2_model, vmdk_model};

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use msb_vhost::{Device, Request, Segments};

use crate::device::{BlkDevice, DeviceConfig};
use crate::file::Emptying;
use crate::image::qcow2::{Header, Qcow2};
use crate::image::vmdk::{Descriptor, ExtentKind, ExtentLine, Source, SparseHeader, Vmdk};
use crate::image::{Image, Raw};

/// Size of the disk that requests go to.
const DISK: usize = 64 << 10;

fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

/// Takes `data` for the readable part of a request to a small disk, over an image of either kind of
/// access. Whatever it says, it is answered once, and with a status.
pub fn request(data: &[u8]) {
    let Some((&[room, kind], data)) = data.split_first_chunk::<2>() else {
        return;
    };
    let file = Arc::new(MemoryFile::new(vec![0x5a; DISK]));
    let deny = kind & 1 != 0;
    let image = Image::Raw(Raw::new(Arc::clone(&file) as _, DISK as u64, kind & 2 != 0));
    let config = DeviceConfig {
        serial: "fuzz".into(),
        queues: 0,
        queue_size: 128,
        read_only: deny,
    };
    let Ok(device) = BlkDevice::new(Arc::new(image), config) else {
        return;
    };
    // Whole sectors and a status byte, one byte more, or nothing at all.
    let room = usize::from(room) / 4 * 512 + usize::from(room % 4);
    let writable = Segments::from_vec(vec![0xee; room]);
    let answer = writable.clone();
    let (done, finished) = channel();
    let request = Request::new(Segments::from_vec(data.to_vec()), writable, move |used| {
        let _ = done.send(used);
    });
    device.handle(0, request);
    device.end_turn(0);
    let used = finished.recv_timeout(Duration::from_secs(90));
    assert!(
        used.is_ok_and(|used| index(used.into()) <= room),
        "no answer, or one beyond the room: {used:?}"
    );
    assert!(finished.try_recv().is_err(), "answered twice");
    let status = answer.to_vec().last().copied();
    assert!(
        status.is_none_or(|status| status < 3),
        "no status: {status:?}"
    );
    let changed = file.content().iter().any(|&byte| byte != 0x5a);
    assert!(!changed || kind & 3 == 0, "a read-only disk has changed");
}

/// Opens `data` as a qcow2 image and uses it.
pub fn qcow2(data: &[u8]) {
    let Ok(header) = Header::parse(data) else {
        return;
    };
    let read_only = header.corrupt || header.dirty;
    let file = Arc::new(MemoryFile::new(data.to_vec()));
    let data_file = header
        .external_data
        .then(|| Arc::new(MemoryFile::default()) as _);
    if let Ok(image) = Qcow2::open(header, file, data_file, None, read_only) {
        exercise(&Image::Qcow2(Box::new(image)), data);
    }
}

/// Opens `data` as a VMDK descriptor, then as a sparse extent, and uses it.
pub fn vmdk(data: &[u8]) {
    let _ = Descriptor::parse(data);
    let Ok(header) = SparseHeader::parse(data) else {
        return;
    };
    let kind = ExtentKind::Sparse {
        name: String::new(),
    };
    let line = ExtentLine {
        writable: true,
        sectors: header.capacity,
        kind,
    };
    let source = Source::Sparse(Arc::new(MemoryFile::new(data.to_vec())), header);
    if let Ok(image) = Vmdk::open(vec![(line, source)], None, None, None, false) {
        exercise(&Image::Vmdk(Box::new(image)), data);
    }
}

/// Reads, writes and empties where the last bytes of `data` say.
fn exercise(image: &Image, data: &[u8]) {
    let sectors = image.size() / 512;
    if sectors == 0 {
        return;
    }
    let mut buf = vec![0; 8192];
    for place in data.rchunks_exact(4).take(16) {
        let place = place.try_into().map_or(0, u32::from_le_bytes);
        let at = u64::from(place >> 4) % sectors * 512;
        let len = (u64::from(place >> 8 & 15) + 1) * 512;
        let len = len.min(image.size() - at);
        let _ = match place & 7 {
            0..=2 => {
                let part = buf.get_mut(..index(len)).unwrap_or_default();
                image.read_at(part, at)
            }
            3..=4 => image.write(&mut Segments::from_vec(vec![7; index(len)]), at, len),
            5 => image.empty(at, (len * 64).min(image.size() - at), Emptying::Discard),
            6 => image.empty(at, (len * 64).min(image.size() - at), Emptying::Zero),
            _ => image.flush(),
        };
    }
    let _ = image.close();
}
