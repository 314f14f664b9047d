//! `wgrad serve`: a page on this machine to draw for a trained network and to watch a training.
//!
//! A page anywhere on the web can send requests to a server on this machine. So what is not addressed to
//! the address that is served is refused (a name of the attacker's that leads here: DNS rebinding), and so
//! is what a page of another origin sends. Nothing but what is listed in [`Site::answer`] is served; no
//! part of a request becomes a path. A picture is bounded in bytes and in pixels, and one is looked at at
//! a time.

use super::device::Device;
use super::signals::Signals;
use super::{say, say_wrapped};
use crate::cli::ServeArgs;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body, Bytes, Incoming};
use hyper::header::{
    ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HOST, HeaderMap,
    HeaderName, HeaderValue, ORIGIN, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use hyper::http::uri::Authority;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Value, json};
use std::convert::Infallible;
use std::fs;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use tokio::time::timeout;
use wgrad::data::{Invert, Picture, read_picture};
use wgrad::engine::{Activation, activations};
use wgrad::gpu::Gpu;
use wgrad::predict::Predictor;
use wgrad::train::{Run, Weights};
use wgrad::{Error, Result};

/// The port unless one is asked for, or one of the next ones where it is taken.
const PORT: u16 = 8471;
const PORTS: u16 = 20;

/// Largest body of a request, and what a picture in it may unpack to (48 million pixels in colour).
const BODY: usize = 32 << 20;
const UNPACKED: u64 = 144 << 20;

/// How long a request may take to arrive, its head and its body.
const HEAD_TIME: Duration = Duration::from_secs(10);
const BODY_TIME: Duration = Duration::from_secs(30);

/// Connections at a time.
const CONNECTIONS: usize = 64;

/// Most channels of a layer that are shown, and most of their values.
const CHANNELS: usize = 32;
const VALUES: usize = 1 << 16;

/// Most points of a curve.
const POINTS: usize = 2000;

/// Nothing from elsewhere, nothing inline, no frames.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const HTML: &str = include_str!("serve/page.html");
const STYLE: &str = include_str!("serve/page.css");
const SCRIPT: &str = include_str!("serve/page.js");

pub fn run(args: &ServeArgs) -> Result<()> {
    let run = Run::open(&args.run)?;
    let device = Device::open(&args.device)?;
    let signals = Signals::catch()?;
    let stop = signals.hold();
    let (listener, note) = listen(args.address, args.port)?;
    let served = listener
        .local_addr()
        .map_err(|e| Error::io("serve", Path::new("a port"), e))?;
    let site = Site {
        folder: args.run.clone(),
        which: args.weights.which,
        gpu: device.gpu().cloned(),
        served,
        ready: Mutex::new(None),
    };
    if let Some(notice) = device.notice() {
        say_wrapped(notice)?;
    }
    if let Some(note) = note {
        say_wrapped(&note)?;
    }
    if !served.ip().is_loopback() {
        say_wrapped(&format!(
            "warning: everybody who reaches {served} can use this page; there are no passwords"
        ))?;
    }
    // What is wrong with the weights is said now; those of a training may be still to come.
    if let Err(e) = site.expect_weights(&run) {
        if run.is_being_trained() {
            say_wrapped("weights   none yet: the page predicts when the first epoch is finished")?;
        } else {
            return Err(e);
        }
    }
    say(&format!(
        "serving   http://{served}/  (Ctrl-C ends it)",
        served = shown(served)
    ))?;
    let failed = |e| Error::io("serve", &args.run, e);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(failed)?;
    runtime
        .block_on(serve(listener, Arc::new(site), stop))
        .map_err(failed)?;
    // A prediction that is under way ends.
    runtime.shutdown_timeout(Duration::from_secs(5));
    say("stopped")
}

/// The address as a browser on this machine takes it.
fn shown(served: SocketAddr) -> SocketAddr {
    let ip = match served.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::from([127, 0, 0, 1]),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]),
        ip => ip,
    };
    SocketAddr::new(ip, served.port())
}

