//! Seals and opens messages in packet memory. Drives [`overnode_ebpf::aead`] with one `bpf_loop`.
//!
//! The packet must be linear and writable up to the end of the tag (`bpf_skb_pull_data`), and its
//! checksums complete. Every iteration computes its pointers into the packet again. Pointers that
//! the caller holds stay valid, because nothing here moves data.

use core::ffi::c_void;
use core::hint::black_box;
use core::intrinsics::{AtomicOrdering, atomic_xchg};

use aya_ebpf::bindings::{__sk_buff, xdp_md};
use aya_ebpf::helpers::bpf_loop;
use aya_ebpf::macros::map;
use aya_ebpf::maps::PerCpuArray;
use overnode_ebpf::aead::{
    BLOCK_LEN, Cipher, Direction, GROUP_LEN, Open, Seal, Short, nonce_words, same_tag,
};
use overnode_ebpf::reason::Reason;
use overnode_ebpf::wire::IPV4_LEN;

use super::{CONTINUE, STOP};

/// Largest offset in a packet that the payload may reach, as a mask that the verifier understands.
/// Jumbo frames have 9000 bytes. Longer packets are refused as malformed.
const OFFSET_MASK: usize = 0x3fff;

/// Memory for the messages that this CPU is processing. More than one is needed: a program that
/// runs in process context (BPF_PROG_TEST_RUN, before Linux 6.11) can be interrupted by a program
/// that receives.
#[map]
static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(SCRATCHES, 0);
const SCRATCHES: u32 = 2;

/// Scratch memory for one message.
#[repr(C, align(8))]
pub struct Scratch {
    busy: u64,
    /// 1 if an iteration found that the packet ends too early.
    short: u64,
    /// Offset of the payload from the packet's first byte. Offset and length are here and not in
    /// the [`Job`], so that the verifier forgets what it knows about them. Otherwise, it would
    /// follow every iteration once for each combination of headers.
    offset: u64,
    /// Length of the payload in bytes, without the tag.
    len: u64,
    cipher: Cipher,
    /// The received tag of a message being opened.
    claimed: [u64; 2],
    /// See [`Claimed::packet`].
    packet: [u64; (PACKET_LEN + IPV4_LEN).div_ceil(8)],
}

/// Size in bytes of a packet that fits [`Claimed::packet`], a power of two.
pub const PACKET_LEN: usize = 256;

/// A packet of one program type: the context that the kernel passed to the program.
pub trait Packet: Copy {
    /// Returns the address of the first byte.
    fn data(self) -> usize;
    /// Returns the address after the last linear byte.
    fn data_end(self) -> usize;
}

impl Packet for *mut __sk_buff {
    #[inline(always)]
    fn data(self) -> usize {
        // SAFETY: the verifier knows that this is the context.
        unsafe { (*self).data as usize }
    }

    #[inline(always)]
    fn data_end(self) -> usize {
        // SAFETY: as above.
        unsafe { (*self).data_end as usize }
    }
}

impl Packet for *mut xdp_md {
    #[inline(always)]
    fn data(self) -> usize {
        // SAFETY: the verifier knows that this is the context.
        unsafe { (*self).data as usize }
    }

    #[inline(always)]
    fn data_end(self) -> usize {
        // SAFETY: as above.
        unsafe { (*self).data_end as usize }
    }
}

/// Seals `len` bytes at `offset` in place, with the nonce of WireGuard's data messages, and writes
/// the tag after them.
///
/// # Errors
/// [`Reason::Malformed`] if payload and tag are not inside the packet's linear part,
/// [`Reason::Helper`] if this CPU has no scratch memory left. On an error, the payload is garbage:
/// drop the packet.
///
/// # Safety
/// `key` must be valid for reads.
#[inline(always)]
pub unsafe fn seal<P: Packet>(
    packet: P,
    key: *const [u32; 8],
    counter: u64,
    offset: u32,
    len: u32,
) -> Result<(), Reason> {
    let scratch = Claimed::new()?;
    let job = Job::new(packet, &scratch, offset, len);
    // SAFETY: upheld by the caller; this program has claimed the scratch memory.
    unsafe { (*job.cipher()).start(&*key, nonce_words(counter)) };
    job.seal()
}

