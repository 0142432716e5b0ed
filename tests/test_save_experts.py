"""`save_experts="dts"`: adapters that have their experts in them, against what is decoded from their files by hand."""

import copy
import json
import re
import shutil

import pytest
import torch
from datasets import Dataset
from models import ARCHITECTURES, IDS, make_experts, output, without_sum
from peft import (
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from test_lora_experts import make_adapter
from test_tint_model import LAYERS, load, logits, perturb
from versions import needs_own_adapter_calls

import peft_tint
from peft_tint import TintConfig, TintTrainer, TintTrainingArguments, merge_task_vectors
from peft_tint._structure import find_head, is_under, plain_modules
from peft_tint.dts import decode
from peft_tint.tint.merged_layer import MergedLayer

# PEFT, about what it does when the active adapter is deleted
pytestmark = pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")
DTS = {"save_experts": "dts", "save_experts_kwargs": {"rank_ratio": 0.3}}  # 1% of a tiny model is nothing
SIGNS = {"save_experts": "dts", "save_experts_kwargs": {"codec": "bitdelta"}}
FILE = "adapter_model.safetensors"
EXPERT_KEY = re.compile(r"base_model\.model\.tint_experts\.([\w-]+)\.(codes|whole)\.(.*)")


def read_experts(folder):
    """{task: ({tensor: decoded task vector}, {tensor: whole tensor})} of a file, and all its other tensors."""
    experts, others = {}, {}
    for key, tensor in load_file(folder / FILE).items():
        if found := EXPERT_KEY.fullmatch(key):
            task, kind, name = found.groups()
            if kind == "codes":
                (tensor,) = decode({name: tensor}).values()
                tensor = tensor if isinstance(tensor, torch.Tensor) else tensor.dense()
            experts.setdefault(task, ({}, {}))[kind == "whole"][name] = tensor
        else:
            others[key] = tensor
    return experts, others


def plain_sum(base, like, changes, per_task):
    """A copy of `like` whose parameters outside of `per_task` are base + the sum of changes, without any adapter."""
    result, ours = copy.deepcopy(like), dict(base.named_parameters(remove_duplicate=False))
    for name, parameter in result.named_parameters():
        if not is_under(name, per_task):
            names = [other for other, tensor in ours.items() if tensor is ours[name]]
            found = [change[other] for change in changes for other in names if other in change]
            parameter.data = ours[name].detach() + sum(found)
    return result


def equal_in_bytes(first, second):
    return (first / FILE).read_bytes() == (second / FILE).read_bytes()


def close(result, expected):
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def of_architecture(architecture, tasks=("b", "a")):
    """A base and experts whose changes the codec "bitdelta" has without a loss: one size, any signs."""
    base = architecture.build()
    named = dict(zip(tasks, architecture.classes, strict=False)) if architecture.has_head else tasks
    experts = make_experts(base, named, scale=0.0)
    per_task = find_head(base, dict(plain_modules(base)))
    for expert in experts.values():
        for name, parameter in expert.named_parameters():
            noise = torch.randn(parameter.shape)
            parameter.data += 0.05 * (noise if is_under(name, per_task) else noise.sign())
    return base, experts, per_task


# ---- what is loaded --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_without_loss_of_the_codec_all_is_as_before(architecture, tmp_path):
    """The merged model, the experts, coefficients and trained copies; no expert is at hand."""
    base, experts, _ = of_architecture(architecture)
    head = None if architecture.has_head else []
    model = peft_tint.from_experts(copy.deepcopy(base), experts, tint_layer=head, **SIGNS).eval()
    perturb(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert again.tasks == model.tasks == ["b", "a"]
    ours, theirs = (get_peft_model_state_dict(m, save_embedding_layers=False) for m in (model, again))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    for task, expert in experts.items():
        model.set_task(task)
        again.set_task(task)
        close(output(again, architecture.inputs), output(model, architecture.inputs))
        with again.expert(task):
            close(output(again, architecture.inputs), output(expert, architecture.inputs))
        assert again.base_model.task_labels(task) == model.base_model.task_labels(task)
    again.save_pretrained(tmp_path / "again")
    assert equal_in_bytes(tmp_path, tmp_path / "again")
    merged = again.merge_and_unload(task="a").state_dict()
    assert merged.keys() == experts["a"].state_dict().keys()


LOW_RANK = ["bert", "vit", "gpt2", "t5", "llama_tied", "plain_transformer", "holders", "recurrent", "swin", "conv_net"]
OURS, PAPERS = {"rank_ratio": 0.3}, {"codec": "paper", "rank_ratio": 0.3}


@pytest.mark.parametrize("name, codec", [*((name, OURS) for name in LOW_RANK), ("vit", PAPERS)])
@torch.no_grad()
def test_loaded_weights_are_sums_of_what_the_file_has(name, codec, tmp_path):
    architecture = ARCHITECTURES[name]
    base, experts, per_task = of_architecture(architecture)
    head = None if architecture.has_head else []
    settings = {"tint_layer": head, "save_experts": "dts", "save_experts_kwargs": codec}
    model = peft_tint.from_experts(copy.deepcopy(base), experts, **settings)
    model.set_coefficients(torch.rand(model.coefficients().values.shape))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    values, tasks, units = again.coefficients()
    assert torch.equal(values, model.coefficients().values)
    saved, _ = read_experts(tmp_path)
    changes = []
    for task, coefficients in zip(tasks, values, strict=True):
        codes, whole = saved[task]
        changes.append({unit: value * codes[unit] for unit, value in zip(units, coefficients, strict=True)})
        of_expert = experts[task].state_dict()
        assert all(torch.equal(tensor, of_expert[tensor_name]) for tensor_name, tensor in whole.items())
    for task, expert in experts.items():
        again.set_task(task)
        merged = plain_sum(base, expert, changes, per_task)
        close(output(again, architecture.inputs), output(merged, architecture.inputs))
        with again.expert(task):
            result = output(again, architecture.inputs)
        close(result, output(plain_sum(base, expert, [saved[task][0]], per_task), architecture.inputs))
        assert not torch.allclose(result, output(expert, architecture.inputs))  # it is compressed


def test_loaded_task_vectors_stay_low_rank(bert, tmp_path):
    get_peft_model(load(bert[0]), TintConfig(experts=bert[1], **DTS)).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(bert[0]), tmp_path)
    layers = {n: m for n, m in again.named_modules() if isinstance(m, MergedLayer)}
    for name, layer in layers.items():
        for leaf, vectors in layer.tint_task_vectors["default"].items():
            is_matrix = getattr(layer.base_layer, leaf).ndim == 2 and "token_type" not in name  # which has two rows
            assert (vectors.dense is None) == is_matrix and (vectors.a is not None) == is_matrix


@torch.no_grad()
def test_a_larger_budget_is_nearer_to_the_exact_model(tmp_path):
    architecture = ARCHITECTURES["bert"]
    base = architecture.build()
    experts = make_experts(base, {"a": 2, "b": 5}, scale=0.02)
    errors = {}
    for ratio in (0.1, 1.0):
        settings = {"save_experts": "dts", "save_experts_kwargs": {"rank_ratio": ratio}}
        model = peft_tint.from_experts(copy.deepcopy(base), experts, **settings).eval()
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        errors[ratio] = max(
            float((logits(again, task) - logits(model, task)).norm() / logits(model, task).norm()) for task in experts
        )
    assert errors[1.0] < 0.05 and errors[1.0] < 0.5 * errors[0.1]


def test_the_experts_of_the_saved_model_stay_exact(bert, tmp_path):
    exact = get_peft_model(load(bert[0]), TintConfig(experts=bert[1])).eval()
    model = get_peft_model(load(bert[0]), TintConfig(experts=bert[1], **DTS)).eval()
    for _ in range(2):
        for task in model.tasks:
            assert torch.equal(logits(model, task), logits(exact, task))
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_tint_layers_of_any_kind(tmp_path, layer):
    """They are whole in the file, of each expert and as trained."""
    base, experts, _ = of_architecture(ARCHITECTURES["bert"])
    model = peft_tint.from_experts(copy.deepcopy(base), experts, tint_layer=layer, **SIGNS).eval()
    perturb(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    for task, expert in experts.items():
        close(logits(again, task), logits(model, task))
        with again.expert(task), torch.no_grad():
            close(output(again, IDS), output(expert, IDS))


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["query"]}, {"exclude_modules": ["word_embeddings"]}, {"modules_to_save": ["pooler"]}],
    ids=str,
)
def test_parameters_that_are_no_target_are_the_experts_too(tmp_path, settings):
    base, experts, per_task = of_architecture(ARCHITECTURES["bert"])
    model = peft_tint.from_experts(copy.deepcopy(base), experts, **settings, **DTS).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert again.coefficients().units == model.coefficients().units
    saved, _ = read_experts(tmp_path)
    for task, expert in experts.items():
        assert len(saved[task][0]) == 39
        with again.expert(task), torch.no_grad():
            close(output(again, IDS), output(plain_sum(base, expert, [saved[task][0]], per_task), IDS))


