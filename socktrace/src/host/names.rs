//! What the host's own files call a container: those of docker, containerd, CRI-O and podman, and the
//! names of the kubelet's logs. No runtime is asked.

use std::collections::HashMap;

use serde::{Deserialize, de::DeserializeOwned};

use super::{
    cgroup::{Named, is_pod_uid},
    root::{Cached, Root},
};

/// docker's data root, as distributions and as the snap have it.
const DOCKER: &[&str] =
    &["var/lib/docker/containers", "var/snap/docker/common/var-lib-docker/containers"];

/// containerd's state: its own, k3s's and RKE2's, k0s's, MicroK8s's. Below are containerd's namespaces
/// (`k8s.io`, `default`, …), and below these a directory a container.
const CONTAINERD: &[&str] = &[
    "run/containerd/io.containerd.runtime.v2.task",
    "run/k3s/containerd/io.containerd.runtime.v2.task",
    "run/k0s/containerd/io.containerd.runtime.v2.task",
    "var/snap/microk8s/common/run/containerd/io.containerd.runtime.v2.task",
];
/// containerd's namespaces beyond these are not looked into.
const MOST_NAMESPACES: usize = 16;

/// Where CRI-O and podman keep a directory a container (containers/storage).
const STORAGE: &[&str] =
    &["run/containers/storage/overlay-containers", "var/lib/containers/storage/overlay-containers"];
/// Their lists of containers; the volatile ones are of those that nothing is left of after a reboot
/// (`podman run --rm`).
const STORED: [&str; 3] = [
    "var/lib/containers/storage/overlay-containers/containers.json",
    "var/lib/containers/storage/overlay-containers/volatile-containers.json",
    "run/containers/storage/overlay-containers/volatile-containers.json",
];

/// Links that the kubelet names `<pod>_<namespace>_<container>-<id>.log`, cut off at this many bytes
/// before the suffix.
const CONTAINER_LOGS: &str = "var/log/containers";
const LONGEST_LOG: usize = 251;
/// What of the id must be left to be sure.
const SHORTEST_ID: usize = 12;

/// Directories that the kubelet names `<namespace>_<pod>_<uid>`, with one a container.
const POD_LOGS: &str = "var/log/pods";

/// Longer names are none that a runtime or Kubernetes allows.
const LONGEST_NAME: usize = 253;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Names {
    pub(super) runtime: Option<&'static str>,
    pub(super) name: Option<String>,
    pub(super) pod: Option<String>,
    pub(super) pod_uid: Option<String>,
    pub(super) namespace: Option<String>,
}

/// The files that say something of many containers.
#[derive(Debug, Default)]
pub(super) struct Files {
    stored: [Cached<HashMap<String, String>>; STORED.len()],
    container_logs: Cached<Vec<String>>,
    pod_logs: Cached<Vec<String>>,
}

impl Names {
    /// Whether there is nothing more to look for.
    pub(super) fn complete(&self) -> bool {
        self.name.is_some() && (self.pod.is_some() || self.pod_uid.is_none())
    }

    /// Takes what is not known yet.
    fn add(&mut self, other: Self) {
        self.runtime = self.runtime.or(other.runtime);
        let Self { name, pod, pod_uid, namespace, .. } = other;
        self.name = self.name.take().or(name);
        self.pod_uid = self.pod_uid.take().or(pod_uid);
        // Two halves of a name from different places may not belong together.
        if self.pod.is_none() {
            (self.pod, self.namespace) = (pod, namespace);
        }
    }
}

impl Files {
    /// What is known of a container, the runtime's own files first.
    pub(super) fn names(&mut self, root: &Root, container: &Named) -> Names {
        let id = container.id.as_str();
        let mut names = Names {
            runtime: container.runtime,
            pod_uid: container.pod_uid.clone(),
            ..Names::default()
        };
        // What a user's own runtime knows is in the user's home, and this may be a user's invention.
        if container.of_user {
            return names;
        }
        let runtime = container.runtime;
        let may_be = |one| runtime.is_none_or(|runtime| runtime == one);
        let mut take = |found: Option<Names>| {
            names.add(found.unwrap_or_default());
            names.complete()
        };
        let _ = (may_be("docker") && take(docker(root, id)))
            || (may_be("containerd") && take(containerd(root, id)))
            || (matches!(runtime, Some("cri-o" | "podman")) && take(storage(root, id)))
            || (runtime == Some("podman") && take(self.stored(root, id)))
            || (runtime != Some("podman") && take(self.container_log(root, id)))
            || take(self.pod_log(root, container.pod_uid.as_deref()));
        names
    }

