"""Build an index; the same as `agentgym-ig index build`.

python data_scripts/build_index.py --corpus wiki.jsonl.gz --out wiki-index
"""

from agentgym_ig.commands.build import build
from agentgym_ig.commands.main import run

if __name__ == "__main__":
    run(build)
