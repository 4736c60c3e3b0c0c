//! Rows of builds, what they refer to, and which of them nobody needs any more.

use std::collections::BTreeSet;

use rusqlite::{Connection, OptionalExtension, params};
use snapshot_format::{BuildId, Generation};

use super::{CatalogueError, parse};

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
    Ok(transaction.commit()?)
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
