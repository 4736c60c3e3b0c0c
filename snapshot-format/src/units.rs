//! Units of the format as types: a page number can't be passed as a byte offset.
//!
//! All conversions between pages and bytes are in this file. Arithmetic on values that come
//! from a file is checked and returns an `Option`; the operators are for values that were
//! validated, where an overflow would be a bug and panics in every build profile.

use std::fmt;
use std::ops::{Add, Sub};

use serde::{Deserialize, Serialize};

/// The largest memory one build describes, in bytes: 16 TiB.
pub const MAX_MEMORY_BYTES: u64 = 1 << 44;

/// The position of a page: in guest memory, or in a `memory.data` file.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct PageIndex(u64);

/// A number of pages.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct PageCount(u64);

/// A position in a file, in bytes.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct ByteOffset(u64);

/// How many diffs lie under a build; a base is generation 0.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Generation(u32);

/// The unit of guest memory; one size for a whole chain of builds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PageSize {
    /// 4 KiB.
    Size4K,
    /// 2 MiB.
    Size2M,
}

impl PageIndex {
    /// The page with this number.
    pub const fn new(index: u64) -> Self {
        Self(index)
    }

    /// The number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The page `count` pages further on, if such a number exists.
    pub fn checked_add(self, count: PageCount) -> Option<Self> {
        self.0.checked_add(count.0).map(Self)
    }

    /// Where this page begins in a file of pages, if that fits 64 bits.
    pub fn byte_offset(self, page_size: PageSize) -> Option<ByteOffset> {
        self.0.checked_mul(page_size.bytes()).map(ByteOffset)
    }
}

impl PageCount {
    /// So many pages.
    pub const fn new(count: u64) -> Self {
        Self(count)
    }

    /// The number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Whether there is no page.
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// The size of so many pages, if that fits 64 bits.
    pub fn bytes(self, page_size: PageSize) -> Option<u64> {
        self.0.checked_mul(page_size.bytes())
    }
}

impl ByteOffset {
    /// So many bytes from the beginning.
    pub const fn new(offset: u64) -> Self {
        Self(offset)
    }

    /// The number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The page that contains this byte.
    pub fn page(self, page_size: PageSize) -> PageIndex {
        PageIndex(self.0 / page_size.bytes())
    }
}

impl Generation {
    /// A build without parent.
    pub const BASE: Self = Self(0);

    /// So many diffs under a build.
    pub const fn new(generation: u32) -> Self {
        Self(generation)
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The generation of a diff over this one, if there can be one.
    pub fn next(self) -> Option<Self> {
        self.0.checked_add(1).map(Self)
    }
}

impl PageSize {
    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Size4K => 4 << 10,
            Self::Size2M => 2 << 20,
        }
    }

    /// The page size of so many bytes, if the format has it.
    pub const fn from_bytes(bytes: u64) -> Option<Self> {
        match bytes {
            0x1000 => Some(Self::Size4K),
            0x20_0000 => Some(Self::Size2M),
            _ => None,
        }
    }

    /// The largest memory in pages of this size.
    pub const fn max_memory_pages(self) -> PageCount {
        PageCount(MAX_MEMORY_BYTES / self.bytes())
    }
}

impl Add<PageCount> for PageIndex {
    type Output = Self;

    fn add(self, count: PageCount) -> Self {
        self.checked_add(count)
            .expect("validated page numbers stay far below 2^64")
    }
}

impl Sub for PageIndex {
    type Output = PageCount;

    fn sub(self, earlier: Self) -> PageCount {
        let pages = self.0.checked_sub(earlier.0);
        PageCount(pages.expect("the page on the right is not behind the one on the left"))
    }
}

impl Add for PageCount {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        let sum = self.0.checked_add(other.0);
        Self(sum.expect("validated page counts stay far below 2^64"))
    }
}

impl std::iter::Sum for PageCount {
    fn sum<I: Iterator<Item = Self>>(counts: I) -> Self {
        counts.fold(Self(0), |sum, count| sum + count)
    }
}

/// Bytes as a JSON number, so that other tools need no table of names.
impl Serialize for PageSize {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.bytes())
    }
}

impl<'de> Deserialize<'de> for PageSize {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = u64::deserialize(deserializer)?;
        Self::from_bytes(bytes)
            .ok_or_else(|| serde::de::Error::custom("page size is neither 4096 nor 2097152"))
    }
}

impl fmt::Display for PageIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for PageCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for ByteOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Size4K => "4 KiB",
            Self::Size2M => "2 MiB",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_offset_of_a_page_beyond_64_bits_is_none() {
        let page = PageIndex::new(u64::MAX / 4096 + 1);
        assert_eq!(page.byte_offset(PageSize::Size4K), None);
        assert_eq!(
            PageIndex::new(3).byte_offset(PageSize::Size2M),
            Some(ByteOffset::new(6 << 20))
        );
    }

    #[test]
    fn page_size_of_other_bytes_is_none() {
        assert_eq!(PageSize::from_bytes(8192), None);
        assert_eq!(PageSize::from_bytes(4096), Some(PageSize::Size4K));
        assert_eq!(PageSize::from_bytes(2 << 20), Some(PageSize::Size2M));
    }

    #[test]
    fn sixteen_tebibytes_are_two_to_the_32_small_pages() {
        assert_eq!(PageSize::Size4K.max_memory_pages().get(), 1 << 32);
    }
}
