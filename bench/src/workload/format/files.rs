//! Page data: writing a diff, and merging a chain. Both end when everything is durable.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use libc::O_DIRECT;
use snapshot_format::{
    Build, BuildId, BuildStore, MemoryWriter, MergeOptions, MergeOutcome, PageCount, PageIndex,
    PageSize, PublishInfo, Staging, file_name,
};

use crate::aligned::Aligned;
use crate::config::{Format, PAGE_BYTES};
use crate::report::parts::{Bound, Part};
use crate::workload::rounds::interleaved;

/// Builds in the chain that is merged.
const MERGE_DEPTH: usize = 64;
/// What plain writers and copies hand to the kernel at a time.
const IO_BYTES: usize = 1 << 20;

/// A base with content on every page, and a diff's worth of other content.
pub(crate) struct Files {
    store: BuildStore,
    dir: PathBuf,
    base: Build,
    pages: u64,
    /// The whole memory after the diff; every other block of 64 KiB is new.
    memory: Aligned,
    next_id: std::cell::Cell<u128>,
}

/// Pages that change together: 64 KiB.
const BLOCK_PAGES: u64 = 16;

impl Files {
    /// Writes the base under `dir`.
    pub(crate) fn write(config: &Format, dir: &Path) -> Result<Self> {
        let store = BuildStore::open_or_create(&dir.join("files"))?;
        let pages = config.data_pages;
        let mut memory = Aligned::new(in_memory(pages * PAGE_BYTES));
        let mut random = fastrand::Rng::with_seed(config.seed);
        random.fill(memory.bytes_mut());
        let id = BuildId::from_bytes(1u128.to_le_bytes());
        let staging = store.stage(id)?;
        let mut writer = staging.memory_writer(None, PageSize::Size4K, PageCount::new(pages))?;
        writer.pages(PageIndex::new(0), memory.bytes())?;
        writer.finish()?;
        publish(staging)?;
        let base = store.open(&id)?;
        for block in changed_blocks(pages) {
            random.fill(&mut memory.bytes_mut()[block]);
        }
        Ok(Self {
            store,
            dir: dir.to_owned(),
            base,
            pages,
            memory,
            next_id: std::cell::Cell::new(1 << 64),
        })
    }

    fn fresh_id(&self) -> BuildId {
        self.next_id.set(self.next_id.get() + 1);
        BuildId::from_bytes(self.next_id.get().to_le_bytes())
    }

    /// How fast a diff of every other block becomes a durable build.
    pub(crate) fn diff(&self, rounds: u32) -> Result<Part> {
        let bytes: u64 = changed_blocks(self.pages).map(|b| b.len() as u64).sum();
        let plain = |flags: i32| move || Ok(rate(bytes, self.plain_write(flags)?));
        let samples = interleaved(
            rounds,
            vec![
                ("plain O_DIRECT writes".into(), Box::new(plain(O_DIRECT))),
                ("plain writes, fsync".into(), Box::new(plain(0))),
                (
                    "dirty set and pages".into(),
                    Box::new(|| Ok(rate(bytes, self.diff_of_dirty_pages()?))),
                ),
                (
                    "full memory, compared".into(),
                    Box::new(|| Ok(rate(bytes, self.diff_of_full_memory()?))),
                ),
                (
                    "sparse file, adopted".into(),
                    Box::new(|| Ok(rate(bytes, self.diff_of_sparse_file()?))),
                ),
            ],
        )?;
        let about = format!(
            "{} MiB of a memory of {} MiB, in blocks of {} KiB; the parent is compared, sums and \
             map are written, all is durable at the end",
            bytes >> 20,
            (self.pages * PAGE_BYTES) >> 20,
            (BLOCK_PAGES * PAGE_BYTES) >> 10,
        );
        let mut part = Part::new("diff write", about, "MB/s", samples)
            .ratio("dirty set and pages", "plain O_DIRECT writes")
            .ratio_goal(Bound::AtLeast(0.8));
        for ours in ["full memory, compared", "sparse file, adopted"] {
            part = part.ratio(ours, "plain O_DIRECT writes");
        }
        Ok(part)
    }

