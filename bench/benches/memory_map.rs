//! `MemoryMap`: opening one, and finding a page in it, over the number of extents and the
//! depth of the chain. Pure parts: no fault, no disk (the map is in the page cache).
//!
//! Depth 1 is a base whose pages alternate between content and zero. The deep chain spreads the
//! same number of extents over 64 generations, so that no two neighbours come from one
//! build. Maps are flattened, so depth should not show in a lookup, only the size of the map.

#[path = "../src/workload/format/hollow.rs"]
mod hollow;

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput};
use snapshot_format::{MemoryMap, PageIndex, file_name};

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
    let store = hollow::store(root)?;
    // Of a single generation, every other page; of several, every page by turns.
    let changes = |generation| {
        let pages = (0..extents).filter(move |page| page % depth.max(2) == generation);
        pages.map(|page| (page, 1)).collect()
    };
    let generations: Vec<hollow::Generation> = (0..depth).map(changes).collect();
    hollow::write_chain(&store, extents, &generations, &mut |_| ())?;
    let last = hollow::id(generations.len() - 1);
    Ok(store.path(&last).join(file_name::MAP))
}
