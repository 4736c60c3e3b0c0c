//! One request and its answer, from the client to a guest's port and back.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::http::{StatusCode, Uri, Version};
use axum::response::Response;
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use percent_encoding::percent_decode_str;
use tokio::io::copy_bidirectional;
use tokio::net::TcpStream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout, timeout_at};

use super::answer::Answer;
use super::guarded::{Guarded, Running};
use super::headers;
use super::target::{Target, target};
use super::{Traffic, Way};
use crate::server::Peer;

/// How long one attempt to connect may take: a guest that was just resumed may lose the first
/// packet, and the kernel would repeat it only after a second.
const ATTEMPT: Duration = Duration::from_millis(250);
/// How long all attempts together may take.
const CONNECT: Duration = Duration::from_secs(10);
/// How long a guest may think before its answer begins. Long, for long polls.
const FIRST_BYTE: Duration = Duration::from_secs(600);

/// Passes a request on and returns the guest's answer, whose body goes on arriving.
pub(super) async fn forward(
    traffic: &impl Traffic,
    mut request: Request,
    place: OwnedSemaphorePermit,
) -> Result<Response, Answer> {
    let target = target(request.headers(), request.uri())?;
    let path = request.uri().path();
    // Some server in a guest may unescape before it looks; ours must not be fooled by that.
    let plain = percent_decode_str(path).decode_utf8_lossy();
    if [path, &*plain]
        .iter()
        .any(|path| traffic.is_host_only(target.port, path))
    {
        return Err(Answer::host_only(path));
    }
    let way = traffic.way(target.id.clone()).await;
    let Way { address, mut left } = way.map_err(|error| Answer::no_way(&target, &error))?;

    let upgrade = headers::upgrade(request.headers());
    let client_side = upgrade.is_some().then(|| hyper::upgrade::on(&mut request));
    prepare(&mut request, upgrade);
    let answered = async {
        let stream = connect(SocketAddr::new(address, target.port), &target).await?;
        exchange(stream, request, &target).await
    };
    let (mut response, connection) = tokio::select! {
        answered = answered => answered?,
        () = &mut left => return Err(Answer::not_found(target.id.as_str())),
    };
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let guest_side = hyper::upgrade::on(&mut response);
        if let Some(client_side) = client_side {
            tokio::spawn(async move {
                tokio::select! {
                    () = splice(client_side, guest_side) => {}
                    () = left => {}
                }
                drop((connection, place));
            });
        }
        let protocol = headers::upgrade(response.headers());
        let (mut head, _) = response.into_parts();
        headers::strip(&mut head.headers, protocol);
        return Ok(Response::from_parts(head, Body::empty()));
    }
    let (mut head, body) = response.into_parts();
    head.version = Version::HTTP_11;
    headers::strip(&mut head.headers, None);
    let body = Body::new(Guarded::new(body, left, connection, place));
    Ok(Response::from_parts(head, body))
}

/// Makes the client's request the proxy's own.
fn prepare(request: &mut Request, upgrade: Option<axum::http::HeaderValue>) {
    let peer = request.extensions_mut().remove::<Peer>();
    let client = peer.as_ref().and_then(Peer::ip);
    let scheme = peer.as_ref().map_or("http", Peer::scheme);
    // The authority of an absolute request is its host, whatever the header says.
    if let Some(authority) = request.uri().authority()
        && let Ok(host) = authority.as_str().parse()
    {
        request.headers_mut().insert("host", host);
    }
    headers::strip(request.headers_mut(), upgrade);
    headers::forward(request.headers_mut(), client, scheme);
    let path = request.uri().path_and_query().cloned();
    *request.uri_mut() = path.map_or_else(|| Uri::from_static("/"), Uri::from);
    *request.version_mut() = Version::HTTP_11;
}

async fn connect(address: SocketAddr, target: &Target) -> Result<TcpStream, Answer> {
    let deadline = Instant::now() + CONNECT;
    loop {
        match timeout(ATTEMPT, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => {
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
                return Err(Answer::closed_port(target));
            }
            // Unreachable: it has just gone.
            Ok(Err(_)) => return Err(Answer::not_found(target.id.as_str())),
            Err(_) if Instant::now() >= deadline => {
                return Err(Answer::broken(target, "does not answer"));
            }
            // Lost, not refused: the next attempt's packet goes out at once.
            Err(_) => {}
        }
    }
}

async fn exchange(
    stream: TcpStream,
    request: Request,
    target: &Target,
) -> Result<(hyper::Response<Incoming>, Running), Answer> {
    let broken = |error: hyper::Error| {
        let what = if error.is_parse() {
            "does not speak HTTP"
        } else {
            "closed the connection before it answered"
        };
        Answer::broken(target, what)
    };
    let (mut sender, connection): (SendRequest<Body>, _) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(broken)?;
    let connection = Running::start(async move {
        let _ = connection.with_upgrades().await;
    });
    let deadline = Instant::now() + FIRST_BYTE;
    match timeout_at(deadline, sender.send_request(request)).await {
        Ok(response) => Ok((response.map_err(broken)?, connection)),
        Err(_) => Err(Answer::silent(target, FIRST_BYTE.as_secs())),
    }
}

/// Two connections that have become something else: bytes go through until both sides end.
async fn splice(client: OnUpgrade, guest: OnUpgrade) {
    let Ok((client, guest)) = tokio::try_join!(client, guest) else {
        return;
    };
    let (mut client, mut guest) = (TokioIo::new(client), TokioIo::new(guest));
    let _ = copy_bidirectional(&mut client, &mut guest).await;
}
