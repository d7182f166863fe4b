"""`python -m agentgym_ig` is the `agentgym-ig` command."""

from agentgym_ig.commands.main import main

main()
