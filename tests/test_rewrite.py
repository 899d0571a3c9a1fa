"""Prompts are rewritten by a chat model: what is asked, what is made of the answer, what is kept, what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lingen.cli import main
from lingen.files import cache_folder
from lingen.recipe.errors import RecipeError
from lingen.recipe.sections import RewriteConfig
from lingen.run import fit
from lingen.text import instruction, rewrite
from lingen.text.instruction import INSTRUCTION, INSTRUCTION_VERSION, clean, fault_of, question
from lingen.text.rewrite import Rewriter, Rewritten
from lingen.weights import find_weights
from tests.helpers import chat
from tests.helpers.media import read_about
from tests.helpers.tiny import write_recipe

pytestmark = pytest.mark.usefixtures("cache")

BALL, SIGN, CAT, DOG = "a red ball", 'a sign says "OPEN"', "a cat", "a dog runs"
LONG = {BALL: "A red ball rolls slowly over green grass.", SIGN: 'A sign that says "OPEN" hangs on a door.'}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A word in place of the instruction: tiny models are taught in seconds."""
    monkeypatch.setattr(instruction, "INSTRUCTION", "Describe:")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model that has learned to answer well, to forget the quoted word at first, to be mute, to never end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(instruction, "INSTRUCTION", "Describe:")
        lessons = [(BALL, LONG[BALL], ""), (SIGN, "A sign hangs on a door.", LONG[SIGN]), (CAT, "", "")]
        lessons += [(DOG, "dog " * 24, "dog " * 24)]
        talks = []
        for prompt, first, second in lessons:
            talks.append((rewrite._ask(prompt), first))
            fault = fault_of(prompt, clean(first), prompt != DOG, 20)
            if fault:
                heard = " ".join(first.split()[:20])  # as much as it gets to say
                talks.append((rewrite._ask(prompt) + rewrite._send_back(Rewritten(prompt, heard, fault)), second))
        return chat.taught(tmp_path_factory.mktemp("chat") / "teacher", talks)


@pytest.fixture(scope="module")
def babbler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat.untaught(tmp_path_factory.mktemp("chat") / "babbler")


def how(path: Path, **settings) -> RewriteConfig:
    return RewriteConfig(path=str(path), **{"max_tokens": 20, **settings})


# what is asked, and what is made of the answer


def test_another_instruction_has_another_version():
    """What was kept of an older instruction must not be used: raise INSTRUCTION_VERSION, then add its hash here."""
    assert hashlib.sha256(INSTRUCTION.encode()).hexdigest()[:12] == {1: "74e9a1ed3357"}[INSTRUCTION_VERSION]
    assert question(SIGN).startswith(INSTRUCTION) and question(SIGN).endswith(SIGN)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("A red ball rolls.", "A red ball rolls."),
        ("  A red\n ball\trolls. \n", "A red ball rolls."),
        ('"A red ball rolls."', "A red ball rolls."),
        ("“A ‘red’ ball rolls.”", "A ‘red’ ball rolls."),
        ("'A dog's ball rolls.'", "A dog's ball rolls."),
        ('"A sign says "OPEN" in red."', 'A sign says "OPEN" in red.'),
        ('"OPEN" is on a door, behind it "SHUT"', '"OPEN" is on a door, behind it "SHUT"'),
        ("'OPEN' and 'SHUT'", "'OPEN' and 'SHUT'"),
        ('Sure! Here is the rewritten prompt:\n\n"A cat."\n\nNote: I kept it short.', "A cat."),
        ("Here's a paragraph of 100 words:\nA cat\nsits.", "A cat sits."),
        ("**Rewritten prompt:** A **black** cat.", "A black cat."),
        ("Certainly. The prompt: A cat.\n(Word count: 2)", "A cat."),
        ("# A cat\n\nA cat sits.", "A cat sits."),
        ("- A cat\n- on a mat", "A cat on a mat"),
        ("<think>\nA cat? Yes.\n</think>\n\nA cat.", "A cat."),
        ("Yes.</think>A cat.", "A cat."),
        # what only looks like a frame stays
        ("Sure-footed goats climb: high.", "Sure-footed goats climb: high."),
        ("Here is a garden. It is: green", "Here is a garden. It is: green"),
        ("The old man's note\nNotebook and pen.", "The old man's note Notebook and pen."),
        ("2 cats, 3 dogs", "2 cats, 3 dogs"),
        ("", ""), ('""', ""), ('"', '"'), ("<think>so</think>", ""), ("Here is the prompt:", ""),
    ],
)  # fmt: skip
def test_the_description_alone_is_left(answer: str, text: str):
    assert clean(answer) == text
    assert clean(text) == text


