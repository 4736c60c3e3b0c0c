//! A writer of the archive format that the kernel unpacks as its initial RAM disk.
//!
//! ```text
//! "070701" │ 13 fields of 8 hexadecimal digits │ name NUL, padded to 4 │ content, padded to 4
//!            inode mode uid gid nlink mtime size major minor rmajor rminor namesize check
//! … and last an entry named TRAILER!!!
//! ```
//!
//! Source: Linux `Documentation/driver-api/early-userspace/buffer-format.rst`.

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// An archive in the making; owners are root and times are zero, so equal content is equal bytes.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// A directory; its parents come first.
    pub(crate) fn directory(&mut self, name: &str, permissions: u32) {
        self.entry(name, DIRECTORY | permissions, (0, 0), &[]);
    }

    /// A regular file.
    pub(crate) fn file(&mut self, name: &str, permissions: u32, content: &[u8]) {
        self.entry(name, FILE | permissions, (0, 0), content);
    }

    /// A character device by its major and minor number.
    pub(crate) fn character_device(&mut self, name: &str, permissions: u32, device: (u32, u32)) {
        self.entry(name, CHARACTER_DEVICE | permissions, device, &[]);
    }

    /// The finished archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(content.len()).expect("an initial RAM disk is under 4 GiB");
        let name_size = u32::try_from(name.len() + 1).expect("names are short");
        let fields = [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            size,
            0,
            0,
            device.0,
            device.1,
            name_size,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        let padded = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(padded, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archive_has_the_documented_layout() {
        let mut archive = Archive::default();
        archive.directory("dev", 0o755);
        archive.file("dev/a", 0o644, b"hello");
        archive.character_device("dev/console", 0o600, (5, 1));
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(&bytes[..14], b"07070100000001");
        assert_eq!(&bytes[14..22], b"000041ed", "mode of a directory");
        // Header 110, "dev\0" to 116 (padded), then the file's header.
        assert_eq!(&bytes[110..116], b"dev\0\0\0");
        let file = &bytes[116..];
        assert_eq!(&file[14..22], b"000081a4", "mode of a file");
        assert_eq!(&file[54..62], b"00000005", "its size");
        assert_eq!(&file[110..116], b"dev/a\0");
        assert_eq!(&file[116..124], b"hello\0\0\0");
        let device = &file[124..];
        assert_eq!(&device[14..22], b"00002180");
        assert_eq!(&device[78..94], b"0000000500000001");
        assert!(bytes.windows(10).any(|window| window == b"TRAILER!!!"));
    }
}
