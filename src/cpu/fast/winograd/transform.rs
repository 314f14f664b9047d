//! The transforms of [Winograd's convolution](super), in vectors of channels. They only add and halve, each number
//! on its own, so their bits do not depend on the length of a vector.

use crate::model::{Conv2d, Shape};
use pulp::{Arch, Simd, WithSimd};
use std::marker::PhantomData;
use std::ops::Range;

/// Where the A×A rows of channels begin that belong to a tile; those outside the image do not.
pub trait Places {
    fn of<const A: usize>(&self, tile: usize) -> [[Option<usize>; A]; A];
}

/// Rows of matrices that begin a `pitch` apart, of which the `first` tile has the first ones.
pub struct Stacked {
    pitch: usize,
    first: usize,
    step: usize,
}

impl Stacked {
    pub fn new(pitch: usize, first: usize, step: usize) -> Self {
        Stacked { pitch, first, step }
    }
}

impl Places for Stacked {
    #[inline(always)]
    fn of<const A: usize>(&self, tile: usize) -> [[Option<usize>; A]; A] {
        let mut places = [[None; A]; A];
        for (i, places) in places.iter_mut().enumerate() {
            for (j, place) in places.iter_mut().enumerate() {
                *place = Some((i * A + j) * self.pitch + (tile - self.first) * self.step);
            }
        }
        places
    }
}

/// Pixels of images, from so many rows and columns before the outputs of a tile.
pub struct Image {
    shape: Shape,
    before: [usize; 2],
    tiles: [usize; 2],
}

impl Places for Image {
    #[inline(always)]
    fn of<const A: usize>(&self, tile: usize) -> [[Option<usize>; A]; A] {
        let (shape, [_, across]) = (self.shape, self.tiles);
        let all = self.tiles[0] * across;
        let (n, tile) = (tile / all, tile % all);
        let top = (2 * (tile / across)).wrapping_sub(self.before[0]);
        let left = (2 * (tile % across)).wrapping_sub(self.before[1]);
        let mut places = [[None; A]; A];
        for (i, places) in places.iter_mut().enumerate() {
            for (j, place) in places.iter_mut().enumerate() {
                let (h, w) = (top.wrapping_add(i), left.wrapping_add(j));
                if h < shape.height && w < shape.width {
                    let pixel = (n * shape.height + h) * shape.width + w;
                    *place = Some(pixel * shape.channels);
                }
            }
        }
        places
    }
}

/// What the tiles of a layer see.
pub fn pixels(g: &Conv2d) -> Image {
    Image {
        shape: g.input,
        before: g.padding,
        tiles: [g.output.height, g.output.width].map(|n| n.div_ceil(2)),
    }
}

/// What they give.
pub fn outputs(g: &Conv2d) -> Image {
    Image {
        shape: g.output,
        before: [0, 0],
        ..pixels(g)
    }
}

/// A matrix that A numbers are multiplied with.
pub trait Matrix<const A: usize, const B: usize> {
    fn times<S: Simd>(simd: S, x: [S::f32s; A]) -> [S::f32s; B];
}

/// `Bᵀ`, `G`, `Aᵀ`, `A` and `Gᵀ`.
pub struct Pixels;
pub struct Weight;
pub struct Outputs;
pub struct Gradients;
pub struct Taps;

impl Matrix<4, 4> for Pixels {
    #[inline(always)]
    fn times<S: Simd>(simd: S, [d0, d1, d2, d3]: [S::f32s; 4]) -> [S::f32s; 4] {
        let (outer, sum) = (simd.sub_f32s(d0, d2), simd.add_f32s(d1, d2));
        [outer, sum, simd.sub_f32s(d2, d1), simd.sub_f32s(d1, d3)]
    }
}

impl Matrix<3, 4> for Weight {
    #[inline(always)]
    fn times<S: Simd>(simd: S, [g0, g1, g2]: [S::f32s; 3]) -> [S::f32s; 4] {
        let (half, outer) = (simd.splat_f32s(0.5), simd.add_f32s(g0, g2));
        let [sum, difference] = [simd.add_f32s(outer, g1), simd.sub_f32s(outer, g1)];
        [
            g0,
            simd.mul_f32s(half, sum),
            simd.mul_f32s(half, difference),
            g2,
        ]
    }
}

impl Matrix<4, 2> for Outputs {
    #[inline(always)]
    fn times<S: Simd>(simd: S, [m0, m1, m2, m3]: [S::f32s; 4]) -> [S::f32s; 2] {
        let (sum, difference) = (simd.add_f32s(m1, m2), simd.sub_f32s(m1, m2));
        [simd.add_f32s(m0, sum), simd.sub_f32s(difference, m3)]
    }
}

impl Matrix<2, 4> for Gradients {
    #[inline(always)]
    fn times<S: Simd>(simd: S, [dy0, dy1]: [S::f32s; 2]) -> [S::f32s; 4] {
        let (sum, difference) = (simd.add_f32s(dy0, dy1), simd.sub_f32s(dy0, dy1));
        [dy0, sum, difference, simd.neg_f32s(dy1)]
    }
}

