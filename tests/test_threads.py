"""A model that several threads call at once, as a server does, gives each caller its own right answer."""

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import MethodType

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from models import ARCHITECTURES, make_experts
from peft import LoraConfig
from test_lora_experts import make_adapter
from torch import nn

import peft_tint
from peft_tint.task_vectors import TaskVectors
from peft_tint.tint import merged_layer

THREADS, CALLS = 8, 1000
TASKS = ("a", "b")
LORA = LoraConfig(r=4, lora_alpha=6, target_modules=["query", "value"], modules_to_save=["classifier"])
BATCHES = torch.randint(0, 64, (20, 2, 6), generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    """A model that holds parameters itself, and one with a module inside of a unit that is wrapped."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(8))
        self.embedding, self.block = nn.Embedding(64, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.classifier = nn.Linear(8, 3)

    def forward(self, input_ids):
        return self.classifier(self.block(self.embedding(input_ids) + self.token).mean(1))


def build(name):
    return (Plain() if name == "plain" else ARCHITECTURES["bert"].build()).eval()


def make_tint(base, experts):
    return peft_tint.from_experts(base, experts, tint_layer="classifier").eval()


def make_dts(base, experts):
    model = peft_tint.compress(base, experts["a"], "a", rank_ratio=0.3)
    return peft_tint.compress(model, experts["b"], "b", rank_ratio=0.3).eval()


def logits(model, ids, **kwargs):
    output = model(input_ids=ids, **kwargs)
    return output if isinstance(output, torch.Tensor) else output.logits


@torch.no_grad()
def merged_logits(model, task):
    """Of a copy whose weights are those of one task, by no code for calls."""
    model = copy.deepcopy(model)
    if "TINT" in {config.peft_type for config in model.peft_config.values()}:
        model = model.merge_and_unload(task=task)
    else:
        model.set_adapter(task)
        model = model.merge_and_unload()
    return [logits(model, ids) for ids in BATCHES]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("how", ["tint", "tint task_names", "dts", "dts adapter_names"])
@pytest.mark.parametrize("name", ["bert", "plain"])
def test_calls_are_independent(name, how, grad):
    base = build(name)
    experts = make_experts(base, TASKS)
    method, _, by = how.partition(" ")
    model = (make_tint if method == "tint" else make_dts)(base, experts)
    wanted = {task: merged_logits(model, task) for task in TASKS}
    before = {name: set(vars(module)) for name, module in model.named_modules()}

    def call(i):
        tasks = [TASKS[i % 2], TASKS[i // 2 % 2]] if by else TASKS[:1] * 2
        right = torch.stack([wanted[task][i % len(BATCHES)][row] for row, task in enumerate(tasks)])
        with torch.set_grad_enabled(grad):
            return logits(model, BATCHES[i % len(BATCHES)], **({by: tasks} if by else {})), right

    calls = CALLS // 10 if grad or name == "plain" else CALLS
    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(call, range(calls)))
    for found, right in (*results, *map(call, range(4))):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    # the forward of a mixed batch is put into the model for good
    after = {name: set(vars(module)) - {"forward"} for name, module in model.named_modules()}
    assert after == {name: attributes - {"forward"} for name, attributes in before.items()}
    for task in TASKS:
        for found, right in zip(merged_logits(model, task), wanted[task], strict=True):
            assert torch.equal(found, right)


def test_a_task_that_is_set_during_a_call_is_that_of_the_next():
    """A call's layers are all of one task."""
    base = build("bert")
    model = peft_tint.from_experts(base, make_experts(base, TASKS), tint_layer=["pooler", "classifier"]).eval()
    wanted = {task: merged_logits(model, task) for task in TASKS}
    with torch.no_grad():
        hook = model.base_model.model.bert.embeddings.register_forward_hook(lambda *_: model.set_task("b"))
        torch.testing.assert_close(logits(model, BATCHES[0]), wanted["a"][0], rtol=1e-5, atol=1e-5)
        hook.remove()
        torch.testing.assert_close(logits(model, BATCHES[0]), wanted["b"][0], rtol=1e-5, atol=1e-5)


# ---- what is kept between calls without gradients --------------------------------------------------------------------


def changes(model):
    """{what changes: function that does it}"""
    layer = model.base_model.model.bert.encoder.layer[0].output.dense
    coefficients, base = layer.tint_coefficients["default"], layer.base_layer
    other = base.weight.detach() + torch.randn(base.weight.shape)

    def replace():
        base.weight = nn.Parameter(other, requires_grad=False)

    return {
        "coefficients": lambda: model.set_coefficients(0.9),
        "coefficients, in place": lambda: coefficients.add_(0.5),
        "coefficients, by a detached tensor": lambda: coefficients.detach().add_(0.5),
        "the coefficients' data, in place": lambda: coefficients.data.add_(0.5),
        "the coefficients' data": lambda: setattr(coefficients, "data", coefficients.data + 0.5),
        "the base, in place": lambda: base.weight.copy_(other),
        "the base's data": lambda: setattr(base.weight, "data", other),
        "a parameter that is another": replace,
        "experts": lambda: layer.tint_task_vectors["default"]["weight"].dense.mul_(1.5),
        "precision": lambda: model.to(torch.float64),
        "all that is loaded": lambda: model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()}),
    }


