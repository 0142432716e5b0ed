import math

import evaluate
import pytest

import peft_tint.evaluation
from peft_tint import NormalizedAccuracy


def test_metric_loads_offline_by_path():
    metric = evaluate.load(peft_tint.evaluation.__file__)
    result = metric.compute(predictions=[0, 1, 1, 2], references=[0, 1, 0, 0], expert_predictions=[0, 1, 0, 1])
    assert result == {"accuracy": 0.5, "expert_accuracy": 0.75, "normalized_accuracy": pytest.approx(2 / 3)}


def test_ignored_labels_and_an_expert_that_is_never_right():
    metric = NormalizedAccuracy(keep_in_memory=True)
    result = metric.compute(predictions=[0, 1], references=[0, -100], expert_predictions=[1, 1])
    assert result["accuracy"] == 1 and result["expert_accuracy"] == 0 and math.isnan(result["normalized_accuracy"])
