//! Memory that O_DIRECT takes.

/// What addresses and lengths must be multiples of, on any disk.
const ALIGNMENT: usize = 4096;

/// Bytes that begin at a multiple of 4096.
#[derive(Debug)]
pub(crate) struct Aligned {
    room: Vec<u8>,
    start: usize,
    length: usize,
}

impl Aligned {
    /// Zeros.
    pub(crate) fn new(length: usize) -> Self {
        let room = vec![0; length + ALIGNMENT];
        // A vector that doesn't grow doesn't move.
        let start = room.as_ptr().align_offset(ALIGNMENT);
        Self {
            room,
            start,
            length,
        }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.room[self.start..self.start + self.length]
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.room[self.start..self.start + self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_is_aligned() {
        for length in [1, 4096, 5000] {
            let memory = Aligned::new(length);
            assert_eq!(memory.bytes().len(), length);
            assert_eq!(memory.bytes().as_ptr() as usize % ALIGNMENT, 0);
        }
    }
}
