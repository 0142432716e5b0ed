import json
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import numpy as np
import pytest
import torch
import transformers as T
from datasets import ClassLabel, Dataset, DatasetDict
from hub_emulator import HubEmulator
from huggingface_hub import HfApi, constants
from models import ARCHITECTURES, CLIP, make_experts
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from PIL import Image
from processes import run_to_end
from safetensors.torch import load_file
from test_precision import AVX2
from test_save_merged import make_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

EXAMPLES = Path(__file__).parent.parent / "examples"
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["evaluate", "matplotlib.pyplot", "peft", "transformers.trainer"])
GLUE = {
    "cola": (("sentence",), 2),
    "sst2": (("sentence",), 2),
    "mrpc": (("sentence1", "sentence2"), 2),
    "stsb": (("sentence1", "sentence2"), 1),
    "qqp": (("question1", "question2"), 2),
    "mnli": (("premise", "hypothesis"), 3),
    "qnli": (("question", "sentence"), 2),
    "rte": (("sentence1", "sentence2"), 2),
}
METRICS = {
    "cola": ["matthews_correlation"],
    "mrpc": ["accuracy", "f1"],
    "qqp": ["accuracy", "f1"],
    "stsb": ["pearson", "spearman"],
}
PICTURES = ["accuracy", "coefficients", "cross_task_after", "cross_task_before", "similarity", "training"]


def run(script, *flags):
    """As a user runs it, in a process that has the libraries imported. Returns what it printed."""
    with TemporaryDirectory() as folder:
        files = [Path(folder) / "out", Path(folder) / "error"]
        for file in files:
            file.touch()
        script, flags = str(EXAMPLES / script), [str(flag) for flag in flags]
        process = FORKS.Process(target=_run, args=(dict(os.environ), files, script, flags))
        process.start()
        process.join(300)
        process.kill()
        out, error = (file.read_text() for file in files)
    assert process.exitcode == 0, error[-4000:]
    return out