impl Matrix<4, 3> for Taps {
    #[inline(always)]
    fn times<S: Simd>(simd: S, [u0, u1, u2, u3]: [S::f32s; 4]) -> [S::f32s; 3] {
        let half = simd.splat_f32s(0.5);
        let sum = simd.mul_f32s(half, simd.add_f32s(u1, u2));
        let difference = simd.mul_f32s(half, simd.sub_f32s(u1, u2));
        [simd.add_f32s(u0, sum), difference, simd.add_f32s(sum, u3)]
    }
}

/// `X·d·Xᵀ` for each of the tiles and so many channels, from where its rows are in one tensor to where
/// they are in the other.
pub fn transform<X: Matrix<A, B>, const A: usize, const B: usize>(
    tiles: Range<usize>,
    channels: usize,
    (source, from): (&[f32], impl Places),
    (target, to): (&mut [f32], impl Places),
) {
    Arch::new().dispatch(Transform {
        matrix: PhantomData::<X>,
        tiles,
        zeros: vec![0.0; channels],
        source,
        from,
        target,
        to,
    });
}

struct Transform<'a, const A: usize, const B: usize, X, F, T> {
    matrix: PhantomData<X>,
    tiles: Range<usize>,
    /// A row outside the image.
    zeros: Vec<f32>,
    source: &'a [f32],
    from: F,
    target: &'a mut [f32],
    to: T,
}

impl<const A: usize, const B: usize, X, F, T> WithSimd for Transform<'_, A, B, X, F, T>
where
    X: Matrix<A, B>,
    F: Places,
    T: Places,
{
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (channels, zero) = (self.zeros.len(), simd.splat_f32s(0.0));
        for tile in self.tiles {
            let (from, to) = (self.from.of::<A>(tile), self.to.of::<B>(tile));
            let mut rows = [[&*self.zeros; A]; A];
            for i in 0..A {
                for j in 0..A {
                    if let Some(first) = from[i][j] {
                        rows[i][j] = &self.source[first..][..channels];
                    }
                }
            }
            for first in (0..channels).step_by(S::F32_LANES) {
                let some = S::F32_LANES.min(channels - first);
                // Each with its axes exchanged, so that a column is at hand.
                let (mut d, mut xd, mut y) = ([[zero; A]; A], [[zero; A]; B], [[zero; B]; B]);
                for i in 0..A {
                    for j in 0..A {
                        d[j][i] = load(simd, &rows[i][j][first..][..some]);
                    }
                }
                for j in 0..A {
                    let column = X::times(simd, d[j]);
                    for i in 0..B {
                        xd[i][j] = column[i];
                    }
                }
                for i in 0..B {
                    y[i] = X::times(simd, xd[i]);
                }
                for i in 0..B {
                    for j in 0..B {
                        if let Some(at) = to[i][j] {
                            store(simd, &mut self.target[at + first..][..some], y[i][j]);
                        }
                    }
                }
            }
        }
    }
}

/// A vector, or what is left of a row.
#[inline(always)]
fn load<S: Simd>(simd: S, part: &[f32]) -> S::f32s {
    match S::as_simd_f32s(part) {
        ([whole], _) => *whole,
        (_, part) => simd.partial_load_f32s(part),
    }
}

#[inline(always)]
fn store<S: Simd>(simd: S, part: &mut [f32], value: S::f32s) {
    match S::as_mut_simd_f32s(part) {
        ([whole], _) => *whole = value,
        (_, part) => simd.partial_store_f32s(part, value),
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use crate::cpu::check::noise;

    /// What a transform gives for two tiles of 40 channels, as bits.
    fn bits<X: Matrix<A, B>, const A: usize, const B: usize>(short: bool) -> Vec<u32> {
        let values = noise(1, 2 * 40 * A * A).into_iter().map(|v| v as f32);
        let (source, mut target) = (values.collect::<Vec<_>>(), vec![f32::NAN; 2 * 40 * B * B]);
        let work = Transform {
            matrix: PhantomData::<X>,
            tiles: 3..5,
            zeros: vec![0.0; 40],
            source: &source,
            from: Stacked::new(80, 3, 40),
            target: &mut target,
            to: Stacked::new(80, 3, 40),
        };
        match pulp::x86::V3::try_new().filter(|_| short) {
            Some(simd) => Simd::vectorize(simd, work),
            None => Arch::new().dispatch(work),
        }
        assert!(target.iter().all(|v| v.is_finite()));
        target.into_iter().map(f32::to_bits).collect()
    }

    #[test]
    fn the_bits_do_not_depend_on_the_length_of_a_vector() {
        if pulp::x86::V4::try_new().is_none() {
            println!("skipped: expected a processor with AVX-512");
            return;
        }
        assert_eq!(bits::<Pixels, 4, 4>(true), bits::<Pixels, 4, 4>(false));
        assert_eq!(bits::<Weight, 3, 4>(true), bits::<Weight, 3, 4>(false));
        assert_eq!(bits::<Outputs, 4, 2>(true), bits::<Outputs, 4, 2>(false));
        assert_eq!(
            bits::<Gradients, 2, 4>(true),
            bits::<Gradients, 2, 4>(false)
        );
        assert_eq!(bits::<Taps, 4, 3>(true), bits::<Taps, 4, 3>(false));
    }
}
