"""How fast preprocessing is: against sentencepiece alone on the same text, and with two workers against one.

    python benchmarks/preprocess.py --json preprocess.json

The text is the interpreter's standard library as JSON lines, repeated.  Each round times three things in turn, so that a noisy
machine disturbs all alike: sentencepiece encoding the texts from memory on one core; preprocessing from JSON lines to .bin and
.idx with one worker; the same with two, start of the processes included.  Ratios are taken within a round.  CPU time, of all
processes together, is reported beside wall time: where other programs use the cores, it is the steadier of the two.
"""

import argparse
import json
import os
import platform
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import sentencepiece

from megalina.data.corpus import library_files, open_corpus
from megalina.data.documents import find_sources
from megalina.data.preprocess import Recipe, preprocess


def timed_s(work: Callable[[], object]) -> tuple[float, float]:
    """Wall time and CPU time; the workers' counts too, as they have ended."""
    begin_s, begin_cpu = time.perf_counter(), os.times()
    work()
    end_cpu = os.times()
    return time.perf_counter() - begin_s, sum(end_cpu[:4]) - sum(begin_cpu[:4])


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=96.0, help="size of the text (default: 96)")
    parser.add_argument("--vocab-size", type=int, default=4096)
    options = parser.parse_args()
    files = library_files(Path(sysconfig.get_paths()["stdlib"])).values()
    texts = [raw.decode() for raw in files if raw]
    copies = max(1, round(options.megabytes * 1e6 / sum(map(len, files))))
    texts *= copies
    text_mb = sum(len(text.encode()) for text in texts) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_path = open_corpus("stdlib", vocab_size=options.vocab_size, cache_dir=Path(folder)).tokenizer_path
        input_path = Path(folder, "text.jsonl")
        input_path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        model = sentencepiece.SentencePieceProcessor(model_file=tokenizer_path)
        sources = find_sources([str(input_path)])
        recipe = Recipe(tokenizer_path, append_eod=True)

        def run(workers: int) -> None:
            preprocess(sources, str(Path(folder, "out")), recipe, workers=workers, advance=lambda disk_bytes, text_bytes: None)

        rounds = []
        for number in range(options.rounds):
            alone = timed_s(lambda: [model.encode(texts[i : i + 64], num_threads=1) for i in range(0, len(texts), 64)])
            rounds.append((alone, timed_s(lambda: run(1)), timed_s(lambda: run(2))))
            speeds = ", ".join(f"{text_mb / wall_s:.2f}" for wall_s, _ in rounds[-1])
            print(f"round {number + 1}: sentencepiece, 1 worker, 2 workers: {speeds} MB/s", flush=True)
    result = {
        "text_mb": text_mb,
        "rounds": options.rounds,
        "vocab_size": options.vocab_size,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "sentencepiece_mb_per_s": summary([text_mb / alone[0] for alone, _, _ in rounds]),
        "one_worker_mb_per_s": summary([text_mb / one[0] for _, one, _ in rounds]),
        "two_workers_mb_per_s": summary([text_mb / two[0] for _, _, two in rounds]),
        "ratio_to_sentencepiece": summary([alone[0] / one[0] for alone, one, _ in rounds]),
        "two_worker_speedup": summary([one[0] / two[0] for _, one, two in rounds]),
        "cpu_ratio_to_sentencepiece": summary([alone[1] / one[1] for alone, one, _ in rounds]),
        "cpu_of_two_workers_over_one": summary([two[1] / one[1] for _, one, two in rounds]),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        Path(options.json).write_text(text + "\n")


if __name__ == "__main__":
    from megalina.console import command

    command(main)
