use std::collections::BTreeMap;

use super::*;
use crate::docker::message::{EndpointId, NetworkId, Pool, PoolId};

const NETWORK: &str = "n1";

fn settings() -> Settings {
    Settings {
        subnet: "10.32.0.0/12".parse().unwrap(),
        range: "10.40.0.0/13".parse().unwrap(),
        nodes: ("10.39.240.1".parse().unwrap(), "10.39.255.255".parse().unwrap()),
        node: "10.39.240.3".parse().unwrap(),
    }
}

/// The plan, with a disk and a kernel that carry out its steps.
struct World {
    plan: Docker,
    disk: BTreeMap<IpAddr, Attachment>,
    networks: BTreeSet<String>,
    plugged: BTreeSet<IpAddr>,
    next: u8,
    now: Instant,
}

impl World {
    fn new() -> Self {
        let now = Instant::now();
        let plan = Docker::new(settings(), BTreeSet::new(), Vec::new(), now);
        let mut world = Self {
            plan,
            disk: BTreeMap::new(),
            networks: BTreeSet::new(),
            plugged: BTreeSet::new(),
            next: 1,
            now,
        };
        world.done(create_network(NETWORK));
        world
    }

    fn ask(&mut self, request: Request) -> Result<Response, Refusal> {
        let step = self.plan.decide(request, self.now)?;
        Ok(self.carry_out(step))
    }

    fn done(&mut self, request: Request) -> Response {
        self.ask(request).unwrap()
    }

    fn refused(&mut self, request: Request, why: &str) {
        let before = self.disk.clone();
        let refusal = self.ask(request).unwrap_err().to_string();
        assert!(refusal.contains(why), "{refusal}");
        assert_eq!(before, self.disk);
    }

    fn carry_out(&mut self, step: Step) -> Response {
        match step {
            Step::Answer(response) => response,
            Step::Find { fixed, name } => {
                let address = fixed.unwrap_or_else(|| {
                    self.next += 1;
                    IpAddr::from([10, 40, 0, self.next])
                });
                let (record, response) = self.plan.held(address, fixed.is_some(), name, 7);
                assert!(self.disk.insert(address, record.clone()).is_none());
                self.plan.keep(record, self.now);
                response
            }
            Step::Networks(networks, response) => {
                self.networks.clone_from(&networks);
                self.plan.set_networks(networks);
                response
            }
            Step::Keep(record, response) => {
                self.keep(*record);
                response
            }
            Step::Plug(record, response) => {
                self.plugged.insert(record.address);
                self.keep(*record);
                response
            }
            Step::Unplug(record, response) => {
                self.plugged.remove(&record.address);
                self.keep(*record);
                response
            }
            Step::Free(addresses, response) => {
                for address in addresses {
                    self.plugged.remove(&address);
                    self.disk.remove(&address).unwrap();
                    self.plan.forget(address);
                }
                response
            }
        }
    }

    fn keep(&mut self, record: Attachment) {
        self.disk.insert(record.address, record.clone());
        self.plan.keep(record, self.now);
    }

    /// Restarts the daemon, which reloads its state from disk.
    fn restart(&mut self) {
        self.plan = Docker::new(
            settings(),
            self.networks.clone(),
            self.disk.values().cloned().collect(),
            self.now,
        );
    }

    fn report(&mut self, report: &Report) {
        for step in self.plan.report(report, self.now) {
            self.carry_out(step);
        }
    }

    /// Starts an endpoint in a sandbox with all requests that this takes. Returns its address.
    fn start(&mut self, endpoint: &str, sandbox: &str) -> IpAddr {
        let Response::Address { address } = self.done(request_address("")) else { panic!() };
        self.done(create_endpoint(endpoint, &address));
        self.done(join(endpoint, sandbox));
        address.parse::<IpNet>().unwrap().addr()
    }
}

fn create_network(id: &str) -> Request {
    let v4 = vec![Pool { pool: "10.32.0.0/12".into() }];
    Request::CreateNetwork(CreateNetwork { network: id.into(), v4, v6: Vec::new() })
}

fn request_address(address: &str) -> Request {
    Request::RequestAddress(RequestAddress {
        pool: NAME.into(),
        address: address.into(),
        options: BTreeMap::new(),
    })
}

