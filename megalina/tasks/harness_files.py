"""Local tasks as files of lm-evaluation-harness, so that any model it knows can be asked the same."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megalina.tasks.local import VERSION, LocalTask
from megalina.whole_file import write_whole

PREFIX = "megalina_"  # of the tasks' names there
TAG = f"{PREFIX}local"  # all of them
MODULE = "megalina_tasks"
YAML = """\
task: {name}
tag: {tag}
custom_dataset: !function {module}.documents
dataset_kwargs:
  file: {name}.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
num_fewshot: 0
process_results: !function {module}.process_results
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: centred_acc
    aggregation: mean
    higher_is_better: true
  - metric: bits_per_byte
    aggregation: mean
    higher_is_better: false
metadata:
  version: {version}
  sha256: {sha256}
"""


def write_tasks(tasks: Sequence[LocalTask], folder: Path) -> list[Path]:
    """For `lm_eval --include_path FOLDER --tasks megalina_local`, or one by its name; the .jsonl files are also what
    `megalina eval --tasks` takes.  OSError where the folder can't be written."""
    folder.mkdir(parents=True, exist_ok=True)
    functions = Path(__file__).with_name("harness_functions.py").read_text(encoding="utf-8")
    texts = {f"{MODULE}.py": functions}
    for task in tasks:
        name = PREFIX + task.name
        texts[f"{name}.yaml"] = YAML.format(name=name, tag=TAG, module=MODULE, version=VERSION, sha256=task.sha256)
        texts[f"{name}.jsonl"] = "".join(json.dumps(asdict(example)) + "\n" for example in task.examples)
    for name, text in texts.items():
        write_whole(folder / name, text)
    return [folder / name for name in texts]
