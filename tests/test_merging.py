"""Data-free merging: each method against a plain version in float64, the papers' numbers, and what it promises."""

import copy
import hashlib
import math
import re

import pytest
import torch
import transformers as T
from models import ARCHITECTURES, IDS, make_experts, output
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from test_lora_experts import make_adapter

from peft_tint import MERGING_METHODS, TintConfig, merge, merge_task_vectors
from peft_tint.merging import transform_task_vectors
from peft_tint.merging._svd import svd
from peft_tint.merging.magnitude import threshold_bits

SHAPES = {
    "embeddings.weight": (9, 4),
    "layers.0.weight": (6, 5),
    "layers.0.bias": (6,),
    "layers.1.conv.weight": (2, 3, 2, 2),
    "layers.1.weight": (4, 6),
    "layers.2.weight": (5, 5),
    "logit_scale": (),
}
PAPER = torch.tensor(
    [
        [0.5, -0.1, 0.3, 0, -0.9, 0.2, 0.05, -0.4, 0.6, -0.7],
        [0.4, 0.8, -0.6, 0.1, -0.2, -0.3, 0.02, 0.5, -0.55, 0.45],
        [-0.35, 0.7, 0.25, -0.15, 0.65, 0.12, -0.95, 0.33, 0.11, -0.05],
    ]
)
MATRICES = torch.tensor(
    [[[2.0, 0, 1], [0, 1, 0], [1, 0, 3]], [[1, 2, 0], [0, 1, 1], [2, 0, 0]], [[0, 1, 0], [3, 0, 1], [0, 0, 1]]]
)
# Arguments that make the one task that is given come out as it went in; the others lose something by design.
ONE_TASK = {
    "average": {},
    "task_arithmetic": {},
    "ties": {"density": 1.0},
    "dare": {"density": 1.0},
    "dare_ties": {"density": 1.0},
    "magnitude": {"density": 1.0},
    "tall_masks": {},
    "consensus": {"min_tasks": 1},
    "lines": {"beta": 0.0},
    "emr": {},
    "tsv": {},
    "wudi": {},
    "karcher": {},
}
BAD_ARGUMENTS = {
    "ties": [{"density": 0}, {"density": 1.5}, {"density": float("nan")}, {"aggregate": "max"}],
    "dare": [{"density": 0.0}],
    "dare_ties": [{"density": -1}, {"aggregate": "median"}],
    "magnitude": [{"density": 2}],
    "tall_masks": [{"mask_scale": 0}],
    "consensus": [{"mask_scale": -0.4}, {"min_tasks": 4}, {"min_tasks": 0}],
    "iso_cts": [{"common_space": 0}],
    "tsv": [{"untruncated": value} for value in (3, [None], [""], ("embed",), "of_nothing", ["embed", "of_nothing"])],
    "wudi": [{"learning_rate": 0}, {"iterations": -1}],
    "slerp": [{"t": 1.1}],
    "karcher": [{"max_iterations": 0}, {"tolerance": 0}],
}


@pytest.fixture(params=MERGING_METHODS)
def method(request):
    return request.param


def random_task_vectors(tasks):
    return {task: {name: torch.randn(shape) for name, shape in SHAPES.items()} for task in tasks}


def tasks_of(method):
    return ["b", "a"] if method == "slerp" else ["b", "c", "a"]


def leaves(merged):
    """{name or (task, name): tensor} of what any method returns."""
    return {
        (key, name) if isinstance(value, dict) else key: tensor
        for key, value in merged.items()
        for name, tensor in (value.items() if isinstance(value, dict) else [(None, value)])
    }


def assert_near(merged, expected, tolerance=1e-6):
    merged, expected = leaves(merged), leaves(expected)
    assert merged.keys() == expected.keys()
    for key, tensor in merged.items():
        error = (tensor.double() - expected[key].double()).norm()
        assert error <= tolerance * expected[key].double().norm(), (key, error)


def assert_same(merged, expected):
    merged, expected = leaves(merged), leaves(expected)
    assert merged.keys() == expected.keys() and all(torch.equal(merged[key], expected[key]) for key in merged)


# ---- plain versions, entry by entry where that can be, in float64 ----------------------------------------------------


def flat(tensors):
    return torch.cat([tensor.double().flatten() for tensor in tensors.values()]).tolist()


def unflat(values, like):
    sizes = [tensor.numel() for tensor in like.values()]
    parts = torch.tensor(values, dtype=torch.float64).split(sizes)
    return {name: part.view(tensor.shape) for part, (name, tensor) in zip(parts, like.items(), strict=True)}


def by_entry(function):
    """A method that merges all vectors entry by entry: `function` takes a list of the tasks' flat vectors."""

    def plain(task_vectors, **kwargs):
        like = next(iter(task_vectors.values()))
        return unflat(function([flat(tensors) for tensors in task_vectors.values()], **kwargs), like)

    return plain


def by_matrix(function):
    def plain(task_vectors, **kwargs):
        merged = {}
        for name, shape in SHAPES.items():
            stacked = [tensors[name].double() for tensors in task_vectors.values()]
            merged[name] = function(stacked, **kwargs) if len(shape) == 2 else sum(stacked) / len(stacked)
        return merged

    return plain


def by_tensor(function):
    def plain(task_vectors, **kwargs):
        vectors = task_vectors.values()
        return {name: function([tensors[name].double() for tensors in vectors], **kwargs) for name in SHAPES}

    return plain


def plain_trim(vector, density):
    place = len(vector) - int(density * len(vector))
    smallest = sorted(map(abs, vector))[place - 1] if place else 0
    return [x if abs(x) >= smallest else 0.0 for x in vector]


