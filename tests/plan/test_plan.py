"""The plan of a run: sizes against published counts and transformers, memory against published arithmetic."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from typer.testing import CliRunner

from rayfuse.cli import app
from rayfuse.config import Model, Teacher, load_config, parse_config
from rayfuse.errors import PlanError
from rayfuse.plan.activations import activations
from rayfuse.plan.estimate import estimate
from rayfuse.plan.hardware import GPUS, ClusterFile, named_gpus, read_cluster
from rayfuse.plan.memory import Setup, model_states, student_activations, student_memory, teacher_memory
from rayfuse.plan.roofline import step_time, training_flops
from rayfuse.plan.shapes import from_sizes, measure_shape, read_shape
from rayfuse.plan.work import count_samples, store_size

H800 = GPUS["h800"]
PHI4 = Model(model="microsoft/phi-4")
COMMON = {"dtype": "bfloat16", "checkpointing": True, "batch": 4, "length": 4096}


def _setup(engine="deepspeed", zero_stage=3, workers=8, **changes):
    return Setup(engine=engine, zero_stage=zero_stage, workers=workers, **{**COMMON, **changes})


# --- shapes ------------------------------


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        # what the makers' model cards and safetensors headers say
        ("microsoft/phi-4", 14_659_507_200),
        ("Qwen/Qwen2.5-14B-Instruct", 14_770_033_664),
        ("Qwen/Qwen2.5-Coder-14B-Instruct", 14_770_033_664),
        ("mistralai/Mistral-Small-24B-Instruct-2501", 23_572_403_200),
    ],
)
def test_known_shapes_have_the_published_number_of_parameters(model, parameters):
    assert read_shape(Model(model=model)).parameters == parameters


def test_the_parts_of_a_shape_add_up():
    """Phi-4's embedding and output layer are not tied: layers, both of them and the last norm are the whole."""
    shape = read_shape(PHI4)
    assert shape.layers * shape.layer + 2 * shape.head + shape.hidden == shape.parameters
    assert (shape.head, shape.vocabulary, shape.layers * shape.layer) == (5120 * 100_352, 100_352, shape.active)


def test_a_folder_is_counted_as_its_files_are(tiny):
    shape = read_shape(Model(model=tiny.model("pivot")))
    values = load_file(f"{tiny.model('pivot')}/model.safetensors").values()
    assert shape.parameters == sum(value.numel() for value in values)
    assert shape.stored == sum(value.numel() * value.element_size() for value in values)


def test_of_experts_only_those_count_that_a_token_visits():
    sizes = {"model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 100, "moe_intermediate_size": 32}
    few, many = (
        measure_shape(from_sizes({**sizes, "num_experts": count, "num_experts_per_tok": 2}), "m", "")
        for count in (4, 8)
    )
    assert many.parameters - few.parameters == 2 * 4 * (3 * 64 * 32 + 64)
    assert many.active - few.active == 2 * 4 * 64, "the router grows, the experts that a token visits do not"


def test_the_cache_is_as_large_as_transformers_makes_it(tiny):
    shape = read_shape(Model(model=tiny.model("math")))
    model = AutoModelForCausalLM.from_pretrained(tiny.model("math"))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 7, dtype=torch.long), past_key_values=cache, use_cache=True)
    assert 7 * shape.cache == sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)


