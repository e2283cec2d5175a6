VENV ?= .venv
PYTHON_IN_VENV := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: demo test lint format clean

# A tiny model through the whole path in a real ComfyUI, to an mp4. No GPU needed.
demo: $(READY)
	$(PYTHON_IN_VENV) demo

test: $(READY) lint
	$(PYTHON_IN_VENV) -m pytest

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(READY)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(READY): requirements.txt requirements-dev.txt demo/setup.sh demo/comfyui.py
	demo/setup.sh $(VENV)
	touch $@

clean:
	rm -rf $(VENV) demo/output
