//! The cases of the matrix products: every family that the adapter can run, every pass, on shapes
//! that are odd, strided, padded, masked and pooled.

use super::parity::{Bench, Case, Tolerance};
use crate::cpu;
use crate::gpu::AdapterReport;
use crate::kernels::conv2d::{self, Family, Pass, Product};
use crate::kernels::{KernelSpec, reduce};
use crate::model::{Conv2d, Pool2d, Shape};

const VALID: &str = "the geometries of this list are valid";

/// A geometry of the list with its batch size, and the pooling that may follow.
struct Layer {
    geometry: Conv2d,
    batch: usize,
    pool: Option<[usize; 2]>,
}

/// Channels that are multiples of four and not, strides and padding uneven, images odd and not
/// square, batches of 1 and 7, sums of more than one tile and split; taps side by side and apart,
/// padding that differs from side to side, with a bias and without.
fn layers() -> Vec<Layer> {
    let conv = |input: [usize; 3], out, kernel, stride, padding, batch, pool| Layer {
        geometry: Conv2d::new(
            Shape::new(input[0], input[1], input[2]),
            out,
            kernel,
            stride,
            padding,
        )
        .expect(VALID),
        batch,
        pool,
    };
    let dilated = |input: [usize; 3], out, kernel, stride, padding, dilation, batch, pool| Layer {
        geometry: Conv2d::dilated(
            Shape::new(input[0], input[1], input[2]),
            out,
            kernel,
            stride,
            padding,
            dilation,
        )
        .expect(VALID),
        batch,
        pool,
    };
    let dense = |inputs, units, batch| Layer {
        geometry: Conv2d::dense(inputs, units),
        batch,
        pool: None,
    };
    let without_bias = |layer: Layer| Layer {
        geometry: layer.geometry.without_bias(),
        ..layer
    };
    let (none, even) = ([[0, 0]; 2], [[2, 2]; 2]);
    let odd = [[0, 1]; 2];
    vec![
        conv([11, 8, 1], 5, [3, 5], [1, 1], [0, 2], 7, None),
        conv([9, 10, 1], 8, [5, 5], [1, 1], [0, 0], 7, Some([2, 2])),
        conv([7, 9, 3], 5, [3, 2], [2, 1], [1, 1], 3, None),
        conv([9, 7, 5], 3, [2, 3], [3, 2], [0, 2], 1, None),
        conv([9, 8, 8], 12, [3, 3], [2, 2], [1, 1], 7, None),
        conv([7, 6, 8], 8, [3, 3], [1, 1], [1, 1], 7, Some([2, 2])),
        conv([6, 9, 12], 20, [3, 3], [1, 1], [1, 0], 4, Some([1, 2])),
        conv([6, 5, 33], 3, [3, 3], [1, 1], [1, 1], 2, None),
        conv([12, 11, 24], 36, [5, 5], [1, 1], [0, 0], 2, None),
        conv([8, 8, 32], 33, [1, 1], [1, 1], [0, 0], 5, None),
        conv([15, 16, 4], 8, [3, 3], [1, 1], [1, 1], 13, None),
        conv([16, 15, 3], 5, [3, 2], [1, 1], [1, 0], 13, None),
        dense(37, 10, 7),
        dense(64, 128, 33),
        dense(1, 1, 1),
        dense(300, 12, 130),
        dilated([9, 10, 4], 8, [3, 3], [1, 1], even, [2, 2], 7, Some([2, 2])),
        dilated([8, 8, 8], 12, [3, 3], [2, 2], odd, [1, 1], 7, None),
        dilated(
            [6, 9, 3],
            5,
            [3, 2],
            [1, 1],
            [[2, 1], [0, 2]],
            [1, 3],
            1,
            None,
        ),
        without_bias(dilated(
            [12, 11, 8],
            8,
            [3, 3],
            [1, 1],
            none,
            [4, 2],
            2,
            None,
        )),
        without_bias(dilated(
            [11, 12, 12],
            20,
            [3, 3],
            [2, 3],
            [[2, 1], [0, 3]],
            [3, 2],
            7,
            None,
        )),
        without_bias(dilated(
            [9, 7, 5],
            3,
            [2, 3],
            [3, 2],
            [[1, 0], [2, 3]],
            [2, 2],
            3,
            None,
        )),
        without_bias(conv(
            [16, 15, 4],
            8,
            [3, 3],
            [1, 1],
            [1, 1],
            13,
            Some([1, 2]),
        )),
        without_bias(dense(37, 10, 7)),
        without_bias(dense(64, 128, 33)),
    ]
}

/// The families that `adapter` cannot run.
pub fn left_out(adapter: &AdapterReport) -> Vec<Family> {
    let families = Family::ALL.into_iter();
    families.filter(|f| !f.supported(adapter)).collect()
}

