//! Converts between names of the container network and DNS names.

use hickory_proto::rr::Name;
use overnode_types::name::{Domain, is_relative};

/// Returns the DNS name of a domain.
pub(super) fn name_of(domain: &Domain) -> Name {
    Name::from_ascii(format!("{}.", domain.as_str())).unwrap_or_else(|_| Name::root())
}

/// Returns the part of a name before a domain. It is empty for the domain itself, and `None` for a
/// name outside the domain or a name that no node can have.
pub(super) fn part_before(domain: &Domain, name: &Name) -> Option<String> {
    // `Name::num_labels` does not count an asterisk.
    let labels = name.iter().count().checked_sub(name_of(domain).iter().count())?;
    let labels: Option<Vec<String>> = name
        .iter()
        .take(labels)
        .map(|label| std::str::from_utf8(label).ok().map(str::to_ascii_lowercase))
        .collect();
    let labels = labels?;
    // Joining would turn a label that contains a dot into two labels.
    labels.iter().all(|label| is_relative(label) && !label.contains('.')).then(|| labels.join("."))
}

/// Returns the DNS name of a relative name in a domain.
pub(super) fn absolute(domain: &Domain, relative: &str) -> Option<Name> {
    Name::from_ascii(format!("{relative}.{}.", domain.as_str())).ok()
}

#[cfg(test)]
mod tests {
    use overnode_types::name::MAX_NAME;

    use super::*;

    #[test]
    fn the_longest_name_in_the_longest_domain_is_a_dns_name() {
        let longest = Domain::new(&["a".repeat(50), "b".repeat(49)].join(".")).unwrap();
        let name = ["c".repeat(63), "d".repeat(62), "e".into()].join(".");
        assert_eq!(name.len(), MAX_NAME);
        assert!(absolute(&longest, &name).is_some());
    }

    #[test]
    fn ambiguous_labels_match_no_name() {
        let domain = Domain::new("overnode.local").unwrap();
        let name = |labels: &[&[u8]]| {
            Name::from_labels(labels.iter().copied().chain([&b"overnode"[..], b"local"])).unwrap()
        };
        assert_eq!(part_before(&domain, &name(&[b"a", b"b"])).as_deref(), Some("a.b"));
        assert_eq!(part_before(&domain, &name(&[])).as_deref(), Some(""));
        for odd in [&b"a.b"[..], b"a\\", b"\0", b"\xff", b"*"] {
            assert_eq!(part_before(&domain, &name(&[odd])), None);
        }
    }
}
