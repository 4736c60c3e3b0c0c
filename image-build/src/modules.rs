//! Kernel modules: what each depends on, and an order in which they can be loaded.
//!
//! A kernel package has no `modules.dep` (depmod makes it on installation), so the dependencies
//! are read from the modules themselves: `depends=a,b` among the NUL-separated strings of their
//! `.modinfo` section. Source: modinfo(8), Linux `include/linux/module.h`.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};

/// Module names with their dependencies; `-` and `_` are the same in a name.
#[derive(Debug, Default)]
pub(crate) struct Modules(BTreeMap<String, Vec<String>>);

impl Modules {
    /// Adds a module by its file's stem and content.
    pub(crate) fn add(&mut self, stem: &str, content: &[u8]) {
        let depends = depends(content).unwrap_or_default();
        let names = depends
            .split(',')
            .filter(|name| !name.is_empty())
            .map(normal)
            .collect();
        self.0.insert(normal(stem), names);
    }

    /// The wanted modules and all they need, dependencies first. One that isn't there is built
    /// into the kernel, which is as good.
    pub(crate) fn load_order(&self, wanted: &[&str]) -> Vec<String> {
        let mut order = Vec::new();
        for name in wanted {
            self.visit(&normal(name), &mut order);
        }
        order
    }

    fn visit(&self, name: &str, order: &mut Vec<String>) {
        let Some(depends) = self.0.get(name) else {
            return;
        };
        if order.iter().any(|done| done == name) {
            return;
        }
        for dependency in depends {
            self.visit(dependency, order);
        }
        order.push(name.to_owned());
    }
}

/// The form of a name that the kernel itself uses.
pub(crate) fn normal(name: &str) -> String {
    name.replace('-', "_")
}

fn depends(content: &[u8]) -> Option<&str> {
    const KEY: &[u8] = b"depends=";
    let starts = content
        .windows(KEY.len())
        .enumerate()
        .filter(|(_, window)| *window == KEY);
    // A whole string, not the end of another one.
    let mut whole = starts.filter(|(at, _)| *at == 0 || content[at - 1] == 0);
    let (at, _) = whole.next()?;
    let value = content[at + KEY.len()..].split(|byte| *byte == 0).next()?;
    std::str::from_utf8(value).ok()
}

/// The modules of a directory tree by name: path and content.
pub(crate) fn read_tree(
    directory: &std::path::Path,
) -> Result<BTreeMap<String, (String, Vec<u8>)>> {
    let mut found = BTreeMap::new();
    let mut pending = vec![directory.to_path_buf()];
    while let Some(directory) = pending.pop() {
        let entries = std::fs::read_dir(&directory)
            .with_context(|| format!("Listing {}", directory.display()))?;
        for entry in entries {
            let path = entry.context("Listing the kernel's modules")?.path();
            let stem = path
                .file_stem()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            if path.is_dir() {
                pending.push(path);
            } else if path.extension().is_some_and(|extension| extension == "ko") {
                let content =
                    std::fs::read(&path).with_context(|| format!("Reading {}", path.display()))?;
                found.insert(normal(&stem), (stem, content));
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn modules() -> Modules {
        let mut modules = Modules::default();
        for (name, depends) in [
            ("virtio", ""),
            ("virtio_ring", ""),
            ("virtio-pci", "virtio_ring,virtio,virtio_pci_modern_dev"),
            ("virtio_pci_modern_dev", ""),
            ("virtio_net", "virtio,virtio_ring,net_failover"),
            ("net_failover", "failover"),
            ("failover", ""),
        ] {
            modules.add(
                name,
                format!("ELF\0xdepends=no\0depends={depends}\0name={name}\0").as_bytes(),
            );
        }
        modules
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let order = modules().load_order(&["virtio_pci", "virtio-net", "ext4"]);
        assert_eq!(
            order,
            [
                "virtio_ring",
                "virtio",
                "virtio_pci_modern_dev",
                "virtio_pci",
                "failover",
                "net_failover",
                "virtio_net",
            ]
        );
    }

    #[test]
    fn depends_is_a_whole_string() {
        assert_eq!(depends(b"\0depends=a,b\0"), Some("a,b"));
        assert_eq!(depends(b"depends=\0"), Some(""));
        assert_eq!(depends(b"\0softdepends=a\0"), None);
    }
}
