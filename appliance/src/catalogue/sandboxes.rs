//! Rows of sandboxes.

use std::collections::BTreeMap;

use http_api::ids::{SandboxId, TemplateName};
use http_api::wire::{DiskLimits, NetworkPolicy, SandboxState};
use rusqlite::{Connection, OptionalExtension, Row, params};
use snapshot_format::BuildId;

use super::{CatalogueError, from_json, parse, shape, to_json};
use crate::lifetime::Lifetime;
use crate::network::SlotIndex;
use crate::vmm::GuestShape;

/// One sandbox as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SandboxRow {
    /// Its id.
    pub id: SandboxId,
    /// What it was made from.
    pub template: TemplateName,
    /// Its guest.
    pub shape: GuestShape,
    /// Its network slot, for its whole life.
    pub slot: SlotIndex,
    /// Where it was in its life when this was written.
    pub state: SandboxState,
    /// The newest build of its memory.
    pub build: Option<BuildId>,
    /// Why it failed.
    pub reason: Option<String>,
    /// Unix milliseconds.
    pub created_at_ms: u64,
    /// Environment of its processes.
    pub env: BTreeMap<String, String>,
    /// The caller's notes.
    pub labels: BTreeMap<String, String>,
    /// What it may reach.
    pub network: NetworkPolicy,
    /// How long it may run.
    pub lifetime: Lifetime,
    /// The request that it was made by, to know it again.
    pub request: String,
    /// What its guest's daemon asks callers for. Those of older versions ask for nothing.
    pub access_token: Option<String>,
    /// What the memory it is made from asks for until it is told its own. Not stored: half-made
    /// sandboxes are forgotten.
    pub inherited_token: Option<String>,
    /// Another one whenever it begins to run.
    pub execution_id: Option<String>,
    /// When it last began to run, Unix milliseconds.
    pub started_at_ms: u64,
    /// Size of its disk in MiB.
    pub disk_mb: u64,
    /// How much it may do with it; what it leaves open, the host decides.
    pub disk_limits: DiskLimits,
}

impl SandboxRow {
    /// Moves to a state. Its time goes on while it runs, and stands still while it doesn't.
    pub fn enter(&mut self, state: SandboxState, now_ms: u64) {
        self.state = state;
        match state {
            SandboxState::Running => self.lifetime.run(now_ms),
            SandboxState::Paused => self.lifetime.rest(now_ms),
            _ => {}
        }
    }
}

const COLUMNS: &str = "id, template, vcpus, memory_mb, kernel, initrd, cmdline, slot, state, \
                       build, reason, created_at_ms, env, labels, network, lifetime, request, \
                       access_token, execution_id, started_at_ms, disk_mb, huge_pages, \
                       disk_limits";

/// Stores a sandbox, new or changed.
///
/// # Errors
/// As SQLite's; another sandbox has its slot.
pub fn put(connection: &Connection, row: &SandboxRow) -> Result<(), CatalogueError> {
    let values = params![
        row.id.as_str(),
        row.template.as_str(),
        row.shape.vcpus,
        row.shape.memory_mb,
        row.shape.kernel.to_string_lossy(),
        row.shape.initrd.to_string_lossy(),
        row.shape.cmdline,
        row.slot.0,
        row.state.to_string(),
        row.build.map(|build| build.to_string()),
        row.reason,
        row.created_at_ms as i64,
        to_json(&row.env),
        to_json(&row.labels),
        to_json(&row.network),
        to_json(&row.lifetime),
        row.request,
        row.access_token,
        row.execution_id,
        row.started_at_ms as i64,
        row.disk_mb as i64,
        row.shape.huge_pages,
        to_json(&row.disk_limits),
    ];
    connection.execute(
        &format!(
            "INSERT INTO sandboxes ({COLUMNS}) VALUES
               (?1,?2,?3,?4,?5,?6,?7,?8,?9,?10,?11,?12,?13,?14,?15,?16,?17,?18,?19,?20,?21,?22,
                ?23)
             ON CONFLICT (id) DO UPDATE SET
               state = excluded.state, build = excluded.build, reason = excluded.reason,
               network = excluded.network, disk_limits = excluded.disk_limits, lifetime = excluded.lifetime,
               execution_id = excluded.execution_id, started_at_ms = excluded.started_at_ms"
        ),
        values,
    )?;
    Ok(())
}

/// Takes the lowest free slot for a new sandbox and stores it.
///
/// # Errors
/// `Ok(None)` when the pool is full; as SQLite's; the id exists.
pub fn insert_with_free_slot(
    connection: &mut Connection,
    mut row: SandboxRow,
    slots: u32,
) -> Result<Option<SandboxRow>, CatalogueError> {
    let transaction = connection.transaction()?;
    let free: Option<u32> = transaction
        .query_row(
            "SELECT MIN(candidate) FROM (
               SELECT 0 AS candidate UNION ALL SELECT slot + 1 FROM sandboxes
             ) WHERE candidate NOT IN (SELECT slot FROM sandboxes)",
            [],
            |found| found.get(0),
        )
        .optional()?
        .flatten();
    let Some(slot) = free.filter(|slot| *slot < slots) else {
        return Ok(None);
    };
    row.slot = SlotIndex(slot);
    put(&transaction, &row)?;
    transaction.commit()?;
    Ok(Some(row))
}

