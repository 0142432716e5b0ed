"""Checkpoint folders of safetensors: opened without being loaded, and written tensor by tensor."""

import contextlib
import fnmatch
import json
import os
import shutil
import tempfile
from typing import NamedTuple

import torch
import transformers
from huggingface_hub import snapshot_download, split_state_dict_into_shards_factory
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What a model needs beside its weights. What a training left (optimizers, adapters, logs, code) is none of it.
BESIDE_WEIGHTS = (
    *("config.json", "generation_config.json", "*processor_config.json", "preprocessor_config.json"),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab*.json", "vocab*.txt", "merges.txt"),
    *("*.model", "*.tiktoken", "*.jinja", "chat_template.json"),
)
LOCAL_PATHS = ("_name_or_path", "name_or_path", "special_tokens_map_file")
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Checkpoint(NamedTuple):
    """A folder, its tensors as views of the mapped files, which take no memory of their own, and its config if any."""

    folder: str
    tensors: dict[str, torch.Tensor]
    config: PretrainedConfig | None


def open_checkpoint(who: str, source: str | os.PathLike | dict) -> Checkpoint:
    """Opens a local folder, Hub id or {"id", "revision", "subfolder"}; `who` is what errors call it.

    Raises ValueError for what is no folder of safetensors or is broken.
    """
    reference = source if isinstance(source, dict) else {"id": source}
    location, subfolder = os.fspath(reference["id"]), reference.get("subfolder") or ""
    if os.path.isdir(location):
        folder = os.path.join(location, subfolder) if subfolder else location
    else:
        folder = _download(who, location, subfolder, reference.get("revision"))
    if not os.path.isdir(folder):
        raise ValueError(f"{who}: there is no folder {folder!r}. Check `subfolder`.")
    found = sorted(os.listdir(folder))
    if "adapter_config.json" in found:
        raise ValueError(
            f"{who}: {location!r} is an adapter. Merge it into its base model first (`merge_and_unload`, "
            "`save_pretrained`), or use `peft_tint.merge`, which takes adapters and models in memory."
        )
    tensors = {}
    for file in _weight_files(who, folder, found):
        try:
            with safe_open(os.path.join(folder, file), "pt") as opened:
                tensors.update({name: opened.get_tensor(name) for name in opened.keys()})
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{who}: {file} in {folder!r} is missing or broken ({error}). Save it again.") from error
    return Checkpoint(folder, tensors, _load_config(folder) if "config.json" in found else None)


def _download(who, location, subfolder, revision):
    """The weights are named by the index, so that other copies of them in the repository are left alone."""

    def fetch(*patterns):
        patterns = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in patterns]
        return os.path.join(snapshot_download(location, revision=revision, allow_patterns=patterns), subfolder)

    try:
        folder = fetch(*BESIDE_WEIGHTS, INDEX, "adapter_config.json")
        found = os.listdir(folder) if os.path.isdir(folder) else []
        return fetch(*(_weight_files(who, folder, found) if INDEX in found else [SINGLE]))
    except (OSError, HFValidationError) as error:
        raise ValueError(
            f"{who}: {location!r} is neither a local folder nor a model that can be reached on the Hub. Check the "
            "spelling, the revision, and your access if it is private or you are offline."
        ) from error


def _weight_files(who, folder, found):
    if INDEX in found:
        with open(os.path.join(folder, INDEX), encoding="utf-8") as file:
            files = sorted(set(json.load(file)["weight_map"].values()))
        if outside := [file for file in files if os.path.basename(file) != file]:
            raise ValueError(f"{who}: the index in {folder!r} names {outside[0]!r}, which is no file beside it.")
        return files
    files = [SINGLE] if SINGLE in found else [file for file in found if file.endswith(".safetensors")]
    if len(files) != 1:
        raise ValueError(
            f"{who}: the folder {folder!r} has {len(files)} safetensors files and no {INDEX} (found {found}). Give a "
            "folder that `save_pretrained` wrote; pickled weights (.bin, .pt) are not read."
        )
    return files


