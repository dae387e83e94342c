//! Chains, headers, sectors and lengths that are wrong cost their request and nothing else.

use anyhow::{Context, Result, ensure};
use msb_testkit::frontend::Part;

use super::{
    BACK, FLUSH, HEADER, IOERR, OK, READ, SIZE, WRITE, folder_with, header, request, serve,
};

const UNSUPP: u8 = 2;
const DISCARD: u32 = 11;
const ZEROES: u32 = 13;

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [
        sector.to_le_bytes().to_vec(),
        sectors.to_le_bytes().to_vec(),
        flags.to_le_bytes().to_vec(),
    ]
    .concat()
}

/// A chain that is wrong, or only unusual, and its status; `None` where there is no room for one.
type Row = (&'static str, Vec<u8>, Vec<Part>, Option<u8>);

fn whole(kind: u32, sector: u64, body: &[u8], room: u32) -> (Vec<u8>, Vec<Part>) {
    let mut parts = vec![Part::Out(HEADER, 16)];
    if !body.is_empty() {
        parts.push(Part::Out(HEADER + 16, body.len() as u32));
    }
    parts.push(Part::In(BACK, room + 1));
    ([header(kind, sector), body.to_vec()].concat(), parts)
}

#[expect(clippy::too_many_lines, reason = "a table")]
fn rows() -> Vec<Row> {
    let row = |name, (bytes, parts): (Vec<u8>, Vec<Part>), status| (name, bytes, parts, status);
    let last = SIZE / 512;
    let chain = |kind, parts: &[Part]| (header(kind, 0), parts.to_vec());
    let mut rows = vec![
        row(
            "a header of 15 bytes",
            chain(READ, &[Part::Out(HEADER, 15), Part::In(BACK, 513)]),
            Some(IOERR),
        ),
        row(
            "no header",
            chain(READ, &[Part::In(BACK, 513)]),
            Some(IOERR),
        ),
        row(
            "a header that the device may write",
            chain(READ, &[Part::In(BACK, 16), Part::In(BACK + 16, 513)]),
            Some(IOERR),
        ),
        row(
            "nothing but a status",
            chain(READ, &[Part::In(BACK, 1)]),
            Some(IOERR),
        ),
        row("no status", chain(READ, &[Part::Out(HEADER, 16)]), None),
        row(
            "a status of no bytes",
            chain(READ, &[Part::Out(HEADER, 16), Part::In(BACK, 0)]),
            None,
        ),
        row(
            "a header in three pieces",
            chain(
                READ,
                &[
                    Part::Out(HEADER, 5),
                    Part::Out(HEADER + 5, 1),
                    Part::Out(HEADER + 6, 10),
                    Part::In(BACK, 513),
                ],
            ),
            Some(OK),
        ),
        row(
            "data in pieces of one byte",
            chain(
                READ,
                &[
                    Part::Out(HEADER, 16),
                    Part::In(BACK, 1),
                    Part::In(BACK + 1, 510),
                    Part::In(BACK + 511, 2),
                ],
            ),
            Some(OK),
        ),
        row(
            "pieces of no bytes",
            chain(
                READ,
                &[
                    Part::Out(HEADER, 0),
                    Part::Out(HEADER, 16),
                    Part::In(BACK, 0),
                    Part::In(BACK, 513),
                ],
            ),
            Some(OK),
        ),
        row("a read of no sector", whole(READ, 0, &[], 0), Some(OK)),
        row(
            "a read of half a sector",
            whole(READ, 0, &[], 256),
            Some(IOERR),
        ),
        row("a read with data", whole(READ, 0, &[1; 512], 512), Some(OK)),
        row(
            "a write of half a sector",
            whole(WRITE, 0, &[1; 256], 0),
            Some(IOERR),
        ),
        row(
            "a write of a sector and a byte",
            whole(WRITE, 0, &[1; 513], 0),
            Some(IOERR),
        ),
        row(
            "a flush with data",
            whole(FLUSH, 7, &[1; 512], 512),
            Some(OK),
        ),
        row(
            "a discard of nothing",
            whole(DISCARD, 0, &[], 0),
            Some(IOERR),
        ),
        row(
            "a discard of half a range",
            whole(DISCARD, 0, &[0; 8], 0),
            Some(IOERR),
        ),
        row(
            "a discard with a flag",
            whole(DISCARD, 0, &range(0, 8, 1), 0),
            Some(UNSUPP),
        ),
        row(
            "a discard beyond the end",
            whole(DISCARD, 0, &range(last, 1, 0), 0),
            Some(IOERR),
        ),
        row(
            "a discard of 33 ranges",
            whole(DISCARD, 0, &range(0, 1, 0).repeat(33), 0),
            Some(IOERR),
        ),
        row(
            "zeroes with an unknown flag",
            whole(ZEROES, 0, &range(0, 8, 2), 0),
            Some(UNSUPP),
        ),
        row(
            "zeroes that overflow",
            whole(ZEROES, 0, &range(u64::MAX, u32::MAX, 0), 0),
            Some(IOERR),
        ),
        row(
            "zeroes of too much",
            whole(ZEROES, 0, &range(0, u32::MAX, 0), 0),
            Some(IOERR),
        ),
        row(
            "one good range and a bad one",
            whole(ZEROES, 0, &[range(9, 1, 0), range(last, 1, 0)].concat(), 0),
            Some(IOERR),
        ),
    ];
    for sector in [last, u64::MAX, u64::MAX / 512, 1 << 55, (1 << 55) - 1] {
        rows.push(row(
            "a read beyond the end",
            whole(READ, sector, &[], 512),
            Some(IOERR),
        ));
        rows.push(row(
            "a write beyond the end",
            whole(WRITE, sector, &[1; 512], 0),
            Some(IOERR),
        ));
    }
    rows.push(row(
        "a read across the end",
        whole(READ, last - 1, &[], 1024),
        Some(IOERR),
    ));
    for kind in [
        2,
        3,
        5,
        6,
        7,
        9,
        10,
        12,
        14,
        16,
        17,
        21,
        0x8000_0000,
        u32::MAX,
    ] {
        rows.push(row(
            "an unknown request",
            whole(kind, 0, &[1; 512], 512),
            Some(UNSUPP),
        ));
    }
    rows
}

#[test]
fn malformed_requests_are_answered_and_the_next_is_served() -> Result<()> {
    for (image, format) in [("a.raw", "raw"), ("a.qcow2", "qcow2")] {
        let folder = folder_with(image, format)?;
        let (mut backend, mut front) = serve(folder.path(), image, &[])?;
        let mark = [0x77; 512];
        ensure!(
            request(&mut front, 0, WRITE, 5, &mark, 0)?.0 == OK,
            "a good write"
        );
        for indirect in [false, true] {
            if indirect {
                front.use_indirect(0);
            }
            for (name, bytes, parts, expected) in rows() {
                front.memory.write(HEADER, &[0xee; 2048]);
                front.memory.write(HEADER, &bytes);
                front.memory.write(BACK, &[0xee; 2048]);
                front.put(0, &parts);
                front.kick(0)?;
                front.wait(0).with_context(|| format!("{image}: {name}"))?;
                let status = parts.iter().rev().find_map(|part| match *part {
                    Part::In(at, len) if len > 0 => {
                        Some(front.memory.read(at + u64::from(len) - 1, 1)[0])
                    }
                    _ => None,
                });
                ensure!(
                    status == expected,
                    "{image}, indirect {indirect}: {name} gave {status:?}, not {expected:?}"
                );
                let (status, back) = request(&mut front, 0, READ, 5, &[], 512)?;
                ensure!(
                    status == OK && back == mark,
                    "{image}: the read after {name}"
                );
            }
        }
        ensure!(backend.is_running()?, "{image}: the process has ended");
    }
    Ok(())
}
