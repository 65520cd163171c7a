# The commands of a developer. `make fast` is the inner loop.
.PHONY: fast test slow lint types smoke bench

fast:    # tests without training runs: under a minute on one core
	python -m pytest -m fast

test:    # every test but the slow ones
	python -m pytest -n 2

slow:    # the long tests
	python -m pytest -m slow

lint:
	ruff check .

types:
	mypy

smoke:   # the whole pipeline for a few steps
	./speedrun.sh smoke

bench:   # a training step compared with transformers (add nanoGPT: python -m bench train --nanogpt=DIR)
	python -m bench train
