"""All that runs on an accelerator, against the same on the CPU.

    pytest -n 0 tests/test_accelerators.py

took 3:10 minutes on one H200, and is skipped without an accelerator (CUDA or XPU). `PEFT_TINT_TEST_DEVICE` names
another device: with "cpu", on a machine without an accelerator, the tests test themselves.
"""

import copy
import math
import os

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from models import ARCHITECTURES, IDS, make_experts, output
from peft import LoraConfig, PeftModel, get_peft_model
from test_lora_experts import make_adapter
from test_resuming import Stopped, assert_same, make_trainer, save_bert
from test_trainer import CLASSES, arguments, load, make_data, state
from test_training_elsewhere import outputs_and_gradients

import peft_tint
from peft_tint import MERGING_METHODS, OBJECTIVES, DtsConfig, TintConfig, TintTrainer
from peft_tint.tint import merge_ahead
from peft_tint.tint.merged_layer import MergedLayer


def find_device():
    if name := os.environ.get("PEFT_TINT_TEST_DEVICE"):
        return torch.device(name, None if name == "cpu" else 0)
    return next((torch.device(kind, 0) for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()), None)


DEVICE = find_device()
if DEVICE is None:
    pytest.skip("there is no accelerator (CUDA or XPU)", allow_module_level=True)
DTS = {"rank_ratio": 0.3}  # tiny models have no bytes to spare for a budget of 1%
LORA = LoraConfig(
    r=4, lora_alpha=6, target_modules=["query", "value", "word_embeddings"], modules_to_save=["classifier"]
)
PRECISIONS = [
    pytest.param(kind, marks=pytest.mark.skipif(kind == "fp16" and DEVICE.type == "cpu", reason="no fp16 on a CPU"))
    for kind in ("float32", "bf16", "fp16")
]
PRECISION_NAMES = {"float32": "float32", "bf16": "bfloat16 autocast", "fp16": "float16 autocast"}


@pytest.fixture(autouse=True)
def _trains_there():
    assert PartialState().device.type == DEVICE.type


@pytest.fixture(scope="module")
def data(bert):
    return make_data(bert)


@pytest.fixture(scope="module")
def lora(bert, tmp_path_factory):
    """{task: folder} of LoRA adapters on the base."""
    folder = tmp_path_factory.mktemp("lora")
    base = load(bert[0])
    for seed, task in enumerate(("a", "b")):
        make_adapter(base, LORA, seed).save_pretrained(folder / task)
    return {task: str(folder / task) for task in ("a", "b")}


def to_device(inputs):
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


def on_device(model):
    """A copy there."""
    return copy.deepcopy(model).to(DEVICE)


def close(result, expected, tolerance=1e-4):
    """By what the expected numbers are large, wherever the two are."""
    torch.testing.assert_close(result.cpu(), expected.cpu(), rtol=0, atol=tolerance * float(expected.abs().max()))


@torch.no_grad()
def logits(model, **kwargs):
    device = next(model.parameters()).device
    return model(**{name: tensor.to(device) for name, tensor in IDS.items()}, **kwargs).logits


def logits_of_tasks(model):
    found = {}
    for task in model.tasks:
        model.set_task(task)
        found[task] = logits(model)
    return found


def all_on_device(model):
    return {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {DEVICE.type}


def make_model(base, experts, **config):
    """On the device of the base, which it changes; `experts` are folders."""
    return get_peft_model(base, TintConfig(experts=experts, **config)).eval()


def settings_of(precision):
    return {"bf16": precision == "bf16"} if precision != "fp16" else {"fp16": True}


# ---- forward and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moved", ["base", "model"])
@pytest.mark.parametrize("kind", ["full", "lora", "both"])
def test_outputs_and_gradients_are_those_of_the_cpu(bert, lora, kind, moved):
    """Whether the base was on the device before it got its experts, or the whole was moved there."""
    experts = {"full": bert[1], "lora": lora, "both": {"a": lora["a"], "b": bert[1]["b"]}}[kind]
    plain = make_model(load(bert[0]), experts)
    model = make_model(load(bert[0]).to(DEVICE), experts) if moved == "base" else on_device(plain)
    assert all_on_device(model)
    expected, wanted = outputs_and_gradients(plain, plain, IDS)
    found, gradients = outputs_and_gradients(model, model, to_device(IDS))
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs)
    assert gradients.keys() == wanted.keys()
    scale = max(gradient.abs().max() for gradient in wanted.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.cpu(), wanted[name], rtol=1e-3, atol=1e-5 * scale, msg=name)


