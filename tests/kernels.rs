//! Every kernel against its CPU twin, and the harness that does it against itself.

use wgrad::gpu::{Choice, Gpu, NO_ADAPTER_HINT};
use wgrad::verify::{
    Case, Expected, Fingerprint, GUARD, GUARD_WORDS, POISON, Rounding, Tolerance, WORD_POISON,
    cases, compare,
};

fn gpu() -> Gpu {
    Gpu::open(&Choice::Best)
        .unwrap_or_else(|e| panic!("these tests need an adapter: {e}; {NO_ADAPTER_HINT}"))
}

#[test]
fn every_kernel_agrees_with_its_twin() {
    let gpu = gpu();
    let mut failures = Vec::new();
    for case in cases(gpu.report()) {
        let outcome = case.run(&gpu);
        let what = match outcome {
            Ok(outcome) if outcome.passed => continue,
            Ok(outcome) => outcome.detail.unwrap_or_default(),
            Err(e) => e.to_string(),
        };
        failures.push(format!("{} ({}): {what}", case.kernel, case.variant));
    }
    assert!(
        failures.is_empty(),
        "{} cases failed on {}:\n{}",
        failures.len(),
        gpu.report().line(),
        failures.join("\n")
    );
}

/// What a device may do is up to it, but not beyond what WGSL allows every device.
#[test]
fn the_fingerprint_is_the_same_twice_and_within_what_wgsl_allows() {
    let gpu = gpu();
    let found = Fingerprint::of(&gpu).unwrap();
    assert_eq!(found, Fingerprint::of(&gpu).unwrap());
    assert_ne!(found.fma, Rounding::Other, "{found:?}");
    assert_ne!(found.multiply_add, Rounding::Other, "{found:?}");
    // Division 2.5 ULP, sqrt as 1 / inversesqrt, exp 3 + 2 · |x| for |x| up to 16.
    for (precision, most) in [(found.division, 2), (found.sqrt, 5), (found.exp, 35)] {
        assert!(precision.max_ulp <= most, "{found:?}");
    }
    assert!(found.log.exact > 0.1, "{found:?}");
    for row in found.rows() {
        let width: usize = row.iter().map(|cell| cell.chars().count() + 2).sum();
        assert!(width <= 80, "{row:?}");
    }
}

#[test]
fn every_case_has_a_name_of_its_own() {
    let mut names: Vec<_> = cases(gpu().report())
        .into_iter()
        .map(|case| format!("{} {}", case.kernel, case.variant))
        .collect();
    let count = names.len();
    names.sort();
    names.dedup();
    assert_eq!(
        names.len(),
        count,
        "two cases with the same name share their inputs"
    );
}

/// A read-back of `elements` with the guard intact.
fn read_back(elements: &[u32]) -> Vec<u32> {
    [elements, &[GUARD; GUARD_WORDS]].concat()
}

fn floats(values: &[f32]) -> Vec<u32> {
    read_back(&values.iter().map(|v| v.to_bits()).collect::<Vec<_>>())
}

const TOLERANCE: Tolerance = Tolerance {
    absolute: 0.01,
    relative: 0.1,
};

fn expected() -> Expected {
    Expected::Floats(vec![1.0, -2.0, 0.0], TOLERANCE)
}

#[test]
fn comparison_accepts_what_is_within_tolerance_and_reports_the_worst() {
    let found = compare("y", &floats(&[1.0, -2.15, 0.005]), &expected());
    assert_eq!(found.failure, None);
    assert!((found.worst - 0.15).abs() < 1e-6, "{found:?}");
    assert!((found.tolerance - 0.21).abs() < 1e-6, "{found:?}");
}

