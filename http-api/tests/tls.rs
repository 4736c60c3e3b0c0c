//! TLS listeners between real sockets and a real rustls client: who is let in, who is kept out, and
//! that whoever never finishes a handshake is in nobody's way.

mod support;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use http_api::auth::Access;
use http_api::ids::SandboxId;
use http_api::server::{ConnectionLimits, TlsListener, serve};
use http_api::traffic::traffic;
use http_api::{ApiError, Traffic, Way, router};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use support::{FULL, Fake};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring::default_provider;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig};

const PATIENCE: Duration = Duration::from_secs(60);
const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// An authority, and what it signs.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        Self(CertifiedIssuer::self_signed(params, key).unwrap())
    }

    fn sign(&self, name: &str) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let signed = params.signed_by(&key, &self.0).unwrap();
        let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        (vec![signed.into()], key)
    }

    fn roots(&self) -> Arc<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add(self.0.der().clone()).unwrap();
        Arc::new(roots)
    }

    /// A listener's side: its certificate is for `*.thaw.test`, its clients are asked for one of
    /// `clients`.
    fn server(&self, clients: Option<(&Self, bool)>) -> Arc<ServerConfig> {
        let provider = Arc::new(default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .unwrap();
        let builder = match clients {
            None => builder.with_no_client_auth(),
            Some((authority, demanded)) => {
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(authority.roots(), provider);
                let verifier = match demanded {
                    true => verifier,
                    false => verifier.allow_unauthenticated(),
                };
                builder.with_client_cert_verifier(verifier.build().unwrap())
            }
        };
        let (chain, key) = self.sign("*.thaw.test");
        Arc::new(builder.with_single_cert(chain, key).unwrap())
    }

    /// A client's side that believes this authority and shows a certificate of `own`.
    fn client(&self, own: Option<&Self>) -> TlsConnector {
        let builder = ClientConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(self.roots());
        let config = match own {
            None => builder.with_no_client_auth(),
            Some(own) => {
                let (chain, key) = own.sign("client");
                builder.with_client_auth_cert(chain, key).unwrap()
            }
        };
        TlsConnector::from(Arc::new(config))
    }
}

