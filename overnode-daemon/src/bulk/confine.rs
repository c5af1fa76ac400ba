//! Drops the privileges of the workers' process before its first packet arrives: all capabilities,
//! and all system calls except those that move packets. An attacker who takes the process over with
//! a packet can open no file, make no connection and start no program.

use std::collections::BTreeMap;
use std::ffi::CString;

use anyhow::{Context as _, Result};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter,
};

use super::process::NAME;

/// System calls on descriptors that are already open.
const DESCRIPTOR_CALLS: [libc::c_long; 13] = [
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_getsockopt,
    libc::SYS_close,
    // Accepts a new daemon on the listening socket that the process was given.
    libc::SYS_accept4,
];

/// System calls on the process itself: memory, time, threads, exit.
const PROCESS_CALLS: [libc::c_long; 18] = [
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_restart_syscall,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_getrandom,
    libc::SYS_geteuid,
    libc::SYS_gettid,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Drops all capabilities for good. `main` has already made the process untraceable.
///
/// # Errors
/// Fails if the kernel refuses.
pub(crate) fn drop_privileges() -> Result<()> {
    nix::sys::prctl::set_name(&CString::new(NAME)?).context("the process cannot be named")?;
    for set in [
        caps::CapSet::Ambient,
        caps::CapSet::Inheritable,
        caps::CapSet::Effective,
        caps::CapSet::Permitted,
    ] {
        caps::clear(None, set).context("capabilities cannot be dropped")?;
    }
    nix::sys::prctl::set_no_new_privs().context("no_new_privs cannot be set")
}

/// Blocks all system calls that the calling thread does not need (`seccomp(2)`), for good. Blocked
/// calls fail with `EPERM`.
///
/// # Errors
/// Fails if the kernel has no system call filters (`CONFIG_SECCOMP_FILTER`), or refuses.
pub(crate) fn install_seccomp() -> Result<()> {
    let filter: BpfProgram = SeccompFilter::new(
        rules()?,
        SeccompAction::Errno(libc::EPERM as u32),
        SeccompAction::Allow,
        std::env::consts::ARCH.try_into()?,
    )?
    .try_into()?;
    apply_filter(&filter).context("system calls cannot be restricted (seccomp)")
}

fn rules() -> Result<BTreeMap<i64, Vec<SeccompRule>>> {
    let mut rules: BTreeMap<_, _> =
        DESCRIPTOR_CALLS.into_iter().chain(PROCESS_CALLS).map(|call| (call, Vec::new())).collect();
    // Memory must not be executable. The third argument holds the protection.
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        let is_no_code = SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64);
        let condition = SeccompCondition::new(2, SeccompCmpArgLen::Dword, is_no_code, 0)?;
        rules.insert(call, vec![SeccompRule::new(vec![condition])?]);
    }
    Ok(rules)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{ErrorKind, Read as _, Write as _};
    use std::net::{TcpStream, UdpSocket};
    use std::os::unix::net::UnixStream;
    use std::process::Command;

    use super::*;

    /// A filter applies to one thread, so the test spawns its own.
    #[test]
    fn a_confined_thread_moves_bytes_and_does_nothing_else() {
        std::thread::spawn(|| {
            let (mut one, mut other) = UnixStream::pair().unwrap();
            let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
            udp.connect(udp.local_addr().unwrap()).unwrap();
            install_seccomp().unwrap();

            one.write_all(b"packet").unwrap();
            let mut got = [0; 6];
            other.read_exact(&mut got).unwrap();
            udp.send(&got).unwrap();
            assert_eq!(udp.recv(&mut got).unwrap(), 6);
            let much = vec![7_u8; 64 << 20];
            assert_eq!(much.iter().map(|byte| u64::from(*byte)).sum::<u64>(), 7 * (64 << 20));

            let refused = [
                File::open("/dev/null").map(drop),
                std::fs::remove_file("/nowhere/at/all"),
                TcpStream::connect("127.0.0.1:9").map(drop),
                UnixStream::connect("/nowhere/at/all").map(drop),
                UdpSocket::bind("127.0.0.1:0").map(drop),
                Command::new("/bin/true").status().map(drop),
                std::thread::Builder::new().spawn(|| ()).map(drop),
            ];
            for (number, refused) in refused.into_iter().enumerate() {
                let kind = refused.map_err(|error| error.kind());
                assert_eq!(kind, Err(ErrorKind::PermissionDenied), "{number}");
            }
            // SAFETY: the call requests a new page that nothing uses.
            let code = unsafe {
                let rights = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
                let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                libc::mmap(std::ptr::null_mut(), 4096, rights, kind, -1, 0)
            };
            assert_eq!(code, libc::MAP_FAILED);
        })
        .join()
        .unwrap();
    }
}