def plain_elect(vectors, aggregate):
    sums = [sum(entries) for entries in zip(*vectors, strict=True)]
    majority = sum((total > 0) - (total < 0) for total in sums)
    merged = []
    for total, entries in zip(sums, zip(*vectors, strict=True), strict=True):
        positive = (total or majority) > 0
        agreeing = [x for x in entries if (x > 0 if positive else x < 0)]
        merged.append(sum(agreeing) / (max(1, len(agreeing)) if aggregate == "mean" else 1))
    return merged


def plain_ties(vectors, density=0.2, aggregate="mean"):
    return plain_elect([plain_trim(vector, density) for vector in vectors], aggregate)


def plain_drop(task_vectors, density=0.1, seed=0):
    dropped = {}
    for task, tensors in task_vectors.items():
        dropped[task] = {}
        for name, tensor in tensors.items():
            digest = hashlib.sha256(f"({seed}, '{task}', '{name}')".encode()).digest()
            draws = torch.rand(
                tensor.numel(), generator=torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
            )
            kept = [x / density if draw < density else 0.0 for x, draw in zip(flat({"": tensor}), draws, strict=True)]
            dropped[task][name] = torch.tensor(kept, dtype=torch.float64).view(tensor.shape)
    return dropped


def plain_dare_ties(task_vectors, density=0.1, seed=0, aggregate="mean"):
    return by_entry(plain_elect)(plain_drop(task_vectors, density, seed), aggregate=aggregate)


def plain_masks(vectors, mask_scale=0.4):
    sums = [sum(entries) for entries in zip(*vectors, strict=True)]
    return sums, [[abs(x) > mask_scale * abs(s - x) for x, s in zip(v, sums, strict=True)] for v in vectors]


def plain_tall_masks(task_vectors):
    sums, masks = plain_masks([flat(tensors) for tensors in task_vectors.values()])
    return {
        task: unflat([s * kept for s, kept in zip(sums, mask, strict=True)], task_vectors[task])
        for task, mask in zip(task_vectors, masks, strict=True)
    }


def plain_consensus(vectors):
    sums, masks = plain_masks(vectors)
    return [s * (sum(kept) >= 2) for s, kept in zip(sums, zip(*masks, strict=True), strict=True)]


def plain_lines(task_vectors, beta=0.5):
    merged = by_entry(plain_sum)(task_vectors)
    block = {"layers.0": 0, "layers.1": 1, "layers.2": 2}
    return {n: t * (1 / len(task_vectors) + beta * block.get(n[:8], 0) / 2) for n, t in merged.items()}


def plain_emr(task_vectors):
    vectors = {task: flat(tensors) for task, tensors in task_vectors.items()}
    columns = list(zip(*vectors.values(), strict=True))
    signs = [1 if sum(entries) > 0 else -1 for entries in columns]
    unified = [s * max(max(x * s, 0) for x in entries) for s, entries in zip(signs, columns, strict=True)]
    merged = {}
    for task, vector in vectors.items():
        masked = [u * (x * s > 0) for u, x, s in zip(unified, vector, signs, strict=True)]
        rescaler = sum(map(abs, vector)) / (sum(map(abs, masked)) or 1)
        merged[task] = unflat([rescaler * x for x in masked], task_vectors[task])
    return merged


def plain_polar(matrix):
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def plain_tsv(matrices):
    u, s, vh = zip(*(torch.linalg.svd(matrix, full_matrices=False) for matrix in matrices), strict=True)
    rank = min(matrices[0].shape) // len(matrices)
    left, right = torch.cat([x[:, :rank] for x in u], 1), torch.cat([x[:rank] for x in vh])
    return plain_polar(left) @ torch.diag(torch.cat([x[:rank] for x in s])) @ plain_polar(right)


def plain_tsv_but(task_vectors, untruncated=()):
    merged, summed = by_matrix(plain_tsv)(task_vectors), by_entry(plain_sum)(task_vectors)
    return {name: (summed if any(text in name for text in untruncated) else merged)[name] for name in merged}


def plain_iso_c(matrices):
    u, s, vh = torch.linalg.svd(sum(matrices), full_matrices=False)
    return u @ torch.diag(s.mean().expand(len(s))) @ vh


def plain_iso_cts(matrices, common_space=0.8):
    rank = min(matrices[0].shape)
    own = round((rank - int(rank * common_space)) / len(matrices))
    u, s, vh = (x[..., : rank - own * len(matrices)] for x in plain_svd(sum(matrices)))
    us, ss, vs = [u], [s], [vh]
    for matrix in matrices:
        for parts, part in zip((us, ss, vs), plain_svd(matrix - u @ u.T @ matrix), strict=True):
            parts.append(part[..., :own])
    singular = torch.cat(ss)
    return singular.mean() * plain_polar(torch.cat(us, 1)) @ plain_polar(torch.cat(vs, 1)).T


def plain_svd(matrix):
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vh.T


def wudi_loss(tau, matrices):
    return sum(((tau - m) @ m.T).square().sum() / m.square().sum() for m in matrices)


def plain_wudi(matrices, learning_rate=1e-5, iterations=300):
    tau = torch.nn.Parameter(sum(matrices))
    optimizer = torch.optim.Adam([tau], lr=learning_rate)
    for _ in range(iterations):
        optimizer.zero_grad()
        wudi_loss(tau, matrices).backward()
        optimizer.step()
    return tau.detach()


def plain_slerp(pair, t=0.5):
    x, y = pair
    angle = math.acos(max(-1, min(1, float((x * y).sum() / x.norm() / y.norm()))))
    if math.sin(angle) < 1e-9:
        return (1 - t) * x + t * y
    return (math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle)


