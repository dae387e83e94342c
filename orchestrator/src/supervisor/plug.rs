//! Adds mounts to a running sandbox and removes them, one after the other.
//!
//! A mount is added as at a start: volume, backend, look at its jail, device, guest. What waits is
//! done by a task, which reports to the loop that owns everything. A mount is recorded when it
//! stands, so that whatever is killed before that leaves a sandbox without it, and a volume that
//! nobody mounts, which the next command removes.

use std::collections::VecDeque;
use std::time::Duration;

use msb_protocol::{FromAgent, GuestMount};
use tokio::sync::mpsc;

use super::boot::{Parts, listen, named_limit, purpose, start_backend};
use super::child::Child;
use super::guest::{Guest, Served};
use super::hub::Hub;
use super::revive::Spare;
use super::verify::verify;
use super::{FLUSH_LIMIT, Sandbox};
use crate::backend::Jail;
use crate::plan::{Addition, BackendPlan, VolumePlan};
use crate::rundir;
use crate::spec::{GuestPath, MountSpec};
use crate::vmm::Plug;
use crate::volume::{self, Prepared};
use crate::{Error, ErrorKind, MicrosandboxResult};

/// How long the guest may take for a mount, or to let a device go.
pub(super) fn patience() -> Duration {
    named_limit().unwrap_or(Duration::from_secs(60))
}

/// What was asked for.
enum Change {
    Mount(Box<Addition>),
    Unmount(GuestPath, bool),
}

/// What a task has done.
pub(super) enum Done {
    /// The volume of an addition is there.
    Prepared(u64, Box<Addition>, MicrosandboxResult<Prepared>),
    /// A mount stands, or nothing of it is left.
    Mount(Box<MountEnd>),
    /// A mount is gone, or stands as before.
    Unmount(Box<UnmountEnd>),
}

pub(super) struct MountEnd {
    client: u64,
    plug: Plug,
    addition: Box<Addition>,
    backend: Option<usize>,
    result: MicrosandboxResult<Prepared>,
}

pub(super) struct UnmountEnd {
    client: u64,
    plug: Plug,
    target: String,
    backend: Option<usize>,
    result: MicrosandboxResult<()>,
}

/// Changes of the mounts: one under way, the others waiting.
pub(super) struct Changes {
    waiting: VecDeque<(u64, Change)>,
    busy: bool,
    done: mpsc::UnboundedSender<Done>,
    /// Where the agent's answers go.
    answers: Option<mpsc::UnboundedSender<FromAgent>>,
}

impl Changes {
    pub(super) fn new() -> (Self, mpsc::UnboundedReceiver<Done>) {
        let (done, results) = mpsc::unbounded_channel();
        let changes = Self {
            waiting: VecDeque::new(),
            busy: false,
            done,
            answers: None,
        };
        (changes, results)
    }

    /// Passes on what the agent says about mounts.
    pub(super) fn hear_agent(&self, message: FromAgent) {
        if let Some(answers) = &self.answers {
            // Nobody listens between two changes.
            let _ = answers.send(message);
        }
    }
}

