//! Several processes that train one network together. Each computes some of the shards of every batch
//! ([`crate::model::recipe::Recipe::shards`]), on end, then they exchange the sums, and all carry out the same
//! update. The sums are made by one tree, whoever computes what, so the bits depend neither on how many processes
//! there are nor on how the shards are dealt.
//!
//! ```text
//! rank 0: shards 0–2 ─► nodes ─┐            ┌─► sum of slab 0 ─┐            ┌─► update
//! rank 1: shards 3–5 ─► nodes ─┼─ slabs of ─┼─► sum of slab 1 ─┼─ all slabs ┼─► update
//! rank 2: shards 6–7 ─► nodes ─┘  all nodes └─► sum of slab 2 ─┘            └─► update
//! ```
//!
//! So each process sends its nodes once and the sum once, however many there are. Rank 0, the leader, has the run
//! folder and speaks for all; the others follow.

mod halves;
#[cfg(feature = "mpi")]
mod mpi;

#[cfg(feature = "mpi")]
pub use mpi::Mpi;

use crate::cpu::{flushed, root};
use crate::engine::{Engine, Exchange, StepProgress, ends_batch};
use crate::error::{Error, Result};
use crate::kernels::shards::{Node, nodes};
use crate::kernels::{Metrics, Step};
use crate::model::Model;
use crate::model::recipe::Exchanged;
use std::borrow::Cow;
use std::cell::RefCell;
use std::ops::{ControlFlow, Range};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// What carries words between the processes. All of them make the same calls in the same order.
pub trait Link {
    /// This process's number.
    fn rank(&self) -> usize;
    /// How many there are.
    fn ranks(&self) -> usize;
    /// Sends `parts[r]` to each rank r, and gives what each sends here, of which `lens[r]` says how many words.
    ///
    /// # Errors
    /// [`Error::Cluster`] where another process is gone.
    fn swap(&mut self, parts: &[&[u32]], lens: &[usize]) -> Result<Vec<Vec<u32>>>;
    /// The end in good order, when all have come to it: waits for the others. One that goes without is gone to them.
    fn leave(&mut self) {}
}

/// What the exchanges of a training were so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Traffic {
    /// Batches that were exchanged.
    pub batches: u64,
    /// Bytes that this process sent to others for them.
    pub sent: u64,
    /// Seconds from one exchange to the next, but for the first.
    pub computing: f64,
    /// Seconds in these, waiting for slower ones included.
    pub exchanging: f64,
}

/// This process among the others.
pub struct Cluster {
    link: Box<dyn Link>,
    /// Of parameters and running statistics.
    lens: [usize; 2],
    /// Shares of a batch that the ranks compute.
    shares: Vec<f64>,
    interrupted: bool,
    traffic: Traffic,
    pace: Pace,
    mode: Exchanged,
    /// What rounding to 16 bits left out so far: of this process's gradients, and of its slab of the sum.
    left: [Vec<f32>; 2],
}

/// What a process computed since the shards were dealt: seconds, and shards in them.
#[derive(Clone, Copy, Debug, Default)]
struct Pace {
    seconds: f64,
    shards: f64,
}

impl Cluster {
    /// Those at the ends of `link`, to train `model` in batches of `shards` shards at most; `mode` says how sums are
    /// exchanged.
    ///
    /// # Errors
    /// [`Error::Usage`] for more processes than shards.
    pub fn new(
        link: Box<dyn Link>,
        model: &Model,
        shards: usize,
        mode: Exchanged,
    ) -> Result<Cluster> {
        let ranks = link.ranks();
        if shards < ranks {
            return Err(Error::Usage(format!(
                "expected a shard for each of {ranks} ranks, found --shards {shards}; start {shards} ranks or fewer, or train with --shards {}, which gives other weights",
                ranks.next_power_of_two()
            )));
        }
        Ok(Cluster {
            link,
            lens: [model.parameter_elements, model.running_elements],
            shares: vec![1.0 / ranks as f64; ranks],
            interrupted: false,
            traffic: Traffic::default(),
            pace: Pace::default(),
            mode,
            left: [Vec::new(), Vec::new()],
        })
    }

