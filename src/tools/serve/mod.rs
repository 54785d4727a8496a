//! The runs of a folder as a live page for a browser: `pcpo-wgpu serve`.
//!
//! The server is hyper's, on one thread; what reads files runs on a few others. It sees a request
//! in this order: `access` decides whether it may speak at all, `route` what it asks for, `runs`
//! finds the run among those that the folder has, and `page` writes it.
//!
//! A hostile page in the same browser can send requests here, but it can neither read an answer
//! nor press a button: `access` says why. A client that is slow holds a connection, not the server.

mod access;
mod answer;
mod page;
mod route;
mod runs;

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use hyper::body::{Body, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};

use self::access::Access;
use self::answer::{Answer, Site, answer};
use self::page::Page;
pub use self::page::{Look, Render};
use self::runs::Runs;

/// Connections at one time; further ones wait to be accepted.
const CONNECTIONS: usize = 64;
/// Threads that read files.
const READERS: usize = 8;
/// How long a client may take to send the head of its request.
const HEAD_TIME: Duration = Duration::from_secs(10);
/// How long a connection may take from its beginning to its last byte. It serves one request.
const WHOLE_TIME: Duration = Duration::from_secs(60);
/// The longest head of a request, in bytes.
const HEAD_SIZE: usize = 16 * 1024;
/// How often the server looks whether it shall end.
const LOOK: Duration = Duration::from_millis(100);

/// What to serve, and to whom.
pub struct Options {
    /// A folder of runs, or the folder of one run.
    pub dir: PathBuf,
    /// The address to listen at.
    pub host: IpAddr,
    /// 0 takes a free one.
    pub port: u16,
    /// What a visitor must know. Where other machines can reach the server there always is one.
    pub token: Option<String>,
    pub look: Look,
}

/// A server that listens, but does not answer yet.
pub struct Server {
    runtime: Runtime,
    listener: TcpListener,
    site: Arc<Site>,
    address: SocketAddr,
}

impl Server {
    /// Checks the settings and begins to listen.
    ///
    /// # Errors
    /// When the folder is missing, the token is empty, or the address or its port cannot be had.
    pub fn bind(options: Options) -> Result<Self> {
        let runs = Runs::open(options.dir)?;
        let runtime = Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .max_blocking_threads(READERS)
            .build()
            .context("the server cannot start")?;
        let (host, port) = (options.host, options.port);
        let listener = runtime.block_on(TcpListener::bind((host, port))).with_context(|| {
            format!(
                "--host {host} --port {port}: cannot be listened at; give another port (0 takes a \
                 free one), or an address of this machine"
            )
        })?;
        let address = listener.local_addr().context("the server's own address")?;
        let access = Access::new(address, options.token)?;
        let site = Site { runs, access, page: Page::new(options.look) };
        Ok(Self { runtime, listener, site: Arc::new(site), address })
    }

    /// The address to open, with the token where there is one.
    pub fn url(&self) -> String {
        format!("http://{}/{}", self.address, self.site.access.query())
    }

    /// Serves until `ended` is true, which it asks a few times a second.
    pub fn run(self, ended: impl Fn() -> bool) {
        self.runtime.block_on(accept(&self.listener, &self.site, ended));
        // Nobody waits for what is still being read or sent.
        self.runtime.shutdown_background();
    }
}

async fn accept(listener: &TcpListener, site: &Arc<Site>, ended: impl Fn() -> bool) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    while !ended() {
        let Ok(place) = places.clone().try_acquire_owned() else {
            sleep(LOOK).await;
            continue;
        };
        match timeout(LOOK, listener.accept()).await {
            Ok(Ok((stream, _))) => drop(tokio::spawn(serve(stream, site.clone(), place))),
            // Too many open files, or a client that is gone already: both pass.
            Ok(Err(_)) => sleep(LOOK).await,
            Err(_) => {}
        }
    }
}

/// Serves one connection, which has one request.
async fn serve(stream: TcpStream, site: Arc<Site>, place: OwnedSemaphorePermit) {
    let service = service_fn(move |request| {
        let site = site.clone();
        async move { Ok::<_, Infallible>(respond(site, request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .max_buf_size(HEAD_SIZE)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    // A connection that breaks is the client's affair.
    let _ = timeout(WHOLE_TIME, connection).await;
    drop(place);
}

async fn respond(site: Arc<Site>, request: Request<Incoming>) -> Response<String> {
    let (head, body) = request.into_parts();
    let length = body.size_hint().upper();
    let shared = site.clone();
    let answered = spawn_blocking(move || answer(&shared, &head, length)).await;
    let answered = answered.unwrap_or_else(|_| {
        Answer::text(StatusCode::INTERNAL_SERVER_ERROR, "the page panicked; see the console")
    });
    answered.into_response(&site.page)
}
