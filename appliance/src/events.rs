//! What happened to sandboxes: written down in order, and told to whoever listens.
//!
//! ```text
//!   cell ──send──▶ thread "events" ──one transaction──▶ table events ──▶ watch: newest id
//!                                                            ▲                  │
//!                                                            └── reads after ── subscribers
//! ```
//!
//! Subscribers read the table, so one that is slow, or comes back after a restart of the daemon,
//! misses nothing that the table still has. Events describe states that are stored elsewhere: a
//! crash may lose the last ones, and the list of sandboxes says what is so.

use std::path::Path;
use std::sync::mpsc;

use futures_util::stream;
use http_api::EventStream;
use http_api::wire::{Event, EventKind, SandboxState};
use rusqlite::{Connection, Row, params};
use tokio::sync::watch;

use crate::catalogue::{self, Catalogue, CatalogueError};
use crate::clock::now_ms;

/// Events that are kept.
const KEPT: u64 = 100_000;
/// How many a subscriber reads at once.
const PAGE: usize = 256;
/// What subscribers see when the daemon ends.
const CLOSED: u64 = u64::MAX;

/// One thing that happened.
#[derive(Clone, Debug)]
pub struct Happened {
    /// What.
    pub kind: EventKind,
    /// To which sandbox.
    pub sandbox: String,
    /// The state it is in now.
    pub state: Option<SandboxState>,
    /// The run that it is about.
    pub execution_id: Option<String>,
    /// Why.
    pub reason: Option<String>,
}

/// Where events go.
#[derive(Clone, Debug)]
pub struct Events {
    // Unbounded: each event follows an operation that passed a bounded mailbox.
    happened: mpsc::Sender<(u64, Happened)>,
    newest: watch::Sender<u64>,
}

impl Events {
    /// Begins to write to the catalogue at `path`, which is there.
    ///
    /// # Errors
    /// It can't be opened, or the thread not be started.
    pub fn open(path: &Path) -> Result<Self, CatalogueError> {
        // A connection of its own: writing events never makes a sandbox wait.
        let mut connection = catalogue::connect(path)?;
        connection.pragma_update(None, "synchronous", "NORMAL")?;
        let newest = watch::Sender::new(newest(&connection)?);
        let (happened, inbox) = mpsc::channel();
        let told = newest.clone();
        std::thread::Builder::new()
            .name("events".into())
            .spawn(move || {
                while let Ok(first) = inbox.recv() {
                    let all: Vec<_> = std::iter::once(first).chain(inbox.try_iter()).collect();
                    match write(&mut connection, &all) {
                        Ok(id) => told.send_if_modified(|newest| {
                            let open = *newest != CLOSED;
                            if open {
                                *newest = id;
                            }
                            open
                        }),
                        Err(error) => {
                            tracing::error!(%error, count = all.len(), "Events are lost");
                            false
                        }
                    };
                }
            })
            .map_err(CatalogueError::Thread)?;
        Ok(Self { happened, newest })
    }

    /// Writes one down, soon.
    pub fn tell(&self, happened: Happened) {
        let _ = self.happened.send((now_ms(), happened));
    }

    /// Ends all streams: the daemon stops.
    pub fn close(&self) {
        self.newest.send_replace(CLOSED);
    }

    /// What happens after the event `after`, or from now on.
    #[must_use]
    pub fn stream(&self, catalogue: Catalogue, after: Option<u64>) -> EventStream {
        let news = self.newest.subscribe();
        let last = after.unwrap_or_else(|| *news.borrow());
        let reader = Reader {
            catalogue,
            news,
            last,
            page: Vec::new().into_iter(),
        };
        Box::pin(stream::unfold(reader, async |mut reader| {
            let event = reader.next().await?;
            Some((event, reader))
        }))
    }
}

/// One subscriber.
struct Reader {
    catalogue: Catalogue,
    news: watch::Receiver<u64>,
    last: u64,
    page: std::vec::IntoIter<Event>,
}

impl Reader {
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.page.next() {
                self.last = event.id;
                return Some(event);
            }
            let newest = *self.news.borrow_and_update();
            let last = self.last;
            let read = move |connection: &mut Connection| after(connection, last);
            let page = self.catalogue.call(read).await.ok()?;
            if page.is_empty() {
                if newest == CLOSED || self.news.changed().await.is_err() {
                    return None;
                }
                continue;
            }
            self.page = page.into_iter();
        }
    }
}

/// The id of the last event, also of one that was forgotten.
fn newest(connection: &Connection) -> Result<u64, CatalogueError> {
    let query = "SELECT COALESCE(MAX(seq), 0) FROM sqlite_sequence WHERE name = 'events'";
    Ok(connection.query_row(query, [], |row| row.get::<_, i64>(0))? as u64)
}

fn write(connection: &mut Connection, all: &[(u64, Happened)]) -> Result<u64, CatalogueError> {
    let transaction = connection.transaction()?;
    for (at_ms, event) in all {
        transaction.execute(
            "INSERT INTO events (at_ms, kind, sandbox, state, execution_id, reason)
             VALUES (?1,?2,?3,?4,?5,?6)",
            params![
                *at_ms as i64,
                event.kind.name(),
                event.sandbox,
                event.state.map(|state| state.to_string()),
                event.execution_id,
                event.reason,
            ],
        )?;
    }
    let id = transaction.last_insert_rowid() as u64;
    let oldest = id.saturating_sub(KEPT) as i64;
    transaction.execute("DELETE FROM events WHERE id <= ?1", [oldest])?;
    transaction.commit()?;
    Ok(id)
}

