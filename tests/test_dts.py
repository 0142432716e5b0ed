"""The PEFT method DTS: what an adapter computes, its files, and every call by which PEFT handles adapters."""

import copy
import json

import pytest
import torch
from models import ARCHITECTURES, IDS, make_experts, output, without_sum
from peft import (
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification

import peft_tint
from peft_tint import DtsConfig
from peft_tint._structure import find_head, is_under, plain_modules
from peft_tint.dts import disk_bytes

# PEFT, about what it does when the active adapter is deleted
pytestmark = pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")
SMALL = {"rank_ratio": 0.3}  # tiny models have no bytes to spare for a budget of 1%


def load(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


@torch.no_grad()
def logits(model, **kwargs):
    return model(**IDS, **kwargs).logits


def expert_of(architecture, base):
    tasks = {"x": architecture.classes[1]} if architecture.has_head else ["x"]
    return make_experts(base, tasks)["x"]


def close(result, expected):
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def densely(model, base, expert):
    """The base with the decoded codes added to its weights, and the expert's head, made without any adapter."""
    result = copy.deepcopy(expert)
    head = find_head(base, dict(plain_modules(base)))
    decoded = {}
    for key, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items():
        module, kind, leaf = key.removeprefix("base_model.model.").rpartition(".dts_codes.")
        if not kind:
            module, kind, leaf = key.rpartition("dts_codes.")  # of the model's own parameters
        if kind:
            name = ".".join(filter(None, (module.removeprefix("base_model.model.").removeprefix("dts_root"), leaf)))
            (delta,) = peft_tint.dts.decode({key: tensor}).values()
            decoded[name.replace("/", ".").removeprefix(".")] = delta.dense() if hasattr(delta, "dense") else delta
    ours = dict(base.named_parameters(remove_duplicate=False))
    for name, parameter in result.named_parameters():
        if not is_under(name, head):
            names = [other for other, tensor in ours.items() if tensor is ours[name]]
            changes = [decoded[other] for other in names if other in decoded]
            assert len(changes) == 1, name
            parameter.data = ours[name].detach() + changes[0].view(ours[name].shape)
    return result


@torch.no_grad()
def test_output_is_that_of_the_decoded_model(architecture, tmp_path):
    base = architecture.build()
    expert = expert_of(architecture, base)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    expected_base = output(base.requires_grad_(False), architecture.inputs)
    dense_base = copy.deepcopy(base)
    model = peft_tint.compress(base, expert, **SMALL).eval()
    result = output(model, architecture.inputs)
    close(result, output(densely(model, dense_base, expert), architecture.inputs))
    assert not torch.allclose(result, output(expert, architecture.inputs))  # it is compressed

    with model.disable_adapter():
        assert torch.equal(output(model, architecture.inputs), expected_base)
    model.merge_adapter()
    close(output(model, architecture.inputs), result)
    model.unmerge_adapter()
    assert torch.equal(output(model, architecture.inputs), result)

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(architecture.build(), tmp_path).eval()
    assert torch.equal(output(again, architecture.inputs), result)

    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is type(expert) and merged.state_dict().keys() == before.keys()
    close(output(merged, architecture.inputs), result)
    theirs = expert.state_dict()
    for name in find_head(dense_base, dict(plain_modules(dense_base))):
        for leaf, tensor in merged.get_submodule(name).state_dict().items():
            assert torch.equal(tensor, theirs[f"{name}.{leaf}"])
    unloaded = again.unload().state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in unloaded.items())


# ---- several adapters ------------------------------------------------------------------------------------------------


@pytest.fixture
def two(bert):
    """Adapters `b` (5 classes) and `score` (3 classes) on one base, `b` active, and the logits of each."""
    base = load(bert[0])
    model = get_peft_model(base, DtsConfig(expert=bert[1]["b"], **SMALL), "b").eval()
    model.add_adapter("score", DtsConfig(expert=bert[1]["score"], exclude_modules=["query"], **SMALL))
    expected = {}
    for name in ("score", "b"):
        model.set_adapter(name)
        expected[name] = logits(model)
    return model, expected


def test_switching(two, bert):
    model, expected = two
    for name, classes in (("score", 3), ("b", 5), ("score", 3)):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected[name]) and expected[name].shape[-1] == classes
        assert model.config.num_labels == model.base_model.model.num_labels == classes
        assert model.config.id2label == {i: f"{name}-{i}" for i in range(classes)}
        assert not any(parameter.requires_grad for parameter in model.parameters())
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(load(bert[0])))
        assert model.config.num_labels == 2
    assert model.config.num_labels == 3