/// Listens on the port, or without one on the first free one from [`PORT`] on, which a note says.
///
/// # Errors
/// [`Error::Usage`] for a port that is taken or an address that is not this machine's.
fn listen(address: IpAddr, port: Option<u16>) -> Result<(TcpListener, Option<String>)> {
    let ports = port.map_or(PORT..=PORT + PORTS, |port| port..=port);
    let mut last = None;
    for port in ports {
        match TcpListener::bind((address, port)) {
            Ok(listener) => {
                let note =
                    last.map(|_| format!("port      {PORT} is taken; --port chooses another"));
                return Ok((listener, note));
            }
            Err(e) => last = Some(e),
        }
    }
    let why = last.map_or(String::new(), |e| e.to_string());
    Err(Error::Usage(format!(
        "expected an address of this machine with a free port, found that {} cannot be used: {why}; choose another --port (0 takes any free one) or --address",
        SocketAddr::new(address, port.unwrap_or(PORT))
    )))
}

/// Answers until `stop`.
async fn serve(listener: TcpListener, site: Arc<Site>, stop: &AtomicBool) -> std::io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let open = Arc::new(());
    while !stop.load(Ordering::SeqCst) {
        let stream = match timeout(Duration::from_millis(100), listener.accept()).await {
            Ok(Ok((stream, _))) if Arc::strong_count(&open) <= CONNECTIONS => stream,
            // Too many, or nobody.
            Ok(Ok(_)) | Err(_) => continue,
            // The system has no room for another connection, say.
            Ok(Err(_)) => {
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (site, open) = (site.clone(), open.clone());
        tokio::spawn(async move {
            let service = service_fn(|request| {
                let site = site.clone();
                async move { Ok::<_, Infallible>(dressed(site.answer(request).await)) }
            });
            let mut builder = http1::Builder::new();
            builder
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIME);
            // A client that goes away is its own affair.
            let _ = builder
                .serve_connection(TokioIo::new(stream), service)
                .await;
            drop(open);
        });
    }
    Ok(())
}

type Answer = Response<Full<Bytes>>;

/// A body with its type.
fn answer(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    let kind = HeaderValue::from_static(kind);
    answer.headers_mut().insert(CONTENT_TYPE, kind);
    answer
}

/// Says in one line why not.
fn refused(status: StatusCode, why: &str) -> Answer {
    answer(status, "text/plain; charset=utf-8", format!("{why}\n"))
}

