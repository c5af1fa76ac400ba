//! Stores the node's state on disk, in one redb database in the state directory. Every change is
//! one transaction, which is on disk when the call returns (redb commits with fsync). A crash
//! leaves the state either before or after the transaction.
//!
//! The directory has mode 0700 and its files have mode 0600, whatever the umask. The store holds an
//! flock on `lock` while it is open, so that only one daemon uses a directory. Secrets are raw
//! bytes in a table of their own. They are wiped from this process's copies, but not from redb's
//! page cache in the same process.

mod disk;
mod record;

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fs::File;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use redb::{
    Database, ReadableDatabase, ReadableTable, TableDefinition, TableError, WriteTransaction,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use overnode_core::attachment::Attachment;
pub use record::{ExternalPeer, Identity, Known};

use overnode_core::ipam;
use overnode_trust::{self as trust, Untrusted};
use overnode_types::name::Named;
use overnode_types::text::reason;
use overnode_types::{NodeId, PeerIndex, Secret};

/// Version of the tables and of the values in them, which include gossip records. A database with
/// another version is refused.
pub const SCHEMA: u32 = 4;
/// File name of the database in the state directory.
pub const DATABASE: &str = "overnode.redb";
/// File name of the lock in the state directory. The file contains the daemon's process ID.
pub const LOCK: &str = "lock";

const CACHE_BYTES: usize = 1 << 20;

const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
const SECRETS: TableDefinition<&str, &[u8]> = TableDefinition::new("secrets");
/// Keyed by the order in which the targets were added.
const TARGETS: TableDefinition<u32, &str> = TableDefinition::new("targets");
const ATTACHMENTS: TableDefinition<&str, &[u8]> = TableDefinition::new("attachments");
const PEERS: TableDefinition<u16, &[u8]> = TableDefinition::new("peers");
const ADDRESSES: TableDefinition<&str, &[u8]> = TableDefinition::new("addresses");
const EXTERNAL: TableDefinition<u32, &[u8]> = TableDefinition::new("external_peers");

/// Errors of the store, worded for the operator.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The directory or a file in it cannot be created, opened or written.
    #[error("{what} {path}: {why}; {advice}")]
    Io {
        /// The failed operation.
        what: &'static str,
        /// The path of the operation.
        path: PathBuf,
        /// The system's reason.
        why: std::io::Error,
        /// What to do.
        advice: &'static str,
    },
    /// The directory is used for something else.
    #[error(
        "{path} contains other files, but no state of overnode; use an empty or new directory \
         with --state-dir"
    )]
    Foreign {
        /// The directory.
        path: PathBuf,
    },
    /// Another user can change the path.
    #[error("the state cannot be kept there: {0}; or use another --state-dir")]
    Untrusted(#[from] Untrusted),
    /// The directory contains no state.
    #[error("{path} contains no state of a node; `overnode launch` creates it")]
    Missing {
        /// The state directory.
        path: PathBuf,
    },
    /// Another process holds the lock.
    #[error(
        "another daemon{} uses {path}; stop it first, or give this one another --state-dir",
        pid(*.holder)
    )]
    Locked {
        /// The state directory.
        path: PathBuf,
        /// The process ID of the holder, if it could be read.
        holder: Option<u32>,
    },
    /// The state was written by another version of overnode.
    #[error(
        "the state in {path} was written by another version of overnode (layout {found}, this \
         version reads {SCHEMA}); install that version again, or run `overnode reset --force` and \
         launch again"
    )]
    Schema {
        /// The state directory.
        path: PathBuf,
        /// The version that was found.
        found: String,
    },
    /// The file is not a database, or it is damaged.
    #[error(
        "the state in {path} is damaged ({why}); restore it from a backup, or run \
         `overnode reset --force` and launch again"
    )]
    Damaged {
        /// The database.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The disk refused a transaction, and nothing of it was stored.
    #[error(
        "the state in {path} could not be written ({why}); check that the disk is not full or \
         failing, then try again"
    )]
    Write {
        /// The database.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The address already has an attachment.
    #[error("{0} is already attached; detach it first")]
    Taken(IpAddr),
}

