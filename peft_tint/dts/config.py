"""The configuration of DTS."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from peft.utils.peft_types import PeftType

from .._files import check_reference
from .._saved_config import SavedConfig
from ..experts import LABEL_FIELDS, hub_reference, labels_from_json
from .codec import CODECS


@dataclass
class DtsConfig(SavedConfig):
    """
    Configuration of DTS, a full fine-tune of the base model as an adapter of about 1% of its size
    ([Decomposition, Thresholding and Scaling](https://arxiv.org/abs/2512.01461)).

    The fine-tune is compressed against the model that the adapter is put on: the pretrained base (DTS), or a merged
    model (DTS-D). A loaded adapter needs that model only.

    Args:
        expert (`str | dict`, *optional*):
            The fine-tune: a Hub id, a local folder, or `{"id": ..., "revision": ..., "subfolder": ...}`, of a full
            checkpoint or of a PEFT adapter. One held in memory goes through [`compress`]. A saved adapter keeps a Hub
            id for the record and forgets a local folder.
        codec (`str`):
            `"semidiscrete"` (default, ours), `"paper"` or `"bitdelta"`.
        budget (`float`):
            The adapter's size without the head, as a fraction of the base's bytes in float32. Only of the codec
            `"semidiscrete"`.
        rank_ratio (`float`, *optional*):
            Instead of a budget: every matrix of m x n has the rank max(1, int(rank_ratio * min(m, n))).
        target_modules (`list[str] | str`, *optional*):
            The modules to adapt; `None` (default) is all outside of the head. A list matches names or their endings, a
            string is a regular expression. Others keep the base's weights. The head is always the expert's own, whole.
        exclude_modules (`list[str] | str`, *optional*):
            Modules not to adapt, matched in the same way.
        init_weights (`bool`):
            `False` makes a random adapter, without an expert, for tests.
        labels (`dict`, *optional*):
            The label names and the kind of the task for the model's config (`id2label`, `label2id`, `problem_type`,
            `pad_token_id`). `None` takes them from the expert.
        unchanged (`list[str]`, *optional*):
            The tensors that the expert has not changed. Filled in when the expert is compressed; a saved adapter has
            neither them nor their codes.
        expert_sha256 (`str`, *optional*):
            The sha256 of the expert's safetensors file (of shards one after another), filled in when it is loaded.
        base_samples (`list[float]`, *optional*):
            One weight of each of the base's tensors that the expert has changed, filled in likewise: the adapter is
            refused on a model that has others. `None` takes any model.
        sha256 (`str`, *optional*):
            Filled in when the adapter is saved: that of its weights' file and of the settings that belong to them.
    """

    expert: str | dict | None = field(
        default=None,
        metadata={"help": "The fine-tune to compress: a Hub id, a local folder or {'id', 'revision', 'subfolder'}."},
    )
    codec: str = field(default="semidiscrete", metadata={"help": f"How to compress: {', '.join(CODECS)}."})
    budget: float | int = field(
        default=0.01, metadata={"help": "Size without the head, as a fraction of the base's bytes in float32."}
    )
    rank_ratio: float | int | None = field(
        default=None, metadata={"help": "Instead of a budget: rank over the smaller side of each matrix."}
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to adapt (list of endings, or regex); None: all outside of the head."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules not to adapt (list of endings, or regex)."}
    )
    init_weights: bool = field(default=True, metadata={"help": "False: a random adapter, without an expert."})
    labels: dict | None = field(
        default=None, metadata={"help": "Label fields of the task for the model's config; None: the expert's."}
    )
    unchanged: list[str] | None = field(
        default=None, metadata={"help": "Tensors that the expert has not changed; filled in by compressing it."}
    )
    expert_sha256: str | None = field(
        default=None, metadata={"help": "sha256 of the expert's weights, filled in when it is loaded."}
    )
    base_samples: list[float] | None = field(
        default=None, metadata={"help": "Weights by which the base model is recognised; None: any model will do."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.DTS
        self.is_compressed = self.unchanged is not None  # so it comes from a saved adapter, whose codes will be loaded
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        self._check_expert()
        encode_arguments(self.codec, self.budget, self.rank_ratio)
        if self.labels is not None:
            if not isinstance(self.labels, Mapping) or set(self.labels) - set(LABEL_FIELDS):
                raise ValueError(f"`labels` is {self.labels!r}; it must have fields of {', '.join(LABEL_FIELDS)}.")
            if not isinstance(self.labels.get("id2label", {}), Mapping | None):
                raise ValueError(f"`labels` has id2label={self.labels['id2label']!r}; it must be {{index: name}}.")
            self.labels = labels_from_json(self.labels)

    def _check_expert(self):
        if isinstance(self.expert, os.PathLike):
            self.expert = os.fspath(self.expert)
        if isinstance(self.expert, Mapping):
            check_reference("`expert`", self.expert)
        if not isinstance(self.expert, str | Mapping | None):
            raise ValueError(
                f"`expert` is a {type(self.expert).__name__}; a config holds a Hub id or a folder. Give a model or a "
                "state dict in memory to `peft_tint.compress(base, expert)`."
            )

    @property
    def encode_arguments(self) -> dict:
        """The codec, and what decides the size, as `encode` takes them."""
        return encode_arguments(self.codec, self.budget, self.rank_ratio)

    def to_dict(self):
        return {**super().to_dict(), "expert": hub_reference(self.expert)}


def encode_arguments(codec: str = "semidiscrete", budget: float = 0.01, rank_ratio: float | None = None) -> dict:
    """What `encode` takes of these: a `rank_ratio` in the place of the budget. Raises ValueError for what is wrong."""
    if codec not in CODECS:
        raise ValueError(f"`codec` is {codec!r}; it must be one of {', '.join(map(repr, CODECS))}.")
    takes = CODECS[codec]
    if rank_ratio is not None and "rank_ratio" not in takes:
        raise ValueError(f"`rank_ratio` is {rank_ratio!r}, but the codec {codec!r} takes none.")
    if rank_ratio is None and takes == ("rank_ratio",):
        raise ValueError(f"The codec {codec!r} has no budget; give a `rank_ratio`, such as 0.08.")
    for name, value in {"budget": budget, "rank_ratio": rank_ratio}.items():
        if name == "rank_ratio" and value is None:
            continue
        if not isinstance(value, int | float) or not 0 < value <= 1:
            raise ValueError(f"`{name}` is {value!r}; it must be a number above 0 and at most 1.")
    if rank_ratio is not None:
        return {"codec": codec, "rank_ratio": rank_ratio}
    return {"codec": codec, "budget": budget} if "budget" in takes else {"codec": codec}
