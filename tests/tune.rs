//! Prices and tiles by measurement: on the software adapter, tiles also with the family of real GPUs.

use std::sync::Arc;
use std::time::Duration;
use wgrad::engine::{Engine, Split};
use wgrad::gpu::{AdapterReport, Choice, Gpu, NO_ADAPTER_HINT};
use wgrad::kernels::conv2d::{Family, Pass, Product, Tile};
use wgrad::kernels::{Prices, Step};
use wgrad::model::Model;
use wgrad::plan::{Mode, Options, Plan, Target};
use wgrad::{model, tune};

fn gpu() -> Gpu {
    Gpu::open(&Choice::Best)
        .unwrap_or_else(|e| panic!("these tests need an adapter: {e}; {NO_ADAPTER_HINT}"))
}

fn lenet5() -> Model {
    let definition = model::load("lenet5").unwrap();
    definition
        .resolve(definition.input, definition.classes)
        .unwrap()
}

const BATCH: usize = 4;

fn options(family: Family, choices: &[Product]) -> Options {
    Options {
        family: Some(family),
        choices: choices.to_vec(),
        ..Options::default()
    }
}

fn products_of(gpu: &Gpu, family: Family) -> Vec<Product> {
    planned(gpu, &options(family, &[]))
}

fn planned(gpu: &Gpu, options: &Options) -> Vec<Product> {
    planned_on(gpu.report(), options, BATCH)
}

/// The products of a step of `lenet5`.
fn planned_on(adapter: &AdapterReport, options: &Options, batch: usize) -> Vec<Product> {
    let mode = Mode::Train(model::load("lenet5").unwrap().recipe.optimizer);
    let plan = Plan::new(&lenet5(), batch, mode, options, Target::Gpu(adapter)).unwrap();
    plan.products()
        .into_iter()
        .map(|(_, product)| product)
        .collect()
}

fn products(gpu: &Gpu) -> Vec<Product> {
    products_of(gpu, Family::Workgroup)
}

const LONG: Duration = Duration::from_secs(600);

#[test]
fn choices_fit_are_kept_and_are_used_again() {
    let (gpu, folder) = (gpu(), tempfile::tempdir().unwrap());
    let products = products(&gpu);
    let mut done = 0;
    let first = tune::choose(
        &gpu,
        gpu.report(),
        &products,
        Some(folder.path()),
        LONG,
        &mut |n| done = n,
    )
    .unwrap();
    assert_eq!(done, products.len());
    assert_eq!(first.measured, products.len());
    assert_eq!(first.notes, [""; 0]);
    for (wanted, choice) in products.iter().zip(&first.choices) {
        assert!(choice.same_work(wanted), "{choice} for {wanted}");
        assert_eq!(choice.tile.family(), Family::Workgroup);
    }
    let again = tune::choose(
        &gpu,
        gpu.report(),
        &products,
        Some(folder.path()),
        LONG,
        &mut |_| {},
    )
    .unwrap();
    assert_eq!(again.measured, 0);
    assert_eq!(again.choices, first.choices);
}

#[test]
fn without_time_the_built_in_choice_stays() {
    let (gpu, folder) = (gpu(), tempfile::tempdir().unwrap());
    let products = products(&gpu);
    let none = Duration::ZERO;
    let tuned = tune::choose(
        &gpu,
        gpu.report(),
        &products,
        Some(folder.path()),
        none,
        &mut |_| {},
    )
    .unwrap();
    assert_eq!(tuned.choices, products);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_corrupt_cache_is_ignored_with_one_line_and_replaced() {
    let (gpu, folder) = (gpu(), tempfile::tempdir().unwrap());
    let products = &products(&gpu)[..1];
    let choose = || {
        tune::choose(
            &gpu,
            gpu.report(),
            products,
            Some(folder.path()),
            LONG,
            &mut |_| {},
        )
        .unwrap()
    };
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
        let [note] = &tuned.notes[..] else {
            panic!("{:?}", tuned.notes)
        };
        assert!(note.contains("ignored") && !note.contains('\n'), "{note}");
        assert_eq!(choose().measured, 0, "the cache is whole again");
    }
}