    fn stored(&mut self, root: &Root, id: &str) -> Option<Names> {
        let mut lists = self.stored.iter_mut().zip(STORED);
        let name = lists.find_map(|(list, path)| {
            list.get(root, path, || stored(root, path)).get(id).map(String::as_str)
        });
        Some(Names { name: Some(name?.to_owned()), ..Names::default() })
    }

    fn container_log(&mut self, root: &Root, id: &str) -> Option<Names> {
        let logs = self.container_logs.get(root, CONTAINER_LOGS, || root.list(CONTAINER_LOGS));
        logs.iter().find_map(|log| of_container_log(log, id))
    }

    fn pod_log(&mut self, root: &Root, uid: Option<&str>) -> Option<Names> {
        let uid = uid?;
        let logs = self.pod_logs.get(root, POD_LOGS, || root.list(POD_LOGS));
        let (directory, [namespace, pod, _]) = logs.iter().find_map(|directory| {
            let parts = thirds(directory)?;
            (parts[2] == uid).then_some((directory, parts))
        })?;
        // Of several containers nothing says which one it is.
        let containers = root.list(&format!("{POD_LOGS}/{directory}"));
        let only = if let [one] = containers.as_slice() { fit(one) } else { None };
        Some(Names { name: only, pod: fit(pod), namespace: fit(namespace), ..Names::default() })
    }
}

/// A name that is fit to be shown and compared.
fn fit(name: &str) -> Option<String> {
    let fits = (1..=LONGEST_NAME).contains(&name.len())
        && !name.contains(|c: char| c.is_control() || c == '/');
    fits.then(|| name.to_owned())
}

