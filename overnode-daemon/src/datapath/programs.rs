//! Loads and attaches the eBPF programs, and replaces those of an earlier daemon without a gap.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;

use anyhow::{Context as _, Result, anyhow};
use aya::programs::links::{FdLink, LinkError, PinnedLink};
use aya::programs::tc::{
    NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact,
};
use aya::programs::xdp::{XdpLink, XdpMode};
use aya::programs::{
    CgroupAttachMode, CgroupSockAddr, LinkOrder, ProgramError, ProgramType, SchedClassifier,
    TcAttachType, Xdp,
};
use aya::sys::{BpfHelper, is_helper_supported};
use aya::{Ebpf, EbpfError, EbpfLoader, VerifierLogLevel};
use aya_log::EbpfLogger;
use overnode_ebpf::map::MAPS;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;
use tracing::{debug, warn};

use super::bpffs::{Pin, Pins};
use super::interfaces::Link;
use super::maps::Maps;

/// Program at the ingress of the host-side end of each container's veth.
pub(super) const FROM_CONTAINER: &str = "from_container";
/// Program at the ingress of the offload veth's second end.
pub(super) const SEAL: &str = "seal";
/// Program at the ingress of each bulk worker's device.
pub(super) const FROM_BULK: &str = "from_bulk";
pub(super) const TO_CONTAINER: &str = "to_container";
/// Program at the ingress of underlay interfaces.
pub(super) const FROM_UNDERLAY: &str = "from_underlay";
/// XDP version of [`FROM_UNDERLAY`].
pub(super) const FROM_UNDERLAY_XDP: &str = "from_underlay_xdp";

/// Programs for sockets that redirect DNS queries.
const RESOLVER: [&str; 4] =
    ["resolver_connect", "resolver_sendmsg", "resolver_recvmsg", "resolver_getpeername"];

/// Priority and handle of clsact filters. The handle 0x6784 spells the port number 6784, so other
/// software is unlikely to use it.
const FILTER: (u16, TcHandle) = (1, TcHandle::new(0, 0x6784));

/// How TC programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Hook {
    /// As tcx links (Linux 6.6).
    Tcx,
    /// As filters of the clsact qdisc, on older kernels or if `OVERNODE_NO_TCX=1`.
    Clsact,
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        })
    }
}

/// The loaded programs.
pub(super) struct Programs {
    ebpf: Ebpf,
    hook: Hook,
    log: Option<JoinHandle<()>>,
}

impl Programs {
    /// Loads the object with the pinned maps of `pins`. Maps that do not exist yet are created and
    /// pinned.
    ///
    /// # Errors
    /// Fails if the kernel refuses a map or a program. The error names what the kernel lacks.
    pub(super) fn load(object: &[u8], pins: &Pins, debug: bool, xdp: bool) -> Result<(Self, Maps)> {
        let mut ebpf = parse(object, pins, debug, VerifierLogLevel::STATS)?;
        let mut wanted = vec![FROM_CONTAINER, TO_CONTAINER, SEAL, FROM_UNDERLAY, FROM_BULK];
        if xdp {
            wanted.push(FROM_UNDERLAY_XDP);
        }
        for name in wanted {
            if let Err(error) = load_program(&mut ebpf, name) {
                return Err(explain(error, object, pins, debug, name));
            }
        }
        let log = if debug { read_log(&mut ebpf) } else { None };
        let maps = Maps::take(&mut ebpf)?;
        let hook = if std::env::var_os("OVERNODE_NO_TCX").is_some_and(|value| value == "1") {
            Hook::Clsact
        } else {
            Hook::Tcx
        };
        Ok((Self { ebpf, hook, log }, maps))
    }

    pub(super) const fn hook(&self) -> Hook {
        self.hook
    }

    /// Attaches a TC program to `link`, in front of other programs: to its egress if the program is
    /// [`TO_CONTAINER`], else to its ingress. A program that an earlier daemon attached is replaced
    /// in one step.
    pub(super) fn attach(&mut self, name: &'static str, link: &Link, pins: &Pins) -> Result<()> {
        if self.hook == Hook::Tcx {
            match self.attach_tcx(name, link, pins) {
                Err(error) if is_invalid(&error) => {
                    debug!(%error, "tcx is not available (it needs Linux 6.6), using clsact");
                    self.hook = Hook::Clsact;
                }
                Err(error) => return Err(refusal(error, name, link)),
                Ok(()) => return detach_filter(name, link, pins),
            }
        }
        self.attach_filter(name, link, pins).map_err(|error| refusal(error, name, link))?;
        pins.remove(&Pin::Link { ifindex: link.index, program: name.into() })
            .with_context(|| format!("the tcx link of {} cannot be removed", link.name))
    }

