//! Making sandboxes: one of a template, once for each request, or many of one that runs.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::{StreamExt, stream};
use http_api::ids::{SandboxId, TemplateName};
use http_api::wire::{CreateSandbox, Created, ForkSandbox, Sandbox, SandboxState};
use http_api::{Aim, ApiError, ControlPlane, context};
use parking_lot::Mutex;
use tokio::time::sleep;

use super::Gateway;
use super::refusal::{catalogue_failed, task_failed};
use crate::catalogue::{SandboxRow, sandboxes};
use crate::lifetime::Lifetime;
use crate::network::SlotIndex;
use crate::sandbox::NewTemplate;
use crate::shard::Request;
use crate::template::{Origin, Template};

/// Forks of one request that are made at the same time.
const FORKS_AT_ONCE: usize = 4;
/// How often a request that waits for another one looks.
const LOOK: std::time::Duration = std::time::Duration::from_millis(20);

/// Ids whose creation has begun and has not ended, and by what request.
pub(super) type Starting = Arc<Mutex<BTreeMap<SandboxId, String>>>;

/// An id that one request has until it is done.
struct Claim {
    starting: Starting,
    id: SandboxId,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.starting.lock().remove(&self.id);
    }
}

impl Gateway {
    /// The same request with the same id makes one sandbox, however often and when it comes.
    pub(super) async fn create_once(&self, request: CreateSandbox) -> Result<Created, ApiError> {
        self.admit()?;
        let chosen = request.id.is_some();
        let id = request
            .id
            .clone()
            .unwrap_or_else(crate::clock::new_sandbox_id);
        let text = as_text(&request);
        let claim = loop {
            match self.claim(&id, &text) {
                Ok(claim) => break claim,
                Err(other) if other == text => sleep(LOOK).await,
                Err(_) => return Err(taken(&id)),
            }
        };
        // Whatever has this id now was there before.
        if chosen && let Some(before) = self.made_before(&id, &text).await? {
            return Ok(before);
        }
        let template = self.template(&request.template)?;
        let shown = template.name.clone();
        let made = self.create_unwatched(template, shown, claim, request);
        let sandbox = made.await?;
        Ok(Created {
            sandbox,
            existed: false,
        })
    }

    /// Takes an id, or tells which request has it.
    fn claim(&self, id: &SandboxId, text: &str) -> Result<Claim, String> {
        let mut starting = self.starting.lock();
        if let Some(other) = starting.get(id) {
            return Err(other.clone());
        }
        starting.insert(id.clone(), text.to_owned());
        Ok(Claim {
            starting: self.starting.clone(),
            id: id.clone(),
        })
    }

    /// Makes a sandbox of a template. `shown` is what it says it was made from.
    async fn create_of(
        &self,
        mut template: Template,
        shown: TemplateName,
        id: SandboxId,
        request: CreateSandbox,
    ) -> Result<Sandbox, ApiError> {
        let shape = template.shape_for(&request)?;
        if let Some(size_mb) = request.disk_size_mb {
            self.size_disk(&mut template, size_mb)?;
        }
        let build = match template.origin {
            Origin::Disk { .. } => None,
            // In the row from the start, so that the build is needed from the start.
            Origin::Memory(build) => Some(build),
        };
        let row = SandboxRow {
            id,
            template: shown,
            shape,
            slot: SlotIndex(0),
            state: SandboxState::Creating,
            build,
            reason: None,
            created_at_ms: crate::clock::now_ms(),
            request: as_text(&request),
            lifetime: Lifetime::of(&request),
            env: request.env,
            labels: request.labels,
            network: request.network,
            disk_limits: request.disk_limits,
            access_token: Some(crate::clock::new_access_token()),
            inherited_token: template.access_token.clone(),
            execution_id: None,
            started_at_ms: 0,
            disk_mb: request.disk_size_mb.unwrap_or(template.disk_mb),
        };
        let row = self.insert(row).await?;
        let id = row.id.clone();
        let create = |reply| Request::Create(Box::new(row), Box::new(template), reply);
        let created = self.ask(&id, create).await;
        if let Err(error) = &created {
            // A fork's failure is one of many in an answer; here it is found by itself.
            tracing::warn!(sandbox_id = %id, %error, "Not created");
            // An owner has removed it already; a request that never reached one has not.
            let remove =
                move |connection: &mut rusqlite::Connection| sandboxes::remove(connection, &id);
            self.host
                .catalogue
                .call(remove)
                .await
                .map_err(catalogue_failed)?;
        }
        created
    }

