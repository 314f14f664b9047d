//! The command line.

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;
use wgrad::data::{Invert, Request};
use wgrad::kernels::conv2d::Family;
use wgrad::model::recipe::{Precision, Views};
use wgrad::train::{CheckpointEvery, Weights};
use wgrad::verify::DRAWS;
use wgrad::{Error, Result, tune};

/// Train convolutional image classifiers on any GPU (Vulkan, Metal, DX12).
#[derive(Debug, Parser)]
#[command(name = "wgrad", version, max_term_width = 80)]
pub struct Cli {
    /// Print results and errors alone: no progress, no notes, no descriptions [default: print all]
    #[arg(short, long, global = true)]
    pub quiet: bool,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train a model and leave a run folder
    Train(TrainArgs),
    /// List the recipes that train takes, or print one
    Recipes(RecipesArgs),
    /// Find a learning rate: raise it while training a little, and plot the loss
    LrFind(LrFindArgs),
    /// Look at data: sizes, classes, duplicates, channel statistics, and a contact sheet
    Data(LookArgs),
    /// Draw what the network will see: some training images before and after augmentation, as a PNG
    Preview(PreviewArgs),
    /// Show a model's layers, parameters, multiply-adds and the GPU memory of a training step
    Inspect(InspectArgs),
    /// Measure loss, accuracy and per-class recall of a trained model on its test images
    Eval(EvalArgs),
    /// Write a run's report anew: report.html, with curves, confusion matrix, mistakes and more
    Report(ReportArgs),
    /// Put several runs side by side: what is different, what came of it, and a page with curves
    Compare(CompareArgs),
    /// Say what pictures show: files, folders or standard input, by a trained model
    Predict(PredictArgs),
    /// Open a local page to draw or drop pictures for a trained model, and to watch a training
    Serve(ServeArgs),
    /// Write a trained network as ONNX, as safetensors in PyTorch's layout, or as a PyTorch module
    Export(ExportArgs),
    /// Make a model file and weights to start from of an ONNX file
    Import(ImportArgs),
    /// List the adapters, best first, with the numbers that --device takes, and what auto takes
    Devices(DevicesArgs),
    /// Check every kernel against its CPU twin, and the twins against finite differences
    Verify(VerifyArgs),
    /// Measure every kernel of a model and its whole training step against the adapter's own peak
    Bench(BenchArgs),
    /// Print a script that completes commands and flags in a shell
    Completions(CompletionsArgs),
    /// Print the manual page, or write one for each command into a folder
    Man(ManArgs),
}

/// Which images, and how they are split.
#[derive(Clone, Debug, Default, Args)]
pub struct DataArgs {
    /// Data: mnist (embedded), a folder of pictures in folders by class (DIR/CLASS/*.jpg, or
    /// DIR/train/CLASS/*.jpg beside test/ and val/), IDX files, CIFAR's binary files, a NumPy archive (.npz)
    /// or Parquet of the Hugging Face hub [default: mnist]
    #[arg(long = "data", value_name = "mnist|DIR|FILE")]
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

/// What computes.
#[derive(Clone, Debug, Default, Args)]
pub struct DeviceArgs {
    /// Device: auto (best hardware adapter, else CPU), gpu (hardware only), software (the shaders on
    /// a software adapter), cpu, or an adapter's number or part of its name, see `wgrad devices`;
    /// the environment variable WGPU_BACKEND (vulkan, metal, dx12) limits the adapters to those of
    /// a backend [default: auto]
    #[arg(long = "device", value_name = "auto|gpu|software|cpu|NUMBER|NAME")]
    pub name: Option<String>,
}

impl DeviceArgs {
    /// What is asked for, or the default.
    pub fn requested(&self) -> &str {
        self.name.as_deref().unwrap_or("auto")
    }
}

/// Which of the weights that a training left.
#[derive(Debug, Args)]
pub struct WeightsArgs {
    /// Which of the weights: last, best (by the validation split) or average [default: last]
    #[arg(
        long = "weights",
        value_name = "last|best|average",
        default_value = "last",
        hide_default_value = true
    )]
    pub which: Weights,
}

