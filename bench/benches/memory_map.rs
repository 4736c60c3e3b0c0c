//! `MemoryMap`: opening one, and finding a page in it, over the number of extents and the
//! depth of the chain. Pure parts: no fault, no disk (the map is in the page cache).
//!
//! Depth 1 is a base whose pages alternate between content and zero. The deep chain spreads the
//! same number of extents over 64 generations, so that no two neighbours come from one
//! build. Maps are flattened, so depth should not show in a lookup, only the size of the map.

use std::fs::File;
use std::hint::black_box;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput};
use snapshot_format::{
    BuildId, BuildStore, DiskStorage, MemoryMap, PageCount, PageIndex, PageSize, PublishInfo,
    Storage, file_name,
};

const EXTENTS: [u64; 2] = [1_000, 100_000];
const DEEP: u64 = 64;
/// Pages looked up in turn; more than a branch predictor remembers.
const LOOKUPS: usize = 65_536;
const SEED: u64 = 1;

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(3))
        .configure_from_args();
    let dir = tempfile::tempdir().expect("a directory for builds");
    for depth in [1, DEEP] {
        for extents in EXTENTS {
            let root = dir.path().join(format!("{depth}-{extents}"));
            let path = write_chain(&root, depth, extents).expect("a chain to look at");
            measure(&mut criterion, &path, depth, extents);
        }
    }
    criterion.final_summary();
}

fn measure(criterion: &mut Criterion, path: &Path, depth: u64, extents: u64) {
    let map = MemoryMap::open(path).expect("a valid map");
    assert_eq!(map.extent_count() as u64, extents);
    assert_eq!(map.builds().len() as u64, depth);

    let id = BenchmarkId::new(format!("depth-{depth}"), extents);
    let mut group = criterion.benchmark_group("open");
    group.throughput(Throughput::Elements(extents));
    group.bench_function(id.clone(), |bencher| {
        bencher.iter(|| MemoryMap::open(black_box(path)).expect("a valid map"));
    });
    group.finish();

    let mut random = fastrand::Rng::with_seed(SEED);
    let pages: Vec<PageIndex> = (0..LOOKUPS)
        .map(|_| PageIndex::new(random.u64(..map.memory_pages().get())))
        .collect();
    let mut group = criterion.benchmark_group("lookup-random");
    group.throughput(Throughput::Elements(1));
    group.bench_function(id, |bencher| {
        let mut next = pages.iter().cycle();
        bencher.iter(|| map.lookup(*next.next().expect("pages repeat")));
    });
    group.finish();
}

/// Publishes `depth` generations that end with a map of `extents` extents of one page; returns
/// the last map.
fn write_chain(
    root: &Path,
    depth: u64,
    extents: u64,
) -> Result<PathBuf, Box<dyn std::error::Error>> {
    let store = BuildStore::with_storage(root, Arc::new(Hollow))?;
    let mut parent = None;
    let mut map = PathBuf::new();
    for generation in 0..depth {
        let id = BuildId::from_bytes((u128::from(generation) + 1).to_le_bytes());
        let mut staging = store.stage(id)?;
        let mut writer =
            staging.memory_writer(parent.as_ref(), PageSize::Size4K, PageCount::new(extents))?;
        for page in 0..extents {
            // Of a single generation, every other page; of several, every page by turns.
            if page % depth.max(2) == generation {
                writer.pages(PageIndex::new(page), &[1; 4096])?;
            }
        }
        writer.finish()?;
        std::fs::write(staging.file_path(file_name::VMSTATE), b"no VMM")?;
        staging.add_file(file_name::VMSTATE)?;
        map = staging
            .publish(PublishInfo::default())?
            .dir
            .join(file_name::MAP);
        parent = Some(store.open(&id)?);
    }
    Ok(map)
}

/// Keeps the length of page data but not its bytes, and syncs nothing: these maps are looked
/// at, the hundreds of MiB behind them are not.
#[derive(Debug)]
struct Hollow;

impl Storage for Hollow {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        DiskStorage.create_dir(path)
    }

    fn create_file(&self, path: &Path) -> io::Result<File> {
        DiskStorage.create_file(path)
    }

    fn write_at(&self, file: &File, path: &Path, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if path.ends_with(file_name::DATA) {
            return file.set_len(offset + bytes.len() as u64);
        }
        DiskStorage.write_at(file, path, offset, bytes)
    }

    fn sync_file(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }

    fn sync_dir(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        DiskStorage.rename(from, to)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        DiskStorage.remove_dir_all(path)
    }
}
