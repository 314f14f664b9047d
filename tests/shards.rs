//! Batches in shards: the same bits whether one engine computes all of them or several share them, with threads in
//! place of processes.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;
use wgrad::cluster::{Cluster, Link};
use wgrad::engine::{Engine, Split};
use wgrad::gpu::{Choice, Gpu};
use wgrad::kernels::{Metrics, Step};
use wgrad::model::recipe::{Exchanged, Optimizer};
use wgrad::model::{Definition, Model, initial_parameters};
use wgrad::plan::Options;
use wgrad::train::epoch_order;
use wgrad::{Error, Result};

/// The last batch has two samples, fewer than ranks.
const SAMPLES: usize = 50;
const BATCH: usize = 12;
const SHARDS: usize = 5;
const EPOCHS: usize = 2;

/// A rank's ends of the channels from and to all others.
struct Channels {
    rank: usize,
    to: Vec<Sender<Vec<u32>>>,
    from: Vec<Receiver<Vec<u32>>>,
    /// How long a message takes.
    pause: Duration,
}

fn channels(ranks: usize, pause: Duration) -> Vec<Channels> {
    let ends = (0..ranks).map(|rank| Channels {
        rank,
        to: Vec::new(),
        from: Vec::new(),
        pause,
    });
    let mut all: Vec<Channels> = ends.collect();
    for from in 0..ranks {
        for to in 0..ranks {
            let (sender, receiver) = channel();
            all[from].to.push(sender);
            all[to].from.push(receiver);
        }
    }
    all
}

impl Link for Channels {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.to.len()
    }

    fn swap(&mut self, parts: &[&[u32]], lens: &[usize]) -> Result<Vec<Vec<u32>>> {
        let gone = || Error::Cluster("a rank is gone".into());
        std::thread::sleep(self.pause);
        for (to, part) in self.to.iter().zip(parts) {
            to.send(part.to_vec()).map_err(|_| gone())?;
        }
        let received: Result<Vec<Vec<u32>>> = self
            .from
            .iter()
            .map(|from| from.recv().map_err(|_| gone()))
            .collect();
        let received = received?;
        let found: Vec<usize> = received.iter().map(Vec::len).collect();
        assert_eq!(found, lens);
        Ok(received)
    }
}

