"""The PEFT method DTS: what an adapter computes, its files, and every call by which PEFT handles adapters."""

import copy

import pytest
import torch
from models import IDS, make_experts, output
from peft import (
    PeftModel,
    get_peft_model_state_dict,
)
from transformers import AutoModelForSequenceClassification

import peft_tint
from peft_tint.tint._structure import find_head, is_under, plain_modules

# PEFT, about what it does when the active adapter is deleted
pytestmark = pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")
SMALL = {"rank_ratio": 0.3}  # tiny models have no bytes to spare for a budget of 1%


def load(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


@torch.no_grad()
def logits(model, **kwargs):
    return model(**IDS, **kwargs).logits


def expert_of(architecture, base):
    tasks = {"x": architecture.classes[1]} if architecture.has_head else ["x"]
    return make_experts(base, tasks)["x"]


def close(result, expected):
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def densely(model, base, expert):
    """The base with the decoded codes added to its weights, and the expert's head, made without any adapter."""
    result = copy.deepcopy(expert)
    head = find_head(base, dict(plain_modules(base)))
    decoded = {}
    for key, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items():
        module, kind, leaf = key.removeprefix("base_model.model.").rpartition(".dts_codes.")
        if not kind:
            module, kind, leaf = key.rpartition("dts_codes.")  # of the model's own parameters
        if kind:
            name = ".".join(filter(None, (module.removeprefix("base_model.model.").removeprefix("dts_root"), leaf)))
            (delta,) = peft_tint.dts.decode({key: tensor}).values()
            decoded[name.replace("/", ".").removeprefix(".")] = delta.dense() if hasattr(delta, "dense") else delta
    ours = dict(base.named_parameters(remove_duplicate=False))
    for name, parameter in result.named_parameters():
        if not is_under(name, head):
            names = [other for other, tensor in ours.items() if tensor is ours[name]]
            changes = [decoded[other] for other in names if other in decoded]
            assert len(changes) == 1, name
            parameter.data = ours[name].detach() + changes[0].view(ours[name].shape)
    return result


@torch.no_grad()
def test_output_is_that_of_the_decoded_model(architecture, tmp_path):
    base = architecture.build()
    expert = expert_of(architecture, base)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    expected_base = output(base.requires_grad_(False), architecture.inputs)
    dense_base = copy.deepcopy(base)
    model = peft_tint.compress(base, expert, **SMALL).eval()
    result = output(model, architecture.inputs)
    close(result, output(densely(model, dense_base, expert), architecture.inputs))
    assert not torch.allclose(result, output(expert, architecture.inputs))  # it is compressed

    with model.disable_adapter():
        assert torch.equal(output(model, architecture.inputs), expected_base)
    model.merge_adapter()
    close(output(model, architecture.inputs), result)
    model.unmerge_adapter()
    assert torch.equal(output(model, architecture.inputs), result)

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(architecture.build(), tmp_path).eval()
    assert torch.equal(output(again, architecture.inputs), result)

    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is type(expert) and merged.state_dict().keys() == before.keys()
    close(output(merged, architecture.inputs), result)
    theirs = expert.state_dict()
    for name in find_head(dense_base, dict(plain_modules(dense_base))):
        for leaf, tensor in merged.get_submodule(name).state_dict().items():
            assert torch.equal(tensor, theirs[f"{name}.{leaf}"])
    unloaded = again.unload().state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in unloaded.items())
