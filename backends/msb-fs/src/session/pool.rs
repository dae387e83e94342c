//! Threads for what waits for the disk, so that the queues need not.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Most threads. They begin with the first work there is, and so after the jail is up.
const THREADS: usize = 4;

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
    ending: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    work: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                job();
                state = self.lock();
            } else if state.ending {
                return;
            } else {
                state.idle += 1;
                state = self
                    .work
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
            }
        }
    }
}

/// A pool of threads that carries out what may wait.
#[derive(Default)]
pub(crate) struct Pool(Arc<Shared>);

impl Pool {
    /// Has `job` carried out soon: by a thread of the pool, or by the caller when there can be
    /// none.
    pub(crate) fn run(&self, job: impl FnOnce() + Send + 'static) {
        let mut state = self.0.lock();
        state.jobs.push_back(Box::new(job));
        if state.idle >= state.jobs.len() || state.threads == THREADS {
            drop(state);
            self.0.work.notify_one();
            return;
        }
        let shared = Arc::clone(&self.0);
        let thread = std::thread::Builder::new().name("msb-fs-io".to_owned());
        if thread.spawn(move || shared.serve()).is_ok() {
            state.threads += 1;
        } else if state.threads == 0 {
            let jobs = std::mem::take(&mut state.jobs);
            drop(state);
            jobs.into_iter().for_each(|job| job());
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.0.lock().ending = true;
        self.0.work.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn more_jobs_than_threads_are_all_done() {
        let pool = Pool::default();
        let (done, results) = channel();
        for number in 0..100 {
            let done = done.clone();
            pool.run(move || done.send(number).unwrap());
        }
        let mut found: Vec<i32> = results.iter().take(100).collect();
        found.sort_unstable();
        assert_eq!(found, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn jobs_that_wait_do_not_keep_others_back() {
        let pool = Pool::default();
        let (go, wait) = channel::<()>();
        let (done, result) = channel();
        pool.run(move || wait.recv().unwrap());
        pool.run(move || done.send(()).unwrap());
        result
            .recv_timeout(std::time::Duration::from_secs(10))
            .unwrap();
        go.send(()).unwrap();
    }
}
