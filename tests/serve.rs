//! `wgrad serve` by raw HTTP: what it answers, and above all what it refuses.

mod common;

use assert_cmd::cargo::cargo_bin;
use image::{DynamicImage, GrayImage, ImageFormat};
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Cursor, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

/// A folder with a run of the small model.
struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Bench {
        let folder = tempfile::tempdir().unwrap();
        common::write_model_and_data(folder.path());
        let bench = Bench { folder };
        let trained = bench
            .command("train --model small.toml --data shapes --device cpu --out run")
            .output()
            .unwrap();
        assert!(trained.status.success(), "{trained:?}");
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(cargo_bin("wgrad"));
        command
            .current_dir(self.folder.path())
            .env_remove("RUST_LOG")
            .env_remove("COLUMNS")
            .args(arguments.split_whitespace());
        command
    }

    fn serve(&self, arguments: &str) -> Server {
        let mut child = self
            .command(&format!("serve {arguments} --port 0"))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let mut server = Server {
            child,
            out,
            said: String::new(),
            port: 0,
        };
        while server.port == 0 {
            let from = server.said.len();
            if server.out.read_line(&mut server.said).unwrap() == 0 {
                let mut err = String::new();
                let stderr = server.child.stderr.take();
                stderr.unwrap().read_to_string(&mut err).unwrap();
                panic!("{}{err}", server.said);
            }
            if let Some(address) = server.said[from..].strip_prefix("serving   http://") {
                let port = address.split(['/', ':']).nth(1);
                server.port = port.unwrap().parse().unwrap();
            }
        }
        server
    }
}

struct Server {
    child: Child,
    out: BufReader<ChildStdout>,
    said: String,
    port: u16,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Answer {
    fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    fn json(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text());
        serde_json::from_slice(&self.body).unwrap()
    }

    /// Asserts a refusal, in one line that says `why`.
    fn refuses(&self, status: u16, why: &str) {
        assert_eq!(self.status, status, "{}{}", self.head, self.text());
        assert_eq!(self.text().lines().count(), 1, "{}", self.text());
        assert!(self.text().contains(why), "no {why:?} in {}", self.text());
    }
}

impl Server {
    /// Sends these bytes and reads to the end.
    fn raw(&self, request: &[u8]) -> Answer {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        // Who is refused early need not be listened to.
        let _ = stream.write_all(request);
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        let at = bytes
            .windows(4)
            .position(|w| w == b"\r\n\r\n")
            .expect("an answer");
        let head = String::from_utf8(bytes[..at].to_vec()).unwrap();
        Answer {
            status: head.split(' ').nth(1).unwrap().parse().unwrap(),
            head: head.to_ascii_lowercase(),
            body: bytes[at + 4..].to_vec(),
        }
    }

    /// A request with these lines in its head, to the right host unless they name another.
    fn ask(&self, method: &str, path: &str, lines: &[&str], body: &[u8]) -> Answer {
        let mut head = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n");
        if !lines.iter().any(|line| line.starts_with("Host:")) {
            head += &format!("Host: 127.0.0.1:{}\r\n", self.port);
        }
        if !body.is_empty() {
            head += &format!("Content-Length: {}\r\n", body.len());
        }
        for line in lines {
            head += &format!("{line}\r\n");
        }
        self.raw(&[head.as_bytes(), b"\r\n", body].concat())
    }

    fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, &[], b"")
    }

    fn post(&self, body: &[u8]) -> Answer {
        self.ask("POST", "/api/predict", &[], body)
    }
}

fn png(picture: &DynamicImage) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    picture.write_to(&mut bytes, ImageFormat::Png).unwrap();
    bytes.into_inner()
}

/// Some test image.
fn picture() -> Vec<u8> {
    let (pixels, _) = common::images(1, 2);
    png(&GrayImage::from_raw(6, 8, pixels).unwrap().into())
}

