// One batch out of the dataset, each image changed at random, normalised.
//
// draw_augmentation: what is drawn for each sample i, at place p = first + min(i, count − 1) of the
// epoch's order (first, count, seed and epoch: the current row of the step table), one row of a table
// [BATCH,PARAMETERS]:
//
//   r = pcg4d(pcg4d([seed, epoch, p, KEY]) + [block, 0, 0, 0])      four words for each block
//   0–5    the matrix from a pixel's column and row to where its value comes from:
//          column' = [0]·column + [1]·row + [2], row' = [3]·column + [4]·row + [5]
//   6–9    a rectangle that is erased: top, left, bottom, right
//   10–13  another one, which may reach beyond the image
//   14–17  factors of brightness, contrast and saturation, and what contrast adds
//   18…    displacements of the (GRID + 3)² nodes of a grid, row by row: down, right
//
// An image is first turned by an affine map about its centre, then a window of it enlarged to the
// whole, then mirrored, then moved by whole pixels, then distorted; the matrix undoes all but the last.
//
// augment_batch: x[i,h,w,c] = value · scale[c] + shift[c], or 0 where it is erased, with
//
//   value = clamp(grey + saturation·(v − grey)),   v = clamp(contrast·clamp(brightness·b) + added)
//   b = the image's bytes at the place that the matrix gives for (w, h) + displacement, between pixels
//   by bilinear interpolation; the displacement is a cubic B-spline over the grid, whose cells are
//   WIDTH / GRID wide and HEIGHT / GRID high; clamps are to 0…255, grey = 0.299 R + 0.587 G + 0.114 B.
//
// Without WARP places are whole pixels, which are copied. Beyond the image bytes are 0, or with
// REFLECT those of the image mirrored at its outermost pixels. A batch that is not full repeats its
// last sample. STREAMED as in gather.wgsl.
//
// Layout: images [samples,HEIGHT,WIDTH,CHANNELS] as bytes, four to a word, lowest byte first, without
// a gap; normalization [scale of all channels, shift of all channels]; x [BATCH,HEIGHT,WIDTH,CHANNELS].
// One invocation of draw_augmentation draws a sample's first 18 numbers and copies its label, or draws
// two nodes; one of augment_batch computes one pixel.
// Writes drawn and batch_labels; x.
// CPU twins: draw_augmentation and augment_batch in src/cpu/augment.rs; pcg4d in src/cpu/random.rs.
// Maths: docs/augmentation.md. Sines and exponentials are polynomials, so that all devices agree.

override BATCH: u32;
override HEIGHT: u32;
override WIDTH: u32;
override CHANNELS: u32;
override PARAMETERS: u32;
override GRID: u32 = 0u;
// Of draw_augmentation: largest shifts in pixels, angles in radians, areas in pixels.
override SHIFT_DOWN: f32 = 0.0;
override SHIFT_RIGHT: f32 = 0.0;
override ROTATE: f32 = 0.0;
override SCALE: f32 = 0.0;
override SHEAR: f32 = 0.0;
override FLIP_RANDOM: bool = false;
override FLIP_ALTERNATING: bool = false;
override CROP: u32 = 0u;
override RESIZE: bool = false;
override RESIZE_LEAST: f32 = 1.0;
override RESIZE_MOST: f32 = 1.0;
override ASPECT: f32 = 1.0;
override ERASE: u32 = 0u;
override ERASE_LEAST: u32 = 1u;
override ERASE_MOST: u32 = 1u;
override CUT_OUT: u32 = 0u;
override BRIGHTNESS: f32 = 0.0;
override CONTRAST: f32 = 0.0;
override SATURATION: f32 = 0.0;
override ELASTIC: f32 = 0.0;
// Of augment_batch.
override STREAMED: bool = false;
override WARP: bool = false;
override REFLECT: bool = false;
override ERASES: bool = false;
override RECOLOURS: bool = false;
override SATURATES: bool = false;

const WORKGROUP_SIZE = 64u;
const KEY = 0x97a0d5abu;
const FLIP_KEY = 0x5f1d36f1u;
// Of red, green and blue.
const GREY = vec3<f32>(0.299, 0.587, 0.114);
const NODES = 18u;
// Of the blocks of four words, those of the grid's nodes.
const NODE_BLOCKS = 16u;

