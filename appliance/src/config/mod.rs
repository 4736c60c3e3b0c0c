//! The configuration file: TOML, unknown keys refused, everything but the data
//! directory's content has a default. A file here for each table, which checks itself; what two
//! tables have to agree on is checked by the whole.

mod disks;
mod engine;
mod listeners;
mod network;
mod template;
mod vmm;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use thiserror::Error;

pub use disks::{DiskBackend, DisksConfig};
pub use engine::EngineConfig;
pub use listeners::{ApiConfig, ClientCertificates, TlsConfig, TrafficConfig};
pub use network::NetworkConfig;
pub use template::{TemplateConfig, check_disk_size, check_shape};
pub use vmm::{AcceleratorChoice, DriverChoice, VmmConfig};

/// What is wrong: the key, with its table, and what would do.
type Wrong = (String, String);

/// Why a configuration can't be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("Reading configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It is not the TOML we know.
    #[error("Configuration {} is wrong:\n{message}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Line, column, key, and what would do.
        message: String,
    },
    /// A value can't be.
    #[error("Configuration {}: {key} {problem}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The key, with its table.
        key: String,
        /// What is wrong and what would do.
        problem: String,
    },
}

/// The whole file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Names this daemon's namespaces and links: two on one host differ.
    #[serde(default = "default_instance")]
    pub instance: String,
    /// Where builds, disks and the catalogue are kept.
    #[serde(default = "default_data_dir")]
    pub data_dir: PathBuf,
    /// Where sockets and page-state tables are; in memory, and empty after every boot.
    #[serde(default = "default_run_dir")]
    pub run_dir: PathBuf,
    /// Threads that own sandboxes; one per CPU when absent.
    #[serde(default)]
    pub shards: Option<usize>,
    /// Listeners of the API.
    #[serde(default)]
    pub api: ApiConfig,
    /// Listeners for what runs in sandboxes.
    #[serde(default)]
    pub traffic: TrafficConfig,
    /// Keys and certificates of encrypted listeners.
    #[serde(default)]
    pub tls: TlsConfig,
    /// Slots.
    #[serde(default)]
    pub network: NetworkConfig,
    /// Disks.
    #[serde(default)]
    pub disks: DisksConfig,
    /// Fault serving.
    #[serde(default)]
    pub engine: EngineConfig,
    /// VMMs.
    #[serde(default)]
    pub vmm: VmmConfig,
    /// Templates that boot from a disk.
    #[serde(default, rename = "template")]
    pub templates: Vec<TemplateConfig>,
}

