"""Files that are damaged, or made to do harm: each is refused with a reason, or gives what the sound one does."""

import copy
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import struct
from contextlib import contextmanager

import pytest
import torch
from huggingface_hub import constants
from models import ARCHITECTURES, make_experts, without_sum
from peft import LoraConfig, PeftConfig, PeftModel, XLoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load, save

import peft_tint
from peft_tint import DtsConfig, TintConfig, merge_checkpoints

resource = pytest.importorskip("resource")
IDS = {"input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 11, 1]])}
SETTINGS = {"num_hidden_layers": 1, "vocab_size": 16, "max_position_embeddings": 8}
WEIGHTS, CONFIG, MODEL = "adapter_model.safetensors", "adapter_config.json", "model.safetensors"
INDEX = "model.safetensors.index.json"
SECONDS, BYTES = 20, 2**31  # an input that takes more has got through to something that it should not


# ---- what is sound ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base():
    return ARCHITECTURES["bert"].build(**SETTINGS)


@pytest.fixture(scope="module")
def sound(base, tmp_path_factory):
    """Experts, whole and in shards, and adapters of them: a tint, one that holds its experts, and one of DTS."""
    folder = tmp_path_factory.mktemp("sound")
    base.save_pretrained(folder / "base")
    for task, expert in make_experts(base, {"b": 3, "a": 2}).items():
        expert.save_pretrained(folder / task)
    expert.save_pretrained(folder / "shards", max_shard_size="4KB")
    experts = {task: str(folder / task) for task in ("b", "a")}
    packed = {"save_experts": "dts", "save_experts_kwargs": {"rank_ratio": 0.3}}
    configs = {
        "tint": TintConfig(experts=experts),
        "packed": TintConfig(experts=experts, **packed),
        "dts": DtsConfig(expert=experts["b"], rank_ratio=0.3),
        **{f"of_{name}": TintConfig(experts={"a": str(folder / name)}) for name in ("a", "shards")},
    }
    for name, config in configs.items():
        get_peft_model(copy.deepcopy(base), config).save_pretrained(folder / name)
    return folder


@torch.no_grad()
def logits(model):
    """Of each of its tasks."""
    results = []
    for task in getattr(model, "tasks", [None]):
        if task is not None:
            model.set_task(task)
        results.append(model.eval()(**IDS).logits)
    return results


def of_adapter(base, folder):
    return logits(PeftModel.from_pretrained(copy.deepcopy(base), folder))


def of_expert(base, folder):
    return logits(get_peft_model(copy.deepcopy(base), TintConfig(experts={"a": str(folder)})))


def of_known_expert(base, folder):
    """Of an expert whose sum is in a saved tint."""
    tint = folder.parent / f"of_{folder.name}"
    config = TintConfig.from_pretrained(tint)
    config.experts = {"a": str(folder)}
    return logits(PeftModel.from_pretrained(copy.deepcopy(base), tint, config=config))


def of_checkpoint(base, folder):
    """Merged without a model."""
    out = folder.parent / "out"
    merge_checkpoints(folder.parent / "base", {"a": folder}, "average", out)
    tensors = load((out / MODEL).read_bytes())
    shutil.rmtree(out)
    return [tensors[name] for name in sorted(tensors)]


# ---- trying an input -------------------------------------------------------------------------------------------------


class Hang(BaseException):
    """No Exception, so that none of ours may take it for one."""


@contextmanager
def limits():
    def stop(*_):
        raise Hang

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, before[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def is_sensible(error):
    """Ours or the like; PyTorch's, of shapes; or any of PEFT's before it has called ours, of no configuration."""
    text = str(error)
    if "allocate" in text or "Memory" in text:
        return False
    if isinstance(error, ValueError | SafetensorError | UserWarning):  # which is an error here
        return len(text) > 20
    if isinstance(error, RuntimeError) and "size mismatch" in text:
        return True
    frames, frame = [], error.__traceback__
    while frame is not None:
        frames.append(frame.tb_frame.f_code.co_filename)
        frame = frame.tb_next
    ours = os.path.dirname(peft_tint.__file__)
    return isinstance(error, LookupError | TypeError | RecursionError) and not any(f.startswith(ours) for f in frames)


def outcome(use, base, folder, expected):
    """What becomes of an input: "refused", "equal", or a description of what must not be."""
    with limits():
        try:
            results = use(base, folder)
        except Exception as error:
            return "refused" if is_sensible(error) else f"{type(error).__name__}: {error}"
    same = len(results) == len(expected) and all(map(torch.equal, results, expected))
    return "equal" if same else "another result"


def try_all(use, base, folder, file, inputs, harmless=False):
    """Puts each of the inputs, {name: bytes}, in the place of a file. Returns how many were refused.

    `harmless` allows those too that give the sound result."""
    expected, original, wrong, refused = use(base, folder), (folder / file).read_bytes(), {}, 0
    assert len(set(inputs.values())) == len(inputs) and original not in inputs.values()
    for name, data in inputs.items():
        (folder / file).write_bytes(data)
        found = outcome(use, base, folder, expected)
        refused += found == "refused"
        if found != "refused" and not (found == "equal" and harmless):
            wrong[name] = found
    assert not wrong
    return refused


# ---- inputs ----------------------------------------------------------------------------------------------------------


def split_file(data):
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:end]), data[8:end], data[end:]


