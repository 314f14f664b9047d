//! Several processes that train one network together. Each computes some of the shards of every batch
//! ([`crate::model::recipe::Recipe::shards`]), on end, then they exchange the sums, and all carry out the same
//! update. The sums are made by one tree, whoever computes what, so the bits depend neither on how many processes
//! there are nor on how the shards are dealt.
//!
//! ```text
//! rank 0: shards 0–2 ─► nodes ─┐            ┌─► sum of part 0 ─┐            ┌─► update
//! rank 1: shards 3–5 ─► nodes ─┼─ parts of ─┼─► sum of part 1 ─┼─ all parts ┼─► update
//! rank 2: shards 6–7 ─► nodes ─┘  all nodes └─► sum of part 2 ─┘            └─► update
//! ```
//!
//! So each process sends its nodes once and the sum once, however many there are. That is done for one slab of the
//! gradients after the other ([`crate::plan::Plan::slabs`]), while the backward pass of the last shard goes on. Rank 0, the leader, has the run
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
    /// Those that the times are of: not the first of an epoch, which may have to be planned or compiled.
    pub timed: u64,
    /// Seconds from one batch's update until the device was through with the next.
    pub computing: f64,
    /// Seconds in exchanges, waiting for slower ranks included; some of them go on while the device computes.
    pub exchanging: f64,
    /// Seconds from when the device was through to the update.
    pub waiting: f64,
}

impl Traffic {
    /// Of some of these seconds those of a batch.
    pub fn per_batch(&self, seconds: f64) -> f64 {
        seconds / self.timed.max(1) as f64
    }

    /// Share of the time in which the device had to wait for an exchange.
    pub fn share(&self) -> f64 {
        self.waiting / (self.computing + self.waiting).max(f64::MIN_POSITIVE)
    }
}

