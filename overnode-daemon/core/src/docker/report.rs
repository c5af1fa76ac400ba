//! The documents of the engine's own API: its containers, networks and version
//! (docs.docker.com/reference/api/engine).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::Deserialize;

use super::NAME;
use super::message::is_id;
use overnode_api::check_name;
use overnode_types::text::{is_harmless, reason};

/// The oldest supported version of the engine's API: that of Docker 20.10.
const OLDEST: (u32, u32) = (1, 41);
/// Scope of a network that other hosts have too.
const SCOPE_SWARM: &str = "swarm";
/// Maximum number of further names of a container in one network that are announced.
const MAX_ALIASES: usize = 64;
/// End of the status of a container whose health check fails.
const UNHEALTHY: &str = "(unhealthy)";

/// The engine's containers and networks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Its running containers.
    pub containers: Vec<Container>,
    /// The IDs of its networks that use this driver.
    pub networks: Vec<String>,
}

/// A running container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    /// The first twelve digits of its ID.
    pub id: String,
    /// Its name, if it passes [`check_name`].
    pub name: Option<String>,
    /// Its image, as it was named.
    pub image: Option<String>,
    /// Its endpoints by ID, each with the names that the container has in that network besides its
    /// own.
    pub aliases: BTreeMap<String, Vec<String>>,
    /// Whether its health check fails.
    pub is_unhealthy: bool,
    /// The names that belong to its engine's resolver.
    pub engine_names: EngineNames,
}

/// The names that a container's engine answers for: those in the container's networks of other
/// drivers. In lower case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EngineNames {
    /// Whether the engine may know names that are not listed, as in a network of a swarm.
    pub is_open: bool,
    /// The names in each of these networks.
    pub networks: Vec<Arc<BTreeSet<String>>>,
    /// Names that only this container has for others (`--link`).
    pub links: BTreeSet<String>,
}

impl EngineNames {
    /// Returns true if the engine answers for this name, in lower case.
    pub fn contains(&self, name: &str) -> bool {
        self.links.contains(name) || self.networks.iter().any(|names| names.contains(name))
    }
}

impl Report {
    /// Parses the engine's lists of containers and networks.
    ///
    /// # Errors
    /// Returns a message if one of them is malformed.
    pub fn read(containers: &[u8], networks: &[u8]) -> Result<Self, String> {
        let containers: Vec<ListedContainer> =
            serde_json::from_slice(containers).map_err(|why| reason(&why))?;
        let networks = serde_json::from_slice(networks).map_err(|why| reason(&why))?;
        Ok(Self::of(containers, networks, &BTreeMap::new()))
    }

    /// Selects what concerns this driver. `details` are those of containers, by ID.
    pub fn of(
        containers: Vec<ListedContainer>,
        networks: Vec<ListedNetwork>,
        details: &BTreeMap<&str, &Details>,
    ) -> Self {
        let is_swarm = |network: &&ListedNetwork| network.scope == SCOPE_SWARM;
        let swarm: BTreeSet<&str> =
            networks.iter().filter(is_swarm).map(|network| network.id.as_str()).collect();
        let ours = our_networks(&networks);
        let mut names: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
        for listed in &containers {
            for endpoint in listed.endpoints() {
                let names = names.entry(&endpoint.network).or_default();
                let aliases = details.get(listed.id()).map(|it| it.aliases(endpoint));
                let found = listed.name().into_iter().chain(aliases.into_iter().flatten());
                names.extend(found.map(|name| name.to_ascii_lowercase()));
                names.extend(listed.id.get(..12).map(str::to_owned));
            }
        }
        let names: BTreeMap<&str, Arc<BTreeSet<String>>> =
            names.into_iter().map(|(network, names)| (network, Arc::new(names))).collect();
        let selected = containers.iter().filter_map(|listed| {
            let others = || listed.endpoints().filter(|it| !ours.contains(&it.network));
            let details = details.get(listed.id()).copied();
            let engine_names = EngineNames {
                is_open: others().any(|it| swarm.contains(it.network.as_str())),
                networks: others()
                    .filter_map(|it| names.get(it.network.as_str()).cloned())
                    .collect(),
                links: details.map(Details::links).unwrap_or_default(),
            };
            container(listed, details, engine_names)
        });
        Self { containers: selected.collect(), networks: ours.iter().cloned().collect() }
    }
}