/// Opens `len` bytes at `offset` in place. The tag must follow them, and may be overwritten.
///
/// # Errors
/// [`Reason::Forged`] if the tag is wrong; otherwise as for [`seal`]. On an error, the payload is
/// garbage: drop the packet.
///
/// # Safety
/// `key` must be valid for reads.
#[inline(always)]
pub unsafe fn open<P: Packet>(
    packet: P,
    key: *const [u32; 8],
    counter: u64,
    offset: u32,
    len: u32,
) -> Result<(), Reason> {
    let scratch = Claimed::new()?;
    let job = Job::new(packet, &scratch, offset, len);
    // SAFETY: upheld by the caller; this program has claimed the scratch memory.
    unsafe { (*job.cipher()).start(&*key, nonce_words(counter)) };
    job.open()
}

/// A scratch memory of this CPU, claimed until it is dropped.
pub struct Claimed(pub *mut Scratch);

impl Claimed {
    /// Claims a scratch memory.
    ///
    /// # Errors
    /// [`Reason::Helper`] if none is free.
    #[inline(always)]
    pub fn new() -> Result<Self, Reason> {
        for index in 0..SCRATCHES {
            let Some(scratch) = SCRATCH.get_ptr_mut(index) else { continue };
            // SAFETY: a live map value.
            let busy = unsafe {
                atomic_xchg::<u64, { AtomicOrdering::SeqCst }>(&raw mut (*scratch).busy, 1)
            };
            if busy == 0 {
                return Ok(Self(scratch));
            }
        }
        Err(Reason::Helper)
    }

    /// Returns room for a packet of [`PACKET_LEN`] bytes plus an IPv4 header. So [`PACKET_LEN`]
    /// bytes can also be accessed starting after that header.
    #[inline(always)]
    pub fn packet(&self) -> *mut u8 {
        // SAFETY: a live map value that this program has claimed.
        unsafe { (&raw mut (*self.0).packet).cast() }
    }
}

impl Drop for Claimed {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: a live map value that this program has claimed.
        unsafe { (&raw mut (*self.0).busy).write_volatile(0) };
    }
}

/// State of the iterations, on the stack.
#[repr(C)]
pub struct Job<P> {
    /// The packet.
    pub packet: P,
    /// The claimed scratch memory.
    scratch: *mut Scratch,
}

impl<P: Packet> Job<P> {
    /// Describes a payload of `len` bytes at `offset` from the packet's first byte. A scratch
    /// memory serves one job at a time.
    #[inline(always)]
    pub fn new(packet: P, scratch: &Claimed, offset: u32, len: u32) -> Self {
        // SAFETY: a live map value that this program has claimed.
        unsafe {
            (&raw mut (*scratch.0).offset).write_volatile(offset.into());
            (&raw mut (*scratch.0).len).write_volatile(len.into());
        }
        Self { packet, scratch: scratch.0 }
    }

    #[inline(always)]
    fn len(&self) -> u32 {
        // SAFETY: a live map value that this program has claimed.
        unsafe { (&raw const (*self.scratch).len).read_volatile() as u32 }
    }

    #[inline(always)]
    fn offset(&self) -> u64 {
        // SAFETY: a live map value that this program has claimed.
        unsafe { (&raw const (*self.scratch).offset).read_volatile() }
    }

    /// Returns the cipher of the scratch memory, to be started by the caller.
    #[inline(always)]
    pub fn cipher(&self) -> *mut Cipher {
        // SAFETY: a live map value that this program has claimed.
        unsafe { &raw mut (*self.scratch).cipher }
    }

    /// Seals with a started cipher.
    #[inline(always)]
    pub fn seal(&self) -> Result<(), Reason> {
        let tag = self.run::<Seal>()?;
        let at = self.tag().ok_or(Reason::Malformed)?;
        // SAFETY: inside the packet, as `tag` checked.
        unsafe {
            *at = tag[0];
            *at.add(1) = tag[1];
        }
        Ok(())
    }

