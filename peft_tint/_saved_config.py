"""What the configurations of TINT and DTS have in common: an adapter is saved with a sum, by which damage is found."""

import json
import os
import shutil
from dataclasses import dataclass, field
from functools import wraps
from typing import get_type_hints

from huggingface_hub.dataclasses import type_validator
from peft import PeftModel
from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from transformers.utils import cached_file

from ._files import check_inside, sha256_of, sync
from .checkpoints import added_files

NEXT = "next_adapter_config.json"  # of weights that are about to take the place of older ones

# What may be edited in a saved configuration: where things are, and what PEFT notes.
NOT_SUMMED = {
    *("sha256", "experts", "experts_sha256", "expert", "expert_sha256", "base_model_name_or_path", "revision"),
    *("task_type", "auto_mapping", "peft_version", "inference_mode"),
}


@dataclass
class SavedConfig(PeftConfig):
    """A configuration of which what is read from files is checked."""

    sha256: str | None = field(
        default=None,
        metadata={"help": "Of the weights' file and the settings that belong to it; filled in when both are saved."},
    )

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Writes the configuration, with the sum if a PeftModel has just written the weights."""
        super().save_pretrained(save_directory, **kwargs)
        path = os.path.join(save_directory, CONFIG_NAME)
        settings = self.from_json_file(path)
        settings["sha256"] = self.sha256 = None
        if "auto_mapping_dict" in kwargs:  # only a PeftModel gives it; all others may write the weights afterwards
            if os.path.exists(os.path.join(save_directory, WEIGHTS_NAME)):
                raise ValueError("Adapters of pickles are never loaded; save without `safe_serialization=False`.")
            weights = os.path.join(save_directory, SAFETENSORS_WEIGHTS_NAME)
            settings["sha256"] = self.sha256 = adapter_sha256(weights, settings)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(settings, file, indent=2, sort_keys=True)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs):
        """Raises ValueError if weights and settings are not those that were saved together, and for a pickle."""
        source = pretrained_model_name_or_path
        config = super().from_pretrained(source, subfolder=subfolder, **kwargs)
        where, class_kwargs, _ = cls._split_kwargs(kwargs)

        def find(name):
            options = {**where, "subfolder": subfolder or "", "_raise_exceptions_for_missing_entries": False}
            file = cached_file(source, name, **options)
            if file is not None:
                check_inside("The adapter", os.path.dirname(file), [file])
            return file

        weights, settings = find(SAFETENSORS_WEIGHTS_NAME), find(CONFIG_NAME)
        if weights is None and find(WEIGHTS_NAME):
            raise ValueError(
                f"The adapter in '{source}' is stored as a pickle ({WEIGHTS_NAME}), which can run code when it is "
                "loaded, so it is refused. Save it again as safetensors."
            )
        expected = getattr(config, "sha256", None)  # not there if it is of another method
        if weights is None or expected is None or is_of(settings, weights):
            return config
        if (following := find(NEXT)) and is_of(following, weights):
            return cls.from_peft_type(**cls.check_kwargs(**class_kwargs, **cls.from_json_file(following)))
        raise ValueError(
            f"The weights and settings of the adapter in '{source}' do not have the sha256 {expected} that they were "
            "saved with: one of the files is damaged or has been edited. Save or download it again; or delete `sha256` "
            f"from {CONFIG_NAME}, if the change was meant."
        )

    @classmethod
    def check_kwargs(cls, **kwargs):
        """PEFT calls this for what it has read from a file."""
        types = get_type_hints(cls)
        for name in types.keys() & kwargs.keys():
            try:
                type_validator(name, kwargs[name], types[name])
            except TypeError as error:
                raise ValueError(
                    f"`{name}` in a saved configuration is {kwargs[name]!r}, and must be {types[name]}. It is damaged; "
                    "download or save it again."
                ) from error
        return kwargs


def adapter_sha256(weights: str, settings: dict) -> str:
    """Of the file of the weights, and the settings after it."""
    summed = {name: value for name, value in settings.items() if name not in NOT_SUMMED}
    return sha256_of([weights], json.dumps(summed, sort_keys=True).encode())


def is_of(config_file: str, weights: str) -> bool:
    """Whether a file of settings belongs to the file of weights."""
    settings = SavedConfig.from_json_file(config_file)
    return settings.get("sha256") == adapter_sha256(weights, settings)


def extend_saving() -> None:
    """Has `PeftModel.save_pretrained` write TINT and DTS adapters so that whenever the process ends, the folder has the
    adapter that was in it or the new one.

    No method of an adapter's own is called before PEFT writes its weights, into the folder itself."""
    save = PeftModel.save_pretrained

    @wraps(save)
    def save_pretrained(self, save_directory, *args, **kwargs):
        ours = any(isinstance(config, SavedConfig) for config in self.peft_config.values())
        if not ours or not kwargs.get("is_main_process", True):
            return save(self, save_directory, *args, **kwargs)
        replaced = []
        try:
            with added_files(save_directory) as folder:
                card = os.path.join(save_directory, "README.md")
                if os.path.exists(card):  # to which PEFT adds
                    shutil.copyfile(card, os.path.join(folder, "README.md"))
                save(self, folder, *args, **kwargs)
                for where, _, files in os.walk(folder):
                    place = os.path.join(save_directory, os.path.relpath(where, folder))
                    if CONFIG_NAME in files and os.path.exists(os.path.join(place, CONFIG_NAME)):
                        finish_saving(place)
                        sync(os.path.join(where, CONFIG_NAME))
                        os.replace(os.path.join(where, CONFIG_NAME), os.path.join(place, NEXT))
                        replaced.append(place)
        finally:
            for place in replaced:
                finish_saving(place)

    PeftModel.save_pretrained = save_pretrained


def finish_saving(folder: str) -> None:
    """The settings that wait for their weights get their name if those are there, else they go."""
    following = os.path.join(folder, NEXT)
    if not os.path.exists(following):
        return
    if is_of(following, os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)):
        os.replace(following, os.path.join(folder, CONFIG_NAME))
    else:
        os.unlink(following)
    sync(folder)
