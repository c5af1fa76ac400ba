//! Tests against a real TAP device in a network namespace of its own: packets from the kernel can
//! be segmented, and the kernel accepts coalesced packets.

use std::fs::File;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use overnode_bulk_model::{finish, is_right, write_all};
use overnode_daemon::bulk::packet::{GSO_NONE, GSO_TCPV4, GSO_UDP_L4, VNET_HEADER};
use overnode_daemon::bulk::{Coalescer, Segmentation, VnetHeader};

const LONGEST: Duration = Duration::from_secs(20);
/// Bytes that the test sends over TCP.
const STREAM: usize = 1_000_000;
const NAME: &str = "bulk0";

/// Opens a TAP device with vnet headers and all offloads. Its namespace ends with the thread.
fn tap() -> File {
    unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace");
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .expect("/dev/net/tun");
    // SAFETY: an all-zero `ifreq` is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(NAME.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the kernel reads and writes the request, which outlives the call.
    let made = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
    let offloads = libc::TUN_F_CSUM
        | libc::TUN_F_TSO4
        | libc::TUN_F_TSO6
        | libc::TUN_F_TSO_ECN
        | libc::TUN_F_USO4
        | libc::TUN_F_USO6;
    // SAFETY: the argument is a number.
    let set = unsafe {
        libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads))
    };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
    // The other end of the device is a mirror. Packets sent to 10.99.0.2 come back from that
    // address, destined for 10.99.0.1.
    for arguments in [
        "link set lo up",
        "addr add 10.99.0.1/24 dev bulk0",
        "link set bulk0 up",
        "neigh add 10.99.0.2 lladdr 02:00:00:00:00:02 dev bulk0",
    ] {
        let status = Command::new("ip").args(arguments.split(' ')).status().expect("ip");
        assert!(status.success(), "ip {arguments}");
    }
    file
}

/// The other end of the device. It segments the packets that it reads, swaps their addresses,
/// coalesces them, and writes them back. Swapping the addresses changes neither the pseudo-header
/// sum nor the IP header checksum.
struct Mirror {
    tap: File,
    joiner: Coalescer,
    /// Frames with several segments that were read (`segmentation`) and written (`joined`), for TCP
    /// and UDP.
    segmentation: [usize; 2],
    joined: [usize; 2],
}

impl Mirror {
    /// Handles all frames that are pending, at most 64.
    fn turn(&mut self) {
        let mut frame = vec![0; 70_000];
        let mut frames = Vec::new();
        for _ in 0..64 {
            let length = match self.tap.read(&mut frame) {
                Ok(length) => length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("{error}"),
            };
            let vnet = VnetHeader::from_bytes(frame[..VNET_HEADER].try_into().expect("a header"));
            let mut link: [u8; 14] = frame[10..24].try_into().expect("an Ethernet header");
            let packet = &frame[24..length];
            // Skip the kernel's own packets, such as router solicitations.
            if link[12..] != [8, 0] || packet[16..20] != [10, 99, 0, 2] {
                continue;
            }
            let segmentation = Segmentation::new(packet, &vnet).expect("a packet from the kernel");
            let segments = write_all(&segmentation);
            let is_tcp = packet[9] == 6;
            assert_eq!(segmentation.len() > 1, vnet.gso_type != GSO_NONE);
            if segmentation.len() > 1 {
                assert_eq!(vnet.gso_type, if is_tcp { GSO_TCPV4 } else { GSO_UDP_L4 });
                self.segmentation[usize::from(!is_tcp)] += 1;
            }
            let (to, from) = link[..12].split_at_mut(6);
            to.swap_with_slice(from);
            for mut segment in segments {
                assert!(segment.len() <= 1500);
                assert!(is_right(&if segmentation.is_partial() {
                    finish(&segment)
                } else {
                    segment.clone()
                }));
                let (source, destination) = segment[12..20].split_at_mut(4);
                source.swap_with_slice(destination);
                self.joiner.push(
                    link,
                    &segment,
                    segmentation.is_partial(),
                    &mut |frame: &[u8]| frames.push(frame.to_vec()),
                );
            }
        }
        self.joiner.flush(&mut |frame| frames.push(frame.to_vec()));
        for frame in frames {
            assert_eq!(self.tap.write(&frame).expect("the kernel accepts the frame"), frame.len());
            if frame[1] != GSO_NONE {
                self.joined[usize::from(frame[24 + 9] != 6)] += 1;
            }
        }
    }
}

