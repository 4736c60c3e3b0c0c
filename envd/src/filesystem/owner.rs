//! Whose files these are: the user whose home relative paths start at, who owns what is made.

use super::error::FileError;
use super::path::GuestPath;
use crate::accounts::{Account, Accounts};
use crate::settings::Values;

/// A user, as far as files are concerned. The daemon itself does the work, with its own rights.
#[derive(Debug, Clone)]
pub(crate) struct Owner {
    uid: u32,
    gid: u32,
    home: String,
    /// What an empty path means.
    workdir: Option<String>,
}

impl Owner {
    /// The user of a request: named by it, else by `/init`, else the usual one.
    pub(crate) fn of(
        name: Option<&str>,
        values: &Values,
        accounts: &Accounts,
    ) -> Result<Owner, FileError> {
        let account: Account = accounts
            .chosen(name.or(values.default_user.as_deref()), own_uid())
            .map_err(FileError::NoSuchUser)?;
        Ok(Owner {
            uid: account.uid,
            gid: account.gid,
            home: account.home,
            workdir: values.default_workdir.clone(),
        })
    }

    /// The path that a text means to this user.
    pub(crate) fn path(&self, text: &str) -> Result<GuestPath, FileError> {
        let text = match (text, &self.workdir) {
            ("", Some(workdir)) => workdir,
            (text, _) => text,
        };
        Ok(GuestPath::resolve(text, &self.home)?)
    }

    /// User and group of what is made; `None` when that is who we are anyway.
    pub(crate) fn ids(&self) -> Option<(u32, u32)> {
        (self.uid != own_uid()).then_some((self.uid, self.gid))
    }
}

fn own_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_start_at_home_and_an_empty_one_is_the_workdir() {
        let accounts = Accounts::from_text("user:x:1000:1000::/home/user:/bin/sh", "");
        let values = Values {
            default_workdir: Some("/work".to_owned()),
            ..Values::default()
        };
        let owner = Owner::of(Some("user"), &values, &accounts).unwrap();
        let path = |owner: &Owner, text: &str| owner.path(text).unwrap().to_string();
        assert_eq!(path(&owner, "a"), "/home/user/a");
        assert_eq!(path(&owner, ""), "/work");
        let plain = Owner::of(Some("user"), &Values::default(), &accounts).unwrap();
        assert_eq!(path(&plain, ""), "/home/user");
        assert_eq!(
            Owner::of(Some("ghost"), &values, &accounts).unwrap_err(),
            FileError::NoSuchUser("ghost".to_owned())
        );
    }
}
