//! What the path of a control group says: the systemd unit, and the containers.

/// The control groups of a process, from `/proc/PID/cgroup`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Cgroups {
    /// In the unified hierarchy; on a host that still uses version 1, systemd's.
    pub(super) main: Option<String>,
    /// In the others, each path once.
    others: Vec<String>,
}

/// A container as the path names it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Named {
    pub(super) id: String,
    pub(super) runtime: Option<&'static str>,
    pub(super) pod_uid: Option<String>,
    /// It lies below an ordinary user's own systemd, who may give control groups any name there.
    pub(super) of_user: bool,
}

/// What stands before the id in the name of a container's control group, and whose it is.
const PREFIXES: &[(&str, &str)] = &[
    ("docker", "docker"),
    ("cri-containerd", "containerd"),
    ("nerdctl", "containerd"),
    ("crio", "cri-o"),
    ("libpod", "podman"),
    // Podman below a unit that is the container's (`--cgroups=split`, Quadlet).
    ("libpod-payload", "podman"),
];

/// Where podman's cgroupfs driver puts containers, and pods, whose ids look the same.
const PODMAN_PARENT: &str = "libpod_parent";

/// No more containers within containers are looked at.
const DEEPEST: usize = 4;

impl Cgroups {
    /// The kernel writes paths as they are, but for line breaks, which it refuses (`cgroup_mkdir`).
    pub(super) fn parse(text: &[u8]) -> Self {
        let text = String::from_utf8_lossy(text);
        let lines = text.lines().filter_map(|line| {
            let mut fields = line.splitn(3, ':');
            Some((fields.next()?, fields.next()?, fields.next()?))
        });
        let (mut unified, mut systemd, mut others) = (None, None, Vec::<String>::new());
        for (number, controllers, path) in lines {
            let place = match number {
                "0" => &mut unified,
                _ if controllers.split(',').any(|name| name == "name=systemd") => &mut systemd,
                _ => {
                    if !others.iter().any(|other| other == path) {
                        others.push(path.to_owned());
                    }
                    continue;
                }
            };
            place.get_or_insert_with(|| path.to_owned());
        }
        let (main, other) = match (unified, systemd) {
            (Some(unified), Some(systemd)) if unified == "/" => (Some(systemd), None),
            (Some(unified), systemd) => (Some(unified), systemd),
            (None, systemd) => (systemd, None),
        };
        others.splice(0..0, other);
        Self { main, others }
    }

    /// The containers that the first path with any names, from the outside in.
    pub(super) fn containers(&self) -> Vec<Named> {
        self.main
            .iter()
            .chain(&self.others)
            .map(|path| containers(path))
            .find(|found| !found.is_empty())
            .unwrap_or_default()
    }

    /// The systemd unit, of the user's systemd where that has one.
    pub(super) fn unit(&self) -> Option<String> {
        self.main.as_deref().and_then(unit).map(str::to_owned)
    }
}

/// A path's segments. The kernel marks a group that was removed.
fn segments(path: &str) -> impl Iterator<Item = &str> {
    path.strip_suffix(" (deleted)").unwrap_or(path).split('/')
}

/// systemd takes the first group that is not a slice for the unit (`cg_path_get_unit`).
fn unit(path: &str) -> Option<&str> {
    // Names that the kernel could mistake for a file of its own have a `_` before them
    // (`cg_escape`).
    let mut segments = segments(path).map(|segment| segment.strip_prefix('_').unwrap_or(segment));
    let mut next = || segments.find(|s| !matches!(*s, "" | "..") && !s.ends_with(".slice"));
    let unit = next().filter(|segment| is_unit(segment))?;
    if is_user_manager(unit) {
        return next().filter(|segment| is_unit(segment)).or(Some(unit));
    }
    Some(unit)
}

/// Units that have processes.
fn is_unit(name: &str) -> bool {
    name.rsplit_once('.').is_some_and(|(name, kind)| {
        !name.is_empty() && matches!(kind, "service" | "scope" | "socket" | "mount" | "swap")
    })
}

fn is_user_manager(unit: &str) -> bool {
    unit.starts_with("user@") && unit.ends_with(".service")
}

