//! Processes in a guest, as its daemon speaks of them: one stream for what they say, calls for
//! what is done to them.

use std::future::Future;
use std::pin::Pin;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use envd::protocol::envelope::{Decoder, Frame, MAX_PAYLOAD, encode_message};
use envd::protocol::{
    CONNECT_PATH, EndEvent, KeepAlive, ProcessSelector, SEND_SIGNAL_PATH, START_PATH,
    STREAM_CONTENT_TYPE, StartEvent, TIMEOUT_HEADER,
};
use futures_util::stream;
use http_api::ProcessStream;
use http_api::wire::process::{
    ProcessInfo, ProcessOutput, Signal, StartProcess, TerminalSize, Which,
};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Method, Request, Response};
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::broken;
use super::{Guest, GuestError};

/// Connect, unary: which processes there are.
const LIST_PATH: &str = "/process.Process/List";
/// Connect, unary: bytes for one.
const INPUT_PATH: &str = "/process.Process/SendInput";
/// Connect, unary: another size of its terminal.
const UPDATE_PATH: &str = "/process.Process/Update";

/// Ready when the guest no longer runs, with what is to be told then.
pub type Left = Pin<Box<dyn Future<Output = String> + Send>>;

impl Guest {
    /// Starts a process and listens to it.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub async fn start(
        &self,
        process: &StartProcess,
        left: Left,
    ) -> Result<ProcessStream, GuestError> {
        let mut message = json!({
            "process": {
                "cmd": process.cmd, "args": process.args, "envs": process.env, "cwd": process.cwd,
            },
            "stdin": false,
        });
        if let Some(TerminalSize { cols, rows }) = process.terminal {
            message["pty"] = json!({ "size": { "cols": cols, "rows": rows } });
        }
        if let Some(tag) = &process.tag {
            message["tag"] = json!(tag);
        }
        let user = process.user.as_deref();
        self.listen(START_PATH, &message, user, process.timeout_ms, left)
            .await
    }

    /// Listens to a process that runs.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub async fn find(&self, which: Which, left: Left) -> Result<ProcessStream, GuestError> {
        let message = json!({ "process": selector(which) });
        self.listen(CONNECT_PATH, &message, None, None, left).await
    }

    /// Sends bytes to one.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub async fn input(
        &self,
        which: Which,
        terminal: bool,
        bytes: &[u8],
    ) -> Result<(), GuestError> {
        let kind = if terminal { "pty" } else { "stdin" };
        let input = json!({ kind: STANDARD.encode(bytes) });
        let message = json!({ "process": selector(which), "input": input });
        self.unary(INPUT_PATH, &message, None).await.map(|_| ())
    }

    /// Changes the size of its terminal.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub async fn resize(&self, which: Which, size: TerminalSize) -> Result<(), GuestError> {
        let size = json!({ "size": { "cols": size.cols, "rows": size.rows } });
        let message = json!({ "process": selector(which), "pty": size });
        self.unary(UPDATE_PATH, &message, None).await.map(|_| ())
    }

    /// Sends a signal to its group.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub async fn signal(&self, which: Which, signal: Signal) -> Result<(), GuestError> {
        let name = serde_json::to_value(signal).unwrap_or_default();
        let name = format!("SIGNAL_{}", name.as_str().unwrap_or_default());
        let message = json!({ "process": selector(which), "signal": name });
        let sent = self.unary(SEND_SIGNAL_PATH, &message, None);
        sent.await.map(|_| ())
    }

    /// Those that callers started and that run.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub async fn processes(&self) -> Result<Vec<ProcessInfo>, GuestError> {
        #[derive(Deserialize)]
        struct Listed {
            #[serde(default)]
            processes: Vec<One>,
        }
        #[derive(Deserialize)]
        struct One {
            pid: u32,
            tag: Option<String>,
            #[serde(default)]
            config: envd::protocol::ProcessConfig,
        }
        let listed = self.unary(LIST_PATH, &json!({}), None).await?;
        let listed: Listed =
            serde_json::from_value(listed).map_err(|error| broken(LIST_PATH, error))?;
        let infos = listed.processes.into_iter().map(|one| ProcessInfo {
            pid: one.pid,
            cmd: one.config.cmd,
            args: one.config.args,
            cwd: one.config.cwd,
            tag: one.tag,
        });
        Ok(infos.collect())
    }

    async fn listen(
        &self,
        path: &'static str,
        message: &Value,
        user: Option<&str>,
        timeout_ms: Option<u64>,
        left: Left,
    ) -> Result<ProcessStream, GuestError> {
        let body = encode_message(message.to_string().as_bytes());
        let body = body.map_err(|error| broken(path, error))?;
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(path)
            .header("content-type", STREAM_CONTENT_TYPE)
            .header("connect-protocol-version", "1");
        if let Some(timeout_ms) = timeout_ms {
            request = request.header(TIMEOUT_HEADER, timeout_ms.to_string());
        }
        let request = Self::as_user(request, user);
        let request = request.body(Full::new(bytes::Bytes::from(body)));
        let request = request.map_err(|error| broken(path, error))?;
        let mut heard = Heard {
            path,
            response: self.send(path, request).await?,
            decoder: Decoder::new(MAX_PAYLOAD),
            left,
        };
        // A refusal comes as the first of the stream: it is told before anybody listens.
        let first = heard.next().await?;
        let rest = stream::unfold(Some(heard), async |heard| {
            let mut heard = heard?;
            match heard.next().await {
                Ok(said) => {
                    let last = matches!(said, ProcessOutput::Exit { .. } | ProcessOutput::Lost(_));
                    Some((said, (!last).then_some(heard)))
                }
                Err(error) => Some((ProcessOutput::Lost(uffd_engine::chain(&error)), None)),
            }
        });
        let first = stream::once(std::future::ready(first));
        Ok(Box::pin(futures_util::StreamExt::chain(first, rest)))
    }
}

