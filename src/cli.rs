//! The command line.

use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;
use wgrad::data::Request;
use wgrad::kernels::conv2d::Family;
use wgrad::model::recipe::Schedule;
use wgrad::train::CheckpointEvery;
use wgrad::verify::DRAWS;
use wgrad::{Error, Result, tune};

/// Train convolutional image classifiers on any GPU (Vulkan, Metal, DX12).
#[derive(Debug, Parser)]
#[command(name = "wgrad", version, max_term_width = 80)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train a model and leave a run folder
    Train(TrainArgs),
    /// Show a model's layers, parameters, multiply-adds and the GPU memory of a training step
    Inspect(InspectArgs),
    /// Measure loss, accuracy and per-class recall of a trained model on its test images
    Eval(EvalArgs),
    /// List the adapters, best first, with the numbers that --device takes, and what auto takes
    Devices(DevicesArgs),
    /// Check every kernel against its CPU twin, and the twins against finite differences
    Verify(VerifyArgs),
    /// Measure every kernel of a model and its whole training step against the adapter's own peak
    Bench(BenchArgs),
}

/// Which images, and how they are split.
#[derive(Debug, Default, Args)]
pub struct DataArgs {
    /// Data: mnist (embedded), a folder of pictures in folders by class (DIR/CLASS/*.jpg, or
    /// DIR/train/CLASS/*.jpg beside test/ and val/), or a folder of four IDX files [default: mnist]
    #[arg(long = "data", value_name = "mnist|DIR")]
    pub source: Option<String>,
    /// Height and width that pictures are brought to: the short side is scaled to it, the middle is
    /// kept [default: the pictures' own where all are equal and 256 at most, else 64]
    #[arg(long, value_name = "N|HxW", value_parser = image_size)]
    pub image_size: Option<[usize; 2]>,
    /// Share of the training images of each class that is held back to decide by, from 0 to below 1
    /// [default: none where the data have test images, else 0.1]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub validation: Option<f64>,
    /// Share of the images of each class that is held back to test on, where the data have no test
    /// images [default: 0.1]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub test: Option<f64>,
    /// Seed of what is held back, a whole number [default: 0]
    #[arg(long, value_name = "N")]
    pub split_seed: Option<u64>,
    /// Take only the first N images of each split, for quick trials [default: all]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub limit: Option<usize>,
    /// Neither read decoded pictures from the user's cache folder nor leave them there [default: do]
    #[arg(long)]
    pub no_cache: bool,
}

impl DataArgs {
    /// What is asked for; what is not, as `recorded` has it.
    pub fn request(&self, recorded: Request) -> Request {
        Request {
            image_size: self.image_size.or(recorded.image_size),
            validation: self.validation.or(recorded.validation),
            test: self.test.or(recorded.test),
            split_seed: self.split_seed.unwrap_or(recorded.split_seed),
            cache: tune::cache_folder().filter(|_| !self.no_cache),
        }
    }
}

