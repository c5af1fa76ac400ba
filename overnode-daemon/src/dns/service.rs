//! Turns queries into answers, both as bytes.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hickory_proto::op::{Edns, Message, MessageType, Metadata, ResponseCode};
use hickory_proto::serialize::binary::{BinEncodable as _, BinEncoder};

use super::engine;
use super::upstream::{Flags, Upstream};
use crate::datapath::NetnsRef;
use overnode_core::docker::report::EngineNames;
use overnode_core::names::directory::{Answer, Directory, Verdict};

/// Maximum number of questions that wait for upstream resolvers.
const MAX_PENDING: usize = 512;
/// Maximum number of such questions from one container.
const MAX_PENDING_OF_ONE: usize = 64;
/// Maximum number of questions of one container that wait for its engine's resolver. Each takes a
/// thread for a moment.
const MAX_AT_ENGINE_OF_ONE: usize = 16;
/// How long a question waits for the names that the engine answers, and how often it looks.
const KNOWN_WITHIN: Duration = Duration::from_millis(1500);
const KNOWN_POLL: Duration = Duration::from_millis(20);
/// Longest UDP answer, in bytes. It fits into one packet on any path.
const MAX_UDP_BYTES: u16 = 1232;
/// Longest UDP answer for a client that does not announce a size (RFC 1035), in bytes.
const MIN_UDP_BYTES: u16 = 512;
pub(super) const HEADER_LEN: usize = 12;
/// Bits of the fourth byte of a header that hold the response code.
const CODE_BITS: u8 = 0x0f;

/// The transport on which a query arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// In a UDP datagram.
    Udp,
    /// On a TCP connection.
    Tcp,
}

/// The server that a query was sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entrance {
    /// The container asked the node. Other names are asked from the host's resolvers.
    Node,
    /// The container asked its engine's resolver, and programs redirected the query. Other names
    /// are asked from the engine's resolver.
    Engine,
}

/// A container whose engine has a resolver of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Client {
    /// Its network namespace.
    pub netns: NetnsRef,
    /// The names that the engine's resolver answers. `None` if they are not known yet.
    pub engine_names: Option<EngineNames>,
}

/// The side that answers a name of one label to a container whose engine has a resolver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Responsible {
    /// The cluster, if it has the name, or else the engine.
    Cluster,
    /// The engine.
    Engine,
    /// The engine, or else the cluster: the engine may know the name.
    EngineFirst,
    /// It is not known yet.
    Unknown,
}

/// What to do with a query.
pub enum Step {
    /// Do nothing: it is not a query.
    Ignore,
    /// Send this answer.
    Send(Vec<u8>),
    /// Ask the upstream resolvers with [`Service::finish`].
    Ask(Box<Pending>),
}

/// A query that waits for the upstream resolvers.
pub struct Pending {
    query: Message,
    transport: Transport,
    /// The query's bytes, for the engine's resolver. `None` asks the host's resolvers.
    engine: Option<Vec<u8>>,
    from: IpAddr,
    /// Whether "no such name" would not be the truth: a node that cannot be reached has announced
    /// this name, or not all names are known yet.
    is_in_doubt: bool,
    _permit: Permit,
}

/// Counts of queries since the daemon started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// All queries that could be parsed.
    pub queries: u64,
    /// Queries that were forwarded upstream.
    pub forwarded: u64,
    /// Forwarded queries that failed.
    pub failed: u64,
    /// Queries that were refused: malformed, not permitted, or too many at a time.
    pub refused: u64,
}

/// Answers queries.
pub struct Service {
    directory: Mutex<Directory>,
    clients: Mutex<BTreeMap<IpAddr, Client>>,
    upstream: Upstream,
    pending: Quota,
    pending_at_engine: Quota,
    queries: AtomicU64,
    forwarded: AtomicU64,
    failed: AtomicU64,
    refused: AtomicU64,
}

impl Service {
    /// Creates a service with these names and with these resolvers for all other names.
    pub fn new(directory: Directory, upstream: Upstream) -> Self {
        Self {
            directory: Mutex::new(directory),
            clients: Mutex::default(),
            upstream,
            pending: Quota::new(MAX_PENDING, MAX_PENDING_OF_ONE),
            pending_at_engine: Quota::new(MAX_PENDING, MAX_AT_ENGINE_OF_ONE),
            queries: AtomicU64::new(0),
            forwarded: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        }
    }

