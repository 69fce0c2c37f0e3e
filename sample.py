"""Let a trained run speak.

python sample.py                                    # the newest run
python sample.py --run small --prompt "ROMEO:" --temperature 0.5
python sample.py --prompt file:start.txt --num-samples 4 --top-k 20 --seed 7
"""

import sys

from gptjax import cli
from gptjax.errors import one_line_errors

if __name__ == "__main__":
    with one_line_errors("sample.py"):
        command = cli.parse_sample(sys.argv[1:])
        # jax is imported here, after the arguments were understood.
        from gptjax.cache import use_compilation_cache
        from gptjax.inference import main

        use_compilation_cache()
        main(command)
