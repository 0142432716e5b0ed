from .arguments import TintTrainingArguments
from .objectives import OBJECTIVES
from .precision import bf16_is_native
from .trainer import TintTrainer

__all__ = ["OBJECTIVES", "TintTrainer", "TintTrainingArguments", "bf16_is_native"]
