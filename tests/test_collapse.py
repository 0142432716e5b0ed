"""Measures that need no labels, and the guard against collapse."""

import copy
import math
from functools import partial

import pytest
import torch
from datasets import Dataset
from torch import nn

import peft_tint
from peft_tint import TintTrainer, TintTrainingArguments
from peft_tint.training.collapse import CollapseGuard, Window, perplexity
from peft_tint.training.rows import Rows

CLASSES = {"a": 3, "b": 5}


class Classifier(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.fc = nn.Linear(32, classes)

    def forward(self, x):
        return self.fc(self.body(x))


def sample(task, rows, seed):
    """Points around one centre a class, near enough to each other for some to be taken for another class."""
    centres = torch.randn(CLASSES[task], 8, generator=torch.Generator().manual_seed(CLASSES[task]))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES[task], (rows,), generator=generator)
    return centres[labels] + 0.7 * torch.randn(rows, 8, generator=generator), labels


@pytest.fixture(scope="module")
def networks():
    """A base and experts fine-tuned from it."""
    torch.manual_seed(0)
    base, experts = Classifier(2), {}
    for task, classes in CLASSES.items():
        expert = experts[task] = Classifier(classes)
        expert.body.load_state_dict(base.body.state_dict())
        optimizer, (x, labels) = torch.optim.Adam(expert.parameters(), 1e-2), sample(task, 300, seed=0)
        for _ in range(150):
            optimizer.zero_grad()
            nn.functional.cross_entropy(expert(x), labels).backward()
            optimizer.step()
    return base, experts


def make_data(seed):
    columns = {task: sample(task, 160, seed) for task in CLASSES}
    return {task: Dataset.from_dict({"x": x.tolist(), "label": y.tolist()}) for task, (x, y) in columns.items()}


def make_trainer(networks, tmp_path, objective="entropy", **settings):
    base, experts = networks
    model = peft_tint.from_experts(copy.deepcopy(base), experts, coefficient_init=0.5, tint_layer="fc")
    defaults = {"max_steps": 40, "per_device_train_batch_size": 16, "logging_steps": 5, "disable_tqdm": True}
    defaults |= {"head_steps": 0, "lr_scheduler_type": "constant"}
    arguments = TintTrainingArguments(output_dir=str(tmp_path), **{**defaults, **settings})
    return TintTrainer(model, arguments, make_data(1), make_data(2), objective)


def accuracy(trainer):
    return trainer.evaluate()["mean"]["accuracy"]


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_perplexity_is_the_number_of_classes_in_use():
    assert perplexity([7, 0, 0]) == 1
    assert perplexity([4, 4, 4]) == pytest.approx(3)
    assert perplexity([1, 3]) == pytest.approx(math.exp(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75))))


def test_a_window_is_the_sum_of_its_batches():
    window, ours, experts = Window(), torch.tensor([0, 0, 1, 0]), torch.tensor([0, 1, 2, 0])
    for part in (slice(0, 1), slice(1, 4)):
        window.add_classes("a", ours[part], experts[part], 4)
    window.add_classes("b", ours, ours, 2)
    window.add("a", loss=torch.tensor(1.0))
    window.add("a", loss=torch.tensor(3.0))
    window.add("b", loss=torch.tensor(5.0))
    window.fetch()
    spread = perplexity([3, 1]) / perplexity([2, 1, 1])
    assert window.per_task() == {"loss_a": 2, "loss_b": 5, "spread_a": pytest.approx(spread), "spread_b": 1}
    assert window.summary() == {"loss": 3, "spread": pytest.approx((1 + spread) / 2)}


@pytest.mark.parametrize("objective", ["entropy", "confident_pseudo_label"])
def test_logged_measures_are_those_of_the_batches_before_their_update(networks, tmp_path, objective):
    """One step on whole datasets, against the outputs of the start and of the experts."""
    settings = {"max_steps": 1, "per_device_train_batch_size": 160, "update": "joint", "collapse_guard": 0.5}
    trainer = make_trainer(networks, tmp_path, objective, **settings)
    model, before, expected = trainer.model.eval(), trainer.model.coefficients().values, {"agreement": [], "spread": []}
    for task, dataset in trainer.train_dataset.items():
        x = torch.tensor(dataset["x"])
        model.set_task(task)
        with torch.no_grad():
            classes, experts = model(x).argmax(-1), networks[1][task](x).argmax(-1)
        counts = [[int((values == c).sum()) for c in range(CLASSES[task])] for values in (classes, experts)]
        expected["agreement"].append((classes == experts).float().mean().item())
        expected["spread"].append(perplexity(counts[0]) / perplexity(counts[1]))
    trainer.train()
    entry = trainer.log_history[0]
    for name, values in expected.items():
        assert [entry[f"{name}_{task}"] for task in CLASSES] == pytest.approx(values)
        assert entry[name] == pytest.approx(sum(values) / 2) and 0.5 < entry[name] < 1.1
    assert entry["start_agreement"] == entry["agreement"]
    drift = (model.coefficients().values - before).abs().mean(1)
    assert [entry[f"drift_{task}"] for task in CLASSES] == pytest.approx(drift.tolist()) and entry["drift"] > 0
    assert ("kept" in entry) == (objective == "confident_pseudo_label")