@pytest.mark.skipif(DEVICE.type == "cpu" or merge_ahead.triton is None, reason="needs Triton on an accelerator")
@pytest.mark.parametrize("kind", ["full", "lora", "both"])
def test_weights_are_merged_ahead_of_a_forward(bert, lora, kind):
    experts = {"full": bert[1], "lora": lora, "both": {"a": lora["a"], "b": bert[1]["b"]}}[kind]
    model = make_model(load(bert[0]).to(DEVICE), experts)
    loss = model(**to_device(IDS)).logits.square().sum()
    layers = [module for module in model.modules() if isinstance(module, MergedLayer) and module.tint_task_vectors]
    assert layers and all(layer._ahead is not None for layer in layers)
    loss.backward()
    assert all(layer._ahead is None for layer in layers)


@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")  # they are merged
@pytest.mark.parametrize("name", ["vit", "gpt2", "plain_transformer", "holders", "recurrent", "t5_classifier"])
def test_other_models_give_the_outputs_of_the_cpu(name):
    """Convolutions and recurrent layers, which PyTorch computes in TF32, and parameters that the model itself holds."""
    architecture = ARCHITECTURES[name]
    base = architecture.build()
    tasks = dict(zip("ab", architecture.classes, strict=False)) if architecture.has_head else ["a", "b"]
    experts, config = make_experts(base, tasks), {"tint_layer": None if architecture.has_head else []}
    plain = peft_tint.from_experts(copy.deepcopy(base), experts, **config).eval()
    model = peft_tint.from_experts(on_device(base), experts, **config).eval()
    with torch.no_grad():
        expected = output(plain, architecture.inputs)
        close(output(model, to_device(architecture.inputs)), expected, 1e-2)
        merged = model.merge_and_unload()
        assert all_on_device(merged)
        close(output(merged, to_device(architecture.inputs)), expected, 1e-2)


@pytest.mark.parametrize("config", [{}, {"target_modules": ["query"]}, {"transform": "ties"}], ids=str)
def test_expert_is_the_expert(bert, lora, config):
    """Also its parameters that are no target, and from before a transform."""
    model = make_model(load(bert[0]).to(DEVICE), bert[1], **config)
    for task, folder in bert[1].items():
        with model.expert(task):
            close(logits(model), logits(load(folder)))
    model = make_model(load(bert[0]).to(DEVICE), lora)
    for task, folder in lora.items():
        with model.expert(task):
            close(logits(model), logits(PeftModel.from_pretrained(load(bert[0]), folder, torch_device="cpu").eval()))


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("experts_there", [True, False])
@pytest.mark.parametrize("base_there", [True, False])
def test_experts_in_memory_may_be_on_another_device_than_the_base(bert, kind, experts_there, base_there):
    base = load(bert[0])
    if kind == "full":
        experts = {task: load(bert[1][task]) for task in ("a", "b")}
    else:
        experts = {task: make_adapter(base, LORA, seed) for seed, task in enumerate("ab")}
    plain = peft_tint.from_experts(copy.deepcopy(base), experts).eval()
    placed = {task: on_device(expert) if experts_there else expert for task, expert in experts.items()}
    model = peft_tint.from_experts(on_device(base) if base_there else base, placed).eval()
    for task, expected in logits_of_tasks(plain).items():
        model.set_task(task)
        close(logits(model), expected)
        with model.expert(task):
            close(logits(model), logits(experts[task]))
        assert model.expert_fingerprint(task) == plain.expert_fingerprint(task)  # what caches of its rows go by


