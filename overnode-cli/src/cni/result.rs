//! Formats results as each version of the specification requires.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Map, Value, json};

use overnode_api::{Attached, DnsStatus};

use super::config::{Attachment, Config};
use super::error::{CniError, Code};

/// Returns the answer to `ADD`: the previous result, if any, with this attachment added.
///
/// # Errors
/// Fails if the previous result is malformed.
pub fn added(
    version: &str,
    config: &Config,
    wanted: &Attachment,
    attached: &Attached,
    dns: Option<&DnsStatus>,
) -> Result<Value, CniError> {
    let mut result = previous(config)?.cloned().unwrap_or_default();
    result.insert("cniVersion".into(), version.into());
    let mut near = json!({"name": attached.host_interface});
    let mut far = json!({"name": attached.interface, "sandbox": wanted.netns});
    if let Some(mac) = attached.mac {
        far["mac"] = mac.to_string().into();
    }
    if version == "1.1.0" {
        near["mtu"] = attached.mtu.into();
        far["mtu"] = attached.mtu.into();
    }
    let interfaces = list(&mut result, "interfaces")?;
    interfaces.extend([near, far]);
    let mut ip = json!({"address": attached.address, "interface": interfaces.len() - 1});
    if version.starts_with("0.") {
        ip["version"] = if attached.address.addr().is_ipv4() { "4" } else { "6" }.into();
    }
    list(&mut result, "ips")?.push(ip);
    let dns = match (&config.dns, dns) {
        (Some(given), _) => Some(given.clone()),
        (None, Some(DnsStatus { serving: true, address: Some(address), domain, .. })) => {
            let domain = domain.as_deref().map(|it| it.trim_end_matches('.'));
            Some(
                json!({"nameservers": [address], "search": domain.into_iter().collect::<Vec<_>>()}),
            )
        }
        (None, _) => None,
    };
    if let Some(dns) = dns {
        result.insert("dns".into(), dns);
    }
    Ok(Value::Object(result))
}

/// Returns the previous result.
///
/// # Errors
/// Fails if it is not an object, or if its `interfaces` or `ips` is not a list.
pub fn previous(config: &Config) -> Result<Option<&Map<String, Value>>, CniError> {
    match &config.prev_result {
        None => Ok(None),
        Some(Value::Object(result)) => {
            let is_list =
                |key: &&str| result.get(*key).is_none_or(|it| it.is_null() || it.is_array());
            match ["interfaces", "ips"].iter().find(|key| !is_list(key)) {
                None => Ok(Some(result)),
                Some(key) => Err(unclear(&format!("prevResult.{key} is not a list"))),
            }
        }
        Some(_) => Err(unclear("prevResult is not an object")),
    }
}

/// Returns the addresses of a result, or `None` if it has none that can be parsed.
pub fn addresses(result: &Value) -> Option<BTreeSet<IpAddr>> {
    let listed = result.get("ips").and_then(Value::as_array)?;
    let read = |ip: &Value| ip["address"].as_str()?.parse::<IpNet>().ok().map(|it| it.addr());
    Some(listed.iter().filter_map(read).collect()).filter(|it: &BTreeSet<IpAddr>| !it.is_empty())
}

/// Returns whether a result has this address on an interface of this name.
pub fn has(result: &Map<String, Value>, interface: &str, address: &str) -> bool {
    let array =
        |key: &str| result.get(key).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    array("ips").iter().any(|ip| {
        let index = ip["interface"].as_u64().and_then(|index| usize::try_from(index).ok());
        let found = index.and_then(|index| array("interfaces").get(index));
        ip["address"] == address && found.is_some_and(|found| found["name"] == interface)
    })
}

fn list<'a>(result: &'a mut Map<String, Value>, key: &str) -> Result<&'a mut Vec<Value>, CniError> {
    let entry = result.entry(key).or_insert(Value::Null);
    if entry.is_null() {
        *entry = json!([]);
    }
    entry.as_array_mut().ok_or_else(|| unclear(&format!("prevResult.{key} is not a list")))
}

fn unclear(what: &str) -> CniError {
    CniError::new(
        Code::Decode,
        what,
        "it comes from the previous plugin of the chain or from the runtime: see their logs",
    )
}