#[test]
fn comparison_refuses_one_changed_element() {
    for changed in [[1.12, -2.0, 0.0], [1.0, 2.0, 0.0], [1.0, -2.0, -0.02]] {
        let found = compare("y", &floats(&changed), &expected());
        assert!(found.failure.is_some(), "{changed:?}");
    }
    let words = Expected::Words(vec![7, 8, 9]);
    assert_eq!(
        compare("index", &read_back(&[7, 8, 9]), &words).failure,
        None
    );
    let failure = compare("index", &read_back(&[7, 9, 9]), &words).failure;
    assert_eq!(
        failure.as_deref(),
        Some("index[1]: expected 8, found 9; 1 of 3 out")
    );
}

#[test]
fn comparison_takes_nan_and_infinity_only_for_themselves() {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let values = [nan, inf, -inf, -2.0, f32::MAX];
    for found in values {
        for reference in values {
            let expected = Expected::Floats(vec![1.0, f64::from(reference), 0.0], TOLERANCE);
            let compared = compare("y", &floats(&[1.0, found, 0.0]), &expected);
            let same = found == reference || found.is_nan() && reference.is_nan();
            assert_eq!(compared.failure.is_none(), same, "{found} for {reference}");
            assert_eq!(compared.worst == 0.0, same, "{compared:?}");
            let text = compared.failure.unwrap_or_default();
            assert!(!text.contains("± NaN") && !text.contains("± inf"), "{text}");
        }
    }
    // The poison is a NaN, but not one that a kernel has written.
    let expected = Expected::Floats(vec![f64::NAN], TOLERANCE);
    let failure = compare("y", &floats(&[f32::from_bits(POISON)]), &expected).failure;
    assert!(failure.unwrap().contains("never written"));
}

#[test]
fn comparison_refuses_a_length_mismatch() {
    for elements in [&[1.0, -2.0][..], &[1.0, -2.0, 0.0, 0.0]] {
        assert!(
            compare("y", &floats(elements), &expected())
                .failure
                .is_some()
        );
    }
    assert!(
        compare("y", &[], &Expected::Words(Vec::new()))
            .failure
            .is_some()
    );
}

#[test]
fn comparison_refuses_an_overwritten_guard() {
    for i in [3, 3 + GUARD_WORDS - 1] {
        let mut found = floats(&[1.0, -2.0, 0.0]);
        found[i] = 0;
        assert!(
            compare("y", &found, &expected()).failure.is_some(),
            "guard word {i}"
        );
    }
}

#[test]
fn comparison_refuses_an_element_left_unwritten() {
    let found = floats(&[1.0, -2.0, f32::from_bits(POISON)]);
    let failure = compare("y", &found, &expected()).failure.unwrap();
    assert!(failure.contains("never written"), "{failure}");
    let words = Expected::Words(vec![7, 8]);
    let failure = compare("index", &read_back(&[WORD_POISON, 8]), &words).failure;
    assert!(failure.unwrap().contains("never written"));
}

/// The whole harness on kernels that are wrong on purpose.
#[test]
fn a_wrong_kernel_fails() {
    use wgrad::gpu::Kernel;
    let gpu = gpu();
    // Writes `value` to the elements from `first` to before `end`.
    let run = |first: usize, end: usize, value: f32| {
        let case = Case::new("wrong", "on purpose", move |b| {
            let y = b.output("y", &[0.5f32; 100], Tolerance::sum(1))?;
            let source = format!(
                "@group(0) @binding(0) var<storage, read_write> y: array<f32>;
                 @compute @workgroup_size(64)
                 fn wrong(
                     @builtin(workgroup_id) group: vec3<u32>,
                     @builtin(num_workgroups) groups: vec3<u32>,
                     @builtin(local_invocation_index) local: u32,
                 ) {{
                     let i = (group.y * groups.x + group.x) * 64u + local;
                     if i >= {first}u && i < {end}u {{ y[i] = {value:?}; }}
                 }}"
            );
            Ok(vec![b.gpu.dispatch(&Kernel {
                entry_point: "wrong",
                source: &source,
                constants: &[],
                bindings: &[(0, &y)],
                groups: [3, 1, 1],
            })?])
        });
        case.run(&gpu).unwrap().detail
    };
    assert_eq!(run(0, 100, 0.5), None);
    let detail = run(0, 100, 0.75).unwrap();
    assert!(
        detail.contains("expected 0.5") && detail.contains("100 of 100"),
        "{detail}"
    );
    let detail = run(0, 99, 0.5).unwrap();
    assert!(
        detail.contains("y[99]") && detail.contains("never written"),
        "{detail}"
    );
    let detail = run(0, 101, 0.5).unwrap();
    assert!(detail.contains("past element 100"), "{detail}");
    let nothing = Case::new("wrong", "compares nothing", |_| Ok(Vec::new()));
    assert!(!nothing.run(&gpu).unwrap().passed);
}

