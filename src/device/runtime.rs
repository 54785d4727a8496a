//! Burn's runtime on GPUs, as this program wants it.

use burn::cubecl::config::streaming::StreamPolicy;
use burn::cubecl::config::{CubeClRuntimeConfig, RuntimeConfig};

/// Sets the runtime up, before the first device is opened: what a `cubecl.toml` and the environment
/// say holds, but for the streams.
///
/// One stream a device. Left alone, each thread has one with memory of its own, which is never
/// given back: a job with several devices works on fresh threads in each phase of each epoch.
pub fn configure() {
    let mut config = CubeClRuntimeConfig::from_current_dir().override_from_env();
    config.streaming.policy = StreamPolicy::Single;
    #[cfg(feature = "autotune")]
    {
        use burn::cubecl::config::cache::CacheConfig;
        // What was found the fastest is kept for all runs, wherever they start.
        if matches!(config.environment.path, CacheConfig::Target) {
            config.environment.path = CacheConfig::Global;
        }
    }
    // Set already: a device was opened before.
    let _ = CubeClRuntimeConfig::try_set(config);
}
