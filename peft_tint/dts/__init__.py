"""DTS (arXiv:2512.01461): every task keeps its own task vector, compressed to about 1% of the model."""

from .codec import CODECS, decode, dequantize, disk_bytes, encode, quantize
from .config import DtsConfig
from .model import DtsModel, compress
from .similarity import description_similarity, weight_similarity

__all__ = [
    "CODECS",
    "DtsConfig",
    "DtsModel",
    "compress",
    "decode",
    "dequantize",
    "description_similarity",
    "disk_bytes",
    "encode",
    "quantize",
    "weight_similarity",
]
