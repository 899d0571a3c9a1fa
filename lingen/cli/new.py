"""``lingen new``: a package of your own, with a part in it and a test that passes."""

import argparse
from pathlib import Path

from lingen.cli.command import DONE, argument, command
from lingen.recipe.errors import RecipeError
from lingen.recipe.reading import shipped_folder


@command(
    "writes a small package with a part of your own, which a recipe names once the package is installed, and its test",
    argument("what", choices=["mixer", "scan", "text", "autoencoder"]),
    argument("name", metavar="NAME", help="of part, package and folder: small letters, digits and _"),
)
def new(args: argparse.Namespace) -> int:
    folder = Path(args.name)
    if not (args.name.isidentifier() and args.name.islower() and args.name.isascii()):
        raise RecipeError(f"A part is named in small letters, digits and _, such as my_{args.what}; got '{args.name}'.")
    if folder.exists():
        raise RecipeError(f"{folder} is there already; name another part, or go to another folder.")
    words = {"NAME": args.name, "CLASS": args.name.title().replace("_", "")}
    for file in sorted((shipped_folder("templates") / args.what).rglob("*.*")):
        text, path = file.read_text(encoding="utf-8"), folder / file.name.replace("NAME", args.name)
        for word, instead in words.items():
            text = text.replace(word, instead)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path)
    return DONE
