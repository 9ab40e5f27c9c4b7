"""The terminal: the one place that makes a console.

What a run prints must never end it. A terminal that cannot show a character (`LC_ALL=C`, many containers and job logs)
gets it spelt out in ASCII, and a reader that has left (`rayfuse fuse ... | head`) leaves the run alone.
"""

from __future__ import annotations

import codecs
import io
import os
import sys

from rich.console import Console

_SPELT = "rayfuse-spelt"
_ASCII = str.maketrans(
    {"–": "-", "—": "-", "−": "-", "…": "~", "×": "x", "·": ".", "→": ">", "←": "<", "↑": "^", "↓": "v", "↵": "<"}
    | dict.fromkeys("─━═╌", "-")
    | dict.fromkeys("│┃║", "|")
    | dict.fromkeys("┌┐└┘├┤┬┴┼╷╵╭╮╯╰", "+")
    | dict.fromkeys("“”„", '"')
    | dict.fromkeys("‘’", "'")
)
"""As wide as what they stand for, so that tables stay straight."""


def _spell(error: UnicodeError) -> tuple[str | bytes, int]:
    """An error handler of codecs: known signs in ASCII, every other character by its number (`\\u4e16`)."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_ASCII)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


codecs.register_error(_SPELT, _spell)


def make_printable() -> None:
    """Let standard output spell out what its encoding lacks; standard error does so already."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors=_SPELT)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Nobody reads any more: print nothing, and do not end the run for it as rich would."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)


def make_console(*, stderr: bool = False, plain: bool = False) -> Console:
    """A console for standard output or standard error.

    Args:
        stderr: standard error.
        plain: text as it is: no markup, no colours for numbers and paths, no wrapping.
    """
    make_printable()
    return _Console(stderr=stderr, markup=not plain, highlight=not plain, soft_wrap=plain)