/// Whether a sandbox of this id is stored.
///
/// # Errors
/// As SQLite's.
pub fn exists(connection: &Connection, id: &SandboxId) -> Result<bool, CatalogueError> {
    let query = "SELECT EXISTS (SELECT 1 FROM sandboxes WHERE id = ?1)";
    Ok(connection.query_row(query, [id.as_str()], |row| row.get(0))?)
}

/// All sandboxes, by id.
///
/// # Errors
/// As SQLite's; a value that no version wrote.
pub fn all(connection: &Connection) -> Result<Vec<SandboxRow>, CatalogueError> {
    let mut statement =
        connection.prepare(&format!("SELECT {COLUMNS} FROM sandboxes ORDER BY id"))?;
    let mut rows = statement.query([])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        found.push(decode(row)?);
    }
    Ok(found)
}

/// Forgets a sandbox.
///
/// # Errors
/// As SQLite's.
pub fn remove(connection: &Connection, id: &SandboxId) -> Result<(), CatalogueError> {
    connection.execute("DELETE FROM sandboxes WHERE id = ?1", [id.as_str()])?;
    Ok(())
}

fn decode(row: &Row<'_>) -> Result<SandboxRow, CatalogueError> {
    let text = |index: usize| row.get::<_, String>(index);
    let state = text(8)?;
    let state = serde_json::from_value(serde_json::Value::String(state.clone())).map_err(|_| {
        CatalogueError::Value {
            column: "sandboxes.state",
            value: state,
        }
    })?;
    Ok(SandboxRow {
        id: parse("sandboxes.id", &text(0)?)?,
        template: parse("sandboxes.template", &text(1)?)?,
        shape: shape(row)?,
        slot: SlotIndex(row.get(7)?),
        state,
        build: row
            .get::<_, Option<String>>(9)?
            .map(|id| parse("sandboxes.build", &id))
            .transpose()?,
        reason: row.get(10)?,
        created_at_ms: row.get::<_, i64>(11)? as u64,
        env: from_json("sandboxes.env", &text(12)?)?,
        labels: from_json("sandboxes.labels", &text(13)?)?,
        network: from_json("sandboxes.network", &text(14)?)?,
        lifetime: from_json("sandboxes.lifetime", &text(15)?)?,
        request: text(16)?,
        access_token: row.get(17)?,
        inherited_token: None,
        execution_id: row.get(18)?,
        started_at_ms: row.get::<_, i64>(19)? as u64,
        disk_mb: row.get::<_, i64>(20)? as u64,
        disk_limits: from_json("sandboxes.disk_limits", &text(22)?)?,
    })
}

#[cfg(test)]
impl SandboxRow {
    /// A sandbox for tests: of template `base`, in slot 0, without a build.
    pub(crate) fn example(id: &str, state: SandboxState) -> Self {
        Self {
            id: id.parse().unwrap(),
            template: "base".parse().unwrap(),
            shape: GuestShape {
                vcpus: 1,
                memory_mb: 256,
                huge_pages: false,
                kernel: "/k".into(),
                initrd: "/i".into(),
                cmdline: "quiet".into(),
            },
            slot: SlotIndex(0),
            state,
            build: None,
            reason: None,
            created_at_ms: 5,
            env: BTreeMap::new(),
            labels: BTreeMap::new(),
            network: NetworkPolicy::default(),
            lifetime: Lifetime::default(),
            request: String::new(),
            access_token: None,
            inherited_token: None,
            execution_id: None,
            started_at_ms: 0,
            disk_mb: 0,
            disk_limits: DiskLimits::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(id: &str) -> SandboxRow {
        SandboxRow {
            env: BTreeMap::from([("A".into(), "1".into())]),
            request: "{}".into(),
            access_token: Some("t".into()),
            disk_mb: 128,
            disk_limits: DiskLimits {
                mib_per_s: Some(8),
                ops_per_s: None,
            },
            ..SandboxRow::example(id, SandboxState::Creating)
        }
    }

    fn empty() -> Connection {
        let mut connection = Connection::open_in_memory().unwrap();
        super::super::schema::prepare(&mut connection).unwrap();
        connection
    }

    #[test]
    fn a_sandbox_comes_back_as_it_was_stored() {
        let mut connection = empty();
        let stored = insert_with_free_slot(&mut connection, row("a"), 10)
            .unwrap()
            .unwrap();
        let mut changed = stored.clone();
        changed.state = SandboxState::Paused;
        changed.build = Some(BuildId::from_bytes([3; 16]));
        changed.execution_id = Some("e".into());
        changed.started_at_ms = 7;
        changed.lifetime.left_ms = Some(9);
        put(&connection, &changed).unwrap();
        assert_eq!(all(&connection).unwrap(), [changed]);
    }

    #[test]
    fn slots_are_reused_lowest_first_and_the_pool_ends() {
        let mut connection = empty();
        let slot_of = |id: &str, connection: &mut Connection| {
            insert_with_free_slot(connection, row(id), 3)
                .unwrap()
                .map(|row| row.slot.0)
        };
        assert_eq!(slot_of("a", &mut connection), Some(0));
        assert_eq!(slot_of("b", &mut connection), Some(1));
        assert_eq!(slot_of("c", &mut connection), Some(2));
        assert_eq!(slot_of("d", &mut connection), None);
        remove(&connection, &"b".parse().unwrap()).unwrap();
        assert_eq!(slot_of("d", &mut connection), Some(1));
    }
}
