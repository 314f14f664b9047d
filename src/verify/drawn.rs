//! Random geometries: what the fixed lists did not think of.
//!
//! Draw `index` of `seed` is the same on every machine, and does not depend on the draws before it,
//! so that one that fails can be run alone.

use super::cases::{
    col2im_case, im2col_case, maxpool_backward_case, maxpool_forward_case, meanpool_backward_case,
    meanpool_forward_case,
};
use super::grouped::grouped_cases;
use super::norm::{batch_norm_cases, group_norm_cases};
use super::parity::Case;
use super::products::product_case;
use crate::gpu::AdapterReport;
use crate::kernels::batch_norm::BatchNorm;
use crate::kernels::conv2d::{Family, Pass, Product, Tile};
use crate::kernels::group_norm::GroupNorm;
use crate::model::{Conv2d, Pool2d, Shape};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The draws of `wgrad verify` unless told otherwise.
pub const DRAWS: usize = 16;

/// The cases of one draw, as far as `adapter` can run them: a layer in every pass, of every family in
/// a tile that is drawn too and its columns, or in groups; and a pooling behind it.
pub fn drawn(adapter: &AdapterReport, seed: u64, index: usize) -> Vec<Case> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(index as u64);
    let dense = rng.random_range(0..4) == 0;
    let (geometry, batch) = if dense {
        let [inputs, units] = [300, 70].map(|most| rng.random_range(1..=most));
        (Conv2d::dense(inputs, units), rng.random_range(1..=2999))
    } else {
        (convolution(&mut rng), rng.random_range(1..=33))
    };
    let (relu, masked) = (rng.random(), rng.random());
    let pool = pooling(&mut rng, geometry.output);
    // Drawn for every family, so that what follows does not depend on the adapter.
    let tiles = Family::ALL.map(|family| (family, rng.random::<u32>()));

    let mut cases = Vec::new();
    if geometry.groups > 1 {
        cases.extend(grouped_cases(geometry, batch, relu, masked));
    }
    let tiles = tiles.into_iter().filter(|_| geometry.groups == 1);
    for (family, tile) in tiles {
        if !family.supported(adapter) {
            continue;
        }
        let mut add = |pass, relu, pool| {
            let product = Product::new(geometry, batch, pass, relu, pool, family, adapter);
            let product = product.expect("what can be pooled was asked");
            // Not in the order of their prices, which differ from adapter to adapter.
            let possible = product.tiles_on(adapter);
            let mut all = Tile::all(family, adapter);
            all.retain(|tile| possible.contains(tile));
            cases.push(product_case(
                product.with_tile(all[tile as usize % all.len()]),
            ));
        };
        add(Pass::Forward, relu, None);
        add(Pass::BackwardWeight, false, None);
        add(Pass::BackwardInput, masked, None);
        if Product::can_pool(&geometry, &pool, family) {
            add(Pass::Forward, relu, Some(pool));
        }
    }
    if geometry.groups == 1 {
        cases.push(im2col_case(geometry, batch));
        cases.push(col2im_case(geometry, batch, masked));
    }
    cases.push(maxpool_forward_case(pool, batch));
    cases.push(maxpool_backward_case(
        pool,
        batch,
        masked,
        pool.overlapping(),
    ));
    cases.push(meanpool_forward_case(pool, batch));
    cases.push(meanpool_backward_case(pool, batch, masked));
    let (positions, channels) = (rng.random_range(1..=80), channels(&mut rng, 40));
    let norm = BatchNorm {
        batch,
        positions,
        channels,
    };
    cases.extend(batch_norm_cases(norm, rng.random_range(1..=batch)));
    let mut groups = rng.random_range(1..=channels);
    while !channels.is_multiple_of(groups) {
        groups -= 1;
    }
    cases.extend(group_norm_cases(GroupNorm {
        batch,
        positions,
        channels,
        groups,
    }));
    cases
}

/// Channels in fours as often as not: loads and stores differ.
fn channels(rng: &mut ChaCha8Rng, most: usize) -> usize {
    match rng.random() {
        true => 4 * rng.random_range(1..=most / 4),
        false => rng.random_range(1..=most),
    }
}

/// In groups, with taps apart or without a bias in some of the draws.
fn convolution(rng: &mut ChaCha8Rng) -> Conv2d {
    loop {
        let mut pair = |least, most| [(); 2].map(|()| rng.random_range(least..=most));
        let ([h, w], kernel) = (pair(1, 16), pair(1, 5));
        let (stride, padding) = (pair(1, 3), [pair(0, 2), pair(0, 2)]);
        let dilation = pair(1, 3);
        let dilation = if rng.random() { dilation } else { [1, 1] };
        let mut input = Shape::new(h, w, channels(rng, 16));
        let mut out = channels(rng, 40);
        // Not in groups, or in some of the same size, depthwise where they have one channel each.
        let groups = match rng.random_range(0..4) {
            0 => rng.random_range(2..=16),
            _ => 1,
        };
        if groups > 1 {
            let [gc, goc] = [3, 3].map(|most| rng.random_range(1..=most));
            (input.channels, out) = (gc * groups, goc * groups);
        }
        let g = Conv2d::dilated(input, out, kernel, stride, padding, dilation);
        // A window that is larger than the image, or sees nothing but padding, is drawn again.
        if let Ok(g) = g.and_then(|g| g.grouped(groups)) {
            return if rng.random_range(0..3) == 0 {
                g.without_bias()
            } else {
                g
            };
        }
    }
}

/// Side by side as often as not, where it may be fused.
fn pooling(rng: &mut ChaCha8Rng, input: Shape) -> Pool2d {
    loop {
        let mut pair = |most| [(); 2].map(|()| rng.random_range(1..=most));
        let (kernel, stride) = (pair(4), pair(4));
        let stride = if rng.random() { kernel } else { stride };
        if let Ok(pool) = Pool2d::new(input, kernel, stride) {
            return pool;
        }
    }
}
