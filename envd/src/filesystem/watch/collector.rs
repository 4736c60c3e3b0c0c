//! Watches for clients that ask now and then: each collects changes until it is asked.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::task::AbortHandle;

use super::{Changes, Wanted};
use crate::filesystem::error::FileError;
use crate::proto::filesystem::FilesystemEvent;

/// Most watchers at once.
const MAX_WATCHERS: usize = 256;
/// Most changes that wait in one.
const MAX_CHANGES: usize = 16_384;

/// All of them, by id.
#[derive(Debug, Default)]
pub(crate) struct Collectors(Mutex<HashMap<String, Collector>>);

#[derive(Debug)]
struct Collector {
    collected: Arc<Mutex<Collected>>,
    task: AbortHandle,
}

#[derive(Debug, Default)]
struct Collected {
    changes: VecDeque<FilesystemEvent>,
    /// Why there are no more; told after the changes, and every time from then on.
    ended: Option<FileError>,
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Collectors {
    /// Begins a watch; gives its id.
    pub(in crate::filesystem) async fn create(&self, wanted: Wanted) -> Result<String, FileError> {
        let path = wanted.path.to_string();
        if lock(&self.0).len() >= MAX_WATCHERS {
            return Err(FileError::TooMany {
                path,
                limit: MAX_WATCHERS,
                what: "watchers at once; remove some",
            });
        }
        let changes = super::start(wanted).await?;
        let collected = Arc::<Mutex<Collected>>::default();
        let task = tokio::spawn(collect(changes, Arc::clone(&collected), path));
        let collector = Collector {
            collected,
            task: task.abort_handle(),
        };
        let id = crate::filesystem::hidden::random_id();
        lock(&self.0).insert(id.clone(), collector);
        Ok(id)
    }

    /// What a watch has collected since it was last asked; `None` when there is no such watch.
    pub(in crate::filesystem) fn take(
        &self,
        id: &str,
    ) -> Option<Result<Vec<FilesystemEvent>, FileError>> {
        let collectors = lock(&self.0);
        let mut collected = lock(&collectors.get(id)?.collected);
        Some(match (&collected.ended, collected.changes.is_empty()) {
            (Some(error), true) => Err(error.clone()),
            _ => Ok(collected.changes.drain(..).collect()),
        })
    }

    /// Ends a watch; `false` when there is no such watch.
    pub(in crate::filesystem) fn remove(&self, id: &str) -> bool {
        lock(&self.0).remove(id).is_some()
    }
}

async fn collect(mut changes: Changes, into: Arc<Mutex<Collected>>, path: String) {
    while let Some(change) = changes.recv().await {
        let mut collected = lock(&into);
        match change {
            Ok(_) if collected.changes.len() == MAX_CHANGES => {
                // What was collected is complete; what comes now isn't taken.
                collected.ended = Some(FileError::Lost(path));
                return;
            }
            Ok(change) => collected.changes.push_back(change),
            Err(error) => {
                collected.ended = Some(error);
                return;
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn changes_are_told_once_and_then_why_there_are_no_more() {
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        let collected = Arc::<Mutex<Collected>>::default();
        let task = tokio::spawn(collect(receiver, Arc::clone(&collected), "/x".to_owned()));
        let collectors = Collectors::default();
        let collector = Collector {
            collected,
            task: task.abort_handle(),
        };
        lock(&collectors.0).insert("id".to_owned(), collector);
        for _ in 0..=MAX_CHANGES {
            sender.send(Ok(FilesystemEvent::default())).await.unwrap();
        }
        task.await.unwrap();
        let lost = FileError::Lost("/x".to_owned());
        assert_eq!(collectors.take("id").unwrap().unwrap().len(), MAX_CHANGES);
        assert_eq!(collectors.take("id"), Some(Err(lost.clone())));
        assert_eq!(collectors.take("id"), Some(Err(lost)));
        assert!(collectors.remove("id") && !collectors.remove("id"));
        assert_eq!(collectors.take("id"), None);
    }
}
