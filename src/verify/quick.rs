//! A few kernels before a training, so that a driver which computes nonsense is noticed at once.

use super::{cases, product_case, products};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::kernels::conv2d::{Family, Pass};
use crate::model::recipe::Precision;

/// One kernel of each kind that a step consists of: bytes in, products, loss, update.
const KERNELS: [&str; 3] = ["gather_batch", "softmax_cross_entropy", "sgd_update"];

/// Holds a few small kernels against their CPU twins: bytes in, loss and update, and the
/// three passes of a product in the family that `forced` or adapter and precision choose. Takes a fraction of
/// a second; what it leaves open, `wgrad verify` answers.
///
/// # Errors
/// [`Error::Verify`] where one is out of tolerance, [`Error::Usage`] when the adapter cannot run the
/// family, or what the device reports.
pub fn quick(gpu: &Gpu, forced: Option<Family>, precision: Precision) -> Result<()> {
    let adapter = gpu.report();
    let family = Family::select(adapter, forced, precision)?;
    let known = cases::cases();
    let kernels = KERNELS.map(|name| known.iter().position(|case| case.kernel == name));
    let mut known: Vec<_> = known.into_iter().map(Some).collect();
    let mut few: Vec<_> = kernels
        .into_iter()
        .flatten()
        .filter_map(|at| known[at].take())
        .collect();
    let products = products::products(adapter);
    for pass in Pass::ALL {
        let mut fitting = products.iter();
        let fits = fitting.find(|p| p.tile.family() == family && p.pass == pass);
        few.extend(fits.map(|product| product_case(*product)));
    }
    for case in few {
        let outcome = case.run(gpu)?;
        if !outcome.passed {
            return Err(Error::Verify(format!(
                "expected {} to compute on {} what its CPU twin does, found {}; update the driver or choose another --device (`wgrad verify` tells more, --no-check trains all the same)",
                outcome.kernel,
                adapter.name,
                outcome.detail.unwrap_or_default()
            )));
        }
    }
    Ok(())
}
