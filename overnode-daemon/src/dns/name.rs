//! Validates and converts names. Nodes exchange relative names: lower-case labels separated by
//! dots, without the domain and without a trailing dot.

use hickory_proto::rr::Name;

/// Longest relative name, in bytes.
pub const MAX_NAME: usize = 128;
/// Longest label, in bytes (RFC 1035, section 2.3.4).
const MAX_LABEL: usize = 63;
/// Longest domain, in bytes. Together with it, every relative name is still a valid DNS name.
const MAX_DOMAIN: usize = 100;

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
    name: Name,
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
        let name = Name::from_ascii(format!("{text}.")).map_err(|_| BadDomain)?;
        Ok(Self { text: text.to_owned(), name })
    }

    /// Returns the domain without a trailing dot.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    pub(super) fn name(&self) -> &Name {
        &self.name
    }

    /// Returns the part of a name before this domain. It is empty for the domain itself, and `None`
    /// for a name outside the domain or a name that no node can have.
    pub(super) fn part_before(&self, name: &Name) -> Option<String> {
        // `Name::num_labels` does not count an asterisk.
        let labels = name.iter().count().checked_sub(self.name.iter().count())?;
        let labels: Option<Vec<String>> = name
            .iter()
            .take(labels)
            .map(|label| std::str::from_utf8(label).ok().map(str::to_ascii_lowercase))
            .collect();
        let labels = labels?;
        // Joining would turn a label that contains a dot into two labels.
        labels
            .iter()
            .all(|label| is_relative(label) && !label.contains('.'))
            .then(|| labels.join("."))
    }

    /// Returns the DNS name of a relative name in this domain.
    pub(super) fn absolute(&self, relative: &str) -> Option<Name> {
        Name::from_ascii(format!("{relative}.{}.", self.text)).ok()
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
        let longest = Domain::new(&["a".repeat(50), "b".repeat(49)].join(".")).unwrap();
        let name = ["c".repeat(63), "d".repeat(62), "e".into()].join(".");
        assert!(is_relative(&name) && name.len() == MAX_NAME);
        assert!(longest.absolute(&name).is_some());
    }

    #[test]
    fn ambiguous_labels_match_no_name() {
        let domain = Domain::new("overnode.local").unwrap();
        let name = |labels: &[&[u8]]| {
            Name::from_labels(labels.iter().copied().chain([&b"overnode"[..], b"local"])).unwrap()
        };
        assert_eq!(domain.part_before(&name(&[b"a", b"b"])).as_deref(), Some("a.b"));
        assert_eq!(domain.part_before(&name(&[])).as_deref(), Some(""));
        for odd in [&b"a.b"[..], b"a\\", b"\0", b"\xff", b"*"] {
            assert_eq!(domain.part_before(&name(&[odd])), None);
        }
    }
}
