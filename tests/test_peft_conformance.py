"""PEFT's own tests, over TintConfig and DtsConfig. A user must not be able to tell that they are not in PEFT's tree.

The tests come from the source distribution of the installed PEFT, which pip downloads once into the user's cache.
Every `parametrize` of theirs over PEFT's methods is replaced by ours; tests of one method by name fall out. The models
are tiny ones built from configs, so no Hub is needed.
"""

import copy
import importlib
import os
import re
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import peft
import pytest
import torch
import transformers as T
from filelock import FileLock
from models import SMALL, T5
from safetensors.torch import save_file

from peft_tint import DtsConfig, TintConfig

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft_tint" / "tests"
PACKAGE = "peft_upstream_tests"
pytestmark = pytest.mark.filterwarnings("default")  # theirs are many


def download() -> Path:
    """The folder of PEFT's tests."""
    folder = CACHE / f"peft-{peft.__version__}" / "tests"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "lock"):
        if not folder.is_dir():
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--dest", CACHE]
            result = subprocess.run([*pip, f"peft=={peft.__version__}"], capture_output=True, text=True)
            if result.returncode:
                pytest.skip(f"PEFT's sources cannot be downloaded: {result.stderr}", allow_module_level=True)
            with tarfile.open(CACHE / f"peft-{peft.__version__}.tar.gz") as archive:
                archive.extractall(CACHE, filter="data")
    return folder


def upstream(module):
    """A module of PEFT's tests, as part of a package of its own, so that `tests` here and there do not collide."""
    return importlib.import_module(f"{PACKAGE}.{module}")


# ---- models and experts ----------------------------------------------------------------------------------------------


def set_up():
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(download())]
    pytest.register_assert_rewrite(PACKAGE)
    sys.modules[PACKAGE] = package
    if importlib.util.find_spec("diffusers") is None:  # imported for one isinstance()
        diffusers = types.ModuleType("diffusers")
        diffusers.StableDiffusionPipeline, diffusers.__version__ = type("StableDiffusionPipeline", (), {}), "0.0.0"
        sys.modules["diffusers"] = diffusers


set_up()
custom = upstream("test_custom_models")
FOLDER = CACHE / f"models-{os.environ.get('PYTEST_XDIST_WORKER', 'main')}"  # test ids are made before fixtures

DECODER = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
TINY = {
    "opt": (T.AutoModelForCausalLM, T.OPTConfig(**DECODER, ffn_dim=32, word_embed_proj_dim=16)),
    "llama": (T.AutoModelForCausalLM, T.LlamaConfig(**DECODER, intermediate_size=32, num_key_value_heads=2)),
    "bert": (T.AutoModel, T.BertConfig(vocab_size=64, **SMALL)),
    "bert_classifier": (T.AutoModelForSequenceClassification, T.BertConfig(vocab_size=64, num_labels=3, **SMALL)),
    "bert_tokens": (T.AutoModelForTokenClassification, T.BertConfig(vocab_size=64, **SMALL)),
    "t5": (T.AutoModelForSeq2SeqLM, T.T5Config(**T5)),
}


def save(model, folder):
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), folder / "model.safetensors")
    return str(folder)


def experts_of(model, name):
    """Two fake fine-tunes of a model, in folders."""
    folders = {}
    for task in ("one", "two"):
        expert = copy.deepcopy(model)
        for parameter in expert.parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape)
        folders[task] = save(expert, FOLDER / f"{name}-{task}")
    return folders


def make_tiny(name):
    auto, config = TINY[name]
    model = auto.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 5
    return save(model, FOLDER / name), experts_of(model, name)


torch.manual_seed(0)
TOYS = ("MLP", "Conv1d", "Conv2d", "Conv2dGroups", "Conv3d", "EmbConv1D", "MLP_LayerNorm", "MHA")
TOY_EXPERTS = {toy: experts_of(custom.MockTransformerWrapper.from_pretrained(toy), toy) for toy in TOYS}
TOY_BASES = {toy: save(custom.MockTransformerWrapper.from_pretrained(toy), FOLDER / f"{toy}-base") for toy in TOYS}
ONE_EXPERT = {"one": TOY_EXPERTS["MLP"]["one"]}
DEEP_EXPERTS = experts_of(custom.DeepMLP(size=256), "DeepMLP")
# As every method of PEFT starts; `init_weights=False` in a test undoes it. A step may lead to either side of zero
IDENTITY = {"coefficient_init": 0.0, "coefficient_bounds": None}


def toy(model, label="", **config):
    settings = {"experts": TOY_EXPERTS[model], "tint_layer": [], **IDENTITY, **config}
    return pytest.param(f"{model} {label}", model, TintConfig, settings, id=f"{model} {label}")


