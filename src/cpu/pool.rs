//! Twins of `shaders/pool.wgsl`: max- and mean-pooling.

use super::{Float, add, axpy, batch};
use crate::model::Pool2d;
use rayon::prelude::*;

/// Calls `visit(position, tap, pixel)` for every output position `oh·OW + ow` and every place
/// `kh·KW + kw` of its window that lies on the image, both in row-major order; `pixel = h·W + w` is what
/// lies there.
#[inline(always)]
fn for_each_tap(p: &Pool2d, mut visit: impl FnMut(usize, usize, usize)) {
    for position in 0..p.output.height * p.output.width {
        let columns = p.taps(1, position % p.output.width);
        for kh in p.taps(0, position / p.output.width) {
            for kw in columns.clone() {
                let tap = kh * p.kernel[1] + kw;
                visit(position, tap, pixel(p, position, tap));
            }
        }
    }
}

/// `h·W + w` of the input at place `tap` of the window at output `position`.
#[inline(always)]
fn pixel(p: &Pool2d, position: usize, tap: usize) -> usize {
    let h = position / p.output.width * p.stride[0] + tap / p.kernel[1] - p.padding[0];
    let w = position % p.output.width * p.stride[1] + tap % p.kernel[1] - p.padding[1];
    h * p.input.width + w
}

/// `y[n,oh,ow,c] = max_(kh,kw) x[n, oh·SH + kh − PH, ow·SW + kw − PW, c]` over the places on the image,
/// and the place `kh·KW + kw`, below 256, where the maximum stands. Of equal values the first in row-major order wins; a NaN beats every number,
/// and of several NaNs the last wins. Both are PyTorch's rules (`max_pool2d`).
///
/// x `[N,H,W,C]`, returns y and index, both `[N,OH,OW,C]`.
pub fn maxpool2d_forward<T: Float>(p: &Pool2d, x: &[T]) -> (Vec<T>, Vec<u8>) {
    let (c, outputs) = (p.input.channels, p.output.elements());
    let elements = batch(x.len(), p.input) * outputs;
    let (mut y, mut index) = (vec![T::zero(); elements], vec![0; elements]);
    y.par_chunks_mut(outputs)
        .zip(index.par_chunks_mut(outputs))
        .zip(x.par_chunks(p.input.elements()))
        .for_each(|((y, index), x)| {
            let mut last = usize::MAX;
            for_each_tap(p, |position, tap, pixel| {
                let first = position != last;
                last = position;
                let best = y[position * c..][..c].iter_mut();
                let index = index[position * c..][..c].iter_mut();
                for ((best, index), &x) in best.zip(index).zip(&x[pixel * c..][..c]) {
                    let wins = first || x > *best || x.is_nan();
                    *best = if wins { x } else { *best };
                    *index = if wins { tap as u8 } else { *index };
                }
            });
        });
    (y, index)
}

/// `dx = dy` at the recorded place of each window and 0 elsewhere: the whole error goes to the
/// winner. For windows that do not overlap.
///
/// dy and index `[N,OH,OW,C]`, returns `[N,H,W,C]`.
pub fn maxpool2d_backward<T: Float>(p: &Pool2d, dy: &[T], index: &[u8]) -> Vec<T> {
    assert!(
        !p.overlapping(),
        "expected windows that do not overlap: {p:?}"
    );
    assert_eq!(dy.len(), index.len());
    let (c, outputs) = (p.input.channels, p.output.elements());
    let mut dx = vec![T::zero(); batch(dy.len(), p.output) * p.input.elements()];
    dx.par_chunks_mut(p.input.elements())
        .zip(dy.par_chunks(outputs).zip(index.par_chunks(outputs)))
        .for_each(|(dx, (dy, index))| {
            for (output, (&dy, &index)) in dy.iter().zip(index).enumerate() {
                dx[pixel(p, output / c, index as usize) * c + output % c] = dy;
            }
        });
    dx
}

/// `dx[n,h,w,c] = Σ dy[n,oh,ow,c]` over the windows whose recorded place is (h,w), in row-major
/// order of the windows. For any windows: each input looks up the windows that contain it, so no
/// two threads ever add to the same place.
///
/// dy and index `[N,OH,OW,C]`, returns `[N,H,W,C]`.
pub fn maxpool2d_backward_overlapping<T: Float>(p: &Pool2d, dy: &[T], index: &[u8]) -> Vec<T> {
    assert_eq!(dy.len(), index.len());
    let (c, outputs) = (p.input.channels, p.output.elements());
    // The windows along one axis that contain the place `at` of the padded image.
    let windows = |at: usize, axis: usize, count: usize| {
        let first = (at + 1)
            .saturating_sub(p.kernel[axis])
            .div_ceil(p.stride[axis]);
        first..count.min(at / p.stride[axis] + 1)
    };
    let mut dx = vec![T::zero(); batch(dy.len(), p.output) * p.input.elements()];
    dx.par_chunks_mut(p.input.elements())
        .zip(dy.par_chunks(outputs).zip(index.par_chunks(outputs)))
        .for_each(|(dx, (dy, index))| {
            for (pixel, dx) in dx.chunks_exact_mut(c).enumerate() {
                let h = pixel / p.input.width + p.padding[0];
                let w = pixel % p.input.width + p.padding[1];
                for oh in windows(h, 0, p.output.height) {
                    for ow in windows(w, 1, p.output.width) {
                        let tap = (h - oh * p.stride[0]) * p.kernel[1] + (w - ow * p.stride[1]);
                        let first = (oh * p.output.width + ow) * c;
                        let windows = dy[first..].iter().zip(&index[first..]);
                        for (dx, (&dy, &index)) in dx.iter_mut().zip(windows) {
                            *dx += if usize::from(index) == tap {
                                dy
                            } else {
                                T::zero()
                            };
                        }
                    }
                }
            }
        });
    dx
}

