# `make` lists the targets. Settings are environment variables: RTS_PORT=8100 make up
.DEFAULT_GOAL := help
.PHONY: up test test-fast test-vllm docker-test docker-test-run k8s-check check fmt bench chaos help env env-dev

ifeq ($(OS),Windows_NT)
$(error Linux or macOS is needed; on Windows use WSL2)
endif

PYTHON := .venv/bin/python
PYTEST_ARGS ?=
CHAOS_ARGS ?=
CPP := $(wildcard worker/engine/native/source/* tests/contract/*.cpp)
BENCH_ARGS ?=

up: env ## start the whole cluster here: server, gateway, worker, control
	@$(PYTHON) -m realtime_serve.cli up --end-with-parent

# What measures times closely or fills both cores has the machine for itself. The rest runs two files
# at a time, the slow ones first.
ALONE := $(patsubst %,tests/e2e/test_%.py,balancers cluster demo_model_cluster http_outage) \
	tests/chaos

test: env-dev ## run all tests (a quarter of an hour)
	@$(PYTHON) -m realtime_serve.demo_model
	@$(PYTHON) -m pytest tests/e2e tests/contract tests/deploy tests/unit $(ALONE:%=--ignore=%) \
		-n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)
	@$(PYTHON) -m pytest $(ALONE) $(PYTEST_ARGS)

test-fast: env-dev ## run the unit tests (under 20 seconds, no torch)
	@$(PYTHON) -m pytest tests/unit -m "not torch" -n 2 $(PYTEST_ARGS)

test-vllm: env-dev ## run the engines' contract on vLLM, in an environment of its own (5 GB)
	@sh scripts/vllm_env.sh
	@.venv-vllm/bin/python -m pytest tests/contract/test_engines.py \
		tests/contract/test_vllm_engine.py -m vllm -W default --timeout 600 $(PYTEST_ARGS)

docker-test: ## build the images, restart docker-compose.yml's services under streams (needs Docker)
	@if docker info >/dev/null 2>&1; then $(MAKE) --no-print-directory docker-test-run; \
		else echo "SKIPPED: it needs a Docker engine, and \`docker info\` finds none"; fi

docker-test-run: env-dev
	@$(or $(COMPOSE),docker compose) version
	@$(PYTHON) -m realtime_serve.demo_model
	@PYTHONPATH=.:tests $(PYTHON) tests/docker/stack.py

k8s-check: env-dev ## render the manifests of deploy/k8s and check them against schemas and code
	@$(PYTHON) -m pytest tests/deploy/test_k8s.py $(PYTEST_ARGS)

check: env-dev ## lint, formatting, types, generated pages
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@.venv/bin/clang-format --dry-run --Werror $(CPP)
	@if [ -x .venv/bin/hadolint ]; then .venv/bin/hadolint deploy/docker/Dockerfile; \
		else echo "hadolint is not for this system: the Dockerfile is not checked"; fi
	@$(PYTHON) -m mypy
	@$(PYTHON) -m shared.settings | diff docs/settings.md - || \
		{ echo "docs/settings.md is old: $(PYTHON) -m shared.settings > docs/settings.md"; exit 1; }

fmt: env-dev ## format the code, fix what can be fixed
	@$(PYTHON) -m ruff format .
	@$(PYTHON) -m ruff check --fix .
	@.venv/bin/clang-format -i $(CPP)

bench: env-dev ## measure engine and cluster, and others beside them (half an hour)
	@$(PYTHON) -m realtime_serve.demo_model
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	@$(PYTHON) -m benchmarks.engine $(BENCH_ARGS)
	@$(PYTHON) -m benchmarks.run
	@$(PYTHON) -m benchmarks.emit
	@$(PYTHON) -m benchmarks.memory

chaos: env-dev ## make every fault happen and check every token (an hour)
	@PYTHONPATH=tests $(PYTHON) -m chaos.run $(CHAOS_ARGS)

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1	\2/p' Makefile | expand -t 20

env:
	@sh scripts/bootstrap.sh cluster

env-dev:
	@sh scripts/bootstrap.sh dev
