"""Several processes compute what one computes: BatchNorm, training, scores, going on."""

import io
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from processes import run
from torch import nn
from torch.utils.data import Dataset

from conformer_src.checkpoints import collect, restore
from conformer_src.conformer import Conformer, ConformerConfig, DualLogits
from conformer_src.coupled_block import Features
from conformer_src.recipes import Recipe
from conformer_src.scaling import SyncedBatchNorm2d, shard_parameters, synchronize_norms
from conformer_src.training import (
    PRECISIONS,
    build_trainer,
    evaluate,
    fit,
    set_training,
    steps_per_epoch,
)

CONFIG = ConformerConfig(
    patch_size=8,
    num_classes=4,
    channel_ratio=0.25,
    embed_dim=24,
    depth=3,
    num_heads=3,
    stem="small",
)
# The gradient of a bias before a BatchNorm is zero but for rounding, and Adam makes steps of full
# size of whatever it is: in 32 bits these biases differ, and the mean that takes them away again.
NO_EFFECT = ("up.conv_project.bias", "up.bn.running_mean")


class Random(Dataset):
    """Images (3, 32, 32) that mean nothing."""

    def __init__(self, images, dtype):
        draw = torch.Generator().manual_seed(5)
        self.images = torch.randn(images, 3, 32, 32, generator=draw).to(dtype)
        self.labels = torch.randint(4, (images,), generator=draw).tolist()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]