def test_lora_experts(tmp_path):
    """Compressed as any others; what they have not changed takes no bytes."""
    base = ARCHITECTURES["bert"].build(num_labels=3)
    lora = LoraConfig(r=2, target_modules=["query", "value"], task_type=TaskType.SEQ_CLS)
    experts = {task: make_adapter(base, lora, seed) for seed, task in enumerate(("b", "a"))}
    model = peft_tint.from_experts(copy.deepcopy(base), experts, **DTS).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    saved, _ = read_experts(tmp_path)
    assert again.coefficients().units == model.coefficients().units
    for task, expert in experts.items():
        assert len(saved[task][0]) == 4 and all("query" in name or "value" in name for name in saved[task][0])
        expected = plain_sum(base, expert.merge_and_unload(), [saved[task][0]], ["classifier"])
        with again.expert(task), torch.no_grad():
            close(output(again, IDS), output(expected, IDS))


@torch.no_grad()
def test_a_transform_is_applied_again_to_the_experts_task_vectors(tmp_path):
    base, experts, per_task = of_architecture(ARCHITECTURES["bert"], ("c", "a", "b"))
    settings = {"transform": "ties", "transform_kwargs": {"density": 0.3}, "granularity": "model"}
    model = peft_tint.from_experts(copy.deepcopy(base), experts, **settings, **DTS, coefficient_init=0.7).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    saved, _ = read_experts(tmp_path)
    sums = merge_task_vectors({task: codes for task, (codes, _) in saved.items()}, "ties", density=0.3, aggregate="sum")
    changes = [{name: 0.7 * tensor for name, tensor in sums.items()}]
    for task, expert in experts.items():
        norm = "bert.embeddings.LayerNorm.bias"  # vectors have 8 bits an entry
        close(saved[task][0][norm], expert.state_dict()[norm] - base.state_dict()[norm])
        close(logits(again, task), output(plain_sum(base, expert, changes, per_task), IDS))
        with again.expert(task):
            close(output(again, IDS), output(plain_sum(base, expert, [saved[task][0]], per_task), IDS))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_coefficients_that_started_from_a_merge_are_those_that_were_saved(bert, tmp_path, low_cpu_mem_usage):
    config = TintConfig(experts=bert[1], coefficient_init="ties", **DTS)
    model = get_peft_model(load(bert[0]), config)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(bert[0]), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(again.coefficients().values, model.coefficients().values)
    other = PeftModel.from_pretrained(load(bert[0]), tmp_path).eval()
    for task in model.tasks:
        assert torch.equal(logits(again, task), logits(other, task))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_of_the_base(tmp_path, dtype):
    base, experts, _ = of_architecture(ARCHITECTURES["bert"])
    model = peft_tint.from_experts(copy.deepcopy(base).to(dtype), experts, **SIGNS).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base).to(dtype), tmp_path).eval()
    for task in model.tasks:
        ours, theirs = logits(model, task), logits(again, task)
        assert theirs.dtype == dtype
        tolerance = 0.1 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(theirs, ours, rtol=0, atol=tolerance * float(ours.abs().max()))
    assert {b.dtype for n, b in again.named_buffers() if "task_vectors" in n and b.is_floating_point()} == {dtype}