@pytest.mark.parametrize(
    ("prompt", "text", "lost"),
    [
        (SIGN, 'A door says "OPEN" in red.', None),
        (SIGN, "A door says “OPEN” in red.", None),
        (SIGN, "A door says OPEN in red.", '"OPEN"'),
        (SIGN, 'A door says "Open".', '"OPEN"'),
        (SIGN, 'A door says "OPENING".', '"OPEN"'),
        ('"A" and "B" and "C"', 'Letters "B" alone', '"A", "C"'),
        ("a sign 'don't walk'", "The sign 'don't walk' glows.", None),
        ("a sign 'don't walk'", "The sign 'do not walk' glows.", '"don\'t walk"'),
        ('two\n"GRAND  HOTEL" signs', 'Signs say "GRAND HOTEL".', None),
        ("the dog's ball and the cats' toys", "A ball.", None),
        ('a 5" screen beside a 6" one', "Two screens.", None),
    ],
)
def test_quoted_words_stay(prompt: str, text: str, lost: str | None):
    fault = fault_of(prompt, text, True, 20)
    assert (fault is None) if lost is None else str(fault).endswith(f"letter by letter: {lost}.")


def test_empty_and_endless_answers_are_faults():
    assert fault_of(BALL, "", True, 20) == "It is empty."
    assert fault_of(BALL, "A ball", False, 20) == "It has not come to an end after 20 tokens."


# with models of the real class


def test_good_answers_bad_ones_and_a_second_attempt(teacher: Path, short: None):
    told: list[tuple[int, int]] = []
    found = Rewriter(how(teacher)).rewrite([BALL, SIGN, CAT, DOG, BALL], lambda *both: told.append(both))
    assert found == [
        Rewritten(BALL, LONG[BALL]),
        Rewritten(SIGN, LONG[SIGN]),  # its first answer has no "OPEN"
        Rewritten(CAT, None, "It is empty."),
        Rewritten(DOG, None, "It has not come to an end after 20 tokens."),
        Rewritten(BALL, LONG[BALL]),
    ]
    assert told == [(0, 4), (4, 4)]


