//! Starts the backend of a disk again when it dies under a VMM that connects to the next one.
//!
//! The guest's requests that were under way are recorded in memory that the VMM keeps; the next
//! process finds them there and does them again, so the guest notices a pause and nothing else.

use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::Sandbox;
use super::boot::{Parts, start_backend};
use super::child::Child;
use super::verify::verify;
use crate::backend::Jail;
use crate::plan::{BackendPlan, DevicePlan, VmPlan};
use crate::spec::VmmKind;
use crate::{Error, MicrosandboxResult};

/// A backend that dies more often than this within the time below is not started again.
const DEATHS: usize = 5;
const WITHIN: Duration = Duration::from_secs(60);

/// What the next process of a backend needs.
#[derive(Debug)]
pub(super) struct Spare {
    pub(super) number: usize,
    plan: BackendPlan,
    listener: UnixListener,
    ends: mpsc::UnboundedSender<usize>,
    deaths: Vec<Instant>,
}

impl Spare {
    /// Keeps the socket of backend `number`, if another process can take its place: only disks are
    /// without memory of their own, and only QEMU connects again.
    pub(super) fn keep(
        number: usize,
        plan: &BackendPlan,
        vm: &VmPlan,
        listener: &UnixListener,
        ends: &mpsc::UnboundedSender<usize>,
    ) -> MicrosandboxResult<Option<Self>> {
        if !matches!(plan.device, DevicePlan::Blk(_)) || vm.vmm != VmmKind::Qemu {
            return Ok(None);
        }
        let listener = listener
            .try_clone()
            .map_err(|error| Error::io("cannot keep a backend's socket", error))?;
        Ok(Some(Self {
            number,
            plan: plan.clone(),
            listener,
            ends: ends.clone(),
            deaths: Vec::new(),
        }))
    }

    fn dies_too_often(&mut self) -> bool {
        let now = Instant::now();
        self.deaths
            .retain(|death| now.duration_since(*death) < WITHIN);
        self.deaths.push(now);
        self.deaths.len() > DEATHS
    }
}

impl Parts {
    /// The backend with this number, unless it has been removed.
    pub(super) fn backend(&mut self, number: usize) -> Option<&mut Child> {
        self.backends
            .iter_mut()
            .find(|backend| backend.number == number)
    }

    /// Starts backend `number` again if it has failed and that may help; whether it did.
    ///
    /// # Errors
    ///
    /// When the next one cannot be started, or is not in its jail.
    pub(super) async fn revive(
        &mut self,
        sandbox: &Sandbox,
        number: usize,
    ) -> MicrosandboxResult<bool> {
        let failed = self.backend(number).is_some_and(|child| child.failed());
        let spare = self.spares.iter_mut().find(|spare| spare.number == number);
        let (true, Some(spare)) = (failed, spare) else {
            return Ok(false);
        };
        if spare.dies_too_often() {
            return Ok(false);
        }
        let plan = &spare.plan;
        let listener = spare
            .listener
            .try_clone()
            .map_err(|error| Error::io("cannot pass on a backend's socket", error))?;
        let jail = Jail::from_env()?;
        let child = start_backend(sandbox, plan, number, jail, listener, &spare.ends)?;
        verify(plan, &child, jail).await?;
        if let Some(place) = self.backend(number) {
            let dead = std::mem::replace(place, child);
            tracing::warn!(
                "the backend of {} ended and was started again: {}",
                dead.purpose,
                dead.last_words()
            );
        }
        Ok(true)
    }
}
