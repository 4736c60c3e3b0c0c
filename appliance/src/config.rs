//! The configuration file: TOML, unknown keys refused, everything but the data
//! directory's content has a default.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use http_api::ids::TemplateName;
use ipnet::Ipv4Net;
use serde::Deserialize;
use thiserror::Error;

use crate::network::{Egress, Pool};

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

/// What executes guests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AcceleratorChoice {
    /// KVM if a probe guest runs on it, else emulation.
    #[default]
    Auto,
    /// KVM or nothing.
    Kvm,
    /// Emulation.
    Tcg,
}

/// Which VMM new guests get.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DriverChoice {
    /// Firecracker if it is installed and the guests' kernel gets up in it, else QEMU.
    #[default]
    Auto,
    /// QEMU.
    Qemu,
    /// Firecracker, without asking whether a stock kernel gets up in it.
    Firecracker,
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
    /// Where sockets are; empty after every boot.
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

/// `[api]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ApiConfig {
    /// TCP addresses. Those that are not loopback ask for a token in any case.
    pub listen: Vec<SocketAddr>,
    /// TCP addresses that speak TLS. As for the others, a token is asked for.
    pub listen_tls: Vec<SocketAddr>,
    /// Whether loopback addresses ask for one, too.
    pub require_token: bool,
    /// Authority of clients' certificates: one of those is as good as a token where TLS is spoken.
    pub client_ca: Option<PathBuf>,
    /// Whether those addresses refuse whoever has none; by default a token will do.
    pub client_certificates: ClientCertificates,
    /// Unix socket; `api.sock` in the run directory when absent.
    pub socket: Option<PathBuf>,
    /// The longest body of a control request, KiB.
    pub body_kib: usize,
    /// How long such a body may take to arrive, milliseconds.
    pub body_time_ms: u64,
    /// The longest head of a request, KiB. This and the following two hold for `[traffic]`, too.
    pub head_kib: usize,
    /// How long a request's head may take, from the end of the request before, milliseconds.
    pub head_time_ms: u64,
    /// Connections of one listener and shard at the same time.
    pub connections: usize,
    /// Streams of events, commands and terminals, and requests that wait, of one listener and shard
    /// at the same time.
    pub streams: usize,
    /// Users who may use it besides root and the daemon's own, by number. Others need a token.
    pub users: Vec<u32>,
}

/// What a certificate of a client is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClientCertificates {
    /// As good as a token.
    #[default]
    Accept,
    /// The only way in.
    Demand,
}

/// `[tls]`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TlsConfig {
    /// Sandboxes are below it: `{port}-{id}.{domain}`.
    pub domain: Option<String>,
    /// What the host is called by clients, besides localhost, the domain and the addresses that it
    /// listens on.
    pub names: Vec<String>,
    /// A certificate with those that lead to its authority, PEM; instead of one of an authority of
    /// our own.
    pub certificate: Option<PathBuf>,
    /// Its key, PEM.
    pub key: Option<PathBuf>,
}

/// `[traffic]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrafficConfig {
    /// TCP addresses on which ports of sandboxes are reached.
    pub listen: Vec<SocketAddr>,
    /// Addresses that speak TLS, for `https://{port}-{id}.{domain}`.
    pub listen_tls: Vec<SocketAddr>,
    /// Whether they may be other than loopback: whoever reaches those reaches every port that
    /// programs in sandboxes open, and reads along if the network lets him. The guests' own daemons
    /// ask for their token all the same.
    pub public: bool,
    /// Requests that one shard passes on at the same time, upgraded connections included.
    pub requests: usize,
}

impl Default for TrafficConfig {
    fn default() -> Self {
        Self {
            listen: vec![SocketAddr::from(([127, 0, 0, 1], 3002))],
            listen_tls: Vec::new(),
            public: false,
            requests: 4096,
        }
    }
}

impl Default for ApiConfig {
    fn default() -> Self {
        Self {
            listen: vec![SocketAddr::from(([127, 0, 0, 1], 3000))],
            listen_tls: Vec::new(),
            require_token: false,
            client_ca: None,
            client_certificates: ClientCertificates::Accept,
            body_kib: 1024,
            body_time_ms: 30_000,
            head_kib: 64,
            head_time_ms: 60_000,
            connections: 8192,
            streams: 1024,
            socket: None,
            users: Vec::new(),
        }
    }
}

