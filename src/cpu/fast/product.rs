//! The product behind every layer with weights, one thread's share of it. One factor is an im2col
//! matrix that is never stored: its elements are read from the image, or from a copy of it with its
//! padding. The other lies packed in panels a few vectors wide. A tile of sums stays in registers.
//!
//! Every sum is one chain of (fused) multiply-adds in the order of its terms, or one of them for every
//! so many terms, added up in order: its bits depend neither on the tile nor on how many numbers a
//! vector has.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;
use std::ops::Range;

/// A matrix: element (i, k) is `values[rows[i] + runs[k / run] + k % run]`.
#[derive(Clone, Copy)]
pub(super) struct Gathered<'a> {
    pub values: &'a [f32],
    pub rows: &'a [usize],
    pub runs: &'a [usize],
    pub run: usize,
}

/// A matrix `[depth, columns]` in panels as wide as a tile of sums, each of them row-major; what the
/// last one has too many is 0.
#[derive(Clone, Copy)]
pub(super) struct Panels<'a> {
    values: &'a [f32],
    /// Rows that are stored, and which of them are meant.
    height: usize,
    first: usize,
    depth: usize,
    columns: usize,
    /// Columns of a panel: two vectors; the last one may have one.
    width: usize,
}

impl<'a> Panels<'a> {
    /// Packs the row-major `matrix` into `values`.
    pub fn pack(matrix: &[f32], columns: usize, values: &'a mut Vec<f32>) -> Self {
        Panels::pack_for(lanes(), matrix, columns, values)
    }

    /// The same for vectors of so many numbers.
    fn pack_for(lanes: usize, matrix: &[f32], columns: usize, values: &'a mut Vec<f32>) -> Self {
        let depth = matrix.len() / columns;
        Panels::fill_for(lanes, [depth, columns], values, |part, values| {
            let width = values.len() / depth;
            let rows = values.chunks_exact_mut(width);
            for (values, row) in rows.zip(matrix.chunks_exact(columns)) {
                values[..part.len()].copy_from_slice(&row[part.clone()]);
                values[part.len()..].fill(0.0);
            }
        })
    }

    /// A matrix `[depth, columns]` in `values`, of which `fill` is given each panel with its columns.
    pub fn fill(
        [depth, columns]: [usize; 2],
        values: &'a mut Vec<f32>,
        fill: impl FnMut(Range<usize>, &mut [f32]),
    ) -> Self {
        Panels::fill_for(lanes(), [depth, columns], values, fill)
    }

    fn fill_for(
        lanes: usize,
        [depth, columns]: [usize; 2],
        values: &'a mut Vec<f32>,
        mut fill: impl FnMut(Range<usize>, &mut [f32]),
    ) -> Self {
        let width = 2 * lanes;
        values.resize(depth * columns.next_multiple_of(lanes), 0.0);
        for (panel, values) in values.chunks_mut(depth * width).enumerate() {
            let first = panel * width;
            fill(first..columns.min(first + width), values);
        }
        Panels {
            values,
            height: depth,
            first: 0,
            depth,
            columns,
            width,
        }
    }

    /// Packs the transposes of matrices `[columns, rows]` into `values`, the last one uppermost.
    pub fn pack_turned(
        matrices: &[f32],
        [columns, rows]: [usize; 2],
        values: &'a mut Vec<f32>,
    ) -> Self {
        let (depth, lanes) = (matrices.len() / columns, lanes());
        let width = 2 * lanes;
        values.resize(depth * columns.next_multiple_of(lanes), 0.0);
        let panels = values.par_chunks_mut(depth * width);
        panels.enumerate().for_each(|(panel, values)| {
            let turned = matrices.rchunks_exact(columns * rows).flat_map(|matrix| {
                let columns = &matrix[panel * width * rows..];
                (0..rows).map(|row| columns[row..].iter().step_by(rows))
            });
            let width = values.len() / depth;
            for (values, row) in values.chunks_exact_mut(width).zip(turned) {
                values.fill(0.0);
                values
                    .iter_mut()
                    .zip(row)
                    .for_each(|(to, from)| *to = *from);
            }
        });
        Panels {
            values,
            height: depth,
            first: 0,
            depth,
            columns,
            width,
        }
    }

