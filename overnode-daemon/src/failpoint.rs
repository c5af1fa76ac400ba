//! Failpoints in operations that must be atomic. In debug builds, a test can end the process after
//! the nth step, as SIGKILL does, with `OVERNODE_KILL_AT=n`. Release builds only log the steps.

/// Marks the end of a step of an operation such as `launch`, `attach`, `detach` or `reset`.
pub fn reached(name: &'static str) {
    tracing::debug!(step = name, "done");
    #[cfg(debug_assertions)]
    kill_if_asked(name);
}

#[cfg(debug_assertions)]
fn kill_if_asked(name: &'static str) {
    use std::sync::atomic::{AtomicU32, Ordering};

    static STEPS: AtomicU32 = AtomicU32::new(0);
    let step = STEPS.fetch_add(1, Ordering::Relaxed) + 1;
    let asked = std::env::var("OVERNODE_KILL_AT").ok().and_then(|text| text.parse().ok());
    if asked == Some(step) {
        tracing::warn!(step = name, "killing this process, as OVERNODE_KILL_AT asks");
        let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
    }
}
