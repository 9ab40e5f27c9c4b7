"""A teacher that is only its stored signals: for later epochs, and for a student without a network or the weights.

Nothing is loaded, deployed or asked. Which signals they are is told by the fingerprint under which they were written:
the configuration names it, or it is worked out from the same model's files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

from rayfuse.data.sample import Sample
from rayfuse.errors import MissingSignalsError
from rayfuse.signals.store import SignalStore
from rayfuse.signals.topk import TopKSignals
from rayfuse.teachers.identity import IdentifiedTeacher


class StoreTeacher:
    """What `TeacherClient` is for live teachers: asked for a unit, it can only say which sample is missing."""

    def __init__(self, teacher: IdentifiedTeacher, store: str) -> None:
        """Read the signals of `teacher` from the store at the URL `store`."""
        self.teacher = teacher
        self.store = SignalStore(store)

    def score(self, samples: Sequence[Sample]) -> Callable[[], list[TopKSignals]]:
        """The unit's signals; asked only where one of them is missing in the store, so that this raises.

        Raises (when waiting):
            MissingSignalsError: names the first sample that has none.
        """

        def wait() -> list[TopKSignals]:
            found = [self.store.get(self.teacher.fingerprint, sample.key) for sample in samples]
            for sample, signals in zip(samples, found, strict=True):
                if signals is None:
                    self._missing(sample)
            return [signals for signals in found if signals is not None]

        return wait

    def _missing(self, sample: Sample) -> NoReturn:
        raise MissingSignalsError(missing_text(self.teacher, self.store, sample))


def missing_text(teacher: IdentifiedTeacher, store: SignalStore, sample: Sample) -> str:
    """What to say where a sample has no signals of a `store` teacher."""
    known = store.known()
    if teacher.fingerprint in known:
        advice = "run these data once with this teacher's live backend and the same store, or leave the sample out"
    else:
        names = ", ".join(f"{name} ({about.get('name', 'unnamed')})" for name, about in sorted(known.items())) or "none"
        advice = f"the store holds no signals of this fingerprint at all; it holds: {names}. Set stored.fingerprint"
    return (
        f"teacher {teacher.name} has no signals of sample {sample.key[:12]} ({sample.response!r:.60}) in {store.url}, "
        f"fingerprint {teacher.fingerprint}, and its backend is `store`, which asks nobody: {advice}"
    )
