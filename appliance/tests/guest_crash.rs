//! SIGKILL, to each process at each step: nothing is lost silently, nothing hangs, nothing is
//! left over.

mod support;

use std::thread::{JoinHandle, sleep};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use support::api::{Answer, Api};
use support::daemon::Daemon;
use support::needs;
use support::place::Place;
use support::workload::Workload;
use support::{procs, skip, wait_for};

/// Takes the inputs, or prints why there are none and leaves the test.
macro_rules! inputs_or_skip {
    ($test:literal) => {
        match needs::for_guests() {
            Ok(inputs) => inputs,
            Err(reason) => return skip($test, &reason),
        }
    };
}

/// A request that goes on while the test does something to whoever serves it.
fn in_background(
    api: &Api,
    method: &'static str,
    path: &str,
    body: Value,
) -> JoinHandle<std::io::Result<Answer>> {
    let (api, path) = (api.clone(), path.to_owned());
    std::thread::spawn(move || api.try_call(method, &path, Some(&body)))
}

fn operation(api: &Api, id: &str, name: &str) -> JoinHandle<std::io::Result<Answer>> {
    in_background(
        api,
        "POST",
        &format!("/v1/sandboxes/{id}/{name}"),
        json!({}),
    )
}

/// Delays from a seed that is printed, so that a failure can be played again: xorshift64.
struct Delays(u64);

impl Delays {
    fn new() -> Self {
        let given = std::env::var("THAW_TEST_SEED").ok();
        let seed = given.map_or_else(
            || {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
                now.as_nanos() as u64 | 1
            },
            |seed| seed.parse().expect("THAW_TEST_SEED is a number"),
        );
        println!("THAW_TEST_SEED={seed}");
        Self(seed)
    }

    fn below(&mut self, limit: Duration) -> Duration {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        Duration::from_micros(self.0 % limit.as_micros() as u64)
    }
}

#[test]
fn guest_outlives_its_engine() {
    let inputs = inputs_or_skip!("guest_outlives_its_engine");
    let _turn = needs::one_at_a_time();
    let place = Place::new("teng", 20, Some(&inputs));
    let daemon = Daemon::start(&place);
    let api = &daemon.api;
    api.create("one", "base");
    let mut work = Workload::start(api, "one", 24);
    api.pause("one").expect(200);
    api.resume("one").expect(200);

    // Killed while the guest reads memory that is not there yet.
    let body = json!({ "cmd": "sha256sum", "args": ["/run/fill"], "user": "root" });
    let hashing = in_background(api, "POST", "/v1/sandboxes/one/exec", body);
    let mut killed = Vec::new();
    for _ in 0..3 {
        sleep(Duration::from_millis(60));
        let engine = wait_for("an engine", Duration::from_secs(10), || {
            procs::engine(&place).filter(|engine| !killed.contains(&engine.pid))
        });
        engine.kill();
        killed.push(engine.pid);
    }
    let hashed = hashing.join().unwrap().unwrap().expect(200);
    assert!(
        hashed["stdout"]
            .as_str()
            .unwrap()
            .starts_with(work.memory().trim_end_matches(" -")),
        "{hashed}"
    );
    let sandbox = api.sandbox("one").expect(200);
    assert_eq!(sandbox["state"], "running", "{sandbox}");
    assert!(sandbox.get("reason").is_none(), "{sandbox}");
    work.check(api, "one");
    api.get("/v1/sandboxes/one/memory").expect(200);

    // What its successors recorded makes a correct diff.
    work.change(api, "one");
    api.pause("one").expect(200);
    api.resume("one").expect(200);
    work.check(api, "one");
    api.pause("one").expect(200);

    // Killed during a resume: that one may fail, the next one does not.
    let mut delays = Delays::new();
    for round in 0..5 {
        let engine = wait_for("an engine", Duration::from_secs(10), || {
            procs::engine(&place)
        });
        let resuming = operation(api, "one", "resume");
        // Before the hand-off, at it, and while the guest's first pages are served.
        let delay = delays.below(Duration::from_millis(60 << round));
        sleep(delay);
        engine.kill();
        let resumed = resuming.join().unwrap().unwrap();
        println!(
            "round {round}, {delay:?}: {} {}",
            resumed.status,
            resumed.detail()
        );
        if resumed.status != 200 {
            assert!(matches!(resumed.status, 500 | 503), "{}", resumed.body);
            let sandbox = api.sandbox("one").expect(200);
            assert_eq!(sandbox["state"], "paused", "{sandbox}");
            assert_eq!(place.sandbox_leftovers(), Vec::<String>::new());
            wait_for("a second try succeeds", Duration::from_secs(30), || {
                (api.resume("one").status == 200).then_some(())
            });
        }
        work.check(api, "one");
        api.pause("one").expect(200);
    }
    one_that_cannot_be_adopted_fails_alone(&place, api, &mut work);
    api.destroy("one");
    assert_eq!(place.leftovers(), Vec::<String>::new());
    daemon.stop();
    assert_eq!(place.leftovers_of_the_daemon(), Vec::<String>::new());
}

