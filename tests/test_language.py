"""Language models: what trains in them by default, and the rows that are kept of their experts."""

import copy
import json

import pytest
import torch
import transformers as T
from datasets import Dataset, load_from_disk
from models import ARCHITECTURES, make_experts
from peft import PeftModel, get_peft_model

import peft_tint
from peft_tint import TintTrainer, TintTrainingArguments
from peft_tint.training.objectives import OBJECTIVES
from peft_tint.training.shortened import TOP, complete, shorten

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
WORDS = 1200


def make_models(**settings):
    torch.manual_seed(0)
    base = T.LlamaForCausalLM(T.LlamaConfig(vocab_size=WORDS, pad_token_id=0, **settings, **SIZES)).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(15 if parameter.ndim > 1 else 1)
        base.lm_head.weight.mul_(3)  # sure of few words
    return base, make_experts(base, ["a", "b"])


@pytest.fixture
def llama():
    base, experts = make_models()
    ids = torch.randint(1, WORDS, (24, 6), generator=torch.Generator().manual_seed(1)).tolist()
    data = {task: Dataset.from_dict({"input_ids": ids, "labels": ids}) for task in experts}
    return base, experts, data


class Read(torch.utils.data.IterableDataset):
    def __init__(self, dataset):
        self.dataset_of_rows = dataset

    def __iter__(self):
        return iter(self.dataset_of_rows)


def arguments(tmp_path, **settings):
    defaults = {"max_steps": 10, "logging_steps": 10, "per_device_train_batch_size": 6, "disable_tqdm": True}
    return TintTrainingArguments(str(tmp_path), **{**defaults, **settings})


# ---- what trains -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, layer",
    [("llama_tied", "model.norm"), ("gpt2", "transformer.ln_f"), ("t5", "decoder.final_layer_norm")],
)
def test_the_final_norm_is_the_tint_layer(name, layer, tmp_path):
    base = ARCHITECTURES[name].build()
    experts = make_experts(base, ["a", "b"])
    for task, expert in experts.items():
        expert.save_pretrained(tmp_path / task)
    config = peft_tint.TintConfig(experts={task: str(tmp_path / task) for task in experts})
    model = get_peft_model(copy.deepcopy(base), config)
    trained = model.base_model.model.get_submodule(layer).modules_to_save["default"]
    with torch.no_grad():
        trained["b"].weight.add_(1)
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["tint_layer"] == [layer]
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    assert len(again.base_model.final_norms) == len(again.base_model.tint_layers) == 1
    merged = again.merge_and_unload(task="b")
    assert torch.equal(merged.get_parameter(f"{layer}.weight"), experts["b"].get_parameter(f"{layer}.weight") + 1)


def test_models_without_a_final_norm_train_coefficients():
    base = ARCHITECTURES["bert_mlm"].build()
    with pytest.warns(UserWarning, match="neither a head of a task nor a decoder's final norm, so only coefficients"):
        model = peft_tint.from_experts(base, make_experts(base, ["a", "b"]))
    assert not model.base_model.tint_layers


@pytest.mark.parametrize("kept, is_tied", [(None, False), (1, False), (None, True)])
def test_the_norm_is_fitted_to_features(llama, kept, is_tied, tmp_path):
    """Alone, and to what the whole model gives, also at the last token alone as a collator may want it."""
    base, experts, data = llama
    if is_tied:
        base, experts = make_models(tie_word_embeddings=True)
    model = peft_tint.from_experts(base, experts)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    more = {} if kept is None else {"logits_to_keep": kept}
    collate = lambda samples: T.default_data_collator(samples) | more  # noqa: E731
    if kept:
        data = {task: dataset.remove_columns("labels") for task, dataset in data.items()}
    settings = arguments(tmp_path, max_steps=0, head_steps=30)
    trainer = TintTrainer(model, settings, data, data_collator=collate)
    losses = [loss_of(trainer, data, more)]
    trainer.train()
    assert [entry["step"] for entry in trainer.log_history] == [0] and trainer.log_history[0]["head_loss"] > 0
    losses.append(loss_of(trainer, data, more))
    assert losses[1] < losses[0] - 0.01
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or torch.equal(parameter, before[name]) == ("tint_coefficients" in name)
        assert parameter.grad is None


