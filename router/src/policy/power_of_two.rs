//! The baseline: the less loaded of two different workers chosen at random.

/// Index of the choice; `random` decides which two are compared. `None` when there is none.
pub fn power_of_two(loads: &[u64], random: u64) -> Option<usize> {
    let count = loads.len() as u64;
    match count {
        0 => None,
        1 => Some(0),
        _ => {
            let first = random % count;
            let second = (first + 1 + (random >> 32) % (count - 1)) % count;
            let (first, second) = (first as usize, second as usize);
            Some(if loads[second] < loads[first] {
                second
            } else {
                first
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_most_loaded_of_several_is_never_chosen(
            mut loads in prop::collection::vec(0_u64..100, 2..8), random: u64,
        ) {
            loads.push(1000);
            let chosen = power_of_two(&loads, random).unwrap();
            prop_assert!(chosen < loads.len() - 1);
        }
    }

    #[test]
    fn one_worker_is_no_choice() {
        assert_eq!(power_of_two(&[7], 3), Some(0));
        assert_eq!(power_of_two(&[], 3), None);
    }
}