def join_file(header, body):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + body


def truncated(data, rng, count=10):
    places = {0, 1, 7, 8, 9, len(data) // 2, len(data) - 1, *(rng.randrange(len(data)) for _ in range(count))}
    return {f"cut at {place}": data[:place] for place in places}


def flipped(data, rng, start, end, count):
    places = {(rng.randrange(start, end), rng.randrange(8)) for _ in range(count)}
    return {f"bit {bit} of {at}": data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :] for at, bit in places}


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (os.environ["EVIL"],)


def no_safetensors():
    """Other things under the name."""
    return {
        "a pickle": pickle.dumps(Evil()),
        "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "zeros": bytes(1000),
        "ones": b"\xff" * 1000,
        "a zip": b"PK\x03\x04" + bytes(100),
        "JSON": b'{"a": 1}' * 10,
    }


def structures(data):
    """Files whose header lies."""
    header, encoded, body = split_file(data)
    names = sorted(name for name in header if name != "__metadata__")
    first, last = names[0], names[-1]
    end = len(body)
    files = {
        f"header of {size} bytes": struct.pack("<Q", size) + data[8:]
        for size in (0, 1, len(encoded) - 1, len(encoded) + 1, len(data), 10**8 + 1, 2**31, 2**63, 2**64 - 1)
    }
    for what in (b"", b"[]", b"null", b"{", b"5", b'"x"', b"[" * 10**5, b'{"a":' * 10**5, b"\xff\xfe", bytes(64)):
        files[f"header {what[:9]!r}"] = join_file(what, body)
    files["header without end"] = join_file(b" " * 10**6, body)
    files["no tensors"] = join_file({}, b"")
    files["twice the same key"] = join_file(encoded.rstrip()[:-1] + b"," + encoded.strip()[1:], body)
    files["more behind"] = data + b"x"
    files["more behind, a whole file"] = data + data
    changes = {
        "offsets": (
            *([0, 0], [0, 1], [1, 0], [-4, 0], [0, 2**63], [2**63, 2**63 + 4], [end, end + 4], [0.5, 4.5], ["0", "4"]),
            *([], [0], [0, 4, 8], None, {}, 5, [0, end + 1]),
        ),
        "shape": ([-1], [2**40], [2**32, 2**32], [2**63, 2], [0], ["1"], [1.5], None, 5, [1] * 1000, [[1]]),
        "dtype": ("F64", "F16", "I32", "BOOL", "U8", "F8_E4M3", "f32", "", None, 5, ["F32"], "../x"),
    }
    for field, values in changes.items():
        key = {"offsets": "data_offsets"}.get(field, field)
        for value in values:
            if value == header[first][key]:
                continue
            files[f"{field} {value!r}"[:40]] = join_file({**header, first: {**header[first], key: value}}, body)
        less = {name: value for name, value in header[first].items() if name != key}
        files[f"no {field}"] = join_file({**header, first: less}, body)
    same = header[last]["data_offsets"]
    files["overlapping"] = join_file({**header, first: {**header[first], "data_offsets": same}}, body)
    files["a gap"] = join_file(
        {**header, "gap": {"dtype": "U8", "shape": [1], "data_offsets": [end + 9, end + 10]}}, body + bytes(10)
    )
    files["an entry that is a list"] = join_file({**header, first: [1]}, body)
    files["metadata that is a list"] = join_file({**header, "__metadata__": [1]}, body)
    return files


