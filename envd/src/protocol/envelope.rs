//! Connect's stream framing: every message, and the end of the stream, in an envelope.
//!
//! ```text
//! ┌───────┬────────────────┬──────────────────────────────────────────────┐
//! │ flags │ length         │ payload                                      │
//! │ u8    │ u32 big-endian │ `length` bytes                               │
//! └───────┴────────────────┴──────────────────────────────────────────────┘
//!   0x01 compressed (never asked for here, so an error)
//!   0x02 end of stream: payload is the JSON of `EndOfStream`, nothing follows
//! ```
//!
//! The decoder takes bytes as they arrive. A length beyond its limit is an error before a byte of
//! the payload is kept, and a stream that stops without its end frame is an error too.
//!
//! Source: <https://connectrpc.com/docs/protocol/#streaming-rpcs>.

use serde::{Deserialize, Serialize};

/// Bytes before every payload.
pub const HEADER_LENGTH: usize = 5;
/// Flag of a compressed payload.
pub const COMPRESSED: u8 = 0x01;
/// Flag of the last envelope of a stream.
pub const END_OF_STREAM: u8 = 0x02;
/// Largest payload that either side sends, in bytes; the limit a decoder is normally given.
pub const MAX_PAYLOAD: usize = 4 << 20;

/// What was wrong with a stream.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeError {
    /// The payload is longer than this side accepts.
    #[error("Envelope of {length} bytes is over the limit of {limit}")]
    TooLong {
        /// Announced, or given to encode.
        length: usize,
        /// Accepted.
        limit: usize,
    },
    /// A flag that nobody agreed on.
    #[error("Envelope with unsupported flags {0:#04x}")]
    Flags(u8),
    /// The stream stopped in the middle of an envelope, or before its end frame.
    #[error("Stream ended early with {pending} bytes of an unfinished envelope")]
    Truncated {
        /// Bytes received since the last complete envelope.
        pending: usize,
    },
    /// Bytes after the end frame.
    #[error("Bytes after the end of the stream")]
    AfterEnd,
    /// The end frame's payload is not its JSON.
    #[error("Malformed end of stream: {0}")]
    End(String),
}

/// One complete envelope.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// A message's payload.
    Message(Vec<u8>),
    /// The end: with an error when the call failed.
    End(EndOfStream),
}

/// Payload of the end frame.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EndOfStream {
    /// Absent when the call succeeded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<CallError>,
}

/// A failed call, in the end frame of a stream or as the body of a failed unary call.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CallError {
    /// `not_found`, `deadline_exceeded` and so on.
    pub code: String,
    /// For people.
    pub message: String,
}

/// One message in its envelope.
///
/// # Errors
/// [`EnvelopeError::TooLong`] over [`MAX_PAYLOAD`].
pub fn encode_message(payload: &[u8]) -> Result<Vec<u8>, EnvelopeError> {
    encode(0, payload)
}

/// The end frame of a stream.
///
/// # Errors
/// [`EnvelopeError::TooLong`] over [`MAX_PAYLOAD`].
pub fn encode_end(end: &EndOfStream) -> Result<Vec<u8>, EnvelopeError> {
    let payload = serde_json::to_vec(end).map_err(|e| EnvelopeError::End(e.to_string()))?;
    encode(END_OF_STREAM, &payload)
}

fn encode(flags: u8, payload: &[u8]) -> Result<Vec<u8>, EnvelopeError> {
    let too_long = EnvelopeError::TooLong {
        length: payload.len(),
        limit: MAX_PAYLOAD,
    };
    let length = u32::try_from(payload.len()).map_err(|_| too_long.clone())?;
    if payload.len() > MAX_PAYLOAD {
        return Err(too_long);
    }
    let mut bytes = Vec::with_capacity(HEADER_LENGTH + payload.len());
    bytes.push(flags);
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(payload);
    Ok(bytes)
}

/// Takes a stream apart as its bytes arrive.
///
/// ```
/// use envd::protocol::envelope::{Decoder, Frame, MAX_PAYLOAD, encode_message};
///
/// let mut decoder = Decoder::new(MAX_PAYLOAD);
/// decoder.push(&encode_message(b"{}")?);
/// assert_eq!(decoder.next_frame()?, Some(Frame::Message(b"{}".to_vec())));
/// assert_eq!(decoder.next_frame()?, None);
/// # Ok::<(), envd::protocol::envelope::EnvelopeError>(())
/// ```
#[derive(Debug)]
pub struct Decoder {
    limit: usize,
    pending: Vec<u8>,
    ended: bool,
}

impl Decoder {
    /// A decoder that refuses payloads over `limit` bytes.
    pub fn new(limit: usize) -> Decoder {
        Decoder {
            limit,
            pending: Vec::new(),
            ended: false,
        }
    }

