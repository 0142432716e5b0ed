"""python benchmarks/mergekit_comparison.py --mergekit_python PYTHON --work FOLDER [--output ...]

Merging of checkpoints on disk, beside mergekit (https://github.com/arcee-ai/mergekit): CPU time, memory, and whether
the results are equal. PYTHON is the interpreter of a virtual environment of its own, made on Linux with

    python -m venv ENV && ENV/bin/pip install mergekit "torch==2.13.0"

FOLDER takes 7 GB: a Llama of 109.5M parameters and a ViT of 85.8M, each as a base and four experts in float32, with
random weights and random task vectors. Every merge is a process of its own with one thread, in turn by both tools, on
files in the page cache. CPU time is the process's (user and system) from call to return, with all of the tool imported
before by a merge of a tiny model; memory is the peak of the process's anonymous pages, polled from outside.
"""

import argparse
import gc
import json
import os
import platform
import select
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    print("Loading PyTorch and transformers", flush=True)

import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, ViTConfig, ViTForImageClassification

import peft_tint

# Both tools' settings of the same formula. mergekit trims every tensor by itself; over the whole model it cannot.
METHODS = {
    "task_arithmetic": {
        "mergekit": {
            "merge_method": "task_arithmetic",
            "of_each": {"weight": 0.3},
            "parameters": {"normalize": False},
        },
        "peft_tint": {"method": "task_arithmetic", "scale": 0.3},
    },
    "ties": {
        "mergekit": {
            "merge_method": "ties",
            "of_each": {"weight": 1.0, "density": 0.2},
            "parameters": {"normalize": True},
        },
        "peft_tint": {"method": "ties", "density": 0.2, "aggregate": "mean", "per_tensor": True},
    },
    "ties_whole_model": {
        "peft_tint": {"method": "ties", "density": 0.2, "aggregate": "mean", "per_tensor": False},
    },
}
EXPERTS = ["a", "b", "c", "d"]
TOLERANCE = 1e-6  # beyond which two results differ by more than the order of a float32 sum


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit_python", required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and results, made anew")
    parser.add_argument("--models", nargs="+", choices=["llama", "vit"], default=["llama", "vit"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--tools", nargs="+", choices=["peft_tint", "mergekit"], default=["peft_tint", "mergekit"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="benchmarks/results/mergekit_comparison.json")
    args = parser.parse_args()
    rows = []
    for model in args.models:
        for size in ("tiny", "full"):
            write_checkpoints(model, size, args)
        for method in args.methods:
            rows.append(compare(model, method, args))
            print(json.dumps(rows[-1]), flush=True)
        shutil.rmtree(args.work / model)
    config = {key: value for key, value in vars(args).items() if key not in ("output", "work", "mergekit_python")}
    result = {
        "config": config | {"experts": len(EXPERTS), "settings": {method: METHODS[method] for method in args.methods}},
        "versions": {library.__name__: library.__version__ for library in (torch, transformers, peft_tint)},
        "mergekit_versions": mergekit_versions(args),
        "machine": f"{platform.machine()}, 1 thread",
        "precision": "float32",
        "rows": rows,
    }
    with open(args.output, "w") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    print(table(rows))


def write_checkpoints(model, size, args):
    """A base and four experts in `work/model/size`: random weights, and a random task vector on every tensor."""
    torch.manual_seed(args.seed)
    base = build(model, size)
    tensors = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for name in ["base", *EXPERTS]:
        folder = args.work / model / size / name
        shutil.rmtree(folder, ignore_errors=True)
        if name != "base":
            base.load_state_dict({key: tensor + 1e-3 * torch.randn(tensor.shape) for key, tensor in tensors.items()})
        base.save_pretrained(folder)
        if model == "llama":  # mergekit copies it
            words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
            PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    os.sync()  # so that no measurement shares the machine with writing these


def build(model, size):
    if model == "llama":
        sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
        if size == "tiny":
            sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=16000, tie_word_embeddings=False, **sizes))
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    if size == "tiny":
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(num_labels=10, **sizes))


def compare(model, method, args):
    folder = args.work / model
    for file in (folder / "full").rglob("*.safetensors"):
        with open(file, "rb") as opened:  # into the page cache
            while opened.read(1 << 24):
                pass
    tools = [tool for tool in args.tools if tool in METHODS[method]]
    runs = {tool: [] for tool in tools}
    for repeat in range(args.repeats + 1):
        for tool in tools:
            run = measure(folder, tool, method, args)
            if repeat:  # the first warms up
                runs[tool].append(run)
    row = {"model": model, "method": method}
    for tool in tools:
        row[tool] = {key: statistics.median(run[key] for run in runs[tool]) for key in runs[tool][0]}
        row[tool] |= {f"{key}_of_runs": [run[key] for run in runs[tool]] for key in ("cpu_s", "peak_anonymous_mb")}
        row[tool] |= check_output(model, folder / "full" / "base", folder / tool)
    if len(tools) == 2:
        if all(row[tool]["tensors_written"] == row[tool]["tensors_of_base"] for tool in tools):  # the same work
            keys = ("cpu_s", "peak_anonymous_mb", "added_anonymous_mb")
            row["mergekit_over_peft_tint"] = {
                key: round(row["mergekit"][key] / row["peft_tint"][key], 2) for key in keys
            }
        row["difference"] = difference(folder / "peft_tint", folder / "mergekit")
    return row


