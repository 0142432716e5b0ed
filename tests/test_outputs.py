"""Every kind of task: which rows of an output count, and which label belongs to each.

A merged model that is the expert has to agree with it, and the expert's metrics are those of plain transformers on one
sample after the other, which knows no padding, by scikit-learn.
"""

import copy
import types

import numpy as np
import pytest
import torch
import transformers as T
from datasets import Dataset
from models import SMALL, make_experts
from sklearn import metrics as sklearn
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.nn import functional as F

import peft_tint
from peft_tint import OBJECTIVES, TintTrainer, TintTrainingArguments
from peft_tint.training.metrics import ignored_by
from peft_tint.training.objectives import Objective

WORDS, LENGTHS = 60, (7, 3, 9, 5, 2, 8, 9, 4, 6, 3, 7, 5)
TEXT = {"vocab_size": WORDS, "initializer_range": 0.4, **SMALL}
SEQ2SEQ = {"vocab_size": WORDS, "d_model": 16, "decoder_start_token_id": 2, "pad_token_id": 0, "eos_token_id": 3}
LAYERS = {f"{part}_{name}": 1 for part in ("encoder", "decoder") for name in ("layers",)}
HEADS = {
    f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("attention_heads", 2), ("ffn_dim", 32))
}
OF_LLAMA = {"num_key_value_heads": 2, **TEXT}


def tokenizer(side="right"):
    words = {"<pad>": 0, "<mask>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, WORDS)}
    return T.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, "<unk>")),
        pad_token="<pad>",
        mask_token="<mask>",
        unk_token="<unk>",
        padding_side=side,
    )


def texts(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(4, WORDS, (n,), generator=generator).tolist() for n in LENGTHS]
    return [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids]


def alone(model, sample, **more):
    """The output for one sample, without its labels."""
    inputs = {name: torch.tensor([value]) for name, value in sample.items() if "label" not in name}
    with torch.no_grad():
        return model(**{name: value for name, value in inputs.items() if "position" not in name}, **more)


def near(label, classes, index):
    """Labels that are right about half of the time."""
    return label if index % 2 else (label + 1 + index) % classes


# ---- kinds: a model, its samples by an expert, a collator, and the expert's metrics ----------------------------------


def one_label(expert, samples):
    return [s | {"label": near(alone(expert, s).logits.argmax().item(), 3, i)} for i, s in enumerate(samples)]


def score_one_label(expert, samples):
    found = [alone(expert, sample).logits.argmax().item() for sample in samples]
    return {"accuracy": sklearn.accuracy_score([sample["label"] for sample in samples], found)}


def several_labels(expert, samples):
    return [s | {"labels": [float((i + c) % 3 == 0) for c in range(4)]} for i, s in enumerate(samples)]


def score_several_labels(expert, samples):
    found = np.array([(alone(expert, sample).logits[0] > 0).tolist() for sample in samples])
    labels = np.array([sample["labels"] for sample in samples]) > 0
    f1 = sklearn.f1_score(labels, found, average="micro")
    return {"f1": f1, "subset_accuracy": sklearn.accuracy_score(labels, found)}


def number(expert, samples):
    return [s | {"label": 1000 + float(i % 5)} for i, s in enumerate(samples)]


def score_number(expert, samples):
    found = np.array([alone(expert, sample).logits.item() for sample in samples], dtype=np.float64)
    labels = np.array([sample["label"] for sample in samples])
    errors = {"mae": sklearn.mean_absolute_error(labels, found), "mse": sklearn.mean_squared_error(labels, found)}
    return errors | {"pearson": np.corrcoef(found, labels)[0, 1]}


def token_labels(expert, samples):
    def of(sample, i):
        found = alone(expert, sample).logits[0].argmax(-1).tolist()
        return [-100, *(near(label, 3, i + k) for k, label in enumerate(found[1:]))]  # the first is a special token

    return [s | {"labels": of(s, i)} for i, s in enumerate(samples)]


def score_token_labels(expert, samples):
    found = [label for s in samples for label in alone(expert, s).logits[0].argmax(-1).tolist()[1:]]
    return {"accuracy": sklearn.accuracy_score([label for s in samples for label in s["labels"][1:]], found)}


