//! A client of the host's own resolvers, which answer all names that are not ours.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use hickory_proto::op::{DnsRequest, DnsRequestOptions, Message, Query, ResponseCode};
use hickory_resolver::config::{NameServerConfig, ResolverOpts};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::xfer::DnsHandle as _;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::system_conf::parse_resolv_conf;
use hickory_resolver::{NameServerPool, PoolContext, TlsConfig};
use ipnet::IpNet;

/// Interval of checks whether the file has changed. Queries trigger the checks.
const CHECK_INTERVAL: Duration = Duration::from_secs(2);
/// How much of the file is read, in bytes.
const MAX_FILE_BYTES: usize = 64 * 1024;
/// Maximum number of resolvers from the file.
const MAX_SERVERS: usize = 4;
/// Timeout for all resolvers together. Clients give up after five seconds.
const TIMEOUT: Duration = Duration::from_secs(4);
/// Announced UDP payload size, in bytes. It fits into one packet on any path (RFC 9715).
const UDP_PAYLOAD: u16 = 1232;

type Pool = NameServerPool<TokioRuntimeProvider>;

/// A client of the resolvers that a file such as `/etc/resolv.conf` lists. It uses UDP, and TCP for
/// answers that do not fit. The file may change at any time.
pub struct Upstream {
    file: PathBuf,
    own: IpAddr,
    subnet: IpNet,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    checked: Option<Instant>,
    text: Vec<u8>,
    servers: Vec<IpAddr>,
    pool: Option<Pool>,
}

impl Upstream {
    /// Creates a client. `own` is the address of this node's own server, which is never asked.
    ///
    /// Addresses in `subnet` are removed from answers. Otherwise the owner of any domain could make
    /// browsers in containers talk to other containers (DNS rebinding).
    pub fn new(file: &Path, own: IpAddr, subnet: IpNet) -> Self {
        Self { file: file.to_owned(), own, subnet, state: Mutex::default() }
    }

    /// Returns the resolvers in use.
    pub fn servers(&self) -> Vec<IpAddr> {
        self.refresh().0
    }

    /// Asks the resolvers.
    ///
    /// # Errors
    /// Returns the code to answer with if no resolver has an answer.
    pub async fn ask(&self, query: Query, flags: Flags) -> Result<Message, ResponseCode> {
        let Some(pool) = self.refresh().1 else { return Err(ResponseCode::ServFail) };
        let mut options = DnsRequestOptions::default();
        options.edns_payload_len = UDP_PAYLOAD;
        options.edns_set_dnssec_ok = flags.dnssec_ok;
        let (mut message, options) = DnsRequest::from_query(query, options).into_parts();
        message.metadata.checking_disabled = flags.checking_disabled;
        let mut answers = pool.send(DnsRequest::new(message, options));
        match tokio::time::timeout(TIMEOUT, answers.next()).await {
            Ok(Some(Ok(response))) => Ok(response.into_message()),
            Ok(Some(Err(NetError::Dns(DnsError::NoRecordsFound(none))))) => {
                let mut message = Message::query();
                message.metadata.response_code = none.response_code;
                message.authorities =
                    none.authorities.iter().flat_map(|list| list.iter().cloned()).collect();
                Ok(message)
            }
            Ok(Some(Err(NetError::Dns(DnsError::ResponseCode(code))))) => Err(code),
            Ok(Some(Err(error))) => {
                tracing::debug!("the host's resolvers do not answer: {error}");
                Err(ResponseCode::ServFail)
            }
            Ok(None) | Err(_) => Err(ResponseCode::ServFail),
        }
    }

    fn refresh(&self) -> (Vec<IpAddr>, Option<Pool>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if state.checked.is_none_or(|at| now >= at + CHECK_INTERVAL) {
            let is_first = state.checked.is_none();
            state.checked = Some(now);
            let text = read(&self.file);
            if is_first || text != state.text {
                state.servers = self.usable(&text);
                state.pool = self.pool(&state.servers);
                state.text = text;
                tracing::info!("other names are forwarded to {:?}", state.servers);
            }
        }
        (state.servers.clone(), state.pool.clone())
    }

    /// Returns the resolvers that the file lists, without this node's own server: queries would
    /// loop forever.
    fn usable(&self, text: &[u8]) -> Vec<IpAddr> {
        let Ok((config, _)) = parse_resolv_conf(text) else { return Vec::new() };
        let servers = config.name_servers().iter().map(|server| server.ip);
        servers.filter(|ip| *ip != self.own).take(MAX_SERVERS).collect()
    }

    fn pool(&self, servers: &[IpAddr]) -> Option<Pool> {
        if servers.is_empty() {
            return None;
        }
        let mut options = ResolverOpts::default();
        options.timeout = TIMEOUT;
        options.edns_payload_len = UDP_PAYLOAD;
        options.deny_answers = vec![self.subnet];
        let servers: Vec<_> = servers.iter().map(|ip| NameServerConfig::udp_and_tcp(*ip)).collect();
        let tls = TlsConfig::new().ok()?;
        let context = Arc::new(PoolContext::new(options, tls));
        Some(Pool::from_config(servers, context, TokioRuntimeProvider::default()))
    }
}

/// The flags of a query that are passed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// Include DNSSEC signatures.
    pub dnssec_ok: bool,
    /// Include data whose signatures the resolver finds to be invalid.
    pub checking_disabled: bool,
}

fn read(file: &Path) -> Vec<u8> {
    let mut text = std::fs::read(file).unwrap_or_default();
    text.truncate(MAX_FILE_BYTES);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_reread_and_the_own_address_skipped() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("resolv.conf");
        let own = "10.39.240.1".parse().unwrap();
        let upstream = Upstream::new(&file, own, "10.32.0.0/12".parse().unwrap());
        assert!(upstream.servers().is_empty(), "there is no file");
        let servers = |text: &str| {
            std::fs::write(&file, text).unwrap();
            upstream.state.lock().unwrap().checked = Some(Instant::now() - CHECK_INTERVAL);
            upstream.servers().iter().map(IpAddr::to_string).collect::<Vec<_>>()
        };
        assert_eq!(
            servers("nameserver 192.0.2.1\nnameserver 10.39.240.1\nsearch a.b\n"),
            ["192.0.2.1"]
        );
        assert_eq!(servers("# none\n"), [""; 0]);
        assert_eq!(
            servers("nameserver ::1\nnameserver 127.0.0.53\noptions edns0\n"),
            ["::1", "127.0.0.53"]
        );
        assert_eq!(servers("\u{0}\u{1} nonsense \n nameserver x\n"), [""; 0]);
        let many: String = (1..9).map(|n| format!("nameserver 192.0.2.{n}\n")).collect();
        assert_eq!(servers(&many).len(), MAX_SERVERS);
    }
}