/// `[network]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NetworkConfig {
    /// The host's addresses for sandboxes, two each.
    pub pool: Pool,
    /// Free slots that wait, built, for new sandboxes; as many that paused ones gave back are kept
    /// for them.
    pub ready_slots: usize,
    /// Whether guests may reach anything outside of their host.
    pub internet: bool,
    /// Networks that guests may never reach. The pool, the host itself and link-local addresses
    /// are closed in any case.
    pub closed: Vec<Ipv4Net>,
    /// How long a pause waits for commands and other requests that are under way to the guest,
    /// before it closes their connections.
    pub drain_ms: u64,
    /// Who answers the guests' name lookups; by default the host's first resolver that is not
    /// the host itself.
    pub resolver: Option<Ipv4Addr>,
}

impl NetworkConfig {
    /// What guests may reach.
    #[must_use]
    pub fn egress(&self) -> Egress {
        let link_local = "169.254.0.0/16".parse().expect("a network");
        let host_resolvers = || {
            let text = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
            resolver_in(&text)
        };
        Egress {
            internet: self.internet,
            closed: [link_local]
                .into_iter()
                .chain(self.closed.iter().copied())
                .collect(),
            resolver: self.resolver.or_else(host_resolvers),
        }
    }
}

/// The first IPv4 name server of a `resolv.conf` that another host could ask.
fn resolver_in(text: &str) -> Option<Ipv4Addr> {
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"))
        .filter_map(|address| address.trim().parse::<Ipv4Addr>().ok())
        .find(|address| !address.is_loopback() && !address.is_unspecified())
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            pool: "10.213.0.0/16".parse().expect("the default pool is valid"),
            ready_slots: 8,
            internet: true,
            drain_ms: 500,
            // Private networks: a host's management, storage and neighbours are there.
            closed: [
                "10.0.0.0/8",
                "100.64.0.0/10",
                "172.16.0.0/12",
                "192.168.0.0/16",
            ]
            .map(|net| net.parse().expect("a network"))
            .to_vec(),
            resolver: None,
        }
    }
}

/// How sandboxes get disks of their own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskBackend {
    /// The first of these that works in the data directory.
    #[default]
    Auto,
    /// Snapshots over a shared image.
    DeviceMapper,
    /// Files that share blocks.
    Reflink,
    /// Copies that skip holes.
    Copy,
}

/// `[disks]`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DisksConfig {
    /// How sandboxes get disks of their own.
    pub backend: DiskBackend,
    /// With device-mapper: how much of its disk one guest may change, in MiB, with a little that
    /// the bookkeeping takes; all of it when absent.
    pub cow_mb: Option<u64>,
}

/// `[engine]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EngineConfig {
    /// Pages installed around a fault whose content is at hand: 1, 2, 4, … 64.
    pub window_pages: u64,
    /// Page reads in flight per worker.
    pub read_slots: usize,
    /// How long a worker asks for the next fault before it waits in the kernel, microseconds; 0
    /// is not at all. Measured at start when absent.
    pub spin_us: Option<u64>,
    /// Whether the vCPU of a guest with one is pinned to its worker's core.
    pub pin_vcpus: bool,
    /// Whether what restores touch first is recorded, and replayed at later ones.
    pub working_sets: bool,
    /// How long after a guest's first fault it is recorded, milliseconds.
    pub record_ms: u64,
    /// How fast the whole memory of a resumed guest is loaded behind its faults, MiB a second; 0
    /// is not at all.
    pub load_mib_per_s: u64,
    /// Whether the kernel remembers which pages a guest writes, so that a pause reads only those.
    pub track_writes: bool,
    /// Whether a pause reads the others as well, and refuses if one was written.
    pub check_writes: bool,
}

impl Default for EngineConfig {
    fn default() -> Self {
        let worker = uffd_engine::WorkerOptions::default();
        Self {
            window_pages: worker.window_pages,
            read_slots: worker.read_slots,
            spin_us: None,
            pin_vcpus: false,
            working_sets: true,
            record_ms: 2000,
            load_mib_per_s: 0,
            track_writes: true,
            check_writes: false,
        }
    }
}