    /// Locks the names.
    pub fn directory(&self) -> MutexGuard<'_, Directory> {
        self.directory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the containers whose engines have resolvers of their own, by address.
    pub fn set_clients(&self, clients: BTreeMap<IpAddr, Client>) {
        *self.clients.lock().unwrap_or_else(PoisonError::into_inner) = clients;
    }

    /// Returns the upstream resolvers.
    pub fn upstream(&self) -> &Upstream {
        &self.upstream
    }

    /// Returns the counts so far.
    pub fn counts(&self) -> Counts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            queries: read(&self.queries),
            forwarded: read(&self.forwarded),
            failed: read(&self.failed),
            refused: read(&self.refused),
        }
    }

    /// Handles a query from a container.
    pub fn begin(
        &self,
        bytes: &[u8],
        from: IpAddr,
        transport: Transport,
        entrance: Entrance,
    ) -> Step {
        let Some(header) = bytes.first_chunk::<HEADER_LEN>() else { return Step::Ignore };
        // Answering an answer could loop forever.
        if header[2] & 0x80 != 0 {
            return Step::Ignore;
        }
        let query = match read(header, bytes) {
            Ok(query) => query,
            Err(code) => return self.refuse(header, code),
        };
        self.queries.fetch_add(1, Ordering::Relaxed);
        if query.edns.as_ref().is_some_and(|edns| edns.version() != 0) {
            return Step::Send(encode(reply_to(&query, ResponseCode::BADVERS), &query, transport));
        }
        let Some(question) = query.queries.first() else {
            return self.refuse(header, ResponseCode::FormErr);
        };
        let bare = Directory::bare_name(question);
        let responsible = match entrance {
            Entrance::Node => Responsible::Cluster,
            Entrance::Engine => self.responsible(from, bare.as_deref()),
        };
        let mut directory = self.directory();
        let mut verdict = directory.ask(question);
        let is_in_doubt = bare.is_some_and(|name| directory.is_in_doubt(&name));
        drop(directory);
        if responsible != Responsible::Cluster {
            verdict = Verdict::Upstream;
        }
        match verdict {
            Verdict::Answer(answer) => Step::Send(self.answer(&query, answer, transport)),
            Verdict::Upstream => {
                let quota = match entrance {
                    Entrance::Node => &self.pending,
                    Entrance::Engine => &self.pending_at_engine,
                };
                match quota.acquire(from).filter(|_| query.metadata.recursion_desired) {
                    Some(_permit) => {
                        let engine = (entrance == Entrance::Engine).then(|| bytes.to_vec());
                        let pending =
                            Pending { query, transport, engine, from, is_in_doubt, _permit };
                        Step::Ask(Box::new(pending))
                    }
                    None => self.refuse(header, ResponseCode::Refused),
                }
            }
        }
    }

    /// Asks the upstream resolvers and returns the answer.
    pub async fn finish(&self, pending: Box<Pending>) -> Vec<u8> {
        self.forwarded.fetch_add(1, Ordering::Relaxed);
        if let Some(bytes) = &pending.engine {
            return self.finish_at_engine(bytes, &pending).await;
        }
        let query = &pending.query;
        let flags = Flags {
            dnssec_ok: query.edns.as_ref().is_some_and(|edns| edns.flags().dnssec_ok),
            checking_disabled: query.metadata.checking_disabled,
        };
        let question = query.queries.first().cloned().unwrap_or_default();
        let found = self.upstream.ask(question, flags).await;
        self.conclude(pending, found)
    }

    /// Asks the resolver of the container's engine, or answers for the cluster after all.
    async fn finish_at_engine(&self, bytes: &[u8], pending: &Pending) -> Vec<u8> {
        let question = pending.query.queries.first().cloned().unwrap_or_default();
        let bare = Directory::bare_name(&question);
        // A container that has just started is in the engine's next report.
        let deadline = Instant::now() + KNOWN_WITHIN;
        let mut responsible = self.responsible(pending.from, bare.as_deref());
        while responsible == Responsible::Unknown && Instant::now() < deadline {
            tokio::time::sleep(KNOWN_POLL).await;
            responsible = self.responsible(pending.from, bare.as_deref());
        }
        let of_cluster = || match self.directory().ask(&question) {
            Verdict::Answer(answer) if bare.is_some() => {
                Some(self.answer(&pending.query, answer, pending.transport))
            }
            Verdict::Answer(_) | Verdict::Upstream => None,
        };
        if responsible == Responsible::Cluster
            && let Some(answer) = of_cluster()
        {
            return answer;
        }
        let netns = self.client(pending.from).map(|client| client.netns);
        let answered = match &netns {
            Some(netns) => engine::ask(netns, bytes, pending.transport).await,
            None => Err(anyhow::anyhow!("the container is not known")),
        };
        let is_no_answer = |answer: &Vec<u8>| code_of(answer) != ResponseCode::NoError.low();
        if responsible != Responsible::Engine
            && answered.as_ref().map_or(true, is_no_answer)
            && let Some(answer) = of_cluster()
        {
            return answer;
        }
        match answered {
            Ok(answer) => doubt(answer, pending.is_in_doubt),
            Err(error) => {
                tracing::debug!(
                    "the engine's resolver of {} does not answer: {error:#}",
                    pending.from
                );
                self.failed.fetch_add(1, Ordering::Relaxed);
                let reply = reply_to(&pending.query, ResponseCode::ServFail);
                encode(reply, &pending.query, pending.transport)
            }
        }
    }

    /// Returns who answers a question of a container to its engine's resolver.
    fn responsible(&self, from: IpAddr, bare: Option<&str>) -> Responsible {
        // Only names of one label can be the engine's as well as ours.
        let Some(name) = bare else { return Responsible::Cluster };
        let clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        match clients.get(&from).and_then(|client| client.engine_names.as_ref()) {
            None => Responsible::Unknown,
            Some(names) if names.contains(name) => Responsible::Engine,
            Some(names) if names.is_open => Responsible::EngineFirst,
            Some(_) => Responsible::Cluster,
        }
    }

    fn client(&self, from: IpAddr) -> Option<Client> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner).get(&from).cloned()
    }

    fn answer(&self, query: &Message, answer: Answer, transport: Transport) -> Vec<u8> {
        let mut reply = reply_to(query, answer.code);
        reply.metadata.authoritative = answer.code != ResponseCode::Refused;
        reply.answers = answer.records;
        reply.authorities.extend(answer.soa.map(|soa| *soa));
        encode(reply, query, transport)
    }

    /// Returns the answer, given the upstream reply or the code to answer with.
    pub fn conclude(&self, pending: Box<Pending>, found: Result<Message, ResponseCode>) -> Vec<u8> {
        let Pending { query, transport, is_in_doubt, .. } = *pending;
        let reply = match found {
            Ok(found) => {
                let mut reply = reply_to(&query, found.metadata.response_code);
                reply.metadata.authentic_data = found.metadata.authentic_data;
                // Upstream resolvers have no authority over our names.
                let directory = self.directory();
                let may = |record: &hickory_proto::rr::Record| !directory.owns(&record.name);
                reply.answers = found.answers.into_iter().filter(may).collect();
                reply.authorities = found.authorities.into_iter().filter(may).collect();
                reply.additionals = found.additionals.into_iter().filter(may).collect();
                reply
            }
            Err(code) => {
                self.failed.fetch_add(1, Ordering::Relaxed);
                reply_to(&query, code)
            }
        };
        doubt(encode(reply, &query, transport), is_in_doubt)
    }

    fn refuse(&self, header: &[u8; HEADER_LEN], code: ResponseCode) -> Step {
        self.refused.fetch_add(1, Ordering::Relaxed);
        Step::Send(header_only(header, code))
    }
}

