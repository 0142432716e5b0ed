"""What is merged ahead of a forward with gradients is what the layers would merge in it.

The kernels run on a GPU, or by Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/test_merge_ahead.py`, as
`.ci/run` does."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from models import ARCHITECTURES, IDS, IMAGE, make_experts, output
from peft import LoraConfig, get_peft_model
from torch import nn

import peft_tint
from peft_tint.task_vectors import LowRank as Factors
from peft_tint.task_vectors import TaskVectors
from peft_tint.tint import merge_ahead
from peft_tint.tint.merge_ahead import Dense, LowRank, MergeAhead, Unit, kernels_work
from peft_tint.tint.merged_layer import MergedLayer

CPU, DEVICE = torch.device("cpu"), torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = list(merge_ahead.DTYPES)
NEEDS_KERNELS, NEEDS_KERNELS_HERE = (
    pytest.mark.skipif(not kernels_work(device, torch.float32, torch.float32), reason=f"needs {needed}")
    for device, needed in ((CPU, "TRITON_INTERPRET=1"), (DEVICE, "Triton on a GPU, or TRITON_INTERPRET=1"))
)
KINDS = [pytest.param("full", marks=NEEDS_KERNELS), "lora", pytest.param("lora with biases", marks=NEEDS_KERNELS)]


def make_model(kind, dtype=torch.float32, **config):
    base = ARCHITECTURES["bert"].build().to(dtype)
    experts = make_experts(base, ["a", "b", "c"])
    if kind != "full":
        for index, task in enumerate(experts):
            bias = "all" if kind == "lora with biases" and index == 1 else "none"
            settings = LoraConfig(r=2 + index, target_modules="all-linear", exclude_modules=["classifier"], bias=bias)
            experts[task] = get_peft_model(copy.deepcopy(base), settings)
            for name, parameter in experts[task].named_parameters():
                if "lora_B" in name or (parameter.requires_grad and "bias" in name):
                    parameter.data += 0.1 * torch.randn_like(parameter)
    model = peft_tint.from_experts(base, experts, **{"tint_layer": [], "coefficient_init": 0.3, **config}).eval()
    with torch.no_grad():
        for layer in merged_layers(model):
            for coefficients in layer.tint_coefficients.values():
                coefficients.uniform_(0.1, 0.9)
    return model


def merged_layers(model):
    return [module for module in model.modules() if isinstance(module, MergedLayer)]


def step(model):
    model.zero_grad(set_to_none=True)
    logits = output(model, IDS).float()
    model.ahead = sum(layer._ahead is not None for layer in merged_layers(model))
    logits.square().sum().backward()
    assert all(layer._ahead is None for layer in merged_layers(model))
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def by_the_layers(monkeypatch):
    def run(model):
        with monkeypatch.context() as patch:
            patch.setattr(MergeAhead, "merge", lambda self: None)
            return step(model)

    return run


# ---- the kernels -----------------------------------------------------------------------------------------------------


@NEEDS_KERNELS_HERE
@pytest.mark.parametrize("vectors", DTYPES)
@pytest.mark.parametrize("weight", DTYPES)
@pytest.mark.parametrize("tasks", [1, 3, 8])
def test_kernels_give_the_sums_of_float64(tasks, weight, vectors):
    """Of units of all sizes, with task vectors of all tasks and of some, and coefficients of one's own and shared."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)  # noqa: E731
    coefficients = [nn.Parameter(normal(2, tasks)), nn.Parameter(normal(1, tasks))]
    units = []
    for index, shape in enumerate([(3,), (64, 80), (16,), (2048,), (65, 66), (1,), (4096, 3)]):
        changed = range(tasks) if index % 2 == 0 else range(0, tasks, 2)
        dense = {task: (0.1 * normal(*shape)).to(vectors) for task in changed}
        row = (coefficients[1], 0) if index > 1 else (coefficients[0], index)
        units.append(Unit(None, "weight", normal(*shape).to(weight), TaskVectors(dense, {}), *row))
    kinds = {}
    for unit in units:
        kinds.setdefault(unit.kind, []).append(unit)
    assert {kind[-1] for kind in kinds} == {True, False}  # aligned, and not
    for own in kinds.values():
        part = Dense(own)
        merged = part.merge(part.parameters)
        gradients = [normal(*unit.weight.shape).to(weight) for unit in part.units]
        wanted = {parameter: torch.zeros_like(parameter, dtype=torch.float64) for parameter in part.parameters}
        for unit, found, gradient in zip(part.units, merged, gradients, strict=True):
            expected = unit.weight.double()
            for k, vector in zip(unit.vectors.dense_tasks.tolist(), unit.vectors.dense, strict=True):
                expected += unit.coefficients[unit.row, k].item() * vector.double()
                wanted[unit.coefficients][unit.row, k] += (gradient.double() * vector.double()).sum()
            exact = expected.to(weight)
            assert found.dtype == weight
            torch.testing.assert_close(found, exact, rtol=2 * torch.finfo(weight).eps, atol=1e-6)
            if weight == torch.float16:  # rounded once, to the nearest; the interpreter cuts bfloat16 off
                assert (found != exact).float().mean() < 0.01
        for parameter, found in zip(part.parameters, part.gradients(gradients), strict=True):
            torch.testing.assert_close(found.double(), wanted[parameter], rtol=1e-5, atol=1e-4)


