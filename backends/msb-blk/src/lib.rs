//! Library of the msb-blk backend.
