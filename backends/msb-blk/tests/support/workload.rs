//! Random work on a recorded image, and what each sector may hold after a crash.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use msb_blk::file::{Emptying, HostFile};
use msb_blk::image::qcow2::{Header, Qcow2};
use msb_blk::image::vmdk::{ExtentKind, ExtentLine, Source, SparseHeader, Vmdk};
use msb_blk::image::{Format, Image};
use msb_vhost::Segments;

use super::recorder::Recorder;
use super::{Random, try_open};

pub enum Action {
    Write(usize, Vec<u8>),
    Discard(usize, usize),
    Flush,
}

/// What was done, and how long the log was before and after. What failed never ended.
pub struct Done {
    pub action: Action,
    pub began: usize,
    pub ended: usize,
}

pub fn work(image: &Image, recorder: &Recorder, random: &mut Random, steps: usize) -> Vec<Done> {
    let sectors = image.size() / 512;
    let mut done = Vec::new();
    for _ in 0..steps {
        let began = recorder.len();
        let first = random.below(sectors);
        let most = if random.below(6) == 0 { 300 } else { 12 };
        let count = (1 + random.below(most)).min(sectors - first);
        let (at, len) = (first * 512, count * 512);
        let (action, result) = match random.below(12) {
            0..=1 => (Action::Flush, image.flush()),
            2 => {
                let result = image.empty(at, len, Emptying::Discard);
                (Action::Discard(first as usize, count as usize), result)
            }
            3 => {
                let how = if random.below(2) == 0 {
                    Emptying::Zero
                } else {
                    Emptying::Unmap
                };
                let result = image.empty(at, len, how);
                (Action::Write(first as usize, vec![0; len as usize]), result)
            }
            _ => {
                let bytes = random.bytes(len as usize);
                let result = image.write(&mut Segments::from_vec(bytes.clone()), at, len);
                (Action::Write(first as usize, bytes), result)
            }
        };
        assert!(result.is_ok() || recorder.may_fail(), "{result:?}");
        let ended = if result.is_ok() {
            recorder.len()
        } else {
            usize::MAX
        };
        done.push(Done {
            action,
            began,
            ended,
        });
    }
    done
}

/// Fails unless each sector has a content it may have after a crash at `moment`.
pub fn check_content(
    read: &[u8],
    before: &[u8],
    done: &[Done],
    moment: usize,
    killed: bool,
    what: &str,
) {
    let sectors = read.len() / 512;
    // A write that failed leaves the old or the new bytes, also after the next flush.
    let mut allowed: Vec<Vec<(&[u8], bool)>> = before
        .chunks(512)
        .map(|sector| vec![(sector, true)])
        .collect();
    let mut anything = vec![false; sectors];
    for step in done.iter().take_while(|step| step.began <= moment) {
        let whole = step.ended <= moment;
        match &step.action {
            Action::Write(first, bytes) => {
                for (nth, new) in bytes.chunks(512).enumerate() {
                    let sector = &mut allowed[first + nth];
                    if killed && whole {
                        sector.clear();
                        anything[first + nth] = false;
                    }
                    sector.push((new, step.ended < usize::MAX));
                }
            }
            Action::Discard(first, count) => anything[*first..first + count].fill(true),
            Action::Flush if whole => {
                for (sector, anything) in allowed.iter_mut().zip(&anything) {
                    if !anything {
                        let last = sector.iter().rposition(|(_, sure)| *sure).unwrap_or(0);
                        sector.drain(..last);
                    }
                }
            }
            Action::Flush => {}
        }
    }
    for (number, found) in read.chunks(512).enumerate() {
        let fits = anything[number] || allowed[number].iter().any(|(bytes, _)| *bytes == found);
        assert!(
            fits,
            "{what}: sector {number} has none of its {} contents",
            allowed[number].len()
        );
    }
}

pub fn open_recorded(path: &Path, format: Format) -> (Image, Arc<Recorder>, Vec<u8>) {
    let bytes = fs::read(path).unwrap();
    let recorder = Recorder::new(bytes.clone());
    let file = Arc::clone(&recorder) as Arc<dyn HostFile>;
    let image = if format == Format::Qcow2 {
        let header = Header::parse(&bytes).unwrap();
        let backing = header.backing.as_ref().map(|name| {
            let name = String::from_utf8(name.clone()).unwrap();
            Arc::new(try_open(&path.with_file_name(name), true).unwrap())
        });
        Image::Qcow2(Box::new(
            Qcow2::open(header, file, None, backing, false).unwrap(),
        ))
    } else {
        let header = SparseHeader::parse(&bytes).unwrap();
        let kind = ExtentKind::Sparse {
            name: String::new(),
        };
        let line = ExtentLine {
            writable: true,
            sectors: header.capacity,
            kind,
        };
        let source = Source::Sparse(file, header);
        let parent = path.with_file_name("base.vmdk");
        let parent = parent
            .exists()
            .then(|| Arc::new(try_open(&parent, true).unwrap()));
        let vmdk = Vmdk::open(vec![(line, source)], parent, None, None, false).unwrap();
        Image::Vmdk(Box::new(vmdk))
    };
    (image, recorder, bytes)
}
