VENV ?= .venv
PYTHON_IN_VENV := $(VENV)/bin/python
READY := $(VENV)/.ready

# A hundred processes import torch in the tests; told to keep no bytecode, each of them would compile it anew.
unexport PYTHONDONTWRITEBYTECODE

# Of pytest, for all tests. On two cores three take as long as two: what a test starts keeps them busy.
PROCESSES ?= 2

.PHONY: demo quick test tests soak mutants object-info lint style types format clean

# A tiny model through the whole path in a real ComfyUI, to an mp4. No GPU needed.
demo: $(READY)
	$(PYTHON_IN_VENV) demo

# The tests that start no process.
quick: $(READY)
	$(PYTHON_IN_VENV) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not (processes or ranks)"

# The types beside the tests: without a cache mypy takes a quarter of a minute.
test: $(READY) style
	$(MAKE) --no-print-directory -j 2 types tests

tests: $(READY)
	$(PYTHON_IN_VENV) -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder --durations=30 --durations-min=5

# Three hundred jobs in one ComfyUI, every tenth with a fault, of every kind in soak_faults.py.
# Then a hundred samplings, every fifth with a fault; a hundred prompts of ComfyUI's own samplers, a third of them with
# one; twenty thousand damaged files; and every recorded case in every layout.
soak: $(READY)
	SOAK_JOBS=300 SOAK_SAMPLINGS=100 SOAK_PROMPTS=100 SOAK_FILES=1 SOAK_GOLDEN=1 $(PYTHON_IN_VENV) -m pytest -s \
		tests/comfyui/test_soak.py tests/distributed/launch/test_evaluation_soak.py tests/comfyui/test_core_sampling.py \
		tests/wan/files/test_mutations.py tests/test_golden.py

# The pack with the oldest and with the newest packages that requirements.txt allows; minutes, and 6 GB each meanwhile.
oldest newest:
	tests/versions.sh $@

# After a change of the nodes' inputs or outputs that is meant.
object-info: $(READY)
	WRITE_OBJECT_INFO=1 $(PYTHON_IN_VENV) -m pytest -q tests/nodes/test_object_info.py

# Small wrong changes that some test should notice: up to an hour, no part of the CI.
mutants: $(READY)
	$(PYTHON_IN_VENV) tests/mutation --seed 61 --count 110

lint: style types

style: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# A link to this folder under the name that `pyproject.toml` has for it: it may be called anything.
types: $(READY)
	mkdir -p .mypy
	ln -sfn .. .mypy/wan_pack
	$(VENV)/bin/mypy

format: $(READY)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(READY): requirements.txt requirements-deepspeed.txt requirements-dev.txt demo/setup.sh demo/comfyui.py
	demo/setup.sh $(VENV)
	touch $@

clean:
	rm -rf $(VENV) demo/output
