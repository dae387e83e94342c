//! Whole sandboxes: each mount kind and option, seen from the guest and from the host.

mod crash;
mod examples;
mod jails;
mod kills;
mod life;
mod lifecycle;
mod mounts;
mod plain;
mod plug;
mod suites;
