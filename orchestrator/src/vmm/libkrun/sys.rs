//! libkrun's C API, loaded at run time: every foreign call of this crate is here.
//!
//! The library must be trusted as a program is: it is loaded by a process that becomes the VM.

use std::ffi::{CStr, CString, c_char, c_int};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LOCAL, RTLD_NOW};

use super::Unusable;

/// The library that has the guest's kernel; libkrun asks for it by this name.
const KERNEL: &str = "libkrunfw.so.5";

/// Tag of the share that the guest's kernel takes as its root.
const ROOT: &CStr = c"/dev/root";

/// Declares the functions that are used, as `libkrun.h` does. All return a negative errno, or
/// zero or a number.
macro_rules! api {
    ($($field:ident = $symbol:literal ($($argument:ty),*);)*) => {
        struct Api {
            $($field: unsafe extern "C" fn($($argument),*) -> i32,)*
        }

        impl Api {
            fn find(library: &Library) -> Result<Self, Unusable> {
                $(
                    // SAFETY: `libkrun.h` declares the function with these arguments.
                    let found = unsafe { library.get(concat!($symbol, "\0").as_bytes()) };
                    let $field = *found.map_err(|_| Unusable::Symbol($symbol))?;
                )*
                Ok(Self { $($field,)* })
            }
        }

        /// Every function that must be there.
        #[cfg(test)]
        pub(super) const SYMBOLS: &[&str] = &[$($symbol,)*];
    };
}

api! {
    set_log_level = "krun_set_log_level"(u32);
    create = "krun_create_ctx"();
    free = "krun_free_ctx"(u32);
    set_vm_config = "krun_set_vm_config"(u32, u8, u32);
    no_console = "krun_disable_implicit_console"(u32);
    no_vsock = "krun_disable_implicit_vsock"(u32);
    no_init = "krun_disable_implicit_init"(u32);
    add_root = "krun_add_virtiofs3"(u32, *const c_char, *const c_char, u64, bool);
    add_folder = "krun_fs_add_overlay_dir"(u32, *const c_char, *const c_char, u32);
    add_file = "krun_fs_add_overlay_file"(u32, *const c_char, *const c_char, *const u8, usize, u32, bool);
    add_console = "krun_add_virtio_console_multiport"(u32);
    add_terminal = "krun_add_console_port_tty"(u32, u32, *const c_char, c_int);
    add_port = "krun_add_console_port_inout"(u32, u32, *const c_char, c_int, c_int);
    add_device = "krun_add_vhost_user_device"(u32, u32, *const c_char, *const c_char, u16, *const u16);
    start = "krun_start_enter"(u32);
}

/// A machine that is being put together.
pub(super) struct Context {
    api: Api,
    id: u32,
}

/// A call that libkrun refused.
#[derive(Debug, thiserror::Error)]
#[error("libkrun: {call} failed")]
pub(super) struct Refused {
    call: &'static str,
    source: io::Error,
}

impl Refused {
    /// vhost-user devices were left out when the library was built.
    pub(super) fn lacks_devices(&self) -> bool {
        let left_out = matches!(
            self.source.raw_os_error(),
            Some(libc::ENOTSUP | libc::ENOSYS)
        );
        left_out && self.call == "krun_add_vhost_user_device"
    }

    /// Why.
    pub(super) fn into_reason(self) -> io::Error {
        self.source
    }
}

fn check(call: &'static str, result: i32) -> Result<u32, Refused> {
    u32::try_from(result).map_err(|_| Refused {
        call,
        source: io::Error::from_raw_os_error(result.saturating_neg()),
    })
}

