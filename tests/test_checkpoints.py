"""Merging of checkpoint folders: the same numbers as in memory, and a folder that is whole or not there."""

import json
import os
import shutil

import pytest
import torch
import transformers as T
from huggingface_hub import constants
from models import ARCHITECTURES, IDS, make_experts
from safetensors.torch import load_file, save_file, save_model

from peft_tint import MERGING_METHODS, merge, merge_checkpoints
from peft_tint.merging import _checkpoints

AUTO = {"bert": T.AutoModelForSequenceClassification, "llama_tied": T.AutoModelForCausalLM}


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(_checkpoints, "PIECE", 100)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name of an architecture: (base folder, {task: folder})}; the experts in bfloat16, in shards."""
    made = {}
    for name in ("bert", "llama_tied", "conv_net", "resnet"):
        folder = tmp_path_factory.mktemp(name)
        base = ARCHITECTURES[name].build()
        tasks = {"b": 2, "a": 2} if name == "bert" else ["b", "a"]
        models = {"base": base, **make_experts(base, tasks)}
        if name == "resnet":
            for model in models.values():
                model.load_state_dict(dict(base.named_buffers()), strict=False)
        for task, model in models.items():
            if name == "conv_net":
                os.makedirs(folder / task)
                save_file(model.state_dict(), folder / task / "model.safetensors")
            else:
                if task != "base":
                    model = model.bfloat16()
                model.save_pretrained(folder / task, max_shard_size="5KB" if task != "base" else "5GB")
        made[name] = str(folder / "base"), {task: str(folder / task) for task in tasks}
    return made


def loaded(name, folder):
    return AUTO[name].from_pretrained(folder, output_loading_info=True)


def read(folder):
    return {n: t for f in os.listdir(folder) if f.endswith(".safetensors") for n, t in load_file(folder / f).items()}


@pytest.mark.parametrize(
    ("method", "per_tensor"),
    [*((method, False) for method in MERGING_METHODS), *((m, True) for m in MERGING_METHODS if m != "lines")],
)
@pytest.mark.parametrize("name", ["bert", "llama_tied"])
def test_as_in_memory(folders, tmp_path, method, name, per_tensor):
    base, experts = folders[name]
    merge_checkpoints(base, experts, method, tmp_path / "out", "9KB", scale=0.4, per_tensor=per_tensor)
    expected = merge(loaded(name, base)[0], experts, method, scale=0.4, per_tensor=per_tensor)
    per_task = MERGING_METHODS[method].per_task
    for task in experts if per_task else [""]:
        model, report = loaded(name, tmp_path / "out" / task)
        assert not any(report.values()) and not model.config.name_or_path.startswith(base)
        wanted = expected[task].state_dict() if per_task else expected.state_dict()
        for key, tensor in model.state_dict().items():
            if method in ("emr", "lines"):  # sums over pieces
                torch.testing.assert_close(tensor, wanted[key], rtol=1e-6, atol=1e-6)
            else:
                assert torch.equal(tensor, wanted[key]), key
        if per_task and name == "bert":
            assert model.config.id2label == AUTO[name].from_pretrained(experts[task]).config.id2label


def test_every_tensor_of_a_folder_without_a_config(folders, tmp_path):
    base, experts = folders["conv_net"]
    merge_checkpoints(base, experts, "average", tmp_path / "out")
    merged, before = read(tmp_path / "out"), load_file(f"{base}/model.safetensors")
    assert merged.keys() == before.keys() and os.listdir(tmp_path / "out") == ["model.safetensors"]
    for name, tensor in merged.items():
        mean = sum(load_file(f"{folder}/model.safetensors")[name].double() for folder in experts.values()) / 2
        torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-6)


def test_files(folders, tmp_path):
    """What belongs to the model is copied, what a training left is not, and nothing says where it came from."""
    base, experts = folders["llama_tied"]
    source = tmp_path / "b"
    shutil.copytree(experts["b"], source)
    for file in ("tokenizer.json", "tokenizer_config.json", "merges.txt", "spiece.model", "chat_template.jinja"):
        (source / file).write_text(json.dumps({"name_or_path": str(source), "kept": 1}))
    for file in ("training_args.bin", "adapter_model.safetensors.index.json", "trainer_state.json", "modeling.py"):
        (source / file).write_text("{}")
    merge_checkpoints(base, {**experts, "b": source}, "average", tmp_path / "out", "9KB", "bfloat16", files_from="b")
    out = tmp_path / "out"
    weights = {file for file in os.listdir(out) if file.endswith(".safetensors")}
    assert set(os.listdir(out)) - weights == {
        *("config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json"),
        *("tokenizer_config.json", "merges.txt", "spiece.model", "chat_template.jinja"),
    }
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == weights and len(weights) > 1
    tensors = read(out)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert all(sum(tensor.nbytes for tensor in load_file(out / file).values()) <= 9000 for file in weights)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"kept": 1}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert str(tmp_path) not in (out / "config.json").read_text()
    assert T.AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_a_checkpoint_of_mixed_types_is_aligned_and_loads(tmp_path):
    tensors = {
        "odd": torch.randn(3).bfloat16(),
        "wide": torch.randn(5),
        "steps": torch.tensor(7),
        "flag": torch.ones(1) > 0,
    }
    for folder, shift in (("base", 0), ("a", 1)):
        (tmp_path / folder).mkdir()
        shifted = {n: t + shift if t.is_floating_point() else t for n, t in tensors.items()}
        save_file(shifted, tmp_path / folder / "model.safetensors")
    merge_checkpoints(tmp_path / "base", {"a": tmp_path / "a"}, "average", tmp_path / "out")
    merged = read(tmp_path / "out")
    torch.testing.assert_close(merged, {n: t + 1 if t.is_floating_point() else t for n, t in tensors.items()})
    assert {n: t.dtype for n, t in merged.items()} == {n: t.dtype for n, t in tensors.items()}


def test_heads_that_differ(bert, tmp_path):
    base, experts = bert
    with pytest.warns(UserWarning, match="has the head of the base"):
        merge_checkpoints(base, experts, "average", tmp_path / "base")
    with pytest.warns(UserWarning, match="has the head of score"):
        merge_checkpoints(base, experts, "average", tmp_path / "score", files_from="score")
    for folder, source in (("base", base), ("score", experts["score"])):
        merged, report = loaded("bert", tmp_path / folder)
        assert not any(report.values())
        head = AUTO["bert"].from_pretrained(source).classifier
        assert torch.equal(merged.classifier.weight, head.weight)
    first, second = read(tmp_path / "base"), read(tmp_path / "score")
    assert all(torch.equal(first[name], second[name]) for name in first if not name.startswith("classifier"))


def test_a_hub_id(folders, tmp_path, monkeypatch):
    """From a cache as a download leaves it, at a revision and in a subfolder."""
    base, experts = folders["llama_tied"]
    repository = tmp_path / "models--me--llama"
    for task, folder in experts.items():
        shutil.copytree(folder, repository / "blobs" / task)
        snapshot = repository / "snapshots" / ("0" * 40) / task
        snapshot.mkdir(parents=True)
        for file in os.listdir(folder):
            os.symlink(f"../../../blobs/{task}/{file}", snapshot / file)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    references = {task: {"id": "me/llama", "revision": "0" * 40, "subfolder": task} for task in experts}
    merge_checkpoints(base, references, "ties", tmp_path / "out")
    merge_checkpoints(base, experts, "ties", tmp_path / "same")
    torch.testing.assert_close(read(tmp_path / "out"), read(tmp_path / "same"), rtol=0, atol=0)
    with pytest.raises(ValueError, match="'me/other' is neither a local folder nor a model"):
        merge_checkpoints(base, {"a": "me/other"}, "ties", tmp_path / "third")


def test_whole_or_not_at_all(folders, tmp_path, monkeypatch):
    base, experts = folders["llama_tied"]
    written = _checkpoints.CheckpointWriter.write
    calls = []

    def write(self, *args):
        calls.append(args)
        assert [file for file in os.listdir(tmp_path) if not file.startswith(".incomplete-")] == []
        if len(calls) > 20:
            raise OSError("No space left on device")
        return written(self, *args)

    monkeypatch.setattr(_checkpoints.CheckpointWriter, "write", write)
    with pytest.raises(OSError, match="No space left"):
        merge_checkpoints(base, experts, "average", tmp_path / "out")
    assert os.listdir(tmp_path) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"out' exists already; give a new or empty folder"):
        merge_checkpoints(base, experts, "average", tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["adapter_config.json"]


def rewrite(folder, target, change):
    """A checkpoint with changed tensors."""
    os.makedirs(target)
    tensors = {
        n: t.clone()
        for f in os.listdir(folder)
        if f.endswith(".safetensors")
        for n, t in load_file(f"{folder}/{f}").items()
    }
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(f"{folder}/config.json", target)
    return target


EMBEDDING = "model.embed_tokens.weight"
BROKEN = {
    "has 1 NaN or Inf": lambda tensors: tensors["model.norm.weight"][0].fill_(float("nan")),
    "has no 'model.norm.weight'": lambda tensors: tensors.pop("model.norm.weight"),
    "has 'more', which the base model has not": lambda tensors: tensors.update(more=torch.ones(2)),
    "has the type torch.int8": lambda tensors: tensors.update({"model.norm.weight": torch.ones(16, dtype=torch.int8)}),
    r"has shape \(3,\)": lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}),
    "are one tied tensor": lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING] + 1}),
    "has 70 tokens, the base model 64": lambda tensors: tensors.update({EMBEDDING: torch.ones(70, 16)}),
    "was not fine-tuned from this base": lambda tensors: [t.copy_(torch.randn(t.shape)) for t in tensors.values()],
}


@pytest.mark.parametrize("message", BROKEN)
def test_bad_experts(folders, tmp_path, message):
    base, experts = folders["llama_tied"]
    broken = rewrite(experts["a"], tmp_path / "broken", BROKEN[message])
    with pytest.raises(ValueError, match=f"Expert 'a'.*{message}"):
        merge_checkpoints(base, {"b": experts["b"], "a": broken}, "average", tmp_path / "out")
    assert not os.path.exists(tmp_path / "out")


def test_bad_folders_and_arguments(folders, bert, tmp_path):
    base, experts = folders["llama_tied"]

    def refused(message, base=base, experts=experts, method="average", output="out", **kwargs):
        with pytest.raises(ValueError, match=message):
            merge_checkpoints(base, experts, method, tmp_path / output, **kwargs)
        assert not os.path.exists(tmp_path / output)

    refused("no merging method 'tie'", method="tie")
    refused("'average' has no argument `density`; it takes no arguments", density=0.2)
    refused("`experts` is {}; give {task", experts={})
    refused("`files_from` is 'c', and the experts are b, a", files_from="c")
    refused("`files_from` is 'a', and 'emr' makes a model of each task", method="emr", files_from="a")
    refused("`dtype` is 'int8'; give float32", dtype="int8")
    refused("trained with model_type='bert', the base model has 'llama'", experts={"a": bert[0]})
    refused(r"out of torch.float16's range with `scale`=1000000000.0", scale=1e9, dtype="float16")
    for name, file in (("adapter", "adapter_config.json"), ("pickle", "pytorch_model.bin")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    refused("Expert 'a': .* is an adapter. Merge it into its base", experts={"a": tmp_path / "adapter"})
    refused(r"has 0 safetensors files .*pickled weights \(.bin, .pt\) are not read", experts={"a": tmp_path / "pickle"})
    (tmp_path / "pickle" / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    refused(r"model.safetensors in .*pickle' is missing or broken", experts={"a": tmp_path / "pickle"})
    (tmp_path / "index").mkdir()
    index = tmp_path / "index" / "model.safetensors.index.json"
    index.write_text('{"weights": []}')
    refused("Expert 'a': model.safetensors.index.json in .* is broken", experts={"a": tmp_path / "index"})
    index.write_text('{"weight_map": {"x": "../b/model.safetensors"}}')
    refused("names '../b/model.safetensors', which is no safetensors file beside it", experts={"a": tmp_path / "index"})
    (tmp_path / "config").mkdir()
    for settings in ("[]", '{"model_type": "llama", "hidden_size": "16"}'):
        (tmp_path / "config" / "config.json").write_text(settings)
        refused("Expert 'a': config.json in .* cannot be read", experts={"a": tmp_path / "config"})
    for task in ("../b", "/b", "", ".", "b/c", 1):
        refused("The task name .* is not allowed", experts={task: experts["a"]}, method="emr")
    for value in (float("nan"), float("inf"), "0.3", None):
        refused("`scale` is .*; give a number", scale=value)
    for size in ("abc", 0, -5):
        refused("`max_shard_size` is ", max_shard_size=size)
    refused("`density` is 0, and is a share", method="ties", density=0)
    refused("`min_tasks` is 3 and there are 2 tasks", method="consensus", min_tasks=3)
    refused("is between two tasks and got 1", experts={"a": experts["a"]}, method="slerp")
    refused(r"model.safetensors' is a file; give the folder", base=f"{base}/model.safetensors")
    refused(r"Expert 'a' is 'dict'; give a folder", experts={"a": {"path": experts["a"]}})
    refused(r"Expert 'a' is 'Linear'; .*Models in memory go to `peft_tint.merge`", experts={"a": torch.nn.Linear(2, 2)})
    refused("there is no folder", base={"id": base, "subfolder": "none"})
    quantised = rewrite(base, tmp_path / "quantised", lambda tensors: None)
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}})
    )
    refused("The base model is quantised", base=quantised)
    broken = rewrite(base, tmp_path / "nan", BROKEN["has 1 NaN or Inf"])
    refused("The base model's 'model.norm.weight' has NaN or Inf", base=broken)


@pytest.mark.parametrize("rows", [60, 70])
def test_common_vocabulary(folders, tmp_path, rows):
    base, experts = folders["llama_tied"]
    added = torch.randn(10, 16)

    def resize(tensors):
        tensors[EMBEDDING] = torch.cat([tensors[EMBEDDING], added.to(tensors[EMBEDDING])])[:rows].contiguous()

    other = rewrite(experts["a"], tmp_path / "other", resize)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    model = T.AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(ValueError, match=f"has {rows} tokens, the base model 64 .*`common_vocabulary=True`"):
        merge(model, {**experts, "a": other}, "task_arithmetic")
    with pytest.warns(UserWarning, match=f"{rows} tokens, the base model 64; the first {min(rows, 64)} are merged"):
        merged = merge(model, {**experts, "a": other}, "task_arithmetic", common_vocabulary=True)
        merge_checkpoints(base, {**experts, "a": other}, "task_arithmetic", tmp_path / "out", common_vocabulary=True)
    again, report = loaded("llama_tied", tmp_path / "out")
    torch.testing.assert_close(again.state_dict(), merged.state_dict(), rtol=0, atol=0)
    assert not any(report.values()) and again.config.vocab_size == 64
    plain = merge(model, experts, "task_arithmetic").state_dict()
    common = min(rows, 64)
    assert torch.equal(merged.state_dict()[EMBEDDING][:common], plain[EMBEDDING][:common])
    alone = merge(model, {"b": experts["b"]}, "task_arithmetic").state_dict()
    assert torch.equal(merged.state_dict()[EMBEDDING][common:], alone[EMBEDDING][common:])
    assert torch.isfinite(again(**IDS).logits).all()
    message = "the config and tokenizer of expert 'a', which it would get, are for others"
    with pytest.raises(ValueError, match=message), pytest.warns(UserWarning, match="are merged"):
        merge_checkpoints(base, {"a": other}, "average", tmp_path / "own", common_vocabulary=True, files_from="a")


def test_buffers_must_be_the_bases(folders, tmp_path):
    base, experts = folders["resnet"]
    merge_checkpoints(base, experts, "average", tmp_path / "out")
    merged, before = read(tmp_path / "out"), load_file(f"{base}/model.safetensors")
    running = [name for name in before if "running" in name or "batches" in name]
    assert running and all(torch.equal(merged[name], before[name]) for name in running)
    mean = next(name for name in before if "running_mean" in name)
    broken = rewrite(experts["a"], tmp_path / "broken", lambda tensors: tensors[mean].add_(1))
    with pytest.raises(ValueError, match=f"Expert 'a': the buffer '{mean}' differs"):
        merge_checkpoints(base, {"a": broken}, "average", tmp_path / "again")


def save(model, folder, **changes):
    """The model's folder, with a changed config."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize("method", ["dare", "emr"])  # one depends on the names of tensors, the other keeps heads
