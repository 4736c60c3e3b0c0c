//! What the kernel's notices mean: which directories are watched, and what a client is told. Pure.
//!
//! - A rename is told as RENAME of the old name followed by CREATE of the new one; its two notices
//!   have a cookie in common. A directory that moves within the tree keeps its watches under its
//!   new name. One that has left, because no second notice came, loses them.
//! - A directory that appears is watched from then on, and what is in it by then is told as
//!   created. The kernel may have noticed some of that as well: it is told once.
//! - A file under a [hidden] name isn't told of. When it is renamed over its final name, that is
//!   told as CREATE and WRITE, or as WRITE of a file that was there.

use std::collections::{HashMap, HashSet};

use crate::filesystem::hidden::{self, Replaces};
use crate::proto::filesystem::EventType;

/// What happened to a name, in one of the kernel's notices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    Created,
    Modified,
    Attributes,
    Deleted,
    /// First notice of a rename, with its cookie.
    MovedFrom(u32),
    /// Second notice of a rename, with its cookie.
    MovedTo(u32),
}

/// One of the kernel's notices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Notice {
    /// The watched directory.
    pub(super) watch: i32,
    pub(super) what: What,
    pub(super) name: String,
    pub(super) is_directory: bool,
}

/// What is to be done about a notice, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Action {
    /// Tell the client: a change, and a path below the root of the watch.
    Tell(EventType, String),
    /// Watch the directory of this path, and report what is in it.
    Watch(String),
    /// Watch it no longer.
    Unwatch(i32),
}

/// The directories that are watched.
#[derive(Debug, Default)]
pub(super) struct Tree {
    recursive: bool,
    /// Path of each watched directory below the root; the root's own is empty.
    paths: HashMap<i32, String>,
    /// Directories that were moved away, and perhaps to somewhere here: cookie and old path.
    leaving: Vec<(u32, String)>,
    /// Hidden files on the way to their final names.
    arriving: HashMap<u32, Replaces>,
    /// Told as created when their directory was read, so not again.
    told: HashSet<(i32, String)>,
    told_before: HashSet<(i32, String)>,
}

impl Tree {
    /// A tree of which only the root is watched so far.
    pub(super) fn new(root: i32, recursive: bool) -> Tree {
        Tree {
            recursive,
            paths: HashMap::from([(root, String::new())]),
            ..Tree::default()
        }
    }

    /// How many directories are watched.
    pub(super) fn len(&self) -> usize {
        self.paths.len()
    }

    /// The kernel watches the directory of this path under this number.
    pub(super) fn watched(&mut self, watch: i32, path: &str) {
        self.paths.insert(watch, path.to_owned());
    }

    /// The kernel has ended a watch, as it does when the directory is gone.
    pub(super) fn ended(&mut self, watch: i32) {
        self.paths.remove(&watch);
    }

    /// Something that was there when its directory, new here, was read.
    pub(super) fn found(&mut self, watch: i32, name: &str, is_directory: bool) -> Vec<Action> {
        let Some(path) = self.path_of(watch, name) else {
            return Vec::new();
        };
        if hidden::meaning(name).is_some() {
            return Vec::new();
        }
        self.told.insert((watch, name.to_owned()));
        let mut actions = vec![Action::Tell(EventType::EVENT_TYPE_CREATE, path.clone())];
        if is_directory {
            actions.push(Action::Watch(path));
        }
        actions
    }