    /// Panels with `to` rows in place of every `from`, in `values`, each of which `make` fills from one of these.
    pub fn map(
        self,
        [from, to]: [usize; 2],
        values: &mut Vec<f32>,
        make: impl Fn(&[f32], &mut [f32]) + Sync,
    ) -> Panels<'_> {
        let depth = self.depth / from * to;
        values.resize(self.values.len() / from * to, 0.0);
        values
            .par_chunks_mut(depth * self.width)
            .zip(self.values.par_chunks(self.depth * self.width))
            .for_each(|(to, from)| make(from, to));
        Panels {
            values,
            height: depth,
            depth,
            ..self
        }
    }

    /// So many of the rows, from the `first` on.
    pub fn part(self, first: usize, depth: usize) -> Self {
        Panels {
            first,
            depth,
            ..self
        }
    }

    /// Element (k, j).
    pub fn at(self, k: usize, j: usize) -> f32 {
        let first = j / self.width * self.width;
        let width = self.width.min(self.values.len() / self.height - first);
        self.values[first * self.height + (self.first + k) * width + j - first]
    }

    /// The rows of the panel that begins with column j and is V vectors wide.
    #[inline(always)]
    fn rows<S: Simd, const V: usize>(self, j: usize) -> &'a [[S::f32s; V]] {
        let width = V * S::F32_LANES;
        let panel = &self.values[j * self.height + self.first * width..][..self.depth * width];
        S::as_simd_f32s(panel).0.as_chunks().0
    }
}

/// How many numbers a vector of this processor has.
fn lanes() -> usize {
    struct Lanes;

    impl WithSimd for Lanes {
        type Output = usize;

        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> usize {
            S::F32_LANES
        }
    }

    Arch::new().dispatch(Lanes)
}

/// `c = a·b`, plus `bias` in every row; c is row-major.
pub(super) fn product(a: Gathered, b: Panels, bias: Option<&[f32]>, c: &mut [f32]) {
    assert_eq!(a.runs.len() * a.run, b.depth);
    assert_eq!(c.len(), a.rows.len() * b.columns);
    Arch::new().dispatch(Product { a, b, bias, c });
}

/// `c = aᵀ·b`, or where it is to `add`, `c += aᵀ·b`; c is row-major.
pub(super) fn product_transposed(a: Gathered, b: Panels, add: bool, c: &mut [f32]) {
    assert_eq!(a.rows.len(), b.depth);
    assert_eq!(c.len(), a.runs.len() * a.run * b.columns);
    Arch::new().dispatch(ProductTransposed { a, b, add, c });
}

/// Calls `$tile::<S, M, V>([i, j], …)`, for tiles of M rows and V vectors that cover so many rows and
/// columns, where i and j are a tile's first ones.
macro_rules! for_each_tile {
    ([$rows:expr, $columns:expr], $tile:ident($($argument:expr),*)) => {
        let (rows, columns) = ($rows, $columns);
        let mut j = 0;
        while j < columns {
            let one = columns - j <= S::F32_LANES;
            let mut i = 0;
            while i < rows {
                i += match (one, rows - i) {
                    (false, 8..) if S::REGISTER_COUNT >= 32 => $tile::<S, 8, 2>([i, j], $($argument),*),
                    (false, 6..) => $tile::<S, 6, 2>([i, j], $($argument),*),
                    (false, 5..) => $tile::<S, 5, 2>([i, j], $($argument),*),
                    (false, 3..) => $tile::<S, 3, 2>([i, j], $($argument),*),
                    (false, _) => $tile::<S, 1, 2>([i, j], $($argument),*),
                    (true, 8..) => $tile::<S, 8, 1>([i, j], $($argument),*),
                    (true, 5..) => $tile::<S, 5, 1>([i, j], $($argument),*),
                    (true, 3..) => $tile::<S, 3, 1>([i, j], $($argument),*),
                    (true, _) => $tile::<S, 1, 1>([i, j], $($argument),*),
                };
            }
            j += if one { 1 } else { 2 } * S::F32_LANES;
        }
    };
}

