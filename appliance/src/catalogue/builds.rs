//! Rows of builds, what they refer to, and which of them nobody needs any more.

use std::collections::BTreeSet;

use rusqlite::{Connection, OptionalExtension, Transaction, params};
use snapshot_format::{BuildId, Generation};

use super::{CatalogueError, SandboxRow, parse, sandboxes};

/// One build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuildRow {
    /// Its id.
    pub id: BuildId,
    /// How many diffs lie under it.
    pub generation: Generation,
    /// Pages that it stores itself.
    pub stored_pages: u64,
    /// What its data file looked like to the file system when its content was last known
    /// to be right; see [`crate::integrity`].
    pub identity: String,
    /// The builds whose pages its map refers to, itself left out.
    pub uses: Vec<BuildId>,
}

/// Stores a build.
///
/// # Errors
/// As SQLite's.
pub fn put(connection: &mut Connection, row: &BuildRow) -> Result<(), CatalogueError> {
    let transaction = connection.transaction()?;
    insert(&transaction, row)?;
    Ok(transaction.commit()?)
}

/// Stores a build and the sandbox that is paused in it: both or neither. A build that is
/// stored without its sandbox would not be found again by who looks for unrecorded ones.
///
/// # Errors
/// As SQLite's.
pub fn put_with_sandbox(
    connection: &mut Connection,
    row: &BuildRow,
    sandbox: &SandboxRow,
) -> Result<(), CatalogueError> {
    let transaction = connection.transaction()?;
    insert(&transaction, row)?;
    sandboxes::put(&transaction, sandbox)?;
    Ok(transaction.commit()?)
}

fn insert(transaction: &Transaction<'_>, row: &BuildRow) -> Result<(), CatalogueError> {
    transaction.execute(
        "INSERT INTO builds (id, generation, stored_pages, identity) VALUES (?1,?2,?3,?4)
         ON CONFLICT (id) DO UPDATE SET identity = excluded.identity",
        params![
            row.id.to_string(),
            row.generation.get(),
            row.stored_pages as i64,
            row.identity
        ],
    )?;
    for used in &row.uses {
        transaction.execute(
            "INSERT OR IGNORE INTO build_uses (build, uses) VALUES (?1,?2)",
            params![row.id.to_string(), used.to_string()],
        )?;
    }
    Ok(())
}

/// One build, if it is known.
///
/// # Errors
/// As SQLite's; a value that no version wrote.
pub fn get(connection: &Connection, id: BuildId) -> Result<Option<BuildRow>, CatalogueError> {
    let found = connection
        .query_row(
            "SELECT generation, stored_pages, identity FROM builds WHERE id = ?1",
            [id.to_string()],
            |row| {
                Ok((
                    row.get::<_, u32>(0)?,
                    row.get::<_, i64>(1)?,
                    row.get::<_, String>(2)?,
                ))
            },
        )
        .optional()?;
    let Some((generation, stored_pages, identity)) = found else {
        return Ok(None);
    };
    let uses = column(
        connection,
        "SELECT uses FROM build_uses WHERE build = ?1",
        [id.to_string()],
    )?;
    Ok(Some(BuildRow {
        id,
        generation: Generation::new(generation),
        stored_pages: stored_pages as u64,
        identity,
        uses: uses.into_iter().collect(),
    }))
}

/// Every build that is known.
///
/// # Errors
/// As SQLite's; a value that no version wrote.
pub fn all_ids(connection: &Connection) -> Result<BTreeSet<BuildId>, CatalogueError> {
    column(connection, "SELECT id FROM builds", [])
}

/// Every build that a sandbox or a template points at, and every build those refer to.
///
/// # Errors
/// As SQLite's; a value that no version wrote.
pub fn needed(connection: &Connection) -> Result<BTreeSet<BuildId>, CatalogueError> {
    column(
        connection,
        "WITH roots(id) AS (
           SELECT build FROM sandboxes WHERE build IS NOT NULL UNION SELECT build FROM templates
         )
         SELECT id FROM roots UNION SELECT uses FROM build_uses JOIN roots ON build = roots.id",
        [],
    )
}

/// Forgets a build.
///
/// # Errors
/// As SQLite's.
pub fn remove(connection: &Connection, id: BuildId) -> Result<(), CatalogueError> {
    connection.execute("DELETE FROM builds WHERE id = ?1", [id.to_string()])?;
    Ok(())
}

fn column(
    connection: &Connection,
    query: &str,
    parameters: impl rusqlite::Params,
) -> Result<BTreeSet<BuildId>, CatalogueError> {
    let mut statement = connection.prepare(query)?;
    let mut rows = statement.query(parameters)?;
    let mut found = BTreeSet::new();
    while let Some(row) = rows.next()? {
        found.insert(parse("build id", &row.get::<_, String>(0)?)?);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_api::wire::SandboxState;

    fn sandbox(id: &str) -> SandboxRow {
        SandboxRow {
            build: Some(BuildId::from_bytes([1; 16])),
            ..SandboxRow::example(id, SandboxState::Paused)
        }
    }

    #[test]
    fn a_build_is_not_stored_without_its_sandbox() {
        let mut connection = Connection::open_in_memory().unwrap();
        super::super::schema::prepare(&mut connection).unwrap();
        let build = BuildRow {
            id: BuildId::from_bytes([1; 16]),
            generation: Generation::new(1),
            stored_pages: 5,
            identity: String::new(),
            uses: vec![BuildId::from_bytes([2; 16])],
        };
        // The second one's slot is taken.
        sandboxes::put(&connection, &sandbox("a")).unwrap();
        assert!(put_with_sandbox(&mut connection, &build, &sandbox("b")).is_err());
        assert_eq!(get(&connection, build.id).unwrap(), None);
        put_with_sandbox(&mut connection, &build, &sandbox("a")).unwrap();
        assert_eq!(get(&connection, build.id).unwrap(), Some(build));
    }
}
