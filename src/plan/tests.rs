use super::*;
use crate::Error;
use crate::kernels::Argument;
use crate::model::{Definition, SHIPPED, load};

fn model(name: &str) -> Model {
    let definition = load(name).unwrap();
    definition
        .resolve(definition.input, definition.classes)
        .unwrap()
}

const SGD: Mode = Mode::Train(Optimizer::Sgd {
    momentum: 0.9,
    nesterov: false,
    weight_decay: 0.0,
});

const MUON: Mode = Mode::Train(Optimizer::Muon {
    momentum: 0.6,
    weight_decay: 0.01,
    other_lr: 0.05,
    other_momentum: 0.85,
});

const ADAMW: Mode = Mode::Train(Optimizer::Adamw {
    beta1: 0.9,
    beta2: 0.999,
    epsilon: 1e-8,
    weight_decay: 0.01,
});

/// An adapter that has no more than WebGPU promises.
fn least() -> AdapterReport {
    AdapterReport {
        max_storage_binding_bytes: 128 << 20,
        max_buffer_bytes: 256 << 20,
        max_workgroup_storage_bytes: 16 << 10,
        max_workgroup_invocations: 256,
        ..AdapterReport::imagined(false)
    }
}

/// Every way to plan a step of a model, with what to call it.
fn plans(model: &Model, batch: usize) -> Vec<(String, Plan)> {
    let adapters = [
        AdapterReport::imagined(true),
        AdapterReport::imagined(false),
        least(),
    ];
    let mut plans = Vec::new();
    for mode in [SGD, ADAMW, MUON, Mode::Evaluate] {
        for (unfused, explicit_conv) in [(false, false), (true, false), (false, true)] {
            let with = |family| Options {
                family,
                unfused,
                explicit_conv,
                ..Options::default()
            };
            let mut add = |name: String, options: &Options, target| {
                let name = format!(
                    "{}, {name}, {mode:?}, unfused {unfused}, explicit {explicit_conv}",
                    model.name
                );
                plans.push((
                    name,
                    Plan::new(model, batch, mode, options, target).unwrap(),
                ));
            };
            for adapter in &adapters {
                let families = Family::ALL.into_iter();
                for family in families.filter(|f| f.supported(adapter)) {
                    let mut options = with(Some(family));
                    if family == Family::Matrix {
                        options.precision = Precision::Mixed;
                    }
                    add(format!("{family}"), &options, Target::Gpu(adapter));
                }
            }
            add("cpu".into(), &with(None), Target::Cpu);
        }
    }
    plans
}

#[test]
fn no_plan_of_a_shipped_model_has_a_flaw() {
    for (name, _) in SHIPPED {
        for (name, plan) in plans(&model(name), 3) {
            assert_eq!(plan.flaws(), [""; 0], "{name}");
            let most = plan.specs().map(|spec| spec.groups).max();
            assert!(most < Some(65_535 * 65_535), "{name}");
        }
    }
}

/// The checker is checked: each kind of mistake is found.
#[test]
fn a_flaw_is_found() {
    let adapter = AdapterReport::imagined(true);
    let options = Options::default();
    let good = Plan::new(&model("lenet5"), 4, SGD, &options, Target::Gpu(&adapter)).unwrap();
    let broken = |what: &str, breakage: &dyn Fn(&mut Plan)| {
        let mut plan = good.clone();
        breakage(&mut plan);
        let flaws = plan.flaws();
        assert!(
            flaws.iter().any(|f| f.contains(what)),
            "no '{what}' in {flaws:#?}"
        );
    };
    // The product of the first layer.
    broken("no writer before it", &|plan| {
        plan.kernels.remove(1);
    });
    broken("no writer before it", &|plan| plan.kernels.swap(1, 2));
    // Its output, which the way back reads at the end.
    let early = good.kernels[1].1.view("y").tensor;
    broken("was overwritten", &|plan| {
        let (slot, offset) = (plan.tensors[early].slot, plan.tensors[early].offset);
        let late = plan.tensor("logits.gradient").unwrap();
        (plan.tensors[late].slot, plan.tensors[late].offset) = (slot, offset);
    });
    broken("reaches beyond its slot", &|plan| {
        plan.tensors[early].offset += 64
    });
    broken("shares its memory", &|plan| {
        let x = plan.kernels[1].1.view("x").tensor;
        plan.tensors[x].slot = plan.tensors[early].slot;
    });
    broken("no kernel writes the gradients", &|plan| {
        let mut kernels = plan.kernels.iter();
        let last = kernels.rposition(|(_, s)| s.entry == "reduce_splits");
        let last = last.unwrap();
        plan.kernels.remove(last);
    });
    broken("needs", &|plan| {
        plan.kernels[1].1.arguments[0].elements += 1
    });
    broken("starts at", &|plan| {
        let argument = &mut plan.kernels[1].1.arguments[1];
        argument.view.start += 4;
        argument.view.len -= 4;
        argument.elements -= 4;
    });
    broken("bindings", &|plan| {
        let argument = plan.kernels[1].1.arguments[0];
        let more = (20..30).map(|binding| Argument {
            binding,
            ..argument
        });
        plan.kernels[1].1.arguments.extend(more);
    });
    broken("is not written whole", &|plan| {
        plan.kernels[1].1.arguments[2].elements -= 1
    });
    broken("U8 of F32", &|plan| {
        plan.kernels[1].1.arguments[0].view.dtype = Dtype::U8
    });
}

