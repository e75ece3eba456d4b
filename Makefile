PYTHON ?= python3
PROMPT ?=
MODEL ?= rq
PYTEST_ARGS ?=

PY := .venv/bin/python
PIP := $(PY) -m pip -qq --disable-pip-version-check
READY := .venv/.ready
SPACE ?= build/space
SOURCES := $(wildcard src examples docs tests benchmarks)

export PROMPT
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: help demo web space browser docs test test-floors test-newest quality style

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

demo: $(READY) ## sample images: make demo PROMPT="fire engine" MODEL=mar
	@$(PY) examples/demo.py --model $(MODEL) $(if $(PROMPT),--prompt "$$PROMPT")

web: $(READY) ## start the web demo on this machine
	@$(PY) examples/web_demo.py

space: ## put what belongs to the Space of the web demo into build/space
	@rm -rf "$(SPACE)"
	@mkdir -p "$(SPACE)"
	@cp -r examples/space/. examples/web_demo.py src/rq_hf "$(SPACE)"
	@find "$(SPACE)" -name __pycache__ -exec rm -r {} +

browser: $(READY) ## emoji in your browser alone, on http://localhost:8000 (needs npm)
	@test -d examples/browser/model || $(PY) -m rq_hf.export_onnx --dtype float16 --output_dir examples/browser/model
	@npm install --prefix examples/browser --ignore-scripts --no-audit --no-fund --no-package-lock
	@$(PY) -m http.server --bind 127.0.0.1 --directory examples/browser 8000

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(READY) ## build the documentation as a site: site/index.html
	$(PY) -m mkdocs build --strict --quiet

test: export HF_HUB_OFFLINE = 1
test: $(READY) ## run all tests: make test PYTEST_ARGS="-k quantizer"
	$(PY) -m pytest $(PYTEST_ARGS)

test-floors: ## run all tests with the oldest releases that setup.cfg allows
test-newest: ## run all tests with the newest releases that setup.cfg allows
test-floors test-newest:
	$(PYTHON) tests/environments.py $(@:test-%=%) $(PYTEST_ARGS)

quality: $(READY) ## check style and formatting
	$(PY) -m ruff check $(SOURCES)
	$(PY) -m ruff format --check $(SOURCES)

style: $(READY) ## fix style and formatting
	$(PY) -m ruff check --fix $(SOURCES)
	$(PY) -m ruff format $(SOURCES)

$(READY): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 4) and "rq_hf needs Python 3.11.4 or newer. Name one: make PYTHON=python3.11 ...")'
	@echo "Setting up .venv: once, a few minutes"
	@$(PYTHON) -m venv .venv
	@$(PIP) install -c constraints.txt torch
	@grep -v ^pillow== constraints.txt > .venv/constraints.txt
	@$(PIP) install -c .venv/constraints.txt -e '.[test,demo]'
	@# Gradio asks for Pillow < 13, and works with Pillow 13, which resizes as the authors' images were.
	@$(PIP) install -c constraints.txt --no-deps --no-warn-conflicts pillow
	@touch $@
