"""Triton kernels that merge all weights of a model, and compute all its coefficients' gradients, by one launch each.

A unit is one weight with its task vectors. Tables have an entry a unit, or one a block of `BLOCK` entries of a unit;
where a tensor lies is an int64 of the tables, since a launch takes no lists of tensors. Sums are in float32.
"""

import triton
import triton.language as tl

BLOCK = 2048
PARTS = 64  # of a row's blocks that are summed at a time


@triton.jit
def merge_kernel(
    merged_of,
    weight_of,
    vectors_of,  # (rows, entries) of a unit
    entries_of,
    rows_of,  # how many of the tasks changed the unit
    task_of,  # (units, TASKS), of each of its rows
    coefficient_of,  # which row of the coefficients is a unit's
    coefficients,  # (rows, TASKS), float32
    unit_of,  # of each block
    start_of,
    TASKS: tl.constexpr,
    WEIGHT: tl.constexpr,
    VECTORS: tl.constexpr,
    ALIGNED: tl.constexpr,  # whether all rows begin at multiples of 16 bytes
    BLOCK: tl.constexpr,
):
    """W0 + sum_k lambda_k tau_k."""
    block = tl.program_id(0)
    unit = tl.load(unit_of + block)
    entries = tl.load(entries_of + unit)
    start = tl.load(start_of + block)
    weight = tl.load(weight_of + unit).to(tl.pointer_type(WEIGHT))
    merged = tl.load(merged_of + unit).to(tl.pointer_type(WEIGHT))
    vectors = tl.load(vectors_of + unit).to(tl.pointer_type(VECTORS))
    if ALIGNED:  # what loads and stores 16 bytes at a time
        entries, start = tl.multiple_of(entries, 16), tl.multiple_of(start, 16)
        weight, merged, vectors = tl.multiple_of(weight, 16), tl.multiple_of(merged, 16), tl.multiple_of(vectors, 16)
    coefficients += tl.load(coefficient_of + unit) * TASKS
    places = start + tl.arange(0, BLOCK)
    inside = places < entries
    total = tl.load(weight + places, mask=inside, other=0.0).to(tl.float32)
    rows = tl.load(rows_of + unit)
    for row in range(TASKS):
        task = tl.load(task_of + unit * TASKS + row)
        coefficient = tl.load(coefficients + task, mask=row < rows, other=0.0)
        vector = tl.load(vectors + row * entries + places, mask=inside & (row < rows), other=0.0)
        total += coefficient * vector.to(tl.float32)
    tl.store(merged + places, total.to(WEIGHT), mask=inside)


@triton.jit
def product_kernel(
    gradient_of,  # zero where a unit has none
    vectors_of,
    entries_of,
    rows_of,
    task_of,
    unit_of,
    start_of,
    products,  # (blocks, TASKS), float32, zeros
    TASKS: tl.constexpr,
    WEIGHT: tl.constexpr,
    VECTORS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """<dL/dW, tau_k> of each block."""
    block = tl.program_id(0)
    unit = tl.load(unit_of + block)
    place = tl.load(gradient_of + unit)
    if place != 0:
        entries = tl.load(entries_of + unit)
        start = tl.load(start_of + block)
        gradient = place.to(tl.pointer_type(WEIGHT))
        vectors = tl.load(vectors_of + unit).to(tl.pointer_type(VECTORS))
        if ALIGNED:
            entries, start = tl.multiple_of(entries, 16), tl.multiple_of(start, 16)
            gradient, vectors = tl.multiple_of(gradient, 16), tl.multiple_of(vectors, 16)
        places = start + tl.arange(0, BLOCK)
        inside = places < entries
        own = tl.load(gradient + places, mask=inside, other=0.0).to(tl.float32)
        rows = tl.load(rows_of + unit)
        for row in range(TASKS):
            vector = tl.load(vectors + row * entries + places, mask=inside & (row < rows), other=0.0).to(tl.float32)
            product = products + block * TASKS + tl.load(task_of + unit * TASKS + row)
            tl.store(product, tl.sum(own * vector), mask=row < rows)


@triton.jit
def sum_kernel(
    products,
    first_of,  # (rows + 1,): where the blocks of a row of the coefficients begin
    gradients,  # (rows, TASKS)
    TASKS: tl.constexpr,
    WIDTH: tl.constexpr,  # TASKS or the next power of two
    PARTS: tl.constexpr,
):
    """The sums over the blocks of each row, always in the same order."""
    row = tl.program_id(0)
    first, end = tl.load(first_of + row), tl.load(first_of + row + 1)
    tasks = tl.arange(0, WIDTH)
    total = tl.zeros([PARTS, WIDTH], tl.float32)
    while first < end:
        blocks = first + tl.arange(0, PARTS)
        inside = (blocks < end)[:, None] & (tasks < TASKS)[None, :]
        total += tl.load(products + blocks[:, None] * TASKS + tasks[None, :], mask=inside, other=0.0)
        first += PARTS
    tl.store(gradients + row * TASKS + tasks, tl.sum(total, 0), mask=tasks < TASKS)