/// Where all shards of a batch are under way, nothing of one is lost to the next, and nothing is taken for that of all.
#[test]
fn a_flaw_of_synced_shards_is_found() {
    let adapter = AdapterReport::imagined(true);
    let options = Options {
        micro: true,
        shards: Some(4),
        sync_batch_norm: true,
        ..Options::default()
    };
    for (name, _) in SHIPPED {
        for (unfused, target) in [(false, Target::Gpu(&adapter)), (true, Target::Cpu)] {
            let options = Options {
                unfused,
                ..options.clone()
            };
            let plan = Plan::new(&model(name), 3, SGD, &options, target).unwrap();
            assert_eq!(plan.flaws(), [""; 0], "{name}");
            let phases = plan.phases();
            assert_eq!(phases.len() > 1, plan.syncs());
            let kernels = phases.iter().map(|p| p.of_shards.len() + p.of_batch.len());
            assert_eq!(kernels.sum::<usize>() + 1, plan.kernels.len());
            assert_eq!(plan.replicas, if plan.syncs() { 4 } else { 1 });
        }
    }
    let good = Plan::new(&model("cnn-bn"), 4, SGD, &options, Target::Gpu(&adapter)).unwrap();
    assert!(good.syncs());
    let of = |plan: &Plan, entry: &str| {
        let mut specs = plan.specs();
        specs.position(|spec| spec.entry == entry).unwrap()
    };
    let broken = |what: &str, breakage: &dyn Fn(&mut Plan)| {
        let mut plan = good.clone();
        breakage(&mut plan);
        let flaws = plan.flaws();
        let found = flaws.iter().any(|f| f.contains(what));
        assert!(found, "no '{what}' in {flaws:#?}");
    };
    broken("the last shard's", &|plan| {
        let sync = of(plan, "batch_norm_sync_gradients");
        let sum = of(plan, "sum_shards");
        assert!(sum < sync);
        let sum = plan.kernels.remove(sum);
        plan.kernels.insert(sync, sum);
    });
    broken("is one shard's", &|plan| {
        let forward = of(plan, "batch_norm_forward");
        plan.kernels[forward].0 = Section::Sync;
    });
}

#[test]
fn memory_is_shared_and_an_evaluation_needs_neither_gradients_nor_state() {
    let adapter = AdapterReport::imagined(true);
    let options = Options::default();
    for name in ["vgg-cifar", "tutorial"] {
        let plan =
            |mode| Plan::new(&model(name), 64, mode, &options, Target::Gpu(&adapter)).unwrap();
        let (training, evaluation) = (plan(ADAMW), plan(Mode::Evaluate));
        let [shared, apart] = training.step_bytes();
        assert!(shared < apart * 3 / 4, "{name}: {shared} of {apart} bytes");
        for gone in ["gradients", "state1", "state2"] {
            assert!(training.tensor(gone).is_some() && evaluation.tensor(gone).is_none());
        }
        let [least, _] = evaluation.step_bytes();
        assert!(least < shared / 2, "{name}: {least} and {shared} bytes");
        // Its memory lies in the training's.
        let rooms = training.room_for(&evaluation);
        let floats = evaluation
            .slots
            .iter()
            .zip(rooms)
            .filter(|(s, _)| s.dtype == Dtype::F32);
        for (slot, room) in floats {
            let room = training.slots[room.unwrap()];
            assert!(room.elements >= slot.elements && room.dtype == slot.dtype);
        }
    }
}