fn pid(holder: Option<u32>) -> String {
    holder.map(|pid| format!(" (process {pid})")).unwrap_or_default()
}

type Result<T> = std::result::Result<T, StoreError>;
/// The values of a table.
type Rows = std::result::Result<Vec<Vec<u8>>, redb::Error>;

/// The node's state on disk.
#[derive(Debug)]
pub struct Store {
    directory: PathBuf,
    /// `None` after an I/O error, until the database can be reopened.
    database: Mutex<Option<Database>>,
    /// Dropped after the database, so that the next daemon gets the lock only once the database is
    /// closed.
    _lock: File,
}

impl Store {
    /// Opens the state in `directory`. Creates the directory if it does not exist.
    ///
    /// # Errors
    /// Returns [`StoreError::Io`] if the directory or its files cannot be created or written, or
    /// else [`StoreError::Locked`], [`StoreError::Schema`], [`StoreError::Damaged`] or
    /// [`StoreError::Untrusted`].
    pub fn open(directory: &Path) -> Result<Self> {
        disk::make_directory(directory)?;
        let lock = disk::lock(directory)?;
        disk::make_private_file(&directory.join(DATABASE))?;
        let database = Mutex::new(Some(open_database(directory)?));
        let store = Self { directory: directory.to_owned(), database, _lock: lock };
        store.check_schema()?;
        Ok(store)
    }

    /// Opens the state in `directory` if it contains a database.
    ///
    /// # Errors
    /// Returns [`StoreError::Missing`] if there is no database, or else an error of [`Self::open`].
    pub fn open_existing(directory: &Path) -> Result<Self> {
        match directory.join(DATABASE).try_exists() {
            Ok(true) => Self::open(directory),
            Ok(false) => Err(StoreError::Missing { path: directory.to_owned() }),
            Err(why) => Err(disk::io_error("could not read", directory, why)),
        }
    }

    /// Returns the state directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Returns the node's identity, or `None` before its first launch.
    ///
    /// # Errors
    /// Returns [`StoreError::Damaged`] if it cannot be read.
    pub fn identity(&self) -> Result<Option<Identity>> {
        let Some(public) = self.get_meta("identity")? else { return Ok(None) };
        let secret = |name| {
            self.read_secret(name)?.ok_or_else(|| self.damaged(format!("the {name} is missing")))
        };
        Ok(Some(Identity::join(public, secret("identity")?, secret("cluster key")?)))
    }

    /// Stores the node's identity. The targets can be stored in the same transaction, so that a
    /// launch is stored completely or not at all.
    ///
    /// # Errors
    /// Returns [`StoreError::Write`] if the transaction fails.
    pub fn set_identity(&self, identity: &Identity, targets: Option<&[String]>) -> Result<()> {
        self.change(|change| {
            change.open_table(META)?.insert("identity", encode(&identity.public()).as_slice())?;
            let mut secrets = change.open_table(SECRETS)?;
            secrets.insert("identity", identity.seed.0.as_slice())?;
            secrets.insert("cluster key", identity.cluster_key.0.as_slice())?;
            targets.map_or(Ok(()), |targets| replace_targets(change, targets))
        })
    }

    /// Returns the names of the targets, in the order in which they were added.
    ///
    /// # Errors
    /// Returns [`StoreError::Damaged`] if they cannot be read.
    pub fn targets(&self) -> Result<Vec<String>> {
        self.read(|read| {
            let table = read.open_table(TARGETS)?;
            table.iter()?.map(|entry| Ok(entry?.1.value().to_owned())).collect()
        })
    }

    /// Replaces the targets.
    ///
    /// # Errors
    /// Returns [`StoreError::Write`] if the transaction fails.
    pub fn set_targets(&self, targets: &[String]) -> Result<()> {
        self.change(|change| replace_targets(change, targets))
    }