/// Turns "no such name" into "server failure" if the name is in doubt.
fn doubt(mut answer: Vec<u8>, is_in_doubt: bool) -> Vec<u8> {
    let is_denied = code_of(&answer) == ResponseCode::NXDomain.low();
    if let Some(code) = answer.get_mut(3)
        && is_in_doubt
        && is_denied
    {
        *code = *code & !CODE_BITS | ResponseCode::ServFail.low();
    }
    answer
}

/// Returns the response code of an answer.
fn code_of(answer: &[u8]) -> u8 {
    answer.get(3).map_or(ResponseCode::ServFail.low(), |byte| byte & CODE_BITS)
}

/// Parses a query with one question.
fn read(header: &[u8; HEADER_LEN], bytes: &[u8]) -> Result<Message, ResponseCode> {
    let [_, _, flags, _, questions @ .., _, _, _, _, _, _] = header;
    let counts = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
    if flags & 0x78 != 0 {
        return Err(ResponseCode::NotImp);
    }
    // Check the counts before parsing: they may announce more records than there are.
    if *questions != [0, 1] || counts(6) != 0 || counts(8) != 0 || counts(10) > 2 {
        return Err(ResponseCode::FormErr);
    }
    let message = Message::from_vec(bytes).map_err(|_| ResponseCode::FormErr)?;
    if message.metadata.message_type != MessageType::Query || message.queries.len() != 1 {
        return Err(ResponseCode::FormErr);
    }
    Ok(message)
}

