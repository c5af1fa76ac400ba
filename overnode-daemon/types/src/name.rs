//! Validates and converts names. Nodes exchange relative names: lower-case labels separated by
//! dots, without the domain and without a trailing dot.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// Longest relative name, in bytes.
pub const MAX_NAME: usize = 128;
/// Longest label, in bytes (RFC 1035, section 2.3.4).
const MAX_LABEL: usize = 63;
/// Longest domain, in bytes. Together with it, every relative name is still a valid DNS name.
const MAX_DOMAIN: usize = 100;

/// A name and one of its addresses. The name is valid by [`is_relative`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Named {
    /// The name without the domain.
    pub name: String,
    /// The address that the name resolves to.
    pub address: IpAddr,
}

impl Named {
    /// Returns the approximate size in bytes of the name in a record.
    pub fn size(&self) -> usize {
        2 + self.name.len() + if self.address.is_ipv4() { 5 } else { 17 }
    }
}

/// The text is not a domain that can be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a domain consists of labels separated by dots, as in overnode.local, with letters, digits, \
     hyphens and underscores; at most 100 bytes"
)]
pub struct BadDomain;

/// The text is not a name that can be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a name consists of labels separated by dots, with letters, digits, hyphens and underscores; \
     at most 63 bytes per label and 128 in total"
)]
pub struct BadName;

/// Returns true if this is a valid relative name.
pub fn is_relative(name: &str) -> bool {
    let is_label = |label: &str| {
        (1..=MAX_LABEL).contains(&label.len())
            && label.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_'))
    };
    name.len() <= MAX_NAME && name.split('.').all(is_label)
}

/// Converts user input to a relative name. The input may include one of the domains and a trailing
/// dot.
///
/// # Errors
/// Returns [`BadName`] if the result is not a valid relative name.
pub fn relative(text: &str, domains: &[Domain]) -> Result<String, BadName> {
    let lower = text.to_ascii_lowercase();
    let name = lower.strip_suffix('.').unwrap_or(&lower);
    let inside =
        domains.iter().find_map(|domain| name.strip_suffix(&domain.text)?.strip_suffix('.'));
    let name = inside.unwrap_or(name);
    if is_relative(name) { Ok(name.to_owned()) } else { Err(BadName) }
}

/// A domain under which names are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Domain {
    text: String,
}

impl Domain {
    /// Parses a domain, with or without a trailing dot.
    ///
    /// # Errors
    /// Returns [`BadDomain`] if it is malformed, too long, or a domain of reverse lookups.
    pub fn new(text: &str) -> Result<Self, BadDomain> {
        let lower = text.to_ascii_lowercase();
        let text = lower.strip_suffix('.').unwrap_or(&lower);
        if text.len() > MAX_DOMAIN || !is_relative(text) || is_of_addresses(text) {
            return Err(BadDomain);
        }
        Ok(Self { text: text.to_owned() })
    }

    /// Returns the domain without a trailing dot.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

/// Returns true for the domains of reverse lookups, which are answered by address.
fn is_of_addresses(domain: &str) -> bool {
    domain == "arpa" || domain.ends_with(".arpa")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domains() -> Vec<Domain> {
        vec![Domain::new("overnode.local").unwrap(), Domain::new("weave.local.").unwrap()]
    }

    #[test]
    fn names_are_converted_to_relative_names() {
        for (typed, form) in [
            ("web", "web"),
            ("Web", "web"),
            ("web.", "web"),
            ("WEB.Overnode.Local", "web"),
            ("web.overnode.local.", "web"),
            ("web.weave.local", "web"),
            ("a.b_c-1.weave.local", "a.b_c-1"),
            ("web.example.org", "web.example.org"),
            ("overnode.local", "overnode.local"),
            ("webovernode.local", "webovernode.local"),
        ] {
            assert_eq!(relative(typed, &domains()).as_deref(), Ok(form), "{typed}");
        }
        let long = "a".repeat(64);
        let many = ["a"; 65].join(".");
        for bad in [
            "",
            ".",
            "..",
            ".web",
            "web..",
            "a..b",
            "a b",
            "é",
            "*",
            "a/b",
            "a\n",
            ".overnode.local",
            &long,
            &many,
        ] {
            assert_eq!(relative(bad, &domains()), Err(BadName), "{bad:?}");
        }
        assert!(
            is_relative(&"a".repeat(63)) && is_relative(&["a"; 64].join(".")) && !is_relative("A")
        );
    }

    #[test]
    fn malformed_long_and_reverse_domains_are_refused() {
        for bad in ["", ".", "a..b", "local..", "a b", "in-addr.arpa", "arpa", &["a"; 51].join(".")]
        {
            assert_eq!(Domain::new(bad), Err(BadDomain), "{bad:?}");
        }
        assert!(Domain::new(&["a".repeat(50), "b".repeat(49)].join(".")).is_ok());
        let name = ["c".repeat(63), "d".repeat(62), "e".into()].join(".");
        assert!(is_relative(&name) && name.len() == MAX_NAME);
    }
}
