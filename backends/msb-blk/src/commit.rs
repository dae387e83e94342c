//! The thread that does what takes long, off the data path: flushes and large discards.
//!
//! Flushes that wait at the same time are answered by one: it covers every write that was complete
//! when it began.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::image::{Image, ImageError};

/// Something to do, with what to hand back afterwards.
pub(crate) enum Job<T> {
    /// Flush the image.
    Flush(T),
    /// Anything else that may take long; whether a flush follows before it counts as done.
    Run(Work, bool, T),
}

/// What a job does.
pub(crate) type Work = Box<dyn FnOnce(&Image) -> Result<(), ImageError> + Send>;

/// The commit thread of one image. It starts with the first job, so that it inherits the signal
/// mask and the jail of a process that serves already.
pub(crate) struct Committer<T> {
    image: Arc<Image>,
    done: fn(T, bool),
    is_flushing: Arc<AtomicBool>,
    state: Mutex<Option<Running<T>>>,
}

struct Running<T> {
    jobs: Sender<Job<T>>,
    thread: JoinHandle<()>,
}

impl<T: Send + 'static> Committer<T> {
    /// `done` is called on the thread with each finished job and whether it succeeded.
    pub(crate) fn new(image: Arc<Image>, done: fn(T, bool)) -> Self {
        Self {
            image,
            done,
            is_flushing: Arc::default(),
            state: Mutex::new(None),
        }
    }

    /// Whether a flush is under way.
    pub(crate) fn is_flushing(&self) -> bool {
        self.is_flushing.load(Ordering::Relaxed)
    }

    /// Queues a job. Gives it back if the thread cannot be started or has ended.
    pub(crate) fn submit(&self, job: Job<T>) -> Result<(), Job<T>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.is_none() {
            *state = self
                .start()
                .inspect_err(|error| tracing::error!(%error, "no thread"))
                .ok();
        }
        match state.as_ref() {
            Some(running) => running.jobs.send(job).map_err(|e| e.0),
            None => Err(job),
        }
    }

    fn start(&self) -> io::Result<Running<T>> {
        let (jobs, queue) = channel();
        let (image, done) = (Arc::clone(&self.image), self.done);
        let is_flushing = Arc::clone(&self.is_flushing);
        let thread = std::thread::Builder::new()
            .name("msb-blk-commit".into())
            .spawn(move || work(&image, &queue, done, &is_flushing))?;
        Ok(Running { jobs, thread })
    }
}

fn work<T>(image: &Image, queue: &Receiver<Job<T>>, done: fn(T, bool), is_flushing: &AtomicBool) {
    while let Ok(first) = queue.recv() {
        let mut flushes = Vec::new();
        for job in std::iter::once(first).chain(queue.try_iter()) {
            match job {
                Job::Flush(tag) => flushes.push(tag),
                Job::Run(run, then_flush, tag) => match run(image) {
                    Ok(()) if then_flush => flushes.push(tag),
                    Ok(()) => done(tag, true),
                    Err(error) => {
                        tracing::debug!(%error, "request failed");
                        done(tag, false);
                    }
                },
            }
        }
        if flushes.is_empty() {
            continue;
        }
        is_flushing.store(true, Ordering::Relaxed);
        let result = image.flush();
        is_flushing.store(false, Ordering::Relaxed);
        if let Err(error) = &result {
            tracing::error!(%error, "flush failed");
        }
        for tag in flushes {
            done(tag, result.is_ok());
        }
    }
}

impl<T> Drop for Committer<T> {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(Running { jobs, thread }) = state.take() {
            drop(jobs);
            // A panic there has ended the process already.
            let _ = thread.join();
        }
    }
}