/// A build that can't be opened any more costs the sandbox that runs on it, and no other.
fn one_that_cannot_be_adopted_fails_alone(place: &Place, api: &Api, work: &mut Workload) {
    let paused = api.snapshot("one", "tpl").expect(201);
    let clone = api.create("two", "tpl");
    assert_eq!(clone["build"], paused["build"]);
    api.pause("two").expect(200);
    let build = api.resume("two").expect(200)["build"].clone();
    api.resume("one").expect(200);
    let map = place.build(build.as_str().unwrap()).join("memory.map");
    let (whole, away) = (map.clone(), map.with_extension("away"));
    std::fs::rename(&whole, &away).unwrap();
    procs::engine(place).expect("an engine").kill();
    let failed = wait_for("it has failed", Duration::from_secs(10), || {
        let sandbox = api.sandbox("two").expect(200);
        (sandbox["state"] == "failed").then_some(sandbox)
    });
    let reason = failed["reason"].as_str().unwrap();
    assert!(reason.contains("memory.map"), "{reason}");
    assert_eq!(api.sandbox("one").body["state"], "running");
    work.check(api, "one");
    std::fs::rename(&away, &whole).unwrap();
    api.destroy("two");
    api.delete("/v1/snapshots/tpl").expect(204);
}

#[test]
fn guest_whose_vmm_dies_has_failed_and_can_be_deleted() {
    let inputs = inputs_or_skip!("guest_whose_vmm_dies_has_failed_and_can_be_deleted");
    let _turn = needs::one_at_a_time();
    let place = Place::new("tvmm", 21, Some(&inputs));
    let daemon = Daemon::start(&place);
    let api = &daemon.api;
    api.create("booted", "base");
    Workload::start(api, "booted", 4);
    api.snapshot("booted", "tpl").expect(201);
    api.create("restored", "tpl");
    api.create("pausing", "tpl");

    for id in ["booted", "restored"] {
        let body = json!({ "cmd": "sleep", "args": ["60"] });
        let waiting = in_background(api, "POST", &format!("/v1/sandboxes/{id}/exec"), body);
        sleep(Duration::from_millis(300));
        procs::vmm(&place, id).expect("its VMM").kill();
        let sandbox = wait_for("it has failed", Duration::from_secs(5), || {
            let sandbox = api.sandbox(id).expect(200);
            (sandbox["state"] == "failed").then_some(sandbox)
        });
        assert!(!sandbox["reason"].as_str().unwrap().is_empty(), "{sandbox}");
        let cut = waiting.join().unwrap().unwrap();
        assert!(cut.status >= 400, "{id}: {}", cut.body);
        for refused in [
            api.exec(id, "true", &[]),
            api.pause(id),
            api.resume(id),
            api.snapshot(id, "other"),
        ] {
            assert_eq!(refused.body["state"], "failed", "{}", refused.body);
            refused.expect(409);
        }
    }

    // Under a pause: the pause says so, and no build of it appears.
    let builds = support::place::names(&place.data.join("builds"));
    let pausing = operation(api, "pausing", "pause");
    wait_for("it is pausing", Duration::from_secs(5), || {
        (api.sandbox("pausing").body["state"] == "pausing").then_some(())
    });
    procs::vmm(&place, "pausing").expect("its VMM").kill();
    let paused = pausing.join().unwrap().unwrap();
    if paused.status == 200 {
        // It came too late: everything had been read.
        assert_eq!(paused.body["state"], "paused", "{}", paused.body);
    } else {
        assert_eq!(paused.status, 500, "{}", paused.body);
        let sandbox = api.sandbox("pausing").expect(200);
        assert_eq!(sandbox["state"], "failed", "{sandbox}");
        assert_eq!(
            support::place::names(&place.data.join("builds")),
            builds,
            "a build of a pause that failed"
        );
    }
    assert_eq!(place.sandbox_leftovers(), Vec::<String>::new());
    api.delete_all();
    assert_eq!(place.leftovers(), Vec::<String>::new());
    daemon.stop();
}

