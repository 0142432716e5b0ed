"""Adam on a model's coefficients and tint layers."""

from itertools import chain

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn
from torch.distributed.tensor import DTensor

from .arguments import TintTrainingArguments


class Updates:
    """What is trainable in a model, and its optimizer.

    Adam's steps are smaller than what 16 bits resolve, so parameters of 16 bits have masters in float32. Raises
    ValueError where nothing is trainable, or what is would be sharded.
    """

    def __init__(self, model: nn.Module, args: TintTrainingArguments, accelerator: Accelerator):
        self.model, self.accelerator, self.masters = model, accelerator, {}
        self.loss = 0.0  # since the last update
        parameters = self.parameters()
        if not parameters:
            raise ValueError(
                "Nothing in the model is trainable. If it was loaded by `from_pretrained`, pass `is_trainable=True`."
            )
        if any(isinstance(parameter, DTensor) for parameter in parameters.values()):
            raise ValueError(
                "Parameters that train are sharded. Pass them to `fully_shard` as `ignored_params`, so that it shards "
                "the base alone."
            )
        self.share()
        self.masters = {name: p.detach().float() for name, p in parameters.items() if p.itemsize < 4}
        self.rate = self._default_rate() if args.learning_rate is None else args.learning_rate  # of the tint layers
        own = args.coefficient_learning_rate
        rates = self.rate if own is None else own, self.rate
        groups = [
            # the second is what a scheduler goes on by
            {"params": [self.masters.get(name, parameters[name]) for name in names], "lr": rate, "initial_lr": rate}
            for rate, names in zip(rates, self._names(), strict=True)
            if names
        ]
        betas = args.adam_beta1, args.adam_beta2
        # Not the model, for DDP: what trains is small, so one exchange an update does, and a step leaves tint layers of
        # other tasks without a gradient, which DDP takes for an error
        self.optimizer = accelerator.prepare_optimizer(
            torch.optim.Adam(groups, betas=betas, eps=args.adam_epsilon, fused=True)
        )

    def _default_rate(self):
        model, layers = self.model, self.model.tint_layers
        if layers and all(layer in model.head_layers for layer in layers):
            return 3e-3
        return 3e-2 if layers and layers == model.final_norms else 1e-3

    # ---- parameters --------------------------------------------------------------------------------------------------

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def _names(self):
        """Those of the coefficients and of the tint layers' parameters, as the optimizer has them."""
        names = self.parameters()
        return [[name for name in names if ("tint_coefficients" in name) == first] for first in (True, False)]

    def copy(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().cpu().clone() for name, parameter in self.parameters().items()}

    @torch.no_grad()
    def set(self, values: dict[str, torch.Tensor], masters: bool = True) -> None:
        """Not by `parameter.data`, in which nobody could see that the parameter has changed."""
        parameters = self.parameters()
        for name, value in values.items():
            parameters[name].copy_(value)
            if masters and name in self.masters:
                self.masters[name].copy_(value)

    def share(self) -> None:
        """Makes what all processes have computed the same to the last bit, and the masters what the parameters are."""
        self.set({name: broadcast(parameter.data) for name, parameter in self.parameters().items()})

    # ---- updates -----------------------------------------------------------------------------------------------------

    def add(self, loss: torch.Tensor, share: int) -> None:
        """Adds the gradients of a loss, of which `share` make an update."""
        self.accelerator.backward(loss / share)
        self.loss += loss.detach().abs()

    @torch.no_grad()
    def step(self) -> None:
        """Nothing is asked of the device here, for the answer would have to be waited for."""
        # A loss of exactly zero is one for which no pseudo-label was kept. There is nothing to learn from it, but
        # Adam would still move by its momentum.
        skipped = (~(self.loss > 0) | self.loss.isinf()).float()  # NaN too
        self.loss = 0.0
        if self.accelerator.num_processes > 1:
            self._sum_gradients()
        if self.masters:
            parameters = self.parameters()
            for name, master in self.masters.items():
                gradient, parameters[name].grad = parameters[name].grad, None
                master.grad = None if gradient is None else gradient.float()
        if self.accelerator.scaler is None:
            self.optimizer.optimizer.found_inf = skipped  # as a GradScaler has the fused Adam leave an update out
            self.optimizer.step()
            del self.optimizer.optimizer.found_inf
        elif not skipped:
            self.optimizer.step()
        if self.masters:
            self.set(self.masters, masters=False)
        # None and not zero: the tint layers of other tasks are to have no gradient, or Adam's momentum moves them
        self.optimizer.zero_grad(set_to_none=True)

    def _sum_gradients(self):
        """Makes the gradients those of the loss of all processes, of which each has the part of its own rows."""
        gradients = [p.grad for p in self.parameters().values() if p.grad is not None]
        summed = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, summed.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    # ---- to be saved -------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        names, states = list(chain(*self._names())), self.optimizer.state_dict()["state"]
        of_adam = {f"{key}/{names[i]}": value for i, values in states.items() for key, value in values.items()}
        return {"parameters": self.parameters() | self.masters, "optimizer": of_adam}

    def load(self, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
        self.set(tensors["parameters"])
        names, states = list(chain(*self._names())), {}
        for key, value in tensors.get("optimizer", {}).items():
            kind, _, name = key.partition("/")
            states.setdefault(names.index(name), {})[kind] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": states})