def plain_karcher(tensors):
    if tensors[0].numel() == 1:  # no sphere to speak of
        return sum(tensors) / len(tensors)
    norms = [x.norm() for x in tensors]
    points = [x / norm for x, norm in zip(tensors, norms, strict=True)]
    mean = sum(points) / sum(points).norm()
    for _ in range(500):
        angles = [torch.acos((x * mean).sum()) for x in points]
        logs = [(x - a.cos() * mean) * a / a.sin() for x, a in zip(points, angles, strict=True)]
        step = sum(logs) / len(logs)
        length = step.norm()
        if length > 1e-14:
            mean = length.cos() * mean + length.sin() * step / length
        mean = mean / mean.norm()
    return mean * sum(norms) / len(norms)


def plain_sum(vectors):
    return [sum(entries) for entries in zip(*vectors, strict=True)]


PLAIN = {
    "average": by_entry(lambda vectors: [sum(entries) / len(vectors) for entries in zip(*vectors, strict=True)]),
    "task_arithmetic": by_entry(plain_sum),
    "ties": by_entry(plain_ties),
    "dare": lambda task_vectors, **kwargs: by_entry(plain_sum)(plain_drop(task_vectors, **kwargs)),
    "dare_ties": plain_dare_ties,
    "magnitude": by_entry(lambda vectors, density=0.2: plain_sum([plain_trim(v, density) for v in vectors])),
    "tall_masks": plain_tall_masks,
    "consensus": by_entry(plain_consensus),
    "lines": plain_lines,
    "emr": plain_emr,
    "tsv": plain_tsv_but,
    "iso_c": by_matrix(plain_iso_c),
    "iso_cts": by_matrix(plain_iso_cts),
    "wudi": by_matrix(plain_wudi),
    "slerp": by_tensor(plain_slerp),
    "karcher": by_tensor(plain_karcher),
}
OTHER_ARGUMENTS = [
    ("ties", {"density": 0.5, "aggregate": "sum"}),
    ("ties", {"density": 1.0}),
    ("dare", {"density": 0.4, "seed": 7}),
    ("dare_ties", {"density": 0.4, "aggregate": "sum", "seed": 3}),
    ("magnitude", {"density": 0.7}),
    ("lines", {"beta": 1.5}),
    ("iso_cts", {"common_space": 0.3}),
    ("tsv", {"untruncated": ["0.weight", "embed"]}),
    ("wudi", {"learning_rate": 1e-3, "iterations": 20}),
    ("slerp", {"t": 0.2}),
]


@pytest.mark.parametrize(("method", "kwargs"), [*((name, {}) for name in MERGING_METHODS), *OTHER_ARGUMENTS])
@pytest.mark.parametrize("seed", range(3))
def test_a_plain_version_agrees(method, kwargs, seed):
    torch.manual_seed(seed)
    task_vectors = random_task_vectors(tasks_of(method))
    assert_near(merge_task_vectors(task_vectors, method, **kwargs), PLAIN[method](task_vectors, **kwargs))


@pytest.mark.parametrize("name", ["ties", "magnitude", "emr"])
def test_per_tensor_takes_each_tensor_for_a_whole_vector(name):
    task_vectors = random_task_vectors("bca")
    for number, tensors in enumerate(task_vectors.values()):
        tensors["layers.2.weight"] *= 100 + number  # over the whole vector, nothing else would be left of TIES
    merged = merge_task_vectors(task_vectors, name, per_tensor=True)
    for key in SHAPES:
        alone = PLAIN[name]({task: {key: tensors[key]} for task, tensors in task_vectors.items()})
        if MERGING_METHODS[name].per_task:
            assert_near({task: {key: own[key]} for task, own in merged.items()}, alone)
        else:
            assert_near({key: merged[key]}, alone)
    whole = merge_task_vectors(task_vectors, name)
    assert any(not torch.equal(x, y) for x, y in zip(leaves(merged).values(), leaves(whole).values(), strict=True))


def test_lines_has_no_per_tensor():
    with pytest.raises(ValueError, match="`lines` scales tensors by their depth"):
        merge_task_vectors(random_task_vectors("ab"), "lines", per_tensor=True)


@pytest.mark.parametrize("name", [name for name, known in MERGING_METHODS.items() if known.elementwise])
def test_elementwise_methods_cannot_tell_a_piece_from_a_tensor(name):
    """Which `merge_checkpoints` relies on."""
    task_vectors = random_task_vectors("bca")
    pieces = {
        task: {(key, i): piece for key, t in own.items() for i, piece in enumerate(t.view(-1).split(5))}
        for task, own in task_vectors.items()
    }
    whole, in_pieces = merge_task_vectors(task_vectors, name), merge_task_vectors(pieces, name)
    if not MERGING_METHODS[name].per_task:
        whole, in_pieces = {"": whole}, {"": in_pieces}
    for task, tensors in whole.items():
        for key, tensor in tensors.items():
            own = [piece for (of_tensor, _), piece in in_pieces[task].items() if of_tensor == key]
            torch.testing.assert_close(torch.cat(own), tensor.view(-1), rtol=1e-6, atol=0)


# ---- the papers' numbers ---------------------------------------------------------------------------------------------


def paper_vectors():
    return {f"t{i}": {"a": row[:4].clone(), "b": row[4:].clone()} for i, row in enumerate(PAPER)}


def joined(tensors):
    return torch.cat([tensors["a"], tensors["b"]])


