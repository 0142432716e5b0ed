"""To the Hub and back, on an emulator of it."""

import copy
import json
import os
import re
import sys
import time
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from hub_emulator import HubEmulator
from huggingface_hub import ModelCard, constants, metadata_load
from huggingface_hub.errors import HfHubHTTPError
from models import ARCHITECTURES, IDS, make_experts
from peft import LoraConfig, PeftModel, get_peft_model
from processes import run_to_end
from safetensors.torch import save_file
from test_save_merged import load_tasks, make_tokenizer
from test_tint_model import load, logits, perturb
from test_trainer import make_data
from versions import needs_own_adapter_calls

import peft_tint
from peft_tint import DtsConfig, TintConfig, TintTrainer, TintTrainingArguments

# the client, about itself
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
TASKS = {"a": 2, "score": 3, "b": 5}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The emulator, which everything in this process takes for the Hub, with base and experts on it."""
    with HubEmulator() as hub, pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_DISABLE_XET": True,
            "HF_TOKEN_PATH": str(cache / "token"),
        }.items():
            patch.setattr(constants, name, value)
        patch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
        patch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)  # made once
        patch.setenv("HF_TOKEN", hub.token)
        patch.setenv("HF_HUB_OFFLINE", "0")  # which PEFT reads itself
        torch.manual_seed(1)
        base = ARCHITECTURES["bert"].build()
        base.push_to_hub("me/base", private=True)
        for task, expert in make_experts(base, TASKS).items():
            expert.push_to_hub(f"me/{task}")
        yield hub


@pytest.fixture
def model(hub):
    model = get_peft_model(load("me/base"), TintConfig(experts={task: f"me/{task}" for task in TASKS})).eval()
    perturb(model)
    return model


def local_experts(tmp_path):
    for task in TASKS:
        load(f"me/{task}").save_pretrained(tmp_path / "local" / task)
    return {task: str(tmp_path / "local" / task) for task in TASKS}


def text_of(hub, repo_id, file="README.md", revision="main"):
    return hub.repositories[repo_id].files(revision)[file].decode()


def all_bytes(hub, repo_id):
    return b"\0".join(hub.repositories[repo_id].files().values())


# ---- there and back --------------------------------------------------------------------------------------------------


def test_a_fresh_process_computes_the_same(hub, model, tmp_path):
    """Of all that can be pushed, by the code in the cards and with an empty cache. Two have a tokenizer."""
    pushed = {}

    def note(repo_id, model, tasks, choose):
        outputs, labels = {}, {}
        for task in tasks:
            choose(task)
            with torch.no_grad():
                outputs[str(task)] = model(**IDS).logits
            labels[str(task)] = model.config.id2label
        pushed[repo_id] = {"plain": tasks == [None], "labels": labels}
        save_file(outputs, tmp_path / f"{repo_id.replace('/', '-')}.safetensors")

    model.push_to_hub("me/tint", private=True, processing_class=make_tokenizer())
    note("me/tint", model, model.tasks, model.set_task)

    packed = {"save_experts": "dts", "save_experts_kwargs": {"rank_ratio": 0.3}, "tint_layer": "encoder.layer.1"}
    config = TintConfig(experts=local_experts(tmp_path), task_type="SEQ_CLS", **packed)
    get_peft_model(load("me/base"), config).push_to_hub("me/packed")
    again = PeftModel.from_pretrained(load("me/base"), "me/packed").eval()
    note("me/packed", again, again.tasks, again.set_task)

    dts = get_peft_model(load("me/base"), DtsConfig(expert="me/b", rank_ratio=0.3), "first").eval()
    dts.add_adapter("second", DtsConfig(expert=local_experts(tmp_path)["score"], rank_ratio=0.3))
    dts.push_to_hub("me/dts")
    note("me/dts", dts, ["first", "second"], dts.set_adapter)

    model.push_merged_to_hub("me/all", task="score", processing_class=make_tokenizer())
    merged = copy.deepcopy(model).merge_and_unload(task="b")
    merged.push_to_hub("me/only-b")
    note("me/only-b", merged, [None], lambda task: None)
    model.merge_backbone()
    note("me/all", model, model.tasks, model.set_task)

    (tmp_path / "pushed.json").write_text(json.dumps(pushed))
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "OMP_NUM_THREADS": "1",
    }
    settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-W", "ignore", Path(__file__).parent / "pull.py", tmp_path]
    printed = run_to_end(command, env={**os.environ, **settings})
    assert json.loads(printed.splitlines()[-1]) == {repo_id: [] for repo_id in pushed}


def test_what_is_pushed_stays_when_the_experts_go_on(hub, tmp_path):
    """The commit that was loaded is recorded, unless a revision is given."""
    expert = load("me/a")
    expert.push_to_hub("me/moving")
    model = get_peft_model(load("me/base"), TintConfig(experts={"a": "me/moving"})).eval()
    dts = get_peft_model(load("me/base"), DtsConfig(expert={"id": "me/moving"}, rank_ratio=0.3))
    commit = hub.repositories["me/moving"].branches["main"]
    reference = {"id": "me/moving", "revision": commit}
    assert model.peft_config["default"].experts == {"a": reference}
    assert dts.peft_config["default"].expert == reference
    model.push_to_hub("me/follower")
    expected = logits(model, "a")
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter += 1
    expert.push_to_hub("me/moving")
    again = PeftModel.from_pretrained(load("me/base"), "me/follower").eval()
    assert torch.equal(logits(again, "a"), expected)
    assert f"| a | [me/moving](https://huggingface.co/me/moving) | {commit} |" in text_of(hub, "me/follower")
    chosen = {"id": "me/moving", "revision": "main"}
    later = get_peft_model(load("me/base"), TintConfig(experts={"a": chosen}))
    assert later.peft_config["default"].experts == {"a": chosen}
    assert not torch.equal(logits(later.eval(), "a"), expected)


def test_adapters_as_experts_are_pinned_too(hub, tmp_path):
    config = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    get_peft_model(load("me/base"), config).push_to_hub("me/lora")
    assert text_of(hub, "me/lora").startswith("---\nlibrary_name: transformers")  # other methods push as they did
    model = get_peft_model(load("me/base"), TintConfig(experts={"x": "me/lora"}))
    commit = hub.repositories["me/lora"].branches["main"]
    assert model.peft_config["default"].experts == {"x": {"id": "me/lora", "revision": commit}}


def test_to_a_branch(hub, model):
    model.push_to_hub("me/branched", revision="dev", commit_message="try it")
    repository = hub.repositories["me/branched"]
    assert not repository.files() and repository.messages[repository.branches["dev"]] == "try it"
    card = text_of(hub, "me/branched", revision="dev")
    assert 'PeftModel.from_pretrained(base, "me/branched", revision="dev")' in card
    model.push_merged_to_hub("me/branched", revision="merged", private=True)
    assert not repository.private  # it was there
    names = {}
    card = text_of(hub, "me/branched", revision="merged")
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], names)
    again = names["model"]
    model.merge_backbone()
    for task in TASKS:
        assert torch.equal(logits(again, task), logits(model, task))


def test_cards_of_others(hub, model):
    """Transformers' form that is not filled in goes, its metadata that we do not write stay; and so does any text."""
    load("me/a").push_to_hub("me/formed")
    files = hub.repositories["me/formed"].files()
    files["README.md"] = files["README.md"].replace(b"tags: []", b"license: mit")
    model.push_merged_to_hub("me/formed")
    card = ModelCard(text_of(hub, "me/formed"))
    assert "More Information Needed" not in card.text and card.data.license == "mit" and card.data.base_model
    hub.repositories["me/formed"].files()["README.md"] += b"\nMine.\n"
    model.push_merged_to_hub("me/formed")
    assert text_of(hub, "me/formed") == f"{card}\nMine.\n"


