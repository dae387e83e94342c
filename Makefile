# Two commands do everything on a fresh machine: `make demo` and `make test`.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# Where set-up puts the guest kernel and what the demo's image is made of.
GUEST ?= $(CURDIR)/target/guest
TARGET := $(if $(CARGO_TARGET_DIR),$(CARGO_TARGET_DIR),$(CURDIR)/target)
PREFIX ?= /usr/local
# Where QEMU's management programs look for back ends; they know no /usr/local.
DISCOVERY ?= $(if $(filter /usr,$(PREFIX)),/usr/share,/etc)/qemu/vhost-user
BINARIES := msb msb-fs msb-blk

export MSB_KERNEL ?= $(GUEST)/kernel
export MSB_BUSYBOX ?= $(GUEST)/busybox
export MSB_TOOLS ?= $(TARGET)/tools

.PHONY: help setup tools build demo test lint bench install clean

help:
	@echo 'make demo      build, boot a sandbox with every kind of volume, show what it sees'
	@echo 'make test      everything that proves the project'
	@echo 'make build     release binaries in $(TARGET)/release'
	@echo 'make lint      formatting and clippy'
	@echo 'make bench     the benchmarks against virtiofsd and qemu-storage-daemon'
	@echo 'make install   binaries and guest kernel below PREFIX ($(PREFIX))'

setup:
	@tests/setup.sh '$(GUEST)'

# Test suites of others that judge the file server. An installed version is not built again.
tools:
	@[ -x '$(MSB_TOOLS)/bin/fsx' ] || echo '  building pjdfstest and fsx (the first time takes a minute or two)'
	@cargo install -q --locked --root '$(MSB_TOOLS)' pjdfstest@0.2.2 fsx@0.3.2 2>/dev/null || \
		cargo install --locked --root '$(MSB_TOOLS)' pjdfstest@0.2.2 fsx@0.3.2

# The agent is PID 1 in the guest, where there is no dynamic loader: only its last step is linked
# statically, so that it shares its dependencies with the rest of the build.
define agent
cargo rustc -q --locked $(1) -p msb-agent --bin msb-agent -- -C target-feature=+crt-static
endef

build: setup
	@echo '  building (release; the first time takes some minutes)'
	@cargo build -q --locked --release -p microsandbox -p msb-fs -p msb-blk
	@$(call agent,--release)

demo: build
	@MSB_BIN_DIR='$(TARGET)/release' tests/demo.sh

# The tests find the programs under test in MSB_BIN_DIR.
test: setup tools
	@echo '== lint'
	@$(MAKE) --no-print-directory lint
	@echo '== build'
	@cargo build -q --locked --workspace --bins
	@$(call agent)
	@echo '== documentation examples'
	@cargo test -q --locked --doc -p microsandbox -p msb-vhost
	@echo '== tests'
	@export MSB_BIN_DIR='$(TARGET)/debug'; \
	if cargo nextest --version >/dev/null 2>&1; then cargo nextest run --locked --workspace; \
	else cargo test -q --locked --workspace --lib --bins --tests; fi

lint:
	@cargo fmt --all --check
	@cargo clippy -q --locked --workspace --all-targets -- -D warnings

# `make bench ROWS=F1,B2` runs some rows; benches/README.md lists them and says what they mean.
bench: build
	@benches/setup.sh '$(TARGET)/peers'
	@MSB_BIN_DIR='$(TARGET)/release' cargo bench -q --locked -p msb-benches

install: build
	install -d '$(DESTDIR)$(PREFIX)/bin' '$(DESTDIR)$(PREFIX)/libexec/microsandbox' '$(DESTDIR)$(PREFIX)/lib/microsandbox'
	install -m 755 $(BINARIES:%='$(TARGET)/release/%') '$(DESTDIR)$(PREFIX)/bin'
	install -m 755 '$(TARGET)/release/msb-agent' '$(DESTDIR)$(PREFIX)/libexec/microsandbox'
	ln -sf ../../bin/msb-fs '$(DESTDIR)$(PREFIX)/libexec/microsandbox/virtiofsd'
	install -d '$(DESTDIR)$(DISCOVERY)'
	sed 's|/usr/libexec|$(PREFIX)/libexec|' backends/msb-fs/60-msb-fs.json >'$(DESTDIR)$(DISCOVERY)/60-msb-fs.json'
	sed 's|/usr/libexec|$(PREFIX)/bin|' backends/msb-blk/60-msb-blk.json >'$(DESTDIR)$(DISCOVERY)/60-msb-blk.json'
	chmod 644 '$(DESTDIR)$(DISCOVERY)/60-msb-fs.json' '$(DESTDIR)$(DISCOVERY)/60-msb-blk.json'
	cp -a '$(MSB_KERNEL)' '$(DESTDIR)$(PREFIX)/lib/microsandbox/kernel'
	install -d '$(DESTDIR)$(PREFIX)/share/bash-completion/completions'
	'$(TARGET)/release/msb' man '$(DESTDIR)$(PREFIX)/share/man/man1'
	'$(TARGET)/release/msb' completion bash >'$(DESTDIR)$(PREFIX)/share/bash-completion/completions/msb'

clean:
	cargo clean
