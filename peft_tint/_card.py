"""Model cards: what was merged, how, how good it is, and how to load it. They name Hub ids and no local folders."""

import json
import math
import os
import re
from importlib.metadata import version
from importlib.util import find_spec
from typing import NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modelcard import TASK_MAPPING
from yaml import YAMLError

from .experts import hub_reference

FILE, PICTURE, NUMBERS = "README.md", "coefficients.png", "coefficients.json"
TINT_FOLDER = "tint"  # the tasks of a merged model, beside it
START = "<!-- peft_tint writes this part anew on each save; edit what is before and after it -->"
END = "<!-- the end of what peft_tint writes -->"
METHODS = {
    "TINT": "Experts of {base} in one model: their task vectors are added to it, weighted by merging "
    "coefficients{layers}. The method is TINT "
    "([Model Tinting](https://arxiv.org/abs/2412.19098)).",
    "DTS": "Fine-tunes of {base}, compressed: for each task what its fine-tuning changed, and the head. The method is "
    "DTS ([Decomposition, Thresholding and Scaling](https://arxiv.org/abs/2512.01461)).",
}
ADDED_TO_FORM = re.compile(r"### Framework versions|- PEFT .*|This is the model card of .* automatically generated\.|")
GIVES_LOGITS = ("text-classification", "token-classification", "fill-mask", "text-generation")


class Facts(NamedTuple):
    """What a card tells of a model. `experts` are by task for TINT, by adapter for DTS, and None if not on the Hub."""

    tuner: nn.Module
    adapter: str
    config: PeftConfig
    base: str | None
    experts: dict[str, dict | None]
    hashes: dict[str, str]  # sha256 of the experts' weights, as far as they are known
    pipeline: str | None  # the Hub's word for what the model does


def model_card(
    model: nn.Module,
    repo_id: str | None = None,
    *,
    revision: str | None = None,
    processing_class=None,
    results: dict[str, dict[str, float]] | None = None,
    datasets: dict[str, str | dict] | None = None,
    training: dict | None = None,
    tags: tuple[str, ...] = (),
    existing: ModelCard | None = None,
    merged_for: str | None = None,
) -> ModelCard:
    """The card of a model with TINT or DTS adapters.

    Args:
        model: a PeftModel.
        repo_id, revision: where the model will be; without them the card is for a folder.
        processing_class: what is saved with the model; with a tokenizer, the card's example runs on a text.
        results: what `TintTrainer.evaluate` returns; of DTS, the same by adapter.
        datasets: {task: Hub id of its data, or {"id", "config", "split", "revision"}}.
        training: what to tell of the training, {name: value}.
        tags: more tags.
        existing: a card of which metadata, and text outside of the part that is written here, are kept.
        merged_for: for `save_merged`, the task of which the whole is a plain model.

    Raises ValueError for two tasks of which `datasets` names the same data.
    """
    facts = _facts(model)
    results, name = results or {}, (repo_id or facts.config.peft_type.value).rpartition("/")[2]
    data = _metadata(facts, datasets or {}, tags, merged_for)
    if results:
        data.metrics = [metric for metric in _metrics(results) if metric != "agreement"] or None
        data.model_name, data.eval_results = name, _eval_results(results, datasets or {}, facts.pipeline or "other")
    parts = [
        START,
        f"# {name}",
        _description(facts, merged_for),
        _table(facts, results),
        _coefficients_part(facts),
        "## Training\n\n" + _list(training) if training else None,
        _use(facts, repo_id, revision, processing_class, merged_for),
        "### Framework versions\n\n" + _list(_versions(), ""),
        END,
    ]
    return _added_to(existing, data, "\n\n".join(filter(None, parts)), set(facts.experts))


def save_card(model: nn.Module, folder: str | os.PathLike, **kwargs) -> None:
    """Writes `model_card(model, **kwargs)`, and the coefficients as numbers and, with matplotlib, as a picture."""
    model_card(model, **kwargs).save(os.path.join(folder, FILE))
    coefficients = coefficients_of(_facts(model))
    if coefficients is None:
        return
    rows = {task: row.tolist() for task, row in zip(coefficients.tasks, coefficients.values, strict=True)}
    with open(os.path.join(folder, NUMBERS), "w", encoding="utf-8") as file:
        json.dump({"units": coefficients.units, "coefficients": rows}, file, indent=1)
    if find_spec("matplotlib"):  # no requirement
        from .plots import plot_coefficients

        plot_coefficients(coefficients, os.path.join(folder, PICTURE))


def read_card(file: str | os.PathLike) -> ModelCard | None:
    """The card in a file, if there is one. Of PEFT's or transformers' form that nobody has filled in nothing stays.

    Raises ValueError for one that cannot be read, of which what was added would be lost."""
    if not os.path.exists(file):
        return None
    try:
        card, form = ModelCard.load(file), ModelCard.from_template(ModelCardData())
    except (ValueError, YAMLError) as error:
        raise ValueError(f"The model card {str(file)!r} cannot be read ({error}). Mend or delete it.") from error
    if all(ADDED_TO_FORM.fullmatch(line) for line in set(card.text.splitlines()) - set(form.text.splitlines())):
        card.text, card.data.tags, card.data.base_model = "", None, None
    return card


