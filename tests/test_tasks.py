"""Heads of different sizes and kinds in one tint, and batches of mixed tasks."""

import copy

import pytest
import torch
import transformers as T
from models import ARCHITECTURES, IDS, IMAGE, SMALL, make_experts
from peft import PeftModel, get_peft_model

import peft_tint
from peft_tint import TintConfig
from peft_tint.training.outputs import output_of

TASKS = {"two": 2, "five": 5, "three": 3}


def classifier(**config):
    return T.BertForSequenceClassification(T.BertConfig(vocab_size=64, **SMALL, **config)).eval()


def rows_of(batch, row):
    return {name: tensor[row : row + 1] for name, tensor in batch.items()}


BATCH = {"input_ids": torch.arange(30).view(5, 6) + 2, "attention_mask": torch.ones(5, 6, dtype=torch.long)}
NAMES = ["five", "two", "five", "three", "two"]


@pytest.mark.parametrize(
    "tint_layer", [None, ["encoder.layer.1", "classifier"], "layer.0.attention.self.query", "word_embeddings"]
)
def test_mixed_batch_equals_the_batches_of_each_task(tint_layer):
    base = classifier()
    model = peft_tint.from_experts(base, make_experts(base, TASKS), tint_layer=tint_layer).eval()
    mixed = model(**BATCH, task_names=NAMES).logits
    assert mixed.shape == (5, 5)
    for row, task in enumerate(NAMES):
        model.set_task(task)
        expected = model(**BATCH).logits[row]
        torch.testing.assert_close(mixed[row, : TASKS[task]], expected, rtol=1e-6, atol=1e-6)
        assert (mixed[row, TASKS[task] :] == torch.finfo(torch.float32).min).all()
        assert mixed[row].argmax() < TASKS[task]
    model.set_task("two")
    assert model(**BATCH).logits.shape == (5, 2)  # a mixed batch leaves nothing behind


def test_mixed_batch_trains_each_row_s_tint_layer():
    base = classifier()
    model = peft_tint.from_experts(base, make_experts(base, TASKS)).eval()
    logits = model(**BATCH, task_names=NAMES).logits
    torch.nn.functional.cross_entropy(logits, torch.tensor([4, 1, 0, 2, 0])).backward()
    mixed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for row, (task, label) in enumerate(zip(NAMES, [4, 1, 0, 2, 0], strict=True)):
        model.set_task(task)
        logits = model(**rows_of(BATCH, row)).logits
        (torch.nn.functional.cross_entropy(logits, torch.tensor([label])) / len(NAMES)).backward()
    alone = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert mixed.keys() == alone.keys()
    for name, gradient in mixed.items():
        torch.testing.assert_close(gradient, alone[name], rtol=1e-4, atol=1e-6, msg=name)


def test_mixed_batch_of_dense_outputs():
    """The axis of the classes is the one that differs."""
    base = T.SegformerForSemanticSegmentation(
        T.SegformerConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8], decoder_hidden_size=8, num_labels=2)
    ).eval()
    model = peft_tint.from_experts(base, make_experts(base, {"a": 2, "b": 4})).eval()
    mixed = model(**IMAGE, task_names=["a", "b"]).logits
    for row, (task, classes) in enumerate({"a": 2, "b": 4}.items()):
        model.set_task(task)
        torch.testing.assert_close(mixed[row, :classes], model(**IMAGE).logits[row], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_misuse_of_mixed_batches():
    base = classifier()
    model = peft_tint.from_experts(base, make_experts(base, TASKS), tint_layer=["encoder.layer.1", "classifier"]).eval()
    with pytest.raises(ValueError, match="no task 'six'; the tasks are 'two'"):
        model(**BATCH, task_names=["six"] * 5)
    with pytest.raises(ValueError, match="task of each of 5 rows"):
        model(**BATCH, task_names=["two", "five"])
    assert model(**BATCH).logits.shape == (5, 2)
    with pytest.raises(ValueError, match="leave the `expert` context"), model.expert("two"):
        model(**BATCH, task_names=NAMES)
    with pytest.raises(ValueError, match=r"`adapter_names` cannot mix adapters.*`task_names`"):
        model(**BATCH, adapter_names=["default"] * 5)
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(ValueError, match=r"gradient checkpointing.*batches of one task"):
        model(**BATCH, task_names=NAMES)


def test_kinds_of_heads_in_one_tint():
    """The model's own loss is that of the current task's kind."""
    base = classifier(num_labels=2)
    kinds = {
        "classes": ("single_label_classification", 3, torch.tensor([2, 0])),
        "score": ("regression", 1, torch.tensor([0.5, -1.0])),
        "tags": ("multi_label_classification", 4, torch.rand(2, 4).round()),
    }
    experts = make_experts(base, {task: classes for task, (_, classes, _) in kinds.items()})
    for task, expert in experts.items():
        expert.config.problem_type = kinds[task][0]
    model = peft_tint.from_experts(copy.deepcopy(base), experts).eval()
    for task, (kind, classes, labels) in kinds.items():
        model.set_task(task)
        assert (model.config.problem_type, model.config.num_labels) == (kind, classes)
        assert model.config.id2label == experts[task].config.id2label
        with model.expert(task):
            loss = model(**IDS, labels=labels).loss
        torch.testing.assert_close(loss, experts[task](**IDS, labels=labels).loss, rtol=1e-5, atol=1e-6)
        merged = copy.deepcopy(model).merge_and_unload(task=task)
        assert (merged.config.problem_type, merged.config.num_labels) == (kind, classes)


@pytest.mark.parametrize("cls", [T.BertForTokenClassification, T.BertForQuestionAnswering])
def test_token_heads(cls, tmp_path):
    base = cls(T.BertConfig(vocab_size=64, **SMALL)).eval()
    tasks = {"a": 2, "b": 5} if cls is T.BertForTokenClassification else ["a", "b"]
    experts = make_experts(base, tasks)
    for task, expert in experts.items():
        expert.save_pretrained(tmp_path / task)
    config = TintConfig(experts={task: str(tmp_path / task) for task in experts})
    model = get_peft_model(copy.deepcopy(base), config).eval()
    for task, expert in experts.items():
        model.set_task(task)
        with model.expert(task):
            torch.testing.assert_close(output_of(model(**IDS)), output_of(expert(**IDS)), rtol=1e-5, atol=1e-5)
    mixed = output_of(model(**IDS, task_names=["b", "a"]))
    model.set_task("b")
    torch.testing.assert_close(mixed[0], output_of(model(**IDS))[0], rtol=1e-6, atol=1e-6)
    model.save_pretrained(tmp_path / "tint")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "tint").eval()
    again.set_task("b")
    assert torch.equal(output_of(again(**IDS)), output_of(model(**IDS)))


