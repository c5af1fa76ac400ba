//! Sets up the encrypted channel between two nodes: `Noise_XXpsk3_25519_ChaChaPoly_BLAKE2s` (Noise
//! specification, revision 34) over any byte stream.
//!
//! ```text
//! initiator                                       responder
//!   e                                        ->
//!                                            <-     e, ee, s, es
//!   s, se, psk, [Hello]                      ->     cannot decrypt it: TOKEN_REFUSED, in plaintext
//!                                            <-     Hello, Verdict
//!   Verdict                                  ->
//! ```
//! The first greeting is encrypted under a key from the token, and the second goes only to a node
//! that has proven to have the token. Without the token, a host at either end learns the node's
//! public key and nothing else. Each side sends its verdict to the other, so both can report the
//! reason to their operators.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use snow::{Builder, HandshakeState};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use overnode_core::control::READ_LIMIT;
use overnode_core::control::frame::{
    self, FrameSplitter, MAX_FRAME, MAX_HANDSHAKE_FRAME, Reassembler, TAG, TOKEN_REFUSED,
};
use overnode_core::control::hello::{Hello, LocalIdentity, Refusal, Verdict, common_version};
use overnode_core::control::key;
use overnode_core::control::renewal::{
    Handover, Keys, REJECT_AFTER_FRAMES, RENEW_AFTER, RENEW_AFTER_FRAMES, Renewal, Role,
};
use overnode_types::PublicKey;

/// Time limit for the whole handshake, including the verdicts.
pub const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Interval of heartbeats from a side that sends nothing else ([`Writer::heartbeat`]).
pub const HEARTBEAT: Duration = Duration::from_secs(5);
/// A message that the other side does not accept within this time ends the connection.
pub const WRITE_LIMIT: Duration = Duration::from_secs(15);

const REFUSAL_READ_LIMIT: Duration = Duration::from_secs(1);
/// The Noise protocol, under the name that `status` shows.
pub const PATTERN: &str = "Noise_XXpsk3_25519_ChaChaPoly_BLAKE2s";
const PROLOGUE: &[u8] = b"overnode control v1";

/// An established connection.
#[derive(Debug)]
pub struct Link<S> {
    /// Greeting of the node at the other end.
    pub peer: Hello,
    /// Control protocol version in use: the newest that both sides support.
    pub version: u16,
    /// The receiving half.
    pub reader: Reader<S>,
    /// The sending half.
    pub writer: Writer<S>,
}

/// The receiving half of a connection. It takes a lock that it shares with the other half only to
/// renew keys.
#[derive(Debug)]
pub struct Reader<S> {
    stream: ReadHalf<S>,
    noise: Keys,
    nonce: u64,
    splitter: FrameSplitter,
    reassembler: Reassembler,
    shared: Arc<Shared>,
    handovers: mpsc::Sender<Handover>,
}

/// The sending half of a connection.
#[derive(Debug)]
pub struct Writer<S> {
    stream: WriteHalf<S>,
    noise: Keys,
    nonce: u64,
    shared: Arc<Shared>,
    handovers: mpsc::Receiver<Handover>,
}

/// State that both halves of a connection need for renewals.
#[derive(Debug)]
struct Shared {
    renewal: Mutex<Renewal>,
    /// Notified after many frames in one direction: a renewal is due regardless of the age of the
    /// keys.
    early: Notify,
}

impl Shared {
    fn renewal(&self) -> MutexGuard<'_, Renewal> {
        self.renewal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a frame in one direction and returns its number, which is its nonce.
    fn count(&self, nonce: &mut u64) -> Result<u64, Refusal> {
        if *nonce >= REJECT_AFTER_FRAMES {
            return Err(expired());
        }
        if *nonce == RENEW_AFTER_FRAMES {
            self.early.notify_one();
        }
        *nonce += 1;
        Ok(*nonce - 1)
    }
}

/// An action that is due on a connection's keys.
pub enum Due {
    /// Request new keys from the other side.
    Begin,
    /// Switch to new keys.
    HandOver(Handover),
    /// Close the connection.
    Expired,
}

fn expired() -> Refusal {
    Refusal::Misconduct("no new keys for too long".to_owned())
}

/// Parameters of a connection other than the identity of its ends.
#[derive(Debug)]
pub struct ConnectOptions<T> {
    /// Age at which the keys are renewed. At twice this age the connection ends.
    pub renew_after: Duration,
    /// A responder awaits this after the first message has arrived and before it computes the
    /// answer.
    pub turn: T,
}