def _run(environment, files, script, flags):
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY), number)
    os.environ.update(environment, OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    sys.argv, sys.path[0] = [script, *flags], os.path.dirname(script)
    runpy.run_path(script, run_name="__main__")


def start(script, *flags, launch=False, environment=None):
    """The same from nothing; `launch` in two processes on the CPU."""
    command = [sys.executable]
    if launch:
        settings = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
        command += ["-m", "accelerate.commands.launch", *settings.split(), "--main_process_port", "0"]
        environment = {"ACCELERATE_USE_CPU": "true"}
    paths = [str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **paths, **(environment or {})}
    command += [EXAMPLES / script, *flags]
    return run_to_end(command, env=environment)


def pairs(sources):
    return [f"{task}={source}" for task, source in sources.items()]


def make_rows(task, count):
    """Texts of the word "text." and others; the label is whether it is there, so that something can be learned."""
    columns, classes = GLUE[task]
    random = np.random.default_rng(len(task) + count)
    label = random.integers(max(classes, 2), size=count)
    rows = {
        name: [
            " ".join(["A"] * int(n) + ["text."] * int(i))
            for n, i in zip(random.integers(1, 6, count), label, strict=True)
        ]
        for name in columns
    }
    if classes == 1:
        return Dataset.from_dict({**rows, "label": (label + random.random(count)).tolist()})
    names = [f"class_{i}" for i in range(classes)]
    return Dataset.from_dict({**rows, "label": label.tolist()}).cast_column("label", ClassLabel(names=names))


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    """A tiny BERT with its tokenizer, an expert for each of the eight tasks, and their data as the Hub has them:
    ({task: expert}, {task: data}, base)."""
    folder = tmp_path_factory.mktemp("glue")
    torch.manual_seed(0)
    base = ARCHITECTURES["bert"].build()
    base.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    for task, expert in make_experts(base, {task: classes for task, (_, classes) in GLUE.items()}).items():
        expert.save_pretrained(folder / "experts" / task)
        matched = "_matched" if task == "mnli" else ""
        splits = {"train": make_rows(task, 32), f"validation{matched}": make_rows(task, 24)}
        DatasetDict({**splits, f"test{matched}": make_rows(task, 16)}).save_to_disk(folder / "data" / task)
    return {t: folder / "experts" / t for t in GLUE}, {t: folder / "data" / t for t in GLUE}, folder / "base"


def glue_flags(glue, output, *tasks, **more):
    experts, data, base = glue
    tasks = tasks or GLUE
    flags = ["--model_name_or_path", base, "--experts", *pairs({task: experts[task] for task in tasks})]
    flags += ["--data", *pairs({task: data[task] for task in tasks}), "--output_dir", output]
    more = {"max_steps": 2, "adamerging_steps": 2, "per_device_train_batch_size": 4, "disable_tqdm": True, **more}
    return [*flags, *(f"--{name}={value}" for name, value in more.items())]


def results(output):
    return json.loads((output / "results.json").read_text())["scores"]


def test_glue_merges_the_eight_tasks_by_name_and_scores_each_by_its_metric(glue, tmp_path):
    methods = ["pretrained", "ties", "emr", "supervised", "adamerging", "tint"]
    printed = run("glue/run_glue_tint.py", *glue_flags(glue, tmp_path), "--method", *methods)
    scores = results(tmp_path)
    assert list(scores) == ["experts", *methods]
    for method, of_tasks in scores.items():
        assert f"\n| {method} |" in printed
        assert list(of_tasks) == [*GLUE, "mean"]
        for task in GLUE:
            names = METRICS.get(task, ["accuracy"])
            assert {*names, "score"} <= of_tasks[task].keys()
            assert of_tasks[task]["score"] == pytest.approx(np.mean([of_tasks[task][name] for name in names]))
    assert all((tmp_path / f"{name}.png").stat().st_size > 1000 for name in PICTURES)
    adapter = PeftModel.from_pretrained(
        T.AutoModelForSequenceClassification.from_pretrained(glue[2]), tmp_path / "adapter"
    )
    assert adapter.tasks == list(GLUE) and len(adapter.task_labels("mnli")["id2label"]) == 3


def test_glue_of_two_processes_is_that_of_one(glue, tmp_path):
    """And a JSON file stands for flags, which replace what it says."""
    file = tmp_path / "arguments.json"
    experts, data, base = glue
    arguments = {"experts": {task: str(experts[task]) for task in ("mrpc", "stsb")}, "model_name_or_path": str(base)}
    arguments |= {"data": {task: str(data[task]) for task in arguments["experts"]}, "method": ["supervised", "tint"]}
    file.write_text(json.dumps({**arguments, "max_steps": 9, "disable_tqdm": True, "cross_task_samples": 0}))
    flags = [file, "--max_steps", "2"]
    run("glue/run_glue_tint.py", *flags, "--output_dir", tmp_path / "one", "--per_device_train_batch_size", 8)
    flags += ["--output_dir", tmp_path / "two", "--per_device_train_batch_size", 4]
    start("glue/run_glue_tint.py", *flags, launch=True)
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert list(one) == list(two) == ["experts", "supervised", "tint"]
    assert two["experts"] == one["experts"]
    for task in ("mrpc", "stsb"):  # by a step of Adam, which takes the sign of a gradient of zero for one
        assert two["tint"][task]["score"] == pytest.approx(one["tint"][task]["score"], abs=0.05)


def test_glue_resumes(glue, tmp_path):
    flags = glue_flags(glue, tmp_path, "sst2", "rte", max_steps=4, save_steps=2, cross_task_samples=0)
    flags += ["--method", "tint"]
    run("glue/run_glue_tint.py", *flags)
    shutil.rmtree(tmp_path / "checkpoint-4")
    whole = (tmp_path / "adapter").rename(tmp_path / "whole")
    written = (tmp_path / "checkpoint-2").stat().st_mtime_ns
    run("glue/run_glue_tint.py", *flags, "--resume_from_checkpoint", "last")
    assert (tmp_path / "checkpoint-2").stat().st_mtime_ns == written  # a training from the start writes it anew
    whole, resumed = (load_file(folder / "adapter_model.safetensors") for folder in (whole, tmp_path / "adapter"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# the client, about itself
@pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")
def test_glue_takes_base_and_experts_from_the_hub_and_pushes(glue, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    experts, data, base = glue
    with HubEmulator() as hub:
        api = HfApi(endpoint=hub.url, token=hub.token)
        for name, folder in {"base": base, **{task: experts[task] for task in ("sst2", "rte")}}.items():
            api.create_repo(f"me/{name}")
            api.upload_folder(repo_id=f"me/{name}", folder_path=folder)
        flags = ["--model_name_or_path", "me/base", "--experts", "sst2=me/sst2", "rte=me/rte", "--max_steps", 1]
        flags += ["--data", f"sst2={data['sst2']}", f"rte={data['rte']}", "--cross_task_samples", 0]
        flags += ["--method", "tint", "--output_dir", tmp_path / "out", "--push_to_hub", "--hub_model_id", "me/glue"]
        environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        start("glue/run_glue_tint.py", *flags, environment={**environment, "HF_HUB_CACHE": str(tmp_path / "cache")})
        files = hub.repositories["me/glue"].files()
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= files.keys()
    assert b"sst2" in files["README.md"] and str(tmp_path).encode() not in b"".join(files.values())


@pytest.mark.parametrize("kind, rank", [("texts", 4), ("images", 0)])
def test_experts_are_fine_tuned_and_then_merged(kind, rank, glue, tmp_path):
    """Full ones and LoRA adapters, from a file of data each (csv) and from a folder of images."""
    experts, vision = {}, kind == "images"
    base = make_vit(tmp_path / "base") if vision else glue[2]
    data = {"a": tmp_path / "a.csv", "b": tmp_path / "b.csv"}
    if vision:
        data = {
            task: make_images(tmp_path / task, names) for task, names in {"a": ["x", "y"], "b": ["u", "v", "w"]}.items()
        }
    else:
        make_rows("mnli", 40).cast_column("label", datasets.Value("string")).to_csv(data["a"])
        make_rows("stsb", 40).to_csv(data["b"])
    flags = ["--model_name_or_path", base, "--data", *pairs(data), "--lora_r", rank, "--max_steps", 2, "--use_cpu"]
    printed = run("finetune_experts.py", *flags, "--output_dir", tmp_path / "out", "--do_eval")
    assert "\na: " in f"\n{printed}"
    experts = {task: tmp_path / "out" / task for task in data}
    assert (experts["a"] / ("adapter_config.json" if rank else "config.json")).exists()
    script = "vision/run_vision_tint.py" if vision else "glue/run_glue_tint.py"
    flags = ["--model_name_or_path", base, "--data", *pairs(data), "--experts", *pairs(experts), "--max_steps", 2]
    run(script, *flags, "--output_dir", tmp_path / "merged", "--method", "average", "tint")
    scores = results(tmp_path / "merged")
    assert list(scores["tint"]) == ["a", "b", "mean"]
    # of average, whose model is a tint of the average, the experts are those of the base
    assert scores["average"]["a"]["expert_score"] == scores["experts"]["a"]["score"]


def make_vit(folder):
    ARCHITECTURES["vit"].build().save_pretrained(folder)
    T.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def make_images(folder, names):
    random = np.random.default_rng(0)
    label = random.integers(len(names), size=40)
    images = [Image.fromarray(np.uint8(random.integers(0, 120 + 60 * i, (20, 20, 3)))) for i in label]
    rows = Dataset.from_dict(
        {"image": images, "label": label.tolist()},
        datasets.Features({"image": datasets.Image(), "label": ClassLabel(names=names)}),
    )
    DatasetDict(rows.train_test_split(0.5, seed=0)).save_to_disk(folder)
    return folder


def test_glue_and_vision_run_without_anything_given(tmp_path):
    """The embedded data and models, hardly trained."""
    few = ["--cache_dir", tmp_path / "cache", "--finetune_steps", 0.03, "--max_steps", 1, "--disable_tqdm"]
    few += ["--max_adapt_samples", 32, "--max_eval_samples", 32, "--cross_task_samples", 0, "--method", "tint"]
    tasks = {"glue": ["movies", "nouns", "better", "rating"], "vision": ["digits", "letters", "shapes", "patterns"]}
    for kind in ("glue", "vision"):
        flags = [*few, "--output_dir", tmp_path / kind]
        flags[1] = tmp_path / f"{kind}_cache"
        run(f"{kind}/run_{kind}_tint.py", *flags)  # the tests have no Hub
        assert list(results(tmp_path / kind)["tint"]) == [*tasks[kind], "mean"]


def test_dense_runs(tmp_path):
    flags = ["--cache_dir", tmp_path / "cache", "--finetune_steps", 3, "--scenes", 24, "--max_steps", 2]
    printed = run("dense/run_dense_tint.py", *flags, "--output_dir", tmp_path / "out")
    for row in ("experts", "pretrained", "average", "task arithmetic", "coefficients alone", "tint"):
        assert f"\n| {row} |" in printed
    assert all((tmp_path / "out" / f"{name}.png").stat().st_size > 1000 for name in ("predictions", "training"))


# ---- language models -------------------------------------------------------------------------------------------------

CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <end> {% endfor %}"
CHAT += "{% if add_generation_prompt %}assistant {% endif %}"
WORDS = [
    "<end>",
    "<unk>",
    "user",
    "assistant",
    "A",
    "B",
    "C",
    "yes",
    "no",
    "a:",
    "b:",
    "c:",
    "d:",
    "sentiment:",
    "kind:",
]


def make_language_model(folder):
    """A tiny Llama with a tokenizer of words and a chat template."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = T.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    ARCHITECTURES["llama_tied"].build().save_pretrained(folder)
    return tokenizer


def chat(content, answer):
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def make_language_data(folder, kind):
    """Whether there is an A: as a chat, one of several turns, a prompt with its completion, or a text with a label."""
    random = np.random.default_rng(0)
    contents = [" ".join(random.choice(["A", "B", "C"], random.integers(1, 5))) for _ in range(24)]
    answers = ["yes" if "A" in content else "no" for content in contents]
    rows = {
        "chats": {"messages": [[*chat("B", "no"), *chat(*both)] for both in zip(contents, answers, strict=True)]},
        "completions": {"prompt": contents, "completion": [f" {answer}" for answer in answers]},
        "prompts of chats": {
            "prompt": [chat(content, "")[:1] for content in contents],
            "completion": [chat("", answer)[1:] for answer in answers],
        },
        "labels": {"text": contents, "label": answers},
    }[kind]
    DatasetDict(Dataset.from_dict(rows).train_test_split(0.5, seed=0)).save_to_disk(folder)


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """A tiny language model, and a LoRA expert and data of each kind: (base, {task: expert}, {task: data})."""
    folder = tmp_path_factory.mktemp("language")
    make_language_model(folder / "base")
    experts, data = {}, {}
    for task, kind in zip("abcd", ("chats", "completions", "prompts of chats", "labels"), strict=True):
        model = T.AutoModelForCausalLM.from_pretrained(folder / "base")
        adapter = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
        with torch.no_grad():
            for name, parameter in adapter.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.5)
        experts[task], data[task] = folder / task, folder / f"{task}_data"
        adapter.save_pretrained(experts[task])
        make_language_data(data[task], kind)
    return folder / "base", experts, data


def language_flags(language, output):
    base, experts, data = language
    flags = ["--model_name_or_path", base, "--experts", *pairs(experts), "--data", *pairs(data), "--disable_tqdm"]
    return [*flags, "--max_steps", 2, "--per_device_train_batch_size", 4, "--output_dir", output]


def test_experts_of_language_models_are_merged(language, tmp_path):
    methods = ["pretrained", "ties", "emr", "tint_coefficients", "tint"]
    printed = run("llm/run_llm_tint.py", *language_flags(language, tmp_path), "--method", *methods)
    assert printed.startswith("Loading PyTorch and transformers\n")
    scores = results(tmp_path)
    assert list(scores) == ["experts", *methods]
    for method, of_tasks in scores.items():
        assert f"\n| {method} |" in printed and printed.count(f"\n  {method:18} '") == 4
        assert list(of_tasks) == ["a", "b", "c", "d", "mean"]
    assert all((tmp_path / f"{name}.png").stat().st_size > 1000 for name in PICTURES if "cross" not in name)
    base = T.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    merged = PeftModel.from_pretrained(base, tmp_path / "merged", subfolder="tint").eval()
    base = T.AutoModelForCausalLM.from_pretrained(language[0])
    tint = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = T.AutoTokenizer.from_pretrained(tmp_path / "adapter")("A B C", return_tensors="pt")["input_ids"]
    for task in "abcd":
        for model in (tint, merged):
            model.set_task(task)
        with torch.no_grad():
            torch.testing.assert_close(merged(input_ids=ids).logits, tint(input_ids=ids).logits)


def test_scores_are_exact_matches_of_what_is_generated(language, tmp_path):
    """By two processes as by one, also where the answers' tokens are all that is compared."""
    flags = [*language_flags(language, tmp_path / "one"), "--method", "average"]
    run("llm/run_llm_tint.py", *flags)
    flags[flags.index(tmp_path / "one")] = tmp_path / "two"
    start("llm/run_llm_tint.py", *flags, launch=True)
    assert results(tmp_path / "one") == results(tmp_path / "two")
    base, experts, data = language
    sys.path[:0] = [str(EXAMPLES / "llm"), str(EXAMPLES)]
    from _answers import load_tokenizer, split_row, to_rows
    from _common import load_splits

    tokenizer = load_tokenizer(base)
    for task, expert in experts.items():
        model = PeftModel.from_pretrained(T.AutoModelForCausalLM.from_pretrained(base), expert).eval()
        rows, right = to_rows(load_splits(str(data[task]))["eval"], tokenizer, task, 512), []
        for prompt, answer in map(split_row, rows):
            assert tokenizer.decode(answer) in ("yes <end>", "no <end>")
            output = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=len(answer), do_sample=False)
            right.append(output[0, len(prompt) :].tolist() == answer)
        assert results(tmp_path / "one")["experts"][task]["score"] == pytest.approx(np.mean(right))


def test_no_label_of_rows_that_adapt_is_read(language):
    sys.path[:0] = [str(EXAMPLES / "llm"), str(EXAMPLES)]
    from _answers import load_tokenizer, to_rows
    from _common import load_splits

    split, tokenizer = load_splits(str(language[2]["d"]))["adapt"], load_tokenizer(language[0])
    rows = to_rows(split, tokenizer, "d", 512, labelled=False)
    other = split.map(lambda row: {"label": 1 - row["label"]})
    assert rows.to_dict() == to_rows(other, tokenizer, "d", 512, labelled=False).to_dict()
    assert rows.to_dict() != to_rows(other, tokenizer, "d", 512).to_dict()


def test_embedded_experts_of_a_language_model_are_made_once(tmp_path):
    """Here of another base, for that of the package is large."""
    make_language_model(tmp_path / "cache" / "base")
    flags = ["--cache_dir", tmp_path / "cache", "--finetune_steps", 0.04, "--max_steps", 1, "--disable_tqdm"]
    flags += ["--max_adapt_samples", 16, "--max_eval_samples", 16, "--method", "tint", "--output_dir", tmp_path / "out"]
    for first in (True, False):
        printed = run("llm/run_llm_tint.py", *flags)
        assert printed.count("first run only") == 3 * first
    assert list(results(tmp_path / "out")["tint"]) == ["sentiment", "kind", "mood", "mean"]


# ---- CLIP ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny CLIP, experts of its image encoder, and data: (folder, {task: expert}, {task: data})."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    model = T.CLIPModel(T.CLIPConfig(**CLIP)).eval()
    model.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    T.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "base")
    experts, data = {}, {}
    for task, names in {"a": ["A", "text."], "b": ["A", "text.", "A text."]}.items():
        with torch.no_grad():
            for parameter in model.vision_model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape))
        experts[task], data[task] = folder / task, make_images(folder / f"{task}_data", names)
        model.vision_model.save_pretrained(experts[task])
    return folder / "base", experts, data


