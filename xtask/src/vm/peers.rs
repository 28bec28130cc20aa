//! Other tools to measure: Debian's packages of them, with the libraries of the same release.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::debian::Apt;
use crate::sh::{command, output, say, target, which};

/// Their tree in the guest, for `chroot`.
const TREE: &str = "peers";
const SUITE: &str = "trixie";
const PACKAGES: &[&str] = &["bpftrace", "libbpf-tools"];
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";
const LINKER: &str = "usr/lib64/ld-linux-x86-64.so.2";
const PROGRAMS: &[&str] = &[
    "usr/bin/bpftrace",
    "usr/sbin/tcpsynbl-libbpf",
    "usr/sbin/tcpstates-libbpf",
    "usr/sbin/tcplife-libbpf",
    "usr/sbin/tcptracer-libbpf",
];
const SCRIPTS: &[&str] = &["usr/sbin/tcpaccept.bt", "usr/sbin/tcpsynbl.bt"];

/// What goes into the guest: paths there, and files here.
pub(super) fn files() -> Result<Vec<(String, PathBuf)>> {
    let home = target().join("vm/peers");
    let complete = home.join("complete");
    if !complete.exists() {
        say(format!("fetching {} of Debian {SUITE}", PACKAGES.join(" and ")));
        let apt = Apt::new(&home, &[SUITE])?;
        apt.download_with_dependencies(PACKAGES)?;
        apt.unpack()?;
        std::fs::write(&complete, "")?;
    }
    let root = home.join("root");
    let there = |path: &str| format!("{TREE}/{path}");
    // bpftrace asks a shell where the C compiler has its headers, and crashes without a shell.
    let shell = which("busybox").context("busybox is not installed")?;
    let mut files =
        vec![(there("lib64/ld-linux-x86-64.so.2"), root.join(LINKER)), (there("bin/sh"), shell)];
    for path in PROGRAMS.iter().chain(SCRIPTS) {
        files.push((there(path), root.join(path)));
    }
    for program in PROGRAMS {
        for library in libraries(&root, &root.join(program))? {
            let name = library.file_name().context("a library has a name")?.to_string_lossy();
            files.push((there(&format!("{LIBRARIES}/{name}")), library));
        }
    }
    files.sort();
    files.dedup();
    Ok(files)
}

/// The libraries that a program of the tree finds there.
fn libraries(root: &Path, program: &Path) -> Result<Vec<PathBuf>> {
    let listed = output(
        command(root.join(LINKER))
            .arg("--library-path")
            .arg(root.join(LIBRARIES))
            .arg("--list")
            .arg(program),
    )
    .with_context(|| format!("the libraries of {}", program.display()))?;
    let paths = listed.lines().filter_map(|line| line.split_once("=> ")?.1.split(' ').next());
    Ok(paths.map(PathBuf::from).filter(|path| path.starts_with(root.join(LIBRARIES))).collect())
}
