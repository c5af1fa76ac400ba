//! Lets tests run any ChaCha20-Poly1305 vector in the kernel through BPF_PROG_TEST_RUN. Never
//! attached.
//!
//! The packet contains, in this order:
//!
//! 1. 14 bytes in place of an Ethernet header
//! 2. action (u32: 0 seals, 1 opens)
//! 3. length of the additional data, in bytes (u32)
//! 4. length of the payload, in bytes (u32)
//! 5. nonce (12 bytes)
//! 6. key (32 bytes)
//! 7. additional data, padded to a multiple of 16 bytes
//! 8. payload
//! 9. tag, or 16 bytes of room for it
//!
//! All numbers are little-endian. The verdict is 0, or 1 plus the reason code.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::bpf_skb_pull_data;
use overnode_ebpf::aead::GROUP_LEN;
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::ETHERNET_LEN;

use super::cipher::{Claimed, Job, Packet};

/// Offset of the additional data.
const BODY: u32 = (ETHERNET_LEN + size_of::<Request>()) as u32;
const OPEN: u32 = 1;

#[repr(C)]
struct Request {
    action: u32,
    aad_len: u32,
    ciphertext_len: u32,
    nonce: [u32; 3],
    key: [u32; 8],
}

/// Seals or opens as the packet requests.
#[inline(always)]
pub fn aead_check(skb: *mut __sk_buff) -> i32 {
    match check(skb) {
        Ok(()) => 0,
        Err(reason) => 1 + reason as i32,
    }
}

#[inline(always)]
fn check(skb: *mut __sk_buff) -> Result<(), Reason> {
    // SAFETY: calls a helper with the program's own context.
    if unsafe { bpf_skb_pull_data(skb, (*skb).len) } != 0 {
        return Err(Reason::Helper);
    }
    let at = skb.data() + ETHERNET_LEN;
    if at + size_of::<Request>() > skb.data_end() {
        return Err(Reason::Malformed);
    }
    // SAFETY: inside the packet, as just checked.
    let request = unsafe { &*(at as *const Request) };
    let scratch = Claimed::new()?;
    let aad = Job::new(skb, &scratch, BODY, request.aad_len);
    // SAFETY: a live map value that this program has claimed.
    unsafe { (*aad.cipher()).start(&request.key, request.nonce) };
    let opens = request.action == OPEN;
    if request.aad_len > 0 {
        aad.absorb()?;
    }
    let offset = BODY + request.aad_len.next_multiple_of(GROUP_LEN as u32);
    let text = Job::new(skb, &scratch, offset, request.ciphertext_len);
    if opens { text.open() } else { text.seal() }
}