/// A read past the end of an input that is used, and a write into one.
#[test]
fn a_kernel_that_strays_fails() {
    use wgrad::gpu::Kernel;
    let gpu = gpu();
    // `body` makes y[i] from 100 floats x and 100 words k; both are then as long as y.
    let run = |access: &'static str, body: &'static str| {
        let case = Case::new("stray", body, move |b| {
            let (x, k) = (b.input(&[0.5f32; 100])?, b.input(&[3u32; 100])?);
            assert_eq!([x.len(), k.len()], [100, 100]);
            let y = b.output("y", &[0.5f32; 100], Tolerance::sum(1))?;
            let source = format!(
                "@group(0) @binding(0) var<storage, {access}> x: array<f32>;
                 @group(0) @binding(1) var<storage, {access}> k: array<u32>;
                 @group(0) @binding(2) var<storage, read_write> y: array<f32>;
                 @compute @workgroup_size(64)
                 fn stray(
                     @builtin(workgroup_id) group: vec3<u32>,
                     @builtin(num_workgroups) groups: vec3<u32>,
                     @builtin(local_invocation_index) local: u32,
                 ) {{
                     let i = (group.y * groups.x + group.x) * 64u + local;
                     if i < 100u {{ {body} }}
                 }}"
            );
            let bindings = [(0, &x), (1, &k), (2, &y)];
            Ok(vec![b.gpu.dispatch(&Kernel {
                entry_point: "stray",
                source: &source,
                constants: &[],
                bindings: &bindings,
                groups: [2, 1, 1],
            })?])
        });
        case.run(&gpu).unwrap().detail
    };
    assert_eq!(run("read", "y[i] = x[i] + f32(k[i] - 3u);"), None);
    for body in [
        "y[i] = x[i + 1u] + f32(k[i] - 3u);",
        "y[i] = x[i] + f32(k[i] - 3u) * x[i + 64u];",
        // Far beyond the guard, where the index is clamped.
        "y[i] = x[i + 100000u] + f32(k[i] - 3u);",
        "y[i] = x[i] + f32(k[i + 1u] - 3u);",
        "y[i] = x[i] + f32(k[i + 100000u] - 3u);",
    ] {
        let detail = run("read", body).expect(body);
        assert!(
            detail.contains("expected 0.5") && detail.contains("found "),
            "{body}: {detail}"
        );
    }
    for body in [
        "y[i] = x[i]; x[i] = f32(k[0]);",
        "y[i] = x[i]; k[99] = 4u;",
        "y[i] = x[i] + f32(k[i] - 3u); x[i + 1u] = x[i];",
    ] {
        let detail = run("read_write", body).expect(body);
        assert!(
            detail.contains("expected nothing to be written to it"),
            "{body}: {detail}"
        );
    }
}