/// What the guest has counted while nobody asked it for anything.
const TICKS: &str = "/run/ticks";

fn ticks(api: &Api, id: &str) -> usize {
    api.shell(id, &format!("wc -c < {TICKS}")).parse().unwrap()
}

/// Booted and restored guests run through their daemon's death, and their engine's with it, and their
/// next daemon's start, in the same VMMs, and are the next one's in all.
#[test]
fn guest_runs_through_the_death_of_its_daemon() {
    let inputs = inputs_or_skip!("guest_runs_through_the_death_of_its_daemon");
    let _turn = needs::one_at_a_time();
    let place = Place::new("tlive", 25, Some(&inputs));
    let mut daemon = Daemon::start(&place);
    let api = daemon.api.clone();
    let booted = api.create("booted", "base");
    let work = Workload::start(&api, "booted", 16);
    api.snapshot("booted", "tpl").expect(201);
    let restored = api.create("restored", "tpl");
    let mut executions = [&booted, &restored].map(|made| made["execution_id"].clone());
    for id in ["booted", "restored"] {
        let count =
            format!("(while true; do printf x >> {TICKS}; sleep 0.1; done) > /dev/null 2>&1 &");
        api.shell(id, &count);
    }
    let mut vmms = ["booted", "restored"].map(|id| procs::vmm(&place, id).expect("a VMM").pid);
    for round in 0..4 {
        let before = ["booted", "restored"].map(|id| ticks(&api, id));
        // Alone, and with its engine: what is missing then waits until the next one is there.
        if round % 2 == 0 {
            daemon.kill();
        } else {
            daemon.kill_with_engines(&place);
            assert!(procs::engine(&place).is_none());
        }
        // Long enough for a guest that had stopped to be noticed.
        sleep(Duration::from_secs(2));
        daemon = Daemon::start(&place);
        if round % 2 == 1 {
            // While they go through all that they have.
            let sums = ["booted", "restored"].map(|id| {
                let body = json!({ "cmd": "sha256sum", "args": ["/run/fill"], "user": "root" });
                in_background(&api, "POST", &format!("/v1/sandboxes/{id}/exec"), body)
            });
            sleep(Duration::from_millis(40));
            daemon.kill_with_engines(&place);
            daemon = Daemon::start(&place);
            // They went through the daemon.
            for sum in sums {
                let _ = sum.join().unwrap();
            }
        }
        for (number, id) in ["booted", "restored"].into_iter().enumerate() {
            let sandbox = api.sandbox(id).expect(200);
            assert_eq!(sandbox["state"], "running", "{sandbox}");
            assert_eq!(sandbox["execution_id"], executions[number], "{sandbox}");
            // Its owner answers when it has it.
            api.get(&format!("/v1/sandboxes/{id}/disk")).expect(200);
            let vmm = procs::vmm(&place, id).expect("a VMM");
            assert_eq!(vmm.pid, vmms[number], "{id}");
            let now = ticks(&api, id);
            let counted = now - before[number];
            // Who waits for memory doesn't count.
            let least = if round % 2 == 0 { 10 } else { 1 };
            assert!(
                counted >= least,
                "{id} counted {counted} in two seconds and more"
            );
            work.clone().check(&api, id);
            if round == 1 {
                api.pause(id).expect(200);
                executions[number] = api.resume(id).expect(200)["execution_id"].clone();
                work.clone().check(&api, id);
            }
            let vmm = procs::vmm(&place, id).expect("a VMM");
            vmms[number] = vmm.pid;
            // What it prints is heard again.
            api.shell(id, &format!("echo round-{round} > /dev/console"));
            wait_for("its console is heard", Duration::from_secs(20), || {
                let lines = api.get(&format!("/v1/sandboxes/{id}/console")).expect(200);
                lines
                    .to_string()
                    .contains(&format!("round-{round}"))
                    .then_some(())
            });
        }
    }
    // Their memory is complete and right when they are paused, and what they did is in it.
    for id in ["booted", "restored"] {
        let before = ticks(&api, id);
        api.pause(id).expect(200);
        api.resume(id).expect(200);
        work.clone().check(&api, id);
        assert!(ticks(&api, id) >= before, "{id}");
    }
    api.delete_all();
    assert_eq!(place.leftovers(), Vec::<String>::new());
    daemon.stop();
    assert_eq!(place.leftovers_of_the_daemon(), Vec::<String>::new());
}

