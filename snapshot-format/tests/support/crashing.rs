//! A storage that loses power.
//!
//! [`Crashing`] lets a number of steps through and refuses all later ones, cleaning up
//! included, as if the power went. Then it takes away what was not durable, once as much as it
//! may (files in unsynced directories vanish, unsynced files are cut, unsynced renames are
//! undone) and once nothing.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use snapshot_format::{DiskStorage, Storage};

#[derive(Debug)]
pub(crate) struct Crashing {
    root: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    steps: usize,
    allowed: usize,
    /// Steps behind the refused one are let through: an error, not a crash.
    only_one_fails: bool,
    /// Files whose content is durable.
    contents: BTreeSet<PathBuf>,
    /// Files whose name is durable.
    names: BTreeSet<PathBuf>,
    unsynced_renames: Vec<(PathBuf, PathBuf)>,
}

/// All files of all builds and staging directories of a store.
fn files(root: &Path) -> BTreeSet<PathBuf> {
    let entries = |dir: &Path| {
        fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().path())
    };
    entries(root).flat_map(|dir| entries(&dir)).collect()
}

impl Crashing {
    /// Everything in the store so far is durable.
    pub(crate) fn after(root: &Path, allowed: usize, only_one_fails: bool) -> Arc<Self> {
        let state = State {
            allowed,
            only_one_fails,
            contents: files(root),
            names: files(root),
            ..State::default()
        };
        Arc::new(Self {
            root: root.to_owned(),
            state: Mutex::new(state),
        })
    }

    fn step<T>(&self, act: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
        let mut state = self.state.lock().unwrap();
        state.steps += 1;
        let over = state.steps > state.allowed;
        if over && (!state.only_one_fails || state.steps == state.allowed + 1) {
            return Err(io::Error::other("power went"));
        }
        act(&mut state)
    }

    /// Whether all steps were let through.
    pub(crate) fn survived(&self) -> bool {
        let state = self.state.lock().unwrap();
        state.steps <= state.allowed
    }

    /// Takes away what a crash may take away.
    pub(crate) fn lose_unsynced(&self) {
        let state = self.state.lock().unwrap();
        for path in files(&self.root) {
            if !state.names.contains(&path) {
                fs::remove_file(&path).unwrap();
            } else if !state.contents.contains(&path) {
                let file = File::options().write(true).open(&path).unwrap();
                let length = file.metadata().unwrap().len();
                file.set_len(length / 2).unwrap();
            }
        }
        for (from, to) in state.unsynced_renames.iter().rev() {
            // A directory whose removal got as far as its name is gone under both.
            if to.exists() {
                fs::rename(to, from).unwrap();
            }
        }
    }
}

impl Storage for Crashing {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.step(|_| DiskStorage.create_dir(path))
    }

    fn create_file(&self, path: &Path) -> io::Result<File> {
        self.step(|state| {
            state.contents.remove(path);
            DiskStorage.create_file(path)
        })
    }

    fn open_file(&self, path: &Path) -> io::Result<File> {
        self.step(|_| DiskStorage.open_file(path))
    }

    fn write_at(&self, file: &File, path: &Path, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.step(|state| {
            state.contents.remove(path);
            DiskStorage.write_at(file, path, offset, bytes)
        })
    }

    fn sync_file(&self, path: &Path) -> io::Result<()> {
        self.step(|state| {
            state.contents.insert(path.to_owned());
            File::open(path).map(drop)
        })
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.step(|state| {
            let inside = files(&self.root)
                .into_iter()
                .filter(|file| file.parent() == Some(path));
            state.names.extend(inside);
            state
                .unsynced_renames
                .retain(|(from, _)| from.parent() != Some(path));
            File::open(path).map(drop)
        })
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step(|state| {
            DiskStorage.rename(from, to)?;
            let moved = |path: &PathBuf| match path.strip_prefix(from) {
                Ok(name) => to.join(name),
                Err(_) => path.clone(),
            };
            state.contents = state.contents.iter().map(moved).collect();
            state.names = state.names.iter().map(moved).collect();
            state
                .unsynced_renames
                .push((from.to_owned(), to.to_owned()));
            Ok(())
        })
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        self.step(|_| DiskStorage.remove_dir_all(path))
    }
}
