"""Rows of a benchmark, each measured in a process of its own, so that none finds memory that another has taken."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
import transformers

import peft_tint


def run(script: str, rows: list[tuple[Path, list]], output: str) -> None:
    """Calls `script --work FOLDER --row ROW` for each (FOLDER, ROW), and writes what they print as JSON last."""
    found = []
    for work, row in rows:
        command = [sys.executable, script, "--work", str(work), "--row", json.dumps(row)]
        # or freed memory stays with the process, in holes of its heap
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
        found.append(json.loads(printed.strip().rsplit("\n", 1)[-1]))
        print(found[-1], flush=True)
    versions = {library.__name__: library.__version__ for library in (torch, transformers, peft_tint)}
    result = {"versions": versions, "machine": f"{platform.machine()}, 1 thread", "precision": "float32", "rows": found}
    Path(output).write_text(json.dumps(result, indent=1) + "\n")
