//! Control groups of VMMs: on this host with the controllers that it has, and in an emulated machine,
//! whose kernel has all of them, to the point where a process is ended for want of memory.

mod support;

use std::env;
use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use appliance::config::VmmConfig;
use appliance::sys::spawn;
use appliance::vmm::GuestShape;
use appliance::vmm::cgroup::{Cgroup, Cgroups, Limits, end_left_over};
use appliance::vmm::exit::Exit;
use appliance::vmm::launch::{self, Launch};
use appliance::vmm::process::{Started, VmmProcess, ended};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use support::{machine, skip};
use uffd_engine::sys::process::{pidfd_open, pidfd_signal};

/// How long the machine may take for everything.
const MACHINE_LIMIT: Duration = Duration::from_secs(240);
/// Set in the machine.
const INSIDE: &str = "THAW_TEST_INSIDE";
const IN_MACHINE: &str = "guest_processes_are_confined_in_an_emulated_machine";

/// VMMs are launched by the program that runs, under this word: here that is this test, which becomes
/// what it is told, if it is told something.
#[test]
fn launch_without_orders_fails() {
    assert_eq!(launch::run(), 1);
    if env::args().skip(1).eq(["launch".to_owned()]) {
        std::process::exit(1);
    }
}

fn launch(program: &str, args: &[&str], cgroup: &Cgroup) -> Launch {
    Launch {
        program: program.into(),
        args: args.iter().map(|arg| (*arg).to_owned()).collect(),
        env: Default::default(),
        namespace: None,
        mounts: Vec::new(),
        tap_owner: None,
        cgroup: Some(cgroup.clone()),
        user: None,
    }
}

fn limits(memory_mb: u32) -> Limits {
    let config = VmmConfig {
        memory_overhead_mb: Some(0),
        cpu_max_percent: Some(50),
        pids_max: 16,
        ..VmmConfig::default()
    };
    let shape = GuestShape {
        vcpus: 2,
        memory_mb,
        huge_pages: false,
        kernel: PathBuf::new(),
        initrd: PathBuf::new(),
        cmdline: String::new(),
    };
    Limits::of(&config, &shape, 128)
}

fn on_a_runtime<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(work)
}

/// Its end, which has to come.
async fn exit(process: &mut VmmProcess) -> Exit {
    let limit = Duration::from_secs(60);
    let waited = tokio::time::timeout(limit, process.ended()).await;
    waited.unwrap_or_else(|_| panic!("it runs still; {}", process.console().tail()));
    process.console().ended(Duration::from_secs(1)).await;
    process.exit().expect("it has ended")
}

/// A child that was not told of its group, and is there.
fn children_are_born_in_groups(cgroups: &Cgroups) {
    let group = cgroups.make("born").unwrap();
    let (input, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let (mut output, writer) = std::io::pipe().unwrap();
    let stdio = [theirs.as_fd(), writer.as_fd(), writer.as_fd()];
    // It waits for orders.
    let (pid, pidfd) = spawn::itself_into(group.dir(), c"launch", stdio).unwrap();
    drop((theirs, writer));
    let members = fs::read_to_string(group.dir().join("cgroup.procs")).unwrap();
    assert_eq!(members.trim(), pid.to_string());
    drop(input);
    std::io::copy(&mut output, &mut std::io::sink()).unwrap();
    let status = waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED).unwrap();
    assert!(
        matches!(status, WaitStatus::Exited(_, 1 | 101)),
        "{status:?}"
    );
    let stdin = std::io::stdin();
    let nowhere = spawn::itself_into(Path::new("/nowhere"), c"launch", [stdin.as_fd(); 3]);
    assert_eq!(nowhere.unwrap_err().raw_os_error(), Some(libc::ENOENT));
    // What is no group is refused by the kernel, and nobody is left.
    let wrong = spawn::itself_into(Path::new("/tmp"), c"launch", [stdin.as_fd(); 3]);
    assert_eq!(wrong.unwrap_err().raw_os_error(), Some(libc::EBADF));
    group.remove();
}

/// A process is born in its group, which goes with it.
fn groups_hold_processes(cgroups: &Cgroups, busybox: &str, applet: &[&str]) {
    children_are_born_in_groups(cgroups);
    on_a_runtime(async {
        let group = cgroups.make("one").unwrap();
        group.limit(&limits(64)).unwrap();
        let process = Started::start(&launch(busybox, applet, &group), &[])
            .await
            .unwrap();
        let members = fs::read_to_string(group.dir().join("cgroup.procs")).unwrap();
        let process = process.watch().unwrap();
        assert_eq!(members.trim(), process.pid().to_string());
        assert_eq!(cgroups.names(), ["one"]);
        drop(process);
        assert!(!group.dir().exists());

        // Whoever dies without letting go leaves it to the next one.
        let group = cgroups.make("two").unwrap();
        let process = VmmProcess::start(&launch(busybox, applet, &group), &[])
            .await
            .unwrap();
        let pidfd = pidfd_open(process.pid()).unwrap();
        let pid = process.pid();
        assert_eq!(cgroups.of(pid).as_ref(), Some(&group));
        assert_eq!(end_left_over(cgroups, &[pid]).unwrap(), 0, "it is kept");
        std::mem::forget(process);
        let reaping = async { ended(pidfd.as_fd()).await };
        let left = tokio::task::spawn_blocking({
            let cgroups = cgroups.clone();
            move || end_left_over(&cgroups, &[])
        });
        let (left, ()) = tokio::join!(left, reaping);
        assert_eq!(left.unwrap().unwrap(), 1);
        assert!(!group.dir().exists());
        assert_eq!(end_left_over(cgroups, &[]).unwrap(), 0);

        // A group of that name is empty again.
        fs::create_dir(group.dir()).unwrap();
        cgroups.make("two").unwrap();
        cgroups.end("two").unwrap();
        cgroups.end("two").unwrap();
        cgroups.close();
        assert!(!group.dir().parent().unwrap().exists());
    });
}

