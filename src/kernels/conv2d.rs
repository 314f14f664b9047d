//! `shaders/conv2d.wgsl`: convolution and dense layers as implicit matrix products, in three
//! passes and four families, and the choice of a tile.

use super::{AdapterReport, Argument, Dtype, KernelSpec, Prices, View, Work, read, write};
use crate::error::{Error, Result};
use crate::model::recipe::Precision;
use crate::model::{Conv2d, Pool2d};
use minijinja::{Environment, context};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::LazyLock;

/// How a product is spread over the device; see the four `shaders/product_*.wgsl`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// Registers and broadcasts, no workgroup memory: for adapters where loads are dear.
    Subgroup,
    /// Tiles staged in workgroup memory: for real GPUs.
    Workgroup,
    /// Cooperative matrices of halves: for mixed precision on GPUs that have them.
    Matrix,
    /// One invocation per four outputs: for everything else.
    Plain,
    /// No WGSL: a product of the processor's, in one piece.
    Cpu,
}

impl Family {
    pub const ALL: [Family; 4] = [
        Family::Subgroup,
        Family::Workgroup,
        Family::Matrix,
        Family::Plain,
    ];

    /// Whether the adapter can run the family at all.
    pub fn supported(self, adapter: &AdapterReport) -> bool {
        match self {
            // The lanes of a tile are a subgroup, so its size must be known and fixed.
            Family::Subgroup => lanes(adapter).is_some(),
            Family::Workgroup => {
                adapter.max_workgroup_storage_bytes >= 16 << 10
                    && adapter.max_workgroup_invocations >= 256
            }
            Family::Matrix => !Tile::all(Family::Matrix, adapter).is_empty(),
            Family::Plain => true,
            Family::Cpu => false,
        }
    }

    /// The family for an adapter: `forced` if given, else what suits the kind of device and the precision.
    ///
    /// # Errors
    /// [`Error::Usage`] when the forced family cannot run here, or not in this precision.
    pub fn select(
        adapter: &AdapterReport,
        forced: Option<Family>,
        precision: Precision,
    ) -> Result<Family> {
        match forced {
            Some(Family::Matrix) if precision == Precision::F32 => Err(Error::Usage(
                "expected mixed precision for the kernel family matrix, which multiplies 16-bit floats, found f32; use --precision mixed, or leave --kernels out to have one chosen".into(),
            )),
            Some(family) if family.supported(adapter) => Ok(family),
            Some(family) => Err(Error::Usage(format!(
                "expected a kernel family that {} can run, found {family} (subgroup size {:?}, cooperative matrices of {}); leave --kernels out to have one chosen",
                adapter.name,
                adapter.subgroup_size,
                adapter.matrices()
            ))),
            None if precision == Precision::Mixed
                && !adapter.software
                && Family::Matrix.supported(adapter) =>
            {
                Ok(Family::Matrix)
            }
            None => Ok(Family::of_floats(adapter)),
        }
    }

    /// The family for what is not in halves.
    fn of_floats(adapter: &AdapterReport) -> Family {
        let order = if adapter.software {
            [Family::Subgroup, Family::Plain, Family::Workgroup]
        } else {
            [Family::Workgroup, Family::Subgroup, Family::Plain]
        };
        let mut order = order.into_iter();
        order
            .find(|f| f.supported(adapter))
            .unwrap_or(Family::Plain)
    }

    /// This family, or, for a product that is not in halves where it takes no others, one that takes it: what
    /// the optimiser multiplies, say.
    pub fn for_product(self, half: bool, adapter: &AdapterReport) -> Family {
        match self {
            Family::Matrix if !half => Family::of_floats(adapter),
            family => family,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::Subgroup => "subgroup",
            Family::Workgroup => "workgroup",
            Family::Matrix => "matrix",
            Family::Plain => "plain",
            Family::Cpu => "cpu",
        })
    }
}

impl std::str::FromStr for Family {
    type Err = String;

    fn from_str(s: &str) -> std::result::Result<Self, String> {
        Family::ALL
            .into_iter()
            .find(|f| f.to_string() == s)
            .ok_or_else(|| format!("expected subgroup, workgroup, matrix or plain, found '{s}'"))
    }
}

/// The fixed subgroup size, where there is one between 4 and 32.
fn lanes(adapter: &AdapterReport) -> Option<usize> {
    match adapter.subgroup_size {
        Some([min, max]) if min == max && (4..=32).contains(&min) => Some(min as usize),
        _ => None,
    }
}

/// Vec4 sums that a lane of the subgroup family can have on `adapter`.
fn most_sums(adapter: &AdapterReport) -> usize {
    match adapter.software {
        true => MOST_SUMS,
        false => MOST_SUMS_IN_REGISTERS,
    }
}

/// Whether the subgroup family loads 64-bit words. Mesa's software adapter inserts what it loads into vectors one by one,
/// which without AVX-512 takes longer than all else; half as many are half the time. Elsewhere nobody needs it.
fn loads_wide(adapter: &AdapterReport) -> bool {
    adapter.software && adapter.backend == "Vulkan" && adapter.shader_int64
}

/// The side of the adapter's cooperative matrices, and the invocations that hold one together: a subgroup.
/// Where its size may differ from kernel to kernel it is taken as the largest: subgroups that are smaller then
/// compute the same several times.
fn matrices(adapter: &AdapterReport) -> Option<[usize; 2]> {
    let side = adapter.cooperative_matrix? as usize;
    let [_, most] = adapter.subgroup_size?;
    // Metal gives the range of all its devices; those that have such matrices have subgroups of 32.
    let lanes = if adapter.backend == "Metal" { 32 } else { most };
    Some([side, lanes as usize])
}

/// Which of the three products of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Pass {
    Forward,
    BackwardWeight,
    BackwardInput,
}

