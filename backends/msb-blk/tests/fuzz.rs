//! Replays what fuzzing once broke, and shakes sound images a little more on every run.

#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::fs;
use std::path::Path;

use msb_blk::fuzzing;
use support::*;

type Target = fn(&[u8]);

#[test]
fn regressions() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/regressions");
    let targets: [(&str, Target); 5] = [
        ("request", fuzzing::request),
        ("qcow2", fuzzing::qcow2),
        ("qcow2_model", fuzzing::qcow2_model),
        ("vmdk", fuzzing::vmdk),
        ("vmdk_model", fuzzing::vmdk_model),
    ];
    for (name, target) in targets {
        let Ok(files) = fs::read_dir(folder.join(name)) else {
            continue;
        };
        for file in files {
            target(&fs::read(file.unwrap().path()).unwrap());
        }
    }
}

/// Small images with all kinds of clusters, as starting points.
fn seeds(dir: &Path) -> Vec<(Vec<u8>, Target)> {
    let mut seeds: Vec<(Vec<u8>, Target)> = Vec::new();
    fs::write(dir.join("base.raw"), pattern(96 << 10, 5)).unwrap();
    for (number, (options, target)) in [
        ("-O qcow2 -o cluster_size=512", fuzzing::qcow2 as Target),
        ("-O qcow2 -o compat=0.10,cluster_size=512", fuzzing::qcow2),
        ("-c -O qcow2 -o cluster_size=1k", fuzzing::qcow2),
        (
            "-c -O qcow2 -o cluster_size=4k,compression_type=zstd",
            fuzzing::qcow2,
        ),
        (
            "-O qcow2 -o extended_l2=on,cluster_size=16k",
            fuzzing::qcow2,
        ),
        (
            "-O qcow2 -o refcount_bits=1,cluster_size=512",
            fuzzing::qcow2,
        ),
        ("-O vmdk -o zeroed_grain=on", fuzzing::vmdk),
        ("-O vmdk -o subformat=streamOptimized", fuzzing::vmdk),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("{number}.img");
        let mut args = vec!["convert", "-f", "raw"];
        args.extend(options.split(' '));
        args.extend(["base.raw", &name]);
        run_in(dir, "qemu-img", &args);
        if number == 0 {
            run_in(dir, "qemu-img", &["snapshot", "-c", "one", &name]);
        }
        seeds.push((fs::read(dir.join(&name)).unwrap(), target));
    }
    seeds
}

/// Changes a few bytes, mostly where the metadata is.
fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..1 + random.below(6) {
        let reach = match random.below(3) {
            0 => 120,
            1 => 8192,
            _ => bytes.len() as u64,
        };
        let at = random.below(reach.min(bytes.len() as u64)) as usize;
        let len = [1, 2, 4, 8][random.below(4) as usize];
        let end = (at + len).min(bytes.len());
        match random.below(4) {
            0 => bytes[at..end].fill(0xff),
            1 => bytes[at..end].fill(0),
            2 => bytes[at] ^= 1 << random.below(8),
            _ => bytes[at..end].copy_from_slice(&random.bytes(end - at)),
        }
    }
    if random.below(20) == 0 {
        bytes.truncate(random.below(bytes.len() as u64) as usize);
    }
    let tail = random.bytes(64);
    bytes.extend(tail);
}

fn rounds(fewest: usize) -> usize {
    let asked = std::env::var("MSB_FUZZ_ROUNDS").ok();
    asked.and_then(|n| n.parse().ok()).unwrap_or(fewest)
}

/// Random operations on sound images against a model; the oracle that the fuzzer steers.
#[test]
fn models_agree() {
    let mut random = Random(4711);
    for round in 0..rounds(400) {
        let len = 5 + 6 * random.below(200) as usize + random.below(2) as usize;
        let bytes = random.bytes(len);
        let target: Target = if round % 2 == 0 {
            fuzzing::qcow2_model
        } else {
            fuzzing::vmdk_model
        };
        if std::panic::catch_unwind(|| target(&bytes)).is_err() {
            let copy = std::env::temp_dir().join(format!("msb-blk-model-{round}"));
            fs::write(&copy, &bytes).unwrap();
            panic!("round {round} failed; its input is {}", copy.display());
        }
    }
}

#[test]
fn requests_of_any_bytes() {
    let mut random = Random(31);
    for _ in 0..rounds(3000) {
        let len = random.below(1200) as usize;
        let mut bytes = random.bytes(len);
        if let Some(kind) = bytes.get_mut(2..6) {
            kind.copy_from_slice(&(random.below(16) as u32).to_le_bytes());
        }
        if random.below(2) == 0
            && let Some(sector) = bytes.get_mut(10..18)
        {
            sector.copy_from_slice(&random.below(140).to_le_bytes());
        }
        fuzzing::request(&bytes);
    }
}

/// `MSB_FUZZ_ROUNDS` sets how many mutants of each seed are tried.
#[test]
fn mutants_do_no_harm() {
    if !has_qemu_img() {
        return;
    }
    let rounds = rounds(300);
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random(77);
    for (seed, target) in seeds(dir.path()) {
        for _ in 0..rounds {
            let mut bytes = seed.clone();
            mutate(&mut bytes, &mut random);
            let copy = dir.path().join("last");
            if rounds > 1000 {
                fs::write(&copy, &bytes).unwrap();
            }
            target(&bytes);
        }
    }
}
