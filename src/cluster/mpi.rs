//! The link through the system's MPI library.
//!
//! Every wait is one that can be given up: MPI itself would wait for a process that died for ever, or end this one
//! before it has written its checkpoint.

use super::{Link, PATIENCE};
use crate::error::{Error, Result};
use mpi::environment::{Universe, processor_name};
use mpi::ffi;
use mpi::topology::{Communicator, SimpleCommunicator};
use mpi::traits::AsRaw;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long a process that was asked to stop still waits for the others, of a second: mpirun asks all of them when one
/// died, and ends them a second later.
const GRACE: f64 = 0.3;

/// That of the time which mpirun was told to leave them, see `mpirun --mca odls_base_sigkill_timeout`.
fn grace() -> Duration {
    let told = std::env::var("OMPI_MCA_odls_base_sigkill_timeout");
    let seconds: Option<u32> = told.ok().and_then(|seconds| seconds.parse().ok());
    Duration::from_secs_f64(GRACE * f64::from(seconds.unwrap_or(1).max(1)))
}

/// This process in the world of those that `mpirun` started.
pub struct Mpi {
    /// `None` after the end, and after a failure, when MPI's own end would wait for ever.
    universe: Option<Universe>,
    world: SimpleCommunicator,
    interrupted: Arc<AtomicBool>,
    grace: Duration,
}

impl Mpi {
    /// Joins the others; `interrupted` becomes true when this process is asked to stop.
    ///
    /// # Errors
    /// [`Error::Cluster`] where MPI was started before.
    pub fn start(interrupted: Arc<AtomicBool>) -> Result<Mpi> {
        let started = mpi::initialize_with_threading(mpi::Threading::Funneled);
        let (universe, _) = started.ok_or_else(|| {
            Error::Cluster("expected to start MPI, found it started before".into())
        })?;
        let world = universe.world();
        // SAFETY: the communicator is valid as long as the universe is. Errors come back as codes from here on.
        unsafe { ffi::MPI_Comm_set_errhandler(world.as_raw(), ffi::RSMPI_ERRORS_RETURN) };
        Ok(Mpi {
            universe: Some(universe),
            world,
            interrupted,
            grace: grace(),
        })
    }

    /// The machine's name.
    pub fn host() -> String {
        processor_name().unwrap_or_else(|_| "unknown".into())
    }

    /// Waits for all `requests`, whose memory must stay where it is until then; whether they came to their end.
    fn wait(&self, requests: &mut [ffi::MPI_Request]) -> std::result::Result<(), &'static str> {
        let begin = Instant::now();
        let mut asked: Option<Instant> = None;
        loop {
            let mut done = 0;
            // SAFETY: the requests are those of this process, and as many as are said; statuses are ignored.
            let code = unsafe {
                ffi::MPI_Testall(
                    requests.len() as i32,
                    requests.as_mut_ptr(),
                    &mut done,
                    ffi::RSMPI_STATUSES_IGNORE,
                )
            };
            if code != ffi::MPI_SUCCESS as i32 {
                return Err("an error of MPI");
            }
            if done != 0 {
                return Ok(());
            }
            if self.interrupted.load(Ordering::Relaxed)
                && asked.get_or_insert_with(Instant::now).elapsed() > self.grace
            {
                return Err("none before the signal to stop; a rank died, or all were stopped");
            }
            let waited = begin.elapsed();
            if waited > PATIENCE {
                return Err("none for an hour");
            }
            // Ranks may share a processor; at first an answer is near.
            if waited < Duration::from_millis(1) {
                std::thread::yield_now();
            } else {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    }
}

/// A process that ends without [`Link::leave`] has failed: it ends at once, and mpirun ends the others, which MPI's
/// own end would wait for.
impl Drop for Mpi {
    fn drop(&mut self) {
        std::mem::forget(self.universe.take());
    }
}

impl Link for Mpi {
    fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    fn ranks(&self) -> usize {
        self.world.size() as usize
    }

    fn leave(&mut self) {
        self.universe = None;
    }

    fn swap(&mut self, parts: &[&[u32]], lens: &[usize]) -> Result<Vec<Vec<u32>>> {
        let gone =
            |what: &str| Error::Cluster(format!("expected an answer of all ranks, found {what}"));
        if self.universe.is_none() {
            return Err(gone("one that was lost before"));
        }
        let longest = parts
            .iter()
            .map(|part| part.len())
            .chain(lens.iter().copied());
        let longest = longest.max().unwrap_or(0);
        if i32::try_from(longest).is_err() {
            return Err(Error::Usage(format!(
                "expected messages of at most {} numbers between ranks, found {longest}; use a smaller model",
                i32::MAX
            )));
        }
        let (own, comm) = (self.rank(), self.world.as_raw());
        let mut received: Vec<Vec<u32>> = lens.iter().map(|len| vec![0; *len]).collect();
        received[own].copy_from_slice(parts[own]);
        let mut requests: Vec<ffi::MPI_Request> = Vec::with_capacity(2 * lens.len());
        let mut code = ffi::MPI_SUCCESS as i32;
        let mut post = |result: i32, request| {
            code = code.max(result);
            requests.push(request);
        };
        for (peer, into) in received.iter_mut().enumerate() {
            if peer == own || into.is_empty() {
                continue;
            }
            // SAFETY: a request is a handle, which the call sets.
            let mut request: ffi::MPI_Request = unsafe { ffi::RSMPI_REQUEST_NULL };
            // SAFETY: `into` has room for so many words, and neither moves nor goes before the request is done; where
            // it never is, `received` is given up below.
            let result = unsafe {
                ffi::MPI_Irecv(
                    into.as_mut_ptr().cast(),
                    into.len() as i32,
                    ffi::RSMPI_UINT32_T,
                    peer as i32,
                    0,
                    comm,
                    &mut request,
                )
            };
            post(result, request);
        }
        for (peer, part) in parts.iter().enumerate() {
            if peer == own || part.is_empty() {
                continue;
            }
            // SAFETY: as above.
            let mut request: ffi::MPI_Request = unsafe { ffi::RSMPI_REQUEST_NULL };
            // SAFETY: `part` has so many words, which are only read; it lives until this function ends. Where the
            // request is not done by then, this process makes no further call to MPI, which then sends nothing.
            let result = unsafe {
                ffi::MPI_Isend(
                    part.as_ptr().cast(),
                    part.len() as i32,
                    ffi::RSMPI_UINT32_T,
                    peer as i32,
                    0,
                    comm,
                    &mut request,
                )
            };
            post(result, request);
        }
        let waited = match code == ffi::MPI_SUCCESS as i32 {
            true => self.wait(&mut requests),
            false => Err("an error of MPI"),
        };
        waited.map_err(|what| {
            // Another process may still write there.
            std::mem::forget(std::mem::take(&mut received));
            std::mem::forget(self.universe.take());
            gone(what)
        })?;
        Ok(received)
    }
}
