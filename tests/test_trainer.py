import copy
import dataclasses
import math

import pytest
import torch
from datasets import Dataset, load_from_disk
from models import IDS, SMALL, Architecture, make_experts, transformers_model
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForTokenClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

import peft_tint
from peft_tint import OBJECTIVES, TintConfig, TintTrainer, TintTrainingArguments

CLASSES = {"a": 2, "score": 3, "b": 5}


def load(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


def make_data(bert, rows=48, seed=0):
    """Random sentences labelled by the experts, so that an expert's accuracy is 1."""
    generator = torch.Generator().manual_seed(seed)
    data = {}
    for task, folder in bert[1].items():
        ids = torch.randint(2, 64, (rows, 6), generator=generator)
        with torch.no_grad():
            labels = load(folder)(ids).logits.argmax(-1)
        data[task] = Dataset.from_dict({"input_ids": ids.tolist(), "label": labels.tolist(), "text": ["-"] * rows})
    return data


@pytest.fixture
def model(bert):
    return get_peft_model(load(bert[0]), TintConfig(experts=bert[1], coefficient_init=0.1))


@pytest.fixture(scope="module")
def data(bert):
    return make_data(bert)


def arguments(tmp_path, **settings):
    """The joint steps alone, at one learning rate."""
    defaults = {"max_steps": 10, "head_steps": 0, "lr_scheduler_type": "constant", "disable_tqdm": True}
    defaults["per_device_train_batch_size"] = 16
    return TintTrainingArguments(output_dir=str(tmp_path), **{**defaults, **settings})


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("update", ["sequential", "joint"])
def test_training_raises_agreement_and_accuracy(bert, model, data, tmp_path, update):
    """From heads that know nothing, on data of which a part is held out."""
    for module in model.base_model.tint_layers[0].modules_to_save["default"].copies.values():
        torch.nn.init.normal_(module.weight, std=0.1)
    trainer = TintTrainer(model, arguments(tmp_path, max_steps=60, update=update), data, make_data(bert, seed=9))
    before = trainer.evaluate()
    base_weights = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    result = trainer.train()
    after = trainer.evaluate()
    assert result.global_step == 60 and trainer.log_history[-1]["loss"] < trainer.log_history[0]["loss"]
    assert after["mean"]["agreement"] > before["mean"]["agreement"] + 0.1
    for task in CLASSES:
        metrics = after[task]
        assert metrics["expert_accuracy"] == 1 and metrics["accuracy"] == metrics["agreement"]
        assert metrics["normalized_accuracy"] == metrics["accuracy"]
    assert all(torch.equal(p, base_weights[n]) for n, p in model.named_parameters() if n in base_weights)
    values = model.coefficients().values
    assert (values >= 0).all() and (values <= 1).all() and (values != 0.1).any()


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "bce"])
@pytest.mark.parametrize("update", ["sequential", "joint"])
def test_every_objective_lowers_its_loss(model, data, tmp_path, objective, update):
    settings = arguments(tmp_path, max_steps=30, update=update, logging_steps=5)
    trainer = TintTrainer(model, settings, data, objective=objective)
    trainer.train()
    assert trainer.log_history[-1]["loss"] < trainer.log_history[0]["loss"]
    assert ("kept" in trainer.log_history[0]) == (objective == "confident_pseudo_label")


def test_same_seed_same_result_another_seed_another(bert, data, tmp_path):
    states = []
    for seed in (1, 1, 2):
        model = get_peft_model(load(bert[0]), TintConfig(experts=bert[1]))
        TintTrainer(model, arguments(tmp_path, seed=seed), data).train()
        states.append(state(model))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_one_step_is_adam_on_the_objective(bert, data, tmp_path):
    """Joint update with full batches, against the same step written out with plain autograd and Adam."""
    model = get_peft_model(load(bert[0]), TintConfig(experts=bert[1], coefficient_bounds=None)).eval()
    trainer = TintTrainer(model, arguments(tmp_path, max_steps=1, update="joint", per_device_train_batch_size=48), data)
    trainer.train()
    plain = get_peft_model(load(bert[0]), TintConfig(experts=bert[1], coefficient_bounds=None)).eval()
    optimizer = torch.optim.Adam([p for p in plain.parameters() if p.requires_grad], 3e-3)
    for task, dataset in data.items():
        ids = torch.tensor(dataset["input_ids"])
        with torch.no_grad():
            expert_logits = load(bert[1][task])(ids).logits
        plain.set_task(task)
        OBJECTIVES["soft_pseudo_label"](plain(input_ids=ids).logits, expert_logits).backward()
    optimizer.step()
    trained = state(model)
    for name, parameter in state(plain).items():
        # Adam's first step is lr * sign(gradient): compare where the gradient is not rounding noise
        gradient = dict(plain.named_parameters())[name].grad
        clear = gradient.abs() > 1e-6
        torch.testing.assert_close(trained[name][clear], parameter[clear], rtol=1e-4, atol=1e-5, msg=name)