impl Pass {
    pub const ALL: [Pass; 3] = [Pass::Forward, Pass::BackwardWeight, Pass::BackwardInput];

    /// The entry point.
    pub fn name(self) -> &'static str {
        match self {
            Pass::Forward => "conv2d_forward",
            Pass::BackwardWeight => "conv2d_backward_weight",
            Pass::BackwardInput => "conv2d_backward_input",
        }
    }
}

/// How a product's result is cut up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tile {
    /// `rows` × `cols` (vec4) sums a lane; the lanes lie along the rows. `wide`: floats that lie in fours are loaded as
    /// 64-bit words, two at a time.
    Subgroup {
        lanes: usize,
        rows: usize,
        cols: usize,
        #[serde(default)]
        wide: bool,
    },
    /// `threads_m` × `threads_n` invocations of `rows` × `cols` (vec4) sums, `block_k` terms staged;
    /// `ahead`: the next ones loaded while these are multiplied.
    Workgroup {
        threads_m: usize,
        threads_n: usize,
        rows: usize,
        cols: usize,
        block_k: usize,
        ahead: bool,
    },
    /// `subgroups` down and across, of `lanes` invocations and `rows` × `cols` sums each in matrices of
    /// `side` × `side`, `block_k` terms staged; `ahead` as above.
    Matrix {
        side: usize,
        lanes: usize,
        subgroups: [usize; 2],
        rows: usize,
        cols: usize,
        block_k: usize,
        ahead: bool,
    },
    Plain,
    /// On the CPU: not cut up at all.
    Whole,
}

impl Tile {
    pub fn family(&self) -> Family {
        match self {
            Tile::Subgroup { .. } => Family::Subgroup,
            Tile::Workgroup { .. } => Family::Workgroup,
            Tile::Matrix { .. } => Family::Matrix,
            Tile::Plain => Family::Plain,
            Tile::Whole => Family::Cpu,
        }
    }

    /// Whether `adapter` can run it.
    pub fn fits(&self, adapter: &AdapterReport) -> bool {
        Tile::all(self.family(), adapter).contains(self)
    }

    /// Every tile of `family` on `adapter`.
    pub fn all(family: Family, adapter: &AdapterReport) -> Vec<Tile> {
        match family {
            Family::Subgroup => lanes(adapter)
                .map(|lanes| Product::subgroup_tiles(lanes, most_sums(adapter), adapter).collect())
                .unwrap_or_default(),
            Family::Workgroup => {
                let most = adapter.max_workgroup_storage_bytes as usize;
                let tiles = WORKGROUP_TILES.into_iter();
                tiles.filter(|tile| tile.staged_bytes() <= most).collect()
            }
            Family::Matrix => matrices(adapter)
                .filter(|_| adapter.shader_f16)
                .map(|[side, lanes]| matrix_tiles(side, lanes, adapter))
                .unwrap_or_default(),
            Family::Plain => vec![Tile::Plain],
            Family::Cpu => vec![Tile::Whole],
        }
    }

    /// The same with 32-bit loads, where it has wider ones.
    pub fn narrow(self) -> Option<Tile> {
        match self {
            Tile::Subgroup {
                lanes,
                rows,
                cols,
                wide: true,
            } => Some(Tile::Subgroup {
                lanes,
                rows,
                cols,
                wide: false,
            }),
            _ => None,
        }
    }

    /// Whether a block of terms is loaded while the one before is multiplied.
    fn loads_ahead(&self) -> bool {
        matches!(
            self,
            Tile::Workgroup { ahead: true, .. } | Tile::Matrix { ahead: true, .. }
        )
    }

    /// Vec4 that an invocation loads for a block of terms.
    fn loads(&self) -> f64 {
        let [m, n4] = self.size(Pass::Forward);
        match *self {
            Tile::Workgroup { block_k, .. } | Tile::Matrix { block_k, .. } => {
                ((m / 4 + n4) * block_k) as f64 / self.threads() as f64
            }
            _ => 0.0,
        }
    }

    /// Registers that an invocation is assumed to take: its sums and what is beside them, with what is loaded ahead.
    fn registers(&self) -> f64 {
        match *self {
            Tile::Workgroup {
                rows, cols, ahead, ..
            } => (4 * rows * cols) as f64 + 56.0 + if ahead { 4.0 * self.loads() } else { 0.0 },
            Tile::Matrix {
                lanes,
                rows,
                cols,
                ahead,
                ..
            } => (rows * cols / lanes) as f64 + 64.0 + if ahead { 2.0 * self.loads() } else { 0.0 },
            _ => 0.0,
        }
    }

    /// Invocations that compute one.
    fn threads(&self) -> usize {
        match *self {
            Tile::Workgroup {
                threads_m,
                threads_n,
                ..
            } => threads_m * threads_n,
            Tile::Matrix {
                lanes,
                subgroups: [m, n],
                ..
            } => lanes * m * n,
            _ => 1,
        }
    }

    /// Bytes of workgroup memory of one, with what keeps its rows apart.
    fn staged_bytes(&self) -> usize {
        let [m, n4] = self.size(Pass::Forward);
        match *self {
            Tile::Workgroup { block_k, .. } => block_k / 4 * ((m + 2) + (4 * n4 + 2)) * 16,
            Tile::Matrix {
                side,
                subgroups: [down, _],
                block_k,
                ..
            } => {
                // Either way round, and a row of matrices of sums on their way out.
                let staged = |rows: usize| (rows * (block_k + 8)).max(block_k * (rows + 8)) * 2;
                staged(m) + staged(4 * n4) + down * side * (n4 + 1) * 16
            }
            _ => 0,
        }
    }

