"""HF_ENDPOINT=... python tests/pull.py FOLDER

What `test_hub.py` runs in a fresh process: pulls the repositories that FOLDER/pushed.json names, by the code of their
cards, and prints as JSON what differs from the outputs and labels in FOLDER.
"""

import json
import re
import sys
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from models import IDS
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification


@torch.no_grad()
def differences(model, tasks, expected, labels):
    for task in tasks:
        if task is not None:
            getattr(model, "set_task" if hasattr(model, "tasks") else "set_adapter")(task)
        if model.config.id2label != {int(index): name for index, name in labels[str(task)].items()}:
            yield f"labels of {task}: {model.config.id2label}"
        if not torch.equal(model(**IDS).logits, expected[str(task)]):
            yield f"logits of {task}"


def main(folder):
    torch.set_num_threads(1)
    found = {}
    for repo_id, about in json.loads((folder / "pushed.json").read_text()).items():
        if about["plain"]:
            model = AutoModelForSequenceClassification.from_pretrained(repo_id).requires_grad_(False).eval()
        else:
            (code,) = re.findall(r"```python\n(.*?)```", ModelCard.load(repo_id).text, re.DOTALL)
            names = {}
            exec(code, names)
            model = names["model"]
        expected = load_file(folder / f"{repo_id.replace('/', '-')}.safetensors")
        tasks = [None] if about["plain"] else list(about["labels"])
        found[repo_id] = list(differences(model, tasks, expected, about["labels"]))
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
