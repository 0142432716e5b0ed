"""python benchmarks/run.py benchmarks/configs/*.json --suite vision --model MODEL --data FOLDER
python benchmarks/run.py --report benchmarks/results/vision

Runs experiments on a suite of `suites.py`, and makes a table and a picture of their results, and the README's table. A
config has a "kind" and the arguments of it:

    "model"    {"of": "pretrained" or "experts"}
    "merge"    {"method": a name in MERGING_METHODS, and its arguments}
    "tint"     {"config": fields of TintConfig, "training": fields of TintTrainingArguments, "objective": its name}, and
               maybe "surgery": {"rank", "steps"}, which corrects the features of what was trained (arXiv:2402.02705);
               then the result has what was trained as "before_surgery", too
    "dts"      {arguments of `peft_tint.compress`}

The result of CONFIG.json goes to benchmarks/results/SUITE/CONFIG.json. It has for each seed: the accuracies on samples
that adaptation never saw; the CPU and wall seconds from the experts' folders to the finished model, all that is
computed of data and experts included, scoring not; the peak memory; and the bytes of what all tasks need. The seed
decides which half of the test data adapts, and in what order; the experts are the same. Each seed runs in a process of
its own, and is not run again where the result's file has it, of the same config, arguments, versions, and machine.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

if __name__ == "__main__":
    print("Loading PyTorch and transformers", flush=True)

import torch
from peft import get_peft_model
from report import report
from suites import SUITES, add_suite_arguments, collate, describe, prepare, set_defaults
from torch.utils.data import DataLoader

import peft_tint
from peft_tint import TintConfig, TintTrainer, TintTrainingArguments

RESULTS = Path(__file__).parent / "results"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", type=Path)
    parser.add_argument("--suite", choices=list(SUITES), default="vision")
    parser.add_argument("--report", type=Path, help="a folder of results, to make table and picture of")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)  # the file of one seed's result
    add_suite_arguments(parser)
    args = parser.parse_args()
    if args.report:
        report(args.report)
    elif args.into:
        args.into.write_text(json.dumps(Experiment(args, json.loads(args.configs[0].read_text())).result()))
    else:
        set_defaults(args)
        (RESULTS / args.suite).mkdir(parents=True, exist_ok=True)
        for path in args.configs:
            run(args, path, RESULTS / args.suite / path.name)


def run(args, path, file):
    part = file.with_suffix(".part")
    about = {"config": json.loads(path.read_text()), **describe(args)}
    seeds = {}
    if file.exists():
        *found, results = json.loads(file.read_text()).items()
        if dict(found) == about:
            seeds = {result["seed"]: result for result in results[1]}
    options = [value for value in sys.argv[1:] if not value.endswith(".json")]
    for seed in args.seeds:
        if seed in seeds:
            continue
        own = ["--seeds", str(seed), "--seed", str(seed), "--into", str(part)]
        subprocess.run([sys.executable, __file__, str(path), *options, *own], check=True)
        seeds[seed] = {"seed": seed, **json.loads(part.read_text())}
        part.unlink()
        in_order = [seeds[seed] for seed in sorted(seeds)]
        file.write_text(json.dumps({**about, "results": in_order}, indent=1) + "\n")
    means = [f"{seed['accuracy']['mean']:.4f} ({seed['cpu_s']:.0f} CPU s)" for _, seed in sorted(seeds.items())]
    print(f"{path.stem:24} {', '.join(means)}", flush=True)


class Experiment:
    """One config with one seed."""

    def __init__(self, args, config):
        self.args, self.config, self.suite = args, config, SUITES[args.suite]
        self.splits, self.base_folder, self.experts = prepare(args)
        self.further, self.curve, self.not_counted = {}, [], (0.0, 0.0)

    def result(self):
        self.started = time.process_time(), time.perf_counter()
        predict, size = getattr(self, f"_{self.config['kind']}")()
        return {**self.measured(predict, size), **self.further, **({"curve": self.curve} if self.curve else {})}

    def measured(self, predict, size):
        seconds = self.seconds()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        with self.beside_the_clock():
            accuracy = self.score(predict)
        return {"accuracy": accuracy, "cpu_s": seconds[0], "wall_s": seconds[1], "peak_mb": peak, "bytes": size}

    @contextmanager
    def beside_the_clock(self):
        before = time.process_time(), time.perf_counter()
        yield
        after = time.process_time(), time.perf_counter()
        self.not_counted = [n + a - b for n, a, b in zip(self.not_counted, after, before, strict=True)]

    def load_experts(self):
        return {task: self.load(folder) for task, folder in self.experts.items()}

    def load(self, folder):
        return self.suite.auto.from_pretrained(folder, **self.suite.load).eval()

    def seconds(self):
        """CPU and wall seconds without those of scoring."""
        now = time.process_time(), time.perf_counter()
        return [a - b - c for a, b, c in zip(now, self.started, self.not_counted, strict=True)]

    @torch.no_grad()
    def score(self, predict):
        """`predict(task, batch)` gives logits."""
        accuracy = {}
        for task, splits in self.splits.items():
            right = 0
            for batch in DataLoader(splits["eval"], 64, collate_fn=collate):
                labels = batch.pop("labels")
                right += (predict(task, batch).argmax(-1) == labels).sum().item()
            accuracy[task] = right / len(splits["eval"])
        return {**accuracy, "mean": sum(accuracy.values()) / len(accuracy)}

    # ---- kinds -------------------------------------------------------------------------------------------------------

    def _model(self):
        experts = self.load_experts()
        if self.config["of"] == "experts":
            return lambda task, batch: experts[task](**batch).logits, sum(map(bytes_of, experts.values()))
        return self.with_heads(dict.fromkeys(experts, self.load(self.base_folder)), experts)

    def _merge(self):
        experts = self.load_experts()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The head of expert")  # they are put on below
            merged = peft_tint.merge(self.load(self.base_folder), experts, **without_kind(self.config))
        return self.with_heads(merged if isinstance(merged, dict) else dict.fromkeys(experts, merged), experts)

    def with_heads(self, models, experts):
        """Each task's model with its expert's head."""
        heads = {task: expert.classifier for task, expert in experts.items()}

        def predict(task, batch):
            models[task].classifier = heads[task]
            return models[task](**batch).logits

        backbones = {id(model): bytes_of(model) - bytes_of(model.classifier) for model in models.values()}
        return predict, sum(backbones.values()) + sum(map(bytes_of, heads.values()))

    def _dts(self):
        experts = self.load_experts()
        model = self.load(self.base_folder)
        size = bytes_of(model) - bytes_of(model.classifier)
        for task, expert in experts.items():
            model = peft_tint.compress(model, expert, task, **without_kind(self.config))
        size += sum(t.nbytes for name, t in model.state_dict().items() if ".dts_" in name)

        def predict(task, batch):
            model.set_adapter(task)
            return model(**batch).logits

        return predict, size

    def _tint(self):
        config, args = self.config, self.args
        model = get_peft_model(self.load(self.base_folder), TintConfig(experts=self.experts, **config["config"]))
        adaptation = {task: split["adapt"].remove_columns("label") for task, split in self.splits.items()}
        settings = {"seed": args.seed, **config["training"]}
        arguments = TintTrainingArguments(os.path.join(args.experts, "out"), **settings)
        trainer = Timed(model, arguments, adaptation, objective=config["objective"], data_collator=collate)
        trainer.experiment = self

        def predict(task, batch):
            model.set_task(task)
            return trainer.rows.forward(task, batch).output.raw.float()

        trainer.predict, trainer.eval_dataset = predict, adaptation
        trainer.train()
        heads = sum(map(bytes_of, model.head_layers))
        backbone = bytes_of(self.load(self.base_folder)) - bytes_of(self.load(self.base_folder).classifier)
        if "surgery" in config:
            self.further["before_surgery"] = self.measured(predict, backbone + heads)
            return self.surgery(model, trainer, adaptation, **config["surgery"]), backbone + heads
        return predict, backbone + heads

    def surgery(self, model, trainer, adaptation, rank, steps):
        """f - W_up relu(W_down f) for each task, from the experts' features by their mean absolute difference."""
        parts = {}
        for task, data in adaptation.items():
            found = {"merged": [], "expert": []}
            with torch.no_grad():
                for batch in DataLoader(data, 64, collate_fn=collate):
                    model.set_task(task)
                    found["merged"].append(self.features(model, trainer, batch))
                    with model.expert(task):
                        found["expert"].append(self.features(model, trainer, batch))
            merged, expert = torch.cat(found["merged"]), torch.cat(found["expert"])
            torch.manual_seed(self.args.seed)
            down, up = (
                torch.nn.Linear(*shape, bias=False) for shape in ((merged.shape[1], rank), (rank, merged.shape[1]))
            )
            torch.nn.init.kaiming_uniform_(down.weight, 5**0.5)
            torch.nn.init.zeros_(up.weight)
            optimizer = torch.optim.Adam([down.weight, up.weight], 1e-3)
            for _ in range(steps):
                rows = torch.randint(len(merged), (32,))
                (merged[rows] - up(down(merged[rows]).relu()) - expert[rows]).abs().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            parts[task] = down, up

        def predict(task, batch):
            model.set_task(task)
            down, up = parts[task]
            features = self.features(model, trainer, batch)
            return model.head_layers[0](features - up(down(features).relu()))

        return predict

    def features(self, model, trainer, batch):
        found = []
        hook = model.head_layers[0].register_forward_pre_hook(lambda module, args: found.append(args[0].float()))
        trainer.rows.forward(model.task, batch)
        hook.remove()
        return found[0]


class Timed(TintTrainer):
    """Scores at the steps of `eval_steps`, beside the clock."""

    def _evaluate_state(self):
        experiment = self.experiment
        step, seconds = self.progress.step, experiment.seconds()
        with experiment.beside_the_clock():
            experiment.curve.append([step, seconds[0], experiment.score(self.predict)["mean"]])


def without_kind(config):
    return {key: value for key, value in config.items() if key != "kind"}


def bytes_of(module):
    return sum(tensor.nbytes for tensor in module.state_dict().values())


if __name__ == "__main__":
    main()