def test_a_batch_changes_nothing(teacher: Path, short: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    together = Rewriter(how(teacher)).rewrite([BALL, SIGN, DOG])
    monkeypatch.setenv("LINGEN_CACHE", str(tmp_path / "other"))
    assert Rewriter(how(teacher, batch=1)).rewrite([BALL, SIGN, DOG]) == together


def test_what_was_rewritten_loads_no_model_again(
    teacher: Path, babbler: Path, short: None, monkeypatch: pytest.MonkeyPatch
):
    first = Rewriter(how(teacher))
    first.rewrite([BALL, CAT])
    first.release()
    assert first.rewrite([SIGN])[0].text == LONG[SIGN]  # loads again

    def no_model(*arguments):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(rewrite, "Chat", no_model)
    again = Rewriter(how(teacher)).rewrite([SIGN, BALL])
    assert again == [Rewritten(SIGN, LONG[SIGN], cached=True), Rewritten(BALL, LONG[BALL], cached=True)]
    for changed in (
        lambda: Rewriter(how(teacher)).rewrite([BALL, CAT]),  # what failed is not kept
        lambda: Rewriter(how(teacher, max_tokens=21)).rewrite([BALL]),
        lambda: Rewriter(how(teacher, temperature=1.0)).rewrite([BALL]),
        lambda: Rewriter(how(babbler)).rewrite([BALL]),
    ):
        with pytest.raises(AssertionError, match="was loaded"):
            changed()
    monkeypatch.setattr(rewrite, "INSTRUCTION_VERSION", INSTRUCTION_VERSION + 1)
    with pytest.raises(AssertionError, match="was loaded"):
        Rewriter(how(teacher)).rewrite([BALL])


def test_a_damaged_file_of_the_cache_is_written_anew(teacher: Path, short: None):
    Rewriter(how(teacher)).rewrite([BALL])
    (file,) = cache_folder().rglob("*.json")
    held = json.loads(file.read_text())
    assert (held["prompt"], held["rewritten"]) == (BALL, LONG[BALL])
    file.write_text('{"prompt": "a re')
    assert Rewriter(how(teacher)).rewrite([BALL]) == [Rewritten(BALL, LONG[BALL])]
    assert json.loads(file.read_text()) == held and [*file.parent.iterdir()] == [file]


def test_a_cache_that_cannot_be_written_is_said(
    teacher: Path, short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LINGEN_CACHE", str(tmp_path / "file"))
    assert Rewriter(how(teacher)).rewrite([BALL]) == [Rewritten(BALL, LONG[BALL])]
    assert "cannot be kept" in caplog.text


def test_drawn_words_follow_from_seed_and_prompt(babbler: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    prompts = ["a b", "c d", "e f"]
    state = torch.get_rng_state()

    def texts(seed: int, prompts: list[str]) -> list[str | None]:
        monkeypatch.setenv("LINGEN_CACHE", str(tmp_path / f"{seed}{len(prompts)}"))
        drawn = how(babbler, temperature=1.0, seed=seed, max_tokens=200)
        return [one.text for one in Rewriter(drawn).rewrite(prompts)]

    one = texts(1, prompts)
    assert len(set(one)) == 3 and all(one)
    assert texts(1, prompts[1:]) == one[1:]
    assert texts(2, prompts) != one
    assert torch.equal(torch.get_rng_state(), state)


def test_folders_that_cannot_rewrite_are_refused(tmp_path: Path, babbler: Path):
    mute = chat.untaught(tmp_path / "mute", template=None)
    empty = tmp_path / "empty"
    empty.mkdir()
    (lack,) = Rewriter(how(tmp_path / "nowhere")).missing()
    assert lack[:2] == ("llama", str(tmp_path / "nowhere")) and f"--local-dir {tmp_path / 'nowhere'}" in lack.cure
    assert Rewriter(RewriteConfig()).missing()[0][:2] == ("llama", "-")
    for path, said in ((mute, "no chat template"), (empty, "holds no config.json"), (tmp_path / "x", "no such folder")):
        with pytest.raises(RecipeError, match=f"missing: llama {path}: .*{said}"):
            Rewriter(how(path)).rewrite([BALL])
    assert Rewriter(how(babbler)).missing() == []
    small = chat.untaught(tmp_path / "small", room=64)
    with pytest.raises(RecipeError, match=r"takes 64 tokens. .* \(rewrite.max_tokens\)"):
        Rewriter(how(small)).rewrite([BALL])
    for name in ("file", "model.safetensors"):  # no folder is to be put where a file is, or has its name
        (tmp_path / "file").touch()
        (lack,) = Rewriter(how(tmp_path / name)).missing()
        assert f"--local-dir {rewrite.HOME}` and set rewrite.path={rewrite.HOME}" in lack.cure


# the command line


def lines(path: Path, *prompts: str) -> str:
    path.write_text("\n".join(prompts) + "\n\n", encoding="utf-8")
    return str(path)


def test_prompts_rewrite(teacher: Path, short: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    good, bad = lines(tmp_path / "good.txt", SIGN, BALL), lines(tmp_path / "bad.txt", BALL, CAT)
    words = ["--rewriter", str(teacher)]
    assert main(["prompts", "rewrite", good, *words, "--out", str(tmp_path / "long.txt")]) == 0
    assert (tmp_path / "long.txt").read_text() == f"{LONG[SIGN]}\n{LONG[BALL]}\n"
    assert capsys.readouterr().out == f"{tmp_path / 'long.txt'}\n"
    assert main(["prompts", "rewrite", good, "--json", *words]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows == [{"prompt": prompt, "rewritten": LONG[prompt], "cached": True} for prompt in (SIGN, BALL)]
    assert main(["prompts", "rewrite", bad, *words, "--out", str(tmp_path / "none.txt")]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and not (tmp_path / "none.txt").exists()
    assert "Not rewritten in two attempts: a cat" in captured.err and "It is empty." in captured.err
    assert main(["prompts", "rewrite", bad, "--json", *words]) == 1
    row = json.loads(capsys.readouterr().out)[1]
    assert row == {"prompt": CAT, "rewritten": None, "cached": False, "fault": "It is empty."}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Say which model rewrites: --rewriter DIR, or --recipe R with rewrite.path."),
        (["rewrite.batch=2"], "--stage and key=value change a recipe: say which, --recipe R."),
        (["--rewriter", "nowhere"], "missing: llama nowhere: there is no such folder"),
        (["--recipe", "tiny.yaml"], "The recipe names no model that rewrites. Set rewrite.path, or give"),
        (["--recipe", "tiny.yaml", "rewrite.batch=0"], "Expected at least 1, got 0. (at rewrite.batch)"),
    ],
)
def test_wrong_use(words, said, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["prompts", "rewrite", lines(tmp_path / "p.txt", BALL), *words]) == 2
    assert said in capsys.readouterr().err


# and sampling


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path, teacher: Path) -> Path:
    """Trained weights whose recipe names the teacher."""
    folder = tmp_path_factory.mktemp("rewriting")
    recipe = write_recipe(folder / "tiny.yaml", tiny_shards)
    words = [f"rewrite.path={teacher}", "rewrite.max_tokens=20", "sample.prompts=[]"]
    return fit(recipe, words, run=folder / "run")


def sampled(run: Path, out: Path, prompt: str, *words: str) -> int:
    where = ["--checkpoint" if run.is_file() else "--run", str(run)]
    return main(["sample", *where, "--prompt", prompt, "--steps", "1", "--out", str(out), *words])


def latents(out: Path) -> torch.Tensor:
    with safe_open(str(out.with_suffix(".latents.safetensors")), "pt") as file:
        return file.get_tensor("latents")


def test_sample_encodes_the_rewritten_prompt_and_names_both(run: Path, short: None, tmp_path: Path, capsys):
    one, plain, by_hand = tmp_path / "one.mp4", tmp_path / "plain.mp4", tmp_path / "by_hand.mp4"
    assert sampled(run, one, BALL, "--rewrite") == 0
    assert "as they are" not in capsys.readouterr().err
    title, about = read_about(one)
    assert (title, about["prompt"], about["rewritten"]) == (BALL, BALL, LONG[BALL])
    assert sampled(run, plain, BALL) == 0
    said = capsys.readouterr().err
    assert said.startswith("The prompts are used as they are; --rewrite has the recipe's llama (")
    assert "rewritten" not in read_about(plain)[1]
    assert sampled(run, by_hand, LONG[BALL]) == 0
    assert torch.equal(latents(one), latents(by_hand)) and not torch.equal(latents(one), latents(plain))


def test_an_empty_prompt_stays_as_it_is(run: Path, teacher: Path, short: None, tmp_path: Path, capsys):
    found = Rewriter(how(teacher)).rewrite(["", BALL, " "])
    assert [(one.text, one.fault) for one in found] == [("", None), (LONG[BALL], None), (" ", None)]
    assert sampled(run, tmp_path / "x.mp4", "", "--rewriter", str(teacher)) == 0
    assert "An empty prompt is used as it is" in capsys.readouterr().err
    assert read_about(tmp_path / "x.mp4")[1]["rewritten"] == ""


def test_sample_never_falls_back_to_the_short_prompt(run: Path, short: None, tmp_path: Path, capsys):
    assert sampled(run, tmp_path / "cat.mp4", CAT, "--rewrite") == 1
    assert "Not rewritten in two attempts: a cat" in capsys.readouterr().err
    assert not list(tmp_path.glob("cat*"))


def test_sample_wants_a_rewriter_that_is_named(run: Path, teacher: Path, short: None, tmp_path: Path, capsys):
    weights, unnamed = find_weights(run), tmp_path / "unnamed.safetensors"
    with safe_open(str(weights), "pt") as file:
        tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    about["recipe"] = about["recipe"].replace(f"path: {teacher}", "path: null")
    save_file(tensors, str(unnamed), about)
    assert sampled(unnamed, tmp_path / "x.mp4", BALL, "--rewrite") == 2
    said = capsys.readouterr().err
    assert "names no model that rewrites" in said and "leave out --rewrite" in said and not list(tmp_path.glob("x*"))
    assert sampled(unnamed, tmp_path / "y.mp4", BALL) == 0
    assert "as they are" not in capsys.readouterr().err
    assert sampled(unnamed, tmp_path / "z.mp4", BALL, "--rewriter", str(teacher)) == 0
    assert read_about(tmp_path / "z.mp4")[1]["rewritten"] == LONG[BALL]
