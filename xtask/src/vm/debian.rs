//! Debian's packages of any release, downloaded and unpacked, never installed, with package lists of
//! their own: the machine's are left alone.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use crate::sh::{command, output, run};

/// Apt with everything it knows in one directory.
pub(super) struct Apt {
    home: PathBuf,
    options: Vec<String>,
}

impl Apt {
    /// Empties the directory and fetches the lists of these releases.
    pub(super) fn new(home: &Path, suites: &[&str]) -> Result<Self> {
        let _ = fs::remove_dir_all(home);
        for directory in ["lists/partial", "cache/archives/partial", "debs", "root"] {
            fs::create_dir_all(home.join(directory))?;
        }
        // Nothing is installed, as far as this apt knows.
        fs::write(home.join("status"), "")?;
        let (main, security) = mirrors()?;
        let mut sources = String::new();
        for suite in suites {
            let mirror = if suite.ends_with("-security") { &security } else { &main };
            let Some(mirror) = mirror else { continue };
            sources.push_str(&format!("deb {mirror} {suite} main\n"));
        }
        fs::write(home.join("sources.list"), sources)?;
        let apt = Self { home: home.to_owned(), options: options(home)? };
        run(command("apt-get").args(&apt.options).arg("update"))?;
        Ok(apt)
    }

    /// The names of packages that begin so, a line each.
    pub(super) fn names(&self, prefix: &str) -> Result<String> {
        output(command("apt-cache").args(&self.options).args(["pkgnames", prefix]))
    }

    /// These packages alone.
    pub(super) fn download(&self, packages: &[String]) -> Result<()> {
        run(command("apt-get")
            .args(&self.options)
            .arg("download")
            .args(packages)
            .current_dir(self.home.join("debs")))
    }

    /// These packages and all they depend on.
    pub(super) fn download_with_dependencies(&self, packages: &[&str]) -> Result<()> {
        run(command("apt-get")
            .args(&self.options)
            .args(["install", "--yes", "--no-install-recommends", "--download-only"])
            .args(packages))
    }

    /// Unpacks what was downloaded and returns where.
    pub(super) fn unpack(&self) -> Result<PathBuf> {
        let root = self.home.join("root");
        for directory in ["debs", "cache/archives"] {
            for deb in fs::read_dir(self.home.join(directory))? {
                let deb = deb?.path();
                if deb.extension().is_some_and(|extension| extension == "deb") {
                    run(command("dpkg").arg("-x").arg(deb).arg(&root))?;
                }
            }
        }
        Ok(root)
    }
}

fn options(home: &Path) -> Result<Vec<String>> {
    let home = home.to_str().context("the target directory's path is not UTF-8")?;
    Ok([
        format!("Dir::Etc::sourcelist={home}/sources.list"),
        "Dir::Etc::sourceparts=/dev/null".to_owned(),
        format!("Dir::State::Lists={home}/lists"),
        format!("Dir::State::status={home}/status"),
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
        bail!("this machine's apt sources name no mirror of Debian to take packages from");
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
    fn both_formats_of_apt_sources_are_read() {
        let text = "# deb http://no.example/debian x main\ndeb http://a.example/debian y main\n";
        assert_eq!(addresses(text), ["http://a.example/debian"]);
        let text = "Types: deb\nURIs: http://b.example/debian\nSuites: z\n";
        assert_eq!(addresses(text), ["http://b.example/debian"]);
    }
}
