//! Connect envelopes: however a stream is cut into pieces, the same frames come out of it, none is
//! over the limit, and what came out is written as something that reads the same.

#![no_main]

use envd::protocol::envelope::{Decoder, EnvelopeError, Frame, encode_end, encode_message};
use libfuzzer_sys::fuzz_target;

/// Short, so that the fuzzer gets beyond it.
const LIMIT: usize = 64;

fn decode(pieces: &[&[u8]]) -> (Vec<Frame>, Result<(), EnvelopeError>) {
    let mut decoder = Decoder::new(LIMIT);
    let mut frames = Vec::new();
    for piece in pieces {
        decoder.push(piece);
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(error) => return (frames, Err(error)),
            }
        }
    }
    (frames, decoder.finish())
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&at, stream)) = bytes.split_first() else {
        return;
    };
    let (frames, end) = decode(&[stream]);
    let at = usize::from(at) % (stream.len() + 1);
    let (pieces, pieces_end) = decode(&[&stream[..at], &stream[at..]]);
    assert_eq!(frames, pieces);
    assert_eq!(end.is_ok(), pieces_end.is_ok());

    let mut written = Vec::new();
    for frame in &frames {
        match frame {
            Frame::Message(payload) => {
                assert!(payload.len() <= LIMIT);
                written.extend(encode_message(payload).expect("it is short"));
            }
            Frame::End(end) => written.extend(encode_end(end).expect("it is short")),
        }
    }
    // An end frame may be written longer than it was.
    let mut decoder = Decoder::new(LIMIT * 64);
    decoder.push(&written);
    for frame in &frames {
        assert_eq!(decoder.next_frame().as_ref(), Ok(&Some(frame.clone())));
    }
});
