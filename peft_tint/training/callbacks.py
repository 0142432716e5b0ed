"""Who is told of what happens in a training, and what Ctrl-C does in it."""

import os
import signal
import sys
import threading
from contextlib import contextmanager

from transformers import TrainerCallback, TrainerControl, TrainerState


class Callbacks:
    """Functions `(trainer, logs)`, called with each entry of the log; and transformers' `TrainerCallback`s.

    The latter hear of the begin and end of the training and of each step, of logs, evaluations and checkpoints, with
    `TintTrainingArguments`, and no epochs, scheduler or loaders. They may stop the training, and ask for an evaluation
    or a checkpoint at the end of a step.
    """

    def __init__(self, callbacks):
        is_one = callable(callbacks) or isinstance(callbacks, TrainerCallback)
        callbacks = [callbacks] if is_one else callbacks or ()
        callbacks = [callback() if isinstance(callback, type) else callback for callback in callbacks]
        for callback in callbacks:
            if not callable(callback) and not isinstance(callback, TrainerCallback):
                raise ValueError(
                    f"`callbacks` has a {type(callback).__name__}; give functions `(trainer, logs)` or "
                    "`transformers.TrainerCallback`s."
                )
        self.of_transformers = [callback for callback in callbacks if isinstance(callback, TrainerCallback)]
        self.functions = [callback for callback in callbacks if not isinstance(callback, TrainerCallback)]
        self.state, self.control = TrainerState(), TrainerControl()

    def call(self, event: str, trainer, **more) -> None:
        """`event` is the name of a method of TrainerCallback."""
        if not self.of_transformers:
            return
        state, progress, best = self.state, trainer.progress, trainer.progress.best
        state.global_step, state.max_steps, state.log_history = progress.step, trainer.max_steps, trainer.log_history
        state.is_local_process_zero = trainer.accelerator.is_local_main_process
        state.is_world_process_zero = trainer.accelerator.is_main_process
        state.best_metric = None if best is None else best.value
        given = {"model": trainer.model, "processing_class": trainer.processing_class, **more}
        given["optimizer"] = trainer.updates.optimizer
        for callback in self.of_transformers:
            changed = getattr(callback, event)(trainer.args, state, self.control, **given)
            self.control = self.control if changed is None else changed

    def take(self, name: str) -> bool:
        """Whether a callback has asked for it (`should_save`, ...) since it was taken last."""
        wanted = getattr(self.control, name)
        setattr(self.control, name, False)
        return wanted


@contextmanager
def held_interrupt(holds: bool):
    """Gives a list that is empty until Ctrl-C, which ends the step that runs and not what is in the middle of it. The
    second Ctrl-C is heard at once."""
    heard, process = [], os.getpid()

    def hear(*_):
        if os.getpid() != process:  # a loader's worker
            return
        if heard:
            raise KeyboardInterrupt
        heard.append(True)
        print("\nStopping after this step; Ctrl-C again stops at once", file=sys.stderr, flush=True)

    before = signal.getsignal(signal.SIGINT)
    if not holds or before is None or threading.current_thread() is not threading.main_thread():
        yield heard
        return
    signal.signal(signal.SIGINT, hear)
    try:
        yield heard
    finally:
        signal.signal(signal.SIGINT, before)
