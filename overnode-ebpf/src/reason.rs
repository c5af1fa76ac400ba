//! Why a packet was refused, or what became of it. Every program counts under one of these codes,
//! per CPU.

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $code:literal, $text:literal;)+) => {
        /// A code of the `COUNTERS` map. Codes are never reused for another meaning.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u32)]
        pub enum Reason { $($(#[doc = $doc])+ $name = $code),+ }

        impl Reason {
            /// Every code, in the order of their numbers.
            pub const ALL: &[Self] = &[$(Self::$name),+];

            /// The name that `status`, `inspect` and the metrics print.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text),+ }
            }

            /// Whether the packet was dropped.
            pub const fn is_drop(self) -> bool {
                self as u32 >= FIRST_DROP
            }

            /// What the code means, in a sentence for people.
            pub const fn describe(self) -> &'static str {
                match self { $(Self::$name => concat!($($doc),+)),+ }
            }
        }
    };
}

reasons! {
    /// Sealed and sent to a peer.
    Sealed = 0, "sealed";
    /// Received from a peer, opened and delivered.
    Opened = 1, "opened";
    /// Handed from one container of this host to another.
    Local = 2, "local";
    /// An ARP request answered.
    Arp = 3, "arp";
    /// An empty message (keepalive) received from a peer.
    KeepaliveReceived = 4, "keepalive-received";
    /// An empty message (keepalive) sent to a peer.
    KeepaliveSent = 5, "keepalive-sent";
    /// Answered with ICMP "fragmentation needed": larger than the path to that peer takes.
    TooBig = 6, "too-big";
    /// A message between two other nodes, passed on.
    Relayed = 7, "relayed";
    /// A probe of a path, received from a peer.
    ProbeReceived = 8, "probe-received";
    /// A probe of a path, sent to a peer.
    ProbeSent = 9, "probe-sent";
    /// Handed to a worker of the bulk path: many segments at once, or one of a flow that sends
    /// such.
    BulkSent = 10, "bulk-sent";
    /// Received by a worker of the bulk path and delivered, several segments at once perhaps.
    BulkReceived = 11, "bulk-received";
    /// A message of the bulk path, put into the inbox of a worker past the kernel's UDP.
    BulkQueued = 12, "bulk-queued";

    /// Not a protocol that containers may use here: neither IPv4 nor ARP, or broadcast, or
    /// multicast.
    Unsupported = 16, "unsupported";
    /// Shorter than its own headers say, or with impossible headers.
    Malformed = 17, "malformed";
    /// A container sent from an address, or a hardware address, that is not its own.
    Spoofed = 18, "spoofed";
    /// No node is known to own the destination.
    NoRoute = 19, "no-route";
    /// No session with that peer yet.
    NoSession = 20, "no-session";
    /// The session with that peer is too old to be used.
    Expired = 21, "expired";
    /// The session has used up its message counter.
    Exhausted = 22, "exhausted";
    /// Offloads that were not finished arrived where only finished packets may: never sealed.
    Offload = 23, "offload";
    /// A helper of the kernel refused (out of memory, mostly).
    Helper = 24, "helper";
    /// A message for a receiver index that no session has.
    UnknownIndex = 25, "unknown-index";
    /// A message seen before.
    Replayed = 26, "replayed";
    /// A message older than the replay window.
    TooOld = 27, "too-old";
    /// A message whose tag is wrong.
    Forged = 28, "forged";
    /// A peer sent from an address that another node owns.
    ForeignSource = 29, "foreign-source";
    /// A peer sent to an address that is not attached here.
    NotHere = 30, "not-here";
    /// The underlay marked congestion on a packet whose sender cannot be told (RFC 6040).
    Congestion = 31, "congestion";
    /// A message that arrived as a fragment, or with IP options.
    Fragment = 32, "fragment";
    /// Arrived at an interface that no program was told about.
    Unconfigured = 33, "unconfigured";
    /// A relayed message that has taken too many hops: it would travel in a loop.
    HopLimit = 34, "hop-limit";
    /// A relayed message that did not come from where the node is that it names as the last one:
    /// only nodes of the cluster are relayed for.
    ForeignRelay = 35, "foreign-relay";
    /// A relayed message that would have to go back to where it came from.
    RelayLoop = 36, "relay-loop";
    /// A message of the bulk path for which its worker's inbox had no room: more comes than the
    /// worker opens.
    InboxFull = 37, "inbox-full";
    /// A checksum was left unfinished at a place where finishing it changes the headers that were
    /// checked.
    Checksum = 38, "checksum";
    /// Sent to or from an address that is kept for the nodes themselves, by anything but a node.
    NodeAddress = 39, "node-address";
    /// More probes from a peer than nodes send: others' have to find room.
    ProbeFlood = 40, "probe-flood";
    /// A handshake message whose sender does not know this node's public key.
    Stranger = 41, "stranger";
    /// More cookie replies than nodes send: nothing in them proves their sender.
    CookieFlood = 42, "cookie-flood";
}

/// Codes from here on mean that the packet was dropped.
pub const FIRST_DROP: u32 = 16;

/// Entries of the `COUNTERS` map: room for codes of later versions.
pub const REASON_SLOTS: u32 = 64;