impl Hub<'_> {
    /// Adds a mount.
    pub(super) fn mount(&mut self, parts: &mut Parts, client: u64, addition: Box<Addition>) {
        self.ask(parts, client, Change::Mount(addition));
    }

    /// Removes a mount.
    pub(super) fn unmount(
        &mut self,
        parts: &mut Parts,
        client: u64,
        target: GuestPath,
        force: bool,
    ) {
        self.ask(parts, client, Change::Unmount(target, force));
    }

    fn ask(&mut self, parts: &mut Parts, client: u64, change: Change) {
        self.changes.waiting.push_back((client, change));
        self.begin_next(parts);
    }

    /// Begins what waits, up to a change that takes time.
    fn begin_next(&mut self, parts: &mut Parts) {
        while !self.changes.busy {
            let Some((client, change)) = self.changes.waiting.pop_front() else {
                return;
            };
            let begun = if self.stopping.is_some() {
                Err(Error::new(
                    ErrorKind::SandboxNotRunning,
                    "the sandbox is being stopped",
                ))
            } else {
                match change {
                    Change::Mount(addition) => self.begin_mount(client, addition),
                    Change::Unmount(target, force) => {
                        self.begin_unmount(parts, client, &target, force)
                    }
                }
            };
            if let Err(error) = begun {
                self.answer(client, Some(&error));
            }
        }
    }

    /// Goes on with the change that is under way.
    pub(super) fn go_on(&mut self, parts: &mut Parts, done: Done) {
        match done {
            Done::Prepared(client, addition, prepared) => {
                let placed =
                    prepared.and_then(|prepared| self.place(parts, client, addition, prepared));
                match placed {
                    Ok(()) => return,
                    Err(error) => self.answer(client, Some(&error)),
                }
            }
            Done::Mount(end) => self.end_mount(parts, *end),
            Done::Unmount(end) => self.end_unmount(parts, *end),
        }
        self.changes.busy = false;
        self.changes.answers = None;
        self.begin_next(parts);
    }

    fn begin_mount(&mut self, client: u64, addition: Box<Addition>) -> MicrosandboxResult<()> {
        let target = addition.mount.target.as_str();
        let mut mounts = self.sandbox.plan.guest.mounts.iter();
        if mounts.any(|mount| mount.target == target) {
            let message = format!("something is mounted at `{target}` already");
            return Err(Error::new(ErrorKind::InvalidConfig, message).with_value(target));
        }
        let (home, name) = (self.sandbox.home.clone(), self.sandbox.dir.name().clone());
        let done = self.changes.done.clone();
        self.changes.busy = true;
        tokio::spawn(async move {
            let wanted: Vec<_> = addition.volume.iter().cloned().collect();
            let owned: Vec<_> = addition.owned.iter().cloned().collect();
            let prepared = blocking(move || volume::prepare(&home, &name, &wanted, &owned)).await;
            let _ = done.send(Done::Prepared(client, addition, prepared));
        });
        Ok(())
    }

    /// Starts the backend, and leaves the rest to a task.
    fn place(
        &mut self,
        parts: &mut Parts,
        client: u64,
        addition: Box<Addition>,
        prepared: Prepared,
    ) -> MicrosandboxResult<()> {
        let jail = Jail::from_env()?;
        let started = addition.backend.as_ref();
        let started = started
            .map(|plan| start(self.sandbox, parts, plan, jail))
            .transpose();
        let served = match started {
            Ok(served) => served,
            Err(error) => {
                prepared.take_back(&self.sandbox.home);
                return Err(error);
            }
        };
        let mut plug = std::mem::take(&mut parts.plug);
        let mut guest = self.guest();
        let (home, done) = (self.sandbox.home.clone(), self.changes.done.clone());
        tokio::spawn(async move {
            let backend = served.as_ref().map(|served| served.child.number);
            let stands = stand(&mut plug, &mut guest, served, &addition.guest, jail).await;
            let result = match stands {
                Ok(()) => Ok(prepared),
                Err(error) => {
                    let back = blocking(move || {
                        prepared.take_back(&home);
                        Ok(())
                    });
                    back.await.and(Err(error))
                }
            };
            let _ = done.send(Done::Mount(Box::new(MountEnd {
                client,
                plug,
                addition,
                backend,
                result,
            })));
        });
        Ok(())
    }

    fn end_mount(&mut self, parts: &mut Parts, end: MountEnd) {
        let MountEnd {
            client,
            plug,
            addition,
            backend,
            result,
        } = end;
        parts.plug = plug;
        let prepared = match result {
            Ok(prepared) => prepared,
            Err(error) => {
                parts.forget(self.sandbox, backend);
                return self.answer(client, Some(&error));
            }
        };
        let plan = &mut self.sandbox.plan;
        let Addition {
            mount,
            volume,
            owned,
            backend: served,
            guest,
        } = *addition;
        plan.backends.extend(served);
        plan.guest.mounts.push(guest);
        let known = |volume: &VolumePlan| plan.volumes.iter().any(|old| old.name == volume.name);
        let volume = volume.filter(|volume| !known(volume));
        plan.volumes.extend(volume);
        plan.owned.extend(owned);
        let recorded = record(self.sandbox, |mounts| mounts.push(mount));
        prepared.keep(&self.sandbox.home);
        parts.need(backend);
        self.answer(client, recorded.err().as_ref());
    }

    fn begin_unmount(
        &mut self,
        parts: &mut Parts,
        client: u64,
        target: &GuestPath,
        force: bool,
    ) -> MicrosandboxResult<()> {
        let target = target.to_string();
        let mut mounts = self.sandbox.plan.guest.mounts.iter();
        let Some(mount) = mounts.find(|mount| mount.target == target).cloned() else {
            let message = format!("no volume is mounted at `{target}`");
            return Err(Error::new(ErrorKind::InvalidConfig, message).with_value(target));
        };
        let mut plans = self.sandbox.plan.backends.iter();
        let plan = plans.find(|plan| plan.purpose == target).cloned();
        let name = purpose(&target);
        let mut children = parts.backends.iter_mut();
        let child = children.find(|child| child.purpose == name);
        let served = match (plan, child) {
            (Some(plan), Some(child)) => {
                let socket = self.sandbox.sockets.socket(&format!("d{}", child.number))?;
                child.needed = false;
                Some(Served {
                    plan,
                    child: child.clone(),
                    socket,
                })
            }
            _ => None,
        };
        let mut plug = std::mem::take(&mut parts.plug);
        let mut guest = self.guest();
        let done = self.changes.done.clone();
        self.changes.busy = true;
        tokio::spawn(async move {
            let backend = served.as_ref().map(|served| served.child.number);
            let result = fall(&mut plug, &mut guest, served, &mount, force).await;
            let _ = done.send(Done::Unmount(Box::new(UnmountEnd {
                client,
                plug,
                target,
                backend,
                result,
            })));
        });
        Ok(())
    }

    fn end_unmount(&mut self, parts: &mut Parts, end: UnmountEnd) {
        let UnmountEnd {
            client,
            plug,
            target,
            backend,
            result,
        } = end;
        parts.plug = plug;
        if let Err(error) = result {
            parts.need(backend);
            return self.answer(client, Some(&error));
        }
        parts.forget(self.sandbox, backend);
        let plan = &mut self.sandbox.plan;
        plan.backends.retain(|backend| backend.purpose != target);
        plan.guest.mounts.retain(|mount| mount.target != target);
        let recorded = record(self.sandbox, |mounts| {
            mounts.retain(|mount| mount.target.as_str() != target);
        });
        self.answer(client, recorded.err().as_ref());
    }

    fn guest(&mut self) -> Guest {
        let (send, answers) = mpsc::unbounded_channel();
        self.changes.answers = Some(send);
        Guest {
            agent: self.agent.clone(),
            answers,
        }
    }
}

