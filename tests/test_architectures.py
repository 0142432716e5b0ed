"""What merging promises, for every architecture."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from models import ARCHITECTURES, main_tensor, make_experts, output, per_task
from peft import PeftModel, get_peft_model
from torch.func import functional_call

import peft_tint
from peft_tint import TintTrainer, TintTrainingArguments
from peft_tint._structure import find_head, is_under, plain_modules

TASKS = ["x", "y", "z"]
NO_HEAD = "ignore:.*has neither a head"
pytestmark = pytest.mark.filterwarnings(NO_HEAD)


def build(architecture, dtype=torch.float32, **config):
    base = architecture.build().to(dtype)
    tasks = dict(zip(TASKS, architecture.classes, strict=True)) if architecture.has_head else TASKS
    experts = {task: expert.to(dtype) for task, expert in make_experts(base, tasks).items()}
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = peft_tint.from_experts(base, experts, coefficient_bounds=None, **config).eval()
    return model, experts, before


def double(tensors):
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


@torch.no_grad()
def test_zero_is_the_base_exactly(architecture):
    # frozen, as it is in the adapter: by that torch chooses a kernel for a linear layer
    expected = output(architecture.build().requires_grad_(False), architecture.inputs)
    model, _, before = build(architecture, coefficient_init=0.0)
    with model.disable_adapter():
        assert torch.equal(output(model, architecture.inputs), expected)
    base = architecture.build()
    own = per_task(base)
    assert bool(find_head(base, dict(plain_modules(base)))) == architecture.has_head
    if not own:
        assert torch.equal(output(model, architecture.inputs), expected)
    merged = model.merge_and_unload().state_dict()
    assert merged.keys() == before.keys()
    for name, tensor in merged.items():
        assert is_under(name, own) or torch.equal(tensor, before[name]), name


@torch.no_grad()
@pytest.mark.parametrize("task", TASKS)
def test_one_hot_is_the_expert(architecture, task):
    """In float64: how much of float32's rounding a model amplifies differs by processor."""
    model, experts, _ = build(architecture, torch.float64, coefficient_init={t: float(t == task) for t in TASKS})
    inputs = double(architecture.inputs)
    expected = output(experts[task], inputs)
    model.set_task(task)
    torch.testing.assert_close(output(model, inputs), expected, rtol=1e-9, atol=1e-9)
    merged, wanted = model.merge_and_unload(task=task).state_dict(), experts[task].state_dict()
    assert merged.keys() == wanted.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-9, atol=1e-9, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("task", TASKS)
def test_expert_context_is_the_expert(architecture, task):
    model, experts, _ = build(architecture, torch.float64)
    inputs = double(architecture.inputs)
    before = output(model, inputs)
    with model.expert(task):
        inside = output(model, inputs)
    torch.testing.assert_close(inside, output(experts[task], inputs), rtol=1e-9, atol=1e-9)
    assert torch.equal(output(model, inputs), before)


def test_reused_merged_weights(architecture):
    """Outputs are equal, gradients of two forwards are their sum; an expert and other coefficients are not mistaken for
    what was merged before. In float64 since T5 amplifies rounding."""
    model, inputs = build(architecture)[0].double(), double(architecture.inputs)
    coefficients = [p for name, p in model.named_parameters() if "tint_coefficients" in name]
    outputs, gradients = [], []

    def forwards():
        for task in TASKS[:2]:
            model.set_task(task)
            outputs.append(output(model, inputs))
            outputs[-1].square().mean().backward()

    for context in (nullcontext(), model.reuse_merged_weights()):
        with context:
            forwards()
            with torch.no_grad():
                with model.expert("z"):
                    outputs.append(output(model, inputs))
                before = [values.data for values in coefficients]
                for values in coefficients:
                    values.data = values.data + 0.1
                outputs.append(output(model, inputs))
                for values, data in zip(coefficients, before, strict=True):
                    values.data = data
        gradients.append([values.grad for values in coefficients])
        model.zero_grad()
    for plain, reused in zip(outputs[:4], outputs[4:], strict=True):
        assert torch.equal(plain, reused)
    assert not torch.equal(outputs[1], outputs[3])
    for plain, reused in zip(*gradients, strict=True):
        if plain is not None or reused is not None:  # of what the output depends on
            torch.testing.assert_close(reused, plain, rtol=1e-9, atol=1e-12)
    assert any(gradient is not None and gradient.any() for gradient in gradients[1])