def test_accumulated_batches_are_one_batch(bert, data, tmp_path):
    states = []
    for size, accumulate in ((48, 1), (24, 2)):
        model = get_peft_model(load(bert[0]), TintConfig(experts=bert[1]))
        settings = {"gradient_accumulation_steps": accumulate, "per_device_train_batch_size": size, "max_steps": 1}
        TintTrainer(model, arguments(tmp_path, **settings), data, objective="pseudo_label").train()
        states.append(state(model))
    for name in states[0]:
        difference = (states[0][name] - states[1][name]).abs()
        assert (difference < 1e-4).float().mean() > 0.95, name  # Adam's first step only has signs: noise may flip some


def test_other_tasks_tint_layers_stand_still(model, data, tmp_path):
    """Neither a zero gradient nor momentum moves the head of a task that is not the one being updated."""
    settings = arguments(tmp_path, max_steps=3)
    trainer = TintTrainer(model, settings, {task: data[task] for task in ("a", "b")})
    trainer.train()
    before = state(model)
    for _ in range(2):
        trainer.step("a", {"input_ids": IDS["input_ids"]})
    trainer.step("b", {"input_ids": IDS["input_ids"]})
    between = state(model)
    optimizer_state = {n: str(trainer.updates.optimizer.state[p]) for n, p in model.named_parameters() if "b_task" in n}
    trainer.step("a", {"input_ids": IDS["input_ids"]})
    after = state(model)
    for name in after:
        if "score_task" in name and ".modules_to_save" in name:
            assert torch.equal(before[name], after[name])
        if "b_task" in name and ".modules_to_save" in name:
            assert torch.equal(between[name], after[name])
    assert optimizer_state == {
        n: str(trainer.updates.optimizer.state[p]) for n, p in model.named_parameters() if "b_task" in n
    }


def test_nothing_kept_is_no_update(bert, tmp_path):
    """An expert less sure than the merged model, and of another class everywhere: zero loss, and nothing moves."""
    model = get_peft_model(load(bert[0]), TintConfig(experts=bert[1]))
    trainer = TintTrainer(model, arguments(tmp_path), objective="confident_pseudo_label")
    trainer.step("b", IDS)  # so that Adam has momentum
    head = model.base_model.head_layers[0]
    with torch.no_grad():
        for modules, bias in ((head.modules_to_save, [50.0, 0, 0, 0, 0]), (head.expert_modules, [0, 0.1, 0, 0, 0])):
            modules["default"]["b"].weight.zero_()
            modules["default"]["b"].bias.copy_(torch.tensor(bias))
    before = state(model)
    trainer.step("b", IDS)
    assert all(torch.equal(before[name], value) for name, value in state(model).items())


def test_step_returns_the_logits_before_the_update(model, tmp_path):
    trainer = TintTrainer(model, arguments(tmp_path))
    model.eval().set_task("b")
    with torch.no_grad():
        expected = model(**IDS).logits
    before = state(model)
    assert torch.equal(trainer.step("b", {**IDS, "labels": torch.tensor([0, 1])}), expected)
    assert any(not torch.equal(before[name], value) for name, value in state(model).items())