    /// Rows and vec4 columns of one tile of the result, for pass `pass`.
    fn size(&self, pass: Pass) -> [usize; 2] {
        match *self {
            Tile::Subgroup {
                lanes, rows, cols, ..
            } => [lanes * rows, cols],
            Tile::Workgroup {
                threads_m,
                threads_n,
                rows,
                cols,
                ..
            } => [threads_m * rows, threads_n * cols],
            Tile::Matrix {
                subgroups: [down, across],
                rows,
                cols,
                ..
            } => [down * rows, across * cols / 4],
            Tile::Plain => [if pass == Pass::BackwardWeight { 4 } else { 1 }, 1],
            Tile::Whole => [usize::MAX; 2],
        }
    }
}

impl fmt::Display for Tile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [m, n4] = self.size(Pass::Forward);
        let n = n4.saturating_mul(4);
        match self {
            Tile::Subgroup {
                rows, cols, wide, ..
            } => write!(
                f,
                "subgroup {m}×{n} ({rows}×{} a lane{})",
                cols * 4,
                if *wide { ", 64-bit loads" } else { "" }
            ),
            Tile::Workgroup {
                rows,
                cols,
                block_k,
                ahead,
                ..
            } => write!(
                f,
                "workgroup {m}×{}×{block_k} ({rows}×{} an invocation{})",
                n,
                cols * 4,
                if *ahead { ", loads ahead" } else { "" }
            ),
            Tile::Matrix {
                side,
                rows,
                cols,
                block_k,
                ahead,
                ..
            } => write!(
                f,
                "matrix {m}×{n}×{block_k} ({rows}×{cols} a subgroup in matrices of {side}×{side}{})",
                if *ahead { ", loads ahead" } else { "" }
            ),
            Tile::Plain => f.write_str("plain"),
            Tile::Whole => f.write_str("whole"),
        }
    }
}

impl fmt::Display for Product {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.pass.name(), self.tile)?;
        let splits = self.splits();
        if splits > 1 {
            write!(f, ", {splits} splits")?;
        }
        let slices = self.slices();
        if slices > 1 {
            write!(f, ", {slices} slices")?;
        }
        if self.pool.is_some() {
            write!(f, ", max-pooling fused")?;
        }
        if self.half {
            write!(f, ", in halves")?;
        }
        Ok(())
    }
}

/// One product of one layer with everything that its kernel bakes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Product {
    pub geometry: Conv2d,
    pub batch: usize,
    pub pass: Pass,
    /// Forward: the layer ends in ReLU. Input gradient: the layer *before* ended in ReLU, so the
    /// gradient passes where its stored output (this layer's input) is positive.
    pub relu: bool,
    /// Forward: the max-pooling that follows and is computed along, see [`Product::can_pool`].
    pub pool: Option<Pool2d>,
    /// Whether operands and activations are stored as halves; sums, and what a weight gradient writes, are floats.
    #[serde(default)]
    pub half: bool,
    pub tile: Tile,
}

impl Product {
    /// The product with the built-in choice of tile for `family`.
    ///
    /// # Errors
    /// [`Error::Shape`] for a `pool` that [`Product::can_pool`] refuses or on another pass.
    pub fn new(
        geometry: Conv2d,
        batch: usize,
        pass: Pass,
        relu: bool,
        pool: Option<Pool2d>,
        family: Family,
        adapter: &AdapterReport,
    ) -> Result<Product> {
        if let Some(pool) = &pool
            && (pass != Pass::Forward || !Product::can_pool(&geometry, pool, family))
        {
            return Err(Error::Shape {
                operation: pass.name(),
                what: format!(
                    "expected max-pooling of the forward pass's output, of 2 or 4 positions side by side, with channels in fours and not in family plain, found window {:?} with stride {:?} over {} in family {family} after an output of {}; run maxpool2d_forward after the product",
                    pool.kernel, pool.stride, pool.input, geometry.output
                ),
            });
        }
        let mut product = Product {
            geometry,
            batch,
            pass,
            relu,
            pool,
            half: false,
            tile: Tile::Plain,
        };
        match family {
            Family::Subgroup => {
                let sums = FEWEST_SUMS.min(most_sums(adapter));
                product.choose_subgroup_tile(lanes(adapter).unwrap_or(8), sums, adapter)
            }
            Family::Workgroup | Family::Matrix => {
                // That of its family which should be the fastest.
                let tiles = Tile::all(family, adapter).into_iter();
                let any = tiles.chain([WORKGROUP_TILES[0]]).next();
                product.tile = any.expect("there is always one");
                if let Some(tile) = product.tiles_on(adapter).first() {
                    product.tile = *tile;
                }
            }
            Family::Plain | Family::Cpu => {}
        }
        Ok(product)
    }

    /// Whether the forward pass of `geometry` can end in max-pooling by `pool`: windows side by side
    /// whose two or four rows fit into an invocation's, and four channels to a word of the index.
    pub fn can_pool(geometry: &Conv2d, pool: &Pool2d, family: Family) -> bool {
        !matches!(family, Family::Plain | Family::Cpu)
            && pool.input == geometry.output
            && pool.inside()
            && pool.kernel == pool.stride
            && matches!(pool.kernel[0] * pool.kernel[1], 2 | 4)
            && geometry.output.channels.is_multiple_of(4)
    }

    /// The product with the built-in choice among larger tiles too, as far as a model of so many
    /// products can afford: larger tiles load less, but a vec4 sum a lane takes 6 to 8 ms to compile,
    /// and a first step should be through within seconds. For the subgroup family.
    pub fn in_model_of(mut self, products: usize, adapter: &AdapterReport) -> Product {
        if let Tile::Subgroup { lanes, .. } = self.tile {
            let sums = (SUMS_OF_A_MODEL / products.max(1)).max(FEWEST_SUMS);
            self.choose_subgroup_tile(lanes, sums.min(most_sums(adapter)), adapter);
        }
        self
    }