def next_tokens(expert, samples):
    """The prompt, two tokens, does not count; half of what follows is what the expert says."""

    def of(sample, i):
        found = alone(expert, sample).logits[0].argmax(-1).tolist()
        return [-100] * 2 + [near(label, WORDS, i + k) for k, label in enumerate(found[1:-1])]

    return [s | {"labels": of(s, i)[: len(s["input_ids"])]} for i, s in enumerate(samples)]


def score_next_tokens(expert, samples):
    pairs = [(alone(expert, s).logits[0, 1:-1], torch.tensor(s["labels"][2:])) for s in samples]
    logits, labels = (torch.cat(part) for part in zip(*pairs, strict=True))
    return language(logits, labels.long())


def language(logits, labels):
    accuracy = sklearn.accuracy_score(labels, logits.argmax(-1))
    return {"accuracy": accuracy, "perplexity": F.cross_entropy(logits, labels).exp().item()}


def no_labels(expert, samples):
    return samples


def answers(expert, samples):
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 7, (len(samples),), generator=generator).tolist()
    rows = [[*torch.randint(4, WORDS, (n,), generator=generator).tolist(), 3] for n in lengths]
    return [s | {"labels": row} for s, row in zip(samples, rows, strict=True)]


def score_answers(expert, samples):
    def of(sample):
        with torch.no_grad():
            return expert(**{name: torch.tensor([value]) for name, value in sample.items()}).logits[0]

    return language(torch.cat(list(map(of, samples))), torch.tensor([label for s in samples for label in s["labels"]]))


def spans(expert, samples):
    def of(sample, i):
        output = alone(expert, sample)
        start, end = output.start_logits.argmax().item(), output.end_logits.argmax().item()
        low, high = min(start, end), max(start, end)
        return {"start_positions": start if i % 2 else low, "end_positions": end if i % 2 and end >= start else high}

    return [s | of(s, i) for i, s in enumerate(samples)]


def score_spans(expert, samples):
    exact, f1 = [], []
    for sample in samples:
        output = alone(expert, sample)
        ours = set(range(output.start_logits.argmax().item(), output.end_logits.argmax().item() + 1))
        right = set(range(sample["start_positions"], sample["end_positions"] + 1))
        same = output.start_logits.argmax().item() == sample["start_positions"]
        exact.append(same and output.end_logits.argmax().item() == sample["end_positions"])
        f1.append(2 * len(ours & right) / (len(ours) + len(right)))
    return {"exact_match": np.mean(exact), "f1": np.mean(f1)}


def images(expert, samples):
    generator = torch.Generator().manual_seed(7)
    pixels = torch.randn(6, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 3, (6, 32, 32), generator=generator)
    labels[:, :8] = 255
    return [{"pixel_values": x.tolist(), "labels": y.tolist()} for x, y in zip(pixels, labels, strict=True)]


def score_images(expert, samples):
    pixels, labels = (torch.tensor([s[name] for s in samples]) for name in ("pixel_values", "labels"))
    with torch.no_grad():
        found = F.interpolate(expert(pixels).logits, size=(32, 32), mode="bilinear", align_corners=False).argmax(1)
    found, labels = found[labels != 255], labels[labels != 255]
    mean_iou = sklearn.jaccard_score(labels, found, average="macro")
    return {"accuracy": sklearn.accuracy_score(labels, found), "mean_iou": mean_iou}


def audio(expert, samples):
    generator = torch.Generator().manual_seed(9)
    rows = [torch.randn(40 * n, generator=generator).tolist() for n in LENGTHS]
    return [{"input_values": row, "attention_mask": [1] * len(row)} for row in rows]


def padded_audio(samples):
    longest = max(len(sample["input_values"]) for sample in samples)
    fill = lambda name: torch.tensor([s[name] + [0] * (longest - len(s[name])) for s in samples])  # noqa: E731
    return {"input_values": fill("input_values").float(), "attention_mask": fill("attention_mask")}


def of_class(cls, config, **settings):
    return lambda: cls(config(**settings)).eval()