    /// Whether this is the process that has the run folder.
    pub fn leads(&self) -> bool {
        self.link.rank() == 0
    }

    /// This process's number.
    pub fn rank(&self) -> usize {
        self.link.rank()
    }

    /// The end, when all processes have come to it; waits for them.
    pub fn leave(mut self) {
        self.link.leave();
    }

    /// How many processes there are.
    pub fn ranks(&self) -> usize {
        self.link.ranks()
    }

    /// Whether any process was asked to stop, as all of them know after the same batch.
    pub fn interrupted(&self) -> bool {
        self.interrupted
    }

    /// The exchanges so far.
    pub fn traffic(&self) -> Traffic {
        self.traffic
    }

    /// How many of `shards` shards each rank computes.
    pub fn dealt(&self, shards: usize) -> Vec<usize> {
        deal(shards, &self.shares).iter().map(Range::len).collect()
    }

    /// Deals the shards by what each process was measured to compute in a second, where that would save a tenth of the
    /// time.
    fn deal_by_pace(&mut self, shards: usize) -> Result<()> {
        let Pace {
            seconds,
            shards: done,
        } = self.pace;
        let paces = self.gather(bytemuck::cast_slice(&[seconds, done]))?;
        let speeds: Vec<f64> = paces
            .iter()
            .map(|pace| {
                let pace: Vec<f64> = bytemuck::pod_collect_to_vec(pace);
                pace[1] / pace[0]
            })
            .collect();
        // One that had nothing to compute so far has no pace.
        if !speeds.iter().all(|speed| speed.is_finite() && *speed > 0.0) {
            return Ok(());
        }
        let time = |shares: &[f64]| {
            let dealt = deal(shards, shares).into_iter().zip(&speeds);
            let times = dealt.map(|(shards, speed)| shards.len() as f64 / speed);
            times.fold(0.0, f64::max)
        };
        if time(&speeds) < 0.9 * time(&self.shares) {
            self.shares = speeds;
        }
        self.pace = Pace::default();
        Ok(())
    }

    /// What each process gives, in the order of ranks.
    ///
    /// # Errors
    /// As [`Link::swap`].
    pub fn gather(&mut self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        gather(&mut *self.link, own)
    }

    /// What the leader gives; what the others give is of no interest.
    ///
    /// # Errors
    /// As [`Link::swap`].
    pub fn from_leader(&mut self, own: &[u8]) -> Result<Vec<u8>> {
        let own = if self.leads() { own } else { &[] };
        Ok(self.gather(own)?.swap_remove(0))
    }

    /// Gives the engines of all processes the state of the leader's, to the bit.
    ///
    /// # Errors
    /// As [`Link::swap`], or what the device reports.
    pub fn level(&mut self, engine: &mut Engine) -> Result<()> {
        let state = engine.optimizer_state()?;
        let average = engine.average()?;
        let loss_scale = engine.loss_scale()?;
        let mut told = |own: Vec<f32>| -> Result<Vec<f32>> {
            let bytes = self.from_leader(bytemuck::cast_slice(&own))?;
            Ok(bytemuck::pod_collect_to_vec(&bytes))
        };
        let parameters = told(engine.parameters()?)?;
        let running = told(engine.running()?)?;
        let state: Vec<_> = state.into_iter().map(&mut told).collect::<Result<_>>()?;
        let average = match average {
            Some([parameters, running]) => Some([told(parameters)?, told(running)?]),
            None => None,
        };
        let loss_scale = match loss_scale {
            Some(scale) => <[f32; 3]>::try_from(told(scale.to_vec())?).ok(),
            None => None,
        };
        if self.leads() {
            return Ok(());
        }
        engine.set_parameters(&parameters)?;
        engine.set_running(&running)?;
        engine.set_optimizer_state(&state)?;
        if let Some(average) = &average {
            engine.set_average(average)?;
        }
        match loss_scale {
            Some(scale) => engine.set_loss_scale(scale),
            None => Ok(()),
        }
    }

