"""What is pure mathematics runs without Ray: on a bare GPU machine, say, where only torch and transformers are.

The configuration runs without either, so that a wrong key is answered at once.
"""

import subprocess
import sys

import pytest

WITHOUT_RAY = [
    "rayfuse.losses",
    "rayfuse.prepare.preparer",
    "rayfuse.prepare.targets",
    "rayfuse.stages",
    "rayfuse.student.engines.ddp",
    "rayfuse.teachers.transformers",
    "tests.test_devices",
]


@pytest.mark.parametrize("module", WITHOUT_RAY)
def test_needs_no_ray(module):
    code = f"import sys; sys.modules['ray'] = None; import {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


HEAVY = ("torch", "ray", "transformers", "numpy", "datasets", "vllm")


@pytest.mark.parametrize("module", ["rayfuse.config", "rayfuse.config.public", "rayfuse.metrics.definitions"])
def test_a_configuration_is_read_without_torch_and_ray(module):
    code = (
        f"import sys, {module}; from rayfuse.config import parse_config; "
        "parse_config({'student': 'a/b', 'teachers': ['c/d'], 'data': 'e', 'stages': ['infifusion'], 'output': 'f'}); "
        f"print(*[name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr[-2000:]
