//! Resolves the user of a command from the sandbox's own passwd and group files; pure.

/// Who a command runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    /// User id.
    pub(crate) uid: u32,
    /// Primary group id.
    pub(crate) gid: u32,
    /// Supplementary group ids.
    pub(crate) groups: Vec<u32>,
    /// Home directory.
    pub(crate) home: String,
    /// Name, if the id has one.
    pub(crate) name: Option<String>,
}

/// A user or group that does not exist.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UserError {
    /// No user of that name.
    #[error("no user {0:?} in /etc/passwd")]
    User(String),
    /// No group of that name.
    #[error("no group {0:?} in /etc/group")]
    Group(String),
}

struct Entry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

/// Resolves `name`, `uid`, `name:group` or `uid:gid` with the contents of the two files.
///
/// A user id without entry has the group 0 and no home. A group that is given replaces the
/// primary group and all supplementary ones.
pub(crate) fn resolve(spec: &str, passwd: &str, group: &str) -> Result<Identity, UserError> {
    let (user, wanted_group) = match spec.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (spec, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let by_name = passwd
        .lines()
        .filter_map(parse_user)
        .find(|entry| entry.name == user);
    let by_id = || {
        let uid = user.parse().ok()?;
        let entry = passwd
            .lines()
            .filter_map(parse_user)
            .find(|entry| entry.uid == uid);
        Some(entry.unwrap_or(Entry {
            name: "",
            uid,
            gid: 0,
            home: "/",
        }))
    };
    let entry = by_name
        .or_else(by_id)
        .ok_or_else(|| UserError::User(user.into()))?;
    let (gid, groups) = match wanted_group.filter(|group| !group.is_empty()) {
        Some(wanted) => (group_id(wanted, group)?, vec![]),
        None => (entry.gid, memberships(entry.name, group)),
    };
    let home = if entry.home.is_empty() {
        "/"
    } else {
        entry.home
    };
    let name = Some(entry.name)
        .filter(|name| !name.is_empty())
        .map(str::to_owned);
    Ok(Identity {
        uid: entry.uid,
        gid,
        groups,
        home: home.into(),
        name,
    })
}

fn parse_user(line: &str) -> Option<Entry<'_>> {
    let mut fields = line.split(':');
    let (name, _password) = (fields.next()?, fields.next()?);
    let (uid, gid) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    let (_comment, home) = (fields.next(), fields.next().unwrap_or_default());
    Some(Entry {
        name,
        uid,
        gid,
        home,
    })
}

/// Name, id and members of a group.
fn parse_group(line: &str) -> Option<(&str, u32, &str)> {
    let mut fields = line.split(':');
    let (name, _password) = (fields.next()?, fields.next()?);
    Some((
        name,
        fields.next()?.parse().ok()?,
        fields.next().unwrap_or_default(),
    ))
}

fn group_id(wanted: &str, group: &str) -> Result<u32, UserError> {
    let named = group
        .lines()
        .filter_map(parse_group)
        .find(|(name, ..)| *name == wanted);
    match named {
        Some((_, gid, _)) => Ok(gid),
        None => wanted.parse().map_err(|_| UserError::Group(wanted.into())),
    }
}

fn memberships(user: &str, group: &str) -> Vec<u32> {
    let is_member = |members: &str| members.split(',').any(|member| member.trim() == user);
    let groups = group.lines().filter_map(parse_group);
    groups
        .filter(|(.., members)| !user.is_empty() && is_member(members))
        .map(|(_, gid, _)| gid)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\
        # a comment\n\
        broken\n\
        app:x:1000:1001:An app:/home/app:/bin/sh\n\
        1000:x:7:7::/seven:\n\
        short:x:8:9\n";
    const GROUP: &str =
        "root:x:0:\nwheel:x:10:root,app\nvideo:x:44: app\nnogid:x::app\nw2:x:45:apple\n";

    fn check(spec: &str, uid: u32, gid: u32, groups: &[u32], home: &str) {
        let identity = resolve(spec, PASSWD, GROUP).unwrap();
        assert_eq!((identity.uid, identity.gid), (uid, gid), "{spec}");
        assert_eq!(identity.groups, groups, "{spec}");
        assert_eq!(identity.home, home, "{spec}");
    }

    #[test]
    fn users_resolve_as_a_container_engine_does() {
        check("root", 0, 0, &[10], "/root");
        check("0", 0, 0, &[10], "/root");
        check("", 0, 0, &[10], "/root");
        check("app", 1000, 1001, &[10, 44], "/home/app");
        check("app:wheel", 1000, 10, &[], "/home/app");
        check("app:77", 1000, 77, &[], "/home/app");
        check("app:", 1000, 1001, &[10, 44], "/home/app");
        check("4242", 4242, 0, &[], "/");
        check("4242:4343", 4242, 4343, &[], "/");
        check("short", 8, 9, &[], "/");
        check(":wheel", 0, 10, &[], "/root");
    }

    #[test]
    fn a_name_of_digits_goes_before_an_id() {
        check("1000", 7, 7, &[], "/seven");
    }

    #[test]
    fn the_unknown_is_refused() {
        assert_eq!(
            resolve("nobody", PASSWD, GROUP),
            Err(UserError::User("nobody".into()))
        );
        assert_eq!(
            resolve("-1", PASSWD, GROUP),
            Err(UserError::User("-1".into()))
        );
        assert_eq!(
            resolve("4294967296", PASSWD, GROUP),
            Err(UserError::User("4294967296".into()))
        );
        assert_eq!(
            resolve("app:club", PASSWD, GROUP),
            Err(UserError::Group("club".into()))
        );
        assert_eq!(resolve("4242", "", "").unwrap().gid, 0);
    }
}