@torch.no_grad()
def test_generate_under_set_task():
    base = T.GPT2LMHeadModel(T.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()
    for parameter in base.parameters():
        parameter.mul_(5)
    experts = make_experts(base, ["a", "b"], scale=0.2)
    model = peft_tint.from_experts(copy.deepcopy(base), experts, tint_layer="h.1").eval()
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    generated = {}
    for task in ("a", "b"):
        model.set_task(task)
        generated[task] = model.generate(**IDS, **settings)
        plain = copy.deepcopy(model).merge_and_unload(task=task)
        assert torch.equal(generated[task], plain.generate(**IDS, **settings))
    assert not torch.equal(generated["a"], generated["b"])


def test_tint_layers_whose_output_is_a_model_output():
    base = classifier()
    model = peft_tint.from_experts(base, make_experts(base, TASKS), tint_layer=["bert.encoder", "classifier"]).eval()
    mixed = model(**BATCH, task_names=NAMES).logits
    for row, task in enumerate(NAMES):
        model.set_task(task)
        torch.testing.assert_close(mixed[row, : TASKS[task]], model(**BATCH).logits[row], rtol=1e-6, atol=1e-6)


def test_mixing_that_cannot_be_right_is_refused():
    gpt2 = T.GPT2LMHeadModel(T.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()
    model = peft_tint.from_experts(gpt2, make_experts(gpt2, ["a", "b"]), tint_layer="h.1").eval()
    with pytest.raises(ValueError, match="share one key/value cache; pass `use_cache=False`"):
        model(**IDS, task_names=["b", "a"])
    mixed = model(**IDS, task_names=["b", "a"], use_cache=False).logits
    model.set_task("b")
    torch.testing.assert_close(mixed[0], model(**IDS).logits[0], rtol=1e-5, atol=1e-5)
    base = classifier()
    model = peft_tint.from_experts(base, make_experts(base, TASKS), tint_layer=["position_embeddings", "classifier"])
    with pytest.raises(ValueError, match="no row for each sample"):
        model.eval()(**BATCH, task_names=NAMES)
    with pytest.raises(ValueError, match="Leave `labels` out"):
        model(**BATCH, task_names=NAMES, labels=torch.zeros(5, dtype=torch.long))
    for wrong in ("two", ["two"] * 4, []):
        with pytest.raises(ValueError, match="must be a list with the task of each of 5 rows"):
            model(**BATCH, task_names=wrong)
    deberta = ARCHITECTURES["deberta_v2"].build()
    experts = make_experts(deberta, {"a": 2, "b": 2})
    model = peft_tint.from_experts(deberta, experts, tint_layer=["rel_embeddings", "classifier"]).eval()
    with pytest.raises(ValueError, match="reads 'weight' of a tint layer directly"):
        model(**IDS, task_names=["a", "b"])