struct Product<'a> {
    a: Gathered<'a>,
    b: Panels<'a>,
    bias: Option<&'a [f32]>,
    c: &'a mut [f32],
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Product { a, b, bias, c } = self;
        for_each_tile!(
            [a.rows.len(), b.columns],
            product_tile(simd, a, b, bias, &mut *c)
        );
    }
}

#[inline(always)]
fn product_tile<S: Simd, const M: usize, const V: usize>(
    [i, j]: [usize; 2],
    simd: S,
    a: Gathered,
    b: Panels,
    bias: Option<&[f32]>,
    c: &mut [f32],
) -> usize {
    let mut sums = [[simd.splat_f32s(0.0); V]; M];
    if let Some(bias) = bias {
        for v in 0..V {
            let bias = simd.partial_load_f32s(&bias[j..][vector::<S>(v, bias.len() - j)]);
            sums.iter_mut().for_each(|sums| sums[v] = bias);
        }
    }
    for (start, b) in a.runs.iter().zip(b.rows::<S, V>(j).chunks_exact(a.run)) {
        let rows: [&[f32]; M] =
            std::array::from_fn(|m| &a.values[a.rows[i + m] + start..][..b.len()]);
        for (k, b) in b.iter().enumerate() {
            add_product(simd, &mut sums, |m| rows[m][k], b);
        }
    }
    store(simd, sums, [i, j], b.columns, c, |_, sum| sum);
    M
}

/// Terms that are summed before the next tile: what the tiles of a panel share stays in the first cache.
const TERMS: usize = 256;

struct ProductTransposed<'a> {
    a: Gathered<'a>,
    b: Panels<'a>,
    add: bool,
    c: &'a mut [f32],
}

impl WithSimd for ProductTransposed<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let ProductTransposed { a, b, add, c } = self;
        for (start, c) in a.runs.iter().zip(c.chunks_exact_mut(a.run * b.columns)) {
            for (block, rows) in a.rows.chunks(TERMS).enumerate() {
                let (values, first) = (&a.values[*start..], block * TERMS);
                let (a, add) = (Gathered { values, rows, ..a }, add || block > 0);
                for_each_tile!(
                    [a.run, b.columns],
                    transposed_tile(simd, a, b, first, add, &mut *c)
                );
            }
        }
    }
}

/// A tile of the product with b's rows from the `first` on.
#[inline(always)]
fn transposed_tile<S: Simd, const M: usize, const V: usize>(
    [i, j]: [usize; 2],
    simd: S,
    a: Gathered,
    b: Panels,
    first: usize,
    add: bool,
    c: &mut [f32],
) -> usize {
    let mut sums = [[simd.splat_f32s(0.0); V]; M];
    let values = &a.values[i..];
    for (row, b) in a.rows.iter().zip(&b.rows::<S, V>(j)[first..]) {
        let a: &[f32; M] = values[*row..].first_chunk().expect("a row has a whole run");
        add_product(simd, &mut sums, |m| a[m], b);
    }
    store(simd, sums, [i, j], b.columns, c, |old, sum| {
        if add { simd.add_f32s(old, sum) } else { sum }
    });
    M
}

/// `sums += a·b` of a column a and a row b.
#[inline(always)]
fn add_product<S: Simd, const M: usize, const V: usize>(
    simd: S,
    sums: &mut [[S::f32s; V]; M],
    a: impl Fn(usize) -> f32,
    b: &[S::f32s; V],
) {
    for (m, sums) in sums.iter_mut().enumerate() {
        let a = simd.splat_f32s(a(m));
        for (sum, b) in sums.iter_mut().zip(b) {
            *sum = simd.mul_add_e_f32s(a, *b, *sum);
        }
    }
}

