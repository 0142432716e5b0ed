"""Gradient checkpointing of transformers' layers, whose model is in evaluation mode."""

from contextlib import contextmanager
from functools import partial

from transformers.modeling_layers import GradientCheckpointingLayer


def checkpointed(model):
    """The layers that are to be checkpointed."""
    layers = (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
    return [layer for layer in layers if layer.gradient_checkpointing]


@contextmanager
def checkpointing(layers):
    """transformers checkpoints layers in training mode only. Ours say they are, and are not while they run."""
    functions = [layer._gradient_checkpointing_func for layer in layers]
    try:
        for layer, function in zip(layers, functions, strict=True):
            layer.training = True
            layer._gradient_checkpointing_func = partial(_checkpoint, layer, function)
        yield
    finally:
        for layer, function in zip(layers, functions, strict=True):
            layer.training = False
            layer._gradient_checkpointing_func = function


def _checkpoint(layer, checkpoint, forward, *args):
    def forward_in_evaluation(*args):
        before, layer.training = layer.training, False
        try:
            return forward(*args)
        finally:
            layer.training = before

    return checkpoint(forward_in_evaluation, *args)
