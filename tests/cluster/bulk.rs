//! Tests of the bulk path: bulk flows go through workers, and trouble with the workers costs time
//! but no data.

use std::collections::BTreeMap;
use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::capture::Captured;
use lab::flow::{self, Amount, Manner, TcpFlow};
use lab::rough::Roughness;
use lab::{Container, Family, Host, Lab, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::support::{
    TIMEOUT, TOKEN, all_reach_all, counter, ensure_nothing_plain, in_lab, launch_all, one_each,
    serves, wait_for_sessions, wait_for_workers,
};

const PORT: u16 = 6783;
/// Length in bytes of a data message with a full-sized packet over an underlay with an MTU of 1500:
/// header, packet and tag.
const MESSAGE: usize = 16 + 1420 + 16;
const MEGABYTE: u64 = 1_000_000;

fn workers(host: &Host) -> Result<Pid> {
    let status = host.status()?;
    let pid = status["node"]["bulk"]["pid"].as_i64().context("no workers are running")?;
    Ok(Pid::from_raw(i32::try_from(pid)?))
}

/// Returns the number of packets that a host's workers dropped, by reason.
fn drops(host: &Host) -> Result<BTreeMap<String, u64>> {
    // Workers report their counters once a second.
    std::thread::sleep(Duration::from_millis(2200));
    Ok(serde_json::from_value(host.status()?["node"]["bulk"]["drops"].clone())?)
}

/// Runs a test on hosts with one container each, whose workers serve each other.
fn with_workers(
    builder: lab::Builder,
    test: impl FnOnce(&Lab, &[Container]) -> Result<()>,
) -> Result<()> {
    in_lab(builder, |lab| {
        launch_all(lab)?;
        let containers = one_each(lab)?;
        wait_for_workers(lab)?;
        test(lab, &containers)
    })
}

/// Runs `overnode launch` with further options.
fn launch_with(lab: &Lab, host: &Host, options: &[&str]) -> Result<()> {
    let id = host.number.to_string();
    let words = [&["launch", "--id", &id][..], options, &lab.targets()].concat();
    host.overnode_with(&words, &[("OVERNODE_TOKEN", TOKEN)])?.success().map(drop)
}

/// Starts a stream that is large enough for the workers but does not use the whole machine.
fn steady_flow(containers: &[Container]) -> Result<TcpFlow> {
    TcpFlow::start_as(
        &containers[0],
        &containers[1],
        Amount::UntilStopped,
        Manner::Rate(40 * MEGABYTE),
    )
}

/// Checks that a large flow arrives completely, that nothing of it is readable on the underlay, and
/// that no worker drops anything. Returns the capture of the underlay.
fn arrives_intact(lab: &Lab, containers: &[Container]) -> Result<Captured> {
    let capture = lab.capture()?;
    let received = flow::tcp(&containers[0], &containers[1], Amount::Bytes(50 * MEGABYTE + 7))?;
    assert_eq!(received.bytes, 50 * MEGABYTE + 7);
    let captured = capture.stop()?;
    ensure_nothing_plain(&captured)?;
    ensure!(
        drops(lab.host(1))?.is_empty() && drops(lab.host(2))?.is_empty(),
        "workers dropped packets"
    );
    Ok(captured)
}

fn goes_through_the_workers(builder: lab::Builder) -> Result<()> {
    with_workers(builder.hosts(2), |lab, containers| {
        let before = counter(lab.host(1), "bulk-sent")?;
        let captured = arrives_intact(lab, containers)?;
        let sent = counter(lab.host(1), "bulk-sent")? - before;
        ensure!(sent > 300, "the workers got only {sent} packets");
        let bulk = captured.count(|packet| {
            packet.ip.is_some_and(|ip| ip.protocol == lab::pcap::UDP && ip.ports == (PORT, PORT))
        })?;
        ensure!(bulk > 100, "only {bulk} messages of the bulk path were captured");
        Ok(())
    })
}

#[test]
fn a_large_flow_goes_through_the_workers_and_arrives_intact() -> Result<()> {
    goes_through_the_workers(Lab::new("bulk4"))
}

#[test]
fn a_large_flow_goes_through_the_workers_over_ipv6() -> Result<()> {
    goes_through_the_workers(Lab::new("bulk6").family(Family::V6))
}

#[test]
fn a_large_flow_goes_through_the_workers_over_routed_jumbo_frames() -> Result<()> {
    goes_through_the_workers(Lab::new("bulk9000").routed().mtu(9000))
}

/// Turns segmentation offload off in the underlay, so that messages arrive one by one.
fn disable_segmentation_offload(lab: &Lab) -> Result<()> {
    lab.stop_segmenting(false)
}

/// Checks that most messages then go into the receiving worker's receive ring.
fn goes_through_the_receive_ring(builder: lab::Builder, options: &[&str]) -> Result<()> {
    in_lab(builder.hosts(2), |lab| {
        disable_segmentation_offload(lab)?;
        lab.hosts().iter().try_for_each(|host| launch_with(lab, host, options))?;
        let containers = one_each(lab)?;
        wait_for_workers(lab)?;
        arrives_intact(lab, &containers)?;
        let queued = counter(lab.host(2), "bulk-queued")?;
        ensure!(
            queued > 50 * MEGABYTE / 1420 / 2,
            "only {queued} messages came through the receive ring"
        );
        Ok(())
    })
}

#[test]
fn uncoalesced_messages_go_into_the_receive_ring() -> Result<()> {
    goes_through_the_receive_ring(Lab::new("bulkone4"), &[])
}

#[test]
fn uncoalesced_messages_go_into_the_receive_ring_over_ipv6() -> Result<()> {
    goes_through_the_receive_ring(Lab::new("bulkone6").family(Family::V6), &["--bulk-workers", "3"])
}

#[test]
fn uncoalesced_messages_go_into_the_receive_ring_with_xdp() -> Result<()> {
    goes_through_the_receive_ring(Lab::new("bulkonexdp"), &["--interface", "eth0", "--xdp"])
}

/// Workers on either side are killed while they carry a flow. The flow continues in the programs at
/// once, and in new workers later.
#[test]
fn killed_workers_pause_flows_briefly_and_break_no_connection() -> Result<()> {
    workers_are_killed(Lab::new("bulkkill"), |_| Ok(()))
}

/// The messages in the killed workers' receive rings are lost as well.
#[test]
fn killed_workers_break_no_connection_with_uncoalesced_messages() -> Result<()> {
    workers_are_killed(Lab::new("bulkonekill"), disable_segmentation_offload)
}

fn workers_are_killed(builder: lab::Builder, prepare: fn(&Lab) -> Result<()>) -> Result<()> {
    during_a_flow(builder, prepare, |lab, flow| {
        for host in [lab.host(1), lab.host(2)] {
            flow.wait_for(5 * MEGABYTE, TIMEOUT)?;
            let before = workers(host)?;
            kill(before, Signal::SIGKILL)?;
            flow.wait_for(20 * MEGABYTE, TIMEOUT)?;
            eventually(TIMEOUT, || {
                ensure!(workers(host)? != before, "status still shows the killed workers");
                Ok(())
            })?;
            wait_for_workers(lab)?;
        }
        let bulk = counter(lab.host(1), "bulk-sent")?;
        flow.wait_for(20 * MEGABYTE, TIMEOUT)?;
        ensure!(
            counter(lab.host(1), "bulk-sent")? > bulk,
            "the flow does not return to the new workers"
        );
        Ok(())
    })
}

/// Runs `trouble` while the workers carry a flow, which must not stall for long.
fn during_a_flow(
    builder: lab::Builder,
    prepare: fn(&Lab) -> Result<()>,
    trouble: fn(&Lab, &TcpFlow) -> Result<()>,
) -> Result<()> {
    with_workers(builder.hosts(2), |lab, containers| {
        prepare(lab)?;
        let flow = steady_flow(containers)?;
        trouble(lab, &flow)?;
        let received = flow.stop()?;
        // 100 ms, and then the time that TCP needs to notice and to retransmit.
        ensure!(
            received.longest_pause < Duration::from_secs(2),
            "the flow paused for too long: {received:?}"
        );
        Ok(())
    })
}

/// Stopped processes neither respond nor exit.
#[test]
fn hanging_workers_pause_flows_briefly_and_break_no_connection() -> Result<()> {
    workers_are_stopped(Lab::new("bulkstop"), |_| Ok(()))
}

/// Their receive rings fill up in the meantime.
#[test]
fn hanging_workers_break_no_connection_with_uncoalesced_messages() -> Result<()> {
    workers_are_stopped(Lab::new("bulkonestop"), disable_segmentation_offload)
}

fn workers_are_stopped(builder: lab::Builder, prepare: fn(&Lab) -> Result<()>) -> Result<()> {
    during_a_flow(builder, prepare, |lab, flow| {
        for host in [lab.host(1), lab.host(2)] {
            flow.wait_for(5 * MEGABYTE, TIMEOUT)?;
            let pid = workers(host)?;
            kill(pid, Signal::SIGSTOP)?;
            flow.wait_for(20 * MEGABYTE, TIMEOUT)?;
            kill(pid, Signal::SIGCONT)?;
            flow.wait_for(5 * MEGABYTE, TIMEOUT)?;
            wait_for_workers(lab)?;
        }
        Ok(())
    })
}

/// Workers are a process of their own, and the next daemon finds them running.
#[test]
fn workers_survive_a_killed_daemon() -> Result<()> {
    with_workers(Lab::new("bulkdaemon").hosts(2), |lab, containers| {
        let before = lab.hosts().iter().map(workers).collect::<Result<Vec<_>>>()?;
        let flow = steady_flow(containers)?;
        flow.wait_for(5 * MEGABYTE, TIMEOUT)?;
        for host in lab.hosts() {
            host.kill_daemon()?;
            flow.wait_for(20 * MEGABYTE, TIMEOUT)?;
            host.overnode(&["resume"])?.success()?;
            flow.wait_for(5 * MEGABYTE, TIMEOUT)?;
        }
        let received = flow.stop()?;
        ensure!(
            received.longest_pause < Duration::from_millis(500),
            "the flow paused for too long: {received:?}"
        );
        assert_eq!(lab.hosts().iter().map(workers).collect::<Result<Vec<_>>>()?, before);
        wait_for_workers(lab)?;
        for host in lab.hosts() {
            let status = host.status()?;
            let silences: Vec<_> = status["peers"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(|peer| peer["data"]["bulk"]["silences"].as_u64())
                .collect();
            assert_eq!(silences, [0], "{status}");
        }
        Ok(())
    })
}

/// A firewall drops UDP port 6783, first from the beginning, then in the middle of a flow.
#[test]
fn flows_stay_in_the_programs_while_the_bulk_port_is_closed() -> Result<()> {
    in_lab(Lab::new("bulkwall").hosts(2), |lab| {
        let wall = |rule: &str| {
            let host = lab.host(2).netns();
            host.run("nft", &["add", "table", "inet", "wall"])?;
            host.run("nft", &["add chain inet wall in { type filter hook input priority 0; }"])?;
            host.run("nft", &[rule]).map(drop)
        };
        let closed = "add rule inet wall in udp dport 6783 drop";
        wall(closed)?;
        launch_all(lab)?;
        let containers = one_each(lab)?;
        wait_for_sessions(lab)?;
        let received = flow::tcp(&containers[0], &containers[1], Amount::Bytes(20 * MEGABYTE))?;
        assert_eq!(received.bytes, 20 * MEGABYTE);
        assert_eq!(counter(lab.host(1), "bulk-sent")?, 0);

        lab.host(2).netns().run("nft", &["flush", "chain", "inet", "wall", "in"])?;
        eventually(4 * TIMEOUT, || {
            ensure!(
                serves(lab.host(1))? && serves(lab.host(2))?,
                "the workers do not notice the open port"
            );
            Ok(())
        })?;
        let flow = steady_flow(&containers)?;
        flow.wait_for(5 * MEGABYTE, TIMEOUT)?;
        ensure!(counter(lab.host(1), "bulk-sent")? > 0, "the flow stays in the programs");
        wall(closed)?;
        flow.wait_for(20 * MEGABYTE, TIMEOUT)?;
        let received = flow.stop()?;
        ensure!(
            received.longest_pause < Duration::from_secs(2),
            "the flow paused for too long: {received:?}"
        );
        Ok(())
    })
}

/// Returns the data messages that were sent to host2, one datagram each.
fn recorded(lab: &Lab, containers: &[Container]) -> Result<Vec<Vec<u8>>> {
    let capture = lab.host(2).capture()?;
    flow::tcp(&containers[0], &containers[1], Amount::Bytes(3 * MEGABYTE))?;
    let captured = capture.stop()?;
    let target = lab.host(2).address();
    let messages: Vec<Vec<u8>> = captured
        .packets()?
        .iter()
        .filter_map(|packet| packet.ip)
        .filter(|ip| ip.to == target && ip.protocol == lab::pcap::UDP && ip.ports.1 == PORT)
        // The underlay's veths carry batches unsegmented.
        .flat_map(|ip| ip.payload.chunks(MESSAGE).map(<[u8]>::to_vec))
        .filter(|message| message.len() > 64 && message[0] == 4)
        .collect();
    ensure!(messages.len() > 500, "only {} messages were recorded", messages.len());
    Ok(messages)
}

/// Invariant S4: every recorded, changed or forged message that an attacker on the underlay sends
/// is dropped and counted.
#[test]
fn hostile_datagrams_are_dropped_and_counted() -> Result<()> {
    with_workers(Lab::new("bulkhostile").hosts(2), |lab, containers| {
        let messages = recorded(lab, containers)?;
        let target = SocketAddr::new(lab.host(2).address(), PORT);
        let socket = lab.host(1).netns().enter(move || Ok(UdpSocket::bind("0.0.0.0:0")?))?;
        let send = |messages: &mut dyn Iterator<Item = Vec<u8>>| -> Result<u64> {
            let mut sent = 0;
            for message in messages {
                socket.send_to(&message, target)?;
                sent += 1;
                if sent % 64 == 0 {
                    // Send no faster than the receiver reads, because each message must be counted.
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
            Ok(sent)
        };
        let before = drops(lab.host(2))?;
        let delivered = counter(lab.host(2), "bulk-received")?;
        let queued = counter(lab.host(2), "bulk-queued")?;
        let malformed = counter(lab.host(2), "malformed")?;
        let mut rng = StdRng::seed_from_u64(5);

        let replayed = send(&mut messages.iter().chain(messages.iter().rev()).cloned())?;
        let mut flipped = messages.iter().take(2000).map(|message| {
            let mut message = message.clone();
            // Flip a bit after the header. In the header, other reasons may apply first.
            let at = rng.random_range(16..message.len());
            message[at] ^= 1 << rng.random_range(0..8);
            // Use a counter that the receiver has not seen.
            message[12] ^= 1;
            message
        });
        let forged = send(&mut flipped)?;
        let mut cut = messages
            .iter()
            .enumerate()
            .take(400)
            .map(|(at, message)| message[..1 + at % 31].to_vec());
        let truncated = send(&mut cut)?;
        let mut strangers = messages.iter().take(500).map(|message| {
            let mut message = message.clone();
            message[4..8].copy_from_slice(&0xffff_ffff_u32.to_le_bytes());
            message
        });
        let unknown = send(&mut strangers)?;

        let after = drops(lab.host(2))?;
        let more = |reasons: &[&str]| -> u64 {
            let of = |drops: &BTreeMap<String, u64>| {
                reasons.iter().filter_map(|reason| drops.get(*reason)).sum::<u64>()
            };
            of(&after) - of(&before)
        };
        assert_eq!(more(&["replayed", "too-old"]), replayed, "{after:?}");
        assert_eq!(more(&["forged"]), forged, "{after:?}");
        assert_eq!(more(&["unknown-index"]), unknown, "{after:?}");
        // The programs drop messages that are too short to contain a type.
        let malformed = counter(lab.host(2), "malformed")? - malformed;
        assert!(malformed > 0, "{malformed}");
        assert_eq!(more(&["malformed"]) + malformed, truncated, "{after:?}");
        assert_eq!(
            counter(lab.host(2), "bulk-received")?,
            delivered,
            "a hostile datagram was delivered"
        );
        let queued = counter(lab.host(2), "bulk-queued")? - queued;
        ensure!(
            queued > messages.len() as u64,
            "only {queued} of them came through the receive ring"
        );
        let received = flow::tcp(&containers[0], &containers[1], Amount::Bytes(20 * MEGABYTE))?;
        assert_eq!(received.bytes, 20 * MEGABYTE);
        Ok(())
    })
}

#[test]
fn a_node_without_workers_works_with_one_that_has_them() -> Result<()> {
    in_lab(Lab::new("bulkoff").hosts(2), |lab| {
        launch_with(lab, lab.host(1), &["--bulk", "off"])?;
        launch_with(lab, lab.host(2), &["--bulk", "aes", "--bulk-workers", "3"])?;
        let containers = one_each(lab)?;
        all_reach_all(&containers)?;
        for (from, to) in [(0, 1), (1, 0)] {
            let received =
                flow::tcp(&containers[from], &containers[to], Amount::Bytes(10 * MEGABYTE))?;
            assert_eq!(received.bytes, 10 * MEGABYTE);
        }
        let [one, two] = [lab.host(1).status()?, lab.host(2).status()?];
        assert_eq!(one["node"]["bulk"]["pid"], serde_json::Value::Null);
        assert_eq!(
            (&one["node"]["bulk"]["mode"], &one["node"]["bulk"]["workers"]),
            (&"off".into(), &0.into())
        );
        assert_eq!(
            (&two["node"]["bulk"]["mode"], &two["node"]["bulk"]["workers"]),
            (&"aes".into(), &3.into())
        );
        assert_eq!(counter(lab.host(2), "bulk-sent")?, 0);
        Ok(())
    })
}

/// One side has more workers than the other, and several flows go both ways. Each side chose its
/// own cipher.
#[test]
fn different_numbers_of_workers_and_ciphers_work_together() -> Result<()> {
    in_lab(Lab::new("bulkmany").hosts(2), |lab| {
        for (host, bulk, workers) in [(lab.host(1), "chacha", "3"), (lab.host(2), "aes", "2")] {
            launch_with(lab, host, &["--bulk", bulk, "--bulk-workers", workers])?;
        }
        let containers = one_each(lab)?;
        wait_for_workers(lab)?;
        let flows = (0..8)
            .map(|number| {
                let (from, to) = (&containers[number % 2], &containers[1 - number % 2]);
                TcpFlow::start(from, to, Amount::Bytes(20 * MEGABYTE))
            })
            .collect::<Result<Vec<_>>>()?;
        for flow in flows {
            assert_eq!(flow.finish()?.bytes, 20 * MEGABYTE);
        }
        std::thread::sleep(Duration::from_millis(1500));
        for (host, cipher) in [(lab.host(1), "ChaCha20-Poly1305"), (lab.host(2), "AES-256-GCM")] {
            let status = host.status()?;
            let bulk = status["peers"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|peer| &peer["data"]["bulk"])
                .find(|bulk| bulk.is_object())
                .context("no bulk path to the peer")?;
            assert_eq!(bulk["cipher"], cipher);
            for bytes in ["tx_bytes", "rx_bytes"] {
                ensure!(
                    bulk[bytes].as_u64() > Some(40 * MEGABYTE),
                    "{bytes} of {}: {bulk}",
                    host.name
                );
            }
        }
        Ok(())
    })
}

fn sysctl(container: &Container, name: &str, value: &str) -> Result<()> {
    container.run("sysctl", &["-q", "-w", &format!("net.ipv4.{name}={value}")]).map(drop)
}

/// Tries TCP with and without timestamps, window scaling, SACK and ECN, with small segments, and
/// over a lossy underlay.
#[test]
fn tcp_with_every_option_arrives_intact() -> Result<()> {
    with_workers(Lab::new("bulktcp").hosts(2), |lab, containers| {
        let [one, two] = containers else { unreachable!("two were made") };
        let both =
            |name: &str, value: &str| containers.iter().try_for_each(|it| sysctl(it, name, value));
        let transfer = |what: &str| {
            let before = counter(lab.host(1), "bulk-sent")?;
            let received =
                flow::tcp(one, two, Amount::Bytes(20 * MEGABYTE + 3)).context(what.to_owned())?;
            assert_eq!(received.bytes, 20 * MEGABYTE + 3, "{what}");
            ensure!(
                counter(lab.host(1), "bulk-sent")? > before,
                "{what}: the flow stayed in the programs"
            );
            Ok(())
        };
        for (name, usual, unusual) in [
            ("tcp_timestamps", "1", "0"),
            ("tcp_window_scaling", "1", "0"),
            ("tcp_sack", "1", "0"),
            ("tcp_ecn", "2", "1"),
        ] {
            both(name, unusual)?;
            transfer(name)?;
            both(name, usual)?;
        }
        for mss in ["216", "536", "1001"] {
            one.run(
                "ip",
                &[
                    "route",
                    "replace",
                    &two.address().to_string(),
                    "dev",
                    "overnode0",
                    "advmss",
                    mss,
                ],
            )?;
            two.run(
                "ip",
                &[
                    "route",
                    "replace",
                    &one.address().to_string(),
                    "dev",
                    "overnode0",
                    "advmss",
                    mss,
                ],
            )?;
            transfer(&format!("segments of {mss} bytes"))?;
        }
        // One batch in fifty is lost.
        let host = lab.host(2).netns();
        host.run("nft", &["add", "table", "inet", "lossy"])?;
        host.run("nft", &["add chain inet lossy in { type filter hook input priority 0; }"])?;
        host.run("nft", &["add rule inet lossy in udp dport 6783 numgen random mod 50 == 0 drop"])?;
        transfer("a lossy underlay")?;
        host.run("nft", &["delete", "table", "inet", "lossy"])?;
        Ok(())
    })
}

/// The flow has bursts and pauses, so that it changes its path repeatedly. It also has writes of
/// all sizes and urgent bytes.
#[test]
fn a_bursty_flow_stays_in_order() -> Result<()> {
    with_workers(Lab::new("bulkburst").hosts(2), |lab, containers| {
        let [one, two] = containers else { unreachable!("two were made") };
        let amount = Amount::Bytes(40 * MEGABYTE + 1);
        let received = TcpFlow::start_as(one, two, amount, Manner::Moody(7))?.finish()?;
        assert_eq!(received.bytes, 40 * MEGABYTE + 1);
        ensure!(counter(lab.host(1), "bulk-sent")? > 100, "the bursts stayed in the programs");
        ensure!(counter(lab.host(1), "sealed")? > 100, "the programs sealed too little");
        Ok(())
    })
}

/// Messages of both paths are lost, duplicated or delayed. TCP recovers the missing data, and there
/// is no other effect.
#[test]
fn a_rough_underlay_corrupts_nothing() -> Result<()> {
    with_workers(Lab::new("bulkrough").hosts(2), |lab, containers| {
        let [one, two] = containers else { unreachable!("two were made") };
        let roughness =
            Roughness { lost: 0.002, doubled: 0.01, late: 0.01, ..Roughness::default() };
        let wire = lab.roughen(lab.host(2), roughness, 11)?;
        let flows = [(one, two, Manner::Steady), (two, one, Manner::Moody(3))]
            .into_iter()
            .map(|(from, to, manner)| {
                TcpFlow::start_as(from, to, Amount::Bytes(15 * MEGABYTE), manner)
            })
            .collect::<Result<Vec<_>>>()?;
        for flow in flows {
            assert_eq!(flow.finish()?.bytes, 15 * MEGABYTE);
        }
        let done = wire.done();
        ensure!(
            done.lost > 10 && done.doubled > 50 && done.late > 50,
            "the underlay was not rough: {done:?}"
        );
        for host in lab.hosts() {
            ensure!(
                counter(host, "bulk-sent")? > 100,
                "the workers of {} sent too little",
                host.name
            );
        }
        // The replay windows drop the duplicates but not the delayed messages.
        let drops = [drops(lab.host(1))?, drops(lab.host(2))?];
        let replayed: u64 = drops.iter().filter_map(|drops| drops.get("replayed")).sum();
        ensure!((1..=done.doubled).contains(&replayed), "{drops:?}, {done:?}");
        ensure!(
            drops.iter().flat_map(BTreeMap::keys).all(|reason| reason == "replayed"),
            "{drops:?}"
        );
        lab.smooth(lab.host(2), wire)?;
        let received = flow::tcp(one, two, Amount::Bytes(20 * MEGABYTE))?;
        assert_eq!(received.bytes, 20 * MEGABYTE);
        Ok(())
    })
}

/// Workers that are unreachable because their socket is gone are found through their devices.
#[test]
fn reset_ends_unreachable_workers() -> Result<()> {
    in_lab(Lab::new("bulkstray").hosts(2), |lab| {
        launch_all(lab)?;
        wait_for_workers(lab)?;
        let host = lab.host(1);
        let pid = workers(host)?;
        host.kill_daemon()?;
        // systemd does this to the run directory of a stopped unit.
        std::fs::remove_dir_all(host.run_directory())?;
        host.overnode(&["reset", "--force"])?.success()?;
        assert_eq!(host.remains()?, Vec::<String>::new());
        eventually(TIMEOUT, || {
            ensure!(kill(pid, None).is_err(), "the workers still run");
            Ok(())
        })
    })
}