/// `[vmm]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VmmConfig {
    /// Which VMM new guests get.
    pub driver: DriverChoice,
    /// Firecrackers: the first for new guests, the others for builds that they made.
    pub firecracker: Vec<PathBuf>,
    /// Firecracker's jailer. Without one, Firecracker runs as the daemon's user.
    pub jailer: Option<PathBuf>,
    /// The user and group of the first slot's jailed VMM; each slot has its own.
    pub jail_user: u32,
    /// How long a Firecracker may take for one command.
    pub command_timeout_s: u64,
    /// The QEMU program.
    pub qemu: PathBuf,
    /// The preload library; beside the `thaw` program when absent.
    pub preload: Option<PathBuf>,
    /// What executes guests.
    pub accelerator: AcceleratorChoice,
    /// How long a guest may take from its start to its first answer.
    pub boot_timeout_s: u64,
}

impl Default for VmmConfig {
    fn default() -> Self {
        Self {
            driver: DriverChoice::Auto,
            firecracker: vec!["firecracker".into()],
            jailer: None,
            jail_user: 200_000,
            command_timeout_s: crate::vmm::COMMAND_TIMEOUT.as_secs(),
            qemu: "qemu-system-x86_64".into(),
            preload: None,
            accelerator: AcceleratorChoice::Auto,
            boot_timeout_s: 60,
        }
    }
}

/// `[[template]]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TemplateConfig {
    /// What sandboxes name it by.
    pub name: TemplateName,
    /// Kernel image.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: PathBuf,
    /// Raw disk image with the root file system.
    pub disk: PathBuf,
    /// Added to the kernel's command line.
    #[serde(default = "default_cmdline")]
    pub cmdline: String,
    /// Virtual CPUs unless a request says otherwise.
    #[serde(default = "default_vcpus")]
    pub vcpus: u32,
    /// Memory in MiB unless a request says otherwise.
    #[serde(default = "default_memory_mb")]
    pub memory_mb: u32,
    /// MiB of the disks unless a request says otherwise; the image's own size when absent.
    #[serde(default)]
    pub disk_size_mb: Option<u64>,
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
fn default_cmdline() -> String {
    "quiet".into()
}
const fn default_vcpus() -> u32 {
    1
}
const fn default_memory_mb() -> u32 {
    512
}

/// The limits of a guest's shape, for configuration and requests alike.
///
/// # Errors
/// Which of the two, and what would do.
pub fn check_shape(vcpus: u32, memory_mb: u32) -> Result<(), (&'static str, String)> {
    if !(1..=64).contains(&vcpus) {
        return Err(("vcpus", format!("is {vcpus}; 1 to 64 are possible")));
    }
    if !(64..=1 << 20).contains(&memory_mb) {
        return Err((
            "memory_mb",
            format!("is {memory_mb}; 64 to 1048576 are possible"),
        ));
    }
    Ok(())
}

/// The limits of a disk that is made from an image of so many bytes.
///
/// # Errors
/// What would do.
pub fn check_disk_size(size_mb: u64, image_bytes: u64) -> Result<(), String> {
    let least = image_bytes.div_ceil(1 << 20).max(1);
    if (least..=MAX_DISK_MB).contains(&size_mb) {
        return Ok(());
    }
    Err(format!(
        "is {size_mb}; {least} (the image has that) to {MAX_DISK_MB} are possible"
    ))
}

/// Letters, digits and hyphens, in parts. Source: RFC 1123.
fn is_host_name(name: &str) -> bool {
    let part = |part: &str| {
        let legal = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
        (1..=63).contains(&part.len())
            && part.bytes().all(legal)
            && !part.starts_with('-')
            && !part.ends_with('-')
    };
    name.len() <= 200 && name.split('.').all(part)
}

