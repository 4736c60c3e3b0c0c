//! The file name of a multi-part upload's part, from its `Content-Disposition`, untouched: it may
//! be an absolute path.
//!
//! Clients disagree on how to write it. A backslash quotes a `"` or a backslash (RFC 2616) and is
//! itself otherwise (browsers). `%22`, `%0D` and `%0A` stand for the three characters that HTML
//! forms can't carry; other percent signs are themselves. `filename*` (RFC 8187) wins.

/// Longest header that is looked at, in bytes.
const MAX_HEADER: usize = 16 * 1024;

/// The part's file name; `None` when it has none, or none that can be read.
pub(crate) fn file_name(header: &[u8]) -> Option<String> {
    if header.len() > MAX_HEADER {
        return None;
    }
    let text = std::str::from_utf8(header).ok()?;
    let mut rest = text.split_once(';')?.1;
    let mut plain = None;
    while !rest.is_empty() {
        let (name, value, after) = parameter(rest)?;
        rest = after;
        if name.eq_ignore_ascii_case("filename*") {
            return extended(&value);
        }
        if name.eq_ignore_ascii_case("filename") && plain.is_none() {
            plain = Some(unescaped(&value));
        }
    }
    plain
}

/// The first parameter of a list, and what follows its semicolon.
fn parameter(text: &str) -> Option<(&str, String, &str)> {
    let (name, value) = text.split_once('=')?;
    let value = value.trim_start();
    let Some(quoted) = value.strip_prefix('"') else {
        let (token, after) = value.split_once(';').unwrap_or((value, ""));
        return Some((name.trim(), token.trim_end().to_owned(), after));
    };
    let mut content = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => {
                let after = quoted[at + 1..].trim_start();
                let after = after.strip_prefix(';').unwrap_or(after);
                return Some((name.trim(), content, after));
            }
            '\\' if quoted[at + 1..].starts_with(['"', '\\']) => {
                content.extend(characters.next().map(|(_, escaped)| escaped));
            }
            character => content.push(character),
        }
    }
    // No closing quote.
    None
}

/// What HTML forms encode.
fn unescaped(value: &str) -> String {
    let mut text = String::with_capacity(value.len());
    let mut rest = value;
    while let Some(at) = rest.find('%') {
        text.push_str(&rest[..at]);
        let code = rest.get(at + 1..at + 3).unwrap_or_default();
        let character = match code.to_ascii_lowercase().as_str() {
            "22" => Some('"'),
            "0d" => Some('\r'),
            "0a" => Some('\n'),
            _ => None,
        };
        text.push(character.unwrap_or('%'));
        rest = &rest[at + if character.is_some() { 3 } else { 1 }..];
    }
    text.push_str(rest);
    text
}

/// `UTF-8'language'percent-encoded`.
fn extended(value: &str) -> Option<String> {
    let mut parts = value.splitn(3, '\'');
    let charset = parts.next()?;
    let (_language, encoded) = (parts.next()?, parts.next()?);
    if !charset.eq_ignore_ascii_case("utf-8") {
        return None;
    }
    let mut bytes = Vec::with_capacity(encoded.len());
    let mut rest = encoded.as_bytes();
    while let [first, after @ ..] = rest {
        rest = after;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digits = std::str::from_utf8(after.get(..2)?).ok()?;
        if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return None;
        }
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        rest = &after[2..];
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(header: &str) -> Option<String> {
        file_name(header.as_bytes())
    }

    #[test]
    fn names_are_kept_as_they_are() {
        for (header, expected) in [
            (
                r#"form-data; name="file"; filename="/etc/a b.txt""#,
                "/etc/a b.txt",
            ),
            (r#"form-data; filename="../x"; name="file""#, "../x"),
            ("form-data; name=file; filename=plain.txt", "plain.txt"),
            (r#"form-data; filename="a;b=c""#, "a;b=c"),
            (
                r#"form-data; filename="say %22hi%22 100%""#,
                "say \"hi\" 100%",
            ),
            (
                r#"form-data; filename="say \"hi\" \\ \n""#,
                r#"say "hi" \ \n"#,
            ),
            ("form-data; filename=\"über/文\"", "über/文"),
            (
                r#"form-data; filename="x"; filename*=UTF-8''a%20%e2%82%ac"#,
                "a €",
            ),
            (r#"form-data; filename="""#, ""),
        ] {
            assert_eq!(name(header).as_deref(), Some(expected), "{header}");
        }
    }

    #[test]
    fn unreadable_names_are_none() {
        for header in [
            "form-data",
            r#"form-data; name="file""#,
            r#"form-data; filename="open"#,
            "form-data; filename",
            "form-data; filename*=latin1''a",
            "form-data; filename*=UTF-8''%zz",
            "form-data; filename*=UTF-8''%ff",
        ] {
            assert_eq!(name(header), None, "{header}");
        }
        assert_eq!(file_name(b"form-data; filename=\"\xff\""), None);
        let long = format!("form-data; filename=\"{}\"", "a".repeat(MAX_HEADER));
        assert_eq!(name(&long), None);
    }
}