def test_an_expert_equal_to_the_base_takes_no_codes(tmp_path):
    base, experts, _ = of_architecture(ARCHITECTURES["bert"])
    experts["b"].bert.load_state_dict(base.bert.state_dict())
    model = peft_tint.from_experts(copy.deepcopy(base), experts, **SIGNS).eval()
    model.save_pretrained(tmp_path)
    saved, _ = read_experts(tmp_path)
    assert not saved["b"][0] and len(saved["a"][0]) == 39
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    with again.expert("b"), torch.no_grad():
        close(output(again, IDS), output(experts["b"], IDS))


# ---- ways to save and to load ----------------------------------------------------------------------------------------


@pytest.fixture
def copied(bert, tmp_path):
    """The experts of `bert` in folders that a test may delete."""
    shutil.copytree(bert[1]["a"].rpartition("/")[0], tmp_path / "experts")
    return {task: str(tmp_path / "experts" / task) for task in bert[1]}


@pytest.mark.parametrize("how", ["PeftModel", "Auto", "config", "load_adapter", "subfolder", "hub"])
def test_loading_without_the_experts(bert, copied, tmp_path, how):
    config = TintConfig(experts=copied, task_type="SEQ_CLS", **DTS)
    model = get_peft_model(load(bert[0]), config).eval()
    perturb(model)
    model.save_pretrained(tmp_path / "tint")
    expected = PeftModel.from_pretrained(load(bert[0]), tmp_path / "tint").eval()
    shutil.rmtree(tmp_path / "experts")
    folder = tmp_path / "tint"
    if how == "PeftModel":
        again = PeftModel.from_pretrained(load(bert[0]), folder)
    elif how == "Auto":
        again = AutoPeftModelForSequenceClassification.from_pretrained(folder)
    elif how == "config":
        config = TintConfig.from_pretrained(folder)
        for _ in range(2):  # which leaves the configuration as it is
            again = PeftModel.from_pretrained(load(bert[0]), folder, config=config)
    elif how == "load_adapter":
        again = get_peft_model(load(bert[0]), TintConfig(experts={"b": bert[1]["b"]}, task_type="SEQ_CLS"))
        again.load_adapter(folder, "second")
        again.set_adapter("second")
    elif how == "subfolder":
        again = PeftModel.from_pretrained(load(bert[0]), str(tmp_path), subfolder="tint")
    else:
        repository = tmp_path / "cache" / "models--me--tint"
        shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "v1").write_text("0" * 40)
        again = PeftModel.from_pretrained(load(bert[0]), "me/tint", revision="v1", cache_dir=str(tmp_path / "cache"))
    assert again.tasks == ["a", "score", "b"] and model.coefficients().values.equal(again.coefficients().values)
    for task in again.tasks:
        assert torch.equal(logits(again.eval(), task), logits(expected, task))
        assert again.config.id2label == {i: f"{task}-{i}" for i in range(len(again.config.id2label))}