def test_labels_of_the_training_data_are_not_used(bert, data, tmp_path):
    states = []
    for dataset in (data, {task: d.remove_columns("label") for task, d in data.items()}):
        model = get_peft_model(load(bert[0]), TintConfig(experts=bert[1]))
        TintTrainer(model, arguments(tmp_path), dataset).train()
        states.append(state(model))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_expert_logits_are_computed_once_and_cached_on_disk(bert, data, tmp_path, monkeypatch):
    saved = {}
    for task, dataset in data.items():
        dataset.save_to_disk(tmp_path / task)
        saved[task] = load_from_disk(tmp_path / task)
    calls = []
    from peft_tint.tint.merged_layer import MergedLayer

    forward = MergedLayer.forward
    monkeypatch.setattr(
        MergedLayer, "forward", lambda self, *a, **k: (calls.append(self.expert is not None), forward(self, *a, **k))[1]
    )
    forwards = []
    for _ in range(2):
        calls.clear()
        model = get_peft_model(load(bert[0]), TintConfig(experts=bert[1]))
        trainer = TintTrainer(model, arguments(tmp_path / "out"), saved)
        trainer.train()
        forwards.append(sum(calls))
        first_update = calls.index(False)
        assert not any(calls[first_update:])
    assert forwards[1] == forwards[0] / 2  # to see whether rows may be cached
    # another expert is not answered from the cache
    calls.clear()
    model = peft_tint.from_experts(load(bert[0]), {"b": load(bert[1]["score"])})
    TintTrainer(model, arguments(tmp_path / "out"), {"b": saved["b"]}).train()
    assert sum(calls) == forwards[0] / 3


def test_an_adapter_that_took_anothers_name_is_scored_by_its_own_experts(bert, data, tmp_path):
    same = {task: data[task].remove_columns("label") for task in "ab"}
    there, back = {"a": bert[1]["a"], "b": bert[1]["b"]}, {"a": bert[1]["b"], "b": bert[1]["a"]}
    model = get_peft_model(load(bert[0]), TintConfig(experts=there), "first")
    trainer = TintTrainer(model, arguments(tmp_path), eval_dataset=same)
    trainer.evaluate()
    model.add_adapter("other", TintConfig(experts=back))
    model.set_adapter("other")
    model.delete_adapter("first")
    model.add_adapter("first", TintConfig(experts=back))
    model.set_adapter("first")
    fresh = get_peft_model(load(bert[0]), TintConfig(experts=back), "first")
    assert trainer.evaluate() == TintTrainer(fresh, arguments(tmp_path), eval_dataset=same).evaluate()


def test_best_state_is_restored(bert, data, tmp_path):
    """With a learning rate that destroys the model, the start is the best state, and it comes back."""
    model = get_peft_model(load(bert[0]), TintConfig(experts=bert[1]))
    before = state(model)
    settings = arguments(tmp_path, learning_rate=5.0, eval_steps=5, load_best_model_at_end=True)
    worse = lambda logits, expert_logits, mask: (logits.softmax(-1) * expert_logits.softmax(-1)).sum()  # noqa: E731
    trainer = TintTrainer(model, settings, data, data, objective=worse)
    trainer.train()
    assert trainer.log_history[-1]["best_step"] == 0
    assert all(torch.equal(before[name], value) for name, value in state(model).items())


def test_bf16_trains_float32_parameters_and_leaves_no_autocast(model, data, tmp_path, has_bf16):
    has_bf16(True)
    TintTrainer(model, arguments(tmp_path, bf16=True), data).train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(**IDS).logits.dtype == torch.float32
    again = copy.deepcopy(model)
    again.set_coefficients(0.0)
    assert not torch.equal(again(**IDS).logits, model(**IDS).logits)


def test_regression_task_learns_the_experts_output(bert, tmp_path):
    experts = {task: load(bert[1][task]) for task in ("a", "b")}
    config = experts["b"].config
    config.num_labels = 1
    score = type(experts["b"])(config).eval()
    score.load_state_dict({k: v for k, v in experts["b"].state_dict().items() if "classifier" not in k}, strict=False)
    model = peft_tint.from_experts(load(bert[0]), {"a": experts["a"], "score": score}, coefficient_init=0.1)
    data = {"score": make_data(bert)["b"].remove_columns("label")}
    trainer = TintTrainer(model, arguments(tmp_path, max_steps=60), data, data)
    trainer.train()
    assert trainer.log_history[-1]["loss"] < 0.5 * trainer.log_history[0]["loss"]
    assert "agreement" not in trainer.evaluate()["score"]


def test_custom_metrics(model, data, tmp_path):
    def wrong(prediction):
        return {"error": float((prediction.predictions.argmax(-1) != prediction.label_ids).mean()) + 1}

    results = TintTrainer(model, arguments(tmp_path), eval_dataset=data, compute_metrics={"a": wrong}).evaluate()
    assert results["a"]["expert_error"] == 1 and results["a"]["normalized_error"] == results["a"]["error"]
    assert "accuracy" in results["b"] and "error" not in results["b"]


