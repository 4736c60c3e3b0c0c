//! An emulated machine that plays a host: Debian's kernel with device-mapper, loop devices, KVM and
//! what a network takes, and one program of ours in it.
//!
//! The guests' kernel and initial RAM disk boot a root that is made on the spot: busybox, the
//! modules, the program, other programs and files of the caller's, and their libraries.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

const QEMU: &str = "qemu-system-x86_64";
const INPUTS: [&str; 4] = [
    "vmlinuz",
    "initrd.img",
    "tools/busybox",
    "kernel/host-modules/order",
];
/// Of the root, which is sparse.
const ROOT_BYTES: u64 = 16 << 30;
const MEMORY_MB: u32 = 1024;
/// How the first process says how the program ended.
const ENDED: &str = "machine: exit ";

/// What is missing here.
pub(crate) fn missing(inputs: Option<&Path>) -> Option<String> {
    let Some(inputs) = inputs else {
        return Some("THAW_INPUTS is not set; `cargo verify` sets it".into());
    };
    if let Some(name) = INPUTS.iter().find(|name| !inputs.join(name).is_file()) {
        return Some(format!("no {name} in THAW_INPUTS"));
    }
    let has = |program: &str, argument: &str| {
        let probe = Command::new(program).arg(argument).output();
        probe.is_ok_and(|output| output.status.success())
    };
    if !has(QEMU, "--version") {
        return Some(format!("no {QEMU}"));
    }
    if !has("mkfs.ext4", "-V") {
        return Some("no mkfs.ext4".into());
    }
    None
}

/// A machine to be.
#[derive(Debug)]
pub(crate) struct Machine<'a> {
    inputs: &'a Path,
    memory_mb: u32,
    /// Each with its place in the root.
    files: Vec<(PathBuf, String)>,
    programs: Vec<(PathBuf, String)>,
    environment: Vec<(String, String)>,
}

impl<'a> Machine<'a> {
    /// One of these inputs.
    pub(crate) fn new(inputs: &'a Path) -> Self {
        Self {
            inputs,
            memory_mb: MEMORY_MB,
            files: Vec::new(),
            programs: Vec::new(),
            environment: Vec::new(),
        }
    }

    /// With so much memory.
    pub(crate) fn memory_mb(mut self, memory_mb: u32) -> Self {
        self.memory_mb = memory_mb;
        self
    }

    /// With a file at an absolute path.
    pub(crate) fn file(mut self, from: impl Into<PathBuf>, to: impl Into<String>) -> Self {
        self.files.push((from.into(), to.into()));
        self
    }

    /// With a program at an absolute path, and its libraries where they are here.
    pub(crate) fn program(mut self, from: impl Into<PathBuf>, to: impl Into<String>) -> Self {
        self.programs.push((from.into(), to.into()));
        self
    }

