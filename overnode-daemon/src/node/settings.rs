//! The settings of a node that can change after its launch: `overnode set`, `get` and a repeated
//! `launch`. A change takes effect by a restart of the node within this process, which packets of
//! containers do not notice.

use std::time::{Duration, Instant};

use overnode_ebpf::map::BULK_WORKER_SLOTS;

use super::Daemon;
use super::event_loop::Node;
use crate::api::bulk::Mode;
use crate::api::{self, ApiError, Setting, Settings, check_name};
use crate::store::Identity;
use overnode_core::names::DEFAULT_DOMAIN;
use overnode_types::name::Domain;

/// The value that stands for the default of any setting.
const DEFAULT: &str = "default";
/// How long the sockets of a stopped node may stay open.
const STOP_TIMEOUT: Duration = Duration::from_secs(3);
/// Pause between two attempts to start the node.
const RETRY: Duration = Duration::from_millis(50);

/// The settings, in the order in which they are listed.
const KEYS: [&str; 10] = [
    "nickname",
    "interface",
    "mtu",
    "xdp",
    "discovery",
    "bulk",
    "bulk-workers",
    "dns",
    "dns-domain",
    "docker",
];

/// Returns the value of a setting, and whether it is the default.
fn value(identity: &Identity, key: &str) -> (String, bool) {
    let switch = |is_on: bool, default: bool| (on_off(is_on).to_owned(), is_on == default);
    let chosen = |value: Option<String>, default: &str| match value {
        Some(value) => (value, false),
        None => (default.to_owned(), true),
    };
    match key {
        "nickname" => {
            let host = host_name();
            (identity.nickname.clone(), identity.nickname == host)
        }
        "interface" => chosen(identity.interface.clone(), "auto"),
        "mtu" => chosen(identity.mtu.map(|mtu| mtu.to_string()), "auto"),
        "xdp" => switch(identity.xdp, false),
        "discovery" => switch(identity.discovery, true),
        "bulk" => (mode_name(identity.bulk).to_owned(), identity.bulk == Mode::default()),
        "bulk-workers" => chosen(identity.bulk_workers.map(|count| count.to_string()), "auto"),
        "dns" => switch(identity.dns, true),
        "dns-domain" => chosen(identity.dns_domain.clone(), DEFAULT_DOMAIN),
        "docker" => switch(identity.docker, true),
        _ => (String::new(), false),
    }
}

/// Returns all settings of a node.
pub(super) fn list(identity: &Identity) -> Vec<Setting> {
    let setting = |key: &str| {
        let (value, is_default) = value(identity, key);
        Setting { key: key.to_owned(), value, is_default }
    };
    KEYS.iter().map(|key| setting(key)).collect()
}

