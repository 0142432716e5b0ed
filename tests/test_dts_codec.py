"""The codec of DTS: its numbers, its promises about bytes and errors, and that nothing damaged is ever decoded."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_tint.dts import CODECS, _svd, codec, decode, dequantize, disk_bytes, encode, quantize
from peft_tint.dts._packing import DIGITS, _checksum, join, pack, unpack
from peft_tint.dts._svd import truncated_svd
from peft_tint.dts.codec import weighted_sum
from peft_tint.task_vectors import LowRank

SIZES = {"semidiscrete": {"budget": 0.05}, "paper": {"rank_ratio": 0.2}, "bitdelta": {}}
SHAPES = {
    "block.query.weight": (96, 96),
    "block.fc1.weight": (200, 96),
    "block.fc2.weight": (96, 200),
    "block.conv.weight": (48, 3, 7, 7),
    "block.positions": (1, 40, 96),
    "block.bias": (200,),
    "block.types": (2, 96),
    "block.row": (1, 96),
    "block.scale": (),
}


def low_rank_plus_noise(shape, generator, rank=8, noise=0.3):
    m, n = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
    spectrum = 0.8 ** torch.arange(rank)
    product = torch.randn(m, rank, generator=generator) * spectrum @ torch.randn(rank, n, generator=generator)
    return 1e-4 * (product + noise * torch.randn(m, n, generator=generator)).view(shape)


@pytest.fixture
def deltas():
    generator = torch.Generator().manual_seed(0)
    return {name: low_rank_plus_noise(shape, generator) for name, shape in SHAPES.items()}


def dense(decoded):
    return decoded.dense() if isinstance(decoded, LowRank) else decoded


def relative_error(deltas, packed):
    decoded = {name: dense(tensor) for name, tensor in decode(packed).items()}
    errors = [(delta - decoded.get(name, 0)).double().square().sum() for name, delta in deltas.items()]
    return float(sum(errors) / sum(delta.double().square().sum() for delta in deltas.values())) ** 0.5


def test_golden_numbers():
    x = torch.tensor([0.9, 0.5, 0.3, 0.1, 0, -0.2, -0.4, -0.8])
    expected = torch.tensor([0.728011, 0.728011, 0.223607, 0.223607, 0, -0.316228, -0.316228, -0.8])
    torch.testing.assert_close(dequantize(quantize(x)), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(dequantize(quantize(x.view(2, 2, 2))), expected.view(2, 2, 2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("x", [[], [0.0], [3.0], [-2.0, 0.0], [1.0, 2.0], [0.0, 0.0, -1e-30]])
def test_quantize_few_entries(x):
    """One or two entries of a sign are their own groups."""
    torch.testing.assert_close(dequantize(quantize(torch.tensor(x))), torch.tensor(x))


def plain_quantize(x):
    """The paper's quantiser by sorting, in float64."""
    flat, result = x.double().flatten(), torch.zeros(x.numel(), dtype=torch.float64)
    for sign in (1, -1):
        indices = [i for i in flat.abs().argsort(descending=True).tolist() if sign * flat[i] > 0]
        half = int(len(indices) / 2)
        for group in (indices[:half], indices[half:]):
            result[group] = sign * flat[group].square().mean().sqrt()
    return result.view(x.shape)


