//! Tables and their version.

use std::thread;
use std::time::{Duration, Instant};

use rusqlite::{Connection, ErrorCode, TransactionBehavior};

use super::CatalogueError;

const VERSION: i64 = 5;

/// How long another program may be at a new file; SQLite's wrapper waits as long for its locks.
const PATIENCE: Duration = Duration::from_secs(5);

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
    network       TEXT NOT NULL DEFAULT '{}',
    lifetime      TEXT NOT NULL DEFAULT '{}',
    request       TEXT NOT NULL DEFAULT '',
    access_token  TEXT,
    execution_id  TEXT,
    started_at_ms INTEGER NOT NULL DEFAULT 0,
    disk_mb       INTEGER NOT NULL DEFAULT 0,
    huge_pages    INTEGER NOT NULL DEFAULT 0,
    disk_limits   TEXT NOT NULL DEFAULT '{}'
) STRICT;
CREATE TABLE templates (
    name          TEXT PRIMARY KEY,
    build         TEXT NOT NULL,
    vcpus         INTEGER NOT NULL,
    memory_mb     INTEGER NOT NULL,
    kernel        TEXT NOT NULL,
    initrd        TEXT NOT NULL,
    cmdline       TEXT NOT NULL,
    created_at_ms INTEGER NOT NULL,
    sandbox       TEXT,
    access_token  TEXT,
    disk_mb       INTEGER NOT NULL DEFAULT 0,
    transient     INTEGER NOT NULL DEFAULT 0,
    huge_pages    INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE tokens (
    name          TEXT PRIMARY KEY,
    hash          BLOB NOT NULL UNIQUE,
    scope         TEXT NOT NULL,
    created_at_ms INTEGER NOT NULL
) STRICT;
CREATE TABLE events (
    id            INTEGER PRIMARY KEY AUTOINCREMENT,
    at_ms         INTEGER NOT NULL,
    kind          TEXT NOT NULL,
    sandbox       TEXT NOT NULL,
    state         TEXT,
    execution_id  TEXT,
    reason        TEXT
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

/// From version 2: sandboxes end by themselves and have secrets, callers have tokens, and what
/// happens is written down.
const THIRD: &str = "
ALTER TABLE sandboxes ADD COLUMN lifetime TEXT NOT NULL DEFAULT '{}';
ALTER TABLE sandboxes ADD COLUMN request TEXT NOT NULL DEFAULT '';
ALTER TABLE sandboxes ADD COLUMN access_token TEXT;
ALTER TABLE sandboxes ADD COLUMN execution_id TEXT;
ALTER TABLE sandboxes ADD COLUMN started_at_ms INTEGER NOT NULL DEFAULT 0;
ALTER TABLE sandboxes ADD COLUMN disk_mb INTEGER NOT NULL DEFAULT 0;
ALTER TABLE templates ADD COLUMN sandbox TEXT;
ALTER TABLE templates ADD COLUMN access_token TEXT;
ALTER TABLE templates ADD COLUMN disk_mb INTEGER NOT NULL DEFAULT 0;
ALTER TABLE templates ADD COLUMN transient INTEGER NOT NULL DEFAULT 0;
CREATE TABLE tokens (
    name          TEXT PRIMARY KEY,
    hash          BLOB NOT NULL UNIQUE,
    scope         TEXT NOT NULL,
    created_at_ms INTEGER NOT NULL
) STRICT;
CREATE TABLE events (
    id            INTEGER PRIMARY KEY AUTOINCREMENT,
    at_ms         INTEGER NOT NULL,
    kind          TEXT NOT NULL,
    sandbox       TEXT NOT NULL,
    state         TEXT,
    execution_id  TEXT,
    reason        TEXT
) STRICT;
";

/// From version 3: guests' memory may be of huge pages.
const FOURTH: &str = "
ALTER TABLE sandboxes ADD COLUMN huge_pages INTEGER NOT NULL DEFAULT 0;
ALTER TABLE templates ADD COLUMN huge_pages INTEGER NOT NULL DEFAULT 0;
";

/// From version 4: disks of sandboxes have limits of their own.
const FIFTH: &str = "ALTER TABLE sandboxes ADD COLUMN disk_limits TEXT NOT NULL DEFAULT '{}'";

/// What each version but the newest lacks, the first one's first.
const STEPS: [&str; VERSION as usize - 1] = [SECOND, THIRD, FOURTH, FIFTH];

/// Sets the connection up and makes the tables if they aren't there.
pub(super) fn prepare(connection: &mut Connection) -> Result<(), CatalogueError> {
    write_ahead(connection)?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    if version(connection)? == VERSION {
        return Ok(());
    }
    // Asked again with the lock held: another program may be making the same tables.
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    match version(&transaction)? {
        VERSION => return Ok(()),
        0 => transaction.execute_batch(TABLES)?,
        found @ 1..VERSION => {
            for step in &STEPS[found as usize - 1..] {
                transaction.execute_batch(step)?;
            }
        }
        found => {
            let known = VERSION;
            return Err(CatalogueError::Version { found, known });
        }
    }
    transaction.pragma_update(None, "user_version", VERSION)?;
    Ok(transaction.commit()?)
}

/// Has writes go to a log beside the file, for good. SQLite's own patience ends where two programs do
/// this to a new file: each would wait for the other, so one of them is told at once to try again.
fn write_ahead(connection: &Connection) -> Result<(), CatalogueError> {
    let since = Instant::now();
    loop {
        match connection.pragma_update(None, "journal_mode", "WAL") {
            Err(error)
                if error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy)
                    && since.elapsed() < PATIENCE =>
            {
                thread::sleep(Duration::from_millis(5));
            }
            done => return Ok(done?),
        }
    }
}

fn version(connection: &Connection) -> Result<i64, CatalogueError> {
    Ok(connection.query_row("PRAGMA user_version", [], |row| row.get(0))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_older_catalogue_gets_what_it_lacks() {
        /// As version 1 made them.
        const FIRST: &str = "
            CREATE TABLE sandboxes (
                id TEXT PRIMARY KEY, template TEXT NOT NULL, vcpus INTEGER NOT NULL,
                memory_mb INTEGER NOT NULL, kernel TEXT NOT NULL, initrd TEXT NOT NULL,
                cmdline TEXT NOT NULL, slot INTEGER NOT NULL UNIQUE, state TEXT NOT NULL,
                build TEXT, reason TEXT, created_at_ms INTEGER NOT NULL, env TEXT NOT NULL,
                labels TEXT NOT NULL
            ) STRICT;
            CREATE TABLE templates (
                name TEXT PRIMARY KEY, build TEXT NOT NULL, vcpus INTEGER NOT NULL,
                memory_mb INTEGER NOT NULL, kernel TEXT NOT NULL, initrd TEXT NOT NULL,
                cmdline TEXT NOT NULL, created_at_ms INTEGER NOT NULL
            ) STRICT;
            CREATE TABLE builds (
                id TEXT PRIMARY KEY, generation INTEGER NOT NULL, stored_pages INTEGER NOT NULL,
                identity TEXT NOT NULL
            ) STRICT;
            CREATE TABLE build_uses (
                build TEXT NOT NULL REFERENCES builds(id) ON DELETE CASCADE, uses TEXT NOT NULL,
                PRIMARY KEY (build, uses)
            ) STRICT;";
        let columns = |connection: &Connection| {
            let query = "SELECT m.name || '.' || c.name FROM sqlite_schema AS m
                         JOIN pragma_table_info(m.name) AS c WHERE m.type = 'table' ORDER BY 1";
            let mut statement = connection.prepare(query).unwrap();
            let rows = statement
                .query_map([], |row| row.get::<_, String>(0))
                .unwrap();
            rows.collect::<Result<Vec<_>, _>>().unwrap()
        };
        let mut new = Connection::open_in_memory().unwrap();
        prepare(&mut new).unwrap();
        for version in 1..VERSION {
            let mut connection = Connection::open_in_memory().unwrap();
            connection.execute_batch(FIRST).unwrap();
            for step in &STEPS[..version as usize - 1] {
                connection.execute_batch(step).unwrap();
            }
            connection
                .pragma_update(None, "user_version", version)
                .unwrap();
            prepare(&mut connection).unwrap();
            assert_eq!(
                columns(&connection),
                columns(&new),
                "from version {version}"
            );
            prepare(&mut connection).unwrap();
        }
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
