"""The temporal autoencoder: images pass at the start, pieces give what the whole clip gives, weights must fit."""

import copy
import json
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lingen.autoencoder.network import NetworkSizes, decoder, encoder
from lingen.autoencoder.tae import TAE, TAESmall
from lingen.autoencoder.temporal import Stream, TimeAttention, TimeBlock, TimeConv, _Ends, regroup
from lingen.recipe.errors import RecipeError, SettingError
from lingen.recipe.registry import AUTOENCODERS
from tests.helpers.closeness import assert_close

TINY = {"width": 8, "multipliers": (1, 2), "blocks": 1, "channels": 4, "strides": (2, 2, 2), "chunk": 2}


def tiny(dtype=torch.float64, **changes) -> TAE:
    """An autoencoder in which every layer does something."""
    torch.manual_seed(0)
    tae = TAE(**{**TINY, **changes}).to(dtype).eval()
    with torch.no_grad():
        for parameter in tae.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        tae.mean.copy_(torch.randn_like(tae.mean))
        tae.std.copy_(torch.rand_like(tae.std) + 0.5)
    return tae


# layers


def pieces_through(layer, x, lengths):
    stream, out, start = Stream(), [], 0
    for length in lengths:
        stream.last = start + length == x.shape[1]
        out.append(layer(x[:, start : start + length], stream))
        start += length
    assert not stream.held or not stream.last
    return torch.cat(out, 1)


@pytest.mark.parametrize("frames", [1, 6, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_time_conv_is_a_padded_3d_convolution(stride, frames):
    conv = TimeConv(4, stride).double()
    twin = nn.Conv3d(4, 4, (stride + 2, 1, 1), (stride, 1, 1), (1, 0, 0), padding_mode="replicate", bias=False)
    twin.load_state_dict({"weight": conv.weight})
    twin = twin.double()
    x = torch.randn(2, frames, 3, 5, 4, dtype=torch.float64)
    even = torch.cat([x, x[:, -1:]], 1) if frames % stride else x
    assert_close("output", twin(even.movedim(-1, 1)).movedim(1, -1), conv(x, Stream(last=True)), 1e-12)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_repeated_ends_are_slices_side_by_side(after):
    x = torch.randn(2, 3, 2, 2, 4, dtype=torch.float64, requires_grad=True)
    plain = torch.cat([x[:, :1], x, *[x[:, -1:]] * after], 1)
    ends = _Ends.apply(x, 1, after)
    seed = torch.randn_like(plain)
    assert torch.equal(ends, plain)
    assert_close("gradient", torch.autograd.grad(plain, x, seed)[0], torch.autograd.grad(ends, x, seed)[0], 1e-12)


@pytest.mark.parametrize("phases", [1, 2])
def test_time_conv_takes_large_frames_in_strips(phases, monkeypatch):
    conv = TimeConv(4, phases=phases)
    x = torch.randn(2, 5, 3, 5, 4)
    whole = conv(x, Stream(last=True))
    monkeypatch.setattr("lingen.autoencoder.temporal.LARGEST_IMAGE", 300)
    assert_close("output", whole, conv(x, Stream(last=True)), 1e-6)


def test_two_phases_can_be_what_repeating_and_convolving_are():
    plain, phases = TimeConv(4).double(), TimeConv(4, phases=2).double()
    before, same, after = plain.weight.unbind(2)
    even, odd = [before, same + after, 0 * same], [0 * same, before + same, after]
    weight = torch.cat([torch.stack(even, 2), torch.stack(odd, 2)])
    phases.load_state_dict({"weight": weight})
    x = torch.randn(2, 5, 3, 2, 4, dtype=torch.float64)
    assert_close("output", plain(x.repeat_interleave(2, 1), Stream(last=True)), phases(x, Stream(last=True)), 1e-12)


@pytest.mark.parametrize("reach", [0, 1, 3])
def test_time_attention_sees_its_reach_and_no_further(reach):
    torch.manual_seed(1)
    layer = TimeAttention(16, reach).double()
    nn.init.normal_(layer.out.weight)
    nn.init.normal_(layer.bias)
    x = torch.randn(1, 5, 2, 1, 16, dtype=torch.float64)
    q, k, v = layer.qkv(layer.norm(x)).unflatten(-1, (3, layer.heads, -1)).unbind(4)
    rows = []
    for i in range(5):
        seen = range(max(0, i - reach), min(5, i + reach + 1))
        scores = torch.stack(
            [(q[:, i] * k[:, j]).sum(-1) / q.shape[-1] ** 0.5 + layer.bias[:, j - i + reach] for j in seen]
        )
        rows.append((scores.softmax(0)[..., None] * torch.stack([v[:, j] for j in seen])).sum(0).flatten(-2))
    assert_close("output", x + layer.out(torch.stack(rows, 1)), layer(x, Stream(last=True)), 1e-12)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=8), reach=st.integers(0, 3))