def test_no_folder_of_an_expert_is_in_the_adapter(bert, copied, tmp_path):
    model = get_peft_model(load(bert[0]), TintConfig(experts={**copied, "b": {"id": copied["b"]}}, **DTS))
    model.save_pretrained(tmp_path / "tint")
    for file in (tmp_path / "tint").iterdir():
        assert b"experts/" not in file.read_bytes().replace(b"tint_experts", b""), file
    settings = json.loads((tmp_path / "tint" / "adapter_config.json").read_text())
    assert settings["experts"] == dict.fromkeys(copied)
    assert model.peft_config["default"].experts["a"] == copied["a"]  # which it still loads from
    recorded = {"a": "me/a", "b": {"id": "me/b", "revision": "x"}, "c": copied["a"]}
    assert TintConfig(experts=recorded, **DTS).to_dict()["experts"] == {**recorded, "c": None}
    assert TintConfig(experts=recorded).to_dict()["experts"] == recorded


def test_hub_ids_are_for_the_record_only(bert, tmp_path):
    get_peft_model(load(bert[0]), TintConfig(experts=bert[1], **DTS)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "experts": {task: f"me/{task}" for task in bert[1]}}))
    again = PeftModel.from_pretrained(load(bert[0]), tmp_path)
    assert again.peft_config["default"].to_dict()["experts"] == {"a": "me/a", "score": "me/score", "b": "me/b"}


