"""How good a model and its expert are by the labels, counted batch by batch, so that no output is kept."""

import torch
from torch.nn import functional as F

from .outputs import IGNORED, OF_LANGUAGE, Output

WHO = ("", "expert_")
OF_LABELS = ("labelled", "label", "label_squared")  # which are the same for both


def count(problem: str, kind: str | None, output: Output, rows, expert_rows, model) -> dict:
    """{name: numbers of each sample, (samples,) or (samples, classes)}, from whose sums over all samples `metrics` are.

    `problem` is what a row is: "classes" of which one is right, "labels" that each is right or not, a "number", or
    "features". Raises ValueError for labels that cannot be."""
    samples = output.samples()
    found = {"rows": _wide(output.numbers())}

    def add(name, values):
        values = _wide(values)
        found[name] = values.new_zeros(len(output.values), *values.shape[1:]).index_add_(0, samples, values)

    if problem == "classes":
        add("agreeing", rows.argmax(-1) == expert_rows.argmax(-1))
    if problem == "labels":
        add("agreeing", ((rows > 0) == (expert_rows > 0)).float().mean(-1))
    if output.labels is None:
        return found
    if kind == "span":
        return found | _count_spans(output.labels, (rows, expert_rows))
    if output.raw.ndim == 4:
        return found | _count_pixels(problem, output, expert_rows, model)
    labels = output.take(output.labels)
    if problem == "classes" and labels.shape == rows.shape:
        problem = "labels"
    for who, own in zip(WHO, (rows, expert_rows), strict=True):
        for name, values in _COUNTS[problem](own, labels).items():
            add(name if name in OF_LABELS else who + name, values)
        if problem == "classes" and kind in OF_LANGUAGE:
            add(who + "surprise", F.cross_entropy(own, labels.long(), reduction="none", ignore_index=IGNORED))
    return found


def _wide(values):
    """In float64, where the device has it."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


def _count_classes(rows, labels):
    labels = labels.long()
    labelled = ~(labels == IGNORED)
    wrong = labelled & ((labels < 0) | (labels >= rows.shape[-1]))
    if wrong.any():
        raise ValueError(f"the label {labels[wrong][0].item()} is none of its {rows.shape[-1]} classes")
    return {"labelled": labelled, "right": labelled & (rows.argmax(-1) == labels)}


def _count_labels(rows, labels):
    if labels.numel() != rows.numel():
        given = labels.shape[1] if labels.ndim > 1 else "one"
        raise ValueError(f"it has {given} labels a sample; give a 0 or 1 for each of its {rows.shape[1]} classes")
    labels = labels.view_as(rows)
    wrong = (labels != 0) & (labels != 1)
    if wrong.any():
        raise ValueError(f"the label {labels[wrong][0].item()} is neither 0 nor 1, as several labels a sample are")
    chosen, labels = rows > 0, labels.bool()
    return {
        "labelled": torch.ones(len(rows), device=rows.device),
        "exact": (chosen == labels).all(1),
        "hits": (chosen & labels).sum(1),
        "named": chosen.sum(1) + labels.sum(1),
    }


def _count_numbers(rows, labels):
    """Numbers that are not finite do not count, as those of a depth map where nothing was measured."""
    rows, labels = _wide(rows), _wide(labels).view_as(rows)
    labelled = labels.isfinite()
    rows, labels = rows * labelled, labels.where(labelled, 0)
    off = rows - labels
    sums = {"error": off.abs(), "squared": off.square(), "output": rows, "output_squared": rows.square()}
    sums |= {"product": rows * labels, "labelled": labelled, "label": labels, "label_squared": labels.square()}
    return {name: values.sum(1) for name, values in sums.items()}


_COUNTS = {"classes": _count_classes, "labels": _count_labels, "number": _count_numbers}


def _count_spans(labels, both_rows):
    """A span that is not within the text does not count, as transformers' own loss has it."""
    length = both_rows[0].shape[-1]
    labelled = ((labels >= 0) & (labels < length)).all(1)
    found = {"labelled": _wide(labelled)}
    for who, rows in zip(WHO, both_rows, strict=True):
        start, end = rows.view(len(labels), 2, -1).argmax(-1).to(labels.device).unbind(1)
        shared = (torch.minimum(end, labels[:, 1]) - torch.maximum(start, labels[:, 0]) + 1).clamp(min=0)
        both = (end - start + 1).clamp(min=0) + labels[:, 1] - labels[:, 0] + 1
        exact = (start == labels[:, 0]) & (end == labels[:, 1])
        found[f"{who}exact"] = _wide(exact & labelled)
        found[f"{who}overlap"] = 2 * _wide(shared * labelled) / _wide(both.clamp(min=1))
    return found