impl Parts {
    /// From now on the sandbox cannot go on without the backend.
    fn need(&mut self, backend: Option<usize>) {
        let Some(number) = backend else { return };
        let Some(child) = self.backend(number) else {
            return;
        };
        child.needed = true;
        // If it has ended meanwhile, nobody has been told.
        if child.status().is_some()
            && let Some(ends) = &self.send_end
        {
            let _ = ends.send(number);
        }
    }

    /// Forgets a backend that has ended.
    fn forget(&mut self, sandbox: &Sandbox, backend: Option<usize>) {
        let Some(number) = backend else { return };
        self.backends.retain(|backend| backend.number != number);
        self.spares.retain(|spare| spare.number != number);
        if let Ok(socket) = sandbox.sockets.socket(&format!("d{number}")) {
            // What is left of it goes with the folder.
            let _ = std::fs::remove_file(socket);
        }
    }
}

/// Starts the backend of one more mount.
fn start(
    sandbox: &Sandbox,
    parts: &mut Parts,
    plan: &BackendPlan,
    jail: Jail,
) -> MicrosandboxResult<Served> {
    let number = parts.next;
    parts.next += 1;
    let ends = parts
        .send_end
        .clone()
        .ok_or_else(|| Error::new(ErrorKind::SandboxNotRunning, "the sandbox is not running"))?;
    let socket = sandbox.sockets.socket(&format!("d{number}"))?;
    let listener = listen(&socket)?;
    let spare = Spare::keep(number, plan, &sandbox.plan.vm, &listener, &ends)?;
    let mut child = start_backend(sandbox, plan, number, jail, listener, &ends)?;
    child.needed = false;
    parts.spares.extend(spare);
    parts.backends.push(child.clone());
    Ok(Served {
        plan: plan.clone(),
        child,
        socket,
    })
}

