"""Using a TINT model, as a PEFT user would."""

import copy
import os
import pickle
import sys

import pytest
import torch
import transformers
from models import ARCHITECTURES, IDS, make_experts, output
from peft import (
    AutoPeftModel,
    AutoPeftModelForSequenceClassification,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from processes import run_to_end
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification

import peft_tint
from peft_tint import TintConfig
from peft_tint.task_vectors import TaskVectors


def load(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


@pytest.fixture
def model(bert):
    base, experts = bert
    return get_peft_model(load(base), TintConfig(experts=experts, task_type="SEQ_CLS")).eval()


def perturb(model):
    """As if it had been trained."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)


@torch.no_grad()
def logits(model, task):
    model.set_task(task)
    return model(**IDS).logits


def test_set_task_chooses_head_and_labels(model):
    assert model.tasks == ["a", "score", "b"] and model.task == "a"
    for task, classes in {"b": 5, "score": 3, "a": 2}.items():
        assert logits(model, task).shape == (2, classes)
        assert model.config.num_labels == classes and model.base_model.model.num_labels == classes
        assert model.config.id2label[0] == f"{task}-0" and model.config.label2id[f"{task}-1"] == 1
    loss = model(**IDS, labels=torch.tensor([0, 1])).loss
    assert torch.isfinite(loss)


def test_expert_context_after_training_and_errors(model, bert):
    perturb(model)
    for task, folder in bert[1].items():
        with model.expert(task):
            inside = model(**IDS).logits
            assert model.config.id2label[0] == f"{task}-0"
        torch.testing.assert_close(inside, load(folder)(**IDS).logits, rtol=1e-5, atol=1e-5)
    assert model.task == "a" and model.config.num_labels == 2
    with pytest.raises(RuntimeError, match="inside"), model.expert("b"):
        raise RuntimeError("inside")
    assert model.task == "a" and logits(model, "a").shape == (2, 2)


def test_expert_holds_no_second_copy(model):
    """No parameter or buffer is added, and the base weights stay the same tensors."""
    before = {name: (t.data_ptr(), t.clone()) for name, t in model.base_model.model.named_parameters()}
    sizes = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    with model.expert("b"):
        model(**IDS)
        assert sum(t.numel() for t in (*model.parameters(), *model.buffers())) == sizes
        for name, parameter in model.base_model.model.named_parameters():
            assert parameter.data_ptr() == before[name][0] and torch.equal(parameter, before[name][1])


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
def test_save_and_load_give_equal_logits(bert, tmp_path, task_type):
    base, experts = bert
    model = get_peft_model(load(base), TintConfig(experts=experts, task_type=task_type)).eval()
    perturb(model)
    expected = {task: logits(model, task) for task in model.tasks}
    model.save_pretrained(tmp_path)
    auto = AutoPeftModelForSequenceClassification if task_type else AutoPeftModel
    for again in (PeftModel.from_pretrained(load(base), tmp_path), auto.from_pretrained(tmp_path)):
        again.eval()
        assert again.tasks == model.tasks
        assert torch.equal(again.coefficients().values, model.coefficients().values)
        for task in model.tasks:
            assert torch.equal(logits(again, task), expected[task])
        assert not any(parameter.requires_grad for parameter in again.parameters())
    trainable = PeftModel.from_pretrained(load(base), tmp_path, is_trainable=True)
    assert trainable.get_nb_trainable_parameters()[0] == model.get_nb_trainable_parameters()[0]


def test_saved_file_holds_coefficients_and_tint_layers_only(model, tmp_path):
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
    assert all("tint_coefficients" in name or ".classifier." in name for name in names)
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".bin", ".pt")]
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, TintConfig) and config.experts == model.active_peft_config.experts


def test_load_in_a_fresh_process(model, bert, tmp_path):
    perturb(model)
    torch.save(logits(model, "b"), tmp_path / "expected.pt")
    model.save_pretrained(tmp_path)
    code = f"""
import torch, peft_tint
from peft import AutoPeftModelForSequenceClassification
model = AutoPeftModelForSequenceClassification.from_pretrained({str(tmp_path)!r}).eval()
model.set_task("b")
ids = torch.tensor({IDS["input_ids"].tolist()})
torch.set_num_threads(1)
assert torch.equal(model(input_ids=ids).logits, torch.load({str(tmp_path / "expected.pt")!r}))
"""
    run_to_end([sys.executable, "-W", "ignore", "-c", code])


@pytest.mark.parametrize("task", ["a", "score", "b"])
def test_merge_and_unload_is_a_plain_model(model, bert, tmp_path, task):
    perturb(model)
    expected = logits(model, task)
    merged = model.merge_and_unload(task=task)
    assert type(merged) is transformers.BertForSequenceClassification
    assert merged.state_dict().keys() == load(bert[1][task]).state_dict().keys()
    assert not any("tint" in type(module).__module__ for module in merged.modules())
    with torch.no_grad():
        torch.testing.assert_close(merged(**IDS).logits, expected, rtol=1e-5, atol=1e-6)
    merged.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.config.num_labels == len(again.config.id2label) and again.config.id2label[0] == f"{task}-0"
    with torch.no_grad():
        assert torch.equal(again(**IDS).logits, merged(**IDS).logits)


def test_merge_backbone_keeps_the_tasks(model):
    perturb(model)
    expected = {task: logits(model, task) for task in model.tasks}
    model.merge_backbone()
    assert not any("tint_task_vectors" in name for name, _ in model.named_buffers())
    for task in model.tasks:
        torch.testing.assert_close(logits(model, task), expected[task], rtol=1e-5, atol=1e-6)
    for use in (model.coefficients, model.merge_backbone, lambda: model.expert("a").__enter__()):
        with pytest.raises(ValueError, match="merge_backbone"):
            use()


def test_merge_backbone_cannot_be_saved_as_an_adapter(model, tmp_path):
    model.merge_backbone()
    with pytest.raises(ValueError, match="baked"):
        model.save_pretrained(tmp_path)


def test_merge_adapter_is_undone_exactly(model):
    perturb(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = logits(model, "b")
    model.merge_adapter()
    torch.testing.assert_close(logits(model, "b"), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="unmerge"):
        model.expert("a").__enter__()
    model.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_disable_adapter_and_unload_give_the_base(model, bert):
    base = load(bert[0])
    perturb(model)
    model.set_task("b")
    with torch.no_grad():
        expected = base(**IDS).logits
        with model.disable_adapter():
            assert torch.equal(model(**IDS).logits, expected)
        unloaded = model.unload()
        assert torch.equal(unloaded(**IDS).logits, expected)
    assert unloaded.config.id2label == base.config.id2label and unloaded.num_labels == 2


def test_trainable_parameters_are_counted(model, capsys):
    model.print_trainable_parameters()
    trainable, _ = model.get_nb_trainable_parameters()
    heads = sum(16 * classes + classes for classes in (2, 5, 3))
    assert trainable == heads + model.coefficients().values.numel()
    assert f"trainable params: {trainable}" in capsys.readouterr().out


def test_coefficients_are_labelled_and_settable(model):
    values, tasks, units = model.coefficients()
    assert values.shape == (3, len(units)) and tasks == ["a", "score", "b"]
    assert (values == 0.3).all() and "bert.encoder.layer.1.output.dense.bias" in units
    model.set_coefficients({"a": 0.1, "b": 0.2, "score": 0.9})
    assert model.coefficients().values[:, 0].tolist() == pytest.approx([0.1, 0.9, 0.2])
    wanted = torch.rand(3, len(units))
    model.set_coefficients(wanted)
    assert torch.equal(model.coefficients().values, wanted)
    wanted[0, 0], wanted[1, 1] = 3.0, -2.0
    model.set_coefficients(wanted)
    model.project_coefficients()
    assert torch.equal(model.coefficients().values, wanted.clamp(0, 1))


STEP = """
import pickle, sys, torch
with open(sys.argv[1], "rb") as file:
    model = pickle.load(file)
parameters = [p for name, p in model.named_parameters() if "tint_coefficients" in name]
for parameter in parameters:
    parameter.grad = -torch.ones_like(parameter)
torch.optim.SGD(parameters, lr=9.0).step()
print(model.coefficients().values.max().item())
"""


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_any_optimizer_keeps_the_bounds(bert, optimizer, tmp_path):
    """Of each adapter its own; of a copy, and of what is unpickled elsewhere; of no other model."""
    base, experts = bert
    model = get_peft_model(load(base), TintConfig(experts=experts, coefficient_bounds=[0.0, 1.0]))
    model.add_adapter("b", TintConfig(experts=experts, coefficient_bounds=[0.0, 0.5]))
    model.add_adapter("free", TintConfig(experts=experts, coefficient_bounds=None))
    other = get_peft_model(load(base), TintConfig(experts=experts))
    other.set_coefficients(3.0)
    for one in (model, copy.deepcopy(model)):
        parameters = [p.requires_grad_() for name, p in one.named_parameters() if "tint_coefficients" in name]
        for parameter in parameters:
            parameter.grad = -torch.ones_like(parameter)
        optimizer(parameters, lr=9.0).step()
        for adapter, low, high in (("default", 1, 1), ("b", 0.5, 0.5), ("free", 1.01, 99)):
            one.set_adapter(adapter)
            values = one.coefficients().values
            assert (low <= values).all() and (values <= high).all()
    assert (other.coefficients().values == 3).all()
    if optimizer is torch.optim.SGD:
        model.set_adapter("default")
        (tmp_path / "model").write_bytes(pickle.dumps(model))
        printed = run_to_end([sys.executable, "-W", "ignore", "-c", STEP, tmp_path / "model"])
        assert float(printed) == 1


@pytest.mark.parametrize("granularity, units", [("tensor", 39), ("module", 21), ("block", 4), ("model", 1)])
def test_granularity_shares_coefficients(bert, tmp_path, granularity, units):
    base, experts = bert
    model = get_peft_model(load(base), TintConfig(experts=experts, granularity=granularity)).eval()
    perturb(model)
    assert model.coefficients().values.shape == (3, units)
    assert len([p for n, p in model.named_parameters() if "tint_coefficients" in n]) == min(units, 21)
    expected = logits(model, "b")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(base), tmp_path, is_trainable=True).eval()
    assert torch.equal(logits(again, "b"), expected)
    optimizer = torch.optim.SGD([p for p in again.parameters() if p.requires_grad], 0.1)
    again(**IDS).logits.sum().backward()
    optimizer.step()
    assert again.coefficients().values.shape == (3, units)


LAYERS = {
    "head": None,
    "linear": "encoder.layer.1.output.dense",
    "norm": "bert.encoder.layer.0.attention.output.LayerNorm",
    "block": "encoder.layer.1",
    "several": ["encoder.layer.0.output.dense", "classifier"],
    "none": [],
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_tint_layer_trains_and_other_heads_do_not(bert, tmp_path, layer):
    base, experts = bert
    model = get_peft_model(load(base), TintConfig(experts=experts, tint_layer=layer)).eval()
    model.set_coefficients({"a": 0.0, "b": 1.0, "score": 0.0})
    torch.testing.assert_close(logits(model, "b"), load(experts["b"])(**IDS).logits, rtol=1e-5, atol=1e-5)
    model(**IDS).logits.square().sum().backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and "modules_to_save" in n}
    wanted = ["classifier"] if layer is None else [layer] if isinstance(layer, str) else layer
    assert bool(trained) == bool(wanted) and all(any(f"{w}.modules_to_save" in n for w in wanted) for n in trained)
    assert all("b_task" in name for name in trained)
    perturb(model)
    expected = {task: logits(model, task) for task in model.tasks}
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(base), tmp_path).eval()
    for task in model.tasks:
        assert torch.equal(logits(again, task), expected[task])
    torch.testing.assert_close(logits(again.merge_backbone() or again, "b"), expected["b"], rtol=1e-5, atol=1e-6)
    merged = model.merge_and_unload(task="b")
    torch.testing.assert_close(merged(**IDS).logits, expected["b"], rtol=1e-5, atol=1e-6)


def test_tint_layer_init():
    base = ARCHITECTURES["bert"].build()
    experts = make_experts(base, ["a", "b"])
    name = "bert.encoder.layer.1.output.dense"
    weights = {t: e.get_submodule(name).weight for t, e in experts.items()}
    before = base.get_submodule(name).weight.clone()
    wanted = {
        "expert": weights["b"],
        "base": before,
        "merged": before + 0.3 * (weights["a"] - before) + 0.3 * (weights["b"] - before),
    }
    for init, expected in wanted.items():
        model = peft_tint.from_experts(copy.deepcopy(base), experts, tint_layer=name, tint_layer_init=init).eval()
        layer = model.base_model.tint_layers[0].modules_to_save["default"]["b"]
        torch.testing.assert_close(layer.weight, expected)
        with model.expert("b"):
            torch.testing.assert_close(output(model, IDS), output(experts["b"], IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("as_state_dict", [False, True])
def test_from_experts(bert, tmp_path, as_state_dict):
    base, experts = bert
    loaded = {task: load(folder) for task, folder in experts.items()}
    sources = {task: expert.state_dict() for task, expert in loaded.items()} if as_state_dict else loaded
    model = peft_tint.from_experts(load(base), sources, coefficient_init=0.5).eval()
    for task, expert in loaded.items():
        assert logits(model, task).shape[1] == model.config.num_labels == expert.config.num_labels
        with model.expert(task):
            torch.testing.assert_close(model(**IDS).logits, expert(**IDS).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="held in memory"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    assert logits(model.merge_and_unload(task="b") and model, "b").shape == (2, 5)


def test_plain_module_with_state_dict_folders(tmp_path):
    from safetensors.torch import save_file

    architecture = ARCHITECTURES["conv_net"]
    base = architecture.build()
    experts = make_experts(base, ["a", "b"])
    for task, expert in experts.items():
        expert.fc = torch.nn.Linear(6, 2 if task == "a" else 7)
        (tmp_path / task).mkdir()
        save_file(expert.state_dict(), tmp_path / task / "model.safetensors")
    config = TintConfig(experts={task: str(tmp_path / task) for task in experts}, tint_layer="fc")
    model = get_peft_model(base, config).eval()
    for task, expert in experts.items():
        with model.expert(task):
            expected = output(expert, architecture.inputs)
            torch.testing.assert_close(output(model, architecture.inputs), expected, rtol=1e-5, atol=1e-5)
    assert model.merge_and_unload(task="b").fc.out_features == 7


def test_expert_reference_with_subfolder(bert, tmp_path):
    base, experts = bert
    load(experts["b"]).save_pretrained(tmp_path / "experts" / "b")
    reference = {"id": str(tmp_path / "experts"), "subfolder": "b"}
    model = get_peft_model(load(base), TintConfig(experts={"b": reference})).eval()
    with model.expert("b"):
        torch.testing.assert_close(model(**IDS).logits, load(experts["b"])(**IDS).logits, rtol=1e-5, atol=1e-5)


def test_relative_reference_is_saved_as_absolute(bert, tmp_path, monkeypatch):
    base, _ = bert
    monkeypatch.chdir(os.path.dirname(base))
    model = get_peft_model(load(base), TintConfig(experts={"a": "a", "b": {"id": ".", "subfolder": "b"}}))
    model.save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    again = PeftModel.from_pretrained(load(base), tmp_path).eval()
    assert torch.equal(logits(again, "b"), logits(model.eval(), "b"))


def test_target_modules_limit_what_is_merged(bert):
    base, experts = bert
    model = get_peft_model(load(base), TintConfig(experts=experts, target_modules=["query", "value"]))
    assert len(model.coefficients().units) == 2 * 2 * 2
    model = get_peft_model(load(base), TintConfig(experts=experts, target_modules=["query"], layers_to_transform=[1]))
    assert model.coefficients().units == [f"bert.encoder.layer.1.attention.self.query.{p}" for p in ("weight", "bias")]
    model = get_peft_model(load(base), TintConfig(experts=experts, exclude_modules=["word_embeddings"]))
    assert len(model.coefficients().units) == 38


def test_modules_to_save_trains_one_copy_for_all_tasks(bert):
    base, experts = bert
    model = get_peft_model(load(base), TintConfig(experts=experts, modules_to_save=["pooler"]))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("pooler.modules_to_save.default.dense.weight" in name for name in trainable)
    assert not any("pooler" in unit for unit in model.coefficients().units)


def test_state_dict_round_trip_copy_and_pickle(model):
    perturb(model)
    expected = logits(model, "b")
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(again, "b"), expected)
        assert get_peft_model_state_dict(again).keys() == get_peft_model_state_dict(model).keys()


def test_half_precision_base_keeps_its_dtype(bert):
    base, experts = bert
    half = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.bfloat16)
    model = get_peft_model(half, TintConfig(experts=experts)).eval()
    values, _, _ = model.coefficients()
    assert (values == values.new_tensor(0.3)).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(**IDS).logits).all()
    with model.expert("b"), torch.autocast("cpu", torch.bfloat16):
        inside = model(**IDS).logits
    torch.testing.assert_close(inside.float(), load(experts["b"])(**IDS).logits, rtol=0.1, atol=0.1)
    merged = model.merge_and_unload(task="b")
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}


def test_reused_weights_are_merged_once(model, monkeypatch):
    merged, merge = [], TaskVectors.merge
    monkeypatch.setattr(TaskVectors, "merge", lambda self, *args: merged.append(self) or merge(self, *args))
    logits(model, "a")
    once = len(merged)
    with model.reuse_merged_weights():
        for _ in range(3):
            model(**IDS).logits.sum().backward()
    assert once > 10 and len(merged) == 2 * once


def test_what_reused_weights_do_not_outlive(model):
    """Coefficients that change, the context, and copies; and what is told."""
    expected = []
    for value in (0.1, 0.9):
        model.set_coefficients(value)
        expected.append(logits(model, "a"))
    with torch.no_grad(), model.reuse_merged_weights():
        for value, wanted in zip((0.1, 0.9), expected, strict=True):
            model.set_coefficients(value)
            assert torch.equal(logits(model, "a"), wanted)
        copied = copy.deepcopy(model)
    copied.set_coefficients(0.1)
    assert torch.equal(logits(copied, "a"), expected[0])
    with model.reuse_merged_weights():
        loss = model(**IDS).logits.sum()
        copied = copy.deepcopy(model)
        with pytest.raises(ValueError, match="is in `reuse_merged_weights` already"), model.reuse_merged_weights():
            pass
    with pytest.raises(RuntimeError, match="`reuse_merged_weights` has been left"):
        loss.backward()
    with torch.inference_mode():
        frozen = copy.deepcopy(model)
        with frozen.reuse_merged_weights():
            assert torch.equal(logits(frozen, "a"), expected[1])


@pytest.mark.parametrize("settings", [{}, {"transform": "ties"}])
def test_task_vectors_in_bfloat16_take_half_of_the_memory(bert, tmp_path, settings):
    """They are those of float32, rounded once; so are they when the adapter is loaded."""
    full, half = (
        get_peft_model(load(bert[0]), TintConfig(experts=bert[1], task_vectors_dtype=dtype, **settings)).eval()
        for dtype in (None, "bfloat16")
    )
    half.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(bert[0]), tmp_path).eval()
    if settings:  # made of the rounded ones, which ties may trim otherwise
        full = half
    for model in (half, loaded):
        stacks = [dict(m.named_buffers()) for m in (full, model)]
        names = [name for name in stacks[1] if name.endswith(".dense")]
        assert names and all(stacks[1][name].dtype == torch.bfloat16 for name in names)
        assert all(torch.equal(stacks[0][name].bfloat16(), stacks[1][name]) for name in names)
        with torch.no_grad():
            torch.testing.assert_close(logits(model, "b"), logits(full, "b"), rtol=0, atol=2e-3)
    with pytest.raises(ValueError, match="`task_vectors_dtype` is 'float16'; it must be one of None, 'bfloat16'"):
        TintConfig(experts=bert[1], task_vectors_dtype="float16")


def test_registration_is_idempotent_and_complete():
    import importlib

    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    importlib.reload(peft_tint)
    assert PeftType.TINT is PeftType("TINT") is PeftType["TINT"] and PeftType.TINT in list(PeftType)
    assert pickle.loads(pickle.dumps(PeftType.TINT)) is PeftType.TINT
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.TINT] is TintConfig


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["query", "value"]},
        {"exclude_modules": ["word_embeddings"]},
        {"modules_to_save": ["pooler"]},
    ],
)
def test_expert_is_the_expert_whatever_is_merged(bert, settings):
    base, experts = bert
    model = get_peft_model(load(base), TintConfig(experts=experts, **settings)).eval()
    perturb(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for task, folder in experts.items():
        with model.expert(task):
            torch.testing.assert_close(model(**IDS).logits, load(folder)(**IDS).logits, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_expert_contexts_do_not_nest_or_mix(model):
    with model.expert("a"):
        for use in (lambda: model.set_task("b"), lambda: model.expert("b").__enter__()):
            with pytest.raises(ValueError, match="leave"):
                use()
    with model.disable_adapter(), pytest.raises(ValueError, match="disabled"):
        model.expert("a").__enter__()


def test_labels_follow_the_adapter(model, bert):
    experts = {task: bert[1][task] for task in ("b", "score")}
    model.add_adapter("second", TintConfig(experts=experts, task_type="SEQ_CLS"))
    assert model.config.num_labels == 2
    model.set_adapter("second")
    assert model.tasks == ["b", "score"] and model.config.num_labels == 5 == model(**IDS).logits.shape[1]
    model.set_task("score")
    model.set_adapter("default")
    assert model.task == "a" and model.config.num_labels == 2 == model(**IDS).logits.shape[1]
    with model.disable_adapter():
        assert model.config.id2label[0] == "LABEL_0"
    assert model.config.id2label[0] == "a-0"
    with pytest.raises(ValueError, match="2 adapters"):
        model.merge_backbone()


def test_second_adapter_equals_the_same_alone(model, bert):
    """Its task vectors are of the base, through the first adapter's wrappers."""
    experts = {task: bert[1][task] for task in ("b", "score")}
    config = {"experts": experts, "coefficient_init": 0.7, "task_type": "SEQ_CLS"}
    alone = get_peft_model(load(bert[0]), TintConfig(**config)).eval()
    perturb(model)
    first = logits(model, "score")
    model.add_adapter("second", TintConfig(**config))
    assert torch.equal(logits(model, "score"), first)
    model.set_adapter("second")
    torch.testing.assert_close(logits(model, "score"), logits(alone, "score"), rtol=1e-5, atol=1e-6)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.add_adapter("third", TintConfig(**config))


def test_after_merge_backbone_there_is_no_base(model):
    model.merge_backbone()
    for use in (model.unload, lambda: model.disable_adapter().__enter__()):
        with pytest.raises(ValueError, match="merge_backbone"):
            use()


def test_merge_backbone_of_a_broken_model_changes_nothing(model):
    layers = model.base_model._merged_layers()
    layers[5].tint_coefficients["default"].data[0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_backbone()
    assert model.base_model._merged_layers() == layers


@pytest.mark.parametrize("init", [0, 1, {"a": 1, "score": 0, "b": 0.5}])
def test_coefficient_init_may_be_an_integer(bert, init):
    model = get_peft_model(load(bert[0]), TintConfig(experts=bert[1], coefficient_init=init))
    wanted = list(init.values()) if isinstance(init, dict) else [init] * 3
    assert model.coefficients().values[:, 0].tolist() == wanted


@pytest.mark.parametrize("name", ["plain_transformer", "bert_mlm"])
@pytest.mark.filterwarnings("ignore:.*has neither a head")
@torch.no_grad()
def test_copy_pickle_and_unload_of_root_and_tied_parameters(name):
    architecture = ARCHITECTURES[name]
    base = architecture.build()
    expected = output(architecture.build(), architecture.inputs)
    model = peft_tint.from_experts(base, make_experts(base, ["a", "b"])).eval()
    merged = output(model, architecture.inputs)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(again, architecture.inputs), merged)
        again.set_coefficients(0.0)
        assert torch.equal(output(again, architecture.inputs), expected)
    assert torch.equal(output(model, architecture.inputs), merged)
    model.merge_adapter()
    torch.testing.assert_close(output(model, architecture.inputs), merged, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    plain = model.unload()
    assert torch.equal(output(plain, architecture.inputs), expected)
    assert plain.state_dict().keys() == architecture.build().state_dict().keys()


def test_auto_tint_layer_is_the_block_in_which_the_experts_disagree_most(tmp_path):
    base = ARCHITECTURES["bert"].build()
    experts = make_experts(base, {"a": 2, "b": 3, "c": 2}, scale=0.01)
    common = torch.randn(16, 16)
    for expert, own in zip(experts.values(), torch.randn(3, 16, 16), strict=True):
        expert.bert.encoder.layer[0].attention.self.query.weight.data += common  # far from the base, together
        expert.bert.encoder.layer[1].attention.self.query.weight.data += 0.3 * own  # apart
    for task, expert in experts.items():
        expert.save_pretrained(tmp_path / task)
    config = TintConfig(experts={task: str(tmp_path / task) for task in experts}, tint_layer="auto")
    model = get_peft_model(copy.deepcopy(base), config)
    assert config.tint_layer == ["bert.encoder.layer.1", "classifier"]
    model.save_pretrained(tmp_path / "tint")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "tint")
    for task in experts:
        assert torch.equal(logits(again.eval(), task), logits(model.eval(), task))
    with pytest.raises(ValueError, match="compares experts, and there is one"):
        peft_tint.from_experts(copy.deepcopy(base), {"a": experts["a"]}, tint_layer="auto")
    net = ARCHITECTURES["conv_net"].build()
    with pytest.raises(ValueError, match="among numbered blocks, and ConvNet has none"):
        peft_tint.from_experts(net, make_experts(net, ["a", "b"]), tint_layer="auto")


def test_tint_layer_at_the_input():
    for name, layer in {
        "vit": "patch_embeddings.projection",
        "dinov2": "patch_embeddings",
        "bert": "embeddings",
    }.items():
        architecture = ARCHITECTURES[name]
        base = architecture.build()
        experts = make_experts(base, {"a": 2, "b": 3})
        settings = {"coefficient_init": {"a": 0.0, "b": 1.0}, "tint_layer": layer}
        model = peft_tint.from_experts(base, experts, **settings).eval()
        model.set_task("b")
        torch.testing.assert_close(
            output(model, architecture.inputs), output(experts["b"], architecture.inputs), rtol=1e-5, atol=1e-5
        )


def test_fingerprint_is_of_one_expert(bert):
    """It tells experts apart that changed other tensors by as much, and does not change with the other experts."""
    base = load(bert[0])
    experts = {task: copy.deepcopy(base) for task in ("q", "k", "both")}
    for task, expert in experts.items():
        attention = expert.bert.encoder.layer[0].attention.self
        for name in ("query", "key"):
            if task in (name[0], "both"):
                getattr(attention, name).weight.data += 0.1
    model = peft_tint.from_experts(copy.deepcopy(base), experts)
    prints = [model.expert_fingerprint(task) for task in experts]
    assert len(set(prints)) == 3
    alone = peft_tint.from_experts(copy.deepcopy(base), {"q": experts["q"], "both": experts["both"]})
    other = {**experts, "k": experts["both"]}
    assert peft_tint.from_experts(copy.deepcopy(base), other).expert_fingerprint("q") == prints[0]
    assert alone.expert_fingerprint("q") != alone.expert_fingerprint("both")
