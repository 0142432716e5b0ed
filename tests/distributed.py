"""accelerate launch tests/distributed.py FILE

What `test_training_elsewhere.py` runs in two processes, and by import in one. The first process writes its results to
FILE.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, disable_progress_bars
from models import ARCHITECTURES, SMALL, Architecture, make_experts, output, transformers_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForTokenClassification
from transformers.utils import logging

import peft_tint
from peft_tint import TintTrainer, TintTrainingArguments
from peft_tint.task_vectors import TaskVectors
from peft_tint.tint.merged_layer import MergedLayer

CLASSES = {"a": 2, "b": 4}
TOKENS = Architecture(transformers_model(BertForTokenClassification, BertConfig, vocab_size=64, **SMALL), {})


def make_model(architecture=TOKENS, **config):
    base = architecture.build()
    return peft_tint.from_experts(base, make_experts(base, CLASSES), **config)


def make_data(rows):
    """Sentences of various lengths with labels of their tokens."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 7, (rows, 1), generator=generator)
    mask = (torch.arange(6) < lengths).long()
    ids = torch.randint(2, 64, (rows, 6), generator=generator) * mask
    labels = torch.randint(0, 2, (rows, 6), generator=generator)
    columns = {"input_ids": ids.tolist(), "attention_mask": mask.tolist(), "labels": labels.tolist()}
    return {task: Dataset.from_dict(columns) for task in CLASSES}


def make_trainer(model, batch_size, **settings):
    objective = settings.pop("objective", "confident_pseudo_label")
    arguments = TintTrainingArguments(
        max_steps=7,
        per_device_train_batch_size=batch_size // PartialState(cpu=True).num_processes,
        per_device_eval_batch_size=4,
        adam_epsilon=1e-4,  # with the default a gradient that is nothing but rounding takes a whole step
        logging_steps=1,
        disable_tqdm=True,
        **settings,
    )
    return TintTrainer(model, arguments, make_data(24), make_data(11), objective)


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


TRAININGS = {
    "sequential": {"update": "sequential"},
    "joint": {"update": "joint"},
    "accumulated": {"update": "joint", "gradient_accumulation_steps": 2},
    "features": {"update": "sequential", "objective": "feature_l1"},
    "checkpointed": {"update": "joint"},
}


def ddp():
    """Trainings, an evaluation, and steps of a stream."""
    state, results = PartialState(cpu=True), {}
    for name, settings in TRAININGS.items():
        model = make_model(coefficient_init=0.2)
        if name == "checkpointed":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        trainer = make_trainer(model, 8, **settings)
        trainer.train()
        results[name] = {"parameters": trained(model), "log": trainer.log_history}
    results["evaluation"] = trainer.evaluate()

    trainer, data = make_trainer(make_model(), 8), make_data(8)["a"].with_format("torch")
    for task in ("a", "b", "a"):
        mine = slice(state.process_index, None, state.num_processes)
        trainer.step(task, {name: data[name][:][mine] for name in ("input_ids", "attention_mask")})
    results["stream"] = {"parameters": trained(trainer.model)}
    results["processes"] = state.num_processes
    if state.num_processes > 1:
        results["plain"] = plain_ddp(model)
    return results


SHARDED = {
    "task vectors": {},
    "transform": {"transform": "ties", "coefficient_init": "average", "granularity": "block"},
    "low rank": {"save_experts": "dts", "save_experts_kwargs": {"rank_ratio": 0.5}},
}


def sharded():
    """Trainings with task vectors in parts, what is merged afterwards, and the bytes of the task vectors."""
    state, results = PartialState(cpu=True), {}
    for name, config in SHARDED.items():
        model = make_model(**{"coefficient_init": 0.2, **config}, shard_task_vectors=True)
        layers = [module for module in model.modules() if isinstance(module, TaskVectors) and module.dense is not None]
        trainer = make_trainer(model, 8)
        trainer.train()
        results[name] = {
            "parameters": trained(model),
            "log": trainer.log_history,
            "evaluation": trainer.evaluate(),
            "entries": sum(layer.dense.numel() for layer in layers),
            "saved": model.peft_config["default"].to_dict()["shard_task_vectors"],
            "merged": model.merge_and_unload(task="b").state_dict(),
        }
    results["processes"] = state.num_processes
    return results