/// The products of every family that `adapter` can run, with every tile at least once.
pub fn products(adapter: &AdapterReport) -> Vec<Product> {
    let mut products = Vec::new();
    for family in Family::ALL.into_iter().filter(|f| f.supported(adapter)) {
        products.extend(of_layers(family, adapter));
        products.extend(every_tile(family, adapter));
        products.push(folded(family, adapter));
    }
    products
}

/// The products of all layers of the list in the tile that is chosen for each.
fn of_layers(family: Family, adapter: &AdapterReport) -> Vec<Product> {
    let mut products = Vec::new();
    for layer in layers() {
        let (geometry, batch) = (layer.geometry, layer.batch);
        let mut add = |pass, relu, pool| {
            let product =
                Product::new(geometry, batch, pass, relu, pool, family, adapter).expect(VALID);
            products.push(product);
        };
        add(Pass::BackwardWeight, false, None);
        for relu in [false, true] {
            add(Pass::Forward, relu, None);
            add(Pass::BackwardInput, relu, None);
            let window = layer.pool.map(|k| Pool2d::new(geometry.output, k, k));
            if let Some(pool) = window.transpose().expect(VALID)
                && Product::can_pool(&geometry, &pool, family)
            {
                add(Pass::Forward, relu, Some(pool));
            }
        }
    }
    products
}

/// A case for each product of the list's layers.
pub(super) fn layer_cases(adapter: &AdapterReport) -> Vec<Case> {
    let families = Family::ALL.into_iter().filter(|f| f.supported(adapter));
    let products = families.flat_map(|family| of_layers(family, adapter));
    products.map(product_case).collect()
}

/// Every tile of a family on a layer that is several tiles high and wide, pooled too where the family
/// can; on one that is dilated, has no bias and channels that are not in fours; and on one whose sums
/// are long and few, so that the workgroup family slices them.
fn every_tile(family: Family, adapter: &AdapterReport) -> Vec<Product> {
    let input = Shape::new(9, 7, 12);
    let geometry = Conv2d::new(input, 24, [3, 3], [1, 1], [1, 1]).expect(VALID);
    let (input, padding) = (Shape::new(9, 7, 7), [[1, 2], [2, 0]]);
    let dilated = Conv2d::dilated(input, 22, [3, 2], [2, 1], padding, [2, 3]);
    let dilated = dilated.expect(VALID).without_bias();
    let deep = Conv2d::new(Shape::new(5, 4, 64), 48, [3, 3], [1, 1], [1, 1]).expect(VALID);
    let windows = [[2, 2], [1, 2]].map(|k| Pool2d::new(geometry.output, k, k).expect(VALID));
    let pools = windows
        .into_iter()
        .filter(|window| Product::can_pool(&geometry, window, family))
        .map(|window| (Pass::Forward, Some(window)));
    let passes = Pass::ALL.into_iter().map(|pass| (pass, None));
    let passes: Vec<_> = passes.chain(pools).collect();
    let passes = passes
        .iter()
        .map(|(pass, pool)| (geometry, 5, *pass, *pool));
    let more = |geometry, batch| {
        let passes = Pass::ALL.into_iter();
        passes.map(move |pass| (geometry, batch, pass, None))
    };
    // So few images that the weight gradient's sums are too short to be sliced, and sums so long that slices are most.
    let short = (geometry, 2, Pass::BackwardWeight, None);
    let long = Conv2d::new(Shape::new(1, 1, 2100), 20, [1, 1], [1, 1], [0, 0]).expect(VALID);
    let ends = [short, (long, 6, Pass::Forward, None)];
    let layers = passes
        .chain(more(dilated, 5))
        .chain(more(deep, 8))
        .chain(ends);
    let tiles = |(geometry, batch, pass, pool)| {
        let product = Product::new(geometry, batch, pass, false, pool, family, adapter);
        let product = product.expect(VALID);
        let mut tiles = product.tiles_on(adapter);
        // Other adapters have it.
        tiles.extend(tiles.first().and_then(|tile| tile.narrow()));
        tiles.into_iter().map(move |tile| product.with_tile(tile))
    };
    layers.flat_map(tiles).collect()
}

/// More workgroups than one dimension of a dispatch holds, as cheaply as possible: one multiply-add
/// for each of a few million rows, in the family's lowest tile.
fn folded(family: Family, adapter: &AdapterReport) -> Product {
    let geometry = Conv2d::new(Shape::new(64, 64, 1), 1, [1, 1], [1, 1], [0, 0]).expect(VALID);
    let product = |batch| {
        Product::new(geometry, batch, Pass::Forward, false, None, family, adapter).expect(VALID)
    };
    let lowest = product(1)
        .tiles_on(adapter)
        .into_iter()
        .max_by_key(|tile| product(1).with_tile(*tile).workgroups())
        .expect("a family has a tile");
    let per_image = |images: usize| product(images).with_tile(lowest).workgroups();
    // One image may not fill its last tile.
    let batch = (65_536 * 64usize).div_ceil(per_image(64)) + 1;
    product(batch).with_tile(lowest)
}

