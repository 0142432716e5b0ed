"""A training that was stopped and resumed is the one that was never stopped, to the last bit."""

import filecmp
import itertools
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from datasets import Dataset
from models import ARCHITECTURES, IDS, make_experts
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import peft_tint
from peft_tint import TintConfig, TintTrainer, TintTrainingArguments
from peft_tint import checkpoints as checkpoints_module

STEPS = 7
SETTINGS = {
    "sequential": {"update": "sequential"},
    "joint": {"update": "joint", "gradient_accumulation_steps": 2, "lr_scheduler_type": "linear"},
    "heads": {"update": "sequential", "head_steps": 3, "lr_scheduler_type": "cosine"},
    "best": {
        "update": "joint",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "lr_scheduler_type": "cosine",
        "collapse_guard": 0.9,
    },
}


class Stopped(Exception):
    pass


class Stopping(TintTrainer):
    """Breaks off before the update of a number."""

    stop_at = None

    def _prepare(self):
        super()._prepare()
        step, numbers = self.updates.step, itertools.count(1)

        def stopping_step():
            if next(numbers) == self.stop_at:
                raise Stopped
            step()

        self.updates.step = stopping_step


@pytest.fixture(autouse=True)
def _no_garbage_collection(monkeypatch):
    """Accelerate collects garbage after each training, for longer than these take."""
    monkeypatch.setattr("accelerate.utils.memory.gc.collect", lambda: 0)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"))


def save_bert(folder):
    """A BERT of one layer and two experts, in folders: (base folder, {task: folder})."""
    base = ARCHITECTURES["bert"].build(num_hidden_layers=1)
    base.save_pretrained(folder / "base")
    experts = make_experts(base, {"b": 5, "a": 2})
    for task, expert in experts.items():
        expert.save_pretrained(folder / task)
    return str(folder / "base"), {task: str(folder / task) for task in experts}


