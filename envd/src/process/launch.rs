//! From a request to what is forked: user, environment, directory. Pure, but for its parameters.
//!
//! Environment, later ones win: defaults (PATH, HOME, USER, LOGNAME, SHELL) < `/init` < request.
//! User: request < `/init` default < `user`, if there is one, < whoever we are.

use std::collections::BTreeMap;

use crate::accounts::{Account, Accounts};
use crate::proto::process::ProcessConfig;
use crate::settings::Values;
use crate::sys::launch::Credentials;

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Everything that fork and exec need.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Launch {
    pub(super) program: String,
    pub(super) arguments: Vec<String>,
    pub(super) environment: BTreeMap<String, String>,
    pub(super) directory: String,
    /// Whom to become, if not who we are.
    pub(super) credentials: Option<Credentials>,
}

/// Why a request can't be launched.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum LaunchError {
    /// Nothing to run.
    #[error("Field process.cmd is empty")]
    NoCommand,
    /// Only names in /etc/passwd are users.
    #[error("No user {0:?} in this guest")]
    NoSuchUser(String),
    /// The directory doesn't exist, or isn't one.
    #[error("Field process.cwd: no directory {0:?}")]
    NoDirectory(String),
    /// C strings end at a NUL; a name ends at '='.
    #[error("Field {0} has a NUL, an empty name or a name with '='")]
    Unrepresentable(&'static str),
}

/// Where a launch is judged: the guest's settings and accounts.
pub(super) struct Surroundings<'a> {
    pub(super) values: &'a Values,
    pub(super) accounts: &'a Accounts,
    /// The daemon's own user.
    pub(super) own_uid: u32,
    pub(super) is_directory: &'a dyn Fn(&str) -> bool,
}

/// Decides what to launch.
pub(super) fn resolve(
    config: &ProcessConfig,
    user: Option<&str>,
    around: &Surroundings<'_>,
) -> Result<Launch, LaunchError> {
    check(config)?;
    let account = around
        .accounts
        .chosen(
            user.or(around.values.default_user.as_deref()),
            around.own_uid,
        )
        .map_err(LaunchError::NoSuchUser)?;
    let directory = directory(config.cwd.as_deref(), &account, around)?;
    let mut environment: BTreeMap<String, String> = defaults(&account);
    environment.extend(around.values.environment.clone());
    environment.extend(
        config
            .envs
            .iter()
            .map(|(name, value)| (name.clone(), value.clone())),
    );
    let credentials = (account.uid != around.own_uid).then(|| Credentials {
        uid: account.uid,
        gid: account.gid,
        groups: around.accounts.groups_of(&account),
    });
    Ok(Launch {
        program: config.cmd.clone(),
        arguments: config.args.clone(),
        environment,
        directory,
        credentials,
    })
}

fn check(config: &ProcessConfig) -> Result<(), LaunchError> {
    if config.cmd.is_empty() {
        return Err(LaunchError::NoCommand);
    }
    if config.cmd.contains('\0') {
        return Err(LaunchError::Unrepresentable("process.cmd"));
    }
    if config.args.iter().any(|argument| argument.contains('\0')) {
        return Err(LaunchError::Unrepresentable("process.args"));
    }
    let bad_name = |name: &str| name.is_empty() || name.contains(['=', '\0']);
    if config
        .envs
        .iter()
        .any(|(name, value)| bad_name(name) || value.contains('\0'))
    {
        return Err(LaunchError::Unrepresentable("process.envs"));
    }
    Ok(())
}

/// A directory that was asked for must exist; the user's home may be missing, then it is `/`.
fn directory(
    asked: Option<&str>,
    account: &Account,
    around: &Surroundings<'_>,
) -> Result<String, LaunchError> {
    let asked = asked
        .filter(|path| !path.is_empty())
        .or(around.values.default_workdir.as_deref());
    let Some(asked) = asked else {
        let home_is_there = (around.is_directory)(&account.home);
        return Ok(if home_is_there {
            account.home.clone()
        } else {
            "/".to_owned()
        });
    };
    let path = from_home(asked, &account.home);
    if path.contains('\0') || !(around.is_directory)(&path) {
        return Err(LaunchError::NoDirectory(path));
    }
    Ok(path)
}

/// `~`, `~/x` and relative paths start at the user's home.
fn from_home(path: &str, home: &str) -> String {
    match path {
        "~" => home.to_owned(),
        path if path.starts_with('/') => path.to_owned(),
        path => format!("{home}/{}", path.strip_prefix("~/").unwrap_or(path)),
    }
}