    /// Seconds for one file of the diff's size from one thread that only writes.
    fn plain_write(&self, flags: i32) -> Result<f64> {
        let path = self.dir.join("plain");
        let started = Instant::now();
        let file = create(&path, flags)?;
        let mut at = 0;
        // As large as the diff, and as aligned as O_DIRECT wants it.
        let half = self.memory.bytes().len() / 2;
        for part in self.memory.bytes()[..half].chunks(IO_BYTES) {
            file.write_all_at(part, at).context("Writing plainly")?;
            at += part.len() as u64;
        }
        file.sync_all().context("Syncing a plain file")?;
        let seconds = started.elapsed().as_secs_f64();
        fs::remove_file(&path)?;
        Ok(seconds)
    }

    fn diff_of_dirty_pages(&self) -> Result<f64> {
        self.diff_with(|writer| {
            for block in changed_blocks(self.pages) {
                let first = PageIndex::new(block.start as u64 / PAGE_BYTES);
                writer.pages(first, &self.memory.bytes()[block])?;
            }
            Ok(())
        })
    }

    fn diff_of_full_memory(&self) -> Result<f64> {
        self.diff_with(|writer| Ok(writer.pages(PageIndex::new(0), self.memory.bytes())?))
    }

    fn diff_with(&self, fill: impl FnOnce(&mut MemoryWriter) -> Result<()>) -> Result<f64> {
        let id = self.fresh_id();
        let started = Instant::now();
        let staging = self.store.stage(id)?;
        let pages = PageCount::new(self.pages);
        let mut writer = staging.memory_writer(Some(&self.base), PageSize::Size4K, pages)?;
        fill(&mut writer)?;
        writer.finish()?;
        publish(staging)?;
        let seconds = started.elapsed().as_secs_f64();
        self.store.remove(&id)?;
        Ok(seconds)
    }

    /// The VMM's own writing counts too: there is no diff without it.
    fn diff_of_sparse_file(&self) -> Result<f64> {
        let id = self.fresh_id();
        let started = Instant::now();
        let staging = self.store.stage(id)?;
        let file = create(&staging.file_path(file_name::DATA), 0)?;
        for block in changed_blocks(self.pages) {
            file.write_all_at(&self.memory.bytes()[block.clone()], block.start as u64)
                .context("Writing as a VMM does")?;
        }
        drop(file);
        let pages = PageCount::new(self.pages);
        MemoryWriter::adopt_sparse(&staging, Some(&self.base), PageSize::Size4K, pages)?;
        publish(staging)?;
        let seconds = started.elapsed().as_secs_f64();
        self.store.remove(&id)?;
        Ok(seconds)
    }

    /// How fast a deep chain becomes one build.
    pub(crate) fn merge(&self, rounds: u32) -> Result<Part> {
        let chain = self.write_chain()?;
        let bytes = self.pages * PAGE_BYTES;
        // The data of a merged build of this chain has exactly these bytes.
        let result = self.dir.join("result");
        fs::write(&result, self.memory.bytes()).context("Writing what is copied")?;
        let copy = |flags: i32| {
            let result = &result;
            move || Ok(rate(bytes, self.plain_copy(result, flags)?))
        };
        let samples = interleaved(
            rounds,
            vec![
                ("plain copy, fsync".into(), Box::new(copy(0))),
                ("plain copy to O_DIRECT".into(), Box::new(copy(O_DIRECT))),
                (
                    "merge".into(),
                    Box::new(|| Ok(rate(bytes, self.merge_once(&chain)?))),
                ),
            ],
        )?;
        fs::remove_file(&result)?;
        let about = format!(
            "{MERGE_DEPTH} builds with {} MiB of referenced pages; every chunk that is read is \
             compared with its sum; all is durable at the end",
            bytes >> 20
        );
        Ok(Part::new("merge", about, "MB/s", samples)
            .ratio("merge", "plain copy, fsync")
            .ratio_goal(Bound::AtLeast(0.7))
            .ratio("merge", "plain copy to O_DIRECT")
            .ratio_goal(Bound::AtLeast(0.7)))
    }

