"""Pushes to the Hub in which nothing names a folder of this machine."""

import tempfile
from functools import wraps

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ._card import FILE, METHODS, model_card, read_card, save_card
from .experts import hub_reference


def push_adapters(model: PeftModel, repo_id: str, processing_class=None, **kwargs) -> CommitInfo:
    """Pushes the adapters of a model, its card, and a tokenizer or other `processing_class`, as one commit.

    `kwargs` are those of `upload`. Raises ValueError, before anything is sent, for what `check_pushable` refuses."""
    check_pushable(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        if processing_class is not None:
            processing_class.save_pretrained(folder)
        return upload(model, folder, repo_id, processing_class=processing_class, **kwargs)


def upload(
    model: nn.Module,
    folder: str,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    delete_patterns: list[str] | None = None,
    **card,
) -> CommitInfo:
    """Pushes a folder, with the model's card, as one commit, so that all of it is visible or nothing.

    The arguments are those of transformers' `push_to_hub`, the files of an earlier push that are to go, and those of
    `model_card`. Raises ConnectionError, with the repository as it was, where the Hub is lost on the way."""
    model_card(model, **card)  # raises for wrong arguments, before there is a repository
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    try:  # not from the cache, which may have it as it was before it was edited
        file = api.hf_hub_download(repo_id, FILE, revision=revision, force_download=True)
    except RemoteEntryNotFoundError:
        file = None
    except HfHubHTTPError:
        raise
    except Exception as error:  # it may be there, and what was added to it would be lost
        raise ConnectionError(
            f"The card of {repo_id!r}, of which the text around the generated part stays, could not be read ({error}). "
            "Nothing was pushed; push again."
        ) from error
    existing = read_card(file) if file else None
    save_card(model, folder, repo_id=repo_id, revision=revision, existing=existing, **card)
    try:
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
            create_pr=create_pr,
            delete_patterns=delete_patterns,
        )
    except (HfHubHTTPError, ValueError):
        raise
    except Exception as error:  # a lost connection is of many types, by the client's version
        raise ConnectionError(
            f"The push to {repo_id!r} broke off ({error}). It is one commit, so the repository has all of it or "
            "nothing; push again."
        ) from error


def check_pushable(model: nn.Module) -> None:
    """Raises ValueError where the files of TINT and DTS adapters would name a folder of this machine."""
    base_model = model.get_base_model() if isinstance(model, PeftModel) else model
    for name, config in _our_adapters(model).items():
        base = config.base_model_name_or_path or vars(base_model).get("name_or_path")
        if base and hub_reference(base) is None:
            raise ValueError(
                f"The adapter {name!r} names its base model by a local folder, {base!r}, which nobody else has. Set "
                f"`model.peft_config[{name!r}].base_model_name_or_path` to its Hub id, and push again."
            )
        if config.peft_type == "TINT" and config.save_experts == "reference":
            local = [task for task, source in config.experts.items() if hub_reference(source) is None]
            if local:
                raise ValueError(
                    f"The adapter {name!r} has experts that are on this machine only, of the tasks "
                    f"{', '.join(map(repr, local))}. Push them and make the model with their Hub ids, or make it with "
                    "`save_experts='dts'`, which puts them into the adapter. `save_pretrained` saves it as it is."
                )


def _our_adapters(model):
    configs = getattr(model, "peft_config", {})
    return {name: config for name, config in configs.items() if config.peft_type in METHODS}


def extend_pushes() -> None:
    """Has `push_to_hub` of models with TINT or DTS adapters, and `save_pretrained(push_to_hub=True)`, refuse what
    `check_pushable` does, and that of a PeftModel write our card.

    No method of an adapter's own sees whether it is pushed or saved, as both are the same calls of PEFT and of
    transformers, and those make the repository first and write a card of theirs over any that was saved."""
    push, push_transformers, save = PeftModel.push_to_hub, PreTrainedModel.push_to_hub, PreTrainedModel.save_pretrained

    @wraps(push)
    def push_to_hub(self, repo_id, **kwargs):
        return (push_adapters if _our_adapters(self) else push)(self, repo_id, **kwargs)

    @wraps(push_transformers)
    def push_to_hub_checked(self, *args, **kwargs):
        check_pushable(self)
        return push_transformers(self, *args, **kwargs)

    @wraps(save)
    def save_pretrained_checked(self, *args, **kwargs):
        if kwargs.get("push_to_hub"):
            check_pushable(self)
        return save(self, *args, **kwargs)

    PeftModel.push_to_hub, PreTrainedModel.push_to_hub = push_to_hub, push_to_hub_checked
    PreTrainedModel.save_pretrained = save_pretrained_checked