several = {"num_labels": 4, "problem_type": "multi_label_classification"}
segformer = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16], "num_labels": 3}
segformer |= {"patch_sizes": [3, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
wav2vec2 = {"conv_dim": [8, 8], "conv_kernel": [5, 3], "conv_stride": [4, 2], "num_feat_extract_layers": 2, **TEXT}
wav2vec2 |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "do_stable_layer_norm": True}
wav2vec2 |= {"feat_extract_norm": "layer"}
padding = lambda base, side: T.DataCollatorWithPadding(tokenizer(side))  # noqa: E731
by_token = lambda base, side: T.DataCollatorForTokenClassification(tokenizer(side))  # noqa: E731
masking = lambda base, side: T.DataCollatorForLanguageModeling(tokenizer(side), mlm_probability=0.3)  # noqa: E731
by_model = lambda base, side: T.DataCollatorForSeq2Seq(tokenizer(side), model=base)  # noqa: E731
by_length = lambda base, side: T.DataCollatorForSeq2Seq(tokenizer(side))  # noqa: E731
stacking = lambda base, side: None  # noqa: E731
for_audio = lambda base, side: padded_audio  # noqa: E731
BERT = of_class(T.BertForSequenceClassification, T.BertConfig, num_labels=3, **TEXT)
# name -> model, samples by the expert, collator by base and side of the padding, the expert's metrics
KINDS = {
    "one label": (BERT, one_label, padding, score_one_label),
    "one label by a decoder": (
        of_class(T.GPT2ForSequenceClassification, T.GPT2Config, num_labels=3, pad_token_id=0, n_positions=32, **TEXT),
        *(one_label, padding, score_one_label),
    ),
    "several labels": (
        of_class(T.BertForSequenceClassification, T.BertConfig, **several, **TEXT),
        *(several_labels, padding, score_several_labels),
    ),
    "number": (
        of_class(T.BertForSequenceClassification, T.BertConfig, num_labels=1, **TEXT),
        *(number, padding, score_number),
    ),
    "tokens": (
        of_class(T.BertForTokenClassification, T.BertConfig, num_labels=3, **TEXT),
        *(token_labels, by_token, score_token_labels),
    ),
    "llama": (of_class(T.LlamaForCausalLM, T.LlamaConfig, **OF_LLAMA), next_tokens, by_token, score_next_tokens),
    "gpt2": (
        of_class(T.GPT2LMHeadModel, T.GPT2Config, n_positions=32, bos_token_id=3, eos_token_id=3, **TEXT),
        *(next_tokens, by_model, score_next_tokens),
    ),
    "masked": (of_class(T.BertForMaskedLM, T.BertConfig, **TEXT), no_labels, masking, None),
    "bart": (
        of_class(T.BartForConditionalGeneration, T.BartConfig, init_std=0.4, **LAYERS, **HEADS, **SEQ2SEQ),
        *(answers, by_model, score_answers),
    ),
    "t5": (
        of_class(T.T5ForConditionalGeneration, T.T5Config, d_ff=32, d_kv=8, num_layers=1, num_heads=2, **SEQ2SEQ),
        *(answers, by_length, score_answers),
    ),
    "m2m100": (  # shifts labels in its forward alone
        of_class(T.M2M100ForConditionalGeneration, T.M2M100Config, init_std=0.4, **LAYERS, **HEADS, **SEQ2SEQ),
        *(answers, by_length, score_answers),
    ),
    "spans": (of_class(T.BertForQuestionAnswering, T.BertConfig, **TEXT), spans, padding, score_spans),
    "segmentation": (
        of_class(T.SegformerForSemanticSegmentation, T.SegformerConfig, decoder_hidden_size=16, **segformer),
        *(images, stacking, score_images),
    ),
    "frames": (of_class(T.Wav2Vec2ForCTC, T.Wav2Vec2Config, **wav2vec2), audio, for_audio, None),
}
# Others count positions from the padding on, and with it on the left they are other models
SIDES = [(name, "right") for name in KINDS]
SIDES += [(name, "left") for name in ("one label by a decoder", "llama", "gpt2")]


def make(name, side, coefficient=1.0, **config):
    build, label, collator, score = KINDS[name]
    torch.manual_seed(3)
    base = build()
    expert = make_experts(base, ["t"])["t"]
    samples = label(expert, texts())
    model = peft_tint.from_experts(
        copy.deepcopy(base), {"t": expert}, tint_layer=[], coefficient_init=coefficient, **config
    )
    data = {"t": Dataset.from_list(samples)}
    return model, expert, samples, data, collator(base, side), score


def arguments(tmp_path, **settings):
    defaults = {"max_steps": 4, "logging_steps": 4, "learning_rate": 1e-9, "per_device_train_batch_size": 5}
    defaults |= {"per_device_eval_batch_size": 4, "disable_tqdm": True}
    return TintTrainingArguments(str(tmp_path), **{**defaults, **settings})


@pytest.mark.parametrize("expert_rows", ["auto", "online"])
@pytest.mark.parametrize("name, side", SIDES)
def test_a_model_that_is_the_expert(name, side, expert_rows, tmp_path):
    """Agrees with it in training and evaluation, and the metrics are those of samples that are not padded."""
    model, expert, samples, data, collate, score = make(name, side)
    trainer = TintTrainer(model, arguments(tmp_path, expert_rows=expert_rows), data, data, data_collator=collate)
    found = trainer.evaluate()["t"]
    trainer.train()
    assert found.get("agreement", 1) == trainer.log_history[-1].get("agreement", 1) == 1
    assert ("agreement" in found) == (name != "number")
    names = {key for key in found if not key.startswith(("expert_", "normalized_"))} - {"agreement"}
    for metric in names:
        assert found[metric] == pytest.approx(found[f"expert_{metric}"], rel=1e-4)
    if score is not None:
        wanted = score(expert, samples)
        assert names == wanted.keys()
        assert {metric: found[metric] for metric in wanted} == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_logits_of_no_other_tokens_than_those_that_count(name, side, tmp_path):
    """A language model's are most of its memory; where one answer counts, its prompts have none."""
    model, _, samples, _, collate, _ = make(name, side)
    for sample in samples:  # one token of each counts, in one column of a batch
        at = len(sample["labels"]) - 1 if side == "left" else 1
        sample["labels"] = [label if i == at else -100 for i, label in enumerate(sample["input_ids"])]
    data, widths = {"t": Dataset.from_list(samples)}, []
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    trainer = TintTrainer(model, arguments(tmp_path), data, data, data_collator=collate)
    trainer.train()
    found = trainer.evaluate()["t"]
    assert {*widths} == {1} and found["agreement"] == 1
    trainer.compute_metrics = lambda prediction: {"tokens": prediction.predictions.shape[1]}
    assert trainer.evaluate()["t"]["tokens"] == max(LENGTHS)  # a metric of the user's gets all


BY_CLASSES = [side for side in SIDES if side[0] not in ("masked", "segmentation", "frames", "number", "several labels")]


@pytest.mark.parametrize("name, side", BY_CLASSES)
def test_the_loss_is_that_of_the_rows_that_count(name, side, tmp_path):
    """Of one batch of all samples, against the objective on samples alone."""
    model, expert, samples, data, collate, _ = make(name, side, coefficient=0.3)
    plain = copy.deepcopy(model).merge_and_unload().eval()
    settings = arguments(tmp_path, max_steps=1, logging_steps=1, per_device_train_batch_size=len(samples))
    trainer = TintTrainer(model, settings, data, data_collator=collate)
    trainer.train()

    def rows(model, sample):
        labels = sample.get("labels")
        if KINDS[name][1] is answers:
            with torch.no_grad():
                return model(**{key: torch.tensor([value]) for key, value in sample.items()}).logits[0]
        output = alone(model, sample)
        if name == "spans":
            return torch.cat([output.start_logits, output.end_logits])
        if labels is None:
            return output.logits
        return output.logits[0, 1:-1] if KINDS[name][1] is next_tokens else output.logits[0, 1:]

    ours, theirs = ([rows(each, sample) for sample in samples] for each in (plain, expert))
    losses = [-(t.softmax(-1) * o.log_softmax(-1)).sum(-1) for o, t in zip(ours, theirs, strict=True)]
    assert trainer.log_history[-1]["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)


@pytest.mark.parametrize("expert_rows", ["cache", "online"])
@pytest.mark.parametrize("name, shapes", [("tokens", ((12, 9, 3), (12, 9))), ("gpt2", ((12, 9, 60), (12, 9)))])
def test_metrics_of_ones_own_get_what_transformers_gives(name, shapes, expert_rows, tmp_path):
    """Samples, padded with -100, and labels as they are."""
    model, expert, samples, data, collate, score = make(name, "right")
    seen = []

    def compute(prediction):
        seen.append(prediction)
        return {"accuracy": 0.5}

    settings = arguments(tmp_path, expert_rows=expert_rows)
    trainer = TintTrainer(model, settings, eval_dataset=data, data_collator=collate, compute_metrics=compute)
    found = trainer.evaluate()["t"]
    assert found["accuracy"] == 0.5 and found["normalized_accuracy"] == 1 and found["agreement"] == 1
    ours, experts = seen
    assert (ours.predictions.shape, ours.label_ids.shape) == shapes
    labels = (
        ours.label_ids if name == "tokens" else np.pad(ours.label_ids[:, 1:], ((0, 0), (0, 1)), constant_values=-100)
    )
    counted = labels != -100
    np.testing.assert_allclose(ours.predictions[counted], experts.predictions[counted], atol=1e-4)
    right = (ours.predictions.argmax(-1) == labels)[counted].mean()
    assert right == pytest.approx(score(expert, samples)["accuracy"])
    assert [row[row != -100].tolist() for row in ours.label_ids] == [
        [x for x in s["labels"] if x != -100] for s in samples
    ]


def test_spans_of_ones_own_metric(tmp_path):
    model, _expert, _samples, data, collate, _ = make("spans", "right")
    compute = lambda prediction: {"n": len(prediction.predictions[0]) + len(prediction.label_ids[1])}  # noqa: E731
    trainer = TintTrainer(model, arguments(tmp_path), eval_dataset=data, data_collator=collate, compute_metrics=compute)
    assert trainer.evaluate()["t"]["n"] == 24


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_language_model_on_whole_texts(name, side, tmp_path):
    """Labels are the tokens, as of pretraining, and each but the first counts."""
    model, expert, samples, data, *_ = make(name, side)
    collate = T.DataCollatorForLanguageModeling(tokenizer(side), mlm=False)
    data = {"t": data["t"].remove_columns("labels").add_column("label", [0] * len(samples))}  # a class, as in a suite
    found = TintTrainer(model, arguments(tmp_path), eval_dataset=data, data_collator=collate).evaluate()["t"]
    logits = torch.cat([alone(expert, sample).logits[0, :-1] for sample in samples])
    wanted = language(logits, torch.tensor([token for sample in samples for token in sample["input_ids"][1:]]))
    assert {metric: found[metric] for metric in wanted} == pytest.approx(wanted, rel=1e-4)


def test_packed_texts_do_not_see_each_other(tmp_path):
    model, expert, samples, data, *_ = make("llama", "right")
    data = {"t": data["t"].remove_columns(["labels", "attention_mask"])}
    trainer = TintTrainer(model, arguments(tmp_path), eval_dataset=data, data_collator=T.DataCollatorWithFlattening())
    found = trainer.evaluate()["t"]
    logits = torch.cat([alone(expert, sample).logits[0, :-1] for sample in samples])
    wanted = language(logits, torch.tensor([token for sample in samples for token in sample["input_ids"][1:]]))
    assert {metric: found[metric] for metric in wanted} == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("build", ["wav2vec2", "parakeet"])
def test_padding_of_sounds_does_not_count(build, tmp_path):
    """In frames, whose number is another than that of the input."""
    if build == "wav2vec2":
        base = of_class(T.Wav2Vec2ForAudioFrameClassification, T.Wav2Vec2Config, **wav2vec2)()
        batch = padded_audio(audio(base, None)[:3])
    else:
        encoder = {"num_mel_bins": 16, "subsampling_conv_channels": 8, "conv_kernel_size": 3, **SMALL}
        base = T.ParakeetForCTC(T.ParakeetCTCConfig(vocab_size=20, encoder_config=encoder)).eval()
        mask = (torch.arange(64) < torch.tensor([64, 40, 24])[:, None]).long()
        batch = {"input_features": torch.randn(3, 64, 16), "attention_mask": mask}
    model = peft_tint.from_experts(base, make_experts(base, ["t"]), tint_layer=[]).eval()
    with torch.no_grad():
        output = TintTrainer(model, arguments(tmp_path)).rows.forward("t", batch).output
    numbers = output.numbers()
    assert numbers.max() == output.values.shape[1] and len(numbers.unique()) == 3
    assert numbers.argsort().equal(batch["attention_mask"].sum(1).argsort())


@pytest.mark.parametrize("name", ["roberta", "gpt2", "spans", "tokens"])
def test_features_count_where_there_is_no_padding(name, tmp_path):
    """Also of heads that get more positions than they give."""
    if name == "roberta":
        base = of_class(T.RobertaForSequenceClassification, T.RobertaConfig, num_labels=3, **TEXT)()
    else:
        base = KINDS["one label by a decoder" if name == "gpt2" else name][0]()
    model = peft_tint.from_experts(base, make_experts(base, ["t"]), coefficient_init=0.3)
    trainer = TintTrainer(
        model, arguments(tmp_path), {"t": Dataset.from_list(texts())}, None, "feature_l1", processing_class=tokenizer()
    )
    trainer.train()
    batch = T.DataCollatorWithPadding(tokenizer())(texts()[:4])
    assert len(trainer.rows.forward("t", dict(batch)).compared.rows()) == sum(LENGTHS[:4])


# ---- what is seen to be cached, and what not -------------------------------------------------------------------------


@pytest.mark.parametrize("name, cached", [("one label", True), ("tokens", True), ("masked", False), ("spans", False)])
def test_what_is_computed_ahead(name, cached, tmp_path):
    model, _, _, data, collate, _ = make(name, "right")
    trainer = TintTrainer(model, arguments(tmp_path), data, data_collator=collate)
    before = torch.get_rng_state()
    assert (trainer.batches.with_expert_rows("t", data["t"], False) is not data["t"]) == cached
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_drawn_now_and_then_is_not_computed_ahead(tmp_path):
    """Though it was the same twice."""
    model, _, _, data, collate, _ = make("one label", "right")

    def rarely(batch):
        return {**batch, "input_ids": [row if torch.rand(()) < 1.0 else row[::-1] for row in batch["input_ids"]]}

    data = data["t"].with_transform(rarely)
    trainer = TintTrainer(model, arguments(tmp_path), {"t": data}, data_collator=collate)
    assert trainer.batches.with_expert_rows("t", data, False) is data


def test_what_is_large_or_depends_on_its_batch_is_not_computed_ahead(monkeypatch, tmp_path):
    model, _, _, data, collate, _ = make("tokens", "right")
    without_mask = lambda samples: {k: v for k, v in collate(samples).items() if k != "attention_mask"}  # noqa: E731
    trainer = TintTrainer(model, arguments(tmp_path), data, data_collator=without_mask)
    assert trainer.batches.with_expert_rows("t", data["t"], False) is data["t"]
    monkeypatch.setattr(peft_tint.training.batches, "MOST_CACHED", 100)
    trainer = TintTrainer(model, arguments(tmp_path), data, data_collator=collate)
    assert trainer.batches.with_expert_rows("t", data["t"], False) is data["t"]


def test_what_is_drawn_at_random_cannot_be_cached(tmp_path):
    model, _, _, data, collate, _ = make("masked", "right")
    trainer = TintTrainer(model, arguments(tmp_path, expert_rows="cache"), data, data_collator=collate)
    with pytest.raises(ValueError, match="Task 't': collator or transforms draw at random"):
        trainer.train()


def test_random_transforms_are_the_same_for_model_and_expert(tmp_path):
    model, _, _samples, data, collate, _ = make("one label", "right")

    def noisy(batch):
        rows = [[int(torch.randint(4, WORDS, ())) for _ in row] for row in batch["input_ids"]]
        return {**batch, "input_ids": rows}

    data = {"t": data["t"].with_transform(noisy)}
    trainer = TintTrainer(model, arguments(tmp_path), data, data, data_collator=collate)
    trainer.train()
    assert trainer.log_history[-1]["agreement"] == trainer.evaluate()["t"]["agreement"] == 1


# ---- objectives ------------------------------------------------------------------------------------------------------


def test_an_objective_for_each_task(tmp_path):
    """And one for all becomes, for several labels and for numbers, what fits them."""
    bases = {"one": {"num_labels": 3}, "many": several, "score": {"num_labels": 1}}
    torch.manual_seed(0)
    base = T.BertForSequenceClassification(T.BertConfig(**bases["one"], **TEXT)).eval()
    experts = {}
    for task, settings in bases.items():
        experts[task] = T.BertForSequenceClassification(T.BertConfig(**settings, **TEXT)).eval()
        experts[task].bert.load_state_dict(base.bert.state_dict())
    data = {task: Dataset.from_list(texts()) for task in experts}

    def objectives(objective):
        model = peft_tint.from_experts(copy.deepcopy(base), experts)
        return TintTrainer(model, arguments(tmp_path), data, objective=objective, processing_class=tokenizer())

    trainer = objectives("soft_pseudo_label")
    names = {task: objective.__name__ for task, objective in trainer.rows.objectives.items()}
    assert names == {"one": "soft_pseudo_label", "many": "bce", "score": "feature_l1"}
    trainer.train()
    own = lambda logits, expert_logits, mask: (logits - expert_logits).square().mean()  # noqa: E731
    trainer = objectives({"one": "entropy", "many": own, "score": Objective(own)})
    assert trainer.rows.objectives["many"].function is trainer.rows.objectives["score"].function is own
    trainer.train()
    with pytest.raises(ValueError, match=r"'many' is multi-label; 'entropy' would .* by `objective=\{task: ...\}`"):
        objectives("entropy")
    with pytest.raises(ValueError, match="In the task 'one' one class is right; 'bce'"):
        objectives("bce")
    with pytest.raises(ValueError, match="`objective` is for 'one', the model's tasks are 'one', 'many', 'score'"):
        objectives({"one": "entropy"})
    with pytest.raises(ValueError, match="There is no objective 'kl'"):
        objectives({"one": "kl", "many": "bce", "score": "feature_l1"})
    with pytest.raises(ValueError, match="`compares` is 'class'; it must be"):
        Objective(own, "class")


@pytest.mark.parametrize(
    "objective", [OBJECTIVES["entropy"], Objective(OBJECTIVES["entropy"].function, needs_expert=False)]
)
def test_an_objective_without_an_expert_runs_none(objective, tmp_path):
    model, _, _, data, collate, _ = make("one label", "right")
    calls = []
    model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    trainer = TintTrainer(model, arguments(tmp_path, expert_rows="online"), data, None, objective, collate)
    trainer.train()
    assert calls == [True] * 4


# ---- encoders without a head -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_features_of_encoders_without_a_head(side, tmp_path):
    base = T.BertModel(T.BertConfig(**TEXT)).eval()
    expert = make_experts(base, ["t"])["t"]
    model = peft_tint.from_experts(copy.deepcopy(base), {"t": expert}, tint_layer=[], coefficient_init=0.3)
    plain, samples = copy.deepcopy(model).merge_and_unload().eval(), texts()
    settings = arguments(tmp_path, max_steps=1, logging_steps=1, per_device_train_batch_size=len(samples))
    trainer = TintTrainer(
        model, settings, {"t": Dataset.from_list(samples)}, objective="feature_l1", processing_class=tokenizer(side)
    )
    trainer.train()
    if side == "right":
        rows = [[alone(each, s).last_hidden_state[0] for s in samples] for each in (plain, expert)]
        ours, theirs = map(torch.cat, rows)
        wanted = (ours - theirs).abs().mean().item()
        assert trainer.log_history[-1]["loss"] == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(ValueError, match="model of the task 't' has no head: it gives `last_hidden_state`"):
        TintTrainer(model, settings, {"t": Dataset.from_list(samples)})


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("one label", {"label": 7}, "the label 7 is none of its 3 classes"),
        ("one label", {"label": -100}, "none of its labels counts"),
        ("one label", {"label": [1, 2]}, r"labels have the shape \(4, 2\) and the model's output \(4, 3\)"),
        ("several labels", {"labels": [0.0, 1.0, 2.0, 0.0]}, "the label 2.0 is neither 0 nor 1"),
        ("several labels", {"labels": 1}, "it has one labels a sample; give a 0 or 1 for each of its 4 classes"),
        ("one label", {"label": None}, "'label' has None, of which no tensor can be made; remove or map it"),
        ("one label", {"label": "good"}, "'label' has 'good', of which no tensor can be made; remove or map it"),
        ("spans", {"start_positions": 40, "end_positions": 41}, "none of its labels counts"),
        ("frames", {"labels": [1, 2]}, "its labels cannot be compared with what a Wav2Vec2ForCTC gives"),
    ],
)
def test_labels_that_cannot_be(name, change, message, tmp_path):
    model, _, samples, _, collate, _ = make(name, "right")
    data = {"t": Dataset.from_list([{**sample, **change} for sample in samples])}
    if name == "frames":
        labelled = lambda rows: {"labels": torch.tensor([row["labels"] for row in rows])}  # noqa: E731
        collate = lambda rows: padded_audio(rows) | labelled(rows)  # noqa: E731
    trainer = TintTrainer(model, arguments(tmp_path), eval_dataset=data, data_collator=collate)
    with pytest.raises(ValueError, match=f"Task 't': {message}"):
        trainer.evaluate()


