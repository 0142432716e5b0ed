"""Data-free merging: functions of task vectors {task: {tensor name: tensor}}."""

from ._registry import (
    MERGING_METHODS,
    MergingMethod,
    check_method,
    check_transform,
    merge_task_vectors,
    transform_task_vectors,
)

__all__ = [
    "MERGING_METHODS",
    "MergingMethod",
    "check_method",
    "check_transform",
    "merge_task_vectors",
    "transform_task_vectors",
]
