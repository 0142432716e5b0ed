"""python benchmarks/save_experts.py --model MODEL --data FOLDER [--output benchmarks/results/save_experts.json]

What `save_experts="dts"` loses, on the vision suite of `suites.py`: accuracy of a Tint trained with the exact experts,
saved and loaded again, of one trained from the loaded experts alone, and of the experts of each; and the adapters'
bytes.
"""

import argparse
import os
import tempfile
import time

if __name__ == "__main__":
    print("Loading PyTorch and transformers", flush=True)

from peft import PeftModel, get_peft_model
from suites import add_suite_arguments, collate, prepare, save_result
from transformers import AutoModelForImageClassification

from peft_tint import TintConfig, TintTrainer, TintTrainingArguments

FILE = "adapter_model.safetensors"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_suite_arguments(parser)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.01, 0.03])
    parser.add_argument("--output", default="benchmarks/results/save_experts.json")
    args = parser.parse_args()
    splits, base_folder, experts = prepare(args)
    adaptation = {task: split["adapt"].remove_columns("label") for task, split in splits.items()}
    evaluation = {task: split["eval"] for task, split in splits.items()}

    def base():
        return AutoModelForImageClassification.from_pretrained(base_folder)

    def run(name, model, steps=0):
        """Trains for the steps, and notes the accuracies of the model and of its experts, and the CPU time."""
        recipe = {"head_steps": 0, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
        arguments = TintTrainingArguments(args.experts, steps or 1, seed=args.seed, **recipe)
        trainer = TintTrainer(model, arguments, adaptation, evaluation, "pseudo_label", data_collator=collate)
        started = time.process_time()
        if steps:
            trainer.train()
        seconds, scores = time.process_time() - started, trainer.evaluate()
        results[name] = {
            "accuracy": {task: scores[task]["accuracy"] for task in (*args.tasks, "mean")},
            "expert_accuracy": {task: scores[task]["expert_accuracy"] for task in (*args.tasks, "mean")},
            "train_cpu_s": seconds,
        }
        print(name, {task: round(value, 3) for task, value in results[name]["accuracy"].items()}, flush=True)

    results = {}
    with tempfile.TemporaryDirectory() as folder:
        reference = os.path.join(folder, "reference")
        model = get_peft_model(base(), TintConfig(experts=experts))
        run("Tint", model, args.steps)
        model.save_pretrained(reference)
        run("Tint, loaded by reference", PeftModel.from_pretrained(base(), reference))
        sizes = [os.path.getsize(os.path.join(expert, "model.safetensors")) for expert in experts.values()]
        results["Tint, loaded by reference"] |= {"bytes": size_of(reference), "experts_bytes": sum(sizes)}
        for budget in args.budgets:
            config = TintConfig(experts=experts, save_experts="dts", save_experts_kwargs={"budget": budget})
            started = time.process_time()
            model = get_peft_model(base(), config)
            seconds, untrained = time.process_time() - started, os.path.join(folder, f"untrained {budget}")
            model.save_pretrained(untrained)
            model.load_adapter(reference, "default")  # the coefficients and heads of the first
            saved = os.path.join(folder, f"trained {budget}")
            model.save_pretrained(saved)
            name = f"Tint, loaded with experts of {budget:.0%}"
            run(name, PeftModel.from_pretrained(base(), saved))
            results[name] |= {"bytes": size_of(saved), "compress_cpu_s": seconds}
            name = f"Tint, trained from experts of {budget:.0%}"
            run(name, PeftModel.from_pretrained(base(), untrained, is_trainable=True), args.steps)
    save_result(args, results)
    print(f"\n| model | adapter, MB | {' | '.join(args.tasks)} | mean |\n|---|{'---|' * (len(args.tasks) + 2)}")
    for name, row in results.items():
        size = f"{row['bytes'] / 1e6:.2f}" if "bytes" in row else ""
        print(f"| {name} | {size} | {' | '.join(f'{value:.3f}' for value in row['accuracy'].values())} |")
        print(f"| its experts | | {' | '.join(f'{value:.3f}' for value in row['expert_accuracy'].values())} |")


def size_of(folder):
    return os.path.getsize(os.path.join(folder, FILE))


if __name__ == "__main__":
    main()
