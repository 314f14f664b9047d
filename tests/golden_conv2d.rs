//! The convolution's twins against PyTorch: dilation, padding that differs from side to side, groups,
//! without bias. The numbers in `golden/conv2d.json` are made by `golden/make_conv2d.py`, which also says
//! how they are laid out.

use serde::Deserialize;
use wgrad::cpu::{self, Float};
use wgrad::model::{Conv2d, Shape, same_padding};

#[derive(Deserialize)]
struct Golden {
    conv2d: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    input: [usize; 3],
    output: [usize; 3],
    kernel: [usize; 2],
    stride: [usize; 2],
    padding: Option<[[usize; 2]; 2]>,
    dilation: [usize; 2],
    groups: usize,
    bias: bool,
    relu: bool,
    x: Vec<f32>,
    parameters: Vec<f32>,
    y: Vec<f32>,
    dy: Vec<f32>,
    dx: Vec<f32>,
    dparameters: Vec<f32>,
}

fn numbers<T: Float>(golden: &[f32]) -> Vec<T> {
    golden.iter().map(|&v| v.into()).collect()
}

#[track_caller]
fn assert_close<T: Float>(name: &str, found: &[T], expected: &[f32]) {
    // The golden values are rounded to f32, so that even f64 agrees to no more than that.
    let epsilon: f64 = T::epsilon().into();
    let tolerance = (32.0 * epsilon).max(f64::from(f32::EPSILON));
    assert_eq!(found.len(), expected.len(), "{name}");
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let (found, expected): (f64, f64) = (found.into(), expected.into());
        let good = (found - expected).abs() <= tolerance * (1.0 + expected.abs());
        assert!(good, "{name}[{i}] is {found}, not {expected}");
    }
}

fn check<T: Float>() {
    let golden: Golden = serde_json::from_str(include_str!("golden/conv2d.json")).unwrap();
    assert_eq!(golden.conv2d.len(), 10);
    for case in golden.conv2d {
        let [h, w, c] = case.input;
        let (input, kernel) = (Shape::new(h, w, c), case.kernel);
        let padding = case
            .padding
            .unwrap_or_else(|| same_padding(input, kernel, case.stride, case.dilation));
        let [h, w, out] = case.output;
        let mut g = Conv2d::dilated(input, out, kernel, case.stride, padding, case.dilation)
            .and_then(|g| g.grouped(case.groups))
            .unwrap();
        if !case.bias {
            g = g.without_bias();
        }
        assert_eq!(g.output, Shape::new(h, w, out));
        let (x, parameters): (Vec<T>, Vec<T>) = (numbers(&case.x), numbers(&case.parameters));
        let mut dy: Vec<T> = numbers(&case.dy);
        let grouped = case.groups > 1;
        let y = match grouped {
            true => cpu::grouped_forward(&g, case.relu, &x, &parameters),
            false => cpu::conv2d_forward(&g, case.relu, &x, &parameters),
        };
        assert_close("y", &y, &case.y);
        if case.relu {
            dy = cpu::relu_backward(&y, &dy);
        }
        let dx = match grouped {
            true => cpu::grouped_backward_input(&g, &dy, &parameters),
            false => cpu::conv2d_backward_input(&g, &dy, &parameters),
        };
        assert_close("dx", &dx, &case.dx);
        let gradient = match grouped {
            true => cpu::reduce_splits(&cpu::grouped_backward_weight(&g, 3, &x, &dy), 3),
            false => cpu::conv2d_backward_weight(&g, &x, &dy),
        };
        assert_close("dparameters", &gradient, &case.dparameters);
    }
}

#[test]
fn f32() {
    check::<f32>();
}

#[test]
fn f64() {
    check::<f64>();
}
