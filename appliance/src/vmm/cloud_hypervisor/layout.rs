//! Where a guest's memory is: in its address space, in the files of its VMM, and in a build.
//!
//! ```text
//!   guest     0 ─────────── 3 GiB     4 GiB ───────     a hole below 4 GiB
//!   VMM       slot 0's file           slot 1's file     or one file, at two places
//!   build     page 0 ──────────────────────────────     one after the other
//! ```
//!
//! A [`Layout`] exists only for memory that was checked: whole pages, disjoint, as much as the
//! guest is to have.

use std::ops::Range;

use serde_json::Value;
use snapshot_format::PageSize;
use uffd_engine::region::ClaimedRegion;

use super::StateError;
use crate::vmm::memory::MemorySize;

/// More is no guest's.
const MAX_MAPPINGS: usize = 64;
/// Addresses end below this on every machine, and arithmetic stays exact.
const END: u64 = 1 << 56;

/// One slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Its number.
    pub slot: u32,
    /// Its address in the guest.
    pub address: u64,
    /// Its size in bytes.
    pub bytes: u64,
    /// Where in its file it begins.
    pub file_offset: u64,
}

/// All slots of a guest, by their addresses in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    mappings: Vec<Mapping>,
    page_size: PageSize,
}

impl Layout {
    /// As a configuration that goes before a migration says.
    ///
    /// # Errors
    /// It doesn't, or the memory can't be as much as `memory` in whole pages.
    pub fn of(config: &Value, memory: MemorySize) -> Result<Self, StateError> {
        let listed = config[MANAGER][MAPPINGS].as_array();
        let listed = listed.ok_or_else(|| field(MAPPINGS, "is not there"))?;
        if !(1..=MAX_MAPPINGS).contains(&listed.len()) {
            let problem = format!("has {} entries", listed.len());
            return Err(field(MAPPINGS, &problem));
        }
        let mut mappings = Vec::with_capacity(listed.len());
        for entry in listed {
            mappings.push(mapping(entry, memory.page_size)?);
        }
        mappings.sort_by_key(|mapping| mapping.address);
        for pair in mappings.windows(2) {
            if pair[0].address + pair[0].bytes > pair[1].address {
                return Err(field("gpa", "overlaps another slot's"));
            }
        }
        let mut slots: Vec<u32> = mappings.iter().map(|mapping| mapping.slot).collect();
        slots.sort_unstable();
        slots.dedup();
        if slots.len() != mappings.len() {
            return Err(field("slot", "is that of another, too"));
        }
        let found: u64 = mappings.iter().map(|mapping| mapping.bytes).sum();
        if found != memory.bytes {
            return Err(StateError::Size {
                found,
                expected: memory.bytes,
            });
        }
        Ok(Self {
            mappings,
            page_size: memory.page_size,
        })
    }

    /// The slots.
    #[must_use]
    pub fn mappings(&self) -> &[Mapping] {
        &self.mappings
    }

    /// Each slot with its bytes in the build.
    pub fn places(&self) -> impl Iterator<Item = (Mapping, Range<u64>)> + '_ {
        let mut next = 0;
        self.mappings.iter().map(move |mapping| {
            let place = next..next + mapping.bytes;
            next = place.end;
            (*mapping, place)
        })
    }

    /// As regions with guest addresses for host addresses.
    #[must_use]
    pub fn regions(&self) -> Vec<ClaimedRegion> {
        self.places()
            .map(|(mapping, place)| ClaimedRegion {
                base: mapping.address,
                size: mapping.bytes,
                offset: place.start,
                page_size: self.page_size.bytes(),
            })
            .collect()
    }

    /// Has a configuration say that all slots are in one file that is laid out as the build.
    pub fn put_into_one_file(&self, config: &mut Value) {
        let listed = config.pointer_mut(&format!("/{MANAGER}/{MAPPINGS}"));
        for entry in listed.and_then(Value::as_array_mut).into_iter().flatten() {
            let slot = entry["slot"].as_u64();
            let place = self
                .places()
                .find(|(mapping, _)| Some(u64::from(mapping.slot)) == slot);
            if let Some((_, place)) = place {
                entry["file_offset"] = place.start.into();
            }
        }
    }
}

const MANAGER: &str = "memory_manager_data";
const MAPPINGS: &str = "guest_ram_mappings";

