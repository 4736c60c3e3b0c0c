//! A kernel that any Firecracker boots, made of what a distribution ships.
//!
//! Distributions ship a bzImage: real-mode code, a decompressor, and the kernel as an ELF file,
//! packed. Where the packed part lies is in the header.
//!
//! ```text
//!   0      0x1F1 setup_sects   0x202 "HdrS"   0x248 payload_offset   0x24C payload_length
//!   ├──────── setup: (setup_sects + 1) × 512 ────────┼── protected mode ─┤
//!                                                    └─ + payload_offset: the packed ELF file,
//!                                                       then its length in 4 bytes
//! ```
//!
//! Source: `Documentation/arch/x86/boot.rst` of Linux, protocol 2.08 and later.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::VmmError;

const ELF: &[u8] = b"\x7fELF";
/// No kernel is larger unpacked; a file that claims to be is damaged.
const MAX_BYTES: u64 = 1 << 30;

/// Why a file can't be booted.
#[derive(Debug, Error)]
pub enum KernelError {
    /// A file can't be read or written.
    #[error("{operation} {}", path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// It is neither an ELF file nor a bzImage.
    #[error("Kernel {} is neither an ELF file nor a bzImage of protocol 2.08 or later: {what}", path.display())]
    Unknown {
        /// The file.
        path: PathBuf,
        /// What it has, or has not.
        what: &'static str,
    },
    /// Its payload is packed in a way that we don't know.
    #[error("Kernel {} is packed by something other than gzip, xz, lz4 and zstd: it begins with {magic:02x?}", path.display())]
    Packing {
        /// The file.
        path: PathBuf,
        /// The payload's first bytes.
        magic: Vec<u8>,
    },
    /// Its payload can't be unpacked.
    #[error("Unpacking the {packing} payload of kernel {}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// How it is packed.
        packing: &'static str,
        /// What the decoder says.
        #[source]
        source: io::Error,
    },
}

/// The ELF file of a kernel: itself if it is one, else unpacked into `cache`, once.
///
/// # Errors
/// See [`KernelError`].
pub fn elf_of(kernel: &Path, cache: &Path) -> Result<PathBuf, KernelError> {
    let file = |operation, path: &Path| {
        let path = path.to_owned();
        move |source| KernelError::File {
            operation,
            path,
            source,
        }
    };
    let mut head = [0; ELF.len()];
    let mut opened = fs::File::open(kernel).map_err(file("Opening kernel", kernel))?;
    opened
        .read_exact(&mut head)
        .map_err(file("Reading kernel", kernel))?;
    if head == ELF {
        return Ok(kernel.to_owned());
    }
    let known = opened
        .metadata()
        .map_err(file("Looking at kernel", kernel))?;
    // A kernel that was replaced has another name here.
    let name = format!(
        "{:x}-{:x}-{:x}-{}.vmlinux",
        known.dev(),
        known.ino(),
        known.len(),
        known.mtime()
    );
    let unpacked = cache.join(name);
    if unpacked.is_file() {
        return Ok(unpacked);
    }
    let image = fs::read(kernel).map_err(file("Reading kernel", kernel))?;
    let elf = unpack(&image, kernel)?;
    fs::create_dir_all(cache).map_err(file("Making directory", cache))?;
    // Two may come at once: each writes its own, the last one's stays.
    let part = unpacked.with_extension(format!("{:x}", u64::from_le_bytes(crate::clock::random())));
    fs::write(&part, elf).map_err(file("Writing", &part))?;
    fs::rename(&part, &unpacked).map_err(file("Writing", &unpacked))?;
    Ok(unpacked)
}

/// The ELF file in a bzImage.
fn unpack(image: &[u8], path: &Path) -> Result<Vec<u8>, KernelError> {
    let payload = payload(image).map_err(|what| KernelError::Unknown {
        path: path.to_owned(),
        what,
    })?;
    let (packing, unpacked) = match payload {
        [0x1F, 0x8B, ..] => ("gzip", bounded(flate2::read::GzDecoder::new(payload))),
        [0xFD, b'7', b'z', b'X', b'Z', 0, ..] => {
            ("xz", bounded(lzma_rust2::XzReader::new(payload, false)))
        }
        [0x28, 0xB5, 0x2F, 0xFD, ..] => (
            "zstd",
            zstd::stream::read::Decoder::new(payload)
                .and_then(|decoder| bounded(decoder.single_frame())),
        ),
        [0x02, 0x21, 0x4C, 0x18, ..] => ("lz4", unpack_lz4(payload)),
        _ => {
            return Err(KernelError::Packing {
                path: path.to_owned(),
                magic: payload.iter().take(6).copied().collect(),
            });
        }
    };
    let damaged = |source| KernelError::Damaged {
        path: path.to_owned(),
        packing,
        source,
    };
    let elf = unpacked.map_err(damaged)?;
    if !elf.starts_with(ELF) {
        return Err(damaged(io::Error::other("there is no ELF file in it")));
    }
    Ok(elf)
}

/// The packed part, without the length behind it.
fn payload(image: &[u8]) -> Result<&[u8], &'static str> {
    let bytes = |at: usize| image.get(at..at + 4).and_then(|b| b.first_chunk::<4>());
    let word = |at: usize| bytes(at).map(|bytes| u32::from_le_bytes(*bytes) as usize);
    if bytes(0x202) != Some(b"HdrS") {
        return Err("it has no setup header");
    }
    let version = word(0x206).unwrap_or(0) & 0xFFFF;
    if version < 0x208 {
        return Err("its protocol is older");
    }
    let setup_sects = match image[0x1F1] {
        0 => 4,
        sects => sects as usize,
    };
    let (Some(offset), Some(length)) = (word(0x248), word(0x24C)) else {
        return Err("it is cut short");
    };
    let start = (setup_sects + 1) * 512 + offset;
    let packed = length.checked_sub(4).ok_or("its payload is empty")?;
    image
        .get(start..)
        .and_then(|rest| rest.get(..packed))
        .ok_or("it is cut short")
}

