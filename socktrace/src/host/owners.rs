//! Which processes hold which socket, and what these are part of.

use std::{collections::HashMap, io::Read as _, path::Path, sync::Arc, time::Instant};

use procfs::process::{FDTarget, Process, all_processes_with_root};

use super::{
    cgroup::{Cgroups, Named},
    container::Containers,
    root::Root,
    users::Users,
};
use crate::model::{Container, Owner};

/// More of `/proc/PID/cgroup` is not read: version 1 has a dozen paths of 4096 bytes at most.
const MOST_CGROUP: u64 = 1 << 16;

/// Holders of sockets by the socket's inode.
#[derive(Debug, Default)]
pub struct Owners {
    by_inode: HashMap<u64, Vec<Owner>>,
    processes: HashMap<u32, Holder>,
    users: Users,
    containers: Containers,
    /// Processes whose file descriptors could not be read: their sockets have no owner here.
    pub unreadable: usize,
}

/// A process that holds a socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holder {
    pub exe: Option<String>,
    pub cgroup: Option<String>,
    pub unit: Option<String>,
    pub container: Option<Arc<Container>>,
}

/// What a look at processes finds.
#[derive(Default)]
struct Found {
    by_inode: HashMap<u64, Vec<Owner>>,
    processes: HashMap<u32, (Holder, Vec<Named>)>,
}

impl Owners {
    #[must_use]
    pub fn of(&self, inode: u64) -> &[Owner] {
        self.by_inode.get(&inode).map_or(&[], Vec::as_slice)
    }

    /// A process that holds a socket.
    #[must_use]
    pub fn process(&self, pid: u32) -> Option<&Holder> {
        self.processes.get(&pid)
    }

    /// The name of a user.
    #[must_use]
    pub fn user(&self, uid: u32) -> Option<&str> {
        self.users.name(uid)
    }

    /// Reads the file descriptors of every process. One that ends meanwhile is not an error.
    pub fn read(&mut self, proc: &Path) {
        self.by_inode.clear();
        self.processes.clear();
        self.unreadable = 0;
        let root = Root::of(proc);
        if let Some(root) = &root {
            self.users.refresh(root);
        }
        let Ok(processes) = all_processes_with_root(proc) else {
            return;
        };
        let mut found = Found::default();
        for process in processes.flatten() {
            if found.add(&process).is_err() {
                self.unreadable += 1;
            }
        }
        self.by_inode = found.by_inode;
        for holders in self.by_inode.values_mut() {
            holders.sort();
        }
        self.know(found.processes, root.as_ref());
    }

    /// Looks at one process again, which is quick: the one that opened a new listener.
    pub fn look_at(&mut self, proc: &Path, pid: u32) {
        let mut now = Found::default();
        let process = Process::new_with_root(proc.join(pid.to_string()));
        // A process that ended meanwhile has no sockets.
        let _ = process.and_then(|process| now.add(&process));
        for (inode, holders) in now.by_inode {
            let known = self.by_inode.entry(inode).or_default();
            known.retain(|owner| owner.pid != pid);
            known.extend(holders);
            known.sort();
        }
        self.know(now.processes, Root::of(proc).as_ref());
    }

    fn know(&mut self, found: HashMap<u32, (Holder, Vec<Named>)>, root: Option<&Root>) {
        let now = Instant::now();
        for (pid, (mut holder, containers)) in found {
            // It ended before anything of it was read: another one may hold the socket.
            if holder == Holder::default() {
                continue;
            }
            holder.container = self.containers.of(root, &containers, now);
            self.processes.insert(pid, holder);
        }
    }

    /// Drops the processes that ended from the holders of these sockets; returns whether there were
    /// any.
    pub fn drop_dead(&mut self, proc: &Path, inodes: impl Iterator<Item = u64>) -> bool {
        let mut lives = HashMap::new();
        let mut died = false;
        for inode in inodes {
            let Some(holders) = self.by_inode.get_mut(&inode) else { continue };
            holders.retain(|owner| {
                let check = || proc.join(owner.pid.to_string()).exists();
                let lives = *lives.entry(owner.pid).or_insert_with(check);
                died |= !lives;
                lives
            });
        }
        died
    }
}