    /// The product with its operands stored as halves, or not.
    pub fn in_halves(self, half: bool) -> Product {
        Product { half, ..self }
    }

    /// The product with a given tile.
    pub fn with_tile(self, tile: Tile) -> Product {
        Product { tile, ..self }
    }

    /// Parts into which the sums of a weight gradient are cut, so that its few outputs and long sums
    /// give a device enough to do (1 for the other passes). They decide the order of the additions,
    /// so they follow from the shape alone, never from the family, the tile or a measurement.
    pub fn splits(&self) -> usize {
        if self.pass != Pass::BackwardWeight || self.tile == Tile::Whole {
            return 1;
        }
        let [m, n, k] = self.dimensions();
        let fewest = if m * n < WANTED_SUMS {
            FEWEST_SPLITS
        } else {
            1
        };
        (WANTED_SUMS / (m * n))
            .max(fewest)
            .min(k / SHORTEST_SUM)
            .clamp(1, MOST_SPLITS)
    }

    /// Terms in each of [`Product::splits`] but the last, which may have fewer.
    fn split_length(&self) -> usize {
        let [_, _, k] = self.dimensions();
        let whole = match self.tile.family() {
            Family::Workgroup => LARGEST_BLOCK,
            _ => TURN,
        };
        k.div_ceil(self.splits()).next_multiple_of(whole)
    }

    /// How the blocks of a weight gradient's terms in the workgroup family meet the ends of splits and
    /// slices.
    fn ends(&self, block_k: usize) -> Ends {
        let [_, _, k] = self.dimensions();
        let (splits, split, slice) = (self.splits(), self.split_length(), self.length());
        if !k.is_multiple_of(block_k) || !slice.is_multiple_of(block_k) {
            Ends::Ragged
        } else if splits * split == k && self.slices() * slice == split {
            Ends::Exact
        } else {
            Ends::Outside
        }
    }

    /// Rows, columns and terms per sum of the matrix product.
    pub fn dimensions(&self) -> [usize; 3] {
        let g = &self.geometry;
        let positions = self.batch * g.positions();
        match self.pass {
            Pass::Forward => {
                // Positions that no window covers are not computed.
                let rows = self.pool.map_or(positions, |p| {
                    self.batch * p.output.height * p.output.width * p.kernel[0] * p.kernel[1]
                });
                [rows, g.output.channels, g.patch()]
            }
            Pass::BackwardWeight => [g.parameter_rows(), g.output.channels, positions],
            Pass::BackwardInput => [
                self.batch * g.input.height * g.input.width,
                g.input.channels,
                g.kernel[0] * g.kernel[1] * g.output.channels,
            ],
        }
    }

    /// Whether `other` computes the same thing, however it is cut up.
    pub fn same_work(&self, other: &Product) -> bool {
        self.with_tile(other.tile) == *other
    }

    /// Whether the tile of `choice`, which was made before, is one for this product on `adapter`.
    pub fn takes(&self, choice: &Product, adapter: &AdapterReport) -> bool {
        self.same_work(choice)
            && self.tile.family() == choice.tile.family()
            && self.tiles_on(adapter).contains(&choice.tile)
    }

    /// Floating-point operations as usually counted: two per multiply-add of the convolution,
    /// padding included, bias and ReLU not.
    pub fn flops(&self) -> f64 {
        2.0 * (self.batch * self.geometry.positions()) as f64
            * self.geometry.weight_elements() as f64
    }

    /// Elements of the result: of all partial sums for the weight gradient.
    pub fn result_elements(&self) -> usize {
        let [m, n, _] = self.dimensions();
        match self.pool {
            Some(pool) => self.batch * pool.output.elements(),
            None => m * n * self.splits(),
        }
    }

    fn tiles(&self) -> [usize; 2] {
        let [m, n, _] = self.dimensions();
        let [tile_m, tile_n4] = self.tile.size(self.pass);
        let rows = m - usize::from(self.bias_apart());
        [rows.div_ceil(tile_m), n.div_ceil(4).div_ceil(tile_n4)]
    }

    /// Whether the bias's row of a weight gradient lies in no tile: the workgroup family sums it up beside,
    /// because one row more is often a row of tiles more.
    fn bias_apart(&self) -> bool {
        let workgroup = self.tile.family() == Family::Workgroup;
        workgroup && self.pass == Pass::BackwardWeight && self.geometry.bias
    }

    /// Lowest estimated cost by the adapter's prices: on a software adapter loads are dear (a vec4 load costs as
    /// much as 75 multiply-adds, without AVX-512 300), so tiles as large as the registers allow, shaped to the
    /// number of columns. See docs/performance.md.
    fn choose_subgroup_tile(&mut self, lanes: usize, most_sums: usize, adapter: &AdapterReport) {
        let mut best = (f64::INFINITY, Tile::Plain);
        for tile in Self::subgroup_tiles(lanes, most_sums, adapter) {
            self.tile = tile;
            let cost = self.estimated_cost(&adapter.prices);
            if cost < best.0 {
                best = (cost, tile);
            }
        }
        self.tile = best.1;
    }

    /// The tiles of the subgroup family with at most so many vec4 sums a lane.
    fn subgroup_tiles(
        lanes: usize,
        most_sums: usize,
        adapter: &AdapterReport,
    ) -> impl Iterator<Item = Tile> {
        let wide = loads_wide(adapter);
        [4, 8, 16].into_iter().flat_map(move |rows| {
            [1, 2, 3, 4, 6, 8, 12, 16]
                .into_iter()
                .filter(move |cols| rows * cols <= most_sums)
                .map(move |cols| Tile::Subgroup {
                    lanes,
                    rows,
                    cols,
                    wide,
                })
        })
    }