    /// Returns all attachments, by address.
    ///
    /// # Errors
    /// Returns [`StoreError::Damaged`] if they cannot be read.
    pub fn attachments(&self) -> Result<Vec<Attachment>> {
        let mut all: Vec<Attachment> = self.read_all(|read| {
            let table = read.open_table(ATTACHMENTS)?;
            table.iter()?.map(|entry| Ok(entry?.1.value().to_vec())).collect()
        })?;
        all.sort_by_key(|attachment| attachment.address);
        Ok(all)
    }

    /// Stores a new attachment. If its address is not static, also stores the address as the last
    /// one allocated.
    ///
    /// # Errors
    /// Returns [`StoreError::Taken`] if the address has an attachment, and [`StoreError::Write`] if
    /// the transaction fails.
    pub fn add_attachment(&self, attachment: &Attachment) -> Result<()> {
        let (key, mut is_taken) = (attachment.address.to_string(), false);
        self.change(|change| {
            let mut table = change.open_table(ATTACHMENTS)?;
            is_taken = table.get(key.as_str())?.is_some();
            if is_taken {
                return Ok(());
            }
            table.insert(key.as_str(), encode(attachment).as_slice())?;
            if !attachment.is_static {
                change
                    .open_table(META)?
                    .insert("cursor", encode(&attachment.address).as_slice())?;
            }
            Ok(())
        })?;
        if is_taken { Err(StoreError::Taken(attachment.address)) } else { Ok(()) }
    }

    /// Stores an attachment, replacing an existing one with the same address.
    ///
    /// # Errors
    /// Returns [`StoreError::Write`] if the transaction fails.
    pub fn update_attachment(&self, attachment: &Attachment) -> Result<()> {
        let key = attachment.address.to_string();
        self.change(|change| {
            change
                .open_table(ATTACHMENTS)?
                .insert(key.as_str(), encode(attachment).as_slice())
                .map(drop)?;
            Ok(())
        })
    }

    /// Removes an attachment. Returns true if there was one.
    ///
    /// # Errors
    /// Returns [`StoreError::Write`] if the transaction fails.
    pub fn remove_attachment(&self, address: IpAddr) -> Result<bool> {
        let mut existed = false;
        self.change(|change| {
            existed =
                change.open_table(ATTACHMENTS)?.remove(address.to_string().as_str())?.is_some();
            Ok(())
        })?;
        Ok(existed)
    }

    /// Returns the IDs of the networks that a Docker engine created with this node.
    ///
    /// # Errors
    /// Returns [`StoreError::Damaged`] if they cannot be read.
    pub fn docker_networks(&self) -> Result<BTreeSet<String>> {
        Ok(self.get_meta("docker_networks")?.unwrap_or_default())
    }

    /// Replaces the IDs of the networks that a Docker engine created.
    ///
    /// # Errors
    /// Returns [`StoreError::Write`] if the transaction fails.
    pub fn set_docker_networks(&self, networks: &BTreeSet<String>) -> Result<()> {
        self.change(|change| {
            change
                .open_table(META)?
                .insert("docker_networks", encode(networks).as_slice())
                .map(drop)?;
            Ok(())
        })
    }

    /// Returns true if the default network was created in a Docker engine.
    ///
    /// # Errors
    /// Returns [`StoreError::Damaged`] if the entry cannot be read.
    pub fn has_default_network(&self) -> Result<bool> {
        Ok(self.get_meta("docker_default")?.unwrap_or_default())
    }

    /// Stores whether the default network was created in a Docker engine.
    ///
    /// # Errors
    /// Returns [`StoreError::Write`] if the transaction fails.
    pub fn set_default_network(&self, created: bool) -> Result<()> {
        self.change(|change| {
            change
                .open_table(META)?
                .insert("docker_default", encode(&created).as_slice())
                .map(drop)?;
            Ok(())
        })
    }

    /// Returns the address that was allocated last, for
    /// [`overnode_core::ipam::Ipam::resume_after`].
    ///
    /// # Errors
    /// Returns [`StoreError::Damaged`] if the entry cannot be read.
    pub fn cursor(&self) -> Result<Option<IpAddr>> {
        self.get_meta("cursor")
    }