/// One template to make sandboxes from quickly, and the daemon that is killed again and again.
struct Crashing {
    place: Place,
    daemon: Option<Daemon>,
    work: Workload,
    delays: Delays,
}

impl Crashing {
    fn api(&self) -> &Api {
        &self.daemon.as_ref().expect("a daemon").api
    }

    /// A running sandbox whose memory and disk hold a mark that its template has not.
    fn fresh(&self, id: &str) {
        self.api().create(id, "tpl");
        self.mark(id);
    }

    fn mark(&self, id: &str) {
        self.api().shell(
            id,
            &format!("echo mark-of-{id} | tee /run/mark > /root/mark && sync"),
        );
    }

    fn published(&self) -> usize {
        let names = support::place::names(&self.place.data.join("builds"));
        names.iter().filter(|name| !name.starts_with('.')).count()
    }

    /// SIGKILL to the daemon, and with `engine` to its engine as well; then the next start.
    fn crash(&mut self, engine: bool) {
        let daemon = self.daemon.take().expect("a daemon");
        if engine {
            daemon.kill_with_engines(&self.place);
        } else {
            daemon.kill();
        }
        self.daemon = Some(Daemon::start(&self.place));
        let sandboxes = self.api().get("/v1/sandboxes").expect(200);
        let sandboxes = sandboxes.as_array().unwrap();
        if sandboxes.iter().all(|one| one["state"] != "running") {
            assert_eq!(
                self.place.sandbox_leftovers(),
                Vec::<String>::new(),
                "after the next start"
            );
        }
    }