fn create_endpoint(id: &str, address: &str) -> Request {
    with_mac(id, address, "")
}

fn with_mac(id: &str, address: &str, mac: &str) -> Request {
    let interface =
        Interface { address: address.into(), mac_address: mac.into(), ..Interface::default() };
    Request::CreateEndpoint(CreateEndpoint {
        network: NETWORK.into(),
        endpoint: id.into(),
        interface,
    })
}

fn join(id: &str, sandbox: &str) -> Request {
    Request::Join(Join { network: NETWORK.into(), endpoint: id.into(), sandbox: sandbox.into() })
}

fn id(endpoint: &str) -> EndpointId {
    EndpointId { network: NETWORK.into(), endpoint: endpoint.into() }
}

fn release(address: IpAddr) -> Request {
    Request::ReleaseAddress(ReleaseAddress { pool: NAME.into(), address: address.to_string() })
}

fn container(endpoint: &str, name: &str) -> Container {
    Container {
        id: "0123456789ab".into(),
        name: Some(name.into()),
        image: Some("tiny".into()),
        aliases: BTreeMap::from([(endpoint.into(), Vec::new())]),
        is_unhealthy: false,
        engine_names: EngineNames::default(),
    }
}

#[test]
fn a_container_comes_and_goes() {
    let mut world = World::new();
    let address = world.start("e1", "/s1");
    assert_eq!(world.plugged, [address].into());
    let record = &world.disk[&address];
    assert_eq!((record.kind(), record.netns.as_str()), (Kind::Docker, "/s1"));
    world.done(Request::Leave(id("e1")));
    assert!(world.plugged.is_empty());
    assert!(!world.disk[&address].engine_endpoint().unwrap().joined);
    world.done(join("e1", "/s2"));
    world.done(Request::Leave(id("e1")));
    world.done(Request::DeleteEndpoint(id("e1")));
    assert_eq!(world.disk[&address].engine_endpoint(), None);
    world.done(release(address));
    assert!(world.disk.is_empty());
    world.done(Request::DeleteNetwork(NetworkId { network: NETWORK.into() }));
    assert!(world.networks.is_empty());
}

#[test]
fn requests_of_the_engine_can_be_repeated() {
    let mut world = World::new();
    let address = world.start("e1", "/s1");
    let same = world.disk.clone();
    world.done(create_network(NETWORK));
    world.done(create_endpoint("e1", &format!("{address}/12")));
    assert_eq!(world.done(join("e1", "/s1")), world.done(join("e1", "/s1")));
    assert_eq!(world.disk, same);
    for _ in 0..2 {
        world.done(Request::Leave(id("e1")));
        world.done(Request::DeleteEndpoint(id("e1")));
        world.done(release(address));
        world.done(Request::DeleteNetwork(NetworkId { network: NETWORK.into() }));
        world.done(Request::ReleasePool(PoolId { pool: NAME.into() }));
    }
    assert!(world.disk.is_empty() && world.plugged.is_empty());
    // Releasing an address that was never known also succeeds.
    world.done(release([192, 0, 2, 1].into()));
}

#[test]
fn releasing_the_address_of_an_endpoint_unplugs_it() {
    let mut world = World::new();
    let address = world.start("e1", "/s1");
    world.done(release(address));
    assert!(world.disk.is_empty() && world.plugged.is_empty());
}

#[test]
fn the_answer_contains_a_mac_address_only_if_the_node_chose_it() {
    let mut world = World::new();
    for (endpoint, given) in [("e1", ""), ("e2", "02:11:22:33:44:55")] {
        let Response::Address { address } = world.done(request_address("")) else { panic!() };
        let Response::Endpoint { interface } = world.done(with_mac(endpoint, &address, given))
        else {
            panic!()
        };
        assert_eq!(interface.address, "");
        assert_eq!(interface.mac_address.is_empty(), !given.is_empty(), "{interface:?}");
        let kept = world.plan.by_endpoint(endpoint).unwrap().engine_endpoint().unwrap().mac;
        let mac = if given.is_empty() { &interface.mac_address } else { given };
        assert_eq!(mac.parse(), Ok(kept));
        // An engine that repeats the address it was told must not get it back in the answer.
        let mac = mac.to_owned();
        let Response::Endpoint { interface } = world.done(with_mac(endpoint, &address, &mac))
        else {
            panic!()
        };
        assert_eq!(interface, Interface::default());
    }
    assert_ne!(mac_of([10, 40, 0, 1].into()), mac_of([10, 40, 0, 2].into()));
    let Response::Address { address } = world.done(request_address("")) else { panic!() };
    for bad in ["02", "01:00:00:00:00:00", "00:00:00:00:00:00"] {
        world.refused(with_mac("e3", &address, bad), "not a valid MAC address");
    }
}

