//! What travels: requests refuse unknown fields (a typo is an error, not a default),
//! answers may gain fields.

pub mod disk_limits;
pub mod event;
pub mod exec;
pub mod host;
pub mod network;
pub mod process;
pub mod sandbox;
pub mod snapshot;

pub use disk_limits::{DISK_LIMITS, DiskLimits};
pub use event::{Event, EventKind};
pub use exec::{ExecRequest, ExecResult};
pub use host::{
    Capacity, CpuInfo, Drained, Finding, FindingKind, HostInfo, HostStatus, Hugepages, Left,
    NumaNode, Reconciled, VmmInfo,
};
pub use network::{MAX_NETWORKS, NetworkPolicy, RATES_KBIT_S};
pub use sandbox::{
    ConsoleLine, CreateSandbox, Created, DiskStats, ForkSandbox, GuestMetrics, MAX_FORKS,
    MAX_TIMEOUT_S, MemoryStats, OnTimeout, ResumeSandbox, Sandbox, SandboxState, SetTimeout,
};
pub use snapshot::{CreateSnapshot, Snapshot, SnapshotKind};
