//! Every kernel against its CPU twin, and the harness that does it against itself.

use wgrad::gpu::{Choice, Gpu, NO_ADAPTER_HINT};
use wgrad::verify::{
    Case, Expected, GUARD, GUARD_WORDS, POISON, Tolerance, WORD_POISON, cases, compare,
};

fn gpu() -> Gpu {
    Gpu::open(&Choice::Auto)
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
                 fn wrong(@builtin(global_invocation_id) id: vec3<u32>) {{
                     if id.x >= {first}u && id.x < {end}u {{ y[id.x] = {value:?}; }}
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
fn ten_steps_agree_with_the_twin() {
    let gpu = std::sync::Arc::new(gpu());
    let outcomes = wgrad::verify::training(&gpu).expect("the trainings run");
    let failures: Vec<_> = outcomes.into_iter().filter(|o| !o.passed).collect();
    assert!(failures.is_empty(), "{failures:#?}");
}
