//! Which VMMs should wait: decisions only.

use crate::network::SlotIndex;

/// What is to be done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// This slot's VMM waits for nobody any more.
    End(SlotIndex),
    /// A VMM should wait in this slot.
    Start(SlotIndex),
}

/// The next step from the slots that have a waiting VMM to those that should, the most wanted first.
pub(super) fn next(wanted: &[SlotIndex], have: &[SlotIndex]) -> Option<Step> {
    let surplus = have.iter().find(|slot| !wanted.contains(slot));
    let missing = wanted.iter().find(|slot| !have.contains(slot));
    // What is too much goes first: it takes memory.
    let end = surplus.copied().map(Step::End);
    end.or_else(|| missing.copied().map(Step::Start))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slots(numbers: &[u32]) -> Vec<SlotIndex> {
        numbers.iter().copied().map(SlotIndex).collect()
    }

    #[test]
    fn steps_lead_from_what_is_to_what_should_be() {
        let wanted = slots(&[5, 2, 9]);
        let mut have = slots(&[1, 2, 7]);
        let mut steps = Vec::new();
        while let Some(step) = next(&wanted, &have) {
            match step {
                Step::End(slot) => have.retain(|other| *other != slot),
                Step::Start(slot) => have.push(slot),
            }
            steps.push(step);
        }
        let (end, start) = (|n| Step::End(SlotIndex(n)), |n| Step::Start(SlotIndex(n)));
        assert_eq!(steps, [end(1), end(7), start(5), start(9)]);
    }
}
