//! The `Range` header: one range of bytes, or the whole file.
//!
//! Source: RFC 9110, section 14. Several ranges, other units and malformed ones are answered with
//! the whole file, as it allows.

/// The part of a file that is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// All of it.
    Whole,
    /// From a byte to another, both included; within the file.
    Bytes { first: u64, last: u64 },
    /// None of what was asked for exists: 416.
    Unsatisfiable,
}

/// What a header asks for in a file of that size.
pub(super) fn part(header: Option<&str>, size: u64) -> Part {
    let Some((first, last)) = header.and_then(bounds) else {
        return Part::Whole;
    };
    match (first, last) {
        (None, Some(count)) => match size.checked_sub(1) {
            Some(last) if count > 0 => Part::Bytes {
                first: size.saturating_sub(count),
                last,
            },
            _ => Part::Unsatisfiable,
        },
        (Some(first), last) if first < size => match last {
            Some(last) if last < first => Part::Whole,
            last => Part::Bytes {
                first,
                last: last.unwrap_or(u64::MAX).min(size - 1),
            },
        },
        (Some(first), Some(last)) if last < first => Part::Whole,
        (Some(_), _) => Part::Unsatisfiable,
        (None, None) => Part::Whole,
    }
}

/// The two numbers of `bytes=a-b`, either of which may be missing.
fn bounds(header: &str) -> Option<(Option<u64>, Option<u64>)> {
    let (unit, range) = header.split_once('=')?;
    if !unit.trim().eq_ignore_ascii_case("bytes") {
        return None;
    }
    let (first, last) = range.trim().split_once('-')?;
    let number = |text: &str| match text {
        "" => Some(None),
        text if text.bytes().all(|b| b.is_ascii_digit()) => {
            Some(Some(text.parse().unwrap_or(u64::MAX)))
        }
        _ => None,
    };
    Some((number(first)?, number(last)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut_to_the_file() {
        let bytes = |first, last| Part::Bytes { first, last };
        for (header, size, expected) in [
            ("bytes=0-4", 10, bytes(0, 4)),
            ("bytes=5-", 10, bytes(5, 9)),
            ("bytes=5-99", 10, bytes(5, 9)),
            ("bytes=-3", 10, bytes(7, 9)),
            ("bytes=-30", 10, bytes(0, 9)),
            ("Bytes=9-99999999999999999999999", 10, bytes(9, 9)),
            ("bytes=10-", 10, Part::Unsatisfiable),
            ("bytes=-0", 10, Part::Unsatisfiable),
            ("bytes=0-", 0, Part::Unsatisfiable),
            ("bytes=-1", 0, Part::Unsatisfiable),
            ("bytes=5-4", 10, Part::Whole),
            ("bytes=50-40", 10, Part::Whole),
            ("bytes=-", 10, Part::Whole),
            ("bytes=0-1,3-4", 10, Part::Whole),
            ("pages=0-1", 10, Part::Whole),
            ("bytes=+1-2", 10, Part::Whole),
        ] {
            assert_eq!(part(Some(header), size), expected, "{header} of {size}");
        }
        assert_eq!(part(None, 10), Part::Whole);
    }
}
