"""Checkpoints of a training, from which it goes on as if it had never stopped.

A checkpoint is a folder `checkpoint-STEP` with the adapter and, beside it, what else goes on: tensors, all other state,
and the random states of each process. None of it is a pickle, as `Accelerator.save_state` would write. The folder is
there only when all of it is on disk.
"""

import json
import os
import random
import re
from contextlib import contextmanager

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .._files import sha256_of
from ..checkpoints import remove_folder, remove_incomplete

TENSORS, STATE, RANDOM = "trainer_state.safetensors", "trainer_state.json", "random_states.json"


def checkpoints(output_dir: str) -> dict[int, str]:
    """{step: folder} of the checkpoints in a folder, in the order of their steps."""
    names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    steps = sorted(int(name.removeprefix("checkpoint-")) for name in names if re.fullmatch(r"checkpoint-\d+", name))
    return {step: os.path.join(output_dir, f"checkpoint-{step}") for step in steps}


def find_checkpoint(resume: bool | str | os.PathLike | None, output_dir: str) -> str | None:
    """The folder to resume from: the last checkpoint in `output_dir` for True, None for None or False."""
    if resume == "":
        raise ValueError("`resume_from_checkpoint` is ''; give a folder, True for the last checkpoint, or None.")
    if not resume:
        return None
    if resume is not True:
        return os.fspath(resume)
    if not (found := checkpoints(output_dir)):
        raise ValueError(f"There is no checkpoint in {output_dir!r}; start anew with `resume_from_checkpoint=None`.")
    return list(found.values())[-1]


def check_output_dir(output_dir: str, step: int) -> None:
    """Raises ValueError for checkpoints later than `step`, which would be mixed with those of a training from there."""
    for later, folder in checkpoints(output_dir).items():
        if later > step:
            raise ValueError(
                f"{folder!r} is of a training that came further than step {step}, where this one starts. Go on from it "
                "by `resume_from_checkpoint=True`, remove it, or give another `output_dir`."
            )


def remove_old_checkpoints(output_dir: str, limit: int | None) -> None:
    """Removes all but the last `limit` checkpoints, and what a killed process has left of one."""
    remove_incomplete(output_dir, "checkpoint-")
    for folder in list(checkpoints(output_dir).values())[:-limit] if limit else []:
        remove_folder(folder)


def write_state(folder: str, tensors: dict[str, dict[str, torch.Tensor]], state: dict, random_states: list) -> None:
    """`tensors` are {kind: {name: tensor}}; `random_states` has one entry a process. The state has a sum of all."""
    flat = {f"{kind}/{name}": value.detach().cpu() for kind, named in tensors.items() for name, value in named.items()}
    # copies, for what two names share safetensors refuses
    flat = {key: value.clone(memory_format=torch.contiguous_format) for key, value in flat.items()}
    save_file(flat, os.path.join(folder, TENSORS))
    with open(os.path.join(folder, RANDOM), "w", encoding="utf-8") as file:
        json.dump(random_states, file)
    state = json.loads(json.dumps(state, default=float))  # metrics may be NumPy's
    with open(os.path.join(folder, STATE), "w", encoding="utf-8") as file:
        json.dump({**state, "sha256": _sum(folder, state)}, file, indent=1)


def _sum(folder, state):
    return sha256_of((os.path.join(folder, file) for file in (TENSORS, RANDOM)), json.dumps(state).encode())


def read_state(folder: str) -> tuple[dict[str, dict[str, torch.Tensor]], dict, list]:
    """What `write_state` wrote. Raises ValueError for a folder that is no whole checkpoint, to the last bit."""
    try:
        flat, contents = load_file(os.path.join(folder, TENSORS)), []
        for file in (STATE, RANDOM):
            with open(os.path.join(folder, file), encoding="utf-8") as opened:
                contents.append(json.load(opened))
        if contents[0].pop("sha256") != _sum(folder, contents[0]):
            raise ValueError("its files have been changed")
    except (OSError, ValueError, SafetensorError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder!r} is no whole checkpoint of TintTrainer ({error}). Resume from another, or start anew."
        ) from error
    tensors = {}
    for key, value in flat.items():
        kind, _, name = key.partition("/")
        tensors.setdefault(kind, {})[name] = value
    return tensors, *contents


def check_settings(folder: str, saved: dict, settings: dict, tensors: dict, parameters: dict) -> None:
    """Raises ValueError where a checkpoint is of another training, or of another model."""
    for name, value in settings.items():
        if saved.get(name) != value:
            before = repr(saved[name]) if name in saved else "a version that did not know it"
            raise ValueError(
                f"{name} is {value!r}, and {folder!r} was made with {before}. Resume with the same, or start anew."
            )
    ours, theirs = ({name: value.shape for name, value in own.items()} for own in (parameters, tensors))
    for name in ours.keys() | theirs.keys():
        if ours.get(name) != theirs.get(name):
            raise ValueError(f"{folder!r} is of another model: they differ in {name!r}.")


def random_state() -> dict:
    """The states of Python's, NumPy's and torch's generators, as JSON has them."""
    return {
        "python": random.getstate(),
        "numpy": [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        "torch": torch.get_rng_state().tolist(),
        "cuda": [state.tolist() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


@contextmanager
def kept_random_state():
    """What draws at random in this context leaves the generators as they were."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


def set_random_state(state: dict) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all([torch.tensor(values, dtype=torch.uint8) for values in state["cuda"]])