    /// A sandbox after a crash: running on, or paused, with all it had, or failed with a reason.
    fn judge(&mut self, id: &str, marked: bool) -> String {
        let mut sandbox = self.api().sandbox(id).expect(200);
        let mut state = sandbox["state"].as_str().unwrap().to_owned();
        // It is said to run from the start on. Whoever wants something of it waits until it was taken
        // over, or was not.
        if state == "running" && self.api().pause(id).status != 200 {
            sandbox = self.api().sandbox(id).expect(200);
            state = sandbox["state"].as_str().unwrap().to_owned();
        }
        match &*state {
            "paused" | "running" => {
                let resumed = self.api().resume(id).expect(200);
                assert_eq!(resumed["address"], sandbox["address"]);
                if marked {
                    let mark = self.api().shell(id, "cat /run/mark /root/mark");
                    assert_eq!(mark, format!("mark-of-{id}\nmark-of-{id}"), "older data");
                }
                self.work.clone().check(self.api(), id);
            }
            "failed" => {
                let reason = sandbox["reason"].as_str().unwrap_or_default();
                assert!(!reason.is_empty(), "{sandbox}");
                assert_eq!(self.api().resume(id).status, 409);
            }
            _ => panic!("neither running nor paused nor failed: {sandbox}"),
        }
        state
    }
}

#[test]
fn guest_survives_its_daemon_or_is_reported() {
    let inputs = inputs_or_skip!("guest_survives_its_daemon_or_is_reported");
    let _turn = needs::one_at_a_time();
    let place = Place::new("tcrash", 22, Some(&inputs));
    let daemon = Daemon::start(&place);
    daemon.api.create("zero", "base");
    let work = Workload::start(&daemon.api, "zero", 8);
    daemon.api.snapshot("zero", "tpl").expect(201);
    daemon.api.destroy("zero");
    let mut test = Crashing {
        place,
        daemon: Some(daemon),
        work,
        delays: Delays::new(),
    };

    // While one runs and another is paused; then engine and daemon together.
    for engine in [false, true] {
        test.fresh("runs");
        test.fresh("sleeps");
        test.api().pause("sleeps").expect(200);
        test.crash(engine);
        assert_eq!(test.judge("runs", true), "running");
        assert_eq!(test.judge("sleeps", true), "paused");
        test.api().destroy("runs");
        test.api().destroy("sleeps");
    }
    a_resume_that_cannot_be_stored_fails(&test);
    killed_during_pauses(&mut test);
    killed_during_snapshots(&mut test);
    killed_during_resumes(&mut test);
    killed_during_creations(&mut test);

    test.api().delete_all();
    assert_eq!(test.place.leftovers(), Vec::<String>::new());
    test.daemon.take().expect("a daemon").stop();
    assert_eq!(test.place.leftovers_of_the_daemon(), Vec::<String>::new());
}

/// How long a pause takes from its request to its answer.
fn time_of_a_pause(test: &Crashing) -> Duration {
    test.fresh("timed");
    let started = std::time::Instant::now();
    test.api().pause("timed").expect(200);
    let took = started.elapsed();
    test.api().destroy("timed");
    took
}

fn killed_during_pauses(test: &mut Crashing) {
    let took = time_of_a_pause(test);
    for round in 0..8 {
        let id = format!("pausing{round}");
        test.fresh(&id);
        let builds = test.published();
        let pausing = operation(test.api(), &id, "pause");
        let published = round >= 4;
        let delay = if published {
            // Between the rename that publishes the build and the row that names it.
            while test.published() == builds && !pausing.is_finished() {
                std::hint::spin_loop();
            }
            test.delays.below(Duration::from_millis(2))
        } else {
            test.delays.below(took)
        };
        sleep(delay);
        let engine = round % 4 == 3;
        test.crash(engine);
        let answered = pausing.join().unwrap().is_ok_and(|a| a.status == 200);
        let state = test.judge(&id, true);
        println!(
            "pause {round}, {delay:?} after its {}: answered {answered}, {state}",
            if published { "build" } else { "request" }
        );
        if answered || published {
            assert_eq!(state, "paused", "its build was published");
        }
        assert_ne!(state, "failed", "it was lost");
        test.api().destroy(&id);
    }
}