    fn attach_tcx(&mut self, name: &str, link: &Link, pins: &Pins) -> Result<(), ProgramError> {
        let program = tc(&mut self.ebpf, name)?;
        let pin = Pin::Link { ifindex: link.index, program: name.into() };
        let path = pins.path(&pin);
        if let Some(old) = pinned(&path)? {
            match SchedClassifierLink::try_from(old)
                .map_err(link_error)
                .and_then(|old| program.attach_to_link(old))
            {
                Ok(id) => return program.take_link(id).map(drop),
                // The interface of that link is gone, and its index was reused.
                Err(error) => {
                    debug!(%error, interface = link.name, "a pinned link is no longer usable")
                }
            }
            pins.remove(&pin)?;
        }
        let id = program.attach_with_options(
            &link.name,
            direction(name),
            TcAttachOptions::TcxOrder(LinkOrder::first()),
        )?;
        let attached = FdLink::try_from(program.take_link(id)?).map_err(link_error)?;
        attached.pin(&path).map(drop).map_err(|error| io::Error::other(error).into())
    }

    fn attach_filter(&mut self, name: &str, link: &Link, pins: &Pins) -> Result<(), ProgramError> {
        let qdisc = Pin::Qdisc { ifindex: link.index };
        let was_marked = pins.is_there(&qdisc);
        let mark = |pin: &Pin| pins.mark(pin).map_err(io::Error::other);
        mark(&qdisc)?;
        match qdisc_add_clsact(&link.name) {
            Ok(()) => {}
            Err(TcError::AlreadyAttached) if was_marked => {}
            Err(TcError::AlreadyAttached) => pins.remove(&qdisc)?,
            Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => {
                if !was_marked {
                    pins.remove(&qdisc)?;
                }
            }
            Err(error) => {
                pins.remove(&qdisc)?;
                return Err(error.into());
            }
        }
        mark(&Pin::Filter { ifindex: link.index, program: name.into() })?;
        let program = tc(&mut self.ebpf, name)?;
        let (priority, handle) = FILTER;
        let old =
            SchedClassifierLink::attached(&link.name, direction(name), priority, handle, None)?;
        let id = match program.attach_to_link(old) {
            Ok(id) => id,
            Err(error) if is_missing(&error) => program.attach_with_options(
                &link.name,
                direction(name),
                TcAttachOptions::Netlink(NlOptions { priority, handle, classid: None }),
            )?,
            Err(error) => return Err(error),
        };
        // Dropping the link would detach the program. Forgetting it leaks nothing, since it only
        // holds numbers.
        std::mem::forget(program.take_link(id)?);
        Ok(())
    }

    /// Loads the programs that redirect DNS queries and attaches them to a control group, beside
    /// those of others. Those that an earlier daemon attached are removed afterwards: no gap.
    pub(super) fn attach_resolver(&mut self, cgroup: &OwnedFd, pins: &Pins) -> Result<()> {
        for name in RESOLVER {
            self.attach_socket_program(name, cgroup, pins).map_err(|error| {
                anyhow!(
                    "the program {name} cannot be attached to the root control group: {}",
                    chain(&error)
                )
            })?;
        }
        Ok(())
    }

    fn attach_socket_program(
        &mut self,
        name: &str,
        cgroup: &OwnedFd,
        pins: &Pins,
    ) -> Result<(), ProgramError> {
        let program: &mut CgroupSockAddr =
            self.ebpf.program_mut(name).ok_or(ProgramError::NotLoaded)?.try_into()?;
        match program.load() {
            Ok(()) | Err(ProgramError::AlreadyLoaded) => {}
            Err(error) => return Err(error),
        }
        // Links never exclude the programs of others, and the kernel refuses a mode that says so.
        let id = program.attach(cgroup, CgroupAttachMode::Single)?;
        let attached = FdLink::try_from(program.take_link(id)?).map_err(link_error)?;
        pins.remove_socket_link(name)?;
        attached
            .pin(pins.socket_link(name))
            .map(drop)
            .map_err(|error| io::Error::other(error).into())
    }

    /// Detaches the programs that redirect DNS queries, if they are attached.
    pub(super) fn detach_resolver(&self, pins: &Pins) -> Result<()> {
        RESOLVER.iter().try_for_each(|name| pins.remove_socket_link(name)).context(
            "the programs that redirect DNS queries cannot be detached from the control group",
        )
    }