    /// Takes bytes from the wire. Call [`next_frame`](Self::next_frame) until it has no more.
    pub fn push(&mut self, bytes: &[u8]) {
        self.pending.extend_from_slice(bytes);
    }

    /// The next complete envelope, or `None` until more bytes have arrived.
    ///
    /// # Errors
    /// Any [`EnvelopeError`] but `Truncated`; the stream is unusable from then on.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, EnvelopeError> {
        if self.ended && !self.pending.is_empty() {
            return Err(EnvelopeError::AfterEnd);
        }
        let Some((&[flags, l0, l1, l2, l3], rest)) = self.pending.split_first_chunk() else {
            return Ok(None);
        };
        if flags & !END_OF_STREAM != 0 {
            return Err(EnvelopeError::Flags(flags));
        }
        let length = usize::try_from(u32::from_be_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX);
        if length > self.limit {
            return Err(EnvelopeError::TooLong {
                length,
                limit: self.limit,
            });
        }
        let Some(payload) = rest.get(..length) else {
            return Ok(None);
        };

        let frame = if flags & END_OF_STREAM == 0 {
            Frame::Message(payload.to_vec())
        } else {
            self.ended = true;
            let end = serde_json::from_slice(payload);
            Frame::End(end.map_err(|e| EnvelopeError::End(e.to_string()))?)
        };
        self.pending.drain(..HEADER_LENGTH + length);
        Ok(Some(frame))
    }

    /// Says whether the bytes may stop here.
    ///
    /// # Errors
    /// [`EnvelopeError::Truncated`] before the end frame, [`EnvelopeError::AfterEnd`] with bytes
    /// behind it.
    pub fn finish(&self) -> Result<(), EnvelopeError> {
        match (self.ended, self.pending.len()) {
            (true, 0) => Ok(()),
            (true, _) => Err(EnvelopeError::AfterEnd),
            (false, pending) => Err(EnvelopeError::Truncated { pending }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream() -> Vec<u8> {
        let failed = CallError {
            code: "not_found".to_owned(),
            message: "gone".to_owned(),
        };
        let mut bytes = encode_message(b"one").unwrap();
        bytes.extend(encode_message(b"").unwrap());
        bytes.extend(
            encode_end(&EndOfStream {
                error: Some(failed),
            })
            .unwrap(),
        );
        bytes
    }

    fn decode(chunks: &[&[u8]]) -> Result<Vec<Frame>, EnvelopeError> {
        let mut decoder = Decoder::new(1024);
        let mut frames = Vec::new();
        for chunk in chunks {
            decoder.push(chunk);
            while let Some(frame) = decoder.next_frame()? {
                frames.push(frame);
            }
        }
        decoder.finish()?;
        Ok(frames)
    }

    #[test]
    fn round_trip_survives_every_split() {
        let bytes = stream();
        let whole = decode(&[&bytes]).unwrap();
        assert_eq!(whole.len(), 3);
        assert_eq!(whole[0], Frame::Message(b"one".to_vec()));
        assert!(
            matches!(&whole[2], Frame::End(EndOfStream { error: Some(e) }) if e.code == "not_found")
        );
        for at in 0..bytes.len() {
            assert_eq!(
                decode(&[&bytes[..at], &bytes[at..]]).unwrap(),
                whole,
                "split at {at}"
            );
        }
    }

    #[test]
    fn every_truncation_is_an_error() {
        let bytes = stream();
        for length in 0..bytes.len() {
            let result = decode(&[&bytes[..length]]);
            assert!(
                matches!(result, Err(EnvelopeError::Truncated { .. })),
                "cut at {length}"
            );
        }
    }

    #[test]
    fn oversized_length_is_refused_before_its_payload() {
        let mut decoder = Decoder::new(16);
        decoder.push(&[0, 0xff, 0xff, 0xff, 0xff]);
        let refused = EnvelopeError::TooLong {
            length: 0xffff_ffff,
            limit: 16,
        };
        assert_eq!(decoder.next_frame(), Err(refused));
        assert!(encode_message(&vec![0; MAX_PAYLOAD + 1]).is_err());
        assert!(encode_message(&vec![0; MAX_PAYLOAD]).is_ok());
    }

    #[test]
    fn compressed_or_unknown_flags_are_refused() {
        for flags in [COMPRESSED, COMPRESSED | END_OF_STREAM, 0x80] {
            assert_eq!(
                decode(&[&[flags, 0, 0, 0, 0]]),
                Err(EnvelopeError::Flags(flags))
            );
        }
    }

    #[test]
    fn bytes_after_the_end_and_a_malformed_end_are_refused() {
        let mut bytes = stream();
        bytes.push(0);
        assert_eq!(decode(&[&bytes]), Err(EnvelopeError::AfterEnd));
        let malformed = decode(&[&[END_OF_STREAM, 0, 0, 0, 1, b'{']]);
        assert!(matches!(malformed, Err(EnvelopeError::End(_))));
    }
}
