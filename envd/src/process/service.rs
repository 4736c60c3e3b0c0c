//! `process.Process` of the Connect protocol: requests in, answers out, nothing decided here.

use std::sync::Arc;
use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use connectrpc::{
    ConnectError, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream,
};
use futures_util::{StreamExt as _, stream};
use nix::sys::signal::Signal;
use tokio::io::AsyncWriteExt as _;
use tokio::time::Instant;

use super::events::{Events, State};
use super::launch::{LaunchError, Surroundings, resolve};
use super::table::{Order, Running, StartError};
use crate::accounts::Accounts;
use crate::proto::process::process_input::Input;
use crate::proto::process::process_selector::Selector;
use crate::proto::process::{
    CloseStdinRequest, CloseStdinResponse, ConnectRequest, ConnectResponse, ListRequest,
    ListResponse, Process, ProcessEvent, ProcessInfo, ProcessSelector, SendInputRequest,
    SendInputResponse, SendSignalRequest, SendSignalResponse, StartRequest, StartResponse,
};
use crate::protocol::KEEPALIVE_HEADER;
use crate::routes::Guest;

/// How long after its deadline a process that was killed may take to be gone, before the stream
/// ends without it.
const DEADLINE_GRACE: Duration = Duration::from_secs(2);
/// Longest interval between keep-alives, in seconds.
const MAX_KEEP_ALIVE_SECONDS: u64 = 3600;

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
        let order = Order {
            launch,
            config,
            tag: request.tag,
            stdin: request.stdin.unwrap_or(true),
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

    async fn send_input(
        &self,
        _context: RequestContext,
        request: ServiceRequest<'_, SendInputRequest>,
    ) -> ServiceResult<SendInputResponse> {
        let request = request.to_owned_message();
        let process = self.find(request.process.into_option())?;
        let Some(Input::Stdin(bytes)) = request.input.into_option().and_then(|i| i.input) else {
            return Err(ConnectError::invalid_argument(
                "Field input.stdin is missing",
            ));
        };
        let mut stdin = process.stdin.lock().await;
        let Some(pipe) = stdin.as_mut() else {
            return Err(ConnectError::failed_precondition(
                "Standard input is closed",
            ));
        };
        if let Err(error) = pipe.write_all(&bytes).await {
            *stdin = None;
            let message = format!("Writing to standard input: {error}");
            return Err(ConnectError::failed_precondition(message));
        }
        Response::ok(SendInputResponse::default())
    }

    async fn close_stdin(
        &self,
        _context: RequestContext,
        request: ServiceRequest<'_, CloseStdinRequest>,
    ) -> ServiceResult<CloseStdinResponse> {
        let process = self.find(request.to_owned_message().process.into_option())?;
        *process.stdin.lock().await = None;
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
    fn find(&self, selector: Option<ProcessSelector>) -> Result<Arc<Running>, ConnectError> {
        let process = match selector.and_then(|selector| selector.selector) {
            Some(Selector::Pid(pid)) => self.guest.processes.with_pid(pid),
            Some(Selector::Tag(tag)) => self.guest.processes.with_tag(&tag),
            None => return Err(ConnectError::invalid_argument("Field process is missing")),
        };
        process.ok_or_else(gone)
    }
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

/// The user of `Authorization: Basic base64("user:")`; other schemes name none.
fn user(context: &RequestContext) -> Result<Option<String>, ConnectError> {
    let Some(value) = context.header("authorization") else {
        return Ok(None);
    };
    let text = value.to_str().unwrap_or_default();
    let Some((scheme, encoded)) = text.split_once(' ') else {
        return Ok(None);
    };
    if !scheme.eq_ignore_ascii_case("basic") {
        return Ok(None);
    }
    let decoded = STANDARD
        .decode(encoded.trim())
        .ok()
        .and_then(|b| String::from_utf8(b).ok());
    let Some(credentials) = decoded else {
        return Err(ConnectError::unauthenticated(
            "Malformed Authorization header",
        ));
    };
    let name = credentials.split(':').next().unwrap_or_default();
    Ok(Some(name.to_owned()).filter(|name| !name.is_empty()))
}

fn keep_alive(context: &RequestContext) -> Option<Duration> {
    let seconds: u64 = context
        .header(KEEPALIVE_HEADER)?
        .to_str()
        .ok()?
        .parse()
        .ok()?;
    (1..=MAX_KEEP_ALIVE_SECONDS)
        .contains(&seconds)
        .then(|| Duration::from_secs(seconds))
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
