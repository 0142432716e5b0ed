"""A data-free merge as the start of the coefficients, against least squares over whole vectors."""

import copy
import json

import pytest
import torch
from models import ARCHITECTURES, make_experts, output
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from test_lora_experts import make_adapter
from test_tint_model import load, logits, perturb

import peft_tint
from peft_tint import MERGING_METHODS, TintConfig, merge, merge_task_vectors
from peft_tint._structure import unit_name
from peft_tint.merging import _stack
from peft_tint.tint import _plan, _start
from peft_tint.tint.merged_layer import MergedLayer

GRANULARITIES = ["tensor", "module", "block", "model"]
FREE = {"coefficient_bounds": None}


@pytest.fixture(scope="module")
def base():
    return ARCHITECTURES["bert"].build(num_labels=3)


@pytest.fixture(scope="module")
def experts(base):
    torch.manual_seed(3)
    return make_experts(base, ["c", "a", "b"])


def start(base, experts, method, **config):
    return peft_tint.from_experts(copy.deepcopy(base), experts, coefficient_init=method, **config).eval()


def task_vectors_of(base, experts):
    before = {name: p.detach() for name, p in base.named_parameters() if not name.startswith("classifier")}
    states = {task: expert.state_dict() for task, expert in experts.items()}
    return {task: {name: state[name] - p for name, p in before.items()} for task, state in states.items()}


def nearest(task_vectors, merged, granularity):
    """{unit: coefficients}: each unit's tensors as one long vector, in float64."""
    units = {}
    for name in merged:
        units.setdefault(unit_name(granularity, *name.rsplit(".", 1)), []).append(name)
    solved = {}
    for unit, names in units.items():
        columns = [torch.cat([own[name].double().flatten() for name in names]) for own in task_vectors.values()]
        target = torch.cat([merged[name].double().flatten() for name in names])
        solved[unit] = torch.linalg.lstsq(torch.stack(columns, 1), target[:, None], driver="gelsd").solution[:, 0]
    return solved


def assert_starts(model, wanted, tolerance=1e-4):
    values, _, units = model.coefficients()
    assert units and set(units) <= set(wanted)
    for unit, own in zip(units, values.t().double(), strict=True):
        torch.testing.assert_close(own, wanted[unit], rtol=tolerance, atol=tolerance, msg=unit)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("method", [name for name, known in MERGING_METHODS.items() if not known.per_task])
def test_start_is_nearest_to_the_merge(base, experts, method, granularity):
    experts = dict(list(experts.items())[: 2 if method == "slerp" else 3])
    task_vectors = task_vectors_of(base, experts)
    wanted = nearest(task_vectors, merge_task_vectors(task_vectors, method), granularity)
    assert_starts(start(base, experts, method, granularity=granularity, **FREE), wanted)
    projected = {unit: 0.8 * values for unit, values in wanted.items()}
    projected = {unit: values.clamp(0.2, 0.5) for unit, values in projected.items()}
    settings = {"coefficient_bounds": [0.2, 0.5], "coefficient_init_kwargs": {"scale": 0.8}}
    assert_starts(start(base, experts, method, granularity=granularity, **settings), projected)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_weighted_sums_are_met_exactly(base, experts, granularity):
    def coefficients(method, **kwargs):
        model = start(base, experts, method, granularity=granularity, coefficient_init_kwargs=kwargs)
        return model.coefficients()

    close = {"rtol": 0, "atol": 1e-5}
    values = coefficients("average").values
    torch.testing.assert_close(values, torch.full_like(values, 1 / 3), **close)
    values = coefficients("task_arithmetic", scale=0.3).values
    torch.testing.assert_close(values, torch.full_like(values, 0.3), **close)
    if granularity != "model":  # which has one coefficient for blocks of different scales
        values, _, units = coefficients("lines", alpha=0.2, beta=0.4)
        wanted = torch.tensor([0.6 if "layer.1" in unit else 0.2 for unit in units]).expand(3, -1)
        torch.testing.assert_close(values, wanted, **close)


