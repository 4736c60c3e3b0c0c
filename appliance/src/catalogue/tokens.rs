//! Rows of tokens: their hashes, never themselves.

use http_api::auth::{Scope, TokenHash};
use rusqlite::{Connection, params};

use super::CatalogueError;

/// One token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenRow {
    /// What people call it.
    pub name: String,
    /// Its hash.
    pub hash: TokenHash,
    /// What it allows.
    pub scope: Scope,
    /// Unix milliseconds.
    pub created_at_ms: u64,
}

/// The scope as it is stored and shown.
#[must_use]
pub const fn scope_name(scope: Scope) -> &'static str {
    match scope {
        Scope::Full => "full",
        Scope::Metrics => "metrics",
    }
}

/// Stores a new token; `false` when the name is taken.
///
/// # Errors
/// As SQLite's.
pub fn insert(connection: &Connection, row: &TokenRow) -> Result<bool, CatalogueError> {
    let inserted = connection.execute(
        "INSERT INTO tokens (name, hash, scope, created_at_ms) VALUES (?1,?2,?3,?4)
         ON CONFLICT (name) DO NOTHING",
        params![
            row.name,
            row.hash.as_bytes(),
            scope_name(row.scope),
            row.created_at_ms as i64
        ],
    )?;
    Ok(inserted == 1)
}

/// All tokens, by name.
///
/// # Errors
/// As SQLite's; a value that no version wrote.
pub fn all(connection: &Connection) -> Result<Vec<TokenRow>, CatalogueError> {
    let query = "SELECT name, hash, scope, created_at_ms FROM tokens ORDER BY name";
    let mut statement = connection.prepare(query)?;
    let mut rows = statement.query([])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        let scope = match row.get::<_, String>(2)?.as_str() {
            "full" => Scope::Full,
            "metrics" => Scope::Metrics,
            other => {
                return Err(CatalogueError::Value {
                    column: "tokens.scope",
                    value: other.to_owned(),
                });
            }
        };
        found.push(TokenRow {
            name: row.get(0)?,
            hash: TokenHash::from_bytes(row.get(1)?),
            scope,
            created_at_ms: row.get::<_, i64>(3)? as u64,
        });
    }
    Ok(found)
}

/// Forgets a token; `false` when there is none of this name.
///
/// # Errors
/// As SQLite's.
pub fn remove(connection: &Connection, name: &str) -> Result<bool, CatalogueError> {
    Ok(connection.execute("DELETE FROM tokens WHERE name = ?1", [name])? == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_comes_back_as_its_hash_until_it_is_removed() {
        let mut connection = Connection::open_in_memory().unwrap();
        super::super::schema::prepare(&mut connection).unwrap();
        let row = TokenRow {
            name: "ci".into(),
            hash: TokenHash::of("e2b_1"),
            scope: Scope::Metrics,
            created_at_ms: 5,
        };
        assert!(insert(&connection, &row).unwrap());
        assert!(!insert(&connection, &row).unwrap(), "the name is taken");
        assert_eq!(all(&connection).unwrap(), [row]);
        assert!(remove(&connection, "ci").unwrap());
        assert!(!remove(&connection, "ci").unwrap());
        assert_eq!(all(&connection).unwrap(), []);
    }
}
