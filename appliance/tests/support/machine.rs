//! An emulated machine that plays a host: Debian's kernel with device-mapper and loop devices, and
//! one program of ours in it.
//!
//! The guests' kernel and initial RAM disk boot a root that is made on the spot: busybox, the
//! modules, the program and the libraries that this process has loaded.

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

/// Runs this process's own program in a machine, with other arguments, and shows what it prints.
/// Gives its exit status and its lines.
///
/// # Panics
/// The machine can't be made, or is not done within `limit`.
pub(crate) fn run_self(
    inputs: &Path,
    arguments: &[&str],
    environment: &[(&str, &str)],
    limit: Duration,
) -> (i32, Vec<String>) {
    let work = tempfile::tempdir().unwrap();
    let root = work.path().join("root");
    populate(&root, inputs, arguments, environment);
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
    let machine = boot(inputs, &disk);
    follow(machine, limit)
}

fn populate(root: &Path, inputs: &Path, arguments: &[&str], environment: &[(&str, &str)]) {
    for name in [
        "bin", "data", "dev", "modules", "proc", "run", "sbin", "sys", "tmp",
    ] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    fs::copy(inputs.join("tools/busybox"), root.join("bin/busybox")).unwrap();
    let modules = inputs.join("kernel/host-modules");
    for entry in fs::read_dir(&modules).unwrap().flatten() {
        fs::copy(entry.path(), root.join("modules").join(entry.file_name())).unwrap();
    }
    for library in libraries() {
        let to = root.join(library.strip_prefix("/").unwrap());
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(&library, &to).unwrap();
    }
    // The interpreter's name is in every program; where it is, differs.
    let interpreter = root.join("lib64/ld-linux-x86-64.so.2");
    if !interpreter.exists() {
        fs::create_dir_all(interpreter.parent().unwrap()).unwrap();
        fs::copy("/lib64/ld-linux-x86-64.so.2", &interpreter).unwrap();
    }
    let (program, to) = (std::env::current_exe().unwrap(), root.join("program"));
    let stripped = Command::new("strip")
        .arg("-o")
        .args([&to, &program])
        .status();
    if !stripped.is_ok_and(|status| status.success()) {
        fs::copy(&program, &to).unwrap();
    }
    let init = root.join("sbin/init");
    fs::write(&init, script(arguments, environment)).unwrap();
    for program in [init, to, root.join("bin/busybox")] {
        fs::set_permissions(program, fs::Permissions::from_mode(0o755)).unwrap();
    }
}

fn script(arguments: &[&str], environment: &[(&str, &str)]) -> String {
    let exports = environment
        .iter()
        .map(|(name, value)| format!("export {name}='{value}'\n"));
    let words = arguments.iter().map(|word| format!(" '{word}'"));
    format!(
        "#!/bin/busybox sh\n\
         for dir in /run /tmp; do /bin/busybox mount -t tmpfs tmpfs $dir; done\n\
         while read -r module; do /bin/busybox insmod /modules/$module; done < /modules/order\n\
         {}/program{} < /dev/null\n\
         echo \"{ENDED}$?\"\n\
         /bin/busybox poweroff -f\n",
        exports.collect::<String>(),
        words.collect::<String>(),
    )
}

/// The libraries of this process.
fn libraries() -> Vec<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let mut found: Vec<PathBuf> = maps
        .lines()
        .filter_map(|line| line.find('/').map(|at| PathBuf::from(&line[at..])))
        .filter(|path| path.to_string_lossy().contains(".so"))
        .collect();
    found.sort();
    found.dedup();
    found
}

fn boot(inputs: &Path, disk: &Path) -> Child {
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
            &MEMORY_MB.to_string(),
            "-nodefaults",
            "-no-user-config",
        ])
        .args(["-display", "none", "-no-reboot", "-serial", "stdio"])
        .arg("-kernel")
        .arg(inputs.join("vmlinuz"))
        .arg("-initrd")
        .arg(inputs.join("initrd.img"))
        .args(["-append", "console=ttyS0 panic=-1 quiet mitigations=off"])
        .args(["-drive", &drive, "-device", "virtio-blk-pci,drive=d0"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
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
