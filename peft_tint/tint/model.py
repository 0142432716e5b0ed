"""TINT: experts of one base model as one PEFT model with trainable merging coefficients and tint layers."""

import copy
import math
import os
import tempfile
import weakref
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from datasets.fingerprint import Hasher
from huggingface_hub import CommitInfo, whoami
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import _ExcludedModule
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel

from .._card import TINT_FOLDER, save_card
from .._structure import find_final_norm, find_head, is_target, is_under, join, named_tensors, plain_modules, unit_name
from .._wrapped_layer import (
    Calls,
    WrappingTuner,
    check_adapter_name,
    check_names,
    check_no_peft_model,
    check_task_type,
    is_distributed,
    is_traced,
    plain_name,
    short_name,
    wrap_everywhere,
)
from ..checkpoints import new_folder
from ..experts import labels_of, listing, pin_expert, set_labels
from ..hub import upload
from ._plan import make_plan
from ._saved_experts import is_expert_key
from ._seen import Seen
from .config import TintConfig
from .merge_ahead import MergeAhead
from .merged_layer import MergedLayer, RootMergedLayer
from .tint_layer import TaskModules, TintLayer

ROOT = "tint_root"  # the name of the layer for the parameters that the model holds itself


# Of an earlier push to the same place: what would be loaded with a new merged model, or in its stead
STALE = ["model*.safetensors*", "adapter_config.json", "adapter_model.safetensors", f"{TINT_FOLDER}/*"]


_TRAINED = weakref.WeakSet()  # the TintModels


@cache  # once, when the first model is made
def _watch_optimizers():
    """After a step of any optimizer, whoever's training it is of, coefficients are within their bounds."""

    def project(optimizer, args, kwargs):
        moved = None
        for model in list(_TRAINED):
            for adapter in model._bounded_adapters():
                moved = moved or {id(one) for group in optimizer.param_groups for one in group["params"]}
                if not moved.isdisjoint(id(own[adapter]) for own in model._coefficients if adapter in own):
                    model._project(adapter)

    register_optimizer_step_post_hook(project)


class Coefficients(NamedTuple):
    """Merging coefficients: `values` of shape (tasks, units), float32; `tasks` and `units` name its axes."""

    values: torch.Tensor
    tasks: list[str]
    units: list[str]


def from_experts(base: nn.Module, experts: dict, *others, **config):
    """As `get_peft_model(base, TintConfig(...))`, for experts held in memory.

    `experts` is {task: module, PeftModel or state dict}, `config` the other fields of `TintConfig`. The experts are
    only read. With `save_experts="dts"` the result can be saved, with the experts in it; else its adapter could not say
    where they are. Raises ValueError for a `TintConfig` as third argument.
    """
    if others:
        raise ValueError(
            f"`from_experts` takes a base and its experts, and was given a {type(others[0]).__name__} too; give the "
            "fields of `TintConfig` as keywords, such as `tint_layer=...`."
        )
    config = TintConfig(experts=dict.fromkeys(experts), **config)
    config.experts_in_memory = experts  # no dataclass field, so it is never saved
    return get_peft_model(base, config)


def set_task(model: nn.Module, task: str) -> None:
    """`TintModel.set_task` for a model that holds the adapter itself, by transformers' `add_adapter` or PEFT's
    `inject_adapter_in_model`. Raises ValueError for a task that it does not have, and for a model without TINT."""
    for hook in model._forward_pre_hooks.values():
        if isinstance(getattr(hook, "__self__", None), TintModel):
            return hook.__self__.set_task(task)
    raise ValueError(f"This {type(model).__name__} has no TINT adapter. Of a PeftModel, call `model.set_task(task)`.")


def hotswap_adapter(model: PeftModel, model_id: str, adapter_name: str = "default", **kwargs) -> None:
    """Puts the coefficients and tint layers of a saved tint in the place of those of a loaded one.

    The experts are neither loaded nor changed, and no tensor is replaced, so a compiled model stays compiled. `kwargs`
    go to the Hub (`revision`, `token`, ...). Raises ValueError where the saved tint has other experts or another
    structure; the model is then as it was.
    """
    if adapter_name not in model.peft_config:
        raise ValueError(f"There is no adapter {adapter_name!r}; there are {', '.join(map(repr, model.peft_config))}.")
    if any(module.merged for module in model.modules() if isinstance(module, MergedLayer)):
        raise ValueError("An adapter is merged into the weights; call `unmerge_adapter()` first.")
    configs = model.peft_config[adapter_name], TintConfig.from_pretrained(model_id, **kwargs)
    ours, theirs = (config.to_dict() for config in configs)
    experts = ("peft_type", "save_experts", "experts", "experts_sha256", "tasks", "transform", "transform_kwargs")
    for field in (*experts, "target_modules", "exclude_modules", "tint_layer", "granularity", "coefficient_bounds"):
        unknown = field == "experts_sha256" and None in (ours[field], theirs.get(field))
        if ours[field] != theirs.get(field) and not unknown:
            raise ValueError(
                f"The tint in {model_id!r} has {field}={theirs.get(field)!r}, the adapter {adapter_name!r} has "
                f"{ours[field]!r}. Load it with `load_adapter` instead."
            )
    weights = load_peft_weights(model_id, device="cpu", **kwargs)
    wanted = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    for name in wanted.keys() ^ weights.keys():
        raise ValueError(f"The tint in {model_id!r} and the adapter {adapter_name!r} differ in {name!r}.")
    for name, tensor in wanted.items():
        if tensor.shape != weights[name].shape:
            raise ValueError(
                f"The tint in {model_id!r} has {name!r} of shape {tuple(weights[name].shape)}, the adapter "
                f"{adapter_name!r} has {tuple(tensor.shape)}."
            )
        if is_expert_key(name) and not torch.equal(tensor, weights[name]):
            raise ValueError(
                f"The tint in {model_id!r} has other experts than the adapter {adapter_name!r}: {name!r} differs. Load "
                "it with `load_adapter` instead."
            )
    set_peft_model_state_dict(model, weights, adapter_name)


