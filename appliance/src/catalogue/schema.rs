//! Tables and their version.

use rusqlite::Connection;

use super::CatalogueError;

const VERSION: i64 = 2;

const TABLES: &str = "
CREATE TABLE sandboxes (
    id            TEXT PRIMARY KEY,
    template      TEXT NOT NULL,
    vcpus         INTEGER NOT NULL,
    memory_mb     INTEGER NOT NULL,
    kernel        TEXT NOT NULL,
    initrd        TEXT NOT NULL,
    cmdline       TEXT NOT NULL,
    slot          INTEGER NOT NULL UNIQUE,
    state         TEXT NOT NULL,
    build         TEXT,
    reason        TEXT,
    created_at_ms INTEGER NOT NULL,
    env           TEXT NOT NULL,
    labels        TEXT NOT NULL,
    network       TEXT NOT NULL DEFAULT '{}'
) STRICT;
CREATE TABLE templates (
    name          TEXT PRIMARY KEY,
    build         TEXT NOT NULL,
    vcpus         INTEGER NOT NULL,
    memory_mb     INTEGER NOT NULL,
    kernel        TEXT NOT NULL,
    initrd        TEXT NOT NULL,
    cmdline       TEXT NOT NULL,
    created_at_ms INTEGER NOT NULL
) STRICT;
CREATE TABLE builds (
    id            TEXT PRIMARY KEY,
    generation    INTEGER NOT NULL,
    stored_pages  INTEGER NOT NULL,
    identity      TEXT NOT NULL
) STRICT;
CREATE TABLE build_uses (
    build         TEXT NOT NULL REFERENCES builds(id) ON DELETE CASCADE,
    uses          TEXT NOT NULL,
    PRIMARY KEY (build, uses)
) STRICT;
";

/// From version 1: sandboxes may reach what they like.
const SECOND: &str = "ALTER TABLE sandboxes ADD COLUMN network TEXT NOT NULL DEFAULT '{}'";

/// Sets the connection up and makes the tables if they aren't there.
pub(super) fn prepare(connection: &mut Connection) -> Result<(), CatalogueError> {
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    let found: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    match found {
        VERSION => Ok(()),
        0 => {
            let transaction = connection.transaction()?;
            transaction.execute_batch(TABLES)?;
            transaction.pragma_update(None, "user_version", VERSION)?;
            Ok(transaction.commit()?)
        }
        1 => {
            let transaction = connection.transaction()?;
            transaction.execute_batch(SECOND)?;
            transaction.pragma_update(None, "user_version", VERSION)?;
            Ok(transaction.commit()?)
        }
        found => Err(CatalogueError::Version {
            found,
            known: VERSION,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_catalogue_of_the_first_version_gets_what_it_lacks() {
        let mut connection = Connection::open_in_memory().unwrap();
        let first = TABLES.replace(",\n    network       TEXT NOT NULL DEFAULT '{}'", "");
        assert_ne!(first, TABLES);
        connection.execute_batch(&first).unwrap();
        connection.pragma_update(None, "user_version", 1).unwrap();
        prepare(&mut connection).unwrap();
        let columns = |connection: &Connection| -> i64 {
            let query = "SELECT COUNT(*) FROM pragma_table_info('sandboxes')";
            connection.query_row(query, [], |row| row.get(0)).unwrap()
        };
        let mut new = Connection::open_in_memory().unwrap();
        prepare(&mut new).unwrap();
        assert_eq!(columns(&connection), columns(&new));
        prepare(&mut connection).unwrap();
    }

    #[test]
    fn a_newer_catalogue_is_refused() {
        let mut connection = Connection::open_in_memory().unwrap();
        prepare(&mut connection).unwrap();
        connection
            .pragma_update(None, "user_version", VERSION + 1)
            .unwrap();
        assert!(matches!(
            prepare(&mut connection),
            Err(CatalogueError::Version { .. })
        ));
    }
}
