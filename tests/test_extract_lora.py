"""A LoRA adapter out of two models: exact at the full rank, optimal below it, every tensor accounted for."""

import copy

import pytest
import torch
from models import ARCHITECTURES, IDS, make_experts, output
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

import peft_tint
from peft_tint import extract_lora

FULL = 1000
# PEFT's own, about a tied weight that it is to save, and of Linear and Conv1D in one model
PEFT_SAYS = (
    "ignore:Model has `tie_word_embeddings=True`",
    "ignore:Input and output embeddings are no longer tied",
    "ignore:Setting `save_embedding_layers` to `True`",
    "ignore:fan_in_fan_out is set to",
)
pytestmark = [pytest.mark.filterwarnings(message) for message in PEFT_SAYS]
OF_THE_MODEL = {
    "clip": "logit_scale",
    "wav2vec2": "layer_weights",
    "plain_transformer": "cls_token.*positions",
    "holders": "prompts.0",
}


def double(inputs):
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


def set_up(architecture, dtype=torch.float64):
    """Base, tuned model (with a head of another size where tasks have their own), and a base with such a head."""
    base = architecture.build().to(dtype)
    if not (architecture.has_head and hasattr(base, "config") and len(set(architecture.classes)) > 1):
        return base, make_experts(base, ["a"])["a"].to(dtype), base
    other = architecture.build(seed=3, num_labels=4).to(dtype)
    fitting = {name: t for name, t in base.state_dict().items() if other.state_dict()[name].shape == t.shape}
    other.load_state_dict(fitting, strict=False)
    return base, make_experts(base, {"a": 4})["a"].to(dtype), other


def naive(change, rank):
    """The optimum's error, of a matrix in float64."""
    s = torch.linalg.svdvals(change.double())
    return (s[rank:].square().sum().sqrt() / s.norm()).item()


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in OF_THE_MODEL])
@torch.no_grad()
def test_full_rank_is_the_tuned_model(name, tmp_path):
    """In float64, where all that is left is an error: as returned, loaded by PEFT, and merged."""
    architecture = ARCHITECTURES[name]
    base, tuned, loads_onto = set_up(architecture)
    before = [copy.deepcopy(model.state_dict()) for model in (base, tuned)]
    inputs = double(architecture.inputs)
    expected = output(tuned, inputs)
    close = {"rtol": 1e-5, "atol": 1e-6}  # some norms and rotary embeddings are in float32 in any model
    model, errors = extract_lora(base, tuned, FULL)
    torch.testing.assert_close(output(model, inputs), expected, **close)
    assert type(model) is PeftModel and max(errors.values()) < 1e-12
    layers = {name for name, module in model.base_model.model.named_modules() if isinstance(module, LoraLayer)}
    assert layers == errors.keys()
    for one, tensors in zip((base, tuned), before, strict=True):
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in one.state_dict().items())

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(loads_onto), tmp_path).eval()
    torch.testing.assert_close(output(loaded, inputs), expected, **close)
    for merged in (model.merge_and_unload(), loaded.merge_and_unload()):
        torch.testing.assert_close(output(merged, inputs), expected, **close)
        assert merged.state_dict().keys() == tuned.state_dict().keys()
        for name, tensor in tuned.state_dict().items():
            torch.testing.assert_close(merged.state_dict()[name], tensor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["bert", "gpt2", "gpt2_classifier", "llama", "llama_tied", "vit", "conv_net"])
@torch.no_grad()
def test_full_rank_in_float32(name):
    architecture = ARCHITECTURES[name]
    base = architecture.build()
    tuned = make_experts(base, ["a"])["a"]
    model, errors = extract_lora(base, tuned, FULL)
    torch.testing.assert_close(
        output(model, architecture.inputs), output(tuned, architecture.inputs), rtol=1e-5, atol=1e-5
    )
    assert max(errors.values()) < 1e-5


@pytest.mark.parametrize("rank", [1, 3, 10])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "conv_net", "patchtst"])
@torch.no_grad()
def test_errors_are_the_optimum(name, rank):
    base = ARCHITECTURES[name].build()
    tuned = make_experts(base, ["a"])["a"]
    model, errors = extract_lora(base, tuned, rank)
    adapted = {name: module for name, module in model.base_model.model.named_modules() if isinstance(module, LoraLayer)}
    for name, module in adapted.items():
        change = tuned.get_submodule(name).weight.double() - base.get_submodule(name).weight.double()
        left = change - copy.deepcopy(module).double().get_delta_weight("default")
        assert errors[name] == pytest.approx((left.norm() / change.norm()).item(), abs=1e-5)
        assert errors[name] == pytest.approx(naive(change.flatten(1), rank), abs=1e-5)
        assert module.r["default"] == min(rank, *change.flatten(1).shape) and module.scaling["default"] == 1
    assert adapted.keys() == errors.keys()


