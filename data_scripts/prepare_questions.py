"""Prepare question sets; the same as `agentgym-ig data questions`.

python data_scripts/prepare_questions.py nq hotpotqa --out questions
"""

from agentgym_ig.commands.data import questions
from agentgym_ig.commands.main import run

if __name__ == "__main__":
    run(questions)
