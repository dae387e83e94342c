//! Guest memory: mappings, bounds, and the raw loads and stores on them; signals.

use std::io;
use std::marker::PhantomData;
use std::mem;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use smallvec::SmallVec;

use crate::message::RegionMessage;

/// Spans of host addresses that one side of a request is made of.
pub(crate) type Spans = SmallVec<[libc::iovec; 4]>;

/// The largest page there is.
const LARGEST_PAGE: u64 = 1 << 30;

/// One mapped piece of memory that another process may change at any time.
#[derive(Debug)]
pub(crate) struct Region {
    /// Where the guest sees it.
    pub(crate) guest: u64,
    /// Length in bytes.
    pub(crate) size: u64,
    /// Where the front end sees it; rings are named by these addresses.
    pub(crate) user: u64,
    mapping: NonNull<u8>,
    mapped: usize,
    /// Bytes from the begin of the mapping to that of the region.
    lead: usize,
}

// SAFETY: the mapping belongs to this value until it is dropped, and is only accessed through raw
// pointers and atomics, whose races with the guest are part of the device model.
unsafe impl Send for Region {}
// SAFETY: as above; no method hands out a reference into the mapping.
unsafe impl Sync for Region {}

impl Region {
    /// Maps a region of `file`. The file must be at least as long: a shorter one would end the
    /// process with SIGBUS at the first touch.
    pub(crate) fn map(place: RegionMessage, file: impl AsFd) -> io::Result<Self> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let end = place.offset.checked_add(place.size).ok_or_else(invalid)?;
        let fits = place.guest.checked_add(place.size).is_some()
            && place.user.checked_add(place.size).is_some();
        let stat = rustix::fs::fstat(&file)?;
        let length = u64::try_from(stat.st_size).map_err(|_| invalid())?;
        if place.size == 0 || !fits || length < end {
            return Err(invalid());
        }
        // SAFETY: sysconf(3) has no requirements.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        let page = u64::try_from(page).map_err(|_| invalid())?;
        // A file of huge pages is mapped and unmapped in whole ones; they are its block size.
        let block = u64::try_from(stat.st_blksize).unwrap_or(page);
        let page = if block.is_power_of_two() {
            page.max(block.min(LARGEST_PAGE))
        } else {
            page
        };
        let start = place.offset - place.offset % page;
        let mapped = (end - start).checked_next_multiple_of(page);
        let mapped = usize::try_from(mapped.ok_or_else(invalid)?).map_err(|_| invalid())?;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice aliases nothing.
        let mapping = unsafe { mmap(ptr::null_mut(), mapped, access, flags, &file, start) }?;
        Ok(Self {
            guest: place.guest,
            size: place.size,
            user: place.user,
            mapping: NonNull::new(mapping.cast::<u8>()).ok_or_else(invalid)?,
            mapped,
            lead: usize::try_from(place.offset - start).map_err(|_| invalid())?,
        })
    }

    /// `len` bytes at `at`, if they all lie in the region.
    fn view(&self, at: u64, len: usize) -> Option<View<'_>> {
        Some(View {
            base: self.address(at, u64::try_from(len).ok()?)?,
            len,
            region: PhantomData,
        })
    }

    /// Host address of `len` bytes at `at`, if they all lie in the region.
    fn address(&self, at: u64, len: u64) -> Option<*mut u8> {
        if at.checked_add(len)? > self.size {
            return None;
        }
        let at = usize::try_from(at).ok()?;
        // SAFETY: `lead + size` bytes are mapped, and `at` is at most `size`: see `map` and above.
        Some(unsafe { self.mapping.as_ptr().add(self.lead + at) })
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: made in `map` with this address and length; whatever points into it holds an `Arc`
        // of the region or of the memory it belongs to.
        if let Err(error) = unsafe { munmap(self.mapping.as_ptr().cast(), self.mapped) } {
            tracing::error!(%error, "cannot unmap guest memory");
        }
    }
}

