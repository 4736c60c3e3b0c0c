//! `thaw snapshot`: templates, and builds on disk.

use std::path::PathBuf;

use clap::Subcommand;

use super::At;

/// `thaw snapshot …`
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Make a template of a sandbox, and print its name.
    Create(NewSnapshotArgs),
    /// List templates.
    Ls(At),
    /// Remove a template. Sandboxes made of it stay.
    Rm {
        /// Its name.
        name: String,
        /// Which daemon.
        #[command(flatten)]
        at: At,
    },
    /// Show what a build holds.
    Inspect {
        /// Its directory.
        dir: PathBuf,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Compare two builds, page by page. The exit status is 0 if they are the same, 1 if not.
    Diff {
        /// The directory of the build that is compared to.
        from: PathBuf,
        /// The directory of the build that is looked at.
        to: PathBuf,
        /// As JSON, with the pages that changed.
        #[arg(long)]
        json: bool,
    },
    /// Rewrite a build and all it refers to as one build without ancestors, in the same store. An
    /// interrupted merge goes on when it is called again.
    Merge {
        /// The directory of the build whose memory is merged; it stays as it is.
        dir: PathBuf,
        /// The id of the merged build, 32 hexadecimal digits; by default that of an unfinished
        /// merge of the same build, or a new one.
        #[arg(long, value_name = "ID")]
        into: Option<snapshot_format::BuildId>,
        /// How the merged build is stored. Any but `none` makes a build that has to be merged
        /// back before it can be resumed.
        #[arg(long, value_enum, default_value_t = Compression::None)]
        compress: Compression,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Write a build and all builds it needs as one tar stream.
    Export {
        /// Its directory.
        dir: PathBuf,
        /// Where to; standard output by default.
        #[arg(long, short, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Verify and publish the builds of such a stream.
    Import {
        /// The directory of builds to import into.
        store: PathBuf,
        /// Where from; standard input by default.
        #[arg(long, short, value_name = "FILE")]
        input: Option<PathBuf>,
        /// The most that the files of all builds together may have, in MiB.
        #[arg(long, value_name = "MIB", default_value_t = 1 << 20)]
        max_mib: u64,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Read all of a build and compare it with its checksums.
    Verify {
        /// Its directory.
        dir: PathBuf,
        /// Also the builds it refers to.
        #[arg(long)]
        ancestors: bool,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
}

/// How a merged build is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Compression {
    /// As it is served.
    None,
    /// Fast to read again.
    Lz4,
    /// Small.
    Zstd,
}

/// `thaw snapshot create`
#[derive(Debug, clap::Args)]
pub struct NewSnapshotArgs {
    /// The sandbox, which goes on.
    pub sandbox: String,
    /// The template's name; one is made up when absent.
    #[arg(long)]
    pub name: Option<String>,
    /// Which daemon.
    #[command(flatten)]
    pub at: At,
}
