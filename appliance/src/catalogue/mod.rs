//! The catalogue: what this host has, in SQLite, and the only truth after a crash.
//!
//! One thread owns the connection; everybody else sends it closures. A row is written
//! before the thing it speaks of is used and removed after the thing is gone, so whatever
//! a crash leaves behind is either in here or garbage.

mod schema;
pub mod templates;

use std::io;
use std::path::Path;

use rusqlite::{Connection, TransactionBehavior};
use thiserror::Error;
use tokio::sync::{mpsc, oneshot};

use crate::vmm::GuestShape;

pub mod builds;
pub mod sandboxes;
pub mod tokens;

pub use builds::BuildRow;
pub use sandboxes::SandboxRow;
pub use templates::TemplateRow;
pub use tokens::TokenRow;

/// Why the catalogue could not answer.
#[derive(Debug, Error)]
pub enum CatalogueError {
    /// Its file can't be made, or not be kept from others.
    #[error("Opening the catalogue {}", path.display())]
    File {
        /// The file.
        path: std::path::PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// SQLite failed.
    #[error("The catalogue failed")]
    Sqlite(#[from] rusqlite::Error),
    /// A stored value is not what this version writes.
    #[error("The catalogue holds {value:?} as {column}")]
    Value {
        /// Which column.
        column: &'static str,
        /// What it holds.
        value: String,
    },
    /// A newer version wrote it.
    #[error(
        "The catalogue has version {found}; this program knows up to {known}: start the newer one"
    )]
    Version {
        /// Its version.
        found: i64,
        /// Ours.
        known: i64,
    },
    /// Its thread has ended.
    #[error("The catalogue's thread has ended")]
    Gone,
    /// Its thread could not be started.
    #[error("Starting the catalogue's thread")]
    Thread(#[source] io::Error),
}

type Job = Box<dyn FnOnce(&mut Connection) + Send>;

/// Opens the file for whoever needs it once. It holds secrets of sandboxes: only its owner reads it,
/// and the files that SQLite puts beside it are like it.
///
/// # Errors
/// The file can't be used.
pub fn connect(path: &Path) -> Result<Connection, CatalogueError> {
    use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
    let private = |source| CatalogueError::File {
        path: path.to_owned(),
        source,
    };
    // One that is there is not opened but by SQLite: closing a file ends all locks that this process
    // has on it (<https://www.sqlite.org/howtocorrupt.html>, 2.2).
    let mut options = std::fs::OpenOptions::new();
    match options.write(true).create_new(true).mode(0o600).open(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(private(error)),
        _ => {}
    }
    let owner_only = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(path, owner_only).map_err(private)?;
    let mut connection = Connection::open(path)?;
    // One that reads first and is then to write fails at once (SQLITE_BUSY_SNAPSHOT) where another
    // connection has written in between: no patience helps it. One that begins with the lock waits.
    connection.set_transaction_behavior(TransactionBehavior::Immediate);
    schema::prepare(&mut connection)?;
    Ok(connection)
}

/// A handle to the catalogue's thread; it ends with its last handle.
#[derive(Clone, Debug)]
pub struct Catalogue {
    jobs: mpsc::Sender<Job>,
}

impl Catalogue {
    /// Opens or makes the catalogue at `path`.
    ///
    /// # Errors
    /// The file can't be used, or a newer version wrote it.
    pub fn open(path: &Path) -> Result<Self, CatalogueError> {
        let mut connection = connect(path)?;
        let (jobs, mut inbox) = mpsc::channel::<Job>(256);
        std::thread::Builder::new()
            .name("catalogue".into())
            .spawn(move || {
                while let Some(job) = inbox.blocking_recv() {
                    job(&mut connection);
                }
            })
            .map_err(CatalogueError::Thread)?;
        Ok(Self { jobs })
    }

    /// Runs a closure on the catalogue's thread.
    ///
    /// # Errors
    /// What the closure says, or that the thread has ended.
    pub async fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Connection) -> Result<T, CatalogueError> + Send + 'static,
    ) -> Result<T, CatalogueError> {
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move |connection| {
            let _ = reply.send(work(connection));
        });
        self.jobs
            .send(job)
            .await
            .map_err(|_| CatalogueError::Gone)?;
        answer.await.map_err(|_| CatalogueError::Gone)?
    }
}

/// A value as a JSON column.
pub(super) fn to_json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).expect("maps of texts and policies are JSON")
}

/// A JSON column as a value.
pub(super) fn from_json<T: serde::de::DeserializeOwned>(
    column: &'static str,
    text: &str,
) -> Result<T, CatalogueError> {
    serde_json::from_str(text).map_err(|_| CatalogueError::Value {
        column,
        value: text.to_owned(),
    })
}

/// A text column as whatever it stands for.
pub(super) fn parse<T: std::str::FromStr>(
    column: &'static str,
    text: &str,
) -> Result<T, CatalogueError> {
    text.parse().map_err(|_| CatalogueError::Value {
        column,
        value: text.to_owned(),
    })
}

/// The guest in columns 2 to 6 of a row and in `huge_pages`, where both tables have it.
fn shape(row: &rusqlite::Row<'_>) -> Result<GuestShape, CatalogueError> {
    let path = |index: usize| row.get::<_, String>(index).map(Into::into);
    Ok(GuestShape {
        vcpus: row.get(2)?,
        memory_mb: row.get(3)?,
        huge_pages: row.get("huge_pages")?,
        kernel: path(4)?,
        initrd: path(5)?,
        cmdline: row.get(6)?,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use super::*;
    use http_api::wire::SandboxState;

    const ROUNDS: usize = 100;

    #[test]
    fn programs_that_open_a_new_catalogue_at_once_all_do() {
        const PROGRAMS: usize = 8;
        let place = tempfile::tempdir().unwrap();
        for round in 0..10 {
            let path = place.path().join(format!("{round}.db"));
            let start = Barrier::new(PROGRAMS);
            thread::scope(|scope| {
                for _ in 0..PROGRAMS {
                    scope.spawn(|| {
                        start.wait();
                        connect(&path).unwrap();
                    });
                }
            });
        }
    }

    #[test]
    fn what_reads_and_then_writes_stands_another_writer() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("catalogue.db");
        let mut connection = connect(&path).unwrap();
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                let other = connect(&path).unwrap();
                other.execute_batch("CREATE TABLE other (n)").unwrap();
                while !done.load(Ordering::Relaxed) {
                    other.execute("INSERT INTO other VALUES (1)", []).unwrap();
                }
            });
            let failed: Vec<_> = (0..ROUNDS)
                .filter_map(|n| {
                    let row = SandboxRow::example(&format!("s{n}"), SandboxState::Creating);
                    let slots = ROUNDS as u32;
                    sandboxes::insert_with_free_slot(&mut connection, row, slots).err()
                })
                .collect();
            done.store(true, Ordering::Relaxed);
            assert!(failed.is_empty(), "{failed:?}");
        });
    }
}
