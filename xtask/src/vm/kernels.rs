//! Which kernels, and where they come from: Debian's packages.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use super::debian::Apt;
use crate::sh::{say, target};

/// A kernel of the matrix.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) name: &'static str,
    suites: &'static [&'static str],
    /// Pattern of the package with the image; `*` stands for a version.
    image: (&'static str, &'static str),
    /// The package with the modules where that is another one.
    modules: Option<(&'static str, &'static str)>,
}

pub(crate) const MATRIX: &[Kernel] = &[
    Kernel {
        name: "5.10",
        suites: &["bullseye"],
        image: ("linux-image-5.10.", "-cloud-amd64"),
        modules: None,
    },
    Kernel {
        name: "6.1",
        suites: &["bookworm", "bookworm-security"],
        image: ("linux-image-6.1.", "-cloud-amd64"),
        modules: None,
    },
    Kernel {
        name: "6.12",
        suites: &["trixie"],
        image: ("linux-image-6.12.", "-cloud-amd64"),
        modules: None,
    },
    Kernel {
        name: "7.2",
        suites: &["sid"],
        image: ("linux-binary-7.2.", "-cloud-amd64"),
        modules: Some(("linux-modules-7.2.", "-cloud-amd64")),
    },
];

pub(crate) fn parse(name: &str) -> Result<&'static Kernel, String> {
    MATRIX.iter().find(|kernel| kernel.name == name).ok_or_else(|| {
        let names: Vec<&str> = MATRIX.iter().map(|kernel| kernel.name).collect();
        format!("the matrix has {}", names.join(", "))
    })
}

/// An unpacked kernel.
#[derive(Debug)]
pub(crate) struct Files {
    pub(crate) image: PathBuf,
    pub(crate) release: String,
    /// The directory with `modules.dep`.
    pub(crate) modules: PathBuf,
}

/// Downloads and unpacks a kernel, unless that was done before.
pub(crate) fn fetch(kernel: &Kernel) -> Result<Files> {
    let home = target().join("vm").join(kernel.name);
    if !home.join("complete").exists() {
        download(kernel, &home).with_context(|| format!("fetching kernel {}", kernel.name))?;
    }
    unpacked(&home.join("root"))
}

/// Where things are in an unpacked package: the image is in `boot`, or beside its modules.
fn unpacked(root: &Path) -> Result<Files> {
    let modules = ["lib/modules", "usr/lib/modules"]
        .into_iter()
        .find_map(|path| fs::read_dir(root.join(path)).ok()?.flatten().next())
        .with_context(|| format!("no modules in {}", root.display()))?;
    let release = modules.file_name().to_string_lossy().into_owned();
    let modules = modules.path();
    let image = [root.join("boot").join(format!("vmlinuz-{release}")), modules.join("vmlinuz")]
        .into_iter()
        .find(|path| path.is_file())
        .with_context(|| format!("no kernel image in {}", root.display()))?;
    Ok(Files { image, release, modules })
}

fn download(kernel: &Kernel, home: &Path) -> Result<()> {
    let apt = Apt::new(home, kernel.suites)?;
    say(format!("fetching Debian's kernel {}", kernel.name));
    let names = apt.names("linux-")?;
    let wanted = std::iter::once(&kernel.image).chain(&kernel.modules);
    let mut packages = Vec::new();
    for (prefix, suffix) in wanted {
        packages.push(
            newest(&names, prefix, suffix)
                .with_context(|| format!("no package {prefix}*{suffix} in {:?}", kernel.suites))?,
        );
    }
    apt.download(&packages)?;
    unpacked(&apt.unpack()?)?;
    fs::write(home.join("complete"), "")?;
    Ok(())
}

/// The highest version of `prefix…suffix`, leaving out variants such as `-rt-` and debug symbols.
fn newest(names: &str, prefix: &str, suffix: &str) -> Option<String> {
    let version = |name: &str| -> Option<Vec<u64>> {
        let middle = name.strip_prefix(prefix)?.strip_suffix(suffix)?;
        let plain = middle.chars().all(|c| c.is_ascii_digit() || ".+-debbpo~".contains(c));
        let numbers = middle.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok());
        plain.then(|| numbers.collect())
    };
    let candidates = names.lines().filter_map(|name| Some((version(name)?, name)));
    candidates.max().map(|(_, name)| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_plain_kernel_is_taken() {
        let names = "linux-image-6.1.0-9-cloud-amd64\nlinux-image-6.1.0-40-cloud-amd64\n\
                     linux-image-6.1.0-41-rt-amd64\nlinux-image-6.1.0-42-cloud-amd64-dbg\n\
                     linux-image-6.1.0-43-cloud-amd64-unsigned\nlinux-image-cloud-amd64\n\
                     linux-image-6.10.1-cloud-amd64\n";
        let check = |prefix, expect: Option<&str>| {
            assert_eq!(newest(names, prefix, "-cloud-amd64").as_deref(), expect);
        };
        check("linux-image-6.1.", Some("linux-image-6.1.0-40-cloud-amd64"));
        check("linux-image-6.10.", Some("linux-image-6.10.1-cloud-amd64"));
        check("linux-image-5.10.", None);
    }
}
