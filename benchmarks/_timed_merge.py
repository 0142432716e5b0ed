"""One merge by one tool in a process of its own, for `mergekit_comparison.py`, which reads its memory from outside.

Runs in the tool's own interpreter, so it imports nothing but that tool.
"""

import json
import sys
import time


def mergekit(base, experts, output, merge_method, of_each, parameters):
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    models = [{"model": folder, "parameters": of_each} for folder in experts.values()]
    config = {"merge_method": merge_method, "base_model": base, "models": models, "parameters": parameters}
    run_merge(MergeConfiguration.model_validate(config | {"dtype": "float32"}), output, MergeOptions(quiet=True))


def peft_tint(base, experts, output, method, **kwargs):
    from peft_tint import merge_checkpoints

    merge_checkpoints(base, experts, method, output, **kwargs)


def main():
    job = json.loads(sys.argv[1])
    merge = {"mergekit": mergekit, "peft_tint": peft_tint}[job["tool"]]
    merge(**job["warm_up"], **job["settings"])  # of a tiny model: whatever the tool imports is imported then
    started = time.process_time()
    print(f"\n{started}", flush=True)
    sys.stdin.readline()  # until the memory before the merge is read
    started = time.process_time()
    merge(**job["merge"], **job["settings"])
    print(f"\n{time.process_time() - started}", flush=True)


if __name__ == "__main__":
    main()
