//! A VMM that is none: it speaks Firecracker's or Cloud Hypervisor's API on a real socket, has real
//! memory that a real engine serves, and touches it, without a processor of its own.
//!
//! It is the test program itself, started again by a script that the daemon takes for the VMM.
//! What is refused by the VMM is refused here: unknown members, calls out of order, a snapshot of
//! what runs.
//!
//! ```text
//!   daemon ── API ────────▶ firecracker.rs ──────▶ guest.rs: memory, a counter that runs ──▶ engine
//!   daemon ── API ────────▶ cloud_hypervisor.rs ─▶ the same                                    ▲
//!   daemon ── migration ──▶ migration.rs                      asking.rs: page requests ────────┘
//!   daemon ── envd ───────▶ inside.rs: what answers at the guest's address
//! ```

pub(crate) mod asking;
pub(crate) mod calls;
pub(crate) mod cloud_hypervisor;
pub(crate) mod each;
pub(crate) mod firecracker;
pub(crate) mod guest;
pub(crate) mod http;
pub(crate) mod inside;
pub(crate) mod migration;
pub(crate) mod subject;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::place::Place;

/// Set for a process that is to be one: its arguments.
pub(crate) const ARGUMENTS: &str = "THAW_TEST_FAKE_VMM";
/// The file that says what is to go wrong.
const FAULTS: &str = "THAW_TEST_FAKE_FAULTS";
/// Set for one that opens the memory's file before it writes a state.
const MEMORY_FIRST: &str = "THAW_TEST_FAKE_MEMORY_FIRST";

/// Set for one that knows no page requests, and doesn't keep a guest that was taken.
const OLD: &str = "THAW_TEST_FAKE_OLD";

/// Set for all of them: the version, as it says.
const VERSION: &str = "THAW_TEST_FAKE_VERSION";

/// Which VMM it plays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Vmm {
    Firecracker,
    CloudHypervisor,
}

impl Vmm {
    /// As configurations call it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Firecracker => "firecracker",
            Self::CloudHypervisor => "cloud-hypervisor",
        }
    }

    /// The list of its programs.
    pub(crate) const fn programs(self) -> &'static str {
        match self {
            Self::Firecracker => "firecracker",
            Self::CloudHypervisor => "cloud_hypervisor",
        }
    }
}

/// One kind of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    pub(crate) vmm: Vmm,
    /// As it says of itself.
    pub(crate) version: &'static str,
    pub(crate) state_format: &'static str,
    /// Whether a device state is had without memory; of Cloud Hypervisor, whether it asks for
    /// pages and keeps guests that are taken.
    pub(crate) able: bool,
}

impl Kind {
    pub(crate) const FIRECRACKER: Self = Self {
        vmm: Vmm::Firecracker,
        version: "1.16.0",
        state_format: "9.0.0",
        able: true,
    };
    pub(crate) const CLOUD_HYPERVISOR: Self = Self {
        vmm: Vmm::CloudHypervisor,
        version: "54.0.0",
        state_format: "1-54.0.0",
        able: true,
    };
    pub(crate) const OLD_CLOUD_HYPERVISOR: Self = Self {
        version: "52.0.0",
        state_format: "1-52.0.0",
        able: false,
        ..Self::CLOUD_HYPERVISOR
    };

    pub(crate) const fn usual(vmm: Vmm) -> Self {
        match vmm {
            Vmm::Firecracker => Self::FIRECRACKER,
            Vmm::CloudHypervisor => Self::CLOUD_HYPERVISOR,
        }
    }
}

/// What the daemon starts as a VMM.
pub(crate) struct Fake {
    /// To be configured.
    pub(crate) program: PathBuf,
    faults: PathBuf,
}

impl Fake {
    /// A script in a place, whose process shows its arguments as a VMM does. `test` is the name of a test of this program that calls [`run`].
    pub(crate) fn new(place: &Place, test: &str, kind: Kind) -> Self {
        let Kind {
            vmm,
            version,
            state_format,
            able,
        } = kind;
        let unable = match vmm {
            _ if able => String::new(),
            Vmm::Firecracker => format!("{MEMORY_FIRST}=1 "),
            Vmm::CloudHypervisor => format!("{OLD}=1 "),
        };
        let name = format!("{}-{version}", vmm.name());
        let (program, faults) = (place.root.join(&name), place.root.join("faults"));
        let itself = std::env::current_exe().unwrap();
        let script = format!(
            "#!/bin/bash\n\
             case \"$1\" in\n\
             --version) echo '{} v{version}'; exit 0;;\n\
             --snapshot-version) echo 'v{state_format}'; exit 0;;\n\
             esac\n\
             {unable}{VERSION}={version} {ARGUMENTS}=\"$*\" {FAULTS}='{}' \
             exec -a \"$0 $*\" '{}' --nocapture --exact {test} \"$2\"\n",
            vmm.name(),
            faults.display(),
            itself.display(),
        );
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        Self { program, faults }
    }

