//! A daemon whose guests run in a fake, and what is in such a guest.

use std::fs;
use std::io::{BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

use super::{Fake, Kind, Vmm};
use crate::support::daemon::Daemon;
use crate::support::place::Place;
use crate::support::wait_for;

pub(crate) const MEMORY_MB: u64 = 64;
/// How long a VMM may take for a command, in seconds; all of a guest's memory is asked for in that
/// time, on a host that is busy.
const COMMAND_S: u64 = 6;

/// A daemon whose guests run in a fake.
pub(crate) struct Subject {
    pub(crate) place: Place,
    pub(crate) fake: Fake,
    pub(crate) daemon: Daemon,
}

/// Where it is configured, without a VMM. A fake plays its guest's network, too, which wants privilege.
pub(crate) fn place(instance: &str, pool: u16, vmm: Vmm) -> Place {
    let config = format!(
        "driver = \"{}\"\nown_users = false\ncommand_timeout_s = {COMMAND_S}\nboot_timeout_s = 20\n\
         {} = []\n",
        vmm.name(),
        vmm.programs(),
    );
    Place::with_template(instance, pool, &config, b"\x7fELF", MEMORY_MB)
}

/// Names these as the host's VMMs of this kind.
pub(crate) fn use_fakes(place: &Place, fakes: &[&Fake], vmm: Vmm) {
    let names: Vec<String> = fakes
        .iter()
        .map(|fake| format!("{:?}", fake.program.display().to_string()))
        .collect();
    let text = fs::read_to_string(&place.config).unwrap();
    let begin = format!("{} = ", vmm.programs());
    let line = text.lines().find(|line| line.starts_with(&begin));
    let list = format!("{begin}[{}]", names.join(", "));
    place.reconfigure(&[(line.unwrap(), &list)]);
}

/// What is in a guest, by its own word.
pub(crate) struct Inside {
    address: SocketAddr,
}

impl Inside {
    pub(crate) fn of(sandbox: &Value) -> Self {
        let ip: std::net::Ipv4Addr = sandbox["address"].as_str().unwrap().parse().unwrap();
        Self {
            address: SocketAddr::from((ip, envd::protocol::PORT)),
        }
    }

    pub(crate) fn try_call(&self, method: &str, path: &str) -> std::io::Result<Value> {
        let patience = Duration::from_secs(20);
        let mut stream = TcpStream::connect_timeout(&self.address, patience)?;
        stream.set_read_timeout(Some(patience))?;
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nhost: guest\r\ncontent-length: 0\r\n\r\n"
        )?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut text = String::new();
        BufReader::new(stream).read_to_string(&mut text)?;
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_default();
        if !head.starts_with("HTTP/1.1 200") {
            return Err(std::io::Error::other(format!("{path}: {text:?}")));
        }
        serde_json::from_str(body).map_err(std::io::Error::other)
    }

    #[track_caller]
    pub(crate) fn call(&self, method: &str, path: &str) -> Value {
        self.try_call(method, path).unwrap()
    }

    #[track_caller]
    pub(crate) fn count(&self) -> u64 {
        self.call("GET", "/test/count").as_u64().unwrap()
    }

    #[track_caller]
    pub(crate) fn hash(&self) -> Value {
        self.call("GET", "/test/hash")
    }

    #[track_caller]
    pub(crate) fn fill(&self, first: u64, pages: u64, seed: u64) {
        let path = format!("/test/fill?first={first}&pages={pages}&seed={seed}");
        self.call("POST", &path);
    }

    #[track_caller]
    pub(crate) fn give_back(&self, first: u64, pages: u64) {
        let path = format!("/test/give-back?first={first}&pages={pages}");
        self.call("POST", &path);
    }

    /// Counts, from at least `from` on.
    #[track_caller]
    pub(crate) fn runs_on_from(&self, from: u64) {
        let now = self.count();
        assert!(now >= from, "it counted back from {from} to {now}");
        wait_for("the guest counts on", Duration::from_secs(20), || {
            (self.count() > now).then_some(())
        });
    }
}

impl Subject {
    /// `test` is the name of a test of this program that calls [`super::run_if_wanted`].
    pub(crate) fn start(instance: &str, pool: u16, kind: Kind, test: &str) -> Self {
        let place = place(instance, pool, kind.vmm);
        Self::start_in(place, kind, test)
    }

    /// In a place that is configured otherwise.
    pub(crate) fn start_in(place: Place, kind: Kind, test: &str) -> Self {
        let fake = Fake::new(&place, test, kind);
        use_fakes(&place, &[&fake], kind.vmm);
        let daemon = Daemon::start(&place);
        Self {
            place,
            fake,
            daemon,
        }
    }

    /// Its daemon dies, something happens, and the next one is there.
    #[allow(dead_code, reason = "not every test binary kills one")]
    pub(crate) fn crash(self, meanwhile: impl FnOnce(&Place, &Fake)) -> Self {
        let Self {
            place,
            fake,
            daemon,
        } = self;
        daemon.kill();
        meanwhile(&place, &fake);
        Self {
            daemon: Daemon::start(&place),
            place,
            fake,
        }
    }

    /// Limits the disk of a sandbox, so that its restore is all the calls that there can be.
    #[track_caller]
    pub(crate) fn limit_disk(&self, id: &str) {
        let limits = serde_json::json!({ "ops_per_s": 5000 });
        let path = format!("/v1/sandboxes/{id}/disk");
        let limited = self.daemon.api.call("PUT", &path, Some(&limits));
        limited.expect(200);
    }

    /// Waits until all of a guest's memory is there.
    #[track_caller]
    pub(crate) fn has_all_of(&self, id: &str) {
        let pages = MEMORY_MB << 8;
        let path = format!("/v1/sandboxes/{id}/memory");
        wait_for("all memory is there", Duration::from_secs(60), || {
            let memory = self.daemon.api.get(&path).expect(200);
            (memory["resident_pages"] == pages).then_some(())
        });
    }

    pub(crate) fn end(self) {
        self.daemon.api.delete_all();
        // What was recorded of a guest may still be on its way to a build that is gone.
        wait_for("nothing is left", Duration::from_secs(20), || {
            let left = self.place.leftovers();
            left.is_empty().then_some(()).or_else(|| {
                println!("left: {left:?}");
                None
            })
        });
        self.daemon.stop();
        assert_eq!(self.place.leftovers_of_the_daemon(), Vec::<String>::new());
    }
}
