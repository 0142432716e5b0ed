from .arguments import TintTrainingArguments
from .objectives import OBJECTIVES
from .trainer import TintTrainer

__all__ = ["OBJECTIVES", "TintTrainer", "TintTrainingArguments"]