@pytest.mark.parametrize("order", [("b", "score"), ("score", "b")])
def test_deleting(two, bert, order):
    model, expected = two
    model.set_adapter(order[0])
    model.delete_adapter(order[0])
    assert model.active_adapters == [order[1]]
    assert torch.equal(logits(model), expected[order[1]])
    assert not any(f".{order[0]}." in name for name in model.state_dict())
    model.delete_adapter(order[1])
    with torch.no_grad():
        assert torch.equal(model.base_model(**IDS).logits, logits(load(bert[0])))
    assert model.config.num_labels == 2
    model.add_adapter("new", DtsConfig(expert=bert[1]["b"], **SMALL))
    model.set_adapter("new")
    assert torch.equal(logits(model), expected["b"])


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saving_and_loading_two(two, bert, tmp_path, low_cpu_mem_usage):
    model, expected = two
    model.save_pretrained(tmp_path)
    for name in ("b", "score"):
        settings = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert settings["expert"] is None and settings["unchanged"] == []
    options = {"low_cpu_mem_usage": low_cpu_mem_usage}
    again = PeftModel.from_pretrained(load(bert[0]), tmp_path / "score", "score", **options).eval()
    again.load_adapter(tmp_path / "b", "other", **options)
    for name, loaded in (("b", "other"), ("score", "score"), ("b", "other")):
        again.set_adapter(loaded)
        assert torch.equal(logits(again), expected[name])
        assert again.config.id2label == {i: f"{name}-{i}" for i in range(len(again.config.id2label))}
    again.save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "b", tmp_path / "again" / "other"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_auto_model_and_state_dict(two, bert, tmp_path):
    model, expected = two
    model.save_pretrained(tmp_path, selected_adapters=["b"])
    again = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "b").eval()
    assert torch.equal(logits(again), expected["b"])
    again = get_peft_model(load(bert[0]), PeftConfig.from_pretrained(tmp_path / "b")).eval()
    with pytest.raises(ValueError, match="weights of the adapter 'default' have not all been loaded"):
        logits(again)
    set_peft_model_state_dict(again, get_peft_model_state_dict(model, adapter_name="b"))
    assert torch.equal(logits(again), expected["b"])


def test_copies(two):
    model, expected = two
    assert torch.equal(logits(copy.deepcopy(model)), expected["b"])
    state = model.state_dict()
    other = copy.deepcopy(model)
    other.base_model.model.classifier.dts_head["b"].weight.zero_()
    other.load_state_dict(state)
    assert torch.equal(logits(other), expected["b"])


@pytest.mark.parametrize("name, classes", [("b", 5), ("score", 3)])
def test_merging_a_chosen_one_for_good(two, name, classes, tmp_path):
    model, expected = two
    merged = model.merge_and_unload(adapter_names=[name])
    assert merged.config.num_labels == merged.classifier.out_features == classes
    close(logits(merged), expected[name])
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(merged))
    assert not merged._forward_pre_hooks and not merged._forward_hooks


def test_merge_in_place_and_adding(two, bert):
    model, expected = two
    model.set_adapter("score")
    model.merge_adapter()
    close(logits(model), expected["score"])
    with pytest.raises(ValueError, match=r"call `unmerge_adapter\(\)`"):
        model.add_adapter("more", DtsConfig(expert=bert[1]["a"], **SMALL))
    with pytest.raises(ValueError, match=r"call `unmerge_adapter\(\)`"):
        logits(model, adapter_names=["b", "score"])


def test_broken_weights_are_not_merged_safely(two):
    model, _ = two
    model.base_model.model.bert.encoder.layer[0].attention.self.query.base_layer.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights. The adapter b seems to be broken"):
        model.merge_and_unload(safe_merge=True)


