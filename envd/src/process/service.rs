//! `process.Process` of the Connect protocol: requests in, answers out, nothing decided here.

use std::sync::Arc;
use std::time::Duration;

use connectrpc::{
    ConnectError, InboundStream, RequestContext, Response, ServiceRequest, ServiceResult,
    ServiceStream,
};
use futures_util::{StreamExt as _, stream};
use nix::sys::signal::Signal;
use tokio::time::Instant;

use super::events::{Events, State};
use super::launch::{LaunchError, Surroundings, resolve};
use super::streams::Streams;
use super::table::{Order, Running, StartError};
use super::terminal::Size;
use crate::accounts::Accounts;
use crate::caller::{in_time, keep_alive, user};
use crate::proto::process::process_selector::Selector;
use crate::proto::process::stream_input_request::Event as Sent;
use crate::proto::process::{
    CloseStdinRequest, CloseStdinResponse, ConnectRequest, ConnectResponse, ListRequest,
    ListResponse, PTY, Process, ProcessEvent, ProcessInfo, ProcessSelector, SendInputRequest,
    SendInputResponse, SendSignalRequest, SendSignalResponse, StartRequest, StartResponse,
    StreamInputRequest, StreamInputResponse, UpdateRequest, UpdateResponse,
};
use crate::routes::Guest;

/// How long after its deadline a process that was killed may take to be gone, before the stream
/// ends without it.
const DEADLINE_GRACE: Duration = Duration::from_secs(2);
/// The service as a Connect router.
pub(crate) fn router(guest: Arc<Guest>) -> connectrpc::Router {
    connectrpc::Router::new().add_service(Arc::new(ProcessService { guest }))
}

struct ProcessService {
    guest: Arc<Guest>,
}

#[expect(refining_impl_trait, reason = "each call has one response type")]
impl Process for ProcessService {
    async fn list(
        &self,
        _context: RequestContext,
        _request: ServiceRequest<'_, ListRequest>,
    ) -> ServiceResult<ListResponse> {
        let info = |process: Arc<Running>| ProcessInfo {
            config: process.config.clone().into(),
            pid: process.pid,
            tag: process.tag.clone(),
            ..ProcessInfo::default()
        };
        let processes = self.guest.processes.all().into_iter().map(info).collect();
        Response::ok(ListResponse {
            processes,
            ..ListResponse::default()
        })
    }

    async fn start(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, StartRequest>,
    ) -> ServiceResult<ServiceStream<StartResponse>> {
        let request = request.to_owned_message();
        let user = user(&context)?;
        let Some(config) = request.process.into_option() else {
            return Err(ConnectError::invalid_argument("Field process is missing"));
        };
        let values = self.guest.settings.lock().clone();
        let accounts = Accounts::read()
            .map_err(|e| ConnectError::internal(format!("Reading the accounts: {e}")))?;
        let around = Surroundings {
            values: &values,
            accounts: &accounts,
            own_uid: nix::unistd::geteuid().as_raw(),
            is_directory: &|path| std::path::Path::new(path).is_dir(),
        };
        let launch = resolve(&config, user.as_deref(), &around).map_err(|e| refused(&e))?;
        let deadline = context.deadline().map(Instant::from_std);
        let streams = match request.pty.as_option() {
            Some(pty) => Streams::Terminal(size(pty)?),
            None => Streams::Pipes {
                stdin: request.stdin.unwrap_or(true),
            },
        };
        let order = Order {
            launch,
            config,
            tag: request.tag,
            streams,
            group: self.guest.freezer.group(),
            deadline,
        };
        let (process, heard) = self.guest.processes.start(order).map_err(not_started)?;
        let events = Events {
            pid: Some(process.pid),
            heard,
            keep_alive: keep_alive(&context),
            cut_at: deadline.map(|deadline| deadline + DEADLINE_GRACE),
            state: State::Open,
        };
        Response::ok(streamed(events, |event| StartResponse {
            event: event.into(),
            ..StartResponse::default()
        }))
    }

    async fn connect(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, ConnectRequest>,
    ) -> ServiceResult<ServiceStream<ConnectResponse>> {
        let process = self.find(request.to_owned_message().process.into_option())?;
        let heard = process.audience.join().ok_or_else(gone)?;
        let events = Events {
            pid: Some(process.pid),
            heard,
            keep_alive: keep_alive(&context),
            cut_at: context.deadline().map(Instant::from_std),
            state: State::Open,
        };
        Response::ok(streamed(events, |event| ConnectResponse {
            event: event.into(),
            ..ConnectResponse::default()
        }))
    }

    async fn update(
        &self,
        _context: RequestContext,
        request: ServiceRequest<'_, UpdateRequest>,
    ) -> ServiceResult<UpdateResponse> {
        let request = request.to_owned_message();
        let process = self.find(request.process.into_option())?;
        if let Some(pty) = request.pty.as_option() {
            process.input.resize(size(pty)?)?;
        }
        Response::ok(UpdateResponse::default())
    }