#[test]
fn processes_are_born_in_groups_with_the_controllers_that_there_are() {
    const NAME: &str = "processes_are_born_in_groups_with_the_controllers_that_there_are";
    if !nix::unistd::geteuid().is_root() {
        return skip(NAME, "not root");
    }
    match Cgroups::open("tgroup") {
        Ok(cgroups) => groups_hold_processes(&cgroups, "/bin/sleep", &["600"]),
        Err(error) => skip(NAME, &format!("no control groups: {error}")),
    }
}

/// The end of a process that takes more than it may, and those of others.
fn ends_are_told_apart(cgroups: &Cgroups) {
    let run = |args: &'static [&'static str], memory_mb| {
        let group = cgroups.make("hog").unwrap();
        group.limit(&limits(memory_mb)).unwrap();
        let read = |file: &str| fs::read_to_string(group.dir().join(file)).unwrap();
        assert_eq!(read("cpu.max").trim(), "100000 100000");
        assert_eq!(read("cpu.weight").trim(), "200");
        assert_eq!(read("pids.max").trim(), "18");
        let bytes = u64::from(memory_mb) << 20;
        assert_eq!(read("memory.max").trim(), (bytes + bytes / 64).to_string());
        assert_eq!(read("memory.high").trim(), "max");
        group.change_memory(4096).unwrap();
        group.change_memory(-4096).unwrap();
        assert_eq!(read("memory.max").trim(), (bytes + bytes / 64).to_string());
        on_a_runtime(async {
            let launch = launch("/bin/busybox", args, &group);
            let mut process = VmmProcess::start(&launch, &[]).await.unwrap();
            let end = exit(&mut process).await;
            (end, process.console().text())
        })
    };
    let hog = &["dd", "if=/dev/zero", "of=/dev/null", "bs=256M", "count=1"];
    assert_eq!(run(hog, 64).0, Exit::OutOfMemory);
    // With room, the same one ends by itself.
    assert_eq!(run(hog, 400).0, Exit::Reset);
    assert_eq!(run(&["sh", "-c", "kill -9 $$"], 64).0, Exit::Killed);
    assert_eq!(run(&["sh", "-c", "kill -SYS $$"], 64).0, Exit::Seccomp);
    assert_eq!(run(&["sh", "-c", "exit 3"], 64).0, Exit::Status(3));
    let many = "i=0; while [ $i -lt 40 ]; do /bin/busybox sleep 5 & i=$((i+1)); done; echo all";
    let (_, said) = run(Box::leak(Box::new(["sh", "-c", many])), 64);
    assert!(said.contains("can't fork"), "{said}");

    // A process that is ended in another's group says nothing of this one.
    let (one, other) = (cgroups.make("one").unwrap(), cgroups.make("other").unwrap());
    other.limit(&limits(64)).unwrap();
    on_a_runtime(async {
        let sleep = launch("/bin/busybox", &["sleep", "600"], &one);
        let mut first = VmmProcess::start(&sleep, &[]).await.unwrap();
        let mut second = VmmProcess::start(&launch("/bin/busybox", hog, &other), &[])
            .await
            .unwrap();
        assert_eq!(exit(&mut second).await, Exit::OutOfMemory);
        let pidfd = pidfd_open(first.pid()).unwrap();
        pidfd_signal(pidfd.as_fd(), libc::SIGKILL).unwrap();
        assert_eq!(exit(&mut first).await, Exit::Killed);
    });
}

#[test]
fn guest_processes_are_confined_in_an_emulated_machine() {
    if env::var_os(INSIDE).is_some() {
        let cgroups = Cgroups::open("tgroup").unwrap();
        ends_are_told_apart(&cgroups);
        groups_hold_processes(&cgroups, "/bin/busybox", &["sleep", "600"]);
        println!("confined");
        return;
    }
    let inputs = env::var_os("THAW_INPUTS").map(PathBuf::from);
    if let Some(reason) = machine::missing(inputs.as_deref()) {
        return skip(IN_MACHINE, &reason);
    }
    let began = Instant::now();
    let arguments = ["--exact", IN_MACHINE, "--nocapture"];
    let inputs = inputs.expect("it is not missing");
    let machine = machine::Machine::new(&inputs).set(INSIDE, "1");
    let (code, lines) = machine.run_self(&arguments, MACHINE_LIMIT);
    assert_eq!(code, 0, "after {:?}", began.elapsed());
    assert!(lines.iter().any(|line| line.contains("confined")));
}
