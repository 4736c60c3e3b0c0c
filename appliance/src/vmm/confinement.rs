//! What VMMs of this daemon are confined to: a control group each, where the host has them, and what
//! the configuration lets a sandbox take.

use std::io;

use super::cgroup::{self, Cgroup, Cgroups, Limits};
use super::{Driver, GuestShape};
use crate::config::VmmConfig;

/// The groups and the limits of this host.
#[derive(Clone, Debug)]
pub struct Confinement {
    groups: Option<Cgroups>,
    config: VmmConfig,
}

impl Confinement {
    /// As configured, if the host can; why it can't is logged.
    #[must_use]
    pub fn open(config: &VmmConfig, instance: &str) -> Self {
        let groups = config.cgroups.then(|| Cgroups::open(instance));
        let groups = groups.transpose().unwrap_or_else(|error| {
            tracing::warn!(%error, "VMMs get no control groups");
            None
        });
        Self {
            groups,
            config: config.clone(),
        }
    }

    /// The groups, if there are any.
    #[must_use]
    pub fn groups(&self) -> Option<&Cgroups> {
        self.groups.as_ref()
    }

    /// Ends what an earlier daemon left in its groups, but for these processes and their groups; says
    /// how many of these there were.
    ///
    /// # Errors
    /// The kernel refuses, or a process doesn't end.
    pub fn end_left_over(&self, kept: &[i32]) -> io::Result<usize> {
        let groups = self.groups.as_ref();
        groups.map_or(Ok(0), |groups| cgroup::end_left_over(groups, kept))
    }

    /// The group of a sandbox's VMM, limits set: the one that it waits in already, or a new one.
    ///
    /// # Errors
    /// It can't be made, or a limit not be set.
    pub fn confine(
        &self,
        sandbox: &str,
        waiting: Option<Cgroup>,
        shape: &GuestShape,
        driver: &dyn Driver,
    ) -> io::Result<Option<Cgroup>> {
        let group = match (waiting, &self.groups) {
            (Some(group), _) => group,
            (None, Some(groups)) => groups.make(sandbox)?,
            (None, None) => return Ok(None),
        };
        group.limit(&Limits::of(&self.config, shape, driver.overhead_mb()))?;
        Ok(Some(group))
    }

    /// Removes a sandbox's group, should its VMM never have been there.
    pub fn release(&self, sandbox: &str) {
        if let Some(groups) = &self.groups {
            groups.remove(sandbox);
        }
    }

    /// Removes all of it, when no VMM is left.
    pub fn close(&self) {
        if let Some(groups) = &self.groups {
            groups.close();
        }
    }
}
