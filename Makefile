# Two commands for a newcomer: `make run` and `make test`. Both set up what they need, with only Rust and make there.

PROGRAM = target/release/pcpo-wgpu

.PHONY: run test build driver bench

run: driver build
	$(PROGRAM) train

build: driver
	cargo build --release

# A Vulkan driver: Mesa's, with software Vulkan (lavapipe) in it, where none is found.
driver:
	@sh scripts/install-vulkan.sh

test: driver
	cargo fmt --check
	cargo clippy --release --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --release --no-deps
	cargo test --release

bench: driver
	cargo bench
