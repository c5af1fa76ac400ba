//! Sends requests to the daemon: HTTP with JSON over its unix socket.

use std::fmt;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::{Method, Request, Response, header};
use hyper_util::rt::TokioIo;
use overnode_api::error::ErrorBody;
use overnode_api::{self as api, ApiError, ErrorKind, Route, routes};
use overnode_trust as trust;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::net::UnixStream;

use crate::failure::Failure;
use crate::options::Context;
use crate::presence::Presence;

/// Size limit of an answer, in bytes.
const ANSWER_LIMIT: usize = 256 * 1024 * 1024;

/// Timeout of an answer. Launching and resetting take long: they load and remove programs and
/// derive a key.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(120);

/// How long a killed daemon may take to disappear.
const KILL_GRACE_PERIOD: Duration = Duration::from_secs(1);

/// Size limit of one line of a streamed answer, in bytes.
const LINE_LIMIT: usize = 1024 * 1024;

/// Interval between checks on a daemon that is starting or ending.
pub(crate) const POLL: Duration = Duration::from_millis(25);

/// A client of one daemon. Each request opens a connection.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    socket: PathBuf,
    state_dir: PathBuf,
    debug: bool,
}

/// Why a request got no answer.
#[derive(Debug)]
pub(crate) enum RequestError {
    /// Nothing listens on the socket.
    NotRunning,
    /// The current user may not connect to the socket.
    Denied,
    /// The listener belongs to this user, who is neither root nor the current user.
    Stranger(u32),
    /// The daemon refused the request.
    Refused(ApiError),
    /// The daemon is there, but the exchange failed.
    Broken(String),
}

/// A streamed answer, read line by line.
#[derive(Debug)]
pub(crate) struct Lines {
    body: Incoming,
    buffer: Vec<u8>,
}

impl Lines {
    /// Returns the next line without its line break, or `None` after the last one. Cancel safe: no
    /// data is lost.
    ///
    /// # Errors
    /// Fails if the connection breaks or a line is too long.
    pub(crate) async fn next(&mut self) -> Result<Option<Vec<u8>>, RequestError> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let rest = self.buffer.split_off(end + 1);
                let mut line = std::mem::replace(&mut self.buffer, rest);
                line.pop();
                return Ok(Some(line));
            }
            if self.buffer.len() > LINE_LIMIT {
                return Err(RequestError::Broken(format!(
                    "a line of its answer exceeds {LINE_LIMIT} bytes"
                )));
            }
            let Some(frame) = self.body.frame().await else { return Ok(None) };
            let frame = frame.map_err(|error| RequestError::Broken(error.to_string()))?;
            if let Ok(data) = frame.into_data() {
                self.buffer.extend_from_slice(&data);
            }
        }
    }
}

impl Client {
    /// Creates a client for the daemon that uses these directories.
    pub(crate) fn new(context: &Context) -> Self {
        Self {
            socket: context.run_dir.join(api::SOCKET),
            state_dir: context.state_dir.clone(),
            debug: context.debug,
        }
    }

    /// Sends a GET request.
    ///
    /// # Errors
    /// Fails with a message for the user. [`Self::try_get`] tells the causes apart.
    pub(crate) async fn get<R: Route<Request = ()>>(&self) -> Result<R::Answer, Failure> {
        self.try_get::<R>().await.map_err(|why| self.explain(why))
    }

    /// Sends a GET request and returns the answer as it is, with fields that this version does not
    /// know.
    ///
    /// # Errors
    /// Fails with a message for the user.
    pub(crate) async fn document<R: Route<Request = ()>>(&self) -> Result<Value, Failure> {
        let answer = self.ask(Method::GET, R::PATH, Bytes::new()).await;
        answer.map_err(|why| self.explain(why))
    }

    /// Sends a POST request.
    ///
    /// # Errors
    /// Fails with a message for the user. [`Self::try_post`] tells the causes apart.
    pub(crate) async fn post<R: Route>(&self, body: &R::Request) -> Result<R::Answer, Failure> {
        self.try_post::<R>(body).await.map_err(|why| self.explain(why))
    }

    /// Sends a POST request.
    ///
    /// # Errors
    /// Fails with an [`RequestError`], which tells the causes apart.
    pub(crate) async fn try_post<R: Route>(
        &self,
        body: &R::Request,
    ) -> Result<R::Answer, RequestError> {
        let body = serde_json::to_vec(body).map_err(|error| {
            RequestError::Broken(format!("the request cannot be encoded as JSON: {error}"))
        })?;
        self.ask(Method::POST, R::PATH, body.into()).await
    }

    /// Sends a GET request.
    ///
    /// # Errors
    /// Fails with an [`RequestError`], which tells the causes apart.
    pub(crate) async fn try_get<R: Route<Request = ()>>(&self) -> Result<R::Answer, RequestError> {
        self.ask(Method::GET, R::PATH, Bytes::new()).await
    }

    /// Sends a GET request for a streamed answer.
    ///
    /// # Errors
    /// Fails with an [`RequestError`], which tells the causes apart.
    pub(crate) async fn lines(&self, path: &str) -> Result<Lines, RequestError> {
        self.note(format_args!("> GET {path}"));
        let response =
            tokio::time::timeout(REQUEST_TIMEOUT, self.send(Method::GET, path, Bytes::new()))
                .await
                .map_err(|_| no_answer())??;
        let status = response.status().as_u16();
        self.note(format_args!("< {status}"));
        if !(200..300).contains(&status) {
            return Err(refusal(status, &everything(response).await?));
        }
        Ok(Lines { body: response.into_body(), buffer: Vec::new() })
    }

