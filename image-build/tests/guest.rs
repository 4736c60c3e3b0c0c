//! Boots the inputs under emulation and talks to envd in the guest, as the host will.
//!
//! Needs qemu-system-x86_64 and the inputs (`THAW_INPUTS`, or `cargo run -p image-build -- inputs`).

use std::env;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use envd::protocol::envelope::{Decoder, Frame, MAX_PAYLOAD, encode_message};
use envd::protocol::{
    self, Health, InitRequest, Output, ProcessConfig, ProcessEvent, StartRequest, StreamMessage,
    Timestamp, network,
};

const QEMU: &str = "qemu-system-x86_64";
/// A guest that isn't there by then won't come.
const BOOT_LIMIT: Duration = Duration::from_secs(60);
/// One answer of a guest that is there.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

#[test]
fn guest_boots_and_runs_a_command() {
    if let Some(reason) = missing() {
        println!("skipped: guest_boots_and_runs_a_command: {reason}");
        return;
    }
    let started = Instant::now();
    let mut guest = Guest::boot(&inputs());
    let health = guest.wait_for_health();
    println!(
        "envd answered after {:.1} s",
        started.elapsed().as_secs_f64()
    );
    assert_eq!(health.version, protocol::COMPAT_VERSION);

    let init = InitRequest {
        timestamp: Some(Timestamp::now()),
        hostname: Some("booted".to_owned()),
        entropy: Some(vec![0x5a; 64]),
        env_vars: Some([("FROM_INIT".to_owned(), "yes".to_owned())].into()),
        ..InitRequest::default()
    };
    let body = serde_json::to_vec(&init).unwrap();
    let (status, answer) = guest.request("POST", protocol::INIT_PATH, "application/json", &body);
    assert_eq!(status, 204, "{}", String::from_utf8_lossy(&answer));

    let asked = Instant::now();
    let script = "cat /proc/1/comm; id -un; hostname; echo $FROM_INIT; pwd; date +%s; \
                  ip -4 addr show lo | grep -c 127.0.0.1; grep -c ' / ext4 rw' /proc/mounts; exit 7";
    let (output, code) = guest.run(script);
    println!("a command took {:.2} s", asked.elapsed().as_secs_f64());
    assert_eq!(code, 7, "{output}");
    let lines: Vec<&str> = output.lines().collect();
    assert_eq!(
        lines[..5],
        ["envd", "user", "booted", "yes", "/home/user"],
        "{output}"
    );
    let guest_time: u64 = lines[5].parse().unwrap();
    let host_time = Timestamp::now().since_epoch().as_secs();
    assert!(
        host_time.abs_diff(guest_time) <= 30,
        "host {host_time}, guest {guest_time}"
    );
    assert_eq!(lines[6..], ["1", "1"], "{output}");

    // A clock that is a day off, as after a long pause, is stepped before the reply.
    let tomorrow = Timestamp::now().system_time() + Duration::from_secs(86_400);
    let init = InitRequest {
        timestamp: Some(tomorrow.into()),
        ..InitRequest::default()
    };
    let body = serde_json::to_vec(&init).unwrap();
    assert_eq!(
        guest
            .request("POST", protocol::INIT_PATH, "application/json", &body)
            .0,
        204
    );
    let guest_time: u64 = guest.run("date +%s").0.trim().parse().unwrap();
    let expected = Timestamp::from(tomorrow).since_epoch().as_secs();
    assert!(
        guest_time.abs_diff(expected) <= 30,
        "expected {expected}, guest {guest_time}"
    );

    let (status, answer) = guest.request("POST", protocol::PREPARE_PATH, "application/json", b"");
    assert_eq!(status, 204, "{}", String::from_utf8_lossy(&answer));
}

