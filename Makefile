# Targets only call commands; logic belongs in Python. APP is a name in handler/apps/, or any name if
# MODEL_DIR is set.

APP       ?= smollm2-135m
PORT      ?= 7080
FORMAT    ?= no-archive
MODEL_DIR ?=
ENGINE    ?=
SHAPE_ONLY ?=
TORCH     ?= cpu
TARGET    ?=
TAG       ?= dev
MEMORY    ?=
REGISTRY  ?=
BAKED     ?= yes
CANARY    ?=
PROJECT   ?=
REGION    ?=
# If the conda environment of environment.yml is active, make uses it instead of .venv.
CONDA     := $(if $(filter serving-llms,$(CONDA_DEFAULT_ENV)),$(CONDA_PREFIX))
VENV      ?= $(or $(CONDA),.venv)
JOBS      ?= 3
PYTHON    ?= $(or $(CONDA:%=%/bin/python),$(shell command -v python3.11 || command -v python3 || echo python3))

PY      := $(VENV)/bin/python
WEIGHTS := "$(APP)" $(if $(MODEL_DIR),--model-dir "$(MODEL_DIR)") $(if $(SHAPE_ONLY),--shape-only)
GOOGLE  := $(if $(PROJECT),--project "$(PROJECT)") $(if $(REGION),--region "$(REGION)")
ARCHIVE := $(WEIGHTS) --format "$(FORMAT)" $(if $(ENGINE),--engine "$(ENGINE)")

export VENV TORCH
# huggingface_hub and vLLM then send nothing about their use (SECURITY.md).
export DO_NOT_TRACK ?= 1
# torch's threads then sleep while they wait, instead of spinning. If other programs use the cores,
# chapters are several times as fast (LOG.md).
lab chapters notebooks: export OMP_WAIT_POLICY = passive
.DEFAULT_GOAL := help
.PHONY: help setup quickstart check fast lint types unit model archive serve test quality bench \
        bench-serving bench-peers bench-large bench-startup bench-offload bench-soak bench-image \
        bench-check lock clean lab notebooks chapters site links site-check build-dev build-pro run \
        stop delete shell logs push image-report plan deploy test-vertex token undeploy cleanup \
        standin rehearse

help: ## Show the targets
	@echo "make TARGET [APP=$(APP)] [PORT=$(PORT)] [MODEL_DIR=path]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Other targets do not install the gigabytes of vLLM: with ENGINE=vllm they ask for this one.
setup: ## Install everything into .venv (TORCH=cuda for a GPU, ENGINE=vllm for that engine, too)
	@$(PYTHON) tools/setup_env.py $(if $(ENGINE),$(if $(filter setup,$(MAKECMDGOALS)),--engine "$(ENGINE)"))

quickstart: setup ## Set up, serve APP, send it one request, print the response, stop
	@$(PY) -m deploy.torchserve quickstart $(ARCHIVE) --port "$(PORT)"

check: setup lint types ## Set up and run every check (JOBS=3 at a time)
	@exec $(PY) -m tests --jobs "$(JOBS)"

fast: lint types ## Run lint, types and the quick tests, after every change (30 seconds; longer the first time)
	@$(PY) -m pytest -q tests/unit tests/notebooks -m "not slow and not served"

lint: setup ## Check style, Dockerfile, import layers, dependencies and generated documents
	@$(VENV)/bin/ruff check
	@$(VENV)/bin/ruff format --check
	@$(VENV)/bin/hadolint docker/Dockerfile
	@$(VENV)/bin/lint-imports
	@$(VENV)/bin/deptry .
	@$(PY) -m docs.generate --check

types: setup ## Check types (mypy)
	@$(VENV)/bin/mypy

unit: setup ## Run tests/unit (PYTEST="-k name" selects tests)
	@$(PY) -m pytest tests/unit --durations=20 $(PYTEST)

chapters: setup ## Run every chapter and compare its outputs (pytest --nbval)
	@env -u APP $(PY) -m pytest --nbval notebooks

notebooks: setup ## Run every chapter and store its new outputs
	@$(PY) -m nbconvert --to notebook --execute --inplace \
	  --ExecutePreprocessor.record_timing=False --ExecutePreprocessor.timeout=1200 \
	  --ExecutePreprocessor.store_widget_state=False \
	  notebooks/0*.ipynb
	@# Jupyter stores a stream in several pieces; join them, so that reruns give the same file.
	@$(PY) -m nbconvert --to notebook --inplace --CoalesceStreamsPreprocessor.enabled=True \
	  notebooks/0*.ipynb

# The project's folder is the root, so that links to README, LOG and code open. JupyterLab fetches no
# news and does not look for updates.
lab: setup ## Open the course in JupyterLab
	@$(PY) -m jupyterlab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks \
	  --LabApp.news_url=None --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate \
	  $(if $(filter 0,$(shell id -u)),--allow-root)

site: setup ## Build the course as a website into build/site, from the stored outputs
	@$(PY) -m docs.build

links: site ## Check every link to another host
	@$(PY) -m sphinx -q -b linkcheck -c docs -d build/site-doctrees build/site-pages build/links

site-check: site ## Check the website in Chromium: two widths, light and dark, axe-core (needs node, npm)
	@docs/check/run build/site

model: setup ## Get the weights of APP (MODEL_DIR=path for your own, SHAPE_ONLY=1 for random ones)
	@$(PY) -m deploy.weights $(WEIGHTS)