/// Returns the IDs of the networks that use this driver.
pub fn our_networks(networks: &[ListedNetwork]) -> BTreeSet<String> {
    let is_ours = |network: &&ListedNetwork| network.driver == NAME && is_id(&network.id);
    networks.iter().filter(is_ours).map(|network| network.id.clone()).collect()
}

/// Returns the IDs of the containers whose [`Details`] matter: those in our networks, and those
/// that share another network with one of them.
pub fn with_details(containers: &[ListedContainer], ours: &BTreeSet<String>) -> BTreeSet<String> {
    let is_in = |listed: &ListedContainer, networks: &BTreeSet<String>| {
        listed.endpoints().any(|endpoint| networks.contains(&endpoint.network))
    };
    let members = containers.iter().filter(|listed| is_in(listed, ours));
    let shared = members.flat_map(ListedContainer::endpoints).map(|it| it.network.clone());
    let shared: BTreeSet<String> = shared.collect();
    let wanted = containers.iter().filter(|listed| is_in(listed, &shared) && is_id(&listed.id));
    wanted.map(|listed| listed.id.clone()).collect()
}

/// Returns why an engine with this answer to `/version` is not supported, or `None` if it is.
///
/// # Errors
/// Returns a message if the answer is malformed.
pub fn unsupported(answer: &[u8]) -> Result<Option<String>, String> {
    serde_json::from_slice(answer).map(|found| too_old(&found)).map_err(|why| reason(&why))
}

/// A container in the engine's list.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ListedContainer {
    id: String,
    #[serde(default)]
    names: Option<Vec<String>>,
    #[serde(default)]
    image: Option<String>,
    /// For people, as in `Up 3 minutes (unhealthy)`.
    #[serde(default)]
    status: Option<String>,
    #[serde(default)]
    network_settings: Option<ListedSettings>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ListedSettings {
    #[serde(default)]
    networks: Option<BTreeMap<String, Option<ListedEndpoint>>>,
}

#[derive(Debug, Deserialize)]
struct ListedEndpoint {
    #[serde(rename = "NetworkID", default)]
    network: String,
    #[serde(rename = "EndpointID", default)]
    endpoint: String,
    /// Only in [`Details`].
    #[serde(rename = "Aliases", default)]
    aliases: Option<Vec<String>>,
    /// Only in [`Details`]: other containers, each as `NAME:ALIAS`.
    #[serde(rename = "Links", default)]
    links: Option<Vec<String>>,
    /// Only in [`Details`], from engine 25 on. Includes the aliases.
    #[serde(rename = "DNSNames", default)]
    dns_names: Option<Vec<String>>,
}

/// The parts of a container's description that its entry in the list lacks.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Details {
    #[serde(default)]
    network_settings: Option<ListedSettings>,
}

fn endpoints(settings: Option<&ListedSettings>) -> impl Iterator<Item = &ListedEndpoint> {
    settings.and_then(|it| it.networks.as_ref()).into_iter().flat_map(|it| it.values().flatten())
}

impl Details {
    fn aliases(&self, of: &ListedEndpoint) -> Vec<String> {
        let mut endpoints = endpoints(self.network_settings.as_ref());
        let Some(found) = endpoints.find(|it| it.endpoint == of.endpoint) else {
            return Vec::new();
        };
        let names = found.aliases.iter().chain(&found.dns_names).flatten();
        let names: BTreeSet<&String> = names.filter(|name| check_name(name).is_ok()).collect();
        names.into_iter().cloned().collect()
    }

