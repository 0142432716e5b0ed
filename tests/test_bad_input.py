"""Each mistake is answered by an error with value, reason and remedy, and leaves the model as it was."""

import json
import shutil

import pytest
import torch
import transformers
from datasets import Dataset
from models import ARCHITECTURES, IDS, SMALL, make_experts, output
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification

import peft_tint
from peft_tint import TintConfig, TintTrainer, TintTrainingArguments


def load(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


@pytest.fixture
def broken(bert, tmp_path):
    """Copies expert b, lets a function change its tensors, and returns the folder."""

    def make(change):
        shutil.copytree(bert[1]["b"], tmp_path / "broken")
        tensors = load_file(tmp_path / "broken" / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
        return str(tmp_path / "broken")

    return make


def refused(bert, match, base=None, experts=None, **config):
    """get_peft_model raises, and the base model is untouched."""
    base = load(bert[0]) if base is None else base
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        get_peft_model(base, TintConfig(experts=experts or bert[1], **config))
    after = base.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


QUERY = "bert.encoder.layer.0.attention.self.query.weight"


def test_another_architecture(bert, tmp_path):
    config = transformers.RobertaConfig(vocab_size=64, **SMALL)
    transformers.RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    refused(bert, "'x'.*is a 'roberta' model, the base model is 'bert'", experts={"x": str(tmp_path)})


def test_another_shape_names_tensor_and_shapes(bert, tmp_path):
    config = transformers.BertConfig(vocab_size=64, **{**SMALL, "intermediate_size": 24})
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    refused(bert, r"'x'.*intermediate.dense.weight.*\(24, 16\).*\(32, 16\)", experts={"x": str(tmp_path)})


def test_another_vocabulary(bert, tmp_path):
    config = transformers.BertConfig(vocab_size=70, **SMALL)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    refused(bert, r"'x' has 70 tokens, the base model 64 \('bert.*word_embeddings", experts={"x": str(tmp_path)})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_names_expert_and_tensor(bert, broken, value):
    folder = broken(lambda tensors: tensors[QUERY].__setitem__((0, 0), value))
    refused(bert, f"'b': '{QUERY}' has 1 NaN or Inf", experts={"a": bert[1]["a"], "b": folder})


def test_missing_tensor(bert, broken):
    refused(bert, f"'b'.* has no '{QUERY}'", experts={"b": broken(lambda tensors: tensors.__delitem__(QUERY))})


def test_extra_tensor(bert, broken):
    folder = broken(lambda tensors: tensors.update({"bert.extra.weight": torch.ones(3)}))
    refused(bert, "'b'.* also has 'bert.extra.weight'", experts={"b": folder})


def test_missing_and_extra_tensor_in_memory(bert):
    tensors = load(bert[1]["b"]).state_dict()
    with pytest.raises(ValueError, match=f"'b' has no '{QUERY}'"):
        peft_tint.from_experts(load(bert[0]), {"b": {name: t for name, t in tensors.items() if name != QUERY}})
    with pytest.raises(ValueError, match="'b' has 'y', which the base model has not"):
        peft_tint.from_experts(load(bert[0]), {"b": {**tensors, "y": torch.ones(1)}})


def test_head_without_counterpart(bert):
    refused(bert, "also has 'classifier.bias'.*BertForSequenceClassification", base=AutoModel.from_pretrained(bert[0]))


def test_another_base_of_the_same_shape(bert):
    base = load(bert[0])
    for parameter in base.parameters():
        parameter.data = torch.randn(parameter.shape)
    refused(bert, "'a' was not fine-tuned from this base model: the median cosine", base=base)


def test_another_setting_of_the_forward(bert, tmp_path):
    shutil.copytree(bert[1]["b"], tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    refused(
        bert, "'b' was trained with hidden_act='relu', the base model has 'gelu'", experts={"b": str(tmp_path / "b")}
    )


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_refused(bert, tmp_path, name):
    shutil.copytree(bert[1]["b"], tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "b" / name)
    refused(bert, f"pickle \\({name}\\).*refused.*safetensors", experts={"b": str(tmp_path / "b")})


def test_adapter_and_empty_folder(bert, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(bert, "no safetensors file", experts={"b": str(tmp_path)})
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    refused(bert, "of no kind that PEFT knows", experts={"b": str(tmp_path)})
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_config.json").unlink()
    refused(bert, "no safetensors file", experts={"b": str(tmp_path)})
    refused(bert, "no folder.*subfolder", experts={"b": {"id": str(tmp_path), "subfolder": "x"}})


def test_file_instead_of_a_folder(bert, tmp_path):
    torch.save({}, tmp_path / "expert.pt")
    refused(bert, "pickle.*expert.pt.*refused", experts={"b": str(tmp_path / "expert.pt")})
    refused(bert, "is a file; give the folder", experts={"b": bert[1]["b"] + "/model.safetensors"})


def test_truncated_file(bert, tmp_path):
    shutil.copytree(bert[1]["b"], tmp_path / "b")
    file = tmp_path / "b" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    refused(bert, "Expert 'b': the file in .* is broken", experts={"b": str(tmp_path / "b")})


def test_unreachable_expert(bert):
    refused(bert, "'b': 'me/none' is neither a local folder nor", experts={"b": "me/none"})


def test_tied_tensors_that_the_expert_has_untied():
    base = ARCHITECTURES["bert_mlm"].build()
    tensors = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    tensors["cls.predictions.decoder.weight"] += 0.1
    with pytest.raises(ValueError, match=r"'a': .*word_embeddings.weight' and .*decoder.weight' are one tied tensor"):
        peft_tint.from_experts(base, {"a": tensors})


def test_differing_buffer_is_refused():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))

    base, expert = Net(), Net()
    expert.load_state_dict(base.state_dict())
    expert.body[1].running_mean += 1
    with pytest.raises(ValueError, match=r"'a': the buffer 'body.1.running_mean' differs"):
        peft_tint.from_experts(base, {"a": expert}, tint_layer=[])


def test_differing_running_statistics_leave_the_model_as_it_was():
    architecture = ARCHITECTURES["resnet"]
    base = architecture.build()
    experts = make_experts(base, ["a", "b"])
    for module in experts["b"].modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var += 0.1
    names = [name for name, _ in base.named_modules()]
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(ValueError, match=r"'b': the buffer 'resnet.*running_var' differs.*fine-tune with them frozen"):
        peft_tint.from_experts(base, experts)
    assert [name for name, _ in base.named_modules()] == names
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert all(parameter.requires_grad for parameter in base.parameters())
    expected = output(architecture.build(), architecture.inputs)
    assert torch.equal(output(base, architecture.inputs), expected)


@pytest.mark.parametrize("layer, match", [
    ("nothing.here", "'nothing.here' matches no module.*Near to it"),
    ("dense", "'dense' matches 7 modules"),
    ("encoder.layer", "ModuleList, which has no forward.*'bert.encoder.layer.0'"),
    ("attention.output.dropout", "matches 2 modules"),
    ("bert.embeddings.dropout", "has no parameters"),
    (["encoder.layer.1", "encoder.layer.1.output.dense"], "is part of 'bert.encoder.layer.1'"),
])  # fmt: skip
def test_tint_layer_that_does_not_fit(bert, layer, match):
    refused(bert, match, tint_layer=layer)


def test_tint_layer_inside_of_a_unit_or_a_head():
    base = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.TransformerEncoderLayer(4, 2, 8))
    with pytest.raises(ValueError, match=r"'1\.linear1' is part of '1'"):
        peft_tint.from_experts(base, {"a": base.state_dict()}, tint_layer="linear1")


def test_tint_layer_that_is_a_list_of_parameters():
    base = ARCHITECTURES["holders"].build()
    with pytest.raises(ValueError, match="'prompts' is a ParameterList, which has no forward; name the module that"):
        peft_tint.from_experts(base, {"a": base.state_dict()}, tint_layer="prompts")


def test_tint_layer_init_needs_equal_shapes(bert):
    refused(bert, r"`tint_layer_init` is 'base'.*'score' has shape \(3, 16\).*\(2, 16\)", tint_layer_init="base")


def test_target_modules_that_match_nothing(bert):
    refused(bert, "Target modules .*nothing.* not found in the base model", target_modules=["nothing"])


def test_no_experts(bert):
    with pytest.raises(ValueError, match=r"`TintConfig.experts` is empty"):
        get_peft_model(load(bert[0]), TintConfig())


@pytest.mark.parametrize("settings, match", [
    ({"experts": {}}, "at least one"),
    ({"experts": {"a/b": "x"}}, "'a/b' is not allowed"),
    ({"experts": {"../up": "x"}}, "'../up' is not allowed"),
    ({"experts": {"": "x"}}, "'' is not allowed"),
    ({"experts": {"mean": "x"}}, "'mean' is not allowed: among the results"),
    ({"experts": {"a": {"name": "x"}}}, "has the key 'id'"),
    ({"experts": {"a": {"id": "x", "branch": "y"}}}, "may have 'revision'"),
    ({"experts": {"a": torch.nn.Linear(1, 1)}}, "is a Linear.*from_experts"),
    ({"experts": {"a": "x"}, "tasks": ["a", "b"]}, "`tasks` is .*name the same ones"),
    ({"tint_layer": ""}, "`tint_layer` is ''"),
        ({"tint_layer": 3}, "`tint_layer` is 3"),
        ({"granularity": "layer"}, "`granularity` is 'layer'.*'tensor'"),
    ({"tint_layer_init": "zero"}, "`tint_layer_init` is 'zero'.*'expert'"),
    ({"coefficient_init": 2.0}, r"2.0, outside of `coefficient_bounds` \[0.0, 1.0\]"),
    ({"coefficient_init": float("nan")}, "nan; it must be a number"),
    ({"coefficient_init": "big"}, "'big'; it must be a number"),
    ({"experts": {"a": "x"}, "coefficient_init": {"b": 0.1}}, r"names the tasks \['b'\]"),
    ({"coefficient_bounds": [1.0, 0.0]}, "must be \\[lowest, highest\\]"),
    ({"layers_to_transform": [1], "target_modules": ".*query"}, "cannot be used when `target_modules` is a str"),
    ({"layers_pattern": "layer"}, "set `layers_to_transform` too"),
])  # fmt: skip
def test_config(settings, match):
    with pytest.raises(ValueError, match=match):
        TintConfig(**settings)


@pytest.fixture
def model(bert):
    return get_peft_model(load(bert[0]), TintConfig(experts=bert[1]))


def data(rows=4):
    return Dataset.from_dict({"input_ids": IDS["input_ids"].tolist() * (rows // 2)})


def test_unknown_task(model):
    with pytest.raises(ValueError, match="no task 'c'; the tasks are 'a', 'score', 'b'"):
        model.set_task("c")
    with pytest.raises(ValueError, match="no task 'c'"), model.expert("c"):
        pass
    with pytest.raises(ValueError, match="no task 'c'"):
        model.merge_and_unload(task="c")
    with pytest.raises(ValueError, match=r"`train_dataset` has the task 'c'.*'a', 'score', 'b'"):
        TintTrainer(model, train_dataset={"c": data()})


def test_datasets(model):
    with pytest.raises(ValueError, match=r"`eval_dataset\['a'\]` is empty"):
        TintTrainer(model, eval_dataset={"a": data(0)})
    with pytest.raises(ValueError, match=r"`train_dataset\['a'\]` is a list.*trainer.step"):
        TintTrainer(model, train_dataset={"a": [1]})
    with pytest.raises(ValueError, match="`train_dataset` is missing"):
        TintTrainer(model).train()
    with pytest.raises(ValueError, match="`eval_dataset` is missing"):
        TintTrainer(model).evaluate()


def test_objective(model, bert):
    with pytest.raises(ValueError, match=r"no objective 'mse'.*confident_pseudo_label"):
        TintTrainer(model, objective="mse")
    expert = load(bert[1]["b"])
    expert.config.problem_type = "multi_label_classification"
    model = peft_tint.from_experts(load(bert[0]), {"b": expert})
    with pytest.raises(ValueError, match="'b' is multi-label"):
        TintTrainer(model, train_dataset={"b": data()}, objective="pseudo_label")


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_not_finite_loss(model, value):
    """It changes nothing, and is told with the next entry of the log."""
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    factors = iter([1.0, float(value), 1.0, 1.0])
    arguments = TintTrainingArguments(logging_steps=3)
    trainer = TintTrainer(model, arguments, objective=lambda logits, *_: logits.square().sum() * next(factors))
    trainer.step("a", IDS)
    after = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    trainer.step("a", IDS)
    assert all(torch.equal(after[name], value) for name, value in model.named_parameters())
    with pytest.raises(FloatingPointError, match=f"loss of task 'a' is {value}.*left out"):
        trainer.step("a", IDS)


def test_frozen_model(model):
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="is_trainable=True"):
        TintTrainer(model, train_dataset={"a": data()}).train()


@pytest.mark.parametrize("settings, match", [
    ({"update": "both"}, "`update` is 'both'"),
    ({"bf16": True, "fp16": True}, "choose one"),
    ({"load_best_model_at_end": True}, "needs `eval_steps`"),
    ({"max_steps": -1}, "`max_steps` is -1"),
])  # fmt: skip
def test_arguments(settings, match):
    with pytest.raises(ValueError, match=match):
        TintTrainingArguments(**settings)