    /// Opens with a started cipher.
    #[inline(always)]
    pub fn open(&self) -> Result<(), Reason> {
        let at = self.tag().ok_or(Reason::Malformed)?;
        // SAFETY: inside the packet, as `tag` checked; this program has claimed the scratch memory.
        unsafe { (*self.scratch).claimed = [*at, *at.add(1)] };
        let tag = self.run::<Open>()?;
        // SAFETY: this program has claimed the scratch memory.
        if same_tag(tag, unsafe { (*self.scratch).claimed }) { Ok(()) } else { Err(Reason::Forged) }
    }

    /// Authenticates `len` bytes at `offset` as additional data. Call it before sealing or opening
    /// with the same cipher.
    #[inline(always)]
    pub fn absorb(&self) -> Result<(), Reason> {
        self.each(1, block::<P, Seal>)?;
        self.each(self.len().div_ceil(BLOCK_LEN as u32), absorb::<P>)
    }

    #[inline(always)]
    fn run<D: Direction>(&self) -> Result<[u64; 2], Reason> {
        if self.offset() + u64::from(self.len()) > OFFSET_MASK as u64 {
            return Err(Reason::Malformed);
        }
        self.each(1 + self.len().div_ceil(BLOCK_LEN as u32), block::<P, D>)?;
        // SAFETY: this program has claimed the scratch memory.
        Ok(unsafe { (*self.scratch).cipher.finish(u64::from(self.len())) })
    }

    #[inline(always)]
    fn each(
        &self,
        times: u32,
        body: unsafe extern "C" fn(u32, *mut Self) -> i64,
    ) -> Result<(), Reason> {
        let job: *const Self = self;
        // SAFETY: the callback gets a job of its own type; this program has claimed the scratch
        // memory.
        unsafe {
            (*self.scratch).short = 0;
            let done = bpf_loop(times, body as *mut c_void, job.cast_mut().cast(), 0);
            if done == i64::from(times) && (*self.scratch).short == 0 {
                Ok(())
            } else {
                Err(Reason::Malformed)
            }
        }
    }

    /// Returns a pointer to the tag, or `None` if the tag is not inside the packet.
    #[inline(always)]
    fn tag(&self) -> Option<*mut u64> {
        let at = self.packet.data()
            + (black_box(self.offset() as usize + self.len() as usize) & OFFSET_MASK);
        (at + GROUP_LEN <= self.packet.data_end()).then_some(at as *mut u64)
    }

    /// Returns the start of block `index` of the payload, the end of the packet, and the number of
    /// bytes left.
    #[inline(always)]
    fn text(&self, index: u32) -> (*mut u8, *const u8, u32) {
        let start = index * BLOCK_LEN as u32;
        let at =
            self.packet.data() + (black_box(self.offset() as usize + start as usize) & OFFSET_MASK);
        (at as *mut u8, self.packet.data_end() as *const u8, self.len().wrapping_sub(start))
    }
}

unsafe extern "C" fn block<P: Packet, D: Direction>(index: u32, job: *mut Job<P>) -> i64 {
    // SAFETY: `Job::each` passes its job; the scratch memory is claimed. The end of the memory is
    // the end of the packet, and the verifier sees that each access is checked against it.
    unsafe {
        let (job, scratch) = (&*job, &mut *(*job).scratch);
        let done = scratch.cipher.block::<D>(index, || job.text(index - 1));
        verdict(scratch, done)
    }
}

unsafe extern "C" fn absorb<P: Packet>(index: u32, job: *mut Job<P>) -> i64 {
    // SAFETY: as in `block`.
    unsafe {
        let (job, scratch) = (&*job, &mut *(*job).scratch);
        let (aad, end, left) = job.text(index);
        let done = scratch.cipher.absorb(aad, end, left);
        verdict(scratch, done)
    }
}

#[inline(always)]
fn verdict(scratch: &mut Scratch, done: Result<(), Short>) -> i64 {
    match done {
        Ok(()) => CONTINUE,
        Err(Short) => {
            scratch.short = 1;
            STOP
        }
    }
}
