//! The part of `msb-fs`'s command line that says what is shared, and how.

use super::{Arguments, QUEUE_SIZE};
use crate::plan::{FsPlan, ShareSource};
use crate::spec::{CachePolicy, HostPermissions, StatVirtualization};

pub(super) fn describe(argv: &mut Arguments, tag: &str, share: &FsPlan) {
    match &share.source {
        ShareSource::Directory(path) => argv.pair("--shared-dir", path),
        ShareSource::File(path) => argv.pair("--shared-file", path),
    }
    argv.pair("--tag", tag);
    if share.read_only {
        argv.flag("--readonly");
    }
    let stat_virt = match share.stat_virtualization {
        StatVirtualization::Strict => "strict",
        StatVirtualization::Relaxed => "relaxed",
        StatVirtualization::Off => "off",
    };
    argv.pair("--stat-virt", stat_virt);
    let host_perms = match share.host_permissions {
        HostPermissions::Private => "private",
        HostPermissions::Mirror => "mirror",
    };
    argv.pair("--host-perms", host_perms);
    let pair = |(user, group): (u32, u32)| format!("{user}:{group}");
    argv.pair("--default-owner", pair(share.default_owner));
    if let Some(owner) = share.owner {
        argv.pair("--owner", pair(owner));
    }
    if let Some(cache) = share.cache {
        let cache = match cache {
            CachePolicy::None => "none",
            CachePolicy::Auto => "auto",
            CachePolicy::Metadata => "metadata",
            CachePolicy::Always => "always",
        };
        argv.pair("--cache", cache);
    }
    if share.exclusive {
        argv.flag("--exclusive");
    }
    if let Some(quota) = &share.quota {
        argv.pair("--quota", quota.bytes.to_string());
        argv.pair("--quota-file", &quota.account);
    }
    argv.pair("--num-request-queues", share.queues.to_string());
    argv.pair("--queue-size", QUEUE_SIZE.to_string());
}
