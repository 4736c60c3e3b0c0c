//! `filesystem.Filesystem` of the Connect protocol: requests in, answers out.

use std::sync::Arc;
use std::time::Duration;

use connectrpc::{
    ConnectError, RequestContext, Response, ServiceRequest, ServiceResult, ServiceStream,
};
use futures_util::stream;
use tokio::time::Instant;

use super::error::FileError;
use super::owner::Owner;
use super::path::GuestPath;
use super::place::{Place, make_directories};
use super::watch::{self, Changes, Wanted};
use super::{entry, listing, removal, transfer};
use crate::accounts::{Accounts, Names};
use crate::caller::{in_time, keep_alive, reached, too_late, user};
use crate::proto::filesystem::watch_dir_response::{Event, KeepAlive, StartEvent};
use crate::proto::filesystem::{
    CreateWatcherRequest, CreateWatcherResponse, Filesystem, GetWatcherEventsRequest,
    GetWatcherEventsResponse, ListDirRequest, ListDirResponse, MakeDirRequest, MakeDirResponse,
    MoveRequest, MoveResponse, RemoveRequest, RemoveResponse, RemoveWatcherRequest,
    RemoveWatcherResponse, StatRequest, StatResponse, WatchDirRequest, WatchDirResponse,
};
use crate::routes::Guest;

/// The service as a Connect router.
pub(crate) fn router(guest: Arc<Guest>) -> connectrpc::Router {
    connectrpc::Router::new().add_service(Arc::new(FilesystemService { guest }))
}

struct FilesystemService {
    guest: Arc<Guest>,
}

/// Whom a call is for, and what the ids of this guest are called.
struct Caller {
    owner: Owner,
    names: Names,
}

#[expect(refining_impl_trait, reason = "each call has one response type")]
impl Filesystem for FilesystemService {
    async fn stat(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, StatRequest>,
    ) -> ServiceResult<StatResponse> {
        let text = request.to_owned_message().path;
        let entry = self
            .work(&context, move |caller| {
                entry::at(&caller.owner.path(&text)?, &caller.names)
            })
            .await?;
        Response::ok(StatResponse {
            entry: Some(entry).into(),
            ..StatResponse::default()
        })
    }

    async fn make_dir(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, MakeDirRequest>,
    ) -> ServiceResult<MakeDirResponse> {
        let text = request.to_owned_message().path;
        let entry = self
            .work(&context, move |caller| {
                let path = caller.owner.path(&text)?;
                if !make_directories(&path, &caller.owner)? {
                    return Err(FileError::Exists(path.to_string()));
                }
                entry::at(&path, &caller.names)
            })
            .await?;
        Response::ok(MakeDirResponse {
            entry: Some(entry).into(),
            ..MakeDirResponse::default()
        })
    }