fn model() -> Model {
    let text = format!(
        "name = \"small\"\ninput = [5, 7, 3]\nclasses = 4\nloss = \"softmax_cross_entropy\"\n
         recipe = {{ optimizer = \"sgd\", lr = 0.05, schedule = \"constant\", epochs = 1, batch_size = {BATCH} }}\n
         layer = [{{ type = \"conv2d\", out_channels = 6, kernel = 3, padding = 1, bias = false }},
             {{ type = \"batch_norm\", activation = \"relu\" }},
             {{ type = \"max_pool2d\", kernel = 2 }},
             {{ type = \"dropout\", probability = 0.3 }},
             {{ type = \"dense\", units = \"classes\" }}]"
    );
    let definition = Definition::parse(&text, "small").unwrap();
    definition.resolve(definition.input, 4).unwrap()
}

const RULE: Optimizer = Optimizer::Adamw {
    beta1: 0.9,
    beta2: 0.99,
    epsilon: 1e-8,
    weight_decay: 0.01,
};

fn engine(gpu: Option<Arc<Gpu>>, spread: bool, sync: bool) -> Engine {
    engine_of(gpu, Some(SHARDS), spread, sync)
}

fn engine_of(
    gpu: Option<Arc<Gpu>>,
    shards: Option<usize>,
    spread: bool,
    sync_batch_norm: bool,
) -> Engine {
    let model = model();
    let options = Options {
        micro: true,
        shards,
        spread,
        sync_batch_norm,
        // Of gradients several, in so small a model, and of images fewer than a batch has.
        slab_elements: Some(32),
        slab_bytes: sync_batch_norm.then_some(7 * 105),
        clip_norm: Some(0.5),
        average: true,
        ..Options::default()
    };
    let batch = BATCH.div_ceil(SHARDS);
    let mut engine = Engine::new(gpu, &model, batch, &RULE, &options).unwrap();
    engine
        .set_parameters(&initial_parameters(&model, 5))
        .unwrap();
    let mut state = 1u32;
    let mut byte = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    let images = (0..SAMPLES * 105).map(|_| byte()).collect();
    let labels: Vec<u32> = (0..SAMPLES as u32).map(|i| i * 7 / 3 % 4).collect();
    let normalization = [0.02, 0.01, 0.015, -1.0, -1.5, -2.0];
    engine
        .upload_dataset(Split::Train, images, &labels, &normalization)
        .unwrap();
    engine
}

fn table(epoch: usize) -> Vec<Step> {
    let mut steps = Vec::new();
    for (i, first) in (0..SAMPLES).step_by(BATCH).enumerate() {
        let count = BATCH.min(SAMPLES - first);
        let shards = SHARDS.min(count);
        let number = (epoch - 1) * SAMPLES.div_ceil(BATCH) + i;
        let scalars = RULE.step_scalars(0.02, number as u64 + 1);
        for shard in 0..shards {
            let [from, to] = [shard, shard + 1].map(|shard| shard * count / shards);
            steps.push(Step {
                lr: scalars.lr,
                bias_correction1: scalars.bias_correction1,
                bias_correction2: scalars.bias_correction2,
                seed: 9,
                epoch: epoch as u32,
                total: count as f32,
                micro: shard as u32,
                shards: shards as u32,
                share: 1.0 / shards as f32,
                average: 0.5,
                ..Step::new(first + from, to - from)
            });
        }
    }
    steps
}

#[derive(Debug, PartialEq)]
struct Outcome {
    parameters: Vec<f32>,
    running: Vec<f32>,
    gradients: Vec<f32>,
    state: Vec<Vec<f32>>,
    average: Option<[Vec<f32>; 2]>,
    metrics: Vec<Metrics>,
}

fn outcome(engine: &Engine, metrics: Vec<Metrics>) -> Outcome {
    Outcome {
        parameters: engine.parameters().unwrap(),
        running: engine.running().unwrap(),
        gradients: engine.gradients().unwrap(),
        state: engine.optimizer_state().unwrap(),
        average: engine.average().unwrap(),
        metrics,
    }
}

fn alone(gpu: Option<Arc<Gpu>>, sync: bool) -> Outcome {
    let mut engine = engine(gpu, false, sync);
    let mut metrics = Vec::new();
    for epoch in 1..=EPOCHS {
        let go_on = &mut |_: &[Metrics]| Ok(ControlFlow::Continue(()));
        let order = epoch_order(SAMPLES, 3, epoch);
        metrics.extend(engine.train_epoch(&order, &table(epoch), go_on).unwrap());
    }
    outcome(&engine, metrics)
}

/// What `work` gives on each of so many ranks.
fn together<T: Send>(
    gpu: &Option<Arc<Gpu>>,
    ranks: usize,
    work: impl Fn(&mut Cluster, &mut Engine) -> T + Sync,
) -> Vec<T> {
    together_by(Manner::default(), gpu, ranks, work)
}

/// How ranks train together.
#[derive(Clone, Copy, Default)]
struct Manner {
    mode: Exchanged,
    /// How long a message takes.
    pause: Duration,
    /// Whether batch-norms are synced.
    sync: bool,
}

fn together_by<T: Send>(
    Manner { mode, pause, sync }: Manner,
    gpu: &Option<Arc<Gpu>>,
    ranks: usize,
    work: impl Fn(&mut Cluster, &mut Engine) -> T + Sync,
) -> Vec<T> {
    std::thread::scope(|scope| {
        let links = channels(ranks, pause).into_iter();
        let threads: Vec<_> = links
            .map(|link| {
                let work = &work;
                scope.spawn(move || {
                    let mut cluster = Cluster::new(Box::new(link), &model(), SHARDS, mode).unwrap();
                    let mut engine = engine(gpu.clone(), true, sync);
                    work(&mut cluster, &mut engine)
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

fn ranks_change_no_bit(gpu: Option<Arc<Gpu>>, sync: bool) {
    let alone = alone(gpu.clone(), sync);
    assert!(alone.parameters.iter().all(|x| x.is_finite()));
    for ranks in 1..=4 {
        let manner = Manner {
            sync,
            ..Manner::default()
        };
        let outcomes = together_by(manner, &gpu, ranks, |cluster, engine| {
            let mut metrics = Vec::new();
            for epoch in 1..=EPOCHS {
                let order = epoch_order(SAMPLES, 3, epoch);
                let mut hear = |new: &[Metrics]| {
                    metrics.extend_from_slice(new);
                    Ok(ControlFlow::Continue(()))
                };
                let never = AtomicBool::new(false);
                let rows = table(epoch);
                cluster
                    .train_epoch(engine, &order, &rows, &never, &mut hear)
                    .unwrap();
            }
            let traffic = cluster.traffic();
            let batches = EPOCHS * SAMPLES.div_ceil(BATCH);
            assert_eq!(traffic.batches as usize, batches);
            assert_eq!(traffic.timed as usize, batches - EPOCHS);
            assert_eq!(traffic.sent > 0, ranks > 1);
            outcome(engine, metrics)
        });
        for (rank, outcome) in outcomes.iter().enumerate() {
            assert!(*outcome == alone, "rank {rank} of {ranks}");
        }
    }
}

#[test]
fn ranks_change_no_bit_on_the_cpu() {
    for sync in [false, true] {
        ranks_change_no_bit(None, sync);
    }
}

#[test]
fn ranks_change_no_bit_on_the_gpu() {
    let gpu = Gpu::open(&Choice::Best);
    let gpu = gpu.expect("an adapter; sh scripts/test.sh installs one");
    let gpu = Some(Arc::new(gpu));
    for sync in [false, true] {
        ranks_change_no_bit(gpu.clone(), sync);
    }
}

/// Shards are parts of a batch that are added up in another order; running statistics move once a batch, by the mean
/// of where each of its shards alone would lead.
#[test]
fn shards_train_as_parts_do() {
    let trained = |shards: Option<usize>, rows: &[Step]| {
        let mut engine = engine_of(None, shards, false, false);
        let go_on = &mut |_: &[Metrics]| Ok(ControlFlow::Continue(()));
        let order = epoch_order(SAMPLES, 3, 1);
        engine.train_epoch(&order, rows, go_on).unwrap();
        [engine.gradients().unwrap(), engine.running().unwrap()]
    };
    let apart = |a: &[f32], b: &[f32]| {
        let apart = a.iter().zip(b).map(|(a, b)| (a - b).abs());
        apart.fold(0.0, f32::max)
    };
    // The first batch, from the same parameters.
    let all = table(1);
    let rows = &all[..SHARDS];
    let [sharded, parts] = [Some(SHARDS), None].map(|shards| trained(shards, rows));
    assert!(apart(&sharded[0], &parts[0]) < 1e-6);
    assert_ne!(sharded[0], parts[0]);
    let mut mean = vec![0.0; sharded[1].len()];
    for row in rows {
        let alone = Step {
            micro: 0,
            shards: 1,
            share: 1.0,
            ..*row
        };
        let [_, running] = trained(Some(SHARDS), &[alone]);
        let shares = running.iter().map(|x| x / SHARDS as f32);
        mean.iter_mut()
            .zip(shares)
            .for_each(|(mean, share)| *mean += share);
    }
    assert!(apart(&sharded[1], &mean) < 1e-6);
    assert!(apart(&sharded[1], &parts[1]) > 1e-3);
}

/// Whoever is asked to stop, all stop after the same batch, and know why.
#[test]
fn all_stop_after_the_same_batch() {
    for asked in [0, 2] {
        for by_signal in [false, true] {
            let stopped = together(&None, 3, |cluster, engine| {
                let flag = AtomicBool::new(false);
                let leads = cluster.leads();
                let mut heard = 0;
                let mut hear = |new: &[Metrics]| {
                    heard += new.len();
                    let own = (asked == 0) == leads && heard >= SHARDS;
                    flag.store(own && by_signal, Ordering::Relaxed);
                    Ok(match own && !by_signal {
                        true => ControlFlow::Break(()),
                        false => ControlFlow::Continue(()),
                    })
                };
                let (order, rows) = (epoch_order(SAMPLES, 3, 1), table(1));
                cluster
                    .train_epoch(engine, &order, &rows, &flag, &mut hear)
                    .unwrap();
                assert_eq!(cluster.interrupted(), by_signal);
                (heard, engine.parameters().unwrap())
            });
            assert_eq!(stopped[0].0, 2 * SHARDS);
            assert!(stopped.iter().all(|other| *other == stopped[0]));
        }
    }
}

/// In other orders and in 16 bits: fewer bytes, nearly the same, and the same on all ranks.
#[test]
fn other_exchanges_send_less_and_give_nearly_the_same() {
    let mut sent = Vec::new();
    let mut exact = Vec::new();
    for mode in [Exchanged::Exact, Exchanged::Fast, Exchanged::Half] {
        let manner = Manner {
            mode,
            ..Manner::default()
        };
        let outcomes = together_by(manner, &None, 2, |cluster, engine| {
            let order = epoch_order(SAMPLES, 3, 1);
            let never = AtomicBool::new(false);
            // The first batch, from the same parameters.
            let go_on = &mut |_: &[Metrics]| Ok(ControlFlow::Continue(()));
            let rows = &table(1)[..SHARDS];
            cluster
                .train_epoch(engine, &order, rows, &never, go_on)
                .unwrap();
            (outcome(engine, Vec::new()), cluster.traffic().sent)
        });
        assert!(outcomes[0].0 == outcomes[1].0);
        let (Outcome { gradients, .. }, bytes) = &outcomes[0];
        if mode == Exchanged::Exact {
            exact.clone_from(gradients);
        }
        let largest = exact.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        let apart = gradients.iter().zip(&exact).map(|(a, b)| (a - b).abs());
        let apart = apart.fold(0.0, f32::max) / largest;
        assert_eq!(apart < 1e-6, mode != Exchanged::Half, "{apart:e}");
        assert!(apart < 2e-3, "{apart:e}");
        // Metrics and running statistics go as they are: of three shards, and in two nodes.
        let statistics = 4 * (1 + 2 * 3 + 2 * outcomes[0].0.running.len()) as u64;
        sent.push(bytes - statistics);
    }
    // Rank 0 has three shards, which are two nodes: half of both and half of the sum; of one and one; of halves, with
    // an exponent for each part of the three slabs.
    let elements = exact.len() as u64;
    assert_eq!(sent[..2], [4 * elements * 3 / 2, 4 * elements]);
    assert!(
        sent[2] > sent[1] / 2 && sent[2] < sent[1] * 6 / 10,
        "{sent:?}"
    );
}

/// Twice for each of three slabs and once besides, and it is known for how long the device had nothing to do meanwhile.
#[test]
fn what_an_exchange_takes_is_told() {
    let pause = Duration::from_millis(5);
    let manner = Manner {
        pause,
        ..Manner::default()
    };
    let traffic = together_by(manner, &None, 2, |cluster, engine| {
        let never = AtomicBool::new(false);
        let go_on = &mut |_: &[Metrics]| Ok(ControlFlow::Continue(()));
        let order = epoch_order(SAMPLES, 3, 1);
        cluster
            .train_epoch(engine, &order, &table(1), &never, go_on)
            .unwrap();
        cluster.traffic()
    });
    for traffic in traffic {
        let wait = pause.as_secs_f64();
        assert!(traffic.per_batch(traffic.waiting) > wait, "{traffic:?}");
        let all = traffic.per_batch(traffic.exchanging);
        assert!(all > 7.0 * wait && all < 100.0 * wait, "{traffic:?}");
        assert!(
            traffic.share() > 0.0 && traffic.share() < 1.0,
            "{traffic:?}"
        );
    }
}

/// A rank that is slower than the others gets fewer shards from the second epoch on, which changes no bit.
#[test]
fn shards_are_dealt_by_speed() {
    let alone = alone(None, false);
    let outcomes = together(&None, 2, |cluster, engine| {
        let mut metrics = Vec::new();
        let mut dealt = Vec::new();
        let slow = !cluster.leads();
        for epoch in 1..=EPOCHS {
            let order = epoch_order(SAMPLES, 3, epoch);
            let own = cluster.dealt(SHARDS)[cluster.rank()] as u64;
            let mut hear = |new: &[Metrics]| {
                // For each of its shards.
                std::thread::sleep(Duration::from_millis(own * if slow { 80 } else { 10 }));
                metrics.extend_from_slice(new);
                Ok(ControlFlow::Continue(()))
            };
            let (never, rows) = (AtomicBool::new(false), table(epoch));
            cluster
                .train_epoch(engine, &order, &rows, &never, &mut hear)
                .unwrap();
            dealt.push(cluster.dealt(SHARDS));
        }
        (outcome(engine, metrics), dealt)
    });
    for (outcome, dealt) in outcomes {
        assert_eq!(dealt[0], [3, 2]);
        assert_eq!(dealt[1], [4, 1]);
        assert!(outcome == alone);
    }
}

/// Each evaluates a part of a split, and all parts are the whole.
fn parts_of_an_evaluation_are_the_whole(gpu: Option<Arc<Gpu>>) {
    let mut engine = engine(gpu, false, false);
    let (images, labels) = ((0..31 * 105).map(|i| (i * i / 7) as u8), vec![1; 31]);
    let normalization = [0.02, 0.01, 0.015, -1.0, -1.5, -2.0];
    engine
        .upload_dataset(Split::Test, images.collect(), &labels, &normalization)
        .unwrap();
    let go_on = &mut |_| ControlFlow::Continue(());
    for ranks in [1, 2, 3, 40] {
        let whole = engine.evaluate(Split::Test, go_on).unwrap();
        let (mut predictions, mut losses) = (Vec::new(), Vec::new());
        for rank in 0..ranks {
            let part = engine.evaluate_part(Split::Test, [rank, ranks], go_on);
            let part = part.unwrap();
            assert!(part.predictions.is_empty() || part.first == predictions.len());
            predictions.extend(part.predictions);
            losses.extend(part.losses);
        }
        assert_eq!(predictions, whole.predictions);
        assert_eq!(losses, whole.losses);
    }
}

#[test]
fn parts_of_an_evaluation_are_the_whole_on_the_cpu() {
    parts_of_an_evaluation_are_the_whole(None);
}

#[test]
fn parts_of_an_evaluation_are_the_whole_on_the_gpu() {
    let gpu = Gpu::open(&Choice::Best);
    let gpu = gpu.expect("an adapter; sh scripts/test.sh installs one");
    parts_of_an_evaluation_are_the_whole(Some(Arc::new(gpu)));
}

/// A rank that is gone is an error on the others, whose engines are as the last batch left them.
#[test]
fn a_rank_that_is_gone_leaves_the_others_between_two_batches() {
    let left = together(&None, 3, |cluster, engine| {
        let (order, rows) = (epoch_order(SAMPLES, 3, 1), table(1));
        let never = AtomicBool::new(false);
        let mut heard = 0;
        let dies = cluster.rank() == 2;
        let mut hear = |new: &[Metrics]| {
            heard += new.len();
            match dies && heard >= 2 * SHARDS {
                true => Err(Error::Cluster("died".into())),
                false => Ok(ControlFlow::Continue(())),
            }
        };
        let result = cluster.train_epoch(engine, &order, &rows, &never, &mut hear);
        assert!(matches!(result, Err(Error::Cluster(_))), "{result:?}");
        assert_eq!(heard, 2 * SHARDS);
        engine.parameters().unwrap()
    });
    assert!(left.iter().all(|other| *other == left[0]));
}

#[test]
fn all_are_brought_to_the_leader_s_state() {
    let states = together(&None, 2, |cluster, engine| {
        if cluster.leads() {
            let order = epoch_order(SAMPLES, 3, 1);
            let go_on = &mut |_: &[Metrics]| Ok(ControlFlow::Continue(()));
            engine.train_epoch(&order, &table(1), go_on).unwrap();
        }
        let own = engine.parameters().unwrap();
        cluster.level(engine).unwrap();
        (own, outcome(engine, Vec::new()))
    });
    assert_ne!(states[0].0, states[1].0);
    let of = |rank: usize| {
        let state = &states[rank].1;
        (
            &state.parameters,
            &state.running,
            &state.state,
            &state.average,
        )
    };
    assert_eq!(of(0), of(1));
}

#[test]
fn more_ranks_than_shards_are_refused() {
    let link = channels(6, Duration::ZERO).remove(0);
    let error = Cluster::new(Box::new(link), &model(), SHARDS, Exchanged::Exact)
        .err()
        .unwrap();
    assert!(matches!(error, Error::Usage(_)));
    assert!(error.to_string().contains("--shards 8"), "{error}");
}
