//! Whole sandboxes: each mount kind and option, seen from the guest and from the host.

mod crash;
mod jails;
mod lifecycle;
mod mounts;
