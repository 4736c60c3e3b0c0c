//! Bodies held against Firecracker's own description of its API (Swagger 2.0), which is given by
//! `THAW_FIRECRACKER_API`: every path and method that we call, every member that we send.

use serde::Serialize;
use serde_json::{Value, json};
use yaml_rust2::{Yaml, YamlLoader};

use super::bodies::{
    Action, Balloon, BootSource, Drive, MachineConfig, MemoryBackend, Metadata, MmdsConfig,
    NetworkInterface, NetworkOverride, PartialDrive, SnapshotCreate, SnapshotLoad, VmState, Vsock,
};
use super::probe::WITH_REPORTING;
use crate::vmm::DiskLimits;
use crate::vmm::probing::number_of;
use crate::vmm::rate_limiter::RateLimiter;

/// The description.
struct Api(Yaml);

impl Api {
    fn parse(text: &str) -> Self {
        Self(YamlLoader::load_from_str(text).unwrap().remove(0))
    }

    /// Whether what it describes has free page reporting.
    fn has_reporting(&self) -> bool {
        let version = self.0["info"]["version"].as_str();
        version.and_then(number_of).unwrap() >= WITH_REPORTING
    }

    /// What is wrong with a request.
    fn faults(&self, method: &str, path: &str, body: &Value) -> Vec<String> {
        let call = &self.0["paths"][path][method];
        let parameters = call["parameters"].as_vec();
        let body_of = |parameter: &&Yaml| parameter["in"].as_str() == Some("body");
        let Some(schema) = parameters.and_then(|all| all.iter().find(body_of)) else {
            return vec![format!("{method} {path} takes no body")];
        };
        let mut faults = Vec::new();
        self.check(&schema["schema"], body, path, &mut faults);
        faults
    }

    fn check(&self, schema: &Yaml, value: &Value, at: &str, faults: &mut Vec<String>) {
        if let Some(reference) = schema["$ref"].as_str() {
            let name = reference.trim_start_matches("#/definitions/");
            let definition = &self.0["definitions"][name];
            if definition.is_badvalue() {
                faults.push(format!("{at}: no definition {name}"));
            }
            return self.check(definition, value, at, faults);
        }
        let is_it = match schema["type"].as_str() {
            Some("object") => value.is_object(),
            Some("array") => value.is_array(),
            Some("string") => value.is_string(),
            Some("boolean") => value.is_boolean(),
            Some("integer") => value.is_i64() || value.is_u64(),
            other => panic!("{at}: type {other:?} is not known here"),
        };
        if !is_it {
            faults.push(format!("{at}: {value} is no {:?}", schema["type"]));
        }
        let allowed = schema["enum"].as_vec();
        if allowed.is_some_and(|all| !all.iter().any(|one| one.as_str() == value.as_str())) {
            faults.push(format!("{at}: {value} is none of {:?}", schema["enum"]));
        }
        for (bound, wrong) in [("minimum", -1), ("maximum", 1)] {
            let (bound, number) = (schema[bound].as_i64(), value.as_i64());
            if let (Some(bound), Some(number)) = (bound, number)
                && number.cmp(&bound) as i32 == wrong
            {
                faults.push(format!("{at}: {number} is beyond {bound}"));
            }
        }
        for (n, item) in value.as_array().into_iter().flatten().enumerate() {
            self.check(&schema["items"], item, &format!("{at}[{n}]"), faults);
        }
        // An object without properties may have any.
        if let (Some(members), Some(known)) = (value.as_object(), schema["properties"].as_hash()) {
            for (name, member) in members {
                let at = format!("{at}.{name}");
                match known.get(&Yaml::String(name.clone())) {
                    Some(schema) => self.check(schema, member, &at, faults),
                    None => faults.push(format!("{at} is not known")),
                }
            }
            let required = schema["required"].as_vec().into_iter().flatten();
            for name in required.filter_map(Yaml::as_str) {
                if !members.contains_key(name) {
                    faults.push(format!("{at}.{name} is missing"));
                }
            }
        }
    }
}