    async fn r#move(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, MoveRequest>,
    ) -> ServiceResult<MoveResponse> {
        let request = request.to_owned_message();
        let entry = self
            .work(&context, move |caller| {
                let source = caller.owner.path(&request.source)?;
                let target = caller.owner.path(&request.destination)?;
                move_path(&source, &target, caller)?;
                entry::at(&target, &caller.names)
            })
            .await?;
        Response::ok(MoveResponse {
            entry: Some(entry).into(),
            ..MoveResponse::default()
        })
    }

    async fn list_dir(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, ListDirRequest>,
    ) -> ServiceResult<ListDirResponse> {
        let request = request.to_owned_message();
        let entries = self
            .work(&context, move |caller| {
                let path = caller.owner.path(&request.path)?;
                listing::list(&path, request.depth.max(1), &caller.names)
            })
            .await?;
        Response::ok(ListDirResponse {
            entries,
            ..ListDirResponse::default()
        })
    }

    async fn remove(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, RemoveRequest>,
    ) -> ServiceResult<RemoveResponse> {
        let text = request.to_owned_message().path;
        self.work(&context, move |caller| {
            removal::remove(&caller.owner.path(&text)?)
        })
        .await?;
        Response::ok(RemoveResponse::default())
    }

    async fn watch_dir(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, WatchDirRequest>,
    ) -> ServiceResult<ServiceStream<WatchDirResponse>> {
        let request = request.to_owned_message();
        let caller = self.caller(&context)?;
        let wanted = Wanted {
            path: caller.owner.path(&request.path)?,
            recursive: request.recursive,
            entries: request.include_entry,
            network: request.allow_network_mounts,
            names: caller.names,
        };
        let told = Told {
            changes: Some(watch::start(wanted).await?),
            started: false,
            keep_alive: keep_alive(&context),
            cut_at: context.deadline().map(Instant::from_std),
        };
        let items = stream::unfold(told, |mut told| async move {
            let item = told.next().await?;
            Some((item, told))
        });
        Response::ok(Box::pin(items) as ServiceStream<WatchDirResponse>)
    }

    async fn create_watcher(
        &self,
        context: RequestContext,
        request: ServiceRequest<'_, CreateWatcherRequest>,
    ) -> ServiceResult<CreateWatcherResponse> {
        let request = request.to_owned_message();
        let caller = self.caller(&context)?;
        let wanted = Wanted {
            path: caller.owner.path(&request.path)?,
            recursive: request.recursive,
            entries: request.include_entry,
            network: request.allow_network_mounts,
            names: caller.names,
        };
        Response::ok(CreateWatcherResponse {
            watcher_id: self.guest.watchers.create(wanted).await?,
            ..CreateWatcherResponse::default()
        })
    }

    async fn get_watcher_events(
        &self,
        _context: RequestContext,
        request: ServiceRequest<'_, GetWatcherEventsRequest>,
    ) -> ServiceResult<GetWatcherEventsResponse> {
        let id = request.to_owned_message().watcher_id;
        let events = self
            .guest
            .watchers
            .take(&id)
            .ok_or_else(|| no_watcher(&id))??;
        Response::ok(GetWatcherEventsResponse {
            events,
            ..GetWatcherEventsResponse::default()
        })
    }

    async fn remove_watcher(
        &self,
        _context: RequestContext,
        request: ServiceRequest<'_, RemoveWatcherRequest>,
    ) -> ServiceResult<RemoveWatcherResponse> {
        let id = request.to_owned_message().watcher_id;
        if !self.guest.watchers.remove(&id) {
            return Err(no_watcher(&id));
        }
        Response::ok(RemoveWatcherResponse::default())
    }
}

impl FilesystemService {
    fn caller(&self, context: &RequestContext) -> Result<Caller, ConnectError> {
        let accounts = Accounts::read()
            .map_err(|e| ConnectError::internal(format!("Reading the accounts: {e}")))?;
        let values = self.guest.settings.lock().clone();
        Ok(Caller {
            owner: Owner::of(user(context)?.as_deref(), &values, &accounts)?,
            names: accounts.names(),
        })
    }

    /// Does a caller's work beside the event loop. It goes on if the caller doesn't wait for it.
    async fn work<T: Send + 'static>(
        &self,
        context: &RequestContext,
        work: impl FnOnce(&Caller) -> Result<T, FileError> + Send + 'static,
    ) -> Result<T, ConnectError> {
        let caller = self.caller(context)?;
        let done = tokio::task::spawn_blocking(move || work(&caller));
        in_time(context, async {
            match done.await {
                Ok(done) => Ok(done?),
                Err(error) => Err(ConnectError::internal(error.to_string())),
            }
        })
        .await
    }
}

fn move_path(source: &GuestPath, target: &GuestPath, caller: &Caller) -> Result<(), FileError> {
    let from = Place::of(source)?;
    // Before a directory is made for something that isn't there.
    from.stat()
        .map_err(|e| FileError::new("Moving", source.as_str(), e))?;
    let to = Place::made(target, &caller.owner)?;
    transfer::transfer(&from, &to, source.as_str(), target.as_str())
}

fn no_watcher(id: &str) -> ConnectError {
    ConnectError::not_found(format!("No watcher {id:?}"))
}

/// What one client is told of a watch, in order.
struct Told {
    /// `None` once the last item was given.
    changes: Option<Changes>,
    started: bool,
    keep_alive: Option<Duration>,
    cut_at: Option<Instant>,
}

impl Told {
    async fn next(&mut self) -> Option<Result<WatchDirResponse, ConnectError>> {
        let changes = self.changes.as_mut()?;
        if !self.started {
            self.started = true;
            return Some(Ok(response(StartEvent::default())));
        }
        let silence = self.keep_alive.map(|interval| Instant::now() + interval);
        let item = tokio::select! {
            biased;
            () = reached(self.cut_at) => Err(too_late()),
            change = changes.recv() => match change? {
                Ok(change) => Ok(response(change)),
                Err(error) => Err(error.into()),
            },
            () = reached(silence) => Ok(response(KeepAlive::default())),
        };
        if item.is_err() {
            self.changes = None;
        }
        Some(item)
    }
}

fn response(event: impl Into<Event>) -> WatchDirResponse {
    WatchDirResponse {
        event: Some(event.into()),
        ..WatchDirResponse::default()
    }
}
