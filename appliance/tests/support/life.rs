//! The life of a guest of [`adder`](super::adder) in a real VMM, by the steps that are the same in
//! every one; between them its test looks at what only this VMM has.

use serde_json::Value;

use super::adder::{Written, run, written};
use super::api::Api;
use super::daemon::Daemon;
use super::place::Place;
use super::restored;
use super::stand_in::StandIns;

/// A guest, `one`, that runs.
pub(crate) struct Life<'a> {
    place: &'a Place,
    api: Api,
    /// Whether VMMs wait for it.
    waiting: bool,
    before: Written,
}

impl<'a> Life<'a> {
    /// Boots it.
    #[track_caller]
    pub(crate) fn begin(place: &'a Place, api: &Api, waiting: bool) -> Self {
        api.create("one", "base");
        run();
        Self {
            place,
            api: api.clone(),
            waiting,
            before: Written::default(),
        }
    }

    /// Pauses it for the so manieth time and looks at what it has written; returns what its build
    /// says of its memory.
    #[track_caller]
    pub(crate) fn pause(&mut self, cycle: u64) -> Value {
        let paused = self.api.pause("one").expect(200);
        assert_eq!(paused["generation"], cycle, "{paused}");
        let now = written(self.place, &paused);
        now.follows(self.before, &format!("cycle {cycle}"));
        assert!(
            now.rounds - now.newest <= 1,
            "cycle {cycle}: {} is newest",
            now.newest
        );
        let memory = self.api.get("/v1/sandboxes/one/memory").expect(200);
        println!(
            "cycle {cycle}: {} rounds, {} pages stored",
            now.rounds, memory["diff_pages"]
        );
        self.before = now;
        memory
    }

    /// Lets it go on, in a VMM that waits if there are any.
    #[track_caller]
    pub(crate) fn resume(&self) {
        if self.waiting {
            restored::wait_for_vmm(&self.api);
        }
        self.api.resume("one").expect(200);
    }

    /// Makes another one, `two`, from it; both run.
    #[track_caller]
    pub(crate) fn snapshot(&self) {
        self.api.snapshot("one", "warm").expect(201);
        self.api.create("two", "warm");
        run();
    }

    /// Pauses both.
    #[track_caller]
    pub(crate) fn pause_both(&self) {
        for id in ["one", "two"] {
            written(self.place, &self.api.pause(id).expect(200)).follows(self.before, id);
        }
    }

    /// Kills the VMM of the first, which runs again. Whatever it said at its serial port is in the
    /// reason of its end; and nothing is left of all.
    #[track_caller]
    pub(crate) fn end(self, daemon: Daemon, stand_ins: StandIns) {
        let Self {
            place,
            api,
            waiting,
            ..
        } = self;
        restored::found_one_waiting(place, waiting.then_some(10));
        restored::vmm(place).kill();
        let reason = api.failure("one");
        assert!(reason.contains("killed by SIGKILL"), "{reason}");
        assert!(reason.contains("ok | ok | ok"), "{reason}");
        assert!(!reason.contains('X'), "{reason}");
        api.delete_all();
        drop(stand_ins);
        if waiting {
            daemon.stop();
            assert_eq!(place.leftovers(), Vec::<String>::new());
        } else {
            assert_eq!(place.leftovers(), Vec::<String>::new());
            daemon.stop();
        }
        assert_eq!(place.leftovers_of_the_daemon(), Vec::<String>::new());
    }
}
