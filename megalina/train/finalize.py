"""The end of a run: texts that the trained model writes, and the report."""

import logging
from pathlib import Path
from typing import Any

from megalina.blocks.counts import count_parameters
from megalina.checkpoint.loaded_model import load_model
from megalina.config import PretrainConfig
from megalina.data.source import TokenData
from megalina.generate import Sampling, generate
from megalina.track.report import Sample, write_report

logger = logging.getLogger("megalina")
PROMPT_TOKENS = 24
TEMPERATURE, TOP_P = 0.8, 0.95
MOST_PARAMETERS = 2_000_000_000  # rank 0 holds the whole model in float32 in host memory, while the other ranks wait


def write_samples(config: PretrainConfig, data: TokenData, checkpoint: Path) -> list[Sample]:
    """Continuations of validation texts, by the model of `checkpoint`; none where there is no tokenizer or no validation
    text, or where the router looks at later tokens (says so in the log)."""
    if not config.tracker.samples or data.tokenizer is None or data.valid is None:
        return []
    total = count_parameters(config.model, config.router, vocab_size=data.vocab_size, seq_len=config.train.seq_len).total
    if total > MOST_PARAMETERS:
        logger.warning("no samples in the report: %.1f G parameters; use tools/generate.py %s", total / 1e9, checkpoint)
        return []
    samples = []
    length = min(PROMPT_TOKENS, config.train.seq_len // 2)
    try:
        loaded = load_model(checkpoint)
        for i in range(config.tracker.samples):  # from all over the validation text
            prompt = data.valid.batch(i * data.valid.num_sequences // config.tracker.samples, 1).tokens_BS[0, :length].tolist()
            sampling = Sampling(
                max_tokens=config.tracker.sample_tokens,
                max_positions=loaded.max_positions,
                temperature=TEMPERATURE,
                top_p=TOP_P,
                seed=i,
                stop_token=data.tokenizer.eod,
                num_ids=data.tokenizer.vocab_size,
            )
            tokens = generate(loaded.gpt, prompt, sampling)
            samples.append(
                Sample(data.tokenizer.decode(prompt), data.tokenizer.decode([t for t in tokens if t != data.tokenizer.eod]))
            )
    except ValueError as error:
        logger.warning("no samples in the report: %s", error)
    return samples


def close_run(config: PretrainConfig, data: TokenData, *, checkpoint: Path | None, summary: dict[str, Any]) -> None:
    """Rank 0 writes the report of what is in the run folder; whatever fails here is logged and does not fail the run."""
    run_dir = Path(config.run.dir)
    try:
        samples = write_samples(config, data, checkpoint) if checkpoint is not None else []
        path = write_report(run_dir, samples=samples, summary=summary)
        logger.info("report: %s", path)
    except OSError as error:
        logger.warning("warning: the report could not be written: %s; try tools/write_report.py %s", error, run_dir)
    except Exception:  # whatever it is: the model is trained and saved, and the log says what went wrong
        logger.exception("the report could not be written; try tools/write_report.py %s", run_dir)