@torch.no_grad()
def test_the_tint_starts_as_the_merged_model(base, experts):
    merged, tint = merge(base, experts, "average"), start(base, experts, "average").merge_and_unload()
    for name, tensor in tint.state_dict().items():
        if not name.startswith("classifier"):
            torch.testing.assert_close(tensor, merged.state_dict()[name], rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["average", "ties", "wudi"])
def test_low_rank_zero_and_equal_experts(base, method, dtype):
    """What no expert changed is in the merge as zeros; among equal solutions it is the one of least norm."""
    lora = LoraConfig(r=2, target_modules=["query", "word_embeddings"], task_type=TaskType.SEQ_CLS)
    adapters = {task: make_adapter(base, lora, seed) for seed, task in enumerate(("low", "rank"))}
    full = copy.deepcopy(base)
    for name in ("key", "query"):
        getattr(full.bert.encoder.layer[1].attention.self, name).weight.data += 0.05 * torch.randn(16, 16)
    experts = {"twin": full, **adapters, "full": full}
    weights = {task: copy.deepcopy(e).merge_and_unload() if task in adapters else e for task, e in experts.items()}
    experts = {task: copy.deepcopy(expert).to(dtype) for task, expert in experts.items()}
    model = start(copy.deepcopy(base).to(dtype), experts, method, **FREE)
    if dtype == torch.float32:
        task_vectors = task_vectors_of(base, weights)
        assert_starts(model, nearest(task_vectors, merge_task_vectors(task_vectors, method), "tensor"))
    values, _, units = model.coefficients()
    values = dict(zip(units, values.t().tolist(), strict=True))
    key = values["bert.encoder.layer.1.attention.self.key.weight"]
    assert key[0] == pytest.approx(key[3]) and key[0] > 0.2 and key[1:3] == pytest.approx([0, 0], abs=1e-9)
    query = values["bert.encoder.layer.1.attention.self.query.weight"]
    assert query[0] == pytest.approx(query[3], rel=1e-3) and all(query)


def test_tensors_are_read_one_after_another(monkeypatch):
    class Recorded(dict):
        def __getitem__(self, name):
            reads.append(name)
            return super().__getitem__(name)

    monkeypatch.setattr(_stack, "GRAM_ENTRIES", 5)
    reads, names = [], ["x", "y", "z"]
    task_vectors = {task: Recorded({name: torch.randn(4, 3) for name in names}) for task in "ab"}
    starts = _start.starting_coefficients(task_vectors, dict.fromkeys(names[1:], "u"), "average", None)
    assert reads == ["x"] * 2 + ["y"] * 4 + ["z"] * 4  # by the merge and, in a unit, by the solution
    assert starts == {"u": pytest.approx([0.5, 0.5])}


def test_a_transform_comes_first(base, experts):
    """What is merged is what the coefficients multiply."""
    kwargs = {"transform": "magnitude", "transform_kwargs": {"density": 0.3}}
    task_vectors = task_vectors_of(base, experts)
    trimmed = {task: merge_task_vectors({task: own}, "magnitude", density=0.3) for task, own in task_vectors.items()}
    for method in ("average", "ties", "tsv"):
        wanted = nearest(trimmed, merge_task_vectors(trimmed, method), "block")
        assert_starts(start(base, experts, method, granularity="block", **FREE, **kwargs), wanted)