def test_evaluation_without_labels_is_agreement(model, data, tmp_path):
    unlabelled = {task: dataset.remove_columns("label") for task, dataset in data.items()}
    results = TintTrainer(model, arguments(tmp_path), eval_dataset=unlabelled).evaluate()
    assert set(results) == {*CLASSES, "mean"} and set(results["a"]) == {"agreement"}


def test_callbacks_trackers_and_bar(model, data, tmp_path, capsys):
    seen = []
    settings = arguments(tmp_path, report_to="tensorboard", logging_steps=5, disable_tqdm=False, eval_steps=5)
    callbacks = [lambda trainer, logs: seen.append(logs)]
    trainer = TintTrainer(model, settings, data, data, "confident_pseudo_label", callbacks=callbacks)
    trainer.train()
    assert seen == trainer.log_history and {"loss_a", "kept_a"} <= set(seen[0])
    assert list(tmp_path.rglob("events.out.tfevents*"))
    error = capsys.readouterr().err
    assert "tinting: 100%" in error and "loss=" in error and "kept=" in error


def test_save_model(model, data, tmp_path):
    TintTrainer(model, arguments(tmp_path), data).save_model()
    assert (tmp_path / "adapter_model.safetensors").exists() and (tmp_path / "adapter_config.json").exists()


def test_arguments_are_command_line_flags():
    parser = HfArgumentParser(TintTrainingArguments)
    (parsed,) = parser.parse_args_into_dataclasses(["--max_steps", "7", "--bf16", "--learning_rate", "0.1"])
    assert parsed.max_steps == 7 and parsed.bf16 and parsed.learning_rate == 0.1
    assert all(field.metadata.get("help") for field in dataclasses.fields(TintTrainingArguments))
    assert all(
        field.metadata.get("help")
        for field in dataclasses.fields(TintConfig)
        if field.name in TintConfig.__annotations__
    )


def test_transformers_trainer_works_too(model, data, tmp_path):
    model.set_task("a")
    before = state(model)
    settings = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, report_to="none", use_cpu=True, disable_tqdm=True, learning_rate=0.01
    )
    Trainer(model, settings, train_dataset=data["a"].remove_columns("text")).train()
    assert any(not torch.equal(before[name], value) for name, value in state(model).items())


def test_transforms_and_missing_columns(bert, model, data, tmp_path):
    """A dataset whose inputs are made on access, as images usually are."""
    shifted = {task: d.with_transform(lambda batch: {"input_ids": batch["input_ids"]}) for task, d in data.items()}
    trainer = TintTrainer(model, arguments(tmp_path), shifted)
    trainer.train()
    assert trainer.log_history


def test_negative_losses_update_too(model, tmp_path):
    trainer = TintTrainer(model, arguments(tmp_path), objective=lambda logits, expert, mask: -logits.abs().mean())
    before = state(model)
    trainer.step("a", IDS)
    assert any(not torch.equal(before[name], value) for name, value in state(model).items())


def test_token_level_rows_and_labels(tmp_path):
    """Each token that is no padding counts once, in training and in evaluation, whatever batch it falls in."""
    architecture = Architecture(transformers_model(BertForTokenClassification, BertConfig, vocab_size=64, **SMALL), IDS)
    base = architecture.build()
    experts = make_experts(base, {"x": 4, "y": 3})
    model = peft_tint.from_experts(base, experts, coefficient_init={"x": 1.0, "y": 0.0})
    lengths = [3, 6, 4, 6, 2, 6, 5]
    ids = [torch.randint(2, 64, (n,)).tolist() + [0] * (6 - n) for n in lengths]
    masks = [[1] * n + [0] * (6 - n) for n in lengths]
    with torch.no_grad():
        labels = experts["x"](torch.tensor(ids), torch.tensor(masks)).logits.argmax(-1)
    labels[:, 0] = -100
    data = {"x": Dataset.from_dict({"input_ids": ids, "attention_mask": masks, "labels": labels.tolist()})}
    seen = []

    def count(prediction):
        seen.append(prediction.predictions.shape)
        return {"sentences": len(prediction.label_ids)}

    settings = arguments(tmp_path, per_device_eval_batch_size=4, max_steps=2)
    trainer = TintTrainer(model, settings, data, data, compute_metrics=count)
    assert trainer.evaluate()["x"]["sentences"] == len(lengths) and set(seen) == {(7, 6, 4)}
    trainer.compute_metrics = None
    scores = trainer.evaluate()["x"]
    assert scores["agreement"] == scores["accuracy"] == scores["expert_accuracy"] == 1
    trainer.train()


