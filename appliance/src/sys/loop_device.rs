//! Loop devices: a file as a block device, with direct I/O, until it is released.
//!
//! They outlive whoever made them (`autoclear` is off), so that a daemon's end doesn't take a
//! disk away from a guest; [`all`] finds them again.
//!
//! Source: `linux/loop.h`; `LOOP_CONFIGURE` is there since Linux 5.8.
#![expect(unsafe_code, reason = "ioctls of /dev/loop-control and /dev/loop*")]

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;
const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
const LOOP_CLR_FD: libc::c_ulong = 0x4C01;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_DIRECT_IO: u32 = 16;
const MAJOR: u32 = 7;
/// Somebody else may take the free device that we were told of.
const TRIES: usize = 64;

/// `loop_info64`.
#[repr(C)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `loop_config`.
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<Info>() == 232);
const _: () = assert!(size_of::<Config>() == 304);

/// A loop device by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LoopDevice(u32);

impl LoopDevice {
    /// Makes a file a block device.
    ///
    /// # Errors
    /// There is no free device, or the kernel has no loop devices.
    pub fn attach(file: &File, read_only: bool) -> io::Result<Self> {
        let control = File::options()
            .read(true)
            .write(true)
            .open("/dev/loop-control")?;
        let flags = LO_FLAGS_DIRECT_IO | if read_only { LO_FLAGS_READ_ONLY } else { 0 };
        for _ in 0..TRIES {
            // SAFETY: LOOP_CTL_GET_FREE takes no argument.
            let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
            let number = u32::try_from(number).map_err(|_| io::Error::last_os_error())?;
            let device = Self(number);
            match device.configure(file, flags) {
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
                Err(error) => return Err(error),
                Ok(()) => return Ok(device),
            }
        }
        Err(io::Error::from_raw_os_error(libc::EBUSY))
    }

    fn configure(self, file: &File, flags: u32) -> io::Result<()> {
        let device = File::options().read(true).write(true).open(self.path())?;
        let config = Config {
            fd: file.as_raw_fd() as u32,
            block_size: 0,
            info: Info {
                device: 0,
                inode: 0,
                rdevice: 0,
                offset: 0,
                sizelimit: 0,
                number: 0,
                encrypt_type: 0,
                encrypt_key_size: 0,
                flags,
                file_name: [0; 64],
                crypt_name: [0; 64],
                encrypt_key: [0; 32],
                init: [0; 2],
            },
            reserved: [0; 8],
        };
        // SAFETY: LOOP_CONFIGURE reads one `loop_config`; the kernel takes its own reference
        // to the file.
        let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// The one of this `major:minor`, if that is a loop device's.
    #[must_use]
    pub fn of_numbers(numbers: &str) -> Option<Self> {
        let (major, minor) = numbers.split_once(':')?;
        let is_ours = major.parse() == Ok(MAJOR);
        is_ours.then(|| minor.parse().map(Self).ok()).flatten()
    }

    /// Lets go of the file; that there is none any more is no error.
    ///
    /// # Errors
    /// As the ioctl.
    pub fn release(self) -> io::Result<()> {
        let device = match File::open(self.path()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            device => device?,
        };
        // SAFETY: LOOP_CLR_FD takes no argument.
        if unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CLR_FD) } == 0 {
            return Ok(());
        }
        match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(()),
            error => Err(error),
        }
    }

    /// Its node.
    #[must_use]
    pub fn path(self) -> PathBuf {
        format!("/dev/loop{}", self.0).into()
    }

    /// `major:minor`, as device-mapper takes it.
    #[must_use]
    pub fn numbers(self) -> String {
        format!("{MAJOR}:{}", self.0)
    }

    /// Whether it goes around the page cache.
    #[must_use]
    pub fn is_direct(self) -> bool {
        let flag = format!("/sys/block/loop{}/loop/dio", self.0);
        fs::read_to_string(flag).is_ok_and(|text| text.trim() == "1")
    }
}

/// All that have a file, and which: the path that it was opened by, even if it is gone.
///
/// # Errors
/// `/sys/block` can't be read.
pub fn all() -> io::Result<Vec<(LoopDevice, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/block")? {
        let entry = entry?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("loop"));
        let Some(number) = number.and_then(|number| number.parse().ok()) else {
            continue;
        };
        // Without a file there is no such attribute.
        let Ok(mut path) = fs::read(entry.path().join("loop/backing_file")) else {
            continue;
        };
        if path.last() == Some(&b'\n') {
            path.pop();
        }
        let path = path.strip_suffix(b" (deleted)").unwrap_or(&path).to_vec();
        let path = PathBuf::from(std::ffi::OsString::from_vec(path));
        found.push((LoopDevice(number), path));
    }
    found.sort();
    Ok(found)
}

/// Those whose file is, or was, below a directory.
///
/// # Errors
/// As [`all`].
pub fn below(dir: &Path) -> io::Result<Vec<LoopDevice>> {
    let dir = fs::canonicalize(dir)?;
    let ours = all()?
        .into_iter()
        .filter(|(_, file)| file.starts_with(&dir));
    Ok(ours.map(|(device, _)| device).collect())
}