/// How it is trained. Values are text here: they are read where those of files are.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Recipe")]
pub struct RecipeArgs {
    /// Recipe, as `wgrad recipes` lists them, or a file. It may name the model too; what it leaves out
    /// is the model's own [default: the model's]
    #[arg(long, value_name = "NAME|FILE.toml")]
    pub recipe: Option<String>,
    /// Set any key of a recipe, as often as needed: --set augment.rotate=10 --set clip_norm=1; the
    /// other flags have the last word [default: nothing]
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Passes over the training images that are planned, in total also when resuming. The schedule
    /// of the learning rate spans them: a resume with another number stretches it, and says from
    /// which rate to which that leads [default: the recipe's; when resuming, the run's]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub epochs: Option<String>,
    /// Images per optimiser step [default: the recipe's, or all where there are fewer]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub batch_size: Option<String>,
    /// Images that are computed at a time where a batch does not fit the device; their gradients are
    /// added up [default: the recipe's, else the whole batch]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub micro_batch: Option<String>,
    /// Parts that a batch is cut into so that several processes can share them; the weights depend on their
    /// number, not on that of the processes [default: the recipe's, else none]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub shards: Option<String>,
    /// Take the statistics of a batch-norm of all shards of a batch together, which needs memory for all of
    /// them at a time [default: the recipe's]
    #[arg(long, value_name = "true|false", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub sync_batch_norm: Option<String>,
    /// Update rule: sgd (with momentum), adamw, lion or muon [default: the recipe's]
    #[arg(long, value_name = "NAME")]
    pub optimizer: Option<String>,
    /// Learning rate per step, the highest of a schedule [default: the recipe's; where that is for
    /// another optimiser, 0.05 for sgd, 0.001 for adamw, 0.0001 for lion, 0.1 for muon]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub lr: Option<String>,
    /// Momentum of sgd or muon, from 0 to below 1, no unit [default: the recipe's, else 0.9 for sgd
    /// and 0.6 for muon]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub momentum: Option<String>,
    /// Nesterov's form of sgd's momentum [default: the recipe's]
    #[arg(long, value_name = "true|false", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub nesterov: Option<String>,
    /// Weight decay, no unit: L2 for sgd and muon, decoupled for adamw and lion [default: the
    /// recipe's, else 0.01 for adamw and 0 for the others]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub weight_decay: Option<String>,
    /// Factor on the learning rate of biases and normalisations [default: the recipe's, else 1]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub bias_lr: Option<String>,
    /// Factor on the learning rate of the last layer's weight [default: the recipe's, else 1]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub head_lr: Option<String>,
    /// Parameters or layers that stay as they are, by name, with * for anything; as often as needed
    /// [default: the recipe's, else none]
    #[arg(long, value_name = "PATTERN")]
    pub freeze: Vec<String>,
    /// Course of the learning rate: constant, step, cosine (down to 0), onecycle (up over 30 % of the
    /// steps, then down), triangular or linear (to 0) [default: the recipe's]
    #[arg(long, value_name = "NAME")]
    pub schedule: Option<String>,
    /// Epochs, or a part of one, in which the learning rate rises from 0 to the schedule's first
    /// [default: the recipe's, else 0]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub warm_up: Option<String>,
    /// Largest L2 norm of all gradients together; a larger one is scaled down to it [default: the
    /// recipe's, else none]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub clip_norm: Option<String>,
    /// Keep an exponential moving average of the weights, which keeps this share of itself in each
    /// step, and evaluate it too [default: the recipe's, else none]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub average: Option<String>,
    /// Share of the target that is spread over all classes, from 0 to below 1 [default: the
    /// recipe's, else 0]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub label_smoothing: Option<String>,
    /// What an image of each class counts: balanced (those of rare classes more), or a file with a
    /// class name and a weight in each line [default: the recipe's, else the same]
    #[arg(long, value_name = "balanced|FILE")]
    pub class_weights: Option<String>,
    /// How often an epoch takes an image: shuffle (once), or balanced (every class equally often)
    /// [default: the recipe's, else shuffle]
    #[arg(long, value_name = "NAME")]
    pub sampler: Option<String>,
    /// Views of an image that an evaluation takes the mean over: one, mirror or six [default: the
    /// recipe's, else one]
    #[arg(long, value_name = "NAME")]
    pub views: Option<String>,
    /// End after so many epochs without a better accuracy on the validation images [default: the
    /// recipe's, else never]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub patience: Option<String>,
    /// What activations are stored as: f32, or mixed (16 bits where that is enough, in half the memory)
    /// [default: the recipe's, else f32]
    #[arg(long, value_name = "f32|mixed")]
    pub precision: Option<String>,
}