def other_tensors(data):
    """Sound files with other tensors."""
    tensors = load(data)
    names = sorted(tensors)
    files = {}
    for name in (names[0], names[len(names) // 2], names[-1]):
        tensor, rest = tensors[name], {n: t for n, t in tensors.items() if n != name}
        changed = {
            "without": {},
            "renamed": {f"{name}x": tensor},
            "of more axes": {name: tensor[None]},
            "of no axes": {name: tensor.flatten()[0].clone()},
            "empty": {name: tensor[:0]},
            "longer": {name: torch.cat([tensor, tensor])},
            "of another kind": {name: tensor.float() if tensor.dtype == torch.uint8 else tensor.to(torch.int64)},
            "complex": {name: tensor.to(torch.complex64)},
        }
        if tensor.is_floating_point():
            changed["NaN"] = {name: tensor * float("nan")}
            changed["Inf"] = {name: tensor + float("inf")}
        for what, replacement in changed.items():
            files[f"{name} {what}"] = save({**rest, **replacement})
    extra = torch.zeros(2)
    for name in ("x", "../x", "/etc/x", "", "__class__", names[0] + ".x", "base_model.model." + names[0]):
        files[f"also {name!r}"] = save({**tensors, name: extra})
    files["none"] = save({})
    return files


def random_files(data, rng, count):
    """Several faults at once."""
    files = {}
    for index in range(count):
        changed = bytearray(data)
        for _ in range(rng.randrange(1, 20)):
            kind, at = rng.randrange(3), rng.randrange(len(changed))
            if kind == 0:
                changed[at] ^= rng.randrange(1, 256)
            elif kind == 1:
                del changed[at : at + rng.randrange(1, 9)]
            else:
                changed[at:at] = rng.randbytes(rng.randrange(1, 9))
        files[f"random {index}"] = bytes(changed)
    return files


def distinct(files, original):
    return {name: data for data, name in {data: name for name, data in files.items()}.items() if data != original}


def of_weights(data, sum_is_known):
    """All for a safetensors file. Without a sum a number may become another, and nothing can tell."""
    rng = random.Random(0)
    header = len(data) - len(split_file(data)[2])
    files = {**truncated(data, rng), **no_safetensors(), **structures(data), **other_tensors(data)}
    files |= flipped(data, rng, 0, header, 25)
    if sum_is_known:
        files |= {**flipped(data, rng, header, len(data), 40), **random_files(data, rng, 40)}
    return distinct(files, data)


NO_JSON = (b"", b"{", b"[]", b"null", b"5", b'"x"', b"{}", b"\xff\xfe{}", b"[" * 10**5, b'{"a":' * 10**5, bytes(64))
VALUES = (
    None,
    True,
    False,
    7,
    -1.5,
    10**30,
    "x",
    "",
    "../x",
    [],
    ["x"],
    [7],
    [[]],
    {},
    {"x": "x"},
    {"x": 7},
    {"a": None},
)


def of_json(data):
    """All for a file of settings: cut off, no JSON, and each field with values of every type."""
    rng, settings = random.Random(0), json.loads(data)
    files = {**truncated(data.rstrip(), rng, 20), **{f"{what[:9]!r}": what for what in NO_JSON}}
    for field, value in settings.items():
        others = [other for other in VALUES if json.dumps(other) != json.dumps(value)]
        files |= {f"{field}: {other!r}": json.dumps(settings | {field: other}).encode() for other in others}
        files[f"without {field}"] = json.dumps({k: v for k, v in settings.items() if k != field}).encode()
    return distinct(files, data)


def of_index(data):
    index = json.loads(data)
    files = {**truncated(data.rstrip(), random.Random(0), 20), **{f"{what[:9]!r}": what for what in NO_JSON}}
    for value in VALUES:
        files[f"map {value!r}"] = json.dumps(index | {"weight_map": value}).encode()
    name, file = next(iter(index["weight_map"].items()))
    for other in (*OUTSIDE, "none.safetensors", "config.json", "model.bin", "", ".", "..", None, 7, [], {}):
        files[f"{file} becomes {other!r}"] = json.dumps(
            index | {"weight_map": index["weight_map"] | {name: other}}
        ).encode()
        files[f"all become {other!r}"] = json.dumps(
            index | {"weight_map": dict.fromkeys(index["weight_map"], other)}
        ).encode()
    return distinct(files, data)


# ---- damaged files ---------------------------------------------------------------------------------------------------

OUTSIDE = (
    *("../a/model.safetensors", "/etc/model.safetensors", "x/../../a/model.safetensors", "x/model.safetensors"),
    *(
        "..\\a\\model.safetensors",
        "C:\\model.safetensors",
        "C:model.safetensors",
        "\0.safetensors",
        "~/../x.safetensors",
    ),
)


@pytest.fixture(autouse=True)
def no_code_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    yield
    assert not (tmp_path / "evil").exists()


@pytest.fixture
def copied(sound, tmp_path):
    """A copy of all that is sound, which a test may damage."""
    shutil.copytree(sound, tmp_path / "sound")
    return tmp_path / "sound"


@pytest.mark.parametrize("name", ["tint", "packed", "dts"])
@pytest.mark.parametrize("sum_is_known", [True, False])
def test_weights_of_an_adapter(base, copied, name, sum_is_known):
    if not sum_is_known:
        without_sum(copied / name)
    inputs = of_weights((copied / name / WEIGHTS).read_bytes(), sum_is_known)
    assert try_all(of_adapter, base, copied / name, WEIGHTS, inputs) > (200 if sum_is_known else 140)


@pytest.mark.parametrize("name", ["tint", "packed", "dts"])
def test_configuration_of_an_adapter(base, copied, name):
    inputs = of_json((copied / name / CONFIG).read_bytes())
    assert try_all(of_adapter, base, copied / name, CONFIG, inputs, harmless=True) > 250


@pytest.mark.parametrize("use, sum_is_known", [(of_known_expert, True), (of_expert, False), (of_checkpoint, False)])
def test_weights_of_an_expert(base, copied, use, sum_is_known):
    inputs = of_weights((copied / "a" / MODEL).read_bytes(), sum_is_known)
    assert try_all(use, base, copied / "a", MODEL, inputs) > (200 if sum_is_known else 140)


@pytest.mark.parametrize("use", [of_known_expert, of_checkpoint])
def test_configuration_of_an_expert(base, copied, use):
    inputs = of_json((copied / "a" / "config.json").read_bytes())
    assert try_all(use, base, copied / "a", "config.json", inputs, harmless=True) > 300


@pytest.mark.parametrize("use", [of_known_expert, of_checkpoint])
def test_index_of_shards(base, copied, use):
    inputs = of_index((copied / "shards" / INDEX).read_bytes())
    assert try_all(use, base, copied / "shards", INDEX, inputs) > 80


# ---- ways out of a folder --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["..", "../a", "/etc", "a/../../a", "..\\a", "C:\\a", "\\a", 5, ["a"], "a\0"])
def test_references_that_lead_out(base, copied, path):
    reference = {"id": str(copied / "b"), "subfolder": path}
    for reference in ({"id": str(copied / "b"), "subfolder": path}, {"id": "me/expert", "revision": path}):
        with pytest.raises(ValueError, match="a path below it without"):
            TintConfig(experts={"a": reference})
        with pytest.raises(ValueError, match="a path below it without"):
            DtsConfig(expert=reference)
        with pytest.raises(ValueError, match=r"Expert 'a' has the .* a path below it without"):
            peft_tint.merge(base, {"a": reference})
        with pytest.raises(ValueError, match=r"Expert 'a' has the .* a path below it without"):
            merge_checkpoints(copied / "base", {"a": reference}, "average", copied / "out")


@pytest.mark.filterwarnings("ignore:Adapter name ''")  # PEFT's own
@pytest.mark.parametrize("name", ["..", ".", "../a", "/a", "a/b", "a\\b", "C:a", "a\0", ""])
def test_names_that_lead_out(base, copied, name):
    """Of tasks, which may become folders of merged models, and of adapters, which become folders of saved ones."""
    with pytest.raises(ValueError, match=r"task name .* is not allowed"):
        TintConfig(experts={name: "me/a"})
    with pytest.raises(ValueError, match=r"task name .* is not allowed"):
        merge_checkpoints(copied / "base", {name: copied / "a"}, "emr", copied / "out")
    for config in (TintConfig(experts={"a": str(copied / "a")}), DtsConfig(expert=str(copied / "a"), rank_ratio=0.3)):
        with pytest.raises(ValueError, match="adapter name"):
            get_peft_model(copy.deepcopy(base), config, adapter_name=name)


def replace_by_link(path, target):
    """Moves a file or folder out and leaves a link to it."""
    shutil.move(path, target)
    path.symlink_to(target)


@pytest.mark.parametrize("file", [MODEL, "config.json", "tokenizer.json", "vocab.txt", "1_Pooling", "1_Pooling/x.json"])
def test_links_out_of_an_expert(base, copied, tmp_path, file):
    """What is copied beside merged weights may be pushed to the Hub."""
    folder = copied / "a"
    (folder / "1_Pooling").mkdir()
    for name in ("tokenizer.json", "vocab.txt", "1_Pooling/x.json"):
        (folder / name).write_text("{}")
    expected = of_checkpoint(base, folder)
    replace_by_link(folder / file, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"is a link to .*elsewhere.*, outside of"):
        merge_checkpoints(copied / "base", {"a": folder}, "average", tmp_path / "out", files_from="a")
    assert not (tmp_path / "out").exists()
    if file in (MODEL, "config.json"):
        with pytest.raises(ValueError, match=r"'a': .* is a link to .*elsewhere.*, outside of"):
            of_expert(base, folder)
    (folder / file).unlink()
    shutil.move(tmp_path / "elsewhere", folder / "inside")
    (folder / file).symlink_to(folder / "inside")
    if file == MODEL:
        assert all(map(torch.equal, of_checkpoint(base, folder), expected))


def test_links_of_shards_and_subfolders(base, copied, tmp_path):
    reference = {"id": str(copied / "repository"), "subfolder": "a"}
    (copied / "repository").mkdir()
    (copied / "repository" / "a").symlink_to(copied / "a")
    for folder, source in (("shards", str(copied / "shards")), ("a", reference)):
        if folder == "shards":
            shard = next(file for file in (copied / folder).iterdir() if "-of-" in file.name)
            replace_by_link(shard, tmp_path / "elsewhere")
        with pytest.raises(ValueError, match=r"is a link to .*, outside of"):
            peft_tint.merge(base, {"a": source})
        with pytest.raises(ValueError, match=r"is a link to .*, outside of"):
            merge_checkpoints(copied / "base", {"a": source}, "average", tmp_path / "out")


@pytest.mark.parametrize("name", ["tint", "packed", "dts"])
@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
def test_links_out_of_an_adapter(base, copied, tmp_path, name, file):
    model = PeftModel.from_pretrained(copy.deepcopy(base), copied / name)
    replace_by_link(copied / name / file, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"is a link to .*elsewhere.*, outside of"):
        of_adapter(base, copied / name)
    (tmp_path / "elsewhere").write_text("another's")
    model.save_pretrained(copied / name)
    assert (tmp_path / "elsewhere").read_text() == "another's"
    assert all(map(torch.equal, of_adapter(base, copied / name), logits(model)))


# ---- code ------------------------------------------------------------------------------------------------------------

CODE = "import os\nos.mkdir(os.environ['EVIL'])\n"


def change_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("use", [of_expert, of_checkpoint])
def test_code_beside_a_model_does_not_run(base, copied, use, monkeypatch):
    expected, folder = use(base, copied / "a"), copied / "a"
    for file in ("evil.py", "__init__.py", "modeling_evil.py", "configuration_evil.py"):
        (folder / file).write_text(CODE)
    monkeypatch.syspath_prepend(folder)
    classes = ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification", "AutoTokenizer")
    change_json(folder / "config.json", auto_map=dict.fromkeys(classes, "evil.Evil"), custom_pipelines={"x": "evil"})
    assert all(map(torch.equal, use(base, folder), expected))
    change_json(folder / "config.json", attn_implementation="me/evil", _attn_implementation="me/evil:evil")
    assert all(map(torch.equal, use(base, folder), expected))


@pytest.mark.parametrize("field, value", [
    ("transformers_weights", "other.safetensors"),
    ("transformers_weights", "adapter_model.bin"),
    ("transformers_weights", "../b/model.safetensors"),
    ("transformers_weights", "other.safetensors.index.json"),
    ("quantization_config", {"quant_method": "evil"}),
    ("quantization_config", 5),
])  # fmt: skip
def test_other_weights_that_a_configuration_names(base, copied, field, value):
    """Which are not those whose sum a saved tint has."""
    folder = copied / "a"
    shutil.copy(copied / "b" / MODEL, folder / "other.safetensors")
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))
    change_json(folder / "config.json", **{field: value})
    for use in (of_expert, of_known_expert):
        with pytest.raises(ValueError, match=rf"'a': config.json in .* has {field}="):
            use(base, folder)