def test_a_shape_is_given_by_hand_or_as_a_file(tiny):
    here = read_shape(Model(model=tiny.model("pivot")))
    sizes = AutoConfig.from_pretrained(tiny.model("pivot")).to_dict()
    keys = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    keys += ("num_key_value_heads", "vocab_size", "tie_word_embeddings", "head_dim")
    given = {key: sizes[key] for key in keys if sizes.get(key) is not None}
    for shape in (given, f"{tiny.model('pivot')}/config.json"):
        assert read_shape(Model(model="org/somewhere", shape=shape)).parameters == here.parameters


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"model": "/no/such/model"}, r"the student \(/no/such/model\) cannot be planned: .*`shape: CONFIG.JSON`"),
        ({"model": "a/b", "shape": {"hidden_size": 8}}, "model_type 'None', which transformers does not know"),
        ({"model": "a/b", "shape": {"model_type": "bert"}}, "is not a causal language model|no list of layers"),
        ({"model": "a/b", "shape": "/no/config.json"}, "cannot read the shape /no/config.json"),
    ],
)
def test_a_model_that_cannot_be_read_is_named_and_what_to_do(model, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(PlanError, match=message):
        read_shape(Model.model_validate(model))


# --- memory ------------------------------


@pytest.mark.parametrize(
    ("zero_stage", "gigabytes"), [(1, 31.4), (2, 16.6), (3, 1.9)], ids=["ZeRO-1", "ZeRO-2", "ZeRO-3"]
)
def test_model_states_are_those_of_the_zero_paper(zero_stage, gigabytes):
    """Figure 1 of arXiv 1910.02054: 7.5B parameters on 64 devices, Adam in mixed precision."""
    states = model_states(7.5e9, _setup(zero_stage=zero_stage, workers=64))
    assert round(sum(states) / 1e9, 1) == gigabytes


def test_sixteen_bytes_a_parameter_whatever_holds_them():
    for engine, zero_stage in (("ddp", 0), ("deepspeed", 3), ("fsdp2", 3)):
        for dtype in ("float32", "bfloat16"):
            setup = _setup(engine=engine, zero_stage=zero_stage, workers=1, dtype=dtype)
            assert sum(model_states(1e9, setup)) == 16e9


def test_phi4_on_eight_cards_takes_what_paper_and_pencil_say():
    """16 bytes a parameter over 8 ranks are 29.3 GB; a layer's input in bfloat16 for 4,096 tokens 42 MB, 40 of them."""
    shape = read_shape(PHI4)
    memory = student_memory(shape, _setup(), H800)
    terms = {term.name: term.bytes for term in memory.terms}
    assert terms["weights"] + terms["gradients"] + terms["optimiser"] == pytest.approx(29.3e9, rel=0.002)
    assert student_activations(shape, _setup(batch=1)).inputs * 40 == 40 * 4096 * 5120 * 2
    assert 42e9 < memory.total < 56e9, "about 48 GB by hand, with a rule of thumb for a live layer"
    assert memory.fits
    assert not student_memory(shape, _setup(engine="ddp", zero_stage=0), H800).fits


def test_activations_are_what_autograd_keeps(tiny):
    """The bytes counted on shapes are those that a real forward of the same model keeps."""
    shape = read_shape(Model(model=tiny.model("pivot")))
    model = AutoModelForCausalLM.from_config(shape.config, dtype=torch.float32).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    ids = torch.zeros(3, 40, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0  # as a unit of texts of unequal length has; without padding the model keeps no mask
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model.model(input_ids=ids, attention_mask=mask, use_cache=False)
    assert out.last_hidden_state.shape == (3, 40, shape.hidden)
    counted = activations(shape, 3, 40, "float32", autocast=False).kept(shape.layers, checkpointing=False)
    assert counted == pytest.approx(sum(size for size, _ in kept.values()), rel=0.001)


def test_recomputation_keeps_the_layers_inputs_only():
    shape = read_shape(PHI4)
    full, inputs = (student_memory(shape, _setup(checkpointing=c, batch=1), H800).total for c in (False, True))
    assert full - inputs > 30e9


def test_what_is_offloaded_is_not_on_the_card():
    shape = read_shape(PHI4)
    names = [
        {term.name for term in student_memory(shape, _setup(offload=place), H800).terms}
        for place in ("none", "optimizer", "all")
    ]
    assert [{"weights", "optimiser"} & one for one in names] == [{"weights", "optimiser"}, {"weights"}, set()]


def test_a_teacher_in_vllm_fills_its_share_with_cache_and_the_rest_with_logits():
    teacher = Teacher(name="t", model="Qwen/Qwen2.5-14B-Instruct", backend="vllm", gpus=1)
    memory = teacher_memory(teacher, read_shape(teacher), H800, 4096)
    terms = {term.name: term.bytes for term in memory.terms}
    assert terms["weights"] == 2 * 14_770_033_664
    assert terms["weights"] + terms["KV cache"] + terms["activations"] == pytest.approx(0.85 * H800.memory)
    assert memory.fits
    split = Teacher(name="t", model=teacher.model, backend="vllm", gpus=2, vllm={"tensor_parallel": 2})
    halves = {term.name: term.bytes for term in teacher_memory(split, read_shape(split), H800, 4096).terms}
    assert halves["weights"] == terms["weights"] / 2


# --- time ------------------------------


def test_a_token_costs_six_times_the_weights_and_eight_with_recomputation():
    """Kaplan et al. (arXiv 2001.08361): 6 N per token; attention, which grows with the length, is left out."""
    shape = read_shape(PHI4)
    weights = shape.active + shape.head
    assert training_flops(shape, _setup(checkpointing=False), 0) == pytest.approx(6 * weights)
    assert training_flops(shape, _setup(), 0) == pytest.approx(8 * shape.active + 6 * shape.head)


def test_gathering_costs_where_computing_does_not_hide_it():
    shape, node = read_shape(PHI4), named_gpus(8, "h800")
    small, large = (
        step_time(shape, _setup(batch=batch), node, student_activations(shape, _setup(batch=batch)), length=length)
        for batch, length in ((1, 64), (4, 4096))
    )
    assert (small.bound, large.bound, large.gather) == ("gathering weights", "compute", 0.0)


def test_the_store_holds_59_bytes_a_row_for_the_top_10():
    assert store_size(10, 100, 3, 5000) == (300, 3 * (5000 * 59 + 100_000))


# --- samples, hardware ------------------------------


def test_samples_are_counted_where_they_can_be(tiny, tmp_path):
    rows = len((tiny.root / "train.jsonl").read_text().splitlines())

    def count(**changes):
        config = parse_config(tiny.tree(tmp_path, **changes))
        return count_samples(config, config.stages[0])

    assert count() == rows
    assert count(data={"path": str(tiny.root / "train.jsonl"), "limit": 7}) == 7
    assert count(data={"sources": [{"path": str(tiny.root / "train.jsonl"), "weight": 2}]}) == 2 * rows
    assert count(data={"path": "org/on-the-hub", "limit": 900}) == 900
    assert count(data={"path": "org/on-the-hub"}) == 4 * 16, "four steps of 16"
    with pytest.raises(PlanError, match=r"how many samples org/on-the-hub has cannot be told.*--samples"):
        count(data={"path": "org/on-the-hub"}, stages=["sft"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu: h100\nnodes: two", "nodes: Input should be a valid integer"),
        ("gpu: abacus", "gpu 'abacus' is not known"),
        ("- h100", "must hold keys and values"),
        ("gpu: [", "cannot read the cluster"),
        ("gpus: 8", "gpus: Extra inputs are not permitted"),
    ],
)
def test_a_cluster_file_that_is_wrong_says_how(tmp_path, text, message):
    (tmp_path / "cluster.yaml").write_text(text)
    with pytest.raises(PlanError, match=message):
        read_cluster(tmp_path / "cluster.yaml")


def test_a_cluster_file_replaces_the_data_sheet():
    hardware = ClusterFile(gpu="h800", nodes=2, memory_gb=96, network_gb_s=100).hardware()
    assert (hardware.devices, hardware.device.memory, hardware.device.network) == (16, 96e9, 100e9)
    assert hardware.device.peak == H800.peak
    with pytest.raises(PlanError, match="--gpu abacus is not known"):
        named_gpus(8, "abacus")
    with pytest.raises(PlanError, match="--gpus 12: give 1 to 8"):
        named_gpus(12, "h100")


# --- the whole ------------------------------


def _flagship(tmp_path, **changes):
    tree = {
        "student": {"model": "microsoft/phi-4", "workers": 8, "gpus": 1, "dtype": "bfloat16"},
        "teachers": [{"model": "Qwen/Qwen2.5-14B-Instruct", "backend": "vllm", "gpus": 1, "replicas": {"max": 8}}],
        "data": {"path": "org/data", "limit": 1024, "unit_size": 4},
        "serving": {"mode": "first"},
        "stages": [{"method": "infifusion", "batch_size": 128}],
        "output": str(tmp_path / "run"),
    }
    return {**tree, **changes}


def test_what_does_not_fit_is_said_with_a_setting_that_does(tmp_path):
    node = named_gpus(8, "h800")
    plan = estimate(parse_config(_flagship(tmp_path)), node)
    (fault,) = plan.faults
    assert "student rank, 01-infifusion needs" in fault
    assert "it fits with student.engine=" in fault
    assert plan.chosen is not None
    assert plan.chosen[0].zero_stage >= 2
    assert plan.chosen[1].fits
    assert not estimate(parse_config(_flagship(tmp_path)), node, fit=True).faults


def test_a_second_stage_on_the_same_data_asks_nobody_again(tmp_path):
    stage = {"method": "infifusion", "batch_size": 128}
    plan = estimate(parse_config(_flagship(tmp_path, stages=[stage, stage])), named_gpus(8, "h800"))
    assert [sum(stage.scoring.values()) > 0 for stage in plan.stages] == [True, False]
    assert plan.objects == 1024
    assert plan.stages[0].teachers_first > 0


def test_hours_fall_with_the_length_of_the_samples(tmp_path):
    long, short = (
        estimate(parse_config(_flagship(tmp_path)), named_gpus(8, "h800"), length=length) for length in (4096, 1024)
    )
    assert long.hours / short.hours == pytest.approx(4, rel=0.15), "attention shrinks faster, updates do not"


def test_the_command_prints_writes_what_fits_and_tells_by_its_status(tmp_path):
    import yaml

    path, fit = tmp_path / "run.yaml", tmp_path / "fit.yaml"
    path.write_text(yaml.safe_dump(_flagship(tmp_path)))
    arguments = ["plan", str(path), "--gpus", "8", "--gpu", "h800", "--price", "2"]
    said = CliRunner().invoke(app, [*arguments, "--fit", str(fit)])
    assert said.exit_code == 1, said.output
    for text in ("DOES NOT FIT", "largest: activations", "GPU hours", "roofline   989 TFLOP/s", "at 2 per GPU hour"):
        assert text in said.output
    assert load_config(fit).student.engine != "ddp"
    made = CliRunner().invoke(app, ["plan", str(fit), *arguments[2:], "--json"])
    assert made.exit_code == 0, made.output
    tree = json.loads(made.output)
    assert tree["fits"]
    assert tree["choice"] == {}
    assert tree["cost"] == pytest.approx(2 * tree["gpu_hours"])
    assert {memory["what"] for memory in tree["memory"]} == {
        "student rank, 01-infifusion",
        "teacher Qwen2.5-14B-Instruct",
    }


def test_a_run_on_gpus_needs_their_name(tmp_path, monkeypatch):
    from rayfuse.plan.command import chosen_hardware

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = parse_config(_flagship(tmp_path))
    with pytest.raises(PlanError, match="this machine has none: name some, --gpu h100"):
        chosen_hardware(config, None, None, None)
    with pytest.raises(PlanError, match="leave out --gpus and --gpu"):
        chosen_hardware(config, 8, None, tmp_path / "cluster.yaml")


def test_a_run_on_processors_is_planned_for_this_machine(tiny, tmp_path):
    from rayfuse.plan.command import chosen_hardware

    config = parse_config(tiny.tree(tmp_path))
    hardware = chosen_hardware(config, None, None, None)
    assert 1e9 < hardware.device.peak < 1e14
    plan = estimate(config, hardware)
    assert not plan.faults
    assert plan.hours > 0