def test_ties_of_the_paper():
    expected = torch.tensor([0, 1.5, -0.6, 0, -0.9, 0, -0.95, 0, 0.6, -0.7])
    torch.testing.assert_close(joined(merge_task_vectors(paper_vectors(), "ties", aggregate="sum")), expected)
    expected[1] = 0.75
    torch.testing.assert_close(joined(merge_task_vectors(paper_vectors(), "ties")), expected)


def test_consensus_of_the_paper():
    expected = PAPER.sum(0)
    expected[6] = 0
    torch.testing.assert_close(joined(merge_task_vectors(paper_vectors(), "consensus")), expected)


def test_emr_of_the_paper():
    merged = merge_task_vectors(paper_vectors(), "emr")
    mean = PAPER.mean(0)
    sign = torch.where(mean > 0, 1.0, -1.0)
    unified = sign * (PAPER * sign).clamp(min=0).amax(0)
    for row, task, rescaler in zip(PAPER, merged, (1.293103, 1.187879, 0.938461), strict=True):
        torch.testing.assert_close(joined(merged[task]), rescaler * unified * (row * sign > 0), rtol=1e-5, atol=1e-6)


def test_lines_of_the_paper():
    names = [f"visual.resblocks.{i}.mlp.{i % 2}.weight" for i in range(12)]
    task_vectors = {"a": {name: torch.ones(2) for name in [*names, "proj", "token_embedding.weight"]}}
    merged = merge_task_vectors(task_vectors, "lines", alpha=0.125, beta=0.5)
    for name, scale in (("proj", 0.125), (names[0], 0.125), (names[1], 0.17045454), (names[11], 0.625)):
        torch.testing.assert_close(merged[name], torch.full((2,), scale))
    # alpha = (|sum|_1 / |merged|_1) / T: twice the sum gets half of it
    twice = merge_task_vectors(
        {**task_vectors, "b": task_vectors["a"]},
        "lines",
        beta=0.0,
        inner=lambda vectors: ((name, 4 * tensor) for name, tensor in vectors["a"].items()),
    )
    torch.testing.assert_close(twice["proj"], torch.ones(2))


def test_lines_without_blocks_or_with_one():
    tensors = {"weight": torch.randn(3), "layer.0.weight": torch.randn(3)}
    assert_near(merge_task_vectors({"a": tensors}, "lines", alpha=0.5), {n: t / 2 for n, t in tensors.items()})


def test_spectra_of_the_papers_matrices():
    """Their sum has rank 2, and its third pair of singular vectors is of arbitrary sign; Iso-C leaves it out."""
    task_vectors = {f"t{i}": {"w": matrix} for i, matrix in enumerate(MATRICES)}
    values = torch.linalg.svdvals(MATRICES.sum(0))
    merged = torch.linalg.svdvals(merge_task_vectors(task_vectors, "iso_c")["w"])
    torch.testing.assert_close(merged, torch.tensor([1.0, 1, 0]) * values.sum() / 2, rtol=1e-5, atol=1e-5)
    assert_near(merge_task_vectors(task_vectors, "tsv"), {"w": plain_tsv(list(MATRICES.double()))}, 1e-5)
    for matrix in MATRICES:
        torch.testing.assert_close(merge_task_vectors({"t": {"w": matrix}}, "tsv")["w"], matrix)
        merged = torch.linalg.svdvals(merge_task_vectors({"t": {"w": matrix}}, "iso_c")["w"])  # of full rank
        torch.testing.assert_close(merged, torch.linalg.svdvals(matrix).mean().expand(3))


# ---- what every method promises --------------------------------------------------------------------------------------


def test_registry(method):
    function, paper, per_task, *_ = MERGING_METHODS[method]
    assert paper.startswith("https://") and (paper in function.__doc__)
    merged = merge_task_vectors(random_task_vectors(tasks_of(method)), method)
    assert set(merged) == (set(tasks_of(method)) if per_task else set(SHAPES))
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in leaves(merged).values())


def test_inputs_stay_as_they_are(method):
    task_vectors = random_task_vectors(tasks_of(method))
    before = copy.deepcopy(task_vectors)
    merged = merge_task_vectors(task_vectors, method)
    for tensor in leaves(merged).values():
        tensor.add_(1)  # no view of an input either
    assert_same(task_vectors, before)


def test_order_of_tasks_and_of_tensors_changes_no_bit(method):
    task_vectors = random_task_vectors(tasks_of(method))
    merged = merge_task_vectors(task_vectors, method)
    reverse = {task: dict(reversed(tensors.items())) for task, tensors in reversed(task_vectors.items())}
    if method == "slerp":
        assert_same(merge_task_vectors(reverse, method, t=0.75), merge_task_vectors(task_vectors, method, t=0.25))
    if method in ("lines", "emr"):  # sums over tensors, in float64
        assert_near(merge_task_vectors(reverse, method), merged, 1e-7)
        reverse = dict(reversed(task_vectors.items()))
    assert_same(merge_task_vectors(reverse, method), merged)


def test_one_task_alone_is_its_expert(method):
    tensors = random_task_vectors(["only"])["only"]
    if method in ONE_TASK:
        merged = merge_task_vectors({"only": tensors}, method, **ONE_TASK[method])
        assert_near(merged, {"only": tensors} if MERGING_METHODS[method].per_task else tensors)
    elif method == "slerp":
        with pytest.raises(ValueError, match="two tasks and got 1"):
            merge_task_vectors({"only": tensors}, method)
    else:
        assert method in ("iso_c", "iso_cts")  # one spectrum for all, by design


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_accumulated_in_float32(method, dtype):
    task_vectors = {
        task: {name: tensor.to(dtype) for name, tensor in tensors.items()}
        for task, tensors in random_task_vectors(tasks_of(method)).items()
    }
    wide = {task: {name: tensor.float() for name, tensor in own.items()} for task, own in task_vectors.items()}
    assert_same(merge_task_vectors(task_vectors, method), merge_task_vectors(wide, method))