/// A case for each of [`products`].
pub fn cases(adapter: &AdapterReport) -> Vec<Case> {
    let mut products = products(adapter);
    // A tile of its own may be the one that was chosen already.
    let mut seen = std::collections::HashSet::new();
    products.retain(|p| seen.insert(*p));
    products.into_iter().map(product_case).collect()
}

/// The case of one product.
pub(crate) fn product_case(product: Product) -> Case {
    let case = Case::new(product.pass.name(), product_text(&product), move |bench| {
        build(&product, bench, |_, _| ())
    });
    case.for_tile(&product.tile)
}

/// Tile and geometry, for people.
pub(super) fn product_text(product: &Product) -> String {
    let g = product.geometry;
    let mut variant = format!(
        "{}, {} of {}, kernel {}×{}, {} channels out, stride {}×{}, padding {}×{}",
        product.tile,
        product.batch,
        g.input,
        g.kernel[0],
        g.kernel[1],
        g.output.channels,
        g.stride[0],
        g.stride[1],
        g.padding[0],
        g.padding[1],
    );
    variant += &unusual(&g);
    if product.relu {
        variant += ", ReLU";
    }
    if let Some(pool) = product.pool {
        variant += &format!(", max-pooled {}×{}", pool.kernel[0], pool.kernel[1]);
    }
    let splits = product.splits();
    if splits > 1 {
        variant += &format!(", {splits} splits");
    }
    variant
}

/// What sets a convolution apart from a dense one with a bias and the same padding on both sides, for
/// people.
pub(super) fn unusual(g: &Conv2d) -> String {
    let mut text = String::new();
    if g.dilation != [1, 1] {
        text += &format!(", dilation {}×{}", g.dilation[0], g.dilation[1]);
    }
    let same = [[g.padding[0]; 2], [g.padding[1]; 2]];
    let even = Conv2d::dilated(g.input, 1, g.kernel, g.stride, same, g.dilation);
    if even.is_ok_and(|e| [e.output.height, e.output.width] != [g.output.height, g.output.width]) {
        text += &format!(" before, {}×{} out", g.output.height, g.output.width);
    }
    if g.groups > 1 {
        text += &format!(", {} groups", g.groups);
    }
    if !g.bias {
        text += ", no bias";
    }
    text
}

/// Operands of a product.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Operand {
    X,
    Parameters,
    Dy,
}

/// `change` may spoil each operand after it is drawn.
pub(super) fn build(
    product: &Product,
    bench: &mut Bench,
    change: impl Fn(Operand, &mut [f32]),
) -> Vec<KernelSpec> {
    let (product, g) = (*product, product.geometry);
    if product.redoes_nan() {
        bench.finite_guards();
    }
    // The winner of a pooled window is compared exactly, so rounding must not decide it: the sums of
    // multiples of 1/4 have no rounding errors, and some of the windows have ties.
    let draw = match product.pool {
        Some(_) => Bench::ties,
        None => Bench::values,
    };
    let mut x = draw(bench, product.batch * g.input.elements());
    if product.pass == Pass::BackwardInput && product.relu {
        // What a ReLU leaves behind is 0 in many places, and there the gradient stops.
        x = cpu::relu_forward(&x);
    }
    let mut parameters = draw(bench, g.parameter_elements());
    let mut dy = bench.values(product.batch * g.output.elements());
    change(Operand::X, &mut x);
    change(Operand::Parameters, &mut parameters);
    change(Operand::Dy, &mut dy);
    let [_, _, terms] = product.dimensions();
    let tolerance = Tolerance::sum(terms);
    let results = product.result_elements();
    match product.pass {
        Pass::Forward => {
            let (x, parameters) = (bench.input(&x), bench.input(&parameters));
            let y = bench.output("y", results, tolerance);
            let index = product.pool.map(|_| bench.output_bytes("index", results));
            vec![conv2d::conv2d_forward(product, x, parameters, y, index)]
        }
        Pass::BackwardWeight => {
            let (x, dy) = (bench.input(&x), bench.input(&dy));
            let splits = product.splits();
            let result = bench.output("dW and db", results / splits, tolerance);
            if splits == 1 {
                return vec![conv2d::conv2d_backward_weight(product, x, dy, result)];
            }
            let partials = bench.scratch(results);
            vec![
                conv2d::conv2d_backward_weight(product, x, dy, partials),
                reduce::reduce_splits(splits, partials, result),
            ]
        }
        Pass::BackwardInput => {
            let (dy, parameters) = (bench.input(&dy), bench.input(&parameters));
            let mask = product.relu.then(|| bench.input(&x));
            let dx = bench.output("dx", results, tolerance);
            vec![conv2d::conv2d_backward_input(
                product, dy, parameters, dx, mask,
            )]
        }
    }
}
