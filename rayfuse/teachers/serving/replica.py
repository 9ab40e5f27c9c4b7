"""One replica of a teacher, as Ray Serve runs it."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, TypeVar

import numpy as np
from ray import serve

from rayfuse.config import Teacher
from rayfuse.data.sample import Sample
from rayfuse.errors import DeadEngineError, TeacherError
from rayfuse.signals.codec import pack
from rayfuse.teachers import BACKENDS
from rayfuse.teachers.serving import wishes

log = logging.getLogger(__name__)
T = TypeVar("T")


class TeacherReplica:
    """One copy of a teacher. The model runs in one thread, so that health checks are answered meanwhile."""

    def __init__(self, teacher: Teacher, k: int) -> None:
        self.name = teacher.name
        self.broken = ""
        self.limit_s = teacher.unit_timeout_s
        self.since: dict[int, float] = {}
        self.application = serve.get_replica_context().app_name
        self.resizing: threading.Thread | None = None
        # A server elsewhere is waited for, not computed with: then several units are in flight at once.
        self.thread = ThreadPoolExecutor(4 if teacher.backend == "openai" else 1, thread_name_prefix="teacher")
        # Everything touches torch in the same thread: its number of threads is set per thread pool.
        self.backend = self.thread.submit(BACKENDS[teacher.backend], teacher, k).result()

    async def score(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        """The packed signals of a unit. Idempotent."""
        return await self._compute(lambda: pack(self.backend.score(samples)))

    async def generate(self, samples: Sequence[Sample], options: Mapping[str, Any]) -> list[str]:
        """An answer to each sample's prompt; `options` are the keyword arguments of Backend.generate. Idempotent."""
        return await self._compute(lambda: self.backend.generate(samples, **options))

    async def _compute(self, work: Callable[[], T]) -> T:
        """Run `work` in the model's thread, and tell faults of the device from others."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, self._guarded, work)

    def _guarded(self, work: Callable[[], T]) -> T:
        import torch

        self.since[threading.get_ident()] = time.monotonic()
        try:
            return work()
        except torch.OutOfMemoryError as error:
            raise TeacherError(
                f"teacher {self.name} is out of memory: lower its batch_tokens, or data.unit_size. {error}"
            ) from error
        except DeadEngineError as error:
            self._leave(error)
        except torch.AcceleratorError as error:
            # After a fault of the device every later call of this process fails too: let Serve replace it.
            self.broken = str(error)
            raise
        finally:
            self.since.pop(threading.get_ident(), None)

    def check_health(self) -> None:
        """Called by Serve every few seconds; raises where this copy can answer no more, and is then replaced.

        Also the moment at which a copy finds out that the run that wanted it to stay has ended.
        """
        if self.broken:
            raise TeacherError(f"teacher {self.name}: the device failed: {self.broken}")
        try:
            self.backend.check_health()
        except DeadEngineError as error:
            self._leave(error)
        longest = max((time.monotonic() - since for since in list(self.since.values())), default=0.0)
        if longest > self.limit_s:
            raise TeacherError(
                f"teacher {self.name}: a unit has been computing for more than {self.limit_s:.0f} s (unit_timeout_s)"
            )
        if self.resizing is None or not self.resizing.is_alive():
            self.resizing = threading.Thread(target=wishes.outlive, args=(self.application,), daemon=True)
            self.resizing.start()

    def __del__(self) -> None:
        """Called by Serve when it takes this copy away: an engine in processes of its own ends with it."""
        if hasattr(self, "backend"):  # it has none where loading failed
            self.backend.close()

    def _leave(self, error: DeadEngineError) -> NoReturn:
        """End this process at once, with what its engine left behind: Serve starts another, and callers ask again.

        Raising would keep a copy that can answer nothing until Serve has noticed, and sys.exit only ends the thread.
        """
        log.error("%s", error)
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(1)