#[test]
fn the_page_is_whole_and_links_nowhere() {
    let bench = Bench::new();
    let server = bench.serve("run");
    assert!(server.said.contains("(Ctrl-C ends it)"), "{}", server.said);
    for (path, kind) in [
        ("/", "text/html"),
        ("/page.css", "text/css"),
        ("/page.js", "text/javascript"),
        ("/api/run", "application/json"),
    ] {
        let answer = server.get(path);
        assert_eq!(answer.status, 200, "{path}");
        for line in [
            &format!("content-type: {kind}")[..],
            "content-security-policy: default-src 'none'; script-src 'self';",
            "x-content-type-options: nosniff",
            "referrer-policy: no-referrer",
            "cross-origin-resource-policy: same-origin",
        ] {
            assert!(
                answer.head.contains(line),
                "{path}: no {line} in {}",
                answer.head
            );
        }
        // Names of namespaces are no links.
        let links = answer.text().replace("http://www.w3.org/2000/svg", "");
        let links = links.replace("http://localhost or", "");
        assert!(
            !links.contains("http:") && !links.contains("https:"),
            "{path}"
        );
        let head = server.ask("HEAD", path, &[], b"");
        assert_eq!((head.status, head.body.len()), (200, 0), "{path}");
    }
    let run = server.get("/api/run").json();
    assert_eq!(run["run"], "run");
    assert_eq!(run["class_names"].as_array().unwrap().len(), 4);
    assert_eq!(run["draws"], false);
    // Nothing tells where on this machine it is.
    let folder = bench.folder.path().to_str().unwrap();
    assert!(!run.to_string().contains(folder), "{run}");
    let metrics = server.get("/api/metrics").json();
    assert_eq!(metrics["epochs"].as_array().unwrap().len(), 3);
    assert!(!metrics["steps"].as_array().unwrap().is_empty());
    assert_eq!(
        (&metrics["planned"], &metrics["training"]),
        (&3.into(), &false.into())
    );
}

#[test]
fn answers_are_those_of_predict() {
    let bench = Bench::new();
    let server = bench.serve("run");
    let bytes = picture();
    fs::write(bench.path("a.png"), &bytes).unwrap();
    for invert in ["auto", "always"] {
        let served = server
            .ask(
                "POST",
                &format!("/api/predict?invert={invert}"),
                &[],
                &bytes,
            )
            .json();
        let said = bench
            .command(&format!(
                "predict run a.png --json --top 4 --device cpu --invert {invert}"
            ))
            .output()
            .unwrap();
        let said: Value = serde_json::from_slice(&said.stdout).unwrap();
        let classes = said["pictures"][0]["classes"].as_array().unwrap();
        assert_eq!(classes.len(), 4);
        for class in classes {
            let k = class["class"].as_u64().unwrap() as usize;
            assert_eq!(served["shares"][k], class["share"], "{served}");
        }
        assert_eq!(served["inverted"], invert == "always");
        assert_eq!(served["epoch"], 3);
        let (pixels, _) = common::images(1, 2);
        let seen = pixels.iter().map(|byte| match invert {
            "always" => format!("{:02x}", 255 - byte),
            _ => format!("{byte:02x}"),
        });
        assert_eq!(served["seen"], seen.collect::<String>());
        let layers = served["layers"].as_array().unwrap();
        let last = layers.last().unwrap();
        assert_eq!((&last["channels"], &last["height"]), (&4.into(), &1.into()));
        for layer in layers {
            let size = ["height", "width", "shown"].map(|key| layer[key].as_u64().unwrap());
            let digits = layer["values"].as_str().unwrap().len() as u64;
            assert_eq!(digits, 2 * size.iter().product::<u64>(), "{layer}");
        }
        // The last layer's largest value is the class with the largest share.
        let values = last["values"].as_str().unwrap();
        let best = classes[0]["class"].as_u64().unwrap() as usize;
        assert_eq!(&values[2 * best..2 * best + 2], "ff", "{values}");
    }
}

