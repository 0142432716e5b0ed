"""A task vector of a whole model in about 1% of the model's bytes, without data (DTS, arXiv:2512.01461).

`encode` packs each tensor into one uint8 tensor, which safetensors stores; `decode` gives low-rank factors back. After
a header (`_packing.join`) a packed tensor has what its form says:

    whole          scale, codes of 8 bits: x = scale * code
    semidiscrete   scales (r,), codes of u (r, m) and v (r, n): x = u.T @ diag(scales) @ v, with entries -3, -1, 1, 3
    four groups    the paper's quantiser on the tensor itself: levels, values, codes
    truncated SVD  singular values (r,), then the paper's quantiser on u (m, r) and on v (n, r)
    signs          scale, codes of 1 bit: x = scale * sign
    weighted sum   weights (k,), bytes (k,) of each of the k packed tensors that follow: x = sum_i weight_i x_i
"""

import math
from collections.abc import Mapping

import torch

from ..task_vectors import LowRank
from ._packing import Reader, join, pack
from ._quantizer import Quantized, dequantize, quantize
from ._semidiscrete import semidiscrete
from ._svd import truncated_svd

__all__ = ["CODECS", "decode", "dequantize", "disk_bytes", "encode", "quantize"]

CODECS = {"semidiscrete": ("budget", "rank_ratio"), "paper": ("rank_ratio",), "bitdelta": ()}  # and what sets the size
WHOLE, SEMIDISCRETE, FOUR_GROUPS, TRUNCATED_SVD, SIGNS, WEIGHTED_SUM = range(6)
ENTRY = 80  # bytes of safetensors' own header for one tensor, apart from the tensor's name
THIN = 4  # a matrix with no more rows or columns is stored whole, which takes no more bytes than its full rank


def encode(
    deltas: Mapping[str, torch.Tensor],
    codec: str = "semidiscrete",
    *,
    budget: float | None = None,
    rank_ratio: float | None = None,
    base_bytes: int | None = None,
) -> dict[str, torch.Tensor]:
    """Packs a task vector (expert - reference) of named tensors. Those that are zero throughout are absent.

    - "semidiscrete", ours: matrices (and convolutions, as matrices of output channels by the rest) at low rank with
      factors of 2 bits an entry, see `_semidiscrete.py`; all others whole in 8 bits. The size is a `rank_ratio`, rank
      r = max(1, int(rank_ratio * min(m, n))), or a `budget`, the fraction of `base_bytes` (by default what `deltas`
      takes in float32) that `disk_bytes` is at most. Nothing is gained beyond full rank, about 1/8.
    - "paper": matrices by truncated SVD of `rank_ratio`, whose factors are quantised; all others quantised as they are.
    - "bitdelta" (arXiv:2402.10193): 1 bit an entry and one scale; vectors whole in 8 bits.

    `deltas` may compute its tensors when asked: each is taken once, or twice for a `budget`, and one at a time.
    """
    if codec not in CODECS:
        raise ValueError(f"`codec` is '{codec}', which is none of {', '.join(CODECS)}.")
    sizes = {name: value for name, value in {"budget": budget, "rank_ratio": rank_ratio}.items() if value is not None}
    if len(sizes) != min(1, len(CODECS[codec])) or not set(sizes) <= set(CODECS[codec]):
        takes = " or ".join(f"`{name}`" for name in CODECS[codec]) or "neither `budget` nor `rank_ratio`"
        raise ValueError(f"The codec '{codec}' takes {takes}, but was given {', '.join(sizes) or 'neither'}.")
    for name, value in sizes.items():
        if not 0 < value <= 1:
            raise ValueError(f"`{name}` is {value}, which is not above 0 and at most 1.")
    if budget is not None:
        return _encode_within(deltas, budget, base_bytes)

    packed = {}
    for name in deltas:
        delta = _read(name, deltas[name])
        if delta is None:
            continue
        matrix = _as_matrix(delta)
        if codec == "paper" and delta.ndim == 2:
            packed[name] = _quantized_svd(delta, rank_ratio)
        elif codec == "paper":
            packed[name] = join(FOUR_GROUPS, 0, delta.shape, _groups(delta))
        elif matrix is None:
            packed[name] = _whole(delta)
        elif codec == "bitdelta":
            packed[name] = join(SIGNS, 0, delta.shape, [delta.abs().mean(), pack(delta >= 0, 2)])
        else:
            packed[name] = _semidiscrete(delta, _rank(matrix, rank_ratio))
    return packed