#[test]
fn one_container_has_one_endpoint() {
    let mut world = World::new();
    world.start("e1", "/s1");
    let Response::Address { address } = world.done(request_address("")) else { panic!() };
    world.done(create_endpoint("e2", &address));
    world.refused(join("e2", "/s1"), "one network");
    world.done(Request::Leave(id("e1")));
    world.done(join("e2", "/s1"));
}

#[test]
fn an_address_is_bound_to_one_endpoint() {
    let mut world = World::new();
    let address = world.start("e1", "/s1");
    world.refused(create_endpoint("e2", &format!("{address}/12")), "another endpoint");
    let Response::Address { address } = world.done(request_address("")) else { panic!() };
    world.refused(create_endpoint("e1", &address), "already");
    world.refused(create_endpoint("e3", "10.44.0.1/12"), "did not allocate");
}

#[test]
fn a_restarted_daemon_remembers_endpoints_and_names() {
    let mut world = World::new();
    let address = world.start("e1", "/s1");
    world.report(&Report { containers: vec![container("e1", "web")], networks: Vec::new() });
    world.restart();
    assert_eq!(world.plan.records().next().unwrap().name.as_deref(), Some("web"));
    world.refused(create_endpoint("e2", &format!("{address}/12")), "web");
    world.done(Request::DeleteEndpoint(id("e1")));
    world.done(release(address));
    assert!(world.disk.is_empty());
}

#[test]
fn a_new_engine_process_frees_addresses_without_an_endpoint() {
    let mut world = World::new();
    world.start("e1", "/s1");
    world.done(request_address(""));
    world.done(Request::Activate);
    assert_eq!(world.disk.len(), 2, "its endpoint may still be created");
    world.now += PENDING_ADDRESS_GRACE;
    world.done(Request::Activate);
    assert_eq!(world.disk.len(), 1);
}

#[test]
fn addresses_that_the_engine_no_longer_lists_are_freed_later() {
    let mut world = World::new();
    let known = world.start("e1", "/s1");
    world.start("e2", "/s2");
    world.done(request_address(""));
    let report = Report { containers: vec![container("e1", "web")], networks: Vec::new() };
    world.now += LEASE_EXPIRY / 2;
    world.report(&report);
    assert_eq!(world.disk.len(), 3);
    assert!(world.plan.has_unnamed());
    world.now += LEASE_EXPIRY / 2;
    world.report(&report);
    assert_eq!(world.disk.keys().copied().collect::<Vec<_>>(), [known]);
    assert_eq!(world.plugged, [known].into());
    assert!(!world.plan.has_unnamed());
}

#[test]
fn names_and_images_come_from_the_engine() {
    let mut world = World::new();
    let address = world.start("e1", "/s1");
    world.report(&Report {
        containers: vec![container("e1", "web")],
        networks: vec!["older".into()],
    });
    let record = &world.disk[&address];
    assert_eq!(
        (record.name.as_deref(), record.image().map(String::as_str)),
        (Some("web"), Some("tiny"))
    );
    assert_eq!(record.target, "0123456789ab");
    assert!(world.networks.contains("older"), "a network from before a reset is adopted");
    world.report(&Report { containers: vec![container("e1", "renamed")], networks: Vec::new() });
    assert_eq!(world.disk[&address].name.as_deref(), Some("renamed"));
    assert!(world.networks.contains("older"));
}

#[test]
fn newer_engines_send_the_name_with_the_address_request() {
    let mut world = World::new();
    for (name, kept) in [("web", Some("web")), ("a b\n", None)] {
        let options = BTreeMap::from([(OPTION_NAME.to_owned(), name.into())]);
        let request = RequestAddress { pool: NAME.into(), address: String::new(), options };
        let Response::Address { address } = world.done(Request::RequestAddress(request)) else {
            panic!()
        };
        let address = address.parse::<IpNet>().unwrap().addr();
        assert_eq!(world.disk[&address].name.as_deref(), kept);
    }
}

