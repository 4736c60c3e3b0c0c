//! Device-mapper by its ioctls: seven commands, without udev and without libdevmapper.
//!
//! ```text
//!  create(name) ─▶ load(table) ─▶ resume ─▶ /dev/dm-N works ─▶ remove(name)
//! ```
//!
//! `devtmpfs` makes `/dev/dm-N`; nobody makes `/dev/mapper/NAME`, and nobody needs it. The crate
//! `devicemapper` would do the same, but generates its bindings when it is built, for which it
//! wants libclang and the headers of libdevmapper on every machine that compiles us.
//!
//! Source: `linux/dm-ioctl.h`; the interface's major version has been 4 since Linux 2.6.
#![expect(unsafe_code, reason = "ioctls of /dev/mapper/control")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

const CONTROL: &str = "/dev/mapper/control";

/// `struct dm_ioctl`, by the offsets of what is used of it.
const HEADER_BYTES: usize = 312;
const DATA_SIZE_AT: usize = 12;
const DATA_START_AT: usize = 16;
const TARGET_COUNT_AT: usize = 20;
const FLAGS_AT: usize = 28;
const EVENT_AT: usize = 32;
const DEVICE_AT: usize = 40;
const NAME_AT: usize = 48;
const UUID_AT: usize = 176;
/// Bytes of a name with its terminating zero; one more is left for a uuid.
const NAME_BYTES: usize = 128;

/// `struct dm_target_spec`: start, length, status, next, type, then its parameters.
const TARGET_BYTES: usize = 40;
const TARGET_LENGTH_AT: usize = 8;
const TARGET_TYPE_AT: usize = 24;

/// Enough for a table and for a few names; grown when it is not.
const BUFFER_BYTES: usize = 4 << 10;

const STATUS_TABLE_FLAG: u32 = 1 << 4;
const BUFFER_FULL_FLAG: u32 = 1 << 8;

/// What a host's udev rules are told with an event, if there is a udev: to leave the device alone.
/// Else they would look for file systems and volumes in what a guest has written, and hold it open.
/// Source: `DM_UDEV_DISABLE_*_RULES_FLAG` and `DM_UDEV_FLAGS_SHIFT` of libdevmapper.h.
const LEAVE_ALONE: u32 = 0xf << 16;

#[derive(Clone, Copy)]
#[repr(u8)]
enum Command {
    Version = 0,
    ListDevices = 2,
    Create = 3,
    Remove = 4,
    Suspend = 6,
    TableLoad = 9,
    TableStatus = 12,
}

impl Command {
    /// `_IOWR(0xfd, command, struct dm_ioctl)`.
    const fn request(self) -> libc::c_ulong {
        3 << 30 | (HEADER_BYTES as libc::c_ulong) << 16 | 0xfd << 8 | self as libc::c_ulong
    }
}

/// One line of a device's table, over its whole length.
#[derive(Clone, Debug)]
pub struct Target<'a> {
    /// Length in sectors of 512 bytes.
    pub sectors: u64,
    /// `snapshot`, for example.
    pub kind: &'a str,
    /// What that kind wants to know.
    pub parameters: &'a str,
}

/// The way to the kernel's device-mapper.
#[derive(Debug)]
pub struct DeviceMapper {
    control: File,
}

impl DeviceMapper {
    /// Opens the control node.
    ///
    /// # Errors
    /// There is none, or no permission, or the kernel speaks another version.
    pub fn open() -> io::Result<Self> {
        let control = File::options().read(true).write(true).open(CONTROL)?;
        let mapper = Self { control };
        mapper.call(Command::Version, &mut Request::new(""))?;
        Ok(mapper)
    }

    /// Makes a device without a table; gives its node.
    ///
    /// # Errors
    /// Of kind `AlreadyExists`, by errno `EBUSY`, if there is one of this name.
    pub fn create(&self, name: &str) -> io::Result<PathBuf> {
        let mut request = Request::new(name);
        // Tools show it, and a rename can't hide whose it is.
        request.text(UUID_AT, name);
        self.call(Command::Create, &mut request)?;
        Ok(request.node())
    }

    /// Gives a device its table, which [`DeviceMapper::resume`] puts into force.
    ///
    /// # Errors
    /// The kernel has no such kind of target, or refuses its parameters.
    pub fn load(&self, name: &str, target: &Target<'_>) -> io::Result<()> {
        let mut request = Request::new(name);
        request.u32(TARGET_COUNT_AT, 1);
        let at = HEADER_BYTES;
        request.put(at + TARGET_LENGTH_AT, &target.sectors.to_ne_bytes());
        request.text(at + TARGET_TYPE_AT, target.kind);
        request.text(at + TARGET_BYTES, target.parameters);
        self.call(Command::TableLoad, &mut request)
    }

    /// Puts a loaded table into force, and lets I/O through.
    ///
    /// # Errors
    /// The device can't be set up as its table says.
    pub fn resume(&self, name: &str) -> io::Result<()> {
        let mut request = Request::new(name);
        request.u32(EVENT_AT, LEAVE_ALONE);
        self.call(Command::Suspend, &mut request)
    }

    /// What the device's target says of itself.
    ///
    /// # Errors
    /// There is no such device.
    pub fn status(&self, name: &str) -> io::Result<String> {
        let mut request = Request::new(name);
        self.call(Command::TableStatus, &mut request)?;
        let start = request.u32_at(DATA_START_AT) as usize;
        Ok(request.text_at(start + TARGET_BYTES))
    }

