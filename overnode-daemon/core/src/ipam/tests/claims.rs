//! Tests of claims for static addresses that need no other node's answer.

use super::*;

#[test]
fn claims_of_other_nodes_are_respected_and_clashes_found() {
    let mut ipam = node(1);
    let now = Instant::now();
    let address = ip("10.32.0.9");
    let peer =
        |claims: &[IpAddr]| Peer { incarnation: 1, claims: claims.to_vec(), ..Peer::default() };
    ipam.learn(id(2), peer(&[address]), now);
    assert_eq!(
        claim(&mut ipam, address, "a"),
        Err(IpamError::InUseElsewhere { address, node: id(2) })
    );
    ipam.learn(id(2), Peer { left: true, ..peer(&[address]) }, now);
    assert_eq!(claim(&mut ipam, address, "a"), Ok(()));
    let clashes = |ipam: &mut Ipam| {
        let actions: Vec<_> = std::iter::from_fn(|| ipam.poll_action()).collect();
        actions
            .iter()
            .filter(|action| matches!(action, Action::Report(Problem::Clash { .. })))
            .count()
    };
    assert_eq!(clashes(&mut ipam), 0);
    ipam.learn(id(3), peer(&[address, ip("10.32.0.10")]), now);
    assert_eq!(clashes(&mut ipam), 1);
    ipam.learn(id(3), peer(&[address]), now);
    assert_eq!(clashes(&mut ipam), 0, "once");
}

#[test]
fn static_addresses_are_checked() {
    let mut ipam = node(1);
    for good in ["10.32.0.1", "10.39.239.255"] {
        assert_eq!(claim(&mut ipam, ip(good), "a"), Ok(()));
        let error = claim(&mut ipam, ip(good), "b").unwrap_err();
        assert_eq!(error, IpamError::InUse { address: ip(good), owner: "a".into() });
    }
    assert_eq!(ipam.claims(), [ip("10.32.0.1"), ip("10.39.239.255")]);
    for reserved in [
        "10.32.0.0",
        "10.39.240.0",
        "10.39.240.1",
        "10.39.255.255",
        "10.40.0.0",
        "10.40.0.1",
        "10.47.255.255",
    ] {
        let error = claim(&mut ipam, ip(reserved), "a").unwrap_err();
        assert!(matches!(error, IpamError::Reserved { .. }), "{reserved}");
        assert!(
            error.to_string().ends_with("choose one from 10.32.0.1 to 10.39.239.255"),
            "{error}"
        );
    }
    for outside in ["10.31.255.255", "10.48.0.0", "192.168.0.1", "fd00::1", "::ffff:10.32.0.5"] {
        assert!(
            matches!(claim(&mut ipam, ip(outside), "a"), Err(IpamError::OutsideSubnet { .. })),
            "{outside}"
        );
    }
    assert_eq!(ipam.allocated().len(), 2, "a refused claim must allocate nothing");
}