def test_saved_before_and_after_training(bert, tmp_path):
    """The experts are packed once; training goes on from the loaded adapter."""
    ids = torch.randint(2, 64, (32, 6)).tolist()
    data = {task: Dataset.from_dict({"input_ids": ids}) for task in bert[1]}
    settings = TintTrainingArguments(output_dir=str(tmp_path / "out"), max_steps=3, disable_tqdm=True)
    model = get_peft_model(load(bert[0]), TintConfig(experts=bert[1], **DTS)).eval()
    model.save_pretrained(tmp_path / "before")
    for folder in ("first", "second"):
        trainer = TintTrainer(model, settings, data)
        trainer.train()
        trainer.save_model(tmp_path / folder)
        again = PeftModel.from_pretrained(load(bert[0]), tmp_path / folder, is_trainable=True).eval()
        assert torch.equal(again.coefficients().values, model.coefficients().values)
        model = again
    files = [load_file(tmp_path / folder / FILE) for folder in ("before", "first", "second")]
    for key, tensor in files[0].items():
        same = [torch.equal(tensor, other[key]) for other in files[1:]]
        assert same == ([True, True] if EXPERT_KEY.fullmatch(key) else [False, False]), key


def test_several_adapters(bert, tmp_path):
    configs = {
        "default": TintConfig(experts={t: bert[1][t] for t in ("b", "a")}, **DTS),
        "second": TintConfig(experts={t: bert[1][t] for t in ("score", "a")}, tint_layer="layer.1", **DTS),
        "third": TintConfig(experts={"b": bert[1]["b"]}),
        "a": TintConfig(experts={"a": bert[1]["a"]}, **DTS),  # named as a task of others
    }
    model = get_peft_model(load(bert[0]), configs["default"]).eval()
    for name in ("second", "third", "a"):
        model.add_adapter(name, configs[name])
    model.save_pretrained(tmp_path)
    folders = {name: tmp_path if name == "default" else tmp_path / name for name in configs}
    again = PeftModel.from_pretrained(load(bert[0]), folders["second"], "second").eval()
    for name in ("third", "default", "a"):
        again.load_adapter(folders[name], name)
    for name in configs:
        alone = PeftModel.from_pretrained(load(bert[0]), folders[name]).eval()
        again.set_adapter(name)
        assert again.tasks == alone.tasks
        for task in again.tasks:
            torch.testing.assert_close(logits(again, task), logits(alone, task), rtol=1e-5, atol=1e-5)
    again.delete_adapter("third")
    again.save_pretrained(tmp_path / "again")
    for name in ("second", "a"):
        assert equal_in_bytes(folders[name], tmp_path / "again" / name)
    assert equal_in_bytes(tmp_path, tmp_path / "again")