    /// What a notice calls for.
    pub(super) fn notice(&mut self, notice: &Notice) -> Vec<Action> {
        use EventType::{
            EVENT_TYPE_CHMOD as CHMOD, EVENT_TYPE_CREATE as CREATE, EVENT_TYPE_REMOVE as REMOVE,
            EVENT_TYPE_RENAME as RENAME, EVENT_TYPE_WRITE as WRITE,
        };
        let Some(path) = self.path_of(notice.watch, &notice.name) else {
            return Vec::new();
        };
        if let Some(replaces) = hidden::meaning(&notice.name) {
            if let What::MovedFrom(cookie) = notice.what {
                self.arriving.insert(cookie, replaces);
            }
            return Vec::new();
        }
        let tell = |event| vec![Action::Tell(event, path.clone())];
        match notice.what {
            What::Created => {
                let key = (notice.watch, notice.name.clone());
                if self.told.remove(&key) || self.told_before.remove(&key) {
                    return Vec::new();
                }
                self.appeared(path, notice.is_directory)
            }
            What::Modified => tell(WRITE),
            What::Attributes => tell(CHMOD),
            What::Deleted => tell(REMOVE),
            What::MovedFrom(cookie) => {
                if notice.is_directory && self.recursive {
                    self.leaving.push((cookie, path.clone()));
                }
                tell(RENAME)
            }
            What::MovedTo(cookie) => match self.arriving.remove(&cookie) {
                Some(Replaces::File) => tell(WRITE),
                Some(Replaces::Nothing) => {
                    let mut actions = self.appeared(path.clone(), notice.is_directory);
                    actions.insert(1, Action::Tell(WRITE, path));
                    actions
                }
                None => {
                    let left = self.leaving.iter().position(|(other, _)| *other == cookie);
                    let Some(at) = left else {
                        return self.appeared(path, notice.is_directory);
                    };
                    let (_, old) = self.leaving.swap_remove(at);
                    self.rename(&old, &path);
                    tell(CREATE)
                }
            },
        }
    }

    /// Whether a directory was moved away, and it isn't known whereto.
    pub(super) fn is_unsettled(&self) -> bool {
        !self.leaving.is_empty()
    }

    /// The second notices of renames would have come by now: what left is gone.
    pub(super) fn settle(&mut self) -> Vec<Action> {
        let gone = std::mem::take(&mut self.leaving);
        self.arriving.clear();
        let is_gone = |path: &str| gone.iter().any(|(_, root)| is_within(path, root));
        let watches: Vec<i32> = self
            .paths
            .iter()
            .filter(|(_, path)| is_gone(path))
            .map(|(watch, _)| *watch)
            .collect();
        for watch in &watches {
            self.paths.remove(watch);
        }
        watches.into_iter().map(Action::Unwatch).collect()
    }

    /// All notices that the kernel had are taken: what was found before them came among them.
    pub(super) fn caught_up(&mut self) {
        self.told_before = std::mem::take(&mut self.told);
    }

    fn appeared(&self, path: String, is_directory: bool) -> Vec<Action> {
        let mut actions = vec![Action::Tell(EventType::EVENT_TYPE_CREATE, path.clone())];
        if is_directory && self.recursive {
            actions.push(Action::Watch(path));
        }
        actions
    }

    fn rename(&mut self, old: &str, new: &str) {
        for path in self.paths.values_mut() {
            if is_within(path, old) {
                *path = format!("{new}{}", &path[old.len()..]);
            }
        }
    }

    fn path_of(&self, watch: i32, name: &str) -> Option<String> {
        let directory = self.paths.get(&watch)?;
        Some(match directory.as_str() {
            "" => name.to_owned(),
            directory => format!("{directory}/{name}"),
        })
    }
}