def test_zero_and_equal_task_vectors(method):
    """Frozen tensors give no NaN, and what no task changed stays so."""
    task_vectors = random_task_vectors(tasks_of(method))
    for tensors in task_vectors.values():
        tensors["layers.0.weight"] = torch.zeros(6, 5)
        tensors["layers.1.weight"] = torch.ones(4, 6)
    zeros = {task: {name: torch.zeros_like(t) for name, t in own.items()} for task, own in task_vectors.items()}
    merged = leaves(merge_task_vectors(task_vectors, method))
    assert all(t.isfinite().all() for t in merged.values())
    assert not any(t.any() for key, t in merged.items() if "layers.0.weight" in key)
    assert not any(t.any() for t in leaves(merge_task_vectors(zeros, method)).values())


def test_unknown_names_and_bad_arguments(method):
    task_vectors = random_task_vectors(tasks_of(method))
    with pytest.raises(ValueError, match=f"'{method}' has no argument `weights`; it takes"):
        merge_task_vectors(task_vectors, method, weights=1)
    for kwargs in BAD_ARGUMENTS.get(method, ()):
        ((name, value),) = kwargs.items()
        with pytest.raises(ValueError, match=f"`{name}` is {re.escape(repr(value))}.*(give|choose|Give)"):
            merge_task_vectors(task_vectors, method, **kwargs)


def test_what_cannot_be_merged():
    task_vectors = random_task_vectors(["a", "b"])
    with pytest.raises(ValueError, match="no merging method 'tie'; there are average, task_arithmetic, ties"):
        merge_task_vectors(task_vectors, "tie")
    with pytest.raises(ValueError, match="is empty"):
        merge_task_vectors({})
    for tensor, problem in (
        (torch.ones(2), r"'b': 'logit_scale' has shape \(2,\), in 'a' it has \(\)"),
        (torch.tensor(float("nan")), "'b': 'logit_scale' has NaN or Inf"),
        (torch.tensor(1), "'b': 'logit_scale' has the type torch.int64"),
    ):
        task_vectors["b"]["logit_scale"] = tensor
        with pytest.raises(ValueError, match=problem):
            merge_task_vectors(task_vectors)
    del task_vectors["b"]["logit_scale"]
    with pytest.raises(ValueError, match="'logit_scale' is in one of 'a' and 'b' only"):
        merge_task_vectors(task_vectors)


# ---- single methods --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_threshold_is_exact(dtype):
    tensors = [torch.randn(50, 7).to(dtype), torch.zeros(30), 1e-40 * torch.randn(9), torch.tensor(3.0), torch.randn(0)]
    tensors.append((100 * torch.randn(200)).to(dtype))
    magnitudes = torch.cat([t.float().flatten() for t in tensors]).abs()
    for density in (0.001, 0.1, 0.5, 0.9, 0.93, 0.949, 0.96, 0.999):
        smallest = magnitudes.kthvalue(len(magnitudes) - int(density * len(magnitudes)))[0]
        assert threshold_bits(tensors, density) == smallest.view(torch.int32).item()
    assert threshold_bits(tensors, 1) == 0


def test_ties_zero_sums_take_the_majority_over_all_tensors():
    a = {"x": torch.tensor([1.0, -1.0]), "y": torch.tensor([2.0, 3.0])}
    b = {"x": torch.tensor([-1.0, 1.0]), "y": torch.tensor([2.0, 3.0])}
    merged = merge_task_vectors({"a": a, "b": b}, "ties", density=1.0, aggregate="sum")
    assert merged["x"].tolist() == [1, 1] and merged["y"].tolist() == [4, 6]
    minus = [{name: -tensor for name, tensor in own.items()} for own in (a, b)]
    merged = merge_task_vectors({"a": minus[0], "b": minus[1]}, "ties", density=1.0, aggregate="sum")
    assert merged["x"].tolist() == [-1, -1]


@pytest.mark.parametrize("method", ["dare", "dare_ties"])
def test_dare_is_the_same_on_any_day(method):
    task_vectors = {task: {"x": torch.ones(300, 400), "y": torch.ones(7)} for task in ("a", "b")}
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            torch.manual_seed(count)
            state = torch.get_rng_state()
            results.append(merge_task_vectors(task_vectors, method, density=0.3))
            assert torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_num_threads(threads)
    assert_same(*results)
    # the very draws, which no release of ours may change
    x = merge_task_vectors({"a": task_vectors["a"]}, "dare", density=0.3)["x"]
    assert (x > 0).sum().item() == 35950
    other = [
        merge_task_vectors({task: {name: torch.ones(300, 400)}}, method, density=0.3, seed=seed)[name] > 0
        for task, name, seed in (("a", "x", 0), ("b", "x", 0), ("a", "z", 0), ("a", "x", 1))
    ]
    for i, mask in enumerate(other):
        for another in other[:i]:  # independent of one another: they agree at random
            assert abs((mask == another).double().mean() - 0.58) < 0.01


def test_dare_keeps_the_expectation():
    tensors = random_task_vectors(["a", "b"])
    expected = merge_task_vectors(tensors)
    total = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for seed in range(2000):
        for name, tensor in merge_task_vectors(tensors, "dare", density=0.5, seed=seed).items():
            total[name] += tensor / 2000
    for name, tensor in total.items():
        # the deviation of a mean of 2000 draws, x sqrt((1 - p) / p / 2000), is 0.022 x
        bound = 5 * 0.0224 * (tensors["a"][name].square() + tensors["b"][name].square()).sqrt()
        assert ((tensor - expected[name]).abs() <= bound).all()