/// What ext4 takes.
const MAX_DISK_MB: u64 = 16 << 20;

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

    fn check(&self) -> Result<(), (String, String)> {
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
        let window = self.engine.window_pages;
        if !window.is_power_of_two() || window > 64 {
            let problem = format!("is {window}; a power of two up to 64 is possible");
            return Err(("engine.window_pages".into(), problem));
        }
        if !(1..=4096).contains(&self.engine.read_slots) {
            let problem = format!("is {}; 1 to 4096 are possible", self.engine.read_slots);
            return Err(("engine.read_slots".into(), problem));
        }
        if let Some(us) = self.engine.spin_us.filter(|us| *us > 1000) {
            let problem = format!("is {us}; 0 to 1000 are possible");
            return Err(("engine.spin_us".into(), problem));
        }
        if !(1..=60_000).contains(&self.engine.record_ms) {
            let problem = format!("is {}; 1 to 60000 are possible", self.engine.record_ms);
            return Err(("engine.record_ms".into(), problem));
        }
        if self.engine.check_writes && !self.engine.track_writes {
            let problem = "has nothing to check without engine.track_writes".to_owned();
            return Err(("engine.check_writes".into(), problem));
        }
        // A pause's other waits are as short.
        if self.network.drain_ms > 60_000 {
            let problem = format!("is {}; at most 60000 is possible", self.network.drain_ms);
            return Err(("network.drain_ms".into(), problem));
        }
        if self.vmm.firecracker.is_empty() {
            let problem = "is empty; name the program, or set vmm.driver to \"qemu\"".to_owned();
            return Err(("vmm.firecracker".into(), problem));
        }
        if !(1..=3600).contains(&self.vmm.command_timeout_s) {
            let problem = format!("is {}; 1 to 3600 are possible", self.vmm.command_timeout_s);
            return Err(("vmm.command_timeout_s".into(), problem));
        }
        // Every slot's VMM has a number of its own from there on.
        let last = u32::MAX - (1 << 24);
        if self.vmm.jailer.is_some() && !(1..=last).contains(&self.vmm.jail_user) {
            let problem = format!("is {}; 1 to {last} are possible", self.vmm.jail_user);
            return Err(("vmm.jail_user".into(), problem));
        }
        if self.disks.cow_mb == Some(0) {
            return Err(("disks.cow_mb".into(), "is 0; at least 1 is needed".into()));
        }
        let mut names = BTreeSet::new();
        for template in &self.templates {
            let key = |field: &str| format!("template {:?}: {field}", template.name.as_str());
            if !names.insert(&template.name) {
                return Err((key("name"), "is there twice".into()));
            }
            check_shape(template.vcpus, template.memory_mb)
                .map_err(|(field, problem)| (key(field), problem))?;
            for (field, file) in [
                ("kernel", &template.kernel),
                ("initrd", &template.initrd),
                ("disk", &template.disk),
            ] {
                if !file.is_file() {
                    return Err((
                        key(field),
                        format!("is {}, which is no file", file.display()),
                    ));
                }
            }
            if let Some(size_mb) = template.disk_size_mb {
                let image = fs::metadata(&template.disk).map_or(0, |image| image.len());
                check_disk_size(size_mb, image)
                    .map_err(|problem| (key("disk_size_mb"), problem))?;
            }
        }
        Ok(())
    }

    fn check_listeners(&self) -> Result<(), (String, String)> {
        let (api, traffic) = (&self.api, &self.traffic);
        for (key, list) in [
            ("traffic.listen", &traffic.listen),
            ("traffic.listen_tls", &traffic.listen_tls),
        ] {
            let open = list.iter().find(|address| !address.ip().is_loopback());
            if let (Some(address), false) = (open, traffic.public) {
                let problem = format!(
                    "has {address}, which is not loopback; set traffic.public if whoever reaches it \
                     may reach the ports that programs in sandboxes open"
                );
                return Err((key.into(), problem));
            }
        }
        let mut seen: Vec<(&SocketAddr, &str)> = Vec::new();
        for (key, list) in [
            ("api.listen", &api.listen),
            ("api.listen_tls", &api.listen_tls),
            ("traffic.listen", &traffic.listen),
            ("traffic.listen_tls", &traffic.listen_tls),
        ] {
            for address in list {
                if let Some((_, other)) = seen.iter().find(|(there, _)| *there == address) {
                    let problem = format!("has {address}, which {other} has, too");
                    return Err((key.into(), problem));
                }
                seen.push((address, key));
            }
        }
        Ok(())
    }

    fn check_limits(&self) -> Result<(), (String, String)> {
        let api = &self.api;
        for (key, value, most) in [
            ("api.body_kib", api.body_kib as u64, 1 << 20),
            ("api.body_time_ms", api.body_time_ms, 3_600_000),
            ("api.head_kib", api.head_kib as u64, 1024),
            ("api.head_time_ms", api.head_time_ms, 3_600_000),
            ("api.connections", api.connections as u64, 1 << 20),
            ("api.streams", api.streams as u64, 1 << 20),
            ("traffic.requests", self.traffic.requests as u64, 1 << 20),
        ] {
            if !(1..=most).contains(&value) {
                return Err((key.into(), format!("is {value}; 1 to {most} are possible")));
            }
        }
        Ok(())
    }

    fn check_tls(&self) -> Result<(), (String, String)> {
        let (api, tls) = (&self.api, &self.tls);
        let wrong = |key: &str, problem: String| Err((key.to_owned(), problem));
        for (key, name) in tls
            .names
            .iter()
            .map(|name| ("tls.names", name))
            .chain(tls.domain.iter().map(|name| ("tls.domain", name)))
        {
            let is_address = key == "tls.names" && name.parse::<IpAddr>().is_ok();
            if !is_host_name(name) && !is_address {
                return wrong(key, format!("has {name:?}, which is no name of a host"));
            }
        }
        match (&tls.certificate, &tls.key) {
            (Some(_), None) => return wrong("tls.key", "is missing beside tls.certificate".into()),
            (None, Some(_)) => return wrong("tls.certificate", "is missing beside tls.key".into()),
            (Some(_), Some(_)) if !tls.names.is_empty() => {
                let problem = "are those of tls.certificate, which can't be given others";
                return wrong("tls.names", problem.into());
            }
            _ => {}
        }
        if api.client_ca.is_some() && api.listen_tls.is_empty() {
            return wrong(
                "api.client_ca",
                "is of no use without api.listen_tls".into(),
            );
        }
        if api.client_certificates == ClientCertificates::Demand && api.client_ca.is_none() {
            let problem = "can't be demanded without api.client_ca";
            return wrong("api.client_certificates", problem.into());
        }
        Ok(())
    }

    /// Whether any listener speaks TLS.
    #[must_use]
    pub fn speaks_tls(&self) -> bool {
        !self.api.listen_tls.is_empty() || !self.traffic.listen_tls.is_empty()
    }

    /// What a certificate of ours has to be good for.
    #[must_use]
    pub fn tls_names(&self) -> BTreeSet<String> {
        let listening = self.api.listen_tls.iter().chain(&self.traffic.listen_tls);
        let addresses = listening.map(SocketAddr::ip);
        let addresses = addresses.filter(|ip| !ip.is_unspecified());
        let mut names: BTreeSet<String> = addresses.map(|ip| ip.to_string()).collect();
        names.extend(["localhost", "127.0.0.1", "::1"].map(str::to_owned));
        names.extend(self.tls.names.iter().map(|name| name.to_ascii_lowercase()));
        if let Some(domain) = &self.tls.domain {
            let domain = domain.to_ascii_lowercase();
            names.insert(format!("*.{domain}"));
            names.insert(domain);
        }
        names
    }

    /// Where clients find ports of sandboxes below a domain: it, with the port that is listened on
    /// if clients would not take it by themselves.
    #[must_use]
    pub fn sandbox_domain(&self) -> Option<String> {
        let domain = self.tls.domain.as_ref()?;
        match self.traffic.listen_tls.first()?.port() {
            443 => Some(domain.clone()),
            port => Some(format!("{domain}:{port}")),
        }
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

    /// How many threads own sandboxes.
    #[must_use]
    pub fn shard_count(&self) -> usize {
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        self.shards.unwrap_or(cpus)
    }
}

#[cfg(test)]
mod tests {
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
    fn a_resolver_on_the_host_itself_is_of_no_use_to_guests() {
        let text = "# ours\nnameserver 127.0.0.53\nnameserver ::1\nnameserver 192.0.2.7 \n";
        assert_eq!(resolver_in(text), Some(Ipv4Addr::new(192, 0, 2, 7)));
        assert_eq!(resolver_in("search example\n"), None);
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
            ("[disks]\nbackend = \"zfs\"", "device-mapper"),
            ("[disks]\ncow_mb = 0", "disks.cow_mb"),
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
