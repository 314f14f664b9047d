//! Twins of `shaders/conv2d.wgsl`: convolution in its three passes, and the matrix products that
//! the passes are. A dense layer is the case of a 1×1 kernel over a 1×1 image.
//!
//! The maths is that of Dumoulin & Visin (2016), "A guide to convolution arithmetic for deep
//! learning"; with `columns = im2col(x)` and `W` the weight as a matrix `[KH·KW·C, OC]` it reads
//! `y = columns·W + b`, `dW = columnsᵀ·dy`, `db = Σ dy`, `dx = col2im(dy·Wᵀ)`. The loops below
//! compute just that, in the same order of additions, without storing the columns. A tap in the
//! padding contributes nothing, so a NaN or an infinity spreads no further than the taps reach.

use super::im2col::for_each_position;
use super::{Float, axpy, batch, bias_backward, bias_forward, relu_forward};
use crate::model::Conv2d;
use rayon::prelude::*;

/// Rows of a product's result that one task computes: few enough to stay in the fastest cache
/// while the reduction runs over them.
const ROWS_PER_TASK: usize = 32;

/// `y[n,oh,ow,oc] = b[oc] + Σ_(kh,kw,c) x[n, oh·SH + kh·DH − PH, ow·SW + kw·DW − PW, c] · W[kh,kw,c,oc]`,
/// and with `relu` the larger of that and 0.
///
/// x `[N,H,W,C]`, parameters `[KH·KW·C + 1, OC]` (without the last row where there is no bias),
/// returns `[N,OH,OW,OC]`.
pub fn conv2d_forward<T: Float>(g: &Conv2d, relu: bool, x: &[T], parameters: &[T]) -> Vec<T> {
    let (c, oc) = (g.input.channels, g.output.channels);
    let (weight, bias) = split(g, parameters);
    let mut y = vec![T::zero(); batch(x.len(), g.input) * g.output.elements()];
    y.par_chunks_mut(g.output.elements())
        .zip(x.par_chunks(g.input.elements()))
        .for_each(|(y, x)| {
            for (tap, weight) in weight.chunks_exact(c * oc).enumerate() {
                for_each_position(g, tap, |position, pixel| {
                    let y = &mut y[position * oc..][..oc];
                    for (&x, weight) in x[pixel * c..][..c].iter().zip(weight.chunks_exact(oc)) {
                        axpy(y, x, weight);
                    }
                });
            }
        });
    let y = if g.bias { bias_forward(&y, bias) } else { y };
    if relu { relu_forward(&y) } else { y }
}

/// `dW[kh,kw,c,oc] = Σ_(n,oh,ow) x[n, oh·SH + kh·DH − PH, ow·SW + kw·DW − PW, c] · dy[n,oh,ow,oc]`, and
/// as the last row, where there is a bias, `db[oc] = Σ_(n,oh,ow) dy[n,oh,ow,oc]`: a weight used at many positions collects
/// the gradient of them all.
///
/// x `[N,H,W,C]`, dy `[N,OH,OW,OC]` (of the values before a fused ReLU), returns
/// `[KH·KW·C + 1, OC]`.
pub fn conv2d_backward_weight<T: Float>(g: &Conv2d, x: &[T], dy: &[T]) -> Vec<T> {
    let (c, oc) = (g.input.channels, g.output.channels);
    assert_eq!(batch(x.len(), g.input), batch(dy.len(), g.output));
    let mut gradient = vec![T::zero(); g.weight_elements()];
    // A task owns some rows of one tap and adds to them over the whole batch in order, so no
    // partial sums need joining.
    gradient
        .par_chunks_mut(c * oc)
        .enumerate()
        .for_each(|(tap, gradient)| {
            gradient
                .par_chunks_mut(ROWS_PER_TASK * oc)
                .enumerate()
                .for_each(|(block, gradient)| {
                    let channels = block * ROWS_PER_TASK..c.min((block + 1) * ROWS_PER_TASK);
                    let samples = x
                        .chunks_exact(g.input.elements())
                        .zip(dy.chunks_exact(g.output.elements()));
                    for (x, dy) in samples {
                        for_each_position(g, tap, |position, pixel| {
                            let x = &x[pixel * c..][channels.clone()];
                            let dy = &dy[position * oc..][..oc];
                            for (&x, gradient) in x.iter().zip(gradient.chunks_exact_mut(oc)) {
                                axpy(gradient, x, dy);
                            }
                        });
                    }
                });
        });
    if g.bias {
        gradient.extend(bias_backward(oc, dy));
    }
    gradient
}

