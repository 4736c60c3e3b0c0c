//! A daemon that can't start says what is wrong and what to do, and leaves nothing; tools on
//! what is no build, likewise.

mod support;

use std::fs;
use std::net::TcpListener;
use std::process::Output;

use support::daemon::{Daemon, run};
use support::place::Place;
use support::{needs, procs, skip};

/// Leaves the test when a daemon can't run here at all.
macro_rules! needs_daemon {
    ($test:literal) => {
        if let Err(reason) = needs::for_daemons() {
            return skip($test, &reason);
        }
    };
}

/// What a program that has to fail printed to standard error.
#[track_caller]
fn failure(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(!said.contains("panicked"), "{said}");
    said
}

#[track_caller]
fn serve_fails(place: &Place) -> String {
    let said = failure(&run(&["serve", "--config", place.config.to_str().unwrap()]));
    let left: Vec<_> = procs::of(place);
    assert!(left.is_empty(), "left over: {left:?}\n{said}");
    said
}

#[test]
fn a_good_configuration_is_said_to_be_good() {
    let place = Place::new("tgood", 10, None);
    let checked = run(&["check-config", place.config.to_str().unwrap()]);
    assert!(checked.status.success(), "{checked:?}");
    assert!(String::from_utf8_lossy(&checked.stdout).contains("is fine"));
}

#[test]
fn a_bad_configuration_is_refused_by_key_before_anything_is_made() {
    let place = Place::new("tbad", 11, None);
    let config = place.config.to_str().unwrap().to_owned();
    let good = fs::read_to_string(&place.config).unwrap();
    for (change, key) in [
        ("shards = 2\nturbo = true", "turbo"),
        ("shards = 0", "shards"),
        ("shards = \"two\"", "shards"),
        (
            "shards = 2\n[engine]\nwindow_pages = 3",
            "engine.window_pages",
        ),
        ("shards = 2\n[vm]", "vm"),
        ("shards =", "line 4"),
    ] {
        fs::write(&place.config, good.replace("shards = 2", change)).unwrap();
        for command in [
            &["check-config", &config][..],
            &["serve", "--config", &config],
        ] {
            let said = failure(&run(command));
            assert!(said.contains(key), "{command:?} {key}: {said}");
            assert!(said.contains(&config), "{said}");
        }
    }
    let missing = failure(&run(&["check-config", "/nonexistent/thaw.toml"]));
    assert!(missing.contains("/nonexistent/thaw.toml"), "{missing}");
    assert!(!place.run.exists());
    assert!(!place.data.join("catalogue.db").exists());
}

#[test]
fn a_port_in_use_is_named_and_no_engine_stays() {
    needs_daemon!("a_port_in_use_is_named_and_no_engine_stays");
    let place = Place::new("tport", 12, None);
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    place.reconfigure(&[("listen = []", &format!("listen = [\"{address}\"]"))]);
    let said = serve_fails(&place);
    assert!(said.contains(&address), "{said}");
    assert!(said.contains("api.listen"), "{said}");

    // The port is free: the same configuration starts.
    drop(taken);
    let daemon = Daemon::start(&place);
    let over_tcp = std::net::TcpStream::connect(&address);
    assert!(over_tcp.is_ok());
    daemon.stop();
    assert_eq!(place.leftovers_of_the_daemon(), Vec::<String>::new());
}

#[test]
fn a_socket_path_that_is_too_long_is_named() {
    needs_daemon!("a_socket_path_that_is_too_long_is_named");
    let place = Place::new("tlong", 13, None);
    let long = place.root.join("x".repeat(120));
    let wanted = format!("listen = []\nsocket = \"{}\"", long.display());
    place.reconfigure(&[("listen = []", &wanted)]);
    let said = serve_fails(&place);
    assert!(said.contains(long.to_str().unwrap()), "{said}");
    assert!(said.contains("api.socket"), "{said}");
}

#[test]
fn a_directory_that_cannot_be_written_is_named() {
    needs_daemon!("a_directory_that_cannot_be_written_is_named");
    let place = Place::new("tdir", 14, None);
    fs::remove_dir(&place.data).unwrap();
    fs::write(&place.data, "a file").unwrap();
    let said = serve_fails(&place);
    assert!(said.contains(place.data.to_str().unwrap()), "{said}");
    assert!(said.contains("data_dir"), "{said}");
    assert_eq!(fs::read_to_string(&place.data).unwrap(), "a file");
    fs::remove_file(&place.data).unwrap();
}

#[test]
fn a_missing_qemu_is_named() {
    needs_daemon!("a_missing_qemu_is_named");
    let place = Place::new("tqemu", 15, None);
    place.reconfigure(&[("[vmm]\n", "[vmm]\nqemu = \"/nonexistent/qemu\"\n")]);
    let said = serve_fails(&place);
    assert!(said.contains("/nonexistent/qemu"), "{said}");
    assert!(said.contains("vmm.qemu"), "{said}");
}