def test_every_architecture(architecture, tmp_path, method):
    """Also those whose tensors have other names in files than in memory."""
    base = architecture.build()
    experts = make_experts(base, ["b", "a"])
    for task, model in {"base": base, **experts}.items():
        model.load_state_dict(dict(base.named_buffers()), strict=False)
        if isinstance(base, T.PreTrainedModel):
            model.save_pretrained(tmp_path / task)
        else:
            (tmp_path / task).mkdir()
            save_model(model, tmp_path / task / "model.safetensors")
    folders = {task: tmp_path / task for task in experts}
    merge_checkpoints(tmp_path / "base", folders, method, tmp_path / "out", "20KB", scale=0.7)
    if not isinstance(base, T.PreTrainedModel):  # and its folder has no config
        merged = merge(base, experts, method, scale=0.7)
        for task in experts if method == "emr" else [""]:
            wanted = (merged[task] if task else merged).state_dict()
            again = read(tmp_path / "out" / task)
            torch.testing.assert_close(again, {name: wanted[name] for name in again}, rtol=1e-5, atol=1e-6)
        return
    load = type(base).from_pretrained
    merged = merge(load(tmp_path / "base"), folders, method, scale=0.7)
    for task in experts if method == "emr" else [""]:
        again, report = load(tmp_path / "out" / task, output_loading_info=True)
        assert not any(report.values())
        wanted = (merged[task] if task else merged).state_dict()
        torch.testing.assert_close(again.state_dict(), wanted, rtol=1e-5, atol=1e-6)


