//! Reconciling while the daemon runs: what belongs to nobody goes, with the processes in it, and what
//! waits for sandboxes stays.

mod support;

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use appliance::vmm::cgroup::Cgroups;
use support::daemon::Daemon;
use support::place::{Place, names};
use support::{needs, skip, wait_for};

#[test]
fn what_belongs_to_nobody_goes_and_what_waits_stays() {
    let test = "what_belongs_to_nobody_goes_and_what_waits_stays";
    if let Err(reason) = needs::for_daemons() {
        return skip(test, &reason);
    }
    let place = Place::new("trecon", 56, None);
    place.reconfigure(&[("ready_slots = 0", "ready_slots = 2")]);
    let daemon = Daemon::start(&place);
    let namespaces = || {
        let all = names(Path::new("/run/netns")).into_iter();
        all.filter(|name| name.starts_with("trecon-"))
            .collect::<Vec<_>>()
    };
    wait_for("two slots wait", Duration::from_secs(60), || {
        (namespaces().len() == 2).then_some(())
    });
    let api = &daemon.api;
    let nothing = api.call("POST", "/v1/host/reconcile", None).expect(200);
    assert_eq!(nothing["found"], serde_json::json!([]));

    let made = Command::new("ip")
        .args(["netns", "add", "trecon-77"])
        .status();
    if !made.is_ok_and(|status| status.success()) {
        return skip(test, "no ip(8) that makes namespaces");
    }
    let mut inside = Command::new("ip")
        .args(["netns", "exec", "trecon-77", "sleep", "600"])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let lost = place.data.join("sandboxes/lost");
    fs::create_dir_all(&lost).unwrap();
    fs::write(lost.join("disk"), "content").unwrap();
    // A VMM's group that nobody removed, with a process in it.
    let group = Cgroups::open("trecon").and_then(|groups| groups.make("lostvmm"));
    let mut member = Command::new("sleep")
        .arg("600")
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    if let Ok(group) = &group {
        fs::write(group.dir().join("cgroup.procs"), member.id().to_string()).unwrap();
    }
    let inode = |path: &str| {
        fs::metadata(path)
            .map(|m| std::os::unix::fs::MetadataExt::ino(&m))
            .ok()
    };
    wait_for("the process is inside", Duration::from_secs(60), || {
        let there = inode(&format!("/proc/{}/ns/net", inside.id()));
        (there.is_some() && there == inode("/run/netns/trecon-77")).then_some(())
    });

    let answer = api.call("POST", "/v1/host/reconcile", None).expect(200);
    let found = answer["found"].as_array().unwrap();
    let said: Vec<_> = found
        .iter()
        .map(|what| {
            (
                what["kind"].as_str().unwrap(),
                what["name"].as_str().unwrap(),
            )
        })
        .collect();
    let mut expected = vec![("slot", "trecon-77"), ("directory", "lost")];
    if let Ok(group) = &group {
        expected.push(("directory", "lostvmm"));
        assert!(!group.dir().exists());
    } else {
        member.kill().unwrap();
    }
    assert_eq!(said, expected, "{answer}");
    assert_eq!(member.wait().unwrap().signal(), Some(9));
    assert!(found.iter().all(|what| what["removed"] == true), "{answer}");
    assert!(!lost.exists());
    assert_eq!(inside.wait().unwrap().signal(), Some(9));
    assert_eq!(namespaces().len(), 2, "those that wait are still there");
    let again = api.call("POST", "/v1/host/reconcile", None).expect(200);
    assert_eq!(again["found"], serde_json::json!([]));
    daemon.stop();
}
