"""Generate text from a run: the same as `gptjax sample`.

python sample.py                                    # the newest run
python sample.py --run small --prompt "ROMEO:" --temperature 0.5
python sample.py --prompt file:start.txt --num-samples 4 --top-k 20 --seed 7
"""

import sys

from gptjax.cli.main import run

if __name__ == "__main__":
    run("sample", sys.argv[1:], "sample.py")