def test_a_tied_tensor_that_is_stored_twice_is_merged_once(folders, tmp_path):
    base, experts = folders["llama_tied"]
    twice = {"lm_head.weight": lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING].clone()})}
    other = rewrite(base, tmp_path / "base", twice["lm_head.weight"])
    for method in ("ties", "dare"):
        merge_checkpoints(base, experts, method, tmp_path / f"once_{method}")
        merge_checkpoints(other, experts, method, tmp_path / f"twice_{method}")
        once, both = read(tmp_path / f"once_{method}"), read(tmp_path / f"twice_{method}")
        assert torch.equal(both.pop("lm_head.weight"), both[EMBEDDING])
        torch.testing.assert_close(both, once, rtol=0, atol=0)


def test_files_of_an_expert_in_another_type(folders, tmp_path):
    base, experts = folders["bert"]  # in float32 and bfloat16, with heads of one shape
    merge_checkpoints(base, experts, "average", tmp_path / "out", files_from="a")
    merge_checkpoints(base, experts, "average", tmp_path / "same")
    torch.testing.assert_close(read(tmp_path / "out"), read(tmp_path / "same"), rtol=0, atol=0)


def test_a_model_that_transformers_does_not_know(folders, tmp_path):
    base, experts = folders["bert"]
    for architectures in (None, ["Trainer"], ["MyModel"], "BertModel"):
        unknown = save(AUTO["bert"].from_pretrained(base), tmp_path / "unknown", architectures=architectures)
        with pytest.raises(ValueError, match=r"none of them in transformers.*could not get its own head"):
            merge_checkpoints(unknown, experts, "emr", tmp_path / "out")
    with pytest.warns(UserWarning, match="all floats are merged alike"):
        merge_checkpoints(unknown, experts, "average", tmp_path / "out")