fn default_instance() -> String {
    "thaw".into()
}
fn default_data_dir() -> PathBuf {
    "/var/lib/thaw".into()
}
fn default_run_dir() -> PathBuf {
    "/run/thaw".into()
}
impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        let config: Self = toml::from_str(&text).map_err(|error| ConfigError::Parse {
            path: path.to_owned(),
            message: error.to_string(),
        })?;
        config
            .check()
            .map_err(|(key, problem)| ConfigError::Value {
                path: path.to_owned(),
                key,
                problem,
            })?;
        Ok(config)
    }

    fn check(&self) -> Result<(), Wrong> {
        let name = &self.instance;
        let plain = name.bytes().all(|b| b.is_ascii_lowercase());
        if name.is_empty() || name.len() > 8 || !plain {
            let problem = format!("is {name:?}; 1 to 8 lowercase letters are possible");
            return Err(("instance".into(), problem));
        }
        // A sandbox's sockets lie two levels below, and the kernel takes 107 bytes of path.
        let most = 107 - "/sandboxes/".len() - 57 - "/vmm/uffd.sock".len();
        if self.run_dir.as_os_str().len() > most {
            let problem = format!("is {}; at most {most} bytes fit", self.run_dir.display());
            return Err(("run_dir".into(), problem));
        }
        if self.shards == Some(0) {
            return Err(("shards".into(), "is 0; at least one is needed".into()));
        }
        self.check_listeners()?;
        self.check_limits()?;
        self.check_tls()?;
        self.engine.check()?;
        self.network.check()?;
        self.vmm.check()?;
        self.disks.check()?;
        let mut names = BTreeSet::new();
        for template in &self.templates {
            let key = |field: &str| format!("template {:?}: {field}", template.name.as_str());
            if !names.insert(&template.name) {
                return Err((key("name"), "is there twice".into()));
            }
            template
                .check()
                .map_err(|(field, problem)| (key(field), problem))?;
        }
        Ok(())
    }

    /// The Unix socket of the API.
    #[must_use]
    pub fn api_socket(&self) -> PathBuf {
        self.api
            .socket
            .clone()
            .unwrap_or_else(|| self.run_dir.join("api.sock"))
    }

    /// The catalogue's file.
    #[must_use]
    pub fn catalogue(&self) -> PathBuf {
        self.data_dir.join("catalogue.db")
    }

    /// The preload library.
    #[must_use]
    pub fn preload(&self) -> PathBuf {
        self.vmm.preload.clone().unwrap_or_else(|| {
            let program = std::env::current_exe().unwrap_or_default();
            program.with_file_name("libuffd_preload.so")
        })
    }

    /// How many VMMs wait for new sandboxes, and as many for paused ones.
    #[must_use]
    pub fn ready_processes(&self) -> usize {
        self.vmm.ready_processes.unwrap_or(self.network.ready_slots)
    }

    /// How many threads own sandboxes.
    #[must_use]
    pub fn shard_count(&self) -> usize {
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        self.shards.unwrap_or(cpus)
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use ipnet::Ipv4Net;

    use super::*;

    fn read(text: &str) -> Result<Config, ConfigError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        Config::read(file.path())
    }

    #[test]
    fn an_empty_file_is_a_configuration() {
        let config = read("").unwrap();
        assert_eq!(config.instance, "thaw");
        assert!(config.templates.is_empty());
    }

    #[test]
    fn guests_never_reach_link_local_addresses() {
        let config = read("[network]\nclosed = []\nresolver = \"192.0.2.1\"\n").unwrap();
        let egress = config.network.egress();
        assert!(egress.internet);
        assert_eq!(
            egress.closed,
            ["169.254.0.0/16".parse::<Ipv4Net>().unwrap()]
        );
        assert_eq!(egress.resolver, Some(Ipv4Addr::new(192, 0, 2, 1)));
    }

    #[test]
    fn an_unknown_key_is_refused_by_name() {
        let error = read("[engine]\nwindow = 4\n").unwrap_err().to_string();
        assert!(
            error.contains("window") && error.contains("window_pages"),
            "{error}"
        );
    }

    #[test]
    fn values_that_cannot_be_are_refused_by_key() {
        for (text, key) in [
            ("instance = \"Thaw!\"", "instance"),
            ("shards = 0", "shards"),
            (
                "run_dir = \"/run/a-path-that-is-too-long-for-sockets\"",
                "run_dir",
            ),
            ("[traffic]\nlisten = [\"0.0.0.0:80\"]", "traffic.listen"),
            ("[traffic]\nlisten = [\"127.0.0.1:3000\"]", "api.listen"),
            (
                "[traffic]\nlisten_tls = [\"0.0.0.0:443\"]",
                "traffic.listen_tls",
            ),
            (
                "[api]\nlisten_tls = [\"127.0.0.1:3002\"]",
                "api.listen_tls has, too",
            ),
            ("[api]\nbody_kib = 0", "api.body_kib"),
            ("[api]\nhead_kib = 2000", "api.head_kib"),
            ("[api]\nstreams = 0", "api.streams"),
            ("[traffic]\nrequests = 0", "traffic.requests"),
            ("[tls]\ndomain = \"a_b.test\"", "tls.domain"),
            ("[tls]\ndomain = \"192.0.2.1:1\"", "tls.domain"),
            ("[tls]\nnames = [\"*.a\"]", "tls.names"),
            ("[tls]\ncertificate = \"/x\"", "tls.key"),
            ("[tls]\nkey = \"/x\"", "tls.certificate"),
            ("[api]\nclient_ca = \"/x\"", "api.listen_tls"),
            (
                "[api]\nclient_certificates = \"demand\"",
                "api.client_certificates",
            ),
            ("[engine]\nwindow_pages = 3", "engine.window_pages"),
            ("[engine]\nspin_us = 5000", "engine.spin_us"),
            ("[engine]\nrecord_ms = 0", "engine.record_ms"),
            (
                "[engine]\ntrack_writes = false\ncheck_writes = true",
                "engine.check_writes",
            ),
            ("[network]\ndrain_ms = 60001", "network.drain_ms"),
            ("[vmm]\nready_processes = 5000", "vmm.ready_processes"),
            ("[vmm]\ncpu_weight = 0", "vmm.cpu_weight"),
            ("[vmm]\ncpu_max_percent = 0", "vmm.cpu_max_percent"),
            ("[vmm]\npids_max = 1", "vmm.pids_max"),
            ("[vmm]\njail_user = 0", "vmm.jail_user"),
            ("[disks]\nbackend = \"zfs\"", "device-mapper"),
            ("[disks]\ncow_mb = 0", "disks.cow_mb"),
            ("[disks]\nmib_per_s = 0", "disks.mib_per_s"),
            ("[disks]\nops_per_s = 0", "disks.ops_per_s"),
            ("[network]\npool = \"10.0.0.1/16\"", "pool"),
            ("[network]\nclosed = [\"10.0.0.0\"]", "closed"),
            ("[network]\nresolver = \"dns\"", "resolver"),
            (
                "[[template]]\nname=\"a\"\nkernel=\"/x\"\ninitrd=\"/x\"\ndisk=\"/x\"",
                "kernel",
            ),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(key), "{text}: {error}");
        }
    }

    #[test]
    fn a_certificate_is_for_what_clients_call_the_host() {
        let text = "[api]\nlisten_tls = [\"192.0.2.1:3443\", \"0.0.0.0:1\"]\n[traffic]\npublic = true\n\
                    listen_tls = [\"[::]:8443\"]\n[tls]\ndomain = \"Thaw.test\"\nnames = [\"host1\"]\n";
        let config = read(text).unwrap();
        let names: Vec<String> = config.tls_names().into_iter().collect();
        let expected = [
            "*.thaw.test",
            "127.0.0.1",
            "192.0.2.1",
            "::1",
            "host1",
            "localhost",
            "thaw.test",
        ];
        assert_eq!(names, expected);
        assert_eq!(config.sandbox_domain().as_deref(), Some("Thaw.test:8443"));
        assert!(config.speaks_tls() && !read("").unwrap().speaks_tls());
    }

    #[test]
    fn a_disk_is_as_large_as_its_image_or_larger() {
        assert!(check_disk_size(64, 64 << 20).is_ok());
        let small = check_disk_size(64, (64 << 20) + 1).unwrap_err();
        assert!(small.contains("65 (the image has that)"), "{small}");
        assert!(check_disk_size(0, 0).is_err());
        assert!(check_disk_size((16 << 20) + 1, 5).is_err());
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Config::read(Path::new("/nonexistent.toml"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("/nonexistent.toml"));
    }
}
