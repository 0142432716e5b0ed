"""`save_merged`: all tasks on one merged backbone, loaded again with no expert at hand."""

import copy
import json
import os

import pytest
import torch
from models import ARCHITECTURES, IDS, make_experts, output
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from test_lora_experts import make_adapter
from test_tint_model import LAYERS, load, logits, perturb
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

import peft_tint
from peft_tint import TintConfig


def make_tokenizer():
    tokenizer = Tokenizer(WordLevel({"A": 0, "text.": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[UNK]")


def load_tasks(folder, model_class=AutoModelForSequenceClassification):
    return PeftModel.from_pretrained(model_class.from_pretrained(folder), folder, subfolder="tint").eval()


@torch.no_grad()
def of_merged_backbone(model, inputs=IDS):
    """{task: output}. Uses the model up."""
    model.merge_backbone()
    outputs = {}
    for task in model.tasks:
        model.set_task(task)
        outputs[task] = output(model, inputs)
    return outputs


def assert_same_tasks(again, expected, labels, inputs=IDS):
    assert again.tasks == list(expected)
    for task in again.tasks:
        again.set_task(task)
        with torch.no_grad():
            assert torch.equal(output(again, inputs), expected[task]), task
        assert again.base_model.task_labels(task) == labels[task]


WITH_TASKS = [name for name, architecture in ARCHITECTURES.items() if architecture.has_head]


@pytest.mark.parametrize("name", WITH_TASKS)
def test_each_task_has_the_logits_of_the_merged_backbone(name, tmp_path):
    """In the folder of any task, and the plain model in it is that task's."""
    architecture = ARCHITECTURES[name]
    base = architecture.build()
    experts = make_experts(base, dict(zip("bac", architecture.classes, strict=True)))
    model = peft_tint.from_experts(base, experts).eval()
    perturb(model)
    model.set_coefficients(torch.rand(model.coefficients().values.shape))
    labels = {task: model.base_model.task_labels(task) for task in model.tasks}
    model.save_merged(tmp_path / "c", task="c")
    # without gradients, by which PyTorch chooses how to multiply
    plain = type(base).from_pretrained(tmp_path / "c").eval().requires_grad_(False)
    expected = of_merged_backbone(model, architecture.inputs)
    with torch.no_grad():
        assert torch.equal(output(plain, architecture.inputs), expected["c"])
    assert plain.config.id2label == labels["c"]["id2label"]
    assert_same_tasks(load_tasks(tmp_path / "c", type(base)), expected, labels, architecture.inputs)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_tint_layers_of_any_kind(bert, tmp_path, layer):
    model = get_peft_model(load(bert[0]), TintConfig(experts=bert[1], tint_layer=layer, task_type="SEQ_CLS")).eval()
    perturb(model)
    labels = {task: model.base_model.task_labels(task) for task in model.tasks}
    model.save_merged(tmp_path / "merged")
    again = load_tasks(tmp_path / "merged")
    names = [name.split(".modules_to_save")[0] for name, p in model.named_parameters() if p.requires_grad]
    model.set_task("b")
    mixed = model(**IDS, task_names=["score", "b"]).logits
    assert_same_tasks(again, of_merged_backbone(model), labels)
    torch.testing.assert_close(again(**IDS, task_names=["score", "b"]).logits, mixed, rtol=1e-5, atol=1e-5)
    trained = PeftModel.from_pretrained(load(tmp_path / "merged"), tmp_path / "merged", "x", True, subfolder="tint")
    again_names = [name.split(".modules_to_save")[0] for name, p in trained.named_parameters() if p.requires_grad]
    assert again_names == [name for name in names if "tint_coefficients" not in name]


def test_the_model_stays_as_it_is(bert, tmp_path):
    model = get_peft_model(load(bert[0]), TintConfig(experts=bert[1])).eval()
    perturb(model)
    model.set_task("score")
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    expected = logits(model, "score")
    model.save_merged(tmp_path / "merged", task="b")
    assert model.task == "score" and torch.equal(logits(model, "score"), expected)
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == before[name][0] and torch.equal(tensor, before[name][1]), name
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == requires_grad
    with model.expert("a"), torch.no_grad():
        torch.testing.assert_close(model(**IDS).logits, load(bert[1]["a"])(**IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("state", ["merged backbone", "merged adapter", "of two adapters", "of a saved tint"])
def test_a_model_in_any_state(bert, tmp_path, state):
    model = get_peft_model(load(bert[0]), TintConfig(experts=bert[1])).eval()
    perturb(model)
    labels = {task: model.base_model.task_labels(task) for task in model.tasks}
    expected = of_merged_backbone(copy.deepcopy(model))
    if state == "merged backbone":
        model.merge_backbone()
    elif state == "merged adapter":
        model.merge_adapter()
    elif state == "of two adapters":
        model.add_adapter("other", TintConfig(experts={"x": bert[1]["a"]}, tint_layer="encoder.layer.1"))
    else:
        model.save_pretrained(tmp_path / "adapter")
        model = PeftModel.from_pretrained(load(bert[0]), tmp_path / "adapter")
    with pytest.warns() if state == "merged adapter" else torch.no_grad():  # PEFT: "nothing to do"
        model.save_merged(tmp_path / "merged")
    assert_same_tasks(load_tasks(tmp_path / "merged"), expected, labels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(bert, tmp_path, dtype):
    model = get_peft_model(load(bert[0]).to(dtype), TintConfig(experts=bert[1])).eval()
    labels = {task: model.base_model.task_labels(task) for task in model.tasks}
    model.save_merged(tmp_path / "merged")
    again = load_tasks(tmp_path / "merged")
    assert again.dtype == dtype
    assert_same_tasks(again, of_merged_backbone(model), labels)


def test_lora_experts(tmp_path):
    base = ARCHITECTURES["bert"].build(num_labels=3)
    lora = LoraConfig(r=2, target_modules=["query", "value"], task_type=TaskType.SEQ_CLS)
    experts = {task: make_adapter(base, lora, seed) for seed, task in enumerate(("b", "a"))}
    model = peft_tint.from_experts(base, experts).eval()
    labels = {task: model.base_model.task_labels(task) for task in model.tasks}
    model.save_merged(tmp_path / "merged")
    assert_same_tasks(load_tasks(tmp_path / "merged"), of_merged_backbone(model), labels)


def test_its_experts_are_the_merged_models(bert, tmp_path):
    model = get_peft_model(load(bert[0]), TintConfig(experts=bert[1])).eval()
    model.save_merged(tmp_path / "merged")
    again = load_tasks(tmp_path / "merged")
    for task in again.tasks:
        expected = logits(again, task)
        with again.expert(task), torch.no_grad():
            assert torch.equal(again(**IDS).logits, expected)


def test_a_processing_class_and_shards(bert, tmp_path):
    model = get_peft_model(load(bert[0]), TintConfig(experts=bert[1])).eval()
    model.save_merged(tmp_path / "merged", processing_class=make_tokenizer(), max_shard_size="20KB")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("A text.").input_ids == [0, 1]
    assert (tmp_path / "merged" / "model.safetensors.index.json").exists()
    labels = {task: model.base_model.task_labels(task) for task in model.tasks}
    assert_same_tasks(load_tasks(tmp_path / "merged"), of_merged_backbone(model), labels)


def test_only_the_place_of_the_merged_model_is_named(bert, tmp_path):
    model = get_peft_model(load(bert[0]), TintConfig(experts=bert[1])).eval()
    model.save_merged(tmp_path / "merged")
    settings = json.loads((tmp_path / "merged" / "tint" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "merged")
    assert settings["experts"] == dict.fromkeys(bert[1])
    for folder, _, files in os.walk(tmp_path / "merged"):
        for file in files:
            with open(os.path.join(folder, file), "rb") as opened:
                assert os.path.dirname(bert[0]).encode() not in opened.read(), file


def test_refusals(bert, tmp_path):
    model = get_peft_model(load(bert[0]), TintConfig(experts=bert[1]))
    with pytest.raises(ValueError, match="There is no task 'z'; the tasks are 'a', 'score', 'b'"):
        model.save_merged(tmp_path / "merged", task="z")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="exists already; give a new or empty folder"):
        model.save_merged(tmp_path / "full")
    base = ARCHITECTURES["conv_net"].build()
    model = peft_tint.from_experts(base, make_experts(base, ["a", "b"]), tint_layer="fc")
    with pytest.raises(ValueError, match=r"This ConvNet is no transformers model\. Save the model that `merge_and"):
        model.save_merged(tmp_path / "merged")
    base = ARCHITECTURES["t5"].build()
    model = peft_tint.from_experts(base, make_experts(base, ["a", "b"]), tint_layer=[])
    with pytest.raises(ValueError, match="This T5ForConditionalGeneration has neither a head nor a tint layer for"):
        model.save_merged(tmp_path / "merged")
    base = ARCHITECTURES["bart"].build()
    model = peft_tint.from_experts(base, make_experts(base, ["a", "b"]), tint_layer="lm_head")
    match = r"transformers does not save .*embed_tokens.weight' of the merged model, for"
    with pytest.warns(match="no longer tied"), pytest.raises(ValueError, match=match):
        model.save_merged(tmp_path / "merged")
    assert sorted(os.listdir(tmp_path)) == ["full"]
