"""Experts given as adapters: the merge of each is what PEFT's own `merge_and_unload` gives."""

import copy

import peft
import pytest
import torch
from models import ARCHITECTURES, IDS, IMAGE, make_experts, output
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import peft_tint
from peft_tint import TintConfig
from peft_tint.tint.merged_layer import MergedLayer

CLASSIFIER = {"task_type": TaskType.SEQ_CLS, "target_modules": ["query", "value"]}
ADAPTERS = {
    "plain": LoraConfig(r=4, **CLASSIFIER),
    "no head": LoraConfig(r=4, target_modules=["query", "value"]),
    "other rank and alpha": LoraConfig(r=2, lora_alpha=7, **CLASSIFIER),
    "all linear": LoraConfig(r=3, target_modules="all-linear", task_type=TaskType.SEQ_CLS),
    "rslora": LoraConfig(r=4, use_rslora=True, **CLASSIFIER),
    "patterns": LoraConfig(r=4, rank_pattern={"query": 2}, alpha_pattern={"value": 3}, **CLASSIFIER),
    "bias": LoraConfig(r=4, bias="all", **CLASSIFIER),
    "bias of lora": LoraConfig(r=4, lora_bias=True, **CLASSIFIER),
    "embedding": LoraConfig(r=4, target_modules=["word_embeddings", "query"], task_type=TaskType.SEQ_CLS),
    "saved module": LoraConfig(r=4, modules_to_save=["pooler"], **CLASSIFIER),
    "dora": LoraConfig(r=4, use_dora=True, **CLASSIFIER),
    "pissa": LoraConfig(r=4, init_lora_weights="pissa", **CLASSIFIER),
    "ia3": peft.IA3Config(
        target_modules=["query", "output.dense"], feedforward_modules=["output.dense"], task_type=TaskType.SEQ_CLS
    ),
    "loha": peft.LoHaConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"]),
}
LOW_RANK = set(ADAPTERS) - {"dora", "ia3", "loha"}


def make_adapter(base, config, seed=1):
    """A PeftModel with random weights in the adapter, as after training; `base` stays as it is."""
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(base), copy.deepcopy(config)).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("embedding_B" in name or "lora_" not in name or parameter.ndim == 1):
            parameter.data += 0.05 * torch.randn(parameter.shape)
        elif parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    return model


@pytest.fixture(scope="module")
def base():
    return ARCHITECTURES["bert"].build(num_labels=3)


@pytest.mark.filterwarnings("ignore:.*lora_B.bias")  # PEFT about a file that it has just written
@pytest.mark.parametrize("source", ["folder", "memory"])
@pytest.mark.parametrize("kind", ADAPTERS)
@torch.no_grad()
def test_one_hot_is_the_adapter(base, tmp_path, kind, source):
    adapters = {task: make_adapter(base, ADAPTERS[kind], seed) for seed, task in enumerate(("a", "b"))}
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    if source == "folder":
        for task, adapter in adapters.items():
            adapter.save_pretrained(tmp_path / task)
        model = copy.deepcopy(base)
        config = TintConfig(experts={task: str(tmp_path / task) for task in adapters})
        model = get_peft_model(model, config)
    else:
        model = peft_tint.from_experts(copy.deepcopy(base), adapters)
    model.eval()
    with model.disable_adapter():
        assert torch.equal(output(model, IDS), output(base, IDS))
    for task, adapter in adapters.items():
        expected = output(adapter, IDS)
        model.set_task(task)
        model.set_coefficients({other: float(other == task) for other in adapters})
        torch.testing.assert_close(output(model, IDS), expected, rtol=1e-5, atol=1e-5)
        model.set_coefficients(0.4)
        with model.expert(task):
            torch.testing.assert_close(output(model, IDS), expected, rtol=1e-5, atol=1e-5)
    model.set_coefficients({"a": 0.0, "b": 1.0})
    merged, wanted = model.merge_and_unload(task="b"), adapters["b"].merge_and_unload().state_dict()
    assert merged.state_dict().keys() == wanted.keys()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-5, msg=name)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize("kind", ADAPTERS)
def test_lora_stays_low_rank(base, kind):
    model = peft_tint.from_experts(copy.deepcopy(base), {"a": make_adapter(base, ADAPTERS[kind])})
    vectors = [
        own for m in model.modules() if isinstance(m, MergedLayer) for own in m.tint_task_vectors["default"].values()
    ]
    assert any(own.a is not None for own in vectors) == (kind in LOW_RANK)
    if kind in ("plain", "rslora", "patterns", "all linear"):
        assert all(own.dense is None for own in vectors)
        rank = sum(p.numel() for n, p in make_adapter(base, ADAPTERS[kind]).named_parameters() if "lora_" in n)
        assert sum(own.a.numel() + own.b.numel() for own in vectors) == rank