    /// Returns the names that the container has for others.
    fn links(&self) -> BTreeSet<String> {
        let links = endpoints(self.network_settings.as_ref()).flat_map(|it| &it.links).flatten();
        links.filter_map(|link| Some(link.rsplit_once(':')?.1.to_ascii_lowercase())).collect()
    }
}

impl ListedContainer {
    /// Returns the IDs of its endpoints. They change when the container joins or leaves a network.
    pub fn endpoint_ids(&self) -> Vec<String> {
        self.endpoints().map(|it| it.endpoint.clone()).collect()
    }

    /// Returns its names, as the engine lists them.
    pub fn names(&self) -> Vec<String> {
        self.names.clone().unwrap_or_default()
    }

    /// Returns its ID.
    pub fn id(&self) -> &str {
        &self.id
    }

    fn endpoints(&self) -> impl Iterator<Item = &ListedEndpoint> {
        endpoints(self.network_settings.as_ref()).filter(|it| is_id(&it.endpoint))
    }

    fn name(&self) -> Option<String> {
        // Links give a container further names, prefixed with the other container's name.
        self.names.iter().flatten().find_map(|name| {
            name.strip_prefix('/').filter(|name| check_name(name).is_ok()).map(str::to_owned)
        })
    }
}

/// A network in the engine's list.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ListedNetwork {
    /// Its ID.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Name of its driver.
    pub driver: String,
    /// `local`, or `swarm` if other hosts have it too.
    #[serde(default)]
    pub scope: String,
    /// RFC 3339; sorts chronologically as text.
    #[serde(default)]
    pub created: String,
    /// Its containers by ID, if the engine lists them.
    #[serde(default)]
    pub containers: Option<BTreeMap<String, serde_json::Value>>,
}

/// The engine's answer to `/version`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Version {
    #[serde(default)]
    version: String,
    #[serde(default)]
    api_version: String,
}

/// Returns true for the default network.
pub fn is_default(network: &ListedNetwork) -> bool {
    network.name == NAME && network.driver == NAME
}

/// Returns why this engine is not supported, or `None` if it is.
pub fn too_old(found: &Version) -> Option<String> {
    let (major, minor) = found.api_version.split_once('.')?;
    let api: (u32, u32) = (major.parse().ok()?, minor.parse().ok()?);
    // The name is shown to users: strip control characters and bound its length.
    let name: String = found.version.chars().filter(|it| it.is_ascii_graphic()).take(32).collect();
    (api < OLDEST).then(|| {
        format!(
            "the engine is Docker {name} with API {}.{}, but the oldest supported one is 20.10 \
             with API {}.{}: upgrade Docker, or launch with --no-docker",
            api.0, api.1, OLDEST.0, OLDEST.1
        )
    })
}

fn container(
    listed: &ListedContainer,
    details: Option<&Details>,
    engine_names: EngineNames,
) -> Option<Container> {
    let is_hexadecimal =
        listed.id.len() >= 12 && listed.id.bytes().all(|byte| byte.is_ascii_hexdigit());
    let id = listed.id.get(..12).filter(|_| is_hexadecimal)?.to_owned();
    let name = listed.name();
    let is_new = |alias: &String| Some(alias) != name.as_ref() && *alias != id;
    let aliases = listed.endpoints().map(|endpoint| {
        let aliases = details.map(|details| details.aliases(endpoint)).unwrap_or_default();
        let aliases = aliases.into_iter().filter(is_new).take(MAX_ALIASES);
        (endpoint.endpoint.clone(), aliases.collect())
    });
    let aliases = aliases.collect();
    let printable =
        |image: &&String| image.len() <= 256 && !image.is_empty() && image.chars().all(is_harmless);
    let is_unhealthy = listed.status.as_ref().is_some_and(|status| status.ends_with(UNHEALTHY));
    let image = listed.image.as_ref().filter(printable).cloned();
    Some(Container { id, name, image, aliases, is_unhealthy, engine_names })
}
