"""Merges fine-tuned models by PEFT. Importing this package registers the methods TINT and DTS with PEFT."""

from ._card import model_card
from ._register import register
from ._saved_config import extend_saving
from .dts import DtsConfig, DtsModel, compress
from .evaluation import NormalizedAccuracy
from .hub import extend_pushes
from .merging import MERGING_METHODS, merge_task_vectors
from .merging._checkpoints import merge_checkpoints
from .merging._lora import extract_lora
from .merging._models import merge
from .preflight import ExpertsReport, check_experts
from .tint import Coefficients, TintConfig, TintModel, from_experts, hotswap_adapter, set_task
from .training import OBJECTIVES, TintTrainer, TintTrainingArguments, bf16_is_native

register("TINT", TintConfig, TintModel)
register("DTS", DtsConfig, DtsModel)
extend_saving()
extend_pushes()

__version__ = "0.1.0"
__all__ = [
    "MERGING_METHODS",
    "OBJECTIVES",
    "Coefficients",
    "DtsConfig",
    "DtsModel",
    "ExpertsReport",
    "NormalizedAccuracy",
    "TintConfig",
    "TintModel",
    "TintTrainer",
    "TintTrainingArguments",
    "bf16_is_native",
    "check_experts",
    "compress",
    "extract_lora",
    "from_experts",
    "hotswap_adapter",
    "merge",
    "merge_checkpoints",
    "merge_task_vectors",
    "model_card",
    "set_task",
]