impl RecipeArgs {
    /// The flags by the recipe's key that each sets, which is its name with - for _.
    pub fn values(&self) -> [(&'static str, Option<&String>); 21] {
        [
            ("epochs", self.epochs.as_ref()),
            ("batch_size", self.batch_size.as_ref()),
            ("micro_batch", self.micro_batch.as_ref()),
            ("shards", self.shards.as_ref()),
            ("sync_batch_norm", self.sync_batch_norm.as_ref()),
            ("optimizer", self.optimizer.as_ref()),
            ("lr", self.lr.as_ref()),
            ("momentum", self.momentum.as_ref()),
            ("nesterov", self.nesterov.as_ref()),
            ("weight_decay", self.weight_decay.as_ref()),
            ("bias_lr", self.bias_lr.as_ref()),
            ("head_lr", self.head_lr.as_ref()),
            ("schedule", self.schedule.as_ref()),
            ("warm_up", self.warm_up.as_ref()),
            ("clip_norm", self.clip_norm.as_ref()),
            ("average", self.average.as_ref()),
            ("label_smoothing", self.label_smoothing.as_ref()),
            ("sampler", self.sampler.as_ref()),
            ("views", self.views.as_ref()),
            ("patience", self.patience.as_ref()),
            ("precision", self.precision.as_ref()),
        ]
    }
}

/// Seeds, in order, each once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seeds(pub Vec<u64>);

/// `1..5` (both included), `1,2,7`, or both.
impl FromStr for Seeds {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Seeds, String> {
        let range = |part: &str| -> Option<Vec<u64>> {
            let (first, last) = part.split_once("..").unwrap_or((part, part));
            let (first, last) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
            // More than anybody trains.
            (first <= last && last - first < 10_000).then(|| (first..=last).collect())
        };
        let ranges: Option<Vec<Vec<u64>>> = text.split(',').map(range).collect();
        let mut seeds: Vec<u64> = ranges.unwrap_or_default().concat();
        seeds.sort_unstable();
        seeds.dedup();
        if seeds.is_empty() {
            return Err("expected whole numbers as 1..5 (both included) or 1,2,7".into());
        }
        Ok(Seeds(seeds))
    }
}

#[derive(Clone, Debug, Default, Args)]
pub struct TrainArgs {
    /// Model: default, lenet5, tutorial, mlp-sigmoid, vgg-cifar, cnn-bn, tiny, cifar-fast, resnet9, resnet18-cifar,
    /// mobilenet-small, or an architecture file [default: default for grey images up to 32×32,
    /// mobilenet-small for all others]
    #[arg(long, value_name = "NAME|FILE.toml")]
    pub model: Option<String>,
    #[command(flatten)]
    pub data: DataArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// Stop after N of the planned epochs, counted from the start of the training; a resume goes on
    /// to the bits of a training that was not stopped [default: none]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub stop_after: Option<usize>,
    /// Write a checkpoint after so many steps (500) or so much time (30s, 10m, 1h) beside the one
    /// after every epoch, or not (epoch). Ctrl-C and SIGTERM write one and stop, a second one stops
    /// at once (exit codes 130 and 143) [default: 60s]
    #[arg(long, value_name = "STEPS|TIME|epoch", allow_negative_numbers = true)]
    pub checkpoint_every: Option<CheckpointEvery>,
    /// Seed of the first parameters and of the order of the images, a whole number [default: 1]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Train once with each of these seeds, one run after the other, into seed-<N> folders of one
    /// folder, and print mean and standard deviation: 1..5 (both included) or 1,2,7; a --resume of
    /// that folder goes on with what is left [default: one run]
    #[arg(long, value_name = "N..M|N,M,…", conflicts_with_all = ["seed", "resume"])]
    pub seeds: Option<Seeds>,
    /// Weights to start from, as far as their names and shapes are the model's: the last ones of a run, or
    /// a safetensors file (such as a run's best.safetensors); the rest starts from the seed
    /// [default: none]
    #[arg(long, value_name = "RUN|FILE.safetensors", conflicts_with = "resume")]
    pub init: Option<PathBuf>,
    /// Run folder to make; must be new or empty [default: runs/<model>-<data>-<number>]
    #[arg(long, value_name = "DIR", conflicts_with = "resume")]
    pub out: Option<PathBuf>,
    /// Run folder to go on with, up to the epochs it planned or to --epochs [default: none, a new run]
    #[arg(long, value_name = "DIR")]
    pub resume: Option<PathBuf>,
    /// im2col matrix: implicit (computed inside the product) or explicit (stored) [default: implicit]
    #[arg(long, value_name = "HOW")]
    pub conv: Option<Conv>,
    /// Kernel family of the products: subgroup, workgroup, matrix (in mixed precision) or plain [default: what
    /// suits the adapter]
    #[arg(long, value_name = "FAMILY")]
    pub kernels: Option<Family>,
    /// Take the built-in tiles instead of measuring on the first use of a GPU (4 seconds at most; of a
    /// software adapter only what operations cost; a resumed run keeps its tiles) [default: measure]
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
    /// Also write what TensorBoard reads into the run folder (tensorboard/): curves, norms, histograms of
    /// weights and gradients, filters, some images as the network sees them. A resume goes on with what
    /// is there [default: off]
    #[arg(long)]
    pub tensorboard: bool,
    /// Print the bytes that crossed between host and GPU in each epoch, by purpose [default: off]
    #[arg(long)]
    pub trace_transfers: bool,
}

#[derive(Debug, Args)]
pub struct RecipesArgs {
    /// Print this one, as a file to start from [default: list all]
    #[arg(value_name = "NAME")]
    pub name: Option<String>,
}

#[derive(Debug, Args)]
pub struct LrFindArgs {
    /// Model: a name as for train, or an architecture file [default: the recipe's, else default]
    #[arg(long, value_name = "NAME|FILE.toml")]
    pub model: Option<String>,
    #[command(flatten)]
    pub data: DataArgs,
    #[command(flatten)]
    pub recipe: RecipeArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Seed of the first parameters and of the order of the images, a whole number [default: 1]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Learning rate of the first step [default: 5e-6 for sgd, 1e-7 for adamw, 1e-8 for lion, 1e-5
    /// for muon]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub from: Option<f64>,
    /// Learning rate of the last step, if the loss bears it [default: ten million times --from]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub to: Option<f64>,
    /// Steps from one to the other
    #[arg(
        long,
        value_name = "N",
        allow_negative_numbers = true,
        default_value_t = 200
    )]
    pub steps: usize,
    /// File for the plot, in place of one that is there
    #[arg(long, value_name = "FILE.svg", default_value = "lr-find.svg")]
    pub out: PathBuf,
    /// Print one JSON object with every step instead of text [default: off]
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct LookArgs {
    /// What --data of train takes [default: mnist]
    #[arg(value_name = "SOURCE", conflicts_with = "source")]
    pub what: Option<String>,
    #[command(flatten)]
    pub data: DataArgs,
    /// Write a contact sheet, some images of each class, as this PNG file; a file that is there is
    /// replaced [default: not written]
    #[arg(long, value_name = "FILE.png")]
    pub out: Option<PathBuf>,
    /// Print one JSON object instead of tables [default: off]
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct PreviewArgs {
    /// Model: a name as for train, or an architecture file [default: the recipe's, else default]
    #[arg(long, value_name = "NAME|FILE.toml")]
    pub model: Option<String>,
    #[command(flatten)]
    pub data: DataArgs,
    #[command(flatten)]
    pub recipe: RecipeArgs,
    /// Device: cpu, gpu, software, auto, or an adapter's number or part of its name
    #[arg(
        long,
        value_name = "auto|gpu|software|cpu|NUMBER|NAME",
        default_value = "cpu"
    )]
    pub device: String,
    /// Images to show, the first ones of the epoch
    #[arg(
        long,
        value_name = "N",
        allow_negative_numbers = true,
        default_value_t = 32
    )]
    pub count: usize,
    /// Which epoch: each draws anew
    #[arg(
        long,
        value_name = "N",
        allow_negative_numbers = true,
        default_value_t = 1
    )]
    pub epoch: usize,
    /// Seed of the order of the images and of all draws, as for train
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// File for the pictures, in place of one that is there
    #[arg(long, value_name = "FILE.png", default_value = "preview.png")]
    pub out: PathBuf,
}

