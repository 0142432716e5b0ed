"""Batches that come one by one: predicted and adapted to by `TintTrainer.step`."""

import gc
import itertools

import psutil
import pytest
import torch
from datasets import Dataset
from models import make_experts
from torch import nn

import peft_tint
from peft_tint import OBJECTIVES, TintTrainer, TintTrainingArguments


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(self.body(x).tanh())


def make_trainer(objective="confident_pseudo_label", data=None, callbacks=(), **settings):
    torch.manual_seed(0)
    base = Network()
    experts = make_experts(base, ["a", "b"], scale=0.5)
    model = peft_tint.from_experts(base, experts, tint_layer="fc", coefficient_bounds=[0.2, 0.4])
    settings = {"head_steps": 0, "lr_scheduler_type": "constant", **settings}
    arguments = TintTrainingArguments(disable_tqdm=True, **settings)
    return TintTrainer(model, arguments, data, objective=objective, callbacks=callbacks)


def state(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def count_forwards(trainer):
    calls = []
    trainer.model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    return calls


@pytest.mark.parametrize("objective", sorted(OBJECTIVES.keys() - {"feature_l1", "bce"}))
def test_a_stream_of_the_batches_of_a_training_is_that_training(tmp_path, objective):
    """One forward with gradients for each, and one of the expert where the objective takes it and it is not there."""
    x = {task: torch.randn(20, 4, generator=torch.Generator().manual_seed(i)) for i, task in enumerate("ab")}
    data = {task: Dataset.from_dict({"x": values.tolist()}) for task, values in x.items()}
    settings = {"max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 0.2, "output_dir": str(tmp_path)}
    trained, batches = make_trainer(objective, data, **settings), []
    trained._backward = lambda *args, original=trained._backward: (batches.append(args[:2]), original(*args))[1]
    trained.train()
    assert len(batches) == 24
    for cached in (True, False):
        stream = make_trainer(objective)
        stream.args.learning_rate = 0.2
        calls, logits = count_forwards(stream), []
        for task, batch in batches:
            before = state(stream)
            batch = dict(batch) if cached else {"x": batch["x"]}
            logits.append(stream.step(task, {**batch, "labels": torch.zeros(len(batch["x"]))}))
        teacher = [] if cached or objective == "entropy" else [False]
        assert calls == [*teacher, True] * 24
        torch.testing.assert_close(state(stream), state(trained), rtol=0, atol=0 if cached else 1e-5)
        assert any(not torch.equal(before[name], value) for name, value in state(stream).items())
    values = stream.model.coefficients().values
    assert values.clamp(0.2, 0.4).equal(values) and (values != values.clamp(0.21, 0.39)).any()  # projected


def test_the_log_of_a_stream():
    seen = []
    trainer = make_trainer(logging_steps=2, callbacks=[lambda trainer, logs: seen.append(logs)])
    for i in range(210):
        trainer.step("ab"[i % 2], {"x": torch.randn(3, 4)})
    assert [logs["step"] for logs in seen] == list(range(2, 211, 2)) and trainer.log_history == seen[-100:]
    assert {"loss_a", "kept_b", "agreement_b", "spread_a", "drift"} < seen[0].keys()


def test_a_stream_that_has_collapsed_is_only_predicted():
    """From the best state on, without another update, in one forward."""
    calls = itertools.count()

    def harmful(logits, expert_logits, mask):
        sign = 1 if next(calls) < 20 else -1
        return sign * OBJECTIVES["pseudo_label"](logits, expert_logits)

    settings = {"collapse_guard": 0.2, "logging_steps": 10, "learning_rate": 0.05}
    trainer, generator = make_trainer(harmful, **settings), torch.Generator().manual_seed(0)
    batches = [("ab"[i % 2], {"x": torch.randn(16, 4, generator=generator)}) for i in range(200)]
    at = {}
    for i, (task, batch) in enumerate(batches):
        at[i] = state(trainer)
        trainer.step(task, batch)
        if "best_step" in (trainer.log_history or [{}])[-1]:
            break
    best = trainer.log_history[-1]["best_step"]
    assert 0 < best <= 20 < i < 199
    assert all(torch.equal(value, at[best][name]) for name, value in state(trainer).items())
    forwards, entries = count_forwards(trainer), len(trainer.log_history)
    with torch.no_grad():
        trainer.model.set_task("a")
        expected = trainer.model(**batches[0][1])
    assert torch.equal(trainer.step("a", batches[0][1]), expected) and forwards == [False, False]
    assert all(torch.equal(value, at[best][name]) for name, value in state(trainer).items())
    assert len(trainer.log_history) == entries


def test_a_stream_has_no_last_step():
    trainer = make_trainer(lr_scheduler_type="linear", max_steps=1)
    for _ in range(3):
        trainer.step("a", {"x": torch.randn(2, 4)})
        assert trainer.updates.optimizer.param_groups[0]["lr"] == 1e-3


def test_memory_does_not_grow_with_the_batches():
    trainer, process, sizes = make_trainer(collapse_guard=0.9), psutil.Process(), {}
    for i in range(1, 3001):
        trainer.step("ab"[i % 2], {"x": torch.randn(2, 4)})
        if i in (1500, 3000):
            gc.collect()
            sizes[i] = process.memory_info().rss, len(gc.get_objects())
    assert sizes[3000][1] - sizes[1500][1] < 100  # Python's objects, tensors among them
    assert sizes[3000][0] - sizes[1500][0] < 1e7  # bytes: less than a kept graph a batch; pytest itself takes some