    /// Returns the stored facts of the address allocation.
    ///
    /// # Errors
    /// Returns [`StoreError::Damaged`] if they cannot be read.
    pub fn addresses(&self) -> Result<Vec<ipam::Fact>> {
        self.read_all(|read| match read.open_table(ADDRESSES) {
            Ok(table) => table.iter()?.map(|entry| Ok(entry?.1.value().to_vec())).collect(),
            // Databases of earlier versions do not have the table.
            Err(TableError::TableDoesNotExist(_)) => Ok(Vec::new()),
            Err(error) => Err(error.into()),
        })
    }

    /// Stores changes of the address allocation in one transaction.
    ///
    /// # Errors
    /// Returns [`StoreError::Write`] if the transaction fails.
    pub fn change_addresses(&self, changes: &[ipam::Change]) -> Result<()> {
        self.change(|change| {
            let mut table = change.open_table(ADDRESSES)?;
            for change in changes {
                match change {
                    ipam::Change::Put(fact) => {
                        table.insert(fact.key().to_string().as_str(), encode(fact).as_slice())?;
                    }
                    ipam::Change::Forget(key) => {
                        table.remove(key.to_string().as_str())?;
                    }
                }
            }
            Ok(())
        })
    }

    /// Returns the DNS names that users added.
    ///
    /// # Errors
    /// Returns [`StoreError::Damaged`] if they cannot be read.
    pub fn names(&self) -> Result<Vec<Named>> {
        Ok(self.get_meta("names")?.unwrap_or_default())
    }

    /// Replaces the DNS names that users added.
    ///
    /// # Errors
    /// Returns [`StoreError::Write`] if the transaction fails.
    pub fn set_names(&self, names: &[Named]) -> Result<()> {
        self.change(|change| {
            change.open_table(META)?.insert("names", encode(&names).as_slice())?;
            Ok(())
        })
    }

    /// Returns the stored records of other nodes, by ID.
    ///
    /// # Errors
    /// Returns [`StoreError::Damaged`] if they cannot be read.
    pub fn peers(&self) -> Result<Vec<Known>> {
        let entries: Vec<Vec<u8>> = self.read(|read| {
            let table = read.open_table(PEERS)?;
            table.iter()?.map(|entry| Ok(entry?.1.value().to_vec())).collect()
        })?;
        let decode = |bytes: &Vec<u8>| {
            postcard::from_bytes(bytes).map_err(|why| self.damaged(why.to_string()))
        };
        entries.iter().map(decode).collect()
    }

    /// Stores records of other nodes in one transaction. They are not JSON, which takes several
    /// times the space: malicious members could use that to fill the disk.
    ///
    /// # Errors
    /// Returns [`StoreError::Write`] if the transaction fails.
    pub fn set_peers(&self, peers: &[Known]) -> Result<()> {
        self.change(|change| {
            let mut table = change.open_table(PEERS)?;
            for known in peers {
                let bytes = postcard::to_allocvec(known).expect("plain data always encodes");
                table.insert(known.record.id.get(), bytes.as_slice())?;
            }
            Ok(())
        })
    }

    /// Removes the record of a node.
    ///
    /// # Errors
    /// Returns [`StoreError::Write`] if the transaction fails.
    pub fn remove_peer(&self, id: NodeId) -> Result<()> {
        self.change(|change| {
            change.open_table(PEERS)?.remove(id.get()).map(drop).map_err(Into::into)
        })
    }

    /// Returns the external WireGuard peers, by index.
    ///
    /// # Errors
    /// Returns [`StoreError::Damaged`] if they cannot be read.
    pub fn external_peers(&self) -> Result<Vec<ExternalPeer>> {
        let peers: Vec<record::PublicExternalPeer> = self.read_all(|read| {
            let table = read.open_table(EXTERNAL)?;
            table.iter()?.map(|entry| Ok(entry?.1.value().to_vec())).collect()
        })?;
        peers
            .into_iter()
            .map(|peer| {
                let secret = self.read_secret(&external_secret(peer.index))?;
                Ok(ExternalPeer::join(peer, secret))
            })
            .collect()
    }