def test_the_norm_is_fitted_to_kept_rows_as_to_others(llama, tmp_path):
    base, experts, data = llama
    found = []
    for expert_rows in ("cache", "online"):
        model = peft_tint.from_experts(copy.deepcopy(base), experts)
        trainer = TintTrainer(model, arguments(tmp_path, max_steps=0, expert_rows=expert_rows), data)
        trainer.train()
        found.append(trainer.log_history[0]["head_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@torch.no_grad()
def loss_of(trainer, data, more):
    total = 0
    for task, dataset in data.items():
        trainer.model.set_task(task)
        batch = {name: torch.tensor(dataset[:][name]) for name in dataset.column_names} | more
        rows, expert = trainer.rows.forward(task, batch).compared.rows(), trainer.rows.of_expert(task, batch)
        total += OBJECTIVES["soft_pseudo_label"](rows, expert).item()
    return total


# ---- rows that are kept ----------------------------------------------------------------------------------------------


def test_shortened_rows():
    torch.manual_seed(0)
    logits, ours = torch.randn(50, WORDS) * 4, torch.randn(50, WORDS) * 4
    whole, known = complete(shorten(logits), ours), logits.topk(TOP).indices
    exact = logits.log_softmax(-1)
    assert torch.equal(whole.argmax(-1), logits.argmax(-1)) and whole.isfinite().all()
    assert torch.allclose(whole.gather(-1, known), exact.gather(-1, known), atol=1e-2)
    assert torch.allclose(complete(shorten(logits), ours * 0).exp().sum(-1), torch.ones(50), atol=1e-2)
    assert torch.allclose(whole.exp().sum(-1), torch.ones(50), atol=1e-2)
    short = shorten(logits)
    before = [part.clone() for part in short]
    complete(type(short)(short.values.float(), short.classes.long()), ours)
    assert all(torch.equal(part, kept) for part, kept in zip(short, before, strict=True))
    others = torch.ones_like(logits, dtype=torch.bool).scatter_(-1, known, False)
    ratio = (complete(shorten(logits), ours * 0.1) - ours * 0.1)[0][others[0]]
    assert ratio.std() < 1e-3  # they share their mass as ours do
    near = logits.sort(descending=True).values
    near[:, 1] = near[:, 0] - 1e-4
    assert (complete(shorten(near), ours).argmax(-1) == 0).all()
    sure = torch.zeros(1, WORDS)
    sure[0, 7] = 1e3  # of one word, and the model of another
    assert complete(shorten(sure), sure.roll(1, -1)).argmax() == 7
    assert shorten(logits).values.dtype == torch.float16


def test_an_objective_does_not_move_the_other_words():
    torch.manual_seed(0)
    logits, ours = torch.randn(3, WORDS), (torch.randn(3, WORDS) * 0.1).requires_grad_()
    others = torch.ones(3, WORDS, dtype=torch.bool).scatter_(-1, logits.topk(TOP).indices, False)
    OBJECTIVES["soft_pseudo_label"](ours, complete(shorten(logits), ours)).backward()
    moved = (ours.grad / ours.detach().softmax(-1))[others].view(3, -1)
    assert (moved.std(1) < 1e-3 * moved.mean(1).abs()).all()


@pytest.mark.parametrize("objective", ["soft_pseudo_label", "pseudo_label", "confident_pseudo_label"])
def test_kept_rows_train_as_all_words_do(llama, objective, tmp_path):
    base, experts, data = llama
    for task in data:
        data[task].save_to_disk(tmp_path / task)
        data[task] = load_from_disk(tmp_path / task)
    found, columns = [], []
    for expert_rows in ("auto", "online"):
        model = peft_tint.from_experts(copy.deepcopy(base), experts, tint_layer=[], coefficient_bounds=None)
        start = model.coefficients().values
        # with Adam's own, coefficients that hardly matter move by the noise of rounding
        settings = arguments(tmp_path / "out", expert_rows=expert_rows, learning_rate=1e-2, adam_epsilon=1e-3)
        trainer = TintTrainer(model, settings, data, objective=objective)
        trainer.train()
        found.append(model.coefficients().values - start)
        columns.append(type(next(trainer.batches.endless("a", data["a"], 0)).get("expert_rows")).__name__)
    assert columns == ["Shortened", "NoneType"]
    assert (found[0] - found[1]).norm() < 0.02 * found[1].norm()


def test_a_function_of_the_users_gets_logits(llama, tmp_path):
    base, experts, data = llama
    losses = []
    for expert_rows in ("cache", "online"):
        model = peft_tint.from_experts(copy.deepcopy(base), experts, tint_layer=[])
        settings = arguments(tmp_path, expert_rows=expert_rows)
        trainer = TintTrainer(
            model, settings, data, objective=lambda ours, expert, mask: (ours - expert).square().mean()
        )
        trainer.train()
        losses.append(trainer.log_history[-1]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_evaluation_counts_all_words(llama, tmp_path):
    base, experts, data = llama
    model = peft_tint.from_experts(base, experts)
    trainer = TintTrainer(model, arguments(tmp_path, per_device_eval_batch_size=3), eval_dataset=data)
    found = trainer.evaluate()["a"]
    read = trainer.evaluate({"a": Read(data["a"].with_format("torch"))})["a"]
    assert read == pytest.approx(found, rel=1e-4, nan_ok=True)
    ids = torch.tensor(data["a"][:]["input_ids"])
    with torch.no_grad():
        expected = experts["a"](input_ids=ids, labels=ids).loss.exp().item()
    assert found["expert_perplexity"] == pytest.approx(expected, rel=1e-4)


def test_texts_of_which_nothing_counts(llama, tmp_path):
    base, experts, data = llama
    ids = data["a"][:]["input_ids"]
    labels = [row if index % 3 else [-100] * 6 for index, row in enumerate(ids)]
    some = {"a": Dataset.from_dict({"input_ids": ids, "labels": labels})}
    one = [*labels[:8], [-100] * 6]  # alone in its batch of evaluation
    one = {"a": Dataset.from_dict({"input_ids": ids[:9], "labels": one})}
    model = peft_tint.from_experts(copy.deepcopy(base), experts)
    TintTrainer(model, arguments(tmp_path, per_device_eval_batch_size=4), one).train()
    none = {"a": Dataset.from_dict({"input_ids": ids, "labels": [[-100] * 6] * 24})}
    trainer = TintTrainer(peft_tint.from_experts(base, experts), arguments(tmp_path), some)
    trainer.train()
    assert trainer.log_history[-1]["loss"] > 0
    trainer = TintTrainer(trainer.model, arguments(tmp_path), none)
    before = trainer.model.coefficients().values
    trainer.train()
    assert torch.equal(trainer.model.coefficients().values, before)
