"""What a training computes in: bfloat16 where the device has instructions for it, float32 elsewhere."""

import os
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel, get_peft_model
from processes import run_to_end
from test_trainer import arguments, load, make_data, model, state  # noqa: F401
from transformers import Trainer, TrainingArguments

from peft_tint import TintConfig, TintTrainer, TintTrainingArguments
from peft_tint.training import precision

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
bf16_is_native = precision.bf16_is_native  # before the tests' own takes its place


@pytest.fixture(scope="module")
def data(bert):
    return make_data(bert)


def cpu(monkeypatch, machine, capability, *instructions, onednn=True, **environment):
    """Makes PyTorch find such a processor."""
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(precision.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn is not None)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda found=name in instructions: found)


@pytest.mark.parametrize(
    "native, machine, capability, instructions, more",
    [
        (True, "x86_64", "AVX512", ["avx512_bf16"], {}),  # AMD from Zen 4 on, Intel's Cooper Lake
        (True, "AMD64", "AVX512", ["avx512_bf16", "amx_tile"], {}),  # Intel from Sapphire Rapids on, under Windows
        (True, "x86_64", "AVX512", ["amx_tile"], {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}),
        (False, "x86_64", "AVX512", [], {}),  # Skylake to Ice Lake
        (False, "x86_64", "AVX2", [], {"onednn": False}),  # most laptops
        (False, "x86_64", "AVX2", ["avx512_bf16", "amx_tile"], {"ONEDNN_MAX_CPU_ISA": "AVX2", "onednn": False}),
        (False, "x86_64", "AVX512", ["avx512_bf16"], {"ONEDNN_MAX_CPU_ISA": "avx512_core"}),
        (False, "x86_64", "AVX512", ["avx512_bf16"], {"DNNL_MAX_CPU_ISA": "AVX512_CORE_VNNI"}),
        (True, "aarch64", "DEFAULT", [], {}),  # Graviton 3
        (False, "aarch64", "DEFAULT", [], {"onednn": False}),  # Graviton 2
        (False, "arm64", "DEFAULT", [], {"onednn": None}),  # macOS: PyTorch has no oneDNN there
    ],
)
def test_which_processors_have_bfloat16(monkeypatch, native, machine, capability, instructions, more):
    cpu(monkeypatch, machine, capability, *instructions, **more)
    assert bf16_is_native("cpu") is native


def test_other_devices_answer_for_themselves(monkeypatch):
    asked = []
    device = lambda device: warnings.catch_warnings()  # noqa: E731, some context
    answer = lambda including_emulation: asked.append(including_emulation) or len(asked) == 1  # noqa: E731
    backend = SimpleNamespace(device=device, is_bf16_supported=answer)
    monkeypatch.setattr(torch, "get_device_module", lambda device: backend)
    assert bf16_is_native("cuda:1") is True and bf16_is_native(torch.device("xpu")) is False
    assert asked == [False, False]
    assert bf16_is_native("mps") is False


def test_limits_of_the_environment_are_followed():
    code = "import peft_tint; print(peft_tint.bf16_is_native())"
    assert run_to_end([sys.executable, "-W", "ignore", "-c", code], env={**os.environ, **AVX2}) == "False\n"


@pytest.mark.parametrize("native, bf16, expected", [(True, None, True), (False, None, False), (True, False, False)])
def test_the_device_decides_unless_told(model, data, tmp_path, has_bf16, native, bf16, expected):  # noqa: F811
    has_bf16(native)
    trainer = TintTrainer(model, arguments(tmp_path, bf16=bf16, max_steps=1), data)
    dtypes = []
    hook = model.base_model.head_layers[0].register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    trainer.train()
    hook.remove()
    assert set(dtypes) == {torch.bfloat16 if expected else torch.float32}
    name = "bfloat16 autocast" if expected else "float32"
    assert trainer.precision == trainer.log_history[-1]["precision"] == name
    trainer.save_model(tmp_path / "saved")
    assert f"- precision: {name}\n" in (tmp_path / "saved" / "README.md").read_text()


def test_a_model_stored_in_less_than_float32_keeps_its_precision(bert, data, tmp_path, has_bf16):
    """Autocast to bfloat16 would round float16 weights."""
    has_bf16(True)
    model = get_peft_model(load(bert[0]).to(torch.float16), TintConfig(experts=bert[1]))  # noqa: F811
    assert TintTrainer(model, arguments(tmp_path)).precision == "float16"
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(load(bert[0]).to(torch.float16), tmp_path / "saved")  # nothing trains
    assert TintTrainer(loaded, arguments(tmp_path)).precision == "float16"


def test_emulation_is_told_once_with_its_cost(bert, data, tmp_path):
    precision._warn_of_emulation.cache_clear()
    trained = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model = get_peft_model(load(bert[0]), TintConfig(experts=bert[1]))
            TintTrainer(model, arguments(tmp_path, bf16=True, max_steps=1), data).train()
            trained.append(state(model))
    found = [str(warning.message) for warning in caught if "bfloat16" in str(warning.message)]
    assert len(found) == 1 and "2 to 16 times as long as in float32" in found[0] and "Leave `bf16` out" in found[0]
    assert caught[[str(w.message) for w in caught].index(found[0])].filename == __file__
    assert all(torch.equal(trained[0][name], value) for name, value in trained[1].items())


def test_float16_on_a_cpu_is_refused(model, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="`fp16` is set and the device is a CPU; leave it out"):
        TintTrainer(model, arguments(tmp_path, fp16=True))


@pytest.fixture
def own_configuration():
    """Accelerate's, which is one for the process, does not reach other tests."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("own_configuration")
def test_accelerates_configuration_counts_where_the_arguments_are_silent(model, tmp_path):  # noqa: F811
    """It is one for the process: here as a transformers.Trainer left it."""
    Trainer(torch.nn.Linear(1, 1), TrainingArguments(str(tmp_path), bf16=True, use_cpu=True, report_to="none"))
    choose = lambda **settings: precision.choose_autocast(  # noqa: E731
        TintTrainingArguments(**settings),
        SimpleNamespace(device=torch.device("cuda"), mixed_precision=configured),
        model,
    )
    configured = "no"
    assert choose() is None and choose(fp16=True) is torch.float16
    configured = "fp16"
    assert choose() is torch.float16 and choose(bf16=False) is None
    configured = "fp8"
    with pytest.raises(ValueError, match="Accelerate is configured for 'fp8'; it must be one of no, bf16, fp16"):
        choose()
    assert TintTrainer(model, arguments(tmp_path, bf16=False)).precision == "float32"


def test_resuming_in_another_precision_is_refused(model, data, tmp_path, has_bf16):  # noqa: F811
    """As on another machine, where the same arguments would give another training."""
    has_bf16(True)
    TintTrainer(model, arguments(tmp_path, max_steps=2, save_steps=1), data).train()
    has_bf16(False)
    trainer = TintTrainer(model, arguments(tmp_path, max_steps=2, save_steps=1), data)
    with pytest.raises(ValueError, match=r"the precision is 'float32', and .* was made with 'bfloat16 autocast'"):
        trainer.train(resume_from_checkpoint=True)
