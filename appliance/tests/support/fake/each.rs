//! One body per behaviour, and a test of it for each VMM that has a fake.

#![allow(
    unused_macros,
    unused_imports,
    reason = "not every test binary has fakes"
)]

/// Skips a test by name where no fake can run.
macro_rules! needs_fakes {
    ($test:expr) => {
        if let Err(reason) = crate::support::needs::for_fakes() {
            return crate::support::skip($test, &reason);
        }
    };
}

/// Makes a test of a body for each VMM. The name is the instance's without its first letters, the
/// number its pool's.
macro_rules! over_each {
    ($($body:ident($instance:literal, $pool:literal);)*) => {
        mod firecracker {
            $(#[test]
            fn $body() {
                $crate::support::fake::each::needs_fakes!(
                    concat!("firecracker::", stringify!($body))
                );
                super::$body(concat!("tf", $instance), $pool, crate::Vmm::Firecracker);
            })*
        }
        mod cloud_hypervisor {
            $(#[test]
            fn $body() {
                $crate::support::fake::each::needs_fakes!(
                    concat!("cloud_hypervisor::", stringify!($body))
                );
                super::$body(concat!("tc", $instance), $pool + 50, crate::Vmm::CloudHypervisor);
            })*
        }
    };
}

pub(crate) use {needs_fakes, over_each};
