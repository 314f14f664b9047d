//! The examples do what they say, on little data.

#[path = "../examples/custom_loop.rs"]
#[allow(dead_code)]
mod custom_loop;
#[path = "../examples/train_mnist.rs"]
#[allow(dead_code)]
mod train_mnist;

use wgrad::train::Run;

#[test]
fn a_training_takes_less_than_30_lines() {
    let text = include_str!("../examples/train_mnist.rs");
    let code = text
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with("//"));
    assert!(code.count() < 30);
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join("run");
    train_mnist::run(&folder, 1000).unwrap();
    let run = Run::open(&folder).unwrap();
    assert_eq!(run.metrics().len(), 2);
    let accuracy = run.metrics()[1].test_accuracy;
    assert!(accuracy > 0.5, "{accuracy}");
    // It is a run like any other.
    assert_eq!(run.config().data.source, "mnist");
}

#[test]
fn a_loop_of_ones_own_learns() {
    let accuracy = custom_loop::run(1000).unwrap();
    assert!(accuracy > 0.5, "{accuracy}");
}