# ---- what there is to tell -------------------------------------------------------------------------------------------


def _facts(model):
    tuner = model.base_model if isinstance(model, PeftModel) else model
    adapter, class_name = tuner.active_adapters[0], type(tuner.model).__name__
    config = tuner.peft_config[adapter]
    if config.peft_type == "TINT":
        sources, hashes = config.experts, config.experts_sha256 or {}
    else:
        configs = tuner.peft_config
        sources = {name: config.expert for name, config in configs.items()}
        hashes = {name: config.expert_sha256 for name, config in configs.items() if config.expert_sha256}
    experts = {name: hub_reference(source) for name, source in sources.items()}
    experts = {name: {"id": source} if isinstance(source, str) else source for name, source in experts.items()}
    pipeline = (task for task, known in TASK_MAPPING.items() if class_name in _names(known.values()))
    base = hub_reference(config.base_model_name_or_path)
    return Facts(tuner, adapter, config, base, experts, hashes, next(pipeline, None))


def _names(values):
    return {name for value in values for name in ([value] if isinstance(value, str) else value)}


def coefficients_of(facts):
    """None for DTS, for coefficients that are baked in, and where there are none."""
    if facts.config.peft_type != "TINT" or vars(facts.config).get("backbone_merged"):
        return None
    coefficients = facts.tuner.coefficients()
    return coefficients if coefficients.units else None


def _metrics(results):
    """The names of what was measured, without those that compare it with the expert."""
    names = dict.fromkeys(name for metrics in results.values() for name in metrics)
    return [name for name in names if not name.startswith(("expert_", "normalized_"))]


def _versions():
    from . import __version__  # which imports this module

    ours = {"peft_tint": __version__}  # not by its name: what runs from its source alone is no installed package
    return {"PEFT": version("peft"), **ours, "Transformers": version("transformers"), "PyTorch": version("torch")}


# ---- metadata --------------------------------------------------------------------------------------------------------


def _metadata(facts, datasets, tags, merged_for):
    method = facts.config.peft_type.value.lower()
    if merged_for is None:
        data = ModelCardData(library_name="peft", base_model=facts.base, tags=["peft_tint", method, *tags])
        if facts.base:
            data.tags.append(f"base_model:adapter:{facts.base}")
    else:
        ids = [facts.base, *(source["id"] for source in facts.experts.values() if source)]
        data = ModelCardData(library_name="transformers", base_model=list(filter(None, ids)) or None)
        data.tags = ["peft_tint", method, "merge", *tags]
    if data.base_model:
        data["base_model_relation"] = "adapter" if merged_for is None else "merge"
    data.pipeline_tag = facts.pipeline
    data.datasets = list(dict.fromkeys(_dataset(source)["id"] for source in datasets.values())) or None
    return data


def _dataset(source):
    return {"id": source} if isinstance(source, str) else source


def _eval_results(results, datasets, task_type):
    found, places = [], {}
    for task, metrics in results.items():
        if task == "mean":
            continue
        place = _dataset(datasets.get(task, task))
        first = places.setdefault(tuple(place.get(key) for key in ("id", "config", "split", "revision")), task)
        if first != task:
            raise ValueError(
                f"`datasets` gives the tasks {first!r} and {task!r} the same data, {place}, where the card would take "
                "one's results for the other's. Say which part of it each is: {'id': ..., 'config': ..., 'split': ...}."
            )
        for metric, value in metrics.items():
            if not metric.startswith("expert_") and math.isfinite(value):
                of_dataset = {f"dataset_{key}": value for key, value in place.items() if key != "id"}
                found.append(
                    EvalResult(
                        task_type=task_type,
                        task_name=task,
                        dataset_type=place["id"],
                        dataset_name=task,
                        metric_type=metric,
                        metric_value=value,
                        **of_dataset,
                    )
                )
    return found


def _added_to(existing, data, text, tasks):
    """The card with what `existing` has besides: its other metadata, and its text around the generated part. Results
    for other tasks than `tasks` stay; those for them were another state's."""
    if existing is not None:
        old = existing.data
        data.tags = sorted({*data.tags, *(old.tags or ())})
        others = [result for result in old.eval_results or () if result.task_name not in tasks]
        if others:
            data.model_name, data.eval_results = old.model_name, [*others, *(data.eval_results or ())]
        kept = {key: value for key, value in vars(old).items() if key not in ("eval_results", "model_name")}
        data = ModelCardData(**kept | {key: value for key, value in vars(data).items() if value is not None})
        generated = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)
        around, found = generated.subn(lambda _: text, existing.text.strip(), count=1)
        text = around if found else f"{text}\n\n{around}"
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n")


# ---- text ------------------------------------------------------------------------------------------------------------


def _list(facts, mark=":"):
    return "\n".join(f"- {name}{mark} {value}" for name, value in facts.items())


def _link(repo_id):
    return f"[{repo_id}](https://huggingface.co/{repo_id})"


