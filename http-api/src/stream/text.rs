//! Output as text: a character that arrives in two parts is sent as one.

/// The beginning of a character, until its rest arrives.
#[derive(Debug, Default)]
pub(super) struct Pieces {
    rest: Vec<u8>,
}

impl Pieces {
    /// The text so far; bytes that are no UTF-8 are replaced.
    pub(super) fn push(&mut self, bytes: &[u8]) -> String {
        let mut all = std::mem::take(&mut self.rest);
        all.extend_from_slice(bytes);
        let mut text = String::new();
        let mut left = all.as_slice();
        loop {
            match std::str::from_utf8(left) {
                Ok(good) => {
                    text.push_str(good);
                    return text;
                }
                Err(error) => {
                    let (good, bad) = left.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(good));
                    let Some(length) = error.error_len() else {
                        // It ends within a character.
                        bad.clone_into(&mut self.rest);
                        return text;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    left = &bad[length..];
                }
            }
        }
    }

    /// What is left at the end.
    pub(super) fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.rest)).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn however_it_is_cut_the_text_is_the_same() {
        let text = "aü€😀z".as_bytes();
        for first in 0..=text.len() {
            for second in first..=text.len() {
                let mut pieces = Pieces::default();
                let parts = [&text[..first], &text[first..second], &text[second..]];
                let mut joined: String = parts.iter().map(|part| pieces.push(part)).collect();
                joined += &pieces.finish();
                assert_eq!(joined.as_bytes(), text, "{first} {second}");
            }
        }
    }

    #[test]
    fn what_is_no_text_is_replaced_and_the_rest_is_kept() {
        let mut pieces = Pieces::default();
        assert_eq!(pieces.push(b"a\xffb\xe2\x82"), "a\u{fffd}b");
        assert_eq!(pieces.push(b"c"), "\u{fffd}c");
        assert_eq!(pieces.push(b"\xe2"), "");
        assert_eq!(pieces.finish(), "\u{fffd}");
    }
}
