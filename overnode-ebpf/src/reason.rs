//! Reasons why packets were dropped, and other outcomes. All programs count packets under these
//! codes, per CPU.

macro_rules! reasons {
    ($(
        $(#[doc = $doc:literal])+
        $name:ident = $code:literal, $text:literal $(, $flag:ident)*;
    )+) => {
        /// A code of the `COUNTERS` map. Codes are never reused for another meaning.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u32)]
        pub enum Reason { $($(#[doc = $doc])+ $name = $code),+ }

        impl Reason {
            /// All reasons, in the order of their codes.
            pub const ALL: &[Self] = &[$(Self::$name),+];

            /// Returns the name in `status`, `inspect` and the metrics.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text),+ }
            }

            /// Returns the description for operators, a sentence.
            pub const fn describe(self) -> &'static str {
                match self { $(Self::$name => concat!($($doc),+)),+ }
            }

            const fn flags(self) -> Flags {
                match self {
                    $(Self::$name => {
                        #[allow(unused_mut, reason = "some reasons have no flag")]
                        let mut flags = Flags::NONE;
                        $(flags.$flag = true;)*
                        flags
                    }),+
                }
            }
        }
    };
}

/// What else is known of a reason.
#[derive(Clone, Copy)]
struct Flags {
    /// The packet is dropped.
    drop: bool,
    /// A program for the underlay gives this reason only after it has authenticated the message.
    opened: bool,
    /// Bulk workers drop packets for this reason.
    worker: bool,
}

impl Flags {
    const NONE: Self = Self { drop: false, opened: false, worker: false };
}

impl Reason {
    /// Returns true if the packet was dropped.
    pub const fn is_drop(self) -> bool {
        self.flags().drop
    }

    /// Returns true if a program for the underlay has authenticated the message before it gives
    /// this reason, so that the recorded packet is the plaintext.
    pub const fn is_opened(self) -> bool {
        self.flags().opened
    }

    /// Returns true if bulk workers drop packets for this reason.
    pub const fn is_of_workers(self) -> bool {
        self.flags().worker
    }
}

reasons! {
    /// Sealed and sent to a peer.
    Sealed = 0, "sealed";
    /// Received from a peer, opened and delivered.
    Opened = 1, "opened";
    /// Delivered from one container of this host to another, or to or from the host itself.
    Local = 2, "local";
    /// ARP request, answered.
    Arp = 3, "arp";
    /// Keepalive (empty message) received from a peer.
    KeepaliveReceived = 4, "keepalive-received";
    /// Keepalive (empty message) sent to a peer.
    KeepaliveSent = 5, "keepalive-sent";
    /// Too large for the path to the peer; answered with ICMP "fragmentation needed".
    TooBig = 6, "too-big";
    /// Message between two other nodes, relayed.
    Relayed = 7, "relayed";
    /// Path probe received from a peer.
    ProbeReceived = 8, "probe-received";
    /// Path probe sent to a peer.
    ProbeSent = 9, "probe-sent";
    /// Handed to a bulk worker: several segments at once, or part of a bulk flow.
    BulkSent = 10, "bulk-sent";
    /// Received by a bulk worker and delivered, possibly several segments at once.
    BulkReceived = 11, "bulk-received";
    /// Bulk message put into the receive ring of a worker, bypassing the kernel's UDP.
    BulkQueued = 12, "bulk-queued";

    /// Neither unicast IPv4 nor ARP: containers may not use other protocols, broadcast or
    /// multicast.
    Unsupported = 16, "unsupported", drop, worker;
    /// Shorter than its headers claim, or with impossible headers.
    Malformed = 17, "malformed", drop, worker;
    /// A container used a source IP or MAC address that is not its own.
    Spoofed = 18, "spoofed", drop, worker;
    /// No known node owns the destination. Answered with ICMP "host unreachable" at a limited rate.
    NoRoute = 19, "no-route", drop, worker;
    /// There is no session with the peer yet.
    NoSession = 20, "no-session", drop, worker;
    /// The session with the peer has expired.
    Expired = 21, "expired", drop, worker;
    /// The session has used up its message counters.
    Exhausted = 22, "exhausted", drop, worker;
    /// A packet still to be segmented where only complete packets are accepted; never sealed.
    Offload = 23, "offload", drop;
    /// A kernel helper failed, usually for lack of memory.
    Helper = 24, "helper", drop, worker;
    /// No session has the message's receiver index.
    UnknownIndex = 25, "unknown-index", drop, worker;
    /// The message was received before (replay).
    Replayed = 26, "replayed", drop, worker;
    /// The message is older than the replay window.
    TooOld = 27, "too-old", drop, worker;
    /// The message's authentication tag is wrong.
    Forged = 28, "forged", drop, worker;
    /// A peer used a source address that another node owns.
    ForeignSource = 29, "foreign-source", drop, opened;
    /// The destination is not attached to this host. A container of this host gets ICMP "host
    /// unreachable" as an answer, at a limited rate.
    NotHere = 30, "not-here", drop, opened;
    /// The underlay marked congestion, but the inner packet does not support ECN (RFC 6040).
    Congestion = 31, "congestion", drop, opened, worker;
    /// The message was fragmented or had IP options.
    Fragment = 32, "fragment", drop;
    /// Arrived on an interface that the daemon has not configured.
    Unconfigured = 33, "unconfigured", drop;
    /// A message has passed too many relays, probably in a loop. The TTL of the packet inside does
    /// not matter.
    HopLimit = 34, "hop-limit", drop;
    /// A relayed message did not come from the address of the node named as its previous hop: nodes
    /// relay only for nodes of the cluster.
    ForeignRelay = 35, "foreign-relay", drop;
    /// A relayed message would return to the node that it came from.
    RelayLoop = 36, "relay-loop", drop;
    /// The receive ring of the message's bulk worker was full: messages arrive faster than the
    /// worker opens them.
    RingFull = 37, "ring-full", drop;
    /// Completing a partial checksum would change headers that were already checked.
    Checksum = 38, "checksum", drop, opened, worker;
    /// Sent by something other than a node to or from an address reserved for nodes.
    NodeAddress = 39, "node-address", drop, opened;
    /// More probes from one peer than nodes send; dropped to leave room for other peers' probes.
    ProbeFlood = 40, "probe-flood", drop, opened;
    /// A handshake message whose sender does not know this node's public key.
    Stranger = 41, "stranger", drop;
    /// More cookie replies than nodes send; their sender cannot be verified here.
    CookieFlood = 42, "cookie-flood", drop;
    /// Larger than the path to the peer takes, and not answered: ICMP errors and later fragments
    /// get no answer, and the path may have become narrower on the way.
    TooBigDropped = 43, "too-big-dropped", drop, worker;
    /// Sent by a process of this host straight into the interface of a container.
    FromHost = 44, "from-host", drop;
}

/// Entries of the `COUNTERS` map. Leaves room for the codes of later versions.
pub const REASON_SLOTS: u32 = 64;
