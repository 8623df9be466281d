//! Whether the clock is kept right: certificates, pins and reservations go by it.
#![allow(unsafe_code, reason = "a raw system call")]

use std::time::{Duration, SystemTime};

use super::Check;

/// 2025-01-01: before that, no certificate in use is valid.
const LONG_AGO: Duration = Duration::from_secs(1_735_689_600);

pub(super) fn look() -> Check {
    let now = SystemTime::now();
    let advice = "let chrony, systemd-timesyncd or the hypervisor set the node's clock: certificates and \
                  the ends of pins and reservations go by it";
    if now < SystemTime::UNIX_EPOCH + LONG_AGO {
        let message = format!("it is {}, says the clock", crate::output::time(now));
        return Check::fail("clock", message, advice);
    }
    match is_synchronised() {
        Ok(true) => Check::ok("clock", "synchronised, says the kernel"),
        Ok(false) => Check::warn("clock", "nobody keeps it right, says the kernel", advice),
        // Containers may not be allowed to ask.
        Err(error) => {
            Check::ok("clock", format!("plausible; the kernel does not tell more ({error})"))
        }
    }
}

/// <https://man7.org/linux/man-pages/man2/adjtimex.2.html>
fn is_synchronised() -> std::io::Result<bool> {
    // SAFETY: a struct of integers, for which zero is a value; `modes` of 0 asks and sets nothing.
    let mut timex: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: the struct lives until the call returns, and the kernel writes to nothing else.
    match unsafe { libc::adjtimex(&raw mut timex) } {
        -1 => Err(std::io::Error::last_os_error()),
        state => Ok(state != libc::TIME_ERROR && timex.status & libc::STA_UNSYNC == 0),
    }
}