impl Default for ConnectOptions<std::future::Ready<()>> {
    fn default() -> Self {
        Self { renew_after: RENEW_AFTER, turn: std::future::ready(()) }
    }
}

/// Runs the handshake. Calls `admit` for a peer that has proven to have the token and is
/// compatible. `admit` may refuse the peer, for example because its ID clashes with a third node's.
///
/// # Errors
/// The [`Refusal`], after it was sent to the other side if possible.
pub async fn connect<S, T>(
    stream: S,
    role: Role,
    me: &LocalIdentity,
    options: ConnectOptions<T>,
    admit: impl FnOnce(&Hello) -> Result<(), Refusal>,
) -> Result<Link<S>, Refusal>
where
    S: AsyncRead + AsyncWrite,
    T: Future<Output = ()>,
{
    timeout(HANDSHAKE_LIMIT, handshake(stream, role, me, options, admit))
        .await
        .unwrap_or(Err(Refusal::TimedOut(HANDSHAKE_LIMIT.as_secs())))
}

impl<S: AsyncRead> Reader<S> {
    /// Returns the next message. Handles heartbeats and new keys internally. Cancel-safe: dropping
    /// the future loses nothing.
    ///
    /// # Errors
    /// [`Refusal::TimedOut`] if not even a heartbeat arrived within [`READ_LIMIT`].
    /// [`Refusal::Closed`] or [`Refusal::Io`] if the stream ended or failed. [`Refusal::Frame`],
    /// [`Refusal::Garbage`], [`Refusal::Token`] or [`Refusal::Misconduct`] if the bytes violate the
    /// protocol. The connection is unusable after any of them.
    pub async fn receive(&mut self) -> Result<Vec<u8>, Refusal> {
        loop {
            let message = self.receive_any(Instant::now() + READ_LIMIT).await?;
            if !message.is_empty() {
                return Ok(message);
            }
        }
    }

    async fn receive_any(&mut self, deadline: Instant) -> Result<Vec<u8>, Refusal> {
        loop {
            while let Some(frame) = self.splitter.next(MAX_FRAME)? {
                if frame.len() < TAG {
                    return Err(plaintext_refusal(frame));
                }
                let mut plaintext = vec![0; frame.len() - TAG];
                let nonce = self.shared.count(&mut self.nonce)?;
                self.noise
                    .read_message(nonce, frame, &mut plaintext)
                    .map_err(|_| Refusal::Garbage("a message was altered in transit"))?;
                if let Some(keys) = frame::keys(&plaintext) {
                    self.take_keys(keys)?;
                    continue;
                }
                if let Some(message) = self.reassembler.push(&plaintext)? {
                    return Ok(message);
                }
            }
            let read = timeout_at(deadline, self.stream.read_buf(self.splitter.buffer()))
                .await
                .map_err(|_| Refusal::TimedOut(READ_LIMIT.as_secs()))??;
            if read == 0 {
                return Err(Refusal::Closed);
            }
        }
    }

    fn take_keys(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        if self.reassembler.is_mid_message() {
            return Err(frame::BadFrame::Keys.into());
        }
        let step = self.shared.renewal().handle(bytes, Instant::now().into_std())?;
        if let Some(keys) = step.receive_by {
            (self.noise, self.nonce) = (keys, 0);
        }
        // The protocol never needs more than the one slot of this channel.
        let sent = step.send.map_or(Ok(()), |send| self.handovers.try_send(send));
        sent.map_err(|_| Refusal::Closed)
    }
}

impl<S: AsyncWrite> Writer<S> {
    /// Sends a message of 1 to [`frame::MAX_MESSAGE`] bytes. Not cancel-safe: dropping the future
    /// midway makes the connection unusable.
    ///
    /// # Errors
    /// [`Refusal::Frame`] if the message is too long. [`Refusal::TimedOut`] if the other side does
    /// not accept it within [`WRITE_LIMIT`]. [`Refusal::Misconduct`] if the keys have sealed too
    /// many frames. [`Refusal::Io`] if the stream fails.
    pub async fn send(&mut self, message: &[u8]) -> Result<(), Refusal> {
        if message.len() > frame::MAX_MESSAGE {
            return Err(frame::BadFrame::MessageTooLong.into());
        }
        timeout(WRITE_LIMIT, self.send_parts(message))
            .await
            .unwrap_or(Err(Refusal::TimedOut(WRITE_LIMIT.as_secs())))
    }