fn killed_during_snapshots(test: &mut Crashing) {
    for round in 0..2 {
        test.fresh("model");
        let body = json!({ "sandbox": "model", "name": "later" });
        let taking = in_background(test.api(), "POST", "/v1/snapshots", body);
        let delay = test.delays.below(Duration::from_millis(400));
        sleep(delay);
        test.crash(false);
        let answered = taking.join().unwrap().is_ok_and(|a| a.status == 201);
        let there = test.api().get("/v1/snapshots/later").status == 200;
        println!("snapshot {round}, {delay:?}: answered {answered}, there {there}");
        assert!(there || !answered, "an answered snapshot is gone");
        assert_eq!(test.judge("model", true), "running");
        test.api().destroy("model");
        if there {
            test.api().create("copy", "later");
            let mark = test.api().shell("copy", "cat /run/mark /root/mark");
            assert_eq!(mark, "mark-of-model\nmark-of-model");
            test.api().destroy("copy");
            test.api().delete("/v1/snapshots/later").expect(204);
        }
    }
}

fn killed_during_resumes(test: &mut Crashing) {
    test.fresh("resuming");
    for round in 0..4 {
        test.api().pause("resuming").expect(200);
        let resuming = operation(test.api(), "resuming", "resume");
        let delay = test.delays.below(Duration::from_millis(350));
        sleep(delay);
        let engine = round == 3;
        test.crash(engine);
        let answered = resuming.join().unwrap().is_ok_and(|a| a.status == 200);
        let state = test.judge("resuming", true);
        println!("resume {round}, {delay:?}: answered {answered}, {state}");
        if answered {
            // It ran, and whoever asked knows: it can't be paused as if nothing had been.
            assert_eq!(state, "running");
        }
        assert_ne!(state, "failed", "it was lost");
    }
    test.api().destroy("resuming");
}

/// A sandbox that somebody was told is running has to be stored as running: otherwise a crash
/// would bring back, as if nothing had been, what was before the resume.
fn a_resume_that_cannot_be_stored_fails(test: &Crashing) {
    test.fresh("stored");
    test.api().pause("stored").expect(200);
    let other = rusqlite::Connection::open(test.place.data.join("catalogue.db")).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let resuming = operation(test.api(), "stored", "resume");
    // The catalogue gives up after five seconds.
    let started = std::time::Instant::now();
    while started.elapsed() < Duration::from_secs(6) && !resuming.is_finished() {
        let state = test.api().sandbox("stored").body["state"].clone();
        assert_ne!(state, "running", "after {:?}", started.elapsed());
        sleep(Duration::from_millis(20));
    }
    other.execute_batch("ROLLBACK").unwrap();
    let refused = resuming.join().unwrap().unwrap();
    assert_eq!(refused.body["code"], "catalogue_failed", "{}", refused.body);
    assert_eq!(test.api().sandbox("stored").body["state"], "paused");
    assert_eq!(test.place.sandbox_leftovers(), Vec::<String>::new());
    test.api().resume("stored").expect(200);
    test.work.clone().check(test.api(), "stored");
    test.api().destroy("stored");
}

fn killed_during_creations(test: &mut Crashing) {
    for (round, template) in ["base", "tpl", "tpl"].into_iter().enumerate() {
        let body = json!({ "id": "making", "template": template });
        let creating = in_background(test.api(), "POST", "/v1/sandboxes", body);
        let limit = if template == "base" { 2000 } else { 400 };
        let delay = test.delays.below(Duration::from_millis(limit));
        sleep(delay);
        test.crash(false);
        let answered = creating.join().unwrap().is_ok_and(|a| a.status == 201);
        let after = test.api().sandbox("making");
        println!(
            "create {round} from {template}, {delay:?}: answered {answered}, {}",
            after.status
        );
        if answered || after.status == 200 {
            assert_eq!(test.judge("making", false), "running");
            test.api().destroy("making");
        } else {
            assert_eq!(after.status, 404, "{}", after.body);
        }
        // The id is free in any case.
        if template == "tpl" {
            test.api().create("making", "tpl");
            test.api().destroy("making");
        }
    }
}
