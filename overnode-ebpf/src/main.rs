//! The eBPF programs. On the host, this file is an empty `main`, so that `cargo build --workspace`
//! works.
//!
//! | program | attached to | task |
//! | --- | --- | --- |
//! | `from_container` | host end of a container's veth | checks senders, answers ARP, routes |
//! | `seal` | second end of the offload veth | seals packets for peers and sends them |
//! | `from_underlay` | underlay interface | opens messages of peers and delivers the packets |
//! | `from_underlay_xdp` | underlay interface, XDP | the same |
//! | `from_bulk` | TAP device of a bulk worker | delivers the packets that the worker opened |
//! | `to_container` | host end of a container's veth, egress | drops what was not delivered |
//! | `resolver_connect`, `resolver_sendmsg` | all sockets | redirect DNS queries to the node |
//! | `resolver_recvmsg`, `resolver_getpeername` | all sockets | hide the redirection |
//! | `aead_check` | nothing, tests run it | seals or opens a test vector |
//!
//! Unless the table says otherwise, a program is attached to TC ingress. The programs for sockets
//! are attached to the root control group.
#![cfg_attr(
    target_arch = "bpf",
    no_std,
    no_main,
    feature(core_intrinsics),
    allow(internal_features)
)]

#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
mod program;

#[cfg(target_arch = "bpf")]
mod entry {
    use aya_ebpf::macros::{cgroup_sock_addr, classifier, xdp};
    use aya_ebpf::programs::{SockAddrContext, TcContext, XdpContext};
    use overnode_ebpf::map::{
        PROGRAM_FROM_BULK, PROGRAM_FROM_CONTAINER, PROGRAM_FROM_UNDERLAY,
        PROGRAM_FROM_UNDERLAY_XDP, PROGRAM_SEAL, PROGRAM_TO_CONTAINER,
    };

    use crate::program::{
        aead_check, finish, from_bulk, from_container, from_underlay, resolver, seal, to_container,
    };

    #[classifier]
    pub fn from_container(ctx: TcContext) -> i32 {
        let skb = ctx.skb.skb;
        finish::<PROGRAM_FROM_CONTAINER>(skb, from_container::run(skb)) as i32
    }

    #[classifier]
    pub fn seal(ctx: TcContext) -> i32 {
        let skb = ctx.skb.skb;
        finish::<PROGRAM_SEAL>(skb, seal::run(skb)) as i32
    }

    #[classifier]
    pub fn from_underlay(ctx: TcContext) -> i32 {
        let skb = ctx.skb.skb;
        finish::<PROGRAM_FROM_UNDERLAY>(skb, from_underlay::run(skb)) as i32
    }

    #[xdp]
    pub fn from_underlay_xdp(ctx: XdpContext) -> u32 {
        let ctx = ctx.ctx;
        finish::<PROGRAM_FROM_UNDERLAY_XDP>(ctx, from_underlay::run(ctx)) as u32
    }

    #[classifier]
    pub fn from_bulk(ctx: TcContext) -> i32 {
        let skb = ctx.skb.skb;
        finish::<PROGRAM_FROM_BULK>(skb, from_bulk::run(skb)) as i32
    }

    #[classifier]
    pub fn to_container(ctx: TcContext) -> i32 {
        let skb = ctx.skb.skb;
        finish::<PROGRAM_TO_CONTAINER>(skb, to_container::run(skb)) as i32
    }

    /// Lets the system call continue. Programs for sockets return nothing else.
    const CONTINUE: i32 = 1;

    #[cgroup_sock_addr(connect4)]
    pub fn resolver_connect(ctx: SockAddrContext) -> i32 {
        // SAFETY: the kernel passes a valid context to the program.
        unsafe { resolver::redirect(ctx.sock_addr) };
        CONTINUE
    }

    #[cgroup_sock_addr(sendmsg4)]
    pub fn resolver_sendmsg(ctx: SockAddrContext) -> i32 {
        // SAFETY: the kernel passes a valid context to the program.
        unsafe { resolver::redirect(ctx.sock_addr) };
        CONTINUE
    }

    #[cgroup_sock_addr(recvmsg4)]
    pub fn resolver_recvmsg(ctx: SockAddrContext) -> i32 {
        // SAFETY: the kernel passes a valid context to the program.
        unsafe { resolver::restore(ctx.sock_addr) };
        CONTINUE
    }

    #[cgroup_sock_addr(getpeername4)]
    pub fn resolver_getpeername(ctx: SockAddrContext) -> i32 {
        // SAFETY: the kernel passes a valid context to the program.
        unsafe { resolver::restore(ctx.sock_addr) };
        CONTINUE
    }

    #[classifier]
    pub fn aead_check(ctx: TcContext) -> i32 {
        aead_check::aead_check(ctx.skb.skb)
    }
}

/// The license. The kernel offers its GPL-only helpers only to programs that declare a compatible
/// one.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