impl Context {
    /// Loads the library, and the kernel's before it, and begins a machine.
    pub(super) fn open(path: &Path) -> Result<Self, Unusable> {
        // A kernel beside the library goes before one where the loader looks. It is found again by
        // its name, so it must be loaded under it.
        let beside = path.parent().map(|folder| folder.join(KERNEL));
        let beside = beside.filter(|kernel| kernel.is_file());
        let kernel = beside.unwrap_or_else(|| PathBuf::from(KERNEL));
        // SAFETY: loading runs its initialisers: it holds data and no code that runs by itself.
        let kernel = unsafe { Library::open(Some(&kernel), RTLD_NOW | RTLD_GLOBAL) };
        let kernel = kernel.map_err(|error| Unusable::Kernel(reason(&error)))?;
        // SAFETY: the user or the administrator has installed it to be run by this program.
        let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) };
        let library = library.map_err(|error| Unusable::Load(reason(&error)))?;
        let api = Api::find(&library)?;
        // Functions were copied out of both: they stay for good.
        std::mem::forget((kernel, library));
        // SAFETY: it takes no argument.
        let id = check("krun_create_ctx", unsafe { (api.create)() });
        let id = id.map_err(|error| Unusable::Load(error.source.to_string()))?;
        Ok(Self { api, id })
    }

    /// What the library logs on standard error: 1 for errors, 2 for warnings as well.
    pub(super) fn set_log_level(&self, level: u32) -> Result<(), Refused> {
        // SAFETY: it takes a number.
        let result = unsafe { (self.api.set_log_level)(level) };
        check("krun_set_log_level", result).map(drop)
    }

    /// Sets processors and memory, and takes away everything that would be added unasked.
    pub(super) fn set_machine(&self, cpus: u8, memory_mib: u32) -> Result<(), Refused> {
        // SAFETY: it takes numbers.
        let result = unsafe { (self.api.set_vm_config)(self.id, cpus, memory_mib) };
        check("krun_set_vm_config", result)?;
        for (call, name) in [
            (self.api.no_console, "krun_disable_implicit_console"),
            (self.api.no_vsock, "krun_disable_implicit_vsock"),
            (self.api.no_init, "krun_disable_implicit_init"),
        ] {
            // SAFETY: it takes a number.
            let result = unsafe { call(self.id) };
            check(name, result)?;
        }
        Ok(())
    }

    /// Gives the machine a read-only root that holds nothing but the program `init`, which is kept
    /// in memory, and empty `folders`.
    pub(super) fn set_init(&self, init: &'static [u8], folders: &[&CStr]) -> Result<(), Refused> {
        const EXECUTABLE: u32 = 0o100_755;
        const FOLDER: u32 = 0o040_755;
        // SAFETY: both strings end with a zero and are copied; no path means no host directory.
        let result =
            unsafe { (self.api.add_root)(self.id, ROOT.as_ptr(), std::ptr::null(), 0, true) };
        check("krun_add_virtiofs3", result)?;
        for folder in folders {
            // SAFETY: both strings end with a zero and are copied.
            let result =
                unsafe { (self.api.add_folder)(self.id, ROOT.as_ptr(), folder.as_ptr(), FOLDER) };
            check("krun_fs_add_overlay_dir", result)?;
        }
        // SAFETY: the strings end with a zero and are copied; the bytes are not, and live for ever.
        let result = unsafe {
            (self.api.add_file)(
                self.id,
                ROOT.as_ptr(),
                c"init.krun".as_ptr(),
                init.as_ptr(),
                init.len(),
                EXECUTABLE,
                false,
            )
        };
        check("krun_fs_add_overlay_file", result).map(drop)
    }

    /// Adds one console device with two ports: the kernel's console on `terminal`, and a stream of
    /// this name on `stream`. The descriptors must stay open.
    pub(super) fn add_ports(
        &self,
        terminal: BorrowedFd<'static>,
        name: &CStr,
        stream: BorrowedFd<'static>,
    ) -> Result<(), Refused> {
        // SAFETY: it takes a number.
        let console = unsafe { (self.api.add_console)(self.id) };
        let console = check("krun_add_virtio_console_multiport", console)?;
        // SAFETY: the string ends with a zero and is copied; the descriptor stays open.
        let result = unsafe {
            (self.api.add_terminal)(self.id, console, c"".as_ptr(), terminal.as_raw_fd())
        };
        check("krun_add_console_port_tty", result)?;
        let fd = stream.as_raw_fd();
        // SAFETY: the string ends with a zero and is copied; the descriptor stays open.
        let result = unsafe { (self.api.add_port)(self.id, console, name.as_ptr(), fd, fd) };
        check("krun_add_console_port_inout", result).map(drop)
    }

    /// Adds a device that the process behind `socket` serves, with one queue of each of `sizes`.
    pub(super) fn add_device(
        &self,
        kind: u32,
        socket: &CString,
        name: &CString,
        sizes: &[u16],
    ) -> Result<(), Refused> {
        let count = u16::try_from(sizes.len()).unwrap_or(u16::MAX);
        // SAFETY: both strings end with a zero; there are `count` sizes; all are copied.
        let result = unsafe {
            (self.api.add_device)(
                self.id,
                kind,
                socket.as_ptr(),
                name.as_ptr(),
                count,
                sizes.as_ptr(),
            )
        };
        check("krun_add_vhost_user_device", result).map(drop)
    }

    /// Becomes the machine. Returns only when it could not be started.
    pub(super) fn start(self) -> Refused {
        // SAFETY: it takes a number.
        let result = unsafe { (self.api.start)(self.id) };
        check("krun_start_enter", result).err().unwrap_or(Refused {
            call: "krun_start_enter",
            source: io::Error::other("it came back"),
        })
    }

    /// Ends a machine that was never started.
    pub(super) fn free(self) {
        // SAFETY: it takes a number, which is not used any more.
        unsafe { (self.api.free)(self.id) };
    }
}

/// The loader's own words.
fn reason(error: &libloading::Error) -> String {
    let cause = std::error::Error::source(error).map(ToString::to_string);
    cause.unwrap_or_else(|| error.to_string())
}