/// With what every answer says to a browser.
fn dressed(mut answer: Answer) -> Answer {
    let headers = answer.headers_mut();
    for (name, value) in [
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        (CACHE_CONTROL, "no-store"),
        (
            HeaderName::from_static("cross-origin-resource-policy"),
            "same-origin",
        ),
        (
            HeaderName::from_static("cross-origin-opener-policy"),
            "same-origin",
        ),
        (
            HeaderName::from_static("permissions-policy"),
            "camera=(self)",
        ),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    answer
}

/// What is served.
struct Site {
    folder: PathBuf,
    which: Weights,
    gpu: Option<Arc<Gpu>>,
    served: SocketAddr,
    /// The network with the newest weights. Whoever has it looks at the one picture of the moment.
    ready: Mutex<Option<Ready>>,
}

struct Ready {
    run: Run,
    /// Of the file with its weights.
    stamp: (SystemTime, u64),
    weights: [Vec<f32>; 2],
    predictor: Predictor,
}

impl Site {
    async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Answer {
        if let Err(why) = self.expect_own(request.method(), request.headers()) {
            return refused(StatusCode::FORBIDDEN, &why);
        }
        let path = request.uri().path().to_string();
        let allowed = match path.as_str() {
            "/" | "/page.css" | "/page.js" | "/api/run" | "/api/metrics" => "GET, HEAD",
            "/api/predict" => "POST",
            _ => return refused(StatusCode::NOT_FOUND, "nothing is served here; see /"),
        };
        let method = request.method().as_str();
        if !allowed.split(", ").any(|allowed| allowed == method) {
            let mut answer = refused(
                StatusCode::METHOD_NOT_ALLOWED,
                &format!("expected {allowed} for this address, found another method"),
            );
            answer
                .headers_mut()
                .insert(ALLOW, HeaderValue::from_static(allowed));
            return answer;
        }
        let own = self.clone();
        let done = match path.as_str() {
            "/" => return answer(StatusCode::OK, "text/html; charset=utf-8", HTML),
            "/page.css" => return answer(StatusCode::OK, "text/css; charset=utf-8", STYLE),
            "/page.js" => return answer(StatusCode::OK, "text/javascript; charset=utf-8", SCRIPT),
            "/api/run" => tokio::task::spawn_blocking(move || own.about()).await,
            "/api/metrics" => tokio::task::spawn_blocking(move || own.metrics()).await,
            _ => {
                let query = request.uri().query().unwrap_or_default();
                let invert = match query {
                    "" => Ok(Invert::Auto),
                    query => query.strip_prefix("invert=").unwrap_or_default().parse(),
                };
                let Ok(invert) = invert else {
                    return refused(
                        StatusCode::BAD_REQUEST,
                        "expected ?invert=auto, always or never, found another query",
                    );
                };
                match received(request).await {
                    Ok(body) => {
                        tokio::task::spawn_blocking(move || own.predict(&body, invert)).await
                    }
                    Err(refused) => return refused,
                }
            }
        };
        match done {
            Ok(Ok(value)) => answer(StatusCode::OK, "application/json", value.to_string()),
            Ok(Err((status, why))) => refused(status, &why),
            Err(_) => refused(
                StatusCode::INTERNAL_SERVER_ERROR,
                "the request came to nothing; see the terminal in which wgrad serve runs",
            ),
        }
    }

    /// Refuses what is not addressed to this server, or comes from a page of another one.
    fn expect_own(&self, method: &Method, headers: &HeaderMap) -> std::result::Result<(), String> {
        let text = |name| headers.get(name).map(|value| value.to_str().unwrap_or("?"));
        let host = text(HOST).unwrap_or("none");
        if headers.get_all(HOST).iter().count() != 1 || !is_served(host, self.served) {
            return Err(format!(
                "expected a request for {}, found one for another host; open the address that wgrad serve printed",
                shown(self.served)
            ));
        }
        let from_page = text(ORIGIN).is_none_or(|origin| {
            origin
                .strip_prefix("http://")
                .is_some_and(|at| at.eq_ignore_ascii_case(host))
        });
        // A link may lead here from anywhere, but nothing else.
        let site = text(HeaderName::from_static("sec-fetch-site")).unwrap_or("none");
        let opened = text(HeaderName::from_static("sec-fetch-mode")) == Some("navigate")
            && *method == Method::GET;
        if from_page && (opened || ["none", "same-origin"].contains(&site)) {
            return Ok(());
        }
        Err("expected a request of this server's own page, found one of another site".into())
    }

    /// Makes sure that there are weights.
    fn expect_weights(&self, run: &Run) -> Result<()> {
        run.weights_of(self.which).map(|_| ())
    }

    /// What there is to know about the run.
    fn about(&self) -> Outcome {
        let run = Run::open(&self.folder).map_err(broken)?;
        let config = run.config();
        let how = wgrad::data::Reading::new(config.model.input, &config.normalization);
        let folder = self.folder.canonicalize().unwrap_or(self.folder.clone());
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        Ok(json!({
            "run": name,
            "model": config.model.name,
            "parameters": config.model.parameters,
            "input": config.model.input,
            "class_names": config.model.class_names,
            "data": Path::new(&config.data.source).file_name().unwrap_or_default().to_string_lossy(),
            "training_images": config.data.training_images,
            "draws": how.draws(),
            "wgrad": env!("CARGO_PKG_VERSION"),
        }))
    }

    /// How the training went, or goes.
    fn metrics(&self) -> Outcome {
        let run = Run::open(&self.folder).map_err(broken)?;
        let steps = run.steps();
        let stride = steps.len().div_ceil(POINTS).max(1);
        // The last one is always among them.
        let steps: Vec<_> = steps.iter().rev().step_by(stride).collect();
        Ok(json!({
            "epochs": run.metrics(),
            "steps": steps.into_iter().rev().collect::<Vec<_>>(),
            "planned": run.config().recipe.epochs,
            "finished": run.config().finished_epochs,
            "training": run.is_being_trained(),
        }))
    }

    /// What the network makes of a picture.
    fn predict(&self, body: &[u8], invert: Invert) -> Outcome {
        let started = Instant::now();
        // Whoever panicked left at worst an old network.
        let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        let ready = self.newest(&mut ready).map_err(|e| {
            let trained = Run::open(&self.folder).is_ok_and(|run| run.is_being_trained());
            let why = match (&e, trained) {
                (Error::Checkpoint { .. }, true) => {
                    "expected trained weights, found none yet; try again when the first epoch is finished".into()
                }
                _ => e.to_string(),
            };
            (StatusCode::SERVICE_UNAVAILABLE, why)
        })?;
        let mut how = *ready.predictor.reading();
        how.invert = invert;
        how.most_bytes = UNPACKED;
        let Picture {
            pixels,
            inverted,
            centred,
        } = read_picture(body, &how).map_err(|why| {
            let why = format!("expected a picture (JPEG, PNG, WebP, BMP, TIFF or GIF), found one that cannot be read: {why}");
            (StatusCode::UNPROCESSABLE_ENTITY, why)
        })?;
        let shares = ready.predictor.predict(pixels.clone()).map_err(broken)?;
        let [parameters, running] = &ready.weights;
        let normalization = ready.run.config().scale_and_shift();
        let layers = activations(
            ready.run.model(),
            parameters,
            running,
            &normalization,
            &pixels,
        );
        Ok(json!({
            "epoch": ready.predictor.epoch(),
            "shares": shares,
            "inverted": inverted,
            "centred": centred,
            "seen": hex(&pixels),
            // The input is what is seen.
            "layers": layers.map_err(broken)?.iter().skip(1).map(layer).collect::<Vec<_>>(),
            "milliseconds": started.elapsed().as_secs_f64() * 1e3,
        }))
    }

    /// The network with the weights that are on disk now.
    fn newest<'a>(&self, ready: &'a mut Option<Ready>) -> Result<&'a mut Ready> {
        let path = self.folder.join(self.which.file());
        let about = fs::metadata(&path);
        let stamp = about.and_then(|about| Ok((about.modified()?, about.len())));
        let fresh = match (&stamp, &ready) {
            (Ok(stamp), Some(ready)) => ready.stamp == *stamp,
            _ => false,
        };
        if !fresh {
            let run = Run::open(&self.folder)?;
            let (_, weights) = run.weights_of(self.which)?;
            let predictor = Predictor::new(&run, self.which, self.gpu.clone(), None, 1)?;
            *ready = Some(Ready {
                run,
                stamp: stamp.map_err(|e| Error::io("read", &path, e))?,
                weights,
                predictor,
            });
        }
        ready
            .as_mut()
            .ok_or_else(|| Error::checkpoint(&path, "expected weights, found none; train on"))
    }
}