@pytest.mark.parametrize("rank, noise", [(8, 0), (8, 1e-5), (100, 0)])
def test_svd_of_low_rank(rank, noise):
    """A matrix of low rank is decomposed in its range, with the triplets of the whole; so is none of higher rank."""
    matrix = torch.randn(300, rank) @ torch.logspace(0, -3, rank).diag() @ torch.randn(rank, 400)
    matrix += noise * torch.randn(300, 400)
    u, s, vh = svd(matrix)
    assert s.shape == (rank,)
    torch.testing.assert_close(
        s, torch.linalg.svdvals(matrix.double())[:rank].float(), rtol=1e-5, atol=1e-5 * s[0].item()
    )
    torch.testing.assert_close(u * s @ vh, matrix, rtol=0, atol=1e-5 * s[0].item())
    for vectors in (u.t() @ u, vh @ vh.t()):
        torch.testing.assert_close(vectors, torch.eye(rank), rtol=0, atol=1e-5)


def lora_like(tasks, rank=2, shape=(24, 16)):
    return {task: {"w": torch.randn(shape[0], rank) @ torch.randn(rank, shape[1])} for task in tasks}


@pytest.mark.parametrize("method", ["tsv", "iso_c", "iso_cts"])
def test_singular_vectors_of_zero_do_not_count(method):
    """The result of low-rank task vectors is decided by them and not by rounding, and is as low in rank."""
    task_vectors = lora_like(["a", "b", "c"])
    merged = merge_task_vectors(task_vectors, method)["w"]
    noisy = {task: {"w": t["w"] + 1e-7 * torch.randn(24, 16)} for task, t in task_vectors.items()}
    torch.testing.assert_close(merge_task_vectors(noisy, method)["w"], merged, rtol=1e-4, atol=1e-4)
    assert torch.linalg.matrix_rank(merged, rtol=1e-5) == 6
    if method != "tsv":
        values = torch.linalg.svdvals(merged)[:6]
        torch.testing.assert_close(values, values.mean().expand(6), rtol=1e-3, atol=0)


def test_tsv_of_equal_experts_is_the_expert_truncated():
    matrix = torch.randn(6, 6)
    u, s, vh = torch.linalg.svd(matrix)
    merged = merge_task_vectors({"a": {"w": matrix}, "b": {"w": matrix}}, "tsv")["w"]
    torch.testing.assert_close(merged, u[:, :3] * s[:3] @ vh[:3], rtol=1e-4, atol=1e-5)


def test_tsv_loses_no_thin_tensor():
    task_vectors = {task: {"w": torch.randn(1, 8)} for task in "abc"}
    assert merge_task_vectors(task_vectors, "tsv")["w"].norm() > 0.1


def test_wudi_reduces_interference_and_leaves_lone_changes():
    task_vectors = {task: {"w": 0.01 * torch.randn(12, 10), "alone": torch.zeros(4, 4)} for task in "abc"}
    task_vectors["b"]["alone"] = 0.01 * torch.randn(4, 4)
    merged = merge_task_vectors(task_vectors, "wudi")
    matrices = [own["w"] for own in task_vectors.values()]
    assert wudi_loss(merged["w"], matrices) < 0.9 * wudi_loss(sum(matrices), matrices)
    assert torch.equal(merged["alone"], task_vectors["b"]["alone"])


def test_slerp_ends_and_special_angles():
    x, y = torch.randn(5, 5), torch.randn(5, 5)
    pair = {"first": {"w": x}, "a_second": {"w": y}}
    assert_near(merge_task_vectors(pair, "slerp", t=0), {"w": x})
    assert_near(merge_task_vectors(pair, "slerp", t=1), {"w": y})
    for other in (2 * x, -3 * x, torch.zeros(5, 5)):
        assert_near(
            merge_task_vectors({"a": {"w": x}, "b": {"w": other}}, "slerp", t=0.25), {"w": 0.75 * x + 0.25 * other}
        )
    with pytest.raises(ValueError, match="two tasks and got 3; `karcher` takes any number"):
        merge_task_vectors(random_task_vectors("abc"), "slerp")


def test_karcher_is_on_the_sphere_and_between_two_is_slerp():
    x, y = torch.randn(5, 5), torch.randn(5, 5)
    y *= x.norm() / y.norm()
    pair = {"a": {"w": x}, "b": {"w": y}}
    assert_near(merge_task_vectors(pair, "karcher"), merge_task_vectors(pair, "slerp"))
    task_vectors = {str(i): {"w": torch.randn(5, 5)} for i in range(6)}
    norms = torch.stack([own["w"].norm() for own in task_vectors.values()])
    torch.testing.assert_close(merge_task_vectors(task_vectors, "karcher")["w"].norm(), norms.mean())
    opposite = {"a": {"w": x}, "b": {"w": -x}, "c": {"w": torch.zeros(5, 5)}}
    assert merge_task_vectors(opposite, "karcher")["w"].norm() < 1e-6


@pytest.mark.parametrize("method", ["karcher", "slerp"])
def test_norms_of_large_tensors(method):
    """A sum in float32 of so many entries would be off by 1e-3."""
    x = torch.randn(2**24)
    both = {"a": {"w": x}, "b": {"w": x}}
    merged = merge_task_vectors(both, method)["w"]
    assert ((merged - x).double().norm() / x.double().norm()) < 1e-6


