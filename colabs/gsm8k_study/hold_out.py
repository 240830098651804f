"""Write the questions that the study holds out as a file, for evaluations without a run.

    python colabs/gsm8k_study/hold_out.py DATA

reads DATA/train.jsonl, writes DATA/held_out.jsonl and the lines of the others as DATA/rest.jsonl.
"""

import json
import sys
from pathlib import Path

from preset import get_config

from halos_jax.config import freeze
from halos_jax.rounds.order import start_order


def write_held_out(folder: Path) -> int:
    """Write `folder`/held_out.jsonl and `folder`/rest.jsonl; return the number of the former."""
    held_out = start_order(freeze(get_config(str(folder)))).held_out
    records = [
        {"question": one.turns[-1].content, "answer": one.extra["answer"]} for one in held_out
    ]
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / "held_out.jsonl").write_text("".join(lines), encoding="utf-8")
    asked = {record["question"] for record in records}
    with (folder / "train.jsonl").open(encoding="utf-8") as train:
        rest = [line for line in train if json.loads(line)["question"].strip() not in asked]
    (folder / "rest.jsonl").write_text("".join(rest), encoding="utf-8")
    return len(records)


if __name__ == "__main__":
    print(write_held_out(Path(sys.argv[1])), "questions are held out")
