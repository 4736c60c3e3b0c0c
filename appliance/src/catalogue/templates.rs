//! Rows of templates that were made from sandboxes; those of the configuration file are
//! not stored.

use http_api::ids::{SandboxId, TemplateName};
use rusqlite::{Connection, Row, params};
use snapshot_format::BuildId;

use super::{CatalogueError, parse, shape};
use crate::vmm::GuestShape;

/// One template with memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TemplateRow {
    /// What sandboxes name it by.
    pub name: TemplateName,
    /// The build it points at.
    pub build: BuildId,
    /// The guest that is in it.
    pub shape: GuestShape,
    /// Unix milliseconds.
    pub created_at_ms: u64,
    /// The sandbox it was taken of.
    pub sandbox: Option<SandboxId>,
    /// What the guest's daemon in that memory asks callers for.
    pub access_token: Option<String>,
    /// Size of the disk in MiB.
    pub disk_mb: u64,
    /// Only there until what is made of it is made: a fork's.
    pub transient: bool,
}

const COLUMNS: &str = "name, build, vcpus, memory_mb, kernel, initrd, cmdline, created_at_ms, \
                       sandbox, access_token, disk_mb, transient, huge_pages";

/// Stores a new template; `false` when the name is taken.
///
/// # Errors
/// As SQLite's.
pub fn insert(connection: &Connection, row: &TemplateRow) -> Result<bool, CatalogueError> {
    let inserted = connection.execute(
        &format!(
            "INSERT INTO templates ({COLUMNS}) VALUES
               (?1,?2,?3,?4,?5,?6,?7,?8,?9,?10,?11,?12,?13)
             ON CONFLICT (name) DO NOTHING"
        ),
        params![
            row.name.as_str(),
            row.build.to_string(),
            row.shape.vcpus,
            row.shape.memory_mb,
            row.shape.kernel.to_string_lossy(),
            row.shape.initrd.to_string_lossy(),
            row.shape.cmdline,
            row.created_at_ms as i64,
            row.sandbox.as_ref().map(SandboxId::as_str),
            row.access_token,
            row.disk_mb as i64,
            row.transient,
            row.shape.huge_pages,
        ],
    )?;
    Ok(inserted == 1)
}

/// All templates, by name.
///
/// # Errors
/// As SQLite's; a value that no version wrote.
pub fn all(connection: &Connection) -> Result<Vec<TemplateRow>, CatalogueError> {
    let mut statement =
        connection.prepare(&format!("SELECT {COLUMNS} FROM templates ORDER BY name"))?;
    let mut rows = statement.query([])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        found.push(decode(row)?);
    }
    Ok(found)
}

/// Forgets what a daemon that ended in the middle of a fork has left.
///
/// # Errors
/// As SQLite's.
pub fn remove_transient(connection: &Connection) -> Result<usize, CatalogueError> {
    Ok(connection.execute("DELETE FROM templates WHERE transient", [])?)
}

/// Forgets a template; `false` when there is none of this name.
///
/// # Errors
/// As SQLite's.
pub fn remove(connection: &Connection, name: &TemplateName) -> Result<bool, CatalogueError> {
    Ok(connection.execute("DELETE FROM templates WHERE name = ?1", [name.as_str()])? == 1)
}

fn decode(row: &Row<'_>) -> Result<TemplateRow, CatalogueError> {
    let text = |index: usize| row.get::<_, String>(index);
    Ok(TemplateRow {
        name: parse("templates.name", &text(0)?)?,
        build: parse("templates.build", &text(1)?)?,
        shape: shape(row)?,
        created_at_ms: row.get::<_, i64>(7)? as u64,
        sandbox: row
            .get::<_, Option<String>>(8)?
            .map(|id| parse("templates.sandbox", &id))
            .transpose()?,
        access_token: row.get(9)?,
        disk_mb: row.get::<_, i64>(10)? as u64,
        transient: row.get(11)?,
    })
}
