"""The student's engine in a configuration: what fits together, and what is refused with its reason."""

import pytest

from rayfuse.config import Student

TWO = {"model": "org/student", "workers": 2}


@pytest.mark.parametrize(
    ("changes", "sharded"),
    [
        ({"engine": "torch"}, False),
        ({"engine": "fsdp2"}, True),
        ({"engine": "deepspeed"}, True),
        ({"engine": "deepspeed", "zero_stage": 3, "offload": "all", "gpus": 1}, True),
        ({"engine": "deepspeed", "zero_stage": 2, "offload": "optimizer", "gpus": 1}, False),
        ({"engine": "deepspeed", "workers": 1, "offload": "optimizer", "gpus": 1}, True),
    ],
)
def test_which_engines_hold_a_part_of_the_weights(changes, sharded):
    assert Student(**{**TWO, **changes}).shards_weights is sharded


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "horovod"}, "'ddp', 'deepspeed' or 'fsdp2'"),
        ({"engine": "deepspeed", "workers": 1}, r"over its workers, and there is 1: raise workers, use engine: ddp"),
        ({"engine": "fsdp2", "workers": 1}, r"engine: fsdp2 shares the model out over its workers, and there is 1"),
        ({"zero_stage": 2}, r"zero_stage is 2, but engine is ddp: use engine: deepspeed"),
        ({"engine": "fsdp2", "zero_stage": 3}, r"zero_stage is 3, but engine is fsdp2"),
        ({"offload": "all", "gpus": 1}, r"engine: ddp has no offload: all; use engine: deepspeed or fsdp2"),
        ({"engine": "fsdp2", "offload": "optimizer", "gpus": 1}, r"has no offload: optimizer; use offload: all"),
        (
            {"engine": "deepspeed", "zero_stage": 2, "offload": "all", "gpus": 1},
            r"which zero_stage 2 keeps whole; use 3",
        ),
        ({"engine": "deepspeed", "offload": "all"}, r"offload is all, but gpus is 0: all is in the host's memory"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Student(**{**TWO, **changes})
