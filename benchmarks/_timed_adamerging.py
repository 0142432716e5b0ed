"""AdaMerging by one tool in a process of its own, for `fusionbench_comparison.py`.

Runs in the tool's own interpreter, so it imports nothing but that tool and what both build on.
"""

import json
import re
import sys
import threading
import time
from itertools import pairwise

import torch
from transformers import ViTForImageClassification

LEARNING_RATE, START = 1e-3, 0.3


def images(task, count):
    """One batch a task, the same in every step."""
    return torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(task))


def fusionbench(base, experts, steps, batch_size, clock):
    from fusion_bench import BaseModelPool
    from fusion_bench.method.adamerging.layer_wise_adamerging import LayerWiseAdaMergingAlgorithm
    from omegaconf import DictConfig

    def load(name):
        model = ViTForImageClassification.from_pretrained(base if name == "_pretrained_" else experts[name])
        heads[name] = model.classifier.requires_grad_(False)
        return model.vit  # what it merges; the heads stay the experts'

    class AdaMerging(LayerWiseAdaMergingAlgorithm):
        def get_shuffled_test_loader_iter(self, task):
            return iter([(batches[task],)])

        def compute_logits(self, module, images, task):
            return heads[task](module(pixel_values=images).last_hidden_state[:, 0])

        @property
        def fabric(self):
            fabric = super().fabric
            fabric.log_dict = lambda *args, **kwargs: clock()  # which it calls once a step
            return fabric

    heads, batches = {}, {task: images(index, batch_size) for index, task in enumerate(experts)}
    pool = BaseModelPool({"_pretrained_": {}, **{task: {} for task in experts}})
    pool.load_model = load
    settings = {"lr": LEARNING_RATE, "init_values": START, "optimizer": "adam", "max_steps": steps}
    settings |= {"weights": None, "clamp_weights": True, "tie_weights": True, "strict": False}
    algorithm = AdaMerging(DictConfig(settings))
    algorithm.modelpool = pool
    # what its `run` does, without the logger
    module = algorithm.test_time_adaptation(algorithm.construct_layer_wise_merged_model(pool))
    names = [name for name, _ in module.merge_and_unload().named_parameters()]
    return dict(zip(names, module.merge_weight.detach().t().tolist(), strict=True))


def peft_tint(base, experts, steps, batch_size, clock):
    from datasets import Dataset
    from peft import get_peft_model

    from peft_tint import TintConfig, TintTrainer, TintTrainingArguments

    config = TintConfig(experts=experts, tint_layer=[], granularity="tensor", coefficient_init=START)
    model = get_peft_model(ViTForImageClassification.from_pretrained(base), config)
    batches = {task: images(index, batch_size) for index, task in enumerate(experts)}
    data = {task: Dataset.from_dict({"index": list(range(batch_size))}) for task in experts}
    data = {
        task: part.with_transform(lambda rows, task=task: {"pixel_values": list(batches[task][rows["index"]])})
        for task, part in data.items()
    }
    arguments = TintTrainingArguments(
        max_steps=steps,
        update="joint",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        per_device_train_batch_size=batch_size,
        logging_steps=1,
        disable_tqdm=True,
        bf16=False,
    )
    TintTrainer(model, arguments, data, objective="entropy", callbacks=[lambda trainer, logs: clock()]).train()
    values, _, units = model.coefficients()
    return dict(zip((unit.removeprefix("vit.") for unit in units), values.t().tolist(), strict=True))


def anonymous_mb():
    with open("/proc/self/status") as file:
        return int(re.search(r"RssAnon:\s+(\d+)", file.read())[1]) / 1024


def main():
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    adamerging = {"fusionbench": fusionbench, "peft_tint": peft_tint}[job["tool"]]
    adamerging(**job["warm_up"], steps=1, batch_size=1, clock=int)  # so that all is imported
    before, peaks, times, done = anonymous_mb(), [], [], threading.Event()

    def watch():
        while not done.wait(0.02):
            peaks.append(anonymous_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        of_run = {"steps": job["steps"], "batch_size": job["batch_size"]}
        coefficients = adamerging(**job["run"], **of_run, clock=lambda: times.append(time.process_time()))
    finally:
        done.set()
        watcher.join()
    seconds = [b - a for a, b in pairwise(times)]  # the first step has what is done once, too
    print("\n" + json.dumps({"seconds": seconds, "peak_mb": max(peaks) - before, "coefficients": coefficients}))


if __name__ == "__main__":
    main()
