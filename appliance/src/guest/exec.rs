//! One command, run to its end with its output collected.

use std::time::Duration;

use bytes::Bytes;
use envd::protocol::envelope::{Decoder, Frame, MAX_PAYLOAD, encode_message};
use envd::protocol::{
    self, EndEvent, Output, ProcessConfig, ProcessEvent, StartRequest, StreamMessage,
};
use http_api::wire::{ExecRequest, ExecResult};
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request};
use tokio::time::timeout;

use super::error::{broken, silent};
use super::{Guest, GuestError};

/// The most output of one command that is collected.
pub(super) const MAX_OUTPUT_BYTES: usize = 16 << 20;

impl Guest {
    /// Runs a command and collects its output.
    ///
    /// # Errors
    /// See [`GuestError`]; a command that fails is no error.
    pub async fn exec(&self, request: &ExecRequest) -> Result<ExecResult, GuestError> {
        let patience = Duration::from_millis(request.timeout_ms) + Duration::from_secs(5);
        let running = self.exec_unbounded(request);
        timeout(patience, running)
            .await
            .unwrap_or_else(|_| Err(silent(protocol::START_PATH, patience)))
    }

    async fn exec_unbounded(&self, request: &ExecRequest) -> Result<ExecResult, GuestError> {
        let path = protocol::START_PATH;
        let start = StartRequest {
            process: ProcessConfig {
                cmd: request.cmd.clone(),
                args: request.args.clone(),
                envs: request.env.clone(),
                cwd: request.cwd.clone(),
            },
            tag: None,
            stdin: Some(false),
        };
        let message = serde_json::to_vec(&start).map_err(|error| broken(path, error))?;
        let body = encode_message(&message).map_err(|error| broken(path, error))?;
        let http = Request::builder()
            .method(Method::POST)
            .uri(path)
            .header("content-type", protocol::STREAM_CONTENT_TYPE)
            .header("connect-protocol-version", "1")
            .header(protocol::TIMEOUT_HEADER, request.timeout_ms.to_string());
        let http = Self::as_user(http, request.user.as_deref())
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| broken(path, error))?;
        let mut response = self.send(path, http).await?;
        let mut decoder = Decoder::new(MAX_PAYLOAD);
        let mut collected = Collected::default();
        while let Some(frame) = response.body_mut().frame().await {
            let frame = frame.map_err(|error| broken(path, error))?;
            let Some(data) = frame.data_ref() else {
                continue;
            };
            decoder.push(data);
            while let Some(frame) = decoder.next_frame().map_err(|error| broken(path, error))? {
                if let Some(result) = collected.take(frame)? {
                    return Ok(result);
                }
            }
        }
        decoder.finish().map_err(|error| broken(path, error))?;
        Err(broken(
            path,
            std::io::Error::other("the stream ended without the command's end"),
        ))
    }
}

/// What a command has said so far.
#[derive(Default)]
struct Collected {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl Collected {
    fn take(&mut self, frame: Frame) -> Result<Option<ExecResult>, GuestError> {
        let path = protocol::START_PATH;
        let message = match frame {
            Frame::Message(message) => message,
            Frame::End(end) => {
                let error = end.error.unwrap_or_default();
                return Err(GuestError::Refused {
                    path: path.to_owned(),
                    status: error.code,
                    body: error.message,
                });
            }
        };
        let message: StreamMessage =
            serde_json::from_slice(&message).map_err(|error| broken(path, error))?;
        match message.event {
            ProcessEvent::Start(_) | ProcessEvent::Keepalive(_) => {}
            ProcessEvent::Data(Output::Stdout(bytes)) => self.stdout.extend_from_slice(&bytes),
            ProcessEvent::Data(Output::Stderr(bytes)) => self.stderr.extend_from_slice(&bytes),
            ProcessEvent::End(end) => return Ok(Some(self.result(end))),
        }
        if self.stdout.len() + self.stderr.len() > MAX_OUTPUT_BYTES {
            return Err(GuestError::TooMuchOutput);
        }
        Ok(None)
    }

    fn result(&self, end: EndEvent) -> ExecResult {
        ExecResult {
            exit_code: end.exit_code,
            status: end.status,
            stdout: String::from_utf8_lossy(&self.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&self.stderr).into_owned(),
        }
    }
}
