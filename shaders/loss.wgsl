// The losses with their gradients and predictions, and the sums of a row.
//
//   softmax_cross_entropy:  p = softmax(z),  loss = −Σ_k t[k] log p[k],  dz = (p − t) / total
//     where the target is t = (1 − ε) onehot(label) + ε / CLASSES with ε = SMOOTHING
//   weighted_softmax_cross_entropy:  the same with t[k] times the weight u[k] of class k, so that
//     dz = (p Σ_k t[k] − t) / total
//   mixed_softmax_cross_entropy:  the same, weighted or not, with the share s of the label and 1 − s of a
//     second one: (1 − ε) (s onehot(label) + (1 − s) onehot(second)) + ε / CLASSES for each t[k]
//   squared_error:          loss = ½ Σ_k (z[k] − onehot(label)[k])²,   dz = (z − onehot(label)) / total
//   predict:                prediction = argmax z
//   sum_metrics:            metrics[step] = (Σ loss, Σ [prediction = label])   over the first count
//
// The softmax is taken of z − max z, which never overflows and changes nothing. The gradient is
// that of the *mean* over a batch, of which this may be a part, hence 1 / total: the number of its samples, or of
// the weighted mean the sum of the weights of their labels, both as in torch.nn.CrossEntropyLoss. It stands in the
// current row of the step table. Where max z is no finite number (a NaN or +∞
// among the logits, or −∞ all over) the softmax is undefined: loss and gradient are NaN.
//
// Layout: logits and gradient [BATCH,CLASSES]; batch_labels, loss and prediction [BATCH]; class_weights [CLASSES];
// mixes [BATCH,9]: the second label and the share as two whole numbers, so many of so many, see mix.wgsl;
// predictions: one per sample of the dataset, in the epoch's order; metrics: one per row.
// The losses: one invocation handles one sample. It writes loss, gradient and prediction (argmax:
// the first NaN, else of the largest values the first), and for the first count samples predictions[first + i]. The samples
// after them get loss 0 and gradient 0. The weighted one and the mixed one,
// which have no binding left for it, leave the predictions to predict.
// sum_metrics: one workgroup; each invocation adds up every 64th sample, then halves are added
// pairwise, so that the order of the additions is always the same. Writes metrics[step].
// CPU twins: the functions of the same names in src/cpu/loss.rs.
// Maths: Goodfellow, Bengio, Courville (2016), "Deep Learning", 4.1 and 6.2.2.3; Szegedy et al. (2016),
// "Rethinking the Inception Architecture for Computer Vision", 7, for the smoothing.

override BATCH: u32;
override CLASSES: u32;
override SMOOTHING: f32 = 0.0;
override WEIGHTED: bool = false;

const WORKGROUP_SIZE = 64u;

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

struct Metrics {
    loss_sum: f32,
    correct: u32,
}

@group(0) @binding(0) var<storage, read> logits: array<f32>;
@group(0) @binding(1) var<storage, read> batch_labels: array<u32>;
@group(0) @binding(2) var<storage, read> steps: array<Step>;
@group(0) @binding(3) var<storage, read> counter: array<u32>;
@group(0) @binding(4) var<storage, read_write> loss: array<f32>;
@group(0) @binding(5) var<storage, read_write> gradient: array<f32>;
@group(0) @binding(6) var<storage, read_write> prediction: array<u32>;
@group(0) @binding(7) var<storage, read_write> predictions: array<u32>;
@group(0) @binding(8) var<storage, read> batch_loss: array<f32>;
@group(0) @binding(9) var<storage, read> batch_prediction: array<u32>;
@group(0) @binding(10) var<storage, read_write> metrics: array<Metrics>;
@group(0) @binding(11) var<storage, read> class_weights: array<f32>;
@group(0) @binding(12) var<storage, read> mixes: array<u32>;

// By its bits, because a compiler may take it that no comparison meets a NaN.
fn is_nan(value: f32) -> bool {
    return (bitcast<u32>(value) & 0x7fffffffu) > 0x7f800000u;
}

