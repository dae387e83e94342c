//! The thread that does what takes long, off the data path: flushes and large discards.
//!
//! Flushes that wait at the same time are answered by one: it covers every write that was complete
//! when it began.

use std::io;
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

/// The commit thread of one image.
pub(crate) struct Committer<T> {
    jobs: Mutex<Option<Sender<Job<T>>>>,
    thread: Option<JoinHandle<()>>,
}

impl<T: Send + 'static> Committer<T> {
    /// Starts the thread; `done` is called on it with each finished job and whether it succeeded.
    pub(crate) fn start(
        image: Arc<Image>,
        done: impl Fn(T, bool) + Send + 'static,
    ) -> io::Result<Self> {
        let (jobs, queue) = channel();
        let thread = std::thread::Builder::new()
            .name("msb-blk-commit".into())
            .spawn(move || work(&image, &queue, done))?;
        Ok(Self {
            jobs: Mutex::new(Some(jobs)),
            thread: Some(thread),
        })
    }

    /// Queues a job. Gives it back if the thread has ended.
    pub(crate) fn submit(&self, job: Job<T>) -> Result<(), Job<T>> {
        match self
            .jobs
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
        {
            Some(jobs) => jobs.send(job).map_err(|e| e.0),
            None => Err(job),
        }
    }
}

fn work<T>(image: &Image, queue: &Receiver<Job<T>>, done: impl Fn(T, bool)) {
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
        let result = image.flush();
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
        drop(
            self.jobs
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
        );
        if let Some(thread) = self.thread.take() {
            // A panic there has ended the process already.
            let _ = thread.join();
        }
    }
}