def dts_toy(model, **config):
    """With the base as the expert it changes nothing, as every method of PEFT starts."""
    settings = {"expert": TOY_BASES[model], "rank_ratio": 0.2, **config}
    return pytest.param(f"{model} DTS", model, DtsConfig, settings, id=f"{model} DTS")


def dts_tiny(name, task_type, **config):
    folder = str(FOLDER / name)
    settings = {"expert": folder, "rank_ratio": 0.2, "task_type": task_type, **config}
    return pytest.param(folder, DtsConfig, settings, id=f"{name} DTS")


def tiny(name, task_type, **config):
    folder, experts = make_tiny(name)
    settings = {"experts": experts, "task_type": task_type, **IDENTITY, **config}
    return pytest.param(folder, TintConfig, settings, id=name)


def deep_mlp(**config):
    """What tests call that build their own DeepMLP; it has new weights each time, so the experts are strangers."""
    return TintConfig(experts=DEEP_EXPERTS, tint_layer=[], **config)


CUSTOM = [
    toy("MLP", target_modules=["lin0"]),
    toy("MLP", "regex", target_modules="lin[01]"),
    toy("MLP", "all"),
    toy("MLP", "model", granularity="model"),
    toy("MLP", "head saved", target_modules=["lin0"], modules_to_save=["lin1"]),
    # one expert, since theirs wants a gradient for every parameter, and the other tasks' copies have none
    toy("MLP", "head tinted", tint_layer="lin1", tint_layer_init="base", experts=ONE_EXPERT),
    toy("Conv1d", target_modules=["conv1d"]),
    toy("Conv2d", target_modules=["conv2d", "lin0"]),
    toy("Conv2dGroups", target_modules=["conv2d"]),
    toy("Conv3d", target_modules=["conv3d"]),
    toy("EmbConv1D", target_modules=["conv1d", "emb"]),
    toy("MLP_LayerNorm", target_modules=["layernorm0"]),
    toy("MLP_LayerNorm", "all"),
    toy("MHA", target_modules=["mha"]),
    dts_toy("MLP", target_modules=["lin0"]),
    dts_toy("MLP"),
    dts_toy("Conv1d", target_modules=["conv1d"]),
    dts_toy("Conv2d", target_modules=["conv2d", "lin0"]),
    dts_toy("Conv2dGroups", target_modules=["conv2d"]),
    dts_toy("Conv3d", target_modules=["conv3d"]),
    dts_toy("EmbConv1D", target_modules=["conv1d", "emb"]),
    dts_toy("MLP_LayerNorm", target_modules=["layernorm0"]),
    dts_toy("MHA", target_modules=["mha"]),
]
SAME = {"experts": TOY_EXPERTS["MLP"], "tint_layer": [], "target_modules": ["lin0"], "init_weights": False}
TWO_ACTIVE = [
    pytest.param("same", "tint", TintConfig, SAME, SAME, id="same"),
    pytest.param("different", "tint", TintConfig, SAME, {**SAME, "target_modules": ["lin1"]}, id="different"),
]
# The tests of gradients and of inputs that need none want embeddings and what the output does not use left out
MODELS = {
    ("test_decoder_models", "TestDecoderModels"): [
        tiny("opt", "CAUSAL_LM", tint_layer=[], target_modules=["q_proj", "v_proj", "fc1", "final_layer_norm"]),
        tiny("llama", "CAUSAL_LM", tint_layer=[], exclude_modules=["embed_tokens"]),
        dts_tiny("llama", "CAUSAL_LM"),
    ],
    ("test_feature_extraction_models", "TestPeftFeatureExtractionModel"): [
        tiny("bert", "FEATURE_EXTRACTION", tint_layer=[], exclude_modules=".*(embeddings|pooler).*"),
        dts_tiny("bert", "FEATURE_EXTRACTION"),
    ],
    ("test_seq_classifier", "TestSequenceClassificationModels"): [
        tiny("bert_classifier", "SEQ_CLS", exclude_modules=".*embeddings.*"),
        dts_tiny("bert_classifier", "SEQ_CLS"),
    ],
    ("test_encoder_decoder_models", "TestEncoderDecoderModels"): [
        tiny("t5", "SEQ_2_SEQ_LM", tint_layer=[], exclude_modules=["shared", "embed_tokens", "lm_head"]),
        dts_tiny("t5", "SEQ_2_SEQ_LM"),
    ],
    ("test_token_classification_qa", "TestTokenClassificationModels"): [
        tiny("bert_tokens", "TOKEN_CLS", exclude_modules=".*embeddings.*"),
        dts_tiny("bert_tokens", "TOKEN_CLS"),
    ],
}

