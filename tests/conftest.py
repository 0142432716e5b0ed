import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")  # float32 by default, also in processes of the tests' own

import pytest
import torch
from models import ARCHITECTURES, make_experts
from processes import watch_over_children
from transformers.utils import logging

from peft_tint.training import precision

watch_over_children()
torch.set_num_threads(1)
logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def has_bf16(monkeypatch):
    """What machine the tests run on does not decide what they compute in: `has_bf16(True)` does."""
    monkeypatch.setattr(precision, "SMALL", 0)
    set_to = lambda native: monkeypatch.setattr(precision, "bf16_is_native", lambda device=None: native)  # noqa: E731
    set_to(False)
    return set_to


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return ARCHITECTURES[request.param]


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """A tiny BERT with three experts, whose order is not the alphabet's, in folders: (base folder, {task: folder})."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(1)
    base = ARCHITECTURES["bert"].build()
    base.save_pretrained(folder / "base")
    experts = make_experts(base, {"a": 2, "score": 3, "b": 5})
    for task, expert in experts.items():
        expert.save_pretrained(folder / task)
    return str(folder / "base"), {task: str(folder / task) for task in experts}