struct Step {
    first: u32,
    count: u32,
    lr: f32,
    bias_correction1: f32,
    bias_correction2: f32,
    seed: u32,
    epoch: u32,
    base: u32,
    total: f32,
    micro: u32,
    average: f32,
    skip: u32,
    first_shard: u32,
    shards: u32,
    share: f32,
}

@group(0) @binding(0) var<storage, read> images: array<u32>;
@group(0) @binding(1) var<storage, read> labels: array<u32>;
@group(0) @binding(2) var<storage, read> order: array<u32>;
@group(0) @binding(3) var<storage, read> steps: array<Step>;
@group(0) @binding(4) var<storage, read> counter: array<u32>;
@group(0) @binding(5) var<storage, read> normalization: array<f32>;
@group(0) @binding(6) var<storage, read> augmentation: array<f32>;
@group(0) @binding(7) var<storage, read_write> drawn: array<f32>;
@group(0) @binding(8) var<storage, read_write> batch_labels: array<u32>;
@group(0) @binding(9) var<storage, read_write> x: array<f32>;

// Four random words for four words.
fn pcg4d(words: vec4<u32>) -> vec4<u32> {
    var v = words * 1664525u + 1013904223u;
    v.x += v.y * v.w;
    v.y += v.z * v.x;
    v.z += v.x * v.y;
    v.w += v.y * v.z;
    v ^= v >> vec4<u32>(16u);
    v.x += v.y * v.w;
    v.y += v.z * v.x;
    v.z += v.x * v.y;
    v.w += v.y * v.z;
    return v;
}

// From 0 to below 1, in steps of 2⁻²⁴.
fn from_zero(word: u32) -> f32 {
    return f32(word >> 8u) / 16777216.0;
}

// From −1 to below 1, in steps of 2⁻²³.
fn to_both_sides(word: u32) -> f32 {
    return f32(word >> 8u) / 8388608.0 - 1.0;
}

// A whole number below n: word · n / 2³², rounded down.
fn below(word: u32, n: u32) -> u32 {
    let high = word >> 16u;
    let low = word & 0xffffu;
    let middle = high * (n & 0xffffu) + ((low * (n & 0xffffu)) >> 16u);
    let rest = low * (n >> 16u) + (middle & 0xffffu);
    return high * (n >> 16u) + (middle >> 16u) + (rest >> 16u);
}

// The largest whole number whose square is at most n.
fn whole_root(n: u32) -> u32 {
    var root = min(u32(sqrt(f32(n))), 65535u);
    while root * root > n {
        root -= 1u;
    }
    while root < 65535u && (root + 1u) * (root + 1u) <= n {
        root += 1u;
    }
    return root;
}

// Sine and cosine of an angle from −π to π.
fn sine_cosine(angle: f32) -> vec2<f32> {
    let half_angle = 0.5 * angle;
    let s = half_angle * half_angle;
    let tail = 1.0 / 120.0 + s * (-1.0 / 5040.0 + s * (1.0 / 362880.0 - s / 39916800.0));
    let sine = half_angle + half_angle * s * (-1.0 / 6.0 + s * tail);
    let cosine = sqrt(max(1.0 - sine * sine, 0.0));
    return vec2<f32>(2.0 * sine * cosine, 1.0 - 2.0 * sine * sine);
}

// The exponential of a number that is at most 0.15 away from 0.
fn exponential(v: f32) -> f32 {
    return 1.0 + v * (1.0 + v * (0.5 + v * (1.0 / 6.0 + v * (1.0 / 24.0 + v / 120.0))));
}