    /// Trains on this process's share of all `rows`, of which each batch has all its shards, and exchanges it. The
    /// metrics of all go through `progress`, as [`Engine::train_epoch`] has it; where that of any process says break,
    /// all stop after the same batch.
    ///
    /// # Errors
    /// As [`Engine::train_shards`]; after an [`Error::Cluster`] the engine is as the last batch left it whose metrics
    /// went through `progress`.
    pub fn train_epoch(
        &mut self,
        engine: &mut Engine,
        order: &[u32],
        rows: &[Step],
        interrupted: &AtomicBool,
        progress: StepProgress,
    ) -> Result<()> {
        let shards = rows.iter().map(|row| row.shards).max().unwrap_or(1);
        self.deal_by_pace(shards as usize)?;
        let own = own_rows(rows, &self.shares, self.link.rank());
        let state = RefCell::new(State::default());
        let mut exchanging = Exchanging {
            link: &mut *self.link,
            lens: self.lens,
            shares: &self.shares,
            state: &state,
            interrupted,
            traffic: &mut self.traffic,
            pace: &mut self.pace,
            mode: self.mode,
            left: &mut self.left,
            since: None,
        };
        engine.train_shards(order, &own, &mut exchanging, &mut |_| {
            let new = std::mem::take(&mut state.borrow_mut().metrics);
            let flow = progress(&new)?;
            let mut state = state.borrow_mut();
            state.wish |= flow.is_break();
            Ok(match state.stops {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            })
        })?;
        self.interrupted |= state.into_inner().interrupted;
        Ok(())
    }
}

/// What an exchange and who hears of it have in common.
#[derive(Default)]
struct State {
    /// Of whole batches, not heard of yet.
    metrics: Vec<Metrics>,
    /// Whether this process wants to stop.
    wish: bool,
    /// Whether all stop after this batch.
    stops: bool,
    interrupted: bool,
}

struct Exchanging<'a> {
    link: &'a mut dyn Link,
    lens: [usize; 2],
    shares: &'a [f64],
    state: &'a RefCell<State>,
    interrupted: &'a AtomicBool,
    traffic: &'a mut Traffic,
    pace: &'a mut Pace,
    mode: Exchanged,
    left: &'a mut [Vec<f32>; 2],
    /// When the batch before was exchanged.
    since: Option<Instant>,
}

/// Words of a message before its metrics.
const HEADER: usize = 1;
const INTERRUPTED: u32 = 1;
const STOP: u32 = 2;