    /// In a task of its own: a client that goes away between the row and the shard would leave a
    /// row that nobody owns.
    async fn create_unwatched(
        &self,
        template: Template,
        shown: TemplateName,
        claim: Claim,
        request: CreateSandbox,
    ) -> Result<Sandbox, ApiError> {
        let gateway = self.clone();
        let created = async move {
            let id = claim.id.clone();
            let made = gateway.create_of(template, shown, id, request).await;
            drop(claim);
            made
        };
        let created = tokio::spawn(context::within(context::current(), created));
        created.await.unwrap_or_else(|_| Err(task_failed()))
    }

    /// What an earlier request of this id made, once it is made.
    async fn made_before(&self, id: &SandboxId, text: &str) -> Result<Option<Created>, ApiError> {
        let row = self.ask(id, |reply| Request::Row(id.clone(), reply)).await;
        match row {
            Err(ApiError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
            Ok(row) if row.request != text => Err(taken(id)),
            Ok(_) => Ok(Some(Created {
                sandbox: self.get(id.clone()).await?,
                existed: true,
            })),
        }
    }

    /// Puts the new sandbox's row into the catalogue, with a free slot.
    async fn insert(&self, row: SandboxRow) -> Result<SandboxRow, ApiError> {
        let id = row.id.clone();
        let slots = self.host.slots.pool().slots();
        let insert = move |connection: &mut rusqlite::Connection| {
            if sandboxes::exists(connection, &row.id)? {
                return Ok(Err(row.id));
            }
            Ok(Ok(sandboxes::insert_with_free_slot(
                connection, row, slots,
            )?))
        };
        match self
            .host
            .catalogue
            .call(insert)
            .await
            .map_err(catalogue_failed)?
        {
            Err(_) => Err(ApiError::Exists {
                what: "sandbox",
                name: id.to_string(),
            }),
            Ok(None) => Err(ApiError::Full {
                detail: format!("All {slots} network slots are taken; delete a sandbox first"),
            }),
            Ok(Some(row)) => Ok(row),
        }
    }

    /// One snapshot, any number of sandboxes of it.
    pub(super) async fn fork_now(
        &self,
        aim: Aim,
        request: ForkSandbox,
    ) -> Result<Vec<Result<Sandbox, ApiError>>, ApiError> {
        let id = aim.id.clone();
        let row = self
            .ask(&id, |reply| Request::Row(id.clone(), reply))
            .await?;
        let name = crate::clock::new_template_name("fork");
        let transient = NewTemplate {
            name: name.clone(),
            transient: true,
        };
        self.ask(&id, |reply| Request::Snapshot(aim, transient, reply))
            .await?;
        let template = self.template(&name)?;
        let wanted = CreateSandbox {
            template: row.template.clone(),
            id: None,
            vcpus: None,
            memory_mb: None,
            huge_pages: None,
            disk_size_mb: None,
            env: row.env,
            labels: row.labels,
            network: row.network,
            disk_limits: row.disk_limits,
            timeout_s: request.timeout_s,
            on_timeout: row.lifetime.on_timeout,
            auto_resume: row.lifetime.auto_resume,
        };
        let fork = async || {
            let id = crate::clock::new_sandbox_id();
            let claim = self.claim(&id, "").map_err(|_| taken(&id))?;
            let (template, shown) = (template.clone(), row.template.clone());
            self.create_unwatched(template, shown, claim, wanted.clone())
                .await
        };
        let forks = stream::iter((0..request.count).map(|_| fork()))
            .buffered(FORKS_AT_ONCE)
            .collect()
            .await;
        if let Err(error) = self.forget_template(&name).await {
            tracing::warn!(template = %name, %error, "A fork's template is left until the next start");
        }
        Ok(forks)
    }
}

/// A request as it is compared with a later one.
fn as_text(request: &CreateSandbox) -> String {
    serde_json::to_string(request).unwrap_or_default()
}

fn taken(id: &SandboxId) -> ApiError {
    ApiError::Exists {
        what: "sandbox",
        name: id.to_string(),
    }
}