    /// Stores an external WireGuard peer, replacing an existing one with the same index.
    ///
    /// # Errors
    /// Returns [`StoreError::Write`] if the transaction fails.
    pub fn set_external_peer(&self, peer: &ExternalPeer) -> Result<()> {
        self.change(|change| {
            change.open_table(EXTERNAL)?.insert(peer.index.0, encode(&peer.public()).as_slice())?;
            let mut secrets = change.open_table(SECRETS)?;
            let name = external_secret(peer.index);
            match &peer.preshared_key {
                Some(secret) => secrets.insert(name.as_str(), secret.0.as_slice())?,
                None => secrets.remove(name.as_str())?,
            };
            Ok(())
        })
    }

    /// Removes an external WireGuard peer. Returns true if there was one.
    ///
    /// # Errors
    /// Returns [`StoreError::Write`] if the transaction fails.
    pub fn remove_external_peer(&self, index: PeerIndex) -> Result<bool> {
        let mut existed = false;
        self.change(|change| {
            existed = change.open_table(EXTERNAL)?.remove(index.0)?.is_some();
            change.open_table(SECRETS)?.remove(external_secret(index).as_str())?;
            Ok(())
        })?;
        Ok(existed)
    }

    /// Counts a start of the daemon. Returns the node's new incarnation, which exceeds all previous
    /// ones, or `None` before the first launch.
    ///
    /// # Errors
    /// Returns [`StoreError::Damaged`] if the identity cannot be read, and [`StoreError::Write`] if
    /// the transaction fails.
    pub fn next_incarnation(&self) -> Result<Option<u64>> {
        let Some(mut identity) = self.identity()? else { return Ok(None) };
        identity.incarnation += 1;
        self.set_incarnation(identity.incarnation)?;
        Ok(Some(identity.incarnation))
    }

    /// Stores the node's incarnation, for when gossip has to raise it.
    ///
    /// # Errors
    /// Returns [`StoreError::Damaged`] if the identity cannot be read, and [`StoreError::Write`] if
    /// the transaction fails.
    pub fn set_incarnation(&self, incarnation: u64) -> Result<()> {
        let Some(mut identity) = self.identity()? else { return Ok(()) };
        identity.incarnation = incarnation;
        self.set_identity(&identity, None)
    }

    /// Closes the store and removes the database, the lock and, if it is then empty, the directory.
    ///
    /// # Errors
    /// Returns [`StoreError::Io`] if a file cannot be removed.
    pub fn destroy(self) -> Result<()> {
        let Self { directory, database, _lock: lock } = self;
        drop(database);
        disk::remove(&directory, &[DATABASE, LOCK])?;
        drop(lock);
        Ok(())
    }

    /// Removes the state in `directory`, even if it cannot be read. Does nothing if there is none.
    ///
    /// # Errors
    /// Returns [`StoreError::Locked`] if a daemon uses it, or else [`StoreError::Untrusted`] or
    /// [`StoreError::Io`].
    pub fn wipe(directory: &Path) -> Result<()> {
        if !directory.join(DATABASE).exists() && !directory.join(LOCK).exists() {
            return Ok(());
        }
        trust::check_path(directory)?;
        let lock = disk::lock(directory)?;
        disk::remove(directory, &[DATABASE, LOCK])?;
        drop(lock);
        Ok(())
    }

    fn check_schema(&self) -> Result<()> {
        let is_new = self.read(|read| Ok(read.list_tables()?.next().is_none()))?;
        if is_new {
            return self.change(|change| {
                change.open_table(META)?.insert("schema", encode(&SCHEMA).as_slice())?;
                change.open_table(SECRETS)?;
                change.open_table(TARGETS)?;
                change.open_table(ATTACHMENTS)?;
                change.open_table(ADDRESSES)?;
                change.open_table(PEERS)?;
                change.open_table(EXTERNAL)?;
                Ok(())
            });
        }
        let found: Option<serde_json::Value> = self.get_meta("schema").unwrap_or_default();
        match found {
            Some(found) if found == SCHEMA => Ok(()),
            Some(found) => {
                Err(StoreError::Schema { path: self.directory.clone(), found: reason(&found) })
            }
            None => {
                Err(StoreError::Schema { path: self.directory.clone(), found: "unknown".into() })
            }
        }
    }