/// `y[n,oh,ow,c] = Σ_(kh,kw) x[n, oh·SH + kh − PH, ow·SW + kw − PW, c] / D(oh,ow)` over the places on the
/// image, where D is what [`Pool2d::divisor`] says: KH·KW for a window that reaches beyond nothing.
///
/// x `[N,H,W,C]`, returns `[N,OH,OW,C]`.
pub fn meanpool2d_forward<T: Float>(p: &Pool2d, x: &[T]) -> Vec<T> {
    let c = p.input.channels;
    let divisors = divisors(p);
    let mut y = vec![T::zero(); batch(x.len(), p.input) * p.output.elements()];
    y.par_chunks_mut(p.output.elements())
        .zip(x.par_chunks(p.input.elements()))
        .for_each(|(y, x)| {
            for_each_tap(p, |position, _, pixel| {
                add(&mut y[position * c..][..c], &x[pixel * c..][..c]);
            });
            for (y, &divisor) in y.chunks_exact_mut(c).zip(&divisors) {
                y.iter_mut().for_each(|y| *y /= divisor);
            }
        });
    y
}

/// `dx[n,h,w,c] = Σ dy[n,oh,ow,c] / D(oh,ow)` over the windows that contain (h,w), in row-major order of
/// the windows, which may overlap.
///
/// dy `[N,OH,OW,C]`, returns `[N,H,W,C]`.
pub fn meanpool2d_backward<T: Float>(p: &Pool2d, dy: &[T]) -> Vec<T> {
    let c = p.input.channels;
    let divisors: Vec<T> = divisors(p);
    let mut dx = vec![T::zero(); batch(dy.len(), p.output) * p.input.elements()];
    dx.par_chunks_mut(p.input.elements())
        .zip(dy.par_chunks(p.output.elements()))
        .for_each(|(dx, dy)| {
            for_each_tap(p, |position, _, pixel| {
                let share = T::one() / divisors[position];
                axpy(&mut dx[pixel * c..][..c], share, &dy[position * c..][..c]);
            });
        });
    dx
}

