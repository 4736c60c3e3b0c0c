//! A crash at every file-system step of writing and publishing a build.
//!
//! Whatever the step, the store, opened anew, has no new build or the whole one.

mod support;

use std::fs;

use snapshot_format::{Build, BuildStore, FormatError, PageSize, verify};
use support::crashing::Crashing;
use support::{at, content, count, filled, id, info, publish, temp_store};

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
