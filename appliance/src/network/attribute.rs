//! Encoding netlink attributes, for nf_tables and traffic control: 16 bits of length, 16 bits of kind, payload, padding to 4 bytes.

const NESTED: u16 = 0x8000;

/// `NFTA_DATA_VALUE` inside attribute `kind`.
pub(super) fn value(out: &mut Vec<u8>, kind: u16, bytes: &[u8]) {
    nested(out, kind, |out| plain(out, 1, bytes));
}

pub(super) fn number(out: &mut Vec<u8>, kind: u16, value: u32) {
    plain(out, kind, &value.to_be_bytes());
}

pub(super) fn string(out: &mut Vec<u8>, kind: u16, text: &str) {
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    plain(out, kind, &bytes);
}

pub(super) fn plain(out: &mut Vec<u8>, kind: u16, payload: &[u8]) {
    out.extend_from_slice(&((payload.len() + 4) as u16).to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(payload);
    out.resize(out.len().next_multiple_of(4), 0);
}

pub(super) fn nested(out: &mut Vec<u8>, kind: u16, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[0; 2]);
    out.extend_from_slice(&(kind | NESTED).to_ne_bytes());
    body(out);
    let len = (out.len() - start) as u16;
    out[start..start + 2].copy_from_slice(&len.to_ne_bytes());
}
