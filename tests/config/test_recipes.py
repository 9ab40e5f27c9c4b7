"""One line of YAML, and what it stands for."""

import json

import pytest

from rayfuse.config import InfiFPO, InfiFusion, InfiGFusion, config_json, parse_config
from rayfuse.errors import ConfigError

TREE = {"student": "pivot", "teachers": ["a", "b"], "data": "train.jsonl", "output": "run"}


def test_the_papers_one_after_another():
    config = parse_config({**TREE, "recipe": "papers", "preferences": "pairs.jsonl"})
    first, second, third = config.stages
    assert isinstance(first, InfiFusion)
    assert isinstance(second, InfiGFusion)
    assert isinstance(third, InfiFPO)
    assert (config.signals.k, config.data.max_length, config.consensus) == (10, 4096, None)
    assert all(stage.standardized and stage.over_teachers == "sum" and stage.weighs == () for stage in (first, second))
    assert (third.beta, third.learning_rate, third.batch_size, third.epochs, third.warmup) == (2.5, 1e-7, 128, 1, 0.1)
    assert (third.rule, third.clip, third.length_norm, third.variant) == ("max_margin", True, True, "fpo")
    assert [stage.start_from for stage in config.stages] == ["previous"] * 3
    assert parse_config(json.loads(config_json(config))) == config


def test_the_papers_need_pairs_and_say_so():
    with pytest.raises(ConfigError, match=r"stages\.2 \(infifpo\) needs `preferences`: rows of prompt, chosen, rej"):
        parse_config({**TREE, "recipe": "papers"})


def test_what_the_file_writes_itself_stays():
    config = parse_config({**TREE, "recipe": "papers", "stages": ["infigfusion"], "signals": {"k": 20}})
    assert [stage.method for stage in config.stages] == ["infigfusion"]
    assert config.signals.k == 20


def test_an_unknown_recipe_is_named():
    with pytest.raises(ConfigError, match="recipe"):
        parse_config({**TREE, "recipe": "secret", "stages": ["sft"]})
