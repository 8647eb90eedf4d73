"""``python -m tokenguard``."""

from tokenguard.cli import main

main(prog_name="tokenguard")
