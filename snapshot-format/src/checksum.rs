//! CRC-32C as the format uses it: plain over another file's bytes, masked when it is stored in
//! the bytes that a further checksum covers.
//!
//! A CRC over data that ends in its own CRC is a constant, so a checksum of a file would not
//! depend on a header inside it that carries a plain CRC of itself. The mask breaks that.
//! Source of the mask: LevelDB 1.23, `util/crc32c.h`.

use crc_fast::{CrcAlgorithm, Digest};

/// Added to a rotated checksum by [`mask`].
const MASK_DELTA: u32 = 0xa282_ead8;
/// The Castagnoli polynomial, bit-reversed.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// The checksum of `bytes`.
pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    crc32c_append(0, bytes)
}

/// The checksum of what `crc` covers followed by `bytes`.
pub(crate) fn crc32c_append(crc: u32, bytes: &[u8]) -> u32 {
    // The digest's state is the inverted CRC.
    let mut digest = Digest::new_with_init_state(CrcAlgorithm::Crc32Iscsi, u64::from(!crc));
    digest.update(bytes);
    u32::try_from(digest.finalize()).expect("this checksum has 32 bits")
}

/// The stored form of a checksum that lies inside checksummed bytes.
pub(crate) fn mask(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(MASK_DELTA)
}

/// The masked checksum of `bytes`.
pub(crate) fn masked(bytes: &[u8]) -> u32 {
    mask(crc32c(bytes))
}

/// The checksum of what `crc` covers followed by `zeros` zero bytes, in logarithmic time.
pub(crate) fn append_zeros(crc: u32, zeros: u64) -> u32 {
    // Zero bytes only multiply the inner state by x^8 each; the state is the inverted CRC.
    !multiply(x_to_the_8n(zeros), !crc)
}

/// `a * b` modulo the polynomial; bit 31 is the coefficient of x^0.
fn multiply(a: u32, mut b: u32) -> u32 {
    let mut product = 0;
    for bit in (0..32).rev() {
        if a >> bit & 1 == 1 {
            product ^= b;
        }
        b = b >> 1 ^ if b & 1 == 1 { POLYNOMIAL } else { 0 };
    }
    product
}

/// x to the power of `8 * n` modulo the polynomial.
fn x_to_the_8n(mut n: u64) -> u32 {
    let mut power = 1 << 31; // x^0
    let mut square = 1 << 23; // x^8
    while n > 0 {
        if n & 1 == 1 {
            power = multiply(square, power);
        }
        square = multiply(square, square);
        n >>= 1;
    }
    power
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_of_the_rfc_vector_matches() {
        // Source: RFC 3720, B.4: 32 bytes of zeros.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c_append(crc32c(b"1234"), b"56789"), 0xe306_9283);
    }

    #[test]
    fn both_libraries_agree_on_every_length_and_split() {
        let bytes: Vec<u8> = (0..9000u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
            .collect();
        for length in (0..600).chain([1023, 4096, 4097, 8191, 9000]) {
            let (bytes, split) = (&bytes[..length], length / 3);
            let expected = ::crc32c::crc32c(bytes);
            assert_eq!(crc32c(bytes), expected, "{length}");
            let (first, second) = bytes.split_at(split);
            assert_eq!(crc32c_append(crc32c(first), second), expected, "{length}");
        }
    }

    #[test]
    fn appended_zeros_equal_zeros_that_were_read() {
        let start = crc32c(b"thaw");
        for zeros in [0, 1, 2, 7, 4096, 100_003] {
            let read = crc32c_append(start, &vec![0; zeros]);
            assert_eq!(append_zeros(start, zeros as u64), read, "{zeros}");
            let alone = crc32c(&vec![0; zeros]);
            assert_eq!(append_zeros(0, zeros as u64), alone, "{zeros}");
        }
    }

    #[test]
    fn file_checksum_depends_on_a_header_that_carries_its_own_checksum() {
        let sealed = |byte: u8| {
            let mut file = vec![byte; 60];
            file.extend_from_slice(&masked(&file).to_le_bytes());
            crc32c(&file)
        };
        assert_ne!(sealed(1), sealed(2));
    }
}