#[derive(Debug, Default, Args)]
pub struct TrainArgs {
    /// Model: default, lenet5, tutorial, mlp-sigmoid, vgg-cifar, cnn-bn, tiny, resnet9, resnet18-cifar,
    /// mobilenet-small, or an architecture file [default: default for grey images up to 32×32,
    /// mobilenet-small for all others]
    #[arg(long, value_name = "NAME|FILE.toml")]
    pub model: Option<String>,
    #[command(flatten)]
    pub data: DataArgs,
    /// Device: auto (best hardware adapter, else CPU), gpu (hardware only), software (the shaders on
    /// a software adapter), cpu, or an adapter's number or part of its name, see `wgrad devices`;
    /// the environment variable WGPU_BACKEND (vulkan, metal, dx12) limits the adapters to those of
    /// a backend [default: auto]
    #[arg(long, value_name = "auto|gpu|software|cpu|NUMBER|NAME")]
    pub device: Option<String>,
    /// Passes over the training images that are planned, in total also when resuming. The schedule
    /// of the learning rate spans them: a resume with another number stretches it, and says from
    /// which rate to which that leads [default: the model's; when resuming, the run's]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub epochs: Option<usize>,
    /// Stop after N of the planned epochs, counted from the start of the training; a resume goes on
    /// to the bits of a training that was not stopped [default: none]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub stop_after: Option<usize>,
    /// Write a checkpoint after so many steps (500) or so much time (30s, 10m, 1h) beside the one
    /// after every epoch, or not (epoch). Ctrl-C and SIGTERM write one and stop, a second one stops
    /// at once (exit codes 130 and 143) [default: 60s]
    #[arg(long, value_name = "STEPS|TIME|epoch", allow_negative_numbers = true)]
    pub checkpoint_every: Option<CheckpointEvery>,
    /// Images per optimiser step [default: the model's, or all where there are fewer]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub batch_size: Option<usize>,
    /// Update rule: sgd (with momentum) or adamw [default: the model's]
    #[arg(long, value_name = "NAME")]
    pub optimizer: Option<OptimizerName>,
    /// Learning rate per step, the peak of cosine and onecycle [default: the model's; 0.05 for sgd
    /// and 0.001 for adamw where that is not the model's optimiser]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub lr: Option<f64>,
    /// Momentum of sgd, from 0 to below 1, no unit [default: the model's, else 0.9]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub momentum: Option<f32>,
    /// Weight decay, no unit: L2 for sgd, decoupled for adamw [default: the model's, else 0 for
    /// sgd and 0.01 for adamw]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub weight_decay: Option<f32>,
    /// Course of the learning rate: constant, cosine (down to 0) or onecycle (up over 30 % of the
    /// steps, then down) [default: the model's]
    #[arg(long, value_name = "NAME", value_parser = schedule)]
    pub schedule: Option<Schedule>,
    /// Seed of the first parameters and of the order of the images, a whole number [default: 1]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Run folder to make; must be new or empty [default: runs/<model>-<data>-<number>]
    #[arg(long, value_name = "DIR", conflicts_with = "resume")]
    pub out: Option<PathBuf>,
    /// Run folder to go on with, up to the epochs it planned or to --epochs [default: none, a new run]
    #[arg(long, value_name = "DIR")]
    pub resume: Option<PathBuf>,
    /// im2col matrix: implicit (computed inside the product) or explicit (stored) [default: implicit]
    #[arg(long, value_name = "HOW")]
    pub conv: Option<Conv>,
    /// Kernel family of the products: subgroup, workgroup or plain [default: what suits the adapter]
    #[arg(long, value_name = "FAMILY")]
    pub kernels: Option<Family>,
    /// Take the built-in tiles instead of measuring on the first use of a GPU (2 seconds at most; a
    /// software adapter is never measured, a resumed run keeps its tiles) [default: measure]
    #[arg(long)]
    pub no_tune: bool,
    /// Do not hold a few kernels against the CPU first, which takes a fraction of a second and tells
    /// a driver that computes nonsense [default: check]
    #[arg(long)]
    pub no_check: bool,
    /// After the training, print the time of a step by layer and kernel (timestamp queries) and write
    /// it as a Chrome/Perfetto trace, profile.json, into the run folder [default: off]
    #[arg(long)]
    pub profile: bool,
    /// Print the bytes that crossed between host and GPU in each epoch, by purpose [default: off]
    #[arg(long)]
    pub trace_transfers: bool,
}

#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Model: default, lenet5, tutorial, mlp-sigmoid, vgg-cifar, cnn-bn, tiny, resnet9, resnet18-cifar,
    /// mobilenet-small, or an architecture file
    #[arg(value_name = "MODEL")]
    pub model: String,
    /// Images per optimiser step, for the memory [default: the model's]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub batch_size: Option<usize>,
    /// im2col matrix: implicit (computed inside the product) or explicit (stored) [default: implicit]
    #[arg(long, value_name = "HOW")]
    pub conv: Option<Conv>,
    /// Print the graph in Graphviz's language instead: wgrad inspect MODEL --dot | dot -Tsvg > model.svg
    #[arg(long, conflicts_with = "plan")]
    pub dot: bool,
    /// Print what a training step does instead, kernel by kernel, as planned for a typical GPU
    #[arg(long)]
    pub plan: bool,
    /// Kernel family to plan for, with --plan: subgroup, workgroup or plain [default: workgroup]
    #[arg(long, value_name = "FAMILY", requires = "plan")]
    pub kernels: Option<Family>,
}