impl Exchange for Exchanging<'_> {
    fn exchange(
        &mut self,
        row: &Step,
        own_nodes: &[[&[f32]; 2]],
        metrics: &[Metrics],
    ) -> Result<[Vec<f32>; 2]> {
        let begin = Instant::now();
        let (rank, ranks, shards) = (self.link.rank(), self.link.ranks(), row.shards as usize);
        let dealt = deal(shards, self.shares);
        let [parameters, running] = self.lens;
        let slabs: Vec<Range<usize>> = (0..ranks)
            .map(|r| {
                let all = parameters + running;
                r * all / ranks..(r + 1) * all / ranks
            })
            .collect();
        let interrupted = self.interrupted.load(Ordering::Relaxed);
        let mut flags = if interrupted { INTERRUPTED } else { 0 };
        if self.state.borrow().wish {
            flags |= STOP;
        }
        // A row that is computed for nothing has metrics, too.
        let metrics = &metrics[..dealt[rank].len()];
        let own: Vec<[Vec<f32>; 2]>;
        let mut own_nodes = own_nodes.to_vec();
        if self.mode != Exchanged::Exact {
            own = added_up(&own_nodes);
            own_nodes = own.iter().map(|[g, r]| [&g[..], &r[..]]).collect();
        }
        let parts: Vec<Vec<u32>> = slabs
            .iter()
            .map(|slab| {
                let len = HEADER + 2 * metrics.len() + own_nodes.len() * slab.len();
                let mut part = Vec::with_capacity(len);
                part.push(flags);
                part.extend_from_slice(bytemuck::cast_slice(metrics));
                for node in &own_nodes {
                    self.pack(0, cut(*node, slab), slab, &mut part);
                }
                part
            })
            .collect();
        let all_nodes: Vec<Vec<Node>> = dealt
            .iter()
            .map(|shards| {
                let mut nodes = nodes(shards.clone());
                if self.mode != Exchanged::Exact {
                    nodes.truncate(1);
                }
                nodes
            })
            .collect();
        let own_slab = &slabs[rank];
        let lens: Vec<usize> = dealt
            .iter()
            .zip(&all_nodes)
            .map(|(shards, nodes)| HEADER + 2 * shards.len() + nodes.len() * self.packed(own_slab))
            .collect();
        let borrowed: Vec<&[u32]> = parts.iter().map(Vec::as_slice).collect();
        let received = self.link.swap(&borrowed, &lens)?;
        let mut sent = words_to_others(&borrowed, rank);

        let mut values: Vec<Cow<[f32]>> = Vec::new();
        let mut state = self.state.borrow_mut();
        for ((message, shards), nodes) in received.iter().zip(&dealt).zip(&all_nodes) {
            state.interrupted |= message[0] & INTERRUPTED != 0;
            state.stops |= message[0] != 0;
            let (metrics, mut rest) = message[HEADER..].split_at(2 * shards.len());
            state
                .metrics
                .extend_from_slice(bytemuck::cast_slice(metrics));
            for _ in nodes {
                let value;
                (value, rest) = self.unpack(rest, own_slab);
                values.push(value);
            }
        }
        drop(state);
        let mut sum = match self.mode {
            Exchanged::Exact => root(shards, &all_nodes.concat(), &|at| &values[at]),
            Exchanged::Fast | Exchanged::Half => {
                let mut values = values.into_iter();
                let mut sum = values.next().unwrap_or_default().into_owned();
                values.for_each(|value| add(&mut sum, &value));
                sum
            }
        };
        let statistics = parameters.saturating_sub(own_slab.start).min(sum.len());
        for value in &mut sum[statistics..] {
            *value = flushed(*value * row.share);
        }

        let mut message = Vec::with_capacity(sum.len());
        let sum = sum.split_at(statistics).into();
        self.pack(1, sum, own_slab, &mut message);
        let borrowed = vec![&message[..]; ranks];
        let lens: Vec<usize> = slabs.iter().map(|slab| self.packed(slab)).collect();
        let sums = self.link.swap(&borrowed, &lens)?;
        sent += words_to_others(&borrowed, rank);
        let mut gradients: Vec<f32> = Vec::with_capacity(parameters + running);
        for (message, slab) in sums.iter().zip(&slabs) {
            gradients.extend_from_slice(&self.unpack(message, slab).0);
        }
        let running = gradients.split_off(parameters);

        let end = Instant::now();
        self.traffic.batches += 1;
        self.traffic.sent += 4 * sent;
        // The first batch may have to be planned or compiled.
        if let Some(since) = self.since.replace(end) {
            let seconds = (begin - since).as_secs_f64();
            self.traffic.computing += seconds;
            self.traffic.exchanging += (end - begin).as_secs_f64();
            self.pace.seconds += seconds;
            // The row that counts for nothing takes its time, too.
            self.pace.shards += dealt[rank].len().max(1) as f64;
        }
        Ok([gradients, running])
    }
}

