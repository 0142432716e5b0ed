"""Checkpoint folders of safetensors: opened without being loaded, and written tensor by tensor."""

import contextlib
import copy
import fnmatch
import glob
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch
import transformers
from huggingface_hub import constants, snapshot_download, split_state_dict_into_shards_factory
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ._files import INDEX, SINGLE, check_inside, check_reference, shard_names, sync

# What a model needs beside its weights. What a training left (optimizers, adapters, logs) and code are none of it.
BESIDE_WEIGHTS = (
    *("config.json", "generation_config.json", "*processor_config.json", "preprocessor_config.json", "normalizer.json"),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab*.json", "vocab*.txt", "merges.txt"),
    *("*.model", "*.spm", "*.tiktoken", "tekken.json", "bpe.codes", "*.jinja", "chat_template.json", "LICENSE*"),
    *("modules.json", "sentence_*_config.json", "config_sentence_transformers.json"),  # sentence-transformers
)
FOLDERS_BESIDE_WEIGHTS = ("additional_chat_templates", "[0-9]_*")  # the latter sentence-transformers' further modules
INCOMPLETE = ".incomplete-"
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

    Raises ValueError for what is no folder of unquantised safetensors or is broken.
    """
    reference = source if isinstance(source, Mapping) else {"id": source}
    if not isinstance(reference.get("id"), str | os.PathLike):
        raise ValueError(
            f"{who} is {source if isinstance(source, str) else type(source).__name__!r}; give a folder, a Hub id, or "
            "{'id', 'revision', 'subfolder'}. Models in memory go to `peft_tint.merge`, with a module as base."
        )
    check_reference(who, reference)
    location, subfolder = os.fspath(reference["id"]), reference.get("subfolder") or ""
    if os.path.isfile(location):
        raise ValueError(f"{who}: {location!r} is a file; give the folder that it is in.")
    if os.path.isdir(location):
        folder = os.path.join(location, subfolder) if subfolder else location
    else:
        folder = _download(who, location, subfolder, reference.get("revision"))
    if not os.path.isdir(folder):
        raise ValueError(f"{who}: there is no folder {folder!r}. Check `subfolder`.")
    found = sorted(os.listdir(folder))
    used = [name for name in found if name.endswith((".safetensors", ".json")) or _matches(name, BESIDE_WEIGHTS)]
    root = location if os.path.isdir(location) else folder
    check_inside(who, root, [folder, *(os.path.join(folder, name) for name in used)])
    if "adapter_config.json" in found:
        raise ValueError(
            f"{who}: {location!r} is an adapter. Merge it into its base model first (`merge_and_unload`, "
            "`save_pretrained`), or use `peft_tint.merge`, which takes adapters and models in memory."
        )
    config = _load_config(who, folder) if "config.json" in found else None
    tensors = {}
    for file in _weight_files(who, folder, found):
        try:
            with safe_open(os.path.join(folder, file), "pt") as opened:
                own = {name: opened.get_tensor(name) for name in opened.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{who}: {file} in {folder!r} is missing or broken ({error}). Save it again.") from error
        if twice := tensors.keys() & own.keys():
            raise ValueError(f"{who}: {min(twice)!r} is in two files of {folder!r}. Save it again.")
        tensors |= own
    _check_types(who, tensors, config)
    return Checkpoint(folder, tensors, config)


def _check_types(who, tensors, config):
    remedy = "Task vectors cannot be added to quantised weights: give it unquantised, and quantise the merged model."
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{who} is quantised (its config has a `quantization_config`). {remedy}")
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{who}: {name!r} has the type {tensor.dtype}, which cannot be merged. {remedy}")


def _download(who, location, subfolder, revision):
    """The weights are named by the index, so that other copies of them in the repository are left alone."""

    def fetch(*patterns):
        patterns = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in patterns]
        # Without `local_files_only` some releases of huggingface_hub want the Hub's list of files, offline too
        offline = constants.HF_HUB_OFFLINE
        cached = snapshot_download(location, revision=revision, allow_patterns=patterns, local_files_only=offline)
        return os.path.join(cached, subfolder)

    try:
        folders = [f"{pattern}/*" for pattern in FOLDERS_BESIDE_WEIGHTS]
        folder = fetch(*BESIDE_WEIGHTS, *folders, SINGLE, INDEX, "adapter_config.json")
        found = os.listdir(folder) if os.path.isdir(folder) else []
        return folder if SINGLE in found or INDEX not in found else fetch(*_weight_files(who, folder, found))
    except (OSError, HFValidationError) as error:
        raise ValueError(
            f"{who}: {location!r} is neither a local folder nor a model that can be reached on the Hub. Check the "
            "spelling, the revision, and your access if it is private or you are offline."
        ) from error


def _weight_files(who, folder, found):
    """The names of the files with the weights; as in transformers, one file goes before an index beside it."""
    if INDEX in found and SINGLE not in found:
        return shard_names(who, os.path.join(folder, INDEX))
    files = [SINGLE] if SINGLE in found else [file for file in found if file.endswith(".safetensors")]
    if len(files) != 1:
        raise ValueError(
            f"{who}: the folder {folder!r} has {len(files)} safetensors files and no {INDEX} (found {found}). Give a "
            "folder that `save_pretrained` wrote; pickled weights (.bin, .pt) are not read."
        )
    return files


def _load_config(who, folder):
    try:
        settings, _ = PretrainedConfig.get_config_dict(folder)
        known = settings.get("model_type") in transformers.models.auto.configuration_auto.CONFIG_MAPPING
        return (AutoConfig if known else PretrainedConfig).from_pretrained(folder)  # never code from the folder
    except Exception as error:  # of whatever kind: configs check themselves in many ways
        raise ValueError(f"{who}: config.json in {folder!r} cannot be read ({error}). Save it again.") from error


def meta_model(config: PretrainedConfig | None) -> PreTrainedModel | None:
    """The model that a checkpoint is of, without weights; None if the config names no class of transformers."""
    names = getattr(config, "architectures", None)
    model_class = getattr(transformers, str(names[0]), None) if isinstance(names, list) and names else None
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel) and model_class.config_class):
        return None
    if not isinstance(config, model_class.config_class):
        raise ValueError(f"config.json is of {type(config).__name__}, and its `architectures` is {names[0]!r}.")
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"  # others may not be installed, and weights are the same
    with torch.device("meta"):
        return model_class(config)


def module_names(names, model: PreTrainedModel | None) -> dict[str, str]:
    """{name in a file: name in the model}, by transformers' own list of what it renames when it loads.

    Tensors that it would also convert (experts of a mixture, one a file and stacked in the model) keep their names."""
    if model is None:
        return {name: name for name in names}
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    state, found = model.state_dict(), {}
    for name in sorted(names):
        renamed, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        found[name] = name if converted else renamed
    return found


@contextlib.contextmanager
def new_folder(path: str | os.PathLike):
    """A temporary folder beside `path`, which gets its name when all is written and on disk; on an error nothing does.

    Whenever the process ends, `path` is absent, or empty as it was, or whole. Only in an empty folder that has to stay
    (the working directory, a mount point) the files are moved one by one, configs last. What a process that was
    killed has left is `.incomplete-*`. Raises ValueError if something else is at `path`."""
    path = os.path.realpath(path)
    exists = os.path.exists(path)
    found = os.listdir(path) if os.path.isdir(path) else []
    if exists and not (os.path.isdir(path) and all(name.startswith(INCOMPLETE) for name in found)):
        raise ValueError(f"{path!r} exists already; give a new or empty folder.")
    if exists and (found or os.path.ismount(path) or os.path.samefile(path, os.curdir)):
        with added_files(path) as temporary:
            yield temporary
        return
    with _temporary_folder(os.path.dirname(path), os.path.basename(path)) as temporary:
        yield temporary
        _sync_all(temporary)
        os.chmod(temporary, 0o777 & ~_umask())  # `mkdtemp` has made it the user's alone
        _move(temporary, path)
        sync(os.path.dirname(path))


@contextlib.contextmanager
def added_files(path: str | os.PathLike):
    """A temporary folder in `path`. Its files get to `path`, in the place of those of their names, when all are written
    and on disk, configs last; on an error none does."""
    path = os.path.realpath(path)
    with _temporary_folder(path) as temporary:
        yield temporary
        _sync_all(temporary)
        files = [os.path.join(folder, file) for folder, _, files in os.walk(temporary) for file in files]
        places = {file: os.path.join(path, os.path.relpath(file, temporary)) for file in files}
        for file, place in sorted(places.items(), key=lambda item: item[0].endswith("config.json")):
            os.makedirs(os.path.dirname(place), exist_ok=True)
            os.replace(file, place)
        for folder in {os.path.dirname(place) for place in places.values()} | {path}:
            sync(folder)
        shutil.rmtree(temporary)


def remove_folder(path: str | os.PathLike) -> None:
    """Removes a folder, of which no part is ever at `path`."""
    path = os.path.realpath(path)
    with _temporary_folder(os.path.dirname(path), os.path.basename(path)) as temporary:
        os.rename(path, temporary)
        shutil.rmtree(temporary)


def remove_incomplete(parent: str | os.PathLike, name: str) -> None:
    """Removes what a process that was killed has left of folders in `parent` whose names begin with `name`."""
    for folder in glob.glob(os.path.join(glob.escape(parent), f"{INCOMPLETE}{name}*")):
        shutil.rmtree(folder)


@contextlib.contextmanager
def _temporary_folder(parent, name=""):
    os.makedirs(parent, exist_ok=True)
    temporary = tempfile.mkdtemp(prefix=f"{INCOMPLETE}{name}", dir=parent)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sync_all(path):
    for folder, _, files in os.walk(path):
        for file in files:
            sync(os.path.join(folder, file))
        sync(folder)


def _move(temporary, path):
    try:
        os.rename(temporary, path)
    except OSError as error:
        raise ValueError(f"Something else has written to {path!r} meanwhile; give a new folder.") from error


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def copy_files(source: str, folder: str, dtype: torch.dtype | None) -> None:
    """Copies what a model needs beside its weights; configs without local paths, and with the weights' `dtype`."""
    for name in sorted(os.listdir(source)):
        path, target = os.path.join(source, name), os.path.join(folder, name)
        if os.path.isdir(path) and _matches(name, FOLDERS_BESIDE_WEIGHTS):
            inner = [os.path.join(where, n) for where, folders, files in os.walk(path) for n in (*folders, *files)]
            check_inside("The model", source, [path, *inner])
            shutil.copytree(path, target, ignore=shutil.ignore_patterns("*.bin", "*.pt", "*.pth", "*.ckpt", "*.py"))
        elif os.path.isfile(path) and _matches(name, BESIDE_WEIGHTS):
            if name.endswith("config.json"):
                _copy_config(path, target, dtype)
            else:
                shutil.copyfile(path, target)


