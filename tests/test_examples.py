import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_quickstart(tmp_path):
    """As a user runs it, with experts hardly trained: table, pictures, adapter, reload in a fresh process, pipeline."""
    flags = ["--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache", "--finetune_steps", "0.02"]
    flags += ["--rows", "64"]
    command = [sys.executable, EXAMPLES / "quickstart.py", *flags, "--max_steps", "2"]
    for first in (True, False):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert ("fine-tuning the experts" in result.stderr) == first
        for row in ("pretrained", "experts", "average", "task arithmetic 0.3", "AdaMerging", "Tint"):
            assert f"\n{row}" in result.stdout
        assert "gives equal logits for every task" in result.stdout
        assert "roofs' -> " in result.stdout
    for file in ("coefficients.png", "accuracy.png", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "out" / file).stat().st_size > 1000


def test_data_is_small_and_its_licences_lie_beside_it():
    files = [path for path in (EXAMPLES / "data").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5e6
    assert {"README.md", "LICENSE.vaderSentiment", "LICENSE.WordNet"} <= {path.name for path in files}