@pytest.mark.parametrize("name", ["a", "query"])  # a task's name, and a module's
def test_an_adapter_of_any_name(bert, tmp_path, name):
    model = get_peft_model(load(bert[0]), TintConfig(experts=bert[1], **DTS), adapter_name=name)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(bert[0]), tmp_path / name)
    again.save_pretrained(tmp_path / "again")
    assert equal_in_bytes(tmp_path / name, tmp_path / "again")


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_copies_and_low_cpu_mem_usage(bert, tmp_path, low_cpu_mem_usage):
    get_peft_model(load(bert[0]), TintConfig(experts=bert[1], **DTS)).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(bert[0]), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    other = copy.deepcopy(again)
    assert not any(tensor.is_meta for tensor in (*again.parameters(), *again.buffers()))
    other.save_pretrained(tmp_path / "again")
    assert equal_in_bytes(tmp_path, tmp_path / "again")


def test_a_saved_adapter_becomes_self_contained(bert, tmp_path):
    """By a configuration that says so; to say so afterwards is too late."""
    model = get_peft_model(load(bert[0]), TintConfig(experts=bert[1])).eval()
    perturb(model)
    model.save_pretrained(tmp_path / "reference")
    model.peft_config["default"].save_experts = "dts"
    with pytest.raises(
        ValueError, match=r"`save_experts` became 'dts' when .*`PeftModel.from_pretrained\(base, folder, "
    ):
        model.save_pretrained(tmp_path / "late")
    config = TintConfig.from_pretrained(tmp_path / "reference")
    config.save_experts, config.save_experts_kwargs = "dts", {"rank_ratio": 0.3}
    PeftModel.from_pretrained(load(bert[0]), tmp_path / "reference", config=config).save_pretrained(tmp_path / "dts")
    again = PeftModel.from_pretrained(load(bert[0]), tmp_path / "dts")
    assert torch.equal(again.coefficients().values, model.coefficients().values)


def test_hot_swap_takes_tints_of_the_same_experts_only(bert, tmp_path):
    model = get_peft_model(load(bert[0]), TintConfig(experts=bert[1], **DTS)).eval()
    model.save_pretrained(tmp_path / "first")
    perturb(model)
    model.save_pretrained(tmp_path / "second")
    again = PeftModel.from_pretrained(load(bert[0]), tmp_path / "first").eval()
    peft_tint.hotswap_adapter(again, str(tmp_path / "second"))
    peft_tint.hotswap_adapter(model, str(tmp_path / "first"))
    wanted = PeftModel.from_pretrained(load(bert[0]), tmp_path / "second").eval()
    assert torch.equal(logits(again, "b"), logits(wanted, "b"))
    experts = {task: load(folder) for task, folder in bert[1].items()}
    experts["b"].bert.pooler.dense.weight.data *= -1
    peft_tint.from_experts(load(bert[0]), experts, **DTS).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other experts than the adapter 'default': '.*tint_experts.b.*Load it with"):
        peft_tint.hotswap_adapter(again, str(tmp_path / "other"))
    get_peft_model(load(bert[0]), TintConfig(experts=bert[1])).save_pretrained(tmp_path / "reference")
    with pytest.raises(ValueError, match="has save_experts='reference'"):
        peft_tint.hotswap_adapter(again, str(tmp_path / "reference"))
    assert torch.equal(logits(again, "b"), logits(wanted, "b"))


