//! Client packages of others, installed below the target directory; the tests of `appliance` use them,
//! too.

#![allow(dead_code, reason = "every test binary uses a part of it")]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A program, and the directory in which its script has to be, if that matters.
pub(crate) struct Client {
    pub(crate) program: PathBuf,
    pub(crate) scripts: Option<PathBuf>,
    pub(crate) version: String,
}

impl Client {
    /// Where a script has to be for this client.
    pub(crate) fn script(&self, source: &Path) -> PathBuf {
        let Some(directory) = &self.scripts else {
            return source.to_owned();
        };
        let copy = directory.join(source.file_name().expect("a file"));
        fs::copy(source, &copy).expect("the script is copied");
        copy
    }

    /// Shows what a script printed, which has to have gone through; it used this package.
    #[track_caller]
    pub(crate) fn passed(&self, package: &str, output: &Output) {
        let printed = String::from_utf8_lossy(&output.stdout);
        print!("{package} {}\n{printed}", self.version);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
    }
}

/// A Python that has the package.
pub(crate) fn python(name: &str, package: &str) -> Result<Client, String> {
    python_by(Path::new("python3"), name, package)
}

/// A Python of this version or later that has the package.
pub(crate) fn python_since(
    version: (u32, u32),
    name: &str,
    package: &str,
) -> Result<Client, String> {
    let (major, minor) = version;
    let is_new = format!("import sys; sys.exit(sys.version_info < ({major}, {minor}))");
    // Those that distributions name, and those that pyenv keeps.
    let named = (minor..minor + 4).rev();
    let mut programs: Vec<PathBuf> = named.map(|m| format!("python{major}.{m}").into()).collect();
    programs.push("python3".into());
    if let Ok(root) = output(Command::new("pyenv").arg("root")) {
        let versions = fs::read_dir(Path::new(&root).join("versions"));
        let versions = versions.into_iter().flatten().flatten();
        programs.extend(versions.map(|entry| entry.path().join("bin/python3")));
    }
    let fits = |program: &&PathBuf| output(Command::new(program).args(["-c", &is_new])).is_ok();
    let program = programs.iter().find(fits);
    let program = program.ok_or_else(|| format!("no Python {major}.{minor} or later"))?;
    python_by(program, name, package)
}

fn python_by(python: &Path, name: &str, package: &str) -> Result<Client, String> {
    let (home, _lock) = place(&format!("python-{name}"));
    let program = home.join("bin/python3");
    // One without pip is what a Debian without python3-venv makes before it fails.
    if !home.join("bin/pip").exists() {
        let mut make = Command::new(python);
        let made = output(make.args(["-m", "venv", "--clear"]).arg(&home));
        made.map_err(|e| format!("no Python with venv (apt-get install python3-venv): {e}"))?;
    }
    let mut install = Command::new(&program);
    install.args([
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
    ]);
    let installed = output(install.args(["--upgrade", package]));
    let bare = package.split_once("==").map_or(package, |(bare, _)| bare);
    let ask = format!("import importlib.metadata as m; print(m.version('{bare}'))");
    match output(Command::new(&program).args(["-c", &ask])) {
        Ok(version) => Ok(Client {
            program,
            scripts: None,
            version,
        }),
        Err(_) => {
            let reason = installed.unwrap_or_else(|e| e);
            Err(format!("pip can't install {package}: {reason}"))
        }
    }
}

/// node, and a directory with these packages; the version is that of `main`.
pub(crate) fn javascript(packages: &[&str], main: &str) -> Result<Client, String> {
    let (home, _lock) = place(&format!("javascript-{}", main.replace(['@', '/'], "")));
    fs::create_dir_all(&home).map_err(|e| e.to_string())?;
    fs::write(home.join("package.json"), r#"{"private":true}"#).map_err(|e| e.to_string())?;
    let mut install = Command::new("npm");
    install.args(["install", "--silent", "--no-audit", "--no-fund"]);
    let installed = output(install.args(packages).current_dir(&home));
    let package = home.join("node_modules").join(main).join("package.json");
    let Ok(package) = fs::read_to_string(package) else {
        let reason = installed.unwrap_or_else(|e| e);
        return Err(format!(
            "npm can't install {main} (apt-get install npm): {reason}"
        ));
    };
    let package: serde_json::Value = serde_json::from_str(&package).map_err(|e| e.to_string())?;
    Ok(Client {
        program: PathBuf::from("node"),
        scripts: Some(home),
        version: package["version"].as_str().unwrap_or_default().to_owned(),
    })
}

/// Where a client is installed; one test at a time, until the lock is dropped.
fn place(name: &str) -> (PathBuf, File) {
    let all = Path::new(env!("CARGO_TARGET_TMPDIR")).join("clients");
    fs::create_dir_all(&all).expect("a directory for the clients");
    let lock = File::create(all.join(format!("{name}.lock"))).expect("a lock");
    lock.lock().expect("the lock");
    (all.join(name), lock)
}

/// Standard output, or the last line of what a failed program said.
fn output(command: &mut Command) -> Result<String, String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|e| e.to_string())?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned());
    }
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).trim().to_owned();
    Err(said.lines().last().unwrap_or("failed").to_owned())
}
