//! What travels, with the names that these clients use.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::ENVD_VERSION;
use super::network::Network;
use crate::clock::rfc3339;
use crate::options::Terms;
use crate::wire::{GuestMetrics, OnTimeout, Sandbox, SandboxState};

/// `POST /sandboxes`, `POST /v2/sandboxes`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct NewSandbox {
    #[serde(rename = "templateID")]
    pub(super) template_id: String,
    /// Seconds.
    pub(super) timeout: Option<u64>,
    pub(super) metadata: Option<BTreeMap<String, String>>,
    pub(super) env_vars: Option<BTreeMap<String, String>>,
    pub(super) auto_pause: Option<bool>,
    pub(super) auto_pause_memory: Option<bool>,
    pub(super) auto_resume: Option<AutoResume>,
    #[serde(rename = "allow_internet_access")]
    pub(super) allow_internet_access: Option<bool>,
    pub(super) network: Option<Network>,
    pub(super) mcp: Option<Value>,
    pub(super) iam: Option<Value>,
    pub(super) volume_mounts: Option<Vec<Value>>,
}

/// Whether traffic brings a paused sandbox back.
#[derive(Debug, Deserialize)]
pub(super) struct AutoResume {
    pub(super) enabled: bool,
}

/// Bodies that say how long, or whether with memory.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Lifetime {
    /// Seconds.
    pub(super) timeout: Option<u64>,
    pub(super) memory: Option<bool>,
    /// Of a refresh, seconds.
    pub(super) duration: Option<u64>,
    /// Of a fork.
    pub(super) count: Option<u32>,
    /// Of a snapshot.
    pub(super) name: Option<String>,
    /// Of the old resume.
    #[serde(rename = "autoPause")]
    pub(super) auto_pause: Option<bool>,
}

/// The answer to create, connect, resume and fork.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Access {
    #[serde(rename = "templateID")]
    template_id: String,
    #[serde(rename = "sandboxID")]
    sandbox_id: String,
    #[serde(rename = "clientID")]
    client_id: &'static str,
    envd_version: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    envd_access_token: Option<String>,
    /// Ports of sandboxes are below it.
    #[serde(skip_serializing_if = "Option::is_none")]
    domain: Option<String>,
}

/// The host has no other name to these clients.
const CLIENT: &str = "thaw";

impl Access {
    pub(super) fn new(sandbox: Sandbox, terms: &Terms) -> Self {
        Self {
            template_id: sandbox.template.to_string(),
            sandbox_id: sandbox.id.to_string(),
            client_id: CLIENT,
            envd_version: ENVD_VERSION,
            envd_access_token: sandbox.access_token,
            domain: terms.domain.as_deref().map(str::to_owned),
        }
    }
}

/// One of a list.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Listed {
    #[serde(rename = "templateID")]
    template_id: String,
    alias: String,
    #[serde(rename = "sandboxID")]
    sandbox_id: String,
    #[serde(rename = "clientID")]
    client_id: &'static str,
    started_at: String,
    end_at: String,
    cpu_count: u32,
    #[serde(rename = "memoryMB")]
    memory_mb: u32,
    #[serde(rename = "diskSizeMB")]
    disk_size_mb: u64,
    state: &'static str,
    envd_version: &'static str,
    metadata: BTreeMap<String, String>,
}

/// One, with all there is to say.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Detail {
    #[serde(flatten)]
    listed: Listed,
    #[serde(skip_serializing_if = "Option::is_none")]
    envd_access_token: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    domain: Option<String>,
    allow_internet_access: bool,
    network: Network,
    lifecycle: Lifecycle,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Lifecycle {
    auto_resume: bool,
    on_timeout: OnTimeout,
}

/// `running` or `paused`: these clients know no more. What is on its way counts as what it was.
pub(super) const fn state(state: SandboxState) -> &'static str {
    match state {
        SandboxState::Paused | SandboxState::Resuming => "paused",
        _ => "running",
    }
}

/// For those that may run for ever; the field is mandatory.
const TEN_YEARS_MS: u64 = 10 * 366 * 24 * 3600 * 1000;

impl Listed {
    /// `now_ms`: a paused sandbox would end this much later than now.
    pub(super) fn new(sandbox: Sandbox, now_ms: u64) -> Self {
        let left = sandbox.time_left_ms.map(|left| now_ms + left);
        let end = sandbox.expires_at_ms.or(left);
        Self {
            template_id: sandbox.template.to_string(),
            alias: sandbox.template.to_string(),
            sandbox_id: sandbox.id.to_string(),
            client_id: CLIENT,
            started_at: rfc3339(sandbox.started_at_ms),
            end_at: rfc3339(end.unwrap_or(sandbox.started_at_ms + TEN_YEARS_MS)),
            cpu_count: sandbox.vcpus,
            memory_mb: sandbox.memory_mb,
            disk_size_mb: sandbox.disk_mb,
            state: state(sandbox.state),
            envd_version: ENVD_VERSION,
            metadata: sandbox.labels,
        }
    }
}

impl Detail {
    pub(super) fn new(sandbox: Sandbox, terms: &Terms, now_ms: u64) -> Self {
        Self {
            envd_access_token: sandbox.access_token.clone(),
            domain: terms.domain.as_deref().map(str::to_owned),
            allow_internet_access: sandbox.network.allow_internet_access,
            network: Network::from(&sandbox.network),
            lifecycle: Lifecycle {
                auto_resume: sandbox.auto_resume,
                on_timeout: sandbox.on_timeout,
            },
            listed: Listed::new(sandbox, now_ms),
        }
    }
}

/// One sample.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Sample {
    timestamp: String,
    timestamp_unix: u64,
    cpu_count: u32,
    cpu_used_pct: f64,
    mem_used: u64,
    mem_total: u64,
    mem_cache: u64,
    disk_used: u64,
    disk_total: u64,
}

impl From<GuestMetrics> for Sample {
    fn from(metrics: GuestMetrics) -> Self {
        Self {
            timestamp: rfc3339(metrics.timestamp_s.saturating_mul(1000)),
            timestamp_unix: metrics.timestamp_s,
            cpu_count: metrics.cpu_count,
            cpu_used_pct: metrics.cpu_used_percent,
            mem_used: metrics.memory_used_bytes,
            mem_total: metrics.memory_total_bytes,
            mem_cache: metrics.memory_cache_bytes,
            disk_used: metrics.disk_used_bytes,
            disk_total: metrics.disk_total_bytes,
        }
    }
}