@NEEDS_KERNELS_HERE
def test_gradients_of_any_layout():
    normal = lambda *shape: torch.randn(*shape, device=DEVICE)  # noqa: E731
    vectors, coefficients = TaskVectors({0: normal(32, 48)}, {}), nn.Parameter(torch.ones(1, 1, device=DEVICE))
    part = Dense([Unit(None, "weight", normal(32, 48), vectors, coefficients, 0)])
    for gradient in (normal(48, 32).t(), normal(32 * 48 + 1)[1:].view(32, 48)):  # the second not at a multiple of 16
        (found,) = part.gradients([gradient])
        torch.testing.assert_close(found[0, 0], (gradient * vectors.dense[0]).sum(), rtol=1e-4, atol=1e-4)
    assert part.gradients([None]) == (None,)


def test_rank_coefficients():
    factors = {
        0: Factors(torch.randn(4, 2), torch.randn(2, 3), 2.0),
        2: Factors(torch.randn(4, 1), torch.randn(1, 3), 3),
    }
    vectors, coefficients = TaskVectors({}, factors), nn.Parameter(torch.randn(2, 3))
    part = LowRank([Unit(None, "weight", torch.zeros(4, 3), vectors, coefficients, row) for row in (1, 0)])
    for found, row in zip(part.merge([coefficients]), (1, 0), strict=True):
        assert torch.equal(found, vectors.rank_coefficients(coefficients[row]))
    (found,) = part.gradients([torch.tensor([1.0, 10.0, 100.0]), None])
    assert torch.equal(found, torch.tensor([[0.0, 0.0, 0.0], [22.0, 0.0, 300.0]]))


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", ["tensor", "module", "block", "model"])
@pytest.mark.parametrize("kind", KINDS)
def test_is_what_layers_merge(kind, granularity, dtype, by_the_layers):
    model = make_model(kind, dtype, granularity=granularity)
    found, gradients = step(model)
    # LoRA adds nothing to an embedding here, and "all-linear" leaves norms out
    assert model.ahead == sum(bool(len(layer.tint_task_vectors)) for layer in merged_layers(model))
    expected, wanted = by_the_layers(model)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05  # see above
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert gradients.keys() == wanted.keys()
    scale = max(gradient.abs().max() for gradient in wanted.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=tolerance, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_one_merge_for_several_backwards(kind, by_the_layers):
    model = make_model(kind)
    _, once = by_the_layers(model)
    model.zero_grad(set_to_none=True)
    with model.reuse_merged_weights():
        for _ in range(3):
            output(model, IDS).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, 3 * once[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_follows_what_changes(kind, by_the_layers):
    """Coefficients, also where no version tells it, the base, copies, dtypes and adapters."""
    model = make_model(kind)
    step(model)
    layers = merged_layers(model)
    layers[3].tint_coefficients["default"].data.mul_(-1)
    assert torch.equal(step(model)[0], by_the_layers(model)[0])
    with torch.no_grad():
        layers[4].base_layer.weight.mul_(2)
    assert torch.equal(step(model)[0], by_the_layers(model)[0])
    layers[5].base_layer.weight = nn.Parameter(layers[5].base_layer.weight * 2, requires_grad=False)
    assert torch.equal(step(model)[0], by_the_layers(model)[0])
    layers[6].base_layer = copy.deepcopy(layers[6].base_layer)
    layers[6].base_layer.weight.data += 0.3
    assert torch.equal(step(model)[0], by_the_layers(model)[0])
    square = next(x.base_layer.weight for x in layers if x.base_layer.weight.shape == (16, 16))
    square.data = square.data.t()
    torch.testing.assert_close(step(model)[0], by_the_layers(model)[0])
    copied = copy.deepcopy(model)
    copied.set_coefficients(0.7)
    expected = by_the_layers(model)[0]
    assert not torch.equal(step(copied)[0], expected)
    assert torch.equal(step(copied)[0], by_the_layers(copied)[0])
    assert torch.equal(step(model)[0], expected)
    model.to(torch.float16)
    expected = by_the_layers(model)[0]
    torch.testing.assert_close(step(model)[0], expected, rtol=0.01, atol=0.01)
    assert model.ahead > 5


@NEEDS_KERNELS
def test_layers_that_kernels_are_not_for_merge_their_own(by_the_layers):
    model = make_model("full")
    trained, turned, wide = [x for x in merged_layers(model) if isinstance(x.base_layer, nn.Linear)][:3]
    trained.base_layer.weight.requires_grad_(True)
    turned.base_layer.weight = nn.Parameter(turned.base_layer.weight.t().contiguous().t(), requires_grad=False)
    wide.tint_task_vectors.double()
    found, gradients = step(model)
    assert model.ahead == len(merged_layers(model)) - 3
    expected, wanted = by_the_layers(model)
    assert torch.equal(found, expected)
    assert gradients.keys() == wanted.keys()
    assert "base_layer" in "".join(gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_is_not_called_has_no_gradient(kind):
    model = make_model(kind, target_modules=["query", "key", "pooler.dense"])
    encoder = model.get_base_model().bert.encoder
    last = encoder.layer[-1].attention.self.query
    encoder.layer = encoder.layer[:1]
    _, gradients = step(model)
    own = last.tint_coefficients["default"]
    assert own.grad is None and gradients


@pytest.mark.parametrize("kind", KINDS)
def test_experts_and_evaluation_between_steps(kind, by_the_layers):
    model = make_model(kind)
    _, expected = by_the_layers(model)
    with torch.no_grad():
        before = output(model, IDS)
    step(model)
    with torch.no_grad():
        assert torch.equal(output(model, IDS), before)
        with model.expert("b"):
            expert = output(model, IDS)
    assert not torch.equal(expert, before)
    found, gradients = step(model)
    torch.testing.assert_close(found, before)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)
    with model.expert("b"):
        torch.testing.assert_close(output(model, IDS), expert)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_moves_between_forward_and_backward(kind):
    """What was merged ahead is of tensors that nothing else holds then."""
    model = make_model(kind)
    _, expected = step(model)

    def move():
        model.double()
        model.float()
        output(model, IDS)
        held.extend(torch.full((size,), 7.0) for size in (512, 1024, 2048, 32, 64) * 20)

    held = []
    logits = output(model, IDS)
    model.zero_grad(set_to_none=True)
    move()
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_several_threads(kind, monkeypatch):
    """One that comes while another one lays out."""
    model = make_model(kind)
    with torch.no_grad():
        wanted = output(model, IDS)
    entered, go_on, plain = threading.Event(), threading.Event(), LowRank.__init__ if kind == "lora" else Dense.__init__

    def wait(self, units):
        if not entered.is_set():
            entered.set()
            go_on.wait(20)
        plain(self, units)

    monkeypatch.setattr(LowRank if kind == "lora" else Dense, "__init__", wait)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(output, model, IDS)
        assert entered.wait(20)
        second = output(model, IDS)
        go_on.set()
        for found in (first.result(20), second):
            assert found.requires_grad
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # without gradients there are none
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("between", ["no_grad", "expert", "forward"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_with_a_forward_before_the_backward(kind, between, reentrant):
    """As a teacher's, or one that measures."""
    model = make_model(kind)
    _, expected = step(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.zero_grad(set_to_none=True)
    loss = output(model, IDS).square().sum()
    with nullcontext() if between == "forward" else torch.no_grad():
        with model.expert("b") if between == "expert" else nullcontext():
            output(model, IDS)
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_that_is_called_alone_has_the_coefficients_of_now(kind):
    model = make_model(kind)
    output(model, IDS)
    for layer in merged_layers(model):
        layer.tint_coefficients["default"].data.add_(0.5)
    part = model.get_base_model().bert(**IDS).pooler_output
    torch.testing.assert_close(part, copy.deepcopy(model).merge_and_unload().bert(**IDS).pooler_output)


def test_parameters_of_the_model_itself_have_the_coefficients_of_now():
    base = ARCHITECTURES["plain_transformer"].build()
    model = peft_tint.from_experts(base, make_experts(base, ["a", "b"]), tint_layer=[])
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            output(model, IMAGE)
            for layer in merged_layers(model):
                layer.tint_coefficients["default"].data.add_(0.2)
            found = output(model, IMAGE)
            wanted = output(copy.deepcopy(model).merge_and_unload(), IMAGE)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_float64_is_computed_in_float64(by_the_layers):
    model = make_model("lora").double()
    with torch.no_grad():
        wanted = output(copy.deepcopy(model).merge_and_unload(), IDS)
    torch.testing.assert_close(output(model, IDS), wanted, rtol=1e-12, atol=1e-12)


def test_functional_transforms():
    model = make_model("lora")
    embedded = model.get_base_model().bert.embeddings.word_embeddings(IDS["input_ids"]).detach()
    loss = lambda x: model(inputs_embeds=x).logits.sum()  # noqa: E731
    (wanted,) = torch.autograd.grad(loss(embedded.requires_grad_()), embedded)
    torch.testing.assert_close(torch.func.grad(loss)(embedded), wanted)
