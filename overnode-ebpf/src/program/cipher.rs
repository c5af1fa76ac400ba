//! Sealing and opening in packet memory: drives [`overnode_ebpf::aead`] with one `bpf_loop`.
//!
//! The packet must be linear and writable as far as the tag's end (`bpf_skb_pull_data`), its
//! checksums finished. Pointers into it are taken anew in each iteration; those that the caller
//! holds stay good, for nothing here moves data.

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

use super::{GO_ON, STOP};

/// Largest offset into a packet that a text may reach, as a mask that the verifier understands;
/// jumbo frames have 9000 bytes. What is longer is refused as malformed.
const OFFSET_MASK: usize = 0x3fff;

/// Memory for messages in work on this CPU. More than one, because a program that runs in a
/// process's context (BPF_PROG_TEST_RUN, before kernel 6.11) can be interrupted by one that
/// receives.
#[map]
static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(SCRATCHES, 0);
const SCRATCHES: u32 = 2;

/// Memory for one message.
#[repr(C, align(8))]
pub struct Scratch {
    busy: u64,
    /// Set by an iteration that found the packet to end too early.
    short: u64,
    /// Of the text, from the packet's first byte. This and the length are here and not in the
    /// [`Job`], so that the verifier forgets what it knows of them: else it would follow every
    /// iteration once for each combination of headers.
    offset: u64,
    /// Of the text, without the tag.
    len: u64,
    cipher: Cipher,
    /// The tag that came with a message being opened.
    claimed: [u64; 2],
    /// See [`Claimed::packet`].
    packet: [u64; (PACKET_LEN + IPV4_LEN).div_ceil(8)],
}

/// Bytes of a packet that [`Claimed::packet`] has room for, a power of two.
pub const PACKET_LEN: usize = 256;

/// A packet of some program type: the context that the kernel handed to the program.
pub trait Packet: Copy {
    /// Address of the first byte.
    fn data(self) -> usize;
    /// Address behind the last linear byte.
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

/// Seals `len` bytes at `offset`, in place, with the nonce of WireGuard's data messages, and writes
/// the tag behind them.
///
/// # Errors
/// [`Reason::Malformed`] if text and tag do not lie within the packet's linear part,
/// [`Reason::Helper`] if this CPU has no scratch memory left. The text is garbage then: drop the
/// packet.
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
    // SAFETY: the caller's; the scratch memory is ours.
    unsafe { (*job.cipher()).start(&*key, nonce_words(counter)) };
    job.seal()
}

/// Opens `len` bytes at `offset`, in place; the tag lies behind them, and is gone afterwards.
///
/// # Errors
/// [`Reason::Forged`] if the tag is wrong; otherwise as [`seal`]. The text is garbage then: drop
/// the packet.
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
    // SAFETY: the caller's; the scratch memory is ours.
    unsafe { (*job.cipher()).start(&*key, nonce_words(counter)) };
    job.open()
}

/// One of this CPU's scratch memories, until dropped.
pub struct Claimed(pub *mut Scratch);

impl Claimed {
    /// Takes one.
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

    /// Room for a packet of [`PACKET_LEN`] bytes, and for an IPv4 header more: from behind that
    /// header on, too, as many bytes can be reached.
    #[inline(always)]
    pub fn packet(&self) -> *mut u8 {
        // SAFETY: a live map value, claimed.
        unsafe { (&raw mut (*self.0).packet).cast() }
    }
}

impl Drop for Claimed {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: a live map value, claimed.
        unsafe { (&raw mut (*self.0).busy).write_volatile(0) };
    }
}

/// What the iterations need. On the stack.
#[repr(C)]
pub struct Job<P> {
    /// The packet.
    pub packet: P,
    /// Claimed.
    scratch: *mut Scratch,
}

impl<P: Packet> Job<P> {
    /// A text of `len` bytes at `offset` from the packet's first byte. One at a time for a scratch
    /// memory.
    #[inline(always)]
    pub fn new(packet: P, scratch: &Claimed, offset: u32, len: u32) -> Self {
        // SAFETY: a live map value, claimed.
        unsafe {
            (&raw mut (*scratch.0).offset).write_volatile(offset.into());
            (&raw mut (*scratch.0).len).write_volatile(len.into());
        }
        Self { packet, scratch: scratch.0 }
    }

    #[inline(always)]
    fn len(&self) -> u32 {
        // SAFETY: a live map value, claimed.
        unsafe { (&raw const (*self.scratch).len).read_volatile() as u32 }
    }

    #[inline(always)]
    fn offset(&self) -> u64 {
        // SAFETY: a live map value, claimed.
        unsafe { (&raw const (*self.scratch).offset).read_volatile() }
    }

    /// The scratch memory's cipher, to be started.
    #[inline(always)]
    pub fn cipher(&self) -> *mut Cipher {
        // SAFETY: a live map value, claimed.
        unsafe { &raw mut (*self.scratch).cipher }
    }

    /// Seals under a started cipher.
    #[inline(always)]
    pub fn seal(&self) -> Result<(), Reason> {
        let tag = self.run::<Seal>()?;
        let at = self.tag().ok_or(Reason::Malformed)?;
        // SAFETY: within the packet, as `tag` checked.
        unsafe {
            *at = tag[0];
            *at.add(1) = tag[1];
        }
        Ok(())
    }

    /// Opens under a started cipher.
    #[inline(always)]
    pub fn open(&self) -> Result<(), Reason> {
        let at = self.tag().ok_or(Reason::Malformed)?;
        // SAFETY: within the packet, as `tag` checked; the scratch memory is ours.
        unsafe { (*self.scratch).claimed = [*at, *at.add(1)] };
        let tag = self.run::<Open>()?;
        // SAFETY: the scratch memory is ours.
        if same_tag(tag, unsafe { (*self.scratch).claimed }) { Ok(()) } else { Err(Reason::Forged) }
    }

    /// Authenticates `len` bytes at `offset` as additional data, before sealing or opening under
    /// the same cipher.
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
        // SAFETY: the scratch memory is ours.
        Ok(unsafe { (*self.scratch).cipher.finish(u64::from(self.len())) })
    }

    #[inline(always)]
    fn each(
        &self,
        times: u32,
        body: unsafe extern "C" fn(u32, *mut Self) -> i64,
    ) -> Result<(), Reason> {
        let job: *const Self = self;
        // SAFETY: the callback gets the job that it is made for; the scratch memory is ours.
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

    /// Where the tag lies, if it lies within the packet.
    #[inline(always)]
    fn tag(&self) -> Option<*mut u64> {
        let at = self.packet.data()
            + (black_box(self.offset() as usize + self.len() as usize) & OFFSET_MASK);
        (at + GROUP_LEN <= self.packet.data_end()).then_some(at as *mut u64)
    }

    /// Start of block `index` of the text, end of the packet, and bytes left.
    #[inline(always)]
    fn text(&self, index: u32) -> (*mut u8, *const u8, u32) {
        let start = index * BLOCK_LEN as u32;
        let at =
            self.packet.data() + (black_box(self.offset() as usize + start as usize) & OFFSET_MASK);
        (at as *mut u8, self.packet.data_end() as *const u8, self.len().wrapping_sub(start))
    }
}

unsafe extern "C" fn block<P: Packet, D: Direction>(index: u32, job: *mut Job<P>) -> i64 {
    // SAFETY: `Job::each` passes its job; the scratch memory is claimed; the text ends where the
    // packet does, and the verifier sees each access checked against that.
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
        Ok(()) => GO_ON,
        Err(Short) => {
            scratch.short = 1;
            STOP
        }
    }
}
