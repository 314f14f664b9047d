//! Twins of `shaders/views.wgsl`.

use super::Float;
use crate::model::Shape;
use crate::model::recipe::Views;
use rayon::prelude::*;

/// All views of a batch out of the byte dataset, and its labels: as [`super::gather_batch`], which see for
/// the arguments, with `x[v,i,h,w,c]` from where view v has its element (h, w) from.
///
/// Returns x `[views,N,H,W,C]` and labels `[N]`.
#[allow(clippy::too_many_arguments)] // One for each tensor, as the kernel has them.
pub fn gather_views<T: Float>(
    images: &[u8],
    places: &[u32],
    labels: &[u32],
    samples: &[u32],
    shape: Shape,
    views: Views,
    scale: &[T],
    shift: &[T],
) -> (Vec<T>, Vec<u32>) {
    let Shape {
        height,
        width,
        channels,
    } = shape;
    let elements = shape.elements();
    let mut x = vec![T::zero(); views.count() * places.len() * elements];
    x.par_chunks_mut(elements).enumerate().for_each(|(n, x)| {
        let (view, i) = (n / places.len(), n % places.len());
        let image = &images[places[i] as usize * elements..][..elements];
        for h in 0..height {
            for w in 0..width {
                let [from_h, from_w] = source(view, [h, w], [height, width]);
                for c in 0..channels {
                    let byte: T = f32::from(image[(from_h * width + from_w) * channels + c]).into();
                    x[(h * width + w) * channels + c] = byte * scale[c] + shift[c];
                }
            }
        }
    });
    let labels = samples.iter().map(|&sample| labels[sample as usize]);
    (x, labels.collect())
}

/// Where in an image of that size the pixel at `at` of a view comes from.
fn source(view: usize, [h, w]: [usize; 2], [height, width]: [usize; 2]) -> [usize; 2] {
    let w = if view % 2 == 1 { width - 1 - w } else { w };
    let moved = |at: usize, size: usize| match view / 2 {
        1 if at == 0 => (size - 1).min(1),
        1 => at - 1,
        2 if at + 1 == size => size.max(2) - 2,
        2 => at + 1,
        _ => at,
    };
    [moved(h, height), moved(w, width)]
}

/// The mean over the views by their weights: z `[views,…]`, returns `[…]`.
pub fn average_views<T: Float>(views: Views, z: &[T]) -> Vec<T> {
    let elements = z.len() / views.count();
    let mut y = vec![T::zero(); elements];
    for (view, z) in z.chunks_exact(elements).enumerate() {
        let weight = match views {
            Views::One => 1.0,
            Views::Mirror => 0.5,
            Views::Six if view < 2 => 0.25,
            Views::Six => 0.125,
        };
        for (y, &z) in y.iter_mut().zip(z) {
            *y += <T as From<f32>>::from(weight) * z;
        }
    }
    y
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By hand, from what `infer_mirror_translate` of airbench94 does: `F.pad(x, (1,) * 4, "reflect")`, of
    /// which the corner at 0 and that at 2 are cut out, each as it is and flipped.
    #[test]
    fn views_of_a_picture() {
        // 0 1 2
        // 3 4 5
        let (images, shape) = ([9, 9, 9, 9, 9, 9, 0, 1, 2, 3, 4, 5], Shape::new(2, 3, 1));
        let views = |views| {
            let scaled = [&[2.0], &[1.0]];
            let (places, samples, labels) = (&[1], &[3], &[0, 0, 0, 7]);
            let (scale, shift) = (scaled[0], scaled[1]);
            gather_views::<f64>(&images, places, labels, samples, shape, views, scale, shift)
        };
        let plain = [
            [0, 1, 2, 3, 4, 5],
            [2, 1, 0, 5, 4, 3],
            // 4 3 4
            // 1 0 1
            [4, 3, 4, 1, 0, 1],
            [4, 3, 4, 1, 0, 1],
            // 4 5 4
            // 1 2 1
            [4, 5, 4, 1, 2, 1],
            [4, 5, 4, 1, 2, 1],
        ];
        let expected = |count: usize| -> Vec<f64> {
            let pixels = plain[..count].iter().flatten();
            pixels.map(|p| f64::from(2 * p + 1)).collect()
        };
        assert_eq!(views(Views::Mirror), (expected(2), vec![7]));
        assert_eq!(views(Views::Six), (expected(6), vec![7]));
    }

    /// A line of one pixel is its own neighbour; a mirrored view is moved as the plain one is.
    #[test]
    fn where_pixels_come_from() {
        for view in 0..6 {
            assert_eq!(source(view, [0, 0], [1, 1]), [0, 0], "{view}");
        }
        let from = |view| [0, 3].map(|w| source(view, [2, w], [5, 4])[1]);
        let expected = [[0, 3], [3, 0], [1, 2], [2, 1], [1, 2], [2, 1]];
        for (view, expected) in expected.into_iter().enumerate() {
            assert_eq!(from(view), expected, "{view}");
        }
        assert_eq!(source(2, [2, 1], [5, 4])[0], 1);
        assert_eq!(source(5, [2, 1], [5, 4])[0], 3);
    }

    #[test]
    fn weights_of_the_views() {
        assert_eq!(
            average_views(Views::Mirror, &[1.0, 2.0, 5.0, 4.0]),
            [3.0, 3.0]
        );
        let z = [8.0, 16.0, 1.0, 2.0, 4.0, 64.0];
        assert_eq!(average_views(Views::Six, &z), [6.0 + 71.0 / 8.0]);
    }
}
