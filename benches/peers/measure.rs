//! What the Rust peers share: the workloads, their data, and how a training step is timed.
//! `pytorch/bench.py` does the same in Python.

use std::time::Instant;

/// A network and its batch: ReLU after every layer but the last, a 2×2 max-pool after every
/// `convs_per_pool` convolutions.
pub struct Workload {
    pub name: &'static str,
    pub batch: usize,
    /// Channels, height and width of an image.
    pub image: [usize; 3],
    /// Input channels, output channels, kernel size and padding of each convolution.
    pub convs: &'static [[usize; 4]],
    pub convs_per_pool: usize,
    /// Inputs and outputs of each dense layer.
    pub dense: &'static [[usize; 2]],
}

const WORKLOADS: [Workload; 3] = [
    Workload {
        name: "tutorial",
        batch: 128,
        image: [1, 28, 28],
        convs: &[[1, 32, 5, 2], [32, 64, 5, 2]],
        convs_per_pool: 1,
        dense: &[[64 * 7 * 7, 128], [128, 10]],
    },
    Workload {
        name: "lenet5",
        batch: 128,
        image: [1, 28, 28],
        convs: &[[1, 6, 5, 2], [6, 16, 5, 0]],
        convs_per_pool: 1,
        dense: &[[16 * 5 * 5, 120], [120, 84], [84, 10]],
    },
    Workload {
        name: "vgg-cifar",
        batch: 64,
        image: [3, 32, 32],
        convs: &[
            [3, 64, 3, 1],
            [64, 64, 3, 1],
            [64, 128, 3, 1],
            [128, 128, 3, 1],
            [128, 256, 3, 1],
            [256, 256, 3, 1],
        ],
        convs_per_pool: 2,
        dense: &[[256 * 4 * 4, 256], [256, 10]],
    },
];

/// Small, so that no network diverges on random labels: arithmetic on NaN measures nothing.
pub const LEARNING_RATE: f64 = 0.005;
pub const MOMENTUM: f64 = 0.9;

const BATCHES: usize = 16;
const WINDOWS: usize = 5;
const WINDOW_SECONDS: f64 = 2.0;

impl Workload {
    /// The one that the first argument names; ends the program when there is none.
    pub fn from_args() -> &'static Workload {
        let name = std::env::args().nth(1).unwrap_or_default();
        WORKLOADS
            .iter()
            .find(|w| w.name == name)
            .unwrap_or_else(|| {
                let names = WORKLOADS.each_ref().map(|w| w.name).join(", ");
                eprintln!("error: expected one of {names} as the first argument, found '{name}'");
                std::process::exit(2)
            })
    }

    /// Fixed batches of uniform noise from −1 to 1, channels first, with random labels below 10.
    pub fn batches(&self) -> Vec<(Vec<f32>, Vec<u32>)> {
        let mut random = SplitMix64(1);
        let pixels = self.batch * self.image.iter().product::<usize>();
        let mut batch = || {
            let images = (0..pixels).map(|_| (random.next() >> 40) as f32 / (1 << 23) as f32 - 1.0);
            let images = images.collect();
            let labels = (0..self.batch).map(|_| (random.next() % 10) as u32);
            (images, labels.collect())
        };
        (0..BATCHES).map(|_| batch()).collect()
    }

    /// Times `train(n)`, which must run `n` training steps and return when the device is done.
    pub fn measure<E>(&self, mut train: impl FnMut(usize) -> Result<(), E>) -> Result<Timing, E> {
        let mut timed = |steps| {
            let start = Instant::now();
            train(steps).map(|()| start.elapsed().as_secs_f64())
        };
        let first_step = timed(1)?;
        // A long warm-up: some peers go on compiling and tuning for several steps.
        let (mut warm_up, mut elapsed) = (Vec::new(), 0.0);
        while warm_up.len() < 6 || (elapsed < 4.0 && warm_up.len() < 30) {
            warm_up.push(timed(1)?);
            elapsed += warm_up[warm_up.len() - 1];
        }
        let second_half = warm_up.len() / 2;
        let step = median(&mut warm_up[second_half..]);
        let steps = ((WINDOW_SECONDS / step) as usize).max(3);
        let mut images_per_second = Vec::new();
        for _ in 0..WINDOWS {
            images_per_second.push((steps * self.batch) as f64 / timed(steps)?);
        }
        Ok(Timing {
            first_step,
            images_per_second,
            peak_rss: peak_rss_mb(),
        })
    }

    /// Prints the line of JSON that `run.py` reads, unless training went astray.
    pub fn report(
        &self,
        [peer, version, backend, device]: [&str; 4],
        mut timing: Timing,
        last_loss: f32,
    ) {
        if !last_loss.is_finite() {
            eprintln!("error: expected a finite loss at the end, found {last_loss}");
            std::process::exit(1);
        }
        let Workload { name, batch, .. } = self;
        let median = median(&mut timing.images_per_second);
        let [min, max] = [
            timing.images_per_second[0],
            timing.images_per_second[WINDOWS - 1],
        ];
        let first_step = timing.first_step;
        let peak_rss = timing
            .peak_rss
            .map_or("null".into(), |mb| format!("{mb:.1}"));
        println!(
            "{{\"peer\":{peer:?},\"version\":{version:?},\"backend\":{backend:?},\"device\":{device:?},\
             \"workload\":{name:?},\"batch\":{batch},\
             \"images_per_second\":{{\"median\":{median:.1},\"min\":{min:.1},\"max\":{max:.1}}},\
             \"first_step_seconds\":{first_step:.3},\"peak_rss_mb\":{peak_rss}}}"
        );
    }
}

/// What [`Workload::measure`] found: seconds of the first step, images per second of each window,
/// megabytes of memory.
pub struct Timing {
    first_step: f64,
    images_per_second: Vec<f64>,
    peak_rss: Option<f64>,
}

/// Sorts; the upper of the middle two where the number is even.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Largest resident memory of this process so far; only Linux tells.
fn peak_rss_mb() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<f64>().ok()? / 1024.0)
}

/// Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014).
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}