#[test]
fn guest_freezes_preloads_and_tells_its_ports() {
    if let Some(reason) = missing() {
        println!("skipped: guest_freezes_preloads_and_tells_its_ports: {reason}");
        return;
    }
    let mut guest = Guest::boot(&inputs());
    guest.wait_for_health();
    let ask = |method: &str, path: &str, expected: u16| {
        let (status, answer) = guest.request(method, path, "application/json", b"");
        let text = String::from_utf8_lossy(&answer).into_owned();
        assert_eq!(status, expected, "{method} {path}: {text}");
        text
    };

    // Processes stand still while they are frozen, and the daemon serves.
    let writer = "(while :; do echo x >> /tmp/count; sleep 0.05; done) > /dev/null 2>&1 &";
    guest.run(&format!(
        "echo > /tmp/count; {writer} nc -ll -p 8080 > /dev/null 2>&1 & sleep 0.5"
    ));
    let count = || ask("GET", "/files?path=/tmp/count", 200).len();
    ask("POST", protocol::FREEZE_PATH, 204);
    let frozen = count();
    thread::sleep(Duration::from_secs(1));
    assert_eq!(count(), frozen, "nothing is written");
    ask("POST", protocol::PREPARE_PATH, 204);
    ask("POST", protocol::THAW_PATH, 204);
    thread::sleep(Duration::from_secs(1));
    assert!(count() > frozen, "it goes on");

    let ports = ask("GET", protocol::PORTS_PATH, 200);
    assert_eq!(ports, r#"{"ports":[{"port":8080,"loopback":false}]}"#);

    // All of its memory is read.
    ask("POST", protocol::PRELOAD_PATH, 202);
    let deadline = Instant::now() + BOOT_LIMIT;
    let status = loop {
        let status: serde_json::Value =
            serde_json::from_str(&ask("GET", protocol::PRELOAD_PATH, 200)).unwrap();
        if status["state"] != "running" {
            break status;
        }
        assert!(Instant::now() < deadline, "{status}");
        thread::sleep(Duration::from_millis(50));
    };
    println!("{status}");
    assert_eq!(status["state"], "done", "{status}");
    assert!(status["bytes"].as_u64() > Some(200 << 20), "{status}");

    let used = "grep VmRSS /proc/1/status; wc -c < /usr/bin/envd";
    println!(
        "envd in the guest: {}",
        guest.run(used).0.replace('\n', " ")
    );
}

/// Why a guest can't be booted here.
fn missing() -> Option<String> {
    let there = Command::new(QEMU)
        .arg("--version")
        .output()
        .is_ok_and(|o| o.status.success());
    if !there {
        return Some(format!(
            "no {QEMU}: run `cargo verify`, or apt-get install qemu-system-x86"
        ));
    }
    let files = ["vmlinuz", "initrd.img", "base.ext4"].map(|file| inputs().join(file));
    let absent = files.into_iter().find(|file| !file.exists())?;
    Some(format!(
        "no {}: run `cargo run -p image-build -- inputs`",
        absent.display()
    ))
}

fn inputs() -> PathBuf {
    if let Some(inputs) = env::var_os("THAW_INPUTS") {
        return PathBuf::from(inputs);
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    root.join(target).join("inputs")
}

/// An emulated guest; gone when dropped.
struct Guest {
    qemu: Child,
    port: u16,
}

impl Guest {
    fn boot(inputs: &Path) -> Guest {
        // Free now, and most likely still when the guest takes it.
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let forward = format!("hostfwd=tcp:127.0.0.1:{port}-:{}", protocol::PORT);
        let subnet = format!("{}/{}", "169.254.100.0", network::PREFIX_LENGTH);
        let netdev = format!(
            "user,id=n0,net={subnet},host={},dhcpstart={},{forward}",
            network::GATEWAY,
            network::GUEST_ADDRESS,
        );
        let root = inputs.join("base.ext4");
        let drive = format!(
            "if=none,id=d0,file={},format=raw,snapshot=on",
            root.display()
        );
        let append = format!(
            "console=ttyS0 panic=-1 quiet {}",
            network::kernel_parameters()
        );
        let mut command = Command::new(QEMU);
        command
            .args([
                "-accel",
                "tcg,thread=multi",
                "-M",
                "pc",
                "-cpu",
                "max",
                "-m",
                "256",
            ])
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
            ])
            .args(["-serial", "stdio", "-append", &append])
            .arg("-kernel")
            .arg(inputs.join("vmlinuz"))
            .arg("-initrd")
            .arg(inputs.join("initrd.img"))
            .args(["-drive", &drive, "-device", "virtio-blk-pci,drive=d0"])
            .args([
                "-netdev",
                &netdev,
                "-device",
                "virtio-net-pci,romfile=,netdev=n0",
            ])
            .stdin(Stdio::null());
        Guest {
            qemu: command.spawn().unwrap(),
            port,
        }
    }

    fn wait_for_health(&mut self) -> Health {
        let deadline = Instant::now() + BOOT_LIMIT;
        loop {
            if let Some((200, body)) = self.try_request("GET", protocol::HEALTH_PATH, "", b"") {
                return serde_json::from_slice(&body).unwrap();
            }
            let ended = self.qemu.try_wait().unwrap();
            assert_eq!(ended, None, "the emulator ended; its console is above");
            assert!(
                Instant::now() < deadline,
                "no answer from envd after {BOOT_LIMIT:?}"
            );
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Runs a shell script as the default user; what it wrote, and its exit code.
    fn run(&self, script: &str) -> (String, i32) {
        let request = StartRequest {
            process: ProcessConfig {
                cmd: "/bin/bash".to_owned(),
                args: ["-l", "-c", script].map(str::to_owned).into(),
                ..ProcessConfig::default()
            },
            stdin: Some(false),
            ..StartRequest::default()
        };
        let framed = encode_message(&serde_json::to_vec(&request).unwrap()).unwrap();
        let (status, body) = self.request(
            "POST",
            protocol::START_PATH,
            protocol::STREAM_CONTENT_TYPE,
            &framed,
        );
        assert_eq!(status, 200);
        let mut decoder = Decoder::new(MAX_PAYLOAD);
        decoder.push(&body);
        let (mut output, mut code) = (Vec::new(), None);
        while let Some(frame) = decoder.next_frame().unwrap() {
            let Frame::Message(json) = frame else {
                continue;
            };
            match serde_json::from_slice::<StreamMessage>(&json)
                .unwrap()
                .event
            {
                ProcessEvent::Data(Output::Stdout(bytes) | Output::Stderr(bytes)) => {
                    output.extend(bytes);
                }
                ProcessEvent::End(end) => code = Some(end.exit_code),
                _ => {}
            }
        }
        decoder.finish().unwrap();
        (
            String::from_utf8_lossy(&output).into_owned(),
            code.expect("an end event"),
        )
    }

    fn request(&self, method: &str, path: &str, kind: &str, body: &[u8]) -> (u16, Vec<u8>) {
        self.try_request(method, path, kind, body)
            .expect("an answer from envd")
    }

    /// One request on a connection of its own.
    fn try_request(
        &self,
        method: &str,
        path: &str,
        kind: &str,
        body: &[u8],
    ) -> Option<(u16, Vec<u8>)> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).ok()?;
        stream.set_read_timeout(Some(ANSWER_LIMIT)).ok()?;
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: guest\r\nconnection: close\r\n\
             content-type: {kind}\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).ok()?;
        stream.write_all(body).ok()?;
        let mut response = Vec::new();
        stream.read_to_end(&mut response).ok()?;
        parse(&response)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// Status and body of a complete HTTP response.
fn parse(response: &[u8]) -> Option<(u16, Vec<u8>)> {
    let end = response
        .windows(4)
        .position(|window| window == b"\r\n\r\n")?;
    let (head, mut body) = (
        String::from_utf8_lossy(&response[..end]),
        &response[end + 4..],
    );
    let status = head.split(' ').nth(1)?.parse().ok()?;
    if !head.to_lowercase().contains("transfer-encoding: chunked") {
        return Some((status, body.to_vec()));
    }
    let mut whole = Vec::new();
    loop {
        let line = body.windows(2).position(|window| window == b"\r\n")?;
        let length = usize::from_str_radix(std::str::from_utf8(&body[..line]).ok()?, 16).ok()?;
        if length == 0 {
            return Some((status, whole));
        }
        whole.extend_from_slice(body.get(line + 2..line + 2 + length)?);
        body = body.get(line + 2 + length + 2..)?;
    }
}
