//! Tells people what is in a data directory.
