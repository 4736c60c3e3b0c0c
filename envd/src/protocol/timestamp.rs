//! RFC 3339 times, as `/init` carries them.
//!
//! `2025-01-31T12:00:00.123456789Z`, or with an offset such as `+02:00`. Years 1970 to 9999; a leap
//! second (`:60`) is refused, as no kernel clock can be set to one.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// A point in time with nanoseconds, in RFC 3339 on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp(SystemTime);

/// The text is not an RFC 3339 time from 1970 on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("Not an RFC 3339 time from 1970 on: {0:?}")]
pub struct TimestampError(String);

impl Timestamp {
    /// The clock of this machine now.
    pub fn now() -> Timestamp {
        Timestamp(SystemTime::now())
    }

    /// The same as a [`SystemTime`].
    pub fn system_time(self) -> SystemTime {
        self.0
    }

    /// Time since 1970.
    pub fn since_epoch(self) -> Duration {
        self.0.duration_since(UNIX_EPOCH).unwrap_or_default()
    }
}

impl From<SystemTime> for Timestamp {
    /// Times before 1970 become 1970.
    fn from(time: SystemTime) -> Timestamp {
        Timestamp(time.max(UNIX_EPOCH))
    }
}

impl std::str::FromStr for Timestamp {
    type Err = TimestampError;

    fn from_str(text: &str) -> Result<Timestamp, TimestampError> {
        parse(text.as_bytes())
            .and_then(|since_epoch| UNIX_EPOCH.checked_add(since_epoch))
            .map(Timestamp)
            .ok_or_else(|| TimestampError(text.to_owned()))
    }
}

impl std::fmt::Display for Timestamp {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let since_epoch = self.since_epoch();
        let seconds = since_epoch.as_secs();
        let (year, month, day) = date_of_day(seconds / 86_400);
        let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
        let nanos = since_epoch.subsec_nanos();
        write!(
            to,
            "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanos:09}Z"
        )
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Timestamp, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

/// Time since 1970 of an RFC 3339 text.
fn parse(text: &[u8]) -> Option<Duration> {
    let separators =
        [(4, b"-"), (7, b"-"), (10, b"Tt "), (13, b":"), (16, b":")] as [(_, &[u8]); 5];
    if separators
        .iter()
        .any(|(at, allowed)| !text.get(*at).is_some_and(|c| allowed.contains(c)))
    {
        return None;
    }
    let field = |at: usize, digits: usize| digits_of(text.get(at..at + digits)?);
    let (year, month, day) = (field(0, 4)?, field(5, 2)?, field(8, 2)?);
    let (hour, minute, second) = (field(11, 2)?, field(14, 2)?, field(17, 2)?);
    let in_range = (1970..=9999).contains(&year)
        && (1..=12).contains(&month)
        && (1..=days_of_month(year, month)).contains(&day)
        && hour < 24
        && minute < 60
        && second < 60;
    if !in_range {
        return None;
    }

    let (nanos, rest) = fraction(text.get(19..)?)?;
    let local = day_of_date(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second;
    let utc = i64::try_from(local)
        .ok()?
        .checked_sub(offset_seconds(rest)?)?;
    Some(Duration::new(u64::try_from(utc).ok()?, nanos))
}

/// The nanoseconds of `.123`, and what follows; digits beyond nine are cut off.
fn fraction(text: &[u8]) -> Option<(u32, &[u8])> {
    let Some(digits) = text.strip_prefix(b".") else {
        return Some((0, text));
    };
    let count = digits.iter().take_while(|c| c.is_ascii_digit()).count();
    let kept = count.min(9);
    let value = digits_of(&digits[..kept])? * 10_u64.pow(9 - u32::try_from(kept).ok()?);
    Some((u32::try_from(value).ok()?, &digits[count..]))
}

/// Seconds east of UTC of `Z`, `+02:00` or `-05:30`.
fn offset_seconds(text: &[u8]) -> Option<i64> {
    let (sign, rest) = match text {
        b"Z" | b"z" => return Some(0),
        [b'+', rest @ ..] => (1, rest),
        [b'-', rest @ ..] => (-1, rest),
        _ => return None,
    };
    let [h1, h2, b':', m1, m2] = rest else {
        return None;
    };
    let (hours, minutes) = (digits_of(&[*h1, *h2])?, digits_of(&[*m1, *m2])?);
    let seconds = i64::try_from(hours * 3600 + minutes * 60).ok()?;
    (hours < 24 && minutes < 60).then_some(sign * seconds)
}

fn digits_of(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn days_of_month(year: u64, month: u64) -> u64 {
    match month {
        2 => 28 + u64::from(is_leap(year)),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days from 1970-01-01 to a date.
fn day_of_date(year: u64, month: u64, day: u64) -> u64 {
    let years: u64 = (1970..year)
        .map(|year| 365 + u64::from(is_leap(year)))
        .sum();
    let months: u64 = (1..month).map(|month| days_of_month(year, month)).sum();
    years + months + day - 1
}

/// The date that many days after 1970-01-01.
fn date_of_day(mut day: u64) -> (u64, u64, u64) {
    let mut year = 1970;
    while day >= 365 + u64::from(is_leap(year)) {
        day -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let mut month = 1;
    while day >= days_of_month(year, month) {
        day -= days_of_month(year, month);
        month += 1;
    }
    (year, month, day + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(text: &str) -> Option<u64> {
        text.parse::<Timestamp>()
            .ok()
            .map(|time| time.since_epoch().as_secs())
    }

    #[test]
    fn known_times_parse_to_their_seconds() {
        assert_eq!(seconds("1970-01-01T00:00:00Z"), Some(0));
        assert_eq!(seconds("2000-02-29T23:59:59Z"), Some(951_868_799));
        assert_eq!(seconds("2025-01-31T12:00:00.5+02:00"), Some(1_738_317_600));
        assert_eq!(seconds("2025-01-31T12:00:00-00:30"), Some(1_738_326_600));
    }

    #[test]
    fn fractions_keep_nanoseconds() {
        let time: Timestamp = "2025-01-31T12:00:00.1234567891Z".parse().unwrap();
        assert_eq!(time.since_epoch().subsec_nanos(), 123_456_789);
        assert_eq!(time.to_string(), "2025-01-31T12:00:00.123456789Z");
    }

    #[test]
    fn every_day_until_2100_survives_the_round_trip() {
        for day in 0..47_482_u64 {
            let time = Timestamp(UNIX_EPOCH + Duration::from_secs(day * 86_400 + 3723));
            assert_eq!(time.to_string().parse(), Ok(time));
        }
    }

    #[test]
    fn malformed_times_are_refused() {
        for text in [
            "",
            "now",
            "2025-01-31",
            "2025-01-31T12:00:00",
            "2025-02-29T00:00:00Z",
            "2025-13-01T00:00:00Z",
            "2025-01-01T24:00:00Z",
            "2025-01-01T00:00:60Z",
            "1969-12-31T23:59:59Z",
            "1970-01-01T00:00:00+01:00",
            "2025-01-31T12:00:00.Z",
            "2025-01-31T12:00:00+2:00",
            "2025-01-31T12:00:00Zjunk",
            "+025-01-31T12:00:00Z",
        ] {
            assert!(text.parse::<Timestamp>().is_err(), "{text}");
        }
    }
}