# ---- re-parametrisation ----------------------------------------------------------------------------------------------

# Needs a dataset or tokenizer of the Hub, loops over some methods of PEFT's by name, or wants a pickle, which we refuse
DROPPED = {
    "test_save_pretrained_pickle",
    "test_save_pretrained_selected_adapters_pickle",
    "test_prompt_learning_with_gradient_checkpointing",
    "test_multiple_adapters_mixed_modules_to_save",
    "test_multiple_adapters_mixed_modules_to_save_order_switched",
    "test_add_weighted_adapter_cat_with_rank_pattern",
    "test_loading_model_requires_grad_set_correctly_switch_inference_mode",
    "test_loading_model_requires_grad_load_adapter_then_add_adapter",
    "test_save_pretrained_with_runtime_config",
}

# These train the adapter, or look for its parameters (one: for `layers_to_transform`). DTS adapters have none: codes
# are buffers, and what they compute is what `test_dts.py` looks into.
OF_PARAMETERS = re.compile(
    r"test_(training.*|adapter_name|add_adapter_no_autocast_adapter_dtype|disable_adapters|inference_safetensors|"
    r"disable_adapters_with_merging|load_model_low_cpu_mem_usage|modules_to_save_correctly_set|only_params_are_updated|"
    r"parameters_after_loading_model|config_layers_to_transform_index_zero)"
)


def names_of(mark):
    names = mark.args[0]
    return frozenset(name.strip() for name in (names.split(",") if isinstance(names, str) else names))


def rebind(cls, values):
    """A subclass of a test class with `values`, {argument names: parameters}, in place of what it was parametrised by.

    A test that is parametrised over none of these names falls out."""
    attributes = {"__module__": __name__, "__test__": True}
    for name in dir(cls):
        if not name.startswith("test"):
            continue
        attributes[name] = None  # hides the inherited one
        function = getattr(cls, name)
        marks = list(getattr(function, "pytestmark", []))
        replaced = [names_of(mark) for mark in marks if mark.name == "parametrize"]
        for arguments, parameters in values.items():
            # theirs crosses models and methods in two marks where ours joins them in one
            parts = [arguments, frozenset({"model_id"}), arguments - {"model_id"}]
            if name not in DROPPED and (arguments in replaced or all(part in replaced for part in parts[1:])):
                ours = types.FunctionType(
                    function.__code__, function.__globals__, name, function.__defaults__, function.__closure__
                )
                ours.__kwdefaults__ = function.__kwdefaults__
                kept = [mark for mark in marks if mark.name != "parametrize" or names_of(mark) not in parts]
                if name == "test_active_adapter":  # two at once, which PEFT refuses of `modules_to_save` too
                    parameters = [parameter for parameter in parameters if "tinted" not in parameter.id]
                if OF_PARAMETERS.fullmatch(name):
                    parameters = [parameter for parameter in parameters if DtsConfig not in parameter.values]
                # a mark's names are in the order of the parameters' values
                order = next(names for names in ORDERS if frozenset(names) == arguments)
                ours.pytestmark = [pytest.mark.parametrize(order, parameters).mark, *kept]
                attributes[name] = ours
    return type(cls.__name__, (cls,), attributes)


ORDERS = (
    ("test_name", "model_id", "config_cls", "config_kwargs"),
    ("model_id", "config_cls", "config_kwargs"),
    ("test_name", "tuner_method", "config_cls", "config_kwargs_1", "config_kwargs_2"),
    ("config_cls",),
    ("config_class", "mandatory_kwargs"),
)
ON_CUSTOM, ON_MODELS, ON_TWO, ON_CLASS, ON_CONFIG = (frozenset(names) for names in ORDERS)
BY_CLASS = {
    ON_CUSTOM: CUSTOM,
    ON_TWO: TWO_ACTIVE,
    ON_CLASS: [pytest.param(deep_mlp, id="TintConfig")],
}

TestCustomModels = rebind(custom.TestPeftCustomModel, BY_CLASS)
TestMultipleActive = rebind(custom.TestMultipleActiveAdapters, BY_CLASS)
TestRequiresGrad = rebind(custom.TestRequiresGrad, BY_CLASS)
for (module, cls), parameters in MODELS.items():
    globals()[cls] = rebind(getattr(upstream(module), cls), {ON_MODELS: parameters})

config_tests = upstream("test_config")
TintConfig().save_pretrained(FOLDER / "config")
config_tests.PEFT_MODELS_TO_TEST = [(str(FOLDER / "config"), None)]
CONFIGS = [pytest.param(cls, {}, id=cls.__name__) for cls in (TintConfig, DtsConfig)]
TestConfig = rebind(config_tests.TestPeftConfig, {ON_CONFIG: CONFIGS})
