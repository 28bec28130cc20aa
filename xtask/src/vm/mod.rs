//! Real kernels: Debian's, booted by QEMU with an initramfs that holds what is to be run.

mod debian;
mod initramfs;
pub(crate) mod kernels;
mod peers;
mod qemu;

use std::{
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use anyhow::{Result, bail, ensure};
use clap::Args;

use crate::{build, setup, sh::say};
use kernels::{Files, Kernel};
use qemu::Timing;

/// Guests at the same time.
const MOST_AT_ONCE: usize = 2;

#[derive(Args)]
pub(crate) struct VmArgs {
    /// One of 5.10, 6.1, 6.12, 7.2; all without it
    #[arg(long, value_parser = kernels::parse)]
    kernel: Option<&'static Kernel>,

    /// Only tests whose name contains this
    #[arg(long)]
    test: Option<String>,

    /// One CPU whose clock counts instructions, for measuring: see docs/OVERHEAD.md
    #[arg(long)]
    icount: bool,

    /// A command to run in the guest instead of the root tests
    #[arg(last = true)]
    command: Vec<String>,
}

pub(crate) fn run(args: &VmArgs) -> Result<()> {
    setup::compiler()?;
    setup::servers()?;
    setup::machines()?;
    let kernels: Vec<&Kernel> = match args.kernel {
        Some(kernel) => vec![kernel],
        None => kernels::MATRIX.iter().collect(),
    };
    let command = if args.command.is_empty() {
        let mut command = vec!["/bin/kernel-tests".to_owned(), "--test-threads=1".to_owned()];
        command.extend(args.test.clone());
        command
    } else {
        args.command.clone()
    };
    let timing = if args.icount { Timing::Instructions } else { Timing::Wall };
    on(&kernels, &command, timing)
}

/// Runs `bench` with these arguments on a kernel whose clock counts instructions. Returns the kernel's
/// release and what was printed.
pub(crate) fn bench(kernel: &Kernel, arguments: &[&str]) -> Result<(String, Vec<String>)> {
    setup::compiler()?;
    setup::servers()?;
    setup::machines()?;
    let mut programs = vec![
        ("bin/socktrace".to_owned(), build::socktrace(true)?),
        ("bin/bench".to_owned(), build::example("bench")?),
    ];
    programs.extend(peers::files()?);
    let files = kernels::fetch(kernel)?;
    let command: Vec<String> =
        std::iter::once("/bin/bench").chain(arguments.iter().copied()).map(str::to_owned).collect();
    let initramfs = initramfs::make(kernel, &files, &programs, &command)?;
    let lines = one(kernel, &files, &initramfs, Timing::Instructions)?;
    Ok((files.release, lines))
}

/// Runs a shell's command with nothing but socktrace on a kernel, and returns what it printed.
pub(crate) fn shell(kernel: &Kernel, command: &str) -> Result<Vec<String>> {
    setup::compiler()?;
    setup::servers()?;
    setup::machines()?;
    let programs = [("bin/socktrace".to_owned(), build::socktrace(true)?)];
    let files = kernels::fetch(kernel)?;
    let command = ["sh", "-c", command].map(str::to_owned);
    let initramfs = initramfs::make(kernel, &files, &programs, &command)?;
    one(kernel, &files, &initramfs, Timing::Wall)
}

/// One root test on a kernel, in an environment, shown as it runs.
pub(crate) fn show(kernel: &'static Kernel, variable: &str, test: &[&str]) -> Result<()> {
    setup::machines()?;
    let words = ["env", variable, "/bin/kernel-tests"].into_iter().chain(test.iter().copied());
    on(&[kernel], &words.map(str::to_owned).collect::<Vec<_>>(), Timing::Wall)
}

/// The root tests on every kernel of the matrix.
pub(crate) fn matrix() -> Result<()> {
    let kernels: Vec<&Kernel> = kernels::MATRIX.iter().collect();
    on(&kernels, &["/bin/kernel-tests".into(), "--test-threads=1".into()], Timing::Wall)
}

fn on(kernels: &[&Kernel], command: &[String], timing: Timing) -> Result<()> {
    let programs = [
        ("bin/socktrace".to_owned(), build::socktrace(true)?),
        ("bin/kernel-tests".to_owned(), build::kernel_tests()?),
        ("bin/load".to_owned(), build::example("load")?),
    ];
    let mut machines = Vec::new();
    for kernel in kernels {
        let files = kernels::fetch(kernel)?;
        let initramfs = initramfs::make(kernel, &files, &programs, command)?;
        machines.push((*kernel, files, initramfs));
    }
    // Guests mostly wait, so two share the machine well.
    let at_once = std::thread::available_parallelism().map_or(1, |n| n.get().min(MOST_AT_ONCE));
    let queue = Mutex::new(machines.into_iter());
    let failed = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                // Not in the loop's head, which would hold the lock until the guest has ended.
                let next = || lock(&queue).next();
                while let Some((kernel, files, initramfs)) = next() {
                    if let Err(error) = one(kernel, &files, &initramfs, timing) {
                        say(format!("-- kernel {}: {error:#}", kernel.name));
                        lock(&failed).push(kernel.name);
                    }
                }
            });
        }
    });
    let failed = lock(&failed).clone();
    if failed.is_empty() {
        return Ok(());
    }
    bail!("failed on {}", failed.join(", "))
}

/// Boots one kernel and returns what its command printed.
fn one(kernel: &Kernel, files: &Files, initramfs: &Path, timing: Timing) -> Result<Vec<String>> {
    let began = Instant::now();
    say(format!("-- kernel {} ({})", kernel.name, files.release));
    let (code, lines) = qemu::boot(kernel, &files.image, initramfs, timing)?;
    let seconds = began.elapsed().as_secs_f64();
    say(format!("-- kernel {} ({}): exit {code} in {seconds:.0} s", kernel.name, files.release));
    ensure!(code == 0, "its command failed with exit code {code}");
    Ok(lines)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