@pytest.mark.parametrize("names", [["b", "score"], ["score", "__base__"], ["b", "b"]])
def test_mixed_batch(two, bert, names):
    model, expected = two
    result = logits(model, adapter_names=names)
    for row, name in enumerate(names):
        alone = logits(load(bert[0]))[row] if name == "__base__" else expected[name][row]
        torch.testing.assert_close(result[row, : len(alone)], alone, rtol=1e-5, atol=1e-5)
        assert (result[row, len(alone) :] == torch.finfo(torch.float32).min).all()
    assert torch.equal(logits(model), expected["b"])
    for bad, message in (
        (["b"], "1 names, and the batch has"),
        (["b", "nope"], "'nope'; the adapters are 'b', 'score'"),
    ):
        with pytest.raises(ValueError, match=message):
            logits(model, adapter_names=bad)
    with pytest.raises(ValueError, match="there is no loss"):
        logits(model, adapter_names=names, labels=torch.tensor([0, 1]))
    assert torch.equal(logits(model), expected["b"])


@pytest.mark.parametrize("name", ["plain_transformer", "llama", "t5", "vit"])
@torch.no_grad()
def test_mixed_batch_of_other_models(name):
    architecture = ARCHITECTURES[name]
    base = architecture.build()
    experts = [expert_of(architecture, base) for _ in range(2)]
    model = peft_tint.compress(base, experts[0], "one", **SMALL).eval()
    peft_tint.compress(model, experts[1], "two", **SMALL)
    rows = []
    for row, adapter in enumerate(["two", "one"]):
        model.set_adapter(adapter)
        rows.append(output(model, architecture.inputs)[row])
    result = output(model, {**architecture.inputs, "adapter_names": ["two", "one"]})
    close(result, torch.stack(rows))


# ---- files -----------------------------------------------------------------------------------------------------------