def plain_ddp(model):
    """torch's own wrapper, as other trainers use it: it sends no task vectors around."""
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    for task in CLASSES:
        model.set_task(task)
        wrapped(input_ids=torch.tensor(make_data(8)["a"]["input_ids"])).logits.square().mean().backward()
    layers = [m for m in model.modules() if isinstance(m, MergedLayer)]
    task_vectors = {id(b) for layer in layers for b in layer.tint_task_vectors.buffers()}
    return {
        "gradients": sum(p.grad is not None for p in model.parameters()),
        "task vectors": len(task_vectors),
        "task vectors sent": len(task_vectors & {id(buffer) for buffer in wrapped.modules_buffers}),
    }


def resuming():
    """Of trainings that were stopped and resumed, the files of the last checkpoint that are not those of one that never
    was, in each process; and the numbers of random states in a checkpoint."""
    from test_resuming import SETTINGS, differing_files, make_data, make_trainer, noisy, save_bert, stop_and_resume

    def transform(batch):
        torch.rand(state.process_index)  # so that processes come to other random states
        return noisy(batch)

    state, results = PartialState(cpu=True), {"different": {}}
    with state.main_process_first():
        bert = save_bert(Path("bert"))
    data = {task: dataset.with_transform(transform) for task, dataset in make_data(CLASSES).items()}
    for name in ("sequential", "best"):
        settings = SETTINGS[name]
        expected = make_trainer(bert, f"{name} straight", data=data, **settings)
        expected.train()
        updates = 2 if settings["update"] == "sequential" else 1
        for stops in ([2 * updates + 1], [5 * updates, 2 * updates]):
            folder = f"{name} {stops}"
            trainer = stop_and_resume(bert, folder, stops, data=data, **settings)
            same = trainer.log_history == expected.log_history
            same &= all(map(torch.equal, trained(trainer.model).values(), trained(expected.model).values()))
            different = [*differing_files(trainer, expected), *([] if same else ["training"])]
            results["different"][folder] = gather_object([different])
    random_states = json.loads(Path(f"{name} straight", "checkpoint-7", "random_states.json").read_text())
    results["random states"] = len({str(random_state["torch"]) for random_state in random_states})
    return results


def fsdp():
    """Outputs and gradients on half of a batch in each process; what merging says; trainings with a sharded base."""
    state, results = PartialState(cpu=True), {"errors": []}
    model = make_model(ARCHITECTURES["bert"]).eval()
    if state.num_processes > 1:
        mesh = init_device_mesh("cpu", (state.num_processes,))
        for layer in model.base_model.model.bert.encoder.layer:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    ids = torch.tensor(make_data(8)["a"]["input_ids"])[state.process_index :: state.num_processes]
    for task in CLASSES:
        model.set_task(task)
        logits = output(model, {"input_ids": ids})
        logits.square().mean().backward()
        results[f"logits {task}"] = logits.detach()
    results["gradients"] = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    results["coefficients"] = model.coefficients().values
    results["sharded"] = any(hasattr(p, "full_tensor") for p in model.parameters())
    for name, config in {"whole": {}, "parts": {"shard_task_vectors": True}}.items():
        tinted = make_model(coefficient_init=0.2, **config).eval()
        if state.num_processes > 1:
            trainable = {parameter for parameter in tinted.parameters() if parameter.requires_grad}
            for layer in tinted.base_model.model.bert.encoder.layer:
                fully_shard(layer, mesh=mesh, ignored_params=trainable)
            fully_shard(tinted, mesh=mesh, ignored_params=trainable)
        trainer = make_trainer(tinted, 8)
        trainer.train()
        results[f"trained {name}"] = {"parameters": trained(tinted), "evaluation": trainer.evaluate()}
    if state.num_processes > 1:
        train = make_trainer(model, 8).train
        for function in (model.merge_adapter, model.merge_and_unload, model.merge_backbone, train):
            try:
                function()
                results["errors"].append("none")
            except ValueError as error:
                results["errors"].append(str(error))
        model(input_ids=ids)  # goes on working
    return results


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    disable_progress_bars()
    results = {part.__name__: part() for part in (ddp, sharded, resuming, fsdp)}
    if PartialState(cpu=True).is_main_process:
        torch.save(results, sys.argv[1])
    PartialState(cpu=True).destroy_process_group()
    os._exit(0)  # threads of PyTorch's sometimes abort a process that ends the usual way
