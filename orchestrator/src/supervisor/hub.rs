//! Serves the clients of a running sandbox: joins their commands with the one agent, until the end.
//!
//! One loop owns everything and never waits for anybody: what is sent is queued, and a client that
//! does not read what it asked for is cut off. Output and standard input have their own flow
//! control, from end to end between client and agent.

use std::collections::BTreeMap;
use std::fs::File;
use std::time::{Duration, SystemTime};

use msb_protocol::{Channel, Frame, FromAgent, Kind, ToAgent};
use tokio::net::UnixStream;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::boot::{Link, Parts, with_console};
use super::child::Child;
use super::control::{Failure, FromSupervisor, ToSupervisor};
use super::plug::Changes;
use super::{Owner, Sandbox};
use crate::agent::{self, FrameReader, FrameSender};
use crate::rundir::{Status, Stream, append_log, millis};
use crate::{Error, ErrorKind};

/// How far a client may be behind, in bytes, before it is cut off.
const BACKLOG_MAX: usize = 64 << 20;

/// How long commands have after SIGTERM when the supervisor is told to end by a signal, or by its
/// caller's end.
const SIGNAL_GRACE: Duration = Duration::from_millis(300);

/// What a stop may take beyond the commands' grace.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// Credit for output that nobody reads.
const ENDLESS: u64 = 1 << 60;

/// How a sandbox ended.
pub(super) struct Outcome {
    pub(super) failure: Option<Failure>,
    /// Who is to be told.
    pub(super) clients: Vec<(FrameSender, JoinHandle<()>)>,
}

impl Outcome {
    /// The sandbox did not start.
    pub(super) fn unstarted(owner: Owner, error: &Error) -> Self {
        Self {
            failure: Some(Failure::of(error)),
            clients: vec![(owner.sender, owner.writer)],
        }
    }
}

/// Somebody connected to the control socket.
struct Client {
    sender: FrameSender,
    writer: JoinHandle<()>,
    reader: JoinHandle<()>,
}

/// A command that runs in the guest.
struct Running {
    /// Its client and the channel's number there; nobody when that has gone.
    client: Option<(u64, Channel)>,
    /// Its output is kept, and it outlives its client, who only hears when it begins and ends.
    detached: bool,
}

/// What a client's reading task reports: a frame, or that the client has gone.
type Heard = (u64, Option<Frame>);

pub(super) struct Hub<'a> {
    pub(super) sandbox: &'a mut Sandbox,
    pub(super) agent: FrameSender,
    pub(super) changes: Changes,
    clients: BTreeMap<u64, Client>,
    next_client: u64,
    commands: BTreeMap<Channel, Running>,
    next_channel: Channel,
    heard: mpsc::Sender<Heard>,
    owner: Option<u64>,
    output: Option<File>,
    /// When a stop is under way: by when it must be over.
    pub(super) stopping: Option<Instant>,
    /// The guest has said that everything is on disk.
    goodbye: bool,
}

/// Whether the loop goes on.
enum Next {
    On,
    /// Everything is down, or is to be taken down by force.
    Over(Option<Error>),
}

/// Serves until the sandbox is to be taken down.
pub(super) async fn serve(
    sandbox: &mut Sandbox,
    parts: &mut Parts,
    owner: Owner,
    mut link: Link,
) -> Outcome {
    let (heard, mut ears) = mpsc::channel(64);
    let (changes, mut done) = Changes::new();
    let mut hub = Hub {
        sandbox,
        agent: link.sender.clone(),
        changes,
        clients: BTreeMap::new(),
        next_client: 0,
        commands: BTreeMap::new(),
        next_channel: 1,
        heard,
        owner: None,
        output: None,
        stopping: None,
        goodbye: false,
    };
    let attached = owner.attached;
    let number = hub.welcome(owner.reader, owner.sender, owner.writer);
    hub.owner = attached.then_some(number);
    let control = parts.control.take();
    let ends = parts.ends.take();
    let (Some(control), Some(mut ends), Ok(mut signals)) = (control, ends, Signals::new()) else {
        return hub.finish(Some(Error::new(
            ErrorKind::BootStart,
            "the supervisor is incomplete",
        )));
    };
    let mut agent_open = true;
    let error = loop {
        let deadline = hub.stopping;
        let next = tokio::select! {
            accepted = control.accept() => {
                if let Ok((stream, _)) = accepted {
                    hub.accept(stream);
                }
                Next::On
            }
            Some((client, frame)) = ears.recv() => hub.hear_client(parts, client, frame),
            Some(done) = done.recv() => {
                hub.go_on(parts, done);
                Next::On
            }
            frame = link.reader.next(), if agent_open => match frame {
                Ok(Some(frame)) => hub.hear_agent(frame),
                Ok(None) => {
                    agent_open = false;
                    Next::On
                }
                Err(error) => Next::Over(Some(
                    Error::new(ErrorKind::BootStart, "the agent's end broke").with_source(error),
                )),
            },
            Some(number) = ends.recv() => hub.bury(parts, number).await,
            () = signals.any() => {
                hub.stop(SIGNAL_GRACE, SIGNAL_GRACE + STOP_LIMIT);
                Next::On
            }
            () = until(deadline) => {
                tracing::warn!("the guest did not end in time, it is ended by force");
                Next::Over(None)
            }
        };
        if let Next::Over(error) = next {
            break error;
        }
    };
    // Before its socket goes, so that whoever finds none knows why.
    if hub.stopping.is_none() {
        hub.sandbox.record(Status::Stopping);
    }
    // Who has connected meanwhile is told how it ended, as all others are.
    while let Ok(Ok((stream, _))) = timeout(Duration::ZERO, control.accept()).await {
        hub.accept(stream);
    }
    let error = match error {
        Some(error) => Some(settle(&hub, parts, &mut ends, error).await),
        None => None,
    };
    hub.finish(error)
}

