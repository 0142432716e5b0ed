"""A TINT model under other trainers, torch.compile, gradient checkpointing, several processes and quantised bases."""

import copy
import os
import sys
from itertools import chain
from pathlib import Path

import distributed
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset
from filelock import FileLock
from models import ARCHITECTURES, IDS, IMAGE, SMALL, Architecture, make_experts, output, transformers_model
from peft import LoraConfig, PeftModel, get_peft_model
from processes import run_to_end
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BeitConfig,
    BeitForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import peft_tint
from peft_tint import TintConfig, TintTrainer, TintTrainingArguments
from peft_tint.training import trainer as trainer_module

CLASSES = {"a": 2, "score": 3, "b": 5}
HOLDS_PARAMETERS = pytest.param(
    *("plain_transformer", "full"),
    marks=pytest.mark.xfail(
        torch.__version__ < torch.torch_version.TorchVersion("2.13"),
        reason="Dynamo up to 2.12 does not trace `del` on a module's `__dict__`",
    ),
)
BEIT = Architecture(  # its layers hold parameters of their own and are checkpointed
    transformers_model(
        BeitForImageClassification, BeitConfig, image_size=32, patch_size=8, layer_scale_init_value=0.5, **SMALL
    ),
    IMAGE,
)
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")


def load(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


def lora_experts(base):
    experts = {}
    for task in ("a", "b"):
        model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=["query", "value"]))
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.2)
        experts[task] = model.eval()
    return experts


def make_model(architecture, kind="full", layers=2, **config):
    base = architecture.build(num_hidden_layers=layers)
    experts = make_experts(base, ["a", "b"]) if kind == "full" else lora_experts(base)
    return peft_tint.from_experts(base, experts, coefficient_init=0.3, **config).eval()


def outputs_and_gradients(model, forward, inputs):
    """Of every task, all gradients together."""
    model.zero_grad(set_to_none=True)
    outputs = []
    for task in model.tasks:
        model.set_task(task)
        outputs.append(output(forward, inputs))
        outputs[-1].square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return [value.detach() for value in outputs], gradients


# ---- transformers.Trainer --------------------------------------------------------------------------------------------