def test_each_layer_streams_exactly(lengths, reach):
    torch.manual_seed(2)
    for layer in (TimeConv(8), TimeConv(8, 2), TimeConv(8, phases=2), TimeBlock(8), TimeAttention(8, reach)):
        for parameter in layer.double().parameters():
            nn.init.normal_(parameter, std=0.3)
        x = torch.randn(1, sum(lengths), 2, 2, 8, dtype=torch.float64)
        with torch.no_grad():
            assert_close("output", layer(x, Stream(last=True)), pieces_through(layer, x, lengths), 1e-12)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=9), size=st.integers(1, 8))
def test_regrouped_pieces_are_full_but_for_the_last(lengths, size):
    whole = torch.arange(sum(lengths))[None, None, :, None, None]
    groups = list(regroup(whole.split(lengths, 2), size))
    assert [last for _, last in groups] == [False] * (len(groups) - 1) + [True]
    assert all(group.shape[2] == size for group, _ in groups[:-1]) and 1 <= groups[-1][0].shape[2] <= size
    assert torch.equal(torch.cat([group for group, _ in groups], 2), whole)


# the whole network


@pytest.mark.parametrize("strides", [(1, 4, 4), (2, 4, 4), (8, 8, 8), (4, 2, 2)])
def test_at_the_start_a_still_clip_gives_its_image_repeated(strides):
    torch.manual_seed(3)
    tae = TAE(strides=strides, channels=4, width=8, blocks=1).double().eval()
    image = torch.randn(2, 3, 1, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        latents = tae.encode(image)
        assert latents.shape == (2, 4, 1, 16 // strides[1], 16 // strides[2])
        frames = 2 * strides[0] + 1
        assert_close(
            "latents", latents.expand(-1, -1, 3, -1, -1), tae.encode(image.expand(-1, -1, frames, -1, -1)), 1e-12
        )
        video = tae.decode(latents)
        assert video.shape == (2, 3, strides[0], 16, 16)
        assert_close("video", video[:, :, :1].expand_as(video), video, 1e-12)


def test_at_the_start_frames_do_not_touch_each_other_where_time_is_not_halved():
    torch.manual_seed(4)
    tae = TAE(strides=(1, 2, 2), channels=4, width=8, blocks=1).double().eval()
    clip = torch.randn(1, 3, 4, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        one_by_one = torch.cat([tae.encode(clip[:, :, i : i + 1]) for i in range(4)], 2)
        assert_close("latents", one_by_one, tae.encode(clip), 1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("frames", [1, 2, 7, 33, 100])
def test_pieces_give_what_the_whole_clip_gives(frames, dtype, tolerance):
    tae = tiny(dtype, strides=(4, 2, 2), multipliers=None)
    clip = torch.rand(1, 3, frames, 8, 8, dtype=dtype) * 2 - 1
    with torch.no_grad():
        latents = tae._scaled(tae.posterior(clip)[0])
        assert latents.shape[2] == -(-frames // 4)
        video = tae.reconstruct(tae._raw(latents))
        assert video.shape[2] == 4 * latents.shape[2]
        for length in (1, 5, 64):
            assert_close("latents", latents, torch.cat(list(tae.encode_stream(clip.split(length, 2))), 2), tolerance)
        assert_close("video", video, torch.cat(list(tae.decode_stream(latents)), 2), tolerance)
        assert_close("latents", latents, tae.encode(clip), tolerance)
        assert_close("video", video, tae.decode(latents), tolerance)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    chunk=st.integers(1, 4),
    reach=st.integers(0, 3),
    strides=st.sampled_from([(1, 2, 2), (2, 2, 2), (4, 2, 2), (2, 4, 4)]),
)
def test_any_pieces_give_what_the_whole_clip_gives(lengths, chunk, reach, strides):
    tae = tiny(strides=strides, multipliers=None, chunk=chunk, reach=reach)
    clip = torch.rand(2, 3, sum(lengths), 4, 8, dtype=torch.float64)
    with torch.no_grad():
        whole = tae._scaled(tae.posterior(clip)[0])
        assert_close("latents", whole, torch.cat(list(tae.encode_stream(clip.split(lengths, 2))), 2), 1e-12)
        assert_close("video", tae.reconstruct(tae._raw(whole)), torch.cat(list(tae.decode_stream(whole)), 2), 1e-12)


def test_what_a_stream_holds_does_not_grow():
    tae = tiny(reach=3)
    for network, shape in ((tae.encoder, (1, 3, 4, 8, 8)), (tae.decoder, (1, 4, 2, 4, 4))):
        stream, held = Stream(), []
        for _ in range(20):
            list(network.stream(torch.randn(shape, dtype=torch.float64), stream, shape[2]))
            held.append(sum(one.nbytes for one in stream.held.values()))
            assert all(one.untyped_storage().nbytes() == one.nbytes for one in stream.held.values())
        assert held[0] < held[-1] and len(set(held[8:])) == 1


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and the most that ever were."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        found = out if isinstance(out, tuple | list) else (out,)
        for storage in [one.untyped_storage() for one in found if isinstance(one, torch.Tensor)]:
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.freed, storage._cdata)
        self.most = max(self.most, self.now)
        return out

    def freed(self, storage):
        self.now -= self.sizes.pop(storage)


def test_memory_follows_the_piece_and_not_the_clip():
    """Also at the end, where every layer gives all that it held for want of frames to come."""

    def peak(frames, chunk):
        tae = tiny(strides=(4, 2, 2), multipliers=None, chunk=chunk)
        latents = torch.randn(1, 4, frames, 8, 8, dtype=torch.float64)
        with Live() as live:
            for piece in tae.decode_stream(latents):
                assert piece.shape[2] <= 4 * chunk + 2  # what the last layer held
                del piece
        return live.most

    assert peak(80, 1) < 1.05 * peak(40, 1)
    assert peak(40, 1) < 0.5 * peak(40, 8)


def test_clips_of_a_batch_do_not_see_each_other():
    tae = tiny()
    clips = torch.randn(2, 3, 7, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        assert_close("latents", torch.cat([tae.encode(clip[None]) for clip in clips]), tae.encode(clips), 1e-12)


def gradients(tae, clip):
    tae.zero_grad()
    mean, logvar = tae.posterior(clip)
    (tae.reconstruct(mean)[:, :, : clip.shape[2]] - clip).square().mean().add(logvar.square().mean()).backward()
    return {name: parameter.grad for name, parameter in tae.named_parameters()}


@pytest.mark.parametrize("frames", [1, 5])
def test_every_weight_gets_a_gradient_and_checkpointing_changes_none(frames):
    clip = torch.randn(1, 3, frames, 8, 8, dtype=torch.float64)
    kept, recomputed = gradients(tiny(), clip), gradients(tiny(checkpointing=True), clip)
    for name, gradient in kept.items():
        assert gradient is not None and gradient.isfinite().all(), name
        # One latent frame attends to itself alone, whatever its scores.
        assert gradient.any() or name.endswith("time.bias") and frames == 1, name
    assert_close("gradient of", kept, recomputed, 1e-12, floor=1e-16)


def test_with_gradients_on_the_clip_is_taken_whole():
    tae = tiny()
    clip = torch.randn(1, 3, 9, 8, 8, dtype=torch.float64, requires_grad=True)
    latents = tae.encode(clip)
    assert_close("latents", torch.cat(list(tae.encode_stream([clip.detach()])), 2), latents.detach(), 1e-12)
    tae.decode(latents).sum().backward()
    assert clip.grad.isfinite().all() and torch.is_grad_enabled()
    assert not any(piece.requires_grad for piece in tae.decode_stream(latents)) and torch.is_grad_enabled()


def test_latents_are_scaled_by_what_was_measured():
    tae = tiny()
    clip = torch.randn(1, 3, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        raw, scaled = tae.posterior(clip)[0], tae.encode(clip)
        assert_close("latents", (raw[:, 1] - tae.mean[1]) / tae.std[1], scaled[:, 1], 1e-12)
        assert_close("video", tae.reconstruct(raw), tae.decode(scaled), 1e-12)


@pytest.mark.parametrize("frames", [1, 9])
def test_half_precision_is_near(frames):
    exact = tiny(torch.float32)
    clip = torch.rand(1, 3, frames, 16, 16) * 2 - 1
    with torch.no_grad():
        latents, video = exact.encode(clip), exact.reconstruct(exact.posterior(clip)[0])
        with torch.autocast("cpu", torch.bfloat16):
            assert_close("latents", latents, exact.encode(clip).float(), 5e-2)
            assert_close("video", video, exact.decode(latents).float(), 5e-2)
        half = copy.deepcopy(exact).bfloat16()
        assert_close("latents", latents, half.encode(clip).float(), 5e-2)
    assert half.last_layer.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert all(gradient.isfinite().all() for gradient in gradients(exact, clip).values())


@pytest.mark.parametrize("strides", [(8, 8, 8), (4, 8, 8), (1, 8, 8), (8, 16, 16), (2, 4, 4), (1, 1, 1), (4, 8, 4)])
def test_strides_and_channels_are_settings(strides):
    with torch.device("meta"):
        tae = TAE(path="nowhere.safetensors", strides=strides, channels=8, width=16)
        for frames in (1, 9):
            latents = tae.encode(torch.zeros(1, 3, frames, 64, 32))
            sizes = (-(-frames // strides[0]), 64 // strides[1], 32 // strides[2])
            assert latents.shape == (1, 8, *sizes)
            assert tae.decode(latents).shape == (1, 3, sizes[0] * strides[0], 64, 32)


def test_space_is_halved_first_and_time_last():
    sizes = {"channels": 4, "width": 8, "multipliers": None, "blocks": 1, "attention": True, "reach": 1}
    assert NetworkSizes((2, 8, 4), **sizes).scales == [(1, 2, 2), (1, 2, 2), (2, 2, 1)]
    assert NetworkSizes((4, 8, 8), **sizes).widths == [8, 16, 32, 32]
    assert len(encoder(NetworkSizes((1, 1, 1), **sizes)).layers) < len(decoder(NetworkSizes((2, 1, 1), **sizes)).layers)


@pytest.mark.parametrize(
    "wrong",
    [
        {"strides": (3, 8, 8)},
        {"strides": (8, 0, 8)},
        {"channels": 0},
        {"width": 0},
        {"blocks": 0},
        {"reach": -1},
        {"chunk": 0},
        {"multipliers": (1, 2)},
        {"multipliers": (1, 2, 0, 4)},
    ],
)
def test_senseless_settings_are_named(wrong):
    with pytest.raises(SettingError) as error:
        AUTOENCODERS.build({"name": "tae", **wrong})
    assert error.value.setting == next(iter(wrong))


def test_clips_that_cannot_be_taken():
    tae = tiny()
    with pytest.raises(ValueError, match="frames of 8x7 pixels: height and width must be multiples of 2 and 2"):
        next(tae.encode_stream([torch.zeros(1, 3, 1, 8, 7)]))
    for nothing in (tae.encode_stream([]), tae.decode_stream(torch.zeros(1, 4, 0, 4, 4))):
        with pytest.raises(ValueError, match="one frame or more"):
            next(nothing)


# weights


def save(tae, path, copies=("averaged", "raw"), metadata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.contiguous() for name, value in tae.state_dict().items()}
    tensors = {
        f"{copy}.autoencoder.{name}": value + (copy == "raw") for copy in copies for name, value in state.items()
    }
    save_file({**tensors, "raw.discriminator.weight": torch.zeros(1)}, str(path), metadata or {"format": "lingen"})
    return path


def test_weights_are_read_at_the_first_use(tmp_path):
    trained = tiny(torch.float32)
    clip = torch.rand(1, 3, 3, 8, 8)
    path = save(trained, tmp_path / "tae.safetensors")
    for method, given_ in (("encode", clip), ("decode", torch.rand(1, 4, 2, 4, 4))):
        tae = TAE(path=str(path), **TINY)
        assert tae.missing() == [] and not tae.loaded
        with torch.inference_mode():
            assert torch.equal(getattr(tae, method)(given_), getattr(trained, method)(given_)) and tae.loaded


def test_the_raw_copy_serves_where_no_averaged_one_is(tmp_path):
    trained = tiny(torch.float32)
    tae = TAE(path=str(save(trained, tmp_path / "tae.safetensors", ["raw"])), **TINY)
    tae.load()
    assert torch.equal(tae.mean, trained.mean + 1)


def test_a_run_folder_is_a_path_too(tmp_path):
    assert "`lingen fit --recipe tae_8x8x8 --run there`" in TAE(path="there", **TINY).missing()[0].cure
    (tmp_path / "run.json").write_text(json.dumps({"stages": ["images", "clips"]}))
    tae = TAE(path=str(tmp_path), **TINY)
    assert "no stage" in tae.missing()[0].cure
    trained = tiny(torch.float32)
    save(trained, tmp_path / "stages" / "images" / "weights.safetensors")
    assert tae.missing() == []
    tae.load()
    assert torch.equal(tae.std, trained.std)


def test_weights_that_were_given_are_not_read_over(tmp_path):
    trained, given_ = tiny(torch.float32), tiny(torch.float32)
    with torch.no_grad():
        given_.mean.add_(3)
    tae = TAE(path=str(save(trained, tmp_path / "tae.safetensors")), **TINY)
    holder = nn.ModuleDict({"autoencoder": tae})
    holder.load_state_dict({}, strict=False)
    assert not tae.loaded
    holder.load_state_dict({f"autoencoder.{name}": value for name, value in given_.state_dict().items()})
    tae.encode(torch.rand(1, 3, 1, 8, 8))
    assert torch.equal(tae.mean, given_.mean)


def test_training_never_touches_the_disk():
    tae = TAE(path="nowhere.safetensors", **TINY)
    tae.reconstruct(tae.posterior(torch.rand(1, 3, 2, 8, 8))[0])
    with pytest.raises(
        RecipeError,
        match=r"missing: tae nowhere.safetensors: there is no .* file\. Train .* --out nowhere.safetensors`",
    ):
        tae.encode(torch.rand(1, 3, 2, 8, 8))


@pytest.mark.parametrize(
    "change, cure",
    [
        ({"channels": 8}, "Set autoencoder.channels=4 (not 8)"),
        ({"strides": (4, 4, 4), "multipliers": None}, "Set autoencoder.strides=[2,2,2] (not [4,4,4])"),
        ({"strides": (1, 2, 2)}, "Set autoencoder.strides=[2,2,2] (not [1,2,2])"),
        ({"width": 4}, "Set autoencoder.width=8 (not 4), or"),
        ({"multipliers": (1, 3)}, "Set autoencoder.multipliers=[1,2] (not [1,3])"),
        ({"blocks": 2, "reach": 1}, "Set autoencoder.blocks=1 (not 2) and autoencoder.reach=2 (not 1)"),
        ({"attention": False}, "Set autoencoder.attention=true (not false), or"),
        ({"width": 4, "multipliers": (1, 3)}, "Set autoencoder.width=8 (not 4) and autoencoder.multipliers=[1,2]"),
    ],
)
def test_weights_of_other_sizes_name_the_setting(tmp_path, change, cure):
    path = save(TAE(**TINY), tmp_path / "tae.safetensors")
    with torch.device("meta"):
        (found,) = TAE(**{**TINY, **change}, path=str(path)).missing()
    assert found.name == "tae" and found.path == str(path) and cure in found.cure


def test_weights_without_attention_name_that_setting_alone(tmp_path):
    path = save(TAE(**TINY, attention=False), tmp_path / "tae.safetensors")
    assert "Set autoencoder.attention=false (not true), or" in TAE(**TINY, path=str(path)).missing()[0].cure


def test_what_is_no_autoencoder_is_said(tmp_path):
    assert "lingen fit --recipe tae_8x8x8" in TAE(**TINY).missing()[0].cure
    foreign = save(TAE(**TINY), tmp_path / "foreign.safetensors", metadata={"format": "pt"})
    other = save(TAE(**TINY), tmp_path / "other.safetensors", copies=[])
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    for path, told in (
        (foreign, "holds no lingen weights"),
        (other, "no autoencoder"),
        (broken, "it is cut off or no safetensors file ("),
    ):
        (found,) = TAE(**TINY, path=str(path)).missing()
        assert told in found.cure and ". Set autoencoder.path to" in found.cure and str(path) not in found.cure
    pool = tmp_path / "pool.safetensors"
    save_file({"raw.autoencoder.weight": torch.zeros(2)}, str(pool), {"format": "lingen"})
    assert "not those of this version" in TAE(**TINY, path=str(pool)).missing()[0].cure


def test_the_small_one_comes_with_lingen():
    with torch.device("meta"):
        small = TAESmall()
    assert (small.strides, small.channels) == ((8, 8, 8), 16)
    assert 2 * sum(parameter.numel() for parameter in small.parameters()) < 16e6
    for found in small.missing():  # until its weights are there
        assert found.name == "tae_small" and "install lingen anew" in found.cure
