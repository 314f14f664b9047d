//! `wgrad report`: a run, or several of a `--seeds` folder, as a page; and the page that a training
//! leaves behind.

use super::device::Device;
use super::eval::evaluate;
use super::{load_test_data, note, say, say_wrapped, tell};
use crate::cli::ReportArgs;
use std::path::{Path, PathBuf};
use wgrad::data::Dataset;
use wgrad::engine::{Engine, Split};
use wgrad::plan::Options;
use wgrad::report::page::{self, PAGE, Tested};
use wgrad::train::{Run, SeedsRecord, Weights};
use wgrad::{Error, Result, tune};

pub fn run(args: &ReportArgs) -> Result<()> {
    let folders = run_folders(&args.run)?;
    let runs: Vec<Run> = folders
        .iter()
        .map(|f| Run::open(f))
        .collect::<Result<_>>()?;
    let several = runs.len() > 1;
    let mut device = None;
    for run in &runs {
        let folder = match (&args.out, run.folder().file_name()) {
            (Some(out), Some(name)) if several => out.join(name),
            (Some(out), _) => out.clone(),
            (None, _) => run.folder().into(),
        };
        std::fs::create_dir_all(&folder).map_err(|e| Error::io("create", &folder, e))?;
        let tested = match test_images(run, args)? {
            Ok((test, doubt)) => {
                if device.is_none() {
                    let opened = Device::open(args.device.requested())?;
                    opened.notice().map_or(Ok(()), note)?;
                    device = Some(opened);
                }
                let device = device.as_ref().expect("it was opened");
                let tested = tested(run, device, test.images, &test.labels)?;
                Ok(Tested {
                    files: test.files,
                    note: doubt,
                    ..tested
                })
            }
            Err(why) => {
                note(&format!("note     {why}"))?;
                Err(why)
            }
        };
        page::write(run, tested.as_ref().map_err(String::as_str), &folder)?;
        say(&format!("report   {}", folder.join(PAGE).display()))?;
    }
    Ok(())
}

/// The page of a run that was just trained by `engine`, which has its test images with these labels, of these
/// files; says why it is not there, if so.
pub(super) fn after_training(
    run: &Run,
    device: &Device,
    mut engine: Engine,
    labels: &[u32],
    files: Vec<String>,
) -> Result<()> {
    let images = engine.take_images(Split::Test);
    // Two of them at a time may be more than there is room for.
    drop(engine);
    let written = images
        .and_then(|images| tested(run, device, images, labels))
        .and_then(|tested| page::write(run, Ok(&Tested { files, ..tested }), run.folder()));
    let folder = run.folder();
    match written {
        Ok(()) => Ok(()),
        // The training is done all the same.
        Err(e) => say_wrapped(&format!(
            "report   not written: {e}; to try again: wgrad report {}",
            folder.display()
        )),
    }
}

/// The page of a training that ended early, without what its test images would show: whoever ends one does not
/// want to wait for them.
pub(super) fn ended_early(run: &Run, how: &str) -> Result<()> {
    let folder = run.folder();
    let why = format!(
        "The training ended early: {how}. What the test images show is left out; where there are weights, wgrad report {} has that too.",
        folder.display()
    );
    match page::write(run, Err(&why), folder) {
        Ok(()) => tell(&format!("report   {}", folder.join(PAGE).display())),
        Err(e) => say_wrapped(&format!("report   not written: {e}")),
    }
}

/// The run folders that a path stands for: itself, or those of several seeds in it.
pub(super) fn run_folders(path: &Path) -> Result<Vec<PathBuf>> {
    let Some(record) = SeedsRecord::read(path)? else {
        return Ok(vec![path.into()]);
    };
    let folders = record
        .seeds
        .iter()
        .map(|seed| SeedsRecord::folder(path, *seed));
    let begun: Vec<PathBuf> = folders.filter(|f| f.join("run.json").exists()).collect();
    match begun.is_empty() {
        true => Err(Error::checkpoint(
            path,
            "expected the run of a first seed, found none; train again",
        )),
        false => Ok(begun),
    }
}

/// The test images of a run with what there is to say about them, or a sentence about why there are none.
///
/// # Errors
/// What is wrong with data that were asked for.
fn test_images(
    run: &Run,
    args: &ReportArgs,
) -> Result<std::result::Result<(Dataset, Option<String>), String>> {
    let config = run.config();
    let folder = run.folder().display();
    if let Err(e) = run.weights_of(Weights::Last) {
        return Ok(Err(format!("There are no weights to test yet: {e}.")));
    }
    let cache = tune::cache_folder().filter(|_| !args.no_cache);
    let source = args.data.as_deref();
    let loaded = load_test_data(source, config, cache);
    let test = match (loaded, source) {
        (Ok((test, _)), _) => test,
        (Err(e), Some(_)) => return Err(e),
        (Err(e), None) => {
            return Ok(Err(format!(
                "What the test images show is left out, since they cannot be read ({e}); name the place where they are now: wgrad report {folder} --data DIR."
            )));
        }
    };
    let named = source.unwrap_or(&config.data.source);
    let own = match &config.data.test_sha256 {
        Some(hash) => *hash == test.sha256(),
        // Of a format from before there were hashes.
        None => test.len() == config.data.test_images,
    };
    let fits = run.expect_data(named, &test);
    Ok(match (fits, own, source) {
        (Ok(()), true, _) => Ok((test, None)),
        (Ok(()), false, Some(named)) => {
            let note = format!(
                "The test images are those of {named}, not the ones that the run was tested on: they may be of those that it was trained on, and figures of the last epoch differ."
            );
            Ok((test, Some(note)))
        }
        (Err(e), _, Some(_)) => return Err(e),
        (_, _, None) => Err(format!(
            "What the test images show is left out, since {named} does not hold those that the run was tested on any more; name the place where they are now: wgrad report {folder} --data DIR."
        )),
    })
}

/// What the last weights of a run say of these images.
fn tested(run: &Run, device: &Device, images: Vec<u8>, labels: &[u32]) -> Result<Tested> {
    let options = Options {
        keep_logits: true,
        ..Options::default()
    };
    let (member, mut engine) = evaluate(run, Weights::Last, device, images, labels, &options)?;
    Ok(Tested {
        images: engine.take_images(Split::Test)?,
        labels: labels.to_vec(),
        predictions: member.predictions,
        shares: member.shares,
        files: Vec::new(),
        note: None,
    })
}
