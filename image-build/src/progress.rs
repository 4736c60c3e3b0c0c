//! `· fetching guest kernel … 3.1 s`: what is going on, once it takes longer than two seconds.
//!
//! On a terminal the line counts; in a log it is one line when the step has become slow and one
//! with the time when it is done. Short steps say nothing.

use std::io::{self, IsTerminal as _, Write as _};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// A step that is done before this says nothing.
const SLOW: Duration = Duration::from_secs(2);
const TICK: Duration = Duration::from_secs(1);

/// Runs a step, and tells about it if it is slow.
pub(crate) fn step<T>(name: &str, work: impl FnOnce() -> T) -> T {
    let (done, finished) = mpsc::channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || watch(name, &finished));
        let result = work();
        drop(done);
        result
    })
}

fn watch(name: &str, finished: &mpsc::Receiver<()>) {
    let started = Instant::now();
    if finished.recv_timeout(SLOW) != Err(RecvTimeoutError::Timeout) {
        return;
    }
    let terminal = io::stderr().is_terminal();
    if !terminal {
        say(&format!("· {name} …\n"));
    }
    loop {
        if terminal {
            say(&format!(
                "\r· {name} … {:.0} s ",
                started.elapsed().as_secs_f64()
            ));
        }
        if finished.recv_timeout(TICK) != Err(RecvTimeoutError::Timeout) {
            break;
        }
    }
    let start = if terminal { "\r" } else { "" };
    say(&format!(
        "{start}· {name} … {:.1} s\n",
        started.elapsed().as_secs_f64()
    ));
}

/// Nobody to tell is no reason to stop.
fn say(text: &str) {
    let mut stderr = io::stderr().lock();
    let _ = stderr.write_all(text.as_bytes());
    let _ = stderr.flush();
}
