//! Tiles chosen by measurement: on the software adapter, with the family of real GPUs.

use std::time::Duration;
use wgrad::gpu::{Choice, Gpu, NO_ADAPTER_HINT};
use wgrad::kernels::conv2d::{Family, Product};
use wgrad::network::{self, Options};
use wgrad::{model, tune};

fn gpu() -> Gpu {
    Gpu::open(&Choice::Best)
        .unwrap_or_else(|e| panic!("these tests need an adapter: {e}; {NO_ADAPTER_HINT}"))
}

fn products(gpu: &Gpu) -> Vec<Product> {
    let definition = model::load("lenet5").unwrap();
    let model = definition
        .resolve(definition.input, definition.classes)
        .unwrap();
    let options = Options {
        family: Some(Family::Workgroup),
        ..Options::default()
    };
    let products = network::products(&model, 4, &options, gpu.report()).unwrap();
    products.into_iter().map(|(_, product)| product).collect()
}

const LONG: Duration = Duration::from_secs(600);

#[test]
fn choices_fit_are_kept_and_are_used_again() {
    let (gpu, folder) = (gpu(), tempfile::tempdir().unwrap());
    let products = products(&gpu);
    let mut done = 0;
    let first = tune::choose(&gpu, &products, Some(folder.path()), LONG, &mut |n| {
        done = n
    })
    .unwrap();
    assert_eq!(done, products.len());
    assert_eq!(first.measured, products.len());
    assert_eq!(first.note, None);
    for (wanted, choice) in products.iter().zip(&first.choices) {
        assert!(choice.same_work(wanted), "{choice} for {wanted}");
        assert_eq!(choice.tile.family(), Family::Workgroup);
    }
    let again = tune::choose(&gpu, &products, Some(folder.path()), LONG, &mut |_| {}).unwrap();
    assert_eq!(again.measured, 0);
    assert_eq!(again.choices, first.choices);
}

#[test]
fn without_time_the_built_in_choice_stays() {
    let (gpu, folder) = (gpu(), tempfile::tempdir().unwrap());
    let products = products(&gpu);
    let none = Duration::ZERO;
    let tuned = tune::choose(&gpu, &products, Some(folder.path()), none, &mut |_| {}).unwrap();
    assert_eq!(tuned.choices, products);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_corrupt_cache_is_ignored_with_one_line_and_replaced() {
    let (gpu, folder) = (gpu(), tempfile::tempdir().unwrap());
    let products = &products(&gpu)[..1];
    let choose = || tune::choose(&gpu, products, Some(folder.path()), LONG, &mut |_| {}).unwrap();
    choose();
    let file = std::fs::read_dir(folder.path()).unwrap().next().unwrap();
    let file = file.unwrap().path();
    let whole = std::fs::read_to_string(&file).unwrap();
    for bad in [
        &whole[..whole.len() / 2],
        "",
        "{}",
        &whole.replace("\"version\": \"", "\"version\": \"x"),
    ] {
        std::fs::write(&file, bad).unwrap();
        let tuned = choose();
        assert_eq!(tuned.measured, 1, "a bad cache must not be believed");
        let note = tuned.note.expect("a note");
        assert!(note.contains("ignored") && !note.contains('\n'), "{note}");
        assert_eq!(choose().measured, 0, "the cache is whole again");
    }
}
