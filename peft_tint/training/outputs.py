"""What a row of a model's output is: which rows a batch has, which of them count, and which label belongs to each.

The trainer asks this wherever it compares a model with its expert or with labels, so that all of it agrees.
"""

import inspect
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto as auto
from transformers.utils import TransformersKwargs

SPAN = ("start_positions", "end_positions")
LABELS = ("labels", "label", "label_ids", *SPAN)
IGNORED = -100  # the label of what does not count, everywhere in transformers


def _classes(*kinds):
    names = set()
    for kind in kinds:
        for name in getattr(auto, f"MODEL_FOR_{kind}_MAPPING_NAMES").values():
            names.update([name] if isinstance(name, str) else name)
    return names


DECODERS = _classes("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")
CLASSES = {"masked": _classes("MASKED_LM"), "causal": DECODERS, "tokens": _classes("TOKEN_CLASSIFICATION")}
CLASSES |= {"span": _classes("QUESTION_ANSWERING"), "frames": _classes("CTC"), "depth": _classes("DEPTH_ESTIMATION")}
CLASSES["features"] = {name for name in auto.MODEL_MAPPING_NAMES.values() if isinstance(name, str)}
OF_LANGUAGE = ("causal", "seq2seq", "masked")
BY_LABELS = (*OF_LANGUAGE, "tokens")  # where positions that are labelled -100 do not count
# Decoders of which the loss takes labels as they are, one a token; those of the others are of the next token
UNSHIFTED = {"XLNetLMHeadModel"} | {
    f"{name}ForCausalLM"
    for name in (
        "Bart",
        "Blenderbot",
        "BlenderbotSmall",
        "Marian",
        "MBart",
        "Pegasus",
        "ProphetNet",
        "TrOCR",
        "Whisper",
    )
}
# Positions of these are numbers in a table, counted from the first token, padding or not. Those of the models that have
# a masked form, such as RoBERTa's, are their own affair.
BY_POSITION = set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)


def kind_of(model: torch.nn.Module) -> str | None:
    """By the class of a transformers model: "causal", "seq2seq" or "masked" language model, "tokens", "span" of an
    answer, "frames" of CTC, "depth" maps, "features" of an encoder without a head. None: one row a sample, a token or a
    pixel, as the shape of the output tells."""
    names = {cls.__name__ for cls in type(model).__mro__}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and names & DECODERS:
        return "seq2seq"
    return next((kind for kind, known in CLASSES.items() if names & known), None)


def inputs_of(model: torch.nn.Module, kind: str | None, batch: dict, task: str) -> dict:
    """What the model's forward takes of a batch.

    The decoder's tokens are made of the labels, by the model itself. Positions begin at the first token that is no
    padding, as in `generate`, so a sample's output does not depend on the others in its batch.
    """
    takes = inspect.signature(model.forward).parameters
    inputs = {name: value for name, value in batch.items() if name not in LABELS}
    if stray := inputs.keys() - _taken(model, takes, inputs):
        warnings.warn(
            f"Task {task!r}: the forward of a {type(model).__name__} does not take {', '.join(sorted(stray))}; its "
            "batches go without.",
            stacklevel=2,
        )
        inputs = {name: value for name, value in inputs.items() if name not in stray}
    if kind == "seq2seq" and not inputs.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}:
        if "labels" not in batch:
            raise ValueError(
                f"Task {task!r}: a {type(model).__name__} needs a column `labels`, of which its decoder's tokens are "
                f"made, or `decoder_input_ids`; the batch has {', '.join(map(repr, batch))}."
            )
        inputs["labels"] = batch["labels"]
    if kind in ("causal", "seq2seq") and "use_cache" in takes:
        inputs.setdefault("use_cache", False)  # with which packed samples would see each other
    mask = inputs.get("attention_mask")
    by_position = getattr(getattr(model, "config", None), "model_type", None) in BY_POSITION
    if by_position and mask is not None and mask.ndim == 2 and not inputs.keys() & {"position_ids", "pixel_values"}:
        if "position_ids" in takes:
            inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return inputs


def _taken(model, takes, names):
    """Of these names those that the forward takes: by name, or as one of the further ones of transformers' models."""
    if takes_any(model, takes):
        return names
    is_further = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in takes.values())
    return takes.keys() | (TransformersKwargs.__annotations__.keys() if is_further else set())