#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Model: default, lenet5, tutorial, mlp-sigmoid, vgg-cifar, cnn-bn, tiny, cifar-fast, resnet9, resnet18-cifar,
    /// mobilenet-small, or an architecture file
    #[arg(value_name = "MODEL")]
    pub model: String,
    /// Images per optimiser step, for the memory [default: the model's]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub batch_size: Option<usize>,
    /// What activations are stored as: f32, or mixed (16 bits) [default: the model's, else f32]
    #[arg(long, value_name = "f32|mixed")]
    pub precision: Option<Precision>,
    /// im2col matrix: implicit (computed inside the product) or explicit (stored) [default: implicit]
    #[arg(long, value_name = "HOW")]
    pub conv: Option<Conv>,
    /// Print the graph in Graphviz's language instead: wgrad inspect MODEL --dot | dot -Tsvg > model.svg
    #[arg(long, conflicts_with = "plan")]
    pub dot: bool,
    /// Print what a training step does instead, kernel by kernel, as planned for a typical GPU
    #[arg(long)]
    pub plan: bool,
    /// Kernel family to plan for, with --plan: subgroup, workgroup, matrix (in mixed precision) or plain [default: workgroup]
    #[arg(long, value_name = "FAMILY", requires = "plan")]
    pub kernels: Option<Family>,
}