/// Changes a setting. The node takes it over when it starts.
///
/// # Errors
/// Fails if there is no such setting, or if the value is not one of its values.
fn apply(identity: &mut Identity, key: &str, text: &str) -> Result<(), ApiError> {
    let wrong = |values: &str| {
        ApiError::usage(format_args!("{key}={text:?} is not possible: give {values}"))
    };
    let is_default = text == DEFAULT;
    let switch = |default: bool| match text {
        DEFAULT => Ok(default),
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(wrong("on, off or default")),
    };
    match key {
        "nickname" if is_default => identity.nickname = host_name(),
        "nickname" => {
            check_name(text).map_err(ApiError::usage)?;
            text.clone_into(&mut identity.nickname);
        }
        "interface" => {
            let fits = (1..=15).contains(&text.len())
                && !text.contains(|c: char| c == '/' || c == ':' || c.is_whitespace());
            if !fits {
                return Err(wrong("an interface that `ip link` lists, or default"));
            }
            identity.interface = (!is_default && text != "auto").then(|| text.to_owned());
        }
        "mtu" => {
            identity.mtu = match text.parse() {
                Ok(mtu) if (576..=65455).contains(&mtu) => Some(mtu),
                Err(_) if is_default || text == "auto" => None,
                Ok(_) | Err(_) => return Err(wrong("576 to 65455 bytes, or default")),
            }
        }
        "xdp" => identity.xdp = switch(false)?,
        "discovery" => identity.discovery = switch(true)?,
        "bulk" => {
            let modes = [Mode::Off, Mode::Auto, Mode::ChaCha, Mode::Aes];
            let mode = modes.into_iter().find(|mode| mode_name(*mode) == text);
            identity.bulk = match mode {
                Some(mode) => mode,
                None if is_default => Mode::default(),
                None => return Err(wrong("off, auto, chacha, aes or default")),
            }
        }
        "bulk-workers" => {
            identity.bulk_workers = match text.parse::<u8>() {
                Ok(count) if count > 0 && u32::from(count) <= BULK_WORKER_SLOTS => Some(count),
                Err(_) if is_default || text == "auto" => None,
                Ok(_) | Err(_) => return Err(wrong("1 to 16, or default")),
            }
        }
        "dns" => identity.dns = switch(true)?,
        "dns-domain" => {
            let domain = (!is_default).then(|| Domain::new(text)).transpose().map_err(|error| {
                ApiError::usage(format_args!("the DNS domain cannot be used: {error}"))
            })?;
            identity.dns_domain = domain
                .map(|domain| domain.as_str().to_owned())
                .filter(|domain| domain != DEFAULT_DOMAIN);
        }
        "docker" => identity.docker = switch(true)?,
        _ => {
            return Err(ApiError::usage(format_args!(
                "there is no setting {key:?}: the settings are {}; to change anything else, run \
                 `overnode reset`, then launch again",
                KEYS.join(", ")
            )));
        }
    }
    Ok(())
}

/// Returns the settings that a launch names. Switches that it does not name are left as they are.
pub(super) fn of_launch(request: &api::Launch) -> Vec<(&'static str, String)> {
    let switch = |is_on: Option<bool>| is_on.map(|is_on| on_off(is_on).to_owned());
    let named = [
        ("nickname", request.nickname.clone()),
        ("interface", request.interface.clone()),
        ("mtu", request.mtu.map(|mtu| mtu.to_string())),
        ("xdp", request.xdp.then(|| on_off(true).to_owned())),
        ("discovery", switch(request.discovery)),
        ("bulk", request.bulk.map(|mode| mode_name(mode).to_owned())),
        ("bulk-workers", request.bulk_workers.map(|count| count.to_string())),
        ("dns", switch(request.dns)),
        ("dns-domain", request.dns_domain.clone()),
        ("docker", switch(request.docker)),
    ];
    named.into_iter().filter_map(|(key, value)| Some((key, value?))).collect()
}

impl Daemon {
    /// Returns the settings of the node.
    pub(super) fn settings(&self) -> Result<Settings, ApiError> {
        let identity = self.identity()?;
        Ok(Settings { settings: list(&identity), changed: Vec::new() })
    }

    /// Changes settings, all or none. Restarts the node if any of them differs.
    ///
    /// # Errors
    /// Fails if a setting or a value is not possible, or if the node does not start with them; it
    /// then runs as before.
    pub(super) async fn change_settings<K: AsRef<str>>(
        &mut self,
        changes: &[(K, String)],
    ) -> Result<Settings, ApiError> {
        if self.waiting.is_leaving() {
            return Err(ApiError::refused("the node is leaving: nothing was changed"));
        }
        let before = list(&self.identity()?);
        let mut wanted = self.identity()?;
        for (key, value) in changes {
            apply(&mut wanted, key.as_ref(), value)?;
        }
        if wanted.xdp && wanted.interface.is_none() {
            return Err(ApiError::usage(
                "xdp=on needs an interface: give interface=NAME as well (`ip link` lists them)",
            ));
        }
        let after = list(&wanted);
        let differs = |setting: &&Setting| !before.contains(setting);
        let changed: Vec<String> =
            after.iter().filter(differs).map(|it| format!("{}={}", it.key, it.value)).collect();
        if changed.is_empty() {
            return Ok(Settings { settings: after, changed });
        }
        if let Err(error) = self.restart_with(&after).await {
            let undone = self.restart_with(&before).await;
            let also = undone.err().map(|why| format!("; in addition, the node stopped: {why:#}"));
            return Err(ApiError::refused(format_args!(
                "the node does not start with {}: {error:#}; nothing was changed{}",
                changed.join(" "),
                also.unwrap_or_default()
            )));
        }
        tracing::info!("restarted with {}", changed.join(" "));
        Ok(Settings { settings: list(&self.identity()?), changed })
    }