impl Found {
    fn add(&mut self, process: &Process) -> procfs::ProcResult<()> {
        let Ok(pid) = u32::try_from(process.pid()) else {
            return Ok(());
        };
        let mut comm = None;
        for fd in process.fd()?.flatten() {
            let FDTarget::Socket(inode) = fd.target else {
                continue;
            };
            let Ok(number) = u32::try_from(fd.fd) else {
                continue;
            };
            let comm = match &comm {
                Some(comm) => comm,
                None => {
                    self.processes.insert(pid, holder(process));
                    comm.insert(process.stat()?.comm)
                }
            };
            let owner = Owner { pid, comm: comm.clone(), fd: number };
            self.by_inode.entry(inode).or_default().push(owner);
        }
        Ok(())
    }
}

/// What a process is part of, as far as it can be read.
fn holder(process: &Process) -> (Holder, Vec<Named>) {
    let cgroups = process.open_relative("cgroup").ok().and_then(|file| {
        let mut text = Vec::new();
        file.take(MOST_CGROUP).read_to_end(&mut text).ok()?;
        Some(Cgroups::parse(&text))
    });
    let cgroups = cgroups.unwrap_or_default();
    let holder = Holder {
        exe: process.exe().ok().map(|path| path.to_string_lossy().into_owned()),
        unit: cgroups.unit(),
        container: None,
        cgroup: cgroups.main.clone(),
    };
    (holder, cgroups.containers())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::root::made::Made;

    const ID: &str = "4f797c539e6c745de61a93ca3ff892358ecbcaccd8414d5db545c38428142970";
    const UID: &str = "7e44ee88-1e65-4a16-8cdf-9a90c819180e";
    const PID: u32 = 812;
    const INODE: u64 = 41231;

    /// `ID`, `UID` and `UID_` (with underscores) stand for the real ones.
    fn fill(text: &str) -> String {
        text.replace("UID_", &UID.replace('-', "_")).replace("UID", UID).replace("ID", ID)
    }

    /// A `/proc` with the first process, whose root the files are below, and one that holds a socket.
    fn host(cgroup: &[u8], files: &[(&str, &str)]) -> Made {
        let made = Made::new();
        let zeros = "0 ".repeat(48);
        for (pid, comm) in [(1, "init"), (PID, "nginx")] {
            made.file(format!("{pid}/stat"), format!("{pid} ({comm}) S 1 {zeros}"));
            made.file(format!("{pid}/cgroup"), cgroup);
            made.link(format!("{pid}/fd/0"), "/dev/null");
        }
        made.link(format!("{PID}/fd/6"), format!("socket:[{INODE}]"));
        made.link(format!("{PID}/fd/7"), "socket:[7]");
        made.link(format!("{PID}/exe"), "/usr/sbin/nginx (deleted)");
        made.file("1/root/etc/passwd", "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33::/:\n");
        for (path, content) in files {
            made.file(format!("1/root/{}", fill(path)), fill(content));
        }
        made
    }

    fn read(made: &Made) -> Owners {
        let mut owners = Owners::default();
        owners.read(&made.0);
        owners
    }

    const DOCKER: &[(&str, &str)] =
        &[("var/lib/docker/containers/ID/config.v2.json", r#"{"Name":"/web","Config":{}}"#)];
    const CRI_DOCKER: &[(&str, &str)] = &[(
        "var/lib/docker/containers/ID/config.v2.json",
        r#"{"Name":"/k8s_nginx_web-0_shop_UID_0","Config":{"Labels":{
            "io.kubernetes.container.name":"nginx","io.kubernetes.pod.name":"web-0",
            "io.kubernetes.pod.namespace":"shop","io.kubernetes.pod.uid":"UID"}}}"#,
    )];
    const CONTAINERD: &[(&str, &str)] = &[(
        "run/containerd/io.containerd.runtime.v2.task/k8s.io/ID/config.json",
        r#"{"ociVersion":"1.1.0","annotations":{"io.kubernetes.cri.container-name":"nginx",
            "io.kubernetes.cri.container-type":"container",
            "io.kubernetes.cri.sandbox-name":"web-0",
            "io.kubernetes.cri.sandbox-namespace":"shop","io.kubernetes.cri.sandbox-uid":"UID"}}"#,
    )];
    const NERDCTL: &[(&str, &str)] = &[(
        "run/containerd/io.containerd.runtime.v2.task/default/ID/config.json",
        r#"{"annotations":{"nerdctl/name":"web","nerdctl/namespace":"default"}}"#,
    )];
    const CRIO: &[(&str, &str)] = &[(
        "run/containers/storage/overlay-containers/ID/userdata/config.json",
        r#"{"annotations":{"io.kubernetes.container.name":"nginx","io.kubernetes.pod.name":"web-0",
            "io.kubernetes.pod.namespace":"shop","io.kubernetes.pod.uid":"UID"}}"#,
    )];
    const PODMAN: &[(&str, &str)] = &[
        (
            "var/lib/containers/storage/overlay-containers/ID/userdata/config.json",
            r#"{"annotations":{"io.container.manager":"libpod"}}"#,
        ),
        (
            "var/lib/containers/storage/overlay-containers/containers.json",
            r#"[{"id":"00","names":["other"]},{"id":"ID","names":["web"],"image":"1f"}]"#,
        ),
    ];
    const PODMAN_RM: &[(&str, &str)] = &[(
        "var/lib/containers/storage/overlay-containers/volatile-containers.json",
        r#"[{"id":"ID","names":["web"]}]"#,
    )];
    const CONTAINER_LOG: &[(&str, &str)] = &[("var/log/containers/web-0_shop_nginx-ID.log", "")];
    const POD_LOG: &[(&str, &str)] = &[("var/log/pods/shop_web-0_UID/nginx/0.log", "")];

    #[test]
    fn containers_of_all_runtimes_drivers_and_versions_have_their_names() {
        // Runtime and, in turn, container, pod and namespace as the files say.
        let check = |path: &str, files: &[(&str, &str)], runtime: Option<&str>, pod: bool| {
            let path = fill(path);
            let v2 = format!("0::{path}\n");
            let v1 = format!("12:pids:{path}\n3:cpu,cpuacct:{path}\n1:name=systemd:{path}\n");
            let hybrid = format!("{v1}0::/system.slice/runtime.service\n");
            for cgroup in [v2, v1, hybrid] {
                let made = host(cgroup.as_bytes(), files);
                let owners = read(&made);
                let container = owners.process(PID).and_then(|process| process.container.clone());
                let name = if pod { "nginx" } else { "web" };
                let expect = Container {
                    id: ID.into(),
                    runtime: None,
                    name: Some(name.into()),
                    pod: pod.then(|| "web-0".into()),
                    pod_uid: pod.then(|| UID.into()),
                    namespace: pod.then(|| "shop".into()),
                };
                let is = container.expect(&cgroup);
                assert_eq!(is.runtime, runtime, "{cgroup}");
                assert_eq!(Container { runtime: None, ..(*is).clone() }, expect, "{cgroup}");
            }
        };
        let (docker, containerd) = (Some("docker"), Some("containerd"));
        let (crio, podman) = (Some("cri-o"), Some("podman"));
        let slice = "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podUID_.slice";
        let cgroupfs = "/kubepods/burstable/podUID";

        check("/system.slice/docker-ID.scope", DOCKER, docker, false);
        check("/docker/ID", DOCKER, docker, false);
        check("/custom/ID", DOCKER, docker, false);
        check(&format!("{slice}/docker-ID.scope"), CRI_DOCKER, docker, true);
        check(&format!("{cgroupfs}/ID"), CRI_DOCKER, docker, true);

        check(&format!("{slice}/cri-containerd-ID.scope"), CONTAINERD, containerd, true);
        check(&format!("{cgroupfs}/ID"), CONTAINERD, containerd, true);
        check(
            "/system.slice/x.service/kubepods-podUID_.slice:cri-containerd:ID",
            CONTAINERD,
            containerd,
            true,
        );
        // Seen from a pod of its own the way leads up first, and the pod is not in it.
        check("/../cri-containerd-ID.scope", CONTAINERD, containerd, true);
        check("/system.slice/nerdctl-ID.scope", NERDCTL, containerd, false);
        check("/default/ID", NERDCTL, containerd, false);

        check(&format!("{slice}/crio-ID.scope"), CRIO, crio, true);
        check(&format!("{slice}/crio-ID.scope/container"), CRIO, crio, true);
        check(&format!("{cgroupfs}/crio-ID"), CRIO, crio, true);

        check("/machine.slice/libpod-ID.scope", PODMAN, podman, false);
        check("/machine.slice/libpod-ID.scope/container", PODMAN, podman, false);
        check("/libpod_parent/libpod-ID", PODMAN, podman, false);
        check("/machine.slice/libpod-ID.scope", PODMAN_RM, podman, false);
        check("/system.slice/web.service/libpod-payload-ID", PODMAN_RM, podman, false);

        for (path, runtime) in [
            (format!("{slice}/cri-containerd-ID.scope"), containerd),
            (format!("{slice}/crio-ID.scope"), crio),
            (format!("{slice}/docker-ID.scope"), docker),
            (format!("{cgroupfs}/ID"), None),
            (format!("{cgroupfs}/crio-ID"), crio),
        ] {
            check(&path, CONTAINER_LOG, runtime, true);
            check(&path, POD_LOG, runtime, true);
        }
    }

    #[test]
    fn a_holder_is_known_by_what_proc_says_of_it() {
        let made = host(b"0::/system.slice/system-web.slice/web@a\\x2db.service/worker\n", &[]);
        let mut owners = read(&made);
        let expect = Owner { pid: PID, comm: "nginx".into(), fd: 6 };
        assert_eq!(owners.of(INODE), std::slice::from_ref(&expect));
        let holder = Holder {
            exe: Some("/usr/sbin/nginx (deleted)".into()),
            cgroup: Some("/system.slice/system-web.slice/web@a\\x2db.service/worker".into()),
            unit: Some("web@a\\x2db.service".into()),
            container: None,
        };
        assert_eq!(owners.process(PID), Some(&holder));
        // One that holds no socket is not looked at any further.
        assert_eq!(owners.process(1), None);
        assert_eq!([0, 33, 34].map(|uid| owners.user(uid)), [Some("root"), Some("www-data"), None]);
        assert_eq!(owners.unreadable, 0);

        made.link(format!("{PID}/fd/8"), "socket:[8]");
        owners.look_at(&made.0, PID);
        assert_eq!(owners.of(8), [Owner { fd: 8, ..expect }]);
        // It ended.
        std::fs::remove_dir_all(made.0.join(PID.to_string())).unwrap();
        owners.look_at(&made.0, PID);
        assert!(owners.drop_dead(&made.0, [INODE].into_iter()));
        assert_eq!(owners.of(INODE), []);
        owners.read(&made.0);
        assert_eq!((owners.process(PID), owners.unreadable), (None, 0));
    }

    #[test]
    fn what_cannot_be_read_is_unknown() {
        let made = host(b"", &[]);
        for file in ["cgroup", "exe"] {
            std::fs::remove_file(made.0.join(PID.to_string()).join(file)).unwrap();
        }
        std::fs::remove_file(made.0.join("1/root/etc/passwd")).unwrap();
        let owners = read(&made);
        assert_eq!(owners.of(INODE).len(), 1);
        assert_eq!(owners.process(PID), None);
        assert_eq!(owners.user(0), None);
    }

    #[test]
    fn hostile_cgroups_are_taken_as_they_are() {
        let odd = b"0::/system.slice/x\\x2d\x1b[31m\xff\xfe.service/docker-../../../etc/x.scope\n";
        let made = host(odd, DOCKER);
        let owners = read(&made);
        let holder = owners.process(PID).unwrap();
        assert_eq!(holder.unit.as_deref(), Some("x\\x2d\u{1b}[31m\u{fffd}\u{fffd}.service"));
        assert_eq!(holder.container, None);
        let short = format!("0::/docker/{}\n", &ID[1..]);
        assert_eq!(read(&host(short.as_bytes(), DOCKER)).process(PID).unwrap().container, None);
        let endless = ["0::/".to_owned(), "x/".repeat(1 << 20)].concat();
        let made = host(endless.as_bytes(), DOCKER);
        let length = read(&made).process(PID).unwrap().cgroup.as_ref().map(String::len);
        assert!(length.is_some_and(|length| length < 1 << 17));
    }
}
