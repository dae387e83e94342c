//! Inflates compressed clusters, never to more than one cluster.

use std::io::Read;

use flate2::{Decompress, FlushDecompress, Status};

use super::header::Compression;
use crate::image::ImageError;

/// Inflates `packed`, which may have padding at its end, into exactly `cluster_size` bytes.
pub(super) fn inflate(
    packed: &[u8],
    cluster_size: usize,
    compression: Compression,
) -> Result<Vec<u8>, ImageError> {
    let mut cluster = vec![0; cluster_size];
    let whole = match compression {
        Compression::Zlib => {
            let mut deflate = Decompress::new(false);
            let status = deflate.decompress(packed, &mut cluster, FlushDecompress::Finish);
            matches!(
                status,
                Ok(Status::StreamEnd | Status::Ok | Status::BufError)
            ) && deflate.total_out() == cluster_size as u64
        }
        Compression::Zstd => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(packed);
            decoder.is_ok_and(|mut decoder| decoder.read_exact(&mut cluster).is_ok())
        }
    };
    if whole {
        Ok(cluster)
    } else {
        Err(ImageError::Damaged("a compressed cluster does not inflate"))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_bomb_stops_at_the_end_of_the_cluster() {
        let mut packer =
            flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
        packer.write_all(&vec![7; 64 << 20]).unwrap();
        let bomb = packer.finish().unwrap();
        assert_eq!(
            inflate(&bomb, 512, Compression::Zlib).unwrap(),
            vec![7; 512]
        );
        // A frame of RFC 8878 with a window of 128 KiB, and blocks that repeat a byte so often.
        let frame = |window| vec![0x28, 0xb5, 0x2f, 0xfd, 0, window];
        let mut bomb = frame(0x38);
        let mut blocks = Vec::new();
        for _ in 0..(64 << 20) / (128 << 10) {
            blocks.extend_from_slice(&((128_u32 << 10) << 3 | 1 << 1).to_le_bytes()[..3]);
            blocks.push(7);
        }
        bomb.extend(&blocks);
        assert_eq!(
            inflate(&bomb, 512, Compression::Zstd).unwrap(),
            vec![7; 512]
        );
        // A window of 2 TiB is not believed.
        let bomb = [frame(0xff), blocks].concat();
        assert!(inflate(&bomb, 512, Compression::Zstd).is_err());
    }

    #[test]
    fn rubbish_is_an_error() {
        for compression in [Compression::Zlib, Compression::Zstd] {
            for rubbish in [
                &[][..],
                &[0xff; 40],
                &[0; 40],
                &[0x28, 0xb5, 0x2f, 0xfd, 0xff, 0xff],
            ] {
                assert!(inflate(rubbish, 65536, compression).is_err());
            }
        }
    }
}