def packed(content):
    """Tensors as bytes: shared memory would go away with the process."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def unpacked(content):
    return torch.load(io.BytesIO(content), weights_only=True)


def build(dtype=torch.float64):
    torch.manual_seed(0)
    return Conformer(CONFIG).to(dtype)


def train(steps, dtype=torch.float64, sync=True, shard=False, saved=None, kept=None, **changes):
    """Train up to a step; return losses, scores, and all that a run changes, as bytes.

    `saved` is where to go on from, and `kept` a step after which all is kept as well.
    """
    recipe = Recipe(batch_size=8, epochs=2, workers=0, ema=0.9, lr=1e-2, **changes)
    accelerator = Accelerator(mixed_precision=PRECISIONS[recipe.precision])
    dataset, model = Random(24, dtype), build(dtype)
    if sync:
        assert synchronize_norms(model) is model
    if shard:
        assert shard_parameters(model) is model
    trainer = build_trainer(recipe, model, steps_per_epoch(24, recipe), accelerator)
    if saved:
        restore(trainer, unpacked(saved))
    losses, content = [], {}
    for loss in fit(trainer, dataset):
        losses.append(loss)
        if trainer.step == kept:
            content["kept"] = packed(collect(trainer))
        if trainer.step == steps:
            break
    network = trainer.network
    scores = [evaluate(network, dataset, accelerator, batch_size=5)]
    with trainer.average.applied(network):
        scores.append(evaluate(network, dataset, accelerator, batch_size=5))
    held = sum(
        (p.to_local() if shard else p).numel() for p in network.parameters() if p.numel() > 1
    )
    content.update(losses=losses, scores=scores, held=held, end=packed(collect(trainer)))
    return content


def weights(content):
    """Everything in a checkpoint that is a weight, a statistic or an average of them."""
    saved = unpacked(content["end"])
    return {
        f"{part}.{name}": tensor.double()
        for part in ("model", "model_ema")
        for name, tensor in saved[part].items()
    }


def distance(one, other, without=()):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    return max(
        (tensor - other[name]).abs().max().item()
        for name, tensor in one.items()
        if not name.endswith(without)
    )


@pytest.fixture(scope="module")
def alone():
    return run(1, train_plans, {}, {"dtype": torch.float32}, {"accumulate": 2, "clip_grad": 0.1})[0]


def train_plans(*plans):
    return [train(4, kept=2, **plan) for plan in plans]


# --- BatchNorm ----------------------------------------------------------------------------------


def norm_once(maps, factors, dtype, rank):
    """One pass of an uneven norm, as one of the processes; everything it computed."""
    norm = nn.BatchNorm2d(5, eps=1e-6)
    norm.weight.data, norm.bias.data = torch.linspace(0.5, 2, 5), torch.linspace(-1, 1, 5)
    norm = synchronize_norms(norm.to(dtype))
    own = maps[rank].to(dtype).requires_grad_()
    result = norm(own)
    (result * factors[rank].to(dtype)).sum().backward()
    return [
        *(result.detach(), own.grad, norm.weight.grad, norm.bias.grad),
        *(norm.running_mean, norm.running_var, norm.num_batches_tracked),
    ]


def maps_and_factors():
    """Maps with a large mean, of which the first process has 6, the second 2."""
    draw = torch.Generator().manual_seed(1)
    sizes = [(6, 5, 4, 3), (2, 5, 4, 3)]
    maps = [10 + rank + torch.randn(size, generator=draw) for rank, size in enumerate(sizes)]
    return maps, [torch.randn(size, generator=draw) for size in sizes]


def norm_in_process(dtype):
    maps, factors = maps_and_factors()
    return packed(norm_once(maps, factors, dtype, Accelerator().process_index))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_two_processes_normalise_as_one_with_both_batches(dtype, tolerance):
    maps, factors = maps_and_factors()
    both = norm_once([torch.cat(maps)], [torch.cat(factors)], dtype, 0)
    first, second = map(unpacked, run(2, norm_in_process, dtype))
    for joined, expected in zip(range(2), both[:2], strict=True):
        found = torch.cat([first[joined], second[joined]])
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for summed, expected in zip((2, 3), both[2:4], strict=True):
        found = first[summed] + second[summed]
        torch.testing.assert_close(found, expected, rtol=10 * tolerance, atol=10 * tolerance)
    for same in (4, 5, 6):
        torch.testing.assert_close(first[same], both[same], rtol=tolerance, atol=tolerance)
        assert first[same].equal(second[same])


def modes_in_process():
    """What a norm gives under autocast, in eval mode, and with recomputation, in two processes."""
    rank = Accelerator().process_index
    maps = maps_and_factors()[0][rank]
    norm = synchronize_norms(nn.BatchNorm2d(5))
    short = norm(maps.bfloat16())
    norm.eval()
    plain = nn.BatchNorm2d(5).eval()
    plain.load_state_dict(norm.state_dict())
    model = synchronize_norms(build())
    model.checkpointing = True
    model.train()(torch.randn(2, 3, 32, 32).double()).sum().sum().backward()
    counts = {norm.num_batches_tracked.item() for norm in norms(model)}
    return short.dtype, norm(maps).equal(plain(maps)), counts


def norms(model):
    return [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]


def test_a_synced_norm_keeps_bf16_is_plain_in_eval_and_counts_a_recomputed_batch_once():
    assert run(2, modes_in_process) == [(torch.bfloat16, True, {1})] * 2


def test_alone_a_synced_norm_is_the_plain_one():
    maps = maps_and_factors()[0][0]
    plain, synced = nn.BatchNorm2d(5), synchronize_norms(nn.BatchNorm2d(5))
    assert type(synced) is SyncedBatchNorm2d
    assert synced(maps).equal(plain(maps))
    assert synced.running_var.equal(plain.running_var)


def test_synchronizing_replaces_every_norm_and_keeps_all_names():
    model = build()
    before, count = model.state_dict(), len(norms(model))
    synchronize_norms(model)
    assert [type(norm) for norm in norms(model)] == [SyncedBatchNorm2d] * count
    assert list(model.state_dict()) == list(before)
    assert all(tensor is not None for tensor in model.load_state_dict(before))


def test_torchs_own_synced_norm_is_frozen_and_counts_a_recomputed_batch_once():
    """What `synchronize_norms` gives on a GPU; alone, it computes on the CPU as well."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(build())
    synced = [part for part in model.modules() if isinstance(part, nn.SyncBatchNorm)]
    model.checkpointing = True
    model.train()(torch.randn(2, 3, 32, 32).double()).sum().sum().backward()
    assert {norm.num_batches_tracked.item() for norm in synced} == {1}
    set_training(model, freeze_norm=True)
    assert model.training
    assert not any(norm.training for norm in synced)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_norms_are_torchs():
    model = synchronize_norms(build(torch.float32).cuda())
    assert not norms(model)
    assert any(isinstance(part, nn.SyncBatchNorm) for part in model.modules())


def test_alone_nothing_is_shared_out():
    model = build()
    assert type(shard_parameters(model)) is Conformer


# --- training -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    plans = [
        *({}, {"dtype": torch.float32}, {"accumulate": 2, "clip_grad": 0.1}),
        {"sync": False},
    ]
    return run(2, train_plans, *plans)


def test_two_processes_train_as_one_with_the_double_batch(alone, pair):
    for number in (0, 2):  # in 64 bits; without and with accumulation and clipping
        assert distance(pair[0][number], alone[number]) < 1e-9
        assert pair[0][number]["losses"] == pytest.approx(alone[number]["losses"], abs=1e-6)
    single, double = alone[1], pair[0][1]
    assert distance(double, single, NO_EFFECT) < 1e-3
    assert distance(double, single) < 0.1  # lr 1e-2, 4 steps


def test_all_processes_end_with_the_same_weights(pair):
    for first, second in zip(*pair, strict=True):
        assert first["losses"] == second["losses"]
        assert first["scores"] == second["scores"]


