//! Names, directories and the configuration file of one test's daemons; and their end.

use std::fs;
use std::path::{Path, PathBuf};

use appliance::vmm::cgroup::{Cgroups, end_left_over};
use uffd_engine::sys::state_map::holds_files;

use super::needs::{self, GuestInputs, TestedVmm};
use super::{guest_mb, procs, slower};

/// One test's own corner of the host.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) instance: String,
    /// Configuration, log and data.
    pub(crate) root: PathBuf,
    pub(crate) data: PathBuf,
    /// Short, because of its sockets.
    pub(crate) run: PathBuf,
    pub(crate) config: PathBuf,
    pub(crate) log: PathBuf,
    mounted: bool,
}

impl Place {
    /// A place under a name of one to eight lowercase letters that no other test uses, with
    /// the addresses `10.<215 + pool / 256>.<pool % 256>.0/24`.
    pub(crate) fn new(instance: &str, pool: u16, inputs: Option<&GuestInputs>) -> Self {
        let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join(instance);
        let mut place = Self {
            instance: instance.to_owned(),
            data: root.join("data"),
            run: in_run(instance),
            config: root.join("thaw.toml"),
            log: root.join("daemon.log"),
            root,
            mounted: false,
        };
        // What a killed run of the same test has left.
        place.clear();
        fs::create_dir_all(&place.data).unwrap();
        place.run_in_memory();
        fs::write(&place.config, place.configuration(pool, inputs)).unwrap();
        place
    }

    /// As [`Place::new`], with a template `base` of this kernel. What is in `vmm` goes on in the
    /// section of that name; whole sections may follow in it.
    pub(crate) fn with_template(
        instance: &str,
        pool: u16,
        vmm: &str,
        kernel: &[u8],
        memory_mb: u64,
    ) -> Self {
        let place = Self::new(instance, pool, None);
        let file = |name: &str, bytes: &[u8]| {
            let path = place.root.join(name);
            fs::write(&path, bytes).unwrap();
            quoted(&path)
        };
        let (kernel, initrd) = (file("kernel", kernel), file("initrd", b"none"));
        let disk = file("disk", &vec![0; 1 << 20]);
        let mut text = fs::read_to_string(&place.config).unwrap();
        text += &format!(
            "{vmm}[engine]\ncheck_writes = true\n\
             [[template]]\nname = \"base\"\nkernel = {kernel}\ninitrd = {initrd}\ndisk = {disk}\n\
             memory_mb = {memory_mb}\n",
        );
        fs::write(&place.config, text).unwrap();
        place
    }

    /// Where it is allowed: guests outlive daemon and engines there, and `/run` is in memory on real
    /// hosts. The directory is called like the instance in its own file system, too, as it is on those.
    fn run_in_memory(&mut self) {
        if holds_files(Path::new("/run")).unwrap_or(true) {
            return;
        }
        let memory = in_run(&self.instance);
        fs::create_dir_all(&memory).unwrap();
        let (kind, flags) = (Some("tmpfs"), nix::mount::MsFlags::empty());
        match nix::mount::mount(kind, &memory, kind, flags, Some("mode=755")) {
            Ok(()) => self.run = memory.join(&self.instance),
            Err(error) => println!("{} is on disk: {error}", memory.display()),
        }
    }

    /// As [`Place::new`], with the data directory on a file system of this size.
    pub(crate) fn with_small_disk(
        instance: &str,
        pool: u16,
        inputs: &GuestInputs,
        bytes: u64,
    ) -> Result<Self, String> {
        let mut place = Self::new(instance, pool, Some(inputs));
        let options = format!("size={bytes}");
        let source = mount_source(instance);
        nix::mount::mount(
            Some(source.as_str()),
            &place.data,
            Some("tmpfs"),
            nix::mount::MsFlags::empty(),
            Some(options.as_str()),
        )
        .map_err(|error| format!("a tmpfs can't be mounted: {error}"))?;
        place.mounted = true;
        Ok(place)
    }

    fn configuration(&self, pool: u16, inputs: Option<&GuestInputs>) -> String {
        let vmm = match needs::vmm() {
            TestedVmm::Qemu(accelerator) => format!("accelerator = \"{accelerator}\"\n"),
            TestedVmm::Other(driver, program) => {
                let programs = driver.replace('-', "_");
                format!(
                    "driver = \"{driver}\"\n{programs} = [{}]\n",
                    quoted(&program)
                )
            }
        };
        let patience = match slower() {
            1 => String::new(),
            times => format!(
                "command_timeout_s = {0}\nboot_timeout_s = {0}\n",
                60 * times
            ),
        };
        let mut text = format!(
            "instance = \"{}\"\ndata_dir = {}\nrun_dir = {}\nshards = 2\n\
             [traffic]\nlisten=[]\n[api]\nlisten = []\n\
             [network]\npool = \"10.{}.{}.0/24\"\nready_slots = 0\n\
             [vmm]\n{vmm}{patience}",
            self.instance,
            quoted(&self.data),
            quoted(&self.run),
            215 + pool / 256,
            pool % 256,
        );
        match inputs {
            None => {
                if let Ok(preload) = needs::for_daemons() {
                    text += &format!("preload = {}\n", quoted(&preload));
                }
            }
            Some(inputs) => {
                text += &format!("preload = {}\n", quoted(&inputs.preload));
                text += "[engine]\ncheck_writes = true\npin_vcpus = true\n";
                text += &format!(
                    "[[template]]\nname = \"base\"\nkernel = {}\ninitrd = {}\ndisk = {}\n\
                     memory_mb = {}\n",
                    quoted(&inputs.dir.join("vmlinuz")),
                    quoted(&inputs.dir.join("initrd.img")),
                    quoted(&inputs.dir.join("base.ext4")),
                    guest_mb(),
                );
            }
        }
        text
    }