def _encode_within(deltas, budget, base_bytes):
    """The codec "semidiscrete" with the ranks that fill a budget. No tensor has less than rank 1."""
    packed, shapes, entries = {}, {}, 0
    for name in deltas:
        delta = deltas[name]
        entries += delta.numel()
        delta = _read(name, delta)
        if delta is None:
            continue
        matrix = _as_matrix(delta)
        if matrix is None:
            packed[name] = _whole(delta)
        else:
            packed[name] = join(SEMIDISCRETE, 0, delta.shape, [])  # its bytes without the factors
            shapes[name] = matrix.shape
    base_bytes = 4 * entries if base_bytes is None else base_bytes
    costs = {name: 2 + sum(shape) / 4 for name, shape in shapes.items()}  # bytes of a rank: a scale, 2 bits an entry
    smallest = disk_bytes(packed) + sum(2 + cost for cost in costs.values())  # codes end in whole bytes
    left = budget * base_bytes - smallest
    if left < 0:
        raise ValueError(
            f"`budget` is {budget} of {base_bytes} bytes, too little for {len(packed)} tensors: it must be at least "
            f"{math.ceil(smallest / base_bytes * 1e6) / 1e6}."
        )

    # All matrices get about the same rank ratio. Ranks where they remove the most energy per byte leave a little less
    # error, but on real experts the predictions are further from the expert's (1.8 times the KL divergence at 1%).
    ranks = dict.fromkeys(shapes, 1)
    steps = [(rank / min(shape), name) for name, shape in shapes.items() for rank in range(2, min(shape) + 1)]
    for _, name in sorted(steps):
        if costs[name] <= left:
            ranks[name] += 1
            left -= costs[name]
    for name, rank in ranks.items():
        packed[name] = _semidiscrete(_read(name, deltas[name]), rank)
    return packed


def decode(packed: Mapping[str, torch.Tensor]) -> dict[str, LowRank | torch.Tensor]:
    """The tensors of `encode`, on the CPU: matrices of low rank as factors, in float32 or as codes in int8, and all
    else dense in float32.

    A packed tensor that is damaged, or is none, is a ValueError with its name.
    """
    return {name: decode_tensor(Reader(name, tensor)) for name, tensor in packed.items()}


def weighted_sum(name: str, terms: list[tuple[float, torch.Tensor]]) -> torch.Tensor:
    """One packed tensor that decodes to the sum of weight * packed tensor, exactly. It holds them as they are."""
    sums = {}  # bytes of a part -> its weight, and it
    for weight, packed in terms:
        reader = Reader(name, packed)
        for inner, part in _read_terms(reader) if reader.form == WEIGHTED_SUM else [(1.0, reader.packed)]:
            key = part.numpy().tobytes()
            sums[key] = (sums.get(key, (0.0,))[0] + weight * inner, part)
    weights, parts = zip(*sums.values(), strict=True)
    sizes = torch.tensor([len(part) for part in parts], dtype=torch.int32)
    return join(WEIGHTED_SUM, len(parts), reader.shape, [torch.tensor(weights), sizes, *parts])


def disk_bytes(packed: Mapping[str, torch.Tensor]) -> int:
    """What `packed` takes as a safetensors file, up to the digits of its offsets; prefixes of names come on top."""
    return sum(tensor.numel() + len(name.encode()) + ENTRY for name, tensor in packed.items())


def _read(name, delta):
    """In float32, or None where nothing has changed."""
    if not delta.numel() or (not delta.is_floating_point() and not delta.any()):
        return None
    if not delta.is_floating_point():
        raise ValueError(f"'{name}' is {delta.dtype}, which has no task vector. Leave it out, or keep it as it is.")
    delta = delta.detach().float()
    smallest, largest = torch.aminmax(delta)  # NaN if any is; one pass instead of three
    if not (smallest.isfinite() and largest.isfinite()):
        raise ValueError(f"The task vector of '{name}' has NaN or Inf. Its expert or its reference is broken.")
    return delta if smallest or largest else None


def _sides(shape):
    """(m, n) of a matrix; of another tensor its first axes and its last ones, split where the ranks can be highest."""
    splits = [(math.prod(shape[:axis]), math.prod(shape[axis:])) for axis in range(1, len(shape))]
    return max(splits, key=min, default=(1, math.prod(shape)))


def _as_matrix(delta):
    """(m, n), or None for vectors and thin matrices."""
    sides = _sides(delta.shape)
    return None if min(sides) <= THIN else delta.reshape(sides)