fn argmax(start: u32) -> u32 {
    var best = 0u;
    for (var k = 1u; k < CLASSES; k++) {
        let value = logits[start + k];
        let largest = logits[start + best];
        if !is_nan(largest) && (is_nan(value) || value > largest) {
            best = k;
        }
    }
    return best;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn softmax_cross_entropy(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if i >= BATCH {
        return;
    }
    let row = steps[counter[0]];
    let start = i * CLASSES;
    let best = argmax(start);
    let largest = logits[start + best];
    prediction[i] = best;
    if i >= row.count {
        loss[i] = 0.0;
        for (var k = 0u; k < CLASSES; k++) {
            gradient[start + k] = 0.0;
        }
        return;
    }
    predictions[row.first + i] = best;
    // All bits of the exponent set: infinite or NaN. What exp() and log() make of these is up to the
    // driver, so the NaN is written as it is (through a variable: a constant NaN is an error in WGSL).
    let undefined = (bitcast<u32>(largest) & 0x7f800000u) == 0x7f800000u;
    var nan_bits = 0x7fc00000u;
    let not_a_number = bitcast<f32>(nan_bits);
    var sum = 0.0;
    for (var k = 0u; k < CLASSES; k++) {
        sum += exp(logits[start + k] - largest);
    }
    let label = batch_labels[i];
    var value = log(sum) - (logits[start + label] - largest);
    if SMOOTHING > 0.0 {
        var spread = 0.0;
        for (var k = 0u; k < CLASSES; k++) {
            spread += log(sum) - (logits[start + k] - largest);
        }
        value = (1.0 - SMOOTHING) * value + SMOOTHING / f32(CLASSES) * spread;
    }
    loss[i] = select(value, not_a_number, undefined);
    for (var k = 0u; k < CLASSES; k++) {
        let p = exp(logits[start + k] - largest) / sum;
        // Without smoothing ε / CLASSES is 0, and taking that away changes no bit.
        let g = (p - select(0.0, 1.0 - SMOOTHING, k == label) - SMOOTHING / f32(CLASSES)) / row.total;
        gradient[start + k] = select(g, not_a_number, undefined);
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn weighted_softmax_cross_entropy(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if i >= BATCH {
        return;
    }
    let row = steps[counter[0]];
    let start = i * CLASSES;
    if i >= row.count {
        loss[i] = 0.0;
        for (var k = 0u; k < CLASSES; k++) {
            gradient[start + k] = 0.0;
        }
        return;
    }
    let largest = logits[start + argmax(start)];
    let undefined = (bitcast<u32>(largest) & 0x7f800000u) == 0x7f800000u;
    var nan_bits = 0x7fc00000u;
    let not_a_number = bitcast<f32>(nan_bits);
    var sum = 0.0;
    for (var k = 0u; k < CLASSES; k++) {
        sum += exp(logits[start + k] - largest);
    }
    let label = batch_labels[i];
    let target_weight = (1.0 - SMOOTHING) * class_weights[label];
    var value = target_weight * (log(sum) - (logits[start + label] - largest));
    var target_sum = target_weight;
    if SMOOTHING > 0.0 {
        for (var k = 0u; k < CLASSES; k++) {
            let weight = SMOOTHING / f32(CLASSES) * class_weights[k];
            value += weight * (log(sum) - (logits[start + k] - largest));
            target_sum += weight;
        }
    }
    loss[i] = select(value, not_a_number, undefined);
    for (var k = 0u; k < CLASSES; k++) {
        let p = exp(logits[start + k] - largest) / sum;
        let t = select(0.0, target_weight, k == label) + SMOOTHING / f32(CLASSES) * class_weights[k];
        gradient[start + k] = select((p * target_sum - t) / row.total, not_a_number, undefined);
    }
}

// Of mixed_softmax_cross_entropy.
fn weight_of(k: u32) -> f32 {
    if WEIGHTED {
        return class_weights[k];
    }
    return 1.0;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn mixed_softmax_cross_entropy(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if i >= BATCH {
        return;
    }
    let row = steps[counter[0]];
    let start = i * CLASSES;
    if i >= row.count {
        loss[i] = 0.0;
        for (var k = 0u; k < CLASSES; k++) {
            gradient[start + k] = 0.0;
        }
        return;
    }
    let largest = logits[start + argmax(start)];
    let undefined = (bitcast<u32>(largest) & 0x7f800000u) == 0x7f800000u;
    var nan_bits = 0x7fc00000u;
    let not_a_number = bitcast<f32>(nan_bits);
    var sum = 0.0;
    for (var k = 0u; k < CLASSES; k++) {
        sum += exp(logits[start + k] - largest);
    }
    let label = batch_labels[i];
    let second = mixes[9u * i];
    let share = f32(mixes[9u * i + 1u]) / f32(mixes[9u * i + 2u]);
    let first_target = (1.0 - SMOOTHING) * share * weight_of(label);
    let second_target = (1.0 - SMOOTHING) * (1.0 - share) * weight_of(second);
    var target_sum = first_target + second_target;
    var value = first_target * (log(sum) - (logits[start + label] - largest));
    // Where the label has it all, the second one's logit may be −∞.
    if second_target > 0.0 {
        value += second_target * (log(sum) - (logits[start + second] - largest));
    }
    if SMOOTHING > 0.0 {
        for (var k = 0u; k < CLASSES; k++) {
            let each = SMOOTHING / f32(CLASSES) * weight_of(k);
            value += each * (log(sum) - (logits[start + k] - largest));
            target_sum += each;
        }
    }
    loss[i] = select(value, not_a_number, undefined);
    for (var k = 0u; k < CLASSES; k++) {
        let p = exp(logits[start + k] - largest) / sum;
        let labels_target = select(0.0, first_target, k == label) + select(0.0, second_target, k == second);
        let t = labels_target + SMOOTHING / f32(CLASSES) * weight_of(k);
        gradient[start + k] = select((p * target_sum - t) / row.total, not_a_number, undefined);
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn predict(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if i >= BATCH {
        return;
    }
    let row = steps[counter[0]];
    let best = argmax(i * CLASSES);
    prediction[i] = best;
    if i < row.count {
        predictions[row.first + i] = best;
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn squared_error(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (group.y * groups.x + group.x) * WORKGROUP_SIZE + local;
    if i >= BATCH {
        return;
    }
    let row = steps[counter[0]];
    let start = i * CLASSES;
    let best = argmax(start);
    prediction[i] = best;
    if i < row.count {
        predictions[row.first + i] = best;
    }
    let counts = i < row.count;
    let label = batch_labels[i];
    var sum = 0.0;
    for (var k = 0u; k < CLASSES; k++) {
        let difference = logits[start + k] - select(0.0, 1.0, k == label);
        sum += difference * difference;
        gradient[start + k] = select(0.0, difference / row.total, counts);
    }
    loss[i] = select(0.0, 0.5 * sum, counts);
}

var<workgroup> loss_sums: array<f32, WORKGROUP_SIZE>;
var<workgroup> correct_sums: array<u32, WORKGROUP_SIZE>;

@compute @workgroup_size(WORKGROUP_SIZE)
fn sum_metrics(@builtin(local_invocation_index) local: u32) {
    let row = counter[0];
    let count = min(steps[row].count, BATCH);
    var loss_sum = 0.0;
    var correct = 0u;
    for (var i = local; i < count; i += WORKGROUP_SIZE) {
        loss_sum += batch_loss[i];
        correct += select(0u, 1u, batch_prediction[i] == batch_labels[i]);
    }
    loss_sums[local] = loss_sum;
    correct_sums[local] = correct;
    for (var rest = WORKGROUP_SIZE / 2u; rest > 0u; rest /= 2u) {
        workgroupBarrier();
        if local < rest {
            loss_sums[local] += loss_sums[local + rest];
            correct_sums[local] += correct_sums[local + rest];
        }
    }
    if local == 0u {
        metrics[row] = Metrics(loss_sums[0], correct_sums[0]);
    }
}