@needs_own_adapter_calls
def test_transformers_own_calls(bert, tmp_path):
    """It saves such adapters, and loads them too late: after the model is made."""
    model = load(bert[0])
    model.add_adapter(TintConfig(experts=bert[1], **DTS))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(bert[0]), tmp_path).eval()
    expected = get_peft_model(load(bert[0]), TintConfig(experts=bert[1], **DTS))
    assert torch.equal(again.coefficients().values, expected.coefficients().values)
    assert again.peft_config["default"].packed_experts.keys() == expected.peft_config["default"].packed_experts.keys()
    remedy = r"are in the file of its weights.*Load the adapter by `PeftModel.from_pretrained\(base, folder\)`"
    plain = load(bert[0])
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    with pytest.raises(ValueError, match=remedy):
        plain.load_adapter(str(tmp_path))
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())
    with pytest.raises(ValueError, match=remedy):
        get_peft_model(load(bert[0]), PeftConfig.from_pretrained(tmp_path))


def test_injected_into_a_plain_model(bert, tmp_path):
    get_peft_model(load(bert[0]), TintConfig(experts=bert[1], **DTS)).save_pretrained(tmp_path)
    model = inject_adapter_in_model(TintConfig.from_pretrained(tmp_path), load(bert[0]))
    weights = {name.removeprefix("base_model.model."): tensor for name, tensor in load_file(tmp_path / FILE).items()}
    assert get_peft_model_state_dict(model).keys() == weights.keys()
    trained = {name: tensor + 1 for name, tensor in weights.items() if "tint_experts." not in name}
    assert not set_peft_model_state_dict(model, {**weights, **trained}).unexpected_keys
    for name, tensor in get_peft_model_state_dict(model).items():
        assert torch.equal(tensor, trained.get(name, weights[name]))


def test_size_is_within_the_budget(tmp_path):
    wide = {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 2000}
    base = ARCHITECTURES["bert"].build(**wide)
    parameters = sum(parameter.numel() for parameter in base.parameters())
    experts = make_experts(base, ["a", "b"])
    model = peft_tint.from_experts(base, experts, save_experts="dts", save_experts_kwargs={"budget": 0.03})
    model.save_pretrained(tmp_path)
    size, tensors = (tmp_path / FILE).stat().st_size, load_file(tmp_path / FILE)
    rest = {key: tensor for key, tensor in tensors.items() if ".codes." not in key}
    save_file(rest, tmp_path / "rest.safetensors")
    size -= (tmp_path / "rest.safetensors").stat().st_size
    assert 0.9 * 0.03 < size / len(experts) / (4 * parameters) <= 0.03


def test_what_cannot_be_packed_is_told_before_training(bert):
    with pytest.raises(ValueError, match=r"`budget` is 0.01 of .* it must be at least 0\.\d+"):
        get_peft_model(load(bert[0]), TintConfig(experts=bert[1], save_experts="dts"))


# ---- damage ----------------------------------------------------------------------------------------------------------

QUERY = "b.codes.bert.encoder.layer.0.attention.self.query.weight"
OTHER = "b.codes.bert.encoder.layer.0.output.dense.weight"
HEAD = "b.whole.classifier.weight"
DAMAGES = {
    "truncated": (QUERY, lambda t: t[:-5].clone(), "Expert 'b': .*query.weight' cannot be decoded.*Download or save"),
    "flipped": (QUERY, lambda t: t ^ 1, "Expert 'b': .*query.weight' cannot be decoded: .*checksum"),
    "of another type": (QUERY, lambda t: t.float(), "Expert 'b': .*query.weight' .*instead of one axis of uint8"),
    "missing": (QUERY, None, "saved expert 'b' lacks 1 tensors, such as 'bert.*query.weight'.*Download or save it"),
    "another tensor's": (QUERY, OTHER, r"Expert 'b': .*query.weight' has shape \(16, 32\).*Use the base model that"),
    "a head missing": (HEAD, None, "saved expert 'b' lacks 1 tensors, such as 'classifier.weight'"),
    "a head of other axes": (HEAD, lambda t: t[0].clone(), "Expert 'b': 'classifier.weight' has shape"),
    "a head with NaN": (HEAD, lambda t: t * torch.nan, "Expert 'b': 'classifier.weight' .*NaN"),
}


