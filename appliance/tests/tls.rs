//! Listeners that speak TLS, from outside: the command line against a daemon with its own authority
//! or with the operator's files, and E2B's client with names below a domain.

mod support;

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use support::daemon::Daemon;
use support::place::Place;
use support::{clients, needs, skip};

/// Ports that nobody listens on.
fn free_ports<const N: usize>() -> [u16; N] {
    // All are held until all are known.
    let held = [(); N].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    held.map(|port| port.local_addr().unwrap().port())
}

/// `thaw ARGS` with this in its environment and nothing else of ours.
fn thaw(args: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = Command::new(needs::thaw());
    command.args(args).envs(environment.iter().copied());
    command.stdin(Stdio::null()).output().unwrap()
}

fn error(output: &Output) -> String {
    assert!(!output.status.success());
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn good(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn token(place: &Place) -> String {
    let config = place.config.to_str().unwrap();
    let made = thaw(&["token", "create", "--config", config], &[]);
    good(&made).trim().to_owned()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn a_host_is_its_own_authority_and_the_command_line_believes_it() {
    let test = "a_host_is_its_own_authority_and_the_command_line_believes_it";
    if let Err(reason) = needs::for_daemons() {
        return skip(test, &reason);
    }
    let place = Place::new("ttls", 52, None);
    let [port, other] = free_ports();
    let listen = format!(
        "require_token = true\nlisten_tls = [\"127.0.0.1:{port}\"]\nlisten = [\"127.0.0.1:{other}\"]"
    );
    place.reconfigure(&[("listen = []", &listen)]);
    let token = token(&place);
    let daemon = Daemon::start(&place);
    let kept = place.data.join("tls");
    assert_eq!(mode(&kept), 0o700);
    assert_eq!(mode(&kept.join("authority.pem")), 0o600);
    assert_eq!(mode(&kept.join("leaf.pem")), 0o600);

    let url = format!("https://localhost:{port}");
    let ca = kept.join("ca.pem");
    let ca = ca.to_str().unwrap();
    let with = [("THAW_URL", &*url), ("THAW_CA", ca), ("THAW_TOKEN", &token)];
    let host = good(&thaw(&["host"], &with));
    assert!(host.contains("status     ready"), "{host}");
    // By its address, too.
    let by_address = format!("https://127.0.0.1:{port}");
    let listed = thaw(&["ls", "--json", "--url", &by_address], &with);
    assert_eq!(good(&listed).trim(), "[]");
    let without = error(&thaw(&["host"], &with[..2]));
    assert!(without.contains("A token is needed"), "{without}");
    // Plain HTTP has the same token, and a listener of TLS doesn't speak it.
    let plain = format!("http://127.0.0.1:{other}");
    good(&thaw(&["host", "--url", &plain], &with));
    let plain = format!("http://127.0.0.1:{port}");
    error(&thaw(&["host", "--url", &plain], &with));
    // Nobody else's authority will do, and neither do those that the system trusts.
    let stranger = CertifiedIssuer::self_signed(authority(), KeyPair::generate().unwrap()).unwrap();
    let file = place.root.join("stranger.pem");
    fs::write(&file, stranger.pem()).unwrap();
    let wrong = [("THAW_CA", file.to_str().unwrap()), with[0], with[2]];
    for environment in [&wrong[..], &[with[0], with[2]]] {
        let refused = error(&thaw(&["host"], environment));
        assert!(refused.contains("UnknownIssuer"), "{refused}");
    }
    // The same authority after another start, whose certificate is for other names by then.
    let before = fs::read(kept.join("leaf.pem")).unwrap();
    daemon.stop();
    place.reconfigure(&[("[traffic]", "[tls]\ndomain = \"thaw.test\"\n[traffic]")]);
    let daemon = Daemon::start(&place);
    assert_ne!(fs::read(kept.join("leaf.pem")).unwrap(), before);
    good(&thaw(&["host"], &with));
    // Somebody who says nothing is in nobody's way.
    let _silent = TcpStream::connect(("127.0.0.1", port)).unwrap();
    good(&thaw(&["host"], &with));
    daemon.stop();
}

fn authority() -> CertificateParams {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params
}

#[test]
fn files_of_the_operators_and_certificates_of_clients() {
    let test = "files_of_the_operators_and_certificates_of_clients";
    if let Err(reason) = needs::for_daemons() {
        return skip(test, &reason);
    }
    let place = Place::new("ttlsm", 53, None);
    let ours = CertifiedIssuer::self_signed(authority(), KeyPair::generate().unwrap()).unwrap();
    let file = |name: &str, text: String| {
        let path = place.root.join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let sign = |name: &str| {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let signed = params.signed_by(&key, &ours).unwrap();
        let names = [format!("{name}.pem"), format!("{name}.key")];
        [
            file(&names[0], signed.pem()),
            file(&names[1], key.serialize_pem()),
        ]
    };
    let ca = file("ca.pem", ours.pem());
    let (host, client) = (sign("localhost"), sign("client"));
    let [port] = free_ports();
    let listen = format!(
        "require_token = true\nlisten_tls = [\"127.0.0.1:{port}\"]\nclient_ca = \"{ca}\"\n\
         client_certificates = \"demand\"\nlisten = []"
    );
    let tls = format!(
        "[tls]\ncertificate = \"{}\"\nkey = \"{}\"\n[traffic]",
        host[0], host[1]
    );
    place.reconfigure(&[("listen = []", &listen), ("[traffic]", &tls)]);
    let token = token(&place);
    let daemon = Daemon::start(&place);
    assert!(!place.data.join("tls").exists(), "no authority is needed");

    let url = format!("https://localhost:{port}");
    let with = [("THAW_URL", &*url), ("THAW_CA", &*ca)];
    let certified = ["host", "--cert", &client[0], "--key", &client[1]];
    good(&thaw(&certified, &with));
    // Where certificates are demanded, a token doesn't help.
    let uncertified = thaw(&["host", "--token", &token], &with);
    let refused = error(&uncertified);
    assert!(refused.contains("CertificateRequired"), "{refused}");
    daemon.stop();

    place.reconfigure(&[("\"demand\"", "\"accept\"")]);
    let daemon = Daemon::start(&place);
    good(&thaw(&certified, &with));
    good(&thaw(&["host", "--token", &token], &with));
    let refused = error(&thaw(&["host"], &with));
    assert!(refused.contains("A token is needed"), "{refused}");
    daemon.stop();

    // A key that is another's is told at the start, by its file.
    place.reconfigure(&[(&host[1], &client[1])]);
    let config = place.config.to_str().unwrap();
    let started = support::daemon::run(&["serve", "--config", config]);
    let said = error(&started);
    assert!(
        said.contains("localhost.pem") && said.contains("doesn't go with its key"),
        "{said}"
    );
}

#[test]
fn guest_e2b_python_below_a_domain() {
    let test = "guest_e2b_python_below_a_domain";
    let inputs = match needs::for_guests() {
        Ok(inputs) => inputs,
        Err(reason) => return skip(test, &reason),
    };
    let python = match clients::python("newest", "e2b") {
        Ok(python) => python,
        Err(reason) => return skip(test, &reason.replace('\n', " ")),
    };
    let _turn = needs::one_at_a_time();
    let place = Place::new("ttlsd", 54, Some(&inputs));
    let [api, traffic] = free_ports();
    let listen = format!("require_token = true\nlisten_tls = [\"127.0.0.1:{api}\"]\nlisten = []");
    let passing = format!(
        "[tls]\ndomain = \"thaw.test\"\n[traffic]\nlisten_tls = [\"127.0.0.1:{traffic}\"]\nlisten=[]"
    );
    place.reconfigure(&[("listen = []", &listen), ("[traffic]\nlisten=[]", &passing)]);
    let token = token(&place);
    let daemon = Daemon::start(&place);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/domain_client.py");
    let hosts = place.root.join("hosts");
    fs::write(&hosts, "127.0.0.1 localhost api.thaw.test\n").unwrap();
    // A mount namespace of its own, in which /etc/hosts is ours.
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c"])
        .arg("mount --bind \"$1\" /etc/hosts && exec timeout 600 \"$2\" \"$3\"")
        .arg("sh")
        .args([&hosts, &python.program, &script])
        .env("E2B_API_KEY", &token)
        .env("E2B_API_URL", format!("https://api.thaw.test:{api}"))
        .env("E2B_DOMAIN", format!("thaw.test:{traffic}"))
        .env("SSL_CERT_FILE", place.data.join("tls/ca.pem"))
        .output()
        .unwrap();
    python.passed("e2b", &output);
    assert_eq!(place.leftovers(), Vec::<String>::new());
    daemon.stop();
}
