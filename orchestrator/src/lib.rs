//! Storage for microVM sandboxes.