@pytest.mark.parametrize("name", ["tint", "packed", "dts"])
def test_pickles_beside_weights_are_not_read(base, copied, name):
    for folder, file in ((name, "adapter_model.bin"), ("a", "pytorch_model.bin"), ("b", "model.pt")):
        (copied / folder / file).write_bytes(pickle.dumps(Evil()))
    config = type(PeftConfig.from_pretrained(copied / name)).from_pretrained(copied / name)
    if name == "tint":
        config.experts = {task: str(copied / task) for task in config.tasks}
    with_pickles = PeftModel.from_pretrained(copy.deepcopy(base), copied / name, config=config)
    (copied / name / "adapter_model.bin").unlink()
    assert all(map(torch.equal, logits(with_pickles), of_adapter(base, copied / name)))


@pytest.mark.parametrize("name", ["tint", "packed", "dts"])
def test_pickled_adapters_are_neither_loaded_nor_saved(base, copied, name):
    model = PeftModel.from_pretrained(copy.deepcopy(base), copied / name)
    with pytest.raises(ValueError, match=r"Adapters of pickles are never loaded"):
        model.save_pretrained(copied / "saved", safe_serialization=False)
    assert not os.listdir(copied / "saved")
    (copied / name / WEIGHTS).unlink()
    (copied / name / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"stored as a pickle \(adapter_model.bin\)"):
        of_adapter(base, copied / name)


