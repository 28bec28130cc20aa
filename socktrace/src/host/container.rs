//! Which container a process lives in, remembered.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    cgroup::Named,
    names::{Files, Names},
    root::Root,
};
use crate::model::Container;

/// Containers that are remembered; those that nobody asked for the longest make room.
const MOST: usize = 4096;
/// How long what could not be found is not looked for again: some files are written after a
/// container's first process began.
const RETRY: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
pub(super) struct Containers {
    known: HashMap<Named, Known>,
    files: Files,
}

#[derive(Debug)]
struct Known {
    container: Arc<Container>,
    complete: bool,
    read: Instant,
    used: Instant,
}

impl Containers {
    /// The container of a process, of which its control group may name several, one within the other:
    /// the outermost that the host's files know; if they know none, the outermost.
    pub(super) fn of(
        &mut self,
        root: Option<&Root>,
        found: &[Named],
        now: Instant,
    ) -> Option<Arc<Container>> {
        let mut first = None;
        for named in found {
            let container = self.one(root, named, now);
            if container.name.is_some() || container.pod.is_some() {
                return Some(container);
            }
            first.get_or_insert(container);
        }
        first
    }

    fn one(&mut self, root: Option<&Root>, named: &Named, now: Instant) -> Arc<Container> {
        if let Some(known) = self.known.get_mut(named)
            && (known.complete || now.saturating_duration_since(known.read) < RETRY)
        {
            known.used = now;
            return Arc::clone(&known.container);
        }
        let names = root.map(|root| self.files.names(root, named)).unwrap_or_default();
        let complete = names.complete();
        let Names { runtime, name, pod, pod_uid, namespace } = names;
        let container = Arc::new(Container {
            id: named.id.clone(),
            runtime: runtime.or(named.runtime),
            name,
            pod,
            pod_uid: pod_uid.or_else(|| named.pod_uid.clone()),
            namespace,
        });
        self.make_room(named);
        let known = Known { container: Arc::clone(&container), complete, read: now, used: now };
        self.known.insert(named.clone(), known);
        container
    }

    fn make_room(&mut self, named: &Named) {
        if self.known.len() < MOST || self.known.contains_key(named) {
            return;
        }
        let oldest = self.known.iter().min_by_key(|(_, known)| known.used);
        if let Some(oldest) = oldest.map(|(named, _)| named.clone()) {
            self.known.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::root::made::Made;

    fn named(number: usize) -> Named {
        Named {
            id: format!("{number:064x}"),
            runtime: Some("docker"),
            pod_uid: None,
            of_user: false,
        }
    }

    fn write(made: &Made, number: usize, name: &str) {
        let path = format!("var/lib/docker/containers/{}/config.v2.json", named(number).id);
        made.file(path, format!(r#"{{"Name":"/{name}"}}"#));
    }

    fn name(
        containers: &mut Containers,
        root: &Root,
        found: &[Named],
        now: Instant,
    ) -> Option<String> {
        containers.of(Some(root), found, now).unwrap().name.clone()
    }

    #[test]
    fn what_is_found_stays_and_what_is_not_is_looked_for_again() {
        let made = Made::new();
        let root = Root::at(&made.0).unwrap();
        let mut containers = Containers::default();
        let start = Instant::now();
        let mut check = |after, expect: Option<&str>| {
            let is = name(&mut containers, &root, &[named(1)], start + after);
            assert_eq!(is.as_deref(), expect, "after {after:?}");
        };
        check(Duration::ZERO, None);
        write(&made, 1, "late");
        check(RETRY - Duration::from_secs(1), None);
        check(RETRY, Some("late"));
        std::fs::remove_dir_all(made.0.join("var")).unwrap();
        check(RETRY * 100, Some("late"));
    }

    #[test]
    fn those_nobody_asks_for_make_room() {
        let made = Made::new();
        let root = Root::at(&made.0).unwrap();
        let mut containers = Containers::default();
        write(&made, 0, "dead");
        write(&made, 1, "alive");
        let start = Instant::now();
        for number in 0..MOST {
            let now = start + Duration::from_millis(number.try_into().unwrap());
            name(&mut containers, &root, &[named(number)], now);
        }
        let end = start + Duration::from_secs(3600);
        name(&mut containers, &root, &[named(1)], end);
        name(&mut containers, &root, &[named(MOST)], end);
        assert_eq!(containers.known.len(), MOST);
        assert!(containers.known.contains_key(&named(1)));
        assert!(!containers.known.contains_key(&named(0)));
    }

    #[test]
    fn the_outermost_container_that_is_known_counts() {
        let made = Made::new();
        let root = Root::at(&made.0).unwrap();
        let both = [named(1), named(2)];
        let id = |root| {
            let mut containers = Containers::default();
            containers.of(root, &both, Instant::now()).map(|one| one.id.clone())
        };
        assert_eq!(id(Some(&root)), Some(named(1).id));
        write(&made, 2, "inner");
        assert_eq!(id(Some(&root)), Some(named(2).id));
        write(&made, 1, "outer");
        assert_eq!(id(Some(&root)), Some(named(1).id));
        assert_eq!(id(None), Some(named(1).id));
        assert_eq!(Containers::default().of(Some(&root), &[], Instant::now()), None);
    }
}
