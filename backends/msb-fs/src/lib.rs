//! Library of the msb-fs backend.