/// A small model with every kind of fusion.
const SMALL: &str = r#"name = "small"
input = [8, 6, 1]
classes = 4
loss = "softmax_cross_entropy"
[recipe]
optimizer = "sgd"
lr = 0.1
schedule = "constant"
epochs = 1
batch_size = 5
[[layer]]
type = "conv2d"
out_channels = 4
kernel = 3
padding = 1
activation = "relu"
[[layer]]
type = "max_pool2d"
kernel = 2
[[layer]]
type = "dense"
units = 8
activation = "relu"
[[layer]]
type = "dense"
units = "classes"
"#;

#[test]
fn a_plan_reads_as_it_did() {
    let definition = Definition::parse(SMALL, "small.toml").unwrap();
    let model = definition.resolve(definition.input, 4).unwrap();
    let adapter = AdapterReport::imagined(true);
    let print = |unfused| {
        let options = Options {
            unfused,
            ..Options::default()
        };
        let plan = Plan::new(&model, 5, SGD, &options, Target::Gpu(&adapter)).unwrap();
        plan.to_string()
    };
    let found = format!("{}\nunfused:\n{}", print(false), print(true));
    let expected = include_str!("../../tests/plan.txt");
    assert!(
        found == expected,
        "expected what tests/plan.txt has, found\n{found}"
    );
}

fn refusal<T: std::fmt::Debug>(result: Result<T>) -> String {
    match result {
        Err(Error::Usage(message)) => message,
        other => panic!("expected a refusal, found {other:?}"),
    }
}

#[test]
fn a_batch_that_32_bits_do_not_index_is_refused() {
    // conv2d1 of default: 24·24·24 = 13,824 elements an image; 2³¹ / 13,824 = 155,344.6.
    let default = model("default");
    let options = Options::default();
    expect_batch(&default, 155_344, &options).unwrap();
    for batch in [0, 155_345, usize::MAX] {
        let message = refusal(expect_batch(&default, batch, &options));
        assert!(message.contains("1 to 155344"), "{message}");
        assert!(message.contains("conv2d1"), "{message}");
        assert!(message.contains(&format!("found {batch}")), "{message}");
        let adapter = AdapterReport::imagined(true);
        let plan = Plan::new(&default, batch, SGD, &options, Target::Gpu(&adapter));
        assert_eq!(refusal(plan), message);
    }
    // The columns of conv2d2: 8·8 positions of 5·5·24.
    let explicit = Options {
        explicit_conv: true,
        ..Options::default()
    };
    let message = refusal(expect_batch(&default, 60_000, &explicit));
    assert!(message.contains("conv2d2.columns has 38400"), "{message}");
}

#[test]
fn a_loss_that_takes_one_label_an_image_is_refused_where_images_are_mixed() {
    let sigmoid = model("mlp-sigmoid");
    assert_eq!(sigmoid.loss, Loss::SquaredError);
    let options = Options {
        augment: Augment {
            mix_up: 0.2,
            ..Augment::default()
        },
        ..Options::default()
    };
    let message = refusal(Plan::new(&sigmoid, 8, SGD, &options, Target::Cpu));
    for part in ["mix_up", "squared_error", "softmax_cross_entropy"] {
        assert!(message.contains(part), "{message}");
    }
    // An evaluation shows images as they are.
    Plan::new(&sigmoid, 8, Mode::Evaluate, &options, Target::Cpu).unwrap();
    let kernels = |mode, options: &Options| {
        let plan = Plan::new(&model("default"), 8, mode, options, Target::Cpu).unwrap();
        plan.kernels
    };
    let plain = kernels(Mode::Evaluate, &Options::default());
    assert_eq!(kernels(Mode::Evaluate, &options), plain);
    assert_ne!(kernels(SGD, &options), kernels(SGD, &Options::default()));
}

/// An evaluation in views takes more of each tensor, a training step does not.
#[test]
fn views_count_where_an_evaluation_shows_them() {
    let default = model("default");
    let options = Options {
        views: Views::Six,
        ..Options::default()
    };
    expect_batch(&default, 155_344, &options).unwrap();
    // 2³¹ / (6 · 13,824).
    assert_eq!(most_samples(&default, &options).unwrap(), 25_890);
    let plan = |batch| Plan::new(&default, batch, Mode::Evaluate, &options, Target::Cpu);
    let message = refusal(plan(25_891));
    assert!(message.contains("1 to 25890"), "{message}");
    let train = |options: &Options| Plan::new(&default, 8, SGD, options, Target::Cpu).unwrap();
    let plain = train(&Options::default());
    assert_eq!(train(&options).kernels, plain.kernels);
    assert_eq!(train(&options).step_bytes(), plain.step_bytes());
}

