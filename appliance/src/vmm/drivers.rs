//! The VMMs of this host: the one that new guests get, and others that old builds need.

use std::sync::Arc;

use http_api::wire::CpuInfo;

use super::Driver;
use super::compatibility::{self, Fit, Incompatible, MadeBy};

/// All of them; there is at least one.
#[derive(Clone)]
pub struct Drivers {
    chosen: Arc<dyn Driver>,
    others: Vec<Arc<dyn Driver>>,
    cpu: CpuInfo,
    kernel: String,
}

impl Drivers {
    /// `chosen` for new guests, `others` for builds that they made, on this processor and kernel.
    #[must_use]
    pub fn new(
        chosen: Arc<dyn Driver>,
        others: Vec<Arc<dyn Driver>>,
        cpu: CpuInfo,
        kernel: String,
    ) -> Self {
        Self {
            chosen,
            others,
            cpu,
            kernel,
        }
    }

    /// The one for new guests.
    #[must_use]
    pub fn chosen(&self) -> &Arc<dyn Driver> {
        &self.chosen
    }

    /// The one that a build is resumed with: that which made it, else one that can read it.
    ///
    /// # Errors
    /// What this host has not that the build needs.
    pub fn for_build(&self, made_by: &MadeBy) -> Result<&Arc<dyn Driver>, Incompatible> {
        let fit = |driver: &&Arc<dyn Driver>| {
            compatibility::fit(made_by, driver.info(), driver.state_format())
        };
        // The last of the best wins: the chosen one among equals.
        let best = self.others.iter().chain([&self.chosen]).max_by_key(fit);
        let found = best.filter(|driver| fit(driver) != Fit::None);
        let driver = found.ok_or_else(|| Incompatible::Vmm {
            made_by: compatibility::named_in(made_by),
            here: self.named(),
        })?;
        compatibility::check_cpu(made_by, &self.cpu)?;
        Ok(driver)
    }

    /// The one of this kind and version.
    #[must_use]
    pub fn named_like(&self, name: &str, version: &str) -> Option<&Arc<dyn Driver>> {
        let mut all = [&self.chosen].into_iter().chain(&self.others);
        all.find(|driver| (&*driver.info().name, &*driver.info().version) == (name, version))
    }

    /// What a build is to say that is made with one of them.
    #[must_use]
    pub fn made_by(&self, driver: &dyn Driver) -> MadeBy {
        let (info, format) = (driver.info(), driver.state_format());
        compatibility::made_by(info, format, &self.cpu, &self.kernel)
    }

    /// All of them, for people.
    #[must_use]
    pub fn named(&self) -> String {
        let named = |driver: &Arc<dyn Driver>| {
            let info = driver.info();
            let format = driver.state_format();
            compatibility::named(&info.name, &info.version, &info.accelerator, format)
        };
        let all = [&self.chosen].into_iter().chain(&self.others);
        all.map(named).collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::path::PathBuf;

    use async_trait::async_trait;
    use http_api::wire::VmmInfo;
    use uffd_engine::Tracking;

    use super::*;
    use crate::vmm::process::Survivor;
    use crate::vmm::{GuestShape, Machine, Place, Restore, VmmError};

    struct Named(VmmInfo, &'static str);

    #[async_trait]
    impl Driver for Named {
        fn info(&self) -> &VmmInfo {
            &self.0
        }
        fn state_format(&self) -> &str {
            self.1
        }
        fn tracking(&self) -> Tracking {
            Tracking::Off
        }
        fn handoff(&self, place: &Place) -> io::Result<PathBuf> {
            Ok(place.run_dir.clone())
        }
        async fn boot(&self, _: &GuestShape, _: &Place) -> Result<Box<dyn Machine>, VmmError> {
            Err(self.refusal())
        }
        async fn restore(
            &self,
            _: &GuestShape,
            _: &Place,
            _: Restore<'_>,
        ) -> Result<Box<dyn Machine>, VmmError> {
            Err(self.refusal())
        }
        async fn adopt(
            &self,
            _: &GuestShape,
            _: &Place,
            _: Survivor,
        ) -> Result<Box<dyn Machine>, VmmError> {
            Err(self.refusal())
        }
    }

    impl Named {
        fn refusal(&self) -> VmmError {
            VmmError::Ended {
                name: self.0.name.clone(),
                console: String::new(),
            }
        }
    }

    fn driver(version: &str, format: &'static str) -> Arc<dyn Driver> {
        let info = VmmInfo {
            name: "firecracker".into(),
            version: version.into(),
            accelerator: "kvm".into(),
            reason: String::new(),
        };
        Arc::new(Named(info, format))
    }

    fn drivers() -> Drivers {
        let others = vec![driver("1.13.1", "8.0.0"), driver("1.16.0", "9.0.0")];
        let kernel = "6.12".to_owned();
        Drivers::new(
            driver("1.16.1", "9.0.0"),
            others,
            CpuInfo::default(),
            kernel,
        )
    }

    fn resumed_with(version: &str, format: &'static str) -> Result<String, Incompatible> {
        let all = drivers();
        let made_by = all.made_by(driver(version, format).as_ref());
        let found = all.for_build(&made_by)?;
        Ok(found.info().version.clone())
    }

    #[test]
    fn a_build_is_resumed_with_the_version_that_made_it() {
        assert_eq!(resumed_with("1.13.1", "8.0.0").unwrap(), "1.13.1");
        assert_eq!(resumed_with("1.16.0", "9.0.0").unwrap(), "1.16.0");
        assert_eq!(resumed_with("1.16.1", "9.0.0").unwrap(), "1.16.1");
    }

    #[test]
    fn without_that_version_the_chosen_one_reads_it_if_it_can() {
        assert_eq!(resumed_with("1.16.9", "9.0.0").unwrap(), "1.16.1");
    }

    #[test]
    fn a_build_that_nobody_reads_is_refused_with_the_difference() {
        let refused = resumed_with("1.18.0", "11.0.0").unwrap_err().to_string();
        assert!(refused.contains("firecracker 1.18.0 on kvm (state format 11.0.0)"));
        assert!(refused.contains("firecracker 1.13.1 on kvm (state format 8.0.0)"));
    }
}