#[derive(Debug, Args)]
pub struct EvalArgs {
    /// Run folders of earlier trainings; of several also the mean of what they give is measured
    #[arg(value_name = "RUN", required = true)]
    pub runs: Vec<PathBuf>,
    #[command(flatten)]
    pub weights: WeightsArgs,
    /// Views of each image that are evaluated, and their mean taken: one, mirror (as it is and mirrored) or
    /// six (both also moved by a pixel either way) [default: the run's]
    #[arg(long, value_name = "one|mirror|six")]
    pub views: Option<Views>,
    /// Data whose test images are used, all of them; of a folder of pictures without test images,
    /// all that are there [default: the run's, as many as it was tested on]
    #[arg(long, value_name = "mnist|DIR")]
    pub data: Option<String>,
    /// Neither read decoded pictures from the user's cache folder nor leave them there [default: do]
    #[arg(long)]
    pub no_cache: bool,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Write the network's outputs (of one run) as this NumPy file, in place of one that is there:
    /// float32, images × classes, in the order of the test images [default: not written]
    #[arg(long, value_name = "FILE.npy")]
    pub logits: Option<PathBuf>,
    /// Print one JSON object instead of tables [default: off]
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct ReportArgs {
    /// Run folder of an earlier training, or of several with --seeds
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// Data whose test images are used, where the run's own are elsewhere now [default: the run's]
    #[arg(long, value_name = "mnist|DIR")]
    pub data: Option<String>,
    /// Neither read decoded pictures from the user's cache folder nor leave them there [default: do]
    #[arg(long)]
    pub no_cache: bool,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Folder for report.html and the folder report with its plots, in place of those that are there
    /// [default: the run folder]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct CompareArgs {
    /// Run folders, or folders with the runs of several seeds
    #[arg(value_name = "RUN", required = true)]
    pub runs: Vec<PathBuf>,
    /// File for the page; must be new
    #[arg(long, value_name = "FILE.html", default_value = "compare.html")]
    pub out: PathBuf,
    /// Replace a file that is there [default: refuse to]
    #[arg(long)]
    pub overwrite: bool,
    /// Print one JSON object instead of tables [default: off]
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct PredictArgs {
    /// Run folder of an earlier training
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// Pictures (JPEG, PNG, WebP, BMP, TIFF or GIF) of any size, folders of them, or - for one picture
    /// on standard input
    #[arg(value_name = "FILE|DIR|-", required = true)]
    pub files: Vec<PathBuf>,
    /// Classes to name of each picture, those with the largest shares
    #[arg(
        long,
        value_name = "N",
        allow_negative_numbers = true,
        default_value_t = 3
    )]
    pub top: usize,
    /// Take the negative of pictures: auto (of dark ink on light paper, where the run's images are
    /// light ink on a dark ground), always or never [default: auto]
    #[arg(
        long,
        value_name = "auto|always|never",
        default_value = "auto",
        hide_default_value = true
    )]
    pub invert: Invert,
    /// Take the middle of drawings, instead of cutting out the ink and centring it as MNIST's was
    /// [default: centre, where the run's images are light ink on a dark ground]
    #[arg(long)]
    pub no_centre: bool,
    #[command(flatten)]
    pub weights: WeightsArgs,
    /// Views of each image that are evaluated, and their mean taken: one, mirror or six [default: the
    /// run's]
    #[arg(long, value_name = "one|mirror|six")]
    pub views: Option<Views>,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Print one JSON object instead of a table [default: off]
    #[arg(long, conflicts_with = "csv")]
    pub json: bool,
    /// Print lines of CSV with a header instead of a table [default: off]
    #[arg(long)]
    pub csv: bool,
}