async fn listen(
    config: Arc<ServerConfig>,
    router: axum::Router,
    limits: ConnectionLimits,
) -> SocketAddr {
    let listener = TcpListener::bind((HERE, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let listener = TlsListener::new(listener, config);
    tokio::spawn(serve(listener, router, limits, std::future::pending()));
    address
}

/// The API, where a token is asked for.
async fn api(config: Arc<ServerConfig>, limits: ConnectionLimits) -> SocketAddr {
    let access = Access {
        require_token: true,
        users: Arc::from([]),
    };
    listen(config, router(Fake::default(), access), limits).await
}

/// The first line of the answer to a request under this name, or why there is none.
async fn ask(
    at: SocketAddr,
    connector: &TlsConnector,
    name: &str,
    header: &str,
) -> Result<String, String> {
    let exchange = async {
        let stream = TcpStream::connect(at).await.map_err(|e| e.to_string())?;
        let server = ServerName::try_from(name.to_owned()).unwrap();
        let mut stream = connector
            .connect(server, stream)
            .await
            .map_err(|e| e.to_string())?;
        let head =
            format!("GET /v1/host HTTP/1.1\r\nhost: {name}\r\nconnection: close\r\n{header}\r\n");
        stream
            .write_all(head.as_bytes())
            .await
            .map_err(|e| e.to_string())?;
        let mut bytes = Vec::new();
        // A side that closes without saying so has sent its answer all the same.
        let read = stream.read_to_end(&mut bytes).await;
        let text = String::from_utf8_lossy(&bytes).into_owned();
        match (text.is_empty(), read) {
            (true, Err(error)) => Err(error.to_string()),
            _ => Ok(text),
        }
    };
    timeout(PATIENCE, exchange)
        .await
        .expect("an answer in time")
}

fn status(answer: &str) -> &str {
    answer.split(' ').nth(1).unwrap_or_default()
}

#[tokio::test]
async fn a_token_opens_the_api_and_another_authority_is_not_believed() {
    let (ours, other) = (Authority::new(), Authority::new());
    let at = api(ours.server(None), ConnectionLimits::default()).await;
    let token = format!("x-api-key: {FULL}\r\n");
    let answer = ask(at, &ours.client(None), "api.thaw.test", &token)
        .await
        .unwrap();
    assert_eq!(status(&answer), "200", "{answer}");
    let answer = ask(at, &ours.client(None), "api.thaw.test", "")
        .await
        .unwrap();
    assert_eq!(status(&answer), "401", "{answer}");
    let refused = ask(at, &other.client(None), "api.thaw.test", &token).await;
    assert!(
        refused
            .as_ref()
            .is_err_and(|e| e.contains("invalid peer certificate")),
        "{refused:?}"
    );
    let refused = ask(at, &ours.client(None), "thaw.other", &token).await;
    assert!(
        refused
            .as_ref()
            .is_err_and(|e| e.contains("not valid for name")),
        "{refused:?}"
    );
}

#[tokio::test]
async fn a_clients_certificate_is_as_good_as_a_token() {
    let (ours, clients, other) = (Authority::new(), Authority::new(), Authority::new());
    let at = api(
        ours.server(Some((&clients, false))),
        ConnectionLimits::default(),
    )
    .await;
    let with = ask(at, &ours.client(Some(&clients)), "a.thaw.test", "")
        .await
        .unwrap();
    assert_eq!(status(&with), "200", "{with}");
    let without = ask(at, &ours.client(None), "a.thaw.test", "")
        .await
        .unwrap();
    assert_eq!(status(&without), "401", "{without}");
    let page = "origin: https://example.com\r\n";
    let page = ask(at, &ours.client(Some(&clients)), "a.thaw.test", page)
        .await
        .unwrap();
    assert_eq!(status(&page), "403", "{page}");
    let foreign = ask(at, &ours.client(Some(&other)), "a.thaw.test", "").await;
    assert!(foreign.is_err(), "{foreign:?}");
}

#[tokio::test]
async fn where_certificates_are_demanded_there_is_no_other_way_in() {
    let (ours, clients) = (Authority::new(), Authority::new());
    let at = api(
        ours.server(Some((&clients, true))),
        ConnectionLimits::default(),
    )
    .await;
    let with = ask(at, &ours.client(Some(&clients)), "a.thaw.test", "")
        .await
        .unwrap();
    assert_eq!(status(&with), "200", "{with}");
    let token = format!("x-api-key: {FULL}\r\n");
    let without = ask(at, &ours.client(None), "a.thaw.test", &token).await;
    assert!(without.is_err(), "{without:?}");
}

#[tokio::test]
async fn whoever_never_finishes_a_handshake_has_no_place() {
    let ours = Authority::new();
    let limits = ConnectionLimits {
        connections: 1,
        handshake_time: Duration::from_millis(200),
        ..ConnectionLimits::default()
    };
    let at = api(ours.server(None), limits).await;
    let mut silent = Vec::new();
    for first in [&b""[..], b"\x16\x03\x01", b"GET / HTTP/1.1\r\n\r\n"] {
        let mut stream = TcpStream::connect(at).await.unwrap();
        stream.write_all(first).await.unwrap();
        silent.push(stream);
    }
    let token = format!("x-api-key: {FULL}\r\n");
    let answer = ask(at, &ours.client(None), "a.thaw.test", &token)
        .await
        .unwrap();
    assert_eq!(status(&answer), "200", "{answer}");
    // And each of them is let go.
    for mut stream in silent {
        let mut rest = Vec::new();
        let end = timeout(PATIENCE, stream.read_to_end(&mut rest));
        let _ = end.await.expect("the connection is closed");
    }
}

#[tokio::test]
async fn handshakes_beyond_their_number_wait_for_those_before() {
    let ours = Authority::new();
    let limits = ConnectionLimits {
        handshakes: 1,
        handshake_time: Duration::from_millis(200),
        ..ConnectionLimits::default()
    };
    let at = api(ours.server(None), limits).await;
    let _silent = TcpStream::connect(at).await.unwrap();
    let token = format!("x-api-key: {FULL}\r\n");
    for _ in 0..3 {
        let answer = ask(at, &ours.client(None), "a.thaw.test", &token)
            .await
            .unwrap();
        assert_eq!(status(&answer), "200", "{answer}");
    }
}

/// Sandbox `one` is this machine.
#[derive(Clone)]
struct Host;

impl Traffic for Host {
    async fn way(&self, id: SandboxId) -> Result<Way, ApiError> {
        if id.as_str() == "one" {
            return Ok(Way {
                address: HERE,
                left: Box::pin(std::future::pending()),
            });
        }
        Err(ApiError::NotFound {
            what: "sandbox",
            name: id.to_string(),
        })
    }

    fn is_host_only(&self, _: u16, _: &str) -> bool {
        false
    }
}

#[tokio::test]
async fn a_host_label_leads_to_a_sandbox_through_tls() {
    let guest = TcpListener::bind((HERE, 0)).await.unwrap();
    let port = guest.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = guest.accept().await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            let answer = "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n";
            stream.write_all(answer.as_bytes()).await.unwrap();
            stream.write_all(&head).await.unwrap();
        }
    });
    let ours = Authority::new();
    let limits = ConnectionLimits::default();
    let at = listen(ours.server(None), traffic(Host, 8), limits).await;
    let name = format!("{port}-one.thaw.test");
    let answer = ask(at, &ours.client(None), &name, "").await.unwrap();
    assert_eq!(status(&answer), "200", "{answer}");
    let seen = answer.to_ascii_lowercase();
    assert!(seen.contains(&format!("host: {name}")), "{seen}");
    assert!(seen.contains("x-forwarded-proto: https"), "{seen}");
    let answer = ask(at, &ours.client(None), "80-two.thaw.test", "")
        .await
        .unwrap();
    assert_eq!(status(&answer), "502", "{answer}");
    assert!(answer.contains("was not found"), "{answer}");
}