fn mapping(entry: &Value, page_size: PageSize) -> Result<Mapping, StateError> {
    let number = |name: &'static str| {
        entry[name]
            .as_u64()
            .filter(|number| *number < END)
            .ok_or_else(|| field(name, "is no number, or too large"))
    };
    let pages = |name: &'static str| {
        let bytes = number(name)?;
        if bytes.is_multiple_of(page_size.bytes()) {
            return Ok(bytes);
        }
        Err(field(name, "is no whole number of pages"))
    };
    if entry["virtio_mem"] == true {
        return Err(field("virtio_mem", "is true, and such memory is not kept"));
    }
    let mapping = Mapping {
        slot: u32::try_from(number("slot")?).map_err(|_| field("slot", "is too large"))?,
        address: pages("gpa")?,
        bytes: pages("size")?,
        file_offset: pages("file_offset")?,
    };
    if mapping.bytes == 0 {
        return Err(field("size", "is 0"));
    }
    Ok(mapping)
}

fn field(name: &'static str, problem: &str) -> StateError {
    StateError::Field {
        field: name,
        problem: problem.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const GIB: u64 = 1 << 30;

    fn small(bytes: u64) -> MemorySize {
        MemorySize {
            bytes,
            page_size: PageSize::Size4K,
        }
    }

    fn entry(slot: u32, gpa: u64, size: u64, file_offset: u64) -> Value {
        json!({ "slot": slot, "gpa": gpa, "size": size, "zone_id": "mem", "virtio_mem": false,
                "file_offset": file_offset })
    }

    fn config(entries: &[Value]) -> Value {
        json!({ "vm_config": { "x": 1 }, "memory_manager_data": { "guest_ram_mappings": entries } })
    }

    #[test]
    fn memory_around_the_hole_is_one_after_the_other_in_a_build() {
        // Two files, and not in the order of their addresses.
        let mut config = config(&[entry(3, 4 * GIB, GIB, 0), entry(0, 0, 3 * GIB, 0)]);
        let layout = Layout::of(&config, small(4 * GIB)).unwrap();
        let regions = layout.regions();
        let places: Vec<_> = regions.iter().map(|r| (r.base, r.size, r.offset)).collect();
        assert_eq!(places, [(0, 3 * GIB, 0), (4 * GIB, GIB, 3 * GIB)]);
        layout.put_into_one_file(&mut config);
        let again = Layout::of(&config, small(4 * GIB)).unwrap();
        let offsets = again.mappings().iter().map(|m| m.file_offset);
        assert!(offsets.eq([0, 3 * GIB]), "{again:?}");
        assert_eq!(config["vm_config"]["x"], 1);
    }

    #[test]
    fn what_can_be_no_guests_memory_is_refused_by_its_field() {
        let refused = |entries: &[Value], bytes| {
            let error = Layout::of(&config(entries), small(bytes)).unwrap_err();
            error.to_string()
        };
        let good = entry(0, 0, 4096, 0);
        assert!(refused(&[], 4096).contains("guest_ram_mappings has 0"));
        assert!(refused(std::slice::from_ref(&good), 8192).contains("4096"));
        assert!(refused(&[entry(0, 1, 4096, 0)], 4096).contains("gpa"));
        assert!(refused(&[entry(0, 0, 0, 0)], 0).contains("size"));
        assert!(refused(&[entry(0, u64::MAX, 4096, 0)], 4096).contains("gpa"));
        assert!(refused(&[good.clone(), entry(1, 0, 4096, 0)], 8192).contains("gpa"));
        assert!(refused(&[good.clone(), entry(0, 8192, 4096, 0)], 8192).contains("slot"));
        let mut hotplugged = good;
        hotplugged["virtio_mem"] = true.into();
        assert!(refused(&[hotplugged], 4096).contains("virtio_mem"));
        let huge = MemorySize {
            bytes: 8192,
            page_size: PageSize::Size2M,
        };
        let parts = config(&[entry(0, 0, 8192, 0)]);
        let error = Layout::of(&parts, huge).unwrap_err().to_string();
        assert!(error.contains("size"), "{error}");
        assert!(Layout::of(&json!({}), small(4096)).is_err());
        assert!(Layout::of(&json!([1, 2]), small(4096)).is_err());
    }
}
