//! Tests that kill the daemon after each step of `launch`, `attach`, `detach` and `reset` in turn.
//! Repeating the command completes the half-done work, and `reset` removes it.
//!
//! Daemons of development builds support `OVERNODE_KILL_AT=n`: they send themselves SIGKILL after
//! the nth step.

use std::os::unix::process::ExitStatusExt;

use anyhow::{Context, Result, bail, ensure};
use lab::{Host, Lab};

use crate::cleanliness::ensure_clean;
use crate::support::{TIMEOUT, TOKEN, attached, in_lab, list};

/// An upper limit for the number of steps.
const LIMIT: usize = 100;
/// A lower limit for the number of steps. If there are fewer, the variable has no effect.
const LEAST: usize = 3;

/// Returns true if the daemon was killed, and false if there are fewer steps.
fn launch_and_die(host: &Host, step: usize) -> Result<bool> {
    let step = step.to_string();
    let outcome = host.overnode_with(
        &["launch", "--id", "1", "--token", TOKEN],
        &[("OVERNODE_KILL_AT", &step)],
    )?;
    if outcome.status.success() {
        ensure!(host.daemon_pid().is_some(), "launch succeeded but no daemon runs");
        return Ok(false);
    }
    // The command cleans up after the daemon with the same steps, so it may also have
    // killed itself.
    if outcome.status.signal() != Some(libc::SIGKILL) {
        outcome.failure(1)?;
    }
    ensure!(host.daemon_pid().is_none(), "the daemon still runs");
    Ok(true)
}

/// Kills the daemon after each step, runs `repair`, and then expects a clean host. `repair` ends
/// with a reset.
fn at_every_step(name: &str, repair: impl Fn(&Host) -> Result<()>) -> Result<()> {
    in_lab(Lab::new(name).hosts(1), |lab| {
        let host = lab.host(1);
        let mut steps = 0;
        while launch_and_die(host, steps + 1)? {
            steps += 1;
            repair(host).with_context(|| format!("killed after step {steps} of launch"))?;
            ensure_clean(host).with_context(|| format!("killed after step {steps} of launch"))?;
            ensure!(steps < LIMIT, "launch has too many steps");
        }
        ensure!(steps >= LEAST, "only {steps} steps: does the daemon support OVERNODE_KILL_AT?");
        Ok(())
    })
}

#[test]
fn resetting_again_completes_a_killed_reset() -> Result<()> {
    in_lab(Lab::new("crash-in-reset").hosts(1), |lab| {
        let host = lab.host(1);
        let mut killed = 0;
        for step in 1..LIMIT {
            if launch_and_die(host, step)? {
                host.overnode(&["reset", "--force"])?;
                continue;
            }
            let container = host.container("c")?;
            // The daemon continues to count its steps.
            if !host.overnode(&["attach", &container.target()])?.status.success() {
                host.overnode(&["reset", "--force"])?.success()?;
                ensure_clean(host).with_context(|| format!("killed after step {step}"))?;
                let left = container.netns().interfaces()?;
                ensure!(
                    left.is_empty(),
                    "killed after step {step}: {left:?} is left in the container"
                );
                continue;
            }
            if host.overnode(&["reset", "--force"])?.status.success() {
                ensure_clean(host)?;
                ensure!(killed > 0, "no reset was killed");
                return Ok(());
            }
            killed += 1;
            host.overnode(&["reset", "--force"])?.success()?;
            ensure_clean(host).with_context(|| format!("killed after step {step}"))?;
            let left = container.netns().interfaces()?;
            ensure!(left.is_empty(), "killed after step {step}: {left:?} is left in the container");
        }
        bail!("reset has too many steps")
    })
}

#[test]
fn reset_removes_the_remains_of_a_killed_launch() -> Result<()> {
    at_every_step("crash-reset", |host| {
        // If the identity was not on disk yet, there may be nothing to reset.
        let outcome = host.overnode(&["reset"])?;
        if outcome.status.success() { Ok(()) } else { outcome.failure(1).map(drop) }
    })
}

#[test]
fn launching_again_completes_a_killed_launch() -> Result<()> {
    at_every_step("crash-launch", |host| {
        host.overnode(&["launch", "--id", "1", "--token", TOKEN])?.success()?;
        let container = attached(host, "c")?;
        ensure!(host.status()?["node"]["state"] == "running");
        drop(container);
        host.overnode(&["reset", "--force"])?.success().map(drop)
    })
}

/// Kills the daemon after each step of `attach` and of `detach`. The restarted node must know the
/// actual state and continue from there.
#[test]
fn repeating_a_killed_attach_or_detach_completes_it() -> Result<()> {
    in_lab(Lab::new("crash-attach").hosts(1), |lab| {
        let host = lab.host(1);
        let (mut in_attach, mut in_detach) = (0, 0);
        for step in 1..LIMIT {
            if launch_and_die(host, step)? {
                host.overnode(&["reset", "--force"])?;
                continue;
            }
            let container = host.container("c")?;
            let target = container.target();
            let attached = host.overnode(&["attach", &target])?.status.success();
            let detached = attached && host.overnode(&["detach", &target])?.status.success();
            if detached {
                ensure!(
                    in_attach >= LEAST && in_detach >= LEAST,
                    "{in_attach} steps, {in_detach} steps"
                );
                return Ok(());
            }
            let repair = || -> Result<()> {
                if host.daemon_pid().is_none() {
                    host.overnode(&["resume"])?.success()?;
                }
                let is_attached = !list(&host.status()?, "endpoints")?.is_empty();
                let plugged_in = container.netns().interfaces()?;
                ensure!(
                    is_attached != plugged_in.is_empty(),
                    "attached: {is_attached}, interfaces: {plugged_in:?}"
                );
                if is_attached {
                    host.detach(&container)?;
                }
                // The first address is free again, and an attachment with a chosen address works
                // completely.
                host.overnode(&["attach", &target, "--ip", "10.32.0.9/12"])?.success()?;
                let neighbor = host.container("n")?;
                host.attach(&neighbor, &[])?;
                neighbor.reach("10.32.0.9".parse()?, TIMEOUT)?;
                host.detach(&container)?;
                ensure!(
                    container.netns().interfaces()?.is_empty(),
                    "detached but still plugged in"
                );
                host.detach(&neighbor)?;
                host.overnode(&["reset"])?.success()?;
                ensure_clean(host)
            };
            repair().with_context(|| format!("killed after step {step}"))?;
            *(if attached { &mut in_detach } else { &mut in_attach }) += 1;
        }
        bail!("detach has too many steps")
    })
}