#[derive(Debug, Args)]
pub struct EvalArgs {
    /// Run folder of an earlier training
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// Data whose test images are used, all of them; of a folder of pictures without test images,
    /// all that are there [default: the run's, as many as it was tested on]
    #[arg(long, value_name = "mnist|DIR")]
    pub data: Option<String>,
    /// Neither read decoded pictures from the user's cache folder nor leave them there [default: do]
    #[arg(long)]
    pub no_cache: bool,
    /// Device: auto (best hardware adapter, else CPU), gpu, software, cpu, or an adapter's number or
    /// part of its name [default: auto]
    #[arg(
        long,
        value_name = "auto|gpu|software|cpu|NUMBER|NAME",
        default_value = "auto",
        hide_default_value = true
    )]
    pub device: String,
    /// Print one JSON object instead of tables [default: off]
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct DevicesArgs {
    /// Print a JSON array instead of tables [default: off]
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Device: auto (as for train), gpu, software, cpu (the twins' finite differences only), or an
    /// adapter's number or part of its name [default: the best adapter, software included]
    #[arg(long, value_name = "auto|gpu|software|cpu|NUMBER|NAME")]
    pub device: Option<String>,
    /// Print one JSON object with every case instead of a table [default: off]
    #[arg(long)]
    pub json: bool,
    /// Random geometries to draw on top of the fixed cases
    #[arg(long, value_name = "N", allow_negative_numbers = true, default_value_t = DRAWS)]
    pub random: usize,
    /// Seed of the random geometries, a whole number
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Run one random geometry of the seed alone, by its number, which a failure names [default: all,
    /// and the fixed cases]
    #[arg(long, value_name = "N", conflicts_with = "random")]
    pub only: Option<usize>,
    /// Also write the WGSL of every matrix product as rendered for the adapter, one file per kernel,
    /// into this folder [default: not written]
    #[arg(long, value_name = "DIR")]
    pub dump: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct BenchArgs {
    /// Model: default, lenet5, tutorial, mlp-sigmoid, vgg-cifar, cnn-bn, tiny, resnet9, resnet18-cifar,
    /// mobilenet-small, or an architecture file [default: default]
    #[arg(
        long,
        value_name = "NAME|FILE.toml",
        default_value = "default",
        hide_default_value = true
    )]
    pub model: String,
    /// Images per optimiser step [default: the model's]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub batch_size: Option<usize>,
    /// Device: auto (as for train), gpu, software, cpu (whole steps only), or an adapter's number or
    /// part of its name [default: the best adapter, software included]
    #[arg(long, value_name = "auto|gpu|software|cpu|NUMBER|NAME")]
    pub device: Option<String>,
    /// Measure whole steps only, neither peak nor kernels [default: off]
    #[arg(long)]
    pub steps_only: bool,
    /// Print the ratio to an earlier run: a file with what --json printed [default: none]
    #[arg(long, value_name = "OLD.json")]
    pub compare: Option<PathBuf>,
    /// Kernel family of the products: subgroup, workgroup or plain [default: what suits the adapter]
    #[arg(long, value_name = "FAMILY")]
    pub kernels: Option<Family>,
    /// Take the built-in tiles instead of measuring on the first use of a GPU [default: measure]
    #[arg(long)]
    pub no_tune: bool,
    /// Do not hold a few kernels against the CPU first, which takes a fraction of a second and tells
    /// a driver that computes nonsense [default: check]
    #[arg(long)]
    pub no_check: bool,
    /// Print one JSON object instead of a table [default: off]
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OptimizerName {
    Sgd,
    Adamw,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Conv {
    Implicit,
    Explicit,
}

/// Height and width from `N` or `HxW`.
fn image_size(text: &str) -> std::result::Result<[usize; 2], String> {
    let (height, width) = text.split_once(['x', '×']).unwrap_or((text, text));
    match (height.parse(), width.parse()) {
        (Ok(height), Ok(width)) if height > 0 && width > 0 => Ok([height, width]),
        _ => Err("expected a size in pixels, 64 or 48x64 (height x width)".into()),
    }
}

fn schedule(name: &str) -> std::result::Result<Schedule, String> {
    match name {
        "constant" => Ok(Schedule::Constant),
        "cosine" => Ok(Schedule::Cosine),
        "onecycle" => Ok(Schedule::OneCycle),
        _ => Err("expected constant, cosine or onecycle".into()),
    }
}

/// The command that was asked for; `None` when it was for help or the version, which are printed.
///
/// # Errors
/// [`Error::Usage`] for anything else: clap's message, on one line.
pub fn parse() -> Result<Option<Command>> {
    match Cli::try_parse() {
        Ok(cli) => Ok(Some(cli.command)),
        Err(e) if e.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            Err(Error::Usage(
                "expected a command (train, inspect, eval, devices, verify, bench), found none; see --help"
                    .into(),
            ))
        }
        Err(e) if e.use_stderr() => {
            let text = e.to_string();
            let message: Vec<&str> = text
                .lines()
                .map(str::trim)
                .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"))
                .filter(|line| !line.is_empty())
                .collect();
            let message = message.join(" ");
            let message = message.strip_prefix("error: ").unwrap_or(&message);
            Err(Error::Usage(format!("{message}; see --help")))
        }
        Err(e) => {
            // A reader that closed the pipe has seen enough.
            let _ = e.print();
            Ok(None)
        }
    }
}
