//! The map: opening one, finding a page in it, laying a diff over it. Nothing here reads page
//! data, so the chains have none.

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use snapshot_format::{
    Build, BuildId, BuildStore, EXTENT_BYTES, MemoryMap, PageCount, PageIndex, PageSize, file_name,
};

use super::hollow::{self, Generation};
use crate::config::Format;
use crate::report::parts::{Bound, Part};
use crate::report::ratio::median;
use crate::workload::rounds::interleaved;

/// The deep chain's builds.
const DEPTH: usize = 256;
/// Opened this often for one sample, which is their median.
const OPENS: usize = 9;
/// Lookups that are timed together: a clock reading costs as much as one of them.
const BATCH: usize = 64;
const BATCHES: usize = 1024;

/// Two chains over the same memory with the same number of extents: one build, and many.
pub(crate) struct Chains {
    dir: PathBuf,
    shallow: BuildStore,
    deep: BuildStore,
    memory_pages: u64,
    seed: u64,
}

impl Chains {
    /// Writes them under `dir`.
    pub(crate) fn write(config: &Format, dir: &Path) -> Result<Self> {
        let shallow = hollow::store(&dir.join("shallow"))?;
        let deep = hollow::store(&dir.join("deep"))?;
        let runs = runs(config);
        hollow::write_chain(
            &shallow,
            config.memory_pages,
            std::slice::from_ref(&runs),
            &mut |_| (),
        )?;
        let mut generations: Vec<Generation> = vec![Vec::new(); DEPTH];
        for (number, run) in runs.into_iter().enumerate() {
            // Neighbours come from builds far apart; a prime step meets all of them.
            generations[number * 101 % DEPTH].push(run);
        }
        eprintln!("bench: writing a chain of {DEPTH} builds, for maps to look at");
        hollow::write_chain(&deep, config.memory_pages, &generations, &mut |_| ())?;
        Ok(Self {
            dir: dir.to_owned(),
            shallow,
            deep,
            memory_pages: config.memory_pages,
            seed: config.seed,
        })
    }

    fn map(store: &BuildStore, id: BuildId) -> PathBuf {
        store.path(&id).join(file_name::MAP)
    }

    fn paths(&self) -> [PathBuf; 2] {
        [
            Self::map(&self.shallow, hollow::id(0)),
            Self::map(&self.deep, hollow::id(DEPTH - 1)),
        ]
    }