def test_spans_that_are_not_in_the_text_do_not_count(tmp_path):
    model, expert, samples, _, collate, score = make("spans", "right")
    outside = [samples[0] | {"start_positions": -100, "end_positions": -100}, samples[1] | {"end_positions": 50}]
    data = {"t": Dataset.from_list([*outside, *samples[2:]])}
    found = TintTrainer(model, arguments(tmp_path), eval_dataset=data, data_collator=collate).evaluate()["t"]
    wanted = score(expert, samples[2:])
    assert {metric: found[metric] for metric in wanted} == pytest.approx(wanted)


def test_one_class_alone(tmp_path):
    """Yes or no, for a text and for each pixel; 255 is neither."""
    settings = {"num_labels": 1, "problem_type": "multi_label_classification"}
    base = of_class(T.BertForSequenceClassification, T.BertConfig, **settings, **TEXT)()
    expert = make_experts(base, {"t": 1})["t"]
    model = peft_tint.from_experts(copy.deepcopy(base), {"t": expert}, tint_layer=[], coefficient_init=1.0)
    data = {"t": Dataset.from_list([sample | {"labels": [float(i % 2)]} for i, sample in enumerate(texts())])}
    trainer = TintTrainer(model, arguments(tmp_path), data, data, processing_class=tokenizer())
    trainer.train()
    chosen = np.array([(alone(expert, sample).logits[0] > 0).tolist() for sample in texts()])
    labels = np.array([[i % 2 == 1] for i in range(len(LENGTHS))])
    assert trainer.rows.objectives["t"] is OBJECTIVES["bce"]
    assert trainer.evaluate()["t"]["f1"] == pytest.approx(sklearn.f1_score(labels, chosen))

    config = {**segformer, "num_labels": 1}
    base = of_class(T.SegformerForSemanticSegmentation, T.SegformerConfig, decoder_hidden_size=16, **config)()
    model = peft_tint.from_experts(copy.deepcopy(base), make_experts(base, {"t": 1}), tint_layer=[])
    samples = [sample | {"labels": np.minimum(sample["labels"], 1).tolist()} for sample in images(base, None)]
    for sample in samples:
        sample["labels"][0] = [255] * 32
    found = TintTrainer(model, arguments(tmp_path), eval_dataset={"t": Dataset.from_list(samples)}).evaluate()["t"]
    assert {"f1", "subset_accuracy"} <= found.keys() and "mae" not in found