#[test]
fn a_gateway_uses_no_address() {
    let mut world = World::new();
    let gateway = |address: &str| {
        let options = BTreeMap::from([(OPTION_TYPE.to_owned(), OPTION_TYPE_GATEWAY.into())]);
        Request::RequestAddress(RequestAddress {
            pool: NAME.into(),
            address: address.into(),
            options,
        })
    };
    let answer = |address: &str| Response::Address { address: format!("{address}/12") };
    assert_eq!(world.done(gateway("")), answer("10.39.240.3"));
    assert_eq!(world.done(gateway("10.39.240.1")), answer("10.39.240.1"));
    world.refused(gateway("10.32.0.1"), "--gateway");
    assert!(world.disk.is_empty());
}

#[test]
fn an_engine_that_keeps_asking_for_another_pool_is_refused() {
    let mut world = World::new();
    let pool = |pool: &str| {
        Request::RequestPool(RequestPool { pool: pool.into(), ..RequestPool::default() })
    };
    let given = Response::Pool { id: NAME, pool: "10.32.0.0/12".into() };
    for _ in 0..MAX_POOLS_IN_A_ROW {
        assert_eq!(world.done(pool("")), given);
    }
    world.refused(pool(""), "--subnet 10.32.0.0/12");
    assert_eq!(world.done(pool("10.32.0.0/12")), given);
    world.refused(pool("10.32.0.0/11"), "10.32.0.0/12");
    let part = |part: &str| RequestPool { sub_pool: part.into(), ..RequestPool::default() };
    world.done(Request::RequestPool(part("10.40.0.0/13")));
    world.refused(Request::RequestPool(part("10.40.0.0/16")), "--ip-range");
}

#[test]
fn null_is_accepted_for_empty_fields() {
    let parse = |path: &str, body: &str| Request::parse(path, body.as_bytes());
    let request = parse(
        "/NetworkDriver.CreateEndpoint",
        r#"{"NetworkID":"n","EndpointID":"e","Interface":null,"Options":null,"Newer":[1]}"#,
    );
    let Ok(Request::CreateEndpoint(request)) = request else { panic!("{request:?}") };
    assert_eq!(request.interface, Interface::default());
    let request = parse(
        "/NetworkDriver.CreateNetwork",
        r#"{"NetworkID":"n","IPv4Data":null,"IPv6Data":null}"#,
    );
    assert!(matches!(request, Ok(Request::CreateNetwork(_))), "{request:?}");
    assert!(matches!(parse("/Plugin.Activate", ""), Ok(Request::Activate)));
    assert!(matches!(parse("/NetworkDriver.AllocateNetwork", "{}"), Err(Refusal::Unknown(_))));
    assert!(matches!(parse("/NetworkDriver.Leave", "{}"), Err(Refusal::Malformed(_))));
}

#[test]
fn answers_have_the_field_names_that_engines_expect() {
    let json = |response: Response| serde_json::to_value(response).unwrap();
    let mut world = World::new();
    assert_eq!(
        json(world.done(Request::NetworkCapabilities)),
        serde_json::json!({"Scope": "local", "ConnectivityScope": "global", "GwAllocChecker": true})
    );
    assert_eq!(
        json(world.done(Request::AddressSpaces)),
        serde_json::json!({
            "LocalDefaultAddressSpace": "overnode",
            "GlobalDefaultAddressSpace": "overnode",
        })
    );
    assert_eq!(
        json(world.done(Request::IpamCapabilities)),
        serde_json::json!({"RequiresMACAddress": false, "RequiresRequestReplay": false})
    );
    assert_eq!(
        json(world.done(Request::GatewayCheck)),
        serde_json::json!({"SkipIPv4": true, "SkipIPv6": true})
    );
    world.start("e1", "/s1");
    assert_eq!(
        json(world.done(join("e1", "/s1"))),
        serde_json::json!({"InterfaceName": {"SrcName": "ovc0a280002", "DstPrefix": "overnode"}})
    );
    assert_eq!(json(world.done(Request::EndpointInfo(id("e1")))), serde_json::json!({"Value": {}}));
    assert_eq!(json(Response::Done {}), serde_json::json!({}));
}