#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Run folder of an earlier training, or of one in progress
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// Port; 0 for any free one [default: 8471, or the next free one]
    #[arg(long, value_name = "N")]
    pub port: Option<u16>,
    /// IP address to listen on. Any other than 127.0.0.1 or ::1 lets everybody in who reaches it:
    /// there are no passwords
    #[arg(long, value_name = "IP", default_value = "127.0.0.1")]
    pub address: IpAddr,
    #[command(flatten)]
    pub weights: WeightsArgs,
    /// Device: cpu, gpu, software, auto, or an adapter's number or part of its name
    #[arg(
        long,
        value_name = "auto|gpu|software|cpu|NUMBER|NAME",
        default_value = "cpu"
    )]
    pub device: String,
}

#[derive(Debug, Args)]
pub struct ExportArgs {
    /// Run folder of a training
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    #[command(flatten)]
    pub weights: WeightsArgs,
    /// Write the network as this ONNX file (opset 17), in place of one that is there: from images
    /// N×C×H×W to logits, for any N, with class names and normalisation as metadata
    #[arg(
        long,
        value_name = "FILE.onnx",
        required_unless_present_any = ["safetensors", "pytorch"]
    )]
    pub onnx: Option<PathBuf>,
    /// In the ONNX file, make batch normalisations a part of the convolutions right before them
    #[arg(long, requires = "onnx")]
    pub fold_batch_norm: bool,
    /// Let the ONNX file take uint8 images (0 to 255) and normalise them itself; without this it takes
    /// float32 images that are normalised
    #[arg(long, requires = "onnx")]
    pub with_normalization: bool,
    /// Let the ONNX file end in probabilities instead of logits
    #[arg(long, requires = "onnx")]
    pub with_softmax: bool,
    /// Write the weights as this safetensors file, in place of one that is there: PyTorch's names and
    /// layouts, running statistics included
    #[arg(long, value_name = "FILE.safetensors")]
    pub safetensors: Option<PathBuf>,
    /// Write a PyTorch module that loads these weights as this file, in place of one that is there
    #[arg(long, value_name = "FILE.py")]
    pub pytorch: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct ImportArgs {
    /// ONNX file of a convolutional classifier of fixed image size, such as wgrad export or PyTorch write
    #[arg(value_name = "FILE.onnx")]
    pub file: PathBuf,
    /// Path of the files to make, NAME.toml and NAME.safetensors, which must not be there
    /// [default: the ONNX file's name, in the current folder]
    #[arg(long, value_name = "NAME")]
    pub out: Option<PathBuf>,
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
    /// Run each kernel's first case and every Nth after it, for drivers that take long to compile
    #[arg(long, value_name = "N", default_value = "1", conflicts_with = "only")]
    pub every: NonZeroUsize,
    /// Also write the WGSL of every matrix product as rendered for the adapter, one file per kernel,
    /// into this folder [default: not written]
    #[arg(long, value_name = "DIR")]
    pub dump: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct BenchArgs {
    /// Model: default, lenet5, tutorial, mlp-sigmoid, vgg-cifar, cnn-bn, tiny, cifar-fast, resnet9, resnet18-cifar,
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
    /// What activations are stored as: f32, or mixed (16 bits) [default: the model's, else f32]
    #[arg(long, value_name = "f32|mixed")]
    pub precision: Option<Precision>,
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
    /// Kernel family of the products: subgroup, workgroup, matrix (in mixed precision) or plain [default: what
    /// suits the adapter]
    #[arg(long, value_name = "FAMILY")]
    pub kernels: Option<Family>,
    /// Take the built-in tiles instead of measuring on the first use of an adapter [default: measure]
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

#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// Shell whose script is printed: wgrad completions bash > ~/.local/share/bash-completion/completions/wgrad
    #[arg(value_name = "SHELL")]
    pub shell: Shell,
}

#[derive(Debug, Args)]
pub struct ManArgs {
    /// Folder for wgrad.1, wgrad-train.1, …; files that are there are replaced [default: print wgrad.1]
    #[arg(value_name = "DIR")]
    pub folder: Option<PathBuf>,
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

/// The whole command line as data.
pub fn command() -> clap::Command {
    Cli::command()
}

/// The command that was asked for; `None` when it was for help or the version, which are printed.
///
/// # Errors
/// [`Error::Usage`] for anything else: clap's message, on one line.
pub fn parse() -> Result<Option<Cli>> {
    match Cli::try_parse() {
        Ok(cli) => Ok(Some(cli)),
        Err(e) if e.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let command = command();
            let names: Vec<&str> = command.get_subcommands().map(|c| c.get_name()).collect();
            Err(Error::Usage(format!(
                "expected a command ({}), found none; see --help",
                names.join(", ")
            )))
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
