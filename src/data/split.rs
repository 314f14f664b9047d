//! Which images are held back from training: a seeded share of each class.

use super::Dataset;
use crate::error::{Error, Result};
use sha2::{Digest, Sha256};

/// Ranks `names` by a hash of the seed and the name: a random order that depends neither on where a
/// file lies in its folder nor on what else lies there.
pub(super) fn shuffled<T: AsRef<[u8]>>(
    names: impl IntoIterator<Item = T>,
    seed: u64,
) -> Vec<usize> {
    let rank = |name: T| {
        let hash = Sha256::new().chain_update(seed.to_le_bytes());
        hash.chain_update(name.as_ref()).finalize()
    };
    let mut ranks: Vec<_> = names.into_iter().map(rank).zip(0..).collect();
    ranks.sort_unstable();
    ranks.into_iter().map(|(_, index)| index).collect()
}

/// How many of `n` images of a class a share is: the nearest whole number, but at least one.
pub(super) fn part(n: usize, share: f64) -> usize {
    match share {
        0.0 => 0,
        share => ((n as f64 * share).round() as usize).max(1),
    }
}

/// Makes sure that a share is one.
///
/// # Errors
/// [`Error::Usage`].
pub(super) fn expect_share(flag: &str, share: f64) -> Result<()> {
    if (0.0..1.0).contains(&share) {
        return Ok(());
    }
    Err(Error::Usage(format!(
        "expected {flag} from 0 to below 1, the share of the images, found {share}; give 0.1, say"
    )))
}

/// Takes a share of each class out of `train`, the last of a seeded order; at least one image of
/// each class stays. What stays and what is taken keep their order.
pub(super) fn carve(train: &mut Dataset, share: f64, seed: u64) -> Dataset {
    let mut members = vec![Vec::new(); train.classes];
    for (i, label) in train.labels.iter().enumerate() {
        members[*label as usize].push(i);
    }
    let mut taken = vec![false; train.len()];
    for members in members.iter().filter(|members| members.len() > 1) {
        let order = shuffled(members.iter().map(|i| i.to_le_bytes()), seed);
        let count = part(members.len(), share).min(members.len() - 1);
        for i in &order[members.len() - count..] {
            taken[members[*i]] = true;
        }
    }
    let size = train.shape.elements();
    let count = taken.iter().filter(|taken| **taken).count();
    let (mut images, mut labels) = (Vec::with_capacity(count * size), Vec::with_capacity(count));
    let mut files = Vec::new();
    // In place: the set is never held twice.
    let mut kept = 0;
    for (i, taken) in taken.into_iter().enumerate() {
        let image = i * size..(i + 1) * size;
        if taken {
            images.extend_from_slice(&train.images[image]);
            labels.push(train.labels[i]);
            files.extend(train.files.get_mut(i).map(std::mem::take));
        } else {
            if !train.files.is_empty() {
                train.files.swap(kept, i);
            }
            train.images.copy_within(image, kept * size);
            train.labels[kept] = train.labels[i];
            kept += 1;
        }
    }
    train.images.truncate(kept * size);
    train.labels.truncate(kept);
    train.files.truncate(kept);
    Dataset {
        images,
        labels,
        shape: train.shape,
        classes: train.classes,
        class_names: train.class_names.clone(),
        files,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Shape;

    /// Image `i` of class `labels[i]` holds `i` in both of its bytes.
    fn dataset(labels: Vec<u32>) -> Dataset {
        Dataset {
            images: (0..labels.len()).flat_map(|i| [i as u8; 2]).collect(),
            labels,
            shape: Shape::new(1, 2, 1),
            classes: 4,
            class_names: (0..4).map(|c: usize| c.to_string()).collect(),
            files: (0..64).map(|i: usize| i.to_string()).collect(),
        }
    }

    #[test]
    fn a_share_of_each_class_is_taken_and_nothing_is_lost() {
        // 40 of class 0, 20 of class 1, 3 of class 2, 1 of class 3.
        let labels: Vec<u32> = (0..64)
            .map(|i| match i {
                0 => 3,
                1..4 => 2,
                _ => u32::from(i % 3 == 0),
            })
            .collect();
        let whole = dataset(labels);
        let mut train = whole.clone();
        let validation = carve(&mut train, 0.1, 5);
        let count = |set: &Dataset, class| set.labels.iter().filter(|l| **l == class).count();
        assert_eq!([0, 1, 2, 3].map(|c| count(&validation, c)), [4, 2, 1, 0]);
        for set in [&train, &validation] {
            assert!(set.images.is_sorted() && set.files.len() == set.len());
            let named = set.images.chunks(2).zip(&set.labels).zip(&set.files);
            for ((image, label), file) in named {
                assert_eq!(whole.labels[usize::from(image[0])], *label);
                assert_eq!(*file, image[0].to_string());
                assert_eq!(image[0], image[1]);
            }
        }
        let mut all = [&train.images[..], &validation.images].concat();
        all.sort_unstable();
        assert_eq!(all, whole.images);

        let mut again = whole.clone();
        assert_eq!(carve(&mut again, 0.1, 5), validation);
        assert_eq!(again, train);
        assert_ne!(carve(&mut whole.clone(), 0.1, 6), validation);
        // Almost all: one of each class stays.
        let mut rest = whole.clone();
        carve(&mut rest, 0.999, 5);
        assert_eq!([0, 1, 2, 3].map(|c| count(&rest, c)), [1, 1, 1, 1]);
    }

    #[test]
    fn an_order_is_kept_when_a_name_is_added() {
        let names: Vec<String> = (0..50).map(|i| format!("{i}.png")).collect();
        let order = shuffled(&names, 1);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert!(sorted.iter().copied().eq(0..50) && sorted != order);
        let more: Vec<_> = names.iter().map(String::as_str).chain(["new"]).collect();
        let mut with = shuffled(&more, 1);
        with.retain(|i| *i < 50);
        assert_eq!(with, order);
        assert_ne!(shuffled(&names, 2), order);
    }
}
