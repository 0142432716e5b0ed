"""Merges fine-tuned models by PEFT. Importing this package registers the method TINT with PEFT."""

from ._register import register
from .tint import Coefficients, TintConfig, TintModel, from_experts

register("TINT", TintConfig, TintModel)

__version__ = "0.1.0"
__all__ = ["Coefficients", "TintConfig", "TintModel", "from_experts"]