def test_an_error_in_training_leaves_the_model_sane(model, data, tmp_path, has_bf16):
    has_bf16(True)

    def fail(trainer, logs):
        raise KeyboardInterrupt

    trainer = TintTrainer(model, arguments(tmp_path, bf16=True, logging_steps=1), data, callbacks=[fail])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert model.task == "a" and "forward" not in vars(model) and trainer.updates is None
    assert model(**IDS).logits.dtype == torch.float32


def test_trainers_of_one_process_may_differ_in_precision(model, data, tmp_path, has_bf16):
    has_bf16(True)
    low, full = (TintTrainer(model, arguments(tmp_path, bf16=bf16, max_steps=1), data) for bf16 in (True, False))
    dtypes = []
    hook = model.base_model.head_layers[0].register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    low.train()
    full.train()
    hook.remove()
    assert dtypes[0] == torch.bfloat16 and dtypes[-1] == torch.float32


def test_learning_rate_by_tint_layer(bert, tmp_path):
    for layer, expected in ((None, 3e-3), (["encoder.layer.1", "classifier"], 1e-3), ([], 1e-3)):
        model = get_peft_model(load(bert[0]), TintConfig(experts=bert[1], tint_layer=layer))
        trainer = TintTrainer(model, arguments(tmp_path))
        trainer.step("a", IDS)
        assert trainer.updates.optimizer.param_groups[0]["lr"] == expected


def test_misuse_is_told_before_the_first_step(bert, model, tmp_path):
    data = Dataset.from_dict({"input_ids": [[5, 6, 7]]})
    with pytest.raises(ValueError, match="`train_dataset` is a Dataset; give"):
        TintTrainer(model, arguments(tmp_path), data)
    with pytest.raises(ValueError, match="`eval_steps` is set"):
        TintTrainer(model, arguments(tmp_path, eval_steps=1), {"a": data}).train()
    with pytest.raises(ValueError, match=r"`collapse_guard` is 0.1, and there are no predicted classes"):
        TintTrainer(model, arguments(tmp_path, collapse_guard=0.1), objective="feature_l1")
    for other in (
        load(bert[0]),
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraConfig(target_modules=["0"])),
    ):
        with pytest.raises(ValueError, match="without a TINT adapter"):
            TintTrainer(other, arguments(tmp_path))
    for name in ("eval_steps", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        with pytest.raises(ValueError, match=f"`{name}` is 0; it must be at least 1"):
            TintTrainingArguments(**{name: 0})
    for name in ("max_steps", "head_steps"):
        with pytest.raises(ValueError, match=f"`{name}` is -1; it must be at least 0"):
            TintTrainingArguments(**{name: -1})
    trainer = TintTrainer(model, arguments(tmp_path))
    with pytest.raises(ValueError, match="no task 'c'; the tasks are 'a'"):
        trainer.step("c", IDS)
    with pytest.raises(ValueError, match=r"`batch\['text'\]` is a list; it must be a tensor"):
        trainer.step("a", {**IDS, "text": ["x", "y"]})
    trainer._prepare()
    with pytest.raises(ValueError, match=r"shape \(2, 2\), its expert gave \(3, 2\)"):
        trainer._backward("a", {**IDS, "expert_rows": torch.zeros(3, 2)}, 1)


def test_heads_are_fitted_to_the_features_of_the_start(model, data, tmp_path):
    """Before any step, against the same written out: each head by itself, on the features of the merged model."""
    expected, before = {}, state(model)
    head = {task: [name for name in before if f".{task}_task." in name] for task in data}
    for task, dataset in data.items():
        model.set_task(task)
        ids = torch.tensor(dataset["input_ids"])
        bert = model.get_base_model().bert
        with torch.no_grad(), model.expert(task):
            expert_logits = model(input_ids=ids).logits
        with torch.no_grad():
            features = bert(input_ids=ids).pooler_output
        tensors = [before[name].clone().requires_grad_() for name in head[task]]
        optimizer = torch.optim.Adam(tensors, 3e-3)
        for step in range(5):
            optimizer.param_groups[0]["lr"] = 3e-3 * (1 + math.cos(math.pi * step / 5)) / 2
            logits = torch.nn.functional.linear(features, *tensors)
            OBJECTIVES["soft_pseudo_label"](logits, expert_logits).backward()
            optimizer.step()
            optimizer.zero_grad()
        expected |= dict(zip(head[task], tensors, strict=True))
    trainer = TintTrainer(model, arguments(tmp_path, max_steps=0, head_steps=5), data)
    trainer.train()
    assert len(expected) == 6 and set(trainer.log_history[0]) == {"step", "head_loss"}
    for name, parameter in state(model).items():
        torch.testing.assert_close(parameter, expected.get(name, before[name]), rtol=1e-4, atol=1e-5, msg=name)
        assert torch.equal(parameter, before[name]) == (name not in expected)


def test_the_defaults_fit_the_heads_and_take_few_falling_steps(model, data, tmp_path):
    trainer = TintTrainer(model, TintTrainingArguments(str(tmp_path), max_steps=1, disable_tqdm=True), data, data)
    before = trainer.evaluate()["mean"]["agreement"]
    trainer.train()
    assert TintTrainingArguments().max_steps == 60 and trainer.progress.step == 1
    assert "head_loss" in trainer.log_history[0] and trainer.evaluate()["mean"]["agreement"] > before


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("settings", [{"update": "joint"}, {"gradient_accumulation_steps": 2}])
def test_checkpointed_layers_train_alike_where_weights_are_reused(bert, data, tmp_path, settings, use_reentrant):
    states = []
    for checkpointed in (False, True):
        model = get_peft_model(load(bert[0]), TintConfig(experts=bert[1]))
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        TintTrainer(model, arguments(tmp_path, max_steps=2, adam_epsilon=1e-4, **settings), data).train()
        states.append(state(model))
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=1e-6)


