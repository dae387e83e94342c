//! The event loop: one thread moves frames, bytes and signals, and never waits for one of them.
//!
//! Two epoll instances: the outer one has the port, the signals, and of each command what must
//! always be served. The inner one has the commands' outputs and is itself an event of the outer
//! one, so that a slow host is answered by leaving it alone. The kernel takes turns among what is
//! ready in each, so that a chatty command does not starve another.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use msb_protocol::{Channel, Frame, FromAgent, Kind, SecurityProfile, ToAgent};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions, wait};

use crate::describe;
use crate::events::{CHILDREN, OUTPUTS, PORT, parse_token, token, unwatch, wait_events, watch};
use crate::exec::{Command, Next, Stream};
use crate::mounts::{Guest, MountError};
use crate::port::{Port, PortError};
use crate::shutdown::{self, Shutdown};

/// Most output taken from a command at a time, in bytes.
const PIECE: usize = 32 << 10;

/// How long the last message may take.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// How long commands have to end when the host has gone.
const ORPHANED: Duration = Duration::from_millis(300);

/// The agent while it serves the host.
pub(crate) struct Server {
    port: Port,
    connected: bool,
    guest: Guest,
    restricted: bool,
    children: OwnedFd,
    pts: OwnedFd,
    outer: OwnedFd,
    inner: OwnedFd,
    commands: HashMap<Channel, Command>,
    channels: HashMap<Pid, Channel>,
    shutdown: Option<Shutdown>,
    piece: Vec<u8>,
}