def test_size_is_within_the_budget(tmp_path):
    base = ARCHITECTURES["bert"].build(hidden_size=128, intermediate_size=512, vocab_size=2000)
    model = peft_tint.compress(base, expert_of(ARCHITECTURES["bert"], base), budget=0.03)
    model.save_pretrained(tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    parameters = sum(
        parameter.numel()
        for parameter in ARCHITECTURES["bert"]
        .build(hidden_size=128, intermediate_size=512, vocab_size=2000)
        .parameters()
    )
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    head = {key: tensor for key, tensor in tensors.items() if "dts_head" in key}
    of_head = sum(tensor.numel() * 4 for tensor in head.values()) + 300
    assert 0.9 * 0.03 < (size - of_head) / (4 * parameters) <= 0.03
    codes = {key: tensor for key, tensor in tensors.items() if "dts_codes" in key}
    assert head and all(tensor.dtype == torch.uint8 for tensor in codes.values())
    assert abs(disk_bytes(codes) - (size - of_head)) < 0.02 * size


def test_budget_that_cannot_be_met(bert):
    with pytest.raises(ValueError, match=r"`budget` is 0.01 of .* it must be at least 0\.\d+"):
        get_peft_model(load(bert[0]), DtsConfig(expert=bert[1]["a"]))


DAMAGES = {
    "truncated": ("query.dts_codes.weight", lambda t: t[:-5], "'bert.encoder.layer.0.*checksum"),
    "flipped": ("query.dts_codes.weight", lambda t: t ^ 1, "'bert.encoder.layer.0.*checksum"),
    "foreign type": ("query.dts_codes.weight", lambda t: t.float(), "instead of one axis of uint8"),
    "head": ("classifier.dts_head.weight", lambda t: t[0].clone(), "'classifier.weight' has shape"),
    "nan": ("classifier.dts_head.weight", lambda t: t * torch.nan, "NaN or Inf"),
    "missing": ("query.dts_codes.weight", None, "lacks 1 tensors, such as 'bert.encoder.layer.0"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused(bert, tmp_path, damage):
    part, change, message = DAMAGES[damage]
    get_peft_model(load(bert[0]), DtsConfig(expert=bert[1]["b"], **SMALL)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = min(key for key in tensors if key.endswith(part))
    tensor = tensors.pop(key)
    if change:
        tensors[key] = change(tensor)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    without_sum(tmp_path)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(load(bert[0]), tmp_path)


def test_files_of_another_model_are_refused(bert, tmp_path):
    get_peft_model(load(bert[0]), DtsConfig(expert=bert[1]["b"], **SMALL)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = min(key for key in tensors if "layer.0" in key)
    more = {**tensors, key.replace("layer.0", "layer.7"): tensors[key].clone()}
    save_file(more, tmp_path / "adapter_model.safetensors")
    without_sum(tmp_path)
    with pytest.raises(ValueError, match="has besides its own"):
        PeftModel.from_pretrained(load(bert[0]), tmp_path)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    other = ARCHITECTURES["bert"].build(intermediate_size=40)
    with pytest.raises(ValueError, match=r"made on a model with other weights \(it names '.*base'\)"):
        PeftModel.from_pretrained(other, tmp_path)
    config = DtsConfig.from_pretrained(tmp_path)
    config.base_samples = None
    with pytest.raises(ValueError, match=r"Adapter 'default'.*has shape .* Use the base model that"):
        PeftModel.from_pretrained(other, tmp_path, config=config)


@pytest.mark.filterwarnings("ignore:The head of expert")
def test_the_wrong_base_is_refused(bert, tmp_path):
    """Such as the pretrained one under an adapter of a merged model, whose path PEFT records."""
    merged = peft_tint.merge(load(bert[0]), bert[1], "average").eval()
    model = peft_tint.compress(merged, load(bert[1]["b"]), **SMALL)
    model.save_pretrained(tmp_path)
    for other in (bert[0], bert[1]["b"]):
        with pytest.raises(ValueError, match="made on a model with other weights"):
            PeftModel.from_pretrained(load(other), tmp_path)
    half = peft_tint.merge(load(bert[0]), bert[1], "average").to(torch.bfloat16)
    PeftModel.from_pretrained(half, tmp_path)


# ---- experts ---------------------------------------------------------------------------------------------------------


def test_an_expert_equal_to_the_base_gives_an_empty_adapter(bert, tmp_path):
    with pytest.warns(UserWarning, match="has the base model's weights, so the adapter adds nothing"):
        model = get_peft_model(load(bert[0]), DtsConfig(expert=bert[0])).eval()
    assert torch.equal(logits(model), logits(load(bert[0])))
    model.save_pretrained(tmp_path)
    assert all("dts_head" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(logits(PeftModel.from_pretrained(load(bert[0]), tmp_path)), logits(model))


def test_frozen_tensors_cost_nothing(bert, tmp_path):
    base, expert = load(bert[0]), load(bert[0])
    expert.bert.encoder.layer[1].output.dense.weight.data += 0.1 * torch.randn(16, 32)
    model = peft_tint.compress(base, expert, target_modules=["dense"], **SMALL).eval()
    model.save_pretrained(tmp_path)
    keys = [key for key in load_file(tmp_path / "adapter_model.safetensors") if "dts_codes" in key]
    assert keys == ["base_model.model.bert.encoder.layer.1.output.dense.dts_codes.weight"]
    assert torch.equal(logits(PeftModel.from_pretrained(load(bert[0]), tmp_path).eval()), logits(model))


def test_state_dicts_and_lora_experts(bert):
    expert = load(bert[1]["b"])
    first = peft_tint.compress(load(bert[0]), expert, **SMALL).eval()
    second = peft_tint.compress(load(bert[0]), expert.state_dict(), **SMALL).eval()
    assert torch.equal(logits(first), logits(second))
    assert second.config.id2label == {i: f"LABEL_{i}" for i in range(5)} and first.config.id2label[0] == "b-0"
    lora, _ = peft_tint.extract_lora(load(bert[0]), expert, rank=4)
    merged = copy.deepcopy(lora).merge_and_unload()
    third = peft_tint.compress(load(bert[0]), lora, **SMALL).eval()
    torch.testing.assert_close(
        logits(third), logits(peft_tint.compress(load(bert[0]), merged, **SMALL).eval()), rtol=1e-3, atol=1e-3
    )


@pytest.mark.filterwarnings("ignore:The head of expert")
@pytest.mark.parametrize("kind", ["average", "tint"])
def test_merged_backbone_as_reference(bert, tmp_path, kind):
    """DTS-D: a merged model, or that of a tint, and one adapter per task are one deployment."""
    if kind == "average":
        backbone = peft_tint.merge(load(bert[0]), bert[1], "average").eval()
    else:
        tint = get_peft_model(load(bert[0]), peft_tint.TintConfig(experts=bert[1], coefficient_init=0.4))
        backbone = tint.merge_and_unload(task="a").eval()
    backbone.save_pretrained(tmp_path / "backbone")
    model = backbone
    for task in ("b", "score"):
        model = peft_tint.compress(model, load(bert[1][task]), task, rank_ratio=1.0)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(tmp_path / "backbone"), tmp_path / "b", "b")
    again.load_adapter(tmp_path / "score", "score")
    for task in ("b", "score"):
        model.eval().set_adapter(task)
        again.eval().set_adapter(task)
        assert torch.equal(logits(again), logits(model))
        expected = logits(load(bert[1][task]))
        assert float((logits(model) - expected).norm() / expected.norm()) < 0.2
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(load(tmp_path / "backbone")))


def test_a_higher_rank_is_nearer_to_the_expert(bert):
    expert = logits(load(bert[1]["b"]))
    errors = [
        float((logits(peft_tint.compress(load(bert[0]), load(bert[1]["b"]), rank_ratio=ratio).eval()) - expert).norm())
        for ratio in (0.1, 1.0)
    ]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("config", [{"codec": "paper", "rank_ratio": 0.5}, {"codec": "bitdelta"}])
def test_other_codecs(bert, tmp_path, config):
    model = get_peft_model(load(bert[0]), DtsConfig(expert=bert[1]["b"], **config)).eval()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load(bert[0]), tmp_path).eval()), logits(model))


BAD = {
    "codec": ({"codec": "zip"}, "`codec` is 'zip'; it must be one of 'semidiscrete'"),
    "budget": ({"budget": 0}, "`budget` is 0; it must be a number above 0"),
    "rank_ratio": ({"rank_ratio": 1.5}, "`rank_ratio` is 1.5; it must be"),
    "no ratio": ({"codec": "paper"}, "has no budget; give a `rank_ratio`"),
    "ratio": ({"codec": "bitdelta", "rank_ratio": 0.1}, "'bitdelta' takes none"),
    "expert": ({"expert": torch.nn.Linear(1, 1)}, r"`expert` is a Linear; .* `peft_tint.compress\(base, expert\)`"),
    "reference": ({"expert": {"name": "x"}}, "a reference has the key 'id'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings(case):
    settings, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        DtsConfig(**settings)


def test_bad_experts(bert):
    with pytest.raises(ValueError, match=r"`DtsConfig.expert` is empty"):
        get_peft_model(load(bert[0]), DtsConfig())
    with pytest.raises(ValueError, match="there is nothing to adapt"):
        get_peft_model(load(bert[0]), DtsConfig(expert=bert[1]["a"], target_modules=["nope"]))
    broken = load(bert[1]["a"])
    broken.bert.pooler.dense.bias.data[0] = torch.nan
    base = load(bert[0])
    with pytest.raises(ValueError, match=r"'bert.pooler.dense.bias' has 1 NaN or Inf"):
        peft_tint.compress(base, broken)
    assert torch.equal(logits(base), logits(load(bert[0])))
    resnet = ARCHITECTURES["resnet"].build()
    expert = expert_of(ARCHITECTURES["resnet"], resnet)
    next(m for m in expert.modules() if isinstance(m, torch.nn.BatchNorm2d)).running_mean += 1
    with pytest.raises(ValueError, match=r"the buffer .* differs from the base"):
        peft_tint.compress(resnet, expert, **SMALL)


def test_references_in_saved_configs(bert):
    for expert, saved in (("me/vit-cars", "me/vit-cars"), (bert[0], None), ("/gone/folder", None), ("./x", None)):
        assert DtsConfig(expert=expert).to_dict()["expert"] == saved
    assert DtsConfig(expert={"id": bert[0]}).to_dict()["expert"] is None
    assert DtsConfig(expert={"id": "me/x", "revision": "y"}).to_dict()["expert"] == {"id": "me/x", "revision": "y"}


def test_all_linear(bert, tmp_path):
    config = DtsConfig(expert=bert[1]["b"], target_modules="all-linear", **SMALL)
    model = get_peft_model(load(bert[0]), config).eval()
    model.save_pretrained(tmp_path)
    keys = [key for key in load_file(tmp_path / "adapter_model.safetensors") if "dts_codes" in key]
    assert len(keys) == 2 * (6 * 2 + 1) and not any("LayerNorm" in key or "embeddings" in key for key in keys)
    assert torch.equal(logits(PeftModel.from_pretrained(load(bert[0]), tmp_path).eval()), logits(model))


def test_labels_can_be_given(bert):
    labels = {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}
    model = peft_tint.compress(load(bert[0]), load(bert[1]["a"]).state_dict(), labels=labels, **SMALL)
    assert model.config.id2label == {0: "no", 1: "yes"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(bert, tmp_path, dtype):
    """The head and the codes are exact; what is decoded has the base's type."""
    expected = logits(peft_tint.compress(load(bert[0]), load(bert[1]["b"]), **SMALL).eval())
    model = peft_tint.compress(load(bert[0]).to(dtype), load(bert[1]["b"]), **SMALL).eval()
    result = logits(model)
    assert result.dtype == dtype and not any(
        b.dtype == torch.float32 for n, b in model.named_buffers() if "decoded" in n
    )
    torch.testing.assert_close(result.float(), expected, rtol=0, atol=0.1 * float(expected.abs().max()))
    model.save_pretrained(tmp_path)
    head = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.classifier.dts_head.weight"]
    assert torch.equal(head, load(bert[1]["b"]).classifier.weight)
    again = PeftModel.from_pretrained(load(bert[0]).to(dtype), tmp_path).eval()
    assert torch.equal(logits(again), result)


def test_several_active_adapters_add_up(two):
    model, _ = two
    model.base_model.set_adapter(["score", "b"])
    result = logits(model)
    model.merge_adapter()
    close(logits(model), result)
    assert result.shape[-1] == 5  # the head of the last


# ---- tasks without an expert -----------------------------------------------------------------------------------------


def check_weighted_sum(architecture, codecs, tmp_path):
    base, weights = architecture.build(), [0.7, -0.45]
    plain = {name: tensor.clone() for name, tensor in base.named_parameters()}
    in_head = find_head(base, dict(plain_modules(base)))
    tasks = dict(zip("xy", architecture.classes, strict=False)) if architecture.has_head else "xy"
    for (name, expert), codec in zip(make_experts(base, tasks).items(), codecs, strict=True):
        base = peft_tint.compress(base, expert, name, **codec)
    model = base.eval()
    model.add_weighted_adapter(["x", "y"], weights, "z", head="y")
    x, y, z = (dict(copy.deepcopy(model).merge_and_unload(adapter_names=[n]).named_parameters()) for n in "xyz")
    for name, weight in plain.items():
        if is_under(name, in_head):
            assert torch.equal(z[name], y[name])
        else:
            expected = weight + weights[0] * (x[name] - weight) + weights[1] * (y[name] - weight)
            torch.testing.assert_close(z[name], expected, rtol=0, atol=2e-6 * float(weight.abs().max()))
    model.set_adapter("z")
    result = output(model, architecture.inputs)
    close(result, output(copy.deepcopy(model).merge_and_unload(), architecture.inputs))
    model.save_pretrained(tmp_path, selected_adapters=["z"])
    again = PeftModel.from_pretrained(architecture.build(), tmp_path / "z").eval()
    assert torch.equal(output(again, architecture.inputs), result)


@torch.no_grad()
def test_weighted_adapter_is_the_sum_of_decoded_task_vectors(architecture, tmp_path):
    check_weighted_sum(architecture, [SMALL, SMALL], tmp_path)


PAPER, BITDELTA = {"codec": "paper", **SMALL}, {"codec": "bitdelta"}


@pytest.mark.parametrize("codecs", [(SMALL, BITDELTA), (PAPER, PAPER), (PAPER, SMALL), (BITDELTA, PAPER)])
@torch.no_grad()
def test_weighted_adapter_of_other_codecs(codecs, tmp_path):
    check_weighted_sum(ARCHITECTURES["vit"], codecs, tmp_path)


def test_weighted_adapter_of_weighted_adapters(two):
    """And of adapters that change different modules; with the base's head it has the base's labels."""
    model, expected = two
    model.add_weighted_adapter(["b", "score"], [0.5, 0.5], "mean", head="__base__")
    model.set_adapter("mean")
    assert model.config.num_labels == 2 and logits(model).shape[-1] == 2
    model.add_weighted_adapter(["mean", "b", "score"], [2.0, 0.0, -1.0], "b_again", head="b")
    model.set_adapter("b_again")
    close(logits(model), expected["b"])
    assert model.config.id2label == {i: f"b-{i}" for i in range(5)}
    model.add_weighted_adapter(["b", "b_again"], [0.25, 0.75], "same_head")
    model.set_adapter("same_head")
    close(logits(model), expected["b"])
    for name in ("mean", "b"):
        model.delete_adapter(name)
    close(logits(model), expected["b"])


def test_sums_hold_equal_parts_once(two):
    model, _ = two
    model.add_weighted_adapter(["b", "score"], [0.5, 0.5], "mean", head="b")
    model.add_weighted_adapter(["mean", "b", "b"], [1.0, 0.25, 0.25], "more", head="b")
    codes = {name: tensor for name, tensor in model.named_buffers() if ".dts_codes." in name}
    for name in codes:
        if ".mean." in name:
            assert len(codes[name]) == len(codes[name.replace(".mean.", ".more.")])


BAD_SUMS = {
    "letters": (("b", [1], "z"), "`adapters` is 'b'; give a list"),
    "huge": ((["b"], [1e39], "z"), "`weights` has 1e[+]39"),
    "no such adapter": ((["b", "c"], [1, 1], "z"), "no adapter 'c'; the adapters are 'b', 'score'"),
    "no such head": ((["b"], [1], "z", "c"), "no adapter 'c'"),
    "taken": ((["b"], [1], "score"), "an adapter 'score' already"),
    "counts": ((["b"], [1, 2], "z"), "1 `adapters` and 2 `weights`"),
    "none": (([], [], "z"), "0 `adapters` and 0 `weights`"),
    "nan": ((["b"], [float("nan")], "z"), "`weights` has nan"),
    "heads": ((["b", "score"], [1, 1], "z"), "'classifier' belongs to the head, in which .*'b' and 'score' differ"),
    "name": ((["b"], [1], "a.b"), "name 'a.b' is taken"),
}


@pytest.mark.parametrize("case", BAD_SUMS)
def test_bad_weighted_adapters(two, case):
    model, expected = two
    arguments, message = BAD_SUMS[case]
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments)
    assert list(model.peft_config) == ["b", "score"] and torch.equal(logits(model), expected["b"])


def test_similarities(bert):
    base = load(bert[0])
    experts = {name: load(bert[1][name]) for name in ("b", "score")}
    model = peft_tint.compress(
        peft_tint.compress(base, experts["b"], "b", rank_ratio=1.0), experts["score"], "score", rank_ratio=1.0
    )
    name = "bert.pooler.dense.weight"
    taus = [(experts[e].get_parameter(name) - load(bert[0]).get_parameter(name)).detach().flatten() for e in experts]
    unseen = load(bert[0])
    unseen.get_parameter(name).data += (0.3 * taus[0] + 0.6 * taus[1]).view(16, 16)
    expected = torch.stack([torch.cosine_similarity(0.3 * taus[0] + 0.6 * taus[1], tau, 0) for tau in taus])
    result = peft_tint.dts.weight_similarity(model, ["b", "score"], unseen)
    torch.testing.assert_close(torch.tensor(result), expected / expected.sum(), rtol=0.05, atol=0)

    vectors = {"digits": [1.0, 0.0], "letters": [0.6, 0.8], "noise": [-1.0, 0.1]}
    result = peft_tint.dts.description_similarity(
        lambda texts: [vectors[t] for t in texts], ["letters", "noise"], "digits"
    )
    assert result == [1.0, 0.0]
    of_tensors = peft_tint.dts.description_similarity(
        lambda texts: torch.tensor([vectors[t] for t in texts]).bfloat16(), ["letters", "noise"], "digits"
    )
    assert of_tensors == [1.0, 0.0]
    with pytest.raises(ValueError, match="similar to none"):
        peft_tint.dts.description_similarity(lambda texts: [vectors[t] for t in texts], ["noise"], "digits")


def test_bad_similarities(two, bert):
    model, _ = two
    similar, describe = peft_tint.dts.weight_similarity, peft_tint.dts.description_similarity
    with pytest.raises(ValueError, match="no adapter 'c'"):
        similar(model, ["b", "c"], load(bert[1]["b"]))
    with pytest.raises(ValueError, match=r"no .bert\.pooler\.dense\.weight. of the base's shape"):
        similar(model, ["b", "score"], {"classifier.weight": torch.zeros(2, 16)})
    model.merge_adapter()
    with pytest.raises(ValueError, match="call `unmerge_adapter"):
        similar(model, ["b", "score"], load(bert[1]["b"]))
    with pytest.raises(ValueError, match="`descriptions` is 'digits'"):
        describe(lambda texts: [[1.0]] * len(texts), "digits", "letters")
    with pytest.raises(ValueError, match=r"the shape \(2, 1, 1\) for 2 texts"):
        describe(lambda texts: [[[1.0]]] * len(texts), ["digits"], "letters")
    with pytest.raises(ValueError, match="similar to none"):
        describe(lambda texts: [[float("nan")]] * len(texts), ["digits"], "letters")


# ---- found in review -------------------------------------------------------------------------------------------------


def test_a_config_can_be_used_again(bert):
    config = DtsConfig(expert=bert[1]["b"], **SMALL)
    model = get_peft_model(load(bert[0]), config, "b")
    config.expert = bert[1]["score"]
    model.add_adapter("score", config)
    for name, classes in (("b", 5), ("score", 3)):
        model.set_adapter(name)
        assert model.config.id2label == {i: f"{name}-{i}" for i in range(classes)}
    other = get_peft_model(load(bert[0]), config, "score")
    assert other.config.id2label == {i: f"score-{i}" for i in range(3)}


def test_unloading_a_merged_model_gives_the_base(two, bert):
    model, _ = two
    model.merge_adapter()
    assert torch.equal(logits(model.unload()), logits(load(bert[0])))


def test_labels_are_the_base_s_while_disabled(two):
    model, _ = two
    with model.disable_adapter():
        model.base_model.set_adapter("score")
        assert model.config.num_labels == 2
    assert model.config.num_labels == 3


def test_other_weights_under_an_adapter_s_name_are_refused(two, bert, tmp_path):
    model, _ = two
    get_peft_model(load(bert[0]), DtsConfig(expert=bert[1]["score"], **SMALL)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'classifier\.(weight|bias)' of shape .* is another task's"):
        model.load_adapter(tmp_path, "b")


@pytest.mark.filterwarnings("ignore:You are trying to modify a model", "ignore:Already found a .peft_config")
def test_peft_models_are_no_base(two, bert):
    model, _ = two
    with pytest.raises(ValueError, match="is a PeftModel with adapters of the type DTS"):
        get_peft_model(model, DtsConfig(expert=bert[1]["b"], **SMALL))


@pytest.mark.parametrize("labels", [["x"], {"id2label": ["n", "y"]}, {"0": "n", "1": "y"}])
def test_bad_labels(labels):
    with pytest.raises(ValueError, match="`labels`"):
        DtsConfig(expert="me/expert", labels=labels)


def test_mixed_generation_of_encoder_decoders_is_refused():
    base = ARCHITECTURES["t5"].build()
    model = base
    for name, expert in make_experts(base, ["x", "y"]).items():
        model = peft_tint.compress(model, expert, name, **SMALL)
    with pytest.raises(ValueError, match="encoder-decoder cannot mix adapters"):
        model.eval().generate(**IDS, adapter_names=["x", "y"], use_cache=False, max_new_tokens=2)
    assert model.generate(**IDS, max_new_tokens=2).shape[0] == 2


@torch.no_grad()
def test_mixed_batches_by_position_and_in_training(two):
    model, _ = two
    expected = logits(model, adapter_names=["b", "score"])
    assert torch.equal(model(IDS["input_ids"], adapter_names=["b", "score"]).logits, expected)
    with pytest.raises(ValueError, match="training mode"):
        model.train()(**IDS, adapter_names=["b", "score"])


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_of_what_an_adapter_adds(dtype, tolerance):
    """Sums of codes over many inputs are beyond float16, and its scales would be zero in it."""
    base, expert = nn.Sequential(nn.Linear(3072, 64, bias=False)), nn.Sequential(nn.Linear(3072, 64, bias=False))
    base[0].weight.zero_()
    expert[0].weight.copy_(1e-6 * (1 + torch.randn(64, 3072)))
    model = peft_tint.compress(base, expert, rank_ratio=0.1).eval()
    x = torch.rand(8, 3072) * 20
    expected = copy.deepcopy(model).merge_and_unload()(x)
    result = model.to(dtype)(x.to(dtype)).float()
    assert float((result - expected).norm() / expected.norm()) < tolerance


@torch.no_grad()
def test_lora_experts_of_a_base_in_half_precision():
    """Their small changes are lost in weights of bfloat16."""
    base = nn.Sequential(nn.Linear(64, 64, bias=False)).to(torch.bfloat16)
    base[0].weight.fill_(1.0)
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["0"]))
    for name, parameter in lora.named_parameters():
        if "lora" in name:
            parameter.copy_(0.02 * torch.randn(parameter.shape))
    change = lora.base_model.model[0].get_delta_weight("default").float()
    model = peft_tint.compress(base, lora, rank_ratio=1.0)
    decoded = model.base_model.model[0].dts_decoded["default"]["weight"].dense_of(0, change.shape)
    assert float((decoded - change).norm() / change.norm()) < 0.05