impl Exchanging<'_> {
    /// How much of a slab is of gradients; the rest is of running statistics.
    fn gradients_in(&self, slab: &Range<usize>) -> usize {
        self.lens[0].clamp(slab.start, slab.end) - slab.start
    }

    /// Words of a slab's numbers in a message.
    fn packed(&self, slab: &Range<usize>) -> usize {
        match self.mode {
            Exchanged::Exact | Exchanged::Fast => slab.len(),
            Exchanged::Half => {
                let gradients = self.gradients_in(slab);
                halves::words(gradients) + slab.len() - gradients
            }
        }
    }

    /// Appends a slab's gradients and running statistics; `which` of what is left over goes with them.
    fn pack(
        &mut self,
        which: usize,
        [gradients, running]: [&[f32]; 2],
        slab: &Range<usize>,
        message: &mut Vec<u32>,
    ) {
        match self.mode {
            Exchanged::Exact | Exchanged::Fast => {
                message.extend_from_slice(bytemuck::cast_slice(gradients));
            }
            Exchanged::Half if gradients.is_empty() => {}
            Exchanged::Half => {
                let left = &mut self.left[which];
                left.resize(self.lens[0], 0.0);
                halves::encode(
                    gradients,
                    &mut left[slab.start..][..gradients.len()],
                    message,
                );
            }
        }
        message.extend_from_slice(bytemuck::cast_slice(running));
    }

    /// A slab's numbers at the beginning of a message, and the rest of that.
    fn unpack<'a>(&self, message: &'a [u32], slab: &Range<usize>) -> (Cow<'a, [f32]>, &'a [u32]) {
        if self.mode != Exchanged::Half {
            let (own, rest) = message.split_at(slab.len());
            return (bytemuck::cast_slice(own).into(), rest);
        }
        let gradients = self.gradients_in(slab);
        let (mut values, rest) = halves::decode(message, gradients);
        let (running, rest) = rest.split_at(slab.len() - gradients);
        values.extend_from_slice(bytemuck::cast_slice(running));
        (values.into(), rest)
    }
}

/// The sum of some nodes, where there are any.
fn added_up(nodes: &[[&[f32]; 2]]) -> Vec<[Vec<f32>; 2]> {
    let Some((first, others)) = nodes.split_first() else {
        return Vec::new();
    };
    let mut sums = first.map(<[f32]>::to_vec);
    for node in others {
        for (sum, node) in sums.iter_mut().zip(node) {
            add(sum, node);
        }
    }
    vec![sums]
}

fn add(sum: &mut [f32], other: &[f32]) {
    sum.iter_mut().zip(other).for_each(|(sum, x)| *sum += x);
}

fn words_to_others(parts: &[&[u32]], rank: usize) -> u64 {
    let others = parts.iter().enumerate().filter(|(r, _)| *r != rank);
    others.map(|(_, part)| part.len() as u64).sum()
}

/// The parts of two vectors on end that lie in `range`.
fn cut<'a>([first, second]: [&'a [f32]; 2], range: &Range<usize>) -> [&'a [f32]; 2] {
    let part = |vector: &'a [f32], from: usize| {
        let at = |x: usize| x.saturating_sub(from).min(vector.len());
        &vector[at(range.start)..at(range.end)]
    };
    [part(first, 0), part(second, first.len())]
}

/// Which shards of a batch each rank computes: on end, by their shares.
fn deal(shards: usize, shares: &[f64]) -> Vec<Range<usize>> {
    let total: f64 = shares.iter().sum();
    let (mut before, mut from) = (0.0, 0);
    let ranges = shares.iter().map(|share| {
        before += share;
        let to = (before / total * shards as f64).round() as usize;
        let range = from..to.clamp(from, shards);
        from = range.end;
        range
    });
    ranges.collect()
}