/// A kernel that is right in one row of workgroups and wrong in several.
#[test]
fn a_kernel_that_does_not_unfold_its_workgroups_fails() {
    use wgrad::gpu::Kernel;
    let gpu = gpu();
    let run = |index: &'static str| {
        let case = Case::new("folded", index, move |b| {
            let y = b.updated("y", &[0.0f32; 256], &[1.0f32; 256], Tolerance::EXACT)?;
            let source = format!(
                "@group(0) @binding(0) var<storage, read_write> y: array<f32>;
                 @compute @workgroup_size(64)
                 fn folded(
                     @builtin(workgroup_id) group: vec3<u32>,
                     @builtin(num_workgroups) groups: vec3<u32>,
                     @builtin(local_invocation_index) local: u32,
                 ) {{
                     let i = ({index}) * 64u + local;
                     if i < 256u {{ y[i] += 1.0; }}
                 }}"
            );
            Ok(vec![b.gpu.dispatch(&Kernel {
                entry_point: "folded",
                source: &source,
                constants: &[],
                bindings: &[(0, &y)],
                groups: [4, 1, 1],
            })?])
        });
        case.run(&gpu).unwrap().detail
    };
    assert_eq!(run("group.y * groups.x + group.x + 0u * groups.x"), None);
    for wrong in [
        "group.x + 0u * groups.x",
        "group.y * (groups.x + 1u) + group.x",
    ] {
        let detail = run(wrong).expect(wrong);
        assert!(
            detail.contains("workgroups in several rows: y["),
            "{detail}"
        );
    }
}

/// The order of every sum follows from the shape: a tile, which is chosen by measurement, must not
/// change a bit. Holds where the driver compiles every tile's multiply-adds alike, as Mesa's does.
#[test]
fn every_tile_of_a_family_gives_the_same_bits() {
    use wgrad::gpu::Buffer;
    use wgrad::kernels::conv2d::{self, Family, Pass, Product, Tile};
    use wgrad::kernels::reduce;
    use wgrad::model::{Conv2d, Pool2d, Shape};
    let gpu = gpu();
    let values = |len: usize| {
        let value = |i: u32| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0;
        gpu.upload("test", &(0..len as u32).map(value).collect::<Vec<_>>())
            .unwrap()
    };
    let bits = |buffer: &Buffer| gpu.read::<u32>("test", buffer).unwrap();
    let geometries = [
        // Vectors and scalars, padding and strides, sums in one part and in many.
        (
            Conv2d::new(Shape::new(9, 7, 12), 24, [3, 3], [1, 1], [1, 1]),
            40,
        ),
        (
            Conv2d::new(Shape::new(14, 13, 3), 5, [5, 4], [2, 1], [1, 2]),
            40,
        ),
        (Ok(Conv2d::dense(77, 10)), 2100),
    ];
    let mut most_splits = 1;
    for (geometry, batch) in geometries {
        let g = geometry.unwrap();
        let x = values(batch * g.input.elements());
        let parameters = values(g.weight_elements() + g.output.channels);
        let dy = values(batch * g.output.elements());
        let pool = Pool2d::new(g.output, [2, 2], [2, 2]).ok();
        for family in Family::ALL {
            let tiles = Tile::all(family, gpu.report());
            let pool = pool.filter(|p| Product::can_pool(&g, p, family));
            let passes = Pass::ALL.map(|pass| (pass, None));
            for (pass, pool) in passes
                .into_iter()
                .chain(pool.map(|p| (Pass::Forward, Some(p))))
            {
                let relu = pass != Pass::BackwardWeight;
                let product =
                    Product::new(g, batch, pass, relu, pool, family, gpu.report()).unwrap();
                let run = |tile| {
                    let product = product.with_tile(tile);
                    let n = product.result_elements();
                    let result = gpu.buffer("test", n).unwrap();
                    let index = gpu.buffer("test", n.div_ceil(4)).unwrap();
                    let sum = gpu.buffer("test", n / product.splits()).unwrap();
                    let mut dispatches = vec![
                        match pass {
                            Pass::Forward => {
                                let index = pool.map(|_| &index);
                                conv2d::conv2d_forward(
                                    &gpu,
                                    &product,
                                    &x,
                                    &parameters,
                                    &result,
                                    index,
                                )
                            }
                            Pass::BackwardWeight => {
                                conv2d::conv2d_backward_weight(&gpu, &product, &x, &dy, &result)
                            }
                            Pass::BackwardInput => conv2d::conv2d_backward_input(
                                &gpu,
                                &product,
                                &dy,
                                &parameters,
                                &result,
                                Some(&x),
                            ),
                        }
                        .unwrap(),
                    ];
                    dispatches.push(
                        reduce::reduce_splits(&gpu, product.splits(), &result, &sum).unwrap(),
                    );
                    let dispatches: Vec<_> = dispatches.iter().collect();
                    gpu.submit("test", &dispatches, 1).unwrap();
                    [bits(&sum), bits(&index)]
                };
                most_splits = most_splits.max(product.splits());
                let expected = run(tiles[0]);
                assert!(expected[0].iter().any(|bits| *bits != 0));
                for tile in &tiles[1..] {
                    let found = run(*tile);
                    assert!(found == expected, "{product}: other bits with {tile}");
                }
            }
        }
    }
    assert!(most_splits > 3, "{most_splits}");
}