def _count_pixels(problem, output, expert_rows, model):
    """Outputs are brought to the size of the labels, as the models' own losses do; one sample at a time, for they may
    be large."""
    raw, labels, found = output.raw, output.labels, []
    if labels.ndim == 4 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 3:
        raise ValueError(f"it has labels of the shape {tuple(labels.shape)}; give one of each pixel")
    expert = expert_rows.view(len(raw), *raw.shape[2:], raw.shape[1]).movedim(-1, 1)
    ignored = torch.tensor(ignored_by(model, raw.shape[1]), device=labels.device)
    is_yes_or_no = problem == "number" and not labels.is_floating_point()
    for ours, theirs, label in zip(raw.float(), expert, labels, strict=True):
        kept = ~torch.isin(label, ignored) if not label.is_floating_point() else label.isfinite()
        sample, wanted = {}, label[kept]
        for who, own in zip(WHO, (ours, theirs), strict=True):
            if own.shape[1:] != label.shape:
                own = F.interpolate(own[None], size=label.shape, mode="bilinear", align_corners=False)[0]
            if problem == "classes":
                counted = _count_regions(own.argmax(0)[kept], wanted, len(own))
            else:
                count_one, rows = _COUNTS["labels" if is_yes_or_no else problem], own.movedim(0, -1)[kept]
                counted = count_one(rows, wanted.view(len(rows), -1))
            for name, values in counted.items():
                values = _wide(values)
                sample[name if name in OF_LABELS else who + name] = values.sum() if problem != "classes" else values
        found.append(sample)
    return {name: torch.stack([sample[name] for sample in found]) for name in found[0]}


def ignored_by(model, classes) -> list[int]:
    """The labels of pixels that do not count."""
    config, names = getattr(model, "config", None), ("semantic_loss_ignore_index", "loss_ignore_index")
    found = [getattr(config, name) for name in names if hasattr(config, name)]
    return [IGNORED, *(found or ([255] if classes <= 255 else []))]


def _count_regions(predicted, labels, classes):
    """Pixels by class, of which both, one and all are."""
    labels = labels.long()
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        raise ValueError(f"the label {labels[wrong][0].item()} is none of its {classes} classes")
    pairs = torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)
    both = pairs.diagonal()
    union = pairs.sum(0) + pairs.sum(1) - both
    return {"labelled": pairs.sum(), "right": both.sum(), "intersection": both, "union": union}


def metrics(sums: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of the merged model, of the expert (`expert_...`), and their ratio (`normalized_...`, NaN where the expert's is
    zero). Raises ValueError if nothing is labelled."""
    found = {"agreement": (sums["agreeing"] / sums["rows"]).item()} if "agreeing" in sums else {}
    if "labelled" not in sums:
        return found
    if not sums["labelled"] > 0:
        raise ValueError("none of its labels counts")
    for who in WHO:
        found |= {who + name: float(value) for name, value in _of(who, sums).items()}
    for name in [name for name in found if f"expert_{name}" in found]:
        expert = found[f"expert_{name}"]
        found[f"normalized_{name}"] = found[name] / expert if expert else float("nan")
    return found


def _of(who, sums):
    labelled, found = sums["labelled"], {}
    has, own = lambda name: who + name in sums, lambda name: sums[who + name]
    if has("right"):
        found["accuracy"] = own("right") / labelled
    if has("surprise"):
        found["perplexity"] = (own("surprise") / labelled).exp()
    if has("union"):
        seen = own("union") > 0
        found["mean_iou"] = (own("intersection")[seen] / own("union")[seen]).mean()
    if has("overlap"):
        found |= {"exact_match": own("exact") / labelled, "f1": own("overlap") / labelled}
    if has("named"):
        found["subset_accuracy"] = own("exact") / labelled
        found["f1"] = 2 * own("hits") / own("named").clamp(min=1)
    if has("error"):
        x, y = own("output"), sums["label"]
        spread = (labelled * own("output_squared") - x.square()) * (labelled * sums["label_squared"] - y.square())
        found |= {"mae": own("error") / labelled, "mse": own("squared") / labelled}
        if spread > 0:  # or there is no correlation
            found["pearson"] = (labelled * own("product") - x * y) / spread.sqrt()
    return found