@pytest.mark.parametrize("update", ["sequential", "joint"])
def test_the_guard_keeps_what_entropy_minimisation_loses(networks, tmp_path, update):
    """With a learning rate that is too large."""
    settings = {"learning_rate": 0.5, "update": update}
    trainer = make_trainer(networks, tmp_path, **settings)
    start = accuracy(trainer)
    trainer.train()
    assert accuracy(trainer) < start - 0.1 and trainer.log_history[-1]["step"] == 40
    assert trainer.log_history[-1]["spread"] < 0.9 and trainer.log_history[-1]["agreement"] < start - 0.1

    trainer = make_trainer(networks, tmp_path, collapse_guard=0.1, **settings)
    result, entry = trainer.train(), trainer.log_history[-1]
    assert entry["step"] == result.global_step < 40 and max(entry.get(f"collapse_{task}", 0) for task in CLASSES) > 0.1
    assert accuracy(trainer) >= start


def test_the_guard_goes_back_to_the_best_state(networks, tmp_path):
    """A training that first helps and then harms, back to what it had become by then."""
    calls = []

    def turning(logits, expert_logits, mask):
        calls.append(1)
        if len(calls) <= 40:  # 20 steps of two tasks
            return peft_tint.OBJECTIVES["pseudo_label"](logits, expert_logits)
        return -peft_tint.OBJECTIVES["entropy"](logits)

    settings = {"learning_rate": 0.03}
    trainer = make_trainer(networks, tmp_path, turning, collapse_guard=0.1, max_steps=100, **settings)
    start = accuracy(trainer)
    trainer.train()
    best = trainer.log_history[-1]["best_step"]
    assert 0 < best <= 20 < trainer.log_history[-1]["step"] and accuracy(trainer) > start
    short = make_trainer(networks, tmp_path, "pseudo_label", max_steps=best, **settings)
    short.train()
    assert all(torch.equal(value, state(short.model)[name]) for name, value in state(trainer.model).items())


def test_the_guard_changes_no_training_that_goes_well(networks, tmp_path):
    states = []
    for guard in (None, 0.05):
        settings = {"collapse_guard": guard, "learning_rate": 0.03}
        trainer = make_trainer(networks, tmp_path, "confident_pseudo_label", **settings)
        trainer.train()
        assert trainer.log_history[-1]["step"] == 40 and "best_step" not in trainer.log_history[-1]
        states.append(state(trainer.model))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_rule():
    guard = CollapseGuard(0.1, "start")
    for gains, step, best in (
        ({"a": -0.1, "b": 0.1}, 10, (0, 0, "start")),
        ({"a": 0.3, "b": 0.1}, 20, (10, 0.2, 10)),
        ({"b": 0.1}, 30, (10, 0.2, 10)),
        ({"a": -0.1, "b": 0.9}, 40, (30, 0.4, 30)),
    ):
        assert guard.collapsed(gains, step, step) == []
        assert guard.best == (best[0], pytest.approx(best[1]), best[2])
    assert guard.collapsed({"a": 0.5, "b": -0.11}, 50, 50) == ["b"] and guard.best.step == 30


def test_where_there_is_nothing_to_compare(networks, tmp_path, monkeypatch):
    kinds = {"a": "classes", "b": "number"}
    monkeypatch.setattr(Rows, "problem", lambda self, task, output=None: kinds[task])
    make = partial(make_trainer, networks, tmp_path, collapse_guard=0.1, max_steps=1)
    trainer = make()
    trainer.train()
    entry = trainer.log_history[0]
    assert {"agreement_a", "spread_a", "loss_b", "drift_b"} < entry.keys() and "agreement_b" not in entry
    kinds["a"] = "number"
    with pytest.raises(ValueError, match=r"`collapse_guard` is 0.1, and there are no predicted classes"):
        make()
    for share in (0.0, 1.0, -1):
        with pytest.raises(ValueError, match=r"must be a share between 0 and 1"):
            TintTrainingArguments(collapse_guard=share)
