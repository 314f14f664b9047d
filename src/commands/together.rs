//! Training in several processes, which a launcher of MPI started: `mpirun -n 4 wgrad train …`.

use super::signals::Signals;
use std::sync::OnceLock;
use wgrad::gpu::{AdapterReport, adapters};
use wgrad::model::recipe::Recipe;
use wgrad::{Error, Result};

#[cfg(feature = "mpi")]
use wgrad::cluster::{Link, Mpi, gather};

/// Where this process stands among those that train together.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub rank: usize,
    pub ranks: usize,
    /// Among those on this machine.
    local_rank: usize,
}

static PLACE: OnceLock<Place> = OnceLock::new();

/// The place, where there are several processes.
pub(super) fn place() -> Option<Place> {
    PLACE.get().copied()
}

/// Whether another process speaks, and has the run folder.
pub(super) fn follows() -> bool {
    place().is_some_and(|place| place.rank > 0)
}

/// Rank and number of ranks as launchers tell them: Open MPI; MPICH, Intel MPI and Slurm; MVAPICH.
fn launched() -> Option<[usize; 2]> {
    let number = |name: &str| std::env::var(name).ok()?.parse().ok();
    [
        ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"],
        ["PMI_RANK", "PMI_SIZE"],
        ["MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"],
    ]
    .into_iter()
    .find_map(|[rank, size]| Some([number(rank)?, number(size)?]))
}

/// The link to the others; `None` where this process is alone.
///
/// # Errors
/// What keeps it from being made.
#[cfg(feature = "mpi")]
pub(super) fn join(signals: &Signals) -> Result<Option<Box<dyn Link>>> {
    if launched().is_none_or(|[_, ranks]| ranks <= 1) {
        return Ok(None);
    }
    let mut link = Mpi::start(signals.flag())?;
    let host = Mpi::host();
    let hosts = gather(&mut link, host.as_bytes())?;
    let (rank, ranks) = (link.rank(), link.ranks());
    let before = hosts[..rank].iter();
    PLACE.get_or_init(|| Place {
        rank,
        ranks,
        local_rank: before.filter(|other| **other == host.as_bytes()).count(),
    });
    Ok(Some(Box::new(link)))
}

/// Makes sure that this process is alone: each of several would train the same by itself.
///
/// # Errors
/// [`Error::Usage`] where it is not.
#[cfg(not(feature = "mpi"))]
pub(super) fn join(_: &Signals) -> Result<Option<Box<dyn wgrad::cluster::Link>>> {
    match launched() {
        Some([0, ranks]) if ranks > 1 => Err(Error::Usage(format!(
            "expected a wgrad that was built with MPI for {ranks} ranks, found one without; build it with cargo install wgrad --features mpi, or start it without mpirun"
        ))),
        // One line is enough.
        Some([_, ranks]) if ranks > 1 => std::process::exit(0),
        _ => Ok(None),
    }
}

/// What `--device` means for this process: of several on one machine, each takes the next hardware adapter where no
/// certain one is asked for.
///
/// # Errors
/// As [`adapters`].
pub(super) fn device(requested: &str) -> Result<String> {
    let Some(place) = place().filter(|_| ["auto", "gpu"].contains(&requested)) else {
        return Ok(requested.into());
    };
    let number = number_of(place.local_rank, &adapters()?);
    Ok(number.map_or(requested.into(), |number| number.to_string()))
}

/// The adapter, by its number from 1, that a process takes which has this number among those on its machine: hardware in
/// order, and over again; `None` where there is none.
fn number_of(local_rank: usize, adapters: &[AdapterReport]) -> Option<usize> {
    let mut seen: Vec<&String> = Vec::new();
    let hardware = (1..).zip(adapters).filter(|(_, adapter)| {
        // One GPU that two backends show is one.
        let id = adapter.pci_bus_id.as_ref();
        let again = id.is_some_and(|id| seen.contains(&id));
        seen.extend(id);
        !adapter.software && !again
    });
    let numbers: Vec<usize> = hardware.map(|(number, _)| number).collect();
    numbers.get(local_rank % numbers.len().max(1)).copied()
}

/// Shards where several processes train by a recipe without any.
const SHARDS: usize = 8;

/// Gives the recipe of a new training shards, where it is for several processes and has none; what there is to say
/// about that.
pub(super) fn cut(recipe: &mut Recipe) -> Option<String> {
    let place = place()?;
    if recipe.shards.is_some() {
        return None;
    }
    let parts = recipe.batch_size.div_ceil(recipe.step_batch().max(1));
    let shards = SHARDS.max(place.ranks.next_power_of_two()).max(parts);
    let shards = shards.min(recipe.batch_size.max(1));
    recipe.shards = Some(shards);
    recipe.micro_batch = None;
    Some(format!(
        "shards   {shards} a batch, for {} ranks; the weights depend on them, not on the ranks (--shards {shards} without mpirun gives the same)",
        place.ranks
    ))
}

/// Makes sure that a run can go on in several processes, where there are.
///
/// # Errors
/// [`Error::Usage`] for one whose batches have no shards.
pub(super) fn expect_shards(recipe: &Recipe) -> Result<()> {
    match place() {
        Some(place) if recipe.shards.is_none() => Err(Error::Usage(format!(
            "expected a run whose batches have shards for {} ranks, found one without; go on with it without mpirun, or start a new run",
            place.ranks
        ))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_of_a_machine_take_its_adapters_in_order() {
        let adapter = |software, id: Option<&str>| AdapterReport {
            pci_bus_id: id.map(String::from),
            ..AdapterReport::imagined(software)
        };
        let of = |adapters: &[AdapterReport]| [0, 1, 2, 3].map(|rank| number_of(rank, adapters));
        let (one, two) = (Some("0000:01:00.0"), Some("0000:02:00.0"));
        let both = [
            adapter(false, one),
            adapter(true, None),
            adapter(false, two),
        ];
        assert_eq!(of(&both), [Some(1), Some(3), Some(1), Some(3)]);
        // Shown by two backends.
        let again = [
            adapter(false, one),
            adapter(false, two),
            adapter(false, one),
        ];
        assert_eq!(of(&again), [Some(1), Some(2), Some(1), Some(2)]);
        // Drivers that do not tell where a device is.
        let unknown = [
            adapter(true, None),
            adapter(false, None),
            adapter(false, None),
        ];
        assert_eq!(of(&unknown), [Some(2), Some(3), Some(2), Some(3)]);
        assert_eq!(of(&[adapter(true, one)]), [None; 4]);
        assert_eq!(of(&[]), [None; 4]);
    }
}
