"""Model cards: what they say, and what of an edited card stays."""

import json
import re

import pytest
import torch
from huggingface_hub import ModelCard, metadata_load
from models import ARCHITECTURES, make_experts
from peft import get_peft_model
from test_save_merged import make_tokenizer
from test_tint_model import load
from test_trainer import make_data

import peft_tint
from peft_tint import DtsConfig, TintConfig, TintTrainer, TintTrainingArguments, model_card
from peft_tint._card import read_card

RESULTS = {
    "a": {"agreement": 0.9, "accuracy": 0.8, "expert_accuracy": 0.9, "normalized_accuracy": 0.8 / 0.9},
    "b": {"agreement": 0.5, "accuracy": 0.25, "expert_accuracy": 0.0, "normalized_accuracy": float("nan")},
    "mean": {"agreement": 0.7, "accuracy": 0.525, "expert_accuracy": 0.45, "normalized_accuracy": 0.8 / 0.9},
}


@pytest.fixture
def model(bert):
    experts = {"a": bert[1]["a"], "b": bert[1]["b"]}
    model = get_peft_model(load(bert[0]), TintConfig(experts=experts, coefficient_init={"a": 0.25, "b": 0.5}))
    model.peft_config["default"].base_model_name_or_path = "me/base"
    return model


@pytest.fixture
def of_hub_ids(model):
    """As if the experts had come from there."""
    experts = {"a": {"id": "me/a", "revision": "0" * 40, "subfolder": "best"}, "b": "me/b"}
    model.peft_config["default"].experts = experts
    return model


def rows_of(card):
    table = [line.strip("| ").split(" | ") for line in card.text.splitlines() if line.startswith("|")]
    return {row[0]: dict(zip(table[0], row, strict=False)) for row in table[2:]}


def test_metadata(of_hub_ids, tmp_path):
    card = model_card(of_hub_ids, "me/tinted", results=RESULTS, datasets={"a": "me/texts"}, tags=["mine"])
    card.save(tmp_path / "README.md")
    data = metadata_load(tmp_path / "README.md")
    index = data.pop("model-index")
    assert data == {
        "base_model": "me/base",
        "base_model_relation": "adapter",
        "datasets": ["me/texts"],
        "library_name": "peft",
        "metrics": ["accuracy"],
        "pipeline_tag": "text-classification",
        "tags": ["peft_tint", "tint", "mine", "base_model:adapter:me/base"],
    }
    assert index[0]["name"] == "tinted"
    first, second = index[0]["results"]
    assert first["task"] == {"type": "text-classification", "name": "a"}
    assert first["dataset"] == {"name": "a", "type": "me/texts"} and second["dataset"]["type"] == "b"
    values = {metric["type"]: metric["value"] for metric in first["metrics"]}
    assert values == {key: value for key, value in RESULTS["a"].items() if key != "expert_accuracy"}
    assert [metric["type"] for metric in second["metrics"]] == ["agreement", "accuracy"]  # what is NaN is no result
    assert ModelCard.load(tmp_path / "README.md").data.to_dict() == card.data.to_dict()


def test_metadata_of_a_merged_model(of_hub_ids):
    data = model_card(of_hub_ids, "me/merged", merged_for="b").data.to_dict()
    assert data["library_name"] == "transformers" and data["base_model_relation"] == "merge"
    assert data["base_model"] == ["me/base", "me/a", "me/b"] and "merge" in data["tags"]


def test_table(of_hub_ids):
    rows = rows_of(model_card(of_hub_ids, results=RESULTS))
    assert list(rows) == ["a", "b", "mean"]
    config = of_hub_ids.peft_config["default"]
    assert rows["a"] == {
        "sha256": config.experts_sha256["a"],
        "task": "a",
        "expert": "[me/a](https://huggingface.co/me/a) best",
        "revision": "0" * 40,
        "agreement": "0.900",
        "accuracy": "0.800",
        "of the expert": "0.900",
        "normalised": "88.9%",
    }
    assert rows["b"]["revision"] == "main" and rows["b"]["normalised"] == "-" and rows["mean"]["accuracy"] == "0.525"
    config.experts_sha256 = None
    assert "sha256" not in rows_of(model_card(of_hub_ids))["b"]


