"""`python -m gptjax`: the same as the command `gptjax`."""

from gptjax.cli.main import main

main()
