"""A process that is killed while it writes leaves what was there or what is new, and it loads: no mix, no ruin."""

import copy
import itertools
import os
import random
import shutil
import signal
import time
import timeit

import pytest
import torch
from models import ARCHITECTURES, make_experts
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from peft_tint import DtsConfig, TintConfig, merge_checkpoints
from peft_tint.checkpoints import INCOMPLETE

# Python 3.12, of threads that the child does not use
pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are copied by fork"),
    pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning"),
]
KILLS = 20  # of each kind
CONFIG = "adapter_config.json"


def in_a_copy(write) -> int:
    """Runs a function in a copy of this process. Returns the id of the process."""
    process = os.fork()
    if process == 0:
        try:
            write()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return process


def killed_after(seconds, write) -> None:
    process = in_a_copy(write)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) in (-signal.SIGKILL, 0)


def killed_before(number, write) -> bool:
    """Kills before the call of this number that puts something onto the disk for good. False if there are fewer."""

    def count_and_kill():
        calls = itertools.count()
        for name in ("fsync", "rename", "replace"):
            setattr(os, name, dying(getattr(os, name), calls))
        write()

    def dying(function, calls):
        def call(*args):
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        return call

    code = os.waitstatus_to_exitcode(os.waitpid(in_a_copy(count_and_kill), 0)[1])
    assert code in (-signal.SIGKILL, 0)
    return code != 0


@pytest.fixture(scope="module")
def base():
    return ARCHITECTURES["bert"].build(num_hidden_layers=1, vocab_size=16, max_position_embeddings=8)