    /// Nanoseconds of one core of a software adapter for all tiles together, by its prices, and the step's share
    /// of the compilation. What is no load has the same price wherever it was measured.
    fn estimated_cost(&self, prices: &Prices) -> f64 {
        let Tile::Subgroup {
            lanes,
            rows,
            cols,
            wide,
        } = self.tile
        else {
            return f64::INFINITY;
        };
        const BROADCAST: f64 = 0.5;
        let multiply_add = prices.multiply_add_ns;
        // Half as many insertions into vectors, which is what loads cost, and taking the halves apart.
        let width = if wide && !self.half { 0.6 } else { 1.0 };
        let load = |vector: bool| match vector {
            true => multiply_add * prices.load * width,
            false => multiply_add * prices.loads,
        };
        let store = |vector: bool| if vector { 19.0 } else { 38.0 };
        let align = self.alignment();
        let (rows_f, cols_f) = (rows as f64, cols as f64);
        let [_, _, k] = self.dimensions();
        let [tiles_m, tiles_n] = self.tiles();
        let tiles = (tiles_m * tiles_n) as f64;
        let shares = (TURN * cols).div_ceil(lanes) as f64;
        let turn = 10.0
            + rows_f * (load(align.a) + 4.0)
            + shares * load(align.b)
            + cols_f * 16.0 * (BROADCAST + rows_f * multiply_add);
        let sums = k.div_ceil(TURN) as f64 * turn;
        let one = sums + rows_f * (10.0 + cols_f * store(align.o));
        // Fewer tiles than a handful leave cores idle (a weight gradient is split instead).
        let idle = if self.pass == Pass::BackwardWeight {
            1.0
        } else {
            (8.0 / tiles).max(1.0)
        };
        // A vec4 sum more in the unrolled body takes 6 to 8 ms to compile on the first run, which a
        // short training must earn back: a share of it per step, on both cores.
        let compilation = 2.0 * 8e6 / 1500.0 * rows_f * cols_f;
        one * tiles * idle + compilation
    }

    /// Every tile of its family that it can have on `adapter`, those first that should be the fastest.
    pub fn tiles_on(&self, adapter: &AdapterReport) -> Vec<Tile> {
        let mut tiles = Tile::all(self.tile.family(), adapter);
        tiles.retain(|tile| {
            // Each slice has invocations and workgroup memory of its own, and there they meet.
            let slices = self.with_tile(*tile).slices();
            slices * tile.threads() <= 256
                && (slices == 1 || tile.threads() <= tile.size(self.pass)[0])
                && slices * tile.staged_bytes() <= adapter.max_workgroup_storage_bytes as usize
        });
        let price = |tile: &Tile| match *tile {
            // Where it cannot be fast it should compile fast.
            Tile::Matrix { rows, cols, .. } if adapter.software => (rows * cols) as f64,
            // What spills is slow, nobody can tell how slow.
            _ if tile.registers() > adapter.registers as f64 => f64::INFINITY,
            _ => self.with_tile(*tile).price(&adapter.prices),
        };
        tiles.sort_by(|a, b| price(a).total_cmp(&price(b)));
        tiles
    }

    /// Slices of the terms that a workgroup sums up side by side, because there are too few tiles to give
    /// a GPU enough to do; the workgroup family alone. They decide the order of the additions, so they
    /// follow from the shape alone.
    pub fn slices(&self) -> usize {
        if self.tile.family() != Family::Workgroup {
            return 1;
        }
        let [m, n, k] = self.dimensions();
        let tiles = m.div_ceil(64) * n.div_ceil(64) * self.splits();
        let terms = k / self.splits();
        let most = (WANTED_TILES / tiles).min(terms / SHORTEST_SLICE);
        match most {
            0 | 1 => 1,
            2 | 3 => 2,
            4..32 => 4,
            // A dense layer's, of which larger tiles are of no use.
            _ => 8,
        }
    }

    /// Terms that an invocation of the workgroup or the matrix family sums up.
    fn length(&self) -> usize {
        let [_, _, k] = self.dimensions();
        let terms = match self.pass {
            Pass::BackwardWeight => self.split_length(),
            _ => k.next_multiple_of(4),
        };
        match self.slices() {
            1 => terms,
            slices => terms.div_ceil(slices).next_multiple_of(LARGEST_BLOCK),
        }
    }

    /// What a tile of the workgroup or the matrix family costs on a GPU, in cycles of one of its cores: for choosing
    /// among tiles, not for telling the time. A GPU is taken to have 100 cores, each of which does 128 multiply-adds a
    /// cycle (512 in matrices), reads 128 bytes of workgroup memory, has 64 Ki registers and waits 1,000 cycles for
    /// memory, a tenth of that where loads are ahead. What is not a multiply-add is weighed by `prices`: a read of workgroup
    /// memory where reads are the limit (as three quarters, because neighbours share what they read), a load with its store,
    /// and where a store takes four values one by one, a read for it. A block's loop and barriers as 40, and registers beside
    /// the sums, are assumed. On an NVIDIA H200 the first choice was 2 per cent from the best of all tiles; see docs/performance.md.
    fn price(&self, prices: &Prices) -> f64 {
        const CORES: f64 = 100.0;
        const LANES: f64 = 128.0;
        const MATRIX_LANES: f64 = 512.0;
        const BYTES: f64 = 128.0;
        const REGISTERS: f64 = 65_536.0;
        const LATENCY: f64 = 1000.0;
        let [m, n4] = self.tile.size(self.pass);
        let threads = (self.tile.threads() * self.slices()) as f64;
        let loads = self.tile.loads();
        // Sums of an invocation, cycles for a block, and terms of one.
        let (sums, busy, block_k) = match self.tile {
            Tile::Workgroup {
                rows,
                cols,
                block_k,
                ..
            } => {
                let sums = (4 * rows * cols) as f64;
                // Vec4 that it reads of workgroup memory for a term.
                let reads = (rows / 4 + cols) as f64;
                let work = block_k as f64 * (sums + reads).max(0.75 * prices.read * reads)
                    + prices.load * loads
                    + 40.0;
                (sums, threads * work / LANES, block_k)
            }
            Tile::Matrix {
                lanes,
                rows,
                cols,
                block_k,
                ..
            } => {
                let sums = (rows * cols / lanes) as f64;
                let multiplies = (m * 4 * n4 * block_k) as f64 / MATRIX_LANES;
                let reads = (threads / lanes as f64) * ((rows + cols) * block_k * 2) as f64 / BYTES;
                let work = threads * ((prices.load + prices.read) * loads + 40.0) / LANES;
                (sums, multiplies.max(reads) + work, block_k)
            }
            Tile::Subgroup { .. } => return self.estimated_cost(prices),
            _ => return 0.0,
        };
        let (groups, blocks) = (self.workgroups() as f64, self.length().div_ceil(block_k));
        // Workgroups that share a core hide each other's waits, each of them a share.
        let most = (REGISTERS / self.tile.registers() / threads)
            .max(1.0)
            .floor();
        let resident = (groups / CORES).clamp(1.0, most);
        let wait = if self.tile.loads_ahead() {
            0.1 * LATENCY
        } else {
            LATENCY
        };
        let round = resident * busy + wait / resident;
        let rest = 6.0 * resident * sums * threads / LANES + 2.0 * LATENCY;
        (groups / CORES / resident).max(1.0) * (blocks as f64 * round + rest)
    }