fn defaults(account: &Account) -> BTreeMap<String, String> {
    let pairs = [
        ("PATH", DEFAULT_PATH),
        ("HOME", &account.home),
        ("USER", &account.name),
        ("LOGNAME", &account.name),
        ("SHELL", &account.shell),
    ];
    pairs
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accounts() -> Accounts {
        Accounts::from_text(
            "root:x:0:0::/root:/bin/bash\nuser:x:1000:1000::/home/user:/bin/bash\nghost:x:7:7::/gone:",
            "disk:x:6:user",
        )
    }

    fn launch(
        config: &ProcessConfig,
        user: Option<&str>,
        values: &Values,
    ) -> Result<Launch, LaunchError> {
        let accounts = accounts();
        let around = Surroundings {
            values,
            accounts: &accounts,
            own_uid: 0,
            is_directory: &|path| {
                ["/root", "/home/user", "/home/user/work", "/srv"].contains(&path)
            },
        };
        resolve(config, user, &around)
    }

    fn config() -> ProcessConfig {
        ProcessConfig {
            cmd: "true".to_owned(),
            ..ProcessConfig::default()
        }
    }

    fn with_cwd(cwd: &str) -> ProcessConfig {
        ProcessConfig {
            cwd: Some(cwd.to_owned()),
            ..config()
        }
    }

    #[test]
    fn later_environments_win() {
        let pairs = |pairs: &[(&str, &str)]| -> Vec<(String, String)> {
            pairs
                .iter()
                .map(|(n, v)| ((*n).to_owned(), (*v).to_owned()))
                .collect()
        };
        let values = Values {
            environment: pairs(&[("A", "init"), ("B", "init"), ("HOME", "/init")])
                .into_iter()
                .collect(),
            ..Values::default()
        };
        let config = ProcessConfig {
            envs: pairs(&[("B", "request"), ("C", "request")])
                .into_iter()
                .collect(),
            ..config()
        };
        let environment = launch(&config, None, &values).unwrap().environment;
        for (name, value) in [
            ("A", "init"),
            ("B", "request"),
            ("C", "request"),
            ("HOME", "/init"),
            ("USER", "user"),
        ] {
            assert_eq!(environment[name], value, "{name}");
        }
        assert!(environment["PATH"].contains("/usr/bin"));
    }

    #[test]
    fn user_is_the_requests_then_inits_then_the_usual_one() {
        let uid = |user, values: &Values| {
            launch(&config(), user, values).map(|l| l.credentials.map(|c| (c.uid, c.groups)))
        };
        let by_init = Values {
            default_user: Some("ghost".to_owned()),
            ..Values::default()
        };
        assert_eq!(
            uid(None, &Values::default()),
            Ok(Some((1000, vec![1000, 6])))
        );
        assert_eq!(uid(None, &by_init), Ok(Some((7, vec![7]))));
        assert_eq!(uid(Some("root"), &by_init), Ok(None), "root is who we are");
        let missing = Err(LaunchError::NoSuchUser("nobody".to_owned()));
        assert_eq!(uid(Some("nobody"), &by_init), missing);
    }

    #[test]
    fn directory_is_the_requests_then_inits_then_home_then_the_root() {
        let at = |config: &ProcessConfig, user, values: &Values| {
            launch(config, user, values).map(|l| l.directory)
        };
        let unset = Values::default();
        let by_init = Values {
            default_workdir: Some("~/work".to_owned()),
            ..Values::default()
        };
        assert_eq!(at(&config(), None, &unset).unwrap(), "/home/user");
        assert_eq!(at(&config(), None, &by_init).unwrap(), "/home/user/work");
        assert_eq!(at(&config(), Some("ghost"), &unset).unwrap(), "/");
        assert_eq!(at(&with_cwd("/srv"), None, &by_init).unwrap(), "/srv");
        assert_eq!(
            at(&with_cwd("work"), None, &unset).unwrap(),
            "/home/user/work"
        );
        assert_eq!(at(&with_cwd("~"), None, &unset).unwrap(), "/home/user");
        let missing = Err(LaunchError::NoDirectory("/nowhere".to_owned()));
        assert_eq!(at(&with_cwd("/nowhere"), None, &unset), missing);
    }

    #[test]
    fn what_c_cannot_represent_is_refused() {
        let bad = |config: ProcessConfig| launch(&config, None, &Values::default()).unwrap_err();
        assert_eq!(bad(ProcessConfig::default()), LaunchError::NoCommand);
        let nul = ProcessConfig {
            args: vec!["a\0b".to_owned()],
            ..config()
        };
        assert_eq!(bad(nul), LaunchError::Unrepresentable("process.args"));
        let name = ProcessConfig {
            envs: [("A=B".to_owned(), String::new())].into_iter().collect(),
            ..config()
        };
        assert_eq!(bad(name), LaunchError::Unrepresentable("process.envs"));
    }
}