@pytest.mark.parametrize("shape", [(1,), (7,), (64, 3), (5, 4, 3, 2)])
def test_quantize_is_the_plain_one(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(dequantize(quantize(x)).double(), plain_quantize(x), rtol=1e-6, atol=0)


def test_quantize_levels():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    errors = [float((dequantize(quantize(x, levels)) - x).norm()) for levels in (2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    with pytest.raises(ValueError, match="`levels` is 3"):
        quantize(x, 3)


@pytest.mark.parametrize("levels", DIGITS)
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_pack(levels, count):
    codes = torch.randint(levels, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack(codes, levels)
    assert len(packed) == math.ceil(count / DIGITS[levels])
    assert torch.equal(unpack(packed, count, levels), codes)


@pytest.mark.parametrize("shape", [(96, 40), (300, 200), (200, 300), (1, 96), (96, 1)])
def test_truncated_svd(shape):
    matrix = low_rank_plus_noise(shape, torch.Generator().manual_seed(1))
    rank = max(1, min(shape) // 8)
    u, s, v = truncated_svd(matrix, rank)
    exact = torch.linalg.svdvals(matrix.double())
    best, error = exact[rank:].square().sum(), (matrix - u * s @ v.T).double().square().sum()
    assert error <= 1.02 * best + 1e-10 * exact.square().sum()
    torch.testing.assert_close(u.T @ u, torch.eye(len(s)), atol=1e-4, rtol=0)
    torch.testing.assert_close(v.T @ v, torch.eye(len(s)), atol=1e-4, rtol=0)
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()


def test_truncated_svd_of_lower_rank():
    generator = torch.Generator().manual_seed(0)
    for scale in (1, 1e-25):
        matrix = scale * torch.randn(200, 5, generator=generator) @ torch.randn(5, 150, generator=generator)
        u, s, v = truncated_svd(matrix, 20)
        assert len(s) == 5
        torch.testing.assert_close(u * s @ v.T, matrix, atol=1e-5 * float(s[0]), rtol=0)


def test_truncated_svd_that_does_not_converge(monkeypatch):
    monkeypatch.setattr(_svd, "ITERATIONS", 1)
    matrix = low_rank_plus_noise((200, 150), torch.Generator().manual_seed(0))
    torch.testing.assert_close(truncated_svd(matrix, 5)[1], torch.linalg.svdvals(matrix)[:5])


def test_paper_is_the_plain_one(deltas, monkeypatch):
    """Decoded: the quantised factors of an exact SVD in float64, with the sign convention."""
    monkeypatch.setattr(_svd, "EXACT", 1000)
    decoded = decode(encode(deltas, "paper", rank_ratio=0.1))
    for name, delta in deltas.items():
        expected = plain_quantize(delta)
        if delta.ndim == 2:
            u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
            rank = max(1, int(0.1 * min(delta.shape)))
            u, s, v = u[:, :rank], s[:rank], vh[:rank].T
            signs = torch.tensor([column[column.abs().argmax()].sign() for column in u.T])
            expected = plain_quantize(u * signs) * s @ plain_quantize(v * signs).T
        # Near the median of the sizes, rounding in float32 may choose the other group
        assert (dense(decoded[name]).double() - expected).norm() <= 0.02 * expected.norm(), name


@pytest.mark.parametrize("name", ["paper", "semidiscrete"])
def test_independent_of_svd_signs(deltas, monkeypatch, name):
    packed = encode(deltas, name, rank_ratio=0.1)
    exact = torch.linalg.svd

    def flipped(matrix, full_matrices):
        u, s, vh = exact(matrix, full_matrices=full_matrices)
        signs = 1 - 2 * (torch.arange(len(s)) % 2)
        return u * signs, s, signs[:, None] * vh

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    for key, value in encode(deltas, name, rank_ratio=0.1).items():
        assert torch.equal(value, packed[key])


@pytest.mark.parametrize("name", CODECS)
def test_file(deltas, tmp_path, name):
    """Through a safetensors file to the same numbers in the shapes of the task vector; the same bytes each time."""
    packed = encode(deltas, name, **SIZES[name])
    save_file(packed, tmp_path / "packed.safetensors")
    loaded = load_file(tmp_path / "packed.safetensors")
    decoded, again = decode(packed), decode(loaded)
    assert list(decoded) == list(deltas)
    for key, delta in deltas.items():
        assert dense(decoded[key]).shape == delta.shape and dense(decoded[key]).dtype == torch.float32
        assert torch.equal(dense(decoded[key]), dense(again[key]))
        assert isinstance(decoded[key], torch.Tensor) or delta.ndim == 2
    torch.manual_seed(1)
    repeated = encode(deltas, name, **SIZES[name])
    assert all(torch.equal(packed[key], repeated[key]) for key in packed)


def test_size_on_disk(tmp_path):
    """Within 2% of the bits: 2 an entry of the factors, and the scales."""
    generator = torch.Generator().manual_seed(0)
    deltas = {f"model.layer.{i}.weight": low_rank_plus_noise((700, 500), generator, noise=1.0) for i in range(2)}
    rank = int(0.2 * 500)
    bits = {"paper": 2 * (rank * (2 * 1200 + 32) + 8 * 32), "semidiscrete": 2 * rank * (2 * 1200 + 16)}
    bits["bitdelta"] = 2 * (700 * 500 + 32)
    for name in CODECS:
        packed = encode(deltas, name, **({} if name == "bitdelta" else {"rank_ratio": 0.2}))
        save_file(packed, tmp_path / "packed.safetensors")
        size = (tmp_path / "packed.safetensors").stat().st_size
        assert abs(size / (bits[name] / 8) - 1) < 0.02
        assert abs(disk_bytes(packed) - size) < 40 * len(packed)


def test_budget(deltas, tmp_path):
    """The file keeps to it, uses it, and the error falls with it."""
    total, errors = 4 * sum(delta.numel() for delta in deltas.values()), []
    for budget in (0.04, 0.06, 0.08, 0.11):
        packed = encode(deltas, budget=budget)
        save_file(packed, tmp_path / "packed.safetensors")
        assert 0.93 * budget * total <= (tmp_path / "packed.safetensors").stat().st_size <= budget * total
        errors.append(relative_error(deltas, packed))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.75 * errors[0]
    halved = encode(deltas, budget=0.12, base_bytes=total // 2)
    assert all(torch.equal(value, halved[key]) for key, value in encode(deltas, budget=0.06).items())


def test_budget_too_small(deltas):
    with pytest.raises(ValueError, match=r"`budget` is 0.001 .* at least 0\.0\d+\.") as caught:
        encode(deltas, budget=0.001)
    smallest = float(str(caught.value).split()[-1].rstrip("."))
    assert set(decode(encode(deltas, budget=smallest))) == set(deltas)
    with pytest.raises(ValueError, match="too little"):
        encode(deltas, budget=smallest - 1e-4)


@pytest.mark.parametrize("noise", [0.1, 0.5, 2.0])
def test_better_than_the_paper(noise):
    generator = torch.Generator().manual_seed(0)
    deltas = {str(shape): low_rank_plus_noise(shape, generator, 20, noise) for shape in [(200, 200), (300, 150)]}
    total = 4 * sum(delta.numel() for delta in deltas.values())
    for ratio in (0.05, 0.1, 0.3):
        paper = encode(deltas, "paper", rank_ratio=ratio)
        ours = encode(deltas, budget=disk_bytes(paper) / total)
        assert disk_bytes(ours) <= disk_bytes(paper)
        assert relative_error(deltas, ours) < relative_error(deltas, paper)


def test_bitdelta(deltas):
    decoded = decode(encode(deltas, "bitdelta"))
    delta = deltas["block.conv.weight"]
    torch.testing.assert_close(decoded["block.conv.weight"], delta.abs().mean() * delta.sign())
    torch.testing.assert_close(decoded["block.bias"], deltas["block.bias"], rtol=0, atol=1e-5)


def test_vectors_are_whole(deltas):
    decoded = decode(encode(deltas, budget=0.05))
    for name in ("block.bias", "block.types", "block.row"):
        assert (decoded[name] - deltas[name]).abs().max() <= deltas[name].abs().max() / 253
    torch.testing.assert_close(decoded["block.scale"], deltas["block.scale"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", CODECS)
def test_dtypes(deltas, name, dtype):
    rounded = {key: (1000 * delta).to(dtype) for key, delta in deltas.items()}
    packed = encode(rounded, name, **SIZES[name])
    for key, value in encode({key: delta.float() for key, delta in rounded.items()}, name, **SIZES[name]).items():
        assert torch.equal(packed[key], value)


@pytest.mark.parametrize("name", CODECS)
def test_inputs_stay(deltas, name):
    copies = {key: delta.clone() for key, delta in deltas.items()}
    encode(deltas, name, **SIZES[name])
    assert all(torch.equal(deltas[key], copy) for key, copy in copies.items())


@pytest.mark.parametrize("name", CODECS)
def test_scale(deltas, name):
    """A task vector of a tiny learning rate is no worse compressed."""
    errors = []
    for scale in (1, 1e-20):
        scaled = {key: scale * delta for key, delta in deltas.items()}
        errors.append(relative_error(scaled, encode(scaled, name, **SIZES[name])))
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


@pytest.mark.parametrize("name", CODECS)
def test_zeros(deltas, name):
    zeros = {key: torch.zeros_like(delta) for key, delta in deltas.items()}
    assert encode(zeros, name, **SIZES[name]) == {}
    zeros |= {"step": torch.tensor(0), "empty": torch.zeros(0, 3)}
    packed = encode({**zeros, "block.bias": deltas["block.bias"]}, name, **SIZES[name])
    assert list(packed) == ["block.bias"]


def test_zero_rows_stay_zero(deltas):
    """As of the words of an embedding that fine-tuning did not see."""
    delta = deltas["block.fc1.weight"].clone()
    delta[10:100] = 0
    factors = decode(encode({"weight": delta}, "paper", rank_ratio=0.2))["weight"]
    assert not factors.b[10:100].any() and factors.b[:10].any()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"codec": "zip", "budget": 0.1}, "`codec` is 'zip', which is none of semidiscrete, paper, bitdelta"),
        ({}, "takes `budget` or `rank_ratio`, but was given neither"),
        ({"budget": 0.1, "rank_ratio": 0.1}, "but was given budget, rank_ratio"),
        ({"codec": "paper", "budget": 0.1}, "takes `rank_ratio`, but was given budget"),
        ({"codec": "bitdelta", "budget": 0.1}, "takes neither `budget` nor `rank_ratio`"),
        ({"budget": 0.0}, "`budget` is 0.0"),
        ({"rank_ratio": math.nan}, "`rank_ratio` is nan"),
        ({"rank_ratio": 1.5}, "`rank_ratio` is 1.5"),
    ],
)
def test_bad_arguments(deltas, arguments, message):
    with pytest.raises(ValueError, match=message):
        encode(deltas, **arguments)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_deltas(deltas, value):
    deltas["block.fc1.weight"][3, 4] = value
    with pytest.raises(ValueError, match=r"'block\.fc1\.weight' has NaN or Inf"):
        encode(deltas, budget=0.1)
    with pytest.raises(ValueError, match=r"'step' is torch\.int64"):
        encode({"step": torch.tensor(3)}, budget=0.1)


def damage(packed, sealed, change):
    """`change` on a copy of the bytes; `sealed` writes the checksum anew, as who means to damage it would."""
    body = change(packed[4:].clone())
    return torch.cat([_checksum(body) if sealed else packed[:4], body])


def set_header(index, value):
    def change(body):
        body.view(torch.int32)[index] = value
        return body

    return change


def set_byte(index, value):
    def change(body):
        body[index] = value
        return body

    return change


def set_scale(body):
    body[24:26] = torch.tensor([math.nan], dtype=torch.bfloat16).view(torch.uint8)
    return body


# Of a semidiscrete tensor: int32 version, form, rank, axes, m, n, then the scales
DAMAGES = {
    "truncated": lambda body: body[:-5],
    "no header": lambda body: body[:7],
    "empty": lambda body: body[:0],
    "longer": lambda body: torch.cat([body, body[-3:]]),
    "version": set_header(0, 2),
    "form": set_header(1, 7),
    "other form": set_header(1, codec.FOUR_GROUPS),
    "negative form": set_header(1, -1),
    "rank": set_header(2, 3),
    "rank 0": set_header(2, 0),
    "huge rank": set_header(2, 2**30),
    "axes": set_header(3, 1),
    "negative axes": set_header(3, -1),
    "huge axes": set_header(3, 2**30),
    "negative shape": set_header(4, -96),
    "huge shape": set_header(4, 2**30),
    "NaN scale": set_scale,
}


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged(deltas, kind, sealed):
    packed = encode(deltas, budget=0.05)["block.query.weight"]
    with pytest.raises(ValueError, match=r"'block\.query\.weight' cannot be decoded"):
        decode({"block.query.weight": damage(packed, sealed, DAMAGES[kind])})


@pytest.mark.parametrize("name", CODECS)
def test_changed_bytes(deltas, name):
    """The checksum sees what no structure can: other codes, the axes of a shape exchanged."""
    packed = encode(deltas, name, **SIZES[name])
    for index in (30, 100, len(packed["block.fc1.weight"]) - 5):
        changed = damage(packed["block.fc1.weight"], False, lambda body, index=index: body.index_add(
            0, torch.tensor([index]), torch.tensor([1], dtype=torch.uint8)))  # fmt: skip
        with pytest.raises(ValueError, match=r"'block\.fc1\.weight' cannot be decoded: .* checksum"):
            decode({**packed, "block.fc1.weight": changed})
    with pytest.raises(ValueError, match="checksum"):
        exchange = lambda body: set_header(5, 200)(set_header(4, 96)(body))  # noqa: E731
        decode({"block.fc1.weight": damage(packed["block.fc1.weight"], False, exchange)})


def test_codes_out_of_range(deltas):
    whole = encode(deltas, budget=0.05)["block.bias"]
    delta = deltas["block.query.weight"].clone()
    delta[0] = 0
    groups = encode({"weight": delta}, "paper", rank_ratio=0.2)["weight"]  # five levels, 3 codes in a byte below 125
    rank = int(0.2 * 96)
    for packed, index in ((whole, 30), (groups, 24 + 4 * rank + 1 + 16 + 5)):
        with pytest.raises(ValueError, match="'x' cannot be decoded: it has codes beyond"):
            decode({"x": damage(packed, True, set_byte(index, 255))})


def test_not_packed(deltas):
    packed = encode(deltas, budget=0.05)["block.bias"]
    for other in (packed.float(), packed[None], packed.to(torch.int8)):
        with pytest.raises(ValueError, match="'x' cannot be decoded: it is torch"):
            decode({"x": other})


def test_computed_when_asked(deltas):
    """The task vector of a model may be a mapping that subtracts one tensor at a time."""

    class Differences(dict):
        taken = 0

        def __getitem__(self, name):
            self.taken += 1
            return super().__getitem__(name).clone()

    differences = Differences(deltas)
    packed = encode(differences, budget=0.05)
    assert differences.taken <= 2 * len(deltas)
    assert all(torch.equal(value, packed[name]) for name, value in encode(deltas, budget=0.05).items())


@pytest.mark.parametrize("shape", SHAPES)
def test_weighted_sum(deltas, shape):
    """Of all codecs, and of sums, without a further rounding but of float32."""
    weights = [0.7, -1.5, 2e-3]
    packed = [encode({**deltas, "x": deltas[shape] * 2**i}, name, **SIZES[name])["x"] for i, name in enumerate(CODECS)]
    expected = sum(w * dense(decode({"x": part})["x"]).double() for w, part in zip(weights, packed, strict=True))
    total = weighted_sum("x", list(zip(weights, packed, strict=True)))
    torch.testing.assert_close(dense(decode({"x": total})["x"]).double(), expected, rtol=1e-5, atol=1e-10)
    twice = dense(decode({"x": weighted_sum("x", [(-2.0, total), (1.0, packed[0])])})["x"]).double()
    expected = -2 * expected + dense(decode({"x": packed[0]})["x"]).double()
    torch.testing.assert_close(twice, expected, rtol=1e-5, atol=1e-10)


# Of a sum of two: int32 version, form, terms, axes, m, n, then 2 weights and 2 sizes
DAMAGED_SUMS = {
    "no terms": set_header(2, 0),
    "negative terms": set_header(2, -1),
    "more terms": set_header(2, 3),
    "other shape": set_header(4, 95),
    "NaN weight": set_header(6, 0x7FC00000),
    "size": set_header(8, 40),
    "negative size": set_header(8, -1),
    "term": set_byte(80, 1),
}


@pytest.mark.parametrize("kind", DAMAGED_SUMS)
def test_damaged_sums(deltas, kind):
    part = encode(deltas, budget=0.05)["block.query.weight"]
    total = weighted_sum("x", [(0.5, part), (0.5, part)])
    with pytest.raises(ValueError, match="'x' cannot be decoded"):
        decode({"x": damage(total, True, DAMAGED_SUMS[kind])})


def test_sums_are_not_nested(deltas):
    """Or a small file could be decoded for ever."""
    inner = weighted_sum("x", [(1.0, encode(deltas, budget=0.05)["block.bias"])])
    outer = join(codec.WEIGHTED_SUM, 1, torch.Size([200]), [torch.ones(1), torch.tensor([len(inner)]).int(), inner])
    with pytest.raises(ValueError, match="'x' cannot be decoded: one of its terms has shape"):
        decode({"x": outer})


def test_terms_beyond_the_rank():
    """Such as that of a LoRA: what its own terms leave has further ones."""
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(64, 4, generator=generator) @ torch.randn(4, 96, generator=generator)
    errors = [relative_error({"x": delta}, encode({"x": delta}, rank_ratio=ratio)) for ratio in (4 / 64, 0.125, 0.5)]
    assert errors[0] > 0.4 and errors[1] < 0.35 and errors[2] < 0.1


def test_stacked_experts_of_a_mixture():
    """(experts, m, n) is a matrix where its ranks can be highest."""
    generator = torch.Generator().manual_seed(0)
    delta = {"x": torch.stack([low_rank_plus_noise((96, 64), generator) for _ in range(4)])}
    packed = encode(delta, budget=0.05)
    assert disk_bytes(packed) <= 0.05 * 4 * 4 * 96 * 64 and relative_error(delta, packed) < 0.5
    assert decode(packed)["x"].shape == (4, 96, 64)