    fn alignment(&self) -> Alignment {
        let (c, oc) = (
            self.geometry.input.channels.is_multiple_of(4),
            self.geometry.output.channels.is_multiple_of(4),
        );
        match self.pass {
            Pass::Forward | Pass::BackwardWeight => Alignment { a: c, b: oc, o: oc },
            Pass::BackwardInput => Alignment { a: oc, b: oc, o: c },
        }
    }

    /// Whether some terms of some sums do not count: taps in the padding, or that do not reach.
    fn partial(&self) -> bool {
        let g = &self.geometry;
        match self.pass {
            Pass::BackwardInput => [g.kernel, g.stride] != [[1, 1]; 2] || g.padded(),
            _ => g.padded(),
        }
    }

    /// How far rows m to m + 3 are from row m, where that is the same for all m in fours: in elements
    /// of the operand (vec4 where it has them), in image rows and in columns. They are one place of
    /// several images, or the places of a window.
    fn rows_apart(&self) -> Option<[[usize; 3]; 4]> {
        let g = &self.geometry;
        let image = match self.pass {
            Pass::Forward => &g.input,
            Pass::BackwardInput => &g.output,
            Pass::BackwardWeight => return None,
        };
        let [pool_h, pool_w] = self.pool.map_or([1, 1], |p| p.kernel);
        if !self.batch.is_multiple_of(4 / (pool_h * pool_w)) {
            return None;
        }
        let per = if self.alignment().a { 4 } else { 1 };
        Some([0, 1, 2, 3].map(|row| {
            let (images, place) = (row / (pool_h * pool_w), row % (pool_h * pool_w));
            let (y, x) = (place / pool_w * g.stride[0], place % pool_w * g.stride[1]);
            let elements = images * image.elements() + (y * image.width + x) * image.channels;
            [elements / per, y, x]
        }))
    }

    /// Whether an invocation that finds a NaN among its sums computes them anew.
    pub(crate) fn redoes_nan(&self) -> bool {
        self.partial() && self.tile != Tile::Plain
    }

