"""How near a task that has no adapter is to those that have one: weights for `add_weighted_adapter`, without data."""

from collections.abc import Callable

import numpy as np
import torch
from peft import PeftModel

from .._structure import named_tensors, plain_modules
from .._wrapped_layer import plain_name
from ..experts import load_expert
from .layer import DtsLayer


def description_similarity(encode: Callable, descriptions: list[str], unseen: str) -> list[float]:
    """Cosines of the task `unseen` with other tasks, all described in words, as weights that sum to 1 (negative: 0).

    `encode` is a sentence encoder that you choose, such as `SentenceTransformer(...).encode`: a list of n texts to an
    array or tensor of shape (n, d). Raises ValueError if no task is similar.
    """
    if isinstance(descriptions, str) or not descriptions:
        raise ValueError(f"`descriptions` is {descriptions!r}; give a list with one for each adapter.")
    vectors = encode([unseen, *descriptions])
    vectors = torch.as_tensor(vectors if isinstance(vectors, torch.Tensor) else np.asarray(vectors)).cpu().double()
    if vectors.ndim != 2 or len(vectors) != 1 + len(descriptions):
        raise ValueError(
            f"`encode` gave the shape {tuple(vectors.shape)} for {1 + len(descriptions)} texts; it must be (texts, d)."
        )
    return _normalized(torch.cosine_similarity(vectors[:1], vectors[1:]))


def weight_similarity(model: PeftModel, adapters: list[str], expert) -> list[float]:
    """As `description_similarity`, by the cosines of task vectors in the matrix before the head, the last one that all
    `adapters` change.

    `expert` is a model of the unseen task, for instance one that was tuned on few samples: a Hub id, a folder, a module
    or a state dict. It is only read. The weights themselves, which the release compares, all have cosines next to 1.
    """
    if any(isinstance(layer, DtsLayer) and layer.merged for layer in model.modules()):
        raise ValueError("An adapter is merged into the weights; call `unmerge_adapter()` first.")
    for adapter in adapters:
        if adapter not in model.peft_config:
            raise ValueError(f"There is no adapter {adapter!r}; there are {', '.join(map(repr, model.peft_config))}.")
    base = model.base_model.model
    tensors, _ = named_tensors(dict(plain_modules(base)))
    found = None
    for name, layer in base.named_modules():
        if isinstance(layer, DtsLayer) and all(
            a in layer.dts_decoded and "weight" in layer.dts_decoded[a] for a in adapters
        ):
            weight = f"{plain_name(name)}.weight"
            found = (weight, layer) if tensors[weight].ndim == 2 else found
    if found is None:
        raise ValueError(f"There is no matrix that all of the adapters {adapters} change; give numbers as weights.")
    name, layer = found
    loaded = load_expert("unseen", expert, base)
    if name not in loaded.tensors or loaded.tensors[name].shape != tensors[name].shape:
        raise ValueError(f"The expert has no {name!r} of the base's shape; it must be fine-tuned from the base model.")
    own = loaded.task_vector(name, tensors[name], loaded.tensors[name]).flatten()
    others = [layer.dts_decoded[adapter]["weight"].dense_of(0, tensors[name].shape).flatten() for adapter in adapters]
    return _normalized(torch.cosine_similarity(own[None], torch.stack(others)))


def _normalized(cosines):
    weights = cosines.clamp_min(0)
    if not weights.sum() > 0:  # or NaN
        raise ValueError(f"The task is similar to none of the others: the cosines are {cosines.tolist()}.")
    return (weights / weights.sum()).tolist()