    /// Sends a heartbeat. One is due every [`HEARTBEAT`] in which nothing else was sent.
    ///
    /// # Errors
    /// As for [`Self::send`].
    pub async fn heartbeat(&mut self) -> Result<(), Refusal> {
        self.send(&[]).await
    }

    /// Waits until an action is due on the connection's keys. Cancel-safe.
    pub async fn due(&mut self) -> Due {
        let (begin, expires) = {
            let renewal = self.shared.renewal();
            (renewal.due(), renewal.expires())
        };
        let (may_begin, begin) = (begin.is_some(), begin.unwrap_or(expires));
        tokio::select! {
            Some(handover) = self.handovers.recv() => Due::HandOver(handover),
            () = sleep_until(expires.into()) => Due::Expired,
            () = sleep_until(begin.into()), if may_begin => Due::Begin,
            () = self.shared.early.notified(), if may_begin => Due::Begin,
        }
    }

    /// Performs a due action. Not cancel-safe, like [`Self::send`].
    ///
    /// # Errors
    /// As for [`Self::send`], and [`Refusal::Misconduct`] if the keys are too old.
    pub async fn renew(&mut self, due: Due) -> Result<(), Refusal> {
        match due {
            Due::Begin => {
                let Some(bytes) = self.shared.renewal().begin() else { return Ok(()) };
                self.send_keys(&bytes).await
            }
            Due::HandOver(Handover { bytes, keys }) => {
                self.send_keys(&bytes).await?;
                (self.noise, self.nonce) = (keys, 0);
                Ok(())
            }
            Due::Expired => Err(expired()),
        }
    }

    async fn send_keys(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        let plaintext = frame::with_keys(bytes);
        let sending = async {
            self.send_frame(&plaintext).await?;
            Ok(self.stream.flush().await?)
        };
        timeout(WRITE_LIMIT, sending).await.unwrap_or(Err(Refusal::TimedOut(WRITE_LIMIT.as_secs())))
    }

    async fn send_frame(&mut self, plaintext: &[u8]) -> Result<(), Refusal> {
        let nonce = self.shared.count(&mut self.nonce)?;
        let mut sealed = vec![0; plaintext.len() + TAG];
        self.noise
            .write_message(nonce, plaintext, &mut sealed)
            .map_err(|_| Refusal::Garbage("a message could not be sealed"))?;
        write_frame(&mut self.stream, &sealed).await
    }

    /// Shuts down the sending direction. Errors no longer matter.
    pub async fn close(mut self) {
        let _ = timeout(WRITE_LIMIT, self.stream.shutdown()).await;
    }

    async fn send_parts(&mut self, message: &[u8]) -> Result<(), Refusal> {
        for part in frame::parts(message) {
            self.send_frame(&part).await?;
        }
        self.stream.flush().await?;
        Ok(())
    }
}

async fn handshake<S, T>(
    stream: S,
    role: Role,
    me: &LocalIdentity,
    options: ConnectOptions<T>,
    admit: impl FnOnce(&Hello) -> Result<(), Refusal>,
) -> Result<Link<S>, Refusal>
where
    S: AsyncRead + AsyncWrite,
    T: Future<Output = ()>,
{
    let ConnectOptions { renew_after, turn } = options;
    let (mut read, mut write) = tokio::io::split(stream);
    let mut splitter = FrameSplitter::default();
    let noise = start(role, me);
    match role {
        Role::Initiator => {
            let noise = initiate(noise, &mut read, &mut write, &mut splitter, me).await?;
            let (mut reader, mut writer) =
                halves(read, write, splitter, noise, (role, me, renew_after))?;
            let greeting = reader.receive_greeting().await?;
            let peer = Hello::decode(&greeting, remote_key(&reader.noise)?, me.hello.versions);
            let checked = check_peer(me, &peer, admit);
            writer.send(&Verdict::of(&checked).encode()).await?;
            finish(me, peer, checked, reader, writer).await
        }
        Role::Responder => {
            let (noise, greeting) =
                respond(noise, &mut read, &mut write, &mut splitter, turn).await?;
            let (reader, mut writer) =
                halves(read, write, splitter, noise, (role, me, renew_after))?;
            let peer = Hello::decode(&greeting, remote_key(&reader.noise)?, me.hello.versions);
            let checked = check_peer(me, &peer, admit);
            writer.send(&me.hello.encode()).await?;
            writer.send(&Verdict::of(&checked).encode()).await?;
            finish(me, peer, checked, reader, writer).await
        }
    }
}

