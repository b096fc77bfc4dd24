"""The reference: `GPT.forward`, autograd and torch's optimizer, taken apart."""

import pytest
import torch

from megalina.model.init import spec_of
from megalina.verify.recording import SEQUENCES, Layout
from megalina.verify.reference import detail, model_of, record, reference_config
from megalina.verify.start import random_batches
from tests.verify.cases import MODELS, ROUTERS, config_with


@pytest.mark.sampled(14)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("router", ROUTERS)
def test_losses_and_gradients_are_those_of_the_models_own_forward(model: str, router: str) -> None:
    config = reference_config(config_with(model=model, router=router))
    (batch,) = random_batches(config, 1)
    recording = record(config, [batch])
    gpt, tokens, valid = model_of(config), int(batch.loss_mask_BS.sum()), int(batch.valid_BS.sum())
    loss = balance = 0.0
    more = {"locality_loss": config.router.locality_loss, "mutual_information_loss": config.router.mutual_information_loss}
    for part in batch.split(config.train.micro_batch_size):
        found = gpt(part)
        whole = (
            found.loss / tokens
            + config.router.balance_loss * found.auxiliary["balance_loss"] / valid
            + config.router.z_loss * found.auxiliary["z_loss"] / valid
            + sum(weight * found.auxiliary[name] / valid for name, weight in more.items() if weight)
            + config.model.mtp_loss * found.auxiliary.get("mtp_loss", 0.0) / max(config.model.mtp_layers, 1) / tokens
        )
        whole.backward()
        loss, balance = (
            loss + found.loss.item() / tokens,
            balance + found.auxiliary["balance_loss"].item() / valid / len(gpt.moe_layers),
        )
    assert recording.entry(0, "loss", "loss").value.item() == pytest.approx(loss, rel=1e-13)
    assert recording.entry(0, "loss", "balance_loss").value.item() == pytest.approx(balance, rel=1e-13)
    for name, p in gpt.named_parameters():
        want = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(
            recording.entry(0, "gradient", name).value, want.reshape(spec_of(p).shape), rtol=1e-12, atol=1e-15
        )


@pytest.mark.parametrize("router", ["topk", "groups of best", "global", "expert choice", "hash"])
def test_the_gradients_of_units_and_losses_sum_to_the_gradient(router: str) -> None:
    config = config_with(model="dropout", router=router)
    recording = record(config, random_batches(config, 1))
    detail(recording, Layout(4, 2, 1, micro_batch=2))
    for name, units in recording.unit_gradients.items():
        want = recording.entry(0, "gradient", name).value
        assert units.shape == (SEQUENCES // 2, 3, *want.shape)
        torch.testing.assert_close(units.sum((0, 1)), want, rtol=1e-12, atol=1e-15)
    router_weight = recording.unit_gradients.get("layers.1.router.weight")
    if router == "hash":
        assert router_weight is None
    else:  # no two units and no two losses pull alike
        assert router_weight is not None
        parts = router_weight.flatten(0, 1)[:, None].flatten(2)
        assert int((parts.abs().amax((1, 2)) > 1e-9).sum()) == len(parts) - (len(parts) // 3 if router == "expert choice" else 0)


def test_no_parameter_starts_at_zero_or_one_and_clipping_acts() -> None:
    for model in MODELS:
        config = config_with(model=model, router="sigmoid")
        recording = record(config, random_batches(config, 2))
        for name in (e.name for e in recording.entries if e.step == -1):
            value = recording.entry(-1, "weight", name).value
            assert not ((value == 0) | (value == 1)).any(), name
            assert not torch.equal(value, recording.entry(0, "weight", name).value)
        for step in range(2):
            assert recording.entry(step, "norm", "grad_scale").value < 0.9
        gpt = model_of(config)
        assert all((gpt.layers[i].router.bias_E != 0).all() for i in gpt.moe_layers)


def test_the_text_has_documents_padding_and_masked_labels() -> None:
    config = config_with()
    first, second = random_batches(config, 2)
    assert not torch.equal(first.tokens_BS, second.tokens_BS)
    assert second.sample_B.tolist() == list(range(SEQUENCES, 2 * SEQUENCES))
    assert first.document_BS is not None
    for row in range(SEQUENCES):
        for i in range(1, config.train.seq_len):
            same = first.document_BS[row, i] == first.document_BS[row, i - 1]
            assert first.position_BS[row, i] == (first.position_BS[row, i - 1] + 1 if same else 0)
    assert 0 < int((~first.valid_BS).sum()) < int((~first.loss_mask_BS).sum()) < first.loss_mask_BS.numel()
    assert (first.document_BS.amax(1) > 0).any()
    config.data.reset_attention = config.data.reset_positions = False
    (plain,) = random_batches(config, 1)
    assert plain.document_BS is None
    assert plain.position_BS.tolist() == [list(range(config.train.seq_len))] * SEQUENCES
