"""python benchmarks/vision_tint.py --model MODEL --data FOLDER [--output benchmarks/results/vision_tint.json]

Merges experts for several image classification tasks and compares the merged models on samples that adaptation never
saw: the vision suite of `suites.py`.
"""

import argparse
import time

from peft import get_peft_model
from suites import add_suite_arguments, collate, prepare, save_result
from transformers import AutoModelForImageClassification

from peft_tint import TintConfig, TintTrainer, TintTrainingArguments


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_suite_arguments(parser)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--tint_layers", nargs="+", help="compare only these, each with the head (or 'auto')")
    parser.add_argument("--output", default="benchmarks/results/vision_tint.json")
    args = parser.parse_args()
    splits, base_folder, experts = prepare(args)
    adaptation = {task: split["adapt"].remove_columns("label") for task, split in splits.items()}
    evaluation = {task: split["eval"] for task, split in splits.items()}

    k = len(experts)
    ours = {"max_steps": args.steps, "seed": args.seed}
    ada = {**ours, "update": "joint", "per_device_train_batch_size": 16}
    rows = {
        "pretrained": ({"coefficient_init": 0.0}, None, None),
        "average": ({"coefficient_init": 1 / k}, None, None),
        "task arithmetic 0.3": ({}, None, None),
        "AdaMerging (task-wise)": ({"tint_layer": [], "granularity": "model"}, "entropy", ada),
        "AdaMerging (layer-wise)": ({"tint_layer": []}, "entropy", ada),
        "Tint (pseudo-labels)": ({}, "pseudo_label", ours),
        "Tint": ({}, "confident_pseudo_label", ours),
    }
    if args.tint_layers:
        layers = {layer: layer if layer == "auto" else list({layer, "classifier"}) for layer in args.tint_layers}
        rows = {layer: ({"tint_layer": names}, "pseudo_label", ours) for layer, names in layers.items()}
    results = {}
    for name, (config, objective, arguments) in rows.items():
        base = AutoModelForImageClassification.from_pretrained(base_folder)
        model = get_peft_model(base, TintConfig(experts=experts, **config))
        arguments = TintTrainingArguments(output_dir=args.experts, bf16=True, **(arguments or {}))
        trainer = TintTrainer(model, arguments, adaptation, evaluation, objective or "entropy", data_collator=collate)
        wall, cpu = time.perf_counter(), time.process_time()
        if objective:
            trainer.train()
        seconds = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
        scores = trainer.evaluate()
        results[name] = {
            "accuracy": {task: scores[task]["accuracy"] for task in (*args.tasks, "mean")},
            "normalized_accuracy": {task: scores[task]["normalized_accuracy"] for task in (*args.tasks, "mean")},
            **seconds,
        }
        if config.get("tint_layer"):
            results[name]["tint_layer"] = model.peft_config["default"].tint_layer
        results["experts"] = {"accuracy": {task: scores[task]["expert_accuracy"] for task in (*args.tasks, "mean")}}
        print(name, {task: round(value, 3) for task, value in results[name]["accuracy"].items()}, seconds, flush=True)
    save_result(args, results)
    print(f"\n| method | {' | '.join(args.tasks)} | mean |\n|---|{'---|' * (len(args.tasks) + 1)}")
    for name, row in results.items():
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in row['accuracy'].values())} |")


if __name__ == "__main__":
    main()