def test_the_trainer_by_its_defaults(architecture, tmp_path):
    """Heads that take one vector a sample are fitted before the first step, and others are not."""
    model, _, _ = build(architecture)
    with torch.no_grad():
        result = model(**architecture.inputs)
    values = (
        [result] if isinstance(result, torch.Tensor) else [result.get(name) for name in ("logits", "predicted_depth")]
    )
    if not any(value is not None and len(value) == 2 for value in values):
        pytest.skip("no logits of each sample, which the trainer refuses with the reason")
    data = Dataset.from_dict({name: list(value.numpy()) for name, value in architecture.inputs.items()})
    arguments = TintTrainingArguments(str(tmp_path), max_steps=1, disable_tqdm=True)
    trainer = TintTrainer(model, arguments, {"x": data.with_format("torch")})
    trainer.train()
    assert trainer.log_history[-1]["step"] == 1 and math.isfinite(trainer.log_history[-1]["loss"])


@torch.no_grad()
def test_merging_in_place(architecture):
    """Of a copy of the model, in float64 since T5 amplifies rounding; back again is the model exactly."""
    original, inputs = build(architecture)[0].double(), double(architecture.inputs)
    before = output(original, inputs)
    model = copy.deepcopy(original)
    assert torch.equal(output(model, inputs), before)
    original.set_coefficients(0.0)
    assert torch.equal(output(model, inputs), before)
    assert not torch.equal(output(original, inputs), before)
    near = {"rtol": 0, "atol": 1e-9 * max(1.0, before.abs().max().item())}
    model.merge_adapter()
    torch.testing.assert_close(output(model, inputs), before, **near)
    model.unmerge_adapter()
    assert torch.equal(output(model, inputs), before)
    model.merge_backbone()
    torch.testing.assert_close(output(model, inputs), before, **near)
    plain = {name.replace("base_model.model.", "") for name, _ in model.named_parameters() if "_task." not in name}
    names = dict(architecture.build().named_parameters())
    assert {name.replace("original_module.", "") for name in plain} == names.keys()


@torch.no_grad()
def test_forward_and_merge_equal_naive_merging(architecture):
    """Every tensor is accounted for: the merged state dict is that of plain task arithmetic, with no difference."""
    model, experts, before = build(architecture)
    units = model.coefficients().units
    values = torch.rand(len(TASKS), len(units), generator=torch.Generator().manual_seed(3))
    model.set_coefficients(values)
    model.set_task("y")
    logits = output(model, architecture.inputs)
    merged = model.merge_and_unload()
    scale = max(1.0, logits.abs().max().item())
    torch.testing.assert_close(output(merged, architecture.inputs), logits, rtol=0, atol=1e-5 * scale)
    columns = dict(zip(units, values.t(), strict=True))
    of_task = {task: expert.state_dict() for task, expert in experts.items()}
    seen = {}
    for name, tensor in merged.named_parameters(remove_duplicate=False):
        column = columns.get(name, seen.get(id(tensor)))  # a tied parameter has the coefficients of its first name
        seen[id(tensor)] = column
        if column is None:
            assert is_under(name, per_task(architecture.build()))
            expected = of_task["y"][name]  # the tint layer, which is not merged
        else:
            changes = [of_task[task][name] - before[name] for task in TASKS]
            expected = before[name] + sum(c * change for c, change in zip(column, changes, strict=True))
        assert torch.equal(tensor.data, expected), name
    assert set(columns) <= set(dict(merged.named_parameters()))