    /// The node of a device, and the parameters of its first line.
    ///
    /// # Errors
    /// There is no such device.
    pub fn table(&self, name: &str) -> io::Result<(PathBuf, String)> {
        let mut request = Request::new(name);
        request.u32(FLAGS_AT, STATUS_TABLE_FLAG);
        self.call(Command::TableStatus, &mut request)?;
        let start = request.u32_at(DATA_START_AT) as usize;
        Ok((request.node(), request.text_at(start + TARGET_BYTES)))
    }

    /// Removes a device.
    ///
    /// # Errors
    /// Somebody has it open (`EBUSY`); of kind `NotFound` if there is none.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        let mut request = Request::new(name);
        request.u32(EVENT_AT, LEAVE_ALONE);
        match self.call(Command::Remove, &mut request) {
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {
                Err(io::Error::new(io::ErrorKind::NotFound, error))
            }
            result => result,
        }
    }

    /// The names of all devices.
    ///
    /// # Errors
    /// As the ioctl.
    pub fn names(&self) -> io::Result<Vec<String>> {
        const NEXT_AT: usize = 8;
        const NAME_AT: usize = 12;
        let mut request = Request::new("");
        self.call(Command::ListDevices, &mut request)?;
        let mut at = request.u32_at(DATA_START_AT) as usize;
        let mut names = Vec::new();
        // Without any device there is one entry that names none.
        while request.u64_at(at) != 0 {
            names.push(request.text_at(at + NAME_AT));
            match request.u32_at(at + NEXT_AT) as usize {
                0 => break,
                next => at += next,
            }
        }
        Ok(names)
    }

    fn call(&self, command: Command, request: &mut Request) -> io::Result<()> {
        loop {
            let asked = request.words.clone();
            let bytes = request.words.len() * 8;
            request.u32(DATA_SIZE_AT, bytes as u32);
            // SAFETY: the kernel reads and writes at most `data_size` bytes, which the buffer
            // has; it is aligned for every structure in it.
            let result = unsafe {
                libc::ioctl(
                    self.control.as_raw_fd(),
                    command.request(),
                    request.words.as_mut_ptr(),
                )
            };
            if result != 0 {
                return Err(io::Error::last_os_error());
            }
            if request.u32_at(FLAGS_AT) & BUFFER_FULL_FLAG == 0 {
                return Ok(());
            }
            request.words = asked;
            request.words.resize(bytes / 4, 0);
        }
    }
}

/// A buffer that begins with a `dm_ioctl`.
struct Request {
    words: Vec<u64>,
}

impl Request {
    fn new(name: &str) -> Self {
        const VERSION: [u32; 3] = [4, 0, 0];
        let mut request = Self {
            words: vec![0; BUFFER_BYTES / 8],
        };
        for (index, number) in VERSION.into_iter().enumerate() {
            request.u32(4 * index, number);
        }
        request.u32(DATA_START_AT, HEADER_BYTES as u32);
        assert!(name.len() < NAME_BYTES, "device name {name:?} is too long");
        request.text(NAME_AT, name);
        request
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        for (offset, byte) in bytes.iter().enumerate() {
            let at = at + offset;
            let shift = 8 * (at % 8);
            let word = u64::from_le(self.words[at / 8]);
            let word = word & !(0xff << shift) | u64::from(*byte) << shift;
            self.words[at / 8] = word.to_le();
        }
    }

    fn u32(&mut self, at: usize, value: u32) {
        self.put(at, &value.to_ne_bytes());
    }

    /// With the zeros that are behind it.
    fn text(&mut self, at: usize, text: &str) {
        self.put(at, text.as_bytes());
    }

    fn byte(&self, at: usize) -> u8 {
        let word = self.words.get(at / 8).copied().unwrap_or_default();
        (u64::from_le(word) >> (8 * (at % 8))) as u8
    }

    fn u32_at(&self, at: usize) -> u32 {
        u32::from_ne_bytes(std::array::from_fn(|n| self.byte(at + n)))
    }

    fn u64_at(&self, at: usize) -> u64 {
        u64::from_ne_bytes(std::array::from_fn(|n| self.byte(at + n)))
    }

    /// Of the device that the kernel has answered about.
    fn node(&self) -> PathBuf {
        format!("/dev/dm-{}", libc::minor(self.u64_at(DEVICE_AT))).into()
    }

    fn text_at(&self, at: usize) -> String {
        let bytes = (at..self.words.len() * 8).map(|at| self.byte(at));
        let bytes: Vec<u8> = bytes.take_while(|byte| *byte != 0).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_those_of_the_kernels_header() {
        assert_eq!(Command::Version.request(), 0xc138_fd00);
        assert_eq!(Command::TableStatus.request(), 0xc138_fd0c);
    }

    #[test]
    fn fields_are_read_back_as_they_were_put() {
        let mut request = Request::new("thaw-a-b");
        request.put(HEADER_BYTES + 3, &0x0102_0304_0506_0708_u64.to_ne_bytes());
        assert_eq!(request.u64_at(HEADER_BYTES + 3), 0x0102_0304_0506_0708);
        assert_eq!(request.text_at(NAME_AT), "thaw-a-b");
        assert_eq!(request.u32_at(0), 4);
        assert_eq!(request.u32_at(DATA_START_AT), 312);
    }
}
