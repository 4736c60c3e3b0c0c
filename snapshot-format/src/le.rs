//! Little-endian fields at fixed positions of a fixed-size record.
//!
//! Records are arrays, so a position outside is a bug that panics in the first test, never
//! something that the content of a file can cause.

/// The bytes `at..at + N` of a record.
#[inline]
pub(crate) fn bytes_at<const N: usize, const R: usize>(record: &[u8; R], at: usize) -> [u8; N] {
    *record[at..]
        .first_chunk()
        .expect("field lies inside its record")
}

/// The `u32` at this position of a record.
#[inline]
pub(crate) fn u32_at<const R: usize>(record: &[u8; R], at: usize) -> u32 {
    u32::from_le_bytes(bytes_at(record, at))
}

/// The `u64` at this position of a record.
#[inline]
pub(crate) fn u64_at<const R: usize>(record: &[u8; R], at: usize) -> u64 {
    u64::from_le_bytes(bytes_at(record, at))
}