    /// Attaches the XDP program in native mode.
    pub(super) fn attach_xdp(&mut self, link: &Link, pins: &Pins) -> Result<()> {
        self.attach_xdp_link(link, pins).map_err(|error| {
            let reason = match error_number(&error) {
                Some(libc::EOPNOTSUPP) => "its driver has no native XDP".to_owned(),
                Some(libc::EBUSY | libc::EEXIST) => {
                    "another XDP program is attached there".to_owned()
                }
                Some(libc::EINVAL | libc::ERANGE) => {
                    format!("its driver refuses, perhaps because of MTU {}", link.mtu)
                }
                Some(_) | None => chain(&error),
            };
            anyhow!(
                "XDP cannot be used on {}: {reason}; launch without XDP (TC is the default)",
                link.name
            )
        })
    }

    fn attach_xdp_link(&mut self, link: &Link, pins: &Pins) -> Result<(), ProgramError> {
        let program: &mut Xdp =
            self.ebpf.program_mut(FROM_UNDERLAY_XDP).ok_or(ProgramError::NotLoaded)?.try_into()?;
        let pin = Pin::Link { ifindex: link.index, program: FROM_UNDERLAY_XDP.into() };
        let path = pins.path(&pin);
        if let Some(old) = pinned(&path)? {
            match XdpLink::try_from(old)
                .map_err(link_error)
                .and_then(|old| program.attach_to_link(old))
            {
                Ok(id) => return program.take_link(id).map(drop),
                Err(error) => {
                    debug!(%error, interface = link.name, "a pinned link is no longer usable")
                }
            }
            pins.remove(&pin)?;
        }
        let id = program.attach_to_if_index(link.index.get(), XdpMode::Driver)?;
        let attached = FdLink::try_from(program.take_link(id)?).map_err(link_error)?;
        attached.pin(&path).map(drop).map_err(|error| io::Error::other(error).into())
    }
}

impl Drop for Programs {
    fn drop(&mut self) {
        if let Some(log) = &self.log {
            log.abort();
        }
    }
}

fn direction(program: &str) -> TcAttachType {
    if program == TO_CONTAINER { TcAttachType::Egress } else { TcAttachType::Ingress }
}

/// Detaches a clsact filter and removes its mark. The qdisc stays.
pub(super) fn detach_filter(name: &str, link: &Link, pins: &Pins) -> Result<()> {
    let filter = Pin::Filter { ifindex: link.index, program: name.into() };
    if !pins.is_there(&filter) {
        return Ok(());
    }
    let (priority, handle) = FILTER;
    let detached =
        SchedClassifierLink::attached(&link.name, direction(name), priority, handle, None)
            .map_err(ProgramError::from)
            .and_then(aya::programs::Link::detach);
    match detached {
        Err(error) if !is_missing(&error) => {
            return Err(error)
                .with_context(|| format!("the filter on {} cannot be removed", link.name));
        }
        Ok(()) | Err(_) => {}
    }
    pins.remove(&filter).context("a marker cannot be removed")
}

fn parse(object: &[u8], pins: &Pins, debug: bool, log: VerifierLogLevel) -> Result<Ebpf> {
    let mut loader = EbpfLoader::new();
    let debug = u8::from(debug);
    loader.verifier_log_level(log).override_global("DEBUG", &debug, false);
    for layout in MAPS {
        loader.map_pin_path(layout.name, pins.map(layout));
    }
    loader.load(object).map_err(|error| {
        if let EbpfError::MapError(_) = &error
            && nix::unistd::geteuid().as_raw() != 0
        {
            return anyhow!("only root can create eBPF maps: run as root");
        }
        anyhow!(error).context("the eBPF maps cannot be created")
    })
}

fn load_program(ebpf: &mut Ebpf, name: &str) -> Result<(), ProgramError> {
    if name == FROM_UNDERLAY_XDP {
        let program: &mut Xdp =
            ebpf.program_mut(name).ok_or(ProgramError::NotLoaded)?.try_into()?;
        return program.load();
    }
    tc(ebpf, name)?.load()
}

fn tc<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier, ProgramError> {
    ebpf.program_mut(name).ok_or(ProgramError::NotLoaded)?.try_into()
}

