"""Runs a program, then its tests, inside the sandbox; only at the very end does it write the secret.

Given to Python as `-c` (the user in the sandbox may not be able to read this file), with the number of the descriptor
that the secret goes to. The program comes on standard input, as JSON.
"""

import json
import os
import sys
import types


def main() -> None:
    """Any end but the last line is a failure: an exception, sys.exit, os._exit, a signal, the time."""
    report = int(sys.argv[1])
    given = json.load(sys.stdin)
    solution = types.ModuleType("solution")
    sys.modules["solution"] = solution
    exec(compile(given["code"], "solution.py", "exec"), vars(solution))
    for test in given["tests"]:
        names = dict(vars(solution))
        exec(compile(test, "tests.py", "exec"), names)
        for name, value in list(names.items()):
            if name.startswith("test_") and callable(value) and name not in vars(solution):
                value()
    os.write(report, given["secret"].encode())


try:
    main()
finally:
    os._exit(1)  # no exit handler, thread or destructor of the program has a word after this
