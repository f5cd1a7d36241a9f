"""Chapter 8's module: loss, optimizer, schedule, data order, the loop and the scores."""

import copy
import itertools
import math
import random
import runpy
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset, Subset, TensorDataset

from conformer_src.conformer import DualLogits, create_model
from conformer_src.recipes import Recipe
from conformer_src.training import (
    FREEZABLE,
    NonFiniteError,
    SeededSamples,
    TwoHeadLoss,
    WeightAverage,
    build_trainer,
    epoch_batches,
    evaluate,
    evaluation_batches,
    fit,
    freeze,
    load_batches,
    make_mix,
    parameter_groups,
    sample_name,
    set_training,
    share_batches,
    steps_per_epoch,
    train_step,
    warmup_cosine,
)

RECIPE = Recipe(in_chans=1, image_size=32, epochs=2, batch_size=4, workers=0, lr=2e-3)


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    """Accelerate keeps its precision for the life of a process: let each test choose its own."""
    AcceleratorState._reset_state(reset_partial_state=True)


def tiny(seed=0, **changes):
    """The smallest Conformer that has every part, for drawn images of 32 x 32."""
    torch.manual_seed(seed)
    shape = {"in_chans": 1, "depth": 3, "embed_dim": 24, "num_heads": 3, "channel_ratio": 0.25}
    return create_model("conformer_micro", **{**shape, **changes})


class Drawn(Dataset):
    """Ten classes of blots; each draw adds noise from the three random streams that exist."""

    def __init__(self, count=12, noise=0.1):
        draw = torch.Generator().manual_seed(3)
        self.labels = [n % 10 for n in range(count)]
        self.blots = torch.randn(10, 1, 32, 32, generator=draw)
        self.noise = noise

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        noise = torch.randn(1, 32, 32) + random.random() + np.random.random()  # noqa: NPY002
        return self.blots[self.labels[index]] + self.noise * noise, self.labels[index]


def trainer_for(recipe, images, model=None):
    return build_trainer(recipe, model or tiny(), steps_per_epoch(len(images), recipe))


def train(recipe, images=None, model=None, steps=None):
    """Train for some steps, or to the end; return the trainer and the losses."""
    images = images or Drawn()
    trainer = trainer_for(recipe, images, model)
    return trainer, list(itertools.islice(fit(trainer, images), steps))


def same(one, two):
    """Whether two models hold the same bits."""
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# The loss


def log_softmax(row):
    total = math.log(sum(math.exp(value) for value in row))
    return [value - total for value in row]


def by_hand(row, shares):
    return -sum(share * value for share, value in zip(shares, log_softmax(row), strict=True))


CONV, TRANS, LABELS = (
    [[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]],
    [[0.0, 1.0, 0.0], [1.0, 2.0, 0.0]],
    [0, 1],
)
LOGITS = DualLogits(torch.tensor(CONV), torch.tensor(TRANS))
SHARES = [[0.7, 0.3, 0.0], [0.0, 0.25, 0.75]]