    async fn stream_input(
        &self,
        context: RequestContext,
        requests: InboundStream<StreamInputRequest>,
    ) -> ServiceResult<StreamInputResponse> {
        in_time(&context, self.take_input(requests)).await?;
        Response::ok(StreamInputResponse::default())
    }

    async fn send_input(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, SendInputRequest>,
    ) -> ServiceResult<SendInputResponse> {
        let request = request.to_owned_message();
        let process = self.find(request.process.into_option())?;
        in_time(&context, process.input.write(request.input.into_option())).await?;
        Response::ok(SendInputResponse::default())
    }

    async fn close_stdin(
        &self,
        _context: RequestContext,
        request: ServiceRequest<'_, CloseStdinRequest>,
    ) -> ServiceResult<CloseStdinResponse> {
        let process = self.find(request.to_owned_message().process.into_option())?;
        process.input.close().await?;
        Response::ok(CloseStdinResponse::default())
    }

    async fn send_signal(
        &self,
        _context: RequestContext,
        request: ServiceRequest<'_, SendSignalRequest>,
    ) -> ServiceResult<SendSignalResponse> {
        let request = request.to_owned_message();
        let process = self.find(request.process.into_option())?;
        let known = request
            .signal
            .as_known()
            .filter(|signal| *signal as i32 != 0);
        let Some(signal) = known.and_then(|signal| Signal::try_from(signal as i32).ok()) else {
            return Err(ConnectError::invalid_argument(
                "Field signal is missing or unknown",
            ));
        };
        match self.guest.processes.signal(&process, signal) {
            Ok(true) => Response::ok(SendSignalResponse::default()),
            Ok(false) => Err(gone()),
            Err(error) => Err(ConnectError::internal(format!("Sending {signal}: {error}"))),
        }
    }
}

impl ProcessService {
    /// Writes what a client sends, in order, until it has sent everything.
    async fn take_input(
        &self,
        mut requests: InboundStream<StreamInputRequest>,
    ) -> Result<(), ConnectError> {
        let mut process = None;
        while let Some(request) = requests.next().await {
            match (request?.to_owned_message().event, &process) {
                (Some(Sent::Start(start)), None) => {
                    process = Some(self.find(start.process.into_option())?);
                }
                (Some(Sent::Start(_)), Some(_)) => {
                    return Err(ConnectError::invalid_argument(
                        "A second start in the stream",
                    ));
                }
                (Some(Sent::Data(data)), Some(process)) => {
                    process.input.write(data.input.into_option()).await?;
                }
                (Some(Sent::Data(_)), None) => {
                    return Err(ConnectError::invalid_argument("Data before the start"));
                }
                (Some(Sent::Keepalive(_)) | None, _) => {}
            }
        }
        match process {
            Some(_) => Ok(()),
            None => Err(ConnectError::invalid_argument("A stream without a start")),
        }
    }

    fn find(&self, selector: Option<ProcessSelector>) -> Result<Arc<Running>, ConnectError> {
        let process = match selector.and_then(|selector| selector.selector) {
            Some(Selector::Pid(pid)) => self.guest.processes.with_pid(pid),
            Some(Selector::Tag(tag)) => self.guest.processes.with_tag(&tag),
            None => return Err(ConnectError::invalid_argument("Field process is missing")),
        };
        process.ok_or_else(gone)
    }
}

fn size(pty: &PTY) -> Result<Size, ConnectError> {
    let message = "Field pty.size: cols and rows must be 1 to 65535";
    Size::of(pty).ok_or_else(|| ConnectError::invalid_argument(message))
}

fn gone() -> ConnectError {
    ConnectError::not_found("No such running process")
}

fn streamed<T: Send + 'static>(events: Events, wrap: fn(ProcessEvent) -> T) -> ServiceStream<T> {
    let items = stream::unfold(events, |mut events| async move {
        let item = events.next().await?;
        Some((item, events))
    });
    Box::pin(items.map(move |item| item.map(wrap)))
}

fn refused(error: &LaunchError) -> ConnectError {
    match error {
        LaunchError::NoSuchUser(_) => ConnectError::unauthenticated(error.to_string()),
        LaunchError::NoCommand | LaunchError::NoDirectory(_) | LaunchError::Unrepresentable(_) => {
            ConnectError::invalid_argument(error.to_string())
        }
    }
}

fn not_started(error: StartError) -> ConnectError {
    let message = error.to_string();
    match error {
        StartError::TagTaken(_) => ConnectError::already_exists(message),
        StartError::Launch { source, .. } => match source.kind() {
            std::io::ErrorKind::NotFound => ConnectError::not_found(message),
            std::io::ErrorKind::PermissionDenied => ConnectError::permission_denied(message),
            std::io::ErrorKind::OutOfMemory | std::io::ErrorKind::WouldBlock => {
                ConnectError::resource_exhausted(message)
            }
            _ => ConnectError::invalid_argument(message),
        },
    }
}
