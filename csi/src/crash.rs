//! Places where the tests end the process, to see that the next start puts things right.

/// In tests: ends the process at the n-th point, n from `CARPORT_CRASH_AT`.
#[cfg(test)]
pub(crate) fn point(name: &str) {
    use std::sync::atomic::{AtomicUsize, Ordering};
    static PASSED: AtomicUsize = AtomicUsize::new(0);
    let passed = PASSED.fetch_add(1, Ordering::Relaxed) + 1;
    if std::env::var("CARPORT_CRASH_AT").is_ok_and(|at| at == passed.to_string()) {
        eprintln!("crash at {passed}: {name}");
        // As SIGKILL does: no destructor, no handler.
        let _ =
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}

#[cfg(not(test))]
#[inline(always)]
pub(crate) fn point(_name: &str) {}
