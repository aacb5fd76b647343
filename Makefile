# One target an activity; `make check` is what CI runs after the README's own commands.
PYTHON ?= python

.PHONY: check format lint types layers test docs examples wheel clean

check: lint types layers test wheel

format:
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

# Static checkers cannot see a mapped editable install, so they read `.types/`, a tree of links shaped like the package.
types:
	$(PYTHON) .ci/link_types.py
	cd .types && $(PYTHON) -m mypy --config-file ../pyproject.toml -p optplan

layers:
	$(PYTHON) .ci/link_types.py
	cd .types && PYTHONPATH=. lint-imports --config ../pyproject.toml

test:
	$(PYTHON) -m pytest

docs:
	$(PYTHON) .ci/write_docs.py

examples:
	$(PYTHON) .ci/example_pages.py
	$(PYTHON) .ci/example_pictures.py

wheel:
	$(PYTHON) .ci/test_wheel.py

clean:
	rm -rf .types build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