class TintModel(WrappingTuner):
    """Multi-task merging of experts with trainable coefficients and one trainable layer per task.

    Each parameter outside of the tint layer and the head becomes W0 + sum_k lambda_k tau_k, where tau_k = expert_k -
    base (Model Tinting, https://arxiv.org/abs/2412.19098). The current task (`set_task`) decides which copy of the
    tint layer and which head run.
    """

    prefix = "tint_"
    _in_expert = False  # inside of `expert`
    tuner_layer_cls = MergedLayer
    target_module_mapping = {}  # noqa: RUF012, PEFT's own declaration

    # ---- use ---------------------------------------------------------------------------------------------------------

    @property
    def tasks(self) -> list[str]:
        return list(self._active_config.experts)

    @property
    def task(self) -> str:
        """The current task."""
        return self._task[self._adapter]

    def set_task(self, task: str) -> None:
        """Makes `task` the current one: its tint layer and head run, and the model's config has its labels.

        Raises ValueError for a task that the model does not have."""
        self._check_tasks(task)
        if self._in_expert and task != self.task:
            raise ValueError("The model is an expert; leave the `expert` context before setting another task.")
        self._task[self._adapter] = task
        for layer in self._per_task_layers():
            layer.set_task(self._adapter, task)
        set_labels(self.model, self._labels[self._adapter][task])

    def _check_tasks(self, *tasks):
        for task in tasks:
            if task not in self.tasks:
                raise ValueError(f"There is no task {task!r}; the tasks are {', '.join(map(repr, self.tasks))}.")

    def task_labels(self, task: str) -> dict:
        """`id2label`, `label2id` and `problem_type` of a task; {} for a model without labels."""
        self._check_tasks(task)
        return self._labels[self._adapter][task]

    @property
    def tint_layers(self) -> list[TintLayer]:
        """The layers of which each task trains a copy."""
        return [layer for layer in self._per_task_layers() if layer.trainable[self._adapter]]

    @property
    def head_layers(self) -> list[TintLayer]:
        """The layers that make the head, in the model's order; they run on the backbone's features."""
        return [self.model._modules[name] for name in find_head(self.model, dict(plain_modules(self.model)))]

    @property
    def final_norms(self) -> list[TintLayer]:
        """The tint layer that is the norm between a language model's decoder and its output embeddings, if it is."""
        modules = dict(plain_modules(self.model))
        norms = [modules[name] for name in find_final_norm(self.model, modules)]
        return [layer for layer in self.tint_layers if layer.original_module in norms]

    def coefficients(self) -> Coefficients:
        """A copy of the coefficients. A unit is a tensor, a module, a block or the whole model (`granularity`).

        Tensors that no expert changed have none."""
        rows = {}
        for layer in self._merged_layers():
            values = layer.tint_coefficients[self._adapter].detach()
            values = (values.full_tensor() if isinstance(values, DTensor) else values).float().cpu()
            rows.update(zip(layer.units[self._adapter], values, strict=True))
        values = torch.stack(list(rows.values()), dim=1) if rows else torch.empty(len(self.tasks), 0)
        return Coefficients(values, self.tasks, list(rows))

    def set_coefficients(self, values: float | dict[str, float] | torch.Tensor) -> None:
        """Sets the coefficients to one number, to one number per task, or to a tensor like `coefficients().values`."""
        _, tasks, units = self.coefficients()
        if any(layer.merged for layer in self._merged_layers()):
            raise ValueError("The coefficients are merged into the weights; call `unmerge_adapter()` first.")
        if isinstance(values, dict) and set(values) != set(tasks):
            raise ValueError(f"`values` names the tasks {sorted(values)}; name {sorted(tasks)}.")
        if isinstance(values, dict):
            values = torch.tensor([[float(values[task])] for task in tasks]).expand(len(tasks), len(units))
        if isinstance(values, int | float):
            values = torch.full((len(tasks), len(units)), float(values))
        if not isinstance(values, torch.Tensor) or values.shape != (len(tasks), len(units)):
            shape = tuple(values.shape) if isinstance(values, torch.Tensor) else repr(values)
            raise ValueError(
                f"`values` is {shape}; it must be a number, {{task: number}}, or a tensor of shape "
                f"({len(tasks)}, {len(units)}), tasks by units."
            )
        if not torch.isfinite(values).all():
            raise ValueError("`values` has NaN or Inf.")
        rows = dict(zip(units, values.t(), strict=True))
        with torch.no_grad():
            for layer in self._merged_layers():
                parameter = layer.tint_coefficients[self._adapter]
                parameter.copy_(torch.stack([rows[unit] for unit in layer.units[self._adapter]]))

    @torch.no_grad()
    def project_coefficients(self) -> None:
        """Projects the coefficients onto `coefficient_bounds`, which each step of an optimizer over them does.

        A clamp in the forward would do the same to the weights, but leave a coefficient at its bound no gradient."""
        if self._active_config.coefficient_bounds is not None:
            self._project(self._adapter)

    @torch.no_grad()
    def _project(self, adapter):
        coefficients = {own[adapter]: None for own in self._coefficients if adapter in own}
        if coefficients:
            tensors = [values.to_local() if isinstance(values, DTensor) else values for values in coefficients]
            low, high = self.peft_config[adapter].coefficient_bounds
            torch._foreach_clamp_min_(tensors, low)
            torch._foreach_clamp_max_(tensors, high)

    def _bounded_adapters(self):
        return [name for name, config in self.peft_config.items() if getattr(config, "coefficient_bounds", None)]

    @contextmanager
    def expert(self, task: str):
        """Within this context the model is the expert of `task`, with the expert's own head and labels.

        Its weights are W0 + tau, made as the forward runs, so no second copy is held; they equal the checkpoint's to
        float rounding. Parameters that are no target of the merging are the expert's too. Raises ValueError while
        coefficients are merged into the weights, while the adapter is disabled, and inside another such context.
        """
        merged_layers, task_layers = self._merged_layers(), self._per_task_layers()
        others = [m for m in self.model.modules() if type(m) is ModulesToSaveWrapper]
        if any(layer.merged for layer in merged_layers):
            raise ValueError("The coefficients are merged into the weights; call `unmerge_adapter()` first.")
        if any(layer.disable_adapters for layer in (*merged_layers, *task_layers)):
            raise ValueError("The adapter is disabled; leave `disable_adapter()` first.")
        if self._in_expert:
            raise ValueError("The model is an expert already; leave that `expert` context first.")
        before, tensors = self.task, named_tensors(dict(plain_modules(self.model)))[0]
        self.set_task(task)
        unmerged = self._unmerged[self._adapter][task]
        replaced = {name: tensors[name].data for name in unmerged}
        try:
            self._in_expert, self._calls.seen = True, None
            for name, value in unmerged.items():
                tensors[name].data = value.to(tensors[name].device)
            one_hot = torch.tensor([float(name == task) for name in self.tasks])
            for layer in merged_layers:
                layer.expert, layer.expert_task = self._adapter, task
                layer.expert_row = one_hot = one_hot.to(layer.tint_coefficients[self._adapter].device)
            for layer in task_layers:
                layer.as_expert = True
            for layer in others:
                layer._disable_adapters = True
            yield
        finally:
            for name, value in replaced.items():
                tensors[name].data = value
            for layer in merged_layers:
                layer.expert = layer.expert_task = layer.expert_row = None
            for layer in task_layers:
                layer.as_expert = False
            for layer in others:
                layer._disable_adapters = False
            self._in_expert, self._calls.seen = False, None
            self.set_task(before)

    @contextmanager
    def reuse_merged_weights(self):
        """Within this context a weight is merged once for all forwards between which its coefficients stay as they are,
        with gradients, too, and under several processes. Without gradients one process keeps merged weights anyway.

        With gradients it takes one more copy of the weights and one of their gradients. The coefficients' come when the
        context is left: call `backward` in it, and the optimizer after it. A base that FSDP2 has sharded is merged each
        time, or no process would be left with less than all of it.
        """
        sharded = any(isinstance(parameter, DTensor) for parameter in self.model.parameters())
        layers = [] if sharded else self._merged_layers()
        if any(layer.reused is not None for layer in layers):
            if torch.is_grad_enabled():
                raise ValueError("The model is in `reuse_merged_weights` already; leave that context first.")
            layers = []
        for layer in layers:
            layer.reused = {}
        try:
            yield
            if reused := [pair for layer in layers for pair in layer.take_reused()]:
                torch.autograd.backward(*zip(*reused, strict=True))
        finally:
            for layer in layers:
                layer.reused = None
                if is_distributed():
                    layer._kept = {}

    def expert_fingerprint(self, task: str) -> str:
        """A hash of all that decides what the expert of `task` computes: its weights, class and config."""
        with self.expert(task):  # for the labels in the config
            config = self.model.config.to_json_string() if hasattr(self.model, "config") else ""
        base, _ = named_tensors(dict(plain_modules(self.model)))
        tensors = list(base.values())
        for layer in self._merged_layers():
            for vectors in layer.tint_task_vectors[self._adapter].values():
                tensors += (vectors.original or vectors).of(self.tasks.index(task))
        for layer in self._per_task_layers():
            tensors += layer.expert_modules[self._adapter][task].buffers()
        tensors += self._unmerged[self._adapter][task].values()
        parts = (t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy() for t in tensors)
        return Hasher.hash_bytes([f"{type(self.model).__name__} {config}".encode(), *parts])

    def merge_and_unload(self, progressbar=False, safe_merge=False, adapter_names=None, task: str | None = None):
        """The merged model of one task (default: the current one), a plain model with that task's head and labels."""
        if adapter_names:
            self.set_adapter(adapter_names[0])
        if task is not None:
            self.set_task(task)
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def _unload_and_optionally_merge(self, *args, **kwargs):
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        # or they would take memory as long as the PeftModel is there
        self._all_merged, self._all_per_task, self._coefficients, self._ahead = [], [], [], None
        for hook in self._hooks:
            hook.remove()
        return model

    def unload(self):
        """The base model, with its own head and labels."""
        self._check_backbone()
        model = super().unload()
        set_labels(model, self._base_labels)
        return model

    def merge_backbone(self) -> None:
        """Bakes the coefficients into the weights and frees the task vectors; `set_task` goes on working.

        The model then takes the memory of the base and the tint layers, and runs as fast as the base."""
        self._check_backbone()
        self._check_merge_allowed()
        if len(self.peft_config) > 1:
            raise ValueError(
                f"`merge_backbone` frees all task vectors, and there are {len(self.peft_config)} adapters. "
                "Delete the others first."
            )
        named = [(name, module) for name, module in self.model.named_modules() if isinstance(module, MergedLayer)]
        for _, layer in named:
            if not all(torch.isfinite(weight).all() for weight in layer.merged_tensors().values()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {self._adapter} seems to be broken")
        for name, layer in reversed(named):  # a layer before the one around it
            layer.merge()
            parent, _, child = name.rpartition(".")
            self._replace_module(self.model.get_submodule(parent), child, layer.base_layer, layer)
            if isinstance(layer, RootMergedLayer):
                layer.remove_hooks()
        self._all_merged, self._coefficients, self._ahead = [], [], None
        self._active_config.backbone_merged = True  # no dataclass field, so it is never saved

    def save_merged(
        self,
        folder: str | os.PathLike,
        task: str | None = None,
        processing_class=None,
        max_shard_size: int | str = "50GB",
        **card,
    ) -> None:
        """Saves all tasks on one merged backbone, to be loaded without experts; the model stays as it is.

        The new `folder` is that of a plain transformers model for `task` (default: the current one), as
        `merge_and_unload(task=...)` makes it. Its folder "tint" is a TINT adapter of that model, which has all tasks'
        tint layers, heads and labels, for `set_task` and `task_names`:

            base = AutoModelForSequenceClassification.from_pretrained(folder)
            model = PeftModel.from_pretrained(base, folder, subfolder="tint")

        The experts of that adapter are the merged models, and are in it. `processing_class` (a tokenizer, an image
        processor) is saved beside, `card` are arguments of `model_card`. Raises ValueError if there is something in
        `folder`, for a model that is none of transformers, and for tasks that differ in nothing.
        """
        task = task or self.task
        self._check_tasks(task)
        with new_folder(folder) as path:
            self._save_merged(path, task, os.path.realpath(folder), processing_class, max_shard_size)
            save_card(self, path, merged_for=task, processing_class=processing_class, **card)

    def push_merged_to_hub(
        self,
        repo_id: str,
        task: str | None = None,
        processing_class=None,
        max_shard_size: int | str = "50GB",
        **kwargs,
    ) -> CommitInfo:
        """Pushes what `save_merged` saves to one repository, as one commit.

        `kwargs` are those of transformers' `push_to_hub` (`private`, `token`, `revision`, `commit_message`, ...) and of
        `model_card`."""
        task = task or self.task
        self._check_tasks(task)
        card = {"merged_for": task, "processing_class": processing_class}
        if "/" not in repo_id:
            repo_id = f"{whoami(kwargs.get('token'))['name']}/{repo_id}"
        with tempfile.TemporaryDirectory() as folder:
            self._save_merged(folder, task, repo_id, processing_class, max_shard_size)
            return upload(self, folder, repo_id, delete_patterns=STALE, **card, **kwargs)

    def _save_merged(self, folder, task, place, processing_class, max_shard_size):
        """`place` is where the merged model will be."""
        layers = {
            plain_name(name): layer
            for name, layer in self.model.named_modules()
            if isinstance(layer, TintLayer) and self._adapter in layer.modules_to_save
        }
        if not layers or not isinstance(self.model, PreTrainedModel):
            problem = "is no transformers model" if layers else "has neither a head nor a tint layer for each task"
            raise ValueError(
                f"This {type(self.model).__name__} {problem}. Save the model that `merge_and_unload` returns instead."
            )
        merged = self._copy_with_these_tensors().merge_and_unload(task=task)
        merged.save_pretrained(folder, max_shard_size=max_shard_size)
        _, report = type(merged).from_pretrained(folder, device_map="meta", output_loading_info=True)
        if report["missing_keys"]:
            raise ValueError(
                f"transformers does not save {listing(report['missing_keys'])} of the merged model, for in the base "
                "model that is tied to a tint layer. Use another `tint_layer`, or save the adapter."
            )
        if processing_class is not None:
            processing_class.save_pretrained(folder)
        backbone = {name: tensor for name, tensor in merged.state_dict().items() if not is_under(name, layers)}
        experts = {}
        for name in self.tasks:
            experts[name] = dict(backbone)
            for module, layer in layers.items():
                own = layer.modules_to_save[self._adapter][name].state_dict()
                experts[name] |= {join(module, leaf): tensor for leaf, tensor in own.items()}
        trainable = [name for name, layer in layers.items() if layer.trainable[self._adapter]]
        task_type = self._active_config.task_type
        model = from_experts(merged, experts, tint_layer=trainable, save_experts="dts", task_type=task_type)
        config = model.peft_config["default"]
        config.labels, config.base_model_name_or_path = self._labels[self._adapter], place
        model.save_pretrained(os.path.join(folder, TINT_FOLDER), save_embedding_layers=False)
        os.remove(os.path.join(folder, TINT_FOLDER, "README.md"))  # PEFT's form, which names the base of the experts

    def _copy_with_these_tensors(self):
        """A copy that shares the tensors of this model, of which merging replaces its own."""
        memo = {id(parameter): nn.Parameter(parameter.data, False) for parameter in self.parameters()}
        for shared in (*self.buffers(), *self.peft_config.values(), self._unmerged):
            memo[id(shared)] = shared
        return copy.deepcopy(self, memo)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "A forward of TINT has the weights of one merge, so `adapter_names` cannot mix adapters in a batch. "
                "Tasks of one adapter can be mixed by `task_names`."
            )
        if torch.compiler.is_compiling():
            yield
            return
        # of `generate` too, in which all tokens are of the weights that there were at its beginning
        asked = self._calls.asked
        asked.spans = True
        try:
            yield
        finally:
            asked.spans, asked.seen = False, None

    def _begin_call(self, model, args, kwargs):
        """The task stays the same for the whole call. `model(**inputs, task_names=[...])` names that of each row."""
        names = kwargs.pop("task_names", None)
        if names is not None:
            tensors = (v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.ndim)
            rows = next((len(tensor) for tensor in tensors), len(names))
            if not isinstance(names, list | tuple) or len(names) != rows:
                raise ValueError(f"`task_names` is {names!r}; it must be a list with the task of each of {rows} rows.")
            self._check_tasks(*names)
            kinds = {self._kind_of(task) for task in (self.task, *names)}
            if kwargs.get("labels") is not None and len(kinds) > 1:
                raise ValueError(
                    "With `labels` the model computes the loss of one kind of task, and `task_names` mixes several. "
                    "Leave `labels` out and compute the loss of each row from its logits."
                )
            if self._in_expert:
                raise ValueError("The model is one expert; leave the `expert` context to mix tasks in a batch.")
            layers = self._per_task_layers()
            if torch.is_grad_enabled() and set(layers) - set(self.head_layers):
                if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
                    raise ValueError(
                        "`task_names` is gone when gradient checkpointing runs a tint layer in the backbone again; use "
                        "batches of one task each, or call `gradient_checkpointing_disable()`."
                    )
            names = list(names)
        self._calls.whole = torch.compiler.is_compiling()
        asked = self._calls.asked
        asked.task_names = names
        if is_traced() or is_distributed() or model is not self.model:  # a copy of DataParallel's
            asked.seen = None
        else:
            asked.seen = self._look(asked.seen if asked.spans else None)
        if not self._calls.whole:  # else it stays the same for what was compiled
            asked.task = self._task.get(next(iter(self.active_adapters), None))
        return args, kwargs

    def _look(self, seen):
        """Merges ahead of a forward with gradients. Before one without looks at all that merged weights were made of,
        so that no layer has to; `seen` is what the same call has looked at before."""
        if torch._C._are_functorch_transforms_active():  # which want functions of another form
            return None
        if torch.is_grad_enabled() and any(p.requires_grad for ps in self._coefficients for p in ps.values()):
            if any(layer.expert or layer.reused for layer in self._all_merged):
                return None
            ahead = self._ahead  # of the model as it was, until another thread puts another one there
            if ahead is None or not ahead.is_of(self.active_adapters):
                ahead = self._ahead = MergeAhead(self._all_merged, self.active_adapters)
            seen = ahead.merge()
            return seen if all(layer.reused is None for layer in self._all_merged) else None
        if seen is not None and seen is self._calls.seen:
            return seen
        seen = self._calls.seen
        if seen is None or not seen.holds(self.active_adapters):
            seen = self._calls.seen = Seen(self._all_merged, self.active_adapters, self._values)
            self._values = seen.values
        return seen

    def _kind_of(self, task):
        labels = self.task_labels(task)
        return len(labels.get("id2label") or ()), labels.get("problem_type")

    def _end_call(self, model, args, output):
        asked = self._calls.asked
        asked.task = asked.task_names = None
        if not asked.spans:
            asked.seen = None
        if torch.compiler.is_compiling():
            self._calls.whole = False

    @property
    def _adapter(self) -> str:
        if not self.active_adapters:
            raise ValueError("No adapter is active. Add one by `add_adapter` or `load_adapter`, or call `set_adapter`.")
        return self.active_adapters[0]

    @property
    def _active_config(self) -> TintConfig:
        return self.peft_config[self._adapter]

    def _merged_layers(self) -> list[MergedLayer]:
        """The layers that have coefficients of the active adapter, in the model's order."""
        self._check_backbone()
        return [layer for layer in self._all_merged if self._adapter in layer.tint_coefficients]

    def _check_backbone(self):
        if vars(self._active_config).get("backbone_merged"):
            raise ValueError(
                "`merge_backbone` has baked the coefficients into the weights and freed the task vectors; "
                "load the model again from its experts to have them and the base."
            )

    def _per_task_layers(self) -> list[TintLayer]:
        return [layer for layer in self._all_per_task if self._adapter in layer.modules_to_save]

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """DDP reads this by way of the PeftModel; else it would send the experts around before each forward."""
        fixed = (".tint_task_vectors.", ".expert_modules.")
        return [f"base_model.{name}" for name, _ in self.named_buffers() if any(part in name for part in fixed)]

    # ---- building ----------------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_name, inference_mode=False):
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._show_labels()

    def delete_adapter(self, adapter_name):
        super().delete_adapter(adapter_name)
        for state in (self._task, self._labels, self._unmerged):
            state.pop(adapter_name)
        self._show_labels()

    def _show_labels(self):
        if not self.active_adapters:
            set_labels(self.model, self._base_labels)
        elif self._adapter in self._labels:  # not yet while it is being injected
            set_labels(self.model, self._labels[self._adapter][self.task])

    def _enable_adapter_layers(self, enabled=True):
        self._check_backbone()
        super()._enable_adapter_layers(enabled)
        set_labels(self.model, self._labels[self._adapter][self.task] if enabled else self._base_labels)

    def _pre_injection_hook(self, model, config, adapter_name):
        check_no_peft_model(model)
        check_task_type(config, model)
        if any(isinstance(m, MergedLayer | TintLayer) and m.added_adapters for m in model.modules()):
            raise ValueError(
                f"This {type(model).__name__} holds a TINT adapter itself. To switch between several, put them into a "
                "PeftModel: `get_peft_model(base, config)`, then its `add_adapter`."
            )
        for hooks in (model._forward_pre_hooks, model._forward_hooks):  # of one that was deleted
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), TintModel):
                    del hooks[key]
        self._task: dict[str, str] = {}  # adapter -> current task
        self._labels: dict[str, dict[str, dict]] = {}  # adapter -> task -> label fields of the config
        self._unmerged: dict[str, dict[str, dict]] = {}  # adapter -> task -> parameters that only the expert has so
        self._base_labels = labels_of(getattr(model, "config", None))
        self._hooks = []
        self._calls = Calls()
        self._all_merged = []  # MergedLayer
        self._all_per_task = []  # TintLayer
        self._coefficients = []  # of each of these {adapter: coefficients}
        self._values = []  # of the coefficients, see Seen
        self._ahead = None  # MergeAhead
        _TRAINED.add(self)
        _watch_optimizers()

    def __setstate__(self, state):
        super().__setstate__(state)
        _TRAINED.add(self)
        _watch_optimizers()

    def _cast_adapter_dtype(self, adapter_name, autocast_adapter_dtype=True):
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:  # PEFT then expects the base's type; in place, for coefficients may be shared
            for layer in self.model.modules():
                if isinstance(layer, MergedLayer) and adapter_name in layer.tint_coefficients:
                    coefficients = layer.tint_coefficients[adapter_name]
                    weights = layer.get_base_layer().parameters()
                    coefficients.data = coefficients.data.to(next(weights).dtype)

    def _prepare_model(self, config: TintConfig, model: nn.Module) -> None:
        sources, start = config.__dict__.pop("experts_in_memory", config.experts), not self._to_be_loaded
        if not sources:
            raise ValueError("`TintConfig.experts` is empty; give {task: Hub id or folder} of each expert.")
        if config.is_packed:
            if "packed_experts" not in vars(config):
                raise ValueError(
                    "The experts of this adapter are in the file of its weights, which transformers' `load_adapter` "
                    "and `PeftConfig.from_pretrained` do not read before the model is made. Load the adapter by "
                    "`PeftModel.from_pretrained(base, folder)`, or its configuration by `TintConfig.from_pretrained`."
                )
            self._plan = make_plan(config, model, sources, start)
            return
        if None in sources.values():
            raise ValueError("These experts were held in memory and are gone; call `from_experts` with them again.")
        if sources is config.experts:
            _pin_experts(config)
            sources = config.experts
        self._plan = make_plan(config, model, sources, start)
        if config.save_experts == "dts":
            config.packed_experts = self._plan.packed  # no dataclass field, since tensors are no JSON
            config.unchanged, config.labels = self._plan.unchanged, self._plan.labels

    def inject_adapter(self, model, adapter_name, *args, low_cpu_mem_usage=False, **kwargs):
        config = self.peft_config[adapter_name]
        _check_adapter_name(adapter_name, config.experts or ())
        if any(m.merged for m in model.modules() if isinstance(m, MergedLayer)):
            raise ValueError("An adapter is merged into the weights; call `unmerge_adapter()` before adding another.")
        self._layers = {plain_name(name): m for name, m in model.named_modules() if isinstance(m, MergedLayer)}
        self._base_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self._shared = {}  # unit -> the layer whose coefficients the unit's other layers share
        # PEFT says `low_cpu_mem_usage` by its argument or by a context in which parameters are made on the meta device
        self._to_be_loaded = low_cpu_mem_usage or nn.LayerNorm(1).weight.is_meta
        try:
            super().inject_adapter(model, adapter_name, *args, low_cpu_mem_usage=low_cpu_mem_usage, **kwargs)
            self._inject_below_wrappers(model, adapter_name, config)
            for name, tied in self._plan.tied.items():
                ties = {leaf: (self._layers[owner], leaf_there) for leaf, (owner, leaf_there) in tied.items()}
                self._layers[name].tied.update(ties)
            wrap_everywhere(model, self._layers.values())
            self._all_merged = [layer for layer in model.modules() if isinstance(layer, MergedLayer)]
            self._all_per_task = [layer for layer in model.modules() if isinstance(layer, TintLayer)]
            self._coefficients = [layer.tint_coefficients._parameters for layer in self._all_merged]
            for name, layer in model.named_modules():
                if isinstance(layer, MergedLayer | TaskModules):
                    layer._calls = self._calls
                if isinstance(layer, TintLayer):
                    layer.nested = plain_name(name) != name
            self._task[adapter_name] = next(iter(self._plan.labels))
            self._labels[adapter_name] = self._plan.labels
            self._unmerged[adapter_name] = self._plan.unmerged
            if not self._hooks:
                self._hooks = [
                    # before that of the layer for the model's own parameters
                    model.register_forward_pre_hook(self._begin_call, with_kwargs=True, prepend=True),
                    model.register_forward_hook(self._end_call, always_call=True),
                ]
        finally:
            self._plan = self._layers = self._shared = None
        if adapter_name in self.active_adapters[:1]:
            self.set_task(self.task)

    def _inject_below_wrappers(self, model, adapter_name, config):
        """PEFT adds no adapter to the modules inside of one that an earlier adapter has wrapped."""
        modules = dict(plain_modules(model))
        for name in (*self._plan.task_modules, *self._plan.task_vectors):
            if not name:
                root = self._layers.setdefault(
                    "", model._modules.get(ROOT) or RootMergedLayer(model, self.active_adapters)
                )
                model.add_module(ROOT, root)
                self._add_adapter(config, adapter_name, "", root)
                continue
            parent, _, child = name.rpartition(".")
            target = modules[parent]._modules[child]
            if name in self._plan.task_vectors and isinstance(target, TintLayer):
                target = target.original_module
            if not isinstance(target, MergedLayer | TintLayer) or adapter_name not in target.added_adapters:
                target = modules[parent]._modules[child]
                self._create_and_replace(config, adapter_name, target, child, modules[parent], name)

    def _check_target_module_exists(self, config, key):
        if key in self._plan.task_vectors or key in self._plan.task_modules:
            return True
        result = is_target(config, key)
        return result if isinstance(result, _ExcludedModule) else False

    def _create_and_replace(self, config, adapter_name, target, target_name, parent, current_key, parameter_name=None):
        name = plain_name(current_key)
        active = adapter_name in self.active_adapters
        if name in self._plan.task_modules:
            modules = self._plan.task_modules[name], self._plan.expert_modules[name], self._plan.trainable[name]
            if isinstance(target, TintLayer):
                target.add_adapter(adapter_name, *modules)
            else:
                layer = TintLayer(target, adapter_name, *modules)
                layer.set_adapter(adapter_name if active else [], inference_mode=config.inference_mode)
                self._replace_module(parent, target_name, layer, target)
            return
        if isinstance(target, TintLayer):  # another adapter's, whose original module this one merges
            parent, target_name, target = target, "original_module", target.original_module
        if not isinstance(target, MergedLayer):
            target = self._layers[name] = MergedLayer(target, self.active_adapters)
            self._replace_module(parent, target_name, target, target.base_layer)
        self._add_adapter(config, adapter_name, name, target)

    def _add_adapter(self, config, adapter_name, name, layer):
        units, coefficients = self._make_coefficients(config, adapter_name, name, layer)
        coefficients.requires_grad_(adapter_name in self.active_adapters and not config.inference_mode)
        layer.add_adapter(adapter_name, units, coefficients, self._plan.task_vectors[name])
        layer.merge_lora[adapter_name], layer.base_bytes = config.merge_lora, self._base_bytes

    def _make_coefficients(self, config, adapter_name, module, layer):
        """The units of a layer and their coefficients (units, tasks), which layers of one unit share."""
        vectors = self._plan.task_vectors[module]
        units = list(dict.fromkeys(unit_name(config.granularity, module, leaf) for leaf in vectors))
        if len(units) == 1 and units[0] in self._shared:
            layer.shares_with[adapter_name] = self._shared[units[0]]
            return units, self._shared[units[0]].tint_coefficients[adapter_name]
        init = config.coefficient_init
        if not isinstance(init, dict):
            # NaN stands where a merge decides and was not made, for the coefficients are to be loaded or random
            init = dict.fromkeys(config.experts, math.nan if isinstance(init, str) else init)
        row = [float(init[task]) for task in config.experts]
        values = torch.tensor([self._plan.start.get(unit, row) for unit in units]).view(len(units), len(row))
        if not config.init_weights:
            low, high = config.coefficient_bounds or (-1.0, 1.0)
            values = low + (high - low) * torch.rand(values.shape)
        device = next((own.dense_tasks.device for own in vectors.values()), None)
        coefficients = nn.Parameter(values.to(device))
        if len(units) == 1:
            self._shared[units[0]] = layer
        return units, coefficients

    @classmethod
    def _remove_adapter_name_from_key(cls, key, adapter_name):
        if is_expert_key(key):
            return key
        # without the marks of wrappers, for around a layer there may be one of another adapter
        if (copies := f".modules_to_save.{adapter_name}.copies.") in key:
            return plain_name(key.replace(copies, ".copies."))
        key = super()._remove_adapter_name_from_key(key, adapter_name)
        return plain_name(key) if "tint_coefficients" in key else key

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        if config.save_experts == "dts" and "packed_experts" not in vars(config):
            raise ValueError(
                "`save_experts` became 'dts' when the experts had been loaded, so they are not compressed. Save the "
                "adapter with 'reference', and load it by `PeftModel.from_pretrained(base, folder, config=config)` "
                "with a configuration that says 'dts'."
            )
        if config.save_experts == "reference" and None in config.experts.values():
            raise ValueError(
                "These experts were held in memory, so a saved adapter could not say where they are. Make the model "
                "with `save_experts='dts'`, which saves them compressed, or save each with `save_pretrained` and give "
                "the folders to TintConfig."
            )
        if vars(config).get("backbone_merged"):
            raise ValueError(
                "`merge_backbone` has baked the coefficients into the weights, so there are none to save. "
                "Save the adapter before it, or save `merge_and_unload(task=...)`."
            )
        ours = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        # PEFT looks for none inside of another adapter's tint layer
        ours |= {key: value for key, value in state_dict.items() if _is_saved(key, adapter_name)}
        experts = config.packed_experts if config.save_experts == "dts" else {}
        if not isinstance(model, PeftModel):  # transformers adds the prefix to all that it saves
            experts = {key.removeprefix("base_model.model."): tensor for key, tensor in experts.items()}
        return ours | experts

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """From the names in a file to the model's. Raises ValueError for tensors missing, too many, or broken."""
        packed = vars(config).get("packed_experts", {})
        for key, tensor in state_dict.items():
            # PEFT loads a file onto the accelerator, if there is one, wherever the model is
            if is_expert_key(key) and key in packed and not torch.equal(tensor.cpu(), packed[key]):
                raise ValueError(
                    f"The file has other experts than the adapter {adapter_name!r}: {key!r} differs. Load it under "
                    "another name, or delete that adapter first."
                )
        own = {key: tensor for key, tensor in model.state_dict().items() if _is_saved(key, adapter_name)}
        keys = {short_name(cls._remove_adapter_name_from_key(key, adapter_name)): key for key in own}
        # the experts are in the model already
        given = {keys.get(short_name(key), key): t for key, t in state_dict.items() if not is_expert_key(key)}
        check_names(model, adapter_name, own, given)
        for key, tensor in own.items():
            same_kind = given[key].is_floating_point() == tensor.is_floating_point()
            if not same_kind or not torch.isfinite(given[key].float()).all():
                raise ValueError(
                    f"The adapter {adapter_name!r} has {key!r} with NaN or Inf, or in the type {given[key].dtype}. Its "
                    "file is damaged; download or save it again."
                )
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, given)