def test_one_file_goes_before_an_index(folders, tmp_path):
    base, experts = folders["llama_tied"]
    both = rewrite(experts["a"], tmp_path / "both", lambda tensors: None)
    (both / "model.safetensors.index.json").write_text('{"weight_map": {"x": "none.safetensors"}}')
    merge_checkpoints(base, {"a": both}, "average", tmp_path / "out")
    (both / "model.safetensors").rename(both / "1.safetensors")
    shutil.copy(both / "1.safetensors", both / "2.safetensors")
    files = {"weight_map": {"x": "1.safetensors", "y": "2.safetensors"}}
    (both / "model.safetensors.index.json").write_text(json.dumps(files))
    with pytest.raises(ValueError, match="is in two files"):
        merge_checkpoints(base, {"a": both}, "average", tmp_path / "again")


def test_kept_tensors_must_fit_the_type_too(folders, tmp_path):
    base, _ = folders["resnet"]
    large = rewrite(
        base, tmp_path / "large", lambda t: [x.fill_(1e5) for name, x in t.items() if "running_var" in name]
    )
    with pytest.raises(ValueError, match=r"running_var' is out of torch.float16's range; give another `dtype`"):
        merge_checkpoints(large, {"a": large}, "average", tmp_path / "out", dtype="float16")


