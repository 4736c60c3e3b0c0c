//! A child that is born in a control group.
//!
//! A process that enters a group by itself waits until every processor came to rest (9 to 20 ms on a
//! machine with two of them); one that is born there waits for nothing. No wrapper of `clone3(2)`
//! can be asked for that. As `posix_spawn(3)` does, the child borrows the caller's memory until it
//! executes its program, while the calling thread is stopped: the cost doesn't depend on the size of
//! the caller. The child makes system calls and nothing else on a stack of its own, with all
//! signals blocked, so that no handler runs in memory that isn't its own; they stay blocked in the
//! program, which has to [`unblock_signals`].
#![expect(
    unsafe_code,
    reason = "a clone that shares memory, and what its child does"
)]

use std::ffi::{CStr, CString, c_char, c_int};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::{SigSet, SigmaskHow, pthread_sigmask};

/// Source: linux/sched.h.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
/// Enough for three calls.
const STACK_BYTES: usize = 64 << 10;

/// `struct clone_args`. Source: linux/sched.h, `CLONE_ARGS_SIZE_VER2`.
#[repr(C, align(8))]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

const _: () = assert!(size_of::<CloneArgs>() == 88);

/// What the child needs, made before there is one.
struct Plan {
    program: CString,
    argv: Vec<*const c_char>,
    envp: Vec<*const c_char>,
    /// Its standard input, output and error.
    stdio: [RawFd; 3],
}

/// Starts this process's own program, with one argument, in the group of this directory; the result
/// is its number and a pidfd. It has to be waited for.
///
/// # Errors
/// As `clone3(2)`; `Unsupported` where that can't be had. A program that can't be executed ends
/// with status 127.
pub fn itself_into(
    group: &Path,
    argument: &CStr,
    stdio: [BorrowedFd<'_>; 3],
) -> io::Result<(i32, OwnedFd)> {
    let group = File::open(group)?;
    // Beyond the standard ones, which are about to be replaced.
    let beyond = |fd| -> nix::Result<OwnedFd> {
        let moved = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(3))?;
        // SAFETY: a new descriptor that nobody else knows.
        Ok(unsafe { OwnedFd::from_raw_fd(moved) })
    };
    let [input, output, error] = stdio.map(beyond);
    let (input, output, error) = (input?, output?, error?);
    let program = c"/proc/self/exe".to_owned();
    let environment: Vec<CString> = std::env::vars_os()
        .filter_map(|(name, value)| {
            let line = [name.as_bytes(), b"=", value.as_bytes()].concat();
            CString::new(line).ok()
        })
        .collect();
    let ended = |list: Vec<*const c_char>| list.into_iter().chain([std::ptr::null()]).collect();
    let plan = Plan {
        argv: ended(vec![program.as_ptr(), argument.as_ptr()]),
        envp: ended(environment.iter().map(|line| line.as_ptr()).collect()),
        program,
        stdio: [input.as_raw_fd(), output.as_raw_fd(), error.as_raw_fd()],
    };
    let mut stack = vec![0u8; STACK_BYTES];
    let bottom = stack.as_mut_ptr() as u64;
    let top = (bottom + STACK_BYTES as u64) & !15;
    let mut pidfd: c_int = -1;
    let mut args = CloneArgs {
        flags: CLONE_INTO_CGROUP | (libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD) as u64,
        pidfd: &raw mut pidfd as u64,
        exit_signal: libc::SIGCHLD as u64,
        stack: bottom,
        stack_size: top - bottom,
        cgroup: group.as_raw_fd() as u64,
        ..CloneArgs::default()
    };
    let before = all_blocked()?;
    // SAFETY: the plan, the stack and what the plan points to outlive the child's use of them: this
    // thread goes on when the child has executed its program, or has ended.
    let pid = unsafe { clone_and_become(&mut args, &plan) };
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&before), None)?;
    // SAFETY: the kernel has put a new descriptor there, and nobody else knows it.
    pid.map(|pid| (pid, unsafe { OwnedFd::from_raw_fd(pidfd) }))
}

fn all_blocked() -> io::Result<SigSet> {
    let mut before = SigSet::empty();
    pthread_sigmask(
        SigmaskHow::SIG_SETMASK,
        Some(&SigSet::all()),
        Some(&mut before),
    )?;
    Ok(before)
}

/// To be called by a program that was started like this.
pub fn unblock_signals() {
    let _ = pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None);
}

/// # Safety
/// All that `args` and `plan` point to is valid until this returns, and signals are blocked.
#[cfg(target_arch = "x86_64")]
unsafe fn clone_and_become(args: &mut CloneArgs, plan: &Plan) -> io::Result<i32> {
    let result: i64;
    // SAFETY: in the caller, this is one system call, which clobbers rcx and r11 and leaves the rest
    // (System V ABI). The child begins behind it with the same registers, on its own stack, whose end
    // is aligned to 16 bytes as a call wants it; it calls `become_program`, which doesn't return.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r12",
            "call r13",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone3 => result,
            in("rdi") &raw mut *args,
            in("rsi") size_of::<CloneArgs>(),
            in("r12") &raw const *plan,
            in("r13") become_program as extern "C" fn(*const Plan) -> !,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    if result < 0 {
        return Err(io::Error::from_raw_os_error(-result as i32));
    }
    Ok(result as i32)
}

#[cfg(not(target_arch = "x86_64"))]
unsafe fn clone_and_become(_: &mut CloneArgs, _: &Plan) -> io::Result<i32> {
    Err(io::ErrorKind::Unsupported.into())
}

/// What the child does: nothing that allocates, locks, or could unwind.
#[cfg(target_arch = "x86_64")]
extern "C" fn become_program(plan: *const Plan) -> ! {
    // SAFETY: the parent is stopped until this process executes or ends, and keeps the plan; the
    // descriptors are open here as they are there, and above the ones that are replaced.
    unsafe {
        let plan = &*plan;
        for (n, fd) in plan.stdio.iter().enumerate() {
            if libc::dup2(*fd, n as c_int) < 0 {
                libc::_exit(127);
            }
        }
        libc::execve(
            plan.program.as_ptr(),
            plan.argv.as_ptr(),
            plan.envp.as_ptr(),
        );
        libc::_exit(127)
    }
}
