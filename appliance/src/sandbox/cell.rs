//! What everybody may see of a sandbox, and the one place where its state changes.

use std::net::Ipv4Addr;
use std::sync::Arc;

use http_api::wire::{EventKind, Sandbox, SandboxState};
use parking_lot::Mutex;
use tokio::sync::watch;

use super::connections::Connections;
use super::state::{Denied, Operation, begin};
use crate::catalogue::SandboxRow;
use crate::events::{Events, Happened};
use crate::lifetime::Lifetime;
use crate::network::Pool;

/// A sandbox as seen from outside; shared by its shard and its owner.
#[derive(Clone, Debug)]
pub struct Cell {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    row: Mutex<SandboxRow>,
    generation: Mutex<Option<u32>>,
    address: Ipv4Addr,
    connections: Connections,
    state: watch::Sender<SandboxState>,
    gone: watch::Sender<bool>,
    events: Events,
}

impl Cell {
    /// A sandbox as its row says.
    #[must_use]
    pub fn new(row: SandboxRow, generation: Option<u32>, pool: Pool, events: Events) -> Self {
        let address = pool.sandbox_end(row.slot);
        let state = watch::Sender::new(row.state);
        let inner = Inner {
            row: Mutex::new(row),
            generation: Mutex::new(generation),
            address,
            connections: Connections::default(),
            state,
            gone: watch::Sender::new(false),
            events,
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// Judges an operation and, if it may be, moves to the state it happens in.
    ///
    /// # Errors
    /// The state forbids it; nothing has changed.
    pub fn begin(&self, operation: Operation) -> Result<(), Denied> {
        let mut row = self.inner.row.lock();
        row.state = begin(row.state, operation)?;
        self.show(&row);
        Ok(())
    }

    /// Moves on; the reason stays until the next move.
    pub fn settle(&self, state: SandboxState, reason: Option<String>) {
        let mut row = self.inner.row.lock();
        // A delete that came meanwhile is not undone by what it waits for.
        if row.state != SandboxState::Destroying {
            row.enter(state, crate::clock::now_ms());
        }
        row.reason = reason;
        self.show(&row);
    }

    /// Tells of a state, if it is another one. Called under the row's lock, so that states are told
    /// in their order.
    fn show(&self, row: &SandboxRow) {
        if self.inner.state.send_replace(row.state) != row.state {
            self.tell(EventKind::State, row, row.reason.clone());
        }
    }

    /// Tells that it exists: its first state is no change of one.
    pub fn announce(&self) {
        self.tell(EventKind::State, &self.inner.row.lock(), None);
    }

    fn tell(&self, kind: EventKind, row: &SandboxRow, reason: Option<String>) {
        self.inner.events.tell(Happened {
            kind,
            sandbox: row.id.to_string(),
            state: (kind == EventKind::State).then_some(row.state),
            execution_id: row.execution_id.clone(),
            reason,
        });
    }

    /// Changes what the row says besides its state.
    pub fn update(&self, change: impl FnOnce(&mut SandboxRow)) {
        change(&mut self.inner.row.lock());
    }

    /// Records the generation of its newest build.
    pub fn set_generation(&self, generation: Option<u32>) {
        *self.inner.generation.lock() = generation;
    }

    /// The row as it is now.
    #[must_use]
    pub fn row(&self) -> SandboxRow {
        self.inner.row.lock().clone()
    }

    /// The state now.
    #[must_use]
    pub fn state(&self) -> SandboxState {
        self.inner.row.lock().state
    }

    /// How long it may run.
    #[must_use]
    pub fn lifetime(&self) -> Lifetime {
        self.inner.row.lock().lifetime
    }

    /// Tells of every change of state.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<SandboxState> {
        self.inner.state.subscribe()
    }

    /// Where the host reaches its guest.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.inner.address
    }

    /// The requests under way to its guest.
    #[must_use]
    pub fn connections(&self) -> &Connections {
        &self.inner.connections
    }

    /// Nothing of it is left, and why.
    pub fn set_gone(&self, reason: &str) {
        self.inner.gone.send_replace(true);
        let row = self.inner.row.lock();
        self.tell(EventKind::Deleted, &row, Some(reason.to_owned()));
    }

    /// Whether nothing of it is left.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        *self.inner.gone.borrow()
    }

    /// As it goes over the wire.
    #[must_use]
    pub fn view(&self) -> Sandbox {
        let row = self.row();
        Sandbox {
            id: row.id,
            state: row.state,
            template: row.template,
            vcpus: row.shape.vcpus,
            memory_mb: row.shape.memory_mb,
            huge_pages: row.shape.huge_pages,
            address: self.inner.address.to_string(),
            network: row.network,
            disk_limits: row.disk_limits,
            created_at_ms: row.created_at_ms,
            build: row.build.map(|build| build.to_string()),
            generation: *self.inner.generation.lock(),
            reason: row.reason,
            labels: row.labels,
            disk_mb: row.disk_mb,
            started_at_ms: row.started_at_ms,
            expires_at_ms: row.lifetime.expires_at_ms,
            time_left_ms: row.lifetime.left_ms,
            on_timeout: row.lifetime.on_timeout,
            auto_resume: row.lifetime.auto_resume,
            execution_id: row.execution_id,
            access_token: row.access_token,
        }
    }
}