fn start(role: Role, me: &LocalIdentity) -> HandshakeState {
    let psk = key::control_key(&me.cluster_key);
    let build = || {
        let builder = Builder::new(PATTERN.parse()?)
            .local_private_key(&me.static_secret.0)?
            .psk(3, &psk.0)?
            .prologue(PROLOGUE)?;
        match role {
            Role::Initiator => builder.build_initiator(),
            Role::Responder => builder.build_responder(),
        }
    };
    build().expect("the pattern is supported and all of its keys are set")
}

async fn initiate<S: AsyncRead + AsyncWrite>(
    mut noise: HandshakeState,
    read: &mut ReadHalf<S>,
    write: &mut WriteHalf<S>,
    splitter: &mut FrameSplitter,
    me: &LocalIdentity,
) -> Result<HandshakeState, Refusal> {
    write_handshake(&mut noise, write, &[]).await?;
    read_frame(read, splitter, |answer| {
        let mut payload = [0; MAX_HANDSHAKE_FRAME];
        noise
            .read_message(answer, &mut payload)
            .map_err(|_| Refusal::Garbage("its answer is malformed"))
    })
    .await?;
    write_handshake(&mut noise, write, &me.hello.encode()).await?;
    Ok(noise)
}

async fn respond<S: AsyncRead + AsyncWrite>(
    mut noise: HandshakeState,
    read: &mut ReadHalf<S>,
    write: &mut WriteHalf<S>,
    splitter: &mut FrameSplitter,
    turn: impl Future<Output = ()>,
) -> Result<(HandshakeState, Vec<u8>), Refusal> {
    let mut payload = [0; MAX_HANDSHAKE_FRAME];
    read_frame(read, splitter, |first| {
        noise
            .read_message(first, &mut payload)
            .map_err(|_| Refusal::Garbage("its first message is malformed"))
    })
    .await?;
    turn.await;
    write_handshake(&mut noise, write, &[]).await?;
    let greeting =
        read_frame(read, splitter, |third| match noise.read_message(third, &mut payload) {
            Ok(length) => Ok(Ok(payload[..length].to_vec())),
            // The initiator's static key, in the same message, is not encrypted under the token.
            // Its decryption fails only if bytes were altered. snow does not distinguish the two
            // cases, and a wrong token is the one that happens in practice.
            Err(snow::Error::Decrypt) => Ok(Err(Refusal::Token)),
            Err(_) => Err(Refusal::Garbage("its third message is malformed")),
        })
        .await?;
    match greeting {
        Ok(greeting) => Ok((noise, greeting)),
        Err(refusal) => {
            write_frame(write, TOKEN_REFUSED).await?;
            write.shutdown().await?;
            Err(refusal)
        }
    }
}

fn halves<S: AsyncRead + AsyncWrite>(
    read: ReadHalf<S>,
    write: WriteHalf<S>,
    splitter: FrameSplitter,
    noise: HandshakeState,
    (role, me, renew_after): (Role, &LocalIdentity, Duration),
) -> Result<(Reader<S>, Writer<S>), Refusal> {
    let binding = noise.get_handshake_hash().to_vec();
    let noise = noise
        .into_stateless_transport_mode()
        .map_err(|_| Refusal::Garbage("the handshake is incomplete"))?;
    let noise = Arc::new(noise);
    let remote = remote_key(&noise)?;
    let own = (me.static_secret.clone(), key::control_key(&me.cluster_key));
    let now = Instant::now().into_std();
    let renewal = Mutex::new(Renewal::new(role, own, remote, binding, renew_after, now));
    let shared = Arc::new(Shared { renewal, early: Notify::new() });
    let (sender, receiver) = mpsc::channel(1);
    let reader = Reader {
        stream: read,
        noise: Arc::clone(&noise),
        nonce: 0,
        splitter,
        reassembler: Reassembler::default(),
        shared: Arc::clone(&shared),
        handovers: sender,
    };
    Ok((reader, Writer { stream: write, noise, nonce: 0, shared, handovers: receiver }))
}

fn remote_key(noise: &Keys) -> Result<PublicKey, Refusal> {
    let key = noise.get_remote_static().and_then(|key| key.try_into().ok());
    key.map(PublicKey).ok_or(Refusal::Garbage("it has no public key"))
}