@pytest.fixture(scope="module")
def experts(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    base.save_pretrained(folder / "base")
    for task, expert in make_experts(base, {"b": 2, "a": 2}).items():
        expert.save_pretrained(folder / task)
    return folder


# ---- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["tint", "packed", "dts"])
def model(request, base, experts):
    sources = {task: str(experts / task) for task in ("b", "a")}
    packed = {"save_experts": "dts", "save_experts_kwargs": {"rank_ratio": 0.3}} if request.param == "packed" else {}
    tint = request.param != "dts"
    config = TintConfig(experts=sources, **packed) if tint else DtsConfig(expert=sources["b"], rank_ratio=0.3)
    return get_peft_model(copy.deepcopy(base), config)


def numbers(model):
    """The tensors of an adapter that `put` changes."""
    kinds = ("tint_coefficients", "modules_to_save", "dts_head")
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    return [tensor for name, tensor in named if any(kind in name for kind in kinds)]


def put(model, state):
    """Makes all numbers of an adapter, and those of its settings that change nothing here, those of a state."""
    config = model.peft_config["default"]
    for tensor in numbers(model):
        tensor.data.fill_(state / 2**12)
    config.coefficient_bounds, config.budget = [-state / 2**12, 1.0], state / 2**12


def state_of(base, folder):
    """The state that was saved."""
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    config = vars(model.peft_config["default"])
    settings = [config["budget"]] if "budget" in config else [-config["coefficient_bounds"][0]]
    (value,) = {*settings, *(value for tensor in numbers(model) for value in tensor.unique().tolist())}
    return int(value * 2**12)


def test_adapters_saved_over_one_another(base, model, tmp_path):
    def save_on():
        for state in itertools.count(last + 1):
            put(model, state)
            model.save_pretrained(tmp_path)

    rng, last, found = random.Random(0), 1, []
    put(model, last)
    model.save_pretrained(tmp_path)
    seconds = timeit.timeit(lambda: os.waitpid(in_a_copy(lambda: model.save_pretrained(tmp_path)), 0), number=1)
    for _ in range(KILLS):
        killed_after(rng.uniform(0, 3 * seconds), save_on)
        found.append(state_of(base, tmp_path))
        assert found[-1] >= last
        last = found[-1]
    assert len({*found}) > KILLS / 4  # it did write
    put(model, last + 1)
    model.save_pretrained(tmp_path)
    assert state_of(base, tmp_path) == last + 1
    assert set(os.listdir(tmp_path)) >= {"adapter_model.safetensors", CONFIG, "README.md"}


def test_adapters_at_each_step(base, model, tmp_path):
    found = []
    put(model, 1)
    model.save_pretrained(tmp_path)
    put(model, 2)
    while killed_before(len(found), lambda: model.save_pretrained(tmp_path)):
        found.append(state_of(base, tmp_path))
    assert found == sorted(found) and set(found) == {1, 2} and state_of(base, tmp_path) == 2


@pytest.mark.parametrize("model", ["dts"], indirect=True)
def test_saving_after_one_that_was_killed(base, model, tmp_path):
    """At each step of the first, each step of the second."""
    for first in itertools.count():
        for second in itertools.count():
            put(model, 1)
            model.save_pretrained(tmp_path)
            put(model, 2)
            if not killed_before(first, lambda: model.save_pretrained(tmp_path)):
                assert first > 5
                return
            before = state_of(base, tmp_path)
            put(model, 3)
            is_killed = killed_before(second, lambda: model.save_pretrained(tmp_path))
            assert state_of(base, tmp_path) in ((before, 3) if is_killed else (3,))
            if not is_killed:
                break


def test_the_first_saving(base, model, tmp_path):
    put(model, 1)
    for number in itertools.count():
        is_killed = killed_before(number, lambda: model.save_pretrained(tmp_path))
        assert not is_killed or not (tmp_path / CONFIG).exists() or state_of(base, tmp_path) == 1
        if not is_killed:
            break
    assert number > 3 and state_of(base, tmp_path) == 1


# ---- merged folders --------------------------------------------------------------------------------------------------


def is_whole(folder):
    """Whether a merged folder is there; and if it is, all of it."""
    if not folder.exists() or all(name.startswith(INCOMPLETE) for name in os.listdir(folder)):
        return False
    _, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert all(
        torch.isfinite(tensor).all() for file in folder.glob("*.safetensors") for tensor in load_file(file).values()
    )
    return True


@pytest.fixture(params=["absent", "empty"])
def merge_to(request, experts, tmp_path):
    """A folder, and what merges experts to it."""
    folder = tmp_path / "out"
    if request.param == "empty":
        folder.mkdir()
    sources = {task: experts / task for task in ("b", "a")}
    return folder, lambda: merge_checkpoints(experts / "base", sources, "average", folder, "5KB")


def test_merging_at_each_step(merge_to):
    folder, merge = merge_to
    for number in itertools.count():
        if not killed_before(number, merge) or is_whole(folder):
            break
    assert number > 5 and is_whole(folder)


def test_merging_at_any_time(merge_to):
    folder, merge = merge_to
    rng, kills, was_there = random.Random(0), 0, folder.exists()
    seconds = timeit.timeit(merge, number=1)
    for _ in range(KILLS):
        shutil.rmtree(folder)
        if was_there:
            folder.mkdir()
        killed_after(rng.uniform(0, seconds), merge)
        if not is_whole(folder):
            kills += 1
            merge()
        assert is_whole(folder)
    assert kills


def test_merging_to_the_working_directory(experts, tmp_path, monkeypatch):
    """Which has to stay, so files are moved one by one, and that by which it is a model is the last."""
    monkeypatch.chdir(tmp_path)

    def merge():
        merge_checkpoints(experts / "base", {"a": experts / "a"}, "average", ".", "5KB")

    for number in itertools.count():
        assert killed_before(number, merge)
        names = [name for name in os.listdir() if not name.startswith(INCOMPLETE)]
        assert "config.json" not in names
        if names:
            break  # what was moved is in the way, and the next run says so
    with pytest.raises(ValueError, match="exists already; give a new or empty folder"):
        merge()
    for name in names:
        os.unlink(name)
    merge()
    assert is_whole(tmp_path)
