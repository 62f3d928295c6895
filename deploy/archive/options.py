"""Options shared by the commands that make archives."""

from typing import Annotated, get_args

import click
import typer

from deploy.archive.pack import FORMATS
from handler.config import EngineConfig

ENGINES = [
    name for name in get_args(EngineConfig.model_fields["name"].annotation) if name != "auto"
]

Format = Annotated[
    str, typer.Option(click_type=click.Choice(FORMATS), help="A directory or a .mar file.")
]
Engine = Annotated[
    str | None,
    typer.Option(click_type=click.Choice(ENGINES), help="Instead of the engine the app names."),
]