    /// Stops the node, stores the settings and starts it with them. Requests that wait are given
    /// up.
    async fn restart_with(&mut self, settings: &[Setting]) -> anyhow::Result<()> {
        if let Some(mut node) = self.node.take() {
            node.names.stop_server(&mut node.data.datapath).await;
        }
        self.waiting = super::requests::Waiting::default();
        // The start counter on disk must never go back, so only the settings are replaced.
        let mut identity = self.identity().map_err(|error| anyhow::anyhow!(error.message))?;
        for setting in settings {
            apply(&mut identity, &setting.key, &setting.value)
                .map_err(|error| anyhow::anyhow!(error.message))?;
        }
        self.store.set_identity(&identity, None)?;
        let deadline = Instant::now() + STOP_TIMEOUT;
        loop {
            let identity = self.identity().map_err(|error| anyhow::anyhow!(error.message))?;
            match Node::start(&self.options, &self.store, identity, self.started, &self.hub).await {
                Ok(node) => {
                    self.node = Some(node);
                    return Ok(());
                }
                // The sockets of the stopped node are closed by its tasks.
                Err(_) if Instant::now() < deadline => tokio::time::sleep(RETRY).await,
                Err(error) => return Err(error),
            }
        }
    }

    fn identity(&self) -> Result<Identity, ApiError> {
        self.store.identity().map_err(ApiError::failed)?.ok_or_else(|| {
            ApiError::refused(
                "no node was launched on this host: run \
                 `overnode launch --id ID --token-file FILE HOST...` first",
            )
        })
    }
}

fn on_off(is_on: bool) -> &'static str {
    if is_on { "on" } else { "off" }
}

fn mode_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Off => "off",
        Mode::Auto => "auto",
        Mode::ChaCha => "chacha",
        Mode::Aes => "aes",
    }
}

/// Returns the host's name, cut to the length of a nickname.
pub(super) fn host_name() -> String {
    let name = nix::unistd::gethostname().unwrap_or_default();
    name.to_string_lossy().chars().take(overnode_core::control::hello::MAX_NICKNAME).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::local::tests::local_node;

    #[test]
    fn every_setting_takes_its_own_values_and_the_default() {
        let mut identity = local_node(1, Instant::now()).identity.clone();
        let cases = [
            ("nickname", &["east"][..], "a\nb"),
            ("interface", &["eth1"], "much-too-long-a-name"),
            ("mtu", &["576", "9000"], "100"),
            ("xdp", &["on", "off"], "yes"),
            ("discovery", &["off", "on"], "1"),
            ("bulk", &["off", "auto", "chacha", "aes"], "AES"),
            ("bulk-workers", &["1", "16"], "17"),
            ("dns", &["off", "on"], ""),
            ("dns-domain", &["lab.example"], "a..b"),
            ("docker", &["off", "on"], "no"),
        ];
        assert_eq!(cases.map(|(key, ..)| key), KEYS);
        for (key, values, wrong) in cases {
            let get =
                |identity: &Identity| list(identity).into_iter().find(|it| it.key == key).unwrap();
            for wanted in values {
                apply(&mut identity, key, wanted).unwrap();
                assert_eq!(get(&identity).value, *wanted, "{key}");
            }
            assert!(apply(&mut identity, key, wrong).is_err(), "{key}={wrong}");
            apply(&mut identity, key, DEFAULT).unwrap();
            let default = get(&identity);
            assert!(default.is_default, "{key}={}", default.value);
            // Each listed value can be set.
            apply(&mut identity, key, &default.value).unwrap();
            assert_eq!(get(&identity), default);
        }
        let error = apply(&mut identity, "subnet", "10.0.0.0/8").unwrap_err();
        assert!(error.message.contains("bulk-workers") && error.message.contains("reset"));
    }
}