// The mean grey of the training set, as a byte.
fn mean_grey() -> f32 {
    var grey = 0.0;
    for (var c = 0u; c < CHANNELS; c++) {
        var share = 1.0 / f32(CHANNELS);
        if CHANNELS == 3u {
            share = GREY[min(c, 2u)];
        }
        grey -= share * normalization[CHANNELS + c] / normalization[c];
    }
    return clamp(grey, 0.0, 255.0);
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn draw_augmentation(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    let parts = 1u + (PARAMETERS - NODES + 3u) / 4u;
    let i = t / parts;
    let part = t % parts;
    if i >= BATCH {
        return;
    }
    let row = steps[counter[0]];
    let place = row.first + min(i, row.count - 1u);
    let stream = pcg4d(vec4<u32>(row.seed, row.epoch, place, KEY));
    let at = i * PARAMETERS;
    if part > 0u {
        let node = part - 1u;
        let random = pcg4d(stream + vec4<u32>(NODE_BLOCKS + node, 0u, 0u, 0u));
        for (var n = 0u; n < 4u; n++) {
            let e = NODES + 4u * node + n;
            if e < PARAMETERS {
                drawn[at + e] = ELASTIC * to_both_sides(random[n]);
            }
        }
        return;
    }
    let number = order[place];
    batch_labels[i] = labels[number];

    let height = f32(HEIGHT);
    let width = f32(WIDTH);
    var random = pcg4d(stream);
    var mirrored = FLIP_RANDOM && (random.w >> 31u) == 1u;
    if FLIP_ALTERNATING {
        let begins = pcg4d(vec4<u32>(row.seed, number, 0u, FLIP_KEY)).x >> 31u;
        mirrored = ((begins + row.epoch) & 1u) == 1u;
    }

    // From what is shown to the enlarged window: mirror and whole pixels.
    let turned = sine_cosine(ROTATE * to_both_sides(random.x));
    let sheared = sine_cosine(SHEAR * to_both_sides(random.z));
    let factor = 1.0 + SCALE * to_both_sides(random.y);
    random = pcg4d(stream + vec4<u32>(1u, 0u, 0u, 0u));
    let moved_down = f32(below(random.z, 2u * CROP + 1u)) - f32(CROP);
    let moved_right = f32(below(random.w, 2u * CROP + 1u)) - f32(CROP);
    let direction = select(1.0, -1.0, mirrored);
    let start = select(moved_right, width - 1.0 - moved_right, mirrored);
    let down = SHIFT_DOWN * to_both_sides(random.x);
    let right = SHIFT_RIGHT * to_both_sides(random.y);

    // To the whole image: a window of this share of it, this far from its corner.
    var share_down = 1.0;
    var share_right = 1.0;
    var from_top = 0.0;
    var from_left = 0.0;
    if RESIZE {
        random = pcg4d(stream + vec4<u32>(2u, 0u, 0u, 0u));
        let side = sqrt(RESIZE_LEAST + (RESIZE_MOST - RESIZE_LEAST) * from_zero(random.x));
        // Half the logarithm of 4/3.
        let stretch = 0.143841036 * to_both_sides(random.y);
        share_right = min(side * exponential(stretch) * ASPECT, 1.0);
        share_down = min(side * exponential(-stretch) / ASPECT, 1.0);
        from_top = from_zero(random.z) * (1.0 - share_down) * height + 0.5 * share_down - 0.5;
        from_left = from_zero(random.w) * (1.0 - share_right) * width + 0.5 * share_right - 0.5;
    }

    // To the image as it was: the inverse of rotation · shear · factor about its centre, and a shift.
    let middle_down = 0.5 * (height - 1.0);
    let middle_right = 0.5 * (width - 1.0);
    let slope = sheared.x / sheared.y;
    let a = (turned.y - turned.x * slope) / factor;
    let b = (turned.y * slope + turned.x) / factor;
    let c = -turned.x / factor;
    let d = turned.y / factor;
    let column = share_right * start + from_left - middle_right - right;
    let line_offset = share_down * moved_down + from_top - middle_down - down;
    drawn[at] = a * share_right * direction;
    drawn[at + 1u] = b * share_down;
    drawn[at + 2u] = a * column + b * line_offset + middle_right;
    drawn[at + 3u] = c * share_right * direction;
    drawn[at + 4u] = d * share_down;
    drawn[at + 5u] = c * column + d * line_offset + middle_down;

    // A rectangle of that many pixels and of a height such that height / width is from 0.3 to 3.3.
    random = pcg4d(stream + vec4<u32>(3u, 0u, 0u, 0u));
    let more = pcg4d(stream + vec4<u32>(4u, 0u, 0u, 0u));
    var high = 0u;
    var wide = 0u;
    if (random.x >> 8u) < ERASE {
        let area = ERASE_LEAST + below(random.y, ERASE_MOST - ERASE_LEAST + 1u);
        let least = max(whole_root(area * 3u / 10u), 1u);
        let most = max(whole_root(area * 33u / 10u), least);
        high = least + below(random.z, most - least + 1u);
        wide = min(max(area / high, 1u), WIDTH);
        high = min(high, HEIGHT);
    }
    let top = below(more.x, HEIGHT - high + 1u);
    let left = below(more.y, WIDTH - wide + 1u);
    drawn[at + 6u] = f32(top);
    drawn[at + 7u] = f32(left);
    drawn[at + 8u] = f32(top + high);
    drawn[at + 9u] = f32(left + wide);
    let cut_top = f32(below(more.z, HEIGHT)) - f32(CUT_OUT / 2u);
    let cut_left = f32(below(more.w, WIDTH)) - f32(CUT_OUT / 2u);
    drawn[at + 10u] = cut_top;
    drawn[at + 11u] = cut_left;
    drawn[at + 12u] = cut_top + f32(CUT_OUT);
    drawn[at + 13u] = cut_left + f32(CUT_OUT);

    random = pcg4d(stream + vec4<u32>(5u, 0u, 0u, 0u));
    let contrast = CONTRAST * to_both_sides(random.y);
    drawn[at + 14u] = 1.0 + BRIGHTNESS * to_both_sides(random.x);
    drawn[at + 15u] = 1.0 + contrast;
    drawn[at + 16u] = 1.0 + SATURATION * to_both_sides(random.z);
    drawn[at + 17u] = -contrast * mean_grey();
}

// The weights of four neighbouring nodes at t, from 0 to 1, between the middle two.
fn spline(t: f32) -> vec4<f32> {
    let s = 1.0 - t;
    return vec4<f32>(
        s * s * s,
        4.0 - 6.0 * t * t + 3.0 * t * t * t,
        4.0 - 6.0 * s * s + 3.0 * s * s * s,
        t * t * t,
    ) / 6.0;
}

// How far the pixel is displaced: right and down.
fn displacement(at: u32, row: u32, column: u32) -> vec2<f32> {
    let v = (f32(row) + 0.5) * f32(GRID) / f32(HEIGHT);
    let u = (f32(column) + 0.5) * f32(GRID) / f32(WIDTH);
    // The cell by whole numbers, so that all devices agree.
    let cell_down = (2u * row + 1u) * GRID / (2u * HEIGHT);
    let cell_right = (2u * column + 1u) * GRID / (2u * WIDTH);
    let weight_down = spline(v - f32(cell_down));
    let weight_right = spline(u - f32(cell_right));
    var sum = vec2<f32>(0.0);
    for (var n = 0u; n < 4u; n++) {
        var across = vec2<f32>(0.0);
        for (var m = 0u; m < 4u; m++) {
            let node = at + NODES + 2u * ((cell_down + m) * (GRID + 3u) + cell_right + n);
            across += weight_down[m] * vec2<f32>(augmentation[node + 1u], augmentation[node]);
        }
        sum += weight_right[n] * across;
    }
    return sum;
}

fn is_erased(at: u32, row: f32, column: f32) -> bool {
    return row >= augmentation[at] && row < augmentation[at + 2u]
        && column >= augmentation[at + 1u] && column < augmentation[at + 3u];
}

// Where along an axis of that many pixels the value comes from.
fn inside(at: i32, size: u32) -> u32 {
    let last = i32(size) - 1;
    if REFLECT {
        let period = max(2 * last, 1);
        let along = abs(at) % period;
        return u32(min(along, period - along)) % size;
    }
    return u32(clamp(at, 0, last));
}

// What counts of a value that comes from there.
fn counts(at: i32, size: u32) -> f32 {
    return select(0.0, 1.0, REFLECT || (at >= 0 && at < i32(size)));
}

fn byte_at(at: u32) -> f32 {
    return f32((images[at / 4u] >> (8u * (at % 4u))) & 0xffu);
}

// The pixels that a value is made of, by their first bytes, and their weights.
struct Source {
    bytes: vec4<u32>,
    weights: vec4<f32>,
}

fn value_of(source: Source, channel: u32, colours: vec4<f32>) -> f32 {
    var value = source.weights.x * byte_at(source.bytes.x + channel);
    if WARP {
        value += source.weights.y * byte_at(source.bytes.y + channel);
        value += source.weights.z * byte_at(source.bytes.z + channel);
        value += source.weights.w * byte_at(source.bytes.w + channel);
    }
    if RECOLOURS {
        value = clamp(value * colours.x, 0.0, 255.0);
        value = clamp(value * colours.y + colours.w, 0.0, 255.0);
    }
    return value;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn augment_batch(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let t = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    let i = t / (HEIGHT * WIDTH);
    let pixel = t % (HEIGHT * WIDTH);
    if i >= BATCH {
        return;
    }
    let row = pixel / WIDTH;
    let column = pixel % WIDTH;
    let at = i * PARAMETERS;
    let first = t * CHANNELS;
    if ERASES {
        let here = vec2<f32>(f32(row), f32(column));
        if is_erased(at + 6u, here.x, here.y) || is_erased(at + 10u, here.x, here.y) {
            for (var c = 0u; c < CHANNELS; c++) {
                x[first + c] = 0.0;
            }
            return;
        }
    }
    let row_at = counter[0];
    let place = steps[row_at].first + min(i, steps[row_at].count - 1u);
    let image = select(order[place], place - steps[row_at].base, STREAMED);

    var shown = vec2<f32>(f32(column), f32(row));
    if GRID > 0u {
        shown += displacement(at, row, column);
    }
    let right = augmentation[at] * shown.x + augmentation[at + 1u] * shown.y + augmentation[at + 2u];
    let down = augmentation[at + 3u] * shown.x + augmentation[at + 4u] * shown.y + augmentation[at + 5u];
    let left_of = floor(right);
    let above = floor(down);
    let w0 = i32(left_of);
    let h0 = i32(above);
    let start = image * (HEIGHT * WIDTH * CHANNELS);
    let near_line = start + inside(h0, HEIGHT) * (WIDTH * CHANNELS);
    let near = inside(w0, WIDTH) * CHANNELS;
    var source: Source;
    source.bytes.x = near_line + near;
    source.weights.x = counts(h0, HEIGHT) * counts(w0, WIDTH);
    if WARP {
        let next_line = start + inside(h0 + 1, HEIGHT) * (WIDTH * CHANNELS);
        let far = inside(w0 + 1, WIDTH) * CHANNELS;
        let share_right = right - left_of;
        let share_down = down - above;
        let upper = counts(h0, HEIGHT) * (1.0 - share_down);
        let lower = counts(h0 + 1, HEIGHT) * share_down;
        let before = counts(w0, WIDTH) * (1.0 - share_right);
        let behind = counts(w0 + 1, WIDTH) * share_right;
        source.bytes = vec4<u32>(near_line + near, near_line + far, next_line + near, next_line + far);
        source.weights = vec4<f32>(upper * before, upper * behind, lower * before, lower * behind);
    }
    let colours = vec4<f32>(
        augmentation[at + 14u],
        augmentation[at + 15u],
        augmentation[at + 16u],
        augmentation[at + 17u],
    );
    if SATURATES {
        let value = vec3<f32>(
            value_of(source, 0u, colours),
            value_of(source, 1u, colours),
            value_of(source, 2u, colours),
        );
        let grey = dot(value, GREY);
        let saturated = clamp(grey + colours.z * (value - grey), vec3<f32>(0.0), vec3<f32>(255.0));
        for (var c = 0u; c < 3u; c++) {
            x[first + c] = saturated[c] * normalization[c] + normalization[CHANNELS + c];
        }
    } else {
        for (var c = 0u; c < CHANNELS; c++) {
            let value = value_of(source, c, colours);
            x[first + c] = value * normalization[c] + normalization[CHANNELS + c];
        }
    }
}