    /// The WGSL of the kernel.
    pub fn source(&self) -> Result<String> {
        let g = &self.geometry;
        let align = self.alignment();
        let [m, n, k] = self.dimensions();
        let [tiles_m, tiles_n] = self.tiles();
        let [tile_m, tile_n4] = self.tile.size(self.pass);
        let weight_pass = self.pass == Pass::BackwardWeight;
        let chunks = if weight_pass { m } else { k }.div_ceil(4);
        let splits = self.splits();
        let split_length = self.split_length();
        let slices = self.slices();
        // Staged blocks of terms run past the last chunk when they do not divide it, or slices do.
        let overrun = match self.tile {
            Tile::Workgroup { block_k, .. } | Tile::Matrix { block_k, .. } => {
                let staged = slices * self.length().next_multiple_of(block_k);
                !weight_pass && staged > chunks * 4
            }
            _ => false,
        };
        let (partial, redo) = (self.partial(), self.redoes_nan());
        let ends = match self.tile {
            Tile::Workgroup { block_k, .. } if weight_pass => Some(self.ends(block_k)),
            _ => None,
        };
        let shape = context! {
            pass => self.pass.name(),
            family => self.tile.family().to_string(),
            n => self.batch,
            h => g.input.height, w => g.input.width, c => g.input.channels,
            oh => g.output.height, ow => g.output.width, oc => g.output.channels,
            kh => g.kernel[0], kw => g.kernel[1],
            sh => g.stride[0], sw => g.stride[1],
            ph => g.padding[0], pw => g.padding[1],
            dh => g.dilation[0], dw => g.dilation[1],
            dilated => g.dilation != [1, 1], bias => g.bias,
            m, k, columns => n, columns4 => n.div_ceil(4), chunks,
            a4 => align.a, b4 => align.b, o4 => align.o,
            relu => self.relu, half => self.half,
            words64 => !self.half && matches!(self.tile, Tile::Subgroup { wide: true, .. }),
            pool => self.pool.is_some(),
            pool_h => self.pool.map(|p| p.kernel[0]), pool_w => self.pool.map(|p| p.kernel[1]),
            windows_h => self.pool.map(|p| p.output.height),
            windows_w => self.pool.map(|p| p.output.width),
            padded => g.padded(),
            unit_stride => g.stride == [1, 1],
            guard_chunk => !align.a || overrun,
            tail => !weight_pass && (!k.is_multiple_of(4) || overrun),
            exact => matches!(ends, Some(Ends::Exact | Ends::Outside)),
            outside => ends == Some(Ends::Outside), ragged => ends == Some(Ends::Ragged),
            bias_apart => self.bias_apart(),
            partial, redo, by_formula => redo || self.tile == Tile::Plain,
            splits, split_length, tiles_m, tiles_n,
        };
        let channels = match self.pass {
            Pass::BackwardInput => g.output.channels,
            _ => g.input.channels,
        };
        // Whether the terms of a staged block belong to one tap.
        let one_tap = |block_k| !weight_pass && !overrun && channels.is_multiple_of(block_k);
        let tile = match self.tile {
            // No software adapter has so many lanes. Elsewhere tiles are measured, and where a driver
            // fused in some and not in others, they would differ in their bits.
            Tile::Subgroup {
                lanes, rows, cols, ..
            } => context! {
                lanes, rows, cols, tile_m, fused => lanes == 32,
            },
            Tile::Workgroup {
                threads_m,
                threads_n,
                rows,
                cols,
                block_k,
                ahead,
            } => context! {
                threads_m, threads_n, rows, cols, block_k, ahead, slices,
                threads => threads_m * threads_n, block_m => tile_m, block_n => tile_n4 * 4,
                length => self.length(), apart => self.rows_apart(), one_tap => one_tap(block_k),
            },
            Tile::Matrix {
                side,
                lanes,
                subgroups: [down, across],
                rows,
                cols,
                block_k,
                ahead,
            } => context! {
                side, lanes, down, across, rows => rows / side, cols => cols / side, block_k, ahead,
                threads => self.tile.threads(), block_m => tile_m, block_n => tile_n4 * 4,
                length => self.length(), one_tap => one_tap(block_k),
            },
            Tile::Plain | Tile::Whole => context! {},
        };
        let rendered = ENVIRONMENT.as_ref().map_err(|e| format!("{e:#}"));
        let rendered = rendered.and_then(|environment| {
            let template = environment.get_template("conv2d.wgsl");
            let rendered = template.and_then(|t| t.render(context! { ..shape, ..tile }));
            rendered.map_err(|e| format!("{e:#}"))
        });
        rendered.map_err(|e| Error::Gpu {
            label: self.pass.name().into(),
            what: format!("the kernel template cannot be rendered: {e}"),
        })
    }

    /// Workgroups of the dispatch; past 65,535 they lie in several rows.
    pub fn workgroups(&self) -> usize {
        let [tiles_m, tiles_n] = self.tiles();
        let tiles = tiles_m * tiles_n * self.splits();
        match self.tile {
            Tile::Plain => tiles.div_ceil(64),
            _ => tiles,
        }
    }

    /// The kernel with its operands: binding 0 and 1 are read, what follows says its access itself.
    fn spec(mut self, arguments: Vec<Argument>) -> KernelSpec {
        self.half = arguments[0].view.dtype == Dtype::F16;
        let mut spec =
            KernelSpec::new(self.pass.name(), "", Work::Product(self), &[], arguments, 0);
        spec.groups = self.workgroups();
        spec.cost.flops = self.flops();
        spec
    }
}

/// How blocks of terms meet the ends of what they are the blocks of.
#[derive(Clone, Copy, PartialEq)]
enum Ends {
    /// No block reaches past an end.
    Exact,
    /// Some blocks lie wholly past an end, none across.
    Outside,
    /// Some lie across.
    Ragged,
}

/// Which operands can be read or written four elements at a time.
struct Alignment {
    a: bool,
    b: bool,
    o: bool,
}

/// Vec4 sums a lane in the subgroup family: the products of a model share so many of them, but each
/// may have the fewest and none more than the most.
const FEWEST_SUMS: usize = 64;
const MOST_SUMS: usize = 128;
const SUMS_OF_A_MODEL: usize = 1536;
/// With more, kernels spill on an AMD gfx1100, where Mesa 22.3 gives a lane 128 registers; see `examples/isa`.
const MOST_SUMS_IN_REGISTERS: usize = 8;

/// A weight gradient's sums are cut until there are so many partial sums, enough for 256 workgroups
/// with tiles of 64×64, but into parts of no fewer terms, and no more parts, than these. Where fewer parts
/// would do, there are eight: on a GPU of 132 cores 432 workgroups took a quarter longer than 1,152.
const WANTED_SUMS: usize = 1 << 20;
const FEWEST_SPLITS: usize = 8;
const SHORTEST_SUM: usize = 512;
const MOST_SPLITS: usize = 256;

/// In the workgroup family, sums are cut into slices until there are so many tiles of 64×64, but into
/// slices of no fewer terms than these, and of whole blocks of any tile.
const WANTED_TILES: usize = 1024;
const SHORTEST_SLICE: usize = 64;
const LARGEST_BLOCK: usize = 16;

/// The tiles of the workgroup family.
const WORKGROUP_TILES: [Tile; 16] = {
    const fn tile(threads: [usize; 2], sums: [usize; 2], block_k: usize, ahead: bool) -> Tile {
        let ([threads_m, threads_n], [rows, cols]) = (threads, sums);
        Tile::Workgroup {
            threads_m,
            threads_n,
            rows,
            cols,
            block_k,
            ahead,
        }
    }
    [
        tile([16, 16], [8, 2], 16, false),
        tile([16, 16], [8, 2], 16, true),
        tile([16, 8], [8, 2], 16, false),
        tile([16, 8], [8, 2], 16, true),
        tile([8, 16], [8, 2], 16, false),
        tile([8, 16], [8, 2], 16, true),
        tile([8, 8], [8, 2], 16, false),
        tile([8, 8], [8, 2], 16, true),
        tile([8, 8], [8, 2], 8, false),
        tile([16, 8], [8, 1], 16, false),
        tile([8, 8], [8, 1], 16, false),
        tile([8, 8], [4, 1], 16, false),
        tile([8, 8], [4, 1], 16, true),
        tile([16, 4], [4, 1], 16, false),
        tile([8, 4], [4, 1], 16, false),
        tile([8, 4], [4, 1], 16, true),
    ]
};

