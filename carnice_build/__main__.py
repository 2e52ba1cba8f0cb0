"""`python -m carnice_build` is `carnice`."""

from carnice_build.cli.main import run

run()