fn json<T: DeserializeOwned>(root: &Root, path: &str) -> Option<T> {
    serde_json::from_slice(&root.read(path)?).ok()
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Docker {
    name: Option<String>,
    config: Option<DockerConfig>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerConfig {
    labels: Option<HashMap<String, String>>,
}

fn docker(root: &Root, id: &str) -> Option<Names> {
    let read = |directory| json(root, &format!("{directory}/{id}/config.v2.json"));
    let Docker { name, config } = DOCKER.iter().find_map(read)?;
    let mut names = kubernetes(&config.and_then(|config| config.labels).unwrap_or_default());
    names.runtime = Some("docker");
    let own = || fit(name.as_deref().map(|name| name.strip_prefix('/').unwrap_or(name))?);
    names.name = names.name.or_else(own);
    Some(names)
}

/// The OCI bundle's description.
#[derive(Deserialize)]
struct Bundle {
    annotations: Option<HashMap<String, String>>,
}

fn containerd(root: &Root, id: &str) -> Option<Names> {
    let read = |directory| {
        let namespaces = root.list(directory);
        namespaces
            .iter()
            .take(MOST_NAMESPACES)
            .find_map(|namespace| json(root, &format!("{directory}/{namespace}/{id}/config.json")))
    };
    let Bundle { annotations } = CONTAINERD.iter().find_map(|directory| read(directory))?;
    let annotations = annotations.unwrap_or_default();
    let get = |key| annotations.get(key).map(String::as_str);
    Some(Names {
        runtime: Some("containerd"),
        name: get("io.kubernetes.cri.container-name").or_else(|| get("nerdctl/name")).and_then(fit),
        pod: get("io.kubernetes.cri.sandbox-name").and_then(fit),
        pod_uid: get("io.kubernetes.cri.sandbox-uid")
            .filter(|uid| is_pod_uid(uid))
            .map(str::to_owned),
        namespace: get("io.kubernetes.cri.sandbox-namespace").and_then(fit),
    })
}

fn storage(root: &Root, id: &str) -> Option<Names> {
    let read = |directory| json(root, &format!("{directory}/{id}/userdata/config.json"));
    let Bundle { annotations } = STORAGE.iter().find_map(read)?;
    Some(kubernetes(&annotations?))
}

/// The labels that the kubelet gives containers.
fn kubernetes(labels: &HashMap<String, String>) -> Names {
    let get = |key| labels.get(key).map(String::as_str);
    Names {
        runtime: None,
        name: get("io.kubernetes.container.name").and_then(fit),
        pod: get("io.kubernetes.pod.name").and_then(fit),
        pod_uid: get("io.kubernetes.pod.uid").filter(|uid| is_pod_uid(uid)).map(str::to_owned),
        namespace: get("io.kubernetes.pod.namespace").and_then(fit),
    }
}

#[derive(Deserialize)]
struct Stored {
    id: String,
    names: Option<Vec<String>>,
}

/// The first name of each container in a list.
fn stored(root: &Root, path: &str) -> HashMap<String, String> {
    let list: Vec<Stored> = json(root, path).unwrap_or_default();
    let named = |one: Stored| Some((one.id, fit(one.names?.first()?)?));
    list.into_iter().filter_map(named).collect()
}

/// The names of Kubernetes have no `_`.
fn thirds(name: &str) -> Option<[&str; 3]> {
    let mut parts = name.split('_');
    let thirds = [parts.next()?, parts.next()?, parts.next()?];
    parts.next().is_none().then_some(thirds)
}

fn of_container_log(log: &str, id: &str) -> Option<Names> {
    let stem = log.strip_suffix(".log")?;
    let (front, end) = stem.rsplit_once('-')?;
    let cut = stem.len() == LONGEST_LOG && end.len() >= SHORTEST_ID && id.starts_with(end);
    if end != id && !cut {
        return None;
    }
    let [pod, namespace, name] = thirds(front)?;
    Some(Names { name: fit(name), pod: fit(pod), namespace: fit(namespace), ..Names::default() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::root::made::Made;

    const ID: &str = "4f797c539e6c745de61a93ca3ff892358ecbcaccd8414d5db545c38428142970";
    const UID: &str = "7e44ee88-1e65-4a16-8cdf-9a90c819180e";

    fn named(runtime: Option<&'static str>, pod_uid: Option<&str>) -> Named {
        Named { id: ID.into(), runtime, pod_uid: pod_uid.map(str::to_owned), of_user: false }
    }

    /// Name, pod and namespace that a tree of files gives a container.
    fn check(
        files: &[(&str, &str)],
        container: &Named,
        expect: (Option<&str>, Option<&str>, Option<&str>),
    ) {
        let made = Made::new();
        for (path, content) in files {
            made.file(path.replace("ID", ID).replace("UUU", UID), content);
        }
        let root = Root::at(&made.0).unwrap();
        let names = Files::default().names(&root, container);
        let is = (names.name.as_deref(), names.pod.as_deref(), names.namespace.as_deref());
        assert_eq!(is, expect, "{files:?}");
    }

    const DOCKER_FILE: &str = "var/lib/docker/containers/ID/config.v2.json";
    const CRI_FILE: &str = "run/containerd/io.containerd.runtime.v2.task/k8s.io/ID/config.json";
    const USERDATA: &str = "run/containers/storage/overlay-containers/ID/userdata/config.json";

    #[test]
    fn a_log_name_is_cut_off_by_the_kubelet() {
        let check = |log: &str, expect: Option<[&str; 3]>| {
            let names = of_container_log(log, ID);
            let is = names.map(|n| [n.pod, n.namespace, n.name].map(Option::unwrap));
            assert_eq!(is, expect.map(|names| names.map(str::to_owned)), "{log}");
        };
        check(&format!("web-0_shop_nginx-{ID}.log"), Some(["web-0", "shop", "nginx"]));
        check(&format!("web-0_shop_nginx-{ID}"), None);
        check(&format!("web-0_shop_nginx-{}.log", &ID[1..]), None);
        check(&format!("web-0_shop_nginx-{}.log", &ID[..12]), None);
        check(&format!("web-0_nginx-{ID}.log"), None);
        check(&format!("web_0_shop_nginx-{ID}.log"), None);
        let pod = "p".repeat(LONGEST_LOG - "_shop_nginx-".len() - 20);
        let cut = format!("{pod}_shop_nginx-{}.log", &ID[..20]);
        check(&cut, Some([&pod, "shop", "nginx"]));
        let pod = "p".repeat(LONGEST_LOG - "_shop_nginx-".len() - 11);
        check(&format!("{pod}_shop_nginx-{}.log", &ID[..11]), None);
    }

    #[test]
    fn hostile_files_are_unknown() {
        let none = (None, None, None);
        let docker = named(Some("docker"), None);
        for text in [
            "",
            "{",
            "[]",
            "null",
            r#"{"Name":7}"#,
            r#"{"Name":""}"#,
            r#"{"Name":"/"}"#,
            r#"{"Name":"/../../etc/passwd"}"#,
            "{\"Name\":\"/a\\u001b[31m\"}",
            &"[".repeat(100_000),
            &format!(r#"{{"Name":"/{}"}}"#, "a".repeat(254)),
            &format!(r#"{{"Name":"/web","x":"{}"}}"#, "a".repeat(1 << 20)),
        ] {
            check(&[(DOCKER_FILE, text)], &docker, none);
        }
        let labels = r#"{"Name":"/web","Config":{"Labels":{"io.kubernetes.pod.name":"../x"}}}"#;
        check(&[(DOCKER_FILE, labels)], &docker, (Some("web"), None, None));
        let containers = r#"[{"id":"ID","names":["../x"]},{"id":"ID"},{"names":[]}]"#;
        check(&[(STORED[0], containers)], &named(Some("podman"), None), none);
        let wrong = r#"{"annotations":{"io.kubernetes.cri.sandbox-uid":"../../etc"}}"#;
        check(&[(CRI_FILE, wrong)], &named(Some("containerd"), None), none);
        // A pod of several containers, none of which is named by its id.
        let two =
            [("var/log/pods/ns_pod_UUU/a/0.log", ""), ("var/log/pods/ns_pod_UUU/b/0.log", "")];
        check(&two, &named(None, Some(UID)), (None, Some("pod"), Some("ns")));
        let strange = [("var/log/pods/ns_pod_x_UUU/a/0.log", "")];
        check(&strange, &named(None, Some(UID)), none);
        // What a user calls a container of its own does not make it one of the system's.
        let of_user = Named { of_user: true, ..docker };
        check(&[(DOCKER_FILE, r#"{"Name":"/web"}"#)], &of_user, none);
    }

    #[test]
    fn links_do_not_lead_out_of_the_root() {
        let made = Made::new();
        made.file("outside/config.v2.json", r#"{"Name":"/web"}"#);
        made.file(format!("root/data/containers/{ID}/config.v2.json"), r#"{"Name":"/moved"}"#);
        let root = Root::at(&made.0.join("root")).unwrap();
        let directory = format!("root/{}/{ID}", DOCKER[0]);
        made.link(&directory, made.0.join("outside"));
        let name = || Files::default().names(&root, &named(Some("docker"), None)).name;
        assert_eq!(name(), None);
        std::fs::remove_dir_all(made.0.join("root/var")).unwrap();
        made.link("root/var/lib/docker", "/data");
        assert_eq!(name().as_deref(), Some("moved"));
    }

    #[test]
    fn the_runtimes_files_come_before_the_logs() {
        let log = ("var/log/containers/other_elsewhere_wrong-ID.log", "");
        let cri = r#"{"annotations":{"io.kubernetes.cri.container-name":"nginx",
            "io.kubernetes.cri.sandbox-name":"web-0","io.kubernetes.cri.sandbox-namespace":"shop"}}"#;
        let expect = (Some("nginx"), Some("web-0"), Some("shop"));
        check(&[(CRI_FILE, cri), log], &named(Some("containerd"), Some(UID)), expect);
        check(&[(CRI_FILE, cri), log], &named(None, Some(UID)), expect);
        let wrong = (Some("wrong"), Some("other"), Some("elsewhere"));
        check(&[(CRI_FILE, "{"), log], &named(None, Some(UID)), wrong);
        check(&[(USERDATA, cri), log], &named(Some("cri-o"), Some(UID)), wrong);
    }
}