impl Server {
    /// A server on a guest that is set up. `children` tells of SIGCHLD, `pts` is the sandbox's
    /// `/dev/pts`.
    pub(crate) fn new(
        port: Port,
        guest: Guest,
        security: SecurityProfile,
        children: OwnedFd,
        pts: OwnedFd,
    ) -> Result<Self, Errno> {
        let outer = epoll::create(CreateFlags::CLOEXEC)?;
        let inner = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&outer, &port, EventData::new_u64(PORT), EventFlags::IN)?;
        epoll::add(
            &outer,
            &children,
            EventData::new_u64(CHILDREN),
            EventFlags::IN,
        )?;
        epoll::add(&outer, &inner, EventData::new_u64(OUTPUTS), EventFlags::IN)?;
        Ok(Self {
            port,
            connected: true,
            guest,
            restricted: security == SecurityProfile::Restricted,
            children,
            pts,
            outer,
            inner,
            commands: HashMap::new(),
            channels: HashMap::new(),
            shutdown: None,
            piece: vec![0; PIECE],
        })
    }

    /// Tells the host that commands are accepted.
    pub(crate) fn say_ready(&mut self, uptime_ms: u64) {
        self.port.send(0, &FromAgent::Ready { uptime_ms });
    }

    /// Serves until the guest is to be powered off, with all file systems left whole.
    pub(crate) fn run(&mut self) -> Result<(), PortError> {
        let result = self.serve();
        shutdown::finish();
        if self.connected {
            self.port.send(0, &FromAgent::Goodbye);
            self.port.flush(LAST_WORDS)?;
        }
        result
    }

    fn serve(&mut self) -> Result<(), PortError> {
        loop {
            let no_children = self.reap();
            // One time for all: a deadline between two looks at the clock would be slept through.
            let now = Instant::now();
            self.conclude(now);
            if self
                .shutdown
                .as_mut()
                .is_some_and(|shutdown| shutdown.is_over(now, no_children))
            {
                return Ok(());
            }
            match self.turn(now) {
                Err(PortError::HungUp) => self.lose_host()?,
                result => result?,
            }
        }
    }

    /// One round: waits for events and deals with them. What was due at `now` has been dealt with.
    fn turn(&mut self, now: Instant) -> Result<(), PortError> {
        if self.connected {
            self.port.write()?;
            self.choose_events()?;
        }
        for event in wait_events(&self.outer, self.patience(now))? {
            match event.data.u64() {
                PORT => self.hear(event.flags)?,
                // Every round reaps; reading only silences the descriptor.
                CHILDREN => drop(rustix::io::read(&self.children, &mut self.piece)),
                OUTPUTS => self.take_outputs()?,
                token => self.tend(token)?,
            }
        }
        Ok(())
    }

    /// Listens only to those for whom there is room.
    fn choose_events(&mut self) -> Result<(), Errno> {
        let lagging = self.commands.values().any(Command::lags);
        let mut events = EventFlags::empty();
        events.set(EventFlags::IN, !lagging);
        events.set(EventFlags::OUT, self.port.has_outgoing());
        epoll::modify(&self.outer, &self.port, EventData::new_u64(PORT), events)?;
        let outputs = if self.port.is_full() {
            EventFlags::empty()
        } else {
            EventFlags::IN
        };
        epoll::modify(
            &self.outer,
            &self.inner,
            EventData::new_u64(OUTPUTS),
            outputs,
        )
    }

    /// How long nothing may happen after `now`: until the first deadline.
    fn patience(&self, now: Instant) -> Option<Duration> {
        // A deadline that has passed is waiting for something else, and must not be spun on.
        let commands = self.commands.values().filter_map(Command::deadline);
        let next = commands.filter(|&deadline| deadline > now);
        let next = next
            .chain(self.shutdown.as_ref().map(Shutdown::deadline))
            .min();
        next.map(|deadline| deadline.saturating_duration_since(now))
    }

    /// Takes what the host says.
    fn hear(&mut self, events: EventFlags) -> Result<(), PortError> {
        if events.contains(EventFlags::IN) {
            self.port.read()?;
            while let Some(frame) = self.port.next_frame()? {
                self.obey(&frame)?;
            }
        } else if events.intersects(EventFlags::HUP | EventFlags::ERR) {
            return Err(PortError::HungUp);
        }
        Ok(())
    }

    fn obey(&mut self, frame: &Frame) -> Result<(), PortError> {
        let channel = frame.channel;
        if frame.kind == Kind::Stdin {
            return self.feed(channel, &frame.payload);
        }
        let message = match frame.message() {
            Ok(message) => message,
            Err(error) => {
                self.refuse(channel, "message", &describe(&error));
                return Ok(());
            }
        };
        match message {
            ToAgent::Exec(exec) => self.exec(channel, &exec)?,
            ToAgent::Mount(mount) => {
                let result = self.guest.add(&mount);
                self.answer(channel, "mount", mount.target, result);
            }
            ToAgent::Unmount { target, lazy } => {
                let result = self.guest.remove(&target, lazy);
                self.answer(channel, "unmount", target, result);
            }
            ToAgent::Shutdown { grace_ms } => {
                self.begin_shutdown(Duration::from_millis(grace_ms));
            }
            ToAgent::Boot(_) => self.refuse(channel, "boot", "the guest has been set up already"),
            // What concerns a command that has just ended comes too late, which is no error.
            ToAgent::Signal { signal } => {
                if let Some(command) = self.commands.get(&channel) {
                    report("signal a command", command.signal(signal));
                }
            }
            ToAgent::Resize(size) => {
                if let Some(command) = self.commands.get(&channel) {
                    report("resize a terminal", command.resize(size));
                }
            }
            ToAgent::OutputCredit { bytes } => {
                if let Some(command) = self.commands.get_mut(&channel) {
                    command.add_credit(bytes);
                    self.watch_outputs(channel)?;
                }
            }
        }
        Ok(())
    }

    fn exec(&mut self, channel: Channel, exec: &msb_protocol::Exec) -> Result<(), Errno> {
        let refusal = if self.commands.contains_key(&channel) {
            Some((Errno::BUSY, "the channel has a command already"))
        } else if self.shutdown.is_some() {
            Some((Errno::SHUTDOWN, "the guest is shutting down"))
        } else {
            None
        };
        let started = match refusal {
            Some((errno, message)) => Err((errno, message.to_owned())),
            None => Command::start(exec, &self.pts, self.restricted)
                .map_err(|errno| (errno, format!("cannot start a process: {errno}"))),
        };
        let command = match started {
            Ok(command) => command,
            Err((errno, message)) => {
                let errno = errno.raw_os_error();
                self.port
                    .send(channel, &FromAgent::ExecFailed { errno, message });
                return Ok(());
            }
        };
        if let Some(report) = command.fd(Stream::Report) {
            let data = token(channel, Stream::Report);
            epoll::add(&self.outer, report, data, EventFlags::IN)?;
        }
        self.channels.insert(command.pid(), channel);
        self.commands.insert(channel, command);
        Ok(())
    }

    /// Passes input on to a command.
    fn feed(&mut self, channel: Channel, bytes: &[u8]) -> Result<(), PortError> {
        let Some(command) = self.commands.get_mut(&channel) else {
            return Ok(());
        };
        if command.push_input(bytes) {
            self.write_input(channel)?;
        } else if !bytes.is_empty() {
            self.port.send(
                channel,
                &FromAgent::StdinTaken {
                    bytes: bytes.len() as u64,
                },
            );
        }
        Ok(())
    }

    fn write_input(&mut self, channel: Channel) -> Result<(), Errno> {
        let Some(command) = self.commands.get_mut(&channel) else {
            return Ok(());
        };
        let (bytes, next) = command.write_input();
        if bytes > 0 {
            self.port.send(channel, &FromAgent::StdinTaken { bytes });
        }
        if next == Next::Close {
            return self.close(channel, Stream::Stdin);
        }
        let Some(fd) = command.fd(Stream::Stdin) else {
            return Ok(());
        };
        if command.has_input() {
            watch(
                &self.outer,
                fd,
                token(channel, Stream::Stdin),
                EventFlags::OUT,
            )
        } else {
            unwatch(&self.outer, fd)
        }
    }

    /// Deals with a command's input or report.
    fn tend(&mut self, token: u64) -> Result<(), PortError> {
        let (channel, stream) = parse_token(token);
        if stream == Stream::Stdin {
            return Ok(self.write_input(channel)?);
        }
        let Some(command) = self.commands.get_mut(&channel) else {
            return Ok(());
        };
        let Some(message) = command.read_report() else {
            return Ok(());
        };
        self.port.send(channel, &message);
        self.close(channel, Stream::Report)?;
        if matches!(message, FromAgent::ExecFailed { .. }) {
            self.forget(channel);
        } else {
            self.watch_outputs(channel)?;
        }
        Ok(())
    }

    /// Takes output from the commands that have some, while the host keeps up.
    fn take_outputs(&mut self) -> Result<(), PortError> {
        for event in wait_events(&self.inner, Some(Duration::ZERO))? {
            if self.port.is_full() {
                break;
            }
            let (channel, stream) = parse_token(event.data.u64());
            let Some(command) = self.commands.get_mut(&channel) else {
                continue;
            };
            let (count, next) = command.read_output(stream, &mut self.piece);
            if let Some(bytes @ [_, ..]) = self.piece.get(..count) {
                self.port.send_output(channel, stream.kind(), bytes);
            }
            if next == Next::Close {
                self.close(channel, stream)?;
            } else if command.is_out_of_credit() {
                self.watch_outputs(channel)?;
            }
        }
        Ok(())
    }

    /// Listens to a running command's outputs, or no longer, as its credit says.
    fn watch_outputs(&mut self, channel: Channel) -> Result<(), Errno> {
        let Some(command) = self.commands.get(&channel) else {
            return Ok(());
        };
        if command.fd(Stream::Report).is_some() {
            return Ok(());
        }
        for stream in [Stream::Stdout, Stream::Stderr] {
            let Some(fd) = command.fd(stream) else {
                continue;
            };
            if command.is_out_of_credit() {
                unwatch(&self.inner, fd)?;
            } else {
                watch(&self.inner, fd, token(channel, stream), EventFlags::IN)?;
            }
        }
        Ok(())
    }

    /// Reaps every process that ended, also those that nobody else waits for. Says whether no
    /// process is left.
    fn reap(&mut self) -> bool {
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    let channel = self.channels.remove(&pid);
                    let command = channel.and_then(|channel| self.commands.get_mut(&channel));
                    if let Some(command) = command {
                        command.ended(status);
                    }
                }
                Ok(None) => return false,
                Err(Errno::INTR) => {}
                Err(_) => return true,
            }
        }
    }

    /// Tells the host of the commands that have ended.
    fn conclude(&mut self, now: Instant) {
        let outcome = |(&channel, command): (_, &Command)| Some((channel, command.outcome(now)?));
        let ended: Vec<_> = self.commands.iter().filter_map(outcome).collect();
        for (channel, status) in ended {
            self.port.send(channel, &FromAgent::Exited(status));
            self.forget(channel);
        }
    }

    fn forget(&mut self, channel: Channel) {
        for stream in [
            Stream::Report,
            Stream::Stdin,
            Stream::Stdout,
            Stream::Stderr,
        ] {
            report("forget a stream", self.close(channel, stream));
        }
        if let Some(command) = self.commands.remove(&channel) {
            self.channels.remove(&command.pid());
        }
    }

    /// Closes a stream. A copy of the descriptor may live on, in the other half of a terminal or
    /// in a child that is just starting, so closing alone would not end its events.
    fn close(&mut self, channel: Channel, stream: Stream) -> Result<(), Errno> {
        let Some(command) = self.commands.get_mut(&channel) else {
            return Ok(());
        };
        if let Some(fd) = command.fd(stream) {
            let is_output = matches!(stream, Stream::Stdout | Stream::Stderr);
            unwatch(if is_output { &self.inner } else { &self.outer }, fd)?;
        }
        command.close(stream);
        Ok(())
    }

    fn begin_shutdown(&mut self, grace: Duration) {
        self.shutdown.get_or_insert_with(|| Shutdown::begin(grace));
    }

    /// Goes on alone after the host has gone, only to shut down.
    fn lose_host(&mut self) -> Result<(), Errno> {
        if self.connected {
            self.connected = false;
            epoll::delete(&self.outer, &self.port)?;
            let channels: Vec<_> = self.commands.keys().copied().collect();
            for channel in channels {
                self.forget(channel);
            }
            self.begin_shutdown(ORPHANED);
        }
        Ok(())
    }

    fn answer(
        &mut self,
        channel: Channel,
        what: &str,
        target: String,
        result: Result<(), MountError>,
    ) {
        let message = match result {
            Ok(()) => FromAgent::Done { target },
            Err(error) => FromAgent::Failed {
                step: format!("{what} {target}"),
                target: Some(target),
                errno: error.errno(),
                message: describe(&error),
            },
        };
        self.port.send(channel, &message);
    }

    fn refuse(&mut self, channel: Channel, step: &str, message: &str) {
        let (step, message) = (step.to_owned(), message.to_owned());
        self.port.send(
            channel,
            &FromAgent::Failed {
                step,
                target: None,
                errno: None,
                message,
            },
        );
    }
}

fn report(what: &str, result: Result<(), Errno>) {
    if let Err(error) = result {
        eprintln!("msb-agent: cannot {what}: {error}");
    }
}