#[test]
fn wrappers_refuse_what_does_not_fit() {
    use wgrad::Error;
    use wgrad::kernels::{activation, optimizer, pool, reduce};
    use wgrad::model::recipe::Optimizer;
    use wgrad::model::{Pool2d, Shape};
    let gpu = gpu();
    let [long, short] = [100, 99].map(|len| gpu.buffer("test", len).unwrap());
    let other = gpu.buffer("test", 100).unwrap();
    let pool = |size: usize, kernel: usize, stride: usize| {
        Pool2d::new(Shape::new(size, size, 1), [kernel; 2], [stride; 2]).unwrap()
    };
    let sgd = Optimizer::Sgd {
        momentum: 0.9,
        weight_decay: 0.0,
    };
    let (fits, overlapping, wide) = (pool(10, 2, 2), pool(10, 3, 2), pool(20, 17, 17));
    let refused = [
        (
            "at least 100 elements, found 99",
            activation::relu_forward(&gpu, &long, &short),
        ),
        (
            "expected x of at least 100",
            pool::maxpool2d_forward(&gpu, &fits, 1, &short, &long, &other),
        ),
        (
            "use maxpool2d_backward_overlapping",
            pool::maxpool2d_backward(&gpu, &overlapping, 1, &long, &long, None, &other),
        ),
        (
            "at most 256 positions, found 17×17",
            pool::maxpool2d_forward(&gpu, &wide, 1, &long, &long, &other),
        ),
        (
            "in 3 equal parts",
            reduce::reduce_splits(&gpu, 3, &long, &other),
        ),
        (
            "expected the constants of this update rule",
            optimizer::adamw_update(&gpu, &sgd, &long, &long, &long, &long, &long, &long),
        ),
    ];
    for (message, result) in refused {
        match result.err() {
            Some(e @ Error::Shape { .. }) => assert!(e.to_string().contains(message), "{e}"),
            other => panic!("expected a shape error with '{message}', found {other:?}"),
        }
    }
}

#[test]
fn a_product_refuses_the_pools_that_it_cannot_end_in() {
    use wgrad::gpu::AdapterReport;
    use wgrad::kernels::conv2d::{Family, Pass, Product};
    use wgrad::model::{Conv2d, Pool2d, Shape};
    let adapter = AdapterReport::imagined(true);
    let layer =
        |channels| Conv2d::new(Shape::new(12, 12, 3), channels, [3, 3], [1, 1], [1, 1]).unwrap();
    let product = |channels, size, kernel, stride, pass, family| {
        let (geometry, input) = (layer(channels), Shape::new(size, size, channels));
        let pool = Pool2d::new(input, kernel, stride).unwrap();
        let fits = pass == Pass::Forward && Product::can_pool(&geometry, &pool, family);
        let made = Product::new(geometry, 4, pass, true, Some(pool), family, &adapter);
        assert_eq!(made.is_ok(), fits, "{pool:?}, {pass:?}, {family}");
        made
    };
    let (forward, tiled) = (Pass::Forward, Family::Workgroup);
    for family in [Family::Subgroup, tiled] {
        for window in [[2, 2], [1, 2], [2, 1], [1, 4]] {
            assert!(product(8, 12, window, window, forward, family).is_ok());
        }
    }
    for refused in [
        product(8, 12, [2, 2], [1, 1], forward, tiled),
        product(8, 12, [2, 2], [3, 3], forward, tiled),
        product(8, 12, [3, 3], [3, 3], forward, tiled),
        product(8, 12, [3, 1], [3, 1], forward, tiled),
        product(6, 12, [2, 2], [2, 2], forward, tiled),
        product(8, 12, [2, 2], [2, 2], forward, Family::Plain),
        product(8, 12, [2, 2], [2, 2], Pass::BackwardInput, tiled),
        // Not what the convolution gives.
        product(8, 10, [2, 2], [2, 2], forward, tiled),
    ] {
        let message = refused.unwrap_err().to_string();
        assert!(message.contains("expected max-pooling"), "{message}");
        assert!(!message.contains('\n'), "{message}");
    }
}