/// Whether a path is `root`, or below it.
fn is_within(path: &str, root: &str) -> bool {
    path.strip_prefix(root)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: i32 = 1;

    fn notice(watch: i32, what: What, name: &str, is_directory: bool) -> Notice {
        Notice {
            watch,
            what,
            name: name.to_owned(),
            is_directory,
        }
    }

    fn tell(event: EventType, path: &str) -> Action {
        Action::Tell(event, path.to_owned())
    }

    use EventType::{
        EVENT_TYPE_CREATE as CREATE, EVENT_TYPE_REMOVE as REMOVE, EVENT_TYPE_RENAME as RENAME,
        EVENT_TYPE_WRITE as WRITE,
    };

    #[test]
    fn new_directories_are_watched_only_in_a_recursive_tree() {
        let created = notice(ROOT, What::Created, "new", true);
        let mut flat = Tree::new(ROOT, false);
        assert_eq!(flat.notice(&created), [tell(CREATE, "new")]);
        let mut deep = Tree::new(ROOT, true);
        let actions = [tell(CREATE, "new"), Action::Watch("new".to_owned())];
        assert_eq!(deep.notice(&created), actions);
        deep.watched(2, "new");
        let inside = notice(2, What::Deleted, "file", false);
        assert_eq!(deep.notice(&inside), [tell(REMOVE, "new/file")]);
        deep.ended(2);
        assert_eq!(deep.notice(&inside), []);
    }

    #[test]
    fn what_was_found_is_not_told_again() {
        let mut tree = Tree::new(ROOT, true);
        tree.watched(2, "new");
        let told = [tell(CREATE, "new/sub"), Action::Watch("new/sub".to_owned())];
        assert_eq!(tree.found(2, "sub", true), told);
        tree.caught_up();
        let again = notice(2, What::Created, "sub", true);
        assert_eq!(tree.notice(&again), [], "noticed while it was being found");
        tree.caught_up();
        assert_eq!(tree.notice(&again).len(), 2, "a later one is another one");
        // And one that was found but never noticed isn't remembered for ever.
        tree.found(2, "other", false);
        tree.caught_up();
        tree.caught_up();
        assert_eq!(
            tree.notice(&notice(2, What::Created, "other", false)).len(),
            1
        );
    }

    #[test]
    fn directory_that_moves_within_the_tree_keeps_its_watches() {
        let mut tree = Tree::new(ROOT, true);
        for (watch, path) in [(2, "a"), (3, "a/sub"), (4, "ab")] {
            tree.watched(watch, path);
        }
        let from = notice(ROOT, What::MovedFrom(9), "a", true);
        assert_eq!(tree.notice(&from), [tell(RENAME, "a")]);
        assert!(tree.is_unsettled());
        let to = notice(4, What::MovedTo(9), "b", true);
        assert_eq!(tree.notice(&to), [tell(CREATE, "ab/b")]);
        assert!(!tree.is_unsettled() && tree.settle().is_empty());
        let inside = notice(3, What::Modified, "file", false);
        assert_eq!(tree.notice(&inside), [tell(WRITE, "ab/b/sub/file")]);
    }

    #[test]
    fn directory_that_leaves_loses_its_watches_and_one_that_arrives_gets_some() {
        let mut tree = Tree::new(ROOT, true);
        tree.watched(2, "a");
        tree.watched(3, "a/sub");
        tree.notice(&notice(ROOT, What::MovedFrom(9), "a", true));
        let mut unwatched = tree.settle();
        unwatched.sort_by_key(|action| format!("{action:?}"));
        assert_eq!(unwatched, [Action::Unwatch(2), Action::Unwatch(3)]);
        assert_eq!(tree.notice(&notice(2, What::Modified, "x", false)), []);
        let arrived = notice(ROOT, What::MovedTo(10), "b", true);
        assert_eq!(
            tree.notice(&arrived),
            [tell(CREATE, "b"), Action::Watch("b".to_owned())]
        );
    }

    #[test]
    fn hidden_files_are_told_of_under_their_final_name() {
        for (replaces, told) in [
            (
                Replaces::Nothing,
                vec![tell(CREATE, "file"), tell(WRITE, "file")],
            ),
            (Replaces::File, vec![tell(WRITE, "file")]),
        ] {
            let mut tree = Tree::new(ROOT, false);
            let name = hidden::name(replaces);
            for what in [
                What::Created,
                What::Modified,
                What::Attributes,
                What::MovedFrom(3),
            ] {
                assert_eq!(tree.notice(&notice(ROOT, what, &name, false)), []);
            }
            let arrived = notice(ROOT, What::MovedTo(3), "file", false);
            assert_eq!(tree.notice(&arrived), told);
        }
    }
}
