//! The guest's whole world: busybox, an init, the programs to run, the modules they need.

use std::{
    collections::BTreeSet,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context as _, Result, ensure};

use super::kernels::{Files, Kernel};
use crate::{
    setup::{CLIENTS, PYTHON, SERVERS},
    sh::{command, output, run, target, which},
};

/// What the tests need of the kernel, in the order of loading.
const MODULES: &[&str] =
    &["inet_diag", "tcp_diag", "udp_diag", "unix_diag", "veth", "tun", "mptcp_diag"];

/// Prints what a script of the tests needs of python's library, and what python finds that by: `os` and a
/// directory.
const PYTHON_NEEDS: &str = "\
import _socket, os, sys
for module in sys.modules.values():
    if getattr(module, '__file__', None):
        print(module.__file__)
print(os.path.dirname(os.__file__) + '/lib-dynload')";

/// Printed by `init` at the very end: without it the guest died.
pub(super) const END: &str = "xtask-vm-exit:";

/// Printed by `init` before the command: what comes earlier is the firmware's.
pub(super) const BEGIN: &str = "xtask-vm-begin";

const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/net /dev/pts /tmp /run /etc
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
mount -t tracefs tracefs /sys/kernel/tracing
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup2 /sys/fs/cgroup
for module in $(cat /modules/order); do
    insmod /modules/$module || echo "init: $module was not loaded"
done
[ -e /dev/net/tun ] || mknod /dev/net/tun c 10 200
ip link set lo up
echo 'root:x:0:0:root:/:/bin/sh
nobody:x:65534:65534:nobody:/:/bin/sh' > /etc/passwd
echo 'root:x:0:
nogroup:x:65534:' > /etc/group
export PATH=/bin HOME=/ SOCKTRACE_BIN=/bin/socktrace SOCKTRACE_VM=1 RUST_BACKTRACE=1 NO_COLOR=1
echo "
@BEGIN@"
sh /command
echo "
@END@ $?"
poweroff -f
"#;

pub(super) fn make(
    kernel: &Kernel,
    files: &Files,
    programs: &[(String, PathBuf)],
    arguments: &[String],
) -> Result<PathBuf> {
    let home = target().join("vm").join(kernel.name);
    let tree = home.join("initramfs");
    let _ = fs::remove_dir_all(&tree);
    for directory in ["bin", "proc", "sys", "dev", "modules"] {
        fs::create_dir_all(tree.join(directory))?;
    }
    copy(&which("busybox").context("busybox is not installed")?, &tree.join("bin/busybox"))?;
    for (path, from) in programs {
        copy(from, &tree.join(path))?;
    }
    with_libraries(&which("ss").context("ss is not installed")?, "bin/ss", &tree)?;
    for name in SERVERS.iter().chain(CLIENTS) {
        let program = which(name).with_context(|| format!("{name} is not installed"))?;
        with_libraries(&program, inside(&program), &tree)?;
    }
    python(&tree)?;
    modules(files, &tree)?;
    script(&tree.join("init"), &INIT.replace("@BEGIN@", BEGIN).replace("@END@", END))?;
    script(&tree.join("command"), &shell_line(arguments))?;
    pack(&tree, &home.join("initramfs.cpio"))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(directory) = to.parent() {
        fs::create_dir_all(directory)?;
    }
    fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    Ok(())
}

fn script(path: &Path, text: &str) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// One shell word stays one word.
fn shell_line(arguments: &[String]) -> String {
    let quote = |word: &String| format!("'{}'", word.replace('\'', r"'\''"));
    arguments.iter().map(quote).collect::<Vec<_>>().join(" ") + "\n"
}

/// A program of this machine with the shared libraries it names.
fn with_libraries(program: &Path, to: impl AsRef<Path>, tree: &Path) -> Result<()> {
    copy(program, &tree.join(to))?;
    for line in output(command("ldd").arg(program))?.lines() {
        if let Some(library) = line.split_whitespace().find(|word| word.starts_with('/')) {
            copy(Path::new(library), &tree.join(inside(Path::new(library))))?;
        }
    }
    Ok(())
}

