//! A crash at every file-system step of writing and publishing a build.
//!
//! [`Crashing`] lets a number of steps through and refuses all later ones, cleaning up
//! included, as if the power went. Then it takes away what was not durable, once as much as it
//! may (files in unsynced directories vanish, unsynced files are cut, unsynced renames are
//! undone) and once nothing. Either way the store, opened anew, has no new build or the whole
//! one.

mod support;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use snapshot_format::{Build, BuildStore, DiskStorage, FormatError, PageSize, Storage, verify};
use support::{at, content, count, filled, id, info, publish, temp_store};

#[derive(Debug)]
struct Crashing {
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
    fn after(root: &Path, allowed: usize, only_one_fails: bool) -> Arc<Self> {
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
    fn survived(&self) -> bool {
        let state = self.state.lock().unwrap();
        state.steps <= state.allowed
    }

    /// Takes away what a crash may take away.
    fn lose_unsynced(&self) {
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

    fn write_at(&self, file: &File, path: &Path, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.step(|state| {
            state.contents.remove(path);
            DiskStorage.write_at(file, path, offset, bytes)
        })
    }

    fn sync_file(&self, path: &Path) -> io::Result<()> {
        self.step(|state| {
            state.contents.insert(path.to_owned());
            DiskStorage.sync_file(path)
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
            DiskStorage.sync_dir(path)
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

/// Writes and publishes build 2 over a parent.
fn write_diff(store: &BuildStore, parent: &Build) -> Result<(), FormatError> {
    let mut staging = store.stage(id(2))?;
    let mut writer = staging.memory_writer(Some(parent), PageSize::Size4K, count(4))?;
    writer.pages(at(1), &filled(&[7, 0, 8]))?;
    writer.finish()?;
    // A VMM writes past the store.
    fs::write(staging.file_path("vmstate"), "state").unwrap();
    staging.add_file("vmstate")?;
    staging.publish(info())?;
    Ok(())
}

/// After any crash: the parent is whole, and the new build is absent or whole.
fn assert_none_or_whole(store: &BuildStore, step: usize) -> bool {
    assert!(verify(store, &id(1)).is_clean(), "step {step}: parent");
    let listed = store.list().unwrap();
    let visible = listed.contains(&id(2));
    assert_eq!(
        listed.len(),
        1 + usize::from(visible),
        "step {step}: {listed:?}"
    );
    if visible {
        let report = verify(store, &id(2));
        assert!(report.is_clean(), "step {step}: {:?}", report.faults);
        assert_eq!(
            content(&store.open(&id(2)).unwrap()),
            [1, 7, 0, 8],
            "step {step}"
        );
    }
    store.remove_staging().unwrap();
    assert_eq!(store.leftovers().unwrap().len(), 0, "step {step}");
    visible
}

fn with_parent() -> (tempfile::TempDir, BuildStore, Build) {
    let (dir, store) = temp_store();
    let (parent, _) = publish(&store, 1, None, 4, |writer| {
        writer.pages(at(0), &filled(&[1, 2, 3])).unwrap();
    });
    (dir, store, parent)
}

/// Runs `act` with a crash at every step until one run gets through.
fn crash_everywhere(
    prepare: impl Fn(&BuildStore, &Build),
    act: impl Fn(&BuildStore, &Build) -> Result<(), FormatError>,
    visible_at_the_end: bool,
) {
    for loses in [true, false] {
        let mut step = 0;
        loop {
            let (_dir, store, parent) = with_parent();
            prepare(&store, &parent);
            let crashing = Crashing::after(store.root(), step, false);
            let broken = BuildStore::with_storage(store.root(), crashing.clone()).unwrap();
            let result = act(&broken, &parent);
            assert_eq!(result.is_ok(), crashing.survived(), "step {step}");
            if loses {
                crashing.lose_unsynced();
            }
            let visible = assert_none_or_whole(&store, step);
            if result.is_ok() {
                assert_eq!(
                    visible, visible_at_the_end,
                    "what was acknowledged is durable"
                );
                break;
            }
            step += 1;
        }
        assert!(step >= 4, "the storage saw every step");
    }
}

#[test]
fn crash_at_any_step_of_publish_leaves_no_new_build_or_the_whole_one() {
    crash_everywhere(|_, _| (), write_diff, true);
}

#[test]
fn crash_at_any_step_of_remove_leaves_the_whole_build_or_none() {
    let prepare = |store: &BuildStore, parent: &Build| write_diff(store, parent).unwrap();
    crash_everywhere(prepare, |store, _| store.remove(&id(2)), false);
}

#[test]
fn error_at_any_step_of_publish_leaves_no_build_and_no_leftovers() {
    let mut step = 0;
    loop {
        let (_dir, store, parent) = with_parent();
        let failing = Crashing::after(store.root(), step, true);
        let broken = BuildStore::with_storage(store.root(), failing.clone()).unwrap();
        let result = write_diff(&broken, &parent);
        assert_eq!(result.is_ok(), failing.survived(), "step {step}");
        if result.is_ok() {
            break;
        }
        assert_eq!(store.list().unwrap(), [id(1)], "step {step}");
        assert_eq!(store.leftovers().unwrap().len(), 0, "step {step}");
        step += 1;
    }
    assert!(step > 10, "the storage saw every step");
}