def _description(facts, merged_for):
    layers = facts.config.to_dict().get("tint_layer") or []
    layers = ", ".join(f"`{name}`" for name in ([layers] if isinstance(layers, str) else layers))
    if not layers and facts.config.peft_type == "TINT" and facts.tuner.head_layers:
        layers = "the head"
    layers = f", and each task has a copy of its own of {layers}" if layers else ""
    base = _link(facts.base) if facts.base else f"a {type(facts.tuner.model).__name__}"
    text = METHODS[facts.config.peft_type].format(base=base, layers=layers)
    if merged_for is not None:
        text += f" Here all is merged: a plain transformers model for the task `{merged_for}`, and in the folder "
        text += f"`{TINT_FOLDER}` what the tasks differ in. No expert is needed to load them."
    return text


def _table(facts, results):
    """The experts, and for each metric the model's, the expert's, and their ratio."""
    metrics = {name: any(f"expert_{name}" in own for own in results.values()) for name in _metrics(results)}
    head = ["task", "expert", "revision", *(["sha256"] if facts.hashes else [])]
    for metric, is_compared in metrics.items():
        head += [metric, "of the expert", "normalised"] if is_compared else [metric]
    lines = [head, ["---"] * len(head)]
    for task in dict.fromkeys([*facts.experts, *results]):
        expert, own = facts.experts.get(task), results.get(task, {})
        line = [task, *_expert_cells(expert)] if task in facts.experts else [task, "", ""]
        line += [facts.hashes.get(task) or ""] if facts.hashes else []
        for metric, is_compared in metrics.items():
            line.append(_cell(own, metric, ".3f"))
            if is_compared:
                line += [_cell(own, f"expert_{metric}", ".3f"), _cell(own, f"normalized_{metric}", ".1%")]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _expert_cells(expert):
    if expert is None:
        return "not on the Hub", ""
    return " ".join([_link(expert["id"]), expert.get("subfolder") or ""]).strip(), expert.get("revision") or "main"


def _cell(metrics, name, form):
    if name not in metrics:
        return ""
    return f"{metrics[name]:{form}}" if math.isfinite(metrics[name]) else "-"


def _coefficients_part(facts):
    if coefficients_of(facts) is None:
        return None
    picture = f"\n\n![merging coefficients]({PICTURE})" if find_spec("matplotlib") else ""
    return f"## Merging coefficients\n\nAs numbers: [{NUMBERS}]({NUMBERS}).{picture}"


def _use(facts, repo_id, revision, processing_class, merged_for):
    """Code that runs as it stands: in the folder of the model, where there is no `repo_id`."""
    place, base_class = repo_id or ".", type(facts.tuner.model).__name__
    runs = isinstance(processing_class, PreTrainedTokenizerBase) and facts.pipeline in GIVES_LOGITS
    is_tint = facts.config.peft_type == "TINT"
    lines = ["import peft_tint  # registers TINT and DTS with PEFT", "from peft import PeftModel"]
    if isinstance(facts.tuner.model, PreTrainedModel):
        lines.append(f"from transformers import {'AutoTokenizer, ' if runs else ''}{base_class}")
    lines.append("")
    if merged_for is not None:
        lines.append(_call(f"base = {base_class}.from_pretrained(", place, revision=revision))
        lines[-1] += f"  # by itself a plain model for the task {merged_for}"
    elif facts.base and isinstance(facts.tuner.model, PreTrainedModel):
        lines.append(_call(f"base = {base_class}.from_pretrained(", facts.base, revision=facts.config.revision))
    else:
        lines.append(f"base = ...  # the {base_class} that the adapter was made for")
    load = "model = PeftModel.from_pretrained(base, "
    for name in [facts.adapter] if is_tint else facts.tuner.peft_config:
        # PEFT saves one named "default" into the folder itself
        named = {} if name == "default" else {"adapter_name": name, "subfolder": name}
        named = named if merged_for is None else {"subfolder": TINT_FOLDER}
        lines.append(_call(load, place, **named, revision=revision))
        load = "model.load_adapter("
    lines.append("model.eval()")
    if runs:
        lines.append(_call("tokenizer = AutoTokenizer.from_pretrained(", place, revision=revision))
        lines.append('batch = tokenizer(["A text."], return_tensors="pt")')
    lines.append(f"for task in {'model.tasks' if is_tint else json.dumps(list(facts.experts))}:")
    lines.append(f"    model.{'set_task' if is_tint else 'set_adapter'}(task)")
    if isinstance(facts.tuner.model, PreTrainedModel):
        lines.append(f"    print(task, {'model(**batch).logits' if runs else 'model.config.id2label'})")
    else:
        lines.append("    ...  # call the model")
    return "\n".join(["## Use", *([] if repo_id else ["", "In this folder:"]), "", "```python", *lines, "```"])


def _call(function, *values, **named):
    """The code of a call; `function` ends with what comes before the values."""
    arguments = [*map(json.dumps, values), *(f"{name}={json.dumps(v)}" for name, v in named.items() if v)]
    return f"{function}{', '.join(arguments)})"