def test_private_repositories(hub, model):
    info = model.push_merged_to_hub("me/secret", private=True)
    assert info.repo_url.repo_id == "me/secret" and hub.repositories["me/secret"].private


def test_a_later_push_leaves_nothing_of_an_earlier_one_that_would_be_loaded(hub, model):
    model.push_to_hub("me/changing")
    hub.repositories["me/changing"].files()["notes.txt"] = b"mine"
    model.push_merged_to_hub("me/changing", max_shard_size="20KB")
    files = set(hub.repositories["me/changing"].files())
    assert "model-00001-of-00003.safetensors" in files and "adapter_config.json" not in files
    model.push_merged_to_hub("me/changing")
    files = set(hub.repositories["me/changing"].files())
    assert files == {
        *("README.md", "coefficients.json", "coefficients.png", "config.json", "model.safetensors", "notes.txt"),
        *("tint/adapter_config.json", "tint/adapter_model.safetensors"),
    }


def test_the_trainer_pushes_what_it_trained(hub, tmp_path):
    config = TintConfig(experts={task: f"me/{task}" for task in TASKS}, tint_layer="encoder.layer.1")
    data = make_data((None, {task: f"me/{task}" for task in TASKS}), rows=8)
    args = TintTrainingArguments(str(tmp_path), max_steps=2, disable_tqdm=True, seed=7)
    trainer = TintTrainer(get_peft_model(load("me/base"), config), args, data, processing_class=make_tokenizer())
    trainer.train()
    results = trainer.evaluate(data)
    trainer.push_to_hub("me/trained", results, datasets={"a": "me/texts"}, private=True)
    files = hub.repositories["me/trained"].files()
    assert "tokenizer.json" in files and hub.repositories["me/trained"].private
    card = ModelCard(files["README.md"].decode())
    assert "- objective: soft_pseudo_label\n- steps: 2\n" in card.text and "- seed: 7\n" in card.text
    assert card.data.datasets == ["me/texts"]
    found = {(r.task_name, r.dataset_type, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert found["a", "me/texts", "agreement"] == results["a"]["agreement"]
    (tmp_path / "README.md").write_bytes(files["README.md"])
    assert metadata_load(tmp_path / "README.md")["base_model"] == "me/base"


# ---- what is not published -------------------------------------------------------------------------------------------


def assert_refused(hub, push, match, repo_id="me/refused"):
    with pytest.raises(ValueError, match=match):
        push(repo_id)
    assert repo_id not in hub.repositories


def test_no_push_names_a_folder_of_an_expert(hub, tmp_path):
    experts = local_experts(tmp_path)
    match = r"The adapter 'default' has experts that are on this machine only, of the tasks 'a', 'score'\. .*'dts'"
    model = get_peft_model(load("me/base"), TintConfig(experts={**experts, "b": "me/b"}))
    assert_refused(hub, model.push_to_hub, match)
    assert_refused(hub, TintTrainer(model, TintTrainingArguments(str(tmp_path / "out"))).push_to_hub, match)
    held = peft_tint.from_experts(load("me/base"), {"a": load("me/a")})
    assert_refused(hub, held.push_to_hub, "on this machine only, of the tasks 'a'")
    model.save_pretrained(tmp_path / "saved")
    again = PeftModel.from_pretrained(load("me/base"), tmp_path / "saved")
    assert_refused(hub, again.push_to_hub, match)
    packed = {"save_experts": "dts", "save_experts_kwargs": {"rank_ratio": 0.3}}
    get_peft_model(load("me/base"), TintConfig(experts=experts, **packed)).push_to_hub("me/no-paths")
    get_peft_model(load("me/base"), DtsConfig(expert=experts["a"], rank_ratio=0.3)).push_to_hub("me/no-paths-2")
    model.push_merged_to_hub("me/no-paths-3", processing_class=make_tokenizer())
    for repo_id in ("me/no-paths", "me/no-paths-2", "me/no-paths-3"):
        assert str(tmp_path).encode() not in all_bytes(hub, repo_id)


@needs_own_adapter_calls
def test_no_push_of_a_model_with_the_adapter_in_itself_names_a_folder_of_an_expert(hub, tmp_path):
    model = load("me/base")
    model.add_adapter(TintConfig(experts=local_experts(tmp_path)))
    assert_refused(hub, model.push_to_hub, "of the tasks 'a', 'score', 'b'")
    save = partial(model.save_pretrained, tmp_path / "inside", push_to_hub=True)
    assert_refused(hub, lambda repo_id: save(repo_id=repo_id), "of the tasks 'a', 'score', 'b'")


IN_ITSELF = pytest.param("in the model itself", marks=needs_own_adapter_calls)


@pytest.mark.parametrize("kind", ["TINT", "DTS", "second adapter", IN_ITSELF])
def test_no_push_names_a_folder_of_the_base(hub, tmp_path, kind):
    load("me/base").save_pretrained(tmp_path / "base")
    base = load(str(tmp_path / "base"))
    config = TintConfig(experts={"a": "me/a"})
    name = "second" if kind == "second adapter" else "default"
    if kind == "in the model itself":
        base.add_adapter(config)
        model = base
    else:
        model = get_peft_model(base, DtsConfig(expert="me/a", rank_ratio=0.3) if kind == "DTS" else config)
    if kind == "second adapter":
        model.peft_config["default"].base_model_name_or_path = "me/base"
        model.add_adapter("second", TintConfig(experts={"b": "me/b"}))
    assert_refused(hub, model.push_to_hub, rf"The adapter '{name}' names its base model by a local folder.*Set `model")
    model.peft_config[name].base_model_name_or_path = "me/base"
    model.push_to_hub(f"me/based-{kind.replace(' ', '-')}")
    assert str(tmp_path).encode() not in all_bytes(hub, f"me/based-{kind.replace(' ', '-')}")


def test_what_merge_and_unload_returns_pushes_as_any_model(hub, tmp_path):
    model = get_peft_model(load("me/base"), TintConfig(experts=local_experts(tmp_path)))
    model.merge_and_unload(task="a").push_to_hub("me/plain")
    assert str(tmp_path).encode() not in all_bytes(hub, "me/plain")


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop", ["/lfs/*", "*/commit/*"])
@pytest.mark.parametrize("push", ["push_to_hub", "push_merged_to_hub"])
def test_a_lost_connection_leaves_nothing_half_visible(hub, model, monkeypatch, drop, push):
    repo_id = f"me/lost-{len(drop)}-{push}"
    getattr(model, push)(repo_id)
    before = dict(hub.repositories[repo_id].commits)
    perturb(model)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client tries again
    monkeypatch.setattr(hub, "drop", drop)
    with pytest.raises(ConnectionError, match=rf"push to '{repo_id}' broke off \(.*\)\. It is one commit, so the repo"):
        getattr(model, push)(repo_id)
    assert hub.repositories[repo_id].commits == before
    monkeypatch.setattr(hub, "drop", None)
    getattr(model, push)(repo_id)
    assert len(hub.repositories[repo_id].commits) == len(before) + 1


@pytest.mark.parametrize("push", ["push_to_hub", "push_merged_to_hub"])
def test_a_card_that_cannot_be_read_is_not_replaced(hub, model, monkeypatch, push):
    """Neither by one without the text that was added, nor by one with the text of an older card in the cache."""
    repo_id = f"me/unread-{push}"
    getattr(model, push)(repo_id)
    getattr(model, push)(repo_id)  # its card is in the cache now
    files = hub.repositories[repo_id].files()
    files["README.md"] += b"\nMine.\n"
    before = dict(hub.repositories[repo_id].commits)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(hub, "drop", f"/{repo_id}/resolve/*")
    with pytest.raises(ConnectionError, match=rf"card of '{repo_id}', .* could not be read .* Nothing was pushed"):
        getattr(model, push)(repo_id)
    assert hub.repositories[repo_id].commits == before
    monkeypatch.setattr(hub, "drop", None)
    getattr(model, push)(repo_id)
    assert text_of(hub, repo_id).endswith("\nMine.\n")


def test_wrong_arguments_make_no_repository(hub, model):
    for push in (model.push_to_hub, model.push_merged_to_hub):
        with pytest.raises(TypeError, match="use_temp_dir"):
            push("me/nothing", use_temp_dir=True)
        with pytest.raises(ValueError, match="'a' and 'b' the same data"):
            push("me/nothing", results={"a": {"x": 1.0}, "b": {"x": 0.5}}, datasets={"a": "me/data", "b": "me/data"})
    assert "me/nothing" not in hub.repositories


def test_a_wrong_token(hub, model):
    for push in (model.push_to_hub, model.push_merged_to_hub):
        with pytest.raises(HfHubHTTPError, match="Invalid username or password"):
            push("me/wrong", token="hf_wrong")
    assert "me/wrong" not in hub.repositories


UNREACHABLE = {
    "no such repository": {"id": "me/none"},
    "no such revision": {"id": "me/a", "revision": "none"},
    "private": {"id": "me/hidden"},
}


@pytest.mark.parametrize("kind", UNREACHABLE)
@pytest.mark.parametrize("config", [lambda e: TintConfig(experts={"a": e}), lambda e: DtsConfig(expert=e)])
def test_experts_that_cannot_be_reached(hub, monkeypatch, kind, config):
    base = load("me/base")
    if kind == "private":
        load("me/a").push_to_hub("me/hidden", private=True)
        monkeypatch.delenv("HF_TOKEN")
    reference = UNREACHABLE[kind]
    match = (
        rf"Expert '.*': '{reference['id']}' is neither a local folder nor .* on the Hub\. Check the spelling, the rev"
    )
    with pytest.raises(ValueError, match=match):
        get_peft_model(base, config(reference))
    assert not hasattr(base, "peft_config")


@pytest.mark.parametrize("kind", UNREACHABLE)
def test_adapters_that_cannot_be_reached(hub, model, monkeypatch, kind):
    base, reference = load("me/base"), dict(UNREACHABLE[kind])
    if kind == "private":
        model.push_to_hub("me/hidden", private=True)
        monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match=f"Can't find 'adapter_config.json' at '{reference['id']}'"):
        PeftModel.from_pretrained(base, reference.pop("id"), **reference)


def test_a_merged_model_is_loaded_by_one_call_for_its_tasks(hub, model):
    model.push_merged_to_hub("merged")  # in the user's own name
    again = load_tasks("me/merged")
    model.merge_backbone()
    for task in TASKS:
        assert torch.equal(logits(again, task), logits(model, task))
    settings = json.loads(text_of(hub, "me/merged", "tint/adapter_config.json"))
    assert settings["base_model_name_or_path"] == "me/merged"