HOSTILE_ADAPTERS = {
    "a tint of itself": (TintConfig(experts={"a": "HERE"}), "type TINT made of others"),
    "DTS of itself": (DtsConfig(expert={"id": "HERE"}), "type DTS made of others"),
    "X-LoRA": (XLoraConfig(hidden_size=16, adapters={"0": "HERE"}), "type XLORA made of others"),
    "Megatron": ({"megatron_config": {"x": 1}, "megatron_core": "evil"}, "adapter for Megatron"),
    "a regular expression": ({"target_modules": "("}, "cannot be loaded"),
    "another rank": ({"r": 7}, "cannot be loaded"),
    "a rank of text": ({"r": "x"}, "cannot be loaded"),
    "no layers": ({"target_modules": ["x"]}, "cannot be loaded"),
    "no type": ({"peft_type": None}, "of no kind that PEFT knows"),
    "an unknown type": ({"peft_type": "EVIL"}, "of no kind that PEFT knows"),
    "a prompt": ({"peft_type": "PROMPT_TUNING"}, "which changes no weights|of no kind"),
}


@pytest.mark.parametrize("name", HOSTILE_ADAPTERS)
def test_hostile_adapters_as_experts(base, copied, tmp_path, monkeypatch, name):
    settings, match = HOSTILE_ADAPTERS[name]
    folder = tmp_path / "lora"
    get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["query"])).save_pretrained(folder)
    (tmp_path / "evil.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    if isinstance(settings, PeftConfig):
        settings.save_pretrained(folder)
        (folder / CONFIG).write_text((folder / CONFIG).read_text().replace("HERE", str(folder)))
    else:
        change_json(folder / CONFIG, **settings)
    with limits(), pytest.raises(ValueError, match=f"'a'.*({match})"):
        of_expert(base, folder)


# ---- experts that have become others ---------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["a", "shards"])
def test_experts_of_a_saved_tint_are_those_that_it_was_made_of(base, copied, folder):
    tint = copied / f"of_{folder}"
    files = sorted(file for file in (copied / folder).iterdir() if file.suffix == ".safetensors")
    sha256 = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    assert json.loads((tint / CONFIG).read_text())["experts_sha256"] == {"a": sha256}
    change_json(tint / CONFIG, experts={"a": str(copied / folder)})  # which may be edited, for files are moved
    expected = of_adapter(base, tint)
    tensors = load(files[-1].read_bytes())
    name = min(tensors)
    files[-1].write_bytes(save({**tensors, name: tensors[name] + 1e-3}, {"format": "pt"}))
    with pytest.raises(
        ValueError, match=f"Expert 'a' .*{folder}.* the sha256 .*, and the adapter was made with {sha256}"
    ):
        of_adapter(base, tint)
    config = TintConfig.from_pretrained(tint)
    config.experts_sha256 = None
    again = PeftModel.from_pretrained(copy.deepcopy(base), tint, config=config)
    assert not all(map(torch.equal, logits(again), expected))
    assert config.experts_sha256["a"] != sha256  # what is saved next


def test_experts_of_the_hub_are_pinned_to_their_commit(base, copied, tmp_path, monkeypatch):
    commits, repository = ("0" * 40, "1" * 40), tmp_path / "models--me--a"
    for commit, task in zip(commits, "ab", strict=True):
        shutil.copytree(copied / task, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commits[0])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = get_peft_model(copy.deepcopy(base), TintConfig(experts={"a": "me/a"}))
    model.save_pretrained(tmp_path / "tint")
    (repository / "refs" / "main").write_text(commits[1])  # the repository has moved on
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "tint")
    assert again.peft_config["default"].experts == {"a": {"id": "me/a", "revision": commits[0]}}
    assert all(map(torch.equal, logits(again), logits(model)))
    branch = TintConfig(experts={"a": {"id": "me/a", "revision": "main"}})
    get_peft_model(copy.deepcopy(base), branch)
    assert branch.experts == {"a": {"id": "me/a", "revision": "main"}}  # as it was given


