from .config import TintConfig
from .model import Coefficients, TintModel, from_experts

__all__ = ["Coefficients", "TintConfig", "TintModel", "from_experts"]