def test_full_and_lora_experts_mixed_and_their_gradients(base):
    """Against plain autograd over the sum of the full deltas, in float64."""
    kinds = ("plain", "all linear", "embedding", "bias", "dora")
    adapters = {kind.replace(" ", "_"): make_adapter(base, ADAPTERS[kind], seed) for seed, kind in enumerate(kinds)}
    experts = {**adapters, **make_experts(base, ["full"])}
    merged = {task: copy.deepcopy(e).merge_and_unload() if task in adapters else e for task, e in experts.items()}
    model = peft_tint.from_experts(copy.deepcopy(base), experts, coefficient_init=0.2).double().eval()
    model.set_task("full")
    output(model, IDS).square().sum().backward()
    plain = copy.deepcopy(base).double()
    tensors = {name: p.detach() for name, p in plain.named_parameters()}
    heads = dict(merged["full"].double().named_parameters())
    coefficients = {name: torch.full((len(experts),), 0.2, dtype=torch.double, requires_grad=True) for name in tensors}
    weights = {
        name: heads[name].detach()
        if name.startswith("classifier")
        else tensors[name]
        + sum(
            c * (dict(e.double().named_parameters())[name].detach() - tensors[name])
            for c, e in zip(coefficients[name], merged.values(), strict=True)
        )
        for name in tensors
    }
    logits = torch.func.functional_call(plain, weights, (), IDS).logits
    torch.testing.assert_close(output(model, IDS), logits, rtol=1e-5, atol=1e-6)
    logits.square().sum().backward()
    for layer in (m for m in model.modules() if isinstance(m, MergedLayer)):
        for row, unit in zip(layer.tint_coefficients["default"].grad, layer.units["default"], strict=True):
            torch.testing.assert_close(row, coefficients[unit].grad.to(row), rtol=1e-4, atol=1e-6, msg=unit)


@torch.no_grad()
def test_convolutions_and_transposed_linears():
    conv_net = ARCHITECTURES["conv_net"].build()
    config = LoraConfig(r=2, target_modules=["conv1", "conv2", "fc"])
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()
    of_gpt2 = LoraConfig(r=2, target_modules=["c_attn", "c_proj", "wpe"], fan_in_fan_out=True)
    for base, lora, inputs in ((conv_net, config, IMAGE), (gpt2, of_gpt2, IDS)):
        adapters = {task: make_adapter(base, lora, seed) for seed, task in enumerate(("a", "b"))}
        model = peft_tint.from_experts(
            copy.deepcopy(base), adapters, coefficient_init={"a": 0.0, "b": 1.0}, tint_layer=[]
        )
        model.eval()
        expected = output(adapters["b"], inputs)
        torch.testing.assert_close(output(model, inputs), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output(model.merge_and_unload(), inputs), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_tint_layer_with_lora_inside(base):
    adapters = {task: make_adapter(base, ADAPTERS["all linear"], seed) for seed, task in enumerate(("a", "b"))}
    layers = ["encoder.layer.1", "classifier"]
    model = peft_tint.from_experts(
        copy.deepcopy(base), adapters, tint_layer=layers, coefficient_init={"a": 0.0, "b": 1.0}
    )
    model.eval().set_task("b")
    torch.testing.assert_close(output(model, IDS), output(adapters["b"], IDS), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_heads_of_their_own_size(tmp_path):
    experts = {}
    for task, classes in {"a": 2, "b": 5}.items():
        adapter = make_adapter(ARCHITECTURES["bert"].build(num_labels=classes), ADAPTERS["plain"])
        adapter.save_pretrained(tmp_path / task)
        experts[task] = str(tmp_path / task)
    base = ARCHITECTURES["bert"].build(num_labels=3)
    model = get_peft_model(base, TintConfig(experts=experts)).eval()
    for task, classes in {"a": 2, "b": 5}.items():
        model.set_task(task)
        assert output(model, IDS).shape == (2, classes)
        assert model.config.num_labels == classes and len(model.config.id2label) == classes


@torch.no_grad()
def test_saved_tint_over_adapters_loads_again(base, tmp_path):
    make_adapter(base, ADAPTERS["plain"]).save_pretrained(tmp_path / "a")
    config = TintConfig(experts={"a": str(tmp_path / "a")}, init_weights=False)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    model.save_pretrained(tmp_path / "tint")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "tint").eval()
    assert torch.equal(output(again, IDS), output(model, IDS))
    model.add_adapter("second", config)
    model.set_adapter("second")
    model.set_coefficients(1.0)
    expected = output(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a").eval(), IDS)
    torch.testing.assert_close(output(model, IDS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings")  # PEFT, of the very trouble
def test_lora_on_one_of_two_tied_weights():
    """Its expert has untied them: refused where the base ties them, right where it does not."""
    base = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32)).eval()
    for target in ("lm_head", "wte"):
        adapter = make_adapter(base, LoraConfig(r=2, target_modules=[target]))
        with pytest.raises(
            ValueError, match=f"LORA adapter works on .*{target}.weight'.*one tied tensor.*Load the base untied"
        ):
            peft_tint.from_experts(copy.deepcopy(base), {"a": adapter}, tint_layer=[])
        untied = GPT2LMHeadModel(GPT2Config(**{**base.config.to_dict(), "tie_word_embeddings": False})).eval()
        adapter = make_adapter(untied, LoraConfig(r=2, target_modules=[target]))
        model = peft_tint.from_experts(copy.deepcopy(untied), {"a": adapter}, tint_layer=[], coefficient_init=1.0)
        torch.testing.assert_close(output(model.eval(), IDS), output(adapter, IDS), rtol=1e-5, atol=1e-5)


def test_refused_adapters(base, tmp_path):
    def refused(match):
        before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        model = copy.deepcopy(base)
        with pytest.raises(ValueError, match=match):
            get_peft_model(model, TintConfig(experts={"a": str(tmp_path / "a")}))
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    prompts = peft.PromptTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=2)
    get_peft_model(copy.deepcopy(base), prompts).save_pretrained(tmp_path / "a")
    refused("type PROMPT_TUNING, which changes no weights")

    adapter = make_adapter(base, ADAPTERS["plain"])
    adapter.save_pretrained(tmp_path / "a", safe_serialization=False)
    (tmp_path / "a" / "adapter_model.safetensors").unlink(missing_ok=True)
    refused("is stored as a pickle .adapter_model.bin")

    adapter.save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(key for key in tensors if "lora_A" in key)
    save_file({key: tensor for key, tensor in tensors.items() if key != first}, file)
    refused("the adapter in .* has no .*lora_A")
    save_file({**tensors, "base_model.model.other.weight": tensors[first].clone()}, file)
    refused("the adapter in .* also has .*other.weight")
    save_file({**tensors, first: torch.full_like(tensors[first], torch.nan)}, file)
    refused("'a'.*NaN")


@torch.no_grad()
def test_parameters_as_targets():
    """`target_parameters` reaches weights that are stored transposed."""
    base = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32)).eval()
    lora = LoraConfig(r=2, target_modules=[], target_parameters=["attn.c_attn.weight", "attn.c_proj.weight"])
    adapter = make_adapter(base, lora)
    model = peft_tint.from_experts(copy.deepcopy(base), {"a": adapter}, tint_layer=[], coefficient_init=1.0)
    torch.testing.assert_close(output(model.eval(), IDS), output(adapter, IDS), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_adapters_in_memory(base):
    """The active adapter is the expert, and its labels are the task's."""
    adapter = make_adapter(base, ADAPTERS["no head"])
    adapter.config.problem_type, adapter.config.id2label = "multi_label_classification", dict(enumerate("xyz"))
    adapter.add_adapter("second", LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    adapter.base_model.set_adapter("second")  # of which `PeftModel.active_adapter` does not know
    model = peft_tint.from_experts(copy.deepcopy(base), {"a": adapter}, coefficient_init=1.0).eval()
    torch.testing.assert_close(output(model, IDS), output(adapter, IDS), rtol=1e-5, atol=1e-5)
    assert model.config.problem_type == "multi_label_classification" and model.config.id2label[0] == "x"
    adapter.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="has 2 active adapters; make the one to merge active"):
        peft_tint.from_experts(copy.deepcopy(base), {"a": adapter})
    prompts = get_peft_model(
        copy.deepcopy(base), peft.PromptTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=2)
    )
    with pytest.raises(ValueError, match="PROMPT_TUNING, which changes no weights"):
        peft_tint.from_experts(copy.deepcopy(base), {"a": prompts})