/// A path of this machine below the guest's root.
fn inside(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

/// The interpreter with the least of its library.
fn python(tree: &Path) -> Result<()> {
    let program = Path::new(PYTHON);
    with_libraries(program, inside(program), tree)?;
    let needs = output(command(PYTHON).args(["-I", "-S", "-c", PYTHON_NEEDS]))?;
    for path in needs.lines().map(Path::new) {
        let to = tree.join(inside(path));
        if path.is_dir() {
            fs::create_dir_all(to)?;
        } else {
            copy(path, &to)?;
        }
    }
    Ok(())
}

/// Copies the modules with what they depend on; `order` lists them as they have to be loaded.
fn modules(files: &Files, tree: &Path) -> Result<()> {
    let available = available(&files.modules)?;
    let mut order = Vec::new();
    let mut seen = BTreeSet::new();
    for name in MODULES {
        add(name, &available, &mut order, &mut seen, tree)?;
    }
    fs::write(tree.join("modules/order"), order.join("\n") + "\n")?;
    Ok(())
}

/// Every module file below a directory.
fn available(directory: &Path) -> Result<Vec<PathBuf>> {
    let list = output(command("find").arg(directory).args(["-name", "*.ko*"]))?;
    Ok(list.lines().map(PathBuf::from).collect())
}

fn add(
    name: &str,
    available: &[PathBuf],
    order: &mut Vec<String>,
    seen: &mut BTreeSet<String>,
    tree: &Path,
) -> Result<()> {
    if !seen.insert(name.to_owned()) {
        return Ok(());
    }
    let file = available.iter().find(|path| module_name(path).as_deref() == Some(name));
    // Built into the kernel, or a kernel without it: the tests find out which.
    let Some(file) = file else { return Ok(()) };
    let unpacked = tree.join("modules").join(format!("{name}.ko"));
    if file.extension().is_some_and(|extension| extension == "xz") {
        let output = command("xz").arg("-dc").arg(file).output()?;
        ensure!(output.status.success(), "cannot unpack {}", file.display());
        fs::write(&unpacked, output.stdout)?;
    } else {
        copy(file, &unpacked)?;
    }
    for dependency in dependencies(&fs::read(&unpacked)?) {
        add(&dependency, available, order, seen, tree)?;
    }
    order.push(format!("{name}.ko"));
    Ok(())
}

/// `tcp_diag` of `tcp_diag.ko.xz`; file names use `-` and `_` alike.
fn module_name(path: &Path) -> Option<String> {
    Some(path.file_name()?.to_str()?.split('.').next()?.replace('-', "_"))
}

/// The modules a module needs, from its own information (`depends=a,b`).
fn dependencies(module: &[u8]) -> Vec<String> {
    let start = b"\0depends=";
    let Some(at) = module.windows(start.len()).position(|window| window == start) else {
        return Vec::new();
    };
    let rest = &module[at + start.len()..];
    let end = rest.iter().position(|&byte| byte == 0).unwrap_or(0);
    String::from_utf8_lossy(&rest[..end])
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

/// An uncompressed archive boots fastest.
fn pack(tree: &Path, archive: &Path) -> Result<PathBuf> {
    let list = output(command("find").arg(".").current_dir(tree))?;
    let mut cpio = command("cpio")
        .args(["--quiet", "--create", "--format=newc", "--owner=0:0", "--file"])
        .arg(archive)
        .current_dir(tree)
        .stdin(Stdio::piped())
        .spawn()
        .context("cannot run cpio")?;
    cpio.stdin.take().context("cpio has no input")?.write_all(list.as_bytes())?;
    ensure!(cpio.wait()?.success(), "cpio failed");
    run(command("test").arg("-s").arg(archive))?;
    Ok(archive.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_names_what_it_needs() {
        let check = |bytes: &[u8], expect: &[&str]| assert_eq!(dependencies(bytes), expect);
        check(
            b"x\0license=GPL\0depends=inet_diag,udp-tunnel\0name=y\0",
            &["inet_diag", "udp_tunnel"],
        );
        check(b"x\0depends=\0", &[]);
        check(b"nothing", &[]);
    }

    #[test]
    fn words_survive_the_guest_shell() {
        let words = ["a b", "it's", "$x"].map(str::to_owned);
        assert_eq!(shell_line(&words), "'a b' 'it'\\''s' '$x'\n");
    }
}