def test_local_folders_are_not_named(model, bert):
    for base in ("me/base", bert[0]):
        model.peft_config["default"].base_model_name_or_path = base
        for merged in (None, "a"):
            card = model_card(model, merged_for=merged)
            assert bert[0].rpartition("/")[0] not in str(card)
            assert rows_of(card)["a"]["expert"] == "not on the Hub"
    assert "base_model" not in card.data.to_dict()


def test_training_and_coefficients(model, tmp_path):
    peft_tint._card.save_card(model, tmp_path, training={"objective": "entropy", "seed": 3})
    text = ModelCard.load(tmp_path / "README.md").text
    assert "## Training\n\n- objective: entropy\n- seed: 3\n" in text
    assert "(coefficients.json)" in text and "(coefficients.png)" in text
    numbers = json.loads((tmp_path / "coefficients.json").read_text())
    assert numbers["units"] == model.coefficients().units
    assert numbers["coefficients"] == {"a": [0.25] * 39, "b": [0.5] * 39}
    assert (tmp_path / "coefficients.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_no_picture(model, tmp_path, monkeypatch):
    monkeypatch.setattr(peft_tint._card, "find_spec", lambda name: None)
    peft_tint._card.save_card(model, tmp_path)
    assert "coefficients.png" not in (tmp_path / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "coefficients.json"]


def test_of_dts(bert):
    model = get_peft_model(load(bert[0]), DtsConfig(expert=bert[1]["a"], rank_ratio=0.3), "first")
    model.add_adapter("second", DtsConfig(expert=bert[1]["b"], rank_ratio=0.3))
    model.peft_config["second"].expert = "me/b"
    card = model_card(model, "me/dts", results={"second": {"accuracy": 0.5}})
    assert {task: row["expert"] for task, row in rows_of(card).items()} == {
        "first": "not on the Hub",
        "second": "[me/b](https://huggingface.co/me/b)",
    }
    assert rows_of(card)["second"]["accuracy"] == "0.500" and "dts" in card.data.tags
    assert 'PeftModel.from_pretrained(base, "me/dts", adapter_name="first", subfolder="first")' in card.text
    assert 'model.load_adapter("me/dts", adapter_name="second", subfolder="second")' in card.text


@pytest.mark.parametrize("name", ["vit", "gpt2", "conv_net", "clip"])
def test_of_other_models(name):
    base = ARCHITECTURES[name].build()
    card = model_card(peft_tint.from_experts(base, make_experts(base, ["a", "b"]), tint_layer=[]), results=RESULTS)
    assert ("each task has a copy of its own of the head" in card.text) == (name == "vit")  # others have none
    tags = {"vit": "image-classification", "gpt2": "text-generation", "clip": "zero-shot-image-classification"}
    tag = tags.get(name)
    assert card.data.pipeline_tag == tag and card.data.eval_results[0].task_type == (tag or "other")


# ---- cards that are there --------------------------------------------------------------------------------------------


def test_what_was_edited_stays(model):
    card = model_card(model, results=RESULTS, training={"seed": 1})
    card.text = f"\n# Mine\n\nBefore.\n{card.text}\nAfter.\n"
    card.data.license, card.data.tags = "mit", [*card.data.tags, "by-hand"]
    again = model_card(model, training={"seed": 2}, existing=ModelCard(str(card)))
    assert again.text.startswith("\n# Mine\n\nBefore.\n") and again.text.endswith("\nAfter.\n")
    assert "- seed: 2" in again.text and "- seed: 1" not in again.text
    assert again.data.license == "mit" and {"by-hand", "tint"} <= set(again.data.tags)
    third = model_card(model, training={"seed": 2}, existing=ModelCard(str(again)))
    assert str(third) == str(again)


def test_results_of_another_state_go_and_those_for_other_tasks_stay(model):
    card = ModelCard(str(model_card(model, results={**RESULTS, "other": {"accuracy": 1.0}})))
    again = model_card(model, existing=card)
    assert [result.task_name for result in again.data.eval_results] == ["other"]
    results = model_card(model, existing=card, results=RESULTS).data.eval_results
    assert [result.task_name for result in results] == ["other", "a", "a", "a", "b", "b"]
    card.data.eval_results = card.data.eval_results[:3]
    assert "model-index" not in model_card(model, existing=ModelCard(str(card))).data.to_dict()


def test_a_card_of_the_users_own_is_kept_below(model):
    existing = ModelCard("---\nlicense: mit\n---\n\n# Mine\n\nText.\n")
    card = model_card(model, existing=existing)
    assert card.text.strip().startswith("<!-- peft_tint") and card.text.endswith("# Mine\n\nText.\n")
    assert card.data.license == "mit" and card.data.library_name == "peft"


def test_the_trainers_folder(bert, model, tmp_path):
    """PEFT's form that is not filled in gives way, and what the user writes is there after the next save."""
    model.peft_config["default"].base_model_name_or_path = bert[0]
    trainer = TintTrainer(
        model,
        TintTrainingArguments(output_dir=str(tmp_path), max_steps=1, disable_tqdm=True),
        {task: data for task, data in make_data(bert, rows=8).items() if task in model.tasks},
        processing_class=make_tokenizer(),
    )
    model.save_pretrained(tmp_path)
    trainer.save_model()
    text = (tmp_path / "README.md").read_text()
    assert "More Information Needed" not in text and "## Training" not in text and "In this folder:" in text
    trainer.train()
    (tmp_path / "README.md").write_text(text.replace("library_name", "license: mit\nlibrary_name") + "\nMine.\n")
    trainer.save_model(results=RESULTS)
    card = ModelCard.load(tmp_path / "README.md")
    assert "- steps: 1\n" in card.text and card.text.endswith("\nMine.\n") and card.data.license == "mit"
    assert 'tokenizer = AutoTokenizer.from_pretrained(".")' in card.text
    model.save_pretrained(tmp_path)  # PEFT has nothing to add to the text
    assert ModelCard.load(tmp_path / "README.md").text.strip() == card.text.strip()


def test_the_code_runs_in_the_folder(bert, model, tmp_path, monkeypatch, capsys):
    model.save_merged(tmp_path / "merged", processing_class=make_tokenizer())
    monkeypatch.chdir(tmp_path / "merged")
    (code,) = re.findall(r"```python\n(.*?)```", ModelCard.load("README.md").text, re.DOTALL)
    names = {}
    exec(code, names)
    assert names["model"].tasks == ["a", "b"]
    assert re.search(r"^a tensor.*^b tensor", capsys.readouterr().out, re.DOTALL | re.MULTILINE)
    assert torch.equal(names["batch"]["input_ids"], torch.tensor([[0, 1]]))


def test_the_code_for_a_module_of_ones_own_runs(tmp_path, monkeypatch):
    """With the model put in where the card asks for it."""
    make = ARCHITECTURES["conv_net"].build
    base = make()
    packed = {"tint_layer": "fc", "save_experts": "dts", "save_experts_kwargs": {"rank_ratio": 0.3}}
    model = peft_tint.from_experts(base, make_experts(base, ["a", "b"]), **packed)
    model.save_pretrained(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", model_card(model).text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {"make": make}
    exec(code.replace("base = ...  # the ConvNet that the adapter was made for", "base = make()"), names)
    assert names["task"] == "b" and names["model"].task == "b"


def test_two_tasks_on_one_dataset(model):
    match = "`datasets` gives the tasks 'a' and 'b' the same data, {'id': 'me/x'}.*Say which part"
    with pytest.raises(ValueError, match=match):
        model_card(model, results=RESULTS, datasets={"a": "me/x", "b": "me/x"})
    parts = {task: {"id": "me/x", "config": task, "split": "test"} for task in "ab"}
    card = model_card(model, results=RESULTS, datasets=parts)
    assert card.data.datasets == ["me/x"] and {r.dataset_config for r in card.data.eval_results} == {"a", "b"}


@pytest.mark.parametrize("content", [b"---\ntags: [\n---\n", b"\xff", b"---\nmodel-index: 5\n---\n"])
def test_a_card_that_cannot_be_read_is_not_overwritten(tmp_path, content):
    (tmp_path / "README.md").write_bytes(content)
    with pytest.raises(ValueError, match=r"(?s)The model card .*README.md' cannot be read .* Mend or delete it"):
        read_card(tmp_path / "README.md")