def test_a_head_that_comes_to_nan_is_told(model, data, tmp_path):
    def objective(logits, expert_logits, mask):
        return logits.sum() * float("nan")

    trainer = TintTrainer(model, arguments(tmp_path, max_steps=0, head_steps=5), data, objective=objective)
    with pytest.raises(FloatingPointError, match="The loss of the last layer of task 'a' is nan"):
        trainer.train()
    with model.reuse_merged_weights(), pytest.raises(ValueError, match="is in `reuse_merged_weights` already"):
        trainer.train()


def test_entropy_does_not_fit_heads(model, data, tmp_path):
    """Each would come to predict one class."""
    before = state(model)
    trainer = TintTrainer(model, arguments(tmp_path, max_steps=0, head_steps=5), data, objective="entropy")
    trainer.train()
    assert not trainer.log_history and all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_heads_that_get_more_than_one_vector_are_not_fitted(tmp_path):
    architecture = Architecture(transformers_model(BertForTokenClassification, BertConfig, vocab_size=64, **SMALL), IDS)
    base = architecture.build()
    model = peft_tint.from_experts(base, make_experts(base, {"x": 4}))
    before, data = state(model), {"x": Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9, 2]]})}
    trainer = TintTrainer(model, arguments(tmp_path, max_steps=0, head_steps=5), data)
    trainer.train()
    assert not trainer.log_history and all(torch.equal(value, before[name]) for name, value in state(model).items())


@pytest.mark.parametrize("kind, rates", [("constant", [1, 1, 1, 1]), ("linear", [1, 0.75, 0.5, 0.25])])
def test_learning_rate_by_step(model, data, tmp_path, kind, rates):
    seen = []

    class Recorder(TintTrainer):
        def _step(self, batches):
            seen.append(self.updates.optimizer.param_groups[0]["lr"])
            super()._step(batches)

    settings = arguments(tmp_path, max_steps=4, learning_rate=0.1, lr_scheduler_type=kind, update="joint")
    Recorder(model, settings, data).train()
    assert seen == pytest.approx([0.1 * rate for rate in rates])
    with pytest.raises(ValueError, match="'constant', 'linear' or 'cosine'"):
        arguments(tmp_path, lr_scheduler_type="step")