    /// The base, then builds that each replace some blocks, all over the memory.
    fn write_chain(&self) -> Result<Build> {
        let mut parent = self.base.clone();
        let blocks = self.pages / BLOCK_PAGES;
        for generation in 1..MERGE_DEPTH as u64 {
            let id = self.fresh_id();
            let staging = self.store.stage(id)?;
            let pages = PageCount::new(self.pages);
            let mut writer = staging.memory_writer(Some(&parent), PageSize::Size4K, pages)?;
            for block in (0..blocks).filter(|block| block * 37 % MERGE_DEPTH as u64 == generation) {
                let mut content = vec![0; in_memory(BLOCK_PAGES * PAGE_BYTES)];
                fastrand::Rng::with_seed(block).fill(&mut content);
                writer.pages(PageIndex::new(block * BLOCK_PAGES), &content)?;
            }
            writer.finish()?;
            publish(staging)?;
            parent = self.store.open(&id)?;
        }
        Ok(parent)
    }

    fn merge_once(&self, chain: &Build) -> Result<f64> {
        let id = self.fresh_id();
        let (info, options) = (PublishInfo::default(), MergeOptions::default());
        let started = Instant::now();
        let go_on = &mut |_| ControlFlow::Continue(());
        let outcome = self.store.merge(chain, id, info, &options, go_on)?;
        let seconds = started.elapsed().as_secs_f64();
        let MergeOutcome::Published(..) = outcome else {
            bail!("a merge that nobody stopped has stopped");
        };
        self.store.remove(&id)?;
        Ok(seconds)
    }

    fn plain_copy(&self, from: &Path, flags: i32) -> Result<f64> {
        let path = self.dir.join("plain");
        let mut buffer = Aligned::new(IO_BYTES);
        let started = Instant::now();
        let mut source = File::open(from)?;
        let mut target = create(&path, flags)?;
        loop {
            let length = source.read(buffer.bytes_mut()).context("Reading to copy")?;
            if length == 0 {
                break;
            }
            let part = &buffer.bytes()[..length];
            target.write_all(part).context("Writing a copy")?;
        }
        target.sync_all().context("Syncing a copy")?;
        let seconds = started.elapsed().as_secs_f64();
        fs::remove_file(&path)?;
        Ok(seconds)
    }
}

/// Every other block of the memory, in bytes.
fn changed_blocks(pages: u64) -> impl Iterator<Item = std::ops::Range<usize>> {
    let block = BLOCK_PAGES * PAGE_BYTES;
    (0..pages / BLOCK_PAGES)
        .filter(|number| number % 2 == 1)
        .map(move |number| in_memory(number * block)..in_memory((number + 1) * block))
}

fn publish(mut staging: Staging) -> Result<()> {
    fs::write(staging.file_path(file_name::VMSTATE), b"no VMM")?;
    staging.add_file(file_name::VMSTATE)?;
    staging.publish(PublishInfo::default())?;
    Ok(())
}

fn create(path: &Path, flags: i32) -> Result<File> {
    let mut options = File::options();
    options.write(true).create(true).truncate(true);
    options
        .custom_flags(flags)
        .open(path)
        .with_context(|| format!("Creating {}", path.display()))
}

/// In 10^6 bytes per second.
fn rate(bytes: u64, seconds: f64) -> f64 {
    bytes as f64 / 1e6 / seconds
}

fn in_memory(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a bench's memory fits memory")
}
