//! The sandbox listener between real sockets: a client that speaks HTTP by hand, and a guest that
//! does.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use http_api::ids::SandboxId;
use http_api::server::{ConnectionLimits, serve};
use http_api::traffic::traffic;
use http_api::wire::SandboxState;
use http_api::{ApiError, Traffic, Way};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::timeout;

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);
const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Sandbox `one` is this machine until it leaves; `asleep` is paused.
#[derive(Clone)]
struct Host {
    here: watch::Sender<bool>,
    asked: Arc<AtomicUsize>,
}

impl Traffic for Host {
    async fn way(&self, id: SandboxId) -> Result<Way, ApiError> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        match id.as_str() {
            "one" => {
                let mut here = self.here.subscribe();
                let left = Box::pin(async move {
                    let _ = here.wait_for(|here| !here).await;
                });
                Ok(Way {
                    address: HERE,
                    left,
                })
            }
            "asleep" => Err(ApiError::Denied {
                state: SandboxState::Paused,
                detail: "The sandbox is paused".into(),
            }),
            "busy" => Err(ApiError::Busy {
                detail: "Too many".into(),
            }),
            other => Err(ApiError::NotFound {
                what: "sandbox",
                name: other.to_owned(),
            }),
        }
    }

    fn is_host_only(&self, _: u16, path: &str) -> bool {
        path == "/init"
    }
}

struct Proxy {
    port: u16,
    host: Host,
}