#[test]
fn other_hosts_and_other_sites_are_refused() {
    let bench = Bench::new();
    let server = bench.serve("run");
    let port = server.port;
    let picture = picture();
    let rebound = format!("Host: evil.example:{port}");
    let other_port = format!("Host: 127.0.0.1:{}", port ^ 1);
    for host in [&rebound[..], &other_port, "Host: 127.0.0.1", "Host:"] {
        for path in ["/", "/api/run", "/api/metrics", "/nothing"] {
            server
                .ask("GET", path, &[host], b"")
                .refuses(403, "another host");
        }
        server
            .ask("POST", "/api/predict", &[host], &picture)
            .refuses(403, "another host");
    }
    server
        .raw(b"GET / HTTP/1.0\r\n\r\n")
        .refuses(403, "another host");
    let two = format!("Host: 127.0.0.1:{port}");
    let answer = server.ask("GET", "/", &[&two, &rebound], b"");
    assert!([400, 403].contains(&answer.status), "{}", answer.head);

    let own = format!("Origin: http://127.0.0.1:{port}");
    let foreign = format!("Origin: http://127.0.0.1:{}", port ^ 1);
    for line in [
        &foreign[..],
        "Origin: https://evil.example",
        "Origin: null",
        "Sec-Fetch-Site: cross-site",
        "Sec-Fetch-Site: same-site",
    ] {
        server
            .ask("POST", "/api/predict", &[line], &picture)
            .refuses(403, "another site");
        server
            .ask("GET", "/api/run", &[line], b"")
            .refuses(403, "another site");
    }
    // What a page of another site opens it may open, but not send to.
    let link = ["Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate"];
    assert_eq!(server.ask("GET", "/", &link, b"").status, 200);
    server
        .ask("POST", "/api/predict", &link, &picture)
        .refuses(403, "another site");
    let page = [
        &own[..],
        "Sec-Fetch-Site: same-origin",
        "Sec-Fetch-Mode: cors",
    ];
    server.ask("POST", "/api/predict", &page, &picture).json();
    let localhost = [
        &format!("Host: localhost:{port}")[..],
        &format!("Origin: http://localhost:{port}"),
    ];
    server
        .ask("POST", "/api/predict", &localhost, &picture)
        .json();
}

#[test]
fn nothing_else_is_served() {
    let bench = Bench::new();
    let server = bench.serve("run");
    for path in [
        "/run.json",
        "/../run.json",
        "/%2e%2e/run.json",
        "/api/../run.json",
        "/..%2frun.json",
        "//etc/passwd",
        "/page.js/../../run.json",
        "/api",
        "/api/",
        "/index.html",
    ] {
        server.get(path).refuses(404, "nothing is served here");
    }
    for (method, path, allowed) in [
        ("POST", "/", "get, head"),
        ("PUT", "/api/run", "get, head"),
        ("GET", "/api/predict", "post"),
        ("DELETE", "/api/predict", "post"),
    ] {
        let answer = server.ask(method, path, &[], b"");
        answer.refuses(405, "found another method");
        assert!(
            answer.head.contains(&format!("allow: {allowed}")),
            "{}",
            answer.head
        );
    }
    server
        .ask("POST", "/api/predict?invert=perhaps", &[], &picture())
        .refuses(400, "?invert=");
    server
        .ask("POST", "/api/predict?x=y", &[], &picture())
        .refuses(400, "?invert=");
}

#[test]
fn what_is_too_large_or_no_picture_is_refused() {
    let bench = Bench::new();
    let server = bench.serve("run");
    let host = format!("Host: 127.0.0.1:{}\r\nConnection: close\r\n", server.port);
    // Said before it is sent, and found out while it is.
    let head = format!("POST /api/predict HTTP/1.1\r\n{host}Content-Length: 40000000\r\n\r\n");
    server.raw(head.as_bytes()).refuses(413, "32 MiB at most");
    let mut request = format!(
        "POST /api/predict HTTP/1.1\r\n{host}Transfer-Encoding: chunked\r\n\r\n2000001\r\n"
    )
    .into_bytes();
    request.resize(request.len() + 0x0200_0001, 7);
    let mut stream = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
    let _ = stream.write_all(&request);
    let mut answer = [0; 64];
    let read = stream.read(&mut answer).unwrap_or(0);
    let answer = String::from_utf8_lossy(&answer[..read]);
    assert!(
        answer.is_empty() || answer.starts_with("HTTP/1.1 413 "),
        "{answer}"
    );

    let picture = picture();
    server
        .post(b"no picture")
        .refuses(422, "not a picture of a known format");
    server
        .post(&picture[..picture.len() / 2])
        .refuses(422, "cannot be read");
    server
        .ask("POST", "/api/predict", &["Content-Length: 0"], b"")
        .refuses(422, "cannot be read");
    // A few bytes that promise 169 million pixels, more than the server unpacks: width and height and their checksum.
    let mut bomb = picture.clone();
    for at in [16, 20] {
        bomb[at..at + 4].copy_from_slice(&13_000u32.to_be_bytes());
    }
    let mut sum = flate2::Crc::new();
    sum.update(&bomb[12..29]);
    bomb[29..33].copy_from_slice(&sum.sum().to_be_bytes());
    let started = Instant::now();
    server.post(&bomb).refuses(422, "13000×13000 pixels");
    assert!(started.elapsed() < Duration::from_secs(5));
    // It goes on.
    server.post(&picture).json();
}

