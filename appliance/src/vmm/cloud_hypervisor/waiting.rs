//! A Cloud Hypervisor that has no guest yet: started, its API open.

use std::io::{self, PipeReader};
use std::os::fd::{AsFd, BorrowedFd};

use super::CloudHypervisor;
use super::command::{Boot, Layout as Paths, Where};
use crate::vmm::VmmError;
use crate::vmm::opening::{self, Open};
use crate::vmm::own_user::{give, make_dir};
use crate::vmm::process::with_a_reader;

/// What a machine is started with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Start<'a> {
    pub(super) name: &'a str,
    pub(super) paths: &'a Paths,
    /// Where it is; a probe is nowhere.
    pub(super) place: Option<Where<'a>>,
    /// What it is to boot, if anything.
    pub(super) boot: Option<Boot<'a>>,
}

/// A process whose API is open, and what it says of itself meanwhile.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) open: Open,
    pub(super) monitor: PipeReader,
    /// Who it is, if not the daemon's user.
    pub(super) user: Option<u32>,
}

impl Waiting {
    /// Starts the process and waits for its API.
    pub(super) async fn start(
        driver: &CloudHypervisor,
        start: Start<'_>,
    ) -> Result<Self, VmmError> {
        let Start {
            name,
            paths,
            place,
            boot,
        } = start;
        let failed = |source| VmmError::Start {
            name: name.to_owned(),
            source,
        };
        let user = driver.user(place.map_or(0, |place| place.slot));
        make_dir(&paths.dir, user).map_err(failed)?;
        if let (Some(user), Some(disk)) = (user, place.and_then(|place| place.disk)) {
            give(disk, user).map_err(failed)?;
        }
        let launch = paths.launch(&driver.program, place, boot, user);
        let (monitor, events) = io::pipe().map_err(failed)?;
        let events = with_a_reader(&events).map_err(failed)?;
        let fds = [events.as_fd()];
        let open = opening::open(name, (&launch, &fds), &paths.api(), driver.patience).await?;
        Ok(Self {
            open,
            monitor,
            user,
        })
    }

    pub(super) fn process(&self) -> BorrowedFd<'_> {
        self.open.process.as_fd()
    }
}