def _rank(matrix, rank_ratio):
    return max(1, int(rank_ratio * min(matrix.shape)))


def _whole(delta):
    scale = delta.abs().max() / 127
    return join(WHOLE, 0, delta.shape, [scale, pack((delta / scale).round() + 127, 255)])


def _semidiscrete(delta, rank):
    scales, u, v = semidiscrete(_as_matrix(delta), rank)
    # bfloat16 has the range of float32; its rounding is nothing beside that of the codes
    return join(SEMIDISCRETE, len(scales), delta.shape, [scales.bfloat16(), pack((u + 3) / 2, 4), pack((v + 3) / 2, 4)])


def _quantized_svd(matrix, rank_ratio):
    u, s, v = truncated_svd(matrix, _rank(matrix, rank_ratio))
    return join(TRUNCATED_SVD, len(s), matrix.shape, [s, *_groups(u), *_groups(v)])


def _groups(x):
    """The parts of a tensor in four groups, or five: most have no exact zeros, and 2 bits an entry suffice for them."""
    codes, values = quantize(x)
    levels = 5 if (codes == 0).any() else 4
    return [torch.tensor([levels], dtype=torch.uint8), values[-4:], pack(codes - int(levels == 4), levels)]


def _read_groups(reader, shape):
    levels = int(reader.take(1, torch.uint8))
    if levels not in (4, 5):
        reader.fail(f"it has {levels} levels instead of 4, or 5 with zero")
    values = torch.nn.functional.pad(reader.floats(4), (1, 0))
    codes = reader.codes(math.prod(shape), levels) + int(levels == 4)
    return dequantize(Quantized(codes, values)).view(shape)


def _read_terms(reader):
    weights = reader.floats(max(reader.rank, 0)).tolist()
    sizes = reader.take(len(weights), torch.int32).tolist()
    terms = [(weight, reader.take(max(size, 0), torch.uint8)) for weight, size in zip(weights, sizes, strict=True)]
    reader.end()
    return terms


def _decode_sum(reader):
    if reader.rank < 1:
        reader.fail(f"it is a sum of {reader.rank} terms")
    tensors = []
    for weight, packed in _read_terms(reader):
        part = Reader(reader.name, packed)
        if part.shape != reader.shape or part.form == WEIGHTED_SUM:
            reader.fail(f"one of its terms has shape {tuple(part.shape)} and form {part.form}")
        tensors.append((weight, decode_tensor(part)))
    if all(isinstance(tensor, LowRank) for _, tensor in tensors):
        b, a = (
            torch.cat([getattr(tensor, side) for _, tensor in tensors], axis) for side, axis in (("b", 1), ("a", 0))
        )
        return LowRank(b, a, torch.cat([weight * tensor.scale for weight, tensor in tensors]))
    return sum(weight * (tensor.dense() if isinstance(tensor, LowRank) else tensor) for weight, tensor in tensors)


def decode_tensor(reader: Reader) -> LowRank | torch.Tensor:
    if reader.form == WEIGHTED_SUM:
        return _decode_sum(reader)
    shape, rank = reader.shape, reader.rank
    m, n = _sides(shape)
    low_rank = reader.form in (SEMIDISCRETE, TRUNCATED_SVD)
    if not low_rank <= rank <= low_rank * min(m, n):
        reader.fail(f"it has rank {rank} for a shape of {tuple(shape)}")
    if reader.form == WHOLE:
        tensor = reader.floats(1) * (reader.codes(reader.count, 255).float() - 127)
    elif reader.form == SIGNS:
        tensor = reader.floats(1) * (2 * reader.codes(reader.count, 2).float() - 1)
    elif reader.form == FOUR_GROUPS:
        tensor = _read_groups(reader, shape)
    elif reader.form == SEMIDISCRETE:
        scales = reader.floats(rank, torch.bfloat16)
        u, v = (2 * reader.codes(rank * side, 4).to(torch.int8).view(rank, side) - 3 for side in (m, n))
        tensor = LowRank(u.T.contiguous(), v, scales)
    elif reader.form == TRUNCATED_SVD:
        s = reader.floats(rank)
        u, v = (_read_groups(reader, (side, rank)) for side in (m, n))
        tensor = LowRank(u, v.T.contiguous(), s)
    else:
        reader.fail(f"its form is {reader.form}, which is none of 0 to {WEIGHTED_SUM}")
    reader.end()
    return tensor if low_rank and len(shape) == 2 else (tensor.dense() if low_rank else tensor).view(shape)