/// `dx[n,h,w,c] = Σ dy[n,oh,ow,oc] · W[kh,kw,c,oc]` over all (oh,ow), (kh,kw), oc with
/// `h = oh·SH + kh·DH − PH` and `w = ow·SW + kw·DW − PW`: the transposed convolution of dy.
///
/// dy `[N,OH,OW,OC]` (of the values before a fused ReLU), parameters `[KH·KW·C + 1, OC]` (the bias
/// plays no part), returns `[N,H,W,C]`.
pub fn conv2d_backward_input<T: Float>(g: &Conv2d, dy: &[T], parameters: &[T]) -> Vec<T> {
    let (c, oc) = (g.input.channels, g.output.channels);
    let (weight, _) = split(g, parameters);
    // `[KH·KW][OC][C]`, so that the innermost loop runs along both dx and the weight.
    let transposed: Vec<T> = weight
        .chunks_exact(c * oc)
        .flat_map(|tap| transpose(c, oc, tap))
        .collect();
    let mut dx = vec![T::zero(); batch(dy.len(), g.output) * g.input.elements()];
    dx.par_chunks_mut(g.input.elements())
        .zip(dy.par_chunks(g.output.elements()))
        .for_each(|(dx, dy)| {
            for (tap, weight) in transposed.chunks_exact(c * oc).enumerate() {
                for_each_position(g, tap, |position, pixel| {
                    let dx = &mut dx[pixel * c..][..c];
                    let dy = &dy[position * oc..][..oc];
                    for (&dy, weight) in dy.iter().zip(weight.chunks_exact(c)) {
                        axpy(dx, dy, weight);
                    }
                });
            }
        });
    dx
}

/// `a·b`: a `[m,k]`, b `[k,n]`, returns `[m,n]`. The forward pass of a dense layer.
pub fn matmul_nn<T: Float>(m: usize, n: usize, k: usize, a: &[T], b: &[T]) -> Vec<T> {
    assert_eq!((a.len(), b.len()), (m * k, k * n));
    let mut product = vec![T::zero(); m * n];
    product
        .par_chunks_mut(n)
        .zip(a.par_chunks(k))
        .for_each(|(row, a)| {
            for (&a, b) in a.iter().zip(b.chunks_exact(n)) {
                axpy(row, a, b);
            }
        });
    product
}

/// `aᵀ·b`: a `[k,m]`, b `[k,n]`, returns `[m,n]`. The weight gradient of a dense layer.
pub fn matmul_tn<T: Float>(m: usize, n: usize, k: usize, a: &[T], b: &[T]) -> Vec<T> {
    assert_eq!((a.len(), b.len()), (k * m, k * n));
    let mut product = vec![T::zero(); m * n];
    product
        .par_chunks_mut(ROWS_PER_TASK * n)
        .enumerate()
        .for_each(|(block, rows)| {
            for (a, b) in a.chunks_exact(m).zip(b.chunks_exact(n)) {
                for (&a, row) in a[block * ROWS_PER_TASK..]
                    .iter()
                    .zip(rows.chunks_exact_mut(n))
                {
                    axpy(row, a, b);
                }
            }
        });
    product
}

/// `a·bᵀ`: a `[m,k]`, b `[n,k]`, returns `[m,n]`. The input gradient of a dense layer.
pub fn matmul_nt<T: Float>(m: usize, n: usize, k: usize, a: &[T], b: &[T]) -> Vec<T> {
    assert_eq!(b.len(), n * k);
    matmul_nn(m, n, k, a, &transpose(n, k, b))
}

/// Weight `[KH·KW·C/groups, OC]` and bias `[OC]` of a layer's parameters; empty where it has no bias.
pub(super) fn split<'a, T>(g: &Conv2d, parameters: &'a [T]) -> (&'a [T], &'a [T]) {
    assert_eq!(
        parameters.len(),
        g.parameter_elements(),
        "expected weight and bias of {g:?}"
    );
    parameters.split_at(g.weight_elements())
}