#[test]
fn whole_steps_agree_with_the_twin_in_every_family_and_fusion() {
    use wgrad::kernels::conv2d::Family;
    let gpu = std::sync::Arc::new(gpu());
    let outcomes = wgrad::verify::training(&gpu, &mut |_| {}).expect("the trainings run");
    let failures: Vec<_> = outcomes.iter().filter(|o| !o.passed).collect();
    assert!(failures.is_empty(), "{failures:#?}");
    let has = |kernel: &str, what: &str| {
        let mut found = outcomes.iter().filter(|o| o.kernel == kernel);
        assert!(found.any(|o| o.variant.contains(what)), "{kernel}, {what}");
    };
    for family in Family::ALL
        .into_iter()
        .filter(|f| f.supported(gpu.report()))
    {
        for kernel in ["training", "evaluation"] {
            has(kernel, &format!("{family}, explicit convolution"));
            if family != Family::Plain {
                has(kernel, &format!("{family}, pooling fused"));
                has(kernel, &format!("{family}, pooling unfused"));
            }
        }
        if family != Family::Plain {
            has(
                "evaluation",
                &format!("{family}, pooling fused, batches of 2"),
            );
        }
    }
}

#[test]
fn random_geometries_agree_with_the_twin() {
    let gpu = gpu();
    let mut failures = Vec::new();
    for index in 0..wgrad::verify::DRAWS {
        for case in wgrad::verify::drawn(gpu.report(), 1, index) {
            let outcome = case.run(&gpu).unwrap();
            if let Some(detail) = outcome.detail {
                failures.push(format!(
                    "draw {index}, {} ({}): {detail}",
                    case.kernel, case.variant
                ));
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// On every machine, and without the draws before it.
#[test]
fn a_draw_is_its_seeds_and_numbers() {
    use wgrad::gpu::AdapterReport;
    use wgrad::verify::drawn;
    let names = |software, seed, index| -> Vec<String> {
        let cases = drawn(&AdapterReport::imagined(software), seed, index);
        let names = cases.iter().map(|c| format!("{}: {}", c.kernel, c.variant));
        names.collect()
    };
    assert_eq!(names(true, 1, 3), names(true, 1, 3));
    assert_ne!(names(true, 1, 3), names(true, 1, 4));
    assert_ne!(names(true, 1, 3), names(true, 2, 3));
    // Only the subgroups' tiles differ between the two adapters.
    let others = |software| -> Vec<String> {
        let names = names(software, 1, 3).into_iter();
        names.filter(|name| !name.contains("subgroup")).collect()
    };
    assert_eq!(others(true), others(false));
    assert!(others(true).len() > 8);
    // A whole list has poolings that are fused and that overlap, dense layers and strides.
    let all: Vec<String> = (0..wgrad::verify::DRAWS)
        .flat_map(|i| names(true, 1, i))
        .collect();
    for part in ["max-pooled", "_overlapping", "1×1×", "stride 2×", "splits"] {
        assert!(all.iter().any(|name| name.contains(part)), "{part}");
    }
}