# ---- adapters that others have written -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tint", "packed", "dts"])
def test_adapters_without_a_sum_load(base, copied, name):
    """Written by `save_file`, or from before there were sums."""
    model = PeftModel.from_pretrained(copy.deepcopy(base), copied / name)
    (copied / "other").mkdir()
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    (copied / "other" / WEIGHTS).write_bytes(save(state))
    config = model.peft_config["default"]
    config.save_pretrained(copied / "other")
    settings = json.loads((copied / "other" / CONFIG).read_text())
    assert settings.pop("sha256") is None and settings.pop("experts_sha256", True)
    (copied / "other" / CONFIG).write_text(json.dumps(settings))
    assert all(map(torch.equal, of_adapter(base, copied / "other"), logits(model)))


@pytest.mark.parametrize("name", ["tint", "packed", "dts"])
def test_what_may_be_edited(base, copied, name):
    expected, file = of_adapter(base, copied / name), copied / name / CONFIG
    change_json(file, base_model_name_or_path="me/base", revision="main", task_type="SEQ_CLS", peft_version="0")
    assert all(map(torch.equal, of_adapter(base, copied / name), expected))
    change_json(file, exclude_modules=["query"])
    with pytest.raises(ValueError, match=r"do not have the sha256 .* they were saved with: .* delete `sha256`"):
        of_adapter(base, copied / name)


def test_the_sum_of_a_swapped_adapter_is_checked(base, copied):
    model = PeftModel.from_pretrained(copy.deepcopy(base), copied / "tint")
    expected, file = logits(model), copied / "tint" / WEIGHTS
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for use in (
        lambda: peft_tint.hotswap_adapter(model, copied / "tint"),
        lambda: model.load_adapter(copied / "tint", "b"),
    ):
        with pytest.raises(ValueError, match="do not have the sha256"):
            use()
    assert all(map(torch.equal, logits(model), expected))
