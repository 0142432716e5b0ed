"""python benchmarks/tint_layers.py --model MODEL --data FOLDER [--output benchmarks/results/tint_layers.json]

Which layer to tint: the vision suite of `suites.py`, with the head alone and with one more layer.
"""

import argparse

if __name__ == "__main__":
    print("Loading PyTorch and transformers", flush=True)

from peft import get_peft_model
from suites import add_suite_arguments, collate, prepare, save_result
from transformers import AutoModelForImageClassification

from peft_tint import TintConfig, TintTrainer, TintTrainingArguments


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_suite_arguments(parser)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tint_layers", nargs="+", default=["classifier", "auto"], help="each with the head")
    parser.add_argument("--output", default="benchmarks/results/tint_layers.json")
    args = parser.parse_args()
    splits, base_folder, experts = prepare(args)
    adaptation = {task: split["adapt"].remove_columns("label") for task, split in splits.items()}
    evaluation = {task: split["eval"] for task, split in splits.items()}
    results = {}
    for layer in args.tint_layers:
        base = AutoModelForImageClassification.from_pretrained(base_folder)
        tint_layer = layer if layer == "auto" else list({layer, "classifier"})
        model = get_peft_model(base, TintConfig(experts=experts, tint_layer=tint_layer))
        arguments = TintTrainingArguments(
            output_dir=args.experts,
            max_steps=args.steps,
            head_steps=0,
            learning_rate=1e-2 if layer == "classifier" else 1e-3,
            lr_scheduler_type="constant",
            seed=args.seed,
        )
        trainer = TintTrainer(model, arguments, adaptation, evaluation, "pseudo_label", data_collator=collate)
        trainer.train()
        scores = trainer.evaluate()
        results[layer] = {
            "accuracy": {task: scores[task]["accuracy"] for task in (*args.tasks, "mean")},
            "tint_layer": model.peft_config["default"].tint_layer,
        }
        print(layer, results[layer], flush=True)
    save_result(args, results)


if __name__ == "__main__":
    main()
