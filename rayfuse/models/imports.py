"""The imports of torch and transformers: thousands of modules, in every process of a run."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """No collection of cycles while the block runs; for imports, usable as a decorator.

    Modules are made of objects that stay. The collector walks through all of them again for every tenth that is added:
    a quarter of the processor time of importing torch and transformers (jobs/bench/start.py).
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