def test_output_folders(folders, tmp_path, monkeypatch):
    """A link to an empty folder, an empty one, the working directory, and one below folders that are not there."""
    base, experts = folders["llama_tied"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "cwd").mkdir()
    os.symlink(tmp_path / "empty", tmp_path / "link")
    monkeypatch.chdir(tmp_path / "cwd")
    inode = os.stat(".").st_ino
    for output in ("../link", ".", "../some/where/"):
        merge_checkpoints(base, experts, "average", output, "9KB")
        _, report = loaded("llama_tied", output)
        assert not any(report.values()) and not any("incomplete" in name for name in os.listdir(output))
    assert os.stat(".").st_ino == inode and os.path.islink(tmp_path / "link")


def test_templates_and_nested_paths(folders, tmp_path):
    base, experts = folders["llama_tied"]
    source = rewrite(base, tmp_path / "source", lambda tensors: None)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    (source / "vocab.txt").mkdir()  # no file, whatever its name
    nested = {"backbone": {"_name_or_path": str(source), "kept": 1}}
    (source / "processor_config.json").write_text(json.dumps(nested))
    merge_checkpoints(source, experts, "average", tmp_path / "out")
    assert (tmp_path / "out" / "additional_chat_templates" / "tool.jinja").read_text() == "{{ x }}"
    assert json.loads((tmp_path / "out" / "processor_config.json").read_text()) == {"backbone": {"kept": 1}}
    assert not (tmp_path / "out" / "vocab.txt").exists()


def test_many_files_and_few_that_may_be_open(folders, tmp_path):
    resource = pytest.importorskip("resource")
    base, experts = folders["llama_tied"]
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 15, before[1]))
    try:
        merge_checkpoints(base, experts, "emr", tmp_path / "out", "2KB")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(os.listdir(tmp_path / "out" / "a")) > 10
