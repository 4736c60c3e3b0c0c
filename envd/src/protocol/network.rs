//! The guest's address, the same inside every network slot, so that a clone needs no new one.
//!
//! The host puts the values on the kernel command line; the guest's init falls back to these.

/// Kernel parameter with the guest's address and prefix length.
pub const ADDRESS_PARAMETER: &str = "thaw.ip";
/// Kernel parameter with the guest's default gateway.
pub const GATEWAY_PARAMETER: &str = "thaw.gw";
/// The guest's address.
pub const GUEST_ADDRESS: &str = "169.254.100.2";
/// Prefix length of the link between guest and slot.
pub const PREFIX_LENGTH: u8 = 30;
/// The slot's end of the link.
pub const GATEWAY: &str = "169.254.100.1";

/// The two parameters as they stand on a kernel command line.
///
/// ```
/// assert_eq!(
///     envd::protocol::network::kernel_parameters(),
///     "thaw.ip=169.254.100.2/30 thaw.gw=169.254.100.1",
/// );
/// ```
pub fn kernel_parameters() -> String {
    format!("{ADDRESS_PARAMETER}={GUEST_ADDRESS}/{PREFIX_LENGTH} {GATEWAY_PARAMETER}={GATEWAY}")
}