/// Brings a mount up, or leaves nothing of it.
async fn stand(
    plug: &mut Plug,
    guest: &mut Guest,
    served: Option<Served>,
    mount: &GuestMount,
    jail: Jail,
) -> MicrosandboxResult<()> {
    let Some(mut served) = served else {
        return guest.mount(mount).await;
    };
    let mut plugged = false;
    let stands = async {
        verify(&served.plan, &served.child, jail).await?;
        if served.child.status().is_some() {
            return Err(served.died());
        }
        plug.attach(&served.plan, &served.socket).await?;
        plugged = true;
        served.while_it_lives(guest.mount(mount)).await
    };
    let stands = stands.await;
    if stands.is_err() {
        let mut detached = false;
        if plugged {
            match plug.detach(&served.plan).await {
                Ok(()) => detached = true,
                Err(error) => {
                    tracing::warn!("{}: its device stays: {error}", served.child.purpose);
                }
            }
        }
        give_up(&mut served.child, detached).await;
    }
    stands
}

/// Ends the backend of a mount that does not stand. If its device was `detached`, the guest lets it
/// go first: one that still looks at a device that nobody serves waits for ever.
async fn give_up(child: &mut Child, detached: bool) {
    let limit = if detached {
        patience()
    } else {
        Duration::from_millis(500)
    };
    if !child.ended_within(limit).await {
        child.end(FLUSH_LIMIT).await;
    }
}

/// Takes a mount down, or leaves it as it was.
async fn fall(
    plug: &mut Plug,
    guest: &mut Guest,
    served: Option<Served>,
    mount: &GuestMount,
    force: bool,
) -> MicrosandboxResult<()> {
    let Some(mut served) = served else {
        return guest.unmount(&mount.target, force).await;
    };
    let unmounted = guest.unmount(&mount.target, force);
    served.while_it_lives(unmounted).await?;
    let mut gone = plug.detach(&served.plan).await;
    if gone.is_ok() && !served.child.ended_within(patience()).await {
        gone = Err(Error::new(
            ErrorKind::BootStart,
            "the guest does not let the device go",
        ));
    }
    if gone.is_err()
        && let Err(error) = guest.mount(mount).await
    {
        tracing::warn!("{} is not mounted any more: {error}", mount.target);
    }
    gone
}

/// Keeps what a restart mounts, and what `msb inspect` shows.
fn record(sandbox: &Sandbox, change: impl FnOnce(&mut Vec<MountSpec>)) -> MicrosandboxResult<()> {
    let recorded = sandbox.dir.spec().and_then(|mut spec| {
        change(&mut spec.mounts);
        sandbox.dir.write_spec(&spec)?;
        rundir::write_json(&sandbox.dir.plan_path(), &sandbox.plan)
    });
    recorded.map_err(|error| {
        Error::new(
            ErrorKind::Io,
            "it is done, but not recorded for the next start",
        )
        .with_source(error)
    })
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> MicrosandboxResult<T> + Send + 'static,
) -> MicrosandboxResult<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| Error::io("the work was interrupted", std::io::Error::other(error)))?
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use super::*;

    /// How a backend ends that the guest lets go after a second and more.
    async fn ended(detached: bool) -> (Option<i32>, Option<i32>) {
        let (ends, _ended) = mpsc::unbounded_channel();
        let mut command = Command::new("sleep");
        command.arg("1.2");
        let log = File::options().append(true).open("/dev/null").unwrap();
        let mut child = Child::start(String::new(), command, &log, 0, ends).unwrap();
        give_up(&mut child, detached).await;
        let status = child.status().unwrap();
        (status.code(), status.signal())
    }

    #[tokio::test]
    async fn a_backend_serves_until_the_guest_has_let_its_device_go() {
        assert_eq!(ended(true).await, (Some(0), None));
        assert_eq!(ended(false).await, (None, Some(libc::SIGTERM)));
    }
}