CHANGES = tuple(changes(make_tint(base := build("bert"), make_experts(base, TASKS))))
CONTEXTS = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.mark.parametrize("made, changed", [(made, changed) for made in CONTEXTS for changed in CONTEXTS])
@pytest.mark.parametrize("what", CHANGES)
def test_merged_weights_are_those_of_now(what, made, changed):
    base = build("bert")
    model = make_tint(base, make_experts(base, TASKS))
    with CONTEXTS[made]():
        before = logits(model, BATCHES[0])
    with CONTEXTS[changed]():
        changes(model)[what]()
        found = logits(model, BATCHES[0])
    assert what == "precision" or not torch.allclose(found, before, atol=1e-4)
    right = merged_logits(model, "a")[0]
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    model(input_ids=BATCHES[0]).logits.sum().backward()  # and gradients can be taken still


def test_a_model_made_in_inference_mode():
    """Its tensors have no version, so it is merged for every call."""
    with torch.inference_mode():
        base = build("bert")
        model = make_tint(base, make_experts(base, TASKS))
        for value in (0.2, 0.9):
            model.set_coefficients(value)
            torch.testing.assert_close(logits(model, BATCHES[0]), merged_logits(model, "a")[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [make_tint, make_dts])
def test_a_second_call_merges_nothing(make, monkeypatch):
    base = build("bert")
    model, merges = make(base, make_experts(base, TASKS)), []
    merge = peft_tint.task_vectors.TaskVectors.merge
    monkeypatch.setattr(peft_tint.task_vectors.TaskVectors, "merge", lambda *args: merges.append(args) or merge(*args))
    with torch.no_grad():
        logits(model, BATCHES[0])
        assert merges
        merges.clear()
        with torch.inference_mode():
            logits(model, BATCHES[1])
        logits(model, BATCHES[1])
        logits(copy.deepcopy(model) and model, BATCHES[1])
    assert not merges


@pytest.mark.parametrize(
    "merge_lora, memory, merges", [(True, 0, True), (None, 2**40, True), (None, 2**10, False), (False, 2**40, False)]
)
def test_lora_experts_are_merged_where_memory_allows(merge_lora, memory, merges, monkeypatch):
    """Without gradients; with them they are added to the layers' outputs."""
    monkeypatch.setattr(merged_layer, "memory_of", lambda device: memory)
    base = build("bert")
    experts = {task: make_adapter(base, LORA, seed) for seed, task in enumerate(TASKS)}
    model = peft_tint.from_experts(base, experts, tint_layer="classifier", merge_lora=merge_lora).eval()
    with_gradients = logits(model, BATCHES[0])
    assert with_gradients.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(logits(model, BATCHES[0]), with_gradients, rtol=1e-5, atol=1e-5)
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    kept = layer._kept[False]
    assert ("weight" in kept.merged) == merges == (not kept.low_rank)
    logits(model, BATCHES[0]).sum().backward()
    assert not any(kept.merged for kept in layer._kept.values())  # its memory is for the training
    assert model.peft_config["default"].to_dict()["merge_lora"] is None


def test_a_forward_that_was_put_into_a_module_runs_with_merged_weights():
    """As accelerate's do, which call the function that they took the place of."""
    base = build("bert")
    model = make_tint(base, make_experts(base, TASKS))
    with torch.no_grad():
        wanted = logits(model, BATCHES[0])
        dense = model.base_model.model.bert.encoder.layer[0].output.dense.base_layer
        plain = dense.forward
        dense.forward = lambda x: plain(x) + 0.0
        torch.testing.assert_close(logits(model, BATCHES[0]), wanted)


@pytest.mark.parametrize("where", ["norm", "class", "all linear"])
def test_a_forward_that_is_put_into_a_module_later(where, monkeypatch):
    """When calls have run without it."""
    base = build("bert")
    model = make_tint(base, make_experts(base, TASKS))
    norm = model.base_model.model.bert.encoder.layer[0].output.LayerNorm.base_layer
    with torch.no_grad():
        for _ in range(3):
            logits(model, BATCHES[0])
        if where == "norm":
            norm.forward = MethodType(lambda self, x: x * self.weight, norm)
        elif where == "class":
            norm.__class__ = type("Other", (nn.LayerNorm,), {"forward": lambda self, x: x * self.weight})
        else:
            plain = nn.Linear.forward
            monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * plain(self, x))
        wanted = logits(copy.deepcopy(model).merge_and_unload(), BATCHES[0])
        for _ in range(3):
            torch.testing.assert_close(logits(model, BATCHES[0]), wanted, rtol=1e-5, atol=1e-5)