def test_labels_of_pixels_that_do_not_count():
    config = lambda **settings: types.SimpleNamespace(config=types.SimpleNamespace(**settings))  # noqa: E731
    assert ignored_by(config(semantic_loss_ignore_index=7), 3) == [-100, 7]
    assert ignored_by(config(loss_ignore_index=0), 3) == [-100, 0]
    assert ignored_by(object(), 150) == [-100, 255] and ignored_by(object(), 300) == [-100]


def test_a_task_without_an_objective_is_evaluated(tmp_path):
    base = BERT()
    model = peft_tint.from_experts(copy.deepcopy(base), make_experts(base, {"t": 3, "u": 3}))
    data = {task: Dataset.from_list([sample | {"label": 1} for sample in texts()]) for task in "tu"}
    objective = {"t": "entropy"}
    trainer = TintTrainer(model, arguments(tmp_path), {"t": data["t"]}, data, objective, processing_class=tokenizer())
    assert {"t", "u"} < trainer.evaluate().keys()


def test_a_decoder_without_tokens(tmp_path):
    model, _, _samples, _, collate, _ = make("t5", "right")
    data = {"t": Dataset.from_list(texts())}
    with pytest.raises(
        ValueError, match=r"'t': a T5ForConditionalGeneration needs a column `labels`.* has 'input_ids'"
    ):
        TintTrainer(model, arguments(tmp_path), data, data_collator=collate).train()


def test_texts_are_padded_for_a_model_that_takes_anything(tmp_path):
    """And every column reaches it."""

    class Open(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.classifier = torch.nn.Embedding(WORDS, 8), torch.nn.Linear(8, 3)

        def forward(self, input_ids, **further):
            weights = further["attention_mask"][..., None] * further["scale"][:, None, None]
            return self.classifier((self.words(input_ids) * weights).sum(1))

    base = Open()
    model = peft_tint.from_experts(base, make_experts(base, ["t"]), tint_layer="classifier")
    data = {"t": Dataset.from_list([sample | {"scale": 0.5} for sample in texts()])}
    trainer = TintTrainer(model, arguments(tmp_path), data, data, processing_class=tokenizer())
    trainer.train()
    assert trainer.evaluate()["t"]["agreement"] > 0