def test_clip_experts_have_zero_shot_heads(clip, tmp_path):
    """The logits of an expert under its head are those of CLIP itself for its class names in the template."""
    base, experts, data = clip
    flags = ["--model_name_or_path", base, "--experts", *pairs(experts), "--data", *pairs(data), "--templates", "A {}"]
    run("vision/run_vision_tint.py", *flags, "--output_dir", tmp_path, "--max_steps", 2, "--method", "ties", "tint")
    assert list(results(tmp_path)["tint"]) == ["a", "b", "mean"]
    sys.path[:0] = [str(EXAMPLES / "vision"), str(EXAMPLES)]
    from run_vision_tint import ClipForZeroShot

    ours = ClipForZeroShot.from_pretrained(tmp_path / "zero_shot" / "b").eval()
    theirs = T.CLIPModel.from_pretrained(base).eval()
    theirs.vision_model.load_state_dict(T.CLIPVisionModel.from_pretrained(experts["b"]).state_dict())
    pixels = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    texts = make_tokenizer()(["A A", "A text.", "A A text."], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = theirs(pixel_values=pixels, **texts).logits_per_image
        torch.testing.assert_close(ours(pixels).logits, expected, rtol=1e-4, atol=1e-4)
    assert PeftConfig.from_pretrained(tmp_path / "adapter").tasks == ["a", "b"]


@pytest.mark.parametrize("count", [8, 14, 20])
def test_clip_configs_name_the_papers_tasks_with_all_that_they_need(count):
    """Each has an expert, data and templates, and the smaller are in the larger."""
    configs = {n: json.loads((EXAMPLES / "vision" / "configs" / f"clip_{n}.json").read_text()) for n in (8, 14, 20)}
    config = configs[count]
    tasks = list(config["experts"])
    assert len(set(tasks)) == count and tasks == list(configs[20]["experts"])[:count]
    assert tasks == list(config["data"]) == list(config["templates"])
    assert all("{}" in text for texts in config["templates"].values() for text in texts)
    assert config["class_names"].keys() <= config["experts"].keys()


def test_a_file_with_an_unknown_argument_is_refused(tmp_path):
    (tmp_path / "arguments.yaml").write_text("max_step: 3\n")
    with pytest.raises(AssertionError, match=r"has 'max_step', which is no argument of run_glue_tint\.py"):
        run("glue/run_glue_tint.py", tmp_path / "arguments.yaml")


@pytest.mark.parametrize("parts", [("train", "validation", "test"), ("train", "test"), ("train",), ("test",)])
def test_rows_that_adapt_are_never_scored(parts, tmp_path):
    """Nor fine-tuned on, whatever splits there are."""
    sys.path.insert(0, str(EXAMPLES))
    from _common import load_splits

    rows = {
        part: Dataset.from_dict({"text": [f"{part} {i}" for i in range(10)], "label": [0, 1] * 5}) for part in parts
    }
    DatasetDict(rows).save_to_disk(tmp_path / "data")
    splits = {part: split for part, split in load_splits(str(tmp_path / "data")).items() if split is not None}
    texts = [text for split in splits.values() for text in split["text"]]
    assert len(texts) == len(set(texts)) == 10 * len(parts)
    assert {"adapt", "eval"} <= splits.keys()
    assert ("train" in splits) == ("train" in parts)


def test_quickstart(tmp_path):
    """As a user runs it, with experts hardly trained: table, pictures, adapter, reload in a fresh process, pipeline.
    The first time as on a processor that emulates bfloat16, in a process of its own with a time limit."""
    flags = ["--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache", "--finetune_steps", "0.02"]
    flags += ["--rows", 64, "--max_steps", 2]
    written = []
    for first in (True, False):
        if first:
            command, environment = (
                [sys.executable, EXAMPLES / "quickstart.py", *flags],
                {"OMP_NUM_THREADS": "1", **AVX2},
            )
            printed = run_to_end(command, env={**os.environ, **environment}, stderr=subprocess.STDOUT)
            assert printed.startswith("Loading PyTorch and transformers\nFour experts and their merges, in float32\n")
            assert printed.count("on cpu in float32") == 2  # AdaMerging and Tint
        else:
            printed = run("quickstart.py", *flags)
        for row in ("pretrained", "experts", "average", "task arithmetic 0.3", "AdaMerging", "Tint"):
            assert f"\n{row}" in printed
        assert "gives equal logits for every task" in printed
        assert "roofs' -> " in printed
        written.append({folder: folder.stat().st_mtime_ns for folder in (tmp_path / "cache").iterdir()})
    assert len(written[0]) == 5 and written[1] == written[0]  # the base and the experts are made once
    for file in ("coefficients.png", "accuracy.png", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "out" / file).stat().st_size > 1000


def test_data_is_small_and_its_licences_lie_beside_it():
    files = [path for path in (EXAMPLES / "data").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5e6
    assert {"README.md", "LICENSE.vaderSentiment", "LICENSE.WordNet"} <= {path.name for path in files}
