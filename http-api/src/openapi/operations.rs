//! What each operation takes and gives.

use schemars::JsonSchema;
use serde_json::{Value, json};

use super::{Content, Operation, reference};
use crate::routes::sandboxes::Forks;
use crate::wire::process::{FileEntry, ProcessInfo, SendSignal, WrittenFile};
use crate::wire::{
    ConsoleLine, CreateSandbox, CreateSnapshot, DiskLimits, DiskStats, Drained, ExecRequest,
    ExecResult, ForkSandbox, GuestMetrics, HostInfo, MemoryStats, NetworkPolicy, Reconciled,
    ResumeSandbox, Sandbox, SetTimeout, Snapshot,
};

fn operation(method: &'static str, path: &'static str, summary: &'static str) -> Operation {
    Operation {
        method,
        path,
        summary,
        query: Vec::new(),
        request: None,
        answers: Vec::new(),
    }
}

impl Operation {
    fn takes<T: JsonSchema>(mut self) -> Self {
        self.request = Some(Content::Json(reference::<T>));
        self
    }

    fn gives<T: JsonSchema>(mut self, status: u16) -> Self {
        self.answers.push((status, Content::Json(reference::<T>)));
        self
    }

    fn says(mut self, kind: &'static str) -> Self {
        self.answers.push((200, Content::Other(kind)));
        self
    }

    fn ends(mut self, status: u16, what: &'static str) -> Self {
        self.answers.push((status, Content::Nothing(what)));
        self
    }

    fn asks(mut self, name: &'static str, schema: Value, what: &'static str) -> Self {
        self.query.push((name, schema, false, what));
        self
    }

    /// A precondition.
    fn of_a_run(self) -> Self {
        self.asks(
            "execution_id",
            json!({ "type": "string" }),
            "Only if its newest run is this one; a 412 else, with the newest",
        )
    }

    /// A file, and whose.
    fn of_a_file(mut self) -> Self {
        let text = || json!({ "type": "string", "minLength": 1 });
        let path = "Where; relative to the user's home";
        self.query.push(("path", text(), true, path));
        self.asks(
            "user",
            text(),
            "Whose permissions count; the sandbox's default user's when absent",
        )
    }
}

