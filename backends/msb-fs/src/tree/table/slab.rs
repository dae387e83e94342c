//! Values that are found by number without a search, each behind a lock of its own.
//!
//! A number names a slot and its generation: once the value is gone, the number never means another
//! one. Slots live in chunks that are never moved or freed, so that finding one takes no lock but
//! its own, and two queues meet only at the same value.

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// Slots in one chunk.
const CHUNK: usize = 1024;
/// Most chunks: eight million values.
const CHUNKS: usize = 8192;

/// A place for one value.
pub(crate) struct Slot<T> {
    generation: u32,
    pub(crate) value: Option<T>,
}

type Chunk<T> = [Mutex<Slot<T>>];

/// Which slots are free.
#[derive(Default)]
struct Free {
    list: Vec<u32>,
    /// The first slot that was never used.
    next: u32,
}

/// A table of values. Number zero is none; the first value that is added gets number one.
pub(crate) struct Slab<T> {
    chunks: Box<[OnceLock<Box<Chunk<T>>>]>,
    free: Mutex<Free>,
}

/// There is no room for another value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Full;

/// Locks whether or not a thread panicked in here: the process ends when one does.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<T> Slab<T> {
    pub(crate) fn new() -> Self {
        Self {
            chunks: (0..CHUNKS).map(|_| OnceLock::new()).collect(),
            free: Mutex::default(),
        }
    }

    /// Adds a value that may depend on its number.
    pub(crate) fn insert(&self, make: impl FnOnce(u64) -> T) -> Result<u64, Full> {
        let index = {
            let mut free = lock(&self.free);
            match free.list.pop() {
                Some(index) => index,
                None if (free.next as usize) < CHUNK * CHUNKS => {
                    free.next += 1;
                    free.next - 1
                }
                None => return Err(Full),
            }
        };
        let chunk = self.chunks.get(index as usize / CHUNK).ok_or(Full)?;
        let slots = chunk.get_or_init(|| {
            let empty = || Slot {
                generation: 0,
                value: None,
            };
            (0..CHUNK).map(|_| Mutex::new(empty())).collect()
        });
        let slot = slots.get(index as usize % CHUNK).ok_or(Full)?;
        let mut slot = lock(slot);
        let number = number(index, slot.generation);
        slot.value = Some(make(number));
        Ok(number)
    }

    /// The slot that `number` names, locked, when it still holds that value.
    pub(crate) fn lock(&self, number: u64) -> Option<MutexGuard<'_, Slot<T>>> {
        let (index, generation) = parts(number)?;
        let slot = self.lock_index(index)?;
        (slot.generation == generation && slot.value.is_some()).then_some(slot)
    }

    /// The value that `number` names, by way of `look`.
    pub(crate) fn get<R>(&self, number: u64, look: impl FnOnce(&mut T) -> R) -> Option<R> {
        self.lock(number)?.value.as_mut().map(look)
    }

    /// The value in slot `index`, with its number, by way of `look`.
    pub(crate) fn at<R>(&self, index: u32, look: impl FnOnce(u64, &mut T) -> R) -> Option<R> {
        let mut slot = self.lock_index(index)?;
        let number = number(index, slot.generation);
        slot.value.as_mut().map(|value| look(number, value))
    }

    /// Takes the value out of a locked slot and frees it. The value is the caller's to drop, once
    /// no lock is held.
    pub(crate) fn take(&self, number: u64, mut slot: MutexGuard<'_, Slot<T>>) -> Option<T> {
        let value = slot.value.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        drop(slot);
        if let Some((index, _)) = parts(number) {
            lock(&self.free).list.push(index);
        }
        Some(value)
    }

    /// Removes the value that `number` names.
    pub(crate) fn remove(&self, number: u64) -> Option<T> {
        let slot = self.lock(number)?;
        self.take(number, slot)
    }

    /// The number of the value in slot `index`, if there is one.
    pub(crate) fn number_at(&self, index: u32) -> Option<u64> {
        let slot = self.lock_index(index)?;
        slot.value.is_some().then(|| number(index, slot.generation))
    }

    /// How many slots were ever used.
    pub(crate) fn used(&self) -> u32 {
        lock(&self.free).next
    }

    fn lock_index(&self, index: u32) -> Option<MutexGuard<'_, Slot<T>>> {
        let chunk = self.chunks.get(index as usize / CHUNK)?.get()?;
        Some(lock(chunk.get(index as usize % CHUNK)?))
    }
}

/// The slot that `number` names.
pub(crate) fn index(number: u64) -> Option<u32> {
    parts(number).map(|(index, _)| index)
}

/// Bytes that a value takes.
pub(crate) const fn slot_size<T>() -> usize {
    size_of::<Mutex<Slot<T>>>()
}

fn number(index: u32, generation: u32) -> u64 {
    (u64::from(generation) << 32) | (u64::from(index) + 1)
}

fn parts(number: u64) -> Option<(u32, u32)> {
    let low = u32::try_from(number & u64::from(u32::MAX)).ok()?;
    let generation = u32::try_from(number >> 32).ok()?;
    Some((low.checked_sub(1)?, generation))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_never_means_a_second_value() {
        let slab = Slab::new();
        let first = slab.insert(|_| 'a').unwrap();
        assert_eq!((first, slab.get(first, |value| *value)), (1, Some('a')));
        assert_eq!(slab.remove(first), Some('a'));
        let second = slab.insert(|_| 'b').unwrap();
        assert_ne!(first, second);
        assert_eq!(slab.get(first, |value| *value), None);
        assert_eq!(slab.remove(first), None);
        assert_eq!(slab.get(second, |value| *value), Some('b'));
        for bad in [0, 2, u64::MAX, u64::from(u32::MAX)] {
            assert_eq!(slab.get(bad, |value| *value), None, "{bad}");
        }
    }

    #[test]
    fn values_of_many_chunks_are_found() {
        let slab = Slab::new();
        let numbers: Vec<_> = (0..CHUNK * 3)
            .map(|count| slab.insert(|_| count).unwrap())
            .collect();
        for (count, number) in numbers.iter().enumerate() {
            assert_eq!(slab.get(*number, |value| *value), Some(count));
        }
    }
}