    fn get_meta<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        let bytes = self.read(|read| {
            Ok(read.open_table(META)?.get(name)?.map(|value| value.value().to_vec()))
        })?;
        bytes.map(|bytes| self.decode(&bytes)).transpose()
    }

    fn read_secret(&self, name: &str) -> Result<Option<Secret>> {
        let secret = self.read(|read| {
            let table = read.open_table(SECRETS)?;
            Ok(table.get(name)?.map(|value| value.value().try_into().map(Secret)))
        })?;
        secret.transpose().map_err(|_| self.damaged(format!("the {name} has the wrong length")))
    }

    fn read_all<T: DeserializeOwned>(
        &self,
        query: impl FnOnce(&redb::ReadTransaction) -> Rows,
    ) -> Result<Vec<T>> {
        self.read(query)?.iter().map(|bytes| self.decode(bytes)).collect()
    }

    fn read<T>(
        &self,
        query: impl FnOnce(&redb::ReadTransaction) -> std::result::Result<T, redb::Error>,
    ) -> Result<T> {
        let outcome = self.with_database(|database| query(&database.begin_read()?))?;
        outcome.map_err(|why| self.damaged(why.to_string()))
    }

    fn change(
        &self,
        change: impl FnOnce(&WriteTransaction) -> std::result::Result<(), redb::Error>,
    ) -> Result<()> {
        let outcome = self.with_database(|database| {
            let transaction = database.begin_write()?;
            change(&transaction)?;
            Ok(transaction.commit()?)
        })?;
        outcome
            .map_err(|why| StoreError::Write { path: self.directory.clone(), why: why.to_string() })
    }

    /// Runs a closure on the database. After an I/O error, redb refuses all further operations
    /// until the database is reopened, so this reopens it. That restores the last committed state.
    fn with_database<T>(
        &self,
        operation: impl FnOnce(&Database) -> std::result::Result<T, redb::Error>,
    ) -> Result<std::result::Result<T, redb::Error>> {
        let mut database = self.database.lock().unwrap_or_else(PoisonError::into_inner);
        let opened = match &mut *database {
            Some(opened) => opened,
            closed => closed.insert(open_database(&self.directory)?),
        };
        let outcome = operation(opened);
        if let Err(redb::Error::Io(_) | redb::Error::PreviousIo) = outcome {
            // Close the old handle first: redb allows only one per file.
            *database = None;
            *database = open_database(&self.directory).ok();
        }
        Ok(outcome)
    }

    fn decode<T: DeserializeOwned>(&self, bytes: &[u8]) -> Result<T> {
        serde_json::from_slice(bytes).map_err(|why| self.damaged(why.to_string()))
    }

    fn damaged(&self, why: String) -> StoreError {
        // The message may quote untrusted bytes.
        StoreError::Damaged { path: self.directory.clone(), why: reason(&why) }
    }
}

fn open_database(directory: &Path) -> Result<Database> {
    let path = directory.join(DATABASE);
    disk::retry_while_locked(|| {
        Database::builder()
            .set_cache_size(CACHE_BYTES)
            .set_check_integrity_on_open(true)
            .create(&path)
            .map_err(|why| disk::open_error(directory, &path, why))
    })
}

/// Encodes a value as JSON, which is readable and lets fields be added without a new layout
/// version. Records are in postcard and signed, so this does not hold for them.
fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("plain data always encodes")
}

fn replace_targets(
    change: &WriteTransaction,
    targets: &[String],
) -> std::result::Result<(), redb::Error> {
    let mut table = change.open_table(TARGETS)?;
    table.retain(|_, _| false)?;
    for (position, target) in (0..).zip(targets) {
        table.insert(position, target.as_str())?;
    }
    Ok(())
}

fn external_secret(index: PeerIndex) -> String {
    format!("external peer {index}")
}
