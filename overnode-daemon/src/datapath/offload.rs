//! Reads and changes interface features through the `SIOCETHTOOL` ioctl
//! (include/uapi/linux/ethtool.h).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _};

use anyhow::{Context as _, Result, bail, ensure};

const SIOCETHTOOL: libc::Ioctl = 0x8946;
const ETHTOOL_GSTRINGS: u32 = 0x1b;
const ETHTOOL_GSSET_INFO: u32 = 0x37;
const ETHTOOL_GFEATURES: u32 = 0x3a;
const ETHTOOL_SFEATURES: u32 = 0x3b;
const ETH_SS_FEATURES: u32 = 4;
const NAME_LEN: usize = 32;

/// Turns off all transmit offloads (segmentation, checksums, scatter-gather), so that every packet
/// leaves complete. Verifies the result.
///
/// # Errors
/// Fails if the interface does not exist, or if its driver keeps an offload on.
pub(super) fn disable_transmit_offloads(interface: &str) -> Result<()> {
    set(interface, is_transmit_offload, false)
        .with_context(|| format!("the transmit offloads of {interface} cannot be turned off"))
}

/// Turns on generic receive offload. On a veth this also turns on NAPI.
///
/// # Errors
/// Fails if the interface does not exist, or if its driver lacks the feature.
pub(super) fn enable_gro(interface: &str) -> Result<()> {
    set(interface, |name| name == "rx-gro", true)
        .with_context(|| format!("GRO of {interface} cannot be turned on"))
}

/// Turns off TCP segmentation offload at the host-side end of a veth, so that the other end does
/// GRO. A veth does GRO on packets from its peer end only while the sending end has this offload
/// off (`veth_skb_is_eligible_for_gro`, Linux 5.13). No large segments are sent through that end.
///
/// # Errors
/// Fails if the interface does not exist, or if its driver keeps the offload on.
pub(super) fn disable_tcp_segmentation(interface: &str) -> Result<()> {
    let is_tcp = |name: &str| name.starts_with("tx-tcp") && name.ends_with("-segmentation");
    set(interface, is_tcp, false)
        .with_context(|| format!("TCP segmentation of {interface} cannot be turned off"))
}

/// Returns true if all transmit offloads of an interface are off, so that every packet leaves
/// complete.
pub(super) fn transmit_offloads_are_off(interface: &str) -> Result<bool> {
    let device = Device::open(interface)?;
    let states = device.features()?;
    Ok(!device
        .names()?
        .iter()
        .zip(states)
        .any(|(name, state)| is_transmit_offload(name) && state.active))
}

fn is_transmit_offload(name: &str) -> bool {
    name.starts_with("tx-checksum")
        || name.starts_with("tx-scatter-gather")
        || name.starts_with("tx-") && name.ends_with("-segmentation")
        || name.starts_with("tx-gso") && name != "tx-gso-robust"
}

fn set(interface: &str, selected: impl Fn(&str) -> bool, on: bool) -> Result<()> {
    let device = Device::open(interface)?;
    let names = device.names()?;
    let wrong = |states: &[State]| -> Vec<usize> {
        (0..names.len().min(states.len()))
            .filter(|index| selected(&names[*index]) && states[*index].active != on)
            .collect()
    };
    let states = device.features()?;
    let change: Vec<usize> =
        wrong(&states).into_iter().filter(|index| states[*index].available).collect();
    if !change.is_empty() {
        device.change(&change, on, states.len())?;
    }
    let left: Vec<&str> =
        wrong(&device.features()?).into_iter().map(|index| names[index].as_str()).collect();
    ensure!(left.is_empty(), "the driver did not change {}", left.join(", "));
    Ok(())
}

#[derive(Clone, Copy)]
struct State {
    available: bool,
    active: bool,
}

struct Device {
    socket: File,
    request: libc::ifreq,
}

impl Device {
    fn open(interface: &str) -> Result<Self> {
        // SAFETY: this is a plain system call, and the descriptor is owned from here on.
        let socket = unsafe {
            match libc::socket(libc::AF_UNIX, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) {
                -1 => return Err(io::Error::last_os_error()).context("a socket cannot be opened"),
                fd => File::from_raw_fd(fd),
            }
        };
        // SAFETY: an all-zero `ifreq` is valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        ensure!(
            interface.len() < request.ifr_name.len(),
            "{interface:?} is too long for an interface name"
        );
        for (place, byte) in request.ifr_name.iter_mut().zip(interface.bytes()) {
            *place = byte as libc::c_char;
        }
        Ok(Self { socket, request })
    }

    /// Issues the ioctl. `words` begins with the command and has room for its answer.
    fn call(&self, words: &mut [u32]) -> io::Result<()> {
        let mut request = self.request;
        request.ifr_ifru.ifru_data = words.as_mut_ptr().cast();
        // SAFETY: the kernel reads and writes within `words`, which each caller sizes for its
        // command.
        match unsafe { libc::ioctl(self.socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }

    fn names(&self) -> Result<Vec<String>> {
        // struct ethtool_sset_info: cmd, reserved, sset_mask (u64), data[].
        let mut info = [ETHTOOL_GSSET_INFO, 0, 1 << ETH_SS_FEATURES, 0, 0];
        self.call(&mut info)?;
        let count = info[4] as usize;
        ensure!(count <= 1024, "the driver reports an implausible number of features: {count}");
        // struct ethtool_gstrings: cmd, string_set, len, data[].
        let mut words = vec![0; 3 + count * NAME_LEN / 4];
        words[..3].copy_from_slice(&[ETHTOOL_GSTRINGS, ETH_SS_FEATURES, count as u32]);
        self.call(&mut words)?;
        let bytes: Vec<u8> = words[3..].iter().flat_map(|word| word.to_ne_bytes()).collect();
        Ok(bytes
            .chunks_exact(NAME_LEN)
            .map(|name| name.split(|byte| *byte == 0).next().unwrap_or_default())
            .map(|name| String::from_utf8_lossy(name).into_owned())
            .collect())
    }

    fn features(&self) -> Result<Vec<State>> {
        const BLOCKS: usize = 32;
        // struct ethtool_gfeatures: cmd, size, {available, requested, active, never_changed}[].
        let mut words = [0; 2 + 4 * BLOCKS];
        words[..2].copy_from_slice(&[ETHTOOL_GFEATURES, BLOCKS as u32]);
        self.call(&mut words)?;
        let bit = |word: u32, bit: u32| word >> bit & 1 == 1;
        Ok(words[2..]
            .chunks_exact(4)
            .take(words[1] as usize)
            .flat_map(|block| {
                let [available, _, active, fixed] = [block[0], block[1], block[2], block[3]];
                (0..32).map(move |n| State {
                    available: bit(available & !fixed, n),
                    active: bit(active, n),
                })
            })
            .collect())
    }

    fn change(&self, indexes: &[usize], on: bool, features: usize) -> Result<()> {
        let blocks = features.div_ceil(32);
        // struct ethtool_sfeatures: cmd, size, {valid, requested}[].
        let mut words = vec![0; 2 + 2 * blocks];
        words[..2].copy_from_slice(&[ETHTOOL_SFEATURES, blocks as u32]);
        for index in indexes {
            let (block, bit) = (2 + index / 32 * 2, 1 << (index % 32));
            let Some([valid, requested]) = words.get_mut(block..block + 2) else {
                bail!("feature {index} is unknown")
            };
            *valid |= bit;
            if on {
                *requested |= bit;
            }
        }
        self.call(&mut words).context("ETHTOOL_SFEATURES failed")
    }
}