async fn proxy() -> Proxy {
    let host = Host {
        here: watch::Sender::new(true),
        asked: Arc::default(),
    };
    let listener = TcpListener::bind((HERE, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let router = traffic(host.clone(), 2);
    let limits = ConnectionLimits::default();
    tokio::spawn(serve(listener, router, limits, std::future::pending()));
    Proxy { port, host }
}

impl Proxy {
    /// Sends the head of a request, with what follows it.
    async fn send(&self, head: &str) -> TcpStream {
        let mut stream = TcpStream::connect((HERE, self.port)).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        stream
    }

    async fn ask(&self, id: &str, port: impl ToString, path: &str) -> Answer {
        let port = port.to_string();
        let head = format!(
            "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ne2b-sandbox-id: {id}\r\n\
             e2b-sandbox-port: {port}\r\n\r\n"
        );
        let mut stream = self.send(&head).await;
        let mut text = String::new();
        within(stream.read_to_string(&mut text)).await.unwrap();
        Answer::parse(&text)
    }
}

#[derive(Debug)]
struct Answer {
    status: u16,
    headers: BTreeMap<String, String>,
    body: String,
}

impl Answer {
    fn parse(text: &str) -> Self {
        let (head, body) = text
            .split_once("\r\n\r\n")
            .unwrap_or_else(|| panic!("{text:?}"));
        let mut lines = head.lines();
        let status = lines.next().unwrap().split(' ').nth(1).unwrap();
        let headers = lines.map(|line| {
            let (name, value) = line.split_once(": ").unwrap();
            (name.to_lowercase(), value.to_owned())
        });
        Self {
            status: status.parse().unwrap(),
            headers: headers.collect(),
            body: body.to_owned(),
        }
    }

    fn json(&self) -> serde_json::Value {
        assert_eq!(self.headers["content-type"], "application/json", "{self:?}");
        serde_json::from_str(&self.body).unwrap()
    }
}

async fn within<T>(work: impl Future<Output = T>) -> T {
    timeout(PATIENCE, work).await.expect("in time")
}

/// A program in a guest that takes one connection.
async fn guest<F: Future<Output = ()> + Send>(
    serve: impl FnOnce(TcpStream) -> F + Send + 'static,
) -> u16 {
    let listener = TcpListener::bind((HERE, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        serve(stream).await;
    });
    port
}

/// Reads until the text ends so.
async fn read_until(stream: &mut TcpStream, end: &str) -> String {
    let mut bytes = Vec::new();
    while !bytes.ends_with(end.as_bytes()) {
        match within(stream.read_u8()).await {
            Ok(byte) => bytes.push(byte),
            Err(error) => panic!("{error} after {:?}", String::from_utf8_lossy(&bytes)),
        }
    }
    String::from_utf8(bytes).unwrap()
}

fn post(port: u16) -> String {
    format!(
        "POST /a%20b?c=d HTTP/1.1\r\nhost: {port}-one.thaw.test\r\nte: trailers\r\n\
         x-mine: 1\r\ntransfer-encoding: chunked\r\n\r\n"
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_go_through_as_they_come_in_both_directions() {
    let proxy = proxy().await;
    let port = guest(|mut stream| async move {
        let head = read_until(&mut stream, "\r\n\r\n").await.to_lowercase();
        assert!(head.starts_with("post /a%20b?c=d http/1.1\r\n"), "{head}");
        assert!(
            head.contains("x-mine: 1\r\n") && !head.contains("te: trailers"),
            "{head}"
        );
        assert!(head.contains("x-forwarded-for: 127.0.0.1\r\n"), "{head}");
        let answer = "HTTP/1.1 201 Created\r\nx-theirs: 2\r\ntransfer-encoding: chunked\r\n\r\n";
        stream.write_all(answer.as_bytes()).await.unwrap();
        // Each part is answered before the next one is sent.
        for part in ["one", "two", "six"] {
            let chunk = format!("3\r\n{part}\r\n");
            assert_eq!(read_until(&mut stream, &chunk).await, chunk);
            stream.write_all(chunk.as_bytes()).await.unwrap();
        }
        read_until(&mut stream, "0\r\n\r\n").await;
        stream.write_all(b"0\r\n\r\n").await.unwrap();
    })
    .await;
    let mut client = proxy.send(&post(port)).await;
    let head = read_until(&mut client, "\r\n\r\n").await;
    assert!(head.starts_with("HTTP/1.1 201"), "{head}");
    assert!(head.contains("x-theirs: 2\r\n"), "{head}");
    for part in ["one", "two", "six"] {
        let chunk = format!("3\r\n{part}\r\n");
        client.write_all(chunk.as_bytes()).await.unwrap();
        assert_eq!(read_until(&mut client, &chunk).await, chunk);
    }
    client.write_all(b"0\r\n\r\n").await.unwrap();
    read_until(&mut client, "0\r\n\r\n").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_may_become_something_else() {
    let proxy = proxy().await;
    let port = guest(|mut stream| async move {
        let head = read_until(&mut stream, "\r\n\r\n").await.to_lowercase();
        assert!(head.contains("connection: upgrade\r\n"), "{head}");
        assert!(head.contains("upgrade: websocket\r\n"), "{head}");
        assert!(head.contains("sec-websocket-key: k\r\n"), "{head}");
        let answer = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\n\
                      upgrade: websocket\r\nsec-websocket-accept: a\r\n\r\nhello";
        stream.write_all(answer.as_bytes()).await.unwrap();
        assert_eq!(read_until(&mut stream, "ping").await, "ping");
        stream.write_all(b"pong").await.unwrap();
    })
    .await;
    let head = format!(
        "GET /socket HTTP/1.1\r\nhost: {port}-one.thaw.test\r\nconnection: Upgrade\r\n\
         upgrade: websocket\r\nsec-websocket-key: k\r\n\r\n"
    );
    let mut client = proxy.send(&head).await;
    let head = read_until(&mut client, "\r\n\r\n").await.to_lowercase();
    assert!(head.starts_with("http/1.1 101"), "{head}");
    assert!(head.contains("sec-websocket-accept: a\r\n"), "{head}");
    assert_eq!(read_until(&mut client, "hello").await, "hello");
    client.write_all(b"ping").await.unwrap();
    assert_eq!(read_until(&mut client, "pong").await, "pong");
    assert_eq!(
        within(client.read_u8()).await.unwrap_err().kind(),
        std::io::ErrorKind::UnexpectedEof
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_read_holds_the_guest_up() {
    /// More than all buffers of the kernel between them.
    const TOO_MUCH: usize = 512 << 20;
    let proxy = proxy().await;
    let written = Arc::new(AtomicUsize::new(0));
    let counted = written.clone();
    let port = guest(move |mut stream| async move {
        read_until(&mut stream, "\r\n\r\n").await;
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {TOO_MUCH}\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        let part = vec![0; 1 << 16];
        while counted.load(Ordering::SeqCst) < TOO_MUCH && stream.write_all(&part).await.is_ok() {
            counted.fetch_add(part.len(), Ordering::SeqCst);
        }
    })
    .await;
    let mut client = proxy
        .send(&format!(
            "GET / HTTP/1.1\r\nhost: {port}-one.thaw.test\r\n\r\n"
        ))
        .await;
    // It is stuck when nothing has moved for a while; a slow machine only makes this longer.
    let mut before = 0;
    loop {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let now = written.load(Ordering::SeqCst);
        if now > 0 && now == before {
            break;
        }
        before = now;
    }
    assert!(
        before < TOO_MUCH / 2,
        "{before} bytes were taken from the guest"
    );
    // And goes on as soon as there is room.
    let mut body = vec![0; TOO_MUCH / 8];
    within(client.read_exact(&mut body)).await.unwrap();
    drop(client);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_leads_nowhere_is_answered_as_the_clients_expect() {
    let proxy = proxy().await;
    let closed = {
        let listener = TcpListener::bind((HERE, 0)).await.unwrap();
        listener.local_addr().unwrap().port()
    };
    let answer = proxy.ask("one", closed, "/").await;
    assert_eq!(answer.status, 502);
    let expected = serde_json::json!({
        "sandboxId": "one", "message": "The sandbox is running but port is not open",
        "port": closed, "code": 502,
    });
    assert_eq!(answer.json(), expected);
    for id in ["gone", "asleep", "No-Such-Id"] {
        let answer = proxy.ask(id, 80, "/").await;
        assert_eq!(answer.status, 502, "{id}");
        let expected = serde_json::json!({
            "sandboxId": id, "message": "The sandbox was not found", "code": 502,
        });
        assert_eq!(answer.json(), expected);
    }
    assert_eq!(proxy.ask("one", "http", "/").await.status, 400);
    let busy = proxy.ask("busy", 80, "/").await;
    assert_eq!((busy.status, &*busy.headers["retry-after"]), (429, "1"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_for_the_host_alone_never_gets_to_the_guest() {
    let proxy = proxy().await;
    for path in ["/init", "/%69nit", "/init?x=1"] {
        assert_eq!(proxy.ask("one", 49983, path).await.status, 404, "{path}");
    }
    assert_eq!(proxy.host.asked.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_ends_when_its_guest_leaves() {
    let proxy = proxy().await;
    let port = guest(|mut stream| async move {
        read_until(&mut stream, "\r\n\r\n").await;
        let head = "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nbegun";
        stream.write_all(head.as_bytes()).await.unwrap();
        // As a guest that was stopped: the connection stays as it is.
        std::future::pending::<()>().await;
    })
    .await;
    let mut client = proxy
        .send(&format!(
            "GET / HTTP/1.1\r\nhost: {port}-one.thaw.test\r\n\r\n"
        ))
        .await;
    read_until(&mut client, "begun").await;
    proxy.host.here.send_replace(false);
    let mut rest = Vec::new();
    let _ = within(client.read_to_end(&mut rest)).await;
    assert_eq!(rest, b"");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_goes_away_lets_go_of_the_guest() {
    let proxy = proxy().await;
    let (told, tell) = tokio::sync::oneshot::channel();
    let port = guest(|mut stream| async move {
        read_until(&mut stream, "\r\n\r\n").await;
        let head = "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nbegun";
        stream.write_all(head.as_bytes()).await.unwrap();
        let _ = told.send(stream.read_u8().await.map_err(|error| error.kind()));
    })
    .await;
    let mut client = proxy
        .send(&format!(
            "GET / HTTP/1.1\r\nhost: {port}-one.thaw.test\r\n\r\n"
        ))
        .await;
    read_until(&mut client, "begun").await;
    drop(client);
    assert!(within(tell).await.unwrap().is_err(), "the connection ends");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_never_ends_his_head_is_let_go() {
    let host = Host {
        here: watch::Sender::new(true),
        asked: Arc::default(),
    };
    let listener = TcpListener::bind((HERE, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let limits = ConnectionLimits {
        head_time: Duration::from_millis(200),
        ..ConnectionLimits::default()
    };
    tokio::spawn(serve(
        listener,
        traffic(host, 2),
        limits,
        std::future::pending(),
    ));
    let mut client = TcpStream::connect((HERE, port)).await.unwrap();
    client
        .write_all(b"GET / HTTP/1.1\r\nhost: x\r\n")
        .await
        .unwrap();
    let mut rest = Vec::new();
    let _ = within(client.read_to_end(&mut rest)).await;
    let mut big = TcpStream::connect((HERE, port)).await.unwrap();
    let head = format!(
        "GET / HTTP/1.1\r\nx: {}\r\n\r\n",
        "y".repeat(4 * limits.head_bytes)
    );
    let _ = big.write_all(head.as_bytes()).await;
    let mut answer = Vec::new();
    let _ = within(big.read_to_end(&mut answer)).await;
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn as_many_streams_as_there_may_be_are_passed_on() {
    let proxy = proxy().await;
    let mut open = Vec::new();
    for _ in 0..2 {
        let port = guest(|mut stream| async move {
            read_until(&mut stream, "\r\n\r\n").await;
            let head = "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nbegun";
            stream.write_all(head.as_bytes()).await.unwrap();
            let _ = stream.read_u8().await;
        })
        .await;
        let head = format!("GET / HTTP/1.1\r\nhost: {port}-one.thaw.test\r\n\r\n");
        let mut client = proxy.send(&head).await;
        read_until(&mut client, "begun").await;
        open.push(client);
    }
    let refused = proxy.ask("one", 80, "/").await;
    assert_eq!(
        (refused.status, &*refused.headers["retry-after"]),
        (429, "1")
    );
    // Whoever goes away makes room.
    open.clear();
    let freed = async {
        while proxy.ask("gone", 80, "/").await.status != 502 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    within(freed).await;
}