@pytest.mark.parametrize(("reduction", "share"), [("mean", 0.5), ("sum", 1.0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_loss_equals_the_formula(reduction, share, smoothing, soft):
    given = SHARES if soft else [[float(c == label) for c in range(3)] for label in LABELS]
    shares = [[(1 - smoothing) * s + smoothing / 3 for s in row] for row in given]
    conv = sum(map(by_hand, CONV, shares)) / 2
    trans = sum(map(by_hand, TRANS, shares)) / 2
    target = torch.tensor(SHARES if soft else LABELS)
    own = TwoHeadLoss(reduction, 2.0, 0.5, smoothing)(LOGITS, target)
    assert own.item() == pytest.approx(share * (2 * conv + 0.5 * trans), rel=1e-6)


def test_mean_is_half_of_the_sum_for_two_heads_and_all_of_it_for_one():
    target = torch.tensor(LABELS)
    mean, total = (TwoHeadLoss(kind)(LOGITS, target) for kind in ("mean", "sum"))
    assert mean.item() == pytest.approx(total.item() / 2, rel=1e-6)
    for one in (DualLogits(LOGITS.conv, None), DualLogits(None, LOGITS.conv)):
        expected = F.cross_entropy(LOGITS.conv, target).item()
        assert TwoHeadLoss("mean")(one, target).item() == pytest.approx(expected)
        assert TwoHeadLoss("sum")(one, target).item() == pytest.approx(expected)


def test_a_weight_of_zero_leaves_a_head_untaught():
    model = tiny()
    TwoHeadLoss(conv_weight=0.0)(model(torch.randn(2, 1, 32, 32)), torch.tensor([1, 2])).backward()
    assert not model.conv_head.fc.weight.grad.any()
    assert model.trans_head.fc.weight.grad.any()


# The optimizer


@pytest.mark.parametrize("frozen", ["none", "backbone"])
def test_groups_hold_each_trained_parameter_once(frozen):
    model = tiny(pos_embed=4)
    freeze(model, frozen)
    groups = parameter_groups(model, 0.07)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert Counter(grouped) == Counter(id(p) for p in model.parameters() if p.requires_grad)
    assert [group["weight_decay"] for group in groups] == [0.07, 0.0]


def test_groups_are_those_of_the_authors():
    """They spare what has one dimension or is called bias, and what the model names."""
    model = tiny(pos_embed=4)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    spared = {names[id(parameter)] for parameter in parameter_groups(model, 0.05)[1]["params"]}
    named = {"entry.token_embed.cls_token", "entry.token_embed.pos_embed"}
    rule = {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 1 or name.endswith(".bias") or name in named
    }
    assert spared == rule
    norms = (nn.BatchNorm2d, nn.LayerNorm)
    scales = {id(part.weight) for part in model.modules() if isinstance(part, norms)}
    assert scales <= {id(parameter) for parameter in parameter_groups(model, 0.05)[1]["params"]}


def rates(recipe, steps):
    """The learning rate of each step of a run."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=recipe.lr)
    scheduler, found = warmup_cosine(optimizer, recipe, steps), []
    for _ in range(steps * recipe.epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def formula(recipe, steps):
    total = steps * recipe.epochs
    rise = min(round(steps * recipe.warmup_epochs), total - 1)
    found = [recipe.warmup_lr + (recipe.lr - recipe.warmup_lr) * t / rise for t in range(rise)]
    for t in range(total - rise):
        turn = (1 + math.cos(math.pi * t / (total - rise))) / 2
        found.append(recipe.min_lr + (recipe.lr - recipe.min_lr) * turn)
    return found


@pytest.mark.parametrize(
    ("steps", "epochs", "warmup"),
    [
        (10, 5, 1.0),
        (10, 5, 0.5),
        (7, 3, 0.33),
        (10, 5, 0.0),
        (4, 2, 1.99),
        (1, 1, 0.0),
        (1, 1, 0.6),
    ],
)
def test_schedule_equals_the_formula_at_each_step(steps, epochs, warmup):
    recipe = replace(RECIPE, epochs=epochs, warmup_epochs=warmup, warmup_lr=1e-6, min_lr=1e-5)
    assert rates(recipe, steps) == pytest.approx(formula(recipe, steps), rel=1e-6)


def test_schedule_of_the_authors_at_known_points():
    """Five epochs up to 1e-3, then 295 down to 1e-5 (SPEC: 300 epochs, 1e-6 first)."""
    recipe = replace(RECIPE, epochs=300, lr=1e-3, warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5)
    found = rates(recipe, 2)
    assert found[0] == pytest.approx(1e-6)
    assert found[10] == pytest.approx(1e-3)
    assert found[10 + 295] == pytest.approx((1e-3 + 1e-5) / 2)
    assert found[-1] == pytest.approx(1e-5, rel=1e-2)
    assert max(found) == pytest.approx(1e-3)


# Mixing


@pytest.mark.parametrize("count", [5, 4, 1])
@pytest.mark.parametrize("kinds", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixing_shares_each_image_out(kinds, count):
    mix = make_mix(replace(RECIPE, **kinds), 10)
    labels = torch.arange(count)
    images, shares = mix(torch.randn(count, 1, 32, 32), labels)
    assert images.shape == (count, 1, 32, 32)
    torch.testing.assert_close(shares.sum(1), torch.ones(count))
    assert (shares >= 0).all()
    assert (shares[torch.arange(count), labels] > 0).all()


def test_mixed_labels_say_how_much_of_each_image_is_there():
    count = 6  # image n is filled with n
    images = torch.arange(count).float().view(-1, 1, 1, 1).expand(-1, 1, 32, 32).contiguous()
    for kind in ({"mixup": 0.8}, {"cutmix": 1.0}):
        mixed, shares = make_mix(replace(RECIPE, **kind), count)(images, torch.arange(count))
        expected = shares @ torch.arange(count).float()
        torch.testing.assert_close(mixed.mean((1, 2, 3)), expected)
        assert not torch.equal(mixed, images)


def test_both_kinds_get_their_turn_and_none_is_none():
    mix = make_mix(replace(RECIPE, mixup=0.8, cutmix=1.0), 2)
    images, labels = torch.stack([torch.zeros(1, 32, 32), torch.ones(1, 32, 32)]), torch.arange(2)
    cut = Counter(
        bool(((mixed == 0) | (mixed == 1)).all())
        for mixed, _ in map(lambda _: mix(images, labels), range(40))
    )
    assert min(cut[True], cut[False]) > 5
    assert make_mix(RECIPE, 10) is None


# The moving average


def shifted(model):
    """Change all that a model holds, as steps would."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn(tensor.shape) if tensor.is_floating_point() else 1)


def test_average_follows_its_closed_form():
    model = tiny()
    average, expected = WeightAverage(model, 0.5), snapshot(model)
    for step in range(1, 12):
        shifted(model)
        average.update(model, step)
        keep = min(0.5, (1 + step) / (10 + step))  # 0.5 from step 8 on
        for name, tensor in model.state_dict().items():
            mixed = keep * expected[name] + (1 - keep) * tensor
            expected[name] = mixed if tensor.is_floating_point() else tensor.clone()
    torch.testing.assert_close(average.state, expected)


def test_average_without_its_quick_start_is_torchs():
    model = tiny()
    own = WeightAverage(model, 0.9)
    other = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    other.update_parameters(model)  # its first update copies
    for _ in range(5):
        shifted(model)
        own.update(model, 10**9)
        other.update_parameters(model)
    floats = {n: t for n, t in other.module.state_dict().items() if t.is_floating_point()}
    torch.testing.assert_close({name: own.state[name] for name in floats}, floats)


def test_applied_puts_the_average_in_and_gives_every_bit_back():
    model = tiny()
    average = WeightAverage(model, 0.5)
    shifted(model)
    before = snapshot(model)
    with average.applied(model) as inside:
        assert inside is model
        assert all(torch.equal(average.state[n], t) for n, t in model.state_dict().items())
    with pytest.raises(KeyboardInterrupt), average.applied(model):
        raise KeyboardInterrupt
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_average_is_kept_and_evaluated_in_a_run():
    images = Drawn()
    trainer, _ = train(replace(RECIPE, ema=0.9), images)
    assert not all(
        torch.equal(trainer.average.state[n], t) for n, t in trainer.network.state_dict().items()
    )
    plain = evaluate(trainer.network, images)
    with trainer.average.applied(trainer.network):
        assert evaluate(trainer.network, images).loss != plain.loss
    assert evaluate(trainer.network, images) == plain


# Freezing


@pytest.mark.parametrize("part", ["none", "conv", "trans", "backbone"])
def test_what_is_frozen_stands_and_the_rest_moves(part):
    model = tiny()
    before = snapshot(model)
    trainer, _ = train(replace(RECIPE, freeze=part, epochs=1), model=model)
    for name, tensor in trainer.network.state_dict().items():
        frozen = any(start in f".{name}" for start in FREEZABLE[part])
        assert torch.equal(tensor, before[name]) == frozen, name


def test_frozen_parts_are_those_that_are_meant():
    model = tiny()
    heads = {"conv_head", "trans_head"}
    freeze(model, "backbone")
    trained = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == heads
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    freeze(model, "conv")
    standing = [p for n, p in model.named_parameters() if not p.requires_grad]
    alone = tiny(branches="conv")  # the CNN branch, its head, and nothing else
    head = sum(p.numel() for p in alone.conv_head.parameters())
    assert sum(p.numel() for p in standing) == sum(p.numel() for p in alone.parameters()) - head
    before = [parameter.requires_grad for parameter in model.parameters()]
    freeze(model, "none")  # and what you froze yourself stays so
    assert [parameter.requires_grad for parameter in model.parameters()] == before


def test_freeze_norm_keeps_all_statistics_but_trains_the_scales():
    model = tiny()
    before = snapshot(model)
    trainer, _ = train(replace(RECIPE, freeze_norm=True), model=model)
    after = trainer.network.state_dict()
    buffers = [name for name, _ in model.named_buffers()]
    assert buffers
    assert all(torch.equal(before[name], after[name]) for name in buffers)
    assert not torch.equal(before["entry.stem.bn1.weight"], after["entry.stem.bn1.weight"])
    set_training(model, freeze_norm=False)
    assert all(part.training for part in model.modules())


# The order of the data


@pytest.mark.parametrize(("images", "size"), [(12, 4), (13, 4), (5, 5), (100, 7)])
def test_each_image_comes_at_most_once_an_epoch(images, size):
    recipe = replace(RECIPE, batch_size=size)
    batches = epoch_batches(images, recipe, 0)
    drawn = [index for batch in batches for index, _ in batch]
    assert {len(batch) for batch in batches} == {size}
    assert len(batches) == steps_per_epoch(images, recipe) == images // size
    assert len(set(drawn)) == len(drawn) == images // size * size
    assert set(drawn) <= set(range(images))


def test_orders_differ_by_epoch_and_by_seed_and_can_be_drawn_again():
    orders = [
        epoch_batches(40, replace(RECIPE, seed=seed), epoch)
        for seed, epoch in itertools.product(range(3), range(3))
    ]
    assert all(one != two for one, two in itertools.combinations(orders, 2))
    assert epoch_batches(40, replace(RECIPE, seed=1), 2) == orders[5]
    seeds = [seed for order in orders for batch in order for _, seed in batch]
    assert len(set(seeds)) == len(seeds)


def test_a_small_set_is_repeated_with_other_seeds():
    recipe = replace(RECIPE, batch_size=8)
    [batch] = epoch_batches(3, recipe, 0)
    counts = Counter(index for index, _ in batch)
    assert sorted(counts.values()) == [2, 3, 3]
    assert len({seed for _, seed in batch}) == 8
    assert [len(batch) for batch in epoch_batches(1, recipe, 0)] == [8]


@pytest.mark.parametrize("size", [6, 7])
def test_repeats_draw_an_image_several_times_in_a_batch_but_not_side_by_side(size):
    recipe = replace(RECIPE, batch_size=size, repeats=3)
    for batch in epoch_batches(36, recipe, 0):
        drawn = [index for index, _ in batch]
        assert len(drawn) == size
        assert len(set(drawn)) == math.ceil(size / 3)
        assert all(one != other for one, other in pairwise(drawn))


def test_an_epoch_with_repeats_sees_a_part_of_the_images():
    recipe = replace(RECIPE, batch_size=6, repeats=3)
    batches = epoch_batches(36, recipe, 0)
    drawn = [index for batch in batches for index, _ in batch]
    assert len(batches) == 6
    assert len(set(drawn)) == 12  # an epoch sees a third of the images, as in DeiT
    assert len({seed for batch in batches for _, seed in batch}) == 36


def parts(recipe, images=26, start=0, processes=1):
    """The keys that each process is given."""
    return [
        list(
            share_batches(
                images, recipe, start, SimpleNamespace(process_index=n, num_processes=processes)
            )
        )
        for n in range(processes)
    ]


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 1), (2, 1), (1, 4), (4, 2)])
def test_the_shares_of_all_processes_are_the_batch(processes, accumulate):
    recipe = replace(RECIPE, batch_size=8, accumulate=accumulate)
    whole = [batch for epoch in range(2) for batch in epoch_batches(26, recipe, epoch)]
    shares = parts(recipe, processes=processes)
    assert {len(part) for share in shares for part in share} == {8 // processes // accumulate}
    for number, batch in enumerate(whole):
        own = slice(number * accumulate, (number + 1) * accumulate)
        keys = [key for share in shares for part in share[own] for key in part]
        assert sorted(keys) == sorted(batch)
    assert {len(share) for share in shares} == {len(whole) * accumulate}


@pytest.mark.parametrize("start", range(7))
def test_a_start_in_the_middle_gives_the_tail(start):
    recipe = replace(RECIPE, batch_size=8)
    assert parts(recipe, start=start)[0] == parts(recipe)[0][start:]


@pytest.mark.parametrize(("processes", "accumulate"), [(3, 1), (2, 4)])
def test_a_batch_that_cannot_be_dealt_out_is_refused(processes, accumulate):
    recipe = replace(RECIPE, accumulate=accumulate)
    with pytest.raises(
        ValueError, match=f"batch_size 4 must be a multiple of {processes * accumulate}"
    ):
        parts(recipe, processes=processes)


def test_a_sample_depends_on_its_own_seed_alone():
    samples = SeededSamples(Drawn())
    first = samples[3, 77]
    torch.manual_seed(5)
    random.seed(5)
    again, other = samples[3, 77], samples[3, 78]
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    assert first[1:] == (3, "image 3")


def test_names_are_paths_where_there_are_any():
    folder = Drawn()
    folder.samples = [(f"cats/{n}.jpg", 0) for n in range(12)]
    assert sample_name(Subset(Subset(folder, [4, 5, 6]), [2]), 0) == "cats/6.jpg"
    assert sample_name(Subset(Drawn(), [7]), 0) == "image 7"


# The loop


def test_training_learns():
    images = Drawn(40)
    trainer, losses = train(replace(RECIPE, epochs=8, batch_size=10, lr=5e-3), images)
    assert len(losses) == trainer.step == 32
    assert losses[-1] < 0.75 * losses[0]
    scores = evaluate(trainer.network, images)
    assert min(scores.conv, scores.sum) > 90
    assert scores.trans > 50


def test_the_same_seed_gives_the_same_bits_and_another_one_others():
    hard = replace(RECIPE, mixup=0.8, cutmix=1.0, ema=0.9)
    models = [
        train(replace(hard, seed=seed), model=tiny(drop_rate=0.1, drop_path_rate=0.1))
        for seed in (1, 1, 2)
    ]
    (one, first), (two, second), (three, third) = models
    assert same(one.network, two.network)
    assert first == second
    assert not same(one.network, three.network)
    assert first[0] != third[0]


@pytest.mark.parametrize("stop", [2, 3, 4])  # three steps make an epoch
def test_a_stopped_run_ends_with_the_bits_of_one_that_was_not(stop):
    recipe = replace(RECIPE, mixup=0.8, cutmix=1.0, clip_grad=1.0, ema=0.9)
    images, model = Drawn(), {"drop_rate": 0.1, "drop_path_rate": 0.1}
    whole, losses = train(recipe, images, tiny(**model))
    torch.manual_seed(99)
    first, head = train(recipe, images, tiny(**model), steps=stop)
    torch.manual_seed(11)  # the resumed run starts from another random state
    second = trainer_for(recipe, images, tiny(seed=8, **model))
    second.network.load_state_dict(first.network.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.scheduler.load_state_dict(copy.deepcopy(first.scheduler.state_dict()))
    second.average.state, second.step = first.average.state, first.step
    assert head + list(fit(second, images)) == losses
    assert same(second.network, whole.network)
    assert all(torch.equal(whole.average.state[n], t) for n, t in second.average.state.items())


def test_what_the_caller_does_between_two_steps_changes_nothing():
    images = Drawn()
    undisturbed, losses = train(RECIPE, images)
    trainer, found = trainer_for(RECIPE, images), []
    for loss in fit(trainer, images):
        found.append(loss)
        evaluate(trainer.network, images, batch_size=5)
        torch.randn(7)
        random.random()
    assert found == losses
    assert same(trainer.network, undisturbed.network)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_nothing(workers):
    alone, losses = train(replace(RECIPE, mixup=0.8))
    helped, found = train(replace(RECIPE, mixup=0.8, workers=workers))
    assert found == losses
    assert same(alone.network, helped.network)


def test_a_batch_in_parts_gives_the_weights_of_a_whole_one():
    """Without BatchNorm's statistics of the batch, which are those of each part, in float64."""
    whole, parted = (
        train(replace(RECIPE, freeze_norm=True, accumulate=n, lr=1e-4), Doubles(), tiny().double())
        for n in (1, 2)
    )
    assert parted[1] == pytest.approx(whole[1], rel=1e-12)
    for one, two in zip(whole[0].network.parameters(), parted[0].network.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-7)


class Doubles(Drawn):
    """The same images in double precision."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image.double(), label


@pytest.mark.parametrize("images", [1, 3, 5])
def test_fewer_images_than_a_batch_and_odd_batches_with_mixup(images):
    recipe = replace(RECIPE, batch_size=5, mixup=0.8, cutmix=1.0)
    trainer, losses = train(recipe, Drawn(images))
    assert len(losses) == trainer.step == 2
    assert all(map(math.isfinite, losses))


@pytest.mark.parametrize("branches", ["conv", "trans"])
def test_a_single_branch_is_trained_and_scored(branches):
    images = Drawn(40)
    recipe = replace(RECIPE, epochs=8, batch_size=10, lr=5e-3)
    trainer, losses = train(recipe, images, tiny(branches=branches))
    scores = evaluate(trainer.network, images)
    own, other = (scores.conv, scores.trans)[:: 1 if branches == "conv" else -1]
    assert other is None
    assert own == scores.sum > 50
    assert losses[-1] < 0.9 * losses[0]


def test_clipping_bounds_the_step_that_is_taken(monkeypatch):
    images, norms = Drawn(), {}
    for largest in (0.0, 0.01):
        trainer = trainer_for(replace(RECIPE, clip_grad=largest), images)
        step = trainer.optimizer.step

        def noted(step=step, trainer=trainer, largest=largest):
            grads = [p.grad for p in trainer.model.parameters()]
            norms[largest] = torch.nn.utils.get_total_norm(grads).item()
            step()

        monkeypatch.setattr(trainer.optimizer, "step", noted)
        next(fit(trainer, images))
    assert norms[0.0] > 0.1
    assert norms[0.01] == pytest.approx(0.01, rel=1e-3)


def test_gradients_do_not_pile_up():
    images = Drawn()
    trainer, _ = train(RECIPE, images, steps=1)
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precisions(precision):
    trainer, losses = train(replace(RECIPE, precision=precision))
    assert {p.dtype for p in trainer.network.parameters()} == {torch.float32}
    with trainer.accelerator.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    assert losses[-1] < losses[0]


def test_half_precision_is_close_to_full():
    _, full = train(RECIPE)
    AcceleratorState._reset_state(reset_partial_state=True)
    _, half = train(replace(RECIPE, precision="bf16"))
    assert half != full
    assert half == pytest.approx(full, rel=0.05)


def test_channels_last_is_a_matter_of_storage():
    (last, found), (first, losses) = (
        train(replace(RECIPE, channels_last=choice)) for choice in (True, False)
    )
    kernel = "blocks.1.conv_block.conv2.weight"
    strides = [t.network.state_dict()[kernel].stride() for t in (last, first)]
    assert strides[0] != strides[1]
    assert found == pytest.approx(losses, rel=1e-2)


def test_checkpointing_gives_the_same_bits():
    (plain, losses), (saved, found) = (
        train(replace(RECIPE, checkpointing=choice), model=tiny(drop_rate=0.1))
        for choice in (False, True)
    )
    assert found == losses
    assert same(plain.network, saved.network)


def test_a_compiled_model_is_trained_and_comes_out_bare():
    model = tiny()
    model.compile = partial(model.compile, backend="eager")  # traced, but no C++ compiler
    compiled, found = train(replace(RECIPE, compile=True), model=model, steps=2)
    plain, losses = train(RECIPE, steps=2)
    assert found == pytest.approx(losses, rel=1e-3)
    assert compiled.network is model
    assert model.state_dict().keys() == plain.network.state_dict().keys()


# What is no number


class Poisoned(Drawn):
    """Like Drawn, but the image of one number is not finite."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return (image * math.nan if index == 5 else image), label


def test_a_loss_that_is_no_number_names_all_that_helps():
    images, recipe = Poisoned(), replace(RECIPE, ema=0.9)
    order = [key for key, *_ in itertools.chain(*epoch_batches(12, recipe, 0))]
    fatal = order.index(5) // 4
    trainer = trainer_for(recipe, images)
    steps = fit(trainer, images)
    for _ in range(fatal):
        next(steps)
    weights = [parameter.clone() for parameter in trainer.model.parameters()]
    state = copy.deepcopy((trainer.optimizer.state_dict(), trainer.average.state))
    with pytest.raises(NonFiniteError) as caught:
        next(steps)
    message = str(caught.value)
    rate = trainer.scheduler.get_last_lr()[0]
    names = [f"image {index}" for index in order[fatal * 4 : fatal * 4 + 3]]
    for words in ("the loss", f"step {fatal + 1},", f"{rate:.3g}", ", ".join(names), "1 more"):
        assert words in message
    assert trainer.step == fatal
    assert all(map(torch.equal, trainer.model.parameters(), weights))
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())
    after = trainer.optimizer.state_dict(), trainer.average.state
    torch.testing.assert_close(after, state, rtol=0, atol=0)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_message_about_a_small_batch_counts_right(size):
    trainer = trainer_for(RECIPE, Drawn())
    images = torch.full((size, 1, 32, 32), math.inf)
    batch = images, torch.zeros(size, dtype=torch.long), [f"{n}.jpg" for n in range(size)]
    with pytest.raises(NonFiniteError, match=rf"{size - 1}\.jpg") as caught:
        train_step(trainer, [batch])
    assert "more" not in str(caught.value)


def test_a_gradient_that_is_no_number_stops_as_well():
    trainer, images = trainer_for(RECIPE, Drawn()), Drawn()
    weight = trainer.network.conv_head.fc.weight
    weight.register_hook(lambda gradient: gradient * math.inf)
    before = snapshot(trainer.network.conv_head)
    with pytest.raises(NonFiniteError, match="the gradient is not finite in step 1"):
        next(fit(trainer, images))
    assert all(torch.equal(before[n], t) for n, t in trainer.network.conv_head.state_dict().items())


# The scores


def test_scores_equal_a_count_by_hand():
    images, model = Drawn(23, noise=0.0), tiny()
    with torch.no_grad():
        logits = model.eval()(torch.stack([image for image, _ in images]))
    labels = torch.tensor(images.labels)
    scores = evaluate(model, images, batch_size=5)  # the last batch has 3
    own = [100 * (each.argmax(1) == labels).double().mean() for each in (*logits, logits.sum())]
    assert scores.images == 23
    assert [scores.conv, scores.trans, scores.sum] == pytest.approx([float(each) for each in own])
    loss = sum(F.cross_entropy(each, labels) for each in logits) / 2
    assert scores.loss == pytest.approx(loss.item(), rel=1e-5)


def test_scores_do_not_depend_on_the_batch_or_the_workers_and_repeat_exactly():
    images, model = Drawn(23), tiny()
    once, again = evaluate(model, images, batch_size=8), evaluate(model, images, batch_size=8)
    assert once == again
    assert evaluate(model, images, batch_size=8, workers=2) == once
    other = evaluate(model, images, batch_size=23)
    assert other.loss == pytest.approx(once.loss, rel=1e-5)
    assert other[2:] == once[2:]


def test_the_sum_can_be_right_where_both_heads_are_wrong():
    class Torn(nn.Module):
        def __init__(self):
            super().__init__()
            self.anchor = nn.Parameter(torch.zeros(1))  # says where the model is

        def forward(self, images):
            rows = len(images)
            conv, trans = torch.tensor([5.0, 4.0, 0.0]), torch.tensor([0.0, 4.0, 5.0])
            return DualLogits(conv.expand(rows, 3), trans.expand(rows, 3))

    images = TensorDataset(torch.zeros(4, 1, 8, 8), torch.tensor([1, 1, 1, 0]))
    scores = evaluate(Torn(), images)
    assert (scores.conv, scores.trans, scores.sum) == (25.0, 0.0, 75.0)


def test_evaluation_leaves_the_model_as_it_was():
    model = tiny()
    set_training(model, freeze_norm=True)
    model.trans_head.eval()
    modes = [part.training for part in model.modules()]
    before = snapshot(model)
    evaluate(model, Drawn())
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_is_scored_where_it_is(monkeypatch):
    """On a machine with a GPU, a model that was left on the CPU is not torn apart."""
    accelerator = Accelerator()
    monkeypatch.setattr(Accelerator, "device", torch.device("meta"))
    assert evaluate(tiny(), Drawn(), accelerator).images == 12


def test_all_processes_score_all_images_once():
    images = Drawn(23)
    shares = []
    for index in range(3):
        process = SimpleNamespace(process_index=index, num_processes=3)
        loader, numbers = evaluation_batches(images, process, 4, 0)
        shares.append(dict(zip(numbers, [names for *_, names in loader], strict=True)))
    assert len({len(share) for share in shares}) == 1  # those that share parameters work in step
    merged = {number: names for share in shares for number, names in share.items()}
    assert [name for n in sorted(merged) for name in merged[n]] == [f"image {n}" for n in range(23)]


def test_loading_gives_whole_batches_in_parts():
    recipe = replace(RECIPE, accumulate=2)
    steps = list(load_batches(Drawn(), recipe, 4, Accelerator()))
    assert len(steps) == 2  # of 2 epochs of 3 steps, from step 4 on
    for step in steps:
        assert [images.shape for images, *_ in step] == [(2, 1, 32, 32)] * 2
        assert all(
            int(name.split()[1]) % 10 == label
            for _, own, names in step
            for name, label in zip(names, own, strict=True)
        )


# The benchmark


BENCHMARK = runpy.run_path(str(Path(__file__).resolve().parents[1] / "benchmarks/training.py"))


def test_models_that_are_compared_have_equally_many_parameters():
    sizes = {
        name: sum(
            p.numel() for p in create_model("conformer_micro", in_chans=1, **options).parameters()
        )
        for name, options in BENCHMARK["MODELS"].items()
    }
    assert set(sizes) == {"Conformer", "CNN", "ViT"}
    for size in sizes.values():
        assert size == pytest.approx(sizes["Conformer"], rel=0.1)


def test_a_finished_run_is_found_again_by_its_recipe():
    row = {"kind": "training", "recipe": {"a field that was dropped": 1} | asdict(RECIPE)}
    find = BENCHMARK["find"]
    assert find([row], RECIPE, "training") is row
    assert find([row], RECIPE, "loading") is None
    assert find([row], replace(RECIPE, seed=1), "training") is None
    del row["recipe"]["ema"]  # a field that came later
    assert find([row], RECIPE, "training") is row


def test_a_bar_is_kept_by_the_mean_and_by_the_slowest_run():
    rows = [
        {"test": {"sum": accuracy}, "until the scores": {"wall s": wall}}
        for accuracy, wall in [(84.9, 100), (85.3, 120)]
    ]
    verdict = BENCHMARK["verdict"]
    assert verdict("subset", rows) == "85 % in 120 s: kept"
    rows[1]["until the scores"]["wall s"] = 121
    assert verdict("subset", rows) == "85 % in 120 s: missed (time)"
    assert verdict("full", rows[:1]) == "91 % in 480 s: missed (accuracy)"
    assert verdict("heads", rows) == ""


def test_runs_in_one_process_may_have_different_precisions():
    for precision in ("bf16", "fp32", "bf16"):
        trainer = build_trainer(replace(RECIPE, precision=precision), tiny(), 4)
        assert trainer.accelerator.mixed_precision == precision.replace("fp32", "no")
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        build_trainer(replace(RECIPE, precision="fp16"), tiny(), 4)
