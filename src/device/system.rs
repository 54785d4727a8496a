//! The machine: its cores, how much memory there is, and how much this process has needed. Memory
//! of the CPU device and of software Vulkan is the process's own.

/// The processor's cores that this program may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

/// The numbers of these cores, where the system tells.
pub fn allowed_cores() -> Vec<usize> {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: the set is plain memory that the call fills, of the size that it is told.
        let set = unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            match libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) {
                0 => Some(set),
                _ => None,
            }
        };
        // SAFETY: the numbers are below the size of the set.
        let within = |i: &usize| set.is_some_and(|set| unsafe { libc::CPU_ISSET(*i, &set) });
        (0..libc::CPU_SETSIZE as usize).filter(within).collect()
    }
    #[cfg(not(target_os = "linux"))]
    Vec::new()
}

/// Sets the C library's heaps for batches that run side by side.
///
/// Left alone it keeps eight heaps, each with the holes that a batch leaves: twice the memory. With
/// one for each core a flow's peak is a third higher or not, by which threads chance puts on which,
/// as large tensors waste the ends of a heap's pieces: from 512 KiB on they are mapped one by one,
/// and a heap keeps 64 MiB free at its end, for a few percent of an epoch's time.
pub fn set_heaps() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: settings of the allocator, made before any thread is.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, cores() as libc::c_int);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 512 << 10);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 64 << 20);
    }
}

/// Bytes of memory that the machine has free.
pub fn available() -> u64 {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    system.available_memory()
}

/// The largest resident size of this process since the start or the last [`reset_peak`], in bytes;
/// Linux keeps it.
pub fn peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches(" kB").parse::<u64>().ok().map(|kib| kib << 10)
}

/// Starts a new measurement of [`peak`].
pub fn reset_peak() {
    // Linux's way (proc_pid_clear_refs(5)); elsewhere there is no peak to reset.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// `1.5 GiB`, `320 MiB`, `768 KiB`.
pub fn memory_text(bytes: u64) -> String {
    match bytes as f64 / f64::from(1 << 20) {
        mib if mib >= 1024.0 => format!("{:.1} GiB", mib / 1024.0),
        mib if mib >= 10.0 => format!("{mib:.0} MiB"),
        mib => format!("{:.0} KiB", mib * 1024.0),
    }
}