def _pin_experts(config):
    """Notes in the config which files the experts are. Raises ValueError if they have become others."""
    pinned = {task: pin_expert(task, source) for task, source in config.experts.items()}
    for task, (reference, sha256) in pinned.items():
        expected = (config.experts_sha256 or {}).get(task, sha256)
        if sha256 != expected:
            raise ValueError(
                f"Expert {task!r} ({reference!r}) has weights with the sha256 {sha256}, and the adapter was made with "
                f"{expected}; its coefficients and tint layers belong to those. Put them back, or name where they are "
                "in `experts`. To use others: `config = TintConfig.from_pretrained(folder)`, `config.experts_sha256 = "
                "None`, `PeftModel.from_pretrained(base, folder, config=config)`."
            )
    config.experts = {task: reference for task, (reference, _) in pinned.items()}
    config.experts_sha256 = {task: sha256 for task, (_, sha256) in pinned.items()}


def _check_adapter_name(name, tasks):
    check_adapter_name(name)
    if name in {f"{task}_task" for task in tasks}:
        raise ValueError(f"The adapter name {name!r} is that of a task's tint layer; use another.")


def _is_saved(key, adapter_name):
    return key.endswith(f".tint_coefficients.{adapter_name}") or f".modules_to_save.{adapter_name}.copies." in key
