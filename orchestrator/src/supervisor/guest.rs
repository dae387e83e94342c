//! The two sides of one mount, as a task of the supervisor works with them: agent and backend.

use std::path::PathBuf;
use std::time::Duration;

use msb_protocol::{FromAgent, GuestMount, ToAgent};
use tokio::sync::mpsc;

use super::child::Child;
use super::plug::patience;
use crate::agent::FrameSender;
use crate::plan::BackendPlan;
use crate::{Error, ErrorKind, MicrosandboxResult};

/// A backend of a mount, as a task works with it.
pub(super) struct Served {
    pub(super) plan: BackendPlan,
    pub(super) child: Child,
    pub(super) socket: PathBuf,
}

/// Both directions: what is sent, and the answers that the loop passes on.
pub(super) struct Guest {
    pub(super) agent: FrameSender,
    pub(super) answers: mpsc::UnboundedReceiver<FromAgent>,
}

impl Guest {
    /// Has a volume mounted.
    pub(super) async fn mount(&mut self, mount: &GuestMount) -> MicrosandboxResult<()> {
        self.agent.message(0, &ToAgent::Mount(mount.clone()));
        self.answer(&mount.target).await
    }

    /// Has a volume unmounted.
    pub(super) async fn unmount(&mut self, target: &str, lazy: bool) -> MicrosandboxResult<()> {
        let target = target.to_owned();
        let message = ToAgent::Unmount {
            target: target.clone(),
            lazy,
        };
        self.agent.message(0, &message);
        self.answer(&target).await
    }

    async fn answer(&mut self, about: &str) -> MicrosandboxResult<()> {
        let silent = || Error::new(ErrorKind::BootStart, "the guest does not answer");
        let answered = async {
            loop {
                match self.answers.recv().await.ok_or_else(silent)? {
                    FromAgent::Done { target } if target == about => return Ok(()),
                    FromAgent::Failed {
                        step,
                        target: Some(target),
                        errno,
                        message,
                    } if target == about => return Err(refused(&step, &target, errno, &message)),
                    _ => {}
                }
            }
        };
        tokio::time::timeout(patience(), answered)
            .await
            .unwrap_or_else(|_| Err(silent()))
    }
}

impl Served {
    /// Waits for something that cannot come when the backend has ended.
    pub(super) async fn while_it_lives(
        &self,
        work: impl Future<Output = MicrosandboxResult<()>>,
    ) -> MicrosandboxResult<()> {
        let mut child = self.child.clone();
        tokio::select! {
            done = work => done,
            true = child.ended_within(Duration::MAX) => Err(self.died()),
        }
    }

    /// What its end means for the mount.
    pub(super) fn died(&self) -> Error {
        let Child { purpose, .. } = &self.child;
        let message = format!(
            "the backend of {purpose} ended: {}",
            self.child.last_words()
        );
        Error::new(ErrorKind::BootStart, message)
    }
}

/// Why the agent did not do it.
fn refused(step: &str, target: &str, errno: Option<i32>, message: &str) -> Error {
    if step.starts_with("unmount") && errno == Some(libc::EBUSY) {
        let message = format!("`{target}` is in use in the sandbox");
        return Error::new(ErrorKind::InUse, message)
            .with_value(target)
            .with_hint(
                "end the commands that work there and remove the mounts below it, or add --force",
            );
    }
    Error::new(
        ErrorKind::BootStart,
        format!("in the guest, {step}: {message}"),
    )
}
