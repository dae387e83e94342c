//! Every kind of image qemu-img makes, as the commands that make it from `base.raw`.

/// A writable kind of image: the file, and the qemu-img commands that make it.
#[derive(Debug)]
pub struct Variant {
    pub file: &'static str,
    pub commands: &'static [&'static str],
}

impl Variant {
    pub fn format(&self) -> &'static str {
        self.file.rsplit('.').next().unwrap_or_default()
    }

    /// Whether `qemu-img check` knows the format.
    pub fn can_be_checked(&self) -> bool {
        self.format() != "raw" && !self.commands.iter().any(|c| c.contains("Flat"))
    }
}

const fn variant(file: &'static str, commands: &'static [&'static str]) -> Variant {
    Variant { file, commands }
}

const QCOW2: &str = "a.qcow2";
const VMDK: &str = "a.vmdk";

/// All that can be written. The disks are 3 MiB large.
pub const WRITABLE: &[Variant] = &[
    variant("a.raw", &["create -f raw a.raw 3M"]),
    variant(QCOW2, &["create -f qcow2 a.qcow2 3M"]),
    variant(QCOW2, &["create -f qcow2 -o cluster_size=512 a.qcow2 3M"]),
    variant(QCOW2, &["create -f qcow2 -o cluster_size=2M a.qcow2 3M"]),
    variant(
        QCOW2,
        &["create -f qcow2 -o compat=0.10,cluster_size=1k a.qcow2 3M"],
    ),
    variant(
        QCOW2,
        &["create -f qcow2 -o refcount_bits=1,cluster_size=4k a.qcow2 3M"],
    ),
    variant(
        QCOW2,
        &["create -f qcow2 -o refcount_bits=2,cluster_size=8k a.qcow2 3M"],
    ),
    variant(
        QCOW2,
        &["create -f qcow2 -o refcount_bits=64,cluster_size=512 a.qcow2 3M"],
    ),
    variant(
        QCOW2,
        &["create -f qcow2 -o lazy_refcounts=on,cluster_size=4k a.qcow2 3M"],
    ),
    variant(
        QCOW2,
        &["create -f qcow2 -o preallocation=metadata a.qcow2 3M"],
    ),
    variant(
        QCOW2,
        &["create -f qcow2 -o preallocation=falloc,cluster_size=4k a.qcow2 3M"],
    ),
    variant(
        QCOW2,
        &["create -f qcow2 -o extended_l2=on,cluster_size=16k a.qcow2 3M"],
    ),
    variant(
        QCOW2,
        &["create -f qcow2 -o extended_l2=on -b base.raw -F raw a.qcow2 3M"],
    ),
    variant(
        QCOW2,
        &["create -f qcow2 -o cluster_size=4k -b base.raw -F raw a.qcow2 3M"],
    ),
    variant(
        QCOW2,
        &["create -f qcow2 -o compat=0.10 -b base.raw -F raw a.qcow2 3M"],
    ),
    variant(
        QCOW2,
        &[
            "convert -f raw -O vmdk base.raw base.vmdk",
            "create -f qcow2 -b base.vmdk -F vmdk mid.qcow2",
            "create -f qcow2 -o cluster_size=4k -b mid.qcow2 -F qcow2 a.qcow2 3M",
        ],
    ),
    variant(
        QCOW2,
        &["convert -c -f raw -O qcow2 -o cluster_size=4k base.raw a.qcow2"],
    ),
    variant(
        QCOW2,
        &["convert -c -f raw -O qcow2 -o compression_type=zstd base.raw a.qcow2"],
    ),
    variant(
        QCOW2,
        &["convert -c -f raw -O qcow2 -o extended_l2=on,cluster_size=32k base.raw a.qcow2"],
    ),
    variant(
        QCOW2,
        &[
            "convert -f raw -O qcow2 -o cluster_size=4k base.raw a.qcow2",
            "snapshot -c one a.qcow2",
        ],
    ),
    variant(
        QCOW2,
        &[
            "convert -c -f raw -O qcow2 base.raw a.qcow2",
            "snapshot -c one a.qcow2",
        ],
    ),
    variant(
        QCOW2,
        &["create -f qcow2 -o data_file=data.bin,data_file_raw=off,cluster_size=4k a.qcow2 3M"],
    ),
    variant(
        QCOW2,
        &["create -f qcow2 -o data_file=data.bin,data_file_raw=on a.qcow2 3M"],
    ),
    variant(
        VMDK,
        &["create -f vmdk -o subformat=monolithicSparse a.vmdk 3M"],
    ),
    variant(VMDK, &["create -f vmdk -o zeroed_grain=on a.vmdk 3M"]),
    variant(
        VMDK,
        &["create -f vmdk -o subformat=monolithicFlat a.vmdk 3M"],
    ),
    variant(
        VMDK,
        &["create -f vmdk -o subformat=twoGbMaxExtentSparse a.vmdk 3M"],
    ),
    variant(
        VMDK,
        &["create -f vmdk -o subformat=twoGbMaxExtentFlat a.vmdk 3M"],
    ),
    variant(
        VMDK,
        &[
            "convert -f raw -O vmdk base.raw base.vmdk",
            "create -f vmdk -b base.vmdk -F vmdk a.vmdk",
        ],
    ),
    variant(
        VMDK,
        &[
            "convert -f raw -O vmdk -o subformat=streamOptimized base.raw base.vmdk",
            "create -f vmdk -o zeroed_grain=on -b base.vmdk -F vmdk a.vmdk",
        ],
    ),
];