def _load_config(folder):
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ValueError:  # a type of model that transformers does not know
        return PretrainedConfig.from_pretrained(folder)


def meta_model(config: PretrainedConfig | None) -> torch.nn.Module | None:
    """The model that a checkpoint is of, without weights; None if transformers has no such class."""
    names = getattr(config, "architectures", None) or [""]
    model_class = getattr(transformers, names[0], None)
    if model_class is None:
        return None
    with torch.device("meta"):
        return model_class(config)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike):
    """A temporary folder beside `path`, which takes its name when all is written and on disk, and is gone on an error.

    Raises ValueError if there is something at `path` already.
    """
    path = os.path.abspath(path)
    if os.path.exists(path) and (not os.path.isdir(path) or os.listdir(path)):
        raise ValueError(f"{path!r} exists already; give a new or empty folder.")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = tempfile.mkdtemp(prefix=f".{os.path.basename(path)}.", suffix=".incomplete", dir=os.path.dirname(path))
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())  # `mkdtemp` has made it the user's alone
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def copy_files(source: str, folder: str, dtype: torch.dtype | None) -> None:
    """Copies what a model needs beside its weights; configs without local paths, and with the weights' `dtype`."""
    for name in sorted(os.listdir(source)):
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in BESIDE_WEIGHTS):
            continue
        if not name.endswith("config.json"):
            shutil.copyfile(os.path.join(source, name), os.path.join(folder, name))
            continue
        with open(os.path.join(source, name), encoding="utf-8") as file:
            settings = {key: value for key, value in json.load(file).items() if key not in LOCAL_PATHS}
        if name == "config.json":
            settings = {key: value for key, value in settings.items() if key not in ("dtype", "torch_dtype")}
            settings |= {"dtype": str(dtype).removeprefix("torch.")} if dtype else {}
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            json.dump(settings, file, indent=2)
            file.write("\n")


class CheckpointWriter:
    """Writes tensors into the safetensors files of a folder, of at most `max_shard_size` each, as they come.

    `tensors` are {name: meta tensor} of all that will be written. Nothing is kept in memory, which `safetensors` itself
    would need to write a file. A context manager: what leaves it without an error is whole and on disk."""

    def __init__(self, folder: str, tensors: dict[str, torch.Tensor], max_shard_size: int | str):
        os.makedirs(folder, exist_ok=True)
        pattern = SINGLE.replace(".safetensors", "{suffix}.safetensors")
        size = lambda tensor: tensor.nbytes  # noqa: E731
        split = split_state_dict_into_shards_factory(
            tensors, get_storage_size=size, filename_pattern=pattern, max_shard_size=max_shard_size
        )
        self.files, self.positions, self.missing = [], {}, {name: tensor.nbytes for name, tensor in tensors.items()}
        for file, names in split.filename_to_tensors.items():
            self._start_file(os.path.join(folder, file), {name: tensors[name] for name in names})
        if split.is_sharded:
            with open(os.path.join(folder, INDEX), "w", encoding="utf-8") as file:
                json.dump({"metadata": split.metadata, "weight_map": split.tensor_to_filename}, file, indent=2)

    def _start_file(self, path, tensors):
        """The header: its length, then JSON with the place of each tensor; the widest types first, to be aligned."""
        file = open(path, "wb")
        self.files.append(file)
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].itemsize):
            place = [end, end := end + tensor.nbytes]
            header[name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": place,
            }
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in tensors:
            self.positions[name] = file, 8 + len(encoded) + header[name]["data_offsets"][0]

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes a tensor, or the next piece of it."""
        file, position = self.positions[name]
        file.seek(position)
        file.write(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        self.positions[name] = file, position + tensor.nbytes
        self.missing[name] -= tensor.nbytes

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        for file in self.files:
            if error is None:
                file.flush()
                os.fsync(file.fileno())
            file.close()
        assert error or not any(self.missing.values()), self.missing
