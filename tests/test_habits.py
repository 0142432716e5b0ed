"""What people are used to from transformers' Trainer."""

import os
import signal

import numpy as np
import pytest
import torch
import transformers as T
from datasets import Dataset
from models import make_experts

import peft_tint
from peft_tint import TintTrainer, TintTrainingArguments

BERT = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


def texts(seed=0, number=20):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 30, (number, 5), generator=generator)
    labels = torch.randint(0, 3, (number,), generator=generator)
    return [{"input_ids": row, "label": label} for row, label in zip(ids.tolist(), labels.tolist(), strict=True)]


class Listed(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class Read(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


class Drawn(torch.utils.data.IterableDataset):
    def __iter__(self):
        for _ in range(10):
            yield {"input_ids": torch.randint(4, 30, (5,))}


class Once(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.left = iter(rows)

    def __iter__(self):
        return self.left


def make_model(tasks=("a",), dtype=torch.float32):
    torch.manual_seed(0)
    base = T.BertForSequenceClassification(T.BertConfig(num_labels=3, **BERT)).to(dtype).eval()
    config = {"save_experts": "dts", "save_experts_kwargs": {"budget": 0.5}}
    return peft_tint.from_experts(base, make_experts(base, dict.fromkeys(tasks, 3)), **config)


def train(tmp_path, data, model=None, callbacks=(), resume=None, **settings):
    defaults = {"max_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 4, "disable_tqdm": True}
    arguments = TintTrainingArguments(str(tmp_path), **{**defaults, **settings})
    trainer = TintTrainer(model or make_model(), arguments, data, data, callbacks=callbacks)
    trainer.train(resume)
    return trainer


def state(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def streamed(rows):
    return Dataset.from_list(rows).to_iterable_dataset()


@pytest.mark.parametrize("kind", [Dataset.from_list, Listed, Read, streamed])
def test_one_dataset_for_one_task_of_any_kind(kind, tmp_path):
    data = kind(texts())
    trainer = train(tmp_path, data, head_steps=0)
    found = trainer.evaluate()
    assert trainer.progress.step == 4 and {"accuracy", "agreement"} <= found["a"].keys()
    same = train(tmp_path, {"a": data}, head_steps=0)
    assert all(torch.equal(value, state(same)[name]) for name, value in state(trainer).items())


def test_what_has_no_length_is_read_again_and_resumed(tmp_path):
    whole = train(tmp_path / "whole", Read(texts()), max_steps=8, save_steps=3)
    resumed = train(tmp_path / "whole", Read(texts()), max_steps=8, resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert all(torch.equal(value, state(resumed)[name]) for name, value in state(whole).items())
    drawn = [train(tmp_path / "drawn", Drawn(), max_steps=6, save_steps=2, head_steps=0)]
    drawn.append(
        train(tmp_path / "drawn", Drawn(), max_steps=6, resume=str(tmp_path / "drawn" / "checkpoint-2"), head_steps=0)
    )
    assert all(torch.equal(value, state(drawn[1])[name]) for name, value in state(drawn[0]).items())
    with pytest.raises(ValueError, match=r"Task 'a': its dataset gives nothing when it is read for the 2\. time"):
        train(tmp_path, Once(texts(number=8)))
    with pytest.raises(ValueError, match="`num_train_epochs` is set, and a dataset has no length; set `max_steps`"):
        train(tmp_path, Read(texts()), num_train_epochs=1)
    with pytest.raises(ValueError, match=r"Task 'a': the expert's outputs are cached beside a `datasets.Dataset`"):
        train(tmp_path, Listed(texts()), expert_rows="cache")
    with pytest.raises(ValueError, match="Task 'a': its samples are of the type tuple; they must be dicts"):
        train(tmp_path, Listed([(1, 2)] * 8))
    with pytest.raises(ValueError, match=r"`train_dataset` is a Listed; give {task: Dataset} for"):
        train(tmp_path, Listed(texts()), make_model(("a", "b")))


@pytest.mark.parametrize("epochs, accumulated, steps", [(1, 1, 5), (2.5, 1, 13), (2, 2, 5)])
def test_epochs_of_the_largest_task(epochs, accumulated, steps, tmp_path):
    data = {"a": Dataset.from_list(texts(number=20)), "b": Dataset.from_list(texts(number=7))}
    settings = {"num_train_epochs": epochs, "gradient_accumulation_steps": accumulated, "head_steps": 0}
    assert train(tmp_path, data, make_model(("a", "b")), **settings).progress.step == steps


@pytest.mark.parametrize("kind, rates", [("constant", [0, 0.5, 1, 1]), ("linear", [0, 0.5, 1, 0.5])])
def test_two_learning_rates_that_warm_up(kind, rates, tmp_path):
    seen = []

    class Recorder(T.TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer, **kwargs):
            seen.append([group["lr"] for group in optimizer.param_groups])

    settings = {"learning_rate": 0.1, "coefficient_learning_rate": 0.02, "warmup_steps": 2, "head_steps": 0}
    trainer = train(tmp_path, Dataset.from_list(texts()), None, [Recorder], lr_scheduler_type=kind, **settings)
    assert np.allclose(seen, [[0.02 * rate, 0.1 * rate] for rate in rates])
    moved = state(train(tmp_path, Dataset.from_list(texts()), coefficient_learning_rate=0.0, head_steps=0))
    start = state(trainer) | {n: p for n, p in make_model().named_parameters() if p.requires_grad}
    assert all(("tint_coefficients" in name) == torch.equal(value, start[name]) for name, value in moved.items())


def test_callbacks_of_transformers(tmp_path):
    """They see what happens, and may stop the training or ask for what Trainer's flow has."""
    seen = []

    class Asking(T.TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            seen.append((state.global_step, state.max_steps))
            control.should_evaluate = state.global_step == 1
            control.should_save = state.global_step == 2
            control.should_training_stop = state.global_step == 3
            return control

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            seen.append(sorted(name for name in metrics if "_a_" not in name and "normal" not in name))

        def on_log(self, args, state, control, logs, **kwargs):
            seen.append(logs["step"])

        def on_save(self, args, state, control, **kwargs):
            seen.append("saved")

        def on_train_end(self, args, state, control, **kwargs):
            seen.append("end")

    train(tmp_path, Dataset.from_list(texts()), None, [Asking()], head_steps=0)
    scores = ["eval_accuracy", "eval_agreement", "eval_expert_accuracy", "eval_mean_accuracy", "eval_mean_agreement"]
    assert seen[0] == (1, 4) and seen[1] == 1 and {*scores} <= {*seen[2]}
    assert seen[3:] == [(2, 4), 2, "saved", (3, 4), 3, "end"]
    assert os.listdir(tmp_path) == ["checkpoint-2"]
    with pytest.raises(ValueError, match="`callbacks` has a int"):
        train(tmp_path, Dataset.from_list(texts()), None, [3])


def test_one_callback_or_none_and_folders_of_others(tmp_path):
    data = Dataset.from_list(texts())
    train(tmp_path, data, callbacks=None)
    train(tmp_path, data, callbacks=T.PrinterCallback())
    train(tmp_path, data, max_steps=2, save_steps=2)
    train(tmp_path, data, callbacks=T.TrainerCallback())  # which asks for no checkpoint

    class Asking(T.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = state.global_step == 1

    with pytest.raises(ValueError, match="is of a training that came further than step 0"):
        train(tmp_path, data, callbacks=Asking())


def test_early_stopping(tmp_path):
    """Nothing improves at a rate of zero."""
    stopping, settings = T.EarlyStoppingCallback(2), {"eval_steps": 1, "load_best_model_at_end": True, "head_steps": 0}
    data = Dataset.from_list(texts())
    assert train(tmp_path, data, None, [stopping], max_steps=9, learning_rate=0.0, **settings).progress.step == 2


def test_ctrl_c_saves_a_checkpoint_and_ends_in_one_line(tmp_path):
    data, model = Dataset.from_list(texts()), make_model()

    def interrupt(trainer, logs):
        if logs["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit, match=r"Interrupted after step 4; `train\(resume_from_checkpoint=True\)` goes on"):
        train(tmp_path, data, model, [interrupt], max_steps=9, save_steps=100)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = train(tmp_path, data, max_steps=9, save_steps=100, resume=True)
    whole = train(tmp_path / "whole", data, max_steps=9)
    assert all(torch.equal(value, state(whole)[name]) for name, value in state(resumed).items())
    with pytest.raises(KeyboardInterrupt):  # without checkpoints it is heard at once
        train(tmp_path / "none", data, None, [interrupt], max_steps=9)


def test_log_lines(tmp_path, capsys):
    train(tmp_path, Dataset.from_list(texts()), disable_tqdm=False)
    error = capsys.readouterr().err
    assert "Training a on cpu in float32: " in error and "coefficients, and of each task classifier" in error
    assert "{'step': 2, 'loss': " in error and "loss_a" not in error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_16_bits_learn_by_steps_that_16_bits_do_not_resolve(dtype, tmp_path):
    """They come to within their own rounding of what a model in float32 learns."""
    found = []
    for kind in (torch.float32, dtype):
        model = make_model(dtype=kind)
        if kind == torch.float32:  # the same start
            model.load_state_dict(make_model(dtype=dtype).state_dict())
        before = state_of_head(model)
        train(tmp_path, Dataset.from_list(texts()), model, max_steps=30, head_steps=0, learning_rate=1e-4)
        found.append(state_of_head(model).float() - before.float())
    exact, rounded = found
    assert (rounded - exact).norm() < 0.5 * exact.norm() < exact.norm()


def state_of_head(model):
    return model.base_model.head_layers[0].modules_to_save["default"]["a"].weight.detach().clone()


def test_a_stray_column_is_left_out_and_told(tmp_path):
    """As Trainer leaves it out; here a collator of the user's has made a tensor of it."""
    rows = [row | {"index": number} for number, row in enumerate(texts())]

    def collate(samples):
        return {name: torch.tensor([sample[name] for sample in samples]) for name in samples[0]}

    arguments = TintTrainingArguments(str(tmp_path), max_steps=2, head_steps=0, disable_tqdm=True)
    data = Dataset.from_list(rows)
    trainer = TintTrainer(make_model(), arguments, data, data, data_collator=collate)
    with pytest.warns(
        UserWarning, match="Task 'a': the forward of a BertForSequenceClassification does not take index"
    ):
        trainer.train()
        assert trainer.evaluate()["a"]["agreement"] > 0