@pytest.fixture(scope="module")
def sound(bert, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    get_peft_model(load(bert[0]), TintConfig(experts=bert[1], **DTS)).save_pretrained(folder)
    return folder


@pytest.fixture
def saved(sound, tmp_path):
    """The folder of an adapter that a test may damage, and its tensors."""
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    return tmp_path, load_file(tmp_path / FILE)


def assert_refused(base, folder, match):
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        PeftModel.from_pretrained(base, folder)
    after = base.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_experts_are_refused(bert, saved, damage):
    (part, change, match), (folder, tensors) = DAMAGES[damage], saved
    prefix = "base_model.model.tint_experts."
    tensor = tensors.pop(prefix + part)
    if change is not None:
        tensors[prefix + part] = tensors[prefix + change].clone() if isinstance(change, str) else change(tensor)
    save_file(tensors, folder / FILE)
    without_sum(folder)
    assert_refused(load(bert[0]), folder, match)


@pytest.mark.parametrize("kind", ["one task too few", "one too many", "a tensor too many", "none at all"])
def test_other_experts_than_the_configuration_says_are_refused(bert, saved, kind):
    folder, tensors = saved
    of_b = {key: tensor for key, tensor in tensors.items() if ".tint_experts.b." in key}
    if kind == "one task too few":
        tensors, match = {k: t for k, t in tensors.items() if k not in of_b}, r"saved expert 'b' lacks 41 tensors"
    elif kind == "one too many":
        tensors |= {key.replace(".b.", ".z.", 1): tensor.clone() for key, tensor in of_b.items()}
        match = r"saved expert 'z' has 41 tensors too many"
    elif kind == "a tensor too many":
        key = "base_model.model.tint_experts." + QUERY
        tensors[key.replace("layer.0", "layer.7")] = tensors[key].clone()
        match = r"saved expert 'b' has 1 tensors too many, such as 'codes.*layer.7"
    else:
        tensors, match = {k: t for k, t in tensors.items() if ".tint_experts." not in k}, "saved expert 'a' lacks 41"
    save_file(tensors, folder / FILE)
    without_sum(folder)
    assert_refused(load(bert[0]), folder, match)


@pytest.mark.parametrize("field", ["labels", "unchanged"])
def test_a_configuration_of_other_tasks_is_refused(bert, saved, field):
    file = saved[0] / "adapter_config.json"
    settings = json.loads(file.read_text())
    settings[field].pop("b")
    file.write_text(json.dumps(settings))
    assert_refused(load(bert[0]), saved[0], rf"`{field}` names the tasks \['a', 'score'\], `experts` names .*damaged")


def test_another_base_model_is_refused(saved):
    assert_refused(
        ARCHITECTURES["bert"].build(intermediate_size=40),
        saved[0],
        r"Expert 'a': .* has shape .*Use the base model that the adapter was made for",
    )
    assert_refused(
        ARCHITECTURES["bert"].build(num_hidden_layers=3), saved[0], r"saved expert 'a' lacks .*use the base model that"
    )


BAD = {
    "choice": ("zip", {}, "`save_experts` is 'zip'; it must be one of 'reference', 'dts'"),
    "not dts": ("reference", {"budget": 0.1}, "`save_experts_kwargs` is {'budget': 0.1}; set `save_experts='dts'`"),
    "name": ("dts", {"size": 1}, "`save_experts_kwargs` is {'size': 1}: .*'size'. It may have `budget`"),
    "codec": ("dts", {"codec": "zip"}, "`codec` is 'zip'; it must be one of"),
    "budget": ("dts", {"budget": 2}, "`budget` is 2; it must be a number above 0"),
    "ratio": ("dts", {"codec": "paper"}, "has no budget; give a `rank_ratio`"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings(case):
    choice, kwargs, match = BAD[case]
    with pytest.raises(ValueError, match=match):
        TintConfig(experts={"a": "me/a"}, save_experts=choice, save_experts_kwargs=kwargs)