class Bound(nn.Module):
    """Reaches its own weight by another way than `self`."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.run = self.multiply

    def multiply(self, x):
        return x @ self.weight

    def forward(self, x):
        return self.run(x)


class Holder(nn.Module):
    """Another module holds a part of it."""

    def __init__(self):
        super().__init__()
        self.weight, self.others = nn.Parameter(torch.randn(4, 4)), [self]

    def forward(self, x):
        return x @ self.others[0].weight


class Table(nn.Module):
    """Its own parameter is that of a layer, too."""

    def __init__(self):
        super().__init__()
        self.table, self.embed = nn.Parameter(torch.randn(6, 4)), nn.Linear(4, 6, bias=False)
        self.embed.weight = self.table

    def forward(self, x):
        return self.embed(x) @ self.table


class Loop(nn.Module):
    """Reads its parameters without their names."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        for weight in self.parameters():
            x = (x @ weight).tanh()
        return x + self._parameters["one"].sum()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo about itself
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
@pytest.mark.parametrize("hooked", ["", "0", "1.linear1", "root"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("first", [Bound, Holder, Table, Loop])
def test_what_knows_itself_by_another_way_runs_with_merged_weights(first, hooked, compiled):
    """Threads wait for each other there."""
    torch.manual_seed(0)
    base = nn.Sequential(first(), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0), nn.Linear(4, 3))
    model = peft_tint.from_experts(base, make_experts(base, TASKS), tint_layer=[])
    x = torch.randn(3, 5, 4)
    wanted = copy.deepcopy(model).merge_and_unload()(x)
    if hooked:
        inner = model.base_model.model
        module = inner if hooked == "root" else {"0": inner[0], "1.linear1": inner[1].base_layer.linear1}[hooked]
        add_hook_to_module(module.base_layer if hooked == "0" else module, ModelHook())
    torch.compiler.reset()
    run = torch.compile(model, backend="eager") if compiled and not hooked else model
    torch.testing.assert_close(run(x), wanted, rtol=1e-5, atol=1e-5)
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: model(x), range(20)):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", ["before", "in", "inside"])
def test_a_call_that_fails_keeps_no_other_thread_waiting(where, monkeypatch):
    """Nor does it take back what another thread has put in place."""
    base = build("plain")
    model = make_tint(base, make_experts(base, TASKS))
    with torch.no_grad():
        wanted = logits(model, BATCHES[0])
        root = model.base_model.model.tint_root

        def fail(*args, **kwargs):
            raise ValueError("on purpose")

        with monkeypatch.context() as patch:
            if where == "before":
                hook = model.base_model.model.register_forward_pre_hook(fail, prepend=True)
            elif where == "in":
                patch.setattr(root, "merged_tensors", fail)
            else:
                patch.setattr(model.base_model.model.block, "forward", fail)
            with pytest.raises(ValueError, match="on purpose"):
                logits(model, BATCHES[0])
            if where == "before":
                hook.remove()
        with ThreadPoolExecutor(1) as pool:
            torch.testing.assert_close(pool.submit(logits, model, BATCHES[0]).result(10), wanted)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo about itself
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
def test_a_part_that_is_compiled_sees_the_tasks_of_a_call():
    base = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 3))
    model = peft_tint.from_experts(base, make_experts(base, TASKS), tint_layer=["0.1", "1"]).eval()
    x, names = torch.randn(3, 4), ["a", "b", "a"]
    with torch.no_grad():
        wanted = model(x, task_names=names)
        torch.compiler.reset()
        model.base_model.model[0].compile(backend="eager")
        torch.testing.assert_close(model(x, task_names=names), wanted)
        torch.testing.assert_close(model(x, task_names=names[::-1]), wanted)


def test_nothing_outlives_what_was_unloaded():
    base = build("bert")
    model = make_tint(base, make_experts(base, TASKS))
    logits(model, BATCHES[0])
    held = [weakref.ref(module) for module in model.modules() if isinstance(module, TaskVectors)]
    merged = model.merge_and_unload()
    gc.collect()
    assert merged is not None and not any(reference() for reference in held)


def test_what_a_forward_sets_is_set_on_the_module():
    class Counts(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls, self.last = self.calls + 1, x
            return super().forward(x)

    torch.manual_seed(0)
    base = nn.Sequential(Counts(4, 4), nn.Linear(4, 3))
    model = peft_tint.from_experts(base, make_experts(base, TASKS), tint_layer=[])
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            model(x := torch.ones(2, 4))
    assert model.base_model.model[0].calls == 2 and model.base_model.model[0].last is x
