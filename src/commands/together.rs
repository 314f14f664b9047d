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
    PLACE.get_or_init(|| Place {
        rank,
        ranks,
        local_rank: local_rank(rank, &hosts),
    });
    Ok(Some(Box::new(link)))
}

/// The number of a process among those on its machine, by the names of the machines of all.
#[cfg(any(test, feature = "mpi"))]
fn local_rank(rank: usize, hosts: &[Vec<u8>]) -> usize {
    let before = hosts[..rank].iter();
    before.filter(|host| **host == hosts[rank]).count()
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
    device_of(place(), requested, adapters)
}

fn device_of(
    place: Option<Place>,
    requested: &str,
    adapters: impl FnOnce() -> Result<Vec<AdapterReport>>,
) -> Result<String> {
    let Some(place) = place.filter(|_| ["auto", "gpu"].contains(&requested)) else {
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

    fn adapter(software: bool, id: Option<&str>) -> AdapterReport {
        AdapterReport {
            pci_bus_id: id.map(String::from),
            ..AdapterReport::imagined(software)
        }
    }

    #[test]
    fn ranks_are_counted_on_each_machine() {
        let of = |hosts: &[&str]| -> Vec<usize> {
            let hosts: Vec<Vec<u8>> = hosts.iter().map(|host| host.as_bytes().to_vec()).collect();
            (0..hosts.len())
                .map(|rank| local_rank(rank, &hosts))
                .collect()
        };
        assert_eq!(of(&["a", "a", "b", "b"]), [0, 1, 0, 1]);
        assert_eq!(of(&["a", "b", "a", "b"]), [0, 0, 1, 1]);
        assert_eq!(of(&["a", "aa", "b", "a"]), [0, 0, 0, 1]);
    }

    #[test]
    fn what_is_asked_for_by_name_is_the_same_for_all() {
        let both = || Ok(vec![adapter(false, Some("1")), adapter(false, Some("2"))]);
        let of = |requested: &str, local_rank: usize| {
            let place = Place {
                rank: local_rank,
                ranks: 2,
                local_rank,
            };
            device_of(Some(place), requested, both).unwrap()
        };
        for requested in ["auto", "gpu"] {
            assert_eq!([0, 1].map(|rank| of(requested, rank)), ["1", "2"]);
            assert_eq!(device_of(None, requested, both).unwrap(), requested);
        }
        for requested in ["cpu", "software", "2", "RTX"] {
            assert_eq!([0, 1].map(|rank| of(requested, rank)), [requested; 2]);
        }
        let place = Place {
            rank: 1,
            ranks: 2,
            local_rank: 1,
        };
        let software = || Ok(vec![adapter(true, None)]);
        assert_eq!(device_of(Some(place), "auto", software).unwrap(), "auto");
    }

    #[test]
    fn ranks_of_a_machine_take_its_adapters_in_order() {
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
