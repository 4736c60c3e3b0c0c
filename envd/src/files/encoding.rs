//! Which coding a download has, by `Accept-Encoding`.
//!
//! HTTP libraries offer gzip on every request whether their user cares or not, and compressing a
//! file of gigabytes to a host that is a memory copy away makes it slower. So gzip is used for who
//! asks for nothing else. Source: RFC 9110, section 12.5.3.

/// How a body is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Coding {
    /// As it is.
    Identity,
    /// Compressed.
    Gzip,
}

/// The coding for a header; `None` when no coding of ours is acceptable: 406.
pub(super) fn coding(accept: Option<&str>) -> Option<Coding> {
    let Some(accept) = accept else {
        return Some(Coding::Identity);
    };
    let offers: Vec<(String, bool)> = accept
        .split(',')
        .map(offer)
        .filter(|(name, _)| !name.is_empty())
        .collect();
    let allowed = |name: &str| offers.iter().find(|(n, _)| n == name).map(|(_, ok)| *ok);
    let gzip = allowed("gzip")
        .or(allowed("x-gzip"))
        .or(allowed("*"))
        .unwrap_or(false);
    let identity = allowed("identity").or(allowed("*")).unwrap_or(true);
    let only_gzip = offers.iter().all(|(name, ok)| name == "gzip" || !ok);
    match (gzip, identity) {
        (true, true) if only_gzip && !offers.is_empty() => Some(Coding::Gzip),
        (_, true) => Some(Coding::Identity),
        (true, false) => Some(Coding::Gzip),
        (false, false) => None,
    }
}

/// Name and acceptability of one element: `gzip;q=0.5`.
fn offer(element: &str) -> (String, bool) {
    let mut parts = element.split(';').map(str::trim);
    let name = parts.next().unwrap_or_default().to_ascii_lowercase();
    let weight = parts.find_map(|part| part.strip_prefix("q="));
    let refused = weight.is_some_and(|q| q.parse::<f32>().is_ok_and(|q| q <= 0.0));
    (name, !refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gzip_is_for_who_asks_for_nothing_else() {
        for (accept, expected) in [
            ("gzip", Some(Coding::Gzip)),
            ("GZIP;q=0.5", Some(Coding::Gzip)),
            ("gzip, identity;q=0", Some(Coding::Gzip)),
            ("gzip, deflate, br, zstd", Some(Coding::Identity)),
            ("identity", Some(Coding::Identity)),
            ("", Some(Coding::Identity)),
            ("*", Some(Coding::Identity)),
            ("br", Some(Coding::Identity)),
            ("br, identity;q=0, gzip", Some(Coding::Gzip)),
            ("identity;q=0", None),
            ("*;q=0", None),
            ("gzip;q=0, identity;q=0", None),
        ] {
            assert_eq!(coding(Some(accept)), expected, "{accept}");
        }
        assert_eq!(coding(None), Some(Coding::Identity));
    }
}