def takes_any(model: torch.nn.Module, takes: Mapping) -> bool:
    """Whether a forward with these parameters takes inputs of any name. Those of transformers' models have `**kwargs`
    for few names, unless there is nothing else."""
    is_open = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in takes.values())
    return is_open and not (isinstance(model, PreTrainedModel) and len(takes) > 2)


def output_of(result) -> torch.Tensor:
    """The tensor of a model's output that a task is about, with one more axis of one class for a depth map. That of an
    encoder without a head is its hidden states."""
    if isinstance(result, torch.Tensor):
        return result
    if not isinstance(result, Mapping):
        raise ValueError(
            f"The model gives a {type(result).__name__}; it must give a tensor, or a dict with logits: set "
            "`config.return_dict = True`, or wrap it in a module of yours."
        )
    if "start_logits" in result:  # question answering: two choices among the tokens
        return torch.stack([result["start_logits"], result["end_logits"]], 1)
    if "predicted_depth" in result:
        return result["predicted_depth"].unsqueeze(1)
    for name in ("logits", "last_hidden_state"):
        if name in result:
            return result[name]
    raise ValueError(
        f"The model gives {', '.join(result)}; it must give logits or a tensor. Wrap it in a module of yours."
    )


class Output(NamedTuple):
    """Of one forward. Row by row, in this order, are those of the positions that count."""

    raw: torch.Tensor  # as the model gives it
    values: torch.Tensor  # (samples, positions, classes)
    counts: torch.Tensor | None = None  # (samples, positions), bool; None: all
    # (samples, positions), or (samples, positions, classes) where each class has its own, or as large maps as they are
    labels: torch.Tensor | None = None

    def rows(self) -> torch.Tensor:
        """(rows, classes), in float32."""
        return self.take(self.values).float()

    def take(self, values: torch.Tensor) -> torch.Tensor:
        """Those of any tensor (samples, positions, ...) that count."""
        return values.flatten(0, 1) if self.counts is None else values[self.counts]

    def numbers(self) -> torch.Tensor:
        """How many rows each sample has, (samples,)."""
        if self.counts is None:
            return torch.full((len(self.values),), self.values.shape[1], device=self.values.device)
        return self.counts.sum(1)

    def fill(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows as the model would give them, with -100 where nothing counts."""
        values = torch.full(self.values.shape, float(IGNORED), device=rows.device)
        if self.counts is None:
            values = rows.view(values.shape)
        else:
            values[self.counts] = rows
        if self.raw.ndim == 4:
            return values.transpose(1, 2).reshape(self.raw.shape)
        return values.view(self.raw.shape)

    def samples(self) -> torch.Tensor:
        """Which sample a row is of, (rows,)."""
        return torch.repeat_interleave(self.numbers())


def read_output(result, model: torch.nn.Module, kind: str | None, batch: dict, task: str) -> Output:
    """The rows of what the forward of a batch gave. Raises ValueError where labels or mask do not fit."""
    raw, mask = output_of(result), mask_of(model, kind, batch)
    labels = None if kind == "features" else next((batch[name] for name in LABELS if name in batch), None)
    if labels is not None and not isinstance(labels, torch.Tensor):
        raise ValueError(
            f"Task {task!r}: the collator gives labels as a {type(labels).__name__}; give a tensor, of one size for "
            "all samples, or leave them out."
        )
    if not isinstance(result, torch.Tensor) and "start_logits" in result:
        if mask is not None:
            raw = raw.masked_fill(~mask.bool()[:, None], -1e4)  # -inf in any precision, and times zero still zero
        spans = (
            torch.stack([batch[name].flatten() for name in SPAN], 1) if all(name in batch for name in SPAN) else None
        )
        return Output(raw, raw, labels=spans)
    if raw.ndim == 4:
        return Output(raw, raw.flatten(2).transpose(1, 2), labels=labels)
    if raw.ndim == 2:
        fits = labels is None or labels.shape in (raw.shape, (len(raw),), (len(raw), 1))
        _check(fits, task, labels, raw, "one of each sample, or of each class of each sample")
        if labels is not None:
            labels = labels[:, None] if labels.shape == raw.shape and raw.shape[1] > 1 else labels.reshape(-1, 1)
        return Output(raw, raw[:, None], labels=labels)
    if raw.ndim != 3:
        raise ValueError(
            f"Task {task!r}: the model gives a tensor of shape {tuple(raw.shape)}; it must be (samples, classes), "
            "(samples, tokens, classes) or (samples, classes, height, width). Wrap it in a module of yours."
        )
    if kind == "causal":
        return _of_next_tokens(raw, mask, labels, batch.get("logits_to_keep"), model, task)
    counts = _tokens_that_count(mask, raw, model, task)
    if kind == "frames":  # labels are shorter than the frames; only a metric of the user's can compare them
        return Output(raw, raw, counts)
    if labels is not None:
        _check(labels.shape == raw.shape[:2], task, labels, raw, "one of each token")
        if kind in BY_LABELS:
            labelled = labels != IGNORED
            pad, end = (getattr(getattr(model, "config", None), f"{name}_token_id", None) for name in ("pad", "eos"))
            if kind == "seq2seq" and pad is not None and pad != end:
                labelled &= labels != pad
            counts = labelled if counts is None else counts & labelled
    return Output(raw, raw, counts, labels)


def mask_of(model, kind: str | None, batch: dict) -> torch.Tensor | None:
    """Which tokens of the output's side are no padding."""
    decodes = kind == "seq2seq" or (kind == "features" and getattr(model.config, "is_encoder_decoder", False))
    return batch.get("decoder_attention_mask" if decodes else "attention_mask")


def _tokens_that_count(mask, raw, model, task):
    """The mask of the input as one of the output, which of sounds is shorter."""
    if mask is None or mask.shape == raw.shape[:2]:
        return None if mask is None else mask.bool()
    if hasattr(model, "_get_feature_vector_attention_mask"):
        return model._get_feature_vector_attention_mask(raw.shape[1], mask).bool()
    for name in ("_get_subsampling_output_length", "_get_feat_extract_output_lengths"):
        if hasattr(model, name):
            lengths = getattr(model, name)(mask.sum(-1))
            return torch.arange(raw.shape[1], device=mask.device) < lengths[:, None]
    if mask.all():
        return None
    raise ValueError(
        f"Task {task!r}: the output has {raw.shape[1]} positions a sample, and the mask has the shape "
        f"{tuple(mask.shape)}, so it does not say which of them are padding. Give batches without padding, or wrap the "
        "model in a module of yours that gives what counts."
    )


def _of_next_tokens(raw, mask, labels, kept, model, task):
    """`kept` says which tokens the output is of, see `take_kept`; labels and mask are of all."""
    full = next((given for given in (labels, mask) if kept is not None and given is not None), raw)
    counts = _tokens_that_count(mask, full, model, task)
    if labels is not None:
        _check(labels.shape == full.shape[:2], task, labels, full, "one of each token")
        if type(model).__name__ not in UNSHIFTED:  # the output at a token is about the next one
            labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
            counts = None if counts is None else F.pad(counts[:, :-1] & counts[:, 1:], (0, 1), value=False)
        labelled = labels != IGNORED
        counts = labelled if counts is None else counts & labelled
    labels, counts = (None if values is None else take_kept(values, kept) for values in (labels, counts))
    return Output(raw, raw, counts, labels)


def take_kept(values: torch.Tensor, kept: torch.Tensor | int | None) -> torch.Tensor:
    """Of (samples, tokens, ...) the tokens that transformers' `logits_to_keep` says: those at its indices, or the last
    so many; None for all."""
    if kept is None:
        return values
    return values[:, slice(-kept, None) if isinstance(kept, int) else kept]


def _check(fits, task, labels, raw, needed):
    if not fits:
        raise ValueError(
            f"Task {task!r}: labels have the shape {tuple(labels.shape)} and the model's output {tuple(raw.shape)}; "
            f"give {needed}."
        )


def are_close(rows: torch.Tensor, others: torch.Tensor) -> bool:
    """Up to what lower precision and other sizes of matrices round differently."""
    if rows.shape != others.shape or not rows.numel():
        return rows.shape == others.shape
    return bool((rows - others).abs().max() <= 0.02 * others.abs().max())