/// All of them, in reading order.
pub(crate) fn operations() -> Vec<Operation> {
    let text = || json!({ "type": "string" });
    let number = || json!({ "type": "integer", "minimum": 0 });
    let page = || json!({ "type": "integer", "minimum": 1, "maximum": 1000 });
    let socket = "The connection is a WebSocket from here on";
    let sandbox = |method, path, summary| operation(method, path, summary).gives::<Sandbox>(200);
    vec![
        operation("GET", "/livez", "Whether the daemon is there").says("text/plain"),
        operation("GET", "/readyz", "Whether it takes work").says("text/plain"),
        operation("GET", "/metrics", "Numbers for Prometheus").says("application/openmetrics-text"),
        operation("GET", "/openapi.json", "This document").says("application/json"),
        operation("GET", "/docs", "This document, to be read").says("text/html"),
        operation("GET", "/v1/host", "What the host is, has and does").gives::<HostInfo>(200),
        operation(
            "POST",
            "/v1/host/drain",
            "Take no new work, and pause all that runs",
        )
        .gives::<Drained>(200),
        operation("DELETE", "/v1/host/drain", "Take work again").ends(204, "It does"),
        operation(
            "POST",
            "/v1/host/reconcile",
            "Look for what belongs to nobody, and remove it",
        )
        .gives::<Reconciled>(200),
        operation(
            "GET",
            "/v1/events",
            "What happens, as server-sent events; Last-Event-ID is kept to",
        )
        .asks(
            "after",
            number(),
            "Those after this one, instead of from now on",
        )
        .asks("sandbox", text(), "Those of one sandbox")
        .says("text/event-stream"),
        operation(
            "GET",
            "/v1/sandboxes",
            "All sandboxes, by id; in pages if there is a limit",
        )
        .asks(
            "state",
            text(),
            "Only in one of these states, with commas between them",
        )
        .asks(
            "label",
            text(),
            "Only with this label, as key=value; may be repeated",
        )
        .asks("template", text(), "Only of this template")
        .asks(
            "limit",
            page(),
            "The most of one page; X-Next-Cursor leads on",
        )
        .asks("cursor", text(), "X-Next-Cursor of the page before")
        .gives::<Vec<Sandbox>>(200),
        operation("POST", "/v1/sandboxes", "Create one and wait until it runs")
            .takes::<CreateSandbox>()
            .gives::<Sandbox>(201)
            .gives::<Sandbox>(200),
        sandbox("GET", "/v1/sandboxes/{id}", "One sandbox"),
        operation(
            "DELETE",
            "/v1/sandboxes/{id}",
            "Remove one, whatever it does",
        )
        .of_a_run()
        .ends(204, "It is gone"),
        sandbox(
            "POST",
            "/v1/sandboxes/{id}/pause",
            "Write it to disk and end its process",
        )
        .of_a_run(),
        sandbox("POST", "/v1/sandboxes/{id}/resume", "Bring it back")
            .of_a_run()
            .takes::<ResumeSandbox>(),
        sandbox(
            "GET",
            "/v1/sandboxes/{id}/wait",
            "Wait until it is in one of some states, or time is up",
        )
        .asks(
            "state",
            text(),
            "With commas between them; running, paused or failed when absent",
        )
        .asks("timeout_ms", number(), "How long; five minutes at most"),
        sandbox(
            "POST",
            "/v1/sandboxes/{id}/timeout",
            "Change how long it may run",
        )
        .of_a_run()
        .takes::<SetTimeout>(),
        operation(
            "POST",
            "/v1/sandboxes/{id}/fork",
            "Make running copies of it",
        )
        .of_a_run()
        .takes::<ForkSandbox>()
        .gives::<Forks>(201),
        operation(
            "POST",
            "/v1/sandboxes/{id}/exec",
            "Run a command and collect its output",
        )
        .takes::<ExecRequest>()
        .gives::<ExecResult>(200),
        operation(
            "GET",
            "/v1/sandboxes/{id}/exec/stream",
            "Run a command over a WebSocket",
        )
        .ends(101, socket),
        operation(
            "GET",
            "/v1/sandboxes/{id}/pty",
            "A terminal over a WebSocket",
        )
        .ends(101, socket),
        operation(
            "GET",
            "/v1/sandboxes/{id}/processes",
            "What callers started in it and runs",
        )
        .gives::<Vec<ProcessInfo>>(200),
        operation(
            "POST",
            "/v1/sandboxes/{id}/processes/{pid}/signal",
            "Send a signal to a process and its group",
        )
        .takes::<SendSignal>()
        .ends(204, "It is sent"),
        operation("GET", "/v1/sandboxes/{id}/files", "Read a file")
            .of_a_file()
            .says("application/octet-stream"),
        {
            let mut write =
                operation("PUT", "/v1/sandboxes/{id}/files", "Write a file").of_a_file();
            write.request = Some(Content::Other("application/octet-stream"));
            write.gives::<WrittenFile>(200)
        },
        operation(
            "GET",
            "/v1/sandboxes/{id}/files/list",
            "The entries of a directory",
        )
        .of_a_file()
        .gives::<Vec<FileEntry>>(200),
        operation(
            "GET",
            "/v1/sandboxes/{id}/memory",
            "What its memory did since it was resumed",
        )
        .gives::<MemoryStats>(200),
        operation(
            "GET",
            "/v1/sandboxes/{id}/console",
            "The last lines that its VMM and its guest's kernel printed since it began to run",
        )
        .gives::<Vec<ConsoleLine>>(200),
        operation(
            "GET",
            "/v1/sandboxes/{id}/disk",
            "What its disk takes on the host",
        )
        .gives::<DiskStats>(200),
        operation(
            "GET",
            "/v1/sandboxes/{id}/metrics",
            "How busy and how full its guest is",
        )
        .gives::<GuestMetrics>(200),
        sandbox(
            "PUT",
            "/v1/sandboxes/{id}/network",
            "Change what it may reach",
        )
        .takes::<NetworkPolicy>(),
        sandbox(
            "PUT",
            "/v1/sandboxes/{id}/disk",
            "Change how much it may do with its disk",
        )
        .takes::<DiskLimits>(),
        operation("GET", "/v1/snapshots", "All templates, by name").gives::<Vec<Snapshot>>(200),
        operation(
            "POST",
            "/v1/snapshots",
            "Make a template of a sandbox, which goes on",
        )
        .takes::<CreateSnapshot>()
        .gives::<Snapshot>(201),
        operation("GET", "/v1/snapshots/{name}", "One template").gives::<Snapshot>(200),
        operation(
            "DELETE",
            "/v1/snapshots/{name}",
            "Remove a template; its sandboxes stay",
        )
        .ends(204, "It is gone"),
    ]
}