def _matches(name, patterns):
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _copy_config(source, target, dtype):
    try:
        with open(source, encoding="utf-8") as file:
            settings = _without_paths(json.load(file))
    except ValueError as error:
        raise ValueError(f"{source!r} is no JSON ({error}). Save it again.") from error
    if os.path.basename(source) == "config.json":
        settings = {key: value for key, value in settings.items() if key not in ("dtype", "torch_dtype")}
        settings |= {"dtype": str(dtype).removeprefix("torch.")} if dtype else {}
        if "auto_map" in settings:
            warnings.warn(
                "The model has code of its own (`auto_map` in its config), which is not copied; put those .py files "
                "into the merged folder.",
                stacklevel=2,
            )
    with open(target, "w", encoding="utf-8") as file:
        json.dump(settings, file, indent=2)
        file.write("\n")


def _without_paths(settings):
    if isinstance(settings, dict):
        return {key: _without_paths(value) for key, value in settings.items() if key not in LOCAL_PATHS}
    return settings


class CheckpointWriter:
    """Writes tensors into the safetensors files of a folder, of at most `max_shard_size` each, as they come.

    `tensors` are {name: meta tensor} of all that will be written. Nothing is kept in memory, which `safetensors` itself
    would need to write a file. A context manager: what leaves it without an error is whole."""

    def __init__(self, folder: str, tensors: dict[str, torch.Tensor], max_shard_size: int | str):
        os.makedirs(folder, exist_ok=True)
        split = split_into_shards(tensors, max_shard_size)
        self.tensors, self.places, self.file = tensors, {}, None
        self.left = {name: tensor.nbytes for name, tensor in tensors.items()}
        for file, names in split.filename_to_tensors.items():
            self._start_file(os.path.join(folder, file), {name: tensors[name] for name in names})
        if split.is_sharded:
            with open(os.path.join(folder, INDEX), "w", encoding="utf-8") as file:
                json.dump({"metadata": split.metadata, "weight_map": split.tensor_to_filename}, file, indent=2)

    def _start_file(self, path, tensors):
        """The header: its length, then JSON with the place of each tensor; the widest types first, to be aligned."""
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
        with open(path, "wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in tensors:
            self.places[name] = path, 8 + len(encoded) + header[name]["data_offsets"][0]

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes a tensor, or the next piece of it."""
        path, position = self.places[name]
        assert tensor.dtype == self.tensors[name].dtype and tensor.nbytes <= self.left[name], name
        if self.file is None or self.file.name != path:  # one at a time, for there may be more than the system allows
            self._close()
            self.file = open(path, "r+b")
        self.file.seek(position)
        self.file.write(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        self.places[name] = path, position + tensor.nbytes
        self.left[name] -= tensor.nbytes

    def _close(self):
        if self.file is not None:
            self.file.close()

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        self._close()
        if error is None and (missing := [name for name, left in self.left.items() if left]):
            raise RuntimeError(f"{missing[:3]} were not written, a fault of peft_tint's; please report it.")


def split_into_shards(tensors: dict[str, torch.Tensor], max_shard_size: int | str):
    pattern = SINGLE.replace(".safetensors", "{suffix}.safetensors")
    if isinstance(max_shard_size, int) and max_shard_size <= 0:
        raise ValueError(f"`max_shard_size` is {max_shard_size}; give a number of bytes, or a string such as '5GB'.")
    try:
        return split_state_dict_into_shards_factory(
            tensors, get_storage_size=_nbytes, filename_pattern=pattern, max_shard_size=max_shard_size
        )
    except ValueError as error:
        raise ValueError(f"`max_shard_size` is {max_shard_size!r}; give a size such as '5GB' or '200MB'.") from error


def _nbytes(tensor):
    return tensor.nbytes