    /// Returns the version of the running daemon, if any. A daemon that is just ending does not
    /// count.
    ///
    /// # Errors
    /// Fails if a daemon is running but does not answer properly, or if its socket is closed to
    /// this user.
    pub(crate) async fn running(&self) -> Result<Option<api::Version>, Failure> {
        let begun = Instant::now();
        loop {
            // A killed process accepts requests and keeps its lock until the kernel has closed all
            // of its descriptors.
            let may_be_ending = begun.elapsed() < KILL_GRACE_PERIOD;
            match self.try_get::<routes::Version>().await {
                Ok(version) => return Ok(Some(version)),
                Err(RequestError::NotRunning) => match Presence::of(&self.state_dir) {
                    Presence::NotListening(_) if may_be_ending => {}
                    Presence::NotListening(_)
                    | Presence::Never
                    | Presence::Stopped
                    | Presence::Unknown => {
                        return Ok(None);
                    }
                },
                Err(RequestError::Broken(_)) if may_be_ending => {}
                Err(
                    why @ (RequestError::Denied
                    | RequestError::Stranger(_)
                    | RequestError::Refused(_)
                    | RequestError::Broken(_)),
                ) => {
                    return Err(self.explain(why));
                }
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Returns the path of the daemon's socket.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Turns the cause into a message for the user.
    pub(crate) fn explain(&self, why: RequestError) -> Failure {
        match why {
            RequestError::NotRunning => {
                Failure::failed(Presence::of(&self.state_dir).not_running(&self.socket))
            }
            RequestError::Denied => Failure::failed(format_args!(
                "{}: permission denied: only root may talk to the daemon; run this command as root \
                 (with sudo)",
                self.socket.display()
            )),
            RequestError::Stranger(user) => Failure::failed(format_args!(
                "a program of user {user} listens on {} in place of the daemon, so nothing was \
                 sent to it: find out why and remove that directory, or choose another one with \
                 --run-dir",
                self.socket.display()
            )),
            RequestError::Refused(error) => error.into(),
            RequestError::Broken(why) => Failure::failed(format_args!(
                "the daemon did not answer on {}: {why}; see its log",
                self.socket.display()
            )),
        }
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<T, RequestError> {
        self.note(format_args!("> {method} {path}"));
        let (status, answer) =
            tokio::time::timeout(REQUEST_TIMEOUT, self.exchange(method, path, body))
                .await
                .map_err(|_| no_answer())??;
        self.note(format_args!("< {status}, {} bytes", answer.len()));
        if !(200..300).contains(&status) {
            return Err(refusal(status, &answer));
        }
        serde_json::from_slice(&answer).map_err(|error| {
            RequestError::Broken(format!(
                "its answer cannot be decoded: {error}; it may have another version than this \
                 command ({})",
                env!("CARGO_PKG_VERSION")
            ))
        })
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<(u16, Bytes), RequestError> {
        let response = self.send(method, path, body).await?;
        Ok((response.status().as_u16(), everything(response).await?))
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Response<Incoming>, RequestError> {
        let broken = |error: &dyn fmt::Display| RequestError::Broken(error.to_string());
        let stream =
            UnixStream::connect(&self.socket).await.map_err(|error| match error.kind() {
                io::ErrorKind::NotFound
                | io::ErrorKind::ConnectionRefused
                | io::ErrorKind::NotADirectory => RequestError::NotRunning,
                io::ErrorKind::PermissionDenied => RequestError::Denied,
                _ => broken(&error),
            })?;
        // The listener receives the request, which may hold a token.
        let listener = stream.peer_cred().map_err(|error| broken(&error))?.uid();
        if !trust::is_trusted_user(listener) {
            return Err(RequestError::Stranger(listener));
        }
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| broken(&error))?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "overnode")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|error| broken(&error))?;
        sender.send_request(request).await.map_err(|error| broken(&error))
    }

    fn note(&self, what: fmt::Arguments<'_>) {
        if self.debug {
            let _ = writeln!(io::stderr(), "overnode: debug: {} {what}", self.socket.display());
        }
    }
}

async fn everything(response: Response<Incoming>) -> Result<Bytes, RequestError> {
    let answer = Limited::new(response.into_body(), ANSWER_LIMIT).collect().await;
    Ok(answer.map_err(|error| RequestError::Broken(error.to_string()))?.to_bytes())
}

fn no_answer() -> RequestError {
    RequestError::Broken(format!("no answer within {} s", REQUEST_TIMEOUT.as_secs()))
}

fn refusal(status: u16, answer: &[u8]) -> RequestError {
    match serde_json::from_slice::<ErrorBody>(answer) {
        Ok(body) => {
            RequestError::Refused(ApiError::new(ErrorKind::from_status(status), body.error))
        }
        Err(_) => RequestError::Broken(format!("HTTP status {status} without an error message")),
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;

    fn listen(dir: &Path) -> (UnixListener, Client) {
        let socket = dir.join(api::SOCKET);
        let listener = UnixListener::bind(&socket).unwrap();
        (listener, Client { socket, state_dir: dir.to_owned(), debug: false })
    }

    #[tokio::test]
    async fn a_daemon_that_dies_on_a_request_counts_as_not_running() {
        let dir = tempfile::tempdir().unwrap();
        let (listener, client) = listen(dir.path());
        let dies = async {
            drop(listener.accept().await.unwrap());
            drop(listener);
        };
        let (running, ()) = tokio::join!(client.running(), dies);
        assert!(running.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_daemon_that_never_answers_properly_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let (listener, client) = listen(dir.path());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                drop(stream);
            }
        });
        let why = client.running().await.unwrap_err();
        assert!(why.to_string().contains("did not answer"), "{why}");
    }
}