/// The tiles of the matrix family for cooperative matrices of `side` × `side` that are held by `lanes` invocations.
fn matrix_tiles(side: usize, lanes: usize, adapter: &AdapterReport) -> Vec<Tile> {
    /// Subgroups down and across, sums of each, matrices of terms at a time, loads ahead.
    type Cut = ([usize; 2], [usize; 2], usize, bool);
    const CUTS: [Cut; 10] = [
        ([2, 2], [64, 64], 2, false),
        ([2, 2], [64, 32], 2, false),
        ([2, 2], [64, 32], 2, true),
        ([2, 2], [32, 32], 2, false),
        ([2, 2], [32, 32], 2, true),
        ([4, 1], [32, 32], 2, true),
        ([2, 1], [32, 32], 2, true),
        ([1, 1], [32, 32], 2, false),
        ([4, 1], [32, 16], 2, false),
        ([2, 2], [16, 16], 4, false),
    ];
    let tile = |(subgroups, [rows, cols], deep, ahead): Cut| Tile::Matrix {
        side,
        lanes,
        subgroups,
        rows,
        cols,
        block_k: deep * side,
        ahead,
    };
    let fits = |tile: &Tile| {
        let ([m, n4], threads) = (tile.size(Pass::Forward), tile.threads());
        // Each invocation keeps its place across the tile, whichever way it lies.
        let even = [m / 4, n4]
            .iter()
            .all(|across| threads.is_multiple_of(*across));
        even && threads <= 256.min(adapter.max_workgroup_invocations as usize)
            && tile.staged_bytes() <= adapter.max_workgroup_storage_bytes as usize
    };
    // More matrices take long to compile.
    let few = |[rows, cols]: [usize; 2]| rows / side * (cols / side) <= 16;
    let cuts = CUTS.into_iter().filter(|(_, sums, ..)| few(*sums));
    cuts.map(tile).filter(fits).collect()
}

/// Terms of the sums per turn of the loop in the subgroup family: those of one vec4.
const TURN: usize = 4;

const TEMPLATES: [(&str, &str); 5] = [
    ("conv2d.wgsl", include_str!("../../shaders/conv2d.wgsl")),
    (
        "product_subgroup.wgsl",
        include_str!("../../shaders/product_subgroup.wgsl"),
    ),
    (
        "product_workgroup.wgsl",
        include_str!("../../shaders/product_workgroup.wgsl"),
    ),
    (
        "product_matrix.wgsl",
        include_str!("../../shaders/product_matrix.wgsl"),
    ),
    (
        "product_plain.wgsl",
        include_str!("../../shaders/product_plain.wgsl"),
    ),
];

/// The templates, compiled once.
static ENVIRONMENT: LazyLock<std::result::Result<Environment, minijinja::Error>> =
    LazyLock::new(|| {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(minijinja::UndefinedBehavior::Strict);
        for (name, text) in TEMPLATES {
            environment.add_template(name, text)?;
        }
        Ok(environment)
    });

/// `y[N,OH,OW,OC] = im2col(x[N,H,W,C]) · W + b`, then ReLU, then max-pooling if the product says so.
/// `parameters` is the layer's `[KH·KW·C + 1, OC]` matrix, without the last row where it has no bias;
/// `index` receives the pooling's index (one byte per element of the pooled `y`) and is there where it
/// pools. Writes `y` (and `index`).
pub fn conv2d_forward(
    product: Product,
    x: View,
    parameters: View,
    y: View,
    index: Option<View>,
) -> KernelSpec {
    let (g, results) = (product.geometry, product.result_elements());
    assert_eq!(product.pool.is_some(), index.is_some());
    let mut arguments = vec![
        read(0, "x", x, product.batch * g.input.elements()),
        read(1, "parameters", parameters, g.parameter_elements()),
        write(2, "y", y, results),
    ];
    arguments.extend(index.map(|index| write(3, "index", index, results)));
    product.spec(arguments)
}

/// Partial sums `[splits, KH·KW·C + 1, OC]` of `im2col(x)ᵀ · dy` with the bias gradient, if there
/// is a bias, as the last row; `reduce_splits` adds them up. Writes `partials`.
pub fn conv2d_backward_weight(product: Product, x: View, dy: View, partials: View) -> KernelSpec {
    let g = product.geometry;
    product.spec(vec![
        read(0, "x", x, product.batch * g.input.elements()),
        read(1, "dy", dy, product.batch * g.output.elements()),
        write(2, "partials", partials, product.result_elements()),
    ])
}

/// `dx[N,H,W,C]` from `dy[N,OH,OW,OC]`: the transposed convolution; with `activation` (this layer's
/// input), which is there where the product has `relu`, the gradient passes only where that is
/// positive. Writes `dx`.
pub fn conv2d_backward_input(
    product: Product,
    dy: View,
    parameters: View,
    dx: View,
    activation: Option<View>,
) -> KernelSpec {
    let (g, results) = (product.geometry, product.result_elements());
    assert_eq!(product.relu, activation.is_some());
    let mut arguments = vec![
        read(0, "dy", dy, product.batch * g.output.elements()),
        read(1, "parameters", parameters, g.weight_elements()),
        write(2, "dx", dx, results),
    ];
    arguments.extend(activation.map(|activation| read(3, "activation", activation, results)));
    product.spec(arguments)
}
