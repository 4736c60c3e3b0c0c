//! The daemon's HTTP API as a plain client sees it: one blocking request per connection.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use super::{slower, wait_for};

/// Longer than any operation may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// The way to one daemon.
#[derive(Clone, Debug)]
pub(crate) struct Api {
    socket: PathBuf,
}

/// One answer.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: Value,
}

impl Answer {
    /// The body of an answer that has to have this status.
    #[track_caller]
    pub(crate) fn expect(self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", self.body);
        self.body
    }

    pub(crate) fn detail(&self) -> &str {
        self.body["detail"].as_str().unwrap_or_default()
    }
}

impl Api {
    pub(crate) fn at(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
        }
    }

    /// One request; an error when the connection breaks, as it does when the daemon dies.
    pub(crate) fn try_call(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> io::Result<Answer> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(PATIENCE * slower()))?;
        let body = body.map(Value::to_string).unwrap_or_default();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: thaw\r\nconnection: close\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes())?;
        let mut bytes = Vec::new();
        let read = stream.read_to_end(&mut bytes);
        if let (None, Err(error)) = (parse(&bytes), read) {
            // A whole answer counts, even when the body that nobody needed broke the connection.
            return Err(error);
        }
        parse(&bytes).ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "no answer"))
    }

    #[track_caller]
    pub(crate) fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Answer {
        self.try_call(method, path, body)
            .unwrap_or_else(|error| panic!("{method} {path}: {error}"))
    }

    #[track_caller]
    pub(crate) fn get(&self, path: &str) -> Answer {
        self.call("GET", path, None)
    }

    #[track_caller]
    pub(crate) fn post(&self, path: &str, body: &Value) -> Answer {
        self.call("POST", path, Some(body))
    }

    #[track_caller]
    pub(crate) fn delete(&self, path: &str) -> Answer {
        self.call("DELETE", path, None)
    }

    #[track_caller]
    pub(crate) fn create(&self, id: &str, template: &str) -> Value {
        let body = json!({ "id": id, "template": template });
        let made = self.post("/v1/sandboxes", &body).expect(201);
        assert_eq!(made["state"], "running", "{made}");
        made
    }

    #[track_caller]
    pub(crate) fn pause(&self, id: &str) -> Answer {
        self.post(&format!("/v1/sandboxes/{id}/pause"), &json!({}))
    }

    #[track_caller]
    pub(crate) fn resume(&self, id: &str) -> Answer {
        self.post(&format!("/v1/sandboxes/{id}/resume"), &json!({}))
    }

    #[track_caller]
    pub(crate) fn sandbox(&self, id: &str) -> Answer {
        self.get(&format!("/v1/sandboxes/{id}"))
    }

    #[track_caller]
    pub(crate) fn destroy(&self, id: &str) {
        self.delete(&format!("/v1/sandboxes/{id}")).expect(204);
    }

    #[track_caller]
    pub(crate) fn snapshot(&self, id: &str, name: &str) -> Answer {
        self.post("/v1/snapshots", &json!({ "sandbox": id, "name": name }))
    }

    #[track_caller]
    pub(crate) fn exec(&self, id: &str, cmd: &str, args: &[&str]) -> Answer {
        let timeout_ms = 30_000 * slower();
        let body = json!({ "cmd": cmd, "args": args, "user": "root", "timeout_ms": timeout_ms });
        self.post(&format!("/v1/sandboxes/{id}/exec"), &body)
    }

    /// What a shell command printed; it has to succeed.
    #[track_caller]
    pub(crate) fn shell(&self, id: &str, script: &str) -> String {
        let ran = self.exec(id, "sh", &["-c", script]).expect(200);
        assert_eq!(ran["exit_code"], 0, "{script:?}: {ran}");
        ran["stdout"].as_str().unwrap().trim().to_owned()
    }

    /// Waits until a sandbox has failed; returns why.
    #[track_caller]
    pub(crate) fn failure(&self, id: &str) -> String {
        let reason = wait_for("it has failed", Duration::from_secs(20), || {
            let sandbox = self.sandbox(id).expect(200);
            (sandbox["state"] == "failed").then(|| sandbox["reason"].clone())
        });
        reason.as_str().unwrap().to_owned()
    }

    /// The next events after one; waits for as many.
    #[track_caller]
    pub(crate) fn events(&self, after: u64, count: usize) -> Vec<Value> {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE * slower())).unwrap();
        let head = "GET /v1/events HTTP/1.1\r\nhost: thaw\r\nlast-event-id:";
        write!(stream, "{head} {after}\r\n\r\n").unwrap();
        let lines = BufReader::new(stream).lines();
        let data = lines.filter_map(|line| {
            let line = line.expect("an event in time");
            serde_json::from_str(line.strip_prefix("data: ")?).ok()
        });
        data.take(count).collect()
    }

    /// Removes every sandbox and every template that has memory.
    pub(crate) fn delete_all(&self) {
        for sandbox in self.get("/v1/sandboxes").expect(200).as_array().unwrap() {
            self.destroy(sandbox["id"].as_str().unwrap());
        }
        for snapshot in self.get("/v1/snapshots").expect(200).as_array().unwrap() {
            if snapshot["kind"] == "memory" {
                let name = snapshot["name"].as_str().unwrap();
                self.delete(&format!("/v1/snapshots/{name}")).expect(204);
            }
        }
    }
}

/// `None` for an answer that was cut.
fn parse(bytes: &[u8]) -> Option<Answer> {
    let text = String::from_utf8_lossy(bytes);
    let (head, body) = text.split_once("\r\n\r\n")?;
    let mut lines = head.lines();
    let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
    let length = lines.find_map(|line| {
        let (name, value) = line.split_once(':')?;
        let is_it = name.eq_ignore_ascii_case("content-length");
        is_it.then(|| value.trim().parse::<usize>().ok())?
    });
    if body.len() < length.unwrap_or(0) {
        return None;
    }
    let body = if body.is_empty() {
        Value::Null
    } else {
        serde_json::from_str(body).unwrap_or_else(|_| Value::String(body.to_owned()))
    };
    Some(Answer { status, body })
}
