//! The agent, as a task of the supervisor speaks with it about one mount.

use msb_protocol::{FromAgent, GuestMount, ToAgent};
use tokio::sync::mpsc;

use super::plug::PATIENCE;
use crate::agent::FrameSender;
use crate::{Error, ErrorKind, MicrosandboxResult};

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
        let silent = || Error::new(ErrorKind::Boot, "the guest does not answer");
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
        tokio::time::timeout(PATIENCE, answered)
            .await
            .unwrap_or_else(|_| Err(silent()))
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
    Error::new(ErrorKind::Boot, format!("in the guest, {step}: {message}"))
}