class Stop(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = True


def test_transformers_trainer_trains_saves_and_resumes(bert, tmp_path):
    """Experts are folders. Stopped after a checkpoint and resumed from it is as never stopped, and it loads anew."""
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(2, 64, (24, 6), generator=generator), torch.arange(24) % CLASSES["b"]
    data = Dataset.from_dict({"input_ids": ids.tolist(), "label": labels.tolist()})

    def train(folder, callbacks=(), resume=None):
        model = get_peft_model(load(bert[0]), TintConfig(experts=bert[1], coefficient_init=0.1))
        model.set_task("b")
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        settings = TrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=6,
            save_steps=3,
            logging_steps=1,
            learning_rate=0.01,
            seed=1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, settings, train_dataset=data, eval_dataset=data, callbacks=list(callbacks))
        trainer.train(resume_from_checkpoint=resume)
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        return model.eval(), trainer, changed

    straight, trainer, changed = train("straight")
    trained_parts = ("tint_coefficients", "modules_to_save.default.copies.b_task")
    assert changed and all(any(part in name for part in trained_parts) for name in changed)
    assert any("b_task" in name for name in changed)  # the other tasks' heads stood still
    with torch.no_grad():
        logits = straight(ids).logits
        assert logits.shape == (24, CLASSES["b"])
    expected = nn.functional.cross_entropy(logits, labels)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)

    train("stopped", [Stop()])
    resumed, *_ = train("stopped", resume=str(tmp_path / "stopped" / "checkpoint-3"))
    loaded = PeftModel.from_pretrained(load(bert[0]), str(tmp_path / "straight" / "checkpoint-6")).eval()
    for task in CLASSES:
        straight.set_task(task)
        with torch.no_grad():
            for other in (resumed, loaded):
                other.set_task(task)
                assert torch.equal(other(**IDS).logits, straight(**IDS).logits), task


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo about itself
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
@pytest.mark.parametrize("name, kind", [("bert", "full"), ("bert", "lora"), HOLDS_PARAMETERS])
def test_compiled_whole(name, kind):
    """`fullgraph` allows no graph break. A compiled model follows coefficients and tasks as they change."""
    inputs, tint_layer = ARCHITECTURES[name].inputs, {"bert": "classifier", "plain_transformer": "fc"}[name]
    model = make_model(ARCHITECTURES[name], kind, layers=1, tint_layer=tint_layer)
    if name == "bert":
        inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for coefficient in (0.3, 0.6):
        model.set_coefficients(coefficient)
        outputs, gradients = outputs_and_gradients(model, model, inputs)
        outputs_compiled, gradients_compiled = outputs_and_gradients(model, compiled, inputs)
        torch.testing.assert_close(outputs_compiled, outputs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradients_compiled, gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo about itself
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
@pytest.mark.parametrize("tint_layer", ["classifier", "bert.pooler"])
def test_tasks_share_one_compilation(tint_layer):
    """And so do experts: Dynamo gives up after eight."""
    base, graphs = ARCHITECTURES["bert"].build(num_hidden_layers=1), []
    experts = make_experts(base, list("abcdefghij"))
    model = peft_tint.from_experts(base, experts, tint_layer=tint_layer).eval()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    for task in model.tasks:
        model.set_task(task)
        torch.testing.assert_close(output(compiled, IDS), output(model, IDS))
    assert len(graphs) == 1
    with torch.no_grad():
        for task, expert in experts.items():
            with model.expert(task):
                torch.testing.assert_close(output(compiled, IDS), output(expert, IDS), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 2


# ---- gradient checkpointing ------------------------------------------------------------------------------------------


def count_calls(model):
    """Calls of a linear layer in the first block, which is called again in the backward where that is checkpointed."""
    calls = []
    inner = next(m for n, m in model.named_modules() if ".0." in n and type(m) is nn.Linear)
    inner.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("case", ["full", "lora", "beit"])
def test_gradient_checkpointing(case, reentrant):
    architecture = BEIT if case == "beit" else ARCHITECTURES["bert"]
    model = make_model(architecture, "lora" if case == "lora" else "full")
    calls = count_calls(model)
    for module in model.modules():  # transformers checkpoints in training mode only
        module.training = True
        for name in {"p", "dropout_prob", "attention_dropout", "drop_prob"} & vars(module).keys():
            setattr(module, name, 0.0)
    _, expected = outputs_and_gradients(model, model, architecture.inputs)
    once = len(calls)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    _, gradients = outputs_and_gradients(model, model, architecture.inputs)
    assert len(calls) == 3 * once  # so it was on
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["bert", "beit"])
def test_trainer_checkpoints_with_dropout_off(case, tmp_path):
    """The trainer's model is in evaluation mode, in which transformers would not checkpoint."""
    architecture = BEIT if case == "beit" else ARCHITECTURES["bert"]
    arguments = TintTrainingArguments(output_dir=str(tmp_path))
    parameters, calls = [], []
    for enabled in (False, True):
        model = make_model(architecture)
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        calls.append(count_calls(model))
        trainer = TintTrainer(model, arguments)
        trainer.step("a", architecture.inputs)
        trainer.step("b", architecture.inputs)
        parameters.append(distributed.trained(model))
        assert not any(module.training for module in model.modules())
    torch.testing.assert_close(parameters[1], parameters[0], rtol=0, atol=1e-6)
    assert len(calls[1]) == 6 and len(calls[0]) == 4  # expert, forward, and again in the backward


# ---- several processes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, worker_id):
    """What `distributed.py` finds in two processes on the CPU (with `--cpu` Accelerate would start but one). They
    start once, whichever of pytest's workers asks first."""
    settings = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    of_worker = tmp_path_factory.getbasetemp()
    folder = (of_worker if worker_id == "master" else of_worker.parent) / "distributed"
    results = folder / "results.pt"
    command = [sys.executable, "-m", "accelerate.commands.launch", *settings.split(), "--main_process_port", "0"]
    paths = [str(Path(peft_tint.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    command += [distributed.__file__, str(results)]
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not results.exists():
            run_to_end(command, env=environment, cwd=folder)
    return torch.load(results)


def test_two_processes_train_and_evaluate_as_one(two_processes):
    """On the same global batches. The mean is over the pseudo-labels kept in both processes' halves together."""
    two, one = two_processes["ddp"], distributed.ddp()
    assert (one["processes"], two["processes"]) == (1, 2)
    for name in (*distributed.TRAININGS, "stream"):
        torch.testing.assert_close(two[name]["parameters"], one[name]["parameters"], rtol=0, atol=1e-5, msg=name)
    for name in distributed.TRAININGS:
        for ours, theirs in zip(one[name]["log"], two[name]["log"], strict=True):
            assert theirs.pop("precision") == ours.pop("precision") == "float32"
            assert theirs == pytest.approx(ours, rel=1e-4), name
    kept = [entry["kept"] for entry in one["sequential"]["log"]]
    assert min(kept) < 1  # or the mean over kept labels has not been tried
    assert two["evaluation"] == one["evaluation"]
    assert two["plain"]["task vectors"] > 0 and two["plain"]["task vectors sent"] == 0


def test_task_vectors_in_parts_train_as_whole_ones(two_processes):
    """And take half as many entries in each of two processes, but for what fills up the last part."""
    two, one = two_processes["sharded"], distributed.sharded()
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    for name, ours in one.items():
        theirs = two[name]
        torch.testing.assert_close(theirs["parameters"], ours["parameters"], rtol=0, atol=1e-5, msg=name)
        torch.testing.assert_close(theirs["merged"], ours["merged"], rtol=0, atol=1e-5, msg=name)
        assert theirs["evaluation"] == ours["evaluation"] and not theirs["saved"]
        for entry, expected in zip(theirs["log"], ours["log"], strict=True):
            assert entry.pop("precision") == expected.pop("precision") == "float32"
            assert entry == pytest.approx(expected, rel=1e-4), name
        assert ours["entries"] / 2 <= theirs["entries"] < ours["entries"] / 1.9


def test_two_processes_resume_as_if_never_stopped(two_processes):
    """Bitwise, in both processes, each with its own random states."""
    two = two_processes["resuming"]
    assert len(two["different"]) == 4 and not any(chain(*two["different"].values())), two["different"]
    assert two["random states"] == 2


def test_sharded_with_fsdp2(two_processes):
    """`fully_shard` in two processes, half a batch in each; Accelerate itself has FSDP for accelerators only."""
    two, one = two_processes["fsdp"], distributed.fsdp()
    assert two["sharded"] and not one["sharded"]
    for task in distributed.CLASSES:
        torch.testing.assert_close(two[f"logits {task}"], one[f"logits {task}"][::2], rtol=0, atol=1e-5)
    torch.testing.assert_close(two["gradients"], one["gradients"], rtol=0, atol=1e-5)
    assert torch.equal(two["coefficients"], one["coefficients"])
    for name in ("trained whole", "trained parts"):
        torch.testing.assert_close(two[name]["parameters"], one[name]["parameters"], rtol=0, atol=1e-5)
        assert two[name]["evaluation"] == one[name]["evaluation"]
    *merging, training = two["errors"]
    assert len(merging) == 3 and all("weights are sharded" in error for error in merging)
    assert "Pass them to `fully_shard` as `ignored_params`" in training


def test_trainer_refuses_sharding(monkeypatch):
    class Sharding(Accelerator):
        distributed_type = DistributedType.FSDP

    monkeypatch.setattr(trainer_module, "Accelerator", Sharding)
    with pytest.raises(ValueError, match="configured for FSDP"):
        TintTrainer(make_model(ARCHITECTURES["bert"]))


# ---- quantised bases and experts -------------------------------------------------------------------------------------


def quantise(model):
    """As bitsandbytes stores 8-bit weights: integers and, beside them, a scale."""
    linear = model.bert.encoder.layer[0].attention.self.query
    linear.weight = nn.Parameter(linear.weight.mul(10).to(torch.int8), requires_grad=False)
    linear.register_buffer("scale", torch.ones(()))
    return model


def test_quantised_bases_and_experts_are_refused_unchanged():
    base = ARCHITECTURES["bert"].build()
    experts = make_experts(base, ["a", "b"])
    integers = quantise(copy.deepcopy(base))
    names = [name for name, _ in integers.named_modules()]
    with pytest.raises(ValueError, match=r"base model is quantised \('bert.*query.weight' has the type torch.int8\)"):
        peft_tint.from_experts(integers, experts)
    assert [name for name, _ in integers.named_modules()] == names

    flagged = copy.deepcopy(base)
    flagged.is_quantized, flagged.quantization_method = True, "gptq"
    with pytest.raises(ValueError, match=r"base model is quantised \(quantization_method='gptq'\)"):
        peft_tint.from_experts(flagged, experts)

    with pytest.raises(ValueError, match=r"Expert 'a': 'bert.*query.weight' has the type torch.int8"):
        peft_tint.from_experts(base, {"a": quantise(experts["a"]), "b": experts["b"]})