#[test]
fn a_missing_preload_library_is_named() {
    needs_daemon!("a_missing_preload_library_is_named");
    let place = Place::new("tpre", 16, None);
    let preload = needs::for_daemons().unwrap();
    let gone = "/nonexistent/preload.so";
    place.reconfigure(&[(preload.to_str().unwrap(), gone)]);
    let said = serve_fails(&place);
    assert!(said.contains(gone), "{said}");
    assert!(said.contains("vmm.preload"), "{said}");
}

#[test]
fn a_catalogue_that_is_none_is_refused_and_kept() {
    needs_daemon!("a_catalogue_that_is_none_is_refused_and_kept");
    let place = Place::new("tcat", 17, None);
    let catalogue = place.data.join("catalogue.db");
    let content = "not a database ".repeat(1000);
    fs::write(&catalogue, &content).unwrap();
    let said = serve_fails(&place);
    assert!(said.contains(place.data.to_str().unwrap()), "{said}");
    assert_eq!(fs::read_to_string(&catalogue).unwrap(), content);
}

#[test]
fn a_second_daemon_is_refused_and_the_first_goes_on() {
    needs_daemon!("a_second_daemon_is_refused_and_the_first_goes_on");
    let place = Place::new("ttwo", 18, None);
    let mut first = Daemon::start(&place);
    let engine = procs::engine(&place).expect("an engine").pid;
    let unfinished = place.data.join("builds/.staging-of-the-first");
    fs::create_dir(&unfinished).unwrap();

    // The same one again; then those that share just the data, the sockets, the name.
    let text = fs::read_to_string(&place.config).unwrap();
    let data = format!("data_dir = \"{}\"", place.data.display());
    let run_dir = format!("run_dir = \"{}\"", place.run.display());
    let instance = "instance = \"ttwo\"";
    let other_data = format!("data_dir = \"{}\"", place.root.join("data_dir").display());
    // Sockets lie in it, so its path has to be short; it is removed with the place's own.
    let other_run = format!("run_dir = \"{}\"", place.run.join("b").display());
    let other_instance = "instance = \"ttwob\"";
    let config = place.root.join("second.toml");
    for changes in [
        &[][..],
        &[
            (&run_dir, &other_run),
            (&instance.into(), &other_instance.into()),
        ],
        &[
            (&data, &other_data),
            (&instance.into(), &other_instance.into()),
        ],
        &[(&data, &other_data), (&run_dir, &other_run)],
    ] {
        let mut text = text.clone();
        for (old, new) in changes {
            assert!(text.contains(*old), "{old} in {text}");
            text = text.replace(*old, new);
        }
        fs::write(&config, &text).unwrap();
        let said = failure(&run(&["serve", "--config", config.to_str().unwrap()]));
        assert!(said.contains("nother daemon"), "{text}\n{said}");
        assert!(first.is_running());
        assert_eq!(procs::engine(&place).expect("its engine").pid, engine);
        first.api.get("/readyz").expect(200);
        assert!(unfinished.is_dir(), "it was taken for an earlier run's");
    }
    first.stop();
}

#[test]
fn a_slot_that_was_half_taken_down_is_removed_at_the_start() {
    needs_daemon!("a_slot_that_was_half_taken_down_is_removed_at_the_start");
    let place = Place::new("thalf", 19, None);
    // The link goes first: this is what a daemon killed between the two leaves.
    fs::create_dir_all("/run/netns").unwrap();
    let name = std::path::Path::new("/run/netns/thalf-0");
    fs::write(name, "").unwrap();
    let daemon = Daemon::start(&place);
    assert!(!name.exists());
    assert_eq!(place.sandbox_leftovers(), Vec::<String>::new());
    daemon.stop();
}

#[test]
fn what_is_no_build_is_said_to_be_none() {
    let dir = tempfile::tempdir().unwrap();
    let named = |name: &str| {
        let path = dir.path().join(name);
        fs::create_dir_all(&path).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let plain = named("plain");
    let empty = named(&"ab".repeat(16));
    let missing = dir.path().join("missing").to_str().unwrap().to_owned();
    for command in ["inspect", "verify"] {
        let said = failure(&run(&["snapshot", command, &plain]));
        assert!(said.contains("is no build"), "{said}");
        let said = failure(&run(&["snapshot", command, &missing]));
        assert!(said.contains("is not there"), "{said}");
        let output = run(&["snapshot", command, &empty]);
        let said = failure(&output) + &String::from_utf8_lossy(&output.stdout);
        assert!(said.contains(&empty), "{command}: {said}");
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
}