fn bounded(decoder: impl Read) -> io::Result<Vec<u8>> {
    let mut unpacked = Vec::new();
    decoder.take(MAX_BYTES).read_to_end(&mut unpacked)?;
    Ok(unpacked)
}

/// The kernel's lz4 is the legacy frame: a magic number, then blocks of up to 8 MiB, each after
/// its packed length.
fn unpack_lz4(payload: &[u8]) -> io::Result<Vec<u8>> {
    const BLOCK_BYTES: usize = 8 << 20;
    let mut rest = &payload[4..];
    let mut unpacked = Vec::new();
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        let block = after
            .get(..length)
            .ok_or_else(|| io::Error::other("a block is cut short"))?;
        let block = lz4_flex::block::decompress(block, BLOCK_BYTES).map_err(io::Error::other)?;
        unpacked.extend_from_slice(&block);
        rest = &after[length..];
        if unpacked.len() as u64 > MAX_BYTES {
            return Err(io::Error::other("it is too long"));
        }
    }
    Ok(unpacked)
}

/// As [`elf_of`], off this thread, for the sandbox of this name.
///
/// # Errors
/// What is wrong with the kernel.
pub(super) async fn unpacked(name: &str, kernel: &Path, cache: &Path) -> Result<PathBuf, VmmError> {
    let (kernel, cache) = (kernel.to_owned(), cache.to_owned());
    let unpacking = tokio::task::spawn_blocking(move || elf_of(&kernel, &cache)).await;
    unpacking
        .map_err(|error| VmmError::Start {
            name: name.to_owned(),
            source: io::Error::other(error),
        })?
        .map_err(|source| VmmError::Kernel {
            name: name.to_owned(),
            source,
        })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn elf() -> Vec<u8> {
        let mut elf = b"\x7fELF".to_vec();
        elf.extend((0..300_000u32).flat_map(|n| (n / 7).to_le_bytes()));
        elf
    }

    /// A bzImage around a payload.
    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 3 * 512 + 16];
        image[0x1F1] = 2;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20Fu16.to_le_bytes());
        image[0x248..0x24C].copy_from_slice(&16u32.to_le_bytes());
        let length = payload.len() as u32 + 4;
        image[0x24C..0x250].copy_from_slice(&length.to_le_bytes());
        image.extend_from_slice(payload);
        image.extend_from_slice(&(elf().len() as u32).to_le_bytes());
        // What follows is not the payload's.
        image.extend_from_slice(&[0xEE; 100]);
        image
    }

    fn lz4(bytes: &[u8]) -> Vec<u8> {
        let mut packed = vec![0x02, 0x21, 0x4C, 0x18];
        for block in bytes.chunks(8 << 20) {
            let block = lz4_flex::block::compress(block);
            packed.extend_from_slice(&(block.len() as u32).to_le_bytes());
            packed.extend_from_slice(&block);
        }
        packed
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packer.write_all(bytes).unwrap();
        packer.finish().unwrap()
    }

    fn unpacked(image: &[u8]) -> Result<Vec<u8>, KernelError> {
        unpack(image, Path::new("vmlinuz"))
    }

    #[test]
    fn what_was_packed_comes_out() {
        let elf = elf();
        for packed in [
            gzip(&elf),
            lz4(&elf),
            zstd::stream::encode_all(&elf[..], 3).unwrap(),
        ] {
            assert!(unpacked(&image(&packed)).unwrap() == elf);
        }
    }

    #[test]
    fn damage_is_an_error_and_names_the_packing() {
        let mut packed = gzip(&elf());
        packed.truncate(packed.len() / 2);
        let error = unpacked(&image(&packed)).unwrap_err();
        assert!(error.to_string().contains("gzip"), "{error}");
        let error = unpacked(&image(&gzip(b"no such thing"))).unwrap_err();
        assert!(matches!(error, KernelError::Damaged { .. }), "{error}");
        let error = unpacked(&image(b"BZh91AY")).unwrap_err();
        assert!(error.to_string().contains("[42, 5a, 68"), "{error}");
    }

    #[test]
    fn an_image_cut_anywhere_in_its_header_is_an_error() {
        let whole = image(&gzip(&elf()));
        for cut in (0..0x700).chain([whole.len() - 105]) {
            assert!(unpacked(&whole[..cut]).is_err(), "{cut:#x}");
        }
        let mut old = whole;
        old[0x206] = 7;
        assert!(unpacked(&old).is_err());
    }

    #[test]
    fn an_elf_file_is_taken_as_it_is_and_an_image_is_unpacked_once() {
        let dir = tempfile::tempdir().unwrap();
        let (kernel, cache) = (dir.path().join("kernel"), dir.path().join("cache"));
        fs::write(&kernel, elf()).unwrap();
        assert_eq!(elf_of(&kernel, &cache).unwrap(), kernel);
        fs::write(&kernel, image(&gzip(&elf()))).unwrap();
        let first = elf_of(&kernel, &cache).unwrap();
        assert!(fs::read(&first).unwrap() == elf());
        fs::write(&first, b"kept").unwrap();
        assert_eq!(fs::read(elf_of(&kernel, &cache).unwrap()).unwrap(), b"kept");
        assert_eq!(fs::read_dir(&cache).unwrap().count(), 1);
        fs::write(&kernel, b"MZ, and something else").unwrap();
        assert!(elf_of(&kernel, &cache).is_err());
    }
}