# ---- models ----------------------------------------------------------------------------------------------------------


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model, before):
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    "name", ["bert", "segformer", "llama_tied", "gpt2_classifier", "conv_net", "recurrent", "holders"]
)
def test_merged_models(name):
    """Every tensor is accounted for: merged, the head, or a buffer; in one model and in one for each task."""
    architecture = ARCHITECTURES[name]
    base = architecture.build()
    tasks = dict(zip("abc", architecture.classes, strict=True)) if architecture.has_head else list("abc")
    experts = make_experts(base, tasks)
    befores = [snapshot(model) for model in (base, *experts.values())]
    if architecture.has_head:
        with pytest.warns(UserWarning, match="differs from the base's in shape"):
            merged = merge(base, experts, "task_arithmetic", scale=0.3)
    else:
        merged = merge(base, experts, "task_arithmetic", scale=0.3)
    models = merge(base, experts, "emr", scale=0.9)
    assert all(unchanged(model, before) for model, before in zip((base, *experts.values()), befores, strict=True))
    assert type(merged) is type(base) and list(models) == list("abc")
    output(merged, architecture.inputs)
    states = {task: expert.state_dict() for task, expert in experts.items()}
    parameters = dict(base.named_parameters(remove_duplicate=False))
    head = {n for n in parameters if any(states[t][n].shape != parameters[n].shape for t in states)}
    head = {n for n in parameters if n.split(".")[0] in {h.split(".")[0] for h in head}}
    assert bool(head) == architecture.has_head
    vectors = {
        task: {n: state[n] - p.detach() for n, p in base.named_parameters() if n not in head}
        for task, state in states.items()
    }
    expected, own = PLAIN["task_arithmetic"](vectors), PLAIN["emr"](vectors)
    state, originals = merged.state_dict(), dict(merged.named_parameters())
    for n, tensor in base.state_dict().items():
        if n in originals and n not in head:
            assert not torch.equal(state[n], tensor)
            torch.testing.assert_close(state[n].double(), tensor + 0.3 * expected[n], rtol=1e-6, atol=1e-6)
        elif n not in parameters or n in head:
            assert torch.equal(state[n], tensor)
    for task, model in models.items():
        wanted = copy.deepcopy(experts[task])
        with torch.no_grad():
            for n, p in wanted.named_parameters():
                if n not in head:
                    p.copy_(parameters[n] + 0.9 * own[task][n])
        torch.testing.assert_close(
            output(model, architecture.inputs), output(wanted, architecture.inputs), rtol=1e-4, atol=1e-4
        )
        if hasattr(base, "config"):
            assert model.config.id2label == experts[task].config.id2label
            assert model.config.num_labels == experts[task].config.num_labels
    if name == "llama_tied":
        assert merged.lm_head.weight is merged.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["bert_mlm", "conv_net", "llama_tied", "plain_transformer"])
def test_one_expert_is_itself(name):
    base = ARCHITECTURES[name].build()
    expert = make_experts(base, ["only"])["only"]
    for source in (expert, expert.state_dict()):
        merged = merge(base, {"only": source}, "task_arithmetic")
        inputs = ARCHITECTURES[name].inputs
        torch.testing.assert_close(output(merged, inputs), output(expert, inputs), rtol=1e-4, atol=1e-5)


def test_equal_heads_are_merged_and_folders_loaded(bert):
    folder, experts = bert
    base = ARCHITECTURES["bert"].make().from_pretrained(folder)
    twin = merge(base, {"a": experts["a"]}, "average")  # both have two classes
    torch.testing.assert_close(twin.state_dict(), type(base).from_pretrained(experts["a"]).state_dict())
    models = merge(base, experts, "tall_masks")
    for task, source in experts.items():
        expert = type(base).from_pretrained(source)
        assert torch.equal(models[task].classifier.weight, expert.classifier.weight)
        assert models[task].config.id2label == expert.config.id2label