fn pinned(path: &std::path::Path) -> Result<Option<FdLink>, ProgramError> {
    match PinnedLink::from_pin(path) {
        Ok(link) => Ok(Some(link.into())),
        Err(LinkError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => {
            Ok(None)
        }
        Err(error) => Err(link_error(error)),
    }
}

fn link_error(error: LinkError) -> ProgramError {
    match error {
        LinkError::SyscallError(error) => error.into(),
        other => io::Error::other(other).into(),
    }
}

/// Helpers that the programs call: the helper, its name, and the kernel version that introduced it.
const HELPERS: [(BpfHelper, &str, &str); 4] = [
    (BpfHelper::BPF_FUNC_loop, "bpf_loop", "5.17"),
    (BpfHelper::BPF_FUNC_redirect_neigh, "bpf_redirect_neigh", "5.10"),
    (BpfHelper::BPF_FUNC_redirect_peer, "bpf_redirect_peer", "5.10"),
    (BpfHelper::BPF_FUNC_ktime_get_boot_ns, "bpf_ktime_get_boot_ns", "5.8"),
];

/// Explains why a program was refused: missing privileges, a missing helper, or the last lines of
/// the verifier's log.
fn explain(
    error: ProgramError,
    object: &[u8],
    pins: &Pins,
    debug: bool,
    name: &str,
) -> anyhow::Error {
    if error_number(&error) == Some(libc::EPERM) {
        return anyhow!("only root can load eBPF programs (CAP_BPF, CAP_NET_ADMIN): run as root");
    }
    for (helper, helper_name, version) in HELPERS {
        if matches!(is_helper_supported(ProgramType::SchedClassifier, helper), Ok(false)) {
            return anyhow!(
                "the kernel has no {helper_name} (new in Linux {version}): overnode needs Linux \
                 6.1 or later"
            );
        }
    }
    let log = match parse(object, pins, debug, VerifierLogLevel::DEBUG | VerifierLogLevel::STATS)
        .map(|mut ebpf| load_program(&mut ebpf, name))
    {
        Ok(Err(ProgramError::LoadError { verifier_log, .. })) => verifier_log.to_string(),
        Ok(_) | Err(_) => String::new(),
    };
    debug!(program = name, "verifier log:\n{log}");
    let lines: Vec<&str> = log.lines().collect();
    let end = lines[lines.len().saturating_sub(12)..].join("\n");
    anyhow!(
        "the kernel refused the program {name}: {}\n{end}",
        chain(&error).lines().next().unwrap_or_default()
    )
}

fn refusal(error: ProgramError, name: &str, link: &Link) -> anyhow::Error {
    let reason = match error_number(&error) {
        Some(libc::EPERM) => "permission denied: run as root".to_owned(),
        Some(libc::ENODEV) => "the interface is gone".to_owned(),
        Some(libc::EEXIST) => {
            format!("a filter with handle {:#x} already exists", u32::from(FILTER.1))
        }
        Some(libc::EOPNOTSUPP) => {
            "the kernel has no clsact (CONFIG_NET_SCH_INGRESS, CONFIG_NET_CLS_BPF)".to_owned()
        }
        Some(_) | None => chain(&error),
    };
    anyhow!("the program {name} cannot be attached to {}: {reason}", link.name)
}

fn is_invalid(error: &ProgramError) -> bool {
    matches!(error_number(error), Some(libc::EINVAL | libc::EOPNOTSUPP))
}

fn is_missing(error: &ProgramError) -> bool {
    matches!(error_number(error), Some(libc::ENOENT | libc::EINVAL | libc::ENODEV))
}

/// Returns the error number at the bottom of a chain of errors.
fn error_number(error: &ProgramError) -> Option<i32> {
    if let ProgramError::NetlinkError(error) | ProgramError::TcError(TcError::NetlinkError(error)) =
        error
    {
        return error.raw_os_error();
    }
    // Transparent variants do not appear in the chain of sources.
    if let ProgramError::IOError(error) | ProgramError::TcError(TcError::IoError(error)) = error
        && let Some(number) = error.raw_os_error()
    {
        return Some(number);
    }
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = source {
        if let Some(number) = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
            return Some(number);
        }
        source = error.source();
    }
    None
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let part = error.to_string();
        if !text.contains(&part) {
            text = format!("{text}: {part}");
        }
        source = error.source();
    }
    text
}

/// Forwards the programs' log records to the logger of the `log` crate.
fn read_log(ebpf: &mut Ebpf) -> Option<JoinHandle<()>> {
    let logger = EbpfLogger::init(ebpf).map_err(anyhow::Error::from).and_then(|logger| {
        // SAFETY: the logger owns the descriptor of its map and never changes it.
        unsafe { AsyncFd::register(logger) }.map_err(|error| io::Error::from(error).into())
    });
    let mut logger = match logger {
        Ok(logger) => logger,
        Err(error) => {
            warn!(%error, "the log of the eBPF programs cannot be read");
            return None;
        }
    };
    Some(tokio::spawn(async move {
        while let Ok(mut ready) = logger.readable_mut().await {
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_interface_is_recognized_in_any_error() {
        let gone = || io::Error::from_raw_os_error(libc::ENODEV);
        assert!(is_missing(&ProgramError::IOError(gone())));
        assert!(is_missing(&ProgramError::TcError(TcError::IoError(gone()))));
        assert!(!is_missing(&io::Error::from_raw_os_error(libc::EPERM).into()));
        assert!(!is_missing(&ProgramError::NotLoaded));
    }
}