    /// How long opening and validating takes.
    pub(crate) fn open(&self, rounds: u32) -> Result<Part> {
        let [shallow, deep] = self.paths();
        let map = MemoryMap::open(&shallow)?;
        let other = MemoryMap::open(&deep)?;
        ensure!(map.extent_count() == other.extent_count(), "unequal maps");
        let bytes = map.as_bytes();
        let about = format!(
            "{} extents, {} bytes in the page cache; median of {OPENS}",
            map.extent_count(),
            bytes.len()
        );
        let open = |path: &'_ Path| {
            let path = path.to_owned();
            move || sample_ms(OPENS, || MemoryMap::open(black_box(&path)).map(drop))
        };
        let deep_build = hollow::id(DEPTH - 1);
        let samples = interleaved(
            rounds,
            vec![
                ("depth 1".into(), Box::new(open(&shallow))),
                (format!("depth {DEPTH}"), Box::new(open(&deep))),
                (
                    "checksum of its bytes alone".into(),
                    Box::new(|| {
                        sample_ms(OPENS, || {
                            black_box(crc32c::crc32c(black_box(bytes)));
                            Ok(())
                        })
                    }),
                ),
                (
                    "whole build, depth 1".into(),
                    Box::new(|| sample_ms(OPENS, || self.shallow.open(&hollow::id(0)).map(drop))),
                ),
                (
                    format!("whole build, depth {DEPTH}"),
                    Box::new(|| sample_ms(OPENS, || self.deep.open(&deep_build).map(drop))),
                ),
            ],
        )?;
        let part = Part::new("open", about, "ms", samples)
            .goal("depth 1", Bound::AtMost(1.0))
            .ratio(&format!("depth {DEPTH}"), "depth 1")
            .ratio_goal(Bound::AtMost(1.05))
            .ratio("depth 1", "checksum of its bytes alone");
        Ok(part)
    }

    /// How long finding a random page takes.
    pub(crate) fn lookup(&self, rounds: u32) -> Result<Part> {
        let [shallow, deep] = self.paths();
        let maps = [MemoryMap::open(&shallow)?, MemoryMap::open(&deep)?];
        let mut random = fastrand::Rng::with_seed(self.seed);
        let pages: Vec<PageIndex> = (0..BATCH * BATCHES)
            .map(|_| PageIndex::new(random.u64(..self.memory_pages)))
            .collect();
        let records = maps[0].as_bytes().as_chunks::<EXTENT_BYTES>().0;
        let positions: Vec<usize> = (0..BATCH * BATCHES)
            .map(|_| random.usize(..records.len()))
            .collect();
        let [one, many] = &maps;
        let lookup = |map: &'_ MemoryMap| {
            let batch = |pages: &[PageIndex]| {
                for page in pages {
                    black_box(map.lookup(*page));
                }
            };
            sample_ns(&pages, batch)
        };
        let in_order: Vec<PageIndex> = {
            let first = random.u64(..self.memory_pages / 2);
            let next = |offset: usize| PageIndex::new(first + offset as u64);
            (0..BATCH * BATCHES).map(next).collect()
        };
        let samples = interleaved(
            rounds,
            vec![
                ("depth 1".into(), Box::new(|| Ok(lookup(one)))),
                (format!("depth {DEPTH}"), Box::new(|| Ok(lookup(many)))),
                (
                    "bare read of a random extent".into(),
                    Box::new(|| {
                        Ok(sample_ns(&positions, |batch| {
                            for position in batch {
                                black_box(records[*position]);
                            }
                        }))
                    }),
                ),
                (
                    "cursor, page after page".into(),
                    Box::new(|| {
                        let mut cursor = many.cursor();
                        Ok(sample_ns(&in_order, |batch| {
                            for page in batch {
                                black_box(cursor.lookup(*page));
                            }
                        }))
                    }),
                ),
            ],
        )?;
        let about = format!(
            "random pages among {} extents; median of {BATCHES} batches of {BATCH}",
            one.extent_count()
        );
        let part = Part::new("lookup", about, "ns", samples)
            .goal("depth 1", Bound::AtMost(25.0))
            .ratio(&format!("depth {DEPTH}"), "depth 1")
            .ratio_goal(Bound::AtMost(1.05))
            .ratio("depth 1", "bare read of a random extent");
        Ok(part)
    }

    /// How long the complete map of a diff takes to make and write.
    pub(crate) fn overlay(&self, rounds: u32) -> Result<Part> {
        let parent = self.deep.open(&hollow::id(DEPTH - 1))?;
        let changed = self.memory_pages / 10;
        let written = std::cell::Cell::new(0usize);
        let mut target = 0u128;
        let ours = || {
            target += 1;
            let (ms, extents) = self.lay_over(&parent, changed, target)?;
            written.set(extents);
            Ok(ms)
        };
        // What a map of that size costs without a thought.
        let plain = || {
            let content = vec![1u8; written.get().max(1) * EXTENT_BYTES];
            let started = Instant::now();
            let path = self.dir.join("plain");
            std::fs::write(&path, &content).context("Writing a file of a map's size")?;
            let ms = started.elapsed().as_secs_f64() * 1e3;
            std::fs::remove_file(&path)?;
            Ok(ms)
        };
        let samples = interleaved(
            rounds,
            vec![
                ("map of the diff".into(), Box::new(ours)),
                ("write of as many bytes".into(), Box::new(plain)),
            ],
        )?;
        let about = format!(
            "a diff of {changed} pages in runs over {} extents of {DEPTH} builds: {} extents",
            parent.map().extent_count(),
            written.get()
        );
        Ok(Part::new("overlay", about, "ms", samples)
            .ratio("map of the diff", "write of as many bytes"))
    }

    /// Times the end of a writer that was given its pages before.
    fn lay_over(&self, parent: &Build, changed: u64, target: u128) -> Result<(f64, usize)> {
        /// Pages changed in a row.
        const RUN: u64 = 8;
        let id = BuildId::from_bytes((u128::MAX - target).to_le_bytes());
        let staging = self.deep.stage(id)?;
        let pages = PageCount::new(self.memory_pages);
        let mut writer = staging.memory_writer(Some(parent), PageSize::Size4K, pages)?;
        let content = vec![2; (RUN * 4096) as usize];
        let step = RUN * self.memory_pages / changed;
        for run in 0..changed / RUN {
            writer.pages(PageIndex::new(run * step), &content)?;
        }
        let started = Instant::now();
        let summary = writer.finish()?;
        Ok((started.elapsed().as_secs_f64() * 1e3, summary.extents))
    }
}

/// Single pages of content between zeros of random length: two extents a run.
fn runs(config: &Format) -> Vec<(u64, u64)> {
    let runs = config.extents / 2;
    let each = config.memory_pages / runs;
    let mut random = fastrand::Rng::with_seed(config.seed);
    // Page 0 is zero and the last one isn't, so that runs and gaps are equally many.
    (0..runs)
        .map(|run| {
            (
                run * each
                    + if run + 1 == runs {
                        each - 1
                    } else {
                        random.u64(1..each - 1)
                    },
                1,
            )
        })
        .collect()
}

/// The median of several times, in milliseconds.
fn sample_ms(
    times: usize,
    mut work: impl FnMut() -> Result<(), snapshot_format::FormatError>,
) -> Result<f64> {
    let mut all = Vec::with_capacity(times);
    for _ in 0..times {
        let started = Instant::now();
        work()?;
        all.push(started.elapsed().as_secs_f64() * 1e3);
    }
    Ok(median(&all))
}

/// The median over batches of the time per item, in nanoseconds.
fn sample_ns<T>(items: &[T], mut batch: impl FnMut(&[T])) -> f64 {
    let all: Vec<f64> = items
        .chunks_exact(BATCH)
        .map(|items| {
            let started = Instant::now();
            batch(items);
            started.elapsed().as_nanos() as f64 / BATCH as f64
        })
        .collect();
    median(&all)
}