def with_lora(base, rank, seed):
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=rank, target_modules=["query", "value"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape)
    return model.eval()


@torch.no_grad()
def test_merged_lora_experts_have_the_sum_of_their_ranks(tmp_path):
    base = ARCHITECTURES["bert"].build()
    merged = peft_tint.merge(base, {"a": with_lora(base, 2, 1), "b": with_lora(base, 3, 2)}, "task_arithmetic", 0.4)
    model, errors = extract_lora(base, merged, 5)
    torch.testing.assert_close(output(model, IDS), output(merged, IDS), rtol=1e-5, atol=1e-5)
    assert len(errors) == 4 and max(errors.values()) < 1e-5
    config = model.peft_config["default"]
    assert config.modules_to_save is None and config.bias == "none" and not config.rank_pattern
    assert max(extract_lora(base, merged, 4)[1].values()) > 1e-3
    higher, _ = extract_lora(base, merged, 16)
    assert set(higher.peft_config["default"].rank_pattern.values()) == {5}  # of what has no more, no more is kept


@torch.no_grad()
def test_adapter_is_an_expert(tmp_path):
    """What is saved, and what is in memory, merges as any adapter does."""
    base = ARCHITECTURES["bert"].build()
    tuned = make_experts(base, ["a"])["a"]
    model, _ = extract_lora(base, tuned, FULL)
    model.save_pretrained(tmp_path)
    for source in (model, str(tmp_path)):
        merged = peft_tint.merge(base, {"a": source}, "task_arithmetic")
        torch.testing.assert_close(output(merged, IDS), output(tuned, IDS), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_only_what_differs_is_kept():
    base = ARCHITECTURES["bert"].build()
    tuned = copy.deepcopy(base)
    layer = "bert.encoder.layer.1"
    tuned.get_submodule(f"{layer}.attention.self.query").weight.add_(torch.randn(16, 16))
    tuned.get_submodule(f"{layer}.output.LayerNorm").bias.add_(1)
    tuned.get_submodule(f"{layer}.output.dense").bias.add_(1)
    tuned.get_submodule("bert.embeddings.position_embeddings").weight.add_(0.1)
    model, errors = extract_lora(base, tuned, 16)
    assert errors.keys() == {f"{layer}.attention.self.query"}
    assert model.peft_config["default"].modules_to_save == [
        "bert.embeddings.position_embeddings",
        f"{layer}.output.LayerNorm",
        f"{layer}.output.dense",  # whose weight is the base's
    ]
    torch.testing.assert_close(output(model, IDS), output(tuned, IDS), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_running_statistics_and_labels_are_the_tuned_models():
    architecture = ARCHITECTURES["resnet"]
    base = architecture.build().double()
    tuned = make_experts(base, {"a": 4})["a"].double()
    tuned.load_state_dict({n: b + 1 for n, b in tuned.named_buffers()}, strict=False)
    model, _ = extract_lora(base, tuned, FULL)
    inputs = double(architecture.inputs)
    torch.testing.assert_close(output(model, inputs), output(tuned, inputs), rtol=1e-8, atol=1e-8)
    merged = model.merge_and_unload()
    assert merged.config.id2label == tuned.config.id2label and merged.num_labels == 4
    assert base.config.num_labels == 2


@torch.no_grad()
def test_base_dtype():
    base = ARCHITECTURES["bert"].build().bfloat16()
    tuned = make_experts(base, ["a"])["a"]
    model, errors = extract_lora(base, tuned.float(), FULL)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert 1e-4 < max(errors.values()) < 1e-2  # which the factors' rounding has left


class Convolutions(nn.Module):
    """Of one kind each that LoRA reproduces, and that it does not."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Conv1d(4, 6, 3, stride=2, padding=1)
        self.same = nn.Conv2d(1, 4, (3, 1), padding="same")
        self.dilated = nn.Conv2d(4, 4, 3, dilation=2, padding=2)
        self.circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        self.grouped = nn.Conv2d(4, 4, 1, groups=2)
        self.transposed = nn.ConvTranspose1d(6, 2, 3)

    def forward(self, x):
        x = self.grouped(self.circular(self.dilated(self.same(x[:, None]))))
        return self.transposed(self.plain(x.mean(2)))


@torch.no_grad()
def test_convolutions():
    base = Convolutions().double()
    tuned = make_experts(base, ["a"])["a"]
    model, errors = extract_lora(base, tuned, FULL)
    assert errors.keys() == {"plain", "same"}
    x = torch.randn(2, 5, 8).double()
    torch.testing.assert_close(model(x), tuned(x))
    torch.testing.assert_close(model.merge_and_unload()(x), tuned(x))


class Names(nn.Module):
    """Names that are endings of others."""

    def __init__(self):
        super().__init__()
        self.block = nn.ModuleDict({"fc": nn.Linear(8, 8), "norm": nn.LayerNorm(8), "prenorm": nn.LayerNorm(8)})
        self.fc, self.norm = nn.Linear(8, 3), nn.LayerNorm(3)

    def forward(self, x):
        x = self.block["fc"](self.block["prenorm"](x))
        return self.norm(self.fc(self.block["norm"](x)))


@pytest.mark.parametrize("changed", [["fc", "norm"], ["block.fc", "block.norm"], ["fc", "block.fc", "norm"]])
@torch.no_grad()
def test_names_that_are_endings_of_others(changed, tmp_path):
    base, x = Names().double(), torch.randn(2, 8).double()
    tuned = copy.deepcopy(base)
    for name in changed:
        tuned.get_submodule(name).weight.add_(torch.randn_like(tuned.get_submodule(name).weight))
    model, errors = extract_lora(base, tuned, 3)
    assert errors.keys() == {name for name in changed if name.endswith("fc")}
    model, _ = extract_lora(base, tuned, 8)
    torch.testing.assert_close(model(x), tuned(x))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), tuned(x))


def test_vocabulary_may_be_left_out_of_the_file(tmp_path):
    """PEFT saves the base's embeddings along where LoRA is on them, unless it is told not to."""
    base = ARCHITECTURES["llama"].build()
    tuned = make_experts(base, ["a"])["a"]
    model, _ = extract_lora(base, tuned, FULL)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(output(loaded, IDS), output(tuned, IDS), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_tied_weights_are_kept_at_each_place():
    base = ARCHITECTURES["gpt2"].build()
    model, errors = extract_lora(base, make_experts(base, ["a"])["a"], 2)
    whole = {n for n, m in model.base_model.model.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    assert {"transformer.wte", "lm_head"} <= whole and not whole & errors.keys()
    assert model.merge_and_unload().config.tie_word_embeddings is False and base.config.tie_word_embeddings


@pytest.mark.parametrize("name", OF_THE_MODEL)
def test_parameters_of_the_model_itself_are_refused(name):
    base = ARCHITECTURES[name].build()
    with pytest.raises(ValueError, match=f"differs from `base` in .*{OF_THE_MODEL[name]}.*use the tuned model"):
        extract_lora(base, make_experts(base, ["a"])["a"], 4)


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "4", None])
def test_refused_ranks(rank):
    base = ARCHITECTURES["conv_net"].build()
    with pytest.raises(ValueError, match=f"`rank` is {rank!r}; give a positive integer"):
        extract_lora(base, make_experts(base, ["a"])["a"], rank)


@torch.no_grad()
def test_refused_models():
    base = ARCHITECTURES["bert"].build()
    tuned = make_experts(base, ["a"])["a"]

    def refused(match, base=base, tuned=tuned):
        with pytest.raises(ValueError, match=match):
            extract_lora(base, tuned, 4)

    refused("none differs between `base` and `tuned` .0 others do.*use the tuned model", tuned=copy.deepcopy(base))
    norm = copy.deepcopy(base)
    norm.bert.embeddings.LayerNorm.weight.add_(1)
    refused("none differs .* .1 others do", tuned=norm)
    refused("`tuned` has an adapter", tuned=with_lora(base, 2, 0))
    refused("`base` has an adapter", base=with_lora(base, 2, 0))
    refused("`tuned` is a RobertaFor.*same class", tuned=ARCHITECTURES["roberta"].build())
    refused("'tuned' has no 'bert.encoder.layer.1", tuned=ARCHITECTURES["bert"].build(num_hidden_layers=1))
    refused("'bert.embeddings.word_embeddings.weight' has shape", tuned=ARCHITECTURES["bert"].build(vocab_size=70))
    refused("hidden_act", tuned=ARCHITECTURES["bert"].build(hidden_act="relu"))
    quantised = copy.deepcopy(base)
    quantised.classifier.weight = nn.Parameter(torch.ones(2, 16, dtype=torch.int8), requires_grad=False)
    refused("The base model is quantised", base=quantised)
    broken = copy.deepcopy(base)
    broken.classifier.weight[0, 0] = torch.nan
    refused("'tuned': 'classifier.weight' has 1 NaN", tuned=broken)
    refused("The base model's 'classifier.weight' has NaN", base=broken)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.norm = nn.Parameter(torch.ones(8)), nn.LayerNorm(8)


class Nested(nn.Module):
    """A module that has to be kept whole, with another in it that has the name of one of the model."""

    def __init__(self):
        super().__init__()
        self.block, self.norm, self.fc = Block(), nn.LayerNorm(3), nn.Linear(8, 3)


def test_names_that_peft_cannot_tell_apart_are_refused():
    base = Nested()
    with pytest.raises(ValueError, match="endings of names"):
        extract_lora(base, make_experts(base, ["a"])["a"], 4)
