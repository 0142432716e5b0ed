"""What goes on in a training beside the parameters, the optimizer and the log."""

from dataclasses import asdict, dataclass, field

import torch

from .collapse import CollapseGuard, Snapshot, Window

OF_GUARD = ("start", "best", "latest")


@dataclass
class Progress:
    order: torch.Generator  # of the tasks in a step
    coefficients: torch.Tensor  # at the start, (tasks, units)
    step: int = 0
    loss: float = 0.0  # summed over the batches of the log's entries
    batches: int = 0
    window: Window = field(default_factory=Window)
    best: Snapshot | None = None  # by evaluation
    guard: CollapseGuard | None = None
    collapsed: bool = False

    def save(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict]:
        """Tensors, and all else as JSON has it."""
        tensors = {"progress": {"order": self.order.get_state(), "coefficients": self.coefficients}}
        state = {"step": self.step, "loss": self.loss, "batches": self.batches, "window": asdict(self.window.fetch())}
        for name, snapshot in self._snapshots().items():
            tensors[name], state[name] = snapshot.parameters, (snapshot.step, snapshot.value)
        return tensors, state

    def _snapshots(self):
        best = {} if self.best is None else {"best": self.best}
        return best | {f"guard_{name}": getattr(self.guard, name) for name in OF_GUARD if self.guard is not None}

    def load(self, tensors: dict[str, dict[str, torch.Tensor]], state: dict) -> None:
        self.order.set_state(tensors["progress"]["order"])
        self.coefficients = tensors["progress"]["coefficients"]
        self.step, self.loss, self.batches = state["step"], state["loss"], state["batches"]
        self.window = Window(**state["window"])
        if "best" in state:
            self.best = Snapshot(*state["best"], tensors["best"])
        for name in OF_GUARD if self.guard is not None else ():
            setattr(self.guard, name, Snapshot(*state[f"guard_{name}"], tensors[f"guard_{name}"]))
