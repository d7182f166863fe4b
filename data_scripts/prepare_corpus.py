"""Prepare a corpus; the same as `agentgym-ig data corpus`.

python data_scripts/prepare_corpus.py wiki18 --source wiki-18.jsonl.gz --out corpus.jsonl.gz
"""

from agentgym_ig.commands.data import corpus
from agentgym_ig.commands.main import run

if __name__ == "__main__":
    run(corpus)
