//! Real daemons on hosts of the lab: what the contract promises, and attempts to break it.

mod addresses;
mod bad_input;
mod bulk;
mod checksums;
mod cleanliness;
mod crash_points;
mod dashboard;
mod dns;
mod documents;
mod expose;
mod floods;
mod forgery;
mod hostile;
mod inspect;

mod liar;
mod life;
mod local_user;
mod metrics;
mod mismatch;
mod monitor;
mod mtu;
mod offloads;
mod orders;
mod partition;
mod relay;
mod resilience;
mod rolling;
mod secrecy;
mod spoofing;
mod support;
mod token;
