"""Every call by which PEFT and transformers handle adapters, with two tints of different experts on one base."""

import copy
import pickle
import shutil

import pytest
import torch
import transformers as T
from models import ARCHITECTURES, IDS, SMALL, make_experts
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
from transformers.integrations.peft import MIN_PEFT_VERSION
from versions import HAS_OWN_ADAPTER_CALLS, needs_own_adapter_calls

import peft_tint
from peft_tint import TintConfig
from peft_tint.training.outputs import output_of

# PEFT, about what it does when the active adapter is deleted
pytestmark = pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")
GRANULARITIES = ("tensor", "module", "block", "model")


def load(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


def perturb(model):
    """As if it had been trained."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)


@torch.no_grad()
def logits(model):
    return model(**IDS).logits


@pytest.fixture
def first(bert):
    return TintConfig(experts={"a": bert[1]["a"], "b": bert[1]["b"]})


@pytest.fixture
def second(bert):
    return TintConfig(experts={"score": bert[1]["score"]}, tint_layer=["layer.1.attention", "classifier"])


@pytest.fixture
def two(bert, first, second):
    """Both adapters, perturbed, the first active, and the logits of each alone."""
    torch.manual_seed(2)
    expected = {}
    model = get_peft_model(load(bert[0]), first).eval()
    model.add_adapter("second", second)
    for name in ("second", "default"):
        model.set_adapter(name)
        perturb(model)
        expected[name] = logits(model)
    return model, expected


def test_switching(two, bert):
    model, expected = two
    for name, tasks, classes in (("second", ["score"], 3), ("default", ["a", "b"], 2)):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected[name])
        assert model.tasks == tasks and model.config.num_labels == classes
        trainable = [n for n, p in model.named_parameters() if p.requires_grad]
        assert trainable and all(f".{name}" in n for n in trainable)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(load(bert[0])))


def test_saving_and_loading_two(two, bert, tmp_path):
    model, expected = two
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(bert[0]), tmp_path).eval()
    again.load_adapter(tmp_path / "second", "second")
    for name in ("default", "second", "default"):
        again.set_adapter(name)
        assert torch.equal(logits(again), expected[name])


@pytest.mark.parametrize("order", [("default", "second"), ("second", "default")])
def test_deleting(two, bert, order):
    model, expected = two
    model.delete_adapter(order[0])
    assert model.active_adapters == [order[1]]
    assert torch.equal(logits(model), expected[order[1]])
    assert not any(f".{order[0]}." in name for name in model.state_dict())
    model.delete_adapter(order[1])
    base = load(bert[0])
    with torch.no_grad():  # a PeftModel looks for the active adapter's config, and there is none
        assert torch.equal(model.base_model(**IDS).logits, logits(base))
    assert model.config.num_labels == base.config.num_labels
    with pytest.raises(ValueError, match="No adapter is active"):
        model.set_task("a")


def test_adding_again_after_the_last_one_is_deleted(bert, first):
    model = get_peft_model(load(bert[0]), copy.deepcopy(first)).eval()
    expected = logits(model)
    model.delete_adapter("default")
    model.add_adapter("new", first)
    model.set_adapter("new")
    assert torch.equal(logits(model), expected)


def test_merging_and_unmerging_each(two, bert):
    model, expected = two
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name in ("second", "default"):
        model.set_adapter(name)
        model.merge_adapter()
        torch.testing.assert_close(logits(model), expected[name], rtol=1e-5, atol=1e-5)
        model.unmerge_adapter()
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        assert torch.equal(logits(model), expected[name])


@pytest.mark.parametrize("name, classes", [("default", 2), ("second", 3)])
def test_merging_a_chosen_one_for_good(two, name, classes):
    model, expected = two
    merged = model.merge_and_unload(adapter_names=[name])
    assert type(merged) is T.BertForSequenceClassification and merged.config.num_labels == classes
    torch.testing.assert_close(logits(merged), expected[name], rtol=1e-5, atol=1e-5)
    assert not merged._forward_pre_hooks and not merged._forward_hooks


@pytest.mark.parametrize("where", ["coefficients", "tint layer"])
def test_safe_merge_finds_nan(bert, first, where):
    model = get_peft_model(load(bert[0]), first)
    kind = "tint_coefficients" if where == "coefficients" else "modules_to_save.default"
    next(p for n, p in model.named_parameters() if kind in n).data.fill_(torch.nan)
    with pytest.raises(
        ValueError, match=r"NaNs detected in the merged weights. The adapter default seems to be broken"
    ):
        model.merge_and_unload(safe_merge=True)


def test_unload_leaves_nothing(two, bert):
    base = two[0].unload()
    assert torch.equal(logits(base), logits(load(bert[0])))
    assert not base._forward_pre_hooks and not base._forward_hooks and not hasattr(base, "peft_config")


def test_injected_into_a_plain_model(bert, first):
    expected = get_peft_model(load(bert[0]), copy.deepcopy(first)).eval()
    model = inject_adapter_in_model(first, load(bert[0])).eval()
    for task in ("b", "a"):
        peft_tint.set_task(model, task)
        expected.set_task(task)
        assert torch.equal(logits(model), logits(expected)) and model.config.num_labels == expected.config.num_labels
    with pytest.raises(ValueError, match="'a', 'b'"):
        peft_tint.set_task(model, "c")
    with pytest.raises(ValueError, match="no TINT adapter"):
        peft_tint.set_task(load(bert[0]), "a")
    weights = {name: torch.randn_like(p) for name, p in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(model, weights)
    for name, tensor in get_peft_model_state_dict(model).items():
        assert torch.equal(tensor, weights[name])


@needs_own_adapter_calls
def test_transformers_own_adapter_calls(bert, first, tmp_path):
    model = load(bert[0])
    model.add_adapter(first)
    perturb(model)
    peft_tint.set_task(model, "b")
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = load(bert[0])
    again.load_adapter(str(tmp_path))
    peft_tint.set_task(again, "b")
    assert torch.equal(logits(again), expected)
    again.disable_adapters()
    assert torch.equal(logits(again), logits(load(bert[0])))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent(two, copied):
    model, expected = two
    other = copied(model)
    perturb(model)
    model.set_task("b")
    assert torch.equal(logits(other), expected["default"]) and other.task == "a"
    other.set_task("b")
    assert logits(other).shape == (2, 5)
    assert logits(other)[0, 0] != logits(model)[0, 0]
    other(**IDS, task_names=["a", "b"])


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_shared_coefficients_stay_shared(bert, tmp_path, granularity, low_cpu_mem_usage):
    """Through saving, loading and a second adapter: one update moves every tensor of a unit."""
    config = TintConfig(experts=bert[1], granularity=granularity, init_weights=False)
    model = get_peft_model(load(bert[0]), config).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(bert[0]), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    again.load_adapter(tmp_path, "second", is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    for name in ("default", "second"):
        again.set_adapter(name)
        assert torch.equal(logits(again.eval()), logits(model))
        own = [p for n, p in again.named_parameters() if "tint_coefficients" in n and n.endswith(name)]
        ours = [p for n, p in model.named_parameters() if "tint_coefficients" in n]
        assert len(own) == len(ours)  # `named_parameters` leaves out a parameter that it has seen
        assert torch.equal(again.coefficients().values, model.coefficients().values)
    assert not {id(p) for n, p in again.named_parameters() if "default" in n} & {
        id(p) for n, p in again.named_parameters() if "second" in n
    }


def test_hot_swap(bert, tmp_path):
    config = TintConfig(experts=bert[1])
    model = get_peft_model(load(bert[0]), config).eval()
    tints = []
    for index in range(2):
        perturb(model)
        tints.append(logits(model))
        model.save_pretrained(tmp_path / str(index))
    pointers = [p.data_ptr() for p in model.parameters()]
    for index in (0, 1):
        peft_tint.hotswap_adapter(model, str(tmp_path / str(index)))
        assert torch.equal(logits(model), tints[index])
    assert pointers == [p.data_ptr() for p in model.parameters()]
    other = get_peft_model(load(bert[0]), TintConfig(experts={"a": bert[1]["a"]}))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"has experts=.*Load it with `load_adapter`"):
        peft_tint.hotswap_adapter(model, str(tmp_path / "other"))
    block = get_peft_model(load(bert[0]), TintConfig(experts=bert[1], granularity="module"))
    block.save_pretrained(tmp_path / "block")
    with pytest.raises(ValueError, match="has granularity='module'"):
        peft_tint.hotswap_adapter(model, str(tmp_path / "block"))
    assert torch.equal(logits(model), tints[1])


AUTO = {
    "SEQ_CLS": (AutoPeftModelForSequenceClassification, "bert"),
    "TOKEN_CLS": (AutoPeftModelForTokenClassification, T.BertForTokenClassification),
    "QUESTION_ANS": (AutoPeftModelForQuestionAnswering, T.BertForQuestionAnswering),
    "FEATURE_EXTRACTION": (AutoPeftModelForFeatureExtraction, T.BertModel),
    "CAUSAL_LM": (AutoPeftModelForCausalLM, T.BertLMHeadModel),
    "SEQ_2_SEQ_LM": (AutoPeftModelForSeq2SeqLM, "t5"),
}


@pytest.mark.parametrize("task_type", AUTO)
@torch.no_grad()
def test_auto_classes(task_type, tmp_path):
    auto, kind = AUTO[task_type]
    settings = {"is_decoder": True} if task_type == "CAUSAL_LM" else {}
    base = (
        ARCHITECTURES[kind].build() if isinstance(kind, str) else kind(T.BertConfig(vocab_size=64, **SMALL, **settings))
    )
    base.eval().save_pretrained(tmp_path / "base")
    experts = {}
    for task, expert in make_experts(base, ["a", "b"]).items():
        expert.save_pretrained(tmp_path / task)
        experts[task] = str(tmp_path / task)
    base = type(base).from_pretrained(tmp_path / "base")
    headless = task_type in ("FEATURE_EXTRACTION", "CAUSAL_LM", "SEQ_2_SEQ_LM")
    config = TintConfig(experts=experts, task_type=task_type, tint_layer=[] if headless else None)
    model = get_peft_model(base, config).eval()
    perturb(model)
    model.set_task("b")
    model.save_pretrained(tmp_path / "tint")
    again = auto.from_pretrained(tmp_path / "tint").eval()
    again.set_task("b")
    inputs = {**IDS, "decoder_input_ids": IDS["input_ids"][:, :3]} if kind == "t5" else IDS
    results = [m(**inputs) for m in (model, again)]
    ours, theirs = (r[0] if task_type == "FEATURE_EXTRACTION" else output_of(r) for r in results)
    assert torch.equal(ours, theirs)


def test_errors_of_the_experts_are_as_clear_on_loading(bert, tmp_path):
    """The experts of a saved adapter have gone, have changed, or are others."""
    good = get_peft_model(load(bert[0]), TintConfig(experts=bert[1])).eval()
    good.save_pretrained(tmp_path / "tint")
    config = TintConfig.from_pretrained(tmp_path / "tint")
    config.experts_sha256 = None  # or they would be refused as others before they are looked at

    def refused(match, **changes):
        for name, value in changes.items():
            setattr(config, name, value)
        config.save_pretrained(tmp_path / "tint")
        base = load(bert[0])
        with pytest.raises(ValueError, match=match):
            PeftModel.from_pretrained(base, tmp_path / "tint")
        expected = logits(good)
        with pytest.raises(ValueError, match=match):
            good.load_adapter(tmp_path / "tint", "second")
        assert torch.equal(logits(good), expected) and list(good.peft_config) == ["default"]
        good.load_adapter(str(tmp_path / "again"), "second")  # nothing is half built, so the name is free
        good.delete_adapter("second")

    good.save_pretrained(tmp_path / "again")
    refused("neither a local folder nor", experts={**bert[1], "b": str(tmp_path / "gone")})
    wide = T.BertForSequenceClassification(T.BertConfig(vocab_size=64, **{**SMALL, "intermediate_size": 48}))
    wide.save_pretrained(tmp_path / "wide")
    refused("has shape|size", experts={**bert[1], "b": str(tmp_path / "wide")})
    electra = T.ElectraForSequenceClassification(T.ElectraConfig(vocab_size=64, embedding_size=16, **SMALL))
    electra.save_pretrained(tmp_path / "electra")
    refused("is a 'electra' model, the base model is 'bert'", experts={**bert[1], "b": str(tmp_path / "electra")})
    tensors = load_file(f"{bert[1]['b']}/model.safetensors")
    name = "bert.pooler.dense.weight"
    broken = {
        "'b': 'bert.pooler.dense.weight' has 256 NaN": {**tensors, name: torch.full_like(tensors[name], torch.nan)},
        "'b' from .* has no 'bert.pooler.dense.weight'": {k: v for k, v in tensors.items() if k != name},
        "'b' from .* also has 'more'": {**tensors, "more": torch.ones(1)},
    }
    shutil.copytree(bert[1]["b"], tmp_path / "b")
    for match, changed in broken.items():
        save_file(changed, tmp_path / "b" / "model.safetensors", {"format": "pt"})
        refused(match, experts={**bert[1], "b": str(tmp_path / "b")})
    (tmp_path / "b" / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "b" / "pytorch_model.bin")
    refused("'b' is stored as a pickle", experts={**bert[1], "b": str(tmp_path / "b")})
    refused("matches no module", experts=bert[1], tint_layer="nothing")


LAYERS = [
    None,
    [],
    ["word_embeddings", "classifier"],
    ["layer.1", "classifier"],
    ["layer.1.attention.self.query", "classifier"],
]


@pytest.mark.parametrize("outer", LAYERS, ids=map(str, LAYERS))
def test_tints_with_any_two_tint_layers(bert, tmp_path, outer):
    """Each is what it is alone: in its forward, merged, saved and loaded, and when the other has been deleted."""
    for inner in LAYERS:
        configs = {
            "default": TintConfig(experts={t: bert[1][t] for t in ("a", "b")}, tint_layer=outer),
            "second": TintConfig(experts={t: bert[1][t] for t in ("score", "a")}, tint_layer=inner),
        }
        expected = {n: logits(get_peft_model(load(bert[0]), copy.deepcopy(c)).eval()) for n, c in configs.items()}
        model = get_peft_model(load(bert[0]), configs["default"]).eval()
        model.add_adapter("second", configs["second"])
        for name in ("second", "default"):
            model.set_adapter(name)
            torch.testing.assert_close(logits(model), expected[name], rtol=1e-6, atol=1e-6)
            model.merge_adapter()
            torch.testing.assert_close(logits(model), expected[name], rtol=1e-5, atol=1e-5)
            model.unmerge_adapter()
            perturb(model)
            expected[name] = logits(model)
        folder = tmp_path / f"{LAYERS.index(inner)}"
        model.save_pretrained(folder)
        for name in ("default", "second"):
            alone = PeftModel.from_pretrained(load(bert[0]), folder / name if name == "second" else folder).eval()
            assert torch.equal(logits(alone), expected[name]), (outer, inner, name)
            plain = copy.deepcopy(model).merge_and_unload(adapter_names=[name])
            torch.testing.assert_close(logits(plain), expected[name], rtol=1e-5, atol=1e-5)
            left = copy.deepcopy(model)
            left.delete_adapter("second" if name == "default" else "default")
            left.set_adapter(name)
            torch.testing.assert_close(logits(left), expected[name], rtol=1e-6, atol=1e-6)
            left.save_pretrained(folder / "left")
            where = folder / "left" / "second" if name == "second" else folder / "left"
            assert torch.equal(logits(PeftModel.from_pretrained(load(bert[0]), where).eval()), logits(left))
        assert torch.equal(logits(model.unload()), logits(load(bert[0])))


@pytest.mark.parametrize("name", ["pop", "weight", "bias", "a_task", "default.x"])
def test_adapter_names_that_would_be_lost(bert, name):
    base = load(bert[0])
    with pytest.raises(ValueError, match=f"The adapter name '{name}' is"):
        get_peft_model(base, TintConfig(experts=bert[1]), adapter_name=name)
    assert torch.equal(logits(base), logits(load(bert[0]))) and not base._forward_pre_hooks


@pytest.mark.skipif(HAS_OWN_ADAPTER_CALLS, reason="transformers and PEFT fit each other")
def test_transformers_names_the_peft_that_its_own_calls_need(bert, first):
    model = load(bert[0])
    for call in (lambda: model.add_adapter(first), lambda: model.set_adapter("default")):
        with pytest.raises(ValueError, match=f"use a version >= {MIN_PEFT_VERSION}"):
            call()


@needs_own_adapter_calls
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # PEFT, and TINT then refuses
def test_second_adapter_of_transformers_is_refused(bert, first, second):
    model = load(bert[0])
    model.add_adapter(first, "one")
    with pytest.raises(ValueError, match=r"holds a TINT adapter itself.*put them into a PeftModel"):
        model.add_adapter(second, "two")


def test_merged_coefficients_cannot_be_set(bert, first, tmp_path):
    model = get_peft_model(load(bert[0]), first)
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    with pytest.raises(ValueError, match="call `unmerge_adapter"):
        model.set_coefficients(0.0)
    with pytest.raises(ValueError, match="call `unmerge_adapter"):
        peft_tint.hotswap_adapter(model, str(tmp_path))
    model.unmerge_adapter()
    with pytest.raises(ValueError, match=r"`values` is \[0.1, 0.2\]; it must be a number, {task: number}, or a tensor"):
        model.set_coefficients([0.1, 0.2])
    with pytest.raises(ValueError, match="NaN"):
        model.set_coefficients(float("nan"))
    with pytest.raises(ValueError, match="no adapter 'nope'; there are 'default'"):
        peft_tint.hotswap_adapter(model, str(tmp_path), "nope")


@pytest.mark.parametrize(
    "settings", [{"exclude_modules": ".*"}, {"layers_to_transform": [7]}, {"target_modules": ["x"]}]
)
def test_nothing_to_merge_is_told(bert, settings):
    with pytest.raises(ValueError, match=r"not found in the base model.*there is nothing to merge"):
        get_peft_model(load(bert[0]), TintConfig(experts=bert[1], **settings))


def test_all_linear(bert):
    model = get_peft_model(load(bert[0]), TintConfig(experts=bert[1], target_modules="all-linear"))
    units = model.coefficients().units
    assert len(units) == 2 * (6 * 2 + 1) and not any("LayerNorm" in unit or "embeddings" in unit for unit in units)


def test_all_linear_leaves_the_vocabulary_out():
    base = ARCHITECTURES["llama"].build()
    experts = make_experts(base, ["a", "b"])
    model = peft_tint.from_experts(base, experts, target_modules="all-linear", tint_layer=[])
    units = model.coefficients().units
    assert units and not any("lm_head" in unit or "norm" in unit for unit in units)