fn containers(path: &str) -> Vec<Named> {
    let mut found = Vec::new();
    let (mut pod_uid, mut of_user, mut parent) = (None, false, "");
    for segment in segments(path) {
        pod_uid = self::pod_uid(segment).or(pod_uid);
        of_user |= is_user_manager(segment) && segment != "user@0.service";
        if let Some((id, runtime)) = container(segment, parent) {
            let (id, pod_uid) = (id.to_owned(), pod_uid.clone());
            found.push(Named { id, runtime, pod_uid, of_user });
            if found.len() == DEEPEST {
                break;
            }
        }
        parent = segment;
    }
    found
}

/// The id and the runtime, if this group is a container's: `PREFIX-ID.scope` by systemd, `PREFIX-ID`
/// or `ID` by a runtime itself, `SLICE:PREFIX:ID` by one that was given a systemd name and did not
/// know it for one.
fn container<'a>(segment: &'a str, parent: &str) -> Option<(&'a str, Option<&'static str>)> {
    if is_id(segment) {
        let runtime = (parent == "docker").then_some("docker");
        return (parent != PODMAN_PARENT).then_some((segment, runtime));
    }
    let name = segment.strip_suffix(".scope").unwrap_or(segment);
    let (front, id) = name.rsplit_once(['-', ':']).filter(|(_, id)| is_id(id))?;
    let prefix = front.rsplit(':').next().unwrap_or(front);
    let (_, runtime) = PREFIXES.iter().find(|(known, _)| *known == prefix)?;
    Some((id, Some(*runtime)))
}

fn is_id(text: &str) -> bool {
    text.len() == 64 && is_hex(text)
}

