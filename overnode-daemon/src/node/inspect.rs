//! Reports the whole state of the node for `inspect`. `docs/reference/inspect.md` describes the
//! document.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::view::View;
use crate::api::ApiError;
use overnode_core::gossip::Record;

impl View<'_> {
    /// Returns the whole state of the node. Secret types have no JSON form, so the document cannot
    /// contain a secret.
    pub(super) fn inspect(&self, now: Instant) -> Result<Value, ApiError> {
        let status = self.status(now)?;
        let counters = self.data.handshakes.counters().plus(self.arrivals.counters());
        let handshakes: serde_json::Map<_, _> =
            counters.named().map(|(name, count)| (name.to_owned(), count.into())).collect();
        let records: Vec<&Record> = self.control.gossip.records().collect();
        let routes: Vec<_> = self
            .data
            .peers()
            .iter()
            .map(|(index, peer)| json!({ "peer": index, "prefixes": peer.routes }))
            .collect();
        Ok(json!({
            "status": status,
            "incarnation": self.control.incarnation(),
            "records": records,
            "routes": routes,
            "data": {
                "peers": self.inspect_sessions(now),
                "underlay": self.data.datapath.underlay(),
            },
            "paths": self.inspect_paths(now),
            "allocation": self.inspect_allocation(),
            "handshakes": handshakes,
        }))
    }

    fn inspect_sessions(&self, now: Instant) -> Vec<Value> {
        let states = self.data.peers().values().filter_map(|peer| peer.state.as_ref());
        let sessions = states.map(|state| {
            let sessions = state.sessions.iter().map(|session| {
                json!({
                    "local_index": session.local_index,
                    "remote_index": session.remote_index,
                    "initiator": session.initiator,
                    "confirmed": session.confirmed,
                    "sealing": session.sealing,
                    "age_seconds": now.saturating_duration_since(session.created).as_secs(),
                    "expires_in_seconds": session.expires.saturating_duration_since(now).as_secs(),
                })
            });
            json!({
                "peer": state.index,
                "public_key": state.public_key,
                "sessions": sessions.collect::<Vec<_>>(),
            })
        });
        sessions.collect()
    }

    fn inspect_paths(&self, now: Instant) -> Value {
        let micros =
            |it: Option<Duration>| it.map(|it| u64::try_from(it.as_micros()).unwrap_or(u64::MAX));
        let paths = self.data.paths.states().map(|(id, state)| {
            json!({
                "peer": id,
                "alive": state.alive,
                "since_seconds": now.saturating_duration_since(state.since).as_secs(),
                "rtt_microseconds": micros(state.rtt),
                "rtt_min_microseconds": micros(state.rtt_min),
                "loss": state.loss,
                "mtu": state.mtu,
                "mtu_confirmed": state.mtu_confirmed,
                "carries": state.carries,
                "heard_seconds_ago":
                    state.last_heard.map(|at| now.saturating_duration_since(at).as_secs()),
            })
        });
        let counters = self.data.paths.counters();
        json!({
            "peers": paths.collect::<Vec<_>>(),
            "malformed": counters.malformed,
            "unknown_peers": counters.unknown_peers,
            "stray": counters.stray,
            "limited": counters.limited,
        })
    }

    fn inspect_allocation(&self) -> Value {
        let ipam = &self.addresses.ipam;
        let lends = ipam.ledger().map(|(quarter, loans)| {
            let loans: Vec<_> = loans
                .into_iter()
                .map(|(id, blocks)| json!({ "borrower": id, "blocks": blocks }))
                .collect();
            json!({ "quarter": quarter, "serial": ipam.lends(quarter), "loans": loans })
        });
        let reclaimed = ipam
            .reclaimed()
            .map(|(id, incarnation, by)| json!({ "id": id, "incarnation": incarnation, "by": by }));
        json!({
            "epoch": ipam.epoch(),
            "capacity": u64::try_from(ipam.capacity()).unwrap_or(u64::MAX),
            "held": ipam.held().collect::<Vec<_>>(),
            "lost": ipam.lost().collect::<Vec<_>>(),
            "lends": lends.collect::<Vec<_>>(),
            "tombstones": reclaimed.collect::<Vec<_>>(),
            "waiting": ipam.waiting(),
            "pending": ipam.pending(),
        })
    }
}