def measure(folder, tool, method, args):
    """One merge into the fresh folder `folder/tool`, by `_timed_merge.py` in the tool's interpreter."""
    job = {"tool": tool, "settings": METHODS[method][tool]}
    for part, size, name in (("warm_up", "tiny", f"{tool}_tiny"), ("merge", "full", tool)):
        shutil.rmtree(folder / name, ignore_errors=True)
        experts = {expert: str((folder / size / expert).absolute()) for expert in EXPERTS}
        base, output = (str(path.absolute()) for path in (folder / size / "base", folder / name))
        job[part] = {"base": base, "experts": experts, "output": output}
    python = args.mergekit_python if tool == "mergekit" else sys.executable
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
    process = subprocess.Popen(
        [python, str(Path(__file__).with_name("_timed_merge.py")), json.dumps(job)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | one_thread | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        text=True,
        bufsize=1,
    )
    with process:
        before_cpu_s = next_number(process)
        before = peak = anonymous_mb(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        while not select.select([process.stdout], [], [], 0.005)[0]:
            peak = max(peak, anonymous_mb(process.pid))
        cpu_s = next_number(process)
    os.sync()
    return {
        "cpu_s": round(cpu_s, 2),
        "peak_anonymous_mb": round(peak, 1),
        "added_anonymous_mb": round(peak - before, 1),
        "imports_cpu_s": round(before_cpu_s, 2),
    }


def next_number(process):
    """The next line that is a number alone, past what the tool prints."""
    for line in process.stdout:
        if line.strip().replace(".", "", 1).isdigit():
            return float(line)
    raise RuntimeError(f"{process.args[0]} ended without a result, see above; run the warm-up merge by hand.")


def anonymous_mb(pid):
    with open(f"/proc/{pid}/status") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024 / 1e6
    return 0.0  # the process has just ended


def check_output(model, base, output):
    """How many of the base's tensors were written, and how many transformers misses when it loads the folder."""
    of_base, written = tensors_of(base), tensors_of(output)
    auto = LlamaForCausalLM if model == "llama" else ViTForImageClassification
    try:
        missing = len(auto.from_pretrained(output, output_loading_info=True)[1]["missing_keys"])
    except (OSError, ValueError, RuntimeError) as error:
        missing = f"{type(error).__name__} when it is loaded"
    return {"tensors_of_base": len(of_base), "tensors_written": len(of_base & written), "missing_when_loaded": missing}


def difference(first, second):
    """Over the tensors that both have: how far apart they are, and how many entries differ beyond `TOLERANCE`."""
    names = sorted(tensors_of(first) & tensors_of(second))
    furthest, entries, differing, most = 0.0, 0, 0, 0
    for name in names:
        apart = (read_tensor(first, name) - read_tensor(second, name)).abs()
        beyond = int((apart > TOLERANCE).sum())
        furthest, entries = max(furthest, apart.max().item()), entries + apart.numel()
        differing, most = differing + beyond, max(most, beyond)
    gc.collect()
    return {
        "tensors": len(names),
        "entries": entries,
        "max_abs": furthest,
        "entries_beyond_1e-6": differing,
        "share_beyond_1e-6": differing / entries,
        "most_in_one_tensor": most,
    }


def files_of(folder):
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            yield opened


def tensors_of(folder):
    return {name for opened in files_of(folder) for name in opened.keys()}


def read_tensor(folder, name):
    return next(opened.get_tensor(name) for opened in files_of(folder) if name in opened.keys())


def mergekit_versions(args):
    names = ["mergekit", "torch", "transformers", "safetensors", "pydantic"]
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    return json.loads(subprocess.run([args.mergekit_python, "-c", code], capture_output=True, check=True).stdout)


def table(rows):
    lines = [
        "| model | method | tool | CPU s | peak MB (added) | tensors written | missing when loaded |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for tool in ("peft_tint", "mergekit"):
            if of_tool := row.get(tool):
                memory = f"{of_tool['peak_anonymous_mb']:.0f} ({of_tool['added_anonymous_mb']:.0f})"
                written = f"{of_tool['tensors_written']} of {of_tool['tensors_of_base']}"
                cells = [row["model"], row["method"], tool, of_tool["cpu_s"], memory, written]
                lines.append("| " + " | ".join(map(str, [*cells, of_tool["missing_when_loaded"]])) + " |")
    lines += [
        "",
        "| model | method | tensors compared | largest difference | entries beyond 1e-6 |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if apart := row.get("difference"):
            beyond = f"{apart['entries_beyond_1e-6']} of {apart['entries']}"
            cells = [row["model"], row["method"], apart["tensors"], f"{apart['max_abs']:.1e}", beyond]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