archive: setup ## Build the archive of APP (FORMAT=zip-store for a .mar, ENGINE=openvino, transformers or vllm)
	@$(PY) -m deploy.archive $(ARCHIVE)

serve: setup ## Serve APP with TorchServe, without Docker, until Ctrl-C (CORS_ORIGIN=http://... lets a web page in)
	@exec $(PY) -m deploy.torchserve serve $(ARCHIVE) --port "$(PORT)"

test: ## Send the request of quickstart to a running server and print the JSON
	@curl --silent --show-error --fail-with-body --max-time 600 \
	  -H "Content-Type: application/json" \
	  -d '{"instances": [{"messages": [{"role": "user", "content": "What is the capital of Japan?"}]}]}' \
	  http://localhost:$(PORT)/predictions/$(APP) && echo

quality: setup ## Measure what quantization costs (8 minutes)
	@$(PY) -m benchmarks.quality

bench-peers: setup ## Install vLLM and llama.cpp for make bench (3.8 GB, 12 minutes)
	@$(PY) -m benchmarks.peers

bench: setup ## Compare with vLLM and llama.cpp on every shape of traffic (40 minutes)
	@$(PY) -m benchmarks.compare

bench-serving: setup ## Compare ways to serve: both engines, the baseline, each peer (40 minutes)
	@$(PY) -m benchmarks.serving

bench-large: setup ## Measure the dolly-v2-3b shape: export, throughput, memory (15 minutes)
	@$(PY) -m benchmarks.large

bench-startup: setup ## Measure start time and memory, compared with the engine alone (6 minutes)
	@$(PY) -m benchmarks.startup

bench-offload: setup ## Measure the dolly-v2-3b shape with layers on disk (12 minutes)
	@$(PY) -m benchmarks.offload

bench-image: setup ## Measure the images: size, build time, start time (15 minutes, needs Docker)
	@$(PY) -m benchmarks.image

bench-soak: setup ## Load the server for half an hour, with clients that leave and a fault each minute
	@$(PY) -m benchmarks.soak

bench-check: setup ## Fail if the server is slow compared with its engine (2 minutes)
	@$(PY) -m benchmarks.check

lock: setup ## Resolve pyproject.toml into requirements.lock and docker/locks
	@$(PY) -m tools.lock

clean: ## Remove models, archives and logs, but not .venv
	rm -rf models model_store build

build-dev: setup ## Build an image of APP with openvino and transformers (Docker or podman)
	@$(PY) -m deploy.image build $(WEIGHTS) --tag dev --target $(or $(TARGET),cpu) $(if $(filter no,$(BAKED)),--without-weights)

build-pro: setup ## Build the smallest image of APP (TARGET=gpu for vLLM with CUDA, BAKED=no without weights)
	@$(PY) -m deploy.image build $(WEIGHTS) --tag pro $(if $(TARGET),--target $(TARGET)) $(if $(filter no,$(BAKED)),--without-weights)

run: setup ## Run the image of APP, hardened, on PORT (TAG=pro, MEMORY=3g, CORS_ORIGIN=http://...)
	@$(PY) -m deploy.image run "$(APP)" --tag "$(TAG)" --port "$(PORT)" $(if $(MEMORY),--memory $(MEMORY))

stop: setup ## Stop the container of APP after requests in flight finish
	@$(PY) -m deploy.image stop "$(APP)"

delete: setup ## Delete the container of APP
	@$(PY) -m deploy.image delete "$(APP)"

shell: setup ## Open a shell in the container of APP
	@$(PY) -m deploy.image shell "$(APP)"

logs: setup ## Follow the log of the container of APP
	@$(PY) -m deploy.image logs "$(APP)"

push: setup ## Push the image of APP (REGISTRY=host/project/repository, TAG=pro)
	@$(PY) -m deploy.image push "$(APP)" --tag "$(TAG)" --registry "$(REGISTRY)"

image-report: setup ## Show what is in the image of APP, by part
	@$(PY) -m deploy.image.report "$(APP)" --tag "$(TAG)"

plan: setup ## Show what deploy creates on Vertex AI, and the price (PROJECT=, REGION=)
	@$(PY) -m deploy.vertex plan "$(APP)" $(GOOGLE)

deploy: setup ## Push the image of APP and deploy it on Vertex AI (CANARY=20 for 20 %)
	@exec $(PY) -m deploy.vertex deploy "$(APP)" $(GOOGLE) $(if $(CANARY),--canary "$(CANARY)") \
	  $(if $(filter file,$(origin TAG)),,--tag "$(TAG)")

test-vertex: setup ## Send a request to the endpoint of APP in every way that it has
	@$(PY) -m deploy.vertex test "$(APP)" $(GOOGLE)

token: setup ## Show the base_url of the endpoint of APP for OpenAI clients, and how to get a token
	@$(PY) -m deploy.vertex token "$(APP)" $(GOOGLE)

undeploy: setup ## Stop the replicas of APP on Vertex AI, so that you no longer pay for them
	@$(PY) -m deploy.vertex undeploy "$(APP)" $(GOOGLE)

cleanup: setup ## Remove APP from Vertex AI, except its images, and check that it is gone
	@$(PY) -m deploy.vertex cleanup "$(APP)" $(GOOGLE)

standin: setup ## Start the local stand-in for Vertex AI, until Ctrl-C
	@exec $(PY) -m standin

rehearse: setup ## Deploy, predict, roll back and clean up on the stand-in (no Google account)
	@$(PY) -m standin.rehearse "$(APP)"
