//! Decides the answers to DNS questions: container names, and names that users added.
//!
//! The names come from gossip records. Each node announces its own names, and no other node can do
//! so on its behalf. [`Zone`] merges them and [`Directory`] answers questions from it.

pub mod directory;
mod domain;
pub mod zone;

pub use directory::Directory;
pub use zone::Zone;

/// The default domain.
pub const DEFAULT_DOMAIN: &str = "overnode.local";
/// An additional domain that is always served: containers that migrate from Weave Net have it in
/// their configuration.
pub const ALIAS: &str = "weave.local";