/// All memory of a guest, as it is between two changes by the front end.
#[derive(Debug, Clone, Default)]
pub(crate) struct Memory {
    pub(crate) regions: Vec<Arc<Region>>,
}

impl Memory {
    /// Adds the host addresses of `len` bytes at guest address `guest` to `spans`; false when not
    /// all of them are memory. Pieces that touch become one span.
    pub(crate) fn append(&self, mut guest: u64, mut len: u64, spans: &mut Spans) -> bool {
        while len > 0 {
            let Some((region, at)) = self.find(guest) else {
                return false;
            };
            let take = len.min(region.size - at);
            let Some(address) = region.address(at, take) else {
                return false;
            };
            let Ok(take_len) = usize::try_from(take) else {
                return false;
            };
            match spans.last_mut() {
                Some(last) if last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == address => {
                    last.iov_len += take_len;
                }
                _ => spans.push(libc::iovec {
                    iov_base: address.cast(),
                    iov_len: take_len,
                }),
            }
            let Some(next) = guest.checked_add(take) else {
                return false;
            };
            guest = next;
            len -= take;
        }
        true
    }

    /// The `len` bytes at guest address `guest`, for a table of descriptors.
    pub(crate) fn table(&self, guest: u64, len: usize) -> Option<View<'_>> {
        let (region, at) = self.find(guest)?;
        region.view(at, len)
    }

    /// The `len` bytes at the front end's address `user`, aligned to `align`.
    pub(crate) fn ring_part(&self, user: u64, len: usize, align: u64) -> Option<Area> {
        if !user.is_multiple_of(align) {
            return None;
        }
        self.regions.iter().find_map(|region| {
            let at = user
                .checked_sub(region.user)
                .filter(|at| *at < region.size)?;
            Area::new(region, at, len)
        })
    }

    fn find(&self, guest: u64) -> Option<(&Arc<Region>, u64)> {
        self.regions.iter().find_map(|region| {
            let at = guest.checked_sub(region.guest)?;
            (at < region.size).then_some((region, at))
        })
    }
}

/// Some bytes of mapped memory, and what keeps them mapped.
#[derive(Debug, Clone)]
pub(crate) struct Area {
    base: *mut u8,
    len: usize,
    _region: Arc<Region>,
}

// SAFETY: the bytes stay mapped as long as `_region` lives, and are accessed like the region's.
unsafe impl Send for Area {}
// SAFETY: as above.
unsafe impl Sync for Area {}

impl Area {
    pub(crate) fn new(region: &Arc<Region>, at: u64, len: usize) -> Option<Self> {
        let View { base, len, .. } = region.view(at, len)?;
        Some(Self {
            base,
            len,
            _region: Arc::clone(region),
        })
    }

    pub(crate) fn view(&self) -> View<'_> {
        View {
            base: self.base,
            len: self.len,
            region: PhantomData,
        }
    }
}

/// Borrowed bytes of mapped memory with fields at known offsets. Loads and stores that would leave
/// them do nothing and give zero.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'a> {
    base: *mut u8,
    len: usize,
    region: PhantomData<&'a Region>,
}