def load(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


def make_data(tasks):
    """Tasks of other sizes, so that their epochs end at other steps, with short batches at the end."""
    generator = torch.Generator().manual_seed(0)
    sizes = dict(zip(tasks, (11, 6), strict=True))
    return {
        task: Dataset.from_dict({"input_ids": torch.randint(2, 64, (size, 6), generator=generator).tolist()})
        for task, size in sizes.items()
    }


def noisy(batch):
    """A transform that draws from all three generators."""
    ids = torch.tensor(batch["input_ids"])
    ids[:, 0] = torch.randint(2, 64, (len(ids),))
    ids[:, 1] = torch.from_numpy(np.random.randint(2, 64, len(ids)))
    ids[:, 2] = random.randint(2, 63)
    return {"input_ids": ids}


def make_trainer(bert, folder, stop_at=None, data=None, objective="confident_pseudo_label", **settings):
    model = get_peft_model(load(bert[0]), TintConfig(experts=bert[1], coefficient_init=0.1))
    data = data or make_data(bert[1])
    defaults = {"max_steps": STEPS, "per_device_train_batch_size": 4, "logging_steps": 3, "save_steps": 2}
    defaults |= {"head_steps": 0, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    arguments = TintTrainingArguments(output_dir=str(folder), disable_tqdm=True, **{**defaults, **settings})
    trainer = Stopping(model, arguments, data, data, objective)
    trainer.stop_at = stop_at
    return trainer


def state(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_same(trainer, expected):
    ours, theirs = state(trainer), state(expected)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert trainer.log_history == expected.log_history
    assert differing_files(trainer, expected) == []


def differing_files(trainer, expected):
    """Of the last checkpoint."""
    ours, theirs = (os.path.join(t.args.output_dir, f"checkpoint-{t.args.max_steps}") for t in (trainer, expected))
    files = sorted(os.listdir(theirs))
    assert {"trainer_state.safetensors", "trainer_state.json", "random_states.json"} < set(files)
    _, different, missing = filecmp.cmpfiles(ours, theirs, files, shallow=False)
    return different + missing


def stop_and_resume(bert, folder, stops, **settings):
    """Stopped at each of `stops` updates in turn, each time in a new model and trainer."""
    for i, stop_at in enumerate(stops):
        trainer = make_trainer(bert, folder, stop_at, **settings)
        with pytest.raises(Stopped):
            trainer.train(resume_from_checkpoint=i > 0)
        random.seed(i), np.random.seed(i), torch.manual_seed(i)  # as another process would find them
    trainer = make_trainer(bert, folder, **settings)
    trainer.train(resume_from_checkpoint=True)
    return trainer


@pytest.mark.parametrize("name", SETTINGS)
def test_resumed_is_never_stopped(bert, tmp_path, name):
    """Stopped once: right after a checkpoint, a step later, and in the last step."""
    settings = SETTINGS[name]
    expected = make_trainer(bert, tmp_path / "straight", **settings)
    result = expected.train()
    assert result.global_step == STEPS and len(expected.log_history) >= 3
    updates = 2 if settings["update"] == "sequential" else 1
    for stop_at in (2 * updates + 1, 5 * updates, 7 * updates):
        trainer = stop_and_resume(bert, tmp_path / f"stopped {stop_at}", [stop_at], **settings)
        assert_same(trainer, expected)


@pytest.mark.parametrize("name", SETTINGS)
def test_stopped_many_times(bert, tmp_path, name):
    settings = SETTINGS[name]
    expected = make_trainer(bert, tmp_path / "straight", **settings)
    loss = expected.train().training_loss
    updates = 2 if settings["update"] == "sequential" else 1
    stops = [3 * updates, 2 * updates, 3 * updates, updates]  # the later ones are counted from the checkpoint
    trainer = stop_and_resume(bert, tmp_path / "stopped", stops, **settings)
    assert_same(trainer, expected)
    again = make_trainer(bert, tmp_path / "stopped", **settings)  # from the checkpoint at the end: nothing is left
    assert again.train(resume_from_checkpoint=True).training_loss == loss
    assert_same(again, expected)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # workers are forked
@pytest.mark.parametrize("workers", [0, 2])
def test_random_states_are_resumed(bert, tmp_path, workers):
    """Of the transforms, in this process or in workers, and of an objective."""

    def objective(logits, expert_logits, mask):
        return peft_tint.OBJECTIVES["pseudo_label"](logits + torch.randn_like(logits), expert_logits, mask)

    data = {task: dataset.with_transform(noisy) for task, dataset in make_data(bert[1]).items()}
    settings = {"data": data, "objective": objective, "dataloader_num_workers": workers}
    expected = make_trainer(bert, tmp_path / "straight", **settings)
    expected.train()
    trainer = stop_and_resume(bert, tmp_path / "stopped", [2 * 5], **settings)
    assert_same(trainer, expected)


@pytest.mark.parametrize("stop_at", [4, 8])
def test_the_guard_against_collapse_is_resumed(bert, tmp_path, stop_at):
    """Helped for two windows of two steps and harmed from then on, until training goes back to the best state."""
    calls = itertools.count()

    def objective(logits, expert_logits, mask):
        loss = peft_tint.OBJECTIVES["pseudo_label"](logits, expert_logits)
        return loss if next(calls) < 8 else -loss

    settings = {"objective": objective, "collapse_guard": 0.02, "logging_steps": 2, "save_steps": 1}
    settings |= {"max_steps": 50, "learning_rate": 0.3}
    expected = make_trainer(bert, tmp_path / "straight", **settings)
    assert 4 < expected.train().global_step < 50 and expected.log_history[-1]["best_step"] > 0
    calls = itertools.count()
    with pytest.raises(Stopped):
        make_trainer(bert, tmp_path / "stopped", stop_at, **settings).train()
    calls = itertools.count(2 * ((stop_at - 1) // 2))  # as many as up to the checkpoint
    trainer = make_trainer(bert, tmp_path / "stopped", **settings)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.log_history == expected.log_history
    assert all(torch.equal(value, state(expected)[name]) for name, value in state(trainer).items())


def test_a_checkpoint_loads_as_an_adapter(bert, tmp_path):
    trainer = make_trainer(bert, tmp_path)
    trainer.train()
    loaded = PeftModel.from_pretrained(load(bert[0]), tmp_path / f"checkpoint-{STEPS}")
    for task in bert[1]:
        for model in (loaded, trainer.model):
            model.set_task(task)
        assert torch.equal(loaded(**IDS).logits, trainer.model(**IDS).logits)
    assert torch.equal(loaded.coefficients().values, trainer.model.coefficients().values)


def test_a_model_loaded_from_a_checkpoint_resumes_too(bert, tmp_path):
    """Though it is not as it was at the start."""
    expected = make_trainer(bert, tmp_path / "straight", **SETTINGS["best"])
    expected.train()
    with pytest.raises(Stopped):
        make_trainer(bert, tmp_path / "stopped", 5, **SETTINGS["best"]).train()
    trainer = make_trainer(bert, tmp_path / "stopped", **SETTINGS["best"])
    folder = tmp_path / "stopped" / "checkpoint-4"
    trainer.model = PeftModel.from_pretrained(load(bert[0]), folder, is_trainable=True)
    trainer.train(resume_from_checkpoint=True)
    assert_same(trainer, expected)


def test_no_checkpoint_is_a_pickle(bert, tmp_path):
    make_trainer(bert, tmp_path).train()
    for folder in tmp_path.iterdir():
        assert {file.suffix for file in folder.iterdir()} == {".safetensors", ".json", ".md"}


def test_save_steps_and_limit(bert, tmp_path):
    make_trainer(bert, tmp_path / "all").train()
    assert sorted(os.listdir(tmp_path / "all")) == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-7"]
    (tmp_path / "two" / "checkpoint-1-mine").mkdir(parents=True)
    make_trainer(bert, tmp_path / "two", save_total_limit=2).train()
    assert sorted(os.listdir(tmp_path / "two")) == ["checkpoint-1-mine", "checkpoint-6", "checkpoint-7"]


def test_resuming_from_a_folder_goes_on_with_more_steps(bert, tmp_path):
    expected = make_trainer(bert, tmp_path / "straight")
    expected.train()
    make_trainer(bert, tmp_path / "short", max_steps=4).train()
    trainer = make_trainer(bert, tmp_path / "long")
    trainer.train(resume_from_checkpoint=tmp_path / "short" / "checkpoint-2")
    assert all(torch.equal(value, state(expected)[name]) for name, value in state(trainer).items())
    assert "checkpoint-2" not in os.listdir(tmp_path / "long")


def test_what_cannot_be_resumed_is_told(bert, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="`resume_from_checkpoint` is ''"):
        make_trainer(bert, out).train(resume_from_checkpoint="")
    with pytest.raises(ValueError, match=r"There is no checkpoint in .*/out'; start anew"):
        make_trainer(bert, out).train(resume_from_checkpoint=True)
    make_trainer(bert, out).train()
    with pytest.raises(ValueError, match=r"checkpoint-2' is of a training that came further than step 0"):
        make_trainer(bert, out).train()
    with pytest.raises(ValueError, match=r"checkpoint-6' is of a training that came further than step 4"):
        make_trainer(bert, out).train(resume_from_checkpoint=str(out / "checkpoint-4"))
    resume = {"resume_from_checkpoint": str(out / "checkpoint-7")}
    with pytest.raises(ValueError, match=r"`seed` is 1, and .* was made with 42"):
        make_trainer(bert, out, seed=1).train(**resume)
    with pytest.raises(ValueError, match=r"`load_best_model_at_end` is True, and .* was made with False"):
        make_trainer(bert, out, load_best_model_at_end=True, eval_steps=1).train(**resume)
    with pytest.raises(ValueError, match=r"the objective is 'entropy', and .* 'confident_pseudo_label'"):
        make_trainer(bert, out, objective="entropy").train(**resume)
    data = dict(reversed(make_data(bert[1]).items()))  # the order of the tasks decides, too
    with pytest.raises(ValueError, match=r"samples of each task is \[\['a', 6\], .* made with \[\['b', 11\], "):
        make_trainer(bert, out, data=data).train(**resume)
    with pytest.raises(ValueError, match=r"`max_steps` is 6, and .* of step 7"):
        make_trainer(bert, out, max_steps=6).train(**resume)
    make_trainer(bert, tmp_path / "falling", lr_scheduler_type="cosine").train()
    with pytest.raises(ValueError, match=r"`max_steps` is 9, and .* was made with 7"):
        trainer = make_trainer(bert, tmp_path / "falling", lr_scheduler_type="cosine", max_steps=9)
        trainer.train(resume_from_checkpoint=True)
    trainer = make_trainer(bert, out)
    trainer.model = get_peft_model(load(bert[0]), TintConfig(experts=bert[1], tint_layer=[]))
    with pytest.raises(ValueError, match="of another model: they differ in 'base_model"):
        trainer.train(**resume)
    shutil.copytree(bert[1]["a"], tmp_path / "a")
    weights = load_file(tmp_path / "a" / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, tmp_path / "a" / "model.safetensors")
    changed = {
        "transform": {"transform": "ties", "transform_kwargs": {"density": 0.5}},
        "coefficient_bounds": {"coefficient_bounds": [0, 0.5]},
        "experts_sha256": {"experts": {**bert[1], "a": str(tmp_path / "a")}},
    }
    for name, settings in changed.items():
        trainer.model = get_peft_model(load(bert[0]), TintConfig(**{"experts": bert[1], **settings}))
        with pytest.raises(ValueError, match=rf"`{name}` of the model is .* was made with .* Resume with the same"):
            trainer.train(**resume)
    held = peft_tint.from_experts(load(bert[0]), {task: load(folder) for task, folder in bert[1].items()})
    arguments = TintTrainingArguments(output_dir=str(tmp_path / "held"), save_steps=1, disable_tqdm=True)
    with pytest.raises(ValueError, match="held in memory, so a saved adapter could not say where they are"):
        TintTrainer(held, arguments, make_data(bert[1])).train()


@pytest.mark.parametrize("file", ["trainer_state.safetensors", "trainer_state.json", "random_states.json"])
def test_a_broken_checkpoint_is_refused(bert, tmp_path, file):
    make_trainer(bert, tmp_path, max_steps=1).train()
    path = tmp_path / "checkpoint-1" / file
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint-1' is no whole checkpoint"):
            make_trainer(bert, tmp_path, max_steps=1).train(resume_from_checkpoint=True)
    flipped = bytearray(whole)
    flipped[-6] ^= 1
    others = [flipped] if file.endswith(".safetensors") else [b"{}", b"[]", whole.replace(b"1", b"2")]
    for content in others:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint-1' is no whole checkpoint"):
            make_trainer(bert, tmp_path, max_steps=1).train(resume_from_checkpoint=True)
    path.unlink()
    with pytest.raises(ValueError, match=r"checkpoint-1' is no whole checkpoint"):
        make_trainer(bert, tmp_path, max_steps=1).train(resume_from_checkpoint=True)


def test_an_error_while_writing_leaves_the_checkpoint_before(bert, tmp_path, monkeypatch):
    """At each file of it, on its way to the disk."""
    expected = make_trainer(bert, tmp_path / "straight", max_steps=3, save_steps=1)
    expected.train()
    synced = checkpoints_module.sync
    for fail_at in itertools.count(1):
        calls, out = [], tmp_path / str(fail_at)

        def sync(path, calls=calls, fail_at=fail_at):
            calls.append(path)
            if "checkpoint-2" in str(path) and sum("checkpoint-2" in str(call) for call in calls) == fail_at:
                raise OSError("No space left on device")
            synced(path)

        monkeypatch.setattr(checkpoints_module, "sync", sync)
        try:
            make_trainer(bert, out, max_steps=3, save_steps=1).train()
            break
        except OSError:
            assert os.listdir(out) == ["checkpoint-1"]
        trainer = make_trainer(bert, out, max_steps=3, save_steps=1)
        monkeypatch.setattr(checkpoints_module, "sync", synced)
        trainer.train(resume_from_checkpoint=True)
        assert_same(trainer, expected)
    assert fail_at > 6


def test_saved_models_replace_older_ones_whole(bert, tmp_path, monkeypatch):
    trainer = make_trainer(bert, tmp_path, save_steps=None, max_steps=1)
    trainer.save_model()
    (tmp_path / "notes.txt").write_text("mine")
    before = load_file(tmp_path / "adapter_model.safetensors")
    trainer.train()
    monkeypatch.setattr(checkpoints_module, "sync", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.save_model()
    monkeypatch.undo()
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors", "notes.txt"}
    files |= {"coefficients.json", "coefficients.png"}
    after = load_file(tmp_path / "adapter_model.safetensors")
    assert set(os.listdir(tmp_path)) == files and all(torch.equal(before[name], after[name]) for name in before)
    trainer.save_model()
    after = load_file(tmp_path / "adapter_model.safetensors")
    assert set(os.listdir(tmp_path)) == files and any(not torch.equal(before[name], after[name]) for name in before)


KILLS = 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes to kill them")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_killed_at_random_moments(bert, tmp_path):
    """Each time a forked process trains until it is killed: after some steps and a random part of one, while it
    computes, writes a checkpoint or removes one. The next resumes from what is there."""
    settings = {"max_steps": 3 * KILLS, "save_steps": 1, "save_total_limit": 2}
    expected = make_trainer(bert, tmp_path / "straight", **settings)
    started = time.perf_counter()
    expected.train()
    a_step = (time.perf_counter() - started) / settings["max_steps"]
    out, chance, torn = tmp_path / "killed", random.Random(0), 0

    def train(write_to):
        trainer = make_trainer(bert, out, **settings)
        trainer._backward = lambda *args, backward=trainer._backward: (os.write(write_to, b"."), backward(*args))[1]
        trainer.train(resume_from_checkpoint=bool(checkpoints(out)))

    for _ in range(KILLS):
        read_from, write_to = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                train(write_to)
            finally:
                os._exit(1)
        os.close(write_to)
        for _ in range(2 * chance.randint(1, 2)):  # 2 backwards a step
            os.read(read_from, 1)
        time.sleep(chance.random() * a_step)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(read_from)
        assert os.WIFSIGNALED(status), "the training ended by itself"
        torn += any("incomplete" in name for name in os.listdir(out)) if out.exists() else 0
    trainer = make_trainer(bert, out, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert_same(trainer, expected)
    assert torn and len(os.listdir(out)) == 2  # of what was half-written nothing is left


def checkpoints(folder):
    return [name for name in os.listdir(folder) if name.startswith("checkpoint-")] if folder.is_dir() else []
