from .config import TintConfig
from .model import Coefficients, TintModel, from_experts, hotswap_adapter, set_task

__all__ = ["Coefficients", "TintConfig", "TintModel", "from_experts", "hotswap_adapter", "set_task"]