/// The weights are those that are on disk, and a run may still be trained.
#[test]
fn a_training_in_progress_is_shown() {
    let bench = Bench::new();
    let mut training = bench
        .command("train --model small.toml --data shapes --device cpu --epochs 5000 --out live")
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while !bench.path("live/model.safetensors").exists() {
        assert!(Instant::now() < deadline && training.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(5));
    }
    let server = bench.serve("live");
    let first = server.post(&picture()).json();
    let state = server.get("/api/metrics").json();
    assert_eq!(state["training"], true, "{state}");
    let epoch = |answer: &Value| answer["epoch"].as_u64().unwrap();
    loop {
        let next = server.post(&picture()).json();
        if epoch(&next) > epoch(&first) {
            break;
        }
        assert!(Instant::now() < deadline, "{next}");
    }
    // The weights are written first.
    while server.get("/api/metrics").json()["finished"].as_u64() <= state["finished"].as_u64() {
        assert!(Instant::now() < deadline, "{state}");
    }
    training.kill().unwrap();
    training.wait().unwrap();
    assert_eq!(server.get("/api/metrics").json()["training"], false);
}

#[test]
fn misuse_is_refused() {
    let bench = Bench::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    fs::create_dir(bench.path("begun")).unwrap();
    fs::copy(bench.path("run/run.json"), bench.path("begun/run.json")).unwrap();
    for (arguments, code, expected) in [
        (
            format!("serve run --port {port}"),
            2,
            "choose another --port",
        ),
        ("serve run --address example.org".into(), 2, "--address"),
        (
            "serve run --address 203.0.113.7".into(),
            2,
            "an address of this machine",
        ),
        ("serve run --weights best".into(), 2, "validation split"),
        ("serve shapes".into(), 1, "run.json"),
        ("serve begun --port 0".into(), 1, "expected trained weights"),
    ] {
        let output = bench.command(&arguments).output().unwrap();
        let err = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments}: {err}");
        assert_eq!(err.lines().count(), 1, "{arguments}: {err}");
        assert!(err.contains(expected), "{arguments}: {err}");
    }
    let open = bench.serve("run --address 0.0.0.0");
    let said = open.said.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(
        said.contains("warning: everybody who reaches 0.0.0.0:"),
        "{said}"
    );
    assert!(
        said.contains(&format!("serving http://127.0.0.1:{}/", open.port)),
        "{said}"
    );
    assert_eq!(open.get("/").status, 200);
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_it_in_good_order() {
    let bench = Bench::new();
    let before = common::contents(&bench.path("run"));
    let mut server = bench.serve("run");
    server.post(&picture()).json();
    // A client that stays connected does not keep it.
    let _idle = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
    let pid = server.child.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-INT", &pid])
            .status()
            .unwrap()
            .success()
    );
    let status = server.child.wait().unwrap();
    assert_eq!(status.code(), Some(0));
    let mut rest = String::new();
    server.out.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "stopped\n");
    // Whoever only looks changes nothing.
    assert_eq!(common::contents(&bench.path("run")), before);
    assert!(!Path::new(&bench.path("run/serve")).exists());
}
