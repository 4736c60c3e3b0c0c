//! What a guest holds and does, so that anything lost shows: random data in its memory and on
//! its disk, and a process that counts.

use super::api::Api;

/// Counts for ever, twenty times a second, in memory.
const COUNTER: &str = "setsid sh -c 'i=0; while :; do i=$((i+1)); echo $i > /run/count.new; \
                       mv /run/count.new /run/count; sleep 0.05; done' \
                       </dev/null >/dev/null 2>&1 & echo $!";

/// What was put into a guest.
#[derive(Clone, Debug)]
pub(crate) struct Workload {
    counter: String,
    memory: String,
    disk: String,
    counted: u64,
}

impl Workload {
    /// Puts random data into memory and onto the disk, and starts counting.
    #[track_caller]
    pub(crate) fn start(api: &Api, id: &str, memory_mb: u32) -> Self {
        let counter = api.shell(id, COUNTER);
        let memory = api.shell(id, &fill("/run/fill", memory_mb));
        let disk = api.shell(id, &format!("{} && sync", fill("/root/fill", 2)));
        let counted = count(api, id);
        Self {
            counter,
            memory,
            disk,
            counted,
        }
    }

    /// Adds something new to memory and disk that earlier generations don't have.
    #[track_caller]
    pub(crate) fn change(&mut self, api: &Api, id: &str) {
        let part = |file: &str| {
            format!(
                "dd if=/dev/urandom of={file} bs=64k count=8 seek=$((RANDOM % 16)) conv=notrunc \
                 2>/dev/null; sha256sum < {file}"
            )
        };
        self.memory = api.shell(id, &part("/run/fill"));
        self.disk = api.shell(id, &format!("{} && sync", part("/root/fill")));
        self.counted = count(api, id);
    }

    /// Everything is there, and the same process counts on from where it was.
    #[track_caller]
    pub(crate) fn check(&mut self, api: &Api, id: &str) {
        let pid = &self.counter;
        let now: u64 = api
            .shell(id, &format!("kill -0 {pid} && cat /run/count"))
            .parse()
            .unwrap();
        assert!(now >= self.counted, "it counted back to {now}: {self:?}");
        api.shell(id, "sleep 0.2");
        let later = count(api, id);
        assert!(later > now, "it does not count any more: {later}");
        self.counted = later;
        let memory = api.shell(id, "sha256sum < /run/fill");
        assert_eq!(memory, self.memory, "memory");
        let disk = api.shell(
            id,
            "echo 1 > /proc/sys/vm/drop_caches && sha256sum < /root/fill",
        );
        assert_eq!(disk, self.disk, "disk");
    }

    /// Hash of what is in memory.
    pub(crate) fn memory(&self) -> &str {
        &self.memory
    }
}

#[track_caller]
fn count(api: &Api, id: &str) -> u64 {
    api.shell(id, "cat /run/count").parse().unwrap()
}

fn fill(file: &str, megabytes: u32) -> String {
    format!(
        "dd if=/dev/urandom of={file} bs=1M count={megabytes} 2>/dev/null && sha256sum < {file}"
    )
}