@pytest.mark.parametrize("granularity", ["tensor", "block"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_saved_start_comes_back_trained(bert, tmp_path, monkeypatch, granularity, low_cpu_mem_usage):
    kwargs = {"density": 0.4, "aggregate": "sum", "scale": 0.3}
    config = TintConfig(
        experts=bert[1], coefficient_init="ties", coefficient_init_kwargs=kwargs, granularity=granularity
    )
    model = get_peft_model(load(bert[0]), config).eval()
    before = model.coefficients().values
    assert before.std() > 0.01
    perturb(model)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["coefficient_init"] == "ties" and saved["coefficient_init_kwargs"] == kwargs
    if low_cpu_mem_usage:  # then the merge is not made in vain
        monkeypatch.setattr(_plan, "starting_coefficients", None)
    again = PeftModel.from_pretrained(load(bert[0]), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    again.load_adapter(tmp_path, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    for adapter in ("default", "second"):
        again.set_adapter(adapter)
        assert torch.equal(again.coefficients().values, model.coefficients().values)
        for task in model.tasks:
            assert torch.equal(logits(again, task), logits(model, task))
    if not low_cpu_mem_usage:  # a fresh one by the same config starts anew
        fresh = get_peft_model(load(bert[0]), TintConfig.from_pretrained(tmp_path))
        assert torch.equal(fresh.coefficients().values, before)


def test_several_adapters_and_hot_swap(bert, tmp_path):
    model = get_peft_model(load(bert[0]), TintConfig(experts=bert[1], coefficient_init="tsv")).eval()
    wanted = model.coefficients().values
    model.save_pretrained(tmp_path)
    model.add_adapter("lines", TintConfig(experts=bert[1], coefficient_init="lines"))
    model.set_adapter("lines")
    values, _, units = model.coefficients()
    lines = torch.tensor([1 / 3 + 0.5 * ("layer.1" in unit) for unit in units]).expand(3, -1)
    torch.testing.assert_close(values, lines, rtol=0, atol=1e-5)
    peft_tint.hotswap_adapter(model, str(tmp_path), "lines")
    assert torch.equal(model.coefficients().values, wanted)


def test_random_start_is_random(base, experts):
    first, second = (start(base, experts, "ties", init_weights=False).coefficients().values for _ in range(2))
    assert not torch.equal(first, second) and 0 <= first.min() and first.max() <= 1


@pytest.mark.parametrize("name", ["conv_net", "holders", "gpt2_classifier", "llama_tied", "segformer"])
@torch.no_grad()
def test_architectures(name):
    """Tied parameters, those of the model itself and transposed ones among them."""
    architecture = ARCHITECTURES[name]
    base = architecture.build()
    experts = make_experts(base, ["b", "a"])
    layer = {} if architecture.has_head else {"tint_layer": []}
    plain = start(base, experts, 0.5, **layer)
    for granularity in GRANULARITIES:
        model = start(base, experts, "average", granularity=granularity, **layer)
        assert torch.allclose(model.coefficients().values, torch.tensor(0.5), rtol=0, atol=1e-5)
    inputs = architecture.inputs
    torch.testing.assert_close(output(model, inputs), output(plain, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings, match", [
    ({"coefficient_init": "tie"}, r"'tie'; it must be a number, .*: average, task_arithmetic, ties, .*karcher\.$"),
    ({"coefficient_init": "emr"}, "'emr'; it must be .* a merging method that makes one model: average"),
    ({"coefficient_init": "tall_masks"}, "'tall_masks'; it must be .* a merging method that makes one model: average"),
    ({"coefficient_init": "ties", "coefficient_init_kwargs": {"densty": 1}}, "has no argument `densty`; it takes"),
    ({"coefficient_init": "ties", "coefficient_init_kwargs": {"scale": "big"}}, "the `scale` 'big'"),
    ({"coefficient_init": "ties", "coefficient_init_kwargs": {"scale": float("inf")}}, "the `scale` inf"),
    ({"coefficient_init": "lines", "coefficient_init_kwargs": {"inner": merge}}, "cannot be saved with the adapter"),
    ({"coefficient_init": "ties", "tint_layer_init": "merged"}, "is 'ties'.*tint_layer_init='expert'"),
    ({"coefficient_init_kwargs": {"density": 1}}, r"name the merging method .* in `coefficient_init`, which is 0\.3"),
])  # fmt: skip
def test_starts_that_are_none(settings, match):
    with pytest.raises(ValueError, match=match):
        TintConfig(experts={"a": "x"}, **settings)


@pytest.mark.parametrize("method, kwargs, match", [
    ("slerp", {}, "between two tasks and got 3"),
    ("ties", {"density": 0}, "`density` is 0"),
    ("average", {"scale": 1e40}, "'average' that is to be the start has NaN or Inf in 'bert"),
])  # fmt: skip
def test_a_start_that_fails_leaves_the_model_as_it_was(base, experts, method, kwargs, match):
    model = copy.deepcopy(base)
    with pytest.raises(ValueError, match=match):
        peft_tint.from_experts(model, experts, coefficient_init=method, coefficient_init_kwargs=kwargs)
    assert not any(isinstance(module, MergedLayer) for module in model.modules())
