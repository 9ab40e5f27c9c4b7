"""Every error that rayfuse raises on purpose.

One base class, so that a caller can catch all of them; each class is also the standard type it is a case of. Every
error takes one message (so it pickles through Ray unchanged) that says what failed, on which input, and what to do.
"""


class RayfuseError(Exception):
    """Base of all errors that rayfuse raises on purpose."""


class ConfigError(RayfuseError, ValueError):
    """A run's YAML file or an override is wrong."""


class PlanError(RayfuseError, ValueError):
    """A run cannot be planned: something that its cost depends on is not known."""


class DataError(RayfuseError, ValueError):
    """A data set cannot be read, or one of its rows is malformed."""


class ModelError(RayfuseError, OSError):
    """A model or tokenizer cannot be loaded, or lacks something that fusion needs."""


class AlignmentError(RayfuseError, ValueError):
    """Token boundaries cannot be mapped to the bytes of a text, or two texts do not match."""


class LossError(RayfuseError, ValueError):
    """A loss was called on values for which it is not defined."""


class SignalError(RayfuseError, ValueError):
    """A teacher's answer breaks the TopKSignals contract."""


class StoreError(RayfuseError, OSError):
    """The signal store cannot be read or written."""


class SandboxError(RayfuseError, RuntimeError):
    """Programs cannot be run in isolation on this machine."""


class TeacherError(RayfuseError, RuntimeError):
    """A teacher cannot answer."""


class DeadEngineError(TeacherError):
    """The engine of a teacher is gone: this process can answer no more, another can."""


class TeacherGoneError(TeacherError):
    """A teacher cannot start, or has not answered for longer than its patience."""


class ParityError(TeacherError):
    """A teacher's answers are not what its own weights say."""


class MissingSignalsError(RayfuseError, LookupError):
    """A sample has no teacher signals where the method needs them."""


class CheckpointError(RayfuseError, RuntimeError):
    """A checkpoint or a run folder is damaged, or belongs to another run."""


class StudentError(RayfuseError, RuntimeError):
    """The student group failed to train."""