/// A value, or why there is none.
type Outcome = std::result::Result<Value, (StatusCode, String)>;

/// What is no fault of the request's.
fn broken(error: Error) -> (StatusCode, String) {
    (StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
}

/// The body of a request that is not too large and arrives in time.
async fn received(request: Request<Incoming>) -> std::result::Result<Bytes, Answer> {
    let too_large = || {
        let mut answer = refused(
            StatusCode::PAYLOAD_TOO_LARGE,
            &format!(
                "expected {} MiB at most, found more; use a smaller picture",
                BODY >> 20
            ),
        );
        // What else arrives is not read.
        answer
            .headers_mut()
            .insert(CONNECTION, HeaderValue::from_static("close"));
        answer
    };
    if request.body().size_hint().lower() > BODY as u64 {
        return Err(too_large());
    }
    let body = Limited::new(request.into_body(), BODY);
    match timeout(BODY_TIME, body.collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(e)) if e.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(_)) => Err(refused(
            StatusCode::BAD_REQUEST,
            "expected a whole request, found one that breaks off",
        )),
        Err(_) => Err(refused(
            StatusCode::REQUEST_TIMEOUT,
            "expected the whole picture within 30 seconds, found a part; send it again",
        )),
    }
}

/// Whether a browser that takes `host` for an origin is at this server: by its address, which no name of
/// an attacker's can be, or by the one name that always means this machine.
fn is_served(host: &str, served: SocketAddr) -> bool {
    let Ok(host) = host.parse::<Authority>() else {
        return false;
    };
    if host.port_u16().unwrap_or(80) != served.port() || host.as_str().contains('@') {
        return false;
    }
    let (own, name) = (served.ip(), host.host());
    if name.eq_ignore_ascii_case("localhost") {
        return own.is_loopback() || own.is_unspecified();
    }
    let name = name.trim_start_matches('[').trim_end_matches(']');
    // Where all addresses of the machine are served, any may be one.
    name.parse::<IpAddr>()
        .is_ok_and(|ip| ip == own || own.is_unspecified())
}