/// A connection from the device's address to the mirror's address comes back as one from the
/// mirror. Both ends are in this namespace.
#[test]
fn super_packets_survive_a_round_trip_through_the_kernel() {
    let tap = tap();
    let mut mirror =
        Mirror { tap, joiner: Coalescer::new(true), segmentation: [0; 2], joined: [0; 2] };
    tcp(&mut mirror);
    udp(&mut mirror);
    assert!(
        mirror.segmentation.iter().chain(&mirror.joined).all(|&count| count > 0),
        "{:?}",
        (mirror.segmentation, mirror.joined)
    );
}

fn tcp(mirror: &mut Mirror) {
    let listener = TcpListener::bind("10.99.0.1:7000").expect("a port");
    listener.set_nonblocking(true).expect("a socket");
    let namespace = File::open("/proc/thread-self/ns/net").expect("this namespace");
    let sent: Vec<u8> = (0..STREAM).map(|at| (at / 7 % 256) as u8).collect();
    let data = sent.clone();
    let sender = std::thread::spawn(move || {
        nix::sched::setns(namespace, CloneFlags::CLONE_NEWNET).expect("the namespace");
        let address = "10.99.0.2:7000".parse().expect("an address");
        TcpStream::connect_timeout(&address, LONGEST)?.write_all(&data)
    });
    let started = Instant::now();
    let mut connection: Option<TcpStream> = None;
    let mut received = Vec::new();
    loop {
        assert!(started.elapsed() < LONGEST, "only {} bytes arrived in time", received.len());
        mirror.turn();
        if let Some(connection) = &mut connection {
            let mut buffer = [0; 65_536];
            match connection.read(&mut buffer) {
                Ok(0) => break,
                Ok(length) => received.extend_from_slice(&buffer[..length]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => panic!("{error}"),
            }
        } else if let Ok((accepted, _)) = listener.accept() {
            accepted.set_nonblocking(true).expect("a socket");
            connection = Some(accepted);
        }
    }
    sender.join().expect("no panic").expect("everything was sent");
    assert!(received == sent);
}

fn udp(mirror: &mut Mirror) {
    let receiver = UdpSocket::bind("10.99.0.1:7001").expect("a port");
    receiver.set_nonblocking(true).expect("a socket");
    let sender = UdpSocket::bind("10.99.0.1:7002").expect("a port");
    let size: libc::c_int = 1000;
    // SAFETY: the option is a number that outlives the call.
    let set = unsafe {
        libc::setsockopt(
            sender.as_raw_fd(),
            libc::SOL_UDP,
            libc::UDP_SEGMENT,
            (&raw const size).cast(),
            size_of_val(&size) as libc::socklen_t,
        )
    };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
    let sent: Vec<u8> = (0..30_500).map(|at| (at / 7 % 256) as u8).collect();
    assert_eq!(sender.send_to(&sent, "10.99.0.2:7001").expect("sent"), sent.len());
    let started = Instant::now();
    let mut received = Vec::new();
    let mut lengths = Vec::new();
    while received.len() < sent.len() {
        assert!(started.elapsed() < LONGEST, "only {} bytes arrived in time", received.len());
        mirror.turn();
        let mut buffer = [0; 2000];
        if let Ok((length, from)) = receiver.recv_from(&mut buffer) {
            assert_eq!(from, "10.99.0.2:7002".parse().expect("an address"));
            received.extend_from_slice(&buffer[..length]);
            lengths.push(length);
        }
    }
    assert!(received == sent);
    assert_eq!((lengths.len(), lengths[0], lengths[30]), (31, 1000, 500));
}
