"""The same weights give the losses of transformers' Mixtral, and stay the same over AdamW steps with clipping."""

from importlib.util import find_spec

import pytest

from benchmarks.train_step import HuggingFace, Ours, bench_config


@pytest.mark.full
@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers isn't installed")  # it takes a second to import
def test_losses_over_steps_equal_mixtral() -> None:
    config = bench_config()
    config.model.num_layers, config.model.d_model, config.model.d_ff = 2, 32, 48
    config.model.num_heads, config.model.num_kv_heads, config.model.vocab_size = 4, 2, 160
    config.optim.lr = 1e-2
    config.optim.weight_decay = 0.0  # transformers would decay norms too
    config.router.balance_loss = 0.0
    ours = Ours(config)
    theirs = HuggingFace(config, "eager")
    theirs.copy_from(ours)
    for number in range(4):
        assert ours.step(number) == pytest.approx(theirs.step(number), abs=2e-5), number