/// What the mean of each window is divided by.
fn divisors<T: Float>(p: &Pool2d) -> Vec<T> {
    (0..p.output.height * p.output.width)
        .map(|at| (p.divisor([at / p.output.width, at % p.output.width]) as f32).into())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::check::noise;
    use crate::model::Shape;

    /// The gradient of max-pooling as one would write it first: `+=` at each recorded place.
    fn scatter(p: &Pool2d, dy: &[f64], index: &[u8]) -> Vec<f64> {
        let mut dx = vec![0.0; batch(dy.len(), p.output) * p.input.elements()];
        for (i, (&dy, &index)) in dy.iter().zip(index).enumerate() {
            let (n, output) = (i / p.output.elements(), i % p.output.elements());
            let (position, c) = (output / p.output.channels, output % p.output.channels);
            let pixel = pixel(p, position, index as usize);
            dx[n * p.input.elements() + pixel * p.input.channels + c] += dy;
        }
        dx
    }

    #[test]
    fn gather_and_scatter_agree_on_any_window() {
        for (kernel, stride, padding, ceil) in [
            ([2, 2], [2, 2], [[0; 2]; 2], false),
            ([3, 2], [3, 4], [[0; 2]; 2], false),
            ([3, 3], [2, 1], [[0; 2]; 2], false),
            ([2, 4], [1, 3], [[0; 2]; 2], false),
            ([2, 2], [2, 2], [[1; 2]; 2], true),
            ([3, 3], [3, 4], [[2, 0], [1, 2]], true),
            ([3, 3], [2, 2], [[1; 2]; 2], false),
            ([5, 4], [2, 3], [[4, 1], [0, 3]], true),
        ] {
            let input = Shape::new(9, 7, 5);
            let p = Pool2d::padded(input, kernel, stride, padding, ceil, true).unwrap();
            // Rounded, so that windows share their maximum and have ties.
            let x: Vec<f64> = noise(1, 3 * p.input.elements())
                .into_iter()
                .map(|x| (3.0 * x).round())
                .collect();
            let dy = noise(2, 3 * p.output.elements());
            let (_, index) = maxpool2d_forward(&p, &x);
            let expected = scatter(&p, &dy, &index);
            assert_eq!(maxpool2d_backward_overlapping(&p, &dy, &index), expected);
            if !p.overlapping() {
                assert_eq!(maxpool2d_backward(&p, &dy, &index), expected);
            }
        }
    }

    /// By the definition: every place of every window, asked whether it lies on the image.
    #[test]
    fn windows_are_what_the_definition_says() {
        let mut outputs = Vec::new();
        for (padding, ceil, counted) in [
            ([[0; 2]; 2], false, true),
            ([[0; 2]; 2], true, true),
            ([[1; 2]; 2], true, true),
            ([[1; 2]; 2], true, false),
            ([[2, 0], [1, 2]], false, true),
            ([[2, 0], [1, 2]], true, false),
        ] {
            let (kernel, stride) = ([3, 3], [2, 3]);
            let p = Pool2d::padded(Shape::new(6, 8, 1), kernel, stride, padding, ceil, counted);
            let p = p.unwrap();
            let (ph, pw) = (padding[0][0] as isize, padding[1][0] as isize);
            let end = [0, 1].map(|axis| {
                let after = padding[axis][1] as isize;
                [6, 8][axis] + if counted { after } else { 0 }
            });
            let mut common = Vec::new();
            for (oh, ow) in
                (0..p.output.height).flat_map(|oh| (0..p.output.width).map(move |ow| (oh, ow)))
            {
                let (mut seen, mut counts) = (0, 0);
                for (kh, kw) in (0..3).flat_map(|kh| (0..3).map(move |kw| (kh, kw))) {
                    let h = (oh * 2 + kh) as isize - ph;
                    let w = (ow * 3 + kw) as isize - pw;
                    let on_image = (0..6).contains(&h) && (0..8).contains(&w);
                    seen += usize::from(on_image);
                    counts +=
                        usize::from(h < end[0] && w < end[1] && (counted || h >= 0 && w >= 0));
                    let taps = [p.taps(0, oh), p.taps(1, ow)];
                    assert_eq!(taps[0].contains(&kh) && taps[1].contains(&kw), on_image);
                }
                assert!(seen > 0);
                assert_eq!(p.divisor([oh, ow]), counts);
                common.push(counts);
            }
            let same = common.iter().all(|c| *c == 9);
            assert_eq!(p.common_divisor(), same.then_some(9));
            assert_eq!(p.inside(), padding == [[0; 2]; 2] && !ceil);
            outputs.push([p.output.height, p.output.width]);
        }
        // As PyTorch gives them for the symmetric ones.
        assert_eq!(outputs, [[2, 2], [3, 3], [4, 3], [4, 3], [3, 3], [4, 3]]);
    }

    #[test]
    fn geometries_that_make_no_sense_are_refused_and_old_files_keep_their_meaning() {
        let image = Shape::new(6, 5, 2);
        let pool = |kernel, stride, padding| {
            let pool = Pool2d::padded(image, kernel, stride, padding, true, true);
            pool.map_err(|e| e.to_string())
        };
        for (found, needles) in [
            (
                pool([0, 2], [2, 2], [[0; 2]; 2]),
                ["height", "found kernel 0"],
            ),
            (pool([2, 2], [2, 0], [[0; 2]; 2]), ["width", "stride 0"]),
            (
                pool([3, 2], [1, 1], [[0; 2], [0, 2]]),
                ["(2) along the width", "found 2"],
            ),
            (
                pool([9, 9], [1, 1], [[1; 2]; 2]),
                ["kernel 9 over input height 6", "padding 1"],
            ),
            (
                pool([9, 2], [1, 1], [[1, 0], [0, 0]]),
                ["kernel 9 over input height 6", "1 and 0"],
            ),
        ] {
            let message = found.unwrap_err();
            assert!(needles.iter().all(|n| message.contains(n)), "{message}");
        }
        // Written before there was padding.
        let text = r#"{"input":{"height":6,"width":5,"channels":2},"output":{"height":3,"width":2,"channels":2},"kernel":[2,2],"stride":[2,2]}"#;
        let old: Pool2d = serde_json::from_str(text).unwrap();
        assert_eq!(old, Pool2d::new(image, [2, 2], [2, 2]).unwrap());
        let counted = Pool2d::padded(image, [2, 2], [2, 2], [[0; 2]; 2], false, true);
        assert_eq!(old, counted.unwrap());
    }

    #[test]
    fn the_first_of_equal_values_wins_and_the_last_nan_beats_all() {
        let p = Pool2d::new(Shape::new(2, 2, 1), [2, 2], [2, 2]).unwrap();
        let nan = f64::NAN;
        for (x, winner) in [
            ([1.0, 3.0, 3.0, 2.0], 1),
            ([f64::NEG_INFINITY; 4], 0),
            ([-0.0, 0.0, -1.0, 0.0], 0),
            ([1.0, nan, nan, 9.0], 2),
            ([nan, 1.0, 2.0, 3.0], 0),
        ] {
            assert_eq!(maxpool2d_forward(&p, &x).1, [winner], "{x:?}");
        }
    }
}
