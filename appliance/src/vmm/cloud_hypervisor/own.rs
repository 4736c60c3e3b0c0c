//! A guest for a Cloud Hypervisor that reads pages out of a file by itself: what a migration would
//! have brought, as the directory of a snapshot.
//!
//! The memory's file has all of the memory, laid out as the build is; the state has to say so,
//! because the state of a migration says which parts of the VMM's own files had something in them.
//!
//! Source: `docs/snapshot_restore.md` and `vmm/src/memory_manager.rs` of Cloud Hypervisor 52 and 53.

use std::fs;
use std::io;
use std::path::Path;

use serde_json::{Value, json};

use super::StateError;
use super::layout::Layout;
use super::state::{Contents, json};

const CONFIG: &str = "config.json";
const STATE: &str = "state.json";
/// Where the state keeps what the memory manager says: text, with JSON in it.
const MANAGER: &str = "/snapshots/memory-manager/snapshot_data/state";

/// The two files beside the memory.
pub(super) struct Files {
    config: Vec<u8>,
    state: Vec<u8>,
}

/// Makes them of what a build keeps.
pub(super) fn files(
    config: &Value,
    contents: &Contents,
    layout: &Layout,
) -> Result<Files, StateError> {
    let mut state = json("state", &contents.state)?;
    let missing = || StateError::Field {
        field: "memory-manager",
        problem: "has no state".into(),
    };
    let manager = state.pointer_mut(MANAGER).ok_or_else(missing)?;
    let text = manager.as_str().ok_or_else(missing)?;
    let mut said = json("memory manager's state", text.as_bytes())?;
    let ranges: Vec<Value> = layout
        .mappings()
        .iter()
        .map(|mapping| json!({ "gpa": mapping.address, "length": mapping.bytes }))
        .collect();
    match said.as_object_mut() {
        Some(members) => members.insert("memory_ranges".into(), json!({ "data": ranges })),
        None => return Err(missing()),
    };
    *manager = said.to_string().into();
    Ok(Files {
        config: config["vm_config"].to_string().into_bytes(),
        state: state.to_string().into_bytes(),
    })
}

impl Files {
    /// Puts them where the memory is.
    pub(super) fn write(&self, dir: &Path) -> io::Result<()> {
        fs::write(dir.join(CONFIG), &self.config)?;
        fs::write(dir.join(STATE), &self.state)
    }
}

#[cfg(test)]
mod tests {
    use snapshot_format::PageSize;

    use super::*;
    use crate::vmm::memory::MemorySize;

    #[test]
    fn the_state_says_that_all_memory_is_in_the_file() {
        let config = json!({
            "vm_config": { "memory": { "size": 8192 } },
            "memory_manager_data": { "guest_ram_mappings": [
                { "slot": 0, "gpa": 0, "size": 8192, "file_offset": 0, "virtio_mem": false },
            ] },
        });
        let size = MemorySize {
            bytes: 8192,
            page_size: PageSize::Size4K,
        };
        let layout = Layout::of(&config, size).unwrap();
        let inner =
            json!({ "memory_ranges": { "data": [{ "gpa": 4096, "length": 4096 }] }, "x": 1 });
        let state = json!({
            "snapshots": { "memory-manager": {
                "snapshots": {}, "snapshot_data": { "state": inner.to_string() },
            } },
            "snapshot_data": null,
        });
        let contents = |state: &Value| Contents {
            config: config.to_string().into_bytes(),
            state: state.to_string().into_bytes(),
        };
        let files = files(&config, &contents(&state), &layout).unwrap();
        assert_eq!(files.config, br#"{"memory":{"size":8192}}"#);
        let written: Value = serde_json::from_slice(&files.state).unwrap();
        let said = written.pointer(MANAGER).unwrap().as_str().unwrap();
        let said: Value = serde_json::from_str(said).unwrap();
        let all = json!({ "data": [{ "gpa": 0, "length": 8192 }] });
        assert_eq!((&said["memory_ranges"], &said["x"]), (&all, &json!(1)));
        let refused = super::files(&config, &contents(&json!({})), &layout);
        assert!(refused.is_err());
    }
}
