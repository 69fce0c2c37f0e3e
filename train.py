"""Train a GPT on a text file.

python train.py --config small                              # Tiny Shakespeare, a few minutes
python train.py --config small --optim.learning-rate 1e-3   # any field can be set
python train.py --data.text my.txt --run mine               # your own text
python train.py --run mine --resume                         # go on where it stopped
python train.py --config gpt2-xl --plan v5e:4x4             # what would that take?
python sample.py                                            # then let it speak
"""

import os
import sys
from pathlib import Path

from gptjax import cli
from gptjax.errors import one_line_errors

if __name__ == "__main__":
    with one_line_errors("train.py"):
        command = cli.parse_train(sys.argv[1:])
        if command.plan is not None:
            # The CUDA plug-in, loaded to compile, need not say that there is no GPU.
            os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
            from gptjax.plan.plan import plan

            plan(command.settings, command.plan)
            sys.exit()
        directory = command.directory() if command.distributed is None else None
        # jax is imported here, after the arguments were understood.
        from gptjax.cache import use_compilation_cache
        from gptjax.parallel import distributed
        from gptjax.tools.replay import replay
        from gptjax.training import train

        use_compilation_cache()
        with distributed.joined(command.distributed, command.distributed_wait, "train.py"):
            # Of several processes the first one chooses the name of a new folder.
            directory = directory or Path(distributed.first_does(lambda: str(command.directory())))
            if command.replay is not None:
                replay(directory, command.replay)
            else:
                train(command.settings, directory, resume=command.resume, profile=command.profile)
