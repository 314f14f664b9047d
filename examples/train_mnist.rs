//! Trains the default model on MNIST and leaves a run folder, as `wgrad train` does:
//! `cargo run --release --example train_mnist [FOLDER] [IMAGES]`.

use std::path::Path;
use wgrad::engine::Engine;
use wgrad::gpu::{Choice, Gpu};
use wgrad::train::{Config, Control, DataRecord, Run, train};
use wgrad::{Result, data, model};

pub fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let folder = args.next().unwrap_or("runs/mnist".into());
    let images = args.next().and_then(|n| n.parse().ok());
    run(Path::new(&folder), images.unwrap_or(60_000))
}

pub fn run(folder: &Path, images: usize) -> Result<()> {
    let request = data::Request::default();
    let mut data = data::load("mnist", &request, &mut |_, _| ())?;
    data.truncate(images)?;
    let mut definition = model::load("default")?;
    definition.recipe.epochs = 2;
    let record = DataRecord::of("mnist".into(), Some(images), &request, &data);
    let config = Config::new(&definition, &data, record, 1)?;
    let mut run = Run::create(Some(folder), config)?;
    let gpu = Gpu::open(&Choice::Hardware).ok(); // Without one, the CPU.
    let mut engine = Engine::of(gpu.map(Into::into), run.model(), &run.config().recipe)?;
    train(&mut run, data, &mut engine, &Control::default(), &mut ())?;
    let last = run.metrics().last().expect("two epochs are finished");
    println!("test accuracy {:.2} %", 100.0 * last.test_accuracy);
    Ok(())
}
