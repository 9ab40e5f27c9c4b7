from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayfuse.alignment.token_bytes import byte_ends
from rayfuse.quickstart import skills, tiny_models, world

NAMES = sorted(tiny_models.STYLES)
ROWS = [row for skill in skills.SKILLS for row in skills.make(skill, 300, seed=1)]


@pytest.fixture(scope="module")
def tokenizers():
    texts = [f"{row['prompt']}\n{row['response']}" for row in ROWS]
    return {name: tiny_models.make_tokenizer(style, texts) for name, style in tiny_models.STYLES.items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", ["85, 9", '"-".join(["cat"])', "naïve 漢字 🦊\n\ttab  ", "\x00\x7f", "  two  spaces"])
def test_every_text_comes_back_unchanged(tokenizers, name: str, text: str) -> None:
    ids = tokenizers[name].encode(text, add_special_tokens=False)
    assert tokenizers[name].decode(ids) == text
    assert byte_ends(tokenizers[name], ids)[-1] == len(text.encode())


def test_vocabularies_have_different_sizes(tokenizers) -> None:
    assert len({len(tokenizer) for tokenizer in tokenizers.values()}) == len(tiny_models.STYLES)


def test_numbers_are_cut_differently(tokenizers) -> None:
    cuts = {
        name: [piece.strip() for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("12345")]
        for name, tokenizer in tokenizers.items()
    }
    assert cuts == {
        "math": ["123", "45"],
        "code": ["1", "2", "3", "4", "5"],
        "instruct": ["12", "34", "5"],
        "pivot": ["12345"],
    }


def test_the_four_chat_templates_differ(tokenizers) -> None:
    assert len({tiny_models.render_prompt(tokenizer, "Say red.") for tokenizer in tokenizers.values()}) == len(NAMES)
    assert tiny_models.render_prompt(tokenizers["code"], "Say red.") == (
        "<|im_start|>user\nSay red.<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_is_the_rendered_prompt_the_response_and_end_of_turn(tokenizers, name: str) -> None:
    tokenizer = tokenizers[name]
    [sample] = tiny_models.encode(tokenizer, [{"prompt": "Say red.", "response": "red"}])
    assert sample.response[-1] == tokenizer.eos_token_id == tiny_models.end_of_turn(tokenizer)
    assert tokenizer.decode(sample.response[:-1]) == "red"
    conversation = [{"role": "user", "content": "Say red."}, {"role": "assistant", "content": "red"}]
    full = tokenizer.apply_chat_template(conversation, tokenize=False)
    assert full.startswith(tokenizer.decode(sample.prompt + sample.response))
    assert tokenizer.pad_token_id not in sample.prompt + sample.response


def _trained(tokenizers, steps: int) -> tuple[torch.nn.Module, list[float]]:
    model = tiny_models.make_model(tokenizers["pivot"], seed=3, hidden=32, layers=1)
    samples = tiny_models.encode(tokenizers["pivot"], ROWS)
    return model, tiny_models.train(model, samples, steps=steps, batch=16, learning_rate=5e-3, warmup=5, seed=3)


def test_training_lowers_the_loss_and_repeats_to_the_last_bit(tokenizers) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        (first, losses), (second, again) = _trained(tokenizers, 60), _trained(tokenizers, 60)
    finally:
        torch.set_num_threads(threads)
    assert losses == again
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_padding_changes_no_prediction(tokenizers) -> None:
    """The loss of a padded batch is the token mean over its samples, each computed alone."""
    model = tiny_models.make_model(tokenizers["code"], seed=1, hidden=32, layers=1)
    samples = tiny_models.encode(tokenizers["code"], Random(0).sample(ROWS, 5))

    def summed(batch: list[tiny_models.Sample]) -> tuple[float, int]:
        ids_BT, labels_BT = tiny_models._padded(batch)
        logits_BTV = model(input_ids=ids_BT).logits
        loss = torch.nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=tiny_models.IGNORED, reduction="sum"
        )
        return loss.item(), int((labels_BT != tiny_models.IGNORED).sum())

    total, tokens = summed(samples)
    alone = [summed([sample]) for sample in samples]
    assert tokens == sum(n for _, n in alone) == sum(len(sample.response) for sample in samples)
    assert total == pytest.approx(sum(loss for loss, _ in alone), rel=1e-5)


def test_every_pass_reads_every_sample_once(tokenizers) -> None:
    samples = tiny_models.encode(tokenizers["math"], ROWS)
    batches = list(tiny_models._batches(samples, 32, steps=2 * 29, draw=Random(0)))
    seen = [id(sample) for batch in batches for sample in batch]
    assert len(ROWS) == 900
    assert sorted(seen[:900]) == sorted(seen[900:]) == sorted(map(id, samples))


def test_a_saved_model_answers_as_before(tokenizers, tmp_path: Path) -> None:
    model, _ = _trained(tokenizers, 20)
    tiny_models.save(model, tokenizers["pivot"], tmp_path)
    prompts = [row["prompt"] for row in ROWS[:8]]
    before = tiny_models.answers(model, tokenizers["pivot"], prompts)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert tiny_models.answers(loaded, AutoTokenizer.from_pretrained(tmp_path), prompts) == before
    assert (tmp_path / "model.safetensors").exists()
    assert loaded.generation_config.eos_token_id == tokenizers["pivot"].eos_token_id


def _tiny(job: tuple[world.Recipe, Path]) -> tuple[str, dict[str, float]]:
    recipe, folder = job
    folder.mkdir(parents=True)
    (folder / "made").touch()
    return recipe.name, {"cpu": 0.0, "wall": 0.0}


def _broken(job: tuple[world.Recipe, Path]) -> tuple[str, dict[str, float]]:
    raise KeyboardInterrupt


def test_a_world_is_made_once_and_a_broken_off_one_is_made_anew(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(world, "train_one", _broken)
    with pytest.raises(KeyboardInterrupt):
        world.build_world(tmp_path, map_function=map)
    monkeypatch.setattr(world, "train_one", _tiny)
    lines: list[str] = []
    made = world.build_world(tmp_path, progress=lines.append, map_function=map)
    assert sorted(line.split(":")[0] for line in lines) == NAMES
    for path in (*made.teachers.values(), made.pivot, made.train, made.evaluation):
        assert path.exists()
    monkeypatch.setattr(world, "train_one", _broken)
    assert world.build_world(tmp_path, map_function=map) == made
    assert world.build_world(tmp_path / "other", map_function=lambda function, items: map(_tiny, items)) != made