#[test]
fn each_family_has_choices_of_its_own() {
    let (gpu, folder) = (gpu(), tempfile::tempdir().unwrap());
    // The last dense layer, whose tiles compile fast.
    let last = |family| {
        let products = products_of(&gpu, family);
        let mut forward = products.into_iter().filter(|p| p.pass == Pass::Forward);
        forward.next_back().unwrap()
    };
    let choose = |family| {
        let products = [last(family)];
        let tuned = tune::choose(
            &gpu,
            gpu.report(),
            &products,
            Some(folder.path()),
            LONG,
            &mut |_| {},
        )
        .unwrap();
        assert_eq!(tuned.choices[0].tile.family(), family);
        tuned.measured
    };
    for measured in [1, 0] {
        for family in [Family::Workgroup, Family::Plain] {
            assert_eq!(choose(family), measured, "{family}");
        }
    }
}

/// The parameters after three steps of `lenet5` with the given tiles, as bits.
fn trained(gpu: &Arc<Gpu>, family: Family, choices: &[Product]) -> Vec<u32> {
    let model = lenet5();
    let optimizer = model::load("lenet5").unwrap().recipe.optimizer;
    let options = options(family, choices);
    let mut network = Engine::new(Some(gpu.clone()), &model, BATCH, &optimizer, &options).unwrap();
    for (choice, (_, product)) in choices.iter().zip(network.products()) {
        assert_eq!(choice.tile, product.tile, "the choice is not used");
    }
    let len = 3 * BATCH;
    let images: Vec<u8> = (0..len * model.input.elements())
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let labels: Vec<u32> = (0..len as u32).map(|i| i % 10).collect();
    let order: Vec<u32> = (0..len as u32).collect();
    let steps: Vec<Step> = (0..3)
        .map(|i| Step {
            lr: 1e-2,
            bias_correction1: 0.5,
            bias_correction2: 0.5,
            ..Step::new(i * BATCH, BATCH)
        })
        .collect();
    let normalization = [1.0 / 128.0, -1.0];
    network
        .upload_dataset(Split::Train, images, &labels, &normalization)
        .unwrap();
    let before = model::initial_parameters(&model, 5);
    network.set_parameters(&before).unwrap();
    network
        .train_epoch(&order, &steps, &mut |_| {
            Ok(std::ops::ControlFlow::Continue(()))
        })
        .unwrap();
    let after = network.parameters().unwrap();
    assert_ne!(before, after, "nothing was trained");
    after.into_iter().map(f32::to_bits).collect()
}

#[test]
fn what_the_budget_allowed_and_which_tiles_were_chosen_changes_no_bit() {
    let gpu = Arc::new(gpu());
    let products = products(&gpu);
    let tuned =
        |budget| tune::choose(&gpu, gpu.report(), &products, None, budget, &mut |_| {}).unwrap();
    let (none, long) = (tuned(Duration::ZERO), tuned(LONG));
    assert_eq!([none.measured, long.measured], [0, products.len()]);
    let expected = trained(&gpu, Family::Workgroup, &none.choices);
    assert_eq!(trained(&gpu, Family::Workgroup, &long.choices), expected);
    for tile in Tile::all(Family::Workgroup, gpu.report()) {
        // A tile of too many invocations for a product in slices leaves it its own.
        let with_tile = |p: &Product| match p.tiles_on(gpu.report()).contains(&tile) {
            true => p.with_tile(tile),
            false => *p,
        };
        let choices: Vec<_> = products.iter().map(with_tile).collect();
        let found = trained(&gpu, Family::Workgroup, &choices);
        assert!(found == expected, "{tile} gives other bits");
    }
}