/// This process among the others.
pub struct Cluster {
    link: Box<dyn Link>,
    parameters: usize,
    /// Shares of a batch that the ranks compute.
    shares: Vec<f64>,
    /// Shards that each was last measured to compute in a second; 0 before.
    speeds: Vec<f64>,
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
            parameters: model.parameter_elements,
            shares: vec![1.0 / ranks as f64; ranks],
            speeds: vec![0.0; ranks],
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
        for (speed, pace) in self.speeds.iter_mut().zip(paces) {
            let pace: Vec<f64> = bytemuck::pod_collect_to_vec(&pace);
            // One that had nothing to compute keeps the speed that it had.
            if pace[0] > 0.0 && pace[1] > 0.0 {
                *speed = pace[1] / pace[0];
            }
        }
        let speeds = self.speeds.clone();
        if speeds.contains(&0.0) {
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
            parameters: self.parameters,
            shares: &self.shares,
            state: &state,
            interrupted,
            traffic: &mut self.traffic,
            pace: &mut self.pace,
            mode: self.mode,
            left: &mut self.left,
            since: None,
            exchanging: 0.0,
            gathering: 0.0,
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
    parameters: usize,
    shares: &'a [f64],
    state: &'a RefCell<State>,
    interrupted: &'a AtomicBool,
    traffic: &'a mut Traffic,
    pace: &'a mut Pace,
    mode: Exchanged,
    left: &'a mut [Vec<f32>; 2],
    /// When the batch before was exchanged.
    since: Option<Instant>,
    /// Seconds in exchanges of the batch at hand, and in those among them that the device waits for before it is
    /// through.
    exchanging: f64,
    gathering: f64,
}

/// Words of a message before its metrics.
const HEADER: usize = 1;
const INTERRUPTED: u32 = 1;
const STOP: u32 = 2;

impl Exchange for Exchanging<'_> {
    fn gradients(
        &mut self,
        row: &Step,
        slab: &Range<usize>,
        nodes: &[Vec<f32>],
    ) -> Result<Vec<f32>> {
        let begin = Instant::now();
        let (rank, ranks) = (self.link.rank(), self.link.ranks());
        let added_up;
        let mut all_nodes = self.all_nodes(row);
        let nodes = match self.mode {
            Exchanged::Exact => nodes,
            Exchanged::Fast | Exchanged::Half => {
                all_nodes.iter_mut().for_each(|nodes| nodes.truncate(1));
                added_up = Vec::from_iter(added(nodes.iter().map(Vec::as_slice)));
                &added_up
            }
        };
        // Each rank adds up a part of the slab.
        let cut = |r: usize| slab.start + r * slab.len() / ranks;
        let parts: Vec<Range<usize>> = (0..ranks).map(|r| cut(r)..cut(r + 1)).collect();
        let messages: Vec<Cow<[u32]>> = parts
            .iter()
            .map(|part| {
                let place = part.start - slab.start..part.end - slab.start;
                match nodes {
                    [node] => self.packed(0, part, &node[place]),
                    nodes => {
                        let nodes = nodes.iter();
                        let words = nodes.flat_map(|node| {
                            self.packed(0, part, &node[place.clone()]).into_owned()
                        });
                        words.collect()
                    }
                }
            })
            .collect();
        let own = &parts[rank];
        let words = self.words(own);
        let lens: Vec<usize> = all_nodes.iter().map(|nodes| nodes.len() * words).collect();
        let received = self.swap(&messages, &lens)?;
        let values = received
            .iter()
            .zip(&all_nodes)
            .flat_map(|(message, nodes)| {
                (0..nodes.len()).map(|node| &message[node * words..][..words])
            });
        let values: Vec<Cow<[f32]>> = values.map(|message| self.unpacked(own, message)).collect();
        let sum = match self.mode {
            Exchanged::Exact => root(row.shards as usize, &all_nodes.concat(), &|at| &values[at]),
            Exchanged::Fast | Exchanged::Half => {
                added(values.iter().map(|value| &value[..])).unwrap_or_default()
            }
        };

        let message = self.packed(1, own, &sum).into_owned();
        let lens: Vec<usize> = parts.iter().map(|part| self.words(part)).collect();
        let received = self.swap(&vec![message.into(); ranks], &lens)?;
        let mut sums = Vec::with_capacity(slab.len());
        for (message, part) in received.iter().zip(&parts) {
            sums.extend_from_slice(&self.unpacked(part, message));
        }
        self.exchanging += begin.elapsed().as_secs_f64();
        Ok(sums)
    }

    fn rows(&mut self, row: &Step, len: usize, own: &[f32]) -> Result<Vec<f32>> {
        let begin = Instant::now();
        let dealt = deal(row.shards as usize, self.shares);
        let lens: Vec<usize> = dealt.iter().map(|shards| shards.len() * len).collect();
        let message: Cow<[u32]> = bytemuck::cast_slice(own).into();
        let received = self.swap(&vec![message; dealt.len()], &lens)?;
        self.gathering += begin.elapsed().as_secs_f64();
        Ok(bytemuck::pod_collect_to_vec(&received.concat()))
    }

