# Two commands for a newcomer: `make run` and `make test`. Both set up what they need, with only Rust and make there.
# Two for whoever changes the code: `make check` and `make fix`. One profile for all: `--release` builds Burn once.

# Without a desktop session Mesa complains that this is missing, and then does without.
export XDG_RUNTIME_DIR ?= /tmp

.PHONY: run test test-mpi reliability check fix build driver lavapipe readers bench

run: driver
	cargo run --release -- train

build: driver
	cargo build --release

# A Vulkan driver: Mesa's, with software Vulkan (lavapipe) in it, where none is found. Without one the CPU computes.
driver:
	-@sh scripts/install-vulkan.sh

# Software Vulkan, which the tests of the GPU path use.
lavapipe:
	@sh scripts/install-vulkan.sh lavapipe

# What reads our files in tests: Chromium for the page, TensorBoard for its event files. Where they cannot be installed,
# the tests that need them say so and are skipped.
readers:
	-@sh scripts/install-chromium.sh
	-@sh scripts/install-tensorboard.sh

test: lavapipe readers check
	cargo test --release

# Several processes by MPI, which is installed where it can be; skipped where it cannot.
test-mpi: lavapipe
	-@sh scripts/install-mpi.sh
	@if command -v mpicc >/dev/null 2>&1; then \
		cargo test --release --features mpi --test it -- mpi; \
	else echo "skipped: no MPI was found (mpicc)"; fi

# Faults on purpose, in the form whose figures are in docs/RELIABILITY.md.
reliability: lavapipe
	PCPO_LONG=1 cargo test --release --test it -- faults --nocapture --test-threads 1

# Format, lints and documentation; a warning fails.
check:
	cargo fmt --check
	cargo clippy --release --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --release --no-deps

# What cargo can put right by itself, in the working tree. Formatting comes last: it tidies the fixes too.
fix:
	cargo clippy --release --all-targets --fix --allow-dirty --allow-staged
	cargo fmt

bench: lavapipe
	cargo bench
