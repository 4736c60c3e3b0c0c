//! Tokens of callers: what the daemon knows of them, and the command that makes them.
//!
//! The command writes the catalogue itself, so that it works before the daemon's first start. A
//! daemon that runs looks again when it is shown a token it doesn't know, and now and then anyway:
//! one that was revoked is refused after that.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use http_api::auth::{Scope, TokenHash};
use parking_lot::Mutex;

use crate::catalogue::{self, Catalogue, CatalogueError, TokenRow, tokens};
use crate::clock::{hex, now_ms, random};

/// How long a revoked token may still be good for.
const STALE: Duration = Duration::from_secs(1);
/// How often unknown tokens make the daemon look again.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// All tokens, as of a moment ago.
#[derive(Debug, Default)]
pub struct Tokens {
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    rows: Vec<TokenRow>,
    at: Option<Instant>,
}

impl Known {
    fn scope(&self, token: &TokenHash) -> Option<Scope> {
        // All of them are compared: which one it is doesn't show in the time.
        let matching = self.rows.iter().filter(|row| row.hash.matches(token));
        matching.fold(None, |_, row| Some(row.scope))
    }

    fn is_younger_than(&self, age: Duration) -> bool {
        self.at.is_some_and(|at| at.elapsed() < age)
    }
}

impl Tokens {
    /// What a token allows; nothing when there is none.
    ///
    /// # Errors
    /// The catalogue failed.
    pub async fn scope(
        &self,
        catalogue: &Catalogue,
        token: TokenHash,
    ) -> Result<Option<Scope>, CatalogueError> {
        {
            let known = self.known.lock();
            let scope = known.scope(&token);
            let young = match scope {
                Some(_) => known.is_younger_than(STALE),
                None => known.is_younger_than(LOOK_AGAIN),
            };
            if young {
                return Ok(scope);
            }
        }
        let at = Instant::now();
        let rows = catalogue.call(|connection| tokens::all(connection)).await?;
        let mut known = self.known.lock();
        *known = Known { rows, at: Some(at) };
        Ok(known.scope(&token))
    }
}

/// Makes a token, stores its hash and returns it: `e2b_` and 40 hexadecimal digits, which is the
/// form that E2B's older clients insist on.
///
/// # Errors
/// The name is taken, or the catalogue can't be used.
pub fn create(catalogue: &Path, name: &str, scope: Scope) -> Result<String> {
    let legal = |c: char| c.is_ascii_alphanumeric() || "-_.@".contains(c);
    if !(1..=64).contains(&name.len()) || !name.chars().all(legal) {
        bail!("--name is {name:?}; 1 to 64 letters, digits, '-', '_', '.' and '@' are possible");
    }
    let token = format!("e2b_{}", hex(&random::<20>()));
    let row = TokenRow {
        name: name.to_owned(),
        hash: TokenHash::of(&token),
        scope,
        created_at_ms: now_ms(),
    };
    if !tokens::insert(&open(catalogue)?, &row)? {
        bail!("There is a token {name:?} already; choose another --name, or revoke it first");
    }
    Ok(token)
}

/// All tokens, by name.
///
/// # Errors
/// The catalogue can't be used.
pub fn list(catalogue: &Path) -> Result<Vec<TokenRow>> {
    Ok(tokens::all(&open(catalogue)?)?)
}

/// Removes a token.
///
/// # Errors
/// There is none of this name, or the catalogue can't be used.
pub fn revoke(catalogue: &Path, name: &str) -> Result<()> {
    if !tokens::remove(&open(catalogue)?, name)? {
        bail!("There is no token {name:?}; `thaw token list` shows those there are");
    }
    Ok(())
}

fn open(path: &Path) -> Result<rusqlite::Connection> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).with_context(|| {
            format!(
                "Directory {} can't be made; is data_dir right?",
                dir.display()
            )
        })?;
    }
    catalogue::connect(path)
        .with_context(|| format!("The catalogue {} can't be used", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_daemon_that_runs_hears_of_new_and_of_revoked_tokens() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/catalogue.db");
        let first = create(&path, "first", Scope::Full).unwrap();
        assert_eq!(first.len(), 44);
        assert!(first[4..].bytes().all(|b| b.is_ascii_hexdigit()), "{first}");

        let daemon = Catalogue::open(&path).unwrap();
        let tokens = Tokens::default();
        let scope = async |token: &str| tokens.scope(&daemon, TokenHash::of(token)).await.unwrap();
        assert_eq!(scope(&first).await, Some(Scope::Full));
        let second = create(&path, "second", Scope::Metrics).unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        while scope(&second).await != Some(Scope::Metrics) {
            assert!(Instant::now() < deadline, "the new token is never known");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(create(&path, "second", Scope::Full).is_err(), "taken");
        revoke(&path, "first").unwrap();
        assert!(revoke(&path, "first").is_err(), "gone");
        while scope(&first).await.is_some() {
            assert!(Instant::now() < deadline, "the revoked token stays good");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let stored = std::fs::read(&path).unwrap();
        let part = &second.as_bytes()[4..];
        assert!(!stored.windows(part.len()).any(|window| window == part));
    }
}