fn is_hex(text: &str) -> bool {
    text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// The UID in `pod<uid>`, or in systemd's `kubepods-<class>-pod<uid>.slice`, which has `_` for `-`.
fn pod_uid(segment: &str) -> Option<String> {
    let slice = segment.split(':').next().unwrap_or(segment);
    match slice.strip_suffix(".slice") {
        Some(slice) => {
            let (front, uid) = slice.rsplit_once("-pod")?;
            front.contains("kubepods").then(|| uid.replace('_', "-"))
        }
        None => segment.strip_prefix("pod").map(str::to_owned),
    }
    .filter(|uid| is_pod_uid(uid))
}

/// A UUID, or the hash that the kubelet gives pods from a file.
pub(super) fn is_pod_uid(text: &str) -> bool {
    match text.len() {
        32 => is_hex(text),
        36 => text.split('-').map(str::len).eq([8, 4, 4, 4, 12]) && text.split('-').all(is_hex),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "4f797c539e6c745de61a93ca3ff892358ecbcaccd8414d5db545c38428142970";
    const OTHER: &str = "9ec39b91f3d70e1beff50a308f77067065ea6be0d91a3378375056cd4422cf3d";
    const UID: &str = "7e44ee88-1e65-4a16-8cdf-9a90c819180e";

    /// `ID`, `OTHER`, `UID` and `UID_` (with underscores) stand for the real ones.
    fn fill(path: &str) -> String {
        path.replace("UID_", &UID.replace('-', "_"))
            .replace("UID", UID)
            .replace("OTHER", OTHER)
            .replace("ID", ID)
    }

    #[test]
    fn containers_are_known_by_their_cgroup() {
        let check = |path: &str, runtime: Option<&str>, pod: bool| {
            let found = containers(&fill(path));
            let [one] = found.as_slice() else { panic!("{path}: {found:?}") };
            let is = (one.id.as_str(), one.runtime, one.pod_uid.as_deref());
            assert_eq!(is, (ID, runtime, pod.then_some(UID)), "{path}");
        };
        let (docker, containerd) = (Some("docker"), Some("containerd"));
        let (crio, podman) = (Some("cri-o"), Some("podman"));
        check("/system.slice/docker-ID.scope", docker, false);
        check("/system.slice/docker-ID.scope/init.scope", docker, false);
        check("/system.slice/docker-ID.scope (deleted)", docker, false);
        check("/docker/ID", docker, false);
        check("/docker/ID/system.slice/nginx.service", docker, false);
        check("/../../docker/ID", docker, false);
        check("/custom/ID", None, false);
        check("/ID", None, false);
        check("/default/ID", None, false);
        check("/system.slice/nerdctl-ID.scope", containerd, false);
        check("/user.slice/user-1000.slice/user@1000.service/nerdctl-ID.scope", containerd, false);
        let slice = "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podUID_.slice";
        check(&format!("{slice}/cri-containerd-ID.scope"), containerd, true);
        check(&format!("{slice}/crio-ID.scope"), crio, true);
        check(&format!("{slice}/crio-ID.scope/container"), crio, true);
        check(&format!("{slice}/docker-ID.scope"), docker, true);
        check("/kubepods.slice/kubepods-podUID_.slice/crio-ID.scope", crio, true);
        check(
            "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/\
             kubelet-kubepods-besteffort-podUID_.slice/cri-containerd-ID.scope",
            containerd,
            true,
        );
        check("/kubepods/burstable/podUID/ID", None, true);
        check("/kubepods/podUID/ID/nested/deeper", None, true);
        check("/kubepods/besteffort/podUID/crio-ID", crio, true);
        check("/../../podUID/ID", None, true);
        check("/kubepods-burstable-podUID_.slice:cri-containerd:ID", containerd, true);
        check(
            "/system.slice/containerd.service/kubepods-podUID_.slice:cri-containerd:ID",
            containerd,
            true,
        );
        check("/system.slice:docker:ID", docker, false);
        check("/machine.slice/libpod-ID.scope", podman, false);
        check("/machine.slice/libpod-ID.scope/container", podman, false);
        check("/machine.slice/machine-libpod_pod_OTHER.slice/libpod-ID.scope", podman, false);
        check("/libpod_parent/libpod-ID", podman, false);
        check("/libpod_parent/libpod-ID/ctr", podman, false);
        check("/libpod_parent/OTHER/libpod-ID", podman, false);
        check("/system.slice/web.service/libpod-payload-ID", podman, false);
        check(
            "/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-ID.scope/container",
            podman,
            false,
        );
    }

    #[test]
    fn other_cgroups_are_no_containers() {
        let check = |path: &str| assert_eq!(containers(&fill(path)), [], "{path}");
        check("");
        check("/");
        check("/system.slice/nginx.service");
        check("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podUID_.slice");
        check("/kubepods.slice/kubepods-podUID_.slice/crio-conmon-ID.scope");
        check("/machine.slice/libpod-conmon-ID.scope");
        check("/machine.slice/machine-libpod_pod_ID.slice");
        check("/libpod_parent/conmon");
        check("/libpod_parent/ID");
        check("/system.slice/dockerx-ID.scope");
        check("/system.slice/docker-ID0.scope");
        check(&format!("/docker/{}", &ID[1..]));
        check(&format!("/system.slice/docker-{}.scope", &ID[1..]));
        check(&format!("/docker/{}", ID.to_uppercase()));
        check(&format!("/docker/{}g", &ID[1..]));
        check(&format!("/docker/{}é", &ID[2..]));
        check("/docker/../../etc/passwd");
        check("/x\\x2d\u{1b}[31m\u{fffd}/-/:/docker-.scope/pod/-pod.slice/::/");
    }

    #[test]
    fn containers_within_containers_come_from_the_outside_in() {
        let path = fill("/docker/ID/kubepods/podUID/OTHER");
        let found = containers(&path);
        assert_eq!(found.iter().map(|one| one.id.as_str()).collect::<Vec<_>>(), [ID, OTHER]);
        assert_eq!((&found[0].pod_uid, found[1].pod_uid.as_deref()), (&None, Some(UID)));
        assert_eq!(containers(&format!("/{ID}").repeat(60)).len(), DEEPEST);
        let check = |path: &str, of_user| {
            assert_eq!(containers(&fill(path))[0].of_user, of_user, "{path}");
        };
        check("/user.slice/user-1000.slice/user@1000.service/docker-ID.scope", true);
        check("/user.slice/user-0.slice/user@0.service/docker-ID.scope", false);
        check("/system.slice/docker-ID.scope/user@1000.service", false);
    }

    #[test]
    fn pods_have_uids() {
        let check = |segment: &str, expect: Option<&str>| {
            assert_eq!(pod_uid(&fill(segment)).as_deref(), expect, "{segment}");
        };
        check("podUID", Some(UID));
        check("kubepods-podUID_.slice", Some(UID));
        check("kubepods-burstable-podUID_.slice", Some(UID));
        check("kubepods-burstable-podUID_.slice:cri-containerd:ID", Some(UID));
        check("pod3a8b2c4d5e6f708192a3b4c5d6e7f809", Some("3a8b2c4d5e6f708192a3b4c5d6e7f809"));
        check("machine-podUID_.slice", None);
        check("pod", None);
        check("podman", None);
        check("pod../../../../../../../../../etc/passwd", None);
        check("podUIDx", None);
        check("kubepods-pod.slice", None);
    }

    #[test]
    fn units_are_those_that_systemd_sees() {
        let check = |path: &str, expect: Option<&str>| assert_eq!(unit(path), expect, "{path}");
        check("/system.slice/nginx.service", Some("nginx.service"));
        check("/system.slice/nginx.service/worker/a.scope", Some("nginx.service"));
        check("/system.slice/nginx.service (deleted)", Some("nginx.service"));
        check("/system.slice/system-getty.slice/getty@tty1.service", Some("getty@tty1.service"));
        check("/system.slice/a\\x2db@c\\x2dd.service", Some("a\\x2db@c\\x2dd.service"));
        check("/init.scope", Some("init.scope"));
        check("/../nginx.service", Some("nginx.service"));
        check("/system.slice/_cpu.service", Some("cpu.service"));
        check("/user.slice/user-1000.slice/session-3.scope", Some("session-3.scope"));
        let user = |rest: &str| format!("/user.slice/user-1000.slice/user@1000.service{rest}");
        check(&user("/app.slice/foo.service"), Some("foo.service"));
        check(&user("/app.slice/app-a.slice/run-b.scope/x"), Some("run-b.scope"));
        check(&user("/init.scope"), Some("init.scope"));
        check(&user(""), Some("user@1000.service"));
        check(&user("/delegated/foo.service"), Some("user@1000.service"));
        check("/system.slice/docker-x.scope/system.slice/b.service", Some("docker-x.scope"));
        check("/docker/0123/system.slice/nginx.service", None);
        check("/kubepods/burstable", None);
        check("/system.slice", None);
        check("/.service", None);
        check("/", None);
        check("", None);
    }

    #[test]
    fn the_unified_hierarchy_comes_first_unless_nothing_is_in_it() {
        let check = |text: &[u8], main: Option<&str>, ids: &[&str]| {
            let is = Cgroups::parse(text);
            assert_eq!(is.main.as_deref(), main);
            assert_eq!(is.containers().iter().map(|c| c.id.as_str()).collect::<Vec<_>>(), ids);
        };
        check(b"0::/system.slice/a.service\n", Some("/system.slice/a.service"), &[]);
        check(b"4:cpu:/x\n1:name=systemd:/b.service\n", Some("/b.service"), &[]);
        check(b"1:name=systemd:/b.service\n0::/\n", Some("/b.service"), &[]);
        check(b"0::/a:b:c\n", Some("/a:b:c"), &[]);
        // The runtime's own driver and systemd's hybrid: only version 1 knows the container.
        let hybrid = fill(
            "12:pids:/docker/ID\n11:cpu,cpuacct:/docker/ID\n1:name=systemd:/docker/ID\n\
             0::/system.slice/containerd.service\n",
        );
        check(hybrid.as_bytes(), Some("/system.slice/containerd.service"), &[ID]);
        let v1 = fill("12:pids:/docker/ID\n1:name=systemd:/system.slice/x.service\n");
        check(v1.as_bytes(), Some("/system.slice/x.service"), &[ID]);
        let odd = [b"0::/docker/".as_slice(), ID.as_bytes(), b"/\xff\xfe\x1b\n"].concat();
        let path = fill("/docker/ID/\u{fffd}\u{fffd}\u{1b}");
        check(&odd, Some(&path), &[ID]);
        check(b"", None, &[]);
        check(b"0\n::\n\xff\n", None, &[]);
    }
}