    fn statistics(
        &mut self,
        row: &Step,
        len: usize,
        nodes: &[Vec<f32>],
        metrics: &[Metrics],
        computed: Instant,
    ) -> Result<Vec<f32>> {
        let begin = Instant::now();
        let (rank, ranks) = (self.link.rank(), self.link.ranks());
        let dealt = deal(row.shards as usize, self.shares);
        let mut flags = match self.interrupted.load(Ordering::Relaxed) {
            true => INTERRUPTED,
            false => 0,
        };
        if self.state.borrow().wish {
            flags |= STOP;
        }
        let mut message = vec![flags];
        // A row that is there for the update alone has none.
        message.extend_from_slice(bytemuck::cast_slice(&metrics[..dealt[rank].len()]));
        for node in nodes {
            message.extend_from_slice(bytemuck::cast_slice(node));
        }
        let all_nodes = self.all_nodes(row);
        let lens: Vec<usize> = dealt
            .iter()
            .zip(&all_nodes)
            .map(|(shards, nodes)| HEADER + 2 * shards.len() + nodes.len() * len)
            .collect();
        let received = self.swap(&vec![message.into(); ranks], &lens)?;
        let mut values: Vec<&[f32]> = Vec::new();
        let mut state = self.state.borrow_mut();
        for ((message, shards), nodes) in received.iter().zip(&dealt).zip(&all_nodes) {
            state.interrupted |= message[0] & INTERRUPTED != 0;
            state.stops |= message[0] != 0;
            let (metrics, rest) = message[HEADER..].split_at(2 * shards.len());
            state
                .metrics
                .extend_from_slice(bytemuck::cast_slice(metrics));
            let rest: &[f32] = bytemuck::cast_slice(rest);
            values.extend((0..nodes.len()).map(|node| &rest[node * len..][..len]));
        }
        drop(state);
        let mut mean = root(row.shards as usize, &all_nodes.concat(), &|at| values[at]);
        for value in &mut mean {
            *value = flushed(*value * row.share);
        }

        let end = Instant::now();
        self.exchanging += (end - begin).as_secs_f64();
        let gathering = std::mem::take(&mut self.gathering);
        let exchanging = std::mem::take(&mut self.exchanging) + gathering;
        self.traffic.batches += 1;
        if let Some(since) = self.since.replace(end) {
            let computing = (computed - since).as_secs_f64() - gathering;
            self.traffic.timed += 1;
            self.traffic.computing += computing;
            self.traffic.exchanging += exchanging;
            self.traffic.waiting += (end - computed).as_secs_f64() + gathering;
            if !dealt[rank].is_empty() {
                self.pace.seconds += computing;
                self.pace.shards += dealt[rank].len() as f64;
            }
        }
        Ok(mean)
    }
}

impl Exchanging<'_> {
    /// The nodes that each rank has of a batch.
    fn all_nodes(&self, row: &Step) -> Vec<Vec<Node>> {
        let dealt = deal(row.shards as usize, self.shares);
        dealt.into_iter().map(nodes).collect()
    }

    fn swap(&mut self, parts: &[Cow<[u32]>], lens: &[usize]) -> Result<Vec<Vec<u32>>> {
        let rank = self.link.rank();
        let parts: Vec<&[u32]> = parts.iter().map(|part| &part[..]).collect();
        let others = parts.iter().enumerate().filter(|(r, _)| *r != rank);
        let sent: u64 = others.map(|(_, part)| 4 * part.len() as u64).sum();
        let received = self.link.swap(&parts, lens)?;
        self.traffic.sent += sent;
        Ok(received)
    }

    /// Words of a part of the gradients in a message.
    fn words(&self, part: &Range<usize>) -> usize {
        match self.mode {
            Exchanged::Exact | Exchanged::Fast => part.len(),
            Exchanged::Half => halves::words(part.len()),
        }
    }

    /// A part of the gradients as it is sent; `which` of what is left over goes with it.
    fn packed<'a>(
        &mut self,
        which: usize,
        part: &Range<usize>,
        values: &'a [f32],
    ) -> Cow<'a, [u32]> {
        match self.mode {
            Exchanged::Exact | Exchanged::Fast => bytemuck::cast_slice(values).into(),
            Exchanged::Half => {
                let left = &mut self.left[which];
                left.resize(self.parameters, 0.0);
                halves::encoded(values, &mut left[part.clone()]).into()
            }
        }
    }

    /// And as it was.
    fn unpacked<'a>(&self, part: &Range<usize>, message: &'a [u32]) -> Cow<'a, [f32]> {
        match self.mode {
            Exchanged::Exact | Exchanged::Fast => bytemuck::cast_slice(message).into(),
            Exchanged::Half => halves::decoded(message, part.len()).into(),
        }
    }
}

/// The sum of vectors, one after the other; `None` of none.
fn added<'a>(mut vectors: impl Iterator<Item = &'a [f32]>) -> Option<Vec<f32>> {
    let first = vectors.next()?.to_vec();
    Some(vectors.fold(first, |mut sum, vector| {
        sum.iter_mut().zip(vector).for_each(|(sum, x)| *sum += x);
        sum
    }))
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
}