impl<S: AsyncRead> Reader<S> {
    /// The responder's greeting is the first message that the keys of both sides protect. If it
    /// does not decrypt, the responder has another token and did not say so.
    async fn receive_greeting(&mut self) -> Result<Vec<u8>, Refusal> {
        match self.receive_any(Instant::now() + HANDSHAKE_LIMIT).await {
            Err(Refusal::Garbage(_)) => Err(Refusal::Token),
            other => other,
        }
    }
}

fn check_peer(
    me: &LocalIdentity,
    peer: &Result<Hello, Refusal>,
    admit: impl FnOnce(&Hello) -> Result<(), Refusal>,
) -> Result<(), Refusal> {
    match peer {
        Ok(peer) => me.hello.check(peer).and_then(|()| admit(peer)),
        Err(Refusal::Version { ours, theirs }) => {
            Err(Refusal::Version { ours: *ours, theirs: *theirs })
        }
        Err(Refusal::Garbage(what)) => Err(Refusal::Garbage(what)),
        Err(_) => Err(Refusal::Garbage("its greeting is malformed")),
    }
}

async fn finish<S: AsyncRead + AsyncWrite>(
    me: &LocalIdentity,
    peer: Result<Hello, Refusal>,
    checked: Result<(), Refusal>,
    mut reader: Reader<S>,
    writer: Writer<S>,
) -> Result<Link<S>, Refusal> {
    // A side that refuses keeps reading for a moment, only so that closing the stream does not
    // discard its last messages in transit.
    let time_limit = if checked.is_ok() { HANDSHAKE_LIMIT } else { REFUSAL_READ_LIMIT };
    let verdict = reader.receive_any(Instant::now() + time_limit).await;
    let outcome = match (peer, checked, verdict) {
        (Err(refusal), _, _) | (Ok(_), Err(refusal), _) | (Ok(_), Ok(()), Err(refusal)) => {
            Err(refusal)
        }
        (Ok(peer), Ok(()), Ok(verdict)) => Verdict::decode(&verdict)
            .and_then(|verdict| verdict.into_result(&me.hello, &peer))
            .map(|()| peer),
    };
    match outcome {
        Ok(peer) => {
            let version = common_version(me.hello.versions, peer.versions);
            let version = version
                .ok_or(Refusal::Version { ours: me.hello.versions, theirs: peer.versions })?;
            Ok(Link { peer, version, reader, writer })
        }
        Err(refusal) => {
            writer.close().await;
            Err(refusal)
        }
    }
}

async fn write_handshake<W: AsyncWrite + Unpin>(
    noise: &mut HandshakeState,
    write: &mut W,
    payload: &[u8],
) -> Result<(), Refusal> {
    let mut message = [0; MAX_HANDSHAKE_FRAME];
    let length = noise
        .write_message(payload, &mut message)
        .map_err(|_| Refusal::Garbage("a handshake message could not be created"))?;
    write_frame(write, &message[..length]).await?;
    Ok(write.flush().await?)
}

async fn write_frame<W: AsyncWrite + Unpin>(write: &mut W, frame: &[u8]) -> Result<(), Refusal> {
    let length = u16::try_from(frame.len()).map_err(|_| frame::BadFrame::TooLong(frame.len()))?;
    let mut bytes = Vec::with_capacity(2 + frame.len());
    bytes.extend(length.to_be_bytes());
    bytes.extend(frame);
    Ok(write.write_all(&bytes).await?)
}

async fn read_frame<R: AsyncRead + Unpin, T>(
    read: &mut R,
    splitter: &mut FrameSplitter,
    mut handle: impl FnMut(&[u8]) -> Result<T, Refusal>,
) -> Result<T, Refusal> {
    loop {
        match splitter.next(MAX_HANDSHAKE_FRAME) {
            Ok(Some(frame)) if frame.len() < TAG => return Err(plaintext_refusal(frame)),
            Ok(Some(frame)) => return handle(frame),
            Ok(None) => {}
            Err(_) => return Err(Refusal::Garbage("its messages are too long")),
        }
        if read.read_buf(splitter.buffer()).await? == 0 {
            return Err(Refusal::Closed);
        }
    }
}

fn plaintext_refusal(frame: &[u8]) -> Refusal {
    if frame == TOKEN_REFUSED {
        Refusal::Token
    } else {
        Refusal::Garbage("its messages are too short")
    }
}

#[cfg(test)]
mod tests;
