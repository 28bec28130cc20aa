//! Which kernels, and where they come from: Debian's packages, downloaded and unpacked, never
//! installed, with package lists of their own.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use crate::sh::{command, output, run, say, target};

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
    let _ = fs::remove_dir_all(home);
    for directory in ["lists/partial", "cache/archives/partial", "debs", "root"] {
        fs::create_dir_all(home.join(directory))?;
    }
    let (main, security) = mirrors()?;
    let mut sources = String::new();
    for suite in kernel.suites {
        let mirror = if suite.ends_with("-security") { &security } else { &main };
        let Some(mirror) = mirror else { continue };
        sources.push_str(&format!("deb {mirror} {suite} main\n"));
    }
    fs::write(home.join("sources.list"), sources)?;
    say(format!("fetching Debian's kernel {}", kernel.name));
    let options = apt_options(home)?;
    run(command("apt-get").args(&options).arg("update"))?;
    let names = output(command("apt-cache").args(&options).args(["pkgnames", "linux-"]))?;
    let wanted = std::iter::once(&kernel.image).chain(&kernel.modules);
    for (prefix, suffix) in wanted {
        let package = newest(&names, prefix, suffix)
            .with_context(|| format!("no package {prefix}*{suffix} in {:?}", kernel.suites))?;
        run(command("apt-get")
            .args(&options)
            .args(["download", &package])
            .current_dir(home.join("debs")))?;
    }
    for deb in fs::read_dir(home.join("debs"))? {
        run(command("dpkg").arg("-x").arg(deb?.path()).arg(home.join("root")))?;
    }
    unpacked(&home.join("root"))?;
    fs::write(home.join("complete"), "")?;
    Ok(())
}

/// Package lists, state and cache of our own: the machine's are left alone.
fn apt_options(home: &Path) -> Result<Vec<String>> {
    let home = home.to_str().context("the target directory's path is not UTF-8")?;
    Ok([
        format!("Dir::Etc::sourcelist={home}/sources.list"),
        "Dir::Etc::sourceparts=/dev/null".to_owned(),
        format!("Dir::State::Lists={home}/lists"),
        format!("Dir::Cache={home}/cache"),
        "APT::Sandbox::User=root".to_owned(),
        "Acquire::Check-Valid-Until=false".to_owned(),
        "Acquire::Retries=3".to_owned(),
    ]
    .into_iter()
    .flat_map(|option| ["-o".to_owned(), option])
    .chain(["-qq".to_owned()])
    .collect())
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

/// The machine's own mirrors of Debian and of its security updates.
fn mirrors() -> Result<(Option<String>, Option<String>)> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    files.extend(
        fs::read_dir("/etc/apt/sources.list.d")
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path()),
    );
    let texts = files.iter().filter_map(|path| fs::read_to_string(path).ok());
    let addresses: Vec<String> = texts.flat_map(|text| addresses(&text)).collect();
    let find = |end: &str| {
        addresses.iter().find(|address| address.trim_end_matches('/').ends_with(end)).cloned()
    };
    let main = find("/debian");
    if main.is_none() {
        bail!("this machine's apt sources name no mirror of Debian to take kernels from");
    }
    Ok((main, find("/debian-security")))
}

/// Addresses in a sources file of either format.
fn addresses(text: &str) -> Vec<String> {
    text.lines()
        .filter(|line| line.starts_with("deb ") || line.starts_with("URIs:"))
        .flat_map(str::split_whitespace)
        .filter(|word| word.contains("://"))
        .map(str::to_owned)
        .collect()
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

    #[test]
    fn both_formats_of_apt_sources_are_read() {
        let text = "# deb http://no.example/debian x main\ndeb http://a.example/debian y main\n";
        assert_eq!(addresses(text), ["http://a.example/debian"]);
        let text = "Types: deb\nURIs: http://b.example/debian\nSuites: z\n";
        assert_eq!(addresses(text), ["http://b.example/debian"]);
    }
}
