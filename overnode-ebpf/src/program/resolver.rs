//! Redirects DNS queries of containers to the node's server.
//!
//! An engine such as Docker runs a resolver at 127.0.0.11 in each of its containers, and it knows
//! only the containers of its own host. In the network namespaces of [`NAMED_NETNS`], sockets that
//! connect or send to it talk to the node's server instead, at [`Resolver::address`]. Answers look
//! as if they came from the engine's resolver, because clients check their source. The node's
//! server asks the engine's resolver about names that are not its own.
//!
//! The programs run for the sockets of all processes of the host. They change nothing while the
//! node's server does not run.
//!
//! [`NAMED_NETNS`]: overnode_ebpf::map::MAPS

use aya_ebpf::bindings::bpf_sock_addr;
use aya_ebpf::helpers::generated::bpf_get_netns_cookie;
use overnode_ebpf::map::{ENGINE_RESOLVER, RESOLVER_MARK, RESOLVER_PORT, Resolver};
use overnode_ebpf::wire::DNS_PORT;

use super::maps;

/// Redirects a socket that connects or sends to the engine's resolver.
///
/// # Safety
/// `ctx` is the context of a program of the types `connect4` or `sendmsg4`.
#[inline(always)]
pub unsafe fn redirect(ctx: *mut bpf_sock_addr) {
    // SAFETY: upheld by the caller.
    unsafe {
        if (*ctx).user_port != port_be(DNS_PORT)
            || (*ctx).user_ip4 != u32::from_ne_bytes(ENGINE_RESOLVER)
            || is_marked(ctx)
        {
            return;
        }
        let Some(resolver) = resolver(ctx) else { return };
        if maps::now() < resolver.alive_until_ns {
            (*ctx).user_ip4 = u32::from_ne_bytes(resolver.address);
            (*ctx).user_port = port_be(RESOLVER_PORT);
        }
    }
}

/// Makes the node's server look like the engine's resolver, to a socket that receives an answer or
/// asks for the name of its peer.
///
/// # Safety
/// `ctx` is the context of a program of the types `recvmsg4` or `getpeername4`.
#[inline(always)]
pub unsafe fn restore(ctx: *mut bpf_sock_addr) {
    // SAFETY: upheld by the caller.
    unsafe {
        if (*ctx).user_port != port_be(RESOLVER_PORT) {
            return;
        }
        let Some(resolver) = resolver(ctx) else { return };
        if (*ctx).user_ip4 == u32::from_ne_bytes(resolver.address) {
            (*ctx).user_ip4 = u32::from_ne_bytes(ENGINE_RESOLVER);
            (*ctx).user_port = port_be(DNS_PORT);
        }
    }
}

/// Returns the node's server if the socket is in one of its network namespaces.
#[inline(always)]
unsafe fn resolver(ctx: *mut bpf_sock_addr) -> Option<Resolver> {
    // SAFETY: upheld by the caller.
    let netns = unsafe { bpf_get_netns_cookie(ctx.cast()) };
    if !maps::is_named(netns) {
        return None;
    }
    maps::resolver()
}

/// Whether the node itself opened the socket, to ask the engine's resolver.
#[inline(always)]
unsafe fn is_marked(ctx: *mut bpf_sock_addr) -> bool {
    // SAFETY: upheld by the caller. The kernel sets the pointer for these types of programs.
    unsafe {
        let socket = (*ctx).__bindgen_anon_1.sk;
        !socket.is_null() && (*socket).mark == RESOLVER_MARK
    }
}

/// Returns a port as the kernel stores it in the context: the first two of four bytes.
#[inline(always)]
const fn port_be(port: u16) -> u32 {
    port.to_be() as u32
}