    /// With a variable in the program's environment.
    pub(crate) fn set(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Runs this process's own program in it, with other arguments, and shows what it prints.
    /// Gives its exit status and its lines.
    ///
    /// # Panics
    /// The machine can't be made, or is not done within `limit`.
    pub(crate) fn run_self(self, arguments: &[&str], limit: Duration) -> (i32, Vec<String>) {
        let work = tempfile::tempdir().unwrap();
        let root = work.path().join("root");
        self.populate(&root, arguments);
        let disk = work.path().join("root.ext4");
        fs::File::create(&disk)
            .unwrap()
            .set_len(ROOT_BYTES)
            .unwrap();
        // No journal, and nothing prepared: it lives for a minute.
        let made = Command::new("mkfs.ext4")
            .args(["-q", "-F", "-m", "0", "-O", "^has_journal", "-d"])
            .args([&root, &disk])
            .output()
            .unwrap();
        assert!(
            made.status.success(),
            "{}",
            String::from_utf8_lossy(&made.stderr)
        );
        follow(self.boot(&disk), limit)
    }

    fn populate(&self, root: &Path, arguments: &[&str]) {
        for name in [
            "bin", "data", "dev", "modules", "proc", "run", "sbin", "sys", "tmp",
        ] {
            fs::create_dir_all(root.join(name)).unwrap();
        }
        fs::copy(self.inputs.join("tools/busybox"), root.join("bin/busybox")).unwrap();
        let modules = self.inputs.join("kernel/host-modules");
        for entry in fs::read_dir(&modules).unwrap().flatten() {
            fs::copy(entry.path(), root.join("modules").join(entry.file_name())).unwrap();
        }
        let init = root.join("sbin/init");
        fs::write(&init, script(arguments, &self.environment)).unwrap();
        for program in [init, root.join("bin/busybox")] {
            fs::set_permissions(program, fs::Permissions::from_mode(0o755)).unwrap();
        }
        for (from, to) in &self.files {
            copy(from, &root.join(to.trim_start_matches('/')));
        }
        install(root, &std::env::current_exe().unwrap(), "/program");
        for (from, to) in &self.programs {
            install(root, from, to);
        }
    }

    fn boot(&self, disk: &Path) -> Child {
        let drive = format!(
            "if=none,id=d0,file={},format=raw,cache=unsafe",
            disk.display()
        );
        Command::new(QEMU)
            .args([
                "-accel",
                "tcg,thread=multi",
                "-M",
                "pc",
                "-cpu",
                "max",
                "-smp",
                "1",
            ])
            .args([
                "-m",
                &self.memory_mb.to_string(),
                "-nodefaults",
                "-no-user-config",
            ])
            .args(["-display", "none", "-no-reboot", "-serial", "stdio"])
            .arg("-kernel")
            .arg(self.inputs.join("vmlinuz"))
            .arg("-initrd")
            .arg(self.inputs.join("initrd.img"))
            .args([
                "-append",
                "console=ttyS0 panic=-1 quiet mitigations=off no_timer_check",
            ])
            .args(["-drive", &drive, "-device", "virtio-blk-pci,drive=d0"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    }
}

fn script(arguments: &[&str], environment: &[(String, String)]) -> String {
    let exports = environment
        .iter()
        .map(|(name, value)| format!("export {name}='{value}'\n"));
    let words = arguments.iter().map(|word| format!(" '{word}'"));
    format!(
        "#!/bin/busybox sh\n\
         for dir in /run /tmp; do /bin/busybox mount -t tmpfs tmpfs $dir; done\n\
         while read -r module; do /bin/busybox insmod /modules/$module; done < /modules/order\n\
         /bin/busybox mount -t cgroup2 cgroup2 /sys/fs/cgroup\n\
         /bin/busybox ip link set lo up\n\
         {}/program{} < /dev/null\n\
         echo \"{ENDED}$?\"\n\
         /bin/busybox poweroff -f\n",
        exports.collect::<String>(),
        words.collect::<String>(),
    )
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to.parent().unwrap()).unwrap();
    fs::copy(from, to).unwrap_or_else(|error| panic!("{}: {error}", from.display()));
}

/// A program without its debug information, and its libraries.
fn install(root: &Path, program: &Path, to: &str) {
    let to = root.join(to.trim_start_matches('/'));
    let mut strip = Command::new("strip");
    strip.arg("-o").arg(&to).arg(program);
    if !strip.status().is_ok_and(|status| status.success()) {
        copy(program, &to);
    }
    fs::set_permissions(&to, fs::Permissions::from_mode(0o755)).unwrap();
    for library in libraries(program) {
        let to = root.join(library.strip_prefix("/").unwrap());
        if !to.exists() {
            copy(&library, &to);
        }
    }
}

/// The libraries of a program, its interpreter among them; a static one has none.
fn libraries(program: &Path) -> Vec<PathBuf> {
    let output = Command::new("ldd").arg(program).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    // `name => /path (address)`, and the interpreter as `/path (address)`.
    let path = |line: &str| {
        let path = line.split_whitespace().find(|word| word.starts_with('/'));
        path.map(PathBuf::from)
    };
    text.lines().filter_map(path).collect()
}

fn follow(mut machine: Child, limit: Duration) -> (i32, Vec<String>) {
    let started = Instant::now();
    let (sender, lines) = mpsc::channel();
    let console = BufReader::new(machine.stdout.take().unwrap());
    std::thread::spawn(move || {
        for line in console.split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    let (mut seen, mut code) = (Vec::new(), None);
    let ended = loop {
        let left = limit.saturating_sub(started.elapsed());
        match lines.recv_timeout(left) {
            Ok(line) => {
                println!("machine| {line}");
                if let Some(status) = line.strip_prefix(ENDED) {
                    code = status.trim().parse().ok();
                }
                seen.push(line);
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => break true,
            Err(mpsc::RecvTimeoutError::Timeout) => break false,
        }
    };
    let _ = machine.kill();
    let _ = machine.wait();
    assert!(ended, "the machine was not done within {limit:?}");
    let code = code.expect("the machine says how its program ended");
    println!("machine: {:.1} s", started.elapsed().as_secs_f64());
    (code, seen)
}