    /// Changes the configuration file: each pair is a text that has to be in it and what takes
    /// its place.
    pub(crate) fn reconfigure(&self, changes: &[(&str, &str)]) {
        let mut text = fs::read_to_string(&self.config).unwrap();
        for (old, new) in changes {
            assert!(text.contains(old), "no {old:?} in:\n{text}");
            text = text.replace(old, new);
        }
        fs::write(&self.config, text).unwrap();
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.run.join("api.sock")
    }

    pub(crate) fn build(&self, id: &str) -> PathBuf {
        self.data.join("builds").join(id)
    }

    /// The last lines of the daemons' log.
    pub(crate) fn log_tail(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    /// What is left of sandboxes that have no VMM: nothing of these may be there.
    pub(crate) fn sandbox_leftovers(&self) -> Vec<String> {
        let mut found: Vec<String> = procs::of(self)
            .into_iter()
            .filter(procs::Process::is_vmm)
            .map(|process| format!("process {process:?}"))
            .collect();
        for (what, dir) in [("namespace", "/run/netns"), ("link", "/sys/class/net")] {
            let ours = names(Path::new(dir))
                .into_iter()
                .filter(|name| name.starts_with(&self.instance));
            found.extend(ours.map(|name| format!("{what} {name}")));
        }
        for dir in [self.run.join("sandboxes"), self.data.join("sandboxes")] {
            let left = names(&dir).into_iter();
            found.extend(left.map(|name| format!("directory {}", dir.join(name).display())));
        }
        let loops = appliance::sys::loop_device::below(&self.data).unwrap_or_default();
        found.extend(loops.iter().map(|device| format!("loop device {device:?}")));
        let unfinished = names(&self.data.join("builds")).into_iter();
        let unfinished = unfinished.filter(|name| name.starts_with('.'));
        found.extend(unfinished.map(|name| format!("unfinished build {name}")));
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let of_sandboxes = [
            format!("/netns/{}-", self.instance),
            self.data.join("sandboxes").display().to_string(),
        ];
        let ours = mounts
            .lines()
            .filter(|line| of_sandboxes.iter().any(|part| line.contains(part)));
        found.extend(ours.map(|line| format!("mount {line}")));
        found
    }

    /// What is left when every sandbox and template is deleted.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let mut found = self.sandbox_leftovers();
        let builds = names(&self.data.join("builds")).into_iter();
        found.extend(builds.map(|name| format!("build {name}")));
        found
    }

    /// What is left when the daemon has stopped, too.
    pub(crate) fn leftovers_of_the_daemon(&self) -> Vec<String> {
        let mut found: Vec<String> = procs::of(self)
            .iter()
            .map(|process| format!("process {process:?}"))
            .collect();
        let sockets = names(&self.run).into_iter();
        let sockets = sockets.filter(|name| name != "sandboxes");
        found.extend(sockets.map(|name| format!("in the run directory: {name}")));
        found
    }

    /// Ends all processes and removes everything on the host that has our name.
    fn clear(&self) {
        // Twice: a daemon may have started something while we looked.
        for _ in 0..2 {
            for process in procs::of(self) {
                process.kill();
            }
        }
        if let Ok(groups) = Cgroups::open(&self.instance) {
            let _ = end_left_over(&groups, &[]);
            groups.close();
        }
        for name in names(Path::new("/run/netns")) {
            if name.starts_with(&format!("{}-", self.instance)) {
                let path = Path::new("/run/netns").join(name);
                let _ = nix::mount::umount2(&path, nix::mount::MntFlags::MNT_DETACH);
                let _ = fs::remove_file(path);
            }
        }
        let run = in_run(&self.instance);
        for mounted in [&self.data, &run] {
            let _ = nix::mount::umount2(mounted, nix::mount::MntFlags::MNT_DETACH);
        }
        for dir in [&self.run, &run] {
            let _ = fs::remove_dir_all(dir);
        }
        let _ = fs::remove_dir_all(&self.root);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the daemons' log ends with:\n{}", self.log_tail());
        }
        self.clear();
    }
}

fn in_run(instance: &str) -> PathBuf {
    Path::new("/run").join(instance)
}

/// A path as configuration files have it.
pub(crate) fn quoted(path: &Path) -> String {
    toml::Value::String(path.display().to_string()).to_string()
}

/// What the file system of a place's data is called among the mounts; no other place's is.
pub(crate) fn mount_source(instance: &str) -> String {
    format!("thaw-test-{instance}")
}

/// The names in a directory, in order; none if it isn't there.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}