/// Puts `join(c, sums)` into c from row i and column j on, as far as c has columns.
#[inline(always)]
fn store<S: Simd, const M: usize, const V: usize>(
    simd: S,
    sums: [[S::f32s; V]; M],
    [i, j]: [usize; 2],
    columns: usize,
    c: &mut [f32],
    join: impl Fn(S::f32s, S::f32s) -> S::f32s,
) {
    for (m, sums) in sums.into_iter().enumerate() {
        let row = &mut c[(i + m) * columns..][j..columns];
        for (v, sum) in sums.into_iter().enumerate() {
            let part = vector::<S>(v, row.len());
            match S::as_mut_simd_f32s(&mut row[part]) {
                ([whole], _) => *whole = join(*whole, sum),
                (_, part) => {
                    let value = join(simd.partial_load_f32s(part), sum);
                    simd.partial_store_f32s(part, value);
                }
            }
        }
    }
}

/// Where vector v lies in a row of so many columns, as far as there are some.
#[inline(always)]
fn vector<S: Simd>(v: usize, columns: usize) -> Range<usize> {
    let first = (v * S::F32_LANES).min(columns);
    first..(first + S::F32_LANES).min(columns)
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use crate::cpu::check::noise;

    /// What both products give through `dispatch`, as bits.
    fn bits(columns: usize, simd: Option<pulp::x86::V3>) -> Vec<u32> {
        let values: Vec<f32> = noise(1, 900).into_iter().map(|v| v as f32).collect();
        let rows: Vec<usize> = (0..53).map(|i| 5 * i + i % 3).collect();
        let a = Gathered {
            values: &values,
            rows: &rows,
            runs: &[3, 40, 90],
            run: 19,
        };
        let b: Vec<f32> = noise(2, 57 * columns)
            .into_iter()
            .map(|v| v as f32)
            .collect();
        let lanes = simd.map_or(lanes(), |_| 8);
        let (mut packed, mut c) = (Vec::new(), vec![0.0; 53 * columns]);
        let panels = Panels::pack_for(lanes, &b, columns, &mut packed);
        let bias = Some(&b[..columns]);
        let work = Product {
            a,
            b: panels,
            bias,
            c: &mut c,
        };
        match simd {
            Some(simd) => Simd::vectorize(simd, work),
            None => Arch::new().dispatch(work),
        }
        // Some rows of panels that have more.
        let (above, mut part) = (&b[..4 * columns], vec![0.0; 53 * columns]);
        let (stacked, mut taller) = ([above, &b, above].concat(), Vec::new());
        let panels = Panels::pack_for(lanes, &stacked, columns, &mut taller).part(4, 57);
        let work = Product {
            a,
            b: panels,
            bias,
            c: &mut part,
        };
        match simd {
            Some(simd) => Simd::vectorize(simd, work),
            None => Arch::new().dispatch(work),
        }
        assert_eq!(part, c);
        let (mut packed, mut gradient) = (Vec::new(), vec![1.0; 57 * columns]);
        let b = Panels::pack_for(lanes, &c, columns, &mut packed);
        let work = ProductTransposed {
            a,
            b,
            add: true,
            c: &mut gradient,
        };
        match simd {
            Some(simd) => Simd::vectorize(simd, work),
            None => Arch::new().dispatch(work),
        }
        c.iter().chain(&gradient).map(|v| v.to_bits()).collect()
    }

    #[test]
    fn the_bits_do_not_depend_on_the_length_of_a_vector() {
        if pulp::x86::V4::try_new().is_none() {
            println!("skipped: expected a processor with AVX-512");
            return;
        }
        for columns in [1, 7, 16, 17, 33, 40, 64, 70] {
            let short = bits(columns, pulp::x86::V3::try_new());
            assert_eq!(short, bits(columns, None), "{columns} columns");
        }
    }
}