fn selector(which: Which) -> ProcessSelector {
    match which {
        Which::Pid(pid) => ProcessSelector::Pid(pid),
        Which::Tag(tag) => ProcessSelector::Tag(tag),
    }
}

/// A stream as it arrives.
struct Heard {
    path: &'static str,
    response: Response<Incoming>,
    decoder: Decoder,
    left: Left,
}

/// One message of it.
#[derive(Deserialize)]
struct Message {
    event: Event,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
enum Event {
    Start(StartEvent),
    Data(Data),
    End(EndEvent),
    Keepalive(KeepAlive),
}

/// Bytes, in base64.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
enum Data {
    Stdout(String),
    Stderr(String),
    Pty(String),
}

impl Heard {
    async fn next(&mut self) -> Result<ProcessOutput, GuestError> {
        loop {
            let frame = self.decoder.next_frame();
            if let Some(frame) = frame.map_err(|error| broken(self.path, error))? {
                match self.understand(frame)? {
                    Some(said) => return Ok(said),
                    None => continue,
                }
            }
            let frame = tokio::select! {
                frame = self.response.body_mut().frame() => frame,
                reason = &mut self.left => return Ok(ProcessOutput::Lost(reason)),
            };
            let Some(frame) = frame else {
                let cut = std::io::Error::other("the stream ended without the process's end");
                return Err(broken(self.path, cut));
            };
            let frame = frame.map_err(|error| broken(self.path, error))?;
            if let Some(data) = frame.data_ref() {
                self.decoder.push(data);
            }
        }
    }

    fn understand(&self, frame: Frame) -> Result<Option<ProcessOutput>, GuestError> {
        let message = match frame {
            Frame::Message(message) => message,
            Frame::End(end) => {
                let error = end.error.unwrap_or_default();
                return Err(GuestError::Refused {
                    path: self.path.to_owned(),
                    status: error.code,
                    body: error.message,
                });
            }
        };
        let message: Message =
            serde_json::from_slice(&message).map_err(|error| broken(self.path, error))?;
        let bytes = |text: String| STANDARD.decode(text).map_err(|e| broken(self.path, e));
        Ok(Some(match message.event {
            Event::Keepalive(_) => return Ok(None),
            Event::Start(start) => ProcessOutput::Started { pid: start.pid },
            Event::Data(Data::Stdout(text)) => ProcessOutput::Stdout(bytes(text)?),
            Event::Data(Data::Stderr(text)) => ProcessOutput::Stderr(bytes(text)?),
            Event::Data(Data::Pty(text)) => ProcessOutput::Terminal(bytes(text)?),
            Event::End(end) => ProcessOutput::Exit {
                exit_code: end.exit_code,
                status: end.status,
            },
        }))
    }
}