impl View<'_> {
    fn field<T>(&self, offset: usize) -> Option<*mut T> {
        let inside = offset.checked_add(size_of::<T>())? <= self.len;
        let field = self.base.wrapping_add(offset);
        let aligned = field.addr().is_multiple_of(align_of::<T>());
        (inside && aligned).then_some(field.cast::<T>())
    }

    /// Copies a plain value out. The driver may change it meanwhile; the copy is what counts.
    pub(crate) fn copy<T: Plain>(&self, offset: usize) -> T {
        if let Some(field) = self.field::<T>(offset) {
            // SAFETY: `field` checked bounds and alignment, and any bytes are a valid `T`.
            return unsafe { ptr::read_volatile(field) };
        }
        let inside = offset
            .checked_add(size_of::<T>())
            .is_some_and(|end| end <= self.len);
        if !inside {
            return T::default();
        }
        // An indirect table may lie anywhere (virtio 1.3 section 2.7.5.3.1).
        let field = self.base.wrapping_add(offset).cast::<T>();
        // SAFETY: bounds were checked above, and any bytes are a valid `T`.
        unsafe { ptr::read_unaligned(field) }
    }

    pub(crate) fn put<T: Plain>(&self, offset: usize, value: T) {
        if let Some(field) = self.field::<T>(offset) {
            // SAFETY: `field` checked bounds and alignment.
            unsafe { ptr::write_volatile(field, value) };
        }
    }

    /// Loads an index of the driver's before whatever it announces.
    pub(crate) fn acquire(&self, offset: usize) -> u16 {
        self.field::<u16>(offset).map_or(0, |field| {
            // SAFETY: `field` checked bounds and alignment; the bytes stay mapped.
            unsafe { AtomicU16::from_ptr(field) }.load(Ordering::Acquire)
        })
    }

    /// Stores an index for the driver after whatever it announces.
    pub(crate) fn release(&self, offset: usize, value: u16) {
        if let Some(field) = self.field::<u16>(offset) {
            // SAFETY: `field` checked bounds and alignment; the bytes stay mapped.
            unsafe { AtomicU16::from_ptr(field) }.store(value, Ordering::Release);
        }
    }

    /// Stores a counter so that it is never seen half written.
    pub(crate) fn release_wide(&self, offset: usize, value: u64) {
        if let Some(field) = self.field::<u64>(offset) {
            // SAFETY: `field` checked bounds and alignment; the bytes stay mapped.
            unsafe { AtomicU64::from_ptr(field) }.store(value, Ordering::Release);
        }
    }
}

impl Memory {
    /// Has the CPU fetch the line at guest address `guest`, if it is memory.
    pub(crate) fn prefetch(&self, guest: u64) {
        if let Some(address) = self
            .find(guest)
            .and_then(|(region, at)| region.address(at, 1))
        {
            prefetch(address);
        }
    }
}

/// Has the CPU fetch a line that another one has written last, which takes as long as a short
/// system call. Only a hint: nothing is read, and no address is a wrong one.
pub(crate) fn prefetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the instruction has no effect that a program could see, whatever the address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// The same for a line that is going to be written: it is taken away from whoever has it.
pub(crate) fn prefetch_to_write(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as above; a CPU that does not have the instruction takes it for one that does nothing
    // (Intel SDM volume 2, PREFETCHW).
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) address, options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Values of which any bytes are a valid one.
pub(crate) trait Plain: Copy + Default {}

impl Plain for u8 {}
impl Plain for u16 {}
impl Plain for u32 {}
impl Plain for u64 {}
impl Plain for crate::queue::Descriptor {}

/// A descriptor that becomes readable when SIGTERM or SIGINT asks for the end. The signals are
/// blocked for this thread and those it starts.
pub(crate) fn end_signals() -> io::Result<OwnedFd> {
    // SAFETY: an all-zero signal set is valid; it is made empty below in any case.
    let mut set: libc::sigset_t = unsafe { mem::zeroed() };
    for signal in [libc::SIGTERM, libc::SIGINT] {
        // SAFETY: `set` is initialised and the number is a signal's.
        unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    // SAFETY: `set` is valid for the call, and the old mask is not asked for.
    let error = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    // SAFETY: `set` is valid for the call.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// How often this thread had to leave its CPU to another one.
pub(crate) fn pushed_off() -> u64 {
    // SAFETY: all-zero numbers are a valid usage.
    let mut usage: libc::rusage = unsafe { mem::zeroed() };
    // SAFETY: `usage` is valid for the call.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
    u64::try_from(usage.ru_nivcsw).unwrap_or(0)
}

/// Takes over a descriptor whose number came from the command line.
pub(crate) fn duplicate(number: i32) -> io::Result<OwnedFd> {
    if number < 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the descriptor is borrowed for this call alone, which fails when it is not open.
    let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(number) };
    borrowed.try_clone_to_owned()
}