/// `[rows, columns]` to `[columns, rows]`.
fn transpose<T: Float>(rows: usize, columns: usize, a: &[T]) -> Vec<T> {
    (0..columns)
        .flat_map(|j| (0..rows).map(move |i| a[i * columns + j]))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::check::noise;
    use crate::cpu::{add, col2im, im2col};
    use crate::model::Shape;

    /// Geometry, x, parameters and dy.
    type Case = (Conv2d, Vec<f64>, Vec<f64>, Vec<f64>);

    /// Three samples each: uneven stride and padding, many channels (several tasks per tap), taps apart
    /// with padding on some sides and no bias, and a dense layer.
    fn cases() -> Vec<Case> {
        let wide = Shape::new(4, 6, 70);
        let apart = |kernel, stride, padding, dilation| {
            Conv2d::dilated(Shape::new(6, 8, 3), 4, kernel, stride, padding, dilation).unwrap()
        };
        [
            Conv2d::new(Shape::new(7, 5, 3), 4, [3, 2], [2, 1], [1, 0]).unwrap(),
            Conv2d::new(Shape::new(5, 9, 1), 6, [5, 4], [1, 3], [3, 3]).unwrap(),
            Conv2d::new(wide, 5, [3, 3], [1, 1], [1, 1]).unwrap(),
            apart([3, 2], [1, 2], [[0, 3], [2, 0]], [2, 3]).without_bias(),
            apart([3, 3], [2, 2], [[0, 1], [0, 1]], [1, 1]),
            Conv2d::dense(80, 11),
        ]
        .map(|g| {
            (
                g,
                noise(1, 3 * g.input.elements()),
                noise(2, g.parameter_elements()),
                noise(3, 3 * g.output.elements()),
            )
        })
        .into()
    }

    #[track_caller]
    fn assert_close(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            let good = (found - expected).abs() <= 1e-12 * (1.0 + expected.abs());
            assert!(good, "{found} is not {expected}");
        }
    }

    #[test]
    fn forward_is_im2col_times_weight_plus_bias() {
        for (g, x, parameters, _) in cases() {
            let (weight, bias) = split(&g, &parameters);
            let (m, n, k) = (3 * g.positions(), g.output.channels, g.patch());
            let mut y = matmul_nn(m, n, k, &im2col(&g, &x), weight);
            if g.bias {
                y.chunks_exact_mut(n).for_each(|row| add(row, bias));
            }
            assert_close(&conv2d_forward(&g, false, &x, &parameters), &y);
        }
    }

    #[test]
    fn weight_gradient_is_im2col_with_a_column_of_ones_transposed_times_dy() {
        for (g, x, _, dy) in cases() {
            let (m, n, k) = (g.parameter_rows(), g.output.channels, 3 * g.positions());
            let columns: Vec<f64> = im2col(&g, &x)
                .chunks_exact(g.patch())
                .flat_map(|row| row.iter().copied().chain(g.bias.then_some(1.0)))
                .collect();
            let expected = matmul_tn(m, n, k, &columns, &dy);
            assert_close(&conv2d_backward_weight(&g, &x, &dy), &expected);
        }
    }

    #[test]
    fn input_gradient_is_col2im_of_dy_times_weight_transposed() {
        for (g, _, parameters, dy) in cases() {
            let (weight, _) = split(&g, &parameters);
            let (m, n, k) = (3 * g.positions(), g.patch(), g.output.channels);
            let expected = col2im(&g, &matmul_nt(m, n, k, &dy, weight));
            assert_close(&conv2d_backward_input(&g, &dy, &parameters), &expected);
        }
    }

    #[test]
    fn dense_layer_is_a_matrix_product() {
        let (g, x, parameters, dy) = cases().pop().unwrap();
        let (weight, bias) = split(&g, &parameters);
        let y = bias_forward(&matmul_nn(3, 11, 80, &x, weight), bias);
        assert_close(&conv2d_forward(&g, false, &x, &parameters), &y);
        let mut gradient = matmul_tn(80, 11, 3, &x, &dy);
        gradient.extend(bias_backward(11, &dy));
        assert_close(&conv2d_backward_weight(&g, &x, &dy), &gradient);
        let dx = matmul_nt(3, 80, 11, &dy, weight);
        assert_close(&conv2d_backward_input(&g, &dy, &parameters), &dx);
    }

    #[test]
    fn fused_relu_gives_the_bits_of_relu_as_its_own_layer() {
        for (g, x, parameters, _) in cases() {
            let y = conv2d_forward(&g, false, &x, &parameters);
            assert!(y.iter().any(|&y| y < 0.0));
            assert_eq!(conv2d_forward(&g, true, &x, &parameters), relu_forward(&y));
        }
    }

    #[test]
    fn products_by_hand() {
        // [1 2 3; 4 5 6] · [1 0; 2 1; 0 3]
        let (a, b) = (
            [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
            [1.0, 0.0, 2.0, 1.0, 0.0, 3.0],
        );
        let product = [5.0, 11.0, 14.0, 23.0];
        assert_eq!(matmul_nn(2, 2, 3, &a, &b), product);
        assert_eq!(matmul_tn(2, 2, 3, &transpose(2, 3, &a), &b), product);
        assert_eq!(matmul_nt(2, 2, 3, &a, &transpose(3, 2, &b)), product);
    }
}
