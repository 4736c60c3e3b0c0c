//! The real binary on loopback, and a blocking HTTP/1.1 client for it.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use envd::protocol::envelope::{Decoder, EndOfStream, Frame, MAX_PAYLOAD, encode_message};
use envd::protocol::{EndEvent, Output, ProcessEvent, STREAM_CONTENT_TYPE, StreamMessage};
use serde_json::Value;

/// Nothing here takes longer, so a read that does is a failure instead of a hang.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running daemon that leaves the machine alone; killed when dropped.
pub(crate) struct Daemon {
    process: Child,
    address: String,
}

/// A complete response.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: String,
}

impl Daemon {
    /// Starts it on a free port.
    pub(crate) fn start() -> Daemon {
        Daemon::spawn(&mut Command::new(env!("CARGO_BIN_EXE_envd")))
    }

    /// Starts it with more arguments.
    pub(crate) fn start_with(arguments: &[&str]) -> Daemon {
        Daemon::spawn(Command::new(env!("CARGO_BIN_EXE_envd")).args(arguments))
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Its pid.
    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Starts it as PID 1 of namespaces of its own; `None` where that isn't allowed.
    pub(crate) fn start_as_first_process() -> Option<Daemon> {
        let namespaces = ["--mount", "--pid", "--mount-proc", "--fork", "--kill-child"];
        let allowed = Command::new("unshare")
            .args(namespaces)
            .arg("true")
            .output();
        if !allowed.is_ok_and(|output| output.status.success()) {
            return None;
        }
        let mut command = Command::new("unshare");
        Some(Daemon::spawn(
            command.args(namespaces).arg(env!("CARGO_BIN_EXE_envd")),
        ))
    }

    fn spawn(command: &mut Command) -> Daemon {
        let mut process = command
            .args(["--listen", "127.0.0.1:0", "--borrowed-machine"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("envd starts");
        let stdout = process.stdout.take().expect("a pipe");
        let mut line = String::new();
        BufReader::new(stdout)
            .read_line(&mut line)
            .expect("its first line");
        let address = line
            .trim()
            .rsplit(' ')
            .next()
            .expect("an address")
            .to_owned();
        Daemon { process, address }
    }

    /// Sends a request and leaves the response to the caller.
    pub(crate) fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).expect("a connection");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let mut head = format!("{method} {path} HTTP/1.1\r\nhost: guest\r\nconnection: close\r\n");
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str(&format!("content-length: {}\r\n\r\n", body.len()));
        stream.write_all(head.as_bytes()).expect("the head is sent");
        stream.write_all(body).expect("the body is sent");
        stream
    }

    /// A connection that has had its answer and stays open.
    pub(crate) fn keep_open(&self) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).expect("a connection");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream
            .write_all(b"GET /health HTTP/1.1\r\nhost: guest\r\n\r\n")
            .expect("it is sent");
        let mut answer = Vec::new();
        while !answer.ends_with(b"}") {
            let mut byte = [0];
            stream.read_exact(&mut byte).expect("an answer");
            answer.extend(byte);
        }
        stream
    }

    /// A plain request.
    pub(crate) fn call(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Answer {
        let (status, body) = read_response(self.send(method, path, headers, body.as_bytes()));
        Answer {
            status,
            body: String::from_utf8_lossy(&body).into_owned(),
        }
    }

    /// A unary Connect call in JSON.
    pub(crate) fn unary(&self, method: &str, body: &str) -> Answer {
        let path = format!("/process.Process/{method}");
        self.call("POST", &path, &[("content-type", "application/json")], body)
    }

    /// A unary call of the file service: its status and its JSON.
    pub(crate) fn ask(&self, method: &str, body: &Value) -> (u16, Value) {
        let path = format!("/filesystem.Filesystem/{method}");
        let headers = [("content-type", "application/json")];
        let answer = self.call("POST", &path, &headers, &body.to_string());
        let json = serde_json::from_str(&answer.body);
        (answer.status, json.expect("an answer in JSON"))
    }

    /// A client stream of messages in JSON: the messages and the error of the answer.
    pub(crate) fn send_stream(
        &self,
        method: &str,
        messages: &[Value],
    ) -> (Vec<Value>, EndOfStream) {
        let mut body = Vec::new();
        for message in messages {
            body.extend(encode_message(message.to_string().as_bytes()).expect("a short message"));
        }
        let headers = [
            ("content-type", STREAM_CONTENT_TYPE),
            ("connect-protocol-version", "1"),
        ];
        let path = format!("/process.Process/{method}");
        let mut stream = Json::new(self.send("POST", &path, &headers, &body));
        let mut answers = Vec::new();
        loop {
            match stream.next() {
                Ok(answer) => answers.push(answer),
                Err(end) => return (answers, end),
            }
        }
    }

    /// Opens a stream of any service in JSON.
    pub(crate) fn open_json(&self, path: &str, headers: &[(&str, &str)], body: &Value) -> Json {
        let mut all = vec![
            ("content-type", STREAM_CONTENT_TYPE),
            ("connect-protocol-version", "1"),
        ];
        all.extend_from_slice(headers);
        let framed = encode_message(body.to_string().as_bytes()).expect("a short message");
        Json::new(self.send("POST", path, &all, &framed))
    }

    /// Opens a Connect stream in JSON.
    pub(crate) fn open(&self, method: &str, headers: &[(&str, &str)], body: &str) -> Events {
        let mut all = vec![
            ("content-type", STREAM_CONTENT_TYPE),
            ("connect-protocol-version", "1"),
        ];
        all.extend_from_slice(headers);
        let path = format!("/process.Process/{method}");
        let framed = encode_message(body.as_bytes()).expect("a short message");
        Events(Json::new(self.send("POST", &path, &all, &framed)))
    }

    /// Runs a shell script to its end.
    pub(crate) fn run(&self, script: &str, headers: &[(&str, &str)]) -> Outcome {
        self.open("Start", headers, &start(script)).collect()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The JSON of a Start request for a shell script.
pub(crate) fn start(script: &str) -> String {
    let args = serde_json::json!(["-c", script]);
    serde_json::json!({"process": {"cmd": "/bin/sh", "args": args}, "stdin": false}).to_string()
}

/// A stream of messages being read.
pub(crate) struct Json {
    body: Body,
    decoder: Decoder,
}

impl Json {
    fn new(stream: TcpStream) -> Json {
        let mut reader = BufReader::new(stream);
        let head = read_head(&mut reader);
        assert_eq!(head.status, 200, "a stream's errors come in its end frame");
        Json {
            body: Body::of(reader, &head),
            decoder: Decoder::new(MAX_PAYLOAD),
        }
    }

    /// The next message, or the end of the stream.
    pub(crate) fn next(&mut self) -> Result<Value, EndOfStream> {
        loop {
            match self.decoder.next_frame().expect("well-formed frames") {
                Some(Frame::Message(json)) => {
                    return Ok(serde_json::from_slice(&json).expect("JSON"));
                }
                Some(Frame::End(end)) => return Err(end),
                None => {
                    let chunk = self.body.next().expect("an end frame before the end");
                    self.decoder.push(&chunk);
                }
            }
        }
    }
}

/// A process's stream being read.
pub(crate) struct Events(Json);

/// A stream read to its end.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) pid: u32,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) keep_alives: usize,
    pub(crate) end: Option<EndEvent>,
    pub(crate) error: Option<String>,
}

impl Events {
    /// The next event, or the end of the stream.
    pub(crate) fn next(&mut self) -> Result<ProcessEvent, EndOfStream> {
        let message: StreamMessage = serde_json::from_value(self.0.next()?).expect("an event");
        Ok(message.event)
    }

    /// The pid of the start event, which comes first.
    pub(crate) fn pid(&mut self) -> u32 {
        match self.next() {
            Ok(ProcessEvent::Start(start)) => start.pid,
            other => panic!("{other:?} before the start"),
        }
    }

    /// Reads to the end.
    pub(crate) fn collect(mut self) -> Outcome {
        let mut outcome = Outcome::default();
        loop {
            match self.next() {
                Ok(ProcessEvent::Start(start)) => outcome.pid = start.pid,
                Ok(ProcessEvent::Data(Output::Stdout(bytes))) => outcome.stdout.extend(bytes),
                Ok(ProcessEvent::Data(Output::Stderr(bytes))) => outcome.stderr.extend(bytes),
                Ok(ProcessEvent::Keepalive(_)) => outcome.keep_alives += 1,
                Ok(ProcessEvent::End(end)) => outcome.end = Some(end),
                Err(end) => {
                    outcome.error = end.error.map(|error| error.code);
                    return outcome;
                }
            }
        }
    }
}

/// What a response began with.
#[derive(Debug, Default)]
pub(crate) struct Head {
    pub(crate) status: u16,
    /// Names in lower case.
    pub(crate) headers: BTreeMap<String, String>,
}

/// The pieces of a body: chunks, or all of it.
pub(crate) enum Body {
    Chunked(BufReader<TcpStream>),
    Plain(BufReader<TcpStream>),
}

impl Body {
    fn of(reader: BufReader<TcpStream>, head: &Head) -> Body {
        match head.headers.get("transfer-encoding").map(String::as_str) {
            Some("chunked") => Body::Chunked(reader),
            _ => Body::Plain(reader),
        }
    }
}

impl Iterator for Body {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        match self {
            Body::Chunked(reader) => {
                let mut line = String::new();
                reader.read_line(&mut line).expect("a chunk's length");
                let length = usize::from_str_radix(line.trim(), 16).expect("hexadecimal");
                let mut chunk = vec![0; length + 2];
                reader.read_exact(&mut chunk).expect("the whole chunk");
                chunk.truncate(length);
                (length > 0).then_some(chunk)
            }
            Body::Plain(reader) => {
                let mut piece = vec![0; 65_536];
                let length = reader.read(&mut piece).expect("the body");
                piece.truncate(length);
                (length > 0).then_some(piece)
            }
        }
    }
}

/// Status and body of a response.
pub(crate) fn read_response(stream: TcpStream) -> (u16, Vec<u8>) {
    let (head, body) = read_all(stream);
    (head.status, body)
}

/// Head and body of a response.
pub(crate) fn read_all(stream: TcpStream) -> (Head, Vec<u8>) {
    let mut reader = BufReader::new(stream);
    let head = read_head(&mut reader);
    let body = Body::of(reader, &head).flatten().collect();
    (head, body)
}

/// The head of a response.
pub(crate) fn read_head(reader: &mut BufReader<TcpStream>) -> Head {
    let mut lines = reader
        .by_ref()
        .lines()
        .map(|line| line.expect("a line of the head"));
    let first = lines.next().expect("a status line");
    let code = first.split(' ').nth(1).and_then(|code| code.parse().ok());
    let headers = lines
        .take_while(|line| !line.is_empty())
        .filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_lowercase(), value.trim().to_owned()))
        });
    Head {
        status: code.expect("a status"),
        headers: headers.collect(),
    }
}