/// Some channels of a layer's output, as bytes from its lowest value to its highest.
fn layer(activation: &Activation) -> Value {
    let shape = activation.shape;
    let pixels = shape.height * shape.width;
    let shown = shape.channels.min((VALUES / pixels.max(1)).max(1));
    let shown = if pixels > 1 {
        shown.min(CHANNELS)
    } else {
        shown
    };
    let finite = |value: &&f32| value.is_finite();
    let values = activation.values.iter().filter(finite);
    let (low, high) = values.fold((f32::MAX, f32::MIN), |(low, high), value| {
        (low.min(*value), high.max(*value))
    });
    let range = if high > low { high - low } else { 1.0 };
    let byte = |value: f32| (255.0 * ((value - low) / range).clamp(0.0, 1.0)).round() as u8;
    // One channel after the other, as they are shown.
    let bytes = (0..shown).flat_map(|channel| {
        let values = activation.values[channel..].iter().step_by(shape.channels);
        values.map(|value| byte(*value))
    });
    json!({
        "name": activation.layer,
        "height": shape.height,
        "width": shape.width,
        "channels": shape.channels,
        "shown": shown,
        "low": low,
        "high": high,
        "values": hex(&bytes.collect::<Vec<u8>>()),
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_address_that_is_served_is_answered() {
        let cases = [
            ("127.0.0.1:80", "127.0.0.1", true),
            ("127.0.0.1:8471", "127.0.0.1:8471", true),
            ("127.0.0.1:8471", "localhost:8471", true),
            ("127.0.0.1:8471", "LOCALHOST:8471", true),
            ("127.0.0.1:8471", "127.0.0.1", false),
            ("127.0.0.1:8471", "127.0.0.1:80", false),
            ("127.0.0.1:8471", "192.168.0.7:8471", false),
            ("127.0.0.1:8471", "evil.example:8471", false),
            ("127.0.0.1:8471", "localhost.evil.example:8471", false),
            ("127.0.0.1:8471", "x@127.0.0.1:8471", false),
            ("127.0.0.1:8471", "", false),
            ("[::1]:8471", "[::1]:8471", true),
            ("[::1]:8471", "localhost:8471", true),
            ("192.168.0.7:8471", "192.168.0.7:8471", true),
            ("192.168.0.7:8471", "localhost:8471", false),
            ("0.0.0.0:8471", "192.168.0.7:8471", true),
            ("0.0.0.0:8471", "localhost:8471", true),
            ("0.0.0.0:8471", "evil.example:8471", false),
        ];
        for (served, host, expected) in cases {
            let found = is_served(host, served.parse().unwrap());
            assert_eq!(found, expected, "{host} at {served}");
        }
    }
}
