"""`preservarium registry`."""

import click

commands: list[click.Command] = []
