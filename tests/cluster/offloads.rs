//! Tests of checksum and segmentation offloads in every combination inside the containers: all
//! bytes arrive unchanged.

use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::flow::{self, Amount};
use lab::{Container, Family, Lab};

use crate::support::{MILLISECOND, TIMEOUT, all_reach_all, attached, in_lab, launch_all};

const INTERFACE: &str = "overnode0";
const FEATURES: [&str; 4] = ["tx", "sg", "tso", "gso"];

fn set_features(container: &Container, enabled: impl Fn(usize) -> bool) -> Result<()> {
    let mut words = vec!["-K", INTERFACE];
    for (number, feature) in FEATURES.iter().enumerate() {
        words.extend([*feature, if enabled(number) { "on" } else { "off" }]);
    }
    // ethtool reports unsupported combinations as an error but sets the rest.
    let output =
        container.command("ethtool").args(&words).output().context("cannot start ethtool")?;
    ensure!(output.status.code().is_some(), "ethtool was killed");
    Ok(())
}

/// Sends one buffer that the kernel splits into datagrams (`UDP_SEGMENT`), possibly only after it
/// left the container.
///
/// Kernels before 6.11 reject it with EIO if the interface has no checksum offload. Then nothing is
/// sent.
fn send_segmented(from: &Container, to: &Container, checksums: bool) -> Result<()> {
    const SEGMENT: u16 = 1200;
    const SEGMENTS: usize = 40;
    let (source, target) = (from.address(), to.address());
    let ring = to.netns().enter(move || Ok(UdpSocket::bind((target, 0))?))?;
    let outbox = from.netns().enter(move || Ok(UdpSocket::bind((source, 0))?))?;
    ring.set_read_timeout(Some(Duration::from_secs(2)))?;
    let size = libc::c_int::from(SEGMENT);
    // SAFETY: the value outlives the call, and its size is correct.
    let outcome = unsafe {
        libc::setsockopt(
            outbox.as_raw_fd(),
            libc::SOL_UDP,
            libc::UDP_SEGMENT,
            (&raw const size).cast(),
            4,
        )
    };
    ensure!(outcome == 0, "UDP_SEGMENT: {}", std::io::Error::last_os_error());
    let sent: Vec<u8> = (0..SEGMENTS * usize::from(SEGMENT))
        .map(|place| (place as u32).wrapping_mul(2_654_435_761) as u8)
        .collect();
    match outbox.send_to(&sent, ring.local_addr()?) {
        Err(error) if !checksums && error.raw_os_error() == Some(libc::EIO) => return Ok(()),
        outcome => outcome.context("cannot send the buffer of segments")?,
    };
    let mut buffer = vec![0; 65536];
    for (number, expected) in sent.chunks(usize::from(SEGMENT)).enumerate() {
        let (length, _) = ring
            .recv_from(&mut buffer)
            .with_context(|| format!("segment {number} of {SEGMENTS} did not arrive"))?;
        ensure!(buffer[..length] == *expected, "segment {number} arrived changed");
    }
    Ok(())
}

fn every_combination(builder: lab::Builder) -> Result<()> {
    in_lab(builder.hosts(2), |lab| {
        launch_all(lab)?;
        let one = attached(lab.host(1), "one")?;
        let neighbor = attached(lab.host(1), "neighbor")?;
        let far = attached(lab.host(2), "far")?;
        one.reach(far.address(), TIMEOUT)?;
        for combination in 0..1 << FEATURES.len() {
            let enabled = |number: usize| combination & (1 << number) != 0;
            for container in [&one, &neighbor, &far] {
                set_features(container, enabled)?;
            }
            let attempt = || -> Result<()> {
                for to in [&far, &neighbor] {
                    flow::tcp(&one, to, Amount::Bytes(1_500_003))?;
                    flow::tcp(to, &one, Amount::Bytes(1_500_003))?;
                    send_segmented(&one, to, enabled(0))?;
                }
                let datagrams = flow::udp(&one, &far, 50, 1300, MILLISECOND)?;
                ensure!(datagrams.received == 50 && datagrams.corrupt == 0, "{datagrams:?}");
                Ok(())
            };
            attempt().with_context(|| {
                let on: Vec<_> =
                    (0..FEATURES.len()).filter(|it| enabled(*it)).map(|it| FEATURES[it]).collect();
                format!("with {on:?} on and the rest off")
            })?;
        }
        all_reach_all(&[one, neighbor, far])
    })
}

#[test]
fn offloads_in_every_combination_over_ipv4() -> Result<()> {
    every_combination(Lab::new("offloads4"))
}

#[test]
fn offloads_in_every_combination_over_ipv6() -> Result<()> {
    every_combination(Lab::new("offloads6").family(Family::V6))
}
