"""Accuracy and normalised accuracy, as a metric of `evaluate`.

`evaluate.load(peft_tint.evaluation.__file__)` loads it without the Hub.
"""

import datasets
import evaluate
import numpy as np


class NormalizedAccuracy(evaluate.Metric):
    """Accuracy of a merged model over the accuracy of the expert on the same samples; 1 is no loss by merging.

    `compute(predictions=..., references=..., expert_predictions=...)` takes class indices and returns `accuracy`,
    `expert_accuracy` and `normalized_accuracy`, which is NaN where the expert is never right. Samples whose reference
    is -100 do not count.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="class indices of the merged model, the labels, and the expert",
            features=datasets.Features(
                {name: datasets.Value("int64") for name in ("predictions", "references", "expert_predictions")}
            ),
        )

    def _compute(self, predictions, references, expert_predictions):
        references = np.asarray(references)
        counted = references != -100
        accuracy, expert_accuracy = (
            float((np.asarray(labels) == references)[counted].mean()) for labels in (predictions, expert_predictions)
        )
        normalized = accuracy / expert_accuracy if expert_accuracy else float("nan")
        return {"accuracy": accuracy, "expert_accuracy": expert_accuracy, "normalized_accuracy": normalized}