@pytest.mark.filterwarnings("ignore:Could not find a config file in some/other")
def test_adapter_of_another_base_is_told(tmp_path):
    base = ARCHITECTURES["bert"].build(num_labels=3)
    base.save_pretrained(tmp_path / "bert")
    base = type(base).from_pretrained(tmp_path / "bert")
    adapter = make_adapter(base, ADAPTERS["plain"])
    adapter.peft_config["default"].base_model_name_or_path = "some/other"
    adapter.save_pretrained(tmp_path / "a")
    with pytest.warns(UserWarning, match="was trained on 'some/other', the base model is .*bert"):
        get_peft_model(base, TintConfig(experts={"a": str(tmp_path / "a")}))


@torch.no_grad()
def test_scales_are_not_rounded_by_themselves(base):
    """0.378 of rsLoRA in bfloat16 would be off for all factors alike."""
    adapter = make_adapter(base, LoraConfig(r=7, lora_alpha=1, use_rslora=True, **CLASSIFIER))
    model = peft_tint.from_experts(copy.deepcopy(base), {"a": adapter})
    layer = model.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")
    lora = adapter.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")
    model.to(torch.bfloat16)
    cast = layer.tint_task_vectors["default"]["weight"]
    assert torch.equal(cast.b, lora.lora_B["default"].weight.to(torch.bfloat16))
    assert torch.equal(cast.rank_coefficients(torch.ones(1)), torch.full((7,), lora.scaling["default"]))


def test_low_rank_sums_of_float64_are_in_float64(base):
    adapter = make_adapter(base, ADAPTERS["plain"]).double()
    model = peft_tint.from_experts(copy.deepcopy(base).double(), {"a": adapter}, coefficient_init=1 / 3).double().eval()
    with torch.no_grad():
        logits = output(model, IDS)
        torch.testing.assert_close(output(model.merge_and_unload(), IDS), logits, rtol=1e-12, atol=1e-12)
