//! Pure loops compiled once for every CPU and once for the widest vectors of this one.
//!
//! Rust compiles for the oldest CPU of an architecture. What is called from a function with more
//! features and inlined into it is compiled with those, so a loop that the compiler can
//! vectorise gets wider by being called through [`Cpu::widest`].

#![expect(
    unsafe_code,
    reason = "a function may only be called on a CPU that has its instructions"
)]

/// What the CPU has. Only [`Cpu::detect`] makes one, so having it proves that it was asked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cpu(Level);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    /// What every CPU of the architecture has.
    Any,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Cpu {
    /// Asks the CPU.
    pub(crate) fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let popcnt = is_x86_feature_detected!("popcnt");
            if popcnt
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                return Self(Level::Avx512);
            }
            if popcnt && is_x86_feature_detected!("avx2") {
                return Self(Level::Avx2);
            }
        }
        Self(Level::Any)
    }

    /// Calls `work`, compiled for this CPU. It and what it calls have to be inlined:
    /// `#[inline(always)]`.
    #[inline]
    pub(crate) fn widest<R>(self, work: impl FnOnce() -> R) -> R {
        match self.0 {
            // SAFETY: `detect`, which alone makes this value, has found the function's features.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => unsafe { with_avx512(work) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { with_avx2(work) },
            Level::Any => work(),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,popcnt")]
fn with_avx512<R>(work: impl FnOnce() -> R) -> R {
    work()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,popcnt")]
fn with_avx2<R>(work: impl FnOnce() -> R) -> R {
    work()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_of_this_cpu_computes_the_same() {
        let numbers: Vec<u32> = (0..1000u32)
            .map(|i| i.wrapping_mul(2_654_435_761))
            .collect();
        let count = || numbers.iter().filter(|number| **number > 1 << 31).count();
        let expected = Cpu(Level::Any).widest(count);
        assert_eq!(Cpu::detect().widest(count), expected);
        #[cfg(target_arch = "x86_64")]
        if Cpu::detect().0 == Level::Avx512 {
            assert_eq!(Cpu(Level::Avx2).widest(count), expected);
        }
    }
}
