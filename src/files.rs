//! Files that are replaced in one go, and hashes of what is in them.

use crate::error::{Error, Result};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{BufWriter, ErrorKind, Write};
use std::path::Path;

/// What the name of a half-written neighbour ends in.
const SCRATCH: &str = ".tmp";

/// Replaces the file at `path` by one with these bytes: they are written beside it, synced, and
/// renamed, and the folder is synced. Whenever the machine stops, the old file is there or the new
/// one, whole. A kill leaves a half-written neighbour at most, see [`sweep`].
///
/// # Errors
/// [`Error::Io`]; then the old file is as it was.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    write(path, |file| file.write_all(bytes), None)
}

/// As [`replace`], with what `fill` writes.
///
/// # Errors
/// [`Error::Io`]; then the old file is as it was.
pub(crate) fn replace_by(
    path: &Path,
    fill: impl FnOnce(&mut BufWriter<&mut File>) -> std::io::Result<()>,
) -> Result<()> {
    let fill = |file: &mut File| {
        let mut file = BufWriter::with_capacity(1 << 20, file);
        fill(&mut file)?;
        file.flush()
    };
    write(path, fill, None)
}

/// As [`replace`], but the old file, if there is one, takes the name `kept` first. Whenever the
/// machine stops, it is there under one of its two names.
///
/// # Errors
/// [`Error::Io`]; then the old file is as it was, under one of its two names.
pub(crate) fn replace_keeping(path: &Path, kept: &Path, bytes: &[u8]) -> Result<()> {
    write(path, |file| file.write_all(bytes), Some(kept))
}

fn write(
    path: &Path,
    fill: impl FnOnce(&mut File) -> std::io::Result<()>,
    kept: Option<&Path>,
) -> Result<()> {
    let folder = folder_of(path);
    let attempt = || -> std::io::Result<()> {
        let mut prefix = path.file_name().unwrap_or_default().to_owned();
        prefix.push(".");
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix).suffix(SCRATCH);
        // As any other file, not for the owner alone, as a scratch file is by default.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let mut scratch = builder.tempfile_in(folder)?;
        fill(scratch.as_file_mut())?;
        scratch.as_file().sync_all()?;
        match kept.map(|kept| fs::rename(path, kept)) {
            Some(Err(e)) if e.kind() != ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        scratch.persist(path)?;
        sync(folder)
    };
    attempt().map_err(|e| Error::io("write", path, e))
}

/// Gives the file `from` the name `to` in the same folder, in place of the one that may be there.
///
/// # Errors
/// [`Error::Io`]; then both are as they were.
pub(crate) fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to)
        .and_then(|()| sync(folder_of(to)))
        .map_err(|e| Error::io("replace", to, e))
}

/// Removes the file at `path`.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn remove(path: &Path) -> Result<()> {
    fs::remove_file(path)
        .and_then(|()| sync(folder_of(path)))
        .map_err(|e| Error::io("remove", path, e))
}

/// Removes what kills left half-written beside the files called `names`. Only for a folder in which
/// nobody else writes.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn sweep(folder: &Path, names: &[&str]) -> Result<()> {
    let entries = fs::read_dir(folder).map_err(|e| Error::io("read", folder, e))?;
    for entry in entries {
        let entry = entry.map_err(|e| Error::io("read", folder, e))?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.ends_with(SCRATCH) && names.iter().any(|whole| name.starts_with(whole)) {
            let path = entry.path();
            fs::remove_file(&path).map_err(|e| Error::io("remove", &path, e))?;
        }
    }
    Ok(())
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

/// Makes renames in a folder last.
fn sync(folder: &Path) -> std::io::Result<()> {
    // Other systems cannot open a folder, and make a rename last by themselves.
    if cfg!(unix) {
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}

/// SHA-256 of some pieces in a row, in hexadecimal.
pub(crate) fn sha256<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hash = Sha256::new();
    for piece in pieces {
        hash.update(piece);
    }
    hex(&hash.finalize())
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kill_leaves_nothing_that_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.bin");
        replace(&path, b"first").unwrap();
        for neighbour in ["a.bin.tmp", "a.bin.x7Yz.tmp", "mine.tmp"] {
            fs::write(folder.path().join(neighbour), b"half of someth").unwrap();
        }
        replace(&path, b"2nd").unwrap();
        sweep(folder.path(), &["a.bin", "b.bin"]).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"2nd");
        let left: Vec<_> = fs::read_dir(folder.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(left.len(), 2, "{left:?}");
        assert!(left.contains(&"mine.tmp".into()), "{left:?}");
    }

    #[test]
    #[cfg(unix)]
    fn a_replaced_file_is_as_readable_as_any_other() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (folder.path().join("a"), folder.path().join("b"));
        replace(&a, b"x").unwrap();
        fs::write(&b, b"x").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&a), mode(&b));
    }

    #[test]
    fn a_failed_replacement_names_the_file_and_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("missing").join("a.bin");
        let message = replace(&path, b"x").unwrap_err().to_string();
        assert!(
            message.starts_with("cannot write ") && message.contains("a.bin"),
            "{message}"
        );
        // A folder is in the way.
        let path = folder.path().join("b");
        fs::create_dir_all(path.join("c")).unwrap();
        replace(&path, b"x").unwrap_err();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_old_file_can_be_kept() {
        let folder = tempfile::tempdir().unwrap();
        let [path, kept] = ["a", "a.previous"].map(|name| folder.path().join(name));
        replace_keeping(&path, &kept, b"1").unwrap();
        assert!(!kept.exists());
        for (new, old) in [(b"2", b"1"), (b"3", b"2")] {
            replace_keeping(&path, &kept, new).unwrap();
            assert_eq!(fs::read(&path).unwrap(), new);
            assert_eq!(fs::read(&kept).unwrap(), old);
        }
    }

    #[test]
    fn hashes_are_those_of_sha256sum() {
        // printf abc | sha256sum
        assert_eq!(
            sha256([&b"a"[..], b"bc"]),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }
}