def test_gradients_equal_plain_autograd(architecture):
    """Of the coefficients, against autograd's own graph over the sum; in float64, since T5 amplifies rounding."""
    model, experts, before = build(architecture, coefficient_init=0.25)
    before = double(before)
    experts = {task: expert.double() for task, expert in experts.items()}
    of_task = {task: expert.state_dict() for task, expert in experts.items()}
    inputs = double(architecture.inputs)
    model.double().set_task("y")
    output(model, inputs).square().mean().backward()
    units = model.coefficients().units
    got = {}
    for layer in model.base_model._merged_layers():
        values = layer.tint_coefficients["default"]
        grad = torch.zeros_like(values) if values.grad is None else values.grad  # of what the forward does not use
        got.update(zip(layer.units["default"], grad, strict=True))

    coefficients = {unit: torch.full((len(TASKS),), 0.25, dtype=torch.double, requires_grad=True) for unit in units}
    plain = experts["y"]
    weights, tied = {}, {}
    for name, parameter in plain.named_parameters(remove_duplicate=False):
        name_of_unit = name if name in coefficients else tied.get(id(parameter))
        tied[id(parameter)] = name_of_unit
        if name_of_unit is not None:
            vectors = [of_task[task][name] - before[name] for task in TASKS]
            weights[name] = before[name] + sum(c * v for c, v in zip(coefficients[name_of_unit], vectors, strict=True))
    result = functional_call(plain, weights, (), inputs, tie_weights=False)
    main_tensor(result).square().mean().backward()
    expected = torch.stack(
        [torch.zeros(len(TASKS)).double() if coefficients[u].grad is None else coefficients[u].grad for u in units]
    )
    difference = (torch.stack([got[unit] for unit in units]) - expected).norm()
    assert difference <= 1e-5 * expected.norm() > 0


def test_only_coefficients_and_tint_layers_train(architecture):
    model, _, _ = build(architecture)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("tint_coefficients" in name for name in trainable)
    assert not [name for name in trainable if "tint_coefficients" not in name and "modules_to_save" not in name]
    assert any("modules_to_save" in name for name in trainable) == bool(per_task(architecture.build()))


@torch.no_grad()
@pytest.mark.parametrize("name", ["bart", "clip", "git", "resnet", "wav2vec2"])
def test_files_and_two_adapters(name, tmp_path):
    """Experts and the adapter as files, whose names for a tensor may differ from those in memory (weight norm)."""
    architecture = ARCHITECTURES[name]
    model, experts, _ = build(architecture)
    base = architecture.build()
    base.save_pretrained(tmp_path / "base")
    for task, expert in experts.items():
        expert.save_pretrained(tmp_path / task)

    def config(**settings):
        folders = {task: str(tmp_path / task) for task in TASKS}
        return peft_tint.TintConfig(experts=folders, coefficient_bounds=None, **settings)

    values = torch.rand(model.coefficients().values.shape)
    model.set_coefficients(values)
    again = get_peft_model(base, config())
    again.set_coefficients(values)
    again.save_pretrained(tmp_path / "adapter")
    again.add_adapter("other", config(coefficient_init=0.7))
    base = type(base).from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    expected = output(model, architecture.inputs)
    for each in (again.eval(), loaded.eval()):
        assert torch.equal(output(each, architecture.inputs), expected)
    again.set_adapter("other")
    model.set_coefficients(0.7)
    assert torch.equal(output(again, architecture.inputs), output(model, architecture.inputs))


@torch.no_grad()
def test_a_parametrized_module_is_one():
    """Its coefficients are the module's, and its weight is the merged one also where it is read from outside."""
    model, experts, _ = build(ARCHITECTURES["wav2vec2"], target_modules=["conv"], granularity="module")
    name = "wav2vec2.encoder.pos_conv_embed.conv"
    assert name in model.coefficients().units
    model.set_coefficients({"x": 0.0, "y": 1.0, "z": 0.0})
    conv, expected = model.model.get_submodule(name), experts["y"].get_submodule(name).weight
    torch.testing.assert_close(conv.weight, expected)
    base = ARCHITECTURES["wav2vec2"].build().get_submodule(name).weight
    with model.disable_adapter():
        assert torch.equal(conv.weight, base)
    assert not torch.allclose(base, expected)
    model.merge_adapter()
    torch.testing.assert_close(conv.weight, expected)


def test_gradients_reach_the_originals_of_a_parametrized_module():
    model, _, _ = build(ARCHITECTURES["wav2vec2"])
    model.train().set_task("y")
    output(model, ARCHITECTURES["wav2vec2"].inputs).sum().backward()
    layer = model.model.get_submodule("wav2vec2.encoder.pos_conv_embed.conv")
    assert {unit.rpartition(".")[2] for unit in layer.units["default"]} == {"bias", "original0", "original1"}
    assert (layer.tint_coefficients["default"].grad != 0).all()