#[test]
fn what_an_adapter_does_not_bind_is_refused_with_the_flag_that_helps() {
    let adapter = |mebibytes: u64| AdapterReport {
        max_storage_binding_bytes: mebibytes << 20,
        ..AdapterReport::imagined(true)
    };
    let options = Options::default();
    let default = model("default");
    let plan = |model: &Model, batch, adapter: &AdapterReport| {
        Plan::new(model, batch, SGD, &options, Target::Gpu(adapter))
    };
    let check = |batch, mebibytes| refusal(plan(&default, batch, &adapter(mebibytes)));
    plan(&default, 2048, &adapter(128)).unwrap();
    // The pooled convolution's output is not stored, but the gradient by it is: 24·24·24 floats an
    // image.
    let message = check(100_000, 128);
    assert!(message.contains("--batch-size 2048 or"), "{message}");
    // The fused tensors aside, 600 KiB of parameters do not fit whatever the batch.
    let mut small = adapter(1);
    small.max_buffer_bytes = 500 << 10;
    let message = refusal(plan(&default, 1, &small));
    assert!(message.contains("dense1"), "{message}");
    assert!(!message.contains("--batch-size"), "{message}");
    // One image, 512×512×4 floats, takes 4 MiB; the parameters take some hundred bytes.
    let text = crate::model::SHIPPED[1].1;
    let head = text.split("[[layer]]").next().unwrap();
    let layers = [
        "conv2d\"\nout_channels = 4\nkernel = 3\npadding = 1",
        "mean_pool2d\"\nkernel = 256",
        "dense\"\nunits = \"classes\"",
    ];
    let layers = layers.map(|l| format!("[[layer]]\ntype = \"{l}\n\n"));
    let text = format!("{head}{}", layers.concat());
    let wide = crate::model::Definition::parse(&text, "wide.toml").unwrap();
    let wide = wide
        .resolve(crate::model::Shape::new(512, 512, 1), 10)
        .unwrap();
    let message = refusal(plan(&wide, 64, &adapter(3)));
    assert!(message.contains("even one image"), "{message}");
    assert!(message.contains("conv2d1"), "{message}");
    assert!(!message.contains("--batch-size"), "{message}");
}

/// Where ranks share a batch, slabs of its gradients cover all of them, and each is whole, with all that it is a sum of,
/// before kernels of earlier layers that are left to run.
#[test]
fn slabs_of_gradients_are_whole_before_the_backward_pass_ends() {
    for (name, _) in SHIPPED {
        let model = model(name);
        let options = Options {
            micro: true,
            shards: Some(4),
            spread: true,
            ..Options::default()
        };
        let plan = Plan::new(&model, 8, SGD, &options, Target::Cpu).unwrap();
        let (slabs, phases) = (&plan.slabs, plan.phases());
        let segments: Vec<Range<usize>> = phases.iter().map(|p| p.of_shards.clone()).collect();
        let own = phases.iter().map(|p| p.slabs.clone());
        assert!(own.eq((0..slabs.len()).map(|i| i..i + 1)), "{name}");
        assert!(slabs.len() <= SLABS, "{name}");
        let elements = model.parameter_elements;
        assert_eq!(slabs.len() > 1, elements > SLAB_ELEMENTS, "{name}");
        assert_eq!(
            [slabs[0].range.end, slabs[slabs.len() - 1].range.start],
            [elements, 0]
        );
        assert!(
            slabs
                .windows(2)
                .all(|two| two[0].range.start == two[1].range.end)
        );
        assert_eq!(segments[0].start, 0);
        assert!(segments.windows(2).all(|two| two[0].end == two[1].start));
        assert_eq!(
            plan.kernels[segments[slabs.len() - 1].end].0,
            Section::Exchange
        );
        let gradients = plan.tensor("gradients").unwrap();
        for (number, (_, spec)) in plan.kernels.iter().enumerate() {
            let written = spec.arguments.iter().filter(|a| a.access != Access::Read);
            for argument in written.filter(|a| a.view.tensor == gradients) {
                let (start, end) = (argument.view.start, argument.view.start + argument.elements);
                let all = slabs.iter().zip(&segments);
                let mut touched = all.filter(|(s, _)| s.range.start < end && start < s.range.end);
                assert!(
                    touched.all(|(_, segment)| number < segment.end),
                    "{name}: {number}"
                );
            }
        }
        // The rest of the backward pass is work: it has products.
        for segment in &segments[1..] {
            let kernels = &plan.kernels[segment.clone()];
            let products = kernels
                .iter()
                .filter(|(_, s)| matches!(s.work, Work::Product(_)));
            assert!(products.count() > 0, "{name}");
        }
    }
}