/// The next ones after `last`; first of all that some were forgotten, if so.
fn after(connection: &Connection, last: u64) -> Result<Vec<Event>, CatalogueError> {
    let newest = newest(connection)?;
    let query = "SELECT id, at_ms, kind, sandbox, state, execution_id, reason FROM events
                 WHERE id > ?1 ORDER BY id LIMIT ?2";
    let mut statement = connection.prepare_cached(query)?;
    let from = i64::try_from(last).unwrap_or(i64::MAX);
    let mut rows = statement.query(params![from, PAGE as i64])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        found.push(decode(row)?);
    }
    // Ids have no gaps. A client may also come from a catalogue that is gone.
    let before = found.first().map_or(newest, |event| event.id - 1);
    if before != last {
        let reset = Event {
            id: before,
            at_ms: now_ms(),
            kind: EventKind::Reset,
            sandbox: None,
            state: None,
            execution_id: None,
            reason: Some("Events were forgotten; read the list of sandboxes again".into()),
        };
        found.insert(0, reset);
    }
    Ok(found)
}

fn decode(row: &Row<'_>) -> Result<Event, CatalogueError> {
    let word = |column: &'static str, text: String| {
        let value = serde_json::Value::String(text.clone());
        (column, text, value)
    };
    let (column, text, value) = word("events.kind", row.get(2)?);
    let kind = serde_json::from_value(value).map_err(|_| CatalogueError::Value {
        column,
        value: text,
    })?;
    let state = match row.get::<_, Option<String>>(4)? {
        None => None,
        Some(text) => {
            let (column, text, value) = word("events.state", text);
            Some(
                serde_json::from_value(value).map_err(|_| CatalogueError::Value {
                    column,
                    value: text,
                })?,
            )
        }
    };
    Ok(Event {
        id: row.get::<_, i64>(0)? as u64,
        at_ms: row.get::<_, i64>(1)? as u64,
        kind,
        sandbox: Some(row.get(3)?),
        state,
        execution_id: row.get(5)?,
        reason: row.get(6)?,
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_util::StreamExt;

    use super::*;

    fn happened(sandbox: &str) -> Happened {
        Happened {
            kind: EventKind::State,
            sandbox: sandbox.into(),
            state: Some(SandboxState::Running),
            execution_id: Some("e".into()),
            reason: None,
        }
    }

    async fn take(stream: &mut EventStream, count: usize) -> Vec<Event> {
        let taken = stream.take(count).collect();
        let taken = tokio::time::timeout(Duration::from_secs(60), taken);
        taken.await.expect("in time")
    }

    #[tokio::test]
    async fn events_are_told_once_and_in_order_across_restarts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("catalogue.db");
        let catalogue = Catalogue::open(&path).unwrap();
        let events = Events::open(&path).unwrap();
        let mut live = events.stream(catalogue.clone(), None);
        for name in ["a", "b", "c"] {
            events.tell(happened(name));
        }
        let seen = take(&mut live, 3).await;
        let names: Vec<_> = seen.iter().map(|e| e.sandbox.clone().unwrap()).collect();
        assert_eq!(names, ["a", "b", "c"]);
        assert_eq!([seen[0].id, seen[1].id, seen[2].id], [1, 2, 3]);

        // Another daemon on the same catalogue: what came after the first, then what is new.
        events.close();
        assert_eq!(take(&mut live, 1).await, []);
        drop(events);
        let events = Events::open(&path).unwrap();
        let mut again = events.stream(catalogue.clone(), Some(1));
        events.tell(happened("d"));
        let seen = take(&mut again, 3).await;
        let names: Vec<_> = seen.iter().map(|e| e.sandbox.clone().unwrap()).collect();
        assert_eq!(names, ["b", "c", "d"]);
        assert_eq!(seen[2].id, 4);
    }

    #[tokio::test]
    async fn who_missed_forgotten_events_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("catalogue.db");
        let catalogue = Catalogue::open(&path).unwrap();
        let mut connection = catalogue::connect(&path).unwrap();
        let all: Vec<_> = (0..10).map(|n| (n, happened("a"))).collect();
        write(&mut connection, &all).unwrap();
        connection
            .execute("DELETE FROM events WHERE id < 6", [])
            .unwrap();
        let events = Events::open(&path).unwrap();
        let kinds = async |after, count| {
            let mut stream = events.stream(catalogue.clone(), Some(after));
            let seen = take(&mut stream, count).await;
            seen.iter().map(|e| (e.id, e.kind)).collect::<Vec<_>>()
        };
        assert_eq!(
            kinds(2, 2).await,
            [(5, EventKind::Reset), (6, EventKind::State)]
        );
        assert_eq!(kinds(5, 1).await, [(6, EventKind::State)]);
        // From another catalogue's future.
        assert_eq!(kinds(99, 1).await, [(10, EventKind::Reset)]);
        connection.execute("DELETE FROM events", []).unwrap();
        assert_eq!(kinds(2, 1).await, [(10, EventKind::Reset)]);
    }
}