/// Every request there is, with all members that this version is sent.
fn requests(free_page_reporting: bool) -> Vec<(&'static str, &'static str, Value)> {
    fn body(body: impl Serialize) -> Value {
        serde_json::to_value(body).unwrap()
    }
    let path = std::path::PathBuf::from;
    let limits = DiskLimits {
        bytes_per_s: Some(1 << 20),
        ops_per_s: Some(100),
    };
    let rate_limiter = RateLimiter::of(limits).unwrap();
    let mut all = vec![
        (
            "put",
            "/machine-config",
            body(MachineConfig {
                vcpu_count: 2,
                mem_size_mib: 512,
                smt: false,
                huge_pages: Some("2M"),
            }),
        ),
        (
            "put",
            "/boot-source",
            body(BootSource {
                kernel_image_path: path("/kernel"),
                initrd_path: Some(path("/initrd")),
                boot_args: "quiet".into(),
            }),
        ),
        (
            "put",
            "/drives/{drive_id}",
            body(Drive {
                drive_id: "rootfs",
                path_on_host: path("/disk"),
                is_root_device: false,
                is_read_only: false,
                cache_type: "Writeback",
                io_engine: "Sync",
                rate_limiter: Some(rate_limiter),
            }),
        ),
        (
            "patch",
            "/drives/{drive_id}",
            body(PartialDrive {
                drive_id: "rootfs",
                rate_limiter,
            }),
        ),
        (
            "put",
            "/vsock",
            body(Vsock {
                guest_cid: 3,
                uds_path: "/run/vsock.sock",
            }),
        ),
        (
            "put",
            "/network-interfaces/{iface_id}",
            body(NetworkInterface {
                iface_id: "eth0",
                host_dev_name: "tap0",
                guest_mac: "06:00:00:00:00:01",
            }),
        ),
        (
            "put",
            "/balloon",
            body(Balloon {
                amount_mib: 0,
                deflate_on_oom: true,
                free_page_reporting,
            }),
        ),
        (
            "put",
            "/mmds/config",
            body(MmdsConfig {
                version: "V2",
                network_interfaces: ["eth0"],
            }),
        ),
        (
            "put",
            "/mmds",
            body(Metadata {
                sandbox_id: "one".into(),
                template_id: "base".into(),
            }),
        ),
        (
            "put",
            "/actions",
            body(Action {
                action_type: "InstanceStart",
            }),
        ),
    ];
    for state in ["Paused", "Resumed"] {
        all.push(("patch", "/vm", body(VmState { state })));
    }
    for snapshot_type in ["Diff", "Full"] {
        let create = SnapshotCreate {
            snapshot_type,
            snapshot_path: path("/save/state"),
            mem_file_path: path("/save/memory"),
        };
        all.push(("put", "/snapshot/create", body(create)));
    }
    for backend_type in ["Uffd", "File"] {
        let load = SnapshotLoad {
            snapshot_path: path("/run/state"),
            mem_backend: MemoryBackend {
                backend_type,
                backend_path: path("/run/uffd.sock"),
            },
            resume_vm: true,
            network_overrides: vec![NetworkOverride {
                iface_id: "eth0",
                host_dev_name: "tap0",
            }],
        };
        all.push(("put", "/snapshot/load", body(load)));
    }
    all
}

#[test]
fn bodies_are_as_firecracker_describes_them() {
    let Some(file) = std::env::var_os("THAW_FIRECRACKER_API") else {
        println!(
            "skipped: bodies_are_as_firecracker_describes_them: no description given \
             (THAW_FIRECRACKER_API)"
        );
        return;
    };
    let api = Api::parse(&std::fs::read_to_string(file).unwrap());
    for (method, path, body) in requests(api.has_reporting()) {
        let faults = api.faults(method, path, &body);
        assert_eq!(faults, Vec::<String>::new(), "{method} {path} {body}");
    }
}

/// The checks above find something.
#[test]
fn what_is_not_described_is_found() {
    let api = Api::parse(
        "paths:\n  /a:\n    put:\n      parameters:\n        - in: body\n          schema:\n            \
         $ref: '#/definitions/A'\ndefinitions:\n  A:\n    type: object\n    required: [n]\n    \
         properties:\n      n:\n        type: integer\n        minimum: 3\n      s:\n        \
         type: string\n        enum: [x]\n      l:\n        type: array\n        items:\n          \
         type: boolean\n",
    );
    let wrong = |body: Value| api.faults("put", "/a", &body).len();
    assert_eq!(wrong(json!({ "n": 3, "s": "x", "l": [true] })), 0);
    for body in [
        json!({}),
        json!({ "n": 2 }),
        json!({ "n": "3" }),
        json!({ "n": 3, "s": "y" }),
        json!({ "n": 3, "l": [1] }),
        json!({ "n": 3, "m": 1 }),
    ] {
        assert_eq!(wrong(body.clone()), 1, "{body}");
    }
    assert_eq!(api.faults("patch", "/a", &json!({ "n": 3 })).len(), 1);
    assert_eq!(api.faults("put", "/b", &json!({})).len(), 1);
}
