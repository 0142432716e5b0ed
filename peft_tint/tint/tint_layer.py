"""A layer with one copy per task: the tint layer, and the head, which belongs to its task in any case."""

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import Cache

from .._rows import take_rows
from .._wrapped_layer import Calls, unload_below
from .merged_layer import MergedLayer


class TaskModules(nn.Module):
    """One module per task, of which the current task's runs. Other attributes are read from that one."""

    def __init__(self, modules: dict[str, nn.Module]):
        super().__init__()
        # The suffix keeps a task from colliding with an attribute of ModuleDict ("pop"), with an adapter's name, and
        # with the endings ("score", "classifier") by which PEFT looks for heads
        self.copies = nn.ModuleDict({f"{task}_task": module for task, module in modules.items()})
        self.set_task(next(iter(modules)))
        self._calls = Calls()  # its tuner gives it its own

    def __getitem__(self, task):
        return self.copies[f"{task}_task"]

    def set_task(self, task):
        self.default_task = task
        self._default = (self[task],)  # in a tuple nn.Module does not see it

    @property
    def task(self):
        return self._calls.asked.task or self.default_task

    @property
    def current(self):
        if self._calls.whole and torch.compiler.is_compiling():
            return self._default[0]  # a name would be one more compilation for each task
        if self._default[0] is not self[self.default_task]:  # which somebody has replaced
            self.set_task(self.default_task)
        return self[self.task]

    def forward(self, *args, **kwargs):
        task_names = self._calls.asked.task_names
        if task_names is None:
            return self.current(*args, **kwargs)
        if self._mixes and any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            raise ValueError("The tasks of a mixed batch would share one key/value cache; pass `use_cache=False`.")
        outputs = {task: self[task](*args, **kwargs) for task in dict.fromkeys(task_names)}
        return take_rows(outputs, task_names)

    @property
    def _mixes(self):
        return len(set(self._calls.asked.task_names or ())) > 1

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "copies" not in vars(self).get("_modules", {}) or "_calls" not in vars(self):
                raise
            value = getattr(self.current, name)
            if self._mixes and isinstance(value, torch.Tensor):
                raise ValueError(
                    f"The model reads {name!r} of a tint layer directly, so tasks cannot be mixed; use batches of one."
                ) from None
            return value


def without_parameters(module: nn.Module) -> nn.Module:
    """The module with buffers that are not saved in the place of its parameters."""
    for child in module.modules():
        child._non_persistent_buffers_set.update(child._buffers)
        for name, parameter in list(child._parameters.items()):
            if parameter is not None:
                del child._parameters[name]
                child.register_buffer(name, parameter.detach(), persistent=False)
    return module


class TintLayer(ModulesToSaveWrapper):
    """Holds per adapter one copy of a module for each task (trained and saved) and each expert's own (neither, and no
    parameters, so that whoever trains, saves, counts or initialises those does not see them).

    It is one of PEFT's `modules_to_save`, since PEFT by itself makes the classifier such a module for some task types.
    """

    def __init__(self, module, adapter_name, task_modules, expert_modules, trainable):
        super().__init__(module, adapter_name)
        self.add_adapter(adapter_name, task_modules, expert_modules, trainable)

    def init_modules(self, adapter_name, **kwargs):
        super().init_modules(adapter_name)
        self.expert_modules = nn.ModuleDict()
        self.trainable = {}
        self.as_expert = False  # see `TintModel.expert`
        self.nested = False  # inside of a layer that another adapter has wrapped

    def add_adapter(self, adapter_name, task_modules: dict, expert_modules: dict, trainable: bool):
        """`task_modules` and `expert_modules` are {task: module}; `trainable` is False for a head that stays."""
        self.modules_to_save[adapter_name] = TaskModules(task_modules)
        self.expert_modules[adapter_name] = without_parameters(TaskModules(expert_modules))
        self.trainable[adapter_name] = trainable
        self._adapters.add(adapter_name)
        self.original_module.requires_grad_(False)
        self._freeze()

    @property
    def added_adapters(self):
        return self.modules_to_save.keys()

    def check_module(self):
        """PEFT refuses a module that is a tuner layer. Here another adapter may merge it and this one copy it."""

    def adapter_state_dict(self, adapter_name, state_dict):
        return {}  # `TintModel._get_adapter_state_dict` adds the copies, by names that hold without other adapters

    def adapter_state_dict_load_map(self, adapter_name):
        return {} if self.nested else super().adapter_state_dict_load_map(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name, device=None):
        """PEFT calls this after it has put loaded parameters in the place of ours (`low_cpu_mem_usage`)."""
        if adapter_name in self.modules_to_save:
            self.modules_to_save[adapter_name].to(next(self.original_module.parameters()).device)

    def update(self, adapter_name, **kwargs):
        """PEFT calls this for an adapter whose `modules_to_save` names this layer; its copies come by `add_adapter`."""

    def check_set_adapter(self, adapter_name):
        return super().check_set_adapter(adapter_name) if adapter_name else None

    def set_task(self, adapter_name, task):
        for modules in (self.modules_to_save[adapter_name], self.expert_modules[adapter_name]):
            modules.set_task(task)

    def _forward_wrapped(self, *args, **kwargs):
        if not self.active_adapters:
            return self.original_module(*args, **kwargs)
        modules = self.expert_modules if self.as_expert else self.modules_to_save
        return modules[self.active_adapters[0]](*args, **kwargs)

    def set_adapter(self, adapter_names, inference_mode=False):
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._freeze()

    def enable_adapters(self, enabled):
        super().enable_adapters(enabled)
        self._freeze()

    def set_requires_grad(self, adapter_names, requires_grad=True):
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze()

    def _freeze(self):
        """A head that is not the tint layer does not train."""
        for adapter_name, trainable in self.trainable.items():
            if not trainable:
                self.modules_to_save[adapter_name].requires_grad_(False)

    def delete_adapter(self, adapter_name, new_active_adapters):
        super().delete_adapter(adapter_name, new_active_adapters)
        if adapter_name in self.expert_modules:
            del self.expert_modules[adapter_name], self.trainable[adapter_name]
        active = [name for name in new_active_adapters or [] if name in self.modules_to_save]
        if active != self.active_adapters:  # PEFT leaves a wrapper that did not have the adapter as it was
            self.set_adapter(active)

    def unload_and_optionally_merge_module(self, merge, safe_merge, adapter_names):
        active = [a for a in (adapter_names or self.active_adapters) if a in self.modules_to_save]
        if not merge or not active:
            module = self.original_module
            if isinstance(module, MergedLayer):
                return module.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
            unload_below(module, merge, safe_merge, adapter_names)
            return module
        module = self.modules_to_save[active[0]]
        module = module[module.task]
        if safe_merge and not all(torch.isfinite(parameter).all() for parameter in module.parameters()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {active[0]} seems to be broken")
        return module