fn reply_to(query: &Message, code: ResponseCode) -> Message {
    let mut reply = Message::response(query.metadata.id, query.metadata.op_code);
    reply.metadata = Metadata::response_from_request(&query.metadata);
    reply.metadata.recursion_available = true;
    reply.metadata.response_code = code;
    reply.queries.clone_from(&query.queries);
    if let Some(asked) = &query.edns {
        let mut edns = Edns::new();
        edns.set_max_payload(MAX_UDP_BYTES);
        edns.set_version(0);
        edns.set_dnssec_ok(asked.flags().dnssec_ok);
        reply.set_edns(edns);
    }
    reply
}

/// Encodes a reply. Records that do not fit are omitted, and the reply is marked as truncated.
fn encode(reply: Message, query: &Message, transport: Transport) -> Vec<u8> {
    let max = match (transport, &query.edns) {
        (Transport::Tcp, _) => u16::MAX,
        (Transport::Udp, Some(edns)) => edns.max_payload().clamp(MIN_UDP_BYTES, MAX_UDP_BYTES),
        (Transport::Udp, None) => MIN_UDP_BYTES,
    };
    let mut bytes = Vec::with_capacity(MIN_UDP_BYTES.into());
    let mut encoder = BinEncoder::new(&mut bytes);
    encoder.set_max_size(max);
    match reply.emit(&mut encoder) {
        Ok(()) => bytes,
        Err(error) => {
            tracing::debug!("a DNS answer could not be encoded: {error}");
            let [high, low] = query.metadata.id.to_be_bytes();
            header_only(&[high, low, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], ResponseCode::ServFail)
        }
    }
}

/// Returns a bare header that answers a query which could not be parsed or is refused.
fn header_only(header: &[u8; HEADER_LEN], code: ResponseCode) -> Vec<u8> {
    // QR set; opcode and RD copied from the query; RA set.
    vec![header[0], header[1], 0x80 | header[2] & 0x79, 0x80 | code.low(), 0, 0, 0, 0, 0, 0, 0, 0]
}

/// A limit on concurrent use of a resource, in total and per container.
#[derive(Clone, Debug)]
pub(super) struct Quota {
    max: usize,
    max_of_one: usize,
    taken: Arc<Mutex<BTreeMap<IpAddr, usize>>>,
}

/// A unit of a [`Quota`]. Dropping it returns the unit.
pub(super) struct Permit {
    of: IpAddr,
    quota: Quota,
}

impl Quota {
    pub(super) fn new(max: usize, max_of_one: usize) -> Self {
        Self { max, max_of_one, taken: Arc::default() }
    }

    pub(super) fn acquire(&self, of: IpAddr) -> Option<Permit> {
        let mut taken = self.lock();
        let all: usize = taken.values().sum();
        let own = taken.get(&of).copied().unwrap_or(0);
        if all >= self.max || own >= self.max_of_one {
            return None;
        }
        taken.insert(of, own + 1);
        drop(taken);
        Some(Permit { of, quota: self.clone() })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<IpAddr, usize>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut taken = self.quota.lock();
        if let Some(count) = taken.get_mut(&self.of) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.of);
            }
        }
    }
}

#[cfg(test)]
mod tests;