LORA = {
    "plain": LoraConfig(r=4, target_modules=["query", "value"], task_type=TaskType.SEQ_CLS),
    "embedding": LoraConfig(r=2, use_rslora=True, target_modules=["word_embeddings", "query"]),
    "head": LoraConfig(r=2, target_modules=["query", "classifier"]),
    "dora": LoraConfig(r=2, use_dora=True, target_modules=["query"]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_experts_count_by_their_deltas(dtype):
    base = ARCHITECTURES["bert"].build(num_labels=3)
    adapters = {kind: make_adapter(base, config, seed) for seed, (kind, config) in enumerate(LORA.items())}
    full = {task: copy.deepcopy(adapter).merge_and_unload() for task, adapter in adapters.items()}
    before = [snapshot(adapter) for adapter in adapters.values()]
    base, adapters = base.to(dtype), {task: adapter.to(dtype) for task, adapter in adapters.items()}
    before = [snapshot(adapter) for adapter in adapters.values()]
    merged = merge(base, {**adapters}, "task_arithmetic", scale=0.5)
    models = merge(base, {**adapters}, "emr")
    assert all(unchanged(adapter, b) for adapter, b in zip(adapters.values(), before, strict=True))
    for n, p in base.named_parameters():
        expected = p.double() + 0.5 * sum((f.state_dict()[n].double() - p.double()) for f in full.values())
        if dtype == torch.float32:
            torch.testing.assert_close(merged.state_dict()[n].double(), expected, rtol=1e-5, atol=1e-5)
        assert merged.state_dict()[n].dtype == dtype
    for task, model in models.items():
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
        torch.testing.assert_close(model.classifier.weight.float(), full[task].classifier.weight.float(), **tolerance)


def test_low_precision_models_are_rounded_once():
    base = ARCHITECTURES["conv_net"].build()
    experts = {task: model.bfloat16() for task, model in make_experts(base, list("abcd")).items()}
    base = base.bfloat16()
    merged = merge(base, experts, "task_arithmetic", scale=0.3)
    for name, parameter in base.named_parameters():
        change = sum(e.get_parameter(name).double() - parameter.double() for e in experts.values())
        exact = (parameter.double() + 0.3 * change).bfloat16()
        assert (merged.get_parameter(name) != exact).double().mean() < 0.02


def test_models_that_cannot_be_merged():
    base = ARCHITECTURES["bert"].build(num_labels=3)
    expert = make_experts(base, ["a"])["a"]
    with pytest.raises(ValueError, match="no merging method 'tie'; there are"):
        merge(base, {"a": "a folder that is never looked at"}, "tie")
    with pytest.raises(ValueError, match="'ties' has no argument `densty`; it takes `density`, `aggregate`"):
        merge(base, {"a": "a folder that is never looked at"}, densty=0.2)
    with pytest.raises(ValueError, match=r"`experts` is \{\}; give"):
        merge(base, {})
    with pytest.raises(ValueError, match="has an adapter; give the model without it"):
        merge(make_adapter(base, LORA["plain"]), {"a": expert})
    with pytest.raises(ValueError, match="is quantised"):
        broken = copy.deepcopy(base)
        broken.bert.pooler.dense.weight = torch.nn.Parameter(torch.ones(16, 16, dtype=torch.int8), requires_grad=False)
        merge(broken, {"a": expert})
    with pytest.raises(ValueError, match=r"is out of torch.float16's range"):
        merge(copy.deepcopy(base).half(), {"a": expert}, scale=1e7, density=1.0)
    expert.bert.pooler.dense.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'a': 'bert.pooler.dense.weight' has 1 NaN or Inf"):
        merge(base, {"a": expert})
    convolutions = ARCHITECTURES["conv_net"].build()
    tensors = {**convolutions.state_dict(), "fc.bias": torch.zeros(7)}
    with pytest.raises(ValueError, match=r"'a': 'fc.bias' has shape \(7,\)"):
        merge(convolutions, {"a": tensors})


def test_buffers_must_be_the_bases():
    base = ARCHITECTURES["segformer"].build()
    expert = copy.deepcopy(base)
    name = next(name for name, buffer in expert.named_buffers() if "running_mean" in name)
    expert.get_buffer(name).add_(1)
    with pytest.raises(ValueError, match=f"'a': the buffer '{name}' differs"):
        merge(base, {"a": expert}, "average")
    models = merge(base, {"a": expert}, "emr")  # in the head, which is the task's own
    assert torch.equal(models["a"].get_buffer(name), expert.get_buffer(name))


PARTS = [*((name, {}) for name, known in MERGING_METHODS.items() if known.parts), ("tsv", {"untruncated": "embed"})]


@pytest.mark.parametrize(("method", "kwargs"), PARTS)
def test_parts_sum_to_the_merge(method, kwargs):
    """And each is of its own task: what a task did not change is not in its part."""
    task_vectors = random_task_vectors("abc")
    parts = transform_task_vectors(task_vectors, method, **kwargs)
    whole = merge_task_vectors(task_vectors, method, **({"aggregate": "sum"} if method == "ties" else kwargs))
    assert parts.keys() == task_vectors.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts.values()), tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("method", [name for name, known in MERGING_METHODS.items() if known.parts])
@torch.no_grad()
def test_transform_of_a_tint(bert, tmp_path, method):
    base, folders = bert
    load = T.AutoModelForSequenceClassification.from_pretrained
    experts = {}
    for task in ("a", "score", "b"):
        expert = load(folders[task])
        expert.bert.embeddings.load_state_dict(load(base).bert.embeddings.state_dict())  # frozen, and counts as zeros
        expert.save_pretrained(tmp_path / task)
        experts[task] = str(tmp_path / task)
    model = get_peft_model(load(base), TintConfig(experts=experts, transform=method)).eval()
    plain = get_peft_model(load(base), TintConfig(experts=experts)).eval()
    model.set_coefficients(1.0)
    tensors = {task: load(folder).state_dict() for task, folder in experts.items()}
    before = load(base).state_dict()
    names = [name for name in before if not name.startswith("classifier")]
    task_vectors = {task: {name: own[name] - before[name] for name in names} for task, own in tensors.items()}
    wanted = merge_task_vectors(task_vectors, method, **({"aggregate": "sum"} if method == "ties" else {}))
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    for name, change in wanted.items():
        torch.testing.assert_close(merged[name], before[name] + change, rtol=1e-5, atol=1e-5, msg=name)
    for task in experts:  # and so are the pseudo-labels
        with model.expert(task), plain.expert(task):
            torch.testing.assert_close(model(**IDS).logits, plain(**IDS).logits, rtol=1e-5, atol=1e-5)
        assert model.expert_fingerprint(task) == plain.expert_fingerprint(task)
    model.save_pretrained(tmp_path / "tint")
    again = PeftModel.from_pretrained(load(base), tmp_path / "tint").eval()
    assert torch.equal(again(**IDS).logits, model(**IDS).logits)


def test_transforms_that_are_none():
    with pytest.raises(ValueError, match="The transform 'slerp' is not one of ties, dare, "):
        TintConfig(experts={"a": "x"}, transform="slerp")
    with pytest.raises(ValueError, match="'ties' has no argument `densty`; it takes `density`"):
        TintConfig(experts={"a": "x"}, transform="ties", transform_kwargs={"densty": 0.2})
    with pytest.raises(ValueError, match="name the `transform`"):
        TintConfig(experts={"a": "x"}, transform_kwargs={"density": 0.2})