def test_mixed_batches_are_the_rows_of_each_task(bert):
    model = make_model(load(bert[0]).to(DEVICE), bert[1])
    own = logits_of_tasks(model)
    for names in (["b", "a"], ["score", "score"]):
        mixed = logits(model, task_names=names)
        assert mixed.device.type == DEVICE.type and mixed.shape[1] == max(CLASSES[name] for name in names)
        for row, name in enumerate(names):
            close(mixed[row, : CLASSES[name]], own[name][row])
            assert (mixed[row, CLASSES[name] :] == torch.finfo(mixed.dtype).min).all()


# ---- training --------------------------------------------------------------------------------------------------------


def assert_trained(trainer):
    """It has lowered its loss and left all weights finite, on the device."""
    history = [logs for logs in trainer.log_history if "loss" in logs]
    assert history[-1]["loss"] < history[0]["loss"]
    assert all(math.isfinite(value) for logs in history for value in logs.values() if isinstance(value, float))
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    assert all_on_device(trainer.model)
    assert {parameter.dtype for parameter in state(trainer.model).values()} == {torch.float32}


@pytest.mark.parametrize("update", ["sequential", "joint"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_lowers_its_loss(bert, data, tmp_path, objective, update):
    model = make_model(load(bert[0]), bert[1], coefficient_init=0.1)
    settings = arguments(tmp_path, max_steps=30, update=update, logging_steps=5)
    trainer = TintTrainer(model, settings, data, objective=objective)
    trainer.train()
    assert trainer.precision == "float32"
    assert_trained(trainer)


@pytest.mark.parametrize("update", ["sequential", "joint"])
def test_steps_are_those_of_the_cpu(bert, data, tmp_path, update):
    """Written out there with plain autograd and Adam; in full batches, which have no order."""
    model = make_model(load(bert[0]), bert[1], coefficient_bounds=None)
    settings = {"max_steps": 2, "update": update, "per_device_train_batch_size": 48, "adam_epsilon": 1e-3}
    trainer = TintTrainer(model, arguments(tmp_path, **settings), {"b": data["b"]})
    trainer.train()
    plain = make_model(load(bert[0]), bert[1], coefficient_bounds=None)
    optimizer = torch.optim.Adam([p for p in plain.parameters() if p.requires_grad], 3e-3, eps=1e-3)
    plain.set_task("b")
    ids = torch.tensor(data["b"]["input_ids"])
    with torch.no_grad():
        expert_logits = load(bert[1]["b"])(ids).logits
    for _ in range(2):
        OBJECTIVES["soft_pseudo_label"](plain(input_ids=ids).logits, expert_logits).backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = state(model)
    for name, parameter in state(plain).items():
        torch.testing.assert_close(trained[name].cpu(), parameter, rtol=1e-4, atol=1e-5, msg=name)


def test_it_fits_heads_evaluates_and_takes_the_precision_of_the_device(bert, data, tmp_path, has_bf16):
    has_bf16(True)
    model = make_model(load(bert[0]), bert[1])
    settings = arguments(tmp_path, max_steps=10, head_steps=5, lr_scheduler_type="cosine", logging_steps=1)
    trainer = TintTrainer(model, settings, data, make_data(bert, seed=9))
    before = trainer.evaluate()["mean"]["agreement"]
    trainer.train()
    after = trainer.evaluate()
    assert trainer.precision == "bfloat16 autocast" and "head_loss" in trainer.log_history[0]
    assert after["mean"]["agreement"] > before
    for task in CLASSES:  # the labels are those of the experts in float32
        assert after[task]["expert_accuracy"] > 0.9
        assert abs(after[task]["accuracy"] - after[task]["agreement"]) < 0.1


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions(bert, lora, data, tmp_path, has_bf16, precision, kind):
    """Weights that train stay in float32, and autocast ends with the training."""
    has_bf16(True)
    experts = bert[1] if kind == "full" else lora
    for update in ("sequential", "joint"):
        model = make_model(load(bert[0]), experts, coefficient_init=0.1)
        settings = arguments(tmp_path, max_steps=30, logging_steps=5, update=update, **settings_of(precision))
        trainer = TintTrainer(model, settings, {task: data[task] for task in experts})
        dtypes = set()
        hook = model.base_model.head_layers[0].register_forward_hook(lambda m, args, out, s=dtypes: s.add(out.dtype))
        trainer.train()
        hook.remove()
        name = PRECISION_NAMES[precision]
        assert trainer.precision == name and trainer.log_history[-1]["precision"] == name
        assert dtypes == {{"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
        assert (trainer.accelerator.scaler is not None) == (precision == "fp16")
        assert_trained(trainer)
        assert logits(model).dtype == torch.float32


@pytest.mark.parametrize("precision", PRECISIONS)
def test_trainers_of_one_process_may_differ_in_precision(bert, data, tmp_path, has_bf16, precision):
    """Accelerate knows one precision a process."""
    has_bf16(True)
    model = make_model(load(bert[0]), bert[1])
    kinds = ["bf16", "float32", precision, "float32"]
    trainers = [TintTrainer(model, arguments(tmp_path, max_steps=2, **settings_of(kind)), data) for kind in kinds]
    assert [trainer.precision for trainer in trainers] == [PRECISION_NAMES[kind] for kind in kinds]
    for trainer, kind in zip(trainers, kinds, strict=True):
        trainer.train()
        assert trainer.log_history[-1]["precision"] == PRECISION_NAMES[kind]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_stream_returns_the_logits_before_its_update(bert, tmp_path, has_bf16, precision):
    """Of batches on the CPU."""
    has_bf16(True)
    model = make_model(load(bert[0]), bert[1])
    trainer = TintTrainer(model, arguments(tmp_path, **settings_of(precision)))
    trainer.model.set_task("b")
    expected = logits(model)
    found = trainer.step("b", IDS)
    assert found.device.type == DEVICE.type and found.dtype == torch.float32
    close(found, expected, {"float32": 1e-6, "bf16": 0.05, "fp16": 0.01}[precision])
    before = state(model)
    for _ in range(20):  # a scaler takes some to find its scale
        trainer.step("b", IDS)
    assert any(not torch.equal(before[name], value) for name, value in state(model).items())


def test_the_guard_brings_back_the_start(bert, data, tmp_path):
    """Of a training that is to get worse."""
    worse = lambda logits, expert_logits, mask: (logits.softmax(-1) * expert_logits.softmax(-1)).sum()  # noqa: E731
    model = make_model(load(bert[0]), bert[1])
    before = state(model.to(DEVICE))
    settings = arguments(tmp_path, learning_rate=1.0, collapse_guard=0.1, logging_steps=2, max_steps=20)
    trainer = TintTrainer(model, settings, data, objective=worse)
    trainer.train()
    assert trainer.log_history[-1]["best_step"] == 0 and trainer.progress.collapsed
    assert any(name.startswith("collapse_") for name in trainer.log_history[-1])
    assert all(torch.equal(before[name], value) for name, value in state(model).items())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("update", ["sequential", "joint"])
def test_resuming_is_bitwise(tmp_path, has_bf16, precision, update):
    """Weights, log and files."""
    has_bf16(True)
    bert = save_bert(tmp_path)
    settings = {"update": update, "head_steps": 2, "collapse_guard": 0.9, **settings_of(precision)}
    if update == "joint":
        settings |= {"gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine"}
    straight = make_trainer(bert, tmp_path / "straight", **settings)
    straight.train()
    stopped = make_trainer(bert, tmp_path / "stopped", stop_at=6 if update == "joint" else 11, **settings)
    with pytest.raises(Stopped):
        stopped.train()
    resumed = make_trainer(bert, tmp_path / "stopped", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, straight)


# ---- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", MERGING_METHODS)
def test_merging_is_that_of_the_cpu(bert, method):
    """Of models there, and of experts on the CPU into a base there."""
    base, per_task = load(bert[0]), MERGING_METHODS[method].per_task
    experts = make_experts(base, {"a": 2, "b": 5} if per_task else ["a", "b"])
    expected = peft_tint.merge(base, experts, method)
    placed = {task: on_device(expert) for task, expert in experts.items()}
    for given in (placed, experts):
        merged = peft_tint.merge(on_device(base), given, method)
        for task in experts if per_task else [None]:
            ours, theirs = (models[task] if per_task else models for models in (merged, expected))
            assert all_on_device(ours)
            theirs = theirs.state_dict()
            for name, tensor in ours.state_dict().items():
                torch.testing.assert_close(tensor.cpu(), theirs[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("start", ["average", "ties", "tsv"])
def test_starts_and_transforms_are_those_of_the_cpu(bert, start):
    for config in ({"coefficient_init": start}, {"transform": "tsv", "coefficient_init": start}):
        config |= {"tint_layer": "auto", "coefficient_bounds": None}
        plain, model = (make_model(base, bert[1], **config) for base in (load(bert[0]), load(bert[0]).to(DEVICE)))
        ours, theirs = model.coefficients(), plain.coefficients()
        assert ours.units == theirs.units
        torch.testing.assert_close(ours.values, theirs.values, rtol=1e-3, atol=1e-4)
        for task, expected in logits_of_tasks(plain).items():
            model.set_task(task)
            close(logits(model), expected, 1e-3)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_merged_models_and_backbones(bert, lora, tmp_path, kind):
    experts = bert[1] if kind == "full" else lora
    model = make_model(load(bert[0]).to(DEVICE), experts)
    expected = logits_of_tasks(model)
    model.save_merged(tmp_path / "merged", task="b")
    for there in (True, False):
        base = load(tmp_path / "merged")
        close(logits(base), expected["b"])
        again = PeftModel.from_pretrained(
            base.to(DEVICE if there else "cpu"), tmp_path / "merged", subfolder="tint"
        ).eval()
        for task, of_task in logits_of_tasks(again).items():
            close(of_task, expected[task])
    model.merge_adapter()
    close(logits(model), expected[model.task])
    model.unmerge_adapter()
    baked = copy.deepcopy(model)
    baked.merge_backbone()
    for task in expected:
        baked.set_task(task)
        close(logits(baked), expected[task])
        merged = copy.deepcopy(model).merge_and_unload(task=task, safe_merge=True)
        assert all_on_device(merged) and merged.config.num_labels == expected[task].shape[1]
        close(logits(merged), expected[task])


def test_a_difference_as_lora_is_that_of_the_cpu(bert):
    base = load(bert[0])
    tuned = make_experts(base, ["a"])["a"]
    adapter, errors = peft_tint.extract_lora(on_device(base), on_device(tuned), 4)
    expected, expected_errors = peft_tint.extract_lora(base, tuned, 4)
    assert all_on_device(adapter) and errors == pytest.approx(expected_errors, rel=1e-3)
    close(logits(adapter.eval()), logits(expected.eval()))


# ---- saving and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("kind", ["reference", "dts"])
def test_a_saved_adapter_loads_wherever_the_base_is(bert, tmp_path, kind, there, low_cpu_mem_usage):
    """PEFT reads the file onto the accelerator in any case."""
    config = {"save_experts": kind, **({"save_experts_kwargs": DTS} if kind == "dts" else {})}
    model = make_model(load(bert[0]).to(DEVICE), bert[1], **config)
    model.set_coefficients(torch.rand(model.coefficients().values.shape))
    with torch.no_grad():
        for parameter in model.base_model.tint_layers[0].modules_to_save.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "saved")
    base = load(bert[0]).to(DEVICE if there else "cpu")
    again = PeftModel.from_pretrained(base, tmp_path / "saved", low_cpu_mem_usage=low_cpu_mem_usage).eval()
    kinds = {tensor.device.type for tensor in (*again.parameters(), *again.buffers())}
    assert kinds == {DEVICE.type if there else "cpu"}
    if kind == "reference":  # the file has the experts compressed, and the model has them whole
        for task, expected in logits_of_tasks(model).items():
            again.set_task(task)
            close(logits(again), expected)
    again.save_pretrained(tmp_path / "again")
    file = "adapter_model.safetensors"
    assert (tmp_path / "saved" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()

    again.load_adapter(str(tmp_path / "saved"), "other")
    again.load_adapter(str(tmp_path / "saved"), "default")  # into the one that is there
    again.set_task("b")
    expected = logits(again)
    again.set_adapter("other")
    again.set_task("b")
    close(logits(again), expected, 1e-6)
    again.set_coefficients(0.0)
    peft_tint.hotswap_adapter(again, str(tmp_path / "saved"), "other")
    close(logits(again), expected, 1e-6)


# ---- DTS -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(bert, tmp_path):
    """DTS adapters `b` and `score`, made on the CPU, loaded onto a base on the device; and both models."""
    plain = get_peft_model(load(bert[0]), DtsConfig(expert=bert[1]["b"], **DTS), "b").eval()
    plain.add_adapter("score", DtsConfig(expert=bert[1]["score"], exclude_modules=["query"], **DTS))
    plain.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(load(bert[0]).to(DEVICE), tmp_path / "b", "b").eval()
    model.load_adapter(str(tmp_path / "score"), "score")
    assert all_on_device(model)
    return model, plain


def test_dts_forward_mixed_and_merged(two, bert):
    model, plain = two
    expected = {"__base__": logits(load(bert[0]))}
    for name in ("score", "b"):
        for either in two:
            either.set_adapter(name)
        expected[name] = logits(plain)
        close(logits(model), expected[name])
    for names in (["b", "score"], ["__base__", "b"], ["score", "score"]):
        mixed = logits(model, adapter_names=names)
        for row, name in enumerate(names):
            close(mixed[row, : expected[name].shape[1]], expected[name][row])
    with model.disable_adapter():
        close(logits(model), expected["__base__"])
    before = logits(model)
    model.merge_adapter()
    close(logits(model), expected["b"])
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    merged = model.merge_and_unload(safe_merge=True)
    assert all_on_device(merged)
    close(logits(merged), expected["b"])


@pytest.mark.parametrize("codec", [DTS, {"codec": "paper", **DTS}, {"codec": "bitdelta"}], ids=str)
def test_dts_compresses_there(bert, tmp_path, codec):
    """Codes may differ from the CPU's where an entry was next to the boundary; what they stand for is alike."""
    model = get_peft_model(load(bert[0]).to(DEVICE), DtsConfig(expert=bert[1]["b"], **codec)).eval()
    plain = get_peft_model(load(bert[0]), DtsConfig(expert=bert[1]["b"], **codec)).eval()
    assert all_on_device(model)
    close(logits(model), logits(plain), 0.05)
    model.save_pretrained(tmp_path)
    for there in (True, False):
        base = load(bert[0]).to(DEVICE if there else "cpu")
        close(logits(PeftModel.from_pretrained(base, tmp_path).eval()), logits(model), 1e-6 if there else 1e-4)


def test_dts_for_a_task_without_an_expert(two, bert):
    model, plain = two
    for either in two:
        either.add_weighted_adapter(["b", "score"], [0.3, 0.6], "sum", head="b")
        either.set_adapter("sum")
    close(logits(model), logits(plain))
    vectors = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.1]])
    for place in ("cpu", DEVICE):  # of the encoder
        found = peft_tint.dts.description_similarity(
            lambda texts, at=place: vectors.to(at), ["letters", "noise"], "new"
        )
        assert found == [1.0, 0.0]
    unseen = load(bert[1]["b"])
    ours, theirs = (peft_tint.dts.weight_similarity(either, ["b", "score"], unseen) for either in two)
    assert ours == pytest.approx(theirs, rel=1e-3)


# ---- torch.compile ---------------------------------------------------------------------------------------------------


def compiled_like_eager(model, **kwargs):
    """As coefficients and tasks change."""
    torch.compiler.reset()
    compiled = torch.compile(model, **kwargs)
    inputs = to_device({**IDS, "attention_mask": torch.ones_like(IDS["input_ids"])})
    for coefficient in (0.3, 0.6):
        model.set_coefficients(coefficient)
        expected, wanted = outputs_and_gradients(model, model, inputs)
        found, gradients = outputs_and_gradients(model, compiled, inputs)
        for ours, theirs in zip(found, expected, strict=True):
            close(ours, theirs)
        scale = max(gradient.abs().max() for gradient in wanted.values())
        for name, gradient in gradients.items():
            say = lambda problem, name=name: f"{name}: {problem}"  # noqa: E731
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-4 * float(scale), msg=say)
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")  # dynamo and inductor about themselves
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_compiled_whole(kind):
    base = ARCHITECTURES["bert"].build(num_hidden_layers=1)
    if kind == "full":
        experts = make_experts(base, ["a", "b"])
    else:
        experts = {task: make_adapter(base, LORA, seed) for seed, task in enumerate("ab")}
    model = peft_tint.from_experts(base.to(DEVICE), experts, tint_layer="classifier").eval()
    backend = "inductor" if kind == "full" else "aot_eager"  # the first takes the longest of all here
    compiled_like_eager(model, fullgraph=True, backend=backend)


# ---- language models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_a_language_model_in_bfloat16_trains_and_generates(name, tmp_path, has_bf16):
    has_bf16(True)
    base = ARCHITECTURES[name].build()
    experts = {task: expert.bfloat16() for task, expert in make_experts(base, ["a", "b"]).items()}
    model = peft_tint.from_experts(base.bfloat16().to(DEVICE), experts, tint_layer=[], coefficient_init=0.1).eval()
    texts = torch.randint(4, 64, (12, 6), generator=torch.Generator().manual_seed(0)).tolist()
    data = {task: Dataset.from_dict({"input_ids": texts}) for task in ("a", "b")}
    settings = arguments(tmp_path, max_steps=20, logging_steps=5, learning_rate=3e-2, per_device_train_batch_size=12)
    trainer = TintTrainer(model, settings, data)
    trainer.train()
    assert trainer.precision == "bfloat16"
    assert_trained(trainer)
    assert logits(model).dtype == torch.bfloat16

    def generate(model):
        ids = IDS["input_ids"].to(DEVICE)
        mask = torch.ones_like(ids)
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
        return model.generate(input_ids=ids, attention_mask=mask, **options)

    tokens = generate(model)
    assert tokens.shape == (2, IDS["input_ids"].shape[1] + 8)
    model.merge_adapter()
    of_merged = generate(model)
    model.unmerge_adapter()
    merged = copy.deepcopy(model).merge_and_unload()
    assert all_on_device(merged) and {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    assert torch.equal(generate(merged), of_merged)
    # the sum of weights of another order may be rounded otherwise: then another token is as good to the merged model
    with torch.no_grad():
        scores = merged(tokens).logits[:, -9:-1].float()
    scores[..., merged.generation_config.eos_token_id] = -math.inf  # it was to go on
    chosen = scores.gather(-1, tokens[:, -8:, None]).squeeze(-1)
    assert (scores.amax(-1) - chosen <= 0.05 * scores.amax()).all()
