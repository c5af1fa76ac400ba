//! The documents of the engine's own API: its containers, networks and version
//! (docs.docker.com/reference/api/engine).

use std::collections::BTreeMap;

use serde::Deserialize;

use super::NAME;
use super::message::is_id;
use overnode_api::check_name;
use overnode_types::text::{is_harmless, reason};

/// The oldest supported version of the engine's API: that of Docker 20.10.
const OLDEST: (u32, u32) = (1, 41);

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
    /// The IDs of its endpoints.
    pub endpoints: Vec<String>,
}

impl Report {
    /// Parses the engine's lists of containers and networks.
    ///
    /// # Errors
    /// Returns a message if one of them is malformed.
    pub fn read(containers: &[u8], networks: &[u8]) -> Result<Self, String> {
        let containers = serde_json::from_slice(containers).map_err(|why| reason(&why))?;
        let networks = serde_json::from_slice(networks).map_err(|why| reason(&why))?;
        Ok(Self::of(containers, networks))
    }

    /// Selects what concerns this driver.
    pub fn of(containers: Vec<ListedContainer>, networks: Vec<ListedNetwork>) -> Self {
        let is_ours = |network: &ListedNetwork| network.driver == NAME && is_id(&network.id);
        Self {
            containers: containers.into_iter().filter_map(container).collect(),
            networks: networks.into_iter().filter(is_ours).map(|network| network.id).collect(),
        }
    }
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
    #[serde(rename = "EndpointID", default)]
    endpoint: String,
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

fn container(listed: ListedContainer) -> Option<Container> {
    let is_hexadecimal =
        listed.id.len() >= 12 && listed.id.bytes().all(|byte| byte.is_ascii_hexdigit());
    let id = listed.id.get(..12).filter(|_| is_hexadecimal)?.to_owned();
    // Links give a container further names, prefixed with the other container's name.
    let mut names = listed.names.unwrap_or_default().into_iter();
    let name = names.find_map(|name| {
        name.strip_prefix('/').filter(|name| check_name(name).is_ok()).map(str::to_owned)
    });
    let printable =
        |image: &String| image.len() <= 256 && !image.is_empty() && image.chars().all(is_harmless);
    let networks =
        listed.network_settings.and_then(|settings| settings.networks).unwrap_or_default();
    let endpoints = networks
        .into_values()
        .flatten()
        .map(|listed| listed.endpoint)
        .filter(|id| is_id(id))
        .collect();
    Some(Container { id, name, image: listed.image.filter(printable), endpoints })
}