/// Gives a backend that died with the VMM a moment to be found, for it knows the cause. A guest that
/// died by itself may have said it on its console.
async fn settle(
    hub: &Hub<'_>,
    parts: &Parts,
    ends: &mut mpsc::UnboundedReceiver<usize>,
    error: Error,
) -> Error {
    let backend_failed = || parts.backends.iter().any(Child::failed);
    let cause = async { while !backend_failed() && ends.recv().await.is_some() {} };
    let _ = timeout(Duration::from_millis(300), cause).await;
    match parts.broken() {
        None => error,
        Some(error) if backend_failed() => error,
        Some(error) => with_console(error, &hub.sandbox.dir.console_log()),
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

struct Signals([Signal; 3]);

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self([
            signal(SignalKind::terminate())?,
            signal(SignalKind::interrupt())?,
            signal(SignalKind::hangup())?,
        ]))
    }

    async fn any(&mut self) {
        let [terminate, interrupt, hangup] = &mut self.0;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

impl Hub<'_> {
    fn accept(&mut self, stream: UnixStream) {
        let (reader, sender, writer) = agent::split(stream);
        self.welcome(reader, sender, writer);
    }

    fn welcome(&mut self, reader: FrameReader, sender: FrameSender, writer: JoinHandle<()>) -> u64 {
        let number = self.next_client;
        self.next_client += 1;
        let reader = tokio::spawn(listen(number, reader, self.heard.clone()));
        self.clients.insert(
            number,
            Client {
                sender,
                writer,
                reader,
            },
        );
        number
    }

    fn hear_client(&mut self, parts: &mut Parts, number: u64, frame: Option<Frame>) -> Next {
        let Some(frame) = frame else {
            self.part_with(number);
            return Next::On;
        };
        if frame.channel == 0 {
            return match frame.message::<ToSupervisor>() {
                Ok(message) => self.obey(parts, number, message),
                Err(_) => {
                    self.part_with(number);
                    Next::On
                }
            };
        }
        let running = self
            .commands
            .iter()
            .find(|(_, running)| running.client == Some((number, frame.channel)));
        match running.map(|(channel, _)| *channel) {
            Some(channel) => self.agent.send(Frame { channel, ..frame }),
            None => self.begin(number, frame),
        }
        Next::On
    }

    /// A frame on a channel that is not in use: a command, or the tail of one that has ended.
    fn begin(&mut self, number: u64, frame: Frame) {
        let exec = frame.kind == Kind::Control
            && matches!(frame.message::<ToAgent>(), Ok(ToAgent::Exec(_)));
        if !exec || self.stopping.is_some() {
            return;
        }
        let channel = self.next_channel;
        self.next_channel = self.next_channel.checked_add(1).unwrap_or(1);
        self.commands.insert(
            channel,
            Running {
                client: Some((number, frame.channel)),
                detached: false,
            },
        );
        self.agent.send(Frame { channel, ..frame });
    }

    fn obey(&mut self, parts: &mut Parts, number: u64, message: ToSupervisor) -> Next {
        match message {
            ToSupervisor::Start { .. } => Next::On,
            ToSupervisor::Detach { channel } => {
                let ours = Some((number, channel));
                let found = self
                    .commands
                    .iter_mut()
                    .find(|(_, running)| running.client == ours);
                if let Some((channel, running)) = found {
                    running.detached = true;
                    self.agent
                        .message(*channel, &ToAgent::OutputCredit { bytes: ENDLESS });
                    if let Ok(end) = Frame::data(*channel, Kind::Stdin, Vec::new()) {
                        self.agent.send(end);
                    }
                }
                Next::On
            }
            ToSupervisor::Mount { addition } => {
                self.mount(parts, number, addition);
                Next::On
            }
            ToSupervisor::Unmount { target, force } => {
                self.unmount(parts, number, target, force);
                Next::On
            }
            ToSupervisor::Stop { grace_ms, limit_ms } => {
                self.stop(
                    Duration::from_millis(grace_ms),
                    Duration::from_millis(limit_ms),
                );
                Next::On
            }
            ToSupervisor::Kill => {
                self.sandbox.record(Status::Stopping);
                Next::Over(None)
            }
        }
    }

    /// A client has gone: its commands are told as a terminal would when it is closed.
    fn part_with(&mut self, number: u64) {
        if let Some(client) = self.clients.remove(&number) {
            client.reader.abort();
        }
        for (channel, running) in &mut self.commands {
            if running.client.is_some_and(|(client, _)| client == number) {
                running.client = None;
                if running.detached {
                    continue;
                }
                self.agent.message(
                    *channel,
                    &ToAgent::Signal {
                        signal: libc::SIGHUP,
                    },
                );
                self.agent
                    .message(*channel, &ToAgent::OutputCredit { bytes: ENDLESS });
            }
        }
        if self.owner == Some(number) {
            self.stop(SIGNAL_GRACE, SIGNAL_GRACE + STOP_LIMIT);
        }
    }

    fn hear_agent(&mut self, frame: Frame) -> Next {
        if frame.channel == 0 {
            match frame.message::<FromAgent>() {
                Ok(FromAgent::Goodbye) => self.goodbye = true,
                Ok(message) => self.changes.hear_agent(message),
                Err(_) => {}
            }
            return Next::On;
        }
        let channel = frame.channel;
        let Some(running) = self.commands.get(&channel) else {
            return Next::On;
        };
        let over = frame.kind == Kind::Control
            && matches!(
                frame.message::<FromAgent>(),
                Ok(FromAgent::Exited(_) | FromAgent::ExecFailed { .. })
            );
        let stream = match frame.kind {
            Kind::Stdout => Some(Stream::Stdout),
            Kind::Stderr => Some(Stream::Stderr),
            _ => None,
        };
        match (running.client, stream) {
            (_, Some(stream)) if running.detached => self.log(stream, &frame.payload),
            (Some((number, theirs)), _) => {
                let client = self.clients.get(&number);
                let behind = client.is_some_and(|client| {
                    client.sender.send(Frame {
                        channel: theirs,
                        ..frame
                    });
                    client.sender.backlog() > BACKLOG_MAX
                });
                if behind {
                    self.part_with(number);
                }
            }
            // Nobody wants the rest of what somebody has stopped reading.
            (None, _) => {}
        }
        if over {
            self.commands.remove(&channel);
        }
        Next::On
    }

    /// Keeps the output of detached commands.
    fn log(&mut self, stream: Stream, output: &[u8]) {
        if self.output.is_none() {
            let path = self.sandbox.dir.output_log();
            self.output = File::options().create(true).append(true).open(path).ok();
        }
        if let Some(log) = &mut self.output {
            // A full disk must not stop the command.
            let _ = append_log(log, stream, output, millis(SystemTime::now()));
        }
    }

    /// A child has ended.
    async fn bury(&mut self, parts: &mut Parts, number: usize) -> Next {
        let vmm_ended = parts.vmm.as_ref().is_some_and(|vmm| vmm.status().is_some());
        if !vmm_ended {
            match parts.revive(self.sandbox, number).await {
                Ok(true) => return Next::On,
                Ok(false) => {}
                Err(error) => return Next::Over(Some(error)),
            }
        }
        let backend_failed = parts.backends.iter().any(Child::failed);
        match parts.broken() {
            // The guest switched itself off, as it was told to or not: nothing is lost.
            _ if vmm_ended && self.goodbye && !backend_failed => Next::Over(None),
            Some(error) => Next::Over(Some(error)),
            None => Next::On,
        }
    }

    /// Tells a client what became of the change that it asked for.
    pub(super) fn answer(&self, number: u64, failure: Option<&Error>) {
        if let Some(client) = self.clients.get(&number) {
            let failure = failure.map(Failure::of);
            client
                .sender
                .message(0, &FromSupervisor::Changed { failure });
        }
    }

    fn stop(&mut self, grace: Duration, limit: Duration) {
        let by = Instant::now() + limit;
        if self.stopping.is_some_and(|already| already <= by) {
            return;
        }
        if self.stopping.is_none() {
            self.sandbox.record(Status::Stopping);
            let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
            self.agent.message(0, &ToAgent::Shutdown { grace_ms });
        }
        self.stopping = Some(by);
    }

    fn finish(self, error: Option<Error>) -> Outcome {
        // What breaks while it is taken down on request is in the log; it is no failure.
        let wanted = self.stopping.is_some() && self.goodbye;
        let failure = error.filter(|_| !wanted).map(|error| Failure::of(&error));
        let clients = self.clients.into_values().map(|client| {
            client.reader.abort();
            (client.sender, client.writer)
        });
        Outcome {
            failure,
            clients: clients.collect(),
        }
    }
}

async fn listen(number: u64, mut reader: FrameReader, hub: mpsc::Sender<Heard>) {
    loop {
        let frame = reader.next().await.ok().flatten();
        let last = frame.is_none();
        if hub.send((number, frame)).await.is_err() || last {
            return;
        }
    }
}