/// The rows of `rank` among those of all. Of a batch with too few shards it has one that counts for nothing, by which
/// it carries out the update.
fn own_rows(rows: &[Step], shares: &[f64], rank: usize) -> Vec<Step> {
    let mut own = Vec::new();
    let mut first = 0;
    for row in 0..rows.len() {
        if !ends_batch(rows, row) {
            continue;
        }
        let batch = &rows[first..=row];
        first = row + 1;
        let range = deal(batch.len(), shares).swap_remove(rank);
        let first_shard = range.start as u32;
        let none = range.is_empty().then(|| Step {
            micro: batch.len() as u32,
            first_shard: batch.len() as u32,
            ..rows[row]
        });
        own.extend(none);
        own.extend(batch[range].iter().map(|row| Step {
            first_shard,
            ..*row
        }));
    }
    own
}

/// What each process gives, in the order of ranks.
///
/// # Errors
/// As [`Link::swap`].
pub fn gather(link: &mut dyn Link, own: &[u8]) -> Result<Vec<Vec<u8>>> {
    let ranks = link.ranks();
    let len = [own.len() as u32];
    let lens = link.swap(&vec![&len[..]; ranks], &vec![1; ranks])?;
    let lens: Vec<usize> = lens.iter().map(|len| len[0] as usize).collect();
    let mut words = vec![0u32; own.len().div_ceil(4)];
    bytemuck::cast_slice_mut(&mut words)[..own.len()].copy_from_slice(own);
    let in_words: Vec<usize> = lens.iter().map(|len| len.div_ceil(4)).collect();
    let all = link.swap(&vec![&words[..]; ranks], &in_words)?;
    let bytes = all.iter().zip(lens).map(|(words, len)| {
        let bytes: &[u8] = bytemuck::cast_slice(words);
        bytes[..len].to_vec()
    });
    Ok(bytes.collect())
}

/// How long a process waits for the others: longer than any evaluation takes.
pub const PATIENCE: Duration = Duration::from_secs(3600);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_dealt_on_end_by_shares() {
        assert_eq!(deal(8, &[0.25; 4]), [0..2, 2..4, 4..6, 6..8]);
        assert_eq!(deal(8, &[1.0 / 3.0; 3]), [0..3, 3..5, 5..8]);
        assert_eq!(deal(8, &[3.0, 1.0]), [0..6, 6..8]);
        assert_eq!(deal(2, &[1.0; 4]), [0..1, 1..1, 1..2, 2..2]);
        assert_eq!(deal(1, &[1.0; 1]), vec![0..1]);
    }

    #[test]
    fn every_rank_has_a_row_of_every_batch() {
        let batch = |first: usize, shards: u32| -> Vec<Step> {
            (0..shards)
                .map(|micro| Step {
                    micro,
                    shards,
                    ..Step::new(first + micro as usize, 1)
                })
                .collect()
        };
        let rows = [batch(0, 4), batch(4, 1), batch(5, 2)].concat();
        let of = |rank: usize| -> Vec<[u32; 3]> {
            let own = own_rows(&rows, &[1.0; 3], rank);
            own.iter()
                .map(|s| [s.first, s.micro, s.first_shard])
                .collect()
        };
        assert_eq!(of(0), [[0, 0, 0], [4, 1, 1], [5, 0, 0]]);
        assert_eq!(of(1), [[1, 1, 1], [2, 2, 1], [4, 0, 0], [6, 2, 2]]);
        assert_eq!(of(2), [[3, 3, 3], [4, 1, 1], [6, 1, 1]]);
    }

    #[test]
    fn a_slab_is_cut_from_both_vectors() {
        let (first, second) = ([1.0, 2.0, 3.0], [4.0, 5.0]);
        let of = |range: Range<usize>| cut([&first, &second], &range);
        assert_eq!(of(0..2), [&[1.0, 2.0][..], &[]]);
        assert_eq!(of(1..4), [&[2.0, 3.0][..], &[4.0]]);
        assert_eq!(of(4..5), [&[][..], &[5.0]]);
        assert!(of(2..2).concat().is_empty());
    }
}
