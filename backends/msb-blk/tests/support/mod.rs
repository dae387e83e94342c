//! What the image tests share: patterns, qemu-img, and opening an image the way the program does.

#![allow(
    clippy::unwrap_used,
    dead_code,
    missing_docs,
    unreachable_pub,
    unused_imports,
    reason = "each test uses a part of it"
)]

pub mod recorder;
pub mod variants;
pub mod workload;

use std::path::Path;
use std::process::{Command, Output};

use msb_blk::file::Caching;
use msb_blk::image::{Format, Image, OpenError, OpenOptions, open};
pub use msb_vhost::chain;

/// A generator whose sequence is the same on every machine (xorshift64*).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend(self.next().to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }
}

/// A disk with noise, text, zeroes and single dirty sectors.
pub fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut disk = vec![0; len];
    for chunk in disk.chunks_mut(96 * 1024) {
        let len = chunk.len();
        match random.below(4) {
            0 => {}
            1 => chunk.copy_from_slice(&random.bytes(len)),
            2 => chunk
                .iter_mut()
                .enumerate()
                .for_each(|(i, b)| *b = b'a' + (i / 600 % 26) as u8),
            _ => {
                let at = random.below((len / 512) as u64) as usize * 512;
                chunk[at..at + 512].fill(random.next() as u8);
            }
        }
    }
    disk
}

/// Runs a program of qemu-utils; `None`, with a line that says so, when it is not installed.
pub fn run(program: &str, args: &[&str]) -> Option<Output> {
    match Command::new(program).args(args).output() {
        Ok(output) => Some(output),
        Err(e) => {
            println!("skipped: {program} cannot be run ({e})");
            None
        }
    }
}

pub fn has_qemu_img() -> bool {
    run("qemu-img", &["--version"]).is_some()
}

/// Runs qemu-img, which must succeed.
pub fn qemu_img(args: &[&str]) -> String {
    let output = run("qemu-img", args).expect("qemu-img was found before");
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "qemu-img {args:?}: {stderr}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a program of qemu-utils in a folder; it must succeed.
pub fn run_in(dir: &Path, program: &str, args: &[&str]) -> String {
    let output = Command::new(program)
        .args(args)
        .current_dir(dir)
        .output()
        .expect("it was found");
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {text}");
    text
}

/// Fails unless qemu-img finds the image sound; leaked clusters are allowed only if `leaks`.
pub fn qemu_check(path: &Path, format: &str, leaks: bool) {
    let dir = path.parent().expect("a file has a folder");
    let path = path.to_str().expect("test paths are UTF-8");
    let mut command = Command::new("qemu-img");
    let output = command
        .args(["check", "-f", format, path])
        .current_dir(dir)
        .output();
    let output = output.expect("qemu-img was found");
    let code = output.status.code();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    assert!(
        code == Some(0) || (leaks && code == Some(3)),
        "check {path}: {code:?} {text}"
    );
}

/// What qemu-img reads from the image.
pub fn qemu_content(path: &Path, format: &str) -> Vec<u8> {
    let raw = path.with_extension("content");
    let (from, to) = (path.to_str().expect("UTF-8"), raw.to_str().expect("UTF-8"));
    // QEMU looks for a data file in the current folder.
    let dir = path.parent().expect("a file has a folder");
    run_in(
        dir,
        "qemu-img",
        &["convert", "-f", format, "-O", "raw", from, to],
    );
    let content = std::fs::read(&raw).expect("qemu-img has written it");
    std::fs::remove_file(raw).expect("it is ours");
    content
}

pub fn options(format: Format, read_only: bool) -> OpenOptions {
    OpenOptions {
        format,
        read_only,
        caching: Caching::Writeback,
        allow_references: true,
        // A child that another test is just starting holds copies of all descriptors for a moment,
        // and with them the locks.
        lock: false,
    }
}

pub fn try_open(path: &Path, read_only: bool) -> Result<Image, OpenError> {
    open(path, &options(Format::of_path(path), read_only))
}

/// Everything the image reads as, asked for in uneven steps.
pub fn content(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0; image.size() as usize];
    let mut random = Random(99);
    let mut at = 0;
    while at < bytes.len() {
        let len = (512 * (1 + random.below(500) as usize)).min(bytes.len() - at);
        image
            .read_at(&mut bytes[at..at + len], at as u64)
            .expect("the image is sound");
        at += len;
    }
    bytes
}
