"""That what the benchmarks and examples are started with is valid, and that the README has the tables they made."""

import json
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from peft_tint import MERGING_METHODS, OBJECTIVES, TintConfig, TintTrainingArguments

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks" / "configs").glob("*.json")), ids=lambda file: file.stem)
def test_configs_of_benchmarks(file, tmp_path):
    config = json.loads(file.read_text())
    if config["kind"] == "merge":
        assert config["method"] in MERGING_METHODS
    elif config["kind"] == "tint":
        TintConfig(experts={"a": "a/a"}, **config["config"])
        TintTrainingArguments(str(tmp_path), **config["training"])
        assert config["objective"] in OBJECTIVES
    else:
        assert config["kind"] == "dts" or config["of"] in ("pretrained", "experts")


def test_every_data_free_method_has_a_config():
    configs = [json.loads(file.read_text()) for file in (ROOT / "benchmarks" / "configs").glob("*.json")]
    two_models_only = {"slerp"}
    assert {config["method"] for config in configs if "method" in config} == set(MERGING_METHODS) - two_models_only


@pytest.mark.parametrize("suite", ["vision", "text"])
def test_the_readme_has_the_table(suite):
    table = (ROOT / "benchmarks" / "results" / suite / "table.md").read_text()
    assert f"<!-- {suite} -->\n\n{table}\n<!-- end of {suite} -->" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("file", sorted((ROOT / "examples" / "accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_configs_of_accelerate(file):
    config = load_config_from_file(str(file))
    assert config.num_processes >= config.num_machines >= 1
