//! Sends HTTP requests over unix sockets and TCP.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::netns::Netns;

/// Timeout of connecting and of each read.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Sends a request over a unix socket. Returns the status code and the body. The request uses HTTP
/// 1.0, so the answer is not chunked and ends with the connection.
///
/// # Errors
/// Fails if nothing listens or the answer is not HTTP.
pub(crate) fn request(
    socket: &Path,
    method: &str,
    path: &str,
    body: &str,
) -> Result<(u16, String)> {
    let stream = UnixStream::connect(socket).with_context(|| socket.display().to_string())?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    exchange(stream, method, path, body)
}

/// Sends a `GET` request over TCP from inside a network namespace. Returns the status code and the
/// body.
///
/// # Errors
/// Fails if nothing listens or the answer is not HTTP.
pub(crate) fn get(netns: &Netns, address: SocketAddr, path: &str) -> Result<(u16, String)> {
    let stream = netns.enter(|| Ok(TcpStream::connect_timeout(&address, TIMEOUT)?))?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    exchange(stream, "GET", path, "")
}

fn exchange(
    mut stream: impl Read + Write,
    method: &str,
    path: &str,
    body: &str,
) -> Result<(u16, String)> {
    write!(
        stream,
        "{method} {path} HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = answer.split_once("\r\n\r\n").context("not an HTTP response")?;
    let code =
        head.split(' ').nth(1).and_then(|code| code.parse().ok()).context("no status code")?;
    Ok((code, body.to_owned()))
}
