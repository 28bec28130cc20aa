//! Booting a kernel.

use std::{
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use super::{
    initramfs::{BEGIN, END},
    kernels::Kernel,
};
use crate::sh::{command, say};

/// A guest that says nothing for so long hangs.
const SILENCE: Duration = Duration::from_secs(240);
const LONGEST: Duration = Duration::from_secs(40 * 60);
/// QEMU's emulator itself kills one boot in about ten of the newest kernels, before anything of ours
/// runs or in the middle of it. Such a death is not ours; three in a row are.
const TRIES: u32 = 3;

/// QEMU 7.2 emulates cmpxchg16b wrongly, and kernels that use it crash (`X86_FEATURE_CX16`, 4 * 32 + 13).
/// Programs may: haproxy does not start without it.
const WITHOUT_CX16: &str = "clearcpuid=141";

/// What the guest's clock counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Timing {
    Wall,
    /// A nanosecond an instruction, on one CPU: the same in every run.
    Instructions,
}

impl Timing {
    fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Wall => &["-accel", "tcg,thread=multi", "-smp", "2"],
            Self::Instructions => &[
                "-accel",
                "tcg,thread=single",
                "-icount",
                "shift=0,sleep=off,align=off",
                "-smp",
                "1",
                "-seed",
                "1",
                "-rtc",
                "base=2026-01-01,clock=vm",
            ],
        }
    }
}

/// Boots, shows what the guest prints, and returns the exit code of its command with that.
pub(super) fn boot(
    kernel: &Kernel,
    image: &Path,
    initramfs: &Path,
    timing: Timing,
) -> Result<(i32, Vec<String>)> {
    for attempt in 1..=TRIES {
        match boot_once(kernel, image, initramfs, timing)? {
            Some(ended) => return Ok(ended),
            None => {
                say(format!("kernel {}: the guest died, try {attempt} of {TRIES}", kernel.name));
            }
        }
    }
    bail!("kernel {}: the guest died {TRIES} times", kernel.name)
}

struct Guest(Child);

impl Drop for Guest {
    fn drop(&mut self) {
        // It has usually ended by itself; then both fail, which is fine.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn boot_once(
    kernel: &Kernel,
    image: &Path,
    initramfs: &Path,
    timing: Timing,
) -> Result<Option<(i32, Vec<String>)>> {
    let mut guest = Guest(
        command("qemu-system-x86_64")
            .args(timing.arguments())
            .args(["-cpu", "max", "-m", "1536"])
            .args(["-nographic", "-no-reboot", "-net", "none"])
            .arg("-kernel")
            .arg(image)
            .arg("-initrd")
            .arg(initramfs)
            .args(["-append", &format!("console=ttyS0 quiet panic=-1 nokaslr {WITHOUT_CX16}")])
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .context("cannot run qemu-system-x86_64")?,
    );
    let stdout = guest.0.stdout.take().context("QEMU has no output")?;
    let (send, lines) = mpsc::channel();
    std::thread::spawn(move || {
        let mut reader = BufReader::new(stdout);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            if send.send(text).is_err() {
                return;
            }
            line.clear();
        }
    });

    let began = Instant::now();
    let mut booting = Some(Vec::new());
    let mut printed = Vec::new();
    loop {
        if began.elapsed() > LONGEST {
            bail!("kernel {}: not done after {} s", kernel.name, LONGEST.as_secs());
        }
        match lines.recv_timeout(SILENCE) {
            Ok(line) => {
                if let Some(code) = line.trim().strip_prefix(END) {
                    return Ok(code.trim().parse().ok().map(|code| (code, printed)));
                }
                if line.trim() == BEGIN {
                    booting = None;
                } else if let Some(lines) = &mut booting {
                    lines.push(printable(&line));
                } else {
                    let line = printable(&line);
                    eprintln!("[{}] {line}", kernel.name);
                    printed.push(line);
                }
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                for line in booting.unwrap_or_default() {
                    eprintln!("[{}] {line}", kernel.name);
                }
                return Ok(None);
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {
                bail!("kernel {}: silent for {} s", kernel.name, SILENCE.as_secs());
            }
        }
    }
}

/// The firmware clears the screen; nobody else's should be.
fn printable(line: &str) -> String {
    line.chars().filter(|c| !c.is_control() || *c == '\t').collect()
}
