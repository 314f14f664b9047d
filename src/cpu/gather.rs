//! Twin of `shaders/gather.wgsl`.

use super::Float;
use crate::model::Shape;
use rayon::prelude::*;

/// One batch out of the byte dataset: `x[i,h,w,c] = images[places[i],h,w,c] · scale[c] + shift[c]`,
/// and the labels of its `samples`.
///
/// images `[…,H,W,C]`, labels `[samples]`; of the batch N places in the images and N sample numbers,
/// which are the same where all images are there; scale and shift `[C]`. Returns x `[N,H,W,C]` and
/// labels `[N]`.
pub fn gather_batch<T: Float>(
    images: &[u8],
    places: &[u32],
    labels: &[u32],
    samples: &[u32],
    shape: Shape,
    scale: &[T],
    shift: &[T],
) -> (Vec<T>, Vec<u32>) {
    let elements = shape.elements();
    assert_eq!(places.len(), samples.len());
    assert_eq!(scale.len(), shape.channels);
    assert_eq!(shift.len(), shape.channels);
    let mut x = vec![T::zero(); places.len() * elements];
    x.par_chunks_mut(elements)
        .zip(places)
        .for_each(|(x, &place)| {
            let image = &images[place as usize * elements..][..elements];
            let normalization = scale.iter().zip(shift).cycle();
            for ((x, &byte), (&scale, &shift)) in x.iter_mut().zip(image).zip(normalization) {
                let byte: T = f32::from(byte).into();
                *x = byte * scale + shift;
            }
        });
    let labels = samples.iter().map(|&sample| labels[sample as usize]);
    (x, labels.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn picks_samples_in_order_and_normalises_each_channel() {
        let images = [0, 1, 2, 3, 10, 11, 12, 13, 252, 253, 254, 255];
        let (x, labels) = gather_batch::<f64>(
            &images,
            &[2, 0, 2],
            &[7, 8, 9],
            &[2, 0, 1],
            Shape::new(1, 2, 2),
            &[0.5, 2.0],
            &[-1.0, 0.25],
        );
        let last = [125.0, 506.25, 126.0, 510.25];
        assert_eq!(x, [&last[..], &[-1.0, 2.25, 0.0, 6.25], &last].concat());
        assert_eq!(labels, [9, 7, 8]);
    }
}