#[test]
fn prices_are_measured_once_and_kept_beside_the_choices() {
    let (gpu, folder) = (gpu(), tempfile::tempdir().unwrap());
    let adapter = gpu.report();
    assert!(!adapter.prices.measured);
    // Nothing that cannot be kept is measured.
    let priced = tune::priced(&gpu, None).unwrap();
    assert!(!priced.measured && priced.adapter.prices == adapter.prices);
    assert_eq!(tune::known_prices(adapter, Some(folder.path())), None);

    let first = tune::priced(&gpu, Some(folder.path())).unwrap();
    assert_eq!(first.notes, [""; 0]);
    let prices = first.adapter.prices;
    assert!(first.measured && prices.measured);
    // What a load costs more than a multiply-add, no adapter is so different in.
    assert!(prices.load > 1.0 && prices.loads > 1.0, "{prices:?}");
    let known = tune::known_prices(adapter, Some(folder.path()));
    assert_eq!(known, Some(prices));

    // The tuner takes the adapter with its prices and leaves them where they are.
    let products = planned_on(&first.adapter, &options(Family::Workgroup, &[]), BATCH);
    let last = &products[products.len() - 1..];
    let folder = Some(folder.path());
    let tuned = tune::choose(&gpu, &first.adapter, last, folder, LONG, &mut |_| {}).unwrap();
    assert_eq!(tuned.measured, 1);
    let again = tune::priced(&gpu, folder).unwrap();
    assert!(!again.measured && again.adapter.prices == prices);
    let tuned = tune::choose(&gpu, &again.adapter, last, folder, LONG, &mut |_| {}).unwrap();
    assert_eq!(tuned.measured, 0);
}

#[test]
fn prices_that_cannot_be_right_are_measured_again() {
    let (gpu, folder) = (gpu(), tempfile::tempdir().unwrap());
    let priced = || tune::priced(&gpu, Some(folder.path())).unwrap();
    priced();
    let file = std::fs::read_dir(folder.path()).unwrap().next().unwrap();
    let file = file.unwrap().path();
    let whole: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    for (bad, notes) in [
        (0.0.into(), 0),
        ((-7.0).into(), 0),
        (1e9.into(), 0),
        ("x".into(), 1),
    ] {
        let mut other = whole.clone();
        other["prices"]["load"] = bad;
        std::fs::write(&file, other.to_string()).unwrap();
        assert_eq!(tune::known_prices(gpu.report(), Some(folder.path())), None);
        let again = priced();
        assert!(again.measured, "{other}");
        assert_eq!(again.notes.len(), notes, "{:?}", again.notes);
        assert!(!priced().measured, "the cache is whole again");
    }
}

#[test]
fn prices_change_tiles_and_no_bit() {
    let gpu = Arc::new(gpu());
    let assumed = gpu.report().prices;
    let times = |factor: f64| Prices {
        load: assumed.load * factor,
        loads: assumed.loads * factor,
        read: assumed.read * factor,
        ..assumed
    };
    for family in [Family::Subgroup, Family::Workgroup] {
        let of = |prices, batch| {
            let adapter = AdapterReport {
                prices,
                ..gpu.report().clone()
            };
            planned_on(&adapter, &options(family, &[]), batch)
        };
        let (low, high) = (times(1.0 / 30.0), times(30.0));
        // Of a few images the workgroup family's tiles are the smallest, whatever the prices.
        let decided = of(low, 256) != of(high, 256);
        assert!(decided, "{family}: the prices decide nothing");
        let [built_in, cheap, dear] = [assumed, low, high].map(|prices| of(prices, BATCH));
        assert_eq!(built_in, products_of(&gpu, family));
        let expected = trained(&gpu, family, &built_in);
        for products in [cheap, dear] {
            assert!(trained(&gpu, family, &products) == expected, "{family}");
        }
    }
}

#[test]
fn a_stored_choice_decides_the_tile_and_nothing_else() {
    let gpu = gpu();
    let products = products(&gpu);
    let weight = products.iter().find(|p| p.splits() > 1).unwrap();
    // As an earlier version wrote it, with other splits.
    let mut stored =
        serde_json::to_value(weight.with_tile(weight.tiles_on(gpu.report())[1])).unwrap();
    stored["splits"] = (weight.splits() + 3).into();
    let stored: Product = serde_json::from_value(stored).unwrap();
    let planned = planned(&gpu, &options(Family::Workgroup, &[stored]));
    for (planned, built_in) in planned.iter().zip(&products) {
        let tile = if built_in == weight {
            stored.tile
        } else {
            built_in.tile
        };
        assert_eq!(*planned, built_in.with_tile(tile));
        assert_eq!(planned.splits(), built_in.splits());
    }
}
