"""The network inside the tools that people put around it, at toy size."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from conformer_src.checks import golden
from conformer_src.conformer import Conformer, ConformerConfig
from conformer_src.weights import official_name

TOY = {"num_classes": 10, "channel_ratio": 0.25, "embed_dim": 48, "depth": 6, "num_heads": 3}
BATCH = torch.export.Dim("batch", min=2, max=64)


def toy(**changes):
    return golden.fill_(Conformer(ConformerConfig(**TOY | changes)), official_name)


def images_of(batch, height=64, width=96):
    return golden.image(batch, 3, height, width)


def assert_same(found, expected, tolerance=1e-4):
    for one, other in zip(found, expected, strict=True):
        scale = other.square().mean().sqrt()
        torch.testing.assert_close(one / scale, other / scale, rtol=0, atol=tolerance)


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def assert_one_graph_learns_the_same(model, images):
    plain = copy.deepcopy(model)
    plain.checkpointing = False
    compiled = torch.compile(model, fullgraph=True)
    found, expected = compiled(images), plain(images)
    assert_same(found, expected)
    found.sum().square().mean().backward()
    expected.sum().square().mean().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(dict(model.named_buffers()), dict(plain.named_buffers()))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiles_as_one_graph_and_learns_the_same(checkpointing):
    model = Conformer(ConformerConfig(**TOY | {"depth": 3}))
    model.checkpointing = checkpointing
    assert_one_graph_learns_the_same(model, torch.randn(2, 3, 64, 96))


@pytest.mark.parametrize(
    "changes",
    [
        {"stem": "small", "patch_size": 8, "pad": True, "pos_embed": 4},
        {"fcu_down": "conv", "fcu_up": "bilinear", "num_med_block": 1},
        {"fcu_down": "max", "coupling": "down"},
        {"branches": "conv"},
        {"branches": "trans"},
    ],
    ids=str,
)
@pytest.mark.usefixtures("_fresh_compiler")
@torch.no_grad()
def test_every_choice_is_one_graph(changes):
    model, images = toy(**changes).eval(), images_of(2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # traced, not translated
    for one, other in zip(compiled(images), model(images), strict=True):
        assert (one is None) == (other is None)
        if other is not None:
            assert_same([one], [other])


@torch.no_grad()
def test_exports_with_a_batch_of_any_length():
    model = toy().eval()
    program = torch.export.export(model, (images_of(2),), dynamic_shapes=({0: BATCH},))
    assert_same(program.module()(images_of(5)), model(images_of(5)))


@torch.no_grad()
def test_exports_with_images_of_any_size_that_fits():
    model = toy().eval()
    height, width = (torch.export.Dim(side, min=2, max=16) for side in ("height", "width"))
    shapes = ({0: BATCH, 2: 16 * height, 3: 16 * width},)
    program = torch.export.export(model, (images_of(2),), dynamic_shapes=shapes)
    assert_same(program.module()(images_of(3, 80, 48)), model(images_of(3, 80, 48)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated")
@torch.no_grad()
def test_traces():
    model = toy().eval()
    traced = torch.jit.trace(model, images_of(2))
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    assert_same(torch.jit.load(buffer)(images_of(5)), model(images_of(5)))


@torch.no_grad()
def test_onnx_runtime_computes_the_same(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, path = toy().eval(), tmp_path / "toy.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (images_of(2),),
            path,
            dynamo=True,
            verbose=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    for batch in (1, 5):
        found = session.run(None, {entry.name: images_of(batch).numpy()})
        assert_same([torch.from_numpy(one) for one in found], model(images_of(batch)))


def test_channels_last_computes_the_same_and_stays():
    model, images = toy().eval(), images_of(2)
    expected = model(images)
    model, images = (thing.to(memory_format=torch.channels_last) for thing in (model, images))
    assert_same(model(images), expected)
    for features in model.forward_blocks(images):
        assert features.maps.is_contiguous(memory_format=torch.channels_last)


def test_bfloat16_autocast_stays_near_and_learns():
    # Fresh weights: those of the goldens let the outputs grow beyond what bfloat16 follows.
    model, images = Conformer(ConformerConfig(**TOY)), torch.randn(2, 3, 64, 96)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = model.eval()(images)
    assert {logits.dtype for logits in found} == {torch.bfloat16}
    assert_same([logits.float() for logits in found], model(images), 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.train()(images)
    found.sum().float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


def test_safetensors_keep_every_bit(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, path = toy(), tmp_path / "toy.safetensors"
    safetensors.save_file(model.state_dict(), path)
    loaded = Conformer(model.config)
    loaded.load_state_dict(safetensors.load_file(path))
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    safetensors.save_model(model, path)  # no two tensors share memory
    assert safetensors.load_model(Conformer(model.config), path) == (set(), [])


@pytest.mark.parametrize("changes", [{}, {"branches": "conv"}, {"pad": True}], ids=str)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_equal_and_independent(copied, changes):
    model, images = toy(**changes).eval(), images_of(2)
    model.checkpointing = True
    twin = copied(model)
    assert twin.config == model.config
    assert twin.checkpointing
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=0, atol=0)
    with torch.no_grad():
        twin.blocks[0].conv_block.conv1.weight.zero_()
    assert model.blocks[0].conv_block.conv1.weight.any()
    assert not torch.equal(twin(images).sum(), model(images).sum())


def test_ordinary_tools_of_modules_work():
    model = toy()
    assert all(p.dtype == torch.float64 for p in copy.deepcopy(model).double().parameters())
    assert all(p.is_meta for p in copy.deepcopy(model).to("meta").parameters())
    assert sum(isinstance(part, nn.MultiheadAttention) for part in model.modules()) == 0
    assert not model.requires_grad_(False)(images_of(2)).sum().requires_grad
