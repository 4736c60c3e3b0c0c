//! Users and groups, read from /etc/passwd and /etc/group by ourselves.
//!
//! A static binary can't use the C library's lookups, which load plug-ins at run time. Lines that
//! don't parse are skipped, as the C library does.

use std::collections::HashMap;
use std::io;

/// The account that is taken when nobody names one and the guest has it.
const USUAL_USER: &str = "user";

/// One line of /etc/passwd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Account {
    pub(crate) name: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) home: String,
    pub(crate) shell: String,
}

/// The text of the two files at one moment.
#[derive(Debug, Clone, Default)]
pub(crate) struct Accounts {
    passwd: String,
    group: String,
}

impl Accounts {
    /// Reads both files; one that doesn't exist is empty.
    pub(crate) fn read() -> io::Result<Accounts> {
        Ok(Accounts {
            passwd: text_of("/etc/passwd")?,
            group: text_of("/etc/group")?,
        })
    }

    /// The account of that name.
    pub(crate) fn named(&self, name: &str) -> Option<Account> {
        self.passwd
            .lines()
            .filter_map(account)
            .find(|account| account.name == name)
    }

    /// The account of that user id.
    pub(crate) fn with_uid(&self, uid: u32) -> Option<Account> {
        self.passwd
            .lines()
            .filter_map(account)
            .find(|account| account.uid == uid)
    }

    /// The account of that name; without one, the usual one, or else whoever we are.
    ///
    /// # Errors
    /// The name, when nobody has it.
    pub(crate) fn chosen(&self, name: Option<&str>, own_uid: u32) -> Result<Account, String> {
        if let Some(name) = name {
            return self.named(name).ok_or_else(|| name.to_owned());
        }
        let usual = self.named(USUAL_USER).or_else(|| self.with_uid(own_uid));
        Ok(usual.unwrap_or_else(|| Account {
            name: own_uid.to_string(),
            uid: own_uid,
            gid: own_uid,
            home: "/".to_owned(),
            shell: "/bin/sh".to_owned(),
        }))
    }

    /// All names by id: users, then groups. For looking up many.
    pub(crate) fn names(&self) -> Names {
        let mut names = Names::default();
        for account in self.passwd.lines().filter_map(account) {
            names.users.entry(account.uid).or_insert(account.name);
        }
        for line in self.group.lines() {
            let mut fields = line.split(':');
            if let (Some(name), Some(_), Some(Ok(gid))) =
                (fields.next(), fields.next(), fields.next().map(str::parse))
            {
                names.groups.entry(gid).or_insert_with(|| name.to_owned());
            }
        }
        names
    }

    /// What initgroups would set: the primary group, then every group that lists the user.
    pub(crate) fn groups_of(&self, account: &Account) -> Vec<u32> {
        let mut groups = vec![account.gid];
        for line in self.group.lines() {
            let mut fields = line.split(':');
            let (_name, _password) = (fields.next(), fields.next());
            let (Some(gid), Some(members)) = (fields.next(), fields.next()) else {
                continue;
            };
            let Ok(gid) = gid.parse() else { continue };
            if !groups.contains(&gid) && members.split(',').any(|member| member == account.name) {
                groups.push(gid);
            }
        }
        groups
    }
}

/// Names of users and groups; an id without a name stands for itself.
#[derive(Debug, Clone, Default)]
pub(crate) struct Names {
    users: HashMap<u32, String>,
    groups: HashMap<u32, String>,
}

impl Names {
    /// Name of a user.
    pub(crate) fn user(&self, uid: u32) -> String {
        self.users
            .get(&uid)
            .cloned()
            .unwrap_or_else(|| uid.to_string())
    }

    /// Name of a group.
    pub(crate) fn group(&self, gid: u32) -> String {
        self.groups
            .get(&gid)
            .cloned()
            .unwrap_or_else(|| gid.to_string())
    }
}

fn account(line: &str) -> Option<Account> {
    let mut fields = line.split(':');
    let (name, _password) = (fields.next()?, fields.next()?);
    let (uid, gid) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    let (_comment, home) = (fields.next()?, fields.next()?);
    let shell = fields
        .next()
        .filter(|shell| !shell.is_empty())
        .unwrap_or("/bin/sh");
    (!name.is_empty()).then(|| Account {
        name: name.to_owned(),
        uid,
        gid,
        home: home.to_owned(),
        shell: shell.to_owned(),
    })
}

fn text_of(path: &str) -> io::Result<String> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
impl Accounts {
    /// Accounts of a test.
    pub(crate) fn from_text(passwd: &str, group: &str) -> Accounts {
        Accounts {
            passwd: passwd.to_owned(),
            group: group.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accounts() -> Accounts {
        Accounts::from_text(
            "root:x:0:0:root:/root:/bin/bash\nbroken:x:one:0::/:\n\
             user:x:1000:1000::/home/user:\nbin:x:2:2::/:/nologin",
            "root:x:0:\nuser:x:1000:\ndisk:x:6:root,user\nusers:x:100:username\nwheel:x:10:user\nbad:x",
        )
    }

    #[test]
    fn account_is_found_by_name_and_by_id() {
        let user = accounts().named("user").unwrap();
        assert_eq!(
            (user.uid, user.gid, user.home.as_str()),
            (1000, 1000, "/home/user")
        );
        assert_eq!(user.shell, "/bin/sh");
        assert_eq!(accounts().with_uid(0).unwrap().name, "root");
        assert_eq!(accounts().named("broken"), None);
        assert_eq!(accounts().named("nobody"), None);
    }

    #[test]
    fn ids_have_names_or_stand_for_themselves() {
        let names = accounts().names();
        assert_eq!(
            (names.user(1000), names.group(100)),
            ("user".to_owned(), "users".to_owned())
        );
        assert_eq!(
            (names.user(77), names.group(77)),
            ("77".to_owned(), "77".to_owned())
        );
    }

    #[test]
    fn nobody_named_is_the_usual_user_or_ourselves() {
        assert_eq!(accounts().chosen(None, 0).unwrap().name, "user");
        assert_eq!(accounts().chosen(Some("root"), 5).unwrap().uid, 0);
        assert_eq!(accounts().chosen(Some("x"), 5), Err("x".to_owned()));
        let nobody = Accounts::default().chosen(None, 5).unwrap();
        assert_eq!((nobody.uid, nobody.home.as_str()), (5, "/"));
    }

    #[test]
    fn groups_are_the_primary_one_and_those_that_list_the_user() {
        let user = accounts().named("user").unwrap();
        assert_eq!(accounts().groups_of(&user), [1000, 6, 10]);
    }
}