def test_norms_that_are_not_synced_train_otherwise(alone, pair):
    assert distance(pair[0][3], alone[0]) > 1e-3


def test_a_batch_that_cannot_be_dealt_out_is_refused_before_the_first_step():
    recipe, three = Recipe(batch_size=8, accumulate=2), SimpleNamespace(num_processes=3)
    with pytest.raises(ValueError, match=r"^batch_size 8 must be a multiple of 6, .*\(3\) times"):
        build_trainer(recipe, build(), 1, three)


# --- going on with another number of processes --------------------------------------------------


def go_on(saved):
    return train(4, saved=saved)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_processes(alone, pair, before, after):
    kept = {1: alone, 2: pair[0]}[before][0]["kept"]
    assert unpacked(kept)["step"] == 2
    resumed = run(after, go_on, kept)[0]
    assert len(resumed["losses"]) == 2
    assert distance(resumed, alone[0]) < 1e-9
    assert distance(resumed, {"end": kept}) > 1e-3


# --- scores -------------------------------------------------------------------------------------


def score(sizes):
    """Score one model on data sets of several sizes."""
    model = build(torch.float32)
    return [evaluate(model, Random(n, torch.float32), batch_size=5) for n in sizes]


def test_scores_do_not_depend_on_the_number_of_processes():
    sizes = (1, 4, 5, 11, 20, 23)  # fewer than a batch, one short batch, odd rounds
    expected = run(1, score, sizes)[0]
    assert [scores.images for scores in expected] == list(sizes)
    assert run(2, score, sizes) == [expected] * 2  # all digits
    assert run(3, score, sizes) == [expected] * 3


# --- parameters shared out ----------------------------------------------------------------------


def outputs_in_process():
    """The types that a sharded model gives, in two processes."""
    Accelerator()
    model = shard_parameters(build())
    images = torch.zeros(2, 3, 32, 32).double()
    return [type(model(images)), type(model.blocks[0](*model.entry(images)))]


def test_named_outputs_survive_fsdp():
    assert run(2, outputs_in_process)[1] == [DualLogits, Features]


def train_sharded(saved):
    plan = {"shard": True, "accumulate": 2, "clip_grad": 0.1}
    return [train(4, kept=2, **plan), train(4, saved=saved, **plan)]


@pytest.fixture(scope="module")
def sharded(alone):
    return run(2, train_sharded, alone[2]["kept"])


def test_each_process_holds_half_of_the_parameters_and_names_stay(alone, sharded):
    held = [content[0]["held"] for content in sharded]
    assert sum(held) == alone[0]["held"]
    assert max(held) < 0.55 * sum(held)  # what has an odd first side cannot be halved
    assert list(weights(sharded[0][0])) == list(weights(alone[0]))


def test_shared_parameters_train_as_whole_ones(alone, sharded):
    for first, second in zip(*sharded, strict=True):
        assert distance(first, alone[2]) < 1e-9  # the second began from another's checkpoint
        assert first["losses"] == second["losses"]
        assert first["scores"] == second["scores"]
        assert first["scores"] == [
            scores._replace(loss=pytest.approx(scores.loss, abs=1e-9))
            for scores in alone[2]["scores"]
        ]


def test_a_checkpoint_of_shared_parameters_is_one_of_whole_ones(alone, sharded):
    kept = sharded[0][0]["kept"]
    resumed = run(1, go_on_in_parts, kept)[0]
    assert len(resumed["losses"]) == 2
    assert distance(resumed, alone[2]) < 1e-9


def go_on_in_parts(saved):
    return train(4, saved=saved, accumulate=2, clip_grad=0.1)


def options_in_process():
    """Train sharded with all that could stand in the way; what has changed."""
    plan = {"freeze": "trans", "freeze_norm": True, "checkpointing": True, "precision": "bf16"}
    content = train(2, torch.float32, shard=True, **plan)
    before, after = build(torch.float32).state_dict(), unpacked(content["end"])["model"]
    return {name for name in after if not after[name].equal(before[name])}  # the first has all


def test_shared_parameters_can_be_frozen_recomputed_and_in_bf16():
    changed = run(2, options_in_process)[0]
    assert changed >= {"conv_head.fc.weight", "blocks.1.conv_block.conv2.weight"}
    assert not [name for name in changed if "trans_block" in name or "running" in name]


# --- the processes of these tests ---------------------------------------------------------------


def leave(code):
    import os

    os._exit(code)


def test_a_process_that_dies_or_fails_is_named():
    with pytest.raises(AssertionError, match="process 0 ended with code 7"):
        run(2, leave, 7)
    with pytest.raises(AssertionError, match=r"(?s)process 0:.*ZeroDivisionError"):
        run(1, divmod, 1, 0)