    /// From now on this goes wrong at this call, in every process of this fake.
    pub(crate) fn fail_at(&self, call: &str, how: Fault) {
        self.fail_at_all(&[(call, how)]);
    }

    /// From now on these go wrong.
    pub(crate) fn fail_at_all(&self, faults: &[(&str, Fault)]) {
        let lines = faults
            .iter()
            .map(|(call, how)| format!("{call} {}\n", how.name()));
        fs::write(&self.faults, lines.collect::<String>()).unwrap();
    }

    /// Nothing goes wrong any more.
    pub(crate) fn heal(&self) {
        let _ = fs::remove_file(&self.faults);
        let _ = fs::remove_file(hanging(&self.faults));
    }

    /// Whether a fake hangs at this call now.
    #[allow(dead_code, reason = "not every test binary looks")]
    pub(crate) fn hangs_at(&self, call: &str) -> bool {
        let text = fs::read_to_string(hanging(&self.faults)).unwrap_or_default();
        text.lines().any(|line| line == call)
    }
}

/// Where calls are written down that hang.
fn hanging(faults: &Path) -> PathBuf {
    faults.with_extension("hanging")
}

/// What goes wrong at a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It answers with an error, and does nothing.
    Fail,
    /// It does nothing and never answers.
    Hang,
    /// It answers half, after it has done what was asked.
    Truncate,
    /// It dies.
    Die,
}

impl Fault {
    pub(crate) const ALL: [Self; 4] = [Self::Fail, Self::Hang, Self::Truncate, Self::Die];

    const fn name(self) -> &'static str {
        match self {
            Self::Fail => "fail",
            Self::Hang => "hang",
            Self::Truncate => "truncate",
            Self::Die => "die",
        }
    }

    /// What is to go wrong at this call now.
    fn at(call: &str) -> Option<Self> {
        let file = PathBuf::from(std::env::var_os(FAULTS)?);
        let text = fs::read_to_string(&file).ok()?;
        let mut faults = text.lines().filter_map(|line| line.rsplit_once(' '));
        let (_, how) = faults.find(|(at, _)| *at == call)?;
        let found = Self::ALL.into_iter().find(|fault| fault.name() == how);
        if found == Some(Self::Hang) {
            fs::write(hanging(&file), call).ok()?;
        }
        found
    }
}

fn memory_comes_first() -> bool {
    std::env::var_os(MEMORY_FIRST).is_some()
}

/// Whether this version knows what came with 1.14 of Firecracker.
fn knows_reporting() -> bool {
    let version = std::env::var(VERSION).unwrap_or_default();
    !version.starts_with("1.13.")
}

fn is_old() -> bool {
    std::env::var_os(OLD).is_some()
}

/// Whether this process is to be a fake; it never returns then.
pub(crate) fn run_if_wanted() {
    let Ok(arguments) = std::env::var(ARGUMENTS) else {
        return;
    };
    let words: Vec<&str> = arguments.split(' ').collect();
    let after = |name: &str| {
        let pair = words.windows(2).find(|pair| pair[0] == name);
        pair.map(|pair| pair[1])
    };
    if let Some(socket) = after("--api-sock") {
        firecracker::serve(Path::new(socket));
    }
    let socket = after("--api-socket").and_then(|word| word.strip_prefix("path="));
    let socket = socket.unwrap_or_else(|| panic!("no API's socket in {arguments:?}"));
    let events = after("--event-monitor").and_then(|word| word.strip_prefix("fd="));
    let events = events.unwrap_or_else(|| panic!("no event monitor in {arguments:?}"));
    assert_eq!(after("--seccomp"), Some("true"), "{arguments:?}");
    cloud_hypervisor::serve(Path::new(socket), events);
}
