"""`carnice cache keys new|list|trust`."""

from __future__ import annotations

from typing import Annotated

import typer

from carnice_build.cli.arguments import RECIPES, Json, Recipes, print_json

app = typer.Typer(help="Keys that sign what is pushed, and those that are believed.")


@app.command()
def new(recipes: Recipes = RECIPES) -> None:
    """Make a key to sign with, and show the public one, for others to trust."""
    from carnice_build.remote.config import read_config
    from carnice_build.remote.signing import new_key

    path = read_config(recipes, None).key
    typer.echo(f"{new_key(path).public}  in {path}")


@app.command(name="list")
def list_keys(recipes: Recipes = RECIPES, as_json: Json = False) -> None:
    """Show the public keys that are believed, one's own first."""
    from carnice_build.remote.config import read_config
    from carnice_build.remote.signing import read_key

    config = read_config(recipes, None)
    signer = read_key(config.key)
    own = {signer.public: "this machine"} if signer else {}
    if as_json:
        print_json({"own": signer and signer.public, "trusted": config.trusted})
        return
    for key, name in (own | config.trusted).items():
        typer.echo(f"{key}  {name or own.get(key, '')}".rstrip())


@app.command()
def trust(
    key: Annotated[str, typer.Argument(help="A public key, ed25519:...", metavar="KEY")],
    name: Annotated[str, typer.Argument(help="Whose it is.", metavar="NAME")] = "",
    recipes: Recipes = RECIPES,
) -> None:
    """Believe what a key signed, from now on: adds it to carnice.toml beside the recipes."""
    from carnice_build.remote.config import trust as add

    typer.echo(f"{key} is in {add(recipes, key, name)}")
