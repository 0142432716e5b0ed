"""The report on experts before a merge: everything that is off, and norms and cosines against plain ones."""

import copy

import pytest
import torch
from models import ARCHITECTURES, make_experts
from test_checkpoints import BROKEN, rewrite
from test_lora_experts import make_adapter
from test_merging import LORA

from peft_tint import check_experts


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    base = ARCHITECTURES["llama_tied"].build()
    experts = make_experts(base, ["b", "a", "c"])
    experts["c"].model.layers[0].load_state_dict(base.model.layers[0].state_dict())  # frozen in training
    for name, model in {"base": base, **experts}.items():
        model.save_pretrained(folder / name)
    return base, experts, folder


def block(name):
    return ".".join(name.split(".")[:3]) if "layers" in name else "model"


@pytest.mark.parametrize("as_folders", [False, True])
def test_norms_and_cosines(llama, as_folders, capsys):
    base, experts, folder = llama
    if as_folders:
        report = check_experts(folder / "base", {task: folder / task for task in experts})
    else:
        report = check_experts(base, experts)
    assert capsys.readouterr().out == f"{report}\n"
    assert report.mergeable and report.tasks == ["a", "b", "c"] and report.architecture == "LlamaForCausalLM"
    assert report.dtypes == {key: ["float32"] for key in ("base", *experts)}
    assert report.tokens == dict.fromkeys(["base", *experts], 64)
    assert [sorted(names) for names in report.tied] == [["lm_head.weight", "model.embed_tokens.weight"]]
    weights = dict(base.named_parameters())
    assert {name.replace("lm_head", "model.embed_tokens") for name in report.shapes} == weights.keys()
    units = {}
    for name, weight in weights.items():
        for task in report.tasks:
            change = (experts[task].get_parameter(name).double() - weight.double()).detach().flatten()
            units.setdefault(block(name), {}).setdefault(task, []).append(change)
    norms, cosines = report.norms(), report.cosines()
    assert norms.keys() == cosines.keys() == units.keys()
    for unit, changes in units.items():
        vectors = torch.stack([torch.cat(changes[task]) for task in report.tasks])
        expected = vectors.norm(dim=1)
        torch.testing.assert_close(norms[unit], expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(
            cosines[unit], vectors @ vectors.T / expected.outer(expected), rtol=1e-5, atol=1e-6, equal_nan=True
        )
    assert cosines["model.layers.0"].isnan().sum() == 5  # of c, which did not change it
    whole = report.norms("model")["model"]
    torch.testing.assert_close(whole, torch.stack(list(norms.values())).square().sum(0).sqrt())
    share = whole[2] / torch.cat([weight.detach().flatten() for weight in weights.values()]).norm()
    unchanged = len(base.model.layers[0].state_dict())
    line = next(line for line in str(report).splitlines() if line.startswith("c:"))
    assert line.endswith(
        f"changed {len(weights) - unchanged} of {len(weights)} tensors, |task vector| / |base| = {share:.3g}"
    )


def test_all_problems_of_all_experts(llama, tmp_path, capsys):
    _, _, folder = llama
    several = ["has 1 NaN or Inf", "has 'more', which the base model has not", "are one tied tensor"]

    def change(tensors):
        for message in several:
            BROKEN[message](tensors)

    experts = {"sound": folder / "a", "several": rewrite(folder / "b", tmp_path / "several", change)}
    for number, one in enumerate(BROKEN.values()):
        experts[f"one{number}"] = rewrite(folder / "b", tmp_path / f"one{number}", one)
    report = check_experts(folder / "base", {**experts, "absent": tmp_path / "none"})
    assert not report.mergeable and report.tasks == ["sound"] and report.problems["sound"] == []
    assert len(report.problems["several"]) == len(several)
    for message in several:
        assert any(message in problem for problem in report.problems["several"])
    for number, message in enumerate(BROKEN):
        assert any(message.replace("\\", "") in problem for problem in report.problems[f"one{number}"])
    assert "is neither a local folder nor a model" in report.problems["absent"][0]
    out = capsys.readouterr().out
    assert all(problem in out for problems in report.problems.values() for problem in problems)
    assert "several: CANNOT be merged" in out and "sound: can be merged" in out


def test_only_one_or_none(llama, capsys):
    base, experts, _ = llama
    alone = str(check_experts(base, {"a": experts["a"]}))
    assert alone.splitlines()[-1].split()[-2:] == ["-", "-"]
    broken = copy.deepcopy(experts["a"])
    broken.model.norm.weight.data.fill_(float("inf"))
    assert check_experts(base, {"a": broken}).grams == {}
    with pytest.raises(ValueError, match=r"The base model's 'model.norm.weight' has NaN or Inf"):
        check_experts(broken, {"a": experts["a"]})
    with pytest.raises(ValueError, match=r"`experts` is \{\}; give"):
        check_experts(base, {})


def test_heads_adapters_and_types(capsys):
    base = ARCHITECTURES["bert"].build(num_labels=3)
    experts = {"full": make_experts(base, {"x": 5})["x"].bfloat16(), "lora": make_adapter(base, LORA["plain"], 0)}
    report = check_experts(base, experts)
    assert report.mergeable and report.dtypes["full"] == ["bfloat16"]
    assert report.notes == ["Heads differ in shape: TINT and per-task methods keep each task's, others the base's."]
    assert not any(name.startswith("classifier") for name in report.grams)
    row = report.tasks.index("lora")
    merged = experts["lora"].merge_and_unload()
    for name in ("bert.encoder.layer.1.attention.self.query.weight", "bert.pooler.dense.weight"):
        change = merged.get_parameter(name) - base.get_parameter(name)
        torch.testing.assert_close(report.grams[name][row, row].sqrt().float(), change.norm().detach())


def test_vocabulary(llama, tmp_path, capsys):
    _, _, folder = llama
    other = rewrite(folder / "a", tmp_path / "other", BROKEN["has 70 tokens, the base model 64"])
    assert not check_experts(folder / "base", {"a": other}).mergeable

    def add(tensors):
        name = "model.embed_tokens.weight"
        tensors[name] = torch.cat([tensors[name], torch.ones(6, 16)])

    other = rewrite(folder / "a", tmp_path / "added", add)
    report = check_experts(folder / "base", {"a": other}, common_vocabulary=True)
    assert report.mergeable and report.tokens == {"base": 64, "a": 70}
    assert "the first 64 are merged" in report.notes[0] and report.notes[0] in capsys.readouterr().out
