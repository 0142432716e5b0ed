"""python benchmarks/collapse.py --model MODEL --data FOLDER [--output benchmarks/results/collapse.json]

Entropy minimisation on the vision suite of `suites.py`, from task arithmetic at 0.3, without and with `collapse_guard`:
accuracy before and after, the log, and the CPU time of a step. `confident_pseudo_label` with the guard shows that it
leaves a training alone which goes well.
"""

import argparse
import time

if __name__ == "__main__":
    print("Loading PyTorch and transformers", flush=True)

from peft import get_peft_model
from suites import add_suite_arguments, collate, prepare, save_result
from transformers import AutoModelForImageClassification

from peft_tint import TintConfig, TintTrainer, TintTrainingArguments

GUARD = 0.1
TRAININGS = {
    "entropy, heads and coefficients": ({}, "entropy", {"learning_rate": 1e-2}),
    "entropy, coefficients, learning rate 0.1": ({"tint_layer": []}, "entropy", {"learning_rate": 0.1}),
    "confident pseudo-labels, heads and coefficients": ({}, "confident_pseudo_label", {"learning_rate": 1e-2}),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_suite_arguments(parser)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", default="benchmarks/results/collapse.json")
    args = parser.parse_args()
    splits, base_folder, experts = prepare(args)
    adaptation = {task: split["adapt"].remove_columns("label") for task, split in splits.items()}
    evaluation = {task: split["eval"] for task, split in splits.items()}

    results, lines = {}, ["| training | start | end | guarded | stopped at | back to |", "|---|---|---|---|---|---|"]
    for name, (config, objective, settings) in TRAININGS.items():
        row = results[name] = {"config": config, "objective": objective, **settings}
        for guard in (None, GUARD):
            model = AutoModelForImageClassification.from_pretrained(base_folder)
            model = get_peft_model(model, TintConfig(experts=experts, **config))
            arguments = TintTrainingArguments(
                max_steps=args.steps,
                head_steps=0,
                lr_scheduler_type="constant",
                seed=args.seed,
                collapse_guard=guard,
                **settings,
            )
            trainer = TintTrainer(model, arguments, adaptation, evaluation, objective, data_collator=collate)
            if guard is None:
                row["start"] = accuracies(trainer)
            else:  # the experts' outputs are there by now
                row["guard"] = guard
            started, kind = time.process_time(), "end" if guard is None else "guarded"
            trainer.train()
            row[f"{kind}_cpu_s_per_step"] = (time.process_time() - started) / trainer.log_history[-1]["step"]
            row[kind], row[f"{kind}_log"] = accuracies(trainer), trainer.log_history
            print(name, kind, row[kind], row[f"{kind}_cpu_s_per_step"], trainer.log_history[-1], flush=True)
        last = row["guarded_log"][-1]
        means = " | ".join(f"{row[kind]['mean']:.3f}" for kind in ("start", "end", "guarded"))
        lines.append(f"| {name} | {means} | {last['step']} | {last.get('best_step', '-')} |")
    save_result(args, results)
    print("\n".join(lines))


def accuracies(trainer):
    return {task: metrics["accuracy"] for task, metrics in trainer.evaluate().items()}


if __name__ == "__main__":
    main()
