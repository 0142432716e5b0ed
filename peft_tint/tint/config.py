"""The configuration of TINT."""

import json
import math
import os
import re
from dataclasses import dataclass, field
from typing import Literal

from accelerate import PartialState
from peft import load_peft_weights
from peft.utils.peft_types import PeftType

from .._files import check_reference
from .._saved_config import SavedConfig
from ..dts.config import encode_arguments
from ..experts import hub_reference, labels_from_json
from ..merging import MERGING_METHODS, check_method, check_transform
from ._saved_experts import PREFIX

TASK_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass
class TintConfig(SavedConfig):
    """
    Configuration of TINT, multi-task model merging with trainable coefficients and one trainable layer per task
    ([Model Tinting](https://arxiv.org/abs/2412.19098)).

    Args:
        experts (`dict[str, str | dict]`):
            For each task the expert: a Hub id, a local folder, or `{"id": ..., "revision": ..., "subfolder": ...}`,
            of a full checkpoint or of a PEFT adapter of the base model (LoRA stays low-rank, others are merged).
            When they are loaded, a Hub id without a revision gets that of the commit, a folder its absolute path.
            Task names consist of letters, digits, `_` and `-`, and none is `mean`. Experts held in memory go through
            [`from_experts`] instead.
        target_modules (`list[str] | str`, *optional*):
            The modules to merge. `None` (default) merges every parameter outside of the tint layer and the head. A
            list matches names or their endings, a string is a regular expression on the whole name. Modules that are
            not targeted keep the base model's weights.
        exclude_modules (`list[str] | str`, *optional*):
            Modules not to merge, matched in the same way.
        tint_layer (`str | list[str]`, *optional*):
            The layer with one trainable copy per task: a module name or its unique ending, or a list of them. `None`
            (default) is the model's head, or of a language model the norm after the last block of its decoder. `[]` is
            none (only coefficients train), `"auto"` the head and the block in which the experts disagree most. The
            names of a norm and of what `"auto"` finds take their place when the experts are loaded. Each task keeps its
            own head in any case; a head that is not the tint layer is frozen.
        tint_layer_init (`str`):
            Where the tint layer's copies start: `"expert"` (default), `"merged"` or `"base"`.
        granularity (`str`):
            What shares one coefficient per expert: `"tensor"` (default; AdaMerging's layer-wise), `"module"`,
            `"block"` (all of one numbered block) or `"model"` (AdaMerging's task-wise).
        coefficient_init (`float | dict[str, float] | str`):
            The coefficients' starting value (0.3), for all tasks or for each; or a data-free merge that makes one
            model, such as `"ties"`, `"lines"` or `"wudi"`. The coefficients of each unit of `granularity` then start
            with the least squares solution, for which the merged weights come nearest to that merge (of least norm,
            where task vectors are zero or depend on each other), projected onto `coefficient_bounds`. Weighted sums are
            met exactly: `"average"` starts with 1 / number of experts, `"lines"` with its scale of each block. What is
            merged are the task vectors that the coefficients multiply: those of the merged parameters, after a
            `transform`. A saved adapter is loaded with the coefficients that it was saved with, after a merge in vain
            that `low_cpu_mem_usage=True` spares.
        coefficient_init_kwargs (`dict`):
            The merge's arguments, such as `{"density": 0.2}`, and its `scale` (1.0), as in `merge`.
        coefficient_bounds (`list[float]`, *optional*):
            The interval onto which the trainer projects the coefficients after each update, `[0, 1]` by default.
            `None` leaves them free.
        transform (`str`, *optional*):
            What becomes of the task vectors before they are merged: each task's part in a data-free merge, one of
            `"ties"` (with the density 0.2 it gives AdaMerging++), `"dare"`, `"magnitude"`, `"consensus"`, `"lines"`
            and `"tsv"`. The experts, and their pseudo-labels, stay what they are, which takes their task vectors again.
        transform_kwargs (`dict`):
            The transform's arguments, such as `{"density": 0.2}`.
        save_experts (`str`):
            What a saved adapter has of the experts. `"reference"` (default): their Hub ids and folders, from which they
            are loaded again. `"dts"`: the experts, as compressed task vectors
            ([Decomposition, Thresholding and Scaling](https://arxiv.org/abs/2512.01461)), with their own heads and tint
            layers whole; such an adapter is loaded with no expert at hand, and experts held in memory can be saved.
            They are compressed once, when the model is made, which takes seconds an expert. That model keeps the exact
            experts; one that is loaded from the adapter has the compressed ones. Its coefficients and tint layers are
            those that were saved, its other weights and the experts' predictions are a little off (the README has
            figures), and saved again its experts are the same. The factors of a LoRA expert are compressed like any
            others.
        save_experts_kwargs (`dict`):
            With `"dts"`: `budget` (0.01), the bytes of a task's vectors as a fraction of the base's in float32, or
            `rank_ratio` instead, and `codec`, as in [`DtsConfig`].
        init_weights (`bool`):
            `False` starts from random coefficients.
        layers_to_transform (`list[int] | int`, *optional*):
            The indices of the blocks to merge; not with a regular expression in `target_modules`.
        layers_pattern (`list[str] | str`, *optional*):
            With `layers_to_transform`: the name of the list that holds the blocks.
        modules_to_save (`list[str]`, *optional*):
            Further modules to train and save, one copy for all tasks.
        tasks (`list[str]`, *optional*):
            The order of the tasks, that of `experts` by default. A saved configuration needs it, since PEFT sorts the
            keys of its JSON file and the rows of the coefficients have no names.
        labels (`dict[str, dict]`, *optional*):
            With `save_experts="dts"`, filled in when the experts are compressed: the fields of the model's config that
            name each task's labels.
        unchanged (`dict[str, list[str]]`, *optional*):
            Filled in likewise: the tensors that each expert has not changed, of which nothing is saved.
        experts_sha256 (`dict[str, str]`, *optional*):
            For each task the sha256 of its expert's safetensors file (of shards one after another, in the order of
            their names). Filled in when the experts are loaded, as is the commit of those on the Hub. Experts with
            others are refused; `None` takes them as they are.
        task_vectors_dtype (`str`, *optional*):
            `"bfloat16"` keeps the full task vectors of float32 experts in half of the memory, rounded to three digits
            (LoRA experts stay as they are). They are added up in float32 all the same. The experts, and their
            pseudo-labels, then are of the rounded ones, too. `None` (default) keeps them in the weights' dtype.
        shard_task_vectors (`bool`, *optional*):
            Under several processes of `torch.distributed`, each keeps its part of the full task vectors (LoRA experts
            stay whole). All processes must then make the model, run it, and merge it at once, as [`TintTrainer`] does.
            It is about a run and is saved as `False`.
        merge_lora (`bool`, *optional*):
            Whether LoRA experts, too, are merged into a second copy of the weights where no gradients are taken; a
            forward then costs what the base's costs. `None` (default) does so where the base takes at most a quarter of
            its device's memory. With gradients, they are added to the layers' outputs. It is about a run and is saved
            as `None`.
        sha256 (`str`, *optional*):
            Filled in when the adapter is saved: that of its weights' file and of the settings that belong to them.
    """

    experts: dict[str, str | dict | None] | None = field(
        default=None,
        metadata={"help": "For each task the expert: a Hub id, a local folder or {'id', 'revision', 'subfolder'}."},
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Modules to merge (list of endings, or regex); None: all outside of tint layer and head."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules not to merge (list of endings, or regex)."}
    )
    tint_layer: str | list[str] | None = field(
        default=None,
        metadata={
            "help": "Layer with one trainable copy per task; None: the head, or a decoder's final norm; []: none; "
            "'auto': see the docs."
        },
    )
    tint_layer_init: Literal["expert", "merged", "base"] = field(
        default="expert", metadata={"help": "Where the copies of the tint layer start: expert, merged or base."}
    )
    granularity: Literal["tensor", "module", "block", "model"] = field(
        default="tensor", metadata={"help": "What shares one coefficient: tensor, module, block or model."}
    )
    coefficient_init: float | int | dict[str, float | int] | str = field(
        default=0.3,
        metadata={
            "help": "Starting value of the coefficients, for all tasks or for each; or the name of a data-free merge "
            "('ties', 'lines', 'wudi', ...), to which the merged weights then come as near as they can."
        },
    )
    coefficient_init_kwargs: dict = field(
        default_factory=dict, metadata={"help": "That merge's arguments, and `scale` (1.0), which multiplies it."}
    )
    coefficient_bounds: list[float | int] | None = field(
        default_factory=lambda: [0.0, 1.0],
        metadata={"help": "The coefficients are projected onto this interval after each update; None: free."},
    )
    transform: str | None = field(
        default=None,
        metadata={"help": "Put each task's part in this merge in the place of its task vector: 'ties', 'dare', ..."},
    )
    transform_kwargs: dict = field(default_factory=dict, metadata={"help": "The transform's arguments."})
    save_experts: Literal["reference", "dts"] = field(
        default="reference",
        metadata={
            "help": "Saved adapters name their experts (reference), or hold them as compressed task vectors (dts)."
        },
    )
    save_experts_kwargs: dict = field(
        default_factory=dict, metadata={"help": "Of 'dts': `budget` (0.01) or `rank_ratio`, and `codec`."}
    )
    init_weights: bool = field(default=True, metadata={"help": "False: random coefficients."})
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "The indices of the blocks to merge."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "The name of the list of blocks that layers_to_transform counts in."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save, one copy for all tasks."}
    )
    tasks: list[str] | None = field(
        default=None, metadata={"help": "The order of the tasks; None: that of experts. Saved files keep it here."}
    )
    labels: dict[str, dict] | None = field(
        default=None, metadata={"help": "Label fields of each task; filled in with save_experts='dts'."}
    )
    unchanged: dict[str, list[str]] | None = field(
        default=None, metadata={"help": "Tensors that each expert has not changed; filled in with save_experts='dts'."}
    )
    task_vectors_dtype: Literal["bfloat16"] | None = field(
        default=None,
        metadata={"help": "bfloat16: full task vectors in half of the memory; None: in the weights' dtype."},
    )
    shard_task_vectors: bool = field(
        default=False,
        metadata={"help": "Under several processes, each keeps its part of the task vectors; never saved as True."},
    )
    merge_lora: bool | None = field(
        default=None,
        metadata={"help": "Merge LoRA experts where no gradients are taken; None: if memory allows. Never saved."},
    )
    experts_sha256: dict[str, str] | None = field(
        default=None,
        metadata={"help": "sha256 of each expert's weights, filled in and checked when they are loaded; None: any."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.TINT
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` says where `layers_to_transform` counts; set `layers_to_transform` too.")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                "`layers_to_transform` cannot be used when `target_modules` is a str; say the blocks in that regular "
                "expression, or give a list of module names."
            )
        self._check_experts()
        self._check_saving()
        self._check_coefficients()
        if isinstance(self.tint_layer, tuple):
            self.tint_layer = list(self.tint_layer)
        layers = [self.tint_layer] if isinstance(self.tint_layer, str) else self.tint_layer or []
        if not isinstance(layers, list) or not all(isinstance(name, str) and name for name in layers):
            raise ValueError(f"`tint_layer` is {self.tint_layer!r}; it must be a module name or a list of them.")
        if self.transform is not None:
            check_transform(self.transform, self.transform_kwargs)
        elif self.transform_kwargs:
            raise ValueError(f"`transform_kwargs` is {self.transform_kwargs!r}; name the `transform` that takes them.")
        _check_choice("tint_layer_init", self.tint_layer_init, ("expert", "merged", "base"))
        _check_choice("task_vectors_dtype", self.task_vectors_dtype, (None, "bfloat16"))
        _check_choice("granularity", self.granularity, ("tensor", "module", "block", "model"))

    def _check_experts(self):
        if self.experts is None:
            return
        if not isinstance(self.experts, dict) or not self.experts:
            raise ValueError(f"`experts` is {self.experts!r}; it must name at least one: {{task: Hub id or folder}}.")
        self.experts = {t: os.fspath(s) if isinstance(s, os.PathLike) else s for t, s in self.experts.items()}
        for task, source in self.experts.items():
            check_task_name(task)
            # None stands for an expert that `from_experts` got in memory
            if isinstance(source, dict):
                check_reference(f"`experts[{task!r}]`", source)
            if not isinstance(source, str | dict | None):
                raise ValueError(
                    f"`experts[{task!r}]` is a {type(source).__name__}; a config holds Hub ids and folders. Give "
                    "models or state dicts in memory to `peft_tint.from_experts(base, {task: module})`."
                )
        if self.tasks is not None and sorted(self.tasks) != sorted(self.experts):
            raise ValueError(f"`tasks` is {self.tasks!r}, `experts` names {list(self.experts)}; name the same ones.")
        self.tasks = list(self.tasks or self.experts)
        self.experts = {task: self.experts[task] for task in self.tasks}

    def _check_saving(self):
        _check_choice("save_experts", self.save_experts, ("reference", "dts"))
        # so it comes from a saved adapter, whose `packed_experts` (no field, so never in the JSON) are in its weights
        self.is_packed = self.save_experts == "dts" and self.unchanged is not None
        if self.save_experts == "reference" and self.save_experts_kwargs:
            raise ValueError(
                f"`save_experts_kwargs` is {self.save_experts_kwargs!r}; set `save_experts='dts'`, which takes them."
            )
        try:
            encode_arguments(**self.save_experts_kwargs)
        except (TypeError, ValueError) as error:
            reason = str(error).removesuffix(".")
            raise ValueError(
                f"`save_experts_kwargs` is {self.save_experts_kwargs!r}: {reason}. It may have `budget`, `rank_ratio` "
                "and `codec`."
            ) from error
        if self.is_packed:
            for name in ("labels", "unchanged"):
                of_tasks = getattr(self, name)
                if not isinstance(of_tasks, dict) or sorted(of_tasks) != sorted(self.tasks or ()):
                    raise ValueError(
                        f"`{name}` names the tasks {list(of_tasks or ())}, `experts` names {self.tasks}. The "
                        "adapter's configuration is damaged; download or save it again."
                    )
            self.labels = {task: labels_from_json(self.labels[task]) for task in self.tasks}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs):
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if getattr(config, "is_packed", False):
            # PEFT loads the weights when the model has its layers, and those depend on the experts
            where, _, _ = cls._split_kwargs(kwargs)
            weights = load_peft_weights(pretrained_model_name_or_path, device="cpu", subfolder=subfolder, **where)
            # copies, for they stay with the model, and a mapped file may be written to by others
            config.packed_experts = {key: tensor.clone() for key, tensor in weights.items() if key.startswith(PREFIX)}
        return config

    def to_dict(self):
        fields = {**super().to_dict(), "shard_task_vectors": False, "merge_lora": None}
        if self.save_experts == "reference" or self.experts is None:
            return fields
        return {**fields, "experts": {task: hub_reference(source) for task, source in self.experts.items()}}

    @property
    def is_sharded(self) -> bool:
        """Whether task vectors are in parts, which one process alone has no use for."""
        return self.shard_task_vectors and PartialState().num_processes > 1

    def _check_coefficients(self):
        init = self.coefficient_init
        if isinstance(init, dict):
            if set(init) != set(self.experts or ()):
                raise ValueError(
                    f"`coefficient_init` names the tasks {sorted(init)}, `experts` names "
                    f"{sorted(self.experts or ())}; name the same ones."
                )
        if isinstance(init, str):
            self._check_start()
        elif self.coefficient_init_kwargs:
            raise ValueError(
                f"`coefficient_init_kwargs` is {self.coefficient_init_kwargs!r}; name the merging method that takes "
                f"them in `coefficient_init`, which is {init!r}."
            )
        values = list(init.values()) if isinstance(init, dict) else [] if isinstance(init, str) else [init]
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            raise ValueError(f"`coefficient_init` is {init!r}; it must be a number or {{task: number}}.")
        if self.coefficient_bounds is None:
            return
        bounds = self.coefficient_bounds
        if not isinstance(bounds, list | tuple) or len(bounds) != 2 or not bounds[0] < bounds[1]:
            raise ValueError(f"`coefficient_bounds` is {self.coefficient_bounds!r}; it must be [lowest, highest].")
        low, high = self.coefficient_bounds = list(bounds)  # as it comes back from a saved configuration
        if not all(low <= value <= high for value in values):
            raise ValueError(
                f"`coefficient_init` is {init!r}, outside of `coefficient_bounds` [{low}, {high}]. Widen "
                "the bounds (None leaves the coefficients free) or start inside."
            )

    def _check_start(self):
        """That the coefficients can start from a merge, by what `coefficient_init` names."""
        method, kwargs = self.coefficient_init, dict(self.coefficient_init_kwargs)
        able = [name for name, known in MERGING_METHODS.items() if not known.per_task]
        if method not in able:
            raise ValueError(
                f"`coefficient_init` is {method!r}; it must be a number, {{task: number}}, or a merging method that "
                f"makes one model: {', '.join(able)}."
            )
        scale = kwargs.pop("scale", 1.0)
        if not isinstance(scale, int | float) or not math.isfinite(scale):
            raise ValueError(f"`coefficient_init_kwargs` has the `scale` {scale!r}; it must be a number.")
        check_method(method, kwargs)
        try:
            json.dumps(kwargs)
        except TypeError as error:
            raise ValueError(
                f"`coefficient_init_kwargs` is {kwargs!r}, which cannot be saved with the adapter ({error}); give "
                "numbers, strings and the like."
            ) from error
        if self.tint_layer_init == "merged":
            raise ValueError(
                "`tint_layer_init='merged'` merges the tint layer by the number in `coefficient_init`, which is "
                f"{method!r}. Use `tint_layer_init='expert'`, or start from a number."
            )


def check_task_name(task: str) -> None:
    if not isinstance(task, str) or not TASK_NAME.fullmatch(task):
        raise ValueError(f"The task name {task!r} is not allowed; use letters, digits, '_' and '-' ([A-Za-z0-9_-]+).")
    if task == "mean":
        raise ValueError("The task name 'mean' is not allowed: among the results it is that of the mean over tasks.")


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}; it must be one of {', '.join(map(repr, choices))}.")
