//! Names of users, as `/etc/passwd` has them.

use std::collections::HashMap;

use super::root::{Cached, Root};

const PASSWD: &str = "etc/passwd";

#[derive(Debug, Default)]
pub(super) struct Users(Cached<HashMap<u32, String>>);

impl Users {
    /// Looks whether the file has changed.
    pub(super) fn refresh(&mut self, root: &Root) {
        self.0.get(root, PASSWD, || root.read(PASSWD).map(|text| parse(&text)).unwrap_or_default());
    }

    pub(super) fn name(&self, uid: u32) -> Option<&str> {
        self.0.value().get(&uid).map(String::as_str)
    }
}

/// The first line of a uid counts, as for `getpwuid()`.
fn parse(text: &[u8]) -> HashMap<u32, String> {
    let mut users = HashMap::new();
    for line in String::from_utf8_lossy(text).lines() {
        let mut fields = line.split(':');
        let (name, uid) = (fields.next(), fields.nth(1).and_then(|uid| uid.parse().ok()));
        // A name that begins like this stands for names from elsewhere (`passwd(5)`, compat).
        if let (Some(name), Some(uid)) = (name, uid)
            && !name.is_empty()
            && !name.starts_with(['+', '-', '#'])
        {
            users.entry(uid).or_insert_with(|| name.to_owned());
        }
    }
    users
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::root::made::Made;

    #[test]
    fn users_have_the_first_name_of_their_number() {
        let text =
            b"root:x:0:0:root:/root:/bin/sh\ntoor:x:0:0::/:\n\xff\xfe:x:5:5::/:\n+nis:x:7:\n\
                     :x:8:\nshort:x\nwords:x:nine:9\nbig:x:4294967296:\n#old:x:10:\nwww:x:33:33:::";
        let users = parse(text);
        let check = |uid, name: Option<&str>| assert_eq!(users.get(&uid).map(String::as_str), name);
        check(0, Some("root"));
        check(5, Some("\u{fffd}\u{fffd}"));
        check(33, Some("www"));
        for uid in [7, 8, 9, 10] {
            check(uid, None);
        }
    }

    #[test]
    fn a_new_user_is_known_after_the_next_look() {
        let made = Made::new();
        let root = Root::at(&made.0).unwrap();
        let mut users = Users::default();
        let mut check = |uid, name| {
            users.refresh(&root);
            assert_eq!(users.name(uid), name);
        };
        check(33, None);
        made.file(PASSWD, "root:x:0:0\n");
        check(33, None);
        made.file(PASSWD, "root:x:0:0\nwww:x:33:33\n");
        check(33, Some("www"));
    }
}
